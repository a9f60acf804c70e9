"""The recipe for a data set: its words chosen, its score maps fitted, once, on the training data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, OVERALL, SEED_TEMPLATE, Carrier, Recipe, label, raw_scores
from mlxpref.data.scale import IDENTITY, Range, ScoreMap, check_range, fit_map
from mlxpref.errors import ScoreError, UsageError
from mlxpref.records import Goal, Scored


def fit_recipe(
    examples: Sequence[Scored],
    *,
    template: str | None = None,
    carrier: Carrier = "system",
    score_range: Sequence[float] | None = None,
    goal_range: Sequence[float] | None = None,
    mapping: str = "auto",
    attributes: Sequence[str] = (),
    number_format: int | None = None,
    top_goal: Goal | None = None,
    called: str | None = None,
) -> Recipe:
    """The recipe for a data set; fit it on the training examples, once.

    Args:
        template: None is the seed's wording (with a line per attribute where there are some).
        score_range: the declared scale of the scores; with ``attributes``, of those.
        goal_range: the scale of the prompt; None is 1-10, or the score range if scores are taken
            as they are ("identity").
        mapping: as in :func:`mlxpref.data.scale.fit_map`.
        called: what the default template calls the one score, instead of "Overall score".

    Raises:
        ScoreError: there are no scores, or not the attributes asked for.
        UsageError: options that contradict each other.
    """
    declared = None if score_range is None else check_range("the score range", score_range)
    if mapping == "identity" and declared is not None:
        goal_range = declared if goal_range is None else goal_range
        if tuple(goal_range) != declared:
            raise UsageError(
                f"the identity leaves scores of {declared[0]:g}-{declared[1]:g} as they are, but the prompt "
                f"names {goal_range[0]:g}-{goal_range[1]:g}: make the ranges equal, or use affine"
            )
    goals = check_range("the goal range", goal_range or (1.0, 10.0))
    names = tuple(attributes)
    raw = [example.scores for example in examples if example.scores is not None]
    fit = partial(_fit, kind=mapping, goal_range=goals)
    maps = _attribute_maps(examples, names, fit, declared)
    return Recipe(
        template=template or (ATTRIBUTES_TEMPLATE if names else _seed_template(called)),
        carrier=carrier,
        score_range=declared,
        goal_range=goals,
        mapping=fit(raw, None if names else declared) if raw or not names else IDENTITY,
        number_format=number_format,
        top_goal=top_goal,  # type: ignore[arg-type]  # None: the upper end
        attributes=names,
        attribute_mappings=maps,
    )


def _seed_template(called: str | None) -> str:
    """The seed's wording, or the same of a score of another name. A brace in the name is no placeholder."""
    if called is None:
        return SEED_TEMPLATE
    return SEED_TEMPLATE.replace(label(OVERALL), called.replace("{", "{{").replace("}", "}}"))


def _fit(
    columns: Sequence[Sequence[float]], declared: Range | None, *, kind: str, goal_range: Range
) -> ScoreMap:
    low, high = declared or (-math.inf, math.inf)
    values = [v for column in columns for v in column if low <= v <= high]
    return fit_map(values, kind=kind, score_range=declared, goal_range=goal_range)


def _attribute_maps(
    examples: Sequence[Scored], names: Sequence[str], fit: Any, declared: Range | None
) -> dict[str, ScoreMap]:
    """One map for all attributes, which share a scale, unless mapped by rank; the overall score its own."""
    columns = {n: [c for e in examples if (c := raw_scores(e, n)) is not None] for n in names}
    missing = [name for name, found in columns.items() if not found]
    if missing:
        have = sorted({name for example in examples for name in example.attributes}) or ["none"]
        raise ScoreError(f"no attribute {', '.join(missing)} in the data; there is: {', '.join(have)}")
    shared = [c for name in names if name != OVERALL for c in columns[name]]
    by_rank = fit.keywords["kind"] == "quantile"
    return {
        name: fit(
            columns[name] if by_rank or name == OVERALL else shared, None if name == OVERALL else declared
        )
        for name in names
    }
