"""Batch norm with an activation after it against torch, forward and backward, on every backend; and its byte laws."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_modules import module_db

import dlgpu.functional
import dlgpu.nn
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import batch_norm as kernels
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

INF, NAN = float("inf"), float("nan")

# One launch each way; more, of one column of programs and of several; positions of a channel side by side, in whole vectors
# and not; a batch that is cut in strips there.
SHAPES = [(5, 7), (600, 3), (700, 300), (4, 3, 5), (7, 5, 96), (6, 40, 3), (3, 2, 200), (2, 3, 4, 5)]


def sample(shape, dtype=torch.float32, device="cpu"):
    """x, w, b; and running statistics that are none of the batch's."""
    C = shape[1]
    x = 2 * torch.randn(shape, dtype=dtype, device=device) + 1
    w, b, mean = (torch.randn(C, dtype=dtype, device=device) for _ in range(3))
    return [x, w, b], [mean, torch.rand(C, dtype=dtype, device=device) + 0.5]


def functions(running, training, activation=None, slope=0.01):
    """(ours, torch's) of (x, w, b)."""

    def ours(x, w=None, b=None):
        mean, var = (None if t is None else t.to(x.dtype, copy=True) for t in running)
        return dlgpu.functional.batch_norm(
            x, mean, var, w, b, training, activation=activation, negative_slope=slope
        )

    def theirs(x, w=None, b=None):
        mean, var = (None if t is None else t.to(x.dtype, copy=True) for t in running)
        return lookup(activation).eager(F.batch_norm(x, mean, var, w, b, training), slope)

    return ours, theirs


both_ways = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.mark.parametrize(
    ("backend", "dtype", "shape"),
    [
        (*pair, shape)
        for pair in PAIRS
        for shape in SHAPES
        # The kernels take bfloat16's way for float16.
        if pair != ("triton", torch.float16) or shape in ((700, 300), (7, 5, 96))
    ],
    indirect=["backend"],
)
@both_ways
def test_shapes(backend, device, dtype, shape, training):
    args, running = sample(shape, dtype, device)
    assert_conforms(*functions(running, training), args)


