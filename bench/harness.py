"""Measures functions against one another: interleaved in random order, paired, with an interval.

Sequential runs mistake a drifting clock for a difference: with 5% of drift and equal functions they report 1.025x. Here all
functions run back to back within each round, in an order drawn anew for each, and what is reported is the median of the
rounds' ratios A / B with its 95% bootstrap interval. Below 1, A is faster.

What an interval must survive, since a benchmark that finds differences where there are none is worse than none:

- *Looking.* To stop as soon as the interval is narrow is to stop on lucky streaks: with the plain 95% interval, looked at
  from 7 pairs on, 87% of simulated runs (3% noise) had the truth in it. So looks are few (from 30 pairs on, each half as many
  again), and each is made at 99%: Pocock's bound for ten looks that together err one time in 20 (Biometrika 64, 1977).
- *Memory.* A machine that stays in one of two states for a while makes neighbouring pairs alike, and a bootstrap that draws
  pairs one by one then takes 20 for far more than they tell. The variance of a median grows by 1 + 2 (the sum of the
  autocorrelations of the signs about it), so the interval is widened by the root of that, summed up to the first that is
  not positive (Geyer, Statistical Science 7, 1992).
- *States that last.* Two states 10% apart that hold for 20 samples on either side by itself look like a difference to any
  rule that has seen 30 pairs. So a run may stop early with nothing found, but goes on to 150 pairs with a difference.
- *Nothing.* Below 2% there is no verdict (`verdict`): the same code, bound twice, differs by as much through where its inputs
  lie in memory, and no interval of one run can see that.

Measured in simulation by these rules (tests/test_harness.py), A against A, 300 runs each with noise of 5%, drift, spikes, two
modes 20% apart, and such lasting states: the interval holds 1 in 98% or more of each, and 1 verdict of the 1,500 is wrong.

Disturbed rounds (see `timers`) are left out and kept apart, with the reason; so are those below the clock that the run
sustained. A whole round goes, not a sample, and by a rule that does not look at the time it took: so that no side wins by it.
Where more than half of the rounds are disturbed that is the state of the machine: all are kept, and there is no verdict.
Seen on 2 cores with torch's 2 threads: one busy process beside them and each parallel loop waits for a thread that does not
run, so that functions of 0.2 ms take 56 ms each, and are much the same.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .timers import CpuTimer, Function, Sample, Timer

__all__ = [
    "BAND",
    "CONFIDENCE",
    "CpuTimer",
    "Dropped",
    "Function",
    "PairedResult",
    "Stop",
    "Timer",
    "bootstrap_interval",
    "interleaved",
    "paired",
    "time_one",
    "verdict",
]

CONFIDENCE = 0.95
# Of each look: see above.
LOOK_CONFIDENCE = 0.99
# Less than this matters to nobody, and the same code bound twice may differ by it.
BAND = 0.02
# The shortest sample. The clock would allow 200 us; one scheduler tick in 2 ms disturbs less.
MIN_SAMPLE_S = 2e-3
# Of the median clock of the run's rounds.
SUSTAINED = 0.95
SLOW_CLOCK = "below the clock that the run sustained"


@dataclasses.dataclass(frozen=True)
class Stop:
    """When to stop: at the noise target, at the budget, or at the most pairs, whichever comes first.

    budget_s: for warm-up and rounds together; at least `min_pairs` are measured whatever they take.
    noise: half the interval's width over the ratio, of every ratio.
    first_look: pairs before it may stop for being quiet.
    claim: pairs before it may stop so with a difference found.
    """

    budget_s: float = 5.0
    noise: float = 0.01
    min_pairs: int = 7
    max_pairs: int = 1000
    warmup_s: float = 0.2
    first_look: int = 30
    claim: int = 150


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A disturbed pair: seconds a call of both, and why it does not count."""

    a_s: float
    b_s: float
    why: str


@dataclasses.dataclass(frozen=True)
class PairedResult:
    """What a comparison gave.

    samples_a, samples_b: seconds a call, one entry a pair that counts, in the order measured.
    ratio, low, high: the median of samples_a / samples_b and its 95% bootstrap interval.
    repeats_a, repeats_b: calls in one sample, of the last pair.
    converged: the noise target was met before the budget ran out.
    dropped: the pairs that do not count.
    disturbed: the share of pairs that were disturbed, whether they were dropped or, being too many, not.
    clocks_mhz: the GPU's clock in each pair that counts; None where it was not read.
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
    dropped: tuple[Dropped, ...] = ()
    disturbed: float = 0.0
    clocks_mhz: tuple[float, ...] | None = None

    @property
    def pairs(self) -> int:
        return len(self.samples_a)

    @property
    def noise(self) -> float:
        """Half the interval's width over the ratio."""
        return (self.high - self.low) / (2 * self.ratio)

    @property
    def crowded(self) -> bool:
        """Whether more than half of the pairs were disturbed: then what was timed is the scheduler."""
        return self.disturbed > 0.5

    @property
    def verdict(self) -> str:
        """`verdict`; of a crowded machine's pairs there is none."""
        return "AMBIGUOUS" if self.crowded else verdict(self.low, self.high)


