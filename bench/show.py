"""`dlgpu-bench show`: a results file as a table in the terminal, Markdown, CSV or one HTML page with plots.

Nothing is measured here, and what the file says is not trusted: see `report.load` and `tables`.
"""

from __future__ import annotations

import importlib.resources
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import plots, tables
from .report import load, write_out
from .tables import plain

__all__ = ["as_html", "as_table", "command"]

Document = Mapping[str, Any]
FORMATS = ("table", "md", "csv", "html")


def as_table(document: Document, width: int | None = None, colour: bool | None = None) -> str:
    """The document for a terminal of `width` columns."""
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    tty = sys.stdout.isatty()
    console = Console(
        file=file,
        width=width or (None if tty else 120),
        force_terminal=tty if colour is None else colour,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(tables.environment_line(document["environment"]))
    console.print(Text(tables.summary(document), style="bold"))
    for text in tables.alarms(document):
        console.print(Text(f"! {text}", style="bold red"))
    styles = {"faster": "green", "slower": "red", "ambiguous": "yellow", "busy": "yellow"}
    for title, kinds in tables.sections(document):
        console.print()
        console.print(Text(title, style="bold"))
        for kind, rows in kinds:
            if kind in tables.NOTES:
                console.print(Text(tables.NOTES[kind], style="dim"))
            columns = tables.columns(rows)
            if columns is None:
                for text in tables.sentences(rows):
                    console.print(Text(f"- {text}"))
                continue
            shown = _that_fit(columns, rows, console.width)
            table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
            for i, column in enumerate(shown):
                table.add_column(
                    Text(column.name),
                    justify="right" if column.right else "left",
                    overflow="fold",
                    # Only the title is broken into lines.
                    no_wrap=i > 0 and console.width >= NARROW,
                )
            for row in rows:
                texts = [column.cell(row) for column in shown]
                table.add_row(*(Text(text, style=styles.get(text, "")) for text in texts))
            console.print(table)
    return file.getvalue()


# Fewer columns than that, and every cell is folded.
NARROW = 44
LEAST_TITLE = 18


def _that_fit(
    columns: tuple[tables.Column, ...], rows: list[Mapping[str, Any]], width: int
) -> list[tables.Column]:
    """The columns that there is room for; those of the highest ranks go first."""
    wanted = list(columns)
    widths = {c.name: max(len(c.name), *(len(c.cell(row)) for row in rows)) for c in columns[1:]}
    # With a title half as wide as it would like: it may take two lines, but no word may.
    titles = [columns[0].cell(row) for row in rows]
    title = max(LEAST_TITLE, *(max(len(text) // 2, *map(len, text.split(" "))) for text in titles))
    # Three between columns, one at each end.
    while title + 2 + sum(widths[c.name] + 3 for c in wanted[1:]) > width:
        last = max(wanted[1:], key=lambda column: column.rank, default=None)
        if last is None or not last.rank:
            break
        wanted.remove(last)
    return wanted


def as_html(document: Document, name: str = "") -> str:
    """The document as one page that loads nothing from elsewhere and runs no script."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files(__package__).joinpath("templates", "report.html").read_text("utf-8")
    drawn = []
    for plot in plots.draw(document):
        # SVG of our own making, in which matplotlib has escaped all texts.
        figures = [Markup(plots.as_svg(figure, f"{plot.name}-{i}")) for i, figure in enumerate(plot.figures)]
        drawn.append({"plot": plot, "figures": figures})
    sections = []
    for title, kinds in tables.sections(document):
        parts = []
        for kind, rows in kinds:
            columns = tables.columns(rows)
            parts.append(
                {
                    "kind": kind,
                    "note": tables.NOTES.get(kind),
                    "columns": columns,
                    "rows": [[column.cell(row) for column in columns] for row in rows] if columns else [],
                    "sentences": [] if columns else tables.sentences(rows),
                }
            )
        sections.append({"title": title, "parts": parts})
    return environment.from_string(source).render(
        name=plain(name, 80),
        started=plain(document["started"]),
        seconds=document["seconds"],
        schema=document["schema"],
        summary=tables.summary(document),
        alarms=tables.alarms(document),
        line=tables.environment_line(document["environment"]),
        environment=tables.environment_pairs(document["environment"]),
        arguments=tables.environment_pairs(document["arguments"]),
        absent=tables.sentences(row for row in document["rows"] if row["kind"] == "absent"),
        plots=drawn,
        sections=sections,
        light=plots.LIGHT,
        dark=plots.DARK,
    )


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="table: for this terminal; md: Markdown; csv: a line a row; html: one page with plots, which needs no network.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead of to the terminal."
)
def command(file: Path, format_: str, out: Path | None) -> None:
    """A results FILE, as `run` and the quick suite write them, for people."""
    document = load(file)
    if format_ == "table":
        text = as_table(document, colour=False if out else None)
    elif format_ == "md":
        text = tables.as_markdown(document)
    elif format_ == "csv":
        text = tables.as_csv(document)
    else:
        text = as_html(document, file.name)
    write_out(text, out)
