"""Tensors as arrays and back, without a copy where the dtype allows: how the array code of dlgpu.fallback meets torch, and
how the functions of dlgpu.functional take arrays."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["takes_arrays", "to_array", "to_tensor"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Arguments that a function may write to.
_WRITTEN = frozenset(("running_mean", "running_var"))


def to_array(tensor: torch.Tensor) -> Any:
    """A NumPy view of a CPU tensor or a CuPy view of a CUDA one; 16-bit floats, which NumPy cannot compute with, come as
    float32 copies."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16 or tensor.dtype is torch.float16:
        tensor = tensor.float()
    if tensor.is_cpu:
        try:
            return tensor.numpy()
        except RuntimeError:
            # A view of negated numbers, or a tensor of zeros that has no memory: a copy.
            return tensor.numpy(force=True)
    import cupy

    return cupy.from_dlpack(tensor)


def to_tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """The array as a tensor, rounded to `dtype` if it has another."""
    tensor = torch.from_numpy(array) if type(array) is np.ndarray else torch.from_dlpack(array)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def takes_arrays(function: _Function) -> _Function:
    """`function` of tensors, on arrays too: of NumPy, CuPy or whatever else speaks DLPack, giving the same kind back.

    Where the first argument is a tensor nothing changes. Arrays are not copied, on the way in or out, but for NumPy's that
    are read-only or have negative strides. Among arrays there is no autograd.

    Raises:
        TypeError: arrays of two kinds, or arrays and tensors.
        ValueError: such an array of NumPy's would be written to.
    """
    signature = inspect.signature(function)
    first = next(iter(signature.parameters))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # The usual case, at once: 0.3 us.
        if args and type(args[0]) is torch.Tensor:
            return function(*args, **kwargs)
        leading = args[0] if args else kwargs.get(first)
        if isinstance(leading, torch.Tensor):
            return function(*args, **kwargs)
        if hasattr(leading, "__torch_function__"):
            # torch.fx's proxies, among others.
            return torch.overrides.handle_torch_function(wrapper, (leading,), *args, **kwargs)
        if not hasattr(leading, "__dlpack__"):
            # Which says what it expects.
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        name = function.__name__
        written = _WRITTEN | ({first} if given.arguments.get("inplace") else set())
        for key, value in given.arguments.items():
            given.arguments[key] = _imported(name, key, value, leading, key in written)
        return _exported(function(*given.args, **given.kwargs), leading)

    # As pickle finds it.
    wrapper.__module__ = "dlgpu.functional"
    wrapper.__qualname__ = function.__name__
    return wrapper  # type: ignore[return-value]


def _imported(op: str, name: str, value: Any, first: Any, written: bool) -> Any:
    """An argument with its arrays, all of the first one's kind, as tensors over the same memory."""
    if isinstance(value, (list, tuple)):
        return [_imported(op, name, v, first, written) for v in value]
    if not hasattr(value, "__dlpack__"):
        return value
    both_numpy = isinstance(value, np.ndarray) and isinstance(first, np.ndarray)
    if type(value) is not type(first) and not both_numpy:
        kind = type(first).__name__
        raise TypeError(
            f"{op}: {name} is of type {type(value).__name__}, expected {kind}, as the first argument"
        )
    # What torch cannot look at: read-only memory, negative strides.
    if both_numpy and not (value.flags.writeable and all(stride >= 0 for stride in value.strides)):
        if written:
            raise ValueError(f"{op}: {name} is written to, so it must be writeable, of positive strides")
        value = value.copy()
    return torch.from_dlpack(value)


def _exported(result: Any, like: Any) -> Any:
    """A function's result with its tensors as arrays of the kind of `like`, over the same memory."""
    if isinstance(result, tuple):
        found = [_exported(value, like) for value in result]
        return type(result)(*found) if hasattr(result, "_fields") else tuple(found)
    if not isinstance(result, torch.Tensor):
        return result
    if isinstance(like, np.ndarray):
        return result.numpy()
    library = sys.modules[type(like).__module__.partition(".")[0]]
    namespace = like.__array_namespace__() if hasattr(like, "__array_namespace__") else library
    return namespace.from_dlpack(result)
