"""A chain of layers as one function of autograd, against torch's layers one by one, on every backend; and nn.MLP."""

import copy
import io
import itertools
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import dlgpu.functional
import dlgpu.nn
from dlgpu.bench.meter import TrafficMeter
from dlgpu.fallback.dropout import keep
from dlgpu.kernels import _triton, configs
from dlgpu.kernels import linear as linear_kernels
from dlgpu.kernels import mlp as mlp_kernels
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from dlgpu.ops.dropout import _draw_seeds, _probability
from test_dispatch import specialization
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

# (activation, out_activation, negative slope): what backward needs of hidden layers and of the last is y, z or nothing.
ACTS = [
    *((name, None, 0.01) for name in ACTIVATIONS),
    (None, None, 0.01),
    (None, "gelu", 0.01),
    ("relu", "silu", 0.01),
    ("gelu", "tanh", 0.01),
    ("silu", "gelu", 0.01),
    ("leaky_relu", "leaky_relu", -0.5),
]
SIZES = (19, 33, 17, 9)


def flat(function):
    """function(x, weights, biases) as one of (x, *weights, *biases)."""

    def called(x, *parameters):
        layers = len(parameters) // 2
        return function(x, parameters[:layers], parameters[layers:])

    return called


def ours(activation, out_activation=None, slope=0.01):
    return flat(
        lambda x, ws, bs: dlgpu.functional.mlp(
            x, ws, bs, activation=activation, out_activation=out_activation, negative_slope=slope
        )
    )


def layer_by_layer(linear, activation, out_activation, slope):
    def chain(x, ws, bs):
        for i, (w, b) in enumerate(zip(ws, bs, strict=True)):
            x = linear(x, w, b, out_activation if i == len(ws) - 1 else activation, slope)
        return x

    return flat(chain)


def theirs(activation, out_activation=None, slope=0.01):
    return layer_by_layer(
        lambda x, w, b, act, slope: lookup(act).eager(F.linear(x, w, b), slope),
        activation,
        out_activation,
        slope,
    )


def apart(activation, out_activation=None, slope=0.01):
    """dlgpu's own layers, one by one."""
    return layer_by_layer(
        lambda x, w, b, act, slope: dlgpu.functional.linear(x, w, b, activation=act, negative_slope=slope),
        activation,
        out_activation,
        slope,
    )


def sample(M, sizes=SIZES, dtype=torch.float32, device="cpu", bias=True):
    """[x, *weights, *biases], z of each layer of about unit variance."""
    x = torch.randn(M, sizes[0], dtype=dtype, device=device)
    ws = [
        torch.randn(n, k, dtype=dtype, device=device) / max(k, 1) ** 0.5 * 1.3
        for k, n in itertools.pairwise(sizes)
    ]
    return [x, *ws, *(torch.randn(n, dtype=dtype, device=device) if bias else None for n in sizes[1:])]


@pytest.mark.parametrize(
    ("backend", "dtype", "act"),
    [
        (*pair, act)
        for pair in PAIRS
        for act in ACTS
        if pair[0] == "fallback" or act in (ACTS[-4:] if pair[1] is torch.float32 else ACTS[-3:-2])
    ],
    indirect=["backend"],
)
def test_activations(backend, device, dtype, act):
    assert_conforms(ours(*act), theirs(*act), sample(37, dtype=dtype, device=device))


# One tile, one more than whole tiles, empty batches and layers, one layer, five.
@pytest.mark.parametrize(
    ("M", "sizes"),
    [
        (1, (1, 1, 1)),
        (65, (64, 65, 64)),
        (0, (5, 7, 3)),
        (4, (3, 0, 2)),
        (4, (0, 5, 2)),
        (5, (3, 4, 0)),
        (7, (5, 3)),
        (33, (16, 17, 16, 17, 16, 17)),
    ],
)
def test_shapes(backend, device, M, sizes):
    acts = [("relu",), ("silu", "tanh")]
    for act in acts[: 2 if backend == "fallback" else 1]:
        assert_conforms(ours(*act), theirs(*act), sample(M, sizes, device=device))


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0, 3)])
def test_leading_dimensions(backend, device, lead):
    _, *parameters = sample(1, (7, 9, 4), device=device)
    x = torch.randn(*lead, 7, device=device)
    assert_conforms(ours("relu"), theirs("relu"), [x, *parameters])
    # `view` before `contiguous` fails here.
    if lead == (2, 3):
        upstream = torch.randn(4, 3, 2, device=device).permute(2, 1, 0).transpose(0, 1)
        args = [x.transpose(0, 1), *parameters]
        assert_conforms(ours("relu"), theirs("relu"), args, lambda y: upstream)


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        *(("fallback", layout) for layout in list(LAYOUTS)[1:]),
        ("triton", "transposed"),
        ("triton", "columns apart"),
        ("triton", "stride 0"),
    ],
    indirect=["backend"],
)
def test_layouts(backend, device, layout):
    x, *parameters = sample(35, (33, 18, 9), device=device)
    upstream = torch.randn(35, 9, device=device)
    change = LAYOUTS[layout]
    ws, bs = [change(w) for w in parameters[:2]], parameters[2:]
    # Without an activation the products read the upstream gradient itself.
    acts = [("silu", None), (None, None)]
    for act in acts if backend == "fallback" else acts[layout != "transposed" :][:1]:
        assert_conforms(ours(*act), theirs(*act), [change(x), *ws, *bs], lambda y: change(upstream))


def test_biases_with_strides(backend, device):
    x, *parameters = sample(5, (6, 8, 4), device=device)
    b = torch.randn(16, device=device)[::2]
    assert_conforms(ours("relu"), theirs("relu"), [x, *parameters[:2], b, b[:1].expand(4)])


