"""The optimizers against torch.optim's, on every backend."""

import copy
import dataclasses
import gc
import io
import itertools
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import dlgpu
from dlgpu.fallback import optimizers as arrays
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import optimizers as kernels
from dlgpu.ops import optimizers as ops
from tolerance import PAIRS, assert_accurate, assert_same_bits

poisoned = pytest.mark.usefixtures("poisoned")

NAMES = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"]
CLASSES = [(getattr(dlgpu.optim, name), getattr(torch.optim, name)) for name in NAMES]
BLOCK = configs.optimizer_tile(4, True).block
# Parameter groups that share a launch: every variant of a rule, in one optimizer.
RULES = {
    "SGD": [
        {},
        {"lr": 1e-2, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"weight_decay": 0.5, "maximize": True},
    ],
    "Adagrad": [
        {},
        {"lr": 0.1, "lr_decay": 0.5, "eps": 1e-3},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "RMSprop": [
        {},
        {"lr": 1e-3, "alpha": 0.3, "eps": 1e-3},
        {"centered": True, "weight_decay": 0.1, "eps": 1e-2},
        {"momentum": 0.9, "maximize": True},
        {"centered": True, "momentum": 0.5, "alpha": 0.9, "eps": 1e-2},
    ],
    "Adam": [
        {},
        {"lr": 1e-2, "betas": (0.5, 0.99999)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.01},
        {"amsgrad": True, "lr": 0.1, "eps": 1e-3, "betas": (0.0, 0.9)},
    ],
}
GROUPS = RULES["Adam"]
# Of gradients. 1e-8 is eps: only there does it show where eps stands.
SCALES = [1.0, 1e-8]
# Less than a vector, one more than a block, odd, empty, without dimensions.
SHAPES = [(3,), (BLOCK + 1,), (7, 37), (0, 5), ()]


def sample(dtype, device="cpu", scales=SCALES, shapes=SHAPES, groups=GROUPS):
    """Parameters of each group, half of them 0 so that nothing hides the update, and a function giving gradients."""
    params = [
        [
            torch.randn(shape, device=device).to(dtype) * (i % 2)
            for scale in scales
            for i, shape in enumerate(shapes)
        ]
        for _ in groups
    ]

    def gradients():
        return [
            [torch.randn(shape, device=device).mul(scale).to(dtype) for scale in scales for shape in shapes]
            for _ in groups
        ]

    return params, gradients


def train(optimizer_class, params, steps, groups=GROUPS, dtype=None):
    """(parameters and states by name after those gradients, the optimizer)."""
    leaves = [[torch.nn.Parameter(p.clone().to(dtype or p.dtype)) for p in group] for group in params]
    optimizer = optimizer_class([{"params": p, **g} for p, g in zip(leaves, groups, strict=True)])
    for gradients in steps:
        for group, grads in zip(leaves, gradients, strict=True):
            for p, g in zip(group, grads, strict=True):
                p.grad = g.clone().to(p.dtype)
        optimizer.step()
    return results(optimizer), optimizer


def results(optimizer):
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for n, p in enumerate(group["params"]):
            found[f"group {g} parameter {n}"] = p.detach()
            found |= {f"group {g} {name} {n}": value for name, value in optimizer.state[p].items()}
    return found


def assert_as_torch(actual, truth, expected):
    """All values of a group's parameters, or of a state, that had gradients of one scale are held to the gate together."""
    assert actual.keys() == expected.keys()
    together = {}
    for name, value in actual.items():
        other = expected[name]
        assert (value.shape, value.stride(), value.dtype) == (other.shape, other.stride(), other.dtype)
        what, number = name.rsplit(maxsplit=1)
        together.setdefault((what, int(number) // len(SHAPES)), []).append(name)
    for (what, scale), names in together.items():
        values = [torch.cat([found[name].flatten() for name in names]) for found in (actual, truth, expected)]
        assert_accurate(*values, f"{what} at scale {scale}")


def check(optimizer_class, rule, dtype, device="cpu", steps=6):
    groups, scales = RULES[rule], SCALES
    if dtype is torch.float16:
        # In torch's fp16 arithmetic the default eps is 0, and v, g^2 and the like vanish: it gives infinities.
        groups, scales = [{**g, **({"eps": 1e-2} if rule != "SGD" else {})} for g in groups], [1.0]
    params, gradients = sample(dtype, device, scales=scales, groups=groups)
    taken = [gradients() for _ in range(steps)]
    theirs = getattr(torch.optim, rule)
    actual, _ = train(optimizer_class, params, taken, groups)
    expected, _ = train(theirs, params, taken, groups)
    truth, _ = train(theirs, params, taken, groups, torch.float64)
    assert_as_torch(actual, truth, expected)


@poisoned
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_accuracy(backend, device, dtype, rule):
    check(getattr(dlgpu.optim, rule), rule, dtype, device, steps=6 if backend == "fallback" else 4)


def test_float16_with_the_default_eps(backend, device):
    """Torch's own arithmetic gives infinities here; ours is float32."""
    params, gradients = sample(torch.float16, device, shapes=[(3,), (50, 7)])
    found, _ = train(dlgpu.optim.Adam, params, [gradients() for _ in range(3)])
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_float64_over_200_steps(ours, theirs):
    groups = RULES.get(ours.__name__, [{k: v for k, v in g.items() if "decoupled" not in k} for g in GROUPS])
    params, gradients = sample(torch.float64, shapes=[(7, 5), (3,)], groups=groups)
    taken = [gradients() for _ in range(200)]
    actual, _ = train(ours, params, taken, groups)
    expected, _ = train(theirs, params, taken, groups)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-14 * value.abs().max().item())


class _Planted(torch.optim.Optimizer):
    """Adam in float32 with a mistake."""

    def __init__(self, params, mistake=None):
        self.mistake = mistake
        defaults = dict(torch.optim.Adam([torch.zeros(1)]).param_groups[0])
        super().__init__(params, {k: v for k, v in defaults.items() if k != "params"})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                s = self.state[p]
                for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]]:
                    s.setdefault(name, torch.zeros_like(p))
                s["step"] = t = s.get("step", torch.tensor(0.0)) + 1
                t = t.double()
                g = -p.grad if group["maximize"] else p.grad
                if group["decoupled_weight_decay"] != (self.mistake == "schools of decay"):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                elif group["weight_decay"]:
                    g = g + group["weight_decay"] * p
                s["exp_avg"].lerp_(g, 1 - beta1)
                s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                v = s["exp_avg_sq"]
                if group["amsgrad"]:
                    v = torch.maximum(s["max_exp_avg_sq"], v, out=s["max_exp_avg_sq"])
                power = beta2 ** (t.float() if self.mistake == "float32 power" else t)
                root = (1 - power).sqrt()
                if self.mistake == "eps in the root":
                    denominator = (v / root.square() + group["eps"]).sqrt()
                elif self.mistake == "eps before the correction":
                    denominator = (v.sqrt() + group["eps"]) / root
                else:
                    denominator = v.sqrt() / root + group["eps"]
                p.sub_(s["exp_avg"] / denominator * (group["lr"] / (1 - beta1**t)))


