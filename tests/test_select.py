"""Shaping: scores made of others, responses taken, examples filtered, before goals are written.

Finds: an option that is accepted and does nothing, an order of operations other than the one that is said, a bound
fitted on rows it is then applied to, draws that depend on the order of the rows, and a folder that does not say how
its scores were made.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from statistics import fmean, pstdev

import click
import pytest
from click.testing import CliRunner

from mlxpref import cli
from mlxpref.config import RelabelSection
from mlxpref.config_layers import load_config
from mlxpref.data.fitting import fit_recipe
from mlxpref.data.picking import Picking
from mlxpref.data.recipe import Recipe
from mlxpref.data.relabel import relabel_all
from mlxpref.data.relabel_sources import relabel_sources
from mlxpref.data.relabelled import read_relabelled, write_relabelled
from mlxpref.data.scoring import Scoring
from mlxpref.data.shaping import PICKING, SCORING, Shaping, shape_splits
from mlxpref.data.sources import SourceSpec
from mlxpref.errors import ConfigError, DataError, ScoreError, UsageError
from mlxpref.prepare import prepare
from mlxpref.records import Message, Scored

ASK = (Message("user", "Why?"),)


def listed(name, scores, *, texts=None, extras=None, **attributes):
    texts = texts or tuple(f"{name} {i}" for i in range(len(next(iter(attributes.values()), scores or ()))))
    found = {key: tuple(map(float, values)) for key, values in attributes.items()}
    return Scored(ASK, texts, None if scores is None else tuple(map(float, scores)), name, found, extras or {})


def shaped(examples, *, scoring=None, picking=None, seed=0, **options):
    """The training examples after shaping."""
    shaping = Shaping(Scoring(**(scoring or {})), Picking(**(picking or {})))
    return shape_splits({"train": examples}, shaping, seed=seed, **options).splits["train"]


def scores_of(examples, **scoring):
    return [value for example in shaped(examples, scoring=scoring) for value in example.scores]


TWO = [listed("a", (9, 1), help=(1, 3), honest=(8, 4)), listed("b", (2, 4), help=(5, 7), honest=(4, 0))]
"""Two attributes: help 1, 3, 5, 7 and honest 8, 4, 4, 0, both of deviation √5 and √8."""

HELP, HONEST = (1.0, 3.0, 5.0, 7.0), (8.0, 4.0, 4.0, 0.0)


def standard(values):
    return [(v - fmean(values)) / pstdev(values) for v in values]


# --- scores ---


def test_nothing_asked_for_changes_nothing():
    result = shape_splits({"train": TWO}, Shaping())
    assert result.splits["train"] == TWO and result.splits["train"][0] is TWO[0]
    assert result.counts == {} and result.shaping.as_dict() == {}


def test_scores_of_several_attributes_by_hand():
    z = list(zip(standard(HELP), standard(HONEST), strict=True))
    assert scores_of(TWO, score_from=["help", "honest"]) == pytest.approx([fmean(pair) for pair in z])
    assert scores_of(TWO, score_from=["help", "honest"], combine="min") == pytest.approx([min(pair) for pair in z])
    uwo = scores_of(TWO, score_from=["help", "honest"], combine="uwo:0.25")
    assert uwo == pytest.approx([fmean(pair) - 0.25 * pstdev(pair) ** 2 for pair in z])
    raw = list(zip(HELP, HONEST, strict=True))
    assert scores_of(TWO, score_from=["help", "honest"], standardise=False) == [fmean(pair) for pair in raw]
    along = scores_of(TWO, direction="help*80 + honest*-60")
    assert along == pytest.approx([0.8 * a - 0.6 * b for a, b in raw])
    assert scores_of(TWO, score_from=["honest"]) == list(HONEST)
    assert scores_of(TWO, score_from=["honest"], standardise=True) == pytest.approx(standard(HONEST))


def test_bounded_utilities_are_centred_at_their_own_attribute_s_quantile():
    """Medians 4 and 4; by default the 85th percentiles, 5 + 0.55 · 2 and 4 + 0.55 · 4, by numpy's rule."""
    for way, references in (("log_sigmoid:0.5", (4.0, 4.0)), ("log_sigmoid", (6.1, 6.2))):
        expected = [
            sum(-math.log1p(math.exp(-(own - at))) for own, at in zip(pair, references, strict=True))
            for pair in zip(HELP, HONEST, strict=True)
        ]
        assert scores_of(TWO, score_from=["help", "honest"], combine=way) == pytest.approx(expected)


