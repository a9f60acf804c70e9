"""``mlxpref generate``: answers at the goals one asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.cli.policies import Opened, open_policy, policy_options
from mlxpref.cli.sampling import check_sampling, sampling, sampling_options
from mlxpref.cli.unfinished import Keep, unfinished
from mlxpref.data.recipe import Recipe, format_number, goal_words
from mlxpref.data.tokenization import render_prompt
from mlxpref.errors import UsageError
from mlxpref.files import write_text
from mlxpref.generate import (
    Answer,
    Asked,
    Question,
    ask_all,
    generate,
    line_questions,
    parse_goal,
    read_questions,
    text_question,
    with_system,
)
from mlxpref.records import Goal

EPILOG = """\b
Example:
  mlxpref generate "Tell me about owls." --adapter-path adapter
  mlxpref generate "Tell me about owls." --adapter-path adapter --goal 2 --goal 6 --goal 10
  mlxpref generate --file prompts.jsonl --adapter-path adapter --json answers.json
  echo "Tell me about owls." | mlxpref generate --model mlx-community/Qwen3-0.6B-4bit
"""


@click.command(epilog=EPILOG)
@click.argument("prompt", required=False)
@policy_options
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Prompts: each line of a text file, or the column prompt (or messages) of rows; -: standard input.",
)
@click.option("--system", metavar="TEXT", help="System message to put before each prompt.")
@click.option(
    "--goal",
    "goals",
    multiple=True,
    metavar="GOAL",
    help="What to ask for: a score (of several attributes for each, or NAME=SCORE,…), none, or top; may be "
    "given several times.  [default: top]",
)
@click.option("--no-adapter", is_flag=True, help="Ask the base model instead of the adapter.")
@click.option("--compare-base", is_flag=True, help="Ask both, and show the answers together.")
@sampling_options(temperature=0.0)
@click.option("--show-prompt", is_flag=True, help="Show the text the model reads, up to ▶, before each answer.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write prompts, goals and answers here.",
)
def command(
    prompt: str | None, adapter_path: str | None, model: str | None, revision: str | None, dtype: str | None,
    recipe_path: str | None, backend: str, **options: Any,
) -> None:  # fmt: skip
    """Answer PROMPT, or each prompt of a file, at one or several goals.

    The goal is written into the prompt in the words of training, which travel with the adapter. Without
    PROMPT and --file, or with -, standard input is the prompt.
    """
    questions = _questions(prompt, options["file"], options["system"])
    if adapter_path is None and (options["no_adapter"] or options["compare_base"]):
        raise UsageError("--no-adapter and --compare-base need --adapter-path: there is no adapter to leave out")
    if options["no_adapter"] and options["compare_base"]:
        raise UsageError("--no-adapter and --compare-base contradict each other")
    check_sampling(options)
    with unfinished(options["json_file"]) as keep:
        opened = open_policy(
            adapter_path=adapter_path, model=model, revision=revision, dtype=dtype,
            recipe_path=recipe_path, backend=backend,
        )  # fmt: skip
        goals = _goals(options["goals"], opened.recipe)
        asked = ask_all(questions, goals, opened.recipe, opened.tokenizer)
        answers = _answers(asked, opened, options, keep)
        if options["json_file"] is not None:
            text = json.dumps([answer.as_record() for answer in answers], indent=2, ensure_ascii=False)
            write_text(options["json_file"], text + "\n")
    shown = _Shown(opened, questions, options["show_prompt"], len(answers) > 1)
    for _, group in groupby(answers, key=lambda answer: answer.asked.index):
        shown.question(list(group))


def _questions(prompt: str | None, file: Path | None, system: str | None) -> list[Question]:
    if prompt is not None and file is not None:
        raise UsageError("a prompt and --file are both given; give one")
    if file is not None:
        questions = line_questions(sys.stdin) if str(file) == "-" else read_questions(file)
        if not questions:
            raise UsageError("no prompt on standard input")
    elif prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise UsageError("no prompt; give one, --file FILE, or pipe one in")
        questions = [text_question(sys.stdin.read().rstrip("\n"))]
    else:
        questions = [text_question(prompt)]
    return questions if system is None else [with_system(question, system) for question in questions]


def _goals(texts: Sequence[str], recipe: Recipe | None) -> list[Goal | None] | None:
    """The goals as parsed, None without any; said where one number was meant for several attributes, and where a
    policy that knows goals is asked without one."""
    goals = [parse_goal(text, recipe) for text in texts]
    for text, goal in zip(texts, goals, strict=True):
        if isinstance(goal, Mapping) and text != "top" and "=" not in text:
            console.note("asking for " + ", ".join(f"{name}={format_number(value)}" for name, value in goal.items()))
    if recipe is not None and None in goals:
        console.warn("asked without a goal: what is answered is not controlled then (--goal top is the default)")
    return goals or None


def _answers(asked: Sequence[Asked], opened: Opened, options: Mapping[str, Any], keep: Keep) -> list[Answer]:
    """The answers, those to one question together; with ``--compare-base`` each followed by the base's."""
    which = [False] if options["no_adapter"] else [True, False] if options["compare_base"] else [True]
    settings = sampling(options)
    long = len(asked) > settings["batch_size"]
    found = []
    for adapter in which:
        what = "answers" if adapter else "answers of the base model"
        with console.progress(what, len(asked)) if long else nullcontext() as at:
            found.append(
                generate(
                    asked, opened.backend, opened.policy, adapter=adapter, **settings,
                    on_progress=None if at is None else _first(at), on_answers=partial(keep, of=what),
                )
            )  # fmt: skip
    return [answer for together in zip(*found, strict=True) for answer in together]


def _first(at: Callable[[int], None]) -> Callable[[int, int], None]:
    return lambda done, total: at(done)


@dataclass(frozen=True)
class _Shown:
    """How answers are printed: alone the bare text; several under headings, or side by side."""

    opened: Opened
    questions: Sequence[Question]
    with_prompt: bool
    several: bool

    def question(self, answers: Sequence[Answer]) -> None:
        """Print the answers to one question."""
        if len(self.questions) > 1:
            console.say(f"=== {self.questions[answers[0].asked.index].prompt[-1].content.strip()}")
        if 1 < len(answers) <= 4 and console.is_terminal() and not self.with_prompt:
            console.table([self._heading(answer) for answer in answers], [[a.text.strip() for a in answers]])
            console.say()
            return
        for answer in answers:
            self._one(answer)

    def _one(self, answer: Answer) -> None:
        heading = self._heading(answer)
        if self.several and heading:
            console.say(f"--- {heading}")
        if self.with_prompt:
            asked = answer.asked
            tools = self.questions[asked.index].tools
            console.say(render_prompt(asked.prompt, self.opened.tokenizer, tools=tools) + "▶")
        console.say(answer.text)
        if self.several:
            console.say()

    def _heading(self, answer: Answer) -> str:
        words = [] if answer.asked.goal is None and self.opened.recipe is None else [goal_words(answer.asked.goal)]
        if self.opened.has_adapter and not answer.adapter:
            words.append("base model")
        return ", ".join(words)
