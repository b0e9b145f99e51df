"""`dlgpu-bench run`: ops, shapes, dtypes, passes and rivals of one's choice, or one's own module."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from .cases import OPS, Op
from .cli import Amount, Names, unknown
from .environment import UsageError, choose_device, describe, find_gpu
from .measure import Case
from .providers import PROVIDERS, absent, offered
from .suite import Job, compare, default_passes, default_shape, execute, measured_ceilings, metering
from .timers import timer_for

__all__ = ["DTYPES", "PASSES", "Plan", "command", "options_of", "planned", "sizes_of"]

Row = dict[str, Any]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PASSES = ("fwd", "bwd", "fwd+bwd", "step")
# Seconds for each case where no budget is given.
CASE_S = 8.0
# Five comparisons, and torch.compile.
MODULE_S = 120.0
LARGEST_SIZE = 1 << 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command line comes to.

    jobs: what is compared.
    rows: those that are known before any job runs.
    first: the jobs that the others' rows need: ceilings, and on a GPU the bytes of the kernels.
    """

    jobs: list[Job]
    rows: list[Row]
    first: list[Job] = dataclasses.field(default_factory=list)


def sizes_of(op: Op, text: str, device: str) -> dict[str, int]:
    """The shape that a name or k=v,... stands for; sizes that are not named are those of the default."""
    if "=" not in text:
        if text not in op.shapes:
            raise unknown(f"shape of {op.name}", text, op.shapes)
        return dict(op.shapes[text])
    found = dict(op.shapes[default_shape(op.name, device)])
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in found:
            raise unknown(f"size of {op.name}", name, found)
        if not value.isdecimal() or not 0 < int(value) < LARGEST_SIZE:
            raise UsageError(f"--shape {text}: {name} must be a positive whole number, got {value!r}")
        found[name] = int(value)
    if "tensors" in found and found["tensors"] > found["n"]:
        raise UsageError(
            f"--shape {text}: {found['tensors']} tensors need as many elements, got n={found['n']}"
        )
    if math.prod(found.values()) >= 1 << 62:
        raise UsageError(f"--shape {text}: no machine holds that")
    return found


