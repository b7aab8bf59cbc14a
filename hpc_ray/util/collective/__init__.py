"""Collective operations among actors and tasks: allreduce, broadcast and the rest, on numpy arrays and torch tensors in host memory."""

from typing import NoReturn

from hpc_ray.util.collective.collective import (
    allgather,
    allreduce,
    barrier,
    broadcast,
    create_collective_group,
    destroy_collective_group,
    get_collective_group_size,
    get_group_handle,
    get_rank,
    gloo_available,
    init_collective_group,
    is_backend_available,
    is_group_initialized,
    nccl_available,
    recv,
    reduce,
    reducescatter,
    send,
)
from hpc_ray.util.collective.types import Backend, ReduceOp


def __getattr__(name: str) -> NoReturn:
    """What Ray has and hpc_ray has not, with the reason."""
    why = ""
    if name.endswith("_multigpu"):
        why = f": it is for several GPUs of one process, through NCCL; use {name.removesuffix('_multigpu')} with tensors in host memory"
    if name == "register_collective_backend":
        why = ": groups are in shared memory and MPI; other backends are called directly in the actors"
    raise AttributeError(f"module 'hpc_ray.util.collective' has no attribute {name!r}{why}")


__all__ = [
    "Backend",
    "ReduceOp",
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "create_collective_group",
    "destroy_collective_group",
    "get_collective_group_size",
    "get_group_handle",
    "get_rank",
    "gloo_available",
    "init_collective_group",
    "is_backend_available",
    "is_group_initialized",
    "nccl_available",
    "recv",
    "reduce",
    "reducescatter",
    "send",
]
