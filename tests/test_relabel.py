"""Relabelling: the two halves, lists, ties, splits, and the folder other trainers read.

The released script's defects (methods 1.9) have a test each; their numbers stand in the names.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib.util
import json
import math
import pickle
import resource
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref.data.recipe import Recipe
from mlxpref.data.relabel import fit_recipe, relabel, relabel_all, split_by_prompt, unconditioned
from mlxpref.data.relabelled import is_relabelled, read_relabelled, write_relabelled
from mlxpref.errors import DataError, RunError, UsageError
from mlxpref.records import Conditioned, Counts, Dropped, Message, Scored

ASK = (Message("user", "Why is the sky blue?"),)
TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Why?"),
)


def pair(chosen=8.0, rejected=5.5, *, prompt=ASK, example_id="a", **more):
    return Scored(prompt, ("good answer", "bad answer"), (chosen, rejected), example_id, **more)


def listed(*scores, prompt=ASK, example_id="l"):
    return Scored(prompt, tuple(f"answer {i}" for i in range(len(scores))), tuple(scores), example_id)


def reward(goal, score):
    """R(x, y, g) of the paper."""
    return -((goal - score) ** 2)


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
scores_ = st.sampled_from([1.0, 2.5, 4.0, 5.5, 7.3333333, 8.0, 10.0])


@st.composite
def scored_examples(draw, max_responses=5):
    k = draw(st.integers(2, max_responses))
    roles = draw(st.sampled_from([("user",), ("system", "user"), ("user", "assistant", "user")]))
    prompt = tuple(Message(role, draw(words)) for role in roles)
    responses = tuple(draw(st.lists(words, min_size=k, max_size=k)))
    scores = tuple(draw(st.lists(scores_, min_size=k, max_size=k)))
    extras = {"rationale": tuple(str(i) for i in range(k)), "tools": [{"name": str(i)} for i in range(k)]}
    return Scored(prompt, responses, scores, draw(st.uuids()).hex, {"helpfulness": scores}, extras)


# --- the two halves ---


def test_the_second_half_has_the_responses_exchanged_in_both_carriers():
    """Defect 1: without a system role the released code exchanges the user turns and leaves the answers."""
    for carrier in ("system", "first_user"):
        first, second = relabel(pair(), Recipe(carrier=carrier))
        assert (first.responses, first.goal, first.half) == (("good answer", "bad answer"), 8.0, "chosen")
        assert (second.responses, second.goal, second.half) == (
            ("bad answer", "good answer"),
            5.5,
            "rejected",
        )
        assert (first.scores, second.scores) == ((8.0, 5.5), (5.5, 8.0))


def test_prompts_of_the_halves_differ_in_the_number_alone():
    """1.8-1: the negative half of (w, l) is the positive half of the pair with roles exchanged."""
    first, second = relabel(pair(), Recipe())
    swapped = Scored(ASK, ("bad answer", "good answer"), (8.0, 5.5), "a")
    mirrored = relabel(swapped, Recipe())
    assert mirrored[0].responses == second.responses and mirrored[1].responses == first.responses
    assert mirrored[0].prompt == first.prompt
    assert second.prompt[0].content == first.prompt[0].content.replace("score: 8.", "score: 5.5.")
    assert second.prompt[1:] == first.prompt[1:]


@pytest.mark.parametrize("carrier", ["system", "first_user"])
@pytest.mark.parametrize("prompt", [ASK, TALK])
def test_the_goal_is_stated_once_and_both_responses_share_the_prompt(carrier, prompt):
    """Defects 2, 3, 5: twice on one side, so that the prompt ends up in the answer."""
    example = pair(prompt=prompt)
    for row in relabel(example, Recipe(carrier=carrier)):
        whole = "\n".join(m.content for m in row.prompt)
        assert whole.count(row.goal_text) == 1
        assert set(row.responses) == set(example.responses)
        assert [m.role for m in row.prompt].count("system") == (carrier == "system" or prompt is TALK)
    assert [m.content for m in row.prompt if m.role == "assistant"] == [
        m.content for m in prompt if m.role == "assistant"
    ]


def test_plain_python_rows_that_share_dicts_stay_apart():
    """Defect 10: writing the goal into a shared dict leaks it into the other half."""
    turn = {"role": "user", "content": "Why?"}
    tools = [{"name": "look_up"}]
    rows = [
        Scored((Message.from_dict(turn),), ("good", "bad"), (8.0, 5.0), name, extras={"tools": tools})
        for name in "ab"
    ]
    done, _ = relabel_all(rows, Recipe(carrier="first_user"))
    assert turn == {"role": "user", "content": "Why?"} and tools == [{"name": "look_up"}]
    assert [row.prompt[0].content.count("Overall score") for row in done] == [1, 1, 1, 1]
    assert [row.goal for row in done] == [8.0, 5.0, 8.0, 5.0]


@given(scored_examples(), st.sampled_from(["system", "first_user"]))
@settings(max_examples=60, deadline=None)
def test_laws_of_a_relabelled_example(example, carrier):
    """Pure; the goal once; every order is one the reward agrees with; each response keeps what is its own."""
    before = copy.deepcopy((example.prompt, example.responses, dict(example.extras)))
    recipe = Recipe(carrier=carrier)
    rows = relabel(example, recipe)
    assert before == (example.prompt, example.responses, dict(example.extras))
    assert rows == relabel(example, recipe)
    if len(set(example.scores)) == 1:
        assert isinstance(rows, Dropped) and rows.reason == "tie: equal scores"
        return
    assert sorted(row.goal for row in rows) == sorted(set(example.scores))
    assert [row.half for row in rows].count("chosen") == 1 and rows[0].goal == max(example.scores)
    own = list(zip(example.responses, example.scores, example.extras["rationale"], strict=True))
    for row in rows:
        rewards = [reward(row.goal, s) for s in row.scores]
        assert rewards == sorted(rewards, reverse=True) and rewards[0] == 0 > rewards[-1]
        assert sum(m.content.count(row.goal_text) for m in row.prompt) == 1
        assert recipe.erase(row.prompt) == example.prompt
        assert sorted(zip(row.responses, row.scores, row.extras["rationale"], strict=True)) == sorted(own)
        assert row.attributes["helpfulness"] == row.scores
        assert row.extras["tools"] == example.extras["tools"]
        assert row.example_id == example.example_id


def test_gap_of_rewards_for_8_and_5_5():
    """1.8-5, and that the paper's goals sit at its ends: any other goal prefers by its nearness."""
    gaps = [reward(g, 8) - reward(g, 5.5) for g in (5.5, 6.75, 8, 10)]
    assert gaps == [-6.25, 0, 6.25, 16.25]
    first, second = relabel(pair(), Recipe())
    assert [reward(row.goal, row.scores[0]) - reward(row.goal, row.scores[1]) for row in (first, second)] == [
        6.25,
        6.25,
    ]


