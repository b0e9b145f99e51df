"""`dlgpu-bench gpu`: its stages rehearsed, ended in the middle and gone on with; and the parts that no rehearsal reaches."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dlgpu
from dlgpu import _dispatch
from dlgpu.bench import __main__ as cli
from dlgpu.bench import gpu_run, smallest, stages, targets, testlog, tools
from dlgpu.bench.cases import BOTH, OPS, STEP
from dlgpu.bench.environment import describe
from dlgpu.bench.launches import Record, dry_run
from dlgpu.bench.laws import _patched
from dlgpu.bench.measure import Case
from dlgpu.bench.providers import BOUNDS, PROVIDERS, offered
from dlgpu.bench.report import Console, load
from dlgpu.bench.stages import Piece
from dlgpu.bench.timers import CpuTimer
from dlgpu.kernels import _triton, tuning
from dlgpu.ops import optimizers

ROOT = Path(__file__).resolve().parents[1]
rehearsed = pytest.mark.skipif(not _triton.INTERPRETED, reason="a rehearsal is for machines without a GPU")


def start(out, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dlgpu.bench", "gpu", "--rehearse", "--out", str(out), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended_pieces(out, stage):
    """The pieces that are done; a results file is whole whenever it is there."""
    path = out / stages.RESULTS
    found = load(path)["pieces"].get(stage, {}) if path.exists() else {}
    return {name for name, piece in found.items() if piece["how"] == "done"}


def wait_for(process, out, stage, more_than):
    until = time.monotonic() + 200
    while not len(done := ended_pieces(out, stage)) > more_than:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    return done


def timings(out):
    return {
        row["piece"]: row["samples_a_s"]
        for row in load(out / stages.RESULTS)["rows"]
        if row["kind"] == "timing"
    }


@rehearsed
def test_a_rehearsal_that_is_ended_twice_and_gone_on_with(tmp_path):
    out = tmp_path / "results"
    process = start(out, "--stage", "bench")
    # Ceilings and who is absent are pieces too.
    wait_for(process, out, "bench", 2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Interrupted" in said
    assert load(out / stages.RESULTS)["status"] == "interrupted"
    first = timings(out)
    assert first

    process = start(out, "--stage", "bench")
    wait_for(process, out, "bench", len(ended_pieces(out, "bench")))
    process.kill()
    process.wait()
    assert load(out / stages.RESULTS)["status"] == "running"
    second = timings(out)
    assert second.items() >= first.items()
    assert len(second) > len(first)

    said, _ = start(out).communicate(timeout=400)
    document = load(out / stages.RESULTS)
    assert document["status"] == "complete", said
    assert document["calls"] == 3
    assert timings(out).items() >= second.items()
    for stage in stages.STAGES:
        assert ended_pieces(out, stage) == {piece.id for piece in stages.plan(stage, True)}
    rows = document["rows"]
    kinds = {row["kind"] for row in rows}
    assert kinds == {"tests", "checker", "tuned", "ceiling", "absent", "timing", "achieved", "counter"}
    # As many times as there are pieces: nothing was measured twice.
    pairs = [(row["piece"], row["b"]) for row in rows if row["kind"] == "timing"]
    assert len(pairs) == len(set(pairs))
    (tests,) = [row for row in rows if row["kind"] == "tests"]
    assert tests["passed"] == 4
    (counter,) = [row for row in rows if row["kind"] == "counter"]
    assert [kernel["kernel"] for kernel in counter["kernels"]] == [
        "_softmax_fwd_kernel",
        "_softmax_bwd_kernel",
    ]
    assert counter["law_bytes"] == next(r for r in rows if r["kind"] == "achieved")["compulsory_bytes"]
    # The bytes are known last, and are in the timing rows all the same.
    softmax = [row for row in rows if row["kind"] == "timing" and row["op"] == "softmax"]
    assert softmax
    for row in softmax:
        assert row["compulsory_bytes"] == counter["law_bytes"]
        assert row["unfused_bytes"] >= row["compulsory_bytes"]
        assert row["bytes_per_s"] == pytest.approx(row["compulsory_bytes"] / row["samples_a_s"][0])
    # What was stood in for is in no result as if it were here.
    assert {row["provider"] for row in rows if row["kind"] == "absent"} >= {
        name for name in PROVIDERS if importlib.util.find_spec(PROVIDERS[name].module) is None
    }
    text = (out / stages.RESULTS).read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text


def test_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "find_gpu", lambda: None)
    assert cli.main(["gpu", "--out", str(tmp_path / "results")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == "dlgpu-bench: error: gpu: no NVIDIA GPU was found here (--rehearse runs the same code without one)\n"
    )
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments", [["--stage", "bench,nothing"], ["--minutes", "0"], ["--stage", ","]])
def test_bad_arguments(arguments, tmp_path, capsys):
    assert cli.main(["gpu", *arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["gpu", "--rehearse", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write results" in capsys.readouterr().err


# The runner, with processes that do as they are told.

CHILD = """
import json, os, sys, time
task = json.load(sys.stdin)
def say(**event):
    print(json.dumps(event), flush=True)
