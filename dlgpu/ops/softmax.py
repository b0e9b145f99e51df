"""Softmax, log-softmax and log-sum-exp: checks, the dispatcher's ops and autograd. The kernels are in kernels/softmax.py."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import softmax as arrays
from dlgpu.kernels import configs, tuning
from dlgpu.kernels import softmax as kernels

__all__ = ["log_softmax", "logsumexp", "softmax"]


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """y_j = exp(x_j) / sum_k exp(x_k) along one dimension, in one kernel.

    Args:
        input: x, any shape, float32, bfloat16, float16 or float64.
        dim: the dimension that sums to 1. The last one, in memory too, is read in place; another is moved there, which
            copies. None, deprecated as in torch: 0 for 0, 1 and 3 dimensions, else 1.
        dtype: x is cast to it first, where given.

    Returns:
        y, as torch.nn.functional.softmax; a row with NaN or +inf, or of nothing but -inf, is NaN.

    Raises:
        IndexError: there is no such dimension.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: y. One read and one write forward, two reads and one write backward; rows longer than 32768 (16384
    backward; half of it where they do not lie on 16-byte boundaries, but for 16-bit ones forward) are read once more, from L2.

    >>> softmax(torch.zeros(1, 4), -1)
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return _along("softmax", input, dim, _stacklevel, dtype, False)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """y_j = x_j - log sum_k exp(x_k) along one dimension, in one kernel.

    Args, Returns, Raises and what is saved: as `softmax`.

    >>> log_softmax(torch.zeros(1, 4), -1)
    tensor([[-1.3863, -1.3863, -1.3863, -1.3863]])
    """
    return _along("log_softmax", input, dim, _stacklevel, dtype, True)


def logsumexp(input: torch.Tensor, dim: int | Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """l = log sum_k exp(x_k) along one dimension or several, in one kernel.

    Args:
        input: x, any shape, float32, bfloat16, float16 or float64.
        dim: the dimensions that are summed over. The last one is read in place; others are moved there, which copies.
        keepdim: whether they stay, with size 1.

    Returns:
        l, as torch.logsumexp: -inf where all x are, +inf where one is.

    Raises:
        IndexError, RuntimeError: there is no such dimension, or one is named twice.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: x by reference, and two float32 a row (the maximum and the sum of exponentials). One read forward,
    one read and one write backward.

    Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867.

    >>> logsumexp(torch.zeros(2, 4), 1)
    tensor([1.3863, 1.3863])
    """
    _checks.require_tensor("logsumexp", "input", input)
    _checks.require_floating("logsumexp", "input", input)
    backend = _dispatch.choose_backend(input, "logsumexp")
    given = [dim] if isinstance(dim, int) else list(dim)
    for d in given:
        _checks.require_integer("logsumexp", "dim", d)
    # torch's rule: an empty list means all dimensions.
    dims = [_wrap("logsumexp", d, input.dim()) for d in given] or list(range(input.dim()))
    if len(set(dims)) < len(dims):
        raise RuntimeError(f"logsumexp: dim {given} names a dimension twice")
    if input.dim() == 0:
        return _logsumexp(input.reshape(1), backend)
    kept = [d for d in range(input.dim()) if d not in dims]
    if dims == [input.dim() - 1]:
        x = input
    else:
        shape = [input.shape[d] for d in kept]
        size = 1
        for d in dims:
            size *= input.shape[d]
        x = input.permute(*kept, *sorted(dims)).reshape(*shape, size)
    lse = _logsumexp(x, backend)
    if keepdim:
        lse = lse.reshape([1 if d in dims else size for d, size in enumerate(input.shape)])
    return lse


def _wrap(op: str, dim: int, dims: int) -> int:
    """A dimension's number from 0 on."""
    low, high = -max(dims, 1), max(dims, 1) - 1
    if not low <= dim <= high:
        raise IndexError(
            f"{op}: dim is out of range (expected to be in range of [{low}, {high}], but got {dim})"
        )
    return dim % max(dims, 1)


def _along(
    op: str, input: torch.Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None, log: bool
) -> torch.Tensor:
    _checks.require_tensor(op, "input", input)
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {op} has been deprecated. Change the call to include dim=X as an argument.",
            # One more for dlgpu.functional's wrapper.
            stacklevel=stacklevel + 1,
        )
        dim = 0 if input.dim() in (0, 1, 3) else 1
    _checks.require_integer(op, "dim", dim)
    if dtype is not None:
        input = input.to(dtype)
    _checks.require_floating(op, "input", input)
    backend = _dispatch.choose_backend(input, op)
    last = input.dim() - 1
    dim = _wrap(op, dim, input.dim())
    if last < 0:
        return _softmax(input.reshape(1), log, backend).reshape(())
    if dim == last:
        return _softmax(input, log, backend)
    return _softmax(input.movedim(dim, last), log, backend).movedim(last, dim)


