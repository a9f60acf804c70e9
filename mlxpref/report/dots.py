"""The picture of a sweep: a row for each combination, a dot for each run, the mean of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.errors import UsageError
from mlxpref.report.canvas import FAINT, INK, balanced, drawing, new_figure, picture_format, save, size_of, wrapped

WIDTH = 7.6
"""Inches."""

SMALL, LARGE = 10.0, 13.5
"""Points."""

COLOUR = "#0072B2"
NAME_WIDTH = 2.4
"""Inches; longer names are broken into lines."""

AIR = 0.16
"""Inches between the names of two rows."""

KEY = "Dots: single runs. Bars: their mean."


@dataclass(frozen=True, slots=True)
class Row:
    """A combination: its name, and for each panel the values of its runs; none where nothing was measured."""

    name: str
    values: tuple[tuple[float, ...], ...]


def draw_dots(rows: Sequence[Row], panels: Sequence[str], file: Path | str, *, title: str) -> None:
    """Draw rows of dots, panels side by side, into a PNG or SVG file. The same arguments give the same bytes.

    Args:
        rows: from top to bottom; one at least.
        panels: what each axis shows, one or more.

    Raises:
        UsageError: nothing to draw, a number that is not finite, an unknown ending.
        RunError: the file cannot be written.
    """
    file = Path(file)
    picture_format(file)
    _check(rows, panels)
    with drawing():
        figure = new_figure(WIDTH, 3.0)
        every_axes, rooms = _lay_out(figure, rows, panels, title)
        for place, axes in enumerate(every_axes):
            _draw(axes, [row.values[place] for row in rows], rooms)
        save(figure, file, title=title, description=dots_alt_text(rows, panels))


def dots_alt_text(rows: Sequence[Row], panels: Sequence[str]) -> str:
    """The picture in words."""
    said = []
    for row in rows:
        means = [
            f"{panel} {math.fsum(values) / len(values):.3g} on average of {len(values)}"
            for panel, values in zip(panels, row.values, strict=True)
            if values
        ]
        said.append(f"{row.name}: {', '.join(means) or 'nothing'}")
    return ". ".join(said) + "."


def _check(rows: Sequence[Row], panels: Sequence[str]) -> None:
    if not panels or not any(values for row in rows for values in row.values):
        raise UsageError("a picture of runs needs runs to draw; there are none")
    for row in rows:
        if len(row.values) != len(panels):
            raise UsageError(f"{row.name}: {len(row.values)} groups of values for {len(panels)} panels")
        for value in (value for values in row.values for value in values):
            if not math.isfinite(value):
                raise UsageError(f"{row.name}: {value} cannot be drawn; it is no finite number")


def _lay_out(
    figure: Any, rows: Sequence[Row], panels: Sequence[str], title: str
) -> tuple[list[Any], list[float]]:
    """Write title, key and names, make the figure high enough for them; the axes, and inches of each row."""
    names = [wrapped(figure, row.name, NAME_WIDTH, fontsize=SMALL) for row in rows]
    sizes = [size_of(figure, name, fontsize=SMALL) for name in names]
    left = 0.15 + max(width for width, _ in sizes) + 0.2
    gap, right = 0.35, 0.25
    each = (WIDTH - left - right - gap * (len(panels) - 1)) / len(panels)
    heading = balanced(figure, title, WIDTH - 0.3, fontsize=LARGE, fontweight="bold")
    key = wrapped(figure, KEY, WIDTH - 0.3, fontsize=SMALL)
    labels = [wrapped(figure, panel, each + gap / 2, fontsize=SMALL) for panel in panels]
    head = size_of(figure, heading, fontsize=LARGE, fontweight="bold")[1]
    under = size_of(figure, key, fontsize=SMALL)[1]
    below = 0.14 + 0.3 + max(size_of(figure, label, fontsize=SMALL)[1] for label in labels) + 0.1
    above = 0.14 + head + 0.1 + under + 0.14
    rooms = [height + AIR for _, height in sizes]
    height = above + sum(rooms) + below
    figure.set_size_inches(WIDTH, height)
    figure.text(
        0.15 / WIDTH, 1 - 0.14 / height, heading, fontsize=LARGE, fontweight="bold", color=INK, va="top",
        parse_math=False,
    )  # fmt: skip
    figure.text(0.15 / WIDTH, 1 - (0.24 + head) / height, key, fontsize=SMALL, color=FAINT, va="top")
    every = []
    for place, label in enumerate(labels):
        at = (left + place * (each + gap)) / WIDTH
        axes = figure.add_axes((at, below / height, each / WIDTH, sum(rooms) / height))
        _set_axes(axes, rooms)
        axes.set_xlabel(label, fontsize=SMALL, color=INK, parse_math=False)
        every.append(axes)
    for name, centre in zip(names, _centres(rooms), strict=True):
        y = (below + sum(rooms) - centre) / height
        figure.text(
            (left - 0.1) / WIDTH, y, name, fontsize=SMALL, color=INK, ha="right", va="center", parse_math=False
        )
    return every, rooms


def _centres(rooms: Sequence[float]) -> list[float]:
    """Inches from the top of the axes to the middle of each row."""
    return [sum(rooms[:i]) + room / 2 for i, room in enumerate(rooms)]


def _set_axes(axes: Any, rooms: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(sum(rooms), 0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    for end in (sum(rooms[:i]) for i in range(1, len(rooms))):
        axes.axhline(end, color="#F2F2F2", linewidth=0.8, zorder=0.5)


def _draw(axes: Any, values: Sequence[Sequence[float]], rooms: Sequence[float]) -> None:
    every = [value for own in values for value in own]
    if not every:
        return
    low, high = min(every), max(every)
    air = 0.08 * (high - low) or max(0.05 * abs(high), 0.01)
    axes.set_xlim(low - air, high + air)
    if low - air < 0 < high + air:
        axes.axvline(0, color="#999999", linewidth=1.0, zorder=1)
    for own, centre, room in zip(values, _centres(rooms), rooms, strict=True):
        if not own:
            continue
        half = 0.36 * room
        mean = math.fsum(own) / len(own)
        axes.plot([mean, mean], [centre - half, centre + half], color=INK, linewidth=2.2, zorder=3,
                  solid_capstyle="butt")  # fmt: skip
        axes.plot(own, [centre] * len(own), linestyle="", marker="o", markersize=6.5, markerfacecolor=COLOUR,
                  markeredgecolor="white", markeredgewidth=0.8, alpha=0.85, zorder=4)  # fmt: skip
