"""Work for a process of its own, in which Triton interprets the kernels: `python -m dlgpu.bench.interpreted JOB`.

Interpreted and compiled kernels never share a process, and the choice is made when kernels are defined. The job's results
come out as one JSON object a line, flushed, so that the caller shows them as they are made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["InterpreterError", "run"]

TIMEOUT_S = 300


class InterpreterError(Exception):
    """The process failed; the message is its last line of output."""


def run(
    job: str, *arguments: str, timeout_s: float = TIMEOUT_S, module: str = "dlgpu.bench.interpreted"
) -> Iterator[dict[str, Any]]:
    """The results of a job, as they come.

    Args:
        module: where the job is; any but this one runs where kernels are compiled.

    Raises:
        InterpreterError: it failed, or ran past its time.
    """
    from .environment import PACKAGE

    environment = {name: value for name, value in os.environ.items() if name != "DLGPU_BACKEND"}
    # The package as this process found it, after whatever else there is.
    path = [p for p in (environment.get("PYTHONPATH"), str(PACKAGE.parent)) if p]
    # A tensor on a GPU would be copied to and fro; there is none to see.
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    if module != "dlgpu.bench.interpreted":
        del environment["TRITON_INTERPRET"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, job, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            # Ctrl-C is for this process, which ends that one.
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        overtime = threading.Timer(timeout_s, end)
        overtime.start()
        try:
            # Closes the pipe at the end.
            with process:
                try:
                    yield from map(json.loads, process.stdout or ())
                    status = process.wait()
                finally:
                    process.kill()
        finally:
            overtime.cancel()
        errors.seek(0)
        said = errors.read()
    if status:
        last = (said.strip().splitlines() or [f"status {status}"])[-1]
        reason = f"no end after {timeout_s:.0f} s" if late.is_set() else last
        what = "Triton's interpreter" if "TRITON_INTERPRET" in environment else "Triton's compiler"
        raise InterpreterError(f"{what}, {job}: {reason}")
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
