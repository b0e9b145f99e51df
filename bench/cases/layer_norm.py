"""Layer normalization and root-mean-square normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

import dlgpu

from ._base import Inputs, Make, Op, Shape, late

__all__ = ["OPS"]

EPS = 1e-5
SHAPES: dict[str, Shape] = {
    "batch": {"M": 4096, "N": 1024},
    "small": {"M": 64, "N": 256},
    "h200-4k": {"M": 8192, "N": 4096},
    "h200-16k": {"M": 4096, "N": 16384},
}


def _layer_inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    return {"x": make.normal(M, N), "weight": make.normal(N), "bias": make.normal(N)}


def _rms_inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    return {"x": make.normal(M, N), "weight": make.normal(N)}


_liger_layer_norm = late("liger_kernel.transformers.functional:liger_layer_norm")
_liger_rms_norm = late("liger_kernel.transformers.functional:liger_rms_norm")
_attorch_layer_norm = late("attorch.layer_norm_layer:LayerNormAutoGrad.apply")
_attorch_rms_norm = late("attorch.rms_norm_layer:RMSNormAutoGrad.apply")
_quack_rms_norm = late("quack:rmsnorm")


OPS = [
    Op(
        name="layer_norm",
        source="kernels/layer_norm.py",
        equation="y = (x - mean) / sqrt(var + eps) w + b, of each row",
        shapes=SHAPES,
        inputs=_layer_inputs,
        functions={
            "dlgpu": lambda x, weight, bias: dlgpu.functional.layer_norm(x, weight.shape, weight, bias, EPS),
            "eager": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS),
            "liger": lambda x, weight, bias: _liger_layer_norm(x, weight, bias, EPS),
            "attorch": lambda x, weight, bias: _attorch_layer_norm(x, weight, bias, EPS, False),
        },
    ),
    Op(
        name="rms_norm",
        source="kernels/layer_norm.py",
        equation="y = x / sqrt(mean x^2 + eps) w, of each row",
        shapes=SHAPES,
        inputs=_rms_inputs,
        functions={
            "dlgpu": lambda x, weight: dlgpu.functional.rms_norm(x, weight.shape, weight, EPS),
            "eager": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            # In place, its backward would overwrite the upstream gradient.
            "liger": lambda x, weight: _liger_rms_norm(x, weight, EPS, in_place=False),
            "quack": lambda x, weight: _quack_rms_norm(x, weight, eps=EPS),
            "attorch": lambda x, weight: _attorch_rms_norm(x, weight, EPS),
        },
    ),
]
