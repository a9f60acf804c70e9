"""How long rows are, as arrays: all that planning asks of tokenized data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlxpref.records import Tokenized


class Sizes(NamedTuple):
    """Of N rows of S slots at most.

    Attributes:
        prompts: (N,) tokens.
        responses: (N,) slots: responses and further texts.
        scored: (N,) scored tokens of all slots.
        lengths: (N, S) tokens of each slot with its lead, longest first, 0 where there is none.
        names: of each row the id of its example.
    """

    prompts: np.ndarray
    responses: np.ndarray
    scored: np.ndarray
    lengths: np.ndarray
    names: list[str]

    @property
    def tokens(self) -> np.ndarray:
        """(N,) of the prompt once, and of every slot with its lead."""
        return self.prompts + self.lengths.sum(1)


def sizes_of(rows: Sequence[Tokenized]) -> Sizes:
    """The sizes of these rows; those that keep them are not read for it."""
    known = getattr(rows, "sizes", None)
    return known if isinstance(known, Sizes) else measure(rows)


def measure(rows: Sequence[Tokenized]) -> Sizes:
    """The sizes of these rows, each of them read once."""
    prompts, slots, names = [], [], []
    for row in rows:
        prompts.append(len(row.prompt_ids))
        slots.append([(len(lead), len(ids)) for lead, ids in row.slots])
        names.append(row.example_id)
    responses = np.array([len(own) for own in slots], np.int64)
    lengths = np.zeros((len(slots), responses.max(initial=0)), np.int64)
    for of_row, own in zip(lengths, slots, strict=True):
        of_row[: len(own)] = sorted(map(sum, own), reverse=True)
    scored = np.array([sum(ids for _, ids in own) for own in slots], np.int64)
    return Sizes(np.array(prompts, np.int64), responses, scored, lengths, names)


def taken(sizes: Sizes, places: Sequence[int]) -> Sizes:
    """The sizes of some of the rows."""
    at = np.asarray(places, np.int64)
    arrays = (sizes.prompts[at], sizes.responses[at], sizes.scored[at], sizes.lengths[at])
    return Sizes(*arrays, [sizes.names[place] for place in places])


def joined(parts: Sequence[Sizes]) -> Sizes:
    """The sizes of several lots of rows, one after the other."""
    widest = max((part.lengths.shape[1] for part in parts), default=0)
    lengths = [np.pad(part.lengths, ((0, 0), (0, widest - part.lengths.shape[1]))) for part in parts]
    none = np.zeros(0, np.int64)
    return Sizes(
        np.concatenate([none, *(part.prompts for part in parts)]),
        np.concatenate([none, *(part.responses for part in parts)]),
        np.concatenate([none, *(part.scored for part in parts)]),
        np.concatenate([np.zeros((0, widest), np.int64), *lengths]),
        [name for part in parts for name in part.names],
    )
