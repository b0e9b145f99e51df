"""Gated units on arrays: h = act(g) u, [g | u] = x w^T + b."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlgpu.kernels.activations import lookup, saved_for_backward

from ._blocks import for_blocks

__all__ = ["gated_bwd", "gated_fwd"]


@np.errstate(all="ignore")
def gated_fwd(
    x: Any, w: Any, b: Any | None, activation: str | None, negative_slope: float, save: bool
) -> tuple[Any, Any | None]:
    """(h [M, H], [g | u] [M, 2 H] if save else None). x [M, K], w [2 H, K], b [2 H]."""
    act = lookup(activation).np_forward
    gu = x.dot(w.T)
    width = len(w) // 2
    h = np.empty_like(gu, shape=(len(gu), width))

    def block(i: int, j: int) -> None:
        rows, out = gu[i:j], h[i:j]
        if b is not None:
            np.add(rows, b, out=rows)
        np.copyto(out, rows[:, :width])
        act(out.reshape(-1), negative_slope)
        np.multiply(out, rows[:, width:], out=out)

    for_blocks(block, len(gu), 2 * width, gu)
    return h, gu if save else None


@np.errstate(all="ignore")
def gated_bwd(
    dh: Any | None,
    gu: Any,
    activation: str | None,
    negative_slope: float,
    needs_dgu: bool,
    needs_h: bool,
) -> tuple[Any | None, Any | None]:
    """([dg | du] = dh * [u act'(g) | act(g)], h = act(g) u), None for what is not needed; dh is for the former alone."""
    row = lookup(activation)
    saves_y = saved_for_backward(activation, negative_slope) == "y"
    width = gu.shape[1] // 2
    dgu = np.empty_like(gu) if needs_dgu else None
    h = np.empty_like(gu, shape=(len(gu), width)) if needs_h else None

    def block(i: int, j: int) -> None:
        u = gu[i:j, width:]
        # The table's functions take contiguous arrays.
        g = gu[i:j, :width].copy()
        a = g.copy()
        row.np_forward(a.reshape(-1), negative_slope)
        if dgu is not None and dh is not None:
            np.multiply(dh[i:j], a, out=dgu[i:j, width:])
            scaled = dh[i:j] * u
            dg = np.empty_like(g)
            kept = a if saves_y else g
            row.np_gradient(scaled.reshape(-1), kept.reshape(-1), negative_slope, dg.reshape(-1))
            np.copyto(dgu[i:j, :width], dg)
        if h is not None:
            np.multiply(a, u, out=h[i:j])

    for_blocks(block, len(gu), 2 * width, gu)
    return dgu, h
