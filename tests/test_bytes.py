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


def gemm(M, N, K, dtype, aligned, bias=False, z=False):
    """act(a b + bias), [M, N] over K: a is read once for each column of tiles, b and the bias once for each row of tiles."""
    tile = configs.linear_tile(*_triton.device_limits(torch.device("cpu"))[:2], dtype, N, aligned)
    across, down = cdiv(N, tile.block_n), cdiv(M, tile.block_m)
    out = M * N * (1 + z)
    compulsory = M * K + K * N + N * bias + out
    requested = across * M * K + down * (K * N + N * bias) + out
    return "_linear_kernel", dtype.itemsize * compulsory, dtype.itemsize * requested


def dz_pass(M, N, dtype, saved=True, dz=True, db=True):
    """dZ = dY * act'(.) once through, with a float32 row of sums for every strip."""
    strips = cdiv(M, configs.linear_dz_tile(dtype, N).rows)
    moved = dtype.itemsize * M * N * (1 + saved + dz) + 4 * strips * N * db
    return "_linear_dz_kernel", moved, moved


def column_sums(M, N, dtype):
    """db from those sums."""
    moved = 4 * cdiv(M, configs.linear_dz_tile(dtype, N).rows) * N + dtype.itemsize * N
    return "_column_sum_kernel", moved, moved


# One tile, whole tiles, one more than whole tiles, and two shapes that the laws were not derived on; the last takes the
# 128 x 128 tile at 16 bits.
SHAPES = [(3, 5, 7), (64, 32, 128), (65, 33, 129), (200, 77, 150), (40, 16, 1040)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES[:-1]), *((s, torch.bfloat16) for s in SHAPES[2::2])],
)
def test_linear(shape, dtype):
    M, K, N = shape
    x, w, b = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
    dy = torch.randn(M, N, dtype=dtype)
    aligned = N % 16 == K % 16 == 0
    backward = [gemm(M, K, N, dtype, aligned), gemm(N, K, M, dtype, aligned)]
    with TrafficMeter() as meter:
        _, z = linear.linear_fwd(x, w, b, "gelu", 0.0, True)
        linear.linear_bwd(dy, x, w, z, "gelu", 0.0, (True, True, True))
    held_to(
        [
            gemm(M, N, K, dtype, aligned, True, True),
            dz_pass(M, N, dtype),
            column_sums(M, N, dtype),
            *backward,
        ],
        meter,
    )
    # Without activation and bias there is no pass for dZ: the GEMMs read dY.
    with TrafficMeter() as meter:
        linear.linear_fwd(x, w, None, None, 0.0, False)
        linear.linear_bwd(dy, x, w, None, None, 0.0, (True, True, False))
    held_to([gemm(M, N, K, dtype, aligned), *backward], meter)
    # A frozen layer's bias: dY is read once, and no dZ is written.
    with TrafficMeter() as meter:
        linear.linear_bwd(dy, x, w, None, None, 0.0, (False, False, True))
        linear.linear_bwd(dy, x, w, z, "gelu", 0.0, (False, False, True))
    sums = column_sums(M, N, dtype)
    held_to([dz_pass(M, N, dtype, False, False), sums, dz_pass(M, N, dtype, True, False), sums], meter)


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "columns apart"])
def test_linear_of_views(layout):
    """Any strides are read in place: the same bytes, no copy, and nothing between the elements."""
    M, K, N = 70, 19, 66
    dtype, view = torch.float32, LAYOUTS[layout]
    x, w, dy = view(torch.randn(M, K)), view(torch.randn(N, K)), view(torch.randn(M, N))
    with TrafficMeter() as meter:
        linear.linear_fwd(x, w, None, "relu", 0.0, False)
        linear.linear_bwd(dy, x, w, torch.randn(M, N), "relu", 0.0, (True, True, True))
    backward = [
        dz_pass(M, N, dtype),
        column_sums(M, N, dtype),
        gemm(M, K, N, dtype, False),
        gemm(N, K, M, dtype, False),
    ]
    held_to([gemm(M, N, K, dtype, False), *backward], meter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2048, 3001])
def test_activations(n, dtype):
    """One read and one write; backward two reads and one write."""
    x = torch.randn(n, dtype=dtype)
    with TrafficMeter() as meter:
        activations.activation_bwd(activations.activation_fwd(x, "gelu", 0.0), x, "gelu", 0.0)
    forward, backward = 2 * n * dtype.itemsize, 3 * n * dtype.itemsize
    held_to([("_activation_fwd_kernel", *[forward] * 2), ("_activation_bwd_kernel", *[backward] * 2)], meter)


def cross_entropy_laws(N, C, dtype, live, classes, weighted, smoothing, reduction):
    """live: rows that are not ignored; classes: distinct targets of those.

    An ignored row's logits are not read. The target's own logit is asked for once more; its weight too, and with smoothing
    all weights once by each program. Backward gets the gradient of the loss as one value, or one a row.
    """
    size, tile = dtype.itemsize, configs.cross_entropy_tile(dtype, C)
    down, across = cdiv(N, tile.block_m), cdiv(C, tile.lanes * tile.vector)
    reduced, smooth_weights = reduction != "none", weighted and smoothing
    # Smoothing reads every weight, and the float32 sum of them; without it only the targets' weights are read.
    weights = (size * C + 4 if smoothing else size * classes) * weighted
    # Per program and column of programs: every weight and their sum; and by each row the weight of its target.
    every, targets = (size * C + 4) * smooth_weights, size * live * weighted
    losses = (4 if reduced else size) * N

    forward = size * live * C + 8 * N + losses + 8 * N
    laws = [("_cross_entropy_fwd_kernel", forward + weights, forward + size * live + targets + down * every)]
    if reduced:
        reduce = 8 * N + 4 * N + size + 4
        laws += [("_cross_entropy_reduce_kernel", reduce + size * classes * weighted, reduce + targets)]
    logits = size * live * C + size * N * C
    mean = reduction == "mean"
    rows, rows_once = (8 + 8 + size) * N, 16 * N + (size if reduced else size * N)
    backward = logits + rows_once + weights + 4 * mean
    # A row's target, statistics, weight and gradient are read by each of its `across` programs.
    requested = logits + across * (rows + targets + 4 * down * mean)
    requested += down * (size * C + 4 * across) * smooth_weights
    return [*laws, ("_cross_entropy_bwd_kernel", backward, requested)]


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
@pytest.mark.parametrize("shape", [(5, 3), (70, 10), (9, 300), (2, 8300)])
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
    rows, classes = len(live), len(live.unique())
    held_to(cross_entropy_laws(N, C, dtype, rows, classes, weighted, bool(smoothing), reduction), meter)


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
