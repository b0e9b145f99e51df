"""The one place that imports Triton, and the jit helpers that every kernel shares.

Without Triton the modules of this package still import: `triton.jit` then gives an object that raises when it is
launched. With TRITON_INTERPRET=1 kernels run in Triton's interpreter, on CPU tensors and with no GPU; four of its
habits need help here (measured on 3.6 and 3.7): it multiplies the raw bits of bf16 in `tl.dot`, it truncates float32 to
bf16 where hardware rounds to nearest even, it is not thread-safe, and 3.6 counts on a conversion that NumPy has no more.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import configs

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
except ImportError:
    AVAILABLE = False
    INTERPRETED = False

    class _NoKernel:
        def __init__(self, fn: Any) -> None:
            self.fn = fn

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                "Triton is not installed: `pip install triton` (Linux), or use_backend('fallback')"
            )

    class _Language:
        """Stands for triton.language while kernels are defined: every name in it is a function that gives its argument."""

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: args[0] if args else None

    class _Triton:
        @staticmethod
        def jit(fn: Any = None, **options: Any) -> Any:
            return _NoKernel if fn is None else _NoKernel(fn)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    tl = _Language()
    triton = _Triton()

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "descriptor",
    "device_limits",
    "launch",
    "matmul_precision",
    "most_registers",
    "tl",
    "triton",
]

# Read inside kernels, where only tl.constexpr globals may be.
INTERPRET = tl.constexpr(INTERPRETED)

_interpreter_lock = threading.RLock()


def _mend_range() -> None:
    """For Triton 3.6, whose interpreter makes an int of an array of one element, which NumPy from 2.4 on refuses: no `range`
    would take a number that a kernel computed."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(())))

    interpreter._patch_lang_tensor = patched


if INTERPRETED and triton.__version__.startswith("3.6."):
    _mend_range()


def _require_memory(t: torch.Tensor) -> None:
    """RuntimeError for a view of negated numbers: a kernel would read what lies in memory, with the other sign."""
    if t.is_neg():
        raise RuntimeError(
            "a tensor's negative bit is set (it is the imag of a conj): give resolve_neg() of it"
        )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches `kernel` on the current stream of the first tensor's device.

    FP fusion is always set: its default differs between Triton versions. An empty grid launches nothing.
    """
    if 0 in grid:
        return
    meta.setdefault("enable_fp_fusion", True)
    for a in args:
        if type(a) is torch.Tensor:
            _require_memory(a)
    if INTERPRETED:
        # A GPU overflows and divides by zero without a word; so does the interpreter's NumPy then.
        with _interpreter_lock, np.errstate(all="ignore"):
            kernel[grid](*args, **meta)
        return
    device = next(a.device for a in (getattr(a, "base", a) for a in args) if isinstance(a, torch.Tensor))
    if device.index == torch.cuda.current_device():
        _run(kernel, grid, args, meta)
    else:
        with torch.cuda.device(device):
            _run(kernel, grid, args, meta)


def most_registers(num_warps: int) -> int:
    """Of a thread, in a block of so many warps."""
    return min(255, 65536 // (32 * num_warps))


# kernel -> options with which it spilled.
_spilled: dict[Any, set[frozenset[Any]]] = {}


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launches, and from the second time on lets a thread have all the registers there are where the machine code spilled:
    unasked, the assembler aims at more threads a multiprocessor, and on 10.0 above all a few variants spill for that."""
    if kernel in _spilled and frozenset(meta.items()) in _spilled[kernel]:
        meta["maxnreg"] = most_registers(meta.get("num_warps", 4))
    compiled = kernel[grid](*args, **meta)
    if getattr(compiled, "n_spills", 0) and meta.get("maxnreg") is None:
        _spilled.setdefault(kernel, set()).add(frozenset(meta.items()))


def descriptor(t: torch.Tensor, block: Sequence[int]) -> Any:
    """A TMA descriptor of blocks of t, whose last dimension is contiguous and whose rows are multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    _require_memory(t)
    # The stride of a single row says nothing, and may be no multiple of 16 bytes.
    strides = [*t.stride()[:-1], 1] if t.shape[0] > 1 else [t[0].numel(), *t.stride()[1:-1], 1]
    return TensorDescriptor(t, list(t.shape), strides, list(block))


@functools.cache
def _cuda_limits(index: int) -> tuple[int, int, int]:
    properties = torch.cuda.get_device_properties(index)
    return (
        configs.tiled_capability(properties.major * 10 + properties.minor),
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.multi_processor_count,
    )


def device_limits(device: torch.device) -> tuple[int, int, int]:
    """(capability whose tiles it takes, shared memory a block in bytes, multiprocessors); the interpreter poses as an H100
    with four of them."""
    if device.type == "cuda":
        return _cuda_limits(device.index if device.index is not None else torch.cuda.current_device())
    return 90, 227 * 1024, 4


def matmul_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input_precision: "ieee" unless torch's own setting lets float32 products use tf32."""
    if dtype is not torch.float32:
        return "ieee"
    backend = torch.backends.cuda.matmul
    # fp32_precision follows the legacy setters; reading allow_tf32 after a user set it raises.
    allowed = backend.fp32_precision == "tf32" if hasattr(backend, "fp32_precision") else backend.allow_tf32
    return "tf32" if allowed else "ieee"


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with float32 accumulation; the interpreter cannot multiply 16-bit operands rightly."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _cast(x, DTYPE: tl.constexpr):
    """float32 x rounded to nearest even in DTYPE; the interpreter would truncate to bf16."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
        return rounded.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
