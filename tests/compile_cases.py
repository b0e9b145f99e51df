"""Launches to compile for GPUs that are not there: run as `python tests/compile_cases.py CAPABILITY [--all]` it prints one
JSON line a case; with --epilogues the instructions that each activation costs, with --buckets how many binaries a range of
batch sizes takes. Not a test: tests/test_compile.py runs the chosen cases, tests/sweep_compile.py all reachable ones, each
in a process of its own, since compiled and interpreted kernels never share one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from dlgpu.bench import launches, machine_code
from dlgpu.kernels import (
    activations,
    batch_norm,
    configs,
    cross_entropy,
    dropout,
    gated,
    layer_norm,
    linear,
    linear_cross_entropy,
    losses,
    optimizers,
    softmax,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    """A launch, and what its machine code must show."""

    name: str
    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]
    # The opcode prefix that tl.dot must become, None for kernels without one.
    matrix: str | None = None
    # 128-bit loads are expected, for the operands are aligned; and 128-bit stores, for the result is a matrix.
    wide: bool = True
    wide_stores: bool = True
    # Loads are descriptors' transfers.
    tma: bool = False


def matrix_instruction(capability: int, dtype: torch.dtype, precision: str) -> str | None:
    """What tl.dot becomes; None for float32 products in registers."""
    if dtype is FP32 and precision == "ieee":
        return None
    if capability == 90:
        return "HGMMA"
    return "UTCHMMA" if capability == 100 else "HMMA"


def launched(capability: int, call: Callable[[], Any]) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, its arguments by name, options) of each launch that `call`, on meta tensors, would make on a GPU of this
    capability: what is compiled is what is launched."""
    limits = (capability, machine_code.shared_memory_limit(capability), 132)
    return [(launch.kernel, launch.args, launch.options) for launch in launches.launched(limits, call)]


def linear_cases(
    capability: int,
    dtype: torch.dtype,
    product: str,
    M: int,
    N: int,
    K: int,
    activation: str | None = None,
    bias: bool = False,
    save_z: bool = False,
    precision: str = "ieee",
    dropout: bool = False,
) -> Iterator[Case]:
    """A product of a layer with N outputs and K inputs, on a batch of M: "fwd" act(x w^T + b), "dx" dZ W, "dz" dZ W times
    the gradient of the activation beneath, with its column sums, "dw" dZ^T X; dropout of what "fwd" and "dz" make. None
    where cuBLAS multiplies."""
    x, w, dz = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, K), (N, K), (M, N)))
    b = torch.empty(N, dtype=dtype, device="meta") if bias else None
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    drop = linear.Drop(seed, 0.1, 1 / 0.9) if dropout else None
    calls = {
        "fwd": lambda: linear._product(x, w.t(), bias=b, activation=activation, save_z=save_z, drop=drop),
        "dx": lambda: linear.linear_dgrad(dz, w),
        "dz": lambda: linear._product(dz, w, saved=x, activation=activation, sums=True, drop=drop),
        "dw": lambda: linear._product(dz.t(), x, split=True),
    }
    with mock.patch.object(linear, "matmul_precision", return_value=precision):
        found = launched(capability, calls[product])
    columns = N if product == "fwd" else K
    vector = 16 // dtype.itemsize
    for kernel, args, options in found:
        name = (
            f"{kernel.__name__} {product} {dtype} {M}x{N}x{K} {activation} bias={bias} z={save_z} {precision} "
            f"dropout={dropout}"
        )
        if kernel is linear._sum_kernel:
            yield Case(name, kernel, args, options, wide=False, wide_stores=False)
            continue
        tma = kernel is linear._linear_tma_kernel
        # From 9.0 on tensor cores take a transposed operand in 16 bits only: tf32 is transposed by 32-bit loads.
        turned = precision == "tf32" and capability in (90, 100) and product != "fwd"
        yield Case(
            name,
            kernel,
            args,
            options,
            matrix_instruction(capability, dtype, precision),
            wide=tma or (args["ALIGNED"] and not turned),
            wide_stores=columns % vector == 0,
            tma=tma,
        )


