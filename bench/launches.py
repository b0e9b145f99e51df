"""What an op would launch, at any size and on any GPU, without launching it.

The real launchers run on meta tensors, which have shapes and no memory, with the limits of whichever GPU is meant. What they
would launch is recorded: kernel, grid, the bytes of each argument, sizes and tiles; and between the launches the operations of
torch's own that they call, such as cuBLAS products, with their compulsory bytes. The same recorder watches launches that do
run, in Triton's interpreter, so that the two can be held to each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

import dlgpu
from dlgpu import _dispatch
from dlgpu.kernels import _triton
from dlgpu.kernels import optimizers as kernels
from dlgpu.ops import optimizers

from .unfused import ByteCounter, Row, distinct_bytes

__all__ = ["Launched", "Limits", "Operand", "Record", "dry_run", "launched", "recording"]

# (capability, bytes of shared memory a block, multiprocessors), as _triton.device_limits gives them.
Limits = tuple[int, int, int]

# What a launch is given beside the kernel's own arguments.
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor that a launch reaches: distinct bytes and the size of an element."""

    nbytes: int
    itemsize: int

    @property
    def elements(self) -> int:
        return self.nbytes // self.itemsize


@dataclasses.dataclass(frozen=True)
class Record:
    """A launch: what tensors it reaches, and what else it is given that is an integer.

    operands: by argument name; arguments that overlap are one, `a|b`, as for the traffic meter. An optimizer's launches reach
        params, grads, masters, states and steps through a table.
    sizes: sizes, flags, tiles; the grid as grid0, grid1, grid2.
    rule: of an optimizer's launch.
    """

    kernel: str
    operands: Mapping[str, Operand]
    sizes: Mapping[str, int]
    rule: str = ""

    @property
    def key(self) -> str:
        """What has laws of its own."""
        return f"{self.kernel}({self.rule})" if self.rule else self.kernel

    def __getitem__(self, name: str) -> int:
        """A size; 0 for one that is not there."""
        return self.sizes.get(name, 0)

    def bytes_of(self, name: str) -> int:
        """An operand's bytes; 0 for one that is not there."""
        operand = self.operands.get(name)
        return operand.nbytes if operand else 0

    def elements(self, name: str) -> int:
        """An operand's elements; 0 for one that is not there."""
        operand = self.operands.get(name)
        return operand.elements if operand else 0

    @property
    def programs(self) -> int:
        return math.prod(self[f"grid{axis}"] for axis in range(3))

    @property
    def flops(self) -> int:
        """Floating-point operations of the launch's products."""
        if self.kernel in _PRODUCTS:
            return _PRODUCTS[self.kernel] * self["M"] * self["N"] * self["K"]
        if self.kernel in _HEAD and "kept_ptr" not in self.operands:
            return 2 * self["N"] * self["H"] * (self["stop"] - self["start"])
        return 0


# Operations for each element of M x N x K.
_PRODUCTS = {
    "_linear_kernel": 2,
    "_linear_tma_kernel": 2,
    "_gated_fwd_kernel": 4,
    "_gated_fwd_tma_kernel": 4,
    "_linear_cross_entropy_product_kernel": 2,
}
# These multiply for the columns start to stop, where they do not read what was kept.
_HEAD = ("_linear_cross_entropy_fwd_kernel", "_linear_cross_entropy_dz_kernel")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(value, torch.Tensor):
        if value.numel():
            yield name, value
    elif isinstance(base := getattr(value, "base", None), torch.Tensor):
        yield from _tensors(name, base)


def _operands(named: Iterable[tuple[str, Any]]) -> dict[str, Operand]:
    """Operands by name, those that overlap as one."""
    # (storage, first byte, byte after the last, names, tensors)
    spans: list[tuple[int, int, int, list[str], list[torch.Tensor]]] = []
    for name, value in named:
        for label, tensor in _tensors(name, value):
            size = tensor.element_size()
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            # Meta tensors have no address: it takes the storage's identity to see what overlaps.
            storage, first = tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * size
            end, labels, tensors = first + (last + 1) * size, [label], [tensor]
            for other in [s for s in spans if s[0] == storage and s[1] < end and first < s[2]]:
                spans.remove(other)
                first, end = min(first, other[1]), max(end, other[2])
                labels, tensors = other[3] + labels, other[4] + tensors
            spans.append((storage, first, end, labels, tensors))
    return {
        "|".join(labels): Operand(
            distinct_bytes(tensors[0]) if _same_view(tensors) else end - first, tensors[0].element_size()
        )
        for _, first, end, labels, tensors in spans
    }


