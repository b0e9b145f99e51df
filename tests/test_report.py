"""Results files: written whole, read with suspicion, and shown as a table, Markdown, CSV and HTML with plots."""

import copy
import csv
import dataclasses
import errno
import html.parser
import io
import itertools
import json
import math
import os
import random
import re
import resource
import stat
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.text
import pytest

import synthetic_results as synthetic
from dlgpu.bench import __main__ as cli
from dlgpu.bench import harness, plots, report, show, tables
from dlgpu.bench.environment import UsageError

# What each format must not obey: markup, cell borders, lines, colours and cursor movement, direction, formulas, math.
HOSTILE = "$\\frac{$<script>alert(1)</script>|\n\r\x1b[2J\x1b]0;x\x07\u202e'\"&`*_[x](javascript:y) https://evil.example"


@pytest.fixture(scope="module")
def full():
    return synthetic.document(synthetic.full())


@pytest.fixture(scope="module")
def page(full):
    return show.as_html(full, "synthetic.json")


# Reading.


def test_a_document_of_all_kinds_is_read(tmp_path, full):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(full))
    assert report.load(path) == full
    assert {row["kind"] for row in full["rows"]} == set(report.KINDS)


def test_unknown_keys_are_kept(tmp_path):
    row = synthetic.timing() | {"a key of tomorrow": [1, {"x": None}]}
    path = synthetic.write(tmp_path / "r.json", [row])
    assert report.load(path)["rows"][0]["a key of tomorrow"] == [1, {"x": None}]


def test_every_key_is_documented():
    for kind, keys in report.KINDS.items():
        text = report.__doc__.partition(f"\n    {kind} ")[2]
        assert text, kind
        words = set(re.findall(r"\b[a-z_0-9]+\b", re.split(r"\n    \w|\Z", text)[0]))
        assert set(keys) <= words, kind


def change(path, value):
    """A document with one value replaced; `...` takes it away."""
    found = synthetic.document([synthetic.timing(pairs=7), *synthetic.ceilings()])
    at = found
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return found


