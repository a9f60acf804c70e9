"""Scored pairs of the sandbox's world under conditions: what a judge saw, and which responses there were."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlxpref.files import write_text
from mlxpref.sandbox.examples import Row, pairs

N_PAIRS = 1400
"""Of a world, as in the quickstart."""

WORDS = 26
"""Of the response that a scorer wants who wants no more: half of the responses that are drawn have as many or fewer."""

RARE = 0.02
"""Share of the pairs with a good response, where those are rare."""

LONGER = 4
"""Times as many pairs, and updates, of a long run."""

GAP = 3
"""Points that the two scores are apart at least, as a judge sees them."""

DRAWN = 40_000
"""Pairs to choose from."""


def write_world(name: str, folder: Path, *, base: Callable[[list[str]], list[str]] | None = None) -> Path:
    """A world's pairs as a JSONL file; the same whenever it is written by the same code.

    Args:
        base: prompts → a response to each, drawn from the base model; for the world ``own``.
    """
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        rows = WORLDS[name](random.Random(f"study {name}"), base)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def _other(rng: random.Random, base: Any) -> list[Row]:
    """Pairs of the clear world that are not in it."""
    return _clear(rng, base, times=2)[N_PAIRS:]


def _drawn() -> Iterator[Row]:
    yield from pairs(DRAWN, "train", seed=77)


def _first(rows: Iterator[Row], times: float = 1.0) -> list[Row]:
    """So many times ``N_PAIRS`` of them."""
    n = round(times * N_PAIRS)
    kept = [row for _, row in zip(range(n), rows, strict=False)]
    if len(kept) < n:
        raise SystemExit(f"{len(kept)} pairs, {n} are needed: raise DRAWN")
    return kept


def _clear(rng: random.Random, base: Any, *, times: float = 1.0) -> list[Row]:
    """The judge sees the gold score."""
    return _first((row for row in _drawn() if row["score_chosen"] - row["score_rejected"] >= GAP), times)


def _near(rng: random.Random, base: Any, *, times: float = 1.0) -> list[Row]:
    """Scores are a point apart: good responses lose to slightly better ones, poor ones win over slightly poorer."""
    return _first((row for row in _drawn() if row["score_chosen"] - row["score_rejected"] == 1), times)


def _natural(rng: random.Random, base: Any) -> list[Row]:
    """Pairs as they are drawn, ties left out: scores are 2.6 points apart on average."""
    return _first(row for row in _drawn() if row["score_chosen"] > row["score_rejected"])


def nearness(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """A scorer that wants so many words and no more: half a point less for each too many or too few, 1 at least."""
    return [max(1.0, 10.0 - abs(len(text.split()) - WORDS) / 2) for text in responses]


def _peak(rng: random.Random, base: Any) -> list[Row]:
    """Responses that fall short of the words wanted: the longer one is better, and longer still too long."""

    def short() -> Iterator[Row]:
        for row in _drawn():
            texts = [row["chosen"], row["rejected"]]
            scores = [round(score) for score in nearness([], texts)]
            if max(len(text.split()) for text in texts) <= WORDS and abs(scores[0] - scores[1]) >= GAP:
                yield _judged(row, scores)

    return _first(short())


def _odd(rng: random.Random, base: Any) -> list[Row]:
    """Scores are odd, so that no even goal is ever stated."""
    clear = (row for row in _drawn() if row["score_chosen"] - row["score_rejected"] >= GAP)
    return _first(row for row in clear if row["score_chosen"] % 2 and row["score_rejected"] % 2)


def _ties(rng: random.Random, base: Any) -> list[Row]:
    """As many pairs again, their scores equal."""
    equal = (row for row in _drawn() if row["score_chosen"] == row["score_rejected"])
    rows = _clear(rng, base) + _first(equal, 0.5)
    rng.shuffle(rows)
    return rows


def _noisy(rng: random.Random, base: Any, *, deviation: float) -> list[Row]:
    """The judge's scores are off by so many points (standard deviation); it prefers what it takes for better."""

    def seen() -> Iterator[Row]:
        for row in _drawn():
            gold = (row["score_chosen"], row["score_rejected"])
            scores = [min(10, max(1, round(score + rng.gauss(0, deviation)))) for score in gold]
            if abs(scores[0] - scores[1]) >= GAP:
                yield _judged(row, scores)

    return _first(seen())


