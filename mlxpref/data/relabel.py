"""Reward relabelling: a scored example becomes examples that say which score is asked for.

With the goal-conditioned reward R(x, y, g) = -(g - s(y))², each distinct score g of an example
gives one conditioned example: g written into the prompt, the responses ordered best first by R.
For a pair these are its two halves: the chosen score in its own order, the rejected score with the
responses exchanged (arXiv 2410.08067; lists and several attributes are ours).

Pure: values in, new values out. Nothing is random but what a seed and the example's id decide, so
neither the order of the data nor the number of processes changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, TypeVar

from mlxpref.data.fitting import fit_recipe
from mlxpref.data.processes import cores, shared_out
from mlxpref.data.recipe import Recipe, resolve_carrier
from mlxpref.data.splitting import place_in_line, split_by_prompt
from mlxpref.data.stored import IN_MEMORY, blocks, pack, stored
from mlxpref.data.words import counted
from mlxpref.errors import DataError, ScoreError, UsageError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped, Goal, Half, Prompt, Scored

__all__ = [
    "Halves",
    "Recipe",
    "Ties",
    "fit_recipe",
    "relabel",
    "relabel_all",
    "resolve_carrier",
    "split_by_prompt",
    "unconditioned",
]

Halves = Literal["both", "chosen", "rejected"]
Ties = Literal["drop", "keep"]

TIE = "tie: equal scores"
SMALL_GAP = "score gap below min_gap"
OFF_SCALE = "score off the scale"

ASKED_FOR = frozenset({TIE, SMALL_GAP})
"""Reasons that are filters, not faults: ``strict`` leaves them alone."""

CHUNK = 256
"""Examples sent to a process at once."""

T = TypeVar("T")


# --- one example ---


def relabel(
    example: Scored,
    recipe: Recipe,
    *,
    halves: Halves = "both",
    ties: Ties = "drop",
    min_gap: float = 0.0,
    plain: bool = False,
) -> tuple[Conditioned, ...] | Dropped:
    """One conditioned example for each distinct score of a scored one.

    Under the goal g the responses stand by rising (g - s)², several attributes summed. Responses
    equally far from g, as two equal scores inside a list always are, keep the order of the source:
    nothing prefers one to the other there. A score counts as the prompt writes it, so two scores
    that are rounded to the same goal are equal.

    Args:
        halves: "chosen" keeps only the goal of the best response, "rejected" only the others.
            The best has the highest score (of several attributes without a score: the highest mean).
        ties: "drop" an example whose scores are all equal, since it states one goal with both
            orders; "keep" writes just that contradiction (a pair then gives both orders).
        min_gap: drop an example whose widest distance between two responses' scores (goal units,
            Euclidean over attributes) is smaller.
        plain: write the example once, without a goal, instead.

    Returns:
        The half of the best response first, the others by falling score; or why there is none.
        An unscored example passes through without a goal.
    """
    try:
        goals, scores = recipe.goals(example), recipe.scores(example)
        if goals is None or scores is None:
            return (unconditioned(example),)
        spread = [(score,) for score in scores] if plain else goals
        gap = max(math.dist(a, b) for a, b in combinations(spread, 2))
        if gap == 0 and ties == "drop":
            return Dropped(TIE, example.place)
        if gap < min_gap:
            return Dropped(SMALL_GAP, example.place, f"{gap:g} < {min_gap:g}")
        falling = _falling(scores)
        if plain:
            return (_arrange(_Row(example, scores), example.prompt, falling),)
        orders = _orders(goals, falling)
        return tuple(
            _condition(_Row(example, scores), recipe, order) for order in orders if halves in ("both", order.half)
        )
    except ScoreError as error:
        return Dropped(OFF_SCALE, example.place, str(error))
    except DataError as error:
        return Dropped(str(error), example.place)


def unconditioned(example: Scored) -> Conditioned:
    """The example without a goal, for plain training: best first by score, ties in the order of the
    data; unscored responses in the order of the data. Scores keep the units of the data."""
    order = _falling(example.scores) if example.scores is not None else tuple(range(len(example.responses)))
    return _arrange(_Row(example, example.scores), example.prompt, order)


@dataclass(frozen=True, slots=True)
class _Row:
    """An example and its scores in the units they will be written in."""

    example: Scored
    scores: tuple[float, ...] | None


def _falling(scores: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(scores)), key=lambda i: -scores[i]))


@dataclass(frozen=True, slots=True)
class _Order:
    """A goal; places in the source of the responses under it; squared distances (K,) to it, so placed."""

    goal: tuple[float, ...]
    places: tuple[int, ...]
    distances: tuple[float, ...]
    half: Half


def _orders(goals: Sequence[tuple[float, ...]], falling: Sequence[int]) -> Iterator[_Order]:
    """The order under each distinct goal, the best response's first.

    Only a tie that is kept has one goal; its halves are its two orders."""
    distinct = list(dict.fromkeys(goals[i] for i in falling))
    for goal in distinct:
        # Rounded, so that float noise does not decide between two equal distances.
        far = [round(math.dist(goal, own) ** 2, 9) for own in goals]
        order = tuple(sorted(range(len(goals)), key=far.__getitem__))
        yield _Order(goal, order, tuple(sorted(far)), "chosen" if goal == goals[falling[0]] else "rejected")
    if len(distinct) == 1:
        yield _Order(distinct[0], tuple(reversed(falling)), (0.0,) * len(goals), "rejected")


def _condition(row: _Row, recipe: Recipe, order: _Order) -> Conditioned:
    several = bool(recipe.attributes)
    goal: Goal = dict(zip(recipe.attributes, order.goal, strict=True)) if several else order.goal[0]
    prompt, text = recipe.write(row.example.prompt, goal)
    found = _arrange(row, prompt, order.places, goal, text, order.half)
    return replace(found, distances=order.distances) if several else found


def _arrange(
    row: _Row,
    prompt: Prompt,
    order: Sequence[int],
    goal: Goal | None = None,
    goal_text: str | None = None,
    half: Half | None = None,
) -> Conditioned:
    """Everything that belongs to a response, in the order of the responses."""

    def arranged(values: Sequence[T]) -> tuple[T, ...]:
        return tuple(values[i] for i in order)

    example = row.example
    return Conditioned(
        prompt=prompt,
        responses=arranged(example.responses),
        goal=goal,
        goal_text=goal_text,
        half=half,
        scores=None if row.scores is None else arranged(row.scores),
        example_id=example.example_id,
        attributes={name: arranged(values) for name, values in example.attributes.items()},
        extras={
            name: arranged(v) if per_response(v, len(order)) else v for name, v in example.extras.items()
        },
        where=example.where,
    )


def per_response(value: Any, n_responses: int) -> bool:
    """An extra that is a tuple has one entry a response; a list (``tools``) belongs to the prompt."""
    return isinstance(value, tuple) and len(value) == n_responses


# --- a data set ---


def relabel_all(
    examples: Sequence[Scored],
    recipe: Recipe,
    *,
    halves: Halves = "both",
    ties: Ties = "drop",
    min_gap: float = 0.0,
    plain_share: float = 0.0,
    seed: int = 0,
    strict: bool = False,
    num_proc: int | None = None,
) -> tuple[Sequence[Conditioned], Counts]:
    """Relabel every example, in order; the halves of one stand together.

    Args:
        plain_share: this share of the examples, drawn by the seed and their ids, is written once
            without a goal instead (1: plain preference data).
        strict: an example that cannot be used is a DataError; ties and small gaps, which were asked
            to be dropped, are not.
        num_proc: processes; the result is the same for any number. None: one a core for many examples, else one.

    Returns:
        The conditioned examples, and counts of the *examples* kept and dropped. Of some thousands of examples a
        list; what becomes of more lies on disk, and is read when it is asked for.
    """
    check_options(halves=halves, ties=ties, min_gap=min_gap, plain_share=plain_share, num_proc=num_proc)
    plain = _drawn((example.example_id for example in examples), plain_share, seed)
    work = _Work(recipe, {"halves": halves, "ties": ties, "min_gap": min_gap})
    marked = blocks(((example, example.example_id in plain) for example in examples), CHUNK)
    many = len(examples) > IN_MEMORY
    asked = (cores() if many else 1) if num_proc is None else num_proc
    told = shared_out(_Packed(work) if many else work, marked, min(asked, math.ceil(len(examples) / CHUNK)))
    counts = Counts()
    problems: list[str] = []

    def heard() -> Iterator[Any]:
        for rows, kept, dropped in told:
            counts.kept += kept
            for result in dropped:
                counts.drop(result)
                if strict and result.reason not in ASKED_FOR:
                    problems.append(f"{result.where}: {result.detail or result.reason}")
            yield rows

    rows: Sequence[Conditioned]
    with closing(told):
        rows = stored(heard()) if many else [row for own in heard() for row in own]
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise_all(problems[:5] + more, DataError, f"{counted(len(problems), 'example')} cannot be relabelled:")
    return rows, counts


def check_options(
    *,
    halves: str = "both",
    ties: str = "drop",
    min_gap: float = 0.0,
    plain_share: float = 0.0,
    num_proc: int | None = None,
) -> None:
    """UsageError listing every option out of its values."""
    problems = []
    if halves not in ("both", "chosen", "rejected"):
        problems.append(f"halves: {halves!r}; one of both, chosen, rejected")
    if ties not in ("drop", "keep"):
        problems.append(f"ties: {ties!r}; one of drop, keep")
    if not 0 <= min_gap < math.inf:
        problems.append(f"min_gap: {min_gap}; a distance of scores, 0 or more")
    if not 0 <= plain_share <= 1:
        problems.append(f"plain_share: {plain_share}; a share, 0 to 1")
    if num_proc is not None and num_proc < 1:
        problems.append(f"num_proc: {num_proc}; at least 1")
    raise_all(problems, UsageError, "relabelling was asked for what it does not do:")


@dataclass(frozen=True, slots=True)
class _Work:
    """Relabels some examples, each with whether it is to be plain: their rows, how many were kept, the others."""

    recipe: Recipe
    options: Mapping[str, Any]

    def __call__(self, marked: Sequence[tuple[Scored, bool]]) -> tuple[Any, int, list[Dropped]]:
        rows: list[Conditioned] = []
        dropped: list[Dropped] = []
        for example, plain in marked:
            result = relabel(example, self.recipe, plain=plain, **self.options)
            if isinstance(result, Dropped):
                dropped.append(result)
            else:
                rows += result
        return rows, len(marked) - len(dropped), dropped


@dataclass(frozen=True, slots=True)
class _Packed:
    """The same work, whose rows come as a block for the disk."""

    work: _Work

    def __call__(self, marked: Sequence[tuple[Scored, bool]]) -> tuple[Any, int, list[Dropped]]:
        rows, kept, dropped = self.work(marked)
        return pack(rows), kept, dropped


def _drawn(ids: Iterable[str], share: float, seed: int) -> frozenset[str]:
    if share == 0:
        return frozenset()
    distinct = sorted(set(ids), key=lambda example_id: place_in_line(seed, f"plain:{example_id}"))
    return frozenset(distinct[: round(share * len(distinct))])
