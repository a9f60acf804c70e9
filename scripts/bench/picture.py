"""The picture of a benchmark: for each comparison, bars of time and bars of memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.cases import Case
from bench.contestants import TABLE
from mlxpref.report.canvas import FAINT, INK, drawing, new_figure, save

WIDTH, ROW, HEAD = 7.6, 0.28, 0.85
"""Inches: of the picture, of a bar with its room, of what stands around the bars of a comparison."""
OURS, OTHERS, SECOND = "#0072B2", "#B8B8B8", "#E3C9A8"
SMALL = 8.5
KEY = "Medians; shorter is better. Memory: peak above all loaded weights; light, where there is one, a second model."


def draw_cases(cases: Sequence[Case], file: Path) -> None:
    """Draw all comparisons under one another into a PNG or SVG file."""
    heights = [HEAD + ROW * len(case.measured) for case in cases]
    height = sum(heights) + 0.35
    with drawing():
        figure = new_figure(WIDTH, height)
        figure.text(0.02, 1 - 0.12 / height, KEY, fontsize=SMALL, color=FAINT, va="top")
        top = height - 0.35
        for case, room in zip(cases, heights, strict=True):
            _draw(figure, case, top, room, height)
            top -= room
        save(figure, file, title="Time and memory of one DPO step", description=alt_text(cases))


def alt_text(cases: Sequence[Case]) -> str:
    """The picture in words."""
    said = []
    for case in cases:
        each = (f"{TABLE[n].title} {median(m.wall):.2f} s and {m.above / 1e6:.0f} MB" for n, m in case.measured.items())
        said.append(f"{title_of(case)}: {', '.join(each)}")
    return ". ".join(said) + "."


def title_of(case: Case) -> str:
    """The comparison in words."""
    likes = {"uf": "UltraFeedback-like", "hh": "HH-like"}
    on = "PyTorch" if case.group == "torch" else f"MLX, {case.setting.blas} BLAS"
    return f"{likes.get(case.setting.shape, case.setting.shape)} pairs, {on}"


def _draw(figure: Any, case: Case, top: float, room: float, height: float) -> None:
    names = list(case.measured)
    title = title_of(case)
    figure.text(0.02, (top - 0.08) / height, title, fontsize=SMALL + 2, fontweight="bold", color=INK, va="top")
    inside = ROW * len(names)
    low = (top - 0.38 - inside) / height
    times = [median(case.measured[name].wall) for name in names]
    spaces = [case.measured[name].above / 1e6 for name in names]
    seconds = [case.measured[name].facts.get("reference", 0) / 1e6 for name in names]
    panels = ((0.27, times, None, "step, seconds"), (0.66, spaces, seconds, "memory, MB"))
    for left, values, further, label in panels:
        axes = figure.add_axes((left, low, 0.27, inside / height))
        colours = [OURS if name.startswith("mlxpref") else OTHERS for name in names]
        axes.barh(range(len(names)), values, color=colours, height=0.7)
        if further is not None:
            axes.barh(range(len(names)), further, left=values, color=SECOND, height=0.7)
        for place, value in enumerate(values):
            end = value + (further[place] if further is not None else 0.0)
            text = f" {value:.2f}" if further is None else f" {value:.0f}"
            axes.text(end, place, text, fontsize=SMALL, color=INK, va="center")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1.25 * max([*values, 1e-9]) + max(further or [0.0]))
        axes.set_xlabel(label, fontsize=SMALL, color=FAINT)
        axes.set_xticks([])
        axes.set_yticks(range(len(names)) if left < 0.5 else [])
        if left < 0.5:
            axes.set_yticklabels([TABLE[name].title for name in names], fontsize=SMALL, color=INK)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
