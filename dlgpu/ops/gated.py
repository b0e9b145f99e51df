"""Gated units, y = (act(x Wg^T + bg) * (x Wu^T + bu)) Wo^T + bo: checks, the dispatcher's ops and autograd. The kernels are in
kernels/gated.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import gated as arrays
from dlgpu.fallback import linear as linear_arrays
from dlgpu.kernels import configs
from dlgpu.kernels import gated as kernels
from dlgpu.kernels import linear as linear_kernels
from dlgpu.kernels.activations import lookup
from dlgpu.ops.linear import _rows

__all__ = ["gated_linear"]

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def gated_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    *,
    activation: str | None = "silu",
    negative_slope: float = 0.01,
) -> torch.Tensor:
    """h = act(g) * u, [g | u] = x w^T + b; with out_weight y = h w_o^T + b_o, else y = h. One kernel for each product.

    Args:
        input: x, [..., in_features], float32, bfloat16, float16 or float64; any strides.
        weight: w, [2 hidden_features, in_features], of the same dtype: the gate's rows first, then as many of the up
            projection. From two matrices: torch.cat([gate, up]).
        bias: b, [2 hidden_features], of the same dtype, or None.
        out_weight: w_o, [out_features, hidden_features], of the same dtype, or None.
        out_bias: b_o, [out_features], of the same dtype, or None.
        activation: of the gate: "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU), "sigmoid" (GLU), None (bilinear),
            "leaky_relu", "tanh" or "gelu_tanh".
        negative_slope: leaky ReLU's slope for negative g.

    Returns:
        y, [..., out_features], or h, [..., hidden_features], of the same dtype, in autocast of the autocast dtype.

    Raises:
        RuntimeError: a shape or device does not fit.
        TypeError: an argument's type or dtype does not fit.
        ValueError: no such activation, and the message lists them; out_bias without out_weight.

    Saved for backward: x and the weights by reference, and [g | u], [..., 2 hidden_features]. h is not saved: backward makes
    it again, in the kernel that makes the gradients of g and u. Sums are float32 (float64 for float64).

    Source: Shazeer, arXiv:2002.05202.

    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    >>> gated_linear(x, w, activation="relu")
    tensor([[9.]])
    """
    for name, value in (
        ("input", input),
        ("weight", weight),
        ("bias", bias),
        ("out_weight", out_weight),
        ("out_bias", out_bias),
    ):
        if not isinstance(value, torch.Tensor) and (value is not None or name in ("input", "weight")):
            _checks.require_tensor("gated_linear", name, value)
    if type(negative_slope) is not float:
        _checks.require_number("gated_linear", "negative_slope", negative_slope)
    backend = _dispatch.choose_backend(input, "gated_linear")
    return _gated(input, weight, bias, out_weight, out_bias, activation, negative_slope, backend)


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    activation: str | None,
) -> None:
    lookup(activation)
    _checks.require_floating("gated_linear", "input", input)
    dtype, device = input.dtype, input.device
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("out_weight", out_weight),
        ("out_bias", out_bias),
    ):
        if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
            _checks.require_dtype("gated_linear", name, tensor, dtype, "input")
            _checks.require_device("gated_linear", name, tensor, device, "input")
    if input.dim() == 0:
        raise RuntimeError("gated_linear: input has no dimensions, expected [..., in_features]")
    shape = weight.shape
    if len(shape) != 2 or shape[1] != input.shape[-1] or shape[0] % 2:
        expected = f"[2 * hidden_features, {input.shape[-1]}]"
        raise RuntimeError(f"gated_linear: weight has shape {list(shape)}, expected {expected}")
    if bias is not None:
        _checks.require_shape("gated_linear", "bias", bias, (shape[0],))
    if out_weight is not None:
        _checks.require_shape("gated_linear", "out_weight", out_weight, ("out_features", shape[0] // 2))
        if out_bias is not None:
            _checks.require_shape("gated_linear", "out_bias", out_bias, (out_weight.shape[0],))
    elif out_bias is not None:
        raise ValueError("gated_linear: out_bias is given without out_weight, expected both or neither")


def _shaped(
    y: torch.Tensor, gu: torch.Tensor | None, input: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if input.dim() != 2:
        # A result that autograd knows as a view may not be modified in place.
        y = torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], y.shape[1]))
        gu = None if gu is None else gu.view(*input.shape[:-1], gu.shape[1])
    return y, y.new_empty(0) if gu is None else gu


def _fwd_triton(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, weight, bias, out_weight, out_bias, activation)
    y, gu = kernels.gated_fwd(_rows(input), weight, bias, activation, negative_slope, save)
    if out_weight is not None:
        y, _ = linear_kernels.linear_fwd(y, out_weight, out_bias, None, 0.0, False)
    return _shaped(y, gu, input)


def _fwd_fallback(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, weight, bias, out_weight, out_bias, activation)
    dtype = input.dtype
    b = None if bias is None else to_array(bias)
    y, gu = arrays.gated_fwd(to_array(_rows(input)), to_array(weight), b, activation, negative_slope, save)
    if out_weight is not None:
        b = None if out_bias is None else to_array(out_bias)
        y, _ = linear_arrays.linear_fwd(y, to_array(out_weight), b, None, 0.0, False)
    return _shaped(to_tensor(y, dtype), None if gu is None else to_tensor(gu, dtype), input)


def _eager(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> torch.Tensor:
    """From torch's own functions, differentiable any number of times."""
    _check(input, weight, bias, out_weight, out_bias, activation)
    g, u = F.linear(input, weight, bias).chunk(2, -1)
    h = lookup(activation).eager(g, negative_slope) * u
    return h if out_weight is None else F.linear(h, out_weight, out_bias)


