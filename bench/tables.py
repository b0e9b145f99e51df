"""Rows of results as text: titles, numbers for people, verdicts, table cells, Markdown and CSV.

What comes from a results file is not trusted: `plain` takes the control characters out, `markdown_escaped` what Markdown
would read as its own, and CSV cells never start like a formula.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import harness

__all__ = [
    "ALARMS",
    "Column",
    "alarms",
    "as_csv",
    "as_markdown",
    "bytes_text",
    "aligned",
    "columns",
    "environment_line",
    "environment_pairs",
    "fitting",
    "markdown_escaped",
    "markdown_table",
    "median",
    "notes",
    "op_title",
    "plain",
    "row_title",
    "seconds",
    "section_title",
    "sections",
    "sentence",
    "sentences",
    "summary",
    "verdict",
]

Row = Mapping[str, Any]

# Longer texts are cut where they are shown.
LONGEST = 300

# What must be seen before any number is.
ALARMS = ("wrong", "impossible", "error")
NOTES = {
    "timing": "speed-up = their time / ours: above 1, dlgpu is faster; median of interleaved pairs, and its 95% "
    "interval",
    "count": "a COUNT of each launch's distinct bytes, metered; not a timing: that takes a bandwidth measured on a GPU",
    "bound": "MODEL, not a timing: no launch can take less than its bytes at the bandwidth measured in this run",
    "model": "MODEL, not a timing: no launch takes less than its bytes at the memory's bandwidth or its products at the peak "
    "rate. eager's, compiled's: bytes, times dlgpu's. Fusing pays where the gain is 5% or more, along a size from 1/64 to 64 "
    "times what it is",
}
TITLES = {
    "digits": "Handwritten digits, 64-256-256-10, batch 64, the same weights and batches for all",
    "ops": "dlgpu (which runs NumPy or torch itself) against torch on this CPU, results checked against float64",
    "run": "dlgpu against the others, results checked against float64 before and after",
    "module": "The user's own module",
    "bytes": "Bytes that a GPU would move",
    "model": "What a GPU could do at most",
    "ceilings": "What this machine reaches, measured now",
    "gpu": "Fused against unfused on this GPU, cold L2, results checked against float64 first",
    "correctness": "The tests on this GPU",
    "check": "The vendor's checkers on small cases of every kernel",
    "tune": "Tiles measured on this GPU",
    "profile": "Achieved rates, and the GPU's own counters beside the laws of bytes",
}


def plain(value: object, limit: int = LONGEST) -> str:
    """One line of printable characters: what a terminal or a layout would obey is spelt out instead."""
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def seconds(value: float) -> str:
    """A duration for people: three digits and a unit."""
    if value >= 1000:
        return f"{value:.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def bytes_text(value: float) -> str:
    """Bytes for people, in powers of ten as bandwidths are."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def median(samples: Sequence[float]) -> float:
    """The middle one, or the mean of the two that are."""
    ordered = sorted(samples)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def op_title(row: Row) -> str:
    """The op and its options; those that are off (0, False or nothing) are not named."""
    options = ",".join(f"{name}={value}" for name, value in (row.get("options") or {}).items() if value)
    return plain(row["op"] + (f"[{options}]" if options else ""))


def row_title(row: Row) -> str:
    """A row's op, options, passes, sizes and note, in a line; for a row that has none of them what it is about."""
    if "op" not in row:
        return plain(row.get("title") or row.get("name") or row.get("provider") or row["kind"])
    parts = [op_title(row), row.get("passes", "")]
    parts += [f"{name}={size}" for name, size in (row.get("shape") or {}).items()]
    note = f", {row['note']}" if row.get("note") else ""
    return plain(" ".join(filter(None, parts)) + note)


def verdict(row: Row) -> str:
    """What a timing row says, in a word: faster, slower, same or ambiguous, as `harness.verdict`; or busy."""
    return "busy" if row["crowded"] else harness.verdict(row["low"], row["high"]).lower()


def sentence(row: Row) -> str:
    """A row of a kind that has no table, in a sentence."""
    return plain(_sentence(row), 2 * LONGEST)


