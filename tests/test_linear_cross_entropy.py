"""Linear + softmax cross-entropy against torch, forward and backward, on every backend; what it stores, and its byte laws."""

import functools
import itertools
import math
import tracemalloc
import weakref

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dlgpu.functional
from dlgpu.bench.launches import dry_run
from dlgpu.fallback import linear_cross_entropy as arrays
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import linear_cross_entropy as kernels
from dlgpu.kernels._triton import triton
from dlgpu.ops import linear_cross_entropy as ops
from test_dispatch import specialization
from tolerance import DTYPES, LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

# Torch's module data has loaded a profile of its own.
hypothesis.settings.load_profile("dlgpu")

pytestmark = pytest.mark.usefixtures("poisoned")

INF, NAN = float("inf"), float("nan")
ours = dlgpu.functional.linear_cross_entropy
# Nothing kept for backward; everything, by default.
FORMS = {"lean": {"memory_budget": 0}, "fast": {}}
forms = pytest.mark.parametrize("form", FORMS)
cdiv = triton.cdiv


def reference(
    x,
    w,
    target,
    linear_bias=None,
    weight=None,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    token_weights=None,
    ignore_index=-100,
):
    """The definition, by torch's own operations."""
    z = F.linear(x, w, linear_bias)
    if logit_scale != 1:
        z = z * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    options = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    if not z_loss and token_weights is None:
        return F.cross_entropy(z, target, reduction=reduction, **options)
    loss = F.cross_entropy(z, target, reduction="none", **options)
    live = (target != ignore_index).to(loss.dtype)
    loss = loss + live * z_loss * z.logsumexp(1).square()
    share = live if weight is None else live * weight[torch.where(target == ignore_index, 0, target)]
    if token_weights is not None:
        loss, share = loss * token_weights, share * token_weights
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / share.sum()


def sample(N, H, V, dtype=torch.float32, device="cpu"):
    x, w, b = (torch.randn(shape, dtype=dtype, device=device) for shape in ((N, H), (V, H), (V,)))
    return x, w, b, torch.randint(V, (N,), device=device)


def check(
    x, w, b, target, upstream=None, weight=None, token_weights=None, form="fast", budget=None, **options
):
    """Held to torch's; gives [loss, dx, dw, db]."""
    own = FORMS[form] if budget is None else {"memory_budget": budget}

    def call(function, **more):
        return lambda x, w, b, t, weight, u: function(
            x, w, t, linear_bias=b, weight=weight, token_weights=u, **options, **more
        )

    both = call(ours, **own), call(reference)
    return assert_conforms(*both, (x, w, b, target, weight, token_weights), upstream, frozen=[4, 5])


