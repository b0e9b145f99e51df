"""Batch normalization, in training, with an activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.kernels.activations import ACTIVATIONS, lookup

from ._base import Inputs, Make, NotOffered, Op, Shape, late, only

__all__ = ["OPS"]


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    N, C = shape["N"], shape["C"]
    return {
        "x": make.normal(N, C),
        "weight": make.normal(C),
        "bias": make.normal(C),
        "running_mean": make.normal(C, grad=False).zero_(),
        "running_var": make.normal(C, grad=False).fill_(1),
        "activation": None if options["activation"] == "none" else options["activation"],
    }


def _upstream(inputs: Inputs, y: torch.Tensor, make: Make) -> torch.Tensor:
    dy = make.normal(*y.shape, grad=False)
    if inputs["activation"] in ("relu", "leaky_relu") and make.device != "meta":
        with torch.no_grad():
            # Next to the kink rounding decides which derivative it is, in torch's float32 too.
            x, weight, bias = (inputs[name].float() for name in ("x", "weight", "bias"))
            dy[F.batch_norm(x, None, None, weight, bias, True).abs() < 1e-3] = 0
    return dy


def _dlgpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    return dlgpu.functional.batch_norm(
        x, running_mean, running_var, weight, bias, True, activation=activation
    )


def _eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    return lookup(activation).eager(F.batch_norm(x, running_mean, running_var, weight, bias, True), 0.01)


_attorch_function = late("attorch.batch_norm_layer:BatchNormAutoGrad.apply")


def _attorch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise NotOffered("offers float32 only")
    y: torch.Tensor = _attorch_function(x, True, weight, bias, running_mean, running_var)
    return y


OPS = [
    Op(
        name="batch_norm",
        source="kernels/batch_norm.py",
        equation="y = act((x - mean) / sqrt(var + eps) w + b), of each channel of the batch",
        shapes={
            "batch": {"N": 4096, "C": 1024},
            "small": {"N": 64, "C": 256},
            "h200-large": {"N": 16384, "C": 4096},
        },
        inputs=_inputs,
        functions={"dlgpu": _dlgpu, "eager": _eager, "attorch": _attorch},
        options={"activation": ("relu", *(name for name in ACTIVATIONS if name != "relu"), "none")},
        upstream=_upstream,
        refuses={"attorch": only("activation", "none")},
    )
]
