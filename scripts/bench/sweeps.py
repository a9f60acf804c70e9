"""Memory of our step against one size: the vocabulary at fixed width, or the length of one pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.cases import Setting, case_pairs, tasks_of
from bench.measuring import environment, measure
from bench.model import TINY, Dims
from bench.pairs import Lengths, make_pairs
from bench.tables import markdown

VOCABULARIES = (16_384, 32_768, 65_536, 131_072)
LENGTHS = (512, 1024, 2048, 4096)
"""Tokens of the prompt with either response."""


class Point(NamedTuple):
    """One measurement.

    Attributes:
        size: words, or tokens.
        checkpointed: whether layers were computed again in the backward pass.
        above: peak bytes above all weights, the head's among them.
        head: bytes of the head's weights.
        wall: seconds of a step.
    """

    size: int
    checkpointed: bool
    above: float
    head: float
    wall: float


def vocabulary_sweep(folder: Path, *, kind: str, quick: bool, watch: Callable[[str], None]) -> list[Point]:
    """An UltraFeedback-like batch of 4 pairs."""
    sizes = (128, 256) if quick else VOCABULARIES
    points = []
    for size in sizes:
        dims = replace(TINY if quick else Dims(), kind=kind, vocabulary=size)
        setting = Setting(dims, "tiny" if quick else "uf", repeats=2 if quick else 3, warm_up=1)
        points.append(_point(setting, size, case_pairs(setting)[: setting.batch_size], folder / str(size), watch))
    return points


def length_sweep(folder: Path, *, kind: str, quick: bool, watch: Callable[[str], None]) -> list[Point]:
    """One pair, a third of each row its prompt."""
    sizes = (24, 48) if quick else LENGTHS
    points = []
    for checkpointed in (False, True):
        for size in sizes:
            dims = replace(TINY if quick else Dims(), kind=kind)
            setting = Setting(dims, "uf", batch_size=1, repeats=1, warm_up=1, grad_checkpoint=checkpointed)
            pairs = make_pairs([Lengths(size // 3, size - size // 3, size - size // 3)], dims.vocabulary)
            points.append(_point(setting, size, pairs, folder / f"{size}-{checkpointed}", watch))
    return points


SWEEPS = {"vocabulary": vocabulary_sweep, "length": length_sweep}


def _point(setting: Setting, size: int, pairs: list, folder: Path, watch: Callable[[str], None]) -> Point:
    folder.mkdir(parents=True)
    tasks = tasks_of(setting, ["mlxpref"], pairs, folder, gradients=False)
    env = environment(blas=setting.blas, threads=setting.threads)
    (found,) = measure(tasks, folder, env, repeats=setting.repeats, warm_up=setting.warm_up, watch=watch).values()
    head = 4 * setting.dims.hidden * setting.dims.vocabulary
    return Point(size, setting.grad_checkpoint, found.above, head, median(found.wall))


def sweep_table(points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        first = next(one for one in points if one.checkpointed == point.checkpointed)
        rows.append((
            f"{point.size}", "yes" if point.checkpointed else "no", f"{point.above / 1e6:.0f}",
            f"{point.above / first.above:.2f}", f"{point.size / first.size:g}", f"{point.head / 1e6:.0f}",
            f"{point.wall:.2f}",
        ))  # fmt: skip
    head = ("size", "checkpointed", "peak above weights MB", "× the first", "size × the first", "head MB", "step s")
    return markdown(head, rows)