for piece in task["pieces"]:
    say(begin=piece)
    say(row={"section": task["stage"], "kind": "skipped", "title": piece, "reason": "told to"}, piece=piece)
    what = piece.split()[0]
    if what == "die":
        os._exit(9)
    if what == "hang":
        time.sleep(600)
    say(end=piece, how={"fail": "failed", "leave": "left"}.get(what, "done"))
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Runs one call over pieces of these names; gives the results."""
    monkeypatch.setattr(gpu_run, "module_command", lambda *args: [sys.executable, "-S", "-c", CHILD])
    monkeypatch.setattr(gpu_run, "LEAST_S", 0.01)

    def run(pieces, seconds=60.0, environment=None):
        about = describe("cpu", "a test", None) | (environment or {})
        results = gpu_run.Kept(tmp_path, {}, about, True)
        plan = {"check": [], "bench": [], **pieces}
        until = time.monotonic() + seconds
        with open(os.devnull, "w") as sink:
            made = gpu_run.Runner(
                results, Console(sink), tmp_path, until, True, None, lambda stage, rehearse: plan[stage]
            )
            made.run(list(plan))
            run.left = {stage: [piece.id for piece in made.left(stage)] for stage in plan}
        results.finish("complete")
        return load(tmp_path / stages.RESULTS)

    return run


def hows(document, stage):
    return {name: piece["how"] for name, piece in document["pieces"][stage].items()}


def titles(document, kind="skipped"):
    return [row["title"] for row in document["rows"] if row["kind"] == kind]


def test_a_process_that_dies_takes_one_piece_with_it(runner):
    pieces = {"check": [Piece("a"), Piece("die b"), Piece("c")], "bench": [Piece("d")]}
    document = runner(pieces)
    assert hows(document, "check") == {"a": "done", "die b": "failed", "c": "done"}
    assert hows(document, "bench") == {"d": "done"}
    (error,) = [row for row in document["rows"] if row["kind"] == "error"]
    assert "status 9" in error["message"]
    assert gpu_run.status_of(document["rows"]) == 2


def test_what_failed_is_tried_once_more_and_in_another_call(runner):
    pieces = {"check": [Piece("fail a"), Piece("b")]}
    document = runner(pieces)
    assert titles(document) == ["fail a", "b"]
    document = runner(pieces)
    # Its rows are replaced.
    assert titles(document) == ["b", "fail a"]
    assert document["pieces"]["check"]["fail a"]["tries"] == 2
    again = runner(pieces)
    assert again["pieces"]["check"]["fail a"]["tries"] == 2
    assert again["calls"] == 3


def test_a_piece_past_its_limit_is_ended_and_the_next_goes_on(runner):
    document = runner({"check": [Piece("hang a", limit_s=0.3), Piece("b")]})
    assert hows(document, "check") == {"hang a": "failed", "b": "done"}


def test_the_time_of_a_call_is_kept_to_and_shared(runner):
    began = time.monotonic()
    document = runner({"check": [Piece("hang a")], "bench": [Piece("b")]}, seconds=2.0)
    assert time.monotonic() - began < 6
    # What was cut short is no failure, and the stage after it had its share.
    assert hows(document, "check") == {"hang a": "left"}
    assert hows(document, "bench") == {"b": "done"}
    # Cut short twice: its row stands once.
    assert titles(document).count("hang a") == 1


def test_what_each_process_does_anew_is_no_reason_to_start_one(runner):
    pieces = {"bench": [Piece("ceilings", again=True), Piece("b")]}
    assert titles(runner(pieces)) == ["ceilings", "b"]
    assert runner.left["bench"] == []
    assert titles(runner(pieces)) == ["ceilings", "b"]


def test_results_of_other_code_are_set_aside(runner, tmp_path):
    (tmp_path / stages.TESTS).write_text("{}\n")
    runner({"check": [Piece("a")]}, environment={"source_hash": "one"})
    assert (tmp_path / "tests-before-1.jsonl").exists()
    document = runner({"check": [Piece("b")]}, environment={"source_hash": "two"})
    assert titles(document) == ["b"]
    assert titles(load(tmp_path / "gpu-before-1.json")) == ["a"]


@pytest.mark.parametrize("pieces", [None, [], {"check": 1}, {"check": {"a": {"how": "done"}}}])
def test_results_without_a_known_state_are_set_aside(pieces, runner, tmp_path):
    runner({"check": [Piece("a")]})
    path = tmp_path / stages.RESULTS
    path.write_text(json.dumps({**json.loads(path.read_text()), "pieces": pieces}))
    assert titles(runner({"check": [Piece("b")]})) == ["b"]
    assert (tmp_path / "gpu-before-1.json").exists()


@pytest.mark.parametrize("text", ["", "{", '{"schema": "other"}'])
def test_a_results_file_that_cannot_be_read_is_left_alone(text, tmp_path, capsys):
    (tmp_path / stages.RESULTS).write_text(text)
    assert cli.main(["gpu", "--rehearse", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / stages.RESULTS).read_text() == text


def test_wrong_results_have_the_status_of_wrong_results():
    def row(kind, **more):
        return {"kind": kind, **more}

    assert gpu_run.status_of([row("tests", failed=0), row("checker", errors=0), row("absent")]) == 0
    assert gpu_run.status_of([row("timing", reached="missed")]) == 0
    assert gpu_run.status_of([row("tests", failed=1), row("error")]) == 3
    assert gpu_run.status_of([row("checker", errors=2)]) == 3
    assert gpu_run.status_of([row("wrong")]) == 3
    assert gpu_run.status_of([row("tests", failed=0), row("error")]) == 2


# The vendor's tools.

MEMCHECK = """\
========= COMPUTE-SANITIZER
dlgpu-begin {"name": "softmax"}
========= Invalid __global__ read of size 4 bytes
=========     at _softmax_fwd_kernel+0x1a0 in softmax.py:80
=========     by thread (32,0,0) in block (1,0,0)
=========     Address 0x7f0000000210 is out of bounds
=========     and is 17 bytes after the nearest allocation at 0x7f0000000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: _other_kernel [0x2f3d1] in libcuda.so.1
=========
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on cuCtxSynchronize.
=========     Saved host backtrace up to driver entry point at error
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _sum_kernel+0x40 in linear.py:9
=========     and Read access at _sum_kernel+0x80 in linear.py:12 [96 hazards]
=========
========= Warning: Race reported between Read access at void at::native::reduce_kernel<512>(int)+0x5a0
=========     and Write access at void at::native::reduce_kernel<512>(int)+0x6b0 [8 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x90 in linear.py:40:_linear_kernel
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Barrier error detected. Divergent thread(s) in block
=========     at _linear_kernel+0x60
=========
========= ERROR SUMMARY: 2 errors
"""


def test_what_the_checkers_say():
    def found(text):
        return [(f.kernel, f.text.split(" ")[0]) for f in tools.findings(text.splitlines())]

    assert found(MEMCHECK) == [("_softmax_fwd_kernel", "Invalid"), ("", "Program")]
    assert found(RACECHECK) == [("_sum_kernel", "Error:"), ("", "Warning:")]
    assert found(INITCHECK) == [("_linear_kernel", "Uninitialized"), ("_linear_kernel", "Barrier")]
    assert found("========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n") == []
    assert tools.tool_failure(["========= Error: Device not supported. Please refer to the documentation"])
    assert not tools.tool_failure(MEMCHECK.splitlines())


PROFILE = """\
==PROF== Connected to process 12
dlgpu-begin {}
"ID","Process ID","Host Name","Kernel Name","CC","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","","byte","byte","ns"
"0","12","box","_softmax_fwd_kernel","9.0","1,024","512","2,000"
"1","12","box","void at::vectorized<4>(int, float)","9.0","8.5","0","1000"
==PROF== Disconnected
"""


def test_what_the_profiler_says():
    found = tools.counters(PROFILE.splitlines())
    assert [row["kernel"] for row in found] == ["_softmax_fwd_kernel", "void at::vectorized<4>"]
    assert found[0] == {
        "kernel": "_softmax_fwd_kernel",
        "read_bytes": 1024,
        "written_bytes": 512,
        "seconds": 2e-6,
    }
    assert tools.counters(["==ERROR== ERR_NVGPUCTRPERM"]) == []
    assert "ERR_NVGPUCTRPERM" in tools.tool_failure(["==ERROR== ERR_NVGPUCTRPERM"])
    with pytest.raises(ValueError, match="dram__bytes_write"):
        tools.counters(PROFILE.replace("dram__bytes_write.sum", "dram__bytes_other.sum").splitlines())


def test_counters_stand_beside_the_laws():
    record = Record("_softmax_fwd_kernel", {}, {})

    class Law:
        read, written = 1000, 500

    ours = tools.counters(PROFILE.splitlines())
    row = stages._beside([record], ours, lambda record: Law)
    assert row["hardware_bytes"] == 1536
    assert row["over_law"] == 1536 / 1500
    assert len(row["others"]) == 1
    with pytest.raises(RuntimeError, match="saw 1 launches of dlgpu's kernels, not 2"):
        stages._beside([record, record], ours, lambda record: Law)


@pytest.mark.parametrize("where", ["path", "toolkit", "package", "nowhere"])
def test_where_a_tool_is_looked_for(where, tmp_path, monkeypatch):
    name = "a-vendors-checker"
    places = {
        "path": tmp_path / name,
        "toolkit": tmp_path / "cuda" / "bin" / name,
        "package": tmp_path / "site" / "nvidia" / "cu13" / "bin" / name,
        "nowhere": tmp_path / "elsewhere" / name,
    }
    tool = places[where]
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text("#!/bin/sh\n")
    assert tools.find(name) is None
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert tools.find(name) == (None if where == "nowhere" else [str(tool)])


def test_checkers_findings_go_to_the_op_whose_kernel_it_is(tmp_path, monkeypatch):
    """A tool that prints late, dies in the second of three ops, and is started again for the rest."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import sys, json\n"
        "names = sys.argv[sys.argv.index('check') + 1:]\n"
        "def say(how, name, **more):\n"
        "    print(how + json.dumps({'name': name, **more}), flush=True)\n"
        "print('========= COMPUTE-SANITIZER')\n"
        "for name in names:\n"
        "    say('dlgpu-begin ', name)\n"
        "    if name == 'linear':\n"
        "        say('dlgpu-failed ', name, message='RuntimeError: CUDA error')\n"
        "        break\n"
        "    say('dlgpu-done ', name, launches=[{'kernel': f'_{name}_kernel'}])\n"
        "print('========= Invalid __global__ read of size 4 bytes')\n"
        "print('=========     at _softmax_kernel+0x10')\n"
        "print('=========')\n"
        "print('========= ERROR SUMMARY: 1 error')\n"
    )
    monkeypatch.setattr(stages.tools, "find", lambda name: [sys.executable, "-S", str(fake)])
    events = []

    class Tell:
        def row(self, piece, row):
            events.append((piece, row["kind"], row.get("errors")))

        def begin(self, piece):
            pass

        def end(self, piece, how="done"):
            events.append((piece, how))

    pieces = [f"memcheck {name}" for name in ("softmax", "linear", "dropout")]
    stages._check(stages.Task("check", pieces, 60, str(tmp_path)), Tell())
    assert events == [
        ("memcheck softmax", "checker", 1),
        ("memcheck softmax", "done"),
        ("memcheck linear", "checker", 0),
        ("memcheck linear", "error", None),
        ("memcheck linear", "failed"),
        # Found in a kernel that this second process did not run before: it is nobody's but the case's at hand.
        ("memcheck dropout", "checker", 1),
        ("memcheck dropout", "done"),
    ]


