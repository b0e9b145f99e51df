"""Multi-tensor Adam and AdamW: any number of tensors, of any number of parameter groups, in one launch.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

with g + wd p for g and no decay of p where the decay is L2 (Adam), and max(v) for v with amsgrad. A launch reaches its
tensors through tables on the device: `table` holds each tensor's addresses and size, `chunks` says which block of which
tensor a program takes, `scalars` holds the coefficients of each tensor's step. One launch cannot both advance the step
counters and read them, so a small prologue launch advances them and fills `scalars`; groups that differ only in numbers,
and optional state, therefore share the launches. Nothing here depends on which rule it is but `_adam_prologue_kernel`
and `_adam_update`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import configs
from ._triton import _cast, launch, tl, triton

__all__ = ["Launch", "Uploader", "adam_hyper", "adam_step", "layout", "unaligned"]

# `table`: addresses, the number of elements, the address of the step counter, the parameter group.
PARAM, GRAD, STATE0, STATE1, STATE2, NUMEL, STEP, GROUP, COLUMNS = map(tl.constexpr, range(9))
# `hyper`: a group's numbers.
H_LR, H_LOG1, H_LOG2, H_BETA1, H_BETA2, H_NEW1, H_NEW2, H_EPS, H_L2, H_DECAY, H_SIGN, HYPER = map(
    tl.constexpr, range(12)
)
# `scalars`: the coefficients of one tensor's step.
S_SIGN, S_L2, S_DECAY, S_BETA1, S_NEW1, S_BETA2, S_NEW2, S_ROOT, S_EPS, S_SIZE = map(tl.constexpr, range(10))
SCALARS = tl.constexpr(16)
# Outside of kernels, where a constexpr is no int.
ADDRESSES, GRAD_COLUMN, STATE2_COLUMN, NUMEL_COLUMN = slice(0, 5), 1, 4, 5
TABLE_WIDTH, HYPER_WIDTH, SCALARS_WIDTH = 8, 11, 16

ROWS = 128  # tensors a program of the prologue takes; tables are padded to a multiple of it


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, within a few units in the last place: no cancellation near 0."""
    # Up to x^12 / 12!: the next term is below 2^-32 of the result.
    near = tl.maximum(x, -1.0)
    series = 1.0 + near * (1.0 / 12.0)
    for i in tl.static_range(11, 1, -1):
        series = 1.0 + near * series * (1.0 / i)
    return tl.where(x > -1.0, near * series, tl.exp(x) - 1.0)


@triton.jit
def _adam_prologue_kernel(
    table_ptr,  # [T, COLUMNS] int64
    lr_address_ptr,  # [G] int64: where a group's learning rate is a tensor, else 0
    hyper_ptr,  # [G, HYPER] float32
    scalars_ptr,  # [T, SCALARS] float32
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table_ptr + tensor * COLUMNS
    step_address = tl.load(row + STEP)
    live = step_address != 0
    step_ptrs = step_address.to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptrs, mask=live, other=0.0) + 1.0
    tl.store(step_ptrs, step, mask=live)

    group = tl.load(row + GROUP)
    hyper = hyper_ptr + group * HYPER
    lr_address = tl.load(lr_address_ptr + group)
    lr_is_tensor = lr_address != 0
    lr_tensor = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=lr_is_tensor, other=0.0)
    lr = tl.where(lr_is_tensor, lr_tensor, tl.load(hyper + H_LR))
    correction1 = -_expm1(step * tl.load(hyper + H_LOG1))
    correction2 = -_expm1(step * tl.load(hyper + H_LOG2))

    out = scalars_ptr + tensor * SCALARS
    tl.store(out + S_SIGN, tl.load(hyper + H_SIGN), mask=live)
    tl.store(out + S_L2, tl.load(hyper + H_L2), mask=live)
    tl.store(out + S_DECAY, 1.0 - lr * tl.load(hyper + H_DECAY), mask=live)
    tl.store(out + S_BETA1, tl.load(hyper + H_BETA1), mask=live)
    tl.store(out + S_NEW1, tl.load(hyper + H_NEW1), mask=live)
    tl.store(out + S_BETA2, tl.load(hyper + H_BETA2), mask=live)
    tl.store(out + S_NEW2, tl.load(hyper + H_NEW2), mask=live)
    tl.store(out + S_ROOT, tl.sqrt_rn(correction2), mask=live)
    tl.store(out + S_EPS, tl.load(hyper + H_EPS), mask=live)
    tl.store(out + S_SIZE, tl.div_rn(lr, correction1), mask=live)


