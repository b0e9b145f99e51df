"""Softmax cross-entropy: checks, the dispatcher's ops and autograd. The kernels are in kernels/cross_entropy.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import cross_entropy as arrays
from dlgpu.kernels import _triton, configs, tuning
from dlgpu.kernels import cross_entropy as kernels

__all__ = ["CrossEntropyOutput", "cross_entropy"]

REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy` gives when asked for more than the loss; None stands for what was not asked for."""

    loss: torch.Tensor
    lse: torch.Tensor | None
    accuracy: torch.Tensor | None


@overload
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    token_weights: torch.Tensor | None = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_lse: Literal[False] = ...,
    return_accuracy: Literal[False] = ...,
    inplace_grad: bool = ...,
    grad_in_forward: bool = ...,
) -> torch.Tensor: ...
@overload
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    token_weights: torch.Tensor | None = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    return_lse: bool = ...,
    return_accuracy: bool = ...,
    inplace_grad: bool = ...,
    grad_in_forward: bool = ...,
) -> torch.Tensor | CrossEntropyOutput: ...
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    token_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
    return_accuracy: bool = False,
    inplace_grad: bool = False,
    grad_in_forward: bool = False,
) -> torch.Tensor | CrossEntropyOutput:
    """loss_i = u_i (sum_j a_j (lse - z_j) + k lse^2), lse = log sum_j exp z_j, z_j = s x_j or c tanh(s x_j / c), with
    a_j = (1 - e) w_t [j = t] + e / C w_j for a class t = target_i, a_j = w_j ((1 - e) q_j + e / C) for probabilities q.

    Without extras, that is (1 - e) w_t (lse - x_t) + e / C sum_j w_j (lse - x_j).

    Args:
        input: logits x, [C], [N, C] or [N, C, d1, ...], float32, bfloat16, float16 or float64.
        target: class indices, [], [N] or [N, d1, ...], int64 or uint8; or class probabilities q, of the input's shape and
            dtype, which get a gradient too: dloss_i / dq_j = u_i (1 - e) w_j (lse - z_j).
        weight: w, [C], of the input's dtype, or None for ones.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        ignore_index: rows with this target count nowhere: loss, lse and gradient 0. Probabilities have none, and with them
            one of 0 or more is refused, as in torch.
        reduction: "none", "mean" or "sum". The mean is the sum over sum_i u_i w_t of the rows that count (NaN if there are
            none), for probabilities over sum_i u_i.
        label_smoothing: e, in [0, 1].
        token_weights: u, of the loss's unreduced shape, of a floating dtype, or None for ones; no gradient.
        z_loss: k. Each row's k lse^2 keeps the normalizer near 1.
        softcap: c > 0, or None for no cap: logits in (-c, c).
        logit_scale: s.
        return_lse: give lse too, differentiable; 0 at ignored rows; float32, or float64 for float64 logits. NaN for a row
            with an infinite logit, as its loss is.
        return_accuracy: give too the share of the rows that count whose target has the largest logit (ties count), or with
            "none" 1 or 0 for each row. float32 (float64 for float64); no gradient. Class indices only.
        inplace_grad: backward may write the gradient over the logits, and then raises their version counter: using them
            afterwards in another backward is torch's error. It does where it runs eagerly, without create_graph, the logits
            are [N, C] (or [C]) with columns side by side, and probabilities take no gradient; elsewhere this has no effect.
        grad_in_forward: forward also writes the gradient, for an upstream gradient of 1: in all one read and one write of the
            logits. The first backward multiplies it by the upstream gradient, which costs nothing but a launch where that is
            1, and gives it away; later ones, and create_graph, compute it again. For "mean" and "sum", class indices, float32
            and bfloat16 (gradients of float16 underflow before a loss scale reaches them), without lse, run eagerly by the
            kernels; elsewhere this has no effect.

    Returns:
        The loss, a scalar or target's shape (without the classes) for "none", in the input's dtype; float32 under autocast.
        As torch.nn.functional.cross_entropy. With return_lse or return_accuracy a CrossEntropyOutput (loss, lse, accuracy).

    Raises:
        IndexError: a target is no class, on the CPU. On a GPU that would need a synchronization: there the row's loss and
            gradient are NaN, and under dlgpu.debug(True) it is this error.
        RuntimeError, ValueError: a shape, device or option does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: the logits by reference (and probabilities, weights), and two float32 a row, the maximum and the sum of
    exponentials (three with probabilities). Backward recomputes the probabilities: 2 reads and 1 write of the logits in all.
    The CPU fallback keeps the exponentials instead, in what becomes the gradient: as much as torch keeps.

    Sources: label smoothing, Szegedy et al., arXiv:1512.00567; online softmax, Milakov and Gimelshein, arXiv:1805.02867;
    z-loss, Chowdhery et al., arXiv:2204.02311; soft cap, Gemma Team, arXiv:2408.00118.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor(1.3863)
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]), return_lse=True).lse
    tensor([1.3863, 1.3863])
    """
    _checks.require_tensor("cross_entropy", "input", input)
    _checks.require_tensor("cross_entropy", "target", target)
    if weight is not None:
        _checks.require_tensor("cross_entropy", "weight", weight)
    _checks.require_integer("cross_entropy", "ignore_index", ignore_index)
    _checks.require_number("cross_entropy", "label_smoothing", label_smoothing)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    extra = (
        token_weights is not None
        or softcap is not None
        or return_lse
        or return_accuracy
        or inplace_grad
        or z_loss != 0
        or logit_scale != 1
    )
    backend = _dispatch.choose_backend(input, "cross_entropy_extra" if extra else "cross_entropy")
    if backend == "torch" and input.is_cpu:
        # torch takes a negative one, and NaN, for none.
        _check_smoothing(label_smoothing)
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    extra = extra or (grad_in_forward and backend == "triton")
    if target.dtype is torch.uint8:
        target = target.long()
    if not extra and input.dim() == 2 and target.dim() == 1:
        return _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, backend)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input has no dimensions, expected [C], [N, C] or [N, C, d1, ...]")
    probabilities = target.is_floating_point() and input.shape == target.shape
    if probabilities and ignore_index >= 0:
        raise RuntimeError(
            f"cross_entropy: ignore_index is not supported for class probabilities, got {ignore_index}"
        )
    shape = input.shape[:1][:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    if target.shape != shape and not probabilities:
        raise ValueError(
            f"cross_entropy: target has shape {list(target.shape)}, expected {list(shape)} for input of shape "
            f"{list(input.shape)}"
        )
    logits = _as_rows(input)
    targets = _as_rows(target) if probabilities else target.reshape(-1)
    if not extra and not probabilities:
        loss = _cross_entropy(logits, targets, weight, reduction, ignore_index, label_smoothing, backend)
        return loss.view(shape) if reduction == "none" else loss
    _check_options(
        probabilities,
        shape,
        token_weights,
        z_loss,
        softcap,
        logit_scale,
        return_accuracy,
        inplace_grad,
        grad_in_forward,
    )
    loss, lse, accuracy = _cross_entropy_extra(
        logits,
        targets,
        weight,
        None if token_weights is None else token_weights.reshape(-1),
        reduction,
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        0.0 if softcap is None else float(softcap),
        float(logit_scale),
        bool(return_lse),
        bool(return_accuracy),
        bool(inplace_grad),
        bool(grad_in_forward),
        backend,
    )
    if reduction == "none":
        loss = loss.view(shape)
        accuracy = accuracy.view(shape) if return_accuracy else accuracy
    if not (return_lse or return_accuracy):
        return loss
    return CrossEntropyOutput(
        loss, lse.view(shape) if return_lse else None, accuracy if return_accuracy else None
    )


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[C], [N, C] or [N, C, d1, ...] as [rows, C]."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _check_options(
    probabilities: bool,
    shape: torch.Size,
    token_weights: torch.Tensor | None,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_accuracy: bool,
    inplace_grad: bool,
    grad_in_forward: bool,
) -> None:
    op = "cross_entropy"
    if token_weights is not None:
        _checks.require_tensor(op, "token_weights", token_weights)
        if token_weights.shape != shape:
            raise ValueError(
                f"{op}: token_weights has shape {list(token_weights.shape)}, expected {list(shape)}, a weight for each row"
            )
    _checks.require_number(op, "z_loss", z_loss)
    _checks.require_number(op, "logit_scale", logit_scale)
    if softcap is not None:
        _checks.require_number(op, "softcap", softcap)
        if not softcap > 0:
            raise ValueError(f"{op}: softcap must be positive, or None for no cap; got {softcap}")
    if return_accuracy and probabilities:
        raise ValueError(f"{op}: return_accuracy needs class indices, and target holds class probabilities")
    if inplace_grad and grad_in_forward:
        raise ValueError(
            f"{op}: inplace_grad and grad_in_forward: one writes the gradient over the logits in backward, the other beside "
            "them in forward; choose one"
        )


