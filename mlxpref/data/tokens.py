"""The tokens of one example, within the limits: what is cut where it is too long, and why it is dropped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mlxpref.data.boundary import Boundary, Ids, Texts, n_common, prompt_ids
from mlxpref.data.columns import numbers_of
from mlxpref.data.drafts import OWN_TEXTS
from mlxpref.data.pieces import token_weights as weigh
from mlxpref.data.render import render_prompt
from mlxpref.data.texts import Further, further_text
from mlxpref.data.truncation import cut_prompt
from mlxpref.errors import ConfigError, DataError
from mlxpref.records import Conditioned, Dropped, Message, Prompt, Tokenized

Truncation = Literal["cut", "drop"]

TOO_LONG = "longer than max_length"
ONE_PROMPT = "the responses share one prompt, so there are no instructions to compare"


@dataclass(frozen=True, slots=True)
class Limits:
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
class _Fitted:
    """A prompt and its responses within the limits.

    Attributes:
        prompt, texts: as they are read; the prompt may have been cut.
        whole: tokens before anything was cut.
        uncut: tokens behind the prompt that is read, responses whole.
        kept: tokens, responses cut.
        counted: tokens of the prompt with whichever goal takes most; None where nothing came near the limit.
    """

    prompt: Prompt
    texts: Texts
    whole: Ids
    uncut: Ids
    kept: Ids
    counted: int | None = None


class Reader:
    """Reads examples with one tokenizer; counts what it had to note."""

    def __init__(self, tokenizer: Any, texts: Collection[str] = (), token_weights: bool = False) -> None:
        self.tokenizer = tokenizer
        self.boundary = Boundary(tokenizer)
        self.encoder = self.boundary.encoder
        self.texts = tuple(sorted(texts))
        self.own_texts = tuple(name for name in self.texts if name in OWN_TEXTS)
        self.weighed = token_weights
        self.rewritten = 0
        self.goals_lost = 0
        self.texts_cut = 0
        self._goal_survives: dict[str, bool] = {}
        unknown = set(texts) - {*OWN_TEXTS, "instructions", "mismatched"}
        if unknown:
            raise DataError(f"there is no further text {', '.join(sorted(unknown))}")

    def prefetch(self, examples: Sequence[Conditioned]) -> list[list[Texts | Dropped]]:
        """Texts of all sides of all examples, and their encodings at once."""
        found = [[self._texts_of(side, side.prompt) for side in _sides(example)] for example in examples]
        self.boundary.prefetch([texts for sides in found for texts in sides])
        return found

    def read(
        self,
        example: Conditioned,
        limits: Limits,
        texts: Sequence[Texts | Dropped] | None = None,
        goal_texts: Collection[str] = (),
    ) -> Tokenized | Dropped:
        """The tokens of an example, or why there are none; ``texts`` as ``prefetch`` gave them."""
        sides = _sides(example)
        if "instructions" in self.texts and len(sides) == 1:
            return Dropped(ONE_PROMPT, example.example_id)
        found: list[_Fitted] = []
        for at, side in enumerate(sides):
            one = self._fitted(side, limits, texts[at] if texts else None, goal_texts)
            if isinstance(one, Dropped):
                return one
            found.append(one)
        row = self._joint(example, found) if len(sides) > 1 else self._row(example, found[0])
        if isinstance(row, Tokenized) and self.own_texts:
            row = self._with_texts(row, example, found[0], limits, goal_texts)
        if isinstance(row, Tokenized) and self.weighed:
            row = self._with_weights(row, example, found)
        if isinstance(row, Tokenized):
            self.rewritten += not all(one.texts.has_prefix for one in found)
            self.goals_lost += not self._survives(example.goal_text)
        return row

    def _texts_of(self, example: Conditioned, prompt: Prompt) -> Texts | Dropped:
        return self.boundary.texts(example, prompt, [name for name in self.own_texts if name != "rationale"])

    # --- within the limits ---

    def _fitted(
        self, example: Conditioned, limits: Limits, texts: Texts | Dropped | None, goal_texts: Collection[str]
    ) -> _Fitted | Dropped:
        texts = texts or self._texts_of(example, example.prompt)
        if isinstance(texts, Dropped):
            return texts
        ids = self.boundary.ids(texts)
        if not ids.prompt:
            return Dropped("prompt encodes to no token", example.example_id)
        if not all(map(len, ids.responses)):
            return Dropped("response encodes to no token", example.example_id)
        if len(ids.prompt) + ids.longest > limits.length - _slack(goal_texts):
            return self._fit(example, texts, ids, limits, goal_texts)
        return _Fitted(example.prompt, texts, ids, ids, ids)

    def _fit(
        self, example: Conditioned, texts: Texts, whole: Ids, limits: Limits, goal_texts: Collection[str]
    ) -> _Fitted | Dropped:
        """Tokens within the limits: the prompt cut as far as the responses ask for but not below its own
        limit, then the responses' tails."""
        prompt, ids, longest = example.prompt, whole, whole.longest
        goals = _goals(example, goal_texts)
        counted = max(self._counted(example, prompt, goals), len(ids.prompt))
        if counted + longest > limits.length and limits.truncation == "drop":
            return Dropped(TOO_LONG, example.example_id)
        target = max(limits.prompt, limits.length - longest)
        if counted > target:
            prompt = cut_prompt(
                example.prompt, example.goal_text, lambda prompt: self._counted(example, prompt, goals) <= target
            )
            shorter = self._texts_of(example, prompt)
            if isinstance(shorter, Dropped):
                return shorter
            texts, ids = shorter, self.boundary.ids(shorter)
            counted = max(self._counted(example, prompt, goals), len(ids.prompt))
        room = limits.length - counted
        if room < 1:
            return Dropped("prompt longer than max_length even when cut", example.example_id)
        kept = Ids(ids.prompt, [response[:room] for response in ids.responses])
        return _Fitted(prompt, texts, whole, ids, kept, counted)

    def _counted(self, example: Conditioned, prompt: Prompt, goals: Collection[str | None]) -> int:
        """Tokens of a prompt with whichever of these goals takes most."""
        tools = example.extras.get("tools")
        stated = (_restated(prompt, example.goal_text, goal) for goal in goals)
        texts = (render_prompt(one, self.tokenizer, tools=tools) for one in stated)
        return max(len(prompt_ids(self.encoder, text)) for text in texts)

    # --- rows ---

    def _row(self, example: Conditioned, found: _Fitted) -> Tokenized | Dropped:
        kept = found.kept
        if len(kept.responses) > 1 and all(ids == kept.responses[0] for ids in kept.responses):
            return Dropped("all responses are the same tokens", example.example_id)
        return Tokenized(
            prompt_ids=np.array(kept.prompt, np.int32),
            response_ids=tuple(np.array(ids, np.int32) for ids in kept.responses),
            example_id=example.example_id,
            scores=example.scores,
            goal=example.goal,
            half=example.half,
            prompt_cut=len(found.whole.prompt) - len(kept.prompt),
            response_cut=_cuts([found]),
            extras=numbers_of(example),
        )

    def _joint(self, example: Conditioned, found: Sequence[_Fitted]) -> Tokenized | Dropped:
        """Responses with a prompt each: what these begin with is shared, less at least one token of each."""
        prompts = [one.kept.prompt for one in found]
        n = min(*(n_common(prompts[0], other) for other in prompts[1:]), *(len(ids) - 1 for ids in prompts))
        if example.goal_text is not None:
            return Dropped("a goal stands in one prompt, and the responses have two", example.example_id)
        if self.own_texts or "mismatched" in self.texts:
            return Dropped("a further text has one prompt, and the responses have two", example.example_id)
        if n < 1:
            return Dropped("the prompts of the responses begin with different tokens", example.example_id)
        responses = [one.kept.responses[0] for one in found]
        if all((ids, prompt) == (responses[0], prompts[0]) for ids, prompt in zip(responses, prompts, strict=True)):
            return Dropped("all responses are the same tokens", example.example_id)
        rests = tuple(np.array(ids[n:], np.int32) for ids in prompts)
        asked = "instructions" in self.texts
        return Tokenized(
            prompt_ids=np.array(prompts[0][:n], np.int32),
            response_ids=tuple(np.array(ids, np.int32) for ids in responses),
            example_id=example.example_id,
            scores=example.scores,
            prompt_cut=sum(len(one.whole.prompt) - len(one.kept.prompt) for one in found),
            response_cut=_cuts(found),
            extras=numbers_of(example),
            texts={"instructions": rests} if asked else {},
            leads=rests + (np.zeros(0, np.int32),) * len(rests) if asked else rests,
        )

    def _with_texts(
        self, row: Tokenized, example: Conditioned, found: _Fitted, limits: Limits, goal_texts: Collection[str]
    ) -> Tokenized | Dropped:
        kept: dict[str, Further] = {}
        for name in self.own_texts:
            one = further_text(name, example, found.prompt, found.texts, found.uncut, self.boundary)
            one = one if isinstance(one, Dropped) else self._fit_text(name, one, example, found, limits, goal_texts)
            if isinstance(one, Dropped):
                return one
            kept[name] = one
        leads = [np.zeros(0, np.int32)] * len(row.response_ids) + [np.array(t.lead, np.int32) for t in kept.values()]
        return replace(
            row,
            texts={name: (np.array(text.ids, np.int32),) for name, text in kept.items()},
            leads=tuple(leads) if any(map(len, leads)) else (),
        )

    def _fit_text(
        self, name: str, text: Further, example: Conditioned, found: _Fitted, limits: Limits,
        goal_texts: Collection[str],
    ) -> Further | Dropped:  # fmt: skip
        """A further text whose tail is cut to fit behind the prompt with whichever goal takes most."""
        room = limits.length - _slack(goal_texts) - len(found.kept.prompt) - len(text.lead)
        if len(text.ids) <= room:
            return text
        counted = found.counted or self._counted(example, found.prompt, _goals(example, goal_texts))
        room = limits.length - max(counted, len(found.kept.prompt)) - len(text.lead)
        if len(text.ids) > room and limits.truncation == "drop":
            return Dropped(TOO_LONG, example.example_id)
        if room < 1:
            return Dropped(f"{name} has no room within max_length", example.example_id)
        self.texts_cut += len(text.ids) > room
        return replace(text, ids=text.ids[:room])

    def _with_weights(self, row: Tokenized, example: Conditioned, found: Sequence[_Fitted]) -> Tokenized | Dropped:
        """The row with weights of its tokens."""
        pieces = example.extras.get("token_weights")
        if not isinstance(pieces, list | tuple):
            return Dropped("no token_weights", example.example_id)
        weights = []
        for k, of_response in enumerate(pieces):
            one, at = (found[k], 0) if len(found) > 1 else (found[0], k)
            try:
                own = weigh(of_response, one.texts, at, one.uncut.responses[at], self.boundary)
            except DataError as error:
                return Dropped(str(error), example.example_id)
            weights.append(own[: len(row.response_ids[k])])
        return replace(row, extras={**row.extras, "token_weights": tuple(weights)})

    def _survives(self, goal_text: str | None) -> bool:
        """Whether the tokenizer knows every character of a goal; some drop those they do not know."""
        if goal_text is None:
            return True
        if goal_text not in self._goal_survives:
            decoded = self.tokenizer.decode(self.encoder.ids(goal_text), skip_special_tokens=True)
            self._goal_survives[goal_text] = "".join(decoded.split()) == "".join(goal_text.split())
        return self._goal_survives[goal_text]


