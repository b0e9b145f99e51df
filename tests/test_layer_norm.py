"""Layer norm and RMS norm against torch, forward and backward, on every backend; and their byte laws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_modules import module_db

import dlgpu.functional
import dlgpu.nn
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import layer_norm as kernels
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

INF, NAN = float("inf"), float("nan")
NAMES = ("layer_norm", "rms_norm")
names = pytest.mark.parametrize("name", NAMES)


def functions(name, dims=1, eps=1e-5):
    """(ours, torch's) of (x, w, b); RMS norm has no b."""

    def of(module):
        function = getattr(module, name)
        if name == "rms_norm":
            return lambda x, w=None: function(x, x.shape[-dims:], w, eps)
        return lambda x, w=None, b=None: function(x, x.shape[-dims:], w, b, eps)

    return of(dlgpu.functional), of(F)


def sample(name, shape, dims=1, dtype=torch.float32, device="cpu"):
    x = 2 * torch.randn(shape, dtype=dtype, device=device) + 1
    parameters = [torch.randn(shape[len(shape) - dims :], dtype=dtype, device=device) for _ in range(2)]
    return [x, *parameters[: 1 if name == "rms_norm" else 2]]


# Several rows a program; one; rows longer than backward's registers, and than forward's.
SHAPES = [(37, 3), (70, 64), (9, 127), (3, 1000), (19, 1024), (2, 9001), (2, 40000)]


@pytest.mark.parametrize(
    ("backend", "dtype", "name", "shape"),
    [
        (*pair, name, shape)
        for pair in PAIRS
        for name in NAMES
        for shape in SHAPES
        # The kernels take bfloat16's way for float16.
        if pair != ("triton", torch.float16) or shape[1] in (127, 1024)
    ],
    indirect=["backend"],
)
def test_row_lengths(backend, device, dtype, name, shape):
    assert_conforms(*functions(name), sample(name, shape, 1, dtype, device))


@names
@pytest.mark.parametrize("shape", [(1, 1), (33, 1), (5, 2)])
def test_rows_of_one_or_two(backend, device, name, shape):
    """Layer norm of one is its bias, of two nearly -1 and 1: gradients of rounding errors, which no tolerance relative to
    them admits."""
    args = sample(name, shape, device=device)
    for a, b in zip(*(run(f, args, torch.sin) for f in functions(name)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@names
@pytest.mark.parametrize("parameters", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_parameters(backend, device, dtype, name, parameters):
    for shape in ((5, 24), (2, 9000)):
        args = sample(name, shape, 1, dtype, device)[: 1 + parameters]
        assert_conforms(*functions(name), args)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("shape", [(35, 24), (2, 9000)])
def test_frozen(backend, device, shape, frozen):
    assert_conforms(*functions("layer_norm"), sample("layer_norm", shape, 1, device=device), frozen=frozen)


def test_a_bias_alone(backend, device):
    x, _, b = sample("layer_norm", (5, 24), device=device)
    ours, theirs = functions("layer_norm")
    assert_conforms(lambda x, b: ours(x, None, b), lambda x, b: theirs(x, None, b), [x, b])


@names
@pytest.mark.parametrize(("shape", "dims"), [((7,), 1), ((2, 3, 4), 2), ((2, 3, 4), 3), ((2, 1, 3, 5), 2)])
def test_dimensions(backend, device, name, shape, dims):
    assert_conforms(*functions(name, dims), sample(name, shape, dims, device=device))


@names
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 0, 3)])
def test_empty(backend, device, name, shape):
    args = sample(name, shape, device=device)
    for a, b in zip(*(run(f, args, torch.ones_like) for f in functions(name)), strict=True):
        torch.testing.assert_close(a, b)


# Upstream gradients are read as they lie, too.
UPSTREAM = {
    "random": torch.randn_like,
    "one": lambda y: torch.ones((), device=y.device).expand(y.shape),
    "stride 0": lambda y: torch.randn_like(y[:1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1], device=y.device).t(),
}


@pytest.mark.parametrize(
    ("name", "layout", "upstream"),
    [
        # Of a constant row layer norm has no variance.
        *(("layer_norm", layout, "random") for layout in LAYOUTS if layout != "stride 0 both ways"),
        *(("layer_norm", "contiguous", upstream) for upstream in UPSTREAM),
        ("rms_norm", "transposed", "stride 0"),
        ("rms_norm", "stride 0 both ways", "transposed"),
    ],
)
def test_layouts(backend, device, name, layout, upstream):
    x, *parameters = sample(name, (9, 24), device=device)
    assert_conforms(*functions(name), [LAYOUTS[layout](x), *parameters], UPSTREAM[upstream])
    if layout == "contiguous" and upstream != "one":
        # Rows that are cut: the upstream gradient is read by two kernels.
        x, *parameters = sample(name, (3, 9000), device=device)
        assert_conforms(*functions(name), [x, *parameters], UPSTREAM[upstream])


@names
@pytest.mark.parametrize(("columns", "offset"), [(24, 1e4), (40000, -1e4)])
def test_large_means(backend, device, name, columns, offset):
    """Unit variance about 1e4: a sum of squares would lose it."""
    x, *parameters = sample(name, (3, columns), device=device)
    assert_conforms(*functions(name), [torch.randn_like(x) + offset, *parameters])


CASES = {
    "one NaN": lambda n: torch.where(torch.arange(n) == 3, NAN, torch.randn(n)),
    "one inf": lambda n: torch.where(torch.arange(n) == 3, INF, torch.randn(n)),
    "two infs": lambda n: torch.where(
        torch.arange(n) == 3, INF, torch.where(torch.arange(n) == 2, -INF, 1.0)
    ),
    "zeros": torch.zeros,
}


@pytest.mark.parametrize(("name", "columns"), [("layer_norm", 5), ("layer_norm", 17000), ("rms_norm", 5)])
def test_nan_and_infinity(backend, device, name, columns):
    """A row's NaN stays its own."""
    rows = [x for case in CASES.values() for x in (torch.randn(columns), case(columns))]
    x = torch.stack(rows[:6] if columns > 5 else rows).to(device)
    ours, theirs = functions(name)
    truth, expected = theirs(x.double()), theirs(x)
    assert_accurate(ours(x), truth, expected)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ours(leaf), leaf, torch.randn_like(x))
    assert dx[::2].isfinite().all()
    assert dx[5].isnan().all()
    assert columns > 5 or dx[7].isfinite().all()


