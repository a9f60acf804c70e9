"""What a format is, and what it makes of a row: a :class:`Draft`, still unchecked.

The table of formats is filled by the functions in ``formats.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxpref.records import Message

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One response as the row has it: nothing is checked yet.

    Attributes:
        text: the response.
        score: under the draft's score name; anything, None if missing.
        attributes: further scores, and values of ``OF_RESPONSE``, by name; what is no number is not an attribute.
        refused: why the data themselves rule it out, or "".
        prompt: its own prompt, where each response has one; () where all share the draft's.
    """

    text: str
    score: Any = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    prompt: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format found in one row.

    Attributes:
        prompt: messages before the response.
        answers: in a pair the chosen one first.
        score: name of the score in ``Answer.score``, higher is better; None for unscored data.
        scales: the lowest and highest value a score can have, by its name, where the format fixes it.
        pair: an answer that cannot be used takes the whole row with it; in a list only itself.
    """

    prompt: list[Message]
    answers: list[Answer]
    score: str | None
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pair: bool = False


@dataclass(frozen=True)
class Format:
    """A row of the table: see :func:`data_format`."""

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    when: Callable[[Collection[str]], bool]
    group_by: str | None
    read: Callable[[Row, frozenset[str]], Draft]

    @property
    def summary(self) -> str:
        return (self.read.__doc__ or "").split("\n")[0].rstrip(".")

    def fits(self, columns: Collection[str]) -> bool:
        return set(self.needs) <= set(columns) and self.when(columns)


FORMATS: dict[str, Format] = {}
"""Every format by name, in the order they are tried: the more particular first."""

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question"),
    "i_rejected": ("i_reject",),
    "r_rejected": ("r_reject",),
}
"""Names a column may have without ``--columns``, when our own is not there."""

OF_RESPONSE = ("aligned_logps", "margin_rewards", "previous", "token_weights", "win_rates")
"""Columns any format may have with a value for each response."""

OF_EXAMPLE = ("ches", "confidence", "group")
"""… with a value for the example,"""

OWN_TEXTS = ("gold", "rationale", "third")
"""… or with one further text."""

CARRIED = ("example_id", "system", "tools", "margins", *OWN_TEXTS, *OF_EXAMPLE, *OF_RESPONSE)
"""Columns any format may have besides its own."""

IDS = ("example_id", "id", "prompt_id", "uid", "uuid")


def data_format(
    name: str,
    *,
    needs: Sequence[str],
    takes: Sequence[str] = (),
    when: Callable[[Collection[str]], bool] = lambda columns: True,
    group_by: str | None = None,
) -> Callable[[Callable[[Row, frozenset[str]], Draft]], Callable[[Row, frozenset[str]], Draft]]:
    """Put a function into the table of formats.

    Args:
        needs: columns without which it cannot read a row.
        takes: further columns ``--columns`` may name for it.
        when: what else must be true of the columns to recognise it; ``--format`` does not ask.
        group_by: consecutive rows with the same value here are one example; the function then
            gets the first row with all of them under "rows".
    """

    def add(read: Callable[[Row, frozenset[str]], Draft]) -> Callable[[Row, frozenset[str]], Draft]:
        FORMATS[name] = Format(name, tuple(needs), tuple(takes), when, group_by, read)
        return read

    return add


def as_number(value: Any) -> float | str | None:
    """A float; None for what is missing; the reason, as text, for what is no number.

    Text that spells a number counts ("4", as UltraFeedback's ratings and all CSV cells are);
    a truth value does not. NaN and infinities are floats here.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return "score is not a number"
    try:
        return float(value)
    except (ValueError, OverflowError):
        return "score is not a number"
