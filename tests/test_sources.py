"""Any data set -> Scored: formats, files, faults, several sources. One row of FORMAT_ROWS a format."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.data.door import checked
from mlxpref.data.formats import FORMATS
from mlxpref.data.messages import Unusable
from mlxpref.data.sources import Source, SourceSpec, find_split, open_source, parse_columns, read_source
from mlxpref.errors import DataError, MlxprefError, ScoreError, UsageError
from mlxpref.records import Dropped, Scored

# --- fixtures --------------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def completion(text: str, overall: Any, *ratings: Any) -> dict[str, Any]:
    """One completion as openbmb/UltraFeedback has it, with its four ratings as text."""
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    notes = {name: {"Rating": rating, "Rationale": "…"} for name, rating in zip(names, ratings, strict=True)}
    return {"model": "m", "response": text, "overall_score": overall, "annotations": notes}


def helpsteer(prompt: str, text: str, *marks: int) -> dict[str, Any]:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": text, **dict(zip(names, marks, strict=True))}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def pair(n: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"}
    return {**row, "score_chosen": 9.0, "score_rejected": 4.0, **changes}


def read_one(tmp_path: Path, *rows: Any, **spec: Any) -> tuple[Source, list[Scored | Dropped]]:
    source = open_source(SourceSpec(str(write(tmp_path / "rows.jsonl", list(rows))), **spec))
    return source, list(source)


# --- formats ---------------------------------------------------------------------------------------

# name -> raw rows of one example, and what must come out of them.
FORMAT_ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "preference": (
        [
            {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    user("Hi"),
                    says("Hello"),
                    user("Sky?"),
                ],
                "chosen": [says("Blue.")],
                "rejected": [says("Green.")],
                "chosen-rating": 5,
                "rejected-rating": 2.5,
                "tools": json.dumps([{"type": "function", "function": {"name": "look"}}]),
            }
        ],
        {
            "prompt": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Sky?")],
            "responses": ("Blue.", "Green."),
            "scores": (5.0, 2.5),
            "extras": {"tools": [{"type": "function", "function": {"name": "look"}}]},
        },
    ),
    "preference-implicit": (
        [{"chosen": [user("Sky?"), says("Blue.")], "rejected": [user("Sky?"), says("Green.")]}],
        {"prompt": [("user", "Sky?")], "responses": ("Blue.", "Green."), "scores": None},
    ),
    "ultrafeedback-binarized": (
        [
            {
                "prompt": "Sky?",
                "prompt_id": "f00",
                "chosen": [user("Sky?"), says("Blue.")],
                "rejected": [user("Sky?"), says("Green.")],
                "messages": [user("Sky?"), says("Blue.")],
                "score_chosen": 8.5,
                "score_rejected": 4.0,
            }
        ],
        {
            "prompt": [("user", "Sky?")],
            "responses": ("Blue.", "Green."),
            "scores": (8.5, 4.0),
            "example_id": "f00",
        },
    ),
    "seed": (
        [
            {
                "prompt": "Sky?",
                "prompt_id": "f00",
                "chosen": [user("Sky?"), says("Blue.")],
                "rejected": [user("Sky?"), says("Green.")],
                "overall_score_chosen": 8.0,
                "overall_score_rejected": 5.5,
                "fine_grain_score_chosen": [5, 4, 3, 2],
                "fine_grain_score_rejected": [1, 2, 3, 4],
                "avg_fine_score_chosen": 3.5,
                "avg_fine_score_rejected": 2.5,
            }
        ],
        {
            "prompt": [("user", "Sky?")],
            "responses": ("Blue.", "Green."),
            "scores": (8.0, 5.5),
            "attributes": {
                "helpfulness": (5.0, 1.0),
                "honesty": (4.0, 2.0),
                "instruction_following": (3.0, 3.0),
                "truthfulness": (2.0, 4.0),
                "avg_fine_score": (3.5, 2.5),
            },
        },
    ),
    "ultrafeedback": (
        [
            {
                "source": "flan",
                "instruction": "Sky?",
                "completions": [
                    completion("Green.", 4.0, "2", "3", "4", "1"),
                    completion("Blue.", 8.5, "5", "5", "5", "4"),
                    completion("Red.", 2.0, "1", "1", "1", "1"),
                ],
            }
        ],
        {
            "prompt": [("user", "Sky?")],
            "responses": ("Green.", "Blue.", "Red."),
            "scores": (4.0, 8.5, 2.0),
            "attributes": {
                "helpfulness": (2.0, 5.0, 1.0),
                "honesty": (3.0, 5.0, 1.0),
                "instruction_following": (4.0, 5.0, 1.0),
                "truthfulness": (1.0, 4.0, 1.0),
            },
        },
    ),
    "helpsteer2": (
        [
            helpsteer("Hi<extra_id_1>Assistant\nHello\n<extra_id_1>User\nSky?", "Blue.", 3, 4, 4, 2, 1),
            helpsteer("Hi<extra_id_1>Assistant\nHello\n<extra_id_1>User\nSky?", "Green.", 1, 0, 4, 2, 1),
        ],
        {
            "prompt": [("user", "Hi"), ("assistant", "Hello"), ("user", "Sky?")],
            "responses": ("Blue.", "Green."),
            "scores": (3.0, 1.0),
            "attributes": {
                "helpfulness": (3.0, 1.0),
                "correctness": (4.0, 0.0),
                "coherence": (4.0, 4.0),
                "complexity": (2.0, 2.0),
                "verbosity": (1.0, 1.0),
            },
        },
    ),
    "scored-list": (
        [
            {
                "prompt": "Sky?",
                "responses": [
                    {"model": "a", "text": "Blue.", "score": 5, "scores": [5, 5, 5]},
                    {"model": "b", "text": "Green.", "score": [1, 2]},
                    {"model": "c", "text": "Grey.", "score": {"overall": 3, "wit": 2}},
                ],
            }
        ],
        {
            "prompt": [("user", "Sky?")],
            "responses": ("Blue.", "Green.", "Grey."),
            "scores": (5.0, 1.5, 3.0),
        },
    ),
    "joint": (
        [{"i_chosen": "Sky?", "r_chosen": "Blue.", "i_rejected": [user("Sea?")], "r_rejected": "Blue."}],
        {
            "prompt": [("user", "Sky?")],
            "responses": ("Blue.", "Blue."),
            "scores": None,
            "extras": {"instructions": ([user("Sky?")], [user("Sea?")])},
        },
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant: ",
                "answers": [
                    {"answer": "Green.", "model": "a", "rank": 3.0},
                    {"answer": "Blue.", "model": "b", "rank": 1.0},
                    {"answer": "Grey.", "model": "c", "rank": 2.0},
                ],
            }
        ],
        {
            "prompt": [("user", "Hi"), ("assistant", "Hello"), ("user", "Sky?")],
            "responses": ("Green.", "Blue.", "Grey."),
            "scores": (1.0, 3.0, 2.0),
        },
    ),
}


def test_every_format_has_a_row() -> None:
    assert set(FORMAT_ROWS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMAT_ROWS)
def test_format_is_detected_and_read(name: str, tmp_path: Path) -> None:
    """Finds: a row taken for another format's, texts or scores from the wrong place."""
    rows, expected = FORMAT_ROWS[name]
    source, got = read_one(tmp_path, *rows)
    assert source.format == name
    assert any(name in line for line in source.said)
    assert [type(row) for row in got] == [Scored], got
    example = got[0]
    assert isinstance(example, Scored)
    assert [(m.role, m.content) for m in example.prompt] == expected["prompt"]
    for field, value in expected.items():
        if field != "prompt":
            assert getattr(example, field) == value, field


