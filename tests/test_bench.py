"""The benchmark: its statistics, its command line, its suites, its files and its refusals. None of its numbers: those are the
machine's."""

import ast
import dataclasses
import errno
import functools
import getpass
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch

import dlgpu
from dlgpu.bench import __main__ as cli
from dlgpu.bench import ceilings, digits, environment, harness, interpreted, providers, report, run, suite
from dlgpu.bench.cases import BOTH, OPS
from dlgpu.bench.cli import COMMANDS, bench
from dlgpu.bench.environment import Gpu, Probes, UsageError, choose_device, find_gpu
from dlgpu.bench.measure import Case
from dlgpu.kernels import configs

ROOT = Path(__file__).resolve().parents[1]


def test_nan_is_wrong():
    t = torch.ones(3)
    assert providers.check([t], [t.clone()], [t.double()]).right
    assert not providers.check([t * torch.nan], [t.clone()], [t.double()]).right
    assert not providers.check([t, t], [t.clone()], [t.double()]).right
    assert not providers.check([t.double()], [t.clone()], [t.double()]).right
    # What is kept wider than torch has it is held to what torch is.
    half = t.bfloat16()
    assert providers.check([t], [half], [t.double()]).right
    assert providers.check([t * (1 + 2**-9)], [half], [t.double()]).right
    assert not providers.check([t * (1 + 2**-6)], [half], [t.double()]).right


def test_digits_split():
    one, two = digits.load(), digits.load()
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.train_x.shape == (1437, 64)
    assert one.test_x.shape == (360, 64)
    assert one.test_y.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert (one.train_x.min(), one.train_x.max()) == (0, 1)