def test_the_uwo_without_penalty_is_the_mean_and_with_its_default_is_not():
    mean = scores_of(TWO, score_from=["help", "honest"])
    assert scores_of(TWO, score_from=["help", "honest"], combine="uwo:0") == mean
    default = scores_of(TWO, score_from=["help", "honest"], combine="uwo")
    assert default == scores_of(TWO, score_from=["help", "honest"], combine="uwo:0.5") != mean


def test_overall_is_the_score_itself_and_attributes_stay():
    (first, _) = shaped(TWO, scoring={"score_from": ["overall", "help"], "standardise": False})
    assert first.scores == (5.0, 2.0) and first.attributes == TWO[0].attributes


def test_length_is_taken_off_after_combining():
    texts = ("x" * 100, "y" * 10)
    example = listed("a", (9, 1), texts=texts, help=(1, 3))
    assert scores_of([example], length_penalty=0.02) == pytest.approx([9 - 2, 1 - 0.2])
    assert scores_of([example], score_from=["help"], length_penalty=0.02) == pytest.approx([1 - 2, 3 - 0.2])


def test_dice_finds_the_penalty_on_the_training_examples():
    """As in the library's own test: 0.003 a character makes both sides 75 long."""
    train = [
        listed("a", (1.0, 0.8995), texts=("x" * 100, "y" * 50)),
        listed("b", (0, 1), texts=("x" * 50, "y" * 100)),
    ]
    other = [listed("c", (5, 1), texts=("x" * 10, "y" * 20))]
    result = shape_splits({"train": train, "valid": other}, Shaping(Scoring(length_penalty="dice")))
    assert result.shaping.scoring.fitted.alpha == pytest.approx(0.003)
    assert result.splits["valid"][0].scores == pytest.approx((5 - 0.03, 1 - 0.06))


def test_what_is_fitted_is_fitted_on_the_training_examples_alone():
    """A validation split that sets its own mean would put both splits on one level."""
    high = [listed("v", (1, 2), help=(11, 13), honest=(8, 0))]
    result = shape_splits({"valid": high, "train": TWO}, Shaping(Scoring(score_from=("help",), standardise=True)))
    assert result.splits["valid"][0].scores == pytest.approx([(v - 4) / pstdev(HELP) for v in (11, 13)])


def test_equal_scores_stay_equal_in_spite_of_float_noise():
    """0.1 + 0.7 and 0.7 + 0.1 differ by nothing, three of them in another order do."""
    example = listed("a", (1, 2), a=(0.1, 0.3), b=(0.2, 0.2), c=(0.3, 0.1))
    (found,) = shaped([example], scoring={"score_from": ["a", "b", "c"], "standardise": False})
    assert found.scores[0] == found.scores[1]


def test_an_attribute_that_is_not_there_is_named_or_counted():
    with pytest.raises(ScoreError, match=r"no example has all of help, honesty; there is: help, honest"):
        shaped(TWO, scoring={"score_from": ["help", "honesty"]})
    mixed = [*TWO, listed("c", (1, 2), help=(1, 2)), listed("d", None, texts=("x", "y"))]
    result = shape_splits({"train": mixed}, Shaping(Scoring(score_from=("help", "honest"))))
    assert [example.example_id for example in result.splits["train"]] == ["a", "b", "d"]  # d is unscored, and passes
    assert result.counts["shape/train"].dropped == {"no attribute 'honest'": 1}
    with pytest.raises(DataError, match="c: no attribute 'honest'"):
        shaped(mixed, scoring={"score_from": ["help", "honest"]}, strict=True)
    flat = [listed("a", (1, 2), help=(3, 3), honest=(1, 2))]
    with pytest.raises(ScoreError, match="help: scores cannot be standardised: every one is 3"):
        shaped(flat, scoring={"score_from": ["help", "honest"]})


