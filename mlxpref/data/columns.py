"""Columns of the data that objectives ask for beside responses and scores: their names, and their check at the door.

A row gives one value a response (``previous``, ``win_rates``, …) as a list in the order of its responses, or in
pairs as ``NAME_chosen`` and ``NAME_rejected``; one value an example (``confidence``, ``group``) or one text
(``third``, ``gold``, ``rationale``) under its name. What is none of these is not carried but :func:`unusable`, with
the reason: such a row is dropped where a column is asked for, and not where nobody reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mlxpref.data.drafts import OF_EXAMPLE, OF_RESPONSE, OWN_TEXTS, Answer, as_number
from mlxpref.data.messages import Unusable, response
from mlxpref.records import Conditioned, Tokenized

TEXTS = ("gold", "instructions", "mismatched", "rationale", "third")
"""Further texts that can be scored behind a prompt."""

PER_TOKEN = ("divergence", "token_weights")
"""Columns that become a value for each token."""

MADE_BY_STEPS = frozenset({"policy", "reference", "lengths", "weights", "state", "overlap", "token_kl"})
"""Columns that come from the model, or that every batch has."""

SHARES = ("confidence", "win_rates")
"""Columns of numbers from 0 to 1."""

_WHY = "unusable"


def text_of_column(name: str) -> str | None:
    """The text whose log-probs a column holds: ``third`` of "third" and of "third_reference"; None of others."""
    text = name.removesuffix("_reference")
    return text if text in TEXTS else None


def texts_of(needs: Collection[str]) -> tuple[str, ...]:
    """The further texts that these columns are log-probs of, by name."""
    return tuple(sorted({text for name in needs if (text := text_of_column(name))}))


def available_columns(rows: Sequence[Tokenized]) -> set[str]:
    """Columns that every row has: values by name, ``scores``, ``divergence``, and of each text its own and
    its reference's. What the steps make (``reference``, ``lengths``, …) is not among them. Rows that know are not
    read for it."""
    parts = [part for part in getattr(rows, "parts", ()) if len(part)]
    if parts:
        return set.intersection(*map(available_columns, parts))
    known = getattr(rows, "columns", None)
    if isinstance(known, frozenset):
        return set(known)
    there = set.intersection(*({*row.extras, *row.texts} for row in rows))
    there |= {f"{name}_reference" for name in there & set(TEXTS)} | {"divergence"}
    return there | {"scores"} if all(row.scores is not None for row in rows) else there


def widths_of(row: Tokenized) -> dict[str, int]:
    """M of each column with M numbers a response, (K, M), by name; 0 of those with one, (K,)."""
    k = len(row.response_ids)
    return {
        name: width_of(value)
        for name, value in row.extras.items()
        if name not in PER_TOKEN and isinstance(value, list | tuple) and len(value) == k
    }


def width_of(values: Sequence[Any]) -> int:
    """M of K lists of M numbers; 0 of K numbers."""
    return len(values[0]) if isinstance(values[0], list | tuple) else 0


def goal_distances(row: Conditioned) -> tuple[float, ...] | None:
    """(K,) squared; without a goal, to the score of the best response. None of unscored examples."""
    if row.distances is not None or row.scores is None:
        return row.distances
    goal = row.goal if isinstance(row.goal, int | float) else row.scores[0]
    # Rounded as relabelling does, so that float noise does not decide between two equal distances.
    return tuple(round(float(score - goal) ** 2, 9) for score in row.scores)


def numbers_of(example: Conditioned) -> Mapping[str, Any]:
    """The columns an objective can read: numbers; one an example, or one or several a response."""
    found = {name: value for name, value in {**example.attributes, **example.extras}.items() if _is_column(value)}
    distances = goal_distances(example)
    return found if distances is None else {**found, "goal_distances": distances}


def _is_column(value: Any) -> bool:
    lists = [one for one in value if isinstance(one, list | tuple)] if isinstance(value, list | tuple) else []
    if lists:
        return len(lists) == len(value) and len(set(map(len, lists))) == 1 and all(map(_is_row, lists))
    return _is_number(value) or _is_row(value)


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def one_type_a_column(rows: Sequence[Tokenized]) -> list[Tokenized]:
    """Whole numbers as fractions, in columns that hold fractions elsewhere: one array type a run."""
    fractional = fractional_columns(rows)
    return [with_fractions(row, fractional) for row in rows]


def fractional_columns(rows: Sequence[Tokenized]) -> frozenset[str]:
    """The columns in which some row has a fraction."""
    return frozenset(name for row in rows for name, value in row.extras.items() if _has_fraction(value))


def with_fractions(row: Tokenized, names: Collection[str]) -> Tokenized:
    """The row, whole numbers in these columns as fractions."""
    if not row.extras:
        return row
    return replace(
        row, extras={name: _fractions(value) if name in names else value for name, value in row.extras.items()}
    )


def _has_fraction(value: Any) -> bool:
    return any(map(_has_fraction, value)) if isinstance(value, list | tuple) else isinstance(value, float)


def _fractions(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_fractions, value))
    return float(value) if isinstance(value, int) else value


def unusable(value: Any) -> str | None:
    """Why a carried column cannot be used; None if it can."""
    return value[_WHY] if isinstance(value, Mapping) and set(value) == {_WHY} else None


# --- at the door ---------------------------------------------------------------------------------


def carried(row: Mapping[str, Any], answers: Sequence[Answer], kept: Sequence[int]) -> dict[str, Any]:
    """The columns a row fills, checked.

    Args:
        answers: every response of the row, in its order.
        kept: places of those that travel on; the entries of the others are left out.

    Returns:
        By name: a tuple with an entry for each response kept; a number or a text of the example; or why the
        value cannot be used, for :func:`unusable`. Nothing where the row has no value.
    """
    given = {name: _entries(name, row, answers) for name in OF_RESPONSE}
    given |= {name: row.get(name) for name in (*OF_EXAMPLE, *OWN_TEXTS)}
    found = {}
    for name, value in given.items():
        if _blank(value):
            continue
        try:
            found[name] = _checked(name, value, answers, kept)
        except Unusable as error:
            found[name] = {_WHY: error.reason}
    return found


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _entries(name: str, row: Mapping[str, Any], answers: Sequence[Answer]) -> Any:
    """What the row has of a column: an entry beside each response, else the list in one column."""
    beside = [answer.attributes.get(name) for answer in answers]
    if not all(map(_blank, beside)):
        return beside
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)  # CSV cells hold text only
    return value


def _checked(name: str, value: Any, answers: Sequence[Answer], kept: Sequence[int]) -> Any:
    if name in OWN_TEXTS:
        return _text(name, value)
    if name == "group":
        return _group(value)
    if name not in OF_RESPONSE:
        return _number(name, value)
    if not isinstance(value, list | tuple) or len(value) != len(answers):
        raise Unusable(f"{name} has no entry for each response")
    if name == "token_weights":
        return tuple(_pieces(value[at], answers[at].text) for at in kept)
    if name != "margin_rewards" or not any(isinstance(value[at], list | tuple) for at in kept):
        return tuple(_number(name, value[at]) for at in kept)
    lists = tuple(
        [_number(name, one) for one in value[at]] if isinstance(value[at], list | tuple) else [] for at in kept
    )
    if len(set(map(len, lists))) > 1 or not lists[0]:
        raise Unusable(f"{name} has not as many numbers for each response")
    return lists


def _number(name: str, value: Any) -> float:
    number = as_number(value)
    if not isinstance(number, float) or not math.isfinite(number):
        raise Unusable(f"{name} is not a finite number")
    if name in SHARES and not 0 <= number <= 1:
        raise Unusable(f"{name} is not between 0 and 1")
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | list | tuple | Mapping):
        raise Unusable(f"{name} is not text")
    try:
        text = response(value)
    except Unusable as error:
        raise Unusable(f"{name}: {error.reason}", error.detail) from error
    if not text.strip():
        raise Unusable(f"{name} is empty")
    return text


def _group(value: Any) -> Any:
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (isinstance(value, str) or finite):
        raise Unusable("group is neither text nor a finite number")
    return value


def _pieces(pieces: Any, text: str) -> list[dict[str, Any]]:
    """Pieces of a response with their weights, as given; Unusable unless they make up the response."""
    if not isinstance(pieces, list | tuple) or not all(isinstance(piece, Mapping) for piece in pieces):
        raise Unusable('token_weights are not pieces {"text", "weight"}')
    found = [
        {"text": piece.get("text"), "weight": _number("the weight of a piece", piece.get("weight"))}
        for piece in pieces
    ]
    if not all(isinstance(piece["text"], str) for piece in found):
        raise Unusable("token_weights: a piece has no text")
    if "".join(piece["text"] for piece in found) != text:
        raise Unusable("token_weights: the pieces do not make up the response")
    return found
