"""The table of docs/pytorch.md, row by row: what of torch works with dlgpu, and what refuses. One test a row."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vmap,
)
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dlgpu
from dlgpu import functional
from test_dispatch import CALLS, inputs
from tolerance import assert_same_bits, run

DOCS = Path(__file__).resolve().parents[1] / "docs" / "pytorch.md"
ROWS: set[str] = set()


def row(name):
    """Marks the test of a row of the table."""
    ROWS.add(name)
    return lambda test: test


def test_every_row_has_a_test_and_every_test_a_row():
    table = re.findall(r"^\| ([^|]+?) \| (?:works|refuses)", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(ROWS)


@pytest.fixture(autouse=True)
def _fallback():
    """The code of the library: by itself a small call on a CPU is torch's."""
    with dlgpu.use_backend("fallback"):
        yield


# Functions of tensors, all in one graph, and shapes: each public function at least once.
FUNCTIONS = {name: call for name, call in CALLS.items() if name != "nn"}
FUNCTIONS["dropout"] = (lambda x: functional.dropout(x, 0.4), [(5, 3)])
FUNCTIONS["l1_loss"] = (lambda x, t: functional.l1_loss(x, t), [(5, 3)] * 2)
FUNCTIONS["smooth_l1_loss"] = (lambda x, t: functional.smooth_l1_loss(x, t), [(5, 3)] * 2)


def test_every_public_function_is_here():
    used = {name.split()[0] for name in FUNCTIONS}
    assert used == set(functional.__all__)


each_function = pytest.mark.parametrize("name", FUNCTIONS)


def squares(function):
    """A loss of it, curved, so that second derivatives are not 0."""

    def loss(*args):
        torch.manual_seed(3)
        y = function(*args)
        return (y * y).sum()

    return loss


def case(name):
    """(a function of one result that is a loss, its arguments in float64)."""
    function, shapes = FUNCTIONS[name]
    return function, [inputs(*shape, dtype=torch.float64) for shape in shapes]


def by_autograd(loss, args):
    leaves = [a.clone().requires_grad_() for a in args]
    return torch.autograd.grad(loss(*leaves), leaves)


def stacked(args):
    return [torch.stack([a, a * 0.5, a - 0.2]) for a in args]


X = torch.linspace(-1, 1, 48).reshape(6, 8)
T = torch.arange(6) % 3


class Gated(nn.Sequential):
    def __init__(self):
        super().__init__(dlgpu.nn.SwiGLU(8, 6), dlgpu.nn.GEGLU(8, 6), dlgpu.nn.ReGLU(8, 6))


def network():
    """Every kind of layer."""
    torch.manual_seed(1)
    return nn.Sequential(
        Gated(),
        dlgpu.nn.Linear(8, 6, activation="gelu"),
        dlgpu.nn.BatchNorm1d(6, activation="relu"),
        dlgpu.nn.LayerNorm(6),
        dlgpu.nn.Dropout(0.3),
        dlgpu.nn.MLP([6, 5, 4], activation="relu"),
        dlgpu.nn.RMSNorm(4),
        dlgpu.nn.Activation("silu"),
        dlgpu.nn.Linear(4, 3),
    )


def gradients(module, x=X):
    """Of a loss that is not symmetric, after the same seed."""
    module.zero_grad()
    torch.manual_seed(2)
    dlgpu.functional.cross_entropy(module(x), T).backward()
    return [p.grad for p in module.parameters()]


