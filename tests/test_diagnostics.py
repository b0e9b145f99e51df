"""Diagnosis against analytic cases: known gradients and Hessians, a net at a saddle, constructed histories."""

import builtins
import dataclasses
import doctest
import math

import numpy as np
import pytest
import torch

import dlgpu
from dlgpu import diagnostics
from dlgpu.diagnostics import critical_point, dead_relu_share, fit_report, gradient_norms


def chain(weights, activation=None):
    """Layers of one weight each."""
    model = torch.nn.Sequential(*(dlgpu.nn.Linear(1, 1, bias=False, activation=activation) for _ in weights))
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.fill_(weight)
    return model


def test_docstring_examples():
    failed, tried = doctest.testmod(diagnostics)
    assert failed == 0
    assert tried >= 8


def test_gradient_norms_are_the_known_ones():
    """y = w2 (w1 x + b1) + b2 with loss y: dy/dw1 = w2 x, dy/db1 = w2, dy/dw2 = w1 x + b1, dy/db2 = 1."""
    model = dlgpu.nn.MLP([1, 1, 1], None).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), (3.0, 1.0, 5.0, 7.0), strict=True):
            p.fill_(value)
    model(torch.tensor([[2.0]], dtype=torch.float64)).sum().backward()
    report = gradient_norms(model)
    first, last = report.layers
    assert (first.name, last.name) == ("0", "1")
    assert first.norm == pytest.approx(math.hypot(10, 5))
    assert last.norm == pytest.approx(math.hypot(7, 1))
    assert first.rms == pytest.approx(math.hypot(10, 5) / math.sqrt(2))
    assert report.total_norm == pytest.approx(math.sqrt(125 + 50))
    assert report.verdict == "healthy"


@pytest.mark.parametrize(
    ("weight", "verdict"),
    [
        (0.01, "vanishing"),
        (0.9, "healthy"),
        (1.1, "healthy"),
        (100.0, "exploding"),
        (4.0, "exploding"),
        (0.0, "vanishing"),
    ],
)
def test_vanishing_and_exploding_are_named(backend, weight, verdict):
    """A chain of five: the gradient of the first layer is that of the last times w^4 / w^4, so the loss weighs the last."""
    model = chain([weight] * 5)
    x = torch.ones(1, 1)
    hidden = model[:-1](x)
    # Apart from the last layer's input, so that its gradient is 1 whatever the weights are.
    (model[-1](hidden / hidden.detach().abs().clamp(min=1e-30))).sum().backward()
    model[0].weight.grad *= weight**4 * hidden.item() if weight else 0
    report = gradient_norms(model)
    assert report.verdict == verdict
    assert f"gradients: {verdict}" in str(report)