@names
def test_mixed_dtypes(backend, device, name):
    """16-bit rows with float32 parameters, as torch takes them."""
    ours, theirs = functions(name)
    for dtype in (torch.bfloat16, torch.float16):
        x, *parameters = sample(name, (9, 40), device=device)
        args = [x.to(dtype), *parameters]
        found = run(ours, args, torch.ones_like)
        truth = run(theirs, args, torch.ones_like, torch.float64)
        if name == "layer_norm" and device == "cpu":
            expected = run(theirs, args, torch.ones_like)
        else:
            # torch rounds on its way here.
            expected = [t.to(f.dtype) for t, f in zip(truth, found, strict=True)]
        for a, t, e in zip(found, truth, expected, strict=True):
            assert a.dtype == e.dtype
            assert_accurate(a, t, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rms_norm_default_eps(dtype):
    """Torch's: the epsilon of what it computes in."""
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    found, expected = (f.rms_norm(x, (8,)) for f in (dlgpu.functional, F))
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    assert dlgpu.nn.RMSNorm(8).eps is None


@names
def test_two_backward_passes(backend, device, name):
    ours, _ = functions(name)
    args = [a.requires_grad_() for a in sample(name, (70, 24), device=device)]
    y = ours(*args)
    first, second = torch.randn_like(y), torch.randn_like(y)
    for dy in (first, second, first):
        found = torch.autograd.grad(y, args, dy, retain_graph=True)
        assert_same_bits([y, *found], run(ours, args, lambda y, dy=dy: dy))


@names
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(backend, device, name, context, launches):
    ours, _ = functions(name)
    args = [a.requires_grad_() for a in sample(name, (9, 24), device=device)]
    with context():
        assert not ours(*args).requires_grad
    assert not ours(*(a.detach() for a in args)).requires_grad
    y = ours(*args)
    y.backward(torch.ones_like(y))
    if backend == "triton":
        stats = [launched[2][4] is not None for launched in launches if "fwd" in launched[0]]
        assert stats == [False, False, True]
        assert [n for n, *_ in launches[2:]] == [
            "_layer_norm_fwd_kernel",
            "_layer_norm_bwd_kernel",
            "_parameter_gradients_kernel",
        ]


@names
def test_gradcheck(name):
    ours, _ = functions(name, dims=2)
    args = [a.requires_grad_() for a in sample(name, (3, 2, 4), 2, torch.float64)]
    with dlgpu.use_backend("fallback"):
        assert torch.autograd.gradcheck(ours, args)
        assert torch.autograd.gradgradcheck(ours, args)
        assert torch.autograd.gradcheck(ours, args[:1])
        assert torch.autograd.gradgradcheck(ours, args[:1])


@names
def test_second_derivatives(backend, device, name):
    args = sample(name, (5, 7), device=device)
    dy = torch.randn(5, 7, device=device)

    def second(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*args, dy)]
        first = torch.autograd.grad(function(*leaves[:-1]), leaves[:-1], leaves[-1], create_graph=True)
        return torch.autograd.grad(sum(f.sin().sum() for f in first), leaves, allow_unused=True)

    ours, theirs = functions(name)
    for a, t, e in zip(
        second(ours, torch.float32), second(theirs, torch.float64), second(theirs, torch.float32), strict=True
    ):
        assert (a is None) == (e is None)
        if a is not None:
            assert_accurate(a, t, e)