def test_an_absent_checker_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.tools, "find", lambda name: None)
    rows = []

    class Tell:
        begin = end = lambda self, piece, how="done": None

        def row(self, piece, row):
            rows.append(row)

    stages._check(stages.Task("check", ["memcheck softmax", "racecheck softmax"], 60, str(tmp_path)), Tell())
    assert [(row["kind"], row["provider"]) for row in rows] == [("absent", tools.SANITIZER)]
    task = stages.Task("profile", ["counters softmax"], 60, str(tmp_path))
    assert [row["kind"] for row in stages._counted("softmax", [], None, task)] == ["absent"]


def test_the_smallest_cases_launch_every_kernel():
    kernels = set()
    for path in (ROOT / "kernels").glob("*.py"):
        kernels |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    launched = set()
    for name in smallest.NAMES:
        for case in smallest.cases(name):
            # A GPU with 132 multiprocessors of capability 9.0.
            with _patched(case.patches):
                steps = dry_run(
                    lambda case=case: case.bind("meta"), (90, 227 << 10, 132), warm=case.passes == STEP
                )
            launched |= {step.kernel for step in steps if isinstance(step, Record)}
    assert launched == kernels


# Goals.


def timing(ratio, low, high, **more):
    row = {
        "section": "gpu",
        "kind": "timing",
        "op": "cross_entropy",
        "options": OPS["cross_entropy"].defaults(),
        "passes": BOTH,
        "shape": dict(OPS["cross_entropy"].shapes["h200-llama2"]),
        "dtype": "bfloat16",
        "note": "",
        "timer": "events",
        "a": "dlgpu",
        "b": "eager",
        "samples_a_s": [1e-3],
    }
    return {**row, "ratio": ratio, "low": low, "high": high, **more}