WIDE_TILE = configs.HeadTile(16, 512, 64, 1, 4, 2, "for the interpreter")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of the vocabulary in backward, several tiles a program forward."""
    monkeypatch.setattr(kernels.configs, "linear_cross_entropy_chunk", lambda N, V, dtype: min(64, V))
    monkeypatch.setattr(kernels.configs, "linear_cross_entropy_split", lambda m, n: 2)
    monkeypatch.setattr(arrays, "_CHUNK", 200)
    monkeypatch.setattr(arrays, "_FEWEST_COLUMNS", 24)


# 64 and 128 are whole tiles; 130 rows and 300 classes are several, and not whole.
SIZES = [
    (1, 1, 1),
    (5, 3, 2),
    (37, 17, 10),
    (64, 32, 128),
    (130, 48, 300),
    (3, 40, 1000),
    (0, 4, 5),
    (6, 0, 7),
]


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "form"),
    [
        (backend, dtype, size, form)
        for backend, dtype in PAIRS
        for size in SIZES
        for form in FORMS
        # A launch takes about 10 ms interpreted: 16 bits differ in the tile, and fast in what is kept.
        if (backend == "fallback" or dtype == torch.float32 or size in ((37, 17, 10), (130, 48, 300)))
        and (form == "lean" or size in ((37, 17, 10), (130, 48, 300), (0, 4, 5)))
    ],
    indirect=["backend"],
)
def test_sizes(backend, device, dtype, size, form):
    check(*sample(*size, dtype, device), form=form)


OPTIONS = {
    "weight": {"weighted": True},
    "ignored": {"ignored": [0, 3]},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing 1": {"label_smoothing": 1.0},
    "weight, smoothing": {"weighted": True, "label_smoothing": 0.3},
    "a class ignored": {"weighted": True, "ignored": [4], "ignore_index": 2, "label_smoothing": 0.2},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": 0.3},
    "token weights": {"token_weighted": True, "ignored": [5]},
    "all": {
        "weighted": True,
        "ignored": [1, 2],
        "label_smoothing": 0.3,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "logit_scale": 0.7,
        "token_weighted": True,
    },
}


REDUCTIONS = [("mean", "lean"), ("none", "fast"), ("sum", "lean")]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("backend", "dtype", "options", "reduction", "form"),
    [
        (backend, dtype, options, *REDUCTIONS[(i + j) % 3])
        for backend, dtype in PAIRS
        for i, options in enumerate(OPTIONS)
        for j in range(3)
        # 16 bits differ in how they are loaded and stored: one case that needs all of a kernel's code.
        if (dtype in (torch.float32, torch.float64) or options == "all")
        and (backend == "fallback" or j == 0 or options == "all")
    ],
    indirect=["backend"],
)
def test_options(backend, device, dtype, reduction, form, options):
    """In several chunks."""
    options = dict(OPTIONS[options])
    x, w, b, target = sample(35, 12, 150, dtype, device)
    weight = torch.rand(150, dtype=dtype, device=device) + 0.1 if options.pop("weighted", False) else None
    u = torch.rand(35, dtype=dtype, device=device) + 0.1 if options.pop("token_weighted", False) else None
    for row in options.pop("ignored", []):
        target[row] = options.get("ignore_index", -100)
    check(x, w, b, target, None, weight, u, form, reduction=reduction, **options)


@pytest.mark.parametrize(
    ("backend", "dtype", "kept"),
    [
        (backend, dtype, kept)
        for backend, dtype in PAIRS
        for kept in (0, 1024, 2048, 2100)
        if dtype == torch.float32 or kept == 1024
    ],
    indirect=["backend"],
)
def test_a_budget_for_a_part(backend, device, dtype, kept):
    """Some columns kept, some computed again: the same loss and gradients."""
    size = dtype.itemsize if backend == "triton" else max(dtype.itemsize, 4)
    found = ops._kept_columns(torch.empty(3, 4, dtype=dtype), 2100, 3 * size * kept + 1, backend)
    assert found == kept
    # Larger logits overflow torch's sum for label smoothing in float16.
    x, w, b, target = sample(3, 16, 2100, dtype, device)
    check(x / 2, w, b, target, budget=3 * size * kept + 1, label_smoothing=0.1)


def test_the_default_budget():
    """All logits of the largest usual case at 16 bits; whole blocks of columns of what does not fit."""
    for dtype, expected in ((torch.bfloat16, 128256), (torch.float32, 65536 - 1024)):
        x = torch.empty(8193, 16, dtype=dtype, device="meta")[:8192]
        budget = ops.DEFAULT_MEMORY_BUDGET - (dtype is torch.float32)
        assert ops._kept_columns(x, 128256, budget, "triton") == expected
    assert ops._kept_columns(x, 128256, 0, "triton") == 0


@pytest.mark.parametrize("options", ["ignored", "weight, smoothing", "all"])
def test_torchs_own_operations(device, options):
    """The third implementation, for CUDA tensors that no kernel takes: float64, bfloat16 on old GPUs."""
    options = dict(OPTIONS[options])
    x, w, b, target = sample(9, 5, 21, torch.float64, device)
    target[options.pop("ignored", [1])] = -100
    weight = torch.rand(21, dtype=x.dtype, device=device) if options.pop("weighted", False) else None
    u = torch.rand(9, dtype=x.dtype, device=device) if options.pop("token_weighted", False) else None
    knobs = [options.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap")]

    def call(x, w, b, t, weight, u):
        return torch.ops.dlgpu.linear_cross_entropy(
            x, w, t, b, weight, u, "mean", -100, *knobs, options.get("logit_scale", 1.0), False, 0, "torch"
        )[0]

    def theirs(x, w, b, t, weight, u):
        return reference(x, w, t, b, weight, token_weights=u, **options)

    assert_conforms(call, theirs, (x, w, b, target, weight, u), frozen=[4, 5])


UPSTREAM = {
    "stride 0": lambda loss: torch.full((), 0.7, device=loss.device).expand(loss.shape),
    "sliced": lambda loss: torch.randn(2 * loss.numel(), device=loss.device)[::2].view(loss.shape),
}


@pytest.mark.parametrize(
    ("layout", "upstream"), [*((layout, "sliced") for layout in LAYOUTS), ("contiguous", "stride 0")]
)
def test_layouts(backend, device, layout, upstream):
    x, w, b, target = sample(9, 20, 21, device=device)
    # A strided bias, target and weight too.
    b = torch.stack([b, b], 1)[:, 0]
    target = torch.stack([target, target], 1)[:, 0]
    weight = torch.rand(42, device=device)[::2]
    # With all of both alike the gradient of x would be 0, which no tolerance relative to it admits.
    w = w if layout == "stride 0 both ways" else LAYOUTS[layout](w)
    check(LAYOUTS[layout](x), w, b, target, UPSTREAM[upstream], weight, reduction="none")


@hypothesis.given(
    st.integers(0, 70),
    st.integers(0, 40),
    st.integers(1, 150),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.sampled_from(list(FORMS)),
)
def test_any_shape_layout_and_option(backend, device, N, H, V, layout, reduction, smoothing, weighted, form):
    torch.manual_seed(0)
    x, w, b, target = sample(N, H, V, device=device)
    target[::3] = -100
    weight = torch.rand(V, device=device) if weighted else None
    view = LAYOUTS[layout] if N and H else LAYOUTS["contiguous"]
    options = {"reduction": reduction, "label_smoothing": smoothing}
    check(view(x), w, b, target, weight=weight, form=form, **options)


@forms
def test_one_row_without_a_batch(backend, device, form):
    x, w, b, target = sample(1, 5, 7, device=device)
    for reduction in ("mean", "none"):
        check(x[0], w, b, target[0], form=form, reduction=reduction)


@pytest.mark.parametrize(
    ("reduction", "smoothing"), [("mean", 0.0), ("mean", 0.1), ("sum", 0.0), ("none", 0.1)]
)
def test_all_rows_ignored(backend, device, reduction, smoothing):
    x, w, b, _ = sample(5, 3, 7, device=device)
    target = torch.full((5,), -100, device=device)
    loss, *gradients = check(x, w, b, target, reduction=reduction, label_smoothing=smoothing)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((g.isnan() | (g == 0)).all() for g in gradients)


@pytest.mark.parametrize(
    ("form", "options"), [("lean", {"label_smoothing": 0.1}), ("fast", {"z_loss": 0.1, "softcap": 3.0})]
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_ignored_row_counts_nowhere(backend, device, value, form, options):
    """Whatever its logits are: loss exactly 0, its gradients exactly 0, and the other rows as without it."""
    x, w, b, target = sample(6, 5, 70, device=device)
    target[2] = -100
    # An infinite row makes NaN of dW, by 0 times infinity, in torch too: so W is frozen.
    bad = x.clone()
    bad[2] = value
    call = functools.partial(ours, reduction="none", **options, **FORMS[form])
    keep = torch.arange(6, device=device) != 2
    found, expected = (
        run(lambda x, w, b, t: call(x, w, t, linear_bias=b), [x, w, b, target], torch.ones_like, frozen=[1])
        for x in (bad, x)
    )
    assert found[0][2] == 0
    assert (found[1][2] == 0).all()
    assert_same_bits([found[0][keep], found[1][keep]], [expected[0][keep], expected[1][keep]])
    assert_same_bits(found[2:], expected[2:])


@forms
@pytest.mark.parametrize("value", [NAN, INF])
def test_the_token_weight_of_an_ignored_row_counts_nowhere(backend, device, value, form):
    """Nor in second derivatives, and where torch's own operations stand in for the kernels."""
    x, w, b, target = sample(5, 3, 70, device=device)
    u = torch.rand(5, device=device)
    target[2], u[2] = -100, value
    zero = torch.where(target == -100, 0.0, u)

    def call(x, w, b, u, **options):
        return ours(x, w, target, linear_bias=b, token_weights=u, z_loss=0.1, **FORMS[form], **options)

    found, expected = (
        run(lambda x, w, b, u=u: call(x, w, b, u), [x, w, b], torch.ones_like) for u in (u, zero)
    )
    assert_same_bits(found, expected)
    assert found[0].isfinite()
    assert (found[1][2] == 0).all()
    (second,) = torch.autograd.grad(call(x.requires_grad_(), w, b, u), x, create_graph=True)
    assert second.isfinite().all()
    eager = [
        torch.ops.dlgpu.linear_cross_entropy(
            x, w, target, b, None, u, "mean", -100, 0.0, 0.1, 0.0, 1.0, False, 0, "torch"
        )[0]
        for u in (u, zero)
    ]
    assert_same_bits(eager[:1], eager[1:])


