"""Layer norm and RMS norm: checks, the dispatcher's ops and autograd. The kernels are in kernels/layer_norm.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import layer_norm as arrays
from dlgpu.kernels import configs, tuning
from dlgpu.kernels import layer_norm as kernels
from dlgpu.kernels._triton import device_limits

__all__ = ["layer_norm", "rms_norm"]


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """y = (x - mean) / sqrt(var + eps) w + b, mean and (biased) var of each row: the elements of the last dimensions.

    Args:
        input: x, [..., *normalized_shape], float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the last dimensions, one at least.
        weight, bias: w and b, [*normalized_shape], of x's dtype, or float32 for a 16-bit x; None for 1 and 0.
        eps: added to the variance.

    Returns:
        y, of x's shape and dtype, contiguous, as torch.nn.functional.layer_norm.

    Raises:
        RuntimeError: a shape or device does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: x, w and b by reference, and two float32 a row (float64 for float64): 1 / sqrt(var + eps) and mean.
    One read and one write forward; two reads and one write backward, which adds up the gradients of w and b on the way. Rows
    longer than 32768 elements (8192 backward) are read once more.

    Source: Ba, Kiros and Hinton, arXiv:1607.06450.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), [2], eps=0.0)
    tensor([[-1.,  1.]])
    """
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """y = x / sqrt(mean x^2 + eps) w, the mean of each row: the elements of the last dimensions.

    Args:
        input, normalized_shape, weight: as `layer_norm`.
        eps: added to the mean; None for the machine epsilon of the dtype that is computed in, float32's for 16-bit x.

    Returns, Raises and what is saved: as `layer_norm`, as torch.nn.functional.rms_norm; of each row only 1 / sqrt(...).

    Source: Zhang and Sennrich, arXiv:1910.07467.

    >>> rms_norm(torch.tensor([[1.0, -7.0]]), [2], eps=0.0)
    tensor([[ 0.2000, -1.4000]])
    """
    return _norm("rms_norm", input, normalized_shape, weight, None, eps)


def _norm(
    op: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
) -> torch.Tensor:
    rms = op == "rms_norm"
    dims, eps = _check(op, input, normalized_shape, weight, bias, eps)
    return _layer_norm(input, weight, bias, dims, eps, rms, _dispatch.choose_backend(input, op))


def _check(
    op: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
) -> tuple[int, float]:
    """(dimensions that are normalized, eps)."""
    _checks.require_tensor(op, "input", input)
    _checks.require_floating(op, "input", input)
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(
            f"{op}: normalized_shape must be a tuple of ints, got {type(normalized_shape).__name__}"
        )
    for size in normalized_shape:
        _checks.require_integer(op, "normalized_shape", size)
    if eps is None and op == "rms_norm":
        eps = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    _checks.require_number(op, "eps", eps)
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{op}: normalized_shape is empty, expected one dimension at least")
    if tuple(input.shape[-len(shape) :]) != shape:
        expected = ", ".join(map(str, shape))
        raise RuntimeError(
            f"{op}: input has shape {list(input.shape)}, expected [*, {expected}], as normalized_shape says"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        _checks.require_tensor(op, name, parameter)
        _checks.require_shape(op, name, parameter, shape)
        _checks.require_device(op, name, parameter, input.device, "input")
        if parameter.dtype is not torch.float32 or input.dtype is torch.float64:
            _checks.require_dtype(op, name, parameter, input.dtype, "input")
    if weight is not None and bias is not None:
        _checks.require_dtype(op, "bias", bias, weight.dtype, "weight")
    return len(shape), eps  # type: ignore[return-value]


def _width(input: torch.Tensor, dims: int) -> int:
    """The elements that are normalized together."""
    return math.prod(input.shape[input.dim() - dims :])


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _matrix(x: torch.Tensor, C: int) -> torch.Tensor:
    return x.reshape(x.numel() // max(C, 1), C)


def _vector(parameter: torch.Tensor | None) -> Any:
    return None if parameter is None else to_array(parameter.reshape(-1))


def _fwd_triton(
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.layer_norm_fwd(x, w, b, _width(x, dims), eps, rms, keep)


def _fwd_fallback(
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    matrix = to_array(_matrix(x, _width(x, dims)))
    y, stats = arrays.layer_norm_fwd(matrix, _vector(w), _vector(b), eps, rms)
    dtype = _statistics_dtype(x)
    kept = to_tensor(stats, dtype) if keep else x.new_empty(0, dtype=dtype)
    return to_tensor(y.reshape(x.shape), x.dtype), kept


def _eager(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, dims: int, eps: float, rms: bool
) -> torch.Tensor:
    """torch's own."""
    shape = x.shape[x.dim() - dims :]
    if w is not None and w.dtype is not x.dtype:
        # Not every one of torch's takes two dtypes.
        return _eager(x.to(w.dtype), w, b, dims, eps, rms).to(x.dtype)
    return F.rms_norm(x, shape, w, eps) if rms else F.layer_norm(x, shape, w, b, eps)


def _fwd_fake(
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape)
    dtype = _statistics_dtype(x)
    if not keep:
        return y, x.new_empty(0, dtype=dtype)
    return y, x.new_empty((1 if rms else 2, math.prod(x.shape[: x.dim() - dims])), dtype=dtype)


