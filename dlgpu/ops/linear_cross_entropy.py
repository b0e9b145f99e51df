"""Softmax cross-entropy of a linear layer's logits: checks, the dispatcher's ops and autograd. The kernels are in
kernels/linear_cross_entropy.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import linear_cross_entropy as arrays
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import linear_cross_entropy as kernels

from .cross_entropy import CrossEntropyOutput, cross_entropy
from .linear import linear, product_steps

__all__ = ["DEFAULT_MEMORY_BUDGET", "linear_cross_entropy"]

REDUCTIONS = ("none", "mean", "sum")

# Bytes of logits kept for backward unless a call says otherwise: all of 8192 x 128256 at 16 bits.
DEFAULT_MEMORY_BUDGET = 1 << 31


@overload
def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = ...,
    weight: torch.Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: Any = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    token_weights: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_accuracy: Literal[False] = ...,
    memory_budget: int | None = ...,
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = ...,
    weight: torch.Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: Any = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    token_weights: torch.Tensor | None = ...,
    return_lse: bool = ...,
    return_accuracy: bool = ...,
    memory_budget: int | None = ...,
) -> torch.Tensor | CrossEntropyOutput: ...
def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: torch.Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    memory_budget: int | None = None,
) -> torch.Tensor | CrossEntropyOutput:
    """z = x W^T + b, and the softmax cross-entropy of z, without all of z ever being stored:
    loss_i = u_i ((1 - e) w_t (lse - z_t) + e / C sum_j w_j (lse - z_j) + k lse^2), lse = log sum_j exp z_j, t = target_i.

    Args:
        input: x, [N, in_features] or [in_features], float32, bfloat16, float16 or float64.
        linear_weight: W, [C, in_features], of the same dtype; or [C, d1, ..., in_features], as torch.
        target: class indices, [N] or [], int64 or uint8 ([N, d1, ...] for a weight of more dimensions); or class
            probabilities.
        linear_bias: b, [C] ([C, d1, ...]), of the same dtype, or None.
        weight: w, [C], of the input's dtype, or None for ones.
        reduction: "none", "mean" (over the counted rows' w_t u_i; NaN if there are none) or "sum".
        ignore_index: rows with this target count nowhere: loss, lse and gradient 0. None is -100; with class probabilities it
            must be None.
        label_smoothing: e, in [0, 1].
        options: torch.nn.LinearCrossEntropyOptions. Its chunks are of the batch, ours of the vocabulary: given any, this
            is a memory_budget of 0. Double backward, torch.compile and repeated backward work all the same.
        z_loss: k.
        softcap: c: z becomes c tanh(z / c).
        logit_scale: s: z becomes s z, before the soft cap.
        token_weights: u, [N], of a floating dtype, or None for ones; no gradient.
        return_lse: give lse too, of target's shape, differentiable; 0 at ignored rows; float32 (float64 for float64).
        return_accuracy: give too the share of the counted rows whose target has the largest logit (ties count), or with
            "none" 1 or 0 for each row. float32 (float64 for float64); no gradient.
        memory_budget: how many bytes of logits may be kept for backward, by default 2 GiB (`DEFAULT_MEMORY_BUDGET`). Those
            columns of the logits that do not fit are computed again: with all of them kept a training step takes three
            products (fast), and backward as much memory again for their gradient; with none (0: lean) it takes four, and then
            no [N, C] tensor ever exists. Without gradients nothing is kept.

    Returns:
        The loss, a scalar or target's shape for "none", in the input's dtype; float32 under autocast. As
        torch.nn.functional.linear_cross_entropy. With return_lse or return_accuracy a CrossEntropyOutput
        (loss, lse, accuracy).

    Raises:
        IndexError: a target is no class, on the CPU. On a GPU that would need a synchronization: there the row's loss and
            gradient are NaN, and under dlgpu.debug(True) it is this error.
        RuntimeError, ValueError: a shape, device or option does not fit.
        TypeError: an argument's type or dtype does not fit.

    Saved for backward: input and weights by reference, two float32 a row (the maximum of z and the sum of exponentials), and
    the logits within the budget. Gradients are exact under any upstream gradient; those of W and b are summed in float32 and
    rounded once. Nothing is skipped: there is no gradient filtering.

    Class probabilities and weights of more than two dimensions go through `linear` and `cross_entropy`, and so does all that
    torch's own functions compute (on a CPU, where the logits fit into the budget); double backward takes torch's too. Those
    store the logits, for an evaluation as well.

    Sources: online softmax, Milakov and Gimelshein, arXiv:1805.02867; losses by tiles of the vocabulary, Wijmans et al.,
    arXiv:2411.09009.

    >>> linear_cross_entropy(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, 3]))
    tensor(1.3863)
    """
    op = "linear_cross_entropy"
    for name, value in (
        ("input", input),
        ("linear_weight", linear_weight),
        ("target", target),
        ("linear_bias", linear_bias),
        ("weight", weight),
        ("token_weights", token_weights),
    ):
        if value is not None or name in ("input", "linear_weight", "target"):
            _checks.require_tensor(op, name, value)
    for name, number in (
        ("label_smoothing", label_smoothing),
        ("z_loss", z_loss),
        ("softcap", 0.0 if softcap is None else softcap),
        ("logit_scale", logit_scale),
    ):
        _checks.require_number(op, name, number)
    if ignore_index is not None:
        _checks.require_integer(op, "ignore_index", ignore_index)
    if memory_budget is not None:
        _checks.require_integer(op, "memory_budget", memory_budget)
        if memory_budget < 0:
            raise ValueError(f"{op}: memory_budget is a number of bytes, got {memory_budget}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(
            f"{op}: input has shape {list(input.shape)}, expected [in_features] or [N, in_features]"
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{op}: linear_weight has shape {list(linear_weight.shape)}, expected [C, ..., in_features]"
        )
    if linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"{op}: linear_weight has shape {list(linear_weight.shape)}, expected [C, ..., {input.shape[-1]}] for "
            f"input of shape {list(input.shape)}"
        )
    outer = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != outer:
        raise RuntimeError(f"{op}: linear_bias has shape {list(linear_bias.shape)}, expected {list(outer)}")
    if len(outer) > 1 and input.dim() == 1:
        raise RuntimeError(
            f"{op}: linear_weight of shape {list(linear_weight.shape)} needs input [N, in_features], got "
            f"{list(input.shape)}"
        )
    probabilities = target.shape == (*input.shape[:-1], *outer)
    if probabilities and ignore_index is not None:
        raise RuntimeError(f"{op}: ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    if target.dtype is torch.uint8:
        target = target.long()
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET if options is None else 0
    if outer[0] == 0:
        raise ValueError(f"{op}: linear_weight has shape {list(linear_weight.shape)}: no classes")
    if not probabilities and len(outer) == 1:
        if target.shape != input.shape[:-1]:
            raise ValueError(
                f"{op}: target has shape {list(target.shape)}, expected {list(input.shape[:-1])}, a class for each row"
            )
        if token_weights is not None and token_weights.shape != target.shape:
            raise ValueError(
                f"{op}: token_weights has shape {list(token_weights.shape)}, expected {list(target.shape)}"
            )
    rows, classes = input if input.dim() == 2 else input.unsqueeze(0), math.prod(outer)
    backend = _dispatch.choose_backend(input, _form(rows, classes, memory_budget))
    if probabilities or len(outer) > 1 or backend == "torch":
        bias = None if linear_bias is None else linear_bias.reshape(-1)
        logits = linear(input, linear_weight.reshape(classes, linear_weight.shape[-1]), bias)
        return cross_entropy(
            logits.reshape(*input.shape[:-1], *outer),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            token_weights=token_weights,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            return_lse=return_lse,
            return_accuracy=return_accuracy,
        )
    if token_weights is not None:
        _checks.require_floating(op, "token_weights", token_weights)
        if token_weights.dtype != input.dtype:
            token_weights = token_weights.to(_statistics_dtype(input))
    loss, lse, accuracy = _linear_cross_entropy(
        rows,
        linear_weight,
        target.reshape(-1),
        linear_bias,
        weight,
        None if token_weights is None else token_weights.reshape(-1),
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        0.0 if softcap is None else softcap,
        logit_scale,
        return_accuracy,
        memory_budget,
        backend,
    )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    # The op's is float32. Autocast leaves it so, as that of torch's cross_entropy.
    if not torch.is_autocast_enabled(input.device.type):
        loss = loss.to(input.dtype)
    if not (return_lse or return_accuracy):
        return loss
    if return_accuracy and reduction == "none":
        accuracy = accuracy.reshape(target.shape)
    return CrossEntropyOutput(
        loss, lse.reshape(target.shape) if return_lse else None, accuracy if return_accuracy else None
    )


def _form(x: torch.Tensor, V: int, memory_budget: int) -> str:
    """The op's name, or with "_extra" that of the form that torch has no function for: without all logits stored."""
    # By default no guard on sizes in a trace.
    default = torch.compiler.is_compiling() and memory_budget == DEFAULT_MEMORY_BUDGET
    fits = default or _kept_columns(x, V, memory_budget, "torch") == V
    return "linear_cross_entropy" if fits else "linear_cross_entropy_extra"


