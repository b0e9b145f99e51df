"""`dlgpu-bench compare A.json B.json`: what became faster or slower from A to B.

Rows are matched by what they time. Of two matched rows is compared, where both have it, dlgpu's time as a ratio to the same
baseline, measured in interleaved pairs: a machine that drifts or is busy slows both, and the ratio stays. Where the baselines
differ it is dlgpu's seconds, and the output says so.

The change is the quotient of the two medians, B over A: above 1 is slower. Its interval comes from the two rows' bootstrap
intervals by the method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008): on logarithms, with
estimates a, b and intervals (la, ua), (lb, ub), the difference b - a lies between

    b - a - sqrt((b - lb)^2 + (ua - a)^2)    and    b - a + sqrt((ub - b)^2 + (a - la)^2)

SLOWER or FASTER: the whole interval is beyond 2%, in which no run can see a difference (see `harness`). SAME: all of it is
within. AMBIGUOUS: neither, or other processes kept the cores, or a difference of a few microseconds on a CPU: what it takes to
start a parallel loop's threads stays different for seconds, or for a whole run, and no interval of one run sees that.
(On 2 cores it was 25 us more in one run of twelve: Adam's 64 us became 90, and its baseline's 182 became 209.)
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import harness, tables
from .cli import Amount
from .environment import UsageError
from .report import load, write_out
from .tables import plain

__all__ = ["Change", "Comparison", "command", "compare"]

Row = Mapping[str, Any]
SCHEMA = "dlgpu-compare/1"
FAIL_SLOWER = 5.0
# A call's, on a CPU: what two runs of the same may differ by.
THREADS_S = 40e-6
# What two rows must share; a baseline too, where one is used.
KEY = ("op", "options", "passes", "shape", "dtype", "a", "device", "cache", "timer")
# Of the environment: what a difference of the numbers may come from, other than dlgpu.
MACHINE = ("device", "gpu", "cpu", "cores", "threads", "system")
SOFTWARE = ("torch", "torch_cuda", "triton", "numpy", "python")


@dataclasses.dataclass(frozen=True)
class Change:
    """What became of a row.

    basis: "ratio" to the row's own baseline, or "time".
    before, after: of A and B, (estimate, low, high), a ratio or seconds.
    change, low, high: after / before, and its interval.
    doubt: why there is no verdict whatever the interval is: "busy", "microseconds", or "".
    """

    row: Row
    basis: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    change: float
    low: float
    high: float
    doubt: str

    @property
    def noise(self) -> float:
        """Half the interval's width over the change."""
        return (self.high - self.low) / (2 * self.change)

    @property
    def verdict(self) -> str:
        return "AMBIGUOUS" if self.doubt else harness.verdict(self.low, self.high)

    def slower_than(self, limit: float) -> bool:
        """Beyond doubt."""
        return not self.doubt and self.low > limit

    def hides(self, limit: float) -> bool:
        """Whether it may be slower than `limit`, and its noise is too large to tell."""
        noisy = self.low <= limit and self.noise > limit - 1
        return self.high > limit and (bool(self.doubt) or noisy)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two documents, side by side.

    changes: one for each pair of matched rows.
    only_before, only_after: timings without a partner.
    wrong: what was wrong or impossible, in a sentence each, with the file that says so.
    differences: of the environments: (name, in A, in B).
    """

    changes: tuple[Change, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    wrong: tuple[str, ...]
    differences: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]

    def status(self, fail_slower: float) -> int:
        """The exit status: 3 wrong output, 1 something is slower by more, 4 too noisy to tell, or 0."""
        limit = 1 + fail_slower / 100
        if self.wrong:
            return 3
        if any(change.slower_than(limit) for change in self.changes):
            return 1
        return 4 if any(change.hides(limit) for change in self.changes) else 0


def _key(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row[name] for name in names], sort_keys=True)


def _matched(before: Sequence[Row], after: Sequence[Row], names: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of partners; of several rows with one key the first with the first, and so on."""
    waiting: dict[str, list[int]] = {}
    for i, row in enumerate(before):
        waiting.setdefault(_key(row, names), []).append(i)
    found = []
    for j, row in enumerate(after):
        if partners := waiting.get(_key(row, names)):
            found.append((partners.pop(0), j))
    return found


