"""A pytest plugin for a test run that may be ended at any moment and gone on with: `pytest -p dlgpu.bench.testlog`.

Variables of the environment say what it does:

    DLGPU_TESTS_LOG   a file that gets a line of JSON a test as soon as it ends: {id, outcome, seconds, message, source}
    DLGPU_TESTS_DONE  a file of test ids, one a line, that are not run again
    DLGPU_TESTS_SYNC  "error": calls of ops and optimizers on a GPU must not wait for it; "rehearse": the same code with
                      nothing that could wait
    DLGPU_TESTS_SOURCE  goes into the lines

Packages that only help to test, hypothesis and expecttest, may be absent: the tests that need them are then skipped, and only
those.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__: list[str] = []

# What says nothing of a device comes last.
LAST = (
    *("test_packaging", "test_readme", "test_architecture", "test_examples", "test_course", "test_compile"),
    *(
        "test_machine_code",
        "test_bench",
        "test_report",
        "test_compare",
        "test_model",
        "test_audit",
        "test_gpu_run",
    ),
    *(
        "test_meter",
        "test_bytes",
        "test_unfused",
        "test_harness",
        "test_explain",
        "test_module",
        "test_cases",
    ),
    *("test_cpu_speed", "test_cpu_backend", "test_cross_entropy_compile"),
)
FIRST = ("test_gpu", "test_gpu_large")
_LONGEST_MESSAGE = 400


class _Anything(types.ModuleType):
    """Stands for what tests do with hypothesis beside decorating: any attribute, call or item is another."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # As a decorator it changes nothing.
        only = args[0] if len(args) == 1 and not kwargs else None
        return only if isinstance(only, (type, types.FunctionType)) else self

    def __or__(self, other: Any) -> Any:
        return self


def _without_hypothesis() -> types.ModuleType:
    module = _Anything("hypothesis")

    def given(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        def decorate(test: Any) -> Any:
            @pytest.mark.skip(reason="hypothesis is not installed")
            def skipped() -> None:
                pass

            skipped.__name__ = test.__name__
            return skipped

        return decorate

    setattr(module, "given", given)  # noqa: B010
    return module


def _without_expecttest() -> types.ModuleType:
    import unittest

    module = types.ModuleType("expecttest")
    module.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    return module


def stand_in() -> list[str]:
    """Puts something in the place of helpers that are absent; which those are."""
    absent = []
    for name, make in (("hypothesis", _without_hypothesis), ("expecttest", _without_expecttest)):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            found = {name: make()}
            if name == "hypothesis":
                found["hypothesis.strategies"] = _Anything("hypothesis.strategies")
            for full, module in found.items():
                # Others look for it, too.
                module.__spec__ = importlib.machinery.ModuleSpec(full, None)
                sys.modules[full] = module
            absent.append(name)
    return absent


stand_in()


class _Log:
    """Appends a line a test, each whole at once."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source

    def add(self, name: str, outcome: str, seconds: float, message: str = "") -> None:
        line = {"id": name, "outcome": outcome, "seconds": round(seconds, 3), "source": self._source}
        if message:
            line["message"] = " ".join(message.split())[:_LONGEST_MESSAGE]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _crash(report: Any) -> str:
    """The line that says what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    first = next(
        (line for line in text.splitlines() if line.strip() and not line.startswith("Traceback")), ""
    )
    # What is known of the machine's folders stays out of result files.
    return first.replace(os.getcwd() + os.sep, "").replace(os.path.expanduser("~"), "~")


class _Recorder:
    """On the process that hears of all tests."""

    def __init__(self, log: _Log) -> None:
        self._log = log
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid
        self._seconds[name] = self._seconds.get(name, 0.0) + report.duration
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self._log.add(
                name, report.outcome, self._seconds[name], _crash(report) if report.failed else _why(report)
            )
        elif report.failed:
            self._log.add(name, "failed", self._seconds[name], _crash(report))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._log.add(report.nodeid, "uncollected", 0.0, _uncollected(report))


def _why(report: Any) -> str:
    return str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""


def _uncollected(report: Any) -> str:
    lines = str(report.longrepr).splitlines()
    return next((line[1:].strip() for line in reversed(lines) if line.startswith("E ")), "cannot be imported")


class _Chooser:
    """Leaves out what is done, and puts first what says most of a device."""

    def __init__(self, done: set[str]) -> None:
        self._done = done

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items if item.nodeid not in self._done]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._done])

        def rank(item: pytest.Item) -> int:
            stem = item.path.stem
            if item.get_closest_marker("slow") is not None:
                return 2
            return 0 if stem in FIRST else 3 if stem in LAST else 1

        items[:] = sorted(left, key=rank)


