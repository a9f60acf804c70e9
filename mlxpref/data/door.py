"""The door: what makes a draft an example, the same for every format.

Here lies each reason a row, or a single response of a list, is dropped for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlxpref.data.columns import carried
from mlxpref.data.drafts import IDS, OF_RESPONSE, Answer, Draft, as_number
from mlxpref.data.messages import Unusable, without_none
from mlxpref.records import Message, Scored

EMPTY = "empty response"
EQUAL = "chosen and rejected are the same text"
REPEATED = "the same text twice"
ONE_SIDED = "missing score on one side"
UNSCORED = "missing score"
NOT_A_NUMBER = "score is not a number"
NOT_FINITE = "score is not finite"
SCORE_REASONS = (ONE_SIDED, UNSCORED, NOT_A_NUMBER, NOT_FINITE)
LEFT_OUT = "one response left out: "
"""Begins the reason of a single response missing from a list whose others travel on."""


def checked(
    draft: Draft, row: Mapping[str, Any], *, score: str | None, taken: set[str]
) -> tuple[Scored, list[Unusable]]:
    """A draft as an example, with the single responses that were left out of a list.

    Raises:
        Unusable: the row cannot be used.
    """
    if score is None and draft.score is not None:
        raise Unusable("scored, though the first rows of the data are not")
    kept: list[tuple[Answer, float | None]] = []
    places: list[int] = []
    left_out: list[Unusable] = []
    for place, answer in enumerate(draft.answers):
        try:
            kept.append((answer, _score_of(answer, draft, score, [other for other, _ in kept])))
            places.append(place)
        except Unusable as unusable:
            left_out.append(unusable)
    if left_out and (draft.pair or len(kept) < 2):
        raise _of_row(left_out, draft)
    if len(kept) < 2:
        raise Unusable("fewer than two responses")
    answers = [answer for answer, _ in kept]
    scores = tuple(score for _, score in kept if score is not None) or None
    texts = tuple(answer.text for answer in answers)
    try:
        scored = Scored(
            prompt=tuple(draft.prompt), responses=texts, scores=scores,
            example_id=_free_id(row, draft.prompt, texts, taken),
            attributes=_attributes(answers),
            extras=_extras(row) | carried(row, draft.answers, places) | _instructions(draft, answers),
        )  # fmt: skip
    except ValueError as error:
        raise Unusable(str(error)) from error
    taken.add(scored.example_id)
    return scored, left_out


def _score_of(answer: Answer, draft: Draft, wanted: str | None, before: Sequence[Answer]) -> float | None:
    """The answer's score (None for unscored data); Unusable if it cannot stand in the list."""
    if answer.refused:
        raise Unusable(answer.refused)
    if not answer.text.strip():
        raise Unusable(EMPTY)
    if any((answer.text.strip(), answer.prompt) == (other.text.strip(), other.prompt) for other in before):
        raise Unusable(EQUAL if draft.pair else REPEATED)
    if wanted is None:
        return None
    value = answer.score if wanted == draft.score else answer.attributes.get(wanted)
    number = as_number(value)
    if number is None:
        raise Unusable(UNSCORED)
    if isinstance(number, str):
        raise Unusable(number, repr(value)[:60])
    if not math.isfinite(number):
        raise Unusable(NOT_FINITE, repr(value))
    return number


def _of_row(faults: Sequence[Unusable], draft: Draft) -> Unusable:
    """The one reason a whole row is dropped for, of those its responses have."""
    if draft.pair and len(faults) == 1 and faults[0].reason == UNSCORED:
        return Unusable(ONE_SIDED)
    return faults[0]


def _attributes(answers: Sequence[Answer]) -> dict[str, tuple[float, ...]]:
    """Attributes that are finite numbers for every response; the others are not comparable."""
    found = {}
    for name in (name for name in answers[0].attributes if name not in OF_RESPONSE):
        values = [as_number(answer.attributes.get(name)) for answer in answers]
        numbers = tuple(v for v in values if isinstance(v, float) and math.isfinite(v))
        if len(numbers) == len(answers):
            found[name] = numbers
    return found


def _extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of no objective that this row fills; tools as the list of schemas they spell."""
    extras = {name: without_none(row[name]) for name in ("tools", "margins") if row.get(name) is not None}
    if isinstance(extras.get("tools"), str):
        try:
            extras["tools"] = json.loads(extras["tools"])
        except ValueError as error:
            raise Unusable("tools are not JSON", str(error)) from error
    return extras


def _instructions(draft: Draft, answers: Sequence[Answer]) -> dict[str, Any]:
    """The prompt of each response, where each has its own: messages as data files hold them."""
    if not any(answer.prompt for answer in answers):
        return {}
    for prompt in (answer.prompt for answer in answers):
        if not any(message.content.strip() for message in prompt):
            raise Unusable("empty prompt")
        if prompt[-1].role == "assistant":
            raise Unusable("prompt ends with an assistant turn")
    # A system column has been put before the draft's prompt, which is the first response's.
    head = draft.prompt[: len(draft.prompt) - len(draft.answers[0].prompt)]
    return {"instructions": tuple([turn.as_dict() for turn in (*head, *answer.prompt)] for answer in answers)}


# --- ids -------------------------------------------------------------------------------------------


def _free_id(row: Mapping[str, Any], prompt: Sequence[Message], texts: Sequence[str], taken: set[str]) -> str:
    """The data's own id, if no example before has it; else a hash of prompt and responses.

    A row that is there twice, word for word, gets "#2", "#3", … after the hash.
    """
    own = [str(row[name]) for name in IDS if isinstance(row.get(name), str | int) and str(row[name])]
    if own and own[0] not in taken:
        return own[0]
    content = json.dumps([[m.as_dict() for m in prompt], list(texts)], ensure_ascii=False, default=str)
    try:
        digest = hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]
    except UnicodeEncodeError as error:
        raise Unusable("text is not valid Unicode (half of a surrogate pair)") from error
    return unlike(digest, taken)


def unlike(name: str, taken: set[str]) -> str:
    """The name itself, or with the first free "#n"."""
    if name not in taken:
        return name
    n = 2
    while f"{name}#{n}" in taken:
        n += 1
    return f"{name}#{n}"
