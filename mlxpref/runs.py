"""A run on disk: whole or not there, at every moment.

Whatever has its final name is complete; whatever is being made has a name that begins with a dot.
A process may be killed between any two instructions here, and the next one goes on from the last
checkpoint that is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlxpref.errors import RunError
from mlxpref.files import file_digest, folder_aside, refused, safetensors_header, write_text, written_aside
from mlxpref.locks import locked

CONFIG = "config.yaml"
FACTS = "run.json"
METRICS = "metrics.jsonl"
STATE = "state.json"
BEST = "best"
ADAPTER = ("adapters.safetensors", "adapter_config.json")

_NAME = re.compile(r"step-(\d{6,})")

Write = Callable[[Path], None]
"""Writes adapter and step state into the folder it is given."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder, the steps it has behind it, and what the loop remembers."""

    folder: Path
    step: int
    state: Mapping[str, Any]


class RunFolder:
    """The files of one run; one process at a time holds it, through :func:`open_run`.

    Attributes:
        path: the run folder.
        said: what was noticed while opening: damaged checkpoints, in words.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self._metrics: IO[bytes] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    # --- beginning and going on ---

    def begin(self, config: str, facts: Mapping[str, Any]) -> None:
        """Write the resolved configuration (YAML) and the run's facts. RunError if the disk refuses."""
        write_text(self.path / CONFIG, config)
        write_text(self.path / FACTS, json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n")

    def facts(self) -> dict[str, Any]:
        """What ``begin`` wrote; empty where nothing was."""
        try:
            found = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / FACTS}: cannot be read ({error}); start a new run") from error
        return dict(found)

    def last_checkpoint(self) -> Checkpoint | None:
        """The latest checkpoint whose files are those that were written; later damaged ones are said."""
        for step, folder in reversed(list(_numbered(self.checkpoints))):
            try:
                return Checkpoint(folder, step, _read_state(folder))
            except (OSError, ValueError, KeyError) as error:
                self.said.append(f"checkpoint {folder} is damaged ({error}) and is passed over")
        return None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Take away what an interrupted process wrote beyond a checkpoint, and make it the latest."""
        step = checkpoint.step if checkpoint is not None else 0
        for later, folder in list(_numbered(self.checkpoints)):
            if later > step:
                _remove(folder)
        self._truncate_metrics(step, open_step=checkpoint is not None and checkpoint.state.get("pending"))
        if checkpoint is not None:
            self._publish(checkpoint.folder)

    def _truncate_metrics(self, step: int, *, open_step: Any) -> None:
        file = self.path / METRICS
        if not file.exists():
            return
        kept = [line for line in file.read_text(encoding="utf-8").split("\n") if _step_of(line) <= step]
        if open_step:  # this step's line is written once its evaluation is there
            kept = [line for line in kept if _step_of(line) < step]
        write_text(file, "".join(f"{line}\n" for line in kept))

    # --- as it goes ---

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one step's metrics as a line of JSON; what is not finite becomes null.

        Raises:
            RunError: the disk refuses; no half line is left.
        """
        line = json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n"
        if self._metrics is None:
            self._metrics = (self.path / METRICS).open("ab", buffering=0)
        end = self._metrics.seek(0, os.SEEK_END)
        data = line.encode("utf-8")
        try:
            if self._metrics.write(data) != len(data):
                raise OSError("only part of the line was written")
        except OSError as error:
            self._metrics.truncate(end)
            raise refused(self.path / METRICS, error, _RESUME) from error

    def save(self, step: int, write: Write, state: Mapping[str, Any], *, keep_last: int | None) -> Path:
        """Write a checkpoint, make its adapter the run's, and remove checkpoints beyond ``keep_last``.

        Raises:
            RunError: the disk refuses; earlier checkpoints are as they were.
        """
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        folder = self.checkpoints / f"step-{step:06d}"
        with _replaced(folder) as aside:
            write(aside)
            _seal(aside, {"step": step, **state})
        self._publish(folder)
        whole = [found for _, found in _numbered(self.checkpoints)]
        for old in [] if keep_last is None else whole[: max(0, len(whole) - keep_last)]:
            _remove(old)
        return folder

    def save_best(self, write: Write, facts: Mapping[str, Any]) -> Path:
        """Replace ``best/`` by the adapter as it is now. RunError if the disk refuses."""
        folder = self.path / BEST
        with _replaced(folder) as aside:
            write(aside)
            _seal(aside, facts)
        return folder

    def _publish(self, folder: Path) -> None:
        """Copy a checkpoint's adapter to the top of the run folder, where mlx-lm looks for it."""
        for name in ADAPTER:
            if (folder / name).exists():
                with written_aside(self.path / name) as aside:
                    shutil.copyfile(folder / name, aside)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


