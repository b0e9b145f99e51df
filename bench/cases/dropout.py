"""Dropout. No two libraries draw the same mask: each is held to the law itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from ._base import BACKWARD, FORWARD, Bound, Inputs, Make, NotOffered, Op, Shape, late

__all__ = ["OPS"]

# Of the kept share, in standard deviations: by chance once in ten billion.
SIGMAS = 6.5


def _inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
    # No zeros, so that what was dropped can be told.
    x = make.normal(shape["M"], shape["N"], grad=False)
    x = torch.where(x.abs() < 1e-3, 1, x).to(x.dtype).requires_grad_()
    return {"x": x, "p": options["p"]}


def _upstream(inputs: Inputs, y: torch.Tensor, make: Make) -> torch.Tensor:
    dy = make.normal(*y.shape, grad=False)
    return torch.where(dy.abs() < 1e-3, 1, dy).to(dy.dtype)


def _verify(
    bound: Bound, results: Sequence[torch.Tensor], passes: str, options: Mapping[str, Any]
) -> str | None:
    """The kept share, the scale, and that the gradient is kept where the result is."""
    p = options["p"]
    kept = []
    sources = {"y": bound.inputs["x"], "dx": bound.upstream}
    names = {FORWARD: ["y"], BACKWARD: ["dx"]}.get(passes, ["y", "dx"])
    for name, result in zip(names, results, strict=True):
        source = sources[name]
        if source is None or result.shape != source.shape or result.dtype != source.dtype:
            return f"{name} is {result.dtype} {list(result.shape)}"
        result, source = result.detach(), source.detach()
        mask = result != 0
        share, sigma = float(mask.double().mean()), (p * (1 - p) / mask.numel()) ** 0.5
        if abs(share - (1 - p)) > SIGMAS * sigma:
            return f"{name}: a share of {share:.5f} is kept, expected {1 - p:.5f}"
        error = (result.double() - source.double() * mask / (1 - p)).abs() / source.double().abs()
        if not float(error.max()) <= 4 * torch.finfo(result.dtype).eps / (1 - p):
            return f"{name}: kept elements are not scaled by 1 / (1 - p)"
        kept.append(mask)
    if len(kept) == 2 and not torch.equal(*kept):
        return "the gradient is not kept where the result is"
    return None


_attorch_function = late("attorch.dropout_layer:DropoutAutoGrad.apply")


def _attorch(x: torch.Tensor, p: float) -> torch.Tensor:
    if not x.is_cuda:
        raise NotOffered("offers NVIDIA GPUs only")
    y: torch.Tensor = _attorch_function(x, p, True)
    return y


OPS = [
    Op(
        name="dropout",
        source="kernels/dropout.py",
        equation="y = x k / (1 - p), k = 0 with probability p, else 1",
        shapes={
            "batch": {"M": 4096, "N": 1024},
            "small": {"M": 64, "N": 256},
            "h200-ffn": {"M": 8192, "N": 14336},
        },
        inputs=_inputs,
        functions={
            "dlgpu": lambda x, p: dlgpu.functional.dropout(x, p),
            "eager": lambda x, p: F.dropout(x, p),
            "attorch": _attorch,
        },
        options={"p": (0.5, 0.1)},
        upstream=_upstream,
        verify=_verify,
    )
]
