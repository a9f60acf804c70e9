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
        return f"{name} and {other_name} score alike: {one.mean:.2f} and {other.mean:.2f} (intervals overlap)."
    word = "better" if difference > 0 else "worse"
    return f"{name} scores {word} than {other_name}: {one.mean:.2f} against {other.mean:.2f} ({difference:+.2f})."


def _apart(one: Achieved, other: Achieved) -> bool:
    if one.interval is None or other.interval is None:
        return False
    return one.interval[0] > other.interval[1] or one.interval[1] < other.interval[0]


def _distance(steered: Measured) -> str:
    """How literally a goal is met."""
    misses = [abs(one.mean - float(one.goal)) for one in steered.asked if isinstance(one.goal, float)]
    worst = max(range(len(misses)), key=misses.__getitem__)
    return (
        f"Its answers are {sum(misses) / len(misses):.1f} points from the goal on average over goals; furthest "
        f"({misses[worst]:.1f}) at goal {steered.asked[worst].goal:g}."
    )


def _displacement(models: Sequence[Measured]) -> str:
    changes = ", ".join(f"{one.title} {one.displaced:+.1f}" for one in models if one.displaced is not None)
    return f"Good answers that were 'rejected' changed in log-prob (nats an answer) by: {changes}."