# --- responses ---


def many(n=60, k=6):
    """Lists of distinct scores 1 … k, turned round by i; attribute and extra follow the score."""
    found = []
    for i in range(n):
        scores = tuple(float((i + j) % k + 1) for j in range(k))
        found.append(listed(f"e{i}", scores, twice=[2 * s for s in scores], extras={"own": scores, "tools": [1]}))
    return found


def test_a_selected_pair_keeps_what_belongs_to_its_responses():
    (found,) = shaped(many(1, 4), picking={"select": "max_min"})
    assert found.responses == ("e0 3", "e0 0") and found.scores == (4.0, 1.0)
    assert found.attributes["twice"] == (8.0, 2.0) and found.extras == {"own": (4.0, 1.0), "tools": [1]}
    (found,) = shaped(many(1, 4), picking={"select": "max_max"})
    assert found.scores == (4.0, 3.0)


def test_selection_sees_the_penalised_score():
    example = listed("a", (9, 8, 2), texts=("x" * 1000, "y" * 100, "z" * 101))
    (penalised,) = shaped([example], scoring={"length_penalty": 0.01}, picking={"select": "max_min"})
    assert penalised.scores == pytest.approx((7.0, -1.0)) and penalised.responses[0][0] == "y"


def test_equal_scores_are_no_pair_and_are_counted():
    result = shape_splits(
        {"train": [listed("a", (5, 5, 1)), listed("b", (5, 4, 1))]}, Shaping(picking=Picking(select="max_max")),
        strict=True,
    )  # fmt: skip
    assert [example.example_id for example in result.splits["train"]] == ["b"]
    assert result.counts["shape/train"].dropped == {"tie: equal scores": 1}


@pytest.mark.parametrize(
    "picking", [{"select": "random"}, {"select": "max_random"}, {"sample": 3, "sample_beta": 2.0}, {"sample": 2}]
)
def test_draws_depend_on_the_seed_and_the_id_alone(picking):
    def drawn(examples, seed):
        return {example.example_id: example.responses for example in shaped(examples, picking=picking, seed=seed)}

    assert drawn(many(), 1) == drawn(many()[::-1], 1) != drawn(many(), 2)
    places = {tuple(text.split()[1] for text in texts) for texts in drawn(many()[::6], 1).values()}
    assert len(places) > 1  # lists of the same scores: one draw for all would give one answer
    assert set(drawn(many()[10:20], 1).items()) <= set(drawn(many(), 1).items())


def test_a_sample_keeps_so_many_in_the_order_of_the_source():
    for example in shaped(many(), picking={"sample": 3, "sample_beta": 5.0}):
        places = [int(text.split()[1]) for text in example.responses]
        assert len(places) == 3 and places == sorted(places)
        assert example.extras["own"] == example.scores == tuple(v / 2 for v in example.attributes["twice"])
    short = many(5, 2)
    assert shaped(short, picking={"sample": 3}) == short


def test_temperature_decides_how_good_the_sample_is():
    def mean(**picking):
        return fmean(score for example in shaped(many(), picking={"sample": 2, **picking}) for score in example.scores)

    assert mean(sample_beta=0.0) == 5.5  # 6 and 5 of each list
    assert mean(sample_beta=math.inf) == pytest.approx(3.5, abs=4 * 1.1 / math.sqrt(60))
    assert mean() == mean(sample_beta=0.5) and 4.5 < mean() < 5.5


def test_a_pair_is_selected_from_the_sample():
    sampled = {e.example_id: e.scores for e in shaped(many(), picking={"sample": 3, "sample_beta": 9.0})}
    for example in shaped(many(), picking={"sample": 3, "sample_beta": 9.0, "select": "max_min"}):
        own = sampled[example.example_id]
        assert example.scores == (max(own), min(own))


# --- examples ---


