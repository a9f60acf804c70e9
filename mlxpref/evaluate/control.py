"""Control: the policy is asked for several qualities, and a scorer says what it then achieved.

Prompts are the unit of chance: samples of one prompt go together wherever an error is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.data.recipe import Recipe, goal_words
from mlxpref.errors import UsageError
from mlxpref.evaluate.statistics import Interval, mean_interval, spearman, units_of
from mlxpref.generate import Answer, Question, ask_all, generate
from mlxpref.records import Goal
from mlxpref.report.pictures import Curve, Line, Point, draw_control_curve
from mlxpref.rewards.scorer import Scorer, score_all

VERSION = 1
"""Of the JSON that a control curve becomes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer and its score.

    Attributes:
        index: which of the prompts.
        goal: what was asked for; None: nothing.
        text: the answer.
        score: what the scorer says of it, in its units.
    """

    index: int
    goal: Goal | None
    text: str
    score: float

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        return {"index": self.index, "goal": _plain(self.goal), "text": self.text, "score": self.score}


@dataclass(frozen=True, slots=True)
class Achieved:
    """What was achieved at one goal, over its samples; scores in the units of the scorer.

    Attributes:
        goal: what was asked for; None: nothing.
        n: samples.
        prompts: different prompts among them.
        mean: of the scores.
        interval: 95 % of the mean, by resampling prompts; None for one prompt.
        deviation: standard deviation of the scores; None for one sample.
        spread: the 10 % and 90 % quantiles of the scores.
        top_share: share of scores at or above the given top; None if none was given.
        words: mean length of the texts in words.
        distinct: different texts / texts.
    """

    goal: Goal | None
    n: int
    prompts: int
    mean: float
    interval: Interval | None
    deviation: float | None
    spread: Interval
    top_share: float | None
    words: float
    distinct: float

    def as_record(self) -> dict[str, Any]:
        """JSON-safe; pairs become lists."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        pairs = {name: list(value) for name, value in record.items() if isinstance(value, tuple)}
        return {**record, **pairs, "goal": _plain(self.goal)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Achieved:
        """What ``as_record`` gave."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            value = record[field.name]
            found[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**found)


@dataclass(frozen=True, slots=True)
class ControlCurve:
    """What was achieved, goal by goal.

    Attributes:
        per_goal: in the order the goals were first asked for.
        spearman: rank correlation of goal and score over the samples that had a goal: one number, or
            one for each attribute of the goals; None where goals or scores do not vary.
        samples: all of them.
    """

    per_goal: tuple[Achieved, ...]
    spearman: float | Mapping[str, float | None] | None
    samples: tuple[Sample, ...]

    def as_record(self) -> dict[str, Any]:
        """The figures, JSON-safe. The samples have records of their own: they may be many."""
        spearman = dict(self.spearman) if isinstance(self.spearman, Mapping) else self.spearman
        return {
            "version": VERSION,
            "n": len(self.samples),
            "spearman": spearman,
            "per_goal": [achieved.as_record() for achieved in self.per_goal],
        }


def control_curve(
    questions: Sequence[Question], goals: Sequence[Goal | None], scorer: Scorer,
    backend: Any, policy: Any, tokenizer: Any, recipe: Recipe | None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    adapter: bool = True,
    n_samples: int = 1,
    top: float | None = None,
    resamples: int = 1000,
    on_progress: Callable[[int, int], None] | None = None,
    on_answers: Callable[[Sequence[Answer]], None] | None = None,
) -> ControlCurve:  # fmt: skip
    """Ask every question at every goal, and score what comes.

    Args:
        goals: what to ask for; None asks without a goal.
        scorer: gets the questions' own prompts, without goals, and the answers; called once.
        recipe: writes the goals; may be None where no goal is asked for.
        temperature, top_p, max_tokens, batch_size, adapter: as in ``generate``.
        seed: of the sampling and of the resampling.
        n_samples: answers to each question at each goal.
        top: a score; the share of answers that reach it is reported.
        resamples: for the intervals.
        on_progress: called with (answers there, answers wanted).
        on_answers: called with the answers of each batch as it is done: what a scorer refuses need not be lost.

    Raises:
        UsageError: no question, no goal, one goal twice, a goal off the recipe's scale, a number out
            of its range, or several samples at temperature 0, where they would all be the same.
        ScoreError: the scorer did not return one finite number for each answer.
    """
    _check(questions, n_samples, temperature)
    goals = _checked_goals(goals, recipe)
    asked = [one for one in ask_all(questions, goals, recipe, tokenizer) for _ in range(n_samples)]
    answers = generate(
        asked, backend, policy, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed,
        batch_size=batch_size, adapter=adapter, on_progress=on_progress, on_answers=on_answers,
    )  # fmt: skip
    prompts = [questions[answer.asked.index].prompt for answer in answers]
    scores = score_all(scorer, prompts, [answer.text for answer in answers])
    samples = [
        Sample(answer.asked.index, answer.asked.goal, answer.text, score)
        for answer, score in zip(answers, scores, strict=True)
    ]
    units = units_of([question.prompt for question in questions])
    return curve_of(samples, units=units, top=top, seed=seed, resamples=resamples)


def _check(questions: Sequence[Question], n_samples: int, temperature: float) -> None:
    if not questions:
        raise UsageError("a control curve needs prompts; there are none")
    if n_samples < 1:
        raise UsageError(f"n_samples is at least 1, not {n_samples}")
    if n_samples > 1 and temperature == 0:
        raise UsageError(f"at temperature 0 all {n_samples} samples of a prompt are the same; ask for 1, or sample")


def _checked_goals(goals: Sequence[Goal | None], recipe: Recipe | None) -> list[Goal | None]:
    """The goals as the recipe will write them."""
    if not goals:
        raise UsageError("a control curve needs goals; there are none (None asks without one)")
    written = [goal if goal is None or recipe is None else recipe.check_goal(goal) for goal in goals]
    seen: set[Any] = set()
    for goal in written:
        if _key(goal) in seen:
            raise UsageError(f"{goal_words(goal)} is asked for twice; each once is enough")
        seen.add(_key(goal))
    return written


def curve_of(
    samples: Sequence[Sample], *, units: Sequence[int] | None = None, top: float | None = None, seed: int = 0,
    resamples: int = 1000,
) -> ControlCurve:  # fmt: skip
    """The curve of samples that are there already, whoever drew them. Arguments as of ``achieved``."""
    per_goal = achieved(samples, units=units, top=top, seed=seed, resamples=resamples)
    return ControlCurve(tuple(per_goal), goal_correlation(samples), tuple(samples))


# --- figures ---


def achieved(
    samples: Sequence[Sample], *, units: Sequence[int] | None = None, top: float | None = None, seed: int = 0,
    resamples: int = 1000,
) -> list[Achieved]:  # fmt: skip
    """What was achieved at each goal, goals in the order they first occur.

    Args:
        units: for each prompt which ones it is drawn together with, as ``units_of`` finds them; by default each alone.
        top, seed, resamples: as in ``control_curve``.
    """
    if resamples < 1:
        raise UsageError(f"resamples is at least 1, not {resamples}")
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(_key(sample.goal), []).append(sample)
    return [_achieved(group, units, top, seed, resamples) for group in groups.values()]


def _achieved(
    group: Sequence[Sample], units: Sequence[int] | None, top: float | None, seed: int, resamples: int
) -> Achieved:
    scores = np.array([sample.score for sample in group], np.float64)
    prompts = [sample.index if units is None else units[sample.index] for sample in group]
    low, high = np.quantile(scores, [0.1, 0.9])
    return Achieved(
        goal=group[0].goal,
        n=len(group),
        prompts=len(set(prompts)),
        mean=math.fsum(scores) / len(group),
        interval=mean_interval(scores, prompts, seed=seed, resamples=resamples),
        deviation=float(scores.std(ddof=1)) if len(group) > 1 else None,
        spread=(float(low), float(high)),
        top_share=None if top is None else float((scores >= top).mean()),
        words=sum(len(sample.text.split()) for sample in group) / len(group),
        distinct=len({sample.text for sample in group}) / len(group),
    )


def goal_correlation(samples: Sequence[Sample]) -> float | dict[str, float | None] | None:
    """Spearman's correlation of goal and score, as ``ControlCurve.spearman`` holds it."""
    with_goal = [sample for sample in samples if sample.goal is not None]
    scores = [sample.score for sample in with_goal]
    goals: list[Any] = [sample.goal for sample in with_goal]
    if goals and isinstance(goals[0], Mapping):
        return {name: spearman([goal[name] for goal in goals], scores) for name in goals[0]}
    return spearman(goals, scores)


# --- towards a picture ---


def draw_record(record: Mapping[str, Any], file: Path) -> None:
    """Draw what ``mlxpref control --json`` wrote into a PNG or SVG file, by its ending.

    Raises:
        UsageError: another ending, or nothing to draw. RunError: the file cannot be written.
    """
    per_goal = [Achieved.from_record(one) for one in record["per_goal"] if one["goal"] is not None]
    recipe = Recipe.from_dict(record["recipe"])
    attribute = record["options"]["attribute"] or (recipe.attributes[0] if recipe.attributes else None)
    said = [f"{goal_words(one.goal)}: {one.mean:.1f}" for one in (*per_goal[:1], *per_goal[-1:])]
    base = (record["base"] or {}).get("per_goal", ())
    scorer = record["options"]["scorer"].rpartition(":")[2]
    draw_control_curve(
        [as_curve("policy", per_goal, attribute=attribute)], file,
        title=f"What is asked for, and what is achieved ({', '.join(said)})",
        lines=[Line("base, without a goal", one["mean"]) for one in base],
        scale=recipe.goal_range, as_asked=False, y_label=f"{scorer} of the responses",
    )  # fmt: skip


def as_curve(name: str, per_goal: Sequence[Achieved], *, attribute: str | None = None) -> Curve:
    """A curve to draw: the goals that are numbers, or one attribute of them, against what was achieved.

    Raises:
        UsageError: goals of several attributes without ``attribute``, or two goals at one place of the axis.
    """
    points = [
        Point(_on_axis(one.goal, attribute), one.mean, one.interval, one.spread)
        for one in per_goal
        if one.goal is not None
    ]
    if len({point.asked for point in points}) < len(points):
        raise UsageError(f"{name}: two goals have the same {attribute or 'value'}; draw them as two curves")
    return Curve(name, tuple(sorted(points, key=lambda point: point.asked)))


def _on_axis(goal: Goal, attribute: str | None) -> float:
    if not isinstance(goal, Mapping):
        return float(goal)
    if attribute is None or attribute not in goal:
        raise UsageError(f"goals have several attributes ({', '.join(goal)}); say which of them to draw")
    return float(goal[attribute])


def _key(goal: Goal | None) -> Any:
    """Hashable; equal for equal goals."""
    return tuple(sorted(goal.items())) if isinstance(goal, Mapping) else goal


def _plain(goal: Goal | None) -> Any:
    return dict(goal) if isinstance(goal, Mapping) else goal
