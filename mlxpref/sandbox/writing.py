"""Replies of every quality, written to order: which points to earn goes in, a text that earns just those
comes out. ``gold`` reads the same points back; a test holds the two to each other."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from mlxpref.sandbox.gold import FORM
from mlxpref.sandbox.language import CLOSES, DETAILS, FILLERS, REASONS
from mlxpref.sandbox.world import KINDS, PLACES, TIMES, Scene, pick, with_article

CONTENT_ODDS = (0.09, 0.19, 0.25, 0.24, 0.14, 0.09)
FORM_ODDS = (0.09, 0.20, 0.26, 0.23, 0.13, 0.09)
"""How often a reply earns 0, 1, … 5 points of content, and of form: the best are rare."""

OMITTED = 0.5
"""Of the facts a reply gets wrong, the share it leaves out; of the others it states another word."""

SHORT = 0.65
"""Of replies of the wrong length, the share that is too short, where both can be."""


def draw_points(rng: random.Random) -> frozenset[str]:
    """Points a reply earns: how many of content and of form by the odds above, independently; which, by lot."""
    content = _some(tuple(KINDS), _count(CONTENT_ODDS, rng), rng)
    return frozenset(content + _some(tuple(FORM), _count(FORM_ODDS, rng), rng))


def write(scene: Scene, points: Collection[str], rng: random.Random) -> str:
    """A reply to a request about the scene that earns these points and no others."""
    close = [pick(rng, CLOSES)] if "close" in points else []
    n_body = _n_sentences(points, rng) - len(close)
    n_twice = 0 if "variety" in points or n_body == 1 else 1 + int(rng.random() * min(2, n_body - 1))
    body = _sentences(_facts(scene, points, rng), points, n_body - n_twice, rng)
    for _ in range(n_twice):
        at = int(rng.random() * len(body))
        body.insert(at + 1, body[at])
    return " ".join([*body, *close])


def _n_sentences(points: Collection[str], rng: random.Random) -> int:
    """How many sentences: three to five earn "length"; only one, or one of them twice, fails "variety"."""
    if "length" in points:
        return 3 + int(rng.random() * 3)
    too_short_to_repeat = "variety" not in points and "close" in points
    if too_short_to_repeat or rng.random() >= SHORT:
        return 6 + int(rng.random() * 3)
    return 2 if "variety" in points else 1 + int(rng.random() * 2)


def _sentences(facts: dict[str, str], points: Collection[str], n: int, rng: random.Random) -> list[str]:
    """``n`` ≥ 1 different sentences that state the facts, and a reason and a detail if they are to be earned."""
    opening, *rest = _openings(facts, n, rng)
    for point, choices, lead, joint in (
        ("reason", REASONS, "This was because ", " because "),
        ("detail", DETAILS, "", ", and "),
    ):
        if point in points:
            words = pick(rng, choices)
            if 1 + len(rest) < n and rng.random() < 0.6:
                rest.append(_sentence(lead + words))
            else:
                opening += joint + words
    fillers = _some(FILLERS, n - 1 - len(rest), rng)
    return [_sentence(opening), *rest, *fillers]


def _openings(facts: dict[str, str], n: int, rng: random.Random) -> list[str]:
    """The facts in one sentence (without its full stop), or, where there is room and it happens so, the place
    and time in a second one."""
    who = with_article(f"{facts['colour']} {facts['animal'] or 'animal'}".strip())
    doing = f"{who} was {facts['action'] or 'there'}"
    where = f"{facts['place']} {facts['time']}".strip()
    way = int(rng.random() * 3)
    if way == 0 and n >= 2 and where:
        return [doing, _sentence(f"this was {where}")]
    if way == 1 and facts["time"]:
        return [f"{facts['time']}, {doing} {facts['place']}".strip()]
    return [f"{doing} {where}".strip()]


def _facts(scene: Scene, points: Collection[str], rng: random.Random) -> dict[str, str]:
    """Kind -> what the reply says of it: the fact, another of its kind, or nothing."""
    said = {kind: _fact(kind, getattr(scene, kind), kind in points, rng) for kind in KINDS}
    return {**said, "place": PLACES.get(said["place"], ""), "time": TIMES.get(said["time"], "")}


def _fact(kind: str, word: str, right: bool, rng: random.Random) -> str:
    if right:
        return word
    if rng.random() < OMITTED:
        return ""
    return pick(rng, tuple(other for other in KINDS[kind] if other != word))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _count(odds: Sequence[float], rng: random.Random) -> int:
    """How many, by the odds of 0, 1, …"""
    at = rng.random() * sum(odds)
    for count, share in enumerate(odds):
        at -= share
        if at < 0:
            return count
    return len(odds) - 1


def _some(choices: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """``n`` different ones by lot, in the order they are drawn."""
    left = list(choices)
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]
