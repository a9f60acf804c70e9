"""Text becomes tokens, and the boundary between prompt and response is decided, here and never again.

The prompt is rendered with the header of the assistant's turn and encoded: its tokens are the same for
all K responses, and those generation starts from. A response is what the template writes after that
header, up to and with the turn's end token; template text after the end token is not scored. Its tokens
are those of prompt and response encoded together, less the prompt's, so a model meets the tokens it would
itself generate; ``render.Encoder.continuation`` says what happens where the two would merge.

Where a template writes something else after the messages than its own header (reasoning templates that
take the reasoning out of a finished turn do), the longest common prefix of all is the prompt; such rows
are counted under a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from mlxpref.data.render import Encoder, TurnEnd, load_tokenizer, render_prompt, render_turn, turn_end
from mlxpref.data.truncation import cut_prompt
from mlxpref.errors import ConfigError, DataError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped, Prompt, Tokenized

__all__ = ["encode_prompt", "load_tokenizer", "render_prompt", "tokenize", "tokenize_all"]

Truncation = Literal["cut", "drop"]

_AT_ONCE = 256
"""Examples whose texts are encoded in one call."""

NO_PREFIX = "the template rewrites a finished turn; the prompt is the longest common prefix"
PROMPT_CUT = "prompt cut to fit max_length"
RESPONSE_CUT = "response cut to fit max_length"


def encode_prompt(prompt: Prompt, tokenizer: Any, *, tools: Any = None) -> list[int]:
    """(n,) ids generation starts from; the ``prompt_ids`` of the same prompt in training.

    Raises:
        DataError: the chat template refuses the messages.
    """
    return _prompt_ids(Encoder(tokenizer), render_prompt(prompt, tokenizer, tools=tools))


def tokenize(
    example: Conditioned,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: Truncation = "cut",
) -> Tokenized | Dropped:
    """Tokens of one example.

    Args:
        example: a prompt and K responses.
        tokenizer: of the model, from :func:`load_tokenizer`.
        max_length: tokens of the prompt and any one response together.
        max_prompt_length: where that is too much, the prompt is cut down to this first, if need be, and
            only then the responses; half of ``max_length`` by default.
        truncation: "cut": the middle of the prompt's body, never its goal, then the tails of the
            responses, of which at least one token stays. "drop": a row that is too long is dropped.

    Returns:
        The tokens, or why there are none.

    Raises:
        ConfigError: the lengths leave no room for a response, or ``truncation`` is neither.
    """
    limits = _Limits(max_length, max_prompt_length, truncation)
    return _Reader(tokenizer).read(example, limits)


def tokenize_all(
    examples: Iterable[Conditioned],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: Truncation = "cut",
    strict: bool = False,
) -> tuple[list[Tokenized], Counts]:
    """Tokens of all examples, in their order, and what was dropped and cut; else as :func:`tokenize`.

    A column that holds whole numbers in some rows and fractions in others becomes fractions in all.

    Raises:
        DataError: ``strict``, and a row was dropped.
        ConfigError: as :func:`tokenize`.
    """
    limits = _Limits(max_length, max_prompt_length, truncation)
    reader = _Reader(tokenizer)
    rows: list[Tokenized] = []
    dropped: list[Dropped] = []
    counts = Counts()
    remaining = iter(examples)
    while chunk := list(islice(remaining, _AT_ONCE)):
        reader.prefetch(chunk)
        for example in chunk:
            row = reader.read(example, limits)
            if isinstance(row, Dropped):
                dropped.append(row)
                counts.drop(row)
            else:
                rows.append(row)
    if strict:
        lines = [f"{row.where}: {row.reason}" for row in dropped]
        more = [f"… and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise_all(lines[:10] + more, DataError, f"{len(lines)} rows cannot be used (strict):")
    counts.kept = len(rows)
    _note(counts, NO_PREFIX, reader.rewritten)
    _note(counts, PROMPT_CUT, sum(row.prompt_cut > 0 for row in rows))
    _note(counts, RESPONSE_CUT, sum(any(row.response_cut) for row in rows))
    return _one_type_a_column(rows), counts