def test_the_top_share_of_a_column_goes_by_a_bound_of_the_training_examples():
    train = [listed(f"t{i}", (2, 1), extras={"ches": float(i)}) for i in range(10)]
    other = [listed(f"v{i}", (2, 1), extras={"ches": float(i)}) for i in (7, 8)]
    result = shape_splits({"train": train[::-1], "valid": other}, Shaping(picking=Picking(drop_top="ches:0.2")))
    assert {e.example_id for e in result.splits["train"]} == {f"t{i}" for i in range(8)}
    assert [e.example_id for e in result.splits["valid"]] == ["v7"]
    assert result.counts["shape/valid"].dropped == {"among the highest of drop_top": 1} and not result.notes


def test_of_a_column_with_a_number_a_response_the_highest_of_the_selected_counts():
    rude = [listed(f"e{i}", (3, 2, 1), rude=(0, 9 if i == 2 else 1, 100)) for i in range(4)]
    kept = shaped(rude, picking={"select": "max_max", "drop_top": "rude:0.25"})
    assert [example.example_id for example in kept] == ["e0", "e1", "e3"]


def test_a_filter_that_ties_defeat_says_so():
    rows = [listed(f"e{i}", (2, 1), rude=(3, 3)) for i in range(10)]
    result = shape_splits({"train": rows}, Shaping(picking=Picking(drop_top="rude:0.3")))
    assert len(result.splits["train"]) == 10 and "rude:0.3 meant 3 of 10 examples and took 0" in result.notes[0]


def test_a_column_that_is_missing_is_named_or_counted():
    rows = [listed("a", (2, 1), extras={"ches": 1.0}), listed("b", (2, 1)), listed("c", (2, 1), extras={"ches": 0})]
    with pytest.raises(ScoreError, match=r"no example has chess, .* there is: ches"):
        shaped(rows, picking={"drop_top": "chess:0.1"})
    result = shape_splits({"train": rows}, Shaping(picking=Picking(drop_top="ches:0.3")))
    assert result.counts["shape/train"].dropped["no number in the column 'ches'"] == 1


def judged():
    """Ten pairs the data call chosen first, whose gap under two models of deviations 1 and 10 is known."""
    gaps = (4, -3, 2, 1, 5, 6, 7, 8, 9, 10)
    return [listed(f"e{i}", (2, 1), one=(gap, 0), ten=(10 * gap + 3, 3)) for i, gap in enumerate(gaps)]


def test_the_weakest_preferences_go_or_are_turned_round():
    ensemble = {"strength_from": ["one", "ten"]}
    assert [e.example_id for e in shaped(judged(), picking={**ensemble, "weakest": "drop:0.2"})] == [
        f"e{i}" for i in (0, 2, 4, 5, 6, 7, 8, 9)
    ]
    turned = shape_splits({"train": judged()}, Shaping(picking=Picking(**ensemble, weakest="flip:0.1")))
    rows = turned.splits["train"]
    assert [e.example_id for e in rows if e.scores == (1.0, 2.0)] == ["e1"] and len(rows) == 10
    assert rows[1].responses == judged()[1].responses and rows[1].attributes == judged()[1].attributes
    assert turned.counts["shape/train"].notes == {"preference turned round (weakest)": 1}


def test_strength_is_of_the_preference_the_scores_state():
    """The same pairs with the responses exchanged, and their scores: nothing else may become weak."""
    mirrored = [
        dataclasses.replace(
            e, responses=e.responses[::-1], scores=e.scores[::-1],
            attributes={name: values[::-1] for name, values in e.attributes.items()},
        )
        for e in judged()
    ]  # fmt: skip
    picking = {"strength_from": ["one", "ten"], "weakest": "drop:0.2"}
    for rows in (judged(), mirrored):
        assert {e.example_id for e in shaped(rows, picking=picking)} == {f"e{i}" for i in range(10)} - {"e1", "e3"}


def test_models_of_different_scales_count_alike():
    """By raw gaps the loud model alone would say which pair is weakest."""
    rows = [listed("a", (2, 1), quiet=(-3, 0), loud=(100, 0)), listed("b", (2, 1), quiet=(3, 0), loud=(-1, 0))]
    kept = shaped(rows, picking={"strength_from": ["quiet", "loud"], "weakest": "drop:0.5"})
    quiet, loud = pstdev((-3, 0, 3, 0)), pstdev((100, 0, -1, 0))
    assert -3 / quiet + 100 / loud < 3 / quiet - 1 / loud  # else the test says nothing
    assert [e.example_id for e in kept] == ["b"]


