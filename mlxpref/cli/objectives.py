"""``mlxpref objectives``: the table of formulas, read from their signatures."""

from __future__ import annotations

import json

import click

from mlxpref.cli import console
from mlxpref.objectives import TABLE, Entry, find_objective

EPILOG = """\b
Example:
  mlxpref objectives
  mlxpref objectives dpo
  mlxpref objectives simpo --json
"""

LISTS = (
    "Formulas for pairs take one option more, lift = first_two | best_worst | best_rest | all_pairs:\n"
    "how they read a list of more than two responses."
)


@click.command(epilog=EPILOG)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: options as JSON Schema, columns, source.")
def command(name: str | None, as_json: bool) -> None:
    """List the objectives with what each needs, its options and its source; with NAME, explain one."""
    entries = [find_objective(name)] if name else list(TABLE.values())
    if as_json:
        facts = [describe(entry) for entry in entries]
        console.say(json.dumps(facts[0] if name else facts, indent=2, ensure_ascii=False))
    elif name:
        explain(entries[0])
    else:
        rows = [(e.name, e.family, needs(e), defaults(e), e.source) for e in entries]
        console.table(("name", "family", "needs", "options", "source"), rows)
        console.say(f"\n{LISTS}")


def explain(entry: Entry) -> None:
    """The whole docstring of one formula, then its options with type, range and default."""
    console.say(f"{entry.name} ({entry.family}): needs {needs(entry)}\n\n{entry.doc}\n")
    rows = [(option, entry.describe(option)) for option in entry.schema["properties"]]
    if rows:
        console.table(("option", "value"), rows)


def needs(entry: Entry) -> str:
    """What the formula asks of the data beside the policy's own log-probs."""
    return ", ".join(sorted(entry.needs)) or "nothing else"


def defaults(entry: Entry) -> str:
    """``beta=0.1 label_smoothing=0.0``."""
    return " ".join(f"{option.name}={option.default}" for option in entry.options.values()) or "–"


def describe(entry: Entry) -> dict[str, object]:
    """One row of the table, JSON-safe."""
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": entry.summary,
        "needs": sorted(entry.needs),
        "lists": entry.lists,
        "batch": entry.batch,
        "stateful": entry.start is not None,
        "source": entry.source,
        "also_known_as": list(entry.aliases),
        "options": entry.schema,
    }