@contextmanager
def open_run(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """Hold a run folder until the end of the block.

    A folder in which nothing was begun is left as it was found.

    Raises:
        RunError: it holds a run already and ``resume`` is False; there is nothing to resume; another
            process is at it; or it cannot be written.
    """
    if resume and not (path / CONFIG).is_file():
        raise RunError(f"{path}: no run to resume here (no {CONFIG}); start it without --resume")
    if not resume:
        check_free(path)
    with locked(path, what=f"{path}: another process is training here; wait for it or choose another path"):
        if not resume:
            check_free(path)
        _clear_unfinished(path)
        run = RunFolder(path)
        try:
            yield run
        finally:
            run.close()


def check_free(path: Path) -> None:
    """Nothing but what a run that failed before its first step may have left is in the folder, if it is there.

    Raises:
        RunError: it is a file, holds a run or an adapter, or files that are somebody's.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file, not a folder; choose another --adapter-path")
    metrics = path / METRICS
    held = (
        next(_numbered(path / "checkpoints"), None) is not None
        or any((path / name).exists() for name in ADAPTER)
        or (metrics.is_file() and metrics.stat().st_size > 0)
    )
    if held and (path / CONFIG).is_file():
        raise RunError(
            f"{path}: already holds a run. Go on with it (--resume --adapter-path {path}), or choose another "
            "--adapter-path"
        )
    if held:
        raise RunError(f"{path}: already holds an adapter that is not a run's; choose another --adapter-path")
    # A run that failed before its first step may have left these; anything else is somebody's.
    ours = {CONFIG, FACTS, METRICS, "checkpoints"}
    names = sorted(found.name for found in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if name not in ours and not name.startswith(".")]
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise RunError(
            f"{path}: is not empty ({shown}), and a run needs a folder of its own; choose another --adapter-path"
        )


def _clear_unfinished(path: Path) -> None:
    """Remove what a killed process was making; put back what it was replacing."""
    replaced = next(path.glob(f".{BEST}.*.old"), None)
    if replaced is not None and not (path / BEST).exists():
        os.rename(replaced, path / BEST)
    for found in [*path.glob(".*.part"), *path.glob(".*.old"), *path.glob("checkpoints/.*")]:
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def checkpoint_folders(path: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints that a run folder holds, by rising step; empty for any other folder."""
    return [(step, folder) for step, folder in _numbered(path / "checkpoints") if (folder / STATE).is_file()]


# --- folders that are whole ---

_RESUME = "earlier checkpoints are whole; free some space and go on with --resume"


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of ``folder``.

    Raises:
        RunError: the disk refuses, or a library reports that a write failed; ``folder`` is unchanged.
    """
    try:
        with folder_aside(folder, replaceable=lambda _: True) as aside:
            yield aside
    except (RuntimeError, ValueError, RunError) as error:  # array libraries raise the first two
        raise refused(folder, error, _RESUME) from error


def _seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``state.json`` last, with the digest of every file beside it."""
    files = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        files[file.name] = file_digest(file)
    text = json.dumps({**state, "files": files}, indent=1, ensure_ascii=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def _read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state; ValueError naming the file that is not as it was written."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for name, digest in state["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if file_digest(folder / name) != digest:
            raise ValueError(f"{name} has changed")
    return dict(state)


def _check_safetensors(file: Path) -> None:
    """OSError if a file is not as long as its header says: a library that did not notice a failed write leaves such a
    one."""
    try:
        safetensors_header(file)
    except ValueError:
        raise OSError(f"{file.name} was not written whole") from None


def _remove(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    """Checkpoints by rising step."""
    found = ((match, child) for child in folder.glob("step-*") if (match := _NAME.fullmatch(child.name)))
    yield from sorted((int(match[1]), child) for match, child in found)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for a line that a killed process left half-written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
