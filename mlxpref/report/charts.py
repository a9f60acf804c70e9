"""Charts of a run: lines over steps, and bars over bins; each with its figures as a table and in a sentence.

A chart is data, and is drawn here alone: into a file, or as SVG for a page, where its colours are the page's.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.report.canvas import FAINT, INK, apart, drawing, new_figure, save, size_of, wrapped
from mlxpref.report.pictures import LINES

WIDTH, HEIGHT = 4.9, 3.1
"""Inches: as wide as a phone held upright shows without letters becoming too small to read."""

POINTS = 240
"""Of a line at most; more are means of neighbours."""

TABLE_ROWS = 12
"""Of a line chart's table, evenly over its steps."""

COLOURS = ("#0072B2", "#C04A00", "#00735A", "#8A3C8C", "#8A6D00", "#B0308A")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5)), "-", (0, (5, 1.5)))
GRID, EDGE = "#E6E6E6", "#BBBBBB"
PAGE_COLOURS = {"#ffffff": "paper", INK: "ink", FAINT: "faint", GRID: "grid", EDGE: "edge", LINES[0]: "c5"} | {
    colour: f"c{place}" for place, colour in enumerate(COLOURS)
}
"""A colour here -> the name of the page's own for it."""

NAME_WIDTH = 1.3
"""Inches; longer names are broken into lines."""

SMALL, NORMAL = 9.0, 10.0
"""Points."""


@dataclass(frozen=True, slots=True)
class Line:
    """(N,) x, rising, and (N,) y of one name; ``marked``: its few points are shown each."""

    name: str
    x: np.ndarray
    y: np.ndarray
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """A height for each of the chart's bins."""

    name: str
    heights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """
    Attributes:
        name: of its file, without an ending.
        title: what it shows.
        lines, or bars over ``bins``: what is drawn; not both.
        level: a value to compare with, drawn through, and what it is.
        note: a sentence on how to read it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...] = ()
    bars: tuple[Bars, ...] = ()
    bins: tuple[str, ...] = ()
    level: tuple[float, str] | None = None
    note: str = ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of what is drawn."""
        if self.bars:
            rows = zip(self.bins, *(bars.heights for bars in self.bars), strict=True)
            return [self.x_label, *(bars.name for bars in self.bars)], [
                [row[0], *map(_number, row[1:])] for row in rows
            ]
        at = self._table_steps()
        return [self.x_label, *(line.name for line in self.lines)], [
            [f"{x:g}", *(_at(line, x) for line in self.lines)] for x in at
        ]

    def _table_steps(self) -> list[float]:
        marked = [line for line in self.lines if line.marked]
        steps = np.unique(np.concatenate([line.x for line in marked or self.lines]))
        return [
            float(steps[place]) for place in np.unique(np.linspace(0, len(steps) - 1, TABLE_ROWS).round().astype(int))
        ]

    def in_words(self) -> str:
        """For who cannot see it."""
        if self.bars:
            said = (f"{bars.name}: {', '.join(map(_pair, self.bins, bars.heights))}" for bars in self.bars)
            return f"{self.title}. " + "; ".join(said)
        return f"{self.title}. " + "; ".join(
            f"{line.name}: {_number(line.y[0])} at {line.x[0]:g}, {_number(line.y[-1])} at {line.x[-1]:g}"
            for line in self.lines
        )


def draw(chart: Chart, file: Path) -> None:
    """Write a chart as PNG or SVG, by the file's ending. UsageError for another, RunError if it cannot be written."""
    with drawing():
        save(_figure(chart, heading=True), file, title=chart.title, description=chart.in_words())


