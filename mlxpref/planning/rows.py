"""The rows of a run as a forecast sees them: their lengths, and which of them are the same. Each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from mlxpref.data.sizes import Sizes, joined, sizes_of, taken
from mlxpref.data.stored import Joined, Picked
from mlxpref.prepare import Prepared
from mlxpref.records import Tokenized
from mlxpref.reference import row_keys


class Sized(Picked[Tokenized]):
    """Some rows, by their places, whose sizes are known."""

    def __init__(self, rows: Sequence[Tokenized], places: Sequence[int], sizes: Sizes) -> None:
        super().__init__(rows, places)
        self.sizes = sizes


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows and, after them, validation rows.

    Attributes:
        all: of both.
        n_train: how many are for training.
        sizes: of all.
        twins: (N,) for each row the first of those with the same tokens, itself if there is none before it.
    """

    all: Sequence[Tokenized]
    n_train: int
    sizes: Sizes
    twins: np.ndarray

    @classmethod
    def of(cls, data: Prepared) -> Rows:
        first: dict[tuple[bytes, ...], int] = {}
        keys = map(row_keys, chain(data.train, data.valid))
        twins = [first.setdefault(key, place) for place, key in enumerate(keys)]
        sizes = joined([sizes_of(data.train), sizes_of(data.valid)])
        return cls(Joined(data.train, data.valid), len(data.train), sizes, np.array(twins, np.int64))

    @property
    def train(self) -> Sized:
        return self.at(range(self.n_train))

    @property
    def valid(self) -> Sized:
        return self.at(range(self.n_train, len(self.all)))

    def at(self, places: Sequence[int]) -> Sized:
        return Sized(self.all, places, taken(self.sizes, places))

    def distinct(self, places: Sequence[int]) -> Sized:
        """Of these rows each once."""
        return self.at(np.unique(self.twins[list(places)]).tolist())

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest response."""
        return int((self.sizes.prompts + self.sizes.lengths.max(1, initial=0)).max(initial=0))

    def cut(self, length: int, prompt: int | None) -> Rows:
        """About what ``max_length`` leaves: too long a prompt is cut as far as its responses ask for, but not below
        ``prompt`` tokens (half of the length if None), then the responses' tails."""
        longest = self.sizes.lengths.max(1, initial=0)
        room = np.maximum(length // 2 if prompt is None else prompt, length - longest)
        prompts = np.maximum(1, np.minimum(self.sizes.prompts, room))
        lengths = np.minimum(self.sizes.lengths, np.maximum(1, length - prompts)[:, None])
        scored = np.minimum(self.sizes.scored, lengths.sum(1))
        return replace(self, sizes=self.sizes._replace(prompts=prompts, lengths=lengths, scored=scored))
