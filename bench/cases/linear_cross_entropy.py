"""The loss head: a linear layer and the cross-entropy of its results, which are never stored whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from ._base import Inputs, Make, NotOffered, Op, Shape, late, products

__all__ = ["OPS"]

# Bytes that `memory` gives to dlgpu.functional.linear_cross_entropy's memory_budget; None is its default.
MEMORY = {"default": None, "lean": 0}


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    N, V, H = shape["N"], shape["V"], shape["H"]
    return {
        "x": make.normal(N, H),
        "weight": make.normal(V, H, scale=H**-0.5),
        "target": make.classes(N, V),
        "memory": options["memory"],
    }


def _dlgpu(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    return dlgpu.functional.linear_cross_entropy(x, weight, target, memory_budget=MEMORY[memory])


def _eager(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _chunked(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    """torch's own, which takes the batch in chunks."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotOffered(f"torch {torch.__version__} has no linear_cross_entropy in chunks")
    # Backward is timed by itself on a graph that is kept.
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    loss: torch.Tensor = F.linear_cross_entropy(x, weight, target, options=options)
    return loss


_liger_function = late("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy")


def _liger(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    loss: torch.Tensor = _liger_function(x, weight, target)
    return loss


_cce_function = late("cut_cross_entropy:linear_cross_entropy")


def _cce(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    """Its default form, which leaves out small gradients, and so may be told from the truth."""
    loss: torch.Tensor = _cce_function(x, weight, target)
    return loss


def _cce_exact(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    loss: torch.Tensor = _cce_function(x, weight, target, impl="cce_exact")
    return loss


def _product(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, memory: str) -> torch.Tensor:
    return F.linear(x, weight)


def _flops(shape: Shape, passes: str) -> int:
    return products(passes, (shape["N"], shape["V"], shape["H"]))


OPS = [
    Op(
        name="linear_cross_entropy",
        source="kernels/linear_cross_entropy.py",
        equation="loss = mean_i (log sum_j exp z_ij - z_i,t_i), z = x W^T",
        shapes={
            "small": {"N": 256, "V": 4096, "H": 256},
            "digits": {"N": 64, "V": 10, "H": 256},
            "h200-8k": {"N": 8192, "V": 128256, "H": 4096},
            "h200-1k": {"N": 1024, "V": 128256, "H": 4096},
        },
        inputs=_inputs,
        functions={
            "dlgpu": _dlgpu,
            "eager": _eager,
            "torch-fused": _chunked,
            "liger": _liger,
            "cce": _cce,
            "cce-exact": _cce_exact,
            "cublaslt": _product,
        },
        options={"memory": tuple(MEMORY)},
        flops=_flops,
    )
]
