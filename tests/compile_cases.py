"""Launches to compile for GPUs that are not there: run as `python tests/compile_cases.py CAPABILITY [--all]` it prints one
JSON line a case. Not a test: tests/test_compile.py runs the chosen cases, tests/sweep_compile.py all reachable ones, each in
a process of its own, since compiled and interpreted kernels never share one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from dlgpu.bench import machine_code
from dlgpu.kernels import activations, configs, cross_entropy, linear

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


def matrix_instruction(capability: int, dtype: torch.dtype, precision: str) -> str | None:
    """What tl.dot becomes; None for float32 products in registers."""
    if dtype is FP32 and precision == "ieee":
        return None
    if capability == 90:
        return "HGMMA"
    return "UTCHMMA" if capability == 100 else "HMMA"


def linear_case(
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
) -> Case | None:
    """A product of the GEMM kernel: "fwd" x w^T, "dx" dZ W, "dw" dZ^T X; [M, N] over K throughout."""
    aligned = all(size % 16 == 0 for size in ((M, N) if product == "dw" else (N, K)))
    tile = configs.linear_tile(capability, machine_code.shared_memory_limit(capability), dtype, N, aligned)
    if tile is None:
        return None
    strides = {
        "fwd": {"stride_am": K, "stride_ak": 1, "stride_bk": 1, "stride_bn": K},
        "dx": {"stride_am": K, "stride_ak": 1, "stride_bk": N, "stride_bn": 1},
        "dw": {"stride_am": 1, "stride_ak": M, "stride_bk": N, "stride_bn": 1},
    }[product]
    args = {
        "a_ptr": dtype,
        "b_ptr": dtype,
        "bias_ptr": dtype if bias else None,
        "y_ptr": dtype,
        "z_ptr": dtype if save_z else None,
        "M": M,
        "N": N,
        "K": K,
        **strides,
        "slope": 0.01,
        "ACT": activations.lookup(activation).forward,
        "PRECISION": precision,
        "ALIGNED_M": product == "dw" and M % 16 == 0,
        "ALIGNED_N": N % 16 == 0,
        "ALIGNED_K": product != "dw" and K % 16 == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    # From 9.0 on tensor cores take a transposed operand in 16 bits only: tf32 is transposed by 32-bit loads.
    wide = aligned and not (product == "dw" and precision == "tf32" and capability in (90, 100))
    matrix = matrix_instruction(capability, dtype, precision)
    name = f"linear {product} {dtype} {M}x{N}x{K} {activation} bias={bias} z={save_z} {precision}"
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Case(name, linear._linear_kernel, args, options, matrix, wide, wide_stores=aligned)


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


def column_sum_case(dtype: torch.dtype, N: int) -> Case:
    """The small launch that adds the strips' sums."""
    args = {"partial_ptr": FP32, "out_ptr": dtype, "S": 128, "N": N, "BLOCK_S": 32, "BLOCK_N": 32}
    return Case(
        f"column sum {dtype} {N}",
        linear._column_sum_kernel,
        args,
        {"num_warps": 4},
        wide=False,
        wide_stores=False,
    )


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
    dtype: torch.dtype, C: int, weight: bool = False, smooth: bool = False, mean: bool = True
) -> list[Case]:
    """Forward, the reduction over the rows, backward."""
    tile = configs.cross_entropy_tile(dtype, C)
    options = {"num_warps": tile.num_warps}
    w = dtype if weight else None
    wide = C % 16 == 0
    shared = {
        "x_ptr": dtype,
        "target_ptr": torch.int64,
        "weight_ptr": w,
        "N": 8192,
        "C": C,
        "ignore_index": -100,
    }
    rows = {
        **shared,
        "weight_sum_ptr": FP32 if weight and smooth else None,
        "stats_ptr": FP32,
        "stride_xn": C,
        "smoothing": 0.1,
        "SMOOTH": smooth,
        "BLOCK_M": tile.block_m,
        "LANES": tile.lanes,
        "VECTOR": tile.vector,
    }
    fwd = {**rows, "loss_ptr": FP32}
    bwd = {
        **rows,
        "dloss_ptr": dtype,
        "denominator_ptr": FP32 if mean else None,
        "dx_ptr": dtype,
        "stride_dloss": 0 if mean else 1,
    }
    reduce = {k: v for k, v in shared.items() if k != "x_ptr"} | {
        "losses_ptr": FP32,
        "loss_ptr": dtype,
        "denominator_ptr": FP32,
        "MEAN": mean,
        "BLOCK": 1024,
    }
    name = f"{dtype} C={C} weight={weight} smooth={smooth} mean={mean}"
    return [
        Case(
            f"cross-entropy fwd {name}",
            cross_entropy._cross_entropy_fwd_kernel,
            fwd,
            options,
            wide=wide,
            wide_stores=False,
        ),
        Case(
            f"cross-entropy bwd {name}",
            cross_entropy._cross_entropy_bwd_kernel,
            bwd,
            options,
            wide=wide,
            wide_stores=wide,
        ),
        Case(
            f"cross-entropy reduce {name}",
            cross_entropy._cross_entropy_reduce_kernel,
            reduce,
            {"num_warps": 8},
            wide=False,
            wide_stores=False,
        ),
    ]


