"""Every tile, warp and stage number of the kernels, as pure functions of (capability, shared-memory limit, dtype, shape).

No number here was tuned on a GPU yet. They come from the machine code: the largest tiles that compile with no spilled
register, and with shared memory within the limit, on capabilities 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0. The compile
tests check both for each entry.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = [
    "MatmulTile",
    "RowTile",
    "StripTile",
    "activation_tile",
    "cross_entropy_tile",
    "linear_dz_tile",
    "linear_tile",
]

VECTOR_BYTES = 16  # the widest load: 128 bits


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class MatmulTile:
    """Tiles of the GEMM kernel, and why."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    reason: str

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the operand tiles of all stages take."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * max(self.num_stages - 1, 1)


def linear_tile(capability: int, shared_memory: int, dtype: torch.dtype, M: int, N: int, K: int) -> MatmulTile:
    """The GEMM tile for an [M, N] result over K. Depends on M only through three buckets, so that a partial last batch
    compiles nothing new unless it falls under another bucket."""
    if dtype is torch.float32:
        # IEEE float32 has no matrix instruction: registers hold the whole product, and a larger tile spills.
        if M <= 32:
            return MatmulTile(32, 64, 32, 8, 4, 2, "float32, few rows")
        return MatmulTile(64, 64, 32, 8, 4, 2 if shared_memory < 96 * 1024 else 3, "float32")
    if M <= 32:
        return MatmulTile(32, 64, 64, 8, 4, 2 if capability < 80 else 4, "few rows: the weight is read once")
    if capability < 80:
        return MatmulTile(64, 64, 32, 8, 4, 2, "no asynchronous copies, 64 KiB of shared memory")
    if M <= 512 or N <= 128:
        return MatmulTile(64, 64, 64, 8, 4, 4, "small result: more, smaller tiles to fill the chip")
    return MatmulTile(128, 128, 64, 8, 8, 3, "large result")


@dataclasses.dataclass(frozen=True)
class StripTile:
    """Strips of rows x columns that one program walks down, block_m rows at a time."""

    rows: int
    block_m: int
    block_n: int
    num_warps: int


def linear_dz_tile(dtype: torch.dtype, M: int, N: int) -> StripTile:
    """Strips of dZ = dY * act'(.) with its column sums. Short strips give few partial sums, long ones few programs."""
    block_n = min(_power_of_2(N), 32 * VECTOR_BYTES // dtype.itemsize)
    block_m = max(1, 2048 // block_n)
    return StripTile(max(block_m, 64), block_m, block_n, 4)


def activation_tile(dtype: torch.dtype) -> tuple[int, int]:
    """(elements a program, warps) of a pointwise kernel: two 128-bit loads a thread."""
    return 2 * 128 * VECTOR_BYTES // dtype.itemsize, 4


@dataclasses.dataclass(frozen=True)
class RowTile:
    """Rows x lanes x vector of a row reduction: each lane folds its own vectors, lanes meet once at the end of the row."""

    block_m: int
    lanes: int
    vector: int
    num_warps: int


def cross_entropy_tile(dtype: torch.dtype, C: int) -> RowTile:
    """One row a program where a row fills 1024 lanes, several of a smaller row, so that a block holds about 256 lanes."""
    vector = VECTOR_BYTES // dtype.itemsize
    lanes = min(_power_of_2(-(-C // vector)), 1024)
    return RowTile(min(max(256 // lanes, 1), 32), lanes, vector, 8 if lanes >= 512 else 4)
