"""Tokenizers that never join two words: their texts piece by piece, each piece encoded once.

A byte-pair tokenizer of the SentencePiece kind (Llama 2, Mistral, TinyLlama and their relatives) writes "▁" for a
space and reads a whole text as one word. Where no token of its vocabulary holds a "▁" behind another character, no
merge ever reaches over a space, so the ids of a text are those of its words one after the other, each a space and what
follows it. Words repeat; texts do not. What such a tokenizer does to a text is checked here, not assumed; of others
:meth:`Segments.of` is None.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

SPACE = "▁"

KNOWN = 1 << 17
"""Words until the older half of what is remembered is forgotten, some 30 MB; …"""

LONGEST = 64
"""… and characters of the longest that is: texts without spaces are one word."""

_WORD = re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
_JOINED = re.compile(f"[^{SPACE}]{SPACE}")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


class Segments:
    """Encodes texts with one tokenizer, word by word. Made by :meth:`of`.

    Attributes:
        begin: ids before every text that begins one, where special tokens are added.
    """

    def __init__(self, model: Any, added: dict[str, int], begin: list[int], *, prepend: bool) -> None:
        self.begin = begin
        self._added, self._prepend = added, prepend
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(longest_first)})" if added else "((?!))")
        self._known = _Words(model)

    @classmethod
    def of(cls, backend: Any) -> Segments | None:
        """For this tokenizer of the library ``tokenizers``; None if its words depend on each other, or if anything
        about it is not known here."""
        told = json.loads(backend.to_str())
        normalizer, model, added = told["normalizer"] or {}, told["model"], told["added_tokens"]
        steps = normalizer.get("normalizers", [normalizer])
        if steps not in ([_PREPEND, _REPLACE], [_REPLACE]) or told["pre_tokenizer"] is not None:
            return None
        if not _is_plain_model(model) or any(map(_is_special_case, added)):
            return None
        bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        if whole[len(whole) - len(bare) :] != bare:  # something comes after a text
            return None
        ids = {token["content"]: token["id"] for token in added}
        return cls(backend.model, ids, whole[: len(whole) - len(bare)], prepend=len(steps) == 2)

    def ids(self, text: str, *, special: bool) -> list[int]:
        """(n,) ids of a text from its beginning; ``special`` puts before it what the tokenizer adds."""
        return [*(self.begin if special else ()), *self._of(text, begins=True)]

    def last_word(self, text: str) -> int | None:
        """Where the last word begins, before which everything stays as it is whatever text follows. None: nowhere."""
        start = max((at.end() for at in self._cut.finditer(text)), default=0)
        end = max(text.rfind(" "), text.rfind(SPACE)) + 1
        at = len(text[:end].rstrip(" " + SPACE))
        # A word right behind an added token, or at the very beginning, is written otherwise than one inside a text.
        return at if start < at < end else None

    def inside(self, text: str) -> list[int]:
        """(n,) ids of a text that goes on from another, at a place that ``last_word`` gave."""
        return self._of(text, begins=False)

    def _of(self, text: str, *, begins: bool) -> list[int]:
        parts = self._cut.split(text)
        found: list[int] = []
        for at, part in enumerate(parts):
            if at % 2:
                found.append(self._added[part])
            elif part:
                head = SPACE if self._prepend and (begins or at) else ""
                words = _WORD.findall(head + part.replace(" ", SPACE))
                found += chain.from_iterable(map(self._known.__getitem__, words))
        return found


class _Words(dict[str, list[int]]):
    """Ids by word; what is not known is encoded. Words that are met again stay, the others are forgotten in time."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._older: dict[str, list[int]] = {}

    def __missing__(self, word: str) -> list[int]:
        found = self._older.get(word)
        if found is None:
            found = [token.id for token in self._model.tokenize(word)]
        if len(word) <= LONGEST:
            if len(self) >= KNOWN:
                self._older = dict(self)
                self.clear()
            self[word] = found
        return found


def _is_plain_model(model: dict[str, Any]) -> bool:
    """Byte pairs, nothing drawn, nothing taken whole, and no token that goes on over a space."""
    unset = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    vocabulary = model.get("vocab", {})
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in unset)
        and SPACE in vocabulary
        and not any(map(_JOINED.search, vocabulary))
    )


def _is_special_case(added: dict[str, Any]) -> bool:
    """An added token that takes the space around it along, stands at words only, or is looked for in other text."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    text = added["content"]
    return any(added[name] for name in flags) or not text or " " in text or SPACE in text
