"""``mlxpref outputs``: answers to a standard benchmark's questions, as its own judge reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.cli.policies import Opened, named_recipe, open_policy, policy_options
from mlxpref.cli.sampling import check_sampling, sampling, sampling_options
from mlxpref.cli.unfinished import Keep, unfinished
from mlxpref.data.words import counted
from mlxpref.evaluate.outputs import BENCHMARKS, Writer, answer, read_tasks
from mlxpref.files import write_text
from mlxpref.generate import Question, ask, generate, parse_goal
from mlxpref.records import Goal, Prompt

EPILOG = """\b
Example:
  mlxpref outputs alpaca-eval alpaca_eval.json --adapter-path adapter --out ra-dpo.json
  mlxpref outputs mt-bench question.jsonl --adapter-path adapter --goal 9 --name ra-dpo-9 --out ra-dpo-9.jsonl
  mlxpref outputs arena-hard question.jsonl --model base-model --out model_answer/base.jsonl
"""


@click.command(epilog=EPILOG)
@click.argument("benchmark", type=click.Choice(list(BENCHMARKS)))
@click.argument("questions", type=click.Path(path_type=Path))
@policy_options
@click.option("--goal", metavar="GOAL", help="What every question asks for.  [default: the recipe's highest]")
@click.option("--name", metavar="NAME", help="Of the model in the file.  [default: the file's name without its ending]")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write.")
@sampling_options(temperature=None, max_tokens=None)
def command(
    benchmark: str, questions: Path, adapter_path: str | None, model: str | None, revision: str | None,
    dtype: str | None, recipe_path: str | None, backend: str, goal: str | None, name: str | None, out: Path,
    **options: Any,
) -> None:  # fmt: skip
    """Answer a standard BENCHMARK's QUESTIONS at a goal, in the file its own judge reads.

    QUESTIONS is the benchmark's own file: this machine fetches nothing and judges nothing. Without --temperature and
    --max-tokens the benchmark's own are used.
    """
    tasks, own = read_tasks(questions, benchmark), BENCHMARKS[benchmark]
    given = options["temperature"]
    temperatures = [own.temperature_of(task) if given is None else given for task in tasks]
    check_sampling({**options, "temperature": max(temperatures)})
    options["max_tokens"] = options["max_tokens"] or own.max_tokens
    recipe = named_recipe(adapter_path, recipe_path, model=model)
    wanted = None if recipe is None and goal is None else parse_goal(goal or "top", recipe)
    with unfinished(out) as keep:
        opened = open_policy(
            adapter_path=adapter_path, model=model, revision=revision, dtype=dtype, recipe_path=recipe_path,
            backend=backend,
        )  # fmt: skip
        with console.progress("answers", sum(len(task.turns) for task in tasks)) as at:
            asking = _Asking(opened, wanted, options, at, keep)
            answers = answer(tasks, asking, lambda task: own.temperature_of(task) if given is None else given)
        by = Writer(name or out.stem, time.time(), asking.count)
        write_text(out, own.write(tasks, answers, by))
    console.say(f"{out}: {len(tasks)} questions of {benchmark}")
    cut = sum(asking.count(text) >= options["max_tokens"] for texts in answers for text in texts)
    if cut:
        limit = options["max_tokens"]
        console.warn(f"{counted(cut, 'answer')} of {limit} tokens or more, perhaps cut; --max-tokens allows more")


class _Asking:
    """Texts for prompts at one goal, some at a time, and how far that is."""

    def __init__(
        self, opened: Opened, goal: Goal | None, options: dict[str, Any], at: Callable[[int], None],
        keep: Keep,
    ):  # fmt: skip
        self._opened, self._goal, self._options, self._at, self._keep = opened, goal, options, at, keep
        self._done = 0

    def __call__(self, prompts: Sequence[Prompt], temperature: float) -> list[str]:
        opened, before = self._opened, self._done
        asked = [
            ask(Question(prompt), self._goal, opened.recipe, opened.tokenizer, index=index)
            for index, prompt in enumerate(prompts)
        ]
        found = generate(
            asked, opened.backend, opened.policy, **{**sampling(self._options), "temperature": temperature},
            on_progress=lambda done, total: self._at(before + done), on_answers=partial(self._keep, of="answers"),
        )  # fmt: skip
        self._done += len(found)
        return [one.text for one in found]

    def count(self, text: str) -> int:
        """Tokens of an answer."""
        return len(self._opened.tokenizer.encode(text, add_special_tokens=False))
