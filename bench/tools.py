"""The vendor's checkers and profiler: where they are, how they are called, and what their output says."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "CHECKERS",
    "PROFILER",
    "SANITIZER",
    "Finding",
    "checking",
    "counters",
    "find",
    "findings",
    "profiling",
    "tool_failure",
]

SANITIZER, PROFILER = "compute-sanitizer", "ncu"
# Memory out of bounds, races in shared memory, reads of what nothing wrote, barriers that not all threads reach.
CHECKERS = ("memcheck", "racecheck", "initcheck", "synccheck")

READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"

_MARK = "========="
# What the tool says of itself.
_CHATTER = re.compile(
    r"COMPUTE-SANITIZER|(ERROR|RACECHECK|LEAK) SUMMARY|Saved host backtrace|Target application|This tool is deprecated|"
    r"Error: (process|No attachable|Target)|Internal|Process .* (exited|terminated)|No CUDA-related|\(\d+ duplicate"
)
_KERNEL = re.compile(r"\b(_\w+_kernel)\b")


def find(name: str) -> list[str] | None:
    """The start of an argument list that runs a tool: from PATH, the CUDA toolkit, or NVIDIA's Python packages."""
    if found := shutil.which(name):
        return [found]
    roots = [Path(root) for variable in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(variable))]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    beside = [root / "bin" / name for root in roots]
    beside += [root / "compute-sanitizer" / name for root in roots]
    beside += [path for root in roots for path in sorted(root.glob(f"nsight-compute*/{name}"), reverse=True)]
    beside += sorted(Path("/opt/nvidia/nsight-compute").glob(f"*/{name}"), reverse=True)
    packages = [Path(folder) / "nvidia" for folder in sys.path if folder]
    for depth in ("*/bin", "*/*/bin", "*", "*/*"):
        beside += [path for package in packages for path in sorted(package.glob(f"{depth}/{name}"))]
    for path in beside:
        if path.is_file() and os.access(path, os.X_OK):
            return [str(path)]
    return None


def checking(tool: Sequence[str], checker: str, command: Sequence[str]) -> list[str]:
    """The argument list that runs a command under one of CHECKERS."""
    return [*tool, "--tool", checker, "--print-limit", "50", *command]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a checker reports: its first line, and the kernel, "" where it names none."""

    text: str
    kernel: str


def findings(lines: Iterable[str]) -> Iterator[Finding]:
    """The reports in a checker's output; lines of the program that it ran are passed over."""
    head, kernel = "", ""
    for line in lines:
        if not line.startswith(_MARK):
            continue
        body = line.removeprefix(_MARK)
        said = body.strip()
        # Details of a report are indented; an empty line ends it.
        if said and body.startswith("    "):
            if match := _KERNEL.search(said) if not kernel else None:
                kernel = match[1]
            continue
        if head:
            yield Finding(head, kernel)
        head, kernel = "", ""
        if said and not _CHATTER.search(said):
            head = said
            if match := _KERNEL.search(said):
                kernel = match[1]
    if head:
        yield Finding(head, kernel)


def tool_failure(lines: Sequence[str]) -> str:
    """The line in which a tool says that it could not do its work, or ""."""
    for line in lines:
        said = line.removeprefix(_MARK).strip()
        if line.startswith("==ERROR==") or re.search(
            r"Device not supported|Failed to initialize|ERR_NVGPUCTRPERM|No attachable process|LibraryNotLoaded|"
            r"Unable to (start|launch)|not recognized|Internal Sanitizer Error",
            said,
        ):
            return said
    return ""


def profiling(tool: Sequence[str], command: Sequence[str]) -> list[str]:
    """The argument list that runs a command and prints, as CSV, what each kernel between cudaProfilerStart and Stop moved
    from and to memory. The clocks are left as they are."""
    return [
        *tool,
        *("--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"),
        *("--metrics", ",".join((READ, WRITTEN, TIME)), "--page", "raw", "--csv", "--print-units", "base"),
        *command,
    ]


def counters(lines: Iterable[str]) -> list[dict[str, Any]]:
    """{kernel, read_bytes, written_bytes, seconds} of each profiled kernel, in order.

    Raises:
        ValueError: there is a table, and it lacks one of the metrics.
    """
    # The program's own lines stand between.
    table = [line for line in lines if line.startswith('"')]
    start = next((i for i, line in enumerate(table) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(table[start:]))))
    found = []
    for row in rows:
        # The row of units has no number of its own.
        if not (row.get("ID") or "").isdecimal():
            continue
        missing = [name for name in ("Kernel Name", READ, WRITTEN, TIME) if not row.get(name)]
        if missing:
            raise ValueError(f"the profiler's table has no {missing[0]}")
        read, written, nanoseconds = (float(row[name].replace(",", "")) for name in (READ, WRITTEN, TIME))
        found.append(
            {
                "kernel": row["Kernel Name"].partition("(")[0],
                "read_bytes": read,
                "written_bytes": written,
                "seconds": nanoseconds / 1e9,
            }
        )
    return found