def test_an_unscored_pair_is_turned_round_by_its_responses():
    bare = [dataclasses.replace(e, scores=None) for e in judged()]
    rows = shaped(bare, picking={"strength_from": ["one"], "weakest": "flip:0.1"})
    assert rows[1].responses == ("e1 1", "e1 0") and rows[1].attributes["one"] == (0.0, -3.0)
    assert [e.responses for e in rows[:1] + rows[2:]] == [e.responses for e in bare[:1] + bare[2:]]


def test_strength_is_of_pairs():
    rows = [*judged(), listed("l", (3, 2, 1), one=(1, 2, 3), ten=(1, 2, 3))]
    picking = {"strength_from": ["one"], "weakest": "drop:0.1"}
    result = shape_splits({"train": rows}, Shaping(picking=Picking(**picking)))
    assert result.counts["shape/train"].dropped["a list: strength is of pairs (make some with select)"] == 1
    pairs = shape_splits({"train": rows}, Shaping(picking=Picking(**picking, select="max_min")))
    assert set(pairs.counts["shape/train"].dropped) == {"among the weakest preferences"}


# --- what cannot be ---


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"combine": "min"}, "score_from"),
        ({"score_from": ["a"], "combine": "min"}, "two or more"),
        ({"score_from": ["a", "b"], "combine": "best"}, "uwo:LAMBDA"),
        ({"score_from": ["a", "b"], "combine": "mean:2"}, "takes no number"),
        ({"score_from": ["a", "b"], "combine": "uwo:-1"}, "0 or more"),
        ({"score_from": ["a", "b"], "combine": "log_sigmoid:2"}, "0 to 1"),
        ({"score_from": ["a", "a"]}, "once"),
        ({"standardise": True}, "give score_from"),
        ({"direction": "a*80 + b*60", "score_from": ["a"]}, "keep one"),
        ({"direction": "a*80"}, "add up to 1"),
        ({"length_penalty": 0}, "above 0"),
        ({"length_penalty": math.inf}, "above 0|finite"),
        ({"sample": 1}, "at least 2"),
        ({"sample_beta": 1.0}, "sample"),
        ({"sample": 4, "sample_beta": -1}, "0 or more"),
        ({"sample": 2, "select": "max_min"}, "a pair already"),
        ({"select": "best"}, "max_random, max_min, max_max"),
        ({"select": "max_min_p:0.1"}, "length_penalty LAMBDA with select max_min"),
        ({"select": "max_min:0.1"}, "one of random, max_random"),
        ({"drop_top": "ches"}, "COLUMN:SHARE"),
        ({"drop_top": "ches:1"}, "between 0 and 1"),
        ({"weakest": "drop:0.1"}, "give both"),
        ({"strength_from": ["a"]}, "give both"),
        ({"strength_from": ["a"], "weakest": "soften:0.1"}, "drop:SHARE or flip:SHARE"),
        ({"select": "max_min", "ties": "keep"}, "ties keep"),
        ({"strength_from": ["a"], "weakest": "flip:0.1", "attributes": ["a"]}, "use drop"),
    ],
)
def test_contradictions_are_refused_before_data_are_read(options, why):
    """In the library, the configuration and the command; there is no such data, and nobody finds out."""
    own = {name: value for name, value in options.items() if name not in ("ties", "attributes")}
    ties = {"ties": options["ties"]} if "ties" in options else {}
    recipe = {**own, "attributes": options.get("attributes", [])}
    with pytest.raises(UsageError, match=why):
        relabel_sources([SourceSpec("nowhere.jsonl")], recipe, **ties)
    base = {"model": {"path": "m"}, "data": {"source": "nowhere.jsonl"}, "relabel": options}
    with pytest.raises(ConfigError, match=why):
        load_config(base=base)
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value))
        if word != "True"
    ]
    ran = CliRunner().invoke(cli.main, ["relabel", "nowhere.jsonl", "--preview", "1", *words])
    assert ran.exit_code == 2 and "nowhere" not in ran.stderr, ran.stderr


