"""What this machine reaches, measured now: copies, products, calls. What a timing is held to, and what a roofline needs.

Published figures are of no use here: they are wrong for several cards, and say nothing of this one's clocks today.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from .cli import Amount
from .environment import choose_device, describe, find_gpu, header
from .harness import Stop, time_one
from .report import Console, Results
from .timers import CpuTimer, CudaTimer, Function, GraphTimer, Sample, Timer, cpu_cache_bytes

__all__ = [
    "CACHED_COPY",
    "COPY",
    "DTYPES",
    "LAUNCH",
    "best",
    "ceilings",
    "command",
    "matmul_name",
    "single_thread",
]

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


def best(rows: Iterable[Row]) -> dict[str, float]:
    """Name -> the rate that nothing here can exceed, of all rows of kind ceiling.

    That is the highest of the samples, for what else the machine did meanwhile can only have lowered the others; on a CPU
    with several threads no less than one thread's rate times their number, for one is disturbed less often.
    """
    found: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "ceiling":
            limit = float(row.get("limit") or row["value"])
            found[row["name"]] = max(limit, found.get(row["name"], 0.0))
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
    for name, nbytes, timer in ((COPY, large, cold), (CACHED_COPY, small, hot)):
        # Random, since data that compresses well flatters some cards.
        x = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
        function = _copy(torch.empty_like(x), x)
        yield _ceiling(section, name, "B/s", 2 * nbytes, function, timer, budget_s, device)
    for dtype in dtypes or _dtypes(device):
        # On zeros a GPU draws less power and clocks higher.
        a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        name = matmul_name(dtype)
        yield _ceiling(section, name, "FLOP/s", 2 * rows**3, _product(a, b), cold, budget_s, device)
    calls = _calls(torch.zeros(1, device=device))
    yield _ceiling(section, LAUNCH, "1/s", _CALLS, calls, _Host(device), budget_s, device)


def _ceiling(
    section: str,
    name: str,
    unit: str,
    amount: float,
    function: Function,
    timer: Timer,
    budget_s: float,
    device: str,
) -> Row:
    """`amount` of work in each call, at the median."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    stop = Stop(budget_s=budget_s / min(threads, 2), max_pairs=200, warmup_s=min(0.1, budget_s), min_pairs=5)
    samples = time_one(function, stop=stop, timer=timer)
    limit = amount / min(samples)
    if threads > 1:
        with single_thread():
            limit = max(limit, threads * amount / min(time_one(function, stop=stop, timer=timer)))
    return {
        "section": section,
        "kind": "ceiling",
        "name": name,
        "value": amount / sorted(samples)[len(samples) // 2],
        "unit": unit,
        "samples_s": list(samples),
        "limit": limit,
    }


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """torch on one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _dtypes(device: str) -> tuple[torch.dtype, ...]:
    return DTYPES if device == "cuda" else _CPU_DTYPES


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
    # Well past the last cache; within a core's own, and long enough for the call itself to cost little; and products of a
    # millisecond, which a busy machine's scheduler lets through in one piece.
    return max(4 * cache, 64 << 20) // 2, 256 << 10, 384


def _gpu_sizes() -> tuple[int, int, int]:
    free: int = torch.cuda.mem_get_info()[0]
    # A quarter of the L2 for what is read and what is written together.
    return min(1 << 30, free // 8), torch.cuda.get_device_properties().L2_cache_size // 8, 8192


@click.command("ceilings")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option(
    "--budget",
    type=Amount(min=0, min_open=True, max=1e6),
    default=6.0,
    show_default=True,
    metavar="SECONDS",
    help="For all of them, about.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep them: a file that ends in .json, or a folder.",
)
def command(device: str, budget: float, out: Path | None) -> int:
    """What this machine reaches, measured now: copies, matrix products, calls."""
    gpu = find_gpu()
    chosen, why = choose_device(device, gpu)
    environment = describe(chosen, why, gpu)
    console = Console()
    console.line(header(environment))
    results = (
        Results(out, {"suite": "ceilings", "device": chosen, "budget_s": budget}, environment)
        if out
        else None
    )
    try:
        for row in ceilings(chosen, budget / (3 + len(_dtypes(chosen)))):
            if results is not None:
                results.add(row)
            most = f"no more than {row['limit']:.4g}"
            console.line(f"  {row['name']:<48}  {row['value']:.4g} {row['unit']}, {most}")
    except BaseException:
        if results is not None:
            results.finish("interrupted")
        raise
    if results is not None:
        results.finish("complete")
        console.line(f"Results: {results.json_path}")
    return 0
