"""Files and folders that appear under their name whole, or not at all.

Both forms give a free name that begins with a dot beside the final one, and rename it once everything
in it is on the disk. What a killed process leaves behind ends in ``.part``, or in ``.old`` if it was
being replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlxpref.errors import RunError

ELSEWHERE = "free some space or choose another place"

Replaceable = Callable[[Path], bool]
"""May the folder that is there go?"""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a free name beside ``path`` to write to; on leaving, move what was written to ``path``.

    Whatever goes wrong inside, ``path`` stays as it was and nothing is left beside it. Missing parent
    folders are made. Any number of processes may write the same path: the last whole file stays.

    Raises:
        RunError: the file system refuses (full disk, no permission, a folder in the way).
    """
    aside = _beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        os.replace(aside, path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        with suppress(OSError):  # what is said is why it could not be written
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8, line ends as given) under its name, or raise RunError."""
    with written_aside(path) as aside:
        aside.write_bytes(text.encode("utf-8"))


@contextmanager
def folder_aside(folder: Path, *, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Give an empty folder beside ``folder`` to fill; on leaving, rename it to ``folder``.

    Whatever goes wrong inside, ``folder`` stays as it was and nothing is left beside it.

    Raises:
        RunError: the folder is occupied (see :func:`check_free`), or the file system refuses.
    """
    check_free(folder, replaceable)
    aside, old = _beside(folder, "part"), _beside(folder, "old")
    try:
        aside.mkdir(parents=True)
        yield aside
        for inner in (*aside.rglob("*"), aside):
            _sync(inner)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        _sync(folder.parent)
    except OSError as error:
        raise refused(folder, error) from error
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def check_free(folder: Path, replaceable: Replaceable | None = None) -> None:
    """RunError if the folder holds anything, unless ``replaceable`` says that this may go."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(f"{folder} is there already and is not a folder; choose another one")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if replaceable is None:
        raise RunError(f"{folder} is not empty; choose another folder, or replace its data with --overwrite")
    if not replaceable(folder):
        raise RunError(f"{folder} holds something else than what would be written; it is not overwritten")


def refused(path: Path, error: Exception, remedy: str = ELSEWHERE) -> RunError:
    """What to raise when the disk, or a library that writes to it, said no: why, GB free, the remedy."""
    cause = error.__cause__ if isinstance(error, RunError) and error.__cause__ else error
    why = getattr(cause, "strerror", None) or cause
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free / 1e9
    return RunError(
        f"cannot write {path}: {why} ({free:.2f} GB free there). Nothing was left under that name; {remedy}"
    )


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → ``dtype``, ``shape`` and ``data_offsets`` of a safetensors file.

    Raises:
        ValueError: it is cut off, as a failed write or a download that broke off leaves it, or no such file.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length) if 8 + length <= size else b"")
    wanted = ("dtype", "shape", "data_offsets")
    try:
        found = {name: {key: entry[key] for key in wanted} for name, entry in entries.items() if name != "__metadata__"}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in found.values()), default=0)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its header is not one of safetensors: {error!r}") from error
    if size != whole:
        raise ValueError(f"{size} bytes of {whole}")
    return found


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{end}")


def _sync(path: Path) -> None:
    """To the disk now: a rename may reach it before the bytes do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