X = torch.ones(4, 3)
BAD = [
    ((1, (3,)), TypeError, "input must be a Tensor, got int"),
    ((X.int(), (3,)), TypeError, "input must be float32, .* got torch.int32"),
    ((X, 3), TypeError, "normalized_shape must be a tuple of ints, got int"),
    ((X, (1.5,)), TypeError, "normalized_shape must be an integer, got float"),
    ((X, ()), RuntimeError, "normalized_shape is empty"),
    ((X, (2,)), RuntimeError, r"input has shape \[4, 3\], expected \[\*, 2\]"),
    ((X[0], (4, 3)), RuntimeError, r"input has shape \[3\], expected \[\*, 4, 3\]"),
    ((X, (3,), 1.0), TypeError, "weight must be a Tensor, got float"),
    ((X, (3,), torch.ones(4)), RuntimeError, r"weight has shape \[4\], expected \[3\]"),
    ((X, (3,), X[0].double()), TypeError, "weight has dtype torch.float64, expected torch.float32"),
    ((X, (3,), X[0].bfloat16()), TypeError, "weight has dtype torch.bfloat16, expected torch.float32"),
    ((X.double(), (3,), X[0]), TypeError, "weight has dtype torch.float32, expected torch.float64"),
    ((X, (3,), X[0].to("meta")), RuntimeError, "weight is on meta, expected cpu"),
]


@names
@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(name, args, error, message):
    with pytest.raises(error, match=rf"{name}: .*{message}"):
        getattr(dlgpu.functional, name)(*args)


def test_bad_bias_and_eps():
    with pytest.raises(RuntimeError, match=r"bias has shape \[4\], expected \[3\]"):
        dlgpu.functional.layer_norm(X, (3,), None, torch.ones(4))
    half = X.bfloat16()
    with pytest.raises(
        TypeError, match=r"bias has dtype torch\.bfloat16, expected torch\.float32, .* weight"
    ):
        dlgpu.functional.layer_norm(half, (3,), X[0], half[0])
    with pytest.raises(TypeError, match="eps must be a number, got str"):
        dlgpu.functional.layer_norm(X, (3,), eps="a")


def module_inputs(device="cpu"):
    """(name, description, arguments of the module, its input) of torch's own data."""
    for info in module_db:
        name = info.module_cls.__name__
        if info.module_cls.__module__.startswith("torch.nn") and name in ("LayerNorm", "RMSNorm"):
            for row in info.module_inputs_func(
                info, device=device, dtype=torch.float32, requires_grad=False, training=True
            ):
                yield pytest.param(name, row.constructor_input, row.forward_input, id=f"{name} {row.desc}")


