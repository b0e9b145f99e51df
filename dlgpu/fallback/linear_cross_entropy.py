"""Softmax cross-entropy of a linear layer's logits on arrays, a chunk of the vocabulary at a time.

z = softcap(a (x w^T + b)). The logits of a chunk exist only while it is worked on, but for those that are kept for backward;
the next chunk's maxima rescale the sums of those before, so that one pass is enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._blocks import for_blocks

__all__ = ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd"]

# Elements of a chunk of logits: as float32 they take 8 MB. Products of fewer columns are slower.
_CHUNK = 1 << 21
_FEWEST_COLUMNS = 256


def _edges(rows: int, classes: int, kept: int) -> list[int]:
    """Where the chunks begin, and the end of the last; none is kept in part."""
    step = max(_CHUNK // max(rows, 1), _FEWEST_COLUMNS)
    return [*range(0, kept, step), *range(kept, classes, step), classes]


def _logits(x: Any, w: Any, kept: Any | None, start: int, stop: int) -> tuple[Any, bool]:
    """x w^T of columns [start, stop), and whether they were kept, and so must not be written."""
    if kept is not None and stop <= kept.shape[1]:
        return kept[:, start:stop], True
    return x.dot(w[start:stop].T), False


def _transform(z: Any, bias: Any | None, softcap: float, scale: float, out: Any) -> tuple[Any, Any | None]:
    """(softcap tanh(scale (z + bias) / softcap), that tanh), or (scale (z + bias), None) where softcap is 0: in `out`, but z
    itself where there is nothing to do."""
    if bias is not None:
        z = np.add(z, bias, out=out)
    if scale != 1:
        z = np.multiply(z, scale, out=out)
    if not softcap:
        return z, None
    u = np.divide(z, softcap)
    np.tanh(u, out=u)
    return np.multiply(u, softcap, out=out), u


@np.errstate(all="ignore")
def linear_cross_entropy_fwd(
    x: Any,
    w: Any,
    target: Any,
    b: Any | None,
    weight: Any | None,
    token_weights: Any | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    accuracy: bool,
    kept_columns: int,
) -> tuple[Any, Any, Any | None, Any, Any, Any]:
    """(loss, lse [N], accuracy [] or [N] or None, stats [2, N], denominator [1], kept [N, kept_columns]).

    loss_i = t_i ((1 - e) w_y (lse - z_y) + e / V sum_j w_j (lse - z_j) + z_loss lse^2), y = target_i. stats holds each row's
    max and sum exp(z - max).
    """
    rows, classes = len(x), len(w)
    stats = np.empty_like(x, order="C", shape=(2, rows))
    top, total = stats
    top[...], total[...] = -np.inf, 0
    at_target = np.zeros_like(top)
    spread = np.zeros_like(top)
    kept = x.dot(w[:kept_columns].T) if kept_columns else np.empty_like(x, order="C", shape=(rows, 0))

    def chunk(start: int, stop: int, seen: float) -> float:
        """Adds columns [start, stop) to the rows' statistics; seen is the sum of the weights of those before."""
        columns = stop - start
        raw, was_kept = _logits(x, w, kept, start, stop)
        bias = None if b is None else b[start:stop]
        chunk_weight = None if weight is None else weight[start:stop]
        share = (
            float(columns if chunk_weight is None else np.add.reduce(chunk_weight))
            if label_smoothing
            else 0.0
        )

        def block(i: int, j: int) -> None:
            out = np.empty_like(x, order="C", shape=(j - i, columns)) if was_kept else raw[i:j]
            z, _ = _transform(raw[i:j], bias, softcap, logit_scale, out)
            here = z.max(axis=1)
            highest = np.maximum(top[i:j], here)
            inside = (target[i:j] >= start) & (target[i:j] < stop)
            column = np.where(inside, target[i:j] - start, 0)
            at_target[i:j] += np.where(inside, np.take_along_axis(z, column[:, None], 1)[:, 0], 0)
            # All -inf so far: subtract 0, for exp(-inf + inf) is NaN.
            base = np.where(highest == -np.inf, 0, highest)
            z = np.subtract(z, base[:, None], out=out)
            if label_smoothing:
                moved = np.where(top[i:j] == -np.inf, 0, top[i:j]) - base
                spread[i:j] += seen * moved if seen else 0
                spread[i:j] += np.add.reduce(z if chunk_weight is None else z * chunk_weight, axis=1)
            np.exp(z, out=z)
            total[i:j] *= np.exp(top[i:j] - base)
            total[i:j] += np.add.reduce(z, axis=1)
            top[i:j] = highest

        for_blocks(block, rows, columns, x)
        return seen + share

    seen = 0.0
    for start, stop in itertools.pairwise(_edges(rows, classes, kept_columns)):
        seen = chunk(start, stop, seen)
    np.copyto(top, 0, where=top == -np.inf)
    log_total = np.log(total)
    lse = top + log_total
    live = target != ignore_index
    known = live & (target >= 0) & (target < classes)
    share_of = np.where(live, 1, 0).astype(x.dtype)
    if weight is not None:
        share_of = np.where(known, weight.take(np.where(known, target, 0)), 0).astype(x.dtype)
    loss = np.where(known, 1 - label_smoothing, np.nan) * share_of * (log_total - (at_target - top))
    if label_smoothing:
        loss += (seen * log_total - spread) * (label_smoothing / classes)
    if z_loss:
        loss += z_loss * lse * lse
    if token_weights is not None:
        loss = loss * token_weights
        # What stands at an ignored row counts nowhere, NaN included.
        share_of = share_of * np.where(live, token_weights, 0)
    loss = np.where(live, loss, 0).astype(x.dtype)
    lse = np.where(live, lse, 0).astype(x.dtype)
    right = None
    if accuracy:
        # Ties count; the maximum of a row with NaN is NaN.
        right = (known & (at_target >= top)).astype(x.dtype)
        if reduction != "none":
            right = np.add.reduce(right, keepdims=True) / np.add.reduce(live, keepdims=True, dtype=x.dtype)
            right = right.reshape(())
    denominator = np.add.reduce(share_of, keepdims=True, dtype=np.float64)
    if reduction != "none":
        result = np.add.reduce(loss, keepdims=True, dtype=np.float64)
        if reduction == "mean":
            result /= denominator
        loss = result.astype(x.dtype).reshape(())
    return loss, lse, right, stats, denominator.astype(x.dtype), kept