def test_goals_are_met_missed_or_open():
    # 3 N V 2 bytes in 1 ms.
    copy = {"copy, bytes read and written": 3 * 8192 * 32000 * 2 / 1e-3 / 0.95}
    for ratio, reached in ((0.4, "met"), (0.9, "missed"), (1 / 1.9, "open")):
        row = targets.judge(timing(ratio, ratio * 0.99, ratio * 1.01), [], copy)
        assert row["reached"] == reached
        assert row["target"] == ">= 93% of the copy ceiling; >= 1.9x eager"
        assert [target["met"] for target in row["targets"]] == [
            True,
            {"met": True, "missed": False}.get(reached),
        ]
        assert row["targets"][0]["value"] == pytest.approx(0.95)
    slow = targets.judge(timing(0.4, 0.39, 0.41, samples_a_s=[2e-3]), [], copy)
    assert slow["reached"] == "missed"
    # Nothing is said of what no ceiling was measured for, or of another shape.
    assert targets.judge(timing(0.4, 0.39, 0.41, b="cupy"), [], {}) == timing(0.4, 0.39, 0.41, b="cupy")
    other = timing(0.4, 0.39, 0.41, shape={"N": 1, "V": 2})
    assert targets.judge(other, [], copy) == other


def test_goals_of_other_kinds():
    lean = timing(
        1.5, 1.49, 1.51, op="linear_cross_entropy", b="cublaslt", options={"memory": "lean"},
        shape=dict(OPS["linear_cross_entropy"].shapes["h200-8k"]), peak_memory_a_bytes=2**30,
    )  # fmt: skip
    assert [target["met"] for target in targets.judge(lean, [], {})["targets"]] == [False, True]
    adam = {"op": "adam", "passes": STEP, "dtype": "float32", "options": OPS["adam"].defaults()}
    shapes = OPS["adam"].shapes
    flat = timing(1, 1, 1, **adam, shape=dict(shapes["h200-300m"]), samples_a_s=[1.0])
    many = timing(1, 1, 1, **adam, shape=dict(shapes["h200-300m-1000"]), samples_a_s=[1.01])
    assert targets.judge(many, [flat], {})["reached"] == "met"
    assert "reached" not in targets.judge(many, [], {})
    slower = {**many, "samples_a_s": [1.03]}
    assert targets.judge(slower, [flat], {})["reached"] == "missed"
    host = timing(1, 1, 1, **adam, shape=dict(shapes["small"]), b="torch-fused", host_a_s=1e-5, host_b_s=3e-5)
    assert targets.judge(host, [], {})["reached"] == "met"
    # A variant's goal is not the op's.
    clipped = timing(
        0.9, 0.89, 0.91, **adam, shape=dict(shapes["h200-300m"]), b="torch-fused", note=targets.CLIPPED
    )
    assert targets.judge(clipped, [], {})["target"] == ">= 1.2x torch-fused"