@pytest.mark.parametrize("bias", [(1, 0, 1), (0, 1, 0)])
def test_some_biases(backend, device, bias):
    x, *parameters = sample(6, device=device)
    bs = [b if there else None for b, there in zip(parameters[3:], bias, strict=True)]
    assert_conforms(ours("gelu"), theirs("gelu"), [x, *parameters[:3], *bs])


def test_no_biases_at_all_and_any_sequence(backend, device):
    x, *ws, _, _, _ = sample(6, device=device)
    expected = ours("relu")(x, *ws, None, None, None)
    for weights in (ws, tuple(ws), torch.nn.ParameterList(ws), iter(ws)):
        assert_same_bits([dlgpu.functional.mlp(x, weights, activation="relu").detach()], [expected])


def test_the_same_weight_in_two_layers(backend, device):
    x, w, b = (
        torch.randn(7, 5, device=device),
        torch.randn(5, 5, device=device),
        torch.randn(5, device=device),
    )
    assert_conforms(
        lambda x, w, b: ours("tanh")(x, w, w, b, b), lambda x, w, b: theirs("tanh")(x, w, w, b, b), [x, w, b]
    )


@pytest.mark.parametrize("act", ACTS[-3:-2])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_forward_has_the_bits_of_layers_one_by_one(backend, device, dtype, act):
    """And the same ones with gradients, without, and in inference mode. The fallback does not round 16-bit results between
    layers."""
    inputs = sample(37, dtype=dtype, device=device)
    y = ours(*act)(*inputs)
    if backend == "triton" or dtype in (torch.float32, torch.float64):
        assert_same_bits([y], [apart(*act)(*inputs)])
    with torch.inference_mode():
        assert_same_bits([ours(*act)(*inputs)], [y])
    assert_same_bits([ours(*act)(*[t.requires_grad_() for t in inputs])], [y])


KINDS = {"_linear_kernel": "p", "_linear_tma_kernel": "p", "_linear_dz_kernel": "d", "_sum_kernel": "s"}

# What runs where only some tensors need gradients: (needs of x, w_0 .. w_2, b_0 .. b_2), and the launches of backward for
# relu, in order: p a product, d the pass for dZ of the last layer, s a sum of column sums.
NEEDS = [
    ("1 111 111", "ds p ps p ps p p"),
    # Without out_activation and bias the last dZ is dY.
    ("1 111 000", "p p p p p p"),
    ("0 111 111", "ds p ps p ps p"),
    # Frozen lower layers are not reached, nor is a weight that is not needed.
    ("0 001 001", "ds p"),
    ("0 001 000", "p"),
    ("0 000 001", "ds"),
    ("0 011 000", "p p p"),
    ("0 010 000", "p p"),
    ("0 000 010", "ps"),
    ("0 000 100", "p ps"),
    ("1 000 000", "p p p"),
    ("0 100 000", "p p p"),
]


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize(("pattern", "expected"), NEEDS)
def test_nothing_needless_runs(backend, device, launches, activation, pattern, expected):
    launches.dry = True
    needs = [n == "1" for n in pattern.replace(" ", "")]
    inputs = [t.requires_grad_(n) for t, n in zip(sample(5, device=device), needs, strict=True)]
    y = ours(activation)(*inputs)
    forward = len(launches)
    y.backward(torch.ones_like(y))
    for t, need in zip(inputs, needs, strict=True):
        assert (t.grad is not None) == need
        assert t.grad is None or t.grad.shape == t.shape
    if backend == "fallback":
        return
    found = "".join(KINDS[name] for name, *_ in launches)
    assert forward == 3
    assert found[forward:] == expected.replace(" ", "")
    # z is written of those layers alone whose derivative is needed.
    lowest = next(i for i in range(3) if needs[0] or needs[1 + i] or needs[4 + i])
    for i, (_, kernel, args, _) in enumerate(launches[:3]):
        given = dict(zip(kernel.arg_names, args, strict=False))
        assert (given["z_ptr"] is not None) == (activation == "gelu" and lowest <= i < 2)


@pytest.mark.parametrize(
    ("pattern", "expected", "written"),
    [
        ("0 000 001", "ds", False),
        ("0 001 000", "dp", True),
        ("0 001 001", "dsp", True),
        ("0 000 010", "dps", True),
    ],
)
def test_the_last_dz_is_written_if_anything_reads_it(device, launches, pattern, expected, written):
    launches.dry = True
    needs = [n == "1" for n in pattern.replace(" ", "")]
    inputs = [t.requires_grad_(n) for t, n in zip(sample(5, device=device), needs, strict=True)]
    with dlgpu.use_backend("triton"):
        y = ours("relu", "tanh")(*inputs)
    y.backward(torch.ones_like(y))
    assert "".join(KINDS[name] for name, *_ in launches[3:]) == expected
    _, kernel, args, _ = launches[3]
    assert (dict(zip(kernel.arg_names, args, strict=False))["dz_ptr"] is not None) == written


def test_without_gradient_no_z_is_written(device, launches):
    inputs = [t.requires_grad_() for t in sample(5, device=device)]
    launches.dry = True
    with dlgpu.use_backend("triton"):
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                ours("gelu", "silu")(*inputs)
    assert [dict(zip(k.arg_names, args, strict=False))["z_ptr"] for _, k, args, _ in launches] == [None] * 6


