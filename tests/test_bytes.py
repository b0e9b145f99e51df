"""Two byte laws for each launch, exact: what a kernel must move and what it asks for, from shape and tile alone.

`compulsory` is each distinct byte once, the floor. `requested` is every access: one pass too many over a tensor shows there.
And no access is stray, no byte is written by two programs, none written by one program is read by another.
"""

import pytest
import torch

from dlgpu.bench.meter import TrafficMeter
from dlgpu.kernels import _triton, activations, configs, cross_entropy, linear
from dlgpu.kernels._triton import triton
from tolerance import LAYOUTS

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")

cdiv = triton.cdiv
DTYPES = [torch.float32, torch.bfloat16]


def held_to(laws, meter):
    """Each launch, in order, against (kernel, compulsory bytes, requested bytes)."""
    found = [(launch.kernel, launch.compulsory, launch.requested) for launch in meter.launches]
    assert found == laws
    assert all(launch.clean for launch in meter.launches)


def gemm(a, b, bias=False, z=False, saved=None, sums=False, split=False):
    """act(a b + bias), or a b * act'(saved): a is read once for each column of tiles, b and the bias once for each row of
    tiles; column sums are float32, one row of them for each row of tiles. In parts, the float32 sums of each part instead.
    The epilogue's launches: the sum of the column sums, or of the parts."""
    (M, K), N, size = a.shape, b.shape[1], a.element_size()
    plan = linear._plan(a, b, "gelu", z, saved, split)
    tile = plan.tile
    across, down = cdiv(N, tile.block_n), cdiv(M, tile.block_m)
    parts = configs.linear_parts(tile, across * down, K, plan.multiprocessors) if split else 1
    out = (
        size * M * N * (1 + z + (saved is not None)) + 4 * down * N * sums
        if parts == 1
        else 4 * parts * M * N
    )
    compulsory = size * (M * K + K * N + N * bias) + out
    requested = size * (across * M * K + down * (K * N + N * bias)) + out
    laws = [("_linear_tma_kernel" if tile.tma else "_linear_kernel", compulsory, requested)]
    if sums:
        laws.append(sum_of(down, N, a.dtype))
    if parts > 1:
        laws.append(sum_of(parts, M * N, a.dtype))
    return laws


def sum_of(S, N, dtype):
    """S rows of float32 added into one."""
    return "_sum_kernel", 4 * S * N + dtype.itemsize * N, 4 * S * N + dtype.itemsize * N


def dz_pass(M, N, dtype, saved=True, dz=True, db=True):
    """dZ = dY * act'(.) once through, with a float32 row of sums for every strip, and their sum."""
    strips = cdiv(M, configs.linear_dz_tile(dtype, N).rows)
    moved = dtype.itemsize * M * N * (1 + saved + dz) + 4 * strips * N * db
    return [("_linear_dz_kernel", moved, moved), *([sum_of(strips, N, dtype)] * db)]


# (M, K, N): one tile, whole tiles, one more than whole tiles, and two shapes that the laws were not derived on; at 16 bits
# descriptors move what is a multiple of 8, and the last has a batch that is cut into parts.
SHAPES = [(3, 5, 7), (64, 32, 128), (65, 33, 129), (200, 77, 150), (72, 40, 136), (2100, 24, 16)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES[:4]), *((s, torch.bfloat16) for s in SHAPES[1:])],
)
def test_linear(shape, dtype):
    M, K, N = shape
    x, w, b = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
    dy = torch.randn(M, N, dtype=dtype)
    backward = [*gemm(dy, w), *gemm(dy.t(), x, split=True)]
    with TrafficMeter() as meter:
        _, z = linear.linear_fwd(x, w, b, "gelu", 0.0, True)
        linear.linear_bwd(dy, x, w, z, "gelu", 0.0, (True, True, True))
    held_to([*gemm(x, w.t(), bias=True, z=True), *dz_pass(M, N, dtype), *backward], meter)
    # Without activation and bias there is no pass for dZ: the GEMMs read dY.
    with TrafficMeter() as meter:
        linear.linear_fwd(x, w, None, None, 0.0, False)
        linear.linear_bwd(dy, x, w, None, None, 0.0, (True, True, False))
    held_to([*gemm(x, w.t()), *backward], meter)
    # A frozen layer's bias: dY is read once, and no dZ is written.
    with TrafficMeter() as meter:
        linear.linear_bwd(dy, x, w, None, None, 0.0, (False, False, True))
        linear.linear_bwd(dy, x, w, z, "gelu", 0.0, (False, False, True))
    held_to([*dz_pass(M, N, dtype, False, False), *dz_pass(M, N, dtype, True, False)], meter)
    # The layer beneath: its dZ costs a read of what it saved, and no pass of its own.
    with TrafficMeter() as meter:
        linear.linear_dgrad(dy, w, x, "gelu", 0.0, True)
        linear.linear_dgrad(dy, w, x, "gelu", 0.0, False)
    held_to([*gemm(dy, w, saved=x, sums=True), *gemm(dy, w, saved=x)], meter)


