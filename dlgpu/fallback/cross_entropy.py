"""Softmax cross-entropy on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._blocks import for_blocks

__all__ = ["cross_entropy_bwd", "cross_entropy_fwd"]


def _targets(target: Any, classes: int, ignore_index: int) -> tuple[Any, Any, Any]:
    """(a class that is safe to index with, rows that are ignored, rows whose target is out of range)."""
    ignored = target == ignore_index
    outside = (target < 0) | (target >= classes)
    return np.where(outside | ignored, 0, target), ignored, outside & ~ignored


def _row_weights(x: Any, safe: Any, weight: Any | None, ignored: Any, bad: Any) -> Any:
    rows = np.ones_like(x, shape=safe.shape) if weight is None else weight[safe]
    if weight is not None:
        rows[bad] = 0
    rows[ignored] = 0
    return rows


def cross_entropy_fwd(
    x: Any,
    target: Any,
    weight: Any | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Any, Any, Any]:
    """loss_i = (1 - e) w_t (lse - x_t) + e / C (W lse - sum_j w_j x_j): (loss, stats [2, N], denominator [1])."""
    rows, classes = x.shape
    stats = np.empty_like(x, shape=(2, rows))
    top, total = stats[0], stats[1]
    smooth = np.empty_like(x, shape=(rows,)) if label_smoothing else None

    def block(i: int, j: int) -> None:
        if classes == 0:
            top[i:j], total[i:j] = -np.inf, 0
        else:
            np.maximum.reduce(x[i:j], axis=1, out=top[i:j])
        d = np.subtract(x[i:j], top[i:j, None])
        if smooth is not None:
            smooth[i:j] = np.add.reduce(d if weight is None else d * weight, axis=1)
        np.exp(d, out=d)
        np.add.reduce(d, axis=1, out=total[i:j])

    with np.errstate(all="ignore"):
        for_blocks(block, rows, classes, x)
        safe, ignored, bad = _targets(target, classes, ignore_index)
        w = _row_weights(x, safe, weight, ignored, bad)
        log_total = np.log(total)
        picked = x[np.arange(rows), safe] if classes else top
        loss = (log_total - (picked - top)) * w
        if smooth is not None:
            norm = classes if weight is None else np.add.reduce(weight)
            loss *= 1 - label_smoothing
            loss += (norm * log_total - smooth) * (label_smoothing / max(classes, 1))
        loss[ignored] = 0
        loss[bad] = np.nan
        denominator = np.add.reduce(w, keepdims=True, dtype=np.float64).astype(x.dtype)
        if reduction != "none":
            loss = np.add.reduce(loss, keepdims=True, dtype=np.float64)
            if reduction == "mean":
                loss = loss / denominator
            loss = loss.astype(x.dtype).reshape(())
    return loss, stats, denominator


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
    """dx = g ((1 - e) w_t (p - onehot) + e / C (W p - w)), p = exp(x - max) / sum."""
    rows, classes = x.shape
    dx = np.empty_like(x, order="C", shape=x.shape)
    with np.errstate(all="ignore"):
        safe, ignored, bad = _targets(target, classes, ignore_index)
        w = _row_weights(x, safe, weight, ignored, bad)
        g = dloss / denominator if reduction == "mean" else dloss
        hit = w * (g * (1 - label_smoothing))
        scale = hit
        if label_smoothing:
            g = g * (label_smoothing / max(classes, 1)) * np.ones_like(w)
            scale = hit + g * (classes if weight is None else np.add.reduce(weight))
        scale = scale / stats[1]

        def block(i: int, j: int) -> None:
            d = dx[i:j]
            np.subtract(x[i:j], stats[0, i:j, None], out=d)
            np.exp(d, out=d)
            np.multiply(d, scale[i:j, None], out=d)
            if label_smoothing:
                np.subtract(d, g[i:j, None] if weight is None else g[i:j, None] * weight, out=d)

        for_blocks(block, rows, classes, x)
        if classes:
            dx[np.arange(rows), safe] -= hit
        dx[ignored] = 0
        dx[bad] = np.nan
    return dx
