"""The views of an example: what is asked of the policy, and what it should then prefer.

Each example is looked at in up to four views, all through the recipe that training used:

- ``chosen``: the goal is the best response's score, which should then be preferred;
- ``rejected``: the goal is another's score, which should then be preferred instead;
- ``top``: the goal is the recipe's highest;
- ``unconditioned``: no goal, as plain preference data.

Without a recipe there is the last one only; unscored data have no halves. A view in which nothing is
preferred to anything is left out: several attributes may tell responses apart whose overall scores tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlxpref.data.recipe import OVERALL, Recipe
from mlxpref.data.relabel import TIE, relabel, unconditioned
from mlxpref.data.scale import IDENTITY
from mlxpref.errors import DataError, ScoreError
from mlxpref.evaluate.measures import Pair, Roles
from mlxpref.records import Conditioned, Dropped, Goal, Scored

VIEWS = ("chosen", "rejected", "top", "unconditioned")
"""In the order they are shown."""


@dataclass(frozen=True, slots=True)
class View:
    """One row to look at: an example, with or without a goal.

    Attributes:
        name: one of ``VIEWS``.
        source: which example.
        row: what is asked, responses in the row's own order.
        order: place in the source of each of the row's responses.
        pairs, own: as in ``measures.Judged``.
    """

    name: str
    source: int
    row: Conditioned
    order: tuple[int, ...]
    pairs: tuple[Pair, ...]
    own: tuple[int, ...] = ()


def views_of(source: int, example: Scored, recipe: Recipe | None) -> tuple[View, ...] | Dropped:
    """The views of one example, or why it has none: nothing in it is preferred to anything."""
    if len(set(example.responses)) == 1:
        return Dropped("identical responses", example.example_id)
    views = [_view("unconditioned", source, example, unconditioned(example), preferences(example, recipe))]
    if recipe is not None:
        halves = relabel(example, recipe)
        if isinstance(halves, Dropped):
            return halves
        try:
            views.insert(0, _conditioned_view("top", source, example, _at_top(example, recipe), recipe))
        except DataError as error:
            return Dropped(str(error), example.example_id)
        given = [row for row in halves if row.half is not None]
        views = [*(_conditioned_view(str(row.half), source, example, row, recipe) for row in given), *views]
    kept = tuple(view for view in views if view.pairs)
    return kept or Dropped(TIE, example.example_id)


def _at_top(example: Scored, recipe: Recipe) -> Conditioned:
    assert recipe.top_goal is not None
    prompt, text = recipe.write(example.prompt, recipe.top_goal)
    return replace(unconditioned(example), prompt=prompt, goal=recipe.top_goal, goal_text=text)


def _view(
    name: str, source: int, example: Scored, row: Conditioned, liking: Sequence[float],
    own: tuple[int, ...] = (),
) -> View:  # fmt: skip
    places = range(len(example.responses))
    pairs = tuple(
        (i, j) for i in places for j in places if liking[i] > liking[j] and example.responses[i] != example.responses[j]
    )
    return View(name, source, row, _order(example, row), pairs, own)


def _conditioned_view(name: str, source: int, example: Scored, row: Conditioned, recipe: Recipe) -> View:
    """A row with a goal: a response is preferred when its own scores are nearer to it."""
    goals = recipe.goals(example)
    if goals is None or row.goal is None:
        return _view(name, source, example, row, preferences(example, recipe))
    asked = _as_vector(row.goal, recipe)
    # Rounded as relabelling does, so that float noise does not decide between two equal distances.
    far = [round(math.dist(asked, own) ** 2, 9) for own in goals]
    own = tuple(k for k, scores in enumerate(goals) if scores == asked) if name != "top" else ()
    return _view(name, source, example, row, [-distance for distance in far], own)


def _as_vector(goal: Goal, recipe: Recipe) -> tuple[float, ...]:
    return tuple(goal[name] for name in recipe.attributes) if isinstance(goal, Mapping) else (goal,)


def preferences(example: Scored, recipe: Recipe | None) -> Sequence[float]:
    """(K,) higher is preferred: scores (or a mean of attributes), else the order of the data."""
    if example.scores is not None:
        return example.scores
    try:
        scores = recipe.scores(example) if recipe is not None else None
    except ScoreError:  # relabelling drops the example for this, with the reason
        scores = None
    return scores if scores is not None else [-float(k) for k in range(len(example.responses))]


def _order(example: Scored, row: Conditioned) -> tuple[int, ...]:
    """Where each response of the row stands in the source; of equal texts any will do."""
    left = list(range(len(example.responses)))
    order = []
    for text in row.responses:
        k = next(k for k in left if example.responses[k] == text)
        left.remove(k)
        order.append(k)
    return tuple(order)


def roles_of(example: Scored, recipe: Recipe | None) -> Roles:
    liking = preferences(example, recipe)
    chosen = max(range(len(liking)), key=lambda k: liking[k])
    rejected = tuple(k for k in range(len(liking)) if liking[k] < liking[chosen])
    return Roles(chosen, rejected, example.scores)


# --- from relabelled rows back to examples ---


def restore(rows: Sequence[Conditioned], recipe: Recipe | None) -> list[Scored]:
    """The examples behind relabelled rows, each once, goals taken out of their prompts.

    Args:
        recipe: the one the rows were written with.

    Returns:
        Examples in the order they first occur. Their scores are in goal units, so ``in_goal_units``
        of a recipe belongs to them.
    """
    of_example: dict[str, Conditioned] = {}
    for row in rows:
        if row.example_id not in of_example or row.half == "chosen":
            of_example[row.example_id] = row
    return [
        Scored(
            prompt=row.prompt if recipe is None or row.goal is None else recipe.erase(row.prompt),
            responses=row.responses,
            scores=row.scores,
            example_id=row.example_id,
            attributes=row.attributes,
            extras=row.extras,
        )
        for row in of_example.values()
    ]


def in_goal_units(recipe: Recipe) -> Recipe:
    """The recipe for examples whose scores are goals already; attributes keep their maps."""
    maps = {name: IDENTITY if name == OVERALL else m for name, m in recipe.attribute_mappings.items()}
    return replace(recipe, mapping=IDENTITY, score_range=None, attribute_mappings=maps)
