"""Ops in PyTorch's own dispatcher, and the choice between the backends that can run them.

An op has a schema whose last argument is `str backend`, one implementation per backend, and a fake one for tracing:

    triton    the kernels of dlgpu.kernels: compiled for CUDA tensors, or interpreted (TRITON_INTERPRET=1) for CPU ones
    fallback  the array code of dlgpu.fallback: NumPy for CPU tensors, CuPy for CUDA tensors without Triton
    torch     torch's own functions, and its own autograd: CUDA tensors that the kernels do not take (float64; bfloat16 below
              capability 8.0), CPU tensors where those were measured ahead of NumPy (configs.cpu_backend), and every call
              within torch.func's transforms or forward-mode differentiation

The public function resolves the choice once and passes it down; forward keeps it for backward, which runs on autograd's
own threads and so must not read a thread-local again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.library import Library, register_fake

from dlgpu.kernels import _triton, configs

__all__ = [
    "Explanation",
    "Op",
    "available_backends",
    "choose_backend",
    "debug",
    "define",
    "differentiable_vjp",
    "differentiates",
    "direct",
    "explain",
    "may_read",
    "transformed",
    "use_backend",
    "wanted_backend",
]

BACKENDS = ("auto", "triton", "fallback")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = Library("dlgpu", "DEF")


def _valid(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


class _Settings(threading.local):
    # Not a ContextVar: Dynamo cannot trace one. Nor an attribute of the class: a graph that was compiled before the first
    # block would not be guarded by what hides it.
    def __init__(self) -> None:
        self.backend: str | None = None


_settings = _Settings()
_default_backend = _valid(os.environ.get("DLGPU_BACKEND", "auto"), "the environment variable DLGPU_BACKEND")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, this thread's calls of dlgpu run on `backend`.

    Args:
        backend: "auto" (by the tensor's device), "triton" or "fallback". Outside any block the environment variable
            DLGPU_BACKEND holds, read when dlgpu is imported; without it, "auto".

    Raises:
        ValueError: if there is no such backend. A backend that cannot run raises where it is called on (RuntimeError, or
            TypeError for a dtype that it does not take); nothing ever falls back in silence.
    """
    before = _settings.backend
    _settings.backend = _valid(backend, "backend")
    try:
        yield
    finally:
        _settings.backend = before


def wanted_backend() -> str:
    """This thread's setting."""
    return _settings.backend or _default_backend


def available_backends() -> tuple[str, ...]:
    """The backends that can run here on some device, best first. Makes no CUDA call beyond asking whether there is one."""
    found = []
    if _triton.INTERPRETED or (_triton.AVAILABLE and torch.cuda.is_available()):
        found.append("triton")
    return (*found, "fallback")


@functools.cache
def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


def _size(tensor: torch.Tensor) -> int:
    """The number of elements; 0 in a trace, where a choice by a size that is a symbol would hold the graph to some sizes."""
    return 0 if torch.compiler.is_compiling() else tensor.numel()


def _choose(tensor: torch.Tensor, op: str) -> tuple[str, str]:
    """(backend, why)."""
    device, dtype = tensor.device, tensor.dtype
    wanted = wanted_backend()
    if wanted == "fallback":
        return "fallback", "chosen explicitly"
    cuda = device.type == "cuda"
    if wanted == "triton":
        if not _triton.AVAILABLE:
            raise RuntimeError("backend 'triton' was chosen, but Triton is not installed")
        if not cuda and not _triton.INTERPRETED and device.type != "meta":
            raise RuntimeError(
                f"backend 'triton' was chosen for a tensor on {device}: the kernels run on CUDA tensors, or on CPU "
                "tensors in Triton's interpreter (set TRITON_INTERPRET=1 before Triton is imported)"
            )
        if dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"backend 'triton' was chosen, but its kernels take {_names(KERNEL_DTYPES)}, not {dtype}"
            )
        return "triton", "chosen explicitly" + (" (Triton's interpreter)" if _triton.INTERPRETED else "")
    if not cuda:
        backend = configs.cpu_backend(op, dtype, _size(tensor))
        ahead = "; at this size and dtype torch's own functions are ahead of NumPy there"
        return backend, f"the tensor is on {device.type}" + (ahead if backend == "torch" else "")
    if dtype not in KERNEL_DTYPES:
        return "torch", f"the kernels do not take {dtype}"
    if not _triton.AVAILABLE:
        if _has_cupy():
            return "fallback", "Triton is not installed; CuPy is"
        raise RuntimeError(
            "CUDA tensors need Triton (pip install triton) or CuPy (the extra cupy13 or cupy12)"
        )
    if dtype is torch.bfloat16 and _triton.device_limits(device)[0] < 80:
        return "torch", "bfloat16 kernels need capability 8.0"
    return "triton", f"the tensor is on {device.type}"


