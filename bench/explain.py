"""`dlgpu-bench explain OP`: what an op computes, moves and launches at a size, and what its kernels become on a GPU.

No GPU is needed: the real launchers run on meta tensors with the limits of the GPU that is meant, and what they would launch
is compiled for it right here and read back. Bytes are from laws fitted to the traffic of the kernels in Triton's interpreter,
as `dlgpu-bench model` has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import torch

from . import interpreted, launches, laws, unfused
from .cases import STEP
from .cli import unknown
from .environment import UsageError
from .gpus import GPUS
from .measure import Case
from .model import laws_of
from .report import Console
from .run import DTYPES, PASSES, options_of, sizes_of

__all__ = ["command", "explained", "find_gpu"]

# By capability, the GPU of the table that stands for it.
_EXAMPLES = {gpu.capability: gpu for gpu in reversed(GPUS.values())}


def find_gpu(text: str) -> tuple[int, int, str]:
    """(capability, multiprocessors, what to call it) of a GPU's name or a capability, such as 9.0 or 90.

    Raises:
        UsageError: there is no such GPU.
    """
    key = text.strip().lower()
    if key in GPUS:
        gpu = GPUS[key]
        return gpu.capability, gpu.multiprocessors, f"{gpu.title}, capability {gpu.capability / 10}"
    digits = key.replace(".", "")
    if digits.isdecimal() and int(digits) in _EXAMPLES:
        gpu = _EXAMPLES[int(digits)]
        return gpu.capability, gpu.multiprocessors, f"capability {gpu.capability / 10}, such as {gpu.title}"
    raise unknown("GPU", text, [*GPUS, *(str(capability / 10) for capability in sorted(_EXAMPLES))])


def _record(found: Mapping[str, Any]) -> launches.Record:
    operands = {name: launches.Operand(**operand) for name, operand in found["operands"].items()}
    return launches.Record(found["kernel"], operands, found["sizes"], found["rule"])


def _bytes(step: Mapping[str, Any], known: laws.Laws | None) -> int:
    """Compulsory bytes of a launch; without laws, each argument's once."""
    if step["kind"] == "torch":
        nbytes: int = step["nbytes"]
        return nbytes
    record = _record(step["record"])
    if known is None:
        return sum(operand.nbytes for operand in record.operands.values())
    return known(record).compulsory


