"""Softmax, log-softmax and log-sum-exp over the rows of [N, C].

    softmax:      y_j = exp(x_j - m) / s            dx_j = y_j (dy_j - sum_k dy_k y_k)
    log_softmax:  y_j = x_j - m - log s             dx_j = dy_j - exp(y_j) sum_k dy_k
    logsumexp:    l = m + log s                     dx_j = dl exp(x_j - m) / s

with m = max_j x_j and s = sum_j exp(x_j - m). A row that fits the registers of one program is read once and written once,
forward and backward; a longer one is read twice, the second time from L2, where the rows in flight stay. The running maximum
and sum of such a row are kept per lane, so that no thread waits for another before the end of it.
"""

from __future__ import annotations

import torch

from . import configs, tuning
from ._triton import _cast, launch, tl, triton

__all__ = ["logsumexp_bwd", "logsumexp_fwd", "softmax_bwd", "softmax_fwd"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Finite: a lane that saw only -inf then adds exp(-inf - LOWEST) = 0 and not exp(-inf + inf) = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _whole_vectors(n, VECTOR: tl.constexpr):
    """n, a multiple of VECTOR, in a way that shows the compiler: a mask below it never cuts a 128-bit vector."""
    return n // VECTOR * VECTOR


@triton.jit
def _row_statistics(
    x_rows, mask_m, C, BLOCK_M: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVICT: tl.constexpr
):
    """Each row's m and s, from one read of it."""
    tile = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    m = tl.full((BLOCK_M, LANES), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_M, LANES), tl.float32)
    for start in range(0, C, LANES * VECTOR):
        cols = start + tile
        mask = mask_m[:, None, None] & (cols < C)
        x = tl.load(x_rows[:, None, None] + cols, mask=mask, other=float("-inf"), eviction_policy=EVICT)
        x = x.to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 2))
        s = s * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new[:, :, None]) * LOG2E), 2)
        m = m_new
    top = tl.max(m, 1)
    return top, tl.sum(s * tl.exp2((m - top[:, None]) * LOG2E), 1)