@given(scored_examples(max_responses=2), st.sampled_from([0.5, 2.0, 10.0]), st.sampled_from([-3.0, 0.0, 7.0]))
@settings(max_examples=40, deadline=None)
def test_a_shifted_and_stretched_scale_gives_the_same_halves(example, stretch, shift):
    """1.8-6: R only scales, so no order may change; with a mapped range not even the words."""
    moved = tuple(s * stretch + shift for s in example.scores)
    other = Scored(example.prompt, example.responses, moved, example.example_id)
    low, high = 1 * stretch + shift, 10 * stretch + shift
    recipe = fit_recipe([other], score_range=(low, high))
    plain, mapped = relabel(example, fit_recipe([example], score_range=(1, 10))), relabel(other, recipe)
    if isinstance(plain, Dropped):
        assert isinstance(mapped, Dropped)
        return
    assert [row.responses for row in mapped] == [row.responses for row in plain]
    assert all(math.isclose(a.goal, b.goal, abs_tol=0.006) for a, b in zip(mapped, plain, strict=True))


def test_the_score_decides_when_the_data_call_the_worse_one_chosen():
    first, second = relabel(pair(4.0, 9.0), Recipe())
    assert (first.responses[0], first.goal) == ("bad answer", 9.0)
    assert (second.responses[0], second.goal) == ("good answer", 4.0)


