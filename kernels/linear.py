"""Fused linear + bias + activation: y = act(x w^T + b), forward and backward.

Two GEMM kernels with one epilogue. `_linear_tma_kernel` is persistent and loads by TMA descriptors: 16-bit operands whose
rows are multiples of 16 bytes, from capability 9.0 on. `_linear_kernel` takes everything else by pointers. Either makes

    y  = act(x w^T + b), storing z = x w^T + b beside y where backward needs it,
    dX = dZ W, or dX * act'(.) and its column sums where a layer lies beneath (its dZ and db then make no extra trip),
    dW = dZ^T X, in several parts of the batch where there are few output tiles.

`_linear_dz_kernel` makes dZ = dY * act'(.) and per-strip column sums in one pass, and `_sum_kernel` adds sums and parts in a
fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import configs, tuning
from ._triton import _cast, _dot, descriptor, device_limits, launch, matmul_precision, tl, triton
from .activations import activation_fwd, lookup, saved_for_backward
from .dropout import _keep_tile, dropout_fwd

__all__ = ["Drop", "linear_bwd", "linear_dgrad", "linear_dz", "linear_fwd", "linear_tiles", "linear_wgrad"]


@triton.jit
def _tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile: in groups of GROUP_M rows, so that programs in flight together share operands in L2."""
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tile // per_group * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    return first_m + tile % per_group % group_m, tile % per_group // group_m


