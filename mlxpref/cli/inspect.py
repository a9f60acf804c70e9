"""``mlxpref inspect``: what a model will read, which of it is scored, and what was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlxpref.cli import console
from mlxpref.cli.sources import Reading, flag, source_options
from mlxpref.config_layers import load_config
from mlxpref.data.recipe import goal_words
from mlxpref.data.relabel import unconditioned
from mlxpref.data.relabelled import is_relabelled, read_relabelled
from mlxpref.data.sources import find_split, read_source
from mlxpref.data.tokenization import load_tokenizer, tokenize_all
from mlxpref.data.words import counted
from mlxpref.errors import DataError, UsageError
from mlxpref.objectives import resolve_objective
from mlxpref.prepare import first_examples, prepare
from mlxpref.records import Conditioned, Counts, Tokenized

EPILOG = """\b
Example:
  mlxpref inspect relabelled --model Qwen/Qwen3-0.6B
  mlxpref inspect relabelled --model Qwen/Qwen3-0.6B --max-length 512 --pick cut -n 5
  mlxpref inspect pairs.jsonl --model ./model --tokens
  mlxpref inspect -c configs/qwen3-0.6b-ultrafeedback.yaml --split valid

What stands between ⟦ and ⟧ (on a terminal: in green) is scored; everything before it is the prompt.
"""

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)

BESIDE_CONFIG = frozenset({"file", "number", "pick", "tokens", "split", "seed"})
"""Options that say what to print; with a configuration it says all the others."""

SHOWN = 80
"""Characters of the prompt's end that are repeated before each further response."""


@click.command(epilog=EPILOG)
@click.argument("source", required=False)
@click.option(
    "-c", "--config", "file", type=click.Path(path_type=Path), help="Show what `train` reads with this YAML file."
)
@click.option("--model", metavar="FOLDER|ID", help="Model folder or hub id, whose tokenizer reads the data.")
@click.option("--model-revision", metavar="REV", help="Branch, tag or commit of a --model on the hub.")
@click.option(
    "-n", "--number", type=click.IntRange(0), default=3, show_default=True, metavar="N", help="Examples to print."
)
@click.option(
    "--pick",
    type=click.Choice(["first", "random", "cut", "longest"]),
    default="first",
    show_default=True,
    help="Which examples to print.",
)
@click.option("--tokens", is_flag=True, help="Mark each scored token instead of each response.")
@click.option(
    "--max-length",
    type=int,
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of prompt and response at most.",
)
@click.option(
    "--max-prompt-length",
    type=int,
    metavar="N",
    help="Tokens a prompt is cut down to first.  [default: half of --max-length]",
)
@click.option("--truncation", type=click.Choice(["cut", "drop"]), default="cut", show_default=True,
              help="What happens to rows that are too long.")  # fmt: skip
@source_options(split="train")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Decides what --pick random picks.")
@click.pass_context
def command(context: click.Context, source: str | None, reading: Reading, **options: Any) -> None:
    """Print examples of SOURCE as a model reads them, scored tokens marked, and a summary of all.

    SOURCE is what `mlxpref relabel` wrote, or any data set it reads, whose rows are shown without a goal.
    A configuration instead of SOURCE shows the rows that training with it would see, of train or valid.
    """
    if options["file"] is None:
        rows, counts, tokenizer = _from_source(source, reading, options)
    else:
        _check_beside_config(context, source)
        rows, counts, tokenizer = _from_config(options["file"], reading.split or "train")
    for row in _pick(rows, options["pick"], options["number"], options["seed"]):
        for line in example_lines(row, tokenizer, each=options["tokens"]):
            console.say(line)
    _summary(rows, counts)


