"""The recipe: words, numbers, carrier, scale. Witnesses are the seed's sentence, typed out, and numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.data.fitting import fit_recipe
from mlxpref.data.recipe import Recipe, format_number, goal_words, resolve_carrier
from mlxpref.data.scale import MAX_KNOTS, ScoreMap, fit_map
from mlxpref.errors import DataError, ScoreError, UsageError
from mlxpref.records import Message, Scored

SEED = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the "
    "following target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: "
)

ASK = (Message("user", "Why is the sky blue?"),)
TALK = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))


def scored(scores, example_id="a", prompt=ASK, **more):
    responses = tuple(f"answer {i}" for i in range(len(scores or (0, 0))))
    return Scored(
        prompt, responses, None if scores is None else tuple(map(float, scores)), example_id, **more
    )


# --- numbers ---


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (8.0, None, "8"),
        (8, None, "8"),
        (8.5, None, "8.5"),
        (7.3333333, None, "7.3333333"),
        (np.float64(8.5), None, "8.5"),  # numpy's own repr would be "np.float64(8.5)"
        (-0.0, None, "0"),
        (8, 1, "8.0"),
        (8.46, 1, "8.5"),
        (8.46, 0, "8"),
        (-0.01, 1, "0.0"),
    ],
)
def test_numbers_are_written_as_the_seed_writes_them(value, decimals, text):
    assert format_number(value, decimals) == text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_goal_that_is_no_number_is_refused(value):
    with pytest.raises(ScoreError):
        format_number(value)


# --- words and carrier ---


def test_default_words_are_the_seeds():
    prompt, text = Recipe().write(ASK, 8.0)
    assert text == SEED + "8."
    assert prompt == (Message("system", SEED + "8."), *ASK)


def test_an_existing_system_text_follows_the_goal_after_a_blank_line():
    """A second system message in front, as the released code inserts, is an error in many templates."""
    prompt, _ = Recipe().write((Message("system", "Be brief."), *TALK), 5.5)
    assert prompt == (Message("system", SEED + "5.5.\n\nBe brief."), *TALK)


def test_a_developer_message_is_the_system_message_of_its_template():
    prompt, _ = Recipe().write((Message("developer", "Be brief."), *ASK), 5.5)
    assert prompt == (Message("developer", SEED + "5.5.\n\nBe brief."), *ASK)


def test_the_first_user_turn_carries_the_goal_where_there_is_no_system_role():
    prompt, _ = Recipe(carrier="first_user").write(TALK, 5.5)
    assert prompt == (Message("user", SEED + "5.5.\n\nHi"), *TALK[1:])


def test_what_else_a_turn_holds_stays():
    turn = Message("user", "Hi", {"name": "Ann"})
    prompt, _ = Recipe(carrier="first_user").write((turn,), 3)
    assert prompt[0].extra == {"name": "Ann"}


@pytest.mark.parametrize("carrier", ["system", "first_user"])
@pytest.mark.parametrize("talk", [ASK, TALK, (Message("system", "Be brief."), *TALK)])
def test_write_and_erase_are_inverse_and_leave_their_input_alone(carrier, talk):
    recipe = Recipe(carrier=carrier)
    before = [m.as_dict() for m in talk]
    prompt, text = recipe.write(talk, 7.3333333)
    assert sum(m.content.count(text) for m in prompt) == 1
    assert recipe.erase(prompt) == talk
    assert [m.as_dict() for m in talk] == before
    assert recipe.write(recipe.erase(prompt), 2)[0] == recipe.write(talk, 2)[0]


def test_a_goal_is_never_stated_twice():
    recipe = Recipe()
    prompt, _ = recipe.write(ASK, 8)
    with pytest.raises(DataError, match="already states a goal"):
        recipe.write(prompt, 3)


def test_a_quoted_goal_is_the_users_text():
    """A prompt that talks about the sentence keeps it, and the goal comes before it."""
    quoted = (Message("user", f"What does this mean? {SEED}9."),)
    for carrier in ("system", "first_user"):
        recipe = Recipe(carrier=carrier)
        assert not recipe.states_goal(quoted)
        prompt, text = recipe.write(quoted, 9)
        whole = "\n".join(m.content for m in prompt)
        assert whole.startswith(text) and whole.count(text) == 2
        assert recipe.erase(prompt) == quoted


def test_a_prompt_without_a_user_turn_cannot_carry_in_one():
    with pytest.raises(DataError, match="no user turn"):
        Recipe(carrier="first_user").write((Message("system", "Be brief."),), 3)


def test_attributes_get_a_line_each_after_the_seeds_first_sentence():
    recipe = Recipe(
        template=fit_recipe(
            [scored((3, 2), attributes={"instruction_following": (5.0, 1.0)})],
            attributes=["overall", "instruction_following"],
        ).template,
        attributes=("overall", "instruction_following"),
    )
    text = recipe.goal_text({"instruction_following": 4.5, "overall": 8})
    assert text == SEED + "8.\nInstruction following: 4.5."
    assert recipe.top_goal == {"overall": 10, "instruction_following": 10}


def test_own_template_by_attribute_name_and_with_braces():
    recipe = Recipe(template='{{"help": {helpfulness}, "top": {high}}}', attributes=("helpfulness",))
    assert recipe.goal_text({"helpfulness": 3}) == '{"help": 3, "top": 10}'
    assert recipe.states_goal(recipe.write(ASK, {"helpfulness": 3})[0])


@pytest.mark.parametrize(
    ("template", "attributes", "why"),
    [
        ("Be good.", (), "exactly once"),
        ("{score} {score}", (), "exactly once"),
        ("{scre}", (), "score"),
        ("{score", (), "brace"),
        ("{score:.2f}", (), "no format"),
        ("{score}\n", (), "space around"),
        ("{score}", ("honesty",), "honesty"),
        ("{goals}", (), "score"),
        ("{goals} {honesty}", ("honesty",), "exactly once"),
        ("{goals}", ("low",), "placeholder"),
    ],
)
def test_a_template_that_would_not_state_the_goal_once_is_refused(template, attributes, why):
    with pytest.raises(UsageError, match=why):
        Recipe(template=template, attributes=attributes)


@pytest.mark.parametrize(
    ("recipe", "goal"),
    [
        (Recipe(), 11),
        (Recipe(), 0.5),
        (Recipe(), math.nan),
        (Recipe(), {"honesty": 3}),
        (Recipe(template="{goals}", attributes=("honesty",)), 3),
        (Recipe(template="{goals}", attributes=("honesty",)), {"helpfulness": 3}),
    ],
)
def test_a_goal_off_the_scale_the_text_names_is_refused(recipe, goal):
    with pytest.raises(UsageError, match="this recipe"):
        recipe.write(ASK, goal)


def test_resolve_carrier_asks_the_template(chat_tokenizer, no_system_tokenizer, plain_tokenizer):
    assert resolve_carrier(chat_tokenizer) == "system"
    assert resolve_carrier(no_system_tokenizer) == "first_user"
    assert resolve_carrier(plain_tokenizer) == "first_user"


@pytest.mark.parametrize("hears", [lambda turns: False, lambda turns: turns == 2])
def test_a_template_that_drops_the_system_text_is_no_system_role(hears):
    """It raises nothing, so asking only for errors would lose the goal of every row (or every long one)."""

    class Deaf:
        chat_template = "x"

        def apply_chat_template(self, messages, **_):
            return "".join(m["content"] for m in messages if m["role"] != "system" or hears(len(messages)))

    assert resolve_carrier(Deaf()) == "first_user"


# --- scale ---


def test_scores_already_on_the_goal_scale_stay():
    recipe = fit_recipe([scored((9, 2.5))])
    assert recipe.mapping.kind == "identity"
    assert recipe.scores(scored((9, 2.5))) == (9.0, 2.5)


@pytest.mark.parametrize(
    ("scores", "kind"), [((8.3, 1), "identity"), ((8.2, 1), "affine"), ((5, 1), "affine"), ((11, 9), "affine")]
)
def test_undeclared_scores_stay_only_if_they_reach_near_the_top(scores, kind):
    """Stars 1-5 taken for 1-10 leave the goal 10, which generation asks for, untrained."""
    recipe = fit_recipe([scored(scores)])
    assert recipe.mapping.kind == kind
    assert kind == "identity" or recipe.mapping(scores[0]) == 10


def test_a_declared_range_is_stretched_onto_the_goals():
    recipe = fit_recipe([scored((5, 2))], score_range=(1, 5))
    assert [recipe.mapping(v) for v in (1, 2, 3, 5)] == [1.0, 3.25, 5.5, 10.0]
    recipe = fit_recipe([scored((4, 0))])  # HelpSteer's 0-4 is off 1-10, so it is fitted as seen
    assert recipe.mapping.kind == "affine" and recipe.scores(scored((4, 0, 2))) == (10.0, 1.0, 5.5)


def test_float_noise_never_reaches_the_text():
    """1 + (3.4 - 1) * 9 / 4 is 6.3999999999999995 in binary."""
    recipe = fit_recipe([scored((5, 2))], score_range=(1, 5))
    text = recipe.goal_text(recipe.mapping(3.4))
    assert text.endswith("Overall score: 6.4.")


def test_a_score_off_the_declared_scale_is_an_error_and_one_beyond_a_fitted_one_is_its_end():
    declared = fit_recipe([scored((5, 2))], score_range=(1, 5))
    with pytest.raises(ScoreError, match=r"score 6 is off the scale 1-5"):
        declared.scores(scored((6, 2)))
    with pytest.raises(ScoreError, match=r"score 12 is off the scale 1-10"):
        Recipe().scores(scored((12, 2)))
    fitted = fit_recipe([scored((0, 100))])
    assert fitted.scores(scored((120, -3))) == (10.0, 1.0)


def test_identity_takes_the_declared_range_for_the_text_and_refuses_two_ranges():
    recipe = fit_recipe([scored((5, 2))], score_range=(1, 5), mapping="identity")
    assert "scale of 1-5" in recipe.goal_text(3) and recipe.top_goal == 5
    with pytest.raises(UsageError, match="make the ranges equal"):
        fit_recipe([scored((5, 2))], score_range=(1, 5), goal_range=(1, 10), mapping="identity")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=400).filter(lambda v: len(set(v)) > 1))
def test_rank_map_keeps_order_and_meets_both_ends(scores):
    mapping = fit_map(scores, kind="quantile", score_range=None, goal_range=(1.0, 10.0))
    goals = [mapping(s) for s in sorted(scores)]
    assert goals == sorted(goals) and goals[0] == 1.0 and goals[-1] == 10.0
    assert len(mapping.knots) <= MAX_KNOTS + 1


def test_rank_map_spreads_skewed_scores_evenly():
    scores = np.exp(np.random.default_rng(0).normal(size=2001) * 3)
    mapping = fit_map(scores.tolist(), kind="quantile", score_range=None, goal_range=(0.0, 1.0))
    middle = float(np.median(scores))
    assert abs(mapping(middle) - 0.5) < 0.01
    found = np.histogram([mapping(s) for s in scores], bins=5, range=(0, 1))[0]
    assert found.min() > 380 and found.max() < 420


def test_attributes_share_one_scale_and_the_overall_score_keeps_its_own():
    """Fitted one by one, an attribute nobody rated 0 would be read on another scale than the rest."""
    rows = [scored((9, 3), attributes={"help": (4.0, 2.0), "verbosity": (0.0, 3.0)})]
    recipe = fit_recipe(rows, attributes=["overall", "help", "verbosity"])
    assert recipe.goals(rows[0]) == ((9.0, 10.0, 1.0), (3.0, 5.5, 7.75))


@pytest.mark.parametrize(
    ("rows", "options", "error", "why"),
    [
        ([scored(None)], {}, ScoreError, "--columns"),
        ([scored((0, 0))], {}, ScoreError, "--score-range"),
        ([scored((5, 2))], {"attributes": ["helpfulness"]}, ScoreError, "there is: none"),
        ([scored((5, 2))], {"score_range": (5, 1)}, UsageError, "rising"),
        ([scored((5, 2))], {"mapping": "log"}, UsageError, "unknown mapping"),
        ([scored((5, 2))], {"goal_range": (1.5, 9), "number_format": 0}, UsageError, "decimals"),
        ([scored((5, 2))], {"carrier": "user"}, UsageError, "carrier"),
        ([scored((5, 2))], {"top_goal": 12}, UsageError, "12"),
    ],
)
def test_a_recipe_that_cannot_be_fitted_says_why(rows, options, error, why):
    with pytest.raises(error, match=why):
        fit_recipe(rows, **options)


# --- files ---


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(carrier="first_user", number_format=1, top_goal=9.5, score_range=(0.0, 1.0)),
        fit_recipe([scored((0.1, 0.7)), scored((0.3, 0.2))], mapping="quantile"),
        fit_recipe([scored((9, 3), attributes={"help": (4.0, 2.0)})], attributes=["overall", "help"]),
    ],
)
def test_a_stored_recipe_is_the_same_recipe(recipe):
    stored = json.loads(json.dumps(recipe.as_dict()))
    assert Recipe.from_dict(stored) == recipe


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"template": "no goal"},
        {"mapping": {"kind": "affine"}},
        {"mapping": {"kind": "affine", "knots": [[2, 1], [1, 2]], "decimals": 2}},
        {"goal_range": [10, 1]},
        {"goal_range": None},
        {"unknown": 1},
        {"attribute_mappings": 3},
    ],
)
def test_a_damaged_recipe_is_a_data_error(change):
    with pytest.raises(DataError):
        Recipe.from_dict(Recipe().as_dict() | change)


def test_a_map_that_is_not_monotone_is_refused():
    with pytest.raises(DataError, match="rise"):
        ScoreMap("affine", ((0.0, 5.0), (1.0, 3.0)))


def test_goals_in_words_are_the_numbers_of_the_prompt():
    assert goal_words(7.3333333) == "goal 7.3333333"
    assert goal_words({"honesty": 4.0, "help": 5.5}) == "goal honesty 4, help 5.5"
    assert goal_words(None) == "no goal"
