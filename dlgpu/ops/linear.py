"""y = act(x w^T + b): checks, the dispatcher's ops and autograd. The kernels are in kernels/linear.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import linear as arrays
from dlgpu.kernels import configs
from dlgpu.kernels import linear as kernels
from dlgpu.kernels.activations import lookup, saved_for_backward

__all__ = ["linear"]


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    """y = act(x w^T + b), in one kernel.

    Args:
        input: x, [..., in_features], float32, bfloat16, float16 or float64; any strides.
        weight: w, [out_features, in_features], of the same dtype.
        bias: b, [out_features], of the same dtype, or None.
        activation: None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu" (through erf), "gelu_tanh" or "silu".
        negative_slope: leaky ReLU's slope for negative z.

    Returns:
        y, [..., out_features], of the same dtype, in autocast of the autocast dtype, as torch.nn.functional.linear.

    Raises:
        RuntimeError: a shape or device does not fit.
        TypeError: an argument's type or dtype does not fit.
        ValueError: no such activation; the message lists them.

    Saved for backward: x and w by reference, and y for relu, leaky_relu, sigmoid and tanh, z = x w^T + b for gelu,
    gelu_tanh and silu, nothing more without an activation. Sums are float32 (float64 for float64).

    Sources: GELU, Hendrycks and Gimpel, arXiv:1606.08415; SiLU, Elfwing et al., arXiv:1702.03118.

    >>> x, w = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    >>> linear(x, w, activation="relu")
    tensor([[0., 1.]])
    """
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, torch.Tensor) and (value is not None or name != "bias"):
            _checks.require_tensor("linear", name, value)
    if type(negative_slope) is not float:
        _checks.require_number("linear", "negative_slope", negative_slope)
    return _linear(input, weight, bias, activation, negative_slope, _dispatch.choose_backend(input, "linear"))


def _check(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> None:
    lookup(activation)
    # The usual case, at once: on the CPU the messages' checks would cost as much as a small product.
    shape, dtype, device = weight.shape, input.dtype, input.device
    if (
        dtype in _checks.FLOATING
        and weight.dtype is dtype
        and weight.device == device
        and len(shape) == 2
        and input.shape[-1:] == shape[1:]
        and (bias is None or (bias.dtype is dtype and bias.device == device and bias.shape == shape[:1]))
    ):
        return
    _checks.require_floating("linear", "input", input)
    _checks.require_dtype("linear", "weight", weight, input.dtype, "input")
    _checks.require_device("linear", "weight", weight, input.device, "input")
    if input.dim() == 0:
        raise RuntimeError("linear: input has no dimensions, expected [..., in_features]")
    _checks.require_shape("linear", "weight", weight, ("out_features", input.shape[-1]))
    if bias is not None:
        _checks.require_dtype("linear", "bias", bias, input.dtype, "input")
        _checks.require_device("linear", "bias", bias, input.device, "input")
        _checks.require_shape("linear", "bias", bias, (weight.shape[0],))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., n] as [rows, n]; reshape(-1, n) cannot tell the rows of an empty tensor."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _fwd_triton(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save_z: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, weight, bias, activation)
    y, z = kernels.linear_fwd(_rows(input), weight, bias, activation, negative_slope, save_z)
    return _shaped(y, z, input)


def _fwd_fallback(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save_z: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, weight, bias, activation)
    b = None if bias is None else to_array(bias)
    y, z = arrays.linear_fwd(to_array(_rows(input)), to_array(weight), b, activation, negative_slope, save_z)
    dtype = input.dtype
    return _shaped(to_tensor(y, dtype), None if z is None else to_tensor(z, dtype), input)


def _eager(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> torch.Tensor:
    """From torch's own functions, differentiable any number of times."""
    _check(input, weight, bias, activation)
    return lookup(activation).eager(F.linear(input, weight, bias), negative_slope)


