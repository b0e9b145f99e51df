"""Softmax, log-softmax and log-sum-exp against torch, forward and backward, on every backend; and their byte laws."""

import math

import pytest
import torch
import torch.nn.functional as F

import dlgpu.functional
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import softmax as kernels
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

INF, NAN = float("inf"), float("nan")

# (ours, torch's)
FUNCTIONS = {
    "softmax": (dlgpu.functional.softmax, F.softmax),
    "log_softmax": (dlgpu.functional.log_softmax, F.log_softmax),
    "logsumexp": (dlgpu.functional.logsumexp, torch.logsumexp),
}
names = pytest.mark.parametrize("name", FUNCTIONS)


def check(name, x, dim=-1, upstream=None, **options):
    ours, theirs = (lambda x, f=f: f(x, dim, **options) for f in FUNCTIONS[name])
    return assert_conforms(ours, theirs, [x], upstream)


# 1 to 512 columns share a program between rows; 40000 take several steps of a program.
@names
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (37, 2), (64, 10), (9, 127), (3, 1000), (2, 4097), (2, 40000), (0, 5), (4, 0)],
)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_row_lengths(backend, device, dtype, name, rows, columns):
    check(name, 2 * torch.randn(rows, columns, dtype=dtype, device=device))


# Upstream gradients are read as they lie, too. One value for all of a softmax's row has a gradient of 0, which no tolerance
# relative to it admits; so each row is the same.
UPSTREAM = {
    "random": torch.randn_like,
    "stride 0": lambda y: torch.randn_like(y[:1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1], device=y.device).permute(*reversed(range(y.dim()))),
}


@names
@pytest.mark.parametrize(
    ("layout", "upstream"),
    [*((layout, "random") for layout in LAYOUTS), ("transposed", "transposed"), ("rows apart", "stride 0")],
)
def test_layouts(backend, device, name, layout, upstream):
    check(name, LAYOUTS[layout](torch.randn(9, 21, device=device)), upstream=UPSTREAM[upstream])


@names
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((), 0),
        ((), -1),
        ((5,), 0),
        ((4, 3), 0),
        ((2, 3, 4), 1),
        ((2, 3, 4), 2),
        ((2, 0, 3), 0),
        ((2, 0, 3), 1),
    ],
)
def test_dimensions(backend, device, name, shape, dim):
    check(name, torch.randn(shape, device=device), dim)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, [1], (0, 2), (-1, 0, 1), (2, 1)])
def test_logsumexp_over_several_dimensions(backend, device, dim, keepdim):
    check("logsumexp", torch.randn(2, 3, 4, device=device), dim, keepdim=keepdim)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4), (1, 2, 3, 2)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_no_dimension_given(name, shape):
    x = torch.randn(shape)
    ours, theirs = FUNCTIONS[name]
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name}"):
        found = ours(x)
    with pytest.warns(UserWarning, match="Implicit dimension"):
        expected = theirs(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_dtype_given(backend, device, name):
    x = torch.randn(5, 7, device=device).bfloat16()
    check(name, x, dtype=torch.float32)
    ours, theirs = FUNCTIONS[name]
    found, expected = (
        f(torch.arange(6, device=device).view(2, 3), 1, dtype=torch.float32) for f in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)


CASES = {
    "all -inf": lambda n: torch.full((n,), -INF),
    "some -inf": lambda n: torch.where(torch.arange(n) % 2 == 0, -INF, torch.randn(n)),
    "first half -inf": lambda n: torch.where(torch.arange(n) < n // 2, -INF, torch.randn(n)),
    "one +inf": lambda n: torch.where(torch.arange(n) == 3, INF, torch.randn(n)),
    "two +inf": lambda n: torch.where(torch.arange(n) % 3 == 0, INF, torch.randn(n)),
    "NaN": lambda n: torch.where(torch.arange(n) == 4, NAN, torch.randn(n)),
    "all NaN": lambda n: torch.full((n,), NAN),
}


# The interpreter's maximum of nothing but NaN warns.
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@names
@pytest.mark.parametrize("columns", [5, 33000])
def test_nan_and_infinity(backend, device, name, columns):
    rows = [case(columns) for case in CASES.values()]
    check(name, torch.stack(rows).to(device))


@names
@pytest.mark.parametrize("value", [NAN, INF])
def test_upstream_nan_and_infinity(backend, device, name, value):
    def upstream(y):
        dy = torch.ones_like(y)
        dy.view(-1)[3] = value
        return dy

    check(name, torch.randn(6, 5, device=device), upstream=upstream)


@names
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values(backend, device, name, dtype, offset):
    x = torch.randn(7, 40, device=device)
    check(name, (x + offset).to(dtype))
    check(name, (30 * x + offset).to(dtype))


@names
def test_two_backward_passes(backend, device, name):
    ours = FUNCTIONS[name][0]
    x = torch.randn(9, 21, device=device, requires_grad=True)
    y = ours(x, -1)
    first, second = torch.randn_like(y), torch.randn_like(y)
    for dy in (first, second, first):
        found = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert_same_bits([y, *found], run(lambda x: ours(x, -1), [x], lambda y, dy=dy: dy))


@names
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(backend, device, name, context, launches):
    ours = FUNCTIONS[name][0]
    x = torch.randn(9, 21, device=device, requires_grad=True)
    with context():
        assert not ours(x, -1).requires_grad
    assert not ours(x.detach(), 1).requires_grad
    y = ours(x, 1)
    y.backward(torch.ones_like(y))
    if backend == "triton":
        stem = "logsumexp" if name == "logsumexp" else "softmax"
        assert [n for n, *_ in launches] == [f"_{stem}_fwd_kernel"] * 3 + [f"_{stem}_bwd_kernel"]


@names
def test_gradcheck(name):
    ours = FUNCTIONS[name][0]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with dlgpu.use_backend("fallback"):
        for dim in (-1, 0):
            assert torch.autograd.gradcheck(lambda x, dim=dim: ours(x, dim), [x])
            assert torch.autograd.gradgradcheck(lambda x, dim=dim: ours(x, dim), [x])


@names
def test_second_derivatives(backend, device, name):
    x = torch.randn(5, 7, device=device)
    dy = torch.randn(5 if name == "logsumexp" else (5, 7), device=device)

    def second(function, dtype):
        leaf, upstream = (t.detach().to(dtype).requires_grad_() for t in (x, dy))
        (first,) = torch.autograd.grad(function(leaf, 1), leaf, upstream, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, upstream))

    ours, theirs = FUNCTIONS[name]
    for a, t, e in zip(
        second(ours, torch.float32), second(theirs, torch.float64), second(theirs, torch.float32), strict=True
    ):
        assert_accurate(a, t, e)


@names
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1, 0), TypeError, "input must be a Tensor, got int"),
        ((torch.ones(2, 3).int(), 1), TypeError, "input must be float32, .* got torch.int32"),
        ((torch.ones(2, 3), 2), IndexError, r"range of \[-2, 1\], but got 2"),
        ((torch.ones(2, 3), -3), IndexError, r"range of \[-2, 1\], but got -3"),
        ((torch.ones(()), 1), IndexError, r"range of \[-1, 0\], but got 1"),
    ],
)
def test_bad_input(name, args, error, message):
    with pytest.raises(error, match=rf"{name}: .*{message}"):
        FUNCTIONS[name][0](*args)


