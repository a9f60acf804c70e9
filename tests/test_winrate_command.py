"""``mlxpref winrate`` and ``mlxpref control``: whose responses are compared, who judges, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from click.testing import CliRunner
from fakes import Room

from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, Recipe
from mlxpref.data.tokenization import encode_prompt
from mlxpref.errors import DataError
from mlxpref.evaluate.model_judge import TEMPLATE, ModelJudge
from mlxpref.records import Message

SCORES = """
import re

def goal(prompts, responses):
    assert not any("Overall" in prompt[0].content for prompt in prompts)
    found = [re.search(r"score: (\\d+)\\.", text) for text in responses]
    return [float(one[1]) if one else 0.0 for one in found]

def honesty(prompts, responses):
    return [float(re.search(r"Truth: (\\d+)\\.", text)[1]) for text in responses]
"""


BY_GOAL = ("--prompts", "prompts.txt", "--scorer", "goal_scores:goal")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, chat_tokenizer: Any, tmp_path: Path) -> Room:
    """A machine room whose policies say what they read, and a scorer that reads the goal from it."""
    from mlxpref import backends

    policy = fakes.FakePolicy(fakes.table(1), fakes.table(2), path=str(tiny_model_dir))
    fake: Any = Room(chat_tokenizer)
    fake.loads = []
    fake.load_adapter = fake.load_policy = lambda path, **options: fake.loads.append(path) or policy
    fake.token_logps = fakes.token_logps
    monkeypatch.setattr(backends, "get", lambda name: fake)
    (tmp_path / "goal_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Why?\nWhat for?\nSince when?\n")
    write_adapter(tmp_path / "adapter", Recipe(), tiny_model_dir)
    return fake


def write_adapter(folder: Path, recipe: Recipe | None, model: Path | str = "nowhere") -> None:
    folder.mkdir()
    stored = {"recipe": None if recipe is None else recipe.as_dict()}
    (folder / "adapter_config.json").write_text(json.dumps({"model": str(model), "mlxpref": stored}))
    (folder / "adapters.safetensors").touch()


def run(*arguments: Any) -> Any:
    from mlxpref.cli import main

    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


# --- winrate ---


def test_goals_of_one_adapter_against_each_other(room: Room) -> None:
    """Finds sides mixed up, goals that are not asked for, prompts that a scorer sees with a goal in them."""
    ran = run("winrate", "adapter@9", "adapter@2", *BY_GOAL, "--json", "w.json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("w.json").read_text())
    assert (found["rate"], found["n"], found["prompts"], found["places"]) == (1.0, 3, 3, None)
    assert "score: 9." in found["comparisons"][0]["one"] and "score: 2." in found["comparisons"][0]["other"]
    assert "100.0%" in ran.stdout
    turned = run("winrate", "adapter@none", "adapter", *BY_GOAL)
    assert "0.0%, 0.0%, 100.0%" in turned.stdout


def test_files_of_responses_are_matched_to_their_prompts(room: Room, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([{"index": i, "text": "abc"[i]} for i in (2, 0, 1)]))
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"output": text}) + "\n" for text in "xyz"))
    ran = run("winrate", "one.json", "two.jsonl", *BY_GOAL, "--json", "w.json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("w.json").read_text())
    assert [(one["one"], one["other"]) for one in found["comparisons"]] == [("a", "x"), ("b", "y"), ("c", "z")]
    assert found["rate"] == 0.5 and found["ties"] == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}, {"text": "b"}], "1 of 3 prompts have no response"),
        ([{"text": "a"}, {"text": "b"}, {"answer": "c"}], "no response; a row has one of the columns text"),
        ([{"text": "a", "index": 7}], "prompt 7, and there are 3"),
        ([{"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": "d", "index": 0}], "prompt 0 has 2 of odd.json and 1"),
        (["a", "b", "c"], "a row is an object"),
        ([{"text": "Why?", "response": "a"}] * 3, "columns text, response"),
        ([{"text": "a"}, {"output": "b"}, {"text": "c"}], "columns text, output"),
        ([{"text": "a", "goal": 1}, {"text": "b", "goal": 2}, {"text": "c", "goal": 1}], "rows of goal 1, 2"),
        ([{"text": "a", "instruction": "Else?"}] * 3, "a response to another prompt: 'Else?', not 'Why?'"),
        ([{"text": "a", "prompt": "What? Why?"}] * 3, "another prompt"),
        ([{"text": "a", "prompt": [{"role": "user", "content": "So?"}, {"role": "user", "content": "Why?"}]}] * 3,
         "another prompt"),
        ([{"text": "a", "prompt": ["Why?"]}] * 3, "a message is not an object"),
        ([{"text": "a", "prompt": [{"role": "user"}]}] * 3, "odd.json"),
        ([{"text": "a"}, {"text": " "}, {"text": "c"}], "no response"),
    ],
)
def test_files_that_do_not_fit_are_refused(room: Room, tmp_path: Path, rows: Any, words: str) -> None:
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    (tmp_path / "even.jsonl").write_text('{"text": "x"}\n' * 3)
    ran = run("winrate", "odd.json", "even.jsonl", *BY_GOAL)
    assert ran.exit_code != 0 and words in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--scorer or --judge"),
        (["--scorer", "goal_scores:goal", "--judge", "m"], "one of them"),
        (["--judge", "m", "--tie", "1"], "--tie is for --scorer"),
        (["--scorer", "goal_scores:goal", "--samples", "2"], "temperature 0"),
        (["--scorer", "goal_scores:nothing"], "there is no nothing"),
        (["--scorer", "goal_scores:goal", "--tie", "-1"], "0 or more"),
        (["--scorer", "goal_scores:goal", "--tie", "nan"], "0 or more"),
        (["--judge", "m", "--judge-template", "prompts.txt"], "lacks {conversation}"),
        (["--scorer", "goal_scores:goal", "--top-p", "0.9"], "--top-p: at temperature 0"),
        (["--scorer", "goal_scores:goal", "--temperature", "-1"], "--temperature"),
        (["--scorer", "goal_scores:goal", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_options_that_contradict_are_refused_before_a_model_loads(room: Room, arguments: list[str], words: str) -> None:
    ran = run("winrate", "adapter", "adapter@2", "--prompts", "prompts.txt", *arguments)
    assert ran.exit_code != 0 and words in ran.stderr and not room.loads


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("adapter@99", "off this recipe's scale"),
        ("adapter@abc", "adapter@abc: not a number; write for example adapter@8"),
        ("nothere.json", "cannot be read"),
        ("./nothere", "no such folder"),
        ("moved", "moved-model"),
        ("empty", "no adapters.safetensors"),
        ("damaged", "not JSON"),
    ],
)
def test_a_side_that_is_not_there_is_refused_before_the_other_is_asked(
    room: Room, tmp_path: Path, other: str, words: str
) -> None:
    for name in ("moved", "empty", "damaged"):
        write_adapter(tmp_path / name, Recipe(), "./moved-model")
    (tmp_path / "empty" / "adapters.safetensors").unlink()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    ran = run("winrate", "adapter", other, *BY_GOAL)
    assert ran.exit_code != 0 and words in ran.stderr and not room.loads


def test_a_base_that_has_moved_is_named(room: Room, tmp_path: Path, tiny_model_dir: Path) -> None:
    write_adapter(tmp_path / "moved", Recipe(), "./moved-model")
    fake: Any = room
    usual, bases = fake.load_adapter, []
    fake.load_adapter = lambda path, **options: bases.append(options["model_path"]) or usual(path, **options)
    ran = run("winrate", "moved@9", "adapter@2", *BY_GOAL, "--model", tiny_model_dir, "--json", "w.json")
    assert ran.exit_code == 0 and bases == [str(tiny_model_dir), None], ran.output  # of the one that has moved alone
    assert json.loads(Path("w.json").read_text())["one"]["model"] == str(tiny_model_dir)
    ran = run("winrate", tiny_model_dir, tiny_model_dir, *BY_GOAL, "--model", tiny_model_dir)
    assert ran.exit_code == 2 and "neither side is an adapter whose base has moved" in ran.stderr


def test_every_kind_of_file_is_read(room: Room, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"response": text} for text in "abc"]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("index,response\n1,b\n0,a\n2,c\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.parquet", "a.ndjson", "a.csv", "./a.json"):
        ran = run("winrate", name, "a.json", *BY_GOAL, "--json", "w.json")
        assert ran.exit_code == 0, ran.output
        assert [one["one"] for one in json.loads(Path("w.json").read_text())["comparisons"]] == ["a", "b", "c"]
    for option, value in (("--max-tokens", "9"), ("--backend", "mlx"), ("--dtype", "float16")):
        refused = run("winrate", "a.csv", "a.json", *BY_GOAL, option, value)
        assert refused.exit_code == 2 and f"{option}: " in refused.stderr and "files" in refused.stderr
    more = run("winrate", "adapter", "a.json", *BY_GOAL, "--samples", "2", "--temperature", "1")
    assert more.exit_code != 0 and "prompt 0 has 1 of a.json and 2" in more.stderr and not room.loads


def test_what_generate_wrote_is_matched_to_what_was_asked(room: Room, tiny_model_dir: Path) -> None:
    """Finds prompts compared with the goal that stands before them, in the same turn or in one of its own."""
    write_adapter(Path("first"), Recipe(carrier="first_user"), tiny_model_dir)
    run("generate", "--file", "prompts.txt", "--adapter-path", "first", "--goal", "9", "--json", "first.json")
    assert "score: 9" in json.loads(Path("first.json").read_text())[0]["prompt"][0]["content"]
    assert run("winrate", "first.json", "first.json", *BY_GOAL).exit_code == 0
    for goal in ("2", "9"):
        run("generate", "--file", "prompts.txt", "--adapter-path", "adapter", "--goal", goal, "--json", f"{goal}.json")
    ran = run("winrate", "9.json", "2.json", *BY_GOAL)
    assert ran.exit_code == 0 and "100.0%, 0.0%, 0.0%" in ran.stdout, ran.output
    (Path("other.txt")).write_text("Why?\nSince when?\nWhat for?\n")
    turned = run("winrate", "9.json", "2.json", "--prompts", "other.txt", "--scorer", "goal_scores:goal")
    assert turned.exit_code != 0 and "to another prompt" in turned.stderr


def test_what_is_written_outlives_a_scorer_that_fails(room: Room, tmp_path: Path) -> None:
    """Finds hours of sampling thrown away with a last line of Python."""
    (tmp_path / "failing.py").write_text("def score(prompts, responses):\n    return [float('nan')] * len(responses)\n")
    ran = run("winrate", "adapter@9", "adapter@2", *BY_GOAL[:3], "failing:score", "--json", "w.json")
    assert ran.exit_code != 0
    rows = json.loads(Path("w.json.unfinished.json").read_text())
    assert [row["index"] for row in rows] == [0, 1, 2] * 2 and [row["goal"] for row in rows] == [9] * 3 + [2] * 3
    assert [row["of"] for row in rows] == ["adapter@9"] * 3 + ["adapter@2"] * 3
    assert "w.json.unfinished.json" in ran.stderr and not Path("w.json").exists()
    asked = ("control", "prompts.txt", "--adapter-path", "adapter", "--compare-base", "--json", "c.json", "--scorer")
    Path("c.json").write_text("an earlier measurement")
    (tmp_path / "late.py").write_text(
        "def score(prompts, responses):\n    return [float('nan') if len(responses) == 3 else 1.0] * len(responses)\n"
    )
    ran = run(*asked, "late:score")
    assert ran.exit_code != 0 and Path("c.json").read_text() == "an earlier measurement"
    rows = json.loads(Path("c.json.unfinished.json").read_text())
    assert [row["adapter"] for row in rows] == [True] * 15 + [False] * 3
    again = run(*asked, "goal_scores:goal", "--model", "nowhere")  # which no one looks for
    assert again.exit_code == 2 and "move it away first" in again.stderr
    assert len(json.loads(Path("c.json.unfinished.json").read_text())) == 18  # a retry that fails takes nothing with it
    Path("c.json.unfinished.json").unlink()
    assert run(*asked, "goal_scores:goal").exit_code == 0 and not Path("c.json.unfinished.json").exists()


@pytest.mark.parametrize("command", ["winrate", "control", "generate"])
def test_an_interrupt_while_sampling_loses_no_batch(
    room: Room, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finds answers that are kept only once all are there."""
    usual = room.generate
    rest = {
        "winrate": ["adapter@9", "adapter@2", *BY_GOAL, "--json", "x.json"],
        "control": ["prompts.txt", "--adapter-path", "adapter", *BY_GOAL[2:], "--goals", "3", "--json", "x.json"],
        "generate": ["--file", "prompts.txt", "--adapter-path", "adapter", "--json", "x.json"],
    }[command]

    def generate(*arguments: Any, **options: Any) -> list[str]:
        if len(room.calls) == 2:
            raise KeyboardInterrupt
        return usual(*arguments, **options)

    monkeypatch.setattr(room, "generate", generate)
    ran = run(command, *rest, "--batch-size", "1")
    assert ran.exit_code != 0 and not Path("x.json").exists()
    rows = json.loads(Path("x.json.unfinished.json").read_text())
    assert [row["index"] for row in rows] == [0, 1] and "x.json.unfinished.json" in ran.stderr


