"""What vendors publish of their GPUs: the figures behind `model`, none of them measured.

A card reaches less than its datasheet says, and some published tables are wrong: figures measured on a card, by `ceilings`,
take their place wherever there are some (`Gpu.measured`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .environment import UsageError

__all__ = ["GPUS", "Gpu", "find"]

DATASHEET = "datasheet, not measured"
MEASURED = "given as measured"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    capability: 80 stands for 8.0.
    bandwidth: of its memory, bytes a second.
    flops: dense floating-point operations a second of matrix products with float32 accumulation, by "bfloat16", "float16",
        "tf32" and "float32" (IEEE, no matrix units); a dtype that it has no instructions for is left out.
    l2: bytes of its second-level cache.
    source: the publications that the figures are from.
    origin: of bandwidth and flops, as shown.
    """

    name: str
    title: str
    capability: int
    multiprocessors: int
    bandwidth: float
    flops: Mapping[str, float]
    l2: int
    source: str
    origin: str = DATASHEET

    def measured(
        self, bandwidth: float | None, flops: float | None, dtype: str, origin: str = MEASURED
    ) -> Gpu:
        """With figures that were measured in place of the published ones; None leaves those."""
        changed: dict[str, object] = {}
        if bandwidth is not None:
            changed["bandwidth"] = bandwidth
        if flops is not None:
            changed["flops"] = {**self.flops, dtype: flops}
        if not changed:
            return self
        if bandwidth is None or flops is None:
            what = "FLOP/s" if bandwidth is None else "bandwidth"
            origin = f"{what} {origin}, else {DATASHEET}"
        return dataclasses.replace(self, **changed, origin=origin)  # type: ignore[arg-type]


def _gpu(
    name: str,
    title: str,
    capability: int,
    multiprocessors: int,
    gigabytes: float,
    half: float,
    tf32: float | None,
    single: float,
    megabytes: float,
    source: str,
) -> Gpu:
    """Bandwidth in GB/s, rates in TFLOP/s, L2 in MB of 2^20."""
    rates = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": single}
    if capability < 80:
        del rates["bfloat16"]
    flops = {dtype: rate * 1e12 for dtype, rate in rates.items() if rate is not None}
    return Gpu(
        name, title, capability, multiprocessors, gigabytes * 1e9, flops, int(megabytes * 2**20), source
    )


# Where a datasheet gives rates with structured sparsity alone, half of them. The number of multiprocessors and the size of L2
# are from the architecture's white paper where the datasheet has none.
_ALL = (
    _gpu("t4", "T4", 75, 40, 320, 65, None, 8.1, 4,
         "NVIDIA Turing GPU Architecture (white paper), appendix on the T4"),
    _gpu("a100", "A100 SXM 80 GB", 80, 108, 2039, 312, 156, 19.5, 40,
         "NVIDIA A100 Tensor Core GPU Datasheet; NVIDIA A100 Tensor Core GPU Architecture (white paper)"),
    _gpu("a100-40", "A100 SXM 40 GB", 80, 108, 1555, 312, 156, 19.5, 40,
         "NVIDIA A100 Tensor Core GPU Datasheet; NVIDIA A100 Tensor Core GPU Architecture (white paper)"),
    _gpu("a10", "A10", 86, 72, 600, 125, 62.5, 31.2, 6,
         "NVIDIA A10 Tensor Core GPU Datasheet; NVIDIA Ampere GA102 GPU Architecture (white paper)"),
    _gpu("rtx3090", "GeForce RTX 3090", 86, 82, 936, 71, 35.6, 35.6, 6,
         "NVIDIA Ampere GA102 GPU Architecture (white paper)"),
    _gpu("l4", "L4", 89, 58, 300, 121, 60, 30.3, 48,
         "NVIDIA L4 Tensor Core GPU Datasheet; NVIDIA Ada GPU Architecture (white paper)"),
    _gpu("l40s", "L40S", 89, 142, 864, 362, 183, 91.6, 96,
         "NVIDIA L40S Datasheet; NVIDIA Ada GPU Architecture (white paper)"),
    _gpu("rtx4090", "GeForce RTX 4090", 89, 128, 1008, 165.2, 82.6, 82.6, 72,
         "NVIDIA Ada GPU Architecture (white paper)"),
    _gpu("h100", "H100 SXM", 90, 132, 3350, 989.4, 494.7, 66.9, 50,
         "NVIDIA H100 Tensor Core GPU Datasheet; NVIDIA H100 Tensor Core GPU Architecture (white paper)"),
    _gpu("h100-pcie", "H100 PCIe", 90, 114, 2000, 756, 378, 51.2, 50,
         "NVIDIA H100 Tensor Core GPU Datasheet; NVIDIA H100 Tensor Core GPU Architecture (white paper)"),
    _gpu("h200", "H200 SXM", 90, 132, 4800, 989.4, 494.7, 66.9, 50,
         "NVIDIA H200 Tensor Core GPU Datasheet; multiprocessors and L2 as of the H100"),
    _gpu("b200", "B200 (HGX)", 100, 148, 8000, 2250, 1100, 80, 126,
         "NVIDIA Blackwell Architecture Technical Brief; L2 from the CUDA tuning guide for Blackwell"),
    _gpu("rtx5090", "GeForce RTX 5090", 120, 170, 1792, 209.5, 104.8, 104.8, 96,
         "NVIDIA RTX Blackwell GPU Architecture (white paper)"),
)  # fmt: skip

GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _ALL}


def find(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        UsageError: there is none in the table.
    """
    key = name.strip().lower()
    if key not in GPUS:
        raise UsageError(f"--gpu {name.strip()!r}: the table has {', '.join(GPUS)}")
    return GPUS[key]
