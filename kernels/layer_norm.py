"""Layer norm and RMS norm over the rows of [N, C], and the sums that their parameters' gradients are.

    layer norm:  xhat = (x - mean) rstd,  rstd = 1 / sqrt(mean (x - mean)^2 + eps)
    RMS norm:    xhat = x rstd,           rstd = 1 / sqrt(mean x^2 + eps)
    forward:     y = xhat w + b
    backward:    g = dy w,  dx = rstd (g - mean g - xhat mean(g xhat));  RMS norm has no mean g
                 dw = sum over rows of dy xhat,  db = sum over rows of dy

A row that fits the registers of one program is read once forward; backward reads dy and x once and adds up dw and db on the
way: every program keeps the sums of its own rows, which a small launch adds in a fixed order. Longer rows are read twice,
forward (statistics by Welford's recurrence in each lane, then the result) and backward (the two means, then dx, dw and db).
"""

from __future__ import annotations

import torch

from . import configs, tuning
from ._triton import _cast, device_limits, launch, tl, triton

__all__ = ["layer_norm_bwd", "layer_norm_fwd", "parameter_gradients"]


@triton.jit
def _whole_vectors(n, VECTOR: tl.constexpr):
    """n, a multiple of VECTOR, in a way that shows the compiler: a mask below it never cuts a 128-bit vector."""
    return n // VECTOR * VECTOR


