"""Relabelled data on disk: TRL's conversational preference columns, and what else we know of a row.

A folder holds ``recipe.json`` (the recipe, the counts, which file is which split) and a JSONL or
Parquet file for each split. Its columns: ``prompt``, ``chosen``, ``rejected`` (message lists),
``goal``, ``goal_text``, ``half``, ``score_chosen``, ``score_rejected`` (goal units), ``example_id``;
with lists of more than two also ``responses`` (message lists, best first) and ``scores``, where
``chosen`` and ``rejected`` are the best and the worst; with goals of several attributes also
``distances`` (squared, to the goal); then ``attributes`` and extras by name, those of the responses as lists
in their order. Every row has every column, so that a reader may infer types from any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mlxpref.data.processes import cores, shared_out
from mlxpref.data.recipe import Recipe
from mlxpref.data.rowfiles import json_line, parquet_schema, read_rows, write_jsonl, write_parquet
from mlxpref.data.stored import Stored, unpack
from mlxpref.data.words import counted
from mlxpref.errors import DataError, UsageError
from mlxpref.files import folder_aside
from mlxpref.records import Conditioned, Counts, Message

MARK = "mlxpref_relabelled"
VERSION = 1
CARD = "recipe.json"

FileFormat = Literal["jsonl", "parquet"]

FIXED = (
    "prompt", "chosen", "rejected", "responses", "goal", "goal_text", "half", "score_chosen",
    "score_rejected", "scores", "example_id", "attributes", "distances",
)  # fmt: skip


@dataclass(frozen=True)
class Relabelled:
    """A folder that was written by :func:`write_relabelled`.

    Attributes:
        recipe: how its goals were written; None if it holds unconditioned rows only.
        splits: split → file.
        counts: as stored: rows kept and dropped, with reasons.
        options: the arguments of ``relabel_all`` it was written with (halves, ties, min_gap, plain_share,
            seed) and its "sources"; empty if whoever wrote it did not say.
        extras: extra column → "response" if it has one entry a response, else "prompt".
    """

    folder: Path
    recipe: Recipe | None
    splits: Mapping[str, Path]
    counts: Mapping[str, Any]
    extras: Mapping[str, str]
    rows: Mapping[str, int]
    options: Mapping[str, Any]

    def read(self, split: str = "train") -> list[Conditioned]:
        """Every row of a split. DataError if there is no such split, or its file is damaged."""
        return list(self.stream(split))

    def stream(self, split: str = "train") -> RelabelledRows:
        """The rows of a split, read from its file each time they are gone through; errors as of :meth:`read`."""
        if split not in self.splits:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return RelabelledRows(self.splits[split], self.rows[split], self.extras)


@dataclass(frozen=True)
class RelabelledRows:
    """The rows of a relabelled file, in order, one in memory at a time; they can be gone through again.

    Attributes:
        rows: how many there are.
        extras: columns beyond the fixed ones, as of :class:`Relabelled`.

    Raises:
        DataError: when gone through: the file is damaged, or holds another number of rows.
    """

    file: Path
    rows: int
    extras: Mapping[str, str]

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Conditioned]:
        n = 0
        for where, row in read_rows(self.file):
            try:
                found = replace(_from_row(row, self.extras), where=where)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DataError(f"{where}: not a relabelled row ({type(error).__name__}: {error})") from error
            n += 1
            yield found
        if n != self.rows:
            raise DataError(
                f"{self.file} holds {counted(n, 'row')}, {CARD} says {self.rows}: the file was "
                "changed or cut off; relabel again"
            )


def is_relabelled(path: str | Path) -> bool:
    """Whether this is a folder of relabelled data."""
    try:
        card = json.loads((Path(path) / CARD).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and MARK in card


def read_relabelled(folder: str | Path) -> Relabelled:
    """Open a relabelled folder. DataError if it is none, damaged, or of a later version."""
    folder = Path(folder)
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise DataError(f"{folder} is not relabelled data: no readable {CARD} ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(card, dict) or card.get(MARK) != VERSION:
        found = card.get(MARK) if isinstance(card, dict) else None
        raise DataError(f"{path}: {MARK} is {found!r}; this mlxpref reads {VERSION}")
    try:
        files = {name: folder / entry["file"] for name, entry in card["splits"].items()}
        rows = {name: int(entry["rows"]) for name, entry in card["splits"].items()}
        recipe = None if card["recipe"] is None else Recipe.from_dict(card["recipe"])
        found_extras, counts = dict(card["extras"]), dict(card["counts"])
        options = dict(card.get("options", {}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"{path} names files that are not there: {', '.join(missing)}")
    return Relabelled(folder, recipe, files, counts, found_extras, rows, options)


def write_relabelled(
    folder: Path,
    splits: Mapping[str, Sequence[Conditioned]],
    recipe: Recipe | None,
    *,
    file_format: FileFormat = "jsonl",
    counts: Counts | Mapping[str, Counts] | None = None,
    written_with: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    num_proc: int | None = None,
) -> None:
    """Write a folder of relabelled data: all of it, or nothing.

    Args:
        folder: must be free; with ``overwrite`` relabelled data there are replaced.
        splits: train, valid, test, …: rows; each split is one file, in order.
        counts: what was kept and dropped on the way, of all or by stage.
        written_with: what :attr:`Relabelled.options` is to hold, JSON-safe.
        num_proc: processes that share rows that lie on disk; None: one a core.

    Raises:
        RunError: the folder is occupied or cannot be written.
        DataError: a row holds what a file cannot (text that is not Unicode, an extra that is not JSON).
    """
    if file_format not in ("jsonl", "parquet"):
        raise UsageError(f"unknown file format {file_format!r}; one of jsonl, parquet")
    if not any(splits.values()):
        raise DataError(f"no row is left to write to {folder}")
    layout = _layout(chain.from_iterable(splits.values()))
    named = {"all": counts} if isinstance(counts, Counts) else counts or {}
    card = {
        MARK: VERSION,
        "recipe": None if recipe is None else recipe.as_dict(),
        "counts": {name: {"kept": c.kept, "dropped": c.dropped} for name, c in named.items()},
        "splits": {
            name: {"file": f"{name}.{file_format}", "rows": len(rows)} for name, rows in splits.items()
        },
        "extras": layout.extras,
        "options": dict(written_with or {}),
    }
    replaceable = is_relabelled if overwrite else None
    schema = None if file_format == "jsonl" else _schema(chain.from_iterable(splits.values()), layout)
    with folder_aside(folder, replaceable=replaceable) as aside:
        for name, rows in splits.items():
            file = aside / f"{name}.{file_format}"
            named_rows = ((row.example_id, _to_row(row, layout)) for row in rows)
            if schema is not None:
                write_parquet(file, named_rows, schema)
            elif isinstance(rows, Stored):
                made = shared_out(_Lines(layout), rows.packed(), num_proc or cores())
                with file.open("wb") as lines, closing(made):
                    lines.writelines(made)
            else:
                write_jsonl(file, named_rows)
        text = json.dumps(card, indent=2, ensure_ascii=False)
        (aside / CARD).write_text(text + "\n", encoding="utf8")


# --- rows ---


@dataclass(frozen=True)
class _Layout:
    """Which columns the rows of a folder have beyond the plain pair's."""

    lists: bool
    attributes: tuple[str, ...]
    extras: dict[str, str]
    goals: tuple[str, ...]
    rich_turns: bool

    @property
    def columns(self) -> tuple[str, ...]:
        absent = set() if self.lists else {"responses", "scores"}
        absent |= set() if self.attributes else {"attributes"}
        absent |= set() if self.goals else {"distances"}
        return (*(name for name in FIXED if name not in absent), *self.extras)


