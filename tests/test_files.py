"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxpref.errors import RunError
from mlxpref.files import write_text, written_aside


def test_a_file_appears_with_its_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "Grüße\u2028\r\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "Grüße\u2028\r\n".encode()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
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