# The interpreter's maximum of nothing but NaN warns.
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(("form", "smoothing"), [("lean", 0.0), ("fast", 0.1)])
@pytest.mark.parametrize("case", ["-inf", "target -inf", "+inf", "target +inf", "NaN", "all NaN", "all -inf"])
def test_nan_and_infinity(backend, device, case, form, smoothing):
    """Logits of the bias: those of the second tile are infinite or NaN."""
    x, w, b, target = sample(4, 3, 150, device=device)
    target[:] = torch.tensor([7, 70, 149, 30])
    b = {
        "-inf": torch.where((torch.arange(150) >= 64) & (torch.arange(150) < 70), -INF, b.cpu()),
        "target -inf": torch.where(torch.arange(150) == 70, -INF, b.cpu()),
        "+inf": torch.where(torch.arange(150) == 66, INF, b.cpu()),
        "target +inf": torch.where(torch.arange(150) == 70, INF, b.cpu()),
        "NaN": torch.where(torch.arange(150) == 71, NAN, b.cpu()),
        "all NaN": torch.full((150,), NAN),
        "all -inf": torch.full((150,), -INF),
    }[case].to(device)
    check(x, w, b, target, reduction="none", form=form, label_smoothing=smoothing)


def test_leading_tiles_of_minus_infinity(backend, device):
    x, w, b, target = sample(4, 3, 300, device=device)
    b[:260] = -INF
    target += 0 - target + torch.tensor([261, 270, 299, 280], device=device)
    for form in FORMS:
        loss, *_ = check(x, w, b, target, reduction="none", form=form)
        assert loss.isfinite().all()


