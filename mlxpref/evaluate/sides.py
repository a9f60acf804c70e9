"""The two sides of a comparison: responses to the same prompts, written by a policy or read from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.data.readers import READERS, ending
from mlxpref.errors import DataError
from mlxpref.evaluate.winrates import Comparison
from mlxpref.generate import Answer, Question
from mlxpref.rewards.judges import Verdict

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


def read_side(file: Path, n_prompts: int) -> Side:
    """Responses of a file: JSON (a list), JSONL or Parquet rows with one of ``COLUMNS``; ``index``, where rows have
    it, says which prompt is meant, else they are in the order of the prompts.

    Raises:
        DataError: the file cannot be read, a row has no response, or prompts have none.
    """
    found = []
    for place, (where, row) in enumerate(_rows(file)):
        column = next((name for name in COLUMNS if isinstance(row.get(name), str)), None)
        if column is None:
            raise DataError(f"{where}: no response; one of the columns {', '.join(COLUMNS)} is text")
        index = row.get("index", place)
        if not isinstance(index, int) or not 0 <= index < n_prompts:
            raise DataError(f"{where}: prompt {index!r}, and there are {n_prompts} prompts (counted from 0)")
        found.append((index, row[column]))
    texts = _by_prompt(found, n_prompts)
    without = [place for place, own in enumerate(texts) if not own]
    if without:
        some = ", ".join(map(str, without[:5])) + (", …" if len(without) > 5 else "")
        raise DataError(f"{file}: {len(without)} of {n_prompts} prompts have no response (prompts {some})")
    return Side(file.name, texts)


def _rows(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    kind = ending(file)
    if kind == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"{file}: a list of responses is expected, not {type(rows).__name__}")
        numbered = [(f"{file.name}:{place}", row) for place, row in enumerate(rows, 1)]
    elif kind in READERS:
        numbered = list(READERS[kind](file))
    else:
        raise DataError(f"{file}: cannot tell the kind of file by its name; known endings are {', '.join(READERS)}")
    wrong = next((where for where, row in numbered if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(f'{wrong}: a row is an object with a response, such as {{"text": "…"}}')
    return numbered


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
        ones, others: the texts.
    """

    index: tuple[int, ...]
    ones: tuple[str, ...]
    others: tuple[str, ...]

    def comparisons(self, verdicts: Sequence[Verdict]) -> list[Comparison]:
        """With what was said of each."""
        lengths = [(len(one), len(other)) for one, other in zip(self.ones, self.others, strict=True)]
        return [Comparison(*each) for each in zip(self.index, verdicts, lengths, strict=True)]


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
    index = [place for place, (a, _) in enumerate(counts) for _ in range(a)]
    ones, others = ([text for own in side.texts for text in own] for side in (one, other))
    return Paired(tuple(index), tuple(ones), tuple(others))
