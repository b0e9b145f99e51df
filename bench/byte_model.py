"""How many bytes the kernels move at any size, from laws fitted on small sizes.

Triton's interpreter is far too slow for a real size, but a launch's traffic is a simple function of its sizes. So the real
kernels are metered at a few small shapes, integer coefficients are fitted to the counts, and the laws must then give the
counts at other shapes to the byte. A kernel whose traffic no such law describes gets no number.

Metering takes a process whose kernels are interpreted (see `interpreted`); evaluating a law takes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import dlgpu
from dlgpu.kernels import configs

from . import unfused

if TYPE_CHECKING:
    from .meter import Launch

__all__ = ["MODELS", "Law", "LawError", "Model", "fit", "headlines"]

Shape = Mapping[str, int]
# What one call moved: for each launch its kernel and the counted quantities.
Counts = list[tuple[str, dict[str, int]]]


class LawError(Exception):
    """The counts follow no law of the form that was asked for."""


@dataclasses.dataclass(frozen=True)
class Law:
    """Bytes of one launch: the sum of integer coefficients times features of the shape."""

    kernel: str
    quantity: str
    coefficients: dict[str, int]

    def __call__(self, features: Shape) -> int:
        return sum(coefficient * features[name] for name, coefficient in self.coefficients.items())

    def __str__(self) -> str:
        terms = [str(c) if name == "1" else f"{c} {name}" for name, c in self.coefficients.items()]
        return " + ".join(terms).replace("+ -", "- ") or "0"


@dataclasses.dataclass(frozen=True)
class Model:
    """An op whose traffic is modelled.

    features: the terms that a law may have, from a shape.
    run: makes the inputs of a shape and gives (tensors reached through tables of addresses, the call to meter).
    quantities: what has a law, of "compulsory" (each distinct byte once) and "requested" (every access).
    """

    op: str
    passes: str
    dtype: torch.dtype
    features: Callable[[Shape], dict[str, int]]
    run: Callable[[Shape], tuple[Sequence[torch.Tensor], Callable[[], object]]]
    fitted_on: tuple[Shape, ...]
    held_out: tuple[Shape, ...]
    quantities: tuple[str, ...] = ("compulsory",)


def _linear_features(dtype: torch.dtype) -> Callable[[Shape], dict[str, int]]:
    def features(shape: Shape) -> dict[str, int]:
        M, N, K = shape["M"], shape["N"], shape["K"]
        # Strips: one partial sum of the bias gradient for each strip of rows.
        strips = -(-M // configs.linear_dz_tile(dtype, N).rows)
        return {"MN": M * N, "MK": M * K, "NK": N * K, "SN": strips * N, "N": N, "1": 1}

    return features


def _linear(activation: str, dtype: torch.dtype, backward: bool) -> Callable[[Shape], Any]:
    def run(shape: Shape) -> Any:
        M, N, K = shape["M"], shape["N"], shape["K"]
        x, w, b, dy = (torch.ones(s, dtype=dtype) for s in ((M, K), (N, K), (N,), (M, N)))
        for leaf in (x, w, b):
            leaf.requires_grad_(backward)

        def call() -> None:
            y = dlgpu.functional.linear(x, w, b, activation=activation)
            if backward:
                y.backward(dy)

        return (), call

    return run


def _cross_entropy_features(dtype: torch.dtype) -> Callable[[Shape], dict[str, int]]:
    def features(shape: Shape) -> dict[str, int]:
        N, V = shape["N"], shape["V"]
        tile = configs.cross_entropy_tile(dtype, V)
        columns = -(-V // (tile.lanes * tile.vector))
        # Blocks of columns, each of which reads its rows' statistics again, and the programs of backward.
        return {"NV": N * V, "NB": N * columns, "P": -(-N // tile.block_m) * columns, "N": N, "1": 1}

    return features


def _cross_entropy(dtype: torch.dtype) -> Callable[[Shape], Any]:
    def run(shape: Shape) -> Any:
        x = torch.zeros(shape["N"], shape["V"], dtype=dtype, requires_grad=True)
        target = torch.arange(shape["N"]) % shape["V"]
        return (), lambda: dlgpu.functional.cross_entropy(x, target).backward()

    return run


def _sizes(shape: Shape) -> list[int]:
    """`tensors` sizes that add up to `n`: equal ones, and the rest in the first."""
    each = shape["n"] // shape["tensors"]
    return [shape["n"] - each * (shape["tensors"] - 1)] + [each] * (shape["tensors"] - 1)


def _adam_features(shape: Shape) -> dict[str, int]:
    tile = configs.optimizer_tile(4, True)
    sizes = _sizes(shape)
    programs = sum(-(-size // tile.block) for size in sizes)
    # The last few elements of such a tensor take narrow accesses, and so a second look at the coefficients.
    rests = sum(size % tile.vector > 0 for size in sizes)
    return {"n": shape["n"], "P": programs, "R": rests, "T": len(sizes), "1": 1}


def _adam(shape: Shape) -> Any:
    params = [torch.ones(size, requires_grad=True) for size in _sizes(shape)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = dlgpu.optim.Adam(params)
    # The first step makes the states.
    optimizer.step()
    reached = [*params, *(p.grad for p in params if p.grad is not None)]
    for state in optimizer.state.values():
        reached += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
    return reached, optimizer.step


def _shapes(names: str, *rows: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


# Rows of multiples of 16 bytes, as real layers have; batches that are not cut into parts, as where the weights fill the chip.
_LINEAR_FIT = _shapes(
    "M N K",
    (33, 40, 24),
    (70, 48, 16),
    (65, 32, 40),
    (130, 24, 32),
    (40, 80, 16),
    (97, 64, 8),
    (150, 40, 56),
    (34, 96, 64),
)
_LINEAR_HELD_OUT = _shapes("M N K", (129, 136, 32), (75, 40, 104), (500, 136, 40), (7, 8, 16))
_HALF = torch.bfloat16

MODELS: dict[str, Model] = {
    "cross_entropy": Model(
        "cross_entropy",
        "fwd+bwd",
        _HALF,
        _cross_entropy_features(_HALF),
        _cross_entropy(_HALF),
        # Rows enough that none is split between programs, as with thousands.
        _shapes("N V", (16, 9001), (17, 16500), (4, 4500), (17, 300), (9, 50), (30, 700)),
        _shapes("N V", (18, 12345), (16, 25001), (21, 1000), (1, 1)),
        ("compulsory", "requested"),
    ),
    "linear": Model(
        "linear + gelu",
        "fwd",
        _HALF,
        _linear_features(_HALF),
        _linear("gelu", _HALF, False),
        _LINEAR_FIT,
        _LINEAR_HELD_OUT,
    ),
    "linear_training": Model(
        "linear + gelu",
        "fwd+bwd",
        _HALF,
        _linear_features(_HALF),
        _linear("gelu", _HALF, True),
        _LINEAR_FIT,
        _LINEAR_HELD_OUT,
    ),
    "adam": Model(
        "adam",
        "step",
        torch.float32,
        _adam_features,
        _adam,
        _shapes("n tensors", (4000, 1), (9001, 1), (10002, 2), (12000, 3), (3003, 5), (20000, 4), (77, 7)),
        _shapes("n tensors", (15001, 1), (8765, 6), (1, 1)),
        ("compulsory", "requested"),
    ),
}


def meter(model: Model, shape: Shape) -> Counts:
    """What the model's kernels move at a shape, launch by launch. Takes interpreted kernels."""
    from .meter import TrafficMeter

    with dlgpu.use_backend("triton"):
        reached, call = model.run(shape)
        with TrafficMeter(reached) as traffic:
            call()
    if unclean := [launch.kernel for launch in traffic.launches if not launch.clean]:
        raise LawError(f"{', '.join(unclean)} at {dict(shape)}: stray accesses or a race")
    return [(launch.kernel, _quantities(model, launch)) for launch in traffic.launches]


