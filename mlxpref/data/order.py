"""The order in which an epoch visits the examples, and what the optimiser sees as one batch.

What is in a batch depends on the data, the batch size and the seed, on nothing else: not on how a
batch is later split into micro-batches, and not on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(
    example_ids: Sequence[str],
    *,
    batch_size: int,
    shuffle: bool = True,
    keep_together: bool = True,
    seed: int = 0,
    epoch: int = 0,
) -> list[list[int]]:
    """Indices of the examples of each batch; every example once.

    Args:
        example_ids: of each row; rows that share one are the halves of one source.
        batch_size: examples of a batch. The last batch may hold fewer, and so may others where units
            kept together leave a place that no further unit fits.
        shuffle: False keeps the order of the data, and then only neighbours are kept together.
        keep_together: rows that share an ``example_id`` are in one batch, unless they are more than
            ``batch_size``; then they fill consecutive batches.
        seed, epoch: name the shuffle; equal names, equal order.
    """
    units = _units(example_ids, keep_together=keep_together, neighbours=not shuffle)
    if not shuffle:
        return _fill_in_order(units, batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(units))
    return _fill_best([piece for at in order for piece in _pieces(units[at], batch_size)], batch_size)


def _units(example_ids: Sequence[str], *, keep_together: bool, neighbours: bool) -> list[list[int]]:
    """Rows that must stay together, in the order of their first row."""
    if not keep_together:
        return [[row] for row in range(len(example_ids))]
    units: list[list[int]] = []
    unit_of: dict[str, list[int]] = {}
    for row, name in enumerate(example_ids):
        if neighbours and row and name != example_ids[row - 1]:
            unit_of.clear()
        if name not in unit_of:
            unit_of[name] = []
            units.append(unit_of[name])
        unit_of[name].append(row)
    return units


def _pieces(unit: list[int], size: int) -> list[list[int]]:
    return [unit[start : start + size] for start in range(0, len(unit), size)]


def _fill_in_order(units: list[list[int]], batch_size: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for unit in units:
        for piece in _pieces(unit, batch_size):
            if len(batches[-1]) + len(piece) > batch_size:
                batches.append([])
            batches[-1] += piece
    return [batch for batch in batches if batch]


def _fill_best(units: list[list[int]], batch_size: int) -> list[list[int]]:
    """Each unit goes to the open batch that it fills best, among equals to the oldest."""
    batches: list[list[int]] = []
    open_by_room: dict[int, list[list[int]]] = {room: [] for room in range(1, batch_size + 1)}
    for unit in units:
        room = next((r for r in range(len(unit), batch_size + 1) if open_by_room[r]), None)
        if room is None:
            batch: list[int] = []
            batches.append(batch)
            room = batch_size
        else:
            batch = open_by_room[room].pop(0)
        batch += unit
        if room > len(unit):
            open_by_room[room - len(unit)].append(batch)
    return batches
