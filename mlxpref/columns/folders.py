"""The rows columns are added to, and the folder that holds them afterwards.

Relabelled data stay relabelled data: recipe, counts and options are kept. Other data become a folder of splits that
``mlxpref relabel`` and ``train`` read like any data: pairs in TRL's preference columns, lists in ``responses``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxpref.columns.rows import Example
from mlxpref.columns.wanted import SCORES
from mlxpref.data.cards import CARD, MARK, VERSION, column_cards, with_card
from mlxpref.data.columns import unusable
from mlxpref.data.formats import SCORES as SCORE_NAMES
from mlxpref.data.relabel import per_response
from mlxpref.data.relabel_sources import own_splits
from mlxpref.data.relabelled import FileFormat, Relabelled, read_relabelled, write_relabelled
from mlxpref.data.rowfiles import parquet_schema, write_jsonl, write_parquet
from mlxpref.data.sources import SourceSpec, find_split, open_source, read_source
from mlxpref.files import folder_aside
from mlxpref.prepare import first_examples
from mlxpref.records import Conditioned, Counts, Message, Scored

_NESTED = ("prompt", "chosen", "rejected", "responses", "i_chosen", "i_rejected")


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        splits: split → rows.
        counts: what was dropped in reading, by stage.
        relabelled: the folder, where the data are relabelled.
        spec: what was asked for, where they are not.
        said: what was detected, a line each.
    """

    splits: dict[str, list[Example]]
    counts: dict[str, Counts]
    relabelled: Relabelled | None
    spec: SourceSpec
    said: tuple[str, ...] = ()


def read_folder(spec: SourceSpec) -> Found:
    """Every split of relabelled data, or the one asked for. DataError if there is none, or it is damaged."""
    folder = read_relabelled(spec.path)
    available = tuple(folder.splits)
    names = available if spec.split is None else (find_split(spec.split, available) or spec.split,)
    splits: dict[str, list[Example]] = {name: [*first_examples(folder.read(name), spec.limit)] for name in names}
    return Found(splits, {}, folder, spec, (f"{spec.path}: relabelled rows, splits {', '.join(names)}",))


def read_data(spec: SourceSpec, *, strict: bool = False) -> Found:
    """Every split of other data, or the one asked for. DataError as of :func:`mlxpref.data.sources.read_source`."""
    source = open_source(spec)
    said = list(source.said)
    if source.scale is not None and source.scale != (1.0, 10.0):
        scale = "{:g} {:g}".format(*source.scale)
        said.append(f"what is written does not say the scores' scale: relabel it with --score-range {scale}")
    splits: dict[str, list[Example]] = {}
    counts: dict[str, Counts] = {}
    for name, sources in own_splits([source]).items():
        rows, counts[f"read/{name}"] = read_source(sources, strict=strict)
        splits[name] = [*rows]
    return Found(splits, counts, None, spec, tuple(said))


def with_columns(row: Example, columns: Mapping[str, Any]) -> Example:
    """The row with these values; of other data those that `mlxpref relabel` reads become further scores."""
    if isinstance(row, Conditioned):
        return replace(row, extras={**row.extras, **columns})
    scores = {name: value for name, value in columns.items() if name in SCORES}
    others = {name: value for name, value in columns.items() if name not in scores}
    return replace(row, attributes={**row.attributes, **scores}, extras={**row.extras, **others})


def write_folder(
    out: Path, found: Found, splits: Mapping[str, Sequence[Example]], counts: Mapping[str, Counts],
    about: Mapping[str, Any], file_format: FileFormat | None = None,
) -> None:  # fmt: skip
    """Write the rows, all of them or nothing.

    Args:
        about: how the columns were made, JSON-safe.
        file_format: None: that of the relabelled data, else JSONL.

    Raises:
        RunError: the folder is occupied, or the disk refuses. DataError: a row holds what a file cannot.
    """
    if found.relabelled is None:
        _write_data(out, found, splits, counts, about, file_format or "jsonl")
        return
    folder = found.relabelled
    own = {name: Counts(stage["kept"], dict(stage["dropped"])) for name, stage in folder.counts.items()}
    kind: FileFormat = "parquet" if any(file.suffix == ".parquet" for file in folder.splits.values()) else "jsonl"
    rows = {name: [row for row in some if isinstance(row, Conditioned)] for name, some in splits.items()}
    options = {**folder.options, "columns": with_card(folder.options.get("columns", ()), about)}
    write_relabelled(
        out, rows, folder.recipe, file_format=file_format or kind, counts={**own, **counts}, written_with=options
    )


