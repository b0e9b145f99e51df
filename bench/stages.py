"""The stages of `dlgpu-bench gpu`, each a list of pieces, and the process that does some pieces of one.

The process reads a Task as JSON on standard input and writes events, one JSON object a line:

    {"begin": id}                a piece has begun
    {"row": {...}, "piece": id}  a row of it, whole
    {"amend": id, "stage": stage, "values": {...}}  that piece's timing rows have these values
    {"end": id, "how": "done"}   or "failed" (an error row says why), or "left", where another call goes on with it

It begins no piece for which there is not the time, and ends itself where an error has broken the GPU: whoever started it
starts another for the rest. With `rehearse` all of it runs on a CPU, at tiny sizes, with others' libraries and the vendor's
tools stood in for (see `rehearsal`); its numbers say nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch

from dlgpu.kernels import _triton, tuning

from . import ceilings, model, rehearsal, smallest, tools, tune, variants
from .cases import FORWARD, OPS, STEP
from .children import Lines, command, die_with_parent, environment, gpu_is_broken
from .environment import PACKAGE, cores, one_line
from .gpu import TARGETS
from .launches import Record, dry_run
from .laws import LawError, Laws
from .measure import Case
from .providers import BOUNDS, PROVIDERS, absent, offered
from .report import Console, load
from .suite import Context, compare, counted, limits
from .tables import median
from .targets import CLIPPED, GOALS, MASTERS, NOTES, judge
from .timers import timer_for

__all__ = ["STAGES", "Piece", "Task", "main", "plan", "summary"]

Row = dict[str, Any]

# In the order of a full run, with their parts of its time.
STAGES: Mapping[str, float] = {"correctness": 7, "check": 3, "tune": 4, "bench": 11, "profile": 3}
RESULTS, TESTS = "gpu.json", "tests.jsonl"

# What a process needs for its end.
MARGIN_S = 5.0
# A case's timing; verification, compilation and memory come on top.
CASE_S = 3.0
TUNE_DTYPES = {"bf16": tune.SHAPES, "fp16": tune.SHAPES[2:3], "fp32": tune.SHAPES[2:4]}
# Ops for which tiles are tuned.
_TUNED = ("linear", "mlp", "gated_linear", "linear_cross_entropy", "training_step", *tune.CASES, "rms_norm")
# These autotune every product, for a minute perhaps.
_SLOW = ("compile-max",)
# In a rehearsal tools see one op.
_REHEARSED = ("softmax",)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a stage that is done as a whole.

    needs_s: with less time left it is not begun. limit_s: it is ended after that, as failed.
    again: each process of the stage does it anew, and it alone is no reason to start one.
    """

    id: str
    needs_s: float = 10.0
    limit_s: float = 120.0
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process is to do: pieces of a stage, in order, for so many seconds, with results in `out`."""

    stage: str
    pieces: Sequence[str]
    seconds: float
    out: str
    rehearse: bool = False
    source: str = ""


class Tell:
    """Says what happens, to the process that asked."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def _say(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(event) + "\n")
            self._stream.flush()

    def begin(self, piece: str) -> None:
        self._say({"begin": piece})

    def row(self, piece: str, row: Row) -> None:
        self._say({"row": row, "piece": piece})

    def amend(self, event: Row) -> None:
        self._say(event)

    def end(self, piece: str, how: str = "done") -> None:
        self._say({"end": piece, "how": how})

    def error(self, piece: str, section: str, error: BaseException) -> None:
        self.row(piece, {"section": section, "kind": "error", "title": piece, "message": one_line(error)})
        self.end(piece, "failed")


# What a piece of the stages below does: it yields rows, and may say that something is left.
Work = Callable[[], Iterator[Row]]


class LeftError(Exception):
    """The rest of a piece is left for another call."""