@triton.jit
def _scale_and_shift(xhat, w_ptr, b_ptr, cols, mask_c):
    if w_ptr is not None:
        xhat = xhat * tl.load(w_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        xhat = xhat + tl.load(b_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return xhat


@triton.jit(do_not_specialize=["N"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [N, C]
    w_ptr,  # [C] or None
    b_ptr,  # [C] or None
    y_ptr,  # [N, C]
    stats_ptr,  # [2, N] float32, rstd and mean (RMS norm: [1, N], rstd), or None
    N,
    C,
    stride_xn,
    eps,
    RMS: tl.constexpr,
    WHOLE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = _whole_vectors(C, VECTOR)
    stride_xn = _whole_vectors(stride_xn, VECTOR)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < N
    x_rows = (x_ptr + rows * stride_xn)[:, None]
    y_rows = (y_ptr + rows * C)[:, None]
    offs_c = tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c[None, :]
        x = tl.load(x_rows + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        if not RMS:
            mean = tl.sum(x, 1) / C
            x = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
        y = _scale_and_shift(x * rstd[:, None], w_ptr, b_ptr, offs_c, mask_c)
        tl.store(y_rows + offs_c[None, :], _cast(y, y_ptr.dtype.element_ty), mask=mask)
    else:
        means = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            cols = start + offs_c
            mask = mask_m[:, None] & (cols < C)[None, :]
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_last")
            x = x.to(tl.float32)
            if RMS:
                squares += x * x
            else:
                d = tl.where((cols < C)[None, :], x - means, 0.0)
                means += d * (1.0 / (start // BLOCK_C + 1))
                squares += d * (x - means)
        if RMS:
            square = tl.sum(squares, 1)
        else:
            # How many columns each lane has seen.
            count = ((C - offs_c + BLOCK_C - 1) // BLOCK_C).to(tl.float32)[None, :]
            mean = tl.sum(means * count, 1) / C
            d = means - mean[:, None]
            square = tl.sum(squares + d * d * count, 1)
        rstd = tl.rsqrt(square / C + eps)
        for start in range(0, C, BLOCK_C):
            cols = start + offs_c
            mask_c = cols < C
            mask = mask_m[:, None] & mask_c[None, :]
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            xhat = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            y = _scale_and_shift(xhat, w_ptr, b_ptr, cols, mask_c)
            out = y_rows + cols[None, :]
            tl.store(out, _cast(y, y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    if stats_ptr is not None:
        tl.store(stats_ptr + rows, rstd, mask=mask_m)
        if not RMS:
            tl.store(stats_ptr + N + rows, mean, mask=mask_m)


@triton.jit
def _gradient_and_xhat(
    dy_rows, x_rows, w_ptr, mean, rstd, cols, stride_dyc, mask, mask_c, RMS: tl.constexpr, EVICT: tl.constexpr
):
    """(dy, dy w, xhat) of a tile."""
    dy = tl.load(
        dy_rows + cols.to(tl.int64)[None, :] * stride_dyc, mask=mask, other=0.0, eviction_policy=EVICT
    )
    dy = dy.to(tl.float32)
    xhat = tl.load(x_rows + cols[None, :], mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if not RMS:
        xhat = xhat - mean[:, None]
    xhat = xhat * rstd[:, None]
    g = dy
    if w_ptr is not None:
        g = dy * tl.load(w_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return dy, g, xhat


@triton.jit(do_not_specialize=["N"])
def _layer_norm_means_kernel(
    dy_ptr,  # [N, C], any strides
    x_ptr,  # [N, C]
    w_ptr,  # [C] or None
    stats_ptr,  # [2, N] float32: rstd, mean
    means_ptr,  # [2, N] float32: mean(g xhat), mean g
    N,
    C,
    stride_dyn,
    stride_dyc,
    stride_xn,
    RMS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = _whole_vectors(C, VECTOR)
    stride_dyn = _whole_vectors(stride_dyn, VECTOR)
    stride_xn = _whole_vectors(stride_xn, VECTOR)
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(stats_ptr + rows)
    mean = tl.zeros((1,), tl.float32) if RMS else tl.load(stats_ptr + N + rows)
    dy_rows = (dy_ptr + rows * stride_dyn)[:, None]
    x_rows = (x_ptr + rows * stride_xn)[:, None]
    products = tl.zeros((1, BLOCK_C), tl.float32)
    gradients = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask_c = cols < C
        _, g, xhat = _gradient_and_xhat(
            dy_rows,
            x_rows,
            w_ptr,
            mean,
            rstd,
            cols,
            stride_dyc,
            mask_c[None, :],
            mask_c,
            RMS,
            "evict_last",
        )
        products += g * xhat
        gradients += g
    tl.store(means_ptr + rows, tl.sum(products, 1) / C)
    if not RMS:
        tl.store(means_ptr + N + rows, tl.sum(gradients, 1) / C)


@triton.jit(do_not_specialize=["N", "strip"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # [N, C], any strides
    x_ptr,  # [N, C]
    w_ptr,  # [C] or None
    stats_ptr,  # [2, N] float32: rstd, mean
    means_ptr,  # [2, N] float32: mean(g xhat), mean g; None where BLOCK_C holds a whole row
    dx_ptr,  # [N, C] or None
    dw_ptr,  # [cdiv(N, strip), C] float32 or None: each strip's sum of dy xhat
    db_ptr,  # [cdiv(N, strip), C] float32 or None: each strip's sum of dy
    N,
    C,
    strip,
    stride_dyn,
    stride_dyc,
    stride_xn,
    RMS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = _whole_vectors(C, VECTOR)
    stride_dyn = _whole_vectors(stride_dyn, VECTOR)
    stride_xn = _whole_vectors(stride_xn, VECTOR)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    first = tl.program_id(0).to(tl.int64) * strip
    stop = tl.minimum(first + strip, N)
    dw = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m in range(first, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        mask_m = rows < stop
        mask = mask_m[:, None] & mask_c[None, :]
        rstd = tl.load(stats_ptr + rows, mask=mask_m, other=0.0)
        mean = rstd
        if not RMS:
            mean = tl.load(stats_ptr + N + rows, mask=mask_m, other=0.0)
        dy, g, xhat = _gradient_and_xhat(
            (dy_ptr + rows * stride_dyn)[:, None],
            (x_ptr + rows * stride_xn)[:, None],
            w_ptr,
            mean,
            rstd,
            cols,
            stride_dyc,
            mask,
            mask_c,
            RMS,
            "evict_first",
        )
        if dw_ptr is not None:
            dw += dy * xhat
        if db_ptr is not None:
            db += dy
        if dx_ptr is not None:
            if means_ptr is None:
                dx = g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]
                if not RMS:
                    dx -= (tl.sum(g, 1) / C)[:, None]
            else:
                dx = g - xhat * tl.load(means_ptr + rows, mask=mask_m, other=0.0)[:, None]
                if not RMS:
                    dx -= tl.load(means_ptr + N + rows, mask=mask_m, other=0.0)[:, None]
            out = (dx_ptr + rows * C)[:, None] + cols[None, :]
            dx = _cast(dx * rstd[:, None], dx_ptr.dtype.element_ty)
            tl.store(out, dx, mask=mask, eviction_policy="evict_first")
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dw_ptr is not None:
        tl.store(dw_ptr + partial, tl.sum(dw, 0), mask=mask_c)
    if db_ptr is not None:
        tl.store(db_ptr + partial, tl.sum(db, 0), mask=mask_c)


@triton.jit(do_not_specialize=["S"])
def _parameter_gradients_kernel(
    dw_partial_ptr,  # [S, C] float32 or None
    db_partial_ptr,  # [S, C] float32 or None
    dw_ptr,  # [C] or None
    db_ptr,  # [C] or None
    S,
    C,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_S)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = (start + offs_s).to(tl.int64)
        mask = (rows < S)[:, None] & (cols < C)[None, :]
        offs = rows[:, None] * C + cols[None, :]
        if dw_ptr is not None:
            dw += tl.load(dw_partial_ptr + offs, mask=mask, other=0.0)
        if db_ptr is not None:
            db += tl.load(db_partial_ptr + offs, mask=mask, other=0.0)
    if dw_ptr is not None:
        tl.store(dw_ptr + cols, _cast(tl.sum(dw, 0), dw_ptr.dtype.element_ty), mask=cols < C)
    if db_ptr is not None:
        tl.store(db_ptr + cols, _cast(tl.sum(db, 0), db_ptr.dtype.element_ty), mask=cols < C)


def _rows(x: torch.Tensor, C: int) -> torch.Tensor:
    """x as [rows, C] with columns side by side; rows may lie anywhere."""
    x = x.reshape(-1, C)
    return x if C == 1 or x.stride(1) == 1 else x.contiguous()


def _vector(C: int, *matrices: torch.Tensor) -> int:
    """Elements of the vectors that every row of each is made of, and starts on a boundary of: 128 bits, or one element."""
    vector = configs.VECTOR_BYTES // matrices[0].element_size()
    return vector if C % vector == 0 and all(t.stride(0) % vector == 0 for t in matrices) else 1


def layer_norm_fwd(
    x: torch.Tensor,  # [..., *shape]
    w: torch.Tensor | None,  # [*shape]
    b: torch.Tensor | None,  # [*shape]
    C: int,  # elements of shape
    eps: float,
    rms: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, contiguous; with `keep` the statistics for backward, else an empty tensor), in one launch."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    N = y.numel() // max(C, 1)
    shape = ((1 if rms else 2), N) if keep else (0,)
    stats = torch.empty(shape, dtype=torch.float32, device=x.device)
    if not y.numel():
        return y, stats
    x = _rows(x, C)
    tile = tuning.tile(x.device, configs.layer_norm_tile, x.dtype, C)
    launch(
        _layer_norm_fwd_kernel,
        (triton.cdiv(N, tile.block_m),),
        x,
        w if w is None else w.contiguous(),
        b if b is None else b.contiguous(),
        y,
        stats if keep else None,
        N,
        C,
        x.stride(0),
        eps,
        RMS=rms,
        WHOLE=tile.block_n >= C,
        VECTOR=_vector(C, x),
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_n,
        num_warps=tile.num_warps,
    )
    return y, stats


def layer_norm_bwd(
    dy: torch.Tensor,  # [..., *shape]
    x: torch.Tensor,  # [..., *shape]
    w: torch.Tensor | None,  # [*shape]
    stats: torch.Tensor,
    C: int,
    rms: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, contiguous; dw and db, [C] float32 for float32 parameters, else of their dtype); None for what is not needed. A
    launch, one more for the sums of rows' strips, one more for rows that are too long for a program's registers."""
    needs_x, needs_w, needs_b = needs
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    parameter = x.dtype if w is None else w.dtype
    if not x.numel():
        dw, db = (torch.zeros(C, dtype=parameter, device=x.device) if need else None for need in needs[1:])
        return dx, dw, db
    dy, x = dy.reshape(-1, C), _rows(x, C)
    w = w if w is None else w.contiguous()
    N = x.shape[0]
    capability, _, multiprocessors = device_limits(x.device)
    tile = tuning.tile(x.device, configs.layer_norm_bwd_tile, capability, x.dtype, C)
    if needs_w or needs_b:
        tile = configs.layer_norm_bwd_strips(tile, C, N, multiprocessors)
    shared = {"RMS": rms, "VECTOR": _vector(C, x, dy), "num_warps": tile.num_warps}
    strides = *dy.stride(), x.stride(0)
    means = None
    if needs_x and tile.block_n < C:
        means = torch.empty_like(stats)
        block = configs.layer_norm_means_block(tile.num_warps)
        launch(
            _layer_norm_means_kernel, (N,), dy, x, w, stats, means, N, C, *strides, BLOCK_C=block, **shared
        )
    strips = triton.cdiv(N, tile.rows)
    dw_partial, db_partial = (
        torch.empty((strips, C), dtype=torch.float32, device=x.device) if need else None
        for need in (needs_w, needs_b)
    )
    launch(
        _layer_norm_bwd_kernel,
        (strips, triton.cdiv(C, tile.block_n)),
        dy,
        x,
        w,
        stats,
        means,
        dx,
        dw_partial,
        db_partial,
        N,
        C,
        tile.rows,
        *strides,
        BLOCK_M=tile.block_m,
        BLOCK_C=tile.block_n,
        **shared,
    )
    return dx, *parameter_gradients(dw_partial, db_partial, parameter)


def parameter_gradients(
    dw_partial: torch.Tensor | None,  # [S, C] float32
    db_partial: torch.Tensor | None,  # [S, C] float32
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The sums of the strips' sums, in a fixed order, in one launch; None for what is not given."""
    given = dw_partial if dw_partial is not None else db_partial
    if given is None:
        return None, None
    S, C = given.shape
    dw, db = (
        None if partial is None else torch.empty(C, dtype=dtype, device=given.device)
        for partial in (dw_partial, db_partial)
    )
    tile = configs.sum_tile(S, C)
    launch(
        _parameter_gradients_kernel,
        (triton.cdiv(C, tile.block_n),),
        dw_partial,
        db_partial,
        dw,
        db,
        S,
        C,
        BLOCK_S=tile.block_m,
        BLOCK_C=tile.block_n,
        num_warps=tile.num_warps,
    )
    return dw, db