@pytest.mark.parametrize(("form", "margin"), [("lean", 8.0), ("fast", 8.0), ("lean", 200.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_predictions(backend, device, margin, dtype, form):
    """p > 0.999: loss and gradient are small differences of numbers near 1."""
    # Enough rows that torch's error is no stroke of luck.
    x, w, b, target = sample(60, 10, 10, device=device)
    x = x / 20 + F.one_hot(target, 10)
    w = w / 20 + margin * torch.eye(10, device=device)
    x, w, b = (t.to(dtype) for t in (x, w, b / 20))
    loss, *_ = check(x, w, b, target, reduction="none", label_smoothing=0.0, form=form)
    assert (loss >= 0).all()
    if dtype == torch.float32:
        check(x, w, b, target, reduction="none", label_smoothing=0.05, form=form)


CLASSES = [1, 2, 3, 127, 128, 1000, 32000, 50257, 128256, 262144]


@pytest.mark.parametrize(
    ("backend", "dtype", "classes", "confident"),
    [
        (backend, dtype, classes, confident)
        for backend, dtype in PAIRS[1:]
        for classes in CLASSES
        for confident in (False, True)
        # Of many classes one case is interpreted, for a second or two.
        if backend == "fallback"
        or classes <= 1000
        or (classes, dtype, confident) == (32000, torch.float32, True)
    ],
    indirect=["backend"],
)
def test_errors_at_class_counts(backend, device, dtype, classes, confident, monkeypatch):
    """At most twice torch's own, where p > 0.999 too. In wide tiles, for the interpreter's sake."""
    monkeypatch.setattr(configs, "linear_cross_entropy_tile", lambda *_: WIDE_TILE)
    monkeypatch.setattr(configs, "linear_cross_entropy_chunk", lambda N, V, dtype: min(1 << 15, V))
    N, H = 12, 16
    x, w, b, target = sample(N, H, classes, dtype, device)
    x = x / 2
    target = torch.randperm(max(classes, N), device=device)[:N] % classes
    if confident:
        # Each row has a feature of its own, which its class looks for.
        sure = torch.eye(N, H, dtype=dtype, device=device)
        x, w, b = x / 16 + sure, w / 4, b / 4
        w.index_add_(0, target, 22 * sure)
        p = F.linear(*(t.double() for t in (x, w, b))).softmax(1)
        assert classes < N or (p.gather(1, target[:, None]) > 0.999).all()
    both = [
        lambda x, w, b, t, f=f, more=more: f(x, w, t, linear_bias=b, reduction="none", **more)
        for f, more in ((ours, FORMS["lean"]), (reference, {}))
    ]
    # dW of many classes is a linear layer's, and takes the interpreter seconds; db has dZ's error.
    assert_conforms(*both, (x, w, b, target), frozen=[1] if classes > 1000 else ())


def test_many_splits(backend, device):
    """A class that has it all, and 60 splits of which each adds 0.7 roundings to its 1: none is lost."""
    V, share = 60 * 64, 0.7 * 2**-24
    x, w, b, target = sample(1, 1, V, device=device)
    x[:], w[:], b[:], target[:] = 1.0, 0.0, math.log(share / 64), 70
    b[70] = 0.0
    loss = ours(x, w, target, linear_bias=b)
    assert loss.item() == pytest.approx(60 * share, rel=0.1)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(backend, device, offset):
    x, w, b, target = sample(7, 8, 40, device=device)
    check(x, w, b + offset, target, reduction="none", form="fast")
    check(x, w, b + offset, target, label_smoothing=0.1, form="lean")


def lse_and_loss(x, w, b, target, **options):
    """Both in one vector, so that both have upstream gradients."""
    result = ours(x, w, target, linear_bias=b, reduction="none", return_lse=True, **options)
    assert result.accuracy is None
    return torch.cat([result.loss, result.lse])


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lse(backend, device, dtype, form):
    """Differentiable; 0 at ignored rows."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no kernels for float64")
    x, w, b, target = sample(9, 6, 70, dtype, device)
    target[3] = -100

    def theirs(x, w, b, t):
        z = F.linear(x, w, b)
        return torch.cat([F.cross_entropy(z, t, reduction="none"), z.logsumexp(1) * (t != -100)])

    assert_conforms(functools.partial(lse_and_loss, **FORMS[form]), theirs, (x, w, b, target))
    # lse alone.
    leaf = x.clone().requires_grad_()
    _, lse, _ = ours(leaf, w, target, return_lse=True, **FORMS[form])
    (found,) = torch.autograd.grad(lse.sum(), leaf)
    torch.testing.assert_close(found, torch.softmax(x @ w.T, 1) @ w * (target != -100)[:, None])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@forms
def test_accuracy(backend, device, form, reduction):
    """The share of the counted rows whose target has the largest logit, or which they are; ties count."""
    x, w, _, target = sample(50, 6, 150, device=device)
    w[140] = w[3]
    target[::2] = (x @ w.T).argmax(1)[::2]
    target[:7] = -100
    x[8], x[9], target[8], target[9] = w[3] * 10, w[3] * 10, 140, 3
    z = x @ w.T
    assert z[8].argmax() == 3
    for t in (target, torch.full_like(target, -100)):
        live = t != -100
        right = live & (z.gather(1, t.clamp(0)[:, None])[:, 0] == z.amax(1))
        call = functools.partial(ours, x.requires_grad_(), w, t, reduction=reduction, **FORMS[form])
        loss, lse, accuracy = call(return_accuracy=True)
        assert lse is None
        assert not accuracy.requires_grad
        expected = right.float() if reduction == "none" else right.sum() / live.sum()
        torch.testing.assert_close(accuracy, expected, equal_nan=True, rtol=1e-6, atol=0)
        assert_same_bits([loss], [call()])
        x = x.detach()
    assert 0 < (target != -100).sum() < 50


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch's own came with 2.13")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("reduction", "dtype"),
    [*(("mean", dtype) for dtype in DTYPES), ("sum", torch.float32), ("none", torch.float32)],
)
def test_torchs_own(backend, device, dtype, reduction, chunked):
    """torch's function, whole and in chunks of the batch; ours takes its options too."""
    x, w, b, target = sample(33, 12, 70, dtype, device)
    target[4] = -100
    weight = torch.rand(70, dtype=dtype, device=device)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8) if chunked else None

    def call(function):
        return lambda x, w, b, t, weight: function(
            x, w, t, linear_bias=b, weight=weight, reduction=reduction, options=options
        )

    upstream = torch.ones_like if dtype == torch.float16 else None
    assert_conforms(call(ours), call(F.linear_cross_entropy), (x, w, b, target, weight), upstream, frozen=[4])


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_a_loss_of_more_dimensions(backend, device, shape):
    """Through linear and cross_entropy, as torch."""
    x, w, b = (torch.randn(s, device=device) for s in ((4, 5), (6, *shape, 5), (6, *shape)))
    target = torch.randint(6, (4, *shape), device=device)
    for reduction in ("mean", "none"):
        check_by = [
            lambda x, w, b, t, f=f, r=reduction: f(x, w, t, linear_bias=b, reduction=r)
            for f in (ours, more_dimensions)
        ]
        assert_conforms(*check_by, (x, w, b, target))


def more_dimensions(x, w, t, linear_bias, reduction):
    logits = F.linear(x, w.reshape(-1, w.shape[-1]), linear_bias.reshape(-1))
    return F.cross_entropy(logits.view(-1, *w.shape[:-1]), t, reduction=reduction)


FROZEN = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]


@pytest.mark.parametrize(
    ("needs", "form"), [*((needs, "lean") for needs in FROZEN), (FROZEN[0], "fast"), (FROZEN[-1], "fast")]
)
def test_frozen_operands(backend, device, needs, form, launches):
    """The same gradients, bit for bit; nothing is launched for those that are not wanted."""
    x, w, b, target = sample(70, 16, 90, device=device)

    def gradients(needs):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
        loss = ours(leaves[0], leaves[1], target, linear_bias=leaves[2], **FORMS[form])
        return torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])

    expected = [g for g, need in zip(gradients([True] * 3), needs, strict=True) if need]
    launches.clear()
    assert_same_bits(gradients(needs), expected)
    if backend == "triton":
        names = [name.removeprefix("_linear_cross_entropy_").removesuffix("_kernel") for name, *_ in launches]
        keep = ["_linear"] if form == "fast" else []
        assert names == [*keep, "fwd", "rows", "reduce", "scales", "dz", *["_linear"] * sum(needs[:2])]
        _, dz, given, _ = launches[names.index("dz")]
        arguments = dict(zip(dz.arg_names, given, strict=False))
        assert (arguments["dz_ptr"] is None) == (not any(needs[:2]))
        assert (arguments["partial_ptr"] is None) == (not needs[2])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(backend, device, context, launches):
    """One product, no logits kept, whatever the budget."""
    x, w, b, target = sample(9, 5, 21, device=device)
    w.requires_grad_()
    with context():
        loss = ours(x, w, target, linear_bias=b)
    assert not loss.requires_grad
    assert not ours(x, w.detach(), target, linear_bias=b).requires_grad
    if backend == "triton":
        assert [name for name, *_ in launches] == [
            f"_linear_cross_entropy_{name}_kernel" for name in ("fwd", "rows", "reduce")
        ] * 2
    assert_same_bits([loss], [ours(x, w, target, linear_bias=b, memory_budget=0)])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("reduction", "form"), REDUCTIONS[:2])