# torch.compile and torch.export.
@pytest.fixture
def compiled():
    """torch.compile(fullgraph=True), and what counts its graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def compile(function, **options):
        return torch.compile(function, fullgraph=True, backend=counter, **options), counter

    yield compile
    torch._dynamo.reset()


LOSSES = {
    "CrossEntropyLoss": (lambda: dlgpu.nn.CrossEntropyLoss(label_smoothing=0.1), T),
    "MSELoss": (dlgpu.nn.MSELoss, X[:, :3]),
    "L1Loss": (dlgpu.nn.L1Loss, X[:, :3]),
    "SmoothL1Loss": (dlgpu.nn.SmoothL1Loss, X[:, :3]),
    "HuberLoss": (dlgpu.nn.HuberLoss, X[:, :3]),
    "BCEWithLogitsLoss": (dlgpu.nn.BCEWithLogitsLoss, X[:, :3]),
    "HingeLoss": (dlgpu.nn.HingeLoss, X[:, :3]),
    "MultiMarginLoss": (dlgpu.nn.MultiMarginLoss, T),
    "KLDivLoss": (lambda: dlgpu.nn.KLDivLoss(reduction="batchmean"), X[:, :3].softmax(1)),
}


@row("torch.compile(fullgraph=True), forward and backward")
def test_compile_layers(compiled):
    """Every layer; every function alone is in test_dispatch.py."""
    module = network()
    fast, counter = compiled(module)
    state = copy.deepcopy(module.state_dict())
    expected = gradients(module)
    module.load_state_dict(state)
    found = gradients(lambda_module(fast, module))
    assert_same_bits(found, expected)
    assert counter.frame_count == 1


def lambda_module(fast, module):
    """`fast` in the place of `module`, with its parameters."""

    class Both:
        zero_grad, parameters = module.zero_grad, module.parameters

        def __call__(self, x):
            return fast(x)

    return Both()


@row("torch.compile of the losses")
def test_compile_losses(compiled):
    modules = {name: make() for name, (make, _) in LOSSES.items()}
    head = dlgpu.nn.LinearCrossEntropyLoss(8, 3)

    def total(x, y):
        return sum(m(y, LOSSES[name][1]) for name, m in modules.items()) + head(x, T)

    fast, counter = compiled(total)
    args = [X, X[:, :3] * 2]
    assert_same_bits(run(fast, args, torch.ones_like), run(total, args, torch.ones_like))
    assert counter.frame_count == 1


@row("dynamic shapes")
@pytest.mark.parametrize("backend", ["fallback", "auto"])
def test_dynamic_shapes(compiled, backend):
    """One graph for all batch sizes, of a network with every layer, whatever the backend would be for each size."""
    module = network().eval()
    fast, counter = compiled(module, dynamic=True)
    with dlgpu.use_backend(backend):
        fast(inputs(6, 8))
        # Dynamo itself may start over within the first call.
        first = counter.frame_count
        for batch in (29, 5000, 13):
            x = inputs(batch, 8)
            assert_close(fast(x), module(x))
    assert counter.frame_count == first


@row("recompilation")
def test_recompilations(compiled):
    """Another batch size makes one more graph in all, another mode one, another dtype one."""
    module = network()
    fast, counter = compiled(module)
    counts = []
    for x in (inputs(6, 8), inputs(7, 8), inputs(29, 8), inputs(12, 8)):
        fast(x)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]
    module.eval()
    fast(inputs(12, 8))
    fast(inputs(13, 8))
    assert counter.frame_count == 3


@row("torch.compile around an optimizer's step")
def test_compile_and_optimizers():
    """The step is left out of the graph: a break, or an error with fullgraph=True, and the eager result."""
    torch._dynamo.reset()

    def train(wrap):
        torch.manual_seed(0)
        layer = dlgpu.nn.Linear(8, 3)
        optimizer = dlgpu.optim.Adam(layer.parameters())

        def step():
            optimizer.zero_grad()
            functional.cross_entropy(layer(X), T).backward()
            optimizer.step()

        step = wrap(step)
        for _ in range(3):
            step()
        return list(layer.parameters())

    assert_same_bits(train(lambda f: torch.compile(f, backend="aot_eager")), train(lambda f: f))
    torch._dynamo.reset()
    optimizer = dlgpu.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"skip|disable"):
        torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)()
    torch._dynamo.reset()


@row("compiled autograd")
@pytest.mark.filterwarnings("ignore:.*Profiler")
def test_compiled_autograd():
    torch._dynamo.reset()
    module = nn.Sequential(*network()[1:5])
    state = copy.deepcopy(module.state_dict())
    expected = gradients(module)
    module.load_state_dict(state)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = gradients(module)
    assert_same_bits(found, expected)
    torch._dynamo.reset()


@row("torch.export, saved and loaded")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export():
    module = network().eval()
    program = torch.export.export(module, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer)
    for x in (X, inputs(11, 8)):
        assert_same_bits([again.module()(x), again.run_decompositions().module()(x)], [module(x)] * 2)
    # It trains too: no op was decomposed.
    loaded = again.module()
    loaded(X).sum().backward()
    module(X).sum().backward()
    found = dict(loaded.named_parameters())
    for name, p in module.named_parameters():
        assert_same_bits([found[name].grad], [p.grad])


@row("torch.fx.symbolic_trace")
def test_fx():
    """All but batch norm, whose check of the input's dimensions is control flow to the tracer, and Activation."""
    module = network().eval()
    for i, error in ((2, torch.fx.proxy.TraceError), (7, TypeError)):
        with pytest.raises(error):
            torch.fx.symbolic_trace(module[i])
        module[i] = nn.Identity()
    traced = torch.fx.symbolic_trace(module)
    assert_same_bits([traced(X), pickle.loads(pickle.dumps(traced))(X)], [module(X)] * 2)
    assert functional.linear in [node.target for node in traced.graph.nodes]


