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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np

from mlxpref.data.render import Encoder, TurnEnd, load_tokenizer, render_prompt, render_turn, turn_end
from mlxpref.data.truncation import cut_prompt
from mlxpref.data.words import counted
from mlxpref.errors import ConfigError, DataError, raise_all
from mlxpref.records import Conditioned, Counts, Dropped, Prompt, Tokenized

__all__ = ["encode_prompt", "load_tokenizer", "render_prompt", "tokenize", "tokenize_all"]

Truncation = Literal["cut", "drop"]

STRICT_SHOWN = 10
"""Problems listed by a strict tokenization."""

_AT_ONCE = 256
"""Examples whose texts are encoded in one call; halves of one source are not parted."""

NO_PREFIX = "the template rewrites a finished turn; the prompt is the longest common prefix"
PROMPT_CUT = "prompt cut to fit max_length"
RESPONSE_CUT = "response cut to fit max_length"
GOAL_LOST = "the tokenizer does not know every character of the goal"


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
    goal_texts: Collection[str] = (),
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
        goal_texts: of all halves of the source, among which the longest decides what fits, so that
            they stay alike in all but the goal.

    Returns:
        The tokens, or why there are none.

    Raises:
        ConfigError: the lengths leave no room for a response, or ``truncation`` is neither.
    """
    limits = _Limits(max_length, max_prompt_length, truncation)
    return _Reader(tokenizer).read(example, limits, goal_texts=goal_texts)


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

    Neighbours of one ``example_id`` are halves of one source and are cut, or dropped, alike. A column that
    holds whole numbers in some rows and fractions in others becomes fractions in all.

    Raises:
        DataError: ``strict``, and a row was dropped.
        ConfigError: as :func:`tokenize`.
    """
    limits = _Limits(max_length, max_prompt_length, truncation)
    reader = _Reader(tokenizer)
    rows: list[Tokenized] = []
    dropped: list[Dropped] = []
    counts = Counts()
    for chunk in _chunks(examples):
        alike = _goal_texts(chunk)
        for example, texts in zip(chunk, reader.prefetch(chunk), strict=True):
            row = reader.read(example, limits, texts, alike[example.example_id])
            if isinstance(row, Dropped):
                dropped.append(row)
                counts.drop(row)
            else:
                rows.append(row)
    if strict:
        _raise_strict(dropped)
    counts.kept = len(rows)
    _note(counts, NO_PREFIX, reader.rewritten)
    _note(counts, GOAL_LOST, reader.goals_lost)
    _note(counts, PROMPT_CUT, sum(row.prompt_cut > 0 for row in rows))
    _note(counts, RESPONSE_CUT, sum(any(row.response_cut) for row in rows))
    return _one_type_a_column(rows), counts


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


@dataclass(frozen=True, slots=True)
class _Limits:
    """What ``tokenize`` was asked for, checked."""

    length: int
    asked_prompt: int | None
    truncation: Truncation

    def __post_init__(self) -> None:
        if self.truncation not in ("cut", "drop"):
            raise ConfigError(f"truncation is {self.truncation!r}; it is one of cut, drop")
        if self.length < 2:
            raise ConfigError(f"max_length is {self.length}; a prompt and a response need at least 2 tokens")
        if not 1 <= self.prompt < self.length:
            raise ConfigError(
                f"max_prompt_length is {self.prompt}; between 1 and max_length - 1, {self.length - 1},"
                " it leaves room for a response"
            )

    @property
    def prompt(self) -> int:
        return self.length // 2 if self.asked_prompt is None else self.asked_prompt


@dataclass(frozen=True, slots=True)
class _Texts:
    """What a model reads: the prompt, and the prompt with each of K finished responses."""

    prompt: str
    finished: tuple[str, ...]

    @property
    def has_prefix(self) -> bool:
        return all(text.startswith(self.prompt) for text in self.finished)


@dataclass(frozen=True, slots=True)
class _Ids:
    prompt: list[int]
    responses: list[list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.responses))