def _sentence(row: Row) -> str:
    kind = row["kind"]
    if kind == "training":
        curves = [(a, b) for a, b in zip(row["losses_a"], row["losses_b"], strict=False)]
        known = [None if a is None or b is None else abs(a - b) for a, b in curves]
        first, every = (_largest(part) for part in (known[:100], known))
        return (
            f"held-out accuracy after {row['epochs']} epochs {row['accuracy_a']:.2%} {row['a']}, "
            f"{row['accuracy_b']:.2%} {row['b']}; largest difference of a loss {first} in 100 steps, {every} in all "
            f"{len(curves)}"
        )
    if kind == "kernels":
        return (
            f"the kernels in Triton's interpreter, {len(row['losses'])} steps: losses within "
            f"{row['max_difference']:.1e} of torch's"
        )
    if kind == "float64":
        return (
            f"distance of the losses from float64's over {row['steps']} steps: {row['distance_a']:.1e} {row['a']}, "
            f"{row['distance_b']:.1e} {row['b']}"
        )
    if kind == "bound":
        rivals = "; ".join(f"{name} {seconds(value)}" for name, value in row["unfused_s"].items())
        return f"MODEL: {row_title(row)} cannot take less than {seconds(row['compulsory_s'])}; {rivals}"
    if kind == "wrong":
        return f"{row_title(row)}: WRONG RESULT of {row['provider']}, not timed: {row['detail']}"
    if kind == "impossible":
        return f"{row_title(row)}: IMPOSSIBLE TIME of {row['provider']}: {row['detail'].removeprefix('impossible: ')}"
    if kind == "tests":
        failures = [f for f in row.get("failures") or () if isinstance(f, dict)]
        failed = "; ".join(f"{f.get('id')}: {f.get('message')}" for f in failures)
        counts = f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
        return f"{row_title(row)}: {counts}" + (f": {failed}" if failed else "")
    if kind == "checker":
        found = f"{row['errors']} errors" if row["errors"] else "no error"
        return f"{row_title(row)}: {found}" + (f": {row['detail']}" if row.get("detail") else "")
    if kind == "tuned":
        return row_title(row)
    if kind == "absent":
        return f"{row['provider']} is absent" + (f": {row['reason']}" if row.get("reason") else "")
    said = row.get("reason") or row.get("message") or row.get("detail") or ""
    return f"{row_title(row)}: {kind}" + (f": {said}" if said else "")


def sentences(rows: Iterable[Row]) -> list[str]:
    """Of rows without a table, each sentence once: a provider may be absent many times."""
    return list(dict.fromkeys(sentence(row) for row in rows))


