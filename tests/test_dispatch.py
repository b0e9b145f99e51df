"""How a call finds its kernel: the dispatcher's ops, tracing, autocast, the choice of backend, and what launches compile."""

import contextlib
import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction, native_specialize_impl

import dlgpu
from dlgpu import _dispatch, functional
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from tolerance import assert_accurate, assert_conforms, assert_same_bits, run

ROOT = Path(__file__).resolve().parents[1]


def inputs(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype)


def targets(N, C, device="cpu"):
    return torch.arange(N, device=device) % C


# Public function on tensors, and their shapes; the last are targets.
CALLS = {
    "linear": (lambda x, w, b: functional.linear(x, w, b), [(5, 3), (4, 3), (4,)]),
    "linear gelu": (lambda x, w, b: functional.linear(x, w, b, activation="gelu"), [(5, 3), (4, 3), (4,)]),
    "linear relu": (lambda x, w: functional.linear(x, w, activation="relu"), [(2, 5, 3), (4, 3)]),
    "mlp": (
        lambda x, w, v, b: functional.mlp(x, [w, v], [None, b], activation="gelu", out_activation="relu"),
        [(2, 5, 3), (4, 3), (2, 4), (2,)],
    ),
    "gated_linear": (lambda x, w, b, v: functional.gated_linear(x, w, b, v), [(5, 3), (8, 3), (8,), (2, 4)]),
    "gated_linear relu": (
        lambda x, w: functional.gated_linear(x, w, activation="relu"),
        [(2, 5, 3), (8, 3)],
    ),
    **{name: (lambda x, name=name: getattr(functional, name)(x), [(5, 3)]) for name in ACTIVATIONS},
    "leaky_relu negative": (lambda x: functional.leaky_relu(x, -0.5), [(5, 3)]),
    "gelu approximate": (lambda x: functional.gelu(x, approximate="tanh"), [(5, 3)]),
    "cross_entropy": (lambda x: functional.cross_entropy(x, targets(5, 3, x.device)), [(5, 3)]),
    "cross_entropy none": (
        lambda x: functional.cross_entropy(x, targets(5, 3, x.device), reduction="none", label_smoothing=0.1),
        [(5, 3)],
    ),
    "cross_entropy probabilities": (
        lambda x, q: functional.cross_entropy(x, q, x.new_ones(3), label_smoothing=0.1),
        [(5, 3), (5, 3)],
    ),
    "cross_entropy extras": (
        lambda x: (
            functional.cross_entropy(x, targets(5, 3, x.device), z_loss=0.1, softcap=3.0, return_lse=True).lse
        ),
        [(5, 3)],
    ),
    "cross_entropy 3-d": (
        lambda x: functional.cross_entropy(x, targets(4, 3, x.device).view(2, 2), x.new_ones(3)),
        [(2, 3, 2)],
    ),
    "softmax": (lambda x: functional.softmax(x, 1), [(2, 3, 4)]),
    "log_softmax": (lambda x: functional.log_softmax(x, -1), [(5, 3)]),
    "logsumexp": (lambda x: functional.logsumexp(x, (0, 2), keepdim=True), [(2, 3, 4)]),
    "linear_cross_entropy": (
        lambda x, w, b: functional.linear_cross_entropy(x, w, targets(5, 4, x.device), linear_bias=b),
        [(5, 3), (4, 3), (4,)],
    ),
    "linear_cross_entropy lean": (
        lambda x, w: (
            functional.linear_cross_entropy(
                x, w, targets(5, 4, x.device), reduction="none", return_lse=True, memory_budget=0
            ).lse
        ),
        [(5, 3), (4, 3)],
    ),
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (4, 3), w, b),
        [(2, 5, 4, 3), (4, 3), (4, 3)],
    ),
    "rms_norm": (lambda x: functional.rms_norm(x, (3,)), [(5, 3)]),
    "batch_norm": (
        lambda x, w, b: functional.batch_norm(x, None, None, w, b, True, activation="gelu"),
        [(5, 3), (3,), (3,)],
    ),
    "batch_norm running": (
        lambda x, w: functional.batch_norm(x, x.new_zeros(3), x.new_ones(3), w, training=True),
        [(5, 3, 2), (3,)],
    ),
    "batch_norm evaluation": (
        lambda x, w: functional.batch_norm(x, x.new_zeros(3), x.new_ones(3), w, activation="relu"),
        [(5, 3, 2), (3,)],
    ),
    "mse_loss": (lambda x, t: functional.mse_loss(x, t), [(5, 3), (5, 3)]),
    "huber_loss weighted": (lambda x, t, w: functional.huber_loss(x, t, weight=w), [(5, 3)] * 3),
    "binary_cross_entropy_with_logits": (
        lambda x, t: functional.binary_cross_entropy_with_logits(
            x, t, pos_weight=x.new_ones(3), reduction="none"
        ),
        [(5, 3), (5, 3)],
    ),
    "hinge_loss": (lambda x, t: functional.hinge_loss(x, t, squared=True), [(5, 3), (5, 3)]),
    "kl_div": (lambda x, t: functional.kl_div(x, t.exp(), reduction="batchmean"), [(5, 3), (5, 3)]),
    "multi_margin_loss": (
        lambda x: functional.multi_margin_loss(x, targets(5, 3, x.device), weight=x.new_ones(3)),
        [(5, 3)],
    ),
    "nn": (
        lambda x: dlgpu.nn.CrossEntropyLoss()(LAYERS[x.device.type](x), targets(5, 3, x.device)),
        [(5, 6)],
    ),
}
LAYERS = {
    device: torch.nn.Sequential(dlgpu.nn.Linear(6, 4, activation="relu"), dlgpu.nn.Linear(4, 3)).to(device)
    for device in {"cpu", "cuda" if torch.cuda.is_available() else "cpu"}
}


