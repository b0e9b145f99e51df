"""What runs where there is a GPU: its ceilings, and fused against unfused throughput at real sizes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import byte_model
from .harness import Function, Stop, Timer, time_one
from .providers import PROVIDERS, Case, Provider, adam, compiled, cross_entropy, linear
from .suite import Context, Job, Row, compare, wrong_row

__all__ = ["CudaTimer", "gpu_jobs"]

# Times the L2 cache that is overwritten before each call.
FLUSH = 3
# A clock's tick and the spread of the ceiling itself.
IMPOSSIBLE = 1.05
MATMUL_SIZE = 8192
COPY, MATMUL = "copy, bytes read and written", f"bf16 matmul, {MATMUL_SIZE} cubed"


class CudaTimer:
    """Seconds on the GPU by a pair of events around each call, with the L2 cache overwritten before it.

    The overwriting is outside the events, and keeps the GPU busy while the host launches the call: what is timed is the
    kernels, not the launching, as long as that takes less.

    Args:
        flush: overwrites the cache; made for the current device if None. Tests give their own, and their own events.
    """

    def __init__(
        self,
        flush: Callable[[], object] | None = None,
        event: Callable[[], Any] | None = None,
        synchronize: Callable[[], object] | None = None,
    ) -> None:
        self._flush = flush or _flusher()
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._synchronize = synchronize or torch.cuda.synchronize

    def __call__(self, function: Function, repeats: int) -> float:
        events = [(self._event(), self._event()) for _ in range(repeats)]
        for start, end in events:
            self._flush()
            start.record()
            function()
            end.record()
        self._synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in events)
        return milliseconds / 1e3


def _flusher() -> Callable[[], object]:
    nbytes = FLUSH * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(max(nbytes, 1 << 20), dtype=torch.uint8, device="cuda").zero_


# What asks the device, so that tests can run all else without one.
def device_timer() -> Timer:
    """The timer of the device's own clock."""
    return CudaTimer()


def free_memory() -> int:
    """Bytes free on the device."""
    free: int = torch.cuda.mem_get_info()[0]
    return free


def synchronize() -> None:
    """Waits for the device."""
    torch.cuda.synchronize()


def _ceiling(name: str, unit: str, amount: float, samples: tuple[float, ...]) -> Row:
    """`amount` of work in each sample, at the median."""
    ordered = sorted(samples)
    return {
        "section": "ceilings",
        "kind": "ceiling",
        "name": name,
        "value": amount / ordered[len(ordered) // 2],
        "unit": unit,
        "samples_s": list(samples),
    }


def _copy(context: Context, share: float) -> Iterator[Row]:
    """Copy bandwidth, and what it makes of the byte counts."""
    count = min(1 << 30, free_memory() // 8)
    # Random, since data that compresses well flatters some cards.
    x = torch.randint(0, 256, (count,), dtype=torch.uint8, device=context.device)
    y = torch.empty_like(x)
    samples = time_one(lambda: y.copy_(x), stop=_stop(share), timer=device_timer())
    row = _ceiling(COPY, "B/s", 2 * count, samples)
    yield row
    for counted in [row for row in context.rows if row["kind"] == "count"]:
        yield {
            "section": "ceilings",
            "kind": "bound",
            **{name: counted[name] for name in ("op", "passes", "shape", "dtype")},
            "bandwidth": row["value"],
            "compulsory_s": counted["compulsory_bytes"] / row["value"],
            "unfused_s": {name: size / row["value"] for name, size in counted["unfused_bytes"].items()},
        }


def _matmul(context: Context, share: float) -> Iterator[Row]:
    # On zeros a GPU draws less power and clocks higher.
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=context.device).to(torch.bfloat16) for _ in range(2))
    samples = time_one(lambda: a @ b, stop=_stop(share), timer=device_timer())
    yield _ceiling(MATMUL, "FLOP/s", 2 * MATMUL_SIZE**3, samples)