TIMING = ("rows", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "dlgpu-bench/1", "its schema is 'dlgpu-bench/1', and this dlgpu-bench reads 'dlgpu-bench/2' alone"),
        (("schema",), ..., "names no schema"),
        (("schema",), "x" * 10**5, "its schema is 'xxx"),
        (("status",), "perfect", "its status must be one of"),
        (("rows",), {}, "its rows must be a list"),
        (("environment",), [], "its environment must be an object"),
        (("rows", 1), 3, "row 2 must be an object"),
        (("rows", 1, "kind"), "guess", "row 2 is of the unknown kind 'guess'"),
        (("rows", 1, "kind"), "\x1b[2J", r"of the unknown kind '\x1b[2J'"),
        (("rows", 1, "value"), 0, "value of row 2 (ceiling) must be a positive number"),
        ((*TIMING, "samples_a_s"), [1.0, -1.0], "samples_a_s of row 1 (timing) must be a list of positive numbers"),
        ((*TIMING, "samples_a_s"), [1.0], "must have one entry a pair"),
        ((*TIMING, "samples_b_s"), [], "must be a list of positive numbers"),
        ((*TIMING, "low"), 1e6, "low <= ratio <= high"),
        ((*TIMING, "ratio"), True, "ratio of row 1 (timing) must be a positive number"),
        ((*TIMING, "ratio"), 10**400, "ratio of row 1 (timing) must be a positive number"),
        ((*TIMING, "shape"), {"M": "64"}, "shape of row 1 (timing) must be sizes by name"),
        ((*TIMING, "options"), {"x": [1]}, "options of row 1 (timing) must be values by name"),
        ((*TIMING, "op"), ..., "row 1 (timing) has no op"),
        ((*TIMING, "crowded"), "no", "must be true or false"),
        ((*TIMING, "flops"), "many", "must be a number of at least 0"),
    ],
)  # fmt: skip
def test_what_is_no_such_document_is_refused(tmp_path, path, value, message):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(change(path, value)))
    with pytest.raises(UsageError) as caught:
        report.load(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[NaN]", "NaN is no number"),
        (b"[" + b"9" * 5000 + b"]", "no JSON"),
        (b"[]", "names no schema"),
        (b"null", "names no schema"),
        # A pickle is not even looked at.
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.", "no JSON"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_what_is_no_json_is_refused(tmp_path, data, message):
    file = tmp_path / "r.json"
    file.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        report.load(file)


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "no regular file"),
        # Opened, it would wait for a writer.
        (fifo, "no regular file"),
        (Path(os.devnull), "no regular file"),
        (Path("\0"), "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            report.load(path)
    monkeypatch.setattr(report, "LARGEST_FILE", 1000)
    with pytest.raises(UsageError, match="larger than"):
        report.load(synthetic.write(tmp_path / "r.json", [synthetic.timing()]))


# Writing.


def results(out, **more):
    return report.Results(out, {"suite": "synthetic"}, copy.deepcopy(synthetic.ENVIRONMENT), **more)


def skipped(title="t"):
    return {"section": "run", "kind": "skipped", "title": title, "reason": "none"}


def test_the_file_is_whole_after_every_row(tmp_path, full):
    found = results(tmp_path / "new" / "folder")
    assert report.load(found.json_path)["status"] == "running"
    for i, row in enumerate(full["rows"], 1):
        found.add(row)
        if i % 20 == 1:
            assert len(report.load(found.json_path)["rows"]) == i
    found.finish("complete")
    document = report.load(found.json_path)
    assert document["status"] == "complete"
    assert [{**row, "at_s": 0} for row in document["rows"]] == [{**row, "at_s": 0} for row in full["rows"]]
    assert found.markdown_path.read_text().startswith("# dlgpu benchmark")
    # Renamed into place: nothing is left beside.
    assert sorted(path.suffix for path in found.json_path.parent.iterdir()) == [".json", ".md"]


def test_what_is_not_finite_becomes_null(tmp_path):
    found = results(tmp_path)
    row = next(row for row in synthetic.full() if row["kind"] == "training")
    found.add({**row, "losses_a": [1.0, math.nan, math.inf], "losses_b": [1.0, 2.0, 3.0]})
    (read,) = report.load(found.json_path)["rows"]
    assert read["losses_a"] == [1.0, None, None]
    assert "not finite in all 3" in tables.sentence(read)


def test_a_named_file(tmp_path):
    path = tmp_path / "mine.json"
    results(path).finish("complete")
    assert report.load(path)["status"] == "complete"
    # Results may be replaced, anything else may not.
    results(path).finish("interrupted")
    assert report.load(path)["status"] == "interrupted"
    other = tmp_path / "package.json"
    other.write_text('{"name": "precious"}')
    with pytest.raises(UsageError, match="holds no results: it is not overwritten"):
        results(other)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        results(tmp_path / "folder.json")
    assert other.read_text() == '{"name": "precious"}'


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", Path(os.devnull) / "x", tmp_path / "file" / "r.json"):
        with pytest.raises(UsageError, match="cannot"):
            results(out)


def full_disk(monkeypatch, on):
    write = report.write_whole

    def refused(path, text):
        if on(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(report, "write_whole", refused)


def test_a_disk_that_was_full_for_a_while_loses_nothing(tmp_path, monkeypatch):
    said = []
    found = results(tmp_path, tell=said.append)
    with monkeypatch.context() as patch:
        full_disk(patch, lambda path: True)
        found.add(skipped("a"))
        found.add(skipped("b"))
    assert len(said) == 1
    assert "No space left" in said[0]
    assert "kept in memory" in said[0]
    assert report.load(found.json_path)["rows"] == []
    found.add(skipped("c"))
    found.finish("complete")
    assert [row["title"] for row in report.load(found.json_path)["rows"]] == ["a", "b", "c"]
    assert len(said) == 1


def test_a_disk_that_stays_full_loses_nothing(tmp_path, monkeypatch):
    said, spare = [], tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    found = results(tmp_path / "out", tell=said.append)
    full_disk(monkeypatch, lambda path: spare not in path.parents)
    found.add(skipped("kept"))
    found.finish("interrupted")
    assert spare in found.json_path.parents
    document = report.load(found.json_path)
    assert (document["status"], document["rows"][0]["title"]) == ("interrupted", "kept")
    assert str(found.json_path) in said[-1]
    assert not found.lost


def test_no_disk_at_all_loses_nothing(tmp_path, monkeypatch, capsys):
    found = results(tmp_path / "out", tell=lambda text: None)
    full_disk(monkeypatch, lambda path: True)
    found.add(skipped("kept"))
    found.finish("complete")
    assert found.lost
    document = report.validate(json.loads(capsys.readouterr().out))
    assert document["rows"][0]["title"] == "kept"


def test_files_are_for_whom_others_are(tmp_path):
    """As any new file, and README.md for whom it was before."""
    path, other = tmp_path / "r.json", tmp_path / "other"
    before = os.umask(0o027)
    try:
        report.write_whole(path, "new")
        other.write_text("")
    finally:
        os.umask(before)
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o604)
    report.write_whole(path, "again")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert path.read_text() == "again"


def test_a_write_that_really_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "r.json"
    report.write_whole(path, "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            report.write_whole(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_timing_row_is_as_documented(tmp_path):
    machine = itertools.cycle([1e-3, 2e-3, 1.1e-3])
    result = harness.paired(
        lambda: None,
        lambda: None,
        stop=harness.Stop(budget_s=1e-9),
        timer=lambda function, repeats: next(machine) * repeats,
    )

    class Case:
        op, passes, shape, dtype_name, note, options = (
            "op",
            "fwd",
            {"M": 1},
            "float32",
            "",
            {"activation": "gelu"},
        )

    row = report.timing_row("ops", Case(), "dlgpu", "eager", "cpu", result, None, flops=3, something_new="x")
    assert row["flops"] == 3
    assert row["compulsory_bytes"] is None
    assert (row["samples_a_s"], row["samples_b_s"]) == (list(result.samples_a), list(result.samples_b))
    assert (row["dropped"], row["dropped_samples"], row["clocks"]) == (0, [], None)
    known = {"dropped": (harness.Dropped(1.0, 2.0, "throttled"),), "clocks_mhz": (1500.0,) * result.pairs}
    watched = dataclasses.replace(result, **known)
    more = report.timing_row("ops", Case(), "dlgpu", "eager", "cuda", watched, None)
    assert more["dropped_samples"] == [{"a_s": 1.0, "b_s": 2.0, "why": "throttled"}]
    assert (more["dropped"], more["clocks"]) == (1, [1500.0] * result.pairs)
    found = results(tmp_path)
    found.add(row)
    assert report.load(found.json_path)["rows"][0]["something_new"] == "x"


# For people.


def test_plain_is_one_printable_line():
    for text in (HOSTILE, "\ud800", "a\u2028b\x85c\0", "\u2066\u200b"):
        shown = tables.plain(text)
        assert shown.isprintable()
        assert len(shown.splitlines()) == 1
    assert tables.plain("\x1b[2J") == "\\x1b[2J"
    assert len(tables.plain("x" * 10**6)) == tables.LONGEST


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.5 us"), (3e-9, "0.003 us")]
)
def test_seconds(value, text):
    assert tables.seconds(value) == text


def test_verdicts():
    row = synthetic.timing()
    for low, high, word in (
        (0.4, 0.5, "faster"),
        (1.1, 1.2, "slower"),
        (0.99, 1.01, "same"),
        (0.9, 1.2, "ambiguous"),
    ):
        assert tables.verdict({**row, "low": low, "high": high}) == word
    assert tables.verdict({**row, "crowded": True}) == "busy"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 250])