def _largest(values: Sequence[float | None]) -> str:
    """Of differences; one that is no number is larger than all."""
    if any(value is None for value in values):
        return "not finite"
    return f"{max((value for value in values if value is not None), default=0.0):.1e}"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a kind's table.

    cell: its text in a row.
    width: what a row of the terminal keeps for it; 0 for the title, which takes what is left.
    rank: columns of the highest ranks go first where the terminal is narrow.
    """

    name: str
    cell: Callable[[Row], str]
    width: int = 0
    rank: int = 0
    right: bool = True


def _against(row: Row) -> str:
    return plain(row["b"] if row["a"] == "dlgpu" else f"{row['a']} vs {row['b']}", 30)


def _speed_up(row: Row) -> str:
    return f"{1 / row['ratio']:.2f}x"


def _interval(row: Row) -> str:
    return f"{1 / row['high']:.2f} to {1 / row['low']:.2f}"


def _rates(row: Row) -> str:
    rates = (row.get("bytes_per_s"), "B/s"), (row.get("flops_per_s"), "FLOP/s")
    return " ".join(_rate(value, unit) for value, unit in rates if value)


def _rate(value: float, unit: str) -> str:
    if unit == "B/s":
        return f"{bytes_text(value)}/s"
    if unit == "FLOP/s":
        return f"{value / 1e12:.4g} TFLOP/s" if value >= 1e11 else f"{value / 1e9:.3g} GFLOP/s"
    return f"{value:.4g} {plain(unit, 12)}"


def _memory(row: Row) -> str:
    a, b = row.get("peak_memory_a_bytes"), row.get("peak_memory_b_bytes")
    return "" if a is None or b is None else f"{bytes_text(a)} / {bytes_text(b)}"


def _target(row: Row) -> str:
    return plain(f"{row['target']}: {row.get('reached')}", 80) if row.get("target") else ""


def _how(row: Row) -> str:
    return plain(" ".join(dict.fromkeys(filter(None, [row.get("cache"), row.get("timer")]))))


def _unfused(row: Row) -> str:
    fused, unfused = row["compulsory_bytes"], row["unfused_bytes"] or {}
    return plain(
        "; ".join(
            f"{name} {size / 1e9:.3f} GB" + (f", {size / fused:.2f}x" if fused else "")
            for name, size in unfused.items()
        )
    )


_TIMING = (
    Column("op", lambda row: row_title(row), right=False),
    Column("dtype", lambda row: _dtype(row), 8, 4, right=False),
    Column("against", _against, 12, 1, right=False),
    Column("ours", lambda row: seconds(median(row["samples_a_s"])), 8, 3),
    Column("theirs", lambda row: seconds(median(row["samples_b_s"])), 8, 3),
    Column("speed-up", _speed_up, 8),
    Column("95% interval", _interval, 12, 2),
    Column("", lambda row: verdict(row), 9, right=False),
    # On a CPU: a GPU's configs have no room in a column.
    Column(
        "runs",
        lambda row: plain((row.get("config") or "") if row["device"] == "cpu" else "", 5),
        5,
        2,
        right=False,
    ),
    Column("target", lambda row: _target(row), 24, 5, right=False),
    Column("pairs", lambda row: str(row["pairs"]), 5, 6),
    Column("rates", _rates, 24, 5, right=False),
    Column("peak memory", _memory, 19, 7),
    Column("timed", _how, 12, 8, right=False),
)
_COUNT = (
    Column("op", lambda row: f"{row_title(row)} {_dtype(row)}", right=False),
    Column("dlgpu's kernels", lambda row: f"{row['compulsory_bytes'] / 1e9:.3f} GB", 15),
    Column("unfused, and times as many", _unfused, 34, 1, right=False),
)
_CEILING = (
    Column("what", lambda row: plain(row["name"]), right=False),
    Column("measured", lambda row: _rate(row["value"], row["unit"]), 16),
)


def _model_title(row: Row) -> str:
    options = {name: value for name, value in (row.get("options") or {}).items() if value}
    return "MODEL " + row_title({**row, "options": options})


def _times_as_many(row: Row, name: str) -> str:
    ours, other = row.get("compulsory_bytes"), (row.get("unfused_bytes") or {}).get(name)
    return f"{other / ours:.2f}x" if ours and other is not None else ""


def _model_seconds(row: Row, name: str | None = None) -> str:
    value = row.get("bound_s") if name is None else (row.get("unfused_bound_s") or {}).get(name)
    return "" if value is None else f">= {seconds(value)}"


def _pays(row: Row) -> str:
    """Where along one size the gain is worth having."""
    crossover = row.get("crossover") or {}
    return plain(crossover.get("pays_short") or "", 22)


_MODEL = (
    Column("MODEL of", _model_title, right=False),
    Column("dtype", lambda row: _dtype(row), 8, 6, right=False),
    # A long title has a line of its own: the other one says it too.
    Column("GPU", lambda row: "MODEL " + plain(row.get("gpu") or "", 16), 20, right=False),
    Column("bytes", lambda row: bytes_text(row.get("compulsory_bytes") or 0), 8, 2),
    Column("eager's", lambda row: _times_as_many(row, "torch eager"), 7, 3),
    Column("compiled's", lambda row: _times_as_many(row, "torch.compile"), 10, 4),
    Column("dlgpu", lambda row: _model_seconds(row), 10),
    Column("eager", lambda row: _model_seconds(row, "torch eager"), 10),
    Column("gain <=", lambda row: f"{row['gain']:.2f}x" if row.get("gain") else "", 7),
    Column("fusing pays", _pays, 15, 1, right=False),
)
_TABLES = {"timing": _TIMING, "count": _COUNT, "ceiling": _CEILING, "model": _MODEL}


def _dtype(row: Row) -> str:
    return plain(row.get("dtype") or "", 20)


def _generic(rows: Sequence[Row]) -> tuple[Column, ...]:
    """A column for each number or text of a kind of rows that has no table of its own."""
    hidden = {
        "kind",
        "section",
        "at_s",
        "op",
        "options",
        "passes",
        "shape",
        "note",
        "title",
        "name",
        "stage",
        "piece",
    }
    keys = dict.fromkeys(
        key
        for row in rows
        for key, value in row.items()
        if key not in hidden and isinstance(value, (str, int, float)) and not isinstance(value, bool)
    )

    def cell(key: str) -> Callable[[Row], str]:
        return lambda row: _scalar(key, row.get(key))

    title = Column("op", lambda row: row_title(row), right=False)
    return (
        title,
        *(Column(plain(key, 30).replace("_", " "), cell(key), 10, i) for i, key in enumerate(keys)),
    )


def _scalar(key: str, value: Any) -> str:
    if value is None or isinstance(value, (list, dict)):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        if key.endswith("_per_s"):
            return f"{value:.4g}"
        if key.endswith("_bytes") or key == "bytes":
            return bytes_text(value)
        if key.endswith("_s"):
            return seconds(value) if value >= 0 else f"-{seconds(-value)}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return plain(value, 120)


# Kinds shown as sentences.
_SENTENCES = {
    *("training", "kernels", "float64", "bound", "absent", "wrong", "impossible", "skipped", "error"),
    *("tests", "checker", "tuned"),
}


def columns(rows: Sequence[Row]) -> tuple[Column, ...] | None:
    """The columns of the table of some rows of one kind; None for a kind that is told in sentences."""
    kind = rows[0]["kind"]
    if kind in _SENTENCES:
        return None
    found = _TABLES.get(kind) or _generic(rows)
    # A column that says nothing in any row is left out.
    return tuple(column for column in found if any(column.cell(row) for row in rows))


def alarms(document: Row) -> list[str]:
    """Sentences on what was wrong, impossible or failed, and on a run that did not end."""
    found = []
    if document["status"] != "complete":
        found.append(f"Status: {plain(document['status'])}. Rows up to here are whole.")
    for kind in ALARMS:
        found += [sentence(row) for row in document["rows"] if row["kind"] == kind]
    stages = [row for row in document["rows"] if row["kind"] in ("tests", "checker")]
    found += [sentence(row) for row in stages if row.get("failed") or row.get("errors")]
    if crowded := sum(bool(row.get("crowded")) for row in document["rows"]):
        found.append(
            f"{crowded} measurements were taken while other work kept the cores busy: they say little."
        )
    return found


def summary(document: Row) -> str:
    """The timings in a sentence: how many were faster, and from where to where."""
    timings = [row for row in document["rows"] if row["kind"] == "timing"]
    if not timings:
        return "No timings in this file."
    words = [verdict(row) for row in timings]
    said = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    clear = [1 / row["ratio"] for row, word in zip(timings, words, strict=True) if word != "busy"]
    span = f"; speed-ups from {min(clear):.2f}x to {max(clear):.2f}x" if clear else ""
    many = "comparison" if len(timings) == 1 else "comparisons"
    return f"{len(timings)} {many} of dlgpu with others: {said}{span}."


_ENVIRONMENT_FIRST = (
    "dlgpu",
    "device",
    "gpu",
    "torch",
    "triton",
    "numpy",
    "python",
    "cpu",
    "cores",
    "threads",
)


def environment_pairs(environment: Row) -> list[tuple[str, str]]:
    """(name, value) of all that the file says of machine and software, flat, the important ones first."""
    names = [name for name in _ENVIRONMENT_FIRST if name in environment]
    names += [name for name in environment if name not in names]
    found = []
    for name in names:
        value = environment[name]
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items() if inner not in (None, ""))
        if value not in (None, "", []):
            found.append((plain(name, 40).replace("_", " "), plain(value)))
    return found


def environment_line(environment: Row) -> str:
    """One line for people."""
    threads = environment.get("threads")
    where = f"dlgpu {environment.get('dlgpu', '?')} on {environment.get('device', '?')}"
    parts = [where + (f" ({environment['why']})" if environment.get("why") else "")]
    parts += [f"{name} {environment.get(name) or 'absent'}" for name in ("torch", "triton", "numpy")]
    if isinstance(threads, dict):
        said = f"{threads.get('torch')} torch and {threads.get('numpy') or '?'} NumPy threads"
        parts.append(f"{said} on {environment.get('cores', '?')} cores")
    return plain(", ".join(parts))


def notes(rows: Iterable[Row]) -> list[str]:
    """How to read the kinds of rows that there are."""
    kinds = {row["kind"] for row in rows}
    return [note for kind, note in NOTES.items() if kind in kinds]


def section_title(section: str) -> str:
    """What a section is called."""
    return TITLES.get(section) or plain(section, 80)


_MARKDOWN = {c: f"\\{c}" for c in "\\`*[]|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def markdown_escaped(text: str) -> str:
    """Text as it is, in Markdown: no markup, no cell borders, no links."""
    escaped = "".join(_MARKDOWN.get(c, c) for c in plain(text, 600))
    return escaped.replace("://", ":\\/\\/")


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Lines of a table."""
    return [
        f"| {' | '.join(markdown_escaped(name) for name in names)} |",
        f"|{'|'.join('--:' if r else ':--' for r in right)}|",
        *(f"| {' | '.join(markdown_escaped(cell) for cell in row)} |" for row in rows),
    ]


