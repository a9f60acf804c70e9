"""What an evaluation finds out: figures from the log-probs of responses, in float64.

Everything is taken from pairs of responses of one example of which one is preferred. An example's
figure is the mean over its pairs, a view's figure the mean over its examples, so that long lists do
not outvote pairs. Formulas: arXiv 2410.08067 (goals, unlearning), 2405.19534 (ranking accuracy).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCORE_BINS = 10
"""Of scores at most; data with as many different scores or fewer have one bin for each."""

Pair = tuple[int, int]
"""(preferred, dispreferred): places of two responses in the order of the source."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One example under one goal. Every tuple and array is in the order of the source's responses.

    Attributes:
        source: which example.
        pairs: preferred and dispreferred under this goal; at least one.
        policy, reference: (K,) float64 log-probs of whole responses, nats.
        lengths: (K,) scored tokens.
        own: responses whose own score is the goal; empty where that means nothing.
    """

    source: int
    pairs: tuple[Pair, ...]
    policy: np.ndarray
    reference: np.ndarray
    lengths: np.ndarray
    own: tuple[int, ...] = ()

    @property
    def log_ratios(self) -> np.ndarray:
        """(K,) policy − reference, nats."""
        return self.policy - self.reference

    def margin(self, pair: Pair) -> float:
        """Log-ratio of the preferred response − that of the other, nats."""
        preferred, other = pair
        return float(self.log_ratios[preferred] - self.log_ratios[other])


@dataclass(frozen=True, slots=True)
class Roles:
    """Which responses of an example are its chosen and rejected ones by the data, whatever the goal.

    Attributes:
        chosen: the best by score, or the first of unscored data.
        rejected: those the data hold to be worse.
        scores: (K,) in the units of the data, or None.
    """

    chosen: int
    rejected: tuple[int, ...]
    scores: tuple[float, ...] | None


def view_metrics(
    rows: Sequence[Judged], roles: Sequence[Roles], *, high_score: float | None, edges: Sequence[float]
) -> dict[str, Any]:
    """All figures of one view; JSON-safe, None where there is nothing to take a figure from.

    Args:
        rows: at most one row of an example and goal.
        roles: of every example, by ``Judged.source``.
        high_score: rejected responses that score at least this are reported apart.
        edges: inner edges of the score gap bins, rising; a gap on an edge belongs to the lower bin.
    """
    accuracy = _over_pairs(rows, lambda row, pair: float(row.margin(pair) > 0))
    margin = _over_pairs(rows, lambda row, pair: row.margin(pair))
    return {
        "rows": len(rows),
        "pairs": sum(len(row.pairs) for row in rows),
        "accuracy": _mean(accuracy),
        "accuracy_error": _standard_error(accuracy),
        "margin": _mean(margin),
        "margin_error": _standard_error(margin),
        "ranking_accuracy": _mean(_over_pairs(rows, lambda r, p: float(r.policy[p[0]] > r.policy[p[1]]))),
        "reference_ranking_accuracy": _mean(
            _over_pairs(rows, lambda r, p: float(r.reference[p[0]] > r.reference[p[1]]))
        ),
        "by_gap": _by_gap(rows, roles, edges),
        "change": _changes(rows, roles, high_score),
        "by_score": _by_score(rows, roles),
        "length": _length_bias(rows),
    }


def goal_sensitivity(rows: Sequence[Judged]) -> dict[str, Any]:
    """Mean of Δ_ij(goal = score of i) − Δ_ij(goal = score of j), nats, over pairs of responses.

    Δ_ij is the log-ratio of i − that of j. 0 for a model that does not read its goal. Exchanging i and
    j changes nothing, so no order of the two is needed.

    Args:
        rows: the conditioned halves; of each example one row a goal, with its ``own`` responses.
    """
    of_example: dict[int, dict[int, Judged]] = {}
    for row in rows:
        for response in row.own:
            of_example.setdefault(row.source, {})[response] = row
    values = []
    for goal_of in of_example.values():
        asked = sorted(goal_of)
        found = [
            goal_of[i].margin((i, j)) - goal_of[j].margin((i, j))
            for i in asked
            for j in asked
            if i < j and goal_of[i] is not goal_of[j]
        ]
        if found:
            values.append(math.fsum(found) / len(found))
    return {"mean": _mean(values), "error": _standard_error(values), "examples": len(values)}


def _over_pairs(rows: Sequence[Judged], figure: Callable[[Judged, Pair], float]) -> list[float]:
    """One figure a row: its mean over the row's pairs."""
    return [math.fsum(figure(row, pair) for pair in row.pairs) / len(row.pairs) for row in rows]


