"""The benchmark: its statistics, its byte model, its files and its refusals. None of its numbers: those are the machine's."""

import functools
import getpass
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dlgpu.bench import __main__ as cli
from dlgpu.bench import byte_model, digits, environment, gpu, harness, interpreted, providers, report, suite
from dlgpu.bench.environment import Gpu, Probes, UsageError, choose_device, find_gpu
from dlgpu.kernels import _triton

ROOT = Path(__file__).resolve().parents[1]


class Machine:
    """A clock that only calls move, by their cost, with noise, and drifting."""

    def __init__(self, seed=0, noise=0.03, drift=0.0):
        self.now, self.noise, self.drift = 0.0, noise, drift
        self.rng = np.random.default_rng(seed)
        self.calls = []

    def clock(self):
        return self.now

    def function(self, name, cost):
        def call():
            self.calls.append(name)
            self.now += cost * (1 + self.drift * self.now) * self.rng.lognormal(0, self.noise)

        return call

    def timer(self, function, repeats):
        start = self.now
        for _ in range(repeats):
            function()
        return self.now - start


def compare(cost_a, cost_b, seed=0, noise=0.03, drift=0.0, **stop):
    machine = Machine(seed, noise, drift)
    a, b = machine.function("a", cost_a), machine.function("b", cost_b)
    stop = harness.Stop(**{"budget_s": 1.0, "noise": 0.0, "max_pairs": 40, "warmup_s": 0.05, **stop})
    return harness.paired(a, b, stop=stop, timer=machine.timer, clock=machine.clock, seed=seed), machine


def test_a_against_a_has_1_in_its_interval():
    results = [compare(0.01, 0.01, seed=seed)[0] for seed in range(100)]
    assert sum(r.low <= 1 <= r.high for r in results) >= 90
    assert abs(np.mean([r.ratio for r in results]) - 1) < 0.005


@pytest.mark.parametrize("ratio", [0.9, 1.05])
def test_a_difference_is_found(ratio):
    results = [compare(0.01 * ratio, 0.01, seed=seed)[0] for seed in range(20)]
    assert sum(r.low <= ratio <= r.high for r in results) >= 17
    assert all(not r.low <= 1 <= r.high for r in results)


def test_a_drifting_clock_is_no_difference():
    result, machine = compare(0.01, 0.01, noise=0.001, drift=0.5)
    # One after the other it would be: the clock lost a third meanwhile.
    assert result.samples_b[-1] / result.samples_a[0] > 1.3
    assert 0.99 < result.ratio < 1.01
    orders = {tuple(machine.calls[i : i + 2]) for i in range(len(machine.calls) - 80, len(machine.calls), 2)}
    assert orders == {("a", "b"), ("b", "a")}


@pytest.mark.perf
def test_a_against_a_on_this_machine():
    x = torch.randn(200, 200)
    results = [
        harness.paired(x.exp, x.exp, stop=harness.Stop(budget_s=0.3, noise=0.0), seed=i) for i in range(12)
    ]
    # As `compare` will see it: within 2% is the same.
    assert sum(r.low <= 1.02 and r.high >= 0.98 for r in results) >= 11


def test_swapping_the_two_gives_the_reciprocal():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 0.1, 30), rng.lognormal(0.2, 0.1, 30)
    ratio, low, high = harness.bootstrap_interval(a, b, np.random.default_rng(1))
    other = harness.bootstrap_interval(b, a, np.random.default_rng(1))
    assert np.allclose([1 / ratio, 1 / high, 1 / low], other)


def test_when_it_stops():
    few, _ = compare(0.01, 0.01, noise=1e-6, max_pairs=1000)
    assert few.pairs > 7  # A noise target of 0 is never met; the budget ends it.
    assert not few.converged
    enough, _ = compare(0.01, 0.01, noise=0.01, max_pairs=1000, budget_s=100.0)
    assert enough.pairs == 1000
    machine = Machine(noise=0.01)
    stop = harness.Stop(budget_s=100.0, noise=0.01)
    quiet = harness.paired(
        machine.function("a", 0.01),
        machine.function("b", 0.02),
        stop=stop,
        timer=machine.timer,
        clock=machine.clock,
    )
    assert quiet.converged
    assert quiet.pairs < 100
    assert quiet.noise <= 0.01
    # Whatever the budget, there are enough pairs for an interval.
    assert compare(10.0, 10.0, budget_s=0.1)[0].pairs == harness.Stop.min_pairs


