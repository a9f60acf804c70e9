"""The few shapes a run may have: a ladder of lengths, and the merging that keeps them few.

Each new shape is traced and compiled again, and compiled graphs are never evicted, so a run plans its
shapes before it starts. What fits one shape fits a larger one: fewer shared prompt tokens, longer
rows, more scored positions. Merging therefore only adds padding, and adds as little as it can.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def _ladder(longest: int) -> list[int]:
    lengths = [8]
    while lengths[-1] < longest:
        lengths.append(lengths[-1] + max(8, 1 << lengths[-1].bit_length() >> 5))
    return lengths


LENGTHS = _ladder(1 << 22)
"""Multiples of 8 up to 256, then sixteen steps to each doubling. Merging decides which of them are used,
and pads less when the ladder is fine."""

_MANY = 768
"""Distinct shapes that are merged pair by pair; more are first gathered in coarse cells."""

_SHAPE_COST = 1024
"""What one more shape costs, in positions: its graph is traced, which takes as long as computing these.
Short runs have few shapes."""

_LAST = 1e15
"""Added to the cost of a merge that should come after all others."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The array shapes of a micro-batch (see ``records.MicroBatch``).

    Attributes:
        n: B, examples.
        prompt: P, tokens of every prompt that are shared by its responses; 0 shares nothing.
        rows: T of each of the S shelves, not ascending; ``rows[0]`` is L.
        scored: N, scored positions with their padding.
        responses: S, the K responses and the further texts of each example.
    """

    n: int
    prompt: int
    rows: tuple[int, ...]
    scored: int
    responses: int

    @property
    def slots(self) -> int:
        """Token positions one forward pass computes, padding included."""
        return self.n * (self.prompt + sum(self.rows))

    def fits(self, need: Shape) -> bool:
        """Whether what needs ``need`` can be laid out in this shape."""
        return bool((_as_rows([self]) >= _as_rows([need])).all()) and (
            (self.n, self.responses) == (need.n, need.responses)
        )


def floor_length(n: int) -> int:
    """The longest length of the ladder that is ≤ n; 0 below its first."""
    at = bisect_right(LENGTHS, n)
    return LENGTHS[at - 1] if at else 0


def ceil_length(n: int) -> int:
    """The shortest length of the ladder that is ≥ n."""
    return LENGTHS[bisect_left(LENGTHS, n)]


def ceil_scored(n: int) -> int:
    """The next multiple of 64; above 512, of an eighth of the power of two below n."""
    step = max(64, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def sizes_up_to(limit: int, *, coarse: int = 0) -> list[int]:
    """Numbers of examples a micro-batch may have, descending; few, since only equal ones can be merged.

    ``coarse`` 0: powers of two and ``limit`` itself; 1: 1 and ``limit``; 2: 1.
    """
    powers = [1 << k for k in range(limit.bit_length())]
    return sorted({*powers, limit} if coarse == 0 else {1, limit} if coarse == 1 else {1}, reverse=True)


def merge_shapes(needs: Sequence[Shape], *, max_shapes: int, max_slots: int) -> list[Shape]:
    """For each need a shape that fits it, at most ``max_shapes`` different ones in all.

    Shapes of the same B and S are merged greedily, the pair first that adds the least padding, until
    they are few enough and the next merge costs more than a shape; merges that would carry a
    micro-batch over ``max_slots`` positions come last. Afterwards each need moves to the cheapest
    shape that fits it, and every shape shrinks to what its needs require.

    Raises:
        ValueError: more kinds of (B, S) than ``max_shapes``; those cannot be merged.
    """
    if not needs:
        return []
    distinct, where, counts = np.unique(_as_rows(needs), axis=0, return_inverse=True, return_counts=True)
    kinds = len(np.unique(distinct[:, :2], axis=0))
    if kinds > max_shapes:
        raise ValueError(f"{kinds} kinds of micro-batch do not fit into {max_shapes} shapes")
    group = _coarse_cells(distinct, at_most=max(_MANY, max_shapes))
    group = _merge_greedily(distinct, counts, group, max_shapes, max_slots)
    group = _move_to_cheapest(distinct, group)
    shapes = [_as_shape(row) for row in _joins(distinct, group)]
    return [shapes[at] for at in group[where.reshape(-1)]]


# Below, a shape is a row of integers: B, S, -P, N, U_1 … U_S, 0 …, where U = P + T is the length of a
# row together with its shared prompt. So written, the smallest shape that fits two is their maximum.


def _as_rows(shapes: Sequence[Shape]) -> np.ndarray:
    rows = np.zeros((len(shapes), 4 + max(shape.responses for shape in shapes)), np.int64)
    for row, shape in zip(rows, shapes, strict=True):
        row[:4] = shape.n, shape.responses, -shape.prompt, shape.scored
        row[4 : 4 + shape.responses] = [shape.prompt + length for length in shape.rows]
    return rows


def _as_shape(row: np.ndarray) -> Shape:
    n, responses, prompt, scored = int(row[0]), int(row[1]), -int(row[2]), int(row[3])
    lengths = tuple(int(length) - prompt for length in row[4 : 4 + responses])
    return Shape(n=n, prompt=prompt, rows=lengths, scored=scored, responses=responses)


def _slots(rows: np.ndarray) -> np.ndarray:
    """(…, 4 + S) → (…): B times (P and all T), which is B times (all U, less S - 1 times P)."""
    return rows[..., 0] * (rows[..., 4:].sum(-1) + (rows[..., 1] - 1) * rows[..., 2])


def _cost(rows: np.ndarray) -> np.ndarray:
    """Positions to compute; a scored one counts twice, since it goes through the head as well."""
    return _slots(rows) + rows[..., 3]


def _joins(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(M, W), (M,) with groups 0 … G-1, none empty → (G, W): the smallest shape that fits each group."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    return np.maximum.reduceat(rows[order], starts, axis=0)


def _coarse_cells(rows: np.ndarray, *, at_most: int) -> np.ndarray:
    """(M, W) → (M,): a group for each row, ``at_most`` groups, each of near-equal lengths and one kind."""
    if len(rows) <= at_most:
        return np.arange(len(rows))
    levels = np.log2(np.abs(rows[:, 2:]) + 1)
    for per_doubling in (8, 4, 3, 2, 1, 0.5, 0.25, 0):
        cells = np.concatenate([rows[:, :2], np.floor(levels * per_doubling).astype(np.int64)], axis=1)
        found, group = np.unique(cells, axis=0, return_inverse=True)
        if len(found) <= at_most:
            break
    return group.reshape(-1)


def _merge_greedily(
    rows: np.ndarray, counts: np.ndarray, group: np.ndarray, max_groups: int, max_slots: int
) -> np.ndarray:
    """(M, W) rows met ``counts`` times in G groups → (M,) groups, at most ``max_groups``."""
    joined = _joins(rows, group)
    weight = np.bincount(group, counts)
    merged_into = np.arange(len(joined))
    alive = np.ones(len(joined), bool)
    added = np.stack([_added(joined, weight, a, max_slots) for a in range(len(joined))])
    for n_groups in range(len(joined), 1, -1):
        a, b = divmod(int(added.argmin()), len(joined))
        if added[a, b] > (np.inf if n_groups > max_groups else _SHAPE_COST):
            break
        joined[a] = np.maximum(joined[a], joined[b])
        weight[a] += weight[b]
        alive[b] = False
        merged_into[merged_into == b] = a
        fresh = np.where(alive, _added(joined, weight, a, max_slots), np.inf)
        added[a], added[:, a] = fresh, fresh
        added[b], added[:, b] = np.inf, np.inf
    return np.unique(merged_into[group], return_inverse=True)[1].reshape(-1)


def _added(joined: np.ndarray, weight: np.ndarray, a: int, max_slots: int) -> np.ndarray:
    """(G,): what merging group ``a`` with each other group adds to the cost of the whole run."""
    both = np.maximum(joined, joined[a])
    added = (weight + weight[a]) * _cost(both) - weight * _cost(joined) - weight[a] * _cost(joined[a])
    bound = np.maximum(max_slots, np.maximum(_slots(joined), _slots(joined[a])))
    added = added + _LAST * (_slots(both) > bound)
    other_kind = (joined[:, :2] != joined[a, :2]).any(1)
    return np.where(other_kind | (np.arange(len(joined)) == a), np.inf, added)


def _move_to_cheapest(rows: np.ndarray, group: np.ndarray, *, rounds: int = 3) -> np.ndarray:
    """Each row goes to the cheapest group whose shape fits it; never costs more than before."""
    for _ in range(rounds):
        shapes = _joins(rows, group)
        fits = np.ones((len(rows), len(shapes)), bool)
        for column in range(rows.shape[1]):
            compare = np.equal if column < 2 else np.greater_equal
            fits &= compare(shapes[None, :, column], rows[:, None, column])
        cheapest = np.where(fits, _cost(shapes)[None], np.inf).argmin(1)
        group = np.unique(cheapest, return_inverse=True)[1].reshape(-1)
    return group
