"""One step of each optimizer on all of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import dlgpu

from ._base import STEP, Inputs, Kept, Make, Op, Shape
from .mlp import SHAPES as NETWORKS
from .mlp import layer_sizes

__all__ = ["OPS"]

# n parameters in all, in so many tensors.
SHAPES: dict[str, Shape] = {
    "flat": {"n": 4_000_000, "tensors": 1},
    "many": {"n": 10_000_000, "tensors": 1000},
    "digits": {"n": 85002, "tensors": 6},
    "small": {"n": 10_000, "tensors": 10},
    # A billion and its float64 truth are more than the memory of one GPU.
    "h200-300m": {"n": 300_000_000, "tensors": 1},
    "h200-300m-1000": {"n": 300_000_000, "tensors": 1000},
    "h200-1b": {"n": 1_000_000_000, "tensors": 1},
    "h200-1b-1000": {"n": 1_000_000_000, "tensors": 1000},
}


def tensor_shapes(shape: Shape) -> list[tuple[int, ...]]:
    """The digits network's own; else sizes as equal as can be, the rest in the first."""
    if shape == SHAPES["digits"]:
        return [s for o, i in layer_sizes(NETWORKS["digits"]) for s in ((o, i), (o,))]
    each = shape["n"] // shape["tensors"]
    return [(shape["n"] - each * (shape["tensors"] - 1),), *[(each,)] * (shape["tensors"] - 1)]


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    params = [make.normal(*s) for s in tensor_shapes(shape)]
    for param in params:
        param.grad = make.normal(*param.shape, grad=False)
    return {"params": params, "options": dict(options), "state": Kept()}


def _stepper(
    build: Callable[..., torch.optim.Optimizer], wrap: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    def step(params: list[torch.Tensor], options: dict[str, Any], state: Kept) -> Any:
        if not state:
            optimizer = build(params, **options)
            optimizer.step()
            results = [*params]
            for param in params:
                results += [x for x in optimizer.state[param].values() if _is_like(x, param)]
            state.update(step=wrap(optimizer.step) if wrap else optimizer.step, results=results)
        else:
            state["step"]()
        return state["results"]

    return step


def _is_like(x: Any, param: torch.Tensor) -> bool:
    return isinstance(x, torch.Tensor) and x.shape == param.shape and bool(x.dim())


def _compile(**settings: Any) -> Callable[[Any], Any]:
    return lambda step: torch.compile(step, dynamic=False, **settings)


def _op(name: str, class_name: str, equation: str, fused: bool = True, **options: tuple[Any, ...]) -> Op:
    eager = getattr(torch.optim, class_name)
    functions: dict[str, Callable[..., Any]] = {
        "dlgpu": _stepper(getattr(dlgpu.optim, class_name)),
        "eager": _stepper(eager),
        "compile": _stepper(eager, _compile()),
        "compile-max": _stepper(eager, _compile(mode="max-autotune-no-cudagraphs")),
    }
    if fused:
        functions["torch-fused"] = _stepper(lambda params, **options: eager(params, fused=True, **options))
    return Op(
        name=name,
        source="kernels/optimizers.py",
        equation=equation,
        shapes=SHAPES,
        inputs=_inputs,
        functions=functions,
        options=options,
        passes=(STEP,),
        calls=3,
    )


OPS = [
    _op("sgd", "SGD", "b = m b + g;  p = p - lr b", momentum=(0.9, 0.0), weight_decay=(0.0, 0.01)),
    _op("adagrad", "Adagrad", "s = s + g^2;  p = p - lr g / (sqrt(s) + eps)", weight_decay=(0.0, 0.01)),
    _op(
        "rmsprop",
        "RMSprop",
        "v = a v + (1 - a) g^2;  p = p - lr g / (sqrt(v) + eps)",
        fused=False,
        momentum=(0.0, 0.9),
        weight_decay=(0.0, 0.01),
    ),
    _op(
        "adam",
        "Adam",
        "m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p = p - lr m' / (sqrt(v') + eps)",
        amsgrad=(False, True),
        weight_decay=(0.0, 0.01),
    ),
    _op(
        "adamw",
        "AdamW",
        "p = (1 - lr w) p, then as Adam",
        amsgrad=(False, True),
        weight_decay=(0.01, 0.0),
    ),
]
