"""Asking: the words of training, the goals that were meant, and a command that says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest
from click.testing import CliRunner
from fakes import Room

from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, Recipe
from mlxpref.data.relabel import relabel, unconditioned
from mlxpref.data.tokenization import tokenize
from mlxpref.errors import AdapterError, DataError, MlxprefError, UsageError
from mlxpref.generate import (
    adapter_recipe,
    ask,
    ask_all,
    generate,
    line_questions,
    parse_goal,
    read_questions,
    text_question,
    with_system,
)
from mlxpref.records import Dropped, Message, Scored

QUESTION = text_question("Tell me about owls.")
ATTRIBUTES = Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("help", "truth"))


# --- the words of training ---


@pytest.mark.parametrize("carrier", ["system", "first_user"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_asking_uses_the_ids_of_training(chat_tokenizer: Any, carrier: Any, system: str | None) -> None:
    """Finds: a goal formatted, placed or encoded otherwise than when the policy learnt to read it."""
    question = QUESTION if system is None else with_system(QUESTION, system)
    recipe = Recipe(carrier=carrier)
    example = Scored(question.prompt, ("Owls are birds.", "No."), (8.0, 3.5), "owls")
    rows = relabel(example, recipe)
    assert not isinstance(rows, Dropped)
    for row in (*rows, unconditioned(example)):
        trained = tokenize(row, chat_tokenizer)
        assert not isinstance(trained, Dropped)
        asked = ask(question, row.goal, recipe, chat_tokenizer)
        assert list(asked.ids) == trained.prompt_ids.tolist()
        assert asked.prompt == row.prompt


def test_without_a_template_too(plain_tokenizer: Any) -> None:
    example = Scored(QUESTION.prompt, ("Owls are birds.", "No."), (8.0, 3.5), "owls")
    rows = relabel(example, Recipe())
    assert not isinstance(rows, Dropped)
    trained = tokenize(rows[0], plain_tokenizer)
    assert not isinstance(trained, Dropped)
    assert list(ask(QUESTION, 8.0, Recipe(), plain_tokenizer).ids) == trained.prompt_ids.tolist()


def test_nobody_says_a_goal(chat_tokenizer: Any) -> None:
    """Then it is the recipe's highest; without a recipe there is none."""
    (asked,) = ask_all([QUESTION], None, Recipe(goal_range=(0, 4)), chat_tokenizer)
    assert asked.goal == 4 and "Overall score: 4." in asked.prompt[0].content
    (asked,) = ask_all([QUESTION], None, None, chat_tokenizer)
    assert asked.goal is None and asked.prompt == QUESTION.prompt


def test_every_prompt_at_every_goal(chat_tokenizer: Any) -> None:
    questions = line_questions(["One?\n", "\n", "Two?\u2028Still two?\n"])
    asked = ask_all(questions, [2, None], Recipe(), chat_tokenizer)
    assert [(one.index, one.goal) for one in asked] == [(0, 2), (0, None), (1, 2), (1, None)]
    assert asked[3].prompt == (Message("user", "Two?\u2028Still two?"),)


def test_a_goal_needs_a_recipe(chat_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="recipe"):
        ask(QUESTION, 8, None, chat_tokenizer)
    with pytest.raises(UsageError, match="off this recipe's scale"):
        ask(QUESTION, 11, Recipe(), chat_tokenizer)


# --- batches ---


