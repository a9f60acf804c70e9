"""Further texts that are scored behind an example's prompt, beside its responses.

``third`` and ``gold`` are responses like the others. A ``rationale`` is said in the conversation that goes on: the
better response was given, the user shows the other and asks why the first is better; all of that is read and only
the rationale scored. ``mismatched`` is a response that was given to another prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from mlxpref.data.boundary import Boundary, Ids, Texts, n_common
from mlxpref.data.render import render_prompt, render_turn
from mlxpref.errors import DataError
from mlxpref.records import Conditioned, Dropped, Message, Prompt, Tokenized

QUESTION = "Here is another response to the same request:\n\n{other}\n\nWhy is the response you gave better?"
"""What the user says between the better response and the rationale."""

_MARK = "mlxpref-asks-what-comes-between-two-turns"


@dataclass(frozen=True, slots=True)
class Further:
    """A text behind a prompt: tokens that are read before it, and those that are scored."""

    lead: list[int]
    ids: list[int]


def further_text(
    name: str, example: Conditioned, prompt: Prompt, texts: Texts, ids: Ids, boundary: Boundary
) -> Further | Dropped:
    """One further text, uncut.

    Args:
        name: "third", "gold" or "rationale".
        prompt, texts, ids: of the example, the prompt as it is used and the responses uncut.
    """
    try:
        if name == "rationale":
            found = _rationale(example, prompt, texts, ids, boundary)
        else:
            found = Further([], boundary.behind(texts, ids, texts.further[name]))
    except DataError as error:
        return Dropped(str(error), example.example_id)
    if isinstance(found, Further) and not found.ids:
        return Dropped(f"{name} encodes to no token behind the prompt", example.example_id)
    return found


def _rationale(
    example: Conditioned, prompt: Prompt, texts: Texts, ids: Ids, boundary: Boundary
) -> Further | Dropped:
    """The lead is the better response with its end token, and what the template writes from there to the next one."""
    if len(example.responses) != 2:
        return Dropped("a rationale compares two responses, and the row has more", example.example_id)
    if not isinstance(example.extras.get("rationale"), str):
        return Dropped("no rationale", example.example_id)
    better = better_of(example)
    between, rest = _turns(example, prompt, QUESTION.format(other=example.responses[1 - better]), boundary)
    given = texts.finished[better]
    lead = ids.responses[better] + boundary.encoder.continuation(given, between)
    return Further(lead, boundary.ended(boundary.encoder.continuation(given + between, rest)))


def better_of(example: Conditioned) -> int:
    """The slot of a pair's better response, by score or else by the order of the data; the same in both halves."""
    scores = example.scores
    if scores is not None and scores[0] != scores[1]:
        return 0 if scores[0] > scores[1] else 1
    return 1 if example.half == "rejected" else 0


def _turns(example: Conditioned, prompt: Prompt, question: str, boundary: Boundary) -> tuple[str, str]:
    """Text from the end token of the response to where the rationale begins; from there to its own end.

    A mark stands for the response: templates write one that is not the last otherwise than they wrote it when it
    was, and the text goes on from what was written then.
    """
    tokenizer, tools = boundary.tokenizer, example.extras.get("tools")
    turns = (*prompt, Message("assistant", _MARK), Message("user", question))
    asked = render_prompt(turns, tokenizer, tools=tools)
    if _MARK not in asked:
        raise DataError("the chat template does not show earlier responses, and a rationale speaks of one")
    finished = render_turn(turns, example.extras["rationale"], tokenizer, tools=tools)
    n = len(asked)
    if not finished.startswith(asked):  # the header is not what a finished turn shows
        n = n_common(asked, render_turn(turns, _MARK, tokenizer, tools=tools))
    between = asked[:n].partition(_MARK)[2]
    if boundary.end.written:
        end = tokenizer.convert_ids_to_tokens(boundary.end.token)
        between = between.partition(end)[2] if end in between else between
    return between, finished[n:]


# --- texts of other examples ---------------------------------------------------------------------


def with_mismatched(rows: Sequence[Tokenized], examples: Sequence[Conditioned], max_length: int) -> list[Tokenized]:
    """Each row with a text "mismatched": a response of the next row that has another prompt.

    The rows stand in a circle, so each response is met about as often as it is trained on; even rows take slot 0
    there, odd ones slot 1. Which one a row takes depends on the order of the data alone, not on batches.

    Args:
        rows, examples: the same rows, tokenized and as text.
        max_length: tokens of the prompt and the text together; its tail is cut.

    Raises:
        DataError: all prompts are the same.

    Source: TRL's KTO, which shifts responses by one example, within batches of its preprocessing.
    """
    return list(mismatched(rows, [asked(example) for example in examples], max_length))


def mismatched(rows: Sequence[Tokenized], keys: Sequence[object], max_length: int) -> Iterator[Tokenized]:
    """As :func:`with_mismatched`, one after the other; ``keys`` are equal where prompts are."""
    others = _next_other(keys)
    for at, (row, other) in enumerate(zip(rows, others, strict=True)):
        ids = rows[other].response_ids[at % 2][: max_length - len(row.prompt_ids)]
        yield _with_text(row, "mismatched", ids)


def asked(example: Conditioned) -> bytes:
    """What is the same for all halves of a source, and different for different prompts."""
    return blake2b(repr(_asked(example)).encode("utf8", "surrogatepass"), digest_size=16).digest()


def _asked(example: Conditioned) -> tuple[tuple[str, str], ...]:
    """The prompt without its goal and the space around that, so that all halves of a source have the same."""
    turns = []
    for message in example.prompt:
        content = message.content
        if example.goal_text:
            content = content.replace(example.goal_text, "", 1)
        turns.append((message.role, content.strip()))
    return tuple(turn for turn in turns if turn[1])


def _next_other(keys: Sequence[object]) -> list[int]:
    """For each place the next one, round the circle, with another key. DataError if there is none."""
    n = len(keys)
    start = next((at for at in range(n) if keys[at] != keys[at - 1]), None)
    if start is None:
        raise DataError("mismatched responses come from other prompts, and all rows have the same one")
    found = [0] * n
    for step in range(1, n + 1):  # backwards from a place whose predecessor has another key
        at = (start - step) % n
        after = (at + 1) % n
        found[at] = after if keys[after] != keys[at] else found[after]
    return found


def _with_text(row: Tokenized, name: str, ids: np.ndarray) -> Tokenized:
    """The row with one more text of one slot, and no lead."""
    texts = {**row.texts, name: (ids,)}
    if not row.leads:
        return replace(row, texts=texts)
    before = len(row.response_ids) + sum(len(row.texts[other]) for other in row.texts if other < name)
    return replace(row, texts=texts, leads=(*row.leads[:before], np.zeros(0, np.int32), *row.leads[before:]))