def test_every_goal_is_measured():
    benches = stages._benches(False)
    assert len({bench.id for bench in benches}) == len(benches)
    ran = [
        (goal, bench)
        for goal in targets.GOALS
        for bench in benches
        for rival in bench.rivals
        if goal.of_row(
            {
                "op": bench.case.op,
                "shape": dict(bench.case.shape),
                "passes": bench.case.passes,
                "b": rival,
                "options": dict(bench.case.options),
                "timer": bench.timer or "events",
                "note": bench.case.note,
            }
        )
    ]
    # Others' libraries are measured where they are installed.
    unmeasured = [g for g in targets.GOALS if all(g is not goal for goal, _ in ran)]
    assert not [g for g in unmeasured if PROVIDERS.get(g.against, PROVIDERS["eager"]).module == "torch"]


def test_the_cases_can_be_bound():
    """Names of shapes, options and rivals are right: every case is made, and run on tensors without memory."""
    for bench in stages._benches(False):
        op = bench.case.described
        for rival in bench.rivals:
            assert rival in PROVIDERS
            assert not offered(op, rival, bench.case.options, bench.case.passes)
        if bench.case.passes != STEP and not any(rival in BOUNDS for rival in bench.rivals):
            fake = bench.case.__class__(
                op, bench.case.shape, bench.case.passes, bench.case.dtype, bench.case.options, "meta"
            )
            fake.bind(op.functions["eager"], 0)()


