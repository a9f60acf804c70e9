"""Every error a user can meet, each one clear message with its remedy.

A command turns these into one line on standard error and an exit code; library callers catch
:class:`MlxprefError` to catch all of them.
"""

from __future__ import annotations

from collections.abc import Sequence


class MlxprefError(Exception):
    """Something the user can mend. ``str(error)`` says what, where, and the remedy."""

    exit_code = 1


class UsageError(MlxprefError):
    """A command line or a configuration asks for something that does not exist."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown configuration key, a value of the wrong type, or two that contradict."""


class ObjectiveError(UsageError):
    """An unknown objective, an option it does not take, or a column it needs and lacks."""


class DataError(MlxprefError):
    """A data set cannot be read, or (``strict``) holds a row that cannot be used."""


class ScoreError(DataError):
    """A response's score is missing, not finite, or off the declared scale."""


class ModelError(MlxprefError):
    """A model folder is missing, incomplete, or of an architecture that cannot be trained."""


class AdapterError(MlxprefError):
    """An adapter folder is missing, damaged, or made for another model."""


class RunError(MlxprefError):
    """A run cannot start or go on: occupied folder, full disk, non-finite steps."""


def raise_all(problems: Sequence[str], error: type[MlxprefError], headline: str) -> None:
    """Raise one ``error`` that lists every problem found; do nothing when there is none."""
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise error(f"{headline}\n{lines}")
