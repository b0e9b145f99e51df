"""`dlgpu-bench gpu`: all that takes an NVIDIA GPU, in one command that may be ended at any moment and gone on with.

Time on a GPU is short, so nothing is found out there twice and nothing is lost. The stages (`stages`) are lists of pieces;
each piece runs in a process of its stage, and what it yields is written as it comes, whole, into DIR/gpu.json:

    gpu.json, gpu.md   rows of all stages, schema dlgpu-bench/2, and beside what `report` says of it
                       pieces: {stage: {piece: {how: "done", "failed" or "left", tries, seconds}}}, and calls: how many
    tests.jsonl        a line a test
    <card>.json        the tuned tiles, for kernels/tuned/
    gpu.log            what the processes said; it is no result, and may hold paths

A second call with the same DIR does what the first did not: pieces that are done are left out, those that failed come last,
once more. Results of other code, another GPU or other versions are set aside, under another name. Within a call the time
that is left is shared out over the stages that have something left, by their weights; what a stage does not use goes to the
next, and what is left at the end to those that were cut short. This process calls no kernel: whatever an error does to a
GPU's context, the results are elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import click

from . import stages
from .children import Lines
from .children import command as module_command
from .children import environment as child_environment
from .cli import Amount, Names
from .environment import UsageError, choose_device, describe, find_gpu, header
from .report import Console, Results, load
from .stages import STAGES, Piece, Task
from .tables import median

__all__ = ["Kept", "Runner", "command"]

Row = dict[str, Any]

MINUTES = 9.0
# Kept for the last writes.
MARGIN_S = 12.0
# With less left no process is started: it takes this long to begin.
LEAST_S = 25.0
REHEARSAL_S = 600.0
TRIES = 2
# Results of which other values of these are not gone on with.
_SAME = ("source_hash", "torch", "triton", "torch_cuda", "device", "gpu")


class Kept(Results):
    """A results file that is gone on with.

    The document has beside the usual `pieces`, `calls` and `rehearsal`; each row has its `piece` and `stage`.
    """

    def __init__(self, folder: Path, arguments: Row, environment: Row, rehearse: bool) -> None:
        path = folder / stages.RESULTS
        earlier = self._earlier(path, environment, rehearse)
        if earlier is None and (folder / stages.TESTS).exists():
            _set_aside(folder / stages.TESTS)
        beside: Row = {"rehearsal": rehearse, "calls": 1, "pieces": {}}
        if earlier is not None:
            beside |= {key: earlier[key] for key in ("started", "rows", "pieces", "seconds")}
            beside["calls"] = int(earlier.get("calls", 1)) + 1
        super().__init__(path, arguments, environment, beside=beside)
        self._start -= self.document["seconds"]

    @staticmethod
    def _earlier(path: Path, environment: Row, rehearse: bool) -> Row | None:
        if not path.exists():
            return None
        found = load(path)
        same = all(found["environment"].get(key) == environment.get(key) for key in _SAME)
        if same and found.get("rehearsal") == rehearse and _known(found.get("pieces")):
            return found
        _set_aside(path)
        _set_aside(path.with_suffix(".md"))
        return None

    def piece(self, stage: str, name: str) -> Row:
        """What is known of a piece."""
        pieces: dict[str, dict[str, Row]] = self.document["pieces"]
        return pieces.setdefault(stage, {}).setdefault(name, {"how": "", "tries": 0, "seconds": 0.0})

    def drop(self, stage: str, name: str) -> None:
        """Takes out the rows of a piece, which is done again."""
        kept = [row for row in self.rows if (row.get("stage"), row.get("piece")) != (stage, name)]
        if len(kept) < len(self.rows):
            self.document["rows"] = kept
            self._encoded = []

    def amend(self, stage: str, name: str, values: Row) -> None:
        """Gives the timing rows of a piece further values, and the rate that follows from their bytes."""
        for row in self.rows:
            if row["kind"] == "timing" and (row.get("stage"), row.get("piece")) == (stage, name):
                row |= values
                if moved := row.get("compulsory_bytes"):
                    row["bytes_per_s"] = moved / median(row["samples_a_s"])
        self._encoded = []
        self.save()


def _known(pieces: object) -> bool:
    """Whether it is what `Kept` writes of the pieces."""
    keys = {"how", "tries", "seconds"}
    return isinstance(pieces, dict) and all(
        isinstance(found, dict) and all(isinstance(p, dict) and keys <= p.keys() for p in found.values())
        for found in pieces.values()
    )


def _set_aside(path: Path) -> None:
    """Renames a file of other results, so that nothing is lost."""
    for number in range(1, 1000):
        other = path.with_name(f"{path.stem}-before-{number}{path.suffix}")
        if path.exists() and not other.exists():
            path.rename(other)
            return


@contextlib.contextmanager
def _ended_politely() -> Iterator[None]:
    """A request to end, such as a time limit's, is Ctrl-C."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        # Not in the main thread.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass
class Runner:
    """Runs stages into a results file until a moment of time.monotonic."""

    results: Kept
    console: Console
    out: Path
    until: float
    rehearse: bool = False
    log: IO[Any] | None = None
    plan: Any = stages.plan
    _tried: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def left(self, stage: str) -> list[Piece]:
        """The pieces of a stage that have something left, those that failed last; none if only such as are done anew by
        each process."""
        pieces = self.plan(stage, self.rehearse)
        known = {piece.id: self.results.piece(stage, piece.id) for piece in pieces}
        fresh = [p for p in pieces if known[p.id]["how"] in ("", "left", "begun")]
        failed = [p for p in pieces if known[p.id]["how"] == "failed" and known[p.id]["tries"] < TRIES]
        found = [*fresh, *failed]
        if all(piece.again for piece in found):
            return []
        return [*(p for p in pieces if p.again), *(p for p in found if not p.again)]

    def run(self, wanted: Sequence[str]) -> None:
        """The stages in order, each for its share of the time; then what is left of them."""
        for i, stage in enumerate(wanted):
            rest = [name for name in wanted[i:] if self.left(name)]
            if stage not in rest:
                continue
            now = time.monotonic()
            share = (self.until - now) * STAGES[stage] / sum(STAGES[name] for name in rest)
            self._stage(stage, now + share)
        for stage in wanted:
            if self.left(stage):
                self._stage(stage, self.until)

    def _stage(self, stage: str, until: float) -> None:
        said = False
        while pieces := [piece for piece in self.left(stage) if (stage, piece.id) not in self._tried]:
            if until - time.monotonic() < LEAST_S or all(piece.again for piece in pieces):
                return
            if not said:
                said = True
                self.console.line(f"\n{stage}, {len(pieces)} pieces:")
            begun = self._process(stage, pieces, until)
            ended = {name for name in begun if not self._piece(pieces, name).again}
            if not ended:
                return
            # What failed is tried again in another call.
            failed = {name for name in ended if self.results.piece(stage, name)["how"] == "failed"}
            self._tried |= {(stage, name) for name in failed}

    @staticmethod
    def _piece(pieces: Sequence[Piece], name: str) -> Piece:
        return next(piece for piece in pieces if piece.id == name)

    def _process(self, stage: str, pieces: Sequence[Piece], until: float) -> set[str]:
        """One process; gives the pieces that it began."""
        task = Task(
            stage,
            [piece.id for piece in pieces],
            until - time.monotonic(),
            str(self.out),
            self.rehearse,
            self.results.document["environment"]["source_hash"],
        )
        env = {"DLGPU_BACKEND": None}
        if self.rehearse:
            env = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DLGPU_BACKEND": "triton"}  # type: ignore[dict-item]
        text = json.dumps(dataclasses.asdict(task))
        began: dict[str, float] = {}
        now: set[str] = set()
        with Lines(module_command("stages"), child_environment(**env), self.log, text) as process:
            while True:
                limits = {name: began[name] + self._piece(pieces, name).limit_s for name in now}
                deadline = min([until, *limits.values()])
                try:
                    line = next(process.until(deadline), None)
                except TimeoutError:
                    late = [name for name in now if limits[name] <= time.monotonic()]
                    for name in late:
                        self._fail(
                            stage, name, began[name], f"no end after {limits[name] - began[name]:.0f} s"
                        )
                    for name in now - set(late):
                        self._end(stage, name, began[name], "left")
                    return set(began)
                if line is None:
                    break
                event = json.loads(line)
                if "begin" in event:
                    name = event["begin"]
                    began[name] = time.monotonic()
                    now.add(name)
                    if not self._piece(pieces, name).again:
                        self.results.drop(stage, name)
                    self.results.piece(stage, name)["how"] = "begun"
                    self.console.status(f"{stage}: {name}", self._share())
                elif "row" in event:
                    row = {**event["row"], "stage": stage, "piece": event["piece"]}
                    self.results.add(row)
                    self.console.row(row)
                elif "amend" in event:
                    self.results.amend(event["stage"], event["amend"], event["values"])
                else:
                    now.discard(event["end"])
                    self._end(stage, event["end"], began[event["end"]], event["how"])
            status = process.status
        for name in now:
            self._fail(stage, name, began[name], f"its process ended with status {status}")
        if not began and status:
            title = f"the stage {stage}"
            message = f"its process ended with status {status} before it began"
            self._add(stage, title, {"kind": "error", "title": title, "message": message})
        return set(began)

    def _share(self) -> float:
        pieces = [p["how"] for found in self.results.document["pieces"].values() for p in found.values()]
        return sum(how == "done" for how in pieces) / max(len(pieces), 1)

    def _add(self, stage: str, piece: str, row: Row) -> None:
        row = {"section": "gpu" if stage == "bench" else stage, **row, "stage": stage, "piece": piece}
        self.results.add(row)
        self.console.row(row)

    def _fail(self, stage: str, name: str, began: float, message: str) -> None:
        self._add(stage, name, {"kind": "error", "title": name, "message": message})
        self._end(stage, name, began, "failed")

    def _end(self, stage: str, name: str, began: float, how: str) -> None:
        piece = self.results.piece(stage, name)
        piece["how"] = how
        piece["tries"] += how == "failed"
        piece["seconds"] = round(piece["seconds"] + time.monotonic() - began, 1)
        self.results.save()