def sections(document: Row) -> list[tuple[str, list[tuple[str, list[Row]]]]]:
    """(title, [(kind, rows)]) in the order of the file."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in document["rows"]:
        found.setdefault(row["section"], {}).setdefault(row["kind"], []).append(row)
    return [(section_title(name), list(kinds.items())) for name, kinds in found.items()]


def as_markdown(document: Row) -> str:
    """The document for people, in Markdown."""
    lines = ["# dlgpu benchmark", "", markdown_escaped(environment_line(document["environment"])), ""]
    lines += [markdown_escaped(summary(document)), ""]
    for text in alarms(document):
        lines += [f"**{markdown_escaped(text)}**", ""]
    for title, kinds in sections(document):
        lines += [f"## {markdown_escaped(title)}", ""]
        for kind, rows in kinds:
            if kind in NOTES:
                lines += [f"{NOTES[kind][0].upper()}{NOTES[kind][1:]}.", ""]
            table = columns(rows)
            if table is None:
                lines += [f"- {markdown_escaped(text)}" for text in sentences(rows)]
            else:
                cells = ([column.cell(row) for column in table] for row in rows)
                lines += markdown_table([c.name for c in table], cells, [c.right for c in table])
            lines.append("")
    ended = f"{plain(document['started'])}, {document['seconds']:.0f} s."
    cpu = document["environment"].get("cpu")
    lines += [markdown_escaped(ended + (f" {plain(cpu)}." if cpu else "")), ""]
    return "\n".join(lines)


_CSV_FIRST = (
    *(
        "section",
        "kind",
        "op",
        "options",
        "passes",
        "shape",
        "dtype",
        "note",
        "device",
        "cache",
        "timer",
        "a",
        "b",
    ),
    *("median_a_s", "median_b_s", "ratio", "low", "high", "confidence", "pairs", "verdict"),
)


def as_csv(document: Row) -> str:
    """One line a row of any kind: its numbers and texts, with medians in place of the samples."""
    rows = [_flat(row) for row in document["rows"]]
    names = [*_CSV_FIRST, *dict.fromkeys(key for row in rows for key in row if key not in _CSV_FIRST)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_csv_cell(name) for name in names)
    writer.writerows([_csv_cell(row.get(name, "")) for name in names] for row in rows)
    return file.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found[key] = " ".join(f"{name}={inner}" for name, inner in value.items())
        elif not isinstance(value, list):
            found[key] = value
    if row["kind"] == "timing":
        found |= {"median_a_s": median(row["samples_a_s"]), "verdict": verdict(row)}
        found["median_b_s"] = median(row["samples_b_s"])
    return found


def _csv_cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        text = plain(value, 2000)
        # A spreadsheet would compute these.
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return value if not isinstance(value, float) or math.isfinite(value) else ""


def fitting(kind: str, table: Sequence[Column], width: int, title: int = 44) -> tuple[Column, ...]:
    """The columns that a line of `width` has room for beside `title` characters of title.

    Those of a kind's own table always, whatever the row says, so that rows shown one by one keep their columns.
    """
    wanted = list(_TABLES.get(kind, table))
    while title + sum(column.width + 2 for column in wanted[1:]) > width:
        last = max(wanted[1:], key=lambda column: column.rank, default=None)
        if last is None or not last.rank:
            break
        wanted.remove(last)
    return tuple(wanted)


def aligned(table: Sequence[Column], texts: Sequence[str], width: int) -> str:
    """A line of a terminal's table; a title that is too long has a line of its own."""
    first = max(16, width - 2 - sum(column.width + 2 for column in table[1:]))
    cells = [
        f"{text:>{column.width}}" if column.right else f"{text:<{column.width}}"
        for column, text in zip(table[1:], texts[1:], strict=True)
    ]
    title = texts[0]
    head = f"  {title:<{first}}" if len(title) <= first else f"  {title}\n  {'':<{first}}"
    return "  ".join([head, *cells]).rstrip()
