"""Evaluation against figures computed by hand: plain Python, from token ids and tables alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_backend
import fakes
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.config_layers import load_config
from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, Recipe
from mlxpref.data.relabel import relabel, unconditioned
from mlxpref.data.relabelled import write_relabelled
from mlxpref.data.tokenization import tokenize_all
from mlxpref.errors import DataError
from mlxpref.evaluate import VIEWS, evaluate, in_goal_units, restore, views_of
from mlxpref.evaluate.measures import Judged, Roles, goal_sensitivity, view_metrics
from mlxpref.records import Dropped, Message, Scored
from mlxpref.reference import ReferenceStore
from mlxpref.train import train

WORDING = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the "
    "following target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\n"
    "Overall score: {}."
)
"""Written out here again, so that a change of the recipe's words shows."""


def scored(question: str, responses: Sequence[str], scores: Sequence[float] | None, **more: Any) -> Scored:
    return Scored(
        (Message("user", question),),
        tuple(responses),
        None if scores is None else tuple(map(float, scores)),
        question,
        **more,
    )


PAIRS = [
    scored("What is the capital of France?", ["Paris.", "I do not know that."], [9, 4]),
    scored("Tell me a story.", ["Once upon a time there was a cat.", "No."], [8, 7.5]),
    scored("Say hello.", ["Hello!", "The dog said hello to the cat in the park."], [10, 9]),
    scored("Is it so?", ["I think it is not, but who am I to say?", "It is."], [3, 6]),
]
LISTS = [
    scored("Count.", ["One two.", "One.", "One two three.", "Nothing at all"], [6, 2, 9, 2]),
    scored("Name a pet.", ["A cat.", "A dog and a cat.", "Hm"], [7, 5, 1]),
]


def make_policy() -> fakes.FakePolicy:
    return fakes.FakePolicy(fakes.table(1), fakes.table(2))


def ids_by_hand(tokenizer: Any, question: str, goal: float | None, response: str) -> tuple[list[int], list[int]]:
    """Prompt and response ids as ChatML spells them."""
    system = "" if goal is None else f"<|im_start|>system\n{WORDING.format(f'{goal:g}')}<|im_end|>\n"
    text = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    encode = tokenizer.encode
    return encode(text, add_special_tokens=False), encode(response + "<|im_end|>", add_special_tokens=False)


# --- the figures by themselves ---


def judged(source: int, pairs: Any, policy: Any, reference: Any, lengths: Any, own: Any = ()) -> Judged:
    arrays = [np.array(x, float) for x in (policy, reference)]
    return Judged(source, pairs, *arrays, np.array(lengths), own)


ROLES = [Roles(0, (1,), (8.0, 5.0)), Roles(1, (0,), (2.0, 9.0)), Roles(0, (1,), (6.0, 5.5))]
CHOSEN = [
    judged(0, ((0, 1),), (-10, -12), (-11, -11), (4, 2), (0,)),  # log-ratios 1, -1: margin 2
    judged(1, ((1, 0),), (-5, -9), (-6, -7), (5, 1), (1,)),  # 1, -2: margin -3
    judged(2, ((0, 1),), (-3, -2), (-3.5, -2), (1, 4), (0,)),  # 0.5, 0: margin 0.5
]
REJECTED = [
    judged(0, ((1, 0),), (-10.5, -10), (-11, -11), (4, 2), (1,)),  # 0.5, 1: margin 0.5
    judged(1, ((0, 1),), (-5, -8), (-6, -7), (5, 1), (0,)),  # 1, -1: margin 2
]


