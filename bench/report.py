"""Results: rows shown as they are measured, and the same rows in a JSON file and a Markdown summary.

The JSON document, schema "dlgpu-bench/1":

    schema       "dlgpu-bench/1"; the number grows when a reader of older files would misread a newer one
    status       "running", "complete", "interrupted" (rows up to there are whole) or "failed"
    started      UTC, ISO 8601
    seconds      how long it took so far
    arguments    {suite, device, budget_s, only, seed}
    environment  {dlgpu, source_hash, git: null or {commit, modified}, device, why, gpu: null or {name, driver, cuda}, cpu,
                 cores, threads: {torch, numpy}, system, python, torch, torch_cuda, triton, numpy}
    rows         a list of objects; each has `section`, `kind` and `at_s`, when it was done, and by kind:

    timing    op, passes, shape, dtype, note, a, b: the providers; samples_a_s, samples_b_s: seconds a call, one entry a
              pair; repeats_a, repeats_b: calls in a sample; ratio, low, high: the median of a / b and its interval at
              `confidence`; pairs; converged; others: cores that other processes kept busy meanwhile, and crowded: too
              many for this to be a timing of the providers; device; and on a GPU bytes, bytes_per_s, flops_per_s of `a`,
              or null
    training  a, b, losses_a, losses_b: one entry a step; accuracy_a, accuracy_b: on held-out data; epochs, batch, seed,
              device
    kernels   losses: of the kernels in Triton's interpreter, one entry a step; max_difference from the training row's b
    float64   a, b, steps, distance_a, distance_b: the largest difference of a loss from float64's
    count     op, passes, shape, dtype, launches, compulsory_bytes, requested_bytes or null, unfused_bytes: {name: bytes},
              laws: [{kernel, quantity, coefficients}], fitted_on, held_out: shapes; a COUNT, not a timing
    bound     op, passes, shape, dtype, bandwidth: bytes a second, measured in this run; compulsory_s, unfused_s: {name: s}: no
              launch can take less than its bytes at that bandwidth; MODEL, not a timing
    ceiling   name, value, unit, samples_s
    wrong     title, provider, detail: results that differ from float64's; such a provider gets no time
    skipped   title, reason
    error     title, message
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .environment import UsageError, crowded, header
from .harness import CONFIDENCE, PairedResult
from .providers import Case

__all__ = ["SCHEMA", "Console", "Results", "seconds", "timing_row"]

SCHEMA = "dlgpu-bench/1"
# Less than this matters to nobody, and the same code compiled twice may differ by it.
BAND = 0.02
RATIO_NOTE = (
    "ratio = dlgpu time / torch time: below 1, dlgpu is faster; median of interleaved pairs, 95% interval"
)
COUNT_NOTE = (
    "a COUNT of each launch's distinct bytes, metered; not a timing: that takes a bandwidth measured on a GPU"
)


def seconds(value: float) -> str:
    """A duration for people: three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def timing_row(
    section: str, case: Case, a: str, b: str, device: str, result: PairedResult, others: float | None
) -> dict[str, Any]:
    """A row of kind `timing`."""
    return {
        "section": section,
        "kind": "timing",
        "op": case.op,
        "passes": case.passes,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "note": case.note,
        "a": a,
        "b": b,
        "device": device,
        "samples_a_s": list(result.samples_a),
        "samples_b_s": list(result.samples_b),
        "repeats_a": result.repeats_a,
        "repeats_b": result.repeats_b,
        "ratio": result.ratio,
        "low": result.low,
        "high": result.high,
        "confidence": CONFIDENCE,
        "pairs": result.pairs,
        "converged": result.converged,
        "others": others,
        "crowded": crowded(others),
        "bytes": None,
        "bytes_per_s": None,
        "flops_per_s": None,
    }