def test_three_calls_are_enough():
    """What the pieces are expected to take, against their stages' part of 27 minutes."""
    part = sum(stages.STAGES[name] for name in ("tune", "bench", "profile")) / sum(stages.STAGES.values())
    needed = sum(piece.needs_s for name in ("tune", "bench", "profile") for piece in stages.plan(name))
    assert needed <= part * 27 * 60


# The plugin for tests.


def test_the_log_of_a_test_run(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='so')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no')\n"
        "def test_setup_fails(broken): pass\n"
    )
    (tests / "test_absent.py").write_text("import a_package_that_is_not_here\n")
    (tests / "test_gpu.py").write_text("def test_first(): pass\n")
    (tests / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    log, done = tmp_path / "log.jsonl", tmp_path / "done"
    log.write_text('{"id": "half a li')
    done.write_text("test_some.py::test_passes\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "DLGPU_TESTS_LOG": str(log)}
    environment |= {"DLGPU_TESTS_DONE": str(done), "DLGPU_TESTS_SOURCE": "x", "DLGPU_TESTS_SYNC": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    arguments = [
        "-p",
        "dlgpu.bench.testlog",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-q",
    ]
    log.write_text("")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "."],
        cwd=tests,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["id"].rpartition("::")[2], entry["outcome"]) for entry in found] == [
        ("test_absent.py", "uncollected"),
        ("test_first", "passed"),
        ("test_fails", "failed"),
        ("test_skipped", "skipped"),
        ("test_setup_fails", "failed"),
    ]
    assert "assert 1 == 2" in found[2]["message"]
    with log.open("a") as file:
        file.write(
            '{"id": "test_some.py::test_other", "outcome": "passed", "seconds": 1, "source": "other code"}\n'
        )
        file.write('{"id": "half a li')
    rows = list(stages.summary(log, "x"))
    assert [(row["kind"], row.get("title", row.get("provider"))) for row in rows] == [
        ("absent", "test_absent.py"),
        ("tests", "test_gpu.py"),
        ("tests", "test_some.py"),
    ]
    assert (rows[2]["passed"], rows[2]["failed"], rows[2]["skipped"]) == (0, 2, 1)
    assert len(rows[2]["failures"]) == 2


