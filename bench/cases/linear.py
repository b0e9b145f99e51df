"""Linear + bias + activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.kernels.activations import ACTIVATIONS, lookup

from ._base import FORWARD, Inputs, Make, Op, Shape

__all__ = ["OPS"]

_KINKED = ("relu", "leaky_relu")


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N, K = shape["M"], shape["N"], shape["K"]
    return {
        "x": make.normal(M, K),
        "weight": make.normal(N, K, scale=K**-0.5),
        "bias": make.normal(N),
        "activation": options["activation"],
    }


def _upstream(inputs: Inputs, y: torch.Tensor, make: Make) -> torch.Tensor:
    dy = make.normal(*y.shape, grad=False)
    if inputs["activation"] in _KINKED and make.device != "meta":
        with torch.no_grad():
            # Next to the kink rounding decides which derivative it is, in torch's float32 too.
            z = F.linear(*(inputs[name].float() for name in ("x", "weight", "bias")))
            dy[z.abs() < 1e-3] = 0
    return dy


def _dlgpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return dlgpu.functional.linear(x, weight, bias, activation=activation)


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return lookup(activation).eager(F.linear(x, weight, bias), 0.01)


def _flops(shape: Shape, passes: str) -> int:
    # Two products backward.
    return 2 * shape["M"] * shape["N"] * shape["K"] * {FORWARD: 1, "bwd": 2}.get(passes, 3)


OPS = [
    Op(
        name="linear",
        source="kernels/linear.py",
        equation="y = act(x W^T + b)",
        shapes={
            "mlp": {"M": 256, "N": 512, "K": 784},
            "square": {"M": 1024, "N": 1024, "K": 1024},
            "small": {"M": 64, "N": 64, "K": 64},
            "h200-8k": {"M": 8192, "N": 8192, "K": 8192},
            "h200-ffn": {"M": 8192, "N": 14336, "K": 4096},
            "h200-k1024": {"M": 8192, "N": 8192, "K": 1024},
            "h200-k512": {"M": 16384, "N": 4096, "K": 512},
            "h200-k256": {"M": 65536, "N": 1024, "K": 256},
        },
        inputs=_inputs,
        functions={"dlgpu": _dlgpu, "eager": _eager},
        options={"activation": ("gelu", *(name for name in ACTIVATIONS if name != "gelu"))},
        flops=_flops,
        upstream=_upstream,
    )
]
