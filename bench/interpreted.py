"""Work for a process of its own, in which Triton interprets the kernels: `python -m dlgpu.bench.interpreted JOB`.

Interpreted and compiled kernels never share a process, and the choice is made when kernels are defined. The job's results
come out as one JSON object a line, flushed, so that the caller shows them as they are made.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from .children import Lines, command, environment

__all__ = ["InterpreterError", "run"]

TIMEOUT_S = 300


class InterpreterError(Exception):
    """The process failed; the message is its last line of output."""


def run(
    job: str, *arguments: str, timeout_s: float = TIMEOUT_S, module: str = "interpreted"
) -> Iterator[dict[str, Any]]:
    """The results of a job, as they come.

    Args:
        module: of this package, where the job is; any but this one runs where kernels are compiled.

    Raises:
        InterpreterError: it failed, or ran past its time.
    """
    interprets = module == "interpreted"
    # A tensor on a GPU would be copied to and fro; there is none to see.
    env = environment(
        DLGPU_BACKEND=None, TRITON_INTERPRET="1" if interprets else None, CUDA_VISIBLE_DEVICES=""
    )
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        reason = ""
        with Lines(command(module, job, *arguments), env, errors) as process:
            try:
                yield from map(json.loads, process.until(time.monotonic() + timeout_s))
            except TimeoutError:
                reason = f"no end after {timeout_s:.0f} s"
        errors.seek(0)
        said = errors.read()
    if process.status:
        reason = reason or (said.strip().splitlines() or [f"status {process.status}"])[-1]
        raise InterpreterError(f"Triton's {'interpreter' if interprets else 'compiler'}, {job}: {reason}")
    # Warnings, which are not to get lost.
    sys.stderr.write(said)


def _digits(steps: int, seed: int) -> Iterator[dict[str, Any]]:
    import dlgpu

    from .digits import Trainer, load, losses

    with dlgpu.use_backend("triton"):
        trainer = Trainer("dlgpu", load(), seed)
        for loss in losses(trainer, steps, seed):
            yield {"loss": loss}


def _laws(names: list[str]) -> Iterator[dict[str, Any]]:
    from .laws import LawError, Meter

    meter = Meter()
    for name in names:
        try:
            yield dataclasses.asdict(meter.derive(name))
        except LawError as error:
            yield {"op": name, "error": str(error)}


def main(arguments: list[str]) -> None:
    """`digits STEPS SEED` or `laws OP...`."""
    job, *rest = arguments
    found = _digits(int(rest[0]), int(rest[1])) if job == "digits" else _laws(rest)
    for result in found:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