def _same_view(tensors: list[torch.Tensor]) -> bool:
    views = {(t.storage_offset(), t.shape, t.stride()) for t in tensors}
    return len(views) == 1


def record_of(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Mapping[str, Any]) -> Record:
    """The record of a call of `launch` with these arguments."""
    named = [*zip(kernel.arg_names, args, strict=False), *meta.items()]
    sizes = {n: int(value) for n, value in named if isinstance(value, int) and n not in _OPTIONS}
    sizes |= {f"grid{axis}": size for axis, size in enumerate((*grid, 1, 1)[:3])}
    return Record(kernel.__name__, _operands(named), sizes, _rule(meta))


def _rule(meta: Mapping[str, Any]) -> str:
    if "UPDATE" not in meta:
        return ""
    name = meta["UPDATE"].__name__.removeprefix("_").removesuffix("_update")
    return f"{name}, states {meta['STATES']}{', masters' * bool(meta['MASTERS'])}"


class _Steps:
    """What optimizers' launches reach through their tables, from the arguments of a step."""

    def __init__(self, watch: Callable[[list[torch.Tensor], str], object] | None = None) -> None:
        self._watch = watch
        self._roles: Callable[[], dict[str, list[torch.Tensor]]] = dict

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        real = optimizers.step

        def step(
            rule: Any, params: Any, grads: Any, members: Any, groups: Any, state: Any, cache: Any, *rest: Any
        ) -> None:
            self._roles = lambda: self._reached(params, grads, state, cache)
            if self._watch is not None:
                for role, tensors in self._roles().items():
                    self._watch(tensors, role)
            real(rule, params, grads, members, groups, state, cache, *rest)

        with mock.patch.object(optimizers, "step", step):
            yield

    @staticmethod
    def _reached(params: Any, grads: Any, state: Any, cache: Any) -> dict[str, list[torch.Tensor]]:
        roles: dict[str, list[torch.Tensor]] = {"params": [p.detach() for p in params], "grads": list(grads)}
        roles |= {"masters": [], "states": [], "steps": list(cache.counters.values())}
        for p in params:
            for name, value in state.get(p, {}).items():
                role = {"step": "steps", optimizers.MASTER: "masters"}.get(name, "states")
                roles[role].append(value)
        return roles

    def complete(self, record: Record) -> Record:
        """The record with the operands that are reached through a table."""
        if record.kernel not in _REACHING:
            return record
        roles = self._roles()
        operands = {
            role: Operand(
                sum(t.numel() for t in roles[role]) * roles[role][0].element_size(),
                roles[role][0].element_size(),
            )
            for role in _REACHING[record.kernel]
            if roles[role]
        }
        vector = max(record["VECTOR"], 1)
        counts = {
            "tensors": len(roles["params"]),
            "rests": sum(p.numel() % vector > 0 for p in roles["params"]),
        }
        return dataclasses.replace(
            record, operands={**record.operands, **operands}, sizes={**record.sizes, **counts}
        )


_REACHING = {
    "_square_sum_kernel": ("grads",),
    "_prologue_kernel": ("steps",),
    "_multi_tensor_kernel": ("params", "grads", "masters", "states"),
}