def test_answers_stand_in_order(chat_tokenizer: Any) -> None:
    room = Room(chat_tokenizer)
    asked = ask_all(line_questions(f"Question {i}?" for i in range(5)), [1, 10], Recipe(), chat_tokenizer)
    seen: list[tuple[int, int]] = []
    answers = generate(
        asked, room, None, batch_size=4, temperature=0.7, seed=3, on_progress=lambda *at: seen.append(at)
    )
    assert [answer.asked for answer in answers] == asked
    for answer in answers:
        assert f"Question {answer.asked.index}?" in answer.text
        assert f"Overall score: {answer.asked.goal}." in answer.text
    assert [call["n"] for call in room.calls] == [4, 4, 2]
    assert len({call["seed"] for call in room.calls}) == 3  # no batch repeats another's chances
    assert {call["temperature"] for call in room.calls} == {0.7}
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"batch_size": 0}])
def test_numbers_out_of_range(chat_tokenizer: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        generate([ask(QUESTION, None, None, chat_tokenizer)], Room(chat_tokenizer), None, **wrong)


# --- goals and prompts as they are written ---


@pytest.mark.parametrize(
    ("text", "recipe", "goal"),
    [
        ("8", Recipe(), 8.0),
        ("7.5", Recipe(), 7.5),
        ("top", Recipe(), 10.0),
        ("none", Recipe(), None),
        ("none", None, None),
        ("truth=9, help=3", ATTRIBUTES, {"help": 3.0, "truth": 9.0}),
        ("6", ATTRIBUTES, {"help": 6.0, "truth": 6.0}),
        ("top", ATTRIBUTES, {"help": 10.0, "truth": 10.0}),
    ],
)
def test_goals(text: str, recipe: Recipe | None, goal: Any) -> None:
    assert parse_goal(text, recipe) == goal


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("8", None), ("high", Recipe()), ("11", Recipe()), ("help=3", Recipe()), ("help=3", ATTRIBUTES),
        ("help=3,thruth=4", ATTRIBUTES), ("", Recipe()), ("nan", Recipe()),
    ],
)  # fmt: skip
def test_what_is_no_goal(text: str, recipe: Recipe | None) -> None:
    with pytest.raises(MlxprefError):
        parse_goal(text, recipe)


def test_prompt_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("One?\n\nTwo?\u2028Still two?\n", encoding="utf-8")
    assert [q.prompt[0].content for q in read_questions(text)] == ["One?", "Two?\u2028Still two?"]
    rows = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Three?"}]
    lines = [
        {"prompt": "One?"},
        {"prompt": turns},
        {"messages": [*turns, {"role": "assistant", "content": "an old answer"}]},
        "Two?",
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = read_questions(rows)
    assert [[m.content for m in q.prompt] for q in found] == [
        ["One?"], ["Be brief.", "Three?"], ["Be brief.", "Three?"], ["Two?"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "One?"}\n{"prompt": \n', "a.jsonl:2"),
        ("a.jsonl", '{"prompt": "One?"}\n{"question": "Two?"}\n', "a.jsonl:2.*question"),
        ("a.jsonl", '{"prompt": [{"role": "assistant", "content": "Hm"}]}\n', "a.jsonl:1.*empty"),
        ("a.jsonl", "", "empty"),
        ("a.txt", " \n\n", "empty"),
        ("a.docx", "One?", "kind of file"),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_questions(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl"])
def test_a_missing_prompt_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="nowhere"):
        read_questions(tmp_path / name)


def test_tools_reach_the_template(chat_tokenizer: Any, tmp_path: Path) -> None:
    """Finds: a column that is read and then does nothing."""
    import copy

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + tokenizer.chat_template
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "One?", "tools": [{"name": "search"}]}) + "\n")
    (question,) = read_questions(file)
    assert "[search]" in tokenizer.decode(ask(question, None, None, tokenizer).ids)


# --- what travels with the adapter ---


