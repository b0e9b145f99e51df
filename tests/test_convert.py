"""dlgpu.convert: torch's modules and optimizers become ours, and nothing else changes."""

import copy
import pickle
import runpy
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.common_modules import module_db

import dlgpu
from dlgpu._convert import _CONVERTED, Changed
from tolerance import assert_accurate, assert_same_bits

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(autouse=True)
def _own_math():
    """On a CPU dlgpu leaves small sizes to torch's own functions: here it is to compute them itself."""
    with dlgpu.use_backend("fallback"):
        yield


# Models written for torch alone, each with its inputs and the loss of its result.
class Block(nn.Module):
    """A transformer block by hand."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(12, 24),
                nn.BatchNorm1d(24),
                nn.SiLU(),
                nn.Linear(24, 24),
                nn.SiLU(),
                nn.Linear(24, 12),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Tabular(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict({"colour": nn.Embedding(4, 3), "shape": nn.Embedding(5, 2)})
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Sequential(
            OrderedDict(
                [
                    ("in", nn.Linear(9, 16)),
                    ("relu", nn.ReLU(inplace=True)),
                    ("mid", nn.Linear(16, 16)),
                    ("leaky", nn.LeakyReLU(0.2)),
                    ("drop", nn.Dropout(0.0)),
                    ("out", nn.Linear(16, 2)),
                ]
            )
        )

    def forward(self, x, colour, shape):
        embedded = self.embeddings["colour"](colour), self.embeddings["shape"](shape)
        return self.body(torch.cat([self.norm(x), *embedded], 1))


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.actor = nn.Sequential(self.trunk, nn.Linear(16, 3))
        self.critic = nn.Sequential(self.trunk, nn.Linear(16, 1), nn.Sigmoid())

    def forward(self, x):
        return torch.cat([self.actor(x).log_softmax(-1), self.critic(x)], -1)


def encoder_layer(norm_first=False):
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, nn.GELU(), batch_first=True, norm_first=norm_first)


MODELS = {
    "block": (Block, lambda: [torch.randn(3, 7, 16)]),
    "encoder layer": (encoder_layer, lambda: [torch.randn(3, 7, 16)]),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder_layer(True), 2, nn.LayerNorm(16), enable_nested_tensor=False),
        lambda: [torch.randn(3, 7, 16)],
    ),
    "residual": (Residual, lambda: [torch.randn(9, 12)]),
    "tabular": (
        Tabular,
        lambda: [torch.randn(9, 4), torch.randint(4, (9,)), torch.randint(5, (9,))],
    ),
    "actor-critic": (ActorCritic, lambda: [torch.randn(9, 6)]),
}


def gradients(model, args, dy):
    """[result, gradients of the parameters, buffers]."""
    model.zero_grad()
    y = model(*args)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def is_ours(module):
    return type(module).__module__ == "dlgpu.nn"


def ops(graph):
    """Names of the autograd functions of ours behind a result."""
    found, todo, seen = [], [graph.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.append(type(node).__name__.removesuffix("FunctionBackward"))
        todo += [n for n, _ in node.next_functions]
    return sorted(found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, training):
    """Keys, parameters and every object stay; results and gradients are as accurate as torch's."""
    make, inputs = MODELS[name]
    model, args = make().train(training), inputs()
    theirs, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    keys, before = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    modules, buffers = list(model.named_modules()), dict(model.named_buffers())

    found = dlgpu.convert(model)

    assert found.model is model
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[k] is before[k] for k in before)
    assert all(b is buffers[k] for k, b in model.named_buffers())
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert all(m.training is training for m in model.modules())
    # A row for each module of ours, and none of another.
    assert {c.name for c in found.changed} == {n for n, m in model.named_modules() if is_ours(m)}
    assert len(found.changed) >= 5

    args64 = [a.double() if a.is_floating_point() else a for a in args]
    dy = torch.randn_like(theirs(*args))
    with torch.no_grad():
        # torch's fast path reads the layers' weights.
        assert_accurate(model(*args), truth(*args64), theirs(*args), "without gradients")
    for other in (theirs, truth):
        other.load_state_dict(model.state_dict())
    results = gradients(model, args, dy), gradients(truth, args64, dy), gradients(theirs, args, dy)
    for i, (a, t, e) in enumerate(zip(*results, strict=True)):
        if a.is_floating_point():
            assert_accurate(a, t, e, f"{name} {i}")
        else:
            assert torch.equal(a, e)
    assert ops(model(*args))
    model.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on(name):
    """With the optimizer that was there: its parameters are the model's still."""
    make, inputs = MODELS[name]
    model = make()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, other)]
    losses = []
    for step in range(6):
        torch.manual_seed(step)
        args = inputs()
        if step == 3:
            dlgpu.convert(model)
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss = m(*args).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[::2], losses[1::2])
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_what_is_fused():
    x = torch.randn(9, 6)
    model = ActorCritic()
    dlgpu.convert(model)
    assert model.trunk.fused() == [["0", "1", "2", "3"]]
    assert model.critic.fused() == [["1", "2"]]
    # Nothing is fused in it.
    assert type(model.actor) is nn.Sequential
    assert type(model.critic[0]) is dlgpu.nn.Sequential
    assert model.critic[0] is model.actor[0] is model.trunk
    # The trunk twice, and the two heads.
    assert ops(model(x)) == ["Linear", "Linear", "MLP", "MLP"]
    model = Tabular()
    found = dlgpu.convert(model)
    assert model.body.fused() == [["in", "relu", "mid", "leaky"]]
    assert type(model.body.relu) is nn.ReLU
    (reason,) = (left.reason for left in found.left if left.name == "body.relu")
    assert reason.startswith("inplace=True")


