"""Fused linear + bias + activation against torch, forward and backward, on every backend."""

import dataclasses
import itertools
import subprocess
import sys
import types

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import dlgpu.functional
import dlgpu.nn
from dlgpu.bench import machine_code
from dlgpu.kernels import _triton, configs, linear
from dlgpu.kernels.activations import ACTIVATIONS, lookup
from tolerance import LAYOUTS, PAIRS, assert_accurate, assert_conforms, assert_same_bits, bits, run

# Torch's module data has loaded a profile of its own.
hypothesis.settings.load_profile("dlgpu")

pytestmark = pytest.mark.usefixtures("poisoned")

# (activation, negative slope); a negative one turns the sign of y against that of z.
ACTS = [(None, 0.0), *((name, 0.01) for name in ACTIVATIONS), ("leaky_relu", -0.5)]
# float32 tiles are 64 x 64 x 32; test_every_tile has the 16-bit ones.
SHAPES = [
    (1, 1, 1),
    (2, 1, 3),
    (31, 37, 29),  # primes, and less than a tile
    (64, 64, 64),  # whole tiles
    (65, 33, 67),  # one more than whole tiles
    (0, 5, 7),
    (5, 7, 0),
    (4, 0, 3),
]


def ours(activation, slope=0.01):
    return lambda x, w, b=None: dlgpu.functional.linear(x, w, b, activation=activation, negative_slope=slope)


def theirs(activation, slope=0.01):
    return lambda x, w, b=None: lookup(activation).eager(F.linear(x, w, b), slope)


def sample(M, K, N, dtype=torch.float32, device="cpu", bias=True):
    """z of unit variance: the activations' bends and tails both have their share."""
    x = torch.randn(M, K, dtype=dtype, device=device)
    w = torch.randn(N, K, dtype=dtype, device=device) / max(K, 1) ** 0.5
    return x, w, torch.randn(N, dtype=dtype, device=device) if bias else None


@pytest.mark.parametrize(
    ("backend", "dtype", "activation", "slope"),
    [
        (*pair, *act)
        for pair in PAIRS
        for act in ACTS
        if pair != ("triton", torch.float16) or act[0] in (None, "gelu")
    ],
    indirect=["backend"],
)
def test_activations(backend, device, dtype, activation, slope):
    assert_conforms(ours(activation, slope), theirs(activation, slope), sample(67, 35, 65, dtype, device))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape, activation):
    assert_conforms(ours(activation), theirs(activation), sample(*shape, device=device))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_no_bias(backend, device, dtype, activation):
    assert_conforms(ours(activation), theirs(activation), sample(33, 17, 9, dtype, device, bias=False))


# Past the bucket of large tiles; past 2048 rows, 32 strips of column sums.
@pytest.mark.parametrize("shape", [(520, 70, 130), (2049, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows(backend, device, dtype, shape):
    assert_conforms(ours("silu"), theirs("silu"), sample(*shape, dtype, device))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3)])
def test_leading_dimensions(backend, device, lead):
    _, w, b = sample(1, 11, 5, device=device)
    x = torch.randn(*lead, 11, device=device)
    assert_conforms(ours("tanh"), theirs("tanh"), (x, w, b))
    # `view` before `contiguous` fails here.
    if lead == (2, 3):
        assert_conforms(
            ours("tanh"), theirs("tanh"), (x.transpose(0, 1), w, b), lambda y: torch.randn_like(y.mT).mT
        )


@pytest.mark.parametrize("which", ["input", "weight", "upstream"])
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layouts(backend, device, layout, which):
    x, w, b = sample(35, 33, 17, device=device)
    upstream = torch.randn(35, 17, device=device)
    change = LAYOUTS[layout]
    x, w = change(x) if which == "input" else x, change(w) if which == "weight" else w
    upstream = change(upstream) if which == "upstream" else upstream
    # Without an activation the GEMMs read the upstream gradient itself.
    for activation in ("silu", None) if which == "upstream" else ("silu",):
        assert_conforms(ours(activation), theirs(activation), (x, w, b), lambda y: upstream)