def test_a_view_by_hand() -> None:
    found = view_metrics(CHOSEN, ROLES, high_score=5.25, edges=(1.0, 3.0))
    assert found["rows"] == found["pairs"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["margin"] == pytest.approx((2 - 3 + 0.5) / 3)
    assert found["margin_error"] == pytest.approx(statistics.stdev([2, -3, 0.5]) / math.sqrt(3))
    # l_w > l_l: -10 > -12 yes, -9 > -5 no, -3 > -2 no; the reference's: -11 > -11 no, no, no
    assert found["ranking_accuracy"] == pytest.approx(1 / 3)
    assert found["reference_ranking_accuracy"] == 0
    # gaps 3 (on the edge: the lower bin), 7, 0.5
    assert found["by_gap"] == [
        {"above": 0.0, "to": 1.0, "pairs": 1, "accuracy": 1.0},
        {"above": 1.0, "to": 3.0, "pairs": 1, "accuracy": 1.0},
        {"above": 3.0, "to": None, "pairs": 1, "accuracy": 0.0},
    ]
    chosen, rejected, high = (found["change"][x] for x in ("chosen", "rejected", "high_score_rejected"))
    assert chosen == {
        "responses": 3,
        "sum": pytest.approx((1 - 2 + 0.5) / 3),
        "per_token": pytest.approx((1 / 4 - 2 / 1 + 0.5 / 1) / 3),
    }
    assert rejected["sum"] == pytest.approx((-1 + 1 + 0) / 3)
    assert rejected["per_token"] == pytest.approx((-1 / 2 + 1 / 5 + 0 / 4) / 3)
    assert high == {"responses": 1, "sum": 0.0, "per_token": 0.0}  # only the 5.5 reaches 5.25
    assert found["length"]["difference"] == pytest.approx((2 - 4 - 3) / 3)
    assert found["length"]["correlation"] == pytest.approx(statistics.correlation([2, -4, -3], [2, -3, 0.5]))


def test_roles_are_the_datas_in_every_view() -> None:
    """In the rejected half the other response is asked for; it is still the rejected one."""
    found = view_metrics(REJECTED, ROLES, high_score=None, edges=())
    assert found["change"]["chosen"]["sum"] == pytest.approx((0.5 - 1) / 2)
    assert found["change"]["rejected"]["sum"] == pytest.approx((1 + 1) / 2)
    assert found["change"]["high_score_rejected"] == {"responses": 0, "sum": None, "per_token": None}


def test_goal_sensitivity_by_hand() -> None:
    """Delta_wl(g = r_w) - Delta_wl(g = r_l): 2 - (0.5 - 1), and -3 - (-1 - 1); the third has one goal."""
    found = goal_sensitivity([*CHOSEN, *REJECTED])
    assert found["mean"] == pytest.approx((2.5 + -1) / 2)
    assert found["examples"] == 2
    assert found["error"] == pytest.approx(statistics.stdev([2.5, -1]) / math.sqrt(2))


def test_an_equal_log_ratio_is_not_right() -> None:
    """Finds: >= for >, which would call the untrained model right about everything."""
    row = judged(0, ((0, 1),), (-5, -5), (-5, -5), (1, 1))
    found = view_metrics([row], ROLES, high_score=None, edges=())
    assert found["accuracy"] == found["ranking_accuracy"] == found["margin"] == 0
    assert found["accuracy_error"] is None and found["length"]["correlation"] is None


def test_a_long_list_does_not_outvote_a_pair() -> None:
    pair = judged(0, ((0, 1),), (-1, -2), (-1, -1), (1, 1))  # right
    lists = judged(1, ((0, 1), (0, 2), (1, 2)), (-2, -1, -1), (-1, -1, -1), (1, 1, 1))  # 0 of 3
    found = view_metrics([pair, lists], [ROLES[0], Roles(0, (1, 2), None)], high_score=None, edges=())
    assert found["accuracy"] == 0.5 and found["pairs"] == 4


# --- views ---


def summary(found: Any) -> list[tuple[str, Any, tuple, tuple]]:
    assert not isinstance(found, Dropped), found
    return [(view.name, view.row.goal, view.pairs, view.own) for view in found]


def test_the_views_of_a_pair() -> None:
    assert summary(views_of(0, PAIRS[0], Recipe())) == [
        ("chosen", 9.0, ((0, 1),), (0,)),
        ("rejected", 4.0, ((1, 0),), (1,)),
        ("top", 10.0, ((0, 1),), ()),
        ("unconditioned", None, ((0, 1),), ()),
    ]


def test_a_pair_whose_first_is_worse_by_score() -> None:
    assert summary(views_of(0, PAIRS[3], Recipe()))[0] == ("chosen", 6.0, ((1, 0),), (1,))


def test_the_views_of_a_list() -> None:
    """Scores 6, 2, 9, 2: three goals, and nothing between the two that are equal."""
    found = {(name, goal): (pairs, own) for name, goal, pairs, own in summary(views_of(0, LISTS[0], Recipe()))}
    assert found["chosen", 9.0] == (((0, 1), (0, 3), (2, 0), (2, 1), (2, 3)), (2,))
    assert found["rejected", 6.0] == (((0, 1), (0, 2), (0, 3), (2, 1), (2, 3)), (0,))
    assert found["rejected", 2.0] == (((0, 2), (1, 0), (1, 2), (3, 0), (3, 2)), (1, 3))
    assert found["top", 10.0][0] == found["unconditioned", None][0] == found["chosen", 9.0][0]


def test_without_a_recipe_there_is_one_view() -> None:
    assert [name for name, *_ in summary(views_of(0, PAIRS[0], None))] == ["unconditioned"]


def test_unscored_data_have_no_halves() -> None:
    """The order of the data is all there is to go by; the highest goal can still be asked for."""
    example = replace(PAIRS[0], scores=None)
    assert summary(views_of(0, example, Recipe())) == [
        ("top", 10.0, ((0, 1),), ()),
        ("unconditioned", None, ((0, 1),), ()),
    ]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (replace(PAIRS[0], scores=(5.0, 5.0)), "tie"),
        (replace(PAIRS[0], responses=("Paris.", "Paris.")), "identical"),
        (replace(PAIRS[0], scores=(11.0, 5.0)), "off the scale"),
    ],
)
def test_an_example_that_prefers_nothing_is_dropped(example: Scored, reason: str) -> None:
    found = views_of(0, example, Recipe())
    assert isinstance(found, Dropped) and reason in found.reason