def _gradients(
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    x: torch.Tensor,
    w: torch.Tensor | None,
    dims: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An op returns tensors: an empty one stands for what was not needed."""
    like = x if w is None else w
    shape = x.shape[x.dim() - dims :]
    return (
        x.new_empty(0) if dx is None else dx,
        like.new_empty(0) if dw is None else dw.reshape(shape),
        like.new_empty(0) if db is None else db.reshape(shape),
    )


def _bwd_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    stats: torch.Tensor,
    dims: int,
    eps: float,
    rms: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needs_x, needs_w, needs_b = needs
    found = kernels.layer_norm_bwd(dy, x, w, stats, _width(x, dims), rms, (needs_x, needs_w, needs_b))
    return _gradients(*found, x, w, dims)


def _bwd_fallback(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    stats: torch.Tensor,
    dims: int,
    eps: float,
    rms: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    C = _width(x, dims)
    dx, dw, db = arrays.layer_norm_bwd(
        to_array(_matrix(dy, C)), to_array(_matrix(x, C)), _vector(w), to_array(stats), rms, needs
    )
    dtype = x.dtype if w is None else w.dtype
    return _gradients(
        None if dx is None else to_tensor(dx.reshape(x.shape), x.dtype),
        None if dw is None else to_tensor(dw, dtype),
        None if db is None else to_tensor(db, dtype),
        x,
        w,
        dims,
    )


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    stats: torch.Tensor,
    dims: int,
    eps: float,
    rms: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like = x if w is None else w
    shape = x.shape[x.dim() - dims :]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        like.new_empty(shape if needs[1] else 0),
        like.new_empty(shape if needs[2] else 0),
    )


class LayerNormFunction(torch.autograd.Function):
    """Autograd of `layer_norm` and `rms_norm`, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor | None,
        b: torch.Tensor | None,
        dims: int,
        eps: float,
        rms: bool,
        backend: str,
    ) -> torch.Tensor:
        y, stats = _layer_norm_fwd.below(x, w, b, dims, eps, rms, True, backend)
        ctx.save_for_backward(x, w, b, stats)
        ctx.options = dims, eps, rms, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, b, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dims, eps, rms, backend = ctx.options
        if _dispatch.differentiates():
            gradients = _dispatch.differentiable_vjp(
                lambda x, w, b: _eager(x, w, b, dims, eps, rms), (x, w, b), needs, dy
            )
            return (*gradients, None, None, None, None)
        found = _layer_norm_backward.below(dy, x, w, stats, dims, eps, rms, needs, backend)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None, None)


def _layer_norm_autograd(
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    backend: str,
) -> torch.Tensor:
    # Decided here: inside the Function, needs_input_grad is True even under no_grad.
    if torch.is_grad_enabled() and (
        x.requires_grad or (w is not None and w.requires_grad) or (b is not None and b.requires_grad)
    ):
        return LayerNormFunction.apply(x, w, b, dims, eps, rms, backend)
    return _layer_norm.below(x, w, b, dims, eps, rms, backend)


def _to_float32_on_cuda(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """torch's autocast: to float32 on CUDA, no effect on the CPU."""
    return _dispatch.cast_floating(args, torch.float32) if args[0].is_cuda else args


def _result_only(forward: Any) -> Any:
    return lambda *args: forward(*args, False)[0]


_layer_norm = _dispatch.define(
    "layer_norm(Tensor input, Tensor? weight, Tensor? bias, int dims, float eps, bool rms, str backend) -> Tensor",
    triton=_result_only(_fwd_triton),
    fallback=_result_only(_fwd_fallback),
    eager=lambda *args: _eager(*args).contiguous(),
    fake=lambda x, w, b, dims, eps, rms, backend: x.new_empty(x.shape),
    autograd=_layer_norm_autograd,
    autocast=_to_float32_on_cuda,
)
_layer_norm_fwd = _dispatch.define(
    "layer_norm_fwd(Tensor input, Tensor? weight, Tensor? bias, int dims, float eps, bool rms, bool keep, str backend) "
    "-> (Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_layer_norm_backward = _dispatch.define(
    "layer_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor stats, int dims, float eps, bool rms, "
    "bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


def _explain(
    op: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
) -> tuple[torch.Tensor, Any]:
    dims, _ = _check(op, input, normalized_shape, weight, bias, eps)
    C = _width(input, dims)
    N = input.numel() // max(C, 1)

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend != "triton":
            how = "torch's own" if backend == "torch" else "NumPy or CuPy, by blocks of rows"
            return [("forward, backward", how)]
        tile = tuning.tile(input.device, configs.layer_norm_tile, input.dtype, C)
        sums = weight is not None or bias is not None
        capability, _, multiprocessors = device_limits(input.device)
        bwd = tuning.tile(input.device, configs.layer_norm_bwd_tile, capability, input.dtype, C)
        if sums:
            bwd = configs.layer_norm_bwd_strips(bwd, C, N, multiprocessors)
        found = [
            ("_layer_norm_fwd_kernel", f"{tile}; reads each row {'once' if tile.block_n >= C else 'twice'}")
        ]
        if bwd.block_n < C:
            found.append(("_layer_norm_means_kernel", "the two means of each row, too long to be read once"))
        found.append(("_layer_norm_bwd_kernel", str(bwd)))
        if sums:
            found.append(("_parameter_gradients_kernel", "adds the strips' sums"))
        return found

    return input, steps


@_dispatch.explains("layer_norm")
def _explain_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, Any]:
    return _explain("layer_norm", input, normalized_shape, weight, bias, eps)


@_dispatch.explains("rms_norm")
def _explain_rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, Any]:
    return _explain("rms_norm", input, normalized_shape, weight, None, eps)
