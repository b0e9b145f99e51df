"""Fused linear + bias + activation: y = act(x w^T + b), forward and backward.

Three kernels. `_linear_kernel` is the GEMM, with bias and activation in its epilogue; without them the same kernel makes
dX = dZ W and dW = dZ^T X. `_linear_dz_kernel` makes dZ = dY * act'(z) and per-strip column sums in one pass, and
`_column_sum_kernel` adds those sums in a fixed order into db, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import configs
from ._triton import _cast, _dot, device_limits, launch, matmul_precision, tl, triton
from .activations import activation_fwd, lookup, saved_for_backward

__all__ = ["linear_bwd", "linear_fwd"]


# Sizes are not specialized on: a partial last batch would compile anew. ALIGNED_* say of each which is a contiguous
# dimension of some operand and a multiple of 16, so that a mask below it never cuts a 128-bit vector.
@triton.jit(do_not_specialize=["M", "N", "K"])
def _linear_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    z_ptr,  # [M, N] or None: what the activation is given
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    slope,
    ACT: tl.constexpr,
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
    # Tiles in groups of GROUP_M rows, so that programs in flight together share operands in L2.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // per_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % per_group % group_m
    pid_n = pid % per_group // group_m

    # A 64-bit scalar base and 32-bit offsets within the tile: half the address registers.
    start_m = (pid_m * BLOCK_M).to(tl.int64)
    start_n = (pid_n * BLOCK_N).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - start_m
    mask_n = offs_n < N - start_n
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

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + start_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    out = start_m * N + start_n
    offs = offs_m[:, None] * N + offs_n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + out + offs, _cast(acc, z_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + out + offs, _cast(ACT(acc, slope), y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _linear_dz_kernel(
    dy_ptr,  # [M, N], any strides
    saved_ptr,  # [M, N] or None: y or z, as the activation's row says
    dz_ptr,  # [M, N] or None where dZ is dY
    partial_ptr,  # [cdiv(M, ROWS), N] float32 or None: column sums of each strip
    M,
    N,
    stride_dym,
    stride_dyn,
    slope,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    column_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        offs_m = strip * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn
        dz = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if saved_ptr is not None:
            saved = tl.load(saved_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
            dz = GRADIENT(dz, saved.to(tl.float32), slope)
        if dz_ptr is not None:
            tl.store(
                dz_ptr + offs_m[:, None] * N + offs_n[None, :], _cast(dz, dz_ptr.dtype.element_ty), mask=mask
            )
        if partial_ptr is not None:
            # A masked lane holds act'(0) * 0, which is 0.
            column_sum += dz
    if partial_ptr is not None:
        tl.store(partial_ptr + strip * N + offs_n, tl.sum(column_sum, 0), mask=mask_n)


@triton.jit(do_not_specialize=["S"])
def _column_sum_kernel(
    partial_ptr,  # [S, N] float32
    out_ptr,  # [N]
    S,
    N,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_S)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = (start + offs_s).to(tl.int64)
        mask = (rows < S)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_n, _cast(tl.sum(acc, 0), out_ptr.dtype.element_ty), mask=offs_n < N)


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    save_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(a b + bias) and, with save_z, a b + bias; a [M, K] and b [K, N] of any strides."""
    (M, K), N = a.shape, b.shape[1]
    capability, shared_memory, _ = device_limits(a.device)
    aligned = N % 16 == 0 and all(
        t.data_ptr() % 16 == 0 and all(s == 1 or s % 16 == 0 for s in t.stride()) for t in (a, b)
    )
    tile = configs.linear_tile(capability, shared_memory, a.dtype, N, aligned)
    if tile is None:
        product = a @ b if bias is None else torch.addmm(bias, a, b)
        activated = product if activation is None else activation_fwd(product, activation, negative_slope)
        return activated, product if save_z else None
    y = torch.empty((M, N), dtype=a.dtype, device=a.device)
    z = torch.empty_like(y) if save_z else None
    # Strides of (1, 1), of a matrix one feature wide, say nothing: its other side is the batch.
    contiguous_m, contiguous_ak, contiguous_bk = (
        t.stride(i) == 1 != t.stride(1 - i) for t, i in ((a, 0), (a, 1), (b, 0))
    )
    launch(
        _linear_kernel,
        (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),),
        a,
        b,
        bias,
        y,
        z,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        negative_slope,
        ACT=lookup(activation).forward,
        PRECISION=matmul_precision(a.dtype),
        ALIGNED_M=contiguous_m and M % 16 == 0,
        ALIGNED_N=N % 16 == 0,
        ALIGNED_K=(contiguous_ak or contiguous_bk) and K % 16 == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y, z


def linear_fwd(
    x: torch.Tensor,  # [M, K]
    w: torch.Tensor,  # [N, K]
    b: torch.Tensor | None,  # [N]
    activation: str | None,
    negative_slope: float,
    save_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = act(x w^T + b) and, with save_z, z = x w^T + b: one launch, any strides of x and w."""
    return _matmul(x, w.t(), b.contiguous() if b is not None else None, activation, negative_slope, save_z)


def linear_bwd(
    dy: torch.Tensor,  # [M, N]
    x: torch.Tensor,  # [M, K]
    w: torch.Tensor,  # [N, K]
    saved: torch.Tensor | None,  # [M, N]: y or z
    activation: str | None,
    negative_slope: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dw, db), None for what is not needed: at most one pass for dZ and the column sums, one small launch that adds
    those, and a GEMM for each of dx and dw."""
    needs_x, needs_w, needs_b = needs
    dz, db = linear_dz(dy, saved, activation, negative_slope, needs_x or needs_w, needs_b)
    dx = _matmul(dz, w, None, None, 0.0, False)[0] if needs_x else None
    dw = _matmul(dz.t(), x, None, None, 0.0, False)[0] if needs_w else None
    return dx, dw, db


def linear_dz(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    activation: str | None,
    negative_slope: float,
    needs_dz: bool,
    needs_b: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dZ = dY * act'(.), and its column sums db in dY's dtype where needed. Without an activation dZ is dY itself."""
    (M, N) = dy.shape
    identity = saved_for_backward(activation, negative_slope) is None
    dz = torch.empty((M, N), dtype=dy.dtype, device=dy.device) if needs_dz and not identity else None
    if dz is None and not needs_b:
        return dy, None
    tile = configs.linear_dz_tile(dy.dtype, N)
    strips = triton.cdiv(M, tile.rows)
    partial = torch.empty((strips, N), dtype=torch.float32, device=dy.device) if needs_b else None
    launch(
        _linear_dz_kernel,
        (strips, triton.cdiv(N, tile.block_n)),
        dy,
        saved,
        dz,
        partial,
        M,
        N,
        *dy.stride(),
        negative_slope,
        GRADIENT=lookup(activation).gradient,
        ROWS=tile.rows,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    db = None
    if partial is not None:
        db = torch.empty((N,), dtype=dy.dtype, device=dy.device)
        launch(
            _column_sum_kernel,
            (triton.cdiv(N, 32),),
            partial,
            db,
            strips,
            N,
            BLOCK_S=32,
            BLOCK_N=32,
            num_warps=4,
        )
    return (dy if dz is None else dz), db
