"""The array code by itself: block boundaries, edge cases, and other libraries' arrays. That it agrees with torch's forward
and backward at every dtype, shape and layout is for the tests of each op."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ndtr

from dlgpu.fallback._blocks import BLOCK, for_blocks
from dlgpu.fallback.activations import activation_bwd, activation_fwd
from dlgpu.fallback.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from dlgpu.fallback.linear import linear_bwd, linear_fwd
from dlgpu.fallback.optimizers import adam_step
from dlgpu.kernels.activations import ACTIVATIONS, _np_normal_cdf, lookup, saved_for_backward
from tolerance import assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned")

ACTS = [(None, 0.0), *((name, 0.01) for name in ACTIVATIONS), *(("leaky_relu", s) for s in (-0.5, 0.0, 2.0))]
DTYPES = [np.float32, np.float64]
MAGNITUDES = (0.0, 1e-6, 0.5, 20.0, 60.0, 1e4, 1e30, np.inf, np.nan)


@pytest.fixture(autouse=True)
def _one_thread():
    # Arrays this small cost torch's threads more to share than to compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def normal(*shape, dtype=np.float64):
    return torch.randn(shape, dtype=torch.float64).numpy().astype(dtype)


def frozen(*arrays):
    """Arrays that raise when they are written to."""
    for a in arrays:
        a.setflags(write=False)
    return arrays


def check(found, truth, expected):
    """The policy of tests/tolerance.py on arrays."""
    found, truth, expected = (torch.from_numpy(np.array(a)) for a in (found, truth, expected))
    assert_accurate(found, truth, expected)


def eager(name, slope, before=lambda z: z):
    return lambda *inputs: lookup(name).eager(before(*inputs), slope)


def torch_gradients(function, inputs, dy, dtype):
    """[function(*inputs), the inputs' gradients] by torch at `dtype`, as arrays."""
    leaves = [torch.from_numpy(np.array(a, dtype)).requires_grad_() for a in inputs]
    y = function(*leaves)
    found = y, *torch.autograd.grad(y, leaves, torch.from_numpy(np.array(dy, dtype)))
    return [t.detach().numpy() for t in found]


@pytest.mark.parametrize("size", [0, 1, 2 * BLOCK + 7])
def test_blocks_cover_all_rows_once(size):
    for width in (1, 3, BLOCK, BLOCK + 1):
        rows, found = size // width, []
        for_blocks(lambda i, j, found=found: found.append((i, j)), rows, width, np.empty(0))
        assert [k for i, j in found for k in range(i, j)] == list(range(rows))
        assert all((j - i) * width <= max(BLOCK, width) for i, j in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "slope"), ACTS[1:])
def test_activation_across_blocks(name, slope, dtype):
    """The bits of an element do not depend on its place in a block, and are as good as torch's."""
    x, dy = frozen(normal(2 * BLOCK + 13, dtype=dtype), normal(2 * BLOCK + 13, dtype=dtype))
    y = activation_fwd(x, name, slope)
    saved = y if saved_for_backward(name, slope) == "y" else x
    dx = activation_bwd(dy, saved, name, slope)
    expected, truth = (torch_gradients(eager(name, slope), [x], dy, d) for d in (dtype, np.float64))
    check(y, truth[0], expected[0])
    check(dx, truth[1], expected[1])
    part = slice(BLOCK - 32, BLOCK + 32)
    np.testing.assert_array_equal(activation_fwd(x[part].copy(), name, slope), y[part])
    np.testing.assert_array_equal(activation_bwd(dy[part], saved[part], name, slope), dx[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "slope"), ACTS[1:])
def test_special_values(name, slope, dtype):
    """Large and tiny |x|, infinities and NaN of either sign: each element near the truth, or torch's own special value."""
    x = np.array([s * m for m in MAGNITUDES for s in (1, -1)], dtype)
    y = activation_fwd(x, name, slope)
    saved = y if saved_for_backward(name, slope) == "y" else x
    dx = activation_bwd(np.ones_like(x), saved, name, slope)
    assert np.isnan(y[np.isnan(x)]).all()
    expected, truth = (
        torch_gradients(eager(name, slope), [x], np.ones_like(x), d) for d in (dtype, np.float64)
    )
    # float32 exponentials carry the rounding of their argument.
    rtol, atol = (1e-5, 1e-7) if dtype is np.float32 else (1e-13, 1e-15)
    for found, e, t in zip((y, dx), expected, truth, strict=True):
        for a, *allowed in zip(found, e, t, strict=True):
            assert any(np.isclose(a, v, rtol, atol, equal_nan=True) for v in allowed), (a, allowed)


