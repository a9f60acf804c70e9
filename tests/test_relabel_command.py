"""``mlxpref relabel`` from the command line: what is written, what is said, and what is refused."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlxpref.cli import main
from mlxpref.config import RelabelSection
from mlxpref.data.relabelled import read_relabelled
from mlxpref.data.scale import MAX_DECIMALS


def run(*arguments):
    return CliRunner().invoke(main, ["relabel", *map(str, arguments)], catch_exceptions=False)


def row(i, chosen=8.0, rejected=5.5, **more):
    return {
        "prompt": f"question {i // 2} [INST]",
        "chosen": f"good {i}",
        "rejected": f"bad {i}",
        "score_chosen": chosen,
        "score_rejected": rejected,
        "id": f"r{i}",
    } | more


def write(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return file


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", [row(i, 9.0, 1.0 + i % 6) for i in range(40)])


def test_a_file_becomes_a_folder_of_halves(pairs, tmp_path):
    result = run(pairs, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "carrier: system message, since no --model" in result.stderr
    rows = read_relabelled(tmp_path / "out").read("train")
    assert [r.example_id for r in rows] == [f"r{i // 2}" for i in range(80)]
    assert [r.half for r in rows[:2]] == ["chosen", "rejected"]


def test_splits_of_a_folder_are_kept_and_each_is_relabelled(tmp_path):
    """Defect 4: a test split without goals measures another task. The recipe is fitted on train alone."""
    write(tmp_path / "in/train.jsonl", [row(i, 80, 20) for i in range(6)])
    write(tmp_path / "in/validation.jsonl", [row(i, 95, 50) for i in range(6, 8)])
    assert run(tmp_path / "in", "--out", tmp_path / "out").exit_code == 0
    found = read_relabelled(tmp_path / "out")
    assert set(found.splits) == {"train", "valid"}
    assert found.recipe.mapping.knots == ((20.0, 1.0), (80.0, 10.0))
    assert {r.goal for r in found.read("valid")} == {10.0, 5.5}


def test_held_out_parts_share_no_prompt(pairs, tmp_path):
    result = run(pairs, "--out", tmp_path / "out", "--valid-fraction", 0.2, "--test-fraction", 0.1)
    assert result.exit_code == 0, result.output
    found = read_relabelled(tmp_path / "out")
    asked = {name: {r.prompt[-1].content for r in found.read(name)} for name in found.splits}
    assert {name: len(found.read(name)) for name in asked} == {"train": 56, "valid": 16, "test": 8}
    assert not asked["train"] & asked["valid"] and not (asked["train"] | asked["valid"]) & asked["test"]


def test_weighted_sources_are_mixed(tmp_path):
    one = write(tmp_path / "one.jsonl", [row(i) for i in range(4)])
    two = write(tmp_path / "two.jsonl", [row(i, prompt=f"other {i}", id=f"s{i}") for i in range(4)])
    assert run(one, two, "--weight", 2, "--weight", 0.5, "--out", tmp_path / "out").exit_code == 0
    ids = [r.example_id for r in read_relabelled(tmp_path / "out").read("train")]
    assert len(ids) == 2 * (8 + 2) and sum(i.startswith("s") for i in ids) == 4


@pytest.mark.slow
def test_seed_decides_every_byte_and_processes_none(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [row(i, 8.0, 1.0 + i % 6) for i in range(700)])
    asked = (pairs, "--valid-fraction", 0.2, "--plain-share", 0.3, "--seed", 7)
    for name, more in (("a", ()), ("b", ("--num-proc", 3)), ("c", ("--seed", 8))):
        assert run(*asked, *more, "--out", tmp_path / name).exit_code == 0
    for file in ("train.jsonl", "valid.jsonl", "recipe.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and (a != c or file == "recipe.json")


def test_preview_prints_the_exact_text_and_writes_nothing(pairs, tmp_path):
    result = run(pairs, "--preview", 2)
    assert result.exit_code == 0
    before = set(tmp_path.iterdir())
    assert (
        "===== r0 · half rejected · goal 1 =====\n"
        "----- system -----\n"
        "You are an assistant that generates responses for the instruction while implicitly achieving the "
        "following target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\n"
        "Overall score: 1.\n"
        "----- user -----\n"
        "question 0 [INST]\n"
        "----- chosen, score 1 -----\n"
        "bad 0\n"
        "----- rejected, score 9 -----\n"
        "good 0\n"
    ) in result.stdout
    assert set(tmp_path.iterdir()) == before


def test_the_models_template_decides_the_carrier(pairs, tmp_path, make_model_dir, no_system_tokenizer):
    folder = make_model_dir(tokenizer=no_system_tokenizer)
    result = run(pairs, "--out", tmp_path / "out", "--model", folder, "--preview", 1)
    assert result.exit_code == 0, result.output
    assert "carrier: first_user" in result.stderr
    assert "<|im_start|>user\nYou are an assistant that generates" in result.stdout
    assert read_relabelled(tmp_path / "out").recipe.carrier == "first_user"
    result = run(pairs, "--out", tmp_path / "two", "--model", folder, "--carrier", "system")
    assert "no system role" in result.stderr


def test_a_stored_recipe_is_used_again(tmp_path):
    one = write(tmp_path / "one.jsonl", [row(i, 80, 20) for i in range(4)])
    two = write(tmp_path / "two.jsonl", [row(i, 50, 35) for i in range(4)])
    run(one, "--out", tmp_path / "first", "--template", "Aim for {score} of {high}.")
    assert run(two, "--out", tmp_path / "second", "--recipe", tmp_path / "first").exit_code == 0
    first, second = read_relabelled(tmp_path / "first"), read_relabelled(tmp_path / "second")
    assert first.recipe == second.recipe
    assert [r.goal_text for r in second.read("train")[:2]] == ["Aim for 5.5 of 10.", "Aim for 3.25 of 10."]
    clash = run(two, "--out", tmp_path / "third", "--recipe", tmp_path / "first", "--goal-range", 0, 1)
    assert clash.exit_code == 2 and "--goal-range" in clash.stderr


def test_a_template_comes_from_a_file(pairs, tmp_path):
    (tmp_path / "words.txt").write_text("Quality: {score}.\n")
    assert run(pairs, "--out", tmp_path / "out", "--template", tmp_path / "words.txt").exit_code == 0
    assert read_relabelled(tmp_path / "out").read("train")[0].goal_text == "Quality: 9."


def test_a_doubtful_scale_is_pointed_at(tmp_path):
    """Scores of 1-5 under a sentence that says 1-10 would leave its 10 untrained; and one score of 85 among
    tens would squeeze all others into a corner."""
    narrow = write(tmp_path / "narrow.jsonl", [row(i, 5, 1) for i in range(4)])
    result = run(narrow, "--preview", 1)
    assert "the scale seen, 1 to 5, is stretched" in result.stderr and "Overall score: 10." in result.stdout
    as_they_are = run(narrow, "--preview", 1, "--mapping", "identity").stderr
    assert "scores go from 1 to 5 and are taken as they are" in as_they_are
    wide = write(tmp_path / "wide.jsonl", [row(0, 85, 7), row(1, 9, 8)])
    assert "the scale seen, 7 to 85" in run(wide, "--preview", 1).stderr
    for file, declared in ((narrow, (1, 5)), (wide, (1, 100))):
        assert "warning" not in run(file, "--preview", 1, "--score-range", *declared).stderr


RANKED = {"prompt": "Sky?", "answers": [{"answer": f"{n}.", "rank": n} for n in range(1, 8)]}
RATED = [{"prompt": "Sky?", "response": f"{n}.", "helpfulness": n, "honest": 1} for n in (3, 1)]


def test_the_scale_of_a_format_is_known(tmp_path):
    """Ranks 1-7 as goals 1-7 of 10 would never train the 10 that is asked for; and 3 of 4 is no 10."""
    run(write(tmp_path / "nectar.jsonl", [RANKED]), "--out", tmp_path / "ranks")
    ranks = read_relabelled(tmp_path / "ranks")
    assert [row.goal for row in ranks.read("train")] == [10, 8.5, 7, 5.5, 4, 2.5, 1]
    result = run(write(tmp_path / "steer.jsonl", RATED), "--out", tmp_path / "rated")
    rated = read_relabelled(tmp_path / "rated")
    assert [row.goal for row in rated.read("train")] == [7.75, 3.25]
    assert ranks.recipe.score_range == (1, 7) and rated.recipe.score_range == (0, 4)
    assert "helpfulness, higher is better, on a scale of 0-4" in result.stderr
    assert "warning" not in result.stderr
    own = run(tmp_path / "steer.jsonl", "--out", tmp_path / "own", "--score-range", 1, 5)
    assert own.exit_code == 0 and read_relabelled(tmp_path / "own").recipe.score_range == (1, 5)
    helpful = run(tmp_path / "steer.jsonl", "--out", tmp_path / "helpful", "--attributes", "helpfulness")
    assert helpful.exit_code == 0, helpful.output
    assert read_relabelled(tmp_path / "helpful").recipe.score_range == (0, 4)


def test_sources_of_different_scales_do_not_share_a_map(tmp_path):
    files = write(tmp_path / "nectar.jsonl", [RANKED]), write(tmp_path / "steer.jsonl", RATED)
    result = run(*files, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "nectar.jsonl: 1-7" in result.stderr and "0-4" in result.stderr
    assert run(*files, "--out", tmp_path / "out", "--score-range", 0, 7).exit_code == 0


def test_number_format_has_one_bound(pairs):
    """The command refused what a configuration takes."""
    assert "Overall score: 9.000000000000." in run(pairs, "--preview", 2, "--number-format", 12).stdout
    assert run(pairs, "--preview", 1, "--number-format", MAX_DECIMALS + 1).exit_code == 2
    with pytest.raises(ValueError, match=str(MAX_DECIMALS)):
        RelabelSection(number_format=MAX_DECIMALS + 1)


def test_the_folder_says_how_it_was_written(pairs, tmp_path):
    options = ("--min-gap", 4, "--ties", "keep", "--halves", "chosen", "--seed", 3, "--limit", 30)
    assert run(pairs, "--out", tmp_path / "out", *options).exit_code == 0
    assert read_relabelled(tmp_path / "out").options == {
        "halves": "chosen",
        "ties": "keep",
        "min_gap": 4.0,
        "plain_share": 0.0,
        "seed": 3,
        "sources": [{"path": str(pairs), "limit": 30, "split": "train"}],
    }


def test_rows_without_goals_have_no_recipe(pairs, tmp_path):
    """An adapter trained on them would be asked for a top goal it never saw."""
    result = run(pairs, "--out", tmp_path / "out", "--plain-share", 1)
    assert result.exit_code == 0 and "no goals" in result.stdout
    found = read_relabelled(tmp_path / "out")
    assert found.recipe is None and len(found.read("train")) == 40


def test_dropped_rows_are_counted_with_their_reason_and_strict_refuses_them(tmp_path):
    rows = [row(0), row(1, 7, 7), row(2, 12, 3), row(3, "good", 3), row(4) | {"chosen": ""}]
    file = write(tmp_path / "in.jsonl", rows)
    result = run(file, "--out", tmp_path / "out", "--score-range", 1, 10)
    assert result.exit_code == 0
    for line in (
        "read/train: dropped 1: score is not a number (in.jsonl:4)",
        "read/train: dropped 1: empty response (in.jsonl:5)",
        "relabel/train: dropped 1: score off the scale (in.jsonl:3)",
        "relabel/train: dropped 1: tie: equal scores (in.jsonl:2)",
    ):
        assert line in result.stderr
    stored = json.loads((tmp_path / "out/recipe.json").read_text())["counts"]
    assert stored["relabel/train"] == {
        "kept": 1,
        "dropped": {"tie: equal scores": 1, "score off the scale": 1},
    }
    assert run(file, "--out", tmp_path / "strict", "--strict").exit_code == 1
    off = write(tmp_path / "off.jsonl", [row(0), row(2, 12, 3)])
    result = run(off, "--out", tmp_path / "strict", "--strict", "--score-range", 1, 10)
    assert result.exit_code == 1 and "off.jsonl:2: score 12 is off the scale 1-10" in result.stderr
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ((), 2, "--out FOLDER"),
        (("--out", "out", "--template", "Be good."), 2, "{score}"),
        (("--out", "out", "--template", "no-such-file"), 2, "no-such-file"),
        (("--out", "out", "--goal-range", 10, 1), 2, "rising"),
        (("--out", "out", "--weight", 1, "--weight", 2), 2, "--weight"),
        (("--out", "out", "--valid-fraction", 1.5), 2, "fractions"),
        (("--out", "out", "--attributes", "honesty"), 1, "honesty"),
        (("--out", "out", "--columns", "prompt"), 2, "ours=theirs"),
        (("--out", "out", "--recipe", "nowhere"), 1, "recipe.json"),
        (("--out", "out", "--min-gap", 99), 1, "score gap below min_gap"),
        (("--out", "full"), 1, "not empty"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_remedy_and_nothing_is_written(
    pairs, tmp_path, monkeypatch, arguments, code, why
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "full/notes.txt", [])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = run(pairs, *arguments)
    assert result.exit_code == code and why in result.stderr, result.output
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_fraction_of_data_with_their_own_split_is_refused(tmp_path):
    write(tmp_path / "in/train.jsonl", [row(i) for i in range(6)])
    write(tmp_path / "in/valid.jsonl", [row(9)])
    result = run(tmp_path / "in", "--out", tmp_path / "out", "--valid-fraction", 0.2)
    assert result.exit_code == 2 and "have their own valid" in result.stderr
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--test-fraction", 0.2).exit_code == 0
    assert set(read_relabelled(tmp_path / "out").splits) == {"train", "valid", "test"}


def test_only_data_that_name_a_chosen_response_are_said_to(tmp_path):
    """The first of a list was called the data's chosen one."""
    rated = [{**RATED[1]}, {**RATED[0]}]
    turned = run(write(tmp_path / "steer.jsonl", rated), "--preview", 1)
    assert turned.exit_code == 0 and "chosen response has" not in turned.stderr
    pairs = write(tmp_path / "pairs.jsonl", [row(0, 3.0, 7.0)])
    assert "in 1 pair the data's chosen response has" in run(pairs, "--preview", 1).stderr