@dataclass(frozen=True)
class _Lines:
    """A block of rows as lines of a JSONL file."""

    layout: _Layout

    def __call__(self, block: bytes) -> bytes:
        return b"".join(json_line(row.example_id, _to_row(row, self.layout)) for row in unpack(block))


def _layout(rows: Iterable[Conditioned]) -> _Layout:
    lists = rich_turns = False
    attributes: dict[str, None] = {}
    goals: dict[str, None] = {}
    extras: dict[str, str] = {}
    for row in rows:
        lists = lists or len(row.responses) > 2
        rich_turns = rich_turns or any(message.extra for message in row.prompt)
        attributes |= dict.fromkeys(row.attributes)
        goals |= dict.fromkeys(row.goal if isinstance(row.goal, Mapping) else ())
        for name, value in row.extras.items():
            own = isinstance(value, tuple) and len(value) == len(row.responses)
            extras[name] = "response" if own else extras.get(name, "prompt")
    taken = sorted(set(extras) & set(FIXED))
    if taken:
        raise DataError(f"extra columns bear names of our own: {', '.join(taken)}; rename them in the source")
    return _Layout(lists, tuple(attributes), extras, tuple(goals), rich_turns)


def _to_row(row: Conditioned, layout: _Layout) -> dict[str, Any]:
    """A row as a file holds it: new objects only, numbers always floats, every column present."""
    turns = [[{"role": "assistant", "content": text}] for text in row.responses]
    scores = None if row.scores is None else [float(v) for v in row.scores]
    goal: Any = row.goal
    if isinstance(goal, Mapping):
        goal = {name: float(goal[name]) for name in layout.goals}
    own = {name: list(map(float, values)) for name, values in row.attributes.items()}
    values: dict[str, Any] = {
        **{name: row.extras.get(name) for name in layout.extras},
        "prompt": [message.as_dict() for message in row.prompt],
        "chosen": turns[0],
        "rejected": turns[-1],
        "goal": float(goal) if isinstance(goal, (int, float)) else goal,
        "goal_text": row.goal_text,
        "half": row.half,
        "score_chosen": scores[0] if scores else None,
        "score_rejected": scores[-1] if scores else None,
        "example_id": row.example_id,
        "responses": turns,
        "scores": scores,
        "attributes": {name: own.get(name) for name in layout.attributes},
        "distances": None if row.distances is None else list(row.distances),
    }
    return {name: values[name] for name in layout.columns}