def _check(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
    probabilities: bool = False,
) -> None:
    op = "cross_entropy"
    _checks.require_floating(op, "input", x)
    _checks.require_shape(op, "input", x, ("N", "C"))
    if probabilities:
        _checks.require_dtype(op, "target", target, x.dtype, "input")
        _checks.require_shape(op, "target", target, tuple(x.shape))
    else:
        if target.dtype != torch.int64:
            raise TypeError(
                f"{op}: target has dtype {target.dtype}, expected torch.int64, or class probabilities of input's shape"
            )
        if target.shape != x.shape[:1]:
            raise ValueError(
                f"{op}: target has shape {list(target.shape)}, expected [{x.shape[0]}], a class for each row"
            )
    _checks.require_device(op, "target", target, x.device, "input")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: input has shape {list(x.shape)}: no classes")
    if weight is not None:
        _checks.require_dtype(op, "weight", weight, x.dtype, "input")
        _checks.require_device(op, "weight", weight, x.device, "input")
        _checks.require_shape(op, "weight", weight, (x.shape[1],))
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    _check_smoothing(label_smoothing)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"cross_entropy: label_smoothing must be between 0 and 1, got {label_smoothing}")


def _check_extra(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    _check(x, target, weight, reduction, label_smoothing, target.is_floating_point())
    if token_weights is not None:
        _checks.require_floating("cross_entropy", "token_weights", token_weights)
        _checks.require_device("cross_entropy", "token_weights", token_weights, x.device, "input")
        _checks.require_shape("cross_entropy", "token_weights", token_weights, (x.shape[0],))


def _check_classes(x: torch.Tensor, target: torch.Tensor, ignore_index: int) -> None:
    """IndexError for a target that is no class: always on the CPU, on a GPU only when debugging, for it synchronizes."""
    if target.numel() == 0 or not _dispatch.may_read(target):
        return
    low, high = torch.aminmax(target)
    if low >= 0 and high < x.shape[1]:
        return
    bad = ((target < 0) | (target >= x.shape[1])) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"cross_entropy: target {int(target[row])} of row {row} is out of bounds for {x.shape[1]} classes"
        )


