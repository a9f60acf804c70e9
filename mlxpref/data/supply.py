"""What an objective needs and the rows have, or can be made to have; and what is wrong where they cannot.

Works on conditioned rows, before anything is tokenized. Derived here: ``win_rates`` and ``attributes`` under the
row's goal, and ``groups`` as indices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxpref.data.columns import MADE_BY_STEPS, goal_distances, text_of_column, unusable, width_of
from mlxpref.data.drafts import OWN_TEXTS, as_number
from mlxpref.data.recipe import OVERALL, Recipe
from mlxpref.data.relabelled import RelabelledRows
from mlxpref.data.stored import Joined, gather
from mlxpref.data.words import counted
from mlxpref.errors import DataError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped
from mlxpref.rewards.comparisons import win_rates

Rows = Sequence[Conditioned] | RelabelledRows
"""Rows that can be gone through again and again."""

Splits = Mapping[str, Rows]

COMPUTED = " (`mlxpref columns` computes it)"
REMEDIES = {
    "aligned_logps": "give each response its mean log-prob per token under the aligned models, as a list "
    "aligned_logps, or in pairs as aligned_logps_chosen and aligned_logps_rejected" + COMPUTED,
    "attributes": "give each response further scores, in pairs as NAME_chosen and NAME_rejected",
    "confidence": "give each example a number confidence, 0 to 1 (for cream `mlxpref columns` computes it)",
    "gold": "give each example a text gold, a response that is right",
    "groups": "give each example a text or number group",
    "instructions": "give data whose pairs have a prompt each: the columns i_chosen, r_chosen, i_rejected, r_rejected",
    "margin_rewards": "give each response the rewards of the other objectives, as a list margin_rewards, or in "
    "pairs as margin_rewards_chosen and margin_rewards_rejected" + COMPUTED,
    "previous": "give each response its log-prob under the previous policy, as a list previous, or in pairs as "
    "previous_chosen and previous_rejected" + COMPUTED,
    "rationale": "give each example a text rationale: why the better response is better",
    "scores": "give data whose responses are scored, in pairs as score_chosen and score_rejected",
    "third": "give each example a text third, one more response to its prompt" + COMPUTED,
    "token_weights": 'give each response a list token_weights of pieces {"text", "weight"}, in pairs as '
    "token_weights_chosen and token_weights_rejected",
    "win_rates": "give each response a number win_rates, or data whose responses are scored",
}
"""By column, what a user does who lacks it."""

ONE_NUMBER = (
    "a goal that is one number says nothing of other scores: name them in relabel.attributes, or leave goals out"
)
TWO_PROMPTS = "belongs to one prompt, and the responses have two"
JOINT_GOAL = "their responses have a prompt each, and a goal is written into one: leave the section relabel out"


@dataclass(frozen=True, slots=True)
class Supplied:
    """Rows with every column that was asked for.

    Attributes:
        splits: as given, less the rows with a value that cannot be used.
        groups: the distinct groups; their places are the column ``groups``. () if it was not asked for.
        counts: rows kept and dropped, of each split that lost some.
        said: what was decided, a sentence each.
    """

    splits: dict[str, Rows]
    groups: tuple[str, ...] = ()
    counts: Mapping[str, Counts] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def supply(splits: Splits, needs: Collection[str], recipe: Recipe | None = None) -> Supplied:
    """Rows with the columns an objective needs.

    Args:
        needs: names as an objective declares them; those that the steps make are no matter of the data.
        recipe: how the rows' goals were written.

    Raises:
        DataError: columns that rows lack: of each how many, the first of them, why, and the remedy.
    """
    wanted = sorted({text_of_column(name) or name for name in needs} - MADE_BY_STEPS)
    _refuse_joint_goals(splits)
    if not wanted:
        return Supplied({**splits})
    usable, counts = _usable(splits, wanted)
    every = Joined(*usable.values())
    attributes = _Attributes.of(every, recipe)
    _check(every, wanted, attributes)
    groups = _groups(usable) if "groups" in wanted else ()
    found: dict[str, Rows] = {
        name: gather(_with(row, wanted, groups, attributes) for row in rows) for name, rows in usable.items()
    }
    replaced = "win_rates" in wanted and any("win_rates" in row.extras and row.goal is not None for row in every)
    said = ("win_rates of rows with a goal are those of their rewards under it, not the data's",) * replaced
    return Supplied(found, groups, counts, said)


# --- rows that cannot be used --------------------------------------------------------------------


def _refuse_joint_goals(splits: Splits) -> None:
    may = [r for r in splits.values() if not isinstance(r, RelabelledRows) or "instructions" in r.extras]
    rows = [row for rows in may for row in rows if "instructions" in row.extras and row.goal is not None]
    if rows:
        raise DataError(f"{counted(len(rows), 'row')} (first {rows[0].place}) cannot state a goal: {JOINT_GOAL}")


def _usable(
    splits: Splits, wanted: Collection[str]
) -> tuple[dict[str, Sequence[Conditioned]], dict[str, Counts]]:
    """Without the rows that have a value for a column asked for, but none that can be used."""
    kept: dict[str, Sequence[Conditioned]] = {}
    counts: dict[str, Counts] = {}

    def passed(rows: Rows, own: Counts) -> Iterator[Conditioned]:
        for row in rows:
            reason = next((why for column in wanted if (why := unusable(row.extras.get(_source(column))))), None)
            if reason is None:
                yield row
            else:
                own.drop(Dropped(reason, row.place))

    for name, rows in splits.items():
        own = counts[f"columns/{name}"] = Counts()
        kept[name] = gather(passed(rows, own))
        own.kept = len(kept[name])
    return kept, {name: own for name, own in counts.items() if own.dropped}


def _source(column: str) -> str:
    """The column of the data that one is made from."""
    return "group" if column == "groups" else column


# --- what is missing -----------------------------------------------------------------------------


def _check(rows: Sequence[Conditioned], wanted: Sequence[str], attributes: _Attributes) -> None:
    problems = []
    for column in wanted:
        lacking: dict[str, list[Conditioned]] = {}
        for row in rows:
            why = _lacks(row, column, attributes)
            if why is not None:
                lacking.setdefault(why, []).append(row)
        for why, found in lacking.items():
            remedy = why or REMEDIES.get(column, "use data that have it, or another objective")
            problems.append(f"{column}: {len(found)} of {counted(len(rows), 'row')} (first {found[0].place}): {remedy}")
        problems += _uneven(rows, column) if not lacking else []
    raise_all(problems, DataError, "rows lack what the objective needs:")


def _lacks(row: Conditioned, column: str, attributes: _Attributes) -> str | None:
    """Why a row has no such column; "" where it simply is not there, None where it is."""
    joint = "instructions" in row.extras
    if joint and column in (*OWN_TEXTS, "mismatched"):
        return f"{column} {TWO_PROMPTS}"
    if column == "rationale" and len(row.responses) > 2:
        return "a rationale compares two responses, and the row has more"
    if column in ("divergence", "mismatched"):
        return None
    if column in ("scores", "goal_distances"):
        return None if _rewards(row) is not None else ""
    if column == "win_rates" and _rewards(row) is not None:
        return None
    if column == "attributes":
        return attributes.lacking(row)
    return None if _source(column) in row.extras or column in row.attributes else ""


def _uneven(rows: Sequence[Conditioned], column: str) -> list[str]:
    """Where rows have lists of different numbers a response, no array holds them."""
    if column != "margin_rewards":
        return []
    first = {width_of(row.extras[column]): row for row in reversed(rows)}
    found = " and ".join(f"{max(width, 1)} (first {row.place})" for width, row in sorted(first.items()))
    return [f"{column}: responses have different numbers of them, {found}"] if len(first) > 1 else []


# --- what is derived -----------------------------------------------------------------------------


def _with(row: Conditioned, wanted: Collection[str], groups: Sequence[str], attributes: _Attributes) -> Conditioned:
    """The row with what is derived for it."""
    found: dict[str, Any] = {}
    if "groups" in wanted:
        found["groups"] = groups.index(_group_name(row.extras["group"]))
    if "win_rates" in wanted and ("win_rates" not in row.extras or row.goal is not None):
        found["win_rates"] = tuple(win_rates(_rewards(row) or ()).tolist())
    if "attributes" in wanted:
        found["attributes"] = attributes.rewards(row)
    return replace(row, extras={**row.extras, **found}) if found else row


def _rewards(row: Conditioned) -> tuple[float, ...] | None:
    """(K,) what each response is worth under the row's goal: minus its squared distance; its score without one."""
    distances = goal_distances(row)
    if row.goal is None or distances is None:
        return row.scores
    return tuple(0.0 - distance for distance in distances)


