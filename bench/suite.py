"""Jobs under a time budget: what each takes of it, and what becomes of its rows. And the quick suite, made of them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from dlgpu.kernels import configs

from . import ceilings, digits, interpreted, tables
from .cases import BOTH, FORWARD, OPS, STEP
from .cases._base import NotOffered
from .cli import Amount
from .environment import Others, UsageError, choose_device, crowded, describe, find_gpu, header, one_line
from .harness import Stop, Timer, paired
from .measure import Case, measure
from .providers import BOUNDS, function
from .report import Console, Results, timing_row
from .timers import timer_for

__all__ = [
    "SECTIONS",
    "Context",
    "Job",
    "Rivals",
    "command",
    "compare",
    "counted",
    "default_passes",
    "default_shape",
    "execute",
    "measured_ceilings",
    "metering",
    "plan",
    "run",
]

Row = dict[str, Any]
Rivals = Sequence[str]
SECTIONS = ("header", "ceilings", "digits", "ops", "model", "gpu")

KERNEL_STEPS = 5
# Of the time that is left: 30 epochs take seconds, but on a busy machine threads wait for one another, and take a minute.
TRAINING_SHARE = 0.3
# The most that each ceiling takes of the time there is for all of them.
CEILING_SHARE = 0.08
# The length of the loss curve whose distance from float64's is told.
CURVE_STEPS = 100
# At least this much of what is left is for timing.
TIMING_SHARE = 0.3
# Below this a share of the budget measures nothing.
LEAST_SHARE_S = 0.05
# More than this tells nothing new on a quiet machine, and on another it does not help.
MOST_SHARE_S = 8.0
LATE = "the time budget is spent (--budget)"
# Elements of inputs and results, in bytes, while float64's truth and copies of it are held beside them.
VERIFIED_BYTES = 40


@dataclasses.dataclass
class Context:
    """What the jobs share."""

    device: str
    seed: int
    console: Console
    rows: list[Row]
    # Op -> what its kernels move, for those that were metered.
    laws: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: Callable[[float], None] = lambda share: None


@dataclasses.dataclass(frozen=True)
class Job:
    """Some rows of a section.

    run: (context, seconds) -> rows; the seconds are its share of the time left for timing, or all that is left where
        it takes no timings.
    weight: its part of the time left for timing, against the other jobs' weights; 0 if it takes no timings.
    fixed_s: what it takes beside that, about, on two cores.
    """

    section: str
    title: str
    run: Callable[[Context, float], Iterator[Row]]
    weight: float = 0.0
    fixed_s: float = 0.0


def default_shape(op: str, device: str) -> str:
    """The name of the shape that is measured where none is asked for: of those for a GPU the first on one, where there is
    one."""
    names = list(OPS[op].shapes)
    return (
        next((name for name in names if name.startswith("h200-")), names[0]) if device == "cuda" else names[0]
    )


def default_passes(op: str) -> str:
    """Forward and backward, or the step."""
    return STEP if STEP in OPS[op].passes else BOTH


def compare(
    case: Case,
    rivals: Rivals,
    *,
    ours: str = "dlgpu",
    section: str = "ops",
    timer: tuple[Timer, str, str] | None = None,
    extras: bool = True,
    cold: bool = False,
    weight: float = 1.0,
) -> Job:
    """The job that verifies all on a case and times `ours` against each of the rivals."""

    def rows(context: Context, share: float) -> Iterator[Row]:
        if reason := too_large(case):
            yield {"section": section, "kind": "skipped", "title": case.title, "reason": reason}
            return
        libraries = {name: function(case.described, name) for name in (ours, *rivals)}
        chosen, timer_name, cache = timer or timer_for(case.device)
        known: Row = {}
        if ours == "dlgpu":
            known = {**counted(case, context.laws.get(case.op)), "config": cpu_config(case)}
        try:
            for row in measure(
                case,
                libraries,
                section=section,
                stop=Stop(budget_s=share),
                timer=chosen,
                timer_name=timer_name,
                cache=cache,
                seed=context.seed,
                best=limits(context.rows),
                extras=extras,
                cold=cold,
                progress=context.progress,
                **known,
            ):
                if row.get("b") in BOUNDS:
                    row["note"] = "against its products alone"
                yield row
        except torch.OutOfMemoryError:
            reason = "the GPU has not the memory to hold it to float64"
            yield {"section": section, "kind": "skipped", "title": case.title, "reason": reason}
        finally:
            if case.device == "cuda":
                # Not left to the next job, which may need the memory.
                torch.cuda.empty_cache()

    return Job(section, case.title, rows, weight=weight, fixed_s=1.5 if case.device == "cpu" else 5.0)


def cpu_config(case: Case) -> str | None:
    """What dlgpu itself runs on a CPU, where it takes torch's own functions if those are ahead of NumPy: "torch", "NumPy" or
    "both"."""
    if case.device != "cpu":
        return None
    chosen: dict[str, None] = {}
    rule = configs.cpu_backend

    def recorded(*args: Any) -> str:
        backend: str = rule(*args)
        chosen["torch" if backend == "torch" else "NumPy"] = None
        return backend

    with mock.patch.object(configs, "cpu_backend", recorded):
        case.bind(case.described.functions["dlgpu"], 0)()
    return "both" if len(chosen) > 1 else next(iter(chosen), None)


def too_large(case: Case) -> str | None:
    """Why a case would not fit into this machine's memory, as far as it can be told. On a GPU trying it does no harm."""
    available = _available_bytes()
    if case.device != "cpu" or available is None:
        return None
    if case.passes == STEP:
        # Gradients and states too.
        numel = 4 * sum(x.numel() for x in case.without_memory("eager")().tensors())
    else:
        bound = dataclasses.replace(case, passes=FORWARD).without_memory("eager")()
        numel = sum(x.numel() for x in [*bound.tensors(), *bound()])
    needed = VERIFIED_BYTES * numel
    if needed <= available:
        return None
    return f"it would take about {needed / 1e9:.0f} GB of memory to hold it to float64, and {available / 1e9:.0f} are free"


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _train(context: Context, share: float) -> Iterator[Row]:
    data = digits.load()
    a, b = (digits.Trainer(name, data, context.seed, context.device) for name in ("dlgpu", "eager"))
    context.console.line(f"  {len(data.train_x)} digits to learn from, {len(data.test_x)} held out")

    until = time.monotonic() + TRAINING_SHARE * share

    def epoch_done(epoch: int, loss_a: float, loss_b: float) -> bool:
        context.progress(epoch / digits.EPOCHS)
        if epoch in (1, 2, 5) or epoch % 10 == 0:
            context.console.line(f"  epoch {epoch:>2}: mean loss {loss_a:.6f} dlgpu, {loss_b:.6f} torch")
        return time.monotonic() > until

    done = digits.side_by_side(a, b, digits.EPOCHS, context.seed, epoch_done)
    yield {
        "section": "digits",
        "kind": "training",
        "a": "dlgpu",
        "b": "eager",
        "epochs": done.epochs,
        "batch": digits.BATCH,
        "seed": context.seed,
        "device": context.device,
        **{name: list(getattr(done, name)) for name in ("losses_a", "losses_b")},
        **{name: getattr(done, name) for name in ("accuracy_a", "accuracy_b")},
    }
    exact = digits.Trainer("eager", data, context.seed, context.device, torch.float64)
    curve = list(digits.losses(exact, CURVE_STEPS, context.seed))
    yield {
        "section": "digits",
        "kind": "float64",
        "a": "dlgpu",
        "b": "eager",
        "steps": CURVE_STEPS,
        "distance_a": largest_difference(curve, done.losses_a),
        "distance_b": largest_difference(curve, done.losses_b),
    }


