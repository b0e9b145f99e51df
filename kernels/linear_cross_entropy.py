"""Softmax cross-entropy of a linear layer's logits, which are never all stored: z = softcap(a (x W^T + b)), then the loss of
kernels/cross_entropy.py on z.

Forward, each program multiplies some rows of x with the weights of one split of the vocabulary, a tile at a time, and keeps of
a tile what the loss needs: each row's maximum, sum of exponentials and target logit. A second kernel puts the splits together,
in their order, so that two runs give the same bits. Backward goes through the vocabulary in chunks: the chunk's logits again,
turned into their gradient before they leave the chip, then dX += dZ_c W_c in float32 and dW_c = dZ_c^T X, written once.

That is one product more than with all logits at hand. As many of their columns as a budget allows are therefore kept from
forward, and read where they would be multiplied again: all of them, and their gradient is made whole too, so that what is left
are a linear layer's three products, by the kernels of kernels/linear.py; none, and no [N, V] tensor ever exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from . import configs
from ._triton import _cast, _dot, device_limits, launch, matmul_precision, tl, triton
from .activations import _tanh_fwd
from .linear import linear_dgrad, linear_fwd, linear_wgrad

__all__ = ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Finite: a tile of nothing but -inf then adds exp(-inf - LOWEST) = 0 and not exp(-inf + inf) = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
NAN = tl.constexpr(float("nan"))


@triton.jit
def _position(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's tile, in groups of GROUP_M rows of tiles: programs in flight together share operands in L2."""
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    rest = pid % (GROUP_M * tiles_n)
    return first_m + rest % group_m, rest // group_m


