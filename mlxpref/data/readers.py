"""Rows of one text file, each with the place it came from: JSON lines, a JSON array, CSV.

JSON lines are read here and not by ``datasets``, whose reader tells no line numbers, fixes each
column's type by the first block of the file (a later row with a list where others hold text fails
the whole file), and adds to every row the keys of all others. CSV is read here because pandas takes
the words "N/A" and "null" for missing values, and a response may be just that. Both go through a file
of any size row by row; only a JSON array is held in memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlxpref.data.words import counted
from mlxpref.errors import DataError

Rows = Iterator[tuple[str, Any]]
"""Pairs of a place ("train.jsonl:7") and what stands there, normally a dict by column."""


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if it ends in .gz; every failure to read them is a DataError."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            yield stream  # type: ignore[misc]  # a GzipFile reads as any binary file does
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: a damaged gzip file ({error}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error


def _text(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error


def read_jsonl(file: Path) -> Rows:
    """One JSON value a line; blank lines are passed over but counted.

    Only a line feed ends a line: U+2028 and its like may stand inside strings.

    Raises:
        DataError: naming file and line, for what is not JSON or not UTF-8.
    """
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            place = f"{file.name}:{number}"
            text = _text(line, f"{file}:{number}").strip()
            if text:
                yield place, _parsed(text, f"{file}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: broken JSON: {error.msg} at column {error.colno}; mend or delete this line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: cannot be read as JSON ({error}); mend or delete this line") from error


def read_json(file: Path) -> Rows:
    """An array of rows, alone or under "data" or "rows" in an object; or JSON lines after all.

    Places are counted in rows, the first being 1.
    """
    with _opened(file) as stream:
        head = _first_line(stream)
    if _is_row(head):
        yield from read_jsonl(file)
        return
    with _opened(file) as stream:
        text = _text(stream.read(), str(file))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error
    array = _array(value)
    if array is None:
        raise DataError(f"{file}: holds no array of rows; give JSON lines, or one array of objects")
    for number, row in enumerate(array, 1):
        yield f"{file.name}:{number}", row


def _first_line(stream: IO[bytes]) -> bytes:
    return next((line.strip() for line in stream if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")


def _is_row(line: bytes) -> bool:
    """Whether a line is a whole JSON object, and not one around an array of rows."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and _array(value) is None


def _array(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        value = next((value[key] for key in ("data", "rows") if key in value), None)
    return value if isinstance(value, list) else None


def read_csv(file: Path) -> Rows:
    """Rows under a header line; every cell is text, an empty one None. Places are lines, where a row ends."""
    # The module's limit of 128 kB a cell is below a long response, and it is one for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))
    with _opened(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
            for cells in reader:
                if not cells:
                    continue
                if header is None or len(cells) != len(header):
                    columns = counted(len(header or ()), "column")
                    raise DataError(
                        f"{file}:{reader.line_num}: {counted(len(cells), 'cell')} under {columns}; "
                        "a text with a comma or line break must stand in double quotes"
                    )
                row = dict(zip(header, (cell or None for cell in cells), strict=True))
                yield f"{file.name}:{reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: broken CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{reader.line_num + 1}: not UTF-8; save the file as UTF-8") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
}
"""Reader of each file name ending; ``.gz`` may follow any of them. Parquet goes through ``datasets``."""


def ending(file: Path) -> str:
    """The ending that names the kind of file: ".jsonl" of "a.jsonl.gz"."""
    return Path(file.stem).suffix.lower() if file.suffix == ".gz" else file.suffix.lower()
