"""Stand-alone activations on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlgpu.kernels.activations import lookup

from ._blocks import BLOCK, for_blocks

__all__ = ["activation_bwd", "activation_fwd"]


@np.errstate(all="ignore")
def activation_fwd(x: Any, activation: str | None, negative_slope: float) -> Any:
    """y = act(x)."""
    act = lookup(activation).np_forward
    y = x.copy(order="C")
    flat = y.reshape(-1)

    def block(i: int, j: int) -> None:
        act(flat[i:j], negative_slope)

    for_blocks(block, flat.size, 1, y)
    return y


@np.errstate(all="ignore")
def activation_bwd(dy: Any, saved: Any, activation: str | None, negative_slope: float) -> Any:
    """dx = dy * act'(x), from what the activation saves (None for the identity)."""
    if saved is None:
        return dy.copy(order="C")
    gradient = lookup(activation).np_gradient
    dx = np.empty_like(saved, order="C")
    # Views where the layout allows, else contiguous copies.
    dy_flat, saved_flat, dx_flat = dy.reshape(-1), saved.reshape(-1), dx.reshape(-1)
    if dx.size <= BLOCK:
        gradient(dy_flat, saved_flat, negative_slope, dx_flat)
        return dx

    def block(i: int, j: int) -> None:
        gradient(dy_flat[i:j], saved_flat[i:j], negative_slope, dx_flat[i:j])

    for_blocks(block, dx.size, 1, dx)
    return dx
