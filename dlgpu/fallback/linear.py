"""Fused linear + bias + activation on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlgpu.kernels.activations import lookup

from ._blocks import for_blocks
from .activations import activation_bwd

__all__ = ["linear_bwd", "linear_fwd"]


def _blas_ready(a: Any) -> Any:
    """The matrix `a`, copied where neither its rows nor its columns are contiguous: BLAS reads no other layout."""
    return a if a.itemsize in a.strides and 0 not in a.strides else a.copy(order="C")


def linear_fwd(
    x: Any, w: Any, b: Any | None, activation: str | None, negative_slope: float, save_z: bool
) -> tuple[Any, Any | None]:
    """y = act(z), z = x w^T + b: (y, z if save_z else None). x [M, K], w [N, K], b [N]."""
    act = lookup(activation).np_forward
    with np.errstate(all="ignore"):
        z = np.matmul(_blas_ready(x), _blas_ready(w).T)
        y = np.empty_like(z) if save_z else z

        def block(i: int, j: int) -> None:
            if b is not None:
                np.add(z[i:j], b, out=z[i:j])
            if save_z:
                np.copyto(y[i:j], z[i:j])
            act(y[i:j].reshape(-1), negative_slope)

        for_blocks(block, *z.shape, z)
    return y, z if save_z else None


def linear_bwd(
    dy: Any,
    x: Any,
    w: Any,
    saved: Any | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[Any | None, Any | None, Any | None]:
    """dz = dy * act'; (dx, dw, db) = (dz w, dz^T x, sum of dz's rows), each None where needs says so."""
    need_x, need_w, need_b = needs
    with np.errstate(all="ignore"):
        dz = _blas_ready(dy) if saved is None else activation_bwd(dy, saved, activation, negative_slope)
        dx = np.matmul(dz, _blas_ready(w)) if need_x else None
        dw = np.matmul(dz.T, _blas_ready(x)) if need_w else None
        db = np.add.reduce(dz, axis=0) if need_b else None
    return dx, dw, db
