"""Does the benchmark catch who cheats? Planted cheats go through `measure`, as every library does, and each must be caught.

A cheat is torch's own layer with something wrong with it, against the honest one. Caught means: refused as wrong or as
impossible, or, for the one that is slow, found slower. An honest copy must pass, and be neither faster nor slower.

On a CPU all of it runs on one thread: with as many as cores, one other busy process stops every parallel loop until the
scheduler comes round, and what is timed is the scheduler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import torch

from . import ceilings
from .cases import FORWARD, OPS
from .cli import Amount
from .environment import choose_device, find_gpu
from .harness import Stop
from .measure import Case, measure
from .report import Console
from .tables import verdict
from .timers import CudaTimer

__all__ = ["CHEATS", "Caught", "Cheat", "audit", "command"]

Layer = Callable[..., torch.Tensor]

SLOWDOWN = 0.05
# The share of the budget that the ceilings take, all of them, and each comparison that is timed in earnest.
_CEILINGS, _TIMED = 0.1, 0.25
# A cheat whose time is not believed needs few pairs.
_BRIEF_S = 0.5
DEFAULT_BUDGET_S = 40.0


def _honest(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    y: torch.Tensor = OPS["linear"].functions["eager"](x, weight, bias, activation)
    return y


class _Stale:
    """Returns the results of the call before."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = _honest(*args, **kwargs)
        last, self._last = self._last, y
        return y if last is None else last


class _Elsewhere:
    """Returns at once, and works on in a thread, or on another stream that nobody waits for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._out: torch.Tensor | None = None
        self._stream: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._out is None:
            self._out = _honest(*args, **kwargs)
        elif self._out.is_cuda:
            self._stream = self._stream or torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                self._out.copy_(_honest(*args, **kwargs))
        else:
            self._pool.submit(self._work, *args, **kwargs)
        return self._out

    def _work(self, *args: Any, **kwargs: Any) -> None:
        assert self._out is not None
        with torch.no_grad():
            self._out.copy_(_honest(*args, **kwargs))


def _skips(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """Leaves the last row as it was."""
    y = x.new_zeros(len(x), len(weight))
    y[:-1] = _honest(x[:-1], weight, bias, activation)
    return y


def _mutates(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """Uses its input's memory for something else, once it is done with it."""
    y = _honest(x, weight, bias, activation)
    x[0].zero_()
    return y


class _OnlyOnce:
    """Computes on its first call, and knows its inputs again by where they are; with `careful`, also by whether torch counted
    a write to them."""

    def __init__(self, careful: bool) -> None:
        self._careful = careful
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        key = (x.data_ptr(), x._version) if self._careful else (x.data_ptr(),)
        if key not in self._known:
            self._known[key] = _honest(x, *args, **kwargs)
        return self._known[key]


def _imprecise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiplies in bfloat16."""
    half = torch.bfloat16
    return _honest(x.to(half), weight.to(half), bias.to(half), activation).to(x.dtype)


class _Slow:
    """Takes 5% longer than it needs. On a GPU the 5% are of a call with a cold cache."""

    def __init__(self) -> None:
        self._cycles: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        y = _honest(*args, **kwargs)
        if y.is_cuda:
            if self._cycles is None:
                self._cycles = _cycles(lambda: _honest(*args, **kwargs))
            torch.cuda._sleep(self._cycles)
            return y
        until = start + (1 + SLOWDOWN) * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return y


def _cycles(function: Callable[[], object]) -> int:
    """How long the GPU must sleep, in its cycles, for the slowdown of a function."""
    timer, cycles = CudaTimer(), 1_000_000
    timer(function, 20)
    asleep = timer(lambda: torch.cuda._sleep(cycles), 20).seconds
    return int(SLOWDOWN * timer(function, 20).seconds / asleep * cycles)


@dataclasses.dataclass(frozen=True)
class Cheat:
    """A way to look better than one is (or, to be caught too, worse).

    make: a fresh one; it gets what the layer gets.
    expected: how it may be caught: kinds of row, or a verdict in small letters.
    """

    name: str
    make: Callable[[], Layer]
    expected: tuple[str, ...]


CHEATS = (
    Cheat("none: an honest copy", lambda: _honest, ("same", "ambiguous", "busy")),
    Cheat("returns the results of the call before", _Stale, ("wrong",)),
    Cheat("works in a thread or on a stream of its own", _Elsewhere, ("wrong",)),
    Cheat("skips a row", lambda: _skips, ("wrong",)),
    Cheat("overwrites its inputs", lambda: _mutates, ("wrong",)),
    Cheat("computes on the first call only", lambda: _OnlyOnce(False), ("wrong",)),
    Cheat("computes once for each write to its inputs", lambda: _OnlyOnce(True), ("impossible",)),
    Cheat("multiplies in bfloat16", lambda: _imprecise, ("wrong",)),
    Cheat("takes 5% longer", _Slow, ("slower",)),
)


@dataclasses.dataclass(frozen=True)
class Caught:
    """What became of a cheat: `how` it was caught, or what it passed for, and whether that is as it must be."""

    cheat: Cheat
    how: str
    detail: str

    @property
    def right(self) -> bool:
        return self.how in self.cheat.expected


def case_for(device: str) -> Case:
    """Long enough for a call's own cost not to matter, short enough for many."""
    shape = {"M": 4096, "N": 4096, "K": 1024} if device == "cuda" else {"M": 128, "N": 256, "K": 256}
    return Case(OPS["linear"], shape, FORWARD, device=device)