class _Reader:
    """Reads examples with one tokenizer; counts what it had to note."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: TurnEnd = turn_end(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.rewritten = 0
        self.goals_lost = 0
        self._goal_survives: dict[str, bool] = {}

    def prefetch(self, examples: Sequence[Conditioned]) -> list[_Texts | Dropped]:
        """Texts of all examples, and their encodings at once."""
        found = [self._texts(example, example.prompt) for example in examples]
        wanted = []
        for texts in found:
            if isinstance(texts, _Texts):
                start = len(texts.prompt) - len(self.encoder.tail(texts.prompt))
                wanted += [texts.prompt, texts.prompt[start:]]
                wanted += [text[start:] if texts.has_prefix else text for text in texts.finished]
        self.encoder.prefetch(wanted)
        return found

    def read(
        self,
        example: Conditioned,
        limits: _Limits,
        texts: _Texts | Dropped | None = None,
        goal_texts: Collection[str] = (),
    ) -> Tokenized | Dropped:
        where = example.example_id
        texts = texts or self._texts(example, example.prompt)
        if isinstance(texts, Dropped):
            return texts
        ids = self._ids(texts)
        if not ids.prompt:
            return Dropped("prompt encodes to no token", where)
        if not all(map(len, ids.responses)):
            return Dropped("response encodes to no token", where)
        fitted = ids
        # No goal takes more tokens than it has bytes, so shorter rows fit whichever is written.
        slack = max((len(text.encode()) for text in goal_texts), default=0)
        if len(ids.prompt) + ids.longest > limits.length - slack:
            cut = self._fit(example, ids, limits, goal_texts)
            if isinstance(cut, Dropped):
                return cut
            fitted = cut
        return self._row(example, texts, ids, fitted)

    def _texts(self, example: Conditioned, prompt: Prompt) -> _Texts | Dropped:
        tools = example.extras.get("tools")
        try:
            text = render_prompt(prompt, self.tokenizer, tools=tools)
            finished = tuple(
                render_turn(prompt, response, self.tokenizer, tools=tools) for response in example.responses
            )
        except DataError as error:
            return Dropped(str(error), example.example_id)
        if example.goal_text and example.goal_text not in text:
            return Dropped("the chat template drops the goal", example.example_id)
        return _Texts(text, finished)

    def _ids(self, texts: _Texts) -> _Ids:
        """The boundary: tokens of the prompt, and of each response with its end token, if it has any."""
        prompt = _prompt_ids(self.encoder, texts.prompt)
        if texts.has_prefix:
            n = len(texts.prompt)
            responses = [self.encoder.continuation(texts.prompt, text[n:]) for text in texts.finished]
        else:
            finished = [self.encoder.ids(text) for text in texts.finished]
            n = min(_n_common(prompt, ids) for ids in finished)
            prompt, responses = prompt[:n], [ids[n:] for ids in finished]
        return _Ids(prompt, [self._ended(ids) for ids in responses])

    def _ended(self, ids: list[int]) -> list[int]:
        """With the end token last; nothing, if there is nothing but the end token."""
        if self.end.written and self.end.token in ids:
            ids = ids[: len(ids) - 1 - ids[::-1].index(self.end.token)]
        return [*ids, self.end.token] if ids else []

    def _fit(
        self, example: Conditioned, ids: _Ids, limits: _Limits, goal_texts: Collection[str]
    ) -> _Ids | Dropped:
        """Tokens within the limits: the prompt cut as far as the responses ask for but not below its own
        limit, then the responses' tails."""
        longest = ids.longest
        goals = {example.goal_text, *goal_texts} if example.goal_text is not None else {None}
        counted = max(self._counted(example, example.prompt, goals), len(ids.prompt))
        if counted + longest > limits.length and limits.truncation == "drop":
            return Dropped("longer than max_length", example.example_id)
        target = max(limits.prompt, limits.length - longest)
        if counted > target:
            prompt = cut_prompt(
                example.prompt, example.goal_text, lambda prompt: self._counted(example, prompt, goals) <= target
            )
            texts = self._texts(example, prompt)
            if isinstance(texts, Dropped):
                return texts
            ids = self._ids(texts)
            counted = max(self._counted(example, prompt, goals), len(ids.prompt))
        room = limits.length - counted
        if room < 1:
            return Dropped("prompt longer than max_length even when cut", example.example_id)
        return _Ids(ids.prompt, [response[:room] for response in ids.responses])

    def _counted(self, example: Conditioned, prompt: Prompt, goals: Collection[str | None]) -> int:
        """Tokens of a prompt with whichever of these goals takes most."""
        tools = example.extras.get("tools")
        stated = (_restated(prompt, example.goal_text, goal) for goal in goals)
        texts = (render_prompt(one, self.tokenizer, tools=tools) for one in stated)
        return max(len(_prompt_ids(self.encoder, text)) for text in texts)

    def _row(self, example: Conditioned, texts: _Texts, whole: _Ids, kept: _Ids) -> Tokenized | Dropped:
        if all(ids == kept.responses[0] for ids in kept.responses):
            return Dropped("all responses are the same tokens", example.example_id)
        self.rewritten += not texts.has_prefix
        self.goals_lost += not self._survives(example.goal_text)
        return Tokenized(
            prompt_ids=np.array(kept.prompt, np.int32),
            response_ids=tuple(np.array(ids, np.int32) for ids in kept.responses),
            example_id=example.example_id,
            scores=example.scores,
            goal=example.goal,
            half=example.half,
            prompt_cut=len(whole.prompt) - len(kept.prompt),
            response_cut=tuple(len(full) - len(ids) for full, ids in zip(whole.responses, kept.responses, strict=True)),
            extras=_numbers(example),
        )

    def _survives(self, goal_text: str | None) -> bool:
        """Whether the tokenizer knows every character of a goal; some drop those they do not know."""
        if goal_text is None:
            return True
        if goal_text not in self._goal_survives:
            decoded = self.tokenizer.decode(self.encoder.ids(goal_text), skip_special_tokens=True)
            self._goal_survives[goal_text] = "".join(decoded.split()) == "".join(goal_text.split())
        return self._goal_survives[goal_text]


