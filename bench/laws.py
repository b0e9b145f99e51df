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

from .cases import BOTH, OPS, STEP, Make, Op
from .cases._base import bind
from .launches import Limits, Record, dry_run, recording
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


Count = Callable[[Record], int]


def _counted(count: Count, operand: str) -> Count:
    return lambda r: count(r) * r.bytes_of(operand)


def _sized(count: Count, operand: str) -> Count:
    return lambda r: count(r) * r.operands[operand].itemsize if operand in r.operands else 0


def _times(operand: str, **counts: Count) -> Terms:
    """The operand's bytes times each count, whose name the term bears: `down` gives "down w"."""
    return {f"{name} {_short(operand)}": _counted(count, operand) for name, count in counts.items()}


def _elements(operand: str, **counts: Count) -> Terms:
    """Bytes of as many elements of the operand."""
    return {f"{name} of {_short(operand)}": _sized(count, operand) for name, count in counts.items()}


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


def _classes(r: Record) -> int:
    """1 where cross-entropy's targets are class indices, 0 where they are probabilities."""
    return int(not r["FLAGS"] & _PROBABILITIES)


# FLAGS of cross-entropy's launches.
_PROBABILITIES = 2
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
    whole, rest = divmod(r["N"], len(each))
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
_DZ: dict[str, Terms] = {
    "dz_ptr": _elements("dz_ptr", **{"N columns": lambda r: r["N"] * _head_columns(r)}),
    "partial_ptr": _elements("partial_ptr", **{"down columns": lambda r: _head_down(r) * _head_columns(r)}),
}
_SCALES: Terms = {"scales": lambda r: 4 * (3 + r["SMOOTH"]) * r["N"]}
# A sum goes to the result where one program makes it, else to that program's place.
_REDUCED: dict[str, Terms] = {
    name: {
        f"{_short(name)}, one program": _counted(lambda r: r["REDUCE"] * (r["grid0"] == 1), name),
        f"{_short(name)}, programs": _counted(lambda r: r["REDUCE"] * (r["grid0"] > 1), name),
        f"{_short(name)}, not reduced": _counted(lambda r: 1 - r["REDUCE"], name),
    }
    for name in ("loss_ptr", "partial_ptr")
}
_UNSPLIT: dict[str, Terms] = {
    name: {_short(name): _counted(_single, name)}
    for name in ("loss_ptr", "stats_ptr", "lse_ptr", "correct_ptr")
}
# Class indices are asked for by each block of columns, probabilities are read as the logits are.
_TARGETS: Terms = {
    "columns target": lambda r: _classes(r) * r["grid1"] * r.bytes_of("target_ptr"),
    "target": lambda r: (1 - _classes(r)) * r.bytes_of("target_ptr"),
}
# What puts the parts of a split row together looks at the target's logit, and at no probabilities.
_COMBINED: dict[str, Terms] = {
    "x_ptr": _elements("x_ptr", N=lambda r: _classes(r) * r["N"]),
    "target_ptr": {"target": lambda r: _classes(r) * r.bytes_of("target_ptr")},
}
_TENSORS: Terms = {"T": lambda r: r["tensors"]}
# Of 12 float32 numbers each. The addresses of their learning rates are padded to an even number.
_GROUPS: Terms = {"groups": lambda r: r.bytes_of("hyper_ptr") // 48}
_MULTI: Terms = {
    "programs": lambda r: r["grid0"],
    "tensors with a rest": lambda r: r["rests"],
}

# What is not the argument's own bytes times a number, by kernel and argument: of compulsory bytes and of requested ones.
ONCE: dict[str, dict[str, Terms]] = {
    "_batch_norm_finish_kernel": {"x_ptr": _elements("x_ptr", C=lambda r: r["C"])},
    "_cross_entropy_fwd_kernel": _UNSPLIT,
    "_cross_entropy_combine_kernel": _COMBINED,
    "_linear_cross_entropy_fwd_kernel": _head_once() | {"partial_ptr": _PARTIAL},
    "_linear_cross_entropy_dz_kernel": _head_once() | _DZ | {"scales_ptr": _SCALES},
    "_loss_fwd_kernel": _REDUCED,
    "_multi_margin_fwd_kernel": _REDUCED,
    "_prologue_kernel": {"table_ptr": _TENSORS, "lr_address_ptr": _GROUPS},
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
        "x_ptr": {**_own("x_ptr"), **_elements("x_ptr", N=lambda r: _single(r) * _classes(r) * r["N"])},
        "target_ptr": _TARGETS,
        **_UNSPLIT,
    },
    "_cross_entropy_combine_kernel": _COMBINED,
    "_cross_entropy_bwd_kernel": {
        **_by_column("stats_ptr"),
        "target_ptr": _TARGETS,
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

    def __call__(self, record: Record) -> Traffic:
        """The traffic of a launch.

        Raises:
            LawError: no law covers it.
        """
        found = {
            quantity: sum(self.one(record, operand, quantity) for operand in record.operands)
            for quantity in QUANTITIES
        }
        return Traffic(**found)

    def one(self, record: Record, operand: str, quantity: str) -> int:
        """Bytes of one argument.

        Raises:
            LawError: no law covers it.
        """
        table: dict[tuple[str, str, str], Law] = self._table  # type: ignore[attr-defined]
        law = table.get((record.key, operand, quantity))
        if law is None:
            known = any(kernel == record.key for kernel, *_ in table)
            what = f"no metered launch had the argument {operand}" if known else "was never metered"
            raise LawError(f"{record.key}: {what}")
        return law(record)

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
    seen = np.asarray(matrix.any(0))
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
    """A small size at which an op is metered.

    patches: replace functions of kernels/configs.py that choose how much a launch takes at once, where no small size makes
        them cut.
    limits: of the GPU that the interpreter is to pose as; its own if None.
    """

    shape: Mapping[str, int]
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    passes: str = BOTH
    patches: Mapping[str, int] = dataclasses.field(default_factory=dict)
    limits: Limits | None = None

    def __str__(self) -> str:
        return " ".join(
            [
                *(f"{name}={value}" for name, value in {**self.shape, **self.options}.items()),
                str(self.dtype).removeprefix("torch."),
            ]
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
            with recording(probe.limits, watch=traffic.watch) as records, traffic:
                run()
        limits = probe.limits or _triton.device_limits(torch.device("cpu"))
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


@dataclasses.dataclass(frozen=True)
class Probes:
    """Where an op is metered: the laws are fitted on `fit`, and on that of the ops `like`, and then held to `held_out`."""

    fit: tuple[Probe, ...] = ()
    held_out: tuple[Probe, ...] = ()
    like: tuple[str, ...] = ()


def _probes(names: str, *rows: tuple[int, ...], **settings: Any) -> tuple[Probe, ...]:
    return tuple(Probe(dict(zip(names.split(), row, strict=True)), **settings) for row in rows)


_FP32, _FP16 = torch.float32, torch.float16
# A GPU on which cuBLAS takes all products of 16 bits.
_CUBLAS = (75, 64 * 1024, 40)
_CUT = {"linear_cross_entropy_chunk": 128, "linear_cross_entropy_split": 2}
_MN = Probes(
    _probes("M N", (25, 40), (90, 103)), (*_probes("M N", (7, 333), dtype=_FP32), *_probes("M N", (77, 51)))
)
_ROWS = Probes(
    _probes("N V", (70, 16), (9, 300), (2, 33000)),
    (*_probes("N V", (5, 4100), dtype=_FP32), *_probes("N V", (3, 20001), (1, 40000))),
)
_NORM = Probes(
    (*_probes("M N", (70, 16), (33, 304), (3, 9000)), *_probes("M N", (2, 17000), dtype=_FP32)),
    (
        *_probes("M N", (20, 1000), dtype=_FP32),
        *_probes("M N", (2, 10000)),
        *_probes("M N", (1, 18001), dtype=_FP32),
    ),
)
_LOSS = Probes(
    (
        *_probes("M N", (25, 40), (90, 103), (60, 117)),
        *_probes("M N", (25, 40), (90, 103), options={"reduction": "none"}),
    ),
    (
        *_probes("M N", (7, 333), dtype=_FP32),
        *_probes("M N", (77, 151), options={"reduction": "sum"}),
    ),
)
_LIKE_MSE = Probes(held_out=_LOSS.held_out, like=("mse_loss",))
_STEPS = _probes("n tensors", (9001, 1), (10002, 2), (3003, 5), (77, 7), dtype=_FP32)
_STEPS_HELD_OUT = (*_probes("n tensors", (8765, 6), dtype=_FP32), *_probes("n tensors", (15001, 3)))


def _optimizer(**options: Any) -> Probes:
    """With the default options, and with these."""
    changed = [options] if options else []
    return Probes(
        (*_STEPS, *(dataclasses.replace(probe, options=o) for o in changed for probe in _STEPS)),
        (*_STEPS_HELD_OUT, *(dataclasses.replace(_STEPS_HELD_OUT[0], options=o) for o in changed)),
    )


# Small sizes with whole, partial, many and single tiles, aligned rows and others, every kernel and every term of its laws.
PROBES: dict[str, Probes] = {
    "linear": Probes(
        (
            # The last one's batch is cut into parts.
            *_probes("M N K", (33, 40, 24), (130, 72, 40), (70, 136, 200), (2100, 24, 16)),
            *_probes("M N K", (130, 72, 40), (70, 33, 7), dtype=_FP32),
            *_probes("M N K", (70, 48, 16), options={"activation": "none"}),
        ),
        (
            *_probes("M N K", (200, 72, 104), dtype=_FP16),
            *_probes("M N K", (65, 48, 77), dtype=_FP32),
            *_probes("M N K", (70, 48, 16), options={"activation": "relu"}),
            *_probes("M N K", (7, 8, 16)),
        ),
        # Where cuBLAS multiplies, the activation is a pass of its own.
        like=("activation",),
    ),
    "mlp": Probes(
        (
            *_probes("M I H O L", (70, 24, 40, 16, 2), (130, 40, 72, 24, 2), (70, 16, 72, 10, 2)),
            *_probes("M I H O L", (70, 24, 40, 16, 2), (130, 40, 72, 24, 2), dtype=_FP32),
        ),
        (
            *_probes("M I H O L", (65, 16, 48, 8, 3), dtype=_FP16),
            *_probes("M I H O L", (64, 16, 24, 10, 3), dtype=_FP32),
        ),
        like=("linear",),
    ),
    "gated_linear": Probes(
        (
            *_probes("M H K", (33, 40, 24), (130, 72, 40)),
            *_probes("M H K", (70, 48, 16), (130, 24, 72), dtype=_FP32),
            *_probes("M H K", (70, 48, 16), options={"unit": "glu"}),
            *_probes("M H K", (25, 40, 24), (90, 103, 8), dtype=_FP16, limits=_CUBLAS),
        ),
        (
            *_probes("M H K", (65, 48, 24), dtype=_FP16),
            *_probes("M H K", (7, 9, 30), dtype=_FP32),
            *_probes("M H K", (70, 48, 16), options={"unit": "reglu"}),
            *_probes("M H K", (33, 24, 16), dtype=_FP16, limits=_CUBLAS),
        ),
        like=("linear",),
    ),
    "activation": _MN,
    "dropout": _MN,
    "cross_entropy": Probes(
        (
            *_probes("N V", (70, 16), (9, 304), (9, 300), (2, 8300), (3, 17001)),
            *_probes("N V", (70, 16), (20, 304), (9, 300), (6, 17001), options={"grad_in_forward": True}),
            *_probes("N V", (9, 304), (2, 8300), options={"target": "probabilities"}),
            *_probes("N V", (9, 304), (2, 8300), options={"label_smoothing": 0.1}),
        ),
        (
            *_probes("N V", (18, 1003), (5, 8192)),
            *_probes("N V", (3, 12345), dtype=_FP32),
            *_probes("N V", (11, 1001), (2, 20000), options={"grad_in_forward": True}),
            *_probes("N V", (5, 77), options={"target": "probabilities"}),
        ),
    ),
    "linear_cross_entropy": Probes(
        (
            *_probes("N V H", (70, 152, 48), (130, 272, 64)),
            *_probes("N V H", (70, 400, 48), patches=_CUT),
            *_probes("N V H", (70, 400, 48), (130, 272, 32), patches=_CUT, options={"memory": "lean"}),
        ),
        (
            *_probes("N V H", (75, 300, 33), dtype=_FP32),
            *_probes("N V H", (40, 520, 16), patches=_CUT, options={"memory": "lean"}),
            *_probes("N V H", (130, 200, 16), options={"memory": "lean"}),
        ),
        like=("linear",),
    ),
    "softmax": _ROWS,
    "log_softmax": _ROWS,
    "logsumexp": _ROWS,
    "mse_loss": _LOSS,
    "l1_loss": _LIKE_MSE,
    "smooth_l1_loss": _LIKE_MSE,
    "huber_loss": _LIKE_MSE,
    "binary_cross_entropy_with_logits": _LIKE_MSE,
    "hinge_loss": _LIKE_MSE,
    "kl_div": _LIKE_MSE,
    "multi_margin_loss": Probes(
        (
            *_probes("M N", (70, 10), (9, 300), (3, 9000)),
            *_probes("M N", (9, 300), (70, 10), options={"reduction": "none"}),
        ),
        (*_probes("M N", (11, 333), dtype=_FP32), *_probes("M N", (2, 8500), options={"p": 2})),
    ),
    "batch_norm": Probes(
        _probes("N C", (100, 40), (70, 24), (520, 30), (700, 16)),
        (*_probes("N C", (600, 20), dtype=_FP32), *_probes("N C", (33, 17))),
    ),
    "layer_norm": _NORM,
    "rms_norm": Probes(_NORM.fit[:1], _NORM.held_out, like=("layer_norm",)),
    "sgd": _optimizer(momentum=0.0),
    "adagrad": _optimizer(),
    "rmsprop": _optimizer(momentum=0.9),
    "adam": _optimizer(amsgrad=True),
    "adamw": Probes(held_out=_STEPS_HELD_OUT, like=("adam",)),
    "training_step": Probes(
        (),
        _probes("M I H O L", (64, 16, 24, 10, 2), (70, 24, 40, 16, 3)),
        like=("mlp", "cross_entropy", "adam"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Derived:
    """An op's laws, and what they were fitted on and held to: how many launches, and at which sizes."""

    op: str
    laws: Laws
    fitted: int
    held_out: int
    held_out_at: tuple[str, ...]


class Meter:
    """Derives laws; what several ops share is metered once."""

    def __init__(self) -> None:
        self._samples: dict[str, list[Sample]] = {}

    def samples(self, name: str) -> list[Sample]:
        """What an op's launches were given and moved at the sizes that laws are fitted on."""
        if name not in self._samples:
            probes = PROBES[name]
            own = [sample for probe in probes.fit for sample in meter(OPS[name], probe)]
            self._samples[name] = own + [sample for other in probes.like for sample in self.samples(other)]
        return self._samples[name]

    def derive_fitted(self, name: str) -> Laws:
        """An op's laws, not yet held to other sizes."""
        return fit(self.samples(name))

    def derive(self, name: str) -> Derived:
        """Meters an op, fits its laws and holds them to the other sizes.

        Raises:
            LawError: there are no such laws, or one misses a held-out launch.
        """
        if name not in PROBES:
            raise LawError(f"{name}: no sizes to meter it at")
        samples = self.samples(name)
        laws = fit(samples)
        held_out = [(probe, sample) for probe in PROBES[name].held_out for sample in meter(OPS[name], probe)]
        for probe, sample in held_out:
            if errors := check(laws, sample):
                raise LawError(f"{name} at {probe}: {errors[0]}")
        at = tuple(str(probe) for probe in PROBES[name].held_out)
        return Derived(name, laws, len(samples), len(held_out), at)


def check(laws: Laws, sample: Sample) -> list[str]:
    """Where the laws miss what a launch moved, argument by argument."""
    found = []
    for operand, traffic in sample.operands.items():
        for quantity in QUANTITIES:
            predicted = laws.one(sample.record, operand, quantity)
            if predicted != getattr(traffic, quantity):
                what = f"{sample.record.key}, {quantity} bytes of {operand}"
                found.append(f"{what}: {getattr(traffic, quantity)} were metered, the law gives {predicted}")
    return found
