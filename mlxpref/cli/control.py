"""``mlxpref control``: is the goal obeyed? Asked for several qualities, what is achieved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np

from mlxpref import facts
from mlxpref.cli import console
from mlxpref.cli.policies import Opened, named_recipe, open_policy, policy_options
from mlxpref.cli.sampling import check_sampling, sampling, sampling_options
from mlxpref.cli.unfinished import Keep, unfinished
from mlxpref.conversion import as_mlx_folder
from mlxpref.data.recipe import Recipe, goal_words
from mlxpref.errors import UsageError
from mlxpref.evaluate import Achieved, ControlCurve, control_curve
from mlxpref.evaluate.control import draw_record
from mlxpref.evaluate.course import Stage, course, log_ratios
from mlxpref.evaluate.statistics import units_of
from mlxpref.files import write_text
from mlxpref.generate import NO_GOAL, Answer, Question, read_questions
from mlxpref.records import Goal
from mlxpref.report.canvas import picture_format
from mlxpref.rewards.scorer import Scorer, load_scorer, scorer_name
from mlxpref.runs import checkpoint_folders

EPILOG = """\b
Example:
  mlxpref control prompts.jsonl --adapter-path adapter --scorer my_scores:quality
  mlxpref control prompts.jsonl --adapter-path adapter --scorer my_scores:quality --goals 1,4,7,10 --picture control.png
  mlxpref control prompts.jsonl --adapter-path adapter --scorer my_scores:honesty --attribute honesty
  mlxpref control prompts.jsonl --adapter-path adapter --scorer my_scores:quality --checkpoints
"""

N_GOALS = 5
"""Goals that are asked for where none are named: over the whole range, at equal distances."""


@click.command(epilog=EPILOG)
@click.argument("prompts", type=click.Path(path_type=Path))
@policy_options
@click.option(
    "--scorer",
    required=True,
    metavar="MODULE:FUNCTION",
    help="Says how good responses are: two lists, prompts and texts, in; one number for each out.",
)
@click.option(
    "--goals",
    metavar="GOAL,…",
    help=f"What to ask for, with commas between.  [default: {N_GOALS} over the range of the recipe, and its top]",
)
@click.option(
    "--attribute",
    metavar="NAME",
    help="Of a recipe with several attributes the one that is varied; the others stay at their top.",
)
@click.option(
    "--samples", type=click.IntRange(1), default=1, show_default=True, metavar="N",
    help="Responses to each prompt at each goal.",
)  # fmt: skip
@click.option("--top", type=float, metavar="X", help="Also the share of responses that score this much or more.")
@click.option("--compare-base", is_flag=True, help="Ask the base, too, without a goal.")
@click.option(
    "--checkpoints", is_flag=True,
    help="Ask each checkpoint of the run, too, for its best: quality against the distance from the base.",
)  # fmt: skip
@sampling_options(temperature=0.7)
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve here, .png or .svg.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path),
    help="Write figures and all responses here.",
)  # fmt: skip
def command(
    prompts: Path, adapter_path: str | None, model: str | None, revision: str | None, dtype: str | None,
    recipe_path: str | None, backend: str, **options: Any,
) -> None:  # fmt: skip
    """Ask a policy for several qualities, and score what it writes.

    PROMPTS is a text file with a prompt in each line, or rows with a column prompt (or messages). Prompts that were
    not trained on tell more. Intervals are of the mean over prompts like these.
    """
    if options["picture"] is not None:
        picture_format(options["picture"])
    if options["compare_base"] and adapter_path is None:
        raise UsageError("--compare-base needs --adapter-path: there is no adapter to leave out")
    if adapter_path is None and model is None:
        raise UsageError("which policy? Give --adapter-path FOLDER or --model FOLDER")
    check_sampling(options)
    folders = _checkpoints(adapter_path) if options["checkpoints"] else []
    questions, scorer = read_questions(prompts), load_scorer(options["scorer"])
    recipe = named_recipe(adapter_path, recipe_path, model=model)
    goals = _goals(options["goals"], options["attribute"], recipe)
    if options["picture"] is not None and None in goals:
        raise UsageError(
            "--picture draws goals, and this policy was trained without any" if recipe is None else
            "--picture draws goals; leave none out of --goals (--compare-base draws the base)"
        )  # fmt: skip
    base, file = None, options["json_file"]
    with unfinished(file) as keep:
        opened = open_policy(
            adapter_path=adapter_path, model=model, revision=revision, dtype=dtype,
            recipe_path=recipe_path, backend=backend,
        )  # fmt: skip
        found = _asked(questions, goals, scorer, opened, options, "responses", keep, adapter=True)
        if options["compare_base"]:
            base = _asked(questions, [None], scorer, opened, options, "responses of the base", keep, adapter=False)
        stored = None if recipe is None else recipe.as_dict()
        named: dict[str, Any] = {"revision": revision, "dtype": dtype, "recipe": stored, "adapter": adapter_path}
        about = {**_record(found, base, prompts, questions, opened, options), **named, "checkpoints": None}
        _write(about, file)
        _show(found, base, scorer, options["top"])
        if folders:
            if opened.facts.get("init_from"):
                console.warn(f"trained against adapter {opened.facts['init_from']}; distances are from the base")
            opened = replace(opened, policy=None)  # one model in memory at a time
            stages = _course(questions, folders, scorer, opened, options, keep, model=model, dtype=dtype)
            _write({**about, "checkpoints": [stage.as_record() for stage in stages]}, file)
            _show_course(stages)
    if options["picture"] is not None:
        draw_record(about, options["picture"])


def _write(about: Mapping[str, Any], file: Path | None) -> None:
    if file is not None:
        write_text(file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _checkpoints(adapter_path: str | None) -> list[tuple[int, Path]]:
    """Steps and folders of the run's checkpoints, two at least."""
    found = [] if adapter_path is None else checkpoint_folders(Path(adapter_path))
    if len(found) < 2:
        raise UsageError(
            f"--checkpoints compares a run's, and {adapter_path or 'a model'} holds {len(found)}: "
            "training.save_every and training.keep_last say how many are kept"
        )
    return found


