"""How a batch is split into micro-batches: the cheapest split of its examples, sorted by length.

All window shapes are computed at once in NumPy, then each batch's best cuts are found backwards from
its end, so a run of many thousand batches is planned in a second or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxpref.data.shapes import LENGTHS, Shape, ceil_length, ceil_scored, floor_length
from mlxpref.data.sizes import sizes_of
from mlxpref.records import Tokenized

_PASS_COST = 128
"""What one more forward pass costs beside its positions, in positions: launches, reading the weights.
Without it the split would fall apart into single examples, which have no padding."""

_CHUNK = 1 << 22
"""Row lengths that are sorted at a time."""


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One micro-batch to be: the indices of its examples in the tokenized data, its shape, and whose it is."""

    rows: tuple[int, ...]
    shape: Shape
    worker: int = 0


class Splitter:
    """Splits batches of one data set.

    Args:
        rows: the tokenized data.
        share_prompts: compute each prompt once for all its responses.
        budget: token positions, padding included, of one micro-batch; a single example may exceed it.
    """

    def __init__(self, rows: Sequence[Tokenized], *, share_prompts: bool, budget: int) -> None:
        self.share_prompts = share_prompts
        self.budget = budget
        sizes = sizes_of(rows)
        self.prompts, self.responses, self.scored, self.lengths = sizes[:4]
        self.tokens = sizes.tokens
        # Rounding up never passes the longest row there is: a model may have no position beyond it.
        self.longest = int((self.prompts + self.lengths[:, 0] - 1).max())

    def split(self, batches: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[PlannedPart]]:
        """The micro-batches of each batch, all of one S and of a number of examples in ``sizes``.

        Of two ways to sort a batch, by its rows or by its prompts, the cheaper one is taken.
        """
        batch_of = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        rows = np.concatenate([np.asarray(batch, np.int64) for batch in batches])
        ways = [self._cut(rows[order], batch_of, sizes) for order in self._orders(rows, batch_of)]
        k = ways[0].responses
        new = (np.diff(batch_of, prepend=-1) != 0) | (np.diff(k, prepend=-1) != 0)
        parts: list[list[PlannedPart]] = [[] for _ in batches]
        for start in np.flatnonzero(new).tolist():
            way = min(ways, key=lambda way: way.cost[start])
            parts[batch_of[start]] += [PlannedPart(part, self.shape(part)) for part in way.parts(start)]
        return parts

    def share_out(self, batch: Sequence[int], n_workers: int) -> list[list[int]]:
        """A batch's examples as one share for each worker, so that all finish together: the longest first, each to
        the worker that has the least so far. Shares differ by no more than the longest example."""
        if n_workers == 1:
            return [list(batch)]
        shares: list[list[int]] = [[] for _ in range(n_workers)]
        loads = [0] * n_workers
        costs = self.costs(batch)
        for at in sorted(range(len(batch)), key=lambda at: (-costs[at], at)):
            worker = loads.index(min(loads))
            shares[worker].append(batch[at])
            loads[worker] += costs[at]
        return shares

    def costs(self, rows: Sequence[int]) -> list[int]:
        """Token positions of each example, without padding."""
        chosen = list(rows)
        prompts, responses = self.prompts[chosen], self.lengths[chosen].sum(1)
        times = 1 if self.share_prompts else self.responses[chosen]
        return (prompts * times + responses).tolist()

    def shape(self, rows: Sequence[int]) -> Shape:
        """The smallest shape on the ladder that holds these examples, all of one S."""
        chosen = list(rows)
        n, responses = len(chosen), int(self.responses[chosen[0]])
        prompt = floor_length(int(self.prompts[chosen].min()) - 1) if self.share_prompts else 0
        whole = self.prompts[chosen, None] + self.lengths[chosen, :responses] - 1
        longest = np.sort(whole, axis=None)[::-1][::n].tolist()
        shelves = tuple(min(ceil_length(u - prompt), self.longest - prompt) for u in longest)
        scored = ceil_scored(int(self.scored[chosen].sum()))
        return Shape(n=n, prompt=prompt, rows=shelves, scored=scored, responses=responses)

    def filled(self, part: PlannedPart) -> int:
        """Positions of a part that are not padding."""
        chosen, shared = list(part.rows), part.shape.prompt
        whole = self.prompts[chosen, None] + self.lengths[chosen, : part.shape.responses] - 1
        return len(chosen) * shared + int((whole - shared).sum())

    def _orders(self, rows: np.ndarray, batch_of: np.ndarray) -> list[np.ndarray]:
        """Orders of all rows that keep batches apart, and in them rows of one S; longest first."""
        k, prompt, response = self.responses[rows], self.prompts[rows], self.lengths[rows, 0]
        orders = [np.lexsort((-prompt, -(prompt + response), k, batch_of))]
        if self.share_prompts:
            orders.append(np.lexsort((-response, -_floor(prompt - 1), k, batch_of)))
        return orders

    def _cut(self, rows: np.ndarray, batch_of: np.ndarray, sizes: Sequence[int]) -> _Cuts:
        """Best cuts of sorted rows, from each row to the end of its batch and S."""
        k = self.responses[rows]
        last = (np.diff(batch_of, append=-1) != 0) | (np.diff(k, append=-1) != 0)
        stops = np.flatnonzero(last) + 1
        room = stops[np.searchsorted(stops, np.arange(len(rows)), side="right")] - np.arange(len(rows))
        tried = [(size, self._window_costs(rows, room, size).tolist()) for size in sizes]
        cost = np.zeros(len(rows) + 1).tolist()
        best = [0] * len(rows)
        for at in range(len(rows) - 1, -1, -1):
            left = int(room[at])
            options = [
                (costs[at] + (cost[at + size] if size < left else 0.0), -size) for size, costs in tried if size <= left
            ]
            cost[at], taken = min(options)
            best[at] = -taken
        return _Cuts(rows, k, room, cost, best)

    def _window_costs(self, rows: np.ndarray, room: np.ndarray, size: int) -> np.ndarray:
        """(M,): cost of the micro-batch of ``size`` rows that begins at each row; inf over the budget."""
        # Without padding and repetition a window computes at least this much; most are ruled out by it.
        least = np.concatenate([[0], np.cumsum(self.prompts[rows] - 1 + self.lengths[rows].sum(1))])
        starts = np.flatnonzero(room >= size)
        if size > 1:
            starts = starts[least[starts + size] - least[starts] <= self.budget]
        costs = np.full(len(rows), np.inf)
        for k in np.unique(self.responses[rows[starts]]):
            mine = starts[self.responses[rows[starts]] == k]
            for chunk in np.array_split(mine, 1 + len(mine) * size * int(k) // _CHUNK):
                slots = self._window_slots(rows[chunk[:, None] + np.arange(size)], int(k))
                costs[chunk] = np.where((slots <= self.budget) | (size == 1), slots + _PASS_COST, np.inf)
        return costs

    def _window_slots(self, rows: np.ndarray, k: int) -> np.ndarray:
        """(M, B) rows of k slots → (M,): positions of the smallest shape that holds each B."""
        n = rows.shape[1]
        shortest = self.prompts[rows].min(1) if self.share_prompts else np.zeros(len(rows), np.int64)
        prompt = _floor(shortest - 1)
        whole = (self.prompts[rows, None] + self.lengths[rows, :k] - 1).reshape(len(rows), -1)
        longest = np.sort(whole, axis=1)[:, ::-1][:, ::n]
        shelves = np.minimum(_ceil(longest - prompt[:, None]), self.longest - prompt[:, None])
        return n * (prompt + shelves.sum(1))


@dataclass(frozen=True, slots=True)
class _Cuts:
    """For sorted rows: how many may follow in their batch, the least cost from there, the size to take."""

    rows: np.ndarray
    responses: np.ndarray
    room: np.ndarray
    cost: list[float]
    best: list[int]

    def parts(self, start: int) -> list[tuple[int, ...]]:
        stop = start + int(self.room[start])
        parts = []
        while start < stop:
            parts.append(tuple(self.rows[start : start + self.best[start]].tolist()))
            start += self.best[start]
        return parts


_LADDER = np.array(LENGTHS)


def _floor(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], _LADDER])[np.searchsorted(_LADDER, lengths, side="right")]


def _ceil(lengths: np.ndarray) -> np.ndarray:
    return _LADDER[np.searchsorted(_LADDER, lengths)]