ARCHITECTURES = [
    # (modules, names of what is computed as one, autograd functions)
    ("L R L", ["0 1 2"], ["MLP"]),
    ("L R", ["0 1"], ["Linear"]),
    ("R L", [], ["Linear"]),
    ("L R L R L R", ["0 1 2 3 4 5"], ["MLP"]),
    ("L L", ["0 1"], ["MLP"]),
    # Another activation between layers begins another chain.
    ("L R L T L T L", ["0 1 2 3", "4 5 6"], ["MLP", "MLP"]),
    ("L R R L", ["0 1"], ["Activation", "Linear", "Linear"]),
    # A chain has one slope.
    ("L a L a L", ["0 1 2 3 4"], ["MLP"]),
    ("L a L b", ["0 1 2"], ["Activation", "MLP"]),
    ("L R L a L b", ["0 1 2 3", "4 5"], ["Linear", "MLP"]),
    ("B R L R", ["0 1", "2 3"], ["BatchNorm", "Linear"]),
    ("L B G L", ["1 2"], ["BatchNorm", "Linear", "Linear"]),
    ("B L G", ["1 2"], ["BatchNorm", "Linear"]),
    ("B G G", ["0 1"], ["Activation", "BatchNorm"]),
    ("L i L", ["0 1 2"], ["MLP"]),
    ("L S g", ["0 1"], ["Activation", "Linear"]),
    ("L N R", [], ["Activation", "LayerNorm", "Linear"]),
    ("L D R", [], ["Activation", "Linear"]),
    ("L R D L R D L", ["0 1 2 3 4 5 6"], ["MLP"]),
    ("L R D", ["0 1"], ["Linear"]),
    ("D L R D L D", ["1 2 3 4"], ["MLP"]),
    ("L D D L", [], ["Linear", "Linear"]),
    ("B R D L", ["0 1"], ["BatchNorm", "Linear"]),
    ("L R D L T D L", ["0 1 2 3 4"], ["Linear", "MLP"]),
]


def built(text):
    kinds = {
        "L": lambda: nn.Linear(6, 6),
        "B": lambda: nn.BatchNorm1d(6),
        "N": lambda: nn.LayerNorm(6),
        "D": lambda: nn.Dropout(0.0),
        "R": nn.ReLU,
        "i": lambda: nn.ReLU(inplace=True),
        "T": nn.Tanh,
        "S": nn.Sigmoid,
        "G": nn.GELU,
        "g": lambda: nn.GELU("tanh"),
        "a": lambda: nn.LeakyReLU(0.1),
        "b": lambda: nn.LeakyReLU(0.3),
    }
    return nn.Sequential(*(kinds[kind]() for kind in text.split()))