def test_linear_headline_law():
    """One tile across and down: forward at bf16 moves 2 (MK + NK + MN + N) bytes, and 2 MN more with z."""
    M, K, N = 64, 48, 64
    x, w, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K), (N,)))
    for save_z in (False, True):
        with TrafficMeter() as meter:
            linear.linear_fwd(x, w, b, "gelu", 0.0, save_z)
        law = 2 * (M * K + N * K + M * N + N) + 2 * M * N * save_z
        held_to([("_linear_tma_kernel", law, law)], meter)


@pytest.mark.parametrize("layout", ["transposed", "rows apart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_views(layout, dtype):
    """Rows or columns anywhere are read in place: the same bytes, no copy, and nothing between the elements."""
    M, K, N = 70, 24, 66
    view = LAYOUTS[layout]
    x, w, dy = (view(torch.randn(shape, dtype=dtype)) for shape in ((M, K), (N, K), (M, N)))
    saved = torch.randn(M, N, dtype=dtype)
    with TrafficMeter() as meter:
        linear.linear_fwd(x, w, None, "relu", 0.0, False)
        linear.linear_bwd(dy, x, w, saved, "relu", 0.0, (True, True, True))
    dz = torch.empty(M, N, dtype=dtype)
    held_to([*gemm(x, w.t()), *dz_pass(M, N, dtype), *gemm(dz, w), *gemm(dz.t(), x, split=True)], meter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2048, 3001])
def test_activations(n, dtype):
    """One read and one write; backward two reads and one write."""
    x = torch.randn(n, dtype=dtype)
    with TrafficMeter() as meter:
        activations.activation_bwd(activations.activation_fwd(x, "gelu", 0.0), x, "gelu", 0.0)
    forward, backward = 2 * n * dtype.itemsize, 3 * n * dtype.itemsize
    held_to([("_activation_fwd_kernel", *[forward] * 2), ("_activation_bwd_kernel", *[backward] * 2)], meter)


def cross_entropy_laws(
    N,
    C,
    dtype,
    live,
    classes=0,
    weighted=False,
    smoothing=False,
    reduction="mean",
    edges=False,
    probabilities=False,
    tokens=False,
    lse=False,
    accuracy=False,
    dlse=False,
    needs=(True, False),
):
    """live: rows that are not ignored; classes: distinct targets of those; edges: rows are cut at 16-byte boundaries.

    An ignored row's logits are not read. The target's own logit is asked for once more; its weight too. With smoothing or
    probabilities all weights are read: by each program once, or where rows have edges once for each row. A row is split
    between programs where there are few; the sums of each go out and in again. Backward gets the gradient of the loss as one
    value, or one a row.
    """
    size, tile = dtype.itemsize, configs.cross_entropy_tile(dtype, C, 2 if probabilities else 1)
    down, across = cdiv(N, tile.block_m), cdiv(C, tile.lanes * tile.vector)
    splits, _ = configs.cross_entropy_splits(tile, down, C, _triton.device_limits(torch.device("cpu"))[2])
    reduced, indices = reduction != "none", not probabilities
    shares = smoothing or probabilities
    matrices = size * live * C * (2 if probabilities else 1)
    # Once, and as often as it is asked for: all weights, and by each row the weight of its target.
    every = size * C * weighted if shares else 0
    every_time = (size * C * (live if edges else down)) * (weighted and shares)
    once = every if shares else size * classes * weighted
    targets = size * live * weighted * indices
    # The inputs of a row that each of its programs reads: target, weight, token weight.
    row = 8 * N * indices + targets + size * live * tokens
    row_once = 8 * N * indices + size * live * tokens
    stats = 4 * (3 if probabilities else 2) * N
    results = (4 if reduced else size) * N + stats + 4 * N * lse + 4 * N * accuracy
    at_target = size * live * indices
    partial = 4 * (4 if shares else 2) * N * splits

    if splits == 1:
        forward = matrices + row_once + once + results
        laws = [("_cross_entropy_fwd_kernel", forward, matrices + row + every_time + at_target + results)]
    else:
        # Each program of a row looks at its target, to know whether the row is ignored.
        laws = [
            (
                "_cross_entropy_fwd_kernel",
                matrices + row_once + once + partial,
                matrices + splits * row + every_time + partial,
            )
        ]
        picked = size * classes * weighted * indices
        laws += [
            (
                "_cross_entropy_combine_kernel",
                partial + row_once + picked + at_target + results,
                partial + row + at_target + results,
            )
        ]
    if reduced:
        reduce = 8 * N * indices + 4 * N + size + 4 + size * live * tokens + (4 * N + 4) * accuracy
        picked = size * classes * weighted * indices
        laws += [("_cross_entropy_reduce_kernel", reduce + picked, reduce + targets)]

    # The float32 sum of the weights is read by each program.
    weight_sum = 4 * (weighted and smoothing and indices)
    mean = 4 * (reduction == "mean")
    written = sum(needs) * size * N * C
    dloss, lse_gradient = size * N, 4 * live * dlse
    compulsory = matrices + written + row_once + once + stats + weight_sum + mean + lse_gradient
    compulsory += size if reduced else dloss
    requested = matrices + written + across * (row + stats + dloss + lse_gradient)
    requested += across * down * (weight_sum + mean) + every_time * (1 + (probabilities and needs[1]))
    return [*laws, ("_cross_entropy_bwd_kernel", compulsory, requested)]


@pytest.mark.parametrize(
    ("dtype", "weighted", "smoothing", "reduction"),
    [
        (torch.float32, False, 0.0, "mean"),
        (torch.float32, False, 0.1, "none"),
        (torch.float32, True, 0.0, "mean"),
        (torch.float32, True, 0.1, "mean"),
        (torch.bfloat16, False, 0.0, "none"),
        (torch.bfloat16, True, 0.1, "sum"),
    ],
)
@pytest.mark.parametrize("shape", [(5, 3), (70, 10), (9, 300), (2, 8300), (17, 8193)])
def test_cross_entropy(shape, dtype, weighted, smoothing, reduction):
    N, C = shape
    # Rows of a wider matrix, as a slice of the vocabulary would be.
    x, target = LAYOUTS["rows apart"](torch.randn(N, C, dtype=dtype)), torch.randint(C, (N,))
    target[1] = -100
    live = target[target >= 0]
    weight = torch.rand(C, dtype=dtype) if weighted else None
    options = (reduction, -100, smoothing)
    with TrafficMeter() as meter:
        loss, stats, denominator = cross_entropy.cross_entropy_fwd(x, target, weight, *options)
        dloss = torch.ones_like(loss)
        cross_entropy.cross_entropy_bwd(dloss, x, target, weight, stats, denominator, *options)
    rows, classes, edges = len(live), len(live.unique()), configs.cross_entropy_edges(dtype, C)
    held_to(
        cross_entropy_laws(N, C, dtype, rows, classes, weighted, bool(smoothing), reduction, edges), meter
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (9, 304), (9, 300), (2, 8300)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_with_extras(shape, dtype, probabilities):
    """Token weights, lse and accuracy cost what they are; z-loss, soft cap and scale nothing."""
    N, C = shape
    x, target = torch.randn(N, C, dtype=dtype), torch.randint(C, (N,))
    target[1] = -100
    live = target[target >= 0]
    weight, tokens = torch.rand(C, dtype=dtype), torch.rand(N, dtype=dtype)
    if probabilities:
        target = torch.rand(N, C, dtype=dtype)
    options = ("mean", -100, 0.1, 0.01, 5.0, 0.5)
    with TrafficMeter() as meter:
        loss, lse, _, *saved = cross_entropy.cross_entropy_extra_fwd(
            x, target, weight, tokens, *options, True, not probabilities
        )
        args = torch.ones_like(loss), lse, x, target, weight, tokens, *saved, *options, (True, probabilities)
        cross_entropy.cross_entropy_extra_bwd(*args)
    rows, classes = (N, 0) if probabilities else (len(live), len(live.unique()))
    edges = C % 16 != 0 and configs.cross_entropy_edges(dtype, C)
    laws = cross_entropy_laws(
        N,
        C,
        dtype,
        rows,
        classes,
        True,
        True,
        "mean",
        edges,
        probabilities,
        True,
        True,
        not probabilities,
        True,
        (True, probabilities),
    )
    held_to(laws, meter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5, 3), (9, 300), (3, 33000)])
