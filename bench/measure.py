"""One op at one size, on several libraries: verified, timed, verified again, and held to what the machine can do.

This is the only way to a timing of an op: `run` and the suites measure by it, and `audit` sends its cheats through it. In
order, with what each step is there for:

1. Each provider's call is bound to inputs of its own, and the inputs of two further seeds are written into the same memory,
   one after the other. Its results must be right for each (right: as tests/tolerance.py has it, against float64), so that
   results kept from a call before, or found by their inputs' address, are wrong.
2. Results are copied in the moment the call returns, without waiting, and must not change afterwards: work that goes on in a
   thread or on another stream is not done. The inputs must be what they were.
3. A provider with a wrong result gets no time. The others are timed interleaved (`harness`), bound as they are.
4. All are verified once more, through the same bound calls, on a seed that they have not seen.
5. A time in which the machine could not have moved the bytes that must move, or done the products that must be done, is no
   time, whatever the results: see `impossible`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from . import ceilings, memory
from .cases import BOTH, FORWARD, STEP, Make, Op
from .cases._base import Bound, NotOffered
from .environment import Others, one_line
from .environment import crowded as crowded_by
from .harness import PairedResult, Stop, interleaved
from .providers import BOUNDS, COMPILED, Verdict, check
from .report import row_title, timing_row
from .timers import Timer, sees_waiting, timer_for
from .unfused import distinct_bytes

__all__ = ["Case", "floor_bytes", "impossible", "measure", "verify"]

Row = dict[str, Any]
Libraries = Mapping[str, Callable[..., Any]]

# How long results are watched for changes after the call.
_AFTERWARDS_S = 0.02
# Reading alone is faster than copying, and a ceiling has a spread of its own; on a CPU whose clock and caches are shared with
# others' machines a large one. What cheats is faster by more.
MARGIN = {"cuda": 1.2, "cpu": 2.0}
# For measuring a ceiling again that something seems to have passed.
_AGAIN_S = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured. `options` need not name those that keep their defaults."""

    described: Op
    shape: Mapping[str, int]
    passes: str
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: str = "cpu"
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {**self.described.defaults(), **self.options})

    @property
    def op(self) -> str:
        return self.described.name

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        keys = ("op", "options", "passes", "shape", "note")
        return row_title({key: getattr(self, key) for key in keys}) + f" {self.dtype_name}"

    def bind(self, function: Callable[..., Any], seed: int, wide: torch.dtype | None = None) -> Bound:
        make = Make(self.device, self.dtype, seed, wide)
        return Bound(self.described, function, self.shape, self.passes, make, self.options)

    def without_memory(self, library: str) -> Callable[[], Bound]:
        """Binds a library's function to inputs that have sizes alone, for counting."""
        meta = dataclasses.replace(self, device="meta")
        return lambda: meta.bind(self.described.functions[library], 0)


@dataclasses.dataclass(frozen=True)
class _Truth:
    """What is right for the inputs of one seed: in float64, and as torch has it in the case's dtype.

    changed: which inputs torch's own call changes, such as running statistics: others may too.
    """

    own: list[torch.Tensor]
    exact: list[torch.Tensor]
    changed: list[bool]

    @staticmethod
    def of(case: Case, seed: int, function: Callable[..., Any] | None = None) -> _Truth:
        eager = function or case.described.functions["eager"]
        exact = _called(case, case.bind(eager, seed, torch.float64))
        bound = case.bind(eager, seed)
        before = _copies(bound.tensors())
        own = _called(case, bound)
        # In a step, which is to change them, anything may.
        changed = [
            case.passes == STEP or not _same_bits(x, old)
            for x, old in zip(bound.tensors(), before, strict=False)
        ]
        return _Truth(own, exact, changed)


def _copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().clone() for t in tensors]


def _called(case: Case, bound: Bound) -> list[torch.Tensor]:
    """The results of as many calls as the op is verified by, as they are the moment that the last one returns."""
    for _ in range(case.described.calls - 1):
        bound()
    return _copies(bound())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a = a.detach()
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def verify(case: Case, bound: Bound, truth: _Truth) -> Verdict:
    """Whether calls give the right results for the inputs that are now bound, all of them and at once, and leave the inputs
    alone."""
    op, inputs = case.described, bound.tensors()
    before = _copies(inputs)
    _wait(case.device)
    for _ in range(op.calls - 1):
        bound()
    outputs = bound()
    # At once, and on the stream on which the caller would go on.
    taken = _copies(outputs)
    _wait(case.device)
    if op.verify is None:
        found = check(taken, truth.own, truth.exact, op.jumps)
    else:
        problem = op.verify(bound, taken, case.passes, bound.options)
        found = Verdict(problem is None, 0.0, problem or "")
    if not found.right:
        return found
    time.sleep(_AFTERWARDS_S)
    if not all(_same_bits(t, copy) for t, copy in zip(outputs, taken, strict=True)):
        return Verdict(False, math.inf, "results still changed after the call had returned")
    known = [torch_too or own for torch_too, own in zip(truth.changed, bound.overwritten(), strict=True)]
    for i, (x, copy, may) in enumerate(zip(inputs, before, known, strict=True)):
        if not may and not _same_bits(x, copy):
            return Verdict(False, math.inf, f"the call changed its input {i}")
    return found


