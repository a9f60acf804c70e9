"""Judges say which of two responses is the better one. Each pair is shown in both orders: a judge may like a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mlxpref.errors import ScoreError, UsageError
from mlxpref.records import Prompt
from mlxpref.rewards.scorer import Scorer, checked_numbers, score_all, scorer_name


class Judge(Protocol):
    """The probability that the response shown first is the better one: 0 to 1 for each prompt, ½ for a tie.

    Prompts come as they were asked by people, without a goal in them.
    """

    def __call__(
        self, prompts: Sequence[Prompt], shown_first: Sequence[str], shown_second: Sequence[str], /
    ) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one pair: the probability that the first side's response is the better one.

    Attributes:
        ahead: as found with the first side shown first.
        behind: as found with the first side shown second; a judge without a liking for places finds the same.
    """

    ahead: float
    behind: float

    @property
    def preference(self) -> float:
        """Mean of both orders: what a place adds in one it takes off in the other."""
        return (self.ahead + self.behind) / 2


def both_orders(judge: Judge, prompts: Sequence[Prompt], ones: Sequence[str], others: Sequence[str]) -> list[Verdict]:
    """Verdicts on these pairs.

    Args:
        ones, others: responses of the two sides, as many as prompts.

    Raises:
        ScoreError: not one number from 0 to 1 for each pair.
    """
    if not len(prompts) == len(ones) == len(others):
        raise ScoreError(f"{len(prompts)} prompts, {len(ones)} and {len(others)} responses: as many of each are needed")
    called = scorer_name(judge)
    ahead = checked_numbers(called, judge(prompts, ones, others), ones)
    turned = checked_numbers(called, judge(prompts, others, ones), ones)
    outside = [value for value in (*ahead, *turned) if not 0 <= value <= 1]
    if outside:
        raise ScoreError(f"{called} returned {outside[0]!r}; a judge returns a probability, 0 to 1, for each pair")
    return [Verdict(one, 1 - other) for one, other in zip(ahead, turned, strict=True)]


def by_score(
    scorer: Scorer, prompts: Sequence[Prompt], ones: Sequence[str], others: Sequence[str], *, tie: float = 0.0
) -> list[Verdict]:
    """The same of a scorer, which sees one response at a time and so knows no places: the higher score is preferred.

    Args:
        tie: scores no further apart are a tie.

    Raises:
        UsageError: ``tie`` is negative. ScoreError: as of ``score_all``.
    """
    if not tie >= 0:
        raise UsageError(f"a tie is a distance of scores, 0 or more, not {tie}")
    scores = score_all(scorer, [*prompts, *prompts], [*ones, *others])
    gaps = [one - other for one, other in zip(scores[: len(ones)], scores[len(ones) :], strict=True)]
    found = [0.5 if abs(gap) <= tie else float(gap > 0) for gap in gaps]
    return [Verdict(value, value) for value in found]
