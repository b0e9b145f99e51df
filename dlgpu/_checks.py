"""Refusals: every message names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
from typing import Any

import torch

__all__ = [
    "FLOATING",
    "require_device",
    "require_dtype",
    "require_floating",
    "require_integer",
    "require_number",
    "require_shape",
    "require_tensor",
]

# What some backend takes.
FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def require_tensor(op: str, name: str, value: Any) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def require_number(op: str, name: str, value: Any) -> None:
    """TypeError unless `value` is a real number, or one that is being traced."""
    if type(value) is not float and not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def require_integer(op: str, name: str, value: Any) -> None:
    """TypeError unless `value` is an integer, or one that is being traced."""
    if type(value) is not int and not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")


def require_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """TypeError unless the tensor's dtype is one of FLOATING."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def require_dtype(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, of: str) -> None:
    """TypeError unless the tensor has `dtype`, which is the dtype of argument `of`."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}, the dtype of {of}")


def require_device(op: str, name: str, tensor: torch.Tensor, device: torch.device, of: str) -> None:
    """RuntimeError unless the tensor is on `device`, which is the device of argument `of`."""
    if tensor.device != device:
        raise RuntimeError(f"{op}: {name} is on {tensor.device}, expected {device}, the device of {of}")


def require_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int | str, ...]) -> None:
    """RuntimeError unless the tensor's shape is `shape`; a str in it stands for any size."""
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(
        not isinstance(s, str) and s != g for s, g in zip(shape, got, strict=True)
    ):
        expected = ", ".join(str(s) for s in shape)
        raise RuntimeError(f"{op}: {name} has shape {list(got)}, expected [{expected}]")
