"""dlgpu.functional on arrays that are no tensors, and the fallback on arrays that are not NumPy's."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import array_api_strict
import numpy as np
import pytest
import torch

import cupy_like
import dlgpu
import dlgpu.ops
from dlgpu import functional
from test_dispatch import CALLS, inputs, targets
from tolerance import assert_same_bits

N, K, C = 5, 4, 3


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


X, Y, W, V = numbers(N, K), numbers(N, K) + 1, numbers(C, K), numbers(2, C)
CLASSES = np.arange(N) % K

# Public function -> its arguments and keywords, as NumPy arrays.
ON_ARRAYS = {
    "batch_norm": ((X, numbers(K), numbers(K) ** 2), {"weight": Y[0], "activation": "relu"}),
    "binary_cross_entropy_with_logits": ((X, Y), {"pos_weight": np.abs(Y[0])}),
    "cross_entropy": ((X, CLASSES), {"label_smoothing": 0.1}),
    "dropout": ((X,), {"training": False}),
    "gated_linear": ((X, numbers(4, K)), {"activation": "silu"}),
    "gelu": ((X,), {"approximate": "tanh"}),
    "gelu_tanh": ((X,), {}),
    "hinge_loss": ((X, Y), {"reduction": "none"}),
    "huber_loss": ((X, Y), {}),
    "kl_div": ((X, np.abs(Y)), {"reduction": "batchmean"}),
    "l1_loss": ((X, Y), {"reduction": "sum"}),
    "layer_norm": ((X, (K,), Y[0]), {}),
    "leaky_relu": ((X, 0.2), {}),
    "linear": ((X, W), {"bias": V[0], "activation": "gelu"}),
    "linear_cross_entropy": ((X, numbers(K, K), CLASSES), {}),
    "log_softmax": ((X, 1), {}),
    "logsumexp": ((X, 1), {}),
    "mlp": ((X, [W, V], [None, V[:, 0]]), {"activation": "relu"}),
    "mse_loss": ((X, Y), {}),
    "multi_margin_loss": ((X, CLASSES), {}),
    "relu": ((X,), {}),
    "rms_norm": ((X, (K,)), {}),
    "sigmoid": ((X,), {}),
    "silu": ((X,), {}),
    "smooth_l1_loss": ((X, Y), {"beta": 0.5}),
    "softmax": ((X, -1), {}),
    "tanh": ((X,), {}),
}
KINDS = {"numpy": np.array, "array-api-strict": array_api_strict.asarray, "cupy-like": cupy_like.Array}


def mapped(convert, value):
    """`value` with its NumPy arrays converted."""
    if isinstance(value, list):
        return [mapped(convert, v) for v in value]
    return convert(value) if isinstance(value, np.ndarray) else value


def test_every_function_is_here():
    assert sorted(ON_ARRAYS) == sorted(functional.__all__)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ON_ARRAYS)
def test_arrays_give_what_tensors_give(name, kind):
    args, kwargs = ON_ARRAYS[name]
    function = getattr(functional, name)
    expected = function(
        *(mapped(torch.tensor, a) for a in args), **{k: mapped(torch.tensor, v) for k, v in kwargs.items()}
    )
    convert = KINDS[kind]
    args, kwargs = [mapped(convert, a) for a in args], {k: mapped(convert, v) for k, v in kwargs.items()}
    found = function(*args, **kwargs)
    assert type(found) is type(args[0])
    assert_same_bits([torch.from_dlpack(found)], [expected])
    # By name too.
    names = inspect.signature(function).parameters
    assert type(function(**dict(zip(names, args, strict=False)), **kwargs)) is type(found)


def test_the_fields_of_a_named_tuple_are_arrays():
    found = functional.cross_entropy(X, CLASSES, return_lse=True)
    assert isinstance(found.loss, np.ndarray)
    assert found.lse.shape == (N,)
    assert found.accuracy is None


def test_memory_is_shared_both_ways():
    x = X.copy()
    assert np.shares_memory(functional.dropout(x, training=False), x)
    mean, var = np.zeros(K, np.float32), np.ones(K, np.float32)
    functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-6)
    y = functional.dropout(x, 1.0, inplace=True)
    assert np.shares_memory(x, y)
    assert not x.any()


def test_read_only_and_reversed_arrays():
    broadcast, backwards = np.broadcast_to(X[0], X.shape), X[::-1]
    for x in (broadcast, backwards):
        expected = functional.linear(torch.tensor(x.copy()), torch.tensor(W))
        assert_same_bits([torch.tensor(functional.linear(x, W))], [expected])
    frozen = np.zeros(K, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="running_mean is written to"):
        functional.batch_norm(X, frozen, np.ones(K, np.float32), training=True)
    with pytest.raises(ValueError, match="input is written to"):
        functional.dropout(backwards, inplace=True)


def test_kinds_are_not_mixed():
    with pytest.raises(TypeError, match="linear: weight is of type Tensor, expected ndarray"):
        functional.linear(X, torch.tensor(W))
    with pytest.raises(TypeError, match="linear: weight must be a Tensor, got ndarray"):
        functional.linear(torch.tensor(X), W)
    with pytest.raises(TypeError, match=r"mlp: weights is of type ndarray, expected Array"):
        functional.mlp(array_api_strict.asarray(X), [W], activation="relu")
    with pytest.raises(TypeError, match="relu: input must be a Tensor, got list"):
        functional.relu([1.0])
    with pytest.raises(TypeError, match=r"linear: weight has dtype torch\.float64"):
        functional.linear(X, W.astype(np.float64))


@pytest.fixture
def cupy_like_arrays(monkeypatch):
    """The fallback meets CPU tensors as arrays like CuPy's, as it meets CUDA tensors as CuPy's."""
    found = 0
    for info in pkgutil.iter_modules(dlgpu.ops.__path__):
        module = importlib.import_module(f"dlgpu.ops.{info.name}")
        if hasattr(module, "to_array"):
            monkeypatch.setattr(module, "to_array", cupy_like.from_tensor)
            found += 1
        # Of NumPy alone.
        if hasattr(module, "_keeps_exponentials"):
            monkeypatch.setattr(module, "_keeps_exponentials", lambda *args: False)
    assert found >= 10


def bce(x, t, q):
    return functional.binary_cross_entropy_with_logits(x, t, pos_weight=q.detach())


# More forms than CALLS has: wide rows, weights, other reductions.
FORMS = {
    **{name: call for name, call in CALLS.items() if name != "nn"},
    "dropout": (lambda x: functional.dropout(x, 0.4), [(5, 7)]),
    "softmax wide": (lambda x: functional.softmax(x, 1), [(3, 600)]),
    "log_softmax wide": (lambda x: functional.log_softmax(x, 1), [(3, 600)]),
    "logsumexp wide": (lambda x: functional.logsumexp(x, 1), [(3, 600)]),
    "layer_norm wide": (lambda x, w: functional.layer_norm(x, (600,), w), [(3, 600), (600,)]),
    "batch_norm tall": (lambda x: functional.batch_norm(x, None, None, training=True), [(70, 6)]),
    **{
        f"cross_entropy {columns}": (
            lambda x, w: functional.cross_entropy(
                x,
                targets(4, x.shape[1]).where(torch.arange(4) != 2, -100),
                w.detach().abs(),
                label_smoothing=0.1,
            ),
            [(4, columns), (columns,)],
        )
        for columns in (3, 90, 600)
    },
    "linear tall": (lambda x, w, b: functional.linear(x, w, b, activation="tanh"), [(70, 5), (4, 5), (4,)]),
    "bce weights": (bce, [(5, 6), (5, 6), (6,)]),
    "smooth_l1_loss": (lambda x, t: functional.smooth_l1_loss(x, t, beta=0.5), [(5, 3), (5, 3)]),
    "l1_loss sum": (lambda x, t: functional.l1_loss(x, t, reduction="sum"), [(5, 3), (5, 3)]),
    "multi_margin_loss p": (
        lambda x: functional.multi_margin_loss(x, targets(4, x.shape[1]), p=2, reduction="none"),
        [(4, 90)],
    ),
}


def results_and_gradients(function, args):
    torch.manual_seed(1)
    leaves = [a.clone().requires_grad_() for a in args]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y * y).sum(), leaves, allow_unused=True)]


@pytest.mark.parametrize("form", FORMS)
def test_the_fallback_runs_on_arrays_like_cupys(form, request):
    function, shapes = FORMS[form]
    args = [inputs(*shape) for shape in shapes]
    with dlgpu.use_backend("fallback"):
        expected = results_and_gradients(function, args)
        request.getfixturevalue("cupy_like_arrays")
        found = results_and_gradients(function, args)
    for a, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e)


OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adagrad": {},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"max_grad_norm": 0.1, "master_weights": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_on_arrays_like_cupys(name, request):
    def train():
        params = [torch.nn.Parameter(torch.tensor(W)), torch.nn.Parameter(torch.tensor(V).bfloat16())]
        optimizer = getattr(dlgpu.optim, name)(params, lr=0.1, **OPTIMIZERS[name])
        for p in params:
            p.grad = torch.ones_like(p) * 0.5
        for _ in range(3):
            optimizer.step()
        return [p.detach() for p in params]

    with dlgpu.use_backend("fallback"):
        expected = train()
        request.getfixturevalue("cupy_like_arrays")
        found = train()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_likeness_refuses_what_cupy_refuses():
    a = cupy_like.Array(X)
    refused = [
        lambda: np.asarray(a),
        lambda: np.add(a, X),
        lambda: np.maximum.reduce(a),
        lambda: np.vecdot(a, a),
        lambda: np.empty_like(a, subok=False),
        lambda: a.__setitem__(slice(None), X),
    ]
    for call in refused:
        with pytest.raises((TypeError, NotImplementedError)):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cupy():
    cupy = pytest.importorskip("cupy")
    x, w = cupy.asarray(X), cupy.asarray(W)
    y = functional.linear(x, w, activation="relu")
    assert isinstance(y, cupy.ndarray)
    cupy.testing.assert_allclose(y, cupy.maximum(x @ w.T, 0), rtol=1e-2, atol=1e-2)
    with dlgpu.use_backend("fallback"):
        assert isinstance(functional.softmax(x, 1), cupy.ndarray)
        for form in FORMS:
            function, shapes = FORMS[form]
            results_and_gradients(function, [inputs(*shape, device="cuda") for shape in shapes])