@triton.jit
def _adam_update(p, g, m, v, v_max, has_max, scalars_ptr, STATES: tl.constexpr):
    """The parameter and the states after one step, all float32; v_max counts where has_max says so."""
    g = g * tl.load(scalars_ptr + S_SIGN)
    l2 = tl.load(scalars_ptr + S_L2)
    # 0 * p would make NaN of an infinite p.
    g = tl.where(l2 != 0.0, g + l2 * p, g)
    p = p * tl.load(scalars_ptr + S_DECAY)
    new1 = tl.load(scalars_ptr + S_NEW1)
    # torch.lerp: from whichever end is nearer, so that b1 = 0 gives g itself.
    m = tl.where(new1 < 0.5, m + new1 * (g - m), g - tl.load(scalars_ptr + S_BETA1) * (g - m))
    v = v * tl.load(scalars_ptr + S_BETA2) + tl.load(scalars_ptr + S_NEW2) * (g * g)
    v_hat = v
    if STATES == 3:
        # NaN goes through from either.
        v_max = tl.where((v > v_max) | (v != v), v, v_max)
        v_hat = tl.where(has_max, v_max, v)
    denominator = tl.div_rn(tl.sqrt_rn(v_hat), tl.load(scalars_ptr + S_ROOT)) + tl.load(scalars_ptr + S_EPS)
    p = p - tl.load(scalars_ptr + S_SIZE) * tl.div_rn(m, denominator)
    return p, m, v, v_max


