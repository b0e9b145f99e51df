"""Softmax cross-entropy over the rows of [N, C] logits: one read forward, one read and one write backward.

    z_j = s x_j, or c tanh(s x_j / c);   lse = log sum_j exp z_j;   p_j = exp(z_j - lse)
    a_j = (1 - e) w_t [j = t] + e / C w_j    for a target class t, or    a_j = w_j ((1 - e) q_j + e / C)    for probabilities q
    loss_i = u_i (sum_j a_j (lse - z_j) + k lse^2)
    dloss_i / dz_j = u_i (A p_j - a_j),   A = sum_j a_j + 2 k lse;   dlse_i / dz_j = p_j;   dz_j / dx_j = s (1 - (z_j / c)^2)

with e the label smoothing, w the class weights, u the token weights, k the z-loss, c the soft cap and s the logit scale.
Probabilities are never stored. Kept per row for backward is the log-sum-exp in two parts, m = max_j z_j and
sum_j exp(z_j - m): the rounding of a large lse would be an error of every p_j, that of m cancels. The online softmax runs
per lane, so that no thread waits for another before the end of a row. With m subtracted all terms of a loss have one sign.

A row that does not begin on a 16-byte boundary is cut in head, body and tail: the body is whole 128-bit vectors, head and
tail are less than one each, and read element by element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import configs, tuning
from ._triton import _cast, device_limits, launch, tl, triton
from .activations import _tanh_fwd

__all__ = [
    "cross_entropy_bwd",
    "cross_entropy_extra_bwd",
    "cross_entropy_extra_fwd",
    "cross_entropy_fwd",
    "cross_entropy_fwd_grad",
    "scale_gradient",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Finite: a lane that saw only -inf then adds exp(-inf - LOWEST) = 0 and not exp(-inf + inf) = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Bits of FLAGS: what a launch needs. PROBABILITIES are targets; SMOOTH, SCALED, CAPPED and Z_LOSS are on; some rows do not
# begin or end on 16-byte boundaries (EDGES), and then target and gradient lie to those as the logits do (ALIGNED_*).
SMOOTH, PROBABILITIES, SCALED, CAPPED, Z_LOSS, EDGES, ALIGNED_T, ALIGNED_D = (
    tl.constexpr(1 << i) for i in range(8)
)
# Every column has a share in the loss.
SHARES = tl.constexpr(3)


@triton.jit
def _rows(
    target_ptr,
    weight_ptr,
    u_ptr,
    block,
    N,
    C,
    ignore_index,
    smoothing,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Row numbers, their targets (0 where none is readable), which rows count, whose target is a class, (1 - e) w_t, u.

    With probabilities every row counts, and none has a target.
    """
    rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < N
    if PROBABILITIES & FLAGS:
        target = tl.full((BLOCK_M,), -1, tl.int32)
        valid = live
        coefficient = tl.zeros((BLOCK_M,), tl.float32)
    else:
        target = tl.load(target_ptr + rows, mask=live, other=ignore_index)
        live = live & (target != ignore_index)
        valid = live & (target >= 0) & (target < C)
        # In 32 bits, to be compared with every column.
        target = tl.where(valid, target, 0).to(tl.int32)
        coefficient = tl.where(valid, 1.0 - smoothing, float("nan"))
        if weight_ptr is not None:
            coefficient *= tl.load(weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    u = 1.0
    if u_ptr is not None:
        u = tl.load(u_ptr + rows, mask=live, other=0.0).to(tl.float32)
    return rows, target, live, valid, coefficient, u


@triton.jit
def _cut(x_rows, C, FLAGS: tl.constexpr, BLOCK_M: tl.constexpr, VECTOR: tl.constexpr):
    """Lengths of each row's head and body: head up to the first 16-byte boundary, body in whole vectors. With EDGES a row has
    some."""
    if EDGES & FLAGS:
        head = (-x_rows.to(tl.int64) & 15).to(tl.int32) // (16 // VECTOR)
        # Spelled so, the compiler knows that a mask below body never cuts a vector.
        return head, (C - head) // VECTOR * VECTOR
    else:
        return tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_M,), tl.int32) + C


@triton.jit
def _bodies(row_ptrs, head, ALIGNED: tl.constexpr):
    """Pointers to the rows' bodies, on 16-byte boundaries if ALIGNED."""
    pointers = row_ptrs + head
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers[:, None, None]


@triton.jit
def _tile(LANES: tl.constexpr, VECTOR: tl.constexpr):
    return (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]


@triton.jit
def _edges(head, body, C, VECTOR: tl.constexpr):
    """Columns of head and tail, [BLOCK_M, 2 VECTOR, 1], and which of them exist."""
    lane = tl.arange(0, 2 * VECTOR)[None, :]
    cols = tl.where(lane < VECTOR, lane, (head + body)[:, None] + lane - VECTOR)
    known = tl.where(lane < VECTOR, lane < head[:, None], cols < C)
    return cols[:, :, None], known[:, :, None]


