"""``mlxpref winrate``: which of two policies, or files of responses, writes the better ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from mlxpref import backends, facts
from mlxpref.cli import console
from mlxpref.cli.policies import machine_options, open_policy
from mlxpref.cli.sampling import KEYS, check_sampling, sampling_options
from mlxpref.cli.sides import Policy, about, asked_side, named_side
from mlxpref.cli.unfinished import unfinished
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import UsageError
from mlxpref.evaluate.model_judge import TEMPLATE, ModelJudge, check_prompts, check_template
from mlxpref.evaluate.sides import Paired, Side, pair_up
from mlxpref.evaluate.winrates import WinRate, win_rate
from mlxpref.files import write_text
from mlxpref.generate import Question, read_questions
from mlxpref.hub import model_folder
from mlxpref.rewards.judges import Verdict, both_orders, by_score
from mlxpref.rewards.scorer import load_scorer

EPILOG = """\b
Example:
  mlxpref winrate adapter base-model --prompts prompts.jsonl --judge mlx-community/Qwen3-8B-4bit
  mlxpref winrate adapter@10 adapter@none --prompts prompts.jsonl --scorer my_scores:quality
  mlxpref winrate ra-dpo.json dpo.json --prompts prompts.jsonl --judge judge-model --json winrate.json
"""

LETTERS_AT_LEAST = 0.5
"""Median probability of a letter below which a judge is warned of."""


@click.command(epilog=EPILOG)
@click.argument("one")
@click.argument("other")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="Each line of a text file, or the column prompt (or messages) of rows; both sides answer them.",
)
@click.option("--model", metavar="FOLDER|ID", help="Base of an adapter, where that has moved.")
@click.option("--scorer", metavar="MODULE:FUNCTION", help="Scores responses; the higher score is preferred.")
@click.option(
    "--tie", type=float, default=0.0, show_default=True, metavar="X", help="Scores no further apart are a tie."
)
@click.option("--judge", metavar="FOLDER|ID", help="Model that reads each pair, in both orders.")
@click.option(
    "--judge-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text that asks it, with {conversation}, {first} and {second}.  [default: one of mlxpref's]",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Responses of a policy to each prompt.",
)
@sampling_options(temperature=0.0)
@machine_options
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write figures, responses and verdicts here.",
)
@click.pass_context
def command(context: click.Context, one: str, other: str, prompts: Path, **options: Any) -> None:
    """How often responses of ONE are preferred to those of OTHER.

    Each is a file of responses (JSON, JSONL or Parquet, in the order of the prompts), an adapter folder, asked for
    its top goal or for another as in adapter@7 and adapter@none, or a model without an adapter. Either a scorer or a
    judge says which response is better.
    """
    _check(options)
    questions = read_questions(prompts)
    scorer = None if options["scorer"] is None else load_scorer(options["scorer"])
    template = _template(options["judge_template"])
    if options["judge"] is not None:
        tokenizer = load_tokenizer(str(model_folder(options["judge"], weights=False)))
        check_prompts([question.prompt for question in questions], tokenizer, template)
    named = [named_side(name, questions, base=options["model"]) for name in (one, other)]
    moved = any(isinstance(side, Policy) and side.adapter and side.model for side in named)
    if options["model"] is not None and not moved:
        raise UsageError(f"--model {options['model']}: neither side is an adapter whose base has moved")
    _check_options(named, questions, context)
    with unfinished(options["json_file"]) as keep:
        sides = [asked_side(side, questions, options, keep) for side in named]
        paired = pair_up(sides[0], sides[1], questions)
        asked = [questions[index].prompt for index in paired.index]
        of_judge: dict[str, Any] = {}
        if scorer is not None:
            verdicts = by_score(scorer, asked, paired.ones, paired.others, tie=options["tie"])
        else:
            verdicts, of_judge = _judged(asked, paired, template, options)
        found = win_rate(paired.comparisons(verdicts), places=scorer is None, seed=options["seed"])
        if options["json_file"] is not None:
            record = {**found.as_record(), **_facts(named, prompts, options), **of_judge}
            record["comparisons"] = _responses(paired, verdicts)
            write_text(options["json_file"], json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _show(found, one, other, of_judge.get("letters"))


def _check(options: dict[str, Any]) -> None:
    if (options["scorer"] is None) == (options["judge"] is None):
        raise UsageError("who says which response is better? Give --scorer or --judge, one of them")
    if options["judge"] is None and options["judge_template"] is not None:
        raise UsageError("--judge-template is for --judge")
    if not options["tie"] >= 0:
        raise UsageError(f"--tie {options['tie']:g}: it is a distance of scores, 0 or more")
    if options["scorer"] is None and options["tie"]:
        raise UsageError("--tie is for --scorer; a judge's probabilities near a half count as such")
    check_sampling(options)


def _template(file: Path | None) -> str:
    """What a judge is asked, checked."""
    if file is None:
        return TEMPLATE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--judge-template {file}: cannot be read ({error})") from error
    check_template(text)
    return text


def _check_options(named: Sequence[Side | Policy], questions: Sequence[Question], context: click.Context) -> None:
    """Options of sampling act on sides that are asked; a file beside one has as many responses to each prompt. Those
    of the machine need something to compute."""
    files = [side for side in named if isinstance(side, Side)]

    def given(*keys: str) -> list[str]:
        default = click.core.ParameterSource.DEFAULT
        return [f"--{key.replace('_', '-')}" for key in keys if context.get_parameter_source(key) is not default]

    if len(files) == 2:
        unused = given(*(key for key in (*KEYS, "samples") if key != "seed"))
        if unused:
            raise UsageError(f"{', '.join(unused)}: both sides are files, nothing is sampled")
        unused = given("dtype", "backend") if context.params["judge"] is None else []
        if unused:
            raise UsageError(f"{', '.join(unused)}: files, compared by a scorer; no model is loaded")
        pair_up(files[0], files[1], questions)
    elif files:
        n = context.params["samples"]
        pair_up(files[0], Side("the other side", (("",) * n,) * len(questions)), questions)


def _judged(
    asked: Sequence[Any], paired: Paired, template: str, options: dict[str, Any]
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts, and what made them; "letters" is the median probability that the judge answers with a letter."""
    opened = open_policy(
        adapter_path=None, model=options["judge"], revision=None, dtype=options["dtype"], recipe_path=None,
        backend=options["backend"],
    )  # fmt: skip
    with console.progress("verdicts", 2 * len(asked)) as at:
        judge = ModelJudge(opened.backend, opened.policy, opened.tokenizer, template=template, on_progress=_twice(at))
        verdicts = both_orders(judge, asked, paired.ones, paired.others)
    return verdicts, {"letters": median(judge.letters), "judge_template": template}