@pytest.mark.parametrize(
    "mistake", [None, "eps in the root", "eps before the correction", "schools of decay", "float32 power"]
)
def test_the_gate_can_fail(mistake):
    def planted(params):
        return _Planted(params, mistake)

    if mistake is None:
        check(planted, "Adam", torch.float32)
    else:
        with pytest.raises(AssertionError, match="error"):
            check(planted, "Adam", torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(backend, device, value):
    not_finite(device, value)


def test_a_gradient_far_from_the_mean(backend, device):
    """With b1 = 0 the mean is the gradient itself, whatever came before: torch.lerp starts at the nearer end."""
    not_finite(device, 1e30)


def not_finite(device, value):
    params, gradients = sample(torch.float32, device, scales=[1.0], shapes=[(9,)])
    taken = [gradients() for _ in range(3)]
    for grads in taken[1]:
        grads[0][3] = value
    params[3][0][5] = value
    found = [train(c, params, taken) for c in (dlgpu.optim.Adam, torch.optim.Adam)]
    truth, _ = train(torch.optim.Adam, params, taken, dtype=torch.float64)
    for name, expected in found[1][0].items():
        if "step" not in name:
            assert_accurate(found[0][0][name], truth[name], expected, name)


@dataclasses.dataclass
class Odd:
    """A parameter and a gradient that lie in memory in an odd way."""

    param: torch.Tensor
    grad: torch.Tensor


def odd_tensors(device):
    def rand(*shape):
        return torch.randn(shape, device=device)

    return {
        "transposed": Odd(rand(5, 7).t(), rand(7, 5)),
        "transposed both": Odd(rand(5, 7).t(), rand(5, 7).t()),
        "channels last": Odd(rand(2, 3, 4, 5).to(memory_format=torch.channels_last), rand(2, 3, 4, 5)),
        "columns apart": Odd(rand(6, 10)[:, ::2], rand(6, 5)),
        "rows apart": Odd(rand(12, 5)[::2], rand(5, 6).t()),
        "stride 0 gradient": Odd(rand(4, 6), rand(1, 1).expand(4, 6)),
        "one element in": Odd(rand(20)[1:], rand(20)[1:]),
        "gradient one element in": Odd(rand(2 * BLOCK), rand(2 * BLOCK + 1)[1:]),
        "size 1": Odd(rand(1, 9), rand(9, 1).t()),
        "no dimension": Odd(rand(), rand()),
        "no element": Odd(rand(3, 0), rand(3, 0)),
    }


@poisoned
def test_layouts(backend, device):
    """All in one optimizer, against torch; what lies between the elements keeps its bits."""
    cases = odd_tensors(device)
    bases = [c.param if c.param._base is None else c.param._base for c in cases.values()]
    before = [b.clone() for b in bases]
    leaves = [torch.nn.Parameter(c.param) for c in cases.values()]
    twins = [torch.nn.Parameter(c.param.clone()) for c in cases.values()]
    kinds = [{"amsgrad": True, "weight_decay": 0.1}] * 2
    optimizers = [
        c([{"params": p[:4], **kinds[0]}, {"params": p[4:], **kinds[1]}])
        for c, p in ((dlgpu.optim.Adam, leaves), (torch.optim.Adam, twins))
    ]
    for _ in range(3):
        for p, q, c in zip(leaves, twins, cases.values(), strict=True):
            p.grad, q.grad = c.grad.mul(1), c.grad.clone()
            p.grad = c.grad
        for optimizer in optimizers:
            optimizer.step()
    for name, p, q in zip(cases, leaves, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
        assert p.data_ptr() == cases[name].param.data_ptr() or not p.numel()
    for base, old, p in zip(bases, before, leaves, strict=True):
        inside = torch.zeros_like(base, dtype=torch.bool).as_strided(p.shape, p.stride(), p.storage_offset())
        if base.numel() and inside._base is not None:
            inside.fill_(True)
            mask = inside._base
            assert torch.equal(base[~mask], old[~mask])


@pytest.mark.parametrize("rule", RULES)
def test_launches_do_not_grow(launches, device, rule):
    """One prologue and one launch, whatever the number of tensors and groups, and one more to clip; all groups' variants
    share them."""
    launches.dry = True

    def count(groups, tensors, max_grad_norm=None, dtype=torch.float32, **extras):
        params = [
            [torch.nn.Parameter(torch.zeros(5, device=device, dtype=dtype)) for _ in range(tensors)]
            for _ in groups
        ]
        optimizer = getattr(dlgpu.optim, rule)(
            [{"params": p, **g} for p, g in zip(params, groups, strict=True)],
            max_grad_norm=max_grad_norm,
            **extras,
        )
        for p in itertools.chain.from_iterable(params):
            p.grad = torch.ones_like(p)
        start = len(launches)
        with dlgpu.use_backend("triton"):
            optimizer.step()
        return [name for name, *_ in launches[start:]]

    expected = ["_prologue_kernel", "_multi_tensor_kernel"]
    assert count([{}], 1) == count([{}], 40) == count(RULES[rule], 3) == expected
    assert count(RULES[rule], 3, dtype=torch.bfloat16, master_weights=True) == expected
    assert count([{}], 1, 1.0) == count(RULES[rule], 3, 1.0) == ["_square_sum_kernel", *expected]


def test_launches_by_kind(launches, device):
    tensors = [torch.nn.Parameter(torch.zeros(9, device=device)) for _ in range(3)]
    tensors += [torch.nn.Parameter(torch.zeros(9, device=device)[k:]) for k in (1, 2, 3)]
    tensors += [torch.nn.Parameter(torch.zeros(9, device=device, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = dlgpu.optim.Adam(tensors)
    for p in tensors:
        p.grad = torch.ones_like(p)
    with dlgpu.use_backend("triton"):
        optimizer.step()
        found = [
            (meta["PARAM_DTYPE"], meta["VECTOR"])
            for name, *_, meta in launches
            if name == "_multi_tensor_kernel"
        ]
        tl = _triton.tl
        assert found == [(tl.float32, 4), (tl.float32, 1), (tl.bfloat16, 8)]
        assert len(launches) == 4
        del launches[:]
        for p in tensors[:-3]:
            p.grad = None
        optimizer.step()
        assert len(launches) == 2
    for p, steps in zip(tensors, [1] * 6 + [2] * 3, strict=True):
        torch.testing.assert_close(p.detach(), torch.full_like(p, -1e-3 * steps), rtol=1e-2, atol=0)


def variant(kernel, args, meta):
    """What a compiled kernel would be specialized on: two launches of the same share one."""

    def specialized(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        # Of floats the type alone counts.
        return float if isinstance(value, float) else value

    return kernel.__name__, tuple(map(specialized, args)), tuple(sorted((k, str(v)) for k, v in meta.items()))


@pytest.mark.parametrize("rule", RULES)
def test_no_new_variant_over_50_steps(monkeypatch, device, rule):
    """A changing learning rate, decay, norm, scale and gradients that move compile nothing: no number is a constexpr."""
    seen = []
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, grid, *args, **meta: seen.append(variant(kernel, args, meta))
    )
    params = [torch.nn.Parameter(torch.zeros(n, device=device)) for n in (5, 300, 7)]
    optimizer = getattr(dlgpu.optim, rule)(params, max_grad_norm=1.0)
    kept = []
    with dlgpu.use_backend("triton"):
        for step in range(50):
            optimizer.param_groups[0].update(lr=1e-3 / (step + 1), weight_decay=0.1 * step)
            optimizer.max_grad_norm = 1 + step
            optimizer.grad_scale = torch.tensor(2.0**step, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
            for p in params:
                p.grad = torch.ones_like(p)
                kept.append(p.grad)  # so that the next one is elsewhere
            optimizer.step()
    assert len(seen) == 150
    assert len(set(seen)) == 3


def count_uploads(monkeypatch):
    """The tables, one entry an upload, and the chunks."""
    uploads = []
    for where, name in ((kernels.Uploader, "__call__"), (kernels, "_upload_once")):
        original = getattr(where, name)
        what = "tables" if name == "__call__" else "chunks"
        monkeypatch.setattr(
            where, name, lambda *args, what=what, f=original: uploads.append(what) or f(*args)
        )
    return uploads


def test_uploads_only_what_changed(monkeypatch, device):
    uploads = count_uploads(monkeypatch)
    p = torch.nn.Parameter(torch.zeros(5, device=device))
    optimizer = dlgpu.optim.Adam([p])
    p.grad = torch.ones_like(p)

    def step():
        del uploads[:]
        optimizer.step()
        return uploads

    with dlgpu.use_backend("triton"):
        assert step() == ["chunks", "tables"]
        assert step() == []
        optimizer.param_groups[0]["lr"] = 0.5
        assert step() == ["tables"]
        old, p.grad = p.grad, torch.ones_like(p)
        assert step() == ["tables"]
        del old
        lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device=device)
        assert step() == ["tables"]
        if device != "cpu":
            # A tensor on the device is read there.
            lr.fill_(0.25)
            assert step() == []


def pair(ours, theirs, device="cpu", **options):
    """Two optimizers on equal parameters, and a function that steps both on equal gradients."""
    values = [torch.randn(7, 5, device=device), torch.randn(3, device=device)]
    leaves = [[torch.nn.Parameter(v.clone()) for v in values] for _ in range(2)]
    optimizers = [c(p, **options) for c, p in zip((ours, theirs), leaves, strict=True)]

    def step(count=1):
        for _ in range(count):
            for p, q in zip(*leaves, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()

    def compare():
        for p, q in zip(*leaves, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)

    return optimizers, leaves, step, compare


CHECKPOINTS = [
    *((name, {}) for name in NAMES),
    *((name, {"fused": True}) for name in NAMES if name != "RMSprop"),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
]


@pytest.mark.parametrize(("name", "options"), CHECKPOINTS)
def test_checkpoints_go_both_ways(name, options):
    ours, theirs = getattr(dlgpu.optim, name), getattr(torch.optim, name)
    (a, b), leaves, step, compare = pair(ours, theirs, **options)
    step(3)
    one, other = a.state_dict(), b.state_dict()
    assert [g.keys() for g in one["param_groups"]] == [g.keys() for g in other["param_groups"]]
    assert one["param_groups"] == other["param_groups"]
    for key, state in other["state"].items():
        assert one["state"][key].keys() == state.keys()
        for slot, value in state.items():
            mine = one["state"][key][slot]
            assert (mine.dtype, mine.shape, mine.stride()) == (value.dtype, value.shape, value.stride())
    with io.BytesIO() as file:
        torch.save([one, other], file)
        file.seek(0)
        one, other = torch.load(file, weights_only=True)
    a.load_state_dict(other)
    b.load_state_dict(one)
    step(3)
    compare()
    if name != "SGD":
        assert a.state[leaves[0][0]]["step"].item() == 6


def test_a_checkpoint_with_other_strides(backend, device):
    """Torch's state for a contiguous parameter, loaded for a transposed one."""
    (a, b), leaves, step, compare = pair(dlgpu.optim.Adam, torch.optim.Adam, device)
    step(2)
    leaves[0][0].data = leaves[0][0].data.t().contiguous().t()
    # Torch loads without a copy: the two would share their state.
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    step(2)
    compare()
    assert a.state[leaves[0][0]]["exp_avg"].stride() == leaves[0][0].stride()


@poisoned
def test_backends_take_turns(device):
    (a, _), leaves, step, compare = pair(dlgpu.optim.AdamW, torch.optim.AdamW, device, amsgrad=True)
    for backend in ("fallback", "triton", "fallback") if device == "cpu" else ("triton", "auto"):
        with dlgpu.use_backend(backend):
            step()
    compare()
    assert a.state[leaves[0][0]]["step"].item() == len(leaves) + (device == "cpu")


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), torch.tensor(1e-2, dtype=torch.float64)])
def test_schedules_and_tensor_lr(backend, device, lr):
    if isinstance(lr, torch.Tensor):
        lr = lr.clone().to(device)
    optimizers, _, step, compare = pair(dlgpu.optim.AdamW, torch.optim.AdamW, device, lr=lr)
    if isinstance(lr, torch.Tensor):
        # Else the schedulers would both write into the one tensor.
        optimizers[1].param_groups[0]["lr"] = lr.clone()
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10) for o in optimizers]
    for _ in range(3):
        step()
        for s in schedulers:
            s.step()
    compare()


def test_none_gradients_closures_hooks_and_new_groups(backend, device):
    optimizers, leaves, step, compare = pair(dlgpu.optim.Adam, torch.optim.Adam, device)
    for optimizer in optimizers:
        optimizer.step()  # no gradient anywhere
        assert not optimizer.state
    step()
    for optimizer, ps in zip(optimizers, leaves, strict=True):
        ps[0].grad = None
        optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in ps] == [1, 2]
        ps.append(torch.nn.Parameter(torch.ones(4, device=device)))
        optimizer.add_param_group({"params": [ps[2]], "lr": 0.1, "amsgrad": True})
    step()
    seen = []
    optimizers[0].register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizers[0].register_step_post_hook(lambda *_: seen.append("post"))
    for optimizer, ps in zip(optimizers, leaves, strict=True):

        def closure(optimizer=optimizer, ps=ps):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in ps)
            loss.backward()
            return loss

        with torch.no_grad():
            assert optimizer.step(closure).requires_grad
    assert seen == ["pre", "post"]
    compare()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, how):
    cls = getattr(dlgpu.optim, name)
    p = torch.nn.Parameter(torch.randn(5))
    # An extra that a copy must keep: half of it would change the step.
    optimizer = cls([p], weight_decay=0.1, max_grad_norm=0.5, **({"momentum": 0.9} if name == "SGD" else {}))
    p.grad = torch.randn(5)
    optimizer.step()
    twin = how(optimizer)
    q = twin.param_groups[0]["params"][0]
    assert type(twin) is cls
    assert q is not p
    for _ in range(2):
        p.grad = torch.randn(5)
        q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        assert_same_bits([p], [q])


