"""Tokenized examples become the arrays of a planned shape.

Positions, targets and masks of every response token are laid down here, and nowhere again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mlxpref.data.columns import MADE_BY_STEPS, PER_TOKEN, TEXTS, text_of_column
from mlxpref.data.parts import PlannedPart
from mlxpref.data.shapes import Shape
from mlxpref.data.words import counted
from mlxpref.errors import DataError
from mlxpref.records import Batch, MicroBatch, Shelf, Tokenized

Reference = Sequence[Sequence[np.ndarray]]
"""For each example of the data, S arrays (n_s,) float32 of token log-probs in nats."""


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
        columns: names an objective needs. ``scores``, further texts and each name not made by the steps
            themselves must be in the data.

    Raises:
        DataError: an example lacks a column or a text.
        ValueError: the shape does not fit the examples, or the reference has another length.
    """
    examples = [rows[row] for row in part.rows]
    shape = part.shape
    _check_fit(examples, shape)
    shelves, start_of = _shelves(examples, shape)
    scored, targets, place = _scored(examples, shape, start_of)
    known = None if reference is None else [reference[row] for row in part.rows]
    asked = {text_of_column(name) or name for name in columns} - MADE_BY_STEPS
    _check_texts(examples, asked)
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
        extras={name: _extra(examples, shape, name) for name in sorted(asked - {"scores", *TEXTS})},
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
        workers=tuple(part.worker for part in parts) if any(part.worker for part in parts) else (),
    )


def _check_fit(examples: Sequence[Tokenized], shape: Shape) -> None:
    found = [len(one.slots) for one in examples]
    if found != [shape.responses] * shape.n:
        raise ValueError(f"shape for {shape.n} examples of {shape.responses} responses, but found {found}")
    layouts = {
        (len(one.response_ids), *sorted((name, len(ids)) for name, ids in one.texts.items())) for one in examples
    }
    if len(layouts) > 1:
        raise ValueError(f"examples with different texts cannot share a micro-batch: {sorted(layouts, key=str)}")
    shortest = min(len(one.prompt_ids) for one in examples)
    if shape.prompt >= shortest:
        raise ValueError(f"{shape.prompt} shared prompt tokens, but a prompt has {shortest}, the last not shared")


def _shelves(examples: Sequence[Tokenized], shape: Shape) -> tuple[tuple[Shelf, ...], dict[tuple[int, int], int]]:
    """Rows of all slots ranked by length, B to a shelf; and where the row of each (b, s) starts to be scored.

    A row is what the prompt has beyond P, the lead, and the scored text without its last token. Its first
    scored position is that of the last token before the text, as an index into all shelves laid end to end.
    """
    heads, rows = {}, {}
    for b, one in enumerate(examples):
        for s, (lead, ids) in enumerate(one.slots):
            heads[b, s] = len(one.prompt_ids) - shape.prompt + len(lead)
            rows[b, s] = np.concatenate([one.prompt_ids[shape.prompt :], lead, ids[:-1]])
    ranked = sorted(rows, key=lambda at: -len(rows[at]))
    shelves, start_of, start = [], {}, 0
    for shelf, width in enumerate(shape.rows):
        held = ranked[shelf * shape.n : (shelf + 1) * shape.n]
        inputs = np.zeros((shape.n, width), np.int32)
        for row, at in enumerate(held):
            if len(rows[at]) > width:
                raise ValueError(f"a row of {len(rows[at])} tokens does not fit a shelf of {width}")
            inputs[row, : len(rows[at])] = rows[at]
            start_of[at] = start + row * width + heads[at] - 1
        shelves.append(Shelf(inputs, np.array([b for b, _ in held], np.int32)))
        start += shape.n * width
    return tuple(shelves), start_of