@row("torch.jit.script")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script():
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(dlgpu.nn.Linear(8, 3))


@row("torch.jit.trace")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    """The op is in the graph, not the arrays that a call computes on; a chain's lists are more than the tracer takes."""
    layer = dlgpu.nn.Linear(8, 3, activation="relu")
    traced = torch.jit.trace(layer, (X,))
    x = inputs(9, 8)
    assert_same_bits([traced(x)], [layer(x)])
    assert "dlgpu::linear" in str(traced.inlined_graph)
    with pytest.raises(RuntimeError, match="unsupported input list type"):
        torch.jit.trace(dlgpu.nn.MLP([8, 4, 3], activation="relu"), (X,))


# torch.func, and autograd beyond backward.
@row("torch.func.grad, vjp, jacrev")
@each_function
def test_grad(name):
    function, args = case(name)
    loss, numbers = squares(function), tuple(range(len(args)))
    for found in (grad(loss, numbers)(*args), jacrev(loss, numbers)(*args)):
        assert_close(found, by_autograd(loss, args))


@row("torch.func.vmap")
@pytest.mark.filterwarnings("ignore:.*batching rule")
@each_function
def test_vmap(name):
    function, args = case(name)
    loss, many = squares(function), stacked(args)
    expected = torch.stack([loss(*(a[i] for a in many)) for i in range(3)])
    assert_close(vmap(loss, randomness="same")(*many), expected)


@row("gradients of each sample: vmap of grad")
@pytest.mark.filterwarnings("ignore:.*batching rule")
@each_function
def test_vmap_of_grad(name):
    function, args = case(name)
    loss, many = squares(function), stacked(args)
    found = vmap(grad(loss, tuple(range(len(args)))), randomness="same")(*many)
    expected = zip(*(by_autograd(loss, [a[i] for a in many]) for i in range(3)), strict=True)
    assert_close(found, tuple(map(torch.stack, expected)))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@row("forward mode: torch.func.jvp, jacfwd, linearize; torch.autograd.forward_ad")
@each_function
def test_forward_mode(name):
    function, args = case(name)
    loss, tangents = squares(function), [torch.randn_like(a) for a in args]
    expected = sum((g * t).sum() for g, t in zip(by_autograd(loss, args), tangents, strict=True))
    assert_close(jvp(loss, tuple(args), tuple(tangents))[1], expected)
    assert_close(jacfwd(loss, randomness="same")(*args), by_autograd(loss, args)[0])
    with forward_ad.dual_level():
        dual = loss(*map(forward_ad.make_dual, args, tangents))
        assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    if name == "linear gelu":
        assert_close(linearize(loss, *args)[1](*tangents), expected)


@row("second derivatives: torch.func.hessian, create_graph=True")
@each_function
def test_hessian(name):
    function, args = case(name)
    loss = squares(function)
    x = args[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(x, *args[1:]), x, create_graph=True)
    expected = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in g.reshape(-1)]
    if name == "dropout":
        found = jacrev(jacrev(loss))(*args)
    else:
        found = hessian(loss)(*args)
    assert_close(found, torch.stack(expected).view(*g.shape, *g.shape))