def compare(before: Row, after: Row, basis: str = "auto") -> Comparison:
    """Compares two documents.

    Args:
        basis: "auto": the ratio to the same baseline where both rows have it, else the time; "time": always the time.
    """
    olds, news = ([row for row in d["rows"] if row["kind"] == "timing"] for d in (before, after))
    left, right = set(range(len(olds))), set(range(len(news)))
    pairs: list[tuple[int, int, str]] = []
    for names, kind in (((*KEY, "b"), "time" if basis == "time" else "ratio"), (KEY, "time")):
        i_left, j_right = sorted(left), sorted(right)
        for i, j in _matched([olds[i] for i in i_left], [news[j] for j in j_right], names):
            pairs.append((i_left[i], j_right[j], kind))
            left.remove(i_left[i])
            right.remove(j_right[j])
    return Comparison(
        changes=tuple(_change(olds[i], news[j], kind) for i, j, kind in sorted(pairs)),
        only_before=tuple(olds[i] for i in sorted(left)),
        only_after=tuple(news[j] for j in sorted(right)),
        wrong=tuple(
            f"{name}: {tables.sentence(row)}"
            for name, document in (("A", before), ("B", after))
            for row in document["rows"]
            if row["kind"] in ("wrong", "impossible")
        ),
        differences=tuple(_differences(before["environment"], after["environment"])),
        warnings=tuple(_warnings(before, after, [kind for *_, kind in pairs])),
    )


def _estimate(row: Row, basis: str) -> tuple[float, float, float]:
    if basis == "ratio":
        return row["ratio"], row["low"], row["high"]
    return harness.bootstrap_interval(row["samples_a_s"], [1.0] * len(row["samples_a_s"]))


def _change(old: Row, new: Row, basis: str) -> Change:
    before, after = _estimate(old, basis), _estimate(new, basis)
    a, la, ua = map(math.log, before)
    b, lb, ub = map(math.log, after)
    middle = b - a
    low = math.exp(middle - math.hypot(b - lb, ua - a))
    high = math.exp(middle + math.hypot(ub - b, a - la))
    doubt = ""
    if old["crowded"] or new["crowded"]:
        doubt = "busy"
    elif new["device"] == "cpu" and harness.verdict(low, high) in ("FASTER", "SLOWER"):
        # It may be the baseline's time that changed.
        sides = ("samples_a_s", "samples_b_s")[: 1 if basis == "time" else 2]
        shortest = min(statistics.median(row[side]) for row in (old, new) for side in sides)
        doubt = "microseconds" if shortest * math.expm1(abs(middle)) < THREADS_S else ""
    return Change(new, basis, before, after, math.exp(middle), low, high, doubt)


def _differences(before: Row, after: Row) -> list[tuple[str, str, str]]:
    old, new = (dict(tables.environment_pairs(environment)) for environment in (before, after))
    return [
        (name, old.get(name, "-"), new.get(name, "-"))
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and name != "why"
    ]


def _warnings(before: Row, after: Row, bases: Sequence[str]) -> list[str]:
    found = []
    for name, document in (("A", before), ("B", after)):
        if document["status"] != "complete":
            found.append(f"{name} is not complete: its status is {plain(document['status'])}")
    old, new = before["environment"], after["environment"]
    if any(old.get(name) != new.get(name) for name in MACHINE):
        found.append(
            "A and B are from different machines: ratios to the baseline may still be compared, times may not"
        )
    if "ratio" in bases and any(old.get(name) != new.get(name) for name in SOFTWARE):
        found.append(
            "the baselines' own software differs, and they may have changed too; --basis time leaves them out"
        )
    if old.get("source_hash") and old.get("source_hash") == new.get("source_hash"):
        found.append("A and B ran the same source of dlgpu: what differs is the measurement")
    return found