def some(names, *interpreted):
    """(backend, name): tracing and autocast are the same for both, so the kernels run for a few names only."""
    return [*(("fallback", name) for name in names), *(("triton", name) for name in interpreted)]


def softmax_family_samples(x, backend):
    ops, leaf = torch.ops.dlgpu, x.clone().requires_grad_()
    lse, stats = torch.logsumexp(x, -1), torch.ones(2, 5, device=x.device)
    for log in (False, True):
        yield from (
            (ops.softmax, (x, log, backend)),
            (ops.softmax, (leaf[None], log, backend)),
            (ops.softmax_backward, (x, x.softmax(1), log, backend)),
        )
    yield from (
        (ops.logsumexp, (leaf, backend)),
        (ops.logsumexp, (leaf[None], backend)),
        (ops.logsumexp_fwd, (x, backend)),
        (ops.logsumexp_backward, (lse, x, stats, backend)),
    )


def linear_cross_entropy_samples(leaves, backend):
    ops = torch.ops.dlgpu
    x, w, b = (a.detach() for a in leaves)
    t, c, u = targets(5, 4, x.device), torch.rand(4, device=x.device), torch.rand(5, device=x.device)
    stats, none = torch.ones(2, 5, device=x.device), x.new_empty(0)
    plain, extra = ("mean", -100, 0.0, 0.0, 0.0, 1.0), ("none", 1, 0.1, 0.1, 3.0, 0.5)
    kept = x.new_empty(0, 0)
    return [
        (ops.linear_cross_entropy, (x, w, t, None, None, None, *plain, False, 0, backend)),
        (ops.linear_cross_entropy, (*leaves[:2], t, leaves[2], None, None, *plain, True, 1 << 20, backend)),
        (ops.linear_cross_entropy, (*leaves[:2], t, leaves[2], c, u, *extra, True, 0, backend)),
        (ops.linear_cross_entropy_fwd, (x, w, t, b, c, u, *extra, True, 1 << 20, backend)),
        (ops.linear_cross_entropy_fwd, (x, w, t, None, None, None, *plain, False, 0, backend)),
        (
            ops.linear_cross_entropy_backward,
            (x.sum(), None, x, w, t, b, None, None, stats, u[:1], kept, *plain, [True] * 3, backend),
        ),
        (
            ops.linear_cross_entropy_backward,
            (u, u, x, w, t, b, c, u, stats, none, x @ w.t(), *extra, [False, True, False], backend),
        ),
    ]


def loss_samples(leaf, backend):
    ops, x = torch.ops.dlgpu, leaf.detach()
    other, q = x.exp().requires_grad_(), torch.rand(3, device=x.device)
    bce, both, one = "binary_cross_entropy_with_logits", [True, True], [True, False]
    t, g = targets(5, 3, x.device), x[:, 0].clone()
    return [
        (ops.elementwise_loss, (leaf, other, None, None, "mse_loss", 0.0, "mean", backend)),
        (ops.elementwise_loss, (leaf, x.exp(), x, q, bce, 0.0, "none", backend)),
        (ops.elementwise_loss, (leaf, other, None, None, "kl_div", 0.0, "batchmean", backend)),
        (ops.elementwise_loss_backward, (x, x, x, None, q, bce, 0.0, "none", both, backend)),
        (ops.elementwise_loss_backward, (x.sum(), x, x, x, None, "huber_loss", 0.5, "mean", one, backend)),
        (ops.elementwise_loss_backward, (x.sum(), None, x, None, None, "kl_div", 0.0, "sum", one, backend)),
        (ops.multi_margin_loss, (leaf, t, None, 1, 1.0, "mean", backend)),
        (ops.multi_margin_loss, (leaf, t, q, 2, 0.5, "none", backend)),
        (ops.multi_margin_loss_backward, (x.sum(), x, t, None, 2, 1.0, "mean", backend)),
        (ops.multi_margin_loss_backward, (g, x, t, q, 1, 0.5, "none", backend)),
    ]


