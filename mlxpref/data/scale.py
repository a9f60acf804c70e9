"""From the scores of the data to the goals of the prompt.

A goal has to mean what its sentence says ("on a scale of 1-10"), so scores of another scale are
mapped: by a straight line, or by rank. A map is fitted once, on the training data, and then is a
value: it travels in the recipe, and training, evaluation and generation apply the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from mlxpref.data.words import counted
from mlxpref.errors import DataError, ScoreError, UsageError

MapKind = Literal["identity", "affine", "quantile"]
Range = tuple[float, float]

NEAR_TOP = 0.2
"""Scores nobody declared a scale for are on the goals' if the highest is within this share of their top."""

MAX_DECIMALS = 15
"""Most decimals a goal is written with: what a float64 holds."""

MAX_KNOTS = 101
"""A rank map keeps at most this many points: one a percentile."""


@dataclass(frozen=True, slots=True)
class ScoreMap:
    """A monotone map from scores to goals.

    Attributes:
        kind: how it was made; "identity" leaves a score as it is.
        knots: (score, goal) points, rising in the first; straight lines between them, constant
            beyond them. Empty for the identity.
        decimals: mapped goals are rounded to so many decimals, since they become text and a
            difference in the sixth digit is noise there. Not used by the identity.
    """

    kind: MapKind = "identity"
    knots: tuple[Range, ...] = ()
    decimals: int = 2

    def __post_init__(self) -> None:
        if self.kind not in get_args(MapKind):
            raise DataError(f"unknown score map {self.kind!r}; one of {', '.join(get_args(MapKind))}")
        if (self.kind == "identity") != (not self.knots):
            raise DataError(f"a score map of kind {self.kind} with {counted(len(self.knots), 'knot')}")
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(self.knots)):
            raise DataError(f"the knots of a score map must rise: {list(self.knots)}")

    def __call__(self, score: float) -> float:
        """The goal that stands for this score, in goal units."""
        if self.kind == "identity":
            return float(score)
        scores, goals = zip(*self.knots, strict=True)
        return round(float(np.interp(score, scores, goals)), self.decimals)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "knots": [list(knot) for knot in self.knots], "decimals": self.decimals}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ScoreMap:
        """The map that ``as_dict`` wrote. DataError if it is not one."""
        try:
            knots = tuple((float(score), float(goal)) for score, goal in fields["knots"])
            return cls(fields["kind"], knots, int(fields["decimals"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a score map: {dict(fields)!r} ({error})") from error


IDENTITY = ScoreMap()


def goal_decimals(goal_range: Range) -> int:
    """Decimals that cut the goal range into at least a hundred steps: 2 for 1-10, 3 for 0-1."""
    return max(0, 3 - math.ceil(math.log10(goal_range[1] - goal_range[0])))


def check_range(name: str, bounds: Sequence[float]) -> Range:
    """(low, high), finite and rising. UsageError otherwise, with what was given."""
    values = tuple(float(v) for v in bounds)
    if len(values) != 2 or not all(math.isfinite(v) for v in values) or values[0] >= values[1]:
        raise UsageError(f"{name} is two rising numbers, LOW HIGH; got {' '.join(map(str, bounds))}")
    return values[0], values[1]


def fit_map(scores: Sequence[float], *, kind: str, score_range: Range | None, goal_range: Range) -> ScoreMap:
    """Fit the map from these scores (of the training data) to the goal range.

    Args:
        scores: finite numbers, at least one.
        kind: "identity"; "affine": the score range (declared, else as seen) onto the goal range;
            "quantile": by rank, the lowest score seen to the low end, the highest to the high end;
            "auto": the identity if the declared scale is the goals', or, with none declared, the scores
            seen lie on it and reach nearly to its top (or are all one); else affine. Stars 1-5 are on
            1-10, and yet their best must not become a middling goal.
        score_range: the scale the scores are on, where it is known.
        goal_range: the scale the prompt names.

    Returns:
        A map; scores beyond a fitted range go to its end.

    Raises:
        ScoreError: there is nothing to fit: no scores, or all of them equal.
    """
    if not len(scores):
        raise ScoreError("no score to fit a map on: the data have none (name their columns with --columns)")
    seen = min(scores), max(scores)
    if kind == "auto":
        low, high = goal_range
        near_top = seen[1] > high - NEAR_TOP * (high - low) or seen[0] == seen[1]
        fills = low <= seen[0] and seen[1] <= high and near_top
        kind = "identity" if score_range == goal_range or (score_range is None and fills) else "affine"
    if kind == "identity":
        return IDENTITY
    decimals = goal_decimals(goal_range)
    if kind == "quantile":
        return ScoreMap("quantile", _rank_knots(scores, goal_range), decimals)
    if kind != "affine":
        raise UsageError(f"unknown mapping {kind!r}; one of auto, {', '.join(get_args(MapKind))}")
    source = score_range or seen
    if source[0] == source[1]:
        raise ScoreError(f"every score is {source[0]:g}: declare their scale with --score-range LOW HIGH")
    return ScoreMap("affine", ((source[0], goal_range[0]), (source[1], goal_range[1])), decimals)


def _rank_knots(scores: Sequence[float], goal_range: Range) -> tuple[Range, ...]:
    """Each distinct score at its mid-rank, stretched so that the ends meet the goal range's."""
    values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    if len(values) == 1:
        raise ScoreError(f"every score is {values[0]:g}: there are no ranks to map")
    ranks = np.cumsum(counts) - counts / 2
    share = (ranks - ranks[0]) / (ranks[-1] - ranks[0])
    if len(values) > MAX_KNOTS:
        keep = np.unique(np.searchsorted(share, np.linspace(0, 1, MAX_KNOTS)).clip(0, len(values) - 1))
        values, share = values[keep], share[keep]
    low, high = goal_range
    return tuple((float(v), float(low + (high - low) * s)) for v, s in zip(values, share, strict=True))