@triton.jit
def _read(x_ptrs, q_ptrs, weight_ptr, cols, live, known, C, knobs, EVICT: tl.constexpr, FLAGS: tl.constexpr):
    """A tile's logits z in float32, -inf where there are none; its columns' shares in the loss, which are a_j for
    probabilities and w_j for classes; and which of its elements there are. An ignored row is not read."""
    smoothing, _, softcap, logit_scale = knobs
    mask = live[:, None, None] & known
    z = tl.load(x_ptrs, mask=mask, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)
    if SCALED & FLAGS:
        z = z * logit_scale
    if CAPPED & FLAGS:
        z = _tanh_fwd(z / softcap, 0.0) * softcap
    if (SCALED | CAPPED) & FLAGS:
        z = tl.where(mask, z, float("-inf"))
    share = 1.0
    if PROBABILITIES & FLAGS:
        q = tl.load(q_ptrs, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        share = q * (1.0 - smoothing) + smoothing / C
    if SHARES & FLAGS:
        if weight_ptr is not None:
            # Where rows have no heads, all rows share the columns: their weights are read once.
            readable = mask if EDGES & FLAGS else cols < C
            share = share * tl.load(weight_ptr + cols, mask=readable, other=0.0).to(tl.float32)
    return z, share, mask


@triton.jit
def _lanes(BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """Each lane's m, s, a and b before it saw anything."""
    zero = tl.zeros((BLOCK_M, LANES), tl.float32)
    return tl.full((BLOCK_M, LANES), LOWEST, tl.float32), zero, zero, zero


@triton.jit
def _rebase(a, b, m, top):
    """sum_j a_j (z_j - top) from a = sum_j a_j (z_j - m) and b = sum_j a_j. Nothing was added yet where m is LOWEST."""
    return tl.where(m == LOWEST, a, a + b * (m - top))


@triton.jit
def _fold(sums, z, share, mask, FLAGS: tl.constexpr):
    """A tile [BLOCK_M, LANES, VECTOR] into the lanes' m = max z, s = sum exp(z - m), a = sum a_j (z_j - m), b = sum a_j."""
    m, s, a, b = sums
    new = tl.maximum(m, tl.max(z, 2))
    d = z - new[:, :, None]
    s = s * tl.exp2((m - new) * LOG2E) + tl.sum(tl.exp2(d * LOG2E), 2)
    if SHARES & FLAGS:
        a = _rebase(a, b, m, new) + tl.sum(tl.where(mask, share * d, 0.0), 2)
        # d <= 0 of every number: it puts the shares where the logits are, else they are summed in another order of threads.
        b += tl.sum(tl.where(mask & (d <= 0), share, 0.0), 2)
    return new, s, a, b


@triton.jit
def _meet(sums):
    """The lanes of each row as one."""
    m, s, a, b = sums
    top = tl.max(m, 1)
    a = tl.sum(_rebase(a, b, m, top[:, None]), 1)
    return top, tl.sum(s * tl.exp2((m - top[:, None]) * LOG2E), 1), a, tl.sum(b, 1)


@triton.jit
def _add_edges(
    sums, x_rows, q_rows, weight_ptr, head, body, live, C, knobs,
    FLAGS: tl.constexpr, BLOCK_M: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Heads and tails into the rows' sums."""
    top, total, a, b = sums
    cols, known = _edges(head, body, C, VECTOR)
    q_ptrs = q_rows[:, None, None] + cols
    z, share, mask = _read(
        x_rows[:, None, None] + cols, q_ptrs, weight_ptr, cols, live, known, C, knobs, "", FLAGS
    )
    m, s, edge_a, edge_b = _meet(_fold(_lanes(BLOCK_M, 2 * VECTOR), z, share, mask, FLAGS))
    new = tl.maximum(top, m)
    total = total * tl.exp2((top - new) * LOG2E) + s * tl.exp2((m - new) * LOG2E)
    return new, total, _rebase(a, b, top, new) + _rebase(edge_a, edge_b, m, new), b + edge_b


@triton.jit
def _finish(
    sums, x_rows, target, live, valid, coefficient, u, loss_ptr, stats_ptr, lse_ptr, correct_ptr, rows, N, C, knobs,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Stores the rows' losses, statistics, lse and whether the target has the largest logit; 0 where a row does not count."""
    top, total, a, b = sums
    smoothing, z_loss, softcap, logit_scale = knobs
    mask = rows < N
    log_total = tl.log2(total) * LN2
    lse = top + log_total
    if PROBABILITIES & FLAGS:
        loss = b * log_total - a
        tl.store(stats_ptr + 2 * tl.cast(N, tl.int64) + rows, b, mask=mask)
    else:
        z = tl.load(x_rows + target, mask=valid, other=float("nan")).to(tl.float32)
        if SCALED & FLAGS:
            z = z * logit_scale
        if CAPPED & FLAGS:
            z = _tanh_fwd(z / softcap, 0.0) * softcap
        loss = coefficient * (log_total - (z - top))
        if SMOOTH & FLAGS:
            loss += smoothing / C * (b * log_total - a)
        if correct_ptr is not None:
            # The maximum passes NaN over, the sum does not.
            correct = valid & (z >= top) & (total == total)
            tl.store(correct_ptr + rows, tl.where(correct, 1.0, 0.0), mask=mask)
    if Z_LOSS & FLAGS:
        loss += z_loss * lse * lse
    loss = tl.where(live, loss * u, 0.0)
    tl.store(loss_ptr + rows, _cast(loss, loss_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + rows, top, mask=mask)
    tl.store(stats_ptr + N + rows, total, mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, tl.where(live, lse, 0.0), mask=mask)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64, or [N, C] probabilities
    weight_ptr,  # [C] or None
    u_ptr,  # [N] or None: token weights
    loss_ptr,  # [N]
    stats_ptr,  # [2, N] float32: m, sum exp(z - m); with probabilities [3, N]: and sum_j a_j
    lse_ptr,  # [N] float32 or None
    correct_ptr,  # [N] float32 or None
    partial_ptr,  # [2, N, splits] float32: m, s; [4, N, splits] with shares: and a, b. None: one program has the whole row
    N,
    C,
    span,
    stride_xn,
    stride_tn,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    logit_scale,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program a block of rows, or one for every `span` columns of it."""
    knobs = (smoothing, z_loss, softcap, logit_scale)
    rows, target, live, valid, coefficient, u = _rows(
        target_ptr, weight_ptr, u_ptr, tl.program_id(0), N, C, ignore_index, smoothing, FLAGS, BLOCK_M
    )
    x_rows = x_ptr + rows * stride_xn
    q_rows = target_ptr + rows * stride_tn
    head, body = _cut(x_rows, C, FLAGS, BLOCK_M, VECTOR)
    x_bodies = _bodies(x_rows, head, (EDGES & FLAGS) > 0)
    q_bodies = _bodies(q_rows, head, (ALIGNED_T & FLAGS) > 0)
    sums = _lanes(BLOCK_M, LANES)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, C), LANES * VECTOR):
        cols = start + _tile(LANES, VECTOR)
        known = cols < body[:, None, None]
        columns = cols + head[:, None, None] if EDGES & FLAGS else cols
        z, share, mask = _read(
            x_bodies + cols, q_bodies + cols, weight_ptr, columns, live, known, C, knobs, "evict_first", FLAGS
        )
        sums = _fold(sums, z, share, mask, FLAGS)
    sums = _meet(sums)
    if EDGES & FLAGS:
        # Of a split row the first program takes the edges.
        mine = live & (rows * 0 + tl.program_id(1) == 0)
        sums = _add_edges(
            sums, x_rows, q_rows, weight_ptr, head, body, mine, C, knobs, FLAGS, BLOCK_M, VECTOR
        )
    if partial_ptr is not None:
        splits = tl.num_programs(1)
        each = tl.cast(N, tl.int64) * splits
        partial = partial_ptr + rows * splits + tl.program_id(1)
        m, s, a, b = sums
        tl.store(partial, m, mask=rows < N)
        tl.store(partial + each, s, mask=rows < N)
        if SHARES & FLAGS:
            tl.store(partial + 2 * each, a, mask=rows < N)
            tl.store(partial + 3 * each, b, mask=rows < N)
    else:
        _finish(
            sums, x_rows, target, live, valid, coefficient, u,
            loss_ptr, stats_ptr, lse_ptr, correct_ptr, rows, N, C, knobs, FLAGS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "C", "splits", "ignore_index"])
def _cross_entropy_combine_kernel(
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64; not read with probabilities
    weight_ptr,  # [C] or None
    u_ptr,  # [N] or None: token weights
    partial_ptr,  # [2 or 4, N, splits] float32: m, s, a, b
    loss_ptr,  # [N]
    stats_ptr,  # [2 or 3, N] float32
    lse_ptr,  # [N] float32 or None
    correct_ptr,  # [N] float32 or None
    N,
    C,
    splits,
    stride_xn,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    logit_scale,
    FLAGS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Second stage of a split row, one program each: its parts in a fixed tree, hence the same bits every time."""
    knobs = (smoothing, z_loss, softcap, logit_scale)
    rows, target, live, valid, coefficient, u = _rows(
        target_ptr, weight_ptr, u_ptr, tl.program_id(0), N, C, ignore_index, smoothing, FLAGS, 1
    )
    part = tl.arange(0, BLOCK_S)[None, :]
    mask = part < splits
    each = tl.cast(N, tl.int64) * splits
    partial = partial_ptr + rows[:, None] * splits + part
    m = tl.load(partial, mask=mask, other=LOWEST)
    s = tl.load(partial + each, mask=mask, other=0.0)
    a = tl.zeros_like(s)
    b = tl.zeros_like(s)
    if SHARES & FLAGS:
        a = tl.load(partial + 2 * each, mask=mask, other=0.0)
        b = tl.load(partial + 3 * each, mask=mask, other=0.0)
    _finish(
        _meet((m, s, a, b)), x_ptr + rows * stride_xn, target, live, valid, coefficient, u,
        loss_ptr, stats_ptr, lse_ptr, correct_ptr, rows, N, C, knobs, FLAGS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "C", "ignore_index"])
def _cross_entropy_reduce_kernel(
    losses_ptr,  # [N] float32, or None
    target_ptr,  # [N] int64, or None where every row counts
    weight_ptr,  # [C] or None
    u_ptr,  # [N] or None: token weights
    correct_ptr,  # [N] float32, or None
    loss_ptr,  # [1], or None
    denominator_ptr,  # [1] float32
    accuracy_ptr,  # [1] float32, or None
    N,
    C,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program and so a fixed order: the same bits every time."""
    loss = tl.zeros((BLOCK,), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.float32)
    correct = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        live = rows < N
        w = tl.where(live, 1.0, 0.0)
        if target_ptr is not None:
            target = tl.load(target_ptr + rows, mask=live, other=ignore_index)
            live = live & (target != ignore_index)
            w = tl.where(live, 1.0, 0.0)
            counted += w
            if weight_ptr is not None:
                known = live & (target >= 0) & (target < C)
                w = tl.load(weight_ptr + target, mask=known, other=0.0).to(tl.float32)
        if u_ptr is not None:
            w *= tl.load(u_ptr + rows, mask=live, other=0.0).to(tl.float32)
        denominator += w
        if losses_ptr is not None:
            loss += tl.load(losses_ptr + rows, mask=rows < N, other=0.0)
        if correct_ptr is not None:
            correct += tl.load(correct_ptr + rows, mask=rows < N, other=0.0)
    total = tl.sum(denominator, 0)
    if losses_ptr is not None:
        result = tl.sum(loss, 0)
        if MEAN:
            result = result / total
        tl.store(loss_ptr, _cast(result, loss_ptr.dtype.element_ty))
    tl.store(denominator_ptr, total)
    if correct_ptr is not None:
        tl.store(accuracy_ptr, tl.sum(correct, 0) / tl.sum(counted, 0))


@triton.jit
def _row_factors(g, coefficient, live, m, s, share_sum, dlse, C, knobs, FLAGS: tl.constexpr):
    """(m, scale, uniform, hit) with which dz_j = exp(z_j - m) scale - uniform share_j - hit [j = t]; g: u times dloss."""
    smoothing, z_loss, _, _ = knobs
    hit = tl.where(live, g * coefficient, 0.0)
    uniform = g if PROBABILITIES & FLAGS else g * smoothing / C
    scale = hit
    if SHARES & FLAGS:
        scale += uniform * share_sum
    if Z_LOSS & FLAGS:
        scale += g * (2.0 * z_loss) * (m + tl.log2(s) * LN2)
    return m, tl.where(live, (scale + dlse) / s, 0.0), uniform, hit


@triton.jit
def _share_sum(weight_sum_ptr, C, FLAGS: tl.constexpr):
    """sum_j w_j, where classes are smoothed."""
    if SMOOTH & FLAGS:
        return tl.load(weight_sum_ptr) if weight_sum_ptr is not None else tl.cast(C, tl.float32)
    else:
        return 0.0


@triton.jit
def _store_dx(dx_ptrs, z, share, cols, target, live, known, within, factors, knobs, FLAGS: tl.constexpr):
    """dx = dz dz/dx of a tile."""
    _, _, softcap, logit_scale = knobs
    m, scale, uniform, hit = factors
    d = tl.exp2((z - m[:, None, None]) * LOG2E) * scale[:, None, None]
    if SHARES & FLAGS:
        d -= uniform[:, None, None] * share
    if not (PROBABILITIES & FLAGS):
        d = tl.where(cols == target[:, None, None], d - hit[:, None, None], d)
    if CAPPED & FLAGS:
        t = z / softcap
        d *= 1.0 - t * t
    if SCALED & FLAGS:
        d *= logit_scale
    # Zero, whatever the logits of an ignored row are; its exp(-inf - m) times 0 is NaN where m is LOWEST.
    d = tl.where(live[:, None, None], d, 0.0)
    mask = within[:, None, None] & known
    tl.store(dx_ptrs, _cast(d, dx_ptrs.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _store_dtarget(
    dq_ptrs, weight_ptr, z, cols, live, known, within, g, m, s, C, smoothing, FLAGS: tl.constexpr
):
    """dq_j = g (1 - e) w_j (lse - z_j) of a tile."""
    d = (tl.log2(s) * LN2)[:, None, None] - (z - m[:, None, None])
    d *= (g * (1.0 - smoothing))[:, None, None]
    if weight_ptr is not None:
        readable = live[:, None, None] & known if EDGES & FLAGS else cols < C
        d *= tl.load(weight_ptr + cols, mask=readable, other=0.0).to(tl.float32)
    mask = within[:, None, None] & known
    tl.store(dq_ptrs, _cast(d, dq_ptrs.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr,  # [N], or one value with stride 0
    dlse_ptr,  # [N] or None
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64, or [N, C] probabilities
    weight_ptr,  # [C] or None
    weight_sum_ptr,  # [1] float32, or None where weight or smoothing is, or with probabilities
    u_ptr,  # [N] or None: token weights
    stats_ptr,  # [2, N] float32: m, sum exp(z - m); with probabilities [3, N]: and sum_j a_j
    denominator_ptr,  # [1] float32, or None where the reduction is no mean
    dx_ptr,  # [N, C], or None
    dtarget_ptr,  # [N, C], or None
    N,
    C,
    stride_xn,
    stride_tn,
    stride_dxn,
    stride_dloss,
    stride_dlse,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    logit_scale,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    knobs = (smoothing, z_loss, softcap, logit_scale)
    rows, target, live, _, coefficient, u = _rows(
        target_ptr, weight_ptr, u_ptr, tl.program_id(0), N, C, ignore_index, smoothing, FLAGS, BLOCK_M
    )
    within = rows < N
    g = tl.load(dloss_ptr + rows * stride_dloss, mask=within, other=0.0).to(tl.float32) * u
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr)
    g = tl.where(live, g, 0.0)
    m = tl.load(stats_ptr + rows, mask=within, other=0.0)
    s = tl.load(stats_ptr + N + rows, mask=within, other=1.0)
    if PROBABILITIES & FLAGS:
        share_sum = tl.load(stats_ptr + 2 * tl.cast(N, tl.int64) + rows, mask=within, other=0.0)
    else:
        share_sum = _share_sum(weight_sum_ptr, C, FLAGS)
    dlse = 0.0
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + rows * stride_dlse, mask=live, other=0.0).to(tl.float32)
    factors = _row_factors(g, coefficient, live, m, s, share_sum, dlse, C, knobs, FLAGS)

    x_rows = x_ptr + rows * stride_xn
    q_rows = target_ptr + rows * stride_tn
    head, body = _cut(x_rows, C, FLAGS, BLOCK_M, VECTOR)
    cols = tl.program_id(1) * (LANES * VECTOR) + _tile(LANES, VECTOR)
    known = cols < body[:, None, None]
    columns = cols + head[:, None, None] if EDGES & FLAGS else cols
    x_ptrs = _bodies(x_rows, head, (EDGES & FLAGS) > 0) + cols
    q_ptrs = _bodies(q_rows, head, (ALIGNED_T & FLAGS) > 0) + cols
    z, share, _ = _read(x_ptrs, q_ptrs, weight_ptr, columns, live, known, C, knobs, "evict_first", FLAGS)
    if dx_ptr is not None:
        dx_ptrs = _bodies(dx_ptr + rows * stride_dxn, head, (ALIGNED_D & FLAGS) > 0) + cols
        _store_dx(dx_ptrs, z, share, columns, target, live, known, within, factors, knobs, FLAGS)
    if dtarget_ptr is not None:
        dq_ptrs = _bodies(dtarget_ptr + rows * stride_dxn, head, (ALIGNED_D & FLAGS) > 0) + cols
        _store_dtarget(dq_ptrs, weight_ptr, z, columns, live, known, within, g, m, s, C, smoothing, FLAGS)
    if EDGES & FLAGS:
        cols, known = _edges(head, body, C, VECTOR)
        # One program takes a row's edges.
        known = known & (cols * 0 + tl.program_id(1) == 0)
        x_ptrs = x_rows[:, None, None] + cols
        q_ptrs = q_rows[:, None, None] + cols
        z, share, _ = _read(x_ptrs, q_ptrs, weight_ptr, cols, live, known, C, knobs, "", FLAGS)
        if dx_ptr is not None:
            dx_ptrs = (dx_ptr + rows * stride_dxn)[:, None, None] + cols
            _store_dx(dx_ptrs, z, share, cols, target, live, known, within, factors, knobs, FLAGS)
        if dtarget_ptr is not None:
            dq_ptrs = (dtarget_ptr + rows * stride_dxn)[:, None, None] + cols
            _store_dtarget(dq_ptrs, weight_ptr, z, cols, live, known, within, g, m, s, C, smoothing, FLAGS)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _cross_entropy_fwd_grad_kernel(
    x_ptr,  # [N, C]
    target_ptr,  # [N] int64
    weight_ptr,  # [C] or None
    weight_sum_ptr,  # [1] float32, or None where weight or smoothing is
    u_ptr,  # [N] or None: token weights
    denominator_ptr,  # [1] float32, or None where the reduction is no mean
    loss_ptr,  # [N] float32
    stats_ptr,  # [2, N] float32
    correct_ptr,  # [N] float32 or None
    dx_ptr,  # [N, C]
    N,
    C,
    stride_xn,
    stride_dxn,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    logit_scale,
    RESIDENT: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Losses, and their gradient for an upstream gradient of 1. RESIDENT: a tile holds the whole row, in registers, read
    once. Otherwise a row is read twice, the second time backwards and from the L2: no more rows are under way than there
    are programs."""
    knobs = (smoothing, z_loss, softcap, logit_scale)
    STEP: tl.constexpr = LANES * VECTOR
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.num_programs(0)):
        rows, target, live, valid, coefficient, u = _rows(
            target_ptr, weight_ptr, u_ptr, block, N, C, ignore_index, smoothing, FLAGS, BLOCK_M
        )
        within = rows < N
        x_rows = x_ptr + rows * stride_xn
        dx_rows = dx_ptr + rows * stride_dxn
        head, body = _cut(x_rows, C, FLAGS, BLOCK_M, VECTOR)
        x_bodies = _bodies(x_rows, head, (EDGES & FLAGS) > 0)
        dx_bodies = _bodies(dx_rows, head, (ALIGNED_D & FLAGS) > 0)
        sums = _lanes(BLOCK_M, LANES)
        if RESIDENT:
            cols = _tile(LANES, VECTOR)
            known = cols < body[:, None, None]
            columns = cols + head[:, None, None] if EDGES & FLAGS else cols
            z, share, mask = _read(
                x_bodies + cols, x_bodies, weight_ptr, columns, live, known, C, knobs, "evict_first", FLAGS
            )
            sums = _fold(sums, z, share, mask, FLAGS)
        else:
            for start in range(0, C, STEP):
                cols = start + _tile(LANES, VECTOR)
                known = cols < body[:, None, None]
                columns = cols + head[:, None, None] if EDGES & FLAGS else cols
                z, share, mask = _read(
                    x_bodies + cols, x_bodies, weight_ptr, columns, live, known, C, knobs, "evict_last", FLAGS
                )
                sums = _fold(sums, z, share, mask, FLAGS)
        sums = _meet(sums)
        if EDGES & FLAGS:
            sums = _add_edges(
                sums, x_rows, x_rows, weight_ptr, head, body, live, C, knobs, FLAGS, BLOCK_M, VECTOR
            )
        _finish(
            sums, x_rows, target, live, valid, coefficient, u,
            loss_ptr, stats_ptr, None, correct_ptr, rows, N, C, knobs, FLAGS,
        )  # fmt: skip
        g = tl.where(live, u, 0.0)
        if denominator_ptr is not None:
            g = g / tl.load(denominator_ptr)
        share_sum = _share_sum(weight_sum_ptr, C, FLAGS)
        factors = _row_factors(g, coefficient, live, sums[0], sums[1], share_sum, 0.0, C, knobs, FLAGS)
        if RESIDENT:
            _store_dx(dx_bodies + cols, z, share, columns, target, live, known, within, factors, knobs, FLAGS)
        else:
            last = tl.cdiv(C, STEP) * STEP - STEP
            for back in range(0, C, STEP):
                cols = last - back + _tile(LANES, VECTOR)
                known = cols < body[:, None, None]
                columns = cols + head[:, None, None] if EDGES & FLAGS else cols
                z, share, mask = _read(
                    x_bodies + cols,
                    x_bodies,
                    weight_ptr,
                    columns,
                    live,
                    known,
                    C,
                    knobs,
                    "evict_first",
                    FLAGS,
                )
                _store_dx(
                    dx_bodies + cols, z, share, columns, target, live, known, within, factors, knobs, FLAGS
                )
        if EDGES & FLAGS:
            cols, known = _edges(head, body, C, VECTOR)
            x_ptrs = x_rows[:, None, None] + cols
            z, share, mask = _read(x_ptrs, x_ptrs, weight_ptr, cols, live, known, C, knobs, "", FLAGS)
            dx_ptrs = dx_rows[:, None, None] + cols
            _store_dx(dx_ptrs, z, share, cols, target, live, known, within, factors, knobs, FLAGS)


@triton.jit
def _scale_kernel(
    dx_ptr,  # [n], in and out
    g_ptr,  # [1]
    n,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """dx *= g; nothing is read where g is 1."""
    g = tl.load(g_ptr).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    left = tl.where(g == 1.0, 0, left)
    # A mask below whole vectors, and the rest apart: only so are accesses wide.
    whole = left // VECTOR * VECTOR
    offs = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    d = tl.load(dx_ptr + start + offs, mask=offs < whole, other=0.0).to(tl.float32) * g
    tl.store(dx_ptr + start + offs, _cast(d, dx_ptr.dtype.element_ty), mask=offs < whole)
    offs = whole + tl.arange(0, VECTOR)
    d = tl.load(dx_ptr + start + offs, mask=offs < left, other=0.0).to(tl.float32) * g
    tl.store(dx_ptr + start + offs, _cast(d, dx_ptr.dtype.element_ty), mask=offs < left)


def _weight_sum(weight: torch.Tensor | None, label_smoothing: float) -> torch.Tensor | None:
    return weight.sum(dtype=torch.float32) if weight is not None and label_smoothing else None


def _unit_columns(x: torch.Tensor) -> torch.Tensor:
    """x itself where its columns lie side by side; rows may lie anywhere."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _phases(t: torch.Tensor) -> tuple[int, int]:
    """How the rows lie to 16-byte boundaries."""
    return t.data_ptr() % 16, t.stride(0) * t.element_size() % 16


def _flags(
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64, or [N, C] probabilities
    dx: torch.Tensor | None,  # [N, C]: what is written, if anything
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> int:
    """FLAGS of a launch."""
    C = x.shape[1]
    flags = 1 * (label_smoothing != 0) | 4 * (logit_scale != 1) | 8 * (softcap != 0) | 16 * (z_loss != 0)
    probabilities = target.is_floating_point()
    if probabilities:
        flags |= 2
    matrices = [t for t in (x, target if probabilities else None, dx) if t is not None]
    # The compiler itself knows of sizes, strides and addresses that they are multiples of 16.
    whole = C % 16 == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in matrices)
    if not whole and configs.cross_entropy_edges(x.dtype, C):
        flags |= 32
        own = _phases(x)
        flags |= 64 * (probabilities and _phases(target) == own) | 128 * (
            dx is not None and _phases(dx) == own
        )
    return flags


def _reduce(
    losses: torch.Tensor | None,  # [N] float32
    target: torch.Tensor,  # [N] int64, or [N, C] probabilities
    weight: torch.Tensor | None,  # [C]
    token_weights: torch.Tensor | None,  # [N]
    correct: torch.Tensor | None,  # [N] float32
    x: torch.Tensor,  # [N, C]
    reduction: str,
    ignore_index: int,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(loss [], denominator [1], accuracy []) over the rows."""
    N, C = x.shape
    loss = None if losses is None else torch.empty((), dtype=x.dtype, device=x.device)
    denominator = torch.empty(1, dtype=torch.float32, device=x.device)
    accuracy = None if correct is None else torch.empty((), dtype=torch.float32, device=x.device)
    probabilities = target.is_floating_point()
    launch(
        _cross_entropy_reduce_kernel,
        (1,),
        losses,
        None if probabilities else target,
        None if probabilities else weight,
        token_weights,
        correct,
        loss,
        denominator,
        accuracy,
        N,
        C,
        ignore_index,
        MEAN=reduction == "mean",
        BLOCK=1024,
        num_warps=8,
    )
    return loss, denominator, accuracy


def cross_entropy_fwd(
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor | None,  # [C]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss, stats [2, N], denominator [1], None for "none"): one launch, and a small one that reduces over the rows."""
    loss, _, _, stats, denominator = cross_entropy_extra_fwd(
        x, target, weight, None, reduction, ignore_index, label_smoothing, 0.0, 0.0, 1.0, False, False
    )
    return loss, stats, denominator


def cross_entropy_extra_fwd(
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64, or [N, C] probabilities
    weight: torch.Tensor | None,  # [C]
    token_weights: torch.Tensor | None,  # [N]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_lse: bool,
    return_accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(loss, lse [N], accuracy, stats, denominator [1]); a softcap of 0 is none.

    One launch, a second where rows are split between programs, and a small one that reduces over the rows. Bytes, with b
    those of an element: b for each logit of a row that counts (and for each probability), once; 8 N of targets; 8 N of
    statistics (12 N with probabilities), 4 N of lse, of accuracy and of losses to be reduced. A split row moves its partial
    sums out and in again: 16 bytes a program, 32 with probabilities or smoothing.
    """
    N, C = x.shape
    x = _unit_columns(x)
    probabilities = target.is_floating_point()
    target = _unit_columns(target) if probabilities else target.contiguous()
    weight, token_weights = _contiguous(weight), _contiguous(token_weights)
    reduced = reduction != "none"

    def rows(count: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((count, N) if count > 1 else N, dtype=dtype, device=x.device)

    losses = rows(dtype=torch.float32 if reduced else x.dtype)
    stats = rows(3 if probabilities else 2)
    lse = rows() if return_lse else None
    correct = rows() if return_accuracy else None
    tile = tuning.tile(x.device, configs.cross_entropy_tile, x.dtype, C, 2 if probabilities else 1)
    blocks = triton.cdiv(N, tile.block_m)
    splits, span = configs.cross_entropy_splits(tile, blocks, C, device_limits(x.device)[2])
    flags = _flags(x, target, None, label_smoothing, z_loss, softcap, logit_scale)
    partial = None
    if splits > 1:
        partial = torch.empty((4 if flags & 3 else 2, N, splits), dtype=torch.float32, device=x.device)
    launch(
        _cross_entropy_fwd_kernel,
        (blocks, splits),
        x,
        target,
        weight,
        token_weights,
        losses,
        stats,
        lse,
        correct,
        partial,
        N,
        C,
        span,
        x.stride(0),
        target.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        FLAGS=flags,
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    if partial is not None:
        launch(
            _cross_entropy_combine_kernel,
            (N,),
            x,
            target,
            weight,
            token_weights,
            partial,
            losses,
            stats,
            lse,
            correct,
            N,
            C,
            splits,
            x.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            FLAGS=flags,
            BLOCK_S=configs.cross_entropy_parts(splits),
            num_warps=1,
        )
    if not reduced:
        return losses, lse, correct, stats, None
    loss, denominator, accuracy = _reduce(
        losses, target, weight, token_weights, correct, x, reduction, ignore_index
    )
    assert loss is not None
    return loss, lse, accuracy, stats, denominator


def cross_entropy_fwd_grad(
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64
    weight: torch.Tensor | None,  # [C]
    token_weights: torch.Tensor | None,  # [N]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    return_accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, accuracy, stats, denominator, dx): dx [N, C] is the gradient for an upstream gradient of 1; "mean" or "sum".

    Three launches, or two for "sum": the denominator from the targets, losses and dx, the sum over the rows. Bytes, with b
    those of an element: 2 b N C are compulsory; requested are 2 b N C where registers hold a row
    (configs.cross_entropy_grad_tile), else 3 b N C, of which the L2 serves one.
    """
    N, C = x.shape
    x, target = _unit_columns(x), target.contiguous()
    weight, token_weights = _contiguous(weight), _contiguous(token_weights)
    denominator = None
    if reduction == "mean":
        _, denominator, _ = _reduce(None, target, weight, token_weights, None, x, reduction, ignore_index)
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    stats = torch.empty((2, N), dtype=torch.float32, device=x.device)
    correct = torch.empty(N, dtype=torch.float32, device=x.device) if return_accuracy else None
    dx = torch.empty((N, C), dtype=x.dtype, device=x.device)
    flags = _flags(x, target, dx, label_smoothing, z_loss, softcap, logit_scale)
    capability, _, multiprocessors = device_limits(x.device)
    tile = tuning.tile(
        x.device,
        configs.cross_entropy_grad_tile,
        capability,
        x.dtype,
        C,
        flags == 0,
        bool(label_smoothing),
    )
    resident = tile.lanes * tile.vector >= C
    blocks = triton.cdiv(N, tile.block_m)
    launch(
        _cross_entropy_fwd_grad_kernel,
        (blocks if resident else min(blocks, multiprocessors),),
        x,
        target,
        weight,
        _weight_sum(weight, label_smoothing),
        token_weights,
        denominator,
        losses,
        stats,
        correct,
        dx,
        N,
        C,
        x.stride(0),
        C,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        RESIDENT=resident,
        FLAGS=flags,
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    loss, again, accuracy = _reduce(
        losses, target, weight, token_weights, correct, x, reduction, ignore_index
    )
    assert loss is not None
    return loss, accuracy, stats, again, dx


def scale_gradient(dx: torch.Tensor, g: torch.Tensor) -> None:
    """dx *= g, in place, g one value on the device: nothing but g is read where it is 1, so 4 bytes a program; else each
    element is read and written once. dx is contiguous."""
    tile = configs.activation_tile(dx.dtype)
    launch(
        _scale_kernel,
        (triton.cdiv(dx.numel(), tile.block),),
        dx,
        g,
        dx.numel(),
        BLOCK=tile.block,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )


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
    dx, _ = cross_entropy_extra_bwd(
        dloss, None, x, target, weight, None, stats, denominator, reduction, ignore_index, label_smoothing,
        0.0, 0.0, 1.0, (True, False),
    )  # fmt: skip
    assert dx is not None
    return dx


def cross_entropy_extra_bwd(
    dloss: torch.Tensor,  # [N] or []
    dlse: torch.Tensor | None,  # [N]
    x: torch.Tensor,  # [N, C]
    target: torch.Tensor,  # [N] int64, or [N, C] probabilities
    weight: torch.Tensor | None,  # [C]
    token_weights: torch.Tensor | None,  # [N]
    stats: torch.Tensor,  # [2, N], with probabilities [3, N]
    denominator: torch.Tensor | None,  # [1]
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    needs: Sequence[bool],
    out: torch.Tensor | None = None,  # [N, C]: where dx goes, possibly x itself; only without dtarget
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dtarget), [N, C] and contiguous, as `needs` says, in one launch.

    Bytes, with b those of an element: b for each logit of a row that counts (and for each probability), once, b for each
    element written; 8 N of targets and 8 N of statistics (12 N with probabilities) once for every program of a row.
    """
    N, C = x.shape
    given = x
    x = _unit_columns(x)
    probabilities = target.is_floating_point()
    target = _unit_columns(target) if probabilities else target.contiguous()
    weight, token_weights = _contiguous(weight), _contiguous(token_weights)
    dx = dtarget = None
    # They share a stride.
    assert out is None or not needs[1]
    if needs[0]:
        dx = torch.empty((N, C), dtype=x.dtype, device=x.device) if out is None else out
        if dx is given:
            x = given
    if needs[1]:
        dtarget = torch.empty((N, C), dtype=x.dtype, device=x.device)
    written = dx if dx is not None else dtarget
    assert written is not None
    tile = tuning.tile(x.device, configs.cross_entropy_tile, x.dtype, C, 2 if probabilities else 1)
    launch(
        _cross_entropy_bwd_kernel,
        (triton.cdiv(N, tile.block_m), triton.cdiv(C, tile.lanes * tile.vector)),
        dloss,
        dlse,
        x,
        target,
        weight,
        None if probabilities else _weight_sum(weight, label_smoothing),
        token_weights,
        stats,
        denominator if reduction == "mean" else None,
        dx,
        dtarget,
        N,
        C,
        x.stride(0),
        target.stride(0),
        written.stride(0),
        dloss.stride(0) if dloss.dim() else 0,
        dlse.stride(0) if dlse is not None else 0,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        FLAGS=_flags(x, target, written, label_smoothing, z_loss, softcap, logit_scale),
        BLOCK_M=tile.block_m,
        LANES=tile.lanes,
        VECTOR=tile.vector,
        num_warps=tile.num_warps,
    )
    return dx, dtarget