def test_two_backward_passes(backend, device, reduction, form):
    """With different upstream gradients; each as from a forward pass of its own, bit for bit."""
    x, w, b, target = sample(40, 12, 90, device=device)
    call = functools.partial(ours, reduction=reduction, **FORMS[form])
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    loss = call(leaves[0], leaves[1], target, linear_bias=leaves[2])
    first, second = torch.randn_like(loss), torch.randn_like(loss)
    for dloss in (first, second):
        found = torch.autograd.grad(loss, leaves, dloss, retain_graph=True)
        again = run(
            lambda x, w, b, t: call(x, w, t, linear_bias=b), [x, w, b, target], lambda y, dloss=dloss: dloss
        )
        assert_same_bits([loss, *found], again)


def test_an_input_changed_in_place_is_noticed(backend, device):
    x, w, _, target = sample(5, 3, 7, device=device)
    loss = ours(x, w.requires_grad_(), target)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ["ignored", "weight, smoothing", "all"])
@forms
def test_gradcheck(reduction, options, form, small_chunks):
    options = dict(OPTIONS[options])
    x, w, b, target = sample(4, 3, 30, torch.float64)
    target[1] = options.get("ignore_index", -100)
    options.pop("ignored", None)
    if options.pop("weighted", False):
        options["weight"] = torch.rand(30, dtype=torch.float64)
    if options.pop("token_weighted", False):
        options["token_weights"] = torch.rand(4, dtype=torch.float64)

    options |= {"reduction": reduction, "return_lse": True, **FORMS[form]}

    def call(x, w, b):
        return ours(x, w, target, linear_bias=b, **options)[:2]

    leaves = [t.requires_grad_() for t in (x / 2, w / 2, b)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    with dlgpu.use_backend("fallback"):
        assert torch.autograd.gradcheck(call, leaves)
        if form == "lean":
            # Random projections: 121 numbers' second derivatives one by one take seconds.
            assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(backend, device, reduction):
    x, w, b, target = sample(5, 4, 7, device=device)
    target[2] = -100
    dloss = torch.randn(() if reduction == "mean" else 5, device=device)

    def second(function, dtype):
        *leaves, upstream = (t.detach().to(dtype).requires_grad_() for t in (x, w, b, dloss))
        loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction, z_loss=0.1)
        first = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (*leaves, upstream))

    found = second(ours, torch.float32)
    expected, truth = (second(reference, dtype) for dtype in (torch.float32, torch.float64))
    for a, t, e in zip(found, truth, expected, strict=True):
        assert_accurate(a, t, e)


@pytest.mark.parametrize(("H", "V", "dtype"), [(48, 70, torch.float32), (64, 256, torch.bfloat16)])
@forms
def test_another_batch_size_compiles_nothing_new(device, launches, H, V, dtype, form):
    launches.dry = True

    def step(N):
        launches.clear()
        x, w, b, target = sample(N, H, V, dtype, device)
        for reduction in ("mean", "none"):
            loss = ours(
                x.requires_grad_(),
                w.requires_grad_(),
                target,
                linear_bias=b,
                reduction=reduction,
                **FORMS[form],
            )
            loss.backward(torch.ones_like(loss))
        return {specialization(*launch) for launch in launches}

    with dlgpu.use_backend("triton"):
        known = step(64)
        assert len(known) > 6
        # Within a bucket of batch sizes: the linear layer's tiles go by those.
        for N in (29, 1, 50):
            assert sorted(step(N) - known) == []


def test_classes_in_bytes(backend, device):
    x, w, b, target = sample(5, 3, 7, device=device)
    check(x, w, b, target.byte())


@pytest.mark.usefixtures("debug_on_gpu")
@pytest.mark.parametrize("target", [-1, 7, 2**40])
def test_a_target_out_of_range(backend, device, target):
    x, w, _, targets = sample(5, 3, 7, device=device)
    targets[3] = target
    with pytest.raises(IndexError, match=rf"target {target} of row 3 .* 7 classes"):
        ours(x, w, targets)