def test_the_table_fits_the_terminal(full, width):
    text = show.as_table(full, width=width, colour=False)
    assert max(map(len, text.splitlines())) <= width
    if width >= 40:
        squeezed = re.sub(r"[\s─]+", "", text)
        assert "WRONGRESULTofcce" in squeezed
        assert "IMPOSSIBLETIMEofcupy" in squeezed
        words = [tables.verdict(row) for row in full["rows"] if row["kind"] == "timing"]
        for word in ("faster", "slower", "same", "ambiguous"):
            # And once in the summary above.
            assert text.count(word) >= words.count(word)
    if width >= 120:
        # No word is cut in two.
        assert "linear_cross_entropy" in text
        assert "linear[activation=gelu]" in text
        for text_ in ("1.75x", "1.74 to 1.76", "bfloat16", "compile"):
            assert text_ in text


def test_wrong_rows_come_before_any_number(full, page):
    markdown = tables.as_markdown(full)
    table = show.as_table(full, width=120, colour=False)
    for text, first in ((markdown, "\n|"), (table, "speed-up =")):
        assert 0 < text.index("WRONG RESULT of cce") < text.index(first)
        assert 0 < text.index("IMPOSSIBLE TIME of cupy") < text.index(first)
    assert page.index("WRONG RESULT of cce") < page.index("<svg")
    assert 'role="alert"' in page
    quiet = show.as_html(synthetic.document([synthetic.timing(pairs=7)]))
    assert 'role="alert"' not in quiet
    assert "Status: interrupted" in show.as_html(synthetic.document([], "interrupted"))


