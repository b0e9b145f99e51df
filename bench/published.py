"""`dlgpu-bench report`: README's figures and plots, from bench/results/<card>/*.json and nothing else.

README holds no number of a GPU that was typed in: what stands between the two markers is written here, from files with all
their samples, and a test fails where it differs. Comparisons that were lost stand beside those that were won.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from . import plots, tables
from .environment import PACKAGE, UsageError
from .report import load, write_whole
from .tables import markdown_escaped, plain

__all__ = ["BEGIN", "END", "command", "pictures", "published", "readme"]

Document = Mapping[str, Any]

BEGIN = "<!-- measured: begin; `dlgpu-bench report` writes what follows -->"
END = "<!-- measured: end -->"
NOTHING = (
    "Not measured yet: **any time on a GPU.** No figure of one is given here until it comes from a run whose raw samples are "
    "in `bench/results/`."
)
# Of the plots, those that README shows; the HTML report has all.
SHOWN = ("speed-ups", "roofline", "bandwidth")
THEMES = {"light": plots.LIGHT, "dark": plots.DARK}
PICTURES = Path("docs") / "plots" / "bench"
# What becomes part of a file's name and of an address.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _files(root: Path) -> Iterator[tuple[str, Path, Document]]:
    """(card, file, document) of all results, in the order of their names."""
    for path in sorted((root / "bench" / "results").glob("*/*.json")):
        card = path.parent.name
        for name in (card, path.stem):
            if not _NAME.fullmatch(name):
                raise UsageError(
                    f"bench/results: {plain(name, 60)!r} must be letters, digits, '.', '_' and '-'"
                )
        yield card, path, load(path)


def _address(card: str, path: Path, plot: plots.Plot, i: int, theme: str) -> str:
    return (PICTURES / card / f"{path.stem}-{plot.name}-{i}-{theme}.png").as_posix()


def published(root: Path) -> str:
    """The Markdown between README's markers.

    Raises:
        UsageError: a file of bench/results/ is no results file.
    """
    lines: list[str] = []
    seen = ""
    for card, path, document in _files(root):
        if card != seen:
            lines += [f"### {markdown_escaped(card)}", ""]
            seen = card
        lines += [*_part(card, path, document, root), ""]
    return "\n".join(lines).strip() or NOTHING


def _part(card: str, path: Path, document: Document, root: Path) -> Iterator[str]:
    source = path.relative_to(root).as_posix()
    environment = markdown_escaped(tables.environment_line(document["environment"]))
    yield f"{environment}. {markdown_escaped(tables.summary(document))} All samples: [{path.name}]({source})."
    yield ""
    for text in tables.alarms(document):
        yield f"- **{markdown_escaped(text)}**"
    timings = [row for row in document["rows"] if row["kind"] == "timing"]
    if not timings:
        return
    for plot in plots.draw(document):
        for i in range(len(plot.figures) if plot.name in SHOWN else 0):
            yield ""
            yield from _picture(plot, [_address(card, path, plot, i, theme) for theme in THEMES])
    yield ""
    columns = tables.columns(timings)
    assert columns is not None
    yield from tables.markdown_table(
        [column.name for column in columns],
        ([column.cell(row) for column in columns] for row in timings),
        [column.right for column in columns],
    )


def _picture(plot: plots.Plot, addresses: list[str]) -> list[str]:
    light, dark = addresses
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
        f'  <img alt="{plot.title}" src="{light}">',
        "</picture>",
    ]


def pictures(root: Path) -> dict[str, tuple[str, bytes]]:
    """Address -> (digest of the results that it shows, PNG). The digest is in the picture too."""
    found: dict[str, tuple[str, bytes]] = {}
    for card, path, document in _files(root):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for name, theme in THEMES.items():
            for plot in plots.draw(document, theme):
                for i, figure in enumerate(plot.figures if plot.name in SHOWN else ()):
                    data = plots.as_png(figure, theme, source=digest)
                    found[_address(card, path, plot, i, name)] = digest, data
    return found


def readme(text: str, measured: str) -> str:
    """README with what is between the markers replaced.

    Raises:
        UsageError: it has not each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"README.md must hold {BEGIN!r} and then {END!r}, each once")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{measured}\n{END}{rest.partition(END)[2]}"


@click.command("report")
def command() -> None:
    """README's figures and plots, from bench/results/; in a checkout of the source alone."""
    root = PACKAGE.parent
    path = root / "README.md"
    if not path.is_file() or not (root / "bench" / "cli.py").is_file():
        raise UsageError("report works in a checkout of the source, and this is an installed copy")
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"README.md: cannot be read: {plain(error, 200)}") from None
    # All of it before anything is written.
    after, images = readme(before, published(root)), pictures(root)
    try:
        for address, (_, data) in images.items():
            (root / address).parent.mkdir(parents=True, exist_ok=True)
            write_whole(root / address, data)
        if after != before:
            write_whole(path, after)
    except OSError as error:
        raise UsageError(
            f"README.md and its plots cannot be written: {plain(error.strerror or error)}"
        ) from None
    files = len(list(_files(root)))
    changed = "README.md is written" if after != before else "README.md is as it should be"
    click.echo(f"{files} results files, {len(images)} pictures; {changed}")
