"""How a measurement is taken: the statistics, the timers, what is dropped, what else a call costs, and what is impossible.

No test here looks at this machine's speed, but for the ones marked perf.
"""

import dataclasses
import itertools
import math
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from dlgpu.bench import ceilings, harness, measure, memory, timers
from dlgpu.bench.cases import BACKWARD, BOTH, FORWARD, OPS, STEP
from dlgpu.bench.timers import Sample


class Machine:
    """A clock that only calls move, by their cost, with noise, and drifting."""

    def __init__(self, seed=0, noise=0.03, drift=0.0):
        self.now, self.noise, self.drift = 0.0, noise, drift
        self.rng = np.random.default_rng(seed)
        self.calls = []

    def clock(self):
        return self.now

    def function(self, name, cost):
        def call():
            self.calls.append(name)
            self.now += cost * (1 + self.drift * self.now) * self.rng.lognormal(0, self.noise)

        return call

    def timer(self, function, repeats):
        start = self.now
        for _ in range(repeats):
            function()
        return self.now - start


def compare(cost_a, cost_b, seed=0, noise=0.03, drift=0.0, **stop):
    machine = Machine(seed, noise, drift)
    a, b = machine.function("a", cost_a), machine.function("b", cost_b)
    stop = harness.Stop(**{"budget_s": 1.0, "noise": 0.0, "max_pairs": 40, "warmup_s": 0.05, **stop})
    return harness.paired(a, b, stop=stop, timer=machine.timer, clock=machine.clock, seed=seed), machine


class Noisy:
    """A machine that disturbs samples in its own way. Each takes 3 ms of the budget, and gives a cost times its noise."""

    def __init__(self, kind, seed, costs=(1.0, 1.0)):
        self.kind, self.costs = kind, costs
        self.rng = np.random.default_rng(seed)
        self.now, self.states = 0.0, [0, 0]

    def function(self, which):
        def call():
            return which

        return call

    def timer(self, function, repeats):
        which, rng = function(), self.rng
        self.now += 3e-3
        factor = rng.lognormal(0, 0.01)
        if self.kind == "noise":
            factor *= rng.lognormal(0, 0.05)
        elif self.kind == "drift":
            factor *= 1 + 0.1 * self.now + 0.05 * math.sin(4 * self.now)
        elif self.kind == "spikes" and rng.random() < 0.1:
            factor *= 1 + rng.exponential(2.0)
        elif self.kind == "two modes":
            factor *= 1.2 if rng.random() < 0.3 else 1.0
        elif self.kind == "sticky modes":
            # Each side stays in a mode of its own for 20 samples on average.
            self.states[which] ^= int(rng.random() < 0.05)
            factor *= 1 + 0.1 * self.states[which]
        return Sample(2e-3 * self.costs[which] * factor * repeats)

    def run(self):
        functions = [self.function(0), self.function(1)]
        # The default budget.
        return harness.paired(
            *functions, timer=self.timer, clock=lambda: self.now, seed=int(self.rng.integers(99))
        )


