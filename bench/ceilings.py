"""What this machine reaches, measured now: copies, products, calls. What a timing is held to, and what a roofline needs.

Published figures are of no use here: they are wrong for several cards, and say nothing of this one's clocks today.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .harness import Stop, time_one
from .timers import CpuTimer, CudaTimer, Function, GraphTimer, Sample, Timer, cpu_cache_bytes

__all__ = ["CACHED_COPY", "COPY", "DTYPES", "LAUNCH", "best", "ceilings", "matmul_name"]

Row = dict[str, Any]

COPY = "copy, bytes read and written"
CACHED_COPY = "copy within the cache, bytes read and written"
LAUNCH = "calls of torch's add_ on one element"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float16 products on a CPU go through a path that nobody trains on.
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CALLS = 1000
# Each ceiling is looked for in this much of a second at least, by default.
BUDGET_S = 1.0


def matmul_name(dtype: torch.dtype) -> str:
    """The name of the products' ceiling: square matrices, so large that the bytes do not matter."""
    return f"matmul, {str(dtype).removeprefix('torch.')}"


def _row(section: str, name: str, unit: str, amount: float, samples: tuple[float, ...], **more: Any) -> Row:
    """`amount` of work in each sample, at the median."""
    ordered = sorted(samples)
    return {
        "section": section,
        "kind": "ceiling",
        "name": name,
        "value": amount / ordered[len(ordered) // 2],
        "unit": unit,
        "samples_s": list(samples),
        "amount": amount,
        **more,
    }


def best(rows: Iterable[Row]) -> dict[str, float]:
    """Name -> the highest rate that a ceiling's samples reached, of all rows of kind ceiling: whatever else the machine did
    meanwhile can only have lowered the others."""
    found: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "ceiling":
            rate = row.get("amount", 0.0) / min(row["samples_s"]) if row.get("amount") else row["value"]
            found[row["name"]] = max(rate, found.get(row["name"], 0.0))
    return found


def ceilings(
    device: str,
    budget_s: float = BUDGET_S,
    dtypes: Iterable[torch.dtype] | None = None,
    section: str = "ceilings",
    timers: tuple[Timer, Timer] | None = None,
    sizes: tuple[int, int, int] | None = None,
) -> Iterator[Row]:
    """Rows of kind ceiling: copy from memory, copy within the cache, products of each dtype, calls.

    Args:
        budget_s: for each.
        timers: (with a cold cache, hot); of the device unless given.
        sizes: (bytes copied from memory, bytes copied within the cache, rows of the matrices); of the device unless given.
    """
    cuda = device == "cuda"
    large, small, rows = sizes or (_gpu_sizes() if cuda else _cpu_sizes(cpu_cache_bytes()))
    cold, hot = timers or ((CudaTimer(), GraphTimer()) if cuda else (CpuTimer(), CpuTimer()))
    stop = Stop(budget_s=budget_s, max_pairs=200, warmup_s=0.1)
    for name, nbytes, timer in ((COPY, large, cold), (CACHED_COPY, small, hot)):
        # Random, since data that compresses well flatters some cards.
        x = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        samples = time_one(_copy(y, x), stop=stop, timer=timer)
        yield _row(section, name, "B/s", 2 * nbytes, samples, nbytes=nbytes)
    for dtype in dtypes or (DTYPES if cuda else _CPU_DTYPES):
        # On zeros a GPU draws less power and clocks higher.
        a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        samples = time_one(_product(a, b), stop=stop, timer=cold)
        yield _row(section, matmul_name(dtype), "FLOP/s", 2 * rows**3, samples, rows=rows)
    one = torch.zeros(1, device=device)
    samples = time_one(_calls(one), stop=stop, timer=_Host(device))
    yield _row(section, LAUNCH, "1/s", _CALLS, samples)


def _copy(y: torch.Tensor, x: torch.Tensor) -> Function:
    return lambda: y.copy_(x)


def _product(a: torch.Tensor, b: torch.Tensor) -> Function:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _calls(one: torch.Tensor) -> Function:
    def calls() -> None:
        for _ in range(_CALLS):
            one.add_(1)

    return calls


class _Host:
    """How fast the host calls, one after another, with nothing between them but the waiting at the end."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._clock = clock

    def __call__(self, function: Function, repeats: int) -> Sample:
        self._wait()
        start = self._clock()
        for _ in range(repeats):
            function()
        self._wait()
        return Sample(self._clock() - start)


def _cpu_sizes(cache: int) -> tuple[int, int, int]:
    # Well past the last cache; within a core's own, and long enough for the call itself to cost little.
    return max(4 * cache, 64 << 20) // 2, 256 << 10, 1024


def _gpu_sizes() -> tuple[int, int, int]:
    free: int = torch.cuda.mem_get_info()[0]
    # A quarter of the L2 for what is read and what is written together.
    return min(1 << 30, free // 8), torch.cuda.get_device_properties().L2_cache_size // 8, 8192