def test_a_sample_is_long_enough():
    result, _ = compare(1e-5, 1e-4)
    assert result.repeats_a * 1e-5 >= 0.9 * harness.MIN_SAMPLE_S
    assert result.repeats_b * 1e-4 >= 0.9 * harness.MIN_SAMPLE_S
    assert 0.9e-5 < np.median(result.samples_a) < 1.1e-5


def test_the_cpu_timer_waits_for_quiet_and_warms_up():
    now, cpu, calls = 0.0, 0.0, []

    def sleep(duration):
        nonlocal now, cpu
        now += duration
        # Someone's workers spin for 5 ms.
        cpu += duration if now < 0.0045 else 0.0

    def function():
        nonlocal now
        calls.append(now)
        now += 1.0

    timer = harness.CpuTimer(clock=lambda: now, cpu_clock=lambda: cpu, sleep=sleep)
    assert timer(function, 8) == pytest.approx(8.0)
    assert len(calls) == 10
    assert calls[0] == pytest.approx(0.005)


def test_the_cuda_timer_flushes_outside_the_events():
    log, now = [], 0.0

    class Event:
        def record(self):
            log.append("record")
            self.at = now

        def elapsed_time(self, end):
            return end.at - self.at

    def flush():
        nonlocal now
        log.append("flush")
        now += 100.0

    def function():
        nonlocal now
        log.append("run")
        now += 2.0

    timer = gpu.CudaTimer(flush, Event, lambda: log.append("synchronize"))
    assert timer(function, 3) == pytest.approx(6e-3)
    assert log == ["flush", "record", "run", "record"] * 3 + ["synchronize"]


def context(rows=()):
    return suite.Context("cpu", 0, report.Console(open(os.devnull, "w")), list(rows))


def test_a_rate_above_the_ceiling_is_impossible():
    case = providers.adam([(1000,)])
    law = byte_model.Law("k", "compulsory", {"n": 28})
    ceiling = {"kind": "ceiling", "name": gpu.COPY, "value": 1e9}
    where = context([ceiling])
    where.laws["adam"] = [law]
    row = {"section": "gpu", "kind": "timing", "a": "dlgpu", "bytes_per_s": None, "flops_per_s": None}
    possible = gpu.annotate({**row, "samples_a_s": [30e-6]}, case, "adam", where)
    assert (possible["kind"], possible["bytes"]) == ("timing", 28000)
    impossible = gpu.annotate({**row, "samples_a_s": [10e-6]}, case, "adam", where)
    assert impossible["kind"] == "wrong"
    assert "impossible" in impossible["detail"]


def test_the_gpu_part_but_for_the_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_timer", harness.CpuTimer)
    monkeypatch.setattr(gpu, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(gpu, "MATMUL_SIZE", 64)
    real = gpu.headlines()
    assert [(h.case.op, len(h.rivals)) for h in real] == [
        ("cross_entropy", 2),
        ("linear + gelu", 2),
        ("linear + gelu", 2),
        ("adam", 2),
    ]
    small = [
        gpu.Headline(providers.cross_entropy(6, 11), "cross_entropy", real[0].rivals[:1]),
        gpu.Headline(providers.linear(5, 7, 3, "gelu"), "linear_training", real[1].rivals[:1]),
        gpu.Headline(providers.adam([(3, 4), (5,)]), "adam", real[3].rivals),
    ]
    monkeypatch.setattr(gpu, "headlines", lambda: small)
    monkeypatch.setattr(interpreted, "run", fake_interpreter)
    # One byte each, so that nothing is impossible.
    monkeypatch.setattr(byte_model, "total", lambda *args: 1)
    jobs = [job for job in suite.plan("cuda") if job.section != "digits"]
    status, document, markdown = run_jobs(tmp_path, monkeypatch, jobs, "--budget", "12")
    rows = document["rows"]
    assert status == 0
    assert [row["kind"] for row in rows] == ["count"] * 4 + ["ceiling"] + ["bound"] * 4 + ["ceiling"] * 2 + [
        "timing"
    ] * 4
    for row in rows:
        assert set(row) - {"section", "kind", "at_s"} <= documented_keys(row["kind"])
    timings = rows[-4:]
    assert [row["b"] for row in timings] == ["torch", "torch", "torch", "torch fused=True"]
    assert all(row["bytes_per_s"] > 0 for row in timings)
    assert timings[1]["flops_per_s"] > 0
    assert "MODEL: adam" in markdown
    assert "against torch fused=True" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case",
    [
        providers.linear(5, 7, 3, "relu"),
        providers.linear(5, 7, 3, "gelu", backward=False),
        providers.cross_entropy(6, 11),
        providers.adam([(3, 4), (5,)]),
        providers.training_step((8, 16, 4), 7),
    ],
    ids=lambda case: case.title,
)
def test_a_wrong_provider_gets_no_time(case):
    right = providers.PROVIDERS["dlgpu"]
    verdict, call = providers.verify(case, right, "cpu", 0)
    assert verdict.right
    assert call is not None

    class Adam(torch.optim.Adam):
        def __init__(self, params):
            super().__init__(params, eps=1e-3)

    wrong = providers.Provider(
        "wrong",
        lambda *args: right.linear(*args) * (1 + 1e-3),
        lambda *args: right.cross_entropy(*args) * (1 + 1e-5),
        Adam,
    )
    if case.jumps:
        # Held to less: it takes more to be wrong.
        wrong = providers.dataclasses.replace(wrong, linear=lambda *args: right.linear(*args) * 1.1)
    rows = list(suite.compare(context(), "ops", case, wrong, right, 0.01))
    assert [(row["kind"], row["provider"]) for row in rows] == [("wrong", "wrong")]