def test_several_attributes_need_no_winner() -> None:
    """Two score vectors of which neither is better: each is nearest to its own goal."""
    recipe = Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("help", "truth"))
    example = scored("Q?", ["a", "b"], [5, 6], attributes={"help": (9.0, 2.0), "truth": (3.0, 8.0)})
    found = {name: (pairs, own) for name, _, pairs, own in summary(views_of(0, example, recipe))}
    assert found["chosen"] == (((1, 0),), (1,))
    assert found["rejected"] == (((0, 1),), (0,))
    # (10, 10): distances 1 + 49 and 64 + 4
    assert found["top"][0] == ((0, 1),)


def test_an_example_that_only_the_attributes_tell_apart_is_evaluated(chat_tokenizer: Any) -> None:
    """Finds an example that relabelling trains on, dropped as a tie of its overall scores."""
    recipe = Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("help", "truth"))
    example = scored("Q?", ["a", "b"], [5, 5], attributes={"help": (9.0, 2.0), "truth": (3.0, 8.0)})
    found = {name: pairs for name, _, pairs, _ in summary(views_of(0, example, recipe))}
    assert found == {"chosen": ((0, 1),), "rejected": ((1, 0),), "top": ((0, 1),)}
    assert isinstance(views_of(0, example, None), Dropped)
    figures = evaluate([example, PAIRS[0]], fakes.backend(), make_policy(), chat_tokenizer, recipe=recipe).metrics
    assert figures["examples"] == 1 and figures["views"]["chosen"]["rows"] == 1


def test_views_are_cut_as_training_cuts_them(chat_tokenizer: Any) -> None:
    """Finds a half evaluated on other tokens than it was trained on: 10 is longer to write than 9."""
    example = scored(" ".join(f"w{n}" for n in range(200)), ["Paris.", "No."], [10, 9])
    halves = relabel(example, Recipe())
    assert not isinstance(halves, Dropped)
    for max_length in (300, 301, 302, 303):
        trained, _ = tokenize_all(halves, chat_tokenizer, max_length=max_length)
        found = evaluate(
            [example], fakes.backend(), make_policy(), chat_tokenizer, recipe=Recipe(), max_length=max_length
        ).rows
        for ours, theirs in zip(found, trained, strict=False):
            assert theirs.prompt_cut and ours.tokens.prompt_ids.tolist() == theirs.prompt_ids.tolist()


