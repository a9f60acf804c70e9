"""The world: scenes of an animal, and the requests people make about them.

A scene is five facts. A request states all five; whether a reply gets them right can be read from its
words alone, because no word of one kind of fact is used for anything else in this world.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

Split = Literal["train", "valid", "test"]

COLOURS = ("red", "white", "black", "brown", "grey", "golden", "silver", "blue", "green", "orange")
ANIMALS = (
    "fox", "bear", "cat", "dog", "hen", "owl", "frog", "duck", "horse", "goat", "wolf", "deer", "mouse",
    "rabbit", "goose", "pig", "cow", "crow", "swan", "hare", "otter", "badger", "turtle", "pony",
)  # fmt: skip
ACTIONS = (
    "running", "sleeping", "singing", "jumping", "eating", "drinking", "hiding", "playing", "dancing",
    "digging", "waiting", "resting", "swimming", "walking",
)  # fmt: skip
PLACES: Mapping[str, str] = {
    "river": "near the river", "forest": "in the forest", "hill": "on the hill", "lake": "by the lake",
    "garden": "in the garden", "beach": "on the beach", "barn": "behind the barn", "bridge": "under the bridge",
    "meadow": "in the meadow", "road": "by the road", "well": "near the well", "mill": "beside the mill",
    "market": "at the market", "tower": "below the tower",
}  # fmt: skip
TIMES: Mapping[str, str] = {
    "dawn": "at dawn", "morning": "in the morning", "noon": "at noon", "afternoon": "in the afternoon",
    "dusk": "at dusk", "evening": "in the evening", "night": "at night", "midnight": "at midnight",
}  # fmt: skip
KINDS: Mapping[str, tuple[str, ...]] = {
    "colour": COLOURS, "animal": ANIMALS, "action": ACTIONS, "place": tuple(PLACES), "time": tuple(TIMES),
}  # fmt: skip
"""Kind of fact -> the words that state it."""

REQUESTS = (
    "Tell me about {a_colour_animal} {action} {place} {time}.",
    "Write a note about {a_colour_animal} that is {action} {place} {time}.",
    "{time_first}, {a_colour_animal} is {action} {place}. Describe it.",
    "Describe this scene: {a_colour_animal}, {action} {place} {time}.",
    "I saw {a_colour_animal} {action} {place} {time}. Tell me more.",
    "What is it like when {a_colour_animal} is {action} {place} {time}?",
    "Make a small story of {a_colour_animal} {action} {place} {time}.",
    "{place_first} {time}, {a_colour_animal} is {action}. Write about it.",
)
"""Ways to ask. Every one of them states all five facts."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Five facts; each a word of its kind in :data:`KINDS`."""

    colour: str
    animal: str
    action: str
    place: str
    time: str

    @property
    def split(self) -> Split:
        """Which split the scene belongs to: 80 % train, 10 % valid, 10 % test, by a hash of its facts, so
        that no request about a held-out scene, however worded, is ever trained on."""
        facts = " ".join(getattr(self, f.name) for f in fields(self))
        bucket = hashlib.sha256(facts.encode()).digest()[0] % 10
        return "test" if bucket == 0 else "valid" if bucket == 1 else "train"


def draw_scene(rng: random.Random, split: Split | None = None) -> Scene:
    """A scene of the split, each as likely as another; None: of any."""
    while True:
        scene = Scene(*(pick(rng, words) for words in KINDS.values()))
        if split is None or scene.split == split:
            return scene


def request(scene: Scene, rng: random.Random) -> str:
    """A request about the scene, in one of the ways of :data:`REQUESTS`."""
    place, time = PLACES[scene.place], TIMES[scene.time]
    return pick(rng, REQUESTS).format(
        a_colour_animal=with_article(f"{scene.colour} {scene.animal}"),
        action=scene.action, place=place, time=time,
        place_first=place.capitalize(), time_first=time.capitalize(),
    )  # fmt: skip


def read_scene(prompt: str) -> Scene:
    """The scene a request asks about, read from its words.

    Raises:
        ValueError: it does not state exactly one word of each kind.
    """
    found = {kind: stated(prompt, kind) for kind in KINDS}
    unclear = [f"{kind}: {', '.join(sorted(words)) or 'none'}" for kind, words in found.items() if len(words) != 1]
    if unclear:
        raise ValueError(f"not a request of this world ({'; '.join(unclear)}): {prompt!r}")
    return Scene(**{kind: words.pop() for kind, words in found.items()})


def stated(text: str, kind: str) -> set[str]:
    """Words of a kind of fact that occur in a text, whatever their case."""
    return set(re.findall(r"[a-z]+", text.lower())) & set(KINDS[kind])


def with_article(noun: str) -> str:
    """``an owl``, ``a red owl``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pick(rng: random.Random, choices: tuple[str, ...]) -> str:
    """One of them, each as likely. Uses nothing but ``rng.random``, whose sequence Python promises to keep."""
    return choices[int(rng.random() * len(choices))]
