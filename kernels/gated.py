"""Gated units: h = act(x Wg^T + bg) * (x Wu^T + bu), forward and backward; w [2 H, K] holds Wg's rows first, then Wu's.

`_gated_fwd_kernel` is one GEMM with two accumulators: a tile of x is read once for both products, and their product is made
in the epilogue. Training keeps what both give, [g | u] packed in one matrix [M, 2 H], and not h: backward makes it again.
`_gated_dgrad_kernel` is the GEMM dh = dy W of the projection above, whose epilogue makes [dg | du], h and the bias's column
sums of each row of tiles; dh itself is never written. Each has a persistent twin that moves its operands by TMA, from
capability 9.0 on. `_gated_bwd_kernel` makes the same, or h alone, in one pass over dh and [g | u], where the product is
cuBLAS's or somebody else's.
"""

from __future__ import annotations

from typing import Any

import torch

from . import configs
from ._triton import _cast, _dot, descriptor, device_limits, launch, matmul_precision, tl, triton
from .activations import lookup, saved_for_backward
from .linear import _aligned, _Plan, _row_major, _store_tile, _sum, _tile_offsets, _tile_position

__all__ = ["gated_bwd", "gated_dgrad", "gated_fwd", "gated_tiles"]


@triton.jit
def _products(
    a_ptr,  # [M, K], or [K, M] with A_T
    b_ptr,  # [K, N], or [N, K] with B_T
    second_ptr,  # the same, or None
    start_m,
    start_n,
    M,
    N,
    K,
    stride_a,
    stride_b,
    PRECISION: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of a b, and of a times the second matrix: (both, or the first twice)."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - start_m
    mask_n = offs_n < N - start_n
    # 64-bit scalar bases and, if rows lie near enough, 32-bit offsets within the tile: half the address registers.
    if WIDE:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    if A_T:
        a_ptrs = a_ptr + start_m + (offs_k[None, :] * stride_a + offs_m[:, None])
        step_a = tl.cast(stride_a, tl.int64) * BLOCK_K
    else:
        a_ptrs = a_ptr + start_m.to(tl.int64) * stride_a + (offs_m[:, None] * stride_a + offs_k[None, :])
        step_a = tl.cast(BLOCK_K, tl.int64)
    if B_T:
        first_b = start_n.to(tl.int64) * stride_b
        offs_b = offs_n[None, :] * stride_b + offs_k[:, None]
        step_b = tl.cast(BLOCK_K, tl.int64)
    else:
        first_b = start_n.to(tl.int64)
        offs_b = offs_k[:, None] * stride_b + offs_n[None, :]
        step_b = tl.cast(stride_b, tl.int64) * BLOCK_K
    b_ptrs = b_ptr + first_b + offs_b

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if second_ptr is None:
        for k in range(0, K, BLOCK_K):
            mask_k = tl.arange(0, BLOCK_K) < K - k
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
            a_ptrs += step_a
            b_ptrs += step_b
        return acc, acc
    else:
        second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        second_ptrs = second_ptr + first_b + offs_b
        for k in range(0, K, BLOCK_K):
            mask_k = tl.arange(0, BLOCK_K) < K - k
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
            b = tl.load(second_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            second = _dot(a, b, second, PRECISION)
            a_ptrs += step_a
            b_ptrs += step_b
            second_ptrs += step_b
        return acc, second


@triton.jit
def _gradients(dh, g, u, slope, ACT: tl.constexpr, GRADIENT: tl.constexpr, SAVES_Y: tl.constexpr):
    """(dg, du, h) of h = act(g) u."""
    a = ACT(g, slope)
    if SAVES_Y:
        dg = GRADIENT(dh * u, a, slope)
    else:
        dg = GRADIENT(dh * u, g, slope)
    return dg, dh * a, a * u


@triton.jit
def _load_half(
    source,  # descriptor of [M, 2, N], or pointer
    half: tl.constexpr,
    start_m,
    start_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of the gate's half (0) or the up projection's (1)."""
    if TMA:
        tile = source.load([start_m, half, start_n])
        return tl.reshape(tile, (BLOCK_M, BLOCK_N)).to(tl.float32)
    else:
        mask = (tl.arange(0, BLOCK_M) < M - start_m)[:, None] & (tl.arange(0, BLOCK_N) < N - start_n)[None, :]
        ptrs = source + start_m.to(tl.int64) * (2 * N) + half * N + start_n
        ptrs += _tile_offsets(start_m, 2 * N, BLOCK_M, BLOCK_N, WIDE)
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_half(
    target,
    tile,
    half: tl.constexpr,
    start_m,
    start_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    if TMA:
        target.store([start_m, half, start_n], tl.reshape(_cast(tile, target.dtype), (BLOCK_M, 1, BLOCK_N)))
    else:
        mask = (tl.arange(0, BLOCK_M) < M - start_m)[:, None] & (tl.arange(0, BLOCK_N) < N - start_n)[None, :]
        ptrs = target + start_m.to(tl.int64) * (2 * N) + half * N + start_n
        ptrs += _tile_offsets(start_m, 2 * N, BLOCK_M, BLOCK_N, WIDE)
        tl.store(ptrs, _cast(tile, target.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_epilogue(
    g,
    u,
    bias_ptr,
    h,
    gu,
    start_m,
    start_n,
    M,
    N,
    slope,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What becomes of one tile of both products: bias, [g | u], h."""
    if bias_ptr is not None:
        cols = start_n + tl.arange(0, BLOCK_N)
        g += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        u += tl.load(bias_ptr + N + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if gu is not None:
        _store_half(gu, g, 0, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
        _store_half(gu, u, 1, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    _store_tile(h, ACT(g, slope) * u, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)


@triton.jit
def _dgrad_epilogue(
    dh,
    gu,
    dgu,
    h,
    partial_ptr,
    strip,
    start_m,
    start_n,
    M,
    N,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAVES_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What becomes of one tile of dh: [dg | du], their column sums, and h."""
    g = _load_half(gu, 0, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    u = _load_half(gu, 1, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    dg, du, product = _gradients(dh, g, u, slope, ACT, GRADIENT, SAVES_Y)
    if h is not None:
        _store_tile(h, product, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    if dgu is not None:
        _store_half(dgu, dg, 0, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
        _store_half(dgu, du, 1, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    if partial_ptr is not None:
        # A row beyond the last of the product is 0, but NaN where the weight is infinite.
        there = (tl.arange(0, BLOCK_M) < M - start_m)[:, None]
        cols = start_n + tl.arange(0, BLOCK_N)
        partial_ptrs = partial_ptr + strip.to(tl.int64) * (2 * N) + cols
        tl.store(partial_ptrs, tl.sum(tl.where(there, dg, 0.0), 0), mask=cols < N)
        tl.store(partial_ptrs + N, tl.sum(tl.where(there, du, 0.0), 0), mask=cols < N)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


# Sizes are not specialized on: a partial last batch would compile anew.
@triton.jit(do_not_specialize=["M", "N", "K"])
def _gated_fwd_tma_kernel(
    x,  # descriptor of [M, K], or of [K, M] with A_T; blocks [BLOCK_M, BLOCK_K], or the reverse
    w,  # descriptor of [2 N, K] with B_T, or of [K, 2 N]
    bias_ptr,  # [2 N] or None
    h,  # descriptor or pointer of [M, N]
    gu,  # descriptor of [M, 2, N] or pointer, or None
    M,
    N,
    K,
    slope,
    ACT: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    TMA_OUT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    if TMA_OUT:
        # Bias loads of more than an element.
        N = N // 8 * 8
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = _tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = pid_m * BLOCK_M
        start_n = pid_n * BLOCK_N
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if A_T:
                x_tile = x.load([k, start_m]).T
            else:
                x_tile = x.load([start_m, k])
            # Columns of the gate's last tile that are the up projection's are not stored.
            if B_T:
                gate = w.load([start_n, k]).T
                up = w.load([N + start_n, k]).T
            else:
                gate = w.load([k, start_n])
                up = w.load([k, N + start_n])
            g = _dot(x_tile, gate, g, "ieee")
            u = _dot(x_tile, up, u, "ieee")
        if SUBTILES == 2:
            g0, g1 = _halves(g, BLOCK_M, BLOCK_N)
            u0, u1 = _halves(u, BLOCK_M, BLOCK_N)
            half = start_n + BLOCK_N // 2
            _fwd_epilogue(
                g0,
                u0,
                bias_ptr,
                h,
                gu,
                start_m,
                start_n,
                M,
                N,
                slope,
                ACT,
                BLOCK_M,
                BLOCK_N // 2,
                TMA_OUT,
                WIDE,
            )
            _fwd_epilogue(
                g1, u1, bias_ptr, h, gu, start_m, half, M, N, slope, ACT, BLOCK_M, BLOCK_N // 2, TMA_OUT, WIDE
            )
        else:
            _fwd_epilogue(
                g, u, bias_ptr, h, gu, start_m, start_n, M, N, slope, ACT, BLOCK_M, BLOCK_N, TMA_OUT, WIDE
            )


# ALIGNED_* say of each size which is a contiguous dimension of some operand and a multiple of VECTOR, so that a mask below
# it never cuts a 128-bit access.
@triton.jit(do_not_specialize=["M", "N", "K"])
def _gated_fwd_kernel(
    x_ptr,  # [M, K], or [K, M] with A_T
    w_ptr,  # [2 N, K] with B_T, or [K, 2 N]
    bias_ptr,  # [2 N] or None
    h_ptr,  # [M, N]
    gu_ptr,  # [M, 2 N] or None
    M,
    N,
    K,
    stride_x,
    stride_w,
    slope,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_M: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if ALIGNED_M:
        M = M // VECTOR * VECTOR
    if ALIGNED_N:
        N = N // VECTOR * VECTOR
    if ALIGNED_K:
        K = K // VECTOR * VECTOR
    if ALIGNED:
        stride_x = stride_x // VECTOR * VECTOR
        stride_w = stride_w // VECTOR * VECTOR
    pid_m, pid_n = _tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    if B_T:
        up_ptr = w_ptr + tl.cast(N, tl.int64) * stride_w
    else:
        up_ptr = w_ptr + N
    g, u = _products(
        x_ptr,
        w_ptr,
        up_ptr,
        start_m,
        start_n,
        M,
        N,
        K,
        stride_x,
        stride_w,
        PRECISION,
        A_T,
        B_T,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    _fwd_epilogue(
        g, u, bias_ptr, h_ptr, gu_ptr, start_m, start_n, M, N, slope, ACT, BLOCK_M, BLOCK_N, False, WIDE
    )


@triton.jit(do_not_specialize=["M", "N", "K"])
def _gated_dgrad_tma_kernel(
    dy,  # descriptor of [M, K], or of [K, M] with A_T; blocks [BLOCK_M, BLOCK_K], or the reverse
    w,  # descriptor of [K, N], or of [N, K] with B_T
    gu,  # descriptor of [M, 2, N] or pointer
    dgu,  # descriptor of [M, 2, N] or pointer, or None
    h,  # descriptor or pointer of [M, N], or None
    partial_ptr,  # [cdiv(M, BLOCK_M), 2 N] float32 or None: column sums of each row of tiles
    M,
    N,
    K,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAVES_Y: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    TMA_OUT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = _tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = pid_m * BLOCK_M
        start_n = pid_n * BLOCK_N
        dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if A_T:
                dy_tile = dy.load([k, start_m]).T
            else:
                dy_tile = dy.load([start_m, k])
            if B_T:
                w_tile = w.load([start_n, k]).T
            else:
                w_tile = w.load([k, start_n])
            dh = _dot(dy_tile, w_tile, dh, "ieee")
        if SUBTILES == 2:
            left, right = _halves(dh, BLOCK_M, BLOCK_N)
            half = start_n + BLOCK_N // 2
            _dgrad_epilogue(
                left,
                gu,
                dgu,
                h,
                partial_ptr,
                pid_m,
                start_m,
                start_n,
                M,
                N,
                slope,
                ACT,
                GRADIENT,
                SAVES_Y,
                BLOCK_M,
                BLOCK_N // 2,
                TMA_OUT,
                WIDE,
            )
            _dgrad_epilogue(
                right,
                gu,
                dgu,
                h,
                partial_ptr,
                pid_m,
                start_m,
                half,
                M,
                N,
                slope,
                ACT,
                GRADIENT,
                SAVES_Y,
                BLOCK_M,
                BLOCK_N // 2,
                TMA_OUT,
                WIDE,
            )
        else:
            _dgrad_epilogue(
                dh,
                gu,
                dgu,
                h,
                partial_ptr,
                pid_m,
                start_m,
                start_n,
                M,
                N,
                slope,
                ACT,
                GRADIENT,
                SAVES_Y,
                BLOCK_M,
                BLOCK_N,
                TMA_OUT,
                WIDE,
            )


@triton.jit(do_not_specialize=["M", "N", "K"])
def _gated_dgrad_kernel(
    dy_ptr,  # [M, K], or [K, M] with A_T
    w_ptr,  # [K, N], or [N, K] with B_T
    gu_ptr,  # [M, 2 N]
    dgu_ptr,  # [M, 2 N] or None
    h_ptr,  # [M, N] or None
    partial_ptr,  # [cdiv(M, BLOCK_M), 2 N] float32 or None: column sums of each row of tiles
    M,
    N,
    K,
    stride_dy,
    stride_w,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAVES_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_M: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if ALIGNED_M:
        M = M // VECTOR * VECTOR
    if ALIGNED_N:
        N = N // VECTOR * VECTOR
    if ALIGNED_K:
        K = K // VECTOR * VECTOR
    if ALIGNED:
        stride_dy = stride_dy // VECTOR * VECTOR
        stride_w = stride_w // VECTOR * VECTOR
    pid_m, pid_n = _tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    dh, _ = _products(
        dy_ptr,
        w_ptr,
        None,
        start_m,
        start_n,
        M,
        N,
        K,
        stride_dy,
        stride_w,
        PRECISION,
        A_T,
        B_T,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    _dgrad_epilogue(
        dh,
        gu_ptr,
        dgu_ptr,
        h_ptr,
        partial_ptr,
        pid_m,
        start_m,
        start_n,
        M,
        N,
        slope,
        ACT,
        GRADIENT,
        SAVES_Y,
        BLOCK_M,
        BLOCK_N,
        False,
        WIDE,
    )


@triton.jit(do_not_specialize=["M"])
def _gated_bwd_kernel(
    dh_ptr,  # [M, N], any strides; or None: h alone is made
    gu_ptr,  # [M, 2 N]
    dgu_ptr,  # [M, 2 N] or None
    h_ptr,  # [M, N] or None
    partial_ptr,  # [cdiv(M, ROWS), 2 N] float32 or None: column sums of each strip
    M,
    N,
    stride_dhm,
    stride_dhn,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAVES_Y: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    sum_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        offs_m = strip * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        offs = offs_m[:, None] * (2 * N) + offs_n[None, :]
        g = tl.load(gu_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + N + offs, mask=mask, other=0.0).to(tl.float32)
        if dh_ptr is None:
            h = ACT(g, slope) * u
        else:
            dh_ptrs = dh_ptr + offs_m[:, None] * stride_dhm + offs_n.to(tl.int64)[None, :] * stride_dhn
            dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
            dg, du, h = _gradients(dh, g, u, slope, ACT, GRADIENT, SAVES_Y)
            if dgu_ptr is not None:
                tl.store(dgu_ptr + offs, _cast(dg, dgu_ptr.dtype.element_ty), mask=mask)
                tl.store(dgu_ptr + N + offs, _cast(du, dgu_ptr.dtype.element_ty), mask=mask)
            if partial_ptr is not None:
                # A masked lane holds act'(0) * 0 and act(0) * 0, which are 0.
                sum_g += dg
                sum_u += du
        if h_ptr is not None:
            offs_h = offs_m[:, None] * N + offs_n[None, :]
            tl.store(h_ptr + offs_h, _cast(h, h_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + strip * (2 * N) + offs_n
        tl.store(partial_ptrs, tl.sum(sum_g, 0), mask=mask_n)
        tl.store(partial_ptrs + N, tl.sum(sum_u, 0), mask=mask_n)


def _plan(a: torch.Tensor, b: torch.Tensor, N: int, saved: torch.Tensor | None = None) -> _Plan:
    """How a [M, K] times b [K, N], or times both halves of b [K, 2 N], runs."""
    M, K = a.shape
    (a, a_t), (b, b_t) = _row_major(a), _row_major(b)
    capability, shared_memory, multiprocessors = device_limits(a.device)
    precision = matmul_precision(a.dtype)
    aligned = _aligned(a) and _aligned(b)
    aligned_out = N * a.element_size() % 16 == 0 and (saved is None or saved.data_ptr() % 16 == 0)
    tile = configs.gated_tile(
        capability,
        shared_memory,
        a.dtype,
        M,
        N,
        K,
        gradient=b.numel() == N * K,
        precision=precision,
        aligned=aligned,
        aligned_out=aligned_out,
        k_major=b_t and not a_t,
    )
    return _Plan(a, b, a_t, b_t, aligned, aligned_out, precision, multiprocessors, tile)


def gated_tiles(
    x: torch.Tensor, w: torch.Tensor, w_out: torch.Tensor | None
) -> dict[str, configs.MatmulTile | configs.CuBlas]:
    """What would multiply for h and, with w_out, for dh; launches nothing, so meta tensors will do."""
    H = len(w) // 2
    tiles = {"h": _plan(x, w.t(), H).tile}
    if w_out is not None:
        tiles["dh"] = _plan(x.new_empty((len(x), len(w_out)), device="meta"), w_out, H).tile
    return tiles


def _gradient_constants(activation: str | None, negative_slope: float) -> dict[str, Any]:
    row = lookup(activation)
    return {
        "ACT": row.forward,
        "GRADIENT": row.gradient,
        "SAVES_Y": saved_for_backward(activation, negative_slope) == "y",
    }


def _launch_product(
    kernels: tuple[Any, Any],
    plan: _Plan,
    M: int,
    N: int,
    K: int,
    bias: tuple[torch.Tensor | None, ...],
    matrices: tuple[torch.Tensor | None, ...],
    partial: tuple[torch.Tensor | None, ...],
    negative_slope: float,
    constants: dict[str, Any],
) -> None:
    """Launches the pointer or the TMA kernel of the two on: operands, bias, matrices of [M, N] or [M, 2 N], partial sums,
    sizes. `bias` and `partial` are empty for a kernel without."""
    a, b, tile = plan.a, plan.b, plan.tile
    assert isinstance(tile, configs.MatmulTile)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    options: dict[str, Any] = {
        **constants,
        "A_T": plan.a_t,
        "B_T": plan.b_t,
        # 32-bit offsets reach 128 rows and columns of less than 2^24 elements.
        "WIDE": max(a.stride(0), b.stride(0), 2 * N) >= 1 << 24,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }
    if not tile.tma:
        vector = 16 // a.element_size()
        launch(
            kernels[0],
            (tiles,),
            a,
            b,
            *bias,
            *matrices,
            *partial,
            M,
            N,
            K,
            a.stride(0),
            b.stride(0),
            negative_slope,
            PRECISION=plan.precision,
            ALIGNED=plan.aligned,
            ALIGNED_M=plan.a_t and M % vector == 0,
            ALIGNED_N=plan.aligned_out,
            ALIGNED_K=(plan.b_t or not plan.a_t) and K % vector == 0,
            VECTOR=vector,
            **options,
        )
        return
    if 0 in (M, N):
        return
    block_a, block_b = (tile.block_m, tile.block_k), (tile.block_k, tile.block_n)
    block_m, block_n = tile.block_m, tile.block_n // tile.subtiles

    def moved(t: torch.Tensor | None) -> Any:
        if t is None or not plan.aligned_out:
            return t
        if t.shape[1] == N:
            return descriptor(t, (block_m, block_n))
        # A tile at the edge of one half must not reach into the other.
        return descriptor(t.view(M, 2, N), (block_m, 1, block_n))

    launch(
        kernels[1],
        (min(tiles, plan.multiprocessors * tile.programs),),
        descriptor(a, block_a[::-1] if plan.a_t else block_a),
        descriptor(b, block_b[::-1] if plan.b_t else block_b),
        *bias,
        *(moved(t) for t in matrices),
        *partial,
        M,
        N,
        K,
        negative_slope,
        TMA_OUT=plan.aligned_out,
        SUBTILES=tile.subtiles,
        **options,
    )


def gated_fwd(
    x: torch.Tensor,  # [M, K]
    w: torch.Tensor,  # [2 H, K]
    b: torch.Tensor | None,  # [2 H]
    activation: str | None,
    negative_slope: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h = act(g) u, [g | u] = x w^T + b: (h [M, H], [g | u] if save else None) in one launch."""
    (M, K), N = x.shape, len(w) // 2
    plan = _plan(x, w.t(), N)
    if isinstance(plan.tile, configs.CuBlas):
        gu = x @ w.t() if b is None else torch.addmm(b, x, w.t())
        _, h, _ = gated_bwd(None, gu, activation, negative_slope, False, True, False)
        assert h is not None
        return h, gu if save else None
    h = torch.empty((M, N), dtype=x.dtype, device=x.device)
    kept = torch.empty((M, 2 * N), dtype=x.dtype, device=x.device) if save else None
    _launch_product(
        (_gated_fwd_kernel, _gated_fwd_tma_kernel),
        plan,
        M,
        N,
        K,
        (b.contiguous() if b is not None else None,),
        (h, kept),
        (),
        negative_slope,
        {"ACT": lookup(activation).forward},
    )
    return h, kept


def gated_dgrad(
    dy: torch.Tensor,  # [M, K]
    w: torch.Tensor,  # [K, H]
    gu: torch.Tensor,  # [M, 2 H]
    activation: str | None,
    negative_slope: float,
    needs_dgu: bool,
    needs_h: bool,
    needs_b: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """([dg | du] [M, 2 H], h [M, H], column sums of [dg | du]) for dh = dy w, None for what is not needed; h = act(g) u."""
    (M, K), N = dy.shape, w.shape[1]
    plan = _plan(dy, w, N, gu)
    if isinstance(plan.tile, configs.CuBlas):
        return gated_bwd(dy @ w, gu, activation, negative_slope, needs_dgu, needs_h, needs_b)
    rows = triton.cdiv(M, plan.tile.block_m)
    dgu = torch.empty((M, 2 * N), dtype=dy.dtype, device=dy.device) if needs_dgu else None
    h = torch.empty((M, N), dtype=dy.dtype, device=dy.device) if needs_h else None
    partial = torch.empty((rows, 2 * N), dtype=torch.float32, device=dy.device) if needs_b else None
    _launch_product(
        (_gated_dgrad_kernel, _gated_dgrad_tma_kernel),
        plan,
        M,
        N,
        K,
        (),
        (gu, dgu, h),
        (partial,),
        negative_slope,
        _gradient_constants(activation, negative_slope),
    )
    return dgu, h, _column_sums(partial, gu)


def gated_bwd(
    dh: torch.Tensor | None,  # [M, H]
    gu: torch.Tensor,  # [M, 2 H]
    activation: str | None,
    negative_slope: float,
    needs_dgu: bool,
    needs_h: bool,
    needs_b: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `gated_dgrad`, from dh itself; without dh h alone can be had. One pass."""
    M, N = len(gu), gu.shape[1] // 2
    tile = configs.gated_bwd_tile(gu.dtype, N)
    strips = triton.cdiv(M, tile.rows)
    dgu = torch.empty((M, 2 * N), dtype=gu.dtype, device=gu.device) if needs_dgu else None
    h = torch.empty((M, N), dtype=gu.dtype, device=gu.device) if needs_h else None
    partial = torch.empty((strips, 2 * N), dtype=torch.float32, device=gu.device) if needs_b else None
    launch(
        _gated_bwd_kernel,
        (strips, triton.cdiv(N, tile.block_n)),
        dh,
        gu,
        dgu,
        h,
        partial,
        M,
        N,
        *((0, 0) if dh is None else dh.stride()),
        negative_slope,
        **_gradient_constants(activation, negative_slope),
        ROWS=tile.rows,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return dgu, h, _column_sums(partial, gu)


def _column_sums(partial: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    if partial is None:
        return None
    return _sum(partial, torch.empty(partial.shape[1], dtype=like.dtype, device=like.device))
