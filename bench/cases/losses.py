"""Elementwise losses and the multi-class hinge loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from ._base import Inputs, Make, NotOffered, Op, Shape, late

__all__ = ["OPS"]

SHAPES: dict[str, Shape] = {
    "batch": {"M": 4096, "N": 1024},
    "small": {"M": 64, "N": 10},
    "h200-large": {"M": 16384, "N": 8192},
}


def _regression(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    return {"x": make.normal(M, N), "target": make.normal(M, N, grad=False), **options}


def _probabilities(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    return {"x": make.normal(M, N), "target": make.uniform(M, N), **options}


def _signs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    return {"x": make.normal(M, N), "target": make.uniform(M, N).sub(0.5).sign(), **options}


def _classes(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    # Margins in steps that every dtype represents: next to the kink rounding would decide which derivative it is.
    x = make.normal(M, N, grad=False).mul_(32).round_().div_(32).requires_grad_()
    return {"x": x, "target": make.classes(M, N), **options}


def _distributions(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    M, N = shape["M"], shape["N"]
    x = make.normal(M, N, grad=False).log_softmax(1).requires_grad_()
    return {"x": x, "target": make.normal(M, N, grad=False).softmax(1), **options}


def _hinge(x: torch.Tensor, target: torch.Tensor, reduction: str, squared: bool) -> torch.Tensor:
    """Its formula: torch has no such function. Of relu the derivative at the kink is 0."""
    loss = F.relu(1 - target * x)
    if squared:
        loss = loss.square()
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _multi_margin(x: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        raise NotOffered("eager offers no multi_margin_loss in 16 bits on a CPU")
    return F.multi_margin_loss(x, target, **options)


_attorch_function = late("attorch.p_loss_layers:PLossAutoGrad.apply")
_liger_kl_div = late("liger_kernel.transformers.functional:liger_kl_div")


def _liger_kl(x: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
    loss: torch.Tensor = _liger_kl_div(x, target, reduction=reduction)
    return loss


def _attorch(kind: int) -> Callable[..., torch.Tensor]:
    def loss(x: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        result: torch.Tensor = _attorch_function(x, target, kind, reduction, 1.0)
        return result

    return loss


def _op(
    name: str,
    equation: str,
    inputs: Callable[[Shape, Make, Mapping[str, Any]], Inputs] = _regression,
    eager: Callable[..., torch.Tensor] | None = None,
    reductions: tuple[str, ...] = ("mean", "sum", "none"),
    options: Mapping[str, tuple[Any, ...]] | None = None,
    attorch: int | None = None,
    liger: Callable[..., torch.Tensor] | None = None,
) -> Op:
    def call(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        # torch and dlgpu call the first argument `input`.
        return lambda x, target, **rest: function(x, target, **rest)

    functions = {
        "dlgpu": call(getattr(dlgpu.functional, name)),
        "eager": call(eager or getattr(F, name)),
    }
    if attorch is not None:
        functions["attorch"] = _attorch(attorch)
    if liger is not None:
        functions["liger"] = liger
    return Op(
        name=name,
        source="kernels/losses.py",
        equation=equation,
        shapes=SHAPES,
        inputs=inputs,
        functions=functions,
        options={"reduction": reductions, **(options or {})},
    )


OPS = [
    _op("mse_loss", "l = (x - t)^2, reduced", attorch=2),
    _op("l1_loss", "l = |x - t|, reduced", attorch=1),
    _op("smooth_l1_loss", "l = d^2 / 2 where |d| < 1, else |d| - 1/2, d = x - t, reduced", attorch=0),
    _op("huber_loss", "l = d^2 / 2 where |d| <= 1, else |d| - 1/2, d = x - t, reduced", attorch=3),
    _op("binary_cross_entropy_with_logits", "l = log(1 + exp x) - t x, reduced", _probabilities),
    _op("hinge_loss", "l = max(0, 1 - t x), reduced", _signs, _hinge, options={"squared": (False, True)}),
    _op(
        "multi_margin_loss",
        "l_i = sum_{j != t_i} max(0, 1 - x_i,t_i + x_ij) / N, reduced",
        _classes,
        _multi_margin,
        options={"p": (1, 2)},
    ),
    _op(
        "kl_div",
        "l = t (log t - x), reduced",
        _distributions,
        reductions=("batchmean", "sum", "none"),
        liger=_liger_kl,
    ),
]
