"""Where a prompt ends and what is scored begins: its text and its tokens, decided together.

The prompt is rendered with the header of the assistant's turn and encoded: its tokens are the same for
all K responses, and those generation starts from. A response is what the template writes after that
header, up to and with the turn's end token; template text after the end token is not scored. Its tokens
are those of prompt and response encoded together, less the prompt's, so a model meets the tokens it would
itself generate; ``render.Encoder.continuation`` says what happens where the two would merge.

Where a template writes something else after the messages than its own header (reasoning templates that
take the reasoning out of a finished turn do), the longest common prefix of all is the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxpref.data.render import Encoder, TurnEnd, render_prompt, render_turn, turn_end
from mlxpref.errors import DataError
from mlxpref.records import Conditioned, Dropped, Prompt


@dataclass(frozen=True, slots=True)
class Texts:
    """What a model reads: the prompt, the prompt with each of K finished responses, and by name with further ones."""

    prompt: str
    finished: tuple[str, ...]
    further: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_prefix(self) -> bool:
        return all(text.startswith(self.prompt) for text in self.finished)


@dataclass(frozen=True, slots=True)
class Ids:
    """Tokens of a prompt, and of what is scored after it: K responses, each with its end token."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.responses))


class Boundary:
    """Draws the boundary with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end: TurnEnd = turn_end(tokenizer)
        self.encoder = Encoder(tokenizer)

    def texts(self, example: Conditioned, prompt: Prompt, further: Collection[str] = ()) -> Texts | Dropped:
        """The texts of an example behind ``prompt``, which may be a shorter one than its own.

        Args:
            further: columns of the example that are one more response each.
        """
        tools = example.extras.get("tools")
        lacking = [name for name in further if not isinstance(example.extras.get(name), str)]
        if lacking:
            return Dropped(f"no {lacking[0]}", example.example_id)
        try:
            text = render_prompt(prompt, self.tokenizer, tools=tools)
            finished = tuple(
                render_turn(prompt, response, self.tokenizer, tools=tools) for response in example.responses
            )
            more = {name: render_turn(prompt, example.extras[name], self.tokenizer, tools=tools) for name in further}
        except DataError as error:
            return Dropped(str(error), example.example_id)
        if example.goal_text and example.goal_text not in text:
            return Dropped("the chat template drops the goal", example.example_id)
        return Texts(text, finished, more)

    def prefetch(self, found: Sequence[Texts | Dropped]) -> None:
        """Encode all texts at once."""
        wanted = []
        for texts in found:
            if isinstance(texts, Texts):
                start = len(texts.prompt) - len(self.encoder.tail(texts.prompt))
                finished = (*texts.finished, *texts.further.values())
                wanted += [texts.prompt, texts.prompt[start:]]
                wanted += [text[start:] if texts.has_prefix else text for text in finished]
        self.encoder.prefetch(wanted)

    def ids(self, texts: Texts) -> Ids:
        """The boundary: tokens of the prompt, and of each response with its end token, if it has any."""
        prompt = prompt_ids(self.encoder, texts.prompt)
        if texts.has_prefix:
            n = len(texts.prompt)
            responses = [self.encoder.continuation(texts.prompt, text[n:]) for text in texts.finished]
        else:
            finished = [self.encoder.ids(text) for text in texts.finished]
            n = min(n_common(prompt, ids) for ids in finished)
            prompt, responses = prompt[:n], [ids[n:] for ids in finished]
        return Ids(prompt, [self.ended(ids) for ids in responses])

    def behind(self, texts: Texts, ids: Ids, finished: str) -> list[int]:
        """Tokens of one more finished response behind a prompt that is decided; none if it does not follow it."""
        if texts.has_prefix and finished.startswith(texts.prompt):
            return self.ended(self.encoder.continuation(texts.prompt, finished[len(texts.prompt) :]))
        found, n = self.encoder.ids(finished), len(ids.prompt)
        return self.ended(found[n:]) if found[:n] == ids.prompt else []

    def ended(self, ids: list[int]) -> list[int]:
        """With the end token last; nothing, if there is nothing but the end token."""
        if self.end.written and self.end.token in ids:
            ids = ids[: len(ids) - 1 - ids[::-1].index(self.end.token)]
        return [*ids, self.end.token] if ids else []


def prompt_ids(encoder: Encoder, text: str) -> list[int]:
    """(n,) ids of a prompt's text."""
    ids = encoder.ids(text)
    # Some tokenizers end every text; a response would then follow an ended one.
    ended = encoder.add_special_tokens and ids and ids[-1] == encoder.end
    return ids[:-1] if ended else ids


def n_common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many tokens, or characters, both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