def audit(
    device: str = "cpu",
    budget_s: float = DEFAULT_BUDGET_S,
    cheats: tuple[Cheat, ...] = CHEATS,
    best: dict[str, float] | None = None,
) -> Iterator[Caught]:
    """Sends each cheat through `measure`.

    Args:
        best: the ceilings; measured here unless given.
    """
    case, honest = case_for(device), OPS["linear"].functions["eager"]
    with ceilings.single_thread() if device == "cpu" else contextlib.nullcontext():
        if best is None:
            found = ceilings.ceilings(device, _CEILINGS / 4 * budget_s, (case.dtype,))
            best = ceilings.best(found)
        for cheat in cheats:
            timed = not {"wrong", "impossible"}.intersection(cheat.expected)
            share = _TIMED * budget_s if timed else _BRIEF_S
            outcome = _outcome(cheat, case, honest, share, best)
            if outcome.how in ("ambiguous", "busy") and not outcome.right:
                # The machine was too noisy for what it got.
                outcome = _outcome(cheat, case, honest, 1.5 * share, best)
            yield outcome


def _outcome(cheat: Cheat, case: Case, honest: Layer, share: float, best: dict[str, float]) -> Caught:
    libraries = {"cheat": cheat.make(), "honest": honest}
    for row in measure(case, libraries, section="audit", stop=Stop(budget_s=share), best=best, extras=False):
        if row["kind"] == "timing":
            interval = f"{row['ratio']:.3f}, {row['low']:.3f} to {row['high']:.3f}"
            return Caught(cheat, verdict(row), f"time / honest time: {interval}, {row['pairs']} pairs")
        if row["provider"] != "honest":
            return Caught(cheat, row["kind"], row["detail"])
        return Caught(cheat, f"the honest one is {row['kind']}", row["detail"])
    return Caught(cheat, "lost", "no row at all")


@click.command("audit")
@click.option(
    "--budget",
    type=Amount(min=1, max=1e6),
    default=DEFAULT_BUDGET_S,
    show_default=True,
    metavar="SECONDS",
    help="About how long it may take.",
)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
def command(budget: float, device: str) -> int:
    """Plant cheats in the benchmark, and see that it catches each.

    Exit status 0 if all are caught and the honest copy passes, else 3.
    """
    chosen, _ = choose_device(device, find_gpu())
    console = Console()
    console.line(f"{case_for(chosen).title} on {chosen}: planted cheats against an honest layer")
    width = max(len(cheat.name) for cheat in CHEATS)
    missed = 0
    for outcome in audit(chosen, budget):
        missed += not outcome.right
        console.line(
            f"  {outcome.cheat.name:<{width}}  {outcome.how:<10}  {'ok' if outcome.right else 'MISSED'}  {outcome.detail}"
        )
    console.line(f"{missed} of {len(CHEATS)} not as they must be" if missed else "All are as they must be.")
    return 3 if missed else 0
