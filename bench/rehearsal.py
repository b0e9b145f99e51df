"""What stands in for a GPU, for others' libraries and for the vendor's tools when `dlgpu-bench gpu` is rehearsed.

The code that runs is the real one, the kernels are interpreted, and the sizes are the smallest there are. The tools are this
file itself, called with the tool's name and arguments: it runs the command that the tool was to run and prints what the
tool would print about it, with numbers made up.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TESTS", "benches", "compared", "main", "tool"]

Row = dict[str, Any]

# Of tests/test_activations.py: a few, on both backends.
TESTS = "test_one_element and relu and not leaky"
# Every form of a case; all ops are measured by the same code.
OPS = ("softmax", "linear", "adam")
_TIMEOUT_S = 120


def tool(name: str) -> list[str]:
    """The start of the argument list that runs what stands in for a tool."""
    # By its file: the package takes seconds to import, and a tool needs nothing of it.
    return [sys.executable, str(Path(__file__).resolve()), name]


def benches(found: Sequence[Any]) -> list[Any]:
    """Of some ops, and of each of their variants, the first, against two, at a tiny size on the CPU."""
    from .laws import PROBES

    chosen: dict[tuple[str, str, bool], Any] = {}
    for bench in found:
        if bench.case.op in OPS:
            chosen.setdefault((bench.case.op, bench.case.note, bench.timer == "graph"), bench)
    tiny = []
    for bench in chosen.values():
        probes = PROBES[bench.case.op]
        shape = min((p.shape for p in (*probes.fit, *probes.held_out)), key=lambda s: math.prod(s.values()))
        case = dataclasses.replace(bench.case, shape=shape, device="cpu")
        tiny.append(dataclasses.replace(bench, case=case, rivals=bench.rivals[-2:], timer="", cache=""))
    return tiny


def compared(case: Any, rivals: Sequence[str]) -> Iterator[Row]:
    """dlgpu's interpreted kernels against torch by the name of each rival."""
    from .ceilings import best
    from .harness import Stop
    from .measure import measure
    from .providers import function
    from .timers import CpuTimer

    op = case.described
    libraries = {"dlgpu": op.functions["dlgpu"], **dict.fromkeys(rivals, function(op, "eager"))}
    stop = Stop(budget_s=0.01, min_pairs=1, max_pairs=1, warmup_s=0.0)
    yield from measure(
        case,
        libraries,
        section="gpu",
        stop=stop,
        timer=CpuTimer(sleep=lambda seconds: None),
        timer_name="host",
        cache="host",
        best=best([]),
        extras=False,
    )


def _sanitizer(arguments: Sequence[str]) -> int:
    print("========= COMPUTE-SANITIZER")
    checker = arguments[arguments.index("--tool") + 1]
    status = 0
    for line in _run(arguments):
        print(line)
        status = status or int(line.startswith("dlgpu-failed "))
    if checker == "racecheck":
        print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    else:
        print("========= ERROR SUMMARY: 0 errors")
    return status


def _profiler(arguments: Sequence[str]) -> int:
    """A table as the profiler prints it: its columns, units in a row of their own, thousands with commas."""
    metrics = arguments[arguments.index("--metrics") + 1].split(",")
    print("==PROF== Connected to process 4711")
    kernels: list[str] = []
    for line in _run(arguments):
        print(line)
        if line.startswith("dlgpu-done "):
            found = json.loads(line.removeprefix("dlgpu-done "))
            kernels += [launch["kernel"] for launch in found["launches"]]
    print("==PROF== Disconnected from process 4711")
    head = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Device", "CC", *metrics]
    units = [""] * 7 + ["nsecond" if "time" in name else "byte" for name in metrics]
    rows = [
        [str(i), "4711", "python3", "localhost", name, "0", "9.0", *["1,234,567"] * len(metrics)]
        for i, name in enumerate(["void at::native::elementwise_kernel<4>(int)", *kernels])
    ]
    for row in (head, units, *rows):
        print(",".join(f'"{cell}"' for cell in row))
    return 0


def _run(arguments: Sequence[str]) -> list[str]:
    """The lines of the command that is among the arguments."""
    start = next(i for i, argument in enumerate(arguments) if argument == sys.executable)
    done = subprocess.run(
        arguments[start:],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    return done.stdout.splitlines()


def main(arguments: Sequence[str]) -> int:
    """TOOL, and the tool's own arguments."""
    name, *rest = arguments
    return _sanitizer(rest) if name == "compute-sanitizer" else _profiler(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
