"""Work for a process of its own, in which kernels are compiled: `python -m dlgpu.bench.binaries JOB`.

Interpreted and compiled kernels never share a process. The results come out as one JSON object a line, as `interpreted` reads
them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch

import dlgpu
from dlgpu import _dispatch

from . import launches, machine_code
from .cases import OPS, STEP, Make, Op
from .cases._base import bind

__all__ = ["choices", "main", "steps"]


def _limits(capability: int, multiprocessors: int) -> launches.Limits:
    return capability, machine_code.shared_memory_limit(capability), multiprocessors


def steps(
    op: Op,
    shape: Mapping[str, int],
    passes: str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    capability: int,
    multiprocessors: int,
    compiled: bool = True,
) -> Iterator[dict[str, Any]]:
    """What a call would launch on such a GPU, in order, with the machine code of each kernel unless not `compiled`; and
    torch's own operations between, with the bytes that they move at least."""
    limits = _limits(capability, multiprocessors)
    seen: list[tuple[launches.Launched, machine_code.Specialization]] = []

    def spy(launch: launches.Launched) -> None:
        # Now, while meta tensors have addresses: their alignment is part of what is compiled.
        seen.append((launch, machine_code.signature_of(launch.kernel, launch.args)))

    def bound() -> Any:
        return bind(op, op.functions["dlgpu"], shape, passes, Make("meta", dtype), options)

    found = launches.dry_run(bound, limits, warm=passes == STEP, spy=spy)
    launched = iter(seen)
    codes: dict[str, machine_code.MachineCode] = {}
    for step in found:
        if not isinstance(step, launches.Record):
            yield {"kind": "torch", "name": step.op, "nbytes": step.read + step.written}
            continue
        launch, specialization = next(launched)
        about = {
            "kind": "launch",
            "name": step.key,
            "grid": list(launch.grid),
            "record": dataclasses.asdict(step),
            "flops": step.flops,
        }
        if not compiled:
            yield about
            continue
        key = repr((launch.kernel, specialization, launch.options))
        if key not in codes:
            codes[key] = machine_code.compile_for(
                launch.kernel, **specialization, capability=capability, **launch.options
            )
        yield {**about, **_figures(codes[key])}


def _figures(code: machine_code.MachineCode) -> dict[str, Any]:
    return {
        "warps": code.num_warps,
        "registers": code.registers,
        "shared_bytes": code.shared_bytes,
        "stack_bytes": code.stack_bytes,
        "spills": code.spills,
        "fits": code.fits,
        "blocks": code.blocks,
        "occupancy": code.occupancy,
        "matrix": sorted({name.split(".")[0] for name in code.matrix_instructions}),
        "load_bits": max(code.load_widths, default=0),
    }


def _arguments(function: Any, frame: FrameType) -> dict[str, Any]:
    """What a function that has just been entered was called with, by name, but for defaults."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = frame.f_locals[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= value
        elif parameter.kind is not parameter.VAR_POSITIONAL and value is not parameter.default:
            found[name] = value
    return found


def choices(
    op: Op,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    options: Mapping[str, Any],
    capability: int,
    multiprocessors: int,
) -> list[dict[str, str]]:
    """What `dlgpu.explain` says of the library's functions that the op calls: {op, step, what}, of a training step."""
    limits = _limits(capability, multiprocessors)
    calls: list[tuple[str, dict[str, Any]]] = []
    # By their code: whatever name the op's function has them under.
    functions = {
        function.__code__: (name, function)
        for name in _dispatch._explainers
        if (function := inspect.unwrap(getattr(dlgpu.functional, name, lambda: None)))
    }

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in functions:
            name, function = functions[frame.f_code]
            calls.append((name, _arguments(function, frame)))

    def bound() -> Any:
        call = bind(op, op.functions["dlgpu"], shape, op.passes[0], Make("meta", dtype), options)
        if "params" in call.inputs:
            calls.append((op.name, {"params": call.inputs["params"]}))
        return call

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        launches.dry_run(bound, limits)
    finally:
        sys.setprofile(before)
    found = []
    with launches._patched("device_limits", lambda device: limits):
        for name, given in calls:
            for step, what in dlgpu.explain(name, **given).steps:
                found.append({"op": name, "step": step, "what": what})
    return found


def _explain(text: str) -> Iterator[dict[str, Any]]:
    given = json.loads(text)
    op, dtype = OPS[given["op"]], getattr(torch, given["dtype"])
    where = (given["capability"], given["multiprocessors"])
    for choice in choices(op, given["shape"], dtype, given["options"], *where):
        yield {"kind": "choice", **choice}
    yield from steps(op, given["shape"], given["passes"], dtype, given["options"], *where)


def _launches(capability: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Of ops at their default size, shapes and names alone: nothing is compiled."""
    for name in names:
        op = OPS[name]
        shape, dtype = next(iter(op.shapes.values())), op.dtypes[0]
        found = steps(op, shape, op.passes[-1], dtype, {}, capability, 132, compiled=False)
        chosen = choices(op, shape, dtype, {}, capability, 132)
        kernels = [step["name"] for step in found if step["kind"] == "launch"]
        yield {"op": name, "kernels": kernels, "choices": [choice["step"] for choice in chosen]}


def main(arguments: list[str]) -> None:
    """`explain JSON`, the JSON an object of op, shape, passes, dtype, options, capability and multiprocessors; or
    `launches CAPABILITY OP...`."""
    job, first, *rest = arguments
    for result in _explain(first) if job == "explain" else _launches(int(first), rest):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