def assert_tables_are_whole(lines):
    """Each row of a Markdown table has as many cells as its header."""
    found = 0
    for i, line in enumerate(lines):
        if re.match(r"\|[:-]", line):
            found += 1
            borders = line.count("|")
            for row in (
                lines[i - 1],
                *itertools.takewhile(lambda text: text.startswith("|"), lines[i + 1 :]),
            ):
                assert len(re.findall(r"(?<!\\)\|", row)) == borders
    assert found


def test_markdown_is_a_table_for_github(full):
    lines = tables.as_markdown(full).splitlines()
    assert_tables_are_whole(lines)
    assert "| linear\\[activation=gelu\\] fwd M=512 N=4096 K=1024 |" in "\n".join(lines)


def test_csv_is_read_back(full):
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(full))))
    assert len(rows) == len(full["rows"])
    timings = [row for row in rows if row["kind"] == "timing"]
    originals = [row for row in full["rows"] if row["kind"] == "timing"]
    for row, original in zip(timings, originals, strict=True):
        assert float(row["ratio"]) == original["ratio"]
        assert float(row["median_a_s"]) == tables.median(original["samples_a_s"])
        assert row["shape"].startswith(f"{next(iter(original['shape']))}=")
        assert row["verdict"] == tables.verdict(original)


# What the file says is not obeyed.


def hostile():
    """Each text that a file may have, hostile; names too."""
    keys = {
        **dict.fromkeys(("op", "passes", "note", "dtype", "device", "cache", "timer", "b"), HOSTILE),
        "options": {HOSTILE: HOSTILE},
        "compulsory_bytes": 10**6,
        "unfused_bytes": 2 * 10**6,
        "flops": 10**9,
    }
    rows = [
        synthetic.timing(
            shape={HOSTILE: size}, pairs=7, **{k: v for k, v in keys.items() if k != "op"}, op=HOSTILE
        )
        for size in (10, 20)
    ]
    rows.append({**rows[0], "b": "eager", "section": HOSTILE})
    for row in synthetic.full():
        if row["kind"] != "timing":
            texts = {key: HOSTILE for key, value in row.items() if isinstance(value, str) and key != "kind"}
            unit = {"unit": row["unit"]} if row["kind"] == "ceiling" else {}
            rows.append(row | texts | unit | {HOSTILE: HOSTILE})
            if "copy, bytes" in row.get("name", ""):
                rows.append(row)
            if "unfused_bytes" in row:
                rows.append({**rows[-1], "unfused_bytes": {HOSTILE: 5 * 10**10}})
    found = synthetic.document(rows, **{HOSTILE: HOSTILE, "why": HOSTILE, "cpu": {HOSTILE: HOSTILE}})
    return report.validate(found | {"started": HOSTILE, "arguments": {HOSTILE: HOSTILE}})


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