@pytest.mark.parametrize(
    ("activation", "slope"), [*((name, 0.01) for name in ACTIVATIONS), ("leaky_relu", -0.5)]
)
@both_ways
def test_activations(backend, device, activation, slope, training):
    for shape in ((67, 20), (600, 20)):
        args, running = sample(shape, device=device)
        assert_conforms(*functions(running, training, activation, slope), args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_ways
def test_activations_at_16_bits(backend, device, dtype, training):
    """Against the activation of z in float32: torch rounds z in between, which costs its gradient near a bend."""
    for activation in ("relu", "gelu", "tanh"):
        args, running = sample((67, 24), dtype, device)
        ours, theirs = functions(running, training, activation)
        truth = run(theirs, args, torch.ones_like, torch.float64)
        expected = [t.to(dtype) for t in truth]
        for a, t, e in zip(run(ours, args, torch.ones_like), truth, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
            assert (a.double() - t).square().mean() < (
                4 * torch.finfo(dtype).eps * t.square().mean().sqrt()
            ) ** 2


@pytest.mark.parametrize("given", [0, 1])
@both_ways
def test_without_parameters(backend, device, training, given):
    for shape in ((33, 24), (600, 24)):
        args, running = sample(shape, device=device)
        assert_conforms(*functions(running, training, "relu"), args[: 1 + given])
    x, _, b = args
    ours, theirs = functions(running, training)
    assert_conforms(lambda x, b: ours(x, None, b), lambda x, b: theirs(x, None, b), [x, b])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@both_ways
def test_frozen(backend, device, training, frozen):
    for shape in ((33, 24), (600, 24)):
        args, running = sample(shape, device=device)
        assert_conforms(*functions(running, training, "silu"), args, frozen=frozen)


UPSTREAM = {
    "random": torch.randn_like,
    "stride 0": lambda y: torch.randn_like(y[:1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1], device=y.device).permute(*reversed(range(y.dim()))),
}


@pytest.mark.parametrize(
    ("layout", "upstream"),
    [
        # Of equal rows a channel has no variance.
        *((layout, "random") for layout in LAYOUTS if not layout.startswith("stride 0")),
        *(("contiguous", upstream) for upstream in UPSTREAM),
    ],
)
@both_ways
def test_layouts(backend, device, layout, upstream, training):
    (x, *parameters), running = sample((9, 24), device=device)
    assert_conforms(
        *functions(running, training, "gelu"), [LAYOUTS[layout](x), *parameters], UPSTREAM[upstream]
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_layouts_of_three_dimensions(backend, device, order, upstream):
    shape = [(6, 4, 8)[order.index(i)] for i in range(3)]
    x = torch.randn([(6, 4, 8)[i] for i in order], device=device)
    x = x.permute(*[order.index(i) for i in range(3)])
    assert tuple(x.shape) == (6, 4, 8)
    assert len(shape) == 3
    (_, *parameters), running = sample((6, 4, 8), device=device)
    assert_conforms(*functions(running, True, "relu"), [x, *parameters], UPSTREAM[upstream])


def test_parameters_anywhere(backend, device):
    """Parameters and running statistics with gaps between their elements."""
    (x, w, b), (mean, var) = sample((9, 24), device=device)
    spread = [t.new_full((24, 2), NAN) for t in (w, b, mean, var)]
    for wide, t in zip(spread, (w, b, mean, var), strict=True):
        wide[:, 0] = t
    far = [t[:, 0] for t in spread]
    for training in (True, False):
        found = dlgpu.functional.batch_norm(x, *far[2:], *far[:2], training)
        expected = dlgpu.functional.batch_norm(x, mean, var, w, b, training)
        assert_same_bits([found, *far[2:]], [expected, mean, var])


@pytest.mark.parametrize(("shape", "mean"), [((400, 24), 1e4), ((700, 24), 1e4), ((9, 5, 96), -1e4)])
def test_large_means(backend, device, shape, mean):
    """Unit variance about 1e4: a sum of squares would lose it."""
    (_, *parameters), _ = sample(shape, device=device)
    x = torch.randn(shape, device=device) + mean
    assert_conforms(*functions((None, None), True), [x, *parameters])
    C = shape[1]
    kept = torch.zeros(C, device=device), torch.zeros(C, device=device)
    dlgpu.functional.batch_norm(x, *kept, training=True, momentum=1.0)
    truth = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1])
    torch.testing.assert_close(kept[1].double(), truth[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(kept[0].double(), truth[1], rtol=2e-7, atol=0)


def test_a_drifting_batch(backend, device):
    """Each strip and each block of rows has a mean of its own, far from the first one's."""
    (x, *parameters), _ = sample((3000, 24), device=device)
    x += torch.linspace(0, 20, 3000, device=device)[:, None]
    assert_conforms(*functions((None, None), True), [x, *parameters])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("rows", [9, 600])
def test_nan_and_infinity(backend, device, rows, bad):
    """A channel's NaN stays its own."""
    (x, w, b), running = sample((rows, 5), device=device)
    x[3, 2] = bad
    ours, theirs = functions(running, True, "relu")
    args = [x, w, b]
    found, expected = (run(f, args, torch.ones_like) for f in (ours, theirs))
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert a.isnan().any() or a.dim() == 1
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-3, atol=1e-4)
    # In evaluation an element's NaN stays its own.
    y = functions(running, False)[0](*args)
    assert y.isfinite().sum() == y.numel() - 1


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 5, 9), (3, 5, 0)])
@both_ways
def test_empty(backend, device, shape, training):
    args, running = sample(shape, device=device)
    found = run(functions(running, training, "gelu")[0], args, torch.ones_like)
    assert [tuple(t.shape) for t in found] == [shape, shape, shape[1:2], shape[1:2]]
    assert all((t == 0).all() for t in found)
    before = [t.clone() for t in running]
    dlgpu.functional.batch_norm(args[0], *running, training=training)
    assert_same_bits(running, before)