@np.errstate(all="ignore")
def linear_cross_entropy_bwd(
    dloss: Any,
    dlse: Any | None,
    x: Any,
    w: Any,
    target: Any,
    b: Any | None,
    weight: Any | None,
    token_weights: Any | None,
    stats: Any,
    denominator: Any,
    kept: Any | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
) -> tuple[Any | None, Any | None, Any | None]:
    """(dx, dw, db), each None where needs says so: dz = A p - h [j = y] - e / V w_j, a chunk of columns at a time, then
    dx += dz w, dw = dz^T x and db = sum of dz's rows."""
    rows, classes = len(x), len(w)
    needs_x, needs_w, needs_b = needs
    live = target != ignore_index
    known = live & (target >= 0) & (target < classes)
    g = dloss / denominator if reduction == "mean" else dloss
    if token_weights is not None:
        g = g * token_weights
    g = np.where(live, g, 0)
    at_target = np.where(known, 1 - label_smoothing, np.nan)
    if weight is not None:
        at_target = at_target * weight.take(np.where(known, target, 0))
    hit = np.where(live, g * at_target, 0).astype(x.dtype)
    uniform = g * (label_smoothing / classes)
    norm = classes if weight is None else np.add.reduce(weight)
    factor = hit + uniform * norm if label_smoothing else hit
    if z_loss:
        factor = factor + 2 * z_loss * np.where(live, g * (stats[0] + np.log(stats[1])), 0)
    if dlse is not None:
        factor = factor + np.where(live, dlse, 0)
    # An ignored row's gradient is 0, whatever its logits are. To look for one would make a GPU wait.
    ignored = None if type(x) is np.ndarray and live.all() else ~live[:, None]
    factor = (factor / stats[1]).astype(x.dtype)[:, None]
    uniform = uniform.astype(x.dtype)[:, None]
    dx = np.zeros_like(x, order="C", shape=x.shape) if needs_x else None
    dw = np.empty_like(x, order="C", shape=w.shape) if needs_w else None
    db = np.empty_like(x, order="C", shape=(classes,)) if needs_b else None
    kept_columns = 0 if kept is None else kept.shape[1]

    def chunk(start: int, stop: int) -> None:
        """Columns [start, stop) of the vocabulary, in all gradients."""
        raw, was_kept = _logits(x, w, kept, start, stop)
        dz = np.empty_like(x, order="C", shape=(rows, stop - start)) if was_kept else raw
        bias = None if b is None else b[start:stop]
        chunk_weight = None if weight is None else weight[start:stop]

        def block(i: int, j: int) -> None:
            d = dz[i:j]
            z, u = _transform(raw[i:j], bias, softcap, logit_scale, d)
            np.subtract(z, stats[0, i:j, None], out=d)
            np.exp(d, out=d)
            np.multiply(d, factor[i:j], out=d)
            if label_smoothing:
                spread = uniform[i:j] if chunk_weight is None else uniform[i:j] * chunk_weight
                np.subtract(d, spread, out=d)
            inside = np.nonzero((target[i:j] >= start) & (target[i:j] < stop))[0]
            d[inside, target[i:j][inside] - start] -= hit[i:j][inside]
            if logit_scale != 1:
                np.multiply(d, logit_scale, out=d)
            if u is not None:
                np.multiply(d, (1 - u) * (1 + u), out=d)
            if ignored is not None:
                np.copyto(d, 0, where=ignored[i:j])

        for_blocks(block, rows, stop - start, x)
        if dx is not None:
            np.add(dx, dz.dot(w[start:stop]), out=dx)
        if dw is not None:
            np.dot(dz.T, x, out=dw[start:stop])
        if db is not None:
            db[start:stop] = np.add.reduce(dz, axis=0, dtype=np.float64)

    for start, stop in itertools.pairwise(_edges(rows, classes, kept_columns)):
        chunk(start, stop)
    return dx, dw, db
