"""Multi-tensor optimizers: any number of tensors, of any number of parameter groups, in one launch.

A launch reaches its tensors through tables on the device: `table` holds each tensor's addresses and size, `chunks` says
which block of which tensor a program takes, `hyper` holds the numbers of each parameter group and `scalars` the
coefficients of each tensor's step. One launch cannot both advance the step counters and read them, so a small prologue
launch advances them and fills `scalars`; groups that differ only in numbers, or in which of the optional states they keep,
therefore share the launches. Clipping takes one launch more, before the prologue: partial sums of squares.

A rule is one JIT function, `_sgd_update` and its like, and the function that makes its row of `hyper`. It gets a gradient
that is unscaled, clipped, negated to maximize and with the L2 term added, and a parameter that has decayed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import configs, tuning
from ._triton import _cast, launch, tl, triton

__all__ = [
    "Launch",
    "Uploader",
    "adagrad_hyper",
    "adam_hyper",
    "layout",
    "partial_sums",
    "rmsprop_hyper",
    "sgd_hyper",
    "square_sums",
    "step",
    "unaligned",
]

# `table`: addresses, 0 for what a tensor does not have; the number of elements; the parameter group.
PARAM, GRAD, MASTER, STATE0, STATE1, STATE2, STEP, NUMEL, GROUP, COLUMNS = map(tl.constexpr, range(10))
# `hyper`: what every rule has, then four of its own.
H_LR, H_LR_DECAY, H_LOG1, H_LOG2, H_SIGN, H_L2, H_DECAY, H_OWN, HYPER = map(
    tl.constexpr, (0, 1, 2, 3, 4, 5, 6, 7, 12)
)
# `scalars`: the coefficients of one tensor's step, then the rule's own numbers.
S_SKIP, S_FACTOR, S_L2, S_DECAY, S_SIZE, S_ROOT, S_STEP, S_OWN, SCALARS = map(
    tl.constexpr, (0, 1, 2, 3, 4, 5, 6, 7, 12)
)
# Outside of kernels, where a constexpr is no int.
TABLE_WIDTH, HYPER_WIDTH, SCALARS_WIDTH, OWN = 9, 12, 12, 5
GRAD_COLUMN, STATE0_COLUMN, NUMEL_COLUMN = 1, 3, 7
ADDRESSES = slice(0, 6)

ROWS = 128  # tensors a program of the prologue takes
CHUNKS = 16  # chunks a program of the norm takes: 1 G elements leave the prologue 30,000 partial sums


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, within a few units in the last place: no cancellation near 0."""
    # Up to x^12 / 12!: the next term is below 2^-32 of the result.
    near = tl.maximum(x, -1.0)
    series = 1.0 + near * (1.0 / 12.0)
    for i in tl.static_range(11, 1, -1):
        series = 1.0 + near * series * (1.0 / i)
    return tl.where(x > -1.0, near * series, tl.exp(x) - 1.0)


