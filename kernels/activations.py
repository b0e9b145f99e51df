"""The table of activations: for each its Triton forward and derivative, their NumPy twins, torch's own function, and
what its derivative needs saved.

To add one, add a block: four functions and a row of `ACTIVATIONS`. Tests, benchmark and error texts iterate the table.

Forms. A Triton forward maps float32 z to act(z); a Triton gradient maps (dy, saved) to dy * act'(z), where saved is y or
z as the row says. The NumPy twins do the same on one contiguous block of an array: forward in place, gradient into `out`,
which is neither `dy` nor `saved`. They also take CuPy arrays: NumPy's ufuncs hand those on to CuPy.

NaN goes through: where(z <= 0, 0, z) keeps it, maximum(z, 0) would not. Large |z| is stable: every exponential that can
overflow is in a denominator.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import configs, tuning
from ._triton import INTERPRET, _cast, launch, tl, triton

__all__ = ["ACTIVATIONS", "Activation", "activation_bwd", "activation_fwd", "lookup", "saved_for_backward"]

LOG2E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# gelu_tanh is z * sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3); these are 2 sqrt(2 / pi) and that times 3 * 0.044715.
GELU_TANH_C = tl.constexpr(1.5957691216057308)
GELU_TANH_K = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(z * -LOG2E))


@triton.jit
def _sigmoid_pair(z):
    """sigmoid(z) and 1 - sigmoid(z), the latter without cancellation."""
    e = tl.exp2(z * -LOG2E)
    s = 1.0 / (1.0 + e)
    # For negative z e may be infinite, and 1 - s is exact enough; s itself is then 0, so that -inf gives NaN as in torch.
    return s, tl.where(z < 0, 1.0 - s, e * s)


@triton.jit
def _tanh_approx(z):
    """tanh in one instruction, of relative error 2^-11."""
    if INTERPRET:
        # That error at its largest: 11 bits of the mantissa, the rest cut off.
        bits = tl.cast(_tanh_fwd(z, 0.0), tl.uint32, bitcast=True) & 0xFFFFF000
        return tl.cast(bits, tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _identity_fwd(z, slope):
    return z


@triton.jit
def _identity_grad(dy, saved, slope):
    return dy


@triton.jit
def _relu_fwd(z, slope):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def _relu_grad(dy, y, slope):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def _leaky_relu_fwd(z, slope):
    return tl.where(z > 0, z, z * slope)


@triton.jit
def _leaky_relu_grad(dy, saved, slope):
    return tl.where(saved > 0, dy, dy * slope)


@triton.jit
def _sigmoid_fwd(z, slope):
    return _sigmoid(z)


@triton.jit
def _sigmoid_grad(dy, y, slope):
    return dy * (1.0 - y) * y


@triton.jit
def _tanh_fwd(z, slope):
    # 1 - 2 / (exp(2 |z|) + 1) cancels for small z: a polynomial there (minimax on [0, 0.6], relative error 3e-9).
    q = z * z
    p = -0.05378668010234833 + q * (0.020805377513170242 - q * 0.00590586056932807)
    small = z + z * q * (-0.33333298563957214 + q * (0.13331958651542664 + q * p))
    big = 1.0 - 2.0 / (tl.exp2(tl.abs(z) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(z) < 0.6, small, tl.where(z < 0, -big, big))


@triton.jit
def _tanh_fwd_bf16(z, slope):
    return _tanh_approx(z)


@triton.jit
def _tanh_grad(dy, y, slope):
    return dy * (1.0 - y * y)


@triton.jit
def _gelu_fwd(z, slope):
    return 0.5 * z * (1.0 + tl.math.erf(z * SQRT_HALF))


@triton.jit
def _gelu_grad(dy, z, slope):
    cdf = 0.5 * (1.0 + tl.math.erf(z * SQRT_HALF))
    pdf = tl.exp2(z * z * (-0.5 * LOG2E)) * INV_SQRT_2PI
    return dy * (cdf + z * pdf)


@triton.jit
def _gelu_tanh_fwd(z, slope):
    return z * _sigmoid((z + z * z * z * GELU_TANH_K) * GELU_TANH_C)


@triton.jit
def _gelu_tanh_fwd_bf16(z, slope):
    half = 0.5 * z
    return half + half * _tanh_approx((z + z * z * z * GELU_TANH_K) * (0.5 * GELU_TANH_C))


@triton.jit
def _gelu_tanh_grad(dy, z, slope):
    s, t = _sigmoid_pair((z + z * z * z * GELU_TANH_K) * GELU_TANH_C)
    return dy * (s + z * s * t * ((1.0 + z * z * (3.0 * GELU_TANH_K)) * GELU_TANH_C))


@triton.jit
def _silu_fwd(z, slope):
    return z * _sigmoid(z)


@triton.jit
def _silu_grad(dy, z, slope):
    s, t = _sigmoid_pair(z)
    return dy * (s * (1.0 + z * t))


def _np_identity(z: Any, slope: float) -> None:
    pass


def _np_identity_grad(dy: Any, saved: Any, slope: float, out: Any) -> None:
    out[...] = dy


@functools.cache
def _np_zeros(dtype: Any) -> Any:
    return np.zeros(1 << 16, dtype)


def _np_relu(z: Any, slope: float) -> None:
    # NumPy's maximum has a vector loop for two arrays, and none for an array and a scalar: 5 times as slow.
    small = type(z) is np.ndarray and z.size <= 1 << 16
    np.maximum(z, _np_zeros(z.dtype)[: z.size] if small else 0, out=z)


def _np_relu_grad(dy: Any, y: Any, slope: float, out: Any) -> None:
    # dy where y is positive or NaN. Masked copies are 4 times as slow as integer arithmetic: a nonzero |y|, negated as an
    # integer, has its sign bit set, and an arithmetic shift makes that a mask.
    integer = np.int32 if out.itemsize == 4 else np.int64
    bits = out.view(integer)
    np.absolute(y, out=out)
    np.negative(bits, out=bits)
    np.right_shift(bits, out.itemsize * 8 - 1, out=bits)
    np.bitwise_and(bits, dy.view(integer), out=bits)


def _np_leaky_relu(z: Any, slope: float) -> None:
    scaled = z * slope
    if 0 < slope <= 1:
        np.maximum(z, scaled, out=z)
    else:
        np.copyto(z, scaled, where=z <= 0)


def _np_leaky_relu_grad(dy: Any, saved: Any, slope: float, out: Any) -> None:
    np.multiply(dy, slope, out=out)
    np.copyto(out, dy, where=saved > 0)


def _np_exp(z: Any, scale: float, out: Any) -> None:
    """exp(scale z). In float32 by exp2, which is twice as fast; float64 keeps exp's accuracy in the far tails."""
    if z.dtype == np.float32:
        np.multiply(z, scale * math.log2(math.e), out=out)
        np.exp2(out, out=out)
    else:
        np.multiply(z, scale, out=out)
        np.exp(out, out=out)


