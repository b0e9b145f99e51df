"""On a CPU, "auto" takes torch's own functions where they are ahead of NumPy: what that gives, and that explain says so."""

import pytest
import torch
import torch.nn.functional as F

import dlgpu
import dlgpu.functional as D
from dlgpu.kernels import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/conftest.py leaves 'auto' as it is")

M, N = 24, 20


@pytest.fixture(autouse=True)
def _auto():
    with dlgpu.use_backend("auto"):
        yield


def _operands(dtype=torch.float32):
    x = torch.randn(M, N, dtype=dtype)
    return x, torch.randn(M, N, dtype=dtype), torch.randint(0, N, (M,))


# op -> (ours, torch's) on (x, t of x's shape, classes).
CALLS = {
    "linear": (
        lambda x, t, c: D.linear(x, t, t[:, 0].contiguous(), activation="gelu"),
        lambda x, t, c: F.gelu(F.linear(x, t, t[:, 0].contiguous())),
    ),
    "mlp": (
        lambda x, t, c: D.mlp(x, [t, t.t()], [None, None], activation="relu"),
        lambda x, t, c: F.linear(F.relu(F.linear(x, t)), t.t()),
    ),
    "gelu": (lambda x, t, c: D.gelu(x), lambda x, t, c: F.gelu(x)),
    "leaky_relu": (lambda x, t, c: D.leaky_relu(x, 0.3), lambda x, t, c: F.leaky_relu(x, 0.3)),
    "cross_entropy": (
        lambda x, t, c: D.cross_entropy(x, c, t[0].detach(), label_smoothing=0.1, ignore_index=3),
        lambda x, t, c: F.cross_entropy(x, c, t[0].detach(), label_smoothing=0.1, ignore_index=3),
    ),
    "linear_cross_entropy": (
        lambda x, t, c: D.linear_cross_entropy(x, t, c, weight=t[:, 0].detach().abs()),
        lambda x, t, c: F.cross_entropy(F.linear(x, t), c, weight=t[:, 0].detach().abs()),
    ),
    "softmax": (lambda x, t, c: D.softmax(x, 1), lambda x, t, c: F.softmax(x, 1)),
    "log_softmax": (lambda x, t, c: D.log_softmax(x, 1), lambda x, t, c: F.log_softmax(x, 1)),
    "logsumexp": (lambda x, t, c: D.logsumexp(x, 1), lambda x, t, c: torch.logsumexp(x, 1)),
    "mse_loss": (lambda x, t, c: D.mse_loss(x, t), lambda x, t, c: F.mse_loss(x, t)),
    "l1_loss": (
        lambda x, t, c: D.l1_loss(x, t, reduction="sum"),
        lambda x, t, c: F.l1_loss(x, t, reduction="sum"),
    ),
    "smooth_l1_loss": (
        lambda x, t, c: D.smooth_l1_loss(x, t, beta=0.5),
        lambda x, t, c: F.smooth_l1_loss(x, t, beta=0.5),
    ),
    "huber_loss": (
        lambda x, t, c: D.huber_loss(x, t, "none", 0.5),
        lambda x, t, c: F.huber_loss(x, t, "none", 0.5),
    ),
    "binary_cross_entropy_with_logits": (
        lambda x, t, c: D.binary_cross_entropy_with_logits(x, t.sigmoid(), pos_weight=t[0].detach().exp()),
        lambda x, t, c: F.binary_cross_entropy_with_logits(x, t.sigmoid(), pos_weight=t[0].detach().exp()),
    ),
    "kl_div": (
        lambda x, t, c: D.kl_div(x, t.exp(), reduction="batchmean"),
        lambda x, t, c: F.kl_div(x, t.exp(), reduction="batchmean"),
    ),
    "hinge_loss": (
        lambda x, t, c: D.hinge_loss(x, t.sign(), squared=True),
        lambda x, t, c: F.relu(1 - t.sign() * x).square().mean(),
    ),
    "batch_norm": (
        lambda x, t, c: D.batch_norm(x, None, None, t[0], t[1], True, activation="relu"),
        lambda x, t, c: F.relu(F.batch_norm(x, None, None, t[0], t[1], True)),
    ),
    "layer_norm": (
        lambda x, t, c: D.layer_norm(x, (N,), t[0], t[1]),
        lambda x, t, c: F.layer_norm(x, (N,), t[0], t[1]),
    ),
    "rms_norm": (lambda x, t, c: D.rms_norm(x, (N,), t[0]), lambda x, t, c: F.rms_norm(x, (N,), t[0])),
}