def _goals(text: str | None, attribute: str | None, recipe: Recipe | None) -> list[Goal | None]:
    """The goals that are asked for, each a number or, of several attributes, one number for each."""
    if recipe is None:
        if text not in (None, NO_GOAL) or attribute is not None:
            raise UsageError("this policy was trained without goals; --recipe asks with another's")
        return [None]
    if attribute is not None and attribute not in recipe.attributes:
        named = ", ".join(recipe.attributes) or "one score without a name"
        raise UsageError(f"--attribute {attribute}: the recipe has {named}")
    values = _spread(recipe, attribute) if text is None else [_number(part.strip()) for part in text.split(",")]
    if not recipe.attributes:
        return _different([None if value is None else recipe.check_goal(value) for value in values], text)
    kept = {} if attribute is None else recipe.top_goal
    assert isinstance(kept, Mapping)
    varied = recipe.attributes if attribute is None else (attribute,)
    return _different(
        [None if value is None else recipe.check_goal({**kept, **dict.fromkeys(varied, value)}) for value in values],
        text,
    )


def _different(goals: list[Goal | None], text: str | None) -> list[Goal | None]:
    """The goals. UsageError if two of them are written alike."""
    if any(goal in goals[:place] for place, goal in enumerate(goals)):
        raise UsageError(f"--goals {text}: one of them is asked for twice, as the recipe writes them; once is enough")
    return goals


def _spread(recipe: Recipe, attribute: str | None) -> list[float | None]:
    """Goals over the whole range, whole numbers where its ends are some and far enough apart, as most scores are; and
    what is asked for by default, of one score or one attribute."""
    low, high = recipe.goal_range
    values = np.linspace(low, high, N_GOALS)
    if high - low >= N_GOALS - 1 and float(low).is_integer() and float(high).is_integer():
        values = values.round()
    top = recipe.top_goal
    if not isinstance(top, Mapping):
        values = np.append(values, top)
    elif attribute is not None:
        values = np.append(values, top[attribute])
    if recipe.number_format is not None:
        values = values.round(recipe.number_format)
    return [float(value) for value in np.unique(values)]


def _number(text: str) -> float | None:
    try:
        return None if text == NO_GOAL else float(text)
    except ValueError as error:
        raise UsageError(f"--goals: {text!r} is no number; write for example --goals 1,4,7,10") from error


