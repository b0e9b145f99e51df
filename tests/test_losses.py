"""The losses against torch, forward and backward, on every backend; their table; and their byte laws."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_modules import module_db

import dlgpu
from dlgpu import functional, nn
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import losses as kernels
from dlgpu.kernels.losses import LOSSES
from dlgpu.ops import losses as ops
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Of torch's own: kl_div's, and the broadcasting one, where a test does not ask for it.
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size"),
]

INF, NAN = float("inf"), float("nan")
NAMES = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "kl_div"]


def reduced(loss, reduction):
    return loss if reduction == "none" else getattr(loss, reduction)()


def torch_hinge(x, t, reduction="mean", squared=False):
    m = F.relu(1 - t * x)
    return reduced(m.square() if squared else m, reduction)


def torch_multi_margin(x, target, *args, weight=None, **kwargs):
    """torch's, which on the CPU takes no 16-bit floats."""
    wide = x.dtype if x.dtype is torch.float64 else torch.float32
    weight = None if weight is None else weight.to(wide)
    return F.multi_margin_loss(x.to(wide), target, *args, weight=weight, **kwargs).to(x.dtype)


# (ours, torch's, options). The table's losses and those with a parameter that is not the default.
CALLS = {
    **{name: (getattr(functional, name), getattr(F, name), {}) for name in NAMES},
    "smooth_l1 beta": (functional.smooth_l1_loss, F.smooth_l1_loss, {"beta": 0.3}),
    "smooth_l1 beta 0": (functional.smooth_l1_loss, F.smooth_l1_loss, {"beta": 0}),
    "huber delta": (functional.huber_loss, F.huber_loss, {"delta": 0.4}),
    "kl_div log": (functional.kl_div, F.kl_div, {"log_target": True}),
    "hinge": (functional.hinge_loss, torch_hinge, {}),
    "squared hinge": (functional.hinge_loss, torch_hinge, {"squared": True}),
}
calls = pytest.mark.parametrize("call", CALLS)


# With target gradients of each form.
GRADIENTS = ["l1_loss", "binary_cross_entropy_with_logits", "hinge", "squared hinge", "kl_div", "kl_div log"]


def some(*interpreted):
    """Every loss on the fallback, these in the interpreter, which is slow and has one kernel for all."""
    pairs = [*(("fallback", call) for call in CALLS), *(("triton", call) for call in interpreted)]
    return pytest.mark.parametrize(("backend", "call"), pairs, indirect=["backend"])


def both(call, **options):
    """(ours, torch's) as functions of (input, target)."""
    ours, theirs, own = CALLS[call]
    return tuple(lambda x, t, f=f: f(x, t, **own, **options) for f in (ours, theirs))


def operands(call, *shape, device="cpu", dtype=torch.float32):
    """(input, target) as the loss is meant to be called."""
    x = torch.randn(shape, device=device)
    if "hinge" in call:
        t = torch.where(torch.randn(shape, device=device) > 0, 1.0, -1.0)
    elif "entropy" in call or call == "kl_div":
        t = 0.05 + 0.9 * torch.rand(shape, device=device)
    else:
        t = torch.randn(shape, device=device)
    return [x.to(dtype), t.to(dtype)]


def test_every_row_of_the_table_is_called():
    reached = set()

    class Recorder(dict):
        def __getitem__(self, name):
            reached.add(name)
            return super().__getitem__(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlgpu.fallback.losses.LOSSES", Recorder(LOSSES))
        for call in CALLS:
            both(call)[0](*operands(call, 3))
    assert reached == set(LOSSES)


# One program's elements, several programs' and no multiple of them, a tail after whole vectors.
@calls
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_values(backend, device, dtype, call):
    sizes = ((4103, "mean"), (2051, "none"))
    # The interpreter is slow: one of each for the 16-bit ones.
    first = backend == "triton" and dtype is torch.float16
    last = 1 if backend == "triton" and dtype is torch.bfloat16 else 2
    for n, reduction in sizes[first:last]:
        assert_conforms(*both(call, reduction=reduction), operands(call, n, device=device, dtype=dtype))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (0, 3), (2, 3, 5)])
@some("kl_div")
def test_shapes_and_reductions(backend, device, call, shape, reduction):
    if reduction != "batchmean" or "kl_div" in call:
        assert_conforms(*both(call, reduction=reduction), operands(call, *shape, device=device))


@some("mse_loss", "squared hinge")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, call, layout):
    x, t = (LAYOUTS[layout](a) for a in operands(call, 7, 5, device=device))
    assert_conforms(*both(call), [x, t])
    for pair in ((x.contiguous(), t), (x, t.contiguous())):
        assert_conforms(*both(call, reduction="none"), pair, lambda y: LAYOUTS[layout](torch.randn_like(y)))


