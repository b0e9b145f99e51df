"""What torch's optimizers do not have: clipping, unscaling and skipping within the step, float32 masters, a dtype for the
states; and what can be proved of the launches without a GPU: their bytes, their uploads, their cost on the host."""

import copy
import io
import time

import numpy as np
import pytest
import torch

import dlgpu
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import optimizers as kernels
from dlgpu.ops import optimizers as ops
from tolerance import assert_accurate, assert_same_bits, bits

NAMES = ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"]
# Arguments that make each rule keep all of its states.
FULL = {
    "SGD": {"momentum": 0.9, "dampening": 0.1},
    "Adagrad": {"lr_decay": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {},
}
BLOCK = configs.optimizer_tile(4, True).block
poisoned = pytest.mark.usefixtures("poisoned")
# What does not depend on the rule, the interpreted kernels show for two of them.
EACH = [*(("fallback", name) for name in NAMES), ("triton", "SGD"), ("triton", "Adam")]
each_rule = pytest.mark.parametrize(("backend", "name"), EACH, indirect=["backend"])


def leaf(value, grad):
    p = torch.nn.Parameter(value)
    p.grad = grad
    return p


def leaves(dtype, device, sizes=(300, 7, 0, 33), scale=1.0):
    return [
        leaf(torch.randn(n, device=device).to(dtype), (torch.randn(n, device=device) * scale).to(dtype))
        for n in sizes
    ]


def everything(optimizer):
    """Parameters and states, these by their names."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    return [
        t.detach()
        for p, state in zip(params, states, strict=True)
        for t in (p, *(state[k] for k in sorted(state)))
    ]


# Clipping.


@poisoned
@each_rule
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_is_torchs(backend, device, name, max_norm):
    """clip_grad_norm_ and a step: the same parameters, and the same norm; gradients keep their bits."""
    mine = leaves(torch.float32, device)
    theirs = [leaf(p.detach().clone(), p.grad.clone()) for p in mine]
    exact = [leaf(p.detach().double(), p.grad.double()) for p in mine]
    # Two groups, of different numbers.
    a = getattr(dlgpu.optim, name)(
        [{"params": mine[:2]}, {"params": mine[2:], "lr": 0.1}], max_grad_norm=max_norm, **FULL[name]
    )
    b, c = (
        getattr(torch.optim, name)([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1}], **FULL[name])
        for ps in (theirs, exact)
    )
    for _ in range(2):
        before = [bits(p.grad).clone() for p in mine]
        a.step()
        assert all(torch.equal(bits(p.grad), old) for p, old in zip(mine, before, strict=True))
        norms = []
        for ps, optimizer in ((theirs, b), (exact, c)):
            for p, q in zip(ps, mine, strict=True):
                p.grad = q.grad.to(p.dtype, copy=True)
            norms.append(torch.nn.utils.clip_grad_norm_(ps, max_norm))
            optimizer.step()
        assert_accurate(a.grad_norm, norms[1], norms[0], "norm")
        for p in mine:
            p.grad = torch.randn_like(p)
    found = [torch.cat([t.flatten() for t in everything(o)]) for o in (a, c, b)]
    assert_accurate(*found)


def test_clipping_of_many_chunks(backend, device, monkeypatch):
    """More partial sums than one round of the prologue takes, more chunks than one program of the norm, odd ends."""
    monkeypatch.setattr(configs, "PARTIALS", 2)
    monkeypatch.setattr(kernels, "CHUNKS", 2)
    params = leaves(torch.float32, device, sizes=(5 * BLOCK + 3, 1, 4 * BLOCK, 9))
    params.append(leaf(torch.zeros(20, device=device)[1:], torch.randn(20, device=device)[1:]))
    optimizer = dlgpu.optim.SGD(params, lr=1.0, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    expected = torch.cat([p.grad for p in params]).norm()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - p.grad / expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite(backend, device, value):
    """As clip_grad_norm_: NaN makes all gradients NaN, an infinity makes them 0 and itself NaN."""
    mine = leaves(torch.float32, device)
    mine[0].grad[3] = value
    theirs = [leaf(p.detach().clone(), p.grad.clone()) for p in mine]
    a, b = dlgpu.optim.SGD(mine, lr=0.1, max_grad_norm=1.0), torch.optim.SGD(theirs, lr=0.1)
    a.step()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    b.step()
    torch.testing.assert_close(a.grad_norm, norm, equal_nan=True)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_16_bit_gradients_is_float32(backend, device, dtype):
    params = leaves(dtype, device)
    optimizer = dlgpu.optim.Adam(params, max_grad_norm=1.0)
    optimizer.step()
    exact = torch.cat([p.grad.double() for p in params]).norm()
    assert optimizer.grad_norm.dtype is torch.float32
    assert abs(optimizer.grad_norm.item() / exact.item() - 1) < 1e-6


def test_the_norm_is_over_all_dtypes_and_parts(backend, device):
    """float32 and bfloat16 launches; and float64, which other code steps."""
    params = [*leaves(torch.float32, device), *leaves(torch.bfloat16, device)]
    if backend == "fallback":
        params += leaves(torch.float64, device)
    optimizer = dlgpu.optim.SGD(params, lr=1.0, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    norm = torch.cat([p.grad.double() for p in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-5, atol=0)
    for p, old in zip(params, before, strict=True):
        expected = (old.double() - p.grad.double() / norm).to(p.dtype)
        torch.testing.assert_close(p.detach(), expected)


def test_the_norm_over_two_parts(device):
    """The array code and the kernels in one optimizer: each clips by the norm of both."""
    params = [*leaves(torch.float32, device), *leaves(torch.float64, device)]
    optimizer = dlgpu.optim.SGD(params, lr=1.0, max_grad_norm=1.0)
    norm = torch.cat([p.grad.double() for p in params]).norm()
    before = [p.detach().clone() for p in params]
    with pytest.MonkeyPatch.context() as patch:
        names = {torch.float32: "triton", torch.float64: "fallback" if device == "cpu" else "torch"}
        patch.setattr(ops._dispatch, "choose_backend", lambda t, op: names[t.dtype])
        optimizer.step()
        assert len(optimizer._cache.plan.parts) == 2
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach().double(), old.double() - p.grad / norm, rtol=1e-5, atol=1e-6)


def test_max_grad_norm_can_change():
    p = leaf(torch.zeros(4), torch.ones(4))
    optimizer = dlgpu.optim.SGD([p], lr=1.0)
    assert optimizer.grad_norm is None
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert optimizer.grad_norm.item() == 2
    torch.testing.assert_close(p.detach(), torch.full((4,), -1.5))
    optimizer.max_grad_norm = None
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -2.5))
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.max_grad_norm = -1
    with pytest.raises(ValueError, match="max_grad_norm"):
        dlgpu.optim.Adam([p], max_grad_norm=float("nan"))
    with pytest.raises(ValueError, match="state_dtype"):
        dlgpu.optim.Adam([p], state_dtype=torch.float16)


# GradScaler.


@poisoned
@each_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_skipped_step_leaves_every_bit(backend, device, name, dtype):
    """At the very first step too: afterwards it is as if there had been none."""
    runs: list[list[torch.Tensor]] = []
    for skips in ([], [0, 0, 2]):
        torch.manual_seed(3)
        optimizer = getattr(dlgpu.optim, name)(
            leaves(dtype, device), max_grad_norm=3.0, master_weights=True, **FULL[name]
        )
        params = optimizer.param_groups[0]["params"]
        taken = [[torch.randn_like(p) for p in params] for _ in range(3)]
        for n, grads in enumerate(taken):
            for _ in range(skips.count(n)):
                for p in params:
                    p.grad = torch.full_like(p, float("inf"))
                optimizer.grad_scale = torch.tensor(8.0, device=device)
                optimizer.found_inf = torch.tensor(1.0, device=device)
                before = [bits(t).clone() for t in everything(optimizer)]
                optimizer.step()
                if before[len(params) :]:
                    after = [bits(t) for t in everything(optimizer)]
                    for old, new in zip(before, after, strict=False):
                        assert len(before) != len(after) or torch.equal(old, new)
            optimizer.grad_scale = optimizer.found_inf = None
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
        runs.append(everything(optimizer))
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@each_rule
def test_scaled_gradients(backend, device, name):
    """A power of 2 goes out without a rounding, in the update, in the norm and in the counters."""
    runs = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        optimizer = getattr(dlgpu.optim, name)(leaves(torch.float32, device), max_grad_norm=1.0, **FULL[name])
        for _ in range(2):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p) * scale
            optimizer.grad_scale = torch.tensor(scale, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
            optimizer.step()
        runs.append([*everything(optimizer), optimizer.grad_norm])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(device, name, unscale):
    """Through torch.amp.GradScaler, beside torch's class: infinities skip in both, also after unscale_ and clipping."""
    runs = []
    for module in (dlgpu.optim, torch.optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(20, device=device))
        optimizer = getattr(module, name)([p], **FULL[name])
        scaler = torch.amp.GradScaler(device, init_scale=64.0, growth_interval=1)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((p.square() * factor).sum()).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_([p], 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert not hasattr(optimizer, "found_inf")
        runs.append((p.detach(), torch.tensor(scaler.get_scale())))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: o])
