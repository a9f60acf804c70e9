"""Make the reference of the objectives: docs/objectives.md from the docstrings, and a picture of each family.

    python scripts/build_objectives.py            both
    python scripts/build_objectives.py --text     the page alone, in a second

The page is the same, byte for byte, wherever it is made; pictures differ with the version of Matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from objective_pictures import SHOWN, draw

from mlxpref.cli.objectives import MARKS, in_order, marked, option_text, origin, short_source
from mlxpref.objectives import TABLE, Entry
from mlxpref.objectives.registry import Column, Text

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURES = DOCS / "objectives.md", DOCS / "objectives"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="make the page alone")
    options = parser.parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    if not options.text:
        PICTURES.mkdir(exist_ok=True)
        for family in SHOWN:
            draw(family, PICTURES / f"{family}.png")


# --- the page ----------------------------------------------------------------------------------

INTRODUCTION = """\
# Objectives

What training minimises: {n} formulas, each written once as a pure function of log-probs. This page is made from their
docstrings by [`scripts/build_objectives.py`](../scripts/build_objectives.py); `mlxpref objectives` says the same in a
terminal. How to write a new one: [Adding an objective](adding-an-objective.md).

**Symbols.** ℓ is the log-prob of a whole response in nats, m = ℓ/n its mean over the n tokens of the response;
w is the chosen response, l the rejected one, r the reference. a = ℓ − ℓʳ is the log-ratio, Δ = a_w − a_l the margin,
σ the logistic function. Losses are one number an example, (B,); a batch's loss is their weighted mean.

## How to choose