@triton.jit(do_not_specialize=["T", "P"])
def _prologue_kernel(
    table_ptr,  # [T, COLUMNS] int64
    lr_address_ptr,  # [G] int64: where a group's learning rate is a tensor, else 0
    hyper_ptr,  # [G, HYPER] float32
    scalars_ptr,  # [T, SCALARS] float32
    partial_ptr,  # [P] float32 or None: sums of squares of all gradients
    norm_ptr,  # [] float32 or None: their norm
    grad_scale_ptr,  # [] float32 or None: gradients are to be divided by it
    found_inf_ptr,  # [] float32 or None: not 0 where the step is to be skipped
    T,
    P,
    max_norm,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    skip = tl.zeros([BLOCK], tl.float32)
    if found_inf_ptr is not None:
        skip += tl.load(found_inf_ptr)
    factor = 1.0
    if grad_scale_ptr is not None:
        factor = tl.div_rn(1.0, tl.load(grad_scale_ptr))
    if partial_ptr is not None:
        offs_p = tl.arange(0, BLOCK_P)
        sums = tl.zeros([BLOCK_P], tl.float32)
        for start in range(0, P, BLOCK_P):
            sums += tl.load(partial_ptr + start + offs_p, mask=start + offs_p < P, other=0.0)
        norm = tl.sqrt_rn(tl.sum(sums, 0)) * factor
        if tl.program_id(0) == 0:
            tl.store(norm_ptr, norm)
        clip = tl.div_rn(max_norm, norm + 1e-6)
        # torch.nn.utils.clip_grad_norm_ lets a norm of NaN through.
        factor = factor * tl.where(clip > 1.0, 1.0, clip)

    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < T
    row = table_ptr + tensor * COLUMNS
    step_address = tl.load(row + STEP, mask=mask, other=0)
    counted = step_address != 0
    step_ptrs = step_address.to(tl.pointer_type(tl.float32))
    # Where nothing counts it is always the first step.
    step = tl.load(step_ptrs, mask=counted, other=0.0) + 1.0
    tl.store(step_ptrs, step, mask=counted & (skip == 0.0))

    group = tl.load(row + GROUP, mask=mask, other=0)
    hyper = hyper_ptr + group * HYPER
    lr_address = tl.load(lr_address_ptr + group, mask=mask, other=0)
    lr_is_tensor = lr_address != 0
    lr_tensor = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=lr_is_tensor, other=0.0)
    lr = tl.where(lr_is_tensor, lr_tensor, tl.load(hyper + H_LR, mask=mask, other=0.0))
    correction1 = -_expm1(step * tl.load(hyper + H_LOG1, mask=mask, other=0.0))
    correction2 = -_expm1(step * tl.load(hyper + H_LOG2, mask=mask, other=0.0))
    annealed = tl.div_rn(lr, 1.0 + (step - 1.0) * tl.load(hyper + H_LR_DECAY, mask=mask, other=0.0))

    out = scalars_ptr + tensor * SCALARS
    tl.store(out + S_SKIP, skip, mask=mask)
    tl.store(out + S_FACTOR, tl.load(hyper + H_SIGN, mask=mask, other=0.0) * factor, mask=mask)
    tl.store(out + S_L2, tl.load(hyper + H_L2, mask=mask, other=0.0), mask=mask)
    tl.store(out + S_DECAY, 1.0 - lr * tl.load(hyper + H_DECAY, mask=mask, other=0.0), mask=mask)
    tl.store(out + S_SIZE, tl.div_rn(annealed, correction1), mask=mask)
    tl.store(out + S_ROOT, tl.sqrt_rn(correction2), mask=mask)
    tl.store(out + S_STEP, step, mask=mask)
    for i in tl.static_range(HYPER - H_OWN):
        tl.store(out + S_OWN + i, tl.load(hyper + H_OWN + i, mask=mask, other=0.0), mask=mask)


