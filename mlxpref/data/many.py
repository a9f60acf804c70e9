"""Tokenized rows too many for memory: what each block of them is found to be, and all of them as one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from mlxpref.data.columns import available_columns, fractional_columns, with_fractions
from mlxpref.data.sizes import Sizes, joined, measure
from mlxpref.data.stored import Stored, pack, stored
from mlxpref.records import Tokenized


@dataclass(frozen=True, slots=True)
class Block:
    """Tokenized rows on their way to the disk, from whichever process.

    Attributes:
        packed: the rows, their columns already of one type among themselves.
        n: how many.
        sizes: their lengths.
        columns: those that all of them have; None of no rows.
        fractional: columns that hold fractions.
    """

    packed: bytes
    n: int
    sizes: Sizes
    columns: frozenset[str] | None
    fractional: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[Tokenized]) -> Block:
        fractional = fractional_columns(rows)
        alike = [with_fractions(row, fractional) for row in rows]
        columns = frozenset(available_columns(rows)) if rows else None
        return cls(pack(alike, together=False), len(rows), measure(rows), columns, fractional)


class TokenizedRows(Stored[Tokenized]):
    """Tokenized rows on disk.

    Attributes:
        sizes: of all rows.
        columns: those that every row has, as ``available_columns`` says.
    """

    def __init__(self, rows: Stored[Tokenized], blocks: Sequence[Block]) -> None:
        self.__dict__.update(vars(rows))
        self.sizes = joined([block.sizes for block in blocks])
        there = [block.columns for block in blocks if block.columns is not None]
        self.columns = frozenset.intersection(*there) if there else frozenset()
        fractional = frozenset(chain.from_iterable(block.fractional for block in blocks))
        # A column may hold fractions in other blocks only: whole numbers in this one are fractions, too.
        self._late = [fractional - block.fractional for block in blocks]

    def _read(self, block: int, at: int) -> Tokenized:
        row = super()._read(block, at)
        return with_fractions(row, self._late[block]) if self._late[block] else row


def keep(blocks: Iterable[Block]) -> TokenizedRows:
    """The rows of these blocks, in order, on disk. RunError if the temporary folder is full."""
    light: list[Block] = []

    def packed() -> Iterator[bytes]:
        for block in blocks:
            light.append(Block(b"", block.n, block.sizes, block.columns, block.fractional))
            yield block.packed

    rows = stored(packed())
    return TokenizedRows(rows, light)
