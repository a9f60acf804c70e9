"""What a quickstart found, in sentences: what works, and what does not.

A difference is called one only where the 95 % intervals of the two means do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxpref.evaluate.control import Achieved
from mlxpref.sandbox.measured import Measured

STEERED = 0.5
"""Spearman correlation of goal and score over single answers from which on a model is called steered."""


def headline(steered: Measured) -> str:
    """The title of the picture."""
    low, high = steered.at(1).mean, steered.at(10).mean
    return f"Asked for 1, {steered.title} scores {low:.1f}; asked for 10, it scores {high:.1f}"


def sentences(base: Measured, steered: Measured, others: Sequence[Measured]) -> Iterator[str]:
    """Each a finding; the same figures are in the table."""
    yield _obedience(steered)
    top, plain = steered.at(10), base.unasked
    yield _compared(f"{steered.title} asked for 10", top, "the base", plain)
    for other in others:
        yield _compared(f"{steered.title} asked for 10", top, other.title, other.unasked)
    yield _distance(steered)
    yield _displacement([*others, steered])


def _obedience(steered: Measured) -> str:
    correlation = steered.spearman or 0.0
    obeys = "obeys its goal" if correlation >= STEERED else "does not obey its goal"
    return (
        f"{steered.title} {obeys}: goals 8-10 score {steered.range:+.1f} points against goals 1-3 "
        f"(Spearman over single answers {correlation:.2f})."
    )


def _compared(name: str, one: Achieved, other_name: str, other: Achieved) -> str:
    difference = one.mean - other.mean
    if not _apart(one, other):
        return f"{name} and {other_name} cannot be told apart here: {one.mean:.2f} and {other.mean:.2f}."
    word = "better" if difference > 0 else "worse"
    return f"{name} scores {word} than {other_name}: {one.mean:.2f} against {other.mean:.2f} ({difference:+.2f})."


def _apart(one: Achieved, other: Achieved) -> bool:
    if one.interval is None or other.interval is None:
        return False
    return one.interval[0] > other.interval[1] or one.interval[1] < other.interval[0]


def _distance(steered: Measured) -> str:
    """How literally a goal is met, and where the answers are best."""
    misses = {one.goal: abs(one.mean - one.goal) for one in steered.asked if isinstance(one.goal, float)}
    worst = max(misses, key=misses.__getitem__)
    best = max(steered.asked, key=lambda one: one.mean)
    said = (
        f"Its answers are {sum(misses.values()) / len(misses):.1f} points from the goal on average over goals; "
        f"furthest ({misses[worst]:.1f}) at goal {worst:g}."
    )
    if _apart(best, steered.at(10)):
        said += f" They score best asked for {best.goal:g} ({best.mean:.2f}), not for 10 ({steered.at(10).mean:.2f})."
    return said


def _displacement(models: Sequence[Measured]) -> str:
    known = [(one.title, *one.displaced) for one in models if one.displaced is not None]
    changes = ", ".join(f"{title} {change:+.1f}" for title, change, _ in known)
    n = known[0][2] if known else 0
    return f"Good replies that lose their pair ({n} held-out ones) changed in log-prob, nats a reply: {changes}."