def norm_samples(x, w, b, backend):
    """x [5, 3], w and b [3] that require gradients."""
    ops, fixed, running = torch.ops.dlgpu, x.detach(), (x.new_zeros(3), x.new_ones(3))
    rest, plain = (0.1, 1e-5, "relu", 0.01), (0.0, 1e-5, None, 0.01)
    count, seed = torch.ones((), dtype=torch.int64, device=x.device), torch.tensor([7], device=x.device)
    stats = torch.ones(2, 5, device=x.device)
    wide = x.detach()[:, :, None].expand(5, 3, 2).contiguous().requires_grad_()
    return [
        (ops.layer_norm, (x, w, b, 1, 1e-5, False, backend)),
        (ops.layer_norm, (x, None, None, 2, 1e-5, True, backend)),
        (ops.layer_norm_fwd, (fixed, w.detach(), b.detach(), 1, 1e-5, False, True, backend)),
        (ops.layer_norm_fwd, (fixed, None, None, 1, 1e-5, True, False, backend)),
        (ops.layer_norm_backward, (fixed, fixed, w.detach(), stats, 1, 1e-5, False, [True] * 3, backend)),
        (
            ops.layer_norm_backward,
            (fixed, fixed, None, stats[:1].clone(), 1, 1e-5, True, [True, False, False], backend),
        ),
        (ops.batch_norm, (x, None, None, w, b, *running, None, *rest, backend)),
        (ops.batch_norm, (wide, None, None, None, None, *running, count, *rest, backend)),
        (ops.batch_norm, (x, *running, w, b, None, None, None, *plain, backend)),
        (ops.batch_norm_fwd, (fixed, None, None, w.detach(), None, *running, None, *rest, True, backend)),
        (ops.batch_norm_fwd, (fixed, *running, None, None, None, None, None, *plain, False, backend)),
        (
            ops.batch_norm_backward,
            (fixed, fixed, w.detach(), None, stats[:, :3].clone(), True, "gelu", 0.01, [True] * 3, backend),
        ),
        (
            ops.batch_norm_backward,
            (
                fixed,
                fixed,
                None,
                None,
                stats[:, :3].clone(),
                False,
                None,
                0.01,
                [True, False, False],
                backend,
            ),
        ),
        (ops.dropout, (x, seed, 0.3, backend)),
        (ops.dropout, (fixed[:, ::2], seed, 0.3, backend)),
    ]


def op_samples(backend, device):
    """(op, arguments) of every op in the dispatcher."""
    ops = torch.ops.dlgpu
    x, w, b, t = (
        inputs(5, 3, device=device),
        inputs(4, 3, device=device),
        inputs(4, device=device),
        targets(5, 3, device),
    )
    y, none = inputs(5, 4, device=device), torch.empty(0, device=device)
    weight = torch.rand(3, device=device)
    stats = torch.stack([x.amax(1), (x - x.amax(1, keepdim=True)).exp().sum(1)])
    leaves = [a.clone().requires_grad_() for a in (x, w, b)]
    v = inputs(2, 4, device=device)
    w12 = inputs(8, 3, device=device)
    seeds = torch.tensor([[5, 0]], device=device)
    return [
        (ops.linear, (x, w, b, "relu", 0.01, backend)),
        (ops.linear, (*leaves, None, 0.01, backend)),
        (ops.linear, (leaves[0][None], w, None, "gelu", 0.01, backend)),
        (ops.linear_fwd, (x, w, b, "silu", 0.01, True, backend)),
        (ops.linear_fwd, (x, w, None, None, 0.01, False, backend)),
        (ops.linear_backward, (y, x, w, y, "tanh", 0.01, [True, True, True], backend)),
        (ops.linear_backward, (y, None, w, None, None, 0.01, [True, False, False], backend)),
        (ops.mlp, (x, [w, v], [b, None], "relu", None, 0.01, None, 0.0, backend)),
        (
            ops.mlp,
            (leaves[0][None], [leaves[1], v], [leaves[2], None], "silu", "tanh", 0.01, None, 0.0, backend),
        ),
        (ops.mlp, (leaves[0], [leaves[1], v], [leaves[2], None], "tanh", None, 0.01, seeds, 0.3, backend)),
        (ops.mlp_fwd, (x, [w, v], [b, None], "gelu", "silu", 0.01, None, 0.0, 0, backend)),
        (ops.mlp_fwd, (x, [w, v], [None, None], "relu", None, 0.01, seeds, 0.3, 1, backend)),
        (
            ops.mlp_backward,
            (y[:, :2], [x, y], [w, v], [y, None], "silu", None, 0.01, seeds, 0.3, [True] * 5, backend),
        ),
        (
            ops.mlp_backward,
            (
                y[:, :2],
                [None, y],
                [w, v],
                [None, y[:, :2]],
                None,
                "tanh",
                0.01,
                None,
                0.0,
                [False, False, True, False, True],
                backend,
            ),
        ),
        (ops.gated_linear, (x, w12, None, v, None, "silu", 0.01, backend)),
        (ops.gated_linear, (leaves[0][None], w12, None, None, None, "relu", 0.01, backend)),
        (ops.gated_linear_fwd, (x, w12, None, v, None, "gelu", 0.01, True, backend)),
        (ops.gated_linear_fwd, (x, w12, None, None, None, None, 0.01, False, backend)),
        (
            ops.gated_linear_backward,
            (y[:, :2], x, w12, v, torch.cat([y, y], 1), "silu", 0.01, [True] * 5, backend),
        ),
        (
            ops.gated_linear_backward,
            (
                y,
                None,
                w12,
                None,
                torch.cat([y, y], 1),
                "relu",
                0.01,
                [True, False, True, False, False],
                backend,
            ),
        ),
        (ops.activation, (x, "relu", 0.01, backend)),
        (ops.activation, (leaves[0], "gelu", 0.01, backend)),
        (ops.activation_backward, (x, x, "silu", 0.01, backend)),
        (ops.cross_entropy, (x, t, None, "mean", -100, 0.0, backend)),
        (ops.cross_entropy, (leaves[0], t, weight, "none", 1, 0.1, backend)),
        (ops.cross_entropy_fwd, (x, t, None, "sum", -100, 0.0, backend)),
        (ops.cross_entropy_fwd, (x, t, weight, "none", -100, 0.1, backend)),
        (ops.cross_entropy_backward, (x.sum(), x, t, None, stats, stats[0, :1], "mean", -100, 0.0, backend)),
        (ops.cross_entropy_backward, (x[:, 0], x, t, weight, stats, none, "none", -100, 0.1, backend)),
        *softmax_family_samples(x, backend),
        *norm_samples(leaves[0], *(a[:3].clone().detach().requires_grad_() for a in (b, b)), backend),
        *linear_cross_entropy_samples(leaves, backend),
        *loss_samples(leaves[0], backend),
        *(
            (op, arguments)
            for target, kept in ((t, stats), (x.softmax(1), torch.cat([stats, stats[:1]])))
            for op, arguments in cross_entropy_extra_samples(leaves[0], target, weight, kept, backend)
        ),
    ]


