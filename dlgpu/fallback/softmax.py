"""Softmax, log-softmax and log-sum-exp over the last axis of arrays [N, C].

Rows of few columns are worked on transposed, so that NumPy's inner loops run over rows: reducing along a short last axis costs
about ten times as much.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._blocks import for_blocks

__all__ = ["logsumexp_bwd", "logsumexp_fwd", "softmax_bwd", "softmax_fwd"]

# Up to so many columns, rows are worked on transposed.
_FEW = 64


@np.errstate(all="ignore")
def softmax_fwd(x: Any, log: bool) -> Any:
    """y = exp(x - max) / sum exp(x - max), or its logarithm."""
    rows, columns = x.shape
    y = np.empty_like(x, order="C", shape=x.shape)
    if not y.size:
        return y
    few = columns <= _FEW
    axis = 0 if few else 1

    def block(i: int, j: int) -> None:
        part = x[i:j].T if few else x[i:j]
        out = np.empty_like(part, order="C", shape=part.shape) if few else y[i:j]
        np.subtract(part, part.max(axis=axis, keepdims=True), out=out)
        if log:
            np.subtract(out, np.log(np.add.reduce(np.exp(out), axis=axis, keepdims=True)), out=out)
        else:
            np.exp(out, out=out)
            np.divide(out, np.add.reduce(out, axis=axis, keepdims=True), out=out)
        if few:
            y[i:j] = out.T

    for_blocks(block, rows, columns, x)
    return y


@np.errstate(all="ignore")
def softmax_bwd(dy: Any, y: Any, log: bool) -> Any:
    """dx = y (dy - sum dy y), or dy - exp(y) sum dy for the logarithm."""
    rows, columns = y.shape
    dx = np.empty_like(y, order="C", shape=y.shape)
    if not dx.size:
        return dx
    few = columns <= _FEW
    axis = 0 if few else 1

    def block(i: int, j: int) -> None:
        upstream, result = (dy[i:j].T, y[i:j].T) if few else (dy[i:j], y[i:j])
        out = np.empty_like(result, order="C", shape=result.shape) if few else dx[i:j]
        if log:
            np.exp(result, out=out)
            np.multiply(out, np.add.reduce(upstream, axis=axis, keepdims=True), out=out)
            np.subtract(upstream, out, out=out)
        else:
            np.multiply(upstream, result, out=out)
            total = np.add.reduce(out, axis=axis, keepdims=True)
            np.subtract(upstream, total, out=out)
            np.multiply(out, result, out=out)
        if few:
            dx[i:j] = out.T

    for_blocks(block, rows, columns, y)
    return dx


@np.errstate(all="ignore")
def logsumexp_fwd(x: Any) -> tuple[Any, Any]:
    """(lse [N], stats [2, N]): each row's max m and s = sum exp(x - m), m 0 where it is infinite, and lse = m + log s."""
    rows, columns = x.shape
    stats = np.empty_like(x, order="C", shape=(2, rows))
    if not columns:
        stats[0], stats[1] = 0, 0
        return np.log(stats[1]), stats
    few = columns <= _FEW
    axis = 0 if few else 1

    def block(i: int, j: int) -> None:
        part = x[i:j].T.copy(order="C") if few else x[i:j]
        top, total = stats[:, i:j]
        part.max(axis=axis, out=top)
        # Then an infinite logit's exponential is infinite, and not exp(inf - inf) = NaN.
        top[np.isinf(top)] = 0
        d = np.subtract(part, np.expand_dims(top, axis), out=part if few else None)
        np.exp(d, out=d)
        np.add.reduce(d, axis=axis, out=total)

    for_blocks(block, rows, columns, x)
    return stats[0] + np.log(stats[1]), stats


@np.errstate(all="ignore")
def logsumexp_bwd(dlse: Any, x: Any, stats: Any) -> Any:
    """dx = dlse exp(x - m) / s."""
    rows, columns = x.shape
    dx = np.empty_like(x, order="C", shape=x.shape)

    def block(i: int, j: int) -> None:
        d = dx[i:j]
        np.subtract(x[i:j], stats[0, i:j, None], out=d)
        np.exp(d, out=d)
        np.divide(d, stats[1, i:j, None], out=d)
        np.multiply(d, dlse[i:j, None], out=d)

    if dx.size:
        for_blocks(block, rows, columns, x)
    return dx