def test_digits_batches():
    found = list(digits.batches(1437, 2, seed=0))
    assert [len(index) for index in found[:23]] == [64] * 22 + [29]
    for epoch in (found[:23], found[23:]):
        assert sorted(np.concatenate(epoch)) == list(range(1437))
    assert not np.array_equal(found[0], found[23])
    again = digits.batches(1437, 2, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_digits_side_by_side():
    data = digits.load()
    a, b = (digits.Trainer(name, data, seed=0) for name in ("dlgpu", "eager"))
    for p, q in zip(a.params, b.params, strict=True):
        assert torch.equal(p, q)
    epochs = []
    done = digits.side_by_side(a, b, 5, 0, lambda *args: epochs.append(args) or len(epochs) == 2)
    assert done.epochs == 2
    assert len(done.losses_a) == len(done.losses_b) == 46
    assert np.allclose(done.losses_a, done.losses_b, atol=1e-5)
    assert done.losses_a[-1] < 1 < done.losses_a[0]
    assert epochs[0][1] == pytest.approx(np.mean(done.losses_a[:23]))
    assert abs(done.accuracy_a - done.accuracy_b) < 0.01 < 0.5 < done.accuracy_a


def probes(**answers):
    found = {"torch_sees": None, "nvidia_smi": {}, "proc": {}, "libcuda": {}, **answers}
    for name in ("torch_sees", "nvidia_smi", "proc", "libcuda"):
        found[name] = functools.partial(lambda value: value, found[name])
    return Probes(**{"torch_version": "2.13.0+cpu", "torch_cuda": None, "visible": None, **found})


SMI = {"name": "NVIDIA H200", "driver": "580.65.06", "cuda": "13.0"}


def test_no_gpu():
    assert find_gpu(probes()) is None
    # A driver without a card, and cards that the user hides.
    assert find_gpu(probes(libcuda={"cuda": "13.0", "error": "cuInit gives error 100"})) is None
    assert find_gpu(probes(nvidia_smi=SMI, visible="")) is None
    assert choose_device("auto", None)[0] == "cpu"
    with pytest.raises(UsageError, match="no NVIDIA GPU"):
        choose_device("cuda", None)


def test_a_usable_gpu():
    found = find_gpu(probes(torch_sees="NVIDIA H200", nvidia_smi=SMI, torch_cuda="13.0"))
    assert found == Gpu("NVIDIA H200", "580.65.06", "13.0")
    assert choose_device("auto", found) == ("cuda", "NVIDIA H200 (driver 580.65.06, CUDA 13.0)")
    assert choose_device("cpu", found)[0] == "cpu"


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({}, ["torch 2.13.0+cpu is a build without CUDA", "torch 2.13.0's cu130 build"]),
        ({"nvidia_smi": {**SMI, "cuda": "12.7"}}, ["cu126"]),
        ({"nvidia_smi": {**SMI, "cuda": "11.4"}}, ["without CUDA", "torch 2.13.0, as"]),
        (
            {"torch_version": "2.13.0", "torch_cuda": "13.0", "nvidia_smi": {**SMI, "cuda": "12.4"}},
            ["needs a driver for CUDA 13.0, this one ends at 12.4", "update the NVIDIA driver"],
        ),
        (
            {"torch_version": "2.13.0", "torch_cuda": "13.0", "libcuda": {"error": "cuInit gives error 999"}},
            ["cannot start CUDA (cuInit gives error 999)", "--gpus all"],
        ),
        ({"nvidia_smi": {}, "proc": {"name": "NVIDIA H200", "driver": "580.65.06"}}, ["driver 580.65.06"]),
        ({"nvidia_smi": {}, "libcuda": {"name": "NVIDIA H200", "cuda": "13.0"}}, ["CUDA 13.0"]),
    ],
)
def test_a_gpu_that_torch_cannot_use(answers, says, monkeypatch, capsys, tmp_path):
    found = find_gpu(probes(**{"nvidia_smi": SMI, **answers}))
    assert found.name == "NVIDIA H200"
    monkeypatch.setattr(suite, "find_gpu", lambda: found)
    assert cli.main(["--only", "header", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for part in ["NVIDIA H200", "--device cpu", *says]:
        assert part in captured.err
    assert cli.main(["--only", "header", "--out", str(tmp_path), "--device", "cpu"]) == 0


SMALL = Case(OPS["cross_entropy"], {"N": 6, "V": 11}, BOTH)


def run_jobs(tmp_path, monkeypatch, jobs, *arguments):
    monkeypatch.setattr(suite, "find_gpu", lambda: None)
    monkeypatch.setattr(suite, "plan", lambda device, only: jobs)
    status = cli.main(["--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.json")
    return status, report.load(path), path.with_suffix(".md").read_text()


def small_job(case=SMALL):
    job = suite.compare(case, ("eager",), extras=False)
    return dataclasses.replace(job, run=lambda where, share: job.run(where, 0.05))


def test_the_result_files(tmp_path, monkeypatch, capsys):
    status, document, markdown = run_jobs(tmp_path, monkeypatch, [small_job()])
    assert status == 0
    assert (document["schema"], document["status"]) == ("dlgpu-bench/2", "complete")
    assert set(document["arguments"]) == {"suite", "device", "budget_s", "only", "seed"}
    (timing,) = document["rows"]
    assert timing["kind"] == "timing"
    assert timing["options"] == OPS["cross_entropy"].defaults()
    assert "cross_entropy" in markdown
    assert "fwd+bwd N=6 V=11" in markdown
    assert capsys.readouterr().out.startswith("dlgpu 0")
    assert list(tmp_path.glob(".*")) == []


def test_nothing_tells_whose_machine_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("DLGPU_TEST_SECRET", "qqsecretqq")

    def fails(where, share):
        raise OSError(28, "No space left on device", f"{Path.home()}/.triton/cache/kernel.json")

    jobs = [small_job(), suite.Job("ops", "a full disk", fails)]
    _, document, markdown = run_jobs(tmp_path, monkeypatch, jobs)
    assert "No space left on device: 'kernel.json'" in document["rows"][-1]["message"]
    text = json.dumps(document) + markdown
    user = getpass.getuser()
    for private in (socket.gethostname(), str(tmp_path), str(ROOT), str(Path.home()), "qqsecretqq", "://"):
        assert private not in text
    assert not re.search(rf"\b{re.escape(user)}\b", text)
    assert not re.search(r"[\"' ]/\w+/", text)


def test_the_source_hash_is_of_all_that_computes(tmp_path, monkeypatch):
    copied = tmp_path / "dlgpu"
    shutil.copytree(environment.PACKAGE, copied, ignore=shutil.ignore_patterns("bench", "__pycache__"))
    known = {environment._source_hash()}
    monkeypatch.setattr(environment, "PACKAGE", copied)
    assert environment._source_hash() in known
    (copied / "kernels" / "tuned" / "README.md").write_text("changed")
    assert environment._source_hash() in known
    sources = [
        "kernels/linear.py",
        "kernels/configs.py",
        "ops/linear.py",
        "fallback/linear.py",
        "_dispatch.py",
        "nn.py",
    ]
    for name in (*sources, "optim.py", "functional.py", "kernels/tuned/a-card.json"):
        with (copied / name).open("a") as file:
            file.write("\n")
        known.add(environment._source_hash())
    assert len(known) == 1 + len(sources) + 3


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_and_whether_it_was_modified(tmp_path, monkeypatch):
    package = tmp_path / "dlgpu"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(environment, "PACKAGE", package)

    def git(*arguments):
        settings = ("-c", "user.name=nobody", "-c", "user.email=nobody@invalid", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    # Of a checkout that is not dlgpu's.
    assert environment._commit() is None
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    assert environment._commit() == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (package / "__init__.py").write_text("changed")
    assert environment._commit() == {"commit": git("rev-parse", "HEAD"), "modified": True}


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, capsys):
    def stop(where, share):
        yield {"section": "ops", "kind": "skipped", "title": "half done", "reason": "none"}
        raise KeyboardInterrupt

    jobs = [small_job(), suite.Job("ops", "stopped", stop), suite.Job("ops", "never", stop)]
    status, document, markdown = run_jobs(tmp_path, monkeypatch, jobs)
    assert status == 130
    assert document["status"] == "interrupted"
    assert [row["kind"] for row in document["rows"]] == ["timing", "skipped"]
    assert "interrupted" in markdown
    assert "Interrupted: 2 rows are kept" in capsys.readouterr().out


def test_a_job_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(where, share):
        raise RuntimeError("out of memory\nand a long story")
        yield

    def absent(where, share):
        import a_package_that_is_not_there  # noqa: F401

        yield

    jobs = [suite.Job("ops", "failing", fail), suite.Job("ops", "absent", absent), small_job()]
    status, document, _ = run_jobs(tmp_path, monkeypatch, jobs)
    assert status == 2
    assert document["status"] == "failed"
    assert [row["kind"] for row in document["rows"]] == ["error", "skipped", "timing"]
    assert document["rows"][0]["message"] == "RuntimeError: out of memory"
    assert document["rows"][1]["reason"] == "a_package_that_is_not_there is not installed"
    with pytest.raises(RuntimeError, match="long story"):
        cli.main(["--out", str(tmp_path), "--traceback"])


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "full"

    def fill(where, share):
        yield {"section": "ops", "kind": "skipped", "title": "before", "reason": "none"}
        write = report.write_whole

        def full(path, text):
            if out in path.parents:
                raise OSError(28, "No space left on device")
            write(path, text)

        monkeypatch.setattr(report, "write_whole", full)
        yield {"section": "ops", "kind": "skipped", "title": "after", "reason": "none"}

    monkeypatch.setattr(suite, "find_gpu", lambda: None)
    monkeypatch.setattr(suite, "plan", lambda device, only: [suite.Job("ops", "filling", fill)])
    monkeypatch.setattr(report.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    assert cli.main(["--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "No space left on device" in said.err
    (path,) = tmp_path.glob("*.json")
    assert str(path) in said.out
    assert [row["title"] for row in report.load(path)["rows"]] == ["before", "after"]


def test_a_wrong_result_is_status_3(tmp_path, monkeypatch):
    def wrong(**inputs):
        return OPS["cross_entropy"].functions["dlgpu"](**inputs) + 1

    op = dataclasses.replace(SMALL.described, functions={**SMALL.described.functions, "dlgpu": wrong})
    job = small_job(dataclasses.replace(SMALL, described=op))
    status, document, markdown = run_jobs(tmp_path, monkeypatch, [job])
    assert status == 3
    assert document["rows"][0]["kind"] == "wrong"
    assert "WRONG" in markdown


def test_the_budget_is_shared(tmp_path, monkeypatch):
    shares = {}

    def job(name, **options):
        def run(where, share):
            shares[name] = share
            yield {"section": "ops", "kind": "skipped", "title": name, "reason": "none"}

        return suite.Job("ops", name, run, **options)

    jobs = [job("a", weight=1), job("b", weight=3), job("fixed", fixed_s=40)]
    run_jobs(tmp_path, monkeypatch, jobs, "--budget", "20")
    # What the first does not use is the second's.
    assert shares == pytest.approx({"a": 1.5, "b": 6, "fixed": 20}, abs=0.4)
    shares.clear()
    for path in tmp_path.iterdir():
        path.unlink()
    jobs = [suite.Job("ops", "slow", lambda where, share: iter(time.sleep(0.2) or [])), *jobs]
    _, document, _ = run_jobs(tmp_path, monkeypatch, jobs, "--budget", "0.1")
    assert shares == {}
    assert {row["reason"] for row in document["rows"]} == {"the time budget is spent (--budget)"}


def test_the_quick_suite_measures_every_op():
    jobs = suite.plan("cpu")
    titles = [job.title for job in jobs if job.section == "ops"]
    assert {title.partition("[")[0].partition(" ")[0] for title in titles} == set(OPS)
    assert {job.section for job in jobs} >= {"ceilings", "digits", "ops"}
    assert {job.section for job in suite.plan("cpu", ("digits",))} == {"digits"}
    # What takes a fixed time leaves most of the default budget for timing.
    assert sum(job.fixed_s for job in jobs) < 0.75 * suite.DEFAULT_BUDGET_S


def test_the_config_says_what_runs_on_a_cpu():
    """The rule of the CPU's backends, as the call itself asks it."""
    op = OPS["softmax"]
    for rule, says in (("torch", "torch"), ("fallback", "NumPy")):
        # The suite's own setting may be another.
        with pytest.MonkeyPatch.context() as patch, dlgpu.use_backend("auto"):
            patch.setattr(configs, "cpu_backend", lambda *args, rule=rule: rule)
            assert suite.cpu_config(Case(op, {"N": 6, "V": 11}, BOTH)) == says
    assert suite.cpu_config(Case(op, {"N": 6, "V": 11}, BOTH, device="cuda")) is None


def test_what_does_not_fit_into_memory_is_not_begun(monkeypatch):
    op = OPS["adam"]
    case = Case(op, op.shapes["h200-1b"], "step")
    monkeypatch.setattr(suite, "_available_bytes", lambda: 10 * 10**9)
    assert "10 are free" in suite.too_large(case)
    monkeypatch.setattr(suite, "_available_bytes", lambda: 5 * 10**9)
    assert "GB of memory" in suite.too_large(Case(OPS["linear"], OPS["linear"].shapes["h200-ffn"], BOTH))
    assert suite.too_large(SMALL) is None
    assert suite.too_large(dataclasses.replace(case, device="cuda")) is None
    monkeypatch.setattr(suite, "_available_bytes", lambda: None)
    assert suite.too_large(case) is None
    monkeypatch.setattr(suite, "_available_bytes", lambda: 10 * 10**9)
    where = suite.Context("cpu", 0, report.Console(io.StringIO()), [])
    assert [row["kind"] for row in suite.compare(case, ("eager",)).run(where, 1.0)] == ["skipped"]


def test_times_are_held_to_undisturbed_ceilings():
    def ceiling(name, value, crowded=False):
        return {"kind": "ceiling", "name": name, "value": value, "samples_s": [1.0], "crowded": crowded}

    copy, cached = ceiling(ceilings.COPY, 5.0), ceiling(ceilings.CACHED_COPY, 3.0)
    # A copy within the cache that is slower than one from memory was disturbed.
    assert suite.limits([copy, cached]) == {ceilings.COPY: 5.0, ceilings.CACHED_COPY: 5.0}
    assert suite.limits([copy, ceiling(ceilings.CACHED_COPY, 3.0, crowded=True)]) == {}
    assert suite.limits([ceiling("matmul, float32", 7.0), copy]) == {"matmul, float32": 7.0}


def test_a_busy_machine_does_not_eat_the_time_of_what_needs_no_quiet_one(tmp_path, monkeypatch):
    ran = []

    def job(name, seconds=0.0, **options):
        def rows(where, share):
            ran.append(name)
            time.sleep(seconds)
            return iter(())

        return suite.Job("ops", name, rows, **options)

    jobs = [job("slow", 0.3, weight=1), job("late", weight=1), job("fixed", fixed_s=0.4)]
    run_jobs(tmp_path, monkeypatch, jobs, "--budget", "1")
    assert ran == ["slow", "late", "fixed"]
    ran.clear()
    jobs[0] = job("slow", 0.7, weight=1)
    for path in tmp_path.iterdir():
        path.unlink()
    run_jobs(tmp_path, monkeypatch, jobs, "--budget", "1")
    assert ran == ["slow", "fixed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "'tpu' is not one of 'auto'"),
        (["--budget", "0"], "--budget"),
        (["--budget", "soon"], "--budget"),
        (["--budget", "nan"], "nan is no number"),
        (["audit", "--budget", "NaN"], "NaN is no number"),
        (["--only", "everything"], "'everything' is not one of"),
        (["--out", os.path.join(os.devnull, "x")], "cannot write results into"),
        (["nonsense"], "unknown command 'nonsense'"),
        (["rum"], "did you mean run?"),
        (["--nonsense"], "--nonsense"),
        (["--only", "gpu"], "needs an NVIDIA GPU"),
        (["gpu"], "no NVIDIA GPU"),
        (["list", "nosuch"], "unknown op 'nosuch'"),
        (["run", "nosuch"], "unknown op 'nosuch'"),
        (["run", "softmx"], "did you mean softmax"),
        (["run", "linear", "--shape", "nosuch"], "unknown shape of linear 'nosuch'"),
        (["run", "--shape", "nosuch"], "unknown shape 'nosuch'"),
        (["run", "--shape", "M=3"], "sizes go with the name of an op"),
        (["run", "linear", "--shape", "M=0"], "M must be a positive whole number"),
        (["run", "linear", "--shape", "M=-3"], "M must be a positive whole number"),
        (["run", "linear", "--shape", "M=1e3"], "M must be a positive whole number"),
        (["run", "linear", "--shape", "M=" + "9" * 30], "M must be a positive whole number"),
        (["run", "linear", "--shape", "Q=3"], "unknown size of linear 'Q'"),
        (["run", "adam", "--shape", "n=2,tensors=3"], "3 tensors need as many elements"),
        (["run", "linear", "--vs", "nosuch"], "'nosuch' is not one of dlgpu"),
        (["run", "linear", "--vs", ","], "names nothing"),
        (["run", "linear", "--vs", "dlgpu"], "dlgpu cannot be compared with itself"),
        (["run", "linear", "--vs", "cce"], "nobody to compare with: cce"),
        (["run", "linear", "--vs", "eager-float"], "eager-float offers no linear"),
        (["run", "linear", "--vs", "torch-fused"], "offers fwd only"),
        (["run", "linear", "--option", "activation=mish"], "unknown value of activation 'mish'"),
        (["run", "linear", "--option", "color=red"], "unknown option 'color'"),
        (["run", "softmax", "--option", "color=red"], "softmax has no options"),
        (["run", "linear", "--option", "activation"], "expected K=V"),
        (["run", "linear", "--pass", "step"], "unknown pass of linear 'step'"),
        (["run", "linear", "--pass", "sideways"], "'sideways' is not one of"),
        (["run", "linear", "--dtype", "fp8"], "'fp8' is not one of"),
        (["run", "linear", "--timer", "graph"], "needs a GPU"),
        (["run", "linear", "--device", "cuda"], "no NVIDIA GPU"),
        (["run", "linear", "--seed", "-1"], "--seed"),
        (["run", "linear", "--module", "a:b"], "--module measures a model"),
        (["run", "linear", "--batch", "3"], "--batch goes with --module"),
        (["run", "--module", "no.such.module:f"], "no.such.module"),
        (["run", "linear", "--shape", "small", "--out", os.path.join(os.devnull, "x")], "cannot write"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(suite, "find_gpu", lambda: None)
    monkeypatch.setattr(run, "find_gpu", lambda: None)
    done = click.testing.CliRunner().invoke(bench, arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("dlgpu-bench: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_an_error_nobody_thought_of_is_one_line(monkeypatch, capsys):
    def fail():
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(suite, "find_gpu", fail)
    assert cli.main(["--quick"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "RuntimeError: boom and more (--traceback" in err
    with pytest.raises(RuntimeError, match="boom"):
        cli.main(["--quick", "--traceback"])


def test_a_standard_output_without_room_is_one_line(monkeypatch, capsys):
    """As of `dlgpu-bench list > /dev/full`."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["list"]) == 2
    expected = "dlgpu-bench: error: cannot write to standard output: No space left on device\n"
    assert capsys.readouterr().err == expected


def test_every_command_is_there_and_imports_nothing_before(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
        assert cli.main([name, "--help"]) == 0
    assert "Exit status" in out


def test_what_can_be_asked_for_is_listed(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*OPS, *providers.PROVIDERS):
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
    assert "absent" in out
    assert cli.main(["list", "linear"]) == 0
    out = capsys.readouterr().out
    assert "--shape mlp: M=256, N=512, K=784" in out
    assert "--option activation=gelu (default), or relu" in out
    assert cli.main(["list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert [op["name"] for op in known["ops"]] == list(OPS)
    assert {provider["name"] for provider in known["providers"]} == set(providers.PROVIDERS)


def test_the_environment_is_shown(capsys):
    assert cli.main(["env", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["torch"] == torch.__version__
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for name in known:
        assert re.search(rf"^{name} ", out, re.MULTILINE)


@pytest.fixture
def hasty(monkeypatch):
    """Two pairs for each timing."""
    stop = functools.partial(harness.Stop, min_pairs=2, max_pairs=2, warmup_s=0.0)
    monkeypatch.setattr(suite, "Stop", stop)


def test_a_run_of_ones_own_choice(tmp_path, capsys, hasty):
    out = tmp_path / "mine.json"
    arguments = ["run", "linear", "cross_entropy", "--shape", "M=5,N=7,K=3", "--shape", "N=6,V=11"]
    # Each shape fits one of the two.
    assert cli.main([*arguments, "--device", "cpu"]) == 2
    assert "unknown size of linear 'V'" in capsys.readouterr().err
    arguments = [
        "run",
        "linear",
        "--shape",
        "M=5,N=7,K=3",
        "--shape",
        "M=4",
        "--vs",
        "eager,torch-fused,cublaslt,liger",
    ]
    arguments += ["--pass", "fwd", "--option", "activation=relu", "--dtype", "float32,bf16"]
    status = cli.main([*arguments, "--device", "cpu", "--budget", "100", "--seed", "3", "--out", str(out)])
    document = report.load(out)
    rows = document["rows"]
    said = capsys.readouterr()
    assert status == 0, said.err
    assert document["arguments"]["ops"] == ["linear"]
    assert [row["provider"] for row in rows if row["kind"] == "absent"] == ["liger"]
    timings = [row for row in rows if row["kind"] == "timing"]
    expected = itertools.product(
        [{"M": 5, "N": 7, "K": 3}, {"M": 4, "N": 512, "K": 784}],
        ["float32", "bfloat16"],
        ["eager", "torch-fused", "cublaslt"],
    )
    assert [(row["shape"], row["dtype"], row["b"]) for row in timings] == list(expected)
    assert {row["options"]["activation"] for row in timings} == {"relu"}
    assert {row["note"] for row in timings if row["b"] == "cublaslt"} == {"against its products alone"}
    assert "absent" in said.out


def test_the_fallback_against_torch(tmp_path, hasty):
    out = tmp_path / "fallback.json"
    arguments = [
        "run",
        "--of",
        "fallback",
        "--vs",
        "dlgpu",
        "softmax",
        "--shape",
        "N=6,V=11",
        "--device",
        "cpu",
    ]
    assert cli.main([*arguments, "--budget", "0.3", "--out", str(out)]) == 0
    rows = report.load(out)["rows"]
    assert [(row["a"], row["b"]) for row in rows if row["kind"] == "timing"] == [("fallback", "dlgpu")]
    # What times are held to is measured in the same run, before them.
    assert rows[-1]["kind"] == "timing"
    names = {row["name"] for row in rows[:-1] if row["kind"] == "ceiling"}
    assert names == {ceilings.COPY, ceilings.CACHED_COPY, ceilings.LAUNCH, "matmul, float32"}


def test_a_run_flags_what_is_impossible(tmp_path, hasty, monkeypatch):
    """By the ceilings of its own rows, measured again before it is said."""
    monkeypatch.setattr(ceilings, "best", lambda rows: {row["name"]: 1.0 for row in rows if "name" in row})
    # Those of a busy machine hold nobody to anything.
    monkeypatch.setattr(suite, "crowded", lambda cores: False)
    out = tmp_path / "impossible.json"
    arguments = ["run", "softmax", "--shape", "N=6,V=11", "--device", "cpu", "--budget", "0.3"]
    assert cli.main([*arguments, "--out", str(out)]) == 3
    kinds = [row["kind"] for row in report.load(out)["rows"]]
    assert kinds.count("impossible") == 2
    assert "timing" not in kinds


def test_all_ops_that_have_a_shape():
    plan = run.planned((), shapes=("digits",))
    titles = [job.title.partition("[")[0].partition(" ")[0] for job in plan.jobs]
    assert titles == [name for name, op in OPS.items() if "digits" in op.shapes]
    everything = run.planned(())
    assert len(everything.jobs) == len(OPS)
    assert [job.section for job in everything.first] == ["ceilings"]
    # On a GPU its own shapes are the default.
    assert suite.default_shape("linear", "cuda") == "h200-8k"
    assert suite.default_shape("linear", "cpu") == "mlp"


def test_without_click_it_is_one_line(tmp_path):
    code = """
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("click", "rich", "matplotlib", "jinja2", "pynvml", "sklearn"):
                    raise ImportError(f"{name} is blocked", name=name)

        sys.meta_path.insert(0, Block())
        from dlgpu.bench.__main__ import main
        sys.exit(main(["list"]))
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr == "dlgpu-bench: error: click is not installed; pip install dlgpu[bench]\n"


def command(*arguments, **more):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DLGPU_BACKEND")}
    # One thread each: here other tests run beside it.
    env |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-m", "dlgpu.bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **more,
    )


def test_the_command(tmp_path):
    process = command("--device", "cpu", "--only", "digits", "--budget", "30", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("dlgpu 0.")
    assert "held-out accuracy" in out
    assert "the kernels in Triton's interpreter, 5 steps: losses within" in out
    assert "dlgpu" not in err
    assert "bench/" not in err
    (path,) = (tmp_path / "bench-results").glob("*.json")
    rows = {row["kind"]: row for row in report.load(path)["rows"]}
    assert rows["training"]["accuracy_a"] > 0.9
    assert rows["kernels"]["max_difference"] < 1e-5
    assert rows["float64"]["distance_a"] < 1e-5
    assert "timing" in rows


def test_bad_usage_of_the_real_command(tmp_path):
    process = command("run", "linear", "--shape", "M=0", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "dlgpu-bench: error: --shape M=0: M must be a positive whole number, got '0'\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c(tmp_path):
    # Through `run`, and at once in its table: the row is whole, and the rest is not begun.
    process = command(
        "run", "--device", "cpu", "--shape", "small", "--budget", "20", "--out", str(tmp_path / "out")
    )
    lines = iter(process.stdout.readline, "")
    first_rows = list(itertools.islice((line for line in lines if "fwd+bwd" in line), 1))
    assert first_rows
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Interrupted: " in out
    (path,) = (tmp_path / "out").glob("*.json")
    document = report.load(path)
    assert document["status"] == "interrupted"
    assert document["rows"]


def test_processes_have_a_time_limit_and_no_shell():
    """Read from the source. Who starts a `children.Lines` gives a deadline for its lines."""
    found = []
    for folder in ("bench", "kernels", "dlgpu"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if not name.startswith(("subprocess.", "os.system", "os.popen", "os.spawn")):
                    continue
                given = {keyword.arg for keyword in node.keywords}
                text = isinstance(node.args[0], (ast.JoinedStr, ast.Constant))
                limited = "timeout" in given or (name, path.name) == ("subprocess.Popen", "children.py")
                known = name in ("subprocess.run", "subprocess.Popen")
                found.append(
                    (path.name, node.lineno, known and limited and not text and "shell" not in given)
                )
    assert [place for *place, right in found if not right] == []
    assert len(found) > 5


def test_the_interpreter_process_reports_its_failure():
    with pytest.raises(interpreted.InterpreterError, match=r"digits: .*nonsense"):
        list(interpreted.run("digits", "nonsense", "0"))
    start = time.monotonic()
    with pytest.raises(interpreted.InterpreterError, match="no end after"):
        list(interpreted.run("digits", "1000", "0", timeout_s=0.5))
    assert time.monotonic() - start < 30


def test_other_work_is_noticed(monkeypatch):
    busy = [1000]
    monkeypatch.setattr(environment.Others, "_jiffies", staticmethod(lambda: busy[0]))
    others = environment.Others()
    time.sleep(0.05)
    assert others.cores() < 0.1
    busy[0] += 10**6
    assert others.cores() > 10
    assert environment.crowded(1e9)
    assert not environment.crowded(None)
    row = {"ratio": 1.0, "low": 0.99, "high": 1.01, "crowded": False}
    assert [report.verdict(row), report.verdict({**row, "crowded": True})] == ["same", "busy"]
    assert report.verdict({**row, "low": 0.5}) == "ambiguous"


def test_the_header_names_what_is_needed():
    line = environment.header(environment.describe("cpu", "as asked", None))
    for part in (
        "dlgpu 0.",
        "on cpu (as asked)",
        f"torch {torch.__version__}",
        "triton",
        f"numpy {np.__version__}",
        "threads",
    ):
        assert part in line
    assert "\n" not in line
