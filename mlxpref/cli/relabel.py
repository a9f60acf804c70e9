"""``mlxpref relabel``: scored data in, conditioned preference data out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.cli.relabelled import report, show
from mlxpref.cli.sources import Reading, flag, source_options
from mlxpref.data.recipe import Recipe, resolve_carrier
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import is_relabelled, read_relabelled, write_relabelled
from mlxpref.data.scale import MAX_DECIMALS
from mlxpref.data.scoring import parse_number
from mlxpref.data.shaping import PICKING, SCORING, Shaping
from mlxpref.data.sources import SourceSpec
from mlxpref.data.words import counted
from mlxpref.errors import DataError, UsageError
from mlxpref.files import check_free

EPILOG = """\b
Example:
  mlxpref relabel pairs.jsonl --preview 2
  mlxpref relabel pairs.jsonl --out relabelled --valid-fraction 0.1 --model Qwen/Qwen3-0.6B
  mlxpref relabel nvidia/HelpSteer2 --attributes helpfulness,correctness --score-range 0 4 --out helpful
  mlxpref relabel more.jsonl --out more --recipe relabelled
  mlxpref relabel lists.jsonl --out pairs --score-from helpfulness,honesty --combine min --select max_min

\b
Order of operations:
  make scores (--score-from and --combine, or --direction), take length off (--length-penalty),
  take responses (--sample, then --select), filter examples (--drop-top, --weakest), write goals.
What these need to know of the data is fitted on the training examples and kept in the folder.