def _twice(at: Callable[[int], None]) -> Callable[[int, int], None]:
    """Progress of two passes as one."""
    before = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal before
        at(before + done)
        if done == total:
            before += total

    return on_progress


def _show(found: WinRate, one: str, other: str, letters: float | None) -> None:
    def share(value: float | None, interval: tuple[float, float] | None = None) -> str:
        if value is None:
            return "unknown: one side's responses are always the longer ones"
        within = "" if interval is None else f"  ({interval[0]:.1%} to {interval[1]:.1%})"
        return f"{value:.1%}{within}"

    rows = [
        ("comparisons", f"{found.n}, of {found.prompts} prompts"),
        ("preferred", share(found.rate, found.interval)),
        ("  at equal length", share(found.equal_lengths, found.equal_lengths_interval)),
        ("wins, ties, losses", f"{found.wins:.1%}, {found.ties:.1%}, {found.losses:.1%}"),
        ("mean length, characters", f"{found.lengths[0]:.0f} against {found.lengths[1]:.0f}"),
    ]
    if found.places is not None:
        rows += [
            ("judge prefers the first shown", share(found.places.first, found.places.interval)),
            ("judge agrees with itself", share(found.places.agreement)),
            ("judge answers with a letter", share(letters)),
        ]
    console.table(("", "95 % interval in brackets"), rows, title=f"{one} against {other}")
    console.note(_sentence(found, one, other))
    if letters is not None and letters < LETTERS_AT_LEAST:
        console.warn(
            f"the judge would seldom answer with a letter ({letters:.1%}): a poor judge, or a template not for it"
        )


def _sentence(found: WinRate, one: str, other: str) -> str:
    """What may be concluded."""
    if found.interval is None:
        return "one prompt says nothing of others"
    low, high = found.equal_lengths_interval or found.interval
    if low <= 0.5 <= high:
        if found.equal_lengths is None:
            return f"{one} and {other} cannot be told apart by these prompts, nor length from quality"
        return f"at equal length, {one} and {other} cannot be told apart by these prompts"
    better, worse = (one, other) if low > 0.5 else (other, one)
    if found.equal_lengths is None:
        return f"{better} is preferred to {worse}; whether for its length cannot be told"
    return f"at equal length {better} is preferred to {worse}"


def _facts(named: Sequence[Side | Policy], prompts: Path, options: dict[str, Any]) -> dict[str, Any]:
    keys = ("scorer", "tie", "judge", "samples", *KEYS, "backend", "dtype")
    computed = options["judge"] is not None or any(isinstance(side, Policy) for side in named)
    return {
        "one": about(named[0]),
        "other": about(named[1]),
        "prompts_file": str(prompts),
        "options": {key: options[key] for key in keys},
        "device": backends.get(options["backend"]).device_info() if computed else None,
        "commit": facts.commit(),
        "versions": facts.versions(),
    }


def _responses(paired: Paired, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Every pair, and what was said of it."""
    return [
        {"index": index, "one": one, "other": other, "preference": verdict.preference,
         "first_shown_first": verdict.ahead, "first_shown_second": verdict.behind}
        for index, one, other, verdict in zip(paired.index, paired.ones, paired.others, verdicts, strict=True)
    ]  # fmt: skip
