"""A tokenizer's view of a conversation: the text a model reads, and where a turn ends.

Training and asking go through the one :func:`render_prompt`. Templates that can switch reasoning on get
``enable_thinking=False``: preference data hold replies without reasoning, and a prompt that ends with
the empty reasoning block is what such models were trained to answer directly. ``mlx_lm.generate`` and
``mlx_lm.server`` switch reasoning on by default; to ask an adapter there with the words of training,
pass ``--chat-template-config '{"enable_thinking": false}'`` (server: ``--chat-template-args``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpref.data.segments import Segments
from mlxpref.errors import DataError, ModelError
from mlxpref.hub import model_folder
from mlxpref.records import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "mlxpref-asks-where-a-turn-ends"

_ANCHORS = ("\n", ".", "a", " ")
"""Texts a response may follow when it is encoded alone, so that it does not look like the start of a text."""


def load_tokenizer(
    model_path: str, *, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, as mlx-lm loads it.

    Args:
        model_path: a folder, or a hub id "owner/name".
        revision: of the hub id.
        chat_template: a Jinja template, or a file that holds one, instead of the model's own.

    Raises:
        ModelError: no tokenizer there, a damaged one, or one without a token that ends a turn.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # read when transformers is imported
    from transformers import AutoTokenizer

    folder = model_folder(model_path, revision=revision, weights=False)
    _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: its tokenizer does not load: {error}") from error
    if chat_template is not None:
        file = Path(chat_template) if len(chat_template) < 1024 and "{" not in chat_template else None
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else chat_template
    turn_end(tokenizer)
    return tokenizer


def _check_files(folder: Path) -> None:
    """ModelError for files that libraries would report in words of their own, or not at all."""
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    found = [folder / name for name in known if (folder / name).is_file()]
    if not found and not any(folder.glob("*.tiktoken")):
        raise ModelError(f"{folder}: no tokenizer (looked for {', '.join(known)}); copy the model's files there")
    for file in found:
        if file.suffix == ".json":
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{file} is damaged ({error}); fetch it again") from error


def render_prompt(prompt: Prompt, tokenizer: Any, *, tools: Any = None) -> str:
    """The text a model reads before it responds: the chat template's, with the header of its own turn.

    Without a template: the messages' contents, a blank line after each.

    Raises:
        DataError: the template refuses the messages (a role it does not know, roles that do not alternate).
    """
    if not tokenizer.chat_template:
        return "".join(f"{message.content}\n\n" for message in prompt)
    return _apply(prompt, tokenizer, tools, add_generation_prompt=True)


def render_turn(prompt: Prompt, response: str, tokenizer: Any, *, tools: Any = None) -> str:
    """The text of a conversation that the response has ended, up to and with the text of the end token.

    Where the template writes no end token, and without a template, it stops after the response.

    Raises:
        DataError: the template refuses the messages.
    """
    if not tokenizer.chat_template:
        return render_prompt(prompt, tokenizer) + response
    turns = (*prompt, Message("assistant", response))
    return _apply(turns, tokenizer, tools, add_generation_prompt=False).removesuffix(turn_end(tokenizer).after)


def _apply(turns: Prompt, tokenizer: Any, tools: Any, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [turn.as_dict() for turn in turns],
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How an assistant turn ends.

    Attributes:
        token: id of the end token.
        written: the chat template writes it; otherwise it is to be appended.
        after: what the template writes after it (or after the response, if not ``written``); never scored.
    """

    token: int
    written: bool
    after: str


def turn_end(tokenizer: Any) -> TurnEnd:
    """The first special token the template writes after a response; without one, the tokenizer's eos.

    Raises:
        ModelError: neither.
    """
    return _turn_end(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=8)