def as_svg(chart: Chart) -> str:
    """An ``svg`` element for a page: no heading, text as text, colours by name (``var(--ink)``, ``var(--c0)``, …)."""
    import matplotlib

    with drawing():
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = f"mlxpref-{chart.name}"
        figure = _figure(chart, heading=False)
        figure.patch.set_visible(False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return for_page(written.getvalue(), chart.in_words())


def for_page(svg: str, words: str) -> str:
    """An SVG file's text as an element of a page."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, name in PAGE_COLOURS.items():
        svg = re.sub(re.escape(colour), f"var(--{name})", svg, flags=re.IGNORECASE)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(words, quote=True)}">{rest}'


# --- drawing ---


def _figure(chart: Chart, *, heading: bool) -> Any:
    figure = new_figure(WIDTH, HEIGHT)
    top = 0.42 if heading else 0.12
    names = [line.name for line in chart.lines] if chart.lines else [bars.name for bars in chart.bars]
    names += [chart.level[1]] if chart.level is not None else []
    written = {name: wrapped(figure, name, NAME_WIDTH, fontsize=SMALL) for name in names}
    widest = max(size_of(figure, text, fontsize=SMALL)[0] for text in written.values())
    right = 0.2 + (widest if len(names) > 1 else 0.0)
    left, bottom = 0.68, 0.52
    axes = figure.add_axes(
        (left / WIDTH, bottom / HEIGHT, (WIDTH - left - right) / WIDTH, (HEIGHT - bottom - top) / HEIGHT)
    )
    if heading:
        figure.text(0.1 / WIDTH, 1 - 0.1 / HEIGHT, chart.title, fontsize=11, fontweight="bold", color=INK, va="top",
                    parse_math=False)  # fmt: skip
    ends = _lines(axes, chart) if chart.lines else _bars(axes, chart)
    if chart.level is not None:
        axes.axhline(chart.level[0], color=FAINT, linestyle=":", linewidth=1.2, zorder=1)
        ends.append((chart.level[1], chart.level[0], FAINT))
    _dress(axes, chart)
    _make_room(figure, axes)
    if len(ends) > 1:
        _name(figure, axes, [(written[name], value, colour) for name, value, colour in ends])
    return figure


def _lines(axes: Any, chart: Chart) -> list[tuple[str, float, str]]:
    ends = []
    for place, line in enumerate(chart.lines):
        x, y = thinned(line.x, line.y)
        colour = COLOURS[place % len(COLOURS)]
        few = line.marked and len(x) <= 40
        axes.plot(
            x, y, color=colour, linestyle=DASHES[place % len(DASHES)], linewidth=1.7, zorder=3 + line.marked,
            marker="o" if few or len(x) == 1 else None, markersize=3.2,
        )  # fmt: skip
        ends.append((line.name, float(y[-1]), colour))
    return ends


def _bars(axes: Any, chart: Chart) -> list[tuple[str, float, str]]:
    n = len(chart.bars)
    ends = []
    for place, bars in enumerate(chart.bars):
        at = np.arange(len(bars.heights)) + (place - (n - 1) / 2) * 0.8 / n
        axes.bar(at, bars.heights, 0.8 / n, color=COLOURS[place % len(COLOURS)], zorder=3)
        last = next((height for height in reversed(bars.heights) if not math.isnan(height)), 0.0)
        ends.append((bars.name, last, COLOURS[place % len(COLOURS)]))
    every = max(1, round(len(chart.bins) / 8))
    axes.set_xticks(range(0, len(chart.bins), every), chart.bins[::every])
    return ends


def _dress(axes: Any, chart: Chart) -> None:
    axes.set_xlabel(chart.x_label, fontsize=NORMAL, color=INK, parse_math=False)
    axes.set_ylabel(chart.y_label, fontsize=NORMAL, color=INK, parse_math=False)
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.8, axis="both" if chart.lines else "y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    if chart.lines:
        axes.margins(x=0.01)


def _make_room(figure: Any, axes: Any) -> None:
    """Long numbers push the axis' name over the edge: narrow the axes by as much."""
    lacking = 0.05 * figure.dpi - axes.get_tightbbox(figure.canvas.get_renderer()).x0
    if lacking > 0:
        (x0, y0), (x1, y1) = axes.get_position().get_points()
        by = lacking / figure.dpi / WIDTH
        axes.set_position((x0 + by, y0, x1 - x0 - by, y1 - y0))


def _name(figure: Any, axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Each name to the right of where its line ends, as near as there is room."""
    (_, y0), (x1, y1) = axes.get_position().get_points()
    low, high = axes.get_ylim()
    wanted = [(y0 + (y1 - y0) * (value - low) / (high - low)) * HEIGHT for _, value, _ in ends]
    rooms = [size_of(figure, name, fontsize=SMALL)[1] + 0.05 for name, _, _ in ends]
    for (name, _, colour), place in zip(ends, apart(wanted, rooms, y0 * HEIGHT, y1 * HEIGHT), strict=True):
        figure.text(
            x1 + 0.06 / WIDTH, place / HEIGHT, name, fontsize=SMALL, color=colour, va="center", parse_math=False
        )


def thinned(x: np.ndarray, y: np.ndarray, n: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most n points: means of neighbours, both of x and of y."""
    if len(x) <= n:
        return x, y
    parts = np.array_split(np.arange(len(x)), n)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _at(line: Line, x: float) -> str:
    """The line's value at x; beside a line that is read at few steps the mean since the step before stands for many."""
    place = int(np.searchsorted(line.x, x, side="right")) - 1
    if place < 0 or (line.marked and line.x[place] != x):
        return ""
    window = max(1, len(line.x) // (2 * TABLE_ROWS)) if not line.marked else 1
    return _number(float(line.y[max(0, place + 1 - window) : place + 1].mean()))


def _pair(name: str, height: float) -> str:
    return f"{name} {_number(height)}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
