"""Batch norm over the channels of [N, C, L], with an activation after it.

    xhat = (x - mean) rstd,  z = xhat w + b,  y = act(z),  rstd = 1 / sqrt(var + eps)
    dz = dy act'(z),  dw = sum dz xhat,  db = sum dz
    training:    mean and var are the channel's own,  dx = w rstd (dz - db / M - xhat dw / M),  M = N L positions
    evaluation:  mean and var are given,              dx = w rstd dz

Nothing as large as x is saved: backward recomputes z, so that it reads x and dy alone. A batch of up to
`configs.BATCH_NORM_SMALL` positions takes one launch each way: a program sees to some channels whole. A larger one takes
three: statistics (or sums) of strips of positions, their combination in a fixed order, and the result. The statistics are
Welford's recurrence in each lane and Chan's combination of lanes and strips, on distances from the channel's first value: at a
large mean nothing cancels, and no digits are lost.

Tiles are positions x channels where L = 1 (AXIS, the positions' axis, is 0), channels x positions else: what is contiguous in
memory comes last.
"""

from __future__ import annotations

from typing import Any

import torch

from . import configs
from ._triton import _cast, device_limits, launch, tl, triton
from .activations import lookup, saved_for_backward
from .layer_norm import _whole_vectors, parameter_gradients

__all__ = ["batch_norm_bwd", "batch_norm_eval_fwd", "batch_norm_fwd"]


@triton.jit
def _addresses(
    ptr, start, offs_m, cols, L, stride_n, stride_c, stride_l, AXIS: tl.constexpr, VECTOR: tl.constexpr
):
    """Of the elements at positions start + offs_m of the channels cols."""
    if AXIS == 0:
        offs = (start + offs_m) * stride_n
    else:
        # The division of each vector of positions is of 32 bits, that of the first position of one number; and the compiler
        # learns that a vector is contiguous.
        q = (tl.cast(start % L, tl.int32) + offs_m) // VECTOR
        lines = L // VECTOR
        head = (start // L + q // lines) * stride_n + q % lines * VECTOR * stride_l
        offs = tl.max_constancy(head, VECTOR) + offs_m % VECTOR * stride_l
    return ptr + tl.expand_dims(offs, 1 - AXIS) + tl.expand_dims(cols.to(tl.int64) * stride_c, AXIS)


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, AXIS: tl.constexpr):
    if AXIS == 0:
        return tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    else:
        return tl.zeros((BLOCK_C, BLOCK_M), tl.float32)


@triton.jit
def _channel(ptr, cols, mask_c, AXIS: tl.constexpr, DEFAULT: tl.constexpr):
    """A number of each channel, as a tile broadcasts it; DEFAULT without a pointer."""
    if ptr is None:
        return tl.full((1, 1), DEFAULT, tl.float32)
    else:
        return tl.expand_dims(tl.load(ptr + cols, mask=mask_c, other=0.0).to(tl.float32), AXIS)


@triton.jit
def _pivot(x_ptr, cols, mask_c, stride_xc):
    """The first value of each channel: at a large mean the distances from it have more digits than the values."""
    return tl.load(x_ptr + cols.to(tl.int64) * stride_xc, mask=mask_c, other=0.0).to(tl.float32)