def write_adapter(folder: Path, stored: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    return folder


def test_the_recipe_travels(tmp_path: Path) -> None:
    recipe = Recipe(carrier="first_user", goal_range=(0, 4), template="Quality {score} of {high}.")
    assert adapter_recipe(write_adapter(tmp_path, {"mlxpref": {"recipe": recipe.as_dict()}})) == recipe
    assert adapter_recipe(write_adapter(tmp_path, {"mlxpref": {"recipe": None}})) is None
    assert adapter_recipe(write_adapter(tmp_path, {"fine_tune_type": "lora"})) is None


def test_a_damaged_adapter_config(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        adapter_recipe(tmp_path)
    write_adapter(tmp_path, {"mlxpref": {"recipe": {"version": 99}}})
    with pytest.raises(AdapterError, match="99"):
        adapter_recipe(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        adapter_recipe(tmp_path)


# --- the command ---


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, chat_tokenizer: Any) -> Room:
    from mlxpref import backends

    policy = fakes.FakePolicy(fakes.table(1), fakes.table(2), path=str(tiny_model_dir))
    fake: Any = Room(chat_tokenizer)
    fake.load_adapter = fake.load_policy = lambda path, **options: policy
    monkeypatch.setattr(backends, "get", lambda name: fake)
    return fake


def run(*arguments: Any, stdin: str | None = None) -> Any:
    from mlxpref.cli import main

    return CliRunner().invoke(main, ["generate", *map(str, arguments)], input=stdin, catch_exceptions=False)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", {"mlxpref": {"recipe": Recipe().as_dict()}})


def test_one_prompt_prints_its_answer_alone(room: Room, adapter: Path, no_sockets: Any) -> None:
    ran = run("Why?", "--adapter-path", adapter)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith("adapter read: <|im_start|>system\nYou are an assistant")
    assert "Overall score: 10." in ran.stdout and "---" not in ran.stdout


def test_several_goals_and_the_base(room: Room, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    ran = run("Why?", "--adapter-path", adapter, "--goal", "2", "--goal", "none", "--compare-base", "--json", file)
    assert ran.exit_code == 0, ran.output
    headings = [line for line in ran.stdout.split("\n") if line.startswith("---")]
    assert headings == ["--- goal 2", "--- goal 2, base model", "--- no goal", "--- no goal, base model"]
    stored = json.loads(file.read_text())
    assert [(one["goal"], one["adapter"]) for one in stored] == [
        (2, True),
        (2, False),
        (None, True),
        (None, False),
    ]
    assert "Overall score: 2." in stored[1]["prompt"][0]["content"]
    assert stored[1]["text"].startswith("base read")


def test_one_number_for_several_attributes_is_said(room: Room, tmp_path: Path) -> None:
    """Finds a goal that is silently asked of every attribute; what was spelt out needs no note."""
    adapter = write_adapter(tmp_path / "two", {"mlxpref": {"recipe": ATTRIBUTES.as_dict()}})
    ran = run("Why?", "--adapter-path", adapter, "--goal", "3")
    assert "asking for help=3, truth=3" in ran.stderr.splitlines(), ran.output
    assert "asking for" not in ran.stdout
    for spelt in ("help=3,truth=4", "top", "none"):
        ran = run("Why?", "--adapter-path", adapter, "--goal", spelt)
        assert ran.exit_code == 0 and "asking for" not in ran.stderr, ran.output


def test_one_number_for_one_score_needs_no_note(room: Room, adapter: Path) -> None:
    assert "asking for" not in run("Why?", "--adapter-path", adapter, "--goal", "3").stderr


def test_standard_input(room: Room, adapter: Path) -> None:
    whole = run("--adapter-path", adapter, stdin="One\n\ntwo\n")
    assert "user\nOne\n\ntwo<|im_end|>" in whole.stdout
    assert room.calls[-1]["n"] == 1
    lines = run("--file", "-", "--adapter-path", adapter, stdin="One\n\ntwo\n")
    assert lines.exit_code == 0 and room.calls[-1]["n"] == 2
    assert "=== One" in lines.stdout and "=== two" in lines.stdout


def test_a_model_alone_is_asked_without_goals(room: Room, tiny_model_dir: Path) -> None:
    ran = run("Why?", "--model", tiny_model_dir, "--show-prompt")
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.count("<|im_start|>user\nWhy?<|im_end|>") == 2  # as shown, and as read
    assert "score" not in ran.stdout


def test_another_adapters_recipe(room: Room, tiny_model_dir: Path, adapter: Path) -> None:
    ran = run("Why?", "--model", tiny_model_dir, "--recipe", adapter, "--goal", "3")
    assert "Overall score: 3." in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Why?"], "which policy"),
        (["", "--model", "m"], "empty"),
        (["Why?", "--file", "x.txt", "--model", "m"], "both"),
        (["Why?", "--model", "m", "--goal", "8"], "trained without goals"),
        (["Why?", "--model", "m", "--no-adapter"], "no adapter to leave out"),
        (["Why?", "--model", "m", "--compare-base"], "no adapter to leave out"),
        (["Why?", "--model", "m", "--temperature", "-1"], "temperature"),
        (["Why?", "--adapter-path", "a", "--model-revision", "main"], "--model-revision is for"),
    ],
)
def test_what_cannot_be_is_said(room: Room, arguments: list[str], words: str) -> None:
    ran = run(*arguments)
    assert ran.exit_code in (1, 2) and words in ran.output, ran.output
    assert not room.calls