class _Guardian:
    """Ends a process whose GPU a test has broken: all that it would report after that would be that test's doing."""

    def __init__(self) -> None:
        self._failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._failed = self._failed or report.failed

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        from .children import gpu_is_broken

        yield
        if self._failed and gpu_is_broken():
            # xdist takes it for a crash in this very test, and starts another worker.
            os._exit(3)
        self._failed = False


def watch_ops(get: Callable[[], Any], set_mode: Callable[[Any], None], always: bool = False) -> None:
    """Wraps ops and optimizers' steps so that a wait for the GPU in one is an error, as torch sees them.

    Args:
        get, set_mode: torch.cuda's functions for the mode.
        always: for calls on a CPU too, for a rehearsal.
    """
    import torch

    from dlgpu import _dispatch
    from dlgpu.ops import optimizers

    def watched(call: Callable[..., Any], kernels: Callable[[tuple[Any, ...]], bool]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            # What debugging reads, it waits for; a trace runs nothing.
            if torch.compiler.is_compiling() or _dispatch._debug or not kernels(args):
                return call(*args, **kwargs)
            before = get()
            set_mode("error")
            try:
                return call(*args, **kwargs)
            finally:
                set_mode(before)

        return run

    def on_kernels(args: tuple[Any, ...]) -> bool:
        # self, a tensor, ..., the backend.
        return args[-1] == "triton" and (always or (hasattr(args[1], "is_cuda") and args[1].is_cuda))

    def on_gpu(args: tuple[Any, ...]) -> bool:
        # rule, parameters, ...: float64 is stepped by torch, which may wait, and so may NumPy's twin.
        if _dispatch._settings.backend == "fallback" or not args[1]:
            return False
        return always or all(p.is_cuda and p.dtype != torch.float64 for p in args[1])

    op: Any = _dispatch.Op
    op.__call__ = watched(op.__call__, on_kernels)
    op.below = watched(op.below, on_kernels)
    optimizers.step = watched(optimizers.step, on_gpu)


def pytest_configure(config: pytest.Config) -> None:
    from .children import die_with_parent

    # Not by the environment, which a run within a worker's test inherits.
    worker = hasattr(config, "workerinput")
    if not worker:
        # xdist's workers end with it, by their pipe.
        die_with_parent()
    where, done = os.environ.get("DLGPU_TESTS_LOG"), os.environ.get("DLGPU_TESTS_DONE")
    if where and not worker:
        recorder = _Recorder(_Log(Path(where), os.environ.get("DLGPU_TESTS_SOURCE", "")))
        config.pluginmanager.register(recorder, "dlgpu-recorder")
    names = set(Path(done).read_text(encoding="utf-8").splitlines()) if done else set()
    config.pluginmanager.register(_Chooser(names), "dlgpu-chooser")
    config.pluginmanager.register(_Guardian(), "dlgpu-guardian")
    sync = os.environ.get("DLGPU_TESTS_SYNC")
    if sync == "error":
        import torch

        watch_ops(torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode)
    elif sync == "rehearse":
        modes: list[Any] = [0]
        watch_ops(lambda: modes[-1], modes.append, always=True)
