"""Where the tests run: the kernels on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

import contextlib
import importlib
import os
import pkgutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    # Workers share the cores. Read when NumPy and torch load their libraries, so before they are imported.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

# ruff: noqa: E402
import hypothesis
import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when kernels are defined, and torch may import Triton by itself at any time.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # Without it cuBLAS warns of itself under `poisoned`, which asks for deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if WORKER:
    torch.set_num_threads(1)

import dlgpu
from dlgpu import _dispatch
from dlgpu.kernels import _triton

if DEVICE == "cpu":
    # "auto" would hand much of this to torch's own functions (configs.cpu_backend), and tests would hold torch to torch. Those
    # of that rule ask for "auto".
    _dispatch._default_backend = "fallback"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background so, and the processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "dlgpu",
    derandomize=True,
    deadline=None,
    max_examples=10,
    database=None,
    # Fixtures here only choose the backend and poison buffers: nothing in them depends on the example.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("dlgpu")
with contextlib.suppress(ImportError):
    from hypothesis.internal.conjecture import providers

    # It draws constants of the project's modules too, of whichever a worker has loaded by then: examples are to be the same
    # each time.
    providers._get_local_constants = lambda: providers._local_constants

# Interpreted launches of this session, and the most programs in one launch of each kernel.
_launches: Counter[str] = Counter()
_programs: Counter[str] = Counter()


def _count_interpreted_launches() -> None:
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(executor, *args, **kwargs)
        name = getattr(executor.fn, "__name__", "?")
        _launches[name] += 1
        _programs[name] = max(_programs[name], int(np.prod(interpreter.interpreter_builder.grid_dim)))
        return result

    interpreter.GridExecutor.__call__ = counted


if _triton.INTERPRETED:
    _count_interpreted_launches()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["launches"], output["programs"] = dict(_launches), dict(_programs)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """On xdist's controller: adds up what its workers launched."""
    output = getattr(node, "workeroutput", {})
    _launches.update(output.get("launches", {}))
    for name, programs in output.get("programs", {}).items():
        _programs[name] = max(_programs[name], programs)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _launches:
        most = max(_programs, key=lambda name: _programs[name])
        terminalreporter.write_line(
            f"{_launches.total()} interpreted launches; at most {_programs[most]} programs in one, of {most}"
        )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collectstart() -> None:
    # Torch's own test data, which some modules import, loads a profile of its own; tests take the one of their import.
    hypothesis.settings.load_profile("dlgpu")


@pytest.fixture(params=["fallback", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs under use_backend of this."""
    with dlgpu.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the test's tensors go: the fallback's stay on the CPU."""
    on_cpu = "backend" in request.fixturenames and request.getfixturevalue("backend") == "fallback"
    return "cpu" if on_cpu else DEVICE


@pytest.fixture
def debug_on_gpu(device: str) -> Iterator[None]:
    """A target out of range is an IndexError on the CPU always, on a GPU under dlgpu.debug."""
    dlgpu.debug(device != "cpu")
    yield
    dlgpu.debug(False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever torch or NumPy allocate without filling holds NaN: a result that was not written shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, _nan_filled(getattr(np, name)))
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # fill_uninitialized_memory, on by default, comes with this mode.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _nan_filled(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def filled(*args: Any, **kwargs: Any) -> Any:
        array = allocate(*args, **kwargs)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    return filled


class LaunchLog(list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]):
    """(kernel's name, kernel, its arguments, its constexprs and options) of each launch, in order."""

    # Log launches without running them: results hold garbage.
    dry = False


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> LaunchLog:
    """What was launched so far in the test."""
    log = LaunchLog()
    launch = _triton.launch

    def recorded(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if 0 not in grid:
            log.append((kernel.__name__, kernel, args, meta))
        if not log.dry:
            launch(kernel, grid, *args, **meta)

    for info in pkgutil.iter_modules(importlib.import_module("dlgpu.kernels").__path__):
        module = importlib.import_module(f"dlgpu.kernels.{info.name}")
        # Modules import `launch` by name.
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", recorded)
    return log
