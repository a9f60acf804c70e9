"""From a list of K > 2 responses to pairs, for formulas that compare two.

Responses stand best first. Pairs are ordered, better one first:

- ``first_two``: the first response and the next one that the goal tells from it: (1, 2), or (1, 3) where
  these two are equally far from the goal, and so on: the hardest to tell apart;
- ``best_worst``: (1, K);
- ``best_rest``: (1, 2), …, (1, K);
- ``all_pairs``: every (i, j) with i before j.

The loss of an example is the mean over its pairs. Where the data are scored, a pair that the goal does
not tell apart is left out: the column ``goal_distances`` (B, K) says how far each response is from the
goal, and (i, j) counts where j is farther than i. An example without a pair left has loss 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxpref import ops
from mlxpref.objectives.registry import Column, Kind, Lift, Text
from mlxpref.ops import Array
from mlxpref.records import Logps

Pairs = tuple[tuple[int, int], ...]


def pairs_of(k: int, lift: Lift) -> Pairs:
    """The (better, worse) slots of a list of ``k`` responses."""
    if lift == "best_worst":
        return ((0, k - 1),)
    if lift in ("first_two", "best_rest"):
        return tuple((0, j) for j in range(1, k))
    return tuple((i, j) for i in range(k) for j in range(i + 1, k))


def take_pairs(column: Any, pairs: Pairs, kind: Kind) -> Any:
    """A column of lists as one of pairs: n pairs of B examples are n·B rows, pair after pair.

    Args:
        column: ``Logps`` (B, K, L), an array (B, K, …), or one without responses, (B, …).
        kind: what the signature says of it.
    """
    if isinstance(column, Logps):
        return Logps(*(take_pairs(part, pairs, _of_parts(kind)) for part in column))
    if isinstance(kind, Column) and kind.per == "example":
        return ops.concatenate([column] * len(pairs), 0) if len(pairs) > 1 else column
    return _take(column, pairs)


def _of_parts(kind: Kind) -> Kind:
    return Column("example" if isinstance(kind, Text) and kind.per == "example" else "response")


def mean_over_pairs(losses: Array, pairs: Pairs, distances: Array | None, lift: Lift) -> Array:
    """(n·B,) losses of pairs → (B,) of examples; ``distances`` (B, K) leave out what they tie."""
    losses = losses.reshape(len(pairs), -1)
    if distances is None:
        return losses[0] if lift == "first_two" else losses.mean(0)
    told_apart = [distances[:, j] > distances[:, i] for i, j in pairs]
    if lift == "first_two":
        told_apart = _first(told_apart)
    counts = ops.stack(told_apart, 0)
    n = counts.sum(0)
    return ops.where(counts, losses, 0.0).sum(0) / ops.where(n > 0, n, 1)


def lift_columns(columns: Mapping[str, Any], kinds: Mapping[str, Kind], pairs: Pairs) -> dict[str, Any]:
    """Every column of a formula as columns of pairs."""
    return {name: take_pairs(column, pairs, kinds[name]) for name, column in columns.items()}


def _first(conditions: list[Array]) -> list[Array]:
    """Of boolean arrays (B,), each where it holds and none before it did."""
    first, before = [conditions[0]], conditions[0]
    for condition in conditions[1:]:
        first.append(condition & ~before)
        before = before | condition
    return first


def _take(array: Array, pairs: Pairs) -> Array:
    rows = [ops.stack([array[:, i], array[:, j]], 1) for i, j in pairs]
    return rows[0] if len(rows) == 1 else ops.concatenate(rows, 0)