@pytest.mark.parametrize(
    ("activation", "pattern", "expected"),
    [
        # Shapes that are saved beside x, weights and biases. Hidden results are the next layer's input and relu's own.
        ("relu", "1 111 111", {33: 1, 17: 1}),
        ("gelu", "1 111 111", {33: 2, 17: 2}),
        ("gelu", "1 000 000", {33: 1, 17: 1}),
        (None, "1 111 111", {33: 1, 17: 1}),
        (None, "1 000 000", {}),
        ("gelu", "0 001 000", {17: 1}),
        ("relu", "0 000 010", {17: 1}),
        ("gelu", "0 000 001", {}),
    ],
)
def test_what_is_saved(backend, device, launches, activation, pattern, expected):
    launches.dry = True
    needs = [n == "1" for n in pattern.replace(" ", "")]
    inputs = [t.requires_grad_(n) for t, n in zip(sample(5, device=device), needs, strict=True)]
    own = {t.data_ptr() for t in inputs}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ours(activation)(*inputs)
    found = [t.shape[1] for t in saved if t.data_ptr() not in own]
    assert sorted(found) == sorted(n for n, times in expected.items() for _ in range(times))
    assert all(t.data_ptr() != y.data_ptr() for t in saved)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("frozen", [(0,), (1, 4), (1, 2, 4, 5, 0), (3,), (4, 5, 6), (0, 1, 2, 3, 4, 6)])
def test_frozen(backend, device, frozen, activation):
    if backend == "fallback" or (activation == "silu" and len(frozen) in (2, 5)):
        act = (activation, "tanh")
        assert_conforms(ours(*act), theirs(*act), sample(6, (5, 4, 3, 2), device=device), frozen=frozen)


def test_nan_and_infinity(backend, device):
    """Where torch has NaN or an infinity, so have we, and nowhere else."""
    for activation in ("relu", "gelu"):
        inputs, dy = sample(9, (4, 6, 3), device=device), torch.randn(9, 3, device=device)
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            inputs[0][i, 1] = value
        dy[4, 0] = float("inf")
        assert_conforms(ours(activation), theirs(activation), inputs, lambda y, dy=dy: dy)


def test_two_backward_passes(backend, device):
    leaves = [t.requires_grad_() for t in sample(35, (17, 9, 5), device=device)]
    y = ours("gelu", "tanh")(*leaves)
    first, second = torch.randn_like(y), torch.randn_like(y)
    found = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in (first, second, first)]
    assert_same_bits(found[1], run(ours("gelu", "tanh"), leaves, lambda y: second)[1:])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize(("backend", "dtype"), PAIRS[:-2], indirect=["backend"])
def test_the_same_bits_every_time(backend, device, dtype):
    inputs = sample(130, (17, 33, 9), dtype, device)
    upstream = torch.randn(130, 9, dtype=dtype, device=device)
    assert_same_bits(*(run(ours("silu"), inputs, lambda y: upstream) for _ in range(2)))


def test_an_input_changed_in_place_is_noticed(backend, device):
    inputs = [t.requires_grad_() for t in sample(5, device=device)]
    for tensor in inputs[:4]:
        y = ours("relu")(*inputs)
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("shape", [(5, 19), (2, 5, 19)])
def test_a_result_may_be_changed_in_place(backend, device, shape):
    x, (_, *parameters) = torch.randn(shape, device=device), sample(1, device=device)
    changed = [lambda *args, f=f: f(*args).add_(1).mul_(2) for f in (ours("gelu"), theirs("gelu"))]
    assert_conforms(*changed, [x, *parameters])


@pytest.mark.parametrize("act", [a for a in ACTS if a[0] != "relu" or a[1]])
def test_gradcheck(act):
    leaves = [t.requires_grad_() for t in sample(3, (3, 4, 2), torch.float64)]
    with dlgpu.use_backend("fallback"):
        torch.autograd.gradcheck(ours(*act), leaves)
        torch.autograd.gradgradcheck(ours(*act), leaves)