def _results(call, x, t, c):
    leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
    y = call(*leaves, c)
    found = torch.autograd.grad(y.sum(), leaves, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(found[0].square().sum(), leaves[0], allow_unused=True)
    return [y, *found, *second]


@pytest.mark.parametrize("op", CALLS)
def test_small_calls_are_torch_s_own(op):
    """Values, first and second derivatives, to the bit."""
    x, t, c = _operands()
    for ours, torchs in zip(*(_results(call, x, t, c) for call in CALLS[op]), strict=True):
        assert (ours is None) == (torchs is None)
        assert ours is None or torch.equal(ours, torchs)


@pytest.mark.parametrize("op", CALLS)
def test_float64_is_numpy_s(op, monkeypatch):
    """So is what is asked for; and it runs no function of torch's."""
    calls = []
    implementation = dlgpu._dispatch.Op.__call__
    monkeypatch.setattr(
        dlgpu._dispatch.Op,
        "__call__",
        lambda self, *args: calls.append(args[-1]) or implementation(self, *args),
    )
    CALLS[op][0](*_operands(torch.float64))
    with dlgpu.use_backend("fallback"):
        CALLS[op][0](*_operands())
    assert calls == ["fallback", "fallback"]


def test_rule():
    small, large = 1 << 10, 1 << 20
    assert configs.cpu_backend("linear", torch.float32, small) == "torch"
    assert configs.cpu_backend("linear", torch.float32, large) == "torch"
    assert configs.cpu_backend("kl_div", torch.float32, small) == "torch"
    assert configs.cpu_backend("kl_div", torch.float32, large) == "fallback"
    assert configs.cpu_backend("mse_loss", torch.bfloat16, large) == "torch"
    assert configs.cpu_backend("mse_loss", torch.float64, small) == "fallback"
    assert configs.cpu_backend("dropout", torch.float32, small) == "fallback"
    assert configs.cpu_backend("rmsprop", torch.float32, small) == "fallback"
    assert configs.cpu_backend("rmsprop", torch.float32, large) == "torch"


def test_logits_that_do_not_fit_the_budget_are_numpy_s():
    x, w, c = _operands()
    logits = M * M * x.itemsize
    for budget, backend in {logits: "torch", logits - 1: "fallback", 0: "fallback"}.items():
        assert dlgpu.explain("linear_cross_entropy", x, w, c, memory_budget=budget).backend == backend
        loss = D.linear_cross_entropy(x, w, c, memory_budget=budget)
        assert torch.equal(loss, F.cross_entropy(F.linear(x, w), c)) or backend == "fallback"


@pytest.mark.parametrize("budget", [None, M * M * 4, M * M * 4 - 1, 0])
def test_a_budget_holds_in_a_trace(budget):
    x, w, c = _operands()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = torch.compile(lambda x: D.linear_cross_entropy(x, w, c, memory_budget=budget), backend=keep)
    torch.testing.assert_close(call(x), F.cross_entropy(F.linear(x, w), c))
    own = any("linear_cross_entropy" in str(node.target) for g in graphs for node in g.graph.nodes)
    assert own == (budget is not None and budget < M * M * 4)


@pytest.mark.parametrize(
    ("input", "weight", "target"), [((6, 0), (7, 0), (6,)), ((5,), (7, 5), ()), ((6, 5), (7, 2, 5), (6, 2))]
)
def test_logits_of_any_form(input, weight, target):
    """As NumPy's: no features, no batch, more dimensions."""
    x, w, c = torch.randn(input), torch.randn(weight), torch.randint(7, target)
    found = D.linear_cross_entropy(x, w, c)
    with dlgpu.use_backend("fallback"):
        torch.testing.assert_close(found, D.linear_cross_entropy(x, w, c))


def test_bad_options_are_refused_as_elsewhere():
    x, w, c = _operands()
    for call in (D.cross_entropy, lambda *args, **options: D.linear_cross_entropy(x, w, c, **options)):
        for value in (-0.5, 1.5, float("nan")):
            with pytest.raises(RuntimeError, match="label_smoothing must be between 0 and 1"):
                call(x, c % N, label_smoothing=value)
        with pytest.raises(ValueError, match="softcap must be positive"):
            call(x, c % N, softcap=float("nan"))
    with pytest.raises(ValueError, match="no classes"):
        D.linear_cross_entropy(x, w[:0], c)
    with pytest.raises(ValueError, match=r"target has shape \[24, 1\], expected \[24\]"):
        D.linear_cross_entropy(x, w, c[:, None])


def test_explain_says_which_and_why():
    x, t, c = _operands()
    for op, args in {"linear": (x, t), "cross_entropy": (x, c), "mse_loss": (x, t), "adam": ([x],)}.items():
        explanation = dlgpu.explain(op, *args)
        assert explanation.backend == "torch"
        assert "ahead of NumPy" in explanation.reason
    big = torch.empty(512, 512)
    assert dlgpu.explain("kl_div", big, big).backend == "fallback"
    assert dlgpu.explain("cross_entropy", x, c, return_lse=True).backend == "fallback"
    assert dlgpu.explain("cross_entropy", x, c, label_smoothing=0.1).backend == "torch"
    assert dlgpu.explain("adam", [x], max_grad_norm=1.0).backend == "fallback"
    assert dlgpu.explain("adam", [x.bfloat16()]).backend == "fallback"


def test_what_torch_lacks_stays():
    """Options of ours that torch's functions do not have."""
    x, _, c = _operands()
    with dlgpu.use_backend("fallback"):
        expected = D.cross_entropy(x, c, z_loss=0.1, return_lse=True)
    found = D.cross_entropy(x, c, z_loss=0.1, return_lse=True)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.lse, expected.lse)
    torch.manual_seed(1)
    y = D.dropout(x, 0.5)
    torch.manual_seed(1)
    with dlgpu.use_backend("fallback"):
        assert torch.equal(D.dropout(x, 0.5), y)