def test_relabelled_rows_give_their_examples_back() -> None:
    recipe = Recipe()
    examples = [*PAIRS[:3], LISTS[0]]
    rows = [row for example in examples for row in relabel(example, recipe)]
    back = restore(rows, recipe)
    assert [one.prompt for one in back] == [one.prompt for one in examples]
    for ours, theirs in zip(back, examples, strict=True):
        assert dict(zip(ours.responses, ours.scores, strict=True)) == dict(
            zip(theirs.responses, theirs.scores, strict=True)
        )
    plain = [unconditioned(example) for example in examples]
    assert [one.prompt for one in restore(plain, None)] == [one.prompt for one in examples]


def test_scores_in_goal_units_are_mapped_no_second_time() -> None:
    from mlxpref.data.relabel import fit_recipe

    example = scored("Q?", ["a", "b"], [4, 1])
    recipe = fit_recipe([example], score_range=(0, 4), mapping="affine")
    rows = relabel(example, recipe)
    assert not isinstance(rows, Dropped)
    (back,) = restore(rows, recipe)
    again = relabel(back, in_goal_units(recipe))
    assert not isinstance(again, Dropped)
    assert [row.goal for row in again] == [row.goal for row in rows] == [10.0, 3.25]


# --- the whole of it, by hand ---


class Hand:
    """Every figure again, from texts and tables: no recipe, no plan, no arrays of ours."""

    def __init__(self, tokenizer: Any, policy: fakes.FakePolicy) -> None:
        self.tokenizer, self.policy = tokenizer, policy

    def sums(self, example: Scored, goal: float | None, k: int) -> tuple[float, float, int]:
        """Log-prob of response k under policy and reference, and its tokens."""
        prompt, response = ids_by_hand(self.tokenizer, example.prompt[-1].content, goal, example.responses[k])
        logps = (sum(fakes.by_hand(of, prompt, response)) for of in (self.policy.policy, self.policy.reference))
        return (*logps, len(response))

    def margin(self, example: Scored, goal: float | None, i: int, j: int) -> float:
        (p_i, r_i, _), (p_j, r_j, _) = self.sums(example, goal, i), self.sums(example, goal, j)
        return (p_i - r_i) - (p_j - r_j)

    def rows(self, examples: Sequence[Scored], name: str) -> list[tuple[Scored, float | None]]:
        rows: list[tuple[Scored, float | None]] = []
        for example in examples:
            assert example.scores is not None
            goals = sorted(set(example.scores), reverse=True)
            asked = {"chosen": goals[:1], "rejected": goals[1:], "top": [10.0], "unconditioned": [None]}
            rows += [(example, goal) for goal in asked[name]]
        return rows

    def pairs(self, example: Scored, goal: float | None) -> list[tuple[int, int]]:
        assert example.scores is not None
        likes = [s if goal is None else -((goal - s) ** 2) for s in example.scores]
        n = range(len(likes))
        return [(i, j) for i in n for j in n if likes[i] > likes[j]]

    def over_pairs(self, examples: Sequence[Scored], name: str, figure: Any) -> float:
        """Mean over rows of the mean over pairs."""
        return statistics.fmean(
            statistics.fmean(figure(example, goal, i, j) for i, j in self.pairs(example, goal))
            for example, goal in self.rows(examples, name)
        )


