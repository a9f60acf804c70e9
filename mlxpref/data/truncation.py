"""Cutting a prompt that is too long: the middle of its longest messages, never its goal.

Texts are cut, not tokens, so that the chat template stays what the model knows: every turn keeps its
beginning, its end and its frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlxpref.records import Message, Prompt

GAP = " ... "
"""Stands where text was taken out."""


def cut_prompt(prompt: Prompt, goal_text: str | None, fits: Callable[[Prompt], bool]) -> Prompt:
    """The prompt with the middle taken out of every text longer than some bound, the largest that fits.

    Args:
        prompt: messages; ``goal_text`` stands in one of them.
        goal_text: stays whole, with the space around it.
        fits: whether a prompt is short enough.

    Returns:
        A new prompt; where none fits, one without any text but the goal's.
    """
    pieces = [_around(message.content, goal_text) for message in prompt]
    carrier = next((at for at, (_, goal, _) in enumerate(pieces) if goal), None)
    # Only the first statement is the goal; further down somebody may quote it.
    parts = [
        piece if at == carrier else ("", "", message.content)
        for at, (piece, message) in enumerate(zip(pieces, prompt, strict=True))
    ]

    def cut_to(bound: int) -> Prompt:
        return tuple(
            _with_content(message, _cut(before, bound) + goal + _cut(after, bound))
            for message, (before, goal, after) in zip(prompt, parts, strict=True)
        )

    low, high = 0, max(len(text) for before, _, after in parts for text in (before, after))
    if not fits(cut_to(low)):
        return cut_to(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(cut_to(middle)) else (low, middle)
    return cut_to(low)


def _around(content: str, goal_text: str | None) -> tuple[str, str, str]:
    """What comes before the goal, the goal with the space around it, what comes after."""
    if not goal_text or goal_text not in content:
        return "", "", content
    before, _, after = content.partition(goal_text)
    start, rest = before.rstrip(), after.lstrip()
    return start, content[len(start) : len(content) - len(rest)], rest


def _cut(text: str, bound: int) -> str:
    """At most ``bound`` characters of a text, half from each end."""
    if len(text) <= bound + len(GAP):
        return text
    head = (bound + 1) // 2
    return text[:head] + GAP + text[len(text) - bound // 2 :]


def _with_content(message: Message, content: str) -> Message:
    return message if content == message.content else replace(message, content=content)
