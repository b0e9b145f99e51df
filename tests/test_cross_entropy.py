"""Softmax cross-entropy against torch, forward and backward, on every backend."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import dlgpu.functional
from dlgpu.kernels import _triton
from dlgpu.kernels import cross_entropy as kernels
from dlgpu.ops.cross_entropy import _eager_loss
from tolerance import DTYPES, LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

INF, NAN = float("inf"), float("nan")


def sample(N, C, dtype=torch.float32, device="cpu"):
    return 2 * torch.randn(N, C, dtype=dtype, device=device), torch.randint(C, (N,), device=device)


def check(x, target, upstream=None, weight=None, **options):
    """Held to torch's; gives [loss, gradient]."""
    both = [
        lambda x, t, w, f=f: f(x, t, w, **options) for f in (dlgpu.functional.cross_entropy, F.cross_entropy)
    ]
    # torch's weight has no gradient either.
    return assert_conforms(*both, (x, target, weight), upstream, frozen=[2])


# 1 to 127 classes share a program between rows; 32000 take several steps of a program forward, several programs backward.
@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        (1, 1),
        (5, 1),
        (37, 2),
        (128, 3),
        (64, 10),
        (9, 127),
        (16, 128),
        (3, 1000),
        (2, 4097),
        (2, 32000),
        (0, 5),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_class_counts(backend, device, dtype, rows, classes):
    check(*sample(rows, classes, dtype, device))


OPTIONS = {
    "weight": {"weighted": True},
    "ignored": {"ignored": [0, 3]},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing 1": {"label_smoothing": 1.0},
    "weight, smoothing": {"weighted": True, "label_smoothing": 0.3},
    "weight, ignored, smoothing": {"weighted": True, "ignored": [1, 2], "label_smoothing": 0.3},
    "a class ignored": {"weighted": True, "ignored": [4], "ignore_index": 2, "label_smoothing": 0.2},
}


@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        (backend, dtype, options)
        for backend, dtype in PAIRS
        for options in OPTIONS
        # 16 bits differ in how they are loaded and stored: one case that needs all of a kernel's code.
        if dtype in (torch.float32, torch.float64) or options == "weight, ignored, smoothing"
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(backend, device, dtype, reduction, options):
    options = dict(OPTIONS[options])
    x, target = sample(35, 19, dtype, device)
    weight = torch.rand(19, dtype=dtype, device=device) + 0.1 if options.pop("weighted", False) else None
    for row in options.pop("ignored", []):
        target[row] = options.get("ignore_index", -100)
    check(x, target, weight=weight, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weight_of_zero(backend, device, reduction):
    x, target = sample(8, 5, device=device)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5], device=device)
    check(x, target, weight=weight, reduction=reduction)
    check(x, target, weight=weight, reduction=reduction, label_smoothing=0.2)


# Past the rows that one step of the reduction takes, and past 2048.
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_rows(backend, device, reduction):
    x, target = sample(2049, 3, device=device)
    target[::7] = -100
    check(x, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(5,), (3, 5, 2), (2, 5, 3, 4), (0, 5, 3), (2, 5, 0), (4, 5, 1)])