# --- three doors, one set of names ---


def test_library_command_and_configuration_have_the_same_options():
    command = cli.main.get_command(click.Context(cli.main), "relabel")
    flags = {p.name for p in command.params}
    names = {*SCORING, *PICKING}
    assert names <= flags and names <= set(RelabelSection.model_fields)
    assert not names & set(inspect.signature(relabel_all).parameters)
    for record in (Scoring(), Picking()):
        for entry in dataclasses.fields(record):
            if entry.name != "fitted":
                assert getattr(RelabelSection(), entry.name) == entry.default


@pytest.mark.parametrize("name", [*SCORING, *PICKING])
def test_the_help_shows_each_option_with_an_example(name):
    command = cli.main.get_command(click.Context(cli.main), "relabel")
    option = next(p for p in command.params if p.name == name)
    assert "e.g." in option.help or "'helpfulness*80" in option.help, option.help


def rows_of_lists(n=24, k=4):
    """Lists as a file has them: two attributes of their own, hardly a tie, texts of different lengths."""
    return [
        {
            "prompt": f"question {i // 2}",
            "id": f"r{i}",
            "responses": [
                {"text": "x" * (1 + 7 * ((i * j) % 5)) + f" {i} {j}", "score": 1 + (i + 3 * j) % 10,
                 "attributes": {"help": 1 + (i + j) % 5 + i * j / 100, "honest": 1 + (4 * i + 3 * j) % 5 - j / 100}}
                for j in range(k)
            ],
        }
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    file = tmp_path / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of_lists()), encoding="utf8")
    return file


def run(*arguments):
    return CliRunner().invoke(cli.main, ["relabel", *map(str, arguments)], catch_exceptions=False)


WORDS = (
    "--score-from", "help,honest", "--combine", "uwo:0.1", "--length-penalty", "0.01", "--sample", "3",
    "--sample-beta", "2", "--select", "max_random", "--drop-top", "help:0.1", "--strength-from", "help,honest",
    "--weakest", "flip:0.1", "--no-standardise",
)  # fmt: skip
SECTION = {
    "score_from": ["help", "honest"], "combine": "uwo:0.1", "length_penalty": 0.01, "sample": 3, "sample_beta": 2.0,
    "select": "max_random", "drop_top": "help:0.1", "strength_from": ["help", "honest"], "weakest": "flip:0.1",
    "standardise": False,
}  # fmt: skip


def test_command_library_and_run_make_the_same_rows(lists, tmp_path, chat_tokenizer):
    assert run(lists, "--out", tmp_path / "out", "--seed", 3, *WORDS).exit_code == 0
    folder = read_relabelled(tmp_path / "out")
    made = relabel_sources([SourceSpec(str(lists))], SECTION, seed=3)
    assert folder.read() == made.splits["train"] and folder.options["picking"] == made.options["picking"]
    base = {"model": {"path": "m"}, "training": {"seed": 3}}
    own = load_config(base={**base, "data": {"source": str(lists)}, "relabel": SECTION})
    stored = load_config(base={**base, "data": {"source": str(tmp_path / "out")}})
    fingerprints = [prepare(config, tokenizer=chat_tokenizer).fingerprint for config in (own, stored)]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("name", sorted(SECTION))
def test_every_option_changes_what_is_written(lists, name):
    """Finds one that is parsed, stored and forgotten."""
    needs = {
        "sample_beta": ["sample"], "combine": ["score_from"], "standardise": ["score_from"],
        "strength_from": ["weakest"], "weakest": ["strength_from"],
    }.get(name, [])  # fmt: skip
    given = {key: SECTION[key] for key in (name, *needs)}
    less = {key: given[key] for key in needs} if name in ("sample_beta", "combine", "standardise") else {}
    pairs = {} if name.startswith(("sample", "select")) else {"select": "max_min"}

    def rows(options):
        return relabel_sources([SourceSpec(str(lists))], {**pairs, **options}).splits["train"]

    assert rows(given) != rows(less)


