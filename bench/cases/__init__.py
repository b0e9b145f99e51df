"""What the benchmark knows of each op, one stem a file: equation, named shapes, inputs, and how each library runs it."""

from __future__ import annotations

from . import (
    activations,
    batch_norm,
    cross_entropy,
    dropout,
    gated,
    layer_norm,
    linear,
    linear_cross_entropy,
    losses,
    mlp,
    optimizers,
    softmax,
    training_step,
)
from ._base import BACKWARD, BOTH, FORWARD, STEP, Inputs, Make, Op, Shape

__all__ = ["BACKWARD", "BOTH", "FORWARD", "OPS", "STEP", "Inputs", "Make", "Op", "Shape"]

# In reading order.
OPS: dict[str, Op] = {
    op.name: op
    for stem in (
        linear,
        mlp,
        gated,
        activations,
        cross_entropy,
        linear_cross_entropy,
        softmax,
        losses,
        batch_norm,
        layer_norm,
        dropout,
        optimizers,
        training_step,
    )
    for op in stem.OPS
}
