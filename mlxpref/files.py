"""Files that appear under their name whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxpref.errors import RunError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a free name beside ``path`` to write to; on leaving, move what was written to ``path``.

    Whatever goes wrong inside, ``path`` stays as it was and nothing is left beside it. Missing parent
    folders are made. Any number of processes may write the same path: the last whole file stays.

    Raises:
        RunError: the file system refuses (full disk, no permission, a folder in the way).
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb+") as stream:  # a rename may reach the disk before the bytes do
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left under that name; "
            "free some space or choose another place."
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8, line ends as given) under its name, or raise RunError."""
    with written_aside(path) as aside:
        aside.write_bytes(text.encode("utf-8"))