def test_a_deep_sigmoid_net_vanishes_and_a_relu_net_does_not():
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    verdicts = {}
    for activation in ("sigmoid", "relu"):
        torch.manual_seed(0)
        model = dlgpu.nn.MLP([8, *[32] * 8, 3], activation)
        if activation == "relu":
            for p in model.parameters():
                if p.dim() == 2:
                    torch.nn.init.kaiming_normal_(p)
        dlgpu.functional.cross_entropy(model(x), y).backward()
        verdicts[activation] = gradient_norms(model).verdict
    assert verdicts == {"sigmoid": "vanishing", "relu": "healthy"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_explodes(value):
    model = chain([1.0, 1.0])
    model(torch.ones(1, 1)).sum().backward()
    model[1].weight.grad.fill_(value)
    report = gradient_norms(model)
    assert (report.verdict, report.reason) == ("exploding", "not finite in 1")


def test_all_gradients_zero_vanish():
    model = chain([0.0, 0.0])
    model(torch.ones(1, 1)).sum().backward()
    assert gradient_norms(model).reason == "all are zero"


def test_tiny_gradients_do_not_underflow():
    model = chain([1.0])
    model[0].weight.grad = torch.full((1, 1), 1e-30)
    assert gradient_norms(model).total_norm == pytest.approx(1e-30, rel=1e-6, abs=0)


def test_a_shared_gradient_counts_once_in_the_total():
    model = chain([2.0, 3.0])
    model[1].weight = model[0].weight
    model(torch.ones(1, 1)).sum().backward()
    report = gradient_norms(model)
    assert [layer.norm for layer in report.layers] == [4.0, 4.0]
    assert report.total_norm == 4.0


def test_gradient_norms_refuses():
    model = chain([1.0])
    with pytest.raises(ValueError, match="call backward first"):
        gradient_norms(model)
    with pytest.raises(ValueError, match="ratio: got 1"):
        gradient_norms(model, ratio=1)


def dead_pair(backend_module):
    """Units with weights 1, -1 and biases 0, -9, 9: on x = -2 and 5 the second never fires."""
    with torch.no_grad():
        backend_module.weight.copy_(torch.tensor([[1.0], [-1.0], [-1.0]]))
        backend_module.bias.copy_(torch.tensor([0.0, -9.0, 9.0]))
    return backend_module


@pytest.mark.parametrize(
    "model",
    [
        dead_pair(dlgpu.nn.Linear(1, 3, activation="relu")),
        torch.nn.Sequential(dead_pair(torch.nn.Linear(1, 3)), torch.nn.ReLU()),
        torch.nn.Sequential(
            dead_pair(dlgpu.nn.Linear(1, 3)), dlgpu.nn.Activation("relu"), torch.nn.Dropout(0.9)
        ),
    ],
    ids=["fused", "torch", "module"],
)
def test_dead_relu_share(backend, model):
    x = torch.tensor([[-2.0], [5.0]])
    whole = dead_relu_share(model, x)
    assert whole.share == pytest.approx(1 / 3)
    assert list(whole.layers.values()) == [(1, 3)]
    assert model.training
    # Row by row, as pairs with targets: a unit that fires in one batch is alive.
    assert dead_relu_share(model, [(row[None], None) for row in x]) == whole
    assert dead_relu_share(model, x[:1]).share == pytest.approx(2 / 3)
    assert "33.3%" in str(whole)


def test_dead_relu_in_an_mlp_counts_each_layer():
    model = dlgpu.nn.MLP([2, 4, 6, 1], "relu")
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    x = torch.randn(32, 2)
    assert dead_relu_share(model, x).layers["3"] == (6, 6)
    # The hooks are gone: nothing is counted any more, and the net is a chain again.
    assert not any(module._forward_hooks for module in model.modules())


def test_one_relu_after_several_layers():
    relu = torch.nn.ReLU()
    model = torch.nn.Sequential(dead_pair(torch.nn.Linear(1, 3)), relu, torch.nn.Linear(3, 2), relu)
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    x = torch.tensor([[-2.0], [5.0]])
    assert dead_relu_share(model, x).layers == {"1": (1, 3), "1, call 2": (2, 2)}
    # Batch by batch, one without a row axis.
    assert dead_relu_share(model, [x[:1], x[1]]) == dead_relu_share(model, x)


def test_dead_relus_of_batch_norm_are_channels():
    """Axis 1, of [N, C, L] too."""
    model = dlgpu.nn.BatchNorm1d(3, activation="relu")
    with torch.no_grad():
        model.bias[1] = -100.0
    for shape in ((8, 3), (8, 3, 5)):
        assert dead_relu_share(model, torch.randn(shape)).layers == {"(model)": (1, 3)}


def test_dead_relu_share_refuses():
    with pytest.raises(ValueError, match="no ReLU was run"):
        dead_relu_share(dlgpu.nn.MLP([2, 3, 1], "tanh"), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="no ReLU was run"):
        dead_relu_share(dlgpu.nn.MLP([2, 3, 1], "relu"), [])
    # Its result is no ReLU's.
    with pytest.raises(ValueError, match="no ReLU was run"):
        dead_relu_share(dlgpu.nn.ReGLU(2, 3), torch.zeros(4, 2))


class Point(torch.nn.Module):
    """theta as two parameters of different shapes; the output is all of it."""

    def __init__(self, values):
        super().__init__()
        values = torch.as_tensor(values, dtype=torch.float64)
        self.a, self.b = (torch.nn.Parameter(part.clone()) for part in (values[:1], values[1:].view(-1, 1)))

    def forward(self, _):
        return torch.cat([self.a.flatten(), self.b.flatten()])


def quadratic(eigenvalues, seed=0):
    """(H, loss theta H theta / 2 + 3) with H = Q diag(eigenvalues) Q^T, Q a random rotation."""
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    matrix = torch.from_numpy(rotation * np.asarray(eigenvalues) @ rotation.T)
    return matrix, lambda theta, _: theta @ matrix @ theta / 2 + 3


PATHS = {"dense": 512, "lanczos": 0}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("eigenvalues", "kind"),
    [
        ([0.5, 1, 2, 8, 9], "minimum"),
        ([-0.1, 1, 2, 3, 10], "saddle"),
        ([-10, -3, -2, -1, 0.1], "saddle"),
        ([-5, -4, -3, -2, -1], "maximum"),
        ([0, 1, 2, 3, 4], "undecided"),
        ([-4, -3, -2, -1, 0], "undecided"),
        ([0, 0, 0, 0, 0], "undecided"),
    ],
)
def test_a_quadratic_with_known_eigenvalues(path, eigenvalues, kind):
    matrix, loss = quadratic(eigenvalues)
    point = critical_point(Point([0.0] * 5), loss, (None, None), full_spectrum=PATHS[path])
    assert point.kind == kind
    assert f"critical point: {kind}" in str(point)
    assert point.loss == 3
    assert point.gradient_norm == 0
    assert point.smallest == pytest.approx(min(eigenvalues), abs=1e-5)
    assert point.largest == pytest.approx(max(eigenvalues), abs=1e-5)
    if path == "dense":
        assert point.minimum_ratio == sum(e > 0 for e in eigenvalues) / 5
        np.testing.assert_allclose(point.eigenvalues, eigenvalues, atol=1e-12)
    else:
        assert point.minimum_ratio is None
        assert point.eigenvalues is None
    if min(eigenvalues) < 0:
        assert {name: p.shape for name, p in point.escape_direction.items()} == {"a": (1,), "b": (4, 1)}
        u = torch.cat([part.flatten() for part in point.escape_direction.values()])
        assert u.norm() == pytest.approx(1)
        torch.testing.assert_close(matrix @ u, min(eigenvalues) * u, rtol=0, atol=1e-3)
    else:
        assert point.escape_direction is None


