"""Figures of samples: the interval of a mean, and the correlation of ranks. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from mlxpref.records import Prompt

Interval = tuple[float, float]
"""Low and high end, in the units of what was measured."""


def mean_interval(
    scores: np.ndarray, prompts: Sequence[int], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval | None:
    """Bootstrap of the mean, whole prompts drawn with replacement, widened as ``expanded_interval`` does.

    Args:
        scores: (N,) of the samples.
        prompts: (N,) which prompt each answers. Samples of one prompt resemble each other, so drawing
            samples one by one would give too narrow an interval.

    Returns:
        Low and high end; None for fewer than two prompts.
    """
    scores = np.asarray(scores, np.float64)
    means = [scores[rows].mean() for rows in resampled(prompts, seed=seed, resamples=resamples)]
    return expanded_interval(np.array(means), len(set(prompts)), level=level)


def units_of(prompts: Sequence[Prompt]) -> list[int]:
    """For each prompt the place of the first that is equal to it: equal prompts are one draw of chance."""
    first: dict[tuple[tuple[str, str], ...], int] = {}
    return [first.setdefault(tuple((turn.role, turn.content) for turn in said), at) for at, said in enumerate(prompts)]


def resampled(prompts: Sequence[int], *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Places of samples, whole prompts drawn with replacement, once for each resample."""
    _, of = np.unique(np.asarray(prompts), return_inverse=True)
    order, ends = np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))
    groups = np.split(order, ends[:-1])
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.concatenate([groups[at] for at in rng.integers(len(groups), size=len(groups))])


def expanded_interval(values: np.ndarray, n: int, *, level: float = 0.95) -> Interval | None:
    """Percentile interval of a bootstrap over n units, as much wider as Student's t with n − 1 degrees of freedom and
    an unbiased variance ask for; None for fewer than two units.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician 69, section 4.
    """
    if n < 2:
        return None
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student((1 + level) / 2, n - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _student(p: float, degrees: int) -> float:
    """Quantile of Student's t, to 1 % from 3 degrees of freedom on: Cornish and Fisher's expansion."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, −1 to 1: Pearson's of the ranks, ties at their average rank.

    None where one side does not vary. ValueError if the two differ in length.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values against {len(y)}")
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return None
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(x), average_ranks(y)))
    return float(np.clip((a @ b) / math.sqrt(float(a @ a) * float(b @ b)), -1, 1))


def average_ranks(values: Sequence[float]) -> np.ndarray:
    """(N,) ranks from 1; equal values share the mean of the places they take."""
    _, of, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[of]
    return ranks