@triton.jit
def _lerp(start, end, weight, rest):
    """start + weight (end - start), rest being 1 - weight: from whichever end is nearer, as torch, so that 1 gives `end`."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - rest * (end - start))


@triton.jit
def _sgd_update(p, g, buffer, s1, s2, has0, has1, has2, scalars_ptr, STATES: tl.constexpr):
    direction = g
    if STATES & 1:
        momentum = tl.load(scalars_ptr + S_OWN)
        # The first gradient enters undampened.
        first = tl.load(scalars_ptr + S_STEP) == 1.0
        buffer = tl.where(first, g, momentum * buffer + tl.load(scalars_ptr + S_OWN + 1) * g)
        nesterov = tl.load(scalars_ptr + S_OWN + 2) != 0.0
        # Without a buffer momentum is 0 and every step the first: this is g.
        direction = tl.where(nesterov, g + momentum * buffer, buffer)
    p = p - tl.load(scalars_ptr + S_SIZE) * direction
    return p, buffer, s1, s2


@triton.jit
def _adagrad_update(p, g, total, s1, s2, has0, has1, has2, scalars_ptr, STATES: tl.constexpr):
    total = total + g * g
    denominator = tl.sqrt_rn(total) + tl.load(scalars_ptr + S_OWN)
    p = p - tl.load(scalars_ptr + S_SIZE) * tl.div_rn(g, denominator)
    return p, total, s1, s2


@triton.jit
def _rmsprop_update(p, g, v, mean, buffer, has0, has_mean, has2, scalars_ptr, STATES: tl.constexpr):
    alpha = tl.load(scalars_ptr + S_OWN)
    new = tl.load(scalars_ptr + S_OWN + 1)
    v = alpha * v + new * (g * g)
    variance = v
    if STATES & 2:
        mean = _lerp(mean, g, new, alpha)
        variance = tl.where(has_mean, v - mean * mean, v)
    direction = tl.div_rn(g, tl.sqrt_rn(variance) + tl.load(scalars_ptr + S_OWN + 2))
    if STATES & 4:
        # Without a buffer momentum is 0: this is the direction itself.
        buffer = tl.load(scalars_ptr + S_OWN + 3) * buffer + direction
        direction = buffer
    p = p - tl.load(scalars_ptr + S_SIZE) * direction
    return p, v, mean, buffer


@triton.jit
def _adam_update(p, g, m, v, v_max, has0, has1, has_max, scalars_ptr, STATES: tl.constexpr):
    m = _lerp(m, g, tl.load(scalars_ptr + S_OWN + 1), tl.load(scalars_ptr + S_OWN))
    v = v * tl.load(scalars_ptr + S_OWN + 2) + tl.load(scalars_ptr + S_OWN + 3) * (g * g)
    v_hat = v
    if STATES & 4:
        # NaN goes through from either.
        v_max = tl.where((v > v_max) | (v != v), v, v_max)
        v_hat = tl.where(has_max, v_max, v)
    denominator = tl.div_rn(tl.sqrt_rn(v_hat), tl.load(scalars_ptr + S_ROOT)) + tl.load(
        scalars_ptr + S_OWN + 4
    )
    p = p - tl.load(scalars_ptr + S_SIZE) * tl.div_rn(m, denominator)
    return p, m, v, v_max


@triton.jit
def _elements(row, COLUMN: tl.constexpr, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to element `start` of the tensor whose address is in a column of its row."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    # After the cast: a hint on the integer is lost.
    return tl.multiple_of(pointer + start, VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def _state_end(row, COLUMN: tl.constexpr, n):
    """n, or 0 where the tensor has no such state."""
    return tl.where(tl.load(row + COLUMN) != 0, n, 0)


@triton.jit
def _update_elements(
    row,
    scalars_ptr,
    start,
    offs,
    end,
    end0,
    end1,
    end2,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    MASTERS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Updates the elements start + offs for offs < end; of the states, each of which a tensor may lack, for offs < end0 and
    so on."""
    mask = offs < end
    p_ptrs = _elements(row, PARAM, start, PARAM_DTYPE, VECTOR) + offs
    g_ptrs = _elements(row, GRAD, start, GRAD_DTYPE, VECTOR) + offs
    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    if MASTERS:
        master_ptrs = _elements(row, MASTER, start, tl.float32, VECTOR) + offs
        p = tl.load(master_ptrs, mask=mask, other=0.0)
    else:
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    s0 = g
    s1 = g
    s2 = g
    if STATES & 1:
        s0_ptrs = _elements(row, STATE0, start, STATE_DTYPE, VECTOR) + offs
        s0 = tl.load(s0_ptrs, mask=offs < end0, other=0.0).to(tl.float32)
    if STATES & 2:
        s1_ptrs = _elements(row, STATE1, start, STATE_DTYPE, VECTOR) + offs
        s1 = tl.load(s1_ptrs, mask=offs < end1, other=0.0).to(tl.float32)
    if STATES & 4:
        s2_ptrs = _elements(row, STATE2, start, STATE_DTYPE, VECTOR) + offs
        s2 = tl.load(s2_ptrs, mask=offs < end2, other=0.0).to(tl.float32)

    g = g * tl.load(scalars_ptr + S_FACTOR)
    l2 = tl.load(scalars_ptr + S_L2)
    # 0 * p would make NaN of an infinite p.
    g = tl.where(l2 != 0.0, g + l2 * p, g)
    p = p * tl.load(scalars_ptr + S_DECAY)
    p, s0, s1, s2 = UPDATE(p, g, s0, s1, s2, end0 > 0, end1 > 0, end2 > 0, scalars_ptr, STATES)

    tl.store(p_ptrs, _cast(p, PARAM_DTYPE), mask=mask)
    if MASTERS:
        tl.store(master_ptrs, p, mask=mask)
    if STATES & 1:
        tl.store(s0_ptrs, _cast(s0, STATE_DTYPE), mask=offs < end0)
    if STATES & 2:
        tl.store(s1_ptrs, _cast(s1, STATE_DTYPE), mask=offs < end1)
    if STATES & 4:
        tl.store(s2_ptrs, _cast(s2, STATE_DTYPE), mask=offs < end2)