The default template is the one of the reward-augmented DPO code. An own one holds {score} (or {goals},
a line for each attribute), and where it likes {low} and {high}, the ends of --goal-range.
"""

RECIPE_OPTIONS = (
    "template", "carrier", "score_range", "goal_range", "mapping", "number_format", "attributes", "top_goal",
    *SCORING,
)  # fmt: skip
"""What --recipe decides already."""


@click.command(epilog=EPILOG)
@click.argument("source", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write; without it only look (--preview)."
)
@click.option("--overwrite", is_flag=True, help="Replace relabelled data that --out holds already.")
@click.option(
    "--file-format",
    type=click.Choice(["jsonl", "parquet"]),
    default="jsonl",
    show_default=True,
    help="Format of the files written.",
)
@click.option(
    "--preview",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Print the exact text of N rows.",
)
@source_options(split="each of train, valid and test there is")
@click.option(
    "--weight",
    multiple=True,
    type=float,
    metavar="X",
    help="Examples taken for each one of a source; give one for each source, in order.  [default: 1]",
)
@click.option(
    "--model",
    metavar="FOLDER|ID",
    help="Model folder or hub id, whose chat template says where a goal can stand; preview with it.",
)
@click.option(
    "--recipe",
    "recipe_from",
    metavar="FOLDER",
    help="Use the recipe of these relabelled data as it is, and their way to make scores; not what they picked.",
)
@click.option(
    "--template", metavar="FILE|TEXT", help="The words of the goal.  [default: those of reward-augmented DPO]"
)
@click.option(
    "--carrier",
    type=click.Choice(["auto", "system", "first_user"]),
    default="auto",
    show_default=True,
    help="Message that states the goal; auto asks the chat template of --model, and without one is system.",
)
@click.option(
    "--score-range",
    nargs=2,
    type=float,
    metavar="LOW HIGH",
    help="Scale of the scores; one off it is dropped.",
)
@click.option(
    "--goal-range", nargs=2, type=float, metavar="LOW HIGH", help="Scale the prompt names.  [default: 1 10]"
)
@click.option(
    "--mapping",
    type=click.Choice(["auto", "identity", "affine", "quantile"]),
    default="auto",
    show_default=True,
    help="Scores to goals; auto leaves scores that fit the scale as they are.",
)
@click.option(
    "--number-format",
    type=click.IntRange(0, MAX_DECIMALS),
    metavar="DECIMALS",
    help="Always so many decimals; by default 8, 8.5, 7.25 as they come.",
)
@click.option(
    "--top-goal",
    type=float,
    metavar="X",
    help="What generation asks for by default.  [default: the high end of --goal-range]",
)
@click.option(
    "--attributes", metavar="NAME,…", help="Ask for these scores together ('overall' is the score itself)."
)
@click.option(
    "--halves",
    type=click.Choice(["both", "chosen", "rejected"]),
    default="both",
    show_default=True,
    help="Ask for whose score: the best response's, another's, or each in a row of its own.",
)
@click.option(
    "--ties",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="Examples whose scores are all equal.",
)
@click.option(
    "--min-gap",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Drop examples whose scores lie nearer together, in goal units.",
)
@click.option(
    "--plain-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Share of examples without a goal.",
)
@click.option("--score-from", metavar="NAME,…", help="Attributes the score is made of, e.g. helpfulness,honesty.")
@click.option(
    "--combine",
    metavar="HOW",
    help="How: mean, min (the worst case), uwo:LAMBDA (mean less LAMBDA variances; uwo is uwo:0.5), or "
    "log_sigmoid:QUANTILE (good in all, centred at that quantile, e.g. 0.85, which is the default).  [default: mean]",
)
@click.option(
    "--standardise/--no-standardise",
    default=None,
    help="Bring each to mean 0 and deviation 1 first, e.g. --no-standardise --combine mean for ratings on one "
    "scale.  [default: where mean, min or uwo compares several]",
)
@click.option(
    "--direction",
    metavar="NAME*W + NAME*W",
    help="Score along a unit vector of attributes, named in the prompt: 'helpfulness*80 + verbosity*60'.",
)
@click.option(
    "--length-penalty",
    metavar="ALPHA|dice",
    help="Take ALPHA of the score off for each character, e.g. 0.001; dice: what makes chosen as long as rejected.",
)
@click.option(
    "--sample",
    type=click.IntRange(2),
    metavar="N",
    help="Of longer lists keep N responses by statistical rejection sampling, e.g. 8.",
)
@click.option(
    "--sample-beta",
    type=float,
    metavar="BETA",
    help="Its temperature in score units; 0 keeps the best, e.g. 1.0 is milder than the default.  [default: 0.5]",
)
@click.option(
    "--select",
    metavar="MODE",
    help="Make a pair of each list: random, max_random, max_min or max_max, e.g. max_min: best and worst. Equal "
    "scores are dropped.",
)
@click.option(
    "--drop-top", metavar="COLUMN:SHARE", help="Drop the examples highest in a numeric column, e.g. ches:0.1."
)
@click.option(
    "--strength-from",
    metavar="NAME,…",
    help="Attributes (one a reward model) whose mean gap says how strong a pair's preference is, e.g. rm_a,rm_b.",
)
@click.option(
    "--weakest",
    metavar="drop|flip:SHARE",
    help="Drop the pairs of the weakest preferences, or turn them round, e.g. flip:0.1.",
)
@click.option(
    "--valid-fraction",
    type=float,
    metavar="X",
    help="Share of the training prompts to hold out for validation.  [default: none]",
)
@click.option(
    "--test-fraction", type=float, metavar="X", help="The same for a test split.  [default: none]"
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Decides splits, plain share, weights, draws."
)
@click.option(
    "--num-proc",
    type=click.IntRange(1),
    metavar="N",
    help="Processes that share the work where there is much; the result is the same.  [default: one a core]",
)
@click.pass_context
def command(context: click.Context, source: tuple[str, ...], reading: Reading, **options: Any) -> None:
    """Write each example's scores into its prompt, once as each goal, and order its responses by it.

    SOURCE is a file, a folder with train/valid/test, or a hub data set; several are mixed by --weight.
    """
    out, preview = options["out"], options["preview"]
    if out is None and not preview:
        raise UsageError("nowhere to write and nothing to show: give --out FOLDER, or --preview N")
    if out is not None:
        check_free(out, is_relabelled if options["overwrite"] else None)
    tokenizer = _tokenizer(options["model"])
    given = {
        name for name in options if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT
    }
    result = relabel_sources(
        _specs(source, reading, options["weight"]),
        _recipe(options, tokenizer, given),
        fractions={
            name: value for name in ("valid", "test") if (value := options[f"{name}_fraction"]) is not None
        },
        strict=reading.strict,
        seed=options["seed"],
        say=console.note,
        **_shaping(options),
        **{name: options[name] for name in ("halves", "ties", "min_gap", "plain_share", "num_proc")},
    )
    report(result)
    for row in islice((row for rows in result.splits.values() for row in rows), preview):
        show(row, tokenizer)
    if out is not None:
        write_relabelled(
            out,
            result.splits,
            result.recipe,
            file_format=options["file_format"],
            counts=result.counts,
            written_with=result.options,
            overwrite=options["overwrite"],
            num_proc=options["num_proc"],
        )
        console.say(f"written to {out}")


# --- options ---


def _specs(sources: Sequence[str], reading: Reading, weights: Sequence[float]) -> list[SourceSpec]:
    weights = weights or (1.0,) * len(sources)
    if len(weights) != len(sources):
        raise UsageError(
            f"{len(weights)} --weight for {counted(len(sources), 'source')}; give one for each, in order"
        )
    for path in sources:
        if is_relabelled(path):
            raise DataError(f"{path} is relabelled data already; relabel what it was made from")
    return [reading.spec(path, weight=weight) for path, weight in zip(sources, weights, strict=True)]


def _recipe(options: dict[str, Any], tokenizer: Any, given: Iterable[str]) -> Recipe | dict[str, Any]:
    if options["recipe_from"] is not None:
        clash = [flag(name) for name in RECIPE_OPTIONS if name in given]
        if clash:
            raise UsageError(f"--recipe says already what {', '.join(clash)} would")
        recipe = _stored_recipe(options["recipe_from"])
        _carrier(recipe.carrier, options["model"], tokenizer)
        return recipe
    names = list(_names(options["attributes"]))
    plain = ("score_range", "goal_range", "mapping", "number_format", "top_goal")
    return {
        **{name: options[name] for name in plain},
        "template": _template(options["template"]),
        "carrier": _carrier(options["carrier"], options["model"], tokenizer),
        "attributes": names,
    }


def _shaping(options: Mapping[str, Any]) -> dict[str, Any]:
    """How scores are made, as stored with --recipe where there is one, and what is picked."""
    values = {name: options[name] for name in (*SCORING, *PICKING) if options[name] is not None}
    values |= {name: _names(options[name]) for name in ("score_from", "strength_from")}
    penalty = values.get("length_penalty")
    if penalty is not None:
        values["length_penalty"] = penalty if (number := parse_number(penalty)) is None else number
    shaping = Shaping.of(values)
    if options["recipe_from"] is None:
        return {"scoring": shaping.scoring, "picking": shaping.picking}
    return {"scoring": read_relabelled(options["recipe_from"]).options.get("scoring"), "picking": shaping.picking}


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _carrier(wanted: str, model: str | None, tokenizer: Any) -> str:
    """The carrier to use, said aloud; a warning if the template has no place for the one asked for."""
    if wanted == "auto" and tokenizer is None:
        console.note(
            "carrier: system message, since no --model was given to ask; a model without a system role "
            "(Gemma 2, Mistral 7B v0.3) needs --carrier first_user"
        )
        return "system"
    allowed = wanted if tokenizer is None else resolve_carrier(tokenizer)
    if wanted == "auto":
        console.note(f"carrier: {allowed}, as the chat template of {model} has it")
        return allowed
    if wanted == "system" and allowed != "system":
        console.warn(f"the chat template of {model} has no system role, and the goal goes into one")
    return wanted


def _stored_recipe(folder: str) -> Recipe:
    recipe = read_relabelled(folder).recipe
    if recipe is None:
        raise DataError(f"{folder} holds unconditioned data: it has no recipe")
    return recipe


def _template(given: str | None) -> str | None:
    """The words themselves, or those in a file. Words hold a placeholder, the name of a file does not."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--template is neither a text with {{score}} nor a readable file: {given} ({error})"
        ) from error


def _tokenizer(model: str | None) -> Any:
    if model is None:
        return None
    from mlxpref.data.tokenization import load_tokenizer

    return load_tokenizer(model)