def _prompt_ids(encoder: Encoder, text: str) -> list[int]:
    ids = encoder.ids(text)
    # Some tokenizers end every text; a response would then follow an ended one.
    ended = encoder.add_special_tokens and ids and ids[-1] == encoder.tokenizer.eos_token_id
    return ids[:-1] if ended else ids


def _restated(prompt: Prompt, goal: str | None, other: str | None) -> Prompt:
    """The prompt with another goal in the place of its own."""
    if goal is None or other is None or goal == other:
        return prompt
    at = next((at for at, message in enumerate(prompt) if goal in message.content), None)
    if at is None:
        return prompt
    content = prompt[at].content.replace(goal, other, 1)
    return (*prompt[:at], replace(prompt[at], content=content), *prompt[at + 1 :])


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _numbers(example: Conditioned) -> Mapping[str, Any]:
    """The columns an objective can read: numbers, one an example or one a response."""
    found = {
        name: value
        for name, value in {**example.extras, **example.attributes}.items()
        if _is_number(value) or (isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_number, value)))
    }
    distances = _goal_distances(example)
    return found if distances is None else {**found, "goal_distances": distances}


def _goal_distances(example: Conditioned) -> tuple[float, ...] | None:
    """(K,) squared; without a goal, to the score of the best response. None of unscored examples."""
    if example.distances is not None or example.scores is None:
        return example.distances
    best = example.scores[0]
    # Rounded as relabelling does, so that float noise does not decide between two equal distances.
    return tuple(round(float(score - best) ** 2, 9) for score in example.scores)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _one_type_a_column(rows: list[Tokenized]) -> list[Tokenized]:
    """Whole numbers as fractions, in columns that hold fractions elsewhere: one array type a run."""
    fractional = {
        name
        for row in rows
        for name, value in row.extras.items()
        for one in (value if isinstance(value, list | tuple) else (value,))
        if isinstance(one, float)
    }

    def alike(name: str, value: Any) -> Any:
        if name not in fractional:
            return value
        return tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)

    return [
        replace(row, extras={name: alike(name, value) for name, value in row.extras.items()}) if row.extras else row
        for row in rows
    ]


def _note(counts: Counts, what: str, n: int) -> None:
    if n:
        counts.notes[what] = n