def _quantities(model: Model, launch: Launch) -> dict[str, int]:
    return {quantity: getattr(launch, quantity) for quantity in model.quantities}


def fit(model: Model, counts: Sequence[tuple[Shape, Counts]]) -> list[Law]:
    """One law for each launch and quantity.

    Raises:
        LawError: the launches are not the same at all shapes, or no integer coefficients give the counts exactly.
    """
    kernels = [kernel for kernel, _ in counts[0][1]]
    if any([kernel for kernel, _ in launches] != kernels for _, launches in counts):
        raise LawError(f"{model.op}: which kernels run depends on the shape")
    names = list(model.features(counts[0][0]))
    matrix = np.array([[model.features(shape)[name] for name in names] for shape, _ in counts], np.float64)
    # Columns differ by orders of magnitude.
    scale = matrix.max(0)
    laws = []
    for i, kernel in enumerate(kernels):
        for quantity in model.quantities:
            measured = [launches[i][1][quantity] for _, launches in counts]
            solution, *_ = np.linalg.lstsq(matrix / scale, np.array(measured, np.float64), rcond=None)
            rounded = [round(float(value)) for value in solution / scale]
            law = Law(kernel, quantity, {name: c for name, c in zip(names, rounded, strict=True) if c})
            for (shape, _), expected in zip(counts, measured, strict=True):
                if (got := law(model.features(shape))) != expected:
                    where = f"{kernel}, {quantity} bytes at {dict(shape)}"
                    raise LawError(f"{where}: {expected}, the law {law} gives {got}")
            laws.append(law)
    return laws


