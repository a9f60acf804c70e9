"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mlxpref.errors import RunError
from mlxpref.files import folder_aside, write_text, written_aside

FAILURES = [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")]


def test_a_file_appears_with_its_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "Grüße\u2028\r\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "Grüße\u2028\r\n".encode()


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)), written_aside(file) as aside:
        aside.write_text("half of the n")
        raise error
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(RunError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_refusal_says_why_how_much_is_free_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught, folder_aside(tmp_path / "a" / "b"):
        raise OSError(28, "No space left on device")
    why = r"cannot write .*b: No space left on device \(\d+\.\d\d GB free there\)"
    assert re.match(why + r"\. Nothing was left .*free some space", str(caught.value))


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("old")
    kind = RunError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind), folder_aside(folder, replaceable=lambda _: True) as aside:
        (aside / "x").write_text("half of the n")
        raise error
    assert (folder / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("old")
    rename = os.rename

    def refuses_the_new(source: Path, target: Path) -> None:
        if source.suffix == ".part":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses_the_new)
    with pytest.raises(RunError), folder_aside(folder, replaceable=lambda _: True) as aside:
        (aside / "x").write_text("new")
    assert (folder / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut leaves an empty file under a name that promises a whole one."""
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        there = [p for p in tmp_path.rglob("*") if os.path.samestat(p.stat(), os.fstat(descriptor))]
        synced.extend(p.name for p in there)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    with folder_aside(tmp_path / "a") as aside:
        (aside / "inner").mkdir()
        for name in ("x", "inner/y"):
            (aside / name).write_text("text")
    assert {"x", "y", "inner"} < set(synced)
    assert any(name.endswith(".part") for name in synced), "the folder's own entries"