@pytest.mark.parametrize(("form", "smoothing"), [("lean", 0.1), ("fast", 0.0)])
def test_a_target_out_of_range_in_the_launcher(device, form, smoothing):
    """What a GPU does, where the check would synchronize: NaN in that row alone, and nothing read or written astray."""
    x, w, b, target = sample(6, 5, 37, device=device)
    weight = torch.rand(37, device=device)
    good, bad = torch.tensor([0, 2, 5], device=device), torch.tensor([1, 3, 4], device=device)
    options = ("none", -100, smoothing, 0.0, 0.0, 1.0)

    def launch(target):
        loss, _, _, stats, denominator, kept = kernels.linear_cross_entropy_fwd(
            x, w, target, b, weight, None, *options, False, 37 * (form == "fast")
        )
        dx, *_ = kernels.linear_cross_entropy_bwd(
            torch.ones_like(loss),
            None,
            x,
            w,
            target,
            b,
            weight,
            None,
            stats,
            denominator,
            kept,
            *options,
            [True] * 3,
        )
        return loss, dx

    expected = launch(target)
    target[bad] = torch.tensor([37, -1, 2**40], device=device)
    if _triton.INTERPRETED:
        from dlgpu.bench.meter import TrafficMeter

        with TrafficMeter() as meter:
            found = launch(target)
        assert all(launch.clean for launch in meter.launches)
    else:
        found = launch(target)
    for a, e in zip(found, expected, strict=True):
        assert a[bad].isnan().all()
        assert_same_bits([a[good]], [e[good]])


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast(backend, device, to):
    """The layer in 16 bits, the loss in float32; so are class weights."""
    x, w, b, target = sample(9, 5, 21, device=device)
    weight = torch.rand(21, device=device)

    def gradients(function, dtype=None):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], weight=weight.to(dtype))
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    with torch.autocast(device, dtype=to):
        found, expected = gradients(ours), gradients(reference)
    # The rounding of the product's inputs is asked for.
    x, w, b = (t.to(to) for t in (x, w, b))
    for a, t, e in zip(found, gradients(reference, torch.float64), expected, strict=True):
        assert_accurate(a, t, e)


# What is stored.
class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations return, and of the largest."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            # Views are no new memory; what is not filled (under `poisoned`) is counted where it is allocated.
            if isinstance(t, torch.Tensor) and not t._is_view() and "fill" not in str(function):
                self.total += t.numel() * t.element_size()
                self.largest = max(self.largest, t.numel() * t.element_size())
        return result