# --- lists ---


def test_a_list_is_ordered_by_nearness_to_each_goal():
    rows = relabel(listed(3.0, 9.0, 6.0, 4.0), Recipe())
    assert [(row.goal, row.half) for row in rows] == [
        (9.0, "chosen"),
        (6.0, "rejected"),
        (4.0, "rejected"),
        (3.0, "rejected"),
    ]
    assert rows[0].scores == (9.0, 6.0, 4.0, 3.0)
    assert rows[1].scores == (6.0, 4.0, 3.0, 9.0)  # 3 and 9 are equally far: order of the source
    assert rows[2].scores == (4.0, 3.0, 6.0, 9.0)
    assert rows[0].responses == ("answer 1", "answer 2", "answer 3", "answer 0")


def test_equal_scores_inside_a_list_give_one_goal_and_keep_the_sources_order():
    rows = relabel(listed(5.0, 8.0, 5.0), Recipe())
    assert [row.goal for row in rows] == [8.0, 5.0]
    assert rows[1].responses == ("answer 0", "answer 2", "answer 1")


def test_float_noise_does_not_decide_between_equal_distances():
    """3.3 - 2.3 is 1.0 and 2.3 - 1.3 is 0.9999999999999998."""
    rows = relabel(listed(3.3, 2.3, 1.3), Recipe())
    assert {row.goal: row.scores for row in rows}[2.3] == (2.3, 3.3, 1.3)


# --- several attributes ---


def test_several_attributes_are_asked_for_together():
    example = Scored(
        ASK,
        ("helpful", "honest"),
        None,
        "a",
        {"helpfulness": (9.0, 3.0), "honesty": (4.0, 8.0), "other": (1.0, 1.0)},
    )
    recipe = fit_recipe([example], attributes=["helpfulness", "honesty"])
    first, second = relabel(example, recipe)
    assert first.goal == {"helpfulness": 9.0, "honesty": 4.0} and first.responses == ("helpful", "honest")
    assert second.goal == {"helpfulness": 3.0, "honesty": 8.0} and second.responses == ("honest", "helpful")
    assert first.goal_text.endswith("\nHelpfulness: 9.\nHonesty: 4.")
    assert first.scores == (6.5, 5.5)  # no score of its own: the mean
    assert second.attributes["other"] == (1.0, 1.0) and second.attributes["helpfulness"] == (3.0, 9.0)


def test_a_tie_of_attributes_is_a_tie_of_all_of_them():
    example = pair(8, 8, attributes={"help": (4.0, 4.0), "honesty": (4.0, 5.0)})
    recipe = fit_recipe([example], attributes=["help", "honesty"])
    assert [row.half for row in relabel(example, recipe)] == ["chosen", "rejected"]
    only = fit_recipe([example], attributes=["help"], score_range=(1, 5))
    assert relabel(example, only).reason == "tie: equal scores"


def test_an_example_without_an_attribute_is_dropped_by_name():
    recipe = Recipe(template="{goals}", attributes=("honesty",))
    dropped = relabel(pair(attributes={"help": (4.0, 2.0)}), recipe)
    assert dropped == Dropped("no attribute 'honesty'", "a")


# --- what is dropped, what is kept ---