def _array_rows(x: torch.Tensor) -> Any:
    return to_array(x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def _fwd_fallback(x: torch.Tensor, log: bool) -> torch.Tensor:
    return to_tensor(arrays.softmax_fwd(_array_rows(x), log).reshape(x.shape), x.dtype)


def _fwd_eager(x: torch.Tensor, log: bool) -> torch.Tensor:
    return torch.log_softmax(x, -1) if log else torch.softmax(x, -1)


def _bwd_fallback(dy: torch.Tensor, y: torch.Tensor, log: bool) -> torch.Tensor:
    return to_tensor(arrays.softmax_bwd(_array_rows(dy), _array_rows(y), log).reshape(y.shape), y.dtype)


def _bwd_eager(dy: torch.Tensor, y: torch.Tensor, log: bool) -> torch.Tensor:
    """torch's own backward, which is differentiable."""
    backward = torch._log_softmax_backward_data if log else torch._softmax_backward_data
    return backward(dy, y, -1, y.dtype)


class SoftmaxFunction(torch.autograd.Function):
    """Autograd of `softmax` and `log_softmax`, at the op's Autograd key."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, log: bool, backend: str) -> torch.Tensor:
        y = _softmax.below(x, log, backend)
        ctx.save_for_backward(y)
        ctx.log, ctx.backend = log, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if _dispatch.differentiates():
            return _bwd_eager(dy, y, ctx.log), None, None
        return _softmax_backward.below(dy, y, ctx.log, ctx.backend), None, None


def _softmax_autograd(x: torch.Tensor, log: bool, backend: str) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return SoftmaxFunction.apply(x, log, backend)
    return _softmax.below(x, log, backend)


def _to_float32_on_cuda(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """torch's autocast: to float32 on CUDA, no effect on the CPU."""
    return _dispatch.cast_floating(args, torch.float32) if args[0].is_cuda else args


_softmax = _dispatch.define(
    "softmax(Tensor input, bool log, str backend) -> Tensor",
    triton=kernels.softmax_fwd,
    fallback=_fwd_fallback,
    eager=_fwd_eager,
    fake=lambda x, log, backend: x.new_empty(x.shape),
    autograd=_softmax_autograd,
    autocast=_to_float32_on_cuda,
)
_softmax_backward = _dispatch.define(
    "softmax_backward(Tensor dy, Tensor y, bool log, str backend) -> Tensor",
    triton=kernels.softmax_bwd,
    fallback=_bwd_fallback,
    fake=lambda dy, y, log, backend: y.new_empty(y.shape),
)


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _lse_fallback(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse, stats = arrays.logsumexp_fwd(_array_rows(x))
    return to_tensor(lse.reshape(x.shape[:-1]), x.dtype), to_tensor(stats, _statistics_dtype(x))


def _lse_fake(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    lse = x.new_empty(x.shape[:-1])
    return lse, x.new_empty((2, lse.numel()), dtype=_statistics_dtype(x))


def _lse_bwd_fallback(dlse: torch.Tensor, x: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    dx = arrays.logsumexp_bwd(to_array(dlse.reshape(-1)), _array_rows(x), to_array(stats))
    return to_tensor(dx.reshape(x.shape), x.dtype)


class LogSumExpFunction(torch.autograd.Function):
    """Autograd of `logsumexp`, at the op's Autograd key."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, backend: str) -> torch.Tensor:
        lse, stats = _logsumexp_fwd.below(x, backend)
        ctx.save_for_backward(x, stats)
        ctx.backend = backend
        return lse

    @staticmethod
    def backward(ctx: Any, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, stats = ctx.saved_tensors
        if _dispatch.differentiates():
            (dx,) = _dispatch.differentiable_vjp(lambda x: torch.logsumexp(x, -1), (x,), (True,), dlse)
            return dx, None
        return _logsumexp_backward.below(dlse, x, stats, ctx.backend), None


def _logsumexp_autograd(x: torch.Tensor, backend: str) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return LogSumExpFunction.apply(x, backend)
    return _logsumexp.below(x, backend)


_logsumexp = _dispatch.define(
    "logsumexp(Tensor input, str backend) -> Tensor",
    triton=lambda x: kernels.logsumexp_fwd(x)[0],
    fallback=lambda x: _lse_fallback(x)[0],
    eager=lambda x: torch.logsumexp(x, -1),
    fake=lambda x, backend: x.new_empty(x.shape[:-1]),
    autograd=_logsumexp_autograd,
    autocast=_to_float32_on_cuda,
)
_logsumexp_fwd = _dispatch.define(
    "logsumexp_fwd(Tensor input, str backend) -> (Tensor, Tensor)",
    triton=kernels.logsumexp_fwd,
    fallback=_lse_fallback,
    fake=_lse_fake,
)
_logsumexp_backward = _dispatch.define(
    "logsumexp_backward(Tensor dlse, Tensor input, Tensor stats, str backend) -> Tensor",
    triton=kernels.logsumexp_bwd,
    fallback=_lse_bwd_fallback,
    fake=lambda dlse, x, stats, backend: x.new_empty(x.shape),
)


def _explain(name: str, input: torch.Tensor, dim: Any) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor(name, "input", input)
    _checks.require_floating(name, "input", input)
    given = [dim] if isinstance(dim, int) else range(input.dim()) if dim is None else dim
    C = 1
    for d in given:
        C *= input.shape[d] if input.dim() else 1

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend != "triton":
            how = "torch's own" if backend == "torch" else "NumPy or CuPy, by blocks of rows"
            return [("forward, backward", how)]
        if name == "logsumexp":
            tile = tuning.tile(input.device, configs.logsumexp_tile, input.dtype, C)
            return [("_logsumexp_fwd_kernel", str(tile)), ("_logsumexp_bwd_kernel", str(tile))]
        found = []
        for kernel, backward in (("_softmax_fwd_kernel", False), ("_softmax_bwd_kernel", True)):
            # Of rows side by side.
            aligned = C * input.element_size() % 16 == 0
            tile = tuning.tile(input.device, configs.softmax_tile, input.dtype, C, backward, aligned)
            times = "once" if tile.lanes * tile.vector >= C else "twice"
            found.append((kernel, f"{tile}; reads each row {times}"))
        return found

    return input, steps


@_dispatch.explains("softmax")
def _explain_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Any]:
    return _explain("softmax", input, -1 if dim is None else dim)


@_dispatch.explains("log_softmax")
def _explain_log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Any]:
    return _explain("log_softmax", input, -1 if dim is None else dim)


@_dispatch.explains("logsumexp")
def _explain_logsumexp(
    input: torch.Tensor, dim: int | Sequence[int], keepdim: bool = False
) -> tuple[torch.Tensor, Any]:
    return _explain("logsumexp", input, dim)
