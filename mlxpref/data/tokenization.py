"""Text becomes tokens, an example and a data set at a time.

The boundary between the prompt and what is scored is drawn in ``boundary.py``, there and never again; what is cut
where a row is too long is decided in ``tokens.py``; further texts come from ``texts.py``, weights of tokens from
``pieces.py``. Rows whose template rewrites a finished turn are counted under a note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Any, TypeVar

from mlxpref.data.boundary import prompt_ids
from mlxpref.data.columns import one_type_a_column
from mlxpref.data.many import Block, keep
from mlxpref.data.processes import cores, shared_out
from mlxpref.data.render import Encoder, load_tokenizer, render_prompt
from mlxpref.data.stored import IN_MEMORY, blocks
from mlxpref.data.texts import asked, mismatched
from mlxpref.data.tokens import Limits, Reader, Truncation
from mlxpref.data.words import counted
from mlxpref.errors import DataError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped, Prompt, Tokenized

__all__ = ["encode_prompt", "load_tokenizer", "render_prompt", "tokenize", "tokenize_all"]

STRICT_SHOWN = 10
"""Problems listed by a strict tokenization."""

T = TypeVar("T")

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
    num_proc: int | None = None,
) -> tuple[Sequence[Tokenized], Counts]:
    """Tokens of all examples, in their order, and what was dropped and cut; else as :func:`tokenize`.

    Neighbours of one ``example_id`` are halves of one source and are cut, or dropped, alike. A column that
    holds whole numbers in some rows and fractions in others becomes fractions in all. The text "mismatched"
    is a response of another row that is kept, see ``texts.with_mismatched``. The examples are gone through once.
    Some thousands of rows are a list; more lie on disk, and are read when they are asked for.

    Args:
        num_proc: processes that share many rows; None: one a core. The result is the same for any number.

    Raises:
        DataError: ``strict``, and a row was dropped; or a text that cannot be read.
        ConfigError: as :func:`tokenize`.
        RunError: there is no room on disk for many rows.
    """
    limits = Limits(max_length, max_prompt_length, truncation)
    Reader(tokenizer, texts, token_weights)  # which refuses texts that there are not
    work = _Work(tokenizer, limits, tuple(texts), token_weights)
    coming = _chunks(examples)
    chunks = list(islice(coming, IN_MEMORY // _AT_ONCE + 1))
    few = sum(map(len, chunks)) <= IN_MEMORY
    told = _Told(strict)
    rows: Sequence[Tokenized]
    if few:
        rows = one_type_a_column([row for read in map(work, chunks) for row in told.hear(read)])
    else:
        rest = chain(_emptied(chunks), coming)
        with closing(shared_out(_Blocks(work), rest, num_proc or cores())) as reads:
            rows = keep(told.hear(read) for read in reads)
    if strict:
        _raise_strict(told.dropped)
    if "mismatched" in texts and len(rows):
        others = mismatched(rows, told.asked, max_length)
        rows = one_type_a_column(list(others)) if few else keep(map(Block.of, blocks(others)))
    return rows, told.counts(len(rows))


@dataclass(frozen=True, slots=True)
class _Read:
    """What came of a chunk: its rows, those that were dropped, notes of those kept, and what they were asked."""

    rows: Any
    dropped: list[Dropped]
    notes: dict[str, int]
    asked: list[bytes]


class _Work:
    """Reads chunks; what it has read before makes the next one faster."""

    def __init__(self, tokenizer: Any, limits: Limits, texts: tuple[str, ...], token_weights: bool) -> None:
        self.made_of = tokenizer, limits, texts, token_weights
        self.limits, self.texts = limits, texts
        self.reader = Reader(tokenizer, texts, token_weights)

    def __reduce__(self) -> Any:
        return _Work, self.made_of

    def __call__(self, chunk: Sequence[Conditioned]) -> _Read:
        rows: list[Tokenized] = []
        dropped: list[Dropped] = []
        keys: list[bytes] = []
        reader = self.reader
        reader.rewritten = reader.goals_lost = reader.texts_cut = 0
        alike = _goal_texts(chunk)
        for example, sides in zip(chunk, reader.prefetch(chunk), strict=True):
            row = reader.read(example, self.limits, sides, alike[example.example_id])
            if isinstance(row, Dropped):
                dropped.append(row)
                continue
            rows.append(row)
            if "mismatched" in self.texts:
                keys.append(asked(example))
        notes = {
            NO_PREFIX: reader.rewritten,
            GOAL_LOST: reader.goals_lost,
            PROMPT_CUT: sum(row.prompt_cut > 0 for row in rows),
            RESPONSE_CUT: sum(any(row.response_cut) for row in rows),
            TEXT_CUT: reader.texts_cut,
        }
        return _Read(rows, dropped, notes, keys)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The same work, whose rows come as a block for the disk."""

    work: _Work

    def __call__(self, chunk: Sequence[Conditioned]) -> _Read:
        read = self.work(chunk)
        return replace(read, rows=Block.of(read.rows))


class _Told:
    """What was heard of all chunks, in their order; ``dropped`` of a strict reading only, which lists them."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.dropped: list[Dropped] = []
        self.asked: list[bytes] = []
        self._counts, self._notes = Counts(), Counter[str]()

    def hear(self, read: _Read) -> Any:
        """The rows of a chunk; the rest is noted."""
        self.dropped += read.dropped if self._strict else ()
        self.asked += read.asked
        self._notes.update(read.notes)
        for row in read.dropped:
            self._counts.drop(row)
        return read.rows

    def counts(self, kept: int) -> Counts:
        self._counts.kept = kept
        self._counts.notes |= {what: n for what, n in self._notes.items() if n}
        return self._counts


def _emptied(chunks: list[T]) -> Iterator[T]:
    """The chunks in order, none of them kept."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


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