@pytest.mark.parametrize(("text", "runs", "functions"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_runs_of_a_sequential(text, runs, functions):
    model = built(text)
    theirs, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    dlgpu.convert(model)
    assert type(model) is (dlgpu.nn.Sequential if runs else nn.Sequential)
    if runs:
        assert [" ".join(run) for run in model.fused()] == runs
    x, dy = torch.randn(7, 6), torch.randn(7, 6)
    results = [
        gradients(m, [x.to(dy.dtype)], dy) for m, dy in ((model, dy), (truth, dy.double()), (theirs, dy))
    ]
    for i, (a, t, e) in enumerate(zip(*results, strict=True)):
        if a.is_floating_point():
            assert_accurate(a, t, e, f"{text} {i}")
    assert ops(model(x)) == functions


def test_dropout_in_a_run():
    """Of hidden layers, one probability for all; in evaluation they are all alike."""
    model = nn.Sequential(
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(6, 6),
    )
    dlgpu.convert(model)
    assert model.fused() == [["0", "1", "2", "3", "4", "5", "6"]]
    x = torch.randn(7, 6)
    weights, biases = [model[i].weight for i in (0, 3, 6)], [model[i].bias for i in (0, 3, 6)]
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert_same_bits([y], [dlgpu.functional.mlp(x, weights, biases, activation="relu", dropout=0.3)])
    assert_same_bits([model.eval()(x)], [dlgpu.functional.mlp(x, weights, biases, activation="relu")])
    model[5].p = 0.4
    assert model.fused() == [["0", "1", "2", "3", "4", "5", "6"]]
    model.train()
    assert model.fused() == [["0", "1", "2", "3", "4"]]
    model[2].register_forward_hook(lambda *args: None)
    assert model.fused() == [["0", "1"], ["3", "4", "5", "6"]]


def test_on_the_kernels(backend, device):
    model = built("L R L B G L a").to(device)
    theirs = copy.deepcopy(model)
    dlgpu.convert(model)
    x, dy = torch.randn(2, 7, 6, device=device)
    for a, e in zip(gradients(model, [x], dy), gradients(theirs, [x], dy), strict=True):
        torch.testing.assert_close(a, e)


def test_what_a_call_sees_is_seen_anew():
    """Hooks, replaced submodules and slices, after conversion."""
    model = built("L G L G L")
    theirs = copy.deepcopy(model)
    dlgpu.convert(model)
    x = torch.randn(7, 6)
    assert model.fused() == [["0", "1", "2", "3", "4"]]
    seen = []
    for m in (model, theirs):
        m[1].register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(model(x), theirs(x))
    torch.testing.assert_close(*seen)
    assert model.fused() == [["2", "3", "4"]]
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(y))
    model(x)
    handle.remove()
    # The hook of each of the five, of all of them, and of the second one.
    assert len(seen) == 2 + 5 + 1 + 1
    model[1] = dlgpu.nn.Activation("tanh")
    theirs[1] = nn.Tanh()
    assert model.fused() == [["0", "1", "2", "3"]]
    torch.testing.assert_close(model(x), theirs(x))
    # Each by itself gives what it gave.
    for ours, its in zip(model, theirs, strict=True):
        torch.testing.assert_close(ours(x), its(x))
    assert type(model[1:4]) is dlgpu.nn.Sequential
    torch.testing.assert_close(model[1:4](x), theirs[1:4](x))


def fresh(kind):
    """An instance of a class of torch.nn with a counterpart."""
    args = {
        "Linear": (6, 4),
        "BatchNorm1d": (6,),
        "LayerNorm": (6,),
        "RMSNorm": (6,),
        "Dropout": (0.3,),
        "LinearCrossEntropyLoss": (6, 5),
    }
    return kind(*args.get(kind.__name__, ()))


COUNTERPARTS = [name for name in dlgpu.nn.__all__ if hasattr(nn, name) and name != "Sequential"]


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_converted_layer_is_as_one_that_was_made(name):
    """It has every attribute of one that was made as dlgpu's, of the same value."""
    converted, made = fresh(getattr(nn, name)), fresh(getattr(dlgpu.nn, name))
    found = dlgpu.convert(converted)
    assert type(converted) is type(made)
    assert Changed("", f"torch.nn.{name}", f"dlgpu.nn.{name}") in found.changed
    mine, its = vars(converted), vars(made)
    assert mine.keys() == its.keys()
    for key in its.keys() - {"_parameters", "_buffers", "_modules"}:
        assert mine[key] == its[key], key
    assert repr(converted).replace("dlgpu", "") == repr(made).replace("dlgpu", "")
    again = pickle.loads(pickle.dumps(converted))
    assert type(again) is type(made)


INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls in _CONVERTED}