# The table.


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f}%"


def _amount(change: Change, of: tuple[float, float, float]) -> str:
    return f"{of[0]:.3f}" if change.basis == "ratio" else tables.seconds(of[0])


_TITLE = tables.Column("op", tables.row_title, right=False)
_NAMES = ("op", "dtype", "compared", "A", "B", "change", "95% interval", "verdict")
_RIGHT = (False, False, False, True, True, True, True, False)


def _cells(change: Change, limit: float) -> tuple[str, ...]:
    row = change.row
    title = tables.row_title(row) + (f" {plain(row['cache'])}" if row["cache"] in ("cold", "hot") else "")
    verdict = change.verdict + (f" ({change.doubt})" if change.doubt else "")
    if change.slower_than(limit):
        verdict += " !"
    return (
        title,
        plain(row["dtype"], 20),
        f"ratio to {plain(row['b'], 20)}" if change.basis == "ratio" else "time",
        _amount(change, change.before),
        _amount(change, change.after),
        _percent(change.change),
        f"{_percent(change.low)} to {_percent(change.high)}",
        verdict,
    )


def _counts(comparison: Comparison) -> str:
    verdicts = [change.verdict for change in comparison.changes]
    words = ("SAME", "FASTER", "SLOWER", "AMBIGUOUS")
    return f"{len(verdicts)} rows compared: " + ", ".join(f"{verdicts.count(word)} {word}" for word in words)


def _head(comparison: Comparison, names: tuple[str, str]) -> list[str]:
    lines = [
        f"A = {names[0]}, B = {names[1]}; change = dlgpu's time in B over that in A: above 0%, B is slower"
    ]
    if comparison.differences:
        lines += [f"differs: {name}: {old} -> {new}" for name, old, new in comparison.differences]
    else:
        lines.append("same machine, software and source")
    return [
        *lines,
        *(f"note: {text}" for text in comparison.warnings),
        *(f"! {text}" for text in comparison.wrong),
    ]


def _unmatched(comparison: Comparison) -> list[str]:
    return [
        f"only in {name}: {tables.row_title(row)} {plain(row['dtype'], 20)} against {plain(row['b'], 20)}"
        for name, rows in (("A", comparison.only_before), ("B", comparison.only_after))
        for row in rows
    ]


def conclusion(comparison: Comparison, fail_slower: float) -> str:
    """What the exit status means, in a sentence."""
    limit, status = 1 + fail_slower / 100, comparison.status(fail_slower)
    count = sum(
        change.slower_than(limit) if status == 1 else change.hides(limit) for change in comparison.changes
    )
    said = {
        0: f"ok: nothing is slower by more than {fail_slower:g}% for certain, and no row is too noisy to tell",
        1: f"slower: {count} rows by more than {fail_slower:g}%",
        3: "wrong: a file holds wrong or impossible results, so its times count for nothing",
        4: f"too noisy: {count} rows may be slower by more than {fail_slower:g}%, and what was measured cannot tell",
    }
    return f"{said[status]} (exit status {status})"


