"""The picture of control: quality asked for, against quality achieved.

Names stand at the right end of what they name, so that nobody has to match colours with a legend, and
colours differ for colour-blind readers, too; dashes and marks differ besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlxpref.errors import UsageError
from mlxpref.report.canvas import (
    FAINT,
    INK,
    apart,
    balanced,
    drawing,
    new_figure,
    picture_format,
    save,
    size_of,
    wrapped,
)

WIDTH, HEIGHT = 6.6, 4.5
"""Inches: 1056 pixels wide, twice as fine as a phone shows and half as fine again as a README."""

SMALL, NORMAL, LARGE = 10.0, 11.5, 13.5
"""Points. At a README's width a point is about 1.5 pixels."""

CURVES = (("#0072B2", "o"), ("#C04A00", "s"), ("#00735A", "^"), ("#8A3C8C", "D"))
LINES = ("#882255", "#4F7A00", "#332288", "#8A4B08", "#B0308A", "#00697A", "#111111")
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (10, 3)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
    (0, (1, 1)),
)

NAME_WIDTH = 1.35
"""Inches; longer names are broken into lines."""

WHOLE_FROM = 4
"""An axis that spans at least so much has whole numbers only."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """At one goal: ``asked`` on the x axis, ``mean`` of the scores achieved on the y axis, the ``interval`` that
    the mean lies in with 95 % confidence, and the ``spread`` (10 % to 90 % quantile) of single samples."""

    asked: float
    mean: float
    interval: Range | None = None
    spread: Range | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A model asked for several qualities; points in the order of the x axis."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A model asked for nothing, and the mean of what it achieves."""

    name: str
    value: float


def draw_control_curve(
    curves: Sequence[Curve], file: Path | str, *,
    title: str,
    lines: Sequence[Line] = (),
    scale: Range = (1, 10),
    as_asked: bool = True,
    x_label: str = "quality asked for",
    y_label: str = "quality achieved",
) -> None:  # fmt: skip
    """Draw models asked for several qualities, and models asked for none, into a PNG or SVG file.

    The mean of each goal has its 95 % interval as an error bar; a light band holds the middle 80 % of
    single answers. The same arguments give the same bytes.

    Args:
        curves: one at least; each with a point at least.
        file: its ending chooses the format.
        title: what the picture shows, as a sentence.
        lines: drawn level, their names at the right.
        scale: ends of the goals' scale, and of the scores' where ``as_asked``.
        as_asked: the scores are on the goals' scale, so draw the diagonal where each is what was asked.

    Raises:
        UsageError: nothing to draw, a number that is not finite, an unknown ending.
        RunError: the file cannot be written.
    """
    file = Path(file)
    picture_format(file)
    _check(curves, lines, scale)
    with drawing():
        figure = new_figure(WIDTH, HEIGHT)
        names = [
            name._replace(text=wrapped(figure, name.text, NAME_WIDTH, fontsize=SMALL))
            for name in _names(curves, lines, scale if as_asked else None)
        ]
        axes = _lay_out(figure, title, _key(curves), names)
        _set_axes(axes, curves, lines, scale, as_asked)
        axes.set_xlabel(x_label, fontsize=NORMAL, color=INK, parse_math=False)
        axes.set_ylabel(y_label, fontsize=NORMAL, color=INK, parse_math=False)
        if as_asked:
            axes.plot(scale, scale, color=FAINT, linestyle=":", linewidth=1.4, zorder=1)
        for i, line in enumerate(lines):
            axes.axhline(line.value, color=LINES[i % len(LINES)], linestyle=_dash(i), linewidth=1.6, zorder=2)
        for i, curve in enumerate(curves):
            _draw_curve(axes, curve, i, len(curves))
        _write_names(figure, axes, names)
        save(figure, file, title=title, description=control_alt_text(curves, lines))


def control_alt_text(curves: Sequence[Curve], lines: Sequence[Line] = ()) -> str:
    """The picture in words, for who cannot see it."""
    said = []
    for curve in curves:
        first, last = curve.points[0], curve.points[-1]
        said.append(f"{curve.name}: asked for {first.asked:g} it achieves {first.mean:.2f}")
        if len(curve.points) > 1:
            said[-1] += f" on average, asked for {last.asked:g} it achieves {last.mean:.2f}"
    said += [f"{line.name}, asked for nothing: {line.value:.2f}" for line in lines]
    return ". ".join(["Quality achieved against quality asked for", *said]) + "."


def _check(curves: Sequence[Curve], lines: Sequence[Line], scale: Range) -> None:
    if not curves or not all(curve.points for curve in curves):
        raise UsageError("a control curve needs points to draw; there are none")
    if not scale[0] < scale[1]:
        raise UsageError(f"a scale goes from low to high, not from {scale[0]:g} to {scale[1]:g}")
    for name, value in [*((line.name, line.value) for line in lines), *_numbers(curves)]:
        if not math.isfinite(value):
            raise UsageError(f"{name}: {value} cannot be drawn; it is no finite number")


def _numbers(curves: Sequence[Curve]) -> list[tuple[str, float]]:
    return [
        (curve.name, value)
        for curve in curves
        for point in curve.points
        for value in (point.asked, point.mean, *(point.interval or ()), *(point.spread or ()))
    ]


# --- the parts, in inches from the figure's left and lower edge ---


class _Name(NamedTuple):
    """What stands at the right: its height on the y axis, and where on the x axis it ends (None: the edge)."""

    text: str
    value: float
    colour: str
    end: float | None