@functools.cache
def _kernel_modules() -> tuple[Any, ...]:
    package = importlib.import_module("dlgpu.kernels")
    return tuple(
        importlib.import_module(f"dlgpu.kernels.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    )


@contextlib.contextmanager
def _patched(name: str, value: Any) -> Iterator[None]:
    """`value` for `name` of kernels/_triton.py, in every module that imported it."""
    original = getattr(_triton, name)
    with contextlib.ExitStack() as stack:
        for module in _kernel_modules():
            if getattr(module, name, None) is original:
                stack.enter_context(mock.patch.object(module, name, value))
        yield


@dataclasses.dataclass(frozen=True)
class Launched:
    """A launch as it was made: what takes compiling.

    args: by parameter name. options: of the compiler, such as num_warps.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


def launched(limits: Limits, call: Callable[[], object]) -> list[Launched]:
    """What launchers, called on meta tensors, would launch on a GPU of these limits. Of ops, which would find their fake
    implementations, `dry_run` tells."""
    found: list[Launched] = []
    with recording(limits, dry=True, spy=found.append):
        call()
    return found


@contextlib.contextmanager
def recording(
    limits: Limits | None = None,
    *,
    note: Callable[[Record], None] | None = None,
    watch: Callable[[list[torch.Tensor], str], object] | None = None,
    dry: bool = False,
    spy: Callable[[Launched], object] | None = None,
) -> Iterator[list[Record]]:
    """Context manager: the list of what is launched within, in order.

    Args:
        limits: of the GPU that the launchers take this to be; None leaves what they find.
        note: is called with each record too.
        watch: is called with the tensors that an optimizer's launches will reach through tables, and what they are.
        dry: launch nothing.
        spy: is called with each launch as it is, before `note`.
    """
    found: list[Record] = []
    real = _triton.launch
    steps = _Steps(watch)

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if 0 in grid:
            return
        if spy is not None:
            options = {name: value for name, value in meta.items() if name in _OPTIONS}
            rest = {name: value for name, value in meta.items() if name not in _OPTIONS}
            spy(Launched(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | rest, options))
        found.append(steps.complete(record_of(kernel, grid, args, meta)))
        if note is not None:
            note(found[-1])
        if not dry:
            real(kernel, grid, *args, **meta)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched("launch", record))
        stack.enter_context(steps())
        if limits is not None:
            stack.enter_context(_patched("device_limits", lambda device: limits))
        yield found


class _Addresses:
    """Addresses for meta tensors, none 0 and none shared: the optimizers' tables hold them."""

    def __init__(self) -> None:
        self._bases: dict[tuple[int, int], int] = {}
        self._next = 1 << 20

    def __call__(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = (storage._cdata, storage.nbytes())
        if key not in self._bases:
            self._bases[key] = self._next
            # As torch's allocator on a GPU: multiples of 512 bytes.
            self._next += -(-max(storage.nbytes(), 1) // 512) * 512
        return self._bases[key] + int(tensor.storage_offset()) * tensor.element_size()


def dry_run(
    bind: Callable[[], Callable[[], object]],
    limits: Limits,
    warm: bool = False,
    spy: Callable[[Launched], object] | None = None,
) -> list[Record | Row]:
    """What the call that `bind` makes on meta tensors would launch on a GPU of these limits, and the operations of torch's
    own between, in order. What `bind` itself does, such as the forward pass before a backward, is left out.

    Args:
        warm: leave out a first call too, in which an optimizer makes its states.
        spy: is called with each launch as it is.
    """
    steps: list[Record | Row] = []

    class Counter(ByteCounter):
        def add(self, row: Row) -> None:
            steps.append(row)

    # Meta tensors would be given to the fake implementations, which know shapes and launch nothing.
    def implementation(op: _dispatch.Op, *args: Any) -> Any:
        return op._implementations[args[-1]](*args[:-1])

    def below(op: _dispatch.Op, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(op, *args)

    def call(op: _dispatch.Op, *args: Any) -> Any:
        return implementation(op, *args) if op._autograd is None else op._autograd(*args)

    listening = False

    def heard(launch: Launched) -> None:
        if listening and spy is not None:
            spy(launch)

    addresses = _Addresses()
    with (
        dlgpu.use_backend("triton"),
        mock.patch.object(_dispatch.Op, "below", below),
        mock.patch.object(_dispatch.Op, "__call__", call),
        # A mode is about, and no tracing.
        mock.patch.object(_dispatch, "direct", return_value=True),
        mock.patch.object(torch.Tensor, "data_ptr", lambda tensor: addresses(tensor)),
        # It has no answer for the meta device.
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(kernels, "_upload_once", lambda array, device, kept: torch.from_numpy(array)),
        recording(limits, note=steps.append, dry=True, spy=heard),
    ):
        function = bind()
        if warm:
            function()
        steps.clear()
        listening = spy is not None
        with Counter("meta"):
            function()
    return steps
