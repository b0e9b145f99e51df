"""Compiling for GPUs that are not there. The kernels are compiled by this file run as a script: under pytest
they are interpreted, and a process does one or the other."""

import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import dlgpu
from dlgpu.bench import machine_code
from dlgpu.bench.machine_code import BULK_BITS, CAPABILITIES, MachineCode, compile_for, signature_of
from dlgpu.kernels import _triton


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride, bias_ptr, BLOCK: tl.constexpr = 1024):
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * stride
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(y_ptr + offs, x, mask=mask)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, 32)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, 32):
        a = tl.load(a_ptr + offs[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + offs[None, :] * K + (k + offs_k)[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _center_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x - tl.max(x))


@triton.jit
def _descriptor_kernel(x_desc, y_desc):
    y_desc.store([0, 0], x_desc.load([0, 0]))


def _compile_all():
    copy_args = {"x_ptr": torch.bfloat16, "y_ptr": torch.bfloat16, "n": 4096, "stride": 1, "bias_ptr": None}
    matmul = {"signature": {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}}
    matmul |= {"constexprs": {"BLOCK": 64}, "divisible_by_16": ["a_ptr", "b_ptr", "c_ptr", "K"]}
    center = signature_of(_center_kernel, {"x_ptr": torch.float32, "y_ptr": torch.float32, "BLOCK": 16384})
    copy = signature_of(_copy_kernel, copy_args)
    narrow = copy | {"divisible_by_16": ["y_ptr", "n"]}
    tile = "tensordesc<bf16[64, 64]>"
    descriptors = signature_of(_descriptor_kernel, {"x_desc": tile, "y_desc": tile})
    code = {f"copy {c}": compile_for(_copy_kernel, **copy, capability=c) for c in CAPABILITIES}
    # The three designs of matrix unit; 8.6, 8.9 and 12.0 are like the first.
    code |= {f"matmul {c}": compile_for(_matmul_kernel, **matmul, capability=c) for c in (80, 90, 100)}
    code["narrow"] = compile_for(_copy_kernel, **narrow, capability=90)
    code["spilling"] = compile_for(_center_kernel, **center, capability=90, num_warps=1)
    code["descriptors"] = compile_for(_descriptor_kernel, **descriptors, capability=90)
    specializations = {
        "copy": copy,
        "bias": signature_of(_copy_kernel, copy_args | {"bias_ptr": "*bf16", "n": 4097, "BLOCK": 64}),
        "tensor": signature_of(_copy_kernel, copy_args | {"x_ptr": torch.empty(9)[1:], "stride": 2**40}),
    }
    errors = {}
    for name, args in {"unknown": {"z": "i32"}, "missing": {"x_ptr": "*bf16"}}.items():
        try:
            compile_for(_copy_kernel, args, {"bias_ptr": None}, capability=80)
        except TypeError as error:
            errors[name] = str(error)
    return {
        "code": {name: vars(one) for name, one in code.items()},
        "specializations": specializations,
        "errors": errors,
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    root = str(Path(dlgpu.__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), root]))
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    result["code"] = {
        name: MachineCode(**fields | {"instructions": Counter(fields["instructions"])})
        for name, fields in result["code"].items()
    }
    return result


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_copy_has_128_bit_accesses_and_does_not_spill(compiled, capability):
    code = compiled["code"][f"copy {capability}"]
    assert (code.name, code.capability, code.num_warps) == ("_copy_kernel", capability, 4)
    assert code.load_widths == code.store_widths == {128: 1}
    assert 0 < code.registers < 32
    assert (code.spills, code.stack_bytes, code.local_loads, code.local_stores) == (False, 0, 0, 0)
    assert (code.shared_bytes, code.fits, code.matrix_instructions) == (0, True, {})


@pytest.mark.parametrize(("capability", "stem"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_matmul_has_the_matrix_instruction(compiled, capability, stem):
    code = compiled["code"][f"matmul {capability}"]
    assert {op.split(".")[0] for op in code.matrix_instructions} == {stem}
    assert set(code.load_widths) == {128}
    assert code.shared_bytes > 0
    assert code.fits
    assert (code.tensor_memory_columns > 0) == (capability == 100)


def test_an_unaligned_pointer_narrows_the_loads(compiled):
    code = compiled["code"]["narrow"]
    assert max(code.load_widths) == 16
    assert set(code.store_widths) == {128}


def test_a_spilling_kernel_says_so(compiled):
    code = compiled["code"]["spilling"]
    assert code.spills
    assert code.stack_bytes > 0
    assert code.local_loads > 0
    assert code.local_stores > 0


def test_descriptors_are_bulk_transfers(compiled):
    code = compiled["code"]["descriptors"]
    assert code.load_widths == code.store_widths == {BULK_BITS: 1}


def test_signatures_follow_tritons_rules(compiled):
    found = compiled["specializations"]
    assert found["copy"] == {
        "signature": {
            "x_ptr": "*bf16",
            "y_ptr": "*bf16",
            "n": "i32",
            "stride": "constexpr",
            "bias_ptr": "constexpr",
            "BLOCK": "constexpr",
        },
        "constexprs": {"stride": 1, "bias_ptr": None, "BLOCK": 1024},
        "divisible_by_16": ["x_ptr", "y_ptr", "n"],
    }
    assert found["bias"]["constexprs"] == {"stride": 1, "BLOCK": 64}
    assert found["bias"]["divisible_by_16"] == ["x_ptr", "y_ptr"]
    assert found["tensor"]["signature"] | {"x_ptr": "*fp32", "stride": "i64"} == found["tensor"]["signature"]
    assert found["tensor"]["divisible_by_16"] == ["y_ptr", "n", "stride"]


def test_wrong_names_are_refused(compiled):
    assert compiled["errors"] == {
        "unknown": "_copy_kernel has no parameter z",
        "missing": "_copy_kernel: no type for y_ptr, n, stride",
    }


@pytest.mark.parametrize(
    ("opcodes", "matrix", "loads", "stores"),
    [
        (["HFMA2.MMA", "FFMA", "IMAD", "UTCBAR", "WARPSYNC.ALL"], [], {}, {}),
        (["QGMMA.64x64x32.F32.E4M3.E4M3", "UTCQMMA", "IMMA.16832.S8.S8"], [0, 1, 2], {}, {}),
        (["LDG.E.LTC128B.U16", "LDG.E", "LDG.E.U8.SYS"], [], {16: 1, 32: 1, 8: 1}, {}),
        (["LDGSTS.E.BYPASS.LTC128B.128", "LDGDEPBAR", "UTMALDG.2D"], [], {128: 1, BULK_BITS: 1}, {}),
        (["STG.E.64", "STG.E.ENL2.256", "UTMASTG.3D"], [], {}, {64: 1, 256: 1, BULK_BITS: 1}),
        (["LDL.LU.64", "STL", "LDS.128", "STS.128"], [], {}, {}),
    ],
)
def test_opcodes(opcodes, matrix, loads, stores):
    code = MachineCode("k", 90, 4, 32, 0, 0, 0, Counter(opcodes))
    assert list(code.matrix_instructions) == [opcodes[i] for i in matrix]
    assert (code.load_widths, code.store_widths) == (loads, stores)
    assert code.spills == ("STL" in opcodes)


def test_what_spilled_is_launched_with_more_registers(monkeypatch):
    asked = []

    class Kernel:
        """Spills unless it may take 40 registers."""

        def __getitem__(self, grid):
            def run(*args, **meta):
                asked.append(meta.get("maxnreg"))
                spills = meta["BLOCK"] > 8 and (asked[-1] or 32) < 40
                return types.SimpleNamespace(n_spills=4 if spills else 0)

            return run

    monkeypatch.setattr(_triton, "_spilled", {})
    kernel, other = Kernel(), Kernel()
    for block in (8, 16, 8, 16):
        _triton._run(kernel, (1,), (), {"BLOCK": block, "num_warps": 8})
    assert asked == [None, None, None, 255]
    # Its own register limit stays, and another kernel's launches too.
    _triton._run(other, (1,), (), {"BLOCK": 16, "maxnreg": 32})
    _triton._run(other, (1,), (), {"BLOCK": 16, "maxnreg": 32})
    _triton._run(other, (1,), (), {"BLOCK": 8, "num_warps": 8})
    assert asked[4:] == [32, 32, None]
    # A block of 1,024 threads has 64 each.
    assert [_triton.most_registers(warps) for warps in (1, 8, 16, 32)] == [255, 255, 128, 64]


def test_arguments_of_calls_are_no_spills():
    def spills(*opcodes, stack_bytes=8):
        return MachineCode("k", 120, 4, 32, stack_bytes, 0, 0, Counter(opcodes)).spills

    assert not spills("UTMALDG.2D", "STL.64", "CALL.ABS.NOINC")
    assert spills("UTMALDG.2D", "STL.64", "CALL.ABS.NOINC", "LDL.64")
    assert spills("UTMALDG.2D", "STL.64")
    assert spills("UTMALDG.2D")
    assert not spills("UTMALDG.2D", stack_bytes=0)


def test_shared_memory_limits():
    limits = {c: machine_code.shared_memory_limit(c) // 1024 for c in CAPABILITIES}
    assert limits == {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    assert not MachineCode("k", 86, 4, 32, 0, 100 * 1024, 0, Counter()).fits
    with pytest.raises(ValueError, match="capability"):
        machine_code.shared_memory_limit(87)


def test_interpreted_kernels_are_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_for(_copy_kernel, {}, {}, capability=80)
    # Defined while it was set, it stays interpreted.
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        signature_of(_copy_kernel, {})


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