def test_torch_has_data_of_nearly_all():
    assert {kind.__name__ for kind in _CONVERTED} - INFOS.keys() == {"Dropout", "Sequential"}


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_torchs_module_data(name, dtype, training):
    """Every row of torch.testing's module_db: results, gradients and buffers of a converted module are torch's."""
    info, count = INFOS[name], 0
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    ):
        made, given, results = sample.constructor_input, sample.forward_input, []
        theirs = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
        ours = dlgpu.convert(theirs, inplace=False).model
        if type(ours) is type(theirs):
            # It writes over its input.
            assert theirs.inplace
            continue
        for module in (ours, theirs):
            args = [a.detach().clone().requires_grad_(a.requires_grad) for a in given.args]
            y = module(*args, **given.kwargs)
            wanted = [a for a in (*args, *module.parameters()) if a.requires_grad]
            results.append([y, *torch.autograd.grad(y.sum(), wanted), *module.buffers()])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)
        count += 1
    assert count


def test_every_counterpart_is_converted():
    """None fewer than these; what joins dlgpu.nn under torch's name joins them."""
    assert set(COUNTERPARTS) >= {
        "BCEWithLogitsLoss", "BatchNorm1d", "CrossEntropyLoss", "Dropout", "HuberLoss", "KLDivLoss", "L1Loss",
        "LayerNorm", "Linear", "MSELoss", "MultiMarginLoss", "RMSNorm", "SmoothL1Loss",
    }  # fmt: skip


LOSSES = [
    (nn.CrossEntropyLoss(torch.rand(5), ignore_index=1, label_smoothing=0.1), "classes"),
    (nn.CrossEntropyLoss(reduction="none"), "classes"),
    (nn.MultiMarginLoss(p=2, margin=0.5, weight=torch.rand(5)), "classes"),
    (nn.MSELoss(reduction="sum"), "numbers"),
    (nn.L1Loss(), "numbers"),
    (nn.SmoothL1Loss(beta=0.3), "numbers"),
    (nn.HuberLoss(delta=0.3, reduction="none"), "numbers"),
    (nn.BCEWithLogitsLoss(torch.rand(5), pos_weight=torch.rand(5)), "probabilities"),
    (nn.KLDivLoss(reduction="batchmean", log_target=True), "numbers"),
]


@pytest.mark.parametrize(
    ("loss", "target"), LOSSES, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_losses(loss, target):
    x = torch.randn(9, 5, requires_grad=True)
    target = {
        "classes": torch.arange(9) % 5,
        "numbers": torch.randn(9, 5),
        "probabilities": torch.rand(9, 5),
    }[target]
    ours = copy.deepcopy(loss)
    dlgpu.convert(ours)
    assert is_ours(ours)
    assert list(ours.state_dict()) == list(loss.state_dict())
    y, expected = ours(x, target), loss(x, target)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x) for v in (y, expected)))


