"""Softmax cross-entropy over the rows of [N, C] logits: one read forward, one read and one write backward.

    loss_i = (1 - e) w_t (lse - x_t) + e / C sum_j w_j (lse - x_j),   lse = log sum_j exp x_j,   t = target_i
    dloss_i / dx_j = A p_j - (1 - e) w_t [j = t] - e / C w_j,   p_j = exp(x_j - lse),   A = (1 - e) w_t + e / C sum_j w_j

with e the label smoothing and w the class weights. Probabilities are never stored. Kept per row for backward is the
log-sum-exp in two parts, m = max_j x_j and s = sum_j exp(x_j - m): the rounding of a large lse would be an error of every
p_j, that of m cancels. The online softmax runs per lane, so that no thread waits for another before the end of a row.
"""

from __future__ import annotations

import torch

from . import configs
from ._triton import _cast, launch, tl, triton

__all__ = ["cross_entropy_bwd", "cross_entropy_fwd"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Finite: a lane that saw only -inf then adds exp(-inf - LOWEST) = 0 and not exp(-inf + inf) = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
NAN = tl.constexpr(float("nan"))


@triton.jit
def _rows(target_ptr, weight_ptr, N, C, ignore_index, smoothing, BLOCK_M: tl.constexpr):
    """Row numbers, their targets (0 where none is readable), which rows count, whose target is a class, (1 - e) w_t."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
    live = (rows < N) & (target != ignore_index)
    valid = live & (target >= 0) & (target < C)
    target = tl.where(valid, target, 0)
    coefficient = tl.where(valid, 1.0 - smoothing, NAN)
    if weight_ptr is not None:
        coefficient *= tl.load(weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    return rows, target, live, valid, coefficient


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64
    weight_ptr,  # [C] or None
    weight_sum_ptr,  # [1] float32, or None where weight or smoothing is
    loss_ptr,  # [N]
    stats_ptr,  # [2, N] float32: m, s
    N,
    C,
    stride_xn,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    rows, target, live, valid, coefficient = _rows(
        target_ptr, weight_ptr, N, C, ignore_index, smoothing, BLOCK_M
    )
    x_rows = x_ptr + rows * stride_xn
    x_target = tl.load(x_rows + target, mask=valid, other=NAN).to(tl.float32)
    # Smoothing sums w_j (x_j - x_t): around a typical logit, where w_j x_j would cancel against a large lse.
    origin = tl.where((x_target - x_target) == 0, x_target, 0.0)

    tile = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    m = tl.full((BLOCK_M, LANES), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_M, LANES), tl.float32)
    a = tl.zeros((BLOCK_M, LANES), tl.float32)
    for start in range(0, C, LANES * VECTOR):
        cols = start + tile
        # An ignored row is not read.
        mask = live[:, None, None] & (cols < C)
        x = tl.load(
            x_rows[:, None, None] + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first"
        )
        x = x.to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 2))
        s = s * tl.exp2((m - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new[:, :, None]) * LOG2E), 2)
        m = m_new
        if SMOOTH:
            d = x - origin[:, None, None]
            if weight_ptr is not None:
                d *= tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
            a += tl.sum(tl.where(mask, d, 0.0), 2)

    top = tl.max(m, 1)
    total = tl.sum(s * tl.exp2((m - top[:, None]) * LOG2E), 1)
    log_total = tl.log2(total) * LN2
    loss = coefficient * (log_total - (x_target - top))
    if SMOOTH:
        weight_sum = tl.load(weight_sum_ptr) if weight_sum_ptr is not None else tl.cast(C, tl.float32)
        loss += smoothing / C * (weight_sum * (log_total - (origin - top)) - tl.sum(a, 1))
    loss = tl.where(live, loss, 0.0)
    tl.store(loss_ptr + rows, _cast(loss, loss_ptr.dtype.element_ty), mask=rows < N)
    tl.store(stats_ptr + rows, top, mask=rows < N)
    tl.store(stats_ptr + N + rows, total, mask=rows < N)


@triton.jit(do_not_specialize=["N", "C", "ignore_index"])
def _cross_entropy_reduce_kernel(
    losses_ptr,  # [N] float32
    target_ptr,  # [N] int64
    weight_ptr,  # [C] or None
    loss_ptr,  # [1]
    denominator_ptr,  # [1] float32
    N,
    C,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program and so a fixed order: the same bits every time."""
    loss = tl.zeros((BLOCK,), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
        live = (rows < N) & (target != ignore_index)
        if weight_ptr is not None:
            known = live & (target >= 0) & (target < C)
            denominator += tl.load(weight_ptr + target, mask=known, other=0.0).to(tl.float32)
        else:
            denominator += tl.where(live, 1.0, 0.0)
        loss += tl.load(losses_ptr + rows, mask=rows < N, other=0.0)
    result = tl.sum(loss, 0)
    total = tl.sum(denominator, 0)
    if MEAN:
        result = result / total
    tl.store(loss_ptr, _cast(result, loss_ptr.dtype.element_ty))
    tl.store(denominator_ptr, total)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr,  # [N], or one value with stride 0
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64
    weight_ptr,  # [C] or None
    weight_sum_ptr,  # [1] float32, or None where weight or smoothing is
    stats_ptr,  # [2, N] float32: m, s
    denominator_ptr,  # [1] float32, or None where the reduction is no mean
    dx_ptr,  # [N, C]
    N,
    C,
    stride_xn,
    stride_dloss,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    rows, target, live, _, coefficient = _rows(target_ptr, weight_ptr, N, C, ignore_index, smoothing, BLOCK_M)
    g = tl.load(dloss_ptr + rows * stride_dloss, mask=rows < N, other=0.0).to(tl.float32)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr)
    g = tl.where(live, g, 0.0)
    hit = tl.where(live, g * coefficient, 0.0)
    m = tl.load(stats_ptr + rows, mask=rows < N, other=0.0)
    s = tl.load(stats_ptr + N + rows, mask=rows < N, other=1.0)
    scale = hit
    uniform = g * smoothing / C
    if SMOOTH:
        weight_sum = tl.load(weight_sum_ptr) if weight_sum_ptr is not None else tl.cast(C, tl.float32)
        scale += uniform * weight_sum
    scale = tl.where(live, scale / s, 0.0)

    tile = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    cols = tl.program_id(1) * (LANES * VECTOR) + tile
    mask = live[:, None, None] & (cols < C)
    x_rows = x_ptr + rows * stride_xn
    x = tl.load(x_rows[:, None, None] + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first")
    d = tl.exp2((x.to(tl.float32) - m[:, None, None]) * LOG2E) * scale[:, None, None]
    if SMOOTH:
        if weight_ptr is not None:
            w = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
            d -= uniform[:, None, None] * w
        else:
            d -= uniform[:, None, None]
    d = tl.where(cols == target[:, None, None], d - hit[:, None, None], d)
    # Zero, whatever the logits of an ignored row are; its exp(-inf - m) times 0 is NaN where m is LOWEST.
    d = tl.where(live[:, None, None], d, 0.0)
    out = dx_ptr + rows[:, None, None] * C + cols
    tl.store(
        out,
        _cast(d, dx_ptr.dtype.element_ty),
        mask=(rows < N)[:, None, None] & (cols < C),
        eviction_policy="evict_first",
    )


def _weight_sum(weight: torch.Tensor | None, label_smoothing: float) -> torch.Tensor | None:
    return weight.sum(dtype=torch.float32) if weight is not None and label_smoothing else None


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    """x itself where its columns lie side by side; rows may lie anywhere."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def cross_entropy_fwd(
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor | None,  # [C]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss, stats [2, N], denominator [1], None for "none"): one launch, and a small one that reduces over the rows."""
    N, C = x.shape
    x, target = _unit_columns(x), target.contiguous()
    weight = weight.contiguous() if weight is not None else None
    reduced = reduction != "none"
    losses = torch.empty(N, dtype=torch.float32 if reduced else x.dtype, device=x.device)
    stats = torch.empty((2, N), dtype=torch.float32, device=x.device)
    tile = configs.cross_entropy_tile(x.dtype, C)
    launch(
        _cross_entropy_fwd_kernel,
        (triton.cdiv(N, tile.block_m),),
        x,
        target,
        weight,
        _weight_sum(weight, label_smoothing),
        losses,
        stats,
        N,
        C,
        x.stride(0),
        ignore_index,
        label_smoothing,
        SMOOTH=bool(label_smoothing),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    if not reduced:
        return losses, stats, None
    loss = torch.empty((), dtype=x.dtype, device=x.device)
    denominator = torch.empty(1, dtype=torch.float32, device=x.device)
    launch(
        _cross_entropy_reduce_kernel,
        (1,),
        losses,
        target,
        weight,
        loss,
        denominator,
        N,
        C,
        ignore_index,
        MEAN=reduction == "mean",
        BLOCK=1024,
        num_warps=8,
    )
    return loss, stats, denominator


def cross_entropy_bwd(
    dloss: torch.Tensor,  # [N] or []
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor | None,  # [C]
    stats: torch.Tensor,  # [2, N]
    denominator: torch.Tensor | None,  # [1]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """dx [N, C], contiguous, in one launch: every program writes some rows' columns."""
    N, C = x.shape
    x, target = _unit_columns(x), target.contiguous()
    weight = weight.contiguous() if weight is not None else None
    dx = torch.empty((N, C), dtype=x.dtype, device=x.device)
    tile = configs.cross_entropy_tile(x.dtype, C)
    launch(
        _cross_entropy_bwd_kernel,
        (triton.cdiv(N, tile.block_m), triton.cdiv(C, tile.lanes * tile.vector)),
        dloss,
        x,
        target,
        weight,
        _weight_sum(weight, label_smoothing),
        stats,
        denominator if reduction == "mean" else None,
        dx,
        N,
        C,
        x.stride(0),
        dloss.stride(0) if dloss.dim() else 0,
        ignore_index,
        label_smoothing,
        SMOOTH=bool(label_smoothing),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return dx
