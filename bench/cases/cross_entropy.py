"""Softmax cross-entropy of logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from ._base import Inputs, Make, NotOffered, Op, Shape, late

__all__ = ["OPS"]


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    N, V = shape["N"], shape["V"]
    x = make.normal(N, V, scale=2.0)
    if options["target"] == "classes":
        target = make.classes(N, V)
    else:
        target = make.normal(N, V, grad=False).softmax(1).requires_grad_()
    return {
        "x": x,
        "target": target,
        "label_smoothing": options["label_smoothing"],
        "grad_in_forward": options["grad_in_forward"],
    }


def _dlgpu(
    x: torch.Tensor, target: torch.Tensor, label_smoothing: float, grad_in_forward: bool
) -> torch.Tensor:
    return dlgpu.functional.cross_entropy(
        x, target, label_smoothing=label_smoothing, grad_in_forward=grad_in_forward
    )


def _eager(
    x: torch.Tensor, target: torch.Tensor, label_smoothing: float, grad_in_forward: bool
) -> torch.Tensor:
    return F.cross_entropy(x, target, label_smoothing=label_smoothing)


def _eager_float(
    x: torch.Tensor, target: torch.Tensor, label_smoothing: float, grad_in_forward: bool
) -> torch.Tensor:
    """As language models were written: the logits in float32 first."""
    if target.is_floating_point():
        target = target.float()
    return F.cross_entropy(x.float(), target, label_smoothing=label_smoothing)


_liger_function = late("liger_kernel.transformers.functional:liger_cross_entropy")


def _liger(
    x: torch.Tensor, target: torch.Tensor, label_smoothing: float, grad_in_forward: bool
) -> torch.Tensor:
    """It writes the gradient into the logits: they are other ones at the next call."""
    loss: torch.Tensor = _liger_function(x, target, label_smoothing=label_smoothing)
    return loss


_quack_function = late("quack:cross_entropy")


def _quack(
    x: torch.Tensor, target: torch.Tensor, label_smoothing: float, grad_in_forward: bool
) -> torch.Tensor:
    loss: torch.Tensor = _quack_function(x, target, reduction="mean")
    return loss


_attorch_function = late("attorch.cross_entropy_loss_layer:CrossEntropyLossAutoGrad.apply")


def _attorch(
    x: torch.Tensor, target: torch.Tensor, label_smoothing: float, grad_in_forward: bool
) -> torch.Tensor:
    if not x.is_cuda:
        raise NotOffered("offers NVIDIA GPUs only")
    loss: torch.Tensor = _attorch_function(x, target, None)
    return loss


def _classes(options: Mapping[str, Any], passes: str) -> str | None:
    return None if options["target"] == "classes" else "offers target classes only"


def _plain(options: Mapping[str, Any], passes: str) -> str | None:
    if options["label_smoothing"]:
        return "offers no label smoothing"
    return _classes(options, passes)


OPS = [
    Op(
        name="cross_entropy",
        source="kernels/cross_entropy.py",
        equation="loss = mean_i (log sum_j exp x_ij - x_i,t_i)",
        shapes={
            "imagenet": {"N": 1024, "V": 1000},
            "vocabulary": {"N": 64, "V": 128256},
            "digits": {"N": 64, "V": 10},
            "h200-llama3": {"N": 8192, "V": 128256},
            "h200-llama2": {"N": 8192, "V": 32000},
        },
        inputs=_inputs,
        functions={
            "dlgpu": _dlgpu,
            "eager": _eager,
            "eager-float": _eager_float,
            "liger": _liger,
            "quack": _quack,
            "attorch": _attorch,
        },
        options={
            "target": ("classes", "probabilities"),
            "label_smoothing": (0.0, 0.1),
            "grad_in_forward": (False, True),
        },
        refuses={"liger": _classes, "quack": _plain, "attorch": _plain},
        # With the gradient.
        overwrites={"liger": ("x",)},
    )
]
