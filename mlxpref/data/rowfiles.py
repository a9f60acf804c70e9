"""Rows in JSONL and Parquet files: what is written is read back, by us and by other programs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxpref.errors import DataError

Row = dict[str, Any]

PARQUET_ROWS = 1000
"""Rows of a Parquet row group."""

_JSON = {b"mlxpref": b"json"}
"""Metadata of a Parquet column whose values are JSON text, because no one Arrow type fits them."""


def read_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """("file:line" or "file:row", row) for each row of a ``.jsonl`` or ``.parquet`` file.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    reader = _parquet_rows if file.suffix == ".parquet" else _jsonl_rows
    try:
        yield from reader(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


# --- JSONL ---


def write_jsonl(file: Path, rows: Iterable[tuple[str, Row]]) -> None:
    """Write (id, row) pairs, one JSON object a line, UTF-8. DataError names a row that JSON cannot hold."""
    with file.open("wb") as lines:
        for name, row in rows:
            lines.write(json_line(name, row))


def json_line(name: str, row: Row) -> bytes:
    """A row as a line of such a file. DataError, with its name, if JSON cannot hold it."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        return (_one_line(text) + "\n").encode("utf8")
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise DataError(f"example {name!r} cannot be written as JSON: {error}") from error


def _one_line(text: str) -> str:
    """The separators that some readers take for the end of a line, escaped."""
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: a JSON object is needed, not {type(row).__name__}")
            yield f"{file}:{number}", row


# --- Parquet ---


def parquet_schema(
    columns: Sequence[str], fixed: Mapping[str, Any], rows: Iterable[Row], *, nested: Collection[str] = ()
) -> Any:
    """One schema for all splits: ``fixed`` Arrow types by column, the others inferred from the rows.

    A free column of mappings, or of values that no one Arrow type holds, becomes JSON text: Arrow
    would give every mapping the keys of all of them. The columns ``nested`` stay as they are, since
    other programs look into them.

    Raises:
        DataError: no one Arrow type fits a nested column.
    """
    import pyarrow as pa

    values: dict[str, list[Any]] = {name: [] for name in columns if name not in fixed}
    for row in rows if values else ():
        for name, found in values.items():
            found.append(row[name])
    free = [
        _nested_field(name, found) if name in nested else _free_field(name, found)
        for name, found in values.items()
    ]
    by_name = {field.name: field for field in free} | {
        name: pa.field(name, type_) for name, type_ in fixed.items()
    }
    return pa.schema([by_name[name] for name in columns])


def _free_field(name: str, values: Sequence[Any]) -> Any:
    import pyarrow as pa

    as_text = pa.field(name, pa.string(), metadata=_JSON)
    if any(_holds_mapping(value) for value in values):
        return as_text
    try:
        return pa.field(name, pa.array(values).type)
    except pa.ArrowException:
        return as_text


def _nested_field(name: str, values: Sequence[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.field(name, pa.array(values).type)
    except pa.ArrowException as error:
        raise DataError(f"Parquet cannot hold the column {name} ({error}); write JSONL instead") from error


def _holds_mapping(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_mapping(item) for item in value)
    return isinstance(value, Mapping)


def write_parquet(file: Path, rows: Iterable[tuple[str, Row]], schema: Any) -> None:
    """Write (id, row) pairs under a schema. DataError names the rows that do not fit it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text_columns = [field.name for field in schema if field.metadata == _JSON]
    with pq.ParquetWriter(file, schema) as writer:
        for some in _groups(rows, PARQUET_ROWS):
            try:
                fitted = [_with_text(row, text_columns) for _, row in some]
                writer.write_table(pa.Table.from_pylist(fitted, schema=schema))
            except (pa.ArrowException, TypeError, ValueError) as error:
                where = f"examples {some[0][0]!r} to {some[-1][0]!r}"
                raise DataError(f"{where} cannot be written as Parquet: {error}") from error


def _groups(rows: Iterable[tuple[str, Row]], size: int) -> Iterator[list[tuple[str, Row]]]:
    group: list[tuple[str, Row]] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _with_text(row: Row, names: Sequence[str]) -> Row:
    return row | {name: json.dumps(row[name], allow_nan=False) for name in names if row[name] is not None}


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            text_columns = [
                f.name for f in parquet.schema_arrow if (f.metadata or {}).get(b"mlxpref") == b"json"
            ]
            number = 0
            for batch in parquet.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    row |= {name: json.loads(row[name]) for name in text_columns if row[name] is not None}
                    yield f"{file}:{number}", _without_nulls(row)
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a whole Parquet file: {error}") from error


def _without_nulls(row: Row) -> Row:
    """The row, its nested mappings without the keys that Arrow added to make them alike."""
    return {name: _pruned(value) for name, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value