def reachable_tiles():
    """Each tile of the kernels that configs.py gives on some GPU at 16 bits, with an example of where."""
    found = {}
    grid = itertools.product(
        (80, 90, 120), (1, 300, 3000, 10000), (16, 64, 130, 1024, 4096), (64, 2048), *[(False, True)] * 4
    )
    for capability, M, N, K, gradient, split, aligned, aligned_out in grid:
        memory = machine_code.shared_memory_limit(capability)
        # The flags are functions of the shape in a call, and not here.
        flags = {"gradient": gradient, "split": split, "aligned": aligned, "aligned_out": aligned_out}
        tile = configs.linear_tile(capability, memory, torch.bfloat16, M, N, K, None, False, **flags)
        if isinstance(tile, configs.MatmulTile):
            found.setdefault(dataclasses.replace(tile, reason=""), None)
    return list(found)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="tiles for other GPUs than this one")
@pytest.mark.parametrize(
    ("tile", "aligned"),
    [(tile, aligned) for tile in reachable_tiles() for aligned in (True, False) if aligned or not tile.tma],
    ids=lambda value: (
        str(value) if isinstance(value, bool) else "-".join(map(str, dataclasses.astuple(value)))
    ),
)
def test_every_tile(monkeypatch, tile, aligned):
    """More than a tile each way, on every tile: forward with z, the layer beneath's dZ and db, dW in parts."""
    monkeypatch.setattr(configs, "linear_tile", lambda *args, **kwargs: tile)
    monkeypatch.setattr(configs, "linear_parts", lambda *args: 3)
    odd = 0 if aligned else 1
    M, N, K = tile.block_m + 6, tile.block_n + 8 + odd, 3 * tile.block_k - 24 + odd
    x, w, b = sample(M, K, N, torch.bfloat16)
    dz, saved = torch.randn(M, N, dtype=torch.bfloat16), torch.randn(M, K, dtype=torch.bfloat16)

    def reference(dtype):
        X, W, B, DZ, S = (t.to(dtype) for t in (x, w, b, dz, saved))
        z = F.linear(X, W, B)
        dz_beneath = torch.ops.aten.gelu_backward(DZ @ W, S)
        return F.gelu(z), z, dz_beneath, dz_beneath.sum(0), DZ.t() @ X

    found = (
        *linear.linear_fwd(x, w, b, "gelu", 0.0, True),
        *linear.linear_dgrad(dz, w, saved, "gelu", 0.0, True),
        linear.linear_wgrad(dz, x),
    )
    names = ("y", "z", "dz beneath", "db beneath", "dw")
    for name, *tensors in zip(names, found, reference(torch.float64), reference(torch.bfloat16), strict=True):
        assert_accurate(*tensors, name)
    # The column sums of the result and not of its rounding.
    assert_same_bits(linear.linear_dgrad(dz, w, saved, "gelu", 0.0, True), found[2:4])


