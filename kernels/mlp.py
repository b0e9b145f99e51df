"""A chain of fused linear + activation layers, forward and backward, on the launchers of kernels/linear.py.

Forward is one launch a layer. Backward multiplies by the derivative of the layer beneath in the epilogue of the product
that makes its gradient: at bf16 it reads what the derivative needs (2 bytes an element) and writes dZ (2), where layers on
their own write dY (2) and read it again (2) besides: 4 of 8 bytes an element are saved. That takes a chain with nothing
between its layers: a hook or a second consumer there would see dZ for dY.

Dropout of the hidden results draws its mask in the same epilogues, forward and backward; no mask is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import configs, linear
from .activations import saved_for_backward

__all__ = ["mlp_bwd", "mlp_fwd", "mlp_tiles"]


def mlp_fwd(
    x: torch.Tensor,  # [M, K_0]
    weights: Sequence[torch.Tensor],  # [K_(i + 1), K_i]
    biases: Sequence[torch.Tensor | None],  # [K_(i + 1)]
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    first: int,
    drops: Sequence[linear.Drop] = (),
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """x_0 = x, z_i = x_i w_i^T + b_i, x_(i + 1) = act_i(z_i): (the last, hidden, zs) for a backward down to layer `first`:
    hidden holds the results of layers first - 1 and up but for the last, zs the z of layers first and up that save it.
    drops: how each hidden result is dropped from; none for no dropout."""
    last = len(weights) - 1
    hidden, zs = [], []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        act = out_activation if i == last else activation
        save_z = i >= first and saved_for_backward(act, negative_slope) == "z"
        x, z = linear.linear_fwd(
            x, w, b, act, negative_slope, save_z, drops[i] if drops and i < last else None
        )
        if z is not None:
            zs.append(z)
        if first - 1 <= i < last:
            hidden.append(x)
    return x, hidden, zs


def mlp_bwd(
    dy: torch.Tensor,  # [M, K_L]
    inputs: Sequence[torch.Tensor | None],  # [M, K_i]
    weights: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor | None],  # [M, K_(i + 1)]: y or z of each layer
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    first: int,
    needs: Sequence[bool],
    drops: Sequence[linear.Drop] = (),
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """(dx, [dw_i], [db_i]), None for what is not needed. needs: of x, of each weight, of each bias.

    inputs[i] may be None where dw_i is not needed; saved[i] is None where act_i is the identity.
    """
    layers = len(weights)
    last = layers - 1
    needs_x, needs_w, needs_b = needs[0], needs[1 : 1 + layers], needs[1 + layers :]
    dws: list[torch.Tensor | None] = [None] * layers
    dbs: list[torch.Tensor | None] = [None] * layers
    needs_dz = needs_x or first < last or needs_w[last]
    dz, dbs[last] = linear.linear_dz(dy, saved[last], out_activation, negative_slope, needs_dz, needs_b[last])
    for i in range(last, first - 1, -1):
        x, w = inputs[i], weights[i]
        if needs_w[i] and x is not None:
            dws[i] = linear.linear_wgrad(dz, x)
        if i > first:
            dz, dbs[i - 1] = linear.linear_dgrad(
                dz,
                w,
                saved[i - 1],
                activation,
                negative_slope,
                needs_b[i - 1],
                drops[i - 1] if drops else None,
            )
    dx = linear.linear_dgrad(dz, weights[0], None, None, 0.0, False)[0] if needs_x else None
    return dx, dws, dbs


def mlp_tiles(
    x: torch.Tensor,  # [M, K_0]
    weights: Sequence[torch.Tensor],
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    dropout: bool = False,
) -> dict[str, configs.MatmulTile | configs.CuBlas]:
    """What would multiply for x_(i + 1), for dw_i, for dz_(i - 1) and for dx, by name, in the order of their launches;
    launches nothing, so meta tensors will do."""
    last = len(weights) - 1
    forward, backward = {}, {}
    inputs = [x]
    for i, w in enumerate(weights):
        act = out_activation if i == last else activation
        save_z = saved_for_backward(act, negative_slope) == "z"
        forward[f"x{i + 1}"] = linear._plan(inputs[i], w.t(), act, save_z, dropout=dropout and i < last).tile
        inputs.append(x.new_empty((len(x), len(w)), device="meta"))
    for i in range(last, -1, -1):
        dz = inputs[i + 1]
        # Of x alone it matters how it lies in memory; what is between layers is contiguous.
        backward[f"dw{i}"] = linear._plan(dz.t(), inputs[i], split=True).tile
        if i == 0:
            backward["dx"] = linear._plan(dz, weights[0]).tile
        else:
            identity = saved_for_backward(activation, negative_slope) is None
            saved = None if identity else inputs[i]
            backward[f"dz{i - 1}"] = linear._plan(
                dz, weights[i], activation, saved=saved, dropout=dropout
            ).tile
    return forward | backward
