"""Batch norm with an activation after it: checks, the dispatcher's ops and autograd. The kernels are in
kernels/batch_norm.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import batch_norm as arrays
from dlgpu.kernels import batch_norm as kernels
from dlgpu.kernels import configs
from dlgpu.kernels._triton import device_limits
from dlgpu.kernels.activations import lookup

__all__ = ["batch_norm"]


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act((x - mean) / sqrt(var + eps) w + b), with a mean and a (biased) var of each channel.

    In training they are the batch's, and the running statistics move: running = (1 - momentum) running + momentum batch's,
    with the unbiased variance. Else they are the running ones.

    Args:
        input: x, [N, C] or [N, C, ...], float32, bfloat16, float16 or float64; any strides.
        running_mean, running_var: [C], of x's dtype, or float32 for a 16-bit x; changed in place in training; None there for
            not to keep any.
        weight, bias: w and b, [C], of the running statistics' dtype; None for 1 and 0.
        training: whether the statistics are the batch's.
        momentum: the batch's share in the running statistics; None for their average over all batches, which
            `num_batches_tracked`, of this one too, is needed for.
        eps: added to the variance.
        activation: None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh" or "silu".
        negative_slope: leaky ReLU's slope for negative z.
        num_batches_tracked: [] int64, read on the device.

    Returns:
        y, of x's shape and dtype, contiguous, as torch.nn.functional.batch_norm.

    Raises:
        RuntimeError: a shape or device does not fit; no running statistics in evaluation.
        TypeError: an argument's type or dtype does not fit.
        ValueError: one value a channel in training; no such activation.

    Saved for backward: x, w and b by reference, and two float32 a channel (float64 for float64); backward recomputes what
    the activation's derivative takes. Two reads and one write forward in training, one read in evaluation; backward two reads
    of each of x and dy and one write, in evaluation one read. Up to 512 values a channel training takes one launch each way.

    Source: Ioffe and Szegedy, arXiv:1502.03167.

    >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=0.0, activation="relu")
    tensor([[0.],
            [1.]])
    """
    _checks.require_tensor("batch_norm", "input", input)
    _checks.require_number("batch_norm", "eps", eps)
    _checks.require_number("batch_norm", "negative_slope", negative_slope)
    if momentum is not None:
        _checks.require_number("batch_norm", "momentum", momentum)
    _check(input, running_mean, running_var, weight, bias, training, activation)
    backend = _dispatch.choose_backend(input, "batch_norm")
    if not training:
        return _batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            None,
            None,
            None,
            0.0,
            eps,
            activation,
            negative_slope,
            backend,
        )
    batches = None
    if running_mean is not None or running_var is not None:
        batches = _batches(momentum, num_batches_tracked, input.device)
    y = _batch_norm(
        input,
        None,
        None,
        weight,
        bias,
        running_mean,
        running_var,
        batches,
        0.0 if momentum is None else momentum,
        eps,
        activation,
        negative_slope,
        backend,
    )
    # Torch's own operations raise the versions themselves.
    if backend != "torch" and not torch.compiler.is_compiling() and not _dispatch.transformed():
        changed = [t for t in (running_mean, running_var) if t is not None and not t.is_inference()]
        torch.autograd.graph.increment_version(changed)
    return y


def _batches(
    momentum: float | None, num_batches_tracked: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    if momentum is not None:
        return None
    if num_batches_tracked is None:
        raise TypeError("batch_norm: momentum is None, so num_batches_tracked is needed")
    _checks.require_tensor("batch_norm", "num_batches_tracked", num_batches_tracked)
    _checks.require_shape("batch_norm", "num_batches_tracked", num_batches_tracked, ())
    _checks.require_device("batch_norm", "num_batches_tracked", num_batches_tracked, device, "input")
    if num_batches_tracked.dtype is not torch.int64:
        raise TypeError(
            f"batch_norm: num_batches_tracked has dtype {num_batches_tracked.dtype}, expected torch.int64"
        )
    return num_batches_tracked


def _check(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    activation: str | None,
) -> None:
    lookup(activation)
    _checks.require_floating("batch_norm", "input", input)
    if input.dim() < 2:
        raise RuntimeError(f"batch_norm: input has shape {list(input.shape)}, expected [N, C] or [N, C, ...]")
    C = input.shape[1]
    given = None
    for name, t in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if t is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"batch_norm: {name} must be defined in evaluation mode")
            continue
        _checks.require_tensor("batch_norm", name, t)
        if t.dim() != 1 or t.shape[0] != C:
            raise RuntimeError(f"batch_norm: {name} should contain {C} elements, got shape {list(t.shape)}")
        _checks.require_device("batch_norm", name, t, input.device, "input")
        if t.dtype is not torch.float32 or input.dtype is torch.float64:
            _checks.require_dtype("batch_norm", name, t, input.dtype, "input")
        if given is not None:
            _checks.require_dtype("batch_norm", name, t, given.dtype, "the others")
        given = t
        if name.startswith("running") and t.requires_grad:
            raise RuntimeError(f"batch_norm: {name} is not differentiable: it cannot have requires_grad True")
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _vector(t: torch.Tensor | None) -> Any:
    return None if t is None else to_array(t)