def _judged(row: Row, scores: list[int]) -> Row:
    texts = [row["chosen"], row["rejected"]]
    best = int(scores[1] > scores[0])
    return {
        "prompt": row["prompt"], "chosen": texts[best], "rejected": texts[1 - best],
        "score_chosen": scores[best], "score_rejected": scores[1 - best],
    }  # fmt: skip


def _conflict(rng: random.Random, base: Any) -> list[Row]:
    """What is better in content is worse in form: the two halves of the score pull against each other."""

    def torn(row: Row) -> bool:
        content, form = (row[f"{name}_chosen"] - row[f"{name}_rejected"] for name in ("content", "form"))
        return content * form < 0 and row["score_chosen"] > row["score_rejected"]

    return _first(row for row in _drawn() if torn(row))


def _sparse(rng: random.Random, base: Any) -> list[Row]:
    """Few pairs have a response of 8 points or more, all others have 6 at most; two points apart at least."""
    good: list[Row] = []
    poor: list[Row] = []
    for row in _drawn():
        if row["score_chosen"] - row["score_rejected"] < 2:
            continue
        (good if row["score_chosen"] >= 8 else poor if row["score_chosen"] <= 6 else []).append(row)
    rows = _first(iter(poor), 1 - RARE) + _first(iter(good), RARE)
    rng.shuffle(rows)
    return rows


def _own(rng: random.Random, base: Any) -> list[Row]:
    """Both responses are the base model's own, drawn at temperature 1."""
    from mlxpref.sandbox.gold import gold

    prompts = [row["prompt"] for _, row in zip(range(4 * N_PAIRS), _drawn(), strict=False)]
    found = []
    for prompt, one, other in zip(prompts, base(prompts), base(prompts[::-1])[::-1], strict=True):
        scored = sorted(((gold(prompt, text).score, text) for text in (one, other)), reverse=True)
        if scored[0][0] - scored[1][0] >= GAP and all(text.strip() for _, text in scored):
            found.append({
                "prompt": prompt, "chosen": scored[0][1], "rejected": scored[1][1],
                "score_chosen": scored[0][0], "score_rejected": scored[1][0],
            })  # fmt: skip
    return _first(iter(found))


def _ultrafeedback(rng: random.Random, base: Any) -> list[Row]:
    """Real pairs whose scores are a point apart at least."""
    return [row for row in read_text_pairs("train") if row["score_chosen"] - row["score_rejected"] >= 1]


def read_text_pairs(split: str) -> list[Row]:
    """UltraFeedback's pairs with two different responses, from ``$MLXPREF_ASSETS/data/ultrafeedback``."""
    lines = (assets() / "data" / "ultrafeedback" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    whole = (row for row in rows if row["chosen"].strip() and row["rejected"].strip())
    return [row for row in whole if row["chosen"] != row["rejected"]]


def assets() -> Path:
    """Where real models and data lie."""
    folder = os.environ.get("MLXPREF_ASSETS")
    if not folder:
        raise SystemExit("real text needs MLXPREF_ASSETS: a folder with models/ and data/ultrafeedback/")
    return Path(folder)


WORLDS: dict[str, Callable[[random.Random, Any], list[Row]]] = {
    "clear": _clear,
    "twice": partial(_clear, times=2),
    "other": _other,
    "half": partial(_clear, times=0.5),
    "natural": _natural,
    "near": _near,
    "near-long": partial(_near, times=LONGER),
    "odd": _odd,
    "peak": _peak,
    "ties": _ties,
    "noisy-4": partial(_noisy, deviation=4.0),
    "conflict": _conflict,
    "sparse": _sparse,
    "own": _own,
    "ultrafeedback": _ultrafeedback,
}
"""By name; its docstring says what it is."""