def _sides(example: Conditioned) -> list[Conditioned]:
    """The example; or where each response has a prompt of its own, one for each, of that prompt and response."""
    prompts = example.extras.get("instructions")
    if not isinstance(prompts, list | tuple):
        return [example]
    return [
        replace(example, prompt=tuple(map(Message.from_dict, prompt)), responses=(response,), goal_text=None)
        for prompt, response in zip(prompts, example.responses, strict=True)
    ]


def _slack(goal_texts: Collection[str]) -> int:
    """No goal takes more tokens than it has bytes, so shorter rows fit whichever is written."""
    return max((len(text.encode()) for text in goal_texts), default=0)


def _goals(example: Conditioned, goal_texts: Collection[str]) -> set[str | None]:
    return {example.goal_text, *goal_texts} if example.goal_text is not None else {None}


def _cuts(found: Sequence[_Fitted]) -> tuple[int, ...]:
    """(K,) tokens that were taken from each response's tail."""
    pairs = (pair for one in found for pair in zip(one.whole.responses, one.kept.responses, strict=True))
    return tuple(len(full) - len(ids) for full, ids in pairs)


def _restated(prompt: Prompt, goal: str | None, other: str | None) -> Prompt:
    """The prompt with another goal in the place of its own."""
    if goal is None or other is None or goal == other:
        return prompt
    at = next((at for at, message in enumerate(prompt) if goal in message.content), None)
    if at is None:
        return prompt
    content = prompt[at].content.replace(goal, other, 1)
    return (*prompt[:at], replace(prompt[at], content=content), *prompt[at + 1 :])
