"""How a program says in which form its own classes travel."""

from hpc_ray.serialize import deregister_serializer, register_serializer

__all__ = ["deregister_serializer", "register_serializer"]
