"""The formats preference data come in: one small function each, from a raw row to a :class:`Draft`.

A format says which columns it needs, how it is recognised by them, and where in a row the prompt,
the responses and their scores stand. It checks nothing: what all formats share (empty or equal
texts, scores that are no numbers) is decided once, in ``door.py``. Adding one is one function
here and one row in ``tests/test_sources.py``; ``docs/adding-a-data-format.md`` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from mlxpref.data.drafts import FORMATS, OF_RESPONSE, Answer, Draft, Format, Row, as_number, data_format
from mlxpref.data.messages import Unusable, conversation, helpsteer_turns, response, split_pair
from mlxpref.errors import UsageError

SCORES = ("score", "overall_score", "rating", "reward")
"""Names under which the one overall score is looked for, in this order."""

TEXTS = ("text", "content", "response", "answer", "completion", "output")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("helpfulness", "honesty", "instruction_following", "truthfulness")
RATED = dict.fromkeys((*ULTRAFEEDBACK, "fine_grained_score", "avg_fine_score"), (1.0, 5.0))
"""The scale of UltraFeedback's ratings and of their means."""


# --- lists of responses --------------------------------------------------------------------------


@data_format("ultrafeedback", needs=("prompt", "completions"))
def ultrafeedback(row: Row, columns: frozenset[str]) -> Draft:
    """UltraFeedback as published: completions with an overall score and four ratings.

    A completion with a rating "N/A" is left out, as in the seed's pipeline. The ratings, 1–5, are
    attributes; the overall score, 1–10, is the score.
    """
    answers = []
    for item in records(row["completions"]):
        ratings = _ratings(item.get("annotations"))
        refused = "a rating is N/A" if any(rating in ("N/A", None) for rating in ratings.values()) else ""
        if "fine-grained_score" in item:
            ratings["fine_grained_score"] = item["fine-grained_score"]
        ratings |= _of_response(item)
        answers.append(Answer(response(item.get("response")), item.get("overall_score"), ratings, refused))
    return Draft(conversation(row["prompt"]), answers, "overall_score", {"overall_score": (1, 10), **RATED})


def _ratings(notes: Any) -> dict[str, Any]:
    """The four ratings of a completion, None where one is missing; none at all without annotations."""
    if not isinstance(notes, Mapping):
        return {}
    found = {name: notes.get(name) for name in ULTRAFEEDBACK}
    return {name: note.get("Rating") if isinstance(note, Mapping) else None for name, note in found.items()}


@data_format("nectar", needs=("prompt", "answers"))
def nectar(row: Row, columns: frozenset[str]) -> Draft:
    """Ranked answers, rank 1 the best, as in Nectar: of K answers, rank r has the score K + 1 - r."""
    items = records(row["answers"])
    answers = [
        Answer(text_of(item), _reversed(item.get("rank"), len(items)), _of_response(item)) for item in items
    ]
    return Draft(conversation(row["prompt"]), answers, "rank", {"rank": (1, len(items))})


def _reversed(rank: Any, n: int) -> Any:
    value = as_number(rank)
    return n + 1 - value if isinstance(value, float) else rank


@data_format(
    "helpsteer2",
    needs=("prompt", "response"),
    takes=("score", *HELPSTEER),
    when=lambda columns: bool({"score", *HELPSTEER} & set(columns)),
    group_by="prompt",
)
def helpsteer2(row: Row, columns: frozenset[str]) -> Draft:
    """One response a row with five attributes, 0–4, as in HelpSteer2; rows of one prompt together.

    The score is helpfulness unless another is asked for. Prompts of several turns are cut at their
    ``<extra_id_1>`` marks.
    """
    score = "helpfulness" if "helpfulness" in columns else "score"
    names = [name for name in HELPSTEER if name in columns]
    answers = [
        Answer(
            response(item.get("response")),
            item.get(score),
            {name: item.get(name) for name in names} | _of_response(item),
        )
        for item in row["rows"]
    ]
    prompt = helpsteer_turns(row["prompt"]) if isinstance(row["prompt"], str) else conversation(row["prompt"])
    return Draft(prompt, answers, score, dict.fromkeys(HELPSTEER, (0, 4)))