@triton.jit
def _statistics(
    x_ptr,
    pivot,
    cols,
    mask_c,
    first,
    stop,
    L,
    stride_xn,
    stride_xc,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Of the distances from pivot of each channel's values at the positions first..stop: the mean, and the sum of squared
    distances from that."""
    offs_m = tl.arange(0, BLOCK_M)
    pivot = tl.expand_dims(pivot, AXIS)
    means = _zeros(BLOCK_M, BLOCK_C, AXIS)
    squares = _zeros(BLOCK_M, BLOCK_C, AXIS)
    for start in range(first, stop, BLOCK_M):
        inside = tl.expand_dims(start + offs_m < stop, 1 - AXIS)
        at = _addresses(x_ptr, start, offs_m, cols, L, stride_xn, stride_xc, 1, AXIS, VECTOR)
        mask = inside & tl.expand_dims(mask_c, AXIS)
        x = tl.load(at, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32) - pivot
        d = tl.where(inside, x - means, 0.0)
        means += d * (1.0 / ((start - first) // BLOCK_M + 1).to(tl.float32))
        squares += d * (x - means)
    # How many positions each lane has seen.
    count = tl.maximum((stop - first - offs_m + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)
    count = tl.expand_dims(count, 1 - AXIS)
    mean = tl.sum(means * count, AXIS) / (stop - first).to(tl.float32)
    d = means - tl.expand_dims(mean, AXIS)
    return mean, tl.sum(squares + d * d * count, AXIS)


@triton.jit
def _finish(
    mean,
    square,
    cols,
    mask_c,
    stats_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    M,
    C,
    eps,
    momentum,
):
    """rstd; keeps the statistics, and moves the running ones towards them."""
    n = tl.cast(M, tl.float32)
    rstd = tl.rsqrt(square / n + eps)
    if stats_ptr is not None:
        tl.store(stats_ptr + cols, rstd, mask=mask_c)
        tl.store(stats_ptr + C + cols, mean, mask=mask_c)
    share = momentum
    if batches_ptr is not None:
        share = 1.0 / tl.load(batches_ptr).to(tl.float32)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
        new = old * (1.0 - share) + mean * share
        tl.store(running_mean_ptr + cols, _cast(new, running_mean_ptr.dtype.element_ty), mask=mask_c)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
        new = old * (1.0 - share) + square / (n - 1.0) * share
        tl.store(running_var_ptr + cols, _cast(new, running_var_ptr.dtype.element_ty), mask=mask_c)
    return rstd


@triton.jit
def _apply(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    mean,
    rstd,
    cols,
    mask_c,
    first,
    stop,
    C,
    L,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    w = _channel(w_ptr, cols, mask_c, AXIS, 1.0)
    b = _channel(b_ptr, cols, mask_c, AXIS, 0.0)
    mean = tl.expand_dims(mean, AXIS)
    rstd = tl.expand_dims(rstd, AXIS)
    for start in range(first, stop, BLOCK_M):
        mask = tl.expand_dims(start + offs_m < stop, 1 - AXIS) & tl.expand_dims(mask_c, AXIS)
        at = _addresses(x_ptr, start, offs_m, cols, L, stride_xn, stride_xc, 1, AXIS, VECTOR)
        x = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = ACT((x - mean) * rstd * w + b, slope)
        out = _addresses(y_ptr, start, offs_m, cols, L, tl.cast(C, tl.int64) * L, L, 1, AXIS, VECTOR)
        tl.store(out, _cast(y, y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _dz_and_xhat(
    dy_ptr,
    x_ptr,
    w,
    b,
    mean,
    rstd,
    cols,
    mask,
    start,
    offs_m,
    L,
    stride_dyn,
    stride_dyc,
    stride_dyl,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    EVICT: tl.constexpr,
):
    """(dz, xhat) of a tile. ACT maps z to what GRADIENT takes: the identity where that is z."""
    at = _addresses(dy_ptr, start, offs_m, cols, L, stride_dyn, stride_dyc, stride_dyl, AXIS, VECTOR)
    dy = tl.load(at, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    at = _addresses(x_ptr, start, offs_m, cols, L, stride_xn, stride_xc, 1, AXIS, VECTOR)
    x = tl.load(at, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    xhat = (x - mean) * rstd
    return GRADIENT(dy, ACT(xhat * w + b, slope), slope), xhat


@triton.jit
def _sums(
    dy_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    dx_ptr,
    mean,
    rstd,
    cols,
    mask_c,
    first,
    stop,
    C,
    L,
    stride_dyn,
    stride_dyc,
    stride_dyl,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Each channel's sums of dz xhat and of dz over the positions first..stop; writes evaluation's dx on the way, if given."""
    offs_m = tl.arange(0, BLOCK_M)
    w = _channel(w_ptr, cols, mask_c, AXIS, 1.0)
    b = _channel(b_ptr, cols, mask_c, AXIS, 0.0)
    mean = tl.expand_dims(mean, AXIS)
    rstd = tl.expand_dims(rstd, AXIS)
    dw = _zeros(BLOCK_M, BLOCK_C, AXIS)
    db = _zeros(BLOCK_M, BLOCK_C, AXIS)
    for start in range(first, stop, BLOCK_M):
        inside = tl.expand_dims(start + offs_m < stop, 1 - AXIS)
        mask = inside & tl.expand_dims(mask_c, AXIS)
        dz, xhat = _dz_and_xhat(
            dy_ptr,
            x_ptr,
            w,
            b,
            mean,
            rstd,
            cols,
            mask,
            start,
            offs_m,
            L,
            stride_dyn,
            stride_dyc,
            stride_dyl,
            stride_xn,
            stride_xc,
            slope,
            ACT,
            GRADIENT,
            AXIS,
            VECTOR,
            EVICT,
        )
        # Behind the last position xhat is -mean rstd, which may be infinite.
        dw += tl.where(inside, dz * xhat, 0.0)
        db += dz
        if dx_ptr is not None:
            out = _addresses(dx_ptr, start, offs_m, cols, L, tl.cast(C, tl.int64) * L, L, 1, AXIS, VECTOR)
            dx = _cast(dz * w * rstd, dx_ptr.dtype.element_ty)
            tl.store(out, dx, mask=mask, eviction_policy="evict_first")
    return tl.sum(dw, AXIS), tl.sum(db, AXIS)


@triton.jit
def _dx(
    dy_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    dx_ptr,
    mean,
    rstd,
    dw,
    db,
    cols,
    mask_c,
    first,
    stop,
    M,
    C,
    L,
    stride_dyn,
    stride_dyc,
    stride_dyl,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Training's dx at the positions first..stop."""
    offs_m = tl.arange(0, BLOCK_M)
    w = _channel(w_ptr, cols, mask_c, AXIS, 1.0)
    b = _channel(b_ptr, cols, mask_c, AXIS, 0.0)
    mean = tl.expand_dims(mean, AXIS)
    rstd = tl.expand_dims(rstd, AXIS)
    n = tl.cast(M, tl.float32)
    dw = tl.expand_dims(dw / n, AXIS)
    db = tl.expand_dims(db / n, AXIS)
    for start in range(first, stop, BLOCK_M):
        mask = tl.expand_dims(start + offs_m < stop, 1 - AXIS) & tl.expand_dims(mask_c, AXIS)
        dz, xhat = _dz_and_xhat(
            dy_ptr,
            x_ptr,
            w,
            b,
            mean,
            rstd,
            cols,
            mask,
            start,
            offs_m,
            L,
            stride_dyn,
            stride_dyc,
            stride_dyl,
            stride_xn,
            stride_xc,
            slope,
            ACT,
            GRADIENT,
            AXIS,
            VECTOR,
            "evict_first",
        )
        dx = (dz - db - xhat * dw) * (w * rstd)
        out = _addresses(dx_ptr, start, offs_m, cols, L, tl.cast(C, tl.int64) * L, L, 1, AXIS, VECTOR)
        tl.store(out, _cast(dx, dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["M", "strip"])
def _batch_norm_statistics_kernel(
    x_ptr,  # [N, C, L]
    mean_ptr,  # [S, C] float32: each strip's mean, less the channel's first value
    square_ptr,  # [S, C] float32: and its sum of squared distances from the mean
    M,
    C,
    L,
    strip,
    stride_xn,
    stride_xc,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, L, M, stride_xn, stride_xc = _aligned_sizes(C, L, M, stride_xn, stride_xc, AXIS, VECTOR)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    strip = _whole_vectors(strip, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * strip
    stop = _whole_vectors(tl.minimum(first + strip, M), VECTOR if AXIS == 1 else 1)
    mean, square = _statistics(
        x_ptr,
        _pivot(x_ptr, cols, cols < C, stride_xc),
        cols,
        cols < C,
        first,
        stop,
        L,
        stride_xn,
        stride_xc,
        AXIS,
        VECTOR,
        BLOCK_M,
        BLOCK_C,
        "evict_last",
    )
    out = tl.program_id(0).to(tl.int64) * C + cols
    tl.store(mean_ptr + out, mean, mask=cols < C)
    tl.store(square_ptr + out, square, mask=cols < C)


@triton.jit
def _aligned_sizes(C, L, M, stride_n, stride_c, AXIS: tl.constexpr, VECTOR: tl.constexpr):
    """The same sizes, which show the compiler that vectors of what is contiguous are whole."""
    stride_n = _whole_vectors(stride_n, VECTOR)
    if AXIS == 0:
        return _whole_vectors(C, VECTOR), L, M, stride_n, stride_c
    else:
        return (
            C,
            _whole_vectors(L, VECTOR),
            _whole_vectors(M, VECTOR),
            stride_n,
            _whole_vectors(stride_c, VECTOR),
        )


@triton.jit(do_not_specialize=["M", "strip", "S"])
def _batch_norm_finish_kernel(
    x_ptr,  # [N, C, L]
    mean_ptr,  # [S, C] float32: each strip's mean, less the channel's first value
    square_ptr,  # [S, C] float32: and its sum of squared distances from the mean
    stats_ptr,  # [2, C] float32: rstd, mean
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    batches_ptr,  # [] int64: the running statistics are averages over so many batches; or None
    M,
    C,
    S,
    strip,
    stride_xc,
    eps,
    momentum,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_S)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    means = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = (start + offs_s).to(tl.int64)
        mask = (rows < S)[:, None] & mask_c[None, :]
        count = tl.minimum(M - rows * strip, strip).to(tl.float32)[:, None]
        means += tl.load(mean_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0) * count
    mean = tl.sum(means, 0) / tl.cast(M, tl.float32)
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = (start + offs_s).to(tl.int64)
        mask = (rows < S)[:, None] & mask_c[None, :]
        count = tl.minimum(M - rows * strip, strip).to(tl.float32)[:, None]
        d = tl.load(mean_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0) - mean[None, :]
        squares += tl.load(square_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0)
        squares += tl.where((rows < S)[:, None], d * d * count, 0.0)
    _finish(
        mean + _pivot(x_ptr, cols, mask_c, stride_xc),
        tl.sum(squares, 0),
        cols,
        mask_c,
        stats_ptr,
        running_mean_ptr,
        running_var_ptr,
        batches_ptr,
        M,
        C,
        eps,
        momentum,
    )


@triton.jit(do_not_specialize=["M", "strip"])
def _batch_norm_apply_kernel(
    x_ptr,  # [N, C, L]
    w_ptr,  # [C] or None
    b_ptr,  # [C] or None
    mean_ptr,  # [C]
    var_ptr,  # [C]: rstd in training, the variance in evaluation
    stats_ptr,  # [2, C] float32: rstd and mean are kept here; or None
    y_ptr,  # [N, C, L]
    M,
    C,
    L,
    strip,
    stride_xn,
    stride_xc,
    eps,
    slope,
    TRAINING: tl.constexpr,
    ACT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, L, M, stride_xn, stride_xc = _aligned_sizes(C, L, M, stride_xn, stride_xc, AXIS, VECTOR)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    strip = _whole_vectors(strip, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * strip
    stop = _whole_vectors(tl.minimum(first + strip, M), VECTOR if AXIS == 1 else 1)
    mean = tl.load(mean_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
    rstd = tl.load(var_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
    if not TRAINING:
        rstd = tl.rsqrt(rstd + eps)
        if stats_ptr is not None and tl.program_id(0) == 0:
            tl.store(stats_ptr + cols, rstd, mask=mask_c)
            tl.store(stats_ptr + C + cols, mean, mask=mask_c)
    _apply(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        mean,
        rstd,
        cols,
        mask_c,
        first,
        stop,
        C,
        L,
        stride_xn,
        stride_xc,
        slope,
        ACT,
        AXIS,
        VECTOR,
        BLOCK_M,
    )


@triton.jit(do_not_specialize=["M"])
def _batch_norm_small_fwd_kernel(
    x_ptr,  # [N, C, L]
    w_ptr,  # [C] or None
    b_ptr,  # [C] or None
    stats_ptr,  # [2, C] float32: rstd and mean are kept here; or None
    running_mean_ptr,  # [C] or None
    running_var_ptr,  # [C] or None
    batches_ptr,  # [] int64 or None
    y_ptr,  # [N, C, L]
    M,
    C,
    L,
    stride_xn,
    stride_xc,
    eps,
    momentum,
    slope,
    ACT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, L, M, stride_xn, stride_xc = _aligned_sizes(C, L, M, stride_xn, stride_xc, AXIS, VECTOR)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    first = tl.cast(0, tl.int64)
    stop = _whole_vectors(tl.cast(M, tl.int64), VECTOR if AXIS == 1 else 1)
    pivot = _pivot(x_ptr, cols, mask_c, stride_xc)
    mean, square = _statistics(
        x_ptr,
        pivot,
        cols,
        mask_c,
        first,
        stop,
        L,
        stride_xn,
        stride_xc,
        AXIS,
        VECTOR,
        BLOCK_M,
        BLOCK_C,
        "evict_last",
    )
    mean += pivot
    rstd = _finish(
        mean,
        square,
        cols,
        mask_c,
        stats_ptr,
        running_mean_ptr,
        running_var_ptr,
        batches_ptr,
        M,
        C,
        eps,
        momentum,
    )
    _apply(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        mean,
        rstd,
        cols,
        mask_c,
        first,
        stop,
        C,
        L,
        stride_xn,
        stride_xc,
        slope,
        ACT,
        AXIS,
        VECTOR,
        BLOCK_M,
    )


@triton.jit(do_not_specialize=["M", "strip"])
def _batch_norm_sums_kernel(
    dy_ptr,  # [N, C, L], any strides
    x_ptr,  # [N, C, L]
    w_ptr,  # [C] or None
    b_ptr,  # [C] or None
    stats_ptr,  # [2, C] float32: rstd, mean
    dx_ptr,  # [N, C, L]: evaluation's; or None
    dw_ptr,  # [S, C] float32: each strip's sum of dz xhat; or None
    db_ptr,  # [S, C] float32: each strip's sum of dz; or None
    M,
    C,
    L,
    strip,
    stride_dyn,
    stride_dyc,
    stride_dyl,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, L, M, stride_xn, stride_xc = _aligned_sizes(C, L, M, stride_xn, stride_xc, AXIS, VECTOR)
    stride_dyn = _whole_vectors(stride_dyn, VECTOR)
    if AXIS == 1:
        stride_dyc = _whole_vectors(stride_dyc, VECTOR)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    strip = _whole_vectors(strip, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * strip
    stop = _whole_vectors(tl.minimum(first + strip, M), VECTOR if AXIS == 1 else 1)
    dw, db = _sums(
        dy_ptr,
        x_ptr,
        w_ptr,
        b_ptr,
        dx_ptr,
        tl.load(stats_ptr + C + cols, mask=mask_c, other=0.0),
        tl.load(stats_ptr + cols, mask=mask_c, other=0.0),
        cols,
        mask_c,
        first,
        stop,
        C,
        L,
        stride_dyn,
        stride_dyc,
        stride_dyl,
        stride_xn,
        stride_xc,
        slope,
        ACT,
        GRADIENT,
        AXIS,
        VECTOR,
        BLOCK_M,
        BLOCK_C,
        "evict_last",
    )
    out = tl.program_id(0).to(tl.int64) * C + cols
    if dw_ptr is not None:
        tl.store(dw_ptr + out, dw, mask=mask_c)
    if db_ptr is not None:
        tl.store(db_ptr + out, db, mask=mask_c)


@triton.jit(do_not_specialize=["M", "strip"])
def _batch_norm_dx_kernel(
    dy_ptr,  # [N, C, L], any strides
    x_ptr,  # [N, C, L]
    w_ptr,  # [C] or None
    b_ptr,  # [C] or None
    stats_ptr,  # [2, C] float32: rstd, mean
    dw_ptr,  # [C] float32
    db_ptr,  # [C] float32
    dx_ptr,  # [N, C, L]
    M,
    C,
    L,
    strip,
    stride_dyn,
    stride_dyc,
    stride_dyl,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, L, M, stride_xn, stride_xc = _aligned_sizes(C, L, M, stride_xn, stride_xc, AXIS, VECTOR)
    stride_dyn = _whole_vectors(stride_dyn, VECTOR)
    if AXIS == 1:
        stride_dyc = _whole_vectors(stride_dyc, VECTOR)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    strip = _whole_vectors(strip, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * strip
    stop = _whole_vectors(tl.minimum(first + strip, M), VECTOR if AXIS == 1 else 1)
    _dx(
        dy_ptr,
        x_ptr,
        w_ptr,
        b_ptr,
        dx_ptr,
        tl.load(stats_ptr + C + cols, mask=mask_c, other=0.0),
        tl.load(stats_ptr + cols, mask=mask_c, other=0.0),
        tl.load(dw_ptr + cols, mask=mask_c, other=0.0),
        tl.load(db_ptr + cols, mask=mask_c, other=0.0),
        cols,
        mask_c,
        first,
        stop,
        M,
        C,
        L,
        stride_dyn,
        stride_dyc,
        stride_dyl,
        stride_xn,
        stride_xc,
        slope,
        ACT,
        GRADIENT,
        AXIS,
        VECTOR,
        BLOCK_M,
    )


@triton.jit(do_not_specialize=["M"])
def _batch_norm_small_bwd_kernel(
    dy_ptr,  # [N, C, L], any strides
    x_ptr,  # [N, C, L]
    w_ptr,  # [C] or None
    b_ptr,  # [C] or None
    stats_ptr,  # [2, C] float32: rstd, mean
    dx_ptr,  # [N, C, L]
    dw_ptr,  # [C] or None
    db_ptr,  # [C] or None
    M,
    C,
    L,
    stride_dyn,
    stride_dyc,
    stride_dyl,
    stride_xn,
    stride_xc,
    slope,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    AXIS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C, L, M, stride_xn, stride_xc = _aligned_sizes(C, L, M, stride_xn, stride_xc, AXIS, VECTOR)
    stride_dyn = _whole_vectors(stride_dyn, VECTOR)
    if AXIS == 1:
        stride_dyc = _whole_vectors(stride_dyc, VECTOR)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    mean = tl.load(stats_ptr + C + cols, mask=mask_c, other=0.0)
    rstd = tl.load(stats_ptr + cols, mask=mask_c, other=0.0)
    first = tl.cast(0, tl.int64)
    stop = _whole_vectors(tl.cast(M, tl.int64), VECTOR if AXIS == 1 else 1)
    dw, db = _sums(
        dy_ptr,
        x_ptr,
        w_ptr,
        b_ptr,
        None,
        mean,
        rstd,
        cols,
        mask_c,
        first,
        stop,
        C,
        L,
        stride_dyn,
        stride_dyc,
        stride_dyl,
        stride_xn,
        stride_xc,
        slope,
        ACT,
        GRADIENT,
        AXIS,
        VECTOR,
        BLOCK_M,
        BLOCK_C,
        "evict_last",
    )
    if dw_ptr is not None:
        tl.store(dw_ptr + cols, _cast(dw, dw_ptr.dtype.element_ty), mask=mask_c)
    if db_ptr is not None:
        tl.store(db_ptr + cols, _cast(db, db_ptr.dtype.element_ty), mask=mask_c)
    _dx(
        dy_ptr,
        x_ptr,
        w_ptr,
        b_ptr,
        dx_ptr,
        mean,
        rstd,
        dw,
        db,
        cols,
        mask_c,
        first,
        stop,
        M,
        C,
        L,
        stride_dyn,
        stride_dyc,
        stride_dyl,
        stride_xn,
        stride_xc,
        slope,
        ACT,
        GRADIENT,
        AXIS,
        VECTOR,
        BLOCK_M,
    )


def _cube(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, ...] as [N, C, L]; L = 1 for a matrix."""
    return x[:, :, None] if x.dim() == 2 else x if x.dim() == 3 else x.reshape(*x.shape[:2], -1)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, L] with positions side by side, or channels where L = 1."""
    axis = 1 if x.shape[2] == 1 else 2
    return x if x.shape[axis] == 1 or x.stride(axis) == 1 else x.contiguous()


def _shared(x: torch.Tensor, *others: torch.Tensor) -> dict[str, Any]:
    """Constexprs that all of a batch's launches have: AXIS, and the elements of vectors that are whole in each operand."""
    vector = configs.VECTOR_BYTES // x.element_size()
    matrix = x.shape[2] == 1
    aligned = x.shape[1 if matrix else 2] % vector == 0 and all(
        t.stride(0) % vector == 0 and (matrix or t.stride(1) % vector == 0) for t in (x, *others)
    )
    return {"AXIS": 0 if matrix else 1, "VECTOR": vector if aligned else 1}


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def batch_norm_eval_fwd(
    x: torch.Tensor,  # [N, C, ...]
    mean: torch.Tensor,  # [C]
    var: torch.Tensor,  # [C]
    w: torch.Tensor | None,  # [C]
    b: torch.Tensor | None,  # [C]
    eps: float,
    activation: str | None,
    negative_slope: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, contiguous; with `keep` rstd and mean [2, C] for backward, else an empty tensor), in one launch."""
    y = _empty_like(x)
    stats = torch.empty((2, x.shape[1]) if keep else (0,), dtype=torch.float32, device=x.device)
    if not y.numel():
        return y, stats.zero_()
    x = _packed(_cube(x))
    N, C, L = x.shape
    tile = configs.batch_norm_tile(x.dtype, N, C, L, device_limits(x.device)[2], False)
    launch(
        _batch_norm_apply_kernel,
        (triton.cdiv(N * L, tile.rows), triton.cdiv(C, tile.block_n)),
        x,
        w,
        b,
        mean,
        var,
        stats if keep else None,
        y,
        N * L,
        C,
        L,
        tile.rows,
        x.stride(0),
        x.stride(1),
        eps,
        negative_slope,
        TRAINING=False,
        ACT=lookup(activation).forward_for(x.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_n,
        num_warps=tile.num_warps,
        **_shared(x),
    )
    return y, stats


def batch_norm_fwd(
    x: torch.Tensor,  # [N, C, ...]
    w: torch.Tensor | None,  # [C]
    b: torch.Tensor | None,  # [C]
    running_mean: torch.Tensor | None,  # [C]
    running_var: torch.Tensor | None,  # [C]
    batches: torch.Tensor | None,  # [] int64
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, contiguous; rstd and mean [2, C] float32), and the running statistics moved by `momentum`, or by 1 / batches where
    that is given: one launch, or three."""
    y = _empty_like(x)
    C = x.shape[1]
    stats = torch.empty((2, C), dtype=torch.float32, device=x.device)
    if not y.numel():
        return y, stats.zero_()
    x = _packed(_cube(x))
    N, C, L = x.shape
    M = N * L
    tile = configs.batch_norm_tile(x.dtype, N, C, L, device_limits(x.device)[2], True)
    act = lookup(activation).forward_for(x.dtype)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n, "num_warps": tile.num_warps} | _shared(x)
    strides = x.stride()[:2]
    across = triton.cdiv(C, tile.block_n)
    if tile.rows >= M:
        launch(
            _batch_norm_small_fwd_kernel,
            (across,),
            x,
            w,
            b,
            stats,
            running_mean,
            running_var,
            batches,
            y,
            M,
            C,
            L,
            *strides,
            eps,
            momentum,
            negative_slope,
            ACT=act,
            **blocks,
        )
        return y, stats
    S = triton.cdiv(M, tile.rows)
    means, squares = torch.empty((2, S, C), dtype=torch.float32, device=x.device)
    launch(
        _batch_norm_statistics_kernel,
        (S, across),
        x,
        means,
        squares,
        M,
        C,
        L,
        tile.rows,
        *strides,
        **blocks,
    )
    add = configs.sum_tile(S, C)
    launch(
        _batch_norm_finish_kernel,
        (triton.cdiv(C, add.block_n),),
        x,
        means,
        squares,
        stats,
        running_mean,
        running_var,
        batches,
        M,
        C,
        S,
        tile.rows,
        x.stride(1),
        eps,
        momentum,
        BLOCK_S=add.block_m,
        BLOCK_C=add.block_n,
        num_warps=add.num_warps,
    )
    launch(
        _batch_norm_apply_kernel,
        (S, across),
        x,
        w,
        b,
        stats[1],
        stats[0],
        None,
        y,
        M,
        C,
        L,
        tile.rows,
        *strides,
        eps,
        negative_slope,
        TRAINING=True,
        ACT=act,
        **blocks,
    )
    return y, stats


def batch_norm_bwd(
    dy: torch.Tensor,  # [N, C, ...]
    x: torch.Tensor,  # [N, C, ...]
    w: torch.Tensor | None,  # [C]
    b: torch.Tensor | None,  # [C]
    stats: torch.Tensor,  # [2, C] float32
    training: bool,
    activation: str | None,
    negative_slope: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, contiguous; dw, db of the parameters' dtype), None for what is not needed: one launch for a small batch in
    training; else one for the strips' sums and evaluation's dx, one to add the sums up, and one for training's dx."""
    needs_x, needs_w, needs_b = needs
    dx = _empty_like(x) if needs_x else None
    C = x.shape[1]
    dtype = x.dtype if w is None else w.dtype
    if not x.numel():
        dw, db = (torch.zeros(C, dtype=dtype, device=x.device) if need else None for need in needs[1:])
        return dx, dw, db
    dy, x = _cube(dy), _packed(_cube(x))
    N, C, L = x.shape
    M = N * L
    tile = configs.batch_norm_tile(x.dtype, N, C, L, device_limits(x.device)[2], training and needs_x)
    saves_z = saved_for_backward(activation, negative_slope) != "y"
    meta = {
        "ACT": lookup(None if saves_z else activation).forward,
        "GRADIENT": lookup(activation).gradient,
        "BLOCK_M": tile.block_m,
        "BLOCK_C": tile.block_n,
        "num_warps": tile.num_warps,
    } | _shared(x, dy)
    strides = *dy.stride(), *x.stride()[:2]
    across = triton.cdiv(C, tile.block_n)
    if training and needs_x and tile.rows >= M:
        dw, db = (
            torch.empty(C, dtype=dtype, device=x.device) if need else None for need in (needs_w, needs_b)
        )
        launch(
            _batch_norm_small_bwd_kernel,
            (across,),
            dy,
            x,
            w,
            b,
            stats,
            dx,
            dw,
            db,
            M,
            C,
            L,
            *strides,
            negative_slope,
            **meta,
        )
        return dx, dw, db
    S = triton.cdiv(M, tile.rows)
    both = training and needs_x
    dw_partial, db_partial = (
        torch.empty((S, C), dtype=torch.float32, device=x.device) if need or both else None
        for need in (needs_w, needs_b)
    )
    launch(
        _batch_norm_sums_kernel,
        (S, across),
        dy,
        x,
        w,
        b,
        stats,
        None if training else dx,
        dw_partial,
        db_partial,
        M,
        C,
        L,
        tile.rows,
        *strides,
        negative_slope,
        **meta,
    )
    if not both:
        return dx, *parameter_gradients(dw_partial, db_partial, dtype)
    dw, db = parameter_gradients(dw_partial, db_partial, torch.float32)
    assert dw is not None
    assert db is not None
    launch(
        _batch_norm_dx_kernel,
        (S, across),
        dy,
        x,
        w,
        b,
        stats,
        dw,
        db,
        dx,
        M,
        C,
        L,
        tile.rows,
        *strides,
        negative_slope,
        **meta,
    )
    return dx, dw.to(dtype) if needs_w else None, db.to(dtype) if needs_b else None
