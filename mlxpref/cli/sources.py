"""What ``relabel``, ``inspect`` and ``evaluate`` share: which data are read, and how.

``train`` has the same flags over its configuration; their names and helps come from here, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import click

from mlxpref.data.sources import SourceSpec, parse_columns
from mlxpref.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

SPLIT_HELP = "Split to read: train, valid, test, or the data's own name."

OPTIONS: dict[str, dict[str, Any]] = {
    "format": {"metavar": "NAME", "help": "Format of the data; detected by default."},
    "columns": {"metavar": "OURS=THEIRS,…", "help": "Columns of other names: prompt=question,chosen=best."},
    "score": {"metavar": "NAME", "help": "Which score is the score, where the data have several."},
    "split": {"metavar": "NAME", "help": SPLIT_HELP},
    "data_config": {"metavar": "NAME", "help": "Configuration of a hub data set."},
    "data_revision": {"metavar": "REV", "help": "Branch, tag or commit of a hub data set."},
    "limit": {"metavar": "N", "type": click.IntRange(1), "help": "Examples to read at most, of each source and split."},
    "streaming": {"is_flag": True, "help": "Read a hub data set or Parquet row by row, with no copy on disk."},
    "strict": {"is_flag": True, "help": "A row that cannot be used is an error instead of a count."},
}
"""Options by the name of their value, in the order of a help: what ``click.option`` is told of each."""

OF_SOURCES = ("format", "columns", "score", "data_config", "data_revision", "streaming")
"""Those that say how data other than relabelled ones are read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The options as they were given; None, or False, where one was not.

    Attributes:
        data_config, data_revision: of a hub data set.
        limit: examples read at most.
        strict: a row that cannot be used is an error.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    score: str | None = None
    split: str | None = None
    data_config: str | None = None
    data_revision: str | None = None
    limit: int | None = None
    streaming: bool = False
    strict: bool = False

    def spec(self, path: str, *, weight: float = 1.0) -> SourceSpec:
        """How to read the data at ``path``. UsageError for a weight that is not positive."""
        return SourceSpec(
            path,
            format=self.format,
            columns=self.columns,
            config=self.data_config,
            split=self.split,
            revision=self.data_revision,
            score=self.score,
            weight=weight,
            streaming=self.streaming,
            limit=self.limit,
        )

    def check_relabelled(self, path: object) -> None:
        """UsageError for options that cannot act on relabelled data, which ``path`` is."""
        idle = [flag(name) for name in OF_SOURCES if getattr(self, name)]
        if idle:
            raise UsageError(
                f"{path} is relabelled data; leave out what says how other data are read: {', '.join(idle)}"
            )


def flag(name: str) -> str:
    """``data_config`` as it is typed: ``--data-config``."""
    return "--" + name.replace("_", "-")


def source_option(name: str, **other: Any) -> Callable[[F], F]:
    """One of :data:`OPTIONS`, alone; ``other`` goes over what is said there."""
    return click.option(flag(name), name, **{**OPTIONS[name], **other})


def source_options(*, split: str) -> Callable[[F], F]:
    """The options that say how data are read, given to the command as one value, ``reading``.

    Args:
        split: what is read where no split is named, for the help.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def wrapped(*args: Any, **values: Any) -> Any:
            given = {name: values.pop(name) for name in OPTIONS}
            columns = parse_columns(given.pop("columns") or "") or None
            return command(*args, reading=Reading(columns=columns, **given), **values)

        found: Any = wrapped
        for name in reversed(OPTIONS):
            more = {"help": f"{SPLIT_HELP}  [default: {split}]"} if name == "split" else {}
            found = source_option(name, **more)(found)
        return cast(F, found)

    return decorate
