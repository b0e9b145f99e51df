"""What the documents show runs as written: README, docs/*.md, docstring examples; links and make targets exist."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import dlgpu
from dlgpu.bench.cli import COMMANDS, bench

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SNIPPETS = {
    page.relative_to(ROOT).as_posix(): found
    for page in PAGES
    if (
        found := re.findall(
            r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
    )
}


def run(code: str, folder: Path) -> str:
    """What code prints, in a process of its own and away from the repository; a warning is an error."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readmes_example_learns(tmp_path: Path) -> None:
    (example,) = SNIPPETS["README.md"]
    assert len(example.splitlines()) <= 16
    accuracy = float(run(example, tmp_path).removeprefix("accuracy "))
    assert accuracy > 0.9


def test_snippets_run(tmp_path: Path) -> None:
    """Every other page's, each by itself; one process, for importing torch takes seconds."""
    lines = ["import contextlib, io, json", "printed = {}"]
    for page, snippets in SNIPPETS.items():
        for number, snippet in enumerate(snippets if page != "README.md" else []):
            name = f"{page}:{number}"
            lines += [
                "with contextlib.redirect_stdout(io.StringIO()) as out:",
                f"    exec(compile({snippet!r}, {name!r}, 'exec'), {{}})",
                f"printed[{name!r}] = out.getvalue()",
            ]
    printed = json.loads(run("\n".join([*lines, "print(json.dumps(printed))"]), tmp_path))
    assert len(printed) == sum(map(len, SNIPPETS.values())) - 1
    # The report that is shown behind it.
    text = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    shown = text.partition("\n```\n5 converted")[2].partition("```")[0].splitlines()[1:]
    assert [line.rstrip() for line in printed["docs/convert.md:0"].splitlines()[1:]] == shown
    assert len(shown) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    assert not [link for link in inside if link and not (page.parent / link).exists()]
    assert page.name != "README.md" or len(inside) > 10


def test_make_targets_exist() -> None:
    targets = set(
        re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for page in PAGES:
        for block in re.findall(
            r"^```(?:sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            named = re.findall(r"^make ([a-z][\w-]*)", block, re.MULTILINE)
            assert set(named) <= targets, page.name


def documented_commands() -> list[str]:
    """What stands behind `dlgpu-bench`, and in GPU_ARGS="...", in the documents and in the commands' own help."""
    pages = [page.read_text(encoding="utf-8") for page in (*PAGES, ROOT / "kernels" / "tuned" / "README.md")]
    found = [c for page in pages for c in re.findall(r"`dlgpu-bench ([^`]+)`", page)]
    found += [f"gpu {c}" for page in pages for c in re.findall(r'GPU_ARGS="([^"]+)"', page)]
    for name in COMMANDS:
        help = bench.get_command(click.Context(bench), name).help or ""
        found += re.findall(r"^ *dlgpu-bench (.+)$", help, re.MULTILINE)
    return [c.replace(" [OP...]", "") for c in dict.fromkeys(found) if not c.startswith("COMMAND")]


def test_documented_commands_are_understood() -> None:
    """Their options are there, and take what is given; what running them does is in the tests of each."""
    commands = documented_commands()
    for text in commands:
        name, *arguments = shlex.split(text)
        assert name in COMMANDS, text
        bench.get_command(click.Context(bench), name).make_context(name, arguments)
    assert len(commands) > 15


# dlgpu.kernels and dlgpu.bench are symlinks here: imported by these names they would be imported twice.
MODULES = sorted(
    module.name
    for module in [pkgutil.ModuleInfo(None, "dlgpu", True), *pkgutil.walk_packages(dlgpu.__path__, "dlgpu.")]  # type: ignore[arg-type]
    if module.name.split(".")[1:2] not in (["kernels"], ["bench"])
)
WITH_EXAMPLES = {
    name for name in MODULES if ">>>" in Path(importlib.import_module(name).__file__ or "").read_text("utf-8")
}


@pytest.mark.parametrize("name", sorted(WITH_EXAMPLES))
def test_docstring_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried > 0


def test_public_modules_have_examples() -> None:
    assert {"dlgpu", "dlgpu.functional", "dlgpu.nn", "dlgpu.optim", "dlgpu.diagnostics"} <= WITH_EXAMPLES


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    for name in dlgpu.__all__:
        if name != "__version__":
            assert re.search(rf"\b{name}\b", text), name
