"""The gold score: ten things a good reply does, a point each, read from its text.

Five are content: the facts of the request. Five are form: how the reply is made; a text that is not made of
whole sentences has no form to speak of, and earns none of them. A reply scores as many points as it earns,
and 1 if it earns none, so the scale is 1–10. Nothing but the words is looked at: it does not matter who
wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlxpref.records import Prompt
from mlxpref.sandbox.language import sentences
from mlxpref.sandbox.world import KINDS, read_scene, stated

SENTENCES = (3, 5)
"""Sentences of a reply of the right length, both ends included: shorter is curt, longer rambles."""

SENSES = frozenset({"smelled", "sounded", "tasted", "felt", "glowed", "heard"})
CLOSING = frozenset({"hope", "thank", "thanks", "enjoy"})

FORM = {
    "length": "three to five sentences",
    "detail": "something that can be heard, felt, smelled, tasted or seen to glow",
    "reason": "says why, with 'because'",
    "variety": "at least two sentences, and none of them twice",
    "close": "ends on a friendly sentence: a hope, thanks, a wish to enjoy it",
}
"""Point of form -> what earns it, in whole sentences. The points of content are the kinds of facts,
``world.KINDS``: a fact earns its point if the reply states the word of the request and no other of that kind."""


@dataclass(frozen=True, slots=True)
class Gold:
    """What a reply earned: names of points, of :data:`FORM` and of ``world.KINDS``."""

    points: frozenset[str]

    @property
    def content(self) -> int:
        """0–5: facts right."""
        return len(self.points & KINDS.keys())

    @property
    def form(self) -> int:
        """0–5: points of form."""
        return len(self.points & FORM.keys())

    @property
    def score(self) -> int:
        """1–10: content and form together; 1 for none at all."""
        return max(1, self.content + self.form)


def gold(prompt: str, response: str) -> Gold:
    """Read the points from a reply to a request of this world.

    Args:
        prompt: the request alone, without a goal.

    Raises:
        ValueError: the prompt is not a request of this world.
    """
    scene = read_scene(prompt)
    facts = {kind for kind in KINDS if stated(response, kind) == {getattr(scene, kind)}}
    return Gold(frozenset(facts | form_points(response)))


def form_points(response: str) -> set[str]:
    """Points of form; none where a sentence is none of the world's language, or cut off."""
    found = sentences(response)
    if found is None:
        return set()
    words = [set(re.findall(r"[a-z]+", sentence.lower())) for sentence in found]
    earned = {
        "length": SENTENCES[0] <= len(found) <= SENTENCES[1],
        "detail": any(SENSES & sentence for sentence in words),
        "reason": any("because" in sentence for sentence in words),
        "variety": 2 <= len(found) == len(set(found)),
        "close": bool(CLOSING & words[-1]),
    }
    return {name for name, earns in earned.items() if earns}


def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """A scorer: the gold score, 1–10, of each reply to its prompt (the last user turn is the request)."""
    return [float(found.score) for found in _each(prompts, responses)]


def content(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """A scorer: points of content, 0–5."""
    return [float(found.content) for found in _each(prompts, responses)]


def form(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """A scorer: points of form, 0–5."""
    return [float(found.form) for found in _each(prompts, responses)]


def _each(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Gold]:
    asked = [next(turn.content for turn in reversed(prompt) if turn.role == "user") for prompt in prompts]
    return [gold(prompt, response) for prompt, response in zip(asked, responses, strict=True)]