@pytest.mark.parametrize("training", [False, True])
def test_the_kernels_store_no_logits(device, training, monkeypatch):
    """Lean training and evaluation: all tensors ever made, together, are smaller than the logits."""
    N, H, V = 128, 16, 1024
    monkeypatch.setattr(kernels.configs, "linear_cross_entropy_chunk", lambda N, V, dtype: 128)
    x, w, b, target = sample(N, H, V, device=device)
    leaves = [t.requires_grad_(training) for t in (x, w, b)]

    def step(**options):
        loss = ours(x, w, target, linear_bias=b, **options)
        if training:
            torch.autograd.grad(loss, leaves)

    with dlgpu.use_backend("triton"):
        with Allocations() as lean:
            step(memory_budget=0)
        assert 0 < lean.total < N * V * 4
        if training:
            with Allocations() as fast:
                step()
            assert fast.largest == N * V * 4


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that live at a time, at most, without those of `given`."""

    def __init__(self, *given):
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def add(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def freed(self, storage, nbytes):
        self.known.remove(storage)
        self.now -= nbytes


def test_memory_at_the_headline_size():
    """8192 x 128256, 4096 features, bfloat16, by the launchers on meta tensors: lean training takes at most 1.35 GiB with dX
    and dW, an evaluation some MB, fast training the logits, their gradient and the same."""
    N, H, V = 8192, 4096, 128256
    x, w = (torch.empty(n, H, dtype=torch.bfloat16, device="meta").requires_grad_() for n in (N, V))
    target = torch.empty(N, dtype=torch.int64, device="meta")

    def peak(training, **options):
        memory = PeakMemory(x, w, target)

        def step():
            with memory, torch.set_grad_enabled(training):
                loss = ours(x, w, target, **options)
                if training:
                    torch.autograd.grad(loss, (x, w))

        assert dry_run(lambda: step, (90, 227 << 10, 132))
        assert memory.now == 0
        return memory.peak

    gradients = 2 * H * (N + V)
    assert gradients < peak(True, memory_budget=0) <= 1.35 * 2**30
    assert 2 * 2 * N * V + gradients < peak(True) <= 1.01 * (2 * 2 * N * V + gradients)
    assert 0 < peak(False) < 8 << 20


@pytest.mark.parametrize("training", [False, True])
def test_the_fallback_stores_no_logits(training):
    N, H, V = 512, 4, 65536
    x, w, b, target = sample(N, H, V)
    leaves = [t.requires_grad_(training) for t in (x, w, b)]
    tracemalloc.start()
    try:
        loss = ours(x, w, target, linear_bias=b, memory_budget=0)
        if training:
            torch.autograd.grad(loss, leaves)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < N * V * 4 / 4


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
def test_evaluation_and_lean_training_write_no_logits():
    """By the meter: what all launches write, together, is less than the logits."""
    from dlgpu.bench.meter import TrafficMeter

    N, H, V = 128, 16, 1024
    x, w, _, target = sample(N, H, V)
    with dlgpu.use_backend("triton"), TrafficMeter() as meter:
        ours(x, w, target)
    assert sum(launch.compulsory_writes for launch in meter.launches) < N * V
    budget = {"memory_budget": 0}
    with dlgpu.use_backend("triton"), TrafficMeter() as meter:
        ours(x.requires_grad_(), w.requires_grad_(), target, **budget).backward()
    written = [launch.compulsory_writes for launch in meter.launches]
    # But for dZ, whose chunk here is the whole vocabulary.
    assert sum(written) - N * V * 4 < N * V


# The byte laws.
def product_law(M, N, K, size, tile, add, out):
    """a is read once for each column of tiles, b once for each row of tiles."""
    across, down = cdiv(N, tile.block_n), cdiv(M, tile.block_m)
    ends = M * N * (out + 4 * add)
    compulsory = size * (M * K + K * N) + ends
    requested = size * (across * M * K + down * N * K) + ends
    return "_linear_cross_entropy_product_kernel", compulsory, requested


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize(
    ("N", "H", "V", "dtype", "smooth", "weighted", "bias", "chunk", "fast"),
    [
        (5, 3, 7, torch.float32, False, False, False, 1024, False),
        (70, 48, 150, torch.float32, True, True, True, 64, False),
        (70, 48, 150, torch.float32, True, False, True, 64, True),
        (130, 64, 272, torch.bfloat16, False, True, False, 128, False),
        (130, 64, 272, torch.bfloat16, True, True, True, 272, True),
    ],
)
def test_byte_laws(monkeypatch, N, H, V, dtype, smooth, weighted, bias, chunk, fast):
    """Two for each launch, exact, from shape and tile alone."""
    from dlgpu.bench.meter import TrafficMeter

    monkeypatch.setattr(kernels.configs, "linear_cross_entropy_chunk", lambda *args: min(chunk, V))
    monkeypatch.setattr(kernels.configs, "linear_cross_entropy_split", lambda m, n: 2)
    x, w, b, _ = sample(N, H, V, dtype)
    target = torch.arange(N) % V
    b = b if bias else None
    weight = torch.rand(V, dtype=dtype) if weighted else None
    u = torch.rand(N, dtype=dtype)
    options = ("mean", -100, 0.1 * smooth, 0.0, 0.0, 1.0)
    kept_columns = V if fast else 0
    with TrafficMeter() as meter:
        loss, lse, _, stats, denominator, kept = kernels.linear_cross_entropy_fwd(
            x, w, target, b, weight, u, *options, True, kept_columns
        )
        kernels.linear_cross_entropy_bwd(
            loss, lse, x, w, target, b, weight, u, stats, denominator, kept, *options, [True] * 3
        )
    size = dtype.itemsize
    limits = _triton.device_limits(torch.device("cpu"))[:2]
    tile, fwd_tile = (
        configs.linear_cross_entropy_tile(*limits, dtype, H % 16 == 0, which) for which in (False, smooth)
    )
    down = cdiv(N, tile.block_m)
    splits, fields = cdiv(cdiv(V, fwd_tile.block_n), 2), 5 if smooth else 3
    classes = len(target.unique())

    def logits(columns, tile):
        """(compulsory, requested) of the tiles' logits, their bias unless kept and, with smoothing, their class weights."""
        across, down = cdiv(columns, tile.block_n), cdiv(N, tile.block_m)
        vectors = size * columns * ((bias and not fast) + (smooth and weighted))
        if fast:
            return size * N * columns + vectors, size * N * columns + down * vectors
        once = size * (N * H + columns * H) + vectors
        return once, size * (across * N * H + down * columns * H) + down * vectors

    def same(kernel, n):
        return f"_linear_cross_entropy_{kernel}_kernel", n, n

    laws = []
    once, requested = logits(V, fwd_tile)
    partial = 4 * fields * splits * N
    laws += [
        (
            "_linear_cross_entropy_fwd_kernel",
            once + 8 * N + partial,
            requested + 8 * N * splits + partial,
        )
    ]
    # Targets, token weights; loss, lse, two statistics, share of the denominator, correct.
    rows = partial + 8 * N + size * N + 24 * N
    laws += [
        ("_linear_cross_entropy_rows_kernel", rows + size * classes * weighted, rows + size * N * weighted)
    ]
    laws += [same("reduce", (4 + 4 + 4 + 8) * N + 12)]
    # dloss, denominator, sum of the weights by each program; dlse, targets, token weights, statistics; four factors.
    programs = cdiv(N, 128)
    values = 4 + 4 * (smooth and weighted)
    scales = (4 + 8 + size + 8 + 16) * N
    laws += [
        (
            "_linear_cross_entropy_scales_kernel",
            4 + values + scales + size * classes * weighted,
            # dloss is one value, asked for by every row.
            4 * N + programs * values + scales + size * N * weighted,
        )
    ]
    edges = [0, V] if fast else [*range(0, V, chunk), V]
    for start, stop in itertools.pairwise(edges):
        columns = stop - start
        across = cdiv(columns, tile.block_n)
        once, requested = logits(columns, tile)
        per_row = 8 + 4 * (4 if smooth else 3)
        out = size * N * columns + 4 * down * columns
        laws += [
            (
                "_linear_cross_entropy_dz_kernel",
                once + per_row * N + out,
                requested + across * per_row * N + out,
            ),
        ]
        if len(edges) > 2:
            # In float32 until the last chunk is added.
            laws.append(product_law(N, H, columns, size, tile, start > 0, size if stop == V else 4))
    own = [launch for launch in meter.launches if "cross_entropy" in launch.kernel]
    assert [(launch.kernel, launch.compulsory, launch.requested) for launch in own] == laws
    # The rest are a linear layer's, whose laws are test_linear.py's: logits where they are kept, dW of each chunk, dX of one.
    products = [
        name
        for launch in meter.launches
        if (name := launch.kernel) not in dict.fromkeys(o.kernel for o in own)
    ]
    assert {*products} <= {"_linear_kernel", "_linear_tma_kernel", "_sum_kernel"}
    expected = fast + (len(edges) - 1) + (len(edges) == 2)
    assert sum(name != "_sum_kernel" for name in products) == expected
    assert all(launch.clean for launch in meter.launches)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="lazily committed memory is the CPU's")
@pytest.mark.parametrize("form", FORMS)
def test_offsets_past_two_to_the_31(tmp_path, form):
    """Rows of x 2^24 elements apart: the last lie past 2^31, in a file that is all holes."""
    N, H, V, stride = 131, 4, 10, 1 << 24
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=(N - 1) * stride + H)
    far = torch.from_numpy(file).as_strided((N, H), (stride, 1))
    x, w, b, target = sample(N, H, V)
    far.copy_(x)
    with dlgpu.use_backend("triton"):
        call = functools.partial(ours, reduction="none", **FORMS[form])
        found, expected = (
            run(lambda x, w, b, t: call(x, w, t, linear_bias=b), [x, w, b, target], torch.ones_like)
            for x in (far, x)
        )
    assert_same_bits(found, expected)


