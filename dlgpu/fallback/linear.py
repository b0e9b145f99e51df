"""Fused linear + bias + activation on arrays.

Products are the arrays' own `dot`: unlike matmul it copies layouts that BLAS cannot read, raises no floating-point warnings,
and costs half as much to call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlgpu.kernels.activations import lookup

from ._blocks import BLOCK, for_blocks
from .activations import activation_bwd

__all__ = ["linear_bwd", "linear_fwd"]

# Rows that one product with ones adds up: partial sums keep the rounding of a tall column's sum small.
_GROUP = 32


@functools.cache
def _ones(dtype: Any) -> Any:
    return np.ones(_GROUP, dtype)


@np.errstate(all="ignore")
def linear_fwd(
    x: Any, w: Any, b: Any | None, activation: str | None, negative_slope: float, save_z: bool
) -> tuple[Any, Any | None]:
    """y = act(z), z = x w^T + b: (y, z if save_z else None). x [M, K], w [N, K], b [N]."""
    z = x.dot(w.T)
    act = None if activation is None else lookup(activation).np_forward
    if z.size <= BLOCK and not save_z:
        if b is not None:
            np.add(z, b, out=z)
        if act is not None:
            act(z.reshape(-1), negative_slope)
        return z, None
    y = np.empty_like(z) if save_z else z

    def block(i: int, j: int) -> None:
        if b is not None:
            np.add(z[i:j], b, out=z[i:j])
        if save_z:
            np.copyto(y[i:j], z[i:j])
        if act is not None:
            act(y[i:j].reshape(-1), negative_slope)

    if b is not None or save_z or act is not None:
        for_blocks(block, len(z), len(w), z)
    return y, z if save_z else None


@np.errstate(all="ignore")
def linear_bwd(
    dy: Any,
    x: Any | None,
    w: Any,
    saved: Any | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[Any | None, Any | None, Any | None]:
    """dz = dy * act'; (dx, dw, db) = (dz w, dz^T x, sum of dz's rows), each None where needs says so.

    `x` may be None where dw is not needed.
    """
    need_x, need_w, need_b = needs
    dz = dy if saved is None else activation_bwd(dy, saved, activation, negative_slope)
    dx = dz.dot(w) if need_x else None
    dw = dz.T.dot(x) if need_w and x is not None else None
    return dx, dw, _column_sums(dz) if need_b else None


def _column_sums(a: Any) -> Any:
    """The sum of a's rows, from sums of groups of rows by BLAS, which is several times as fast as add.reduce."""
    if type(a) is not np.ndarray:
        return np.add.reduce(a, axis=0)
    rows, columns = a.shape
    ones = _ones(a.dtype)
    if rows <= _GROUP:
        return ones[:rows].dot(a)
    groups = rows // _GROUP
    whole = groups * _GROUP
    total = _column_sums(np.matmul(ones, a[:whole].reshape(groups, _GROUP, columns)))
    if whole < rows:
        np.add(total, ones[: rows - whole].dot(a[whole:]), out=total)
    return total