def largest_difference(short: Any, long: Any) -> float:
    """Between two loss curves, as far as the shorter one goes."""
    return max(abs(x - y) for x, y in zip(short, long, strict=False))


def _interpreted_training(context: Context, share: float) -> Iterator[Row]:
    training = next((row for row in context.rows if row["kind"] == "training"), None)
    if training is None:
        yield {
            "section": "digits",
            "kind": "skipped",
            "title": "the kernels",
            "reason": "there is no training to compare",
        }
        return
    found = []
    for step, result in enumerate(interpreted.run("digits", str(KERNEL_STEPS), str(context.seed))):
        found.append(result["loss"])
        context.progress((step + 1) / KERNEL_STEPS)
    yield {
        "section": "digits",
        "kind": "kernels",
        "losses": found,
        "max_difference": largest_difference(found, training["losses_b"]),
    }


def _time_training(context: Context, share: float) -> Iterator[Row]:
    """A step of each on the same real batches, over and over."""
    data = digits.load()
    calls = []
    for name in ("dlgpu", "eager"):
        trainer = digits.Trainer(name, data, context.seed, context.device)
        order = digits.batches(len(data.train_x), 1, context.seed)
        rows = itertools.cycle([trainer.rows(index) for index in order if len(index) == digits.BATCH])
        calls.append(lambda trainer=trainer, rows=rows: trainer.step(*next(rows)))
    op = OPS["training_step"]
    case = Case(op, op.shapes["digits"], STEP, device=context.device, note="real digits")
    others = Others()
    # As the caller sees it, launches included.
    timer, timer_name, cache = timer_for(
        context.device, "host", "hot" if context.device == "cuda" else "host"
    )
    result = paired(
        *calls,
        stop=Stop(budget_s=share),
        timer=timer,
        seed=context.seed,
        progress=lambda pairs, part: context.progress(part),
    )
    more = {"timer": timer_name, "cache": cache}
    yield timing_row("digits", case, "dlgpu", "eager", context.device, result, others.cores(), **more)