@poisoned
def test_repeats_bit_for_bit(backend, device):
    params, gradients = sample(torch.float32, device, scales=[1.0])
    taken = [gradients() for _ in range(2)]
    first, second = (train(dlgpu.optim.Adam, params, taken)[0] for _ in range(2))
    assert_same_bits(list(first.values()), list(second.values()))


def test_version_counters(backend, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = dlgpu.optim.Adam([p])
    loss = (p * p).sum()
    p.grad = torch.ones(3, device=device)
    before = p._version
    optimizer.step()
    assert p._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@poisoned
def test_new_memory_is_seen(backend, device):
    """p.data, a state tensor, the whole state replaced; a gradient of the same address with other strides."""
    optimizers, leaves, step, compare = pair(dlgpu.optim.Adam, torch.optim.Adam, device)
    step()
    for ps, optimizer in zip(leaves, optimizers, strict=True):
        ps[0].data = ps[0].data * 2
        optimizer.state[ps[1]]["exp_avg"] = torch.ones_like(ps[1])
    step()
    compare()
    memory = torch.randn(36, device=device)
    for ps in leaves:
        ps[0].data = torch.ones(6, 6, device=device)
    for optimizer in optimizers:
        optimizer.state.clear()
    for view in (memory.view(6, 6), memory.view(6, 6).t()):
        for ps, optimizer in zip(leaves, optimizers, strict=True):
            ps[0].grad = view
            ps[1].grad = None
            optimizer.step()
    compare()


def _replace_dict(optimizer, p):
    optimizer.state[p] = {k: v + 1 for k, v in optimizer.state[p].items()}


CHANGES = {
    "parameter's data": lambda optimizer, p: setattr(p, "data", p.data * 2),
    "parameter's shape": lambda optimizer, p: (setattr(p, "data", p.data[:3]), optimizer.state.pop(p)),
    "state": lambda optimizer, p: optimizer.state[p].update(exp_avg_sq=torch.ones_like(p)),
    "state's data": lambda optimizer, p: [
        setattr(t, "data", t.data + 1) for t in optimizer.state[p].values()
    ],
    "step": lambda optimizer, p: optimizer.state[p].update(step=optimizer.state[p]["step"] + 5),
    "dict": _replace_dict,
    "no state": lambda optimizer, p: optimizer.state.clear(),
    "no entries": lambda optimizer, p: optimizer.state[p].clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_alone_is_seen(backend, device, change):
    """A table that is out of date would step what was there before."""
    optimizers, leaves, step, compare = pair(dlgpu.optim.Adam, torch.optim.Adam, device)
    step()
    for optimizer, ps in zip(optimizers, leaves, strict=True):
        with torch.no_grad():
            CHANGES[change](optimizer, ps[0])
        ps[0].grad = None
    step()
    compare()
    ours, theirs = (optimizer.state[ps[0]] for optimizer, ps in zip(optimizers, leaves, strict=True))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_other_strides_at_the_same_address_are_seen(backend, device):
    memory = torch.randn(6, 6, device=device)
    params = [torch.nn.Parameter(memory.clone()) for _ in range(2)]
    optimizers = [m.Adam([p]) for m, p in zip((dlgpu.optim, torch.optim), params, strict=True)]
    for _ in range(2):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = None
            p.data = p.data.t()
            p.grad = memory.clone()
            optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-5, atol=1e-7)


def test_groups_that_come_later(backend, device):
    """Adagrad's states start from the constructor's value in all groups; SGD's momentum can be turned on, and off."""
    optimizers, leaves, step, compare = pair(
        dlgpu.optim.Adagrad, torch.optim.Adagrad, device, initial_accumulator_value=0.5
    )
    for optimizer, ps in zip(optimizers, leaves, strict=True):
        ps.append(torch.nn.Parameter(torch.ones(4, device=device)))
        optimizer.add_param_group({"params": [ps[2]], "initial_accumulator_value": 7.0})
    if torch.__version__ >= (2, 13):
        # Before that torch's own has no state for them.
        step(2)
        compare()
    optimizers, leaves, step, compare = pair(dlgpu.optim.SGD, torch.optim.SGD, device, dampening=0.5)
    for momentum in (0.0, 0.9, 0.9, 0.0, 0.9):
        for optimizer in optimizers:
            optimizer.param_groups[0]["momentum"] = momentum
        step()
        compare()
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_a_checkpoint_without_buffers(backend, device):
    """Older torch wrote None for a momentum that had not begun: the next gradient is the first, undampened."""
    optimizers, _, step, compare = pair(dlgpu.optim.SGD, torch.optim.SGD, device, momentum=0.9, dampening=0.5)
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        optimizer.load_state_dict({**saved, "state": {n: {"momentum_buffer": None} for n in range(2)}})
    step(2)
    compare()


def test_sgd_without_momentum_keeps_nothing(backend, device):
    optimizers, _, step, _ = pair(dlgpu.optim.SGD, torch.optim.SGD, device)
    step(2)
    assert optimizers[0].state_dict() == optimizers[1].state_dict()


def test_gradients_are_let_go(backend, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = dlgpu.optim.Adam([p])
    p.grad = torch.ones(3, device=device)
    grad = weakref.ref(p.grad)
    storage = weakref.ref(p.grad.untyped_storage())
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert grad() is None
    assert storage() is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_with_a_graph(backend, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.pow(3).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    dlgpu.optim.Adam([p]).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 1e-3, device=device))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_gradient_that_is_a_negative_view(backend, device, name):
    """Its memory holds the numbers with the other sign."""
    grad = torch.tensor([1.0, -2.0, 3.0], device=device)
    for chosen in (backend, "auto"):
        p = torch.nn.Parameter(torch.zeros(3, device=device))
        p.grad = torch._neg_view(grad)
        with dlgpu.use_backend(chosen):
            getattr(dlgpu.optim, name)([p], lr=0.1).step()
        expected = 0.1 * (grad if name == "SGD" else grad.sign())
        torch.testing.assert_close(p.detach(), expected)


def test_grad_scaler_skips():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = dlgpu.optim.Adam([p], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((float("inf"), 1.0), (1.0, 1 - 1e-3)):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(p.detach(), torch.full((3,), expected))


def test_under_compile():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = dlgpu.optim.Adam([p])

    @torch.compile(backend="eager")
    def train_step():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        optimizer.step()
        return loss

    first = train_step()
    assert train_step() < first


INFOS = [info for info in optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)
def test_torchs_own_inputs(info):
    """PyTorch's conformance data: arguments, and arguments it refuses."""
    ours = getattr(dlgpu.optim, info.optim_cls.__name__)
    for given in info.optim_inputs_func("cpu"):
        _, _, step, compare = pair(ours, info.optim_cls, **given.kwargs)
        step(3)
        compare()
    for wrong in info.optim_error_inputs_func("cpu", torch.float64):
        given = wrong.optimizer_error_input
        assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        expect = pytest.warns if issubclass(wrong.error_type, Warning) else pytest.raises
        with expect(wrong.error_type, match=wrong.error_regex):
            ours(given.params, **given.kwargs)


def with_grad(p, g):
    p = torch.nn.Parameter(p)
    p.grad = g
    return p


ERRORS = [
    (
        "sparse",
        lambda: with_grad(torch.ones(3), torch.ones(3).to_sparse()),
        RuntimeError,
        "torch.optim.SparseAdam",
    ),
    (
        "complex",
        lambda: with_grad(torch.ones(3) * 1j, torch.ones(3) * 1j),
        NotImplementedError,
        "torch.optim.Adam",
    ),
    (
        "overlap",
        lambda: with_grad(torch.ones(1).expand(3), torch.ones(3)),
        RuntimeError,
        "single memory location",
    ),
    (
        "float8",
        lambda: with_grad(torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.float8_e4m3fn)),
        TypeError,
        "float32",
    ),
    (
        "meta",
        lambda: with_grad(torch.ones(3, device="meta"), torch.ones(3, device="meta")),
        RuntimeError,
        "no memory",
    ),
]


@pytest.mark.parametrize(("param", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(backend, param, error, message):
    with pytest.raises(error, match=message):
        dlgpu.optim.Adam([param()]).step()


def test_a_gradient_that_turns_sparse(backend, device):
    p = with_grad(torch.ones(3, device=device), torch.ones(3, device=device))
    optimizer = dlgpu.optim.Adam([p])
    optimizer.step()
    old = p.detach().clone()
    p.grad = torch.ones(3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match=r"torch\.optim\.SparseAdam"):
        optimizer.step()
    assert torch.equal(p, old)
    assert optimizer.state[p]["step"].item() == 1


def test_differentiable_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(NotImplementedError, match=r"torch\.optim\.AdamW"):
        dlgpu.optim.AdamW([p], differentiable=True)
    optimizer = dlgpu.optim.Adam([p])
    with pytest.raises(NotImplementedError, match=r"torch\.optim\.Adam"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "differentiable": True})
    optimizer.load_state_dict(torch.optim.Adam([p], differentiable=True).state_dict())
    with pytest.raises(NotImplementedError, match=r"torch\.optim\.Adam"):
        optimizer.step()


def test_shared_memory_is_refused_by_the_kernels(device):
    memory = torch.zeros(8, device=device)
    params = [
        with_grad(memory[:5], torch.ones(5, device=device)),
        with_grad(memory[4:], torch.ones(4, device=device)),
    ]
    with dlgpu.use_backend("triton"), pytest.raises(RuntimeError, match="share memory"):
        dlgpu.optim.Adam(params).step()


def test_the_kernels_refuse_float64():
    p = with_grad(torch.ones(3).double(), torch.ones(3).double())
    with dlgpu.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        dlgpu.optim.Adam([p]).step()


def test_torchs_part(monkeypatch):
    """What runs float64 on a GPU, here on the CPU."""
    monkeypatch.setattr(ops._dispatch, "choose_backend", lambda t, op: "torch")
    for rule, groups in RULES.items():
        params, gradients = sample(torch.float64, groups=groups)
        taken = [gradients() for _ in range(3)]
        actual, optimizer = train(getattr(dlgpu.optim, rule), params, taken, groups)
        assert isinstance(optimizer._cache.plan.parts[0], ops._TorchPart)
        expected, _ = train(getattr(torch.optim, rule), params, taken, groups)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-13, atol=1e-14)


def test_torchs_part_with_extras(monkeypatch):
    """16-bit parameters where the kernels do not take them: masters, scale, norm and skipping as by the array code."""
    found = []
    for backend in ("torch", "fallback"):
        torch.manual_seed(1)
        monkeypatch.setattr(ops._dispatch, "choose_backend", lambda t, op, backend=backend: backend)
        for options in ({"master_weights": True}, {"state_dtype": torch.float32}):
            p = torch.nn.Parameter(torch.randn(40).bfloat16())
            optimizer = dlgpu.optim.SGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0, **options)
            for skip in (0.0, 1.0, 0.0):
                p.grad = torch.randn(40).bfloat16()
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(skip)
                optimizer.step()
            found.append([p.detach(), optimizer.grad_norm, *optimizer.state[p].values()])
    for theirs, ours in zip(found[:2], found[2:], strict=True):
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b)


