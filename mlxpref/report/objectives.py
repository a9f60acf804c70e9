"""Pictures of objectives: what a loss says of a pair, and how hard it pushes, as the margin grows.

Each row of a picture has two panels: losses at the left, their slopes towards the log-probs of the two responses at
the right. Names stand at the ends of the lines. The numbers come from whoever asks for the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mlxpref.report.canvas import FAINT, INK, apart, drawing, new_figure, save, size_of, wrapped

WIDTH, ROW_HEIGHT = 10.0, 3.5
"""Inches: 1600 pixels wide, twice as fine as a page of documentation shows."""

SMALL, LARGE = 9.0, 12.5
"""Points."""

COLOURS = ("#0072B2", "#C04A00", "#00735A", "#8A3C8C", "#B07D00", "#3D9BD1", "#C2497F", "#5A3A12", "#111111")
"""Told apart by colour-blind readers, too; the names at the ends say which is which where two are near."""

Range = tuple[float, float]


class Bend(NamedTuple):
    """One objective along the x axis.

    Attributes:
        name: what is written at the end of its lines.
        losses: at each x.
        chosen, rejected: slopes of the loss towards the log-probs of the two responses, 1/nats, at each x.
        text: slopes towards the log-prob of a further text; () without one.
        faint: drawn grey and thin, for comparison.
    """

    name: str
    losses: Sequence[float]
    chosen: Sequence[float]
    rejected: Sequence[float]
    text: Sequence[float] = ()
    faint: bool = False


class Row(NamedTuple):
    """Objectives that share two panels, and what these show of the y axes."""

    bends: tuple[Bend, ...]
    losses: Range
    slopes: Range


def draw_objectives(
    rows: Sequence[Row], xs: Sequence[float], file: Path | str, *, title: str, caption: str, x_label: str
) -> None:
    """Draw losses and slopes against the margin into a PNG or SVG file; the same arguments give the same bytes.

    Args:
        xs: ascending; of every number of every bend.
        caption: below the title: what is held fast, what is scaled, what the kinds of line are.

    Raises:
        UsageError: an unknown ending.
        RunError: the file cannot be written.
    """
    with drawing():
        figure = new_figure(WIDTH, ROW_HEIGHT)
        top, height = _head(figure, title, caption, len(rows))
        room = (height - top) / len(rows)
        bends = [bend for row in rows for bend in row.bends]
        names = max(size_of(figure, bend.name, fontsize=SMALL)[0] for bend in bends)
        dotted = ", text (dotted)" if any(bend.text for bend in bends) else ""
        headings = ("loss", f"slope towards chosen (solid), rejected (dashed){dotted}, 1/nats")
        for at, row in enumerate(rows):
            bottom = height - top - (at + 1) * room + 0.58
            for side, limits in enumerate((row.losses, row.slopes)):
                left = 0.55 + side * WIDTH / 2
                box = (left, bottom, WIDTH / 2 - 0.55 - 0.3 - names, room - 0.9)
                axes = _panel(figure, box, xs, limits)
                axes.set_xlabel(x_label, fontsize=SMALL, color=INK, parse_math=False)
                axes.set_title(headings[side], fontsize=SMALL, color=INK, loc="left", parse_math=False)
                _draw(figure, axes, row.bends, xs, slopes=bool(side))
        save(figure, Path(file), title=title, description=objectives_alt_text(rows, xs))


def objectives_alt_text(rows: Sequence[Row], xs: Sequence[float]) -> str:
    """The picture in words, for who cannot see it; with enough of its numbers to tell when it is out of date."""
    middle = len(xs) // 2
    said = [f"Losses at {xs[0]:g}, {xs[middle]:.3g} and {xs[-1]:g}"]
    for bend in (bend for row in rows for bend in row.bends):
        values = ", ".join(f"{bend.losses[at]:.3g}" for at in (0, middle, -1))
        slopes = f"{bend.chosen[middle]:.2g} and {bend.rejected[middle]:.2g}"
        said.append(f"{bend.name}: {values}, slopes in the middle {slopes}")
    return ". ".join(said) + "."


def _head(figure: Any, title: str, caption: str, n_rows: int) -> tuple[float, float]:
    """Write title and caption; how much room they take at the top, and the height of the figure, inches."""
    caption = wrapped(figure, caption, WIDTH - 0.3, fontsize=SMALL)
    head = size_of(figure, title, fontsize=LARGE, fontweight="bold")[1]
    under = size_of(figure, caption, fontsize=SMALL)[1]
    top = 0.14 + head + 0.1 + under + 0.1
    height = top + n_rows * ROW_HEIGHT
    figure.set_size_inches(WIDTH, height)
    at = {"x": 0.15 / WIDTH, "va": "top", "parse_math": False}
    figure.text(y=1 - 0.14 / height, s=title, fontsize=LARGE, fontweight="bold", color=INK, **at)
    figure.text(y=1 - (0.24 + head) / height, s=caption, fontsize=SMALL, color=FAINT, **at)
    return top, height


def _panel(figure: Any, box: Sequence[float], xs: Sequence[float], limits: Range) -> Any:
    width, height = figure.get_size_inches()
    left, bottom, wide, high = box
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(*limits)
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color="#BBBBBB", linewidth=1)
    axes.axvline(0, color="#BBBBBB", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    return axes


def _draw(figure: Any, axes: Any, bends: Sequence[Bend], xs: Sequence[float], *, slopes: bool) -> None:
    """The lines of a panel, and at the end of each first one its name."""
    ends = []
    colours = iter(COLOURS)
    for bend in bends:
        colour = FAINT if bend.faint else next(colours)
        style = {"color": colour, "linewidth": 1.1 if bend.faint else 1.8, "zorder": 2 if bend.faint else 3}
        axes.plot(xs, bend.chosen if slopes else bend.losses, **style)
        if slopes:
            axes.plot(xs, bend.rejected, linestyle=(0, (4, 2)), **style)
            if bend.text:
                axes.plot(xs, bend.text, linestyle=(0, (1, 1.5)), **style)
        ends.append((*_end(xs, bend.chosen if slopes else bend.losses, axes.get_ylim()), bend.name, colour))
    _write_names(figure, axes, ends)


def _end(xs: Sequence[float], ys: Sequence[float], limits: Range) -> tuple[float, float]:
    """The last point of a line that can be seen; where it leaves the panel for good, a point on its border."""
    low, high = limits
    points = list(zip(xs, ys, strict=True))
    inside = [at for at, (_, y) in enumerate(points) if low <= y <= high]
    last = inside[-1] if inside else 0
    if last == len(points) - 1:
        return points[-1]
    (x, y), (next_x, next_y) = points[last : last + 2]
    border = high if next_y > high else low
    share = (border - y) / (next_y - y)
    return x + share * (next_x - x), border


def _write_names(figure: Any, axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right of a panel, in the order of their lines' ends, each led to from there."""
    (x0, y0), (x1, y1) = axes.get_position().get_points()
    width, height = figure.get_size_inches()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    heights = [y0 + (y1 - y0) * (y - low) / (high - low) for _, y, _, _ in ends]
    rooms = [size_of(figure, name, fontsize=SMALL)[1] + 0.05 for _, _, name, _ in ends]
    wanted = [at * height for at in heights]
    places = apart(wanted, rooms, y0 * height - 0.1, y1 * height)
    for (x, _, name, colour), at, place in zip(ends, heights, places, strict=True):
        start = x0 + (x1 - x0) * (x - left) / (right - left)
        _lead(figure, [start, x1 + 0.05 / width, x1 + 0.2 / width], [at, at, place / height], colour)
        figure.text(
            x1 + 0.24 / width, place / height, name, fontsize=SMALL, color=colour, va="center", parse_math=False
        )


def _lead(figure: Any, xs: Sequence[float], ys: Sequence[float], colour: str) -> None:
    from matplotlib.lines import Line2D

    for (x, y), (to_x, to_y) in pairwise(zip(xs, ys, strict=True)):
        figure.add_artist(Line2D([x, to_x], [y, to_y], color=colour, linewidth=0.8, transform=figure.transFigure))
