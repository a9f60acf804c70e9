"""What is trained, and which arms make which table. Arms, rates and seeds are fixed here, before a confirming run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from study.worlds import LONGER

STEPS = 350
BATCH = 8
"""Rows of an update."""

PLAIN: Any = {"name": "dpo", "beta": 0.1}
LIKELIHOOD: Any = {"name": "sft", "weight": 1.0}
STEADY: Any = [{**PLAIN, "label_smoothing": 0.1}, LIKELIHOOD]
"""DPO that keeps small models whole: smoothed labels, and the likelihood of the preferred response."""

FAST = (1e-3, 3e-3, 1e-2)
SLOW = (1e-4, 3e-4, 1e-3)
"""Rates that are tried for every tuned arm, three each; the lower ones for losses that fall apart at the others."""

CHOSEN: dict[str, float] = {
    "dpo": 0.0003, "dpo-same-loss": 0.0003, "dpo-twice-data": 0.0003, "dpo-twice-steps": 0.0003, "ra": 0.001,
    "ra-twice-steps": 0.003, "half-prompts": 0.003, "same-natural": 0.001, "ra-natural": 0.003, "same-near": 0.001,
    "ra-near": 0.001, "same-sparse": 0.001, "ra-sparse": 0.003, "same-noisy-4": 0.003, "ra-noisy-4": 0.003,
    "same-conflict": 0.003, "ra-conflict": 0.003, "same-own": 0.01, "ra-own": 0.003, "same-peak": 0.001,
    "ra-peak": 0.001, "sft-goals-near": 0.0001, "dpo-likelihood": 0.01, "ra-bare": 0.001, "ra-smoothed": 0.001,
    "ra-likelihood": 0.003, "ra-ipo": 0.001, "ra-orpo": 0.003, "ra-sft": 0.003,
}  # fmt: skip
"""The best rate of each arm, by ``--tune``: other seeds and other requests than those of the tables."""

TEXT_STEPS = 80
TEXT_RATE = 1e-3
LONG = {"tokenization.max_length": 512}
"""Of runs on real text: all that these models can read."""

SEEDS = (1, 2, 3)
"""Of the confirming runs."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its folder.
        world: of ``worlds.WORLDS``.
        relabel: options of the section relabel; None trains without goals.
        objective: as a configuration has it.
        steps: updates; 0 is the base itself.
        settings: further keys of the configuration.
        goals: what it is asked for, beside nothing; () of an arm without goals.
        rates: tried for it; () takes the rate of the arm that ``like`` names.
        like: another arm's name.
        rival: the arm whose score is taken off this one's; "" compares with none.
        judge: name of the arm whose implicit rewards take the place of the scores.
        model: "sandbox"; "strong", the same after DPO with the same loss on other pairs, fused; or a folder in
            ``$MLXPREF_ASSETS/models``.
    """

    name: str
    world: str = "clear"
    relabel: Mapping[str, Any] | None = None
    objective: Any = field(default_factory=lambda: STEADY)
    steps: int = STEPS
    settings: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[float, ...] = ()
    rates: tuple[float, ...] = FAST
    like: str = ""
    rival: str = ""
    judge: str = ""
    model: str = "sandbox"

    @property
    def rate(self) -> float:
        """Learning rate of the tables: the chosen one, or the middle of those to try."""
        name = self.like or self.name
        return CHOSEN.get(name, self.rates[len(self.rates) // 2] if self.rates else FAST[1])

    @property
    def best(self) -> str:
        """What it is asked for to do its best: its highest goal, or nothing."""
        return f"{self.goals[-1]:g}" if self.goals else "none"


GOALS = {"mapping": "identity", "goal_range": [1, 10], "min_gap": 0}
RANKED = {**GOALS, "mapping": "quantile", "number_format": 0}
"""Goals from scores of any scale, by rank."""

ENDS = (2.0, 6.0, 10.0)
ALL = tuple(map(float, range(1, 11)))

BASE = Arm("base", steps=0)
DPO = Arm("dpo", objective=PLAIN, rates=SLOW)
SAME = Arm("dpo-same-loss")
STRONG = replace(SAME, name="strong", world="other", rates=(), like="dpo-same-loss")
"""Seed 0 of it is fused with the base, and is the strong model."""
RA = Arm("ra", relabel=GOALS, goals=ALL, rival="dpo-same-loss")
QUICK = replace(RA, name="ra-quick", rates=(3e-3,))
"""At the rate of the quickstart."""
RA_LIKE = replace(RA, rates=(), like="ra", rival="ra")


def both(world: str, *, strong: bool = False) -> tuple[Arm, Arm]:
    """DPO with the same loss, and RA-DPO, in a world; ``strong``: from a model that writes well already."""
    name, model = (f"{world}-strong", "strong") if strong else (world, "sandbox")
    same = replace(SAME, name=f"same-{name}", world=world, model=model)
    ra = replace(RA, name=f"ra-{name}", world=world, model=model, goals=ENDS, rival=same.name)
    return untuned(same, ra) if strong else (same, ra)


def untuned(same: Arm, ra: Arm) -> tuple[Arm, Arm]:
    """Both at the rates that were best for them in the clear world."""
    return replace(same, rates=(), like=SAME.name), replace(ra, rates=(), like=RA.name)


def longer(arm: Arm) -> Arm:
    """More pairs, and updates, of the same world."""
    return replace(arm, name=f"{arm.name}-long", world=f"{arm.world}-long", steps=LONGER * arm.steps)


def sft(world: str) -> Arm:
    """Goals and the likelihood of the preferred response alone: no preference is learnt."""
    rival = f"ra-{world}"
    return replace(RA, name=f"sft-goals-{world}", world=world, goals=ENDS, objective={"name": "sft"}, rival=rival)


def text(model: str) -> tuple[Arm, Arm]:
    """Both arms on a model of children's stories and UltraFeedback; their rate is not tuned."""
    dpo = Arm(f"dpo-{model}", world="ultrafeedback", model=model, steps=TEXT_STEPS, rates=(TEXT_RATE,), settings=LONG)
    return dpo, replace(dpo, name=f"ra-{model}", relabel=GOALS)


