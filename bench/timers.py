"""How one sample is taken: by the host's clock, by CUDA events, or by events around a CUDA graph.

A timer is a function of (what to call, how often) giving the seconds that the calls took, and what spoke against trusting
them. Everything that it does besides the calls lies outside its two readings of the clock: waiting for quiet, warming up,
emptying the cache.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = [
    "CpuTimer",
    "CpuWatch",
    "CudaTimer",
    "Function",
    "GpuWatch",
    "GraphTimer",
    "Sample",
    "Timer",
    "Watch",
    "cpu_cache_bytes",
    "cpu_flusher",
    "gpu_flusher",
    "sees_waiting",
    "timer_for",
]

Function = Callable[[], object]

# A process with other busy threads never gets quiet.
SETTLE_LIMIT_S = 0.05
# How much is overwritten to empty a cache, in caches. A cache that is not strictly least-recently-used keeps some lines of
# what a single pass of its own size should have evicted.
FLUSH = 3
# The last level of a server's CPU can be hundreds of megabytes, shared with others; overwriting more takes longer than it
# makes a difference.
_MOST_FLUSHED = 256 << 20


class Sample(NamedTuple):
    """Seconds of all calls together; why they are not to be trusted, if so; the GPU's clock in MHz, where it was read."""

    seconds: float
    disturbed: str = ""
    clock_mhz: float | None = None


# Seconds that so many calls of a function take in all. A bare number is a sample that nothing speaks against.
Timer = Callable[[Function, int], "Sample | float"]


class Watch(Protocol):
    """What looks at the machine while a sample is taken."""

    def start(self) -> None:
        """Called right before the clock is read."""

    def stop(self) -> tuple[str, float | None]:
        """Called right after: (why the sample is disturbed or "", the GPU's clock)."""


class Unwatched:
    """Sees nothing."""

    def start(self) -> None:
        pass

    def stop(self) -> tuple[str, float | None]:
        return "", None


class CpuWatch:
    """Whether other processes held the cores that this one wanted.

    Linux counts, for each thread, how long it was ready to run and waited for a core (/proc/self/task/*/schedstat, in ns).
    Waiting that the process does to itself, with more busy threads than cores, is part of what is timed: a sample is
    disturbed only if the threads waited and yet the process did not use the cores fully. Where the system does not say,
    nothing is ever disturbed.
    """

    # Of the sample's time: less is in the noise of any sample.
    WAITED = 0.05
    # Of all cores' time. Reading the counters and ticks take some.
    FULL = 0.9

    def __init__(
        self,
        waited_s: Callable[[], float | None] | None = None,
        cpu_clock: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.perf_counter,
        cores: int | None = None,
    ) -> None:
        if cores is None:
            from .environment import cores as available

            cores = available()
        self._waited_s, self._cpu_clock, self._clock = waited_s or _run_queue_wait, cpu_clock, clock
        self._cores = cores
        self._before: tuple[float | None, float, float] = (None, 0.0, 0.0)

    def start(self) -> None:
        self._before = (self._waited_s(), self._cpu_clock(), self._clock())

    def stop(self) -> tuple[str, float | None]:
        then, burned, started = self._before
        wall, used, now = self._clock() - started, self._cpu_clock() - burned, self._waited_s()
        if then is None or now is None or wall <= 0:
            return "", None
        share = (now - then) / wall
        if share > self.WAITED and used < self.FULL * self._cores * wall:
            return f"waited {share:.0%} of the time for a core that other processes had", None
        return "", None


def _run_queue_wait() -> float | None:
    """Seconds that this process' threads have been ready and not running, since they began."""
    try:
        total = 0
        for task in Path("/proc/self/task").iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9


def sees_waiting() -> bool:
    """Whether `CpuWatch` can see anything here."""
    return _run_queue_wait() is not None