def test_grad_scaler_finds_the_protocol_on_copies(how):
    """An attribute of instances would be lost with the copy."""
    p = leaf(torch.ones(3), torch.ones(3))
    optimizer = how(dlgpu.optim.Adam([p]))
    p = optimizer.param_groups[0]["params"][0]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((float("inf"), 1.0), (1.0, 1 - 1e-3)):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(p.detach(), torch.full((3,), expected))
    # It was left to the step to unscale.
    assert p.grad.tolist() == [2.0] * 3


# Masters.


@poisoned
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_a_float32_run(backend, device, name, dtype):
    """With the 16-bit gradients: the master is what a float32 parameter becomes, the parameter its rounding."""
    start, steps = leaves(dtype, device), 4 if backend == "fallback" else 2
    optimizer = getattr(dlgpu.optim, name)(start, master_weights=True, **FULL[name])
    runs = {
        kind: [torch.nn.Parameter(p.detach().to(kind)) for p in start]
        for kind in (torch.float32, torch.float64)
    }
    others = {kind: getattr(torch.optim, name)(ps, **FULL[name]) for kind, ps in runs.items()}
    for _ in range(steps):
        for n, p in enumerate(start):
            p.grad = torch.randn_like(p)
            for kind, ps in runs.items():
                ps[n].grad = p.grad.to(kind)
        for one in (optimizer, *others.values()):
            one.step()
    for p, q, exact in zip(start, runs[torch.float32], runs[torch.float64], strict=True):
        master = optimizer.state[p][ops.MASTER]
        assert_accurate(master, exact.detach(), q.detach(), "master")
        assert torch.equal(p.detach(), master.to(dtype))
        for slot, value in optimizer.state[p].items():
            assert value.dtype is torch.float32
            if slot not in (ops.MASTER, "step"):
                other, truth = (others[k].state[t][slot] for k, t in zip(others, (q, exact), strict=True))
                assert_accurate(value, truth, other, slot)