@row("torch.autograd.grad(is_grads_batched=True), functional.jacobian(vectorize=True)")
@each_function
def test_batched_gradients(name):
    function, args = case(name)
    leaves = [a.clone().requires_grad_() for a in args]
    y = function(*leaves)
    v = torch.randn((3, *y.shape), dtype=y.dtype)
    found = torch.autograd.grad(y, leaves, v, is_grads_batched=True, retain_graph=True)
    expected = zip(*(torch.autograd.grad(y, leaves, g, retain_graph=True) for g in v), strict=True)
    assert_close(found, tuple(map(torch.stack, expected)))


@row("a backward of dual numbers")
@each_function
def test_dual_numbers_backward(name):
    """Forward mode through a graph that was made outside it."""
    function, args = case(name)
    leaves = [a.clone().requires_grad_() for a in args]
    y = function(*leaves)
    v, tangent = torch.randn_like(y), torch.randn_like(y)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, tangent)
        if name.startswith("huber_loss"):
            with pytest.raises(NotImplementedError, match="forward AD with huber_loss_backward"):
                torch.autograd.grad(y, leaves, dual, retain_graph=True)
            return
        found = torch.autograd.grad(y, leaves, dual, retain_graph=True)
        found = [forward_ad.unpack_dual(g).tangent for g in found]
    assert_close(found, list(torch.autograd.grad(y, leaves, tangent)))


@row("torch.func.functional_call")
def test_functional_call():
    module = network().eval()
    state = {name: t * 2 if t.is_floating_point() else t for name, t in module.state_dict().items()}
    found = functional_call(module, state, (X,))
    module.load_state_dict(state)
    assert_same_bits([found], [module(X)])


@row("ensembles: torch.func.stack_module_state")
def test_ensemble():
    modules = [network().eval() for _ in range(3)]
    for i, module in enumerate(modules):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * i)
    parameters, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    found = vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)
    assert_close(found, torch.stack([module(X) for module in modules]))


@row("torch.func with batch norm's running statistics, dropout's mask")
def test_torchs_rules_for_state_and_randomness():
    """As torch.nn's: what a transform may not change or draw is an error."""
    x, mean = inputs(3, 5, 8), torch.zeros(8)
    with pytest.raises(RuntimeError, match="running_mean"):
        vmap(lambda x: functional.batch_norm(x, mean, torch.ones(8), training=True))(x)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(functional.dropout)(x)
    masks = vmap(functional.dropout, randomness="different")(torch.ones(3, 64))
    assert not torch.equal(masks[0], masks[1])


@row("a target out of range in a transform")
def test_targets_in_a_transform():
    """An IndexError where its value can be read; within vmap NaN, as on a GPU."""
    x, bad = inputs(5, 3), torch.tensor([0, 1, 7, 2, 0])
    with pytest.raises(IndexError, match="row 2"):
        grad(lambda x: functional.cross_entropy(x, bad))(x)
    found = vmap(lambda x, t: functional.cross_entropy(x[None], t[None]))(x, bad)
    assert found.isnan().tolist() == [False, False, True, False, False]


# Memory and hooks.
@row("torch.utils.checkpoint, reentrant or not; checkpoint_sequential")
@each_function
def test_checkpoint(name):
    function, args = case(name)
    loss = squares(function)
    for reentrant in (False, True):
        leaves = [a.clone().requires_grad_() for a in args]
        checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
        assert_same_bits([a.grad for a in leaves], by_autograd(loss, args))
    if name == "linear":
        module = nn.Sequential(*network()[:2], *network()[3:4])
        found = checkpoint_sequential(module, 2, X.clone().requires_grad_(), use_reentrant=False)
        assert_same_bits([found], [module(X)])


@row("saved_tensors_hooks, save_on_cpu")
@each_function
def test_saved_tensors_hooks(name):
    function, args = case(name)
    loss = squares(function)
    leaves = [a.clone().requires_grad_() for a in args]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = loss(*leaves)
    y.backward()
    assert_same_bits([a.grad for a in leaves], by_autograd(loss, args))
    with torch.autograd.graph.save_on_cpu():
        y = loss(*leaves)
    assert_same_bits(torch.autograd.grad(y, leaves), by_autograd(loss, args))


