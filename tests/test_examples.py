"""The course's examples run and their claims hold; docs/course.md points at what exists."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dlgpu

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
threadpoolctl = pytest.importorskip("threadpoolctl")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NAMES = [
    "linear_regression",
    "piecewise_curve",
    "activations",
    "losses",
    "digits",
    "optimizers",
    "saddle_points",
    "generalization",
    "text",
    "moves",
    "speech",
]
COURSE = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports an example as `python examples/<name>.py` would find it, under a name that nothing else has."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def find(name: str) -> ModuleType:
        path = EXAMPLES / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{name}", path)
        module = importlib.util.module_from_spec(spec)
        # functools.cache and dataclasses look a module up by its name.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return find


def run(module: ModuleType, out: Path, *arguments: str) -> str:
    """Runs an example in this process; its plot's name."""
    path = module.main(["--out", str(out), *arguments])
    assert path.parent == out
    assert path.read_bytes().startswith(PNG)
    assert 5_000 < path.stat().st_size < 100_000
    return path.stem


def test_all_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NAMES, "course"}


# The first one is run from the command line.
@pytest.mark.parametrize("name", NAMES[1:])
def test_short_form(load, tmp_path, capsys, name):
    assert run(load(name), tmp_path, "--quick") == name
    assert capsys.readouterr().out.count("holds: ") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_long_form(load, tmp_path, name, seed):
    assert run(load(name), tmp_path, "--seed", str(seed)) == name


def test_from_the_command_line(tmp_path):
    """No environment of the tests, no interpreter of the kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / "linear_regression.py"), "--quick"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plots" / "linear_regression.png").is_file()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/plots/" in ignored


def test_backend_and_seed(load, tmp_path):
    course = load("course")
    draws = []
    for backend, seed in (("fallback", 3), ("triton", 3), ("fallback", 4)):
        with course.lesson("", ["--backend", backend, "--seed", str(seed)]) as args:
            assert dlgpu.explain("relu", torch.zeros(2, device=args.device)).backend == backend
            draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(SystemExit):
        course.lesson("", ["--backend", "none"]).__enter__()


def test_one_thread_while_a_lesson_lasts(load):
    """Or NumPy's threads and torch's wait for each other: up to ten times as long, on two cores."""
    course = load("course")

    def threads() -> list[int]:
        return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpoolctl.threadpool_info())]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outside = threads()
        with course.lesson("", []):
            assert set(threads()) == {1}
        assert threads() == outside
    finally:
        torch.set_num_threads(before)


def test_a_claim_that_does_not_hold_is_an_error(load):
    course = load("course")
    with pytest.raises(AssertionError, match="does not hold: 1 > 2"):
        course.claim("1 > 2", 1 > 2)


def test_a_model_that_learns_nothing_fails_its_example(load, tmp_path, monkeypatch):
    """The claims can fail: with an optimizer that does not step, none of the nets learns."""
    monkeypatch.setattr(dlgpu.optim.Adam, "step", lambda self, closure=None: None)
    module = load("linear_regression")
    with pytest.raises(AssertionError, match="does not hold"):
        run(module, tmp_path, "--quick")


def test_the_course_shows_each_example():
    for name in NAMES:
        assert f"(../examples/{name}.py)" in COURSE
        assert f"(plots/{name}.png)" in COURSE
        plot = ROOT / "docs" / "plots" / f"{name}.png"
        assert plot.read_bytes().startswith(PNG)
        assert plot.stat().st_size < 100_000


def test_the_course_points_at_what_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", COURSE) if "://" not in link]
    assert len(links) > 30
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]
    calls = re.findall(r"dlgpu\.(functional|nn|optim|diagnostics)\.(\w+)", COURSE)
    assert len(set(calls)) > 20
    assert not [call for call in calls if not hasattr(getattr(dlgpu, call[0]), call[1])]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_short_and_documented(load, name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 130
    # Where the data is from, in words.
    assert re.search(r"\bdata\b", inspect.getdoc(load(name)), re.IGNORECASE)
