"""What is compared, and on what: providers of the library's functions, and cases that run on any provider.

A case builds from a provider one function without arguments that does the work and returns the results. The same case in
float64 on torch is the truth that every provider's results are held to before any of them is timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.kernels.activations import lookup

__all__ = ["PROVIDERS", "Case", "Provider", "adam", "check", "cross_entropy", "linear", "training_step"]

Outputs = Sequence[torch.Tensor]
Call = Callable[[], Outputs]


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to run what the library runs; a further library is a further row of PROVIDERS."""

    name: str
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str | None], torch.Tensor]
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    adam: Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def _torch_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, activation: str | None) -> torch.Tensor:
    return lookup(activation).eager(F.linear(x, w, b), 0.01)


PROVIDERS = {
    "torch": Provider("torch", _torch_linear, F.cross_entropy, torch.optim.Adam),
    "dlgpu": Provider(
        "dlgpu",
        lambda x, w, b, activation: dlgpu.functional.linear(x, w, b, activation=activation),
        dlgpu.functional.cross_entropy,
        lambda params: dlgpu.optim.Adam(params),
    ),
}


def compiled(provider: Provider) -> Provider:
    """torch.compile of a provider's functions; its optimizer as it is."""
    return Provider(
        f"{provider.name} compiled",
        torch.compile(provider.linear, dynamic=False),
        torch.compile(provider.cross_entropy, dynamic=False),
        provider.adam,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    build: (provider, device, dtype, seed) -> the function that is timed. Equal seeds give equal inputs, rounded to the
        case's dtype first where `dtype` is wider.
    flops: of the products in one call, None where there are none.
    jumps: its results jump where rounding flips the sign of a hidden unit, so that they are held to float64's as a whole
        and not element by element.
    """

    op: str
    passes: str
    shape: dict[str, int]
    dtype: torch.dtype
    build: Callable[[Provider, str, torch.dtype, int], Call]
    flops: int | None = None
    note: str = ""
    jumps: bool = False

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {self.passes} {sizes}" + (f", {self.note}" if self.note else "")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _normal(
    generator: torch.Generator,
    shape: Sequence[int],
    scale: float,
    device: str,
    rounded: torch.dtype,
    dtype: torch.dtype,
) -> torch.Tensor:
    # On the device itself: a billion logits take minutes on the host.
    values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).mul_(scale)
    return values.to(rounded).to(dtype)


_KINKED = ("relu", "leaky_relu")


def linear(
    M: int, N: int, K: int, activation: str | None, dtype: torch.dtype = torch.float32, backward: bool = True
) -> Case:
    """act(x w^T + b), x [M, K]; with `backward` also the gradients of all three."""

    def build(provider: Provider, device: str, wide: torch.dtype, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        x = _normal(generator, (M, K), 1.0, device, dtype, wide).requires_grad_(backward)
        w = _normal(generator, (N, K), K**-0.5, device, dtype, wide).requires_grad_(backward)
        b = _normal(generator, (N,), 1.0, device, dtype, wide).requires_grad_(backward)
        dy = _normal(generator, (M, N), 1.0, device, dtype, wide)
        if activation in _KINKED:
            with torch.no_grad():
                # Next to the kink rounding decides which derivative it is, in torch's float32 too.
                dy[F.linear(x.float(), w.float(), b.float()).abs() < 1e-3] = 0

        def call() -> Outputs:
            y = provider.linear(x, w, b, activation)
            # torch.autograd.grad, since adding into .grad would be a pass of its own.
            return (y, *torch.autograd.grad(y, (x, w, b), dy)) if backward else (y,)

        return call

    return Case(
        f"linear + {activation}" if activation else "linear",
        "fwd+bwd" if backward else "fwd",
        {"M": M, "N": N, "K": K},
        dtype,
        build,
        flops=2 * M * N * K * (3 if backward else 1),
    )


def cross_entropy(N: int, V: int, dtype: torch.dtype = torch.float32, backward: bool = True) -> Case:
    """Mean cross-entropy of logits [N, V]."""

    def build(provider: Provider, device: str, wide: torch.dtype, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        x = _normal(generator, (N, V), 2.0, device, dtype, wide).requires_grad_(backward)
        target = torch.randint(0, V, (N,), generator=generator, device=device)

        def call() -> Outputs:
            loss = provider.cross_entropy(x, target)
            return (loss, *torch.autograd.grad(loss, (x,))) if backward else (loss,)

        return call

    return Case("cross_entropy", "fwd+bwd" if backward else "fwd", {"N": N, "V": V}, dtype, build)


def adam(shapes: Sequence[tuple[int, ...]], note: str = "", dtype: torch.dtype = torch.float32) -> Case:
    """One step of Adam with its default arguments."""

    def build(provider: Provider, device: str, wide: torch.dtype, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        params = [_normal(generator, shape, 1.0, device, dtype, wide).requires_grad_() for shape in shapes]
        for param in params:
            param.grad = _normal(generator, param.shape, 0.01, device, dtype, wide)
        optimizer = provider.adam(params)

        def call() -> Outputs:
            optimizer.step()
            return [
                *params,
                *(optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")),
            ]

        return call

    numel = sum(math.prod(shape) for shape in shapes)
    return Case("adam", "step", {"n": numel, "tensors": len(shapes)}, dtype, build, note=note)


def mlp_shapes(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes of an MLP's parameters: weight and bias of each layer."""
    return [shape for i, o in itertools.pairwise(sizes) for shape in ((o, i), (o,))]


def training_step(sizes: Sequence[int], batch: int, dtype: torch.dtype = torch.float32) -> Case:
    """Forward, loss, backward and Adam of a ReLU network; gradients are set to None, as zero_grad does."""

    def build(provider: Provider, device: str, wide: torch.dtype, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        params = []
        for shape in mlp_shapes(sizes):
            scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
            params.append(_normal(generator, shape, scale, device, dtype, wide).requires_grad_())
        x = _normal(generator, (batch, sizes[0]), 1.0, device, dtype, wide)
        target = torch.randint(0, sizes[-1], (batch,), generator=generator, device=device)
        optimizer = provider.adam(params)

        def call() -> Outputs:
            optimizer.zero_grad(set_to_none=True)
            h = x
            for layer in range(0, len(params), 2):
                last = layer == len(params) - 2
                h = provider.linear(h, params[layer], params[layer + 1], None if last else "relu")
            loss = provider.cross_entropy(h, target)
            loss.backward()
            optimizer.step()
            # Not the parameters: Adam's first step is lr times the gradient's sign, whatever rounding made that.
            return [loss, *(param.grad for param in params if param.grad is not None)]

        return call

    name = "-".join(map(str, sizes))
    return Case("training step", name, {"batch": batch}, dtype, build, jumps=True)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a provider's results are right; `worst` is the largest error over what is allowed."""

    right: bool
    worst: float
    detail: str


# As in tests/tolerance.py: at most twice torch's own error, plus a few roundings. What torch itself is allowed is only to
# find a broken input or a wrong reference.
_FLOOR = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1, torch.float64: 32}
_OWN_FLOOR = 64
# Of the RMS, for results that jump: a few flipped units of a layer.
_JUMP = 1e-2


def check(outputs: Outputs, own: Outputs, truth: Outputs, jumps: bool = False) -> Verdict:
    """Holds a provider's `outputs` to the float64 `truth`, as torch's `own` in the same dtype measures it."""
    if len(outputs) != len(truth):
        return Verdict(False, math.inf, f"{len(outputs)} results, expected {len(truth)}")
    worst = Verdict(True, 0.0, "")
    for i, (actual, reference, exact) in enumerate(zip(outputs, own, truth, strict=True)):
        if actual.shape != exact.shape or actual.dtype != reference.dtype:
            return Verdict(False, math.inf, f"result {i} is {actual.dtype} {list(actual.shape)}")
        for kind, norm in (("RMS", _rms),) if jumps else (("maximum", _maximum), ("RMS", _rms)):
            error, scale = norm(_error(actual, exact)), norm(exact)
            if jumps:
                allowed = _JUMP * scale
            elif outputs is own:
                allowed = _OWN_FLOOR * torch.finfo(actual.dtype).eps * scale
            else:
                floor = _FLOOR[actual.dtype] * torch.finfo(actual.dtype).eps
                allowed = floor * scale + 2 * norm(_error(reference, exact))
            share = error / allowed if allowed else (0.0 if error == 0 else math.inf)
            # `not <=`, so that NaN is wrong.
            found = Verdict(share <= 1, share, f"result {i}: {kind} error {error:.3g}, allowed {allowed:.3g}")
            if not found.right:
                return found
            worst = max(worst, found, key=lambda verdict: verdict.worst)
    return worst


def _error(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return actual.detach().double() - exact.detach()


def _maximum(x: torch.Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt()) if x.numel() else 0.0


def verify(case: Case, provider: Provider, device: str, seed: int) -> tuple[Verdict, Any]:
    """The verdict on `provider` for a case, on inputs of `seed`, and the built call, ready to be timed."""
    torch_provider = PROVIDERS["torch"]
    truth = [t.detach() for t in case.build(torch_provider, device, torch.float64, seed)()]
    own = [t.detach().clone() for t in case.build(torch_provider, device, case.dtype, seed)()]
    if not (verdict := check(own, own, truth, case.jumps)).right:
        return dataclasses.replace(verdict, detail=f"torch itself: {verdict.detail}"), None
    call = case.build(provider, device, case.dtype, seed)
    return check([t.detach() for t in call()], own, truth, case.jumps), call