def test_pairs_with_a_prompt_each_under_the_names_they_are_published_with(tmp_path: Path) -> None:
    """Finds: i and r taken for scores, a system turn before one side only, a side that asks nothing."""
    row = {
        "i_chosen": "Sky?", "r_chosen": "Blue.", "i_reject": "Sea?", "r_reject": "Blue.", "system": "Be brief.",
        "wit_chosen": 3, "wit_rejected": 1, "score_chosen": 2, "score_rejected": 1,
    }  # fmt: skip
    source, got = read_one(tmp_path, row, {**row, "i_reject": " "}, {**row, "i_reject": "Sky?"})
    assert source.format == "joint" and "i_rejected is read from the column 'i_reject'" in source.said
    (example,) = (x for x in got if isinstance(x, Scored))
    system = {"role": "system", "content": "Be brief."}
    assert example.extras == {"instructions": ([system, user("Sky?")], [system, user("Sea?")])}
    assert (example.scores, example.attributes) == ((2.0, 1.0), {"wit": (3.0, 1.0)})
    assert [m.content for m in example.prompt] == ["Be brief.", "Sky?"]
    reasons = [x.reason for x in got if isinstance(x, Dropped)]
    assert reasons == ["empty prompt", "chosen and rejected are the same text"]


@pytest.mark.parametrize(
    ("name", "score", "scale"),
    [
        ("nectar", None, (1, 3)),
        ("helpsteer2", None, (0, 4)),
        ("helpsteer2", "verbosity", (0, 4)),
        ("ultrafeedback", None, (1, 10)),
        ("ultrafeedback", "honesty", (1, 5)),
        ("ultrafeedback-binarized", None, (1, 10)),
        ("seed", None, (1, 10)),
        ("preference", None, None),
        ("scored-list", None, None),
    ],
)
def test_scale_a_format_fixes(
    name: str, score: str | None, scale: tuple[float, float] | None, tmp_path: Path
) -> None:
    """Finds: the scale of another score of the same data; a guess where nothing is known."""
    source, _ = read_one(tmp_path, *FORMAT_ROWS[name][0], score=score)
    assert source.scale == scale


