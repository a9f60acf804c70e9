"""Relabelled data on disk: TRL's conversational preference columns, and what else we know of a row.

A folder holds ``recipe.json`` (the recipe, the counts, which file is which split) and a JSONL or
Parquet file for each split. Its columns: ``prompt``, ``chosen``, ``rejected`` (message lists),
``goal``, ``goal_text``, ``half``, ``score_chosen``, ``score_rejected`` (goal units), ``example_id``;
with lists of more than two also ``responses`` (message lists, best first) and ``scores``, where
``chosen`` and ``rejected`` are the best and the worst; then ``attributes`` and extras by name. Every
row has every column, so that a reader may infer types from any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched, chain
from pathlib import Path
from typing import Any, Literal

from mlxpref.data.recipe import Recipe
from mlxpref.errors import DataError, UsageError
from mlxpref.files import written_aside
from mlxpref.records import Conditioned, Counts, Message

MARK = "mlxpref_relabelled"
VERSION = 1
CARD = "recipe.json"

FileFormat = Literal["jsonl", "parquet"]

FIXED = (
    "prompt", "chosen", "rejected", "responses", "goal", "goal_text", "half", "score_chosen",
    "score_rejected", "scores", "example_id", "attributes",
)  # fmt: skip

PARQUET_ROWS = 1000
"""Rows of a Parquet row group."""


@dataclass(frozen=True)
class Relabelled:
    """A folder that was written by :func:`write_relabelled`.

    Attributes:
        recipe: how its goals were written; None if it holds unconditioned rows only.
        splits: split → file.
        counts: as stored: rows kept and dropped, with reasons.
        extras: extra column → "response" if it has one entry a response, else "prompt".
    """

    folder: Path
    recipe: Recipe | None
    splits: Mapping[str, Path]
    counts: Mapping[str, Any]
    extras: Mapping[str, str]
    rows: Mapping[str, int]

    def read(self, split: str = "train") -> list[Conditioned]:
        """Every row of a split. DataError if there is no such split, or its file is damaged."""
        if split not in self.splits:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        file = self.splits[split]
        rows = []
        for where, row in _file_rows(file):
            try:
                rows.append(_from_row(row, self.extras))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DataError(f"{where}: not a relabelled row ({type(error).__name__}: {error})") from error
        if len(rows) != self.rows[split]:
            raise DataError(
                f"{file} holds {len(rows)} rows, {CARD} says {self.rows[split]}: the file was changed or cut "
                "off; relabel again"
            )
        return rows


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
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"{path} names files that are not there: {', '.join(missing)}")
    return Relabelled(folder, recipe, files, counts, found_extras, rows)


def write_relabelled(
    folder: Path,
    splits: Mapping[str, Sequence[Conditioned]],
    recipe: Recipe | None,
    *,
    file_format: FileFormat = "jsonl",
    counts: Counts | Mapping[str, Counts] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder of relabelled data: all of it, or nothing.

    Args:
        folder: must be free; with ``overwrite`` relabelled data there are replaced.
        splits: train, valid, test, …: rows; each split is one file, in order.
        counts: what was kept and dropped on the way, of all or by stage.

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
    }
    replaceable = is_relabelled if overwrite else None
    with written_aside(folder, replaceable=replaceable) as aside:
        for name, rows in splits.items():
            write = _write_jsonl if file_format == "jsonl" else _write_parquet
            write(aside / f"{name}.{file_format}", rows, layout)
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


def _layout(rows: Iterable[Conditioned]) -> _Layout:
    lists = False
    attributes: dict[str, None] = {}
    goals: dict[str, None] = {}
    extras: dict[str, str] = {}
    for row in rows:
        lists = lists or len(row.responses) > 2
        attributes |= dict.fromkeys(row.attributes)
        goals |= dict.fromkeys(row.goal if isinstance(row.goal, Mapping) else ())
        for name, value in row.extras.items():
            own = isinstance(value, tuple) and len(value) == len(row.responses)
            extras[name] = "response" if own else extras.get(name, "prompt")
    taken = sorted(set(extras) & set(FIXED))
    if taken:
        raise DataError(f"extra columns bear names of our own: {', '.join(taken)}; rename them in the source")
    return _Layout(lists, tuple(attributes), extras, tuple(goals))


def _to_row(row: Conditioned, layout: _Layout) -> dict[str, Any]:
    """A row as a file holds it: new objects only, numbers always floats, every column present."""
    turns = [[{"role": "assistant", "content": text}] for text in row.responses]
    scores = None if row.scores is None else [float(v) for v in row.scores]
    goal: Any = row.goal
    if isinstance(goal, Mapping):
        goal = {name: float(goal[name]) for name in layout.goals}
    columns: dict[str, Any] = {
        "prompt": [message.as_dict() for message in row.prompt],
        "chosen": turns[0],
        "rejected": turns[-1],
        "goal": float(goal) if isinstance(goal, (int, float)) else goal,
        "goal_text": row.goal_text,
        "half": row.half,
        "score_chosen": scores[0] if scores else None,
        "score_rejected": scores[-1] if scores else None,
        "example_id": row.example_id,
    }
    if layout.lists:
        columns |= {"responses": turns, "scores": scores}
    if layout.attributes:
        own = {name: list(map(float, values)) for name, values in row.attributes.items()}
        columns["attributes"] = {name: own.get(name) for name in layout.attributes}
    return columns | {name: row.extras.get(name) for name in layout.extras}


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
        extras={
            name: tuple(v) if extras[name] == "response" and isinstance(v, list) else v
            for name, v in found.items()
        },
    )


# --- files ---


def _file_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL or Parquet file."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    with file.open(encoding="utf8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON ({error})") from error
            yield f"{file}:{number}", row


def _write_jsonl(file: Path, rows: Sequence[Conditioned], layout: _Layout) -> None:
    with file.open("w", encoding="utf8", newline="\n") as lines:
        for row in rows:
            try:
                text = json.dumps(_to_row(row, layout), ensure_ascii=False, allow_nan=False)
                lines.write(_one_line(text) + "\n")
            except (UnicodeEncodeError, TypeError, ValueError) as error:
                raise DataError(f"example {row.example_id!r} cannot be written as JSON: {error}") from error


def _one_line(text: str) -> str:
    """The separators that some readers take for the end of a line, escaped."""
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def _write_parquet(file: Path, rows: Sequence[Conditioned], layout: _Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(rows, layout)
    as_json = [f.name for f in schema if f.metadata and f.metadata.get(b"mlxpref") == b"json"]
    with pq.ParquetWriter(file, schema) as writer:
        for some in batched(rows, PARQUET_ROWS):
            found = [_to_row(row, layout) for row in some]
            for row in found:
                row |= {name: None if row[name] is None else json.dumps(row[name]) for name in as_json}
            try:
                writer.write_table(pa.Table.from_pylist(found, schema=schema))
            except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
                near = f"{some[0].example_id!r} to {some[-1].example_id!r}"
                raise DataError(f"examples {near} cannot be written as Parquet: {error}") from error