KINDS = ("noise", "drift", "spikes", "two modes", "sticky modes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_against_a_is_neither_faster_nor_slower(kind):
    results = [Noisy(kind, seed).run() for seed in range(100)]
    verdicts = [result.verdict for result in results]
    assert sum(verdict in ("SAME", "AMBIGUOUS") for verdict in verdicts) >= 97
    # Nor is it for want of any verdict.
    assert verdicts.count("SAME") >= (60 if kind == "sticky modes" else 90)
    if kind != "sticky modes":
        # The interval itself, without the band, is a 95% one in spite of the looks.
        assert sum(result.low <= 1 <= result.high for result in results) >= 93


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_five_percent_are_found(kind):
    results = [Noisy(kind, seed, (1.05, 1.0)).run() for seed in range(20)]
    assert sum(result.verdict == "SLOWER" for result in results) >= 19
    assert sum(result.low <= 1.05 <= result.high for result in results) >= 17


@pytest.mark.parametrize("ratio", [0.9, 1.05])
def test_a_difference_is_found(ratio):
    results = [compare(0.01 * ratio, 0.01, seed=seed)[0] for seed in range(20)]
    assert sum(r.low <= ratio <= r.high for r in results) >= 17
    assert all(not r.low <= 1 <= r.high for r in results)


def test_a_drifting_clock_is_no_difference():
    result, machine = compare(0.01, 0.01, noise=0.001, drift=0.5)
    # One after the other it would be: the clock lost a third meanwhile.
    assert result.samples_b[-1] / result.samples_a[0] > 1.3
    assert 0.99 < result.ratio < 1.01
    orders = {tuple(machine.calls[i : i + 2]) for i in range(len(machine.calls) - 80, len(machine.calls), 2)}
    assert orders == {("a", "b"), ("b", "a")}


@pytest.mark.perf
def test_a_against_a_on_this_machine():
    op = OPS["linear"]
    case = measure.Case(op, op.shapes["small"], FORWARD)
    with ceilings.single_thread():
        timer, _, _ = timers.timer_for("cpu")
        results = []
        for trial in range(12):
            # Bound twice: where the inputs lie in memory differs.
            a, b = (case.bind(op.functions["eager"], seed=0) for _ in range(2))
            stop = harness.Stop(budget_s=1.0)
            results.append(harness.paired(a, b, stop=stop, timer=timer, seed=trial))
    assert sum(result.verdict in ("SAME", "AMBIGUOUS") for result in results) >= 11


def test_verdicts():
    found = [
        harness.verdict(*ends) for ends in ((0.9, 0.97), (1.03, 1.2), (0.99, 1.01), (0.97, 1.0), (1.0, 1.03))
    ]
    assert found == ["FASTER", "SLOWER", "SAME", "AMBIGUOUS", "AMBIGUOUS"]
    # Turned around, the verdict is too.
    assert harness.verdict(1 / 1.2, 1 / 1.03) == "FASTER"


def test_swapping_the_two_gives_the_reciprocal():
    rng = np.random.default_rng(0)
    for n in (7, 30, 101):
        a, b = rng.lognormal(0, 0.1, n), rng.lognormal(0.2, 0.1, n)
        ratio, low, high = harness.bootstrap_interval(a, b)
        assert low < ratio < high
        assert np.allclose([1 / ratio, 1 / high, 1 / low], harness.bootstrap_interval(b, a))


@pytest.mark.parametrize("n", [7, 30, 101])
def test_the_bootstrap_is_what_drawing_gives(n):
    rng = np.random.default_rng(n)
    logs = rng.normal(0, 0.1, n)
    # Neighbours that differ in sign: nothing is widened.
    logs = logs[np.argsort(np.argsort(logs) % 2 * n + rng.random(n))]
    medians = np.median(logs[rng.integers(0, n, (20000, n))], axis=1)
    k = harness._rank(n, 0.005)
    drawn = np.mean(medians <= np.sort(logs)[k - 1]), np.mean(medians < np.sort(logs)[k - 1])
    # The k-th is the first that the tail reaches.
    assert drawn[1] - 0.004 <= 0.005 <= drawn[0] + 0.004


def test_alike_neighbours_widen_the_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.1, 200)
    assert harness._inefficiency(values) < 2
    # Each ten times is no more than each once.
    repeated = np.repeat(values[:20], 10)
    assert 5 < harness._inefficiency(repeated) < 20
    assert harness._inefficiency(np.zeros(20)) == 1

    def width(logs):
        _, low, high = harness.bootstrap_interval(np.exp(logs), np.ones(len(logs)))
        return high - low

    assert width(repeated) > 2 * width(rng.permutation(repeated))