@pytest.mark.parametrize("path", PATHS)
def test_many_parameters(path):
    """300 eigenvalues, of which 3 are negative."""
    eigenvalues = np.concatenate([[-2.0, -1.0, -0.5], np.linspace(0.1, 20, 297)])
    _, loss = quadratic(eigenvalues)
    point = critical_point(Point([0.0] * 300), loss, (None, None), full_spectrum=PATHS[path])
    assert point.kind == "saddle"
    assert point.smallest == pytest.approx(-2, rel=1e-5)
    assert point.largest == pytest.approx(20, rel=1e-5)
    assert point.minimum_ratio == (pytest.approx(0.99) if path == "dense" else None)
    again = critical_point(Point([0.0] * 300), loss, (None, None), full_spectrum=PATHS[path])
    assert all(
        torch.equal(u, v) for u, v in zip(*(p.escape_direction.values() for p in (point, again)), strict=True)
    )


def test_the_classic_saddle_is_left_downhill():
    """x^2 - y^2, beside its saddle, where the gradient says which way along the eigenvector is down."""
    for y in (1e-4, -1e-4):
        point = critical_point(Point([0.0, y]), lambda t, _: t[0] ** 2 - t[1] ** 2, (None, None))
        assert (point.kind, point.smallest, point.largest, point.minimum_ratio) == ("saddle", -2, 2, 0.5)
        assert point.escape_direction["b"].item() == pytest.approx(math.copysign(1, y))


@pytest.mark.parametrize("path", PATHS)
def test_third_powers_leave_it_undecided(path):
    """x^3 + y^2 + z^2 has a zero eigenvalue at the origin: neither minimum nor saddle by the second derivative."""
    point = critical_point(
        Point([0.0] * 3),
        lambda t, _: t[0] ** 3 + t[1] ** 2 + t[2] ** 2,
        (None, None),
        full_spectrum=PATHS[path],
    )
    assert point.kind == "undecided"
    assert point.escape_direction is None
    assert "zero" in point.reason


