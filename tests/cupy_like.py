"""An array that does what CuPy's does, on the CPU, and refuses what CuPy's refuses: for the fallback without a GPU.

After cupy/_core/core.pyx and _kernel.pyx of CuPy 14: NumPy's functions reach it through __array_ufunc__ and
__array_function__; there is no implicit conversion, either way; of ufunc.reduce there are add and multiply alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Array", "from_tensor"]

# What CuPy has of the functions, and of the arguments, that the fallback could call: each by CuPy's own signature.
_FUNCTIONS: dict[Any, set[str]] = {
    np.arange: {"start", "stop", "step", "dtype"},
    np.ascontiguousarray: {"dtype"},
    np.broadcast_to: set(),
    np.concatenate: {"axis", "out"},
    np.copyto: {"where"},
    np.dot: {"out"},
    np.empty_like: {"dtype", "order", "shape"},
    np.expand_dims: {"axis"},
    np.full_like: {"dtype", "order", "shape"},
    np.nonzero: set(),
    np.ones_like: {"dtype", "order", "shape"},
    np.repeat: {"axis"},
    np.stack: {"axis", "out"},
    np.take_along_axis: {"axis"},
    np.tile: set(),
    np.where: set(),
    np.zeros_like: {"dtype", "order", "shape"},
}
_GUFUNCS = {"matmul"}
_REDUCTIONS = {"add", "multiply"}
_ATTRIBUTES = {"dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides"}
_METHODS = {"all", "any", "argmax", "astype", "copy", "dot", "fill", "max", "min", "nonzero", "prod", "ravel"}
_METHODS |= {"reshape", "squeeze", "sum", "take", "transpose", "view"}


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """Wraps a NumPy array, which nothing outside reaches."""

    def __init__(self, array: Any) -> None:
        self._array = np.asarray(array)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" and not (method == "reduce" and ufunc.__name__ in _REDUCTIONS):
            raise NotImplementedError(f"`{ufunc.__name__}.{method}` is not supported yet")
        if ufunc.signature is not None and ufunc.__name__ not in _GUFUNCS:
            return NotImplemented
        if "where" in kwargs:
            raise TypeError("CuPy's ufuncs take no `where`")
        if "out" in kwargs:
            kwargs["out"] = tuple(_unwrapped(a) for a in kwargs["out"])
        return _wrapped(getattr(ufunc, method)(*(_unwrapped(a) for a in inputs), **kwargs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented
        if unknown := set(kwargs) - _FUNCTIONS[function]:
            raise TypeError(f"cupy.{function.__name__} takes no {', '.join(unknown)}")
        found = function(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in kwargs.items()})
        return tuple(map(_wrapped, found)) if isinstance(found, tuple) else _wrapped(found)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return getattr(self._array, name)
        if name not in _METHODS:
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        method = getattr(self._array, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in kwargs.items()})
            return tuple(map(_wrapped, found)) if isinstance(found, tuple) else _wrapped(found)

        return call

    @property
    def T(self) -> Array:
        return Array(self._array.T)

    def __len__(self) -> int:
        return len(self._array)

    def __bool__(self) -> bool:
        return bool(self._array)

    def __int__(self) -> int:
        return int(self._array)

    def __float__(self) -> float:
        return float(self._array)

    def __getitem__(self, index: Any) -> Any:
        return Array(self._array[_unwrapped(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._array[_unwrapped(index)] = _unwrapped(value)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def _wrapped(value: Any) -> Any:
    """Reductions to a number too: CuPy's are arrays of no dimensions, which stay on the GPU."""
    return Array(value) if isinstance(value, (np.ndarray, np.generic)) else value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Array):
        return value._array
    if isinstance(value, (tuple, list)):
        return type(value)(map(_unwrapped, value))
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


def from_tensor(tensor: Any) -> Array:
    """What dlgpu._arrays.to_array gives for a CUDA tensor, for a CPU one."""
    tensor = tensor.detach()
    return Array((tensor.float() if tensor.element_size() == 2 else tensor).numpy())


def from_dlpack(other: Any) -> Array:
    """As cupy.from_dlpack."""
    return Array(np.from_dlpack(other))