def test_when_it_stops():
    few, _ = compare(0.01, 0.01, noise=1e-6, max_pairs=1000)
    assert few.pairs > 7  # A noise target of 0 is never met; the budget ends it.
    assert not few.converged
    enough, _ = compare(0.01, 0.01, noise=0.01, max_pairs=1000, budget_s=100.0)
    assert enough.pairs == 1000
    stop = harness.Stop(budget_s=100.0, noise=0.01)
    for cost, least, most in ((0.01, stop.first_look, 100), (0.02, stop.claim, 300)):
        machine = Machine(noise=0.01)
        a, b = machine.function("a", 0.01), machine.function("b", cost)
        quiet = harness.paired(a, b, stop=stop, timer=machine.timer, clock=machine.clock)
        assert quiet.converged
        # A difference takes more to be believed.
        assert least <= quiet.pairs < most
        assert quiet.noise <= 0.01
    # Whatever the budget, there are enough pairs for an interval.
    assert compare(10.0, 10.0, budget_s=0.1)[0].pairs == harness.Stop.min_pairs


def test_warming_up_goes_by_time():
    calls = []
    for warmup_s in (0.0, 0.2):
        machine = Machine(noise=0.0)
        function = machine.function("a", 0.01)
        stop = harness.Stop(budget_s=1.0, max_pairs=7, warmup_s=warmup_s)
        harness.paired(function, function, stop=stop, timer=machine.timer, clock=machine.clock)
        calls.append(len(machine.calls))
    # 0.2 s are 20 calls; without any there are 2 of each function.
    assert calls[1] - calls[0] == pytest.approx(16, abs=2)


def test_a_sample_is_long_enough():
    result, _ = compare(1e-5, 1e-4)
    assert result.repeats_a * 1e-5 >= 0.9 * harness.MIN_SAMPLE_S
    assert result.repeats_b * 1e-4 >= 0.9 * harness.MIN_SAMPLE_S
    assert 0.9e-5 < np.median(result.samples_a) < 1.1e-5


def test_a_disturbed_warm_up_does_not_make_samples_short():
    machine = Machine(noise=0.0)
    slow = iter([1000] * 4)

    def timer(function, repeats):
        return machine.timer(function, repeats) * next(slow, 1)

    function = machine.function("a", 1e-4)
    stop = harness.Stop(warmup_s=0.0)
    result = harness.paired(function, function, stop=stop, timer=timer, clock=machine.clock)
    assert result.repeats_a == pytest.approx(20, abs=1)


def test_several_rivals_in_one_run():
    machine = Machine(noise=0.01)
    costs = {"a": 0.01, "b": 0.02, "c": 0.04}
    functions = [machine.function(name, cost) for name, cost in costs.items()]
    stop = harness.Stop(budget_s=5.0, noise=0.0, max_pairs=40, warmup_s=0.0)
    settings = {"stop": stop, "timer": machine.timer, "clock": machine.clock}
    against_b, against_c = harness.interleaved(functions, **settings)
    assert (against_b.ratio, against_c.ratio) == (pytest.approx(0.5, rel=0.02), pytest.approx(0.25, rel=0.02))
    # The very same samples, and every order of the three.
    assert against_b.samples_a == against_c.samples_a
    rounds = [tuple(machine.calls[i : i + 3]) for i in range(6, len(machine.calls), 3)]
    assert set(rounds) == set(itertools.permutations("abc"))
    (chosen,) = harness.interleaved(functions, **settings, pairs=[(2, 1)])
    assert chosen.ratio == pytest.approx(2, rel=0.02)
    # None is done before all are.
    loud = {"a": 0.0, "b": 0.0, "c": 0.3}
    rng = np.random.default_rng(0)

    def timer(function, repeats):
        return 0.01 * rng.lognormal(0, loud[function()]) * repeats

    named = [lambda name=name: name for name in loud]
    first, last = harness.interleaved(
        named, stop=dataclasses.replace(stop, noise=0.01, max_pairs=100), timer=timer
    )
    assert (first.converged, last.converged, first.pairs) == (True, False, 100)