def test_away_from_a_critical_point():
    model = Point([1.0, 2.0])
    point = critical_point(model, lambda t, _: (t**2).sum(), (None, None))
    assert point.kind == "undecided"
    assert "not a critical point" in point.reason
    assert point.gradient_norm == pytest.approx(math.hypot(2, 4))
    assert (
        critical_point(model, lambda t, _: (t**2).sum(), (None, None), gradient_tolerance=5).kind == "minimum"
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_net_at_a_saddle(backend, path, dtype):
    """y = w2 tanh(w1 x) at zero weights: the gradient is zero, the loss has a direction down."""
    if backend == "triton" and dtype is torch.float64:
        pytest.skip("the kernels do not take float64")
    model = dlgpu.nn.MLP([1, 2, 1], "tanh").to(dtype)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    x = torch.linspace(-1, 1, 8, dtype=dtype)[:, None]
    y = torch.sin(2 * x)
    before = {name: p.clone() for name, p in model.state_dict().items()}

    def loss_fn(output, target):
        return (output - target).square().mean()

    point = critical_point(model, loss_fn, (x, y), full_spectrum=PATHS[path])
    assert point.kind == "saddle"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # d2L / dw1 dw2 = -2 mean(x y) for each unit, so the eigenvalues are 2 (of the output's bias), and +- that, and zeros.
    slope = 2 * (x * y).mean().item()
    assert point.smallest == pytest.approx(-slope, rel=1e-5)
    assert point.largest == pytest.approx(2, rel=1e-5)
    if path == "dense":
        assert point.minimum_ratio == 3 / 7
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * point.escape_direction[name]
        assert loss_fn(model(x), y) < point.loss - 0.25 * 0.1**2 * slope


def test_a_net_at_its_minimum():
    """Linear regression's Hessian is 2 X^T X / n, with X of inputs and a one."""
    x, t = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    design = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, t).solution
    model = dlgpu.nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
    point = critical_point(model, lambda y, t: (y - t).square().mean(), (x, t))
    assert (point.kind, point.minimum_ratio) == ("minimum", 1)
    np.testing.assert_allclose(point.eigenvalues, np.linalg.eigvalsh(2 * design.T @ design / 50), rtol=1e-10)


def test_evaluation_mode_and_unused_parameters():
    """Dropout is off, frozen parameters are left out, and one that the loss does not use adds a zero eigenvalue."""
    model = torch.nn.Sequential(dlgpu.nn.Linear(2, 1, bias=False), torch.nn.Dropout(0.5)).double()
    model.spare = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    model.frozen = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)
    torch.nn.init.zeros_(model[0].weight)
    x = torch.eye(2, dtype=torch.float64)
    point = critical_point(model, lambda y, t: y.square().sum() / 2, (x, None))
    np.testing.assert_allclose(point.eigenvalues, [0, 1, 1])
    assert point.kind == "undecided"
    assert model.training
    assert model[1].training


def test_critical_point_refuses(monkeypatch):
    model = Point([0.0] * 4)
    for loss_fn in (
        lambda t, _: t,
        lambda t, _: t.sum() * math.nan,
        lambda t, _: t.detach().sum(),
        lambda t, _: 0.0,
    ):
        with pytest.raises(ValueError, match="expected a scalar"):
            critical_point(model, loss_fn, (None, None))
    frozen = Point([0.0] * 4).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        critical_point(frozen, lambda t, _: t.sum(), (None, None))
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        critical_point(torch.nn.PReLU(0), lambda t, _: t.sum(), (torch.zeros(0, 0), None))

    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    assert critical_point(model, lambda t, _: (t**2).sum(), (None, None)).kind == "minimum"
    with pytest.raises(ImportError, match="needs scipy"):
        critical_point(model, lambda t, _: (t**2).sum(), (None, None), full_spectrum=0)


