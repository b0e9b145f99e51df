"""Tensors as arrays and back, without a copy where the dtype allows: how the array code of dlgpu.fallback meets torch."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["to_array", "to_tensor"]


def to_array(tensor: torch.Tensor) -> Any:
    """A NumPy view of a CPU tensor or a CuPy view of a CUDA one; 16-bit floats, which NumPy cannot compute with, come as
    float32 copies."""
    if tensor.dtype is torch.bfloat16 or tensor.dtype is torch.float16:
        tensor = tensor.float()
    if tensor.device.type == "cpu":
        return tensor.detach().numpy()
    import cupy

    return cupy.from_dlpack(tensor.detach())


def to_tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """The array as a tensor, rounded to `dtype` if it has another."""
    tensor = torch.from_numpy(array) if hasattr(array, "__array_interface__") else torch.from_dlpack(array)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