def test_ties_are_dropped_unless_kept():
    """Defect 6, 1.8-3: one prompt with both orders teaches nothing but the reference."""
    assert relabel(pair(7, 7), Recipe()) == Dropped("tie: equal scores", "a")
    first, second = relabel(pair(7, 7), Recipe(), ties="keep")
    assert first.prompt == second.prompt and first.responses == second.responses[::-1]
    assert relabel(listed(7, 7, 7), Recipe()).reason == "tie: equal scores"


def test_scores_that_read_the_same_are_a_tie():
    """With no decimals 8.4 and 7.6 are both "8": one sentence, opposite labels."""
    assert relabel(pair(8.4, 7.6), Recipe(number_format=0)).reason == "tie: equal scores"
    assert len(relabel(pair(8.4, 7.6), Recipe())) == 2


def test_min_gap_is_measured_in_the_score_of_the_goal():
    """Defect 6: filtered by another score than the one that is asked for."""
    recipe = fit_recipe([pair(5, 1)], score_range=(1, 5))  # one point of the data is 2.25 of the goal
    assert len(relabel(pair(4, 3), recipe, min_gap=2.25)) == 2
    assert relabel(pair(4, 3), recipe, min_gap=2.26).reason == "score gap below min_gap"
    assert relabel(pair(4, 3, attributes={"fine": (1.0, 5.0)}), recipe, min_gap=2.26).reason


@pytest.mark.parametrize(("halves", "goals"), [("both", [8, 5.5]), ("chosen", [8]), ("rejected", [5.5])])
def test_one_half_or_both(halves, goals):
    assert [row.goal for row in relabel(pair(), Recipe(), halves=halves)] == goals


def test_an_unscored_example_passes_through_without_a_goal():
    example = Scored(ASK, ("good", "bad"), None, "a")
    (row,) = relabel(example, Recipe())
    assert (row.goal, row.goal_text, row.half, row.scores) == (None, None, None, None)
    assert (row.prompt, row.responses) == (ASK, ("good", "bad"))


def test_unconditioned_puts_the_best_first():
    assert unconditioned(pair(4.0, 9.0)).responses == ("bad answer", "good answer")
    assert unconditioned(pair(7.0, 7.0)).responses == ("good answer", "bad answer")
    assert unconditioned(listed(3.0, 9.0, 6.0)).scores == (9.0, 6.0, 3.0)


def test_dropped_rows_are_counted_with_reason_and_place_and_strict_stops():
    rows = [pair(example_id="fine"), pair(7, 7, example_id="tied"), pair(12, 5, example_id="off")]
    done, counts = relabel_all(rows, Recipe())
    assert len(done) == 2 and counts.kept == 1
    assert counts.dropped == {"tie: equal scores": 1, "score off the scale": 1}
    assert counts.first["score off the scale"] == ["off"]
    with pytest.raises(DataError, match=r"off: score 12 is off the scale 1-10") as error:
        relabel_all(rows, Recipe(), strict=True)
    assert "tied" not in str(error.value)  # a filter that was asked for is no fault


def test_relabelled_prompts_are_not_relabelled_again():
    done, _ = relabel_all([pair()], Recipe())
    again = Scored(done[0].prompt, done[0].responses, done[0].scores, "a")
    assert relabel(again, Recipe()).reason == "the prompt already states a goal"


def test_options_that_mean_nothing_are_refused_together():
    with pytest.raises(UsageError) as error:
        relabel_all([], Recipe(), halves="first", ties="maybe", min_gap=-1, plain_share=2, num_proc=0)
    assert all(name in str(error.value) for name in ("halves", "ties", "min_gap", "plain_share", "num_proc"))


# --- a share without a goal ---


def many(n=600):
    return [
        pair(8, 1 + i % 5, prompt=(Message("user", f"q{i % (n // 2)}"),), example_id=f"e{i}")
        for i in range(n)
    ]


