"""The course of a run: what its checkpoints write, and how far from their reference they have gone.

A policy gets better at first as it leaves its reference, and worse where it goes on beyond what its data say
(over-optimisation). Source: Gao, Schulman and Hilton 2023, "Scaling laws for reward model overoptimization"
(arXiv 2210.10760); of direct alignment Rafailov et al. 2024 (arXiv 2406.02900).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlxpref.data.tokenization import tokenize
from mlxpref.evaluate.control import ControlCurve
from mlxpref.evaluate.statistics import Interval, mean_interval
from mlxpref.generate import Answer, Question
from mlxpref.records import Conditioned, Dropped, Tokenized
from mlxpref.reference import policy_logps, reference_logps

ENOUGH = 20
"""Different prompts from which a bootstrap's interval at that level may be trusted."""

NO_LIMIT = 1 << 24
"""Tokens: what was written is read whole."""

SURE = 0.99
"""Level of the interval of a difference to the end: the best of several checkpoints looks better than it is."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one checkpoint achieves, asked for its best.

    Attributes:
        step: updates behind it.
        mean: of the scores, in the scorer's units, and its 95 % interval; None for one prompt.
        nats: mean log-ratio of what it wrote, policy to base, nats a response; sampled at temperature 1 an estimate of
            the KL divergence, the end of the turn left out.
        less_end: 99 % interval of its mean less the last checkpoint's, over the same prompts; None of that itself,
            and where prompts are fewer than ``ENOUGH``.
    """

    step: int
    mean: float
    interval: Interval | None
    nats: float
    less_end: Interval | None = None

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def course(
    found: Sequence[tuple[int, ControlCurve, float]], *, units: Sequence[int] | None = None, seed: int = 0
) -> list[Stage]:
    """Stages by rising step.

    Args:
        found: of each checkpoint its step, its curve at one goal or none, and its distance in nats. All were asked
            the same prompts, as often.
        units: for each prompt which ones it is drawn together with, as ``units_of`` finds them; by default each alone.
        seed: of the resampling.
    """
    ordered = sorted(found, key=lambda one: one[0])
    end = _by_prompt(ordered[-1][1])
    stages = []
    for place, (step, curve, nats) in enumerate(ordered):
        (asked,) = curve.per_goal
        own, less = _by_prompt(curve), None
        if place < len(ordered) - 1:
            apart = np.array([own[index] - end[index] for index in end])
            prompts = [units[index] if units else index for index in end]
            enough = len(set(prompts)) >= ENOUGH
            less = mean_interval(apart, prompts, seed=seed, level=SURE) if enough else None
        stages.append(Stage(step, asked.mean, asked.interval, nats, less))
    return stages


def _by_prompt(curve: ControlCurve) -> dict[int, float]:
    """Mean score of each prompt's samples."""
    found: dict[int, list[float]] = {}
    for sample in curve.samples:
        found.setdefault(sample.index, []).append(sample.score)
    return {index: sum(scores) / len(scores) for index, scores in found.items()}


def log_ratios(
    answers: Sequence[Answer], questions: Sequence[Question], backend: Any, policy: Any, tokenizer: Any
) -> list[float]:
    """log π(y|x) − log π_ref(y|x) of each text, nats, x as it was asked, π_ref without an adapter.

    The end of the turn is left out, since one that was cut has none: a text of no tokens has 0.

    Args:
        questions: what was asked, by ``Asked.index``.

    Raises:
        RunError: a log-prob is not finite.
    """
    read = [_row(one, questions, tokenizer) for one in answers]
    rows = [row for row in read if isinstance(row, Tokenized)]
    own = policy_logps(rows, backend, policy)
    base, _ = reference_logps(rows, backend, policy, None)
    ends = set(tokenizer.all_special_ids)
    found = iter(
        math.fsum(mine[0][:n]) - math.fsum(its[0][:n])
        for row, mine, its in zip(rows, own, base, strict=True)
        for n in [_without_end(row.response_ids[0].tolist(), ends)]
    )
    return [next(found) if isinstance(row, Tokenized) else 0.0 for row in read]


def _without_end(ids: list[int], ends: Collection[int]) -> int:
    """How many tokens stand before the last special ones."""
    n = len(ids)
    while n and ids[n - 1] in ends:
        n -= 1
    return n


def _row(answer: Answer, questions: Sequence[Question], tokenizer: Any) -> Tokenized | Dropped:
    asked = answer.asked
    extras = {"tools": questions[asked.index].tools}
    row = Conditioned(asked.prompt, (answer.text,), asked.goal, None, None, None, f"answer {asked.index}", {}, extras)
    return tokenize(row, tokenizer, max_length=NO_LIMIT)
