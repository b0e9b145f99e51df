"""Ops in forms that training uses and that are no options of theirs: steps that are clipped, with masters, in a graph; the
gated unit with the layer after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu

from .cases import OPS, Inputs, Make, Op, Shape
from .cases._base import Kept

__all__ = ["clipped", "gated_network", "in_a_graph", "with_masters"]

# So large that nothing is clipped: torch's clipping writes into the gradients, and each call would start from other ones.
# The work is the same.
MAX_NORM = 1e9

Step = Callable[[], object]
# Of parameters and the op's options: (the step, what it changes).
Build = Callable[[list[torch.Tensor], dict[str, Any]], tuple[Step, list[torch.Tensor]]]


def _stepper(build: Build) -> Callable[..., list[torch.Tensor]]:
    def step(params: list[torch.Tensor], options: dict[str, Any], state: Kept) -> list[torch.Tensor]:
        if not state:
            state["step"], state["moments"] = build(params, options)
        state["step"]()
        return [*params, *(moment for of in state["moments"] for moment in of())]

    return step


def _moments(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> Any:
    # They are there after the first step.
    return [lambda p=p: [optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]] for p in params]


def _ours(**extras: Any) -> Build:
    def build(params: list[torch.Tensor], options: dict[str, Any]) -> Any:
        optimizer = dlgpu.optim.Adam(params, **options, **extras)
        return optimizer.step, _moments(optimizer, params)

    return build


def _torch(**extras: Any) -> Build:
    def build(params: list[torch.Tensor], options: dict[str, Any]) -> Any:
        optimizer = torch.optim.Adam(params, **options, **extras)
        return optimizer.step, _moments(optimizer, params)

    return build


def _clipping(**extras: Any) -> Build:
    def build(params: list[torch.Tensor], options: dict[str, Any]) -> Any:
        step, moments = _torch(**extras)(params, options)

        def both() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            step()

        return both, moments

    return build


def _copying(**extras: Any) -> Build:
    """Masters by hand: gradients and parameters are copied to and fro."""

    def build(params: list[torch.Tensor], options: dict[str, Any]) -> Any:
        wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        masters = [p.detach().to(wide, copy=True).requires_grad_() for p in params]
        for master in masters:
            master.grad = torch.empty_like(master)
        step, moments = _torch(**extras)(masters, options)

        @torch.no_grad()
        def both() -> None:
            torch._foreach_copy_(
                [m.grad for m in masters if m.grad is not None],
                [p.grad for p in params if p.grad is not None],
            )
            step()
            torch._foreach_copy_(params, masters)

        return both, moments

    return build


def _variant(ours: Build, eager: Build, fused: Build) -> Op:
    functions = {"dlgpu": ours, "eager": eager, "torch-fused": fused}
    return dataclasses.replace(
        OPS["adam"], functions={name: _stepper(build) for name, build in functions.items()}
    )


def clipped() -> Op:
    """Adam with the gradients' norm limited first."""
    return _variant(_ours(max_grad_norm=MAX_NORM), _clipping(), _clipping(fused=True))


def with_masters() -> Op:
    """Adam on parameters of 16 bits with float32 masters."""
    return _variant(_ours(master_weights=True), _copying(), _copying(fused=True))


def in_a_graph() -> Op:
    """Adam as a CUDA graph can hold it; on a CPU, which has none, as it is."""
    capturable = torch.cuda.is_available()
    return _variant(_ours(), _torch(capturable=capturable), _torch(fused=True, capturable=capturable))


def gated_network() -> Op:
    """The gated unit and the layer back to the input's width, whose backward has kernels of its own."""
    op = OPS["gated_linear"]

    def inputs(shape: Shape, make: Make, options: Mapping[str, Any]) -> Inputs:
        found = op.inputs(shape, make, options)
        H, K = shape["H"], shape["K"]
        return {**found, "out_weight": make.normal(K, H, scale=H**-0.5), "out_bias": make.normal(K)}

    def ours(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, **out: Any
    ) -> torch.Tensor:
        return dlgpu.functional.gated_linear(x, weight, bias, activation=activation, **out)

    def eager(out_weight: torch.Tensor, out_bias: torch.Tensor, **unit: Any) -> torch.Tensor:
        return F.linear(op.functions["eager"](**unit), out_weight, out_bias)

    # An upstream gradient has the result's shape, no longer the unit's.
    return dataclasses.replace(
        op, inputs=inputs, functions={"dlgpu": ours, "eager": eager}, upstream=None, refuses={}
    )