def test_dimensions(backend, device, shape, reduction):
    x = torch.randn(shape, device=device)
    target = torch.randint(5, shape[:1] + shape[2:] if len(shape) > 1 else (), device=device)
    check(x, target, reduction=reduction, weight=torch.rand(5, device=device), label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_classes_in_bytes(backend, device, reduction):
    x, target = sample(5, 9, device=device)
    target[2] = 200
    check(x, target.byte(), reduction=reduction, ignore_index=200)


UPSTREAM = {
    "random": torch.randn_like,
    "stride 0": lambda loss: torch.full((), 0.7, device=loss.device).expand(loss.shape),
    "sliced": lambda loss: torch.randn(2 * loss.numel(), device=loss.device)[::2].view(loss.shape),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout, upstream):
    x, target = sample(9, 21, device=device)
    # A strided target and weight too.
    target = torch.stack([target, target], 1)[:, 0]
    weight = torch.rand(42, device=device)[::2]
    check(LAYOUTS[layout](x), target, UPSTREAM[upstream], weight, reduction="none")


@hypothesis.given(
    st.integers(0, 40),
    st.integers(1, 150),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
)
def test_any_shape_layout_and_option(backend, device, N, C, layout, reduction, smoothing, weighted):
    torch.manual_seed(0)
    x, target = sample(N, C, device=device)
    target[::3] = -100
    weight = torch.rand(C, device=device) if weighted else None
    check(LAYOUTS[layout](x), target, weight=weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(backend, device, reduction, smoothing):
    x, _ = sample(5, 7, device=device)
    target = torch.full((5,), -100, device=device)
    loss, dx = check(x, target, reduction=reduction, label_smoothing=smoothing)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert (dx.isnan() | (dx == 0)).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_ignored_row_counts_nowhere(backend, device, value, reduction, smoothing):
    """Whatever it holds: loss exactly 0, gradient exactly 0, and the other rows as without it."""
    x, target = sample(6, 70, device=device)
    x[2], target[2] = value, -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    keep = torch.arange(6, device=device) != 2
    cross_entropy = functools.partial(dlgpu.functional.cross_entropy, **options)
    loss, dx = run(cross_entropy, [x, target], torch.ones_like)
    assert (dx[2] == 0).all()
    leaf = x.clone().requires_grad_()
    again = torch.autograd.grad(cross_entropy(leaf, target).sum(), leaf, create_graph=True)
    assert (again[0][2] == 0).all()
    if reduction == "none":
        assert loss[2] == 0
        loss = loss[keep]
    expected = run(functools.partial(F.cross_entropy, **options), [x[keep], target[keep]], torch.ones_like)
    truth = run(
        functools.partial(F.cross_entropy, **options), [x[keep], target[keep]], torch.ones_like, torch.float64
    )
    for a, t, e in zip((loss, dx[keep]), truth, expected, strict=True):
        assert_accurate(a, t, e)


# 8200 float32 columns are three steps of a row's program forward, or one step of each of three programs.
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("columns", [slice(0, 4096), slice(0, 4100), slice(4096, None), slice(None, None, 2)])
def test_blocks_of_minus_infinity(backend, device, columns, smoothing, split, monkeypatch):
    if not split:
        monkeypatch.setattr(kernels.configs, "cross_entropy_splits", lambda tile, blocks, C, _: (1, C))
    x, target = sample(2, 8200, device=device)
    x[0, columns] = -INF
    target[0] = next(i for i in range(8200) if x[0, i] > -INF)
    loss, dx = check(x, target, reduction="none", label_smoothing=smoothing)
    assert loss[1].isfinite()
    assert dx[1].isfinite().all()
    assert smoothing or loss.isfinite().all()


# The interpreter's maximum of nothing but NaN warns.
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(("classes", "smoothing"), [(5, 0.0), (5, 0.1), (1100, 0.0)])
@pytest.mark.parametrize(
    "case", ["all -inf", "target -inf", "one +inf", "target +inf", "two +inf", "NaN", "all NaN"]
)
def test_nan_and_infinity(backend, device, case, classes, smoothing):
    x, target = sample(3, classes, device=device)
    target[1] = 1
    x[1] = {
        "all -inf": torch.full((classes,), -INF),
        "target -inf": torch.where(torch.arange(classes) == 1, -INF, x[1].cpu()),
        "one +inf": torch.where(torch.arange(classes) == 3, INF, x[1].cpu()),
        "target +inf": torch.where(torch.arange(classes) == 1, INF, x[1].cpu()),
        "two +inf": torch.where(torch.arange(classes) % 3 == 0, INF, x[1].cpu()),
        "NaN": torch.where(torch.arange(classes) == 4, NAN, x[1].cpu()),
        "all NaN": torch.full((classes,), NAN),
    }[case].to(device)
    for reduction in ("none", "mean") if classes == 5 and not smoothing else ("none",):
        check(x, target, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("value", [NAN, INF])
def test_upstream_nan_and_infinity(backend, device, value):
    x, target = sample(4, 6, device=device)
    target[2] = -100
    dloss = torch.tensor([1.0, value, value, -2.0], device=device)
    found = run(
        functools.partial(dlgpu.functional.cross_entropy, reduction="none"), [x, target], lambda y: dloss
    )
    # An ignored row's gradient is 0 whatever comes down; torch gives NaN there.
    assert (found[1][2] == 0).all()
    assert not found[1][1].isfinite().all()
    assert found[1][[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits(backend, device, dtype, offset):
    """The rounding of a log-sum-exp near 1e4 would be an error of every probability; bf16 logits there are 64 apart."""
    x, target = sample(7, 40, device=device)
    x = (x + offset).to(dtype)
    check(x, target, reduction="none")
    check(x, target, label_smoothing=0.1)
    check(x * 30, target, reduction="none")


@pytest.mark.parametrize("margin", [8.0, 12.0, 20.0, 60.0, 200.0])
def test_confident_predictions(backend, device, margin):
    """p > 0.999: loss and gradient are small differences of numbers near 1."""
    x, target = sample(6, 10, device=device)
    x /= 10
    x[torch.arange(6, device=device), target] += margin
    loss, _ = check(x, target, reduction="none")
    assert (loss >= 0).all()
    check(x, target, reduction="none", label_smoothing=0.05)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backward_passes(backend, device, reduction):
    x, target = sample(9, 21, device=device)
    x.requires_grad_()
    cross_entropy = functools.partial(dlgpu.functional.cross_entropy, reduction=reduction)
    loss = cross_entropy(x, target)
    first, second = torch.randn_like(loss), torch.randn_like(loss)
    for dloss in (first, second, first):
        found = torch.autograd.grad(loss, x, dloss, retain_graph=True)
        assert_same_bits([loss, *found], run(cross_entropy, [x, target], lambda y, dloss=dloss: dloss))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(backend, device, context, launches):
    x, target = sample(9, 21, device=device)
    x.requires_grad_()
    loss = dlgpu.functional.cross_entropy(x, target)
    with context():
        still = dlgpu.functional.cross_entropy(x, target)
    assert not still.requires_grad
    assert not dlgpu.functional.cross_entropy(x.detach(), target).requires_grad
    assert_same_bits([still], [loss])
    loss.backward()
    if backend == "triton":
        forward = ["_cross_entropy_fwd_kernel", "_cross_entropy_reduce_kernel"]
        assert [name for name, *_ in launches] == [*forward * 3, "_cross_entropy_bwd_kernel"]


def test_an_input_changed_in_place_is_noticed(backend, device):
    x, target = sample(5, 3, device=device)
    x.requires_grad_()
    loss = dlgpu.functional.cross_entropy(x, target)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_deprecated_spelling(backend, device):
    x, target = sample(4, 3, device=device)
    for old, new in (
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"reduce": True}, "mean"),
    ):
        with pytest.warns(UserWarning, match="deprecated"):
            found = dlgpu.functional.cross_entropy(x, target, **old)
        assert_same_bits([found], [dlgpu.functional.cross_entropy(x, target, reduction=new)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(reduction, weighted):
    x, target = sample(5, 4, torch.float64)
    target[1] = -100
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.2 * weighted}
    with dlgpu.use_backend("fallback"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            check(lambda x: dlgpu.functional.cross_entropy(x, target, **options), [x.requires_grad_()])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_second_derivatives(backend, device, reduction, smoothing):
    x, target = sample(5, 7, device=device)
    dloss = torch.randn(() if reduction == "mean" else 5, device=device)

    def second(function, dtype):
        leaf, upstream = (t.detach().to(dtype).requires_grad_() for t in (x, dloss))
        loss = function(leaf, target, reduction=reduction, label_smoothing=smoothing)
        (first,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, upstream))

    found = second(dlgpu.functional.cross_entropy, torch.float32)
    expected, truth = (second(F.cross_entropy, dtype) for dtype in (torch.float32, torch.float64))
    for a, t, e in zip(found, truth, expected, strict=True):
        assert_accurate(a, t, e)


@pytest.mark.usefixtures("debug_on_gpu")
@pytest.mark.parametrize("target", [-1, -101, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range(backend, device, target, reduction):
    """An IndexError that names the row where it can be known without a synchronization."""
    x, targets = sample(5, 7, device=device)
    targets[3] = target
    with pytest.raises(IndexError, match=rf"target {target} of row 3 .* 7 classes"):
        dlgpu.functional.cross_entropy(x, targets, reduction=reduction)


@pytest.mark.parametrize(
    ("dtype", "weighted", "smoothing"),
    [(dtype, weighted, 0.1 * weighted) for dtype in DTYPES for weighted in (False, True)]
    + [(torch.float32, True, 0.0), (torch.float32, False, 0.1)],
)
def test_a_target_out_of_range_in_the_launcher(device, dtype, weighted, smoothing):
    """What a GPU does, where the check would synchronize: NaN in that row alone, and nothing read or written astray."""
    x, target = sample(6, 37, dtype, device)
    weight = torch.rand(37, dtype=dtype, device=device) if weighted else None
    good = torch.tensor([0, 2, 5], device=device)
    bad = torch.tensor([1, 3, 4], device=device)
    expected = _launch(x, target, weight, smoothing)
    target[bad] = torch.tensor([37, -1, 2**40], device=device)
    if _triton.INTERPRETED:
        from dlgpu.bench.meter import TrafficMeter

        with TrafficMeter() as meter:
            found = _launch(x, target, weight, smoothing)
        assert all(launch.clean for launch in meter.launches)
        assert [launch.kernel for launch in meter.launches] == [
            "_cross_entropy_fwd_kernel",
            "_cross_entropy_bwd_kernel",
        ]
    else:
        found = _launch(x, target, weight, smoothing)
    for a, e in zip(found, expected, strict=True):
        assert a[bad].isnan().all()
        assert_same_bits([a[good]], [e[good]])
    # And the mean of them is NaN, never a number that leaves the row out.
    loss, *_ = kernels.cross_entropy_fwd(x, target, weight, "mean", -100, smoothing)
    assert loss.isnan()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_target_out_of_range_in_torchs_own_functions(device, weighted, smoothing):
    """The same where they stand in for the kernels, for float64 and for second derivatives: by themselves they would stop
    a GPU. And an ignored row counts nowhere there either."""
    x, target = sample(6, 7, torch.float64, device)
    weight = torch.rand(7, dtype=torch.float64, device=device) if weighted else None
    x[4], target[4] = NAN, -100
    good, bad = torch.tensor([0, 2, 5], device=device), torch.tensor([1, 3], device=device)
    options = ("none", -100, smoothing)

    def gradients(target):
        leaf = x.clone().requires_grad_()
        loss = _eager_loss(leaf, target, weight, *options)
        return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]

    expected = gradients(target)
    target[bad] = torch.tensor([7, -1], device=device)
    for a, e in zip(gradients(target), expected, strict=True):
        assert a[bad].isnan().all()
        assert (a[4] == 0).all()
        assert_same_bits([a[good]], [e[good]])
        assert e[bad].isfinite().all()
    assert _eager_loss(x, target, weight, "mean", -100, smoothing).isnan()


def _launch(x, target, weight, smoothing):
    options = ("none", -100, smoothing)
    loss, stats, denominator = kernels.cross_entropy_fwd(x, target, weight, *options)
    dloss = torch.ones_like(loss)
    return loss, kernels.cross_entropy_bwd(dloss, x, target, weight, stats, denominator, *options)


@pytest.mark.parametrize("bug", [lambda d: d * (1 + 1e-3), lambda d: d + 1e-5, lambda d: d.roll(1, 0)])
def test_the_gate_fails_on_a_seeded_bug(bug):
    x, target = sample(6, 10)
    upstream = torch.ones_like
    found = run(dlgpu.functional.cross_entropy, [x, target], upstream)
    expected, truth = (run(F.cross_entropy, [x, target], upstream, dtype) for dtype in (None, torch.float64))
    for a, t, e in zip(found, truth, expected, strict=True):
        assert_accurate(a, t, e)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(bug(found[1]), truth[1], expected[1])