FALLING = [1.0, 0.5, 0.2, 0.05, 0.05]
STUCK = [1.0, 0.8, 0.7, 0.7, 0.7]


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        ({"train_loss": STUCK}, "model bias or optimization"),
        ({"train_loss": STUCK, "val_loss": FALLING}, "model bias or optimization"),
        ({"train_loss": STUCK, "smaller_train_loss": 0.3}, "optimization"),
        ({"train_loss": STUCK, "smaller_train_loss": FALLING, "larger_train_loss": 0.1}, "optimization"),
        ({"train_loss": STUCK, "smaller_train_loss": 0.69}, "model bias"),
        ({"train_loss": STUCK, "smaller_train_loss": 0.9, "larger_train_loss": 0.1}, "model bias"),
        ({"train_loss": STUCK, "larger_train_loss": 0.1}, "model bias"),
        ({"train_loss": STUCK, "larger_train_loss": 0.7}, "model bias or optimization"),
        (
            {"train_loss": STUCK, "smaller_train_loss": 0.9, "larger_train_loss": 0.7},
            "model bias or optimization",
        ),
        ({"train_loss": [1.0, 9.0, math.nan]}, "optimization"),
        ({"train_loss": [1.0, 9.0, math.inf], "smaller_train_loss": 2.0}, "optimization"),
        ({"train_loss": FALLING}, "training loss low"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.5, 0.2, 0.06, 0.05]}, "good fit"),
        # Both are tiny: four times the training loss is still low.
        ({"train_loss": [1.0, 1e-4], "val_loss": [1.0, 4e-4]}, "good fit"),
        # The loss that counts as low is just missed by both.
        ({"train_loss": [1.0, 0.099], "val_loss": [1.0, 0.101]}, "good fit"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.09, 0.3, 0.4, 0.5]}, "overfitting"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.6, 0.6, 0.6, 0.6]}, "overfitting or mismatch"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.6, 0.6, 0.6, math.nan]}, "overfitting or mismatch"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.05, 0.6, 0.6, math.nan]}, "overfitting"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.6, 0.6, 0.6, 0.6], "holdout_loss": 0.5}, "overfitting"),
        ({"train_loss": FALLING, "val_loss": [1.0, 0.6, 0.6, 0.6, 0.6], "holdout_loss": FALLING}, "mismatch"),
        ({"train_loss": STUCK, "val_loss": STUCK, "target_loss": 0.7}, "good fit"),
        ({"train_loss": FALLING, "target_loss": 0.01}, "model bias or optimization"),
        # The first loss that is a number sets the target.
        ({"train_loss": [math.nan, *FALLING]}, "training loss low"),
        ({"train_loss": [math.inf, *STUCK]}, "model bias or optimization"),
        # A model that diverged says nothing.
        ({"train_loss": STUCK, "smaller_train_loss": math.nan}, "model bias or optimization"),
        (
            {"train_loss": FALLING, "val_loss": [1.0, 0.6, 0.6, 0.6, 0.6], "holdout_loss": math.nan},
            "overfitting or mismatch",
        ),
        # Losses below zero, as of a density.
        (
            {"train_loss": [1, -1.0], "larger_train_loss": -1.05, "target_loss": -2},
            "model bias or optimization",
        ),
        ({"train_loss": [1, -1.0], "larger_train_loss": -1.2, "target_loss": -2}, "model bias"),
        ({"train_loss": [1, -3.0], "val_loss": [1, -2.9], "target_loss": -2.95}, "good fit"),
    ],
)
def test_fit_report(history, verdict):
    report = fit_report(history)
    assert report.verdict == verdict
    assert str(report).startswith(f"fit: {verdict}\n  - training loss ")
    assert report.advice
    # Each other loss given is named in the evidence, unless the training loss already decided.
    if history["train_loss"] is STUCK and "target_loss" not in history:
        for size in ("smaller", "larger"):
            assert (f"{size}_train_loss" in history) == any(
                f"a {size} model" in line for line in report.evidence
            )


def test_losses_may_be_tensors():
    losses = [torch.tensor(value, requires_grad=True) for value in FALLING]
    assert fit_report({"train_loss": losses}) == fit_report({"train_loss": torch.stack(losses)})


def test_the_end_of_a_curve_is_averaged():
    """The last of 100 epochs is an outlier: its neighbours say that the loss is low."""
    curve = [1.0, *[0.01] * 98, 0.2]
    assert fit_report({"train_loss": curve}).verdict == "training loss low"
    assert fit_report({"train_loss": curve[-10:], "target_loss": 0.1}).verdict == "model bias or optimization"


def test_a_loss_that_still_falls_is_evidence():
    report = fit_report({"train_loss": np.linspace(2, 1, 50)})
    assert any("still falling" in line for line in report.evidence)
    # Flat at the end, and falling by less than the margin.
    for curve in ([2, *[1.0] * 49], np.linspace(2, 1.9, 50)):
        assert not any("still falling" in line for line in fit_report({"train_loss": curve}).evidence)


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"val_loss": [1.0]},
        {"train_loss": [1.0], "loss": 2},
        {"train_loss": []},
        {"train_loss": [[1.0]]},
        {"train_loss": [-1.0, -2.0]},
    ],
)
def test_fit_report_refuses(history):
    with pytest.raises(ValueError, match="history"):
        fit_report(history)


def test_reports_are_frozen():
    report = fit_report({"train_loss": [1.0]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.verdict = "good fit"