@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_figure_by_hand(chat_tokenizer: Any, share_prompts: bool) -> None:
    examples = [*PAIRS, *LISTS]
    policy = make_policy()
    policy.share_prompts = share_prompts
    found = evaluate(examples, fakes.backend(), policy, chat_tokenizer, recipe=Recipe(), micro_batch_tokens=700).metrics
    hand = Hand(chat_tokenizer, policy)
    near = lambda value: pytest.approx(value, abs=2e-4)  # noqa: E731 - sums of float32 tokens
    assert set(found["views"]) == set(VIEWS) and found["examples"] == 6

    for name in VIEWS:
        view = found["views"][name]
        assert view["accuracy"] == near(hand.over_pairs(examples, name, lambda *at: hand.margin(*at) > 0)), name
        assert view["margin"] == near(hand.over_pairs(examples, name, hand.margin)), name
        for key, which in (("ranking_accuracy", 0), ("reference_ranking_accuracy", 1)):
            expected = hand.over_pairs(
                examples, name, lambda e, g, i, j, w=which: hand.sums(e, g, i)[w] > hand.sums(e, g, j)[w]
            )
            assert view[key] == near(expected), (name, key)
        rows = hand.rows(examples, name)
        changes: dict[str, list[tuple[float, float]]] = {
            "chosen": [],
            "rejected": [],
            "high_score_rejected": [],
        }
        for example, goal in rows:
            best = max(example.scores)
            for k, score in enumerate(example.scores):
                p, r, n = hand.sums(example, goal, k)
                kinds = ["chosen"] if score == best else ["rejected"]
                kinds += ["high_score_rejected"] if score != best and score >= 8.5 else []
                for kind in kinds:
                    changes[kind].append((p - r, (p - r) / n))
        for kind, values in changes.items():
            assert view["change"][kind] == {
                "responses": len(values),
                "sum": near(statistics.fmean(v for v, _ in values)),
                "per_token": near(statistics.fmean(v for _, v in values)),
            }, (name, kind)
        pairs = [(e, g, i, j) for e, g in rows for i, j in hand.pairs(e, g)]
        longer = [hand.sums(e, g, i)[2] - hand.sums(e, g, j)[2] for e, g, i, j in pairs]
        assert view["length"]["difference"] == near(statistics.fmean(longer)), name
        expected = statistics.correlation(longer, [hand.margin(*at) for at in pairs])
        assert view["length"]["correlation"] == near(expected), name
        for entry in view["by_gap"]:
            upper = math.inf if entry["to"] is None else entry["to"]
            inside = [
                hand.margin(*at) > 0
                for at in pairs
                if entry["above"] < abs(at[0].scores[at[2]] - at[0].scores[at[3]]) <= upper
            ]
            assert entry["pairs"] == len(inside), (name, entry)
            assert entry["accuracy"] == (near(statistics.fmean(inside)) if inside else None)

    assert found["high_score"] == 8.5  # the median of 9, 8, 10, 6, 9, 7
    sensitivity = []
    for example in examples:
        scores, n = example.scores, range(len(example.scores))
        different = [(i, j) for i in n for j in n if i < j and scores[i] != scores[j]]
        sensitivity.append(
            statistics.fmean(
                hand.margin(example, scores[i], i, j) - hand.margin(example, scores[j], i, j) for i, j in different
            )
        )
    assert found["goal_sensitivity"]["mean"] == near(statistics.fmean(sensitivity))
    assert abs(statistics.fmean(sensitivity)) > 0.1  # a witness that is 0 would show nothing


def test_a_model_that_ignores_its_goal_has_no_sensitivity(chat_tokenizer: Any) -> None:
    policy = make_policy()
    for of in (policy.policy, policy.reference):
        of[:] = of[:1]  # every state alike
    found = evaluate(PAIRS, fakes.backend(), policy, chat_tokenizer, recipe=Recipe()).metrics
    assert found["goal_sensitivity"]["mean"] == pytest.approx(0, abs=1e-9)
    halves = found["views"]["chosen"], found["views"]["rejected"]
    assert halves[0]["accuracy"] + halves[1]["accuracy"] == 1
    assert halves[0]["margin"] == pytest.approx(-halves[1]["margin"])


def test_a_bare_model_is_its_own_reference(chat_tokenizer: Any, tmp_path: Path) -> None:
    """0 by definition and said; each row computed once, and never as a policy."""
    policy = make_policy()
    store = ReferenceStore(tmp_path, policy.fingerprint)
    found = evaluate(PAIRS, fakes.backend(), policy, chat_tokenizer, recipe=Recipe(), has_adapter=False, store=store)
    for view in found.metrics["views"].values():
        assert view["accuracy"] == view["margin"] == view["change"]["chosen"]["sum"] == 0
        assert view["ranking_accuracy"] == view["reference_ranking_accuracy"]
    assert found.metrics["goal_sensitivity"]["mean"] == 0
    assert "0 by definition" in found.metrics["notes"][0]
    assert all(reference for reference, _ in policy.asked)
    again = evaluate(
        PAIRS, fakes.backend(), None, chat_tokenizer, recipe=Recipe(), has_adapter=False,
        store=ReferenceStore(tmp_path, policy.fingerprint),
    )  # fmt: skip
    assert again.metrics == found.metrics and again.reference_counts.computed == 0


