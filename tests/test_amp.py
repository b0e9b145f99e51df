"""Mixed precision from end to end: autocast's dtypes for every function, GradScaler, an overflow and what follows it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlgpu
from dlgpu import functional
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from test_dispatch import inputs, targets
from tolerance import assert_same_bits

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
MATRICES = [(6, 4), (6, 4)]
# Public function -> (ours, torch's own, shapes): the result's dtype and the gradients' are torch's.
FUNCTIONS = {
    "linear": (functional.linear, F.linear, [(6, 4), (3, 4), (3,)]),
    "mlp": (
        lambda x, w, v: functional.mlp(x, [w, v], activation="relu"),
        lambda x, w, v: F.linear(F.relu(F.linear(x, w)), v),
        [(6, 4), (5, 4), (3, 5)],
    ),
    "gated_linear": (
        lambda x, w: functional.gated_linear(x, w),
        lambda x, w: F.silu(F.linear(x, w[:3])) * F.linear(x, w[3:]),
        [(6, 4), (6, 4)],
    ),
    **{
        name: (
            lambda x, name=name: getattr(functional, name)(x),
            lambda x, name=name: lookup(name).eager(x, 0.01),
            [(6, 4)],
        )
        for name in ACTIVATIONS
    },
    "softmax": (lambda x: functional.softmax(x, 1), lambda x: F.softmax(x, 1), [(6, 4)]),
    "log_softmax": (lambda x: functional.log_softmax(x, 1), lambda x: F.log_softmax(x, 1), [(6, 4)]),
    "logsumexp": (lambda x: functional.logsumexp(x, 1), lambda x: torch.logsumexp(x, 1), [(6, 4)]),
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (4,), w, b),
        lambda x, w, b: F.layer_norm(x, (4,), w, b),
        [(6, 4), (4,), (4,)],
    ),
    "rms_norm": (lambda x: functional.rms_norm(x, (4,)), lambda x: F.rms_norm(x, (4,)), [(6, 4)]),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: F.batch_norm(x, None, None, training=True),
        [(6, 4)],
    ),
    "dropout": (functional.dropout, F.dropout, [(6, 4)]),
    "cross_entropy": (
        lambda x: functional.cross_entropy(x, targets(6, 4, x.device)),
        lambda x: F.cross_entropy(x, targets(6, 4, x.device)),
        [(6, 4)],
    ),
    "linear_cross_entropy": (
        lambda x, w: functional.linear_cross_entropy(x, w, targets(6, 3, x.device)),
        lambda x, w: F.cross_entropy(F.linear(x, w), targets(6, 3, x.device)),
        [(6, 4), (3, 4)],
    ),
    "multi_margin_loss": (
        lambda x: functional.multi_margin_loss(x, targets(6, 4, x.device)),
        lambda x: F.multi_margin_loss(x, targets(6, 4, x.device)),
        [(6, 4)],
    ),
    **{
        name: (getattr(functional, name), getattr(F, name), MATRICES)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
    },
    "kl_div": (
        lambda x, t: functional.kl_div(x, t, reduction="batchmean"),
        lambda x, t: F.kl_div(x, t, reduction="batchmean"),
        MATRICES,
    ),
    "binary_cross_entropy_with_logits": (
        functional.binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
        MATRICES,
    ),
    # Torch has none: with autocast as its losses.
    "hinge_loss": (functional.hinge_loss, F.mse_loss, MATRICES),
}


def test_every_public_function_is_here():
    assert sorted(FUNCTIONS) == sorted(functional.__all__)


def dtypes(function, args):
    leaves = [a.clone().requires_grad_() for a in args]
    try:
        y = function(*leaves)
    except RuntimeError as error:
        # Torch has no multi_margin_loss in 16 bits.
        if "not implemented for" not in str(error):
            raise
        return None
    y.sum().backward()
    return [y.dtype, *(a.grad.dtype for a in leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_dtypes(name, to, device):
    """In autocast, for float32 and 16-bit arguments; and where it is switched off within."""
    ours, theirs, shapes = FUNCTIONS[name]
    with dlgpu.use_backend("fallback" if device == "cpu" else "auto"):
        for dtype in (torch.float32, to):
            args = [inputs(*shape, device=device).abs().to(dtype) for shape in shapes]
            with torch.autocast(device, dtype=to):
                expected = dtypes(theirs, args)
                if expected is not None:
                    assert dtypes(ours, args) == expected
                with torch.autocast(device, enabled=False):
                    expected = dtypes(theirs, args)
                    if expected is not None:
                        assert dtypes(ours, args) == expected


@pytest.mark.parametrize("backend", ["fallback", "auto"])
@pytest.mark.parametrize("name", ["linear", "cross_entropy", "layer_norm"])
def test_autocast_within_a_compiled_function(name, backend):
    ours, _, shapes = FUNCTIONS[name]
    args = [inputs(*shape) for shape in shapes]

    def call(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ours(*args)

    torch._dynamo.reset()
    with dlgpu.use_backend(backend):
        found = torch.compile(call, backend="aot_eager", fullgraph=True)(*args)
        assert_same_bits([found], [call(*args)])
    torch._dynamo.reset()


def network(layers):
    torch.manual_seed(0)
    model = nn.Sequential(layers.Linear(8, 16), nn.ReLU(), layers.Linear(16, 3))
    return model


OPTIMIZERS = {
    "SGD": {"lr": 0.2, "momentum": 0.9},
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02},
    "RMSprop": {"lr": 0.02},
    "Adagrad": {"lr": 0.1},
}


def train(library, optimizer, device, steps, poisoned, loss_fn):
    """A training run in float16 autocast whose scale is too large at first and whose data is infinite at one step.

    Returns (model, losses, scales after each step, which steps changed no bit of the parameters).
    """
    model = network(library.nn if library is dlgpu else nn).to(device)
    optimizer = getattr(library.optim, optimizer)(model.parameters(), **OPTIMIZERS[optimizer])
    # The largest scale overflows float16 at once.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=4)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(device)
    t = targets(12, 3, device)
    losses, scales, unchanged = [], [], []
    for step in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = loss_fn(model(x * (float("inf") if step == poisoned else 1)), t)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        unchanged.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    return model, losses, scales, unchanged


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_is_skipped_and_the_run_recovers(optimizer, device):
    steps, poisoned = 30, 17
    with dlgpu.use_backend("fallback" if device == "cpu" else "auto"):
        model, losses, scales, unchanged = train(
            dlgpu, optimizer, device, steps, poisoned, functional.cross_entropy
        )
    _, expected, their_scales, their_unchanged = train(
        torch, optimizer, device, steps, poisoned, F.cross_entropy
    )
    # The first steps overflow, and the one whose data does; none else. Each halves the scale.
    assert unchanged[0]
    assert unchanged[poisoned]
    assert sum(unchanged) < 14
    assert all(
        b == a / 2 for a, b, skipped in zip(scales[:-1], scales[1:], unchanged[1:], strict=True) if skipped
    )
    assert max(scales[poisoned:]) > scales[poisoned]
    assert (scales, unchanged) == (their_scales, their_unchanged)
    # And it learns, as torch's does.
    assert losses[-1] < 0.8 * losses[0]
    assert abs(losses[-1] - expected[-1]) < 0.05
    assert all(p.isfinite().all() for p in model.parameters())


def test_skipping_leaves_the_state_alone():
    """An infinite gradient: no step counted, no moment moved, in one launch and without unscale_."""
    p = nn.Parameter(torch.ones(3))
    optimizer = dlgpu.optim.Adam([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 1.0):
        state = {k: v.clone() for k, v in optimizer.state[p].items()} if optimizer.state[p] else {}
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if value == float("inf"):
            assert_same_bits(optimizer.state[p].values(), state.values())
    assert optimizer.state[p]["step"] == 2
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("explicit", [False, True])
def test_clipping_under_a_scaler(explicit):
    """max_grad_norm sees unscaled gradients; unscale_ and clip_grad_norm_ do the same as ever."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = dlgpu.optim.SGD([p], lr=1.0, max_grad_norm=None if explicit else 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
    if explicit:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, -0.8]))
    if not explicit:
        torch.testing.assert_close(optimizer.grad_norm, torch.tensor(5.0))


def test_bfloat16_parameters_with_float32_masters():
    """No scaler: bfloat16 has float32's range."""
    torch.manual_seed(0)
    model = dlgpu.nn.MLP([8, 16, 3], activation="relu").bfloat16()
    optimizer = dlgpu.optim.AdamW(model.parameters(), lr=3e-3, master_weights=True, max_grad_norm=1.0)
    x, t, losses = inputs(12, 8).bfloat16(), targets(12, 3), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert all(state["master_param"].dtype is torch.float32 for state in optimizer.state.values())
