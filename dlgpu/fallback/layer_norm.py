"""Layer norm and RMS norm over the rows of arrays [N, C]. Sums over rows and columns are BLAS's products with ones or with
the weight: half the time of NumPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._blocks import BLOCK, for_blocks

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]


def _block_rows(x: Any) -> int:
    """The most rows of a block."""
    rows, columns = x.shape
    return rows if type(x) is not np.ndarray else min(rows, max(1, BLOCK // columns))


def _block(vector: Any, x: Any) -> Any:
    """A number of each column for each element of a block: two arrays of one shape take NumPy half the time of an array and a
    row."""
    row = vector.astype(x.dtype, copy=False)[None]
    return np.repeat(row, _block_rows(x), axis=0) if type(x) is np.ndarray else row


@np.errstate(all="ignore")
def layer_norm_fwd(x: Any, w: Any, b: Any, eps: float, rms: bool) -> tuple[Any, Any]:
    """y = (x - mean) rstd w + b, and the statistics [2, N] for backward: rstd and mean (RMS norm: [1, N], rstd)."""
    rows, columns = x.shape
    y = np.empty_like(x, order="C", shape=x.shape)
    stats = np.empty_like(x, order="C", shape=(1 if rms else 2, rows))
    if not y.size:
        return y, stats
    share = np.full_like(x, 1 / columns, shape=columns)
    scale, shift = (None if v is None else _block(v, x) for v in (w, b))
    scratch = np.empty_like(x, shape=(_block_rows(x), columns))

    def block(i: int, j: int) -> None:
        n, out, rstd = j - i, y[i:j], stats[0, i:j]
        d = x[i:j]
        if not rms:
            # The mean of the distances from the row's first value, which have more digits at a large mean.
            d = np.subtract(d, d[:, :1], out=out)
            np.add(x[i:j, 0], d @ share, out=stats[1, i:j])
            np.subtract(x[i:j], stats[1, i:j, None], out=out)
            d = out
        np.multiply(d, d, out=scratch[:n])
        np.add(scratch[:n] @ share, eps, out=rstd)
        np.divide(1, np.sqrt(rstd, out=rstd), out=rstd)
        np.multiply(d, rstd[:, None], out=out)
        if scale is not None:
            np.multiply(out, scale[:n], out=out)
        if shift is not None:
            np.add(out, shift[:n], out=out)

    for_blocks(block, rows, columns, x)
    return y, stats


@np.errstate(all="ignore")
def layer_norm_bwd(
    dy: Any, x: Any, w: Any, stats: Any, rms: bool, needs: Sequence[bool]
) -> tuple[Any, Any, Any]:
    """(dx, dw, db), None for what is not needed."""
    rows, columns = x.shape
    needs_x, needs_w, needs_b = needs
    dx: Any = np.empty_like(x, order="C", shape=x.shape) if needs_x else None
    dw: Any = np.zeros_like(x, shape=columns) if needs_w else None
    db: Any = np.zeros_like(x, shape=columns) if needs_b else None
    if not x.size:
        return dx, dw, db
    step = _block_rows(x)
    ones = np.ones_like(x, shape=step)
    # w / C, so that a product with it is the mean of the products with w.
    share = np.full_like(x, 1 / columns, shape=columns)
    if w is not None:
        share *= w
    scale = None if w is None else _block(w, x)
    near, other = np.empty_like(x, shape=(2, step, columns))

    def block(i: int, j: int) -> None:
        n, upstream, rstd = j - i, dy[i:j], stats[0, i:j, None]
        if needs_b:
            np.add(db, ones[:n] @ upstream, out=db)
        if not (needs_x or needs_w):
            return
        xhat = near[:n]
        if rms:
            np.multiply(x[i:j], rstd, out=xhat)
        else:
            np.subtract(x[i:j], stats[1, i:j, None], out=xhat)
            np.multiply(xhat, rstd, out=xhat)
        product = np.multiply(upstream, xhat, out=other[:n])
        if needs_w:
            np.add(dw, ones[:n] @ product, out=dw)
        if not needs_x:
            return
        out = dx[i:j]
        np.multiply(xhat, (product @ share)[:, None], out=xhat)
        g = upstream if scale is None else np.multiply(upstream, scale[:n], out=out)
        np.subtract(g, xhat, out=out)
        if not rms:
            np.subtract(out, (upstream @ share)[:, None], out=out)
        np.multiply(out, rstd, out=out)

    for_blocks(block, rows, columns, x)
    return dx, dw, db