@pytest.mark.parametrize("name", FORMAT_ROWS)
def test_parquet_reads_as_jsonl_does(name: str, tmp_path: Path, no_sockets: list[str]) -> None:
    """Finds: Arrow's struct columns (filled up with None) read differently from JSON objects."""
    from datasets import Dataset

    if name == "scored-list":  # its scores have three types in one column; Arrow holds only one
        rows = [{"prompt": "q", "responses": [{"text": "a", "score": 1.0}, {"text": "b", "score": 2.0}]}]
    else:
        rows = FORMAT_ROWS[name][0]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    from_jsonl = [row for row in read_one(tmp_path, *rows)[1] if isinstance(row, Scored)]
    for streaming in (False, True):
        source = open_source(SourceSpec(str(tmp_path / "train.parquet"), streaming=streaming))
        assert source.format == name
        assert list(source) == from_jsonl


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}, ["Sky?"], ("Blue.", "Green.")),
        (
            {"prompt": "Sky?", "chosen": [says("Blue.")], "rejected": [says("No.")]},
            ["Sky?"],
            ("Blue.", "No."),
        ),
        # implicit text prompts end at a word, not inside "bl|ue", "bl|ack"
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            ["The sky is"],
            (" blue.", " black."),
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Sky?\n\nAssistant: Blue.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Sky?\n\nAssistant: Black.",
            },
            ["Hi", "Yo", "Sky?"],
            ("Blue.", "Black."),
        ),
        # prompt given and said again by both sides
        (
            {
                "prompt": [user("Sky?")],
                "chosen": [user("Sky?"), says("Blue.")],
                "rejected": [user("Sky?"), says("Green.")],
            },
            ["Sky?"],
            ("Blue.", "Green."),
        ),
        # a tool call and its result, the same on both sides, belong to the prompt
        (
            {
                "prompt": [user("Sky?")],
                "chosen": [
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
                    {"role": "tool", "content": "blue", "name": "look"},
                    says("Blue."),
                ],
                "rejected": [
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
                    {"role": "tool", "content": "blue", "name": "look"},
                    says("Green."),
                ],
            },
            ["Sky?", "", "blue"],
            ("Blue.", "Green."),
        ),
        ({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}, ["S", "Q"], ("A", "B")),
        (
            {
                "prompt": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            ["Q"],
            ("A", "B"),
        ),
    ],
)
def test_shapes_of_a_pair(
    row: dict[str, Any], prompt: list[str], responses: tuple[str, str], tmp_path: Path
) -> None:
    """Finds: a prompt that loses a turn, or keeps part of the response."""
    _, got = read_one(tmp_path, row)
    assert isinstance(got[0], Scored), got
    assert [m.content for m in got[0].prompt] == prompt
    assert got[0].responses == responses


def test_a_prompt_that_only_mentions_human_is_text(tmp_path: Path) -> None:
    """Finds: prose cut into turns because it begins with "Human:"."""
    text = "Human: a history of the word, from Latin humanus."
    _, got = read_one(tmp_path, pair(prompt=text))
    assert isinstance(got[0], Scored)
    assert [m.as_dict() for m in got[0].prompt] == [user(text)]


def test_a_second_text_of_a_response_is_no_score_even_if_it_spells_a_number(tmp_path: Path) -> None:
    """Finds: the final answer of a worked one among the scores; a score by such a name that is lost."""
    first = {"response": "Six times seven is 42.", "answer": "42", "completion": 4, "score": 8}
    second = {"response": "It is 41.", "answer": "41", "completion": 1, "score": 2}
    file = write(tmp_path / "worked.jsonl", [{"prompt": "q", "responses": [first, second]}])
    (example,), _ = read_source(SourceSpec(str(file)))
    assert example.attributes == {"completion": (4.0, 1.0)}