def test_masters_see_small_steps(backend, device):
    """A hundred steps of a tenth of the distance between neighbours: without a master none of them shows."""
    for masters, expected in ((False, 1.0), (True, 1 - 100 * 1e-4)):
        p = leaf(torch.ones(8, device=device).bfloat16(), torch.ones(8, device=device).bfloat16())
        optimizer = dlgpu.optim.SGD([p], lr=1e-4, master_weights=masters)
        for _ in range(100 if backend == "fallback" else 3):
            optimizer.step()
        if backend == "fallback":
            assert p.detach().tolist() == torch.full((8,), expected).bfloat16().tolist()
        elif masters:
            torch.testing.assert_close(
                optimizer.state[p][ops.MASTER], torch.full((8,), 1 - 3e-4, device=device)
            )


@pytest.mark.parametrize("how", ["copy_", "load_state_dict", "data"])
def test_masters_follow_what_is_written_from_outside(backend, device, how):
    """Elements that were changed are taken over, others keep the bits below the parameter's rounding."""
    model = torch.nn.Linear(3, 2, bias=False, device=device, dtype=torch.bfloat16)
    p = model.weight
    optimizer = dlgpu.optim.SGD([p], lr=1e-4, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = optimizer.state[p][ops.MASTER][1].clone()
    value = p.detach().clone()
    value[0] = 5.0
    if how == "copy_":
        with torch.no_grad():
            p.copy_(value)
    elif how == "data":
        p.data = value
    else:
        model.load_state_dict({"weight": value})
    optimizer.step()
    master = optimizer.state[p][ops.MASTER]
    torch.testing.assert_close(master[0], torch.full((3,), 5 - 1e-4, device=device), rtol=1e-7, atol=0)
    torch.testing.assert_close(master[1], kept - 1e-4, rtol=1e-7, atol=0)
    assert torch.equal(p.detach(), master.bfloat16())


def test_our_own_steps_do_not_refresh(backend, device, monkeypatch):
    p = leaf(torch.ones(3, device=device).bfloat16(), torch.ones(3, device=device).bfloat16())
    optimizer = dlgpu.optim.SGD([p], lr=1e-4, master_weights=True)
    optimizer.step()
    monkeypatch.setattr(torch, "where", None)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p][ops.MASTER], torch.full((3,), 1 - 2e-4, device=device))


