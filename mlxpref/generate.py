"""Asking a policy for answers, at the goals it was trained to read.

:func:`ask` is the one way from a prompt to token ids here. It goes through the recipe that travels
with the adapter and the encoding that training used, so that asking uses the words of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mlxpref.data.goal_template import check_states_none
from mlxpref.data.messages import Unusable, conversation
from mlxpref.data.readers import READERS, ending
from mlxpref.data.recipe import Recipe
from mlxpref.data.tokenization import encode_prompt
from mlxpref.errors import AdapterError, DataError, UsageError
from mlxpref.records import Goal, Message, Prompt

NO_GOAL = "none"
"""As a goal on a command line: ask without one."""

TEXT_FILES = (".txt", ".text", ".md", "")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the schemas of the tools its chat template should show."""

    prompt: Prompt
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as the policy reads it.

    Attributes:
        index: which of the given prompts.
        prompt: messages, the goal written in.
        goal: None asks without one.
        ids: token ids, ending where the response begins.
    """

    index: int
    prompt: Prompt
    goal: Goal | None
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and what it answers; ``adapter`` False: the reference wrote it."""

    asked: Asked
    text: str
    adapter: bool = True

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        goal = self.asked.goal
        return {
            "index": self.asked.index,
            "goal": dict(goal) if isinstance(goal, Mapping) else goal,
            "adapter": self.adapter,
            "prompt": [message.as_dict() for message in self.asked.prompt],
            "text": self.text,
        }


def ask(question: Question, goal: Goal | None, recipe: Recipe | None, tokenizer: Any, *, index: int = 0) -> Asked:
    """Write the goal into the prompt and encode it, as training does.

    Raises:
        UsageError: a goal without a recipe, or one that is not on the recipe's scale.
        DataError: the prompt has no place for the goal, or states one already.
    """
    if goal is not None and recipe is None:
        raise UsageError("a goal needs a recipe: this policy was trained without goals (or give --recipe)")
    if goal is not None:
        check_states_none(tokenizer)
    prompt = question.prompt
    written = prompt if goal is None or recipe is None else recipe.write(prompt, goal)[0]
    return Asked(index, written, goal, tuple(encode_prompt(written, tokenizer, tools=question.tools)))


def ask_all(
    questions: Sequence[Question], goals: Sequence[Goal | None] | None, recipe: Recipe | None, tokenizer: Any
) -> list[Asked]:
    """Every question at every goal, one question after the other.

    Goals None asks for the recipe's highest, or without a recipe for none.
    """
    if goals is None:
        goals = [recipe.top_goal if recipe is not None else None]
    return [
        ask(question, goal, recipe, tokenizer, index=index)
        for (index, question), goal in product(enumerate(questions), goals)
    ]


def generate(
    asked: Sequence[Asked],
    backend: Any,
    policy: Any,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    adapter: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    on_answers: Callable[[Sequence[Answer]], None] | None = None,
) -> list[Answer]:
    """One answer to each, in the order given.

    Args:
        max_tokens: most tokens of an answer.
        temperature: 0 takes the most likely token every time.
        top_p: share of probability that is sampled from; 1 is all of it.
        seed: of the sampling. The same seed and batch size give the same texts.
        batch_size: prompts computed together.
        adapter: False asks the reference.
        on_progress: called with (answers there, answers wanted).
        on_answers: called with the answers of each batch as it is done.

    Raises:
        UsageError: a number out of its range.
    """
    problems = {
        "max_tokens": max_tokens >= 1,
        "temperature": temperature >= 0,
        "top_p": 0 < top_p <= 1,
        "batch_size": batch_size >= 1,
    }
    wrong = [name for name, right in problems.items() if not right]
    if wrong:
        raise UsageError(
            f"out of range: {', '.join(wrong)} (max_tokens and batch_size are at least 1, temperature is not "
            "negative, top_p is above 0 and at most 1)"
        )
    answers: list[Answer] = []
    for start in range(0, len(asked), batch_size):
        together = asked[start : start + batch_size]
        texts = backend.generate(
            policy, [list(one.ids) for one in together],
            max_tokens=max_tokens, temperature=temperature, top_p=top_p,
            seed=seed + start, adapter=adapter,
        )  # fmt: skip
        found = [Answer(one, text, adapter) for one, text in zip(together, texts, strict=True)]
        answers += found
        if on_answers is not None:
            on_answers(found)
        if on_progress is not None:
            on_progress(len(answers), len(asked))
    return answers