def _scored(
    examples: Sequence[Tokenized], shape: Shape, start_of: dict[tuple[int, int], int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``scored``, ``targets`` (N,) and ``place`` (B, S, L); positions ascend, so that reads are in order."""
    scored = np.zeros(shape.scored, np.int32)
    targets = np.zeros(shape.scored, np.int32)
    place = np.full((shape.n, shape.responses, shape.rows[0]), shape.scored, np.int32)
    slots = [one.slots for one in examples]
    n = 0
    for (b, s), start in sorted(start_of.items(), key=lambda item: item[1]):
        _, ids = slots[b][s]
        if n + len(ids) > shape.scored:
            raise ValueError(f"more than {shape.scored} scored tokens")
        scored[n : n + len(ids)] = np.arange(start, start + len(ids))
        targets[n : n + len(ids)] = ids
        place[b, s, : len(ids)] = np.arange(n, n + len(ids))
        n += len(ids)
    return scored, targets, place


def _reference(examples: Sequence[Tokenized], shape: Shape, known: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """(B, S, L) float32, 0 off the scored tokens."""
    out = np.zeros((shape.n, shape.responses, shape.rows[0]), np.float32)
    for b, (example, logps) in enumerate(zip(examples, known, strict=True)):
        for s, ((_, ids), values) in enumerate(zip(example.slots, logps, strict=True)):
            if len(ids) != len(values):
                raise ValueError(
                    f"{example.example_id}: {counted(len(values), 'reference log-prob')} for "
                    f"{counted(len(ids), 'response token')}"
                )
            out[b, s, : len(ids)] = values
    return out


# --- texts and columns ---


def _check_texts(examples: Sequence[Tokenized], asked: Collection[str]) -> None:
    for name in sorted({*asked} & {*TEXTS}):
        lacking = next((one.example_id for one in examples if name not in one.texts), None)
        if lacking is not None:
            raise DataError(f"the objective needs the text {name!r}, which example {lacking!r} was read without")


def _extra(examples: Sequence[Tokenized], shape: Shape, name: str) -> np.ndarray:
    if name not in PER_TOKEN:
        return _column(examples, name)
    values = [_divergence(one) if name == "divergence" else one.extras.get(name) for one in examples]
    _check_lacking(examples, values, name)
    out = np.zeros((shape.n, len(examples[0].response_ids), shape.rows[0]), np.float32)
    for b, of_example in enumerate(values):
        for k, of_response in enumerate(of_example or ()):
            out[b, k, : len(of_response)] = of_response
    return out


def _divergence(example: Tokenized) -> list[np.ndarray]:
    """K arrays (n_k,): 1 from the first place on at which the responses do not all have the same token."""
    shortest = min(map(len, example.response_ids))
    stacked = np.stack([ids[:shortest] for ids in example.response_ids])
    same = (stacked == stacked[0]).all(0)
    first = shortest if same.all() else int(same.argmin())
    return [(np.arange(len(ids)) >= first).astype(np.float32) for ids in example.response_ids]


def _column(examples: Sequence[Tokenized], name: str) -> np.ndarray:
    """(B, …): a column of the data; int32 where all its values are whole numbers by type, else float32."""
    values = [_rewards(one) if name == "scores" else one.extras.get(name) for one in examples]
    _check_lacking(examples, values, name)
    column = np.array(values)
    return column.astype(np.int32 if column.dtype.kind in "iub" and name != "scores" else np.float32)


def _rewards(example: Tokenized) -> Sequence[float] | None:
    """(K,) the score, or with a goal how far from it each response is: minus the square."""
    if example.goal is None or example.scores is None:
        return example.scores
    distances = example.extras.get("goal_distances")
    return None if distances is None else [0.0 - distance for distance in distances]


def _check_lacking(examples: Sequence[Tokenized], values: Sequence[Any], name: str) -> None:
    lacking = [one.example_id for one, value in zip(examples, values, strict=True) if value is None]
    if lacking:
        raise DataError(
            f"the objective needs the column {name!r}, which example {lacking[0]!r} does not have;"
            " use data that have it, or another objective"
        )