@pytest.mark.parametrize(
    ("shape", "other"), [((4, 3), (3,)), ((4, 3), (4, 1)), ((3,), (4, 3)), ((4, 3), ()), ((), (2,))]
)
@pytest.mark.parametrize(
    ("backend", "call"),
    [
        ("fallback", "mse_loss"),
        ("fallback", "smooth_l1_loss"),
        ("fallback", "kl_div"),
        ("triton", "mse_loss"),
    ],
    indirect=["backend"],
)
def test_broadcasting(backend, device, call, shape, other):
    x, t = operands(call, *shape, device=device)[0], operands(call, *other, device=device)[1]
    for reduction in ("none", "mean", "sum", *["batchmean"] * (call == "kl_div")):
        assert_conforms(*both(call, reduction=reduction), [x, t])


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_broadcasting_warns_as_torch_does(name):
    x, t = torch.randn(4, 3), torch.randn(3)
    for functions in (functional, F):
        with pytest.warns(
            UserWarning, match=r"target size \(torch.Size\(\[3\]\)\) that is different"
        ) as found:
            getattr(functions, name)(x, t)
        assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(functional, name)(x, x)


def test_kl_divs_mean_warns_as_torchs_does():
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="'mean' divides the total loss") as found:
        functional.kl_div(x, x.exp())
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.kl_div(x, x.exp(), reduction="batchmean")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("fallback", name) for name in ("mse_loss", "l1_loss", "huber_loss")),
        ("triton", "mse_loss"),
        ("triton", "huber_loss"),
    ],
    indirect=["backend"],
)
def test_weights_of_a_difference(backend, device, name, trained, reduction):
    """Whether the weight needs a gradient or not; with a target that broadcasts, too."""
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    ours, theirs = (
        lambda x, t, w, f=f: getattr(f, name)(x, t, weight=w, reduction=reduction) for f in (functional, F)
    )
    for shape, other in (((7, 5), (7, 5)), ((5,), (7, 5))):
        x, t, w = (
            a.to(dtype)
            for a in (
                torch.randn(shape, device=device),
                torch.randn(other, device=device),
                torch.rand(shape, device=device),
            )
        )
        assert_conforms(ours, theirs, [x, t, w], frozen=() if trained else (2,))


# The first repeat along leading dimensions and are read as they are, the others are written out.
@pytest.mark.parametrize("shape", [(5,), (1, 3, 5), (1,), (), (4, 3, 5), (4, 1, 1), (3, 1)])
def test_weights_of_binary_cross_entropy(backend, device, shape):
    name = "binary_cross_entropy_with_logits"
    x, t = operands(name, 4, 3, 5, device=device)
    w = torch.rand(shape, device=device)
    for which, reduction in (("weight", "none"), ("pos_weight", "mean")):
        ours, theirs = (
            lambda x, t, w, f=f, k=which, r=reduction: getattr(f, name)(x, t, reduction=r, **{k: w})
            for f in (functional, F)
        )
        assert_conforms(ours, theirs, [x, t, w], frozen=(2,))
    q = torch.rand(5, device=device)
    ours, theirs = (
        lambda x, t, w, q, f=f: getattr(f, name)(x, t, weight=w, pos_weight=q) for f in (functional, F)
    )
    assert_conforms(ours, theirs, [x, t, w, q], frozen=(2, 3))
    # Of nothing.
    assert_conforms(ours, theirs, [x[:0], t[:0], torch.ones(5, device=device), q], frozen=(2, 3))


def test_weights_past_one_program(backend, device):
    """Vectors of weights that begin anywhere in a program's elements."""
    name = "binary_cross_entropy_with_logits"
    x, t = operands(name, 11, 307, device=device)
    weights = torch.rand(307, device=device), torch.rand(11, 307, device=device)
    for w, q in (weights, weights[::-1]):
        for reduction in ("mean", "none"):
            ours, theirs = (
                lambda x, t, w, q, f=f, r=reduction: getattr(f, name)(x, t, w, pos_weight=q, reduction=r)
                for f in (functional, F)
            )
            assert_conforms(ours, theirs, [x, t, w, q], frozen=(2, 3))


SPECIAL = [0.0, -0.0, 0.3, 0.4, -0.4, 1.0, -1.0, 1e-6, 20.0, -20.0, 1000.0, -1000.0, INF, -INF, NAN]