@pytest.mark.parametrize("name", ["sigmoid", "silu"])
def test_left_tails_keep_their_relative_accuracy(name):
    x = np.linspace(-12, -2, 1001)
    y = activation_fwd(x.astype(np.float32), name, 0.0)
    np.testing.assert_allclose(y, activation_fwd(x, name, 0.0), rtol=3e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-7), (np.float64, 1e-15)])
def test_normal_cdf(dtype, bound):
    z = np.linspace(-15, 15, 100_001).astype(dtype)
    with np.errstate(over="ignore"):
        assert np.abs(_np_normal_cdf(z) - ndtr(z.astype(float))).max() < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (37, 13, 29), (181, 7, 183), (5000, 3, 7), (0, 3, 2), (3, 0, 2), (3, 2, 0)]
)
@pytest.mark.parametrize(("name", "slope"), [(None, 0.0), ("relu", 0.0), ("gelu", 0.0)])
def test_linear(name, slope, shape, dtype):
    M, K, N = shape
    x, w, b, dy = frozen(*(normal(*s, dtype=dtype) for s in ((M, K), (N, K), (N,), (M, N))))
    keeps = saved_for_backward(name, slope)
    y, z = linear_fwd(x, w, b, name, slope, keeps == "z")
    assert (z is None) == (keeps != "z")
    found = linear_bwd(dy, x, w, {"y": y, "z": z, None: None}[keeps], name, slope, (True, True, True))
    expected, truth = (
        torch_gradients(eager(name, slope, F.linear), (x, w, b), dy, d) for d in (dtype, np.float64)
    )
    for a, t, e in zip((y, *found), truth, expected, strict=True):
        if a.size:
            check(a, t, e)
        assert a.shape == e.shape


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_linear_computes_what_is_needed(needs):
    x, w, dy = frozen(normal(5, 4), normal(3, 4), normal(5, 3))
    y, _ = linear_fwd(x, w, None, "relu", 0.0, False)
    found = linear_bwd(dy, x, w, y, "relu", 0.0, needs)
    assert tuple(a is not None for a in found) == tuple(map(bool, needs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layouts(dtype):
    """Transposed, strided, reversed and stride-0 operands give what their copies give."""
    for M, K, N in ((5, 4, 3), (300, 20, 150)):
        x, w, b, dy = (normal(2 * i, 2 * j, dtype=dtype) for i, j in ((M, K), (N, K), (1, N), (M, N)))
        views = x[::2, ::2], np.asfortranarray(w[:N, :K]), b[0, ::-2], np.broadcast_to(dy[:1, :1], (M, N))
        y, z = linear_fwd(*views[:3], "silu", 0.0, True)
        copies = [np.ascontiguousarray(a) for a in views]
        np.testing.assert_allclose(y, linear_fwd(*copies[:3], "silu", 0.0, True)[0], rtol=1e-4)
        for name, saved in (("silu", z), (None, None)):
            found = linear_bwd(views[3], views[0], views[1], saved, name, 0.0, (True, True, True))
            expected = linear_bwd(copies[3], copies[0], copies[1], saved, name, 0.0, (True, True, True))
            for a, e in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def test_linear_overflows_in_silence():
    x = np.full((4, 4), 1e38, np.float32)
    x[0] = np.inf, -np.inf, np.nan, 0
    for name in (None, *ACTIVATIONS):
        keeps = saved_for_backward(name, 0.01)
        y, z = linear_fwd(x, x, x[1], name, 0.01, keeps == "z")
        linear_bwd(x, x, x, {"y": y, "z": z, None: None}[keeps], name, 0.01, (True, True, True))


def losses(x, target, weight, reduction, ignore_index, smoothing, dloss=None):
    """(loss, dx) of the array code."""
    loss, stats, denominator = cross_entropy_fwd(x, target, weight, reduction, ignore_index, smoothing)
    assert stats.shape == (2, len(x))
    assert denominator.shape == (1,)
    dloss = np.ones_like(loss) if dloss is None else dloss
    return loss, cross_entropy_bwd(
        dloss, x, target, weight, stats, denominator, reduction, ignore_index, smoothing
    )


def torch_losses(x, target, weight, reduction, ignore_index, smoothing, dtype):
    w = None if weight is None else torch.from_numpy(weight.astype(dtype))
    t = torch.from_numpy(np.array(target))

    def function(logits):
        return F.cross_entropy(
            logits, t, w, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )

    return torch_gradients(function, [x], np.ones(len(x) if reduction == "none" else ()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (33, 10), (3300, 11), (33, 64), (35, 1001)])
def test_cross_entropy(shape, weighted, smoothing, reduction, dtype):
    N, C = shape
    rng = np.random.default_rng(0)
    x, target = frozen((3 * normal(N, C)).astype(dtype), rng.integers(0, C, N))
    weight = rng.random(C).astype(dtype) if weighted else None
    for ignore_index in (-100, int(target[0])):
        if N == 1 and ignore_index == 0:
            continue
        args = (x, target, weight, reduction, ignore_index, smoothing)
        found = losses(*args)
        expected, truth = (torch_losses(*args, d) for d in (dtype, np.float64))
        for a, t, e in zip(found, truth, expected, strict=True):
            check(a, t, e)
        assert (found[1][target == ignore_index] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_a_row_larger_than_a_block(dtype):
    args = (normal(3, BLOCK + 1, dtype=dtype), np.array([0, 9, BLOCK]), None, "mean", -100, 0.0)
    expected, truth = (torch_losses(*args, d) for d in (dtype, np.float64))
    for a, t, e in zip(losses(*args), truth, expected, strict=True):
        check(a, t, e)


@pytest.mark.parametrize("classes", [7, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_rows_that_do_not_count(classes, smoothing):
    """An ignored row gives exactly 0 whatever it holds; a target out of range NaN, and leaves the other rows alone."""
    x = normal(8, classes)
    x[0], x[1, 2], x[2] = np.nan, np.inf, -np.inf
    target = np.array([-100, -100, -100, 0, classes, -1, 2**40, 1])
    for weight in (None, np.ones(classes)):
        loss, dx = losses(x, target, weight, "none", -100, smoothing)
        assert (loss[:3] == 0).all()
        assert (dx[:3] == 0).all()
        assert np.isnan(loss[4:7]).all()
        assert np.isnan(dx[4:7]).all()
        good, good_dx = losses(x[[3, 7]], target[[3, 7]], weight, "none", -100, smoothing)
        np.testing.assert_allclose(loss[[3, 7]], good, rtol=1e-14)
        np.testing.assert_allclose(dx[[3, 7]], good_dx, rtol=1e-12)
        for reduction in ("mean", "sum"):
            loss, dx = losses(x, target, weight, reduction, -100, smoothing)
            assert np.isnan(loss)
            assert np.isfinite(dx[[3, 7]]).all()
            assert (dx[:3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_special_logits(classes, smoothing, dtype):
    x = normal(7, classes, dtype=dtype)
    x[0, 1], x[1], x[2, 1], x[3, 1], x[4, 0], x[5] = -np.inf, -np.inf, np.inf, np.nan, -np.inf, x[5] + 1e4
    target = np.zeros(7, np.int64)
    args = (x, target, None, "none", -100, smoothing)
    expected, truth = (torch_losses(*args, d) for d in (dtype, np.float64))
    for a, t, e in zip(losses(*args), truth, expected, strict=True):
        check(a, t, e)


def test_cross_entropy_of_nothing():
    for reduction, value in (("mean", np.nan), ("sum", 0.0)):
        loss, dx = losses(np.empty((0, 4)), np.empty(0, np.int64), None, reduction, -100, 0.1)
        assert np.array_equal(loss, value, equal_nan=True)
        assert dx.shape == (0, 4)
        loss, dx = losses(normal(3, 4), np.full(3, -100), None, reduction, -100, 0.1)
        assert np.array_equal(loss, value, equal_nan=True)
        assert not dx.any()
        loss, dx = losses(np.empty((3, 0)), np.full(3, -100), None, reduction, -100, 0.0)
        assert dx.shape == (3, 0)
        assert np.array_equal(loss, value, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 1000, BLOCK + 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"amsgrad": True, "betas": (0.4, 0.7)},
        {"weight_decay": 0.1, "decoupled": True, "amsgrad": True, "maximize": True},
    ],
)
def test_adam(options, size, dtype):
    """Parameters and states over steps with gradients near eps, against torch's."""
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **options}
    decoupled, amsgrad = options.pop("decoupled", False), options.pop("amsgrad", False)
    start = normal(size, dtype=dtype)
    grads = [(normal(size, dtype=dtype) * 10.0**-k).astype(dtype) for k in (0, 4, 8)]
    p, m, v, top = start.copy(), *(np.zeros_like(start) for _ in range(3))
    kwargs = {k: value for k, value in options.items() if k != "betas"} | {"decoupled": decoupled}
    kwargs["beta1"], kwargs["beta2"] = options["betas"]
    for t, g in enumerate(grads, 1):
        adam_step([p], [g], [m], [v], [top] if amsgrad else None, [float(t)], **{"maximize": False, **kwargs})
    expected, truth = (torch_adam(start, grads, options, decoupled, amsgrad, d) for d in (dtype, np.float64))
    for a, t, e in zip((p, m, v, top), truth, expected, strict=False):
        check(a, t, e)


def torch_adam(start, grads, options, decoupled, amsgrad, dtype):
    p = torch.nn.Parameter(torch.from_numpy(start.astype(dtype)))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([p], amsgrad=amsgrad, **options)
    for g in grads:
        p.grad = torch.from_numpy(g.astype(dtype))
        optimizer.step()
    state = optimizer.state[p]
    names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
    return [p.detach().numpy(), *(state[name].numpy() for name in names)]


class Device:
    """Stands for an array of another library: ufuncs and functions hand over to it, and it refuses to become a NumPy array."""

    def __init__(self, array):
        self.array = array

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        assert not any(isinstance(a, np.ndarray) and a.ndim for a in inputs), f"{ufunc}: mixed with NumPy"
        return wrap(getattr(ufunc, method)(*map(unwrap, inputs), **unwrap(kwargs)))

    def __array_function__(self, function, types, args, kwargs):
        return wrap(function(*map(unwrap, args), **unwrap(kwargs)))

    def __getitem__(self, key):
        return wrap(self.array[unwrap(key)])

    def __setitem__(self, key, value):
        self.array[unwrap(key)] = unwrap(value)

    def __len__(self):
        return len(self.array)

    def __bool__(self):
        raise TypeError("a synchronization")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.array, name)
        if callable(value):
            return lambda *args, **kwargs: wrap(value(*map(unwrap, args), **unwrap(kwargs)))
        return wrap(value)


def _operator(name):
    return lambda self, *args: wrap(getattr(self.array, name)(*map(unwrap, args)))


BINARY = (
    "add",
    "sub",
    "mul",
    "truediv",
    "radd",
    "rsub",
    "rmul",
    "isub",
    "imul",
    "itruediv",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "and",
    "or",
)
for _name in (*BINARY, "invert", "neg"):
    setattr(Device, f"__{_name}__", _operator(f"__{_name}__"))


def wrap(value):
    if isinstance(value, tuple):
        return tuple(map(wrap, value))
    return Device(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def unwrap(value):
    if isinstance(value, dict):
        return {k: unwrap(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(unwrap, value))
    return value.array if isinstance(value, Device) else value


def same(function, *args, **kwargs):
    """The function gives the same on Device arrays, to rounding, without converting or looking at any."""
    expected = function(*args, **kwargs)
    found = unwrap(function(*map(wrap, args), **kwargs))
    as_tuple = (lambda r: r) if isinstance(expected, tuple) else (lambda r: (r,))
    for a, e in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "slope"), ACTS)
def test_other_arrays_linear(name, slope, dtype):
    x, w, b, dy = (normal(*s, dtype=dtype) for s in ((70, 5), (9, 5), (9,), (70, 9)))
    keeps = saved_for_backward(name, slope)
    y, z = same(linear_fwd, x, w, b, name, slope, keeps == "z")
    saved = {"y": y, "z": z, None: None}[keeps]
    same(linear_bwd, dy, x, w, saved, name, slope, [True, True, True])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_other_arrays_cross_entropy(reduction, smoothing, weighted):
    for C in (5, 70):
        x, target = normal(6, C, dtype=np.float32), np.array([0, 1, -100, 3, C, 4])
        weight = normal(C, dtype=np.float32) ** 2 if weighted else None
        args = (reduction, -100, smoothing)
        loss, stats, denominator = same(cross_entropy_fwd, x, target, weight, *args)
        same(cross_entropy_bwd, np.ones_like(loss), x, target, weight, stats, denominator, *args)


def test_other_arrays_adam():
    p, g, m, v = (normal(9, dtype=np.float32) ** 2 for _ in range(4))
    devices = [Device(a.copy()) for a in (p, g, m, v)]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": False}
    for arrays in ((p, g, m, v), devices):
        adam_step(*([a] for a in arrays), None, [3.0], maximize=True, **options)
    for a, d in zip((p, g, m, v), devices, strict=True):
        np.testing.assert_array_equal(a, d.array)