def test_explain():
    params = [torch.zeros(5000), torch.zeros(3), torch.zeros(4, dtype=torch.bfloat16)]
    with dlgpu.use_backend("triton"):
        text = str(dlgpu.explain("adamw", params))
    assert "_prologue_kernel" in text
    assert text.count("_multi_tensor_kernel") == 2
    assert "4 programs" in text
    assert dlgpu.explain("adam", params).backend == "fallback"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_arrays(monkeypatch, rule, dtype):
    """Block by block or all at once: the same bits; converted tensors too."""
    params, gradients = sample(dtype, groups=RULES[rule], shapes=[(37,), (0, 2), (5, 8)])
    taken = [gradients() for _ in range(2)]
    whole, _ = train(getattr(dlgpu.optim, rule), params, taken, RULES[rule])
    monkeypatch.setattr(arrays, "BLOCK", 8)
    monkeypatch.setattr(ops._ArrayPart, "CONVERTED", 16)
    blocks, _ = train(getattr(dlgpu.optim, rule), params, taken, RULES[rule])
    assert_same_bits(list(blocks.values()), list(whole.values()))


def test_array_code_counts_no_step():
    """The counters belong to the state: the array code gets numbers."""
    p, g, m, v = (np.ones(3) for _ in range(4))
    options = {
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 0.0,
        "weight_decay": 0.0,
        "decoupled": False,
        "maximize": False,
    }
    arrays.adam_step([p], [g], [m], [v], None, [1.0], lr=0.0, **options)
    assert p.tolist() == [1, 1, 1]


