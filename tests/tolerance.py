"""The accuracy policy, in one place: an op passes at a dtype when its error against float64, both maximum and RMS, is at
most twice torch's own at that dtype on the same inputs, plus a floor. Nothing loosens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "PAIRS",
    "assert_accurate",
    "assert_conforms",
    "assert_same_bits",
    "bits",
    "run",
]

# Per dtype, in eps of the truth's own maximum (for the maximum error) and RMS (for the RMS error). Torch's error can be
# 0 by luck where there are few elements, so that twice it allows nothing.
FLOOR = {
    # Here the truth is torch itself, and each of the two carries the rounding of its own order of summation.
    torch.float64: 32,
    # A few roundings: of the sums, of the exponential, of the product with dy.
    torch.float32: 4,
    # One unit in the last place: sums are float32, so the one rounding that counts is the last. Near a tie it may go
    # the other way.
    torch.bfloat16: 1,
    torch.float16: 1,
}

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What each backend takes, for parametrize(("backend", "dtype"), PAIRS, indirect=["backend"]).
PAIRS = [("fallback", torch.float64), *((name, dtype) for name in ("fallback", "triton") for dtype in DTYPES)]


NAN = float("nan")
# Matrices equal to the given one that lie in memory in another way, with NaN in what they skip; the last two hold its first
# row or element alone.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "rows apart": lambda t: t.new_full((2 * t.shape[0] + 1, t.shape[1] + 5), NAN)[1::2, 2:-3].copy_(t),
    "columns apart": lambda t: t.new_full((t.shape[0] + 2, 2 * t.shape[1]), NAN)[1:-1, ::2].copy_(t),
    "one element in": lambda t: torch.cat([t.new_full((1,), NAN), t.reshape(-1)])[1:].view(t.shape),
    "stride 0": lambda t: t[:1].expand(t.shape),
    "stride 0 both ways": lambda t: t[:1, :1].expand(t.shape),
}


def _max_and_rms(values: torch.Tensor) -> tuple[float, float]:
    return values.abs().max().item(), values.square().mean().sqrt().item()


def assert_accurate(
    actual: torch.Tensor, truth: torch.Tensor, expected: torch.Tensor, what: str = "result"
) -> None:
    """`actual` has the dtype, shape, NaNs and infinities of torch's own result `expected`, and is as accurate.

    Where torch's result is not finite, float64's value will do as well: torch's float32 gelu(inf) is inf or NaN by the
    number of elements.
    """
    got, wanted = ((t.dtype, tuple(t.shape), t.device.type) for t in (actual, expected))
    assert got == wanted, f"{what}: {got}, torch gives {wanted}"
    a, e, t = (x.detach().double() for x in (actual, expected, truth))
    special = ~e.isfinite()
    alike = [(a == x) | (a.isnan() & x.isnan()) for x in (e, t)]
    same = torch.where(special, alike[0] | alike[1], a.isfinite())
    assert same.all(), f"{what}: not finite, or not as torch is: {a[~same][:4]}, torch gives {e[~same][:4]}"
    keep = ~special & t.isfinite()
    if not keep.any():
        return
    a, e, t = a[keep], e[keep], t[keep]
    eps = FLOOR[actual.dtype] * torch.finfo(actual.dtype).eps
    for kind, error, own, scale in zip(
        ("maximum", "RMS"), _max_and_rms(a - t), _max_and_rms(e - t), _max_and_rms(t), strict=True
    ):
        limit = 2 * own + eps * scale
        assert error <= limit, f"{what}: {kind} error {error:.3g} > {limit:.3g}; torch's own is {own:.3g}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers: equal where NaN is."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def assert_same_bits(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(bits(a), bits(e))


def run(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    upstream: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype | None = None,
    frozen: Sequence[int] = (),
) -> list[torch.Tensor]:
    """[function(*inputs), the gradients of its floating inputs], at another dtype if one is given."""
    leaves = []
    for i, x in enumerate(inputs):
        if x is not None and x.is_floating_point():
            x = x.detach() if dtype is None else x.detach().to(dtype)
            x.requires_grad_(i not in frozen)
        leaves.append(x)
    y = function(*leaves)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    dy = upstream(y.detach())
    return [y.detach(), *torch.autograd.grad(y, wanted, dy if dtype is None else dy.to(dtype))]


def assert_conforms(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    inputs: Sequence[Any],
    upstream: Callable[[torch.Tensor], torch.Tensor] | None = None,
    frozen: Sequence[int] = (),
) -> list[torch.Tensor]:
    """Result and gradients are accurate, and the inputs keep their bits; gives [result, gradients]."""
    before = [None if x is None else bits(x).clone() for x in inputs]
    result = theirs(*inputs)
    dy = torch.randn_like(result) if upstream is None else upstream(result)
    dy_before = bits(dy).clone()
    found = run(ours, inputs, lambda y: dy, frozen=frozen)
    expected = run(theirs, inputs, lambda y: dy, frozen=frozen)
    truth = run(theirs, inputs, lambda y: dy, torch.float64, frozen)
    for i, (a, t, e) in enumerate(zip(found, truth, expected, strict=True)):
        assert_accurate(a, t, e, f"gradient {i}" if i else "result")
    assert torch.equal(bits(dy), dy_before)
    for x, old in zip(inputs, before, strict=True):
        assert x is None or torch.equal(bits(x), old)
    return found
