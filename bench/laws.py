"""How many bytes each kernel moves at any size: laws fitted on small launches, exact on others.

Triton's interpreter is far too slow for a real size, but what a launch moves is a simple function of what it is given. A law
says it for one argument of one kernel and one quantity:

    read       distinct bytes of it that the launch reads before it wrote them
    written    distinct bytes of it that the launch writes; read and written are compulsory, the floor
    requested  every access, repeats included: what the caches are asked for, and where one pass too many would show

as a sum of integer coefficients times terms: the argument's own bytes, in most cases, and for `requested` its bytes times
how many tiles or programs ask for them (TERMS below). The real kernels are metered in a few small launches, the coefficients
are fitted to the counts, and the laws must then give the counts of other launches, at other sizes and in another dtype, to
the byte. What a launch at a real size is given, and with which tiles, comes from a dry run of the launchers (`launches`),
which for each small launch must give exactly what was launched. A launch that these laws do not cover gets no number.

Metering takes a process whose kernels are interpreted (see `interpreted`); evaluating a law takes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

import dlgpu
from dlgpu.kernels import _triton, configs

from .cases import BOTH, STEP, Make, Op
from .cases._base import bind
from .launches import Record, dry_run, recording
from .unfused import Row

__all__ = [
    "QUANTITIES",
    "Law",
    "LawError",
    "Laws",
    "Probe",
    "Sample",
    "Traffic",
    "fit",
    "meter",
]

QUANTITIES = ("read", "written", "requested")

Terms = Mapping[str, Callable[[Record], int]]


class LawError(Exception):
    """The counts follow no law of the form that was asked for, or no law covers a launch."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of a launch, or of one of its arguments."""

    read: int
    written: int
    requested: int

    @property
    def compulsory(self) -> int:
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Law:
    """One argument's bytes of one quantity: the sum of integer coefficients times terms.

    unseen: terms that were 0 in every metered launch, so that nothing is known of them.
    """

    kernel: str
    operand: str
    quantity: str
    coefficients: Mapping[str, int]
    unseen: tuple[str, ...] = ()

    def __call__(self, record: Record) -> int:
        """Bytes of a launch.

        Raises:
            LawError: the launch has a term that no metered launch had.
        """
        terms = _terms(self.kernel, self.operand, self.quantity)
        if missing := [name for name in self.unseen if terms[name](record)]:
            raise LawError(f"{self.kernel}: no metered launch had the term {missing[0]!r} of {self.operand}")
        return sum(coefficient * terms[name](record) for name, coefficient in self.coefficients.items())

    def __str__(self) -> str:
        return (
            " + ".join(f"{c if c != 1 else ''} {name}".strip() for name, c in self.coefficients.items())
            or "0"
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _own(operand: str) -> Terms:
    return {_short(operand): lambda r: r.bytes_of(operand)}


def _short(operand: str) -> str:
    return operand.replace("_ptr", "")


def _times(operand: str, **counts: Callable[[Record], int]) -> Terms:
    """The operand's bytes times each count, whose name the term bears: `down` gives "down w"."""
    return {
        f"{name.replace('_', ' ')} {_short(operand)}": lambda r, count=count: count(r) * r.bytes_of(operand)
        for name, count in counts.items()
    }


def _elements(operand: str, **counts: Callable[[Record], int]) -> Terms:
    """Bytes of as many elements of the operand."""
    return {
        f"{name} of {_short(operand)}": lambda r, count=count: (
            count(r) * r.operands[operand].itemsize if operand in r.operands else 0
        )
        for name, count in counts.items()
    }


# Tiles of a product: b is asked for by each row of tiles, a by each column of them.
def _down(r: Record) -> int:
    return _cdiv(r["M"], r["BLOCK_M"])


def _across(r: Record) -> int:
    return _cdiv(r["N"], r["BLOCK_N"])


def _grid0(r: Record) -> int:
    return r["grid0"]


def _grid1(r: Record) -> int:
    return r["grid1"]


def _rows(r: Record) -> int:
    return r["N"]


def _single(r: Record) -> int:
    """1 where one program has the whole of a row or of a sum."""
    return int(r["grid1"] == 1)


# A descriptor's tile of g goes over into u, which lies behind it.
def _gated_rows(r: Record) -> int:
    return _down(r) * (min(_across(r) * r["BLOCK_N"], 2 * r["N"]) + r["N"]) * r["K"]


# The vocabulary's tiles that a launch of the head takes.
def _head_columns(r: Record) -> int:
    return r["stop"] - r["start"]


def _head_across(r: Record) -> int:
    return _cdiv(_head_columns(r), r["BLOCK_N"])


def _head_down(r: Record) -> int:
    return _cdiv(r["N"], r["BLOCK_M"])


def _head_splits(r: Record) -> int:
    return _cdiv(_head_across(r), r["tiles"])


def _head_multiplies(r: Record) -> int:
    return int("kept_ptr" not in r.operands)


def _head_fields(r: Record) -> int:
    return r.elements("partial_ptr") // (r["splits"] * r["N"])


def _strip_steps(r: Record) -> int:
    """Steps of all programs, each of which has `strip` rows and takes BLOCK_M of them at a time."""
    strips, rest = divmod(r["N"], r["strip"])
    return strips * _cdiv(r["strip"], r["BLOCK_M"]) + _cdiv(rest, r["BLOCK_M"])


# Rows of cross-entropy that do not lie on 16-byte boundaries.
_EDGES = 32


def _edge_columns(r: Record) -> int:
    """Of all rows, the columns before the first 16-byte boundary and behind the last, which are read by themselves and again
    where a row stays in registers."""
    if not r["FLAGS"] & _EDGES or not r["RESIDENT"]:
        return 0
    vector = 16 // r.operands["x_ptr"].itemsize
    # The rows' phases repeat.
    heads = [min(-row * r["stride_xn"] % vector, r["C"]) for row in range(min(vector, r["N"]))]
    each = [head + (r["C"] - head) % vector for head in heads]
    return sum(each[row % vector] for row in range(r["N"])) if r["N"] < 64 else _periodic(each, r["N"])


def _periodic(each: Sequence[int], count: int) -> int:
    whole, rest = divmod(count, len(each))
    return whole * sum(each) + sum(each[:rest])


def _blocks(r: Record) -> int:
    return _cdiv(r["N"], r["BLOCK_M"])


def _whole(r: Record) -> int:
    return int(not r["WHOLE"])


def _product(a: str, b: str, bias: str = "bias_ptr") -> dict[str, Terms]:
    return {a: _times(a, across=_across), b: _times(b, down=_down), bias: _times(bias, down=_down)}


def _by_program(*operands: str) -> dict[str, Terms]:
    return {name: _times(name, programs=_grid0) for name in operands}


def _by_column(*operands: str) -> dict[str, Terms]:
    return {name: _times(name, columns=_grid1) for name in operands}


def _one_or_each(operand: str) -> Terms:
    """One value that each program reads, and the first once more for the tail behind whole vectors; or a value an element."""
    return {
        f"(programs + 1) {_short(operand)}": lambda r: (
            r["ONE_DLOSS"] * (r["grid0"] + 1) * r.bytes_of(operand)
        ),
        _short(operand): lambda r: (1 - r["ONE_DLOSS"]) * r.bytes_of(operand),
    }


def _head(multiplied: Sequence[str] = ("x_ptr", "w_ptr", "bias_ptr")) -> dict[str, Terms]:
    return {
        "x_ptr": {"across x": lambda r: _head_multiplies(r) * _head_across(r) * r.bytes_of("x_ptr")},
        "w_ptr": _elements(
            "w_ptr",
            **{"down columns H": lambda r: _head_multiplies(r) * _head_down(r) * _head_columns(r) * r["H"]},
        ),
        "bias_ptr": _elements(
            "bias_ptr", **{"down columns": lambda r: _head_multiplies(r) * _head_down(r) * _head_columns(r)}
        ),
        "kept_ptr": _elements("kept_ptr", **{"N columns": lambda r: r["N"] * _head_columns(r)}),
        "target_ptr": _times("target_ptr", across=_head_across),
    }


def _head_once() -> dict[str, Terms]:
    return {
        "x_ptr": {"x": lambda r: _head_multiplies(r) * r.bytes_of("x_ptr")},
        "w_ptr": _elements(
            "w_ptr", **{"columns H": lambda r: _head_multiplies(r) * _head_columns(r) * r["H"]}
        ),
        "bias_ptr": _elements("bias_ptr", columns=lambda r: _head_multiplies(r) * _head_columns(r)),
        "kept_ptr": _elements("kept_ptr", **{"N columns": lambda r: r["N"] * _head_columns(r)}),
    }


_PARTIAL = _elements(
    "partial_ptr", **{"fields splits N": lambda r: _head_fields(r) * _head_splits(r) * r["N"]}
)
_DZ = {
    "dz_ptr": _elements("dz_ptr", **{"N columns": lambda r: r["N"] * _head_columns(r)}),
    "partial_ptr": _elements("partial_ptr", **{"down columns": lambda r: _head_down(r) * _head_columns(r)}),
}
_SCALES = {"scales": lambda r: 4 * (3 + r["SMOOTH"]) * r["N"]}
_REDUCED = {
    name: {
        f"{_short(name)}, one program": lambda r, name=name: (
            r["REDUCE"] * (r["grid0"] == 1) * r.bytes_of(name)
        ),
        f"{_short(name)}, programs": lambda r, name=name: r["REDUCE"] * (r["grid0"] > 1) * r.bytes_of(name),
        f"{_short(name)}, not reduced": lambda r, name=name: (1 - r["REDUCE"]) * r.bytes_of(name),
    }
    for name in ("loss_ptr", "partial_ptr")
}
_UNSPLIT = {
    name: {_short(name): lambda r, name=name: _single(r) * r.bytes_of(name)}
    for name in ("loss_ptr", "stats_ptr", "lse_ptr", "correct_ptr")
}
_TENSORS = {"T": lambda r: r["tensors"]}
_MULTI = {
    "programs": lambda r: r["grid0"],
    "tensors with a rest": lambda r: r["rests"],
}

# What is not the argument's own bytes times a number, by kernel and argument: of compulsory bytes and of requested ones.
ONCE: dict[str, dict[str, Terms]] = {
    "_batch_norm_finish_kernel": {"x_ptr": _elements("x_ptr", C=lambda r: r["C"])},
    "_cross_entropy_fwd_kernel": _UNSPLIT,
    "_cross_entropy_combine_kernel": {"x_ptr": _elements("x_ptr", N=_rows)},
    "_linear_cross_entropy_fwd_kernel": _head_once() | {"partial_ptr": _PARTIAL},
    "_linear_cross_entropy_dz_kernel": _head_once() | _DZ | {"scales_ptr": _SCALES},
    "_loss_fwd_kernel": _REDUCED,
    "_multi_margin_fwd_kernel": _REDUCED,
    "_prologue_kernel": {"table_ptr": _TENSORS},
    "_multi_tensor_kernel": {"table_ptr": _TENSORS, "scalars_ptr": _TENSORS},
}
TERMS: dict[str, dict[str, Terms]] = {
    "_linear_kernel": _product("a_ptr", "b_ptr"),
    "_linear_tma_kernel": _product("a", "b"),
    "_gated_fwd_kernel": _product("x_ptr", "w_ptr"),
    "_gated_fwd_tma_kernel": _product("x", "w")
    | {"w": _elements("w", **{"down (columns + N) K": _gated_rows})},
    "_softmax_fwd_kernel": {"x_ptr": {**_own("x_ptr"), **_times("x_ptr", long=_whole)}},
    "_softmax_bwd_kernel": {
        "dy_ptr": {**_own("dy_ptr"), **_times("dy_ptr", long=_whole)},
        "y_ptr": {**_own("y_ptr"), **_times("y_ptr", long=lambda r: _whole(r) * (1 - r["LOG"]))},
    },
    "_logsumexp_bwd_kernel": _by_column("stats_ptr", "dlse_ptr"),
    "_layer_norm_fwd_kernel": {
        "x_ptr": {**_own("x_ptr"), **_times("x_ptr", long=_whole)},
        **_by_program("w_ptr", "b_ptr"),
    },
    "_layer_norm_means_kernel": {"w_ptr": _times("w_ptr", N=_rows)},
    "_layer_norm_bwd_kernel": {
        "w_ptr": _times("w_ptr", steps=_strip_steps),
        **_by_column("stats_ptr", "means_ptr"),
    },
    "_batch_norm_small_fwd_kernel": {"x_ptr": {**_own("x_ptr"), **_elements("x_ptr", C=lambda r: r["C"])}},
    "_batch_norm_statistics_kernel": {
        "x_ptr": {**_own("x_ptr"), **_elements("x_ptr", **{"strips C": lambda r: r["grid0"] * r["C"]})}
    },
    "_batch_norm_finish_kernel": {"x_ptr": _elements("x_ptr", C=lambda r: r["C"])},
    "_batch_norm_apply_kernel": _by_program("mean_ptr", "var_ptr", "w_ptr", "b_ptr"),
    "_batch_norm_sums_kernel": _by_program("stats_ptr", "w_ptr", "b_ptr"),
    "_batch_norm_dx_kernel": _by_program("stats_ptr", "dw_ptr", "db_ptr", "w_ptr", "b_ptr"),
    "_dropout_kernel": _by_program("seed_ptr"),
    "_cross_entropy_fwd_kernel": {
        "x_ptr": {**_own("x_ptr"), **_elements("x_ptr", N=lambda r: _single(r) * r["N"])},
        **_by_column("target_ptr"),
        **_UNSPLIT,
    },
    "_cross_entropy_combine_kernel": {"x_ptr": _elements("x_ptr", N=_rows)},
    "_cross_entropy_bwd_kernel": {
        **_by_column("target_ptr", "stats_ptr"),
        "dloss_ptr": _elements("dloss_ptr", **{"columns N": lambda r: r["grid1"] * r["N"]}),
        "denominator_ptr": _times("denominator_ptr", programs=lambda r: r.programs),
    },
    "_cross_entropy_fwd_grad_kernel": {
        "x_ptr": {
            **_own("x_ptr"),
            **_times("x_ptr", long=lambda r: 1 - r["RESIDENT"]),
            **_elements("x_ptr", N=_rows, edges=_edge_columns),
        },
        "denominator_ptr": _times("denominator_ptr", blocks=_blocks),
    },
    "_scale_kernel": _by_program("g_ptr"),
    "_linear_cross_entropy_product_kernel": _product("a_ptr", "b_ptr"),
    "_linear_cross_entropy_fwd_kernel": _head()
    | {"target_ptr": _times("target_ptr", splits=_head_splits), "partial_ptr": _PARTIAL},
    "_linear_cross_entropy_scales_kernel": {
        "dloss_ptr": _elements("dloss_ptr", N=_rows),
        "denominator_ptr": _times("denominator_ptr", programs=_grid0),
    },
    "_linear_cross_entropy_dz_kernel": _head()
    | _DZ
    | {"scales_ptr": {"across scales": lambda r: _head_across(r) * _SCALES["scales"](r)}},
    "_loss_fwd_kernel": _REDUCED,
    "_loss_bwd_kernel": {"dloss_ptr": _one_or_each("dloss_ptr")},
    "_multi_margin_fwd_kernel": {"x_ptr": {**_own("x_ptr"), **_elements("x_ptr", N=_rows)}, **_REDUCED},
    "_multi_margin_bwd_kernel": {
        "x_ptr": {
            **_own("x_ptr"),
            **_times("x_ptr", long=lambda r: 1 - r["RESIDENT"]),
            **_elements("x_ptr", N=_rows),
        },
        "dloss_ptr": _elements("dloss_ptr", N=_rows),
    },
    "_prologue_kernel": {
        "table_ptr": _TENSORS,
        "hyper_ptr": _TENSORS,
        "lr_address_ptr": _TENSORS,
    },
    "_multi_tensor_kernel": {"table_ptr": _MULTI, "scalars_ptr": _MULTI},
}


def _terms(kernel: str, operand: str, quantity: str) -> Terms:
    table = TERMS if quantity == "requested" else ONCE
    return table.get(kernel.partition("(")[0], {}).get(operand) or _own(operand)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A metered launch: what it was given, and the traffic of each argument."""

    record: Record
    operands: Mapping[str, Traffic]


@dataclasses.dataclass(frozen=True)
class Laws:
    """The laws of some kernels, by kernel, argument and quantity."""

    laws: tuple[Law, ...]

    def __post_init__(self) -> None:
        table = {(law.kernel, law.operand, law.quantity): law for law in self.laws}
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_kernels", {law.kernel for law in self.laws})

    def __call__(self, record: Record) -> Traffic:
        """The traffic of a launch.

        Raises:
            LawError: no law covers it.
        """
        table: dict[tuple[str, str, str], Law] = self._table  # type: ignore[attr-defined]
        if record.key not in self._kernels:  # type: ignore[attr-defined]
            raise LawError(f"{record.key} was never metered")
        found = dict.fromkeys(QUANTITIES, 0)
        for operand in record.operands:
            for quantity in QUANTITIES:
                law = table.get((record.key, operand, quantity))
                if law is None:
                    raise LawError(f"{record.key}: no metered launch had the argument {operand}")
                found[quantity] += law(record)
        return Traffic(**found)

    def text(self, kernel: str, quantity: str) -> str:
        """A kernel's law in a line; "compulsory" for what is read and written together."""
        quantities = ("read", "written") if quantity == "compulsory" else (quantity,)
        parts = [str(law) for law in self.laws if law.kernel == kernel and law.quantity in quantities]
        return " + ".join(part for part in parts if part != "0") or "0"

    @property
    def kernels(self) -> list[str]:
        return sorted({law.kernel for law in self.laws})


def fit(samples: Sequence[Sample]) -> Laws:
    """The laws that give every sample exactly.

    Raises:
        LawError: no integer coefficients do, or the samples leave a coefficient open.
    """
    groups: dict[tuple[str, str], list[tuple[Record, Traffic]]] = {}
    for sample in samples:
        for operand, traffic in sample.operands.items():
            groups.setdefault((sample.record.key, operand), []).append((sample.record, traffic))
    return Laws(
        tuple(
            _fit_one(kernel, operand, quantity, [(r, getattr(t, quantity)) for r, t in found])
            for (kernel, operand), found in sorted(groups.items())
            for quantity in QUANTITIES
        )
    )


def _fit_one(kernel: str, operand: str, quantity: str, counts: Sequence[tuple[Record, int]]) -> Law:
    terms = _terms(kernel, operand, quantity)
    matrix = np.array([[term(record) for term in terms.values()] for record, _ in counts], np.float64)
    seen = matrix.any(0)
    names = [name for name, present in zip(terms, seen, strict=True) if present]
    unseen = tuple(name for name in terms if name not in names)
    where = f"{kernel}, {quantity} bytes of {operand}"
    coefficients: dict[str, int] = {}
    if names:
        # Terms differ by orders of magnitude.
        scale = matrix[:, seen].max(0)
        scaled = matrix[:, seen] / scale
        solution, _, rank, _ = np.linalg.lstsq(
            scaled, np.array([c for _, c in counts], np.float64), rcond=1e-9
        )
        if rank < len(names):
            raise LawError(f"{where}: the metered launches leave the terms {', '.join(names)} open")
        rounded = [round(float(value)) for value in solution / scale]
        coefficients = {name: c for name, c in zip(names, rounded, strict=True) if c}
    law = Law(kernel, operand, quantity, coefficients, unseen)
    for record, count in counts:
        if (got := law(record)) != count:
            raise LawError(f"{where}: {count} were metered, the law {law} gives {got}")
    return law


@dataclasses.dataclass(frozen=True)
class Probe:
    """A small size at which an op is metered; `patches` replace functions of kernels/configs.py that choose how much a launch
    takes at once, where no small size makes them cut."""

    shape: Mapping[str, int]
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    passes: str = BOTH
    patches: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(
            [*(f"{name}={size}" for name, size in self.shape.items()), str(self.dtype).removeprefix("torch.")]
        )


@contextlib.contextmanager
def _patched(patches: Mapping[str, int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(configs, name, lambda *args, value=value: value))
        yield


def meter(op: Op, probe: Probe) -> list[Sample]:
    """What the op's launches at a probe are given and move. Takes interpreted kernels.

    Raises:
        LawError: stray accesses or a race; or a dry run that differs from what was launched.
    """
    from .meter import TrafficMeter

    def call(device: str) -> Callable[[], object]:
        passes = STEP if op.passes == (STEP,) else probe.passes
        return bind(op, op.functions["dlgpu"], probe.shape, passes, Make(device, probe.dtype), probe.options)

    stepping = op.passes == (STEP,)
    with _patched(probe.patches):
        with dlgpu.use_backend("triton"):
            run = call("cpu")
            if stepping:
                # The first step makes the states.
                run()
            traffic = TrafficMeter()
            with recording(watch=traffic.watch) as records, traffic:
                run()
        limits = _triton.device_limits(torch.device("cpu"))
        dry = dry_run(lambda: call("meta"), limits, warm=stepping)
    expected = [step for step in dry if not isinstance(step, Row)]
    if records != expected:
        raise LawError(f"{op.name} at {probe}: a dry run gives other launches than there were")
    samples = []
    for record, launch in zip(records, traffic.launches, strict=True):
        if not launch.clean:
            raise LawError(f"{launch.kernel} at {probe}: stray accesses or a race")
        samples.append(Sample(record, _by_operand(record, launch.args)))
    return samples


def _by_operand(record: Record, args: Mapping[str, Any]) -> dict[str, Traffic]:
    """The meter's account by the record's operands: watched tensors, `name[i]`, add up."""
    found = {name: Traffic(0, 0, 0) for name in record.operands}
    for label, argument in args.items():
        name = label if label in found else label.partition("[")[0]
        if name not in found:
            if argument.requested:
                raise LawError(f"{record.kernel}: {label} is no argument of the record")
            continue
        before = found[name]
        found[name] = Traffic(
            before.read + argument.compulsory_reads,
            before.written + argument.compulsory_writes,
            before.requested + argument.requested,
        )
    return found
