"""Rows to measure with where no data are named: random tokens, lengths like those of data sets people train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxpref.records import Tokenized


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Tokens of prompts and of responses, least and most; every length between is as likely."""

    prompt: tuple[int, int]
    response: tuple[int, int]
    said: str


SHAPES = {
    "uf": LengthRange((120, 180), (180, 420), "made up, UltraFeedback-like lengths"),
    "hh": LengthRange((96, 160), (30, 90), "made up, HH-like lengths"),
}
"""Kinds of rows by name."""


def made_rows(shape: str, n: int, *, vocabulary: int, longest: int | None = None, seed: int = 0) -> list[Tokenized]:
    """Scored pairs of random tokens.

    Args:
        shape: of :data:`SHAPES`.
        n: pairs.
        vocabulary: V; ids are below it.
        longest: tokens of prompt and response together at most; the response is cut.
    """
    draw, lengths = np.random.default_rng(seed), SHAPES[shape]

    def ids(least: int, most: int, room: int) -> np.ndarray:
        length = min(int(draw.integers(least, most + 1)), max(1, room))
        return draw.integers(0, vocabulary, length).astype(np.int32)

    rows = []
    for index in range(n):
        whole = longest if longest is not None else lengths.prompt[1] + lengths.response[1]
        prompt = ids(*lengths.prompt, whole - 1)
        responses = tuple(ids(*lengths.response, whole - len(prompt)) for _ in range(2))
        rows.append(Tokenized(prompt, responses, f"made-{index}", scores=(1.0, 0.0)))
    return rows
