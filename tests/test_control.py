"""Control curves: what a scorer sees, and figures against plain Python from their definitions."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import fakes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.data.recipe import ATTRIBUTES_TEMPLATE, Recipe
from mlxpref.errors import ScoreError, UsageError
from mlxpref.evaluate import Sample, achieved, as_curve, control_curve, curve_of, spearman
from mlxpref.evaluate.course import course, log_ratios
from mlxpref.evaluate.statistics import mean_interval
from mlxpref.generate import Answer, ask, line_questions
from mlxpref.records import Prompt

QUESTIONS = line_questions(["Owls 30?", "Cats 10?", "Dogs 20?"])
ATTRIBUTES = Recipe(template=ATTRIBUTES_TEMPLATE, attributes=("content", "form"))


class Room:
    """Answers with the goal it reads in its prompt, the question's number, and a count of its answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[dict[str, Any]] = []
        self.count = 0

    def generate(self, policy: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
        self.calls.append({"n": len(prompts), **options})
        return [self.answer(self.tokenizer.decode(ids)) for ids in prompts]

    def answer(self, read: str) -> str:
        self.count += 1
        goal = re.search(r"(?:Overall score|Content): ([\d.]+)\.", read)
        question = re.search(r"\w+ (\d+)\?", read)
        assert question
        return f"{goal[1] if goal else 0} {question[1]} {self.count}"


class Judge:
    """Goal read + the number in the prompt / 100, and a memory of what it saw."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        self.prompts += prompts
        numbers = [int(prompt[-1].content.split()[1].rstrip("?")) for prompt in prompts]
        answered = [text.split() for text in responses]
        assert [int(words[1]) for words in answered] == numbers  # each answer beside its own prompt
        return [float(words[0]) + number / 100 for words, number in zip(answered, numbers, strict=True)]


def curve(chat_tokenizer: Any, goals: Any, recipe: Recipe | None = None, **options: Any) -> Any:
    room, judge = Room(chat_tokenizer), Judge()
    found = control_curve(
        QUESTIONS, goals, judge, room, None, chat_tokenizer, recipe if recipe is not None else Recipe(), **options
    )
    return found, room, judge


# --- the way there ---


def test_goals_are_asked_for_and_not_shown_to_the_scorer(chat_tokenizer: Any) -> None:
    """Finds: the conditioned prompt scored, answers beside other prompts, goals mixed up or left out."""
    found, room, judge = curve(chat_tokenizer, [2, None, 7.5], n_samples=2, batch_size=4, seed=5, temperature=0.7)
    assert judge.prompts == [question.prompt for question in QUESTIONS for _ in range(6)]
    assert [one.goal for one in found.per_goal] == [2, None, 7.5]
    assert [one.mean for one in found.per_goal] == pytest.approx([2.2, 0.2, 7.7])
    assert [(one.n, one.prompts) for one in found.per_goal] == [(6, 3)] * 3
    assert [(s.index, s.goal) for s in found.samples[:7]] == [
        (0, 2), (0, 2), (0, None), (0, None), (0, 7.5), (0, 7.5), (1, 2),
    ]  # fmt: skip
    assert [call["n"] for call in room.calls] == [4, 4, 4, 4, 2]
    assert [s.text for s in found.samples] == [s.text for s in sorted(found.samples, key=lambda s: int(s.text[-2:]))]


def test_options_reach_the_policy(chat_tokenizer: Any) -> None:
    """Finds: an option that is accepted and does nothing."""
    seen: list[tuple[int, int]] = []
    options = {"temperature": 0.3, "top_p": 0.8, "max_tokens": 17, "seed": 11, "adapter": False}
    found, room, _ = curve(chat_tokenizer, [3], batch_size=3, on_progress=lambda *at: seen.append(at), **options)
    assert room.calls == [{"n": 3, **options}] and seen == [(3, 3)]
    assert found.per_goal[0].top_share is None
    assert curve(chat_tokenizer, [3], top=3.2)[0].per_goal[0].top_share == pytest.approx(2 / 3)


def test_goals_of_several_attributes(chat_tokenizer: Any) -> None:
    """The room follows content alone, so form must not correlate: on this grid it is exactly 0."""
    goals = [{"content": c, "form": f} for f in (1, 9) for c in (2, 5, 8)]
    found, _, _ = curve(chat_tokenizer, goals, ATTRIBUTES)
    assert [one.goal for one in found.per_goal] == goals
    assert found.spearman["content"] > 0.9 and found.spearman["form"] == pytest.approx(0, abs=1e-12)
    assert json.loads(json.dumps(found.as_record(), allow_nan=False))["per_goal"][1]["goal"] == goals[1]


def test_without_a_recipe_only_without_a_goal(chat_tokenizer: Any) -> None:
    room = Room(chat_tokenizer)
    found = control_curve(QUESTIONS, [None], Judge(), room, None, chat_tokenizer, None)
    assert found.spearman is None and [one.goal for one in found.per_goal] == [None]
    with pytest.raises(UsageError, match="recipe"):
        control_curve(QUESTIONS, [3], Judge(), room, None, chat_tokenizer, None)


@pytest.mark.parametrize(
    ("goals", "options", "words"),
    [
        ([], {}, "needs goals"),
        ([5, 5.0], {}, "goal 5 is asked for twice"),
        ([None, 3, None], {}, "no goal is asked for twice"),
        ([5.04, 5], {"recipe": Recipe(number_format=1)}, None),
        ([5.01, 5], {"recipe": Recipe(number_format=1)}, "goal 5 is asked for twice"),
        ([{"content": 1, "form": 2}, {"form": 2, "content": 1}], {"recipe": ATTRIBUTES}, "asked for twice"),
        ([11], {}, "off this recipe's scale"),
        ([3], {"n_samples": 0}, "n_samples"),
        ([3], {"n_samples": 2, "temperature": 0}, "temperature 0"),
        ([3], {"resamples": 0}, "resamples"),
        ([3], {"top_p": 2}, "top_p"),
    ],
)
def test_what_cannot_be_asked(chat_tokenizer: Any, goals: Any, options: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert [round(one.mean, 6) for one in curve(chat_tokenizer, [5.06, 5], **options)[0].per_goal] == [5.3, 5.2]
        return
    with pytest.raises(UsageError, match=words):
        curve(chat_tokenizer, goals, **options)


def test_no_prompts_and_no_scores(chat_tokenizer: Any) -> None:
    room = Room(chat_tokenizer)
    with pytest.raises(UsageError, match="needs prompts"):
        control_curve([], [3], Judge(), room, None, chat_tokenizer, Recipe())
    with pytest.raises(ScoreError, match="1 scores for 3"):
        control_curve(QUESTIONS, [3], lambda p, r: [1.0], room, None, chat_tokenizer, Recipe())


# --- figures ---

SCORES = [4.0, 1.0, 9.5, 9.0, 2.0, 6.0, 6.5]
TEXTS = ["a b", "a b", "c", "one two three", "", "d  e\nf g", "c"]


def test_figures_of_a_goal() -> None:
    """Finds: population for sample deviation, other quantiles, a strict top, letters for words."""
    samples = [Sample(i // 2, 3.0, text, score) for i, (text, score) in enumerate(zip(TEXTS, SCORES, strict=True))]
    one, none = achieved([*samples, Sample(0, None, "x", 1.0)], top=9.0)
    tenths = statistics.quantiles(SCORES, n=10, method="inclusive")
    assert (one.n, one.prompts) == (7, 4)
    assert one.mean == pytest.approx(statistics.fmean(SCORES))
    assert one.deviation == pytest.approx(statistics.stdev(SCORES))
    assert one.spread == pytest.approx((tenths[0], tenths[-1]))
    assert one.top_share == pytest.approx(2 / 7)
    assert one.words == pytest.approx((2 + 2 + 1 + 3 + 0 + 4 + 1) / 7)
    assert one.distinct == pytest.approx(5 / 7)
    assert none.goal is None and none.deviation is None and none.interval is None


def test_samples_of_one_prompt_are_drawn_together() -> None:
    """Of two prompts, half of all draws take one of them twice: the interval's ends are the prompts' own
    means. Drawn one by one, 2 × 50 samples would give about 0.4 to 0.6. Unequal numbers, too."""
    assert mean_interval(np.repeat([0.0, 1.0], 50), [7] * 50 + [9] * 50, resamples=400) == (0.0, 1.0)
    assert mean_interval(np.array([0.0, 1.0, 1.0, 1.0]), [0, 1, 1, 1], resamples=400) == (0.0, 1.0)
    drawn = {mean_interval(np.array([0.0, 1, 1, 1]), [0, 1, 1, 1], seed=s, resamples=1) for s in range(40)}
    assert drawn == {(0.0, 0.0), (0.75, 0.75), (1.0, 1.0)}  # both: the mean of all samples, not of two means


def test_the_interval_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(5, 2, 500)
    interval = mean_interval(scores, range(500), seed=1, resamples=4000)
    assert interval is not None
    error = 1.96 * statistics.stdev(scores) / math.sqrt(500)
    mean = statistics.fmean(scores)
    assert interval == pytest.approx((mean - error, mean + error), abs=0.1 * error)
    again, other = (mean_interval(scores, range(500), seed=seed, resamples=4000) for seed in (1, 2))
    assert interval == again != other


def by_hand(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman from its definition: a rank is how many are smaller, and half of those that are equal."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < u for v in values) + (sum(v == u for v in values) + 1) / 2 for u in values]

    a, b = ranks(x), ranks(y)
    middle = (len(x) + 1) / 2
    da, db = [v - middle for v in a], [v - middle for v in b]
    below = math.sqrt(math.fsum(v * v for v in da) * math.fsum(v * v for v in db))
    return math.fsum(u * v for u, v in zip(da, db, strict=True)) / below if below else None


few = st.sampled_from([-1.5, 0.0, 1.0, 2.0, 3.0, 1e9])


@given(st.lists(st.tuples(few, few), max_size=12))
def test_spearman(pairs: list[tuple[float, float]]) -> None:
    """Finds: ties ranked by order of arrival, by their lowest place or not at all; NaN for a constant side."""
    x, y = [u for u, _ in pairs], [v for _, v in pairs]
    found, expected = spearman(x, y), by_hand(x, y)
    assert (found is None) == (expected is None)
    assert found is None or found == pytest.approx(expected, abs=1e-12)


def test_spearman_of_a_textbook() -> None:
    """Hours of television and IQ, ten people, no ties: 1 − 6 · 194 / 990."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    with pytest.raises(ValueError, match="3 values against 2"):
        spearman([1, 2, 3], [1, 2])


def test_correlation_is_over_samples() -> None:
    """Means that rise step by step correlate perfectly; the samples around them do not."""
    samples = [Sample(i, goal, "", goal + noise) for goal in (1.0, 2.0, 3.0) for i, noise in enumerate((-3, 0, 3))]
    found = curve_of([*samples, Sample(0, None, "", 99.0)])
    expected = by_hand([s.goal for s in samples], [s.score for s in samples])  # type: ignore[misc]  # none is None here
    assert expected is not None and 0.1 < expected < 0.6
    assert found.spearman == pytest.approx(expected)


def test_records_are_json(chat_tokenizer: Any) -> None:
    found, _, _ = curve(chat_tokenizer, [2, None, 8], n_samples=2)
    record = json.loads(json.dumps(found.as_record(), allow_nan=False))
    assert record["n"] == 18 and record["spearman"] == found.spearman
    assert record["per_goal"][0]["interval"] == list(found.per_goal[0].interval)
    assert record["per_goal"][1]["goal"] is None
    assert {"goal": 2.0, "index": 0}.items() <= json.loads(json.dumps(found.samples[0].as_record())).items()


# --- towards a picture ---


def test_points_of_a_curve(chat_tokenizer: Any) -> None:
    found, _, _ = curve(chat_tokenizer, [8, None, 2])
    drawn = as_curve("ours", found.per_goal)
    assert [(p.asked, round(p.mean, 6)) for p in drawn.points] == [(2, 2.2), (8, 8.2)]
    assert drawn.points[0].spread == found.per_goal[2].spread


def test_one_attribute_at_a_time(chat_tokenizer: Any) -> None:
    goals = [{"content": c, "form": f} for f in (1, 9) for c in (2, 8)]
    found, _, _ = curve(chat_tokenizer, goals, ATTRIBUTES)
    of_form = [one for one in found.per_goal if one.goal["form"] == 9]
    assert [p.asked for p in as_curve("form 9", of_form, attribute="content").points] == [2, 8]
    with pytest.raises(UsageError, match="two goals have the same content"):
        as_curve("all", found.per_goal, attribute="content")
    with pytest.raises(UsageError, match="content, form"):
        as_curve("all", found.per_goal)


# --- the course of a run ---


def judged(scores: Sequence[float]) -> Any:
    return curve_of([Sample(index, 10.0, "so", score) for index, score in enumerate(scores)])


def test_a_checkpoint_is_compared_over_the_same_prompts() -> None:
    """Finds differences of means taken as if other prompts had been asked, and stages in the order they came."""
    rng = np.random.default_rng(3)
    ease = rng.normal(0, 3, 40)  # what prompts differ by; checkpoints differ by far less
    found = course([(20, judged(ease), 4.0), (10, judged(ease + 0.5 + rng.normal(0, 0.1, 40)), 2.0)])
    assert [stage.step for stage in found] == [10, 20] and found[1].less_end is None
    assert found[0].less_end is not None and 0.4 < found[0].less_end[0] < 0.5 < found[0].less_end[1] < 0.6
    few = course([(10, judged(ease[:19]), 2.0), (20, judged(ease[:19]), 4.0)])
    assert few[0].less_end is None
    twice = course([(10, judged(ease), 2.0), (20, judged(ease), 4.0)], units=[0] * 40)
    assert twice[0].less_end is None  # one prompt, forty times


def test_a_distance_counts_what_was_written_and_no_end_of_turn(chat_tokenizer: Any) -> None:
    policy = fakes.FakePolicy(fakes.table(1), fakes.table(2))
    asked = [ask(question, 7.0, Recipe(), chat_tokenizer, index=i) for i, question in enumerate(QUESTIONS)]
    texts = ["Owls hoot.", "", "Dogs"]
    answers = [Answer(one, text) for one, text in zip(asked, texts, strict=True)]
    found = log_ratios(answers, QUESTIONS, fakes.backend(), policy, chat_tokenizer)
    ids = [chat_tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = [
        sum(fakes.by_hand(fakes.table(1), one.ids, own)) - sum(fakes.by_hand(fakes.table(2), one.ids, own))
        for one, own in zip(asked, ids, strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-5) and found[1] == 0.0