def _asked(
    questions: Sequence[Question], goals: Sequence[Goal | None], scorer: Scorer, opened: Opened,
    options: Mapping[str, Any], what: str, keep: Keep, *, adapter: bool,
) -> ControlCurve:  # fmt: skip
    with console.progress(what, len(questions) * len(goals) * options["samples"]) as at:
        return control_curve(
            questions, goals, scorer, opened.backend, opened.policy, opened.tokenizer, opened.recipe,
            adapter=adapter, n_samples=options["samples"], top=options["top"], **sampling(options),
            on_progress=lambda done, total: at(done),
            on_answers=partial(keep, of=what),
        )  # fmt: skip


def _course(
    questions: Sequence[Question], folders: Sequence[tuple[int, Path]], scorer: Scorer, opened: Opened,
    options: Mapping[str, Any], keep: Keep, *, model: str | None, dtype: str | None,
) -> list[Stage]:  # fmt: skip
    """What each checkpoint writes when it is asked for its best, and how far from the base it is."""
    goal = None if opened.recipe is None else opened.recipe.top_goal
    found = []
    for step, folder in folders:
        path = as_mlx_folder(str(folder), model=model)
        one = replace(opened, policy=opened.backend.load_adapter(path, model_path=model, dtype=dtype))
        what, written = f"responses of step {step}", list[Answer]()

        def remember(answers: Sequence[Answer], of: str, written: list[Answer] = written) -> None:
            written += answers
            keep(answers, of)

        curve = _asked(questions, [goal], scorer, one, options, what, remember, adapter=True)
        found.append((step, curve, fmean(log_ratios(written, questions, one.backend, one.policy, one.tokenizer))))
        del one
    units = units_of([question.prompt for question in questions])
    return course(found, units=units, seed=options["seed"])


def _show_course(stages: Sequence[Stage]) -> None:
    console.table(
        ("step", "score", "95 % interval", "nats a response from the base"),
        [
            (
                str(one.step), f"{one.mean:.2f}",
                None if one.interval is None else "{:.2f} to {:.2f}".format(*one.interval),
                f"{one.nats:.1f}",
            )
            for one in stages
        ],
        title="checkpoints, asked for their best",
    )  # fmt: skip


def _show(found: ControlCurve, base: ControlCurve | None, scorer: Scorer, top: float | None) -> None:
    named = [(goal_words(one.goal), one) for one in found.per_goal]
    if base is not None:
        named += [("base, without a goal", one) for one in base.per_goal]
    shares = () if top is None else (f"{top:g} or more",)
    console.table(
        ("asked for", "score", "95 % interval", "80 % of responses", *shares, "words", "different"),
        [_row(name, one) for name, one in named],
        title=f"{scorer_name(scorer)}: {len(found.samples)} responses to {found.per_goal[0].prompts} prompts",
    )
    correlations = found.spearman if isinstance(found.spearman, Mapping) else {"": found.spearman}
    for name, value in correlations.items():
        if value is not None:
            console.say(f"Spearman of goal{f' ({name})' if name else ''} and score, single responses: {value:.2f}")


def _row(name: str, one: Achieved) -> tuple[Any, ...]:
    within = None if one.interval is None else "{:.2f} to {:.2f}".format(*one.interval)
    shares = () if one.top_share is None else (f"{one.top_share:.0%}",)
    spread = "{:.2f} to {:.2f}".format(*one.spread)
    return name, f"{one.mean:.2f}", within, spread, *shares, f"{one.words:.0f}", f"{one.distinct:.0%}"


def _record(
    found: ControlCurve, base: ControlCurve | None, prompts: Path, questions: Sequence[Question], opened: Opened,
    options: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    kept = {key: value for key, value in options.items() if key not in ("json_file", "picture")}
    return {
        **found.as_record(),
        "base": None if base is None else {**base.as_record(), "samples": [one.as_record() for one in base.samples]},
        "samples": [sample.as_record() for sample in found.samples],
        "prompts": [[turn.as_dict() for turn in question.prompt] for question in questions],
        "prompts_file": str(prompts),
        "model": str(opened.policy.path),
        "device": opened.backend.device_info(),
        "options": kept,
        "commit": facts.commit(),
        "versions": facts.versions(),
    }