@pytest.mark.parametrize(
    ("module", "after"),
    [
        (nn.ReLU(), "dlgpu.nn.Activation('relu')"),
        (nn.LeakyReLU(0.2), "dlgpu.nn.Activation('leaky_relu', negative_slope=0.2)"),
        (nn.Sigmoid(), "dlgpu.nn.Activation('sigmoid')"),
        (nn.Tanh(), "dlgpu.nn.Activation('tanh')"),
        (nn.GELU(), "dlgpu.nn.Activation('gelu')"),
        (nn.GELU("tanh"), "dlgpu.nn.Activation('gelu_tanh')"),
        (nn.SiLU(), "dlgpu.nn.Activation('silu')"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_activations(module, after):
    x = torch.randn(50)
    expected = module(x)
    (changed,) = dlgpu.convert(module).changed
    assert changed.after == after
    torch.testing.assert_close(module(x), expected)


def test_dropout_goes_by_its_own_mask():
    module = nn.Dropout(0.3, inplace=True)
    dlgpu.convert(module)
    x = torch.ones(500)
    torch.manual_seed(1)
    y = module(x.clone())
    torch.manual_seed(1)
    assert_same_bits([y], [dlgpu.functional.dropout(x, 0.3)])


# What stays.
class Mine(nn.Linear):
    pass


class Wrapped(torch.Tensor):
    pass


def hooked(register, *args):
    module = nn.Linear(3, 3)
    getattr(module, register)(*args or (lambda *args: None,))
    return module


def changed(module, change):
    change(module)
    return module


def compiled(module):
    module.compile(backend="eager")
    return module


def wrapped_weight():
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(torch.randn(3, 3).as_subclass(Wrapped))
    return module


def weight_in_dict():
    module = nn.Linear(3, 3)
    weight = module.weight.data
    del module.weight
    module.weight = weight
    return module


def weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 3))


STAYS = {
    "subclass": (lambda: Mine(3, 3), "it is a subclass of torch.nn.Linear"),
    "forward hook": (lambda: hooked("register_forward_hook"), "it has hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "it has hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "it has hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "it has hooks"),
    "state_dict hook": (lambda: hooked("register_state_dict_post_hook"), "it has hooks"),
    "state_dict pre-hook": (lambda: hooked("register_state_dict_pre_hook"), "it has hooks"),
    "load_state_dict hook": (lambda: hooked("register_load_state_dict_post_hook"), "it has hooks"),
    "load_state_dict pre-hook": (lambda: hooked("register_load_state_dict_pre_hook"), "it has hooks"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 1), "it has hooks"),
    "weight_norm": (weight_norm, "it has hooks"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "it is parametrized"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "it is parametrized"),
    "lazy": (lambda: nn.LazyLinear(3), "it is lazy: call it once first"),
    "forward": (
        lambda: changed(nn.Linear(3, 3), lambda m: setattr(m, "forward", abs)),
        "its forward was replaced",
    ),
    "compiled": (lambda: compiled(nn.Linear(3, 3)), "it is compiled"),
    "qconfig": (
        lambda: changed(nn.Linear(3, 3), lambda m: setattr(m, "qconfig", object())),
        "it is prepared for quantization",
    ),
    "quantizable": (lambda: nn.MultiheadAttention(4, 2).out_proj, "it is a subclass of torch.nn.Linear"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "its weight is torch.complex64"),
    "tensor subclass": (wrapped_weight, "its weight is a "),
    "no parameter": (weight_in_dict, "its weight is no parameter"),
    "attribute": (
        lambda: changed(nn.Linear(3, 3), lambda m: setattr(m, "activation", nn.ReLU6())),
        "it has an attribute 'activation' of its own",
    ),
    "inplace": (lambda: nn.SiLU(inplace=True), "inplace=True: others may read what it writes over"),
    "none": (lambda: nn.Conv1d(3, 3, 1), "dlgpu.nn has none"),
    "hooked sequential": (
        lambda: changed(built("L R L"), lambda m: m.register_forward_hook(lambda *args: None)),
        "it has hooks",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    make, reason = STAYS[name]
    model = nn.ModuleDict({"kept": make(), "other": nn.Linear(3, 3)})
    kept = model["kept"]
    kind, attributes = type(kept), dict(vars(kept))
    found = dlgpu.convert(model)
    assert type(kept) is kind
    assert vars(kept) == attributes
    (left,) = (left for left in found.left if left.name == "kept")
    assert left.reason.startswith(reason)
    assert left.kind.rpartition(".")[2] == kind.__name__
    assert "other" in [c.name for c in found.changed]
    assert "kept" not in [c.name for c in found.changed]
    assert reason in str(found)


def test_an_approximation_that_torch_does_not_know():
    module = nn.GELU()
    module.approximate = "sigmoid"
    (left,) = dlgpu.convert(module).left
    assert left.reason == "approximate='sigmoid'"
    assert type(module) is nn.GELU


def test_fusing_keeps_away_from_what_stays():
    """A hooked activation goes on seeing what the layer gives."""
    model, seen = built("L R L R L"), []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    theirs = copy.deepcopy(model)
    dlgpu.convert(model)
    assert model.fused() == [["2", "3", "4"]]
    x = torch.randn(7, 6)
    torch.testing.assert_close(model(x), theirs(x))
    torch.testing.assert_close(*seen)


def test_shared_modules_stay_shared():
    """And are converted once, whatever their names."""
    act, linear = nn.Tanh(), nn.Linear(6, 6)
    model = nn.ModuleDict(
        {"a": nn.Sequential(linear, act), "b": nn.Sequential(linear, act, linear), "act": act}
    )
    theirs = copy.deepcopy(model)
    found = dlgpu.convert(model)
    assert model["a"][0] is model["b"][0] is model["b"][2] is linear
    assert model["a"][1] is model["b"][1] is model["act"] is act
    notes = {c.name: c.note for c in found.changed}
    assert notes == {
        "a": "as one: 0 1",
        "a.0": "also b.0, b.2",
        "a.1": "also b.1, act",
        "b": "as one: 0 1 2",
    }
    x, dy = torch.randn(2, 7, 6)
    for name in "ab":
        for a, e in zip(*(gradients(m[name], [x], dy) for m in (model, theirs)), strict=True):
            torch.testing.assert_close(a, e)
    torch.testing.assert_close(act(x), torch.tanh(x))


def test_again_changes_nothing():
    model = MODELS["tabular"][0]()
    optimizer = torch.optim.SGD(model.parameters())
    first = dlgpu.convert(model, optimizer=optimizer)
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    again = dlgpu.convert(model, optimizer=optimizer)
    assert again.changed == ()
    assert again.left == first.left
    assert again.optimizer is optimizer
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: built("L R L"), nn.MSELoss])
def test_the_model_itself(make):
    """An object stays the object that it is: no name has to be bound anew."""
    model = make()
    found = dlgpu.convert(model)
    assert found.model is model
    assert is_ours(model)
    assert found.changed[0].name == ""
    assert str(found).splitlines()[2].startswith("  (model)")


def test_a_copy():
    model = MODELS["actor-critic"][0]()
    kinds = [type(m) for m in model.modules()]
    found = dlgpu.convert(model, inplace=False)
    assert found.model is not model
    assert [type(m) for m in model.modules()] == kinds
    assert any(is_ours(m) for m in found.model.modules())
    assert found.model.actor[0] is found.model.critic[0]
    assert_same_bits(found.model.state_dict().values(), model.state_dict().values())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in found.model.parameters()}