def test_the_plain_share_is_exact_and_depends_on_nothing_but_seed_and_id():
    rows, _ = relabel_all(many(), Recipe(), plain_share=0.25, seed=3)
    plain = {row.example_id for row in rows if row.goal is None}
    assert len(plain) == 150 and len(rows) == 450 * 2 + 150
    assert all(row.prompt[0].role == "user" and row.goal_text is None for row in rows if row.goal is None)
    backwards, _ = relabel_all(many()[::-1], Recipe(), plain_share=0.25, seed=3)
    assert {row.example_id for row in backwards if row.goal is None} == plain
    other, _ = relabel_all(many(), Recipe(), plain_share=0.25, seed=4)
    assert {row.example_id for row in other if row.goal is None} != plain


def test_a_plain_row_is_a_tie_by_its_score():
    """Without a goal the attributes say nothing, so nothing prefers one of two equal scores."""
    example = pair(8, 8, attributes={"help": (4.0, 5.0)})
    recipe = fit_recipe([example], attributes=["help"], score_range=(1, 5))
    assert len(relabel(example, recipe)) == 2
    assert relabel(example, recipe, plain=True).reason == "tie: equal scores"


def test_a_share_of_one_is_plain_preference_data():
    rows, _ = relabel_all(many(), Recipe(), plain_share=1.0)
    assert [row.goal for row in rows] == [None] * 600
    assert all(row.scores[0] >= row.scores[1] for row in rows)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing():
    """Defect 8: the released result depends on how many workers share the random state."""
    options = {"plain_share": 0.1, "seed": 1, "min_gap": 4.0}
    assert relabel_all(many(), Recipe(), num_proc=3, **options) == relabel_all(many(), Recipe(), **options)


def test_records_travel_between_processes():
    from multiprocessing.reduction import ForkingPickler

    example = pair(prompt=TALK)
    assert pickle.loads(ForkingPickler.dumps(example)) == example


# --- splits ---


def test_no_prompt_is_on_two_sides_and_both_halves_are_on_one():
    """Defect 4 and 1.10: a prompt (here each has two rows) never leaks, and every split is relabelled."""
    parts = split_by_prompt(many(), fractions={"valid": 0.1, "test": 0.05}, seed=0)
    prompts = {name: {example.prompt[0].content for example in rows} for name, rows in parts.items()}
    assert not prompts["train"] & prompts["valid"] and not prompts["train"] & prompts["test"]
    assert not prompts["valid"] & prompts["test"]
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 510, "valid": 60, "test": 30}
    halves = {name: relabel_all(rows, Recipe())[0] for name, rows in parts.items()}
    ids = {name: {row.example_id for row in rows} for name, rows in halves.items()}
    assert not ids["train"] & ids["valid"] and all(row.goal for rows in halves.values() for row in rows)


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    def split(rows, seed):
        parts = split_by_prompt(rows, fractions={"valid": 0.1}, seed=seed)
        return {example.example_id for example in parts["valid"]}

    assert split(many(), 0) == split(many()[::-1], 0) != split(many(), 1)


def test_white_space_does_not_make_another_prompt():
    rows = [pair(prompt=(Message("user", text),), example_id=text) for text in ("q", "q ", " q\n", "r")]
    parts = split_by_prompt(rows, fractions={"valid": 0.5}, seed=0)
    assert {len(part) for part in parts.values()} == {1, 3}


@pytest.mark.parametrize(
    "fractions", [{"valid": 0.0}, {"valid": 1.0}, {"valid": 0.6, "test": 0.5}, {"train": 0.9}]
)
def test_fractions_that_cannot_be_are_refused(fractions):
    with pytest.raises(UsageError, match="fractions"):
        split_by_prompt(many(10), fractions=fractions, seed=0)


def test_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match="1 different prompts are too few"):
        split_by_prompt([pair(), pair()], fractions={"valid": 0.5}, seed=0)


# --- the folder ---

NESTED = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}]}


