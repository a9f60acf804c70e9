"""What the rows of a run are like: how long, how scored, how much was cut, and whether they contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from mlxpref.records import Tokenized

QUANTILES = (0.05, 0.5, 0.95)
"""At which lengths are given, the longest beside them."""

BINS = 12
"""Of a histogram of scores at most."""


def overview(rows: Sequence[Tokenized]) -> dict[str, Any]:
    """Figures of these rows, JSON-safe. Each row is read once.

    Returns:
        ``rows``, ``examples``, mean ``responses_each``; ``contradicting``: rows whose prompt, goal included, also
        occurs with the same responses and another one of them first; ``cut``: rows whose prompt, and of which a
        response, was cut; ``tokens``: quantiles of ``prompts``, ``chosen``, ``rejected`` and of all ``responses``. Over
        examples, chosen being the best by score, else the first: ``chosen_longer`` and ``equally_long``, shares of the
        responses it is compared with; ``scores``: a histogram of the ``chosen`` and the ``rejected`` ones over
        ``edges``, whose bins stand for ``values``; None without scores.
    """
    first: dict[bytes, bytes] = {}
    contrary: set[bytes] = set()
    keys: list[bytes] = []
    cut = {"prompts": 0, "responses": 0}
    seen: set[str] = set()
    examples = []
    for row in rows:
        key, best = _order(row)
        keys.append(key)
        if first.setdefault(key, best) != best:
            contrary.add(key)
        cut["prompts"] += row.prompt_cut > 0
        cut["responses"] += any(row.response_cut)
        if row.example_id not in seen:
            seen.add(row.example_id)
            examples.append(_example(row))
    chosen = [one[0] for one in examples]
    rejected = [n for one in examples for n in one[1]]
    compared = [(one[0], n) for one in examples for n in one[1]]
    return {
        "rows": len(keys),
        "examples": len(examples),
        "responses_each": float(np.mean([1 + len(one[1]) for one in examples])),
        "contradicting": sum(key in contrary for key in keys),
        "cut": cut,
        "tokens": {
            "prompts": _quantiles(one[2] for one in examples),
            "chosen": _quantiles(chosen),
            "rejected": _quantiles(rejected),
            "responses": _quantiles([*chosen, *rejected]),
        },
        "chosen_longer": _share(a > b for a, b in compared),
        "equally_long": _share(a == b for a, b in compared),
        "scores": _histogram([one[3] for one in examples if one[3]]),
    }


def _order(row: Tokenized) -> tuple[bytes, bytes]:
    """What a row is about, and which of its responses it holds to be best; digests."""
    texts = [_digest(ids.tobytes()) for ids in row.response_ids]
    return _digest(row.prompt_ids.tobytes() + b"".join(sorted(texts))), texts[0]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=12).digest()


def _example(row: Tokenized) -> tuple[int, list[int], int, tuple[float, list[float]] | None]:
    """Tokens of the chosen response, of the others, of the prompt; the scores in the same order, or None."""
    lengths = [len(ids) for ids in row.response_ids]
    scores = row.scores
    best = 0 if scores is None else int(np.argmax(scores))
    others = [place for place in range(len(lengths)) if place != best]
    scored = None if scores is None else (float(scores[best]), [float(scores[place]) for place in others])
    return lengths[best], [lengths[place] for place in others], len(row.prompt_ids), scored


def _quantiles(values: Iterable[int]) -> dict[str, float]:
    found = np.array(list(values), np.float64)
    at = np.quantile(found, QUANTILES)
    named = {f"p{100 * q:g}": float(value) for q, value in zip(QUANTILES, at, strict=True)}
    return {**named, "max": float(found.max())}


def _share(held: Iterable[bool]) -> float:
    return float(np.mean(list(held)))


def _histogram(scored: Sequence[tuple[float, list[float]]]) -> dict[str, list[float]] | None:
    if not scored:
        return None
    chosen = np.array([one for one, _ in scored])
    rejected = np.array([value for _, others in scored for value in others])
    distinct = np.unique(np.concatenate([chosen, rejected]))
    if len(distinct) == 1:
        edges = np.array([distinct[0] - 0.5, distinct[0] + 0.5])
    elif len(distinct) <= BINS:  # each score has a bar of its own
        between = (distinct[1:] + distinct[:-1]) / 2
        edges = np.concatenate([[2 * distinct[0] - between[0]], between, [2 * distinct[-1] - between[-1]]])
    else:
        edges = np.linspace(distinct[0], distinct[-1], BINS + 1)
    counts = [np.histogram(values, edges)[0].tolist() for values in (chosen, rejected)]
    values = distinct.tolist() if len(distinct) <= BINS else ((edges[1:] + edges[:-1]) / 2).tolist()
    return {"edges": edges.tolist(), "values": values, "chosen": counts[0], "rejected": counts[1]}