@pytest.mark.parametrize(
    ("backend", "act", "frozen"),
    [
        *(
            ("fallback", act, frozen)
            for act in (("relu", None), ("silu", "tanh"), (None, None))
            for frozen in ((), (0,), (1, 3), (0, 1, 3), (1, 2, 3, 4), (0, 1, 2))
        ),
        ("triton", ("relu", None), ()),
        ("triton", ("silu", "tanh"), (0, 1, 3)),
    ],
    indirect=["backend"],
)
def test_second_derivatives(backend, device, act, frozen):
    inputs = sample(6, (5, 4, 3), device=device)
    dy = torch.randn(6, 3, device=device)

    def second(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
        upstream = dy.to(dtype).requires_grad_()
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(function(*leaves), wanted, upstream, create_graph=True)
        # Sums of squares, so that each gradient has a cotangent of its own.
        return torch.autograd.grad(
            sum(g.square().sum() for g in first), [*wanted, upstream], allow_unused=True
        )

    found = second(ours(*act), torch.float32)
    expected, truth = (second(theirs(*act), dtype) for dtype in (torch.float32, torch.float64))
    for i, (a, t, e) in enumerate(zip(found, truth, expected, strict=True)):
        # Torch says None where the chain says zeros: a bias of the last layer has no second derivative.
        if e is None:
            assert a is None or not a.any()
        else:
            assert_accurate(a, t, e, f"second derivative {i}")


class Logged(torch.Tensor):
    """A subclass that sees the functions called with it."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_subclass_in_a_list_sees_the_call():
    """And a mode does: neither is passed by."""
    x, *parameters = sample(5)
    weights, biases = parameters[:3], parameters[3:]
    expected = ours("relu")(x, *parameters)
    for which in (weights, biases):
        which[1] = which[1].as_subclass(Logged)
        Logged.seen.clear()
        y = dlgpu.functional.mlp(x, weights, biases, activation="relu")
        assert any("dlgpu" in name for name in Logged.seen)
        assert isinstance(y, Logged)
        which[1] = which[1].as_subclass(torch.Tensor)
        assert_same_bits([y.as_subclass(torch.Tensor)], [expected])
    with Ops() as mode:
        ours("relu")(x, *[p.requires_grad_() for p in parameters])
    assert "dlgpu.mlp_fwd.default" in mode.seen


def test_a_transform_sees_a_list():
    """A wrapped weight is no plain tensor, in a list either: functorch has its say."""
    x, *parameters = (t.detach() for t in sample(5))

    def loss(w):
        return ours("tanh")(x, w, *parameters[1:]).square().sum()

    w = parameters[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(torch.func.grad(loss)(parameters[0]), expected)


@pytest.mark.parametrize("act", [("gelu", None), ("relu", "tanh"), (None, None)])
def test_explain_names_the_launches(backend, device, launches, act):
    launches.dry = True
    x, *parameters = (t.requires_grad_() for t in sample(5, device=device))
    parameters[4] = None
    options = {"activation": act[0], "out_activation": act[1]}
    explanation = dlgpu.explain("mlp", x, parameters[:3], parameters[3:], **options)
    assert launches == []
    assert str(explanation).startswith(f"mlp: backend {backend}, because chosen explicitly")
    y = dlgpu.functional.mlp(x, parameters[:3], parameters[3:], **options)
    y.backward(torch.ones_like(y))
    if backend == "triton":
        assert [name.split()[0] for name, _ in explanation.steps] == [name for name, *_ in launches]
        for (_, what), (*_, meta) in zip(explanation.steps, launches, strict=True):
            assert "block_m=" not in what or f"block_m={meta['BLOCK_M']}, " in what


def test_explain_names_what_goes_to_cublas():
    """Rows of 10 bfloat16 numbers lie at no multiple of 16 bytes; then the pass for dZ is back."""
    x, w, v = (
        torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((8192, 64), (4096, 64), (10, 4096))
    )
    text = str(dlgpu.explain("mlp", x, [w, v], activation="relu"))
    assert "cuBLAS (dz0)" in text
    assert "_linear_dz_kernel (dz0)" in text


# Dropout.
def dropped(activation, out_activation=None, slope=0.01, p=0.3, seed=11):
    """The chain with dropout, of the same seeds at each call."""

    def chain(x, ws, bs):
        torch.manual_seed(seed)
        return dlgpu.functional.mlp(
            x,
            ws,
            bs,
            activation=activation,
            out_activation=out_activation,
            negative_slope=slope,
            dropout=p,
        )

    return flat(chain)


def masks(M, sizes, device="cpu", p=0.3, seed=11):
    """What each hidden result is multiplied by, drawn element by element in row-major order, as `dropout` does."""
    torch.manual_seed(seed)
    seeds = _draw_seeds(len(sizes) - 2, device).cpu().numpy()
    kept = [
        keep(s[:1], 0, M * n, _probability(p)).reshape(M, n) for s, n in zip(seeds, sizes[1:-1], strict=True)
    ]
    return [torch.from_numpy(k).to(device).double() / (1 - p) for k in kept]


def masked(factors, activation, out_activation=None, slope=0.01):
    """torch's layers, with dropout's factors after all but the last."""

    def chain(x, ws, bs):
        for i, (w, b) in enumerate(zip(ws, bs, strict=True)):
            x = lookup(out_activation if i == len(ws) - 1 else activation).eager(F.linear(x, w, b), slope)
            if i < len(ws) - 1:
                wide = torch.float64 if x.dtype is torch.float64 else torch.float32
                x = (x.to(wide) * factors[i].to(wide)).to(x.dtype)
        return x

    return flat(chain)


@pytest.mark.parametrize(
    ("backend", "dtype", "act"),
    [
        (*pair, act)
        for pair in PAIRS
        for act in ACTS
        if pair[0] == "fallback"
        or (pair[1] is torch.float32 and act in (("gelu", None, 0.01), (None, "gelu", 0.01), ACTS[-3]))
        or act == ("tanh", None, 0.01)
    ],
    indirect=["backend"],
)
def test_dropout_is_a_mask_after_each_hidden_layer(backend, device, dtype, act):
    """Result and gradients are those of torch's layers with that mask between them."""
    factors = masks(37, SIZES, device)
    assert_conforms(dropped(*act), masked(factors, *act), sample(37, dtype=dtype, device=device))


# Numbers made four at a time and one at a time, several tiles, and rows by descriptors.
@pytest.mark.parametrize(
    ("M", "sizes", "dtype"),
    [
        (70, (5, 132, 7), torch.float32),
        (70, (5, 131, 130, 3), torch.float32),
        (66, (8, 200, 72, 16), torch.bfloat16),
        (1, (3, 1, 2), torch.float32),
        (0, (3, 5, 2), torch.float32),
    ],
)
def test_dropout_has_one_mask_for_all_backends(backend, device, M, sizes, dtype):
    """Of `dropout` itself for that seed: every sigmoid that is 0 was dropped."""
    x, *parameters = sample(M, sizes, dtype, device)
    found = torch.ops.dlgpu.mlp_fwd(
        x, parameters[: len(sizes) - 1], parameters[len(sizes) - 1 :], "sigmoid", None, 0.01,
        torch.tensor([[5, 0], [-7, 0]], device=device)[: len(sizes) - 2], 0.4, 0, backend,
    )[1]  # fmt: skip
    for hidden, seed in zip(found, (5, -7), strict=False):
        kept = keep(np.array([seed]), 0, hidden.numel(), _probability(0.4)).reshape(hidden.shape)
        assert torch.equal(hidden.cpu() != 0, torch.from_numpy(kept))
    x = torch.rand(M, sizes[1], dtype=dtype, device=device) + 1
    y = torch.ops.dlgpu.dropout(x, torch.tensor([5], device=device), 0.4, backend)
    assert not found or torch.equal(y != 0, found[0] != 0)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_dropout_by_torchs_operations(activation):
    """The backend that is torch's own functions: the same masks, results and gradients."""
    inputs, seeds, dy = sample(7), torch.tensor([[5, 0], [-7, 0]]), torch.randn(7, 9)

    def op(backend):
        return lambda x, *p: torch.ops.dlgpu.mlp(
            x, p[:3], p[3:], activation, "silu", 0.01, seeds, 0.3, backend
        )

    for a, e in zip(*(run(op(b), inputs, lambda y: dy) for b in ("torch", "fallback")), strict=True):
        torch.testing.assert_close(a, e)


def test_dropout_by_torchs_seed(backend, device):
    """torch.manual_seed repeats it, each call and each layer draw another, and a graph's backward drops what its forward
    did."""
    x, *parameters = (t.requires_grad_() for t in sample(6, (8, 8, 8, 8), device=device))

    def call():
        return dlgpu.functional.mlp(x, parameters[:3], parameters[3:], activation="tanh", dropout=0.4)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    again = call()
    assert_same_bits([again], [first])
    assert not torch.equal(first, second)
    dy = torch.randn_like(first)
    for y, other in ((second, None), (first, again)):
        once = torch.autograd.grad(y, [x, *parameters], dy, retain_graph=True)
        assert_same_bits(once, torch.autograd.grad(y, [x, *parameters], dy))
        if other is not None:
            assert_same_bits(once, torch.autograd.grad(other, [x, *parameters], dy))
    factors = masks(6, (8, 8, 8, 8))
    assert not torch.equal(factors[0], factors[1])


@pytest.mark.parametrize("options", [{"dropout": 0.0}, {"dropout": 0.5, "training": False}, {"dropout": 0}])
def test_nothing_is_dropped(backend, device, launches, options):
    """The same bits and launches, and no random number is drawn; nor with no hidden layer."""
    x, *parameters = sample(5, device=device)
    expected = ours("gelu")(x, *parameters)
    known = [name for name, *_ in launches]
    launches.clear()
    state = torch.get_rng_state()
    y = dlgpu.functional.mlp(x, parameters[:3], parameters[3:], activation="gelu", **options)
    assert_same_bits([y], [expected])
    assert [name for name, *_ in launches] == known
    one = dlgpu.functional.mlp(x, parameters[:1], parameters[3:4], activation="gelu", dropout=0.5)
    assert_same_bits([one], [dlgpu.functional.linear(x, parameters[0], parameters[3])])
    assert torch.equal(torch.get_rng_state(), state)


def test_all_is_dropped(backend, device):
    """As torch, which multiplies by 0: gradients are 0, NaN and infinity are NaN."""
    inputs = sample(5, device=device)
    zeros = [torch.zeros(5, n, device=device, dtype=torch.float64) for n in SIZES[1:-1]]
    assert_conforms(dropped("gelu", "tanh", p=1.0), masked(zeros, "gelu", "tanh"), inputs)
    inputs[0][1, 1] = float("inf")
    assert dropped("relu", p=1.0)(*inputs)[1].isnan().all()
    inputs[0] = inputs[0][None]
    assert dropped("relu", p=1)(*inputs).shape == (1, 5, 9)


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_dropout_launches_and_saves_no_more(backend, device, launches, activation):
    """But for the seeds, 8 bytes a layer, and an activation that was not needed before: no mask is stored."""
    launches.dry = True

    def shapes(p):
        inputs = [t.requires_grad_() for t in sample(5, device=device)]
        own, saved = {t.data_ptr() for t in inputs}, []
        launches.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = dropped(activation, p=p)(*inputs)
        y.backward(torch.ones_like(y))
        kept = [t for t in saved if t.data_ptr() not in own]
        return sorted(tuple(t.shape) for t in kept if t.is_floating_point()), [
            t.dtype for t in kept if not t.is_floating_point()
        ]

    plain, none = shapes(0.0)
    known = [name for name, *_ in launches]
    found, seeds = shapes(0.3)
    assert found == plain
    assert (none, seeds) == ([], [torch.int64])
    assert [name for name, *_ in launches] == known
    given = [
        dict(zip(kernel.arg_names, args, strict=False)).get("seed_ptr") for _, kernel, args, _ in launches
    ]
    drawn = [seed for seed in given if seed is not None]
    assert len(drawn) == (4 if backend == "triton" else 0)
    # Triton compiles a kernel anew for a pointer that 16 does not divide.
    assert all(seed.data_ptr() % 16 == 0 for seed in drawn)
    assert bool(known) == (backend == "triton")


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize(
    ("M", "sizes", "dtype", "activation"),
    [
        (96, (32, 64, 128, 16), torch.bfloat16, "relu"),
        (70, (19, 33, 36, 9), torch.float32, "gelu"),
    ],
)
def test_dropout_moves_a_seed_more(M, sizes, dtype, activation):
    """Each launch that makes or takes a hidden result reads 8 bytes more, once for each tile's epilogue; no mask is read or
    written."""
    x, *parameters = sample(M, sizes, dtype)
    ws, bs = parameters[:3], parameters[3:]
    dy = torch.randn(M, sizes[-1], dtype=dtype)

    def step(drops):
        with TrafficMeter() as meter:
            _, hidden, zs = mlp_kernels.mlp_fwd(x, ws, bs, activation, None, 0.0, 0, drops)
            saved = [*(zs or hidden), None]
            mlp_kernels.mlp_bwd(dy, [x, *hidden], ws, saved, activation, None, 0.0, 0, [True] * 7, drops)
        return meter.launches

    drops = [linear_kernels.Drop(torch.tensor([seed]), 0.25, 4 / 3) for seed in (1, 2)]
    plain, found = step(()), step(drops)
    assert [x.kernel for x in found] == [x.kernel for x in plain]
    products = 0
    for a, e in zip(found, plain, strict=True):
        assert a.clean
        seeded = "seed_ptr" in a.args
        products += seeded
        assert a.compulsory - e.compulsory == 8 * seeded
        more = a.requested - e.requested
        assert more == (a.args["seed_ptr"].requested if seeded else 0)
        assert more % 8 == 0
        assert seeded == (more > 0)
    # Two hidden layers, forward and backward.
    assert products == 4


@pytest.mark.parametrize("act", [("tanh", None), ("gelu", "tanh"), (None, None), ("leaky_relu", None)])
def test_gradcheck_of_dropout(act):
    leaves = [t.requires_grad_() for t in sample(3, (3, 5, 4, 2), torch.float64)]
    with dlgpu.use_backend("fallback"):
        torch.autograd.gradcheck(dropped(*act), leaves)
        torch.autograd.gradgradcheck(dropped(*act), leaves)


def test_second_derivatives_of_dropout(backend, device):
    inputs, factors = sample(6, (5, 4, 3), device=device), masks(6, (5, 4, 3), device)

    def second(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = function(*leaves)
        first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
        # A bias of the last layer has none.
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:-1])

    found = second(dropped("silu"), torch.float32)
    expected, truth = (second(masked(factors, "silu"), dtype) for dtype in (torch.float32, torch.float64))
    for i, (a, t, e) in enumerate(zip(found, truth, expected, strict=True)):
        assert_accurate(a, t, e, f"second derivative {i}")


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_dropout_where_cublas_multiplies(device, launches, monkeypatch, activation):
    """The same mask, by passes of their own."""
    factors = masks(37, SIZES, device)
    monkeypatch.setattr(configs, "linear_tile", lambda *args, **kwargs: configs.CuBlas("for the test"))
    inputs = sample(37, device=device)
    with dlgpu.use_backend("triton"):
        assert_conforms(dropped(activation), masked(factors, activation), inputs)
        explained = str(
            dlgpu.explain("mlp", inputs[0], inputs[1:4], inputs[4:], activation="tanh", dropout=0.3)
        )
    assert [name for name, *_ in launches].count("_dropout_kernel") == 4
    assert explained.count("_dropout_kernel") == 4