def test_completion_rated_na_is_left_out_and_counted(tmp_path: Path) -> None:
    """Finds: an unrated completion trained on, or dropped without a word; an N/A pair kept."""
    good, better = completion("a", 4.0, "2", "3", "4", "1"), completion("b", 8.0, "5", "5", "5", "5")
    unrated = completion("c", 10.0, "5", "N/A", "5", "5")
    file = write(
        tmp_path / "uf.jsonl",
        [
            {"instruction": "q", "completions": [good, unrated, better]},
            {"instruction": "r", "completions": [good, unrated]},
        ],
    )
    examples, counts = read_source(SourceSpec(str(file)))
    assert [e.responses for e in examples] == [("a", "b")]
    assert counts.kept == 1
    assert counts.dropped == {"one response left out: a rating is N/A": 1, "a rating is N/A": 1}
    assert counts.first["a rating is N/A"] == ["uf.jsonl:2"]


def test_score_is_selectable(tmp_path: Path) -> None:
    """Finds: --score accepted but ignored."""
    rows = FORMAT_ROWS["helpsteer2"][0]
    _, got = read_one(tmp_path, *rows, score="correctness")
    assert isinstance(got[0], Scored)
    assert got[0].scores == (4.0, 0.0)
    _, got = read_one(tmp_path, *FORMAT_ROWS["seed"][0], score="avg_fine_score")
    assert isinstance(got[0], Scored)
    assert got[0].scores == (3.5, 2.5)
    with pytest.raises(UsageError, match=r"--score 'corectness' is not in the data, did you mean 'correctness'"):
        read_one(tmp_path, *rows, score="corectness")


def test_lone_helpsteer_row_is_dropped(tmp_path: Path) -> None:
    """Finds: rows of different prompts paired with each other."""
    rows = [
        helpsteer(p, r, 1, 1, 1, 1, 1)
        for p, r in (("p", "a"), ("p", "b"), ("q", "c"), ("r", "d"), ("r", "e"))
    ]
    _, got = read_one(tmp_path, *rows)
    assert [row.responses if isinstance(row, Scored) else row for row in got] == [
        ("a", "b"), Dropped("fewer than two responses", "rows.jsonl:3"), ("d", "e"),
    ]  # fmt: skip


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["", "text", "N/A", "4"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "score", "annotations", "Rating"]), inner
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", FORMAT_ROWS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_junk_is_dropped_and_never_crashes(name: str, data: st.DataObject) -> None:
    """Finds: a traceback where a value anywhere in a row has a type its format did not think of."""
    row = {**FORMAT_ROWS[name][0][0]}
    if "instruction" in row:
        row["prompt"] = row.pop("instruction")
    if name == "helpsteer2":
        row["rows"] = [dict(item) for item in FORMAT_ROWS[name][0]]
    place: Any = row
    key = data.draw(st.sampled_from(sorted(row.keys() - {"rows"})))
    if name == "helpsteer2" and data.draw(st.booleans()):
        place, key = row["rows"][1], data.draw(st.sampled_from(sorted(row["rows"][1])))
    while isinstance(place[key], list | dict) and place[key] and data.draw(st.booleans()):
        place[key] = place[key].copy()
        place = place[key]
        key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
    place[key] = data.draw(JUNK)
    try:
        draft = FORMATS[name].read(row, frozenset(row))
        example, _ = checked(draft, row, score=draft.score, taken=set())
    except Unusable as unusable:
        assert unusable.reason
    else:
        assert len(example.responses) >= 2


# --- drops -----------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(rejected="good 0 \n"), "chosen and rejected are the same text"),
        (
            pair(chosen=[user("q0"), says("x")], rejected=[user("q0"), says("x")]),
            "chosen and rejected are the same text",
        ),
        (
            pair(chosen=[user("a"), says("x")], rejected=[user("b"), says("y")]),
            "chosen and rejected answer different prompts",
        ),
        (
            pair(chosen=[user("a"), says("x")], rejected=[user("a"), says("y")]),
            "prompt column and messages disagree",
        ),
        (pair(chosen=""), "empty response"),
        (pair(rejected="  \n"), "empty response"),
        (pair(chosen=None), "empty response"),
        (pair(prompt=" "), "empty prompt"),
        (pair(prompt=None), "empty prompt"),
        (pair(prompt=[user("a"), says("b")]), "prompt ends with an assistant turn"),
        (pair(score_rejected=None), "missing score on one side"),
        (pair(score_rejected=None, score_chosen=None), "missing score"),
        (pair(score_chosen="high"), "score is not a number"),
        (pair(score_chosen=True), "score is not a number"),
        (pair(score_chosen=[9]), "score is not a number"),
        (pair(score_chosen=NAN), "score is not finite"),
        (pair(score_rejected=INF), "score is not finite"),
        (pair(score_rejected="nan"), "score is not finite"),
        (pair(chosen=3), "prompt is neither text nor messages"),
        (pair(chosen=[says("a"), user("b"), says("c")]), "response is more than one message"),
        (pair(chosen=[user("a")]), "response is not the assistant's"),
        (pair(chosen="\ud800"), "text is not valid Unicode (half of a surrogate pair)"),
        (pair(tools="{"), "tools are not JSON"),
        ([1, 2], "row is not an object"),
        ({"prompt": "q", "chosen": "a"}, "missing column: rejected"),
    ],
)
def test_unusable_row_is_dropped_with_reason_and_place(row: Any, reason: str, tmp_path: Path) -> None:
    """Finds: a row that cannot teach anything trained on, or lost without a count."""
    lines = [json.dumps(r) for r in (pair(1), row, pair(2))]  # ASCII: a lone surrogate is no UTF-8
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    got = list(open_source(SourceSpec(str(file))))
    assert isinstance(got[0], Scored) and isinstance(got[2], Scored)
    assert isinstance(got[1], Dropped)
    assert (got[1].reason, got[1].where) == (reason, "rows.jsonl:2")
    with pytest.raises(ScoreError if "score" in reason else DataError, match=r"rows\.jsonl:2: "):
        read_source(SourceSpec(str(file)), strict=True)


