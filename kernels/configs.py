"""Every tile, warp and stage number of the kernels, as pure functions of (capability, shared-memory limit, dtype, shape).

No number here was tuned on a GPU yet. They come from the machine code: tiles that compile with no spilled register, and with
shared memory within the limit, on capabilities 7.5, 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0. `make test` checks both for chosen
entries, `make sweep` for each that can be reached; some of those spill at their first launch, and only there (`_triton._run`).
Tables measured on a card (tuned/) come first, through tuning.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

__all__ = [
    "CuBlas",
    "FlatTile",
    "MatmulTile",
    "RowTile",
    "StripTile",
    "activation_tile",
    "batch_norm_tile",
    "cpu_backend",
    "cross_entropy_edges",
    "cross_entropy_grad_tile",
    "cross_entropy_parts",
    "cross_entropy_splits",
    "cross_entropy_tile",
    "dropout_tile",
    "gated_bwd_tile",
    "gated_tile",
    "layer_norm_bwd_strips",
    "layer_norm_bwd_tile",
    "layer_norm_means_block",
    "layer_norm_tile",
    "linear_candidates",
    "HeadTile",
    "linear_cross_entropy_chunk",
    "linear_cross_entropy_split",
    "linear_cross_entropy_tile",
    "linear_dz_tile",
    "linear_parts",
    "linear_refinements",
    "linear_tile",
    "logsumexp_tile",
    "loss_programs",
    "loss_reduce_tile",
    "loss_tile",
    "multi_margin_tile",
    "optimizer_tile",
    "row_bucket",
    "softmax_tile",
    "sum_tile",
    "tiled_capability",
    "variants",
]

VECTOR_BYTES = 16  # the widest load: 128 bits

# On a CPU: from how many elements of the first operand on NumPy is taken. Ops that are not named are torch's at any size.
_NUMPY_FROM = {
    # What torch has no function for: this mask, these options, a second derivative, logits that are too many to store, 16-bit
    # parameters in float32 arithmetic.
    "dropout": 0,
    "cross_entropy_extra": 0,
    "linear_cross_entropy_extra": 0,
    "multi_margin_loss": 0,
    "optimizer_extra": 0,
    # Torch's takes one thread and no vectors, or several passes: 0.5 to 0.9 of its time.
    "kl_div": 1 << 16,
    "tanh": 1 << 16,
}
# And up to how many: torch's function is a dozen passes, which memory limits from some size on.
_NUMPY_UP_TO = {"rmsprop": 1 << 20}


def cpu_backend(op: str, dtype: torch.dtype, numel: int) -> str:
    """Whether NumPy ("fallback") or torch's own function ("torch") computes on a CPU, where neither was asked for.

    A rule like that for cuBLAS: whichever was measured ahead. Both forward + backward, float32, torch 2.13 and NumPy 2.4 on an
    AMD EPYC (family 26) with 2 cores. NumPy takes one thread and a pass over memory for each operation, and some 50 us for a
    call, torch's fused kernels two threads and one pass: cross-entropy of 1024 x 1000 takes NumPy 2.2 times as long, layer
    norm 6 times. Matrix products alone take NumPy half of torch's time; but its threads spin on for a while after each, and
    what torch does next then waits for a core: a training step takes up to 3 times as long as torch's, a small one 20 times.
    float64 is NumPy's: the truth that the others are held to.
    """
    numpy = dtype is torch.float64 or numel >= _NUMPY_FROM.get(op, 1 << 62) or numel < _NUMPY_UP_TO.get(op, 0)
    return "fallback" if numpy else "torch"


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class _Tile:
    """What a memory-bound kernel takes at once, and where it was measured, if it was."""

    reason: str = dataclasses.field(default="", kw_only=True, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self!r}, {self.reason}" if self.reason else repr(self)


@dataclasses.dataclass(frozen=True)
class StripTile(_Tile):
    """Strips of rows x columns that one program walks down, block_m rows at a time."""

    rows: int
    block_m: int
    block_n: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class MatmulTile:
    """Tiles of the GEMM kernels, and why.

    tma: the persistent kernel with TMA descriptors, `programs` blocks a multiprocessor; else the kernel with pointers.
    flatten: one loop over tiles and steps, so that a tile's first loads overlap the epilogue before it.
    max_registers: a thread's, where the assembler would choose too few by itself.
    subtiles: parts of a tile's columns that the epilogue takes one after the other, at as many times fewer registers.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    reason: str
    tma: bool = False
    subtiles: int = 1
    programs: int = 1
    flatten: bool = False
    max_registers: int | None = None

    def __str__(self) -> str:
        text = f"{self.block_m} x {self.block_n} x {self.block_k}, {self.num_warps} warps, {self.num_stages} stages"
        if self.tma:
            text += f", {self.programs} persistent block{'s' * (self.programs > 1)} an SM"
        return f"{text}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class CuBlas:
    """The product goes to cuBLAS, with bias and activation in a pass of their own; and why."""

    reason: str

    def __str__(self) -> str:
        return self.reason


