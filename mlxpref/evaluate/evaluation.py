"""Evaluation: what a policy prefers, under the goals it was trained with and without any.

An example takes part in all its views or in none, so that views compare the same examples (but for
views that prefer nothing in it, see ``views``).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxpref.data.goal_template import check_states_none
from mlxpref.data.recipe import Recipe
from mlxpref.data.tokenization import tokenize
from mlxpref.errors import DataError
from mlxpref.evaluate.measures import Judged, Roles, goal_sensitivity, view_metrics
from mlxpref.evaluate.views import VIEWS, View, roles_of, views_of
from mlxpref.records import Counts, Dropped, Scored, Tokenized
from mlxpref.reference import ReferenceCounts, ReferenceStore, policy_logps, reference_logps

VERSION = 1
"""Of the JSON that an evaluation becomes."""

BY_DEFINITION = (
    "no adapter: the policy is its own reference, so every log-ratio is 0 by definition, and with it "
    "accuracy, margin, goal sensitivity and changes of log-prob; ranking accuracy and lengths are its own"
)

Report = Callable[[str, int, int], None]
"""Called with (what is computed, rows done, rows to do)."""


@dataclass(frozen=True, slots=True)
class EvaluatedRow:
    """One row of a view with its token log-probs: K arrays (n_k,) float32, nats."""

    view: View
    tokens: Tokenized
    policy: list[np.ndarray]
    reference: list[np.ndarray]

    def as_record(self) -> dict[str, Any]:
        """JSON-safe; lists over responses, best first under the row's goal."""
        goal = self.view.row.goal
        return {
            "example_id": self.tokens.example_id,
            "view": self.view.name,
            "goal": dict(goal) if isinstance(goal, Mapping) else goal,
            "prompt_ids": self.tokens.prompt_ids.tolist(),
            "response_ids": [ids.tolist() for ids in self.tokens.response_ids],
            "policy_logps": [_shortest(values) for values in self.policy],
            "reference_logps": [_shortest(values) for values in self.reference],
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found.

    Attributes:
        metrics: JSON-safe figures; None where there is nothing to take one from.
        rows: every row behind them.
        counts: examples kept and dropped here, with reasons.
        reference_counts: reference log-probs computed and reused.
    """

    metrics: dict[str, Any]
    rows: tuple[EvaluatedRow, ...]
    counts: Counts
    reference_counts: ReferenceCounts


def evaluate(
    examples: Sequence[Scored],
    backend: Any,
    policy: Any,
    tokenizer: Any,
    *,
    recipe: Recipe | None = None,
    has_adapter: bool = True,
    store: ReferenceStore | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: str = "cut",
    micro_batch_tokens: int = 8192,
    high_score: float | None = None,
    gap_edges: Sequence[float] | None = None,
    on_progress: Report | None = None,
) -> Evaluation:
    """Evaluate a policy against its reference.

    Args:
        examples: pairs or lists, scored or not.
        recipe: the one the policy was trained with; None looks at unconditioned rows only.
        has_adapter: False when the policy is the bare model, which then is its own reference.
        store: reference log-probs kept from training or an earlier evaluation.
        max_length, max_prompt_length, truncation: as in ``tokenize``; those of training.
        high_score: rejected responses scoring at least this (units of the data) are reported apart;
            by default the median score of the chosen ones.
        gap_edges: inner edges of the score gap bins (units of the data); by default 1, 2 and 4 points
            of a 1-10 scale, stretched to the scale of the data.

    Raises:
        UsageError: with a recipe, the tokenizer's chat template states a goal by itself.
        DataError: no example can be used.
        RunError: a log-prob is not finite, or the store cannot be written.
    """
    if recipe is not None:
        check_states_none(tokenizer)
    views, tokens, counts = _prepare(
        examples, recipe, tokenizer,
        max_length=max_length, max_prompt_length=max_prompt_length, truncation=truncation,
    )  # fmt: skip

    def report(what: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, total: on_progress(what, done, total)

    reference, reused = reference_logps(
        tokens, backend, policy, store,
        micro_batch_tokens=micro_batch_tokens, on_progress=report("reference"),
    )  # fmt: skip
    found = reference
    if has_adapter:
        found = policy_logps(
            tokens, backend, policy, micro_batch_tokens=micro_batch_tokens, on_progress=report("policy")
        )
    rows = tuple(map(EvaluatedRow, views, tokens, found, reference))
    roles = [roles_of(example, recipe) for example in examples]
    used = sorted({view.source for view in views})
    if high_score is None:
        high_score = _median_chosen([roles[source] for source in used])
    if gap_edges is None:
        gap_edges = _default_edges([roles[source] for source in used], recipe)
    return Evaluation(
        {
            "version": VERSION,
            "examples": len(used),
            "dropped": dict(counts.dropped),
            "cut": _cut(tokens),
            "has_adapter": has_adapter,
            "high_score": high_score,
            **_figures(rows, roles, high_score, gap_edges),
            "notes": [] if has_adapter else [BY_DEFINITION],
        },
        rows,
        counts,
        reused,
    )


def _prepare(
    examples: Sequence[Scored], recipe: Recipe | None, tokenizer: Any, **lengths: Any
) -> tuple[list[View], list[Tokenized], Counts]:
    """Rows of every example that can be used in all of its views."""
    views: list[View] = []
    tokens: list[Tokenized] = []
    counts = Counts()
    for source, example in enumerate(examples):
        found = views_of(source, example, recipe)
        if isinstance(found, Dropped):
            counts.drop(found)
            continue
        ids = _tokenize_views(found, tokenizer, lengths)
        if isinstance(ids, Dropped):
            counts.drop(ids)
            continue
        counts.kept += 1
        views += found
        tokens += ids
    if not views:
        reasons = "".join(f"\n  {line}" for line in counts.lines())
        raise DataError(f"none of {len(examples)} examples can be evaluated{reasons}")
    return views, tokens, counts


def _tokenize_views(views: Sequence[View], tokenizer: Any, lengths: Mapping[str, Any]) -> list[Tokenized] | Dropped:
    # Cut as in training, where the halves are cut together.
    goal_texts = {view.row.goal_text for view in views if view.row.half is not None and view.row.goal_text is not None}
    rows = []
    for view in views:
        row = tokenize(view.row, tokenizer, goal_texts=goal_texts, **lengths)
        if isinstance(row, Dropped):
            return row
        rows.append(row)
    return rows


def _figures(
    rows: Sequence[EvaluatedRow], roles: Sequence[Roles], high_score: float | None, edges: Sequence[float]
) -> dict[str, Any]:
    judged: dict[str, list[Judged]] = {name: [] for name in VIEWS}
    for row in rows:
        judged[row.view.name].append(_judge(row))
    return {
        "views": {
            name: view_metrics(of_view, roles, high_score=high_score, edges=edges)
            for name, of_view in judged.items()
            if of_view
        },
        "goal_sensitivity": goal_sensitivity([*judged["chosen"], *judged["rejected"]]),
    }


def _judge(row: EvaluatedRow) -> Judged:
    """Sums of token log-probs in float64, put into the order of the source."""
    back = np.argsort(row.view.order)

    def sums(logps: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([values.sum(dtype=np.float64) for values in logps])[back]

    lengths = np.array([len(ids) for ids in row.tokens.response_ids])[back]
    return Judged(row.view.source, row.view.pairs, sums(row.policy), sums(row.reference), lengths, row.view.own)


def _median_chosen(roles: Sequence[Roles]) -> float | None:
    scores = [role.scores[role.chosen] for role in roles if role.scores is not None]
    return statistics.median(scores) if scores else None


def _default_edges(roles: Sequence[Roles], recipe: Recipe | None) -> tuple[float, ...]:
    scores = [score for role in roles for score in role.scores or ()]
    if not scores:
        return ()
    declared = None
    if recipe is not None:
        declared = recipe.score_range or (recipe.goal_range if recipe.mapping.kind == "identity" else None)
    low, high = declared or (min(scores), max(scores))
    return tuple(float(f"{(high - low) / 9 * points:.2g}") for points in (1, 2, 4))


def _cut(rows: Sequence[Tokenized]) -> dict[str, int]:
    """Rows whose prompt, and rows of which a response, was cut to fit."""
    cut = Counter(
        what
        for row in rows
        for what, tokens in (("prompts", row.prompt_cut), ("responses", sum(row.response_cut)))
        if tokens
    )
    return {"rows": len(rows), "prompts": cut["prompts"], "responses": cut["responses"]}


def _shortest(values: np.ndarray) -> list[float]:
    """float32 numbers as the shortest decimals that give them back."""
    return [float(text) for text in values.astype(np.float32).astype(str)]