def test_cross_entropy_with_the_gradient_in_forward(shape, dtype, reduction):
    """One read of the logits where they stay in registers, two where they do not, and one write. Scaling by 1 reads the 1."""
    N, C = shape
    size, x, target = dtype.itemsize, torch.randn(N, C, dtype=dtype), torch.randint(C, (N,))
    target[1] = -100
    live, mean = N - 1, reduction == "mean"
    with TrafficMeter() as meter:
        *_, dx = cross_entropy.cross_entropy_fwd_grad(
            x, target, None, None, reduction, -100, 0.0, 0.0, 0.0, 1.0, False
        )
        cross_entropy.scale_gradient(dx, torch.ones((), dtype=dtype))
        cross_entropy.scale_gradient(dx, torch.full((), 0.5, dtype=dtype))
    edges = configs.cross_entropy_edges(dtype, C) and C % 16 != 0
    tile = configs.cross_entropy_grad_tile(90, dtype, C, not edges, False)
    resident = tile.lanes * tile.vector >= C
    blocks = cdiv(N, tile.block_m)
    edge = sum(edge_columns(x, row) for row in range(N) if row != 1) if edges else 0
    # Edges, and what does not stay in registers, are read again.
    again = size * (edge if resident else live * C)
    moved = size * (live + N) * C + 8 * N + 4 * N + 8 * N
    programs = cdiv(N * C, configs.activation_tile(dtype).block)
    reduce = 8 * N + 4 * N + size + 4
    held_to(
        [
            *[("_cross_entropy_reduce_kernel", 8 * N + 4, 8 * N + 4)] * mean,
            (
                "_cross_entropy_fwd_grad_kernel",
                moved + 4 * mean,
                moved + size * live + again + 4 * mean * blocks,
            ),
            ("_cross_entropy_reduce_kernel", reduce, reduce),
            ("_scale_kernel", size, size * programs),
            ("_scale_kernel", 2 * size * N * C + size, 2 * size * N * C + size * programs),
        ],
        meter,
    )


def edge_columns(x, row):
    """Columns of the row before the first 16-byte boundary and after the last."""
    vector = 16 // x.element_size()
    head = min(-x[row].data_ptr() % 16 // x.element_size(), x.shape[1])
    return head + (x.shape[1] - head) % vector


def test_cross_entropy_at_16_bits_moves_the_logits_three_times():
    """2 N V bytes forward and 4 N V backward; the rest is below a percent."""
    N, C = 4, 4100
    x, target = torch.randn(N, C, dtype=torch.bfloat16), torch.randint(C, (N,))
    with TrafficMeter() as meter:
        loss, *saved = cross_entropy.cross_entropy_fwd(x, target, None, "mean", -100, 0.0)
        cross_entropy.cross_entropy_bwd(torch.ones_like(loss), x, target, None, *saved, "mean", -100, 0.0)
    forward, reduce, backward = (launch.requested for launch in meter.launches)
    assert 1 <= (forward + reduce) / (2 * N * C) < 1.01
    assert 1 <= backward / (4 * N * C) < 1.01