@triton.jit
def _elements(row, COLUMN: tl.constexpr, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to element `start` of the tensor whose address is in a column of its row."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    # After the cast: a hint on the integer is lost.
    return tl.multiple_of(pointer + start, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def _update_elements(
    row,
    scalars_ptr,
    start,
    offs,
    end,
    end2,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Updates the elements start + offs for offs < end; of the third state, which a tensor may lack, for offs < end2."""
    p_ptrs = _elements(row, PARAM, start, PARAM_DTYPE, VECTOR) + offs
    g_ptrs = _elements(row, GRAD, start, GRAD_DTYPE, VECTOR) + offs
    s0_ptrs = _elements(row, STATE0, start, STATE_DTYPE, VECTOR) + offs
    s1_ptrs = _elements(row, STATE1, start, STATE_DTYPE, VECTOR) + offs
    mask = offs < end
    p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    s0 = tl.load(s0_ptrs, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(s1_ptrs, mask=mask, other=0.0).to(tl.float32)
    if STATES == 3:
        s2_ptrs = _elements(row, STATE2, start, STATE_DTYPE, VECTOR) + offs
        s2 = tl.load(s2_ptrs, mask=offs < end2, other=0.0).to(tl.float32)
        p, s0, s1, s2 = UPDATE(p, g, s0, s1, s2, end2 > 0, scalars_ptr, STATES)
        tl.store(s2_ptrs, _cast(s2, STATE_DTYPE), mask=offs < end2)
    else:
        p, s0, s1, _ = UPDATE(p, g, s0, s1, s1, False, scalars_ptr, STATES)
    tl.store(p_ptrs, _cast(p, PARAM_DTYPE), mask=mask)
    tl.store(s0_ptrs, _cast(s0, STATE_DTYPE), mask=mask)
    tl.store(s1_ptrs, _cast(s1, STATE_DTYPE), mask=mask)


@triton.jit
def _multi_tensor_kernel(
    table_ptr,  # [T, COLUMNS] int64
    chunk_ptr,  # [C, 2] int32: tensor, block of it
    scalars_ptr,  # [T, SCALARS] float32
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk_ptr + 2 * chunk)
    start = tl.load(chunk_ptr + 2 * chunk + 1).to(tl.int64) * BLOCK
    row = table_ptr + tensor * COLUMNS
    scalars = scalars_ptr + tensor * SCALARS
    n = tl.minimum(tl.load(row + NUMEL) - start, BLOCK).to(tl.int32)
    n2 = n
    if STATES == 3:
        n2 = tl.where(tl.load(row + STATE2) != 0, n, 0)
    # Wide accesses need a bound that is a multiple of the vector; the last few elements come after.
    end = n // VECTOR * VECTOR
    end2 = n2 // VECTOR * VECTOR
    offs = tl.arange(0, BLOCK)
    _update_elements(
        row, scalars, start, offs, end, end2, UPDATE, STATES, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, VECTOR
    )
    if VECTOR > 1:
        if end != n:
            rest = end + tl.arange(0, VECTOR)
            _update_elements(
                row, scalars, start, rest, n, n2, UPDATE, STATES, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, VECTOR
            )


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient, states


@dataclasses.dataclass(frozen=True)
class Launch:
    """The tensors that share a launch: those of equal dtypes, aligned to 16 bytes or not."""

    chunks: torch.Tensor  # [C, 2] int32, on the device
    dtypes: Dtypes
    states: int
    tile: configs.FlatTile


class Uploader:
    """Copies arrays to one device without waiting for it.

    Under graph capture such a copy is made at each replay, from the same host memory: `kept` holds both ends of it. Pinning
    memory may not be allowed then, so the last source under each name stays at hand.
    """

    def __init__(self, device: torch.device, kept: list[Any]) -> None:
        self.device = device
        self.kept = kept
        self.sources: dict[str, torch.Tensor] = {}

    def capturing(self) -> bool:
        """Whether what is launched now is recorded only."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def __call__(self, name: str, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        capturing = self.capturing()
        source = self.sources.pop(name, None) if capturing else None
        if source is None or source.shape != tensor.shape:
            # Pinned memory that was let go comes back only after the copy from it: PyTorch's allocator sees to that.
            source = torch.empty_like(tensor, pin_memory=True)
        source.copy_(tensor)
        found = source.to(self.device, non_blocking=True)
        if capturing:
            self.kept += [source, found]
        else:
            self.sources[name] = source
        return found


def layout(
    table: np.ndarray,  # [T, COLUMNS] int64
    dtypes: Sequence[Dtypes],  # of each tensor; padding rows have none
    upload: Uploader,
) -> list[Launch]:
    """The launches that these tensors need: one a combination of dtypes, and one more where tensors of it have an address
    that is not a multiple of 16 bytes."""
    members: dict[tuple[Dtypes, bool], list[int]] = {}
    for i, key in enumerate(zip(dtypes, unaligned(table), strict=False)):
        members.setdefault(key, []).append(i)
    found: list[Launch] = []
    for (kinds, scalar), tensors in members.items():
        rows = table[tensors]
        tile = configs.adam_tile(max(kind.itemsize for kind in kinds), not scalar)
        counts = -(-rows[:, NUMEL_COLUMN] // tile.block)
        chunks = np.empty((int(counts.sum()), 2), np.int32)
        chunks[:, 0] = np.repeat(tensors, counts)
        chunks[:, 1] = np.arange(len(chunks)) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(chunks):
            states = 3 if rows[:, STATE2_COLUMN].any() else 2
            found.append(Launch(upload(f"chunks {len(found)}", chunks), kinds, states, tile))
    return found


def unaligned(table: np.ndarray) -> list[bool]:
    """Which tensors have an address that is not a multiple of 16 bytes."""
    found: list[bool] = (
        np.bitwise_or.reduce(table[:, ADDRESSES], axis=1) % configs.VECTOR_BYTES != 0
    ).tolist()
    return found


def adam_hyper(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, maximize: bool
) -> tuple[float, ...]:
    """A group's row of `hyper`. Differences from 1 and logarithms are taken here, in float64."""
    return (
        lr,
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        eps,
        0.0 if decoupled else weight_decay,
        weight_decay if decoupled else 0.0,
        -1.0 if maximize else 1.0,
    )


def adam_step(
    table: torch.Tensor,  # [T, COLUMNS] int64, T a multiple of ROWS, padding rows 0
    lr_address: torch.Tensor,  # [G] int64
    hyper: torch.Tensor,  # [G, HYPER] float32
    scalars: torch.Tensor,  # [T, SCALARS] float32
    launches: Sequence[Launch],
) -> None:
    """One step of every tensor in the table: the prologue, then a launch for each of `launches`."""
    launch(
        _adam_prologue_kernel,
        (table.shape[0] // ROWS,),
        table,
        lr_address,
        hyper,
        scalars,
        BLOCK=ROWS,
        num_warps=4,
    )
    for part in launches:
        param, grad, state = map(_triton_dtype, part.dtypes)
        launch(
            _multi_tensor_kernel,
            (part.chunks.shape[0],),
            table,
            part.chunks,
            scalars,
            UPDATE=_adam_update,
            STATES=part.states,
            PARAM_DTYPE=param,
            GRAD_DTYPE=grad,
            STATE_DTYPE=state,
            BLOCK=part.tile.block,
            VECTOR=part.tile.vector,
            num_warps=part.tile.num_warps,
        )
