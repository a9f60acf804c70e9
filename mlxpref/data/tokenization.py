"""Text becomes tokens, an example and a data set at a time.

The boundary between the prompt and what is scored is drawn in ``boundary.py``, there and never again; what is cut
where a row is too long is decided in ``tokens.py``; further texts come from ``texts.py``, weights of tokens from
``pieces.py``. Rows whose template rewrites a finished turn are counted under a note.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mlxpref.data.boundary import prompt_ids
from mlxpref.data.columns import one_type_a_column
from mlxpref.data.render import Encoder, load_tokenizer, render_prompt
from mlxpref.data.texts import with_mismatched
from mlxpref.data.tokens import Limits, Reader, Truncation
from mlxpref.data.words import counted
from mlxpref.errors import DataError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped, Prompt, Tokenized

__all__ = ["encode_prompt", "load_tokenizer", "render_prompt", "tokenize", "tokenize_all"]

STRICT_SHOWN = 10
"""Problems listed by a strict tokenization."""

_AT_ONCE = 256
"""Examples whose texts are encoded in one call; halves of one source are not parted."""

NO_PREFIX = "the template rewrites a finished turn; the prompt is the longest common prefix"
PROMPT_CUT = "prompt cut to fit max_length"
RESPONSE_CUT = "response cut to fit max_length"
TEXT_CUT = "further text cut to fit max_length"
GOAL_LOST = "the tokenizer does not know every character of the goal"


def encode_prompt(prompt: Prompt, tokenizer: Any, *, tools: Any = None) -> list[int]:
    """(n,) ids generation starts from; the ``prompt_ids`` of the same prompt in training.

    Raises:
        DataError: the chat template refuses the messages.
    """
    return prompt_ids(Encoder(tokenizer), render_prompt(prompt, tokenizer, tools=tools))


def tokenize(
    example: Conditioned,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: Truncation = "cut",
    goal_texts: Collection[str] = (),
    texts: Collection[str] = (),
    token_weights: bool = False,
) -> Tokenized | Dropped:
    """Tokens of one example.

    Args:
        example: a prompt and K responses; or K responses with a prompt each (``instructions``), of which what
            all begin with is the prompt, and the rest of each is read before its response.
        tokenizer: of the model, from :func:`load_tokenizer`.
        max_length: tokens of the prompt and any one response, or further text with its lead, together.
        max_prompt_length: where that is too much, the prompt is cut down to this first, if need be, and
            only then the responses; half of ``max_length`` by default.
        truncation: "cut": the middle of the prompt's body, never its goal, then the tails of the
            responses, of which at least one token stays. "drop": a row that is too long is dropped.
        goal_texts: of all halves of the source, among which the longest decides what fits, so that
            they stay alike in all but the goal.
        texts: names of the further texts to read as well: "third", "gold", "rationale"; "instructions", where
            each response has a prompt of its own. "mismatched" is of a whole data set: ``tokenize_all``.
        token_weights: lay the weights of the responses' pieces on their tokens, as the extra of that name.

    Returns:
        The tokens, or why there are none.

    Raises:
        ConfigError: the lengths leave no room for a response, or ``truncation`` is neither.
        DataError: ``texts`` names one that cannot be read.
    """
    limits = Limits(max_length, max_prompt_length, truncation)
    if "mismatched" in texts:
        raise DataError("mismatched responses are those of other examples: tokenize_all reads them")
    return Reader(tokenizer, texts, token_weights).read(example, limits, goal_texts=goal_texts)


def tokenize_all(
    examples: Iterable[Conditioned],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: Truncation = "cut",
    strict: bool = False,
    texts: Collection[str] = (),
    token_weights: bool = False,
) -> tuple[list[Tokenized], Counts]:
    """Tokens of all examples, in their order, and what was dropped and cut; else as :func:`tokenize`.

    Neighbours of one ``example_id`` are halves of one source and are cut, or dropped, alike. A column that
    holds whole numbers in some rows and fractions in others becomes fractions in all. The text "mismatched"
    is a response of another row that is kept, see ``texts.with_mismatched``.

    Raises:
        DataError: ``strict``, and a row was dropped; or a text that cannot be read.
        ConfigError: as :func:`tokenize`.
    """
    limits = Limits(max_length, max_prompt_length, truncation)
    reader = Reader(tokenizer, texts, token_weights)
    rows: list[Tokenized] = []
    kept: list[Conditioned] = []
    dropped: list[Dropped] = []
    counts = Counts()
    for chunk in _chunks(examples):
        alike = _goal_texts(chunk)
        for example, sides in zip(chunk, reader.prefetch(chunk), strict=True):
            row = reader.read(example, limits, sides, alike[example.example_id])
            if isinstance(row, Dropped):
                dropped.append(row)
                counts.drop(row)
            else:
                rows.append(row)
                kept.append(example)
    if strict:
        _raise_strict(dropped)
    if "mismatched" in texts and rows:
        rows = with_mismatched(rows, kept, max_length)
    counts.kept = len(rows)
    _note(counts, NO_PREFIX, reader.rewritten)
    _note(counts, GOAL_LOST, reader.goals_lost)
    _note(counts, PROMPT_CUT, sum(row.prompt_cut > 0 for row in rows))
    _note(counts, RESPONSE_CUT, sum(any(row.response_cut) for row in rows))
    _note(counts, TEXT_CUT, reader.texts_cut)
    return one_type_a_column(rows), counts


def _raise_strict(dropped: Sequence[Dropped]) -> None:
    """Halves of one source share their id, and mostly their fate: each id once for each reason."""
    lines = list(dict.fromkeys(f"{row.where}: {row.reason}" for row in dropped))
    more = [f"… and {len(lines) - STRICT_SHOWN} more"] if len(lines) > STRICT_SHOWN else []
    examples = counted(len({row.where for row in dropped}), "example")
    raise_all(lines[:STRICT_SHOWN] + more, DataError, f"{examples} cannot be used (strict):")


def _chunks(examples: Iterable[Conditioned]) -> Iterator[list[Conditioned]]:
    chunk: list[Conditioned] = []
    for _, halves in groupby(examples, key=lambda example: example.example_id):
        chunk += halves
        if len(chunk) >= _AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _goal_texts(examples: Iterable[Conditioned]) -> Mapping[str, frozenset[str]]:
    """By id of the source, every text that states a goal of it."""
    found: dict[str, frozenset[str]] = {}
    for example in examples:
        own = frozenset() if example.goal_text is None else frozenset({example.goal_text})
        found[example.example_id] = found.get(example.example_id, frozenset()) | own
    return found


def _note(counts: Counts, what: str, n: int) -> None:
    if n:
        counts.notes[what] = n
