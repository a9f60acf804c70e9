"""The two sides of a comparison: responses to the same prompts, written by a policy or read from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.data.messages import Unusable, conversation
from mlxpref.data.readers import READERS, ending
from mlxpref.data.rowfiles import read_rows
from mlxpref.errors import DataError
from mlxpref.evaluate.statistics import units_of
from mlxpref.evaluate.winrates import Comparison
from mlxpref.generate import Answer, Question
from mlxpref.rewards.judges import Verdict

PARQUET = ".parquet"

COLUMNS = ("text", "response", "output", "completion")
"""Where a file's rows have their response: of ``generate --json``, AlpacaEval's outputs, and others."""


@dataclass(frozen=True, slots=True)
class Side:
    """Responses to numbered prompts.

    Attributes:
        name: for tables.
        texts: for each prompt its responses, in order.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, name: str, answers: Sequence[Answer], n_prompts: int) -> Side:
        """What a policy wrote."""
        return cls(name, _by_prompt([(answer.asked.index, answer.text) for answer in answers], n_prompts))


def read_side(file: Path, questions: Sequence[Question]) -> Side:
    """Responses of a file of rows, each with one of ``COLUMNS``; ``index``, where rows have it, says which question is
    meant, else they are in the order of the questions. Where rows have their prompt, it has to be the question's.

    Raises:
        DataError: the file cannot be read, a row has no response, or one to another prompt; questions have none; rows
            of several goals, or of an adapter and its base, lie in one file.
    """
    rows = _rows(file)
    columns = [name for name in COLUMNS if any(name in row for _, row in rows)]
    if len(columns) > 1:
        raise DataError(f"{file}: columns {', '.join(columns)}; which holds the responses? Leave one of them")
    found = []
    for place, (where, row) in enumerate(rows):
        text = row.get(columns[0]) if columns else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: no response; a row has one of the columns {', '.join(COLUMNS)}, a text")
        index = row.get("index", place)
        if isinstance(index, str) and index.strip().isdecimal():  # CSV has nothing but text
            index = int(index)
        if not isinstance(index, int) or not 0 <= index < len(questions):
            raise DataError(f"{where}: prompt {index!r}, and there are {len(questions)} prompts (counted from 0)")
        _check_prompt(where, row, questions[index])
        found.append((index, text))
    _check_alike(file, rows)
    texts = _by_prompt(found, len(questions))
    without = [place for place, own in enumerate(texts) if not own]
    if without:
        some = ", ".join(map(str, without[:5])) + (", …" if len(without) > 5 else "")
        raise DataError(f"{file}: {len(without)} of {len(questions)} prompts have no response (prompts {some})")
    return Side(file.name, texts)


def is_file(name: str) -> bool:
    """Whether a side is named by a file of responses, there or not."""
    return Path(name).is_file() or (ending(Path(name)) in (*READERS, PARQUET) and not Path(name).is_dir())


def _rows(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    kind = ending(file)
    if kind not in (*READERS, PARQUET):
        known = ", ".join((*READERS, PARQUET))
        raise DataError(f"{file}: cannot tell the kind of file by its name; known endings are {known}")
    numbered = list(read_rows(file) if kind == PARQUET else READERS[kind](file))
    wrong = next((where for where, row in numbered if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(f'{wrong}: a row is an object with a response, such as {{"text": "…"}}')
    return numbered


def _check_prompt(where: str, row: Mapping[str, Any], question: Question) -> None:
    """A goal may stand in what was asked: in a system message, or before a user's words, with an empty line between."""
    value = row.get("prompt", row.get("messages", row.get("instruction")))
    if value is None:
        return
    try:
        turns = conversation(value)
    except Unusable as error:
        raise DataError(f"{where}: {error.reason} {error.detail}".rstrip()) from error
    if turns and turns[-1].role == "assistant":  # the response itself
        turns.pop()
    both = (turns, question.prompt)
    given, asked = ([turn.content.strip() for turn in said if turn.role != "system"] for said in both)
    alike = len(given) == len(asked) and all(
        one == other or one.endswith(f"\n\n{other}") for one, other in zip(given, asked, strict=True)
    )
    if not alike:
        some = [" … ".join(turns)[-60:] for turns in (given, asked)]
        raise DataError(f"{where}: a response to another prompt: {some[0]!r}, not {some[1]!r}")


def _check_alike(file: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    for name in ("goal", "adapter", "of"):
        values = {json.dumps(row[name], sort_keys=True) for _, row in rows if name in row}
        if len(values) > 1:
            some = ", ".join(sorted(values)[:5])
            raise DataError(f"{file}: rows of {name} {some} in one file; a side is one policy with one goal")


def _by_prompt(found: Sequence[tuple[int, str]], n_prompts: int) -> tuple[tuple[str, ...], ...]:
    texts: list[list[str]] = [[] for _ in range(n_prompts)]
    for index, text in found:
        texts[index].append(text)
    return tuple(map(tuple, texts))


@dataclass(frozen=True, slots=True)
class Paired:
    """Responses of two sides, one pair after another.

    Attributes:
        index: of each pair's prompt.
        unit: the same, of equal prompts that of the first: their pairs are drawn together.
        ones, others: the texts.
    """

    index: tuple[int, ...]
    unit: tuple[int, ...]
    ones: tuple[str, ...]
    others: tuple[str, ...]

    def comparisons(self, verdicts: Sequence[Verdict]) -> list[Comparison]:
        """With what was said of each."""
        lengths = [(len(one), len(other)) for one, other in zip(self.ones, self.others, strict=True)]
        return [Comparison(*each) for each in zip(self.unit, verdicts, lengths, strict=True)]


def pair_up(one: Side, other: Side, questions: Sequence[Question]) -> Paired:
    """The first response of one side to a prompt with the first of the other, the second with the second, and so on.

    Raises:
        DataError: prompts with more responses of one side than of the other.
    """
    counts = [(len(a), len(b)) for a, b in zip(one.texts, other.texts, strict=True)]
    uneven = [(place, pair) for place, pair in enumerate(counts) if pair[0] != pair[1]]
    if uneven:
        place, (a, b) = uneven[0]
        raise DataError(
            f"{len(uneven)} of {len(questions)} prompts have more responses of one side: prompt {place} has {a} of "
            f"{one.name} and {b} of {other.name}; give as many of both (--samples)"
        )
    units = units_of([question.prompt for question in questions])
    index = [place for place, (a, _) in enumerate(counts) for _ in range(a)]
    unit = [units[place] for place in index]
    ones, others = ([text for own in side.texts for text in own] for side in (one, other))
    return Paired(tuple(index), tuple(unit), tuple(ones), tuple(others))