def _np_sigmoid_into(z: Any, out: Any) -> None:
    _np_exp(z, -1.0, out)
    np.add(out, 1, out=out)
    np.divide(1, out, out=out)


def _np_sigmoid(z: Any, slope: float) -> None:
    _np_sigmoid_into(z, z)


def _np_sigmoid_grad(dy: Any, y: Any, slope: float, out: Any) -> None:
    np.subtract(1, y, out=out)
    np.multiply(out, y, out=out)
    np.multiply(out, dy, out=out)


def _np_tanh(z: Any, slope: float) -> None:
    np.tanh(z, out=z)


def _np_tanh_grad(dy: Any, y: Any, slope: float, out: Any) -> None:
    np.multiply(y, y, out=out)
    np.subtract(1, out, out=out)
    np.multiply(out, dy, out=out)


# float32: Phi(z) = 1 / (1 + 2^(z q(z^2))). Coefficients of q, lowest power first: a weighted minimax fit on |z| <= 6.5
# that puts z Phi(z) within 7e-8; beyond, q only falls, so that Phi saturates with no clamp.
_NORMAL_CDF32 = (
    -2.3022080015727258, -0.10483750729284598, 9.508725205505683e-05, 0.00015949844831512802, -1.1463984461504038e-05,
    3.8562352439747196e-07, -5.22072265253246e-09,
)  # fmt: skip