def test_what_belongs_to_a_tensor_stays():
    model = built("L B R L").double().eval()
    model[0].requires_grad_(False)
    model[3].weight = model[0].weight
    model[0].weight.grad = grad = torch.ones(6, 6, dtype=torch.float64)
    dlgpu.convert(model)
    assert model[3].weight is model[0].weight
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model[0].weight.grad is grad
    assert not any(m.training for m in model.modules())
    meta = nn.Linear(3, 3, device="meta")
    dlgpu.convert(meta)
    assert meta.to_empty(device="cpu")(torch.zeros(2, 3)).shape == (2, 3)


def test_compiled_models():
    """In one graph; and one that was compiled before is compiled anew."""
    torch._dynamo.reset()
    model, x = built("L G L B R L"), torch.randn(7, 6)
    theirs = copy.deepcopy(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    fast = torch.compile(model, backend=backend, fullgraph=True)
    fast(x)
    dlgpu.convert(model)
    y = fast(x)
    assert "dlgpu.mlp" not in graphs[0]
    assert "dlgpu.mlp" in graphs[1]
    theirs(x)
    torch.testing.assert_close(y, theirs(x))
    torch._dynamo.reset()


def test_the_table():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Softmax(-1), Mine(4, 2))
    found = dlgpu.convert(model, optimizer=torch.optim.Adam(model.parameters()))
    expected = """\
5 converted
  name       was                  is                           note
  (model)    torch.nn.Sequential  dlgpu.nn.Sequential          as one: 0 1
  0          torch.nn.Linear      dlgpu.nn.Linear
  1          torch.nn.GELU        dlgpu.nn.Activation('gelu')
  2          torch.nn.LayerNorm   dlgpu.nn.LayerNorm
  optimizer  torch.optim.Adam     dlgpu.optim.Adam
2 left as they were
  name  is                 because
  3     torch.nn.Softmax   dlgpu.nn has none
  4     test_convert.Mine  it is a subclass of torch.nn.Linear"""
    assert str(found) == expected
    assert repr(found) == expected
    assert str(dlgpu.convert(nn.Identity())) == "0 converted\n0 left as they were"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((3,), {}, "convert: model must be a torch.nn.Module, got int"),
        ((nn.Linear,), {}, "convert: model must be a torch.nn.Module, got type"),
        ((nn.ReLU(),), {"optimizer": 3}, "convert: optimizer must be a torch.optim.Optimizer, got int"),
    ],
)
def test_bad_input(args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        dlgpu.convert(*args, **kwargs)


# Optimizers.
OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True}),
    ("Adam", {"lr": torch.tensor(0.01)}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3, "maximize": True}),
    ("AdamW", {"lr": 0.01, "fused": True}),
]