def floor_bytes(bound: Bound) -> int:
    """The fewest bytes that any way to compute the results moves: each result is written, and by a pass that begins from the
    inputs each of them is read."""
    outputs = sum(distinct_bytes(t) for t in bound())
    # A backward alone may need none of the inputs.
    inputs = sum(distinct_bytes(x) for x in bound.tensors()) if bound.passes in (FORWARD, BOTH) else 0
    return outputs + inputs


def impossible(
    seconds: float,
    nbytes: int | None,
    flops: int | None,
    best: Mapping[str, float],
    case: Case,
    cache: str,
) -> str:
    """Why a call cannot have taken so short, or "".

    Args:
        best: name -> the highest rate of each ceiling, measured in this run (`ceilings.best`).
    """
    copy = ceilings.COPY if cache == "cold" else ceilings.CACHED_COPY
    for amount, what, name in ((nbytes, "B/s", copy), (flops, "FLOP/s", ceilings.matmul_name(case.dtype))):
        if amount and name in best and amount / seconds > MARGIN[case.device] * best[name]:
            return (
                f"impossible: {seconds:.3g} s would be {amount / seconds:.3g} {what}, "
                f"and {name} reaches {best[name]:.3g} here"
            )
    return ""


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(
    case: Case,
    libraries: Libraries,
    *,
    section: str = "ops",
    stop: Stop | None = None,
    timer: Timer | None = None,
    timer_name: str = "",
    cache: str = "",
    seed: int = 0,
    best: Mapping[str, float] | None = None,
    extras: bool = True,
    cold: bool = False,
    progress: Callable[[float], None] = lambda share: None,
    again: Callable[[Case], Mapping[str, float]] | None = None,
    **known: Any,
) -> Iterator[Row]:
    """Rows of the first library against each of the others: kind timing, or wrong, or impossible.

    Args:
        libraries: name -> function of the op's inputs, ours first.
        timer: by default `timer_for` the device, `timer_name` and `cache`.
        best: the highest rates of the ceilings, for `impossible`.
        extras: measure memory and the host's part too.
        cold: and what compiling takes, with the compilers' caches empty, which on a GPU compiles everything anew.
        again: measures the ceilings again, before anything is called impossible.
        known: further keys of the timing rows, such as compulsory_bytes, unfused_bytes and config.
    """
    again = again or _ceilings_again
    if timer is None:
        timer, timer_name, cache = timer_for(case.device, timer_name, cache)
    rows = _Rows(case, section)
    calls: dict[str, Bound] = {}
    first: dict[str, float] = {}
    refused: list[Row] = []
    compiling = [name for name in libraries if cold and (case.device == "cuda" or name in COMPILED)]
    with memory.fresh_compilers() if compiling else contextlib.nullcontext():
        for name, function in libraries.items():
            try:
                calls[name], first[name] = memory.first_call(
                    functools.partial(case.bind, function, seed), lambda: _wait(case.device)
                )
            except (NotOffered, ImportError) as error:
                refused.append(rows.absent(name, error))
            except Exception as error:
                if name == next(iter(libraries)) or isinstance(error, torch.OutOfMemoryError):
                    raise
                # What another library cannot do does not keep the rest from being measured.
                message = f"{name}: {one_line(error)}"
                refused.append({"section": section, "kind": "error", "title": case.title, "message": message})
    yield from refused
    # A step is bound anew for each seed, and compiled anew where it is compiled.
    for fresh in (seed + 1, seed + 2)[: 1 if case.passes == STEP else 2]:
        yield from rows.verified(calls, fresh)
    names = list(calls)
    if names[:1] != list(libraries)[:1] or len(names) < 2:
        return
    costs = {name: _costs(case, calls[name]) if extras else {} for name in names}
    for name in set(compiling).intersection(names):
        costs[name]["compile", "_s"] = first[name]
    others = Others()
    results = interleaved(
        list(calls.values()),
        stop=stop,
        timer=timer,
        seed=seed,
        progress=lambda pairs, share: progress(share),
    )
    crowd = others.cores()
    right = dict(calls)
    yield from rows.verified(right, seed + 3)
    floor = floor_bytes(calls[names[0]])
    flops = case.described.flops(case.shape, case.passes) if case.described.flops else None
    for name, result in zip(names[1:], results, strict=True):
        if names[0] not in right or name not in right:
            continue
        pair = (names[0], result.samples_a), (name, result.samples_b)
        reasons = []
        for who, samples in pair:
            must = max(floor, known.get("compulsory_bytes") or 0) if who == names[0] else floor
            claim = (_median(samples), must, flops)
            if best and impossible(*claim, best, case, cache):
                # Perhaps it was the ceiling that was disturbed.
                best = _higher(best, again(case))
            if why := impossible(*claim, best or {}, case, cache):
                reasons.append(rows.refused("impossible", who, why))
        if reasons:
            yield from reasons
            continue
        extra = {
            f"{key}_{side}{unit}": value
            for side, who in zip("ab", (names[0], name), strict=True)
            for (key, unit), value in costs[who].items()
        }
        yield _timing(
            case, section, names[0], name, result, crowd, timer_name, cache, flops, {**extra, **known}
        )


