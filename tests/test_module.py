"""`dlgpu-bench run --module`: the user's own model, loaded, held to itself, and timed; and every way to get it wrong."""

import json
import math
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import dlgpu
from dlgpu.bench import harness, module, report, suite, timers
from dlgpu.bench.__main__ import main
from dlgpu.bench.environment import UsageError

SOURCE = """
    import torch

    def model():
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4)
        )

    def make_model(batch=8):
        targets = torch.arange(batch) % 4
        return {"model": model(), "inputs": torch.randn(batch, 6), "loss_fn": torch.nn.CrossEntropyLoss(),
                "targets": targets}

    def pair():
        return model(), torch.randn(3, 6)

    def triple():
        return model(), {"input": torch.randn(3, 6)}, lambda y: y.square().sum()

    class Random(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(())

    def draws():
        return Random(6, 4), torch.randn(3, 6)

    def number():
        return 3

    def short():
        return {"model": model()}

    def extra():
        return {**make_model(), "colour": "red"}

    def no_module():
        return "model", torch.randn(3)

    def frozen():
        return torch.nn.ReLU(), torch.randn(3, 6)

    def no_loss():
        return {"model": model(), "inputs": torch.randn(3, 6), "targets": torch.arange(3)}

    def odd_loss():
        return model(), torch.randn(3, 6), "mse"

    def misfit():
        return model(), torch.randn(3, 7)

    def vector_loss():
        return model(), torch.randn(3, 6), lambda y: y

    def fails():
        raise RuntimeError("out of\\nluck")

    def leaves():
        raise SystemExit(7)

    def leaves_later():
        return model(), torch.randn(3, 6), lambda y: leaves()

    instance = model()
    value = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_models_of_a_test.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "my_broken_model.py").write_text("1 / 0\n")
    (tmp_path / "my_needy_model.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield "my_models_of_a_test"
    assert sys.path == before
    for name in ("my_models_of_a_test", "my_broken_model", "my_needy_model"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{mine}", "expected PKG:FUNCTION"),
        (":make_model", "expected PKG:FUNCTION"),
        ("{mine}:", "expected PKG:FUNCTION"),
        ("not_a_module:make_model", "there is no module not_a_module"),
        ("{mine}.inner:make_model", "there is no module"),
        ("my_broken_model:make_model", "ZeroDivisionError"),
        ("my_needy_model:make_model", "needs a_package_that_is_not_there"),
        ("{mine}:nope", "has no nope"),
        ("{mine}:value", "expected a function"),
        ("{mine}:instance", "expected a function"),
        ("{mine}:fails", "RuntimeError: out of"),
        ("{mine}:number", "returned int"),
        ("{mine}:short", "lacks 'inputs'"),
        ("{mine}:extra", "unknown key 'colour'"),
        ("{mine}:no_module", "the model is a str"),
        ("{mine}:frozen", "no parameters to train"),
        ("{mine}:no_loss", "targets need a loss_fn"),
        ("{mine}:odd_loss", "loss_fn is a str"),
        ("{mine}:misfit", "a training step as it is failed: RuntimeError"),
        ("{mine}:vector_loss", "the loss is no scalar"),
        ("{mine}:leaves", "leaves() failed: SystemExit: 7"),
        ("{mine}:leaves_later", "a training step as it is failed: SystemExit"),
    ],
)
def test_what_is_no_model_is_one_line(mine, spec, says, capsys):
    arguments = ["run", "--device", "cpu", "--out", "out.json", "--module", spec.format(mine=mine)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_what_a_function_may_return(mine):
    made = module.load(f"{mine}:make_model", batch=5)
    assert made.inputs.shape == (5, 6)
    assert module.Step(made)().shape == ()
    pair = module.load(f"{mine}:pair")
    # Without a loss the mean of the squares.
    torch.testing.assert_close(module.Step(pair, dropout=False).forward(), mean_square(pair))
    assert module.Step(module.load(f"{mine}:triple"))().shape == ()
    with pytest.raises(UsageError, match="failed: TypeError"):
        module.load(f"{mine}:pair", batch=5)


def mean_square(subject):
    model = module.Step(subject, dropout=False).model
    return model(subject.inputs).square().mean()


def subject(loss_fn=F.cross_entropy, optimizer=torch.optim.Adam):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return module.Subject(model, torch.randn(8, 6), loss_fn, (torch.arange(8) % 4,), optimizer)


def test_variants_convert_what_they_say():
    given = subject()
    as_it_is, layers = module.Step(given), module.Step(given, layers=True)
    optimizer = module.Step(given, optimizer=True)
    assert type(as_it_is.model[0]) is torch.nn.Linear
    assert type(as_it_is.optimizer) is torch.optim.Adam
    assert type(layers.model[0]) is dlgpu.nn.Linear
    assert type(layers.optimizer) is torch.optim.Adam
    assert layers.loss_fn is dlgpu.functional.cross_entropy
    assert type(optimizer.model[0]) is torch.nn.Linear
    assert optimizer.loss_fn is F.cross_entropy
    assert type(optimizer.optimizer) is dlgpu.optim.Adam
    # Nothing that was given is touched.
    assert type(given.model[0]) is torch.nn.Linear
    weight = given.model[0].weight.clone()
    as_it_is()
    layers()
    assert torch.equal(given.model[0].weight, weight)
    assert given.model[0].weight.grad is None
    converted = module.Step(subject(torch.nn.CrossEntropyLoss()), layers=True).loss_fn
    assert type(converted) is dlgpu.nn.CrossEntropyLoss
    own = module.Step(subject(lambda y, t: F.cross_entropy(y, t)), layers=True).loss_fn
    assert own.__name__ == "<lambda>"


def test_gradients_are_made_anew():
    """Not added to those of the step before, which takes a pass more."""
    step = module.Step(subject())
    step()
    before = [p.grad for p in step.model.parameters()]
    step()
    assert all(p.grad is not old for p, old in zip(step.model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_agree_and_what_does_not_is_seen(dtype):
    given = subject().to("cpu", dtype)
    own, ours = (module.losses(module.Step(given, both, both), 5, 0) for both in (False, True))
    assert own != sorted(own) or own[-1] < own[0]
    assert module.agreement(own, ours, dtype) == ""
    # A learning rate that is three times as high.
    other = subject(optimizer=lambda p: torch.optim.Adam(p, lr=3e-3 if dtype != torch.bfloat16 else 0.3))
    apart = module.losses(module.Step(other.to("cpu", dtype)), 5, 0)
    assert "step 2" in module.agreement(own, apart, dtype)
    assert module.agreement([1.0, 2.0], [1.0, math.nan], dtype)
    assert not module.agreement([1.0, math.inf], [1.0, math.inf], dtype)


def rows_of(given, monkeypatch, tmp_path, **settings):
    """What the comparison of a subject gives, with a clock that tells the variants by what they are."""

    def timer(function, repeats):
        parts = (type(function.model[0]) is dlgpu.nn.Linear, type(function.optimizer) is dlgpu.optim.Adam)
        return {(False, False): 8e-3, (True, False): 4e-3, (False, True): 6e-3, (True, True): 2e-3}[
            parts
        ] * repeats

    monkeypatch.setattr(module, "timer_for", lambda *args: (timer, "host", "host"))
    monkeypatch.setattr(module, "Stop", lambda **given: harness.Stop(min_pairs=7, max_pairs=7, warmup_s=0.0))
    stream = (tmp_path / "terminal").open("w+")
    context = suite.Context("cpu", 0, report.Console(stream), [])
    settings = {"seed": 0, "steps": 3, "compiled": False, **settings}
    rows = list(module._Comparison("a:b", given, "cpu", **settings)(context, 1.0))
    stream.seek(0)
    return rows, stream.read()


def test_which_parts_gained(monkeypatch, tmp_path):
    rows, text = rows_of(subject(), monkeypatch, tmp_path)
    assert [(row["kind"], row["a"], row["b"]) for row in rows] == [
        ("timing", "dlgpu", "as it is"),
        ("timing", "dlgpu's layers", "as it is"),
        ("timing", "dlgpu's optimizer", "as it is"),
    ]
    assert [row["ratio"] for row in rows] == pytest.approx([0.25, 0.5, 0.75])
    assert rows[0]["shape"] == {"parameters": 6 * 16 + 16 + 16 * 4 + 4}
    assert "4.00x (4.00 to 4.00)" in text
    assert "2.00x" in text
    assert "1.33x" in text
    assert "the same for all to rounding" in text
    # What forward keeps beside what is there anyway: torch's ReLU, log-softmax and the sum of its weights.
    assert rows[0]["saved_b_bytes"] == 4 * (8 * 16 + 8 * 4 + 1)
    assert 0 < rows[0]["saved_a_bytes"] < 1000
    for row in rows:
        json.dumps(row, allow_nan=False)


def test_a_variant_that_trains_differently_gets_no_time(monkeypatch, tmp_path):
    convert = dlgpu.convert

    def wrong(model, *args, **kwargs):
        found = convert(model, *args, **kwargs)
        with torch.no_grad():
            for parameter in found.model.parameters():
                parameter.mul_(1.01)
        return found

    monkeypatch.setattr(dlgpu, "convert", wrong)
    rows, _ = rows_of(subject(), monkeypatch, tmp_path)
    assert [(row["kind"], row.get("provider", row.get("a"))) for row in rows] == [
        ("wrong", "dlgpu"),
        ("wrong", "dlgpu's layers"),
        ("timing", "dlgpu's optimizer"),
    ]
    assert "step 1: loss" in rows[0]["detail"]


def test_a_variant_that_does_not_run_is_absent(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    rows, _ = rows_of(subject(), monkeypatch, tmp_path, compiled=True)
    absent = [row for row in rows if row["kind"] == "absent"]
    assert [(row["provider"], row["reason"]) for row in absent] == [
        ("compiled", "does not run here: RuntimeError: no compiler here")
    ]
    assert sum(row["kind"] == "timing" for row in rows) == 3


def test_random_models_are_timed_but_not_compared(mine, monkeypatch, tmp_path):
    given = module.load(f"{mine}:draws")
    own = module.losses(module.Step(given), 2, 0)
    assert module.losses(module.Step(given), 2, 0) == own
    monkeypatch.setattr(module, "timer_for", lambda *args: (lambda f, n: 1e-3 * n, "host", "host"))
    monkeypatch.setattr(module, "Stop", lambda **settings: harness.Stop(max_pairs=7, warmup_s=0.0))
    context = suite.Context("cpu", 0, report.Console((tmp_path / "terminal").open("w")), [])
    rows = list(module._Comparison("a:b", given, "cpu", 0, 2, False)(context, 1.0))
    assert [row["kind"] for row in rows] == ["skipped", *["timing"] * 3]
    assert "random" in rows[0]["reason"]


def test_the_command(mine, monkeypatch, tmp_path, capsys):
    real = module.jobs
    monkeypatch.setattr(module, "jobs", lambda *args, **kwargs: real(*args, **kwargs, compiled=False))
    quick = timers.CpuTimer(sleep=lambda s: None)
    monkeypatch.setattr(module, "timer_for", lambda *args: (quick, "host", "host"))
    out = tmp_path / "mine.json"
    arguments = ["run", "--module", f"{mine}:make_model", "--device", "cpu", "--budget", "1", "--steps", "2"]
    assert main([*arguments, "--batch", "16", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"Running the code of {mine}:make_model" in shown
    assert "Speed, above 1 is faster" in shown
    assert "dlgpu.nn.Linear" in shown
    document = report.load(out)
    assert [row["kind"] for row in document["rows"]] == ["timing"] * 3
    # The user's names stay out of the file, of one in which there was no time for anything too.
    late = tmp_path / "late.json"
    assert main([*arguments, "--budget", "1e-9", "--out", str(late)]) == 2
    assert [row["kind"] for row in report.load(late)["rows"]] == ["skipped"]
    assert mine not in late.read_text()
    assert mine not in out.read_text()
    assert str(tmp_path) not in out.read_text()
