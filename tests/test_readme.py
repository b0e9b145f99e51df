"""README's example runs as written, and its table points at files that exist."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 16
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", example]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.removeprefix("accuracy "))
    assert accuracy > 0.9


def test_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


MODULES = [
    "dlgpu",
    "dlgpu.functional",
    "dlgpu.nn",
    "dlgpu.optim",
    "dlgpu.ops.gated",
    "dlgpu.ops.linear",
    "dlgpu.ops.mlp",
    "dlgpu.ops.cross_entropy",
    "dlgpu.ops.losses",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried > 0 or name == "dlgpu.functional"
