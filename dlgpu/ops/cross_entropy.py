"""Softmax cross-entropy: checks, the dispatcher's ops and autograd. The kernels are in kernels/cross_entropy.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import cross_entropy as arrays
from dlgpu.kernels import configs
from dlgpu.kernels import cross_entropy as kernels

__all__ = ["cross_entropy"]

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """loss_i = (1 - e) w_t (lse - x_t) + e / C sum_j w_j (lse - x_j), lse = log sum_j exp x_j, t = target_i, e = smoothing.

    Args:
        input: logits x, [C], [N, C] or [N, C, d1, ...], float32, bfloat16, float16 or float64.
        target: class indices, [], [N] or [N, d1, ...], int64. Class probabilities are refused for now.
        weight: w, [C], of the input's dtype, or None for ones.
        size_average, reduce: torch's deprecated spelling of `reduction`.
        ignore_index: rows with this target count nowhere: loss and gradient 0.
        reduction: "none", "mean" (over the counted rows' w_t; NaN if there are none) or "sum".
        label_smoothing: e, in [0, 1].

    Returns:
        The loss, a scalar or target's shape for "none", in the input's dtype; float32 under autocast. As
        torch.nn.functional.cross_entropy.

    Raises:
        IndexError: a target is no class, on the CPU. On a GPU that would need a synchronization: there the row's loss and
            gradient are NaN, and under dlgpu.debug(True) it is this error.
        RuntimeError, ValueError: a shape, device or option does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: the logits by reference, and two float32 a row (the maximum and the sum of exponentials). Backward
    recomputes the probabilities: 2 reads and 1 write of the logits in all.

    Sources: label smoothing, Szegedy et al., arXiv:1512.00567; online softmax, Milakov and Gimelshein, arXiv:1805.02867.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor(1.3863)
    """
    _checks.require_tensor("cross_entropy", "input", input)
    _checks.require_tensor("cross_entropy", "target", target)
    if weight is not None:
        _checks.require_tensor("cross_entropy", "weight", weight)
    _checks.require_integer("cross_entropy", "ignore_index", ignore_index)
    _checks.require_number("cross_entropy", "label_smoothing", label_smoothing)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    backend = _dispatch.choose_backend(input)
    if input.dim() == 2 and target.dim() == 1:
        return _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, backend)
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input has no dimensions, expected [C], [N, C] or [N, C, d1, ...]")
    if input.shape == target.shape and target.is_floating_point():
        _refuse_probabilities()
    expected = input.shape[:1][:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    if target.shape != expected:
        raise ValueError(
            f"cross_entropy: target has shape {list(target.shape)}, expected {list(expected)} for input of shape "
            f"{list(input.shape)}"
        )
    logits = input.unsqueeze(0) if input.dim() == 1 else input.movedim(1, -1).reshape(-1, input.shape[1])
    loss = _cross_entropy(
        logits, target.reshape(-1), weight, reduction, ignore_index, label_smoothing, backend
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _refuse_probabilities() -> None:
    raise NotImplementedError(
        "cross_entropy: target is floating point; class probabilities are not supported yet, use class indices (int64) "
        "or torch.nn.functional.cross_entropy"
    )


def _check(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    op = "cross_entropy"
    _checks.require_floating(op, "input", x)
    _checks.require_shape(op, "input", x, ("N", "C"))
    if target.is_floating_point():
        _refuse_probabilities()
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target has dtype {target.dtype}, expected torch.int64")
    _checks.require_device(op, "target", target, x.device, "input")
    if target.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: target has shape {list(target.shape)}, expected [{x.shape[0]}], a class for each row"
        )
    if x.shape[1] == 0:
        raise ValueError(f"{op}: input has shape {list(x.shape)}: no classes")
    if weight is not None:
        _checks.require_dtype(op, "weight", weight, x.dtype, "input")
        _checks.require_device(op, "weight", weight, x.device, "input")
        _checks.require_shape(op, "weight", weight, (x.shape[1],))
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")


def _check_classes(x: torch.Tensor, target: torch.Tensor, ignore_index: int) -> None:
    """IndexError for a target that is no class: always on the CPU, on a GPU only when debugging, for it synchronizes."""
    if target.device.type != "cpu" and not _dispatch.debugging():
        return
    if target.numel() == 0:
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


def _fwd_eager(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's own, which keeps no statistics: backward recomputes them."""
    _check(x, target, weight, reduction, label_smoothing)
    _check_classes(x, target, ignore_index)
    kept = _statistics_dtype(x)
    return (
        _eager_loss(x, target, weight, reduction, ignore_index, label_smoothing),
        x.new_zeros((2, x.shape[0]), dtype=kept),
        x.new_zeros(0 if reduction == "none" else 1, dtype=kept),
    )


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
    )
    return to_tensor(dx, x.dtype)