def _fwd_fake(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, weight, bias, out_weight, out_bias, activation)
    width = weight.shape[0]
    out_features = width // 2 if out_weight is None else out_weight.shape[0]
    y = input.new_empty((*input.shape[:-1], out_features))
    return y, input.new_empty((*input.shape[:-1], width) if save else 0)


def _bwd_triton(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor | None,
    gu: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, needs_w, needs_b, needs_wo, needs_bo = needs
    dh = _rows(dy)
    dgu = h = db = dw = dwo = None
    dbo = linear_kernels.linear_dz(dh, None, None, 0.0, False, True)[1] if needs_bo else None
    if gu is not None:
        gu, wanted = _rows(gu), (needs_x or needs_w, needs_wo, needs_b)
        if not (needs_x or needs_w or needs_b):
            _, h, _ = kernels.gated_bwd(None, gu, activation, negative_slope, *wanted)
        elif out_weight is None:
            dgu, _, db = kernels.gated_bwd(dh, gu, activation, negative_slope, *wanted)
        else:
            dgu, h, db = kernels.gated_dgrad(dh, out_weight, gu, activation, negative_slope, *wanted)
    if h is not None:
        dwo = linear_kernels.linear_wgrad(dh, h)
    if dgu is not None and needs_w and input is not None:
        dw = linear_kernels.linear_wgrad(dgu, _rows(input))
    dx = linear_kernels.linear_dgrad(dgu, weight)[0] if dgu is not None and needs_x else None
    return _gradients(dx, dw, db, dwo, dbo, dy)


def _bwd_fallback(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor | None,
    gu: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, needs_w, needs_b, needs_wo, needs_bo = needs
    needs_gu = needs_x or needs_w or needs_b
    dtype = dy.dtype
    grad = to_array(_rows(dy))
    w_out = None if out_weight is None else to_array(out_weight)
    found: list[Any] = [None] * 5
    dh = grad
    if w_out is not None:
        wanted = needs_gu, False, needs_bo
        dh, _, found[4] = linear_arrays.linear_bwd(grad, None, w_out, None, None, 0.0, wanted)
    if gu is not None:
        dgu, h = arrays.gated_bwd(dh, to_array(_rows(gu)), activation, negative_slope, needs_gu, needs_wo)
        if needs_wo:
            found[3] = linear_arrays.linear_bwd(grad, h, w_out, None, None, 0.0, (False, True, False))[1]
        if needs_gu:
            x = None if input is None else to_array(_rows(input))
            wanted = needs_x, needs_w, needs_b
            found[:3] = linear_arrays.linear_bwd(dgu, x, to_array(weight), None, None, 0.0, wanted)
    dx, dw, db, dwo, dbo = (None if g is None else to_tensor(g, dtype) for g in found)
    return _gradients(dx, dw, db, dwo, dbo, dy)


def _gradients(
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
    dwo: torch.Tensor | None,
    dbo: torch.Tensor | None,
    dy: torch.Tensor,
) -> Gradients:
    """An op returns tensors: an empty one, each its own, stands for what was not needed."""
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0) if dw is None else dw,
        dy.new_empty(0) if db is None else db,
        dy.new_empty(0) if dwo is None else dwo,
        dy.new_empty(0) if dbo is None else dbo,
    )


def _bwd_fake(
    dy: torch.Tensor,
    input: torch.Tensor | None,
    weight: torch.Tensor,
    out_weight: torch.Tensor | None,
    gu: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    needs_x, needs_w, needs_b, needs_wo, needs_bo = needs
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1]) if needs_x else 0),
        dy.new_empty(weight.shape if needs_w else 0),
        dy.new_empty(weight.shape[0] if needs_b else 0),
        dy.new_empty(out_weight.shape if needs_wo and out_weight is not None else 0),
        dy.new_empty(dy.shape[-1] if needs_bo else 0),
    )