# float64: erf(x) = -expm1(-x q(x)) for x >= 0: q(x) = -log(1 - erf(x)) / x is smooth, and expm1 keeps small x exact to an
# ulp. Coefficients of q, lowest power first: Chebyshev interpolation on [0, 6] (6e-16); erf is 1 beyond, to rounding.
_ERF64 = (
    1.1283791670955117, 0.6366197723678638, 0.10277260328876187, -0.019128446764023452, -0.00020919706460255437,
    0.0016962207128815754, -0.0005901836985337993, 2.6046381440439165e-05, 6.413373927302388e-05,
    -2.9142500255846204e-05, 2.6745006617727957e-06, 3.561118449273508e-06, -2.3113610181311997e-06,
    6.912667980925151e-07, -3.720384282512875e-08, -7.538423715412225e-08, 4.704205746350751e-08,
    -1.7584332230747717e-08, 4.8873892146104905e-09, -1.07242225685233e-09, 1.8976728680101824e-10,
    -2.7219030968906763e-11, 3.1501593240726926e-12, -2.904178505128293e-13, 2.085572138290452e-14,
    -1.1250771926698333e-15, 4.290206143186365e-17, -1.0311467691947156e-18, 1.174754392445117e-20,
)  # fmt: skip


def _np_horner(x: Any, coefficients: tuple[float, ...]) -> Any:
    q = np.multiply(x, coefficients[-1])
    for c in coefficients[-2:0:-1]:
        np.add(q, c, out=q)
        np.multiply(q, x, out=q)
    np.add(q, coefficients[0], out=q)
    return q


def _np_normal_cdf(z: Any) -> Any:
    """Phi(z) = (1 + erf(z / sqrt 2)) / 2 of an array."""
    if z.dtype == np.float32:
        q = _np_horner(np.multiply(z, z), _NORMAL_CDF32)
        np.multiply(q, z, out=q)
        np.exp2(q, out=q)
        np.add(q, 1, out=q)
        np.divide(1, q, out=q)
        return q
    x = np.absolute(z)
    np.multiply(x, -math.sqrt(0.5), out=x)
    np.maximum(x, -6.0, out=x)
    q = _np_horner(np.negative(x), _ERF64)
    np.multiply(q, x, out=q)
    np.expm1(q, out=q)
    np.negative(q, out=q)
    np.copysign(q, z, out=q)
    np.add(q, 1, out=q)
    np.multiply(q, 0.5, out=q)
    return q


def _np_gelu(z: Any, slope: float) -> None:
    np.multiply(z, _np_normal_cdf(z), out=z)


def _np_gelu_grad(dy: Any, z: Any, slope: float, out: Any) -> None:
    np.multiply(z, z, out=out)
    _np_exp(out, -0.5, out)
    np.multiply(out, 1 / math.sqrt(2 * math.pi), out=out)
    np.multiply(out, z, out=out)
    np.add(out, _np_normal_cdf(z), out=out)
    np.multiply(out, dy, out=out)


