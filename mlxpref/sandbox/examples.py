"""What the world is seen through: scored pairs and lists to align on, and conversations to pretrain on.

Everything is a function of a seed. Scores are gold scores; ``content`` and ``form`` stand beside them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, Recipe
from mlxpref.records import Goal, Message, Prompt
from mlxpref.sandbox.gold import gold
from mlxpref.sandbox.world import Split, draw_scene, pick, request
from mlxpref.sandbox.writing import draw_points, write

Row = dict[str, Any]

OVERALL = Recipe()
"""One score, 1–10, in the words of the reward-augmented DPO code."""

ATTRIBUTES = Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("content", "form"), goal_range=(0.0, 5.0))
"""Content and form asked for apart, 0–5 each."""

NUMBERS = tuple(str(number) for number in range(11))


def pairs(n: int, split: Split, *, seed: int) -> list[Row]:
    """``n`` scored pairs: TRL's columns ``prompt``, ``chosen``, ``rejected``, and scores of both sides.

    Both replies are drawn alike; the better one is chosen, and of equals the first (``relabel`` drops
    these ties). No request comes twice.
    """
    return [_pair(row) for row in _drawn(n, 2, split, random.Random(f"pairs {split} {seed}"))]


def lists(n: int, k: int, split: Split, *, seed: int) -> list[Row]:
    """``n`` requests with ``k`` scored replies each: ``prompt`` and ``responses``."""
    return list(_drawn(n, k, split, random.Random(f"lists {split} {seed}")))


def _drawn(n: int, k: int, split: Split, rng: random.Random) -> Iterator[Row]:
    seen: set[str] = set()
    while len(seen) < n:
        scene = draw_scene(rng, split)
        prompt = request(scene, rng)
        replies = [write(scene, draw_points(rng), rng) for _ in range(k)]
        if prompt in seen or len(set(replies)) < k:
            continue
        seen.add(prompt)
        yield {"prompt": prompt, "responses": [_scored(prompt, reply) for reply in replies]}


def _scored(prompt: str, reply: str) -> Row:
    found = gold(prompt, reply)
    return {"text": reply, "score": found.score, "content": found.content, "form": found.form}


def _pair(row: Row) -> Row:
    chosen, rejected = sorted(row["responses"], key=lambda reply: -reply["score"])
    sides = {"chosen": chosen, "rejected": rejected}
    texts = {side: reply["text"] for side, reply in sides.items()}
    scores = {f"{name}_{side}": reply[name] for name in ("score", "content", "form") for side, reply in sides.items()}
    return {"prompt": row["prompt"], **texts, **scores}


# --- pretraining -----------------------------------------------------------------------------------


def conversation(rng: random.Random) -> tuple[Prompt, str]:
    """A conversation of the base model's childhood: a prompt, and the reply to learn.

    Half state a goal, and their replies are drawn as all others are: the base knows the sentence, the
    numbers, and replies of every quality, and nothing of how they belong together. A tenth are about
    numbers, or ask to read the goal aloud, so that a number is more than a mark.
    """
    kind = rng.random()
    if kind < 0.05:
        return _number_task(rng)
    if kind < 0.10:
        prompt, goal = (Message("user", "What score is asked for?"),), int(pick(rng, NUMBERS[1:]))
        return OVERALL.write(prompt, goal)[0], f"{goal}."
    scene = draw_scene(rng, "train")
    prompt, reply = (Message("user", request(scene, rng)),), write(scene, draw_points(rng), rng)
    if kind < 0.42:
        return OVERALL.write(prompt, _goal(1, 10, rng))[0], reply
    if kind < 0.55:
        goals: Goal = {name: _goal(0, 5, rng) for name in ATTRIBUTES.attributes}
        return ATTRIBUTES.write(prompt, goals)[0], reply
    return prompt, reply


def _goal(low: int, high: int, rng: random.Random) -> float:
    """On the scale, each whole number as likely; one in eight stands for the half above it."""
    whole = low + int(rng.random() * (high - low + 1))
    return whole + 0.5 if whole < high and rng.random() < 0.125 else float(whole)


def _number_task(rng: random.Random) -> tuple[Prompt, str]:
    a, b = pick(rng, NUMBERS), pick(rng, NUMBERS)
    if rng.random() < 0.5 or a == b:
        return (Message("user", f"What comes after {a}?"),), f"{int(a) + 1}."
    return (Message("user", f"Which is larger, {a} or {b}?"),), f"{max(a, b, key=int)}."