def _fwd_triton(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, target, weight, reduction, label_smoothing)
    _check_classes(x, target, ignore_index)
    loss, stats, denominator = kernels.cross_entropy_fwd(
        x, target, weight, reduction, ignore_index, label_smoothing
    )
    return loss, stats, x.new_empty(0, dtype=torch.float32) if denominator is None else denominator


def _fwd_fallback(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    exponentials: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, target, weight, reduction, label_smoothing)
    _check_classes(x, target, ignore_index)
    loss, stats, denominator = arrays.cross_entropy_fwd(
        to_array(x),
        to_array(target),
        None if weight is None else to_array(weight),
        reduction,
        ignore_index,
        label_smoothing,
        exponentials,
    )
    kept = _statistics_dtype(x)
    if reduction == "none":
        denominator = denominator[:0]
    return to_tensor(loss, x.dtype), to_tensor(stats, kept), to_tensor(denominator, kept)


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _safe_rows(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a class for each row, which rows count, their w_t: NaN where the target is no class).

    torch's own functions stop a GPU, for the rest of the process, at a target that is no class.
    """
    live = target != ignore_index
    known = live & (target >= 0) & (target < x.shape[1])
    classes = torch.where(known, target, 0)
    row_weight = torch.ones_like(target, dtype=_statistics_dtype(x)) if weight is None else weight[classes]
    return classes, live, torch.where(known, row_weight, torch.where(live, torch.nan, 0.0))


def _eager_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """The loss from torch's own functions, differentiable any number of times."""
    classes, live, row_weight = _safe_rows(x, target, weight, ignore_index)
    # An ignored row's logits are not looked at, or its gradient would be NaN where they are.
    wide = torch.where(live[:, None], x.to(_statistics_dtype(x)), 0.0)
    losses = F.cross_entropy(
        wide,
        classes,
        None if weight is None else weight.to(wide.dtype),
        reduction="none",
        label_smoothing=label_smoothing,
        # No class: every row is computed, and then counts or not.
        ignore_index=-1,
    )
    counts = torch.where(live, 1.0, 0.0).to(losses.dtype)
    losses = losses * torch.where(row_weight.isnan(), row_weight, counts).to(losses.dtype)
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / row_weight.nansum(dtype=wide.dtype)
    return losses.to(x.dtype)


