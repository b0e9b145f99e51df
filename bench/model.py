"""`dlgpu-bench model`: what a GPU could do at most, from bytes and operations alone, with no GPU.

Nothing here is a measurement, and every line says MODEL. A launch cannot take less than its compulsory bytes take at the
memory's bandwidth, nor less than its products' operations take at the peak rate; the bound of an op is the sum over its
launches, since bounding the total would hide what fusing gains. Caches, latency, launch overhead and how good a kernel is are
left out, but for an overhead that the user gives.

    fused     the launches and cuBLAS products that dlgpu's launchers would make on that GPU (a dry run), their bytes by laws
              that are metered and checked to the byte (`laws`)
    unfused   each operation of torch's eager form a launch; its distinct bytes, counted on meta tensors (`unfused`)
    compiled  the kernels of torch.compile, by Inductor's own count (`compiled`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dlgpu.kernels import _triton

from . import ceilings, compiled, gpus, interpreted, report, run, tables, unfused
from .cases import BOTH, OPS, STEP, Op
from .cases._base import NotOffered
from .cli import Amount, Names, unknown
from .environment import UsageError, describe, find_gpu
from .gpus import GPUS, Gpu
from .launches import Limits, Record, dry_run
from .laws import Law, LawError, Laws
from .measure import Case
from .report import Console, Results

__all__ = ["Launch", "Settings", "command", "laws_of", "rows"]

Row = dict[str, Any]

DEFAULT_GPUS = ("a100", "h100", "h200", "b200")
# A gain below this is within what kernels differ by anyway.
WORTH = 0.05
# The crossover is looked for from this part of a size to this many times it, at powers of 2.
_RANGE = 64


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: kernel or operation, compulsory and requested bytes (None: not known), and the operations of products."""

    name: str
    nbytes: int
    requested: int | None
    flops: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of `rows` beside ops and GPUs.

    shape: a name, or k=v,...; None takes the first shape for a GPU.
    dtype: None takes bfloat16, and float32 for an optimizer's step.
    passes: None takes fwd+bwd, or the step.
    options: k=v, as the op has them.
    overhead_s: of each launch; None leaves launches out of the time.
    inductor: whether to count what torch.compile does.
    crossover: the name of the size that is scaled; "" scales the op's own choice, None looks for no crossover.
    """

    shape: str | None = None
    dtype: torch.dtype | None = None
    passes: str | None = None
    options: tuple[str, ...] = ()
    overhead_s: float | None = None
    inductor: bool = True
    crossover: str | None = ""


# The laws of each op, or why there are none: metering takes seconds, and they hold as long as the kernels do.
_LAWS: dict[str, Laws | str] = {}


def laws_of(names: Sequence[str]) -> Iterator[tuple[str, Laws | str]]:
    """Each op's laws, or why there are none, metered in a process of their own unless this process has them already."""
    missing = [name for name in names if name not in _LAWS]
    with contextlib.closing(_derived(missing)) as found:
        for name in names:
            if name not in _LAWS:
                _LAWS[name] = _read(next(found))
            yield name, _LAWS[name]


