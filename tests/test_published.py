"""README's figures are those of bench/results/, and where there are none it says so."""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import pytest

import synthetic_results as synthetic
from dlgpu.bench import __main__ as cli
from dlgpu.bench import published, report
from dlgpu.bench.environment import UsageError

ROOT = Path(__file__).resolve().parents[1]


def source_of(png: bytes) -> str:
    """The text "Source" in a PNG."""
    at = 8
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        body = png[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0]
        if kind == b"tEXt" and body.startswith(b"Source\0"):
            return body.partition(b"\0")[2].decode()
        at += 12 + length
    return ""


def test_readme_is_what_report_writes():
    text = (ROOT / "README.md").read_text()
    assert published.readme(text, published.published(ROOT)) == text, "run `python -m dlgpu.bench report`"


def test_readmes_plots_are_of_these_results():
    for address, (digest, _) in published.pictures(ROOT).items():
        assert source_of((ROOT / address).read_bytes()) == digest, "run `python -m dlgpu.bench report`"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout without results."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "cli.py").write_text("")
    (tmp_path / "README.md").write_text(f"before\n\n{published.BEGIN}\nold\n{published.END}\n\nafter\n")
    monkeypatch.setattr(published, "PACKAGE", tmp_path / "dlgpu")
    return tmp_path


def results(checkout, card="Synthetic-GPU", name="bench", rows=None, **more):
    folder = checkout / "bench" / "results" / card
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows or [
        *synthetic.ceilings(),
        synthetic.timing(pairs=9),
        synthetic.timing(time_a=3e-3, pairs=9, b="compile"),
    ]
    return synthetic.write(folder / f"{name}.json", rows, **more)


def test_without_results_it_says_so_in_one_line(checkout, capsys):
    assert cli.main(["report"]) == 0
    text = (checkout / "README.md").read_text()
    assert text == f"before\n\n{published.BEGIN}\n{published.NOTHING}\n{published.END}\n\nafter\n"
    assert "\n" not in published.NOTHING
    assert not (checkout / "docs").exists()
    assert "0 results files" in capsys.readouterr().out


def test_with_results(checkout, capsys):
    path = results(checkout)
    wrong = {"section": "r", "kind": "wrong", "title": "t", "provider": "liger", "detail": "<b>off</b>"}
    results(checkout, name="later", rows=[synthetic.timing(pairs=9), wrong], status="interrupted")
    assert cli.main(["report"]) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\n\nafter\n")
    assert "Not measured" not in text
    assert "### Synthetic-GPU" in text
    # What was lost stands beside what was won.
    for word in ("faster", "slower"):
        assert re.search(rf"^\| synthetic .*\| {word} \|", text, re.MULTILINE)
    assert "WRONG RESULT of liger, not timed: &lt;b&gt;off" in text
    assert "Status: interrupted" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links == [f"bench/results/Synthetic-GPU/{name}.json" for name in ("bench", "later")]
    addresses = re.findall(r'(?:srcset|src)="([^"]*)"', text)
    assert len(addresses) >= 4
    assert {address.rpartition("-")[2] for address in addresses} == {"light.png", "dark.png"}
    for address in (*links, *addresses):
        assert (checkout / address).is_file(), address
    # Nothing changes when it is written again, and a change of the results shows.
    before = text
    assert cli.main(["report"]) == 0
    assert (checkout / "README.md").read_text() == before
    pictures = published.pictures(checkout)
    assert all(
        source_of((checkout / address).read_bytes()) == digest for address, (digest, _) in pictures.items()
    )
    document = json.loads(path.read_text())
    document["rows"][-1]["ratio"] *= 0.999
    document["rows"][-1]["low"] *= 0.9
    path.write_text(json.dumps(document))
    assert published.readme(before, published.published(checkout)) != before
    pictures = published.pictures(checkout)
    assert any(
        source_of((checkout / address).read_bytes()) != digest for address, (digest, _) in pictures.items()
    )


def refused(capsys, checkout):
    before = (checkout / "README.md").read_bytes()
    assert cli.main(["report"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dlgpu-bench: error: ")
    assert err.count("\n") == 1
    assert (checkout / "README.md").read_bytes() == before
    assert not (checkout / "docs").exists()
    return err


def test_what_cannot_be_published(checkout, capsys, monkeypatch):
    path = results(checkout)
    path.write_text("{")
    assert "no JSON" in refused(capsys, checkout)
    path.unlink()
    results(checkout, card="a) [b](c")
    assert "must be letters" in refused(capsys, checkout)
    (checkout / "README.md").write_text(f"{published.END}\n{published.BEGIN}\n")
    for entry in (checkout / "bench" / "results").iterdir():
        entry.rename(checkout / "away")
    assert "README.md must hold" in refused(capsys, checkout)
    (checkout / "bench" / "cli.py").unlink()
    assert "in a checkout" in refused(capsys, checkout)


def test_markers_are_needed_once():
    good = f"a {published.BEGIN} b {published.END} c"
    assert published.readme(good, "new") == f"a {published.BEGIN}\nnew\n{published.END} c"
    for bad in ("", published.BEGIN, good + published.BEGIN, good + published.END):
        with pytest.raises(UsageError, match="each once"):
            published.readme(bad, "new")


def test_a_stream_of_another_encoding_is_no_error():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    report.Console(stream).line("1 … 2")
    stream.seek(0)
    assert stream.read() == "1 \\u2026 2\n"
