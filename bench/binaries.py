"""Work for a process of its own, in which kernels are compiled: `python -m dlgpu.bench.binaries explain JSON`.

Interpreted and compiled kernels never share a process. The results come out as one JSON object a line, as `interpreted` reads
them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

import dlgpu
from dlgpu import _dispatch

from . import launches, machine_code
from .cases import STEP, Make, Op
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
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def watched(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return real(*args, **kwargs)

        return call

    def bound() -> Any:
        call = bind(op, op.functions["dlgpu"], shape, op.passes[0], Make("meta", dtype), options)
        if "params" in call.inputs:
            calls.append((op.name, (call.inputs["params"],), {}))
        return call

    with ExitStack() as stack:
        for name in _dispatch._explainers:
            if real := getattr(dlgpu.functional, name, None):
                stack.enter_context(mock.patch.object(dlgpu.functional, name, watched(name, real)))
        launches.dry_run(bound, limits)
    found = []
    with launches._patched("device_limits", lambda device: limits):
        for name, args, kwargs in calls:
            for step, what in dlgpu.explain(name, *args, **kwargs).steps:
                found.append({"op": name, "step": step, "what": what})
    return found


def main(arguments: list[str]) -> None:
    """`explain JSON`, the JSON an object of op, shape, passes, dtype, options, capability and multiprocessors."""
    from .cases import OPS

    _, text = arguments
    given = json.loads(text)
    op, dtype = OPS[given["op"]], getattr(torch, given["dtype"])
    where = (given["capability"], given["multiprocessors"])
    for choice in choices(op, given["shape"], dtype, given["options"], *where):
        print(json.dumps({"kind": "choice", **choice}), flush=True)
    for step in steps(op, given["shape"], given["passes"], dtype, given["options"], *where):
        print(json.dumps(step), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