def test_mixed_dtypes(backend, device):
    """16-bit activations with float32 parameters and statistics, as torch takes them."""
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((33, 24), (600, 24)):
            (x, w, b), running = sample(shape, device=device)
            args, results = [x.to(dtype), w, b], []
            for module in (dlgpu.functional, F):
                kept = [t.clone() for t in running]
                results.append(
                    [
                        *run(
                            lambda x, w, b, f=module, kept=kept: f.batch_norm(x, *kept, w, b, True),
                            args,
                            torch.ones_like,
                        ),
                        *kept,
                    ]
                )
            kept = [t.double() for t in running]
            truth = run(
                lambda x, w, b, kept=kept: F.batch_norm(x, *kept, w, b, True),
                args,
                torch.ones_like,
                torch.float64,
            )
            for a, t, e in zip(results[0], [*truth, *kept], results[1], strict=True):
                # An upstream gradient of ones has no dx.
                if t.abs().max() > 1e-6:
                    assert_accurate(a, t, e)


@pytest.mark.parametrize("shape", [(2, 5), (33, 24), (600, 24), (4, 3, 7), (9, 3, 96)])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics(backend, device, shape, momentum):
    """Of several batches: as torch's modules keep them, and exactly as many as they count."""
    C = shape[1]
    ours, theirs = (m.BatchNorm1d(C, momentum=momentum).to(device) for m in (dlgpu.nn, torch.nn))
    truth = torch.nn.BatchNorm1d(C, momentum=momentum).to(device).double()
    for batch in range(1, 4):
        x = torch.randn(shape, device=device) * batch + batch
        for module in (ours, theirs):
            module(x)
        truth(x.double())
        assert ours.num_batches_tracked.item() == batch
        assert ours.num_batches_tracked.dtype == torch.int64
        for name in ("running_mean", "running_var"):
            assert_accurate(getattr(ours, name), getattr(truth, name), getattr(theirs, name), name)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.eval()(x)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_no_part_of_the_graph(momentum):
    """By torch's own functions neither, with an average over all batches or an input of another dtype than the statistics."""
    with dlgpu.use_backend("auto"):
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = (m.BatchNorm1d(3, momentum=momentum) for m in (dlgpu.nn, torch.nn))
            for _ in range(2):
                x = torch.randn(6, 3, dtype=dtype, requires_grad=True)
                ours(x).sum().backward()
                theirs(x.float()).sum().backward()
            assert not ours.running_mean.requires_grad
            assert not ours.running_var.requires_grad
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_only_one_running_statistic(backend, device):
    (x, *_), (mean, var) = sample((9, 4), device=device)
    both = mean.clone(), var.clone()
    dlgpu.functional.batch_norm(x, *both, training=True)
    dlgpu.functional.batch_norm(x, mean, None, training=True)
    dlgpu.functional.batch_norm(x, None, var, training=True)
    assert_same_bits([mean, var], both)


def test_version_counters(backend, device):
    """What is changed in place counts, so that autograd refuses a graph that still needs the old values."""
    (x, *_), (mean, var) = sample((9, 4), device=device)
    dlgpu.functional.batch_norm(x, mean, var)
    assert (mean._version, var._version) == (0, 0)
    before = mean._version
    dlgpu.functional.batch_norm(x, mean, var, training=True)
    assert mean._version > before
    assert var._version > 0