ALLOWED_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "strong", "nav", "a", "div", "ul", "li"),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "g", "defs", "path", "clippath", "rect", "text", "use", "pattern"),
    *("tspan",),
}  # fmt: skip


@pytest.mark.parametrize("which", ["full", "hostile"])
def test_the_page_runs_nothing_and_loads_nothing(which, page):
    if which == "hostile":
        page = show.as_html(hostile(), HOSTILE)
        assert "<script" not in page.lower()
        assert page.count("&lt;script&gt;") > 30
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} <= ALLOWED_TAGS
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), (tag, value)
                assert value[1:] in ids
            assert not re.search(r"url\((?!#)", value or "")
    styles = re.findall(r"<style.*?>(.*?)</style>", page, re.DOTALL)
    assert not any("@import" in style or "url(" in style for style in styles)
    policy = next(a for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_the_terminal_is_not_obeyed(full):
    document = hostile()
    for width in (40, 200):
        text = show.as_table(document, width=width, colour=False)
        assert all(line.isprintable() for line in text.split("\n"))
    # The colours are rich's own.
    coloured = show.as_table(document, width=120, colour=True)
    assert set(re.findall(r"\x1b.[^m]*?[A-Za-z]", coloured)) <= set(re.findall(r"\x1b\[[\d;]*m", coloured))
    for text in (tables.as_markdown(document), tables.as_csv(document)):
        assert all(line.isprintable() for line in text.split("\n"))
    stream = io.StringIO()
    console = report.Console(stream)
    for row in document["rows"]:
        console.section(row["section"], row["kind"])
        console.row(row)
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))


def test_markdown_is_not_obeyed():
    text = tables.as_markdown(hostile())
    assert "<script" not in text
    assert "](" not in text.replace("\\](", "")
    assert "https://" not in text
    assert_tables_are_whole(text.splitlines())
    assert not re.search(r"(?<!\\)[`*]", re.sub(r"^\*\*|\*\*$", "", text, flags=re.MULTILINE))


def test_csv_computes_nothing():
    for formula in ("=1+1", "+1", "-1", "@x", "=cmd|' /C calc'!A0"):
        row = skipped(formula) | {formula: formula}
        cells = [
            cell
            for line in csv.reader(io.StringIO(tables.as_csv(synthetic.document([row]))))
            for cell in line
        ]
        assert not [cell for cell in cells if cell[:1] in ("=", "@", "+", "-")]
        assert f"'{formula}" in cells


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path


def test_what_is_not_refused_can_be_shown():
    """One value after another replaced by what may come: refused, or shown without an error."""
    rows = [
        synthetic.timing(pairs=7, compulsory_bytes=100, unfused_bytes=200, flops=10),
        *synthetic.full()[-17:],
    ]
    document = synthetic.document([*synthetic.ceilings(), *rows])
    rng = random.Random(0)
    values = [
        None,
        True,
        0,
        -1,
        1,
        1e-300,
        1e300,
        2**62,
        10**400,
        "",
        HOSTILE,
        [],
        [1.0],
        {},
        {"x": 1},
        {"x": {"y": []}},
    ]
    shown = refused = 0
    for path in leaves(document):
        for value in rng.sample(values, 8):
            tried = copy.deepcopy(document)
            at = tried
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            try:
                report.validate(tried)
            except UsageError:
                refused += 1
                continue
            shown += 1
            tables.as_markdown(tried)
            tables.as_csv(tried)
            if shown % 20 == 0:
                show.as_table(tried, width=100, colour=False)
            if shown % 60 == 0:
                assert len(plots.draw(tried)) == len(plots.PLOTS)
    assert shown > 250
    assert refused > 300


# Plots.


