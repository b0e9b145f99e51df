"""Counts each kernel launch's memory traffic exactly, on a machine with no GPU.

Triton's interpreter sends every global-memory access, whatever its spelling (pointer, block pointer, tensor
descriptor, atomic), through four functions of one C module. A proxy for that module therefore sees every byte
a kernel touches, and who touched it. This gives the byte laws that the tests hold the kernels to, and the
only check for races there is without a GPU.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
import triton
import triton.runtime.interpreter as interpreter

# In a region's `reader` and `writer` arrays: 0 is nobody, a positive number is 1 + the program's number.
_NOBODY, _MANY, _ATOMIC = 0, -1, -2


@dataclasses.dataclass
class Argument:
    """One argument's share of a launch's traffic, in bytes. Arguments whose views overlap share a record."""

    nbytes: int
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    compulsory_reads: int = 0
    compulsory_writes: int = 0

    @property
    def requested(self) -> int:
        return self.loads + self.stores + 2 * self.atomics

    @property
    def compulsory(self) -> int:
        return self.compulsory_reads + self.compulsory_writes


@dataclasses.dataclass
class Launch:
    """What one launch moved, in bytes.

    loads, stores, atomics: every access of an unmasked lane, repeats included.
    compulsory_reads: distinct bytes read before this launch wrote them.
    compulsory_writes: distinct bytes written.
    stray: accesses that do not lie wholly inside one known tensor's elements.
    write_conflicts: distinct bytes written by two programs. Atomics do not conflict with one another.
    read_after_write: distinct bytes that one program wrote and another read, in either order: programs have
        no order on a GPU. A plain read of a byte that atomics update counts, whoever made them.
    args: the breakdown, by argument name; tuple items are `name[i]`, overlapping views `a|b`.
    seconds: host time, the metering included.
    """

    kernel: str
    grid: tuple[int, ...] = ()
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    compulsory_reads: int = 0
    compulsory_writes: int = 0
    stray: int = 0
    write_conflicts: int = 0
    read_after_write: int = 0
    args: dict[str, Argument] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def requested(self) -> int:
        """Every access; an atomic reads and writes."""
        return self.loads + self.stores + 2 * self.atomics

    @property
    def compulsory(self) -> int:
        """The floor: each byte crosses the memory bus once in each direction it is needed."""
        return self.compulsory_reads + self.compulsory_writes

    @property
    def clean(self) -> bool:
        """No stray access and no race between programs."""
        return not (self.stray or self.write_conflicts or self.read_after_write)


@dataclasses.dataclass(frozen=True)
class _View:
    name: str
    base: int
    nbytes: int
    tensor: torch.Tensor

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _View | None:
        if tensor.numel() == 0:
            return None
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(name, tensor.data_ptr(), (last + 1) * tensor.element_size(), tensor)


class _Region:
    """A byte interval covered by overlapping views, and who has read and written each unit of it."""

    def __init__(self, views: list[_View]) -> None:
        self.base = min(view.base for view in views)
        self.end = max(view.base + view.nbytes for view in views)
        self.name = "|".join(dict.fromkeys(view.name for view in views))
        self.traffic = Argument(self.end - self.base)
        # One array entry for each unit, not each byte: float32 needs a quarter of the work.
        self.unit = math.gcd(*(math.gcd(v.base - self.base, v.tensor.element_size()) for v in views))
        self.inside = self._elements(views)
        self.touched = False

    def _elements(self, views: list[_View]) -> np.ndarray | None:
        """Which units belong to an element of some view; None when all do."""
        if len({(view.base, view.nbytes) for view in views}) == 1 and views[0].tensor.is_contiguous():
            return None
        inside = np.zeros((self.end - self.base) // self.unit, np.bool_)
        for view in views:
            units = view.tensor.element_size() // self.unit
            np.lib.stride_tricks.as_strided(
                inside[(view.base - self.base) // self.unit :],
                (*view.tensor.shape, units),
                (*(stride * units for stride in view.tensor.stride()), 1),
            )[...] = True
        return inside

    def _begin(self) -> None:
        # Not in __init__: most of a thousand watched parameters may never be touched by a launch.
        n = (self.end - self.base) // self.unit
        self.reader, self.writer = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.cold = np.zeros(n, np.bool_)
        self.touched = True

    def _refine(self) -> None:
        """Go down to single bytes, for an access that is not made of whole units."""
        for name in ("reader", "writer", "cold", "inside"):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, np.repeat(state, self.unit))
        self.unit = 1

    def access(self, kind: str, offsets: np.ndarray, size: int, program: int) -> int:
        """Account for accesses of `size` bytes at byte `offsets`; returns how many of them are not stray."""
        if not self.touched:
            self._begin()
        if size % self.unit or (offsets % self.unit).any():
            self._refine()
        per_access = size // self.unit
        index = offsets // self.unit
        if per_access > 1:
            index = index[:, None] + np.arange(per_access)
        if self.inside is not None:
            index = index[self.inside[index].reshape(len(index), -1).all(axis=1)]
        accepted = len(index)
        index = index.reshape(-1)

        written_by = self.writer[index]
        mine = (written_by == _NOBODY) | (written_by == program)
        if kind != "stores":
            self.cold[index[written_by == _NOBODY]] = True
        if kind == "loads":
            read_by = self.reader[index]
            self.reader[index] = np.where((read_by == _NOBODY) | (read_by == program), program, _MANY)
        elif kind == "stores":
            self.writer[index] = np.where(mine, program, _MANY)
        else:
            shared = (written_by == _NOBODY) | (written_by == _ATOMIC)
            self.writer[index] = np.where(shared, _ATOMIC, np.where(mine, program, _MANY))
        setattr(self.traffic, kind, getattr(self.traffic, kind) + accepted * size)
        return accepted

    def close(self, launch: Launch) -> None:
        """Add this region's distinct bytes to the launch's record."""
        launch.args[self.name] = self.traffic
        if not self.touched:
            return
        written = self.writer != _NOBODY
        foreign = written & (self.reader != _NOBODY) & ((self.writer != self.reader) | (self.writer == _MANY))
        self.traffic.compulsory_reads = int(np.count_nonzero(self.cold)) * self.unit
        self.traffic.compulsory_writes = int(np.count_nonzero(written)) * self.unit
        launch.compulsory_reads += self.traffic.compulsory_reads
        launch.compulsory_writes += self.traffic.compulsory_writes
        launch.write_conflicts += int(np.count_nonzero(self.writer == _MANY)) * self.unit
        launch.read_after_write += int(np.count_nonzero(foreign)) * self.unit


def _regions(views: Iterable[_View]) -> list[_Region]:
    """Views that overlap become one region: a byte must not have two accounts."""
    groups: list[list[_View]] = []
    end = -1
    for view in sorted(views, key=lambda view: view.base):
        if view.base < end:
            groups[-1].append(view)
        else:
            groups.append([view])
        end = max(end, view.base + view.nbytes)
    return [_Region(group) for group in groups]


def _views(name: str, value: Any) -> Iterator[_View]:
    """The tensors in a kernel argument: a tensor, one reinterpreted, a descriptor, or a tuple of them."""
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _views(f"{name}[{i}]", item)
    elif isinstance(value, torch.Tensor):
        if (view := _View.of(name, value)) is not None:
            yield view
    elif isinstance(base := getattr(value, "base", None), torch.Tensor):
        yield from _views(name, base)


class _CountingModule:
    """Stands in for the interpreter's C module: the four memory functions report, all else falls through."""

    def __init__(self, real: Any, meter: TrafficMeter) -> None:
        self._real, self._meter = real, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, ptrs: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        self._meter._access("loads", ptrs, mask, np.dtype(dtype).itemsize)
        return self._real.load(ptrs, mask, other, dtype)

    def store(self, ptrs: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self._meter._access("stores", ptrs, mask, value.dtype.itemsize)
        return self._real.store(ptrs, value, mask)

    def atomic_rmw(self, op: Any, ptrs: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> Any:
        self._meter._access("atomics", ptrs, mask, value.dtype.itemsize)
        return self._real.atomic_rmw(op, ptrs, value, mask, sem)

    def atomic_cas(self, ptrs: np.ndarray, expected: np.ndarray, value: np.ndarray, sem: Any) -> Any:
        self._meter._access("atomics", ptrs, None, value.dtype.itemsize)
        return self._real.atomic_cas(ptrs, expected, value, sem)


class TrafficMeter:
    """Context manager: meters every Triton kernel launched inside it. Meters may be nested.

    Known memory is the tensors a kernel is given, plus `extra`: the tensors it reaches through a table of
    pointers. An access outside their elements is stray, even where it hits the storage they are views of.

    Raises RuntimeError on entry unless kernels are interpreted (TRITON_INTERPRET=1). A launch that raises
    leaves no record.
    """

    def __init__(self, extra: Iterable[torch.Tensor] = ()) -> None:
        self.launches: list[Launch] = []
        self._watched: list[_View] = []
        self._launch: Launch | None = None
        self._known: list[_Region] = []
        self._bases: list[int] = []
        self._saved: tuple[Any, Any, Any] | None = None
        self.watch(extra)

    def watch(self, tensors: Iterable[torch.Tensor], name: str = "watched") -> None:
        """Add tensors that later launches reach through raw addresses; they show up as `name[i]`."""
        # A view holds its tensor, so the address stays valid as long as it is watched.
        self._watched += _views(name, list(tensors))

    def total(self, quantity: str = "compulsory") -> int:
        """The sum of one of Launch's quantities over all launches."""
        return sum(getattr(launch, quantity) for launch in self.launches)

    def __enter__(self) -> TrafficMeter:
        if not triton.knobs.runtime.interpret:
            raise RuntimeError(
                "TrafficMeter sees only interpreted kernels: set TRITON_INTERPRET=1 before they are defined"
            )
        if self._saved is not None:
            raise RuntimeError("this TrafficMeter is already metering: nest a second one instead")
        executor = interpreter.GridExecutor
        module, call, init_args = interpreter._interpreter, executor.__call__, executor._init_args_hst
        self._saved = (module, call, init_args)

        def counted_call(grid_executor: Any, *args: Any, **kwargs: Any) -> Any:
            # Saved and restored because a pre-run hook may launch a kernel of its own.
            outer = self._launch, self._known, self._bases
            self._launch = launch = Launch(getattr(grid_executor.fn, "__name__", "?"))
            self._known, self._bases = [], []
            start = time.perf_counter()
            try:
                result = call(grid_executor, *args, **kwargs)
                launch.seconds = time.perf_counter() - start
                launch.grid = tuple(int(n) for n in interpreter.interpreter_builder.grid_dim)
                for region in self._known:
                    region.close(launch)
                self.launches.append(launch)
                return result
            finally:
                self._launch, self._known, self._bases = outer

        # Tensors not on the CPU are copied for the launch: the addresses that count are the copies'.
        def noted_init_args(grid_executor: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = init_args(grid_executor, args, kwargs)
            named = [*zip(grid_executor.arg_names, args, strict=False), *kwargs.items()]
            views = [view for name, value in named for view in _views(name, value)]
            self._known = _regions(views + self._watched)
            self._bases = [region.base for region in self._known]
            return args, kwargs

        interpreter._interpreter = _CountingModule(module, self)
        executor.__call__ = counted_call
        executor._init_args_hst = noted_init_args
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            executor = interpreter.GridExecutor
            interpreter._interpreter, executor.__call__, executor._init_args_hst = self._saved
            self._saved = None

    def _access(self, kind: str, ptrs: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        launch = self._launch
        if launch is None:
            return
        addresses = np.asarray(ptrs).reshape(-1).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask, np.shape(ptrs)).reshape(-1).astype(np.bool_)]
        if not len(addresses):
            return
        setattr(launch, kind, getattr(launch, kind) + len(addresses) * size)

        x, y, z = interpreter.interpreter_builder.grid_idx
        width, height, _ = interpreter.interpreter_builder.grid_dim
        program = 1 + x + width * (y + height * z)
        low, high = int(addresses.min()), int(addresses.max())
        first, last = (bisect.bisect_right(self._bases, address) - 1 for address in (low, high))
        known = 0
        for region in self._known[max(first, 0) : last + 1]:
            lanes = addresses
            if low < region.base or high + size > region.end:
                lanes = addresses[(addresses >= region.base) & (addresses + size <= region.end)]
            if len(lanes):
                known += region.access(kind, lanes - region.base, size, program)
        launch.stray += (len(addresses) - known) * size