def verdict(low: float, high: float, band: float = BAND) -> str:
    """What an interval of a ratio A / B says: "FASTER" or "SLOWER" if all of it lies beyond the band about 1, "SAME" if all
    of it lies within, else "AMBIGUOUS"."""
    if high < 1 / (1 + band):
        return "FASTER"
    if low > 1 + band:
        return "SLOWER"
    return "SAME" if low >= 1 / (1 + band) and high <= 1 + band else "AMBIGUOUS"


def bootstrap_interval(
    samples_a: Any, samples_b: Any, confidence: float = LOOK_CONFIDENCE
) -> tuple[float, float, float]:
    """(median of a / b, low, high): the percentile bootstrap of the median over pairs, widened where neighbours are alike.

    The bootstrap is the exact one, without drawing: a resample's median is at most the k-th smallest of n values as often as
    at least half of n draws fall among the k smallest, which is a binomial probability (Efron, Annals of Statistics 7,
    1979). Computed on logarithms, so that swapping a and b gives the reciprocals.
    """
    logs = np.log(np.asarray(samples_a, np.float64)) - np.log(np.asarray(samples_b, np.float64))
    ordered, n = np.sort(logs), len(logs)
    k = _rank(n, (1 - confidence) / 2)
    middle, widen = float(np.median(logs)), math.sqrt(_inefficiency(logs))
    low = middle - widen * (middle - float(ordered[k - 1]))
    high = middle + widen * (float(ordered[n - k]) - middle)
    return math.exp(middle), math.exp(low), math.exp(high)