def _ceilings_again(case: Case) -> dict[str, float]:
    return ceilings.best(ceilings.ceilings(case.device, _AGAIN_S, (case.dtype,)))


def _higher(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(rate, other.get(name, 0.0)) for name, rate in one.items()}


def _timing(
    case: Case,
    section: str,
    a: str,
    b: str,
    result: PairedResult,
    others: float | None,
    timer_name: str,
    cache: str,
    flops: int | None,
    known: Mapping[str, Any],
) -> Row:
    seconds, moved = _median(result.samples_a), known.get("compulsory_bytes")
    return timing_row(
        section,
        case,
        a,
        b,
        case.device,
        result,
        others,
        **{
            "timer": timer_name or "host",
            "cache": cache or "host",
            # Where the disturbed samples are known and left out, what ran beside the others does not matter.
            "crowded": result.crowded if sees_waiting() else crowded_by(others),
            "flops": flops,
            "flops_per_s": flops / seconds if flops else None,
            "bytes_per_s": moved / seconds if moved else None,
            **known,
        },
    )


def _costs(case: Case, bound: Bound) -> dict[tuple[str, str], Any]:
    """What a call costs besides time, by (first, last) part of the row's keys."""
    cuda = case.device == "cuda"
    found: dict[tuple[str, str], Any] = {
        ("peak_memory", "_bytes"): memory.peak_bytes(bound, case.device),
        ("host", "_s"): memory.host_seconds(bound, torch.cuda.synchronize) if cuda else None,
    }
    if case.passes not in (STEP, FORWARD):
        found["saved", "_bytes"] = memory.saved_bytes(lambda: bound.function(**bound.inputs), bound.tensors())
    return found


class _Rows:
    """Verification of all calls, and the rows of those that it refuses."""

    def __init__(self, case: Case, section: str) -> None:
        self._case, self._section = case, section

    def refused(self, kind: str, provider: str, detail: str) -> Row:
        return {
            "section": self._section,
            "kind": kind,
            "title": self._case.title,
            "provider": provider,
            "detail": detail,
        }

    def absent(self, provider: str, error: Exception) -> Row:
        name = getattr(error, "name", None)
        reason = f"{name.partition('.')[0]} is not installed" if name else str(error)
        return {
            "section": self._section,
            "kind": "absent",
            "title": self._case.title,
            "provider": provider,
            "reason": reason,
        }

    def verified(self, calls: dict[str, Bound], seed: int) -> Iterator[Row]:
        """Verifies the calls on the inputs of `seed`; a row for each that is wrong, which leaves `calls`."""
        case = self._case
        general = _Truth.of(case, seed)
        own = check(general.own, general.own, general.exact, case.described.jumps)
        if case.described.verify is None and not own.right:
            yield self.refused("wrong", "torch itself", own.detail)
            calls.clear()
            return
        for name, bound in list(calls.items()):
            # A bound computes less than the op, and is its own truth.
            truth = _Truth.of(case, seed, bound.function) if name in BOUNDS else general
            if case.passes == STEP:
                # Its state is what the steps before made it.
                verdict = verify(case, case.bind(bound.function, seed), truth)
            else:
                bound.refresh(seed)
                verdict = verify(case, bound, truth)
            if not verdict.right:
                del calls[name]
                yield self.refused("wrong", name, verdict.detail)