def test_rows_that_are_the_same_tokens_are_computed_once(chat_tokenizer: Any) -> None:
    """The chosen score of the third pair is 10: its chosen half is its top view."""
    policy = make_policy()
    evaluate([PAIRS[2]], fakes.backend(), policy, chat_tokenizer, recipe=Recipe())
    assert sum(n for reference, n in policy.asked if reference) == 3
    assert sum(n for reference, n in policy.asked if not reference) == 3


def test_unscored_data(chat_tokenizer: Any) -> None:
    examples = [replace(example, scores=None) for example in PAIRS]
    found = evaluate(examples, fakes.backend(), make_policy(), chat_tokenizer).metrics
    assert set(found["views"]) == {"unconditioned"}
    view = found["views"]["unconditioned"]
    assert view["by_gap"] == [] and found["high_score"] is None
    assert found["goal_sensitivity"] == {"mean": None, "error": None, "examples": 0}
    assert view["change"]["chosen"]["responses"] == view["change"]["rejected"]["responses"] == 4


def test_dropped_examples_are_in_no_view(chat_tokenizer: Any) -> None:
    """Finds: a row too long with its goal, but not without, that makes the views incomparable."""
    plain = max(len(ids_by_hand(chat_tokenizer, e.prompt[-1].content, None, "")[0]) for e in PAIRS)
    found = evaluate(
        [*PAIRS, replace(PAIRS[0], scores=(5.0, 5.0))], fakes.backend(), make_policy(), chat_tokenizer,
        recipe=Recipe(), truncation="drop", max_length=plain + 200, max_prompt_length=plain + 170,
    )  # fmt: skip
    assert {view["rows"] for view in found.metrics["views"].values()} == {found.metrics["examples"]}
    assert sum(found.metrics["dropped"].values()) + found.metrics["examples"] == 5
    with pytest.raises(DataError, match="none of 4 examples"):
        evaluate(
            PAIRS, fakes.backend(), make_policy(), chat_tokenizer,
            recipe=Recipe(), truncation="drop", max_length=plain + 40, max_prompt_length=plain + 20,
        )  # fmt: skip


def test_metrics_and_records_are_json(chat_tokenizer: Any) -> None:
    """And a record's log-probs are those of exactly its ids, response by response."""
    policy = make_policy()
    found = evaluate([*PAIRS, *LISTS], fakes.backend(), policy, chat_tokenizer, recipe=Recipe())
    json.dumps(found.metrics, allow_nan=False)
    records = [json.loads(json.dumps(row.as_record(), allow_nan=False)) for row in found.rows]
    assert {record["goal"] for record in records} >= {None, 10.0, 9.0, 7.5}
    for record in records:
        for ids, ours, theirs in zip(
            record["response_ids"], record["policy_logps"], record["reference_logps"], strict=True
        ):
            for of, values in ((policy.policy, ours), (policy.reference, theirs)):
                np.testing.assert_allclose(values, fakes.by_hand(of, record["prompt_ids"], ids), rtol=1e-6)
    first = records[0]
    assert first["example_id"] == PAIRS[0].example_id
    prompt, best = ids_by_hand(chat_tokenizer, "What is the capital of France?", 9, "Paris.")
    assert (first["prompt_ids"], first["response_ids"][0]) == (prompt, best)


def test_the_high_score_and_the_bins_can_be_given(chat_tokenizer: Any) -> None:
    found = evaluate(
        PAIRS,
        fakes.backend(),
        make_policy(),
        chat_tokenizer,
        recipe=Recipe(),
        high_score=4,
        gap_edges=(0.75,),
    ).metrics
    view = found["views"]["unconditioned"]
    assert view["change"]["high_score_rejected"]["responses"] == 3
    assert [entry["pairs"] for entry in view["by_gap"]] == [1, 3]