def chosen(capability: int) -> Iterator[Case | None]:
    """About ten a capability: the headline shapes, and those nearest to a spill."""
    half = BF16 if capability >= 80 else FP16
    yield linear_case(capability, half, "fwd", 8192, 4096, 4096, "gelu", bias=True, save_z=True)
    yield linear_case(capability, half, "fwd", 8192, 4095, 4096, "gelu", bias=True, save_z=True)
    yield linear_case(capability, half, "fwd", 64, 256, 256, "relu", bias=True)
    yield linear_case(capability, half, "dx", 8192, 4096, 4096)
    yield linear_case(capability, half, "dw", 4096, 4096, 8192)
    yield linear_case(capability, FP32, "fwd", 8192, 4096, 4096, "gelu", bias=True, save_z=True)
    yield linear_case(capability, FP32, "dw", 256, 784, 64)
    if capability >= 80:
        yield linear_case(capability, FP32, "fwd", 8192, 4096, 4096, "tanh", bias=True, precision="tf32")
    yield dz_case(half, 8192, 4096, "gelu")
    yield dz_case(FP32, 8192, 4096, "relu")
    yield from activation_cases(half, "gelu_tanh")
    yield from cross_entropy_cases(half, 128256)[:2]
    yield from cross_entropy_cases(FP32, 32000, weight=True, smooth=True)


def everything(capability: int) -> Iterator[Case | None]:
    """Every reachable configuration."""
    halves = (BF16, FP16) if capability >= 80 else (FP16,)
    names = (None, *activations.ACTIVATIONS)
    for dtype in (FP32, *halves):
        precisions = ("ieee", "tf32") if dtype is FP32 and capability >= 80 else ("ieee",)
        for precision in precisions:
            for N, K in itertools.product((256, 250, 4096, 4095, 4088), (4096, 4095)):
                for activation, bias, save_z in itertools.product(names, (False, True), (False, True)):
                    if save_z and (
                        activation is None or activations.saved_for_backward(activation, 0.01) == "y"
                    ):
                        continue
                    yield linear_case(
                        capability, dtype, "fwd", 8192, N, K, activation, bias, save_z, precision
                    )
                for product in ("dx", "dw"):
                    yield linear_case(capability, dtype, product, 4096, N, K, precision=precision)
                    yield linear_case(capability, dtype, product, 4095, N, K, precision=precision)
        for N in (10, 256, 4095, 4096):
            yield column_sum_case(dtype, N)
            for activation in names:
                yield dz_case(dtype, 8192, N, activation)
                if activation is not None:
                    yield dz_case(dtype, 8192, N, activation, db=False)
        for activation in activations.ACTIVATIONS:
            yield from activation_cases(dtype, activation)
        for C in (1, 2, 10, 127, 1000, 1024, 32000, 50257, 128256):
            for weight, smooth, mean in itertools.product((False, True), repeat=3):
                yield from cross_entropy_cases(dtype, C, weight, smooth, mean)


def report(case: Case, capability: int) -> dict[str, Any]:
    """The figures that a test looks at."""
    specialization = machine_code.signature_of(case.kernel, case.args)
    code = machine_code.compile_for(case.kernel, **specialization, capability=capability, **case.options)
    return {
        "name": case.name,
        "registers": code.registers,
        "spills": code.spills,
        "fits": code.fits,
        "shared": code.shared_bytes,
        "loads": {str(bits): n for bits, n in code.load_widths.items()},
        "stores": {str(bits): n for bits, n in code.store_widths.items()},
        "matrix": dict(code.matrix_instructions),
        "expected_matrix": case.matrix,
        "wide": case.wide,
        "wide_stores": case.wide_stores,
    }


def main() -> None:
    """Prints one JSON line a case."""
    capability = int(sys.argv[1])
    cases = everything(capability) if "--all" in sys.argv else chosen(capability)
    for case in cases:
        if case is not None:
            print(json.dumps(report(case, capability)), flush=True)


if __name__ == "__main__":
    main()