def test_strict_lists_the_first_ten(tmp_path: Path) -> None:
    """Finds: strict that stops at the first problem, or floods the screen."""
    file = write(tmp_path / "rows.jsonl", [pair(n, chosen="" if n < 13 else "x") for n in range(20)])
    with pytest.raises(DataError) as error:
        read_source(SourceSpec(str(file)), strict=True)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("13 rows cannot be used")
    assert lines[1].strip() == "rows.jsonl:1: empty response"
    assert len(lines) == 12 and lines[-1].strip() == "… and 3 more"


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    """Finds: an empty training set passed on."""
    file = write(tmp_path / "rows.jsonl", [pair(n, chosen="") for n in range(3)])
    with pytest.raises(DataError, match="no row of it can be used\n  dropped 3: empty response"):
        read_source(SourceSpec(str(file)))


def test_one_bad_response_of_a_list_does_not_take_the_list(tmp_path: Path) -> None:
    """Finds: a whole list lost for one empty or repeated text; a repeated text kept."""
    responses = [{"text": t, "score": s} for t, s in (("a", 1), ("", 2), ("a", 3), ("b", 4), ("c", "?"))]
    _, got = read_one(tmp_path, {"prompt": "q", "responses": responses})
    assert [row.reason for row in got if isinstance(row, Dropped)] == [
        "one response left out: empty response",
        "one response left out: the same text twice",
        "one response left out: score is not a number",
    ]
    assert isinstance(got[-1], Scored)
    assert (got[-1].responses, got[-1].scores) == (("a", "b"), (1.0, 4.0))


def test_scores_that_begin_late_are_not_ignored(tmp_path: Path) -> None:
    """Finds: scored rows trained on as unscored ones because the first hundred had no scores."""
    plain = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(100)]
    source, got = read_one(tmp_path, *plain, pair(100))
    assert any("unscored" in line for line in source.said)
    assert isinstance(got[-1], Dropped) and "scored, though" in got[-1].reason


# --- columns and formats by hand -------------------------------------------------------------------