def conditioned_rows():
    """Pairs, a list, an unconditioned row, tools, tool calls, an awkward line separator."""
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"y": [2]})]
    called = Message("assistant", "", {"tool_calls": calls})
    examples = [
        pair(
            prompt=TALK, extras={"rationale": ("better", "worse"), **NESTED}, attributes={"help": (4.0, 2.0)}
        ),
        pair(prompt=(*ASK, called, Message("tool", "1", {"tool_call_id": "7"})), example_id="b"),
        listed(3.0, 9.0, 6.0),
        pair(prompt=(Message("user", "one\u2028two\u2029three\x85four \U0001f600"),), example_id="c"),
    ]
    rows, counts = relabel_all(examples, Recipe())
    return [*rows, unconditioned(Scored(ASK, ("good", "bad"), None, "plain"))], counts


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_what_is_written_is_read_back(tmp_path, file_format):
    rows, counts = conditioned_rows()
    folder = tmp_path / "out"
    splits = {"train": rows, "valid": rows[-1:]}
    write_relabelled(folder, splits, Recipe(), file_format=file_format, counts=counts)
    found = read_relabelled(folder)
    assert found.recipe == Recipe() and is_relabelled(folder)
    assert found.read("train") == rows and found.read("valid") == rows[-1:]
    assert found.counts == {"all": {"kept": 4, "dropped": {}}}
    assert sorted(p.name for p in folder.iterdir()) == [
        "recipe.json",
        f"train.{file_format}",
        f"valid.{file_format}",
    ]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_distances_to_several_goals_are_written_and_read_back(tmp_path, file_format):
    """Finds a list whose overall scores tie that prefers nothing any more once it was on disk."""
    example = Scored(
        ASK, ("a", "b", "c"), (5.0,) * 3, "l", {"help": (9.0, 8.0, 2.0), "truth": (3.0, 3.0, 8.0)}
    )
    recipe = Recipe(template="{goals}", attributes=("help", "truth"))
    rows, _ = relabel_all([example], recipe)
    assert [row.distances for row in rows] == [(0.0, 1.0, 74.0), (0.0, 1.0, 61.0), (0.0, 61.0, 74.0)]
    plain = unconditioned(example)
    write_relabelled(tmp_path / "out", {"train": [*rows, plain]}, recipe, file_format=file_format)
    assert read_relabelled(tmp_path / "out").read() == [*rows, plain]


def test_columns_are_the_ones_promised(tmp_path):
    """Defect 12: scores and goals are gone before training."""
    rows, counts = relabel_all([pair()], Recipe())
    write_relabelled(tmp_path / "out", {"train": rows}, Recipe(), counts=counts)
    lines = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [
        {
            "prompt",
            "chosen",
            "rejected",
            "goal",
            "goal_text",
            "half",
            "score_chosen",
            "score_rejected",
            "example_id",
        }
    ] * 2
    assert lines[1]["chosen"] == [{"role": "assistant", "content": "bad answer"}]
    assert [line["half"] for line in lines] == ["chosen", "rejected"]
    assert [(line["goal"], line["score_chosen"], line["score_rejected"]) for line in lines] == [
        (8.0, 8.0, 5.5),
        (5.5, 5.5, 8.0),
    ]


def test_a_line_is_a_line_for_every_reader(tmp_path):
    """``str.splitlines`` and others break lines at U+2028 even inside a JSON string."""
    rows, _ = conditioned_rows()
    write_relabelled(tmp_path / "out", {"train": rows}, Recipe())
    assert len((tmp_path / "out/train.jsonl").read_text(encoding="utf8").splitlines()) == len(rows)


def test_numbers_are_floats_in_every_row(tmp_path):
    """A reader that infers an integer type from the first rows breaks at the first 8.5."""
    row = dataclasses.replace(relabel(pair(), Recipe())[0], goal=8, scores=(8, 5))
    write_relabelled(tmp_path / "out", {"train": [row]}, Recipe())
    line = (tmp_path / "out/train.jsonl").read_text()
    assert '"goal": 8.0' in line and '"score_chosen": 8.0' in line and '"score_rejected": 5.0' in line