@calls
@pytest.mark.parametrize(("backend", "dtype"), PAIRS[:-1], indirect=["backend"])
def test_kinks_large_values_nan_and_infinity(backend, device, dtype, call):
    """Every value against targets on both sides of each kink, one pair at a time as a loss of its own, so that a large one
    hides no small one."""
    probabilities = [0.0, 0.5, 1.0, 1e-6, NAN]
    targets = probabilities if "entropy" in call or call == "kl_div" else [1.0, -1.0, 0.0, 0.3, INF, NAN]
    if call == "kl_div log":
        targets = [0.0, -0.5, -20.0, -INF, NAN]
    grid = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(targets)).to(device, dtype)
    if dtype is torch.float64 and "entropy" in call:
        # There torch's own float64 is no truth: see test_confident_logits.
        grid = grid[grid[:, 0].abs() != 20]
    x, t = grid.unbind(1)
    ours, theirs = both(call, reduction="none")
    found, expected = (run(f, [x, t], torch.ones_like) for f in (ours, theirs))
    truth = run(theirs, [x, t], torch.ones_like, torch.float64)
    for what, a, w, e in zip(("loss", "dx", "dt"), found, truth, expected, strict=True):
        # Beside 1e6 an error of a small one would not show.
        size = w.abs().nan_to_num(0, 0, 0)
        for low, high in ((-1, 1e-3), (1e-3, 2), (2, 1e9)):
            keep = (size > low) & (size <= high)
            assert_accurate(a[keep], w[keep], e[keep], f"{what} of {low} to {high}")


@pytest.mark.parametrize("option", [{"beta": INF}, {"delta": INF}, {"beta": 1e-6}, {"delta": 1e-6}])
def test_parameters_at_their_ends(backend, device, option):
    name = "huber_loss" if "delta" in option else "smooth_l1_loss"
    ours, theirs = (lambda x, t, f=f: getattr(f, name)(x, t, **option) for f in (functional, F))
    assert_conforms(ours, theirs, operands(name, 100, device=device))


@pytest.mark.parametrize("sign", [1, -1])
def test_confident_logits(backend, device, sign):
    """The loss of a logit far on the right side is tiny and exact: torch's own sum of two large terms loses it."""
    x = sign * torch.arange(10.0, 80.0, 3, device=device).requires_grad_()
    t = torch.full_like(x, (1 + sign) / 2)
    loss = functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    truth = F.softplus(-x.detach().abs().double())
    assert ((loss.double() - truth).abs() <= 1e-5 * truth).all()
    loss.sum().backward()


@some(*GRADIENTS)
@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_one_gradient_only(backend, device, call, frozen):
    assert_conforms(*both(call), operands(call, 5, 4, device=device), frozen=frozen)


@some(*GRADIENTS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_upstream_nan_and_infinity(backend, device, call, value):
    def upstream(y):
        dy = torch.ones_like(y)
        dy.view(-1)[:1] = value
        return dy

    assert_conforms(*both(call, reduction="none"), operands(call, 6, device=device), upstream=upstream)


@pytest.mark.parametrize("call", ["mse_loss", "binary_cross_entropy_with_logits", "kl_div", "multi_margin"])
def test_two_backward_passes_and_the_same_bits(backend, device, call):
    if call == "multi_margin":
        target = torch.arange(900, device=device) % 5
        x, t = torch.randn(900, 5, device=device), None
        ours = lambda x: functional.multi_margin_loss(x, target)  # noqa: E731
    else:
        x, t = operands(call, 4500, device=device)
        ours = lambda x: both(call, reduction="mean")[0](x, t)  # noqa: E731
    leaf = x.clone().requires_grad_()
    y = ours(leaf)
    for dy in (
        torch.tensor(2.0, device=device),
        torch.tensor(-0.3, device=device),
        torch.tensor(2.0, device=device),
    ):
        found = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        assert_same_bits([y, *found], run(ours, [x], lambda y, dy=dy: dy))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", ["mse_loss", "kl_div"])
def test_without_gradient(backend, device, call, context, launches):
    ours, _ = both(call)
    x, t = operands(call, 5, device=device)
    with context():
        assert not ours(x.clone().requires_grad_(), t.clone().requires_grad_()).requires_grad
    assert not ours(x, t).requires_grad
    ours(x.clone().requires_grad_(), t).backward()
    if backend == "triton":
        assert [name for name, *_ in launches] == ["_loss_fwd_kernel"] * 3 + ["_loss_bwd_kernel"]


def test_nothing_is_saved_but_the_inputs(backend, device):
    saved = []
    for call in CALLS:
        x, t = operands(call, 5, device=device)
        with torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a) or a, lambda a: a):
            both(call)[0](x.requires_grad_(), t)
        kept = {a.data_ptr() for a in saved}
        # The gradient of the divergence does not depend on its input.
        assert kept == ({t.data_ptr()} if "kl_div" in call else {x.data_ptr(), t.data_ptr()})
        saved.clear()


def test_programs_that_take_several_blocks(device, monkeypatch):
    """As at sizes that no test reaches."""
    monkeypatch.setattr(configs, "loss_programs", lambda blocks: min(blocks, 3))
    with dlgpu.use_backend("triton"):
        for n in (1024 * 3, 1024 * 7 + 5):
            assert_conforms(*both("mse_loss"), operands("mse_loss", n, device=device))