class Results:
    """The document, in files that are whole at every moment: written anew after each row, then renamed.

    Args:
        folder: made if it is not there.

    Raises:
        UsageError: the folder cannot be written, now or later.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], environment: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._start = time.monotonic()
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "started": now.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "arguments": arguments,
            "environment": environment,
            "rows": [],
        }
        stem = f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}"
        self.json_path, self.markdown_path = folder / f"{stem}.json", folder / f"{stem}.md"
        self._folder = folder
        self.save()

    @property
    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["rows"]
        return found

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({"at_s": round(time.monotonic() - self._start, 3), **row})
        self.save()

    def finish(self, status: str) -> None:
        self.document["status"] = status
        self.save()

    def save(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self._start, 3)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self.json_path, json.dumps(self.document, indent=1, allow_nan=False) + "\n")
            _write(self.markdown_path, markdown(self.document))
        except OSError as error:
            raise UsageError(f"cannot write results into {self._folder}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def row_title(row: dict[str, Any]) -> str:
    """A row's op, passes, sizes and note, in a line."""
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    note = f", {row['note']}" if row.get("note") else ""
    return f"{row['op']} {row['passes']} {sizes}{note}"


def verdict(row: dict[str, Any]) -> str:
    """What a timing row says, in a word."""
    if row["crowded"]:
        return "busy"
    if (row["high"] - row["low"]) / (2 * row["ratio"]) > 0.1:
        return "noisy"
    return "faster" if row["high"] < 1 - BAND else "slower" if row["low"] > 1 + BAND else "even"


def _median(samples: list[float]) -> float:
    ordered = sorted(samples)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's columns, the same in the terminal and in Markdown."""
    kind = row["kind"]
    if kind == "timing":
        achieved = []
        if row["bytes_per_s"]:
            achieved.append(f"{row['bytes_per_s'] / 1e9:.0f} GB/s")
        if row["flops_per_s"]:
            achieved.append(f"{row['flops_per_s'] / 1e12:.0f} TFLOP/s")
        return (
            row_title(row) + ("" if row["b"] == "torch" else f" against {row['b']}"),
            seconds(_median(row["samples_a_s"])),
            seconds(_median(row["samples_b_s"])),
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            str(row["pairs"]),
            " ".join([verdict(row), *achieved]),
        )
    if kind == "count":
        fused = row["compulsory_bytes"]
        return (
            row_title(row) + f" {row['dtype']}",
            f"{fused / 1e9:.3f} GB",
            "; ".join(
                f"{name} {size / 1e9:.3f} GB, {size / fused:.2f}x"
                for name, size in row["unfused_bytes"].items()
            ),
        )
    if kind == "bound":
        rivals = "; ".join(f"{name} {seconds(value)}" for name, value in row["unfused_s"].items())
        return (f"MODEL: {row_title(row)} cannot take less than {seconds(row['compulsory_s'])}; {rivals}",)
    if kind == "ceiling":
        return (row["name"], f"{row['value']:.4g} {row['unit']}")
    if kind == "training":
        curves = list(zip(row["losses_a"], row["losses_b"], strict=True))
        first, all_steps = (max(abs(a - b) for a, b in part) for part in (curves[:100], curves))
        return (
            f"held-out accuracy after {row['epochs']} epochs {row['accuracy_a']:.2%} {row['a']}, "
            f"{row['accuracy_b']:.2%} {row['b']}",
            f"largest difference of a loss {first:.1e} in 100 steps, {all_steps:.1e} in all {len(curves)}",
        )
    if kind == "kernels":
        return (
            f"the kernels in Triton's interpreter, {len(row['losses'])} steps: losses within "
            f"{row['max_difference']:.1e} of torch's",
        )
    if kind == "float64":
        return (
            f"distance of the losses from float64's over {row['steps']} steps: {row['distance_a']:.1e} {row['a']}, "
            f"{row['distance_b']:.1e} {row['b']}",
        )
    if kind == "wrong":
        return (row["title"], f"WRONG RESULT of {row['provider']}, not timed: {row['detail']}")
    return (row["title"], f"{kind}: {row.get('reason') or row.get('message')}")


