"""The softmax family, over the last dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from ._base import Inputs, Make, Op, Shape, late

__all__ = ["OPS"]

SHAPES: dict[str, Shape] = {
    "imagenet": {"N": 1024, "V": 1000},
    "vocabulary": {"N": 64, "V": 128256},
    "h200-llama2": {"N": 8192, "V": 32000},
    "h200-llama3": {"N": 8192, "V": 128256},
}


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    return {"x": make.normal(shape["N"], shape["V"], scale=2.0)}


_attorch_function = late("attorch.softmax_layers:SoftmaxAutoGrad.apply")


def _op(
    name: str, equation: str, eager: Callable[[torch.Tensor], torch.Tensor], **others: Callable[..., Any]
) -> Op:
    function = getattr(dlgpu.functional, name)
    return Op(
        name=name,
        source="kernels/softmax.py",
        equation=equation,
        shapes=SHAPES,
        inputs=_inputs,
        functions={"dlgpu": lambda x: function(x, -1), "eager": eager, **others},
    )


OPS = [
    _op(
        "softmax",
        "y_j = exp(x_j) / sum_k exp(x_k)",
        lambda x: F.softmax(x, -1),
        liger=late("liger_kernel.transformers.functional:liger_softmax"),
        quack=late("quack:softmax"),
        attorch=lambda x: _attorch_function(x, False),
    ),
    _op(
        "log_softmax",
        "y_j = x_j - log sum_k exp(x_k)",
        lambda x: F.log_softmax(x, -1),
        attorch=lambda x: _attorch_function(x, True),
    ),
    _op("logsumexp", "l = log sum_k exp(x_k)", lambda x: torch.logsumexp(x, -1)),
]