def _digits_jobs() -> list[Job]:
    kernels = "the kernels on the digits, in Triton's interpreter"
    return [
        Job("digits", "training on the digits", _train, fixed_s=4),
        Job("digits", "a training step on the digits", _time_training, weight=1),
        Job("digits", kernels, _interpreted_training, fixed_s=12),
    ]


def measured_ceilings(device: str, dtypes: Iterable[torch.dtype] | None = None) -> Job:
    """The job that lets the rows after it be held to what this machine reaches: their plots, and `measure.impossible`.

    dtypes: of the products; the device's unless given.
    """
    most = 0.3 if device == "cpu" else 1.0

    def rows(context: Context, share: float) -> Iterator[Row]:
        others = Others()
        for row in ceilings.ceilings(device, min(most, CEILING_SHARE * share), dtypes):
            cores, others = others.cores(), Others()
            yield {**row, "others": cores, "crowded": crowded(cores)}

    return Job("ceilings", "what this machine reaches", rows, fixed_s=4 if device == "cpu" else 10)


def limits(rows: Sequence[Row]) -> dict[str, float]:
    """What times are held to: the ceilings that were measured undisturbed."""
    found = ceilings.best(row for row in rows if not row.get("crowded"))
    copies = [found[name] for name in (ceilings.COPY, ceilings.CACHED_COPY) if name in found]
    if len(copies) == 1:
        # Without both there is no telling how fast a copy can be.
        found = {name: value for name, value in found.items() if value not in copies}
    elif copies:
        found[ceilings.CACHED_COPY] = max(copies)
    return found


# What the quick suite says of a GPU that is not here: an op of each kind, since metering them all takes a minute.
_MODELLED = ("linear", "cross_entropy", "batch_norm", "adam")


def _model(context: Context, share: float) -> Iterator[Row]:
    from . import gpus, model

    settings = model.Settings(inductor=False, crossover=None)
    for done, row in enumerate(model.rows(_MODELLED, [gpus.find("h200")], settings)):
        context.progress((done + 1) / len(_MODELLED))
        yield row


def metering(ops: Sequence[str], section: str = "gpu") -> Job:
    """The job that lets the rows after it say how many bytes the kernels move."""

    def rows(context: Context, share: float) -> Iterator[Row]:
        from .model import laws_of

        for done, (name, laws) in enumerate(laws_of(ops)):
            context.progress((done + 1) / len(ops))
            if isinstance(laws, str):
                yield {"section": section, "kind": "skipped", "title": f"bytes of {name}", "reason": laws}
            else:
                context.laws[name] = laws

    return Job(section, "metering the kernels in Triton's interpreter", rows, fixed_s=3.0 * len(ops))


