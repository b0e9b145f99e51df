"""A training step of an MLP: forward, loss, backward and Adam; gradients are set to None, as zero_grad does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from ._base import STEP, Inputs, Kept, Make, Op, Shape
from .mlp import OPS as MLP
from .mlp import SHAPES, layer_sizes, weights_and_biases

__all__ = ["LIBRARIES", "OPS", "Library"]

_Tensors = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Library:
    """What a training step takes from one: the logits of a ReLU network, the loss, and the optimizer."""

    logits: Callable[[torch.Tensor, _Tensors, _Tensors], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def _eager_logits(x: torch.Tensor, weights: _Tensors, biases: _Tensors) -> torch.Tensor:
    y: torch.Tensor = MLP[0].functions["eager"](x, weights, biases, "relu")
    return y


LIBRARIES = {
    "dlgpu": Library(
        lambda x, weights, biases: dlgpu.functional.mlp(x, weights, biases, activation="relu"),
        lambda x, target: dlgpu.functional.cross_entropy(x, target),
        lambda params: dlgpu.optim.Adam(params),
    ),
    "eager": Library(_eager_logits, F.cross_entropy, torch.optim.Adam),
    "torch-fused": Library(
        _eager_logits, F.cross_entropy, lambda params: torch.optim.Adam(params, fused=True)
    ),
}


def _compiled(**settings: Any) -> Library:
    """torch.compile of the network with its loss, and torch's fused Adam."""
    return Library(
        torch.compile(_eager_logits, dynamic=False, **settings),
        torch.compile(F.cross_entropy, dynamic=False, **settings),
        lambda params: torch.optim.Adam(params, fused=True),
    )


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    weights, biases = weights_and_biases(shape, make)
    return {
        "x": make.normal(shape["M"], shape["I"], grad=False),
        "target": make.classes(shape["M"], shape["O"]),
        "weights": weights,
        "biases": biases,
        "state": Kept(),
    }


def _step(library: Callable[[], Library]) -> Callable[..., Any]:
    def step(
        x: torch.Tensor, target: torch.Tensor, weights: list[Any], biases: list[Any], state: Kept
    ) -> Any:
        if not state:
            chosen = library()
            params = [p for pair in zip(weights, biases, strict=True) for p in pair]
            state.update(library=chosen, params=params, optimizer=chosen.optimizer(params))
        chosen, optimizer = state["library"], state["optimizer"]
        optimizer.zero_grad(set_to_none=True)
        loss = chosen.loss(chosen.logits(x, weights, biases), target)
        loss.backward()
        optimizer.step()
        # Not the parameters: Adam's first step is lr times the gradient's sign, whatever rounding made that.
        return [loss, *(param.grad for param in state["params"])]

    return step


def _flops(shape: Shape, passes: str) -> int:
    sizes = layer_sizes(shape)
    # The data have no gradient.
    return sum(2 * shape["M"] * o * i * 3 for o, i in sizes) - 2 * shape["M"] * sizes[0][0] * sizes[0][1]


OPS = [
    Op(
        name="training_step",
        source="kernels/mlp.py",
        equation="loss = CE(MLP(x), t); backward; Adam",
        shapes=SHAPES,
        inputs=_inputs,
        functions={
            **{name: _step(lambda library=library: library) for name, library in LIBRARIES.items()},  # type: ignore[misc]
            "compile": _step(_compiled),
            "compile-max": _step(lambda: _compiled(mode="max-autotune-no-cudagraphs")),
        },
        passes=(STEP,),
        flops=_flops,
        jumps=True,
    )
]