def _turn_end(tokenizer: Any, chat_template: str) -> TurnEnd:
    after = ""
    if chat_template:
        turns = (Message("user", "a question"), Message("assistant", _MARK))
        try:
            after = _apply(turns, tokenizer, None, add_generation_prompt=False).rpartition(_MARK)[2]
        except DataError as error:
            raise ModelError(f"one question and one reply: {error}; give another chat template") from error
    found = _any_of(tokenizer.all_special_tokens).search(after)
    if found:
        token = tokenizer.convert_tokens_to_ids(found.group())
        return TurnEnd(token, True, after[found.end() :])
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no token that ends a turn; set eos_token in tokenizer_config.json")
    return TurnEnd(tokenizer.eos_token_id, False, after)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class Encoder:
    """Text to ids, remembering what it has encoded: halves of one source share their responses.

    A template writes its own special tokens; without one the tokenizer adds what begins a text (BOS).

    Attributes:
        end: id of the token that ends a text, if there is one.
        segments: encodes word by word, where that gives the same ids; else None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.add_special_tokens = not tokenizer.chat_template
        self.end: int | None = tokenizer.eos_token_id  # asked for once: tokenizers are slow to tell
        added = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
        self._added = _any_of(str(token) for token in added)
        self._backend = _plain_backend(tokenizer)
        self.segments = None if self._backend is None else _segments(tokenizer, len(tokenizer))
        self._known: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}

    def prefetch(self, texts: Iterable[str]) -> None:
        """Encode all texts at once, on all cores, unless that is no faster; forget earlier ones."""
        self._known, self._inside = {}, {}
        fresh = [] if self.segments is not None else list(dict.fromkeys(text for text in texts if text))
        if fresh:
            self._known = dict(zip(fresh, self._encode(fresh, self.add_special_tokens), strict=True))

    def ids(self, text: str) -> list[int]:
        """(n,) ids of a text from its beginning."""
        if text not in self._known:
            self._known[text] = self._encode([text], self.add_special_tokens)[0]
        return self._known[text]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if self.segments is not None:
            return [self.segments.ids(text, special=add_special_tokens) for text in texts]
        if self._backend is not None and self._backend.padding is None and self._backend.truncation is None:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in found]
        # verbose: a text longer than the tokenizer's own limit is ours to cut, not to be warned of.
        found = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return [list(ids) for ids in found]

    def tail(self, prompt_text: str) -> str:
        """The end of a prompt's text that decides, with what follows, how what follows is encoded.

        An added token cuts a text in two that are encoded apart, so nothing before the last one matters.
        """
        if self.add_special_tokens:
            return prompt_text
        return prompt_text[max((at.start() for at in self._added.finditer(prompt_text)), default=0) :]

    def continuation(self, prompt_text: str, rest: str) -> list[int]:
        """(n,) ids of ``rest`` as a model would generate it after the ids of ``prompt_text``.

        Those of both together, less the prompt's, wherever the prompt's come first in them. Where the
        text of the two would merge over the boundary, a model that was given the prompt cannot take its
        last token back: ``rest`` is then encoded by itself.
        """
        before, both = self._together(self.tail(prompt_text), rest)
        return both[len(before) :] if both[: len(before)] == before else self._alone(rest)

    def _together(self, tail: str, rest: str) -> tuple[list[int], list[int]]:
        """Ids of the tail, and of the two together, both without those that are the same in them for certain."""
        at = None if self.segments is None else self.segments.last_word(tail)
        if at is None:
            return self.ids(tail), self.ids(tail + rest)
        return self._ids_inside(tail[at:]), self._ids_inside(tail[at:] + rest)

    def _ids_inside(self, text: str) -> list[int]:
        if text not in self._inside and self.segments is not None:
            self._inside[text] = self.segments.inside(text)
        return self._inside[text]

    def _alone(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            before, both = self._encode([anchor, anchor + text], False)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode([text], False)[0]


@lru_cache(maxsize=8)
def _segments(tokenizer: Any, n_tokens: int) -> Segments | None:
    """Kept with the words it knows: finding out what a tokenizer is reads its whole vocabulary."""
    return Segments.of(_plain_backend(tokenizer))


def _plain_backend(tokenizer: Any) -> Any:
    """What encodes for a fast tokenizer that is called as all are; None of a class that adds something of its own."""
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(own, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )
    if not plain or getattr(tokenizer, "split_special_tokens", False):
        return None
    tokenizer([" "], verbose=False)  # takes padding and truncation off, where its file has some
    return tokenizer.backend_tokenizer