def explained(
    case: Case, capability: int, multiprocessors: int, meter: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """(what `dlgpu.explain` says, the launches with their bytes, where the bytes are from).

    Args:
        meter: fit laws first; else a launch's bytes are its arguments', each once.

    Raises:
        interpreted.InterpreterError: the interpreter or the compiler failed.
    """
    given = {
        "op": case.op,
        "shape": dict(case.shape),
        "passes": case.passes,
        "dtype": case.dtype_name,
        "options": dict(case.options),
        "capability": capability,
        "multiprocessors": multiprocessors,
    }
    found = list(interpreted.run("explain", json.dumps(given), module="binaries"))
    choices = [step for step in found if step["kind"] == "choice"]
    steps = [step for step in found if step["kind"] != "choice"]
    known: laws.Laws | str | None = dict(laws_of([case.op]))[case.op] if meter else None
    origin = "metered: the laws of the kernels' traffic"
    if not isinstance(known, laws.Laws):
        known, origin = None, "each argument's once" + (f", for {known}" if known else "")
    try:
        sizes = [_bytes(step, known) for step in steps]
    except laws.LawError as error:
        sizes, origin = [_bytes(step, None) for step in steps], f"each argument's once, for {error}"
    return choices, [{**step, "nbytes": nbytes} for step, nbytes in zip(steps, sizes, strict=True)], origin


def _amount(value: float, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns; all but the first and the last are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *middle = (
            f"{cell:<{width}}" if i in (0, len(row) - 1) else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join([first, *middle]).rstrip()


def _intensity(flops: int, nbytes: int) -> str:
    return f"{flops / nbytes:.3g}" if flops and nbytes else "-"


_HEADER = (
    "launch",
    "grid",
    "bytes",
    "FLOP",
    "FLOP/B",
    "warps",
    "regs",
    "shared",
    "blocks/SM",
    "occupancy",
    "notes",
)


def _cells(step: Mapping[str, Any]) -> tuple[str, ...]:
    nbytes = _amount(step["nbytes"], "B")
    if step["kind"] == "torch":
        return (f"torch {step['name']}", "", nbytes, *[""] * 7, "not a kernel of this library")
    notes = [
        *step["matrix"],
        {4096: "TMA loads", 0: ""}.get(step["load_bits"], f"{step['load_bits']}-bit loads"),
        f"SPILLS, {step['stack_bytes']} B of stack" if step["spills"] else "no spills",
        "" if step["fits"] else "DOES NOT FIT",
    ]
    return (
        step["name"],
        " x ".join(map(str, step["grid"])),
        nbytes,
        _amount(step["flops"], "FLOP") if step["flops"] else "-",
        _intensity(step["flops"], step["nbytes"]),
        str(step["warps"]),
        str(step["registers"]),
        _amount(step["shared_bytes"], "B"),
        str(step["blocks"]),
        f"{step['occupancy']:.0%}",
        ", ".join(filter(None, notes)),
    )


def lines(
    case: Case,
    gpu: str,
    choices: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    origin: str,
) -> Iterator[str]:
    """The explanation, for people."""
    op = case.described
    yield f"{case.title} on {gpu}"
    yield f"  {op.equation}"
    yield f"  {op.source}"
    yield ""
    yield "Chosen, for a training step (dlgpu.explain):"
    width = max((len(choice["step"]) for choice in choices), default=0)
    for name in dict.fromkeys(choice["op"] for choice in choices):
        if name != case.op:
            yield f"  {name}"
        for what in dict.fromkeys((c["step"], c["what"]) for c in choices if c["op"] == name):
            yield f"  {what[0]:<{width}}  {what[1]}"
    yield ""
    yield f"Launched by {case.passes}, compiled for capability {gpu.split('capability ')[1][:4].rstrip(',')}:"
    yield from _table([_HEADER, *map(_cells, steps)])
    yield ""
    nbytes, flops = (sum(step.get(key, 0) for step in steps) for key in ("nbytes", "flops"))
    intensity = f", {_intensity(flops, nbytes)} FLOP/B" if flops else ""
    products = f", {_amount(flops, 'FLOP')}" if flops else ""
    yield f"In all: {len(steps)} launches, {_amount(nbytes, 'B')}{products}{intensity}"
    yield f"  bytes: a COUNT of what must be read and written, {origin}"
    rows = unfused.operations(case.without_memory("eager"), warm=case.passes == STEP)
    total = sum(row.read + row.written for row in rows)
    yield f"  torch eager: {len(rows)} launches, {_amount(total, 'B')}, {total / max(nbytes, 1):.3g} times as many bytes"


@click.command("explain")
@click.argument("op_name", metavar="OP")
@click.option("--shape", metavar="NAME|K=V,...", help="Default: the op's first.")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), help="Default: bfloat16 where the op has it.")
@click.option("--pass", "passes", type=click.Choice(PASSES), help="Default: fwd+bwd, or step.")
@click.option("--option", "options", multiple=True, metavar="K=V", help="Of the op; may be given again.")
@click.option(
    "--gpu",
    "gpu_name",
    default="h100",
    show_default=True,
    metavar="NAME|CAPABILITY",
    help="Such as b200 or 8.6.",
)
@click.option(
    "--meter/--no-meter", default=True, help="Meter the kernels for their bytes; takes 10 s or more."
)
def command(
    op_name: str,
    shape: str | None,
    dtype: str | None,
    passes: str | None,
    options: tuple[str, ...],
    gpu_name: str,
    meter: bool,
) -> int:
    """What an op computes, moves and launches, and what its kernels become on a GPU that need not be there.

    Registers, shared memory, spills and occupancy are from compiling each kernel right here.
    """
    from .cases import OPS

    if op_name not in OPS:
        raise unknown("op", op_name, OPS)
    op = OPS[op_name]
    capability, multiprocessors, gpu = find_gpu(gpu_name)
    kind = DTYPES[dtype] if dtype else torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    if capability < 80 and kind is torch.bfloat16:
        if dtype:
            raise UsageError(f"bfloat16 kernels need capability 8.0; {gpu} has them in float16 and float32")
        kind = torch.float16
    if passes and passes not in op.passes:
        raise unknown(f"pass of {op.name}", passes, op.passes)
    sizes = sizes_of(op, shape, "cpu") if shape else dict(next(iter(op.shapes.values())))
    case = Case(op, sizes, passes or op.passes[-1], kind, options_of([op], options)[op.name])
    console = Console()
    try:
        found = explained(case, capability, multiprocessors, meter)
    except interpreted.InterpreterError as error:
        raise UsageError(str(error)) from None
    for line in lines(case, gpu, *found):
        console.line(line)
    return 0
