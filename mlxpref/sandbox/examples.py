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

    Half of the requests state a goal, and their replies are drawn as all others are: the base knows the
    sentence, the numbers, and replies of every quality, and nothing of how they belong together. One
    conversation in four is about numbers, alone or in a goal, so that it knows what lies between a 2 and a
    10 as larger models do.
    """
    kind = rng.random()
    if kind < 0.12:
        return _number_task(rng)
    if kind < 0.25:
        return _reading_task(rng)
    scene = draw_scene(rng, "train")
    prompt, reply = (Message("user", request(scene, rng)),), write(scene, draw_points(rng), rng)
    if kind < 0.52:
        return OVERALL.write(prompt, _goal(1, 10, rng))[0], reply
    if kind < 0.63:
        goals: Goal = {name: _goal(0, 5, rng) for name in ATTRIBUTES.attributes}
        return ATTRIBUTES.write(prompt, goals)[0], reply
    return prompt, reply


def _goal(low: int, high: int, rng: random.Random) -> float:
    """On the scale, each whole number as likely; one in eight stands for the half above it."""
    whole = low + int(rng.random() * (high - low + 1))
    return whole + 0.5 if whole < high and rng.random() < 0.125 else float(whole)


def _number_task(rng: random.Random) -> tuple[Prompt, str]:
    """What numbers are to each other."""
    a, b = (int(rng.random() * 11) for _ in range(2))
    tasks = (
        (f"What comes after {a}?", f"{a + 1}."),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)}."),
        (f"Which is smaller, {a} or {b}?", f"{min(a, b)}."),
        (f"Is {a} more than {b}?", _yes(a > b)),
    )
    question, reply = tasks[int(rng.random() * len(tasks))]
    return (Message("user", question),), reply


def _reading_task(rng: random.Random) -> tuple[Prompt, str]:
    """What a goal says; nothing of what it means for a reply."""
    if rng.random() < 0.75:
        score, b = 1 + int(rng.random() * 10), 1 + int(rng.random() * 9)
        tasks = (
            ("What score is asked for?", f"{score}."),
            ("Is the score asked for low, middling or high?", _level(score, 1, 10)),
            (f"Is the score asked for more than {b}?", _yes(score > b)),
        )
        question, reply = tasks[int(rng.random() * len(tasks))]
        return OVERALL.write((Message("user", question),), score)[0], reply
    goals = {name: int(rng.random() * 6) for name in ATTRIBUTES.attributes}
    name = pick(rng, ATTRIBUTES.attributes)
    if rng.random() < 0.5:
        question, reply = f"What {name} is asked for?", f"{goals[name]}."
    else:
        question, reply = f"Is the {name} asked for low, middling or high?", _level(goals[name], 0, 5)
    return ATTRIBUTES.write((Message("user", question),), goals)[0], reply


def _level(score: int, low: int, high: int) -> str:
    """Thirds of the scale."""
    third = 3 * (score - low) // (high - low + 1)
    return ("Low.", "Middling.", "High.")[third]


def _yes(true: bool) -> str:
    return "Yes." if true else "No."
