"""Dropout whose mask is a function of a seed and of each element's position, so that backward draws it again.

    y = x k / (1 - p),  k = 1 with probability 1 - p, else 0

Element i takes number i % 4 of the four that Philox4x32 (Salmon et al., SC 2011) makes of the seed and of the counter i // 4;
it is dropped where the upper 31 bits are less than p 2^31. Seven rounds: as many as pass BigCrush, at two thirds of ten's
instructions. The seed is read on the device, so that a replayed CUDA graph that draws it anew drops anew. The same mask on
arrays is in dlgpu/fallback/dropout.py.
"""

from __future__ import annotations

import torch

from . import configs
from ._triton import _cast, launch, tl, triton

__all__ = ["dropout_fwd"]

ROUNDS = tl.constexpr(7)


@triton.jit
def _kept(bits, p):
    return (bits >> 1).to(tl.int32) >= tl.cast(p * 2147483648.0, tl.int32)


@triton.jit
def _keep(seed, offset, p):
    """Which of the elements at these positions, any tensor of integers, are kept. For a GEMM's epilogue, whose elements are
    not four in a row: each costs what four cost in `_keep_fours`."""
    a, b, c, d = tl.randint4x(seed, offset // 4, ROUNDS)
    lane = offset % 4
    return _kept(tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)), p)


@triton.jit
def _keep_fours(seed, counter, p, FOURS: tl.constexpr):
    """Which of the elements 4 counter .. 4 counter + 3 are kept, [4 FOURS] for counter [FOURS]."""
    a, b, c, d = tl.randint4x(seed, counter, ROUNDS)
    return _kept(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * FOURS,)), p)


@triton.jit
def _keep_tile(
    seed, start_m, start_n, N, p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOURS: tl.constexpr
):
    """Which elements of a tile [BLOCK_M, BLOCK_N] of a contiguous matrix with rows of N are kept; FOURS: N is a multiple of
    4, so that numbers are made four at a time."""
    rows = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    if FOURS:
        counter = rows[:, None] * (N // 4) + (start_n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
        a, b, c, d = tl.randint4x(seed, counter, ROUNDS)
        return _kept(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_M, BLOCK_N)), p)
    else:
        return _keep(seed, rows[:, None] * N + (start_n + tl.arange(0, BLOCK_N))[None, :], p)


@triton.jit(do_not_specialize=["n"])
def _dropout_kernel(
    x_ptr,  # [n]
    seed_ptr,  # [1] int64
    y_ptr,  # [n]
    n,
    p,
    scale,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    seed = tl.load(seed_ptr)
    body = n // VECTOR * VECTOR
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    keep = _keep_fours(seed, first // 4 + tl.arange(0, BLOCK // 4), p, BLOCK // 4)
    x = tl.load(x_ptr + offs, mask=offs < body).to(tl.float32)
    # A product, as torch's: NaN and infinity that are dropped are NaN.
    y = x * tl.where(keep, scale, 0.0)
    tl.store(y_ptr + offs, _cast(y, y_ptr.dtype.element_ty), mask=offs < body)
    if tl.program_id(0) == 0:
        tail = tl.cast(body, tl.int64) + tl.arange(0, VECTOR)
        x_tail = tl.load(x_ptr + tail, mask=tail < n).to(tl.float32)
        y_tail = x_tail * tl.where(_keep(seed, tail, p), scale, 0.0)
        tl.store(y_ptr + tail, _cast(y_tail, y_ptr.dtype.element_ty), mask=tail < n)


def dropout_fwd(x: torch.Tensor, seed: torch.Tensor, p: float, scale: float) -> torch.Tensor:
    """y, contiguous: x times scale where it is kept, times 0 where it is dropped. One launch; backward is the same of dy."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tile = configs.dropout_tile(x.dtype)
    launch(
        _dropout_kernel,
        (triton.cdiv(x.numel(), tile.block),),
        x,
        seed,
        y,
        x.numel(),
        p,
        scale,
        BLOCK=tile.block,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return y
