"""Names for the arguments of collective calls."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

from hpc_ray.collectives import ReduceOp


class Backend:
    """How a group sends: ``Backend(name)`` is the name as it is used.

    "GLOO" and "MPI" are the same here: shared memory within a node, MPI between nodes. "NCCL" is for GPUs.

    Raises:
        ValueError: there is no such backend.
    """

    NCCL: ClassVar[str] = "NCCL"
    GLOO: ClassVar[str] = "GLOO"
    MPI: ClassVar[str] = "MPI"

    def __new__(cls, name: str) -> str:  # type: ignore[misc]
        upper = {"TORCH_GLOO": "GLOO"}.get(name.upper(), name.upper())
        if upper not in ("NCCL", "GLOO", "MPI"):
            raise ValueError(f"Unrecognized backend: '{name}'. There are GLOO, MPI and NCCL")
        return upper


def cupy_available() -> bool:
    """Whether CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


def torch_available() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


__all__ = ["Backend", "ReduceOp", "cupy_available", "torch_available"]
