"""The machine code of chosen configurations, compiled for GPUs that are not there: see compile_cases.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "compile_cases.py"
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def compile_cases(*options: str, timeout: int = 300) -> list[dict]:
    """The figures of each case, from a process whose kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(CASES), *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def document(name: str) -> str:
    """One whose counts are of the Triton that `make` installs: another one's machine code differs."""
    text = (ROOT / "docs" / name).read_text()
    (counted,) = re.findall(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"Triton {counted}" in text
    if version("triton") != counted:
        pytest.skip(f"counted with Triton {counted}")
    return text


def faults(case: dict) -> list[str]:
    """What is wrong with a case's machine code."""
    found = []
    if case["spills"]:
        found.append("spills")
    if not case["fits"]:
        found.append(f"takes {case['shared']} bytes of shared memory")
    expected = case["expected_matrix"]
    if expected is None and case["matrix"]:
        found.append(f"has matrix instructions {case['matrix']}")
    if expected is not None and not any(opcode.startswith(expected) for opcode in case["matrix"]):
        found.append(f"has {case['matrix']} for matrix instructions, not {expected}")
    if case["tma"] and not case["transfers"]:
        found.append("has no TMA load")
    if case["wide"] and not any(int(bits) >= 128 for bits in case["loads"]):
        found.append(f"has no 128-bit load, only {case['loads']}")
    if case["wide_stores"] and not any(int(bits) >= 128 for bits in case["stores"]):
        found.append(f"has no 128-bit store, only {case['stores']}")
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability: int) -> None:
    cases = compile_cases(str(capability))
    assert len(cases) >= 8
    wrong = {case["name"]: found for case in cases if (found := faults(case))}
    assert not wrong


def test_faults_are_seen() -> None:
    good = {
        "spills": False,
        "fits": True,
        "shared": 0,
        "matrix": {"HGMMA.64x128x16.F32.BF16": 4},
        "expected_matrix": "HGMMA",
        "loads": {"128": 8},
        "stores": {"128": 8},
        "wide": True,
        "wide_stores": True,
        "tma": True,
        "transfers": 8,
    }
    assert not faults(good)
    for change in (
        {"spills": True},
        {"fits": False},
        {"matrix": {"HMMA.16816.F32.BF16": 4}},
        {"loads": {"64": 8}},
        {"stores": {"16": 8}},
        {"transfers": 0},
    ):
        assert faults(good | change)


def test_documented_epilogue_instructions() -> None:
    """docs/linear.md's table is what the machine code has."""
    text = document("linear.md")
    (found,) = compile_cases("--epilogues")
    for name, (fwd, fwd_special, dz, dz_special) in found.items():
        assert f"| {name} | {fwd:g} ({fwd_special:g}) | {dz:g} ({dz_special:g}) |" in text


def test_another_batch_size_compiles_nothing() -> None:
    """Within a bucket of configs.row_bucket, whatever the batch divides by."""
    (found,) = compile_cases("--buckets")
    assert len(found) == 4
    for one, all_sizes in found.values():
        assert one == all_sizes