def choose_backend(tensor: torch.Tensor, op: str) -> str:
    """The backend for a call of `op` whose first operand is `tensor`, under this thread's setting."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{op.removesuffix('_extra')}: got a tensor of layout {kind}, expected a strided one")
    if _settings.backend is None and _default_backend == "auto" and tensor.is_cpu:
        return configs.cpu_backend(op, tensor.dtype, _size(tensor))
    return _choose(tensor, op)[0]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def define(
    schema: str,
    *,
    triton: Callable[..., Any],
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    eager: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
    autocast: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Op:
    """Defines op `dlgpu::<name>`.

    Args:
        schema: as torch's Library takes it; the last argument must be `str backend`.
        triton, fallback: implementations on tensors, without the argument `backend`.
        fake: shapes and dtypes for tracing, with all arguments.
        eager: likewise torch's own, from differentiable operations. It is the backend "torch", and serves torch.func's
            transforms and forward-mode differentiation, whatever the backend: torch has a rule for each of its operations,
            of any order and nesting, and a kernel has none. None for the ops that other ops' autograd consists of.
        autograd: what to run at the Autograd key, with all arguments; it ends in `Op.below`. None as for `eager`.
        autocast: maps (all arguments, the autocast dtype) to cast arguments; None leaves autocast without effect.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=tuple(tags))
    table = {"triton": triton, "fallback": fallback}

    def run(*args: Any) -> Any:
        return table[args[-1]](*args[:-1])

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    register_fake(f"dlgpu::{name}", fake, lib=_library)
    op = getattr(torch.ops.dlgpu, name).default
    if eager is not None and autograd is not None:
        table["torch"] = eager
        _library.impl(name, _unless_transformed(autograd, eager), "Autograd")
        _library.impl(name, lambda *args: eager(*args[:-1]), "FuncTorchBatched")
    if autocast is not None:
        for device in ("CPU", "CUDA"):
            _library.impl(name, _autocast_kernel(op, autocast, device), f"Autocast{device}")
    return Op(op, table, autograd)


# Python has no name for it.
_VMAP = torch._C._dispatch_key_parse("VmapMode")


def transformed() -> bool:
    """Whether a torch.func transform, forward-mode differentiation or autograd's is_grads_batched is about."""
    # Dynamo traces no such question (torch 2.11), and what it traces asks again when it runs.
    return not torch.compiler.is_dynamo_compiling() and (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)
    )


def differentiates() -> bool:
    """For a backward: whether its results must be differentiable in their turn, or batched, so from torch's operations."""
    return torch.is_grad_enabled() or transformed()


def _unless_transformed(autograd: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """`autograd`, but torch's own operations, and their autograd, within a transform and where torch is the backend."""

    def run(*args: Any) -> Any:
        return eager(*args[:-1]) if args[-1] == "torch" or transformed() else autograd(*args)

    return run


def may_read(tensor: torch.Tensor) -> bool:
    """Whether a check may look at the tensor's values: not on a GPU, for it synchronizes, unless debugging; not in a vmap."""
    # A tensor of another class stands for values that tracing does not have.
    if (not tensor.is_cpu and not _debug) or type(tensor) not in _PLAIN:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), str, float, int, bool, tuple, list))


_LISTS = frozenset((tuple, list))


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether no functorch transform, trace or tensor subclass wants to see a call with these arguments."""
    kinds = set(map(type, args))
    return (
        kinds <= _PLAIN
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and (
            kinds.isdisjoint(_LISTS)
            or all(_PLAIN.issuperset(map(type, arg)) for arg in args if type(arg) in _LISTS)
        )
    )


def direct(args: tuple[Any, ...]) -> bool:
    """Whether an op with these arguments, a tensor first, may run at once below autograd: no tracing, no mode, no profiler."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and _plain(args)
        and (args[0].is_cpu or args[0].is_cuda)
        and not torch._C._len_torch_dispatch_stack()
        and not torch.autograd.profiler._is_profiler_enabled
    )