def _np_gelu_tanh_argument(z: Any) -> Any:
    """2 u, u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    u = np.multiply(z, z)
    np.multiply(u, 2 * math.sqrt(2 / math.pi) * 0.044715, out=u)
    np.add(u, 2 * math.sqrt(2 / math.pi), out=u)
    np.multiply(u, z, out=u)
    return u


def _np_gelu_tanh(z: Any, slope: float) -> None:
    gate = _np_gelu_tanh_argument(z)
    _np_sigmoid_into(gate, gate)
    np.multiply(z, gate, out=z)


def _np_gelu_tanh_grad(dy: Any, z: Any, slope: float, out: Any) -> None:
    gate = _np_gelu_tanh_argument(z)
    # 1 - gate without cancellation: large z multiplies it by 2 u' z.
    np.negative(gate, out=out)
    _np_sigmoid_into(out, out)
    _np_sigmoid_into(gate, gate)
    slant = np.multiply(z, z)
    np.multiply(slant, 6 * math.sqrt(2 / math.pi) * 0.044715, out=slant)
    np.add(slant, 2 * math.sqrt(2 / math.pi), out=slant)
    np.multiply(slant, z, out=slant)
    np.multiply(out, slant, out=out)
    np.add(out, 1, out=out)
    np.multiply(out, gate, out=out)
    np.multiply(out, dy, out=out)


def _np_silu(z: Any, slope: float) -> None:
    gate = np.empty_like(z)
    _np_sigmoid_into(z, gate)
    np.multiply(z, gate, out=z)


def _np_silu_grad(dy: Any, z: Any, slope: float, out: Any) -> None:
    gate = np.empty_like(z)
    _np_sigmoid_into(z, gate)
    np.subtract(1, gate, out=out)
    np.multiply(out, z, out=out)
    np.add(out, 1, out=out)
    np.multiply(out, gate, out=out)
    np.multiply(out, dy, out=out)


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation: see the module's docstring for the forms of its functions."""

    forward: Any
    gradient: Any
    np_forward: Callable[[Any, float], None]
    np_gradient: Callable[[Any, Any, float, Any], None]
    # torch's function of (z, negative_slope), differentiable any number of times.
    eager: Callable[[torch.Tensor, float], torch.Tensor]
    # "y" where the derivative follows from the output, "z" where it needs the input, None where it is constant.
    saves: str | None
    # For results rounded to bf16, whose 2^-9 hides the 2^-11 of tanh.approx; in fp16 that would be as large as the rounding.
    forward_bf16: Any = None

    def forward_for(self, dtype: torch.dtype) -> Any:
        """The Triton forward for a result of this dtype."""
        return (
            self.forward_bf16 if dtype is torch.bfloat16 and self.forward_bf16 is not None else self.forward
        )


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        forward=_relu_fwd,
        gradient=_relu_grad,
        np_forward=_np_relu,
        np_gradient=_np_relu_grad,
        eager=lambda z, slope: F.relu(z),
        saves="y",
    ),
    "leaky_relu": Activation(
        forward=_leaky_relu_fwd,
        gradient=_leaky_relu_grad,
        np_forward=_np_leaky_relu,
        np_gradient=_np_leaky_relu_grad,
        eager=F.leaky_relu,
        saves="y",
    ),
    "sigmoid": Activation(
        forward=_sigmoid_fwd,
        gradient=_sigmoid_grad,
        np_forward=_np_sigmoid,
        np_gradient=_np_sigmoid_grad,
        eager=lambda z, slope: torch.sigmoid(z),
        saves="y",
    ),
    "tanh": Activation(
        forward=_tanh_fwd,
        gradient=_tanh_grad,
        np_forward=_np_tanh,
        np_gradient=_np_tanh_grad,
        eager=lambda z, slope: torch.tanh(z),
        saves="y",
        forward_bf16=_tanh_fwd_bf16,
    ),
    "gelu": Activation(
        forward=_gelu_fwd,
        gradient=_gelu_grad,
        np_forward=_np_gelu,
        np_gradient=_np_gelu_grad,
        eager=lambda z, slope: F.gelu(z),
        saves="z",
    ),
    "gelu_tanh": Activation(
        forward=_gelu_tanh_fwd,
        gradient=_gelu_tanh_grad,
        np_forward=_np_gelu_tanh,
        np_gradient=_np_gelu_tanh_grad,
        eager=lambda z, slope: F.gelu(z, approximate="tanh"),
        saves="z",
        forward_bf16=_gelu_tanh_fwd_bf16,
    ),
    "silu": Activation(
        forward=_silu_fwd,
        gradient=_silu_grad,
        np_forward=_np_silu,
        np_gradient=_np_silu_grad,
        eager=lambda z, slope: F.silu(z),
        saves="z",
    ),
}