def _in_order(work: Mapping[str, Work], task: Task, section: str, tell: Tell) -> None:
    """Does the pieces of a task one after the other, in this process."""
    until = time.monotonic() + task.seconds - MARGIN_S
    needs = {piece.id: piece.needs_s for piece in plan(task.stage, task.rehearse)}
    for piece in task.pieces:
        if time.monotonic() + needs[piece] > until:
            continue
        tell.begin(piece)
        try:
            for row in work[piece]():
                if "amend" in row:
                    tell.amend(row)
                else:
                    tell.row(piece, row)
        except LeftError:
            tell.end(piece, "left")
        except Exception as error:
            tell.error(piece, section, error)
            if not task.rehearse and gpu_is_broken():
                return
        else:
            tell.end(piece)


# correctness


def _tests_folder() -> Path | None:
    folder = PACKAGE.parent / "tests"
    return folder if (folder / "conftest.py").is_file() else None


def _log_lines(path: Path, source: str) -> list[Row]:
    """Of each test the last that was written of it by the same source, but that it failed once; half a line is none."""
    found: dict[str, Row] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or entry.get("source") != source or "id" not in entry:
            continue
        # Of a test that broke the GPU xdist says later that its worker is gone.
        if found.get(entry["id"], {}).get("outcome") != "failed":
            found[entry["id"]] = entry
    return list(found.values())


def summary(path: Path, source: str) -> Iterator[Row]:
    """Rows of kind tests, one a file of tests, and of kind absent for what could not be imported."""
    files: dict[str, list[Row]] = {}
    for entry in _log_lines(path, source):
        files.setdefault(entry["id"].partition("::")[0], []).append(entry)
    for name, entries in sorted(files.items()):
        counts = {
            outcome: sum(entry["outcome"] == outcome for entry in entries)
            for outcome in ("passed", "failed", "skipped")
        }
        for entry in entries:
            if entry["outcome"] == "uncollected":
                message = entry.get("message", "")
                if message.startswith(("ModuleNotFoundError", "ImportError")) and "dlgpu" not in message:
                    row = {"kind": "absent", "provider": name, "reason": message}
                else:
                    row = {"kind": "error", "title": name, "message": message}
                yield {"section": "correctness", **row}
        if not any(counts.values()):
            continue
        failures = [
            {key: entry.get(key, "") for key in ("id", "message")}
            for entry in entries
            if entry["outcome"] == "failed"
        ]
        yield {
            "section": "correctness",
            "kind": "tests",
            "title": name,
            **counts,
            "seconds": round(sum(entry["seconds"] for entry in entries), 1),
            "failures": failures,
        }