def test_files_are_the_same_bytes_for_the_same_seed(tmp_path):
    for name in ("one", "two"):
        rows, counts = relabel_all(many(), Recipe(), plain_share=0.1, seed=5)
        write_relabelled(tmp_path / name, {"train": rows}, Recipe(), counts=counts)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_an_occupied_folder_is_left_alone(tmp_path):
    rows, _ = relabel_all([pair()], Recipe())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="mine"):
            write_relabelled(tmp_path / "mine", {"train": rows}, Recipe(), overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    write_relabelled(tmp_path / "out", {"train": rows}, Recipe())
    with pytest.raises(RunError, match="--overwrite"):
        write_relabelled(tmp_path / "out", {"train": rows}, Recipe())
    write_relabelled(tmp_path / "out", {"test": rows[:1]}, None, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["recipe.json", "test.jsonl"]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_a_full_disk_leaves_nothing(tmp_path, file_format):
    """A real refusal of the system, by a limit on the size of files."""
    rows, _ = relabel_all(many(), Recipe())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(RunError, match="Nothing was left") as error:
            write_relabelled(tmp_path / "out", {"train": rows}, Recipe(), file_format=file_format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(error.value.__cause__, OSError) and error.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_a_file_cannot_hold_is_named_and_nothing_is_left(tmp_path):
    surrogate = ({}, "half an emoji \ud83d", ("jsonl", "parquet"))
    for extras, text, formats in (
        ({"margin": math.nan}, "ok", ("jsonl",)),
        ({"margin": {1}}, "ok", ("jsonl",)),
        surrogate,
    ):
        rows, _ = relabel_all(
            [pair(), pair(prompt=(Message("user", text),), example_id="odd", extras=extras)], Recipe()
        )
        for file_format in formats:
            with pytest.raises(DataError, match="odd"):
                write_relabelled(tmp_path / "out", {"train": rows}, Recipe(), file_format=file_format)
    assert list(tmp_path.iterdir()) == []


def test_an_extra_may_not_bear_a_name_of_ours(tmp_path):
    rows, _ = relabel_all([pair(extras={"goal": 3})], Recipe())
    with pytest.raises(DataError, match="goal"):
        write_relabelled(tmp_path / "out", {"train": rows}, Recipe())


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no row"):
        write_relabelled(tmp_path / "out", {"train": []}, Recipe(), counts=Counts())


@pytest.mark.parametrize(
    ("file", "damage", "why"),
    [
        ("train.jsonl", lambda b: b[:-40], r"train.jsonl:2: not JSON"),
        ("train.jsonl", lambda b: b.splitlines(True)[0], r"holds 1 row, recipe.json says 2"),
        (
            "train.jsonl",
            lambda b: b.replace(b'"chosen": [', b'"other": [', 1),
            r"train.jsonl:1: not a relabelled",
        ),
        ("train.jsonl", lambda b: b"[]\n" + b, r"train.jsonl:1: a JSON object"),
        ("train.jsonl", lambda b: b.replace(b"sky", b"s\xff"), "cannot be read"),
        ("train.jsonl", None, "not there"),
        ("recipe.json", lambda b: b[:-40], "not JSON"),
        ("recipe.json", lambda b: b.replace(b'"splits"', b'"slits"'), "damaged"),
        ("recipe.json", lambda b: b.replace(b'_relabelled": 1', b'_relabelled": 2'), "reads 1"),
        ("recipe.json", None, "no readable recipe.json"),
    ],
)
def test_a_damaged_folder_is_noticed_with_file_and_row(tmp_path, file, damage, why):
    rows, _ = relabel_all([pair()], Recipe())
    write_relabelled(tmp_path / "out", {"train": rows}, Recipe())
    path = tmp_path / "out" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=why):
        read_relabelled(tmp_path / "out").read("train")


def test_a_cut_parquet_file_is_noticed(tmp_path):
    rows, _ = relabel_all([pair()], Recipe())
    write_relabelled(tmp_path / "out", {"train": rows}, Recipe(), file_format="parquet")
    path = tmp_path / "out/train.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="Parquet"):
        read_relabelled(tmp_path / "out").read("train")


# --- other people's readers ---


def load(folder, file_format):
    import datasets

    datasets.disable_progress_bars()
    name = "json" if file_format == "jsonl" else file_format
    files = {"train": str(folder / f"train.{file_format}"), "valid": str(folder / f"valid.{file_format}")}
    return datasets.load_dataset(name, data_files=files)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_datasets_reads_every_column_with_one_type_in_all_splits(tmp_path, file_format):
    """A split of unconditioned rows alone must not get another type of goal."""
    rows, _ = conditioned_rows()
    write_relabelled(tmp_path / "out", {"train": rows, "valid": rows[:2]}, Recipe(), file_format=file_format)
    found = load(tmp_path / "out", file_format)
    assert found["train"]["example_id"][:] == [row.example_id for row in rows]
    assert found["train"]["goal"][:] == [row.goal for row in rows]
    assert [turns[0]["content"] for turns in found["train"]["chosen"]] == [row.responses[0] for row in rows]
    assert found["train"][-2]["prompt"][-1]["content"] == rows[-2].prompt[-1].content


@pytest.mark.torch
@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_trl_reads_the_folder_unchanged(tmp_path, chat_tokenizer, file_format):
    """TRL's own recognition, chat template and boundary: prompt shared, goal in it once, answers whole."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.data_utils import is_conversational, maybe_apply_chat_template, maybe_extract_prompt
    rows, _ = relabel_all([pair(), pair(prompt=TALK, example_id="b"), listed(3.0, 9.0, 6.0)], Recipe())
    write_relabelled(tmp_path / "out", {"train": rows, "valid": rows[:2]}, Recipe(), file_format=file_format)
    for example, row in zip(load(tmp_path / "out", file_format)["train"], rows, strict=True):
        assert is_conversational(example)
        assert maybe_extract_prompt(example)["prompt"] == example["prompt"]
        text = maybe_apply_chat_template(example, chat_tokenizer)
        assert text["prompt"].count(row.goal_text) == 1
        assert text["prompt"].endswith("<|im_start|>assistant\n")
        assert text["chosen"] == f"{row.responses[0]}<|im_end|>\n"
        assert text["rejected"] == f"{row.responses[-1]}<|im_end|>\n"


# --- real data ---


def test_real_pairs_relabel_as_the_seed_would(assets):
    """Against a few lines of plain Python over the raw file."""
    with (assets / "data/ultrafeedback/eval.jsonl").open(encoding="utf8", newline="\n") as lines:
        raw = [json.loads(line) for line in lines]
    raw = [r for r in raw if r["chosen"].strip() and r["rejected"].strip() and r["chosen"] != r["rejected"]]
    examples = [
        Scored(
            (Message("user", r["prompt"]),),
            (r["chosen"], r["rejected"]),
            (r["score_chosen"], r["score_rejected"]),
            r["id"],
        )
        for r in raw
    ]
    recipe = fit_recipe(examples)
    rows, counts = relabel_all(examples, recipe)
    untied = [r for r in raw if r["score_chosen"] != r["score_rejected"]]
    assert counts.dropped["tie: equal scores"] == len(raw) - len(untied) > 0
    sentence = "(on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: "
    for first, second, r in zip(rows[::2], rows[1::2], untied, strict=True):
        for row, mine, other in ((first, "chosen", "rejected"), (second, "rejected", "chosen")):
            assert row.prompt[0].content.endswith(sentence + f"{r[f'score_{mine}']:g}.")
            assert row.prompt[1].content == r["prompt"] and len(row.prompt) == 2
            assert row.responses == (r[mine], r[other])
            assert isinstance(row, Conditioned) and row.half == mine