def disturbed_run(share, seed=0, **stop):
    """A against A where a share of the rounds is disturbed, in which A takes twice its time."""
    rng = np.random.default_rng(seed)
    state = {"round": -1, "bad": False, "calls": 0}

    def timer(function, repeats):
        if repeats == 1:
            return 1e-3
        if state["calls"] % 2 == 0:
            state["bad"] = rng.random() < share
        state["calls"] += 1
        bad = state["bad"]
        seconds = 1e-3 * (2 if bad and function() == "a" else 1) * rng.lognormal(0, 0.01)
        return Sample(seconds * repeats, "a busy neighbour" if bad and function() == "a" else "")

    settings = harness.Stop(**{"noise": 0.0, "max_pairs": 60, "warmup_s": 0.0, **stop})
    return harness.paired(lambda: "a", lambda: "b", stop=settings, timer=timer, seed=seed)


def test_disturbed_pairs_are_dropped_and_kept_apart():
    result = disturbed_run(0.3)
    assert 5 < len(result.dropped) < 30
    assert result.pairs + len(result.dropped) == 60
    assert result.disturbed == len(result.dropped) / 60
    assert all(pair.why == "a busy neighbour" and pair.a_s > 1.5 * pair.b_s for pair in result.dropped)
    assert max(result.samples_a) < 1.5e-3
    assert result.verdict == "SAME"


def test_where_most_pairs_are_disturbed_none_is_dropped_and_there_is_no_verdict():
    result = disturbed_run(0.9)
    assert not result.dropped
    assert result.pairs == 60
    assert result.ratio > 1.8
    assert result.crowded
    assert result.verdict == "AMBIGUOUS"
    # Nor is so much dropped that too few are left.
    few = disturbed_run(0.4, seed=1, min_pairs=7, max_pairs=8)
    assert few.pairs >= 7


def test_pairs_below_the_sustained_clock_are_dropped():
    rng = np.random.default_rng(0)
    clocks = itertools.cycle([1980.0] * 18 + [1400.0] * 2)

    def timer(function, repeats):
        clock = next(clocks)
        return Sample(1e-3 * repeats * 1980 / clock * rng.lognormal(0, 0.001), clock_mhz=clock)

    stop = harness.Stop(noise=0.0, max_pairs=50, warmup_s=0.0)
    result = harness.paired(lambda: None, lambda: None, stop=stop, timer=timer)
    assert len(result.dropped) >= 4
    assert {pair.why for pair in result.dropped} == {harness.SLOW_CLOCK}
    assert set(result.clocks_mhz) == {1980.0}
    assert len(result.clocks_mhz) == result.pairs
    assert max(result.samples_a) < 1.1e-3


class Clock:
    def __init__(self):
        self.now, self.cpu = 0.0, 0.0


def test_the_cpu_timer_waits_for_quiet_and_warms_up():
    clock, calls = Clock(), []

    def sleep(duration):
        clock.now += duration
        # Someone's workers spin for 5 ms.
        clock.cpu += duration if clock.now < 0.0045 else 0.0

    def function():
        calls.append(clock.now)
        clock.now += 1.0

    timer = timers.CpuTimer(clock=lambda: clock.now, cpu_clock=lambda: clock.cpu, sleep=sleep)
    assert timer(function, 8).seconds == pytest.approx(8.0)
    assert len(calls) == 10
    assert calls[0] == pytest.approx(0.005)


def test_the_cpu_timer_empties_the_cache_outside_what_it_times():
    clock, log = Clock(), []

    def flush():
        log.append("flush")
        clock.now += 100.0

    def function():
        log.append("run")
        clock.now += 2.0

    def sleep(duration):
        clock.now += duration

    def timer():
        settings = {"clock": lambda: clock.now, "cpu_clock": lambda: 0.0, "sleep": sleep}
        return timers.CpuTimer(**settings, flush=flush)

    assert timer()(function, 3).seconds == pytest.approx(6.0)
    assert log == ["run", *["flush", "run"] * 3]
    # Many calls are told from a few.
    log.clear()
    assert timer()(function, 1000).seconds == pytest.approx(2000.0)
    assert log.count("flush") == timers.CpuTimer.COLD_CALLS < 1000


