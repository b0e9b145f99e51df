"""Stand-alone activations against torch, and the table that they share with the fused kernels."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import dlgpu.functional
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

ACTS = [*((name, None) for name in ACTIVATIONS), *(("leaky_relu", slope) for slope in (0.3, -0.5, 0.0))]
# The kernels' float16, last of PAIRS, differs from bfloat16 in its range alone: test_large_and_tiny.
# Both sides of each bend, the tails, where exp overflows and where a polynomial hands over to it.
VALUES = [0.0, 1e-6, 1e-3, 0.1, 0.59, 0.6, 0.61, 1.0, 5.0, 10.0, 15.0, 40.0, 88.0, 100.0, 1000.0, 3e4]


def ours(activation, slope=None):
    function = getattr(dlgpu.functional, activation)
    return function if slope is None else lambda x: function(x, slope)


def theirs(activation, slope=None):
    return lambda x: lookup(activation).eager(x, 0.01 if slope is None else slope)


@pytest.mark.parametrize(("activation", "slope"), ACTS)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS[:-1], indirect=["backend"])
def test_values(backend, device, dtype, activation, slope):
    # Past one program's elements, and no multiple of them.
    assert_conforms(
        ours(activation, slope),
        theirs(activation, slope),
        [3 * torch.randn(1031, dtype=dtype, device=device)],
    )


@pytest.mark.parametrize(("activation", "slope"), ACTS)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_large_and_tiny(backend, device, dtype, activation, slope):
    x = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=dtype, device=device)
    found = run(ours(activation, slope), [x], torch.ones_like)
    expected, truth = (run(theirs(activation, slope), [x], torch.ones_like, t) for t in (None, torch.float64))
    # Beside 3e4 an error of a small one would not show.
    for limit in (1e-2, 6.0, 1e5):
        keep = x.abs() < limit
        for a, t, e in zip(found, truth, expected, strict=True):
            assert a.isfinite().all()
            assert_accurate(a[keep], t[keep], e[keep], f"result or gradient below {limit}")


@pytest.mark.parametrize("value", [1e-6, -0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_element(backend, device, activation, value):
    assert_conforms(
        ours(activation), theirs(activation), [torch.tensor(value, device=device)], torch.ones_like
    )


@pytest.mark.parametrize(("activation", "slope"), ACTS)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS[:-1], indirect=["backend"])
def test_nan_infinity_and_zero(backend, device, dtype, activation, slope):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0], dtype=dtype, device=device)
    assert_conforms(ours(activation, slope), theirs(activation, slope), [x], torch.ones_like)


@pytest.mark.parametrize(("activation", "slope"), ACTS)
def test_upstream_nan_and_infinity(backend, device, activation, slope):
    x = torch.linspace(-2, 2, 6, device=device)
    dy = torch.tensor([float("nan"), float("inf"), -float("inf")] * 2, device=device)
    assert_conforms(ours(activation, slope), theirs(activation, slope), [x], lambda y: dy)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5), (2, 1, 1, 7)])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_shapes(backend, device, shape, activation):
    assert_conforms(ours(activation), theirs(activation), [torch.randn(shape, device=device)])


@hypothesis.given(
    st.tuples(*[st.integers(0, 33)] * 2),
    st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    st.sampled_from(ACTS),
)
@hypothesis.example((7, 5), ("transposed", "stride 0 both ways"), ("relu", None))
@hypothesis.example((7, 5), ("transposed", "contiguous"), ("silu", None))
@hypothesis.example((7, 5), ("stride 0", "transposed"), ("gelu", None))
@hypothesis.example((7, 5), ("rows apart", "columns apart"), ("tanh", None))
def test_any_shape_and_layout(backend, device, shape, layouts, act):
    torch.manual_seed(0)
    x, dy = (LAYOUTS[layout](torch.randn(shape, device=device)) for layout in layouts)
    assert_conforms(ours(*act), theirs(*act), [x], lambda y: dy)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_channels_last_input(backend, device, activation):
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    assert_conforms(ours(activation), theirs(activation), [x])


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_two_backward_passes_and_the_same_bits(backend, device, activation):
    x = torch.randn(37, device=device, requires_grad=True)
    y = ours(activation)(x)
    first, second = torch.randn_like(y), torch.randn_like(y)
    for dy in (first, second, first):
        found = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert_same_bits([y, *found], run(ours(activation), [x], lambda y, dy=dy: dy))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(backend, device, context, launches):
    x = torch.randn(5, device=device, requires_grad=True)
    y = dlgpu.functional.gelu(x)
    with context():
        still = dlgpu.functional.gelu(x)
    assert y.requires_grad
    assert not still.requires_grad
    assert_same_bits([still], [y])
    assert not dlgpu.functional.gelu(x.detach()).requires_grad
    if backend == "triton":
        assert [name for name, *_ in launches] == ["_activation_fwd_kernel"] * 3


def test_gelu_approximate(backend, device):
    x = torch.randn(5, device=device)
    assert_same_bits(
        [dlgpu.functional.gelu(x, approximate="tanh"), dlgpu.functional.gelu(x, "none")],
        [dlgpu.functional.gelu_tanh(x), dlgpu.functional.gelu(x)],
    )


@pytest.mark.parametrize(("activation", "slope"), ACTS)
def test_gradcheck(activation, slope):
    # None within gradcheck's step of the bend at 0.
    x = torch.tensor([[-2.3, -0.7], [0.4, 1.9]], dtype=torch.float64, requires_grad=True)
    with dlgpu.use_backend("fallback"):
        torch.autograd.gradcheck(ours(activation, slope), [x])
        torch.autograd.gradgradcheck(ours(activation, slope), [x])


@pytest.mark.parametrize(("activation", "slope"), ACTS)
def test_second_derivatives(backend, device, activation, slope):
    x = torch.randn(17, device=device)
    dy = torch.randn(17, device=device)

    def second(function, dtype):
        leaf, upstream = (t.detach().to(dtype).requires_grad_() for t in (x, dy))
        (first,) = torch.autograd.grad(function(leaf), leaf, upstream, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, upstream), materialize_grads=True)

    found = second(ours(activation, slope), torch.float32)
    expected, truth = (second(theirs(activation, slope), dtype) for dtype in (torch.float32, torch.float64))
    for a, t, e in zip(found, truth, expected, strict=True):
        assert_accurate(a, t, e)