def cross_entropy_extra_samples(leaf, target, weight, stats, backend):
    """The ops of cross-entropy with extras, on classes or on probabilities."""
    ops, x, probabilities = torch.ops.dlgpu, leaf.detach(), target.is_floating_point()
    tokens = x[:, 0].abs()
    options = (-100, 0.1, 0.01, 3.0, 0.5)
    target = target.requires_grad_() if probabilities else target
    yield (
        ops.cross_entropy_extra,
        (leaf, target, weight, tokens, "mean", *options, True, not probabilities, True, True, backend),
    )
    target = target.detach()
    plain = (0, 0.0, 0.0, 0.0, 1.0, False, False)
    yield ops.cross_entropy_extra, (x, target, None, None, "none", *plain, False, False, backend)
    yield (
        ops.cross_entropy_extra_fwd,
        (x, target, weight, tokens, "none", *options, True, not probabilities, backend),
    )
    needs = [True, probabilities]
    saved = (stats, stats[0, :1])
    yield (
        ops.cross_entropy_extra_backward,
        (x.sum(), x[:, 1], x, target, weight, tokens, *saved, "mean", *options, needs, backend),
    )
    yield (
        ops.cross_entropy_extra_backward,
        (x[:, 0], None, x, target, None, None, *saved, "none", *plain[:5], needs, backend),
    )


def test_every_op_has_a_sample():
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlgpu::")}
    assert {*op_names()} == known


def op_names():
    return [f"dlgpu::{op.__name__}" for op, _ in op_samples("fallback", "cpu")]


@pytest.mark.parametrize(
    ("backend", "sample"),
    [
        (backend, i)
        for backend in ("fallback", "triton", "torch")
        for i, name in enumerate(op_names())
        # Torch's own functions bring their own autograd: they need no ops of its parts.
        if backend != "torch" or torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")
    ],
)
def test_opcheck(backend, device, sample):
    op, args = op_samples(backend, device)[sample]
    extra = op is torch.ops.dlgpu.cross_entropy_extra and backend == "torch"
    if torch.__version__ < (2, 13) and extra and args[1].is_floating_point() and args[2] is not None:
        pytest.skip("torch's weighted cross_entropy of probabilities knew no symbolic sizes before 2.13")
    opcheck(op.default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_own_operations(device, dtype):
    """The third implementation of each op, for CUDA tensors that no kernel takes: float64, bfloat16 on old GPUs."""
    x, w, b = (inputs(*shape, device=device, dtype=dtype) for shape in ((2, 5, 3), (4, 3), (4,)))
    for name in (None, *ACTIVATIONS):
        assert_conforms(
            lambda x, w, b, name=name: torch.ops.dlgpu.linear(x, w, b, name, -0.5, "torch"),
            lambda x, w, b, name=name: lookup(name).eager(F.linear(x, w, b), -0.5),
            [x, w, b],
        )
    for name in ACTIVATIONS:
        assert_conforms(
            lambda x, name=name: torch.ops.dlgpu.activation(x, name, 0.3, "torch"),
            lambda x, name=name: lookup(name).eager(x, 0.3),
            [x],
        )
    for reduction in ("mean", "none"):
        assert_conforms(
            lambda x, t, r=reduction: torch.ops.dlgpu.cross_entropy(x, t, None, r, 1, 0.1, "torch"),
            lambda x, t, r=reduction: F.cross_entropy(x, t, reduction=r, ignore_index=1, label_smoothing=0.1),
            [x[0], targets(5, 3, device)],
        )


@pytest.fixture
def compiled():
    """torch.compile(fullgraph=True) that counts its graphs."""
    torch._dynamo.reset()
    counters = []

    def compile(function, **options):
        counters.append(CompileCounterWithBackend("aot_eager"))
        return torch.compile(function, fullgraph=True, backend=counters[-1], **options), counters[-1]

    yield compile
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "call"), some(CALLS, "linear gelu", "linear relu", "silu", "nn"), indirect=["backend"]
)
def test_compiled_equals_eager(backend, device, compiled, call):
    """Forward and backward in one graph, bit for bit."""
    function, shapes = CALLS[call]
    args = [inputs(*shape, device=device) for shape in shapes]
    fast, counter = compiled(function)
    assert_same_bits(run(fast, args, torch.ones_like), run(function, args, torch.ones_like))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_do_not_recompile(compiled, dynamic):
    """One graph for all batch sizes; without dynamic=True one more, when the second size comes."""

    def step(x, w, b, t):
        return functional.cross_entropy(functional.linear(x, w, b, activation="relu"), t, label_smoothing=0.1)

    fast, counter = compiled(step, dynamic=dynamic)
    w, b, first = inputs(5, 6), inputs(5), None
    for batch in (16, 7, 29, 12):
        args = [inputs(batch, 6), w, b, targets(batch, 5)]
        assert_same_bits(run(fast, args, torch.ones_like), run(step, args, torch.ones_like))
        # Dynamo itself may start over within the first call.
        first = counter.frame_count if batch == 16 else first
    assert counter.frame_count - first == (0 if dynamic else 1)