def test_the_cpu_watch_sees_others_and_not_itself():
    clock, waited = Clock(), [0.0]

    def watch(wait, used, wall=1.0, cores=2):
        found = timers.CpuWatch(lambda: waited[0], lambda: clock.cpu, lambda: clock.now, cores)
        found.start()
        waited[0] += wait
        clock.cpu += used
        clock.now += wall
        return found.stop()[0]

    assert watch(0.0, 1.0) == ""
    assert "waited 50% of the time" in watch(0.5, 0.5)
    assert watch(0.01, 1.0) == ""
    # More threads than cores: this process kept both busy itself.
    assert watch(2.0, 1.95) == ""
    blind = timers.CpuWatch(lambda: None, lambda: 0.0, lambda: 0.0, 2)
    blind.start()
    assert blind.stop() == ("", None)


class Nvml:
    """What is asked of the driver's library."""

    NVML_CLOCK_SM = 1

    def __init__(self, clock=1980, reasons=0, fails=False):
        self.clock, self.reasons, self.fails = clock, reasons, fails

    def nvmlInit(self):
        if self.fails:
            raise RuntimeError("no driver")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self.clock

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons


@pytest.mark.parametrize(
    ("reasons", "disturbed"),
    # None, idle, the power limit; hardware, heat by software, heat by hardware, power brake.
    [(0, False), (1, False), (4, False), (8, True), (0x20, True), (0x40, True), (0x80, True)],
)
def test_the_gpu_watch(reasons, disturbed):
    why, clock = timers.GpuWatch("GPU-1", Nvml(1700, reasons)).stop()
    assert bool(why) == disturbed
    assert clock == 1700
    assert timers.GpuWatch("GPU-1", Nvml(fails=True)).stop() == ("", None)


class Event:
    log, now = [], 0.0

    def record(self):
        Event.log.append("record")
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def gpu():
    Event.log, Event.now = [], 0.0

    def act(name, duration):
        def call():
            Event.log.append(name)
            Event.now += duration

        return call

    return act


class Graph:
    def __init__(self, function, calls):
        self._function, self._calls = function, calls

    def replay(self):
        Event.log.append("replay")
        log = Event.log[:]
        for _ in range(self._calls):
            self._function()
        Event.log[:] = log


def test_the_cuda_timer_flushes_outside_the_events(gpu):
    timer = timers.CudaTimer(gpu("flush", 100.0), Event, gpu("synchronize", 0.0))
    assert timer(gpu("run", 2.0), 3).seconds == pytest.approx(6e-3)
    assert Event.log == ["flush", "record", "run", "record"] * 3 + ["synchronize"]


def test_the_cuda_timer_reads_the_clock_while_the_gpu_works(gpu):
    class Watch:
        def start(self):
            pass

        def stop(self):
            Event.log.append("clock")
            return "throttled", 1500.0

    timer = timers.CudaTimer(lambda: None, Event, gpu("synchronize", 0.0), Watch())
    sample = timer(gpu("run", 2.0), 2)
    assert sample == (pytest.approx(4e-3), "throttled", 1500.0)
    assert Event.log[-2:] == ["clock", "synchronize"]


def test_the_graph_timer(gpu):
    captured = []

    def capture(function, calls):
        captured.append(calls)
        return Graph(function, calls)

    function = gpu("run", 2.0)
    hot = timers.GraphTimer(event=Event, synchronize=gpu("synchronize", 0.0), capture=capture)
    # Whole graphs of 20 calls; the first replay is not timed.
    assert hot(function, 50).seconds == pytest.approx(50 * 2e-3)
    assert Event.log == ["replay", "record", *["replay"] * 3, "record", "synchronize"]
    hot(function, 5)
    assert captured == [timers.GraphTimer.CALLS]
    Event.log.clear()
    cold = timers.GraphTimer(gpu("flush", 100.0), Event, gpu("synchronize", 0.0), capture=capture)
    assert cold(function, 2).seconds == pytest.approx(4e-3)
    assert Event.log == ["flush", "record", "replay", "record"] * 2 + ["synchronize"]
    assert captured == [timers.GraphTimer.CALLS, 1]


