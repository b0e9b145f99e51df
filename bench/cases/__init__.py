"""What the benchmark knows of each op, one stem a file: equation, named shapes, inputs, and how each library runs it."""

from __future__ import annotations

from . import linear
from ._base import FORWARD, BACKWARD, BOTH, STEP, Inputs, Make, Op, Shape

__all__ = ["BACKWARD", "BOTH", "FORWARD", "OPS", "STEP", "Inputs", "Make", "Op", "Shape"]

# In reading order.
OPS: dict[str, Op] = {op.name: op for stem in (linear,) for op in stem.OPS}
