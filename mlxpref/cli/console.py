"""What commands print: words to standard output, trouble to standard error.

On a terminal Rich draws tables and progress; into a pipe or a file go plain lines, without colours
or boxes, so that what a script reads does not depend on the width of a window.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_PROGRESS_LINES = 10
"""How many lines a progress display becomes when there is no terminal."""


def is_terminal(*, stderr: bool = False) -> bool:
    """Does standard output (or error) go to a person's terminal, one that can move its cursor? ``TERM=dumb`` says
    that it cannot."""
    return (sys.stderr if stderr else sys.stdout).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def say(text: str = "") -> None:
    """One piece of the answer, to standard output, as it is (no markup is read)."""
    click.echo(text)


def note(text: str) -> None:
    """Something beside the answer (what was detected, what is going on), to standard error."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """Something the user should look at, to standard error."""
    click.secho(f"warning: {text}", fg="yellow", err=True)


def fail(text: str) -> None:
    """What stopped the command, to standard error. The caller sets the exit code."""
    click.secho(f"error: {text}", fg="red", err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table to standard output. Numbers stand right, floats with four significant digits."""
    cells = [[cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    if not is_terminal() or _width(columns, cells) > shutil.get_terminal_size().columns:
        return _plain_table(columns, cells, right, title)
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column, numbers in zip(columns, right, strict=True):
        drawn.add_column(Text(column), justify="right" if numbers else "left")
    for row in cells:
        drawn.add_row(*map(Text, row))
    console().print(drawn)


def cell(value: Any) -> str:
    """A value as a table shows it: None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Characters of the widest line of a table."""
    lines = [list(columns), *cells]
    return sum(max(len(line[i]) for line in lines) + 2 for i in range(len(columns)))


def _plain_table(
    columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], title: str | None
) -> None:
    if title:
        say(title)
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        padded = (
            text.rjust(width) if numbers else text.ljust(width)
            for text, width, numbers in zip(line, widths, right, strict=True)
        )
        say("  ".join(padded).rstrip())


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a long stage is, on standard error; yields ``done_so_far -> None``.

    >>> with progress("reference", len(rows)) as at:  # doctest: +SKIP
    ...     for i, row in enumerate(rows):
    ...         at(i + 1)
    """
    if not is_terminal(stderr=True):
        yield _plain_progress(what, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _plain_progress(what: str, total: int) -> Callable[[int], None]:
    shown = 0

    def at(done: int) -> None:
        nonlocal shown
        reached = done * PLAIN_PROGRESS_LINES // max(total, 1)
        if reached > shown:
            shown = reached
            note(f"{what}: {done}/{total}")

    return at


class Stages:
    """One display of progress after another, each for what it is told to count; close it at the end."""

    def __init__(self) -> None:
        self._what = ""
        self._shown: Any = None
        self._at: Callable[[int], None] = lambda done: None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what or self._shown is None:
            self.close()
            self._what, self._shown = what, progress(what, total)
            self._at = self._shown.__enter__()
        self._at(done)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take away what is shown; it may be used again."""
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None


def console(*, stderr: bool = False) -> Console:
    """Rich's console for live displays: it neither reads markup in texts nor colours numbers."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False)