def held_out_errors(model: Model, laws: Sequence[Law], counts: Sequence[tuple[Shape, Counts]]) -> list[str]:
    """Where the laws miss counts that they were not fitted on."""
    found = []
    for shape, launches in counts:
        measured = [value for _, quantities in launches for value in quantities.values()]
        predicted = [law(model.features(shape)) for law in laws]
        if measured != predicted:
            found.append(f"{model.op} at {dict(shape)}: metered {measured}, the laws give {predicted}")
    return found


def derive(model: Model) -> list[Law]:
    """Meters, fits, and checks on the held-out shapes. Takes interpreted kernels.

    Raises:
        LawError: no law, or one that misses a held-out count.
    """
    laws = fit(model, [(shape, meter(model, shape)) for shape in model.fitted_on])
    if errors := held_out_errors(model, laws, [(shape, meter(model, shape)) for shape in model.held_out]):
        raise LawError("; ".join(errors))
    return laws


def total(model: Model, laws: Sequence[Law], shape: Shape, quantity: str = "compulsory") -> int | None:
    """Bytes of all launches at a shape; None where the quantity has no law."""
    if quantity not in model.quantities:
        return None
    return sum(law(model.features(shape)) for law in laws if law.quantity == quantity)


@dataclasses.dataclass(frozen=True)
class Headline:
    """A real size, and what torch moves there: name -> bytes, counted on meta tensors."""

    model: str
    shape: Shape
    unfused: Callable[[], dict[str, int]]


def headlines() -> list[Headline]:
    """The sizes that the report shows."""
    N, V = 8192, 128256
    M, features_out, features_in = 8192, 14336, 4096
    n = 10**9
    layer = {"M": M, "N": features_out, "K": features_in}

    def linear(backward: bool) -> dict[str, int]:
        counter = unfused.linear_activation(M, features_out, features_in, "gelu", _HALF, backward)
        return {"torch eager": counter.total}

    def cross_entropy() -> dict[str, int]:
        return {
            "torch eager": unfused.cross_entropy(N, V, _HALF, backward=True).total,
            "torch eager, logits.float() first": unfused.cross_entropy(
                N, V, _HALF, backward=True, upcast=True
            ).total,
        }

    def adam() -> dict[str, int]:
        return {
            "torch eager (foreach)": unfused.adam(n).total,
            "torch fused=True": unfused.adam(n, fused=True).total,
        }

    return [
        Headline("cross_entropy", {"N": N, "V": V}, cross_entropy),
        Headline("linear", layer, lambda: linear(False)),
        Headline("linear_training", layer, lambda: linear(True)),
        Headline("adam", {"n": n, "tensors": 1}, adam),
    ]
