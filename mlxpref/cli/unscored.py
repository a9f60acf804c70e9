"""What was written and not scored yet: kept on disk until it is, so that no failure takes hours with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxpref.cli import console
from mlxpref.errors import UsageError
from mlxpref.files import write_text


@contextmanager
def unscored(file: Path | None) -> Iterator[Callable[[Any], None]]:
    """Within this context what is handed over lies beside ``file``; it goes when the block ends well.

    Args:
        file: what is written in the end; None keeps nothing.

    Yields:
        keeps one more lot, JSON-safe, with all before it.

    Raises:
        UsageError: something of an earlier command lies there. RunError: the place cannot be written to; both at once.
    """
    if file is None:
        yield lambda lot: None
        return
    aside = file.with_name(f"{file.stem}.unscored.json")
    if aside.exists():
        raise UsageError(f"{aside}: what an earlier command wrote and never scored is there; move it away first")
    lots: list[Any] = []

    def keep(lot: Any = None) -> None:
        lots.extend([] if lot is None else [lot])
        write_text(aside, json.dumps(lots, indent=1, ensure_ascii=False) + "\n")

    keep()
    try:
        yield keep
    except BaseException:
        if lots:
            console.note(f"what was written until then is in {aside}")
        else:
            aside.unlink(missing_ok=True)
        raise
    aside.unlink(missing_ok=True)
