"""Who is compared: the libraries that may offer an op, which of them are here, and whether results are right.

A row of PROVIDERS is one: the module that must be importable for it, and, where it is no function of an op's own
(`Op.functions`), how its function is made of another's. What is not installed is absent, and is never stood in for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import dlgpu

from .cases import Op

__all__ = [
    "BOUNDS",
    "COMPILED",
    "PROVIDERS",
    "Provider",
    "Verdict",
    "absent",
    "check",
    "function",
    "offered",
    "version",
]

Outputs = Sequence[torch.Tensor]
Function = Callable[..., Any]


def _under_fallback(function: Function) -> Function:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with dlgpu.use_backend("fallback"):
            return function(*args, **kwargs)

    return call


def _compiled(**settings: Any) -> Callable[[Function], Function]:
    def compiled(function: Function) -> Function:
        import torch._dynamo.config as config

        # Each shape is compiled anew; at its default limit torch would go on uncompiled, and say nothing.
        config.recompile_limit = config.accumulated_recompile_limit = 1 << 16
        return torch.compile(function, dynamic=False, **settings)

    return compiled


@dataclasses.dataclass(frozen=True)
class Provider:
    """One of those who are compared.

    says: what it is, in a few words.
    module: what must be importable.
    package: what to install for that.
    of, by: it is `by` of what the library `of` offers.
    device: the only one that it runs on, if there is one.
    """

    name: str
    says: str
    module: str = "torch"
    package: str = ""
    of: str = ""
    by: Callable[[Function], Function] | None = None
    device: str = ""


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("dlgpu", "this library, as it is called"),
        Provider("fallback", "this library's NumPy fallback", of="dlgpu", by=_under_fallback, device="cpu"),
        Provider(
            "cupy",
            "this library's fallback, on a GPU by CuPy",
            "cupy",
            "cupy-cuda13x",
            "dlgpu",
            _under_fallback,
            "cuda",
        ),
        Provider("eager", "torch's own operations, one after another"),
        Provider("eager-float", "the same in float32, as language models' losses are written"),
        Provider("torch-fused", "torch's own fused operations"),
        Provider("compile", "torch.compile of eager", of="eager", by=_compiled()),
        Provider(
            "compile-max",
            "torch.compile of eager, max-autotune-no-cudagraphs",
            of="eager",
            by=_compiled(mode="max-autotune-no-cudagraphs"),
        ),
        Provider("cublaslt", "torch's matrix products alone: a bound, not the op"),
        Provider("liger", "Liger Kernel", "liger_kernel", "liger-kernel", device="cuda"),
        Provider("cce", "Cut Cross-Entropy", "cut_cross_entropy", "cut-cross-entropy", device="cuda"),
        Provider(
            "cce-exact",
            "Cut Cross-Entropy without leaving out small gradients",
            "cut_cross_entropy",
            "cut-cross-entropy",
            device="cuda",
        ),
        Provider("quack", "QuACK", "quack", "quack-kernels", device="cuda"),
        Provider("attorch", "attorch, from its source", "attorch", device="cuda"),
    )
}
# These compute less than the op: their truth is what they themselves give in float64.
BOUNDS = ("cublaslt",)
# These compile on a CPU too.
COMPILED = ("compile", "compile-max")


def version(provider: Provider) -> str | None:
    """Of the installed package, "" where it does not say; None where it is not installed."""
    if provider.module == "torch":
        return dlgpu.__version__ if "dlgpu" in (provider.name, provider.of) else torch.__version__
    try:
        if importlib.util.find_spec(provider.module) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return importlib.metadata.version(provider.package or provider.module)
    except importlib.metadata.PackageNotFoundError:
        return ""


def absent(provider: Provider, device: str = "") -> str | None:
    """Why it cannot run here, or None. Nothing is imported for that."""
    if version(provider) is None:
        how = f" (pip install {provider.package})" if provider.package else ""
        return f"{provider.module} is not installed{how}"
    if provider.device and device and provider.device != device:
        return f"runs on {'an NVIDIA GPU' if provider.device == 'cuda' else 'a CPU'} only"
    return None


def offered(op: Op, name: str, options: Mapping[str, Any], passes: str) -> str | None:
    """Why a provider does not offer this of an op, or None."""
    provider = PROVIDERS[name]
    if name not in op.functions and (not provider.of or provider.of not in op.functions):
        return f"offers no {op.name}"
    refuses = op.refuses.get(name)
    return refuses({**op.defaults(), **options}, passes) if refuses else None


def function(op: Op, name: str) -> Function:
    """The provider's function of the op's inputs."""
    if name in op.functions:
        return op.functions[name]
    provider = PROVIDERS[name]
    if provider.by is None:
        raise KeyError(f"{name} offers no {op.name}")
    return provider.by(op.functions[provider.of])


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
        # Results that are kept wider than torch's are held to no more.
        wider = actual.dtype == torch.float32 and reference.dtype in (torch.bfloat16, torch.float16)
        if actual.shape != exact.shape or (actual.dtype != reference.dtype and not wider):
            return Verdict(False, math.inf, f"result {i} is {actual.dtype} {list(actual.shape)}")
        for kind, norm in (("RMS", _rms),) if jumps else (("maximum", _maximum), ("RMS", _rms)):
            error, scale = norm(_error(actual, exact)), norm(exact)
            if jumps:
                allowed = _JUMP * scale
            elif outputs is own:
                allowed = _OWN_FLOOR * torch.finfo(reference.dtype).eps * scale
            else:
                floor = _FLOOR[reference.dtype] * torch.finfo(reference.dtype).eps
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