def test_explain_names_the_launches_of_dropout(device, launches):
    launches.dry = True
    x, *parameters = (t.requires_grad_() for t in sample(5, device=device))
    options = {"activation": "gelu", "dropout": 0.2}
    with dlgpu.use_backend("triton"):
        explanation = dlgpu.explain("mlp", x, parameters[:3], parameters[3:], **options)
        y = dlgpu.functional.mlp(x, parameters[:3], parameters[3:], **options)
        y.backward(torch.ones_like(y))
    assert [name.split()[0] for name, _ in explanation.steps] == [name for name, *_ in launches]


def test_large_tiles_have_no_room_for_a_mask():
    """The registers that random numbers take: see configs.py."""
    x, w = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((8192, 4096), (4096, 4096)))
    texts = [
        str(dlgpu.explain("mlp", x, [w, w], activation="gelu", dropout=p, training=training))
        for p, training in ((0.0, True), (0.1, True), (0.1, False))
    ]
    assert "128 x 256" in texts[0].split("(x2)")[0]
    assert "128 x 256" not in texts[1].split("(x2)")[0]
    assert "random numbers" in texts[1]
    assert texts[2] == texts[0]


@pytest.mark.parametrize(
    ("dropout", "error", "message"),
    [
        (1.5, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
        (-0.1, ValueError, "dropout probability has to be between 0 and 1, but got -0.1"),
        (float("nan"), RuntimeError, "dropout probability has to be between 0 and 1, but got nan"),
        ("a", TypeError, "mlp: dropout must be a number, got str"),
    ],
)
def test_bad_dropout(dropout, error, message):
    x, w = torch.ones(2, 3), torch.ones(3, 3)
    for training in (True, False):
        with pytest.raises(error, match=message):
            dlgpu.functional.mlp(x, [w, w], activation="relu", dropout=dropout, training=training)
    if error is ValueError:
        with pytest.raises(error, match=message):
            dlgpu.nn.MLP((3, 3, 3), "relu", dropout=dropout)


# Bytes.
def partial_sums(meter):
    """Bytes of the float32 rows of column sums, written once and read once."""
    return sum(
        launch.args["partial_ptr"].requested for launch in meter.launches if "partial_ptr" in launch.args
    )


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize(
    ("M", "sizes", "dtype", "activation", "bias"),
    [
        (96, (32, 48, 64, 16), torch.bfloat16, "relu", False),
        (33, (16, 24, 8), torch.bfloat16, "gelu", False),
        (33, (16, 24, 8), torch.bfloat16, "relu", True),
        (70, (19, 33, 17, 9), torch.float32, "gelu", True),
    ],
)
def test_the_chain_saves_half_of_the_bytes_between_layers(M, sizes, dtype, activation, bias):
    """At 16 bits layers on their own move 8 bytes an element of each hidden layer in backward besides their products: dX is
    written, and read again beside what the derivative needs, and dZ written. The chain reads the latter and writes dZ, 4
    bytes; everything else is the same, to the byte, but for the partial sums of the biases' gradients."""
    x, *parameters = sample(M, sizes, dtype, bias=bias)
    layers = len(sizes) - 1
    ws, bs = parameters[:layers], parameters[layers:]
    needs = [True, *[True] * layers, *[bias] * layers]
    dy = torch.randn(M, sizes[-1], dtype=dtype)
    _, hidden, zs = mlp_kernels.mlp_fwd(x, ws, bs, activation, None, 0.0, 0)
    saved, inputs = zs or hidden, [x, *hidden]

    with TrafficMeter() as chained:
        dx, dws, _ = mlp_kernels.mlp_bwd(dy, inputs, ws, [*saved, None], activation, None, 0.0, 0, needs)
    with TrafficMeter() as single:
        grad, apart = dy, []
        for i in reversed(range(layers)):
            act, kept = (None, None) if i == layers - 1 else (activation, saved[i])
            grad, dw, db = linear_kernels.linear_bwd(
                grad, inputs[i], ws[i], kept, act, 0.0, (True, True, bias)
            )
            apart = [(dw, db), *apart]
    for launch in (*chained.launches, *single.launches):
        assert launch.clean
    elements = M * sum(sizes[1:-1])
    difference = 2 * dtype.itemsize * elements
    compulsory, requested = (
        sum(getattr(x, kind) for x in single.launches) - sum(getattr(x, kind) for x in chained.launches)
        for kind in ("compulsory", "requested")
    )
    # A row for each strip on their own, for each row of tiles in the chain.
    difference += partial_sums(single) - partial_sums(chained)
    assert bool(partial_sums(chained)) == bias
    assert compulsory == difference
    assert requested == difference
    # 8 bytes an element without the chain, of which it saves 4: from what moved, not from the formula.
    if dtype is torch.bfloat16 and not bias:
        passes = sum(x.requested for x in single.launches if x.kernel == "_linear_dz_kernel")
        assert passes + 2 * elements == 8 * elements
        assert requested == 4 * elements
        assert not [x for x in chained.launches if x.kernel == "_linear_dz_kernel"]
    # And nothing is lost by it.
    if dtype is torch.float32:
        for a, e in zip([dx, *dws], [grad, *(dw for dw, _ in apart)], strict=True):
            torch.testing.assert_close(a, e)


# One feature: its matrices' strides of 1 say nothing about which side is the batch.
@pytest.mark.parametrize(
    ("sizes", "dtype", "dropout"),
    [
        ((64, 48, 32, 10), torch.float32, 0.0),
        ((64, 48, 32, 16), torch.bfloat16, 0.0),
        ((1, 19, 1), torch.float32, 0.0),
        ((64, 48, 32, 10), torch.float32, 0.1),
        ((64, 48, 48, 48, 16), torch.bfloat16, 0.1),
    ],
)
def test_a_partial_last_batch_compiles_nothing_new(device, launches, sizes, dtype, dropout):
    net = dlgpu.nn.MLP(sizes, "gelu", "relu", device=device, dtype=dtype, dropout=dropout)

    def step(batch):
        launches.clear()
        y = net(torch.randn(batch, sizes[0], device=device, dtype=dtype).requires_grad_())
        y.backward(torch.ones_like(y))
        return {specialization(*launch) for launch in launches}

    launches.dry = True
    with dlgpu.use_backend("triton"):
        known = step(64)
        assert len(known) > 5
        for batch in (29, 1):
            assert sorted(step(batch) - known) == []


# The module.
MODULES = {
    "relu": torch.nn.ReLU,
    "leaky_relu": lambda: torch.nn.LeakyReLU(0.2),
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
    "gelu": torch.nn.GELU,
    "gelu_tanh": lambda: torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU,
    None: None,
}


def sequential(sizes, activation, out_activation=None, bias=True):
    modules = []
    for i, (k, n) in enumerate(itertools.pairwise(sizes)):
        modules.append(torch.nn.Linear(k, n, bias))
        act = out_activation if i == len(sizes) - 2 else activation
        modules += [MODULES[act]()] if act else []
    return torch.nn.Sequential(*modules)


def is_chain(y):
    return type(y.grad_fn).__name__ == "MLPFunctionBackward"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "out_activation"), [*((n, None) for n in MODULES), ("relu", "tanh")])
