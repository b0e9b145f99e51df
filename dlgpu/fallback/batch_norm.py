"""Batch norm with an activation after it, on arrays [N, C L]: the L positions of a channel side by side.

Numbers of the columns come as blocks of equal rows: two arrays of one shape take NumPy half the time of an array and a row.
Sums over the rows are BLAS's products with ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlgpu.kernels.activations import lookup, saved_for_backward

from ._blocks import BLOCK, for_blocks

__all__ = ["batch_norm_apply", "batch_norm_bwd", "batch_norm_statistics"]


def _block_rows(x: Any) -> int:
    """The most rows of a block."""
    rows, columns = x.shape
    return rows if type(x) is not np.ndarray else min(rows, max(1, BLOCK // columns))


def _spread(vector: Any, columns: int) -> Any:
    """A number of each channel for each column."""
    return vector if len(vector) == columns else np.repeat(vector, columns // len(vector))


def _block(vector: Any, x: Any) -> Any:
    """A number of each channel for each element of a block of x."""
    row = _spread(vector, x.shape[1])
    return np.repeat(row[None], _block_rows(x), axis=0) if type(x) is np.ndarray else row[None]


def _gather(vector: Any, channels: int) -> Any:
    """The sums over each channel's columns."""
    return vector if len(vector) == channels else np.add.reduce(vector.reshape(channels, -1), axis=1)


@np.errstate(all="ignore")
def batch_norm_statistics(x: Any, channels: int) -> tuple[Any, Any]:
    """(mean, biased variance) of each channel, from sums of distances, and of their squares, from the mean of the first block
    of rows: near enough to the mean that the difference of the two loses nothing that matters."""
    rows, columns = x.shape
    if not x.size:
        return np.zeros_like(x, shape=channels), np.zeros_like(x, shape=channels)
    length = columns // channels
    total, square = np.zeros_like(x, shape=columns), np.zeros_like(x, shape=columns)
    step = _block_rows(x)
    # Of distances from the first value: at a large mean they have more digits than the values.
    first = x[0, ::length]
    near = x[:step].reshape(-1, channels, length) - first[:, None]
    pivot = first + np.add.reduce(np.add.reduce(near, axis=2), axis=0) / (len(near) * length)
    shift, ones = _block(pivot, x), np.ones_like(x, shape=step)
    scratch = np.empty_like(x, shape=(step, columns))

    def block(i: int, j: int) -> None:
        n = j - i
        d = np.subtract(x[i:j], shift[:n], out=scratch[:n])
        np.add(total, ones[:n] @ d, out=total)
        np.multiply(d, d, out=d)
        np.add(square, ones[:n] @ d, out=square)

    for_blocks(block, rows, columns, x)
    count = rows * length
    mean = _gather(total, channels) / count
    return pivot + mean, np.maximum(_gather(square, channels) / count - mean * mean, 0)


@np.errstate(all="ignore")
def batch_norm_apply(
    x: Any, mean: Any, var: Any, w: Any, b: Any, eps: float, activation: str | None, negative_slope: float
) -> tuple[Any, Any]:
    """y = act((x - mean) rstd w + b), and the statistics [2, C] for backward: rstd and mean."""
    rows, columns = x.shape
    y = np.empty_like(x, order="C", shape=x.shape)
    stats = np.stack([1 / np.sqrt(var + var.dtype.type(eps)), mean])
    if not x.size:
        return y, stats
    act = lookup(activation).np_forward
    shift, scale, bias = _blocks(stats, w, b, x)

    def block(i: int, j: int) -> None:
        out, n = y[i:j], j - i
        np.subtract(x[i:j], shift[:n], out=out)
        np.multiply(out, scale[:n], out=out)
        if bias is not None:
            np.add(out, bias[:n], out=out)
        act(out.reshape(-1), negative_slope)

    for_blocks(block, rows, columns, x)
    return y, stats


def _blocks(stats: Any, w: Any, b: Any, x: Any) -> tuple[Any, Any, Any]:
    """(mean, rstd w, b) of each element of a block."""
    scale = stats[0] if w is None else stats[0] * w
    kind = x.dtype
    return tuple(  # type: ignore[return-value]
        None if v is None else _block(v.astype(kind, copy=False), x) for v in (stats[1], scale, b)
    )


@np.errstate(all="ignore")
def batch_norm_bwd(
    dy: Any,
    x: Any,
    w: Any,
    b: Any,
    stats: Any,
    training: bool,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """(dx, dw, db), None for what is not needed."""
    rows, columns = x.shape
    needs_x, needs_w, needs_b = needs
    channels = stats.shape[1]
    # Holds dz at first.
    dx: Any = np.empty_like(x, order="C", shape=x.shape) if needs_x else None
    if not x.size:
        dw, db = np.zeros_like(x, shape=channels), np.zeros_like(x, shape=channels)
        return dx, dw if needs_w else None, db if needs_b else None
    dw, db = np.zeros_like(x, shape=columns), np.zeros_like(x, shape=columns)
    row = lookup(activation)
    saves_y = saved_for_backward(activation, negative_slope) == "y"
    shift, scale, bias = _blocks(stats, w, b, x)
    step = _block_rows(x)
    ones = np.ones_like(x, shape=step)
    near, other = np.empty_like(x, shape=(2, step, columns))
    both = training and needs_x

    def sums(i: int, j: int) -> None:
        n = j - i
        d = np.subtract(x[i:j], shift[:n], out=near[:n])
        dz = dy[i:j]
        if activation is not None:
            z = np.multiply(d, scale[:n], out=other[:n])
            if bias is not None:
                np.add(z, bias[:n], out=z)
            if saves_y:
                row.np_forward(z.reshape(-1), negative_slope)
            dz = np.empty_like(z) if dx is None else dx[i:j]
            upstream = dy[i:j].reshape(-1)
            row.np_gradient(upstream, z.reshape(-1), negative_slope, dz.reshape(-1))
        if needs_w or both:
            np.multiply(d, dz, out=d)
            np.add(dw, ones[:n] @ d, out=dw)
        if needs_b or both:
            np.add(db, ones[:n] @ dz, out=db)
        if dx is not None and not training:
            np.multiply(dz, scale[:n], out=dx[i:j])

    for_blocks(sums, rows, columns, x)
    # Of x - mean so far, not of xhat.
    dw = _gather(dw, channels)
    db = _gather(db, channels)
    if both:
        count = x.size // channels
        slant = _block(dw * stats[0] * stats[0] / count, x)
        level = _block(db / count, x)

        def result(i: int, j: int) -> None:
            n, out = j - i, dx[i:j]
            dz = dy[i:j] if activation is None else out
            d = np.subtract(x[i:j], shift[:n], out=near[:n])
            np.multiply(d, slant[:n], out=d)
            np.add(d, level[:n], out=d)
            np.subtract(dz, d, out=out)
            np.multiply(out, scale[:n], out=out)

        for_blocks(result, rows, columns, x)
    return dx, dw * stats[0] if needs_w else None, db if needs_b else None