def options_of(ops: Sequence[Op], settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Op -> option -> choice. Each k=v must fit one op at least."""
    found: dict[str, dict[str, Any]] = {op.name: {} for op in ops}
    for text in settings:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        having = [op for op in ops if name in op.options]
        if not equals:
            raise UsageError(f"--option {text}: expected K=V, such as activation=relu")
        if not having:
            known = dict.fromkeys(option for op in ops for option in op.options)
            if not known:
                raise UsageError(f"--option {text}: {', '.join(op.name for op in ops)} has no options")
            raise unknown("option", name, known)
        fitting = 0
        for op in having:
            for choice in op.options[name]:
                if str(choice).lower() == value.lower():
                    found[op.name][name] = choice
                    fitting += 1
        if not fitting:
            raise unknown(
                f"value of {name}", value, (str(choice) for op in having for choice in op.options[name])
            )
    return found


def planned(
    names: Sequence[str],
    *,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    passes: Sequence[str] = (),
    rivals: Sequence[str] = ("eager",),
    ours: str = "dlgpu",
    options: Sequence[str] = (),
    device: str = "cpu",
    timer: str = "",
    cache: str = "",
) -> Plan:
    """The jobs that were asked for.

    Raises:
        UsageError: there is no such op, shape, size, dtype, pass, option or provider, or nothing is left to compare.
    """
    for name in names:
        if name not in OPS:
            raise unknown("op", name, OPS)
    ops = [OPS[name] for name in dict.fromkeys(names or OPS)]
    for name in (ours, *rivals):
        if name not in PROVIDERS:
            raise unknown("provider", name, PROVIDERS)
    if ours in rivals:
        raise UsageError(f"{ours} cannot be compared with itself")
    if not names and shapes:
        # Of all ops those that have such a shape.
        known = {shape for op in ops for shape in op.shapes}
        for shape in shapes:
            if "=" in shape:
                raise UsageError(f"--shape {shape}: sizes go with the name of an op")
            if shape not in known:
                raise unknown("shape", shape, sorted(known))
        ops = [op for op in ops if any(shape in op.shapes for shape in shapes)]
    for name in dtypes:
        if name not in DTYPES:
            raise unknown("dtype", name, DTYPES)
    chosen = options_of(ops, options)
    try:
        used = timer_for(device, timer, cache)
    except ValueError as error:
        raise UsageError(str(error)) from None
    missing = {name: why for name in (ours, *rivals) if (why := absent(PROVIDERS[name], device))}
    if ours in missing:
        raise UsageError(f"{ours}: {missing[ours]}")
    rows: list[Row] = [
        {"section": "run", "kind": "absent", "provider": name, "reason": why} for name, why in missing.items()
    ]
    here = [name for name in dict.fromkeys(rivals) if name not in missing]
    if not here:
        raise UsageError(
            f"nobody to compare with: {'; '.join(f'{name}: {why}' for name, why in missing.items())}"
        )
    jobs, cases = [], []
    for op in ops:
        wanted_passes = [p for p in (passes or (default_passes(op.name),)) if p in op.passes]
        if passes and not wanted_passes and len(ops) == 1:
            raise unknown(f"pass of {op.name}", passes[0], op.passes)
        wanted_shapes = [shape for shape in shapes if names or shape in op.shapes]
        for text, dtype, p in itertools.product(
            wanted_shapes or [default_shape(op.name, device)],
            dict.fromkeys(DTYPES[name] for name in dtypes) or op.dtypes[:1],
            wanted_passes,
        ):
            case = Case(op, sizes_of(op, text, device), p, dtype, chosen[op.name], device)
            able = []
            for name in here:
                if reason := offered(op, name, case.options, p):
                    row = {
                        "section": "run",
                        "kind": "skipped",
                        "title": case.title,
                        "reason": f"{name} {reason}",
                    }
                    rows.append(row)
                else:
                    able.append(name)
            if reason := offered(op, ours, case.options, p):
                raise UsageError(f"{ours} {reason}")
            if able:
                cases.append(case)
                jobs.append(compare(case, able, ours=ours, section="run", timer=used, cold=True))
    if not jobs:
        raise UsageError(
            "; ".join(dict.fromkeys(f"{r['title']}: {r['reason']}" for r in rows if "title" in r))
        )
    first = [measured_ceilings(device, tuple(dict.fromkeys(case.dtype for case in cases)))]
    if device == "cuda" and ours == "dlgpu":
        first.append(metering(list(dict.fromkeys(case.op for case in cases)), "run"))
    return Plan(jobs, rows, first)


def _examples(names: Iterable[str]) -> str:
    return ",".join(names)


@click.command("run")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--shape", "shapes", multiple=True, metavar="NAME|K=V,...", help="May be given again.")
@click.option(
    "--dtype", "dtypes", type=Names(DTYPES), default=(), metavar="NAME,...", help="Default: the op's first."
)
@click.option(
    "--pass", "passes", type=Names(PASSES), default=(), metavar="NAME,...", help=f"Of {_examples(PASSES)}."
)
@click.option(
    "--vs",
    "rivals",
    type=Names(PROVIDERS),
    default=("eager",),
    metavar="NAME,...",
    help=f"Against whom, of {_examples(name for name in PROVIDERS if name != 'dlgpu')}; default: eager.",
)
@click.option(
    "--of",
    "ours",
    type=click.Choice(tuple(PROVIDERS)),
    default="dlgpu",
    metavar="NAME",
    help="Who is compared with them, such as fallback; default: dlgpu.",
)
@click.option("--option", "options", multiple=True, metavar="K=V", help="Of the op; may be given again.")
@click.option(
    "--module",
    metavar="PKG:FUNCTION",
    help="Instead of an op: the model that this function makes, as it is, compiled, and with dlgpu's layers.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Of --module: how many steps are trained side by side to see that the losses agree.",
)
@click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Of --module: call the function with batch=N."
)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--cache", type=click.Choice(("cold", "hot")), help="Default: cold on a GPU.")
@click.option("--timer", type=click.Choice(("graph", "events", "host")), help="Default: events on a GPU.")
@click.option(
    "--budget",
    type=Amount(min=0, min_open=True, max=1e6),
    metavar="SECONDS",
    help=f"For all timings together, about; default: {CASE_S:.0f} a case.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench-results"),
    metavar="FILE",
    show_default=True,
    help="Where results go: a file that ends in .json, or a folder.",
)
@click.pass_context
def command(
    context: click.Context,
    ops: tuple[str, ...],
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    passes: tuple[str, ...],
    rivals: tuple[str, ...],
    ours: str,
    options: tuple[str, ...],
    module: str | None,
    steps: int,
    batch: int | None,
    device: str,
    cache: str | None,
    timer: str | None,
    budget: float | None,
    seed: int,
    out: Path,
) -> int:
    """Times ops against others, each held to float64 before and after; all ops where none is named.

    \b
      dlgpu-bench run linear --shape mlp --option activation=relu
      dlgpu-bench run cross_entropy --shape N=8192,V=32000 --dtype bf16 --vs compile,liger
      dlgpu-bench run --of fallback --device cpu
    """
    gpu = find_gpu()
    device, why = choose_device(device, gpu)
    arguments: dict[str, Any] = {"suite": "run", "device": device, "seed": seed}
    debug = bool((context.obj or {}).get("traceback"))
    if module is not None:
        if ops or shapes or options or passes:
            raise UsageError("--module measures a model: it takes no ops, shapes, options or passes")
        from .module import jobs as module_jobs

        jobs = module_jobs(
            module,
            device=device,
            dtypes=[DTYPES[name] for name in dtypes],
            seed=seed,
            steps=steps,
            batch=batch,
        )
        plan = Plan(jobs, [])
        # A module's own name stays out of the file, unlike what was asked of it.
        arguments["suite"] = "module"
    elif batch is not None:
        raise UsageError("--batch goes with --module; an op's sizes with --shape")
    else:
        plan = planned(
            ops,
            shapes=shapes,
            dtypes=dtypes,
            passes=passes,
            rivals=rivals,
            ours=ours,
            options=options,
            device=device,
            timer=timer or "",
            cache=cache or "",
        )
        arguments |= {"ops": list(ops), "vs": list(rivals), "of": ours}
    budget_s = budget or (CASE_S if module is None else MODULE_S) * len(plan.jobs)
    arguments["budget_s"] = budget_s
    return execute(
        plan.jobs,
        out,
        arguments,
        describe(device, why, gpu),
        budget_s=budget_s,
        seed=seed,
        debug=debug,
        before=plan.rows,
        first=plan.first,
    )