def test_nan_is_wrong():
    t = torch.ones(3)
    assert providers.check([t], [t.clone()], [t.double()]).right
    assert not providers.check([t * torch.nan], [t.clone()], [t.double()]).right
    assert not providers.check([t, t], [t.clone()], [t.double()]).right
    assert not providers.check([t.double()], [t.clone()], [t.double()]).right


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
    a, b = (digits.Trainer(providers.PROVIDERS[name], data, seed=0) for name in ("dlgpu", "torch"))
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


@functools.cache
def laws_of(name):
    """From kernels interpreted here, or in another process where they are compiled."""
    if _triton.INTERPRETED:
        return byte_model.derive(byte_model.MODELS[name])
    (result,) = interpreted.run("bytes", name)
    return [byte_model.Law(**law) for law in result["laws"]]


@pytest.mark.parametrize("name", byte_model.MODELS)
def test_the_laws_hold_where_they_were_not_fitted(name):
    # `derive` raises where a held-out count differs by a byte.
    model, laws = byte_model.MODELS[name], laws_of(name)
    assert {tuple(s.values()) for s in model.held_out}.isdisjoint(tuple(s.values()) for s in model.fitted_on)
    assert all(law.coefficients for law in laws)
    assert len({law.quantity for law in laws}) == len(model.quantities)


def test_the_headline_counts():
    totals = {
        headline.model: byte_model.total(
            byte_model.MODELS[headline.model], laws_of(headline.model), headline.shape
        )
        for headline in byte_model.headlines()
    }
    unfused = {headline.model: headline.unfused() for headline in byte_model.headlines()}
    logits = 8192 * 128256
    assert totals["cross_entropy"] == pytest.approx(6 * logits, rel=1e-3)
    assert totals["adam"] == pytest.approx(28e9, rel=1e-3)
    assert unfused["cross_entropy"]["torch eager"] == pytest.approx(12 * logits, rel=1e-3)
    assert unfused["adam"]["torch eager (foreach)"] == 72e9
    for name, total in totals.items():
        assert total < min(value for key, value in unfused[name].items() if "fused=True" not in key)