@triton.jit
def _multi_tensor_kernel(
    table_ptr,  # [T, COLUMNS] int64
    chunk_ptr,  # [C, 2] int32: tensor, block of it
    scalars_ptr,  # [T, SCALARS] float32
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,  # a bit for each of the states that some tensor has
    MASTERS: tl.constexpr,
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
    n = tl.where(tl.load(scalars + S_SKIP) != 0.0, 0, n)
    n0 = n
    n1 = n
    n2 = n
    if STATES & 1:
        n0 = _state_end(row, STATE0, n)
    if STATES & 2:
        n1 = _state_end(row, STATE1, n)
    if STATES & 4:
        n2 = _state_end(row, STATE2, n)
    # Wide accesses need a bound that is a multiple of the vector; the last few elements come after.
    end = n // VECTOR * VECTOR
    _update_elements(
        row, scalars, start, tl.arange(0, BLOCK), end,
        n0 // VECTOR * VECTOR, n1 // VECTOR * VECTOR, n2 // VECTOR * VECTOR,
        UPDATE, STATES, MASTERS, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, VECTOR,
    )  # fmt: skip
    if VECTOR > 1:
        if end != n:
            _update_elements(
                row, scalars, start, end + tl.arange(0, VECTOR), n, n0, n1, n2,
                UPDATE, STATES, MASTERS, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, VECTOR,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "C"])
