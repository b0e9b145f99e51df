"""Results: a JSON file that is whole at every moment, how it is read again, and rows shown as they are measured.

The JSON document, schema "dlgpu-bench/2". UTF-8, no NaN or infinity: a number that was not finite is null. Keys that are not
listed here are allowed, kept and, where they are plain numbers or texts, shown.

    schema       "dlgpu-bench/2"; the number grows when a reader of older files would misread a newer one
    status       "running", "complete", "interrupted" (rows up to there are whole) or "failed"
    started      UTC, ISO 8601
    seconds      how long it took so far
    arguments    what was asked for, such as {suite, device, budget_s, only, seed}
    environment  machine and software: {dlgpu, source_hash, git: null or {commit, modified}, device, why, gpu: null or {name,
                 driver, cuda}, cpu, cores, threads: {torch, numpy}, system, python, torch, torch_cuda, triton, numpy}
    rows         a list of objects; each has `section`, `kind` and `at_s`, when it was done, and by kind:

    timing    op; options: {name: value}; passes; shape: {name: size}; dtype; note; device; cache: "cold", "hot" or "host";
              timer: "host", "events" or "graph"; a, b: the providers, a is ours; samples_a_s, samples_b_s: seconds a call,
              one entry a pair; repeats_a, repeats_b: calls in a sample; ratio, low, high: the median of a / b and its
              interval at `confidence`, below 1 a is faster; pairs; converged; dropped: how many pairs were left out as
              disturbed or throttled, and dropped_samples: those, each {a_s, b_s, why}; others: cores that other processes
              kept busy meanwhile, and crowded: too many for this to be a timing of the providers. Null where not measured:
              compulsory_bytes and launches_a of a; unfused_bytes and unfused_launches of torch's operations one by one;
              flops; bytes_per_s and flops_per_s of a; peak_memory_a_bytes, peak_memory_b_bytes: above what was allocated
              before the call; saved_a_bytes, saved_b_bytes: kept for backward; host_a_s, host_b_s: the host's part of a
              call; compile_a_s, compile_b_s: making the inputs and the first call, with the compilers' caches empty;
              config: of a's kernels; clocks: of the GPU in MHz, one entry a pair. Where there was a goal: target: in words,
              reached: "met", "missed" or "open", and targets: each by itself, {target, value, low, high, met}
    training  a, b, losses_a, losses_b: one entry a step; accuracy_a, accuracy_b: on held-out data; epochs, batch, seed,
              device
    kernels   losses: of the kernels in Triton's interpreter, one entry a step; max_difference from the training row's b
    float64   a, b, steps, distance_a, distance_b: the largest difference of a loss from float64's
    count     op, options, passes, shape, dtype, launches, compulsory_bytes, requested_bytes or null, unfused_bytes: {name:
              bytes}, unfused_launches: {name: launches} or null; laws: [{kernel, quantity, coefficients}], fitted_on,
              held_out: shapes; a COUNT, not a timing
    bound     op, passes, shape, dtype, bandwidth: bytes a second, measured in this run; compulsory_s, unfused_s: {name: s}: no
              launch can take less than its bytes at that bandwidth; MODEL, not a timing
    ceiling   name, value, unit: "B/s", "FLOP/s" or "1/s" (launches); samples_s
    model     op, options, passes, shape, dtype, gpu; launches, compulsory_bytes, flops and bound_s of dlgpu's launches;
              unfused_bytes, unfused_launches, unfused_bound_s: {name: number}; gain; limited_by; and what else `rows` in
              bench/model.py names; MODEL, not a timing
    tests     title: a file of tests; passed, failed, skipped; seconds; failures: [{id, message}]
    checker   title, checker: the vendor's; cases, kernels: those that ran; errors: how many it reports, detail: what
    tuned     title: what was tuned, its tile, and what that gained; the table is beside the results
    achieved  op, options, passes, shape, dtype; seconds a call, launches; compulsory_bytes and requested_bytes by the laws,
              flops, and with that time bytes_per_s, flops_per_s; copy_share, matmul_share: of the ceilings of this run
    counter   op, options, passes, shape, dtype; hardware_bytes: what the GPU's counters say that dlgpu's launches moved from
              and to memory, law_bytes: what the laws say, over_law: the quotient; kernels: one entry a launch; others: those
              that are not dlgpu's
    absent    provider, reason: it is not installed, or does not run here; nothing is guessed in its place
    wrong     title, provider, detail: results that differ from float64's; such a provider gets no time
    impossible  title, provider, detail: a time below what the measured ceilings allow, which is no time
    skipped   title, reason
    error     title, message
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from . import tables
from .environment import UsageError, crowded
from .harness import CONFIDENCE, PairedResult
from .tables import plain, row_title, seconds, verdict

__all__ = [
    "KINDS",
    "SCHEMA",
    "Console",
    "Results",
    "load",
    "row_title",
    "seconds",
    "timing_row",
    "validate",
    "verdict",
]

SCHEMA = "dlgpu-bench/2"
STATUSES = ("running", "complete", "interrupted", "failed")
# A thousand rows of a thousand pairs are half of it.
LARGEST_FILE = 128 << 20


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _list_of(check: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(check(x) for x in value)


def _mapping_to(check: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(check(x) for x in value.values())


def _positive(value: object) -> bool:
    # Quotients of two such numbers are numbers, and can be drawn.
    return _number(value) and 1e-30 < value < 1e30  # type: ignore[operator]


def _not_negative(value: object) -> bool:
    return _number(value) and (value == 0 or _positive(value))


def _sizes(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 16
        and all(
            isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 48
            for size in value.values()
        )
    )


# What a value may be: its name in messages, and the test.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": _number,
    "a positive number": _positive,
    "a number of at least 0": _not_negative,
    "true or false": lambda value: isinstance(value, bool),
    "a list of positive numbers": lambda value: bool(value) and _list_of(_positive)(value),
    "a list of numbers or null": _list_of(lambda x: x is None or _number(x)),
    "a list": lambda value: isinstance(value, list),
    "sizes by name": _sizes,
    "numbers by name": _mapping_to(_not_negative),
    "values by name": _mapping_to(lambda x: x is None or isinstance(x, (str, int, float))),
}
_TEXT, _NUMBER, _POSITIVE, _COUNT = "a text", "a number", "a positive number", "a number of at least 0"
_CASE = {"op": _TEXT, "passes": _TEXT, "shape": "sizes by name", "dtype": _TEXT}
_MEASURED = (
    *("compulsory_bytes", "unfused_bytes", "launches_a", "unfused_launches"),
    *("flops", "bytes_per_s", "flops_per_s"),
    *("peak_memory_a_bytes", "peak_memory_b_bytes", "saved_a_bytes", "saved_b_bytes"),
    *("host_a_s", "host_b_s", "compile_a_s", "compile_b_s"),
)
# Kind -> key -> what it must be; after a "?" only where it is there and not null.
KINDS: dict[str, dict[str, str]] = {
    "timing": {
        **_CASE,
        **dict.fromkeys(("device", "cache", "timer", "a", "b"), _TEXT),
        **dict.fromkeys(("samples_a_s", "samples_b_s"), "a list of positive numbers"),
        **dict.fromkeys(("ratio", "low", "high"), _POSITIVE),
        **dict.fromkeys(("repeats_a", "repeats_b", "pairs", "confidence"), _COUNT),
        "converged": "true or false",
        "crowded": "true or false",
        "options": "values by name",
        "note": "?a text",
        "dropped": f"?{_COUNT}",
        "dropped_samples": "?a list",
        "others": f"?{_COUNT}",
        **dict.fromkeys(_MEASURED, f"?{_COUNT}"),
        "config": "?a text",
        "clocks": "?a list",
    },
    "training": {
        **dict.fromkeys(("a", "b", "device"), _TEXT),
        **dict.fromkeys(("losses_a", "losses_b"), "a list of numbers or null"),
        **dict.fromkeys(("accuracy_a", "accuracy_b", "epochs", "batch", "seed"), _NUMBER),
    },
    "kernels": {"losses": "a list of numbers or null", "max_difference": _NUMBER},
    "float64": {"a": _TEXT, "b": _TEXT, "steps": _COUNT, "distance_a": _COUNT, "distance_b": _COUNT},
    "count": {
        **_CASE,
        "options": "?values by name",
        "launches": f"?{_COUNT}",
        "compulsory_bytes": _COUNT,
        "requested_bytes": f"?{_COUNT}",
        "unfused_bytes": "?numbers by name",
        "unfused_launches": "?numbers by name",
        "laws": "?a list",
        "fitted_on": "?a list",
        "held_out": "?a list",
    },
    "bound": {**_CASE, "bandwidth": _POSITIVE, "compulsory_s": _COUNT, "unfused_s": "numbers by name"},
    "ceiling": {"name": _TEXT, "value": _POSITIVE, "unit": _TEXT, "samples_s": "?a list"},
    "model": {
        "op": _TEXT,
        **dict.fromkeys(("passes", "dtype", "gpu", "limited_by"), "?a text"),
        "options": "?values by name",
        "shape": "?sizes by name",
        **dict.fromkeys(("compulsory_bytes", "bound_s", "flops", "launches"), f"?{_COUNT}"),
        **dict.fromkeys(("unfused_bytes", "unfused_launches", "unfused_bound_s"), "?numbers by name"),
        "gain": f"?{_POSITIVE}",
    },
    "tests": {
        "title": _TEXT,
        **dict.fromkeys(("passed", "failed", "skipped"), _COUNT),
        "failures": "?a list",
    },
    "checker": {
        "title": _TEXT,
        "checker": _TEXT,
        "errors": _COUNT,
        "detail": "?a text",
        "kernels": "?a list",
    },
    "tuned": {"title": _TEXT},
    "achieved": {
        **_CASE,
        "options": "?values by name",
        "seconds": _POSITIVE,
        **dict.fromkeys(("compulsory_bytes", "requested_bytes", "flops"), f"?{_COUNT}"),
        **dict.fromkeys(("copy_share", "matmul_share", "bytes_per_s", "flops_per_s"), f"?{_COUNT}"),
    },
    "counter": {
        **_CASE,
        "options": "?values by name",
        "hardware_bytes": _COUNT,
        "law_bytes": _COUNT,
        "over_law": f"?{_COUNT}",
        "kernels": "a list",
    },
    "absent": {"provider": _TEXT, "reason": "?a text"},
    "wrong": {"title": _TEXT, "provider": _TEXT, "detail": _TEXT},
    "impossible": {"title": _TEXT, "provider": _TEXT, "detail": _TEXT},
    "skipped": {"title": _TEXT, "reason": _TEXT},
    "error": {"title": _TEXT, "message": _TEXT},
}
_ANY_ROW = {"section": _TEXT, "kind": _TEXT, "at_s": f"?{_COUNT}", "note": "?a text", "title": "?a text"}


class _Invalid(Exception):
    """What a document is not."""


def _held(where: str, object_: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    for key, wanted in keys.items():
        value = object_.get(key)
        optional, what = wanted.startswith("?"), wanted.removeprefix("?")
        if value is None:
            if not optional:
                raise _Invalid(f"{where} has no {key}")
        elif not _CHECKS[what](value):
            raise _Invalid(f"{key} of {where} must be {what}")


def validate(document: object) -> dict[str, Any]:
    """The document itself, if it is one of this schema.

    Raises:
        UsageError: naming the first thing that is not as documented.
    """
    try:
        return _validated(document)
    except _Invalid as error:
        raise UsageError(str(error)) from None


def _validated(document: object) -> dict[str, Any]:
    if not isinstance(document, dict) or not isinstance(document.get("schema"), str):
        raise _Invalid("no results of dlgpu-bench: it names no schema")
    if document["schema"] != SCHEMA:
        raise _Invalid(
            f"its schema is '{plain(document['schema'], 40)}', and this dlgpu-bench reads '{SCHEMA}' alone: measure again, "
            "or show it with the version that wrote it"
        )
    _held("the document", document, {"status": _TEXT, "started": _TEXT, "seconds": _COUNT})
    if document["status"] not in STATUSES:
        raise _Invalid(f"its status must be one of {', '.join(STATUSES)}")
    for name, kind in (("arguments", dict), ("environment", dict), ("rows", list)):
        if not isinstance(document.get(name), kind):
            raise _Invalid(f"its {name} must be {'an object' if kind is dict else 'a list'}")
    for i, row in enumerate(document["rows"], 1):
        if not isinstance(row, dict):
            raise _Invalid(f"row {i} must be an object")
        _held(f"row {i}", row, _ANY_ROW)
        kind = row["kind"]
        if kind not in KINDS:
            raise _Invalid(f"row {i} is of the unknown kind '{plain(kind, 40)}'")
        where = f"row {i} ({kind})"
        _held(where, row, KINDS[kind])
        if kind == "timing":
            if not len(row["samples_a_s"]) == len(row["samples_b_s"]) == row["pairs"]:
                raise _Invalid(f"samples_a_s and samples_b_s of {where} must have one entry a pair")
            if not row["low"] <= row["ratio"] <= row["high"]:
                raise _Invalid(f"{where} must have low <= ratio <= high")
    return document


def load(path: Path) -> dict[str, Any]:
    """The document of a results file.

    Raises:
        UsageError: it cannot be read, is too large, or is no document of this schema.
    """
    name = plain(path)
    try:
        # Before it is opened, which waits where it is a pipe.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{name}: no regular file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: cannot be read: {_reason(error)}") from None
    if len(data) > LARGEST_FILE:
        raise UsageError(f"{name}: larger than {LARGEST_FILE >> 20} MiB, which no results are")
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else plain(error, 120)
        raise UsageError(f"{name}: no JSON: {said}") from None
    try:
        return _validated(document)
    except _Invalid as error:
        raise UsageError(f"{name}: {error}") from None


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _reason(error: Exception) -> str:
    return plain(getattr(error, "strerror", None) or error, 200)


def timing_row(
    section: str,
    case: Any,
    a: str,
    b: str,
    device: str,
    result: PairedResult,
    others: float | None,
    **measured: Any,
) -> dict[str, Any]:
    """A row of kind `timing`.

    Args:
        case: has op, passes, shape, dtype_name and note, and options if there are some.
        measured: the keys that are null where nothing is given for them, cache and timer, and what else the row should say.
    """
    row = {
        "section": section,
        "kind": "timing",
        "op": case.op,
        "options": dict(getattr(case, "options", None) or {}),
        "passes": case.passes,
        "shape": dict(case.shape),
        "dtype": case.dtype_name,
        "note": case.note,
        "device": device,
        "cache": "host" if device == "cpu" else "cold",
        "timer": "host" if device == "cpu" else "events",
        "a": a,
        "b": b,
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
        "dropped": len(result.dropped),
        "dropped_samples": [dataclasses.asdict(pair) for pair in result.dropped],
        "others": others,
        "crowded": crowded(others),
        **dict.fromkeys(_MEASURED),
        "config": None,
        "clocks": None if result.clocks_mhz is None else list(result.clocks_mhz),
    }
    return row | measured


class Results:
    """The document, in files that are whole at every moment: written anew after each row, then renamed.

    A disk that fills up meanwhile costs nothing: rows stay in memory and each further row tries again. If the last try fails
    too, they go into the system's folder for temporary files, and where even that is full, to standard output.

    Args:
        out: a folder, which is made if it is not there; or a file whose name ends in .json.
        tell: called with a line for the user, where something could not be written.
        beside: further keys of the document, or other values of those there are, from the first write on: such as the rows
            of results that are gone on with.

    Attributes:
        json_path, markdown_path: where the rows are; of no use where `lost` is true, for then they were printed.

    Raises:
        UsageError: nothing can be written there, or there is something that is not to be overwritten.
    """

    def __init__(
        self,
        out: Path,
        arguments: dict[str, Any],
        environment: dict[str, Any],
        tell: Callable[[str], None] | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._start = time.monotonic()
        self._tell = tell or (lambda text: print(text, file=sys.stderr))
        self._failing = False
        self.lost = False
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "started": now.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "arguments": arguments,
            "environment": environment,
            "rows": [],
            **(beside or {}),
        }
        # Each row's JSON: a long run would else encode its first rows again after each of the later ones.
        self._encoded: list[str] = []
        if out.suffix == ".json":
            _refuse_to_overwrite(out)
            self.json_path = out
        else:
            self.json_path = out / f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}.json"
        try:
            self._write()
        except OSError as error:
            raise UsageError(
                f"cannot write results into {plain(self.json_path.parent)}: {_reason(error)}"
            ) from error

    @property
    def markdown_path(self) -> Path:
        return self.json_path.with_suffix(".md")

    @property
    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["rows"]
        return found

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(_finite(_anybodys({"at_s": round(time.monotonic() - self._start, 3), **row})))
        self.save()

    def finish(self, status: str) -> None:
        """Sets the status, and leaves the rows somewhere, come what may."""
        self.document["status"] = status
        self.save()
        if not self._failing:
            return
        wanted = self.json_path
        try:
            self.json_path = Path(tempfile.mkdtemp(prefix="dlgpu-bench-")) / wanted.name
            self._write()
        except OSError:
            self.json_path, self.lost = wanted, True
            self._tell("the results could be written nowhere; they follow as JSON:")
            print(self._json(), flush=True)
        else:
            self._tell(f"{plain(wanted)} could not be written; the results are in {self.json_path}")

    def save(self) -> None:
        """Writes the files; where that fails, says so once and goes on."""
        self.document["seconds"] = round(time.monotonic() - self._start, 3)
        try:
            self._write()
        except OSError as error:
            if not self._failing:
                folder = plain(self.json_path.parent)
                self._tell(
                    f"cannot write results into {folder} now ({_reason(error)}): they are kept in memory"
                )
            self._failing = True
        else:
            self._failing = False

    def _write(self) -> None:
        self.json_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.json_path, self._json())
        write_whole(self.markdown_path, tables.as_markdown(self.document))

    def _json(self) -> str:
        rows = self.rows
        self._encoded += [json.dumps(row, allow_nan=False) for row in rows[len(self._encoded) :]]
        head = {name: value for name, value in self.document.items() if name != "rows"}
        text = json.dumps(_finite(head), indent=1, allow_nan=False).removesuffix("\n}")
        # A row a line, so that two files can be compared line by line.
        body = ",\n  ".join(self._encoded)
        return f'{text},\n "rows": [\n  {body}\n ]\n}}\n' if body else f'{text},\n "rows": []\n}}\n'


def _refuse_to_overwrite(path: Path) -> None:
    if not os.path.lexists(path):
        return
    try:
        # Results of an older schema too.
        with path.open("rb") as file:
            ours = path.is_file() and b'"dlgpu-bench/' in file.read(200)
    except OSError as error:
        raise UsageError(f"{plain(path)}: cannot be written: {_reason(error)}") from None
    if not ours:
        raise UsageError(f"{plain(path)} is there and holds no results: it is not overwritten")


# Not within a word, as in GB/s, nor of a URL.
_ABSOLUTE = re.compile(r"(?<![\w/.])(?:~?/[^\s/'\":;,()<>]+)(?:/[^\s/'\":;,()<>]+)*/([^\s/'\":;,()<>]+)")


def _anybodys(value: Any) -> Any:
    """The same with the last part alone of what looks like an absolute path, as others' errors name them: whose machine it is
    does not go into the file."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"\1", value)
    if isinstance(value, dict):
        return {key: _anybodys(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        # Samples, thousands of them, hold no text.
        return [_anybodys(inner) if isinstance(inner, (str, dict, list)) else inner for inner in value]
    return value


def _finite(value: Any) -> Any:
    """The same with null for what is no finite number, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def write_whole(path: Path, text: str | bytes) -> None:
    """Writes a file that is there as a whole or not at all, for whom the file before it was, or new files are.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    # Not by tempfile, whose files are for their owner alone.
    name = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace"))
        with contextlib.suppress(OSError):
            name.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def encodable(text: str, stream: IO[str]) -> str:
    """Text that a stream takes, whatever its encoding: what that lacks is spelt out."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_out(text: str, out: Path | None) -> None:
    """Writes to a file, or text to standard output.

    Raises:
        UsageError: the file cannot be written.
    """
    if out is None:
        sys.stdout.write(encodable(text, sys.stdout))
        return
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if out.exists() and not out.is_file():
            # A pipe or a device, such as /dev/stdout: written to, not put something in the place of.
            out.write_bytes(text.encode("utf-8", "backslashreplace"))
        else:
            write_whole(out, text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{plain(out)}: cannot be written: {_reason(error)}") from None


class Console:
    """Lines as they come, flushed, and on a terminal a progress bar below them (rich, where it is installed).

    Elsewhere each row is its own progress: it carries its number.

    Args:
        width: columns to fill; the terminal's, or 120 where there is none.
    """

    def __init__(self, stream: IO[str] | None = None, width: int | None = None) -> None:
        self._stream = stream or sys.stdout
        self._width = width
        self._bar: Any = None
        self._task: Any = None
        self._header: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        if self._width is None:
            self._width = _terminal_width() if self._stream.isatty() else 120
        return self._width

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
            BarColumn(30 if self.width > 80 else 10),
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
            self._bar.update(self._task, description=plain(text), completed=done)
            self._bar.refresh()

    def line(self, text: str = "") -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        self._stream.write(encodable(text, self._stream) + "\n")
        self._stream.flush()

    def section(self, name: str, kind: str | None = None) -> None:
        self.line()
        self.line(tables.section_title(name))
        for note in tables.notes([{"kind": kind}]):
            self.line(f"  {note}")
        self._header = ()

    def row(self, row: dict[str, Any]) -> None:
        table = tables.columns([row])
        if table is None:
            self.line(f"  {tables.sentence(row)}")
            return
        shown = tables.fitting(row["kind"], table, self.width)
        names = tuple(column.name for column in shown)
        if names != self._header:
            self._header = names
            self.line(tables.aligned(shown, names, self.width))
        self.line(tables.aligned(shown, [column.cell(row) for column in shown], self.width))


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