@pytest.mark.parametrize(
    ("major", "minor", "known"),
    [(7, 0, 70), (8, 7, 86), (9, 0, 90), (10, 3, 100), (12, 1, 120), (13, 0, 120)],
)
def test_a_gpu_between_those_that_have_tiles(monkeypatch, major, minor, known):
    """B300 is 10.3, GB10 is 12.1, Orin is 8.7."""
    memory = 160 * 1024
    gpu = types.SimpleNamespace(
        major=major, minor=minor, shared_memory_per_block_optin=memory, multi_processor_count=48
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(_triton, "_cuda_limits", _triton._cuda_limits.__wrapped__)
    capability, *rest = _triton.device_limits(torch.device("cuda", 0))
    assert (capability, *rest) == (known, memory, 48)
    # Both look a capability up.
    configs.linear_tile(capability, memory, torch.bfloat16, 8192, 4096, 512, "gelu", True)
    configs.gated_tile(capability, memory, torch.bfloat16, 8192, 4096, 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [1, 10, 133])
def test_results_that_no_descriptor_takes(device, N, dtype):
    """Aligned operands, so TMA loads where there are any, and rows of the result that are no multiples of 16 bytes: the layer
    before 10 classes. The same where what is saved lies at an odd address."""
    x, w, b = sample(70, 64, N, dtype, device)
    with dlgpu.use_backend("triton"):
        assert_conforms(ours("gelu"), theirs("gelu"), (x, w, b))
    if _triton.INTERPRETED:
        plan = linear._plan(x, w.t(), "gelu", True)
        assert (plan.tile.tma, plan.aligned, plan.aligned_out) == (True, True, False)
    odd = torch.randn(70 * 64 + 1, dtype=dtype, device=device)[1:].view(70, 64)
    dz = torch.randn(70, 16, dtype=dtype, device=device)
    found, expected = (
        linear.linear_dgrad(dz, x[:16].contiguous(), saved, "gelu", 0.0, True) for saved in (odd, odd.clone())
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_weight_above(device, dtype):
    """Rows of a tile past the last are 0 times the weight: they stay out of the column sums."""
    dz, w, saved = (torch.rand(shape, dtype=dtype, device=device) for shape in ((3, 16), (16, 8), (3, 8)))
    w[2, 5] = float("inf")
    dx, db = linear.linear_dgrad(dz, w, saved, "silu", 0.0, True)
    for t in (dx.sum(0), db):
        assert t[5] == float("inf")
        assert t.isnan().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 8, 500, 4096, 16384])
def test_depth(backend, device, dtype, K):
    """Sums are float32 however deep."""
    # Gradients of the deepest would be hundreds of tiles.
    frozen = [0, 1] if K > 4096 else []
    assert_conforms(ours("relu"), theirs("relu"), sample(9, K, 16, dtype, device), frozen=frozen)


PRECISIONS = """
import torch
from dlgpu.kernels import linear

x, w, of = torch.ones(4, 8), torch.ones(8, 8), torch.backends.cuda.matmul

def shown():
    # Of the products that would be launched now.
    return linear._plan(x, w.t()).precision

print(shown())
for where in (of, torch.backends):
    for value in ("tf32", "ieee", "none"):
        where.fp32_precision = value
        print(shown())
for value in (True, False):
    of.allow_tf32 = value
    print(shown())
for value in ("high", "medium", "highest"):
    torch.set_float32_matmul_precision(value)
    print(shown())
of.allow_tf32 = True
print(shown(), linear._plan(x.bfloat16(), w.t().bfloat16()).precision)
"""


def test_tf32_is_torchs_to_allow():
    """By fp32_precision, of CUDA's products or of everything, or by the legacy flags; IEEE unless one does. In another
    process: torch does not let all of them be put back."""
    command = [sys.executable, "-c", PRECISIONS]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.split()
    new, flag, level = ["tf32", "ieee", "ieee"], ["tf32", "ieee"], ["tf32", "tf32", "ieee"]
    assert found == ["ieee", *new, *new, *flag, *level, "tf32", "ieee"]


def test_the_approximate_tanh_is_for_bf16():
    """Its 2^-11 is lost in bf16's rounding, and not in fp16's or float32's."""
    for name in ("tanh", "gelu_tanh"):
        row = lookup(name)
        assert row.forward_for(torch.bfloat16) is not row.forward
        assert row.forward_for(torch.float16) is row.forward_for(torch.float32) is row.forward


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_batch_in_parts(backend, device, launches, activation):
    """Few tiles of dW and a long batch: float32 sums of parts, the same bits each time."""
    inputs = sample(2056, 24, 16, torch.bfloat16, device)
    upstream = torch.randn(2056, 16, dtype=torch.bfloat16, device=device)
    found = assert_conforms(ours(activation), theirs(activation), inputs, lambda y: upstream)
    assert_same_bits(run(ours(activation), inputs, lambda y: upstream), found)
    if backend == "triton" and _triton.INTERPRETED:
        sums = [args for name, _, args, _ in launches if name == "_sum_kernel"]
        assert [args[2] for args in sums[:2]] == [33, 2]