class GpuWatch:
    """The GPU's clock under the sample, and whether the driver slowed it down for heat or the power supply.

    The power limit is no such reason: under products it is the state that a GPU works in. Its clock is recorded, and
    `harness` drops samples that ran below the clock that the run sustained. Without nvidia-ml-py, or without the right to
    ask, nothing is seen.
    """

    # nvmlClocksEventReasons: hardware slowdown, thermal in software and hardware, power brake.
    SLOWDOWN = 0x08 | 0x20 | 0x40 | 0x80

    def __init__(self, uuid: str = "", nvml: Any = None) -> None:
        self._nvml, self._handle = nvml, None
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = (
                self._nvml.nvmlDeviceGetHandleByUUID(uuid)
                if uuid
                else self._nvml.nvmlDeviceGetHandleByIndex(0)
            )
        # pynvml's errors have no base below Exception; a GPU that cannot be asked is measured all the same.
        except Exception:
            self._handle = None

    @staticmethod
    def current() -> GpuWatch:
        """Of torch's current device, which need not be the driver's first."""
        import torch

        return GpuWatch(f"GPU-{torch.cuda.get_device_properties().uuid}")

    def start(self) -> None:
        pass

    def stop(self) -> tuple[str, float | None]:
        if self._handle is None:
            return "", None
        nvml = self._nvml
        try:
            clock = float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM))
            reasons = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        except Exception:
            return "", None
        return ("throttled by the driver" if reasons & self.SLOWDOWN else ""), clock


class CpuTimer:
    """Seconds by the host's clock, once the process is quiet and the function has run without being timed.

    torch's (OpenMP) and NumPy's (OpenBLAS) worker threads keep spinning after their last product, on the cores that the
    other side's workers want. Measured on 2 cores with torch 2.13 and NumPy 2.4: 3 to 30 ms of spinning, and without a
    pause a training step of 0.3 ms takes ten times as long after the other library's than in a loop by itself. So each
    sample waits until the process burns no CPU time, and then runs a few calls untimed: they wake the function's own
    workers, as the calls before them in a loop would.

    Args:
        synchronize: waits for what the function has only launched.
        flush: empties the cache before each call, which is then timed by itself; None times the calls in one stretch.
        watch: looks for disturbance.
    """

    # Emptying the cache takes far longer than most calls; what is left out of a sample goes by these.
    COLD_CALLS = 5

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
        sleep: Callable[[float], None] = time.sleep,
        flush: Callable[[], object] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._clock, self._cpu_clock, self._sleep = clock, cpu_clock, sleep
        self._flush, self._watch = flush, watch or Unwatched()

    def __call__(self, function: Function, repeats: int) -> Sample:
        self._settle()
        for _ in range(max(1, repeats // 4)):
            function()
        self._synchronize()
        self._watch.start()
        seconds = self._stretch(function, repeats) if self._flush is None else self._cold(function, repeats)
        return Sample(seconds, *self._watch.stop())

    def _stretch(self, function: Function, repeats: int) -> float:
        start = self._clock()
        for _ in range(repeats):
            function()
        self._synchronize()
        return self._clock() - start

    def _cold(self, function: Function, repeats: int) -> float:
        assert self._flush is not None
        total, calls = 0.0, min(repeats, self.COLD_CALLS)
        for _ in range(calls):
            self._flush()
            self._synchronize()
            total += self._stretch(function, 1)
        return total * repeats / calls

    def _settle(self) -> None:
        start = self._clock()
        while self._clock() - start < SETTLE_LIMIT_S:
            before, burned = self._clock(), self._cpu_clock()
            self._sleep(0.001)
            if self._cpu_clock() - burned < 0.2 * (self._clock() - before):
                return


class CudaTimer:
    """Seconds on the GPU by a pair of events around each call, with the L2 cache overwritten before it.

    The overwriting is outside the events, and keeps the GPU busy while the host launches the call: what is timed is the
    kernels, not the launching, as long as that takes less.

    Args:
        flush: overwrites the cache; made for the current device if None. `lambda: None` leaves it hot: then the GPU waits
            for the host wherever a call is shorter than its launches, and `GraphTimer` tells the kernels' time.
        watch: reads the clocks, while the last calls still run. Tests give their own, and their own events.
    """

    def __init__(
        self,
        flush: Callable[[], object] | None = None,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[], object] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._flush = flush or gpu_flusher()
        self._event, self._synchronize = _cuda(event, synchronize)
        self._watch = watch or Unwatched()

    def __call__(self, function: Function, repeats: int) -> Sample:
        self._watch.start()
        events = [(self._event(), self._event()) for _ in range(repeats)]
        for start, end in events:
            self._flush()
            start.record()
            function()
            end.record()
        seen = self._watch.stop()
        self._synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in events)
        return Sample(milliseconds / 1e3, *seen)


class GraphTimer:
    """Seconds on the GPU of calls captured into a CUDA graph: without the host's part, as in a training step that is one.

    Hot, a graph of several calls is replayed in a row. Cold, a graph of one call is replayed after each overwriting of the
    cache, which keeps the GPU busy while the host launches the graph.

    Args:
        flush: overwrites the cache before each replay; None leaves it as it is.
        capture: (a function, how many calls) -> the graph, with a method `replay`. Tests give their own.
    """

    # In one graph: its own launch of a few microseconds is shared by these.
    CALLS = 20

    def __init__(
        self,
        flush: Callable[[], object] | None = None,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[], object] | None = None,
        watch: Watch | None = None,
        capture: Callable[[Function, int], Any] | None = None,
    ) -> None:
        self._flush = flush
        self._event, self._synchronize = _cuda(event, synchronize)
        self._watch, self._capture = watch or Unwatched(), capture or _captured
        # The function is kept too: a new one may get the identity of one that is gone.
        self._graphs: dict[int, tuple[Function, Any, int]] = {}

    def __call__(self, function: Function, repeats: int) -> Sample:
        graph, calls = self._graph(function)
        replays = math.ceil(repeats / calls)
        self._watch.start()
        if self._flush is None:
            events = [(self._event(), self._event())]
            # Untimed: the host gets ahead of the GPU meanwhile.
            graph.replay()
            events[0][0].record()
            for _ in range(replays):
                graph.replay()
            events[0][1].record()
        else:
            events = [(self._event(), self._event()) for _ in range(replays)]
            for start, end in events:
                self._flush()
                start.record()
                graph.replay()
                end.record()
        seen = self._watch.stop()
        self._synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in events)
        return Sample(milliseconds / 1e3 * repeats / (replays * calls), *seen)

    def _graph(self, function: Function) -> tuple[Any, int]:
        if id(function) not in self._graphs:
            calls = self.CALLS if self._flush is None else 1
            self._graphs[id(function)] = (function, self._capture(function, calls), calls)
        _, graph, calls = self._graphs[id(function)]
        return graph, calls