@triton.jit(do_not_specialize=["N"])
def _softmax_fwd_kernel(
    x_ptr,  # [N, C]
    y_ptr,  # [N, C]
    N,
    C,
    stride_xn,
    LOG: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if ALIGNED:
        C = _whole_vectors(C, VECTOR)
        stride_xn = _whole_vectors(stride_xn, VECTOR)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < N
    x_rows = x_ptr + rows * stride_xn
    y_rows = y_ptr + rows * C
    tile = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    if WHOLE:
        mask = mask_m[:, None, None] & (tile < C)
        x = tl.load(x_rows[:, None, None] + tile, mask=mask, other=float("-inf"))
        d = x.to(tl.float32)
        d = d - tl.max(tl.max(d, 2), 1)[:, None, None]
        if LOG:
            y = d - (tl.log2(tl.sum(tl.sum(tl.exp2(d * LOG2E), 2), 1)) * LN2)[:, None, None]
        else:
            y = tl.exp2(d * LOG2E)
            y = y * (1.0 / tl.sum(tl.sum(y, 2), 1))[:, None, None]
        tl.store(y_rows[:, None, None] + tile, _cast(y, y_ptr.dtype.element_ty), mask=mask)
    else:
        m, s = _row_statistics(x_rows, mask_m, C, BLOCK_M, LANES, VECTOR, "evict_last")
        log_s = (tl.log2(s) * LN2)[:, None, None]
        scale = (1.0 / s)[:, None, None]
        for start in range(0, C, LANES * VECTOR):
            cols = start + tile
            mask = mask_m[:, None, None] & (cols < C)
            x = tl.load(
                x_rows[:, None, None] + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first"
            )
            d = x.to(tl.float32) - m[:, None, None]
            if LOG:
                y = d - log_s
            else:
                y = tl.exp2(d * LOG2E) * scale
            out = y_rows[:, None, None] + cols
            tl.store(out, _cast(y, y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _softmax_gradient(dy, y, total, LOG: tl.constexpr):
    if LOG:
        return dy - tl.exp2(y * LOG2E) * total
    else:
        return y * (dy - total)


@triton.jit(do_not_specialize=["N"])
def _softmax_bwd_kernel(
    dy_ptr,  # [N, C], any strides
    y_ptr,  # [N, C]
    dx_ptr,  # [N, C]
    N,
    C,
    stride_dyn,
    stride_dyc,
    LOG: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if ALIGNED:
        C = _whole_vectors(C, VECTOR)
        stride_dyn = _whole_vectors(stride_dyn, VECTOR)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < N
    dy_rows = (dy_ptr + rows * stride_dyn)[:, None, None]
    y_rows = (y_ptr + rows * C)[:, None, None]
    dx_rows = (dx_ptr + rows * C)[:, None, None]
    tile = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    if WHOLE:
        mask = mask_m[:, None, None] & (tile < C)
        dy = tl.load(dy_rows + tile.to(tl.int64) * stride_dyc, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_rows + tile, mask=mask, other=0.0).to(tl.float32)
        if LOG:
            total = tl.sum(tl.sum(dy, 2), 1)
        else:
            total = tl.sum(tl.sum(dy * y, 2), 1)
        dx = _softmax_gradient(dy, y, total[:, None, None], LOG)
        tl.store(dx_rows + tile, _cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros((BLOCK_M, LANES), tl.float32)
        for start in range(0, C, LANES * VECTOR):
            cols = start + tile
            mask = mask_m[:, None, None] & (cols < C)
            dy = tl.load(
                dy_rows + cols.to(tl.int64) * stride_dyc, mask=mask, other=0.0, eviction_policy="evict_last"
            ).to(tl.float32)
            if not LOG:
                y = tl.load(y_rows + cols, mask=mask, other=0.0, eviction_policy="evict_last")
                dy *= y.to(tl.float32)
            sums += tl.sum(dy, 2)
        total = tl.sum(sums, 1)[:, None, None]
        for start in range(0, C, LANES * VECTOR):
            cols = start + tile
            mask = mask_m[:, None, None] & (cols < C)
            dy = tl.load(
                dy_rows + cols.to(tl.int64) * stride_dyc, mask=mask, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
            y = tl.load(y_rows + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            dx = _softmax_gradient(dy, y, total, LOG)
            tl.store(
                dx_rows + cols, _cast(dx, dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
            )


@triton.jit(do_not_specialize=["N"])
def _logsumexp_fwd_kernel(
    x_ptr,  # [N, C]
    lse_ptr,  # [N]
    stats_ptr,  # [2, N] float32: m, s
    N,
    C,
    stride_xn,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if ALIGNED:
        C = _whole_vectors(C, VECTOR)
        stride_xn = _whole_vectors(stride_xn, VECTOR)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < N
    m, s = _row_statistics(x_ptr + rows * stride_xn, mask_m, C, BLOCK_M, LANES, VECTOR, "evict_first")
    # An infinite logit's exponential is infinite, and not exp(inf - inf) = NaN; the others' shares are then 0.
    infinite = m == float("inf")
    s = tl.where(infinite, m, s)
    m = tl.where(infinite, 0.0, m)
    lse = m + tl.log2(s) * LN2
    tl.store(lse_ptr + rows, _cast(lse, lse_ptr.dtype.element_ty), mask=mask_m)
    tl.store(stats_ptr + rows, m, mask=mask_m)
    tl.store(stats_ptr + N + rows, s, mask=mask_m)


@triton.jit(do_not_specialize=["N"])
def _logsumexp_bwd_kernel(
    dlse_ptr,  # [N], any stride
    x_ptr,  # [N, C]
    stats_ptr,  # [2, N] float32: m, s
    dx_ptr,  # [N, C]
    N,
    C,
    stride_dlse,
    stride_xn,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if ALIGNED:
        C = _whole_vectors(C, VECTOR)
        stride_xn = _whole_vectors(stride_xn, VECTOR)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < N
    g = tl.load(dlse_ptr + rows * stride_dlse, mask=mask_m, other=0.0).to(tl.float32)
    m = tl.load(stats_ptr + rows, mask=mask_m, other=0.0)
    s = tl.load(stats_ptr + N + rows, mask=mask_m, other=1.0)
    tile = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    cols = tl.program_id(1) * (LANES * VECTOR) + tile
    mask = mask_m[:, None, None] & (cols < C)
    x_rows = (x_ptr + rows * stride_xn)[:, None, None]
    x = tl.load(x_rows + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    p = tl.exp2((x - m[:, None, None]) * LOG2E) * (1.0 / s)[:, None, None]
    dx = g[:, None, None] * p
    out = (dx_ptr + rows * C)[:, None, None] + cols
    tl.store(out, _cast(dx, dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [rows, C] with columns side by side; rows may lie anywhere."""
    C = x.shape[-1]
    if C > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), C)


def _aligned(x: torch.Tensor, vector: int) -> bool:
    """Whether every row of x starts on a boundary of `vector` elements and is made of whole vectors."""
    return x.shape[1] % vector == 0 and x.stride(0) % vector == 0


def softmax_fwd(x: torch.Tensor, log: bool) -> torch.Tensor:
    """y, contiguous, of x [..., C], in one launch. Bytes, with b those of an element: 2 b N C; where a tile holds no whole row
    (configs.softmax_tile) 3 b N C are requested."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = _rows(x)
    N, C = x.shape
    tile = tuning.tile(x.device, configs.softmax_tile, x.dtype, C, False, _aligned(x, 16 // x.element_size()))
    launch(
        _softmax_fwd_kernel,
        (triton.cdiv(N, tile.block_m),),
        x,
        y,
        N,
        C,
        x.stride(0),
        LOG=log,
        WHOLE=tile.lanes * tile.vector >= C,
        ALIGNED=_aligned(x, tile.vector),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return y


def softmax_bwd(dy: torch.Tensor, y: torch.Tensor, log: bool) -> torch.Tensor:
    """dx, contiguous, from dy [..., C] of any strides and y [..., C], in one launch. Bytes, with b those of an element:
    3 b N C; where a tile holds no whole row 5 b N C are requested, for log-softmax, whose sum does not need y, 4 b N C."""
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not dx.numel():
        return dx
    C = y.shape[-1]
    y = y.contiguous()
    dy = dy.reshape(-1, C)
    N = dy.shape[0]
    aligned = _aligned(dy, 16 // y.element_size())
    tile = tuning.tile(y.device, configs.softmax_tile, y.dtype, C, True, aligned)
    launch(
        _softmax_bwd_kernel,
        (triton.cdiv(N, tile.block_m),),
        dy,
        y,
        dx,
        N,
        C,
        *dy.stride(),
        LOG=log,
        WHOLE=tile.lanes * tile.vector >= C,
        ALIGNED=_aligned(dy, tile.vector),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return dx


def logsumexp_fwd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse [...], stats [2, N]) of x [..., C], in one launch. Bytes, with b those of an element: b N C + (8 + b) N."""
    lse = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device)
    N, C = lse.numel(), x.shape[-1]
    stats = torch.empty((2, N), dtype=torch.float32, device=x.device)
    if C == 0:
        return lse.fill_(float("-inf")), stats.zero_()
    x = _rows(x)
    tile = tuning.tile(x.device, configs.logsumexp_tile, x.dtype, C)
    launch(
        _logsumexp_fwd_kernel,
        (triton.cdiv(N, tile.block_m),),
        x,
        lse,
        stats,
        N,
        C,
        x.stride(0),
        ALIGNED=_aligned(x, tile.vector),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return lse, stats


def logsumexp_bwd(dlse: torch.Tensor, x: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """dx, contiguous, from dlse [...] and x [..., C], in one launch: every program writes some rows' columns. Bytes,
    with b those of an element: 2 b N C + (8 + b) N; the (8 + b) N are requested by each of a row's programs."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx
    x = _rows(x)
    N, C = x.shape
    dlse = dlse.reshape(-1)
    tile = tuning.tile(x.device, configs.logsumexp_tile, x.dtype, C)
    launch(
        _logsumexp_bwd_kernel,
        (triton.cdiv(N, tile.block_m), triton.cdiv(C, tile.lanes * tile.vector)),
        dlse,
        x,
        stats,
        dx,
        N,
        C,
        dlse.stride(0),
        x.stride(0),
        ALIGNED=_aligned(x, tile.vector),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return dx
