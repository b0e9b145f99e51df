"""Gated units: SwiGLU, GEGLU, ReGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.kernels.activations import lookup

from ._base import Inputs, Make, NotOffered, Op, Shape, late, only, products

__all__ = ["OPS"]

# What the literature calls them.
UNITS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "glu": "sigmoid"}


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, H, K = shape["M"], shape["H"], shape["K"]
    return {
        "x": make.normal(M, K),
        "weight": make.normal(2 * H, K, scale=K**-0.5),
        "bias": make.normal(2 * H),
        "activation": UNITS[options["unit"]],
    }


def _upstream(inputs: Inputs, h: torch.Tensor, make: Make) -> torch.Tensor:
    dh = make.normal(*h.shape, grad=False)
    if inputs["activation"] == "relu" and make.device != "meta":
        with torch.no_grad():
            # Next to the kink rounding decides which derivative it is, in torch's float32 too.
            g = F.linear(*(inputs[name].float() for name in ("x", "weight", "bias"))).chunk(2, -1)[0]
            dh[g.abs() < 1e-3] = 0
    return dh


def _dlgpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return dlgpu.functional.gated_linear(x, weight, bias, activation=activation)


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return lookup(activation).eager(gate, 0.01) * up


_swiglu = late("liger_kernel.transformers.functional:liger_swiglu")
_geglu = late("liger_kernel.transformers.functional:liger_geglu")


def _liger(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """The unit by Liger, the product by torch: Liger fuses no product."""
    if activation not in ("silu", "gelu_tanh"):
        raise NotOffered("offers unit swiglu, geglu_tanh only")
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    h: torch.Tensor = (_swiglu if activation == "silu" else _geglu)(gate, up)
    return h


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return F.linear(x, weight, bias)


def _flops(shape: Shape, passes: str) -> int:
    return products(passes, (shape["M"], 2 * shape["H"], shape["K"]))


OPS = [
    Op(
        name="gated_linear",
        source="kernels/gated.py",
        equation="h = act(g) u, [g | u] = x W^T + b",
        shapes={
            "mlp": {"M": 256, "H": 512, "K": 784},
            "square": {"M": 1024, "H": 1024, "K": 1024},
            "small": {"M": 64, "H": 64, "K": 64},
            "h200-ffn": {"M": 8192, "H": 14336, "K": 4096},
            "h200-k1024": {"M": 8192, "H": 4096, "K": 1024},
        },
        inputs=_inputs,
        functions={"dlgpu": _dlgpu, "eager": _eager, "liger": _liger, "cublaslt": _product},
        options={"unit": tuple(UNITS)},
        flops=_flops,
        upstream=_upstream,
        refuses={"liger": only("unit", "swiglu", "geglu_tanh")},
    )
]