def _square_sum_kernel(
    table_ptr,  # [T, COLUMNS] int64
    chunk_ptr,  # [C, 2] int32
    partial_ptr,  # [P] float32: this launch's sums start at `first`
    first,
    C,
    GRAD_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * CHUNKS
    offs = tl.arange(0, BLOCK)
    rest = tl.arange(0, VECTOR)
    sums = tl.zeros([BLOCK], tl.float32)
    rests = tl.zeros([VECTOR], tl.float32)
    for chunk in range(begin, tl.minimum(begin + CHUNKS, C)):
        tensor = tl.load(chunk_ptr + 2 * chunk)
        start = tl.load(chunk_ptr + 2 * chunk + 1).to(tl.int64) * BLOCK
        row = table_ptr + tensor * COLUMNS
        n = tl.minimum(tl.load(row + NUMEL) - start, BLOCK).to(tl.int32)
        end = n // VECTOR * VECTOR
        g_ptrs = _elements(row, GRAD, start, GRAD_DTYPE, VECTOR)
        g = tl.load(g_ptrs + offs, mask=offs < end, other=0.0).to(tl.float32)
        sums += g * g
        if VECTOR > 1:
            g = tl.load(g_ptrs + end + rest, mask=rest < n - end, other=0.0).to(tl.float32)
            rests += g * g
    tl.store(partial_ptr + first + tl.program_id(0), tl.sum(sums, 0) + tl.sum(rests, 0))


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


# The dtypes of parameter, gradient and states, and whether there is a float32 master of the parameter.
Kind = tuple[torch.dtype, torch.dtype, torch.dtype, bool]


@dataclasses.dataclass(frozen=True)
class Launch:
    """The tensors that share a launch: those of one kind, aligned to 16 bytes or not."""

    chunks: torch.Tensor  # [C, 2] int32, on the device
    kind: Kind
    states: int  # a bit for each of the states that some tensor has
    tile: configs.FlatTile


class Uploader:
    """Copies tables of one size to a device without waiting for it, from pinned memory that is used in turn.

    A buffer is written again only when the copy from it has been made, which an event tells; where the host is further
    ahead than that, there will be one buffer more. Under graph capture the copy is made at each replay, from the same
    memory, and neither pinning nor asking events may be allowed: such a copy takes a spare buffer, pinned before, that is
    never used again. `kept` holds both ends of it for the graph.
    """

    TURNS, SPARES = 3, 2

    def __init__(self, words: int, device: torch.device, kept: list[Any]) -> None:
        self.words = words
        self.device = device
        self.kept = kept
        self.turn = 0
        self.ring = [(self._pinned(), self._event()) for _ in range(self.TURNS)] if self._needed() else []
        self.spares = [self._pinned() for _ in range(self.SPARES)] if self._needed() else []

    def _needed(self) -> bool:
        return self.device.type == "cuda"

    def _pinned(self) -> torch.Tensor:
        return torch.empty(self.words, dtype=torch.int64, pin_memory=True)

    def _event(self) -> Any:
        # Not recorded here, which a capture would note; asked before it was recorded, it says that all is done.
        return torch.cuda.Event()

    def _record(self, event: Any) -> None:
        event.record(torch.cuda.current_stream(self.device))

    def capturing(self) -> bool:
        """Whether what is launched now is recorded only."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def __call__(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if not self._needed():
            return tensor.clone()
        if self.capturing():
            source = self.spares.pop() if self.spares else self._pinned()
            source.copy_(tensor)
            found = source.to(self.device, non_blocking=True)
            self.kept += [source, found]
            return found
        self.spares += [self._pinned() for _ in range(self.SPARES - len(self.spares))]
        if not self.ring[self.turn][1].query():
            self.ring.insert(self.turn, (self._pinned(), self._event()))
        source, event = self.ring[self.turn]
        self.turn = (self.turn + 1) % len(self.ring)
        source.copy_(tensor)
        found = source.to(self.device, non_blocking=True)
        self._record(event)
        return found


def _upload_once(array: np.ndarray, device: torch.device, kept: list[Any]) -> torch.Tensor:
    source = torch.from_numpy(array)
    if device.type == "cpu":
        return source
    source = source.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        kept.append(source)
    return source.to(device, non_blocking=True)


def layout(
    table: np.ndarray,  # [T, COLUMNS] int64
    kinds: Sequence[Kind],  # of each tensor
    device: torch.device,
    kept: list[Any],
) -> list[Launch]:
    """The launches that these tensors need: one a combination of dtypes, and one more where tensors of it have an address
    that is not a multiple of 16 bytes. `kept` holds what a graph that is being captured reads."""
    members: dict[tuple[Kind, bool], list[int]] = {}
    for i, key in enumerate(zip(kinds, unaligned(table), strict=True)):
        members.setdefault(key, []).append(i)
    found: list[Launch] = []
    for (kind, scalar), tensors in members.items():
        rows = table[tensors]
        states = sum(bool(rows[:, STATE0_COLUMN + i].any()) << i for i in range(3))
        param, grad, state, masters = kind
        widest = max(param.itemsize, grad.itemsize, state.itemsize if states else 0, 4 * masters)
        tile = tuning.tile(device, configs.optimizer_tile, widest, not scalar)
        counts = -(-rows[:, NUMEL_COLUMN] // tile.block)
        chunks = np.empty((int(counts.sum()), 2), np.int32)
        chunks[:, 0] = np.repeat(tensors, counts)
        chunks[:, 1] = np.arange(len(chunks)) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(chunks):
            found.append(Launch(_upload_once(chunks, device, kept), kind, states, tile))
    return found


def unaligned(table: np.ndarray) -> list[bool]:
    """Which tensors have an address that is not a multiple of 16 bytes."""
    found: list[bool] = (
        np.bitwise_or.reduce(table[:, ADDRESSES], axis=1) % configs.VECTOR_BYTES != 0
    ).tolist()
    return found


def _hyper_row(
    lr: float,
    *own: float,
    weight_decay: float,
    maximize: bool,
    decoupled: bool = False,
    lr_decay: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
) -> tuple[float, ...]:
    """A group's row of `hyper`. Differences from 1 and logarithms are taken in float64."""
    log1, log2 = (math.log(beta) if beta else -math.inf for beta in betas)
    sign = -1.0 if maximize else 1.0
    l2, decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    return lr, lr_decay, log1, log2, sign, l2, decay, *own, *[0.0] * (OWN - len(own))


def sgd_hyper(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool
) -> tuple[float, ...]:
    """A group's row of `hyper` for `_sgd_update`."""
    own = (momentum, 1 - dampening, float(nesterov))
    return _hyper_row(lr, *own, weight_decay=weight_decay, maximize=maximize)


def adagrad_hyper(
    lr: float, lr_decay: float, eps: float, weight_decay: float, maximize: bool
) -> tuple[float, ...]:
    """A group's row of `hyper` for `_adagrad_update`."""
    return _hyper_row(lr, eps, weight_decay=weight_decay, maximize=maximize, lr_decay=lr_decay)


def rmsprop_hyper(
    lr: float, alpha: float, eps: float, weight_decay: float, momentum: float, maximize: bool
) -> tuple[float, ...]:
    """A group's row of `hyper` for `_rmsprop_update`."""
    return _hyper_row(lr, alpha, 1 - alpha, eps, momentum, weight_decay=weight_decay, maximize=maximize)


def adam_hyper(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, maximize: bool
) -> tuple[float, ...]:
    """A group's row of `hyper` for `_adam_update`."""
    own = (beta1, 1 - beta1, beta2, 1 - beta2, eps)
    betas = (beta1, beta2)
    return _hyper_row(
        lr, *own, weight_decay=weight_decay, maximize=maximize, decoupled=decoupled, betas=betas
    )


def partial_sums(launches: Sequence[Launch]) -> int:
    """How many sums `square_sums` writes."""
    return sum(-(-part.chunks.shape[0] // CHUNKS) for part in launches)


def square_sums(
    table: torch.Tensor,  # [T, COLUMNS] int64
    launches: Sequence[Launch],
    partials: torch.Tensor,  # [P] float32, P = partial_sums(launches)
) -> None:
    """Partial sums of the squares of all gradients, for `step`."""
    first = 0
    for part in launches:
        programs = -(-part.chunks.shape[0] // CHUNKS)
        launch(
            _square_sum_kernel,
            (programs,),
            table,
            part.chunks,
            partials,
            first,
            part.chunks.shape[0],
            GRAD_DTYPE=_triton_dtype(part.kind[1]),
            BLOCK=part.tile.block,
            VECTOR=part.tile.vector,
            CHUNKS=CHUNKS,
            num_warps=part.tile.num_warps,
        )
        first += programs


def step(
    update: Any,  # the rule's JIT function
    table: torch.Tensor,  # [T, COLUMNS] int64
    lr_address: torch.Tensor,  # [G] int64
    hyper: torch.Tensor,  # [G, HYPER] float32
    scalars: torch.Tensor,  # [T, SCALARS] float32
    launches: Sequence[Launch],
    *,
    partials: torch.Tensor | None = None,  # [P] float32: clip to max_norm by these sums of squares
    norm: torch.Tensor | None = None,  # [] float32: where to leave the norm
    max_norm: float = 0.0,
    grad_scale: torch.Tensor | None = None,  # [] float32
    found_inf: torch.Tensor | None = None,  # [] float32
) -> None:
    """One step of every tensor in the table: the prologue, then a launch for each of `launches`."""
    tensors = scalars.shape[0]
    launch(
        _prologue_kernel,
        (-(-tensors // ROWS),),
        table,
        lr_address,
        hyper,
        scalars,
        partials,
        norm,
        grad_scale,
        found_inf,
        tensors,
        0 if partials is None else partials.shape[0],
        max_norm,
        BLOCK=ROWS,
        BLOCK_P=configs.PARTIALS,
        num_warps=4,
    )
    for part in launches:
        param, grad, state = map(_triton_dtype, part.kind[:3])
        launch(
            _multi_tensor_kernel,
            (part.chunks.shape[0],),
            table,
            part.chunks,
            scalars,
            UPDATE=update,
            STATES=part.states,
            MASTERS=part.kind[3],
            PARAM_DTYPE=param,
            GRAD_DTYPE=grad,
            STATE_DTYPE=state,
            BLOCK=part.tile.block,
            VECTOR=part.tile.vector,
            num_warps=part.tile.num_warps,
        )