@dataclass(frozen=True, slots=True)
class _Attributes:
    """The further scores that every row is to have, by name: those of the goal, else all there are."""

    names: tuple[str, ...]
    recipe: Recipe | None

    @classmethod
    def of(cls, rows: Sequence[Conditioned], recipe: Recipe | None) -> _Attributes:
        found = {name for row in rows for name in row.attributes} if recipe is None else recipe.attributes
        return cls(tuple(sorted(found)), recipe)

    def lacking(self, row: Conditioned) -> str | None:
        """As :func:`_lacks`."""
        if self.recipe is not None and not self.names:
            return ONE_NUMBER
        missing = [name for name in self.names if self._own(row, name) is None]
        if missing:
            return f"no {', '.join(missing)}: every row must have the same further scores, of all its responses"
        return None if self.names else ""

    def rewards(self, row: Conditioned) -> tuple[tuple[float, ...], ...]:
        """(K, M) each score of each response; with a goal, minus its squared distance to the goal's."""
        columns = []
        for name in self.names:
            own, goal = self._own(row, name) or (), row.goal
            columns.append([-((goal[name] - v) ** 2) for v in own] if isinstance(goal, Mapping) else own)
        return tuple(zip(*columns, strict=True))

    def _own(self, row: Conditioned, name: str) -> tuple[float, ...] | None:
        """(K,) a score as the data have it; where a recipe names it, in goal units."""
        given = row.attributes.get(name)
        if self.recipe is None:
            return given
        if given is None:
            return row.scores if name == OVERALL else None  # in goal units already
        digits = self.recipe.number_format
        mapped = [float(self.recipe.attribute_mappings[name](value)) for value in given]
        return tuple(mapped if digits is None else [round(value, digits) for value in mapped])


def _groups(splits: Splits) -> tuple[str, ...]:
    """The distinct groups that are trained on: by size if all are numbers, else by name.

    Raises:
        DataError: other rows have a group more, which no weight would be learnt for.
    """
    trained = splits["train"] if "train" in splits else next(iter(splits.values()))
    names = {_group_name(row.extras["group"]) for row in trained}
    others = [row for rows in splits.values() for row in rows if _group_name(row.extras["group"]) not in names]
    if others:
        raise DataError(
            f"group: {counted(len(others), 'row')} (first {others[0].place}) of a group that is not trained on; there "
            f"is {', '.join(sorted(names))}: leave such rows out of the validation data, or hold "
            "others out (another training.seed parts data.valid_fraction otherwise)"
        )
    numbers = all(isinstance(as_number(name), float) and math.isfinite(float(name)) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numbers else 0.0, name)))


def _group_name(value: Any) -> str:
    """One name for 3, 3.0 and "3": files do not keep them apart."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