def counted(case: Case, laws: Any, limits: Any = None) -> Row:
    """What a timing row says of the bytes: those that ours must move, and torch's operations one by one.

    Args:
        laws: of the op; None says nothing.
        limits: of the device (`_triton.device_limits`); of this one if None.
    """
    from dlgpu.kernels import _triton

    from .launches import Record, dry_run
    from .laws import LawError
    from .unfused import operations

    if laws is None:
        return {}
    limits = limits or _triton.device_limits(torch.device("cuda", torch.cuda.current_device()))
    warm = case.passes == STEP
    try:
        ours = dry_run(case.without_memory("dlgpu"), limits, warm=warm)
        nbytes = sum(
            laws(step).compulsory if isinstance(step, Record) else step.read + step.written for step in ours
        )
    except LawError:
        return {}
    theirs = operations(case.without_memory("eager"), warm=warm)
    return {
        "compulsory_bytes": nbytes,
        "unfused_bytes": sum(row.read + row.written for row in theirs),
        "launches_a": len(ours),
        "unfused_launches": len(theirs),
    }


# Name of the op -> further shapes that the quick suite measures on a CPU, and the weights of all its shapes' budgets.
_CPU_MORE: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("vocabulary",),
    "adam": ("digits",),
    "training_step": ("mlp",),
}


def _op_jobs() -> list[Job]:
    return [
        compare(Case(op, op.shapes[shape], default_passes(op.name)), ("eager",), extras=False)
        for op in OPS.values()
        for shape in (default_shape(op.name, "cpu"), *_CPU_MORE.get(op.name, ()))
    ]


def plan(device: str, only: Sequence[str] = ()) -> list[Job]:
    """The jobs for a device, those of `only` if it names sections."""
    jobs = [measured_ceilings(device), *_digits_jobs()]
    if device == "cuda":
        from .gpu import target_jobs

        jobs += target_jobs()
    else:
        jobs += [*_op_jobs(), Job("model", "what a GPU could do at most", _model, fixed_s=25)]
    return [job for job in jobs if not only or job.section in only]


def run(
    jobs: Sequence[Job],
    context: Context,
    results: Results,
    budget_s: float,
    debug: bool = False,
    most_s: float | None = None,
) -> None:
    """Runs the jobs until the budget is spent, showing and saving each row as it is made; a job that takes timings has
    `most_s` at most.

    What an unexpected error stops is that job: it becomes a row.
    """
    clock = time.monotonic
    start, section = clock(), ""
    late: list[str] = []
    for i, job in enumerate(jobs):
        if job.section != section:
            _say_late(context.console, late)
            section = job.section
            context.console.section(section, _main_kind(section))
        left = budget_s - (clock() - start)
        rest = jobs[i:]
        # A busy machine takes its time for timings; what any machine can tell keeps its own, where the budget has room.
        kept = sum(other.fixed_s for other in rest if not other.weight)
        if job.weight and left < kept < budget_s / 2:
            left = 0.0
        # Under a short budget the fixed parts at the end are what is left out.
        for_timing = max(left - sum(other.fixed_s for other in rest), TIMING_SHARE * left)
        share = for_timing * job.weight / sum(other.weight for other in rest) if job.weight else left
        if job.weight and most_s:
            share = min(share, most_s)

        def progress(part: float, i: int = i, job: Job = job) -> None:
            context.console.status(f"{i + 1}/{len(jobs)} {job.title}", (i + part) / len(jobs))

        context.progress = progress
        progress(0.0)
        for row in _rows(job, context, left, share, debug):
            results.add(row)
            if row.get("reason") == LATE:
                late.append(job.title)
            else:
                context.console.row(row)
    _say_late(context.console, late)


def _say_late(console: Console, late: list[str]) -> None:
    """In a line what there was no time for."""
    if late:
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        console.line(f"  skipped: {late[0]}{more}: {LATE}")
        late.clear()


def _rows(job: Job, context: Context, left: float, share: float, debug: bool) -> Iterator[Row]:
    about = {"section": job.section, "title": job.title}
    if left <= 0 or share < LEAST_SHARE_S:
        yield {**about, "kind": "skipped", "reason": LATE}
        return
    try:
        yield from job.run(context, share)
    except ImportError as error:
        yield {**about, "kind": "skipped", "reason": f"{error.name or error} is not installed"}
    except NotOffered as error:
        yield {**about, "kind": "skipped", "reason": str(error)}
    except Exception as error:
        if debug:
            raise
        yield {**about, "kind": "error", "message": one_line(error)}