def test_every_plot_is_there(full, page):
    drawn = plots.draw(full)
    assert [plot.absent for plot in drawn] == [""] * len(plots.PLOTS)
    assert [plot.name for plot in drawn] == [
        *("speed-ups", "roofline", "bandwidth", "bytes", "sizes", "where-from", "model"),
    ]
    assert page.count("<svg") == sum(len(plot.figures) for plot in drawn)
    for plot in drawn:
        assert f'id="{plot.name}"' in page
        # Every axis says what it shows, and in which unit.
        for figure in plot.figures:
            for axes in figure.axes:
                if axes.axison:
                    labels = [axes.get_xlabel(), axes.get_ylabel()]
                    assert any(labels), plot.name
                    assert all(re.search(r"\(.*\)|size, ", label) for label in labels if label), labels


def test_where_there_is_no_plot_there_is_a_reason():
    nothing = plots.draw(synthetic.document([]))
    assert all(plot.absent and not plot.figures for plot in nothing)
    assert "Speed-up: this file holds no timings." in show.as_html(synthetic.document([]))
    # The bytes of what torch.compile makes of torch's operations are not those of the operations.
    compiled = synthetic.timing(b="compile", compulsory_bytes=10, unfused_bytes=20, flops=5)
    drawn = {plot.name: plot for plot in plots.draw(synthetic.document([*synthetic.ceilings(), compiled]))}
    assert "no timing against torch eager" in drawn["where-from"].absent
    assert drawn["roofline"].figures
    # A copy within the cache is no ceiling for what comes from memory.
    cached = {**synthetic.ceilings()[0], "name": "copy within the cache, bytes read and written"}
    drawn = {plot.name: plot for plot in plots.draw(synthetic.document([cached, compiled]))}
    assert "no copy bandwidth" in drawn["bandwidth"].absent


def test_where_the_speed_up_comes_from_adds_up():
    row = synthetic.timing(
        time_a=1e-3,
        time_b=2e-3,
        noise=1e-6,
        compulsory_bytes=10**9,
        unfused_bytes=3 * 10**9,
        launches_a=1,
        unfused_launches=11,
    )
    (plot,) = (
        p for p in plots.draw(synthetic.document([*synthetic.ceilings(), row])) if p.name == "where-from"
    )
    (figure,) = plot.figures
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    # 2 GB at 4 TB/s and 10 launches at 200,000/s are 0.5 and 0.05 ms, of 2 ms.
    assert widths == pytest.approx([25.0, 2.5, 22.5], abs=0.1)
    (line,) = (line for line in figure.axes[0].lines if line.get_marker() == "D")
    assert line.get_xdata()[0] == pytest.approx(50, abs=0.1)


def texts(figure):
    """(text, box in pixels) of what is drawn of a figure's texts but the slanting ones."""
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            beyond |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high or not axes.axison}
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_text().strip() and text not in beyond and text.get_rotation() in (0, 90):
            drawn = getattr(text, "_check_xy", lambda renderer: True)(renderer)
            if drawn:
                yield text.get_text(), text.get_window_extent(renderer)


def test_no_text_covers_another(full):
    for plot in plots.draw(full):
        for figure in plot.figures:
            found = list(texts(figure))
            assert len(found) > 5
            for (one, a), (other, b) in itertools.combinations(found, 2):
                overlap = (min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))
                assert min(overlap) <= 1.5, (plot.name, one, other)
            for text, box in found:
                inside = figure.bbox.padded(2)
                assert inside.fully_contains(box.x0, box.y0), (plot.name, text)
                assert inside.fully_contains(box.x1, box.y1), (plot.name, text)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_the_colours_can_be_told_from_the_page(theme):
    def contrast(one, other):
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(theme.ink, theme.paper) >= 7
    for colour in (theme.ours, theme.other, theme.third, theme.grey):
        # WCAG 2.1, 1.4.11: graphics.
        assert contrast(colour, theme.paper) >= 3


def test_pictures_in_both_themes(full):
    small = synthetic.document([synthetic.timing(pairs=7)])
    seen = set()
    for theme in (plots.LIGHT, plots.DARK):
        (figure,) = plots.draw(small, theme)[0].figures
        picture = plots.as_png(figure, theme, dpi=40)
        assert picture.startswith(b"\x89PNG")
        assert b"matplotlib" not in picture
        seen.add(picture)
    assert len(seen) == 2