OPTIMIZERS = {
    "SGD": {"lr": 0.1},
    "SGD maximize": {"lr": 0.1, "maximize": True},
    "SGD weight decay": {"lr": 0.1, "weight_decay": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "RMSprop": {"lr": 0.1, "centered": True, "momentum": 0.5},
    "Adam": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "AdamW": {"lr": 0.1},
}


def _steps(cls, options, steps, backends=("auto",)):
    torch.manual_seed(0)
    # One of the size from which RMSprop is torch's; one that gets its first gradient late.
    params = [torch.randn(1 << 20, requires_grad=True), torch.randn(7, 3, requires_grad=True)]
    # Two groups, which are two calls of torch's.
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], **options)
    for step in range(steps):
        for param in params[: 1 + (step > 0)]:
            param.grad = torch.randn_like(param)
        with dlgpu.use_backend(backends[step % len(backends)]):
            optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_torch_s_own(name):
    kind, options = name.split()[0], OPTIMIZERS[name]
    fused = {"fused": True} if kind != "RMSprop" else {}
    ours, params = _steps(getattr(dlgpu.optim, kind), options, 4)
    torchs, expected = _steps(getattr(torch.optim, kind), options | fused, 4)
    for p, e in zip(params, expected, strict=True):
        assert torch.equal(p, e)
        assert {*ours.state[p]} == {*torchs.state[e]}
        for slot, value in torchs.state[e].items():
            assert torch.equal(ours.state[p][slot], value) if value is not None else True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_change_backends_in_the_middle(name):
    kind, options = name.split()[0], OPTIMIZERS[name]
    _, expected = _steps(getattr(dlgpu.optim, kind), options, 5, ("fallback",))
    _, params = _steps(getattr(dlgpu.optim, kind), options, 5, ("auto", "fallback"))
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_leave_gradients_alone(name):
    """Without weight decay and maximize, which copy them: some of torch's forms write into them."""
    options = {k: v for k, v in OPTIMIZERS[name].items() if k not in ("weight_decay", "maximize")}
    param = torch.randn(7, 3, requires_grad=True)
    optimizer = getattr(dlgpu.optim, name.split()[0])([param], **options)
    for _ in range(2):
        grad = torch.randn(7, 3)
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 5, 9)])
def test_batch_norm_of_nothing_has_gradients(shape, training):
    x = torch.randn(shape, requires_grad=True)
    w, b = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    y = D.batch_norm(x, torch.zeros(shape[1]), torch.ones(shape[1]), w, b, training, activation="gelu")
    found = torch.autograd.grad(y.sum(), (x, w, b))
    assert y.shape == x.shape
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(found, (x, w, b), strict=True))


def test_modules_and_training():
    """A network learns through what "auto" chooses as through torch's modules, step by step to the bit."""
    losses = {}
    for kind, (nn, optim) in {"ours": (dlgpu.nn, dlgpu.optim), "torch": (torch.nn, torch.optim)}.items():
        torch.manual_seed(0)
        first = nn.Linear(N, 32)
        net = torch.nn.Sequential(first, nn.BatchNorm1d(32), torch.nn.ReLU(), nn.Linear(32, N))
        optimizer = optim.AdamW(net.parameters(), **({"fused": True} if kind == "torch" else {}))
        x, _, c = _operands()
        losses[kind] = []
        for _ in range(5):
            loss = nn.CrossEntropyLoss()(net(x), c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
    assert losses["ours"] == losses["torch"]
