"""Rows on their way to the models: as text, as tokens of each model's tokenizer, and why some do not get there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxpref.columns.wanted import Base
from mlxpref.data.tokenization import tokenize_all
from mlxpref.errors import DataError, UsageError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped, Scored, Tokenized

Example = Scored | Conditioned

_INDEX = "mlxpref_row"
"""Column that numbers rows on their way through tokenization, which drops some."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row to be measured.

    Attributes:
        split: where it belongs.
        example: as it was read, and will be written.
        text: its prompt and K responses, in the order of ``example``.
        preferred: place of the best response.
        tokens: by base model, whose tokenizer made them.
    """

    split: str
    example: Example
    text: Conditioned
    preferred: int
    tokens: Mapping[Base, Tokenized]


def tokenized(
    splits: Mapping[str, Sequence[Example]], tokenizers: Mapping[Base, Any], *, strict: bool = False, **lengths: Any
) -> tuple[list[Row], dict[str, Counts]]:
    """The rows that every tokenizer can read, and what was dropped and cut, by stage.

    Args:
        lengths: max_length, max_prompt_length and truncation, as in ``tokenize``.

    Raises:
        DataError: ``strict``, and a row was dropped.
    """
    found: list[Row] = []
    counts: dict[str, Counts] = {}
    for split, examples in splits.items():
        rows = [Row(split, example, *_as_text(example), {}) for example in examples]
        for base, tokenizer in tokenizers.items():
            stage = f"tokenize/{split}" + (f", {base[0]}" if len(tokenizers) > 1 else "")
            rows, counts[stage] = _with_tokens(rows, base, tokenizer, strict=strict, **lengths)
        found += rows
    return found, counts


def _as_text(example: Example) -> tuple[Conditioned, int]:
    """What a tokenizer reads of it, and the place of the best response."""
    if isinstance(example, Conditioned):
        return replace(example, extras=_read(example)), 0
    scores = example.scores or (0.0,)
    text = Conditioned(
        example.prompt, example.responses, None, None, None, None, example.example_id,
        extras=_read(example), where=example.where,
    )  # fmt: skip
    return text, max(range(len(scores)), key=lambda k: scores[k])


def _read(example: Example) -> dict[str, Any]:
    """The extras that are part of the text."""
    return {name: example.extras[name] for name in ("tools", "instructions") if name in example.extras}


def _with_tokens(
    rows: Sequence[Row], base: Base, tokenizer: Any, *, strict: bool, **lengths: Any
) -> tuple[list[Row], Counts]:
    marked = [
        replace(row.text, attributes={}, extras={**row.text.extras, _INDEX: index}) for index, row in enumerate(rows)
    ]
    found, counts = tokenize_all(marked, tokenizer, strict=strict, **lengths)
    kept = []
    for tokens in found:
        row = rows[tokens.extras[_INDEX]]
        kept.append(replace(row, tokens={**row.tokens, base: tokens}))
    return kept, counts


def sift(
    rows: Sequence[Row], counts: dict[str, Counts], reason: Callable[[int, Row], str | None], *, strict: bool = False
) -> list[int]:
    """The places of the rows that stay; the others are counted, by split, under the reason they have to go.

    Raises:
        DataError: ``strict``, and a row has to go.
    """
    found = [(index, row, reason(index, row)) for index, row in enumerate(rows)]
    gone = [(row, why) for _, row, why in found if why is not None]
    if strict:
        lines = [f"{row.text.place}: {why}" for row, why in gone]
        raise_all(lines[:10], DataError, f"{len(lines)} of {len(rows)} rows cannot be used (strict):")
    for row, why in gone:
        counts.setdefault(f"columns/{row.split}", Counts()).drop(Dropped(why, row.text.place))
    stay = [index for index, _, why in found if why is None]
    for stage, own in counts.items():
        if stage.startswith("columns/"):
            own.kept = sum(f"columns/{rows[index].split}" == stage for index in stay)
    return stay


def check_left(rows: Sequence[Row], splits: Mapping[str, Sequence[Example]], counts: Mapping[str, Counts]) -> None:
    """DataError if a split that had rows has none any more."""
    left = {row.split for row in rows}
    lost = [name for name, examples in splits.items() if examples and name not in left]
    lines = [f"{stage}: {line}" for stage, own in counts.items() for line in own.lines()]
    raise_all([*lost, *lines] if lost else [], DataError, "no row is left of a split:")


def check_alike(rows: Sequence[Row], bases: Sequence[Base]) -> None:
    """UsageError unless the tokenizers of these models make the same tokens of every row."""
    one, other = bases
    for row in rows:
        pairs = zip(row.tokens[one].slots, row.tokens[other].slots, strict=True)
        if not all(np.array_equal(a, b) for (_, a), (_, b) in pairs):
            raise UsageError(
                f"{one[0]} and {other[0]} have different tokenizers ({row.text.place}): the strong and the weak "
                "model are compared token by token; take siblings of one family"
            )