def _from_row(row: Mapping[str, Any], extras: Mapping[str, str]) -> Conditioned:
    """The value that ``_to_row`` wrote."""
    turns = row.get("responses") or (row["chosen"], row["rejected"])
    responses = tuple(str(turn[-1]["content"]) for turn in turns)
    pair = (row["score_chosen"], row["score_rejected"])
    scores = row.get("scores") or (None if None in pair else pair)
    found = {name: row[name] for name in extras if row.get(name) is not None}
    return Conditioned(
        prompt=tuple(Message.from_dict(message) for message in row["prompt"]),
        responses=responses,
        goal=row["goal"],
        goal_text=row["goal_text"],
        half=row["half"],
        scores=None if scores is None else tuple(map(float, scores)),
        example_id=row["example_id"],
        attributes={
            name: tuple(map(float, values))
            for name, values in (row.get("attributes") or {}).items()
            if values is not None
        },
        distances=None if row.get("distances") is None else tuple(map(float, row["distances"])),
        extras={
            name: tuple(v) if extras[name] == "response" and isinstance(v, list) else v
            for name, v in found.items()
        },
    )


def _schema(rows: Iterable[Conditioned], layout: _Layout) -> Any:
    """The Parquet schema of these rows. Prompts whose turns hold more than text are inferred."""
    import pyarrow as pa

    number, text = pa.float64(), pa.string()
    turns = pa.list_(pa.struct([("role", text), ("content", text)]))
    fixed = {
        "prompt": turns,
        "chosen": turns,
        "rejected": turns,
        "responses": pa.list_(turns),
        "goal": pa.struct([(name, number) for name in layout.goals]) if layout.goals else number,
        "goal_text": text,
        "half": text,
        "score_chosen": number,
        "score_rejected": number,
        "scores": pa.list_(number),
        "distances": pa.list_(number),
        "example_id": text,
        "attributes": pa.struct([(name, pa.list_(number)) for name in layout.attributes]),
    }
    if layout.rich_turns:
        del fixed["prompt"]
    columns = layout.columns
    return parquet_schema(
        columns,
        {name: fixed[name] for name in columns if name in fixed},
        (_to_row(row, layout) for row in rows),
        nested=("prompt",),
    )