def test_the_folder_says_how_scores_were_made_and_a_recipe_scores_alike(lists, tmp_path):
    """Standardised by themselves, other rows would mean something else by the same goal."""
    assert run(lists, "--out", tmp_path / "one", *WORDS[:4], "--length-penalty", "dice").exit_code == 0
    stored = read_relabelled(tmp_path / "one").options["scoring"]
    scoring = Scoring.from_dict(stored)
    help_scores = [r["attributes"]["help"] for row in rows_of_lists() for r in row["responses"]]
    assert scoring.fitted.standards["help"] == pytest.approx((fmean(help_scores), pstdev(help_scores)))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows_of_lists()[:3]), encoding="utf8")
    assert run(few, "--out", tmp_path / "two", "--recipe", tmp_path / "one").exit_code == 0
    one, two = read_relabelled(tmp_path / "one"), read_relabelled(tmp_path / "two")
    first = [row for row in one.read() if row.example_id in ("r0", "r1", "r2")]
    assert two.read() == first and two.options["scoring"] == stored
    clash = run(few, "--out", tmp_path / "three", "--recipe", tmp_path / "one", "--combine", "min")
    assert clash.exit_code == 2 and "--combine" in clash.stderr


def test_valid_rows_beside_a_folder_are_shaped_as_its_own(lists, tmp_path, chat_tokenizer):
    """Finds validation rows whose goals are of other scores than those that are trained on."""
    assert run(lists, "--out", tmp_path / "out", "--seed", 3, *WORDS).exit_code == 0
    base = {"model": {"path": "m"}, "data": {"source": str(tmp_path / "out"), "valid": str(lists)}}
    found = prepare(load_config(base=base), tokenizer=chat_tokenizer)
    assert [(r.example_id, r.goal, r.scores) for r in found.valid] == [
        (r.example_id, r.goal, r.scores) for r in found.train
    ]


def test_what_was_stored_is_read_back_equal(lists):
    made = relabel_sources([SourceSpec(str(lists))], SECTION | {"combine": "log_sigmoid", "length_penalty": "dice"})
    stored = json.loads(json.dumps(made.options))
    for kind, name in ((Scoring, "scoring"), (Picking, "picking")):
        found = kind.from_dict(stored[name])
        assert found.fitted is not None and found.as_dict() == made.options[name]
        with pytest.raises(DataError, match="damaged"):
            kind.from_dict({"no such": 1})
    options = {"scoring": stored["scoring"], "picking": stored["picking"]}
    assert relabel_sources([SourceSpec(str(lists))], made.recipe, **options).splits == made.splits
    few = lists.with_name("few.jsonl")
    few.write_text("".join(json.dumps(row) + "\n" for row in rows_of_lists()[:6]), encoding="utf8")
    again = relabel_sources([SourceSpec(str(few))], made.recipe, **options)  # by the bounds of the first
    ids = {f"r{i}" for i in range(6)}
    assert again.splits["train"] == [row for row in made.splits["train"] if row.example_id in ids]
    assert again.options["picking"] == made.options["picking"]
    with pytest.raises(UsageError, match="twice"):
        relabel_sources([SourceSpec("nowhere")], SECTION, picking=Picking(select="max_min"))


def test_the_order_of_rows_in_the_file_does_not_matter(lists, tmp_path):
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(lists.read_text().splitlines()[::-1]) + "\n")
    by_id = [
        {(row.example_id, row.half): row for row in relabel_sources([SourceSpec(str(file))], SECTION).splits["train"]}
        for file in (lists, turned)
    ]
    assert by_id[0] == by_id[1] and len(by_id[0]) > 20


def test_options_at_their_defaults_leave_every_byte(lists, tmp_path):
    defaults = {entry.name: entry.default for kind in (Scoring, Picking) for entry in dataclasses.fields(kind)}
    del defaults["fitted"]
    for name, options in (("one", {}), ("two", defaults)):
        made = relabel_sources([SourceSpec(str(lists))], options)
        write_relabelled(
            tmp_path / name, made.splits, made.recipe, counts=made.counts, written_with=made.options
        )
    for file in ("train.jsonl", "recipe.json"):
        text = (tmp_path / "one" / file).read_bytes()
        assert text == (tmp_path / "two" / file).read_bytes() and b"scoring" not in text and b"shape/" not in text