@row("hooks of modules, tensors and gradients")
def test_hooks():
    module, seen = network(), []
    for layer in module:
        layer.register_forward_pre_hook(lambda *args: seen.append("pre"))
        layer.register_forward_hook(lambda *args: seen.append("forward"))
        layer.register_full_backward_pre_hook(lambda *args: seen.append("backward pre"))
        layer.register_full_backward_hook(lambda *args: seen.append("backward"))
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    assert all(seen.count(kind) == len(module) for kind in ("pre", "forward", "backward pre", "backward"))
    # A layer within a chain: the chain gives way.
    mlp = dlgpu.nn.MLP([8, 4, 3], activation="relu")
    mlp[0].register_forward_hook(lambda module, args, y: y * 0)
    assert_same_bits([mlp(X)[0]], [mlp[2].bias])
    w = torch.ones(3, 8, requires_grad=True)
    w.register_hook(lambda g: g * 2)
    w.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad + 1))
    functional.linear(X, w).sum().backward()
    assert_close(w.grad, X.sum(0).expand(3, 8) * 2 + 1)


@row("an optimizer's step in backward (post-accumulate hooks)")
def test_a_step_in_backward():
    def train(hooked):
        torch.manual_seed(0)
        layer = dlgpu.nn.Linear(8, 3)
        optimizers = [dlgpu.optim.SGD([p], lr=0.1, momentum=0.9) for p in layer.parameters()]
        if hooked:
            for p, optimizer in zip(layer.parameters(), optimizers, strict=True):
                p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
        for _ in range(3):
            layer.zero_grad()
            functional.cross_entropy(layer(X), T).backward()
            for optimizer in [] if hooked else optimizers:
                optimizer.step()
        return list(layer.parameters())

    assert_same_bits(train(True), train(False))


# Modules.
@row("parametrizations: weight_norm, spectral_norm, orthogonal")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrize(name):
    made = []
    for kind in (dlgpu.nn.Linear, nn.Linear):
        torch.manual_seed(0)
        made.append(getattr(parametrizations, name)(kind(8, 6)))
    ours, theirs = made
    ours.load_state_dict(theirs.state_dict())
    for layer in made:
        torch.manual_seed(1)
        layer(X).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    # Of a layer within a chain.
    mlp = dlgpu.nn.MLP([8, 4, 3], activation="relu")
    expected = F.linear(F.linear(X, mlp[0].weight * 2, mlp[0].bias).relu(), mlp[2].weight, mlp[2].bias)
    parametrize.register_parametrization(mlp[0], "weight", Twice())
    assert_close(mlp(X), expected)
    parametrize.remove_parametrizations(mlp[0], "weight")
    assert_close(mlp(X), expected)


class Twice(nn.Module):
    def forward(self, w):
        return w * 2


@row("torch.nn.utils.prune")
def test_prune():
    layer = prune.l1_unstructured(dlgpu.nn.Linear(8, 6), "weight", amount=0.5)
    layer(X).sum().backward()
    assert (layer.weight == 0).sum() == 24
    assert_close(layer.weight_orig.grad, X.sum(0) * layer.weight_mask)


@row("deepcopy, pickle, torch.save of modules and losses")
def test_copies():
    module = network().eval()
    modules = [module, *(make() for make, _ in LOSSES.values()), dlgpu.nn.LinearCrossEntropyLoss(8, 3)]

    def saved(m):
        buffer = io.BytesIO()
        torch.save(m, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    for again in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved):
        for m in modules:
            assert repr(again(m)) == repr(m)
            assert_same_bits(again(m).state_dict().values(), m.state_dict().values())
        assert_same_bits([again(module)(X)], [module(X)])


@row("state_dict in and out of torch.nn; torch.load(weights_only=True)")
def test_state_dicts():
    buffer = io.BytesIO()
    ours, theirs = dlgpu.nn.Linear(8, 3), nn.Linear(8, 3)
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(ours.state_dict().values(), theirs.state_dict().values())
    theirs.load_state_dict(ours.state_dict())
    with torch.device("meta"):
        empty = dlgpu.nn.Linear(8, 3)
    empty.load_state_dict(theirs.state_dict(), assign=True)
    assert_close(empty(X), theirs(X))