@pytest.mark.parametrize("options", [{"master_weights": True}, {"state_dtype": torch.float32}])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_with_dtypes_of_their_own(name, options):
    """Through torch.save: nothing is cast on the way back, hooks have their say, and torch's class can load it."""
    torch.manual_seed(0)
    a, b = (leaves(torch.bfloat16, "cpu") for _ in range(2))
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
    one, other = (getattr(dlgpu.optim, name)(ps, **FULL[name], **options) for ps in (a, b))

    def step(*optimizers):
        for n, p in enumerate(a):
            p.grad = torch.randn_like(p)
            b[n].grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    step(one, other)
    step(one)
    with io.BytesIO() as file:
        torch.save(one.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    # What is loaded is what the last hook leaves.
    other.register_load_state_dict_pre_hook(
        lambda _, given: {**given, "state": copy.deepcopy(saved["state"])}
    )
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
    for mine, theirs in zip(everything(one), everything(other), strict=True):
        assert_same_bits([mine], [theirs])
    step(one, other)
    if name != "SGD":
        for mine, theirs in zip(everything(one), everything(other), strict=True):
            assert_same_bits([mine], [theirs])
    torchs = getattr(torch.optim, name)(b, **FULL[name])
    torchs.load_state_dict(one.state_dict())
    torchs.step()


def test_torchs_checkpoint_makes_masters():
    """A state_dict of torch's has none: they are made from the parameters."""
    p = leaf(torch.randn(5).bfloat16(), torch.randn(5).bfloat16())
    theirs = torch.optim.AdamW([p])
    theirs.step()
    ours = dlgpu.optim.AdamW([p], master_weights=True)
    ours.load_state_dict(theirs.state_dict())
    before = p.detach().clone()
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    assert torch.equal(ours.state[p][ops.MASTER], before.float())
    assert ours.state[p]["exp_avg"].dtype is torch.float32
    assert ours.state[p]["step"].item() == 2


@pytest.mark.parametrize("name", NAMES)
def test_float32_parameters_need_no_master(name):
    p = leaf(torch.ones(3), torch.ones(3))
    optimizer = getattr(dlgpu.optim, name)([p], master_weights=True)
    optimizer.step()
    assert ops.MASTER not in optimizer.state[p]


# The dtype of the states.


@poisoned
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_state_dtype(backend, device, name, dtype, state_dtype):
    """One step against float32 arithmetic: only what is stored is rounded, once."""
    params = leaves(dtype, device)
    # In bfloat16 the difference that centers is 0 after one step, or below.
    options = {**FULL[name], **({"centered": False} if name == "RMSprop" else {})}
    twins = [leaf(p.detach().float(), p.grad.float()) for p in params]
    ours = getattr(dlgpu.optim, name)(params, state_dtype=state_dtype, **options)
    theirs = getattr(torch.optim, name)(twins, **options)
    for optimizer in (ours, theirs):
        optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach().to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )
        for slot, value in ours.state[p].items():
            assert value.dtype is (torch.float32 if slot == "step" else state_dtype)
            expected = theirs.state[q][slot]
            eps = torch.finfo(value.dtype).eps
            torch.testing.assert_close(value.float(), expected, rtol=2 * eps, atol=1e-7)


def test_float64_keeps_its_states():
    p = leaf(torch.ones(3).double(), torch.ones(3).double())
    optimizer = dlgpu.optim.Adam([p], state_dtype=torch.bfloat16, master_weights=True)
    optimizer.step()
    assert {t.dtype for k, t in optimizer.state[p].items() if k != "step"} == {torch.float64}
    assert ops.MASTER not in optimizer.state[p]


def test_extras_survive_copies():
    p = leaf(torch.ones(3).bfloat16(), torch.ones(3).bfloat16())
    optimizer = dlgpu.optim.Adam([p], max_grad_norm=0.5, master_weights=True, state_dtype=torch.bfloat16)
    twin = copy.deepcopy(optimizer)
    assert twin._extras == optimizer._extras
    assert twin.max_grad_norm == 0.5