def test_unscored_data_have_no_goal_to_write(tmp_path):
    bare = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    result = run(write(tmp_path / "in.jsonl", [bare]), "--out", tmp_path / "out")
    assert result.exit_code == 1 and "--columns (of pairs score_chosen=" in result.stderr
    assert not (tmp_path / "out").exists()


def test_relabelled_data_are_not_relabelled_twice(pairs, tmp_path):
    run(pairs, "--out", tmp_path / "out")
    result = run(tmp_path / "out", "--out", tmp_path / "again")
    assert result.exit_code == 1 and "already" in result.stderr
    assert run(pairs, "--out", tmp_path / "out").exit_code == 1
    assert run(pairs, "--out", tmp_path / "out", "--overwrite", "--halves", "chosen").exit_code == 0
    assert len(read_relabelled(tmp_path / "out").read("train")) == 40


def test_real_lists_get_a_row_for_each_distinct_score(assets, tmp_path):
    file = assets / "data/vicuna_eval/vicuna_eval.jsonl"
    with file.open(encoding="utf8", newline="\n") as lines:
        raw = [[answer["score"] for answer in json.loads(line)["responses"]] for line in lines]
    result = run(file, "--out", tmp_path / "out", "--score-range", 1, 5)
    assert result.exit_code == 0, result.output
    rows = read_relabelled(tmp_path / "out").read("train")
    assert len(rows) == sum(len(set(scores)) for scores in raw if len(set(scores)) > 1)
    assert all(r.goal == r.scores[0] for r in rows)
    assert sum(r.half == "chosen" for r in rows) == sum(len(set(scores)) > 1 for scores in raw)