# --- the command ---


@pytest.fixture
def fake_room(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> fakes.FakePolicy:
    """The command finds a fake machine room; tokenizer and folders are real."""
    from mlxpref import backends

    policy = make_policy()
    policy.path = str(tiny_model_dir)
    room = fakes.backend(
        load_adapter=lambda path, **options: policy,
        load_policy=lambda path, **options: policy,
        __name__="mlxpref.fake_backend",
    )
    monkeypatch.setattr(backends, "get", lambda name: room)
    return policy


def write_pairs(file: Path, examples: Sequence[Scored]) -> Path:
    lines = [
        {
            "prompt": example.prompt[0].content,
            "chosen": example.responses[0],
            "rejected": example.responses[1],
            **dict(zip(("score_chosen", "score_rejected"), example.scores or (), strict=False)),
        }
        for example in examples
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_adapter(folder: Path, recipe: Recipe | None, **more: Any) -> Path:
    folder.mkdir()
    stored = {"recipe": None if recipe is None else recipe.as_dict(), **more}
    (folder / "adapter_config.json").write_text(json.dumps({"mlxpref": stored}))
    return folder


def run(*arguments: Any) -> Any:
    from mlxpref.cli import main

    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_the_command(fake_room: Any, tmp_path: Path, no_sockets: Any) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS[:3])
    adapter = write_adapter(tmp_path / "adapter", Recipe())
    figures, rows = tmp_path / "figures.json", tmp_path / "rows.jsonl"
    ran = run(data, "--adapter-path", adapter, "--json", figures, "--per-row", rows, "--store", tmp_path / "store")
    assert ran.exit_code == 0, ran.output
    for words in ("goal sensitivity", "ranking accuracy", "accuracy by score gap", "no goal"):
        assert words in ran.output
    found = json.loads(figures.read_text())
    assert found["adapter"] == str(adapter) and "measured against the base" not in ran.output
    assert found["views"]["chosen"]["rows"] == 3
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    keys = {"example_id", "goal", "prompt_ids", "response_ids", "policy_logps", "reference_logps"}
    assert all(keys <= set(record) for record in records) and len(records) == 12
    again = run(data, "--adapter-path", adapter, "--store", tmp_path / "store")
    assert "0 rows computed" in again.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter", "figures.json", "pairs.jsonl", "rows.jsonl", "store",
    ]  # fmt: skip


def test_raw_data_are_scored_as_in_training(fake_room: Any, tmp_path: Path) -> None:
    """Finds goals of one score asked of an adapter that was trained on goals of another."""
    rows = []
    for i, example in enumerate(PAIRS[:3]):
        helpful = {"help_chosen": 2 + i, "help_rejected": 7} if i < 2 else {}
        sides = {"chosen": example.responses[0], "rejected": example.responses[1]}
        scores = {"score_chosen": 9, "score_rejected": 1}
        rows.append({"prompt": example.prompt[0].content, **sides, **scores, **helpful})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = {"score_from": ["help"], "fitted": {"standards": {}, "references": {}, "alpha": 0.0}}
    adapter = write_adapter(tmp_path / "adapter", Recipe(), scoring=stored)
    figures = tmp_path / "figures.json"
    ran = run(tmp_path / "pairs.jsonl", "--adapter-path", adapter, "--json", figures, "--per-row", tmp_path / "rows")
    assert ran.exit_code == 0, ran.output
    assert "scores are made as in training: score_from help" in ran.output
    records = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["goal"] for row in records if row["view"] in ("chosen", "rejected")} == {2, 3, 7}
    assert json.loads(figures.read_text())["views"]["chosen"]["rows"] == 2 and "no attribute 'help'" in ran.output


