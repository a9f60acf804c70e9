"""``mlxpref objectives``: the table of formulas, read from their signatures."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

import click

from mlxpref.cli import console
from mlxpref.columns import COLUMNS
from mlxpref.data.supply import REMEDIES
from mlxpref.objectives import TABLE, Entry, find_objective

FAMILIES = ("margin", "ratios", "batchwise", "scored", "listwise", "tokenwise", "texts", "policy_only")
"""In the order to read them: each looks at something more than those before, but for the last, at less."""

MARKS = {
    "*": "coupled: a loss depends on the other examples of its batch, so the batch size is part of the formula",
    "+": "state: numbers are carried from step to step, and kept in checkpoints",
    "?": "experimental: its form could not be confirmed from a source; mlxpref objectives NAME says what",
}

LISTS = (
    "Formulas for pairs take two options more: lift (first_two, best_worst, best_rest, all_pairs), how they read a "
    "list of more than two responses; and weighting (none, wpo), by what each pair's loss is multiplied. Coupled "
    "ones read lists as best_worst, and take no weighting. Those of family listwise read whole lists. Sources are "
    "numbers of papers on arXiv."
)

NOT_OF_THE_DATA = {
    "reference": "reference pass: computed once before training, and kept on disk",
    "divergence": "computed from the tokens of the two responses",
    "mismatched": "computed: the response of another example of the data",
    "overlap": "model: computed beside the log-probs",
    "token_kl": "model: computed beside the log-probs, at every step, with gradient",
}

EPILOG = """\b
Example:
  mlxpref objectives
  mlxpref objectives --family scored
  mlxpref objectives dpo
  mlxpref objectives simpo --json
"""


@click.command(epilog=EPILOG)
@click.argument("name", required=False)
@click.option("--family", type=click.Choice(FAMILIES), help="List those of one family only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: options as JSON Schema, columns, texts, source.")
def command(name: str | None, family: str | None, as_json: bool) -> None:
    """List the objectives with what each needs, its options and its source; with NAME, explain one.

    NAME may be what another program calls it.
    """
    if name and family:
        raise click.UsageError("NAME says which objective; leave --family out.")
    entries = [_asked(name)] if name else [entry for entry in in_order() if family in (None, entry.family)]
    if as_json:
        facts = [describe(entry) for entry in entries]
        console.say(json.dumps(facts[0] if name else facts, indent=2, ensure_ascii=False))
    elif name:
        explain(entries[0])
    else:
        for line in listing(entries, shutil.get_terminal_size().columns if console.is_terminal() else None):
            console.say(line)


def in_order() -> list[Entry]:
    """Every objective, family after family; one whose family has no place in the order stands last."""
    order = {family: at for at, family in enumerate(FAMILIES)}
    return sorted(TABLE.values(), key=lambda entry: order.get(entry.family, len(order)))


def _asked(name: str) -> Entry:
    """The entry of that name, which may be another program's; that is then said. ObjectiveError: there is none."""
    plain = name.lower().replace("-", "_")
    for entry in () if name in TABLE else TABLE.values():
        if plain in map(str.lower, entry.aliases):
            console.note(f"{name} is what other programs call {entry.name}")
            return entry
    return find_objective(name)


# --- the table ---------------------------------------------------------------------------------


def listing(entries: Sequence[Entry], width: int | None = None) -> Iterator[str]:
    """The lines of the table: a headline for each family, below it its objectives.

    Args:
        width: characters of a line, into which needs and options are broken; None: one line an objective.
    """
    head = ("name", "needs", "options", "source")
    rows = [(marked(e), needs(e), defaults(e), short_source(e)) for e in entries]
    name, _, _, source = (max(map(len, column)) for column in zip(head, *rows, strict=True))
    widths = [name, *_shared(rows, None if width is None else width - name - source - 6), source]
    yield from _broken(head, widths)
    before = None
    for entry, row in zip(entries, rows, strict=True):
        if entry.family != before:
            yield ""
            yield from textwrap.wrap(f"{entry.family} – {family_line(entry)}", width or sys.maxsize)
            before = entry.family
        yield from _broken(row, widths)
    yield ""
    present = "".join(marked(entry) for entry in entries)
    for text in (*(f"{mark}  {said}." for mark, said in MARKS.items() if mark in present), LISTS):
        yield from textwrap.wrap(text, width or 100, subsequent_indent="" if text is LISTS else "   ")


