"""Stand-alone activations on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlgpu.kernels.activations import lookup

from ._blocks import for_blocks

__all__ = ["activation_bwd", "activation_fwd", "flat"]


def flat(array: Any) -> Any:
    """`array` as one contiguous row: a view where its layout allows, else a copy."""
    return array.reshape(-1) if array.flags.c_contiguous else array.copy(order="C").reshape(-1)


def activation_fwd(x: Any, activation: str | None, negative_slope: float) -> Any:
    """y = act(x)."""
    act = lookup(activation).np_forward
    y = x.copy(order="C")
    flat_y = y.reshape(-1)

    def block(i: int, j: int) -> None:
        act(flat_y[i:j], negative_slope)

    with np.errstate(all="ignore"):
        for_blocks(block, flat_y.size, 1, y)
    return y


def activation_bwd(dy: Any, saved: Any, activation: str | None, negative_slope: float) -> Any:
    """dx = dy * act'(x), from what the activation saves (None for the identity)."""
    if saved is None:
        return dy.copy(order="C")
    gradient = lookup(activation).np_gradient
    dx = np.empty_like(saved, order="C", shape=saved.shape)
    dy_flat, saved_flat, dx_flat = flat(dy), flat(saved), dx.reshape(-1)

    def block(i: int, j: int) -> None:
        gradient(dy_flat[i:j], saved_flat[i:j], negative_slope, dx_flat[i:j])

    with np.errstate(all="ignore"):
        for_blocks(block, dx_flat.size, 1, dx)
    return dx
