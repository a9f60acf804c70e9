"""``mlxpref outputs``: answers to a standard benchmark's questions, as its own judge reads them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.cli.policies import Opened, named_recipe, open_policy, policy_options
from mlxpref.cli.sampling import sampling, sampling_options
from mlxpref.evaluate.outputs import BENCHMARKS, answer, read_tasks
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
@sampling_options(temperature=None)
def command(
    benchmark: str, questions: Path, adapter_path: str | None, model: str | None, revision: str | None,
    dtype: str | None, recipe_path: str | None, backend: str, goal: str | None, name: str | None, out: Path,
    **options: Any,
) -> None:  # fmt: skip
    """Answer a standard BENCHMARK's QUESTIONS at a goal, in the file its own judge reads.

    QUESTIONS is the benchmark's own file: this machine fetches nothing and judges nothing. Without --temperature the
    benchmark's own is used: by category in MT-Bench, 0 elsewhere.
    """
    tasks = read_tasks(questions, benchmark)
    recipe = named_recipe(adapter_path, recipe_path, model=model)
    wanted = None if recipe is None and goal is None else parse_goal(goal or "top", recipe)
    opened = open_policy(
        adapter_path=adapter_path, model=model, revision=revision, dtype=dtype, recipe_path=recipe_path,
        backend=backend,
    )  # fmt: skip
    given, own = options["temperature"], BENCHMARKS[benchmark].temperatures
    with console.progress("answers", sum(len(task.turns) for task in tasks)) as at:
        asking = _Asking(opened, wanted, options, at)
        answers = answer(tasks, asking, lambda task: own.get(task.category or "", 0.0) if given is None else given)
    write_text(out, BENCHMARKS[benchmark].write(tasks, answers, name or out.stem, time.time()))
    console.say(f"{out}: {len(tasks)} questions of {benchmark}")


class _Asking:
    """Texts for prompts at one goal, and how far that is."""

    def __init__(self, opened: Opened, goal: Goal | None, options: dict[str, Any], at: Any):
        self._opened, self._goal, self._options, self._at = opened, goal, options, at
        self._done = 0

    def __call__(self, prompts: Sequence[Prompt], temperature: float) -> list[str]:
        opened = self._opened
        asked = [
            ask(Question(prompt), self._goal, opened.recipe, opened.tokenizer, index=index)
            for index, prompt in enumerate(prompts)
        ]
        before = self._done
        settings = {**sampling(self._options), "temperature": temperature}
        answers = generate(
            asked, opened.backend, opened.policy, **settings, on_progress=lambda done, total: self._at(before + done)
        )
        self._done += len(prompts)
        return [one.text for one in answers]