# Multiprocessors of the smallest usual card of each capability: how many tiles it takes to fill one.
_MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 76, 90: 114, 100: 148, 120: 70}


def tiled_capability(capability: int) -> int:
    """Whose tiles a GPU takes: those of the newest capability here that is not newer. 10.3 takes 10.0's, 12.1 takes 12.0's."""
    return max((known for known in _MULTIPROCESSORS if known <= capability), default=capability)


# Steps of the inner loop that make a part worth its share of the sum over the parts.
_STEPS_A_PART = 16

# A product of so few multiplications takes no longer than a launch or two (2^28 take 10 us at 50 TFLOP/s).
_SMALL_PRODUCT = 1 << 28


def row_bucket(M: int) -> int:
    """A typical number of rows of M's bucket: up to 64, 512, 4096, and more. Tiles depend on no more than this, so that
    another batch size of the same bucket tunes and compiles nothing."""
    return 64 if M <= 64 else 256 if M <= 512 else 2048 if M <= 4096 else 8192


@functools.lru_cache(4096)
def linear_tile(
    capability: int,
    shared_memory: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    activation: str | None,
    saves_z: bool,
    *,
    gradient: bool = False,
    split: bool = False,
    precision: str = "ieee",
    aligned: bool = True,
    aligned_out: bool = True,
    k_major: bool = True,
    dropout: bool = False,
) -> MatmulTile | CuBlas:
    """The tile of act(a b + bias), a [M, K] and b [K, N], or that cuBLAS multiplies.

    Args:
        activation, saves_z: the epilogue.
        gradient: the epilogue multiplies by act'(saved) instead.
        split: the sum over K, which is the batch, may be cut into parts (`linear_parts`).
        precision: of float32 products, "ieee" or "tf32".
        aligned: rows of a and b, as stored, start and end at multiples of 16 bytes.
        aligned_out: so do those of the result.
        k_major: a and b are stored with K contiguous.
        dropout: the epilogue draws a mask.
    """
    rows, depth = (M, row_bucket(K)) if split else (row_bucket(M), K)
    small = rows * N * depth <= _SMALL_PRODUCT
    # Below 8.0 and from 10.0 on the assembler by itself aims at more threads a multiprocessor, and spills to get there.
    max_registers = None if 80 <= capability < 100 else 255
    if dtype is torch.float32:
        if precision == "tf32":
            if capability in (90, 100) and not k_major and not small:
                return CuBlas(
                    "tensor cores take tf32 with K contiguous only; Triton turns the rest by 4-byte loads"
                )
        elif not small:
            return CuBlas(
                "IEEE float32 has no matrix instruction: a saved pass weighs less than cuBLAS's lead (estimated)"
            )
        if capability >= 100:
            warps = 8 if capability == 100 else 4
            return MatmulTile(64, 32, 32, 8, warps, 2, "float32 on 10.0 and later: wider tiles spill")
        stages = 3 if shared_memory >= 96 * 1024 else 2
        reason = "float32: registers hold the product, larger tiles spill"
        return MatmulTile(64, 64, 32, 8, 4, stages, reason, max_registers=max_registers)
    if capability < 80:
        return CuBlas("Triton has no 16-bit matrix instructions before capability 8.0")
    if not aligned:
        if not small:
            return CuBlas(
                "rows are no multiples of 16 bytes: 2-byte loads lose more than fusing saves (estimated)"
            )
        reason = "rows not aligned: 2-byte loads, whose addresses spill in larger tiles"
        return MatmulTile(64, 32, 32, 8, 4, 2, reason, max_registers=max_registers)
    tma = capability >= 90
    large_memory = shared_memory >= 200 * 1024

    def tile(
        m: int, n: int, warps: int, stages: int, subtiles: int, programs: int, reason: str
    ) -> MatmulTile:
        if not tma:
            subtiles = programs = 1
        # With two blocks an SM the other one fills the gap. Parts have loop bounds of their own, which cannot be flattened.
        flatten = tma and programs == 1 and not (split or gradient)
        # Registers for two blocks of 8 warps at a time.
        limit = 128 if capability == 90 and warps * programs == 16 else max_registers
        return MatmulTile(m, n, 64, 8, warps, stages, reason, tma, subtiles, programs, flatten, limit)

    parts = max(depth // (64 * _STEPS_A_PART), 1) if split else 1

    def fills(m: int, n: int) -> bool:
        return -(-rows // m) * -(-N // n) * parts >= _MULTIPROCESSORS[capability]

    if not aligned_out:
        warps, stages = 8 if capability >= 100 or dropout else 4, 4 if tma else 3
        return tile(64, 64, warps, stages, 1, 2, "rows of the result not aligned: 2-byte stores by pointers")
    if rows <= 64 and (N < 128 or fills(64, 128)):
        # On 10.0 four warps spill with the longest gradient.
        warps = 4 if not dropout and (capability == 90 or (capability == 100 and not gradient)) else 8
        return tile(64, 128, warps, 4 if large_memory else 3, 1, 1, "few rows: one row of tiles")
    # On 10.0, where the product is in tensor memory, halves take more registers in forward, not fewer.
    whole_or_halves = 1 if capability == 100 and not gradient else 2
    if N > 64 and fills(128, 128):
        if dropout:
            m, stages = (128, 4 if large_memory else 2) if tma else (64, 3)
            reason = "many tiles: the mask's random numbers take the registers of larger ones"
            return tile(m, 128, 8, stages, whole_or_halves, 1, reason)
        if not tma:
            return tile(128, 128, 8, 3, 1, 1, "many tiles")
        if not large_memory:
            return tile(128, 128, 8, 2, 2, 1, "many tiles, little shared memory: two stages")
        if depth <= 1024:
            reason = "memory-bound: two blocks an SM, one stores while the other multiplies"
            return tile(128, 128, 8 if gradient else 4, 3, 2, 2, reason)
        # On 10.0 this one spills with the longer activations, on 9.0 with the longest gradient.
        if capability == 90 and not (gradient and activation == "gelu") and N > 128 and fills(128, 256):
            # Parts of dW leave as float32, in twice the shared memory.
            stages = 3 if split else 4
            reason = "compute-bound: the largest tile that leaves no register to memory"
            return tile(128, 256, 8, stages, 2, 1, reason)
        return tile(128, 128, 8, 4, whole_or_halves, 1, "compute-bound, and no place for tiles of 128 x 256")
    if rows > 64 and N <= 64 and fills(128, 64):
        return tile(
            128, 64, 8 if tma else 4, 4 if large_memory else 3, 1, 1, "few columns: one column of tiles"
        )
    return tile(64, 64, 4, 4, 1, 2, "few tiles: small ones, to fill the chip")


# Pipelines deeper than this hide no more of the memory's latency.
_DEEPEST = 5

# What is worth measuring against `linear_tile`'s choice: (block_m, block_n, block_k, warps, subtiles, programs). Of a tile not
# named here the registers spill, or it is a worse likeness of one that is.
_TMA_CANDIDATES = (
    (128, 256, 64, 8, 2, 1),
    (128, 256, 64, 8, 1, 1),
    (128, 128, 64, 8, 1, 1),
    (128, 128, 64, 8, 2, 1),
    (128, 128, 64, 8, 2, 2),
    (128, 128, 64, 4, 2, 2),
    (128, 128, 128, 8, 2, 1),
    (64, 128, 64, 4, 1, 1),
    (64, 128, 64, 4, 1, 2),
    (128, 64, 64, 4, 1, 1),
    (128, 64, 64, 4, 1, 2),
    (64, 64, 64, 4, 1, 2),
    (64, 64, 128, 4, 1, 2),
)
# Results stored by pointers, 2 bytes at a time: their addresses take registers.
_ODD_RESULT_CANDIDATES = (
    (128, 128, 64, 8, 2, 1),
    (128, 64, 64, 8, 1, 1),
    (64, 128, 64, 4, 1, 1),
    (64, 64, 64, 4, 1, 2),
    (64, 64, 64, 4, 1, 1),
)
_POINTER_CANDIDATES = (
    (128, 256, 32, 8, 1, 1),
    (128, 128, 64, 8, 1, 1),
    (128, 128, 32, 8, 1, 1),
    (128, 128, 32, 4, 1, 1),
    (64, 128, 64, 4, 1, 1),
    (128, 64, 64, 4, 1, 1),
    (128, 64, 32, 4, 1, 1),
    (64, 64, 64, 4, 1, 1),
    (64, 64, 32, 4, 1, 1),
)
_UNALIGNED_CANDIDATES = (
    (64, 64, 32, 4, 1, 1),
    (64, 64, 32, 8, 1, 1),
    (64, 32, 32, 4, 1, 1),
    (32, 64, 32, 4, 1, 1),
)
_FLOAT32_CANDIDATES = (
    (64, 64, 32, 4, 1, 1),
    (64, 64, 32, 8, 1, 1),
    (64, 64, 16, 4, 1, 1),
    (64, 32, 32, 4, 1, 1),
    (32, 32, 32, 4, 1, 1),
)
_TF32_CANDIDATES = (
    (128, 128, 32, 8, 1, 1),
    (128, 64, 32, 4, 1, 1),
    (64, 128, 32, 4, 1, 1),
    (64, 64, 32, 4, 1, 1),
)


def linear_refinements(tile: MatmulTile) -> tuple[MatmulTile, ...]:
    """A second look, at the best candidates only: other groups of rows that run together, and no flattened loop."""
    found = [dataclasses.replace(tile, group_m=group) for group in (4, 8, 16) if group != tile.group_m]
    return (*found, dataclasses.replace(tile, flatten=False)) if tile.flatten else tuple(found)


def linear_candidates(
    capability: int,
    shared_memory: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    activation: str | None,
    saves_z: bool,
    *,
    gradient: bool = False,
    split: bool = False,
    precision: str = "ieee",
    aligned: bool = True,
    aligned_out: bool = True,
    k_major: bool = True,
) -> tuple[MatmulTile | CuBlas, ...]:
    """What is worth measuring for a product of `linear_tile`, whose arguments these are: its choice first, then others with
    the deepest pipeline that fits and the one below, and cuBLAS. The same for each M of a bucket, as the choice is."""
    default = linear_tile(
        capability,
        shared_memory,
        dtype,
        M,
        N,
        K,
        activation,
        saves_z,
        gradient=gradient,
        split=split,
        precision=precision,
        aligned=aligned,
        aligned_out=aligned_out,
        k_major=k_major,
    )
    tma = False
    shapes: tuple[tuple[int, int, int, int, int, int], ...] = ()
    if dtype is torch.float32:
        shapes = _TF32_CANDIDATES if precision == "tf32" else _FLOAT32_CANDIDATES
    elif capability >= 80 and not aligned:
        shapes = _UNALIGNED_CANDIDATES
    elif capability >= 90:
        tma, shapes = True, _TMA_CANDIDATES if aligned_out else _ODD_RESULT_CANDIDATES
    elif capability >= 80:
        shapes = _POINTER_CANDIDATES
    # As in `linear_tile`.
    rows = M if split else row_bucket(M)
    max_registers = 255 if capability >= 100 and dtype.itemsize == 2 else None
    # Loads of 2 bytes are not pipelined.
    most = _DEEPEST if aligned else 2
    # Matrix instructions that read shared memory themselves hold a stage of it for as long as they run.
    asynchronous = capability in (90, 100) and (dtype.itemsize == 2 or precision == "tf32")
    found: list[MatmulTile | CuBlas] = [default]
    for m, n, k, warps, subtiles, programs in shapes:
        # Twice the matrix: half of each tile would be padding.
        if (m > 64 and m >= 2 * rows) or (n > 64 and n >= 2 * N):
            continue
        staged = (m + n) * k * dtype.itemsize
        # A multiprocessor has 1 KiB for each block besides. Descriptors take their results, parts of dW in float32, from
        # shared memory of its own; a result on its way to pointers goes where the operands were.
        room = (shared_memory + 1024) // programs - 2048
        result = m * n // subtiles * (4 if split else dtype.itemsize)
        if result > room:
            continue
        deepest = min((room - result * tma) // staged + (not asynchronous), most)
        flatten = tma and programs == 1 and not (split or gradient)
        limit = 128 if capability == 90 and warps * programs == 16 else max_registers
        for stages in range(max(deepest - 1, 2), deepest + 1):
            tile = MatmulTile(
                m, n, k, 8, warps, stages, default.reason, tma, subtiles, programs, flatten, limit
            )
            if tile != default:
                found.append(dataclasses.replace(tile, reason="a candidate"))
    if isinstance(default, MatmulTile):
        found.append(CuBlas("a candidate"))
    return tuple(found)


def linear_parts(tile: MatmulTile, tiles: int, K: int, multiprocessors: int) -> int:
    """Parts that the sum over K is cut into, each with float32 results of its own, so that `tiles` fill the chip. Whether it
    is cut at all, which is compiled in, depends on K's bucket only."""
    worth = tile.block_k * _STEPS_A_PART
    if row_bucket(K) < 2 * worth:
        return 1
    return max(1, min(multiprocessors * tile.programs // max(tiles, 1), max(K // worth, 2)))


def sum_tile(S: int, N: int) -> StripTile:
    """Sums of a few long rows (parts of dW), or of many short ones (column sums)."""
    return StripTile(4, 4, 1024, 4) if S <= 16 and N > 1024 else StripTile(32, 32, 32, 4)


def linear_dz_tile(dtype: torch.dtype, N: int) -> StripTile:
    """Strips of dZ = dY * act'(.) with its column sums: at 64 rows the partial sums add 2% to a bf16 pass's bytes."""
    block_n = min(_power_of_2(N), 32 * VECTOR_BYTES // dtype.itemsize)
    # Unaligned rows take an address for each element, and spill at 16 elements a thread.
    elements = 2048 if N % 16 == 0 else 1024
    return StripTile(64, min(max(1, elements // block_n), 64), block_n, 4)


@functools.lru_cache(4096)
def gated_tile(
    capability: int,
    shared_memory: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    *,
    gradient: bool = False,
    precision: str = "ieee",
    aligned: bool = True,
    aligned_out: bool = True,
    k_major: bool = True,
) -> MatmulTile | CuBlas:
    """The tile of a gated unit's GEMM, or that cuBLAS multiplies and one pass gates: forward the one with two accumulators,
    whose two halves of block_n columns take the registers of one tile twice as wide; with `gradient` the one for dh, whose
    epilogue reads g and u and writes dg, du and h. The other arguments are `linear_tile`'s."""
    rows = row_bucket(M)
    small = rows * N * K * (1 if gradient else 2) <= _SMALL_PRODUCT
    # As in `linear_tile`.
    max_registers = 255 if capability >= 100 else None
    if dtype is torch.float32:
        if precision == "tf32":
            if capability in (90, 100) and not k_major and not small:
                return CuBlas(
                    "tensor cores take tf32 with K contiguous only; Triton turns the rest by 4-byte loads"
                )
        elif not small:
            return CuBlas(
                "IEEE float32 has no matrix instruction: a saved pass weighs less than cuBLAS's lead (estimated)"
            )
        stages = 3 if shared_memory >= 96 * 1024 else 2
        if not aligned:
            reason = "float32, rows not aligned: 4-byte loads, whose addresses take registers: a shallow tile"
            return MatmulTile(64, 32, 16, 8, 8, 2, reason, max_registers=max_registers)
        reason = "float32: registers hold the products, larger tiles spill"
        return MatmulTile(64, 32, 32, 8, 8, stages, reason, max_registers=max_registers)
    if capability < 80:
        return CuBlas("Triton has no 16-bit matrix instructions before capability 8.0")
    if not aligned:
        if not small:
            return CuBlas(
                "rows are no multiples of 16 bytes: 2-byte loads lose more than fusing saves (estimated)"
            )
        reason = "rows not aligned: 2-byte loads, whose addresses spill in larger tiles"
        # Left to itself, ptxas spills on 8.0 at 128 registers.
        return MatmulTile(64, 32, 32, 8, 8, 2, reason, max_registers=255)
    tma = capability >= 90
    large_memory = shared_memory >= 200 * 1024

    def tile(
        m: int, n: int, warps: int, stages: int, subtiles: int, programs: int, reason: str
    ) -> MatmulTile:
        if not tma:
            subtiles = programs = 1
        return MatmulTile(
            m,
            n,
            64,
            8,
            warps,
            stages,
            reason,
            tma=tma,
            subtiles=subtiles,
            programs=programs,
            max_registers=max_registers,
        )

    def fills(m: int, n: int) -> bool:
        return -(-rows // m) * -(-N // n) >= _MULTIPROCESSORS[capability]

    if not aligned_out:
        warps = 8 if tma else 4
        return tile(64, 32, warps, 3, 1, 2, "rows of the result not aligned: 2-byte stores by pointers")
    if not fills(128, 64):
        n, warps, stages = (64, 8, 3) if gradient else (32, 4, 4)
        return tile(64, n, warps, stages, 1, 2, "few tiles: small ones, to fill the chip")
    if large_memory and fills(128, 128):
        # On 10.0 the epilogue of gelu_tanh spills in it.
        if gradient and capability < 100:
            return tile(128, 128, 8, 3, 2, 1, "many tiles: the largest whose epilogue fits the registers")
        if not gradient and K > 1024:
            return tile(128, 128, 8, 4, 2, 1, "compute-bound: two accumulators of 128 x 128")
    if gradient and capability >= 120:
        return tile(64, 64, 8, 3, 1, 2, "128 x 64 spills with the epilogues of gelu_tanh and silu")
    return tile(128, 64, 8, 3 if shared_memory >= 99 * 1024 else 2, 1, 1, "two accumulators of 128 x 64")


def gated_bwd_tile(dtype: torch.dtype, N: int) -> StripTile:
    """Strips of the pass over dh, g and u: half of `linear_dz_tile`'s elements a step, for twice its operands."""
    block_n = min(_power_of_2(N), 32 * VECTOR_BYTES // dtype.itemsize)
    elements = 1024 if N % 16 == 0 else 512
    return StripTile(64, min(max(1, elements // block_n), 64), block_n, 4)


@dataclasses.dataclass(frozen=True)
class FlatTile(_Tile):
    """Elements a program of a pointwise kernel, and elements a 128-bit vector."""

    block: int
    vector: int
    num_warps: int


def activation_tile(dtype: torch.dtype) -> FlatTile:
    """Two 128-bit loads a thread of each operand."""
    vector = VECTOR_BYTES // dtype.itemsize
    return FlatTile(2 * 128 * vector, vector, 4)


@dataclasses.dataclass(frozen=True)
class RowTile(_Tile):
    """Rows x lanes x vector of a row reduction: each lane folds its own vectors, lanes meet once at the end of the row."""

    block_m: int
    lanes: int
    vector: int
    num_warps: int


def cross_entropy_tile(dtype: torch.dtype, C: int, matrices: int = 1) -> RowTile:
    """One row a program where a row fills 1024 lanes, several of a smaller row, so that a block holds about 256 lanes. Half as
    many lanes where two matrices are read, logits and probabilities: the same bytes under way, in as many registers."""
    vector = VECTOR_BYTES // dtype.itemsize
    lanes = min(_power_of_2(-(-C // vector)), 1024 // matrices)
    return RowTile(min(max(256 // lanes, 1), 32), lanes, vector, 8 if lanes >= 512 else 4)


def cross_entropy_edges(dtype: torch.dtype, C: int) -> bool:
    """Whether rows that do not lie on 16-byte boundaries are cut there. A row of less than 8 vectors is mostly head and tail:
    its elements are read one by one."""
    return C >= 8 * (VECTOR_BYTES // dtype.itemsize)


def cross_entropy_splits(tile: RowTile, blocks: int, C: int, multiprocessors: int) -> tuple[int, int]:
    """(programs a row of C columns, columns a program) where rows alone make `blocks` programs: enough for 4 programs of 256
    threads a multiprocessor, whose 16 KiB of loads each cover the memory's latency, and no less than a tile each."""
    step = tile.lanes * tile.vector
    tiles = -(-C // step)
    splits = min(tiles, -(-4 * multiprocessors // max(blocks, 1)))
    span = -(-tiles // splits) * step
    return -(-C // span), span


def cross_entropy_parts(splits: int) -> int:
    """Lanes that add up a split row."""
    return _power_of_2(splits)


def cross_entropy_grad_tile(
    capability: int, dtype: torch.dtype, C: int, plain: bool, shares: bool
) -> RowTile:
    """Gradient in forward: a row stays in registers up to 32768 columns if it is `plain` (whole vectors, no option; 16384 from
    capability 10.0 on), 16384 if not, 8192 where every column has a share, which stays with it: beyond, registers spill, with
    64 columns a thread of a plain row and 32 of others. A longer row is read twice, in the tiles of `cross_entropy_tile`."""
    vector = VECTOR_BYTES // dtype.itemsize
    if C > (8192 if shares else 32768 if plain and capability < 100 else 16384):
        return cross_entropy_tile(dtype, C)
    lanes = _power_of_2(-(-C // vector))
    each = 2048 if plain else 1024
    block_m = min(max(256 // lanes, 1), 32)
    return RowTile(block_m, lanes, vector, min(max(block_m * lanes * vector // each, 4), 16))


@dataclasses.dataclass(frozen=True)
class HeadTile:
    """Tiles of the products of linear_cross_entropy, and why."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    reason: str

    @property
    def blocks(self) -> dict[str, int]:
        """As a launch takes them."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def linear_cross_entropy_tile(
    capability: int, shared_memory: int, dtype: torch.dtype, aligned: bool, smooth: bool = False
) -> HeadTile:
    """One tile for the products and for what follows them in registers: an online softmax, or the gradient of the logits.

    Args:
        aligned: addresses are multiples of 16 bytes and row strides of 16 elements, which Triton wants for wide accesses.
        smooth: a forward pass with label smoothing, which takes the most registers.
    """
    if dtype is torch.float32 or capability < 80:
        # Registers hold the products, for want of a matrix instruction.
        # The addresses of rows that are not aligned take registers too.
        if capability >= 120 and (smooth or not aligned):
            return HeadTile(32, 64, 32, 8, 8, 2, "12.0: larger tiles spill")
        if smooth:
            # On 10.0 those four warps spill with a bias, class weights and a soft cap, and matrix instructions want 64 rows.
            k, warps = (32, 8) if capability >= 100 else (16, 4)
            return HeadTile(64, 32, k, 8, warps, 2, "larger tiles spill")
        return HeadTile(64, 64, 32, 8, 8, 2, "larger tiles spill")
    if not aligned:
        return HeadTile(
            64, 32, 32, 8, 4, 2, "rows not aligned: 2-byte accesses, whose addresses take registers"
        )
    if shared_memory < 128 * 1024:
        return HeadTile(128, 128, 32, 16, 8, 3, "little shared memory: short steps of the sum")
    if smooth and capability == 100:
        return HeadTile(
            128, 64, 64, 16, 8, 3, "128 x 128 spills: results come out of tensor memory all at once"
        )
    return HeadTile(128, 128, 64, 16, 8, 3, "128 x 128 leaves registers for the softmax")


# Tiles of the vocabulary that one program of the forward pass goes through, at most: partial results of 8192 rows and
# 128256 classes then take 6 MB.
_SPLIT_TILES = 16

# Programs that the forward pass should have at least: some waves of a large chip.
_SPLIT_PROGRAMS = 1024


def linear_cross_entropy_split(tiles_m: int, tiles_n: int) -> int:
    """Tiles of the vocabulary a program, from the number of tiles of rows and of the vocabulary."""
    return min(max(tiles_m * tiles_n // _SPLIT_PROGRAMS, 1), _SPLIT_TILES)


# Bytes of a chunk's dZ: 16384 columns of 4096 rows of 16 bits. 8192 rows, 128256 classes and 4096 features then take 1.3 GiB
# in backward with dX and dW, and a chunk's read and write of dX in float32 are 3% of its products' time (estimated).
_CHUNK_BYTES = 1 << 27


def linear_cross_entropy_chunk(N: int, V: int, dtype: torch.dtype) -> int:
    """Columns of the vocabulary whose gradient exists at a time in backward: a multiple of 1024."""
    return min(max(_CHUNK_BYTES // (max(N, 1) * dtype.itemsize) // 1024, 1) * 1024, max(V, 1))


def softmax_tile(dtype: torch.dtype, C: int, backward: bool = False, aligned: bool = True) -> RowTile:
    """A whole row a program where it fits the registers: one read and one write. That is 32 elements a thread of 1024; half of
    it backward, which holds two operands; half of either where rows are not `aligned` to 16 bytes and each element has an
    address, but for 16-bit rows forward: beyond, registers spill. Longer rows go by steps of 8 elements a thread."""
    vector = VECTOR_BYTES // dtype.itemsize
    width = _power_of_2(C)
    longest = 16384 if backward else 32768
    if not aligned and (backward or dtype is torch.float32):
        longest //= 2
    if width > longest:
        return RowTile(1, 8192 // vector, vector, 32)
    vector = min(vector, width)
    block_m = min(max(1024 // width, 1), 32)
    return RowTile(block_m, width // vector, vector, min(max(block_m * width // 512, 1), 32))


def logsumexp_tile(dtype: torch.dtype, C: int) -> RowTile:
    """As cross-entropy's rows, which are read the same way."""
    vector = VECTOR_BYTES // dtype.itemsize
    lanes = min(_power_of_2(-(-C // vector)), 1024)
    return RowTile(min(max(256 // lanes, 1), 32), lanes, vector, 8 if lanes >= 512 else 4)


def layer_norm_tile(dtype: torch.dtype, C: int) -> StripTile:
    """Rows of layer norm forward: a whole row a program where it fits the registers, at 16 elements a thread, and 32 in the
    longest of 16 bits; a longer row goes by steps of 8 elements a thread, in two blocks a multiprocessor."""
    width = _power_of_2(C)
    if width > (16384 if dtype is torch.float32 else 32768):
        return StripTile(1, 1, 4096, 16)
    block_m = min(max(1024 // width, 1), 32)
    return StripTile(block_m, block_m, width, min(max(block_m * width // 512, 1), 32))


def layer_norm_bwd_tile(capability: int, dtype: torch.dtype, C: int) -> StripTile:
    """Rows of layer norm backward. 8 elements a thread, for three operands and two sums of each stay in registers; a row of
    more than 8192 (4096 of 16 bits on capability 12.0, where it spills) is cut into blocks of columns."""
    width = _power_of_2(C)
    if width > (4096 if capability == 120 and dtype is not torch.float32 else 8192):
        width = 2048
    block_m = min(max(2048 // width, 1), 64)
    return StripTile(block_m, block_m, width, min(max(block_m * width // 256, 1), 32))


def layer_norm_bwd_strips(tile: StripTile, C: int, N: int, multiprocessors: int) -> StripTile:
    """`layer_norm_bwd_tile`'s, in longer strips, each of which leaves partial sums: of 16 rows at least, so that those add at
    most a sixth to a 16-bit pass; else as many as give each multiprocessor 1024 threads."""
    programs = max(multiprocessors * 32 // tile.num_warps // -(-C // tile.block_n), 1)
    rows = -(-max(-(-N // programs), 16) // tile.block_m) * tile.block_m
    return dataclasses.replace(tile, rows=rows)


def layer_norm_means_block(num_warps: int) -> int:
    """Columns a step of the means of a long row: 8 elements a thread."""
    return num_warps * 256


# Positions of a batch that one program takes whole, so that batch norm is one launch each way.
BATCH_NORM_SMALL = 512


def batch_norm_tile(
    dtype: torch.dtype, N: int, C: int, L: int, multiprocessors: int, whole: bool
) -> StripTile:
    """Strips of batch norm's N x L positions, block_m positions x block_n channels at a time, 8 elements a thread.

    whole: a small batch may be a single strip, of few channels, for many programs: 64 bytes of each row. Else strips of 64
    positions at least, whose partial sums then add 4% to a 16-bit pass, and as many as give each multiprocessor 8 programs.
    """
    small = whole and N * L <= BATCH_NORM_SMALL
    if L == 1:
        width = (64 if small else 256) // dtype.itemsize
    else:
        # Channels that lie side by side in memory, so that a short run of positions does not leave half of what is read.
        width = _power_of_2(-(-64 // L))
    block_n = min(_power_of_2(C), width)
    # No function of N, so that a partial last batch compiles nothing new.
    block_m = max(1024 // block_n, 1)
    if small:
        return StripTile(BATCH_NORM_SMALL, block_m, block_n, 4)
    strips = max(8 * multiprocessors // -(-C // block_n), 1)
    rows = max(-(-N * L // strips), 64)
    return StripTile(-(-rows // block_m) * block_m, block_m, block_n, 4)


def dropout_tile(dtype: torch.dtype) -> FlatTile:
    """8 elements a thread: two numbers of the generator, four elements each."""
    return FlatTile(8 * 128, VECTOR_BYTES // dtype.itemsize, 4)


def optimizer_tile(itemsize: int, aligned: bool) -> FlatTile:
    """Sixteen elements a thread; `itemsize` is the widest operand's, whose vectors are 128 bits. Unaligned tensors take an
    address for each element: six operands of sixteen spill on 10.0 and 12.0, of eight they do not."""
    if aligned:
        return FlatTile(16 * 128, VECTOR_BYTES // itemsize, 4)
    return FlatTile(8 * 128, 1, 4)


# Partial sums that the optimizers' prologue adds at a time: eight 128-bit loads a thread in flight, since a pass over them
# waits for memory once a round.
PARTIALS = 4096


def loss_tile(dtype: torch.dtype) -> FlatTile:
    """As `activation_tile`: two 128-bit loads a thread of input and target, which already is twice its bytes under way."""
    return activation_tile(dtype)


def loss_programs(blocks: int) -> int:
    """Programs that sum `blocks` blocks of losses: one a block up to what fills the largest chip twice (16 of 128 threads a
    multiprocessor, 148 of those), so that the launch that adds their sums stays a few microseconds."""
    return min(blocks, 4096)


def loss_reduce_tile() -> FlatTile:
    """Four partial sums a thread in flight: at most four rounds of memory's latency."""
    return FlatTile(1024, 4, 8)


def multi_margin_tile(dtype: torch.dtype, C: int) -> StripTile:
    """Whole rows of up to 8192 columns, 16 elements a thread or 32 at most, so that backward reads them once; longer rows in
    steps of 4096."""
    width = _power_of_2(C)
    if width > 8192:
        return StripTile(1, 1, 4096, 8)
    block_m = max(1, min(2048 // width, 128))
    return StripTile(block_m, block_m, width, max(4, block_m * width // 512 // 2))


def _row_width(tile: RowTile | StripTile) -> int:
    return tile.lanes * tile.vector if isinstance(tile, RowTile) else tile.block_n


def variants(tile: Any, C: int | None = None) -> tuple[Any, ...]:
    """The FlatTile, RowTile or StripTile that a rule above chose, then those with half or twice its elements, its warps, or
    both, but no more than twice its elements a thread: what a measured table may hold in its place. Rows of C columns that a
    program holds whole are taken fewer or more at a time; those that go by steps keep to steps shorter than they are, since
    kernels are compiled for either."""
    if isinstance(tile, FlatTile):
        names = ["block"]
    elif _row_width(tile) >= (C or 0):
        names = ["block_m", "rows"] if isinstance(tile, StripTile) else ["block_m"]
    else:
        names = ["lanes"] if isinstance(tile, RowTile) else ["block_n"]
    found = []
    for times, over in ((1, 1), (1, 2), (2, 1)):
        sizes = {name: getattr(tile, name) * times // over for name in names}
        other = dataclasses.replace(tile, **sizes)
        if not all(sizes.values()) or (C and (_row_width(other) >= C) != (_row_width(tile) >= C)):
            continue
        for num_warps in (tile.num_warps, tile.num_warps // 2, 2 * tile.num_warps):
            if 1 <= num_warps <= 32 and times * tile.num_warps <= 2 * over * num_warps:
                found.append(dataclasses.replace(other, num_warps=num_warps))
    return tuple(found)