@pytest.mark.parametrize(("name", "made", "given"), list(module_inputs()))
def test_torchs_module_data(backend, device, name, made, given):
    """Every row of torch.testing's module_db: parameters and state of the same seed, results and gradients."""
    modules = []
    for namespace in (dlgpu.nn, torch.nn):
        torch.manual_seed(3)
        modules.append(getattr(namespace, name)(*made.args, **made.kwargs).to(device))
    ours, theirs = modules
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    (x,) = (a.to(device) for a in given.args)
    parameters = [p.detach() for p in theirs.parameters()]
    for p in parameters:
        p.normal_()

    def call(module):
        keys = [key for key, _ in module.named_parameters()]
        return lambda x, *ps: torch.func.functional_call(module, dict(zip(keys, ps, strict=True)), x)

    if x.numel():
        assert_conforms(call(ours), call(theirs), [x, *parameters])
    else:
        for a, b in zip(*(run(call(m), [x, *parameters], torch.ones_like) for m in modules), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bug", [lambda d: d * (1 + 1e-3), lambda d: d + 1e-4, lambda d: d.roll(1, 0)])
@names
def test_the_gate_fails_on_a_seeded_bug(name, bug):
    args = sample(name, (6, 10))
    ours, theirs = functions(name)
    found, expected = (run(f, args, torch.sin) for f in (ours, theirs))
    truth = run(theirs, args, torch.sin, torch.float64)
    for a, t, e in zip(found, truth, expected, strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(bug(a), t, e)


def cdiv(a, b):
    return -(-a // b)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "C"), [(5, 3), (70, 24), (9, 300), (3, 8192), (2, 9000), (2, 40000)])
@names
def test_byte_laws(dtype, name, N, C):
    """One read and one write forward, two reads and one write backward, and float32 sums of strips of rows; rows too long for
    a program's registers are asked for once more."""
    from dlgpu.bench.meter import TrafficMeter

    rms = name == "rms_norm"
    x = LAYOUTS["rows apart"](torch.randn(N, C, dtype=dtype))
    dy, size, w = torch.randn(N, C, dtype=dtype), dtype.itemsize, torch.randn(C, dtype=dtype)
    b = None if rms else torch.randn(C, dtype=dtype)
    fwd = configs.layer_norm_tile(dtype, C)
    bwd = configs.layer_norm_bwd_tile(90, dtype, C)
    again, again_bwd = fwd.block_n < C, bwd.block_n < C
    assert (again, again_bwd) == (C == 40000, C > 8192)
    with TrafficMeter() as meter:
        _, stats = kernels.layer_norm_fwd(x, w, b, C, 1e-5, rms, True)
        kernels.layer_norm_bwd(dy, x, w, stats, C, rms, (True, True, not rms))
        kernels.layer_norm_fwd(x, w, b, C, 1e-5, rms, False)
        kernels.layer_norm_bwd(dy, x, w, stats, C, rms, (True, False, False))
    matrix, rows, parameters = size * N * C, 4 * (2 - rms) * N, 2 - rms
    forward, weights = 2 * matrix, size * C * parameters
    # Each program asks for the parameters; a block of columns for the rows' statistics, and for their means where it is not
    # the whole row.
    programs = cdiv(N, fwd.block_m)

    def backward(sums):
        tile = configs.layer_norm_bwd_strips(bwd, C, N, 4) if sums else bwd
        strips, across = cdiv(N, tile.rows), cdiv(C, tile.block_n)
        # The weight is asked for by each step of a program, and each step is block_m rows.
        steps = sum(cdiv(min(tile.rows, N - first), tile.block_m) for first in range(0, N, tile.rows))
        partial = 4 * strips * C * parameters * sums
        kept = rows * (1 + again_bwd)
        laws = []
        if again_bwd:
            laws.append(
                (
                    "_layer_norm_means_kernel",
                    2 * matrix + size * C + 2 * rows,
                    2 * matrix + N * size * C + 2 * rows,
                )
            )
        laws.append(
            (
                "_layer_norm_bwd_kernel",
                3 * matrix + size * C + kept + partial,
                3 * matrix + steps * size * C + across * kept + partial,
            )
        )
        if sums:
            laws.append(("_parameter_gradients_kernel", *[partial + weights] * 2))
        return laws

    assert [(launch.kernel, launch.compulsory, launch.requested) for launch in meter.launches] == [
        (
            "_layer_norm_fwd_kernel",
            forward + weights + rows,
            forward + again * matrix + programs * weights + rows,
        ),
        *backward(True),
        ("_layer_norm_fwd_kernel", forward + weights, forward + again * matrix + programs * weights),
        *backward(False),
    ]
    assert all(launch.clean for launch in meter.launches)


def test_headline_law():
    """Of a row of 1024 at 16 bits, all but 3% of backward's bytes are dy, x and dx."""
    if not _triton.INTERPRETED:
        pytest.skip("the meter sees interpreted kernels only")
    from dlgpu.bench.meter import TrafficMeter

    N, C = 64, 1024
    x, dy = (torch.randn(N, C, dtype=torch.bfloat16) for _ in range(2))
    w = torch.ones(C, dtype=torch.bfloat16)
    with TrafficMeter() as meter:
        _, stats = kernels.layer_norm_fwd(x, w, w, C, 1e-5, False, True)
        kernels.layer_norm_bwd(dy, x, w, stats, C, False, (True, True, True))
    forward, backward, add = (launch.compulsory for launch in meter.launches)
    assert 1 <= forward / (4 * N * C) < 1.01
    assert 1 <= backward / (6 * N * C) < 1.09
    assert math.isclose(add, backward - 6 * N * C, rel_tol=0.1)
