"""What the examples share: their arguments, the claim that each checks, and where its plot goes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import PIL.Image
import threadpoolctl
import torch

import dlgpu

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
plt.rcParams.update({"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3})
plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "figure.dpi": 90})


@contextlib.contextmanager
def lesson(description: str, argv: Sequence[str] | None = None) -> Iterator[argparse.Namespace]:
    """The arguments of an example, seeded and on the chosen backend; `device` is where its tensors go."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--backend", default="fallback", choices=["auto", "triton", "fallback"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder for the plot")
    parser.add_argument("--quick", action="store_true", help="a shorter run, as the tests do")
    args = parser.parse_args(argv)
    # "triton" without a GPU means Triton's interpreter: slow, and TRITON_INTERPRET=1 has to be set.
    args.device = "cuda" if args.backend != "fallback" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    # The nets are small, and NumPy's threads and torch's wait for each other busily: with one of each it is faster.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1), dlgpu.use_backend(args.backend):
            yield args
    finally:
        torch.set_num_threads(threads)


def claim(text: str, holds: bool) -> None:
    """Checks what the example is there to show."""
    if not holds:
        raise AssertionError(f"does not hold: {text}")
    print(f"holds: {text}")


def save(figure: plt.Figure, args: argparse.Namespace, name: str) -> Path:
    """Writes <out>/<name>.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.png"
    figure.savefig(path)
    plt.close(figure)
    # 256 colours are enough for lines and letters, at half of the bytes.
    PIL.Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"plot: {path}")
    return path
