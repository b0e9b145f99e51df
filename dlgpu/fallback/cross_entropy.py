"""Softmax cross-entropy on arrays. The formulas are in kernels/cross_entropy.py.

Rows of few classes are worked on transposed, so that NumPy's inner loops run over rows: reducing along a short last axis
costs about ten times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._blocks import for_blocks

__all__ = [
    "cross_entropy_bwd",
    "cross_entropy_extra_bwd",
    "cross_entropy_extra_fwd",
    "cross_entropy_fwd",
    "keeps_exponentials",
]

# Up to so many classes, rows are worked on transposed.
_FEW = 64

# Elements in a block. In blocks of 2^15, which fit the L2, some passes over longer rows are short of 10 us, and calling them
# costs more than the L3 does.
_BLOCK = 1 << 18

# Up to so many classes a row's sum is BLAS's dot product with ones: half the time of NumPy's pairwise sum, on one thread,
# and as accurate for a short row.
_SHORT = 4096


@np.errstate(all="ignore")
def cross_entropy_fwd(
    x: Any,
    target: Any,
    weight: Any | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    exponentials: Any | None = None,
) -> tuple[Any, Any, Any]:
    """loss_i = (1 - e) w_t (lse - x_t) + e / C (W lse - sum_j w_j x_j), W = sum_j w_j.

    Returns (loss, stats, denominator): stats [2, N] holds each row's max and sum exp(x - max), denominator [1] the sum of
    weight[target] over the rows that count. (max, sum) and not lse: the rounding of a large lse would be an error of every
    probability. `exponentials` [N, C], if given, is filled with exp(x - max); see `keeps_exponentials`.
    """
    rows, classes = x.shape
    stats = np.empty_like(x, order="C", shape=(2, rows))
    smooth = np.empty_like(x, shape=(rows,)) if label_smoothing else None
    _row_statistics(x, weight, stats, smooth, exponentials)
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
    denominator = _denominator(x, hit)
    return _reduce(loss, denominator, reduction, x), stats, denominator


@np.errstate(all="ignore")
def cross_entropy_extra_fwd(
    x: Any,
    target: Any,
    weight: Any | None,
    token_weights: Any | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_accuracy: bool,
) -> tuple[Any, Any, Any | None, Any, Any]:
    """(loss, lse [N], accuracy, stats, denominator [1]): with probabilities for target, or with extras.

    A softcap of 0 is none; stats [2, N] holds each row's max and sum exp(z - max), with probabilities [3, N] also sum_j a_j.
    """
    rows, classes = x.shape
    probabilities = target.dtype.kind == "f"
    z = _logits(x, softcap, logit_scale)
    stats = np.empty_like(x, order="C", shape=(3 if probabilities else 2, rows))
    accuracy = correct = ignored = masks = hit = None
    if probabilities:
        _row_statistics(z, None, stats, None)
        offset = np.empty_like(x, shape=(rows,))
        _probability_sums(z, target, weight, label_smoothing, stats, offset)
        log_total = np.log(stats[1])
        loss = stats[2] * log_total - offset
    else:
        smooth = np.empty_like(x, shape=(rows,)) if label_smoothing else None
        _row_statistics(z, weight, stats, smooth)
        index, masks = _targets(x, target, ignore_index)
        log_total = np.log(stats[1])
        below = z.reshape(-1).take(index) - stats[0]
        loss = log_total - below
        hit = _target_weights(x, target, weight, masks)
        if hit is not None:
            loss *= hit
        if smooth is not None:
            norm = classes if weight is None else np.add.reduce(weight)
            loss *= 1 - label_smoothing
            loss += (norm * log_total - smooth) * (label_smoothing / classes)
        if return_accuracy:
            # The maximum of a row with NaN is NaN.
            correct = (below >= 0).astype(x.dtype)
    lse = stats[0] + log_total
    if z_loss:
        loss += z_loss * np.square(lse)
    if token_weights is not None:
        loss = loss * token_weights
        hit = token_weights if hit is None else hit * token_weights
    if masks is not None:
        ignored, bad = masks
        loss = np.where(ignored, 0, np.where(bad, np.nan, loss)).astype(x.dtype)
        lse = np.where(ignored, 0, lse).astype(x.dtype)
        if hit is not None and token_weights is not None:
            # An ignored row counts nowhere, whatever its token weight.
            hit = np.where(ignored | bad, 0, hit).astype(x.dtype)
        if correct is not None:
            correct = np.where(ignored | bad, 0, correct).astype(x.dtype)
    denominator = _denominator(x, hit)
    if correct is not None:
        accuracy = correct
        if reduction != "none":
            counted = rows if ignored is None else np.add.reduce(np.where(ignored, 0, 1))
            total = np.add.reduce(correct, keepdims=True, dtype=np.float64)
            accuracy = np.divide(total, counted).astype(x.dtype).reshape(())
    return _reduce(loss, denominator, reduction, x), lse, accuracy, stats, denominator


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
    exponentials: Any | None = None,
) -> Any:
    """dx = g ((1 - e) w_t (p - onehot) + e / C (W p - w)), p = exp(x - max) / sum, g = dloss or dloss / denominator.

    `exponentials`, if given, are forward's, and dx is written over them.
    """
    rows, classes = x.shape
    dx = np.empty_like(x, order="C", shape=x.shape) if exponentials is None else exponentials
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
        if exponentials is None:
            np.subtract(x[i:j], stats[0, i:j, None], out=d)
            np.exp(d, out=d)
        np.multiply(d, scale[i:j, None], out=d)
        if spread is not None:
            np.subtract(d, spread[i:j] if weight is None else spread[i:j] * weight, out=d)

    for_blocks(block, rows, classes, x, _BLOCK)
    dx.reshape(-1)[index] -= hit
    _mark(dx, masks)
    return dx


@np.errstate(all="ignore")
def cross_entropy_extra_bwd(
    dloss: Any,
    dlse: Any | None,
    x: Any,
    target: Any,
    weight: Any | None,
    token_weights: Any | None,
    stats: Any,
    denominator: Any,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
    out: Any | None = None,
) -> tuple[Any | None, Any | None]:
    """(dx, dtarget), None where `needs` is False. dx is written to `out`, which may be x."""
    rows, classes = x.shape
    dx: Any = None
    dtarget: Any = None
    if needs[0]:
        dx = np.empty_like(x, order="C", shape=x.shape) if out is None else out
    if needs[1]:
        dtarget = np.empty_like(x, order="C", shape=x.shape)
    if not x.size:
        return dx, dtarget
    g = dloss / denominator if reduction == "mean" else dloss
    if token_weights is not None:
        g = g * token_weights
    probabilities = target.dtype.kind == "f"
    masks: Any = None
    index: Any = None
    hit: Any = None
    spread: Any = None
    if probabilities:
        spread = np.broadcast_to(g, (rows,)).reshape(-1, 1)
        scale = g * stats[2]
    else:
        index, masks = _targets(x, target, ignore_index)
        hit = _target_weights(x, target, weight, masks)
        hit = g * (1 - label_smoothing) if hit is None else g * (1 - label_smoothing) * hit
        scale = hit
        hit = np.broadcast_to(hit, (rows,))
        if label_smoothing:
            spread = g * (label_smoothing / classes)
            scale = hit + spread * (classes if weight is None else np.add.reduce(weight))
            spread = np.broadcast_to(spread.reshape(-1, 1), (rows, 1))
    log_total: Any = np.log(stats[1]) if z_loss or needs[1] else None
    if z_loss:
        scale = scale + g * (2 * z_loss) * (stats[0] + log_total)
    if dlse is not None:
        scale = scale + dlse
    scale = scale / stats[1]
    if scale.dtype != x.dtype:
        # A float64 factor would make a float64 copy of every block.
        scale = scale.astype(x.dtype)
    column = scale[:, None]
    reach: Any = None if log_total is None else np.broadcast_to(g * (1 - label_smoothing), (rows,))[:, None]

    def block(i: int, j: int) -> None:
        z = _logits(x[i:j], softcap, logit_scale)
        if dtarget is not None:
            d = np.subtract((stats[0, i:j] + log_total[i:j])[:, None], z, out=dtarget[i:j])
            np.multiply(d, reach[i:j], out=d)
            if weight is not None:
                np.multiply(d, weight, out=d)
        if dx is None:
            return
        d = dx[i:j]
        slope = None
        if softcap:
            slope = 1 - np.square(z * (1 / softcap))
        np.subtract(z, stats[0, i:j, None], out=d)
        np.exp(d, out=d)
        np.multiply(d, column[i:j], out=d)
        if probabilities:
            np.subtract(d, spread[i:j] * _shares(target[i:j], weight, label_smoothing), out=d)
        elif spread is not None:
            np.subtract(d, spread[i:j] if weight is None else spread[i:j] * weight, out=d)
        if hit is not None:
            at = np.arange(j - i, like=x)
            d[at, index[i:j] - (at + i) * classes] -= hit[i:j]
        if slope is not None:
            np.multiply(d, slope, out=d)
        if logit_scale != 1:
            np.multiply(d, logit_scale, out=d)

    for_blocks(block, rows, classes, x, _BLOCK)
    if dx is not None:
        _mark(dx, masks)
    return dx, dtarget


def keeps_exponentials(classes: int) -> bool:
    """Whether forward should keep exp(x - max) for backward, which then writes the gradient over them: N C elements between
    the two, as many as torch keeps, and no second exponential. Rows of few classes are quicker to do again."""
    return classes > _FEW


def _logits(x: Any, softcap: float, logit_scale: float) -> Any:
    """z = logit_scale x, or softcap tanh(logit_scale x / softcap); x itself where that is the same."""
    if softcap:
        z = np.multiply(x, logit_scale / softcap)
        np.tanh(z, out=z)
        return np.multiply(z, softcap, out=z)
    return x if logit_scale == 1 else np.multiply(x, logit_scale)


def _row_statistics(
    x: Any, weight: Any | None, stats: Any, smooth: Any | None, exponentials: Any | None = None
) -> None:
    """Fills stats with each row's max and sum exp(x - max), smooth with sum_j w_j (x_j - max), exponentials with
    exp(x - max)."""
    rows, classes = x.shape
    if classes == 0:
        stats[0], stats[1] = -np.inf, 0
        return
    axis = 0 if classes <= _FEW else 1
    ones = None
    if type(x) is np.ndarray and _FEW < classes <= _SHORT:
        ones = np.ones(classes, x.dtype)

    def block(i: int, j: int) -> None:
        part = x[i:j].T.copy(order="C") if axis == 0 else x[i:j]
        top, total = stats[0, i:j], stats[1, i:j]
        # The method: CuPy has no maximum.reduce.
        part.max(axis=axis, out=top)
        out = part if axis == 0 else None if exponentials is None else exponentials[i:j]
        d = np.subtract(part, np.expand_dims(top, axis), out=out)
        if smooth is not None:
            if weight is None:
                np.add.reduce(d, axis=axis, out=smooth[i:j])
            else:
                np.add.reduce(d * (weight[:, None] if axis == 0 else weight), axis=axis, out=smooth[i:j])
        # Not exp2, though it can be twice as fast in float32: for a million numbers NumPy 2.4's takes 0.19 ms in one process
        # on that EPYC and 0.70 ms in the next, exp 0.36 ms in all.
        np.exp(d, out=d)
        if ones is None:
            np.add.reduce(d, axis=axis, out=total)
        else:
            np.vecdot(d, ones, out=total)

    if axis == 0:
        for_blocks(block, rows, classes, x)
    else:
        for_blocks(block, rows, classes, x, _BLOCK)


def _mark(dx: Any, masks: tuple[Any, Any] | None) -> None:
    """0 where a row is ignored, NaN where its target is no class."""
    if masks is not None:
        ignored, bad = masks
        np.copyto(dx, 0, where=ignored[:, None])
        np.copyto(dx, np.nan, where=bad[:, None])


def _shares(q: Any, weight: Any | None, label_smoothing: float) -> Any:
    """a_j = w_j ((1 - e) q_j + e / C)."""
    a = q
    if label_smoothing:
        a = q * (1 - label_smoothing)
        a += label_smoothing / q.shape[1]
    return a if weight is None else a * weight


def _probability_sums(
    z: Any, q: Any, weight: Any | None, label_smoothing: float, stats: Any, offset: Any
) -> None:
    """Fills stats[2] with sum_j a_j and offset with sum_j a_j (z_j - max)."""
    rows, classes = z.shape

    def block(i: int, j: int) -> None:
        a = _shares(q[i:j], weight, label_smoothing)
        np.add.reduce(a, axis=1, out=stats[2, i:j])
        np.add.reduce(a * (z[i:j] - stats[0, i:j, None]), axis=1, out=offset[i:j])

    for_blocks(block, rows, classes, z)


def _denominator(x: Any, hit: Any | None) -> Any:
    """[1]: the sum of the rows' weights, or their number."""
    denominator = np.empty_like(x, shape=(1,))
    if hit is None:
        denominator[...] = x.shape[0]
    else:
        np.add.reduce(hit, keepdims=True, dtype=np.float64, out=denominator)
    return denominator


def _reduce(loss: Any, denominator: Any, reduction: str, x: Any) -> Any:
    if reduction == "none":
        return loss
    total = np.add.reduce(loss, keepdims=True, dtype=np.float64)
    if reduction == "mean":
        total /= denominator
    return total.astype(x.dtype).reshape(())


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