def _bwd_eager(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    denominator: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    classes, live, row_weight = _safe_rows(x, target, weight, ignore_index)
    wide = x.to(_statistics_dtype(x))
    g = dloss.to(wide.dtype)
    if reduction == "mean":
        g = g / row_weight.nansum(dtype=wide.dtype)
    g = torch.where(live, g, 0.0)
    hit = (1 - label_smoothing) * row_weight * g
    weights = torch.ones_like(wide[0]) if weight is None else weight.to(wide.dtype)
    uniform = label_smoothing / x.shape[1] * g
    dx = torch.softmax(wide, 1) * (hit + uniform * weights.sum())[:, None] - uniform[:, None] * weights
    is_target = classes[:, None] == torch.arange(x.shape[1], device=x.device)
    dx = torch.where(is_target, dx - hit[:, None], dx)
    return torch.where(live[:, None], dx, 0.0).to(x.dtype)


def _bwd_fake(dloss: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


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
        loss, stats, denominator = _cross_entropy_fwd.below(
            x, target, weight, reduction, ignore_index, label_smoothing, backend
        )
        ctx.save_for_backward(x, target, weight, stats, denominator)
        ctx.options, ctx.backend = (reduction, ignore_index, label_smoothing), backend
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, target, weight, stats, denominator = ctx.saved_tensors
        if torch.is_grad_enabled():

            def eager(x: torch.Tensor) -> torch.Tensor:
                return _eager_loss(x, target, weight, *ctx.options)

            (dx,) = _dispatch.differentiable_vjp(eager, (x,), (True,), dloss)
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
    eager=lambda *args: _fwd_eager(*args)[0],
    fake=lambda *args: _fwd_fake(*args)[0],
    autograd=_cross_entropy_autograd,
    autocast=lambda args, dtype: _dispatch.cast_floating(args, torch.float32),
)
_cross_entropy_fwd = _dispatch.define(
    "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
    "float label_smoothing, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    eager=_fwd_eager,
    fake=_fwd_fake,
)
_cross_entropy_backward = _dispatch.define(
    "cross_entropy_backward(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
    "Tensor denominator, str reduction, int ignore_index, float label_smoothing, str backend) -> Tensor",
    triton=kernels.cross_entropy_bwd,
    fallback=_bwd_fallback,
    eager=_bwd_eager,
    fake=_bwd_fake,
)


@_dispatch.explains("cross_entropy")
def _explain(input: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor("cross_entropy", "input", input)
    C = input.shape[-1] if input.dim() == 1 else input.shape[1]

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend == "triton":
            tile = configs.cross_entropy_tile(input.dtype, C)
            return [
                ("_cross_entropy_fwd_kernel", f"{tile}; reads the logits once"),
                ("_cross_entropy_reduce_kernel", "one program"),
                ("_cross_entropy_bwd_kernel", f"{tile}; reads the logits and writes their gradient once"),
            ]
        return [
            ("forward, backward", "torch's own" if backend == "torch" else "NumPy or CuPy, by blocks of rows")
        ]

    return input, steps