# Bytes.

LAWS = [
    # rule, its arguments, dtype, bytes a parameter
    ("Adam", {}, torch.float32, 28),
    ("AdamW", {}, torch.float32, 28),
    ("Adam", {"amsgrad": True}, torch.float32, 36),
    ("Adam", {"state_dtype": torch.float32}, torch.bfloat16, 22),
    ("Adam", {"master_weights": True}, torch.bfloat16, 28),
    ("Adam", {}, torch.bfloat16, 14),
    ("Adam", {"state_dtype": torch.bfloat16}, torch.float32, 20),
    ("SGD", {}, torch.float32, 12),
    ("SGD", {"momentum": 0.9}, torch.float32, 20),
    ("SGD", {"momentum": 0.9, "master_weights": True}, torch.bfloat16, 20),
    ("Adagrad", {}, torch.float32, 20),
    ("RMSprop", {}, torch.float32, 20),
    ("RMSprop", {"centered": True, "momentum": 0.9}, torch.float32, 36),
]
# The tables: a row a tensor, the coefficients of its step, a group's numbers, a chunk.
ROW, SCALARS, HYPER, CHUNK = 8 * kernels.TABLE_WIDTH, 4 * kernels.SCALARS_WIDTH, 4 * kernels.HYPER_WIDTH, 8
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")


def metered_step(name, options, dtype):
    from dlgpu.bench.meter import TrafficMeter

    params = leaves(dtype, "cpu", sizes=(BLOCK + 3, 5, 2 * BLOCK, 0, 17))
    params.append(leaf(torch.randn(31).to(dtype)[1:], torch.randn(30).to(dtype)))
    optimizer = getattr(dlgpu.optim, name)(params, **options)
    with dlgpu.use_backend("triton"):
        optimizer.step()
        tensors = [t for p in params for t in (p.detach(), p.grad, *optimizer.state.get(p, {}).values())]
        tensors += list(optimizer._cache.counters.values())
        with TrafficMeter(tensors) as meter:
            optimizer.step()
    assert all(launch.clean for launch in meter.launches)
    return sum(p.numel() for p in params), len(params), meter.launches


def moved(launch):
    """(requested, compulsory) bytes of the tensors themselves."""
    of = [a for name, a in launch.args.items() if name.startswith("watched")]
    return sum(a.requested for a in of), sum(a.compulsory for a in of)


@interpreted
@pytest.mark.parametrize(("name", "options", "dtype", "each"), LAWS)
def test_bytes(name, options, dtype, each):
    """Each operand once, exactly; tables of O(tensors + programs) apart."""
    n, tensors, (prologue, *launches) = metered_step(name, options, dtype)
    assert len(launches) == 2
    data = [moved(launch) for launch in launches]
    assert sum(d[0] for d in data) == sum(d[1] for d in data) == each * n
    programs = sum(launch.grid[0] for launch in launches)
    tables = sum(launch.requested for launch in launches) - each * n
    # A program reads its chunk, and its tensor's row and coefficients once for whole vectors and once for the rest.
    assert tables <= programs * (CHUNK + 2 * (ROW + SCALARS))
    # Without momentum nothing counts steps.
    counter = 4 if (name, options) != ("SGD", {}) else 0
    assert moved(prologue)[0] == 2 * counter * tensors
    assert prologue.requested <= tensors * (8 + ROW + 8 + HYPER + SCALARS)
    assert prologue.stores == tensors * (SCALARS + counter)


@interpreted
@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_the_norm(dtype, each):
    """Clipping reads each gradient once more, and a few sums."""
    n, tensors, launches = metered_step("Adam", {"max_grad_norm": 1.0}, dtype)
    names = [launch.kernel for launch in launches]
    assert names == ["_square_sum_kernel"] * 2 + ["_prologue_kernel"] + ["_multi_tensor_kernel"] * 2
    sums = [moved(launch) for launch in launches[:2]]
    assert sum(s[0] for s in sums) == sum(s[1] for s in sums) == each * n
    partials = sum(launch.grid[0] for launch in launches[:2])
    assert sum(launch.stores for launch in launches[:2]) == 4 * partials
    assert partials <= tensors
    assert launches[2].requested <= 4 * partials + 4 + tensors * (8 + ROW + 8 + HYPER + SCALARS)


