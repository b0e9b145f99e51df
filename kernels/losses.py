"""The table of elementwise losses, their two kernels, and multi-margin's, whose terms meet along rows.

For each loss the table holds its Triton value and gradients, their NumPy twins, and torch's own functions; x is the input, t
the target, q a second operand that only some losses have (1 where there is none), p one number:

    mse_loss         (x - t)^2
    l1_loss          |x - t|
    smooth_l1_loss   (x - t)^2 / 2p where |x - t| < p, |x - t| - p / 2 elsewhere
    huber_loss       (x - t)^2 / 2 where |x - t| <= p, p (|x - t| - p / 2) elsewhere
    binary_cross_entropy_with_logits   (1 - t) x + ((q - 1) t + 1) log(1 + exp(-x)), q the weight of positives
    hinge_loss       max(0, 1 - t x);   squared_hinge_loss   max(0, 1 - t x)^2
    kl_div           t (log t - x), 0 where t = 0;   kl_div_log_target   exp(t) (t - x)

To add one, add a block: its functions and a row of `LOSSES`; and its public function, ten lines of ops/losses.py. A test
fails until its row is called there.

Forms. A Triton value maps float32 (x, t, q, p) to the loss, a gradient (g, x, t, q, p) to g times its derivative. The NumPy
twins do the same on contiguous arrays of one shape (q may broadcast, g be one number) into `out`, which is none of the
operands. They also take CuPy arrays: NumPy's ufuncs hand those on to CuPy.

Derivatives at kinks are torch's: 0 for |x - t| at 0 and for max(0, .) at 0. NaN goes through where torch lets it.
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
from ._triton import _cast, launch, tl, triton
from .activations import _np_exp, _np_relu_grad, _np_sigmoid_into, _sigmoid_pair

__all__ = [
    "LOSSES",
    "Loss",
    "divisor_of",
    "loss_bwd",
    "loss_fwd",
    "multi_margin_bwd",
    "multi_margin_fwd",
    "periodic",
]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _mse(x, t, q, p):
    d = x - t
    return d * d


@triton.jit
def _mse_grad(g, x, t, q, p):
    return g * (2.0 * (x - t))


@triton.jit
def _l1(x, t, q, p):
    return tl.abs(x - t)


@triton.jit
def _l1_grad(g, x, t, q, p):
    # 0 where the difference is NaN, as torch's sign.
    d = x - t
    return g * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))


@triton.jit
def _smooth_l1(x, t, q, p):
    d = tl.abs(x - t)
    return tl.where(d < p, 0.5 * d * d / p, d - 0.5 * p)


@triton.jit
def _smooth_l1_grad(g, x, t, q, p):
    d = x - t
    return g * tl.where(d >= p, 1.0, tl.where(d <= -p, -1.0, d / p))


@triton.jit
def _huber(x, t, q, p):
    d = tl.abs(x - t)
    return tl.where(d <= p, 0.5 * d * d, p * (d - 0.5 * p))


@triton.jit
def _huber_grad(g, x, t, q, p):
    d = x - t
    return g * tl.where(d >= p, p, tl.where(d <= -p, -p, d))


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(-|x|)), to a relative 4e-9 and the rounding of float32."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    # log(1 + e) = 2 artanh(z); a minimax polynomial of z^2, which is at most 1/9.
    z = e / (2.0 + e)
    u = z * z
    s = 0.40024595229818943 + u * (0.2796515775679465 + u * 0.28157778313522575)
    return z * (2.000000007681758 + u * (0.6666632164140144 + u * s))


@triton.jit
def _bce(x, t, q, p):
    # Negative x: (1 - t) x + ((q - 1) t + 1) |x| = -q t x. Added up as torch does, the two cancel.
    slant = tl.where(x < 0, t * -q, 1.0 - t)
    loss = slant * x + (t * (q - 1.0) + 1.0) * _log1p_exp(x)
    # There torch's two terms are infinities of different signs.
    return tl.where(x == float("-inf"), float("nan"), loss)


@triton.jit
def _bce_grad(g, x, t, q, p):
    s, rest = _sigmoid_pair(x)
    return g * ((1.0 - t) * s - t * q * rest)


@triton.jit
def _bce_target_grad(g, x, t, q, p):
    tail = _log1p_exp(x)
    return g * (q * (tl.where(x < 0, -x, 0.0) + tail) - (tl.where(x > 0, x, 0.0) + tail))


@triton.jit
def _plain_bce_target_grad(g, x, t, q, p):
    return g * -x


@triton.jit
def _hinge(x, t, q, p):
    m = 1.0 - t * x
    return tl.where(m <= 0, 0.0, m)


@triton.jit
def _hinge_grad(g, x, t, q, p):
    return tl.where(1.0 - t * x <= 0, 0.0, g) * -t


@triton.jit
def _hinge_target_grad(g, x, t, q, p):
    return tl.where(1.0 - t * x <= 0, 0.0, g) * -x


@triton.jit
def _squared_hinge(x, t, q, p):
    m = _hinge(x, t, q, p)
    return m * m


@triton.jit
def _squared_hinge_grad(g, x, t, q, p):
    m = 1.0 - t * x
    return tl.where(m <= 0, 0.0, g * (2.0 * m)) * -t


@triton.jit
def _squared_hinge_target_grad(g, x, t, q, p):
    m = 1.0 - t * x
    return tl.where(m <= 0, 0.0, g * (2.0 * m)) * -x


@triton.jit
def _kl_div(x, t, q, p):
    return tl.where(t == 0, 0.0, t * tl.log(t)) - t * x


@triton.jit
def _kl_div_grad(g, x, t, q, p):
    return g * -t


@triton.jit
def _kl_div_target_grad(g, x, t, q, p):
    # NaN at 0, where the derivative is infinite, as torch has it.
    return tl.where(t == 0, float("nan"), g * tl.log(t) + g - g * x)


@triton.jit
def _kl_div_log(x, t, q, p):
    return tl.exp2(t * LOG2E) * (t - x)


@triton.jit
def _kl_div_log_grad(g, x, t, q, p):
    return g * -tl.exp2(t * LOG2E)


@triton.jit
def _kl_div_log_target_grad(g, x, t, q, p):
    e = tl.exp2(t * LOG2E)
    return g * (t - x) * e + g * e


@functools.lru_cache(maxsize=16)
def _np_filled(value: float, dtype: Any) -> Any:
    return np.full(1 << 16, value, dtype)


def _np_like(value: float, a: Any) -> Any:
    """A number as an array like a: NumPy's minimum and maximum have vector loops for two arrays only, 4 times as fast."""
    if type(a) is np.ndarray and a.size <= 1 << 16:
        return _np_filled(value, a.dtype)[: a.size].reshape(a.shape)
    return value


