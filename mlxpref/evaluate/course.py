"""The course of a run: what its checkpoints write, and how far from their reference they have gone.

A policy gets better at first as it leaves its reference, and worse where it goes on beyond what its data say
(over-optimisation). Source: Gao, Schulman and Hilton 2023, "Scaling laws for reward model overoptimization"
(arXiv 2210.10760); of direct alignment Rafailov et al. 2024 (arXiv 2406.02900).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlxpref.data.tokenization import tokenize
from mlxpref.evaluate.control import ControlCurve
from mlxpref.evaluate.statistics import Interval, mean_interval
from mlxpref.generate import Answer, Question
from mlxpref.records import Conditioned, Dropped, Tokenized
from mlxpref.reference import policy_logps, reference_logps

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
        nats: mean log-ratio of what it wrote, policy to reference, nats a response; sampled at temperature 1 an
            estimate of the KL divergence. None where nothing could be read.
        less_end: 99 % interval of its mean less the last checkpoint's, over the same prompts; None of that itself.
    """

    step: int
    mean: float
    interval: Interval | None
    nats: float | None
    less_end: Interval | None = None

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def course(
    found: Sequence[tuple[int, ControlCurve, float | None]], *, units: Sequence[int] | None = None, seed: int = 0
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
            less = mean_interval(apart, [units[index] if units else index for index in end], seed=seed, level=SURE)
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
    """log π(y|x) − log π_ref(y|x) of what was written, nats, x as it was asked; an answer of no tokens is left out.

    Args:
        questions: what was asked, by ``Asked.index``.

    Raises:
        RunError: a log-prob is not finite.
    """
    rows = [row for one in answers if isinstance(row := _row(one, questions, tokenizer), Tokenized)]
    own = policy_logps(rows, backend, policy)
    base, _ = reference_logps(rows, backend, policy, None)
    return [math.fsum(mine[0]) - math.fsum(its[0]) for mine, its in zip(own, base, strict=True)]


def _row(answer: Answer, questions: Sequence[Question], tokenizer: Any) -> Tokenized | Dropped:
    asked = answer.asked
    extras = {"tools": questions[asked.index].tools}
    row = Conditioned(asked.prompt, (answer.text,), asked.goal, None, None, None, f"answer {asked.index}", {}, extras)
    return tokenize(row, tokenizer, max_length=NO_LIMIT)