def test_without_hypothesis(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("hypothesis", "expecttest")]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("hypothesis", "expecttest") else find(name, *rest),
    )
    assert testlog.stand_in() == ["hypothesis", "expecttest"]
    stands_in = {name: sys.modules[name] for name in ("hypothesis", "hypothesis.strategies", "expecttest")}
    for name in stands_in:
        # As those do that look whether it is there.
        assert name in ("hypothesis", "expecttest") or find(name) is not None
        del sys.modules[name]
    hypothesis, st = stands_in["hypothesis"], stands_in["hypothesis.strategies"]
    hypothesis.settings.register_profile("x", suppress_health_check=[hypothesis.HealthCheck.too_slow])

    @hypothesis.settings(max_examples=3)
    @hypothesis.given(st.integers(1, 3) | st.just(4), st.data())
    @hypothesis.example(1)
    def test_property(x, data):
        raise AssertionError

    assert test_property.pytestmark[0].name == "skip"
    assert test_property.__name__ == "test_property"


def test_waiting_in_an_op_or_a_step_would_show(monkeypatch):
    for thing, names in ((_dispatch.Op, ("__call__", "below")), (optimizers, ("step",))):
        for name in names:
            monkeypatch.setattr(thing, name, getattr(thing, name))
    modes = [0]
    testlog.watch_ops(lambda: modes[-1], modes.append, always=True)
    x = torch.randn(4, 8, requires_grad=True)
    with dlgpu.use_backend("fallback"):
        dlgpu.functional.softmax(x, -1).sum().backward()
    assert modes == [0]
    monkeypatch.setattr(_dispatch, "_debug", True)
    with dlgpu.use_backend("fallback"):
        dlgpu.functional.softmax(x, -1)
    monkeypatch.setattr(_dispatch, "_debug", False)
    assert modes == [0]
    backend = "triton" if _triton.INTERPRETED else "fallback"
    with dlgpu.use_backend(backend):
        if backend == "triton":
            dlgpu.functional.softmax(x, -1).sum().backward()
            # Forward, its op below autograd, and backward's; each mode is put back.
            assert modes.count("error") >= 3
        assert modes[-1] == 0
        before = len(modes)
    optimizer = dlgpu.optim.SGD([x], lr=0.1)
    optimizer.step()
    assert modes[before:] == ["error", 0]