@calls
def test_gradcheck(call):
    x, t = (a.double().requires_grad_() for a in operands(call, 3, 4))
    with dlgpu.use_backend("fallback"):
        for reduction in ("mean", "none"):
            ours, _ = both(call, reduction=reduction)
            assert torch.autograd.gradcheck(ours, [x, t])
            assert torch.autograd.gradgradcheck(ours, [x, t])


def test_gradcheck_with_weights():
    name = "binary_cross_entropy_with_logits"
    x, t = (a.double().requires_grad_() for a in operands(name, 3, 4))
    w, q = torch.rand(3, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    with dlgpu.use_backend("fallback"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(
                lambda x, t: functional.binary_cross_entropy_with_logits(x, t, w, pos_weight=q), [x, t]
            )
            for loss in (functional.mse_loss, functional.l1_loss, functional.huber_loss):
                v = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
                assert check(lambda x, t, v, f=loss: f(x, t, weight=v), [x, t, v])


@some("mse_loss")
def test_second_derivatives(backend, device, call):
    x, t = operands(call, 5, 7, device=device)
    dy = torch.randn(5, 7, device=device)

    def second(function, dtype):
        leaves = [a.detach().to(dtype).requires_grad_() for a in (x, t, dy)]
        first = torch.autograd.grad(function(*leaves[:2]), leaves[:2], leaves[2], create_graph=True)
        return torch.autograd.grad(
            sum(d.square().sum() for d in first), leaves, materialize_grads=True, allow_unused=True
        )

    ours, theirs = both(call, reduction="none")
    for a, w, e in zip(
        second(ours, torch.float32), second(theirs, torch.float64), second(theirs, torch.float32), strict=True
    ):
        assert_accurate(a, w, e)


@calls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torchs_own_operations(call, dtype):
    """The third implementation, for CUDA tensors that no kernel takes; and the table's eager column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlgpu._dispatch.choose_backend", lambda x, op: "torch")
        for reduction in ("none", "mean"):
            assert_conforms(*both(call, reduction=reduction), operands(call, 5, 4, dtype=dtype))
        x, t = torch.randn(6, 5, dtype=dtype), torch.arange(6) % 5
        w = torch.rand(5, dtype=dtype)
        for p in (1, 2):
            ours, theirs = (
                lambda x, w, f=f, p=p: f(x, t, p, weight=w)
                for f in (functional.multi_margin_loss, torch_multi_margin)
            )
            assert_conforms(ours, theirs, [x, w], frozen=(1,))


# Dtypes.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name, dtype):
    x, t = operands(name, 5)
    t = (2 * t).to(dtype)
    for pair in ((x.abs(), t), (t, x.abs())):
        if name in ("kl_div", "binary_cross_entropy_with_logits") and dtype is torch.int64:
            with pytest.raises(TypeError, match=r"must be float32, .* got torch\.int64"):
                getattr(functional, name)(*pair)
            continue
        if pair[0].dtype is torch.int64 and name == "huber_loss":
            # torch's result would be an integer.
            continue
        leaves = [a.clone().requires_grad_(a.is_floating_point()) for a in pair]
        found, expected = (getattr(f, name)(*leaves) for f in (functional, F))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        found.backward()
        for leaf in leaves:
            assert leaf.grad is None or leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [*NAMES, "multi_margin"])
def test_autocast(device, call, to, dtype):
    target = torch.arange(5) % 4
    x, t = operands(call, 5, 4, dtype=dtype)
    for options in ({}, {"reduction": "none"}, {"weight": torch.rand(5, 4).to(dtype)}):
        if "weight" in options and call in ("smooth_l1_loss", "kl_div", "multi_margin"):
            continue
        # torch has no backward for huber_loss of two dtypes, nor before 2.13 for mse_loss of float64 and another.
        old = torch.__version__ < (2, 13) and call == "mse_loss" and dtype is torch.float64
        for pair in ((x, t),) if call == "huber_loss" or old else ((x, t), (x, t.to(to))):
            results = []
            for f in (functional, F):
                leaf = pair[0].clone().requires_grad_()
                with torch.autocast("cpu", dtype=to):
                    if call == "multi_margin":
                        y = f.multi_margin_loss(leaf, target)
                    else:
                        y = getattr(f, call)(leaf, pair[1], **options)
                results.append([y, *torch.autograd.grad(y.sum(), leaf)])
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "huber_loss"), "multi_margin_loss"])
def test_deprecated_arguments(name, size_average, reduce):
    x, t = operands(name, 6, 5)
    t = torch.arange(6) % 5 if name == "multi_margin_loss" else t
    for reduction in ("sum", *["batchmean"] * (name == "kl_div")):
        options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
        found, expected = (getattr(f, name)(x, t, **options) for f in (functional, F))
        torch.testing.assert_close(found, expected)


# Multi-margin.
ROWS = [(1, 1), (300, 2), (17, 10), (9, 70), (3, 1000), (2, 8200), (0, 5)]


# torch's float64 adds long rows up term by term: less exact than the floor asks of a truth.
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("backend", "dtype", "rows", "classes"),
    [(*pair, *size) for pair in PAIRS for size in ROWS if pair[1] is not torch.float64 or size[1] < 100],
    indirect=["backend"],
)
def test_multi_margin_row_lengths(backend, device, dtype, rows, classes, p):
    x = torch.randn(rows, classes, device=device, dtype=dtype)
    target = torch.randint(classes, (rows,), device=device)
    w = torch.rand(classes, device=device, dtype=dtype)
    if rows == 0:
        # torch's own mean and sum are of memory that was never written.
        assert functional.multi_margin_loss(x, target, reduction="sum") == 0
        assert functional.multi_margin_loss(x, target).isnan()
        assert functional.multi_margin_loss(x, target, reduction="none").shape == (0,)
        return
    for reduction in ("mean", "none")[: 1 + (p == 2)]:
        ours, theirs = (
            lambda x, w, f=f, r=reduction: f(x, target, p, 0.7, weight=w, reduction=r)
            for f in (functional.multi_margin_loss, torch_multi_margin)
        )
        assert_conforms(ours, theirs, [x, w], frozen=(1,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_multi_margin_layouts(backend, device, layout):
    x = LAYOUTS[layout](torch.randn(7, 9, device=device))
    target = (torch.arange(14, device=device) % 9)[::2]
    for reduction, upstream in (("sum", None), ("none", lambda y: torch.randn(1, device=device).expand(7))):
        ours, theirs = (
            lambda x, f=f, r=reduction: f.multi_margin_loss(x, target, 2, reduction=r)
            for f in (functional, F)
        )
        assert_conforms(ours, theirs, [x], upstream)


@pytest.mark.parametrize(("shape", "target"), [((4,), 2), ((4,), [2]), ((1,), 0), ((), 0), ((1, 4), [3])])
def test_multi_margin_shapes(backend, device, shape, target):
    target = torch.tensor(target, device=device)
    for reduction in ("none", "mean", "sum"):
        ours, theirs = (
            lambda x, f=f, r=reduction: f.multi_margin_loss(x, target, reduction=r) for f in (functional, F)
        )
        assert_conforms(ours, theirs, [torch.randn(shape, device=device)])


@pytest.mark.parametrize("margin", [1.0, 0.0, -0.5])
@pytest.mark.parametrize("p", [1, 2])
def test_multi_margin_kinks_nan_and_infinity(backend, device, p, margin):
    values = torch.tensor([0.0, 1.0, -1.0, 0.5, INF, -INF, NAN], device=device)
    x = torch.cartesian_prod(values, values, values[:4])
    for k in range(3):
        target = torch.full((len(x),), k, device=device)
        ours, theirs = (
            lambda x, f=f, t=target: f.multi_margin_loss(x, t, p, margin, reduction="none")
            for f in (functional, F)
        )
        assert_conforms(ours, theirs, [x], torch.ones_like)


def test_a_target_that_is_no_class(backend, device):
    target = torch.tensor([0, 5, 1], device=device)
    x = torch.randn(3, 5, device=device)
    if device == "cpu":
        for bad in (target, target - 1):
            with pytest.raises(
                RuntimeError, match=r"target (5|-1) of row [01] is out of range for 5 classes"
            ):
                functional.multi_margin_loss(x, bad)
    else:
        dlgpu.debug()
        with pytest.raises(RuntimeError, match="target 5 of row 1"):
            functional.multi_margin_loss(x, target)
        dlgpu.debug(False)


@pytest.mark.parametrize("columns", [5, 8200])
def test_a_target_that_is_no_class_is_nan_on_a_gpu(device, columns):
    """And touches no memory that is not there."""
    target = torch.tensor([0, columns, 1, -1, 2], device=device)
    x = torch.randn(5, columns, device=device)
    loss = kernels.multi_margin_fwd(x, target, None, 1, 1.0, "none")
    dx = kernels.multi_margin_bwd(torch.ones(5, device=device), x, target, None, 1, 1.0, "none")
    bad = torch.tensor([False, True, False, True, False], device=device)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(dx.isnan(), bad[:, None].expand(dx.shape))
    assert kernels.multi_margin_fwd(x, target, None, 1, 1.0, "mean").isnan()


@pytest.mark.parametrize("p", [1, 2])
def test_a_target_that_is_no_class_in_torchs_own_operations(device, p):
    """The same where they stand in for the kernels, for float64 and for second derivatives."""
    target = torch.tensor([0, 5, 1, -1, 2], device=device)
    x = torch.randn(5, 5, dtype=torch.float64, device=device, requires_grad=True)
    bad = torch.tensor([False, True, False, True, False], device=device)
    loss = ops._multi_margin_terms(x, target, None, p, 1.0, "none")
    ones = torch.ones_like(loss)
    backward = ops._multi_margin_bwd_eager(ones, x, target, None, p, 1.0, "none")
    for dx in (backward, *torch.autograd.grad(loss, x, ones)):
        assert torch.equal(dx.isnan().all(1), bad)
        assert torch.equal(dx.isnan().any(1), bad)
    assert torch.equal(loss.isnan(), bad)


def test_multi_margin_is_twice_differentiable(backend, device):
    """Which torch's is not: against the same from torch's operations."""
    x = torch.randn(6, 5, device=device)
    w, target = torch.rand(5, device=device), torch.arange(6, device=device) % 5

    def by_hand(x, w, p):
        z = F.relu(0.8 - x.gather(1, target[:, None]) + x) ** p
        z = z.masked_fill(F.one_hot(target, 5) > 0, 0)
        return (z.sum(1) * w[target] / 5).mean()

    def second(function, dtype, p):
        leaf = x.detach().to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(function(leaf, w.to(dtype), p), leaf, create_graph=True)
        return [first, *torch.autograd.grad(first.sin().sum(), leaf)]

    def ours(x, w, p):
        return functional.multi_margin_loss(x, target, p, 0.8, w)

    # At p = 1 the second derivative is 0.
    for a, t, e in zip(
        second(ours, torch.float32, 2),
        second(by_hand, torch.float64, 2),
        second(by_hand, torch.float32, 2),
        strict=True,
    ):
        assert_accurate(a, t, e)
    if device == "cpu":
        leaf = x.double().requires_grad_()
        with dlgpu.use_backend("fallback"):
            for p in (1, 2):
                assert torch.autograd.gradcheck(lambda x, p=p: ours(x, w.double(), p), leaf)
                assert torch.autograd.gradgradcheck(lambda x, p=p: ours(x, w.double(), p), leaf)


# Errors.
X, T = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
bce, margin = functional.binary_cross_entropy_with_logits, functional.multi_margin_loss
TABLE = [
    *(
        (getattr(functional, name), (1, X), {}, TypeError, "input must be a Tensor, got int")
        for name in NAMES
    ),
    *(
        (getattr(functional, name), (X, 1), {}, TypeError, "target must be a Tensor, got int")
        for name in NAMES
    ),
    *(
        (getattr(functional, name), (X, X), {"reduction": "avg"}, ValueError, "none, mean, sum.*, got 'avg'")
        for name in NAMES
    ),
    *(
        (
            getattr(functional, name),
            (X.cfloat(), X.cfloat()),
            {},
            TypeError,
            "input must be float32, .*complex64",
        )
        for name in NAMES
    ),
    (functional.mse_loss, (X.int(), X.int()), {}, TypeError, "input must be float32, .* torch.int32"),
    (
        functional.mse_loss,
        (X, X[:, :2]),
        {},
        RuntimeError,
        r"target has shape \[2, 2\], which does not broadcast",
    ),
    (functional.mse_loss, (X, X), {"weight": X[0]}, ValueError, r"weight has shape \[3\], expected \[2, 3\]"),
    (functional.mse_loss, (X, X), {"weight": 2.0}, TypeError, "weight must be a Tensor, got float"),
    (functional.mse_loss, (X, X.to("meta")), {}, RuntimeError, "target is on meta, expected cpu"),
    (functional.l1_loss, (X, X), {"weight": X.to("meta")}, RuntimeError, "weight is on meta, expected cpu"),
    (functional.mse_loss, (X, X), {"reduction": "batchmean"}, ValueError, "got 'batchmean'"),
    (functional.mse_loss, (X, X), {"weight": X, "reduction": "avg"}, ValueError, "got 'avg'"),
    (functional.smooth_l1_loss, (X, X), {"beta": -1.0}, RuntimeError, "beta must not be negative, got -1.0"),
    (functional.smooth_l1_loss, (X, X), {"beta": NAN}, RuntimeError, "beta must not be negative, got nan"),
    (functional.smooth_l1_loss, (X, X), {"beta": "a"}, TypeError, "beta must be a number, got str"),
    (functional.huber_loss, (X, X), {"delta": 0}, RuntimeError, "delta must be positive, got 0"),
    (functional.huber_loss, (X, X), {"delta": None}, TypeError, "delta must be a number, got NoneType"),
    (bce, (X, X[0]), {}, ValueError, r"target has shape \[3\], expected \[2, 3\]"),
    (bce, (X, X.int()), {}, TypeError, "target must be float32, .* torch.int32"),
    (
        bce,
        (X, X),
        {"weight": torch.ones(2)},
        RuntimeError,
        r"weight has shape \[2\], which does not broadcast",
    ),
    (bce, (X, X), {"pos_weight": X[None]}, RuntimeError, r"pos_weight has shape \[1, 2, 3\], which does not"),
    (bce, (X, X), {"pos_weight": 1.0}, TypeError, "pos_weight must be a Tensor, got float"),
    (bce, (X, X), {"weight": X.clone().requires_grad_()}, RuntimeError, "weight requires a gradient"),
    (bce, (X, X), {"pos_weight": X.clone().requires_grad_()}, RuntimeError, "pos_weight requires a gradient"),
    (functional.hinge_loss, (X, X[0]), {}, ValueError, r"target has shape \[3\], expected \[2, 3\]"),
    (functional.hinge_loss, (X, X, "avg"), {}, ValueError, "reduction must be .*, got 'avg'"),
    (functional.hinge_loss, (X, X, "mean", True), {}, TypeError, "positional arguments"),
    (functional.kl_div, (X, X.int()), {}, TypeError, "target must be float32, .* torch.int32"),
    (functional.kl_div, (X, X[:, :2]), {"reduction": "sum"}, RuntimeError, "does not broadcast"),
    (margin, (1, T), {}, TypeError, "input must be a Tensor, got int"),
    (margin, (X, 1), {}, TypeError, "target must be a Tensor, got int"),
    (margin, (X, T.int()), {}, TypeError, "target has dtype torch.int32, expected torch.int64"),
    (margin, (X, T[:1]), {}, RuntimeError, r"target has shape \[1\], expected \[2\]"),
    (margin, (X[None], T[None]), {}, RuntimeError, r"input has shape \[1, 2, 3\], expected \[N, C\]"),
    (margin, (X[:, :0], T), {}, RuntimeError, r"input has shape \[2, 0\]: no classes"),
    (margin, (X, T, 3), {}, ValueError, "p must be 1 or 2, got 3"),
    (margin, (X, T, 1, "a"), {}, TypeError, "margin must be a number, got str"),
    (margin, (X, T), {"weight": X}, ValueError, r"weight has shape \[2, 3\], expected one dimension"),
    (margin, (X, T), {"weight": X[:, 0]}, RuntimeError, r"weight has shape \[2\], expected \[3\]"),
    (
        margin,
        (X, T),
        {"weight": X[0].double()},
        TypeError,
        "weight has dtype torch.float64, expected torch.float32",
    ),
    (margin, (X, T), {"weight": X[0].clone().requires_grad_()}, RuntimeError, "weight requires a gradient"),
    (margin, (X, T), {"reduction": "avg"}, ValueError, "reduction must be .*, got 'avg'"),
    (dlgpu.explain, ("mse_loss", 1, X), {}, TypeError, "input must be a Tensor, got int"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0].__name__} {row[4]}")
def test_bad_input(row):
    function, args, kwargs, error, message = row
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


# Modules.
MODULES = {
    "MSELoss": {},
    "L1Loss": {},
    "SmoothL1Loss": {"beta": 0.5},
    "HuberLoss": {"delta": 0.5},
    "BCEWithLogitsLoss": {"weight": torch.rand(3), "pos_weight": torch.rand(3)},
    "MultiMarginLoss": {"p": 2, "weight": torch.rand(3)},
    "KLDivLoss": {"log_target": True, "reduction": "batchmean"},
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_torchs(name):
    ours, theirs = (getattr(library, name)(**MODULES[name]) for library in (nn, torch.nn))
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(4, 3)
    t = torch.arange(4) % 3 if name == "MultiMarginLoss" else torch.rand(4, 3)
    torch.testing.assert_close(ours(x, t), theirs(x, t))


def test_the_hinge_module():
    x, t = operands("hinge", 5)
    for squared in (False, True):
        found = nn.HingeLoss("sum", squared=squared)(x, t)
        torch.testing.assert_close(found, torch_hinge(x, t, "sum", squared))


# torch's own module data of the losses.
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in MODULES}


def test_torch_has_data_of_each_module():
    assert set(INFOS) == set(MODULES)


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS[:2], indirect=["backend"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_torchs_module_data(backend, dtype, name):
    info = INFOS[name]
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert len(samples) > 3
    for sample in samples:
        made, called = sample.constructor_input, sample.forward_input
        results = []
        for library in (nn, torch.nn):
            module = getattr(library, name)(*made.args, **made.kwargs).to(dtype)
            args = [a.detach().clone().requires_grad_(a.requires_grad) for a in called.args]
            y = module(*args, **called.kwargs)
            wanted = [a for a in args if a.requires_grad]
            results.append([y, *torch.autograd.grad(y.sum(), wanted)])
            if library is nn and sample.reference_fn is not None:
                with torch.no_grad():
                    plain = [a.detach() for a in called.args]
                    expected = sample.reference_fn(module, *plain, **called.kwargs)
                torch.testing.assert_close(y.detach(), expected, equal_nan=True)
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("bug", [lambda d: d * (1 + 1e-3), lambda d: d + 1e-3, lambda d: d.roll(1, -1)])
@calls
def test_the_gate_fails_on_a_seeded_bug(call, bug):
    ours, theirs = both(call, reduction="none")
    pair = operands(call, 64)
    found, expected = (run(f, pair, torch.sin) for f in (ours, theirs))
    truth = run(theirs, pair, torch.sin, torch.float64)
    for a, t, e in zip(found, truth, expected, strict=True):
        if a.abs().max() > 0 and not torch.equal(bug(a), a):
            with pytest.raises(AssertionError, match="error"):
                assert_accurate(bug(a), t, e)


# Bytes.
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")


def held_to(laws, meter):
    assert [(launch.kernel, launch.compulsory, launch.requested) for launch in meter.launches] == laws
    assert all(launch.clean for launch in meter.launches)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [7, 1024, 4103])
@pytest.mark.parametrize("name", ["mse_loss", "kl_div"])
def test_byte_laws(name, n, dtype):
    """Forward reads 2 n and, for "none", writes n; backward reads 2 n and writes n. The divergence's input is not read
    backward, and a gradient of the target costs a write alone."""
    from dlgpu.bench.meter import TrafficMeter

    x, t = torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype)
    size, programs = dtype.itemsize, math.ceil(n / configs.loss_tile(dtype).block)
    with TrafficMeter() as meter:
        loss = kernels.loss_fwd(x, t, None, None, name, 1.0, "mean")
        kernels.loss_bwd(loss, x, t, None, None, name, 1.0, "mean", (True, False))
        kernels.loss_bwd(loss, x, t, None, None, name, 1.0, "mean", (True, True))
        losses = kernels.loss_fwd(x, t, None, None, name, 1.0, "none")
        kernels.loss_bwd(losses, x, t, None, None, name, 1.0, "none", (False, True))
    read = size * n
    few = programs == 1
    # One upstream gradient, which each program reads, and the first once more for the tail behind whole vectors.
    one, asked = size, size * (programs + 1)
    operands_read = read if name == "kl_div" else 2 * read
    forward = 2 * read + (size if few else 4 * programs)
    laws = [("_loss_fwd_kernel", forward, forward)]
    if not few:
        laws.append(("_loss_reduce_kernel", 4 * programs + size, 4 * programs + size))
    held_to(
        [
            *laws,
            ("_loss_bwd_kernel", operands_read + read + one, operands_read + read + asked),
            ("_loss_bwd_kernel", 4 * read + one, 4 * read + asked),
            ("_loss_fwd_kernel", 3 * read, 3 * read),
            ("_loss_bwd_kernel", 4 * read, 4 * read),
        ],
        meter,
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_byte_laws_with_weights(dtype):
    """A vector of weights that repeats is moved once, and asked for with each element."""
    from dlgpu.bench.meter import TrafficMeter

    name, size, shape = "binary_cross_entropy_with_logits", dtype.itemsize, (30, 100)
    x, t, w = (torch.rand(shape, dtype=dtype) for _ in range(3))
    q = torch.rand(100, dtype=dtype)
    with TrafficMeter() as meter:
        loss = kernels.loss_fwd(x, t, w, q, name, 0.0, "none")
        kernels.loss_bwd(loss, x, t, w, q, name, 0.0, "none", (True, False))
    n = 3000 * size
    held_to(
        [
            ("_loss_fwd_kernel", 4 * n + 100 * size, 5 * n),
            ("_loss_bwd_kernel", 5 * n + 100 * size, 6 * n),
        ],
        meter,
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "C"), [(1, 1), (5, 3), (700, 10), (9, 300), (2, 8192), (2, 8200)])
def test_byte_laws_of_multi_margin(dtype, N, C):
    """One read forward; one read and one write backward, two reads for a row that fits no tile."""
    from dlgpu.bench.meter import TrafficMeter

    x, size = LAYOUTS["rows apart"](torch.randn(N, C, dtype=dtype)), dtype.itemsize
    target = torch.arange(N) % C
    programs = math.ceil(N / configs.multi_margin_tile(dtype, C).block_m)
    with TrafficMeter() as meter:
        loss = kernels.multi_margin_fwd(x, target, None, 1, 1.0, "mean")
        kernels.multi_margin_bwd(loss, x, target, None, 1, 1.0, "mean")
    n, rows = size * N * C, 8 * N
    result = size if programs == 1 else 4 * programs
    again = n if C > 8192 else 0
    laws = [("_multi_margin_fwd_kernel", n + rows + result, n + rows + size * N + result)]
    if programs > 1:
        laws.append(("_loss_reduce_kernel", 4 * programs + size, 4 * programs + size))
    # x_t is asked for once more by itself, and the upstream gradient by each row.
    laws.append(
        (
            "_multi_margin_bwd_kernel",
            2 * n + rows + size,
            2 * n + rows + size + size * N + again + size * (N - 1),
        )
    )
    held_to(laws, meter)
