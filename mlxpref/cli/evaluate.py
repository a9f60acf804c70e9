"""``mlxpref evaluate``: what a policy prefers, as a table, as JSON, and row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlxpref import facts
from mlxpref.cli import console
from mlxpref.cli.figures import show
from mlxpref.cli.policies import Opened, open_policy, policy_options
from mlxpref.cli.sources import Reading, source_options
from mlxpref.data.recipe import Recipe
from mlxpref.data.relabel import fit_recipe, resolve_carrier
from mlxpref.data.relabelled import is_relabelled, read_relabelled
from mlxpref.data.scoring import Scoring, given_fields
from mlxpref.data.sources import find_split, open_source, read_source
from mlxpref.errors import DataError, UsageError
from mlxpref.evaluate import evaluate, in_goal_units, restore
from mlxpref.files import write_text, written_aside
from mlxpref.records import Counts, Dropped, Scored
from mlxpref.reference import ReferenceStore, default_store_folder

EPILOG = """\b
Example:
  mlxpref evaluate pairs.jsonl --adapter-path adapter
  mlxpref evaluate relabelled --adapter-path adapter --split test --json figures.json
  mlxpref evaluate pairs.jsonl --model mlx-community/Qwen3-0.6B-4bit --per-row rows.jsonl
"""


@click.command(epilog=EPILOG)
@click.argument("data")
@policy_options
@source_options(split="test, else valid, else train")
@click.option(
    "--max-length",
    type=click.IntRange(8),
    metavar="N",
    show_default="training's, else 1024",
    help="Tokens of prompt and response at most.",
)
@click.option(
    "--max-prompt-length",
    type=click.IntRange(4),
    metavar="N",
    show_default="training's, else half of --max-length",
    help="Tokens a prompt is cut down to first.",
)
@click.option(
    "--truncation",
    type=click.Choice(["cut", "drop"]),
    help="What happens to rows that are too long.  [default: training's, else cut]",
)
@click.option(
    "--micro-batch-tokens",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    metavar="N",
    help="Padded tokens of one forward pass.",
)
@click.option(
    "--high-score",
    type=float,
    metavar="X",
    help="Rejected responses from this score on are reported apart.  [default: the median chosen score]",
)
@click.option(
    "--gap-edges",
    metavar="X,…",
    help="Edges of the score gap bins, in the data's units.  [default: 1,2,4, stretched from 1-10 to their scale]",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Folder that keeps reference log-probs.  [default: the user's cache]",
)
@click.option("--no-store", is_flag=True, help="Keep no reference log-probs, and use none.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
@click.option(
    "--per-row",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write token ids and log-probs of every row here, as JSON lines.",
)
def command(
    data: str, adapter_path: str | None, model: str | None, revision: str | None, dtype: str | None,
    recipe_path: str | None, backend: str, reading: Reading, json_file: Path | None, per_row: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Measure an adapter, or a model without one, on preference DATA.

    DATA is a file, a folder, a hub id, or what `mlxpref relabel` wrote. Scored data are looked at under
    the goal of the chosen response, that of the rejected one, the recipe's top goal, and without a goal;
    unscored data under the last two. Log-ratios and margins are in nats, against the adapter's base.
    """
    edges = _edges(options["gap_edges"])
    if options["store"] is not None and options["no_store"]:
        raise UsageError("--store and --no-store contradict each other")
    examples, counts, written_with = _read(data, reading)
    opened = open_policy(
        adapter_path=adapter_path, model=model, revision=revision, dtype=dtype,
        recipe_path=recipe_path, backend=backend,
    )  # fmt: skip
    if opened.facts.get("init_from"):
        console.warn(f"trained against adapter {opened.facts['init_from']}; measured against the base")
    if not is_relabelled(data):
        examples = _scored_as_trained(examples, opened.facts.get("scoring"), counts)
    recipe = _recipe(opened, examples, written_with, is_relabelled(data))
    lengths = _lengths(opened.facts, options)
    store = None
    if not options["no_store"]:
        store = ReferenceStore(options["store"] or default_store_folder(), opened.policy.fingerprint)
        for line in store.said:
            console.warn(line)
    found = evaluate(
        examples, opened.backend, opened.policy, opened.tokenizer,
        recipe=recipe, has_adapter=opened.has_adapter, store=store, high_score=options["high_score"],
        gap_edges=edges, micro_batch_tokens=options["micro_batch_tokens"], on_progress=_Progress(), **lengths,
    )  # fmt: skip
    for line in (*counts.lines(), *found.counts.lines(), str(found.reference_counts)):
        console.note(line)
    show(found.metrics)
    if json_file is not None:
        about = _about(data, adapter_path, opened, recipe, lengths, counts)
        write_text(json_file, json.dumps({**found.metrics, **about}, indent=2, ensure_ascii=False) + "\n")
    if per_row is not None:
        with written_aside(per_row) as aside, aside.open("w", encoding="utf-8", newline="\n") as lines:
            for row in found.rows:
                lines.write(json.dumps(row.as_record(), ensure_ascii=False) + "\n")


