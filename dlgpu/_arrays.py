"""Tensors as arrays and back, without a copy where the dtype allows: how the array code of dlgpu.fallback meets torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["to_array", "to_tensor"]


def to_array(tensor: torch.Tensor) -> Any:
    """A NumPy view of a CPU tensor or a CuPy view of a CUDA one; 16-bit floats, which NumPy cannot compute with, come as
    float32 copies."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16 or tensor.dtype is torch.float16:
        tensor = tensor.float()
    if tensor.is_cpu:
        return tensor.numpy()
    import cupy

    return cupy.from_dlpack(tensor)


def to_tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """The array as a tensor, rounded to `dtype` if it has another."""
    tensor = torch.from_numpy(array) if type(array) is np.ndarray else torch.from_dlpack(array)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