def gated_cases(
    capability: int,
    dtype: torch.dtype,
    product: str,
    M: int,
    H: int,
    K: int,
    activation: str | None,
    save: bool = True,
    precision: str = "ieee",
) -> Iterator[Case]:
    """A launch of a gated unit with H gated columns: "fwd" from x [M, K], "dgrad" from dy [M, K], "bwd" from dh. None where
    cuBLAS multiplies."""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    calls = {
        "fwd": lambda: gated.gated_fwd(matrix(M, K), matrix(2 * H, K), matrix(2 * H), activation, 0.0, save),
        "dgrad": lambda: gated.gated_dgrad(
            matrix(M, K), matrix(K, H), matrix(M, 2 * H), activation, 0.0, True, save, save
        ),
        "bwd": lambda: gated.gated_bwd(matrix(M, H), matrix(M, 2 * H), activation, 0.0, True, save, save),
    }
    with mock.patch.object(gated, "matmul_precision", return_value=precision):
        found = launched(capability, calls[product])
    name = f"gated {product} {dtype} {M}x{H}x{K} {activation} save={save} {precision}"
    wide = H % (16 // dtype.itemsize) == 0
    for kernel, args, options in found:
        if kernel is gated._gated_bwd_kernel and product == "bwd":
            yield Case(name, kernel, args, options, wide=wide, wide_stores=wide)
        elif kernel not in (gated._gated_bwd_kernel, linear._sum_kernel):
            tma = kernel in (gated._gated_fwd_tma_kernel, gated._gated_dgrad_tma_kernel)
            # As for a layer's products.
            turned = precision == "tf32" and capability in (90, 100) and product == "dgrad"
            yield Case(
                f"{kernel.__name__} {name}",
                kernel,
                args,
                options,
                matrix_instruction(capability, dtype, precision),
                wide=tma or (args["ALIGNED"] and not turned),
                wide_stores=wide,
                tma=tma,
            )


def dz_case(
    dtype: torch.dtype, M: int, N: int, activation: str | None, dz: bool = True, db: bool = True
) -> Case:
    """The pass that makes dZ and its column sums."""
    tile = configs.linear_dz_tile(dtype, N)
    args = {
        "dy_ptr": dtype,
        "saved_ptr": dtype if activation else None,
        "dz_ptr": dtype if dz and activation else None,
        "partial_ptr": FP32 if db else None,
        "M": M,
        "N": N,
        "stride_dym": N,
        "stride_dyn": 1,
        "slope": 0.01,
        "GRADIENT": activations.lookup(activation).gradient,
        "ROWS": tile.rows,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    name = f"dz {dtype} {M}x{N} {activation} dz={dz} db={db}"
    wide = N % 16 == 0
    wide_stores = wide and dz and activation is not None
    options = {"num_warps": tile.num_warps}
    return Case(name, linear._linear_dz_kernel, args, options, wide=wide, wide_stores=wide_stores)


def activation_cases(dtype: torch.dtype, activation: str) -> list[Case]:
    """The pointwise kernels."""
    tile = configs.activation_tile(dtype)
    row = activations.lookup(activation)
    sizes = {"n": 4097, "slope": 0.01, "BLOCK": tile.block, "VECTOR": tile.vector}
    options = {"num_warps": tile.num_warps}
    fwd = {"x_ptr": dtype, "y_ptr": dtype, "ACT": row.forward, **sizes}
    bwd = {"dy_ptr": dtype, "saved_ptr": dtype, "dx_ptr": dtype, "GRADIENT": row.gradient, **sizes}
    return [
        Case(f"activation fwd {dtype} {activation}", activations._activation_fwd_kernel, fwd, options),
        Case(f"activation bwd {dtype} {activation}", activations._activation_bwd_kernel, bwd, options),
    ]


def cross_entropy_cases(
    dtype: torch.dtype,
    C: int,
    weight: bool = False,
    mean: bool = True,
    flags: int = 0,
    splits: bool = False,
) -> list[Case]:
    """Forward, the reduction over the rows, backward; and where rows are split, the launch that puts them together. Logits
    are contiguous: where C is not a multiple of 16 they have edges."""
    edges = C % 16 != 0 and configs.cross_entropy_edges(dtype, C)
    probabilities = bool(flags & 2)
    flags |= edges * (32 | 64 * probabilities)
    tile = configs.cross_entropy_tile(dtype, C, 2 if probabilities else 1)
    options = {"num_warps": tile.num_warps}
    w = dtype if weight else None
    wide = C % 16 == 0 or edges
    scalars = {"ignore_index": -100, "smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "logit_scale": 0.5}
    shared = {
        "x_ptr": dtype,
        "target_ptr": dtype if probabilities else torch.int64,
        "weight_ptr": w,
        "u_ptr": None,
        "stats_ptr": FP32,
        "N": 8192,
        "C": C,
        "stride_xn": C,
        **scalars,
    }
    blocks = {"BLOCK_M": tile.block_m, "LANES": tile.lanes, "VECTOR": tile.vector}
    stride = {"stride_tn": C if probabilities else 1}
    outputs = {"loss_ptr": FP32, "lse_ptr": None, "correct_ptr": None}
    step = tile.lanes * tile.vector
    fwd = {
        **shared,
        **blocks,
        **outputs,
        **stride,
        "partial_ptr": FP32 if splits else None,
        "span": step if splits else -(-C // step) * step,
        "FLAGS": flags,
    }
    bwd = {
        **shared,
        **blocks,
        **stride,
        "dloss_ptr": dtype,
        "dlse_ptr": None,
        "weight_sum_ptr": FP32 if weight and flags & 1 and not probabilities else None,
        "denominator_ptr": FP32 if mean else None,
        "dx_ptr": dtype,
        "dtarget_ptr": dtype if probabilities else None,
        "stride_dxn": C,
        "stride_dloss": 0 if mean else 1,
        "stride_dlse": 0,
        "FLAGS": flags | 128 * edges,
    }
    reduce = {
        "target_ptr": None if probabilities else torch.int64,
        "weight_ptr": None if probabilities else w,
        "u_ptr": None,
        "correct_ptr": None,
        "losses_ptr": FP32,
        "loss_ptr": dtype,
        "denominator_ptr": FP32,
        "accuracy_ptr": None,
        "N": 8192,
        "C": C,
        "ignore_index": -100,
        "MEAN": mean,
        "BLOCK": 1024,
    }
    name = f"{dtype} C={C} weight={weight} mean={mean} flags={flags} splits={splits}"
    kernels = cross_entropy
    cases = [
        Case(f"cross-entropy fwd {name}", kernels._cross_entropy_fwd_kernel, fwd, options, None, wide, False),
        Case(f"cross-entropy bwd {name}", kernels._cross_entropy_bwd_kernel, bwd, options, None, wide, wide),
        Case(
            f"cross-entropy reduce {name}",
            kernels._cross_entropy_reduce_kernel,
            reduce,
            {"num_warps": 8},
            None,
            False,
            False,
        ),
    ]
    if splits:
        combine = {**shared, **outputs, "partial_ptr": FP32, "splits": 16, "FLAGS": flags, "BLOCK_S": 16}
        cases.append(
            Case(
                f"cross-entropy combine {name}",
                kernels._cross_entropy_combine_kernel,
                combine,
                {"num_warps": 1},
                None,
                False,
                False,
            )
        )
    return cases


def cross_entropy_grad_cases(
    capability: int, dtype: torch.dtype, C: int, weight: bool = False, mean: bool = True, flags: int = 0
) -> list[Case]:
    """The gradient in forward, and its scaling in backward."""
    edges = C % 16 != 0 and configs.cross_entropy_edges(dtype, C)
    tile = configs.cross_entropy_grad_tile(capability, dtype, C, not (flags or edges), bool(flags & 1))
    wide = C % 16 == 0 or edges
    args = {
        "x_ptr": dtype,
        "target_ptr": torch.int64,
        "weight_ptr": dtype if weight else None,
        "weight_sum_ptr": FP32 if weight and flags & 1 else None,
        "u_ptr": None,
        "denominator_ptr": FP32 if mean else None,
        "loss_ptr": FP32,
        "stats_ptr": FP32,
        "correct_ptr": None,
        "dx_ptr": dtype,
        "N": 8192,
        "C": C,
        "stride_xn": C,
        "stride_dxn": C,
        "ignore_index": -100,
        "smoothing": 0.1,
        "z_loss": 1e-4,
        "softcap": 30.0,
        "logit_scale": 0.5,
        "RESIDENT": tile.lanes * tile.vector >= C,
        "FLAGS": flags | 160 * edges,
        "BLOCK_M": tile.block_m,
        "LANES": tile.lanes,
        "VECTOR": tile.vector,
    }
    flat = configs.activation_tile(dtype)
    scale = {"dx_ptr": dtype, "g_ptr": dtype, "n": 8192 * C, "BLOCK": flat.block, "VECTOR": flat.vector}
    name = f"{dtype} C={C} weight={weight} mean={mean} flags={flags}"
    kernels, options = cross_entropy, {"num_warps": tile.num_warps}
    return [
        Case(
            f"cross-entropy fwd+grad {name}",
            kernels._cross_entropy_fwd_grad_kernel,
            args,
            options,
            None,
            wide,
            wide,
        ),
        Case(f"cross-entropy scale {name}", kernels._scale_kernel, scale, {"num_warps": flat.num_warps}),
    ]


def cross_entropy_counts() -> dict[str, list[float]]:
    """On capability 9.0: instructions and special-function instructions an element, and bytes an element that must move.

    Of a kernel without a loop over the columns all its instructions, by the elements of a thread. Of one with a loop what
    more elements a thread add: they are counted with all lanes and with half of them.
    """

    def count(case: Case, share: int = 1) -> tuple[int, int, int]:
        lanes = case.args["LANES"] // share
        args = {**case.args, "LANES": lanes}
        if "span" in args:
            step = lanes * args["VECTOR"]
            args["span"] = -(-args["C"] // step) * step
        specialization = machine_code.signature_of(case.kernel, args)
        code = machine_code.compile_for(case.kernel, **specialization, capability=90, **case.options)
        special = sum(n for op, n in code.instructions.items() if op.startswith("MUFU"))
        elements = args["BLOCK_M"] * lanes * args["VECTOR"] // (32 * case.options["num_warps"])
        return sum(code.instructions.values()), special, elements

    def total(case: Case, moved: int) -> list[float]:
        instructions, special, elements = count(case)
        return [round(instructions / elements, 1), round(special / elements, 2), moved]

    def more(case: Case, moved: int) -> list[float]:
        (n, special, elements), (m, fewer, half) = count(case), count(case, 2)
        return [
            round((n - m) / (elements - half), 1),
            round((special - fewer) / (elements - half), 2),
            moved,
        ]

    def pair(dtype: torch.dtype, C: int, moved: tuple[int, int], flags: int = 0) -> list[list[float]]:
        fwd, bwd = cross_entropy_cases(dtype, C, flags=flags)[:2]
        return [more(fwd, moved[0]), total(bwd, moved[1])]

    counts = {
        "bf16": pair(BF16, 128256, (2, 4)),
        "bf16, odd C": pair(BF16, 50257, (2, 4)),
        "float32": pair(FP32, 128256, (4, 8)),
        "bf16, label smoothing": pair(BF16, 128256, (2, 4), 1),
        "bf16, probabilities": pair(BF16, 128256, (4, 8), 2),
        "bf16, soft cap": pair(BF16, 128256, (2, 4), 8),
    }
    found = {
        f"{name}, {direction}": row
        for name, both in counts.items()
        for direction, row in zip(("forward", "backward"), both, strict=True)
    }
    found["bf16, gradient in forward, C = 32000"] = total(cross_entropy_grad_cases(90, BF16, 32000)[0], 4)
    found["bf16, gradient in forward, C = 128256"] = more(cross_entropy_grad_cases(90, BF16, 128256)[0], 4)
    return found


def cross_entropy_chosen(capability: int, half: torch.dtype) -> Iterator[Case]:
    """The headline shapes, an odd number of classes, probabilities; and the gradient in forward at the largest row that stays
    in registers."""
    yield from cross_entropy_cases(half, 128256)[:2]
    yield from cross_entropy_cases(half, 50257)[:2]
    yield from cross_entropy_cases(half, 127)[:2]
    yield from cross_entropy_cases(FP32, 32000, weight=True, flags=1, splits=True)
    yield from cross_entropy_cases(FP32, 50257, weight=True, flags=1 | 2 | 4 | 8 | 16)[:2]
    yield from cross_entropy_grad_cases(capability, half, 32768)
    yield from cross_entropy_grad_cases(capability, half, 16383)[:1]
    yield from cross_entropy_grad_cases(capability, FP32, 8191, weight=True, flags=1 | 4 | 8 | 16)[:1]
    yield from cross_entropy_grad_cases(capability, FP32, 16383, flags=4 | 8 | 16)[:1]
    yield from cross_entropy_grad_cases(capability, half, 128256)[:1]


def optimizer_case(
    rule: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    states: int,
    masters: bool = False,
    aligned: bool = True,
) -> Case:
    """The parameter launch of a rule; a bit of `states` for each of the states that some tensor has."""
    kept = state_dtype.itemsize if states else 0
    tile = configs.optimizer_tile(max(dtype.itemsize, kept, 4 * masters), aligned)
    args = {
        "table_ptr": torch.int64,
        "chunk_ptr": torch.int32,
        "scalars_ptr": FP32,
        "UPDATE": getattr(optimizers, f"_{rule}_update"),
        "STATES": states,
        "MASTERS": masters,
        "PARAM_DTYPE": optimizers._triton_dtype(dtype),
        "GRAD_DTYPE": optimizers._triton_dtype(dtype),
        "STATE_DTYPE": optimizers._triton_dtype(state_dtype),
        "BLOCK": tile.block,
        "VECTOR": tile.vector,
    }
    name = f"{rule} {dtype} states {states} of {state_dtype} masters={masters} aligned={aligned}"
    options = {"num_warps": tile.num_warps}
    return Case(name, optimizers._multi_tensor_kernel, args, options, wide=aligned, wide_stores=aligned)


def optimizer_clip_cases(dtype: torch.dtype) -> list[Case]:
    """The sums of squares, and the prologue that clips, unscales and skips."""
    tile = configs.optimizer_tile(dtype.itemsize, True)
    tables = {"table_ptr": torch.int64, "chunk_ptr": torch.int32, "partial_ptr": FP32}
    sums = {
        **tables,
        "first": 3,
        "C": 100,
        "GRAD_DTYPE": optimizers._triton_dtype(dtype),
        "BLOCK": tile.block,
        "VECTOR": tile.vector,
        "CHUNKS": optimizers.CHUNKS,
    }
    numbers = ("hyper_ptr", "scalars_ptr", "partial_ptr", "norm_ptr", "grad_scale_ptr", "found_inf_ptr")
    prologue = {
        "table_ptr": torch.int64,
        "lr_address_ptr": torch.int64,
        **dict.fromkeys(numbers, FP32),
        "T": 100,
        "P": 1000,
        "max_norm": 1.0,
        "BLOCK": optimizers.ROWS,
        "BLOCK_P": configs.PARTIALS,
    }
    plain = dict.fromkeys(numbers[2:]) | {"P": 0, "max_norm": 0.0}
    options = {"num_warps": 4}
    narrow = {"wide": False, "wide_stores": False}
    return [
        Case(
            f"square sums {dtype}", optimizers._square_sum_kernel, sums, options, wide=True, wide_stores=False
        ),
        Case("prologue that clips", optimizers._prologue_kernel, prologue, options, **narrow),
        Case("prologue", optimizers._prologue_kernel, prologue | plain, options, **narrow),
    ]


def optimizer_chosen(half: torch.dtype) -> Iterator[Case]:
    """The headline configurations, and those nearest to a spill: three states, unaligned."""
    yield optimizer_case("adam", FP32, FP32, 3)
    yield optimizer_case("adam", half, FP32, 7, masters=True)
    yield optimizer_case("adam", half, half, 3)
    yield optimizer_case("adam", half, FP32, 7, masters=True, aligned=False)
    yield optimizer_case("rmsprop", FP32, FP32, 7)
    yield optimizer_case("sgd", FP32, FP32, 1)
    yield optimizer_case("adagrad", FP32, FP32, 1)
    yield from optimizer_clip_cases(half)


def optimizer_everything(halves: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Every reachable configuration of every rule."""
    reached = {"sgd": (0, 1), "adagrad": (1,), "rmsprop": (1, 3, 5, 7), "adam": (3, 7)}
    kinds = [(FP32, FP32, False), (FP32, BF16, False)]
    for half in halves:
        kinds += [(half, half, False), (half, FP32, False), (half, FP32, True), (half, BF16, True)]
    for (dtype, state_dtype, masters), aligned in itertools.product(dict.fromkeys(kinds), (True, False)):
        for rule, masks in reached.items():
            for states in masks:
                yield optimizer_case(rule, dtype, state_dtype, states, masters, aligned)
    for dtype in (FP32, *halves):
        yield from optimizer_clip_cases(dtype)


def softmax_cases(dtype: torch.dtype, C: int, log: bool = False) -> list[Case]:
    """Softmax or log-softmax, forward and backward."""
    found = []
    for name, backward in (("fwd", False), ("bwd", True)):
        tile = configs.softmax_tile(dtype, C, backward, C % (16 // dtype.itemsize) == 0)
        own = {"dy_ptr": dtype, "dx_ptr": dtype, "stride_dyn": C, "stride_dyc": 1}
        args = {
            **(own if backward else {"x_ptr": dtype, "stride_xn": C}),
            "y_ptr": dtype,
            "N": 8192,
            "C": C,
            "LOG": log,
            "WHOLE": tile.lanes * tile.vector >= C,
            "ALIGNED": C % tile.vector == 0,
            "BLOCK_M": tile.block_m,
            "LANES": tile.lanes,
            "VECTOR": tile.vector,
        }
        kernel = softmax._softmax_bwd_kernel if backward else softmax._softmax_fwd_kernel
        wide = C % (16 // dtype.itemsize) == 0 and C > 16
        options = {"num_warps": tile.num_warps}
        found.append(
            Case(f"softmax {name} {dtype} {C} log={log}", kernel, args, options, wide=wide, wide_stores=wide)
        )
    return found


def logsumexp_cases(dtype: torch.dtype, C: int) -> list[Case]:
    """log-sum-exp, forward and backward."""
    tile = configs.logsumexp_tile(dtype, C)
    args = {
        "x_ptr": dtype,
        "stats_ptr": FP32,
        "N": 8192,
        "C": C,
        "stride_xn": C,
        "ALIGNED": C % tile.vector == 0,
        "BLOCK_M": tile.block_m,
        "LANES": tile.lanes,
        "VECTOR": tile.vector,
    }
    fwd = {**args, "lse_ptr": dtype}
    bwd = {**args, "dlse_ptr": dtype, "dx_ptr": dtype, "stride_dlse": 1}
    options, wide = {"num_warps": tile.num_warps}, C % tile.vector == 0
    name = f"{dtype} {C}"
    return [
        Case(
            f"logsumexp fwd {name}",
            softmax._logsumexp_fwd_kernel,
            fwd,
            options,
            wide=wide,
            wide_stores=False,
        ),
        Case(
            f"logsumexp bwd {name}", softmax._logsumexp_bwd_kernel, bwd, options, wide=wide, wide_stores=wide
        ),
    ]


def linear_cross_entropy_cases(
    capability: int,
    dtype: torch.dtype,
    V: int,
    H: int,
    bias: bool = False,
    weight: bool = False,
    smooth: bool = False,
    softcap: bool = False,
    kept: bool = False,
    precision: str = "ieee",
) -> list[Case]:
    """The tiles forward and backward, from the product or from what was kept, and the products of dX. The other
    products are a linear layer's."""
    N = 8192
    limit = machine_code.shared_memory_limit(capability)
    read = V if kept else H
    tile = configs.linear_cross_entropy_tile(capability, limit, dtype, read % 16 == 0)
    blocks = {name: value for name, value in tile.blocks.items() if name.isupper()}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    fwd_tile = configs.linear_cross_entropy_tile(capability, limit, dtype, read % 16 == 0, smooth)
    fwd_options = {"num_warps": fwd_tile.num_warps, "num_stages": fwd_tile.num_stages}
    # Below 8.0 Triton has no matrix instruction of 16 bits.
    matrix = None if capability < 80 else matrix_instruction(capability, dtype, precision)
    shared = {
        "x_ptr": dtype,
        "w_ptr": dtype,
        "bias_ptr": dtype if bias else None,
        "kept_ptr": dtype if kept else None,
        "target_ptr": torch.int64,
        "weight_ptr": dtype if weight else None,
        "N": N,
        "H": H,
        "start": 0,
        "stop": V,
        "stride_xn": H,
        "stride_xh": 1,
        "stride_wv": H,
        "stride_wh": 1,
        "stride_kept": V if kept else 0,
        "scale": 1.0,
        "softcap": 30.0,
        "SOFTCAP": softcap,
        "SMOOTH": smooth,
        "PRECISION": precision,
        "ALIGNED_V": V % 16 == 0,
        "ALIGNED_H": H % 16 == 0,
        **blocks,
    }
    fwd = {
        **shared,
        "partial_ptr": FP32,
        "first_split": 0,
        "splits": 63,
        "tiles": 16,
        **{name: value for name, value in fwd_tile.blocks.items() if name.isupper()},
    }
    dz = {
        **shared,
        "scales_ptr": FP32,
        "dz_ptr": dtype,
        "partial_ptr": FP32 if bias else None,
        "stride_dz": 8192,
    }
    name = f"{dtype} V={V} H={H} {bias=} {weight=} {smooth=} {softcap=} {kept=} {precision}"
    wide, own = V % 16 == 0 if kept else H % 16 == 0, None if kept else matrix
    found = [
        Case(
            f"linear_cross_entropy fwd {name}",
            linear_cross_entropy._linear_cross_entropy_fwd_kernel,
            fwd,
            fwd_options,
            own,
            wide,
            wide_stores=False,
        ),
        Case(
            f"linear_cross_entropy dz {name}",
            linear_cross_entropy._linear_cross_entropy_dz_kernel,
            dz,
            options,
            own,
            wide,
            wide_stores=V % 16 == 0,
        ),
    ]
    if kept:
        return found
    # (what, M, N, K, strides of a, strides of b, added to, result)
    chunk = 8192
    for what, M, K, a, b, add, out in (
        ("dx", N, chunk, (chunk, 1), (H, 1), FP32, FP32),
        ("dx last", N, chunk, (chunk, 1), (H, 1), FP32, dtype),
    ):
        args = {
            "a_ptr": dtype,
            "b_ptr": dtype,
            "add_ptr": add,
            "out_ptr": out,
            "M": M,
            "N": H,
            "K": K,
            "stride_am": a[0],
            "stride_ak": a[1],
            "stride_bk": b[0],
            "stride_bn": b[1],
            "stride_add": H if add else 0,
            "stride_out": H,
            "PRECISION": precision,
            "ALIGNED_M": False,
            "ALIGNED_N": H % 16 == 0,
            "ALIGNED_K": True,
            **blocks,
        }
        wide = H % 16 == 0
        kernel = linear_cross_entropy._linear_cross_entropy_product_kernel
        found.append(
            Case(f"linear_cross_entropy {what} {name}", kernel, args, options, matrix, wide, H % 16 == 0)
        )
    return found


def loss_cases(
    capability: int,
    dtype: torch.dtype,
    name: str,
    reduction: str,
    needs: tuple[bool, bool] = (True, False),
    weighted: bool = False,
) -> Iterator[Case]:
    """An elementwise loss of [8192, 1000]: forward, the sum over programs, backward. `weighted`: by elements, and with a
    vector that repeats."""
    x, t = (torch.empty(8192, 1000, dtype=dtype, device="meta") for _ in range(2))
    w, q = (t, t[0]) if weighted else (None, None)

    def call() -> None:
        loss = losses.loss_fwd(x, t, w, q, name, 1.0, reduction)
        losses.loss_bwd(loss, x, t, w, q, name, 1.0, reduction, needs)

    for kernel, args, options in launched(capability, call):
        case = f"{kernel.__name__} {dtype} {name} {reduction} {needs} weighted={weighted}"
        wide = kernel is not losses._loss_reduce_kernel
        stores = kernel is losses._loss_bwd_kernel or reduction == "none"
        yield Case(case, kernel, args, options, wide=wide, wide_stores=stores)


def multi_margin_cases(
    capability: int, dtype: torch.dtype, C: int, p: int = 2, weighted: bool = True
) -> Iterator[Case]:
    """Multi-margin's forward and backward on [8192, C]."""
    x = torch.empty(8192, C, dtype=dtype, device="meta")
    target = torch.empty(8192, dtype=torch.int64, device="meta")
    w = x[0] if weighted else None

    def call() -> None:
        losses.multi_margin_fwd(x, target, w, p, 1.0, "none")
        losses.multi_margin_bwd(x[:, 0], x, target, w, p, 1.0, "none")

    for kernel, args, options in launched(capability, call):
        wide = C % 16 == 0
        stores = wide and kernel is losses._multi_margin_bwd_kernel
        name = f"{kernel.__name__} {dtype} C={C} p={p} weighted={weighted}"
        yield Case(name, kernel, args, options, wide=wide, wide_stores=stores)


def loss_chosen(capability: int, half: torch.dtype) -> Iterator[Case]:
    """The headline ones, and those with the most registers: both gradients and all weights, the largest row held."""
    yield from loss_cases(capability, half, "mse_loss", "mean")
    bce = "binary_cross_entropy_with_logits"
    yield from loss_cases(capability, half, bce, "none", (True, True), weighted=True)
    yield from loss_cases(capability, FP32, bce, "mean", (True, True), weighted=True)
    yield from multi_margin_cases(capability, half, 8192)
    yield from multi_margin_cases(capability, FP32, 32000)


def loss_everything(capability: int, halves: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Every loss of the table, plain and weighted, and rows of every kind."""
    for dtype in (FP32, *halves):
        for name, reduction, weighted in itertools.product(losses.LOSSES, ("none", "mean"), (False, True)):
            for needs in ((True, False), (False, True), (True, True)):
                yield from loss_cases(capability, dtype, name, reduction, needs, weighted)
        for C, p, weighted in itertools.product((2, 10, 127, 1000, 4096, 8192, 32000), (1, 2), (False, True)):
            yield from multi_margin_cases(capability, dtype, C, p, weighted)


def norm_cases(capability: int, what: str, call: Callable[[], Any]) -> Iterator[Case]:
    """The launches of a norm or of dropout. Vectors of operands that are whole are accessed whole, where a launch reads and
    writes matrices."""
    for kernel, args, options in launched(capability, call):
        matrix = args.get("VECTOR", 1) > 1
        results = [args.get(name) for name in ("y_ptr", "dx_ptr")]
        stores = matrix and any(result is not None for result in results)
        yield Case(f"{kernel.__name__} {what}", kernel, args, options, wide=matrix, wide_stores=stores)


def layer_norm_cases(
    capability: int, dtype: torch.dtype, C: int, rms: bool = False, parameters: bool = True, N: int = 8192
) -> Iterator[Case]:
    """Forward and backward over N rows of C."""
    x, w = torch.empty(N, C, dtype=dtype, device="meta"), torch.empty(C, dtype=dtype, device="meta")
    stats = torch.empty(2, N, device="meta")
    given, needs = (w if parameters else None), (True, parameters, parameters and not rms)

    def call() -> None:
        layer_norm.layer_norm_fwd(x, given, None if rms else given, C, 1e-5, rms, True)
        layer_norm.layer_norm_bwd(x, x, given, stats, C, rms, needs)

    return norm_cases(capability, f"{dtype} {N}x{C} rms={rms} parameters={parameters}", call)


def batch_norm_cases(
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    activation: str | None,
    training: bool = True,
    parameter: torch.dtype = FP32,
) -> Iterator[Case]:
    """Forward and backward."""
    x, C = torch.empty(shape, dtype=dtype, device="meta"), shape[1]
    w, stats = torch.empty(C, dtype=parameter, device="meta"), torch.empty(2, C, device="meta")

    def call() -> None:
        if training:
            batch_norm.batch_norm_fwd(x, w, w, w, w, None, 0.1, 1e-5, activation, 0.01)
        else:
            batch_norm.batch_norm_eval_fwd(x, w, w, w, w, 1e-5, activation, 0.01, True)
        batch_norm.batch_norm_bwd(x, x, w, w, stats, training, activation, 0.01, (True, True, True))

    # As to torch on meta tensors: a cast of the parameters' gradients is no launch of ours.
    return norm_cases(capability, f"{dtype} {shape} {activation} training={training} {parameter}", call)


def dropout_case(capability: int, dtype: torch.dtype) -> Iterator[Case]:
    """One launch, forward as backward."""
    x, seed = (torch.empty(n, dtype=d, device="meta") for n, d in ((1 << 20, dtype), (1, torch.int64)))
    return norm_cases(capability, f"{dtype}", lambda: dropout.dropout_fwd(x, seed, 0.5, 2.0))


def norm_chosen(capability: int, half: torch.dtype) -> Iterator[Case]:
    """The longest rows that stay in registers, forward and backward; batch norm's tiles, of every layout."""
    yield from layer_norm_cases(capability, half, 8192)
    yield from layer_norm_cases(capability, FP32, 16384)
    yield from batch_norm_cases(capability, half, (8192, 1024), "gelu")
    yield from batch_norm_cases(capability, half, (256, 1024), "relu")
    yield from dropout_case(capability, half)
    if capability in (90, 120):
        yield from layer_norm_cases(capability, half, 32768, rms=True)
        yield from layer_norm_cases(capability, half, 65536)
        yield from batch_norm_cases(capability, FP32, (8192, 1024), "relu", training=False)
        yield from batch_norm_cases(capability, half, (64, 32, 128), "gelu")


def norm_everything(capability: int, halves: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Rows of every kind, and batches of every layout, with every activation."""
    columns = (1, 3, 10, 64, 127, 1000, 1024, 2048, 4095, 4096, 8192, 16384, 32768, 50257, 65536)
    matrices = ((256, 10), (256, 1024), (8192, 10), (8192, 127), (8192, 1024))
    shapes = (*matrices, (64, 32, 128), (64, 32, 7), (2, 3, 9))
    flags = (False, True)
    for dtype in (FP32, *halves):
        for C, rms, parameters in itertools.product(columns, flags, flags):
            yield from layer_norm_cases(capability, dtype, C, rms, parameters)
        for shape, activation, training in itertools.product(shapes, (None, *activations.ACTIVATIONS), flags):
            yield from batch_norm_cases(capability, dtype, shape, activation, training)
        yield from dropout_case(capability, dtype)


def chosen(capability: int) -> Iterator[Case]:
    """About ten a capability: the headline shapes, and those nearest to a spill."""
    half = BF16 if capability >= 80 else FP16
    yield from linear_cases(capability, half, "fwd", 8192, 4096, 4096, "gelu", bias=True, save_z=True)
    yield from linear_cases(capability, half, "fwd", 8192, 4096, 1024, "gelu", bias=True, save_z=True)
    yield from linear_cases(capability, half, "fwd", 8192, 4095, 4096, "gelu", bias=True, save_z=True)
    yield from linear_cases(capability, half, "fwd", 64, 250, 251, "relu", bias=True)
    yield from linear_cases(capability, half, "fwd", 64, 256, 256, "relu", bias=True)
    yield from linear_cases(capability, half, "dx", 8192, 4096, 4096)
    yield from linear_cases(capability, half, "dz", 8192, 4096, 4096, "gelu")
    yield from linear_cases(capability, half, "dz", 8192, 1024, 4096, "silu")
    yield from linear_cases(capability, half, "dw", 8192, 4096, 4096)
    yield from linear_cases(capability, half, "dw", 65536, 1024, 256)
    yield from linear_cases(capability, FP32, "fwd", 64, 512, 784, "gelu", bias=True, save_z=True)
    yield from linear_cases(capability, FP32, "dz", 64, 512, 784, "gelu")
    yield from linear_cases(capability, FP32, "dw", 64, 256, 784)
    for drop in (
        {"M": 8192, "N": 4096, "K": 4096},
        {"M": 8192, "N": 4095, "K": 4096},
        {"M": 64, "N": 32768, "K": 256},
    ):
        yield from linear_cases(
            capability, half, "fwd", **drop, activation="gelu", bias=True, save_z=True, dropout=True
        )
    for M, N, K in ((8192, 4096, 4096), (64, 256, 32768)):
        yield from linear_cases(capability, half, "dz", M, N, K, "gelu", dropout=True)
    yield from linear_cases(capability, FP32, "dz", 64, 512, 783, "gelu", dropout=True)
    if capability >= 80:
        yield from linear_cases(
            capability, FP32, "fwd", 8192, 4096, 4096, "tanh", bias=True, precision="tf32"
        )
    yield from gated_cases(capability, half, "fwd", 8192, 4096, 4096, "silu")
    yield from gated_cases(capability, half, "fwd", 64, 251, 255, "gelu")
    yield from gated_cases(capability, half, "dgrad", 8192, 4096, 4096, "gelu")
    yield from gated_cases(capability, half, "bwd", 8192, 4096, 0, "silu")
    yield from gated_cases(capability, FP32, "fwd", 64, 200, 256, "gelu")
    yield dz_case(half, 8192, 4096, "gelu")
    yield dz_case(FP32, 8192, 4096, "relu")
    yield from activation_cases(half, "gelu_tanh")
    yield from cross_entropy_chosen(capability, half)
    yield from optimizer_chosen(half)
    yield from loss_chosen(capability, half)
    yield from norm_chosen(capability, half)
    yield from softmax_cases(half, 32000)
    yield from softmax_cases(FP32, 16385)[:1]
    yield from logsumexp_cases(half, 1000)[1:]
    yield from linear_cross_entropy_cases(capability, half, 128256, 4096)
    if capability in (80, 90, 100, 120):
        yield from softmax_cases(FP32, 128256, log=True)
        features = {"bias": True, "smooth": True, "softcap": True}
        yield from linear_cross_entropy_cases(capability, half, 128256, 4096, **features)[:2]
        yield from linear_cross_entropy_cases(capability, half, 128256, 4096, bias=True, kept=True)
        yield from linear_cross_entropy_cases(capability, FP32, 32000, 1024, weight=True, **features)[:2]


# (M, N, K) of layers that between them reach every tile of configs.linear_tile, with aligned rows and without.
SWEEP = [
    (M, N, K)
    for M, N, K in itertools.product((64, 300, 8192), (16, 250, 256, 4095, 4096), (64, 250, 1024, 4096))
    if not (M == 300 and (N in (250, 4095) or K == 250))
]


def everything(capability: int) -> Iterator[Case]:
    """Every reachable configuration."""
    halves = (BF16, FP16) if capability >= 80 else (FP16,)
    names = (None, *activations.ACTIVATIONS)
    for dtype in (FP32, *halves):
        precisions = ("ieee", "tf32") if dtype is FP32 and capability >= 80 else ("ieee",)
        for precision in precisions:
            for M, N, K in SWEEP:
                for activation, bias, save_z in itertools.product(names, (False, True), (False, True)):
                    saved = activations.saved_for_backward(activation, 0.01)
                    if save_z and saved != "z":
                        continue
                    yield from linear_cases(
                        capability, dtype, "fwd", M, N, K, activation, bias, save_z, precision
                    )
                    # Training, with all that an epilogue may take.
                    if not bias or save_z < (saved == "z"):
                        continue
                    yield from linear_cases(
                        capability, dtype, "fwd", M, N, K, activation, bias, save_z, precision, dropout=True
                    )
                    for drops in (False, True) if saved else ():
                        yield from linear_cases(
                            capability, dtype, "dz", M, N, K, activation, precision=precision, dropout=drops
                        )
                for product in ("dx", "dw"):
                    yield from linear_cases(capability, dtype, product, M, N, K, precision=precision)
        for precision, activation, save in itertools.product(precisions, names, (False, True)):
            shapes = (64, 256, 256), (512, 4090, 1024), (8192, 4096, 512), (8192, 4096, 4096), (64, 251, 255)
            for product, (M, H, K) in itertools.product(("fwd", "dgrad"), shapes):
                yield from gated_cases(capability, dtype, product, M, H, K, activation, save, precision)
            for H in (251, 4096):
                yield from gated_cases(capability, dtype, "bwd", 8192, H, 0, activation, save)
        for N in (10, 256, 4095, 4096):
            for activation in names:
                yield dz_case(dtype, 8192, N, activation)
                if activation is not None:
                    yield dz_case(dtype, 8192, N, activation, db=False)
        for activation in activations.ACTIVATIONS:
            yield from activation_cases(dtype, activation)
        for C in (1, 2, 10, 127, 1000, 1024, 32000, 32768, 50257, 128256):
            for weight, mean, flags in itertools.product((False, True), (False, True), range(32)):
                yield from cross_entropy_cases(dtype, C, weight, mean, flags, splits=C > 20000)
                if not flags & 2:
                    yield from cross_entropy_grad_cases(capability, dtype, C, weight, mean, flags)
        for C in (1, 2, 10, 127, 1000, 1024, 16383, 16384, 32767, 32768, 50257, 128256):
            for log in (False, True):
                yield from softmax_cases(dtype, C, log)
            yield from logsumexp_cases(dtype, C)
        for precision, V, H in itertools.product(precisions, (128256, 50257), (4096, 250)):
            for bias, softcap, kept in itertools.product((False, True), repeat=3):
                for smooth, weight in ((False, False), (True, False), (True, True)):
                    yield from linear_cross_entropy_cases(
                        capability, dtype, V, H, bias, weight, smooth, softcap, kept, precision
                    )
    yield from optimizer_everything(halves)
    yield from loss_everything(capability, halves)
    yield from norm_everything(capability, halves)


def report(case: Case, capability: int, again: bool = False) -> dict[str, Any]:
    """The figures that a test looks at; `again`: as `machine_code.compile_for`."""
    specialization = machine_code.signature_of(case.kernel, case.args)
    code = machine_code.compile_for(
        case.kernel, **specialization, capability=capability, again=again, **case.options
    )
    return {
        "name": case.name,
        "registers": code.registers,
        "spills": code.spills,
        "fits": code.fits,
        "shared": code.shared_bytes,
        "loads": {str(bits): n for bits, n in code.load_widths.items()},
        "stores": {str(bits): n for bits, n in code.store_widths.items()},
        "matrix": dict(code.matrix_instructions),
        "tma": case.tma,
        "transfers": sum(n for op, n in code.instructions.items() if op.startswith("UTMALDG")),
        "expected_matrix": case.matrix,
        "wide": case.wide,
        "wide_stores": case.wide_stores,
    }


def epilogues() -> dict[str, list[float]]:
    """Of each activation on capability 9.0 at bf16, instructions that it adds to an element of the GEMM's epilogue and
    special-function instructions among them: forward, and as the gradient of the layer beneath."""
    tile = configs.MatmulTile(128, 128, 64, 8, 8, 3, "for counting", tma=True)
    elements = 128 * 128 // (8 * 32)

    def count(product: str, activation: str | None) -> tuple[int, int]:
        with mock.patch.object(configs, "linear_tile", return_value=tile):
            case = next(linear_cases(90, BF16, product, 8192, 4096, 4096, activation))
        specialization = machine_code.signature_of(case.kernel, case.args)
        code = machine_code.compile_for(case.kernel, **specialization, capability=90, **case.options)
        special = sum(n for op, n in code.instructions.items() if op.startswith("MUFU"))
        return sum(code.instructions.values()), special

    plain = {"fwd": count("fwd", None), "dz": count("dz", None)}
    return {
        name: [
            round((n - m) / elements, 1)
            for product in ("fwd", "dz")
            for n, m in zip(count(product, name), plain[product], strict=True)
        ]
        for name in activations.ACTIVATIONS
    }


def binaries_of_a_bucket() -> dict[str, list[int]]:
    """How many binaries a training step of a layer takes on capability 9.0, over many batch sizes of each bucket."""

    def step(M: int) -> None:
        x, w, b, dy = (
            torch.empty(s, dtype=BF16, device="meta") for s in ((M, 256), (512, 256), (512,), (M, 512))
        )
        _, z = linear.linear_fwd(x, w, b, "gelu", 0.0, True)
        linear.linear_bwd(dy, x, w, z, "gelu", 0.0, (True, True, True))
        linear.linear_dgrad(dy, w, x, "gelu", 0.0, True)

    def binaries(M: int) -> set[str]:
        found = launched(90, lambda: step(M))
        return {
            repr((kernel, machine_code.signature_of(kernel, args), options))
            for kernel, args, options in found
        }

    sizes = [
        (1, 2, 15, 16, 63, 64),
        (65, 128, 509, 512),
        (513, 1000, 1024, 4096),
        (4097, 60000, 65536, 10**6),
    ]
    return {
        f"{bucket[0]} to {bucket[-1]}": [len(binaries(bucket[0])), len(set.union(*map(binaries, bucket)))]
        for bucket in sizes
    }


def main() -> None:
    """Prints one JSON line a case."""
    if "--buckets" in sys.argv:
        print(json.dumps(binaries_of_a_bucket()))
        return
    if "--cross-entropy" in sys.argv:
        print(json.dumps(cross_entropy_counts()))
        return
    if "--epilogues" in sys.argv:
        print(json.dumps(epilogues()))
        return
    capability = int(sys.argv[1])
    every = "--all" in sys.argv
    cases = everything(capability) if every else chosen(capability)
    # Shapes that Triton specializes alike are one binary.
    seen = set()
    for case in cases:
        key = repr((case.kernel, machine_code.signature_of(case.kernel, case.args), case.options))
        if key not in seen:
            seen.add(key)
            # Chosen ones spill at no launch, the rest at most at its first.
            print(json.dumps(report(case, capability, again=every)), flush=True)


if __name__ == "__main__":
    main()