def status_of(rows: Sequence[Row]) -> int:
    """3 where results were wrong, 2 where something failed, else 0; a goal that was missed is none of these."""
    wrong = any(
        row["kind"] in ("wrong", "impossible") or (row["kind"] in ("tests", "checker") and _bad(row))
        for row in rows
    )
    return 3 if wrong else 2 if any(row["kind"] == "error" for row in rows) else 0


def _bad(row: Row) -> bool:
    return bool(row.get("failed") or row.get("errors"))


def _epilogue(runner: Runner, wanted: Sequence[str]) -> str:
    left = {stage: len(runner.left(stage)) for stage in wanted}
    parts = ", ".join(f"{stage} {count}" for stage, count in left.items() if count)
    if parts:
        return f"Pieces left: {parts}. The same command goes on with them."
    return "Nothing is left of these stages."


@click.command("gpu")
@click.option(
    "--stage",
    "wanted",
    type=Names(STAGES),
    default=tuple(STAGES),
    metavar="NAME,...",
    help=f"Of {','.join(STAGES)}; default: all of them.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench-results/gpu"),
    metavar="DIR",
    show_default=True,
    help="Where results go, and what is there is gone on with.",
)
@click.option(
    "--minutes",
    type=Amount(min=0, min_open=True, max=1e4),
    default=MINUTES,
    show_default=True,
    help="It ends before that; all of it takes three calls of 9.",
)
@click.option(
    "--rehearse", is_flag=True, help="Without a GPU: the same code at tiny sizes; its numbers say nothing."
)
@click.pass_context
def command(
    context: click.Context, wanted: tuple[str, ...], out: Path, minutes: float, rehearse: bool
) -> int:
    """All that needs an NVIDIA GPU: the tests there, the vendor's checkers, tuned tiles, timings, counters.

    It takes this machine's own Python and packages, needs no network, and can be ended and called again at any time: what
    was measured is kept, and not measured again.
    """
    began = time.monotonic()
    gpu = None if rehearse else find_gpu()
    if gpu is None and not rehearse:
        raise UsageError("gpu: no NVIDIA GPU was found here (--rehearse runs the same code without one)")
    device, why = choose_device("cpu" if rehearse else "cuda", gpu)
    environment = describe(device, "a rehearsal" if rehearse else why, gpu)
    arguments = {"suite": "gpu", "device": device, "stages": list(wanted), "minutes": minutes, "seed": 0}
    console = Console()
    console.line(header(environment))
    with _ended_politely():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write results into {out}: {error.strerror}") from error
        results = Kept(out, arguments, environment, rehearse)
        first = len(results.rows)
        if first:
            console.line(f"Going on with {first} rows of earlier calls in {results.json_path}")
        try:
            log = (out / "gpu.log").open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {out / 'gpu.log'}: {error.strerror}") from error
        seconds = REHEARSAL_S if rehearse else minutes * 60
        with log:
            margin = min(MARGIN_S, seconds / 10)
            runner = Runner(results, console, out, began + seconds - margin, rehearse, log)
            try:
                with console.progress():
                    runner.run([stage for stage in STAGES if stage in wanted])
            except KeyboardInterrupt:
                results.finish("interrupted")
                console.line(f"\nInterrupted: {len(results.rows)} rows are kept in {results.json_path}")
                return 130
            except BaseException:
                results.finish("failed")
                raise
    status = status_of(results.rows)
    left = any(runner.left(stage) for stage in wanted)
    results.finish("failed" if status else "interrupted" if left else "complete")
    console.line("\n" + _epilogue(runner, wanted))
    console.line(f"Results: {results.json_path} and {results.markdown_path}")
    return 2 if rehearse and left and not status else status