@data_format("scored-list", needs=("prompt", "responses"), takes=("scores",))
def scored_list(row: Row, columns: frozenset[str]) -> Draft:
    """A prompt with a list of responses: objects with text and score, or texts beside a list of scores.

    Several raters' scores of one response (a list) count as their mean; named ones (an object) are
    attributes, and their "overall", or else their mean, the score.
    """
    responses = row["responses"]
    if isinstance(responses, Sequence) and all(isinstance(item, str) for item in responses):
        scores = row.get("scores")
        if scores is not None and (not isinstance(scores, Sequence) or len(scores) != len(responses)):
            raise Unusable("scores and responses differ in number")
        answers = [
            Answer(text, None if scores is None else scores[place]) for place, text in enumerate(responses)
        ]
        return Draft(conversation(row["prompt"]), answers, "scores" if "scores" in columns else None)
    items = records(responses)
    name = next((key for key in (*SCORES, "scores") if any(key in item for item in items)), None)
    answers = [_scored_answer(item, name) for item in items]
    return Draft(conversation(row["prompt"]), answers, name)


def _scored_answer(item: Row, name: str | None) -> Answer:
    attributes: dict[str, Any] = {}
    for key in ("attributes", "scores", "ratings", name):
        if key and isinstance(item.get(key), Mapping):
            attributes |= item[key]
    texts = {_text_key(item), *(key for key in TEXTS if isinstance(item.get(key), str))}  # "42" is an answer, too
    others = {key: value for key, value in item.items() if key not in {*texts, name, "rank", "index", "id"}}
    attributes |= {key: value for key, value in others.items() if isinstance(as_number(value), float)}
    attributes |= _of_response(item)
    return Answer(text_of(item), _one_number(item.get(name) if name else None), attributes)


def _one_number(value: Any) -> Any:
    """The mean of a list, the "overall" of an object or its mean; anything else as it is."""
    if isinstance(value, Mapping):
        overall = next((value[key] for key in ("overall", "overall_score", "score") if key in value), None)
        return overall if overall is not None else _one_number(list(value.values()))
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return value
    numbers = [number for number in map(as_number, value) if isinstance(number, float)]
    return sum(numbers) / len(numbers) if len(numbers) == len(value) else value


# --- pairs -----------------------------------------------------------------------------------------

_PAIR_COLUMNS = ("score_chosen", "score_rejected")


@data_format("joint", needs=("i_chosen", "r_chosen", "i_rejected", "r_rejected"), takes=_PAIR_COLUMNS)
def joint(row: Row, columns: frozenset[str]) -> Draft:
    """Pairs of instruction and response: each side has a prompt of its own, as in DOVE's data."""
    names = {name: pair for name, pair in side_columns(columns).items() if name not in ("i", "r")}
    score = next((name for name in SCORES if name in names), None)
    answers = [
        Answer(
            response(row[f"r_{side}"]),
            row.get(names[score][at]) if score else None,
            {name: row.get(pair[at]) for name, pair in names.items() if name != score},
            prompt=tuple(conversation(row[f"i_{side}"])),
        )
        for at, side in enumerate(("chosen", "rejected"))
    ]
    return Draft(list(answers[0].prompt), answers, score, pair=True)


