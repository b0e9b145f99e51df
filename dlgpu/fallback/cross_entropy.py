"""Softmax cross-entropy on arrays.

Rows of few classes are worked on transposed, so that NumPy's inner loops run over rows: reducing along a short last axis
costs about ten times as much.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._blocks import for_blocks

__all__ = ["cross_entropy_bwd", "cross_entropy_fwd"]

# Up to so many classes, rows are worked on transposed.
_FEW = 64


@np.errstate(all="ignore")
def cross_entropy_fwd(
    x: Any,
    target: Any,
    weight: Any | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Any, Any, Any]:
    """loss_i = (1 - e) w_t (lse - x_t) + e / C (W lse - sum_j w_j x_j), W = sum_j w_j.

    Returns (loss, stats, denominator): stats [2, N] holds each row's max and sum exp(x - max), denominator [1] the sum of
    weight[target] over the rows that count. (max, sum) and not lse: the rounding of a large lse would be an error of every
    probability.
    """
    rows, classes = x.shape
    stats = np.empty_like(x, order="C", shape=(2, rows))
    smooth = np.empty_like(x, shape=(rows,)) if label_smoothing else None
    _row_statistics(x, weight, stats, smooth)
    index, masks = _targets(x, target, ignore_index)
    log_total = np.log(stats[1])
    loss = log_total - (x.reshape(-1).take(index) - stats[0] if classes else 0)
    hit = _target_weights(x, target, weight, masks)
    if hit is not None:
        loss *= hit
    if smooth is not None:
        norm = classes if weight is None else np.add.reduce(weight)
        loss *= 1 - label_smoothing
        loss += (norm * log_total - smooth) * (label_smoothing / max(classes, 1))
    if masks is not None:
        ignored, bad = masks
        loss = np.where(ignored, 0, np.where(bad, np.nan, loss)).astype(x.dtype)
    denominator = np.empty_like(x, shape=(1,))
    if hit is None:
        denominator[...] = rows
    else:
        np.add.reduce(hit, keepdims=True, dtype=np.float64, out=denominator)
    if reduction != "none":
        total = np.add.reduce(loss, keepdims=True, dtype=np.float64)
        if reduction == "mean":
            total /= denominator
        loss = total.astype(x.dtype).reshape(())
    return loss, stats, denominator


@np.errstate(all="ignore")
def cross_entropy_bwd(
    dloss: Any,
    x: Any,
    target: Any,
    weight: Any | None,
    stats: Any,
    denominator: Any,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Any:
    """dx = g ((1 - e) w_t (p - onehot) + e / C (W p - w)), p = exp(x - max) / sum, g = dloss or dloss / denominator."""
    rows, classes = x.shape
    dx = np.empty_like(x, order="C", shape=x.shape)
    if not dx.size:
        return dx
    index, masks = _targets(x, target, ignore_index)
    hit = _target_weights(x, target, weight, masks)
    g = dloss / denominator if reduction == "mean" else dloss
    hit = g * (1 - label_smoothing) if hit is None else g * (1 - label_smoothing) * hit
    scale, spread = hit, None
    if label_smoothing:
        spread = g * (label_smoothing / classes)
        scale = hit + spread * (classes if weight is None else np.add.reduce(weight))
        spread = np.broadcast_to(spread.reshape(-1, 1), (rows, 1))
    scale = scale / stats[1]

    def block(i: int, j: int) -> None:
        d = dx[i:j]
        np.subtract(x[i:j], stats[0, i:j, None], out=d)
        np.exp(d, out=d)
        np.multiply(d, scale[i:j, None], out=d)
        if spread is not None:
            np.subtract(d, spread[i:j] if weight is None else spread[i:j] * weight, out=d)

    for_blocks(block, rows, classes, x)
    dx.reshape(-1)[index] -= hit
    if masks is not None:
        ignored, bad = masks
        np.copyto(dx, 0, where=ignored[:, None])
        np.copyto(dx, np.nan, where=bad[:, None])
    return dx


def _row_statistics(x: Any, weight: Any | None, stats: Any, smooth: Any | None) -> None:
    """Fills stats with each row's max and sum exp(x - max), and smooth with sum_j w_j (x_j - max)."""
    rows, classes = x.shape
    if classes == 0:
        stats[0], stats[1] = -np.inf, 0
        return
    axis = 0 if classes <= _FEW else 1

    def block(i: int, j: int) -> None:
        part = x[i:j].T.copy(order="C") if axis == 0 else x[i:j]
        top, total = stats[:, i:j]
        np.maximum.reduce(part, axis=axis, out=top)
        d = np.subtract(part, np.expand_dims(top, axis), out=part if axis == 0 else None)
        if smooth is not None:
            if weight is None:
                np.add.reduce(d, axis=axis, out=smooth[i:j])
            else:
                np.add.reduce(d * (weight[:, None] if axis == 0 else weight), axis=axis, out=smooth[i:j])
        np.exp(d, out=d)
        np.add.reduce(d, axis=axis, out=total)

    for_blocks(block, rows, classes, x)


def _targets(x: Any, target: Any, ignore_index: int) -> tuple[Any, tuple[Any, Any] | None]:
    """(each row's target as an index into the flat x, (rows ignored, rows whose target is out of range)).

    The masks are None where all rows count; to look would make a GPU wait, so only NumPy arrays are looked at. Rows that do
    not count have the index of class 0.
    """
    rows, classes = x.shape
    first = np.arange(0, rows * classes, classes, like=x) if classes else target
    outside = (target < 0) | (target >= classes)
    if type(x) is np.ndarray and not outside.any() and not 0 <= ignore_index < classes:
        return first + target, None
    ignored = target == ignore_index
    skipped = outside | ignored
    return first + np.where(skipped, 0, target), (ignored, outside & ~ignored)


def _target_weights(x: Any, target: Any, weight: Any | None, masks: tuple[Any, Any] | None) -> Any | None:
    """weight[target], 0 for rows ignored (and for bad rows, which have no weight); None where all are 1."""
    if masks is None:
        return None if weight is None else weight.take(target)
    ignored, bad = masks
    if weight is None:
        return np.where(ignored, 0, 1).astype(x.dtype)
    skipped = ignored | bad
    picked = weight.take(np.where(skipped, 0, target)) if len(weight) else 0
    return np.where(skipped, 0, picked).astype(x.dtype)