def test_the_module_is_torch_s_sequential(activation, out_activation, bias):
    args = ((6, 5, 4, 3), activation, out_activation, bias)
    torch.manual_seed(5)
    them = sequential(*args)
    torch.manual_seed(5)
    us = dlgpu.nn.MLP(*args, negative_slope=0.2)
    assert isinstance(us, torch.nn.Sequential)
    assert list(us.state_dict()) == list(them.state_dict())
    assert_same_bits(us.state_dict().values(), them.state_dict().values())
    us.load_state_dict(sequential(*args).state_dict())
    them.load_state_dict(us.state_dict())
    x, dy = torch.randn(2, 7, 6), torch.randn(2, 7, 3)
    assert is_chain(us(x))
    for module in (us, them):
        module(x).backward(dy)
    torch.testing.assert_close(us(x), them(x))
    for a, e in zip(us.parameters(), them.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.parametrize("activation", ["gelu", None])
def test_the_module_with_dropout_is_torch_s_sequential(activation):
    """Keys, parameters and places; in evaluation its results."""
    torch.manual_seed(5)
    them = sequential((6, 5, 4, 3), activation)
    for i in (1, 2) if activation is None else (2, 5):
        them.insert(i + (activation is None) * (i - 1), torch.nn.Dropout(0.3))
    torch.manual_seed(5)
    us = dlgpu.nn.MLP((6, 5, 4, 3), activation, dropout=0.3)
    assert [isinstance(m, torch.nn.Dropout) for m in us] == [isinstance(m, torch.nn.Dropout) for m in them]
    assert sum(isinstance(m, torch.nn.Dropout) for m in us) == 2
    assert list(us.state_dict()) == list(them.state_dict())
    assert_same_bits(us.state_dict().values(), them.state_dict().values())
    x = torch.randn(7, 6)
    torch.testing.assert_close(us.eval()(x), them.eval()(x))
    assert_same_bits([us(x)], [us.eval()(x)])
    us.train()
    y = us(x)
    assert not torch.equal(y, us(x))
    torch.manual_seed(11)
    y = us(x)
    layers = [m for m in us if isinstance(m, torch.nn.Linear)]
    weights, biases = [m.weight for m in layers], [m.bias for m in layers]
    assert_same_bits([y], [dropped(activation)(x, *weights, *biases)])
    assert "Dropout(p=0.3, inplace=False)" in repr(us)


def test_what_of_dropout_is_a_chain(launches):
    def net():
        return dlgpu.nn.MLP((6, 5, 4, 3), "relu", dropout=0.3)

    x = torch.randn(7, 6)
    with dlgpu.use_backend("fallback"):
        assert is_chain(net()(x))
        assert is_chain(net().eval()(x))
        other = net()
        other[5].p = 0.4
        assert not is_chain(other(x))
        # Two of a kind in effect, and what is dropped is of one layer.
        other = net()
        other[5].eval()
        assert not is_chain(other(x))
        assert (other[:6](x).detach() >= 0).all()
        other[2].p = 0.0
        assert is_chain(other(x))
        other = net()
        other.append(dlgpu.nn.Dropout(0.3))
        assert not is_chain(other(x))
        other = net()
        del other[5]
        assert not is_chain(other(x))
        other = net()
        other[2] = torch.nn.Dropout(0.3)
        assert not is_chain(other(x))
        # One after the other draws masks of the layers' own, whose p are 1.
        other = net()
        other[2].p = other[5].p = 1.0
        torch.testing.assert_close(other(x), other[6].bias.expand(7, 3))


def see_forward(net, seen):
    net[1].register_forward_hook(lambda module, args, y: seen.append(y))


def see_input(net, seen):
    net[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def see_gradient(net, seen):
    net[2].register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0]))