- Start with [`dpo`](#dpo). It is what most others are compared with, and where policy and reference are equal its loss
  is log 2, so that a mistake shows in the first step.
- Some labels are wrong: `dpo` with `label_smoothing`, [`robust`](#robust) where the rate is known, [`ipo`](#ipo) or
  [`exo_pair`](#exo_pair), whose margins have a finite optimum.
- The data are scored, and the scores shall count: [scored](#scored) for pairs, [listwise](#listwise) for lists.
  (mlxpref's own way, the score in the prompt, works with every objective.)
- Chosen responses become improbable, too: [`dpop`](#dpop), [`rpo`](#rpo), [`apo_zero`](#apo_zero), or any objective in
  a mixture with [`sft`](#sft).
- Responses grow long: [`ln_dpo`](#ln_dpo), [`r_dpo`](#r_dpo), [`ld_dpo`](#ld_dpo), [`simpo`](#simpo).
- No memory or time for a reference: [policy_only](#policy_only).
- One objective's β is not another's: look at the unit in the table of arguments, and at the pictures.

## What they need

`needs` says what a formula reads beside the policy's log-probs. Everything is checked before a model loads: rows that
lack a column are named, with the remedy.

{needs}

Where rows have goals, `scores` and `attributes` are rewards under the row's goal, minus the squared distance to it, and
`win_rates` are those of these rewards; without goals they are the scores themselves, and what the data say.

**Lists of more than two.** A formula for pairs reads a list by its option `lift`: `first_two` (default), `best_worst`,
`best_rest` or `all_pairs`; pairs that the goal does not tell apart are left out. Formulas of the family
[listwise](#listwise), `sft` and `poft` read the list itself.

**Weighting.** `weighting: wpo` multiplies each pair's loss by how likely the policy itself would have written both
responses, a constant without gradient ([arXiv:2406.11827](https://arxiv.org/abs/2406.11827)). It asks the model for one
number more a token, `overlap`. Coupled objectives and those of whole lists do not take it.

**Mixtures.** A list in the configuration is a weighted sum; each formula is named once:

```yaml
objective:
  - {{name: dpo, beta: 0.1}}
  - {{name: sft, weight: 0.005}}
```

**Kinks.** Where a formula has a kink (`relu`, a bound), the gradient at the kink itself is 0. Adapters start at
policy = reference, where several kinks lie.

**Coupled objectives** ({coupled_mark}) compare the examples of a batch, so the batch size is part of the formula. A
batch still goes through the model in micro-batches: the log-probs of all of them are computed first, the formula sees
them together, and its slopes go back through the model in a second pass. Micro-batches therefore change nothing, and a
step costs one forward pass more.

**States** ({state_mark}). What a formula carries from step to step is updated once a step, and saved in checkpoints: a
resumed run goes on with it.

**Experimental ones** ({experimental_mark}, and their names say so) have a form that could not be confirmed from a
source; the line *Unverified* says which part. Do not report them as the paper's method.

## Index

{marks}

{index}
"""

PICTURE_NOTE = (
    "**How to read the pictures.** One pair, 24 and 30 tokens long, whose log-probs move from where the reference has\n"
    "them (−51 and −58.5 nats): the chosen one's up and the rejected one's down, each by Δ/2. Left, the loss; right,\n"
    "its slopes towards the log-prob of the chosen (solid) and of the rejected response (dashed). A negative slope\n"
    "pushes up. The numbers come from the formulas themselves."
)

NOT_BUILT = """\
## Not built

- **DRDO** (arXiv:2410.08458), the auxiliary loss of **SPO** (arXiv:2409.17791), **HyPO** (arXiv:2406.01462),
  **C-3DPO**, **ADPA**, **UPO**, **MAPL**, **AIHF**, **InfAlign**: no formula that could be checked against a source, or
  one that samples from the policy while it trains, which a run on fixed data does not.
- **GPM**, the training of a general preference model: mlxpref trains no reward models. The alignment that uses one,
  GPO, is ``sppo`` with its estimates as ``win_rates``.
- **SparsePO's learned masks** (arXiv:2410.05102): ``experimental_mapo`` has the formula with masks that are not
  learned.
"""


def page() -> str:
    """The whole of docs/objectives.md."""
    entries = in_order()
    star, plus, question = (f"`{mark}`" for mark in MARKS)
    parts = [
        INTRODUCTION.format(
            n=len(entries),
            needs=needs_table(entries),
            marks="  \n".join(f"`{mark}` {said}." for mark, said in MARKS.items()),
            index=table(("objective", "in a line", "needs", "source (arXiv)"), list(index_rows(entries))),
            coupled_mark=star,
            state_mark=plus,
            experimental_mark=question,
        ),
        PICTURE_NOTE + "\n",
    ]
    for family in dict.fromkeys(entry.family for entry in entries):
        parts += family_parts(family, [entry for entry in entries if entry.family == family])
    return "\n".join([*parts, papers(coded(NOT_BUILT))])


def index_rows(entries: Sequence[Entry]) -> Iterator[tuple[str, str, str, str]]:
    """The rows of the index: a family's name, and below it its objectives."""
    before = None
    for entry in entries:
        if entry.family != before:
            yield f"**[{entry.family}](#{entry.family})**", "", "", ""
            before = entry.family
        needs = ", ".join(f"`{name}`" for name in sorted(entry.needs)) or "–"
        yield f"{link(entry.name)} {marks_of(entry)}".rstrip(), prose(entry.summary), needs, paper(entry)


def family_parts(family: str, entries: Sequence[Entry]) -> Iterator[str]:
    """A family's heading, description and picture, and its objectives."""
    yield f"## {family}\n"
    doc = sys.modules[entries[0].function.__module__].__doc__ or ""
    yield "\n\n".join(prose(" ".join(part.split())) for part in doc.strip().split("\n\n")) + "\n"
    if family in SHOWN:
        names = ", ".join(line.label for row in SHOWN[family].rows for line in row.lines)
        yield f"![Losses of {names}, and their slopes, as lines](objectives/{family}.png)\n"
    for entry in entries:
        yield objective_part(entry)


def objective_part(entry: Entry) -> str:
    """One objective: its docstring as Markdown."""
    said = sections(entry.doc)
    lines = [f"### `{entry.name}`\n"]
    lines += [f"{block}\n" for block in blocks(said["text"])]
    lines.append(arguments(entry, said["Args"]) + "\n")
    facts = [(key, said.get(key, "")) for key in ("Returns", "Raises", "Convention", "Source")]
    facts += [("Other names", said.get("Also known as", "")), ("Unverified", said.get("Unverified", ""))]
    marks = [text.partition(":")[0] for mark, text in MARKS.items() if mark in marks_of(entry)]
    lines += [f"- **{' and '.join(marks).capitalize()}.** {AS_MARKED}"] if marks else []
    lines += [f"- **{key}:** {prose(' '.join(text.split()))}" for key, text in facts if text]
    return "\n".join(lines) + "\n"


AS_MARKED = "See [what they need](#what-they-need)."


def arguments(entry: Entry, args: str) -> str:
    """The table of a docstring's arguments, those that the registry adds at the end."""
    rows = []
    for names, text in entries_of(args):
        first = names.split(", ")[0]
        if first in entry.options:
            kind, _, default = option_text(entry, first).rpartition(", default ")
        else:
            kind, default = column_kind(entry, first), ""
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        rows.append((shown, kind.replace(" or ", ", "), f"`{default}`" if default else "", prose(text)))
    return table(("argument", "what", "default", ""), rows)


def column_kind(entry: Entry, name: str) -> str:
    if name == "state":
        return "state"
    kind = entry.columns[name]
    if isinstance(kind, Column):
        return f"a number {'an' if kind.per == 'example' else 'a'} {kind.per}"
    return "log-probs of a text" if isinstance(kind, Text) else "log-probs"


def needs_table(entries: Sequence[Entry]) -> str:
    """Every column that some objective needs: where it comes from, and who reads it."""
    users: dict[str, list[str]] = {}
    for entry in entries:
        for column in entry.needs:
            users.setdefault(column, []).append(entry.name)
    users["overlap"] = ["weighting"]
    rows = [
        (f"`{column}`", prose(origin(column)), ", ".join(map(link, users[column])) if column != "reference" else "most")
        for column in sorted(users)
    ]
    return table(("column", "where from", "who reads it"), rows)


# --- docstrings as Markdown --------------------------------------------------------------------

KEYS = re.compile(r"^(Args|Returns|Raises|Convention|Source|Also known as|Unverified):[ \n]?", re.MULTILINE)


def sections(doc: str) -> dict[str, str]:
    """A docstring by its keys; what stands before the first one is its "text"."""
    pieces = KEYS.split(doc)
    return {"text": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


def entries_of(args: str) -> list[tuple[str, str]]:
    """(names, text) of each entry of an ``Args:`` section, continuation lines joined."""
    found: list[tuple[str, str]] = []
    for line in args.splitlines():
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            found.append((entry[1], entry[2]))
        elif line.strip():
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def blocks(text: str) -> Iterator[str]:
    """Paragraphs of a docstring's text, formulas among them as GitHub has them."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        head, formula, rest = paragraph.partition(".. math::")
        if head.strip():
            yield prose(" ".join(head.split()))
        if formula:
            yield f"```math\n{github_math(rest)}\n```"


def formulas(doc: str) -> list[str]:
    """The LaTeX of every ``.. math::`` of a docstring."""
    paragraphs = re.split(r"\n\s*\n", doc)
    return [text.partition(".. math::")[2].strip() for text in paragraphs if ".. math::" in text]


def github_math(latex: str) -> str:
    r"""LaTeX without what GitHub refuses: ``\operatorname``."""
    lines = "\n".join(line.strip() for line in latex.strip().splitlines())
    return re.sub(r"\\operatorname\*?\{(\w+)\}", r"\\mathop{\\mathrm{\1}}", lines)


def prose(text: str) -> str:
    """A docstring's text as Markdown: code, links to objectives and papers, nothing read as a mark by mistake."""
    pieces = re.split(r"(``.+?``)", text)
    pieces[::2] = [plain.replace("*", r"\*").replace("<", "&lt;") for plain in pieces[::2]]
    return papers(coded("".join(pieces)))


def papers(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def coded(text: str) -> str:
    """What stands in double backticks as code; names of ours as links, those of another program not."""

    def one(found: re.Match[str]) -> str:
        theirs = OF_OTHERS.search(text[: found.start()]) or text[found.end() :].startswith(" of TRL")
        return f"`{found[1]}`" if theirs else link(found[1])

    return re.sub(r"``(.+?)``", one, text)


OF_OTHERS = re.compile(r"(TRL('s)?|TRL calls this|TRL's \w+ trainer \() ?$")


def link(name: str) -> str:
    """Code; where it is an objective's name, a link to it."""
    return f"[`{name}`](#{name})" if name in TABLE else f"`{name}`"


def paper(entry: Entry) -> str:
    source = short_source(entry)
    return f"[{source}](https://arxiv.org/abs/{source})" if source[:4].isdigit() else source


def marks_of(entry: Entry) -> str:
    found = marked(entry).removeprefix(entry.name).strip()
    return f"`{found}`" if found else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