def test_caches_are_overwritten_three_times_over(monkeypatch):
    made, empty, zeros = [], torch.empty, np.zeros
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(L2_cache_size=50 << 20)
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "empty", lambda n, dtype, device: made.append((n, device)) or empty(8, dtype=dtype)
        )
        timers.gpu_flusher()()
    assert made == [(150 << 20, "cuda")]
    monkeypatch.setattr(timers, "cpu_cache_bytes", lambda: 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(np, "zeros", lambda n: made.append(zeros(n)) or made[-1])
        flush = timers.cpu_flusher()
    flush()
    flush()
    assert made[-1].nbytes == 3 << 20
    assert (made[-1] == 1).all()


@pytest.mark.perf
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tritons_timer_says_the_same():
    """A cross-check by a timer that is not ours. It empties the cache too."""
    from triton.testing import do_bench

    x = torch.randn(1 << 26, device="cuda")
    y = torch.empty_like(x)
    timer, _, cache = timers.timer_for("cuda")
    assert cache == "cold"
    ours = float(np.median(harness.time_one(lambda: y.copy_(x), timer=timer)))
    theirs = do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3
    assert 0.9 < ours / theirs < 1.1


def test_which_timer():
    timer, name, cache = timers.timer_for("cpu")
    assert (type(timer), name, cache) == (timers.CpuTimer, "host", "host")
    assert timers.timer_for("cpu", cache="cold")[1:] == ("host", "cold")
    for name, cache in (("events", ""), ("graph", ""), ("sundial", ""), ("host", "lukewarm")):
        with pytest.raises(ValueError, match="timer"):
            timers.timer_for("cpu", name, cache)


def test_a_cold_cache_takes_longer_to_read():
    flush = timers.cpu_flusher()
    x = np.ones(1 << 16)
    hot, cold = (timers.CpuTimer(flush=f) for f in (None, flush))
    # Of many, the fastest.
    assert min(cold(x.sum, 20).seconds for _ in range(5)) > min(hot(x.sum, 20).seconds for _ in range(5))


def test_saved_for_backward():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    # z for the gelu; x and w are there anyway.
    assert memory.saved_bytes(lambda: torch.nn.functional.gelu(x @ w.t()), [x, w]) == 8 * 5 * 4
    assert memory.saved_bytes(lambda: torch.nn.functional.gelu(x @ w.t())) == (8 * 5 + 8 * 4 + 5 * 4) * 4
    # y twice is y once, and a view of it all of it.
    assert memory.saved_bytes(lambda: torch.sigmoid(x)[:2].mul(torch.sigmoid(x)[:2]), [x]) == 2 * 8 * 4 * 4

    def twice():
        y = torch.sigmoid(x)
        return y * y

    assert memory.saved_bytes(twice, [x]) == 8 * 4 * 4
    with torch.no_grad():
        constant = torch.randn(3)
    assert memory.saved_bytes(lambda: constant + 1) == 0


def test_peak_memory_is_what_a_call_adds(monkeypatch):
    known = {"synchronize": None, "memory_allocated": 100, "reset_peak_memory_stats": None}
    for name, value in (known | {"max_memory_allocated": 350}).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert memory.peak_bytes(lambda: None, "cuda") == 250
    assert memory.peak_bytes(lambda: None, "cpu") is None


def test_what_a_call_costs_besides():
    clock, waits = Clock(), []

    def function():
        clock.now += 2.0

    def synchronize():
        waits.append(clock.now)
        clock.now += 50.0

    # The GPU's part, in which the host waits, is not the host's.
    assert memory.host_seconds(function, synchronize, lambda: clock.now) == pytest.approx(2.0)


def test_the_first_call_has_what_binding_compiles():
    clock = Clock()

    def call():
        clock.now += 2.0

    def bind():
        # Where backward is timed, forward runs here.
        clock.now += 30.0
        return call

    def synchronize():
        clock.now += 100.0

    assert memory.first_call(bind, synchronize, lambda: clock.now) == (call, pytest.approx(132.0))


def test_compilers_begin_with_empty_caches(monkeypatch):
    """On disk and in this process; those on disk are back afterwards."""

    class JITFunction:
        pass

    kernel = JITFunction()
    kernel.device_caches = {0: "compiled"}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "/before")
    compiled = torch.compile(
        lambda x: x + 1, backend=lambda module, inputs: calls.append(0) or module.forward
    )
    calls = []
    compiled(torch.ones(3))
    compiled(torch.ones(3))
    assert len(calls) == 1
    with memory.fresh_compilers():
        places = [Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
        assert places[0].is_dir()
        assert not any(places[0].iterdir())
        assert places[0] in places[1].parents
        assert kernel.device_caches == {}
        compiled(torch.ones(3))
        assert len(calls) == 2
    assert not places[0].exists()
    assert os.environ["TRITON_CACHE_DIR"] == os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/before"


def test_ceilings():
    machine = Machine(noise=0.1)

    def timer(function, repeats):
        function()
        machine.now += 0.1
        return Sample(1e-3 * repeats * machine.rng.lognormal(0, 0.1))

    found = list(
        ceilings.ceilings("cpu", 0.01, (torch.float32,), timers=(timer, timer), sizes=(1 << 12, 1 << 10, 8))
    )
    names = [row["name"] for row in found]
    assert names == [
        ceilings.COPY,
        ceilings.CACHED_COPY,
        ceilings.matmul_name(torch.float32),
        ceilings.LAUNCH,
    ]
    copy, _, product, _ = found
    assert copy["value"] == pytest.approx(2 * (1 << 12) / 1e-3, rel=0.3)
    assert product["value"] == pytest.approx(2 * 8**3 / 1e-3, rel=0.3)
    best = ceilings.best([*found, {"kind": "timing"}])
    for row in found:
        assert row["kind"] == "ceiling"
        # Several threads can do as much as one alone, times their number.
        assert best[row["name"]] == row["limit"] >= row["value"]


def case_of(op="linear", passes=FORWARD, **shape):
    return measure.Case(OPS[op], shape or {"M": 5, "N": 7, "K": 3}, passes)


QUICK = harness.Stop(budget_s=0.01, min_pairs=3, max_pairs=3, warmup_s=0.0)


def rows_of(case, library, best=None, again=dict, **settings):
    libraries = {"ours": library, "eager": case.described.functions["eager"]}
    return list(
        measure.measure(case, libraries, stop=QUICK, best=best, again=lambda case: again(), **settings)
    )


@pytest.mark.parametrize("passes", [FORWARD, BACKWARD, BOTH])
def test_a_right_library_gets_a_time(passes):
    case = case_of(passes=passes)
    (row,) = rows_of(case, case.described.functions["dlgpu"], compulsory_bytes=1000)
    assert (row["kind"], row["a"], row["b"], row["passes"]) == ("timing", "ours", "eager", passes)
    assert row["flops"] == {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[passes] * 2 * 5 * 7 * 3
    median = sorted(row["samples_a_s"])[row["pairs"] // 2]
    assert row["bytes_per_s"] == pytest.approx(1000 / median)
    assert (row["saved_a_bytes"] is None) == (passes == FORWARD)
    if passes != FORWARD:
        # z, of the gelu.
        assert row["saved_a_bytes"] == row["saved_b_bytes"] == 5 * 7 * 4


def test_a_library_that_errs_by_little_gets_none():
    case = case_of(passes=BOTH)
    honest = case.described.functions["dlgpu"]
    (row,) = rows_of(case, lambda **inputs: honest(**inputs) * (1 + 1e-5))
    assert (row["kind"], row["provider"]) == ("wrong", "ours")


def test_a_library_that_turns_wrong_while_it_is_timed_gets_none():
    case, calls = case_of(), itertools.count()

    def tired(**inputs):
        y = case.described.functions["eager"](**inputs)
        return y if next(calls) < 8 else y + 1

    (row,) = rows_of(case, tired)
    assert (row["kind"], row["provider"]) == ("wrong", "ours")


def test_a_library_that_is_not_there_is_absent():
    def missing(**inputs):
        raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel")

    (row,) = rows_of(case_of(), missing)
    assert (row["kind"], row["provider"]) == ("absent", "ours")
    assert "liger_kernel" in row["reason"]


def test_a_step_is_verified_from_its_beginning():
    case = case_of("adam", STEP, n=20, tensors=3)
    (row,) = rows_of(case, case.described.functions["dlgpu"])
    assert row["kind"] == "timing"

    def forgetful(params, options, state):
        found = case.described.functions["eager"](params, options, state)
        params[0].data.add_(1e-3)
        return found

    (row,) = rows_of(case, forgetful)
    assert row["kind"] == "wrong"


def test_inputs_that_torch_changes_may_change():
    case = case_of("batch_norm", N=6, C=5)
    (row,) = rows_of(case, case.described.functions["dlgpu"])
    assert row["kind"] == "timing"


def test_a_rate_above_the_ceiling_is_impossible():
    case = case_of()
    eager = case.described.functions["eager"]
    slow = {ceilings.COPY: 1.0, ceilings.CACHED_COPY: 1.0, ceilings.matmul_name(torch.float32): 1e30}
    rows = rows_of(case, eager, best=slow)
    assert [(row["kind"], row["provider"]) for row in rows] == [
        ("impossible", "ours"),
        ("impossible", "eager"),
    ]
    assert "B/s" in rows[0]["detail"]
    products = {**slow, ceilings.CACHED_COPY: 1e30, ceilings.matmul_name(torch.float32): 1.0}
    assert "FLOP/s" in rows_of(case, eager, best=products)[0]["detail"]
    # Ours is held to what its kernels must move, the other to the inputs and results alone.
    rate = {ceilings.COPY: 1e12, ceilings.CACHED_COPY: 1e12}
    rows = rows_of(case, eager, best=rate, compulsory_bytes=10**12)
    assert [(row["kind"], row["provider"]) for row in rows] == [("impossible", "ours")]
    # A ceiling that was disturbed is measured again first.
    (row,) = rows_of(case, eager, best=slow, again=lambda: dict.fromkeys(slow, 1e30))
    assert row["kind"] == "timing"
    # A cold cache is held to the copy from memory, a hot one to the cache's.
    memory_only = {ceilings.COPY: 1.0, ceilings.CACHED_COPY: 1e30}
    assert measure.impossible(1e-3, 1000, None, memory_only, case, "cold")
    assert not measure.impossible(1e-3, 1000, None, memory_only, case, "host")


def test_the_fewest_bytes():
    case = case_of()
    bound = case.bind(case.described.functions["eager"], 0)
    assert measure.floor_bytes(bound) == 4 * (5 * 3 + 7 * 3 + 7 + 5 * 7)


@pytest.mark.parametrize("passes", [FORWARD, BACKWARD, BOTH])
def test_fresh_values_come_into_the_same_memory(passes):
    case = case_of(passes=passes)
    eager = case.described.functions["eager"]
    bound, other = case.bind(eager, 1), case.bind(eager, 2)
    before, places = [t.clone() for t in bound()], [t.data_ptr() for t in bound.tensors()]
    bound.refresh(2)
    assert [t.data_ptr() for t in bound.tensors()] == places
    for fresh, expected, old in zip(bound(), other(), before, strict=True):
        assert torch.equal(fresh, expected)
        assert not torch.equal(fresh, old)