def test_bias_with_strides(backend, device):
    x, w, b = sample(5, 3, 4, device=device)
    for bias in (torch.randn(8, device=device)[::2], b[:1].expand(4)):
        assert_conforms(ours("relu"), theirs("relu"), (x, w, bias))


def test_the_same_tensor_twice(backend, device):
    x = torch.randn(5, 5, device=device)
    assert_conforms(lambda x: ours("gelu")(x, x), lambda x: theirs("gelu")(x, x), (x,))
    assert_conforms(lambda x: ours(None)(x, x), lambda x: theirs(None)(x, x), (x,))


@hypothesis.given(
    st.tuples(*[st.integers(0, 70)] * 3),
    st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3),
    st.sampled_from(ACTS),
    st.booleans(),
)
def test_any_shape_and_layout(backend, device, shape, layouts, act, bias):
    M, K, N = shape
    torch.manual_seed(0)
    x, w, b = sample(M, K, N, device=device, bias=bias)
    dy = torch.randn(M, N, device=device)
    x, w, dy = (LAYOUTS[layout](t) for layout, t in zip(layouts, (x, w, dy), strict=True))
    assert_conforms(ours(*act), theirs(*act), (x, w, b), lambda y: dy)


def test_16_bit_products_round_to_nearest_even(backend, device):
    """With K = 1 the float32 product is exact, so the one rounding shows: truncation is within twice torch's error."""
    for dtype in (torch.bfloat16, torch.float16):
        x, w = torch.randn(64, 1, dtype=dtype, device=device), torch.randn(64, 1, dtype=dtype, device=device)
        y = dlgpu.functional.linear(x, w)
        assert torch.equal(y, (x.float() @ w.float().t()).to(dtype))


# The epilogue sees z alone, so that each activation meets z of every kind through the input.
@pytest.mark.parametrize(
    ("where", "activation", "slope"),
    [("input", *act) for act in ACTS]
    + [("weight", None, 0.0), ("bias", "relu", 0.0), ("upstream", "relu", 0.0), ("upstream", None, 0.0)],
)
def test_nan_and_infinity(backend, device, where, activation, slope):
    """Where torch has NaN or an infinity, so have we, and nowhere else."""
    x, w, b = sample(7, 5, 9, device=device)
    dy = torch.randn(7, 9, device=device)
    target = {"input": x, "weight": w, "bias": b, "upstream": dy}[where]
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        target[(i + 1, 2) if target.dim() == 2 else i + 1] = value
    assert_conforms(ours(activation, slope), theirs(activation, slope), (x, w, b), lambda y: dy)