class Op:
    """An op of the dispatcher, called by the shortest way that gives the dispatcher's result.

    Two trips through the dispatcher into Python take about 8 us, as long as a small layer's arithmetic on the CPU. So where
    it would do no more than find an implementation, that is called at once: for plain tensors on a CPU or a GPU, with no
    tracing, mode, transform, autocast or profiler about.
    """

    __slots__ = ("_autograd", "_implementations", "overload")

    def __init__(
        self,
        overload: Any,
        implementations: dict[str, Callable[..., Any]],
        autograd: Callable[..., Any] | None,
    ) -> None:
        self.overload = overload
        self._implementations = implementations
        self._autograd = autograd

    def __call__(self, *args: Any) -> Any:
        """What `overload` gives: autocast, then autograd, then the implementation of the backend."""
        if (
            self._autograd is not None
            and not torch.compiler.is_compiling()
            and not torch._C._is_any_autocast_enabled()
            and forward_ad._current_level < 0
            and _plain(args)
        ):
            if args[-1] == "torch":
                return self._implementations["torch"](*args[:-1])
            return self._autograd(*args)
        return self.overload(*args)

    def below(self, *args: Any) -> Any:
        """The op below autograd: for the functions at its Autograd key, and for backward."""
        if torch.compiler.is_dynamo_compiling():
            # Compiled autograd traces a backward, which Dynamo sees otherwise nothing of.
            return self.overload(*args)
        # The guard also keeps results from counting as views, which may not be modified in place.
        with torch._C._AutoDispatchBelowAutograd():
            if (
                _plain(args)
                and (args[0].is_cpu or args[0].is_cuda)
                and not torch._C._len_torch_dispatch_stack()
                and not torch.autograd.profiler._is_profiler_enabled
            ):
                return self._implementations[args[-1]](*args[:-1])
            return self.overload(*args)


def _autocast_kernel(op: Any, cast: Callable[..., Any], device: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast(args, torch.get_autocast_dtype(device_type)))

    return run


def cast_floating(args: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments with floating tensors, in lists too, cast to `dtype`, float64 left alone: torch's rule for eligible
    tensors."""
    return tuple(
        list(cast_floating(a, dtype))
        if isinstance(a, (list, tuple))
        else a.to(dtype)
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dtype is not torch.float64
        else a
        for a in args
    )


def differentiable_vjp(
    function: Callable[..., Any], inputs: Sequence[Any], needs: Sequence[bool], grads: Any
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `function(*inputs)` with respect to the inputs that `needs` marks, themselves differentiable.

    For the backward of a backward: raw ops have no derivative, so it is rebuilt from torch's own operations. A function
    of several results takes a gradient, or None, for each.
    """
    with torch.enable_grad():
        # Aliases, so that a tensor given twice gets each of its two gradients once.
        aliases = [x.view_as(x) if need else x for x, need in zip(inputs, needs, strict=True)]
        wanted = [x for x, need in zip(aliases, needs, strict=True) if need]
        results = function(*aliases)
        if isinstance(results, torch.Tensor):
            results, grads = (results,), (grads,)
        given = [(y, dy) for y, dy in zip(results, grads, strict=True) if dy is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in given],
                wanted,
                [dy for _, dy in given],
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return tuple(next(found) if need else None for need in needs)


_debug = False


def debug(enabled: bool = True) -> None:
    """With debug(True), mistakes that a GPU cannot report without synchronizing raise at once: a target class out of range
    is an IndexError that names the row. Off by default: such a row's loss and gradient are NaN."""
    global _debug
    _debug = enabled


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run: the answer of `explain`."""

    op: str
    backend: str
    reason: str
    # (what runs, its configuration and why), in order of launch.
    steps: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.steps), default=0)
        lines = [f"{self.op}: backend {self.backend}, because {self.reason}"]
        lines += [f"  {name:<{width}}  {what}" for name, what in self.steps]
        return "\n".join(lines)


# op name -> function of the public function's arguments giving the tensor that decides, the steps of a backend, and perhaps
# the name by which `choose_backend` knows this form of the op.
_explainers: dict[str, Callable[..., tuple[Any, ...]]] = {}


def explains(op: str) -> Callable[[Any], Any]:
    """Registers the function below it as the explainer of `op`: it takes what the public function takes, and gives the
    tensor that decides the backend, a function from a backend's name to its steps, and where it is not `op` the name that
    decides with the tensor."""

    def register(function: Any) -> Any:
        _explainers[op] = function
        return function

    return register


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend and configuration `dlgpu.functional.<op>(*args, **kwargs)` would run, and why. Runs nothing.

    Args:
        op: the name of a function of dlgpu.functional, or of an optimizer ("adam", "adamw").
        *args, **kwargs: what that function takes (for an optimizer, the parameters). Tensors may be on the meta device.

    Returns:
        An Explanation; print it.

    Raises:
        ValueError: if there is no such op.
    """
    if op not in _explainers:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(sorted(_explainers))}")
    tensor, steps, *form = _explainers[op](*args, **kwargs)
    if tensor.device.type == "meta":
        backend, reason = "triton", "tensors on meta stand for CUDA ones, of capability 9.0"
    else:
        backend, reason = _choose(tensor, *(form or [op]))
    return Explanation(op, backend, reason, tuple(steps(backend)))