def stepped(model, optimizer, steps, schedulers=()):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(7, 6)).square().mean().backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_an_optimizer_goes_on(name, options, before):
    """With its groups, its state's tensors, its hooks and its scheduler."""
    models = [built("L G L")]
    models.append(copy.deepcopy(models[0]))
    optimizers, schedulers, called = [], [], []
    for model in models:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
        optimizer = getattr(torch.optim, name)(groups, **copy.deepcopy(options))
        optimizer.register_step_post_hook(lambda *args: called.append(type(args[0])))
        optimizers.append(optimizer)
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
        stepped(model, optimizer, range(before), schedulers[-1:])
    model, optimizer = models[0], optimizers[0]
    state = {p: dict(values) for p, values in optimizer.state.items()}
    groups = optimizer.param_groups

    found = dlgpu.convert(model, optimizer=optimizer)

    assert found.optimizer is optimizer
    assert type(optimizer) is getattr(dlgpu.optim, name)
    assert found.changed[-1] == Changed("optimizer", f"torch.optim.{name}", f"dlgpu.optim.{name}")
    assert optimizer.param_groups is groups
    assert optimizer.state.keys() == state.keys()
    for p, values in state.items():
        assert all(optimizer.state[p][k] is v for k, v in values.items())
    called.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m, opt, scheduler in zip(models, optimizers, schedulers, strict=True):
            stepped(m, opt, range(before, before + 4), [scheduler])
    assert called == [type(optimizer)] * 4 + [type(optimizers[1])] * 4
    torch.testing.assert_close(model.state_dict(), models[1].state_dict())
    assert [g["lr"] for g in groups] == [g["lr"] for g in optimizers[1].param_groups]
    assert optimizer.state_dict().keys() == optimizers[1].state_dict().keys()
    torch.testing.assert_close(optimizer.state_dict()["state"], optimizers[1].state_dict()["state"])
    # It is whole: as one that was made.
    assert (
        vars(optimizer).keys() - {"step", "_opt_called", "_step_supports_amp_scaling"}
        == vars(getattr(dlgpu.optim, name)(built("L").parameters())).keys()
    )
    optimizer.max_grad_norm = 1e-3
    stepped(model, optimizer, [9])
    assert optimizer.grad_norm > 1e-3
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_hooks_are_called_before_an_optimizer_of_the_class_was_made(monkeypatch):
    """torch makes a class's step call hooks when the first is made."""
    dlgpu.optim.SGD(built("L").parameters())
    monkeypatch.setattr(dlgpu.optim.SGD, "step", dlgpu.optim.SGD.step.__wrapped__)
    model, called = built("L"), []
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.register_step_pre_hook(lambda *args: called.append(1))
    dlgpu.convert(model, optimizer=optimizer)
    stepped(model, optimizer, range(2))
    assert called == [1, 1]


def test_it_is_our_step_that_runs(monkeypatch):
    """With a scheduler too, which holds on to the method that it found."""
    from dlgpu.ops import optimizers as ops

    calls, step = [], ops.step
    monkeypatch.setattr(ops, "step", lambda rule, *args: calls.append(rule.name) or step(rule, *args))
    for scheduled in (False, True):
        model = built("L")
        optimizer = torch.optim.AdamW(model.parameters())
        if scheduled:
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        dlgpu.convert(model, optimizer=optimizer)
        stepped(model, optimizer, range(2))
    assert calls == ["AdamW"] * 4