def test_a_law_that_does_not_hold_is_refused():
    model = byte_model.MODELS["cross_entropy"]
    shapes = model.fitted_on

    def counts(function, shapes):
        return [(s, [("k", {"compulsory": function(s), "requested": 0})]) for s in shapes]

    laws = byte_model.fit(model, counts(lambda s: 3 * s["N"] * s["V"] + 8 * s["N"] + 5, shapes))
    assert str(laws[0]) == "3 NV + 8 N + 5"
    assert laws[0](model.features({"N": 10, "V": 100})) == 3085
    with pytest.raises(byte_model.LawError, match="the law"):
        byte_model.fit(model, counts(lambda s: s["N"] * s["V"] ** 2, shapes))
    with pytest.raises(byte_model.LawError, match="depends on the shape"):
        byte_model.fit(
            model, [*counts(lambda s: 0, shapes), (shapes[0], [("other", {"compulsory": 0, "requested": 0})])]
        )
    off_by_one = counts(lambda s: 3 * s["N"] * s["V"] + 8 * s["N"] + 6, model.held_out)
    assert len(byte_model.held_out_errors(model, laws, off_by_one)) == len(model.held_out)


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
        ({}, ["torch 2.13.0+cpu is a build without CUDA", "torch==2.13.0 --index-url", "/whl/cu130"]),
        ({"nvidia_smi": {**SMI, "cuda": "12.7"}}, ["/whl/cu126"]),
        ({"nvidia_smi": {**SMI, "cuda": "11.4"}}, ["without CUDA", "torch==2.13.0;"]),
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
    monkeypatch.setattr(cli, "find_gpu", lambda: found)
    assert cli.main(["--only", "header", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for part in ["NVIDIA H200", "--device cpu", *says]:
        assert part in captured.err
    assert cli.main(["--only", "header", "--out", str(tmp_path), "--device", "cpu"]) == 0


ENVIRONMENT_KEYS = {
    *("dlgpu", "source_hash", "git", "device", "why", "gpu", "cpu", "cores", "threads", "system"),
    *("python", "torch", "torch_cuda", "triton", "numpy"),
}


def documented_keys(kind):
    """The names that the schema's documentation gives a kind of row."""
    text = report.__doc__.partition(f"\n    {kind} ")[2]
    text = re.split(r"\n    \w|\Z", text)[0]
    return set(re.findall(r"\b[a-z_0-9]+\b", text))


def run_jobs(tmp_path, monkeypatch, jobs, *arguments):
    monkeypatch.setattr(cli, "find_gpu", lambda: None)
    monkeypatch.setattr(cli, "plan", lambda device, only: jobs)
    status = cli.main(["--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.json")
    return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def small_jobs():
    a, b = providers.PROVIDERS["dlgpu"], providers.PROVIDERS["torch"]
    case = providers.cross_entropy(6, 11)
    return [
        suite.Job(
            "ops", case.title, lambda where, share: suite.compare(where, "ops", case, a, b, 0.05), weight=1
        ),
        suite.Job("bytes", "counting", suite._count, fixed_s=1),
    ]


def fake_interpreter(job, *names):
    law = {"kernel": "k", "quantity": "compulsory", "coefficients": {"1": 5 * 10**9}}
    yield from ({"model": name, "laws": [law]} for name in names)


def test_the_result_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interpreted, "run", fake_interpreter)
    status, document, markdown = run_jobs(tmp_path, monkeypatch, small_jobs())
    assert status == 0
    assert (document["schema"], document["status"]) == (report.SCHEMA, "complete")
    assert set(document) == {"schema", "status", "started", "seconds", "arguments", "environment", "rows"}
    assert set(document["environment"]) == ENVIRONMENT_KEYS
    assert set(document["arguments"]) == {"suite", "device", "budget_s", "only", "seed"}
    kinds = [row["kind"] for row in document["rows"]]
    assert kinds == ["timing"] + ["count"] * 4
    for row in document["rows"]:
        assert {"section", "kind", "at_s"} <= set(row)
        assert set(row) - {"section", "kind", "at_s"} <= documented_keys(row["kind"])
    timing = document["rows"][0]
    assert timing["pairs"] == len(timing["samples_a_s"]) == len(timing["samples_b_s"])
    assert timing["low"] <= timing["ratio"] <= timing["high"]
    assert "| cross_entropy fwd+bwd N=6 V=11 |" in markdown
    assert "A COUNT" in markdown
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("dlgpu 0")
    assert list(tmp_path.glob(".*")) == []
    if not torch.cuda.is_available():
        # A count is no time.
        assert not re.search(r"\d (s|ms|us)\b", "\n".join(line for line in out if " GB" in line))


def test_nothing_tells_whose_machine_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(interpreted, "run", fake_interpreter)
    monkeypatch.setenv("DLGPU_TEST_SECRET", "qqsecretqq")
    _, document, markdown = run_jobs(tmp_path, monkeypatch, small_jobs())
    text = json.dumps(document) + markdown
    user = getpass.getuser()
    for private in (socket.gethostname(), str(tmp_path), str(ROOT), str(Path.home()), "qqsecretqq", "://"):
        assert private not in text
    assert not re.search(rf"\b{re.escape(user)}\b", text)
    assert not re.search(r"[\"' ]/\w+/", text)


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, capsys):
    def stop(where, share):
        yield {"section": "ops", "kind": "skipped", "title": "half done", "reason": "none"}
        raise KeyboardInterrupt

    jobs = [*small_jobs()[:1], suite.Job("ops", "stopped", stop), suite.Job("ops", "never", stop)]
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

    jobs = [suite.Job("ops", "failing", fail), suite.Job("ops", "absent", absent), *small_jobs()[:1]]
    status, document, _ = run_jobs(tmp_path, monkeypatch, jobs)
    assert status == 2
    assert document["status"] == "failed"
    assert [row["kind"] for row in document["rows"]] == ["error", "skipped", "timing"]
    assert document["rows"][0]["message"] == "RuntimeError: out of memory"
    assert document["rows"][1]["reason"] == "a_package_that_is_not_there is not installed"
    monkeypatch.setattr(cli, "plan", lambda device, only: jobs)
    with pytest.raises(RuntimeError, match="long story"):
        cli.main(["--out", str(tmp_path), "--traceback"])


def test_a_wrong_result_is_status_3(tmp_path, monkeypatch):
    wrong = providers.dataclasses.replace(
        providers.PROVIDERS["dlgpu"], cross_entropy=lambda x, t: torch.nn.functional.cross_entropy(x, t) + 1
    )
    case = providers.cross_entropy(6, 11)
    job = suite.Job("ops", "", lambda where, share: suite.compare(where, "ops", case, wrong, wrong, 0.05))
    status, document, markdown = run_jobs(tmp_path, monkeypatch, [job])
    assert status == 3
    assert document["rows"][0]["kind"] == "wrong"
    assert "WRONG RESULT" in markdown


def test_the_budget_is_shared(tmp_path, monkeypatch):
    shares = {}

    def job(name, **options):
        def run(where, share):
            shares[name] = share
            yield {"section": "ops", "kind": "skipped", "title": name, "reason": "none"}

        return suite.Job("ops", name, run, **options)

    jobs = [job("a", weight=1), job("b", weight=3), job("fixed", fixed_s=40)]
    run_jobs(tmp_path, monkeypatch, jobs, "--budget", "100")
    # What the first does not use is the second's.
    assert shares == pytest.approx({"a": 15, "b": 60, "fixed": 100}, abs=2)
    shares.clear()
    for path in tmp_path.iterdir():
        path.unlink()
    jobs = [suite.Job("ops", "slow", lambda where, share: iter(time.sleep(0.2) or [])), *jobs]
    _, document, _ = run_jobs(tmp_path, monkeypatch, jobs, "--budget", "0.1")
    assert shares == {}
    assert {row["reason"] for row in document["rows"]} == {"the time budget is spent (--budget)"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--budget", "0"], "must be a positive number"),
        (["--budget", "soon"], "--budget"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--out", os.path.join(os.devnull, "x")], "cannot write results into"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--only", "gpu"], "needs an NVIDIA GPU"),
        (["gpu"], "no NVIDIA GPU"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_gpu", lambda: None)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("dlgpu-bench: error: ")
    assert err.count("\n") == 1
    assert message in err


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
        [sys.executable, "-W", "always", "-m", "dlgpu.bench", "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **more,
    )


def test_the_command(tmp_path):
    process = command("--only", "digits", "--budget", "30", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("dlgpu 0.")
    assert "held-out accuracy" in out
    assert "the kernels in Triton's interpreter, 10 steps: losses within" in out
    assert "dlgpu" not in err
    assert "bench/" not in err
    (path,) = (tmp_path / "bench-results").glob("*.json")
    rows = {row["kind"]: row for row in json.loads(path.read_text())["rows"]}
    for kind, row in rows.items():
        assert set(row) - {"section", "kind", "at_s"} <= documented_keys(kind)
    assert rows["training"]["accuracy_a"] > 0.9
    assert rows["kernels"]["max_difference"] < 1e-5
    assert rows["float64"]["distance_a"] < 1e-5
    assert "timing" in rows


def test_ctrl_c(tmp_path):
    process = command("--only", "ops", "--budget", "100", "--out", str(tmp_path / "out"))
    lines = iter(process.stdout.readline, "")
    first_rows = list(itertools.islice((line for line in lines if "fwd+bwd" in line), 1))
    assert first_rows
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Interrupted: " in out
    (path,) = (tmp_path / "out").glob("*.json")
    document = json.loads(path.read_text())
    assert document["status"] == "interrupted"
    assert document["rows"]


def test_the_interpreter_process_reports_its_failure():
    with pytest.raises(interpreted.InterpreterError, match="nonsense"):
        list(interpreted.run("bytes", "nonsense"))
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