def _names(curves: Sequence[Curve], lines: Sequence[Line], diagonal: Range | None) -> list[_Name]:
    names = [
        _Name(curve.name, curve.points[-1].mean, CURVES[i % len(CURVES)][0], curve.points[-1].asked)
        for i, curve in enumerate(curves)
    ]
    names += [_Name(line.name, line.value, LINES[i % len(LINES)], None) for i, line in enumerate(lines)]
    if diagonal:
        names.append(_Name("as asked", diagonal[1], FAINT, diagonal[1]))
    return names


def _key(curves: Sequence[Curve]) -> str:
    """What marks, bars and bands mean, of those that there are."""
    points = [point for curve in curves for point in curve.points]
    interval = " and its 95 % interval" if any(point.interval for point in points) else ""
    band = " Band: the middle 80 % of single answers." if any(point.spread for point in points) else ""
    return f"Marks: mean{interval}.{band}"


def _lay_out(figure: Any, title: str, key: str, names: Sequence[_Name]) -> Any:
    """Write title and key, make the figure high enough for all names, and return the axes between them."""
    sizes = [size_of(figure, name.text, fontsize=SMALL) for name in names]
    left, bottom, right = 0.72, 0.68, 0.5 + max(width for width, _ in sizes)
    heading = balanced(figure, title, WIDTH - 0.3, fontsize=LARGE, fontweight="bold")
    key = wrapped(figure, key, WIDTH - 0.3, fontsize=SMALL)
    head = size_of(figure, heading, fontsize=LARGE, fontweight="bold")[1]
    under = size_of(figure, key, fontsize=SMALL)[1]
    above = 0.14 + head + 0.1 + under + 0.16
    height = max(HEIGHT, bottom + above + sum(_room(size) for _, size in sizes))
    figure.set_size_inches(WIDTH, height)
    figure.text(
        0.15 / WIDTH, 1 - 0.14 / height, heading, fontsize=LARGE, fontweight="bold", color=INK, va="top",
        parse_math=False,
    )  # fmt: skip
    figure.text(0.15 / WIDTH, 1 - (0.24 + head) / height, key, fontsize=SMALL, color=FAINT, va="top")
    return figure.add_axes(
        (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - above) / height)
    )


def _set_axes(axes: Any, curves: Sequence[Curve], lines: Sequence[Line], scale: Range, as_asked: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    asked = [point.asked for curve in curves for point in curve.points]
    heights = [line.value for line in lines]
    for curve in curves:
        for point in curve.points:
            heights += [point.mean, *(point.interval or ()), *(point.spread or ())]
    axes.set_xlim(*_around([*scale, *asked]))
    axes.set_ylim(*_around([*heights, *(scale if as_asked else ())]))
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=high - low >= WHOLE_FROM))
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")


def _around(values: Sequence[float]) -> Range:
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.5
    return low - air, high + air


def _draw_curve(axes: Any, curve: Curve, i: int, n: int) -> None:
    """Band, line, marks and error bars; several curves stand a little beside each other."""
    colour, mark = CURVES[i % len(CURVES)]
    low, high = axes.get_xlim()
    beside = (i - (n - 1) / 2) * 0.012 * (high - low)
    asked = [point.asked + beside for point in curve.points]
    banded = [(x, point.spread) for x, point in zip(asked, curve.points, strict=True) if point.spread]
    axes.fill_between(
        [x for x, _ in banded], [s[0] for _, s in banded], [s[1] for _, s in banded],
        color=colour, alpha=0.13, linewidth=0, zorder=1.5,
    )  # fmt: skip
    means = [point.mean for point in curve.points]
    style = "-" if i == 0 else (0, (5, 1))
    axes.plot(asked, means, color=colour, marker=mark, markersize=5.5, linewidth=2.2, linestyle=style, zorder=4)
    for x, point in zip(asked, curve.points, strict=True):
        if point.interval:
            axes.plot(
                [x, x], point.interval, color=colour, marker="_", markersize=7, linewidth=1.6, zorder=3.5,
                solid_capstyle="butt",
            )  # fmt: skip


def _dash(i: int) -> Any:
    """Together with the colour no two of the first 42 lines have the same."""
    return DASHES[i % len(DASHES)]


def _room(height: float) -> float:
    """What a name of this height takes with the air around it, inches."""
    return height + 0.06


def _write_names(figure: Any, axes: Any, names: Sequence[_Name]) -> None:
    """Write each name to the right of the axes, and lead from the end of what it names to it."""
    (x0, y0), (x1, y1) = axes.get_position().get_points()
    width, height = figure.get_size_inches()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    heights = [y0 + (y1 - y0) * (name.value - low) / (high - low) for name in names]
    rooms = [_room(size_of(figure, name.text, fontsize=SMALL)[1]) for name in names]
    places = apart([h * height for h in heights], rooms, y0 * height - 0.05, y1 * height + 0.05)
    for name, at, place in zip(names, heights, places, strict=True):
        start = x1 if name.end is None else x0 + (x1 - x0) * (name.end - left) / (right - left) + 0.06 / width
        bends = [start, x1 + 0.06 / width, x1 + 0.25 / width]
        _lead(figure, bends, [at, at, place / height], name.colour)
        figure.text(
            x1 + 0.3 / width, place / height, name.text, fontsize=SMALL, color=name.colour, va="center",
            parse_math=False,
        )  # fmt: skip


def _lead(figure: Any, xs: Sequence[float], ys: Sequence[float], colour: str) -> None:
    from matplotlib.lines import Line2D

    figure.add_artist(Line2D(xs, ys, color=colour, linewidth=0.9, alpha=0.8, transform=figure.transFigure))