def test_columns_are_renamed(tmp_path: Path) -> None:
    """Finds: --columns accepted but ignored."""
    row = {"ask": "q", "best": "a", "worst": "b", "x": 3, "y": 1, "topic": "sea", "prompt": "not this"}
    columns = parse_columns(
        "prompt=ask, chosen=best,rejected=worst,score_chosen=x,score_rejected=y,group=topic"
    )
    source, got = read_one(tmp_path, row, columns=columns)
    assert isinstance(got[0], Scored)
    assert (got[0].prompt[0].content, got[0].responses, got[0].scores) == ("q", ("a", "b"), (3.0, 1.0))
    assert got[0].extras == {"group": "sea"}
    assert "prompt is read from the column 'ask'" in source.said


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            {"columns": {"promt": "prompt"}},
            UsageError,
            "'promt' is not a column of ours, did you mean 'prompt'",
        ),
        ({"columns": {"prompt": "promt"}}, UsageError, "'promt' is not in the data, did you mean 'prompt'"),
        ({"format": "nectr"}, UsageError, "unknown data format 'nectr'; did you mean 'nectar'"),
        (
            {"format": "nectar"},
            DataError,
            "missing: answers. The data have: chosen, prompt, rejected, score_chosen",
        ),
        ({"revision": "main"}, UsageError, "--data-revision is for data sets of the hub"),
        ({"split": "test"}, DataError, "it has no 'test'"),
    ],
)
def test_wrong_options_say_the_right_ones(
    spec: dict[str, Any], error: type[MlxprefError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        read_one(tmp_path, pair(), **spec)
    assert message in str(caught.value)


def test_missing_column_shows_both_sides_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_one(tmp_path, {"prompt": "q", "chosen": "a", "worse": "b"})
    text = str(caught.value)
    assert (
        "nearest is 'preference', which needs the columns prompt, chosen, rejected; missing: rejected" in text
    )
    assert "The data have: chosen, prompt, worse" in text and "--columns rejected=NAME" in text


def test_unknown_columns_list_the_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no known format fits the columns a, b\. Known: .*preference \("):
        read_one(tmp_path, {"a": 1, "b": 2})


def test_relabelled_rows_are_refused(tmp_path: Path) -> None:
    """Finds: goals written a second time into rows that have one."""
    with pytest.raises(DataError, match="relabelled already"):
        read_one(tmp_path, pair(goal=9, half="chosen"))


@pytest.mark.parametrize("wrong", [{"weight": 0}, {"weight": -1.0}, {"weight": NAN}, {"limit": 0}])
def test_spec_refuses_what_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a positive number"):
        SourceSpec("x.jsonl", **wrong)


# --- files -----------------------------------------------------------------------------------------


def contents(path: Path, **spec: Any) -> list[str]:
    """Chosen texts, in order."""
    return [row.responses[0] for row in open_source(SourceSpec(str(path), **spec)) if isinstance(row, Scored)]


def test_kinds_of_files_hold_the_same(tmp_path: Path) -> None:
    """Finds: a reader that changes text: "N/A" taken for missing, line breaks, quotes, separators."""
    import csv

    texts = ["plain", "N/A", 'two\nlines, "quoted"', "\u2028 inside\u0085 and \u2029", "None", "é😀\r\nx"]
    rows = [pair(n, chosen=text) for n, text in enumerate(texts)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "crlf.jsonl").write_bytes(
        (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n") + b"\r\n"
    )
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": rows}))
    write(tmp_path / "lines.json", rows)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name in (
        "a.jsonl",
        "a.jsonl.gz",
        "bom.jsonl",
        "crlf.jsonl",
        "a.json",
        "data.json",
        "lines.json",
        "a.csv",
    ):
        assert contents(tmp_path / name) == texts, name


def test_long_csv_cell(tmp_path: Path) -> None:
    """Finds: the csv module's limit of 128 kB a cell."""
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq," + "a" * 200_000 + ",b\n")
    assert len(contents(tmp_path / "a.csv")[0]) == 200_000


def broken(kind: str) -> bytes:
    lines = [json.dumps(pair(n)).encode() for n in range(9)]
    if kind == "json":
        lines[6] = lines[6][:-9]
    if kind == "utf8":
        lines[6] = lines[6].replace(b"good", b"g\xffd")
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", broken("json"), r"a\.jsonl:7: broken JSON"),
        ("a.jsonl", broken("utf8"), r"a\.jsonl:7: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(broken("json")), r"a\.jsonl\.gz:7: broken JSON"),
        ("a.jsonl.gz", gzip.compress(broken("")) [:-20], r"a\.jsonl\.gz: a damaged gzip file"),
        ("a.jsonl.gz", b"no gzip at all", r"a\.jsonl\.gz: a damaged gzip file"),
        ("a.jsonl", b"", r"a\.jsonl: empty"),
        ("a.jsonl", b"\n \n\n", r"a\.jsonl: empty"),
        ("a.json", b"", r"a\.json: empty"),
        ("a.json", b"[]", r"a\.json: empty"),
        ("a.json", b'[{"prompt": 1},\n{"x" 2}]', r"a\.json:2: broken JSON"),
        ("a.json", b'{"prompt": [\n', r"a\.json:2: broken JSON"),
        ("a.json", b"3", r"holds no array"),
        ("a.jsonl", b"3\n4\n", r"rows must be objects"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", r"a\.csv:3: 4 cells under 3 columns"),
        ("a.csv", b'prompt,chosen,rejected\na,"b,c\n', r"a\.csv:2: broken CSV"),
        ("a.csv", b"prompt,chosen,rejected\n", r"a\.csv: empty"),
        ("a.csv", b"", r"a\.csv: empty"),
        ("a.csv", b"prompt,chosen,rejected\na,\xff,c\n", r"a\.csv:\d: not UTF-8"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: cannot be opened"),
        ("a.parquet", b"", r"a\.parquet"),
        ("a.txt", b"hello", r"cannot tell the kind of file"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """Finds: a fault told without its file and line, or not at all."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(SourceSpec(str(tmp_path / name)))


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [pair()])
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file or folder; did you mean .*train\.jsonl"):
        open_source(SourceSpec(str(tmp_path / "trian.jsonl")))


# --- folders and splits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "asked", "found"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], None, "train"),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "valid", "validation"),
        (["train.jsonl", "eval.jsonl"], "valid", "eval"),
        (["train_prefs.jsonl", "test_prefs.jsonl", "train_sft.jsonl"], None, "train_prefs"),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "test", "test_prefs"),
        (["train_prefs.jsonl", "train_sft.jsonl"], "train_sft", "train_sft"),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], None, "train"),
        (["mine.jsonl"], None, "train"),
        (["eval.jsonl"], None, "eval"),
    ],
)
def test_folder_finds_the_split(files: list[str], asked: str | None, found: str, tmp_path: Path) -> None:
    """Finds: validation rows trained on; a shard forgotten."""
    (tmp_path / "data").mkdir()
    for name in files:
        write(tmp_path / name, [pair(chosen=f"from {name}")])
    source = open_source(SourceSpec(str(tmp_path), split=asked))
    stem = found if files != ["mine.jsonl"] else "mine"
    wanted = [f"from {name}" for name in files if Path(name).name.startswith((stem + ".", stem + "-"))]
    assert source.split == found
    assert contents(tmp_path, split=asked) == wanted


def test_folder_without_an_answer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        open_source(SourceSpec(str(tmp_path)))
    write(tmp_path / "train.jsonl", [pair()])
    with pytest.raises(DataError, match=r"no split 'test'; there are train"):
        open_source(SourceSpec(str(tmp_path), split="test"))
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(DataError, match="several files hold the split 'train'"):
        open_source(SourceSpec(str(tmp_path)))


def test_find_split_keeps_kinds_apart() -> None:
    assert find_split("valid", ["train", "test"]) is None
    assert find_split("valid", ["dev", "validation"]) == "validation"
    assert find_split("train_gen", ["train", "train_gen"]) == "train_gen"


def test_saved_dataset_is_read(tmp_path: Path, no_sockets: list[str]) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([pair(n) for n in range(3)])
    DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "saved") == ["good 0", "good 1", "good 2"]
    assert contents(tmp_path / "saved", split="test") == ["good 2"]
    rows.save_to_disk(tmp_path / "one")
    assert contents(tmp_path / "one") == ["good 0", "good 1", "good 2"]


def test_streaming_of_what_does_not_stream_is_refused(tmp_path: Path) -> None:
    import datasets

    write(tmp_path / "train.jsonl", [pair()])
    datasets.Dataset.from_list([pair()]).save_to_disk(str(tmp_path / "saved"))
    for path, kind in ((tmp_path / "train.jsonl", "a .jsonl file"), (tmp_path / "saved", "a saved data set")):
        with pytest.raises(UsageError, match=f"is {kind}: --streaming is for"):
            open_source(SourceSpec(str(path), streaming=True))


@pytest.mark.parametrize("path", ["openbmb/UltraFeedback", "no/such-folder", "nothing-here"])
def test_hub_without_network_tells_the_remedy(path: str, no_sockets: list[str]) -> None:
    """Finds: a traceback, or a hang, where the user needs to know what to download."""
    with pytest.raises(DataError) as caught:
        open_source(SourceSpec(path, revision="main"))
    text = str(caught.value)
    assert f"hf download --repo-type dataset {path}" in text and "no such file or folder here" in text


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_dataset`` tries again for half a minute, and logs each try."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def unreached(*_: Any, **__: Any) -> None:
        raise HTTPError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreached)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("tried again"))
    with pytest.raises(DataError, match="the hub cannot be reached"):
        open_source(SourceSpec("owner/name"))


def test_hub_dataset_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: config, split or revision that never reach the hub; row numbers off by one."""
    import datasets

    asked: dict[str, Any] = {}
    rows = datasets.Dataset.from_list([pair(0), pair(1, chosen="")])

    def load(path: str, **options: Any) -> Any:
        asked.update(path=path, **options)
        return datasets.DatasetDict({"train_sft": rows, "train_prefs": rows, "test_prefs": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source(SourceSpec("owner/name", config="c", revision="r", streaming=True))
    assert asked == {"path": "owner/name", "name": "c", "revision": "r", "streaming": True}
    assert (source.split, source.splits) == ("train_prefs", ("train_sft", "train_prefs", "test_prefs"))
    assert list(source)[1] == Dropped("empty response", "name:2")


# --- ids, limits, several sources ------------------------------------------------------------------


def test_ids_are_unique_and_stable(tmp_path: Path) -> None:
    """Finds: two examples that batching or splitting would take for one; ids that change by pass."""
    rows = [pair(0, id="a"), pair(1, id="a"), pair(2), pair(2), pair(2), pair(3, id=7)]
    one = write(tmp_path / "one.jsonl", rows)
    two = write(tmp_path / "two.jsonl", [pair(4, id="a"), pair(3, id=7)])
    source = open_source(SourceSpec(str(one)))
    first = [row.example_id for row in source if isinstance(row, Scored)]
    assert first == [row.example_id for row in source if isinstance(row, Scored)]
    assert first[0] == "a" and first[5] == "7" and len(set(first)) == 6
    assert first[3] == f"{first[2]}#2" and first[4] == f"{first[2]}#3"
    together, _ = read_source([SourceSpec(str(one)), SourceSpec(str(two))])
    ids = [example.example_id for example in together]
    assert ids[:6] == first and len(set(ids)) == 8


def test_limit_counts_examples_read(tmp_path: Path) -> None:
    rows = [pair(n, chosen="" if n == 1 else f"good {n}") for n in range(6)]
    _, got = read_one(tmp_path, *rows, limit=3)
    assert [type(row) for row in got] == [Scored, Dropped, Scored]


def test_weights_repeat_and_thin_out(tmp_path: Path) -> None:
    """Finds: a weight that does nothing, that loses rows, or whose choice changes between runs."""
    a = write(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    b = write(tmp_path / "b.jsonl", [pair(n) for n in range(10, 20)])
    specs = [SourceSpec(str(a), weight=0.4), SourceSpec(str(b), weight=2.5)]
    examples, counts = read_source(specs, seed=3)
    texts = [example.responses[0] for example in examples]
    from_a = [text for text in texts if int(text.split()[1]) < 10]
    from_b = [text for text in texts if int(text.split()[1]) >= 10]
    assert len(from_a) == len(set(from_a)) == 4 and from_a == sorted(from_a)
    assert len(from_b) == 25 and {from_b.count(text) for text in from_b} == {2, 3}
    assert len({example.example_id for example in examples}) == 29
    assert counts.kept == 29 and sum(counts.dropped.values()) == 6
    again = read_source(specs, seed=3)[0]
    assert again == examples
    assert read_source(specs, seed=4)[0] != examples


def test_unit_weight_changes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    examples, counts = read_source(SourceSpec(str(file)), seed=5)
    assert examples == list(open_source(SourceSpec(str(file))))
    assert counts.dropped == {} and counts.kept == 10


def test_bad_columns_parse() -> None:
    with pytest.raises(UsageError, match="ours=theirs"):
        parse_columns("prompt:question")


# --- real data -------------------------------------------------------------------------------------


def test_ultrafeedback_drops_what_is_known_to_be_bad(assets: Path, no_sockets: list[str]) -> None:
    """The folder's README: 1,000 + 200 pairs, 4 + 1 identical, 2 with an empty side, ties 11-12 %."""
    folder = assets / "data" / "ultrafeedback"
    train, counts = read_source(SourceSpec(str(folder)))
    assert counts.dropped == {"chosen and rejected are the same text": 4, "empty response": 2}
    assert counts.kept == len(train) == 994
    ties = sum(e.scores is not None and e.scores[0] == e.scores[1] for e in train)
    assert 0.10 < ties / len(train) < 0.12
    assert train[0].example_id == "uf-27808" and train[0].scores == (9.0, 8.0)
    raw = [json.loads(line) for line in (folder / "train.jsonl").read_bytes().split(b"\n") if line]
    by_id = {row["id"]: row for row in raw}
    for example in train:
        row = by_id[example.example_id]
        assert example.responses == (row["chosen"], row["rejected"])
        assert [m.as_dict() for m in example.prompt] == [user(row["prompt"])]
    valid, counts = read_source(SourceSpec(str(folder), split="valid"))
    assert counts.dropped == {"chosen and rejected are the same text": 1} and len(valid) == 199


def test_vicuna_lists(assets: Path, no_sockets: list[str]) -> None:
    examples, counts = read_source(SourceSpec(str(assets / "data" / "vicuna_eval")))
    assert (len(examples), counts.dropped) == (80, {})
    assert {len(e.responses) for e in examples} == {4}
    assert all(e.scores is not None and all(1 <= s <= 5 for s in e.scores) for e in examples)
    assert examples[0].scores == (5.0, 5.0, 5.0, 5.0)
