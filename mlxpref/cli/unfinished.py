"""What was written and is not in its file yet: kept on disk until it is, so that no failure takes hours with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mlxpref.cli import console
from mlxpref.errors import UsageError
from mlxpref.files import write_text
from mlxpref.generate import Answer

EVERY = 5.0
"""Seconds after which answers that wait in memory are written to disk."""


class Keep(Protocol):
    """Keeps more answers, in the order they come; ``of`` says whose they are."""

    def __call__(self, answers: Sequence[Answer], of: str) -> None: ...


@contextmanager
def unfinished(file: Path | None, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Keep]:
    """Within this context the answers handed over lie beside ``file``; they go when the block ends well.

    Args:
        file: what is written in the end; None keeps nothing.

    Raises:
        UsageError: something of an earlier command lies there. RunError: the place cannot be written to; both at once.
    """
    if file is None:
        yield lambda answers, of: None
        return
    aside = file.with_name(f"{file.name}.unfinished.json")
    if aside.exists():
        raise UsageError(f"{aside}: what an earlier command wrote and never finished is there; move it away first")
    kept: list[tuple[str, Answer]] = []

    def write() -> None:
        rows = [{"of": of, **answer.as_record()} for of, answer in kept]
        write_text(aside, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")

    written = clock()

    def keep(answers: Sequence[Answer], of: str) -> None:
        nonlocal written
        kept.extend((of, answer) for answer in answers)
        if clock() - written > EVERY:
            write()
            written = clock()

    write()
    try:
        yield keep
    except BaseException:
        if kept:
            write()
            console.note(f"what was written until then is in {aside}")
        else:
            aside.unlink(missing_ok=True)
        raise
    aside.unlink(missing_ok=True)