def test_tables_of_a_captured_graph(monkeypatch, device):
    """They are kept for the replays; what was uploaded in a capture is no use to a later step: nothing has filled it yet."""
    uploads = count_uploads(monkeypatch)
    p = with_grad(torch.zeros(5, device=device), torch.ones(5, device=device))
    optimizer = dlgpu.optim.Adam([p])
    kept = optimizer._cache.kept

    def captured_step():
        with monkeypatch.context() as patch:
            patch.setattr(kernels.Uploader, "capturing", lambda self: True)
            optimizer.step()

    with dlgpu.use_backend("triton"):
        optimizer.step()
        assert not kept
        captured_step()
        # What was there already serves the graph too, and so must stay, here and for it.
        assert uploads == ["chunks", "tables"]
        part = optimizer._cache.plan.parts[0]
        assert any(part.tables is t for entry in kept for t in entry)
        optimizer.step()
        assert uploads == ["chunks", "tables"]
        p.grad = torch.ones(5, device=device)
        captured_step()
        assert uploads == ["chunks", "tables", "tables"]
        optimizer.step()
        assert uploads == ["chunks", "tables", "tables", "chunks", "tables"]
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._cache.kept is kept
    assert kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_no_synchronization_and_graph_capture():
    lr = torch.tensor(1e-2, device="cuda")
    options = {"lr": lr, "capturable": True}
    (a, b), leaves, step, compare = pair(dlgpu.optim.Adam, torch.optim.Adam, "cuda", **options)
    step(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        a.param_groups[0]["weight_decay"] = b.param_groups[0]["weight_decay"] = 0.1
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grads = [[p.grad for p in ps] for ps in leaves]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for value in (1e-2, 1e-1):
        lr.fill_(value)
        graph.replay()
        b.step()
    # An eager step, on other gradients, leaves the graph's tables alone.
    step()
    for ps, old in zip(leaves, grads, strict=True):
        for p, g in zip(ps, old, strict=True):
            p.grad = g
    graph.replay()
    b.step()
    compare()