def _rows(x: torch.Tensor) -> Any:
    """x [N, C, ...] as an array [N, C ...]."""
    return to_array(x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:])))


def _move(
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    batches: torch.Tensor | None,
    momentum: float,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: int,
) -> None:
    """Moves the running statistics towards the batch's."""
    share = momentum if batches is None else 1.0 / batches.to(mean.dtype)
    for running, new in ((running_mean, mean), (running_var, var * (count / max(count - 1, 1)))):
        if running is not None:
            running.copy_(running.to(new.dtype) * (1.0 - share) + new * share)


def _fwd_triton(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    batches: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    w, b = _contiguous(w), _contiguous(b)
    if mean is not None and var is not None:
        return kernels.batch_norm_eval_fwd(
            x, mean.contiguous(), var.contiguous(), w, b, eps, activation, negative_slope, keep
        )
    new_mean, new_var = _contiguous(running_mean), _contiguous(running_var)
    found = kernels.batch_norm_fwd(
        x, w, b, new_mean, new_var, batches, momentum, eps, activation, negative_slope
    )
    for t, new in ((running_mean, new_mean), (running_var, new_var)):
        if t is not None and new is not None and new is not t:
            t.copy_(new)
    return found


def _fwd_fallback(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    batches: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, C = _statistics_dtype(x), x.shape[1]
    rows = _rows(x)
    if mean is None or var is None:
        mean_array, var_array = arrays.batch_norm_statistics(rows, C)
        if x.numel() and (running_mean is not None or running_var is not None):
            batch_mean, batch_var = to_tensor(mean_array, dtype), to_tensor(var_array, dtype)
            count = x.numel() // C
            _move(running_mean, running_var, batches, momentum, batch_mean, batch_var, count)
    else:
        mean_array, var_array = to_array(mean), to_array(var)
    y, stats = arrays.batch_norm_apply(
        rows, mean_array, var_array, _vector(w), _vector(b), eps, activation, negative_slope
    )
    return to_tensor(y.reshape(x.shape), x.dtype), to_tensor(stats, dtype) if keep else x.new_empty(
        0, dtype=dtype
    )


def _shaped(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[C] so that it broadcasts over x [N, C, ...]."""
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _others(x: torch.Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def _eager(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    batches: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> torch.Tensor:
    """From torch's own functions, differentiable any number of times."""
    if not x.numel():
        # No batch moves anything, and torch's function refuses no channels; the gradients are zeros.
        nothing = torch.zeros(x.shape[1], dtype=_statistics_dtype(x), device=x.device)
        return _affine(x, nothing, nothing, w, b).to(x.dtype)
    same = all(t is None or t.dtype is x.dtype for t in (w, b, running_mean, running_var, mean, var))
    if same and batches is None:
        training = mean is None or var is None
        moved = (running_mean, running_var) if training else (mean, var)
        z = F.batch_norm(x, *moved, w, b, training, momentum, eps)
        return lookup(activation).eager(z, negative_slope)
    dtype = _statistics_dtype(x)
    if mean is None or var is None:
        var, mean = torch.var_mean(x.to(dtype), _others(x), correction=0)
        # Running statistics are no part of the graph.
        count = x.numel() // x.shape[1]
        _move(running_mean, running_var, batches, momentum, mean.detach(), var.detach(), count)
    z = _affine(x, mean.to(dtype), (var.to(dtype) + eps).rsqrt(), w, b).to(x.dtype)
    return lookup(activation).eager(z, negative_slope).contiguous()


def _affine(
    x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None
) -> torch.Tensor:
    z = (x.to(mean.dtype) - _shaped(mean, x)) * _shaped(rstd, x)
    z = z if w is None else z * _shaped(w, x)
    return z if b is None else z + _shaped(b, x)


def _fwd_fake(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    batches: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[1]) if keep else 0, dtype=_statistics_dtype(x))


def _gradients(
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    x: torch.Tensor,
    w: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An op returns tensors: an empty one stands for what was not needed."""
    like = x if w is None else w
    return (
        x.new_empty(0) if dx is None else dx,
        like.new_empty(0) if dw is None else dw,
        like.new_empty(0) if db is None else db,
    )


def _bwd_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    stats: torch.Tensor,
    training: bool,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needs_x, needs_w, needs_b = needs
    found = kernels.batch_norm_bwd(
        dy,
        x,
        _contiguous(w),
        _contiguous(b),
        stats,
        training,
        activation,
        negative_slope,
        (needs_x, needs_w, needs_b),
    )
    return _gradients(*found, x, w)


def _bwd_fallback(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    stats: torch.Tensor,
    training: bool,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dw, db = arrays.batch_norm_bwd(
        _rows(dy),
        _rows(x),
        _vector(w),
        _vector(b),
        to_array(stats),
        training,
        activation,
        negative_slope,
        needs,
    )
    dtype = x.dtype if w is None else w.dtype
    return _gradients(
        None if dx is None else to_tensor(dx.reshape(x.shape), x.dtype),
        None if dw is None else to_tensor(dw, dtype),
        None if db is None else to_tensor(db, dtype),
        x,
        w,
    )


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    stats: torch.Tensor,
    training: bool,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like, C = x if w is None else w, x.shape[1]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        like.new_empty(C if needs[1] else 0),
        like.new_empty(C if needs[2] else 0),
    )


class BatchNormFunction(torch.autograd.Function):
    """Autograd of `batch_norm`, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor | None,
        var: torch.Tensor | None,
        w: torch.Tensor | None,
        b: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        batches: torch.Tensor | None,
        momentum: float,
        eps: float,
        activation: str | None,
        negative_slope: float,
        backend: str,
    ) -> torch.Tensor:
        y, stats = _batch_norm_fwd.below(
            x,
            mean,
            var,
            w,
            b,
            running_mean,
            running_var,
            batches,
            momentum,
            eps,
            activation,
            negative_slope,
            True,
            backend,
        )
        ctx.save_for_backward(x, w, b, stats)
        ctx.options = mean is None, eps, activation, negative_slope, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, b, stats = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[i] for i in (0, 3, 4))
        training, eps, activation, negative_slope, backend = ctx.options
        if _dispatch.differentiates():

            def eager(x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
                if training:
                    z = F.batch_norm(x, None, None, w, b, True, 0.0, eps)
                else:
                    z = _affine(x, stats[1], stats[0], w, b).to(x.dtype)
                return lookup(activation).eager(z, negative_slope)

            dx, dw, db = _dispatch.differentiable_vjp(eager, (x, w, b), needs, dy)
        else:
            found = _batch_norm_backward.below(
                dy, x, w, b, stats, training, activation, negative_slope, needs, backend
            )
            dx, dw, db = (g if need else None for g, need in zip(found, needs, strict=True))
        return dx, None, None, dw, db, *[None] * 8


def _batch_norm_autograd(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    # Decided here: inside the Function, needs_input_grad is True even under no_grad.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        return BatchNormFunction.apply(x, mean, var, w, b, *options)
    return _batch_norm.below(x, mean, var, w, b, *options)


def _result_only(forward: Any) -> Any:
    return lambda *args: forward(*args, False)[0]


# Statistics that are read (evaluation) and those that are changed (training) are arguments of their own.
_ARGUMENTS = (
    "Tensor input, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? batches, float momentum, float eps, str? activation, float negative_slope"
)
_batch_norm = _dispatch.define(
    f"batch_norm({_ARGUMENTS}, str backend) -> Tensor",
    triton=_result_only(_fwd_triton),
    fallback=_result_only(_fwd_fallback),
    eager=_eager,
    fake=lambda x, *rest: x.new_empty(x.shape),
    autograd=_batch_norm_autograd,
)
_batch_norm_fwd = _dispatch.define(
    f"batch_norm_fwd({_ARGUMENTS}, bool keep, str backend) -> (Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_batch_norm_backward = _dispatch.define(
    "batch_norm_backward(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, bool training, "
    "str? activation, float negative_slope, bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


@_dispatch.explains("batch_norm")
def _explain(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    num_batches_tracked: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor("batch_norm", "input", input)
    _check(input, running_mean, running_var, weight, bias, training, activation)
    N, C = input.shape[:2]
    L = math.prod(input.shape[2:])

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend != "triton":
            how = "torch's own operations" if backend == "torch" else "NumPy or CuPy, by blocks of rows"
            return [("forward, backward", how)]
        tile = configs.batch_norm_tile(input.dtype, N, C, L, device_limits(input.device)[2], training)
        if training and tile.rows >= N * L:
            return [("_batch_norm_small_fwd_kernel", str(tile)), ("_batch_norm_small_bwd_kernel", str(tile))]
        add = ("_parameter_gradients_kernel", "adds the strips' sums")
        if not training:
            found = [
                ("_batch_norm_apply_kernel", str(tile)),
                ("_batch_norm_sums_kernel", f"{tile}; writes dx"),
            ]
            return found if weight is None and bias is None else [*found, add]
        return [
            ("_batch_norm_statistics_kernel", str(tile)),
            ("_batch_norm_finish_kernel", "puts the strips' statistics together"),
            ("_batch_norm_apply_kernel", str(tile)),
            ("_batch_norm_sums_kernel", str(tile)),
            add,
            ("_batch_norm_dx_kernel", str(tile)),
        ]

    return input, steps