def _cuda(
    event: Callable[[], Any] | None, synchronize: Callable[[], object] | None
) -> tuple[Callable[[], Any], Callable[[], object]]:
    def new() -> Any:
        import torch

        return torch.cuda.Event(enable_timing=True)

    def wait() -> None:
        import torch

        torch.cuda.synchronize()

    return event or new, synchronize or wait


def _captured(function: Function, calls: int) -> Any:
    import torch

    # What is made on the first calls (handles, workspaces, compiled kernels) must not be made under capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def cpu_cache_bytes() -> int:
    """The CPU's last level of cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            if match := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()):
                sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
        except OSError:
            continue
    return max(sizes, default=32 << 20)


def cpu_flusher() -> Callable[[], object]:
    """Overwrites the CPU's caches, the last level too as far as 256 MiB go."""
    block = np.zeros(min(FLUSH * cpu_cache_bytes(), _MOST_FLUSHED) // 8)
    values = itertools.cycle((0.0, 1.0))
    return lambda: block.fill(next(values))


def gpu_flusher() -> Callable[[], object]:
    """Overwrites the L2 cache of the current device."""
    import torch

    nbytes = FLUSH * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(max(nbytes, 1 << 20), dtype=torch.uint8, device="cuda").zero_


def timer_for(device: str, name: str = "", cache: str = "") -> tuple[Timer, str, str]:
    """(a timer for calls on `device`, its name, the state of the cache).

    Args:
        name: "host", "events" or "graph"; by default the host's clock on a CPU, events on a GPU.
        cache: "cold" or "hot"; by default cold on a GPU, and on a CPU "host": what the calls before left in it.

    Raises:
        ValueError: there is no such timer for this device.
    """
    cuda = device == "cuda"
    name, cache = name or ("events" if cuda else "host"), cache or ("cold" if cuda else "host")
    if name not in ("host", "events", "graph") or cache not in ("cold", "hot", "host"):
        raise ValueError(f"no timer {name!r} with a cache that is {cache!r}")
    if name == "host":
        return _host_timer(cuda, cache), name, cache
    if not cuda:
        raise ValueError(f"the timer {name!r} needs a GPU; on a CPU there is the host's clock alone")
    flush, watch = gpu_flusher() if cache == "cold" else None, GpuWatch.current()
    if name == "graph":
        return GraphTimer(flush, watch=watch), name, cache
    return CudaTimer(flush or (lambda: None), watch=watch), name, cache


def _host_timer(cuda: bool, cache: str) -> Timer:
    if not cuda:
        return CpuTimer(flush=cpu_flusher() if cache == "cold" else None, watch=CpuWatch())
    import torch

    return CpuTimer(
        torch.cuda.synchronize, flush=gpu_flusher() if cache == "cold" else None, watch=CpuWatch()
    )
