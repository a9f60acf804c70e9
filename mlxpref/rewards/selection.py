"""Which of K scored responses a pair, or a smaller list, is made of.

Randomness comes in as a generator: whoever calls decides what it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from mlxpref.errors import UsageError

Select = Literal["random", "max_random", "max_min", "max_max", "max_min_p"]

SELECTS: tuple[Select, ...] = get_args(Select)


class Pair(NamedTuple):
    """Places of two responses in their list, and how much higher the chosen one's score is (score units)."""

    chosen: int
    rejected: int
    margin: float


def select_pair(
    scores: Sequence[float],
    mode: Select,
    *,
    rng: np.random.Generator,
    lengths: Sequence[float] | None = None,
    penalty: float = 0.0,
) -> Pair | None:
    """A pair of K ≥ 2 scored responses, the better one chosen.

    Args:
        scores: K finite numbers, higher is better.
        mode: "random": two, drawn evenly; "max_random": the best and one of the others, drawn evenly;
            "max_min": the best and the worst; "max_max": the two best; "max_min_p": the highest and the
            lowest of score − penalty · length. Of equal scores the first in the list counts.
        rng: used by the random modes alone.
        lengths: K, in characters; for "max_min_p".
        penalty: λ ≥ 0, score units a character; for "max_min_p".

    Returns:
        Places, and the margin of the *scores*, which is negative where "max_min_p" preferred a shorter response
        to a better one. None if nothing prefers one to the other: their scores are equal.

    Raises:
        UsageError: fewer than two responses, an unknown mode, or no lengths where they are needed.

    Source: the selection modes of Online-RLHF (Dong et al. 2024, arXiv:2405.07863).
    """
    if mode not in SELECTS:
        raise UsageError(f"unknown selection {mode!r}; one of {', '.join(SELECTS)}")
    if len(scores) < 2:
        raise UsageError(f"a pair is selected from two responses or more, not {len(scores)}")
    ranked = [float(score) for score in scores]
    if mode == "max_min_p":
        if lengths is None or len(lengths) != len(scores) or not penalty >= 0:
            raise UsageError("max_min_p needs the length of each response, and a penalty of 0 or more")
        ranked = [score - penalty * length for score, length in zip(ranked, lengths, strict=True)]
    one, other = _places(ranked, mode, rng)
    if ranked[one] < ranked[other]:
        one, other = other, one
    margin = float(scores[one]) - float(scores[other])
    return None if margin == 0 or ranked[one] == ranked[other] else Pair(one, other, margin)


def _places(scores: Sequence[float], mode: Select, rng: np.random.Generator) -> tuple[int, int]:
    """Two different places in the list."""
    falling = sorted(range(len(scores)), key=lambda place: -scores[place])
    best, rest = falling[0], falling[1:]
    if mode == "random":
        one, other = rng.permutation(len(scores))[:2]
        return int(one), int(other)
    if mode == "max_random":
        return best, sorted(rest)[int(rng.integers(len(rest)))]
    if mode == "max_max":
        return best, rest[0]
    lowest = scores[falling[-1]]
    return best, next((place for place in sorted(rest) if scores[place] == lowest), rest[-1])


def rejection_sample(
    scores: Sequence[float], n: int, *, beta: float = 0.5, rng: np.random.Generator
) -> tuple[int, ...]:
    """Statistical rejection sampling (RSO): n of K responses as the optimal policy would have drawn them.

    Again and again one of the remaining responses is drawn evenly; it is accepted, and taken out, if
    u < exp((r − r_max)/β), with u uniform in [0, 1) and r_max the highest score still there.

    Args:
        scores: K finite numbers r, of responses drawn from the reference policy.
        n: how many to accept, ≥ 1; where K is smaller all are.
        beta: temperature in score units, ≥ 0. Infinity accepts whatever is drawn (plain sampling), 0 only the
            best that is left (the n best, in falling order).

    Returns:
        Places of the accepted responses, in the order they were accepted.

    Raises:
        UsageError: n or beta out of range.

    Source: Liu et al. 2023 (RSO), arXiv:2309.06657, Algorithm 1.
    """
    if n < 1 or not beta >= 0:
        raise UsageError(f"rejection sampling accepts 1 or more at a beta of 0 or more, not {n} at {beta:g}")
    left, accepted = list(range(len(scores))), list[int]()
    while left and len(accepted) < n:
        at = int(rng.integers(len(left)))
        below = scores[left[at]] - max(scores[place] for place in left)
        if rng.random() < _acceptance(below, beta):
            accepted.append(left.pop(at))
    return tuple(accepted)


def _acceptance(below: float, beta: float) -> float:
    """exp(below/β) for below ≤ 0, with its limits."""
    if beta == 0:
        return float(below == 0)
    return math.exp(below / beta)


def first_round_pairs(places: Sequence[int], scores: Sequence[float]) -> Iterator[Pair]:
    """Pairs of neighbours in a random order, as :func:`rejection_sample` gives it: the first with the second,
    the third with the fourth, …, the better one chosen; equal scores and a last one alone are left out.

    Source: the first-round ranking of RSO, arXiv:2309.06657.
    """
    for one, other in zip(places[::2], places[1::2], strict=False):
        margin = float(scores[one]) - float(scores[other])
        if margin:
            yield Pair(one, other, margin) if margin > 0 else Pair(other, one, -margin)