def test_the_limits_of_training_hold_in_evaluation(fake_room: Any, tmp_path: Path) -> None:
    """Finds lengths that training writes where evaluation does not look."""
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    config = load_config(base={
        "model": {"path": fake_room.path},
        "data": {"source": str(data)},
        "tokenization": {"max_length": 96, "max_prompt_length": 90, "truncation": "drop"},
        "adapter": {"lora_parameters": {"rank": 2}},
        "reference": {"store": str(tmp_path / "store")},
        "training": {"iters": 2},
        "output": {"adapter_path": str(tmp_path / "run")},
    })  # fmt: skip
    train(config, backend=fake_backend)
    figures = tmp_path / "figures.json"
    for more, lengths in (
        ([], {"max_length": 96, "max_prompt_length": 90, "truncation": "drop"}),
        (["--max-length", "64"], {"max_length": 64, "max_prompt_length": None, "truncation": "drop"}),
    ):
        ran = run(data, "--adapter-path", tmp_path / "run", "--no-store", "--json", figures, *more)
        assert ran.exit_code == 0, ran.output
        assert json.loads(figures.read_text())["tokenization"] == lengths


def test_another_reference_than_that_of_training_is_said(fake_room: Any, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    adapter = write_adapter(tmp_path / "adapter", None, init_from="earlier/run")
    ran = run(data, "--adapter-path", adapter, "--no-store", "--json", tmp_path / "figures.json")
    assert "trained against adapter earlier/run; measured against the base" in ran.output
    assert json.loads((tmp_path / "figures.json").read_text())["init_from"] == "earlier/run"


def test_the_command_without_an_adapter(fake_room: Any, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS[:3])
    ran = run(data, "--model", fake_room.path, "--no-store")
    assert ran.exit_code == 0, ran.output
    assert "0 by definition" in ran.output and "default recipe" in ran.output


def test_the_command_on_unscored_data(fake_room: Any, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", [replace(example, scores=None) for example in PAIRS])
    ran = run(data, "--model", fake_room.path, "--no-store")
    assert ran.exit_code == 0, ran.output
    assert "no goal" in ran.output and "goal sensitivity:" not in ran.output


def test_the_command_on_relabelled_data(fake_room: Any, tmp_path: Path) -> None:
    """The same examples raw and relabelled give the same figures."""
    recipe = Recipe()
    rows = [row for example in PAIRS[:3] for row in relabel(example, recipe)]
    write_relabelled(tmp_path / "relabelled", {"train": rows, "test": rows}, recipe)
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS[:3])
    adapter = write_adapter(tmp_path / "adapter", recipe)
    found = []
    for source in (tmp_path / "relabelled", data):
        ran = run(source, "--adapter-path", adapter, "--no-store", "--json", tmp_path / "figures.json")
        assert ran.exit_code == 0, ran.output
        figures = json.loads((tmp_path / "figures.json").read_text())
        found.append({key: figures[key] for key in ("views", "goal_sensitivity", "examples")})
    assert found[0] == found[1]
    idle = ("--score", "help", "--data-config", "main", "--streaming")
    ran = run(tmp_path / "relabelled", "--adapter-path", adapter, *idle)
    assert ran.exit_code == 2 and ran.stderr.rstrip().endswith(": --score, --data-config, --streaming"), ran.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "which policy"),
        (["--adapter-path", "nowhere"], 1, "adapter_config.json"),
        (["--model", "m", "--gap-edges", "3,1"], 2, "rise"),
        (["--model", "m", "--store", "s", "--no-store"], 2, "contradict"),
        (["--model", "m", "--recipe", "nowhere.json"], 1, "nowhere.json"),
    ],
)
def test_what_cannot_be_is_said(fake_room: Any, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    ran = run(write_pairs(tmp_path / "pairs.jsonl", PAIRS), *arguments)
    assert (ran.exit_code, words in ran.output) == (code, True), ran.output


def test_a_failed_run_leaves_no_file(fake_room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_room.policy[:] = np.nan
    data = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    adapter = write_adapter(tmp_path / "adapter", Recipe())
    ran = run(
        data, "--adapter-path", adapter, "--no-store",
        "--json", tmp_path / "a.json", "--per-row", tmp_path / "b.jsonl",
    )  # fmt: skip
    assert ran.exit_code == 1 and "not finite" in ran.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "pairs.jsonl"]
