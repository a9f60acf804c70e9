"""Answers to standard benchmarks: in the files their judges read, each turn upon the one before, at the goal asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_winrate_command import Room, room, write_adapter  # noqa: F401 - the fixture

from mlxpref.errors import DataError, UsageError
from mlxpref.evaluate.outputs import BENCHMARKS, Writer, answer, read_tasks

ALPACA = [{"dataset": "helpful_base", "instruction": "Why?", "output": "theirs", "generator": "other"}]
MT = [
    {"question_id": 81, "category": "writing", "turns": ["Write it.", "Shorter."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who won?"]},
]
ARENA = [{"question_id": "a1", "category": "arena-hard-v0.1", "cluster": "x", "turns": [{"content": "Code?"}]}]
ARENA_2 = [{"uid": "b2", "category": "hard_prompt", "prompt": "Code!"}]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return file


def test_a_later_turn_follows_the_models_own_answer(tmp_path: Path) -> None:
    """Finds turns asked alone, another question's answer before one, temperatures mixed up."""
    tasks = read_tasks(write_rows(tmp_path / "q.jsonl", MT), "mt-bench")
    asked: list[tuple[float, list[list[str]]]] = []

    def ask(prompts: Any, temperature: float) -> list[str]:
        asked.append((temperature, [[turn.content for turn in prompt] for prompt in prompts]))
        return [f"<{prompt[-1].content}>" for prompt in prompts]

    found = answer(tasks, ask, BENCHMARKS["mt-bench"].temperature_of)
    assert found == [["<Write it.>", "<Shorter.>"], ["<Who won?>"]]
    assert asked == [(0.0, [["Who won?"]]), (0.7, [["Write it."]]), (0.7, [["Write it.", "<Write it.>", "Shorter."]])]
    assert tasks[0].turns == ("Write it.", "Shorter.")


@pytest.mark.parametrize(
    ("kind", "rows", "wanted"),
    [
        ("alpaca-eval", ALPACA, [{"dataset": "helpful_base", "instruction": "Why?", "output": "a", "generator": "m"}]),
        (
            "mt-bench", MT[:1],
            [{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}], "tstamp": 5.0}],
        ),
        (
            "arena-hard", ARENA,
            [{"question_id": "a1", "model_id": "m",
              "choices": [{"index": 0, "turns": [{"content": "a", "token_len": 1}]}], "tstamp": 5.0}],
        ),
        (
            "arena-hard", ARENA_2,
            [{"uid": "b2", "model": "m", "messages": [{"role": "user", "content": "Code!"},
              {"role": "assistant", "content": {"answer": "a"}}], "tstamp": 5.0, "metadata": {"token_len": 1}}],
        ),
    ],
)  # fmt: skip
def test_files_are_as_the_judges_read_them(tmp_path: Path, kind: str, rows: Any, wanted: Any) -> None:
    """Witness: the layouts that the benchmarks' own code writes."""
    tasks = read_tasks(write_rows(tmp_path / "q.jsonl", rows), kind)
    text = BENCHMARKS[kind].write(tasks, [["a", "b"][: len(tasks[0].turns)]], Writer("m", 5.0, len))
    found = json.loads(text) if kind == "alpaca-eval" else [json.loads(line) for line in text.splitlines()]
    ids = [row.pop(key) for row in found for key in ("answer_id", "ans_id") if key in row]
    assert found == wanted and len(ids) == (kind != "alpaca-eval")


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("alpaca-eval", [{"prompt": "Why?"}], r"no question of alpaca-eval .*its rows have instruction"),
        ("mt-bench", ALPACA, "no question of mt-bench"),
        ("mt-bench", [{"question_id": 1, "turns": [" "]}], "an empty question"),
        ("mt-bench", [{"question_id": 1, "turns": []}], "an empty question"),
        ("mt-bench", [{"question_id": 1, "turns": "Hello"}], "turns is a list"),
        ("mt-bench", [{"question_id": 1, "turns": ["a"], "category": ["b"]}], "category a text"),
        ("arena-hard", ["text"], "no question of arena-hard"),
        ("arena-hard", [], "no question in it|empty"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, kind: str, rows: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_tasks(write_rows(tmp_path / "q.jsonl", rows), kind)


def test_other_benchmarks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="alpaca-eval, mt-bench, arena-hard"):
        read_tasks(tmp_path / "q.jsonl", "glue")


def run(*arguments: Any) -> Any:
    from mlxpref.cli import main

    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def test_the_command_asks_at_a_goal(room: Room, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    """The policy of this room says what it reads, so the goal stands in what it answers."""
    questions = write_rows(tmp_path / "q.json", ALPACA)
    for goal, wanted in (("3", "score: 3"), (None, "score: 10")):
        options = () if goal is None else ("--goal", goal)
        ran = run("outputs", "alpaca-eval", questions, "--adapter-path", "adapter", "--out", "ours.json", *options)
        assert ran.exit_code == 0, ran.output
        (row,) = json.loads(Path("ours.json").read_text())
        assert wanted in row["output"] and row["instruction"] == "Why?" and row["generator"] == "ours"
    assert "perhaps cut" not in ran.stderr and not list(tmp_path.glob("*.unfinished.json"))
    asked = ("outputs", "alpaca-eval", questions, "--adapter-path", "adapter", "--out", "s.json")
    assert "1 answer of 3 tokens or more" in run(*asked, "--max-tokens", "3").stderr
    idle = run(*asked, "--top-p", "0.5")
    assert idle.exit_code == 2 and "--top-p: at temperature 0" in idle.stderr
    ran = run("outputs", "mt-bench", questions, "--adapter-path", "adapter", "--out", "x.jsonl")
    assert ran.exit_code != 0 and "no question of mt-bench" in ran.stderr
    write_adapter(tmp_path / "plain", None)
    refused = run("outputs", "alpaca-eval", questions, "--adapter-path", "plain", "--goal", "3", "--out", "x.json")
    assert refused.exit_code == 2 and "without goals" in refused.stderr and not Path("x.json").exists()


def test_two_turns_carry_one_goal(room: Room, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    """Finds a goal stated again in the second turn, or lost there: the policy of this room says what it reads."""
    questions = write_rows(tmp_path / "q.jsonl", MT)
    ran = run("outputs", "mt-bench", questions, "--adapter-path", "adapter", "--goal", "4", "--out", "ours.jsonl",
              "--name", "ours-4")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    rows = [json.loads(line) for line in Path("ours.jsonl").read_text().splitlines()]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 1] and rows[0]["model_id"] == "ours-4"
    first, second = rows[0]["choices"][0]["turns"]
    assert first.count("score: 4.") == 1 and "Write it." in first
    assert second.count("score: 4.") == 1 + first.count("score: 4.")  # its own, and the answer that it follows