@row("meta device, FakeTensorMode")
def test_meta():
    assert network().to("meta")(X.to("meta")).shape == (6, 3)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = network()(torch.empty(6, 8))
        y.sum().backward()
    assert y.shape == (6, 3)


@row("inference_mode, no_grad")
def test_inference_mode():
    module = network().eval()
    with torch.inference_mode():
        y = module(X)
        module.train()(X)
    assert y.is_inference()
    with torch.no_grad():
        assert_same_bits([module.eval()(X)], [module(X)])
        assert not module(X).requires_grad


@row("learning-rate schedulers, AveragedModel")
def test_around_an_optimizer():
    layer = dlgpu.nn.Linear(8, 3)
    optimizer = dlgpu.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    average = torch.optim.swa_utils.AveragedModel(layer)
    before = layer.bias.detach().clone()
    for lr in (0.1, 0.05):
        layer.bias.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        average.update_parameters(layer)
        before = before - lr
        assert_close(layer.bias.detach(), before)
    assert_close(average.module.bias.detach(), before + 0.025)


# Tensors.
@row("tensor subclasses, TorchFunctionMode")
def test_subclasses():
    class Sub(torch.Tensor):
        pass

    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Count.calls += 1
            return function(*args, **(kwargs or {}))

    w = inputs(3, 8)
    y = functional.linear(X.as_subclass(Sub), w)
    assert type(y) is Sub
    assert_close(y.as_subclass(torch.Tensor), functional.linear(X, w))
    with Count():
        assert_same_bits([functional.linear(X, w)], [functional.linear(X, w)])


@row("TorchDispatchMode, the profiler")
def test_modes():
    """Ops of the dispatcher have names there."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    w = inputs(3, 8).requires_grad_()
    with Log():
        functional.linear(X, w).sum().backward()
    assert {"dlgpu.linear_fwd.default", "dlgpu.linear_backward.default"} <= set(seen)
    with torch.profiler.profile() as profile:
        functional.linear(X, w).sum().backward()
    assert {"dlgpu::linear_fwd", "dlgpu::linear_backward"} <= {e.key for e in profile.key_averages()}


@row("views of negated numbers (the imag of a conj)")
def test_negative_bit():
    x = torch.randn(5, 3, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert_same_bits([functional.relu(x)], [functional.relu(x.resolve_neg())])
    w = torch.randn(2, 3)
    # A kernel may read it in place, where nothing was copied.
    with dlgpu.use_backend("triton"), pytest.raises(RuntimeError, match="resolve_neg"):
        functional.linear(torch._neg_view(torch.randn(5, 3)), w)


@row("sparse, nested and mkldnn tensors")
@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype stage")
def test_layouts():
    nested = [torch.randn(2, 8), torch.randn(3, 8)]
    for x in (
        torch.eye(8).to_sparse(),
        torch.eye(8).to_sparse_csr(),
        torch.eye(8).to_mkldnn(),
        torch.nested.nested_tensor(nested),
        torch.nested.nested_tensor(nested, layout=torch.jagged),
    ):
        for backend in ("fallback", "auto"):
            with dlgpu.use_backend(backend), pytest.raises(TypeError, match="relu: got a tensor of layout"):
                functional.relu(x)


@row("complex, integer, quantized and float8 tensors")
def test_dtypes():
    for dtype in (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="relu: input must be float32"):
            functional.relu(torch.ones(3).to(dtype))


@row("anomaly detection, deterministic algorithms")
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_debugging_modes():
    x = X.clone().requires_grad_()
    with torch.autograd.detect_anomaly():
        functional.cross_entropy(functional.linear(x, inputs(3, 8)), T).backward()
    torch.use_deterministic_algorithms(True)
    try:
        found = [gradients(network()) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(*found)


@row("share_memory, torch.multiprocessing")
def test_share_memory():
    module = network().share_memory()
    assert all(p.is_shared() for p in module.parameters())
    gradients(module)