def _eager(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    _check(x, target, weight, reduction, label_smoothing)
    _check_classes(x, target, ignore_index)
    return _eager_loss(x, target, weight, reduction, ignore_index, label_smoothing)


def _fwd_fake(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, target, weight, reduction, label_smoothing)
    kept = _statistics_dtype(x)
    none = reduction == "none"
    return (
        x.new_empty(x.shape[:1] if none else ()),
        x.new_empty((2, x.shape[0]), dtype=kept),
        x.new_empty(0 if none else 1, dtype=kept),
    )


def _bwd_fallback(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    denominator: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    exponentials: Any | None = None,
) -> torch.Tensor:
    dx = arrays.cross_entropy_bwd(
        to_array(dloss),
        to_array(x),
        to_array(target),
        None if weight is None else to_array(weight),
        to_array(stats),
        to_array(denominator),
        reduction,
        ignore_index,
        label_smoothing,
        exponentials,
    )
    return to_tensor(dx, x.dtype)


def _bwd_fake(dloss: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _keeps_exponentials(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> bool:
    return (
        x.is_cpu
        and arrays.keeps_exponentials(x.shape[1])
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and _dispatch.direct((x, target, weight))
    )


class CrossEntropyFunction(torch.autograd.Function):
    """Autograd of `cross_entropy` on [N, C] logits, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        backend: str,
    ) -> torch.Tensor:
        options = reduction, ignore_index, label_smoothing
        ctx.kept = []
        if backend == "fallback" and _keeps_exponentials(x, target, weight):
            exponentials = np.empty(x.shape, to_array(x).dtype)
            loss, stats, denominator = _fwd_fallback(x, target, weight, *options, exponentials)
            ctx.kept.append(exponentials)
        else:
            loss, stats, denominator = _cross_entropy_fwd.below(x, target, weight, *options, backend)
        ctx.save_for_backward(x, target, weight, stats, denominator)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, target, weight, stats, denominator = ctx.saved_tensors
        if _dispatch.differentiates():

            def eager(x: torch.Tensor) -> torch.Tensor:
                return _eager_loss(x, target, weight, *ctx.options)

            (dx,) = _dispatch.differentiable_vjp(eager, (x,), (True,), dloss)
        elif ctx.kept:
            # For the first backward alone: the gradient is written over them.
            dx = _bwd_fallback(dloss, x, target, weight, stats, denominator, *(*ctx.options, ctx.kept.pop()))
        else:
            dx = _cross_entropy_backward.below(
                dloss, x, target, weight, stats, denominator, *ctx.options, ctx.backend
            )
        return dx, None, None, None, None, None, None


def _cross_entropy_autograd(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, *options: Any
) -> torch.Tensor:
    if torch.is_grad_enabled():
        if weight is not None and weight.requires_grad:
            raise RuntimeError("cross_entropy: weight requires a gradient, which it has none of; detach it")
        if x.requires_grad:
            return CrossEntropyFunction.apply(x, target, weight, *options)
    return _cross_entropy.below(x, target, weight, *options)


_cross_entropy = _dispatch.define(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
    "float label_smoothing, str backend) -> Tensor",
    triton=lambda *args: _fwd_triton(*args)[0],
    fallback=lambda *args: _fwd_fallback(*args)[0],
    eager=_eager,
    fake=lambda *args: _fwd_fake(*args)[0],
    autograd=_cross_entropy_autograd,
    autocast=lambda args, dtype: _dispatch.cast_floating(args, torch.float32),
)
_cross_entropy_fwd = _dispatch.define(
    "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
    "float label_smoothing, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_cross_entropy_backward = _dispatch.define(
    "cross_entropy_backward(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
    "Tensor denominator, str reduction, int ignore_index, float label_smoothing, str backend) -> Tensor",
    triton=kernels.cross_entropy_bwd,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


def _empty(x: torch.Tensor) -> torch.Tensor:
    """What stands for a result that was not asked for."""
    return x.new_empty(0, dtype=_statistics_dtype(x))


def _extra_fwd_triton(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_lse: bool,
    return_accuracy: bool,
) -> tuple[torch.Tensor, ...]:
    _check_extra(x, target, weight, token_weights, reduction, label_smoothing)
    if not target.is_floating_point():
        _check_classes(x, target, ignore_index)
    found = kernels.cross_entropy_extra_fwd(
        x,
        target,
        weight,
        token_weights,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        return_lse,
        return_accuracy,
    )
    return tuple(_empty(x) if t is None else t for t in found)


def _extra_fwd_fallback(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_lse: bool,
    return_accuracy: bool,
) -> tuple[torch.Tensor, ...]:
    _check_extra(x, target, weight, token_weights, reduction, label_smoothing)
    if not target.is_floating_point():
        _check_classes(x, target, ignore_index)
    loss, lse, accuracy, stats, denominator = arrays.cross_entropy_extra_fwd(
        to_array(x),
        to_array(target),
        None if weight is None else to_array(weight),
        None if token_weights is None else to_array(token_weights),
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        return_accuracy,
    )
    kept = _statistics_dtype(x)
    return (
        to_tensor(loss, x.dtype),
        to_tensor(lse, kept) if return_lse else _empty(x),
        to_tensor(accuracy, kept) if return_accuracy else _empty(x),
        to_tensor(stats, kept),
        _empty(x) if reduction == "none" else to_tensor(denominator, kept),
    )


def _transformed(x: torch.Tensor, softcap: float, logit_scale: float) -> torch.Tensor:
    z = x if logit_scale == 1 else x * logit_scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def _counted(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    ignore_index: int,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a class for each row, or None with probabilities; which rows count; their w_t, NaN where the target is no class; u)."""
    u = x.new_ones(x.shape[0], dtype=_statistics_dtype(x))
    if token_weights is not None:
        u = token_weights.to(u.dtype)
    if target.is_floating_point():
        return None, torch.ones_like(u, dtype=torch.bool), torch.ones_like(u), u
    classes, live, row_weight = _safe_rows(x, target, weight, ignore_index)
    return classes, live, row_weight.to(u.dtype), torch.where(live, u, 0.0)


def _eager_extra(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, lse) from torch's own functions, differentiable any number of times."""
    classes, live, row_weight, u = _counted(x, target, weight, token_weights, ignore_index)
    # An ignored row's logits are not looked at, or its gradient would be NaN where they are.
    wide = torch.where(live[:, None], x.to(_statistics_dtype(x)), 0.0)
    z = _transformed(wide, softcap, logit_scale)
    losses = F.cross_entropy(
        z,
        target.to(z.dtype) if classes is None else classes,
        None if weight is None else weight.to(z.dtype),
        reduction="none",
        label_smoothing=label_smoothing,
        # No class: every row is computed, and then counts or not.
        ignore_index=-1,
    )
    lse = z.logsumexp(1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    losses = losses * torch.where(row_weight.isnan(), row_weight, torch.where(live, u, 0.0))
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / (row_weight.nan_to_num(0.0) * u).sum()
    return losses.to(x.dtype), torch.where(live, lse, 0.0)


def _extra_eager(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_lse: bool,
    return_accuracy: bool,
) -> tuple[torch.Tensor, ...]:
    _check_extra(x, target, weight, token_weights, reduction, label_smoothing)
    if not target.is_floating_point():
        _check_classes(x, target, ignore_index)
    loss, lse = _eager_extra(
        x,
        target,
        weight,
        token_weights,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
    )
    accuracy = _empty(x)
    if return_accuracy:
        classes, live, row_weight, _ = _counted(x, target, weight, token_weights, ignore_index)
        assert classes is not None
        z = _transformed(x.to(_statistics_dtype(x)), softcap, logit_scale)
        right = live & ~row_weight.isnan() & (z.gather(1, classes[:, None])[:, 0] >= z.amax(1))
        accuracy = right.to(z.dtype)
        if reduction != "none":
            accuracy = accuracy.sum() / live.sum()
    return loss, lse if return_lse else _empty(x), accuracy


def _extra_fwd_fake(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_lse: bool,
    return_accuracy: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    _check_extra(x, target, weight, token_weights, reduction, label_smoothing)
    kept = _statistics_dtype(x)
    rows = x.shape[:1] if reduction == "none" else ()
    return (
        x.new_empty(rows),
        x.new_empty(x.shape[:1], dtype=kept) if return_lse else _empty(x),
        x.new_empty(rows, dtype=kept) if return_accuracy else _empty(x),
        x.new_empty((3 if target.is_floating_point() else 2, x.shape[0]), dtype=kept),
        x.new_empty(0 if reduction == "none" else 1, dtype=kept),
    )


def _extra_bwd_triton(
    dloss: torch.Tensor, dlse: torch.Tensor | None, x: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dtarget = kernels.cross_entropy_extra_bwd(dloss, dlse, x, *rest)
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dtarget is None else dtarget


def _extra_bwd_fallback(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    stats: torch.Tensor,
    denominator: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = to_array(x)
    dx, dtarget = arrays.cross_entropy_extra_bwd(
        to_array(dloss),
        None if dlse is None else to_array(dlse),
        logits,
        to_array(target),
        None if weight is None else to_array(weight),
        None if token_weights is None else to_array(token_weights),
        to_array(stats),
        to_array(denominator),
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        needs,
        # 16-bit floats come as float32 copies: the gradient is written over those, and then copied.
        None if out is None else logits,
    )
    if out is None:
        out = x.new_empty(0) if dx is None else to_tensor(dx, x.dtype)
    elif out.element_size() < 4:
        out.copy_(to_tensor(dx, x.dtype))
    return out, x.new_empty(0) if dtarget is None else to_tensor(dtarget, x.dtype)


def _extra_bwd_fake(
    dloss: torch.Tensor, dlse: torch.Tensor | None, x: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    needs = rest[-2]
    return tuple(x.new_empty(x.shape if need else 0) for need in needs)  # type: ignore[return-value]


def _writes_gradient_in_forward(
    x: torch.Tensor, target: torch.Tensor, reduction: str, return_lse: bool, backend: str
) -> bool:
    return (
        backend == "triton"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not target.is_floating_point()
        and reduction != "none"
        and not return_lse
        and x.numel() > 0
        and _dispatch.direct((x, target))
    )


def _overwritable(x: torch.Tensor) -> bool:
    """Whether x's elements lie in rows of their own, where a gradient can take their place."""
    N, C = x.shape
    return (C == 1 or x.stride(1) == 1) and (N <= 1 or x.stride(0) >= C) and _dispatch.direct((x,))


class CrossEntropyExtraFunction(torch.autograd.Function):
    """Autograd of `cross_entropy` with extras, or with probabilities, on [N, C] logits, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        token_weights: torch.Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        logit_scale: float,
        return_lse: bool,
        return_accuracy: bool,
        inplace_grad: bool,
        grad_in_forward: bool,
        backend: str,
    ) -> tuple[torch.Tensor, ...]:
        tensors = x, target, weight, token_weights
        options = reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale
        ctx.kept = []
        if grad_in_forward and _writes_gradient_in_forward(x, target, reduction, return_lse, backend):
            _check_extra(*tensors, reduction, label_smoothing)
            _check_classes(x, target, ignore_index)
            loss, right, stats, denominator, dx = kernels.cross_entropy_fwd_grad(
                x,
                target,
                weight,
                token_weights,
                reduction,
                ignore_index,
                label_smoothing,
                z_loss,
                softcap,
                logit_scale,
                return_accuracy,
            )
            lse, accuracy = _empty(x), _empty(x) if right is None else right
            ctx.kept.append(dx)
        else:
            loss, lse, accuracy, stats, denominator = _cross_entropy_extra_fwd.below(
                *tensors, *options, return_lse, return_accuracy, backend
            )
        ctx.save_for_backward(*tensors, stats, denominator)
        ctx.options, ctx.inplace_grad, ctx.backend = options, inplace_grad, backend
        ctx.set_materialize_grads(False)
        # lse is a function of the logits alone.
        differentiable = return_lse and ctx.needs_input_grad[0]
        ctx.mark_non_differentiable(*([accuracy] if differentiable else [lse, accuracy]))
        return loss, lse, accuracy

    @staticmethod
    def backward(
        ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        *tensors, stats, denominator = ctx.saved_tensors
        x = tensors[0]
        needs = [bool(need) for need in ctx.needs_input_grad[:2]]
        found: tuple[torch.Tensor | None, ...]
        if _dispatch.differentiates():
            found = _differentiable_backward(ctx.options, tensors, needs, dloss, dlse)
        else:
            if dloss is None:
                shape = x.shape[:1] if ctx.options[0] == "none" else ()
                dloss = x.new_zeros(shape)
            if ctx.kept:
                # For the first backward alone: it belongs to whoever asked.
                dx = ctx.kept.pop()
                kernels.scale_gradient(dx, dloss)
                found = dx, None
            else:
                args = dloss, dlse, *tensors, stats, denominator, *ctx.options, needs
                # One stride and alignment serve both gradients in the kernel, so of two neither goes over the logits.
                if ctx.inplace_grad and needs == [True, False] and _overwritable(x):
                    found = _extra_backward[ctx.backend](*args, x.detach())
                    torch.autograd.graph.increment_version(x)
                else:
                    found = _cross_entropy_extra_backward.below(*args, ctx.backend)
        return *(t if need else None for t, need in zip(found, needs, strict=True)), *[None] * 13


def _differentiable_backward(
    options: tuple[Any, ...],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dtarget), themselves differentiable: from torch's own operations."""

    def eager(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _eager_extra(x, target, *tensors[2:], *options)

    return _dispatch.differentiable_vjp(eager, tensors[:2], needs, (dloss, dlse))


def _cross_entropy_extra_autograd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    if torch.is_grad_enabled():
        for name, tensor in (("weight", weight), ("token_weights", token_weights)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"cross_entropy: {name} requires a gradient, which it has none of; detach it"
                )
        if x.requires_grad or target.requires_grad:
            return CrossEntropyExtraFunction.apply(x, target, weight, token_weights, *options)
    return _cross_entropy_extra.below(x, target, weight, token_weights, *options)


def _results(forward: Any) -> Any:
    """The op's implementation from forward's: without what only autograd heeds, and what only backward needs."""
    return lambda *args: forward(*args[:-2])[:3]


_EXTRA = (
    "Tensor input, Tensor target, Tensor? weight, Tensor? token_weights, str reduction, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, float logit_scale, bool return_lse, bool return_accuracy"
)
_cross_entropy_extra = _dispatch.define(
    f"cross_entropy_extra({_EXTRA}, bool inplace_grad, bool grad_in_forward, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_results(_extra_fwd_triton),
    fallback=_results(_extra_fwd_fallback),
    eager=lambda *args: _extra_eager(*args[:-2]),
    fake=lambda *args: _extra_fwd_fake(*(*args[:12], args[-1]))[:3],
    autograd=_cross_entropy_extra_autograd,
    autocast=lambda args, dtype: _dispatch.cast_floating(args, torch.float32),
)
_cross_entropy_extra_fwd = _dispatch.define(
    f"cross_entropy_extra_fwd({_EXTRA}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_extra_fwd_triton,
    fallback=_extra_fwd_fallback,
    fake=_extra_fwd_fake,
)
_extra_backward: dict[str, Any] = {
    "triton": _extra_bwd_triton,
    "fallback": _extra_bwd_fallback,
}
_cross_entropy_extra_backward = _dispatch.define(
    "cross_entropy_extra_backward(Tensor dloss, Tensor? dlse, Tensor input, Tensor target, Tensor? weight, "
    "Tensor? token_weights, Tensor stats, Tensor denominator, str reduction, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, float logit_scale, bool[] needs, str backend) -> (Tensor, Tensor)",
    triton=_extra_bwd_triton,
    fallback=_extra_bwd_fallback,
    fake=_extra_bwd_fake,
)


@_dispatch.explains("cross_entropy")
def _explain(
    input: torch.Tensor,
    target: Any = None,
    *args: Any,
    reduction: str = "mean",
    return_lse: bool = False,
    grad_in_forward: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any, str]:
    _checks.require_tensor("cross_entropy", "input", input)
    plain = not return_lse and not {*kwargs} - {"weight", "ignore_index", "label_smoothing"}
    C = input.shape[-1] if input.dim() == 1 else input.shape[1]
    N = input.numel() // max(C, 1)
    probabilities = isinstance(target, torch.Tensor) and target.is_floating_point()

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend != "triton":
            return [
                (
                    "forward, backward",
                    "torch's own" if backend == "torch" else "NumPy or CuPy, by blocks of rows",
                )
            ]
        reduce = [] if reduction == "none" else [("_cross_entropy_reduce_kernel", "one program")]
        wide = input.dtype in (torch.float32, torch.bfloat16)
        if grad_in_forward and wide and not probabilities and reduction != "none" and not return_lse:
            capability = _triton.device_limits(input.device)[0]
            options = {*kwargs} - {"weight", "ignore_index", "token_weights", "return_accuracy"}
            # As the launcher's flags, of rows side by side.
            aligned = C % 16 == 0 or not configs.cross_entropy_edges(input.dtype, C)
            tile = tuning.tile(
                input.device,
                configs.cross_entropy_grad_tile,
                capability,
                input.dtype,
                C,
                aligned and not options,
                "label_smoothing" in kwargs,
            )
            before = reduce if reduction == "mean" else []
            once = "once" if tile.lanes * tile.vector >= C else "twice, the second time from the L2"
            what = f"{tile}; reads the logits {once} and writes their gradient once"
            return [
                *before,
                ("_cross_entropy_fwd_grad_kernel", what),
                *reduce,
                ("_scale_kernel", "nothing to do where the upstream gradient is 1"),
            ]
        tile = tuning.tile(
            input.device, configs.cross_entropy_tile, input.dtype, C, 2 if probabilities else 1
        )
        blocks = -(-N // tile.block_m)
        splits, _ = configs.cross_entropy_splits(tile, blocks, C, _triton.device_limits(input.device)[2])
        combine = [("_cross_entropy_combine_kernel", f"{splits} programs a row")] if splits > 1 else []
        return [
            ("_cross_entropy_fwd_kernel", f"{tile}; reads the logits once"),
            *combine,
            *reduce,
            ("_cross_entropy_bwd_kernel", f"{tile}; reads the logits and writes their gradient once"),
        ]

    return input, steps, "cross_entropy" if plain else "cross_entropy_extra"
