"""The report's plots, as SVG that follows the page's light or dark colours, or as PNG.

Each takes a results document and gives a `Plot`: a figure, or the reason why there is none. A matplotlib figure is drawn once;
its colours are placeholders, which stand for the page's own (see `Theme`). Colours are those of Okabe and Ito ("Color
Universal Design", 2008), which people with colour-blindness tell apart, and no meaning hangs on a colour alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .ceilings import COPY
from .tables import bytes_text, median, op_title, plain, seconds, verdict

__all__ = ["PLOTS", "Plot", "Theme", "as_png", "as_svg", "draw"]

Row = Mapping[str, Any]

# Providers that run torch's operations one by one, so that their bytes are counted.
UNFUSED = ("eager", "torch")
# Rows in one figure: more are cut into several.
MOST_BARS = 36
MOST_PANELS = 12
LONGEST_LABEL = 54
# Inches.
WIDTH = 9.0


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours of a plot; each is what matplotlib and a style sheet both take."""

    ink: str
    faint: str
    paper: str
    ours: str
    other: str
    third: str
    grey: str


LIGHT = Theme("#1b1f24", "#d5d9de", "#ffffff", "#0072b2", "#d55e00", "#009e73", "#8a929b")
DARK = Theme("#e6e9ec", "#3d444c", "#14181d", "#56b4e9", "#e69f00", "#2fc79a", "#87909a")
# Not colours that are meant to be seen: `as_svg` puts the page's variables in their place.
_PLACEHOLDERS = Theme("#010101", "#020202", "#030303", "#040404", "#050505", "#060606", "#070707")


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot, or why there is none.

    figures: each a matplotlib figure.
    """

    name: str
    title: str
    caption: str
    figures: tuple[Any, ...] = ()
    absent: str = ""


def draw(document: Row, theme: Theme | None = None) -> list[Plot]:
    """All plots of a document."""
    theme = theme or _PLACEHOLDERS
    with _style(theme):
        return [plot(document, theme) for plot in PLOTS]


@contextlib.contextmanager
def _style(theme: Theme, **more: Any) -> Iterator[None]:
    """Where figures are made, and where they are drawn: some colours are looked up only then."""
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "text.parse_math": False,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.grey,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.0,
        "axes.titleweight": "bold",
        "axes.axisbelow": True,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "lines.color": theme.grey,
        "axes.prop_cycle": cycler(color=[theme.grey]),
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "hatch.color": theme.ink,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        **more,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Glyphs that the font lacks: the browser has others.
        warnings.simplefilter("ignore")
        yield


def as_svg(figure: Any, name: str) -> str:
    """An SVG element to stand in a page, coloured by its variables --ink, --faint, --paper, --ours, ...

    `name` sets its ids apart from those of other figures of the page.
    """
    file = io.StringIO()
    # The salt makes two drawings of one figure equal.
    with _style(_PLACEHOLDERS, **{"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for field in dataclasses.fields(Theme):
        text = text.replace(getattr(_PLACEHOLDERS, field.name), f"var(--{field.name})")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"|height="[^"]*pt"', lambda m: m[1] or "", text, count=2)
    # The page is as wide as the widest figures: the text of a narrower one is not to grow.
    widest = f"max-width: {100 * figure.get_figwidth() / WIDTH:.4g}%"
    return text.replace("<svg ", f'<svg role="img" style="{widest}" ', 1)


def as_png(figure: Any, theme: Theme, dpi: int = 110, source: str = "") -> bytes:
    """A picture of a figure that was drawn in `theme`; `source`, kept in it, says from what."""
    file = io.BytesIO()
    with _style(theme):
        metadata = {"Software": None, **({"Source": source} if source else {})}
        figure.savefig(file, format="png", dpi=dpi, facecolor=theme.paper, metadata=metadata)
    return file.getvalue()


def _figure(width: float, height: float) -> Any:
    # Not pyplot: it keeps figures in a global list, and asks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _timings(document: Row) -> list[Row]:
    return [row for row in document["rows"] if row["kind"] == "timing"]


def _ceilings(document: Row, unit: str) -> list[Row]:
    return [row for row in document["rows"] if row["kind"] == "ceiling" and row["unit"] == unit]


def _bandwidth(document: Row) -> Row | None:
    """The ceiling that bytes are held to: copying from memory; not within a cache, which most bytes do not fit into."""
    return next((row for row in _ceilings(document, "B/s") if row["name"] == COPY), None)


def _cut(text: str, limit: int = LONGEST_LABEL) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _label(row: Row, against: bool = True) -> str:
    """Two lines: the op, and where it was run."""
    first = f"{op_title(row)} {row['passes']}"
    second = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    second = ", ".join(filter(None, [second, row.get("note"), row.get("dtype")]))
    if against and "b" in row:
        cache = f", {row['cache']}" if row.get("cache") in ("cold", "hot") else ""
        first += f" vs {row['b']}{cache}"
    return f"{_cut(plain(first))}\n{_cut(plain(second))}"


def _parts(rows: Sequence[Any], most: int = MOST_BARS) -> Iterator[list[Any]]:
    """Nearly equal parts of at most so many."""
    count = max(1, math.ceil(len(rows) / most))
    for part in np.array_split(np.arange(len(rows)), count):
        yield [rows[i] for i in part]


def _bars(rows: Sequence[Row], width: float = WIDTH, extra: float = 0.9) -> tuple[Any, Any, np.ndarray]:
    """A figure with a row of labelled bars each, the first on top."""
    figure = _figure(width, extra + 0.42 * len(rows))
    axes = figure.subplots()
    y = np.arange(len(rows))[::-1]
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.tick_params(axis="y", length=0)
    return figure, axes, y


def _log2_ticks(axes: Any, low: float, high: float) -> None:
    """Ticks of a log axis of factors: 0.5x, 1x, 2x and, where they span little, what is between."""
    span = high / low
    steps = [1.0] if span > 8 else [1.0, 1.25, 1.5, 1.75] if span < 2.2 else [1.0, 1.5]
    ticks = [
        step * 2.0**power
        for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        for step in steps
    ]
    ticks = [tick for tick in ticks if low <= tick <= high]
    while len(ticks) > 9:
        ticks = [tick for tick in ticks if round(math.log2(tick)) % 2 == 0][:: 1 + len(ticks) // 18]
    axes.set_xticks(ticks, [f"{tick:.4g}x" for tick in ticks])
    axes.set_xticks([], minor=True)


def speed_ups(document: Row, theme: Theme) -> Plot:
    """How many times as fast, with the interval."""
    plot = Plot(
        "speed-ups",
        "Speed-up",
        "The other's time over dlgpu's, median and 95% interval. Right of 1x dlgpu is faster. Grey: within 2%, or too noisy "
        "to tell; hatched: slower.",
    )
    rows = _timings(document)
    if not rows:
        return dataclasses.replace(plot, absent="this file holds no timings")
    figures = []
    for part in _parts(rows):
        figure, axes, y = _bars(part)
        axes.set_xscale("log", base=2)
        values = np.array([1 / row["ratio"] for row in part])
        lows, highs = (np.array([1 / row[end] for row in part]) for end in ("high", "low"))
        for at, row, value in zip(y, part, values, strict=True):
            word = verdict(row)
            colour = {"faster": theme.ours, "slower": theme.other}.get(word, theme.grey)
            hatch = "///" if word == "slower" else None
            axes.barh(
                at, value - 1, left=1, height=0.6, color=colour, hatch=hatch, edgecolor=theme.ink, linewidth=0
            )
        axes.errorbar(
            values,
            y,
            xerr=[values - lows, highs - values],
            fmt="none",
            ecolor=theme.ink,
            elinewidth=1.2,
            capsize=2.5,
        )
        low, high = min(0.9, lows.min()), max(1.1, highs.max())
        # Room for the numbers at the right.
        low, high = low * 0.97, high * (high / low) ** 0.16
        axes.set_xlim(low, high)
        _log2_ticks(axes, low, high)
        for at, row, value, end in zip(y, part, values, highs, strict=True):
            word = verdict(row)
            mark = "" if word in ("faster", "slower", "same") else f" {word}"
            axes.annotate(
                f"{value:.2f}x{mark}",
                (max(end, 1), at),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(y, [_label(row) for row in part], fontsize=7.5)
        axes.axvline(1, color=theme.ink, linewidth=1)
        axes.grid(axis="x")
        axes.set_xlabel("speed-up of dlgpu (times, log scale)")
        figures.append(figure)
    return dataclasses.replace(plot, figures=tuple(figures))


def roofline(document: Row, theme: Theme) -> Plot:
    """Each kernel's point under the measured ceilings."""
    plot = Plot(
        "roofline",
        "Roofline",
        "Lines: what was measured in the same run, copying and multiplying matrices. A full dot is dlgpu at its metered "
        "bytes, a ring is torch eager at the bytes of its unfused operations; the line between them is what fusing did.",
    )
    bandwidth = _bandwidth(document)
    peaks = sorted(_ceilings(document, "FLOP/s"), key=lambda row: row["value"])
    if bandwidth is None or not peaks:
        return dataclasses.replace(plot, absent="no ceilings (copy and matmul) were measured in this run")
    points = _roofline_points(document)
    if not points:
        return dataclasses.replace(plot, absent="no timing has both a FLOP count and metered bytes")
    figure = _figure(WIDTH, 5.2)
    axes, key = figure.subplots(1, 2, width_ratios=[1.9, 1])
    speed, peak = bandwidth["value"], peaks[-1]["value"]
    xs = [x for point in points for x in (point["x"], point["other"][0] if point["other"] else point["x"])]
    ys = [y for point in points for y in (point["y"], point["other"][1] if point["other"] else point["y"])]
    low, high = min(*xs, peak / speed) / 3, max(*xs, peak / speed) * 4
    axes.set_xscale("log")
    axes.set_yscale("log")
    for i, row in enumerate(peaks):
        knee = row["value"] / speed
        style = "-" if i == len(peaks) - 1 else (0, (4, 2))
        axes.plot([knee, high], [row["value"] / 1e12] * 2, color=theme.ink, linewidth=1.4, linestyle=style)
        name = _cut(plain(row["name"]), 30)
        axes.annotate(
            f"{name}: {row['value'] / 1e12:.4g} TFLOP/s",
            (high, row["value"] / 1e12),
            (-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
        )
    axes.plot([low, peak / speed], [low * speed / 1e12, peak / 1e12], color=theme.ink, linewidth=1.4)
    axes.set_xlim(low, high)
    axes.set_ylim(min(*ys, low * speed) / 2e12, peak / 1e12 * 2.5)
    # Along the line, wherever its slope ends up in the figure.
    axes.text(
        low * 1.15,
        low * 1.15 * speed / 1e12 * 1.12,
        f"copy: {bytes_text(speed)}/s",
        rotation=math.degrees(math.atan2(speed / 1e12, 1)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        fontsize=7.5,
    )
    _plain_log_ticks(axes.xaxis)
    _plain_log_ticks(axes.yaxis)
    # Sets the layout, and with it where points are.
    figure.draw_without_rendering()
    taken: list[tuple[float, float]] = []
    for number, point in enumerate(points, 1):
        x, y = point["x"], point["y"] / 1e12
        if point["other"]:
            ox, oy = point["other"][0], point["other"][1] / 1e12
            axes.plot([ox, x], [oy, y], color=theme.grey, linewidth=0.8)
            axes.plot(ox, oy, "o", markersize=6, markerfacecolor="none", markeredgecolor=theme.other)
        axes.plot(x, y, "o", markersize=6, color=theme.ours)
        _number(axes, number, x, y, taken, theme)
    axes.grid()
    axes.set_xlabel("arithmetic intensity (FLOP per byte moved, log scale)")
    axes.set_ylabel("achieved (TFLOP/s, log scale)")
    key.axis("off")
    # Two texts: a browser draws no leading blanks.
    texts: dict[str, Any] = {"va": "top", "fontsize": 6.8, "linespacing": 1.35, "transform": key.transAxes}
    key.text(0, 1, "\n".join(f"{number}\n" for number in range(1, len(points) + 1)), **texts)
    key.text(0.06, 1, "\n".join(point["label"] for point in points), **texts)
    return dataclasses.replace(plot, figures=(figure,))


# In a key beside the plot there is room for so many.
MOST_POINTS = 14


def _roofline_points(document: Row) -> list[dict[str, Any]]:
    """One a timing with FLOPs and bytes; of the same op against several others one."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in _timings(document):
        if not row.get("flops") or not row.get("compulsory_bytes"):
            continue
        label = _label({**row, "b": ""}, against=False)
        key = (label, row["device"], row["cache"])
        other = None
        if row.get("unfused_bytes") and row["b"] in UNFUSED:
            other = (row["flops"] / row["unfused_bytes"], row["flops"] / median(row["samples_b_s"]))
        point = {
            "x": row["flops"] / row["compulsory_bytes"],
            "y": row["flops"] / median(row["samples_a_s"]),
            "other": other,
            "label": "\n".join(_cut(line, 42) for line in label.split("\n")),
        }
        # That of torch eager, where there is one, since its bytes are known.
        if key not in found or (other and not found[key]["other"]):
            found[key] = point
    return sorted(found.values(), key=lambda point: point["x"])[:MOST_POINTS]


def _number(
    axes: Any, number: int, x: float, y: float, taken: list[tuple[float, float]], theme: Theme
) -> None:
    """Writes a point's number beside it, where no other is."""
    here, pixels = axes.transData.transform((x, y)), axes.figure.dpi / 72
    for ring in (9, 18, 27):
        for angle in range(0, 360, 45):
            dx, dy = ring * math.cos(math.radians(angle + 45)), ring * math.sin(math.radians(angle + 45))
            place = (here[0] + dx * pixels, here[1] + dy * pixels)
            if all(abs(place[0] - a) > 11 * pixels or abs(place[1] - b) > 9 * pixels for a, b in taken):
                taken.append(place)
                line = {"arrowstyle": "-", "color": theme.grey, "linewidth": 0.6} if ring > 9 else None
                axes.annotate(
                    str(number),
                    (x, y),
                    (dx, dy),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    arrowprops=line,
                )
                return


def bandwidth(document: Row, theme: Theme) -> Plot:
    """What part of the copy ceiling the bytes moved at."""
    plot = Plot(
        "bandwidth",
        "Achieved bandwidth",
        "dlgpu's metered bytes over its time, as a share of the copy bandwidth measured in the same run. A kernel bound by "
        "memory cannot pass 100%.",
    )
    ceiling = _bandwidth(document)
    found: dict[str, Row] = {}
    for row in _timings(document):
        if row.get("compulsory_bytes"):
            found.setdefault(f"{_label(row, against=False)} {row['cache']}", row)
    if ceiling is None:
        return dataclasses.replace(plot, absent="no copy bandwidth was measured in this run")
    if not found:
        return dataclasses.replace(plot, absent="no timing has metered bytes")
    figures = []
    for part in _parts(list(found.values())):
        figure, axes, y = _bars(part)
        rates = [row["compulsory_bytes"] / median(row["samples_a_s"]) for row in part]
        shares = [100 * rate / ceiling["value"] for rate in rates]
        axes.barh(y, shares, height=0.6, color=theme.ours)
        for at, share, rate in zip(y, shares, rates, strict=True):
            text = f"{share:.0f}%, {bytes_text(rate)}/s"
            axes.annotate(text, (share, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(100, color=theme.ink, linewidth=1.2)
        axes.set_xlim(0, max(130.0, *(share * 1.3 for share in shares)))
        axes.set_yticks(y, [_label(row, against=False) for row in part], fontsize=7.5)
        axes.grid(axis="x")
        axes.set_xlabel(f"share of the measured copy bandwidth, {bytes_text(ceiling['value'])}/s (%)")
        figures.append(figure)
    return dataclasses.replace(plot, figures=tuple(figures))


def bytes_moved(document: Row, theme: Theme) -> Plot:
    """Fused and unfused bytes."""
    plot = Plot(
        "bytes",
        "Bytes moved, fused and unfused",
        "How many times the bytes of dlgpu's kernels torch's operations move one by one. Counts, not timings: metered access "
        "by access in Triton's interpreter, and counted on tensors without memory.",
    )
    found: dict[tuple[str, str], tuple[Row, float, float]] = {}
    for row in document["rows"]:
        if row["kind"] not in ("timing", "count", "model") or not row.get("compulsory_bytes"):
            continue
        unfused = row.get("unfused_bytes") or {}
        # Of several GPUs, whose tiles may differ, the first.
        for name, size in unfused.items() if isinstance(unfused, dict) else [("", unfused)]:
            found.setdefault((_label(row, against=False), name), (row, row["compulsory_bytes"], size))
    if not found:
        return dataclasses.replace(plot, absent="this file holds no byte counts of both sides")
    figures = []
    for keys in _parts(list(found)):
        figure, axes, y = _bars(keys)
        rows = [found[key] for key in keys]
        times = np.array([unfused / fused for _, fused, unfused in rows])
        axes.barh(y, 1, height=0.6, color=theme.ours, label="dlgpu (= 1)")
        sides = (
            ("more, unfused", times > 1, theme.other, "///"),
            ("fewer, unfused", times < 1, theme.grey, "..."),
        )
        for name, which, colour, hatch in sides:
            if which.any():
                left = np.minimum(times, 1)[which]
                axes.barh(y[which], abs(times - 1)[which], 0.6, left, color=colour, hatch=hatch, label=name)
        for at, many, (_, fused, unfused) in zip(y, times, rows, strict=True):
            text = f"{many:.2f}x: {bytes_text(fused)}, unfused {bytes_text(unfused)}"
            axes.annotate(
                text, (max(many, 1), at), (4, 0), textcoords="offset points", va="center", fontsize=7.5
            )
        axes.set_xlim(0, max(1.0, times.max()) * 1.75)
        names = [f"{label}, {_cut(plain(name), 30)}" if name else label for label, name in keys]
        axes.set_yticks(y, names, fontsize=7.5)
        axes.axvline(1, color=theme.ink, linewidth=1)
        axes.grid(axis="x")
        axes.set_xlabel("bytes moved (times those of dlgpu's kernels)")
        _legend_above(axes)
        figures.append(figure)
    return dataclasses.replace(plot, figures=tuple(figures))


def _legend_above(axes: Any, columns: int = 4) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=8, borderaxespad=0.2)


def time_against_size(document: Row, theme: Theme) -> Plot:
    """Both sides' time at each size of an op."""
    plot = Plot(
        "sizes",
        "Time against size",
        "Median time of a call, with the middle half of the samples. One panel for each op measured at two sizes or more.",
    )
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in _timings(document):
        options = ",".join(f"{name}={value}" for name, value in row["options"].items())
        key = (
            row["op"],
            options,
            row["passes"],
            row["dtype"],
            row["a"],
            row["b"],
            row["device"],
            row["cache"],
        )
        groups.setdefault((*key, tuple(row["shape"])), []).append(row)
    several = {
        key: rows for key, rows in groups.items() if len({tuple(row["shape"].values()) for row in rows}) > 1
    }
    if not several:
        return dataclasses.replace(plot, absent="no op was measured at two sizes")
    figures = []
    for part in _parts(list(several.items()), MOST_PANELS):
        columns = min(3, len(part))
        lines = math.ceil(len(part) / columns)
        figure = _figure(WIDTH if columns > 1 else 5.5, 0.6 + 2.6 * lines)
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel in panels[len(part) :]:
            panel.axis("off")
        for panel, (key, rows) in zip(panels, part, strict=False):
            _size_panel(panel, key, rows, theme)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=2, fontsize=8)
        figures.append(figure)
    return dataclasses.replace(plot, figures=tuple(figures))


def _size_panel(panel: Any, key: tuple[Any, ...], rows: list[Row], theme: Theme) -> None:
    _, _, passes, dtype, _, b, *_ = key
    names = list(rows[0]["shape"])
    varying = [name for name in names if len({row["shape"][name] for row in rows}) > 1]
    sizes = [math.prod(max(row["shape"][name], 1) for name in varying) for row in rows]
    order = np.argsort(sizes, kind="stable")
    x = np.array([sizes[i] for i in order], float)
    sides = (
        ("samples_a_s", "dlgpu", theme.ours, "o-"),
        ("samples_b_s", "the other", theme.other, "s--"),
    )
    for samples, label, colour, style in sides:
        quartiles = np.array([np.quantile(rows[i][samples], (0.25, 0.5, 0.75)) for i in order]) * 1e3
        spread = [quartiles[:, 1] - quartiles[:, 0], quartiles[:, 2] - quartiles[:, 1]]
        panel.errorbar(
            x, quartiles[:, 1], spread, fmt=style, color=colour, markersize=4, capsize=2, label=label
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    _plain_log_ticks(panel.yaxis)
    _plain_log_ticks(panel.xaxis)
    first = _cut(f"{op_title(rows[0])} {plain(passes)}", 40)
    second = _cut(plain(f"{dtype}, vs {b}"), 40)
    panel.set_title(f"{first}\n{second}", fontsize=7.5, loc="left")
    panel.set_xlabel(f"size, {_cut(plain(' x '.join(varying)), 24)}", fontsize=8)
    panel.set_ylabel("time (ms)", fontsize=8)
    panel.tick_params(labelsize=7.5)
    panel.grid()


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def text(value: float, _: int) -> str:
        for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= scale:
                return f"{value / scale:.3g}{unit}"
        return f"{value:.3g}"

    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=6))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def where_from(document: Row, theme: Theme) -> Plot:
    """The time saved, split into what bytes and launches explain, and the rest."""
    plot = Plot(
        "where-from",
        "Where the speed-up comes from",
        "Time saved, in percent of torch eager's. Bytes: those not moved, at the measured copy bandwidth. Launches: those not "
        "made, at the measured rate. The rest is what neither explains: better or worse kernels, and overlap. The diamond is "
        "the sum, as measured.",
    )
    ceiling = _bandwidth(document)
    if ceiling is None:
        return dataclasses.replace(plot, absent="no copy bandwidth was measured in this run")
    launches = max(_ceilings(document, "1/s"), key=lambda row: row["value"], default=None)
    rows, parts = [], []
    for row in _timings(document):
        if row["b"] not in UNFUSED or row.get("compulsory_bytes") is None or row.get("unfused_bytes") is None:
            continue
        ours, other = median(row["samples_a_s"]), median(row["samples_b_s"])
        by_bytes = (row["unfused_bytes"] - row["compulsory_bytes"]) / ceiling["value"]
        fused, unfused = row.get("launches_a"), row.get("unfused_launches")
        by_launches = 0.0
        if launches is not None and fused is not None and unfused is not None:
            by_launches = (unfused - fused) / launches["value"]
        saved = other - ours
        rows.append(row)
        parts.append(100 / other * np.array([by_bytes, by_launches, saved - by_bytes - by_launches, saved]))
    if not rows:
        return dataclasses.replace(plot, absent="no timing against torch eager has the bytes of both sides")
    sides = (
        ("bytes not moved", theme.ours, None),
        ("launches not made", theme.third, "..."),
        ("the rest", theme.grey, "///"),
    )
    figures = []
    for both in _parts(list(zip(rows, parts, strict=True))):
        part = [row for row, _ in both]
        values = np.array([value for _, value in both])
        figure, axes, y = _bars(part)
        right, left = np.zeros(len(part)), np.zeros(len(part))
        for column, (name, colour, hatch) in enumerate(sides):
            value = values[:, column]
            start = np.where(value >= 0, right, left)
            axes.barh(y, value, left=start, height=0.6, color=colour, hatch=hatch, label=name, linewidth=0)
            right, left = right + np.maximum(value, 0), left + np.minimum(value, 0)
        axes.plot(
            values[:, 3], y, "D", color=theme.ink, markersize=5, label="saved, measured", linestyle="none"
        )
        for at, end, row, saved in zip(y, right, part, values[:, 3], strict=True):
            before, after = (seconds(median(row[name])) for name in ("samples_b_s", "samples_a_s"))
            text = f"{saved:.0f}%: {before} to {after}"
            axes.annotate(
                text, (max(end, saved), at), (7, 0), textcoords="offset points", va="center", fontsize=7.5
            )
        low, high = min(0.0, left.min(), values.min()), max(right.max(), values.max(), 10.0)
        axes.set_xlim(low - 0.04 * (high - low), high + 0.4 * (high - low))
        axes.set_yticks(y, [_label(row) for row in part], fontsize=7.5)
        axes.axvline(0, color=theme.ink, linewidth=1)
        axes.grid(axis="x")
        axes.set_xlabel("time saved (% of torch eager's time)")
        _legend_above(axes)
        figures.append(figure)
    return dataclasses.replace(plot, figures=tuple(figures))


MARKERS = "osD^vPX*"


def model(document: Row, theme: Theme) -> Plot:
    """The gain that each GPU's figures allow."""
    plot = Plot(
        "model",
        "MODEL: what fusing can gain",
        "MODEL, not a timing. The least time that torch's operations one by one could take over the least that dlgpu's "
        "launches could, on each GPU: bytes at its bandwidth, products at its peak rate. Real kernels reach neither.",
    )
    rows = [row for row in document["rows"] if row["kind"] == "model" and row.get("gain")]
    if not rows:
        return dataclasses.replace(plot, absent="no model in this file")
    gains: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        label = _label({"passes": "", "shape": {}, **row}, against=False)
        gains.setdefault(label, []).append((plain(row.get("gpu") or "?", 24), row["gain"]))
    names = list(dict.fromkeys(name for found in gains.values() for name, _ in found))[: len(MARKERS)]
    colours = (theme.ours, theme.other, theme.third, theme.grey)
    figures = []
    for part in _parts(list(gains)):
        figure, axes, y = _bars(part)
        for i, name in enumerate(names):
            # Beside one another, since most GPUs agree.
            lift = 0.18 * ((len(names) - 1) / 2 - i)
            points = [
                (g, at + lift)
                for label, at in zip(part, y, strict=True)
                for n, g in gains[label]
                if n == name
            ]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, MARKERS[i], color=colours[i % 4], label=name, linestyle="none", markersize=5)
        highest = max(gain for label in part for _, gain in gains[label])
        lowest = min(gain for label in part for _, gain in gains[label])
        low, high = min(0.95, lowest * 0.95), max(1.2, highest * 1.1)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low, high)
        _log2_ticks(axes, low, high)
        axes.set_yticks(y, part, fontsize=7.5)
        axes.axvline(1, color=theme.ink, linewidth=1)
        axes.grid()
        axes.set_xlabel("MODEL: at most so many times as fast as torch eager (times, log scale)")
        _legend_above(axes)
        figures.append(figure)
    return dataclasses.replace(plot, figures=tuple(figures))


# In the order of the report.
PLOTS: tuple[Callable[[Row, Theme], Plot], ...] = (
    speed_ups,
    roofline,
    bandwidth,
    bytes_moved,
    time_against_size,
    where_from,
    model,
)