def _launch(context: Context, share: float) -> Iterator[Row]:
    """How fast the host launches small kernels, one after another."""
    x, count = torch.zeros(1, device=context.device), 1000

    def timer(function: Function, repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize()
        return time.perf_counter() - start

    def launches() -> None:
        for _ in range(count):
            x.add_(1)

    samples = time_one(launches, stop=_stop(share), timer=timer)
    yield _ceiling("launches of torch's add_", "1/s", count, samples)


def _stop(share: float) -> Stop:
    return Stop(budget_s=share, max_pairs=200)


@dataclasses.dataclass(frozen=True)
class Headline:
    """A case, the model that counts its bytes, and what it is compared with."""

    case: Case
    model: str
    rivals: tuple[Callable[[], Provider], ...]


def headlines() -> list[Headline]:
    """At the sizes of the byte counts; smaller where the card has not the memory for the float64 truth."""
    half = torch.bfloat16
    free = free_memory()
    rows = 8192 if free > 64 << 30 else 1024
    params = 10**9 if free > 100 << 30 else free // 256
    torch_eager = PROVIDERS["torch"]

    def eager() -> Provider:
        return torch_eager

    def fused() -> Provider:
        return dataclasses.replace(
            torch_eager, name="torch fused=True", adam=lambda params: torch.optim.Adam(params, fused=True)
        )

    def inductor() -> Provider:
        return compiled(torch_eager)

    return [
        Headline(cross_entropy(rows, 128256, half), "cross_entropy", (eager, inductor)),
        Headline(linear(rows, 14336, 4096, "gelu", half, backward=False), "linear", (eager, inductor)),
        Headline(linear(rows, 14336, 4096, "gelu", half), "linear_training", (eager, inductor)),
        Headline(adam([(params,)], note="one tensor"), "adam", (eager, fused)),
    ]


def _throughput(
    headline: Headline, rival: Callable[[], Provider]
) -> Callable[[Context, float], Iterator[Row]]:
    def run(context: Context, share: float) -> Iterator[Row]:
        for row in compare(context, "gpu", headline.case, PROVIDERS["dlgpu"], rival(), share, device_timer()):
            yield annotate(row, headline.case, headline.model, context)
        # Not left to the next job, which may need the memory.
        torch.cuda.empty_cache()

    return run


def annotate(row: Row, case: Case, model_name: str, context: Context) -> Row:
    """A timing row with the rates it reached; one that moved its bytes faster than a copy could is no timing."""
    if row["kind"] != "timing":
        return row
    duration = sorted(row["samples_a_s"])[len(row["samples_a_s"]) // 2]
    if laws := context.laws.get(model_name):
        row["bytes"] = byte_model.total(byte_model.MODELS[model_name], laws, case.shape)
        row["bytes_per_s"] = row["bytes"] / duration
    if case.flops:
        row["flops_per_s"] = case.flops / duration
    ceilings = {r["name"]: r["value"] for r in context.rows if r["kind"] == "ceiling"}
    for rate, name in (("bytes_per_s", COPY), ("flops_per_s", MATMUL)):
        if name in ceilings and row[rate] and row[rate] > IMPOSSIBLE * ceilings[name]:
            detail = f"impossible: {rate} of {row[rate]:.3g} is above the ceiling of {ceilings[name]:.3g}"
            return wrong_row(row["section"], case.title, row["a"], detail)
    return row


def gpu_jobs() -> list[Job]:
    """The ceilings first: what follows is held to them."""
    jobs = [
        Job("ceilings", "copy bandwidth", _copy, weight=0.5),
        Job("ceilings", "bf16 matmul", _matmul, weight=0.5),
        Job("ceilings", "launches", _launch, weight=0.3),
    ]
    for headline in headlines():
        for rival in headline.rivals:
            # Compiling, and the float64 truth.
            jobs.append(Job("gpu", headline.case.title, _throughput(headline, rival), weight=1, fixed_s=8))
    return jobs