def test_an_error_in_a_watched_step_leaves_the_mode_as_it_was(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("called a synchronizing CUDA operation")

    for name in ("__call__", "below"):
        monkeypatch.setattr(_dispatch.Op, name, getattr(_dispatch.Op, name))
    monkeypatch.setattr(optimizers, "step", fails)
    modes = [0]
    testlog.watch_ops(lambda: modes[-1], modes.append, always=True)
    with pytest.raises(RuntimeError, match="synchronizing"):
        optimizers.step(None, [torch.zeros(1)])
    assert modes == [0, "error", 0]


# What a rehearsal replaces: the same code, with as little in its place as can be.


def test_a_case_is_measured_and_judged_as_on_a_gpu(tmp_path, monkeypatch):
    asked = []

    def timer_for(device, name, cache):
        asked.append((device, name, cache))
        return CpuTimer(sleep=lambda seconds: None), name or "host", cache or "host"

    monkeypatch.setattr(stages, "timer_for", timer_for)
    monkeypatch.setattr(stages, "CASE_S", 0.1)
    op = OPS["adam"]
    case = Case(op, op.shapes["small"], STEP, torch.float32, {}, "cpu")
    goal = targets.Goal("adam", ("small",), STEP, "speed-up", 1e-6, "eager", timer="host")
    monkeypatch.setattr(stages, "judge", lambda *args: targets.judge(*args, goals=[goal]))
    bench = stages._Bench("a case", case, ("eager", "torch-fused", "quack"), "", "hot")
    monkeypatch.setattr(stages, "_benches", lambda rehearse: [bench])
    monkeypatch.setattr(stages, "_use_tuned", lambda out: "tuned")
    work = stages._bench_work(stages.Task("bench", ["a case"], 60, str(tmp_path)))
    rows = list(work["a case"]())
    assert [(row["kind"], row["b"]) for row in rows] == [("timing", "eager"), ("timing", "torch-fused")]
    assert asked == [("cuda", "", "hot")]
    assert rows[0]["reached"] == "met"
    assert "reached" not in rows[1]
    assert rows[0]["config"] == "tuned"


def test_tiles_tuned_before_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA X1")
    monkeypatch.setenv("DLGPU_CACHE_DIR", "elsewhere")
    monkeypatch.setattr(stages._Folder, "name", "")
    assert stages._use_tuned(tmp_path) == ""
    (tmp_path / "nvidia-x1.json").write_text("a table")
    assert stages._use_tuned(tmp_path)
    assert tuning.user_path("NVIDIA X1").read_text() == "a table"
    shutil.rmtree(stages._Folder.name)


TESTS_THAT_DIE = """
import json, os, sys
assert os.environ["DLGPU_TESTS_SYNC"] == "error"
log, done = os.environ["DLGPU_TESTS_LOG"], open(os.environ["DLGPU_TESTS_DONE"]).read().split()
for name, outcome in (("t.py::a", "passed"), ("t.py::b", "failed"), ("t.py::c", "passed")):
    if name in done:
        continue
    with open(log, "a") as file:
        entry = {"id": name, "outcome": outcome, "seconds": 1, "source": os.environ["DLGPU_TESTS_SOURCE"]}
        file.write(json.dumps(entry) + "\\n")
    if outcome == "failed":
        os._exit(3)
"""


@pytest.mark.parametrize(("script", "how"), [(TESTS_THAT_DIE, "done"), ("import os; os._exit(4)", "failed")])
def test_tests_that_a_test_ends_go_on_behind_it(script, how, tmp_path, monkeypatch):
    calls, events = [], []

    def command(task, done):
        calls.append(done)
        return [sys.executable, "-S", "-c", script]

    monkeypatch.setattr(stages, "_pytest", command)

    class Tell:
        def begin(self, piece):
            pass

        def row(self, piece, row):
            events.append(row)

        def end(self, piece, how="done"):
            events.append(how)

    stages._correctness(stages.Task("correctness", ["the tests"], 60, str(tmp_path), False, "x"), Tell())
    assert events[-1] == how
    if how == "done":
        assert len(calls) == 2
        assert [(row["passed"], row["failed"]) for row in events[:-1]] == [(2, 1)]
    else:
        assert "status 4" in events[0]["message"]


def test_the_whole_suite_is_what_is_run():
    arguments = stages._pytest(stages.Task("correctness", ["the tests"], 60, "out"), "done")
    assert arguments[-1] == str(ROOT / "tests")
    assert arguments[arguments.index("-m", 3) + 1] == "not perf"
    help_text = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments[3:-1], "-p", "no:dlgpu.bench.testlog", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert help_text.returncode == 0, help_text.stderr


def test_the_profiler_is_asked_for_one_op(tmp_path, monkeypatch):
    asked = []

    class Tool:
        def __init__(self, arguments, env, **more):
            asked.append(arguments)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def until(self, deadline):
            return ["==ERROR== ERR_NVGPUCTRPERM - no permission"]

    monkeypatch.setattr(stages, "Lines", Tool)
    monkeypatch.setattr(stages.tools, "find", lambda name: ["ncu"])
    task = stages.Task("profile", ["counters softmax"], 60, str(tmp_path))
    with pytest.raises(RuntimeError, match="ncu: ==ERROR== ERR_NVGPUCTRPERM"):
        list(stages._counted("softmax", [], None, task))
    assert asked[0][:3] == ["ncu", "--clock-control", "none"]
    assert asked[0][-2:] == ["profile", "softmax"]
