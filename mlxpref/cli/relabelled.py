"""What ``mlxpref relabel`` says of the rows it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxpref.cli import console
from mlxpref.data.recipe import Recipe, format_number, goal_words
from mlxpref.data.relabel_sources import RelabelledSplits
from mlxpref.records import Conditioned, Counts


def report(result: RelabelledSplits) -> None:
    """The recipe in a line or two, a row a split, each reason rows were dropped for, and what to look at."""
    if result.recipe is None:
        console.say("no goals: every example is plain")
    else:
        _report_recipe(result.recipe)
    for name in ("scoring", "picking"):
        if name in result.options:
            console.note(f"{name}: {_shaped(result.options[name])}")
    console.table(
        ("split", "examples", "dropped", "relabelled", "rows", "goals"),
        [_line(name, rows, result) for name, rows in result.splits.items()],
    )
    for stage, counts in result.counts.items():
        for line in counts.lines():
            console.note(f"{stage}: {line}")
    for note in result.notes:
        console.warn(note)


def _report_recipe(recipe: Recipe) -> None:
    low, high = (format_number(bound) for bound in recipe.goal_range)
    maps = {m.kind for m in (recipe.attribute_mappings.values() if recipe.attributes else [recipe.mapping])}
    taken = "taken as they are" if maps == {"identity"} else f"mapped ({', '.join(sorted(maps))})"
    console.say(f"goals {low} to {high}, scores {taken}; by default asked for: {goal_words(recipe.top_goal)}")
    console.say(recipe.goal_text(recipe.top_goal).replace("\n", "\n  ").join(("  ", "")))


def _shaped(stored: Mapping[str, Any]) -> str:
    """What was asked for, and the numbers that were fitted for it."""
    given = [(name, value) for name, value in stored.items() if name != "fitted"]
    own = {**(stored["fitted"] or {})}
    if stored.get("length_penalty") != "dice":
        own.pop("alpha", None)
    fitted = [(name, value) for name, value in own.items() if isinstance(value, float)]
    words = [f"{name} {', '.join(value) if isinstance(value, list) else value}" for name, value in given]
    return "; ".join(words + [f"fitted {name} {value:.4g}" for name, value in fitted])


def _line(name: str, rows: Sequence[Conditioned], result: RelabelledSplits) -> tuple[Any, ...]:
    done = result.counts[f"relabel/{name}"]
    shaped = result.counts.get(f"shape/{name}", Counts())
    dropped = sum(shaped.dropped.values()) + sum(done.dropped.values())
    goals = {row.goal_text for row in rows if row.goal_text is not None}
    return name, done.kept + dropped, dropped, done.kept, len(rows), len(goals)


def show(row: Conditioned, tokenizer: Any) -> None:
    """The exact text of a row: rendered as the model will read it where there is one, else turn by turn."""
    console.say(f"\n===== {row.example_id} · half {row.half or 'none'} · {goal_words(row.goal)} =====")
    if tokenizer is not None:
        from mlxpref.data.tokenization import render_prompt

        console.say("----- prompt, rendered -----")
        console.say(render_prompt(row.prompt, tokenizer, tools=row.extras.get("tools")))
    else:
        for message in row.prompt:
            console.say(f"----- {message.role} -----\n{message.content}")
    last = len(row.responses) - 1
    for place, text in enumerate(row.responses):
        name = "chosen" if place == 0 else "rejected" if last == 1 else f"response {place + 1} of {last + 1}"
        score = "" if row.scores is None else f", score {format_number(row.scores[place])}"
        console.say(f"----- {name}{score} -----\n{text}")
