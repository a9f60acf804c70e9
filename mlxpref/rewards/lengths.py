"""Scores that do not reward a response for being long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import ScoreError

GRID_STEPS = 1000
"""DICE tries α = 0, 0.001, …, 1."""


def length_penalised(scores: ArrayLike, lengths: ArrayLike, alpha: float) -> np.ndarray:
    """s − α · n, in score units; the shape stays.

    Args:
        scores, lengths: the same shape; lengths in characters.
        alpha: score units a character.

    Source: Chen et al. 2024 (DICE), arXiv:2406.09760.
    """
    return np.asarray(scores, np.float64) - alpha * np.asarray(lengths, np.float64)


def balanced_alpha(
    scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]], grid: Iterable[float] | None = None
) -> float:
    """The α at which the chosen responses are as long as the rejected ones, on average.

    Chosen is the response of the highest s − α·n, rejected that of the lowest (the first of equals). α goes
    up the grid; the search ends where the gap |mean chosen length − mean rejected length| grows.

    Args:
        scores, lengths: for each prompt its responses' scores and lengths in characters; lists of any sizes.
        grid: rising; 0 to 1 by 0.001 as in DICE, whose scores are log-ratios in nats. Scores of another
            unit may want another.

    Returns:
        The α of the smallest gap met, the lowest of equal ones.

    Raises:
        ScoreError: no prompt, or scores and lengths that differ in number.

    Source: Chen et al. 2024 (DICE), arXiv:2406.09760, and its code.
    """
    table, sizes = _padded(scores, lengths)
    best, smallest, before = 0.0, np.inf, np.inf
    for alpha in np.arange(GRID_STEPS + 1) / GRID_STEPS if grid is None else grid:
        gap = _length_gap(table, sizes, float(alpha))
        if gap > before:
            break
        if gap < smallest:
            best, smallest = float(alpha), gap
        before = gap
    return best


def _length_gap(scores: np.ndarray, lengths: np.ndarray, alpha: float) -> float:
    """Characters between the mean chosen and the mean rejected response at this α; (N, K), NaN where there is none."""
    values = length_penalised(scores, lengths, alpha)
    rows = np.arange(len(values))
    chosen, rejected = np.nanargmax(values, 1), np.nanargmin(values, 1)
    return abs(float(lengths[rows, chosen].mean() - lengths[rows, rejected].mean()))


def _padded(scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Both as (N, K) of the longest list; absent scores are NaN, absent lengths 0."""
    if not len(scores) or [len(own) for own in scores] != [len(own) for own in lengths]:
        raise ScoreError(f"scores of {len(scores)} prompts and lengths of {len(lengths)} do not belong together")
    table = np.full((len(scores), max(len(own) for own in scores)), np.nan)
    sizes = np.zeros_like(table)
    for row, (own, long) in enumerate(zip(scores, lengths, strict=True)):
        table[row, : len(own)], sizes[row, : len(own)] = own, long
    return table, sizes