@pytest.mark.parametrize(("activation", "slope"), ACTS)
def test_large_and_tiny(backend, device, activation, slope):
    """z itself, by way of a unit weight: 0, both signs, the tails, and where exp overflows or tanh cancels."""
    values = [0.0, 1e-6, 1e-3, 0.1, 0.6, 1.0, 5.0, 10.0, 15.0, 40.0, 88.0, 100.0, 1000.0, 3e4]
    z = torch.tensor([values, [-v for v in values]], device=device).reshape(-1, 1)
    w = torch.ones(1, 1, device=device)
    # Without dW: its sum over both signs cancels.
    y, dx = assert_conforms(
        ours(activation, slope), theirs(activation, slope), (z, w), torch.ones_like, frozen=[1]
    )
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("needs", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_nothing_needless_runs(backend, device, launches, needs, activation):
    launches.dry = True
    x, w, b = (
        t.requires_grad_(bool(need)) for t, need in zip(sample(5, 3, 4, device=device), needs, strict=True)
    )
    y = ours(activation)(x, w, b)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.backward(torch.ones_like(y))
    needs_x, needs_w, needs_b = needs
    for t, need in zip((x, w, b), needs, strict=True):
        assert (t.grad is not None) == bool(need)
    if backend == "triton":
        needs_dz = activation is not None or needs_b
        wanted = ["_linear_kernel"]
        wanted += ["_linear_dz_kernel"] * needs_dz + ["_sum_kernel"] * needs_b
        wanted += ["_linear_kernel"] * (needs_x + needs_w)
        assert [name for name, *_ in launches] == wanted
        forward = dict(zip(launches[0][1].arg_names, launches[0][2], strict=False))
        assert (forward["z_ptr"] is not None) == (activation == "gelu")
        if needs_dz:
            _, kernel, args, _ = launches[1]
            backward = dict(zip(kernel.arg_names, args, strict=False))
            assert (backward["partial_ptr"] is not None) == bool(needs_b)
            assert (backward["dz_ptr"] is not None) == (activation is not None and bool(needs_x or needs_w))


@pytest.mark.parametrize(
    ("activation", "needs", "kept"),
    [
        # Of x, w, b, y and what else there is, z. Double backward reads b.
        (None, (1, 1, 1), "xwb"),
        (None, (1, 0, 0), "wb"),
        (None, (0, 0, 1), "wb"),
        ("relu", (1, 1, 1), "xwby"),
        ("gelu", (1, 1, 1), "xwbz"),
        ("gelu", (0, 1, 0), "xwbz"),
    ],
)
def test_what_is_saved(backend, device, launches, activation, needs, kept):
    launches.dry = True
    inputs = [t.requires_grad_(bool(n)) for t, n in zip(sample(5, 3, 4, device=device), needs, strict=True)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ours(activation)(*inputs)
    names = {t.data_ptr(): name for name, t in zip("xwby", (*inputs, y), strict=True)}
    assert sorted(names.get(t.data_ptr(), "z") for t in saved) == sorted(kept)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen(backend, device, frozen, activation):
    assert_conforms(ours(activation), theirs(activation), sample(6, 5, 4, device=device), frozen=frozen)


def test_without_gradient_no_z_is_written(device, launches):
    leaves = [t.requires_grad_() for t in sample(5, 3, 4, device=device)]
    with dlgpu.use_backend("triton"):
        y = ours("gelu")(*leaves)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_same_bits([ours("gelu")(*leaves)], [y])
    forward = [dict(zip(kernel.arg_names, args, strict=False)) for _, kernel, args, _ in launches]
    assert [args["z_ptr"] is None for args in forward] == [False, True, True]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_the_same_bits_without_gradient(backend, device, context, activation):
    leaves = [t.requires_grad_() for t in sample(5, 3, 4, device=device)]
    y = ours(activation)(*leaves)
    with context():
        still = ours(activation)(*leaves)
    assert not still.requires_grad
    assert_same_bits([still], [y])


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_two_backward_passes(backend, device, activation):
    leaves = [t.requires_grad_() for t in sample(35, 17, 9, device=device)]
    y = ours(activation)(*leaves)
    first, second = torch.randn_like(y), torch.randn_like(y)
    found = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in (first, second, first)]
    assert_same_bits(found[1], run(ours(activation), leaves, lambda y: second)[1:])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_the_same_bits_every_time(backend, device, dtype):
    inputs = sample(200, 33, 65, dtype, device)
    upstream = torch.randn(200, 65, dtype=dtype, device=device)
    assert_same_bits(*(run(ours("silu"), inputs, lambda y: upstream) for _ in range(2)))


def test_an_input_changed_in_place_is_noticed(backend, device):
    x, w, b = (t.requires_grad_() for t in sample(5, 3, 4, device=device))
    for tensor in (x, w):
        y = ours("relu")(x, w, b)
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize(("activation", "slope"), ACTS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(activation, slope, bias):
    inputs = [t for t in sample(4, 3, 5, torch.float64, bias=bias) if t is not None]
    leaves = [t.requires_grad_() for t in inputs]
    function = ours(activation, slope)
    with dlgpu.use_backend("fallback"):
        torch.autograd.gradcheck(function, leaves)
        torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_second_derivatives(backend, device, activation, frozen):
    inputs = sample(6, 5, 4, device=device)
    dy = torch.randn(6, 4, device=device)

    def second(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
        upstream = dy.to(dtype).requires_grad_()
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(function(*leaves), wanted, upstream, create_graph=True)
        # Sums of squares, so that each gradient has a cotangent of its own.
        return torch.autograd.grad(
            sum(g.square().sum() for g in first), [*wanted, upstream], allow_unused=True
        )

    found = second(ours(activation), torch.float32)
    expected, truth = (second(theirs(activation), dtype) for dtype in (torch.float32, torch.float64))
    for i, (a, t, e) in enumerate(zip(found, truth, expected, strict=True)):
        assert (a is None) == (e is None)
        if e is not None:
            assert_accurate(a, t, e, f"second derivative {i}")


@pytest.mark.parametrize(
    ("bug", "which"),
    [
        (lambda t: t * (1 + 1e-3), 0),
        (lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 5, t + 1e-4, t), 0),
        (lambda t: t.roll(1, 0), 1),
        (lambda t: t.mul(float("nan")), 1),
        (lambda t: t.double(), 2),
    ],
    ids=["scaled", "one element", "rows shifted", "NaN", "dtype"],
)
def test_the_gate_fails_on_a_seeded_bug(bug, which):
    inputs = sample(35, 17, 9)
    dy = torch.randn(35, 9)
    expected = run(theirs("silu"), inputs, lambda y: dy)
    truth = run(theirs("silu"), inputs, lambda y: dy, torch.float64)
    found = run(ours("silu"), inputs, lambda y: dy)
    assert_accurate(found[which], truth[which], expected[which])
    with pytest.raises(AssertionError):
        assert_accurate(bug(found[which]), truth[which], expected[which])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_fails_on_a_missing_row(dtype):
    """db without the last of 200 rows, and a GEMM without the last of 65 columns of K."""
    x, w, b = sample(200, 65, 9, dtype)
    dy = torch.randn(200, 9, dtype=dtype)
    expected, truth = (run(theirs(None), (x, w, b), lambda y: dy, t) for t in (None, torch.float64))
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(dy[:-1].double().sum(0).to(dtype), truth[3], expected[3])
    short = F.linear(x[:, :-1].double(), w[:, :-1].double(), b.double()).to(dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(short, truth[0], expected[0])


def test_bits_tell_the_sign_of_zero():
    assert not torch.equal(bits(torch.tensor(0.0)), bits(torch.tensor(-0.0)))


@pytest.mark.parametrize(("backend", "dtype"), [p for p in PAIRS if p[1].itemsize > 2], indirect=["backend"])
def test_torchs_module_data(backend, device, dtype):
    """Every row of torch.testing's module_db: parameters of the same seed, results and gradients."""
    # Imported here: at the top it would change the settings of this file's hypothesis tests.
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is torch.nn.Linear)
    rows = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True)
    assert len(rows) >= 3
    for row in rows:
        made, given = row.constructor_input, row.forward_input
        (given,) = (*given.args, *given.kwargs.values())
        results = []
        for library in (dlgpu.nn, torch.nn):
            torch.manual_seed(3)
            module = library.Linear(*made.args, **made.kwargs).to(device, dtype)
            x = given.detach().clone().requires_grad_()
            y = module(x)
            results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
            if library is dlgpu.nn and row.reference_fn is not None:
                with torch.no_grad():
                    expected = row.reference_fn(module, x)
                torch.testing.assert_close(y.detach(), expected)
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