class GatedLinearFunction(torch.autograd.Function):
    """Autograd of `gated_linear`, at the op's Autograd key."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out_weight: torch.Tensor | None,
        out_bias: torch.Tensor | None,
        activation: str | None,
        negative_slope: float,
        backend: str,
    ) -> torch.Tensor:
        tensors = input, weight, bias, out_weight, out_bias
        # A gradient of out_bias alone takes nothing from forward.
        save = any(ctx.needs_input_grad[:4])
        y, gu = _gated_fwd.below(*tensors, activation, negative_slope, save, backend)
        ctx.save_for_backward(*tensors, gu if save else None)
        ctx.options = activation, negative_slope, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, gu = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        activation, negative_slope, backend = ctx.options
        if _dispatch.differentiates():
            gradients = _differentiable_backward(dy, tensors, needs, activation, negative_slope)
            return (*gradients, None, None, None)
        input, weight, _, out_weight, _ = tensors
        x = input if needs[1] else None
        found = _gated_backward.below(
            dy, x, weight, out_weight, gu, activation, negative_slope, needs, backend
        )
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


def _differentiable_backward(
    dy: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    activation: str | None,
    negative_slope: float,
) -> tuple[torch.Tensor | None, ...]:
    return _dispatch.differentiable_vjp(
        lambda x, w, b, wo, bo: _eager(x, w, b, wo, bo, activation, negative_slope), tensors, needs, dy
    )


def _gated_autograd(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_weight: torch.Tensor | None,
    out_bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    backend: str,
) -> torch.Tensor:
    args = input, weight, bias, out_weight, out_bias, activation, negative_slope, backend
    # Decided here: inside the Function, needs_input_grad is True even under no_grad.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return GatedLinearFunction.apply(*args)
    return _gated.below(*args)


def _result_only(forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    return lambda *args: forward(*args, False)[0]


_ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? out_weight, Tensor? out_bias, str? activation, "
    "float negative_slope"
)
_gated = _dispatch.define(
    f"gated_linear({_ARGUMENTS}, str backend) -> Tensor",
    triton=_result_only(_fwd_triton),
    fallback=_result_only(_fwd_fallback),
    eager=_eager,
    fake=lambda input, weight, bias, out_weight, out_bias, activation, slope, backend: _fwd_fake(
        input, weight, bias, out_weight, out_bias, activation, slope, False, backend
    )[0],
    autograd=_gated_autograd,
    autocast=_dispatch.cast_floating,
)
_gated_fwd = _dispatch.define(
    f"gated_linear_fwd({_ARGUMENTS}, bool save, str backend) -> (Tensor, Tensor)",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_gated_backward = _dispatch.define(
    "gated_linear_backward(Tensor dy, Tensor? input, Tensor weight, Tensor? out_weight, Tensor? gu, str? activation, "
    "float negative_slope, bool[5] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


@_dispatch.explains("gated_linear")
def _explain(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    *,
    activation: str | None = "silu",
    negative_slope: float = 0.01,
) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor("gated_linear", "input", input)
    _checks.require_tensor("gated_linear", "weight", weight)
    _check(input, weight, bias, out_weight, out_bias, activation)

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend == "torch":
            return [
                ("forward", "torch.nn.functional.linear, torch's activation and product"),
                ("backward", "torch's own gradient of the activation, products and sums"),
            ]
        if backend == "fallback":
            return [
                ("forward", "a BLAS product, then bias and gate block by block"),
                ("backward", "the gate's gradients block by block, and BLAS products"),
            ]
        x = _rows(input)
        hidden = weight.shape[0] // 2
        gated = kernels.gated_tiles(x, weight, out_weight)
        strip = str(configs.gated_bwd_tile(input.dtype, hidden))

        def product(name: str, stem: str, tile: configs.MatmulTile | configs.CuBlas) -> tuple[str, str]:
            if isinstance(tile, configs.CuBlas):
                return f"cuBLAS ({name})", tile.reason
            return f"_{stem}{'_tma' if tile.tma else ''}_kernel ({name})", str(tile)

        def bias_sums(there: torch.Tensor | None, name: str) -> list[tuple[str, str]]:
            return [] if there is None else [("_sum_kernel", f"adds the column sums of {name}'s gradient")]

        # What a training step launches.
        found = [product("h", "gated_fwd", gated["h"])]
        if isinstance(gated["h"], configs.CuBlas):
            found.append(("_gated_bwd_kernel (h)", strip))
        inner = linear_kernels.linear_tiles(x, weight, None, False)
        if out_weight is None:
            found += [("_gated_bwd_kernel (dg, du)", strip), *bias_sums(bias, "bias")]
        else:
            h = x.new_empty((len(x), hidden), device="meta")
            outer = linear_kernels.linear_tiles(h, out_weight, None, False)
            found.append(product("y", "linear", outer["y"]))
            if out_bias is not None:
                dz = configs.linear_dz_tile(input.dtype, len(out_weight))
                found += [("_linear_dz_kernel (out_bias)", str(dz)), *bias_sums(out_bias, "out_bias")]
            found.append(product("dg, du, h", "gated_dgrad", gated["dh"]))
            if isinstance(gated["dh"], configs.CuBlas):
                found.append(("_gated_bwd_kernel (dg, du, h)", strip))
            found += [*bias_sums(bias, "bias"), product("dw_out", "linear", outer["dw"])]
        return [*found, product("dw", "linear", inner["dw"]), product("dx", "linear", inner["dx"])]

    return input, steps
