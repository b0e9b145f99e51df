"""A multi-layer perceptron: linear + activation, chained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.kernels.activations import ACTIVATIONS, lookup

from ._base import Inputs, Make, Op, Shape, products

__all__ = ["OPS", "SHAPES", "layer_sizes", "weights_and_biases"]

# M rows; I, O: features in and out; H: of each hidden layer; L layers.
SHAPES: dict[str, Shape] = {
    "digits": {"M": 64, "I": 64, "H": 256, "O": 10, "L": 3},
    "mlp": {"M": 256, "I": 784, "H": 512, "O": 10, "L": 3},
    "square": {"M": 1024, "I": 1024, "H": 1024, "O": 1000, "L": 3},
    "h200-mlp": {"M": 16384, "I": 1024, "H": 1024, "O": 1024, "L": 4},
}


def layer_sizes(shape: Shape) -> list[tuple[int, int]]:
    """(out, in) of each layer."""
    sizes = [shape["I"], *[shape["H"]] * (shape["L"] - 1), shape["O"]]
    return [(o, i) for i, o in itertools.pairwise(sizes)]


def weights_and_biases(shape: Shape, make: Make) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer."""
    sizes = layer_sizes(shape)
    weights = [make.normal(o, i, scale=i**-0.5) for o, i in sizes]
    return weights, [make.normal(o, scale=0.1) for o, _ in sizes]


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    weights, biases = weights_and_biases(shape, make)
    x = make.normal(shape["M"], shape["I"])
    return {"x": x, "weights": weights, "biases": biases, "activation": options["activation"]}


def _dlgpu(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], activation: str
) -> torch.Tensor:
    return dlgpu.functional.mlp(x, weights, biases, activation=activation)


def _eager(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], activation: str
) -> torch.Tensor:
    act = lookup(activation).eager
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = act(F.linear(x, weight, bias), 0.01)
    return F.linear(x, weights[-1], biases[-1])


def _products(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], activation: str
) -> torch.Tensor:
    for weight, bias in zip(weights, biases, strict=True):
        x = F.linear(x, weight, bias)
    return x


def _flops(shape: Shape, passes: str) -> int:
    return products(passes, *((shape["M"], o, i) for o, i in layer_sizes(shape)))


OPS = [
    Op(
        name="mlp",
        source="kernels/mlp.py",
        equation="x_(i+1) = act(x_i W_i^T + b_i), the last layer without act",
        shapes=SHAPES,
        inputs=_inputs,
        functions={"dlgpu": _dlgpu, "eager": _eager, "cublaslt": _products},
        options={"activation": ("relu", *(name for name in ACTIVATIONS if name != "relu"))},
        flops=_flops,
        # Of a hidden unit next to the kink rounding decides which derivative it has.
        jumps=True,
    )
]