def test_a_copy_of_an_optimizer():
    """It steps the copy of the model, and what it steps besides."""
    model, other = built("L R L"), nn.Linear(6, 6)
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()])
    stepped(nn.Sequential(model, other), optimizer, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    found = dlgpu.convert(model, inplace=False, optimizer=optimizer)
    assert type(optimizer) is torch.optim.Adam
    assert type(found.optimizer) is dlgpu.optim.Adam
    params = found.optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(params, [*found.model.parameters(), *other.parameters()], strict=True))
    reference, twin = copy.deepcopy((nn.Sequential(model, other), optimizer))
    stepped(reference, twin, range(2, 5))
    stepped(nn.Sequential(found.model, other), found.optimizer, range(2, 5))
    torch.testing.assert_close(
        list(nn.Sequential(found.model, other).parameters()), list(reference.parameters())
    )
    assert_same_bits(list(model.parameters()), before)
    torch.testing.assert_close(optimizer.state_dict(), state)


class MySGD(torch.optim.SGD):
    pass


def replaced_step(params):
    optimizer = torch.optim.SGD(params)
    optimizer.step = lambda: None
    return optimizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: torch.optim.Adadelta(m.parameters()), "dlgpu.optim has none"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "dlgpu.optim has none"),
        (lambda m: MySGD(m.parameters()), "it is a subclass of torch.optim.SGD"),
        (lambda m: torch.optim.Adam(m.parameters(), differentiable=True), "differentiable=True"),
        (lambda m: replaced_step(m.parameters()), "its step was replaced"),
        (
            lambda m: torch.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]),
            "a parameter is torch.complex64",
        ),
        (
            lambda m: torch.optim.SGD(m.append(nn.Embedding(3, 2, sparse=True)).parameters()),
            "an embedding has sparse gradients",
        ),
    ],
)
def test_an_optimizer_that_stays(make, reason):
    model = built("L R")
    optimizer = make(model)
    kind, attributes = type(optimizer), dict(vars(optimizer))
    found = dlgpu.convert(model, optimizer=optimizer)
    assert found.left[-1].name == "optimizer"
    assert found.left[-1].reason == reason
    assert found.optimizer is optimizer
    assert type(optimizer) is kind
    assert vars(optimizer) == attributes
    assert is_ours(model)


# Whole scripts, written for torch alone.
def curves(name, convert, choice="fallback"):
    main = runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"]
    converted = []

    def noted(model):
        converted.append(convert(model))

    with dlgpu.use_backend(choice):
        losses = main(noted, dlgpu.optim.AdamW)
    return converted, losses, main()


@pytest.mark.parametrize("choice", ["fallback", "auto"])
@pytest.mark.parametrize("name", ["nanogpt", "actor_critic"])
def test_a_training_script(name, choice):
    """200 steps of float32: the loss of each is within 1e-4 of torch's."""
    assert len((SCRIPTS / f"{name}.py").read_text().splitlines()) <= 60
    converted, ours, theirs = curves(name, dlgpu.convert, choice)
    assert len(ours) == len(theirs) == 200
    assert [
        abs(a - e) / abs(e) for a, e in zip(ours, theirs, strict=True) if abs(a - e) > 1e-4 * abs(e)
    ] == []
    # It learns, and on our layers.
    assert sum(theirs[-20:]) < 0.75 * sum(theirs[:20])
    for conversion in converted:
        torch_layers = [m for m in conversion.model.modules() if type(m) in (nn.Linear, nn.Tanh, nn.GELU)]
        assert not torch_layers
        assert conversion.changed


def test_a_curve_can_fail():
    """Another activation is seen within the 200 steps."""

    def wrong(model):
        found = dlgpu.convert(model)
        for module in model.modules():
            if type(module) is dlgpu.nn.Activation:
                module.activation = "silu"
        return found

    _, ours, theirs = curves("nanogpt", wrong)
    assert max(abs(a - e) / abs(e) for a, e in zip(ours, theirs, strict=True)) > 1e-4