def see_gradient_first(net, seen):
    net[0].register_full_backward_pre_hook(lambda module, dy: seen.append(dy[0]))


@pytest.mark.parametrize("hook", [see_forward, see_input, see_gradient, see_gradient_first])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_see_what_they_do_in_torch(hook):
    """The hidden results, and dY where the chain has dZ alone."""
    them = sequential((6, 5, 4, 3), "relu")
    us = dlgpu.nn.MLP((6, 5, 4, 3), "relu")
    us.load_state_dict(them.state_dict())
    x = torch.randn(7, 6)
    seen = [], []
    for module, its in zip((us, them), seen, strict=True):
        hook(module, its)
        module(x).square().sum().backward()
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(*(its[0] for its in seen))
    for a, e in zip(us.parameters(), them.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_what_keeps_the_chain_away():
    """And what it leaves, it takes up again."""
    x, net = torch.randn(7, 6), dlgpu.nn.MLP((6, 5, 3), "relu")
    y = net(x)
    assert is_chain(y)

    def other(change):
        changed = copy.deepcopy(net)
        change(changed)
        return changed(x)

    for change in (
        lambda net: parametrizations.weight_norm(net[2]),
        lambda net: setattr(net[1], "forward", torch.relu),
        lambda net: net.__setitem__(1, torch.nn.ReLU()),
        lambda net: net.__setitem__(2, torch.nn.Linear(5, 3)),
        lambda net: net.append(torch.nn.Dropout(0.0)),
        lambda net: net.insert(0, torch.nn.Identity()),
        lambda net: net[0].compile(backend="eager"),
    ):
        found = other(change)
        assert not is_chain(found)
        assert found.shape == y.shape
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    assert not is_chain(net(x))
    handle.remove()
    handle = net[0].register_forward_hook(lambda module, args, y: y + 1)
    assert not is_chain(net(x))
    assert not torch.equal(net(x), y)
    handle.remove()
    assert is_chain(net(x))
    # Layers more, or another activation everywhere, are still a chain.
    assert is_chain(other(lambda net: net.append(dlgpu.nn.Activation("tanh"))))
    assert is_chain(other(lambda net: net.__delitem__(1)))
    # Two kinds of activation between layers are none.
    for added in (dlgpu.nn.Activation("silu"), dlgpu.nn.Linear(3, 3)):
        net.append(added)
    assert not is_chain(net(x))
    torch.testing.assert_close(net(x), torch.nn.Sequential.forward(net, x))


def test_pruning_is_seen():
    """It hangs a hook on the layer and puts the product of weight and mask in the weight's place."""
    net = dlgpu.nn.MLP((6, 5, 3), "relu")
    prune.l1_unstructured(net[0], "weight", 10)
    x = torch.randn(7, 6)
    y = net(x)
    torch.testing.assert_close(
        y, F.linear(F.relu(F.linear(x, net[0].weight, net[0].bias)), net[2].weight, net[2].bias)
    )
    with torch.no_grad():
        net[0].weight_orig.mul_(2)
    assert not torch.equal(net(x), y)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_the_module_can_be_copied(how):
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
    net = dlgpu.nn.MLP((6, 5, 3), "leaky_relu", "silu", negative_slope=-0.3)
    other, x = again(net), torch.randn(7, 6)
    assert other[0].weight.data_ptr() != net[0].weight.data_ptr()
    assert_same_bits([other(x)], [net(x)])
    assert is_chain(other(x))
    assert repr(other) == repr(net)
    assert "Activation('leaky_relu', negative_slope=-0.3)" in repr(net)


def test_slices_are_sequential():
    net = dlgpu.nn.MLP((6, 5, 3), "relu")
    part = net[:2]
    assert type(part) is torch.nn.Sequential
    assert part[0] is net[0]
    assert net[-1] is net[2]
    x = torch.randn(7, 6)
    assert_same_bits([net[2](part(x))], [net(x)])


def test_the_module_compiles():
    torch._dynamo.reset()
    net, x = dlgpu.nn.MLP((6, 5, 3), "gelu"), torch.randn(7, 6)
    fast = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(fast, [x], torch.ones_like), run(net, [x], torch.ones_like))
    torch._dynamo.reset()


def test_the_module_follows_to_and_freezing(backend, device):
    net = dlgpu.nn.MLP((6, 5, 3), "gelu", bias=False).to(device, torch.bfloat16)
    net[0].requires_grad_(False)
    y = net(torch.randn(7, 6, device=device, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype is net[2].weight.grad.dtype is torch.bfloat16
    assert net[0].weight.grad is None
    assert dlgpu.nn.MLP((2, 3), None, device="meta", dtype=torch.float64)[0].weight.dtype is torch.float64