def _rank(n: int, tail: float) -> int:
    """The smallest k for which a resample's median is at most the k-th smallest of n values with probability `tail`."""
    half = np.arange((n + 1) // 2, n + 1)
    log_factorial = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    ways = log_factorial[n] - log_factorial[half] - log_factorial[n - half]
    first, last = 1, n
    while first < last:
        k = (first + last) // 2
        share = k / n
        if np.exp(ways + half * math.log(share) + (n - half) * math.log1p(-share)).sum() >= tail:
            last = k
        else:
            first = k + 1
    return first


def _inefficiency(logs: np.ndarray) -> float:
    """By how much the variance of the median is larger than if the values were independent; at least 1."""
    signs = np.sign(logs - np.median(logs))
    power = float(signs @ signs)
    found = 1.0
    for lag in range(1, len(signs) // 2):
        correlation = float(signs[:-lag] @ signs[lag:]) / power if power else 0.0
        if correlation <= 0:
            break
        found += 2 * correlation
    return found


@dataclasses.dataclass
class _Rounds:
    """What was taken so far: for each round a sample of each function, seconds a call."""

    pairs: tuple[tuple[int, int], ...]
    seconds: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    disturbed: list[str] = dataclasses.field(default_factory=list)
    clocks: list[float | None] = dataclasses.field(default_factory=list)

    def add(self, samples: Sequence[Sample], repeats: Sequence[int]) -> None:
        self.seconds.append(tuple(s.seconds / n for s, n in zip(samples, repeats, strict=True)))
        self.disturbed.append(next((s.disturbed for s in samples if s.disturbed), ""))
        clocks = [s.clock_mhz for s in samples if s.clock_mhz is not None]
        self.clocks.append(min(clocks) if clocks else None)

    def reasons(self) -> list[str]:
        """For each round, why it is disturbed, or ""."""
        known = [clock for clock in self.clocks if clock is not None]
        slow = SUSTAINED * float(np.median(known)) if known else 0.0
        return [
            why or (SLOW_CLOCK if clock is not None and clock < slow else "")
            for why, clock in zip(self.disturbed, self.clocks, strict=True)
        ]

    def counting(self, least: int) -> list[bool]:
        """For each round, whether it counts; all do, where too few would."""
        reasons = self.reasons()
        quiet = reasons.count("")
        return [quiet < max(least, len(reasons) / 2) or not why for why in reasons]


def interleaved(
    functions: Sequence[Function],
    *,
    stop: Stop | None = None,
    timer: Timer | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, float], None] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[PairedResult]:
    """Time the first function against each of the others, all of them in one run: a result for each of the others.

    Args:
        functions: called without arguments; what they return is dropped. At least two.
        pairs: which function (a, b) there is to be a result for, by number, if not (0, 1), (0, 2) and so on.
        timer: how a sample is taken; CpuTimer unless given.
        seed: of the order within rounds.
        clock: for the budget only.
        progress: called after each round with the number of rounds and the share of the budget that is spent.
    """
    stop = stop or Stop()
    timer = timer or CpuTimer()
    rng = np.random.default_rng(seed)
    start = clock()
    fastest = _warm_up(functions, stop, timer, clock)
    rounds = _Rounds(tuple(pairs or ((0, other) for other in range(1, len(functions)))))
    next_look = max(stop.min_pairs, stop.first_look)
    while True:
        # Anew each round: on a busy machine a quiet moment may come after the warm-up only.
        repeats = _repeats(fastest)
        taken: dict[int, Sample] = {}
        for which in map(int, rng.permutation(len(functions))):
            taken[which] = _sample(timer, functions[which], repeats[which])
            fastest[which] = min(fastest[which], taken[which].seconds / repeats[which])
        rounds.add([taken[which] for which in range(len(functions))], repeats)
        number, spent = len(rounds.seconds), clock() - start
        if progress is not None:
            progress(number, min(spent / stop.budget_s, 1.0))
        out_of_time = number >= stop.min_pairs and (spent >= stop.budget_s or number >= stop.max_pairs)
        if not out_of_time and number < next_look:
            continue
        next_look = math.ceil(number * 1.5)
        results = _results(rounds, repeats, stop, spent)
        quiet = all(result.converged for result in results)
        claims = any(result.verdict in ("FASTER", "SLOWER") for result in results)
        if out_of_time or (quiet and (number >= stop.claim or not claims)):
            return results


def _results(rounds: _Rounds, repeats: Sequence[int], stop: Stop, spent: float) -> list[PairedResult]:
    reasons, counting = rounds.reasons(), rounds.counting(stop.min_pairs)
    kept = [seconds for seconds, counts in zip(rounds.seconds, counting, strict=True) if counts]
    clocks = [clock for clock, counts in zip(rounds.clocks, counting, strict=True) if counts]
    found = []
    for one, other in rounds.pairs:
        a, b = (tuple(seconds[which] for seconds in kept) for which in (one, other))
        ratio, low, high = bootstrap_interval(a, b)
        found.append(
            PairedResult(
                samples_a=a,
                samples_b=b,
                ratio=ratio,
                low=low,
                high=high,
                repeats_a=repeats[one],
                repeats_b=repeats[other],
                converged=(high - low) / (2 * ratio) <= stop.noise,
                seconds=spent,
                dropped=tuple(
                    Dropped(seconds[one], seconds[other], why)
                    for seconds, why, counts in zip(rounds.seconds, reasons, counting, strict=True)
                    if not counts
                ),
                disturbed=sum(map(bool, reasons)) / len(reasons),
                clocks_mhz=None if None in clocks else tuple(clock for clock in clocks if clock is not None),
            )
        )
    return found


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
    """`interleaved` of two: `a` against `b`."""
    (result,) = interleaved((a, b), stop=stop, timer=timer, seed=seed, clock=clock, progress=progress)
    return result


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
    (repeats,) = _repeats(_warm_up((function,), stop, timer, clock))
    samples: list[float] = []
    while len(samples) < stop.min_pairs or (
        clock() - start < stop.budget_s and len(samples) < stop.max_pairs
    ):
        samples.append(_sample(timer, function, repeats).seconds / repeats)
    return tuple(samples)


def _sample(timer: Timer, function: Function, repeats: int) -> Sample:
    taken = timer(function, repeats)
    return taken if isinstance(taken, Sample) else Sample(taken)


def _warm_up(
    functions: Sequence[Function], stop: Stop, timer: Timer, clock: Callable[[], float]
) -> list[float]:
    """Runs the functions in turn for a while; seconds of each one's fastest call."""
    fastest = [math.inf] * len(functions)
    until = clock() + min(stop.warmup_s, stop.budget_s / 4)
    rounds = 0
    while rounds < 2 or clock() < until:
        for i, function in enumerate(functions):
            fastest[i] = min(fastest[i], _sample(timer, function, 1).seconds)
        rounds += 1
    return fastest


def _repeats(fastest: Sequence[float]) -> tuple[int, ...]:
    """How many calls make one sample long enough."""
    return tuple(max(1, math.ceil(MIN_SAMPLE_S / max(seconds, 1e-9))) for seconds in fastest)