_IDENTITY = Activation(
    forward=_identity_fwd,
    gradient=_identity_grad,
    np_forward=_np_identity,
    np_gradient=_np_identity_grad,
    eager=lambda z, slope: z,
    saves=None,
)


def lookup(activation: str | None) -> Activation:
    """The row of `activation`; None means the identity. Raises ValueError that lists the names."""
    if activation is None:
        return _IDENTITY
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected None or one of {names}") from None


def saved_for_backward(activation: str | None, negative_slope: float) -> str | None:
    """What backward needs: "y", "z" or None. With a negative slope the sign of leaky ReLU's output says nothing of z."""
    if activation == "leaky_relu" and negative_slope < 0:
        return "z"
    return lookup(activation).saves


# The size is not specialized on, or a partial last batch could compile anew; the body's mask never cuts a 128-bit vector,
# and one program sees to the few elements behind it.
@triton.jit(do_not_specialize=["n"])
def _activation_fwd_kernel(
    x_ptr,  # [n]
    y_ptr,  # [n]
    n,
    slope,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    body = n // VECTOR * VECTOR
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < body).to(tl.float32)
    tl.store(y_ptr + offs, _cast(ACT(x, slope), y_ptr.dtype.element_ty), mask=offs < body)
    if tl.program_id(0) == 0:
        tail = body + tl.arange(0, VECTOR)
        x_tail = tl.load(x_ptr + tail, mask=tail < n).to(tl.float32)
        tl.store(y_ptr + tail, _cast(ACT(x_tail, slope), y_ptr.dtype.element_ty), mask=tail < n)


@triton.jit(do_not_specialize=["n"])
def _activation_bwd_kernel(
    dy_ptr,  # [n]
    saved_ptr,  # [n]: y or z, as the activation's row says
    dx_ptr,  # [n]
    n,
    slope,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    body = n // VECTOR * VECTOR
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + offs, mask=offs < body).to(tl.float32)
    saved = tl.load(saved_ptr + offs, mask=offs < body).to(tl.float32)
    tl.store(dx_ptr + offs, _cast(GRADIENT(dy, saved, slope), dx_ptr.dtype.element_ty), mask=offs < body)
    if tl.program_id(0) == 0:
        tail = body + tl.arange(0, VECTOR)
        dy_tail = tl.load(dy_ptr + tail, mask=tail < n).to(tl.float32)
        saved_tail = tl.load(saved_ptr + tail, mask=tail < n).to(tl.float32)
        tl.store(
            dx_ptr + tail, _cast(GRADIENT(dy_tail, saved_tail, slope), dx_ptr.dtype.element_ty), mask=tail < n
        )


def activation_fwd(x: torch.Tensor, activation: str, negative_slope: float) -> torch.Tensor:
    """act(x) elementwise, any shape; the result is contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tile = tuning.tile(x.device, configs.activation_tile, x.dtype)
    launch(
        _activation_fwd_kernel,
        (triton.cdiv(x.numel(), tile.block),),
        x,
        y,
        x.numel(),
        negative_slope,
        ACT=lookup(activation).forward,
        BLOCK=tile.block,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return y


def activation_bwd(
    dy: torch.Tensor, saved: torch.Tensor, activation: str, negative_slope: float
) -> torch.Tensor:
    """dy * act'(.) elementwise; saved is y or z, as `saved_for_backward` says."""
    dy, saved = dy.contiguous(), saved.contiguous()
    dx = torch.empty_like(dy)
    tile = tuning.tile(dy.device, configs.activation_tile, dy.dtype)
    launch(
        _activation_bwd_kernel,
        (triton.cdiv(dy.numel(), tile.block),),
        dy,
        saved,
        dx,
        dy.numel(),
        negative_slope,
        GRADIENT=lookup(activation).gradient,
        BLOCK=tile.block,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return dx