@pytest.mark.parametrize("outside", [False, True])
def test_a_compiled_call_follows_the_backend(device, compiled, launches, outside, monkeypatch):
    """Also where it was compiled outside any block, on a thread that had entered none."""
    monkeypatch.setattr(_dispatch, "_settings", _dispatch._Settings())
    function, _ = CALLS["relu"]
    fast, counter = compiled(function)
    x = inputs(5, 3, device=device)
    if outside:
        fast(x)
        launches.clear()
    for backend, expected in (("triton", 1), ("fallback", 1), ("triton", 2)):
        if backend == "triton" or device == "cpu":
            with dlgpu.use_backend(backend):
                fast(x)
            assert len(launches) == expected
    assert counter.frame_count <= 2 + outside


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor():
    """Its own code around the op: the sum and the product become C++."""
    torch._dynamo.reset()

    def function(x, w):
        return (functional.linear(x * 2, w, activation="gelu") + 1).sum()

    args = [inputs(5, 3), inputs(4, 3)]
    found = run(torch.compile(function, fullgraph=True), args, torch.ones_like)
    expected = run(function, args, torch.ones_like)
    truth = run(lambda x, w: (F.gelu(F.linear(x * 2, w)) + 1).sum(), args, torch.ones_like, torch.float64)
    for a, t, e in zip(found, truth, expected, strict=True):
        assert_accurate(a, t, e)
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_backward_uses_the_backend_of_forward(device, launches, where):
    """Also where another is chosen when it runs, which may be on a thread of autograd's own."""
    backends = ("triton", "fallback") if where == "forward" else ("fallback", "triton")
    x = inputs(5, 3, device=device if where == "forward" else "cpu").requires_grad_()
    w = inputs(3, 3, device=x.device)
    with dlgpu.use_backend(backends[0]):
        loss = functional.cross_entropy(functional.silu(functional.linear(x, w)), targets(5, 3, x.device))
    before = len(launches)
    assert (before > 0) == (where == "forward")
    with dlgpu.use_backend(backends[1]):
        loss.backward()
    assert (len(launches) > before) == (where == "forward")


def backend_of(tensor=None):
    return dlgpu.explain("relu", torch.ones(2) if tensor is None else tensor).backend


def test_use_backend_nests_and_is_restored_by_an_error(device):
    with dlgpu.use_backend("triton"):
        assert backend_of(torch.ones(2, device="meta")) == "triton"
        with contextlib.suppress(ZeroDivisionError), dlgpu.use_backend("fallback"):
            assert backend_of() == "fallback"
            with dlgpu.use_backend("auto"):
                assert backend_of() == "torch"
            raise ZeroDivisionError
        with pytest.raises(TypeError, match="float64"):
            backend_of(torch.ones(2, dtype=torch.float64, device=device))
    assert backend_of() == "fallback"


def test_use_backend_is_of_one_thread(device):
    if device == "cpu" and "triton" not in dlgpu.available_backends():
        pytest.skip("nothing to choose from")
    inside, outside, back = threading.Event(), threading.Event(), threading.Event()
    found = []

    def other():
        inside.wait(10)
        with dlgpu.use_backend("auto"):
            found.append(dlgpu.explain("relu", torch.ones(2)).reason)
            outside.set()
            back.wait(10)
            found.append(dlgpu.explain("relu", torch.ones(2)).reason)

    thread = threading.Thread(target=other)
    thread.start()
    with dlgpu.use_backend("fallback"):
        inside.set()
        outside.wait(10)
        assert "explicitly" in dlgpu.explain("relu", torch.ones(2)).reason
    back.set()
    thread.join()
    assert len(found) == 2
    assert not any("explicitly" in reason for reason in found)


