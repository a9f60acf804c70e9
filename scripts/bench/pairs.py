"""Pairs of token ids in the shapes that are measured. The ids are random: no figure depends on what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

END = 2
"""The end token, which every response has; ids below ``FIRST`` are special."""
FIRST = 3


class Pair(NamedTuple):
    """One prompt and two responses, (n,) int32 each; a response ends with ``END``."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer response."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Lengths(NamedTuple):
    """Tokens of a prompt and of its responses."""

    prompt: int
    chosen: int
    rejected: int


SHAPES = {"uf": ((120, 180), (180, 420)), "hh": ((96, 160), (30, 90)), "tiny": ((10, 16), (6, 14))}
"""Tokens of (prompts, responses) from … to, by the data they are like: UltraFeedback, HH; or none."""

MEDIANS = {"hh": (128, 60)}
"""Tokens of (prompts, responses) in the middle, to which the texts of a file are cut."""


def shape_lengths(shape: str, n: int, seed: int = 0) -> list[Lengths]:
    """Lengths of n pairs that fill the shape's ranges evenly, so that a small batch is no stroke of luck."""
    rng = np.random.default_rng(seed)
    prompts, responses = (_spread(low, high, k, rng) for (low, high), k in zip(SHAPES[shape], (n, 2 * n), strict=True))
    return [Lengths(p, c, r) for p, c, r in zip(prompts, responses[:n], responses[n:], strict=True)]


def _spread(low: int, high: int, n: int, rng: np.random.Generator) -> list[int]:
    """The middles of n equal parts of the range, in random order."""
    middles = low + (np.arange(n) + 0.5) / n * (high - low)
    return rng.permutation(middles.round().astype(int)).tolist()


_PIECE = re.compile(r"\w{1,6}|[^\w\s]")
"""About what a tokenizer of 32 k to 150 k pieces takes for a token in English; only the spread of lengths matters."""


def file_lengths(file: Path, n: int, *, like: str = "uf", seed: int = 0, longest: int = 1024) -> list[Lengths]:
    """Lengths of n pairs drawn from a file of preference data.

    Args:
        file: JSON lines with ``prompt``, ``chosen`` and ``rejected``, texts or lists of messages.
        n: pairs; ValueError if the file has fewer that fit.
        like: a key of ``MEDIANS`` scales the lengths so that their medians are these; else they stay.
        longest: tokens of a prompt with a response; longer pairs are left out, and of scaled ones the prompt is cut.
    """
    with file.open() as lines:
        found = [_lengths(json.loads(line)) for line in lines if line.strip()]
    fits = [one for one in found if min(one) > 1 and one.prompt + max(one.chosen, one.rejected) <= longest]
    if len(fits) < n:
        raise ValueError(f"{file}: {len(fits)} of {len(found)} pairs have at most {longest} tokens; {n} are asked for")
    drawn = [fits[i] for i in np.random.default_rng(seed).permutation(len(fits))[:n]]
    return _scaled(drawn, *MEDIANS[like], longest) if like in MEDIANS else drawn


def _scaled(lengths: Sequence[Lengths], prompt: int, response: int, longest: int) -> list[Lengths]:
    p = prompt / np.median([one.prompt for one in lengths])
    r = response / np.median([n for one in lengths for n in one[1:]])
    scaled = [[max(2, round(n * f)) for n, f in zip(one, (p, r, r), strict=True)] for one in lengths]
    return [Lengths(min(one[0], longest - max(one[1:])), *one[1:]) for one in scaled]


def _lengths(row: dict) -> Lengths:
    prompt, chosen, rejected = (_text(row[key]) for key in ("prompt", "chosen", "rejected"))
    return Lengths(*(len(_PIECE.findall(text)) for text in (prompt, chosen, rejected)))


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(str(message["content"]) for message in value)
    return str(value)


def make_pairs(lengths: Iterable[Lengths], vocabulary: int, seed: int = 0) -> list[Pair]:
    """Pairs of random ids with these lengths; of each pair the two responses begin with different tokens."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return rng.integers(FIRST, vocabulary, n).astype(np.int32)

    pairs = []
    for one in lengths:
        prompt, chosen, rejected = (ids(n) for n in one)
        chosen[-1] = rejected[-1] = END
        if chosen[0] == rejected[0] and len(chosen) > 1:
            chosen[0] = FIRST if rejected[0] != FIRST else FIRST + 1
        pairs.append(Pair(prompt, chosen, rejected))
    return pairs


def save_pairs(pairs: Sequence[Pair], file: Path) -> None:
    np.savez(file, **{f"{i}.{key}": ids for i, pair in enumerate(pairs) for key, ids in pair._asdict().items()})


def load_pairs(file: Path) -> list[Pair]:
    with np.load(file) as arrays:
        n = len(arrays.files) // len(Pair._fields)
        return [Pair(*(arrays[f"{i}.{key}"] for key in Pair._fields)) for i in range(n)]