def _check_beside_config(context: click.Context, source: str | None) -> None:
    given = {
        name for name in context.params if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    idle = ["SOURCE"] if source is not None else []
    idle += [flag(name) for name in sorted(given - BESIDE_CONFIG - {"source"})]
    if idle:
        raise UsageError(f"the configuration says what is read, and how: leave out {', '.join(idle)}")


Found = tuple[Sequence[Tokenized], Mapping[str, Counts], Any]
"""Rows, what was kept and dropped on the way by stage, and the tokenizer."""


def _from_config(file: Path, split: str) -> Found:
    config = load_config(file)
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    prepared = prepare(config, tokenizer=tokenizer, needs=resolve_objective(config.objective).needs)
    for line in prepared.said:
        console.note(line)
    splits = {"train": prepared.train, "valid": prepared.valid}
    if not splits.get(split):
        there = ", ".join(name for name, rows in splits.items() if rows)
        raise UsageError(f"--split {split}: {file} gives {there}")
    return splits[split], prepared.counts, tokenizer


def _from_source(source: str | None, reading: Reading, options: dict[str, Any]) -> Found:
    if source is None or options["model"] is None:
        raise UsageError("what is to be shown? Give SOURCE and --model, or a configuration with -c")
    examples = _read(source, reading)
    tokenizer = load_tokenizer(options["model"], revision=options["model_revision"])
    lengths = {name: options[name] for name in ("max_length", "max_prompt_length", "truncation")}
    rows, counts = tokenize_all(examples, tokenizer, strict=reading.strict, **lengths)
    return rows, {"": counts}, tokenizer


def _read(source: str, reading: Reading) -> list[Conditioned]:
    if is_relabelled(source):
        reading.check_relabelled(source)
        folder = read_relabelled(source)
        split = reading.split or "train"
        return first_examples(folder.read(find_split(split, tuple(folder.splits)) or split), reading.limit)
    found, counts = read_source(reading.spec(source), strict=reading.strict)
    for line in counts.lines():
        console.note(f"read: {line}")
    if not found:
        raise DataError(f"{source}: no row can be used")
    console.note(f"{source} is not relabelled: rows are shown without a goal (see mlxpref relabel)")
    return [unconditioned(example) for example in found]


def _pick(rows: Sequence[Tokenized], how: str, number: int, seed: int) -> list[Tokenized]:
    if how == "random":
        order = np.random.default_rng(seed).permutation(len(rows))[:number]
        return [rows[at] for at in sorted(order)]
    if how == "longest":
        return sorted(rows, key=lambda row: -_whole(row))[:number]
    return [row for row in rows if how == "first" or row.prompt_cut or any(row.response_cut)][:number]


# --- one example ---


def example_lines(row: Tokenized, tokenizer: Any, *, each: bool) -> Iterator[str]:
    """The first response after the whole prompt, the others and further texts after its end; scored tokens marked."""
    prompt = tokenizer.decode(row.prompt_ids)
    length = _count(len(row.prompt_ids), row.prompt_cut)
    yield f"\n===== {row.example_id} · half {row.half or 'none'} · prompt {length} ====="
    yield goal_words(row.goal)
    k_all, texts = len(row.response_ids), [name for name in sorted(row.texts) for _ in row.texts[name]]
    for k, (lead, ids) in enumerate(row.slots):
        role = "chosen" if k == 0 else "rejected" if k_all == 2 else f"response {k + 1}"
        cut = row.response_cut[k] if k < k_all else 0
        score = "" if row.scores is None or k >= k_all else f", score {row.scores[k]:g}"
        name = role if k < k_all else texts[k - k_all]
        yield f"----- {name}{score} · {_count(len(ids), cut)} scored -----"
        before = prompt if k == 0 or len(prompt) <= SHOWN else "…" + prompt[-SHOWN:]
        start = np.concatenate([row.prompt_ids, lead])
        between = "".join(_pieces(row.prompt_ids, lead, tokenizer, False)) if len(lead) else ""
        yield before + between + "".join(mark(piece) for piece in _pieces(start, ids, tokenizer, each))


def mark(text: str) -> str:
    """Scored text, visibly."""
    return click.style(text, fg="green", bold=True) if console.is_terminal() else f"⟦{text}⟧"


def _count(kept: int, cut: int) -> str:
    return counted(kept, "token") + (f" ({cut} cut)" if cut else "")


def _pieces(prompt_ids: np.ndarray, ids: np.ndarray, tokenizer: Any, each: bool) -> Iterator[str]:
    """Text of the response as it stands after its prompt; of each token that completes a character."""
    before = list(prompt_ids[-8:])  # enough context for tokenizers that treat a text's beginning apart
    shown = tokenizer.decode(before)
    for n in range(1 if each else len(ids), len(ids) + 1):
        text = tokenizer.decode([*before, *ids[:n]])
        if text.endswith("\ufffd") and n < len(ids):
            continue
        if text.startswith(shown):
            yield text[len(shown) :]
        else:
            yield tokenizer.decode(ids[:n] if not each else ids[n - 1 : n])
        shown = text


# --- all of them ---


def _whole(row: Tokenized) -> int:
    """Tokens of the prompt and its longest response, before anything was cut."""
    longest = max(len(ids) + cut for ids, cut in zip(row.response_ids, row.response_cut, strict=True))
    return len(row.prompt_ids) + row.prompt_cut + longest


def _summary(rows: Sequence[Tokenized], counts: Mapping[str, Counts]) -> None:
    console.say("")
    if rows:
        lengths = {
            "prompt": [len(row.prompt_ids) + row.prompt_cut for row in rows],
            "preferred response": [len(row.response_ids[0]) + row.response_cut[0] for row in rows],
            "other responses": [
                len(ids) + cut
                for row in rows
                for ids, cut in zip(row.response_ids[1:], row.response_cut[1:], strict=True)
            ],
            "prompt and longest": [_whole(row) for row in rows],
        }
        console.table(
            ("tokens, uncut", "least", "10 %", "median", "90 %", "99 %", "most"),
            [
                (name, *(int(v) for v in np.quantile(values, QUANTILES, method="inverted_cdf")))
                for name, values in lengths.items()
            ],
        )
    for stage, found in counts.items():
        where = f"{stage}: " if stage else ""
        console.say(f"{where}{counted(found.kept, 'row')} kept, {sum(found.dropped.values())} dropped")
        for line in found.lines():
            console.say(line)