def test_the_svg_follows_the_page(page):
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert {colour for colour in colours if not colour.startswith(("var(--", "url(#"))} <= {"none"}
        assert "mathdefault" not in svg
    # Drawn again it is the same to the byte.
    small = synthetic.document([synthetic.timing(pairs=7)])
    one, two = (plots.as_svg(plots.draw(small)[0].figures[0], "x") for _ in range(2))
    assert one == two


# As it is measured.


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_rows_as_they_come(full, width):
    stream = io.StringIO()
    console = report.Console(stream, width)
    timings = [row for row in full["rows"] if row["kind"] == "timing"]
    console.section("run", "timing")
    for row in timings:
        console.row(row)
    lines = stream.getvalue().splitlines()
    rows = [line for line in lines if re.search(r"\d\.\d\dx( |$)", line)]
    assert len(rows) == len(timings)
    # The numbers stand in columns.
    assert len({re.search(r"\d\.\d\d(x)( |$)", line).start(1) for line in rows}) == 1
    if width >= 80:
        assert max(map(len, rows)) <= width


def test_the_bar_is_drawn_between_samples_only(monkeypatch, full):
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    console = report.Console(stream, 100)
    with console.progress():
        import threading

        threads = [thread.name for thread in threading.enumerate()]
        console.status("first [bold]op[/] \x1b[2J", 0.1)
        drawn = stream.getvalue()
        assert "first [bold]op[/]" in drawn
        assert "\x1b[2J" not in drawn
        console.row(full["rows"][10])
    assert "linear" in stream.getvalue()
    # No thread that would take time from what is measured.
    assert not [name for name in threads if "refresh" in name.lower()]


def test_what_is_no_file_is_written_to_and_left_there(tmp_path):
    """A device is not replaced by a file, which root could."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        report.write_out("text", pipe)
        assert read.result(10) == "text"
    assert pipe.is_fifo()
    if Path("/dev/full").exists():
        with pytest.raises(UsageError, match="No space left on device"):
            report.write_out("text", Path("/dev/full"))
        assert Path("/dev/full").is_char_device()


def test_without_a_terminal_there_is_no_bar(full):
    stream = io.StringIO()
    console = report.Console(stream)
    with console.progress():
        console.status("nothing of this", 0.5)
        console.line("a line")
    assert stream.getvalue() == "a line\n"


# The command.


def run(capsys, *arguments):
    status = cli.main(["show", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command(tmp_path, capsys):
    path = synthetic.write(tmp_path / "r.json", [synthetic.timing(), *synthetic.ceilings()])
    for format_, start in (
        ("table", "dlgpu 0.synthetic"),
        ("md", "# dlgpu"),
        ("csv", "section,"),
        ("html", "<!doctype"),
    ):
        status, out, err = run(capsys, path, "--format", format_)
        assert (status, err) == (0, "")
        assert out.startswith(start)
        file = tmp_path / f"r.{format_}"
        assert run(capsys, path, "--format", format_, "--out", file) == (0, "", "")
        assert file.read_text().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json: cannot be read: No such file"),
        (["old.json"], "its schema is 'dlgpu-bench/1'"),
        (["good.json", "--format", "pdf"], "'pdf' is not one of"),
        (["good.json", "--out", "no/such/folder/x.md"], "cannot be written: No such file"),
        (["good.json", "--out", "."], "cannot be written: Is a directory"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    synthetic.write(tmp_path / "good.json", [synthetic.timing(pairs=7)])
    (tmp_path / "old.json").write_text(json.dumps(synthetic.document([]) | {"schema": "dlgpu-bench/1"}))
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dlgpu-bench: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_documentation_names_every_kind():
    text = (Path(__file__).resolve().parents[1] / "docs" / "benchmark.md").read_text()
    table = text.partition("| kind | says |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(report.KINDS)
    assert report.SCHEMA in text
