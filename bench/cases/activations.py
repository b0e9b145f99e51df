"""Activations by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import dlgpu
from dlgpu.kernels.activations import ACTIVATIONS, lookup

from ._base import Inputs, Make, Op, Shape

__all__ = ["OPS"]


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    return {"x": make.normal(shape["M"], shape["N"], scale=2.0), "activation": options["activation"]}


def _dlgpu(x: torch.Tensor, activation: str) -> torch.Tensor:
    y: torch.Tensor = getattr(dlgpu.functional, activation)(x)
    return y


def _eager(x: torch.Tensor, activation: str) -> torch.Tensor:
    return lookup(activation).eager(x, 0.01)


OPS = [
    Op(
        name="activation",
        source="kernels/activations.py",
        equation="y = act(x)",
        shapes={
            "layer": {"M": 4096, "N": 1024},
            "small": {"M": 64, "N": 256},
            "h200-ffn": {"M": 8192, "N": 14336},
        },
        inputs=_inputs,
        functions={"dlgpu": _dlgpu, "eager": _eager},
        options={"activation": ("gelu", *(name for name in ACTIVATIONS if name != "gelu"))},
    )
]
