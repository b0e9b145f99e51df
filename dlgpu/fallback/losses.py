"""Losses on arrays. The formulas, and the NumPy twins of the elementwise ones, are in kernels/losses.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlgpu.kernels.losses import LOSSES, _np_dot

from ._blocks import for_blocks

__all__ = ["loss_bwd", "loss_fwd", "multi_margin_bwd", "multi_margin_fwd"]

# Elements in a block of an elementwise loss: larger than `_blocks.BLOCK`, for its few passes need not find their operands in
# L2, and a block costs about ten calls.
_BLOCK = 1 << 16

# Up to so many columns a row's sum is BLAS's, as accurate as NumPy's own for a short row.
_SHORT = 4096

# Up to so many classes, rows are worked on transposed, so that NumPy's inner loops run over rows.
_FEW = 64


def _over(parts: list[Any], divisor: float, x: Any) -> Any:
    """The sum of the parts over the divisor, in x's dtype."""
    result = np.empty_like(x, shape=())
    result[...] = np.divide(sum(parts), divisor)
    return result


def _fold(n: int, *weights: Any | None) -> list[Any]:
    """[rows, columns, *weights]: n elements fold into rows that each vector of weights repeats along. One weight stays one,
    and weights for all elements fold as those do."""
    if n == 0:
        return [0, 1, *(None for _ in weights)]
    width = max([1, *(w.size for w in weights if w is not None and w.size < n)])
    rows = n // width
    folded = []
    for w in weights:
        if w is not None and w.size > 1:
            w = w.reshape(rows, width) if w.size == n else np.tile(w, width // w.size)
        folded.append(w)
    return [rows, width, *folded]


def _part(w: Any, i: int, j: int) -> Any:
    """The weights of rows i to j; none, and one for all rows, stay as they are."""
    return w if w is None or w.ndim < 2 else w[i:j]


@np.errstate(all="ignore")
def loss_fwd(
    x: Any, t: Any, w: Any | None, q: Any | None, name: str, parameter: float, divisor: float | None
) -> Any:
    """The losses of x and t of one shape, or, if there is a divisor, their sum over it. w and q are vectors that repeat."""
    row = LOSSES[name]
    rows, width, w, q = _fold(x.size, w, q)
    x_rows, t_rows = x.reshape(rows, width), t.reshape(rows, width)
    loss = np.empty_like(x, order="C", shape=x.shape) if divisor is None else None
    out = None if loss is None else loss.reshape(rows, width)
    parts: list[Any] = []

    def block(i: int, j: int) -> None:
        part = np.empty_like(x, order="C", shape=(j - i, width)) if out is None else out[i:j]
        operands = x_rows[i:j], t_rows[i:j], _part(q, i, j), parameter, part
        if row.np_sum is not None and w is None and out is None and parameter < np.inf:
            parts.append(row.np_sum(*operands))
            return
        row.np_value(*operands)
        if w is not None:
            np.multiply(part, _part(w, i, j), out=part)
        if out is None:
            parts.append(_np_dot(part))

    for_blocks(block, rows, width, x, _BLOCK)
    return loss if divisor is None else _over(parts, divisor, x)


@np.errstate(all="ignore")
def loss_bwd(
    dloss: Any,
    x: Any | None,
    t: Any,
    w: Any | None,
    q: Any | None,
    name: str,
    parameter: float,
    divisor: float | None,
    needs: tuple[bool, bool],
) -> tuple[Any | None, Any | None]:
    """(dx, dt), None where `needs` is False. dloss has t's shape, or is one number if there is a divisor."""
    row = LOSSES[name]
    rows, width, w, q = _fold(t.size, w, q)
    t_rows = t.reshape(rows, width)
    x_rows = t_rows if x is None else x.reshape(rows, width)
    g = dloss.reshape(rows, width) if divisor is None else (dloss / divisor).astype(t.dtype)
    dx, dt = (np.empty_like(t, order="C", shape=t.shape) if need else None for need in needs)
    dx_rows, dt_rows = (None if d is None else d.reshape(rows, width) for d in (dx, dt))

    def block(i: int, j: int) -> None:
        upstream = _part(g, i, j) if w is None else _part(g, i, j) * _part(w, i, j)
        operands = x_rows[i:j], t_rows[i:j], _part(q, i, j), parameter
        if dx_rows is not None:
            row.np_gradient(upstream, *operands, dx_rows[i:j])
        if dt_rows is None:
            return
        if row.np_target_gradient is not None:
            row.np_target_gradient(upstream, *operands, dt_rows[i:j])
        elif dx_rows is not None:
            np.negative(dx_rows[i:j], out=dt_rows[i:j])
        else:
            row.np_gradient(np.negative(upstream), *operands, dt_rows[i:j])

    for_blocks(block, rows, width, t, _BLOCK)
    return dx, dt


def _classes(x: Any, target: Any, weight: Any | None) -> tuple[Any, Any]:
    """(each row's target, its weight): class 0 and NaN where the target is no class, which only a GPU's may be."""
    if type(x) is np.ndarray:
        return target, np.ones(1, x.dtype) if weight is None else weight.take(target)
    outside = (target < 0) | (target >= x.shape[1])
    target = np.where(outside, 0, target)
    return target, np.where(outside, np.nan, 1.0 if weight is None else weight.take(target)).astype(x.dtype)


def _margins(x: Any, target: Any, margin: float, few: bool, out: Any | None) -> Any:
    """max(0, margin - x_t + x_j), 0 in the target's column and for NaN; transposed for few columns."""
    at = np.arange(len(target), like=x)
    offset = margin - x[at, target]
    if few:
        z = np.add(x.T, offset, order="C")
        z[target, at] = 0
    else:
        z = np.add(x, offset[:, None], out=out)
        z[at, target] = 0
    # fmax has a vector loop for two arrays only.
    np.fmax(z, np.zeros_like(z, shape=z.shape[1:]), out=z)
    return z


def _row_sums(z: Any, few: bool) -> Any:
    if few or type(z) is not np.ndarray or z.shape[1] > _SHORT:
        return np.add.reduce(z, axis=0 if few else 1)
    return np.vecdot(z, np.ones(z.shape[1], z.dtype))


@np.errstate(all="ignore")
def multi_margin_fwd(
    x: Any, target: Any, weight: Any | None, p: int, margin: float, divisor: float | None
) -> Any:
    """The rows' losses [N], or, if there is a divisor, their sum over it."""
    rows, classes = x.shape
    target, w = _classes(x, target, weight)
    loss = np.empty_like(x, order="C", shape=(rows,))
    few = classes <= _FEW

    def block(i: int, j: int) -> None:
        z = _margins(x[i:j], target[i:j], margin, few, None)
        if p == 2:
            np.multiply(z, z, out=z)
        loss[i:j] = _row_sums(z, few)

    for_blocks(block, rows, classes, x)
    np.multiply(loss, w, out=loss)
    np.divide(loss, classes, out=loss)
    return loss if divisor is None else _over([_np_dot(loss)], divisor, x)


@np.errstate(all="ignore")
def multi_margin_bwd(
    dloss: Any, x: Any, target: Any, weight: Any | None, p: int, margin: float, divisor: float | None
) -> Any:
    """dx [N, C]. dloss is [N], or one number if there is a divisor."""
    rows, classes = x.shape
    target, w = _classes(x, target, weight)
    # 2 from the derivative of the square.
    g = (p * dloss / (classes * (divisor or 1))).astype(x.dtype)
    g = np.broadcast_to(g * w, (rows,))
    dx = np.empty_like(x, order="C", shape=x.shape)
    few = classes <= _FEW

    def block(i: int, j: int) -> None:
        z = _margins(x[i:j], target[i:j], margin, few, dx[i:j])
        slope = np.greater(z, 0) if p == 1 else z
        np.multiply(slope, g[i:j] if few else g[i:j, None], out=z)
        d = dx[i:j]
        total = _row_sums(z, few)
        if few:
            d[...] = z.T
        d[np.arange(j - i, like=x), target[i:j]] = -total

    for_blocks(block, rows, classes, x)
    return dx
