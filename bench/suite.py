"""The quick suite: which comparisons run, in which order, and how the time budget is shared among them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dlgpu.kernels.activations import ACTIVATIONS

from . import byte_model, digits, interpreted
from .environment import Others, UsageError, choose_device, describe, find_gpu, header
from .harness import CpuTimer, Stop, Timer, paired
from .providers import (
    PROVIDERS,
    Case,
    Provider,
    adam,
    cross_entropy,
    linear,
    mlp_shapes,
    training_step,
    verify,
)
from .report import Console, Results, timing_row

__all__ = ["SECTIONS", "Context", "Job", "command", "gpu", "plan", "run"]

Row = dict[str, Any]
SECTIONS = ("header", "digits", "ops", "bytes", "ceilings", "gpu")

KERNEL_STEPS = 10
# Of the time that is left: 30 epochs take seconds, but on a busy machine threads wait for one another, and take a minute.
TRAINING_SHARE = 0.3
# The length of the loss curve whose distance from float64's is told.
CURVE_STEPS = 100
# At least this much of what is left is for timing.
TIMING_SHARE = 0.3
# Below this a share of the budget measures nothing.
LEAST_SHARE_S = 0.05


@dataclasses.dataclass
class Context:
    """What the jobs share."""

    device: str
    seed: int
    console: Console
    rows: list[Row]
    # Laws of the models that have some, from the job that derives them.
    laws: dict[str, list[byte_model.Law]] = dataclasses.field(default_factory=dict)
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


def host_timer(device: str) -> Timer:
    """Seconds as the caller of the library sees them, launches included."""
    return CpuTimer(synchronize=torch.cuda.synchronize if device == "cuda" else None)


def compare(
    context: Context,
    section: str,
    case: Case,
    a: Provider,
    b: Provider,
    share: float,
    timer: Timer | None = None,
) -> Iterator[Row]:
    """Verifies both providers and times `a` against `b`; a wrong one is reported and not timed."""
    calls = []
    for provider in (a, b):
        right, call = verify(case, provider, context.device, context.seed)
        if not right.right:
            yield wrong_row(section, case.title, provider.name, right.detail)
            return
        calls.append(call)
    yield time_calls(context, section, case, (a, b), calls, share, timer)


def time_calls(
    context: Context,
    section: str,
    case: Case,
    providers: tuple[Provider, Provider],
    calls: Sequence[Callable[[], object]],
    share: float,
    timer: Timer | None = None,
) -> Row:
    """The timing row of two calls, the first against the second."""
    others = Others()
    result = paired(
        *calls,
        stop=Stop(budget_s=share),
        timer=timer or host_timer(context.device),
        seed=context.seed,
        progress=lambda pairs, part: context.progress(part),
    )
    a, b = providers
    return timing_row(section, case, a.name, b.name, context.device, result, others.cores())


def wrong_row(section: str, title: str, provider: str, detail: str) -> Row:
    """The row of a provider whose results were wrong, and so was not timed."""
    return {"section": section, "kind": "wrong", "title": title, "provider": provider, "detail": detail}


def _train(context: Context, share: float) -> Iterator[Row]:
    data = digits.load()
    a, b = (
        digits.Trainer(PROVIDERS[name], data, context.seed, context.device) for name in ("dlgpu", "torch")
    )
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
        "b": "torch",
        "epochs": done.epochs,
        "batch": digits.BATCH,
        "seed": context.seed,
        "device": context.device,
        **{name: list(getattr(done, name)) for name in ("losses_a", "losses_b")},
        **{name: getattr(done, name) for name in ("accuracy_a", "accuracy_b")},
    }
    exact = digits.Trainer(PROVIDERS["torch"], data, context.seed, context.device, torch.float64)
    curve = list(digits.losses(exact, CURVE_STEPS, context.seed))
    yield {
        "section": "digits",
        "kind": "float64",
        "a": "dlgpu",
        "b": "torch",
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
        context.console.line(
            f"  step {step + 1:>2}: loss {result['loss']:.6f} the kernels, interpreted; "
            f"{training['losses_a'][step]:.6f} dlgpu, {training['losses_b'][step]:.6f} torch"
        )
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
    for name in ("dlgpu", "torch"):
        trainer = digits.Trainer(PROVIDERS[name], data, context.seed, context.device)
        order = digits.batches(len(data.train_x), 1, context.seed)
        rows = itertools.cycle([trainer.rows(index) for index in order if len(index) == digits.BATCH])
        calls.append(lambda trainer=trainer, rows=rows: trainer.step(*next(rows)))
    case = dataclasses.replace(training_step(digits.SIZES, digits.BATCH), note="digits")
    yield time_calls(context, "digits", case, (PROVIDERS["dlgpu"], PROVIDERS["torch"]), calls, share)


def _digits_jobs() -> list[Job]:
    return [
        Job("digits", "training on the digits", _train, fixed_s=4),
        Job("digits", "the kernels on the digits, in Triton's interpreter", _interpreted_training, fixed_s=9),
        Job("digits", "a training step on the digits", _time_training, weight=1),
    ]


def cpu_cases() -> list[tuple[Case, float]]:
    """What is compared on a CPU, each with the weight of its budget."""
    return [
        *((linear(256, 512, 784, name), 0.7) for name in ACTIVATIONS),
        *((linear(1024, 1024, 1024, name), 1.2) for name in ("relu", "gelu")),
        (cross_entropy(1024, 1000), 0.7),
        (cross_entropy(64, 128256), 1.2),
        (adam([(4_000_000,)], note="one tensor"), 0.7),
        (adam(mlp_shapes(digits.SIZES), note="digits network"), 0.7),
        (training_step((64, 256, 256, 10), 64), 1),
        (training_step((784, 512, 512, 10), 256), 1.5),
        (training_step((1024, 1024, 1024, 1000), 1024), 2.5),
    ]


def _op_jobs() -> list[Job]:
    def job(case: Case, weight: float) -> Job:
        a, b = PROVIDERS["dlgpu"], PROVIDERS["torch"]
        return Job(
            "ops", case.title, lambda context, share: compare(context, "ops", case, a, b, share), weight
        )

    return [job(case, weight) for case, weight in cpu_cases()]


def _count(context: Context, share: float) -> Iterator[Row]:
    headlines = byte_model.headlines()
    for done, result in enumerate(interpreted.run("bytes", *(h.model for h in headlines))):
        headline = headlines[done]
        context.progress((done + 1) / len(headlines))
        model = byte_model.MODELS[headline.model]
        if "error" in result:
            title = f"{model.op} {model.passes}"
            yield {"section": "bytes", "kind": "error", "title": title, "message": result["error"]}
            continue
        laws = [byte_model.Law(**law) for law in result["laws"]]
        context.laws[headline.model] = laws
        yield {
            "section": "bytes",
            "kind": "count",
            "op": model.op,
            "passes": model.passes,
            "shape": dict(headline.shape),
            "dtype": str(model.dtype).removeprefix("torch."),
            "launches": sum(law.quantity == "compulsory" for law in laws),
            "compulsory_bytes": byte_model.total(model, laws, headline.shape),
            "requested_bytes": byte_model.total(model, laws, headline.shape, "requested"),
            "unfused_bytes": headline.unfused(),
            "laws": result["laws"],
            "fitted_on": [dict(shape) for shape in model.fitted_on],
            "held_out": [dict(shape) for shape in model.held_out],
        }


def plan(device: str, only: tuple[str, ...] = ()) -> list[Job]:
    """The jobs for a device, those of `only` if it names sections."""
    counting = Job("bytes", "metering the kernels in Triton's interpreter", _count, fixed_s=11)
    if device == "cuda":
        from .gpu import gpu_jobs

        # The counts first: they turn times into bandwidths.
        jobs = [*_digits_jobs(), counting, *gpu_jobs()]
    else:
        jobs = [*_digits_jobs(), *_op_jobs(), counting]
    return [job for job in jobs if not only or job.section in only]


def run(jobs: list[Job], context: Context, results: Results, budget_s: float, debug: bool = False) -> None:
    """Runs the jobs until the budget is spent, showing and saving each row as it is made.

    What an unexpected error stops is that job: it becomes a row.
    """
    clock = time.monotonic
    start, section = clock(), ""
    for i, job in enumerate(jobs):
        if job.section != section:
            section = job.section
            context.console.section(section, _main_kind(section))
        left = budget_s - (clock() - start)
        rest = jobs[i:]
        # Under a short budget the fixed parts at the end are what is left out.
        for_timing = max(left - sum(other.fixed_s for other in rest), TIMING_SHARE * left)
        share = for_timing * job.weight / sum(other.weight for other in rest) if job.weight else left

        def progress(part: float, i: int = i, job: Job = job) -> None:
            context.console.status(f"{i + 1}/{len(jobs)} {job.title}", (i + part) / len(jobs))

        context.progress = progress
        progress(0.0)
        for row in _rows(job, context, left, share, debug):
            results.add(row)
            context.console.row(row)


def _rows(job: Job, context: Context, left: float, share: float, debug: bool) -> Iterator[Row]:
    about = {"section": job.section, "title": job.title}
    if left <= 0 or share < LEAST_SHARE_S:
        yield {**about, "kind": "skipped", "reason": "the time budget is spent (--budget)"}
        return
    try:
        yield from job.run(context, share)
    except ImportError as error:
        yield {**about, "kind": "skipped", "reason": f"{error.name or error} is not installed"}
    except Exception as error:
        if debug:
            raise
        first_line = (str(error).strip().splitlines() or [""])[0]
        yield {**about, "kind": "error", "message": f"{type(error).__name__}: {first_line}"[:500]}


def _main_kind(section: str) -> str | None:
    return {"ops": "timing", "gpu": "timing", "bytes": "count", "ceilings": "ceiling"}.get(section)


DEFAULT_BUDGET_S = 150.0
QUICK_BUDGET_S = 60.0
SEED = 0


def _options(function: Callable[..., int]) -> Callable[..., int]:
    for option in (
        click.option(
            "--only", multiple=True, type=click.Choice(SECTIONS), help="Only this section; may be given again."
        ),
        click.option("--quick", is_flag=True, help=f"The same as --budget {QUICK_BUDGET_S:.0f}."),
        click.option(
            "--budget",
            type=click.FloatRange(min=0, min_open=True, max=1e6),
            metavar="SECONDS",
            help=f"About how long it may take; default: {DEFAULT_BUDGET_S:.0f}.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=Path("bench-results"),
            metavar="DIR",
            show_default=True,
            help="Where results go.",
        ),
        click.option(
            "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True, help="On what."
        ),
    ):
        function = option(function)
    return function


@click.command("quick")
@_options
@click.pass_context
def command(context: click.Context, **options: Any) -> int:
    """What this machine can tell in 3 minutes, then the report.

    On a CPU: the NumPy fallback against torch, and the bytes that a GPU would move. On an NVIDIA GPU: the fused kernels'
    throughput against the unfused.
    """
    return _benchmark("quick", context, **options)


@click.command("gpu")
@_options
@click.pass_context
def gpu(context: click.Context, **options: Any) -> int:
    """Only what needs an NVIDIA GPU: its ceilings, and fused against unfused throughput."""
    return _benchmark("gpu", context, **options)


def _benchmark(
    suite: str, click_context: click.Context, device: str, out: Path, budget: float | None, quick: bool, only: Sequence[str]
) -> int:
    console = Console()
    found = find_gpu()
    sections = tuple(only) or (("ceilings", "gpu") if suite == "gpu" else ())
    wanted = "cuda" if suite == "gpu" and device == "auto" else device
    device, why = choose_device(wanted, found)
    if device == "cpu" and (needs := {"ceilings", "gpu"} & set(sections)):
        raise UsageError(
            f"--only {sorted(needs)[0]}: that section needs an NVIDIA GPU, and the device is the CPU"
        )
    environment = describe(device, why, found)
    console.line(header(environment))
    budget_s = budget or (QUICK_BUDGET_S if quick else DEFAULT_BUDGET_S)
    arguments = {"suite": suite, "device": device, "budget_s": budget_s, "only": list(sections), "seed": SEED}
    results = Results(out, arguments, environment)
    context = Context(device, SEED, console, results.rows)
    traceback = bool((click_context.obj or {}).get("traceback"))
    try:
        with console.progress():
            run(plan(device, sections), context, results, budget_s, traceback)
    except KeyboardInterrupt:
        results.finish("interrupted")
        console.line(f"\nInterrupted: {len(results.rows)} rows are kept in {results.json_path}")
        return 130
    except UsageError:
        raise
    except BaseException:
        results.finish("failed")
        raise
    return _finish(console, results)


def _finish(console: Console, results: Results) -> int:
    kinds = [row["kind"] for row in results.rows]
    status = 3 if "wrong" in kinds else 2 if "error" in kinds else 0
    results.finish("failed" if status else "complete")
    if any(row.get("crowded") for row in results.rows):
        console.line("\nOther work kept the cores busy: in rows that say so, the times are the scheduler's.")
    console.line(f"\nResults: {results.json_path} and {results.markdown_path}")
    return status