TITLES = {
    "digits": "Handwritten digits, 64-256-256-10, batch 64, the same weights and batches for all",
    "ops": "The fallback against torch eager, both on this CPU, results checked against float64 first",
    "bytes": "Bytes that a GPU would move",
    "ceilings": "What this GPU reaches, measured now",
    "gpu": "Fused against unfused on this GPU, cold L2, results checked against float64 first",
}
COLUMNS = {
    "timing": ("op", "dlgpu", "torch", "ratio", "95% interval", "pairs", ""),
    "count": ("op", "dlgpu's kernels", "unfused, and times as many"),
    "ceiling": ("what", "measured"),
}
WIDTHS = {"timing": (56, 8, 8, 6, 16, 5, 6), "count": (58, 10, 0), "ceiling": (58, 0)}


def markdown(document: dict[str, Any]) -> str:
    """The summary."""
    lines = ["# dlgpu benchmark", "", header(document["environment"]), ""]
    if document["status"] != "complete":
        lines += [f"**Status: {document['status']}.** Rows up to here are whole.", ""]
    for section in dict.fromkeys(row["section"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["section"] == section]
        lines += [f"## {TITLES.get(section, section)}", ""]
        for note in notes(rows):
            lines += [f"{note[0].upper()}{note[1:]}.", ""]
        for kind in dict.fromkeys(row["kind"] for row in rows):
            lines += [*_table(kind, [row for row in rows if row["kind"] == kind]), ""]
    lines += [f"{document['started']}, {document['seconds']:.0f} s. {document['environment']['cpu']}.", ""]
    return "\n".join(lines)


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """How to read the kinds of rows that there are."""
    kinds = {row["kind"] for row in rows}
    return [note for kind, note in (("timing", RATIO_NOTE), ("count", COUNT_NOTE)) if kind in kinds]


def _table(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    if kind not in COLUMNS:
        return [f"- {_escaped('; '.join(cells(row)))}" for row in rows]
    names = COLUMNS[kind]
    return [
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(f"| {' | '.join(_escaped(cell) for cell in cells(row))} |" for row in rows),
    ]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


class Console:
    """Lines as they come, flushed, and on a terminal a progress bar below them (rich, where it is installed).

    Elsewhere each row is its own progress: it carries its number.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._bar: Any = None
        self._task: Any = None

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """While it lasts, a terminal shows what is going on."""
        if not self._stream.isatty():
            yield
            return
        try:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        except ImportError:
            yield
            return
        columns = (
            SpinnerColumn(),
            BarColumn(30),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        # Redrawn between samples only: a thread that redraws would take its time from what is measured.
        bar = Progress(*columns, console=RichConsole(file=self._stream), transient=True, auto_refresh=False)
        with bar:
            self._bar, self._task = bar, bar.add_task("", total=1.0)
            try:
                yield
            finally:
                self._bar = None

    def status(self, text: str, done: float) -> None:
        """What is being measured, and the share of the whole that is behind."""
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=done)
            self._bar.refresh()

    def line(self, text: str = "") -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        self._stream.write(text + "\n")
        self._stream.flush()

    def section(self, name: str, kind: str | None = None) -> None:
        self.line()
        self.line(TITLES.get(name, name))
        for note in notes([{"kind": kind}]):
            self.line(f"  {note}")
        if kind in COLUMNS:
            self.line("  " + _aligned(kind, COLUMNS[kind]))

    def row(self, row: dict[str, Any]) -> None:
        texts = cells(row)
        if row["kind"] in WIDTHS:
            self.line("  " + _aligned(row["kind"], texts))
        elif row["kind"] in ("wrong", "skipped", "error"):
            self.line("  " + ": ".join(texts))
        else:
            for text in texts:
                self.line(f"  {text}")


def _aligned(kind: str, texts: tuple[str, ...]) -> str:
    first, *rest = WIDTHS[kind]
    numbers = [f"{text:>{width}}" for text, width in zip(texts[1:], rest, strict=True)]
    return "  ".join([f"{texts[0]:<{first}}", *numbers]).rstrip()