def _check(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    op = "linear_cross_entropy"
    _checks.require_floating(op, "input", x)
    _checks.require_shape(op, "input", x, ("N", "in_features"))
    N, V = x.shape[0], w.shape[0]
    _checks.require_dtype(op, "linear_weight", w, x.dtype, "input")
    _checks.require_device(op, "linear_weight", w, x.device, "input")
    _checks.require_shape(op, "linear_weight", w, ("C", x.shape[1]))
    if V == 0:
        raise ValueError(f"{op}: linear_weight has shape {list(w.shape)}: no classes")
    if b is not None:
        _checks.require_dtype(op, "linear_bias", b, x.dtype, "input")
        _checks.require_device(op, "linear_bias", b, x.device, "input")
        _checks.require_shape(op, "linear_bias", b, (V,))
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target has dtype {target.dtype}, expected torch.int64")
    _checks.require_device(op, "target", target, x.device, "input")
    if target.shape != x.shape[:1]:
        raise ValueError(f"{op}: target has shape {list(target.shape)}, expected [{N}], a class for each row")
    for name, factor, size in (("weight", weight, V), ("token_weights", token_weights, N)):
        if factor is not None:
            # Autocast casts the input, and these to float32.
            if factor.dtype != _statistics_dtype(x):
                _checks.require_dtype(op, name, factor, x.dtype, "input")
            _checks.require_device(op, name, factor, x.device, "input")
            _checks.require_shape(op, name, factor, (size,))
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")


def _check_classes(target: torch.Tensor, V: int, ignore_index: int) -> None:
    """IndexError for a target that is no class: always on the CPU, on a GPU only when debugging, for it synchronizes."""
    if target.numel() == 0 or not _dispatch.may_read(target):
        return
    low, high = torch.aminmax(target)
    if low >= 0 and high < V:
        return
    bad = ((target < 0) | (target >= V)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"linear_cross_entropy: target {int(target[row])} of row {row} is out of bounds for {V} classes"
        )


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _kept_dtype(x: torch.Tensor, backend: str) -> torch.dtype:
    """Arrays of 16 bits are worked on in float32."""
    return x.dtype if backend == "triton" else _statistics_dtype(x)


def _kept_columns(x: torch.Tensor, V: int, memory_budget: int, backend: str) -> int:
    """How many columns of the logits may be kept: all, or whole blocks of 1024."""
    row = max(x.shape[0], 1) * _kept_dtype(x, backend).itemsize
    return V if row * V <= memory_budget else memory_budget // row // 1024 * 1024


def _empty(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Stands for no result: an op returns tensors."""
    return t.new_empty(0, dtype=dtype)


def _fwd_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    accuracy: bool,
    memory_budget: int,
) -> tuple[torch.Tensor, ...]:
    _check(x, w, target, b, weight, token_weights, reduction, label_smoothing)
    _check_classes(target, w.shape[0], ignore_index)
    loss, lse, share, stats, denominator, kept = kernels.linear_cross_entropy_fwd(
        x,
        w,
        target,
        b,
        weight,
        token_weights,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        accuracy,
        _kept_columns(x, w.shape[0], memory_budget, "triton"),
    )
    return (
        loss,
        lse,
        _empty(stats) if share is None else share,
        stats,
        _empty(stats) if denominator is None else denominator,
        x.new_empty((0, 0)) if kept is None else kept,
    )


def _fwd_fallback(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    accuracy: bool,
    memory_budget: int,
) -> tuple[torch.Tensor, ...]:
    _check(x, w, target, b, weight, token_weights, reduction, label_smoothing)
    _check_classes(target, w.shape[0], ignore_index)
    keep = _kept_columns(x, w.shape[0], memory_budget, "fallback")
    loss, lse, share, stats, denominator, kept = arrays.linear_cross_entropy_fwd(
        to_array(x),
        to_array(w),
        to_array(target),
        None if b is None else to_array(b),
        None if weight is None else to_array(weight),
        None if token_weights is None else to_array(token_weights),
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        accuracy,
        keep,
    )
    dtype = _statistics_dtype(x)
    return (
        to_tensor(loss, dtype),
        to_tensor(lse, dtype),
        _empty(x, dtype) if share is None else to_tensor(share, dtype),
        to_tensor(stats, dtype),
        to_tensor(denominator[:0] if reduction == "none" else denominator, dtype),
        to_tensor(kept, dtype) if keep else x.new_empty((0, 0), dtype=dtype),
    )


def _eager_losses(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, lse, logits) from torch's own functions, differentiable any number of times.

    Torch's own functions stop a GPU, for the rest of the process, at a target that is no class; here its row is NaN.
    """
    dtype = _statistics_dtype(x)
    z = F.linear(x, w, b).to(dtype) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    live = target != ignore_index
    known = live & (target >= 0) & (target < w.shape[0])
    classes = torch.where(known, target, 0)
    row_weight = torch.ones_like(z[:, 0]) if weight is None else weight.to(dtype)[classes]
    if token_weights is not None:
        # What stands at an ignored row counts nowhere, NaN included.
        token_weights = torch.where(live, token_weights.to(dtype), 0.0)
        row_weight = row_weight * token_weights
    # An ignored row's logits are not looked at, or its gradient would be NaN where they are.
    counted = torch.where(live[:, None], z, 0.0)
    losses = F.cross_entropy(
        counted,
        classes,
        None if weight is None else weight.to(dtype),
        reduction="none",
        label_smoothing=label_smoothing,
        # No class: every row is computed, and then counts or not.
        ignore_index=-1,
    )
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(counted, 1).square()
    if token_weights is not None:
        losses = losses * token_weights
    losses = losses * torch.where(known, 1.0, torch.where(live, torch.nan, 0.0)).to(dtype)
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / torch.where(known, row_weight, 0.0).sum()
    return losses, torch.where(live, torch.logsumexp(counted, 1), 0.0), z


def _eager(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    accuracy: bool,
    memory_budget: int,
) -> tuple[torch.Tensor, ...]:
    _check(x, w, target, b, weight, token_weights, reduction, label_smoothing)
    _check_classes(target, w.shape[0], ignore_index)
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    loss, lse, z = _eager_losses(x, w, b, target, weight, token_weights, *options)
    share = _empty(lse)
    if accuracy:
        live = target != ignore_index
        known = live & (target >= 0) & (target < w.shape[0])
        at_target = z.gather(1, torch.where(known, target, 0)[:, None])[:, 0]
        share = (known & (at_target >= z.amax(1))).to(lse.dtype)
        if reduction != "none":
            share = share.sum() / live.sum()
    return loss, lse, share


def _fwd_fake(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    accuracy: bool,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    _check(x, w, target, b, weight, token_weights, reduction, label_smoothing)
    dtype = _statistics_dtype(x)
    N, none = x.shape[0], reduction == "none"
    keep = _kept_columns(x, w.shape[0], memory_budget, backend)
    return (
        x.new_empty(N if none else (), dtype=dtype),
        x.new_empty(N, dtype=dtype),
        x.new_empty((N if none else ()) if accuracy else 0, dtype=dtype),
        x.new_empty((2, N), dtype=dtype),
        x.new_empty(0 if none else 1, dtype=dtype),
        x.new_empty((N, keep) if keep else (0, 0), dtype=_kept_dtype(x, backend)),
    )


def _bwd_triton(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    stats: torch.Tensor,
    denominator: torch.Tensor,
    kept: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    found = kernels.linear_cross_entropy_bwd(
        dloss,
        dlse,
        x,
        w,
        target,
        b,
        weight,
        token_weights,
        stats,
        denominator,
        kept if kept.numel() else None,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        needs,
    )
    return tuple(_empty(x) if t is None else t for t in found)


def _bwd_fallback(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    stats: torch.Tensor,
    denominator: torch.Tensor,
    kept: torch.Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    found = arrays.linear_cross_entropy_bwd(
        to_array(dloss),
        None if dlse is None else to_array(dlse),
        to_array(x),
        to_array(w),
        to_array(target),
        None if b is None else to_array(b),
        None if weight is None else to_array(weight),
        None if token_weights is None else to_array(token_weights),
        to_array(stats),
        to_array(denominator),
        to_array(kept) if kept.numel() else None,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        needs,
    )
    return tuple(_empty(x) if t is None else to_tensor(t, x.dtype) for t in found)


def _differentiable_backward(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    inputs: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    *rest: Any,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of (x, w, b), themselves differentiable, with respect to the upstream gradients too."""

    def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return _eager_losses(x, w, b, *rest)[:2]

    return _dispatch.differentiable_vjp(eager, inputs, needs, (dloss, dlse))


def _bwd_fake(
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    x: torch.Tensor,
    w: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    needs = rest[-2]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        x.new_empty(w.shape if needs[1] else 0),
        x.new_empty(w.shape[0] if needs[2] else 0),
    )


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Autograd of `linear_cross_entropy` on [N, in_features], at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        target: torch.Tensor,
        b: torch.Tensor | None,
        weight: torch.Tensor | None,
        token_weights: torch.Tensor | None,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, lse, share, stats, denominator, kept = _linear_cross_entropy_fwd.below(
            x, w, target, b, weight, token_weights, *options
        )
        ctx.save_for_backward(x, w, target, b, weight, token_weights, stats, denominator, kept)
        # Reduction to logit scale; then accuracy and budget, which backward does not need; the backend.
        ctx.options, ctx.backend = options[:6], options[-1]
        ctx.mark_non_differentiable(share)
        ctx.set_materialize_grads(False)
        return loss, lse, share

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, w, target, b, weight, token_weights, stats, denominator, kept = ctx.saved_tensors
        dloss, dlse = upstream[:2]
        if dloss is None:
            dloss = stats.new_zeros(x.shape[0] if ctx.options[0] == "none" else ())
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        found: Sequence[torch.Tensor | None]
        if _dispatch.differentiates():
            found = _differentiable_backward(
                dloss, dlse, (x, w, b), needs, target, weight, token_weights, *ctx.options
            )
        else:
            found = _linear_cross_entropy_backward.below(
                dloss,
                dlse,
                x,
                w,
                target,
                b,
                weight,
                token_weights,
                stats,
                denominator,
                kept,
                *ctx.options,
                needs,
                ctx.backend,
            )
        dx, dw, db = (t if need else None for t, need in zip(found, needs, strict=True))
        return dx, dw, None, db, *[None] * 11


def _linear_cross_entropy_autograd(
    x: torch.Tensor,
    w: torch.Tensor,
    target: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled():
        for name, factor in (("weight", weight), ("token_weights", token_weights)):
            if factor is not None and factor.requires_grad:
                raise RuntimeError(
                    f"linear_cross_entropy: {name} requires a gradient, which it has none of; detach it"
                )
        if x.requires_grad or w.requires_grad or (b is not None and b.requires_grad):
            return LinearCrossEntropyFunction.apply(x, w, target, b, weight, token_weights, *options)
    return _linear_cross_entropy.below(x, w, target, b, weight, token_weights, *options)


def _autocast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The layer in autocast's dtype, the factors of the loss in float32: as torch's linear and cross_entropy."""
    x, w, target, b, weight, token_weights, *options = args
    x, w, b = _dispatch.cast_floating((x, w, b), dtype)
    return (x, w, target, b, *_dispatch.cast_floating((weight, token_weights), torch.float32), *options)


def _evaluate(forward: Any) -> Any:
    """Loss, lse and accuracy alone: nothing is kept for a backward."""
    return lambda *args: forward(*args[:-1], 0)[:3]


_ARGUMENTS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? token_weights, "
_OPTIONS = (
    "str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale, "
)
_linear_cross_entropy = _dispatch.define(
    f"linear_cross_entropy({_ARGUMENTS}{_OPTIONS}bool accuracy, int memory_budget, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    triton=_evaluate(_fwd_triton),
    fallback=_evaluate(_fwd_fallback),
    eager=_eager,
    fake=lambda *args: _fwd_fake(*args)[:3],
    autograd=_linear_cross_entropy_autograd,
    autocast=_autocast,
)
_linear_cross_entropy_fwd = _dispatch.define(
    f"linear_cross_entropy_fwd({_ARGUMENTS}{_OPTIONS}bool accuracy, int memory_budget, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_linear_cross_entropy_backward = _dispatch.define(
    f"linear_cross_entropy_backward(Tensor dloss, Tensor? dlse, {_ARGUMENTS}Tensor stats, Tensor denominator, "
    f"Tensor kept, {_OPTIONS}bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


@_dispatch.explains("linear_cross_entropy")
def _explain(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    reduction: str = "mean",
    options: Any = None,
    memory_budget: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, Any, str]:
    op = "linear_cross_entropy"
    _checks.require_tensor(op, "input", input)
    _checks.require_tensor(op, "linear_weight", linear_weight)
    x = input if input.dim() == 2 else input.unsqueeze(0)
    _checks.require_shape(op, "linear_weight", linear_weight, ("C", x.shape[1]))
    if memory_budget is None:
        memory_budget = DEFAULT_MEMORY_BUDGET if options is None else 0
    N, V = x.shape[0], linear_weight.shape[0]

    def steps(backend: str) -> list[tuple[str, str]]:
        kept = _kept_columns(x, V, memory_budget, backend)
        which = "all" if kept == V else "none" if not kept else f"{kept} of {V} columns"
        if backend == "torch":
            return [("forward, backward", "torch's own linear and cross_entropy, all logits stored")]
        if backend == "fallback":
            return [("forward, backward", f"BLAS products by chunks of the vocabulary; logits kept: {which}")]
        aligned = x.shape[1] % 16 == 0
        limits = _triton.device_limits(x.device)[:2]
        tile = configs.linear_cross_entropy_tile(*limits, x.dtype, aligned)
        chunk = V if kept == V else configs.linear_cross_entropy_chunk(N, V, x.dtype)
        # What a training step launches where one chunk holds the vocabulary; else the last three, for each chunk.
        chunks = "the whole vocabulary" if chunk >= V else f"chunks of {chunk} columns"
        (z, _), (dx, _), (dw, _) = product_steps(x, linear_weight[: kept or None]).values()
        return [
            *([(z, f"logits; kept: {which}")] if kept else []),
            *([("_linear_cross_entropy_fwd_kernel", f"{tile}; reads what was kept")] if kept else []),
            *([("_linear_cross_entropy_fwd_kernel", f"{tile}; multiplies")] if kept < V else []),
            ("_linear_cross_entropy_rows_kernel", "puts the splits of the vocabulary together"),
            *([("_linear_cross_entropy_reduce_kernel", "one program")] if reduction != "none" else []),
            ("_linear_cross_entropy_scales_kernel", "factors of each row's gradient"),
            ("_linear_cross_entropy_dz_kernel", f"{tile}; {chunks}"),
            (dx, chunks)
            if chunk >= V
            else ("_linear_cross_entropy_product_kernel (dx)", f"{tile}; {chunks}"),
            (dw, chunks),
        ]

    return input, steps, _form(x, V, memory_budget)