@triton.jit
def _tile_product(
    a_ptr,
    b_ptr,
    start_m,
    start_n,
    mask_m,
    mask_n,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of a b, in float32. Its corner is 64 bits wide, offsets in it 32: half the address registers."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + start_m * stride_am + (offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak)
    b_ptrs = b_ptr + start_n * stride_bn + (offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return acc


@triton.jit
def _tile_logits(
    x_ptr,
    w_ptr,
    bias_ptr,
    kept_ptr,
    start_m,
    start_n,
    mask_m,
    mask_n,
    H,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_kept,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of z, and tanh(. / softcap) where there is one: x W^T + b multiplied, or read where it was kept."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if kept_ptr is not None:
        kept_ptrs = (
            kept_ptr + start_m * stride_kept + start_n + (offs_m[:, None] * stride_kept + offs_n[None, :])
        )
        z = tl.load(kept_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    else:
        z = _tile_product(
            x_ptr,
            w_ptr,
            start_m,
            start_n,
            mask_m,
            mask_n,
            H,
            stride_xn,
            stride_xh,
            stride_wh,
            stride_wv,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if bias_ptr is not None:
            z += tl.load(bias_ptr + start_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    z *= scale
    u = z
    if SOFTCAP:
        u = _tanh_fwd(z / softcap, 0.0)
        z = u * softcap
    return z, u


# Sizes of the batch are not specialized on: a partial last batch would compile anew. ALIGNED_V and ALIGNED_H say that the
# bounds are multiples of 16, so that a mask below them never cuts a 128-bit vector.
@triton.jit(do_not_specialize=["N", "first_split", "splits", "tiles"])
def _linear_cross_entropy_fwd_kernel(
    x_ptr,  # [N, H]
    w_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    kept_ptr,  # [N, K] or None: x W^T + b of the first columns
    target_ptr,  # [N] int64
    weight_ptr,  # [V] or None
    partial_ptr,  # [3 or 5, splits, N] float32: m, s, z_t; with smoothing sum_j w_j (z_j - m) and sum_j w_j
    N,
    H,
    first_split,
    splits,
    tiles,
    start,
    stop,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_kept,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_V: tl.constexpr,
    ALIGNED_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if ALIGNED_V:
        start = start // 16 * 16
        stop = stop // 16 * 16
    if ALIGNED_H:
        H = H // 16 * 16
    columns = tiles * BLOCK_N
    pid_m, split = _position(tl.cdiv(N, BLOCK_M), tl.cdiv(stop - start, columns), GROUP_M)
    start_m = (pid_m * BLOCK_M).to(tl.int64)
    rows = start_m + tl.arange(0, BLOCK_M)
    mask_m = rows < N
    # A target that is no class is nowhere, and so is one that is ignored, unless it is a class: then it is not asked for.
    target = tl.load(target_ptr + rows, mask=mask_m, other=-1)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    z_target = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    weights = tl.zeros((1,), tl.float32)

    first = start + split * columns
    for column in range(first, tl.minimum(first + columns, stop), BLOCK_N):
        start_n = tl.cast(column, tl.int64)
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = offs_n < stop - start_n
        z, _ = _tile_logits(
            x_ptr,
            w_ptr,
            bias_ptr,
            kept_ptr,
            start_m,
            start_n,
            mask_m,
            mask_n,
            H,
            stride_xn,
            stride_xh,
            stride_wv,
            stride_wh,
            stride_kept,
            scale,
            softcap,
            SOFTCAP,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        z = tl.where(mask_n[None, :], z, float("-inf"))
        hit = (offs_n + start_n)[None, :] == target[:, None]
        z_target += tl.sum(tl.where(hit, z, 0.0), 1)
        top = tl.max(z, 1)
        m_new = tl.maximum(m, top)
        if SMOOTH:
            w = tl.where(mask_n, 1.0, 0.0)
            if weight_ptr is not None:
                w = tl.load(weight_ptr + start_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            part = tl.where(mask_n[None, :], w[None, :] * (z - m_new[:, None]), 0.0)
            # Around the maximum: where logits are large, sums of w_j z_j would cancel against a large log-sum-exp.
            spread = tl.where(weights == 0, 0.0, spread + weights * (m - m_new)) + tl.sum(part, 1)
            weights += tl.sum(w, 0)
        s = s * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((z - m_new[:, None]) * LOG2E), 1)
        m = m_new

    out = (first_split + split).to(tl.int64) * N + rows
    field = tl.cast(splits, tl.int64) * N
    tl.store(partial_ptr + out, m, mask=mask_m)
    tl.store(partial_ptr + field + out, s, mask=mask_m)
    tl.store(partial_ptr + 2 * field + out, z_target, mask=mask_m)
    if SMOOTH:
        tl.store(partial_ptr + 3 * field + out, spread, mask=mask_m)
        tl.store(partial_ptr + 4 * field + out, weights + tl.zeros((BLOCK_M,), tl.float32), mask=mask_m)


@triton.jit
def _targets(target_ptr, weight_ptr, rows, N, V, ignore_index, smoothing):
    """Which rows count, their (1 - e) w_t, NaN where the target is no class, and w_t."""
    target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
    live = (rows < N) & (target != ignore_index)
    valid = live & (target >= 0) & (target < V)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    else:
        w = tl.where(live, 1.0, 0.0)
    return live, tl.where(valid, 1.0 - smoothing, NAN) * w, w


@triton.jit(do_not_specialize=["N", "splits", "ignore_index"])
def _linear_cross_entropy_rows_kernel(
    partial_ptr,  # [3 or 5, splits, N] float32
    target_ptr,  # [N] int64
    weight_ptr,  # [V] or None
    token_weights_ptr,  # [N] or None
    loss_ptr,  # [N] float32
    lse_ptr,  # [N] float32
    stats_ptr,  # [2, N] float32: m, s
    share_ptr,  # [N] float32: the row's share of the denominator
    correct_ptr,  # [N] float32, or None
    N,
    V,
    splits,
    ignore_index,
    smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    live, coefficient, w = _targets(target_ptr, weight_ptr, rows, N, V, ignore_index, smoothing)
    field = tl.cast(splits, tl.int64) * N

    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    z_target = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        part = partial_ptr + tl.cast(split, tl.int64) * N + rows
        top = tl.load(part, mask=mask, other=0.0)
        m_new = tl.maximum(m, top)
        # Kahan's sum: where one class has it all, each of many splits adds a rounding's worth to 1.
        scale = tl.exp2((m - m_new) * LOG2E)
        s *= scale
        more = tl.load(part + field, mask=mask, other=1.0) * tl.exp2((top - m_new) * LOG2E) + lost * scale
        total = s + more
        lost = more - (total - s)
        s = total
        z_target += tl.load(part + 2 * field, mask=mask, other=0.0)
        if SMOOTH:
            weight = tl.load(part + 4 * field, mask=mask, other=0.0)
            spread = tl.where(weights == 0, 0.0, spread + weights * (m - m_new))
            spread += tl.load(part + 3 * field, mask=mask, other=0.0) + weight * (top - m_new)
            weights += weight
        m = m_new

    log_s = tl.log2(s) * LN2
    lse = m + log_s
    loss = coefficient * (log_s - (z_target - m))
    if SMOOTH:
        loss += smoothing / V * (weights * log_s - spread)
    loss += z_loss * lse * lse
    if token_weights_ptr is not None:
        token_weight = tl.load(token_weights_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        loss *= token_weight
        w *= token_weight
    tl.store(loss_ptr + rows, tl.where(live, loss, 0.0), mask=mask)
    tl.store(lse_ptr + rows, tl.where(live, lse, 0.0), mask=mask)
    tl.store(stats_ptr + rows, m, mask=mask)
    tl.store(stats_ptr + N + rows, s, mask=mask)
    tl.store(share_ptr + rows, tl.where(live, w, 0.0), mask=mask)
    if correct_ptr is not None:
        # Ties count, and a row with NaN does not.
        correct = (coefficient == coefficient) & (z_target >= m) & (s == s)
        tl.store(correct_ptr + rows, tl.where(live & correct, 1.0, 0.0), mask=mask)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _linear_cross_entropy_reduce_kernel(
    losses_ptr,  # [N] float32
    share_ptr,  # [N] float32
    correct_ptr,  # [N] float32, or None
    target_ptr,  # [N] int64
    loss_ptr,  # [1] float32
    denominator_ptr,  # [1] float32
    accuracy_ptr,  # [1] float32, or None
    N,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program and so a fixed order: the same bits every time."""
    loss = tl.zeros((BLOCK,), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    right = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        mask = rows < N
        loss += tl.load(losses_ptr + rows, mask=mask, other=0.0)
        denominator += tl.load(share_ptr + rows, mask=mask, other=0.0)
        if correct_ptr is not None:
            right += tl.load(correct_ptr + rows, mask=mask, other=0.0)
            target = tl.load(target_ptr + rows, mask=mask, other=ignore_index)
            counted += tl.where(mask & (target != ignore_index), 1.0, 0.0)
    result = tl.sum(loss, 0)
    total = tl.sum(denominator, 0)
    if MEAN:
        result = result / total
    tl.store(loss_ptr, result)
    tl.store(denominator_ptr, total)
    if correct_ptr is not None:
        tl.store(accuracy_ptr, tl.sum(right, 0) / tl.sum(counted, 0))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _linear_cross_entropy_scales_kernel(
    dloss_ptr,  # [N], or one value with stride 0
    dlse_ptr,  # [N] or None
    target_ptr,  # [N] int64
    weight_ptr,  # [V] or None
    weight_sum_ptr,  # [1] float32, or None where weight or smoothing is
    token_weights_ptr,  # [N] or None
    stats_ptr,  # [2, N] float32: m, s
    denominator_ptr,  # [1] float32, or None where the reduction is no mean
    scales_ptr,  # [4, N] float32: m, the factors of exp(z_j - m), of [j = t] and of w_j; m is -inf at ignored rows
    N,
    V,
    stride_dloss,
    stride_dlse,
    ignore_index,
    smoothing,
    z_loss,
    BLOCK: tl.constexpr,
):
    """What the gradients of a row's logits are made of, so that the tiles need to know nothing of the options."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    live, coefficient, _ = _targets(target_ptr, weight_ptr, rows, N, V, ignore_index, smoothing)
    g = tl.load(dloss_ptr + rows * stride_dloss, mask=mask, other=0.0).to(tl.float32)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr)
    if token_weights_ptr is not None:
        g *= tl.load(token_weights_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(stats_ptr + rows, mask=mask, other=0.0)
    s = tl.load(stats_ptr + N + rows, mask=mask, other=1.0)
    weight_sum = tl.cast(V, tl.float32)
    if weight_sum_ptr is not None:
        weight_sum = tl.load(weight_sum_ptr)
    uniform = g * smoothing / V
    hit = g * coefficient
    everywhere = hit + uniform * weight_sum + g * (2.0 * z_loss) * (m + tl.log2(s) * LN2)
    if dlse_ptr is not None:
        everywhere += tl.load(dlse_ptr + rows * stride_dlse, mask=mask, other=0.0).to(tl.float32)
    tl.store(scales_ptr + rows, tl.where(live, m, float("-inf")), mask=mask)
    tl.store(scales_ptr + N + rows, everywhere / s, mask=mask)
    tl.store(scales_ptr + 2 * N + rows, hit, mask=mask)
    tl.store(scales_ptr + 3 * N + rows, uniform, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _linear_cross_entropy_dz_kernel(
    x_ptr,  # [N, H]
    w_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    kept_ptr,  # [N, K] or None: x W^T + b of the first columns
    target_ptr,  # [N] int64
    weight_ptr,  # [V] or None
    scales_ptr,  # [4, N] float32
    dz_ptr,  # [N, stride_dz]: the gradient of columns [start, stop) of x W^T
    partial_ptr,  # [cdiv(N, BLOCK_M), stride_dz] float32 or None: its column sums, over the rows of each tile
    N,
    H,
    start,
    stop,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_kept,
    stride_dz,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_V: tl.constexpr,
    ALIGNED_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if ALIGNED_V:
        start = start // 16 * 16
        stop = stop // 16 * 16
    if ALIGNED_H:
        H = H // 16 * 16
    pid_m, pid_n = _position(tl.cdiv(N, BLOCK_M), tl.cdiv(stop - start, BLOCK_N), GROUP_M)
    start_m = (pid_m * BLOCK_M).to(tl.int64)
    start_n = (start + pid_n * BLOCK_N).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    rows = start_m + offs_m
    mask_m = rows < N
    mask_n = offs_n < stop - start_n
    z, u = _tile_logits(
        x_ptr,
        w_ptr,
        bias_ptr,
        kept_ptr,
        start_m,
        start_n,
        mask_m,
        mask_n,
        H,
        stride_xn,
        stride_xh,
        stride_wv,
        stride_wh,
        stride_kept,
        scale,
        softcap,
        SOFTCAP,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    target = tl.load(target_ptr + rows, mask=mask_m, other=-1)
    m = tl.load(scales_ptr + rows, mask=mask_m, other=float("-inf"))
    factor = tl.load(scales_ptr + N + rows, mask=mask_m, other=0.0)
    hit = tl.load(scales_ptr + 2 * N + rows, mask=mask_m, other=0.0)
    dz = tl.exp2((z - m[:, None]) * LOG2E) * factor[:, None]
    if SMOOTH:
        uniform = tl.load(scales_ptr + 3 * N + rows, mask=mask_m, other=0.0)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + start_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dz -= uniform[:, None] * w[None, :]
        else:
            dz -= uniform[:, None]
    dz = tl.where((offs_n + start_n)[None, :] == target[:, None], dz - hit[:, None], dz)
    dz *= scale
    if SOFTCAP:
        dz *= (1.0 - u) * (1.0 + u)
    # Zero, whatever the logits of an ignored row are.
    dz = tl.where((m == float("-inf"))[:, None] | (mask_n[None, :] == 0), 0.0, dz)
    corner = start_n - start
    if dz_ptr is not None:
        out = dz_ptr + start_m * stride_dz + corner + (offs_m[:, None] * stride_dz + offs_n[None, :])
        tl.store(out, _cast(dz, dz_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    if partial_ptr is not None:
        sums = partial_ptr + pid_m.to(tl.int64) * stride_dz + corner + offs_n
        tl.store(sums, tl.sum(dz, 0), mask=mask_n)


@triton.jit(do_not_specialize=["M", "N", "K"])
def _linear_cross_entropy_product_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    add_ptr,  # [M, N] float32 or None; may be out_ptr
    out_ptr,  # [M, N]
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_add,
    stride_out,
    PRECISION: tl.constexpr,
    ALIGNED_M: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if ALIGNED_M:
        M = M // 16 * 16
    if ALIGNED_N:
        N = N // 16 * 16
    if ALIGNED_K:
        K = K // 16 * 16
    pid_m, pid_n = _position(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = (pid_m * BLOCK_M).to(tl.int64)
    start_n = (pid_n * BLOCK_N).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - start_m
    mask_n = offs_n < N - start_n
    acc = _tile_product(
        a_ptr,
        b_ptr,
        start_m,
        start_n,
        mask_m,
        mask_n,
        K,
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    mask = mask_m[:, None] & mask_n[None, :]
    if add_ptr is not None:
        add = add_ptr + start_m * stride_add + start_n + (offs_m[:, None] * stride_add + offs_n[None, :])
        acc += tl.load(add, mask=mask, other=0.0)
    out = out_ptr + start_m * stride_out + start_n + (offs_m[:, None] * stride_out + offs_n[None, :])
    tl.store(out, _cast(acc, out_ptr.dtype.element_ty), mask=mask)


def _tile(*operands: torch.Tensor, smooth: bool = False) -> configs.HeadTile:
    """The tile for products of these operands; `smooth` for a forward pass with label smoothing."""
    first = operands[0]
    capability, shared_memory, _ = device_limits(first.device)
    aligned = all(t.data_ptr() % 16 == 0 and all(s == 1 or s % 16 == 0 for s in t.stride()) for t in operands)
    return configs.linear_cross_entropy_tile(capability, shared_memory, first.dtype, aligned, smooth)


def _multiply(
    a: torch.Tensor,  # [M, K]
    b: torch.Tensor,  # [K, N]
    out: torch.Tensor,  # [M, N], columns side by side
    add: torch.Tensor | None,  # [M, N] float32, columns side by side
) -> None:
    """out = a b + add, summed in float32 and rounded once."""
    (M, K), N = a.shape, b.shape[1]
    tile = _tile(a, b)
    contiguous_m, contiguous_ak, contiguous_bk = (
        t.stride(i) == 1 != t.stride(1 - i) for t, i in ((a, 0), (a, 1), (b, 0))
    )
    launch(
        _linear_cross_entropy_product_kernel,
        (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),),
        a,
        b,
        add,
        out,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        0 if add is None else add.stride(0),
        out.stride(0),
        PRECISION=matmul_precision(a.dtype),
        ALIGNED_M=contiguous_m and M % 16 == 0,
        ALIGNED_N=N % 16 == 0,
        ALIGNED_K=(contiguous_ak or contiguous_bk) and K % 16 == 0,
        **tile.blocks,
    )


def linear_cross_entropy_fwd(
    x: torch.Tensor,  # [N, H]
    w: torch.Tensor,  # [V, H]
    target: torch.Tensor,  # [N] int64
    b: torch.Tensor | None,  # [V]
    weight: torch.Tensor | None,  # [V]
    token_weights: torch.Tensor | None,  # [N]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    accuracy: bool,
    kept_columns: int,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]:
    """(loss, lse [N], accuracy [] or [N] or None, stats [2, N], denominator [1] or None, kept [N, kept_columns] or None).

    softcap 0 is none. One product in all, in one launch; what is kept of the logits takes two more, one that multiplies and
    one that reads. Then a pass over the splits' partial results, and a small launch that reduces over the rows.

    Bytes, with b those of an element, K columns kept, tiles in `across` columns and `down` rows, s splits of f = 3 fields (5
    with smoothing). Where two numbers stand, the second is what is requested.
        multiplying: b (N H + V H) + 8 N + 4 f s N; b (across N H + down V H) + 8 s N + 4 f s N. With a bias, and with smoothed
            class weights, b V more each; b V a row of tiles. Of what was kept b N K is read, in place of product and bias.
        putting together: 4 f s N + 8 N of targets + 20 N of losses, lse, statistics and shares, 4 N more for accuracy, b N for
            token weights; with class weights b for each target's class, b N.
        reducing: 8 N + 8, and 12 N + 4 more for accuracy.
    """
    (N, H), V = x.shape, w.shape[0]
    target = target.contiguous()
    b, weight, token_weights = (None if t is None else t.contiguous() for t in (b, weight, token_weights))
    device = x.device
    smooth = bool(label_smoothing)
    kept = None
    if kept_columns:
        kept = linear_fwd(x, w[:kept_columns], None if b is None else b[:kept_columns], None, 0.0, False)[0]
    # (kept logits or None, columns from, to, tile, tiles a split, splits)
    ranges = []
    for logits, start, stop in ((kept, 0, kept_columns), (None, kept_columns, V)):
        # What was kept is all that its launch reads.
        tile = _tile(x, w, smooth=smooth) if logits is None else _tile(logits, smooth=smooth)
        tiles = triton.cdiv(stop - start, tile.block_n)
        if tiles:
            each = configs.linear_cross_entropy_split(triton.cdiv(N, tile.block_m), tiles)
            ranges.append((logits, start, stop, tile, each, triton.cdiv(tiles, each)))
    splits = sum(count for *_, count in ranges)
    partial = torch.empty((5 if smooth else 3, splits, N), dtype=torch.float32, device=device)
    first_split = 0
    for logits, start, stop, tile, each, count in ranges:
        launch(
            _linear_cross_entropy_fwd_kernel,
            (triton.cdiv(N, tile.block_m) * count,),
            x,
            w,
            b,
            logits,
            target,
            weight,
            partial,
            N,
            H,
            first_split,
            splits,
            each,
            start,
            stop,
            *x.stride(),
            *w.stride(),
            0 if logits is None else logits.stride(0),
            logit_scale,
            softcap,
            SOFTCAP=bool(softcap),
            SMOOTH=smooth,
            PRECISION=matmul_precision(x.dtype),
            ALIGNED_V=V % 16 == 0 and kept_columns % 16 == 0,
            ALIGNED_H=H % 16 == 0,
            **tile.blocks,
        )
        first_split += count
    losses, lse, share = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(3))
    correct = torch.empty(N, dtype=torch.float32, device=device) if accuracy else None
    stats = torch.empty((2, N), dtype=torch.float32, device=device)
    launch(
        _linear_cross_entropy_rows_kernel,
        (triton.cdiv(N, 128),),
        partial,
        target,
        weight,
        token_weights,
        losses,
        lse,
        stats,
        share,
        correct,
        N,
        V,
        splits,
        ignore_index,
        label_smoothing,
        z_loss,
        SMOOTH=smooth,
        BLOCK=128,
        num_warps=4,
    )
    if reduction == "none":
        return losses, lse, correct, stats, None, kept
    loss = torch.empty((), dtype=torch.float32, device=device)
    denominator = torch.empty(1, dtype=torch.float32, device=device)
    right = torch.empty((), dtype=torch.float32, device=device) if accuracy else None
    launch(
        _linear_cross_entropy_reduce_kernel,
        (1,),
        losses,
        share,
        correct,
        target,
        loss,
        denominator,
        right,
        N,
        ignore_index,
        MEAN=reduction == "mean",
        BLOCK=1024,
        num_warps=8,
    )
    return loss, lse, right, stats, denominator, kept


def linear_cross_entropy_bwd(
    dloss: torch.Tensor,  # [N] or []
    dlse: torch.Tensor | None,  # [N]
    x: torch.Tensor,  # [N, H]
    w: torch.Tensor,  # [V, H]
    target: torch.Tensor,  # [N] int64
    b: torch.Tensor | None,  # [V]
    weight: torch.Tensor | None,  # [V]
    token_weights: torch.Tensor | None,  # [N]
    stats: torch.Tensor,  # [2, N]
    denominator: torch.Tensor | None,  # [1]
    kept: torch.Tensor | None,  # [N, K]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dw, db), None for what is not needed. A small launch for the rows' factors; for each chunk of the vocabulary one
    that makes its dZ, and a product for each of dX and dW. Where all logits were kept there is one chunk.

    Bytes, with b those of an element, tiles in `across` columns and `down` rows. Where two numbers stand, the second is what
    is requested.
        factors: 32 N of targets, statistics and factors, 4 N of upstream gradients (4 of one value; 4 N), 4 N of dlse, b N of
            token weights, 4 of the denominator and 4 of the class weights' sum (each by every program), with class weights
            b for each target's class (b N).
        dZ of c columns: b (N H + c H) + 20 N (24 N with smoothing) + b N c + 4 down c for db; b (across N H + down c H) +
            across (20 N or 24 N) + b N c + 4 down c. Bias, class weights and what was kept as in forward.
        dX of one of several chunks: b (N c + c H) + 4 N H, another 4 N H but for the first chunk, and for the last b N H in
            place of the first 4 N H; b (across N c + down c H) and the same ends.
    dW, and dX of one chunk, are products of kernels/linear.py.
    """
    (N, H), V = x.shape, w.shape[0]
    needs_x, needs_w, needs_b = needs
    target = target.contiguous()
    b, weight, token_weights = (None if t is None else t.contiguous() for t in (b, weight, token_weights))
    device, dtype = x.device, x.dtype
    smooth = bool(label_smoothing)
    scales = torch.empty((4, N), dtype=torch.float32, device=device)
    launch(
        _linear_cross_entropy_scales_kernel,
        (triton.cdiv(N, 128),),
        dloss,
        dlse,
        target,
        weight,
        weight.sum(dtype=torch.float32) if weight is not None and smooth else None,
        token_weights,
        stats,
        denominator if reduction == "mean" else None,
        scales,
        N,
        V,
        dloss.stride(0) if dloss.dim() else 0,
        0 if dlse is None else dlse.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        BLOCK=128,
        num_warps=4,
    )
    tile = _tile(x, w)
    kept_columns = 0 if kept is None else kept.shape[1]
    chunk = V if kept_columns == V else configs.linear_cross_entropy_chunk(N, V, dtype)
    edges = [*range(0, kept_columns, chunk), *range(kept_columns, V, chunk), V]
    strips = triton.cdiv(N, tile.block_m)
    whole = len(edges) == 2
    # Rows that start at multiples of 16 elements, for descriptors.
    width = triton.cdiv(min(chunk, V), 16) * 16
    dz = torch.empty((N, width), dtype=dtype, device=device) if needs_x or needs_w else None
    partial = torch.empty((strips, width), dtype=torch.float32, device=device) if needs_b else None
    # Sums over several chunks are float32, rounded with the last.
    total = torch.empty((N, H), dtype=torch.float32, device=device) if needs_x and not whole else None
    dx = torch.empty((N, H), dtype=dtype, device=device) if needs_x and not whole else None
    dw = torch.empty((V, H), dtype=dtype, device=device) if needs_w and not whole else None
    db = torch.empty(V, dtype=dtype, device=device) if needs_b else None
    for start, stop in itertools.pairwise(edges):
        columns = stop - start
        launch(
            _linear_cross_entropy_dz_kernel,
            (strips * triton.cdiv(columns, tile.block_n),),
            x,
            w,
            b,
            kept if stop <= kept_columns else None,
            target,
            weight,
            scales,
            dz,
            partial,
            N,
            H,
            start,
            stop,
            *x.stride(),
            *w.stride(),
            kept_columns,
            width,
            logit_scale,
            softcap,
            SOFTCAP=bool(softcap),
            SMOOTH=smooth,
            PRECISION=matmul_precision(dtype),
            ALIGNED_V=start % 16 == 0 and stop % 16 == 0,
            ALIGNED_H=H % 16 == 0,
            **tile.blocks,
        )
        if dz is not None and dx is not None and total is not None:
            _multiply(dz[:, :columns], w[start:stop], dx if stop == V else total, total if start else None)
        if dz is not None and dw is not None:
            linear_wgrad(dz[:, :columns], x, dw[start:stop])
        if partial is not None and db is not None:
            db[start:stop] = partial[:, :columns].sum(0)
    if whole and dz is not None:
        dx = linear_dgrad(dz[:, :V], w)[0] if needs_x else None
        dw = linear_wgrad(dz[:, :V], x) if needs_w else None
    return dx, dw, db