@data_format(
    "seed",
    needs=("chosen", "rejected"),
    takes=("prompt", *_PAIR_COLUMNS),
    when=lambda columns: "avg_fine_score_chosen" in columns or "fine_grain_score_chosen" in columns,
)
def seed(row: Row, columns: frozenset[str]) -> Draft:
    """Pairs as the reward-augmentation scripts prepare them: overall, four fine and average scores.

    ``fine_grain_score_*`` lists helpfulness, honesty, instruction following and truthfulness, 1–5.
    """
    named = dict(row)
    for side in ("chosen", "rejected"):
        fine = named.pop(f"fine_grain_score_{side}", None)
        if isinstance(fine, Sequence) and len(fine) == len(ULTRAFEEDBACK):
            named |= {f"{name}_{side}": value for name, value in zip(ULTRAFEEDBACK, fine, strict=True)}
    return replace(preference(named, columns.union(named)), scales={"overall_score": (1, 10), **RATED})


@data_format(
    "ultrafeedback-binarized",
    needs=("prompt", "chosen", "rejected"),
    takes=_PAIR_COLUMNS,
    when=lambda columns: {"prompt_id", "messages", *_PAIR_COLUMNS} <= set(columns),
)
def ultrafeedback_binarized(row: Row, columns: frozenset[str]) -> Draft:
    """UltraFeedback in pairs: a text prompt beside message lists that begin with it, scores 1–10."""
    return replace(preference(row, columns), scales={"score": (1, 10)})


@data_format("preference", needs=("prompt", "chosen", "rejected"), takes=_PAIR_COLUMNS)
def preference(row: Row, columns: frozenset[str]) -> Draft:
    """Pairs in TRL's preference columns with a prompt; scored if score columns stand beside them."""
    prompt, *texts = split_pair(row.get("prompt"), row["chosen"], row["rejected"])
    names, score = side_columns(columns), _default_score(columns)
    answers = [
        Answer(
            text,
            row.get(names[score][side]) if score else None,
            {name: row.get(pair[side]) for name, pair in names.items() if name != score},
        )
        for side, text in enumerate(texts)
    ]
    return Draft(prompt, answers, score, pair=True)


@data_format("preference-implicit", needs=("chosen", "rejected"), takes=_PAIR_COLUMNS)
def preference_implicit(row: Row, columns: frozenset[str]) -> Draft:
    """Pairs in TRL's columns whose prompt is what chosen and rejected begin with."""
    return preference({**row, "prompt": None}, columns)


@lru_cache(maxsize=256)
def side_columns(columns: frozenset[str]) -> dict[str, tuple[str, str]]:
    """Score names of a pair -> their two columns: score_chosen and score_rejected, chosen-rating, …"""
    found: dict[str, tuple[str, str]] = {}
    for column in sorted(columns):
        for pattern in (r"(?P<name>.+)[_-]chosen", r"chosen[_-](?P<name>.+)"):
            match = re.fullmatch(pattern, column)
            if match:
                other = column.replace("chosen", "rejected")
                if other in columns:
                    found.setdefault(match["name"].replace("-", "_"), (column, other))
    return found


@lru_cache(maxsize=256)
def _default_score(columns: frozenset[str]) -> str | None:
    return next((name for name in SCORES if name in side_columns(columns)), None)


# --- helpers ---------------------------------------------------------------------------------------


def records(value: Any) -> list[Row]:
    """A list of objects, also from an object of equally long lists (the old way of ``datasets``)."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise Unusable("responses are not a list of objects", type(value).__name__)
    return list(value)


def _of_response(item: Row) -> dict[str, Any]:
    """What an object of one response says of it for an objective."""
    return {name: item[name] for name in OF_RESPONSE if item.get(name) is not None}


def text_of(item: Row) -> str:
    """The response text of an object, under any of the usual names."""
    return response(item.get(_text_key(item)))


def _text_key(item: Row) -> str:
    """Under which of the usual names an object has its response; the others may be scores."""
    return next((key for key in TEXTS if item.get(key) is not None), TEXTS[0])


def get_format(name: str) -> Format:
    """A format by name; UsageError with the nearest one otherwise."""
    if name in FORMATS:
        return FORMATS[name]
    near = get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown data format {name!r}{hint} Known: {', '.join(FORMATS)}")