@dataclass(frozen=True)
class Table:
    """A question, the arms that answer it, and the seeds their rates are chosen on."""

    title: str
    arms: tuple[Arm, ...]
    tuning_seeds: tuple[int, ...] = (11,)


CONDITIONS = ("natural", "near", "sparse", "noisy-4", "conflict", "own", "peak")

TABLES: dict[str, Table] = {
    "top": Table(
        "Is the top goal of RA-DPO better than DPO, also than DPO on twice the data or with twice the steps?",
        (
            BASE,
            replace(DPO, rival="dpo-same-loss"),
            SAME,
            replace(SAME, name="dpo-twice-data", world="twice", rival="dpo-same-loss"),
            replace(SAME, name="dpo-twice-steps", steps=2 * STEPS, rival="dpo-same-loss"),
            RA,
            replace(RA, name="ra-twice-steps", steps=2 * STEPS, goals=ENDS, rival="dpo-twice-steps"),
            replace(RA, name="half-prompts", world="half", goals=ENDS),
            replace(RA, name="half-chosen", relabel={**GOALS, "halves": "chosen"}, rates=(), like="ra", goals=ENDS),
            replace(RA, name="half-rejected", relabel={**GOALS, "halves": "rejected"}, rates=(), like="ra", goals=ENDS),
            replace(RA, name="implicit", judge="dpo", relabel=RANKED, rates=(), like="ra"),
        ),
        tuning_seeds=(11, 12),
    ),
    "conditions": Table(
        "And where scores are as they are drawn, or near, good ones rare, judges err, qualities conflict, responses "
        "are the base's own, or the model writes better than most of the data?",
        (
            *(arm for world in CONDITIONS for arm in both(world)),
            sft("near"),
            replace(BASE, name="base-peak", world="peak"),
            replace(BASE, name="base-strong", model="strong"),
            *both("clear", strong=True),
        ),
    ),
    "loss": Table(
        "Label smoothing, the likelihood term, and other objectives on relabelled pairs",
        (
            replace(SAME, name="dpo-likelihood", objective=[PLAIN, LIKELIHOOD], rival="dpo-same-loss"),
            replace(RA, rival=""),
            *(
                replace(RA, name=f"ra-{name}", objective=objective, rates=rates, goals=ENDS, rival="ra")
                for name, objective, rates in (
                    ("bare", PLAIN, SLOW),
                    ("smoothed", {**PLAIN, "label_smoothing": 0.1}, SLOW),
                    ("likelihood", [PLAIN, LIKELIHOOD], FAST),
                    ("ipo", [{"name": "ipo", "beta": 0.1}, LIKELIHOOD], FAST),
                    ("orpo", {"name": "orpo", "beta": 0.5}, FAST),
                    ("sft", {"name": "sft"}, FAST),
                )
            ),
        ),
    ),
    "pairs": Table(
        "Ties kept, halves of a pair apart, and goals that training never stated",
        (
            replace(RA, rival=""),
            replace(RA_LIKE, name="odd-goals", world="odd"),
            replace(RA_LIKE, name="ties-dropped", world="ties", goals=ENDS),
            replace(RA_LIKE, name="ties-kept", world="ties", relabel={**GOALS, "ties": "keep"}, goals=ENDS),
            replace(RA_LIKE, name="halves-apart", settings={"batching.keep_together": False}, goals=ENDS),
        ),
    ),
    "attributes": Table(
        "Two goals at once: content and form, 0 to 5 each",
        (
            replace(
                RA_LIKE, name="two-goals", goals=(),
                relabel={"attributes": ["content", "form"], "goal_range": [0, 5], "min_gap": 2},
            ),
        ),
    ),
    "text": Table(
        "UltraFeedback, and a model that knows children's stories alone: what is preferred, not what is written",
        (*text("tinystories-656k"), *text("stories260K")),
    ),
    "after": Table(
        "What the other tables left open, asked after they were read; no rate is tuned",
        (
            QUICK,
            replace(QUICK, name="halves-apart-quick", settings={"batching.keep_together": False}, rival=QUICK.name),
            replace(DPO, name="dpo-peak", world="peak", rates=(), like="dpo", rival="same-peak"),
            replace(sft("near"), name="sft-goals-near-quick", rates=(QUICK.rate,)),
            *(
                longer(replace(arm, rates=(), like=arm.name, rival=f"{arm.rival}-long" if arm.rival else ""))
                for arm in both("near")
            ),
        ),
    ),
}  # fmt: skip
