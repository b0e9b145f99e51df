"""Processes that this one starts: ended with it, and one line of JSON an event.

Work on a GPU goes on in processes of its own: an illegal access there leaves the process with a GPU that answers nothing any
more, and the one that keeps the results must not be it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .environment import PACKAGE

__all__ = ["Lines", "command", "die_with_parent", "environment", "gpu_is_broken"]

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the system end this process when the one that started it is gone, killed perhaps; where it can, which is Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def gpu_is_broken() -> bool:
    """Whether an error before has left this process without a GPU that works."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def command(module: str, *arguments: str) -> list[str]:
    """The argument list that runs a module of this package with this Python."""
    return [sys.executable, "-m", f"dlgpu.bench.{module}", *arguments]


def environment(**changes: str | None) -> dict[str, str]:
    """This process' environment, with the package where this process found it; None takes a variable out."""
    found = {name: value for name, value in os.environ.items() if changes.get(name, "") is not None}
    # Last: whatever else is there comes first, as in this process.
    path = [p for p in (found.get("PYTHONPATH"), str(PACKAGE.parent)) if p]
    # Not the working directory first: a checkout has folders called like packages.
    found |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return found | {name: value for name, value in changes.items() if value is not None}


class Lines:
    """A process, its output line by line, and its end, whatever way it comes.

    Args:
        log: where its standard error goes.
        text: its standard input.
        merged: standard error comes with the output.

    Attributes:
        status: its exit status, once it has ended.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        log: IO[Any] | None = None,
        text: str = "",
        cwd: Path | None = None,
        merged: bool = False,
    ) -> None:
        self.status: int | None = None
        self._process = subprocess.Popen(
            list(arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else log if log is not None else subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=dict(env),
            cwd=cwd,
            # Ctrl-C is for this process, which ends that one and all that it started.
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(text,), daemon=True)
        self._reader.start()

    def _read(self, text: str) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(text)
            process.stdin.close()
        for line in process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def until(self, deadline: float) -> Iterator[str]:
        """The lines as they come, up to the process' end or the deadline (time.monotonic).

        Raises:
            TimeoutError: the deadline came first; the process still runs.
        """
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                line = self._lines.get(timeout=min(left, 3600))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                self.status = self._process.wait()
                return
            yield line

    def end(self, grace_s: float = 0.0) -> None:
        """Ends it and all that it started: with `grace_s`, first as Ctrl-C would."""
        if grace_s and self._process.poll() is None:
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        # What it started may be there still where itself is gone.
        self._signal(signal.SIGKILL)
        self.status = self._process.wait()
        # Its output is at its end, unless somebody else has it still.
        self._reader.join(1.0)
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
