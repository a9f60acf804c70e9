"""What every run of a sweep is measured by, whatever it minimised.

The log-probs of the finished adapter on the validation rows are compared with those of the model without an
adapter, so that figures of objectives with and without a reference, and of any β, mean the same. Where a
scorer is given, answers to prompts are scored, too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.config import Config
from mlxpref.data.recipe import Recipe
from mlxpref.data.splitting import place_in_line
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import UsageError
from mlxpref.evaluate.control import ControlCurve, Sample, control_curve
from mlxpref.evaluate.measures import Judged, goal_sensitivity
from mlxpref.generate import Question, parse_goal, read_questions
from mlxpref.records import Goal, Tokenized
from mlxpref.reference import ReferenceStore, policy_logps, reference_logps
from mlxpref.rewards.scorer import Scorer, load_scorer

Progress = Callable[[str, int, int], None]
"""Called with (what is computed, how many are done, of how many)."""

Logps = Sequence[Sequence[np.ndarray]]
"""For each row K arrays (n_k,) of token log-probs, nats."""


# --- log-probs ---


def rows_to_measure(rows: Sequence[Tokenized], most: int | None, *, seed: int) -> list[Tokenized]:
    """All rows, or those of so many examples, drawn by the seed and their ids, that ``most`` is reached."""
    if most is None or most >= len(rows):
        return list(rows)
    of: dict[str, int] = {}
    for row in rows:
        of[row.example_id] = of.get(row.example_id, 0) + 1
    chosen: set[str] = set()
    for name in sorted(of, key=lambda example_id: place_in_line(seed, f"measure:{example_id}")):
        if sum(of[one] for one in chosen) >= most:
            break
        chosen.add(name)
    return [row for row in rows if row.example_id in chosen]


def measure(
    rows: Sequence[Tokenized], backend: Any, policy: Any, config: Config, *, on_progress: Progress
) -> dict[str, Any]:
    """Figures of a policy's preferences between the responses of rows; see :func:`figures`.

    Raises:
        RunError: a log-prob is not finite, or the store cannot be written.
    """
    rows = [replace(row, texts={}, leads=row.leads[: len(row.response_ids)]) for row in rows]
    store = ReferenceStore(Path(str(config.reference.store)), policy.fingerprint)
    tokens = config.batching.budget
    reference, _ = reference_logps(
        rows, backend, policy, store, micro_batch_tokens=tokens,
        on_progress=lambda done, total: on_progress("reference", done, total),
    )  # fmt: skip
    found = policy_logps(
        rows, backend, policy, micro_batch_tokens=tokens,
        on_progress=lambda done, total: on_progress("measuring", done, total),
    )  # fmt: skip
    return figures(rows, found, reference)


def figures(rows: Sequence[Tokenized], policy: Logps, reference: Logps) -> dict[str, Any]:
    """Means over rows; None where there is nothing to take one from.

    Args:
        rows: responses best first under each row's goal; of unconditioned rows, by the data.

    Returns:
        ``rows``; ``accuracy``, the share of pairs (best, other) whose best response gained more log-prob than the
        other; ``margin``, by how much, nats; ``ranking_accuracy``, the share whose best response is the likelier
        one; ``chosen`` and ``rejected``, the change of log-prob of the best and of the other responses, nats a
        response; ``sensitivity``, how far goals turn the margin (``goal_sensitivity``), nats.
    """
    ranked, found = [], []
    for row, own, other in zip(rows, policy, reference, strict=True):
        sums, base = _sums(own), _sums(other)
        ratios, worse = sums - base, _worse(row)
        if not worse:
            continue
        rest = ratios[worse]
        won = (ratios[0] > rest).mean()
        found.append((won, ratios[0] - rest.mean(), (sums[0] > sums[worse]).mean(), ratios[0], rest.mean()))
        ranked.append((row, sums, base))
    names = ("accuracy", "margin", "ranking_accuracy", "chosen", "rejected")
    means = [math.fsum(column) / len(found) for column in zip(*found, strict=True)] if found else [None] * len(names)
    told = goal_sensitivity(list(_judged(ranked)))
    return {"rows": len(found), **dict(zip(names, means, strict=True)), "sensitivity": told["mean"]}


def _sums(logps: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([values.sum(dtype=np.float64) for values in logps])


def _worse(row: Tokenized) -> list[int]:
    """Responses to which the first is preferred; equals are left out."""
    places = range(1, len(row.response_ids))
    distances = row.extras.get("goal_distances")
    if distances is not None:
        return [k for k in places if distances[k] > distances[0]]
    if row.goal is None and row.scores is not None:
        return [k for k in places if row.scores[k] < row.scores[0]]
    return list(places)


def _judged(ranked: Sequence[tuple[Tokenized, np.ndarray, np.ndarray]]) -> Iterator[Judged]:
    """Conditioned rows with their responses in one order for all goals of an example."""
    first: dict[str, list[bytes]] = {}
    sources: dict[str, int] = {}
    for row, sums, base in ranked:
        names = [ids.tobytes() for ids in row.response_ids]
        order = first.setdefault(row.example_id, names)
        if row.goal is None or sorted(order) != sorted(names) or len(set(names)) < len(names):
            continue  # without a goal there is nothing to hear; cut differently, nothing to compare
        places = [order.index(name) for name in names]
        back = np.argsort(places)
        lengths = np.array([len(ids) for ids in row.response_ids])
        pairs = tuple((places[0], place) for place in places[1:])
        source = sources.setdefault(row.example_id, len(sources))
        yield Judged(source, pairs, sums[back], base[back], lengths[back], own=(places[0],))


# --- answers ---


@dataclass(frozen=True, slots=True)
class Asking:
    """Prompts every finished adapter answers, and who scores the answers.

    Attributes:
        goals: what conditioned adapters are asked for beside their top goal, as on a command line.
        samples: answers to each prompt at each goal.
        about: what makes two askings the same, JSON-safe; goes into the results.
    """

    scorer: Scorer
    questions: tuple[Question, ...]
    goals: tuple[str, ...]
    samples: int
    max_tokens: int
    temperature: float
    about: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()


def asking(
    scorer: str, prompts: Path, *, goals: Sequence[str] = (), samples: int = 1, max_tokens: int = 256,
    temperature: float = 0.0,
) -> Asking:  # fmt: skip
    """What to ask, read and checked.

    Raises:
        UsageError: no such scorer, or numbers that cannot be. DataError: the prompts cannot be read.
    """
    if samples < 1 or max_tokens < 1 or temperature < 0:
        raise UsageError("--samples and --max-tokens are at least 1, and --temperature is not negative")
    if samples > 1 and temperature == 0:
        raise UsageError(f"--samples {samples} at --temperature 0 would all be the same; raise it, or take one")
    found = load_scorer(scorer)
    about = {
        "scorer": scorer,
        "scorer_file": _source_digest(found),
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts.is_file() else None,
        "goals": list(goals),
        "samples": samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    return Asking(found, tuple(read_questions(prompts)), tuple(goals), samples, max_tokens, temperature, about)


def _source_digest(scorer: Any) -> str | None:
    """Of the file the scorer is written in; None where that cannot be told."""
    try:
        file = inspect.getsourcefile(scorer if inspect.isroutine(scorer) else type(scorer))
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def goals_for(asked: Asking, recipe: Recipe | None) -> list[Goal | None]:
    """The top goal first, then the others; without a recipe None alone.

    Raises:
        UsageError: a goal that is not on the recipe's scale.
    """
    if recipe is None:
        return [None]
    goals: list[Goal | None] = [recipe.top_goal]
    for text in asked.goals:
        goal = parse_goal(text, recipe)
        if goal not in goals:
            goals.append(goal)
    return goals


def answer(
    asked: Asking, recipe: Recipe | None, backend: Any, policy: Any, *, seed: int, on_progress: Progress
) -> tuple[dict[str, Any], tuple[Sample, ...]]:
    """Scores of a policy's answers, and the answers.

    Returns:
        ``score``, the mean at the top goal, or without goals; with several goals ``range``, the mean at the
        highest asked for less that at the lowest, and ``spearman``, of goal and score; ``per_goal``; all samples.

    Raises:
        ScoreError: the scorer did not return one finite number for each answer.
    """
    goals = goals_for(asked, recipe)
    curve = control_curve(
        asked.questions, goals, asked.scorer, backend, policy, load_tokenizer(str(policy.path)), recipe,
        temperature=asked.temperature, max_tokens=asked.max_tokens, n_samples=asked.samples, seed=seed,
        on_progress=lambda done, total: on_progress("answers", done, total),
    )  # fmt: skip
    return _summary(curve), curve.samples


def _summary(curve: ControlCurve) -> dict[str, Any]:
    means = {one.goal: one.mean for one in curve.per_goal if isinstance(one.goal, int | float)}
    several = len(means) > 1
    spearman = curve.spearman if isinstance(curve.spearman, float) else None
    return {
        "score": curve.per_goal[0].mean,
        "range": means[max(means)] - means[min(means)] if several else None,
        "spearman": spearman if several else None,
        "per_goal": [one.as_record() for one in curve.per_goal],
    }