def as_table(
    comparison: Comparison,
    names: tuple[str, str],
    fail_slower: float,
    width: int | None = None,
    colour: bool = False,
) -> str:
    """For a terminal."""
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=colour, highlight=False, markup=False, emoji=False
    )
    for line in _head(comparison, names):
        console.print(Text(line, style="bold red" if line.startswith("!") else "dim"))
    console.print()
    rows = [_cells(change, 1 + fail_slower / 100) for change in comparison.changes]
    # From a narrow terminal goes first what can be worked out from the rest.
    shown = list(range(len(_NAMES)))
    for column in (4, 3, 1, 2, 6):
        room = sum(max([len(_NAMES[i]), *(len(row[i]) for row in rows)]) + 3 for i in shown[1:])
        if room + 18 <= console.width:
            break
        shown.remove(column)
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i in shown:
        table.add_column(Text(_NAMES[i]), justify="right" if _RIGHT[i] else "left", overflow="fold")
    styles = {"SLOWER": "red", "FASTER": "green", "AMBIGUOUS": "yellow"}
    for row in rows:
        style = styles.get(row[-1].split()[0], "")
        table.add_row(*(Text(row[i], style=style if i == len(row) - 1 else "") for i in shown))
    console.print(table)
    for line in (*_unmatched(comparison), _counts(comparison), conclusion(comparison, fail_slower)):
        console.print(Text(line))
    return file.getvalue()


def as_markdown(comparison: Comparison, names: tuple[str, str], fail_slower: float) -> str:
    """For a pull request."""
    lines = ["# dlgpu benchmark: comparison", ""]
    lines += [f"- {tables.markdown_escaped(line)}" for line in _head(comparison, names)]
    cells = (_cells(change, 1 + fail_slower / 100) for change in comparison.changes)
    lines += ["", *tables.markdown_table(_NAMES, cells, _RIGHT), ""]
    lines += [f"- {tables.markdown_escaped(line)}" for line in _unmatched(comparison)]
    lines += [
        f"- {tables.markdown_escaped(line)}"
        for line in (_counts(comparison), conclusion(comparison, fail_slower))
    ]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison, fail_slower: float) -> str:
    """For a program: schema "dlgpu-compare/1"."""

    def identity(row: Row) -> dict[str, Any]:
        return {name: row[name] for name in (*KEY, "b")} | {"note": row.get("note") or ""}

    document = {
        "schema": SCHEMA,
        "fail_slower_percent": fail_slower,
        "status": comparison.status(fail_slower),
        "differences": [list(difference) for difference in comparison.differences],
        "warnings": list(comparison.warnings),
        "wrong": list(comparison.wrong),
        "rows": [
            {
                **identity(change.row),
                "basis": change.basis,
                "before": list(change.before),
                "after": list(change.after),
                "change": change.change,
                "low": change.low,
                "high": change.high,
                "doubt": change.doubt,
                "verdict": change.verdict,
            }
            for change in comparison.changes
        ],
        "only_a": [identity(row) for row in comparison.only_before],
        "only_b": [identity(row) for row in comparison.only_after],
    }
    return json.dumps(document, indent=1) + "\n"


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--fail-slower",
    type=Amount(0, 1000),
    default=FAIL_SLOWER,
    show_default=True,
    metavar="PCT",
    help="Exit status 1 if dlgpu is slower in B by more than this many percent, for certain.",
)
@click.option(
    "--basis",
    type=click.Choice(("auto", "time")),
    default="auto",
    show_default=True,
    help="auto: the ratio to the same baseline where both files have it, else the time; time: always the time.",
)
@click.option(
    "--format", "format_", type=click.Choice(("table", "md", "json")), default="table", show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead of to the terminal."
)
def command(a: Path, b: Path, fail_slower: float, basis: str, format_: str, out: Path | None) -> int:
    """What became faster or slower from results file A to results file B."""
    comparison = compare(load(a), load(b), basis)
    if not comparison.changes and not comparison.wrong:
        raise UsageError(f"{plain(a)} and {plain(b)} have no timing of the same thing: nothing to compare")
    names = (plain(a.name, 60), plain(b.name, 60))
    if format_ == "table":
        tty = sys.stdout.isatty() and out is None
        width = None if tty else 140
        text = as_table(comparison, names, fail_slower, width, tty)
    elif format_ == "md":
        text = as_markdown(comparison, names, fail_slower)
    else:
        text = as_json(comparison, fail_slower)
    write_out(text, out)
    return comparison.status(fail_slower)