# Elements that BLAS adds up in float32: as accurate as NumPy's pairwise sum, in less than half its time.
_RUN = 1024


def _np_dot(a: Any, b: Any | None = None) -> Any:
    """The sum of a b, or of a, in float64 of sums over short runs; still an array, so that a GPU need not wait."""
    a = a.reshape(-1)
    b = b if b is None else b.reshape(-1)
    if type(a) is not np.ndarray:
        return np.add.reduce(a if b is None else a * b, dtype=np.float64)
    whole = a.size - a.size % _RUN
    total: Any = np.float64(0)
    if whole:
        runs = _np_filled(1.0, a.dtype)[:_RUN] if b is None else b[:whole].reshape(-1, _RUN)
        total = np.add.reduce(np.vecdot(a[:whole].reshape(-1, _RUN), runs), dtype=np.float64)
    if whole < a.size:
        total += np.add.reduce(a[whole:] if b is None else a[whole:] * b[whole:], dtype=np.float64)
    return total


def _np_mse_sum(x: Any, t: Any, q: Any, p: float, out: Any) -> Any:
    np.subtract(x, t, out=out)
    return _np_dot(out, out)


def _np_mse(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    np.subtract(x, t, out=out)
    np.multiply(out, out, out=out)


def _np_mse_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    np.subtract(x, t, out=out)
    np.multiply(out, 2 * g, out=out)


def _np_l1(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    np.subtract(x, t, out=out)
    np.absolute(out, out=out)


def _np_l1_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    # NumPy's sign has no vector loop, and gives NaN for NaN.
    sign = np.greater(x, t).view(np.int8)
    np.subtract(sign, np.less(x, t).view(np.int8), out=sign)
    np.multiply(sign, g, out=out)


def _np_bounded(x: Any, t: Any, p: float, out: Any) -> None:
    """x - t within [-p, p]."""
    np.subtract(x, t, out=out)
    np.minimum(out, _np_like(p, out), out=out)
    np.maximum(out, _np_like(-p, out), out=out)


def _np_huber(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    # m (d - m / 2) with m = min(d, p) is both branches.
    np.subtract(x, t, out=out)
    np.absolute(out, out=out)
    m = np.minimum(out, _np_like(p, out))
    np.subtract(out, m * 0.5, out=out)
    np.multiply(out, m, out=out)


def _np_huber_sum(x: Any, t: Any, q: Any, p: float, out: Any) -> Any:
    np.subtract(x, t, out=out)
    np.absolute(out, out=out)
    m = np.minimum(out, _np_like(p, out))
    # The second is at most half of the first, and finite where p is.
    return _np_dot(out, m) - 0.5 * _np_dot(m, m)


def _np_huber_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_bounded(x, t, p, out)
    np.multiply(out, g, out=out)


def _np_smooth_l1(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_huber(x, t, q, p, out)
    np.divide(out, p, out=out)


def _np_smooth_l1_sum(x: Any, t: Any, q: Any, p: float, out: Any) -> Any:
    return _np_huber_sum(x, t, q, p, out) / p


def _np_smooth_l1_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_bounded(x, t, p, out)
    np.multiply(out, g / p, out=out)


def _np_log1p_exp(x: Any) -> Any:
    """log(1 + exp(-|x|))."""
    e = np.absolute(x)
    _np_exp(e, -1.0, e)
    return np.log1p(e, out=e)


def _np_bce(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    tail = _np_log1p_exp(x)
    if q is None:
        np.maximum(x, _np_like(0.0, x), out=out)
        np.subtract(out, t * x, out=out)
    else:
        # The slant of x: -q t where x is negative, 1 - t elsewhere. Masked copies are 10 times as slow.
        np.subtract(1, t, out=out)
        rise = np.multiply(t, q - 1)
        np.add(rise, 1, out=rise)
        np.multiply(tail, rise, out=tail)
        np.subtract(out, np.multiply(rise, np.less(x, 0)), out=out)
        np.multiply(out, x, out=out)
    np.add(out, tail, out=out)
    # Infinite logits, rare and so looked for in the sum: there torch adds (1 - t) x to log(1 + exp(-x)), and -inf is NaN.
    if type(out) is not np.ndarray or not np.isfinite(_np_dot(out)):
        infinite = np.isinf(x)
        np.copyto(out, np.where(x > 0, (1 - t) * x, np.nan), where=infinite)


def _np_bce_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_sigmoid_into(x, out)
    if q is not None:
        positive = t * q
        np.multiply(out, positive + 1 - t, out=out)
        np.subtract(out, positive, out=out)
    else:
        np.subtract(out, t, out=out)
    np.multiply(out, g, out=out)


def _np_bce_target_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    if q is None:
        np.negative(x, out=out)
    else:
        tail = _np_log1p_exp(x)
        np.maximum(x, _np_like(0.0, x), out=out)
        positive = out - x
        np.add(out, tail, out=out)
        np.subtract(q * (positive + tail), out, out=out)
    np.multiply(out, g, out=out)


def _np_hinge(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    np.multiply(t, x, out=out)
    np.subtract(1, out, out=out)
    np.maximum(out, _np_like(0.0, out), out=out)


def _np_hinge_slope(g: Any, x: Any, t: Any, factor: Any, squared: bool, out: Any) -> None:
    """-g factor, or -2 g factor (1 - t x), where 1 - t x is positive or NaN, and 0 elsewhere."""
    m = np.empty_like(out)
    _np_hinge(x, t, None, 0.0, m)
    _np_relu_grad(-2 * g * m if squared else -g, m, 0.0, out)
    np.multiply(out, factor, out=out)


def _np_hinge_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_hinge_slope(g, x, t, t, False, out)


def _np_hinge_target_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_hinge_slope(g, x, t, x, False, out)


def _np_squared_hinge(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_hinge(x, t, q, p, out)
    np.multiply(out, out, out=out)


def _np_squared_hinge_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_hinge_slope(g, x, t, t, True, out)


def _np_squared_hinge_target_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_hinge_slope(g, x, t, x, True, out)


def _np_log(t: Any, out: Any) -> None:
    """log t, finite at 0, where it meets a factor t: the smallest normal number changes no other t that matters."""
    np.add(t, np.finfo(t.dtype).tiny, out=out)
    np.log(out, out=out)


def _np_kl_div(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_log(t, out)
    np.multiply(out, t, out=out)
    np.subtract(out, t * x, out=out)


def _np_kl_div_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    np.multiply(t, -g, out=out)


def _np_kl_div_target_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    # t / t: NaN at 0, as torch has it.
    np.divide(t, t, out=out)
    np.multiply(out, g, out=out)
    np.add(out, np.log(t) * g, out=out)
    np.subtract(out, x * g, out=out)


def _np_kl_div_log(x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_exp(t, 1.0, out)
    np.multiply(out, t - x, out=out)


def _np_kl_div_log_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_exp(t, 1.0, out)
    np.multiply(out, -g, out=out)


def _np_kl_div_log_target_grad(g: Any, x: Any, t: Any, q: Any, p: float, out: Any) -> None:
    _np_exp(t, 1.0, out)
    slant = np.multiply(t - x, g)
    np.multiply(slant, out, out=slant)
    np.multiply(out, g, out=out)
    np.add(out, slant, out=out)


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss: see the module's docstring for the forms of its functions. A target gradient of None is -gradient."""

    value: Any
    gradient: Any
    np_value: Callable[[Any, Any, Any, float, Any], None]
    np_gradient: Callable[[Any, Any, Any, Any, float, Any], None]
    # torch's functions: the loss of (x, t, q, p, reduction), and gradients of (g, x, t, q, p), themselves differentiable.
    eager: Callable[..., torch.Tensor]
    eager_gradient: Callable[..., torch.Tensor]
    # The sum of the values, where there is a shorter way to it; like np_value, with `out` for scratch.
    np_sum: Callable[[Any, Any, Any, float, Any], Any] | None = None
    target_gradient: Any = None
    np_target_gradient: Callable[[Any, Any, Any, Any, float, Any], None] | None = None
    eager_target_gradient: Callable[..., torch.Tensor] | None = None
    # The target gradient where there is no q, if it is simpler.
    plain_target_gradient: Any = None
    # Whether the gradient of the input reads the input.
    reads_input: bool = True

    def target_gradient_for(self, q: Any) -> Any:
        """The Triton target gradient, None for -gradient, with this second operand."""
        plain = q is None and self.plain_target_gradient is not None
        return self.plain_target_gradient if plain else self.target_gradient


_aten = torch.ops.aten


def _eager_bce_gradient(g: Any, x: Any, t: Any, q: Any, p: float) -> torch.Tensor:
    if q is None:
        return g * (torch.sigmoid(x) - t)
    return g * ((q * t + 1 - t) * torch.sigmoid(x) - q * t)


def _eager_bce_target_gradient(g: Any, x: Any, t: Any, q: Any, p: float) -> torch.Tensor:
    return g * (-x if q is None else F.logsigmoid(-x) - q * F.logsigmoid(x))


def _eager_reduced(loss: torch.Tensor, reduction: str) -> torch.Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _eager_kl_div(x: Any, t: Any, reduction: str, log_target: bool) -> torch.Tensor:
    if reduction == "mean":
        # Without the warning, which the public function gives.
        return torch.kl_div(x, t, 1, log_target=log_target)
    return F.kl_div(x, t, reduction=reduction, log_target=log_target)


def _relu_gradient(g: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    gradient: torch.Tensor = _aten.threshold_backward(g, m, 0)
    return gradient


def _eager_squared_hinge_slope(g: Any, x: Any, t: Any) -> torch.Tensor:
    m = 1 - t * x
    return _relu_gradient(g * (2 * F.relu(m)), m)


LOSSES: dict[str, Loss] = {
    "mse_loss": Loss(
        value=_mse,
        gradient=_mse_grad,
        np_value=_np_mse,
        np_gradient=_np_mse_grad,
        np_sum=_np_mse_sum,
        eager=lambda x, t, q, p, r: F.mse_loss(x, t, reduction=r),
        eager_gradient=lambda g, x, t, q, p: _aten.mse_loss_backward(g, x, t, 0),
    ),
    "l1_loss": Loss(
        value=_l1,
        gradient=_l1_grad,
        np_value=_np_l1,
        np_gradient=_np_l1_grad,
        eager=lambda x, t, q, p, r: F.l1_loss(x, t, reduction=r),
        eager_gradient=lambda g, x, t, q, p: g * torch.sgn(x - t),
    ),
    "smooth_l1_loss": Loss(
        value=_smooth_l1,
        gradient=_smooth_l1_grad,
        np_value=_np_smooth_l1,
        np_gradient=_np_smooth_l1_grad,
        np_sum=_np_smooth_l1_sum,
        eager=lambda x, t, q, p, r: F.smooth_l1_loss(x, t, reduction=r, beta=p),
        eager_gradient=lambda g, x, t, q, p: _aten.smooth_l1_loss_backward(g, x, t, 0, p),
    ),
    "huber_loss": Loss(
        value=_huber,
        gradient=_huber_grad,
        np_value=_np_huber,
        np_gradient=_np_huber_grad,
        np_sum=_np_huber_sum,
        eager=lambda x, t, q, p, r: F.huber_loss(x, t, r, p),
        eager_gradient=lambda g, x, t, q, p: _aten.huber_loss_backward(g, x, t, 0, p),
    ),
    "binary_cross_entropy_with_logits": Loss(
        value=_bce,
        gradient=_bce_grad,
        np_value=_np_bce,
        np_gradient=_np_bce_grad,
        eager=lambda x, t, q, p, r: F.binary_cross_entropy_with_logits(x, t, reduction=r, pos_weight=q),
        eager_gradient=_eager_bce_gradient,
        target_gradient=_bce_target_grad,
        np_target_gradient=_np_bce_target_grad,
        eager_target_gradient=_eager_bce_target_gradient,
        plain_target_gradient=_plain_bce_target_grad,
    ),
    "hinge_loss": Loss(
        value=_hinge,
        gradient=_hinge_grad,
        np_value=_np_hinge,
        np_gradient=_np_hinge_grad,
        eager=lambda x, t, q, p, r: _eager_reduced(F.relu(1 - t * x), r),
        eager_gradient=lambda g, x, t, q, p: _relu_gradient(g, 1 - t * x) * -t,
        target_gradient=_hinge_target_grad,
        np_target_gradient=_np_hinge_target_grad,
        eager_target_gradient=lambda g, x, t, q, p: _relu_gradient(g, 1 - t * x) * -x,
    ),
    "squared_hinge_loss": Loss(
        value=_squared_hinge,
        gradient=_squared_hinge_grad,
        np_value=_np_squared_hinge,
        np_gradient=_np_squared_hinge_grad,
        eager=lambda x, t, q, p, r: _eager_reduced(F.relu(1 - t * x).square(), r),
        eager_gradient=lambda g, x, t, q, p: _eager_squared_hinge_slope(g, x, t) * -t,
        target_gradient=_squared_hinge_target_grad,
        np_target_gradient=_np_squared_hinge_target_grad,
        eager_target_gradient=lambda g, x, t, q, p: _eager_squared_hinge_slope(g, x, t) * -x,
    ),
    "kl_div": Loss(
        value=_kl_div,
        gradient=_kl_div_grad,
        np_value=_np_kl_div,
        np_gradient=_np_kl_div_grad,
        eager=lambda x, t, q, p, r: _eager_kl_div(x, t, r, False),
        eager_gradient=lambda g, x, t, q, p: -g * t,
        target_gradient=_kl_div_target_grad,
        np_target_gradient=_np_kl_div_target_grad,
        eager_target_gradient=lambda g, x, t, q, p: g * t.log() + g * (t / t) - g * x,
        reads_input=False,
    ),
    "kl_div_log_target": Loss(
        value=_kl_div_log,
        gradient=_kl_div_log_grad,
        np_value=_np_kl_div_log,
        np_gradient=_np_kl_div_log_grad,
        eager=lambda x, t, q, p, r: _eager_kl_div(x, t, r, True),
        eager_gradient=lambda g, x, t, q, p: -g * t.exp(),
        target_gradient=_kl_div_log_target_grad,
        np_target_gradient=_np_kl_div_log_target_grad,
        eager_target_gradient=lambda g, x, t, q, p: g * (t - x) * t.exp() + g * t.exp(),
        reads_input=False,
    ),
}


def divisor_of(shape: torch.Size, reduction: str) -> float:
    """What the sum over the losses of this shape is divided by: for "mean", "batchmean" (the first dimension), "sum"."""
    if reduction == "mean":
        return float(shape.numel())
    return float(shape[0]) if reduction == "batchmean" and len(shape) else 1.0


def periodic(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The weights as a vector w, of which element i of a contiguous tensor of this shape has w[i % len(w)].

    What repeats along leading dimensions stays as short as it is; any other broadcasting is written out.
    """
    trimmed = weight.shape
    while trimmed and trimmed[0] == 1 and weight.shape != shape:
        trimmed = trimmed[1:]
    # A kernel's remainder is of 32 bits.
    if trimmed != shape[len(shape) - len(trimmed) :] or weight.numel() >= 1 << 30:
        weight = weight.expand(shape)
    return weight.contiguous().reshape(-1)


@triton.jit
def _weights(w_ptr, start, offs, mask, period, FULL: tl.constexpr):
    """float32 w[offs % period], offs counted from start; a vector as long as the losses needs no remainder."""
    if FULL:
        pointers = w_ptr + (start + offs)
    else:
        pointers = w_ptr + ((start % period).to(tl.int32) + offs) % period
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _loss_terms(
    x_ptr,
    t_ptr,
    w_ptr,
    q_ptr,
    start,
    offs,
    mask,
    w_period,
    q_period,
    parameter,
    LOSS: tl.constexpr,
    W_FULL: tl.constexpr,
    Q_FULL: tl.constexpr,
):
    x = tl.load(x_ptr + (start + offs), mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + (start + offs), mask=mask, other=0.0).to(tl.float32)
    q = 1.0
    if q_ptr is not None:
        q = _weights(q_ptr, start, offs, mask, q_period, Q_FULL)
    loss = LOSS(x, t, q, parameter)
    if w_ptr is not None:
        loss *= _weights(w_ptr, start, offs, mask, w_period, W_FULL)
    return loss


# The sizes are not specialized on, or a partial last batch could compile anew; the body's mask never cuts a 128-bit vector,
# and one program sees to the few elements behind it.
@triton.jit(do_not_specialize=["n", "w_period", "q_period", "steps"])
def _loss_fwd_kernel(
    x_ptr,  # [n]
    t_ptr,  # [n]
    w_ptr,  # [w_period] or None
    q_ptr,  # [q_period] or None
    loss_ptr,  # [n], or [1] if REDUCE
    partial_ptr,  # [programs] float32: sums of the programs' losses; None unless REDUCE
    n,
    w_period,
    q_period,
    steps,
    parameter,
    divisor,
    LOSS: tl.constexpr,
    REDUCE: tl.constexpr,
    W_FULL: tl.constexpr,
    Q_FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    body = n // VECTOR * VECTOR
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) + tl.cast(step, tl.int64) * tl.num_programs(0)) * BLOCK
        mask = start + offs < body
        loss = _loss_terms(
            x_ptr, t_ptr, w_ptr, q_ptr, start, offs, mask, w_period, q_period, parameter, LOSS, W_FULL, Q_FULL
        )
        if REDUCE:
            acc += tl.where(mask, loss, 0.0)
        else:
            tl.store(loss_ptr + (start + offs), _cast(loss, loss_ptr.dtype.element_ty), mask=mask)
    total = tl.sum(acc, 0)
    if tl.program_id(0) == 0:
        start = tl.cast(body, tl.int64)
        tail = tl.arange(0, VECTOR)
        mask = start + tail < n
        loss = _loss_terms(
            x_ptr, t_ptr, w_ptr, q_ptr, start, tail, mask, w_period, q_period, parameter, LOSS, W_FULL, Q_FULL
        )
        if REDUCE:
            total += tl.sum(tl.where(mask, loss, 0.0), 0)
        else:
            tl.store(loss_ptr + (start + tail), _cast(loss, loss_ptr.dtype.element_ty), mask=mask)
    if REDUCE:
        # A single program's sum is all there is: no second launch.
        if tl.num_programs(0) == 1:
            tl.store(loss_ptr, _cast(total / divisor, loss_ptr.dtype.element_ty))
        else:
            tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["count"])
def _loss_reduce_kernel(
    partial_ptr,  # [count] float32
    loss_ptr,  # [1]
    count,
    divisor,
    BLOCK: tl.constexpr,
):
    """One program and so a fixed order: the same bits every time."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + offs, mask=offs < count, other=0.0)
    tl.store(loss_ptr, _cast(tl.sum(acc, 0) / divisor, loss_ptr.dtype.element_ty))


@triton.jit
def _loss_gradients(
    dloss_ptr,
    x_ptr,
    t_ptr,
    w_ptr,
    q_ptr,
    dx_ptr,
    dt_ptr,
    start,
    offs,
    mask,
    w_period,
    q_period,
    parameter,
    divisor,
    GRADIENT: tl.constexpr,
    TARGET_GRADIENT: tl.constexpr,
    ONE_DLOSS: tl.constexpr,
    W_FULL: tl.constexpr,
    Q_FULL: tl.constexpr,
):
    t = tl.load(t_ptr + (start + offs), mask=mask, other=0.0).to(tl.float32)
    x = 0.0
    if x_ptr is not None:
        x = tl.load(x_ptr + (start + offs), mask=mask, other=0.0).to(tl.float32)
    q = 1.0
    if q_ptr is not None:
        q = _weights(q_ptr, start, offs, mask, q_period, Q_FULL)
    if ONE_DLOSS:
        g = tl.load(dloss_ptr).to(tl.float32) / divisor
    else:
        g = tl.load(dloss_ptr + (start + offs), mask=mask, other=0.0).to(tl.float32)
    if w_ptr is not None:
        g = g * _weights(w_ptr, start, offs, mask, w_period, W_FULL)
    if dx_ptr is not None:
        dx = GRADIENT(g, x, t, q, parameter)
        tl.store(dx_ptr + (start + offs), _cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dt_ptr is not None:
        if TARGET_GRADIENT is None:
            dt = GRADIENT(-g, x, t, q, parameter)
        else:
            dt = TARGET_GRADIENT(g, x, t, q, parameter)
        tl.store(dt_ptr + (start + offs), _cast(dt, dt_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "w_period", "q_period"])
def _loss_bwd_kernel(
    dloss_ptr,  # [n], or [1] if ONE_DLOSS
    x_ptr,  # [n], or None where no gradient reads it
    t_ptr,  # [n]
    w_ptr,  # [w_period] or None
    q_ptr,  # [q_period] or None
    dx_ptr,  # [n] or None
    dt_ptr,  # [n] or None
    n,
    w_period,
    q_period,
    parameter,
    divisor,
    GRADIENT: tl.constexpr,
    TARGET_GRADIENT: tl.constexpr,
    ONE_DLOSS: tl.constexpr,
    W_FULL: tl.constexpr,
    Q_FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    body = n // VECTOR * VECTOR
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    _loss_gradients(
        dloss_ptr, x_ptr, t_ptr, w_ptr, q_ptr, dx_ptr, dt_ptr, start, offs, start + offs < body, w_period,
        q_period, parameter, divisor, GRADIENT, TARGET_GRADIENT, ONE_DLOSS, W_FULL, Q_FULL,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        start = tl.cast(body, tl.int64)
        tail = tl.arange(0, VECTOR)
        _loss_gradients(
            dloss_ptr, x_ptr, t_ptr, w_ptr, q_ptr, dx_ptr, dt_ptr, start, tail, start + tail < n, w_period,
            q_period, parameter, divisor, GRADIENT, TARGET_GRADIENT, ONE_DLOSS, W_FULL, Q_FULL,
        )  # fmt: skip


def _flat(weight: torch.Tensor | None, shape: torch.Size) -> tuple[torch.Tensor | None, int, bool]:
    """(vector, its period, whether that is all of them). By shapes, not by lengths: one that repeats stays one in a batch of
    one, which then compiles nothing of its own."""
    if weight is None:
        return None, 1, False
    vector = periodic(weight, shape)
    return vector, vector.numel(), weight.shape == shape or vector.numel() != weight.numel()


def _nothing(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """The sum of no losses over the divisor."""
    return x.new_full((), 0.0 if divisor else math.nan)


def _reduce(partial: torch.Tensor, loss: torch.Tensor, divisor: float) -> None:
    """The sum of the programs' sums, unless one program wrote the loss itself."""
    if len(partial) > 1:
        tile = configs.loss_reduce_tile()
        launch(
            _loss_reduce_kernel,
            (1,),
            partial,
            loss,
            len(partial),
            divisor,
            BLOCK=tile.block,
            num_warps=tile.num_warps,
        )


def loss_fwd(
    x: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
) -> torch.Tensor:
    """The loss of x and t of one shape, weight and q broadcasting to it; "none" writes each, else one launch sums by programs
    and a small one sums those."""
    x, t, reduce = x.contiguous(), t.contiguous(), reduction != "none"
    n, divisor = x.numel(), divisor_of(x.shape, reduction)
    if reduce and n == 0:
        return _nothing(x, divisor)
    w, w_period, w_full = _flat(weight, x.shape)
    q, q_period, q_full = _flat(q, x.shape)
    tile = tuning.tile(x.device, configs.loss_tile, x.dtype)
    blocks = triton.cdiv(n, tile.block)
    programs = configs.loss_programs(blocks) if reduce else blocks
    loss = x.new_empty(() if reduce else x.shape)
    partial = x.new_empty(programs, dtype=torch.float32) if reduce else None
    launch(
        _loss_fwd_kernel,
        (programs,),
        x,
        t,
        w,
        q,
        loss,
        partial,
        n,
        w_period,
        q_period,
        triton.cdiv(blocks, max(programs, 1)),
        parameter,
        divisor,
        LOSS=LOSSES[name].value,
        REDUCE=reduce,
        W_FULL=w_full,
        Q_FULL=q_full,
        BLOCK=tile.block,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    if partial is not None:
        _reduce(partial, loss, divisor)
    return loss


def loss_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor,
    weight: torch.Tensor | None,
    q: torch.Tensor | None,
    name: str,
    parameter: float,
    reduction: str,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dt), None where `needs` is False. x may be None where no gradient that is needed reads it."""
    t, row = t.contiguous(), LOSSES[name]
    x = x.contiguous() if x is not None and (needs[1] or row.reads_input) else None
    one = reduction != "none" or not any(dloss.stride())
    if not one:
        dloss = dloss.contiguous()
    dx, dt = (torch.empty_like(t) if need else None for need in needs)
    w, w_period, w_full = _flat(weight, t.shape)
    q, q_period, q_full = _flat(q, t.shape)
    tile = tuning.tile(t.device, configs.loss_tile, t.dtype)
    launch(
        _loss_bwd_kernel,
        (triton.cdiv(t.numel(), tile.block),),
        dloss,
        x,
        t,
        w,
        q,
        dx,
        dt,
        t.numel(),
        w_period,
        q_period,
        parameter,
        divisor_of(t.shape, reduction),
        GRADIENT=row.gradient,
        TARGET_GRADIENT=row.target_gradient_for(q) if needs[1] else None,
        ONE_DLOSS=one,
        W_FULL=w_full,
        Q_FULL=q_full,
        BLOCK=tile.block,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return dx, dt


@triton.jit
def _margin_rows(x_ptr, target_ptr, weight_ptr, N, C, stride_xn, BLOCK_M: tl.constexpr):
    """Row numbers, which there are, their targets (0 where none is readable), x_t, and w_t: NaN where the target is no
    class."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < N
    target = tl.load(target_ptr + rows, mask=live, other=0)
    valid = live & (target >= 0) & (target < C)
    target = tl.where(valid, target, 0)
    x_t = tl.load(x_ptr + rows * stride_xn + target, mask=live, other=0.0).to(tl.float32)
    w = tl.where(valid, 1.0, float("nan"))
    if weight_ptr is not None:
        w *= tl.load(weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    return rows, live, target, x_t, w


@triton.jit
def _margins(
    x_ptr, rows, live, target, x_t, start, C, stride_xn, margin, SQUARED: tl.constexpr, BLOCK_C: tl.constexpr
):
    """max(0, margin - x_t + x_j), and 1 or, SQUARED, twice that where it is positive, its slope: both 0 in the target's
    column and, as torch has it, where x is NaN."""
    cols = start + tl.arange(0, BLOCK_C)[None, :]
    mask = live[:, None] & (cols < C)
    x = tl.load(x_ptr + rows[:, None] * stride_xn + cols, mask=mask, other=float("-inf")).to(tl.float32)
    z = margin - x_t[:, None] + x
    over = mask & (z > 0) & (cols != target[:, None])
    if SQUARED:
        return tl.where(over, z * z, 0.0), tl.where(over, 2.0 * z, 0.0)
    else:
        return tl.where(over, z, 0.0), tl.where(over, 1.0, 0.0)


@triton.jit(do_not_specialize=["N"])
def _multi_margin_fwd_kernel(
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64
    weight_ptr,  # [C] or None
    loss_ptr,  # [N], or [1] if REDUCE
    partial_ptr,  # [programs] float32: sums of the programs' losses; None unless REDUCE
    N,
    C,
    stride_xn,
    margin,
    divisor,
    SQUARED: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, live, target, x_t, w = _margin_rows(x_ptr, target_ptr, weight_ptr, N, C, stride_xn, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        acc += _margins(x_ptr, rows, live, target, x_t, start, C, stride_xn, margin, SQUARED, BLOCK_C)[0]
    loss = tl.sum(acc, 1) * w / C
    if REDUCE:
        total = tl.sum(tl.where(live, loss, 0.0), 0)
        if tl.num_programs(0) == 1:
            tl.store(loss_ptr, _cast(total / divisor, loss_ptr.dtype.element_ty))
        else:
            tl.store(partial_ptr + tl.program_id(0), total)
    else:
        tl.store(loss_ptr + rows, _cast(loss, loss_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["N", "stride_dloss"])
def _multi_margin_bwd_kernel(
    dloss_ptr,  # [N], or [1] with stride_dloss 0
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64
    weight_ptr,  # [C] or None
    dx_ptr,  # [N, C] contiguous
    N,
    C,
    stride_xn,
    stride_dloss,
    margin,
    divisor,
    SQUARED: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A row that fits one tile is read once, a longer one twice: its target's gradient is a sum over the others."""
    rows, live, target, x_t, w = _margin_rows(x_ptr, target_ptr, weight_ptr, N, C, stride_xn, BLOCK_M)
    g = tl.load(dloss_ptr + rows * stride_dloss, mask=live, other=0.0).to(tl.float32) * w / divisor / C
    # Not held where it is 0 over all columns: a target that is no class makes the row NaN.
    total = tl.zeros((BLOCK_M,), tl.float32)
    if not RESIDENT:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            acc += _margins(x_ptr, rows, live, target, x_t, start, C, stride_xn, margin, SQUARED, BLOCK_C)[1]
        total = tl.sum(acc, 1)
    for start in range(0, BLOCK_C if RESIDENT else C, BLOCK_C):
        slope = _margins(x_ptr, rows, live, target, x_t, start, C, stride_xn, margin, SQUARED, BLOCK_C)[1]
        if RESIDENT:
            total = tl.sum(slope, 1)
        cols = start + tl.arange(0, BLOCK_C)[None, :]
        dx = tl.where(cols == target[:, None], -total[:, None], slope) * g[:, None]
        tl.store(
            dx_ptr + rows[:, None] * C + cols,
            _cast(dx, dx_ptr.dtype.element_ty),
            mask=live[:, None] & (cols < C),
        )


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def multi_margin_fwd(
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor | None,  # [C]
    p: int,
    margin: float,
    reduction: str,
) -> torch.Tensor:
    """sum_{j != t} w_t max(0, margin - x_t + x_j)^p / C of each row; NaN where the target is no class."""
    N, C = x.shape
    reduce, divisor = reduction != "none", float(N) if reduction == "mean" else 1.0
    if reduce and N == 0:
        return _nothing(x, divisor)
    x = _unit_columns(x)
    tile = tuning.tile(x.device, configs.multi_margin_tile, x.dtype, C)
    programs = triton.cdiv(N, tile.block_m)
    loss = x.new_empty(() if reduce else N)
    partial = x.new_empty(programs, dtype=torch.float32) if reduce else None
    launch(
        _multi_margin_fwd_kernel,
        (programs,),
        x,
        target.contiguous(),
        None if weight is None else weight.contiguous(),
        loss,
        partial,
        N,
        C,
        x.stride(0),
        margin,
        divisor,
        SQUARED=p == 2,
        REDUCE=reduce,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_n,
        num_warps=tile.num_warps,
    )
    if partial is not None:
        _reduce(partial, loss, divisor)
    return loss


def multi_margin_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: int,
    margin: float,
    reduction: str,
) -> torch.Tensor:
    """dx [N, C]."""
    N, C = x.shape
    x = _unit_columns(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = tuning.tile(x.device, configs.multi_margin_tile, x.dtype, C)
    launch(
        _multi_margin_bwd_kernel,
        (triton.cdiv(N, tile.block_m),),
        dloss,
        x,
        target.contiguous(),
        None if weight is None else weight.contiguous(),
        dx,
        N,
        C,
        x.stride(0),
        dloss.stride(0) if reduction == "none" else 0,
        margin,
        float(N) if reduction == "mean" else 1.0,
        SQUARED=p == 2,
        RESIDENT=tile.block_n >= C,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_n,
        num_warps=tile.num_warps,
    )
    return dx
