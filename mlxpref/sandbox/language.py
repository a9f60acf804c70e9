"""The small language of the world: every phrase that a reply is made of, and what a sentence is.

The language has no other sentences than these. So whether a text is one can be decided, and a model that
strings rewarded words together without making sentences is found out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mlxpref.sandbox.world import ACTIONS, ANIMALS, COLOURS, PLACES, TIMES

DETAILS = (
    "the air smelled of rain", "the wind felt cold", "the grass smelled sweet", "a bell sounded far away",
    "the leaves felt soft", "the stones glowed a little", "the air tasted of salt", "a soft song was heard",
    "the ground felt warm", "the water sounded calm", "the hay smelled of summer", "the sky glowed",
)  # fmt: skip
REASONS = (
    "it was hungry", "it was tired", "it liked the quiet", "its friends were there", "it wanted to be alone",
    "it had lost its way", "the week had been long", "it was looking for food", "it was at home there",
    "nobody was watching", "it was happy", "it knew the way",
)  # fmt: skip
CLOSES = (
    "I hope you like it!", "Thank you for asking!", "I hope this helps!", "Enjoy the picture!",
    "Thanks for reading!", "I hope you will see it too!",
)  # fmt: skip
FILLERS = (
    "It was quiet.", "Nothing else moved.", "That was all.", "It went on for a while.", "Nobody else came.",
    "It looked around.", "Then it looked up.", "It was small.", "It was a good day.", "There was no hurry.",
    "It did not mind.", "Everything was still.", "Time went by.", "It was not alone.", "It seemed calm.",
    "That is how it was.",
)  # fmt: skip


def _one_of(phrases: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, phrases))})"


def _grammar() -> re.Pattern[str]:
    """A sentence, its first letter small: ``at dawn, a red fox was running near the river because …, and ….``,
    ``this was near the river at dawn.``, ``this was because ….``, a detail, a filler, a close."""
    place, time, reason, detail = map(_one_of, (PLACES.values(), TIMES.values(), REASONS, DETAILS))
    who = rf"(?:a (?![aeiou])|an (?=[aeiou]))(?:{_one_of(COLOURS)} )?{_one_of((*ANIMALS, 'animal'))}"
    doing = rf"(?:{time}, )?{who} was {_one_of((*ACTIONS, 'there'))}(?: {place})?(?: {time})?"
    ways = (
        rf"{doing}(?: because {reason})?(?:, and {detail})?\.",
        rf"this was(?: {place}| {time}| {place} {time})\.",
        rf"this was because {reason}\.",
        rf"{detail}\.",
        _one_of(phrase[0].lower() + phrase[1:] for phrase in (*FILLERS, *CLOSES)),
    )
    return re.compile("|".join(ways))


_SENTENCE = _grammar()


def sentences(text: str) -> list[str] | None:
    """The sentences of a text, in order; None if it is not made of sentences of this language alone."""
    parts = re.findall(r"[^.!?]+[.!?]", text)
    whole = "".join(parts) == text.strip()
    found = [part.strip() for part in parts]
    return found if found and whole and all(map(_is_sentence, found)) else None


def _is_sentence(text: str) -> bool:
    return text[0].isupper() and _SENTENCE.fullmatch(text[0].lower() + text[1:]) is not None
