"""Tensors of programs as flat numpy arrays."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def flat_array(tensor: Any, *, writable: bool = False) -> np.ndarray:
    """The elements of a numpy array or a torch tensor on the CPU, in the same memory.

    Raises:
        TypeError: something else, or a tensor on a GPU.
        ValueError: not contiguous; or read-only, and it is to be written.
    """
    import numpy as np

    array = tensor
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.device.type != "cpu":
            raise TypeError(
                f"a tensor on {tensor.device}: CPU groups take tensors in host memory; call .cpu(), or use torch.distributed for NCCL"
            )
        array = tensor.detach().numpy()
    if not isinstance(array, np.ndarray):
        raise TypeError(f"collectives take numpy arrays and torch tensors, not {type(tensor).__module__}.{type(tensor).__name__}")
    if array.dtype.hasobject:
        raise TypeError("collectives take arrays of numbers, not of Python objects")
    if not array.flags.c_contiguous:
        raise ValueError("the array is not contiguous; use numpy.ascontiguousarray or tensor.contiguous()")
    if writable and not array.flags.writeable:
        raise ValueError("the array is read-only (it came from the object store); copy it first")
    return array.reshape(-1)