def test_answers_are_on_disk_before_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds everything lost with a process that is killed."""
    from mlxpref.cli.unfinished import EVERY, unfinished
    from mlxpref.generate import Answer, Asked

    now = [0.0]
    with unfinished(tmp_path / "x.json", clock=lambda: now[0]) as keep:
        for step in range(4):
            keep([Answer(Asked(step, (), None, ()), "so")], of="one")
            now[0] += 0.4 * EVERY
        assert [row["index"] for row in json.loads((tmp_path / "x.json.unfinished.json").read_text())] == [0, 1, 2, 3]
        with unfinished(tmp_path / "x.jsonl"):
            pass  # another file of the same stem
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_no_judge_can_read_is_refused_before_a_model_loads(room: Room, tiny_model_dir: Path) -> None:
    Path("prompts.txt").write_text("Why?\n" + "word " * 9000 + "\n")
    ran = run("winrate", "adapter", "adapter@2", "--prompts", "prompts.txt", "--judge", tiny_model_dir)
    assert ran.exit_code != 0 and "cannot read pair 1" in ran.stderr and not room.loads


def test_equal_prompts_are_one(room: Room) -> None:
    Path("prompts.txt").write_text("Why?\nWhat for?\n" * 5)
    ran = run("winrate", "adapter@9", "adapter@2", *BY_GOAL)
    assert "10, of 2 prompts" in ran.stdout, ran.output
    run("control", "prompts.txt", "--adapter-path", "adapter", "--scorer", "goal_scores:goal", "--json", "c.json")
    assert json.loads(Path("c.json").read_text())["per_goal"][0]["prompts"] == 2


def test_a_goal_is_for_an_adapter(room: Room, tiny_model_dir: Path) -> None:
    ran = run("winrate", f"{tiny_model_dir}@9", "adapter", *BY_GOAL)
    assert ran.exit_code == 2 and "no adapter folder" in ran.stderr


def test_a_model_judges_in_both_orders(room: Room, tiny_model_dir: Path) -> None:
    ran = run(
        "winrate", "adapter@9", "adapter@2", "--prompts", "prompts.txt", "--judge", tiny_model_dir, "--json", "w.json"
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("w.json").read_text())
    judge = ModelJudge(room, fakes.FakePolicy(fakes.table(1), fakes.table(2)), room.tokenizer)
    for one, word in zip(found["comparisons"], ("Why?", "What for?", "Since when?"), strict=True):
        prompt = [(Message("user", word),)]
        (ahead,), (turned,) = judge(prompt, [one["one"]], [one["other"]]), judge(prompt, [one["other"]], [one["one"]])
        assert one["first_shown_first"] == pytest.approx(ahead) and one["first_shown_second"] == pytest.approx(
            1 - turned
        )
        assert one["preference"] == pytest.approx((ahead + 1 - turned) / 2)
    assert 0 < found["letters"] < 0.5 and "seldom answer with a letter" in ran.stderr
    assert 0 < found["places"]["first"] < 1 and "judge prefers the first shown" in ran.stdout


# --- the judge ---


def judge_of(chat_tokenizer: Any, **options: Any) -> ModelJudge:
    return ModelJudge(fakes.backend(), fakes.FakePolicy(fakes.table(1), fakes.table(2)), chat_tokenizer, **options)


def test_a_verdict_is_the_share_of_one_letter(chat_tokenizer: Any) -> None:
    """Finds letters or responses swapped, the reference asked. Witness: log-probs by hand of what is read."""
    prompt = (Message("user", "Is {first} a word?"),)
    (found,) = judge_of(chat_tokenizer)([prompt], ["yes"], ["no {second}"])
    text = TEMPLATE.replace("{second}", "no {second}").replace("{first}", "yes")
    text = text.replace("{conversation}", "Is {first} a word?")
    ids = encode_prompt((Message("user", text),), chat_tokenizer)
    of = fakes.table(1)
    letters = [sum(fakes.by_hand(of, ids, chat_tokenizer.encode(letter, add_special_tokens=False))) for letter in "AB"]
    assert found == pytest.approx(1 / (1 + math.exp(letters[1] - letters[0])), rel=1e-4)


def test_what_a_judge_cannot_read_is_refused(chat_tokenizer: Any) -> None:
    prompt = (Message("user", "Why?"),)
    with pytest.raises(DataError, match="cannot read pair 0"):
        judge_of(chat_tokenizer, max_length=60)([prompt], ["word " * 80], ["no"])
    with pytest.raises(DataError, match=r"lacks \{second\}"):
        judge_of(chat_tokenizer, template="{conversation} {first}")


# --- control ---


def test_a_policy_that_obeys_has_a_rising_curve(room: Room) -> None:
    ran = run(
        "control", "prompts.txt", "--adapter-path", "adapter", "--scorer", "goal_scores:goal", "--compare-base",
        "--json", "c.json", "--picture", "c.png",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("c.json").read_text())
    assert [one["goal"] for one in found["per_goal"]] == [one["mean"] for one in found["per_goal"]] == [1, 3, 6, 8, 10]
    assert found["spearman"] == 1 and len(found["samples"]) == 15
    assert found["base"]["per_goal"][0]["goal"] is None
    assert Path("c.png").stat().st_size > 1000
    assert "Spearman" in ran.stdout and "1.00" in ran.stdout


def test_one_attribute_is_varied_and_the_others_stay_at_their_top(room: Room, tmp_path: Path) -> None:
    write_adapter(tmp_path / "two", Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("help", "truth")))
    ran = run(
        "control", "prompts.txt", "--adapter-path", "two", "--scorer", "goal_scores:honesty", "--attribute", "truth",
        "--goals", "2,7", "--json", "c.json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("c.json").read_text())
    assert [one["goal"] for one in found["per_goal"]] == [{"help": 10, "truth": 2}, {"help": 10, "truth": 7}]
    assert [one["mean"] for one in found["per_goal"]] == [2, 7] and found["spearman"]["truth"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter-path", "plain", "--goals", "3"], "without goals"),
        (["--adapter-path", "adapter", "--checkpoints"], "holds 0"),
        (["--adapter-path", "adapter", "--attribute", "truth"], "one score without a name"),
        (["--adapter-path", "adapter", "--goals", "3,3"], "asked for twice"),
        ([], "which policy?"),
        (["--adapter-path", "adapter", "--goals", "3,99"], "off this recipe's scale"),
        (["--adapter-path", "adapter", "--picture", "c.gif"], "png or .svg"),
        (["--adapter-path", "adapter", "--picture", "c.png", "--goals", "none"], "draws goals"),
        (["--adapter-path", "adapter", "--goals", "1,,4"], "'' is no number"),
        (["--adapter-path", "adapter", "--samples", "2", "--temperature", "0"], "temperature 0"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(room: Room, tmp_path: Path, arguments: list[str], words: str) -> None:
    write_adapter(tmp_path / "plain", None)
    ran = run("control", "prompts.txt", "--scorer", "goal_scores:goal", *arguments)
    assert ran.exit_code == 2 and words in ran.stderr and not room.loads


def test_a_policy_without_goals_is_asked_for_nothing(room: Room, tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain", None)
    ran = run("control", "prompts.txt", "--adapter-path", "plain", "--scorer", "goal_scores:goal", "--json", "c.json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("c.json").read_text())
    assert [(one["goal"], one["n"]) for one in found["per_goal"]] == [(None, 3)]
    assert found["spearman"] is None and found["recipe"] is None and found["checkpoints"] is None


def test_each_checkpoint_is_asked_for_its_best(room: Room, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Finds one policy asked for all, a distance of other prompts than were asked, checkpoints out of order."""
    policies = {}
    lines = [f"Why {number}?" for number in range(20)]
    Path("prompts.txt").write_text("\n".join(lines))
    for step in (200, 100, 50):
        folder = tmp_path / "adapter" / "checkpoints" / f"step-{step:06d}"
        folder.parent.mkdir(exist_ok=True)
        write_adapter(folder, Recipe(), tiny_model_dir)
        (folder / "state.json").write_text("{}")
        policies[str(folder)] = fakes.FakePolicy(fakes.table(step), fakes.table(2), path=str(tiny_model_dir))
    fake: Any = room
    usual = fake.load_adapter
    fake.load_adapter = lambda path, **options: policies.get(str(path)) or usual(path, **options)
    scores = {50: 4, 100: 9, 200: 7}
    answer = fake.generate

    def generate(policy: Any, prompts: Any, **options: Any) -> list[str]:
        step = next((step for step, one in zip((200, 100, 50), policies.values(), strict=True) if one is policy), None)
        texts = answer(policy, prompts, **options)
        return texts if step is None else [f"score: {scores[step]}. {text}" for text in texts]

    fake.generate = generate
    asked = (
        "control", "prompts.txt", "--adapter-path", tmp_path / "adapter", "--scorer", "goal_scores:goal",
        "--goals", "3", "--checkpoints", "--json",
    )  # fmt: skip
    ran = run(*asked, "c.json")
    assert ran.exit_code == 0 and "distances are from the base" not in ran.stderr, ran.output
    stages = json.loads(Path("c.json").read_text())["checkpoints"]
    assert [(one["step"], one["mean"]) for one in stages] == [(50, 4), (100, 9), (200, 7)]
    assert [one["less_end"] for one in stages] == [[-3, -3], [2, 2], None]
    words = [Recipe().write((Message("user", line),), 10.0)[0] for line in lines]
    for stage in stages:
        own, apart = fakes.table(stage["step"]), []
        for prompt in words:
            ids = encode_prompt(prompt, room.tokenizer)
            text = f"score: {scores[stage['step']]}. adapter read: {room.tokenizer.decode(ids)}"
            response = room.tokenizer.encode(text, add_special_tokens=False)
            apart.append(sum(fakes.by_hand(own, ids, response)) - sum(fakes.by_hand(fakes.table(2), ids, response)))
        assert stage["nats"] == pytest.approx(sum(apart) / len(lines), rel=1e-5)
    assert "asked for their best" in ran.stdout
    policies[str(tmp_path / "adapter" / "checkpoints" / "step-000100")].policy[:] = np.nan  # it came apart
    facts = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(facts.read_text())
    stored["mlxpref"]["init_from"] = "another"
    facts.write_text(json.dumps(stored))
    ran = run(*asked, "again.json")
    assert ran.exit_code == 1 and "not finite" in ran.stderr and "distances are from the base" in ran.stderr
    kept = json.loads(Path("again.json").read_text())
    assert kept["checkpoints"] is None and len(kept["samples"]) == 20  # the curve is not lost with it
    assert "20 responses to 20 prompts" in run(*asked[:-1]).stdout


@pytest.mark.parametrize(
    ("settings", "goals"),
    [
        ({"goal_range": (1, 3), "number_format": 0}, [1, 2, 3]),
        ({"goal_range": (0.5, 5)}, [0.5, 1.625, 2.75, 3.875, 5]),
        ({"goal_range": (0, 1234567)}, [0, 308642, 617284, 925925, 1234567]),
        ({"goal_range": (1, 10), "top_goal": 9}, [1, 3, 6, 8, 9, 10]),
    ],
)
def test_goals_that_nobody_named_are_on_the_recipes_scale(settings: dict[str, Any], goals: list[float]) -> None:
    from mlxpref.cli.control import _goals

    assert _goals(None, None, Recipe(**settings)) == goals
