"""What is trained, and which arms make which table. Arms and seeds are fixed here, before a confirming run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

STEPS = 350
BATCH = 8
"""Rows of an update."""

PLAIN: Any = {"name": "dpo", "beta": 0.1}
STEADY: Any = [{"name": "dpo", "beta": 0.1, "label_smoothing": 0.1}, {"name": "sft", "weight": 1.0}]
"""DPO that keeps small models whole: smoothed labels, and the likelihood of the preferred response."""

RATES = (1e-3, 3e-3, 1e-2)
"""Tried for every arm that a table compares, on ``TUNING_SEED`` and the first half of the requests."""

TUNING_SEED = 11
SEEDS = (1, 2, 3)
"""Of the confirming runs, which look at the second half of the requests."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its folder.
        world: of ``worlds.WORLDS``.
        relabel: options of the section relabel; None trains without goals.
        objective: as a configuration has it.
        rate: learning rate; those of the quickstart until they are tuned.
        steps: updates.
        settings: further keys of the configuration.
        goals: what it is asked for, beside nothing; () of an arm without goals.
    """

    name: str
    world: str = "clear"
    relabel: Mapping[str, Any] | None = None
    objective: Any = field(default_factory=lambda: STEADY)
    rate: float = 3e-3
    steps: int = STEPS
    settings: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[float, ...] = ()


GOALS = {"mapping": "identity", "goal_range": [1, 10], "min_gap": 0}
ENDS = (2.0, 6.0, 10.0)
ALL = tuple(map(float, range(1, 11)))

DPO = Arm("dpo", objective=PLAIN, rate=3e-4)
SAME = Arm("dpo-same-loss")
RA = Arm("ra", relabel=GOALS, goals=ALL)


def both(world: str) -> tuple[Arm, Arm]:
    """DPO with the same loss, and RA-DPO, in a world."""
    return replace(SAME, name=f"same-{world}", world=world), replace(RA, name=f"ra-{world}", world=world, goals=ENDS)


@dataclass(frozen=True)
class Table:
    """A question, and the arms that answer it."""

    title: str
    arms: tuple[Arm, ...]


TABLES: dict[str, Table] = {
    "top": Table(
        "Is the top goal of RA-DPO better than DPO, also than DPO on twice the data or with twice the steps?",
        (
            DPO, SAME, replace(SAME, name="dpo-twice-data", world="twice"),
            replace(SAME, name="dpo-twice-steps", steps=2 * STEPS), RA,
            replace(RA, name="half-chosen", relabel={**GOALS, "halves": "chosen"}),
            replace(RA, name="half-rejected", relabel={**GOALS, "halves": "rejected"}),
        ),
    ),
    "conditions": Table(
        "The same where judges err, qualities conflict, good responses are rare, or both are the base's own",
        tuple(arm for world in ("noisy-2", "noisy-4", "conflict", "sparse", "own") for arm in both(world)),
    ),
    "loss": Table(
        "Label smoothing, the likelihood term, and other objectives on relabelled pairs",
        (
            RA,
            replace(RA, name="ra-bare", objective=PLAIN, rate=3e-4, goals=ENDS),
            replace(RA, name="ra-smoothed", objective={**PLAIN, "label_smoothing": 0.1}, rate=3e-4, goals=ENDS),
            replace(RA, name="ra-likelihood", objective=[PLAIN, STEADY[1]], goals=ENDS),
            replace(RA, name="ra-ipo", objective=[{"name": "ipo", "beta": 0.1}, STEADY[1]], goals=ENDS),
            replace(RA, name="ra-orpo", objective={"name": "orpo", "beta": 0.5}, goals=ENDS),
        ),
    ),
    "pairs": Table(
        "Ties kept, halves of a pair apart, and goals that training never stated",
        (
            RA,
            replace(RA, name="odd-goals", world="odd"),
            replace(RA, name="ties-dropped", world="ties", goals=ENDS),
            replace(RA, name="ties-kept", world="ties", relabel={**GOALS, "ties": "keep"}, goals=ENDS),
            replace(RA, name="halves-apart", settings={"batching.keep_together": False}, goals=ENDS),
        ),
    ),
    "attributes": Table(
        "Two goals at once: content and form, 0 to 5 each",
        (
            replace(
                RA, name="two-goals", goals=(),
                relabel={"attributes": ["content", "form"], "goal_range": [0, 5], "min_gap": 2},
            ),
        ),
    ),
}  # fmt: skip