# --- what travels with the adapter ---


def adapter_facts(folder: Path | str) -> dict[str, Any]:
    """What mlxpref wrote into an adapter's config: recipe, objective, …; empty for another's adapter.

    Raises:
        AdapterError: no readable ``adapter_config.json``.
    """
    file = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"{file}: cannot be read ({error.strerror}); an adapter folder holds adapter_config.json and "
            "adapters.safetensors"
        ) from error
    except ValueError as error:
        raise AdapterError(f"{file}: not JSON ({error})") from error
    facts = config.get("mlxpref") if isinstance(config, dict) else None
    return dict(facts) if isinstance(facts, dict) else {}


def adapter_recipe(folder: Path | str) -> Recipe | None:
    """The conditioning recipe an adapter was trained with; None if it was trained without goals."""
    stored = adapter_facts(folder).get("recipe")
    if stored is None:
        return None
    try:
        return Recipe.from_dict(stored)
    except DataError as error:
        raise AdapterError(f"{folder}: {error}") from error


# --- prompts and goals from a command line ---


def parse_goal(text: str, recipe: Recipe | None) -> Goal | None:
    """``8``, ``helpfulness=9,honesty=8``, one number for all attributes, ``top``, or ``none``.

    Raises:
        UsageError: none of these, or off the recipe's scale.
    """
    if text == NO_GOAL:
        return None
    if recipe is None:
        raise UsageError(
            f"--goal {text}: this policy was trained without goals; leave --goal out, or give the recipe of "
            "another adapter with --recipe"
        )
    if text == "top":
        return recipe.top_goal
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if len(parts) == 1 and not parts[0][1]:
            value = float(text)
            return recipe.check_goal(dict.fromkeys(recipe.attributes, value) if recipe.attributes else value)
        return recipe.check_goal({name.strip(): float(value) for name, _, value in parts})
    except ValueError as error:
        example = ",".join(f"{name}=9" for name in recipe.attributes) or "8"
        raise UsageError(f"--goal {text}: not a number; write for example --goal {example}") from error


def read_questions(file: Path) -> list[Question]:
    """Questions of a file: of a text file each line, else each row's ``prompt`` or ``messages``
    (and ``tools``).

    A last assistant turn of ``messages`` is what should be answered anew, and left out.

    Raises:
        DataError: the file is missing, empty or damaged, or a row holds no prompt; with its place.
    """
    if ending(file) in TEXT_FILES:
        try:
            with file.open(encoding="utf-8") as lines:
                found = line_questions(lines)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from error
    elif ending(file) in READERS:
        found = [_row_question(where, row) for where, row in READERS[ending(file)](file)]
    else:
        known = ", ".join((*READERS, ".txt"))
        raise DataError(f"{file}: cannot tell the kind of file by its name; known endings are {known}")
    if not found:
        raise DataError(f"{file}: empty, there is no prompt in it")
    return found


def line_questions(lines: Iterable[str]) -> list[Question]:
    """Each line that holds something, as one user turn."""
    return [text_question(line.strip()) for line in lines if line.strip()]


def text_question(text: str) -> Question:
    """A text as a question, read as data sources read theirs. DataError if it is empty or was no UTF-8."""
    if not text.strip():
        raise DataError("the prompt is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError("the prompt is not UTF-8 text")
    return Question(tuple(conversation(text)))


def with_system(question: Question, system: str) -> Question:
    """The question behind a system message. UsageError if it has one already."""
    if question.prompt[0].role == "system":
        raise UsageError("a prompt has a system message of its own; leave --system out")
    return replace(question, prompt=(Message("system", system), *question.prompt))


def _row_question(where: str, row: Any) -> Question:
    columns = row if isinstance(row, Mapping) else {"prompt": row}
    value = columns.get("prompt") or columns.get("messages")
    if value is None:
        raise DataError(f"{where}: no column prompt or messages; there is {', '.join(map(str, columns))}")
    try:
        turns = conversation(value)
    except Unusable as error:
        raise DataError(f"{where}: {error.reason} {error.detail}".rstrip()) from error
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not any(turn.content.strip() for turn in turns):
        raise DataError(f"{where}: empty prompt")
    tools = columns.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools are a list of schemas, not {type(tools).__name__}")
    return Question(tuple(turns), tools)