def test_evaluation_keeps_its_statistics(backend, device):
    """Backward uses the statistics of its forward, whatever training did to the running ones in between."""
    args, running = sample((9, 4), device=device)
    leaf = args[0].clone().requires_grad_()
    y = dlgpu.functional.batch_norm(leaf, *running)
    (expected,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
    dlgpu.functional.batch_norm(args[0] + 5, *running, training=True)
    (found,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert_same_bits([found], [expected])


@both_ways
@pytest.mark.parametrize("rows", [67, 600])
def test_two_backward_passes(backend, device, training, rows):
    args, running = sample((rows, 24), device=device)
    ours, _ = functions(running, training, "tanh")
    args = [a.requires_grad_() for a in args]
    y = ours(*args)
    first, second = torch.randn_like(y), torch.randn_like(y)
    for dy in (first, second, first):
        found = torch.autograd.grad(y, args, dy, retain_graph=True)
        assert_same_bits([y, *found], run(ours, args, lambda y, dy=dy: dy))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@both_ways
def test_without_gradient(backend, device, context, training, launches):
    args, running = sample((600, 24), device=device)
    ours, _ = functions(running, training)
    args = [a.requires_grad_() for a in args]
    with context():
        assert not ours(*args).requires_grad
        # Its own statistics, as a module in inference_mode has them.
        kept = torch.zeros(24, device=device), torch.ones(24, device=device)
        dlgpu.functional.batch_norm(args[0], *kept, training=training)
    launches.clear()
    y = ours(*args)
    y.backward(torch.ones_like(y))
    if backend == "triton":
        names = [n.removeprefix("_batch_norm_").removesuffix("_kernel") for n, *_ in launches]
        if training:
            assert names == ["statistics", "finish", "apply", "sums", "_parameter_gradients", "dx"]
        else:
            assert names == ["apply", "sums", "_parameter_gradients"]


@both_ways
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_gradcheck(training, activation):
    for shape in ((5, 3), (3, 2, 4)):
        args, running = sample(shape, torch.float64)
        ours, _ = functions(running, training, activation)
        args = [a.requires_grad_() for a in args]
        with dlgpu.use_backend("fallback"):
            assert torch.autograd.gradcheck(ours, args)
            assert torch.autograd.gradgradcheck(ours, args)
            assert torch.autograd.gradgradcheck(ours, args[:1])


@both_ways
def test_second_derivatives(backend, device, training):
    args, running = sample((7, 5), device=device)
    dy = torch.randn(7, 5, device=device)

    def second(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*args, dy)]
        first = torch.autograd.grad(function(*leaves[:-1]), leaves[:-1], leaves[-1], create_graph=True)
        return torch.autograd.grad(sum(f.sin().sum() for f in first), leaves, allow_unused=True)

    ours, theirs = functions(running, training, "gelu")
    for a, t, e in zip(
        second(ours, torch.float32), second(theirs, torch.float64), second(theirs, torch.float32), strict=True
    ):
        assert (a is None) == (e is None)
        if a is not None:
            assert_accurate(a, t, e)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_operations(training):
    """The third implementation, for CUDA tensors that no kernel takes."""
    for dtype in (torch.float64, torch.float32):
        for shape in ((5, 3), (4, 3, 6)):
            args, running = sample(shape, dtype)
            given = (None, None) if training else tuple(running)

            def ours(x, w, b, given=given):
                own = [None if t is None else t.to(x.dtype) for t in given]
                return torch.ops.dlgpu.batch_norm(
                    x, *own, w, b, None, None, None, 0.0, 1e-5, "silu", 0.01, "torch"
                )

            assert_conforms(ours, functions(running, training, "silu")[1], args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_keeps_its_statistics():
    """In one graph, forward and backward; the running statistics change as they do without."""
    torch._dynamo.reset()
    for momentum in (0.1, None):
        eager = dlgpu.nn.BatchNorm1d(3, momentum=momentum, activation="relu")
        other = copy.deepcopy(eager)
        fast = torch.compile(other, fullgraph=True, backend="aot_eager")
        for batch in range(2):
            x = torch.randn(6, 3) + batch
            found, expected = (run(lambda x, m=m: m(x), [x], torch.sin) for m in (fast, eager))
            assert_same_bits(found, expected)
            assert_same_bits(other.state_dict().values(), eager.state_dict().values())
        assert other.num_batches_tracked.item() == 2
    torch._dynamo.reset()


X, R = torch.ones(4, 3), torch.ones(3)
BAD = [
    ((1, R, R), {}, TypeError, "input must be a Tensor, got int"),
    ((X.int(), R, R), {}, TypeError, "input must be float32, .* got torch.int32"),
    ((X[0], R, R), {}, RuntimeError, r"input has shape \[3\], expected \[N, C\]"),
    ((X, None, None), {}, RuntimeError, "running_mean must be defined in evaluation mode"),
    ((X, R, None), {}, RuntimeError, "running_var must be defined in evaluation mode"),
    ((X, R[:2], R), {}, RuntimeError, "running_mean should contain 3 elements"),
    ((X, R, R[:2]), {}, RuntimeError, "running_var should contain 3 elements"),
    ((X, R, R, R[:2]), {}, RuntimeError, "weight should contain 3 elements"),
    ((X, R, R, R, R[:2]), {}, RuntimeError, "bias should contain 3 elements"),
    ((X, R, R, 1.0), {}, TypeError, "weight must be a Tensor, got float"),
    (
        (X, R.double(), R.double()),
        {},
        TypeError,
        "running_mean has dtype torch.float64, expected torch.float32",
    ),
    ((X, R, R, R.half()), {}, TypeError, "weight has dtype torch.float16, expected torch.float32"),
    ((X.half(), R, R, R.half()), {}, TypeError, "weight has dtype torch.float16, expected torch.float32"),
    ((X, R, R, R.to("meta")), {}, RuntimeError, "weight is on meta, expected cpu"),
    ((X, R.clone().requires_grad_(), R), {}, RuntimeError, "running_mean is not differentiable"),
    (
        (X[:1], R, R),
        {"training": True},
        ValueError,
        "more than 1 value per channel when training, got input size",
    ),
    ((X[:1, :, None], None, None), {"training": True}, ValueError, "more than 1 value per channel"),
    ((X, R, R), {"activation": "rulu"}, ValueError, "activation: got 'rulu', expected None or one of relu"),
    ((X, R, R), {"eps": "a"}, TypeError, "eps must be a number, got str"),
    ((X, R, R), {"momentum": "a"}, TypeError, "momentum must be a number, got str"),
    (
        (X, R, R),
        {"training": True, "momentum": None},
        TypeError,
        "momentum is None, so num_batches_tracked is",
    ),
    (
        (X, R, R),
        {"training": True, "momentum": None, "num_batches_tracked": R[0]},
        TypeError,
        "num_batches_tracked has dtype torch.float32, expected torch.int64",
    ),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        dlgpu.functional.batch_norm(*args, **options)


def test_bad_input_of_the_module():
    layer = dlgpu.nn.BatchNorm1d(3)
    for x, error, message in (
        (X[0], ValueError, r"expected 2D or 3D input \(got 1D input\)"),
        (X[None, None], ValueError, r"expected 2D or 3D input \(got 4D input\)"),
        (X[:, :2], RuntimeError, "running_mean should contain 2 elements"),
        (X[:1], ValueError, "Expected more than 1 value per channel when training"),
    ):
        with pytest.raises(error, match=message):
            layer(x)
    with pytest.raises(ValueError, match="activation: got 'rulu'"):
        dlgpu.nn.BatchNorm1d(3, activation="rulu")
    assert layer.eval()(X[:1]).shape == (1, 3)


def test_the_module_is_torchs():
    torch.manual_seed(5)
    theirs = torch.nn.BatchNorm1d(7, 1e-3, 0.3)
    ours = dlgpu.nn.BatchNorm1d(7, 1e-3, 0.3)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    fused = dlgpu.nn.BatchNorm1d(7, activation="leaky_relu", negative_slope=0.2)
    assert "activation='leaky_relu', negative_slope=0.2" in repr(fused)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(5, 7)
    assert_same_bits([again(x)], [copy.deepcopy(fused)(x)])
    assert dlgpu.nn.BatchNorm1d(7).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def module_inputs():
    for info in module_db:
        if info.module_cls is torch.nn.BatchNorm1d:
            for row in info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
            ):
                yield pytest.param(row.constructor_input, row.forward_input, id=row.desc)


@pytest.mark.parametrize(("made", "given"), list(module_inputs()))
@both_ways
def test_torchs_module_data(backend, device, made, given, training):
    """Every row of torch.testing's module_db: results, gradients and buffers."""
    ours, theirs = (m.BatchNorm1d(*made.args, **made.kwargs).to(device) for m in (dlgpu.nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    (x,) = (a.to(device) for a in given.args)
    parameters = [p.detach().normal_() for p in theirs.parameters()]
    ours.train(training)
    theirs.train(training)
    doubles = copy.deepcopy(theirs).double()

    def call(module, double=None):
        keys = [key for key, _ in module.named_parameters()]

        def function(x, *ps):
            chosen = double if double is not None and x.dtype is torch.float64 else module
            return torch.func.functional_call(chosen, dict(zip(keys, ps, strict=True)), x)

        return function

    if x.numel():
        assert_conforms(call(ours), call(theirs, doubles), [x, *parameters])
    else:
        for a, b in zip(
            *(run(call(m), [x, *parameters], torch.ones_like) for m in (ours, theirs)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_module_data_buffers():
    """The buffers of two batches of each row, in training, are torch's."""
    for made, given in (p.values for p in module_inputs()):
        ours, theirs = (m.BatchNorm1d(*made.args, **made.kwargs) for m in (dlgpu.nn, torch.nn))
        for _ in range(2):
            torch.testing.assert_close(ours(*given.args), theirs(*given.args))
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bug", [lambda d: d * (1 + 1e-3), lambda d: d + 1e-4, lambda d: d.roll(1, 0)])
def test_the_gate_fails_on_a_seeded_bug(bug):
    args, running = sample((12, 10))
    ours, theirs = functions(running, True)
    found, expected = (run(f, args, torch.sin) for f in (ours, theirs))
    truth = run(theirs, args, torch.sin, torch.float64)
    for a, t, e in zip(found, truth, expected, strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(bug(a), t, e)


def cdiv(a, b):
    return -(-a // b)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 24), (600, 24), (700, 300), (9, 5, 96), (4, 5, 7)])
def test_byte_laws(dtype, shape):
    """Training: two reads and one write forward, two reads of each of x and dy and one write backward, once compulsory in one
    launch; evaluation: one read and one write, two reads and one write. And what each channel and each strip has."""
    from dlgpu.bench.meter import TrafficMeter

    x, dy = (torch.randn(shape, dtype=dtype) for _ in range(2))
    N, C, L = (*shape, 1)[:3]
    M, size = N * L, dtype.itemsize
    w, b = (torch.randn(C, dtype=dtype) for _ in range(2))
    running = torch.zeros(C), torch.ones(C)
    with TrafficMeter() as training:
        _, stats = kernels.batch_norm_fwd(x, w, b, *running, None, 0.1, 1e-5, "gelu", 0.0)
        kernels.batch_norm_bwd(dy, x, w, b, stats, True, "gelu", 0.0, (True, True, True))
    with TrafficMeter() as evaluation:
        kernels.batch_norm_eval_fwd(x, *running, w, b, 1e-5, "gelu", 0.0, False)
        kernels.batch_norm_bwd(dy, x, w, b, stats, False, "gelu", 0.0, (True, True, True))
    matrix, kept, parameters, running_bytes = size * N * C * L, 8 * C, 2 * size * C, 16 * C
    tile = configs.batch_norm_tile(dtype, N, C, L, 4, True)

    def law(name, once, again=0):
        return f"_batch_norm_{name}_kernel", once, once + again

    if tile.rows >= M:
        expected = [
            # The statistics begin with each channel's first value.
            law("small_fwd", 2 * matrix + parameters + kept + running_bytes, matrix + size * C),
            # The parameters are read by both passes.
            law("small_bwd", 3 * matrix + 2 * parameters + kept, 2 * matrix + parameters),
        ]
    else:
        S = cdiv(M, tile.rows)
        partial, more = 8 * S * C, S - 1
        expected = [
            # Each strip's statistics, and what puts them together, begin with each channel's first value.
            law("statistics", matrix + partial, S * size * C),
            # The means are read for the mean, and again for the distances from it.
            law("finish", partial + size * C + kept + running_bytes, partial // 2),
            law("apply", 2 * matrix + parameters + kept, more * (parameters + kept)),
            law("sums", 2 * matrix + parameters + kept + partial, more * (parameters + kept)),
            ("_parameter_gradients_kernel", partial + kept, partial + kept),
            law("dx", 3 * matrix + parameters + 2 * kept, more * (parameters + 2 * kept)),
        ]
    assert [(run.kernel, run.compulsory, run.requested) for run in training.launches] == expected
    tile = configs.batch_norm_tile(dtype, N, C, L, 4, False)
    S = cdiv(M, tile.rows)
    partial, more = 8 * S * C, S - 1
    assert [(run.kernel, run.compulsory, run.requested) for run in evaluation.launches] == [
        law("apply", 2 * matrix + parameters + kept, more * (parameters + kept)),
        law("sums", 3 * matrix + parameters + kept + partial, more * (parameters + kept)),
        ("_parameter_gradients_kernel", partial + parameters, partial + parameters),
    ]
    for meter in (training, evaluation):
        assert all(launch.clean for launch in meter.launches)