# --- what is read ---


def _read(data: str, reading: Reading) -> tuple[list[Scored], Counts, Recipe | None]:
    """Examples, what was dropped, and the recipe the data were relabelled with."""
    if is_relabelled(data):
        return _read_relabelled(Path(data), reading)
    spec = reading.spec(data)
    source = open_source(spec)
    held_out = _held_out(source.splits) if spec.split is None else None
    if held_out is not None and held_out != source.split:
        source = open_source(replace(spec, split=held_out))
    for line in source.said:
        console.note(line)
    examples, counts = read_source(source, strict=reading.strict)
    return list(examples), counts, None


def _read_relabelled(folder: Path, reading: Reading) -> tuple[list[Scored], Counts, Recipe | None]:
    reading.check_relabelled(folder)
    relabelled = read_relabelled(folder)
    available = tuple(relabelled.splits)
    split = reading.split or _held_out(available) or available[0]
    console.note(f"{folder}: relabelled data, split {find_split(split, available) or split}")
    rows = relabelled.read(find_split(split, available) or split)
    examples = restore(rows, relabelled.recipe)[: reading.limit]
    return examples, Counts(kept=len(examples)), relabelled.recipe


def _scored_as_trained(examples: Sequence[Scored], stored: Any, counts: Counts) -> list[Scored]:
    """Data as they are, with the scores the adapter's goals were made of; what has none is counted as dropped."""
    if not stored:
        return list(examples)
    scoring, found = Scoring.from_dict(stored), []
    for example in examples:
        try:
            found.append(scoring(example))
        except DataError as error:
            counts.drop(Dropped(str(error), example.place))
            counts.kept -= 1
    given = {name: ", ".join(v) if isinstance(v, list) else v for name, v in given_fields(scoring).items()}
    console.note("scores are made as in training: " + "; ".join(f"{name} {value}" for name, value in given.items()))
    if not found:
        raise DataError("\n  ".join(["no example can be scored as in training", *counts.lines()]))
    return found


def _held_out(splits: Sequence[str]) -> str | None:
    """The test split, else the validation split, where there is one."""
    found = (find_split(kind, splits) for kind in ("test", "valid"))
    return next((name for name in found if name is not None), None)


def _recipe(opened: Opened, examples: Sequence[Scored], written_with: Recipe | None, relabelled: bool) -> Recipe | None:
    """The recipe to ask with: the policy's own; a bare model's is that of the data, or fitted on them."""
    recipe = opened.recipe
    if recipe is not None:
        return in_goal_units(recipe) if relabelled else recipe
    if opened.has_adapter:
        console.note("the adapter was trained without goals: unconditioned rows only (--recipe asks with goals)")
        return None
    if relabelled:
        return None if written_with is None else in_goal_units(written_with)
    if all(example.scores is None for example in examples):
        console.note("the data have no scores and the model no recipe: unconditioned rows only")
        return None
    recipe = fit_recipe(examples, carrier=resolve_carrier(opened.tokenizer))
    console.note(
        f"no adapter: goals are asked for by the default recipe, carrier {recipe.carrier}, scores mapped by "
        f"{recipe.mapping.kind} fitted on these data"
    )
    return recipe


def _lengths(stored: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Limits on tokens: those given, else those of training, else the defaults."""
    trained = {**(stored.get("tokenization") or {})}
    defaults = {"max_length": 1024, "max_prompt_length": None, "truncation": "cut"}
    lengths = {name: options[name] or trained.get(name) or value for name, value in defaults.items()}
    if options["max_length"] is not None and options["max_prompt_length"] is None:
        lengths["max_prompt_length"] = None  # training's was chosen for training's max_length
    return lengths


def _edges(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        edges = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--gap-edges {text}: write numbers with commas, such as 1,2,4") from error
    if any(not low < high for low, high in zip((0.0, *edges), edges, strict=False)):
        raise UsageError(f"--gap-edges {text}: the numbers must be above 0 and rise")
    return edges


# --- what is shown ---


class _Progress:
    """One display after another: the reference's log-probs, then the policy's."""

    def __init__(self) -> None:
        self._what = ""
        self._shown: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what, self._shown = what, console.progress(f"{what} log-probs", total)
            self._at = self._shown.__enter__()
        self._at(done)
        if done == total:
            self._shown.__exit__(None, None, None)


def _about(
    data: str, adapter_path: str | None, opened: Opened, recipe: Recipe | None,
    lengths: dict[str, Any], counts: Counts,
) -> dict[str, Any]:  # fmt: skip
    """Where the figures come from."""
    return {
        "data": data,
        "unread": dict(counts.dropped),
        "model": str(opened.policy.path),
        "adapter": adapter_path,
        "init_from": opened.facts.get("init_from"),
        "reference": opened.policy.fingerprint,
        "way": opened.policy.way,
        "backend": opened.backend.__name__.rsplit(".", 1)[-1],
        "recipe": None if recipe is None else recipe.as_dict(),
        "tokenization": lengths,
        "commit": facts.commit(),
        "versions": facts.versions(),
    }