def _derived(names: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    if names:
        yield from interpreted.run("laws", *names)
        raise interpreted.InterpreterError("Triton's interpreter ended before all laws were there")


def _read(found: Mapping[str, Any]) -> Laws | str:
    if "error" in found:
        return str(found["error"])
    return Laws(tuple(Law(**{**law, "unseen": tuple(law["unseen"])}) for law in found["laws"]["laws"]))


def limits_of(gpu: Gpu) -> Limits:
    """What the launchers ask of a device."""
    from .machine_code import shared_memory_limit

    return gpu.capability, shared_memory_limit(gpu.capability), gpu.multiprocessors


def fused(case: Case, gpu: Gpu, laws: Laws) -> list[Launch]:
    """What dlgpu would launch on a GPU.

    Raises:
        LawError: no law covers some launch.
    """
    steps = dry_run(case.without_memory("dlgpu"), limits_of(gpu), warm=case.passes == STEP)
    found = []
    for step in steps:
        if isinstance(step, Record):
            traffic = laws(step)
            found.append(Launch(step.kernel, traffic.compulsory, traffic.requested, step.flops))
        else:
            found.append(_operation(step))
    return found


def _operation(row: unfused.Row) -> Launch:
    return Launch(row.op, row.read + row.written, None, row.flops)


def eager(case: Case) -> list[Launch]:
    """What torch's eager form runs."""
    return [
        _operation(row) for row in unfused.operations(case.without_memory("eager"), warm=case.passes == STEP)
    ]


def bound_s(launches: Iterable[Launch], gpu: Gpu, dtype: str) -> float:
    """No less time than this: the sum over the launches of what their bytes or their products take, whichever is more."""
    return sum(launch_s(launch, gpu, dtype) for launch in launches)


def launch_s(launch: Launch, gpu: Gpu, dtype: str) -> float:
    """No less time than this for one launch."""
    return max(launch.nbytes / gpu.bandwidth, launch.flops / gpu.flops[dtype])


def _rate_name(dtype: torch.dtype) -> str:
    """The rate in a GPU's table that products in a dtype run at, under torch's setting for float32."""
    if _triton.matmul_precision(dtype) == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def rows(
    names: Sequence[str] = (), gpu_list: Sequence[Gpu] = (), settings: Settings | None = None
) -> Iterator[Row]:
    """Rows of kind `model`, one for each op and GPU; `skipped` or `error` where there is no number.

    A row has op, options, passes, shape, dtype; gpu, its bandwidth, flops_per_s and their origin; compulsory_bytes,
    requested_bytes (null if some launch has no law for it), launches, flops and intensity (flops a byte) of dlgpu's launches;
    unfused_bytes and unfused_launches by name; bound_s and unfused_bound_s by name; gain: the unfused bound over the fused;
    saved_bytes, saved_launches, and their part of the time saved; kernels, unfused_kernels: each launch with its bytes, flops,
    bound_s and limited_by; and crossover.

    Args:
        names: of ops; all if there are none.
        gpu_list: DEFAULT_GPUS if empty.

    Raises:
        UsageError: there is no such shape or option.
        interpreted.InterpreterError: the process that meters the kernels failed.
    """
    settings = settings or Settings()
    wanted = list(dict.fromkeys(names)) or list(OPS)
    cases = {name: _case(OPS[name], settings) for name in wanted}
    for name, laws in laws_of(wanted):
        case = cases[name]
        if isinstance(laws, str):
            yield {"section": "model", "kind": "error", "title": f"MODEL: {case.title}", "message": laws}
            continue
        yield from _rows_of(case, laws, gpu_list or [GPUS[gpu] for gpu in DEFAULT_GPUS], settings)


def _case(op: Op, settings: Settings) -> Case:
    passes = settings.passes if settings.passes in op.passes else STEP if STEP in op.passes else BOTH
    dtype = settings.dtype or (torch.float32 if op.passes == (STEP,) else torch.bfloat16)
    shape = settings.shape or run.default_shape(op.name, "cuda")
    if "=" not in shape and shape not in op.shapes:
        shape = run.default_shape(op.name, "cuda")
    return Case(
        op,
        run.sizes_of(op, shape, "cuda"),
        passes,
        dtype,
        run.options_of([op], settings.options)[op.name],
    )


def _rows_of(case: Case, laws: Laws, gpu_list: Sequence[Gpu], settings: Settings) -> Iterator[Row]:
    try:
        operations = {"torch eager": eager(case)}
    except NotOffered as error:
        yield {"section": "model", "kind": "skipped", "title": f"MODEL: {case.title}", "reason": str(error)}
        return
    absent = None
    if settings.inductor:
        try:
            kernels = compiled.kernels(case.described, case.shape, case.passes, case.dtype, case.options)
            operations["torch.compile"] = [Launch("inductor", k.nbytes, None, k.flops) for k in kernels]
        except compiled.NotCounted as error:
            absent = f"torch.compile not available: {error}"
    counted = functools.lru_cache(None)(lambda sizes: eager(dataclasses.replace(case, shape=dict(sizes))))
    for gpu in gpu_list:
        title = f"MODEL: {case.title} on {gpu.title}"
        rate = _rate_name(case.dtype)
        if rate not in gpu.flops:
            reason = f"the {gpu.title} has no {rate} products, and dlgpu no kernels for them there"
            yield {"section": "model", "kind": "skipped", "title": title, "reason": reason}
            continue
        try:
            row = _row(case, gpu, rate, fused(case, gpu, laws), operations, settings.overhead_s)
        except LawError as error:
            yield {"section": "model", "kind": "skipped", "title": title, "reason": f"no number: {error}"}
            continue
        if absent:
            # Said once.
            row["absent"], absent = absent, None
        if settings.crossover is not None:
            row["crossover"] = _crossover(case, gpu, rate, laws, counted, settings)
        yield row


def _row(
    case: Case,
    gpu: Gpu,
    rate: str,
    launches: Sequence[Launch],
    operations: Mapping[str, Sequence[Launch]],
    overhead_s: float | None,
) -> Row:
    def total(parts: Sequence[Launch]) -> float:
        return bound_s(parts, gpu, rate) + len(parts) * (overhead_s or 0.0)

    nbytes, flops = sum(launch.nbytes for launch in launches), sum(launch.flops for launch in launches)
    requested = [launch.requested for launch in launches]
    others = operations["torch eager"]
    unfused_bytes = sum(launch.nbytes for launch in others)
    ours_s, others_s = total(launches), total(others)
    saved_launches = len(others) - len(launches)
    by_launches = None if overhead_s is None else saved_launches * overhead_s
    return {
        "section": "model",
        "kind": "model",
        "op": case.op,
        "options": dict(case.options),
        "passes": case.passes,
        "shape": dict(case.shape),
        "dtype": case.dtype_name,
        "gpu": gpu.title,
        "bandwidth": gpu.bandwidth,
        "flops_per_s": gpu.flops[rate],
        "origin": gpu.origin,
        "source": gpu.source,
        "launches": len(launches),
        "compulsory_bytes": nbytes,
        "requested_bytes": None if None in requested else sum(n for n in requested if n is not None),
        "flops": flops,
        "intensity": flops / nbytes if nbytes else 0.0,
        "unfused_bytes": {name: sum(x.nbytes for x in parts) for name, parts in operations.items()},
        "unfused_launches": {name: len(parts) for name, parts in operations.items()},
        "bound_s": ours_s,
        "unfused_bound_s": {name: total(parts) for name, parts in operations.items()},
        "gain": others_s / ours_s if ours_s else 1.0,
        "saved_bytes": unfused_bytes - nbytes,
        "saved_launches": saved_launches,
        "saved_by_bytes_s": others_s - ours_s - (by_launches or 0.0),
        "saved_by_launches_s": by_launches,
        "launch_overhead_s": overhead_s,
        "limited_by": _limited_by(launches, gpu, rate),
        "kernels": [_kernel(launch, gpu, rate) for launch in launches],
        "unfused_kernels": {
            name: [_kernel(x, gpu, rate) for x in parts] for name, parts in operations.items()
        },
        "compiled_note": compiled.NOTE if "torch.compile" in operations else None,
    }


def _limits(launch: Launch, gpu: Gpu, rate: str) -> str:
    return "products" if launch.flops / gpu.flops[rate] > launch.nbytes / gpu.bandwidth else "bytes"


def _limited_by(launches: Sequence[Launch], gpu: Gpu, rate: str) -> str:
    """What most of the bound is made of."""
    by = {"bytes": 0.0, "products": 0.0}
    for launch in launches:
        by[_limits(launch, gpu, rate)] += launch_s(launch, gpu, rate)
    return max(by, key=lambda name: by[name])


def _kernel(launch: Launch, gpu: Gpu, rate: str) -> Row:
    return {
        "kernel": launch.name,
        "bytes": launch.nbytes,
        "requested_bytes": launch.requested,
        "flops": launch.flops,
        "bound_s": launch_s(launch, gpu, rate),
        "limited_by": _limits(launch, gpu, rate),
    }


def varied_size(op: Op) -> str:
    """The size that a crossover is looked for along: what the products add up over, as it decides how much a saved pass
    weighs; else how much there is."""
    names = list(next(iter(op.shapes.values())))
    return next((name for name in ("K", "H", "n") if name in names), names[0])


def _crossover(
    case: Case,
    gpu: Gpu,
    rate: str,
    laws: Laws,
    counted: Callable[[Any], Sequence[Launch]],
    settings: Settings,
) -> Row:
    """Where along one size fusing stops paying: the gain falls below WORTH."""
    name = settings.crossover or varied_size(case.described)
    if name not in case.shape:
        raise unknown(f"size of {case.op}", name, case.shape)
    given = case.shape[name]
    sizes = sorted({max(given * step // _RANGE, 1) for step in (2**i for i in range(13))})
    if "tensors" in case.shape and name == "n":
        sizes = [size for size in sizes if size >= case.shape["tensors"]]
    found: list[tuple[int, float]] = []
    for size in sizes:
        shape = {**case.shape, name: size}
        try:
            ours = fused(dataclasses.replace(case, shape=shape), gpu, laws)
            others = counted(tuple(shape.items()))
        except (LawError, RuntimeError, ValueError):
            # No law, or no such size: what is known of the other sizes stands.
            continue
        each = settings.overhead_s or 0.0
        times = [bound_s(parts, gpu, rate) + len(parts) * each for parts in (others, ours)]
        if times[1]:
            found.append((size, times[0] / times[1]))
    return {"size": name, "gains": [list(pair) for pair in found], **_reading(name, found)}


def _reading(name: str, found: Sequence[tuple[int, float]]) -> Row:
    """In words; and where it stops paying, the last size that pays and the next one that does not."""
    sizes, pays = [size for size, _ in found], [gain >= 1 + WORTH for _, gain in found]
    if not found:
        return {"pays": "not known", "pays_short": "", "between": None}
    if all(pays) or not any(pays):
        where = "throughout" if all(pays) else "nowhere"
        return {"pays": f"{where}: none found in range", "pays_short": where, "between": None}
    last = max(i for i, paying in enumerate(pays) if paying)
    # Of several ranges the last is told; `gains` has them all.
    first = next((i + 1 for i in range(last, -1, -1) if not pays[i]), 0)
    text = name
    if first:
        text = f"{sizes[first]} <= {text}"
    if last + 1 < len(sizes):
        text = f"{text} <= {sizes[last]}"
    between = [sizes[last], sizes[last + 1]] if last + 1 < len(sizes) else None
    return {"pays": text, "pays_short": text, "between": between}


def _figures(path: Path) -> dict[str, float]:
    """Name -> rate of the ceilings in a results file."""
    found = ceilings.best(report.load(path)["rows"])
    if not found:
        raise UsageError(f"--ceilings {path.name}: that file holds no ceilings (see `dlgpu-bench ceilings`)")
    return found


def chosen_gpus(
    names: Sequence[str],
    bandwidth: float | None,
    flops: float | None,
    path: Path | None,
    dtype: torch.dtype | None,
) -> list[Gpu]:
    """The GPUs of these names, with what was measured in place of what is published.

    Raises:
        UsageError: there is no such GPU; or measured figures for more than one.
    """
    found = [gpus.find(name) for name in dict.fromkeys(names)]
    if (bandwidth, flops, path) == (None, None, None):
        return found
    if len(found) != 1:
        raise UsageError("--bandwidth, --flops and --ceilings are one GPU's: name it with --gpu")
    rate = _rate_name(dtype or torch.bfloat16)
    if path is not None:
        measured = _figures(path)
        found[0] = found[0].measured(
            measured.get(ceilings.COPY),
            measured.get(ceilings.matmul_name(dtype or torch.bfloat16)),
            rate,
            f"measured ({path.name})",
        )
    return [found[0].measured(bandwidth, flops, rate)]


def header(gpu_list: Sequence[Gpu]) -> list[str]:
    """What is above the rows, each line marked."""
    lines = [
        f"MODEL: {gpu.title}: {gpu.bandwidth / 1e9:.0f} GB/s, {gpu.multiprocessors} SMs, "
        f"{gpu.l2 / 2**20:.0f} MB L2; {gpu.origin}. {gpu.source}"
        for gpu in gpu_list
    ]
    return [
        *lines,
        "MODEL: bounds, not timings: the sum over launches of the larger of bytes / bandwidth and flops / peak.",
        f"MODEL: torch.compile: {compiled.NOTE}.",
    ]


@click.command("model")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option(
    "--gpu",
    "gpu_names",
    type=Names(),
    default=DEFAULT_GPUS,
    metavar="NAME,...",
    help=f"Of {', '.join(GPUS)}; default: {','.join(DEFAULT_GPUS)}.",
)
@click.option("--shape", metavar="NAME|K=V,...", help="Default: the first shape for a GPU.")
@click.option(
    "--dtype",
    type=click.Choice(tuple(run.DTYPES)),
    help="Default: bfloat16, and float32 for a step.",
)
@click.option("--pass", "passes", type=click.Choice(run.PASSES), help="Default: fwd+bwd, or the step.")
@click.option("--option", "options", multiple=True, metavar="K=V", help="Of the op; may be given again.")
@click.option(
    "--bandwidth",
    type=Amount(min=0, min_open=True, max=1e6),
    metavar="GB/S",
    help="Measured, in place of the datasheet's.",
)
@click.option(
    "--flops",
    type=Amount(min=0, min_open=True, max=1e6),
    metavar="TFLOP/S",
    help="Of the dtype's products, measured, in place of the datasheet's.",
)
@click.option(
    "--ceilings",
    "ceilings_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A results file with the ceilings of that GPU, in place of both.",
)
@click.option(
    "--launch-us",
    type=Amount(min=0, max=1e6),
    metavar="US",
    help="What each launch costs; default: launches are counted, and cost nothing.",
)
@click.option("--vary", metavar="SIZE", help="The size along which the crossover is looked for.")
@click.option("--no-compiled", is_flag=True, help="Leave out Inductor's count.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Results, as JSON and Markdown.")
def command(
    ops: tuple[str, ...],
    gpu_names: tuple[str, ...],
    shape: str | None,
    dtype: str | None,
    passes: str | None,
    options: tuple[str, ...],
    bandwidth: float | None,
    flops: float | None,
    ceilings_file: Path | None,
    launch_us: float | None,
    vary: str | None,
    no_compiled: bool,
    out: Path | None,
) -> int:
    """What a GPU could do at most, from counted bytes and operations: no GPU needed, and no timing. All ops if none is
    named.

    \b
      dlgpu-bench model cross_entropy --gpu h100,h200
      dlgpu-bench model linear --shape M=8192,N=4096,K=512 --vary K
      dlgpu-bench model --gpu h200 --ceilings bench-results/mine.json
    """
    for name in ops:
        if name not in OPS:
            raise unknown("op", name, OPS)
    _check_shape([OPS[name] for name in ops] or list(OPS.values()), shape, vary, named=bool(ops))
    for op in (OPS[name] for name in ops if passes):
        if passes not in op.passes:
            raise unknown(f"pass of {op.name}", str(passes), op.passes)
    chosen = run.DTYPES[dtype] if dtype else None
    gpu_list = chosen_gpus(
        gpu_names, bandwidth and bandwidth * 1e9, flops and flops * 1e12, ceilings_file, chosen
    )
    settings = Settings(
        shape,
        chosen,
        passes,
        options,
        None if launch_us is None else launch_us * 1e-6,
        not no_compiled,
        vary or "",
    )
    return _show(ops, gpu_list, settings, out)


def _check_shape(ops: Sequence[Op], shape: str | None, vary: str | None, named: bool) -> None:
    """Before anything is metered."""
    if shape and "=" not in shape and not any(shape in op.shapes for op in ops):
        raise unknown("shape", shape, dict.fromkeys(name for op in ops for name in op.shapes))
    if shape and "=" in shape and not named:
        raise UsageError(f"--shape {shape}: sizes are an op's, name it")
    if vary and not all(vary in next(iter(op.shapes.values())) for op in ops):
        raise unknown("size", vary, dict.fromkeys(s for op in ops for s in next(iter(op.shapes.values()))))


def _show(names: Sequence[str], gpu_list: Sequence[Gpu], settings: Settings, out: Path | None) -> int:
    console, results = Console(), None
    if out is not None:
        about = {"suite": "model", "device": "none", "gpus": [gpu.name for gpu in gpu_list]}
        results = Results(out, about, describe("cpu", "a model needs no GPU", find_gpu()))
    for line in header(gpu_list):
        console.line(line)
    console.section("model", "model")
    status = 0
    wanted = len(dict.fromkeys(names)) or len(OPS)
    try:
        with console.progress():
            console.status("metering the kernels in Triton's interpreter", 0.0)
            done: set[str] = set()
            for row in rows(names, gpu_list, settings):
                if row["kind"] == "error":
                    status = 2
                if results is not None:
                    results.add(row)
                console.row(row)
                for line in remarks(row):
                    console.line(line)
                done.add(str(row.get("op") or row.get("title")))
                console.status("metering the kernels in Triton's interpreter", len(done) / wanted)
    except KeyboardInterrupt:
        if results is not None:
            results.finish("interrupted")
            console.line(f"\nMODEL: {len(results.rows)} rows are kept in {results.json_path}")
        raise
    except interpreted.InterpreterError as error:
        if results is not None:
            results.finish("failed")
        raise UsageError(str(error)) from error
    if results is not None:
        results.finish("failed" if status else "complete")
        console.line(f"\nMODEL: {results.json_path} and {results.markdown_path}")
    return status


def remarks(row: Row) -> list[str]:
    """What a row says beside its columns."""
    found = []
    if row.get("saved_by_launches_s") is not None:
        by_bytes, by_launches = (tables.seconds(row[f"saved_by_{what}_s"]) for what in ("bytes", "launches"))
        found.append(
            f"    MODEL: against eager, {tables.bytes_text(row['saved_bytes'])} not moved save {by_bytes}, "
            f"{row['saved_launches']} launches not made {by_launches}"
        )
    if row.get("absent"):
        found.append(f"    MODEL: {row['absent']}")
    return found