@triton.jit
def _tile_offsets(start_m, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a tile's elements from its first: 32-bit, at half the registers, unless its last row lies too far away."""
    offs_m = tl.arange(0, BLOCK_M)
    if WIDE:
        offs_m = offs_m.to(tl.int64)
    return offs_m[:, None] * N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def _load_tile(
    source,
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
        return source.load([start_m, start_n])
    else:
        mask = (tl.arange(0, BLOCK_M) < M - start_m)[:, None] & (tl.arange(0, BLOCK_N) < N - start_n)[None, :]
        first = start_m.to(tl.int64) * N + start_n
        return tl.load(
            source + first + _tile_offsets(start_m, N, BLOCK_M, BLOCK_N, WIDE), mask=mask, other=0.0
        )


@triton.jit
def _store_tile(
    target,
    tile,
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
        target.store([start_m, start_n], _cast(tile, target.dtype))
    else:
        mask = (tl.arange(0, BLOCK_M) < M - start_m)[:, None] & (tl.arange(0, BLOCK_N) < N - start_n)[None, :]
        first = start_m.to(tl.int64) * N + start_n
        ptrs = target + first + _tile_offsets(start_m, N, BLOCK_M, BLOCK_N, WIDE)
        tl.store(ptrs, _cast(tile, target.dtype.element_ty), mask=mask)


@triton.jit
def _epilogue(
    acc,
    bias_ptr,
    saved,
    seed_ptr,
    y,
    z,
    partial_ptr,
    part,
    start_m,
    start_n,
    strip,
    M,
    N,
    slope,
    p,
    scale,
    unscale,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    FOURS: tl.constexpr,
):
    """What becomes of one tile of a b: bias, z, the activation (or a gradient, given what is saved), column sums, y."""
    cols = start_n + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if z is not None:
        _store_tile(z, acc, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    if saved is not None:
        kept = _load_tile(saved, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
        kept = kept.to(tl.float32)
        if seed_ptr is not None:
            # What is saved is y after dropout.
            kept *= unscale
        acc = ACT(acc, kept, slope)
    else:
        acc = ACT(acc, slope)
    if seed_ptr is not None:
        keep = _keep_tile(tl.load(seed_ptr), start_m, start_n, N, p, BLOCK_M, BLOCK_N, FOURS)
        # A product, as dropout's.
        acc *= tl.where(keep, scale, 0.0)
    if partial_ptr is not None:
        # A row beyond the last is 0 times b: NaN where b has an infinity.
        inside = (tl.arange(0, BLOCK_M) < M - start_m)[:, None]
        column_sums = tl.sum(tl.where(inside, acc, 0.0), 0)
        tl.store(partial_ptr + strip.to(tl.int64) * N + cols, column_sums, mask=cols < N)
    if SPLIT and TMA:
        y.store([part, start_m, start_n], tl.reshape(acc, (1, BLOCK_M, BLOCK_N)))
    elif SPLIT:
        _store_tile(y + part.to(tl.int64) * M * N, acc, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)
    else:
        _store_tile(y, acc, start_m, start_n, M, N, BLOCK_M, BLOCK_N, TMA, WIDE)


@triton.jit(do_not_specialize=["M", "N", "K", "parts"])
def _linear_tma_kernel(
    a,  # descriptor of [M, K], or of [K, M] with A_T; blocks [BLOCK_M, BLOCK_K], or the reverse
    b,  # descriptor of [K, N], or of [N, K] with B_T
    bias_ptr,  # [N] or None
    saved,  # descriptor or pointer of [M, N], or None: what the gradient ACT is given
    seed_ptr,  # [1] int64 or None: of the dropout after ACT
    y,  # descriptor or pointer of [M, N]; pointer of [parts, M, N] float32 where parts > 1
    z,  # descriptor or pointer of [M, N], or None
    partial_ptr,  # [cdiv(M, BLOCK_M), N] float32 or None: column sums of each row of tiles
    M,
    N,
    K,
    parts,
    slope,
    p,
    scale,
    unscale,
    ACT: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    TMA_OUT: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    FOURS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    if TMA_OUT:
        # Bias loads of more than an element.
        N = N // 8 * 8
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(blocks_k, parts)
    for job in tl.range(tl.program_id(0), tiles * parts, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = _tile_position(job % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        start_m = pid_m * BLOCK_M
        start_n = pid_n * BLOCK_N
        if SPLIT:
            first_k = job // tiles * each
            end_k = tl.minimum(first_k + each, blocks_k)
        else:
            first_k = 0
            end_k = blocks_k
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(first_k, end_k):
            if A_T:
                a_tile = a.load([k * BLOCK_K, start_m]).T
            else:
                a_tile = a.load([start_m, k * BLOCK_K])
            if B_T:
                b_tile = b.load([start_n, k * BLOCK_K]).T
            else:
                b_tile = b.load([k * BLOCK_K, start_n])
            acc = _dot(a_tile, b_tile, acc, "ieee")
        if SUBTILES == 2:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            _epilogue(
                left,
                bias_ptr,
                saved,
                seed_ptr,
                y,
                z,
                partial_ptr,
                job // tiles,
                start_m,
                start_n,
                pid_m,
                M,
                N,
                slope,
                p,
                scale,
                unscale,
                ACT,
                BLOCK_M,
                BLOCK_N // 2,
                TMA_OUT,
                WIDE,
                SPLIT,
                FOURS,
            )
            _epilogue(
                right,
                bias_ptr,
                saved,
                seed_ptr,
                y,
                z,
                partial_ptr,
                job // tiles,
                start_m,
                start_n + BLOCK_N // 2,
                pid_m,
                M,
                N,
                slope,
                p,
                scale,
                unscale,
                ACT,
                BLOCK_M,
                BLOCK_N // 2,
                TMA_OUT,
                WIDE,
                SPLIT,
                FOURS,
            )
        else:
            _epilogue(
                acc,
                bias_ptr,
                saved,
                seed_ptr,
                y,
                z,
                partial_ptr,
                job // tiles,
                start_m,
                start_n,
                pid_m,
                M,
                N,
                slope,
                p,
                scale,
                unscale,
                ACT,
                BLOCK_M,
                BLOCK_N,
                TMA_OUT,
                WIDE,
                SPLIT,
                FOURS,
            )


# Sizes are not specialized on: a partial last batch would compile anew. ALIGNED_* say of each which is a contiguous
# dimension of some operand and a multiple of VECTOR, so that a mask below it never cuts a 128-bit access.
@triton.jit(do_not_specialize=["M", "N", "K", "parts"])
def _linear_kernel(
    a_ptr,  # [M, K], or [K, M] with A_T
    b_ptr,  # [K, N], or [N, K] with B_T
    bias_ptr,  # [N] or None
    saved_ptr,  # [M, N] or None: what the gradient ACT is given
    seed_ptr,  # [1] int64 or None: of the dropout after ACT
    y_ptr,  # [M, N]; [parts, M, N] float32 where parts > 1
    z_ptr,  # [M, N] or None
    partial_ptr,  # [cdiv(M, BLOCK_M), N] float32 or None: column sums of each row of tiles
    M,
    N,
    K,
    parts,
    stride_a,
    stride_b,
    slope,
    p,
    scale,
    unscale,
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
    SPLIT: tl.constexpr,
    FOURS: tl.constexpr,
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
        stride_a = stride_a // VECTOR * VECTOR
        stride_b = stride_b // VECTOR * VECTOR
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // tiles
    pid_m, pid_n = _tile_position(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    each = tl.cdiv(tl.cdiv(K, BLOCK_K), parts) * BLOCK_K
    first_k = part * each
    end_k = tl.minimum(first_k + each, K)

    start_m = pid_m * BLOCK_M
    start_n = pid_n * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - start_m
    mask_n = offs_n < N - start_n
    if WIDE:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    # A 64-bit scalar base and, if rows lie near enough, 32-bit offsets within the tile: half the address registers.
    if A_T:
        a_ptrs = (
            a_ptr + first_k.to(tl.int64) * stride_a + start_m + (offs_k[None, :] * stride_a + offs_m[:, None])
        )
        step_a = tl.cast(stride_a, tl.int64) * BLOCK_K
    else:
        a_ptrs = (
            a_ptr + start_m.to(tl.int64) * stride_a + first_k + (offs_m[:, None] * stride_a + offs_k[None, :])
        )
        step_a = tl.cast(BLOCK_K, tl.int64)
    if B_T:
        b_ptrs = (
            b_ptr + start_n.to(tl.int64) * stride_b + first_k + (offs_n[None, :] * stride_b + offs_k[:, None])
        )
        step_b = tl.cast(BLOCK_K, tl.int64)
    else:
        b_ptrs = (
            b_ptr + first_k.to(tl.int64) * stride_b + start_n + (offs_k[:, None] * stride_b + offs_n[None, :])
        )
        step_b = tl.cast(stride_b, tl.int64) * BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first_k, end_k, BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < end_k - k
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        a_ptrs += step_a
        b_ptrs += step_b
    _epilogue(
        acc,
        bias_ptr,
        saved_ptr,
        seed_ptr,
        y_ptr,
        z_ptr,
        partial_ptr,
        part,
        start_m,
        start_n,
        pid_m,
        M,
        N,
        slope,
        p,
        scale,
        unscale,
        ACT,
        BLOCK_M,
        BLOCK_N,
        False,
        WIDE,
        SPLIT,
        FOURS,
    )


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
def _sum_kernel(
    partial_ptr,  # [S, N] float32
    out_ptr,  # [N]
    S,
    N,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_S)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, S, BLOCK_S):
        rows = (start + offs_s).to(tl.int64)
        mask = (rows < S)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_n, _cast(tl.sum(acc, 0), out_ptr.dtype.element_ty), mask=offs_n < N)


def _row_major(t: torch.Tensor, transposed_first: bool = False) -> tuple[torch.Tensor, bool]:
    """(storage, transposed): a matrix with unit stride along its rows that is t or its transpose, copied if t is neither.

    Of a single row or column both hold: t's strides tell which it was made as, or else the caller.
    """
    if t.stride(0) != 1 or t.stride(1) != 1:
        transposed_first = t.stride(1) != 1
    for transposed in (transposed_first, not transposed_first):
        storage = t.t() if transposed else t
        rows, columns = storage.shape
        # Overlapping rows, of an expanded tensor, are beyond a descriptor.
        if (columns == 1 or storage.stride(1) == 1) and (rows == 1 or storage.stride(0) >= columns):
            return storage, transposed
    if t.layout is not torch.strided:
        raise NotImplementedError(f"linear: takes no {t.layout} matrix")
    return t.contiguous(), False


def _aligned(storage: torch.Tensor) -> bool:
    """Whether rows start and end at multiples of 16 bytes."""
    size = storage.element_size()
    return (
        storage.numel() > 0
        and storage.data_ptr() % 16 == 0
        and storage.shape[1] * size % 16 == 0
        and (storage.shape[0] == 1 or storage.stride(0) * size % 16 == 0)
    )


class Drop(NamedTuple):
    """Dropout of a matrix, as `dropout_fwd` takes it."""

    seed: torch.Tensor  # [1] int64
    p: float
    scale: float


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a product runs: its operands as they are stored, and the tile."""

    a: torch.Tensor
    b: torch.Tensor
    a_t: bool
    b_t: bool
    aligned: bool
    aligned_out: bool
    precision: str
    multiprocessors: int
    tile: configs.MatmulTile | configs.CuBlas


def _plan(
    a: torch.Tensor,
    b: torch.Tensor,
    activation: str | None = None,
    saves_z: bool = False,
    saved: torch.Tensor | None = None,
    split: bool = False,
    launching: bool = False,
    dropout: bool = False,
) -> _Plan:
    (M, K), N = a.shape, b.shape[1]
    # The transpose of dZ, for dW.
    (a, a_t), (b, b_t) = _row_major(a, split), _row_major(b)
    # Where an operand is yet to be made, the other one says where.
    device = b.device if a.is_meta else a.device
    capability, shared_memory, multiprocessors = device_limits(device)
    aligned = _aligned(a) and _aligned(b)
    aligned_out = N * a.element_size() % 16 == 0 and (saved is None or saved.data_ptr() % 16 == 0)
    precision = matmul_precision(a.dtype)
    tile = None
    # What was tuned had no mask to draw.
    if not dropout and (table := tuning.table(device)) is not None:
        key = tuning.linear_key(
            a.dtype,
            precision,
            a_t,
            b_t,
            M,
            N,
            K,
            activation,
            saves_z,
            saved is not None,
            aligned,
            aligned_out,
            split,
        )
        tile = table.linear(key, (K if split else M) if launching else None)
    if tile is None:
        tile = configs.linear_tile(
            capability,
            shared_memory,
            a.dtype,
            M,
            N,
            K,
            activation,
            saves_z,
            gradient=saved is not None,
            split=split,
            precision=precision,
            aligned=aligned,
            aligned_out=aligned_out,
            k_major=b_t and not a_t,
            dropout=dropout,
        )
    return _Plan(a, b, a_t, b_t, aligned, aligned_out, precision, multiprocessors, tile)


def linear_tiles(
    x: torch.Tensor, w: torch.Tensor, activation: str | None, saves_z: bool
) -> dict[str, configs.MatmulTile | configs.CuBlas]:
    """What would multiply for y, dx and dw of a linear layer; launches nothing, so meta tensors will do."""
    dz = x.new_empty((x.shape[0], w.shape[0]), device="meta")
    return {
        "y": _plan(x, w.t(), activation, saves_z).tile,
        "dx": _plan(dz, w).tile,
        "dw": _plan(dz.t(), x, split=True).tile,
    }


def _product(
    a: torch.Tensor,  # [M, K]
    b: torch.Tensor,  # [K, N]
    *,
    bias: torch.Tensor | None = None,
    saved: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.0,
    save_z: bool = False,
    sums: bool = False,
    split: bool = False,
    y: torch.Tensor | None = None,
    drop: Drop | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """(y, z, sums): y = act(a b + bias), or a b * act'(saved); z = a b + bias with save_z; y's column sums with sums. Writes
    into `y`, contiguous, if it is given. drop: y is dropped from and scaled, where `saved` is what was, by the same.

    None where configs.py leaves the product to cuBLAS.
    """
    (M, K), N = a.shape, b.shape[1]
    plan = _plan(a, b, activation, save_z, saved, split, launching=True, dropout=drop is not None)
    if isinstance(plan.tile, configs.CuBlas):
        return None
    a, b, tile = plan.a, plan.b, plan.tile
    vector = 16 // a.element_size()
    tiles_m = triton.cdiv(M, tile.block_m)
    tiles = tiles_m * triton.cdiv(N, tile.block_n)
    parts = configs.linear_parts(tile, tiles, K, plan.multiprocessors) if split else 1
    y = torch.empty((M, N), dtype=a.dtype, device=a.device) if y is None else y
    z = torch.empty_like(y) if save_z else None
    partial = torch.empty((tiles_m, N), dtype=torch.float32, device=a.device) if sums else None
    out = y if parts == 1 else torch.empty((parts, M, N), dtype=torch.float32, device=a.device)
    row = lookup(activation)
    # None and not 0 without dropout: no argument at all for the compiler.
    seed = p = scale = unscale = None
    if drop is not None:
        seed, p, scale = drop
        unscale = 1 / scale if saved_for_backward(activation, negative_slope) == "y" else 1.0
    meta: dict[str, Any] = {
        "ACT": row.forward_for(a.dtype) if saved is None else row.gradient,
        "A_T": plan.a_t,
        "B_T": plan.b_t,
        # 32-bit offsets reach 128 rows and columns of less than 2^24 elements.
        "WIDE": max(a.stride(0), b.stride(0), N) >= 1 << 24,
        "SPLIT": parts > 1,
        "FOURS": drop is not None and N % 4 == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }
    if tile.tma:
        # An operand's descriptor moves blocks of the matrix as it is stored.
        block_a = (tile.block_m, tile.block_k)
        block_b = (tile.block_k, tile.block_n)
        block_out = (tile.block_m, tile.block_n // tile.subtiles)

        def result(t: torch.Tensor | None) -> Any:
            if t is None or not plan.aligned_out:
                return t
            return descriptor(t, block_out if t.dim() == 2 else (1, *block_out))

        launch(
            _linear_tma_kernel,
            (min(tiles * parts, plan.multiprocessors * tile.programs),),
            descriptor(a, block_a[::-1] if plan.a_t else block_a),
            descriptor(b, block_b[::-1] if plan.b_t else block_b),
            bias,
            result(saved),
            seed,
            result(out),
            result(z),
            partial,
            M,
            N,
            K,
            parts,
            negative_slope,
            p,
            scale,
            unscale,
            TMA_OUT=plan.aligned_out,
            SUBTILES=tile.subtiles,
            FLATTEN=tile.flatten,
            **meta,
        )
    else:
        launch(
            _linear_kernel,
            (tiles * parts,),
            a,
            b,
            bias,
            saved,
            seed,
            out,
            z,
            partial,
            M,
            N,
            K,
            parts,
            a.stride(0),
            b.stride(0),
            negative_slope,
            p,
            scale,
            unscale,
            PRECISION=plan.precision,
            ALIGNED=plan.aligned,
            ALIGNED_M=plan.a_t and M % vector == 0,
            ALIGNED_N=plan.aligned_out,
            ALIGNED_K=(plan.b_t or not plan.a_t) and K % vector == 0,
            VECTOR=vector,
            **meta,
        )
    if parts > 1:
        _sum(out.view(parts, M * N), y)
    return y, z, None if partial is None else _sum(partial, torch.empty(N, dtype=a.dtype, device=a.device))


def _sum(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = the sum of partial's rows, in a fixed order."""
    S, N = partial.shape
    tile = configs.sum_tile(S, N)
    launch(
        _sum_kernel,
        (triton.cdiv(N, tile.block_n),),
        partial,
        out,
        S,
        N,
        BLOCK_S=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return out


def linear_fwd(
    x: torch.Tensor,  # [M, K]
    w: torch.Tensor,  # [N, K]
    b: torch.Tensor | None,  # [N]
    activation: str | None,
    negative_slope: float,
    save_z: bool,
    drop: Drop | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = act(x w^T + b), dropped from and scaled with `drop`, and, with save_z, z = x w^T + b: one launch, any strides of x
    and w."""
    found = _product(
        x,
        w.t(),
        bias=b.contiguous() if b is not None else None,
        activation=activation,
        negative_slope=negative_slope,
        save_z=save_z,
        drop=drop,
    )
    if found is not None:
        return found[:2]
    z = x @ w.t() if b is None else torch.addmm(b, x, w.t())
    y = z if activation is None else activation_fwd(z, activation, negative_slope)
    return y if drop is None else dropout_fwd(y, *drop), z if save_z else None


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
    dx = linear_dgrad(dz, w)[0] if needs_x else None
    return dx, linear_wgrad(dz, x) if needs_w else None, db


def linear_dgrad(
    dz: torch.Tensor,  # [M, N]
    w: torch.Tensor,  # [N, K]
    saved: torch.Tensor | None = None,  # [M, K], contiguous: y or z of the layer beneath
    activation: str | None = None,
    negative_slope: float = 0.0,
    needs_b: bool = False,
    drop: Drop | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dX = dZ W. With the activation of the layer beneath, and its dropout: that layer's dZ = dX * act'(saved), and its column
    sums db with needs_b, without a trip of dX through memory."""
    found = _product(
        dz, w, saved=saved, activation=activation, negative_slope=negative_slope, sums=needs_b, drop=drop
    )
    if found is None:
        dx = dz @ w
        if drop is not None:
            dx = dropout_fwd(dx, *drop)
            if saved is not None and saved_for_backward(activation, negative_slope) == "y":
                saved = saved / drop.scale
        return linear_dz(dx, saved, activation, negative_slope, True, needs_b)
    return found[0], found[2]


def linear_wgrad(
    dz: torch.Tensor,  # [M, N]
    x: torch.Tensor,  # [M, K]
    dw: torch.Tensor | None = None,  # [N, K], contiguous: written to if given
) -> torch.Tensor:
    """dW = dZ^T X [N, K]. Where there are few tiles of dW, parts of the batch are summed apart, in float32, and then added
    in a fixed order."""
    found = _product(dz.t(), x, split=True, y=dw)
    return torch.mm(dz.t(), x, out=dw) if found is None else found[0]


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
        db = _sum(partial, torch.empty(N, dtype=dy.dtype, device=dy.device))
    return (dy if dz is None else dz), db
