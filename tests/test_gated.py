"""Gated units against torch's operations one by one, forward and backward, on every backend; and SwiGLU, GEGLU, ReGLU."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations

import dlgpu.functional
import dlgpu.nn
from dlgpu.bench.meter import TrafficMeter
from dlgpu.kernels import _triton, configs, gated
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from test_dispatch import specialization
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

ACTS = [*((name, 0.01) for name in ACTIVATIONS), (None, 0.01), ("leaky_relu", -0.5)]
# Of those, what the kernels run: for each dtype, derivatives from z and from y.
INTERPRETED = {
    torch.float32: [("gelu", 0.01), ("tanh", 0.01), *ACTS[-2:]],
    torch.bfloat16: [("silu", 0.01), ("relu", 0.01)],
    torch.float16: [("silu", 0.01)],
}
# (rows, in_features, hidden_features, out_features): primes; whole tiles and one more; nothing.
SHAPES = [
    (1, 1, 1, 1),
    (31, 37, 29, 11),
    (64, 64, 64, 64),
    (65, 33, 67, 5),
    (0, 5, 7, 3),
    (5, 0, 3, 2),
    (4, 3, 0, 2),
]


def ours(activation="silu", slope=0.01):
    return lambda *args: dlgpu.functional.gated_linear(*args, activation=activation, negative_slope=slope)


def theirs(activation="silu", slope=0.01):
    def gated(x, w, b=None, w_out=None, b_out=None):
        gate, up = F.linear(x, w, b).chunk(2, -1)
        h = lookup(activation).eager(gate, slope) * up
        return h if w_out is None else F.linear(h, w_out, b_out)

    return gated


def sample(M, K, H, N=None, dtype=torch.float32, device="cpu", bias=True):
    """[x, w, b] and, with N, [w_out, b_out]: gate, up and result of about unit variance."""

    def normal(*shape, scale=1.0):
        return torch.randn(shape, dtype=dtype, device=device) * scale

    inner = [normal(M, K), normal(2 * H, K, scale=max(K, 1) ** -0.5), normal(2 * H) if bias else None]
    if N is None:
        return inner
    return [*inner, normal(N, H, scale=max(H, 1) ** -0.5), normal(N) if bias else None]


@pytest.mark.parametrize(
    ("backend", "dtype", "act"),
    [(*pair, act) for pair in PAIRS for act in ACTS if pair[0] == "fallback" or act in INTERPRETED[pair[1]]],
    indirect=["backend"],
)
def test_activations(backend, device, dtype, act):
    assert_conforms(ours(*act), theirs(*act), sample(37, 35, 33, 17, dtype, device))


@pytest.mark.parametrize("act", [("silu", 0.01), ("tanh", 0.01)])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS[:-1], indirect=["backend"])
def test_without_a_projection(backend, device, dtype, act):
    """The pass over dh, [g | u]."""
    assert_conforms(ours(*act), theirs(*act), sample(70, 19, 24, None, dtype, device))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape, bias):
    if bias or backend == "fallback":
        assert_conforms(ours(), theirs(), sample(*shape, device=device, bias=bias))


# The tiles for 16 bits and aligned rows, beyond one in each direction.
@pytest.mark.parametrize("shape", [(150, 80, 144, 32), (40, 16, 1040, 16)])
def test_aligned_rows(device, shape):
    with dlgpu.use_backend("triton"):
        assert_conforms(ours("gelu"), theirs("gelu"), sample(*shape, torch.bfloat16, device))


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0, 3)])
def test_leading_dimensions(backend, device, lead):
    _, *parameters = sample(1, 11, 6, 5, device=device)
    x = torch.randn(*lead, 11, device=device)
    assert_conforms(ours("relu"), theirs("relu"), [x, *parameters])
    # `view` before `contiguous` fails here.
    if lead == (2, 3):
        upstream = torch.randn(6, 2, 3, device=device).permute(2, 1, 0)
        args = [x.transpose(0, 1), *parameters[:2]]
        assert_conforms(ours("relu"), theirs("relu"), args, lambda y: upstream)


@pytest.mark.parametrize(
    ("backend", "layout", "which"),
    [
        *(
            ("fallback", layout, which)
            for layout in list(LAYOUTS)[1:]
            for which in ("input", "weight", "out_weight", "upstream")
        ),
        *(("triton", "transposed", which) for which in ("input", "weight", "out_weight", "upstream")),
        ("triton", "columns apart", "upstream"),
    ],
    indirect=["backend"],
)
def test_layouts(backend, device, layout, which):
    x, w, b, w_out, b_out = sample(35, 33, 18, 17, device=device)
    upstream, change = torch.randn(35, 17, device=device), LAYOUTS[layout]
    if which == "upstream":
        upstream = change(upstream)
    args = [change(x) if which == "input" else x, change(w) if which == "weight" else w, b]
    args += [change(w_out) if which == "out_weight" else w_out, b_out]
    assert_conforms(ours(), theirs(), args, lambda y: upstream)
    if which == "upstream":
        dh = change(torch.randn(35, 18, device=device))
        assert_conforms(ours(), theirs(), args[:3], lambda y: dh)


def test_biases_with_strides(backend, device):
    x, w, _, w_out, _ = sample(5, 3, 4, 6, device=device)
    b = torch.randn(16, device=device)[::2]
    assert_conforms(ours(), theirs(), [x, w, b, w_out, b[:1].expand(6)])


def test_the_gate_is_the_first_half():
    x = torch.ones(1, 1)
    w = torch.tensor([[-1.0], [2.0], [3.0], [4.0]])
    assert torch.equal(ours("relu")(x, w), torch.tensor([[0.0, 8.0]]))


# (needs of x, w, b, w_out, b_out; launches of backward): g the product with the gate's gradient, v the pass that makes it
# or h alone, p a product, d column sums of dy, s their sum.
NEEDS = [
    ("11111", "ds gs p p p"),
    ("11010", "g p p p"),
    ("11000", "g p p"),
    ("10000", "g p"),
    ("01000", "g p"),
    ("00100", "gs"),
    # h alone is made again.
    ("00010", "v p"),
    ("00011", "ds v p"),
    ("00001", "ds"),
]


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("pattern", "expected"), NEEDS)
def test_nothing_needless_runs(backend, device, launches, activation, pattern, expected):
    launches.dry = True
    needs = [n == "1" for n in pattern]
    inputs = [t.requires_grad_(n) for t, n in zip(sample(5, 3, 4, 6, device=device), needs, strict=True)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = ours(activation)(*inputs)
    # [g | u] and never h, which is [5, 4].
    assert ((5, 8) in saved) == any(needs[:4])
    assert (5, 4) not in saved
    forward = len(launches)
    y.backward(torch.ones_like(y))
    for t, need in zip(inputs, needs, strict=True):
        assert (t.grad is not None) == need
        assert t.grad is None or t.grad.shape == t.shape
    if backend == "fallback":
        return
    kinds = {
        "_gated_dgrad_kernel": "g",
        "_gated_dgrad_tma_kernel": "g",
        "_gated_bwd_kernel": "v",
        "_linear_kernel": "p",
        "_linear_tma_kernel": "p",
        "_linear_dz_kernel": "d",
        "_sum_kernel": "s",
    }
    assert forward == 2
    assert "".join(kinds[name] for name, *_ in launches[2:]) == expected.replace(" ", "")
    given = [dict(zip(k.arg_names, args, strict=False)) for _, k, args, _ in launches]
    assert (given[0]["gu_ptr"] is not None) == any(needs[:4])
    for (name, *_), args in zip(launches, given, strict=True):
        if name in ("_gated_dgrad_kernel", "_gated_bwd_kernel"):
            assert (args["dgu_ptr"] is not None) == (needs[0] or needs[1])
            assert (args["h_ptr"] is not None) == needs[3]
            assert (args["partial_ptr"] is not None) == needs[2]


def test_without_gradient_only_h_is_written(device, launches):
    launches.dry = True
    inputs = [t.requires_grad_() for t in sample(5, 3, 4, 6, device=device)]
    with dlgpu.use_backend("triton"):
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                ours()(*inputs)
                ours()(*inputs[:3])
    found = [dict(zip(k.arg_names, args, strict=False)) for name, k, args, _ in launches if "gated" in name]
    assert [args["gu_ptr"] for args in found] == [None] * 4


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3,), (0, 1, 2), (0, 1, 3, 4), (0, 1, 2, 4)])
def test_frozen(backend, device, frozen):
    if backend == "fallback" or len(frozen) < 3:
        assert_conforms(ours("gelu"), theirs("gelu"), sample(6, 5, 4, 3, device=device), frozen=frozen)


def test_nan_and_infinity(backend, device):
    """Where torch has NaN or an infinity, so have we, and nowhere else: not in column sums of rows that are not there."""
    for activation, where in (("silu", 0), ("relu", 3)):
        args, dy = sample(9, 4, 6, 3, device=device), torch.randn(9, 3, device=device)
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            args[where][i, 1] = value
        assert_conforms(ours(activation), theirs(activation), args, lambda y, dy=dy: dy)


def test_rows_that_are_not_there_are_in_no_sum(backend, device):
    """Beyond the last row the product is 0 times the weight, which is NaN where that is infinite."""
    args = sample(1, 4, 6, 3, device=device)
    args[3][0, 1] = float("inf")
    found = assert_conforms(ours(), theirs(), args)
    assert found[3].isinf().any()
    assert not found[3].isnan().any()


def test_the_same_bits_with_and_without_gradient(backend, device):
    inputs = [t.requires_grad_() for t in sample(35, 17, 9, 5, device=device)]
    y = ours("gelu")(*inputs)
    with torch.no_grad():
        assert_same_bits([ours("gelu")(*inputs)], [y])


def test_two_backward_passes(backend, device):
    leaves = [t.requires_grad_() for t in sample(35, 17, 9, 5, device=device)]
    y = ours()(*leaves)
    first, second = torch.randn_like(y), torch.randn_like(y)
    found = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in (first, second, first)]
    assert_same_bits(found[1], run(ours(), leaves, lambda y: second)[1:])
    assert_same_bits(found[2], found[0])


def test_an_input_changed_in_place_is_noticed(backend, device):
    inputs = [t.requires_grad_() for t in sample(5, 3, 4, 6, device=device)]
    for tensor in (inputs[0], inputs[1], inputs[3]):
        y = ours()(*inputs)
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_a_result_may_be_changed_in_place(device, shape):
    _, *parameters = sample(1, 7, 3, 4)
    changed = [lambda *args, f=f: f(*args).add_(1).mul_(2) for f in (ours(), theirs())]
    assert_conforms(*changed, [torch.randn(shape), *parameters])
    assert_conforms(*changed, [torch.randn(shape), *parameters[:2]])


@pytest.mark.parametrize("act", [a for a in ACTS if a[0] != "relu"])
@pytest.mark.parametrize("project", [True, False])
def test_gradcheck(act, project):
    leaves = [t.requires_grad_() for t in sample(3, 4, 2, 3 if project else None, torch.float64)]
    with dlgpu.use_backend("fallback"):
        torch.autograd.gradcheck(ours(*act), leaves)
        torch.autograd.gradgradcheck(ours(*act), leaves)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (3, 4), (0, 1, 2)])
def test_second_derivatives(backend, device, frozen):
    inputs = sample(6, 5, 4, 3, device=device)
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

    found = second(ours(), torch.float32)
    expected, truth = (second(theirs(), dtype) for dtype in (torch.float32, torch.float64))
    for i, (a, t, e) in enumerate(zip(found, truth, expected, strict=True)):
        # Torch says None where ours says zeros: the last bias has no second derivative.
        if e is None:
            assert a is None or not a.any()
        else:
            assert_accurate(a, t, e, f"second derivative {i}")


@pytest.mark.parametrize("out_features", [6, None])
def test_explain_names_the_launches(backend, device, launches, out_features):
    launches.dry = True
    args = [t.requires_grad_() for t in sample(5, 3, 4, out_features, device=device)]
    explanation = dlgpu.explain("gated_linear", *args, activation="gelu")
    assert launches == []
    assert str(explanation).startswith(f"gated_linear: backend {backend}, because chosen explicitly")
    y = ours("gelu")(*args)
    y.backward(torch.ones_like(y))
    if backend == "triton":
        assert [name.split()[0] for name, _ in explanation.steps] == [name for name, *_ in launches]
        for (_, what), (*_, meta) in zip(explanation.steps, launches, strict=True):
            assert "block_m=" not in what or f"block_m={meta['BLOCK_M']}, " in what


def test_explain_names_what_goes_to_cublas():
    x, w = (torch.empty(s, device="meta") for s in ((8192, 4096), (8192, 4096)))
    text = str(dlgpu.explain("gated_linear", x, w))
    assert "cuBLAS (h)" in text
    assert "_gated_bwd_kernel (h)" in text


def test_what_cublas_multiplies(device, monkeypatch):
    """Its products, and one pass that gates."""
    monkeypatch.setattr(configs, "gated_tile", lambda *args, **kwargs: configs.CuBlas("for the test"))
    with dlgpu.use_backend("triton"):
        for bias in (True, False):
            args = sample(37, 19, 24, 9, device=device, bias=bias)
            assert_conforms(ours(), theirs(), args)


# Bytes.
def cdiv(a, b):
    return -(-a // b)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize(
    ("shape", "dtype", "bias"),
    [
        ((70, 19, 35, 9), torch.float32, True),
        ((3, 5, 7, 2), torch.float32, False),
        ((70, 32, 80, 48), torch.bfloat16, True),
        ((130, 24, 20, 11), torch.bfloat16, True),
    ],
)
def test_bytes(shape, dtype, bias):
    """Forward reads x once for each column of tiles, w and the bias once for each row of tiles, and writes h, in training
    [g | u] beside it. Backward reads [g | u] and writes [dg | du] and h, once each, and dh never exists."""
    M, K, H, N = shape
    x, w, b, w_out, _ = sample(M, K, H, N, dtype, bias=bias)
    dy, dh = torch.randn(M, N, dtype=dtype), torch.randn(M, H, dtype=dtype)
    with TrafficMeter() as meter:
        gated.gated_fwd(x, w, b, "silu", 0.0, False)
        _, gu = gated.gated_fwd(x, w, b, "silu", 0.0, True)
        gated.gated_dgrad(dy, w_out, gu, "silu", 0.0, True, True, bias)
        gated.gated_bwd(dh, gu, "silu", 0.0, True, False, bias)
        gated.gated_bwd(None, gu, "silu", 0.0, False, True, False)
    assert all(launch.clean for launch in meter.launches)
    size = dtype.itemsize
    tiles = gated.gated_tiles(x, w, w_out)
    fwd, dgrad, strips = tiles["h"], tiles["dh"], cdiv(M, configs.gated_bwd_tile(dtype, H).rows)
    across, down = cdiv(H, fwd.block_n), cdiv(M, fwd.block_m)

    # A descriptor's last tile of the gate's columns reaches into the up projection's rows of w; those are not stored.
    gate_rows = min(across * fwd.block_n, 2 * H) if fwd.tma else H

    def forward(outputs):
        compulsory = M * K + 2 * H * K + 2 * H * bias + M * H * outputs
        requested = across * M * K + down * ((gate_rows + H) * K + 2 * H * bias) + M * H * outputs
        return size * compulsory, size * requested

    def sums(rows):
        moved = rows * 2 * H * 4 + size * 2 * H
        return [(moved, moved)] if bias else []

    across_out, down_out = cdiv(H, dgrad.block_n), cdiv(M, dgrad.block_m)
    moved = size * (2 + 2 + 1) * M * H + 4 * down_out * 2 * H * bias
    one_pass = size * (1 + 2 + 2) * M * H + 4 * strips * 2 * H * bias
    laws = [
        forward(1),
        forward(3),
        (size * (M * N + N * H) + moved, size * (across_out * M * N + down_out * N * H) + moved),
        *sums(down_out),
        (one_pass, one_pass),
        *sums(strips),
        (size * 3 * M * H, size * 3 * M * H),
    ]
    assert [(launch.compulsory, launch.requested) for launch in meter.launches] == laws


@pytest.mark.parametrize("sizes", [(64, 48, 10), (64, 48, 32), (1, 19, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_partial_last_batch_compiles_nothing_new(device, launches, sizes, dtype):
    """Of the unit's own kernels."""
    unit = dlgpu.nn.SwiGLU(*sizes, bias=True, device=device, dtype=dtype)

    def step(batch):
        launches.clear()
        y = unit(torch.randn(batch, sizes[0], device=device, dtype=dtype).requires_grad_())
        y.backward(torch.ones_like(y))
        dlgpu.functional.gated_linear(
            torch.randn(batch, sizes[0], device=device, dtype=dtype), unit.w12.weight
        ).sum().backward()
        return {specialization(*launch) for launch in launches if "gated" in launch[0]}

    launches.dry = True
    with dlgpu.use_backend("triton"):
        known = step(64)
        assert len(known) > 2
        for batch in (29, 1):
            assert sorted(step(batch) - known) == []


