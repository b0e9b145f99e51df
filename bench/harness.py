"""Measures two functions against each other: interleaved in random order, paired, with an interval.

Sequential runs mistake a drifting clock for a difference: with 5% of drift and equal functions they report 1.025x. Here A
and B run back to back within each pair, the order of the two is drawn anew for each pair, and what is reported is the
median of the pairs' ratios A / B with its 95% bootstrap interval. Below 1, A is faster.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["CpuTimer", "PairedResult", "Stop", "Timer", "bootstrap_interval", "paired", "time_one"]

Function = Callable[[], object]
# Seconds that `repeats` calls of a function take in all.
Timer = Callable[[Function, int], float]

CONFIDENCE = 0.95
RESAMPLES = 2000
# The shortest sample. The clock would allow 200 us; one scheduler tick in 2 ms disturbs less.
MIN_SAMPLE_S = 2e-3
# A process with other busy threads never gets quiet.
SETTLE_LIMIT_S = 0.05


class CpuTimer:
    """Seconds by the host's clock, once the process is quiet and the function has run without being timed.

    torch's (OpenMP) and NumPy's (OpenBLAS) worker threads keep spinning after their last product, on the cores that the
    other side's workers want. Measured on 2 cores with torch 2.13 and NumPy 2.4: 3 to 30 ms of spinning, and without a
    pause a training step of 0.3 ms takes ten times as long after the other library's than in a loop by itself. So each
    sample waits until the process burns no CPU time, and then runs a few calls untimed: they wake the function's own
    workers, as the calls before them in a loop would.

    Args:
        synchronize: waits for what the function has only launched.
    """

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._clock, self._cpu_clock, self._sleep = clock, cpu_clock, sleep

    def __call__(self, function: Function, repeats: int) -> float:
        self._settle()
        for _ in range(max(1, repeats // 4)):
            function()
        self._synchronize()
        start = self._clock()
        for _ in range(repeats):
            function()
        self._synchronize()
        return self._clock() - start

    def _settle(self) -> None:
        start = self._clock()
        while self._clock() - start < SETTLE_LIMIT_S:
            before, burned = self._clock(), self._cpu_clock()
            self._sleep(0.001)
            if self._cpu_clock() - burned < 0.2 * (self._clock() - before):
                return


@dataclasses.dataclass(frozen=True)
class Stop:
    """When to stop: at the noise target, at the budget, or at the most pairs, whichever comes first.

    budget_s: for warm-up and pairs together; at least `min_pairs` are measured whatever they take.
    noise: half the interval's width over the ratio.
    """

    budget_s: float = 5.0
    noise: float = 0.01
    min_pairs: int = 7
    max_pairs: int = 1000
    warmup_s: float = 0.2


@dataclasses.dataclass(frozen=True)
class PairedResult:
    """What a comparison gave.

    samples_a, samples_b: seconds a call, one entry a pair, in the order measured.
    ratio, low, high: the median of samples_a / samples_b and its 95% bootstrap interval.
    repeats_a, repeats_b: calls in one sample.
    converged: the noise target was met before the budget ran out.
    """

    samples_a: tuple[float, ...]
    samples_b: tuple[float, ...]
    ratio: float
    low: float
    high: float
    repeats_a: int
    repeats_b: int
    converged: bool
    seconds: float

    @property
    def pairs(self) -> int:
        return len(self.samples_a)

    @property
    def noise(self) -> float:
        """Half the interval's width over the ratio."""
        return (self.high - self.low) / (2 * self.ratio)


def bootstrap_interval(
    samples_a: Any, samples_b: Any, rng: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(median of a / b, low, high): the percentile bootstrap of the median over pairs.

    Computed on logarithms, so that swapping a and b gives the reciprocals.
    """
    logs = np.log(np.asarray(samples_a, np.float64)) - np.log(np.asarray(samples_b, np.float64))
    picks = rng.integers(0, len(logs), (resamples, len(logs)))
    medians = np.median(logs[picks], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return math.exp(float(np.median(logs))), math.exp(float(low)), math.exp(float(high))


def paired(
    a: Function,
    b: Function,
    *,
    stop: Stop | None = None,
    timer: Timer | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, float], None] | None = None,
) -> PairedResult:
    """Time `a` against `b` in interleaved pairs.

    Args:
        a, b: called without arguments; what they return is dropped.
        timer: how a sample is taken; CpuTimer unless given.
        seed: of the order within pairs, and of the bootstrap.
        clock: for the budget only.
        progress: called after each pair with the number of pairs and the share of the budget that is spent.
    """
    stop = stop or Stop()
    timer = timer or CpuTimer()
    rng = np.random.default_rng(seed)
    start = clock()
    repeats = _warm_up((a, b), stop, timer, clock)
    functions = (a, b)
    samples: tuple[list[float], list[float]] = ([], [])
    next_look = stop.min_pairs
    while True:
        first = int(rng.integers(2))
        taken = {
            which: timer(functions[which], repeats[which]) / repeats[which] for which in (first, 1 - first)
        }
        for which in (0, 1):
            samples[which].append(taken[which])
        pairs, spent = len(samples[0]), clock() - start
        if progress is not None:
            progress(pairs, min(spent / stop.budget_s, 1.0))
        out_of_time = pairs >= stop.min_pairs and (spent >= stop.budget_s or pairs >= stop.max_pairs)
        if out_of_time or pairs >= next_look:
            # Looked at ever more rarely: each look is a chance to stop on a lucky streak, and costs milliseconds.
            next_look = math.ceil(pairs * 1.25)
            ratio, low, high = bootstrap_interval(*samples, rng)
            converged = (high - low) / (2 * ratio) <= stop.noise
            if out_of_time or converged:
                break
    return PairedResult(
        samples_a=tuple(samples[0]),
        samples_b=tuple(samples[1]),
        ratio=ratio,
        low=low,
        high=high,
        repeats_a=repeats[0],
        repeats_b=repeats[1],
        converged=converged,
        seconds=clock() - start,
    )


def time_one(
    function: Function,
    *,
    stop: Stop | None = None,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, ...]:
    """Seconds a call, one entry a sample, of one function by itself: for ceilings, which have no rival."""
    stop = stop or Stop()
    timer = timer or CpuTimer()
    start = clock()
    (repeats,) = _warm_up((function,), stop, timer, clock)
    samples: list[float] = []
    while len(samples) < stop.min_pairs or (
        clock() - start < stop.budget_s and len(samples) < stop.max_pairs
    ):
        samples.append(timer(function, repeats) / repeats)
    return tuple(samples)


def _warm_up(
    functions: tuple[Function, ...], stop: Stop, timer: Timer, clock: Callable[[], float]
) -> tuple[int, ...]:
    """Runs the functions in turn for a while; how many calls of each make one sample long enough."""
    fastest = [math.inf] * len(functions)
    until = clock() + min(stop.warmup_s, stop.budget_s / 4)
    rounds = 0
    while rounds < 2 or clock() < until:
        for i, function in enumerate(functions):
            fastest[i] = min(fastest[i], timer(function, 1))
        rounds += 1
    return tuple(max(1, math.ceil(MIN_SAMPLE_S / max(t, 1e-9))) for t in fastest)