# The module.
def test_the_module_is_torchs():
    kept = {
        "bias": True,
        "weight": torch.rand(6),
        "ignore_index": 2,
        "reduction": "sum",
        "label_smoothing": 0.1,
    }
    torch.manual_seed(3)
    module = dlgpu.nn.LinearCrossEntropyLoss(5, 6, z_loss=0.1, memory_budget=7, **kept)
    x, target = torch.randn(4, 5), torch.tensor([0, 5, 2, 3])
    bias = module.linear.bias
    expected = reference(
        x, module.linear.weight, target, bias, kept["weight"], "sum", 0.1, z_loss=0.1, ignore_index=2
    )
    torch.testing.assert_close(module(x, target), expected)
    assert "z_loss=0.1, memory_budget=7" in repr(module)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        torch.manual_seed(3)
        theirs = torch.nn.LinearCrossEntropyLoss(5, 6, **kept)
        assert isinstance(module, torch.nn.LinearCrossEntropyLoss)
        assert list(module.state_dict()) == list(theirs.state_dict())
        assert_same_bits(module.state_dict().values(), theirs.state_dict().values())
        module.load_state_dict(theirs.state_dict())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch's own came with 2.13")
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_module_data(dtype):
    """Every row of torch.testing's module_db: results, gradients, parameters of the same seed."""
    # Imported here: at the top it would change the settings of this file's hypothesis tests.
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is torch.nn.LinearCrossEntropyLoss)
    rows = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert len(rows) > 50
    for row in rows:
        made, given = row.constructor_input, row.forward_input
        results = []
        for library, backend in ((dlgpu.nn, "fallback"), (torch.nn, "auto")):
            torch.manual_seed(3)
            module = library.LinearCrossEntropyLoss(*made.args, **made.kwargs)
            args = [a.detach().clone().requires_grad_(a.requires_grad) for a in given.args]
            wanted = [a for a in (*args, *module.parameters()) if a.requires_grad]
            with dlgpu.use_backend(backend):
                y = module(*args, **given.kwargs)
                results.append([y, *torch.autograd.grad(y.sum(), wanted)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_module_of_more_dimensions():
    module = dlgpu.nn.LinearCrossEntropyLoss(5, 6, out_features=(2, 3), bias=True, reduction="none")
    assert module(torch.randn(4, 5), torch.randint(6, (4, 2, 3))).shape == (4, 2, 3)


X, W, T = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((1, W, T), {}, TypeError, "input must be a Tensor, got int"),
        ((X, None, T), {}, TypeError, "linear_weight must be a Tensor, got NoneType"),
        ((X, W, [0, 1]), {}, TypeError, "target must be a Tensor, got list"),
        ((X, W, T), {"linear_bias": 1}, TypeError, "linear_bias must be a Tensor, got int"),
        ((X, W, T), {"token_weights": 1}, TypeError, "token_weights must be a Tensor, got int"),
        ((X, W, T), {"z_loss": "1"}, TypeError, "z_loss must be a number, got str"),
        ((X, W, T), {"memory_budget": 0.5}, TypeError, "memory_budget must be an integer, got float"),
        ((X.int(), W.int(), T), {}, TypeError, "input must be float32, .* got torch.int32"),
        ((X, W.double(), T), {}, TypeError, "linear_weight has dtype torch.float64, expected torch.float32"),
        ((X, W, T), {"linear_bias": W[:, 0].half()}, TypeError, "linear_bias has dtype torch.float16"),
        ((X, W, T.int()), {}, TypeError, "target has dtype torch.int32, expected torch.int64"),
        ((X, W, T), {"weight": W[:, 0].double()}, TypeError, "weight has dtype torch.float64"),
        ((X, W[:, :2], T), {}, RuntimeError, r"linear_weight has shape \[4, 2\], expected \[C, ..., 3\]"),
        ((X, W[0], T), {}, RuntimeError, r"linear_weight has shape \[3\]"),
        ((X[None], W, T), {}, RuntimeError, r"input has shape \[1, 2, 3\]"),
        ((X, W[:0], T), {}, ValueError, "no classes"),
        ((X, W, T[:1]), {}, ValueError, r"target has shape \[1\], expected \[2\]"),
        ((X, W, T), {"linear_bias": W[0]}, RuntimeError, r"linear_bias has shape \[3\], expected \[4\]"),
        ((X, W, T), {"weight": W[0]}, RuntimeError, r"weight has shape \[3\], expected \[4\]"),
        ((X, W, T), {"token_weights": W[0]}, ValueError, r"token_weights has shape \[3\], expected \[2\]"),
        ((X, W.to("meta"), T), {}, RuntimeError, "linear_weight is on meta, expected cpu"),
        ((X, W, T), {"reduction": "max"}, ValueError, "reduction must be one of none, mean, sum, got 'max'"),
        (
            (X, W, T),
            {"label_smoothing": 1.5},
            RuntimeError,
            "label_smoothing must be between 0 and 1, got 1.5",
        ),
        ((X, W, T), {"softcap": -1.0}, ValueError, "softcap must be positive, got -1.0"),
        ((X, W, T), {"memory_budget": -1}, ValueError, "memory_budget is a number of bytes, got -1"),
        ((X, W, T), {"weight": W[:, 0].clone().requires_grad_()}, RuntimeError, "weight requires a gradient"),
        ((X, W, torch.ones(2, 4)), {"ignore_index": 1}, RuntimeError, "ignore_index cannot be specified"),
    ],
)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        ours(*args, **options)


@pytest.mark.parametrize("bug", [lambda d: d * (1 + 1e-3), lambda d: d + 1e-4, lambda d: d.roll(1, 0)])
def test_the_gate_fails_on_a_seeded_bug(bug):
    inputs = sample(6, 5, 10)
    upstream = torch.ones_like
    found = run(lambda x, w, b, t: ours(x, w, t, linear_bias=b), inputs, upstream)
    expected, truth = (
        run(lambda x, w, b, t: reference(x, w, t, b), inputs, upstream, dtype)
        for dtype in (None, torch.float64)
    )
    for a, t, e in zip(found[1:], truth[1:], expected[1:], strict=True):
        assert_accurate(a, t, e)
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(bug(a), t, e)