def test_a_direction_names_the_score_in_the_prompt(lists):
    """Ratings of 1–5 along (0.8, 0.6): the goal's words, and a scale that is the ratings' no more."""
    made = relabel_sources([SourceSpec(str(lists))], {"direction": "help*80 + honest*60"})
    row = made.splits["train"][0]
    assert "\nWeighted rating help*80 + honest*60: " in row.goal_text and "Overall" not in row.goal_text
    assert made.recipe.goal_text(10).endswith(": 10.") and made.recipe.mapping.kind == "affine"
    own = relabel_sources(
        [SourceSpec(str(lists))], {"direction": "help*80 + honest*60", "template": "Aim at {score}."}
    )
    assert own.splits["train"][0].goal_text.startswith("Aim at ")
    assert "\nA{b} of {score}: 7." in fit_recipe([listed("a", (1, 9))], called="A{b} of {score}").goal_text(7)


def test_the_scale_of_ratings_is_kept_while_scores_are_ratings(tmp_path):
    """HelpSteer2's 0–4 is true of a mean or a minimum, and of nothing that is standardised or shortened."""
    file = tmp_path / "steer.jsonl"
    rows = [
        {"prompt": f"q{i}", "response": f"{i} {j}", "helpfulness": 1 + j, "correctness": (i + j) % 3}
        for i in range(6)
        for j in range(2)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def score_range(**options):
        return relabel_sources([SourceSpec(str(file))], options).recipe.score_range

    both = {"score_from": ["helpfulness", "correctness"]}
    assert score_range() == score_range(score_from=["correctness"]) == (0, 4)
    assert score_range(**both, combine="min", standardise=False) == (0, 4)
    assert score_range(**both) is score_range(**both, combine="uwo", standardise=False) is None
    assert score_range(length_penalty=0.01) is score_range(direction="helpfulness*80 + correctness*60") is None
    assert score_range(**both, attributes=["helpfulness"]) == (0, 4)  # goals are of the ratings themselves
    assert score_range(**both, score_range=[-3, 3]) == (-3, 3)


def test_a_rating_taken_as_the_score_brings_its_own_scale(tmp_path):
    """UltraFeedback's score goes to 10, its ratings to 5: a best honesty of 5 must not be goal 5 of 10."""
    answers = [
        {
            "response": f"answer {n}",
            "overall_score": 2 * n,
            "annotations": {
                name: {"Rating": str(n)} for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")
            },
        }
        for n in (5, 2)
    ]
    file = tmp_path / "ultra.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completions": answers}) + "\n")
    goals = {
        name: [row.goal for row in relabel_sources([SourceSpec(str(file))], {"score_from": [name]}).splits["train"]]
        for name in ("honesty", "overall")
    }
    assert goals == {"honesty": [10.0, 3.25], "overall": [10.0, 4.0]}


def test_unconditioned_rows_are_shaped_too(lists):
    made = relabel_sources([SourceSpec(str(lists))], Recipe(), plain_share=1.0, picking=Picking(select="max_min"))
    assert made.recipe is None and all(len(row.responses) == 2 for row in made.splits["train"])
    assert made.options["picking"] == {"select": "max_min", "fitted": None}


def test_the_command_says_what_went_and_what_was_fitted(lists):
    result = run(lists, "--preview", 1, "--select", "max_max", "--drop-top", "help:0.1", "--length-penalty", "dice")
    assert result.exit_code == 0, result.output
    assert "scoring: length_penalty dice; fitted alpha 0" in result.stderr
    assert "picking: select max_max; drop_top help:0.1; fitted highest" in result.stderr
    options = {"select": "max_max", "drop_top": "help:0.1", "length_penalty": "dice"}
    made = relabel_sources([SourceSpec(str(lists))], options)
    gone = sum(made.counts["shape/train"].dropped.values()) + sum(made.counts["relabel/train"].dropped.values())
    line = next(line for line in result.stdout.splitlines() if line.startswith("train"))
    assert line.split()[1:3] == ["24", str(gone)]