def test_threads_may_launch_together(device):
    """Interpreted launches wait for one another: Triton's interpreter is not thread-safe."""
    x, w = inputs(33, 17, device=device), inputs(9, 17, device=device)

    def work(_):
        with dlgpu.use_backend("triton"):
            return run(lambda x, w: functional.linear(x, w, activation="relu"), [x, w], torch.ones_like)

    expected = work(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(8)):
            assert_same_bits(found, expected)


def python(code, **environment):
    """Runs code in a process of its own, with no GPU and kernels not interpreted."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DLGPU_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_backend_that_cannot_run_is_an_error():
    """It never falls back in silence; another choice still runs."""
    done = python(
        """
        import torch, dlgpu
        assert dlgpu.available_backends() == ("fallback",)
        x = torch.ones(2, 3)
        f = dlgpu.functional
        for call in (lambda: f.linear(x, x), lambda: f.relu(x), lambda: dlgpu.explain("relu", x)):
            try:
                call()
                raise SystemExit("ran")
            except RuntimeError as error:
                assert "triton" in str(error) and "TRITON_INTERPRET=1" in str(error), error
        for backend in ("fallback", "auto"):
            with dlgpu.use_backend(backend):
                assert dlgpu.functional.linear(x, x)[0, 0] == 3
        print("held")
        """,
        DLGPU_BACKEND="triton",
    )
    assert done.stdout == "held\n", done.stderr


def test_an_unknown_backend_in_the_environment():
    done = python("import dlgpu", DLGPU_BACKEND="cuda")
    assert done.returncode == 1
    expected = "ValueError: the environment variable DLGPU_BACKEND: got 'cuda', expected one of auto, triton, fallback"
    assert expected in done.stderr


# (function of tensors, the same in torch, shapes)
AUTOCAST = {
    "linear": (functional.linear, F.linear, [(5, 3), (4, 3), (4,)]),
    **{
        f"linear {name}": (
            lambda x, w, name=name: functional.linear(x, w, activation=name),
            lambda x, w, name=name: lookup(name).eager(F.linear(x, w), 0.01),
            [(5, 3), (4, 3)],
        )
        for name in ("relu", "gelu", "tanh")
    },
    "mlp of linear layers": (
        lambda x, w, v, b: functional.mlp(x, [w, v], [None, b], activation="relu"),
        lambda x, w, v, b: F.linear(F.relu(F.linear(x, w)), v, b),
        [(5, 3), (4, 3), (2, 4), (2,)],
    ),
    "gated_linear": (
        lambda x, w, v: functional.gated_linear(x, w, None, v),
        lambda x, w, v: F.linear(F.silu(F.linear(x, w[:8])) * F.linear(x, w[8:]), v),
        [(15, 7), (16, 7), (6, 8)],
    ),
    **{
        name: (getattr(functional, name), lambda x, name=name: lookup(name).eager(x, 0.01), [(5, 3)])
        for name in ACTIVATIONS
    },
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (8,), w, b),
        lambda x, w, b: F.layer_norm(x, (8,), w, b),
        [(5, 8), (8,), (8,)],
    ),
    "rms_norm": (lambda x: functional.rms_norm(x, (8,)), lambda x: F.rms_norm(x, (8,)), [(5, 8)]),
    "batch_norm": (
        lambda x, w, b: functional.batch_norm(x, None, None, w, b, True),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        [(15, 8), (8,), (8,)],
    ),
    **{
        f"cross_entropy {reduction}": (
            lambda x, r=reduction: functional.cross_entropy(x, targets(5, 3, x.device), reduction=r),
            lambda x, r=reduction: F.cross_entropy(x, targets(5, 3, x.device), reduction=r),
            [(5, 3)],
        )
        for reduction in ("mean", "none")
    },
}


@pytest.mark.parametrize(
    ("backend", "call"), some(AUTOCAST, "linear", "linear gelu", "cross_entropy none"), indirect=["backend"]
)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, to, call):
    """Results and gradients have torch's dtypes, in autocast, out of it, and where it is switched off inside; and they are
    as accurate as torch's."""
    ours, theirs, shapes = AUTOCAST[call]
    for dtype in (torch.float32, to):
        args = [inputs(*shape, device=device, dtype=dtype) for shape in shapes]
        for enabled in (True, False) if dtype == torch.float32 and to == torch.bfloat16 else (True,):
            # The rounding of a product's inputs is asked for.
            asked = [a.to(to) for a in args] if enabled and "linear" in call else args
            truth = run(theirs, asked, torch.ones_like, torch.float64)
            with torch.autocast(device, dtype=to), torch.autocast(device, enabled=enabled, dtype=to):
                found, expected = (run(function, args, torch.ones_like) for function in (ours, theirs))
            for a, t, e in zip(found, truth, expected, strict=True):
                assert_accurate(a, t, e)