def _by_gap(rows: Sequence[Judged], roles: Sequence[Roles], edges: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy of the pairs (all counted alike) whose scores are so far apart, in units of the data."""
    bounds = [0.0, *edges, math.inf]
    right: list[list[float]] = [[] for _ in bounds[1:]]
    for row in rows:
        scores = roles[row.source].scores
        if scores is None:
            continue
        for pair in row.pairs:
            gap = abs(scores[pair[0]] - scores[pair[1]])
            bin_ = next(i for i, upper in enumerate(bounds[1:]) if gap <= upper)
            right[bin_].append(float(row.margin(pair) > 0))
    return [
        {
            "above": bounds[i],
            "to": bounds[i + 1] if math.isfinite(bounds[i + 1]) else None,
            "pairs": len(values),
            "accuracy": _mean(values),
        }
        for i, values in enumerate(right)
        if any(right)
    ]


def _changes(rows: Sequence[Judged], roles: Sequence[Roles], high_score: float | None) -> dict[str, dict[str, Any]]:
    """How much more probable the policy makes the responses than the reference does.

    Each is the mean over responses of the log-ratio (``sum``) and of log-ratio / tokens
    (``per_token``). Chosen and rejected are the data's, in every view.
    """
    found: dict[str, list[tuple[float, float]]] = {"chosen": [], "rejected": [], "high_score_rejected": []}
    for row in rows:
        role = roles[row.source]
        ratios = row.log_ratios
        both = [(float(ratio), float(ratio / n)) for ratio, n in zip(ratios, row.lengths, strict=True)]
        found["chosen"].append(both[role.chosen])
        found["rejected"] += [both[k] for k in role.rejected]
        if role.scores is not None and high_score is not None:
            found["high_score_rejected"] += [both[k] for k in role.rejected if role.scores[k] >= high_score]
    return {
        name: {
            "responses": len(values),
            "sum": _mean([whole for whole, _ in values]),
            "per_token": _mean([each for _, each in values]),
        }
        for name, values in found.items()
    }


def _by_score(rows: Sequence[Judged], roles: Sequence[Roles]) -> list[dict[str, Any]]:
    """The same change by what the data say of a response: of each score, or where there are more than ``SCORE_BINS``
    of as many bins of equally many responses. Scores rise; () without scores."""
    found = sorted(
        (score, float(ratio), float(ratio / n))
        for row in rows
        for score, ratio, n in zip(roles[row.source].scores or (), row.log_ratios, row.lengths, strict=False)
    )
    if not found:
        return []
    values = np.array(found)
    distinct, of = np.unique(values[:, 0], return_inverse=True)
    if len(distinct) > SCORE_BINS:
        edges = np.unique(np.quantile(values[:, 0], np.linspace(0, 1, SCORE_BINS + 1)[1:-1]))
        of = np.searchsorted(edges, values[:, 0], side="left")
    groups = [values[of == place] for place in np.unique(of)]
    return [
        {"score": float(s), "responses": len(group), "sum": float(whole), "per_token": float(each)}
        for group in groups for s, whole, each in [group.mean(0)]
    ]  # fmt: skip


def _length_bias(rows: Sequence[Judged]) -> dict[str, Any]:
    """Preferred − other in tokens, and its correlation with the margin, over all pairs alike."""
    pairs = [(row, pair) for row in rows for pair in row.pairs]
    longer = [float(row.lengths[i] - row.lengths[j]) for row, (i, j) in pairs]
    return {
        "difference": _mean(longer),
        "correlation": _correlation(longer, [row.margin(pair) for row, pair in pairs]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the spread of the values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return None
    dx, dy = (np.asarray(values) - np.mean(values) for values in (x, y))
    return float(dx @ dy) / math.sqrt(float(dx @ dx) * float(dy @ dy))
