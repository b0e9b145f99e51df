"""The activations on their own: y = act(x). The kernels and the table are in kernels/activations.py."""

from __future__ import annotations

from typing import Any

import torch

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import activations as arrays
from dlgpu.kernels import activations as kernels
from dlgpu.kernels import configs, tuning
from dlgpu.kernels.activations import lookup, saved_for_backward

__all__ = ["activation"]


def activation(input: torch.Tensor, name: str, negative_slope: float = 0.01) -> torch.Tensor:
    """y = act(x), elementwise, in one kernel; gradient dy * act'(x) in another.

    Args:
        input: x, any shape, float32, bfloat16, float16 or float64.
        name: "relu", "leaky_relu", "sigmoid", "tanh", "gelu" (through erf), "gelu_tanh" or "silu".
        negative_slope: leaky ReLU's slope for negative x.

    Returns:
        y, like x.

    Raises:
        TypeError: an argument's type does not fit, or the dtype is not floating point.
        ValueError: no such activation; the message lists them.

    Saved for backward: y for relu, leaky_relu, sigmoid and tanh, x by reference for the others.
    """
    _checks.require_tensor(name, "input", input)
    _checks.require_number(name, "negative_slope", negative_slope)
    return _activation(input, name, negative_slope, _dispatch.choose_backend(input, name))


def _check(x: torch.Tensor, name: str) -> None:
    if name is None:
        raise ValueError("activation: got None, expected a name")
    lookup(name)
    _checks.require_floating(name, "input", x)


def _fwd_triton(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    _check(x, name)
    return kernels.activation_fwd(x, name, negative_slope)


def _fwd_fallback(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    _check(x, name)
    return to_tensor(arrays.activation_fwd(to_array(x), name, negative_slope), x.dtype)


def _fwd_eager(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    _check(x, name)
    return lookup(name).eager(x, negative_slope)


def _fwd_fake(x: torch.Tensor, name: str, negative_slope: float, backend: str) -> torch.Tensor:
    _check(x, name)
    return x.new_empty(x.shape)


def _bwd_fallback(dy: torch.Tensor, saved: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return to_tensor(arrays.activation_bwd(to_array(dy), to_array(saved), name, negative_slope), dy.dtype)


class ActivationFunction(torch.autograd.Function):
    """Autograd of `activation`, at the op's Autograd key."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, negative_slope: float, backend: str) -> torch.Tensor:
        y = _activation.below(x, name, negative_slope, backend)
        # x too, by reference: double backward is built from it.
        ctx.save_for_backward(x, y if saved_for_backward(name, negative_slope) == "y" else None)
        ctx.name, ctx.negative_slope, ctx.backend = name, negative_slope, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y = ctx.saved_tensors
        if _dispatch.differentiates():
            eager = lookup(ctx.name).eager
            (dx,) = _dispatch.differentiable_vjp(lambda x: eager(x, ctx.negative_slope), (x,), (True,), dy)
        else:
            dx = _activation_backward.below(
                dy, x if y is None else y, ctx.name, ctx.negative_slope, ctx.backend
            )
        return dx, None, None, None


def _activation_autograd(x: torch.Tensor, name: str, negative_slope: float, backend: str) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return ActivationFunction.apply(x, name, negative_slope, backend)
    return _activation.below(x, name, negative_slope, backend)


_activation = _dispatch.define(
    "activation(Tensor input, str name, float negative_slope, str backend) -> Tensor",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    eager=_fwd_eager,
    fake=_fwd_fake,
    autograd=_activation_autograd,
)
_activation_backward = _dispatch.define(
    "activation_backward(Tensor dy, Tensor saved, str name, float negative_slope, str backend) -> Tensor",
    triton=kernels.activation_bwd,
    fallback=_bwd_fallback,
    fake=lambda dy, saved, name, negative_slope, backend: dy.new_empty(dy.shape),
)


def _explain(name: str, input: torch.Tensor, negative_slope: float) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor(name, "input", input)
    _check(input, name)

    def steps(backend: str) -> list[tuple[str, str]]:
        saves = "y" if saved_for_backward(name, negative_slope) == "y" else "x"
        if backend == "triton":
            config = str(tuning.tile(input.device, configs.activation_tile, input.dtype))
            return [
                ("_activation_fwd_kernel", config),
                ("_activation_bwd_kernel", f"{config}; saved: {saves}"),
            ]
        return [("forward", "torch's own" if backend == "torch" else "NumPy or CuPy, blocked")]

    return input, steps


for _name in kernels.ACTIVATIONS:
    _dispatch.explains(_name)(
        lambda input, negative_slope=0.01, _name=_name: _explain(_name, input, negative_slope)
    )
