"""A chain of fused linear + activation layers on arrays: the layers' own functions in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlgpu.kernels.activations import saved_for_backward

from .activations import activation_bwd
from .dropout import dropout_fwd
from .linear import linear_bwd, linear_fwd

__all__ = ["mlp_bwd", "mlp_fwd"]


def mlp_fwd(
    x: Any,
    weights: Sequence[Any],
    biases: Sequence[Any | None],
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    first: int,
    drops: Sequence[tuple[Any, float, float]] = (),
) -> tuple[Any, list[Any], list[Any]]:
    """x_0 = x, z_i = x_i w_i^T + b_i, x_(i + 1) = act_i(z_i): (the last, hidden, zs) for a backward down to layer `first`:
    hidden holds the results of layers first - 1 and up but for the last, zs the z of layers first and up that save it.
    drops: (seed, p, scale) of each hidden result's dropout; none for no dropout."""
    last = len(weights) - 1
    hidden, zs = [], []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        act = out_activation if i == last else activation
        save_z = i >= first and saved_for_backward(act, negative_slope) == "z"
        x, z = linear_fwd(x, w, b, act, negative_slope, save_z)
        if drops and i < last:
            x = dropout_fwd(x, *drops[i])
        if z is not None:
            zs.append(z)
        if first - 1 <= i < last:
            hidden.append(x)
    return x, hidden, zs


@np.errstate(all="ignore")
def mlp_bwd(
    dy: Any,
    inputs: Sequence[Any | None],
    weights: Sequence[Any],
    saved: Sequence[Any | None],
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    first: int,
    needs: Sequence[bool],
    drops: Sequence[tuple[Any, float, float]] = (),
) -> tuple[Any | None, list[Any | None], list[Any | None]]:
    """(dx, [dw_i], [db_i]), None for what is not needed. needs: of x, of each weight, of each bias.

    inputs[i] may be None where dw_i is not needed; saved[i] is None where act_i is the identity.
    """
    layers = len(weights)
    dws: list[Any | None] = [None] * layers
    dbs: list[Any | None] = [None] * layers
    dz = dy
    for i in reversed(range(first, layers)):
        kept, act = saved[i], out_activation if i == layers - 1 else activation
        if drops and i < layers - 1:
            dz = dropout_fwd(dz, *drops[i])
            if saved_for_backward(act, negative_slope) == "y" and kept is not None:
                # What is saved is y after dropout.
                kept = kept * kept.dtype.type(1 / drops[i][2])
        if kept is not None:
            dz = activation_bwd(dz, kept, act, negative_slope)
        wanted = i > first or needs[0], needs[1 + i], needs[1 + layers + i]
        dz, dws[i], dbs[i] = linear_bwd(dz, inputs[i], weights[i], None, None, 0.0, wanted)
    return dz if needs[0] else None, dws, dbs