class Logged(torch.Tensor):
    """A subclass that sees the functions called with it."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_sees_the_call():
    args = sample(5, 4, 3, 2)
    expected = ours()(*args)
    args[3] = args[3].as_subclass(Logged)
    assert isinstance(ours()(*args), Logged)
    assert any("gated_linear" in name for name in Logged.seen)
    assert_same_bits([ours()(*args).as_subclass(torch.Tensor)], [expected])


# The modules.
UNITS = {"SwiGLU": F.silu, "GEGLU": F.gelu, "ReGLU": F.relu}


def apart(name, unit, x):
    gate, up = F.linear(x, unit.w12.weight, unit.w12.bias).chunk(2, -1)
    return F.linear(UNITS[name](gate) * up, unit.w3.weight, unit.w3.bias)


def is_fused(y):
    return type(y.grad_fn).__name__ == "GatedLinearFunctionBackward"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", UNITS)
def test_the_modules(name, bias):
    unit = getattr(dlgpu.nn, name)(6, 5, 4, bias=bias)
    x = torch.randn(2, 7, 6)
    y = unit(x)
    assert is_fused(y)
    torch.testing.assert_close(y, apart(name, unit, x))
    names = ["w12.weight", "w12.bias", "w3.weight", "w3.bias"]
    assert list(unit.state_dict()) == (names if bias else names[::2])
    assert unit.w12.weight.shape == (10, 6)
    assert getattr(dlgpu.nn, name)(6, 5)(x).shape == x.shape
    other = pickle.loads(pickle.dumps(copy.deepcopy(unit)))
    assert_same_bits([other(x)], [y])


def test_the_unit_of_llama():
    """Three matrices, as its checkpoints have them."""
    gate, up, down = (torch.nn.Linear(a, b, bias=False) for a, b in ((6, 5), (6, 5), (5, 6)))
    unit, x = dlgpu.nn.SwiGLU(6, 5), torch.randn(7, 6)
    unit.load_state_dict({"w12.weight": torch.cat([gate.weight, up.weight]), "w3.weight": down.weight})
    torch.testing.assert_close(unit(x), down(F.silu(gate(x)) * up(x)))


def test_initialization_is_torch_s():
    torch.manual_seed(5)
    theirs = torch.nn.Linear(6, 10), torch.nn.Linear(5, 6)
    torch.manual_seed(5)
    unit = dlgpu.nn.SwiGLU(6, 5, bias=True)
    assert_same_bits(unit.parameters(), [p for layer in theirs for p in layer.parameters()])


def test_what_keeps_the_kernels_away():
    """A hook sees what it would in torch, and a replaced layer runs."""
    unit, x, seen = dlgpu.nn.SwiGLU(6, 5, bias=True), torch.randn(7, 6), []
    y = unit(x)

    def other(change):
        changed = copy.deepcopy(unit)
        change(changed)
        return changed(x)

    for change in (
        lambda unit: unit.w12.register_forward_hook(lambda module, args, y: seen.append(y)),
        lambda unit: unit.w3.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        lambda unit: parametrizations.weight_norm(unit.w3),
        lambda unit: setattr(unit, "w12", torch.nn.Sequential(unit.w12)),
    ):
        found = other(change)
        assert not is_fused(found)
        torch.testing.assert_close(found, y)
    gu = F.linear(x, unit.w12.weight, unit.w12.bias)
    torch.testing.assert_close(seen[0], gu)
    torch.testing.assert_close(seen[1], F.silu(gu[:, :5]) * gu[:, 5:])
    assert is_fused(unit(x))


def test_the_module_compiles():
    torch._dynamo.reset()
    unit, x = dlgpu.nn.SwiGLU(6, 5), torch.randn(7, 6)
    fast = torch.compile(unit, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(fast, [x], torch.ones_like), run(unit, [x], torch.ones_like))
    torch._dynamo.reset()


def test_the_module_follows_to_and_freezing(backend, device):
    unit = dlgpu.nn.GEGLU(6, 5).to(device, torch.bfloat16)
    unit.w12.requires_grad_(False)
    y = unit(torch.randn(7, 6, device=device, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype is unit.w3.weight.grad.dtype is torch.bfloat16
    assert unit.w12.weight.grad is None
