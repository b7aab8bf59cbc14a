"""Collective operations on arrays: the algorithms, for whoever can send arrays between ranks. ``hpc_ray.util.collective`` calls them."""

from hpc_ray.collectives.arrays import flat_array
from hpc_ray.collectives.group import Group, ReduceOp, Wire

__all__ = ["Group", "ReduceOp", "Wire", "flat_array"]