@interpreted
def test_a_skipped_step_moves_nothing(device):
    from dlgpu.bench.meter import TrafficMeter

    params = leaves(torch.float32, device)
    optimizer = dlgpu.optim.Adam(params)
    with dlgpu.use_backend("triton"):
        optimizer.step()
        optimizer.found_inf = torch.tensor(1.0)
        tensors = [t for p in params for t in (p.detach(), p.grad, *optimizer.state[p].values())]
        with TrafficMeter(tensors) as meter:
            optimizer.step()
    assert [moved(launch)[0] for launch in meter.launches] == [4 * len(params), 0]


# Uploads.


class Event:
    """Stands for an event whose copy is made when the test says so."""

    asked = 0

    def __init__(self):
        self.pending = False

    def query(self):
        Event.asked += 1
        return not self.pending


@pytest.fixture
def uploader(monkeypatch):
    """An Uploader that takes the CPU for a GPU: copies are recorded and read their source late."""
    pinned, copies = [], []

    class Ring(kernels.Uploader):
        now_capturing = False

        def _needed(self):
            return True

        def _pinned(self):
            pinned.append(torch.full((self.words,), -1, dtype=torch.int64))
            return pinned[-1]

        def _event(self):
            return Event()

        def _record(self, event):
            event.pending = True
            copies.append((event, self.source))

        def capturing(self):
            return self.now_capturing

    to = torch.Tensor.to

    def late(self, *args, **kwargs):
        ring.source = self
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", late)
    Event.asked = 0
    ring = Ring(4, torch.device("cpu"), [])
    ring.all_pinned, ring.copies = pinned, copies
    return ring


def test_pinned_memory_is_not_written_while_a_copy_reads_it(uploader):
    """Far ahead of the device, each upload has memory of its own; once the copies are made, it is used again."""
    for n in range(10):
        uploader(np.full(4, n))
    assert len(uploader.all_pinned) == 10 + uploader.SPARES
    assert [source.tolist() for _, source in uploader.copies] == [[n] * 4 for n in range(10)]
    for event, _ in uploader.copies:
        event.pending = False
    for n in range(10):
        uploader(np.full(4, n))
        uploader.copies[-1][0].pending = False
    assert len(uploader.all_pinned) == 10 + uploader.SPARES


def test_a_capture_pins_nothing_and_asks_no_event(uploader):
    """Its copies read memory that nothing writes again."""
    uploader(np.full(4, 7))
    asked, pinned = Event.asked, len(uploader.all_pinned)
    uploader.now_capturing = True
    for n in range(uploader.SPARES):
        uploader(np.full(4, 100 + n))
    assert (Event.asked, len(uploader.all_pinned)) == (asked, pinned)
    sources = uploader.kept[::2]
    uploader.now_capturing = False
    for n in range(8):
        for event, _ in uploader.copies:
            event.pending = False
        uploader(np.full(4, n))
    assert [s.tolist() for s in sources] == [[100 + n] * 4 for n in range(uploader.SPARES)]
    # There are spares for the next capture.
    assert len(uploader.spares) == uploader.SPARES


# The host.


@pytest.mark.perf
def test_host_time_of_1000_parameters(monkeypatch):
    """Without the launches, at most half of what torch's fused path does before its own: Python, and the reading of its
    arguments, which a skipped step leaves. Its C++ part that packs launches, and `_foreach_add_`, are not counted."""
    monkeypatch.setattr(kernels, "launch", lambda *args, **kwargs: None)
    # On the CPU these would compute.
    monkeypatch.setattr(torch, "_foreach_add_", lambda *args: None)
    monkeypatch.setattr(torch, "_foreach_sub_", lambda *args: None)
    times = []
    for optimizer_class, options in ((dlgpu.optim.Adam, {}), (torch.optim.Adam, {"fused": True})):
        params = [leaf(torch.zeros(8, 8), torch.ones(8, 8)) for _ in range(1000)]
        optimizer = optimizer_class(params, **options)
        if options:
            optimizer.step()
            optimizer.found_inf = torch.tensor(1.0)
        with dlgpu.use_backend("triton"):
            taken = []
            for _ in range(80):
                # Of this thread alone, and the best: another process only ever adds to it.
                start = time.thread_time()
                optimizer.step()
                taken.append(time.thread_time() - start)
            times.append(min(taken))
    assert times[0] <= 0.5 * times[1]
