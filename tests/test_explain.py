"""`dlgpu-bench explain`: what is launched, what it becomes, and what is said of it. Compiles in processes of their own."""

import re
from collections import Counter

import pytest
import torch

from dlgpu.bench import explain, interpreted, launches, laws, measure, model
from dlgpu.bench.__main__ import main
from dlgpu.bench.cases import BOTH, OPS
from dlgpu.bench.environment import UsageError

machine_code = pytest.importorskip("dlgpu.bench.machine_code")


def code(capability, warps, registers, shared=0, columns=0):
    return machine_code.MachineCode("kernel", capability, warps, registers, 0, shared, columns, Counter())


@pytest.mark.parametrize(
    ("found", "blocks", "occupancy"),
    [
        # By registers: 240 x 32 x 4 for each block, of 65,536; and by shared memory, of 228 KiB with 1 KiB for the driver.
        (code(90, 4, 238, 114712), 2, 0.125),
        (code(90, 4, 238, 60000), 2, 0.125),
        (code(90, 8, 32, 114712), 1 + 1, 0.25),
        (code(80, 8, 64), 4, 0.5),
        # By the number of blocks, of warps.
        (code(86, 1, 32), 16, 16 / 48),
        (code(89, 8, 32), 6, 1.0),
        # The driver takes nothing on 7.5.
        (code(75, 4, 32, 32 * 1024), 2, 0.25),
        (code(80, 4, 32, 81 * 1024), 2, 0.125),
        (code(80, 4, 32, 82 * 1024), 1, 0.0625),
        # By tensor memory; and what does not fit at all.
        (code(100, 4, 32, 0, 256), 2, 0.125),
        (code(86, 4, 32, 100 * 1024), 0, 0.0),
    ],
)
def test_occupancy(found, blocks, occupancy):
    assert (found.blocks, found.occupancy) == (blocks, pytest.approx(occupancy))


def test_a_gpu_by_name_or_capability():
    assert explain.find_gpu("H200")[:2] == (90, 132)
    assert explain.find_gpu("8.6")[0] == explain.find_gpu("86")[0] == 86
    assert explain.find_gpu("10.0")[0] == 100
    assert "capability 12.0" in explain.find_gpu("120")[2]
    for wrong in ("", "h300", "7.0", "9"):
        with pytest.raises(UsageError, match="unknown GPU"):
            explain.find_gpu(wrong)


def test_every_op_is_explained():
    names = list(OPS)
    found = {
        row["op"]: row for row in interpreted.run("launches", "90", *names, module="binaries", timeout_s=120)
    }
    assert list(found) == names
    for name, row in found.items():
        assert row["kernels"], name
        if name == "training_step":
            continue
        # What dlgpu.explain says a training step launches is what it launches.
        said = Counter(step.split(" (")[0] for step in row["choices"])
        launched = Counter(kernel.split("(")[0] for kernel in row["kernels"])
        assert said == launched, name


def test_the_explanation_of_a_softmax(capsys):
    status = main(
        ["explain", "softmax", "--shape", "N=1000,V=4096", "--gpu", "8.0", "--no-meter", "--dtype", "bf16"]
    )
    out = capsys.readouterr().out
    assert status == 0
    nbytes = 1000 * 4096 * 2
    for part in (
        "softmax fwd+bwd N=1000 V=4096 bfloat16 on capability 8.0",
        OPS["softmax"].equation,
        "kernels/softmax.py",
        "_softmax_fwd_kernel",
        "reads each row once",
        "128-bit loads, no spills",
        f"In all: 2 launches, {5 * nbytes / 1e6:.4g} MB",
        "a COUNT",
        "torch eager: 2 launches",
    ):
        assert part in out
    rows = re.findall(
        r"^  _softmax_(fwd|bwd)_kernel +(\d+) +([\d.]+) MB .* (\d+) +\d+ .*B +(\d+) +(\d+)%", out, re.M
    )
    assert [row[0] for row in rows] == ["fwd", "bwd"]
    assert [float(row[2]) for row in rows] == pytest.approx([2 * nbytes / 1e6, 3 * nbytes / 1e6], rel=1e-3)
    assert all(int(blocks) >= 1 and 0 < int(share) <= 100 for *_, blocks, share in rows)


def test_bytes_are_the_laws_where_there_are_some():
    record = {
        "kernel": "_k",
        "operands": {"x_ptr": {"nbytes": 100, "itemsize": 4}},
        "sizes": {"N": 5},
        "rule": "",
    }
    step = {"kind": "launch", "record": record}
    assert explain._bytes(step, None) == 100

    class Twice(laws.Laws):
        def __call__(self, record):
            assert isinstance(record, launches.Record)
            return laws.Traffic(record.bytes_of("x_ptr"), 2 * record["N"], 0)

    assert explain._bytes(step, Twice(())) == 110
    assert explain._bytes({"kind": "torch", "nbytes": 7}, None) == 7


def test_laws_that_do_not_hold_are_said_to(monkeypatch):
    def run(job, *arguments, module="interpreted"):
        if job == "laws":
            return iter([{"op": "softmax", "error": "no law fits"}])
        return iter([{"kind": "torch", "name": "aten.mm.default", "nbytes": 12}])

    monkeypatch.setattr(interpreted, "run", run)
    monkeypatch.setattr(model, "_LAWS", {})
    case = measure.Case(OPS["softmax"], {"N": 4, "V": 8}, BOTH, torch.bfloat16)
    _, steps, origin = explain.explained(case, 90, 132)
    assert steps[0]["nbytes"] == 12
    assert "no law fits" in origin


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sofmax"], "softmax"),
        (["softmax", "--gpu", "h999"], "unknown GPU"),
        (["softmax", "--shape", "Q=3"], "unknown size"),
        (["softmax", "--shape", "huge"], "unknown shape"),
        (["softmax", "--pass", "step"], "unknown pass"),
        (["linear", "--option", "activation=cosine"], "unknown value"),
        (["linear", "--gpu", "t4", "--dtype", "bfloat16"], "capability 8.0"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_failing_compiler_is_one_line(monkeypatch, capsys):
    def run(*arguments, **settings):
        raise interpreted.InterpreterError("Triton's compiler, explain: no assembler")

    monkeypatch.setattr(interpreted, "run", run)
    assert main(["explain", "softmax", "--no-meter"]) == 2
    assert "no assembler" in capsys.readouterr().err