def _main_kind(section: str) -> str | None:
    kinds = {"ops": "timing", "gpu": "timing", "run": "timing", "model": "model", "ceilings": "ceiling"}
    return kinds.get(section)


def execute(
    jobs: list[Job],
    out: Path,
    arguments: dict[str, Any],
    environment: dict[str, Any],
    *,
    budget_s: float,
    seed: int,
    debug: bool = False,
    before: Sequence[Row] = (),
    first: Sequence[Job] = (),
    most_s: float | None = None,
) -> int:
    """Runs jobs into a results file and onto the terminal; gives the exit status.

    Args:
        before: rows that are known already, such as who is absent.
        first: jobs that the others' rows need; what they take is not of the budget.

    Raises:
        UsageError: the results cannot be written.
    """
    console = Console()
    console.line(header(environment))
    results = Results(out, arguments, environment)
    context = Context(environment["device"], seed, console, results.rows)
    try:
        for row in before:
            results.add(row)
            console.row(row)
        with console.progress():
            run(first, context, results, min(budget_s, sum(job.fixed_s for job in first)), debug)
            run(jobs, context, results, budget_s, debug, most_s)
    except KeyboardInterrupt:
        results.finish("interrupted")
        console.line(f"\nInterrupted: {len(results.rows)} rows are kept{_where(results)}")
        return 130
    except BaseException:
        results.finish("failed")
        raise
    return _finish(console, results)


def _where(results: Results) -> str:
    return "" if results.lost else f" in {results.json_path}"


def _finish(console: Console, results: Results) -> int:
    kinds = {row["kind"] for row in results.rows}
    status = 3 if kinds & {"wrong", "impossible"} else 2 if "error" in kinds else 0
    if results.document["arguments"]["suite"] in ("run", "module") and "timing" not in kinds:
        # It was asked for by name.
        status = status or 2
    wanted = results.json_path
    results.finish("failed" if status else "complete")
    if results.lost or results.json_path != wanted:
        # They are not where they were to be.
        status = status or 2
    console.line(f"\n{tables.summary(results.document)}")
    if any(row.get("crowded") for row in results.rows):
        console.line("Other work kept the cores busy: in rows that say so, the times are the scheduler's.")
    if not results.lost:
        console.line(f"Results: {results.json_path} and {results.markdown_path}")
    return status


DEFAULT_BUDGET_S = 140.0
QUICK_BUDGET_S = 60.0
SEED = 0


@click.command("quick")
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True, help="On what."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench-results"),
    metavar="DIR",
    show_default=True,
    help="Where results go: a folder, or a file that ends in .json.",
)
@click.option(
    "--budget",
    type=Amount(min=0, min_open=True, max=1e6),
    metavar="SECONDS",
    help=f"About how long it may take; default: {DEFAULT_BUDGET_S:.0f}.",
)
@click.option("--quick", is_flag=True, help=f"The same as --budget {QUICK_BUDGET_S:.0f}.")
@click.option(
    "--only", multiple=True, type=click.Choice(SECTIONS), help="Only this section; may be given again."
)
@click.pass_context
def command(
    context: click.Context,
    device: str,
    out: Path,
    budget: float | None,
    quick: bool,
    only: Sequence[str],
) -> int:
    """What this machine can tell in 3 minutes, then the report.

    On a CPU: every op against torch, and the bytes that a GPU would move. On an NVIDIA GPU: the fused kernels' throughput
    against the unfused.
    """
    found = find_gpu()
    device, why = choose_device(device, found)
    if device == "cpu" and "gpu" in only:
        raise UsageError("--only gpu: that section needs an NVIDIA GPU, and the device is the CPU")
    budget_s = budget or (QUICK_BUDGET_S if quick else DEFAULT_BUDGET_S)
    arguments = {"suite": "quick", "device": device, "budget_s": budget_s, "only": list(only), "seed": SEED}
    return execute(
        plan(device, only),
        out,
        arguments,
        describe(device, why, found),
        budget_s=budget_s,
        seed=SEED,
        debug=bool((context.obj or {}).get("traceback")),
        most_s=MOST_SHARE_S,
    )