def _shaped(
    y: torch.Tensor, z: torch.Tensor | None, input: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if input.dim() != 2:
        shape = (*input.shape[:-1], y.shape[1])
        # A result that autograd knows as a view may not be modified in place.
        y = torch.ops.aten._unsafe_view.default(y, shape)
        z = None if z is None else z.view(shape)
    return y, y.new_empty(0) if z is None else z


def _fwd_fake(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save_z: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, weight, bias, activation)
    y = input.new_empty((*input.shape[:-1], weight.shape[0]))
    return y, torch.empty_like(y) if save_z else input.new_empty(0)


def _bwd_triton(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    saved: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _rows(dy) if input is None else _rows(input)
    dx, dw, db = kernels.linear_bwd(
        _rows(dy),
        x,
        weight,
        None if saved is None else _rows(saved),
        activation,
        negative_slope,
        tuple(needs),
    )
    return _gradients(dx, dw, db, dy)


def _bwd_fallback(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    saved: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = dy.dtype
    # The input of a dW that is not needed is not looked at.
    x = None if input is None or not needs[1] else to_array(_rows(input))
    kept = None if saved is None else to_array(_rows(saved))
    dx, dw, db = arrays.linear_bwd(
        to_array(_rows(dy)), x, to_array(weight), kept, activation, negative_slope, needs
    )
    return _gradients(
        None if dx is None else to_tensor(dx, dtype),
        None if dw is None else to_tensor(dw, dtype),
        None if db is None else to_tensor(db, dtype),
        dy,
    )


def _gradients(
    dx: torch.Tensor | None, dw: torch.Tensor | None, db: torch.Tensor | None, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An op returns tensors: an empty one stands for what was not needed."""
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    if dx is None or dw is None or db is None:
        # Each its own: an op's results must not be one tensor.
        dx = dy.new_empty(0) if dx is None else dx
        dw = dy.new_empty(0) if dw is None else dw
        db = dy.new_empty(0) if db is None else db
    return dx, dw, db


def _bwd_fake(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    saved: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1]) if needs[0] else 0),
        dy.new_empty(weight.shape if needs[1] else 0),
        dy.new_empty(weight.shape[0] if needs[2] else 0),
    )


class LinearFunction(torch.autograd.Function):
    """Autograd of `linear`, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
        negative_slope: float,
        backend: str,
    ) -> torch.Tensor:
        saves = saved_for_backward(activation, negative_slope)
        y, z = _linear_fwd.below(input, weight, bias, activation, negative_slope, saves == "z", backend)
        # Without an activation a frozen weight needs no input, in backward or double backward.
        x = input if saves or ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x, weight, bias, y if saves == "y" else z if saves == "z" else None)
        ctx.options = activation, negative_slope, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, bias, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if _dispatch.differentiates():
            gradients = _differentiable_backward(dy, input, weight, bias, needs, *ctx.options[:2])
            return (*gradients, None, None, None)
        activation, negative_slope, backend = ctx.options
        dx, dw, db = _linear_backward.below(
            dy, input, weight, saved, activation, negative_slope, needs, backend
        )
        needs_x, needs_w, needs_b = needs
        return dx if needs_x else None, dw if needs_w else None, db if needs_b else None, None, None, None


def _differentiable_backward(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs: Sequence[bool],
    activation: str | None,
    negative_slope: float,
) -> tuple[torch.Tensor | None, ...]:
    if input is None:
        return dy @ weight if needs[0] else None, None, _rows(dy).sum(0) if needs[2] else None

    return _dispatch.differentiable_vjp(
        lambda x, w, b: _eager(x, w, b, activation, negative_slope), (input, weight, bias), needs, dy
    )


def _linear_autograd(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    backend: str,
) -> torch.Tensor:
    # Decided here: inside the Function, needs_input_grad is True even under no_grad.
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return LinearFunction.apply(input, weight, bias, activation, negative_slope, backend)
    return _linear.below(input, weight, bias, activation, negative_slope, backend)


def _result_only(forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    return lambda *args: forward(*args, False)[0]


_linear = _dispatch.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, str? activation, float negative_slope, str backend) -> Tensor",
    triton=_result_only(_fwd_triton),
    fallback=_result_only(_fwd_fallback),
    eager=_eager,
    fake=lambda input, weight, bias, activation, slope, backend: _fwd_fake(
        input, weight, bias, activation, slope, False, backend
    )[0],
    autograd=_linear_autograd,
    autocast=_dispatch.cast_floating,
)
_linear_fwd = _dispatch.define(
    "linear_fwd(Tensor input, Tensor weight, Tensor? bias, str? activation, float negative_slope, bool save_z, "
    "str backend) -> (Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_linear_backward = _dispatch.define(
    "linear_backward(Tensor dy, Tensor? input, Tensor weight, Tensor? saved, str? activation, float negative_slope, "
    "bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


def product_steps(
    x: torch.Tensor, w: torch.Tensor, activation: str | None = None, saves_z: bool = False
) -> dict[str, tuple[str, str]]:
    """What would multiply for "y", "dx" and "dw" of a layer, and its tile."""

    def step(name: str, tile: Any) -> tuple[str, str]:
        if isinstance(tile, configs.CuBlas):
            return f"cuBLAS ({name})", str(tile)
        return f"{'_linear_tma_kernel' if tile.tma else '_linear_kernel'} ({name})", str(tile)

    # On a CPU tensor as on the interpreter's stand-in for a GPU.
    return {name: step(name, tile) for name, tile in kernels.linear_tiles(x, w, activation, saves_z).items()}


@_dispatch.explains("linear")
def _explain(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor("linear", "input", input)
    _checks.require_tensor("linear", "weight", weight)
    _check(input, weight, bias, activation)
    N = weight.shape[0]

    def steps(backend: str) -> list[tuple[str, str]]:
        saves = saved_for_backward(activation, negative_slope)
        if backend == "torch":
            return [
                ("forward", "torch.nn.functional.linear, then torch's activation"),
                ("backward", "torch's own"),
            ]
        if backend == "fallback":
            return [
                ("forward", "BLAS product, then bias and activation in place"),
                ("backward", f"activation's gradient from {saves}, then two BLAS products"),
            ]
        product = product_steps(_rows(input), weight, activation, saves == "z")
        # What a training step launches; without activation and bias there is no pass for dZ.
        dz = [("_linear_dz_kernel", f"{configs.linear_dz_tile(input.dtype, N)}; saved: {saves}")]
        return [
            product["y"],
            *(dz if saves or bias is not None else []),
            *([("_sum_kernel", "adds the strips' sums into db")] if bias is not None else []),
            product["dx"],
            product["dw"],
        ]

    return input, steps