# --- other data ----------------------------------------------------------------------------------


def _write_data(
    out: Path, found: Found, splits: Mapping[str, Sequence[Example]], counts: Mapping[str, Counts],
    about: Mapping[str, Any], file_format: FileFormat,
) -> None:  # fmt: skip
    rows = {name: [row for row in some if isinstance(row, Scored)] for name, some in splits.items()}
    laid = _laid(rows)
    every = [row for some in laid.values() for row in some]
    schema = None if file_format == "jsonl" else parquet_schema(list(every[0]), {}, every, nested=_NESTED)
    card = {
        MARK: VERSION,
        "source": found.spec.path,
        "splits": {name: len(some) for name, some in rows.items()},
        "counts": {name: {"kept": own.kept, "dropped": own.dropped} for name, own in counts.items()},
        "columns": with_card(column_cards(found.spec.path), about),
    }
    with folder_aside(out) as aside:
        for name, some in laid.items():
            file = aside / f"{name}.{file_format}"
            named = ((str(row["example_id"]), row) for row in some)
            if schema is None:
                write_jsonl(file, named)
            else:
                write_parquet(file, named, schema)
        (aside / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def _laid(splits: Mapping[str, Sequence[Scored]]) -> dict[str, list[dict[str, Any]]]:
    """Rows as a file holds them, all in one form and with the same columns."""
    every = [row for rows in splits.values() for row in rows]
    lay = _joint if "instructions" in every[0].extras else _pair if _are_pairs(every) else _list
    laid = {name: [lay(row) for row in rows] for name, rows in splits.items()}
    columns = dict.fromkeys(column for rows in laid.values() for row in rows for column in row)
    return {name: [{column: row.get(column) for column in columns} for row in rows] for name, rows in laid.items()}


def _are_pairs(rows: Sequence[Scored]) -> bool:
    """Whether each row has two responses, and scores whose names say the same when they are columns of sides."""
    names = {name for row in rows for name in row.attributes}
    plain = all(name.isidentifier() and "chosen" not in name and "rejected" not in name for name in names)
    return plain and not names & {*SCORE_NAMES, "i", "r"} and all(len(row.responses) == 2 for row in rows)


def _pair(row: Scored) -> dict[str, Any]:
    chosen, rejected = row.responses
    sides = {"chosen": _turn(chosen), "rejected": _turn(rejected)}
    return {"prompt": _turns(row.prompt), **sides, **_sides(row), **_carried(row)}


def _joint(row: Scored) -> dict[str, Any]:
    """A pair whose responses have a prompt each."""
    prompts = row.extras["instructions"]
    texts = {f"r_{side}": text for side, text in zip(_SIDES, row.responses, strict=True)}
    return {f"i_{side}": prompt for side, prompt in zip(_SIDES, prompts, strict=True)} | {
        **texts, **_sides(row), **_carried(row),
    }  # fmt: skip


_SIDES = ("chosen", "rejected")


def _sides(row: Scored) -> dict[str, Any]:
    """Scores in columns of two sides."""
    scores = {} if row.scores is None else {"score": row.scores}
    named = {**scores, **row.attributes}
    return {f"{name}_{side}": values[at] for name, values in named.items() for at, side in enumerate(_SIDES)}


def _list(row: Scored) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    for place, text in enumerate(row.responses):
        own = {name: values[place] for name, values in row.attributes.items()}
        score = {} if row.scores is None else {"score": row.scores[place]}
        answers.append({"text": text, **score, **({"attributes": own} if own else {})})
    return {"prompt": _turns(row.prompt), "responses": answers, **_carried(row)}


def _carried(row: Scored) -> dict[str, Any]:
    """The columns that are carried along; what could not be used is left out."""
    kept = {name: value for name, value in row.extras.items() if name != "instructions" and not unusable(value)}
    n = len(row.responses)
    return {
        "example_id": row.example_id,
        **{name: list(value) if per_response(value, n) else value for name, value in kept.items()},
    }


def _turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _turns(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.as_dict() for message in prompt]