def test_autocast_leaves_float64_alone():
    args = [inputs(5, 3, dtype=torch.float64), inputs(4, 3, dtype=torch.float64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (run(function, args, torch.ones_like) for function in (functional.linear, F.linear))
    assert [t.dtype for t in found] == [t.dtype for t in expected] == [torch.float64] * 3


LOSSES = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits"]
LOSSES += ["hinge_loss"]

# A call of each public function, by name.
EXPLAINED = {
    "linear": lambda f, d: f(
        inputs(5, 3, device=d), inputs(4, 3, device=d), inputs(4, device=d), activation="gelu"
    ),
    "cross_entropy": lambda f, d: f(inputs(5, 3, device=d), targets(5, 3, d)),
    "softmax": lambda f, d: f(inputs(5, 3, device=d), dim=-1),
    "log_softmax": lambda f, d: f(inputs(5, 3, device=d), dim=-1),
    "logsumexp": lambda f, d: f(inputs(5, 3, device=d), dim=-1),
    "linear_cross_entropy": lambda f, d: f(inputs(5, 3, device=d), inputs(4, 3, device=d), targets(5, 4, d)),
    "layer_norm": lambda f, d: f(inputs(5, 3, device=d), normalized_shape=(3,)),
    "rms_norm": lambda f, d: f(inputs(5, 9000, device=d), normalized_shape=(9000,)),
    "batch_norm": lambda f, d: f(
        inputs(600, 3, device=d), running_mean=None, running_var=None, training=True
    ),
    "dropout": lambda f, d: f(inputs(5, 3, device=d)),
    **{name: lambda f, d: f(inputs(50, 40, device=d), inputs(50, 40, device=d)) for name in LOSSES},
    "kl_div": lambda f, d: f(inputs(5, 3, device=d), inputs(5, 3, device=d), reduction="batchmean"),
    "multi_margin_loss": lambda f, d: f(inputs(600, 5, device=d), targets(600, 5, d)),
    **{name: lambda f, d: f(inputs(5, 3, device=d)) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("op", EXPLAINED)
def test_explain(backend, device, launches, op):
    launches.dry = True
    explanation = EXPLAINED[op](lambda *args, **kwargs: dlgpu.explain(op, *args, **kwargs), device)
    assert launches == []
    text = str(explanation)
    assert text.startswith(f"{op}: backend {backend}, because chosen explicitly")
    assert explanation.backend == backend
    assert len(text.splitlines()) == 1 + len(explanation.steps)
    # The steps are the launches of a forward and a backward pass, and their tiles the ones launched.
    run_it = EXPLAINED[op](lambda *args, **kwargs: (args, kwargs), device)
    args = [a.requires_grad_() if a.is_floating_point() else a for a in run_it[0]]
    result = getattr(functional, op)(*args, **run_it[1])
    result.backward(torch.ones_like(result))
    if backend == "triton":
        assert [name.split()[0] for name, _ in explanation.steps] == [name for name, *_ in launches]
        for (_, what), (*_, meta) in zip(explanation.steps, launches, strict=True):
            assert what
            assert "block_m=" not in what or f"block_m={meta['BLOCK_M']}, " in what


def test_explain_knows_every_public_function():
    for name in functional.__all__:
        with pytest.raises(TypeError, match="argument"):
            dlgpu.explain(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explain_on_meta_stands_for_a_gpu(dtype):
    x, w = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((8192, 4096), (14336, 4096)))
    explanation = dlgpu.explain("linear", x, w, activation="gelu")
    assert explanation.backend == "triton"
    assert "block_m" in str(explanation)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
def test_a_result_may_be_changed_in_place(backend, device, shape, activation):
    """As torch's: a result is no view, whatever its dimensions."""

    def ours(x, w):
        return functional.linear(x, w, activation=activation).add_(1).mul_(2)

    def theirs(x, w):
        return lookup(activation).eager(F.linear(x, w), 0.0).add_(1).mul_(2)

    assert_conforms(ours, theirs, [inputs(*shape, device=device), inputs(4, 3, device=device)])


def test_a_result_that_backward_needs_is_watched(backend, device):
    y = functional.linear(
        inputs(5, 3, device=device).requires_grad_(), inputs(3, 3, device=device), activation="relu"
    )
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Modules.
def test_linear_is_torch_linear():
    torch.manual_seed(5)
    theirs = torch.nn.Linear(7, 3)
    torch.manual_seed(5)
    ours = dlgpu.nn.Linear(7, 3, activation="gelu")
    assert isinstance(ours, torch.nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_bits(ours.state_dict().values(), theirs.state_dict().values())
    ours.load_state_dict(torch.nn.Linear(7, 3).state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_same_bits(theirs.parameters(), ours.parameters())
    assert "activation='gelu'" in repr(ours)
    assert dlgpu.nn.Linear(2, 3, False, dtype=torch.float64, device="meta").weight.dtype is torch.float64
    assert repr(dlgpu.nn.Linear(2, 3)) == repr(torch.nn.Linear(2, 3))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_modules_can_be_copied(how):
    def save(module):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    again = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "torch.save": save,
    }[how]
    x = inputs(5, 7)
    layer = dlgpu.nn.Linear(7, 3, activation="leaky_relu", negative_slope=-0.3)
    loss = dlgpu.nn.CrossEntropyLoss(torch.rand(3), ignore_index=2, label_smoothing=0.1, reduction="sum")
    other, other_loss = again(layer), again(loss)
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    assert_same_bits([other_loss(other(x), targets(5, 3))], [loss(layer(x), targets(5, 3))])
    assert (repr(other), repr(other_loss)) == (repr(layer), repr(loss))


def test_a_layer_without_bias_and_a_weighted_loss_follow_to_and_half(backend, device):
    layer = dlgpu.nn.Linear(7, 3, bias=False, activation="relu").to(device, torch.bfloat16)
    loss = dlgpu.nn.CrossEntropyLoss(torch.rand(3)).to(device, torch.bfloat16)
    y = layer(inputs(5, 7, device=device, dtype=torch.bfloat16))
    loss(y, targets(5, 3, device)).backward()
    assert y.dtype == layer.weight.grad.dtype == torch.bfloat16
    assert loss.state_dict().keys() == torch.nn.CrossEntropyLoss(torch.rand(3)).state_dict().keys()


# What a launch compiles.
def specialization(name, kernel, args, meta):
    """What Triton keys a compiled kernel on: types, constexprs, and which integers and pointers 16 divides."""
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **meta}
    key = [name]
    for param in kernel.params:
        value = given.pop(param.name)
        if not param.is_constexpr:
            flags = param.is_const, not param.do_not_specialize, not param.do_not_specialize_on_alignment
            value = native_specialize_impl(BaseBackend, value, *flags)
        key.append((param.name, getattr(value, "__name__", value)))
    # What is left are options: warps, stages, FP fusion.
    return repr((key, sorted(given.items())))


# One feature: its matrices' strides of 1 say nothing about which side is the batch.
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((64, 48, 10), torch.float32),
        ((64, 48, 16), torch.bfloat16),
        ((1, 19, 16), torch.float32),
        ((64, 19, 1), torch.float32),
    ],
)
def test_a_partial_last_batch_compiles_nothing_new(device, launches, sizes, dtype):
    """64 is divisible by 16 and 29 is not; 1 is what Triton turns into a constant. Up to 64 rows are one bucket of tiles."""
    first, second = (
        dlgpu.nn.Linear(*sizes[i : i + 2], activation=name, device=device, dtype=dtype)
        for i, name in enumerate(("gelu", None))
    )
    loss = dlgpu.nn.CrossEntropyLoss(torch.rand(sizes[-1], device=device, dtype=dtype), label_smoothing=0.1)

    def step(batch):
        launches.clear()
        x = inputs(batch, sizes[0], device=device, dtype=dtype).requires_grad_()
        loss(second(functional.silu(first(x))), targets(batch, sizes[-1], device)).backward()
        return {specialization(*launch) for launch in launches}

    launches.dry = True
    with dlgpu.use_backend("triton"):
        known = step(64)
        assert len(known) > 10
        for batch in (29, 1, 48):
            assert sorted(step(batch) - known) == []


def test_a_partial_last_batch_of_losses_compiles_nothing_new(device, launches):
    """One program sums it, and then launches no sum over programs; a vector of weights is as long as a batch of one."""
    q = torch.rand(40, device=device)

    def step(batch):
        launches.clear()
        x, t = (inputs(batch, 40, device=device) for _ in range(2))
        x.requires_grad_()
        loss = functional.binary_cross_entropy_with_logits(x, t, pos_weight=q) + functional.mse_loss(x, t)
        (loss + functional.multi_margin_loss(x, targets(batch, 40, device), weight=q)).backward()
        return {specialization(*launch) for launch in launches}

    launches.dry = True
    with dlgpu.use_backend("triton"):
        known = step(64)
        assert len(known) == 7
        for batch in (29, 1, 128):
            assert sorted(step(batch) - known) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_compile_nothing_new_for_a_partial_batch(device, launches, dtype):
    layers = torch.nn.Sequential(
        dlgpu.nn.BatchNorm1d(48, activation="relu"),
        dlgpu.nn.LayerNorm(48),
        dlgpu.nn.Dropout(),
        dlgpu.nn.RMSNorm(48),
    ).to(device, dtype)

    def step(batch, training):
        launches.clear()
        x = inputs(batch, 48, device=device, dtype=dtype).requires_grad_()
        y = layers.train(training)(x)
        y.backward(torch.ones_like(y))
        return {specialization(*launch) for launch in launches}

    launches.dry = True
    with dlgpu.use_backend("triton"):
        for training, many in ((True, 64), (True, 1024), (False, 64)):
            known = step(many, training)
            assert len(known) >= 9 - (many == 64)
            for batch in (many - 35, 2 if many == 64 else 515, many * 2 + 385 * (many == 1024)):
                assert sorted(step(batch, training) - known) == []