def _pytest(task: Task, done: str) -> list[str]:
    import importlib.util

    folder = _tests_folder()
    assert folder is not None
    arguments = [sys.executable, "-m", "pytest", "-p", "dlgpu.bench.testlog", "-q", "--tb=short"]
    arguments += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "not perf"]
    if task.rehearse:
        return [*arguments, "-m", "not gpu", str(folder / "test_activations.py"), "-k", rehearsal.TESTS]
    if importlib.util.find_spec("xdist") is not None:
        # Triton compiles on the CPU; the GPU is shared. By "load" workers take tests in order, those of most value first.
        arguments += ["-n", str(max(1, min(14, cores() - 2))), "--dist", "load"]
        arguments += ["--max-worker-restart", "100"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        arguments += ["--timeout", "150"]
    return [*arguments, str(folder)]


def _correctness(task: Task, tell: Tell) -> None:
    (piece,) = task.pieces
    tell.begin(piece)
    about = {"section": "correctness", "title": "the tests"}
    if _tests_folder() is None:
        tell.row(
            piece, {**about, "kind": "skipped", "reason": "an installed copy has no tests: use a checkout"}
        )
        tell.end(piece)
        return
    import importlib.util

    if importlib.util.find_spec("pytest") is None:
        tell.row(piece, {"section": "correctness", "kind": "absent", "provider": "pytest", "reason": None})
        tell.end(piece)
        return
    until = time.monotonic() + task.seconds - 2 * MARGIN_S
    log, how = Path(task.out) / TESTS, "left"
    for name in ("hypothesis", "expecttest"):
        if importlib.util.find_spec(name) is None:
            reason = "not installed: the tests that need it are skipped"
            tell.row(piece, {"section": "correctness", "kind": "absent", "provider": name, "reason": reason})
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < until:
            known = {entry["id"] for entry in _log_lines(log, task.source)}
            done = Path(folder) / "done"
            done.write_text("".join(f"{name}\n" for name in sorted(known)), encoding="utf-8")
            env = environment(
                DLGPU_TESTS_LOG=str(log.resolve()),
                DLGPU_TESTS_DONE=str(done),
                DLGPU_TESTS_SOURCE=task.source,
                DLGPU_TESTS_SYNC="rehearse" if task.rehearse else "error",
                DLGPU_BACKEND=None,
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            )
            with Lines(_pytest(task, str(done)), env, cwd=PACKAGE.parent, merged=True) as tests:
                try:
                    for line in tests.until(until):
                        print(line, file=sys.stderr)
                except TimeoutError:
                    tests.end(grace_s=MARGIN_S)
                    break
            # 0: all passed, 1: some did not, 5: none were left.
            if tests.status in (0, 1, 5):
                how = "done"
                break
            if len(_log_lines(log, task.source)) == len(known):
                row = {**about, "kind": "error", "message": f"pytest ended with status {tests.status}"}
                tell.row(piece, row)
                how = "failed"
                break
    for row in summary(log, task.source):
        tell.row(piece, row)
    tell.end(piece, how)


# check


def _no_tool(section: str, name: str) -> Row:
    where = "not on PATH, beside a CUDA toolkit or in NVIDIA's Python packages"
    return {"section": section, "kind": "absent", "provider": name, "reason": where}


def _tool(name: str, task: Task) -> list[str] | None:
    return rehearsal.tool(name) if task.rehearse else tools.find(name)


def _check(task: Task, tell: Tell) -> None:
    tool = _tool(tools.SANITIZER, task)
    if tool is None:
        for i, piece in enumerate(task.pieces):
            tell.begin(piece)
            if not i:
                tell.row(piece, _no_tool("check", tools.SANITIZER))
            tell.end(piece)
        return
    by_checker: dict[str, list[str]] = {}
    for piece in task.pieces:
        by_checker.setdefault(piece.partition(" ")[0], []).append(piece)
    until = time.monotonic() + task.seconds - MARGIN_S
    threads = [
        threading.Thread(target=_checked, args=(tool, pieces, until, task.rehearse, tell))
        for pieces in by_checker.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _checked(tool: Sequence[str], pieces: Sequence[str], until: float, rehearse: bool, tell: Tell) -> None:
    """Runs one checker over its pieces, in as many processes as it takes: one that an error ends is followed by another."""
    left = list(pieces)
    while left and time.monotonic() < until:
        try:
            found = _Checked(tool, left, until, rehearse)
        except OSError as error:
            tell.begin(left[0])
            tell.error(left[0], "check", error)
            return
        for piece in [piece for piece in left if piece in found.ended]:
            tell.begin(piece)
            for row in found.rows(piece):
                tell.row(piece, row)
            tell.end(piece, found.ended[piece])
            left.remove(piece)
        if not found.ended:
            if found.problem:
                tell.begin(left[0])
                about = {"section": "check", "title": left[0].partition(" ")[0]}
                tell.row(left[0], {**about, "kind": "error", "message": found.problem})
                tell.end(left[0], "failed")
            return


class _Checked:
    """One process of a checker: which pieces it ended, and how; and what it found in them."""

    def __init__(self, tool: Sequence[str], pieces: Sequence[str], until: float, rehearse: bool) -> None:
        self._checker = pieces[0].partition(" ")[0]
        self._pieces = {piece.partition(" ")[2]: piece for piece in pieces}
        self._cases: dict[str, list[Row]] = {}
        self._failed: dict[str, str] = {}
        self._by_kernel: dict[str, str] = {}
        self.ended: dict[str, str] = {}
        driver = command("smallest", "check", *(("--least",) if rehearse else ()), *self._pieces)
        # An allocation of its own for each tensor, so that what lies past its end belongs to nobody.
        env = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", DLGPU_BACKEND=None)
        lines: list[str] = []
        self._where: list[str] = []
        now, whole = "", False
        with Lines(tools.checking(tool, self._checker, driver), env, merged=True) as process:
            try:
                for line in process.until(until):
                    now = self._heard(line) or now
                    lines.append(line)
                    self._where.append(now)
                whole = True
            except TimeoutError:
                pass
        names = list(self._cases)
        # All but the last are done with; that too if the process came to its own end.
        for name in names if whole else names[:-1]:
            self.ended[self._pieces[name]] = "failed" if name in self._failed else "done"
        self._found = self._sorted(lines)
        self.problem = ""
        if whole and not self.ended:
            last = next((line for line in reversed(lines) if line.strip()), "")
            self.problem = tools.tool_failure(lines) or f"status {process.status}: {last[:200]}"

    def _heard(self, line: str) -> str:
        for how in (smallest.BEGIN, smallest.DONE, smallest.FAILED):
            if line.startswith(how):
                case = json.loads(line.removeprefix(how))
                name: str = case["name"]
                self._cases.setdefault(name, [])
                if how == smallest.DONE:
                    self._cases[name].append(case)
                    for launch in case["launches"]:
                        self._by_kernel.setdefault(launch["kernel"], name)
                elif how == smallest.FAILED:
                    self._failed.setdefault(name, case["message"])
                return name
        return ""

    def _sorted(self, lines: Sequence[str]) -> dict[str, list[tools.Finding]]:
        """Name -> what was found in its kernels; "" for kernels that are not ours. The tool may print late, so that the
        kernel decides, and only then the case that was running."""
        found: dict[str, list[tools.Finding]] = {}
        for name, group in itertools.groupby(zip(self._where, lines, strict=True), key=lambda pair: pair[0]):
            for finding in tools.findings(line for _, line in group):
                ran = {launch["kernel"] for case in self._cases.get(name, ()) for launch in case["launches"]}
                if not finding.kernel:
                    where = ""
                elif finding.kernel in ran or finding.kernel not in self._by_kernel:
                    where = name
                else:
                    where = self._by_kernel[finding.kernel]
                found.setdefault(where, []).append(finding)
        return found

    def rows(self, piece: str) -> Iterator[Row]:
        name = piece.partition(" ")[2]
        found = self._found.pop(name, [])
        yield {
            "section": "check",
            "kind": "checker",
            "title": piece,
            "checker": self._checker,
            "cases": len(self._cases[name]),
            "kernels": sorted({r["kernel"] for case in self._cases[name] for r in case["launches"]}),
            "errors": len(found),
            "detail": "; ".join(dict.fromkeys(f"{f.kernel}: {f.text}" for f in found))[:600],
        }
        if name in self._failed:
            message = self._failed[name]
            yield {"section": "check", "kind": "error", "title": piece, "message": message}
        if others := self._found.pop("", []):
            yield {
                "section": "check",
                "kind": "checker",
                "title": f"{self._checker}, kernels that are not dlgpu's",
                "checker": self._checker,
                "elsewhere": len(others),
                "errors": 0,
                "detail": "; ".join(dict.fromkeys(f.text for f in others))[:600],
            }


# tune


def _tune_work(task: Task) -> dict[str, Work]:
    until = time.monotonic() + task.seconds

    def work(piece: str) -> Work:
        op, dtype, shape = piece.split(" ") if piece != tune.MEMORY_BOUND else (piece, None, "")

        def rows() -> Iterator[Row]:
            card = "rehearsal" if task.rehearse else torch.cuda.get_device_name()
            said: list[str] = []
            options = tune.Options(
                op=_REHEARSED[0] if task.rehearse and not shape else op,
                shapes=None if task.rehearse or not shape else [tune._shape(shape)],
                dtype=dtype,
                activations=[None] if task.rehearse and shape else None,
                out=Path(task.out) / f"{tuning.slug(card)}.json",
                budget=max(1.0, min(_plan_of(task, piece).limit_s, until - time.monotonic()) - 2 * MARGIN_S),
                rehearse=task.rehearse,
            )
            tune.tune(options, said.append)
            for line in said[:-1]:
                yield {"section": "tune", "kind": "tuned", "title": line}
            if "left for another run" in said[-1]:
                raise LeftError

        return rows

    return {piece: work(piece) for piece in task.pieces}


def _plan_of(task: Task, piece: str) -> Piece:
    return next(p for p in plan(task.stage, task.rehearse) if p.id == piece)


# bench


@dataclasses.dataclass(frozen=True)
class _Bench:
    """A case, against whom, and how it is timed ("" is the device's usual way)."""

    id: str
    case: Case
    rivals: tuple[str, ...]
    timer: str = ""
    cache: str = ""
    slow: bool = False


def _benches(rehearse: bool) -> list[_Bench]:
    """By value: first what has goals, then the rest, then everybody else who offers the same, then what takes long."""
    first, others = [], []
    seen = {(target[0], rival) for target in TARGETS for rival in target[5] if rival not in _SLOW}
    for name, shape, passes, dtype, options, rivals in TARGETS:
        op = OPS[name]
        case = Case(op, op.shapes[shape], passes, dtype, options, "cuda")
        title = " ".join([name, shape, passes, *(f"{k}={v}" for k, v in options.items()), case.dtype_name])
        # With torch's own, so that there is a row where all others are absent.
        quick = tuple(dict.fromkeys([*(rival for rival in rivals if rival not in _SLOW), "eager"]))
        goals = any(g.op == name and shape in g.shapes and g.passes == passes for g in GOALS)
        first.append((0 if goals else 1, _Bench(title, case, quick)))
        for rival in (*PROVIDERS, *_SLOW):
            if rival in (*quick, "dlgpu", "fallback", *BOUNDS) or offered(op, rival, case.options, passes):
                continue
            goal = any(
                (g.op, g.passes, g.against) == (name, passes, rival)
                and shape in g.shapes
                and {**op.defaults(), **g.options} == case.options
                for g in GOALS
            )
            # Who is no part of a goal is measured once an op.
            if not goal and (passes == FORWARD or (name, rival) in seen):
                continue
            # It is products that are autotuned.
            if not goal and rival in _SLOW and op.flops is None:
                continue
            if (absent(PROVIDERS[rival], "cuda") and not rehearse) or (title, rival) in seen:
                continue
            seen |= {(name, rival), (title, rival)}
            # One at a time: what one of them cannot do, or takes long for, keeps nothing from the others.
            bench = _Bench(f"{title} vs {rival}", case, (rival,), slow=rival in _SLOW)
            others.append((3 if rival in _SLOW else 2, bench))
    adam = OPS["adam"]
    forms = [
        ("adam many, the host's clock", adam, "many", "", torch.float32, ("torch-fused", "eager"), "host"),
        ("adam many in a graph", variants.in_a_graph(), "many", "", torch.float32, ("torch-fused",), "graph"),
        ("adam clipped", variants.clipped(), "h200-300m", CLIPPED, torch.float32, ("torch-fused",), ""),
        ("adam masters", variants.with_masters(), "h200-300m", MASTERS, torch.bfloat16, ("torch-fused",), ""),
    ]
    for title, op, shape, note, dtype, rivals, timer in forms:
        case = Case(op, op.shapes[shape], STEP, dtype, {}, "cuda", note)
        cache = "hot" if timer else ""
        first.append((0, _Bench(title, case, tuple(rivals), timer, cache)))
    for shape in ("h200-1b", "h200-1b-1000"):
        case = Case(adam, adam.shapes[shape], STEP, torch.float32, {}, "cuda")
        others.append((4, _Bench(f"adam {shape} step float32", case, ("torch-fused",), slow=True)))
    found = [bench for _, bench in sorted([*first, *others], key=lambda pair: pair[0])]
    return rehearsal.benches(found) if rehearse else found


_CEILINGS, _ABSENT = "ceilings", "who is here"


def _earlier(task: Task) -> list[Row]:
    """The rows so far, of earlier calls too."""
    path = Path(task.out) / RESULTS
    rows: list[Row] = load(path)["rows"] if path.is_file() else []
    return rows


def _bench_work(task: Task) -> dict[str, Work]:
    rows, mine = _earlier(task), list[Row]()
    tuned = None if task.rehearse else _use_tuned(Path(task.out))

    def who() -> Iterator[Row]:
        wanted = dict.fromkeys([*(r for *_, rivals in TARGETS for r in rivals), *PROVIDERS])
        for name in wanted:
            if why := absent(PROVIDERS[name], "" if task.rehearse else "cuda"):
                yield {"section": "gpu", "kind": "absent", "provider": name, "reason": why}

    def measured() -> Iterator[Row]:
        found = (
            ceilings.ceilings("cpu", 0.01, (torch.float32,), sizes=(1 << 16, 1 << 12, 32))
            if task.rehearse
            else ceilings.ceilings("cuda", 0.5)
        )
        for row in found:
            mine.append(row)
            yield row

    def work(bench: _Bench) -> Work:
        def found() -> Iterator[Row]:
            for row in _compared(bench, task, mine):
                if row["kind"] == "timing":
                    if tuned and row["op"] in _TUNED:
                        row["config"] = tuned
                    row = judge(row, [*rows, *mine], limits(mine))
                mine.append(row)
                yield row

        return found

    every = {_ABSENT: who, _CEILINGS: measured, **{b.id: work(b) for b in _benches(task.rehearse)}}
    return {piece: every[piece] for piece in task.pieces}


def _compared(bench: _Bench, task: Task, rows: list[Row]) -> Iterator[Row]:
    if task.rehearse:
        yield from rehearsal.compared(bench.case, bench.rivals)
        return
    here = [r for r in bench.rivals if not absent(PROVIDERS[r], "cuda")]
    here = [r for r in here if not offered(bench.case.described, r, bench.case.options, bench.case.passes)]
    if not here:
        return
    timer = timer_for("cuda", bench.timer, bench.cache)
    context = Context("cuda", 0, Console(sys.stderr), rows)
    yield from compare(bench.case, here, section="gpu", timer=timer).run(context, CASE_S)


def _use_tuned(out: Path) -> str:
    """Has this process take the tiles that the stage before measured, if it did; says so."""
    card = torch.cuda.get_device_name()
    table = out / f"{tuning.slug(card)}.json"
    if not table.is_file():
        return ""
    os.environ["DLGPU_CACHE_DIR"] = _Folder.name = tempfile.mkdtemp(prefix="dlgpu-")
    path = tuning.user_path(card)
    if path is None:
        return ""
    shutil.copyfile(table, path)
    return "tiles tuned in this run"


class _Folder:
    """The folder that `_use_tuned` made, for `main` to remove."""

    name = ""


# profile


def _profile_work(task: Task) -> dict[str, Work]:
    rows, work = _earlier(task), dict[str, Work]()
    names = list(dict.fromkeys(piece.partition(" ")[2] for piece in task.pieces))
    # Metering takes a process an op and no GPU: all at once, while the profiler has the GPU.
    pool = ThreadPoolExecutor(max(1, min(8, cores() // 2)))
    laws = {name: pool.submit(_laws, name) for name in names}
    for piece in task.pieces:
        kind, _, name = piece.partition(" ")
        does = _achieved if kind == "achieved" else _counted
        work[piece] = functools.partial(does, name, rows, laws[name], task)
    return work


def _laws(name: str) -> Laws:
    ((_, found),) = model.laws_of([name])
    if isinstance(found, str):
        raise LawError(found)
    return found


def _device() -> torch.device:
    return torch.device("cpu" if _triton.INTERPRETED else "cuda")


def _achieved(name: str, rows: Sequence[Row], laws: Future[Laws], task: Task) -> Iterator[Row]:
    """What dlgpu's time comes to against its bytes by the laws, its operations, and the ceilings. The bytes go into the timing
    rows too."""
    best, seen = limits(rows), dict[str, Row]()
    for row in rows:
        if row["kind"] != "timing" or row["op"] != name or row.get("note") in NOTES:
            continue
        about = {key: row[key] for key in ("op", "options", "passes", "shape", "dtype")}
        key = json.dumps(about, sort_keys=True)
        if key not in seen:
            seen[key] = _bytes_of(row, laws.result())
            yield {"section": "profile", "kind": "achieved", **about, **_rates(row, laws.result(), best)}
        if seen[key]:
            yield {"amend": row["piece"], "stage": row["stage"], "values": seen[key]}


def _bytes_of(row: Row, laws: Laws) -> Row:
    """What a timing row says of bytes, had the laws been known when it was made."""
    case = Case(OPS[row["op"]], row["shape"], row["passes"], getattr(torch, row["dtype"]), row["options"])
    return counted(case, laws, _triton.device_limits(_device()))


def _rates(row: Row, laws: Laws, best: Mapping[str, float]) -> Row:
    dtype = getattr(torch, row["dtype"])
    case = Case(OPS[row["op"]], row["shape"], row["passes"], dtype, row["options"])
    limits_here = _triton.device_limits(_device())
    steps = dry_run(case.without_memory("dlgpu"), limits_here, warm=row["passes"] == STEP)
    compulsory, requested, flops = 0, 0, 0
    for step in steps:
        flops += step.flops
        if isinstance(step, Record):
            traffic = laws(step)
            compulsory, requested = compulsory + traffic.compulsory, requested + traffic.requested
        else:
            compulsory += step.read + step.written
    seconds = median(row["samples_a_s"])
    peak = best.get(ceilings.matmul_name(dtype))
    return {
        "seconds": seconds,
        "launches": len(steps),
        "compulsory_bytes": compulsory,
        "requested_bytes": requested,
        "bytes_per_s": compulsory / seconds,
        "copy_share": compulsory / seconds / best[ceilings.COPY] if ceilings.COPY in best else None,
        "flops": flops,
        "flops_per_s": flops / seconds if flops else None,
        "matmul_share": flops / seconds / peak if flops and peak else None,
    }


def _counted(name: str, rows: Sequence[Row], laws: Future[Laws], task: Task) -> Iterator[Row]:
    """What the GPU's own counters say that each launch moved, beside the law's bytes."""
    tool = _tool(tools.PROFILER, task)
    if tool is None:
        yield _no_tool("profile", tools.PROFILER)
        return
    driver = command("smallest", "profile", *(("--least",) if task.rehearse else ()), name)
    lines: list[str] = []
    with Lines(tools.profiling(tool, driver), environment(DLGPU_BACKEND=None), merged=True) as process:
        lines += process.until(time.monotonic() + _plan_of(task, f"counters {name}").limit_s - MARGIN_S)
    measured = tools.counters(lines)
    done = [json.loads(line.removeprefix(smallest.DONE)) for line in lines if line.startswith(smallest.DONE)]
    if not done or not measured:
        failed = [line.removeprefix(smallest.FAILED) for line in lines if line.startswith(smallest.FAILED)]
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        message = tools.tool_failure(lines) or (failed or [last])[0][:300]
        raise RuntimeError(f"{tools.PROFILER}: {message}")
    for case in done:
        about = {key: case[key] for key in ("op", "options", "passes", "shape", "dtype")}
        records = [smallest.record_from(launch) for launch in case["launches"]]
        yield {
            "section": "profile",
            "kind": "counter",
            **about,
            **_beside(records, measured, laws.result()),
        }


def _beside(records: Sequence[Record], measured: Sequence[Row], laws: Laws) -> Row:
    ours = {record.kernel for record in records}
    own = [row for row in measured if row["kernel"] in ours]
    if [row["kernel"] for row in own] != [record.kernel for record in records]:
        raise RuntimeError(
            f"{tools.PROFILER}: saw {len(own)} launches of dlgpu's kernels, not {len(records)}"
        )
    kernels = []
    for record, row in zip(records, own, strict=True):
        law = laws(record)
        kernels.append({**row, "law_read_bytes": law.read, "law_written_bytes": law.written})
    hardware = sum(row["read_bytes"] + row["written_bytes"] for row in kernels)
    by_law = sum(row["law_read_bytes"] + row["law_written_bytes"] for row in kernels)
    return {
        "kernels": kernels,
        "hardware_bytes": hardware,
        "law_bytes": by_law,
        "over_law": hardware / by_law if by_law else None,
        "others": [row for row in measured if row["kernel"] not in ours],
    }


# Which pieces there are, and the process.


def _profiled(rehearse: bool) -> list[str]:
    if rehearse:
        return list(_REHEARSED)
    return list(dict.fromkeys(target[0] for target in TARGETS))


def plan(stage: str, rehearse: bool = False) -> list[Piece]:
    """The pieces of a stage, those of most value first."""
    if stage == "correctness":
        return [Piece("the tests", 20, float("inf"))]
    if stage == "check":
        checkers = tools.CHECKERS[:1] if rehearse else tools.CHECKERS
        ops = _REHEARSED if rehearse else smallest.NAMES
        return [Piece(f"{checker} {name}", 15, float("inf")) for checker in checkers for name in ops]
    if stage == "tune":
        shapes = {"bf16": tune.SHAPES[:1]} if rehearse else TUNE_DTYPES
        products = [Piece(f"linear {dtype} {s}", 20, 90) for dtype, found in shapes.items() for s in found]
        # Most of it is compiled beside one another; a tile is measured in a second.
        return [*products, Piece(tune.MEMORY_BOUND, 15, 120)]
    if stage == "bench":
        cases = [Piece(b.id, 20 if b.slow else 8, 150 if b.slow else 75) for b in _benches(rehearse)]
        return [Piece(_CEILINGS, 12, 60, again=True), Piece(_ABSENT, 1, 30), *cases]
    if stage == "profile":
        names = _profiled(rehearse)
        return [
            *(Piece(f"counters {name}", 12, 75) for name in names),
            *(Piece(f"achieved {name}", 3, 120) for name in names),
        ]
    raise ValueError(f"no stage {stage!r}")


_WORK: Mapping[str, Callable[[Task], dict[str, Work]]] = {
    "tune": _tune_work,
    "bench": _bench_work,
    "profile": _profile_work,
}


def main(lines: Iterable[str]) -> int:
    """The process: a task on standard input, events on standard output; what else is printed goes to standard error."""
    die_with_parent()
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tell, task = Tell(events), Task(**json.loads("".join(lines)))
    if task.stage == "correctness":
        _correctness(task, tell)
    elif task.stage == "check":
        _check(task, tell)
    else:
        _in_order(_WORK[task.stage](task), task, "gpu" if task.stage == "bench" else task.stage, tell)
    if _Folder.name:
        shutil.rmtree(_Folder.name, ignore_errors=True)
    sys.stderr.flush()
    events.flush()
    # Neither threads that still meter nor a broken GPU keep it.
    os._exit(0)


if __name__ == "__main__":
    main(sys.stdin)
