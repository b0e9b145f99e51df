"""Losses: public functions, checks, the dispatcher's ops and autograd. The table and the kernels are in kernels/losses.py.

Saved for backward are the operands, by reference, and nothing else. Forward reads input and target once and sums in a fixed
order; backward reads them once more and writes the gradient.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import losses as arrays
from dlgpu.kernels import configs, tuning
from dlgpu.kernels import losses as kernels
from dlgpu.kernels.losses import LOSSES, divisor_of, periodic

__all__ = [
    "binary_cross_entropy_with_logits",
    "hinge_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "multi_margin_loss",
    "smooth_l1_loss",
]

REDUCTIONS = ("none", "mean", "sum")


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """l = w (x - t)^2, reduced: one read of input and target forward; one more and a write of the gradient backward.

    Args:
        input: x, any shape, float32, bfloat16, float16 or float64.
        target: t, of x's shape, or one that broadcasts with it, which warns as in torch; integers count as x's dtype.
        size_average, reduce: deprecated, as in torch; if given they replace `reduction`.
        reduction: "none", "mean" or "sum". A weighted mean is divided by the sum of the weights.
        weight: w, of x's shape, or None for ones. It has a gradient, at the price of torch's own operations around the kernel.

    Returns:
        The loss, a scalar or of the broadcast shape for "none", in the promoted dtype; float32 under autocast. As
        torch.nn.functional.mse_loss; the mean of nothing is NaN.

    Raises:
        RuntimeError, ValueError: a shape, device or option does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: input, target and weight by reference.

    >>> mse_loss(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
    tensor(2.)
    """
    reduction = _legacy(size_average, reduce, reduction)
    return _difference("mse_loss", "mse_loss", input, target, reduction, weight, 0.0)


def l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """l = w |x - t|, reduced; its derivative at 0 is 0.

    Args, Returns, Raises and what is saved: as `mse_loss`.

    >>> l1_loss(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
    tensor(1.)
    """
    reduction = _legacy(size_average, reduce, reduction)
    return _difference("l1_loss", "l1_loss", input, target, reduction, weight, 0.0)


def smooth_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """l = (x - t)^2 / (2 beta) where |x - t| < beta, |x - t| - beta / 2 elsewhere, reduced; `l1_loss` for a beta of 0.

    Args:
        beta: where the square ends, 0 at least.
        input, target, size_average, reduce, reduction: as `mse_loss`, as are Returns, Raises and what is saved.

    Source: Girshick, arXiv:1504.08083.

    >>> smooth_l1_loss(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
    tensor(0.7500)
    """
    _checks.require_number("smooth_l1_loss", "beta", beta)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss: beta must not be negative, got {beta}")
    reduction = _legacy(size_average, reduce, reduction)
    name = "l1_loss" if beta == 0 else "smooth_l1_loss"
    return _difference("smooth_l1_loss", name, input, target, reduction, None, beta)


def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """l = w (x - t)^2 / 2 where |x - t| <= delta, w delta (|x - t| - delta / 2) elsewhere, reduced.

    Args:
        delta: where the square ends, more than 0.
        reduction: as `mse_loss`, but a weighted mean is divided by the number of elements, as in torch.
        input, target, weight: as `mse_loss`, as are Raises and what is saved.

    Returns:
        As `mse_loss`, in the input's dtype (the promoted one with a weight).

    Source: Huber, Annals of Mathematical Statistics 35 (1964).

    >>> huber_loss(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 1.0]), delta=2.0)
    tensor(3.)
    """
    _checks.require_number("huber_loss", "delta", delta)
    if not delta > 0:
        raise RuntimeError(f"huber_loss: delta must be positive, got {delta}")
    loss = _difference("huber_loss", "huber_loss", input, target, reduction, weight, delta)
    return loss if weight is not None else _as(loss, input)


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """l = w (-q t log s(x) - (1 - t) log(1 - s(x))), s the logistic function, reduced; exact for small and large |x| alike.

    Args:
        input: x, the logits, any shape, float32, bfloat16, float16 or float64.
        target: t, of x's shape, usually from 0 to 1.
        weight: w, which broadcasts to x's shape; None for ones. Without gradient, as in torch.
        size_average, reduce: deprecated, as in torch; if given they replace `reduction`.
        reduction: "none", "mean" (over all elements, weighted or not) or "sum".
        pos_weight: q, which broadcasts to x's shape, the weight of positives; None for ones. Without gradient. One that
            repeats along leading dimensions, as a vector of classes does, is read as it is; any other is written out.

    Returns:
        The loss, a scalar or of x's shape for "none", in the target's dtype; float32 under autocast. As
        torch.nn.functional.binary_cross_entropy_with_logits, NaN for a logit of -inf.

    Raises:
        RuntimeError, ValueError: a shape, device or option does not fit, or a weight requires a gradient.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: all operands by reference. The target has a gradient, too.

    >>> binary_cross_entropy_with_logits(torch.tensor([0.0, 1000.0]), torch.tensor([1.0, 0.0]), reduction="none")
    tensor([6.9315e-01, 1.0000e+03])
    """
    name = "binary_cross_entropy_with_logits"
    reduction = _legacy(size_average, reduce, reduction)
    _require_pair(name, input, target)
    _require_same_shape(name, input, target)
    for argument, tensor in (("input", input), ("target", target)):
        _checks.require_floating(name, argument, tensor)
    loss = _loss(name, name, input, target, weight, pos_weight, 0.0, reduction)
    return _as(loss, target)


def hinge_loss(
    input: torch.Tensor, target: torch.Tensor, reduction: str = "mean", *, squared: bool = False
) -> torch.Tensor:
    """l = max(0, 1 - t x), or its square, reduced; the derivative where t x = 1 is 0. Torch has no such function.

    Args:
        input: x, the scores, any shape, float32, bfloat16, float16 or float64.
        target: t, -1 or 1, of x's shape; integers count as x's dtype.
        reduction: "none", "mean" or "sum".
        squared: whether to square each loss.

    Returns:
        The loss, a scalar or of x's shape for "none", in the promoted dtype; float32 under autocast.

    Raises:
        RuntimeError, ValueError: a shape, device or option does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: input and target by reference.

    Source: Cortes and Vapnik, Machine Learning 20 (1995).

    >>> hinge_loss(torch.tensor([0.5, -2.0]), torch.tensor([1, 1]))
    tensor(1.7500)
    """
    _require_pair("hinge_loss", input, target)
    _require_same_shape("hinge_loss", input, target)
    name = "squared_hinge_loss" if squared else "hinge_loss"
    return _loss("hinge_loss", name, input, target, None, None, 0.0, reduction)


def kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> torch.Tensor:
    """l = t (log t - x), 0 where t = 0, or exp(t) (t - x) if `log_target`, reduced: the Kullback-Leibler divergence.

    Args:
        input: x, log-probabilities, any shape, float32, bfloat16, float16 or float64.
        target: t, probabilities, or their logarithms if `log_target`, of a shape that broadcasts with x's.
        size_average, reduce: deprecated, as in torch; if given they replace `reduction`.
        reduction: "none", "batchmean" (the sum over the size of x's first dimension: the divergence), "mean" (over all
            elements, which warns as in torch) or "sum".
        log_target: see target.

    Returns:
        The loss, a scalar or of the broadcast shape for "none", in the promoted dtype; float32 under autocast. As
        torch.nn.functional.kl_div.

    Raises:
        RuntimeError, ValueError: a shape, device or option does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: the target by reference, and the input where the target needs a gradient (NaN where t = 0). Backward
    reads no input for the input's gradient.

    >>> kl_div(torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    tensor(0.6931)
    """
    legacy = size_average is not None or reduce is not None
    # torch's division by the batch size stays where the deprecated arguments replace "batchmean".
    over_rows = legacy and reduction == "batchmean"
    reduction = _legacy(size_average, reduce, reduction)
    if reduction == "mean" and not legacy:
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=3,
        )
    _require_pair("kl_div", input, target)
    for argument, tensor in (("input", input), ("target", target)):
        _checks.require_floating("kl_div", argument, tensor)
    x, t = _broadcast("kl_div", input, target)
    if reduction == "batchmean" and x.shape[:1] != input.shape[:1]:
        reduction, over_rows = "sum", True
    name = "kl_div_log_target" if log_target else "kl_div"
    loss = _loss("kl_div", name, x, t, None, None, 0.0, reduction)
    return loss / input.shape[0] if over_rows and input.dim() else loss


def multi_margin_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """l_i = sum_{j != t_i} w_{t_i} max(0, margin - x_{i t_i} + x_ij)^p / C, reduced: the multi-class hinge loss.

    Args:
        input: x, [N, C] or [C], float32, bfloat16, float16 or float64.
        target: t, classes from 0 to C - 1, [N], or [] or [1] for x [C], int64.
        p: 1 or 2.
        margin: see the equation.
        weight: w, [C], in x's dtype, or None for ones. Without gradient, as in torch.
        size_average, reduce: deprecated, as in torch; if given they replace `reduction`.
        reduction: "none", "mean" (over the rows, weighted or not) or "sum".

    Returns:
        The loss, a scalar or of the target's shape for "none", in the input's dtype; float32 under autocast. As
        torch.nn.functional.multi_margin_loss; NaN in x counts as a margin that is kept.

    Raises:
        RuntimeError: a target is no class, on the CPU. On a GPU that would need a synchronization: there the row's loss and
            gradient are NaN, and under dlgpu.debug(True) it is this error.
        RuntimeError, ValueError: a shape, device or option does not fit, or the weight requires a gradient.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: all operands by reference. Twice differentiable, which torch's is not. Rows of more than 8192 columns
    are read twice backward, the second time from L2.

    >>> multi_margin_loss(torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([0]))
    tensor(0.1667)
    """
    op = "multi_margin_loss"
    reduction = _legacy(size_average, reduce, reduction)
    _require_pair(op, input, target)
    if weight is not None:
        _checks.require_tensor(op, "weight", weight)
        if weight.dim() != 1:
            raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected one dimension")
    if p not in (1, 2):
        raise ValueError(f"{op}: p must be 1 or 2, got {p!r}")
    _checks.require_number(op, "margin", margin)
    x, t = input, target
    if input.dim() < 2:
        x = input.reshape(1, -1)
        t = target.reshape(1) if target.dim() < 2 and target.numel() == 1 else target
    backend = _dispatch.choose_backend(input, op)
    loss = _multi_margin(x, t, weight, int(p), margin, reduction, backend)
    return loss.view(target.shape) if reduction == "none" else loss


def _legacy(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        return torch.nn._reduction.legacy_get_string(size_average, reduce)
    return reduction


def _require_pair(op: str, input: Any, target: Any) -> None:
    _checks.require_tensor(op, "input", input)
    _checks.require_tensor(op, "target", target)


def _require_same_shape(op: str, input: torch.Tensor, target: torch.Tensor) -> None:
    if target.shape != input.shape:
        raise ValueError(
            f"{op}: target has shape {list(target.shape)}, expected {list(input.shape)}, the shape of input"
        )


def _broadcast(op: str, input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if input.shape == target.shape:
        return input, target
    try:
        x, t = torch.broadcast_tensors(input, target)
    except RuntimeError:
        raise RuntimeError(
            f"{op}: target has shape {list(target.shape)}, which does not broadcast with {list(input.shape)}, the shape of "
            "input"
        ) from None
    return x, t


def _difference(
    op: str,
    name: str,
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    weight: torch.Tensor | None,
    parameter: float,
) -> torch.Tensor:
    """A loss of x - t, weighted as torch weights it."""
    _require_pair(op, input, target)
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=4,
        )
    x, t = _broadcast(op, input, target)
    if weight is None:
        return _loss(op, name, x, t, None, None, parameter, reduction)
    _checks.require_tensor(op, "weight", weight)
    _checks.require_device(op, "weight", weight, input.device, "input")
    if weight.shape != input.shape:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, expected {list(input.shape)}, the shape of input"
        )
    _require_reduction(op, reduction, REDUCTIONS)
    over_weights = reduction == "mean" and name != "huber_loss"
    if torch.is_grad_enabled() and weight.requires_grad:
        # The kernel knows no gradient of the weight: torch's own product does.
        loss = _loss(op, name, x, t, None, None, parameter, "none") * weight
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" and not over_weights else loss.sum()
    else:
        loss = _loss(op, name, x, t, weight, None, parameter, "sum" if over_weights else reduction)
    return loss / weight.sum() if over_weights else loss


def _as(loss: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """The loss in an operand's dtype, which autocast makes float32."""
    dtype = operand.dtype
    if dtype == loss.dtype:
        return loss
    if dtype is not torch.float64 and torch.is_autocast_enabled(operand.device.type):
        dtype = torch.float32
    return loss.to(dtype)


def _loss(
    op: str,
    name: str,
    x: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    parameter: float,
    reduction: str,
) -> torch.Tensor:
    """The op on operands of one dtype, the one they promote to."""
    for argument, w in (("weight", weight), ("pos_weight", q)):
        if w is not None:
            _checks.require_tensor(op, argument, w)
    dtype = x.dtype
    if t.dtype != dtype:
        dtype = torch.promote_types(dtype, t.dtype)
    if weight is not None and weight.dtype != dtype and op != "binary_cross_entropy_with_logits":
        dtype = torch.promote_types(dtype, weight.dtype)
    x, t = (a if a.dtype == dtype else a.to(dtype) for a in (x, t))
    weight, q = (w if w is None or w.dtype == dtype else w.to(dtype) for w in (weight, q))
    backend = _dispatch.choose_backend(x, op)
    return _elementwise(x, t, weight, q, name, float(parameter), reduction, backend)


def _require_reduction(op: str, reduction: str, known: Sequence[str]) -> None:
    if reduction not in known:
        raise ValueError(f"{op}: reduction must be one of {', '.join(known)}, got {reduction!r}")


def _check(
    x: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
) -> None:
    if name not in LOSSES:
        raise ValueError(f"loss: got {name!r}, expected one of {', '.join(LOSSES)}")
    op = name.removeprefix("squared_").removesuffix("_log_target")
    _checks.require_floating(op, "input", x)
    _require_reduction(op, reduction, (*REDUCTIONS, "batchmean") if op == "kl_div" else REDUCTIONS)
    _checks.require_shape(op, "target", t, tuple(x.shape))
    for argument, a in (("target", t), ("weight", weight), ("pos_weight", q)):
        if a is None:
            continue
        _checks.require_dtype(op, argument, a, x.dtype, "input")
        _checks.require_device(op, argument, a, x.device, "input")
        if a is not t and not _broadcasts(a.shape, x.shape):
            raise RuntimeError(
                f"{op}: {argument} has shape {list(a.shape)}, which does not broadcast to {list(x.shape)}, the shape of "
                "input"
            )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    )


def _fwd_triton(*args: Any) -> torch.Tensor:
    _check(*args)
    return kernels.loss_fwd(*args)


def _weights_array(weight: torch.Tensor | None, shape: torch.Size) -> Any | None:
    return None if weight is None else to_array(periodic(weight, shape))


def _divisor(shape: torch.Size, reduction: str) -> float | None:
    return None if reduction == "none" else divisor_of(shape, reduction)


def _fwd_fallback(
    x: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
) -> torch.Tensor:
    _check(x, t, weight, q, name, parameter, reduction)
    w, q = (_weights_array(a, x.shape) for a in (weight, q))
    divisor = _divisor(x.shape, reduction)
    return to_tensor(arrays.loss_fwd(to_array(x), to_array(t), w, q, name, parameter, divisor), x.dtype)


def _fwd_eager(
    x: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
) -> torch.Tensor:
    _check(x, t, weight, q, name, parameter, reduction)
    if weight is None:
        return LOSSES[name].eager(x, t, q, parameter, reduction)
    loss = LOSSES[name].eager(x, t, q, parameter, "none") * weight
    return loss if reduction == "none" else loss.sum() / divisor_of(x.shape, reduction)


def _fwd_fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    # The last two: the reduction, the backend.
    _check(x, *args[:-1])
    return x.new_empty(x.shape if args[-2] == "none" else ())


def _no_tensors(
    gradients: tuple[torch.Tensor | None, torch.Tensor | None], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An op's results are tensors: empty ones for gradients that nobody needs."""
    dx, dt = (like.new_empty(0) if d is None else d for d in gradients)
    return dx, dt


def _bwd_triton(dloss: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _no_tensors(kernels.loss_bwd(dloss, *args), dloss)


def _bwd_fallback(
    dloss: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    w, q = (_weights_array(a, t.shape) for a in (weight, q))
    gradients = arrays.loss_bwd(
        to_array(dloss),
        None if x is None else to_array(x),
        to_array(t),
        w,
        q,
        name,
        parameter,
        _divisor(t.shape, reduction),
        (needs[0], needs[1]),
    )
    dx, dt = (None if d is None else to_tensor(d, t.dtype) for d in gradients)
    return _no_tensors((dx, dt), t)


def _gradients_eager(
    dloss: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dt), from torch's own operations, which are differentiable; None where `needs` is False."""
    row = LOSSES[name]
    g = dloss if reduction == "none" else (dloss / divisor_of(t.shape, reduction)).expand(t.shape)
    if weight is not None:
        g = g * weight
    dx = dt = None
    if needs[0]:
        dx = row.eager_gradient(g, x, t, q, parameter)
    if needs[1]:
        dt = (
            -row.eager_gradient(g, x, t, q, parameter)
            if row.eager_target_gradient is None
            else row.eager_target_gradient(g, x, t, q, parameter)
        )
    return dx, dt


def _bwd_fake(dloss: torch.Tensor, x: torch.Tensor | None, t: torch.Tensor, *args: Any) -> tuple[Any, Any]:
    # The last two: needs, the backend.
    dx, dt = (t.new_empty(t.shape if need else 0) for need in args[-2])
    return dx, dt


class LossFunction(torch.autograd.Function):
    """Autograd of the elementwise losses, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        weight: torch.Tensor | None,
        q: torch.Tensor | None,
        name: str,
        parameter: float,
        reduction: str,
        backend: str,
    ) -> torch.Tensor:
        reads_input = LOSSES[name].reads_input or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if reads_input else None, t, weight, q)
        ctx.options, ctx.backend = (name, parameter, reduction), backend
        return _elementwise.below(x, t, weight, q, name, parameter, reduction, backend)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        operands = dloss, *ctx.saved_tensors, *ctx.options, needs
        if _dispatch.differentiates():
            gradients = _gradients_eager(*operands)
            return (*gradients, None, None, None, None, None, None)
        dx, dt = _elementwise_backward.below(*operands, ctx.backend)
        return dx if needs[0] else None, dt if needs[1] else None, None, None, None, None, None, None


def _refuse_gradient(op: str, **weights: torch.Tensor | None) -> None:
    for argument, weight in weights.items():
        if weight is not None and weight.requires_grad:
            raise RuntimeError(f"{op}: {argument} requires a gradient, which it has none of; detach it")


def _elementwise_autograd(
    x: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
    backend: str,
) -> torch.Tensor:
    if torch.is_grad_enabled():
        _refuse_gradient(name, weight=weight, pos_weight=q)
        if x.requires_grad or t.requires_grad:
            return LossFunction.apply(x, t, weight, q, name, parameter, reduction, backend)
    return _elementwise.below(x, t, weight, q, name, parameter, reduction, backend)


def _to_float32(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """torch's autocast: its losses are of float32. On the CPU its weighted ones of a difference are none of those ops."""
    x, weight, name = args[0], args[2], args[4]
    if weight is not None and name in ("mse_loss", "l1_loss") and x.is_cpu:
        return args
    return _dispatch.cast_floating(args, torch.float32)


_elementwise = _dispatch.define(
    "elementwise_loss(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str name, float parameter, "
    "str reduction, str backend) -> Tensor",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    eager=_fwd_eager,
    fake=_fwd_fake,
    autograd=_elementwise_autograd,
    autocast=_to_float32,
)
_elementwise_backward = _dispatch.define(
    "elementwise_loss_backward(Tensor dloss, Tensor? input, Tensor target, Tensor? weight, Tensor? pos_weight, str name, "
    "float parameter, str reduction, bool[2] needs, str backend) -> (Tensor, Tensor)",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


def _check_multi_margin(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str
) -> None:
    op = "multi_margin_loss"
    _checks.require_floating(op, "input", x)
    _checks.require_shape(op, "input", x, ("N", "C"))
    if x.shape[1] == 0:
        raise RuntimeError(f"{op}: input has shape {list(x.shape)}: no classes")
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target has dtype {target.dtype}, expected torch.int64")
    _checks.require_device(op, "target", target, x.device, "input")
    _checks.require_shape(op, "target", target, (x.shape[0],))
    if weight is not None:
        _checks.require_dtype(op, "weight", weight, x.dtype, "input")
        _checks.require_device(op, "weight", weight, x.device, "input")
        _checks.require_shape(op, "weight", weight, (x.shape[1],))
    _require_reduction(op, reduction, REDUCTIONS)


def _check_classes(x: torch.Tensor, target: torch.Tensor) -> None:
    """RuntimeError, torch's, for a target that is no class: always on the CPU, on a GPU only when debugging, for it
    synchronizes."""
    if target.numel() == 0 or not _dispatch.may_read(target):
        return
    low, high = torch.aminmax(target)
    if low < 0 or high >= x.shape[1]:
        row = int(((target < 0) | (target >= x.shape[1])).nonzero()[0, 0])
        raise RuntimeError(
            f"multi_margin_loss: target {int(target[row])} of row {row} is out of range for {x.shape[1]} classes"
        )


def _multi_margin_triton(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, p: int, margin: float, reduction: str
) -> torch.Tensor:
    _check_multi_margin(x, target, weight, reduction)
    _check_classes(x, target)
    return kernels.multi_margin_fwd(x, target, weight, p, margin, reduction)


def _multi_margin_fallback(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, p: int, margin: float, reduction: str
) -> torch.Tensor:
    _check_multi_margin(x, target, weight, reduction)
    _check_classes(x, target)
    w = None if weight is None else to_array(weight)
    divisor = _divisor(target.shape, reduction)
    return to_tensor(arrays.multi_margin_fwd(to_array(x), to_array(target), w, p, margin, divisor), x.dtype)


def _multi_margin_terms(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, p: int, margin: float, reduction: str
) -> torch.Tensor:
    """The loss from torch's own operations, differentiable any number of times."""
    known = (target >= 0) & (target < x.shape[1])
    classes = torch.where(known, target, 0)[:, None]
    z = margin - x.gather(1, classes) + x
    over = (z > 0) & (torch.arange(x.shape[1], device=x.device) != classes)
    z = torch.where(over, z, 0.0)
    losses = (z if p == 1 else z * z).sum(1) / x.shape[1]
    if weight is not None:
        losses = losses * weight[classes[:, 0]]
    losses = losses * torch.where(known, 1.0, torch.nan).to(x.dtype)
    return losses if reduction == "none" else losses.sum() / divisor_of(target.shape, reduction)


def _multi_margin_eager(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, p: int, margin: float, reduction: str
) -> torch.Tensor:
    _check_multi_margin(x, target, weight, reduction)
    _check_classes(x, target)
    return _multi_margin_terms(x, target, weight, p, margin, reduction)


def _multi_margin_fake(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: int,
    margin: float,
    reduction: str,
    backend: str,
) -> torch.Tensor:
    _check_multi_margin(x, target, weight, reduction)
    return x.new_empty(target.shape if reduction == "none" else ())


def _multi_margin_bwd_fallback(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: int,
    margin: float,
    reduction: str,
) -> torch.Tensor:
    w = None if weight is None else to_array(weight)
    divisor = _divisor(target.shape, reduction)
    operands = to_array(dloss), to_array(x), to_array(target), w
    return to_tensor(arrays.multi_margin_bwd(*operands, p, margin, divisor), x.dtype)


def _multi_margin_bwd_eager(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: int,
    margin: float,
    reduction: str,
) -> torch.Tensor:
    """Differentiable."""
    known = (target >= 0) & (target < x.shape[1])
    classes = torch.where(known, target, 0)[:, None]
    z = margin - x.gather(1, classes) + x
    over = (z > 0) & (torch.arange(x.shape[1], device=x.device) != classes)
    slope = torch.where(over, torch.ones_like(z) if p == 1 else 2 * z, 0.0)
    slope = slope.scatter_add(1, classes, -slope.sum(1, keepdim=True))
    g = (
        dloss
        / divisor_of(target.shape, reduction)
        / x.shape[1]
        * torch.where(known, 1.0, torch.nan).to(x.dtype)
    )
    if weight is not None:
        g = g * weight[classes[:, 0]]
    return slope * g[:, None]


class MultiMarginLossFunction(torch.autograd.Function):
    """Autograd of `multi_margin_loss` on [N, C], at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        p: int,
        margin: float,
        reduction: str,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, target, weight)
        ctx.options, ctx.backend = (p, margin, reduction), backend
        return _multi_margin.below(x, target, weight, p, margin, reduction, backend)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if _dispatch.differentiates():
            dx = _multi_margin_bwd_eager(dloss, *ctx.saved_tensors, *ctx.options)
        else:
            dx = _multi_margin_backward.below(dloss, *ctx.saved_tensors, *ctx.options, ctx.backend)
        return dx, None, None, None, None, None, None


def _multi_margin_autograd(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, *options: Any
) -> torch.Tensor:
    if torch.is_grad_enabled():
        _refuse_gradient("multi_margin_loss", weight=weight)
        if x.requires_grad:
            return MultiMarginLossFunction.apply(x, target, weight, *options)
    return _multi_margin.below(x, target, weight, *options)


_multi_margin = _dispatch.define(
    "multi_margin_loss(Tensor input, Tensor target, Tensor? weight, int p, float margin, str reduction, str backend) "
    "-> Tensor",
    triton=_multi_margin_triton,
    fallback=_multi_margin_fallback,
    eager=_multi_margin_eager,
    fake=_multi_margin_fake,
    autograd=_multi_margin_autograd,
    autocast=lambda args, dtype: _dispatch.cast_floating(args, torch.float32),
)
_multi_margin_backward = _dispatch.define(
    "multi_margin_loss_backward(Tensor dloss, Tensor input, Tensor target, Tensor? weight, int p, float margin, "
    "str reduction, str backend) -> Tensor",
    triton=kernels.multi_margin_bwd,
    fallback=_multi_margin_bwd_fallback,
    fake=lambda dloss, x, *rest: x.new_empty(x.shape),
)


def _explain(op: str, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    bound = inspect.signature(globals()[op]).bind(*args, **kwargs)
    bound.apply_defaults()
    input, target, reduction = (bound.arguments[name] for name in ("input", "target", "reduction"))
    _require_pair(op, input, target)
    _checks.require_floating(op, "input", input)
    margin = op == "multi_margin_loss"
    stem = "multi_margin" if margin else "loss"
    if margin:
        C = input.shape[-1] if input.dim() else 1
        tile: Any = tuning.tile(input.device, configs.multi_margin_tile, input.dtype, C)
        programs = -(-input.numel() // max(C, 1) // tile.block_m)
    else:
        tile = tuning.tile(input.device, configs.loss_tile, input.dtype)
        programs = configs.loss_programs(-(-input.numel() // tile.block))

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend != "triton":
            how = "torch's own" if backend == "torch" else "NumPy or CuPy, blocked"
            return [("forward, backward", how)]
        found = [(f"_{stem}_fwd_kernel", f"{tile}; reads input and target once")]
        if reduction != "none" and programs > 1:
            found.append(("_loss_reduce_kernel", f"one program, sums {programs}"))
        twice = margin and tile.block_n < C
        reads = "reads the input twice" if twice else "reads the operands and writes the gradient once"
        return [*found, (f"_{stem}_bwd_kernel", f"{tile}; {reads}")]

    return input, steps


for _name in __all__:
    _dispatch.explains(_name)(functools.partial(_explain, _name))