def _shared(rows: Sequence[Sequence[str]], room: int | None) -> list[int]:
    """Widths of needs and options: all they ask for, or two fifths and three fifths of the room."""
    asked = [max(len(row[i]) for row in rows) for i in (1, 2)]
    if room is None or sum(asked) <= room:
        return asked
    needs_width = min(asked[0], max(_longest_word(rows, 1), room * 2 // 5, room - asked[1]))
    return [needs_width, max(_longest_word(rows, 2), room - needs_width)]


def _longest_word(rows: Sequence[Sequence[str]], column: int) -> int:
    return max(len(word) for row in rows for word in row[column].split())


def _broken(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """A row as lines: each cell within its width, broken between words."""
    columns = [
        textwrap.wrap(text, width, break_on_hyphens=False) or [""] for text, width in zip(cells, widths, strict=True)
    ]
    for at in range(max(map(len, columns))):
        parts = (
            (lines[at] if at < len(lines) else "").ljust(width) for lines, width in zip(columns, widths, strict=True)
        )
        yield "  ".join(parts).rstrip()


def marked(entry: Entry) -> str:
    """The name and its marks: ``bco *+``."""
    marks = "*" * entry.batch + "+" * (entry.start is not None) + "?" * entry.experimental
    return f"{entry.name} {marks}".rstrip()


def needs(entry: Entry) -> str:
    """What the formula asks of the data beside the policy's own log-probs."""
    return ", ".join(sorted(entry.needs)) or "nothing else"


def defaults(entry: Entry) -> str:
    """``beta=0.1 label_smoothing=0``."""
    return " ".join(f"{option.name}={shown(option.default)}" for option in entry.options.values()) or "–"


def shown(value: object) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:g}".replace("e-0", "e-")


def short_source(entry: Entry) -> str:
    """The number of the first paper on arXiv, or who wrote it."""
    first = entry.source.partition(";")[0]
    paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", first)
    return paper[1] if paper else first.partition(",")[0]


def family_line(entry: Entry) -> str:
    """What the objectives of a family have in common: the first line of its module."""
    return (sys.modules[entry.function.__module__].__doc__ or "").partition("\n")[0].rstrip(".")


# --- one objective -----------------------------------------------------------------------------


def explain(entry: Entry) -> None:
    """The whole docstring of one formula, then its options, and where what it needs comes from."""
    console.say(f"{marked(entry)} ({entry.family})\n\n{entry.doc}\n")
    rows = [(option, option_text(entry, option)) for option in entry.schema["properties"]]
    if rows:
        console.table(("option", "value"), rows)
        console.say()
    if entry.needs:
        console.say("needs")
    texts = [f"  {column}: {origin(column)}" for column in sorted(entry.needs)]
    texts = texts or ["needs nothing but the policy's own log-probs"]
    texts += [said for mark, said in MARKS.items() if mark in marked(entry).removeprefix(entry.name)]
    width = shutil.get_terminal_size().columns if console.is_terminal() else sys.maxsize
    for text in texts:
        console.say(textwrap.fill(text, width, subsequent_indent=" " * 4 if text.startswith(" ") else ""))


def option_text(entry: Entry, option: str) -> str:
    """``float > 0, default 0.1`` and the like."""
    facts = entry.schema["properties"][option]
    if "const" in facts:
        return f"{facts['const']}, which is all there is"
    default = facts["default"]
    return entry.describe(option).replace(f"default {default}", f"default {shown(default)}")


def origin(column: str) -> str:
    """Where a column comes from, in words."""
    if column in NOT_OF_THE_DATA:
        return NOT_OF_THE_DATA[column]
    asked = REMEDIES.get(column, "a column of this name").removeprefix("give ")
    asked = re.sub(r" \([^()]*`mlxpref columns`[^()]*\)$", "", asked)  # what it computes is said here
    ours = f"; mlxpref columns computes it: {COLUMNS[column]}" if column in COLUMNS else ""
    return ("" if asked.startswith("data ") else "data: ") + asked + ours


def describe(entry: Entry) -> dict[str, object]:
    """One row of the table, JSON-safe."""
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": entry.summary,
        "needs": sorted(entry.needs),
        "where_from": {column: origin(column) for column in sorted(entry.needs)},
        "texts": dict(entry.texts),
        "lists": entry.lists,
        "batch": entry.batch,
        "stateful": entry.start is not None,
        "experimental": entry.experimental,
        "unverified": entry.unverified,
        "source": entry.source,
        "also_known_as": list(entry.aliases),
        "options": entry.schema,
        "doc": entry.doc,
    }