def test_a_dimension_twice():
    with pytest.raises(RuntimeError, match="names a dimension twice"):
        dlgpu.functional.logsumexp(torch.ones(2, 3), (0, -2))


@pytest.mark.parametrize("dim", [0.5, None, (0, 1.5)])
def test_a_dimension_that_is_no_integer(dim):
    with pytest.raises(TypeError):
        dlgpu.functional.logsumexp(torch.ones(2, 3), dim)


@pytest.mark.parametrize("bug", [lambda d: d * (1 + 1e-3), lambda d: d + 1e-5, lambda d: d.roll(1, 0)])
@names
def test_the_gate_fails_on_a_seeded_bug(name, bug):
    x = torch.randn(6, 10)
    ours, theirs = (lambda x, f=f: f(x, 1) for f in FUNCTIONS[name])
    upstream = torch.sin
    found, expected = (run(f, [x], upstream) for f in (ours, theirs))
    truth = run(theirs, [x], upstream, torch.float64)
    for a, t, e in zip(found, truth, expected, strict=True):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(bug(a), t, e)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "C"), [(5, 3), (70, 10), (9, 300), (2, 16383), (2, 32768), (2, 40000)])
def test_byte_laws(dtype, N, C):
    """One read and one write forward, two reads and one write backward; rows too long for a program's registers are asked
    for once more (the probabilities once, where log-softmax's sum does not need them)."""
    from dlgpu.bench.meter import TrafficMeter

    x = LAYOUTS["rows apart"](torch.randn(N, C, dtype=dtype))
    dy, size = torch.randn(N, C, dtype=dtype), dtype.itemsize
    aligned = C * size % 16 == 0
    tiles = [configs.softmax_tile(dtype, C, False, False), configs.softmax_tile(dtype, C, True, aligned)]
    again, again_bwd = (tile.lanes * tile.vector < C for tile in tiles)
    # Rows apart lie off 16-byte boundaries: float32 ones take an address for each element.
    longest = 16384 if dtype is torch.float32 else 32768
    assert (again, again_bwd) == (longest < C, (16384 if aligned else 8192) < C)
    assert configs.softmax_tile(dtype, 32768).lanes * configs.softmax_tile(dtype, 32768).vector == 32768
    with TrafficMeter() as meter:
        for log in (False, True):
            kernels.softmax_bwd(dy, kernels.softmax_fwd(x, log), log)
        lse, stats = kernels.logsumexp_fwd(x)
        kernels.logsumexp_bwd(lse, x, stats)
    across = math.ceil(C / (configs.logsumexp_tile(dtype, C).lanes * configs.logsumexp_tile(dtype, C).vector))
    n, rows = size * N * C, (8 + size) * N
    assert [(launch.kernel, launch.compulsory, launch.requested) for launch in meter.launches] == [
        ("_softmax_fwd_kernel", 2 * n, (2 + again) * n),
        ("_softmax_bwd_kernel", 3 * n, (3 + 2 * again_bwd) * n),
        ("_softmax_fwd_kernel", 2 * n, (2 + again) * n),
        ("_softmax_bwd_kernel", 3 * n, (3 + again_bwd) * n),
        ("_logsumexp_fwd_kernel", n + rows, n + rows),
        ("_logsumexp_bwd_kernel", 2 * n + rows, 2 * n + across * rows),
    ]
    assert all(launch.clean for launch in meter.launches)
