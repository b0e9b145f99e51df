"""What the kernels are meant to reach on an H200, and whether a measured row reached it: met, missed or open.

A goal compares what the row itself says: the paired ratio with its interval, or a time held to a ceiling of the same run. It
is open where the interval holds values on both sides of it. A missed one is published beside the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import ceilings
from .cases import BOTH, FORWARD, OPS, STEP
from .tables import bytes_text, median

__all__ = ["CLIPPED", "GOALS", "MASTERS", "NOTES", "Goal", "judge"]

# What is measured in another form than the op's own (see variants).
CLIPPED = "gradients clipped by their norm"
MASTERS = "bfloat16 with float32 masters"
NOTES = (CLIPPED, MASTERS)

Row = dict[str, Any]
Bytes = Callable[[Mapping[str, int], int], int]


@dataclasses.dataclass(frozen=True)
class Goal:
    """One goal of an op at some of its shapes.

    of: what is compared with `bound`:
        "speed-up"  the other's time over ours, at least
        "time"      our time over the other's, at most
        "ceiling"   `nbytes` of (shape, bytes an element) over our time, as a share of the copy ceiling, at least
        "memory"    the most memory that a call takes above its inputs, in bytes, at most
        "host"      the host's part of our call over that of the other's, at most
        "flat"      our time over our own at the shape `against`, at most
    against: the provider; "" where the goal is ours alone.
    options: those that the row must have, beside the defaults.
    note: of NOTES, that the row must have.
    """

    op: str
    shapes: tuple[str, ...]
    passes: str
    of: str
    bound: float
    against: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nbytes: Bytes | None = None
    timer: str = "events"
    note: str = ""

    @property
    def text(self) -> str:
        """The goal, in a few words."""
        if self.of == "speed-up":
            return f">= {self.bound:g}x {self.against}"
        if self.of == "ceiling":
            return f">= {self.bound:.0%} of the copy ceiling"
        if self.of == "memory":
            return f"<= {bytes_text(self.bound)} of memory"
        other = "the host time" if self.of == "host" else "the time"
        return f"<= {self.bound:g}x {other} of {self.against}"

    def of_row(self, row: Row) -> bool:
        """Whether a timing row is what the goal speaks of."""
        op = OPS[self.op]
        return (
            row["op"] == self.op
            and any(row["shape"] == dict(op.shapes[name]) for name in self.shapes)
            and row["passes"] == self.passes
            and row["options"] == {**op.defaults(), **self.options}
            and row["timer"] == self.timer
            and (row["note"] if row["note"] in NOTES else "") == self.note
            and (self.of in ("ceiling", "memory", "flat") or row["b"] == self.against)
        )

    def judged(self, row: Row, rows: Sequence[Row], best: Mapping[str, float]) -> Row | None:
        """{target, value, low, high, met}, met true, false, or null for open; None where the row does not say."""
        found = self._value(row, rows, best)
        if found is None:
            return None
        value, low, high = found
        least = self.of in ("speed-up", "ceiling")
        sure, out = (
            (low >= self.bound, high < self.bound) if least else (high <= self.bound, low > self.bound)
        )
        met = True if sure else False if out else None
        return {"target": self.text, "value": value, "low": low, "high": high, "met": met}

    def _value(
        self, row: Row, rows: Sequence[Row], best: Mapping[str, float]
    ) -> tuple[float, float, float] | None:
        if self.of == "speed-up":
            return 1 / row["ratio"], 1 / row["high"], 1 / row["low"]
        if self.of == "time":
            return row["ratio"], row["low"], row["high"]
        if self.of == "ceiling":
            if self.nbytes is None or ceilings.COPY not in best:
                return None
            moved = self.nbytes(row["shape"], 4 if row["dtype"] == "float32" else 2)
            share = moved / median(row["samples_a_s"]) / best[ceilings.COPY]
            return share, share, share
        if self.of == "memory":
            peak = row.get("peak_memory_a_bytes")
            return None if peak is None else (peak, peak, peak)
        if self.of == "host":
            if not row.get("host_a_s") or not row.get("host_b_s"):
                return None
            ratio = row["host_a_s"] / row["host_b_s"]
            return ratio, ratio, ratio
        return self._against_itself(row, rows)

    def _against_itself(self, row: Row, rows: Sequence[Row]) -> tuple[float, float, float] | None:
        shape = dict(OPS[self.op].shapes[self.against])
        keys = ("op", "passes", "options", "dtype", "timer")
        for other in rows:
            if (
                other["kind"] == "timing"
                and other["shape"] == shape
                and all(other[k] == row[k] for k in keys)
            ):
                ratio = median(row["samples_a_s"]) / median(other["samples_a_s"])
                return ratio, ratio, ratio
        return None


def _logits(reads: int, writes: int) -> Bytes:
    return lambda shape, size: (reads + writes) * shape["N"] * shape["V"] * size


def _parameters(nbytes: int) -> Bytes:
    return lambda shape, size: nbytes * shape["n"]


_SHALLOW = ("h200-k512", "h200-k256")
_LOGITS = ("h200-llama3", "h200-llama2")


def _linear(shapes: tuple[str, ...], forward: float, both: float, fused: float) -> list[Goal]:
    gelu = {"activation": "gelu_tanh"}
    return [
        Goal("linear", shapes, FORWARD, "speed-up", forward, "eager", gelu),
        Goal("linear", shapes, FORWARD, "speed-up", fused, "torch-fused", gelu),
        Goal("linear", shapes, BOTH, "speed-up", both, "eager"),
        Goal("linear", shapes, BOTH, "speed-up", 1.0, "compile-max"),
    ]


_FAST = {"grad_in_forward": True}
_LEAN = {"memory": "lean"}
# The numbers are the project's own aims, set before anything was measured.
GOALS: tuple[Goal, ...] = (
    *_linear(("h200-8k",), 1.00, 0.99, 0.97),
    *_linear(("h200-ffn",), 1.03, 1.00, 0.97),
    *_linear(("h200-k1024",), 1.20, 1.08, 0.97),
    *_linear(_SHALLOW, 1.35, 1.13, 0.85),
    Goal("mlp", ("h200-mlp",), BOTH, "speed-up", 1.12, "eager"),
    Goal("mlp", ("h200-mlp",), BOTH, "speed-up", 1.0, "compile-max"),
    Goal("cross_entropy", _LOGITS, FORWARD, "ceiling", 0.93, nbytes=_logits(1, 0)),
    Goal("cross_entropy", _LOGITS, BOTH, "ceiling", 0.93, nbytes=_logits(2, 1)),
    Goal("cross_entropy", _LOGITS, BOTH, "ceiling", 0.85, options=_FAST, nbytes=_logits(1, 1)),
    Goal("cross_entropy", _LOGITS, BOTH, "speed-up", 1.9, "eager"),
    Goal("cross_entropy", _LOGITS, BOTH, "speed-up", 5.0, "eager-float"),
    Goal("cross_entropy", _LOGITS, BOTH, "speed-up", 1.05, "liger"),
    Goal("cross_entropy", _LOGITS, BOTH, "speed-up", 1.3, "liger", _FAST),
    Goal("cross_entropy", _LOGITS, BOTH, "speed-up", 1.0, "quack"),
    *(
        Goal("cross_entropy", _LOGITS, passes, "speed-up", 1.0, rival)
        for passes in (FORWARD, BOTH)
        for rival in ("compile", "compile-max")
    ),
    Goal("linear_cross_entropy", ("h200-8k",), BOTH, "time", 1.06, "cublaslt"),
    Goal("linear_cross_entropy", ("h200-8k",), BOTH, "time", 1.45, "cublaslt", _LEAN),
    Goal("linear_cross_entropy", ("h200-8k",), BOTH, "memory", 1.35 * 2**30, options=_LEAN),
    Goal("linear_cross_entropy", ("h200-1k",), BOTH, "time", 1.15, "cublaslt"),
    *(
        goal
        for op, foreach in (("adam", 2.4), ("adamw", 2.6))
        for shapes in (("h200-300m", "h200-1b"),)
        for goal in (
            Goal(op, shapes, STEP, "ceiling", 0.95, nbytes=_parameters(28)),
            Goal(op, shapes, STEP, "speed-up", 1.05, "torch-fused"),
            Goal(op, shapes, STEP, "speed-up", foreach, "eager"),
        )
    ),
    Goal("adam", ("h200-300m",), STEP, "speed-up", 1.2, "torch-fused", note=CLIPPED),
    # Read: gradient 2, master, both moments 4 each; written: those three and the parameter's 2.
    Goal("adam", ("h200-300m",), STEP, "ceiling", 0.92, nbytes=_parameters(28), note=MASTERS),
    Goal("adam", ("h200-300m-1000",), STEP, "flat", 1.02, "h200-300m"),
    Goal("adam", ("h200-1b-1000",), STEP, "flat", 1.02, "h200-1b"),
    Goal("adam", ("many",), STEP, "speed-up", 5.0, "torch-fused", timer="host"),
    Goal("adam", ("many",), STEP, "speed-up", 1.5, "torch-fused", timer="graph"),
    Goal("adam", ("small",), STEP, "host", 0.5, "torch-fused"),
)
_WORDS = {True: "met", False: "missed", None: "open"}


def judge(row: Row, rows: Sequence[Row], best: Mapping[str, float], goals: Iterable[Goal] = GOALS) -> Row:
    """A timing row with what it was to reach, if anything.

    Args:
        rows: those measured so far; best: the ceilings of this run (`ceilings.best`).

    Returns:
        The row with `targets`: [{target, value, low, high, met}], and in words `target` and `reached`: "met" if all are,
        "missed" if one is, else "open".
    """
    found = [judged for goal in goals if goal.of_row(row) and (judged := goal.judged(row, rows, best))]
    if not found:
        return row
    met = [judged["met"] for judged in found]
    overall = False if False in met else None if None in met else True
    return {
        **row,
        "targets": found,
        "target": "; ".join(judged["target"] for judged in found),
        "reached": _WORDS[overall],
    }
