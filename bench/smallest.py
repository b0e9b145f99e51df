"""Runs ops under a vendor's tool: `python -m dlgpu.bench.smallest check|profile OP...`.

check: small cases that together launch every kernel there is, since sanitizers slow things down a hundredfold. profile: each
op once, at the size that it is measured at, between cudaProfilerStart and Stop. It says what it is about in lines that begin
as BEGIN, DONE and FAILED do, each with a JSON object, so that what the tool prints between them has its case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import dlgpu
from dlgpu.kernels import _triton

from . import variants
from .cases import BOTH, OPS, STEP, Make, Op, Shape
from .cases._base import Bound
from .children import die_with_parent, gpu_is_broken
from .environment import one_line
from .launches import Operand, Record, recording
from .laws import PROBES, Probe, _patched
from .suite import default_passes, default_shape

__all__ = ["BEGIN", "DONE", "FAILED", "NAMES", "Small", "cases", "main", "record_from"]

BEGIN, DONE, FAILED = "dlgpu-begin ", "dlgpu-done ", "dlgpu-failed "

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Small:
    """A case for sanitizers; `patches` as in `laws.Probe`."""

    op: Op
    shape: Shape
    passes: str = BOTH
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patches: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def bind(self, device: str) -> Bound:
        make = Make(device, self.dtype)
        return Bound(self.op, self.op.functions["dlgpu"], self.shape, self.passes, make, self.options)

    @property
    def about(self) -> Row:
        """What it is, for a row."""
        return {
            "op": self.op.name,
            "options": {**self.op.defaults(), **self.options},
            "passes": self.passes,
            "shape": dict(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


# Kernels, and forms of them, that no op's own cases launch.
_MORE: dict[str, tuple[Callable[[], Op], tuple[Mapping[str, Any], ...]]] = {
    "clipped adam": (variants.clipped, ({"shape": {"n": 3003, "tensors": 5}, "dtype": torch.float32},)),
    "gated network": (
        variants.gated_network,
        (
            {"shape": {"M": 130, "H": 136, "K": 72}},
            {"shape": {"M": 70, "H": 24, "K": 40}, "dtype": torch.float32},
        ),
    ),
    "adam with masters": (variants.with_masters, ({"shape": {"n": 3003, "tensors": 5}},)),
}
NAMES = (*(name for name in OPS if PROBES.get(name)), *_MORE)


def cases(name: str) -> list[Small]:
    """Of an op, or of one of its variants: of the sizes that its kernels are metered at, the first and the last for each set
    of options, dtype and way of cutting."""
    if name in _MORE:
        make, settings = _MORE[name]
        op = make()
        return [
            Small(op, **{"passes": STEP if op.passes == (STEP,) else BOTH, **setting}) for setting in settings
        ]
    op, found = OPS[name], dict[Any, Probe]()
    for probe in (*PROBES[name].fit, *PROBES[name].held_out):
        kind = json.dumps([str(probe.dtype), dict(probe.options), dict(probe.patches)], sort_keys=True)
        found.setdefault((kind, "first"), probe)
        found[kind, "last"] = probe
    unique = {id(probe): probe for probe in found.values()}
    return [
        Small(op, p.shape, STEP if op.passes == (STEP,) else p.passes, p.dtype, p.options, p.patches)
        for p in unique.values()
    ]


def _real(name: str) -> list[Small]:
    """An op at the size that it is measured at."""
    op, passes = OPS[name], default_passes(name)
    dtype = torch.float32 if passes == STEP else torch.bfloat16
    return [Small(op, op.shapes[default_shape(name, "cuda")], passes, dtype)]


def record_from(found: Mapping[str, Any]) -> Record:
    """A launch's record, from what became of it in JSON."""
    operands = {name: Operand(**operand) for name, operand in found["operands"].items()}
    return Record(found["kernel"], operands, found["sizes"], found["rule"])


def _run(case: Small, device: str, profile: bool) -> list[Record]:
    with _patched(case.patches):
        bound = case.bind(device)
        if profile or case.passes == STEP:
            # Compiles, and makes what the first step makes.
            bound()
        if device == "cuda":
            torch.cuda.synchronize()
        if profile and device == "cuda":
            torch.cuda.profiler.start()
        with recording() as records:
            bound()
        if device == "cuda":
            torch.cuda.synchronize()
        if profile and device == "cuda":
            torch.cuda.profiler.stop()
    return records


def _say(how: str, what: Row) -> None:
    print(how + json.dumps(what), flush=True)


def _all(job: str, names: Sequence[str], least: bool) -> Iterator[tuple[str, int, Small]]:
    for name in names:
        found = _real(name) if job == "profile" and not least else cases(name)
        for i, case in enumerate(found[:1] if least else found):
            yield name, i, case


def main(arguments: Sequence[str]) -> int:
    """`check|profile [--least] OP...`; `--least`: of each its first small case alone. 1 where a case failed."""
    die_with_parent()
    job, *rest = arguments
    least = "--least" in rest
    names = [name for name in rest if name != "--least"]
    device = "cpu" if _triton.INTERPRETED else "cuda"
    status = 0
    for name, i, case in _all(job, names, least):
        about = {"name": name, "case": i, **case.about}
        _say(BEGIN, about)
        try:
            with dlgpu.use_backend("triton"):
                records = _run(case, device, job == "profile")
        except Exception as error:
            status = 1
            _say(FAILED, {**about, "message": one_line(error)})
            if device == "cuda" and gpu_is_broken():
                break
        else:
            _say(DONE, {**about, "launches": [dataclasses.asdict(record) for record in records]})
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code:
        # A broken GPU makes the usual way out noisy.
        os._exit(code)
