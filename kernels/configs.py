"""Every tile, warp and stage number of the kernels, as pure functions of (capability, shared-memory limit, dtype, shape).

No number here was tuned on a GPU yet. They come from the machine code: tiles that compile with no spilled register, and with
shared memory within the limit, on capabilities 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0. The compile tests check both for each
entry. Known to spill still: a few 16-bit forward products with unaligned rows, on 8.x, 10.0 and 12.0; `make sweep` names them.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = [
    "FlatTile",
    "NO_LINEAR_TILE",
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


def linear_tile(
    capability: int, shared_memory: int, dtype: torch.dtype, N: int, aligned: bool
) -> MatmulTile | None:
    """The GEMM tile for a result of N columns; None where cuBLAS multiplies instead. It does not depend on the number of
    rows: a partial last batch compiles nothing new.

    Args:
        aligned: addresses are multiples of 16 bytes and row strides of 16 elements, which Triton wants for wide accesses.
    """
    if dtype is torch.float32:
        # IEEE float32 has no matrix instruction: registers hold the whole product, and a larger tile spills.
        return MatmulTile(
            64, 64, 32, 8, 4, 3 if shared_memory >= 96 * 1024 else 2, "float32 products in registers"
        )
    if capability < 80:
        return None
    if not aligned:
        return MatmulTile(
            64, 32, 32, 8, 4, 2, "rows not aligned: 2-byte accesses, whose addresses spill in larger tiles"
        )
    if N <= 1024:
        return MatmulTile(64, 64, 64, 8, 4, 4, "few columns: small tiles, to fill the chip")
    return MatmulTile(128, 128, 64, 8, 8, 3, "many columns")


NO_LINEAR_TILE = (
    "cuBLAS, then the activation's kernel: Triton has no 16-bit matrix instructions before capability 8.0"
)


@dataclasses.dataclass(frozen=True)
class StripTile:
    """Strips of rows x columns that one program walks down, block_m rows at a time."""

    rows: int
    block_m: int
    block_n: int
    num_warps: int


def linear_dz_tile(dtype: torch.dtype, N: int) -> StripTile:
    """Strips of dZ = dY * act'(.) with its column sums: at 64 rows the partial sums add 2% to a bf16 pass's bytes."""
    block_n = min(_power_of_2(N), 32 * VECTOR_BYTES // dtype.itemsize)
    # Unaligned rows take an address for each element, and spill at 16 elements a thread.
    elements = 2048 if N % 16 == 0 else 1024
    return StripTile(64, min(max(1, elements // block_n), 64), block_n, 4)


@dataclasses.dataclass(frozen=True)
class FlatTile:
    """Elements a program of a pointwise kernel, and elements a 128-bit vector."""

    block: int
    vector: int
    num_warps: int


def activation_tile(dtype: torch.dtype) -> FlatTile:
    """Two 128-bit loads a thread of each operand."""
    vector = VECTOR_BYTES // dtype.itemsize
    return FlatTile(2 * 128 * vector, vector, 4)


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


def adam_tile(itemsize: int, aligned: bool) -> FlatTile:
    """Sixteen elements a thread; `itemsize` is the widest operand's, whose vectors are 128 bits."""
    vector = VECTOR_BYTES // itemsize
    return FlatTile(16 * 128, vector if aligned else 1, 4)
