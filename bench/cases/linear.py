"""Linear + bias + activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.kernels.activations import ACTIVATIONS, lookup

from ._base import FORWARD, Inputs, Make, NotOffered, Op, Shape, late, only, products

__all__ = ["OPS"]

_KINKED = ("relu", "leaky_relu")


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N, K = shape["M"], shape["N"], shape["K"]
    return {
        "x": make.normal(M, K),
        "weight": make.normal(N, K, scale=K**-0.5),
        "bias": make.normal(N),
        # None for no activation, as in dlgpu.functional.linear.
        "activation": None if options["activation"] == "none" else options["activation"],
    }


def _upstream(inputs: Inputs, y: torch.Tensor, make: Make) -> torch.Tensor:
    dy = make.normal(*y.shape, grad=False)
    if inputs["activation"] in _KINKED and make.device != "meta":
        with torch.no_grad():
            # Next to the kink rounding decides which derivative it is, in torch's float32 too.
            z = F.linear(*(inputs[name].float() for name in ("x", "weight", "bias")))
            dy[z.abs() < 1e-3] = 0
    return dy


def _dlgpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None) -> torch.Tensor:
    return dlgpu.functional.linear(x, weight, bias, activation=activation)


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None) -> torch.Tensor:
    return lookup(activation).eager(F.linear(x, weight, bias), 0.01)


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    # cuBLASLt's epilogue takes tanh, the CPU's erf.
    gelu = "gelu_tanh" if x.is_cuda else "gelu"
    if activation not in ("relu", gelu):
        raise NotOffered(f"offers activation relu, {gelu} only on this device")
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == gelu)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None
) -> torch.Tensor:
    return F.linear(x, weight, bias)


_attorch_linear = late("attorch.linear_layer:LinearAutoGrad.apply")


def _attorch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None
) -> torch.Tensor:
    y: torch.Tensor = _attorch_linear(x, weight.t(), bias, activation)
    return y


def _flops(shape: Shape, passes: str) -> int:
    return products(passes, (shape["M"], shape["N"], shape["K"]))


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
        functions={
            "dlgpu": _dlgpu,
            "eager": _eager,
            "torch-fused": _fused,
            "cublaslt": _product,
            "attorch": _attorch,
        },
        options={"activation": ("gelu", *(name for name in ACTIVATIONS if name != "gelu"), "none")},
        flops=_flops,
        upstream=_upstream,
        refuses={
            "torch-fused": only("activation", "relu", "gelu", "gelu_tanh", passes=(FORWARD,)),
            "attorch": only("activation", "sigmoid", "tanh", "relu", "gelu", "silu", "none"),
        },
    )
]
