"""Answers to standard benchmarks' questions, in the files that their own judges read.

AlpacaEval's questions have one turn; MT-Bench's two, the second asked after the first was answered; Arena-Hard's
one, in the layout of its version 0.1 (``question_id``, ``turns``) or 2.0 (``uid``, ``prompt``), whichever is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from mlxpref.data.readers import READERS, ending
from mlxpref.errors import DataError, UsageError
from mlxpref.records import Message, Prompt

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""MT-Bench's, by category (Zheng et al. 2023, arXiv:2306.05685, and its code)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question of a benchmark.

    Attributes:
        id: the benchmark's own.
        turns: what the user says, turn by turn.
        category: as the benchmark names it, or None.
        row: as it was read.
    """

    id: Any
    turns: tuple[str, ...]
    category: str | None
    row: Mapping[str, Any]


Answers = Sequence[Sequence[str]]
"""For each task its answers, one for each turn."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote: ``name`` of the model, ``now`` in seconds since 1970, ``count`` of a text's tokens."""

    name: str
    now: float
    count: Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a benchmark's questions are read and its answers written.

    Attributes:
        read: a row → task; KeyError, TypeError for a row that is none.
        write: (tasks, answers, ``Writer``) → the file's text.
        max_tokens: of an answer.
        temperatures: by category; others have ``temperature``.
    """

    read: Callable[[Mapping[str, Any]], Task]
    write: Callable[[Sequence[Task], Answers, Writer], str]
    max_tokens: int
    temperature: float = 0.0
    temperatures: Mapping[str, float] = field(default_factory=dict)

    def temperature_of(self, task: Task) -> float:
        """At which it is asked."""
        return self.temperatures.get(task.category or "", self.temperature)


def read_tasks(file: Path, kind: str) -> list[Task]:
    """Questions of a benchmark's file.

    Raises:
        UsageError: no such benchmark. DataError: the file cannot be read, is empty, or a row is no question of it.
    """
    if kind not in BENCHMARKS:
        raise UsageError(f"{kind}: no benchmark whose files are known; there are {', '.join(BENCHMARKS)}")
    if ending(file) not in READERS:
        raise DataError(f"{file}: cannot tell the kind of file by its name; known endings are {', '.join(READERS)}")
    found = []
    for where, row in READERS[ending(file)](file):
        try:
            task = BENCHMARKS[kind].read(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: no question of {kind} ({error!r}); {SHAPES[kind]}") from error
        if not task.turns or not all(isinstance(turn, str) and turn.strip() for turn in task.turns):
            raise DataError(f"{where}: an empty question")
        found.append(task)
    if not found:
        raise DataError(f"{file}: empty, there is no question in it")
    return found


def answer(
    tasks: Sequence[Task], ask: Callable[[Sequence[Prompt], float], Sequence[str]], temperature: Callable[[Task], float]
) -> list[list[str]]:
    """Answers, turn after turn: a later turn follows upon the model's own answer to the one before.

    Args:
        ask: (prompts, temperature) → a text for each; called once for each turn and temperature.
    """
    answers: list[list[str]] = [[] for _ in tasks]
    for turn in range(max(len(task.turns) for task in tasks)):
        for value in sorted({temperature(task) for task in tasks}):
            places = [at for at, task in enumerate(tasks) if len(task.turns) > turn and temperature(task) == value]
            prompts = [_prompt(tasks[at], answers[at]) for at in places]
            for at, text in zip(places, ask(prompts, value) if prompts else (), strict=True):
                answers[at].append(text)
    return answers


def _prompt(task: Task, answers: Sequence[str]) -> Prompt:
    before = [
        message
        for said, found in zip(task.turns, answers, strict=False)
        for message in (Message("user", said), Message("assistant", found))
    ]
    return (*before, Message("user", task.turns[len(answers)]))


# --- the benchmarks ---


def _read_alpaca(row: Mapping[str, Any]) -> Task:
    return Task(None, (row["instruction"],), row.get("dataset"), row)


def _write_alpaca(tasks: Sequence[Task], answers: Answers, by: Writer) -> str:
    rows = [
        {**({"dataset": task.category} if task.category is not None else {}), "instruction": task.turns[0],
         "output": texts[0], "generator": by.name}
        for task, texts in zip(tasks, answers, strict=True)
    ]  # fmt: skip
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _read_turns(row: Mapping[str, Any]) -> Task:
    """MT-Bench's turns are texts, Arena-Hard's have a ``content``."""
    if not isinstance(row["turns"], list) or not isinstance(row.get("category"), str | None):
        raise TypeError("turns is a list, category a text")
    turns = tuple(turn["content"] if isinstance(turn, Mapping) else turn for turn in row["turns"])
    return Task(row["question_id"], turns, row.get("category"), row)


def _read_arena(row: Mapping[str, Any]) -> Task:
    return Task(row["uid"], (row["prompt"],), row.get("category"), row) if "uid" in row else _read_turns(row)


def _write_turns(tasks: Sequence[Task], answers: Answers, by: Writer) -> str:
    return _lines(_choice(task, list(texts), by) for task, texts in zip(tasks, answers, strict=True))


def _write_arena(tasks: Sequence[Task], answers: Answers, by: Writer) -> str:
    return _lines(
        _messages(task, texts[0], by)
        if "uid" in task.row
        else _choice(task, [{"content": text, "token_len": by.count(text)} for text in texts], by)
        for task, texts in zip(tasks, answers, strict=True)
    )


def _choice(task: Task, turns: list[Any], by: Writer) -> dict[str, Any]:
    return {
        "question_id": task.id, "answer_id": _answer_id(by.name, task), "model_id": by.name,
        "choices": [{"index": 0, "turns": turns}], "tstamp": by.now,
    }  # fmt: skip


def _messages(task: Task, text: str, by: Writer) -> dict[str, Any]:
    said = [{"role": "user", "content": task.turns[0]}, {"role": "assistant", "content": {"answer": text}}]
    return {
        "uid": task.id, "ans_id": _answer_id(by.name, task), "model": by.name, "messages": said, "tstamp": by.now,
        "metadata": {"token_len": by.count(text)},
    }  # fmt: skip


def _answer_id(name: str, task: Task) -> str:
    """The same whenever this model answers this question."""
    return uuid5(NAMESPACE_URL, f"{name}/{task.id}").hex


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


BENCHMARKS: dict[str, Benchmark] = {
    "alpaca-eval": Benchmark(_read_alpaca, _write_alpaca, 2048),
    "mt-bench": Benchmark(_read_turns, _write_turns, 1024, 0.7, TEMPERATURES),
    "arena-hard": Benchmark(_read_arena, _write_arena, 4096),
}

SHAPES = {
    "alpaca-eval": "its rows have instruction (and dataset)",
    "mt-bench": "its rows have question_id, category and turns",
    "arena-hard": "its rows have uid and prompt, or question_id and turns",
}
"""In words, for a row that is none."""
