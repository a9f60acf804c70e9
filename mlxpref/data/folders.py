"""Folders that appear under their name whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxpref.errors import RunError

Replaceable = Callable[[Path], bool]


def check_free(folder: Path, replaceable: Replaceable | None = None) -> None:
    """RunError if the folder holds anything, unless ``replaceable`` says that this may go."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunError(f"{folder} is there already and is not a folder; choose another --out")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if replaceable is None:
        raise RunError(f"{folder} is not empty; choose another folder, or replace its data with --overwrite")
    if not replaceable(folder):
        raise RunError(f"{folder} holds something else than what would be written; it is not overwritten")


@contextmanager
def folder_aside(folder: Path, *, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Give an empty folder beside ``folder`` to fill; on leaving, rename it to ``folder``.

    Whatever goes wrong inside, ``folder`` stays as it was and nothing is left beside it.

    Raises:
        RunError: the folder is occupied (see :func:`check_free`), or the file system refuses.
    """
    check_free(folder, replaceable)
    mark = secrets.token_hex(4)
    aside, old = (folder.with_name(f".{folder.name}.{mark}.{end}") for end in ("part", "old"))
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            _sync(file)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
    except OSError as error:
        raise RunError(
            f"cannot write {folder}: {error.strerror or error}. Nothing was left under that name; "
            "free some space or choose another place."
        ) from error
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def _sync(file: Path) -> None:
    """To the disk before the rename, which may reach it first."""
    if file.is_file():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
