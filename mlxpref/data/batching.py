"""Tokenized examples become the arrays of a planned shape.

Positions, targets and masks of every response token are laid down here, and nowhere again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mlxpref.data.parts import PlannedPart
from mlxpref.data.shapes import Shape
from mlxpref.data.words import counted
from mlxpref.errors import DataError
from mlxpref.records import Batch, MicroBatch, Shelf, Tokenized

_GIVEN = frozenset({"policy", "reference", "lengths", "state", "previous"})
"""Columns an objective may ask for that do not come from the data."""

Reference = Sequence[Sequence[np.ndarray]]
"""For each example of the data, K arrays (n_k,) float32 of token log-probs in nats."""


def collate(
    rows: Sequence[Tokenized],
    part: PlannedPart,
    reference: Reference | None = None,
    columns: Collection[str] = (),
) -> MicroBatch:
    """The examples ``part.rows`` of ``rows`` as arrays of ``part.shape``.

    Args:
        rows: the whole tokenized data; ``part`` holds indices into it.
        part: which examples, in which shape; the order of its rows is the order of B.
        reference: of the whole data, or None.
        columns: names an objective needs. ``scores`` and each name not made by the model itself must
            be in the data.

    Raises:
        DataError: an example lacks a column.
        ValueError: the shape does not fit the examples, or the reference has another length.
    """
    examples = [rows[row] for row in part.rows]
    shape = part.shape
    _check_fit(examples, shape)
    shelves, start_of = _shelves(examples, shape)
    scored, targets, place = _scored(examples, shape, start_of)
    known = None if reference is None else [reference[row] for row in part.rows]
    asked = set(columns) - _GIVEN
    return MicroBatch(
        prompts=np.stack([one.prompt_ids[: shape.prompt] for one in examples]).astype(np.int32),
        shelves=shelves,
        scored=scored,
        targets=targets,
        place=place,
        mask=(place < shape.scored).astype(np.float32),
        weights=np.array([one.weight for one in examples], np.float32),
        reference=None if known is None else _reference(examples, shape, known),
        scores=_column(examples, "scores") if "scores" in asked else None,
        extras={name: _column(examples, name) for name in sorted(asked - {"scores"})},
    )


def collate_step(
    rows: Sequence[Tokenized],
    parts: Sequence[PlannedPart],
    reference: Reference | None = None,
    columns: Collection[str] = (),
) -> Batch:
    """All micro-batches of one optimiser step; arguments and errors as ``collate``."""
    return Batch(
        parts=tuple(collate(rows, part, reference, columns) for part in parts),
        rows=tuple(part.rows for part in parts),
    )


def _check_fit(examples: Sequence[Tokenized], shape: Shape) -> None:
    if len(examples) != shape.n or any(len(one.response_ids) != shape.responses for one in examples):
        found = [len(one.response_ids) for one in examples]
        raise ValueError(f"shape for {shape.n} examples of {shape.responses} responses, but found {found}")
    shortest = min(len(one.prompt_ids) for one in examples)
    if shape.prompt >= shortest:
        raise ValueError(f"{shape.prompt} shared prompt tokens, but a prompt has {shortest}, the last not shared")


def _shelves(examples: Sequence[Tokenized], shape: Shape) -> tuple[tuple[Shelf, ...], dict[tuple[int, int], int]]:
    """Response rows ranked by length, B to a shelf; and where the row of each (b, k) starts to be scored.

    A row is what the prompt has beyond P and the response without its last token. Its first scored
    position is that of the prompt's last token, as an index into all shelves laid end to end.
    """
    where = [(b, k) for b in range(shape.n) for k in range(shape.responses)]
    tails = [one.prompt_ids[shape.prompt :] for one in examples]
    lengths = {(b, k): len(tails[b]) + len(examples[b].response_ids[k]) - 1 for b, k in where}
    ranked = sorted(where, key=lambda at: -lengths[at])
    shelves, start_of, start = [], {}, 0
    for shelf, width in enumerate(shape.rows):
        held = ranked[shelf * shape.n : (shelf + 1) * shape.n]
        inputs = np.zeros((shape.n, width), np.int32)
        for row, (b, k) in enumerate(held):
            if lengths[b, k] > width:
                raise ValueError(f"a row of {lengths[b, k]} tokens does not fit a shelf of {width}")
            inputs[row, : len(tails[b])] = tails[b]
            inputs[row, len(tails[b]) : lengths[b, k]] = examples[b].response_ids[k][:-1]
            start_of[b, k] = start + row * width + len(tails[b]) - 1
        shelves.append(Shelf(inputs, np.array([b for b, _ in held], np.int32)))
        start += shape.n * width
    return tuple(shelves), start_of


def _scored(
    examples: Sequence[Tokenized], shape: Shape, start_of: dict[tuple[int, int], int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``scored``, ``targets`` (N,) and ``place`` (B, K, L); positions ascend, so that reads are in order."""
    scored = np.zeros(shape.scored, np.int32)
    targets = np.zeros(shape.scored, np.int32)
    place = np.full((shape.n, shape.responses, shape.rows[0]), shape.scored, np.int32)
    n = 0
    for (b, k), start in sorted(start_of.items(), key=lambda item: item[1]):
        ids = examples[b].response_ids[k]
        if n + len(ids) > shape.scored:
            raise ValueError(f"more than {shape.scored} scored tokens")
        scored[n : n + len(ids)] = np.arange(start, start + len(ids))
        targets[n : n + len(ids)] = ids
        place[b, k, : len(ids)] = np.arange(n, n + len(ids))
        n += len(ids)
    return scored, targets, place


def _reference(examples: Sequence[Tokenized], shape: Shape, known: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """(B, K, L) float32, 0 off the responses."""
    out = np.zeros((shape.n, shape.responses, shape.rows[0]), np.float32)
    for b, (example, logps) in enumerate(zip(examples, known, strict=True)):
        for k, (ids, values) in enumerate(zip(example.response_ids, logps, strict=True)):
            if len(ids) != len(values):
                raise ValueError(
                    f"{example.example_id}: {counted(len(values), 'reference log-prob')} for "
                    f"{counted(len(ids), 'response token')}"
                )
            out[b, k, : len(ids)] = values
    return out


def _column(examples: Sequence[Tokenized], name: str) -> np.ndarray:
    """(B, …): a column of the data; int32 where all its values are whole numbers by type, else float32."""
    values = [one.scores if name == "scores" else one.extras.get(name) for one in examples]
    lacking = [one.example_id for one, value in zip(examples, values, strict=True) if value is None]
    if lacking:
        raise DataError(
            f"the objective needs the column {name!r}, which example {lacking[0]!r} does not have;"
            " use data that have it, or another objective"
        )
    column = np.array(values)
    return column.astype(np.int32 if column.dtype.kind in "iub" and name != "scores" else np.float32)
