"""Win rates: intervals that cover the truth, without what length adds, without a judge's liking for places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mlxpref.errors import DataError, ScoreError, UsageError
from mlxpref.evaluate.statistics import _student
from mlxpref.evaluate.winrates import Comparison, fit_length, win_rate
from mlxpref.records import Message
from mlxpref.rewards.judges import Verdict, both_orders, by_score

REPETITIONS = 100


def comparisons_of(preferred: Sequence[float], lengths: Any = None, prompts: Any = None) -> list[Comparison]:
    n = len(preferred)
    prompts = range(n) if prompts is None else prompts
    lengths = [(100, 100)] * n if lengths is None else lengths
    return [
        Comparison(int(prompt), Verdict(float(value), float(value)), (int(one), int(other)))
        for prompt, value, (one, other) in zip(prompts, preferred, lengths, strict=True)
    ]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x)))


# --- intervals ---


@pytest.mark.parametrize(("n_prompts", "of_each", "true"), [(60, 1, 0.5), (120, 3, 0.7), (200, 1, 0.85)])
def test_intervals_cover_the_true_rate(n_prompts: int, of_each: int, true: float) -> None:
    """Finds samples of one prompt drawn as if they were independent, ties counted as losses, a wrong quantile."""
    draw, covered = np.random.default_rng(0), 0
    for seed in range(REPETITIONS):
        of_prompt = draw.beta(2 * true, 2 * (1 - true), n_prompts).repeat(of_each)
        ties = draw.random(len(of_prompt)) < 0.2 * (true == 0.5)
        preferred = np.where(ties, 0.5, draw.random(len(of_prompt)) < of_prompt)
        prompts = np.arange(n_prompts).repeat(of_each)
        found = win_rate(comparisons_of(preferred, prompts=prompts), seed=seed, resamples=200)
        assert found.interval is not None
        covered += found.interval[0] <= true <= found.interval[1]
    assert covered >= 93


@pytest.mark.parametrize(("p", "degrees", "wanted"), [(0.975, 5, 2.5706), (0.975, 30, 2.0423), (0.9, 3, 1.6377)])
def test_students_quantiles(p: float, degrees: int, wanted: float) -> None:
    """Witness: printed tables."""
    assert _student(p, degrees) == pytest.approx(wanted, rel=0.01)


def test_one_prompt_has_no_interval() -> None:
    found = win_rate(comparisons_of([1, 0, 1], prompts=[0, 0, 0]))
    assert found.interval is None and found.equal_lengths_interval is None and found.rate == pytest.approx(2 / 3)


def test_outcomes_are_counted_as_what_they_are() -> None:
    found = win_rate(comparisons_of([1, 1, 0.5, 0, 0.9]))
    assert (found.wins, found.ties, found.losses) == (0.6, 0.2, 0.2)
    assert found.rate == pytest.approx(3.4 / 5) and (found.n, found.prompts) == (5, 5)
    orders = [Verdict(0.9, 0.2), Verdict(0.9, 0.6), Verdict(0.1, 0.4), Verdict(0.5, 0.9)]
    judged = win_rate([Comparison(i, one, (1, 1)) for i, one in enumerate(orders)])
    assert (judged.wins, judged.ties, judged.losses) == (0.25, 0.5, 0.25)
    assert judged.places is not None and judged.places.agreement == 0.5


@pytest.mark.parametrize("resamples", [0, -1])
def test_what_cannot_be_reckoned_is_refused(resamples: int) -> None:
    with pytest.raises(DataError, match="there are none"):
        win_rate([])
    with pytest.raises(UsageError, match="resamples"):
        win_rate(comparisons_of([1, 0]), resamples=resamples)


# --- length ---


@pytest.mark.parametrize(("theta", "phi"), [(0.0, 2.0), (0.8, -1.5), (-0.5, 3.0)])
def test_length_control_takes_off_what_length_adds(theta: float, phi: float) -> None:
    """A judge that likes (or dislikes) long responses, and a side that writes longer ones."""
    draw, covered, raw = np.random.default_rng(1), 0, []
    for seed in range(REPETITIONS):
        lengths = np.stack([draw.gamma(8, 60, 300), draw.gamma(8, 40, 300)], 1).round() + 1
        gaps = lengths[:, 0] - lengths[:, 1]
        preferred = draw.random(300) < sigmoid(theta + phi * np.tanh(gaps / gaps.std()))
        found = win_rate(comparisons_of(preferred, lengths), seed=seed, resamples=200)
        assert found.equal_lengths_interval is not None
        low, high = found.equal_lengths_interval
        covered += low <= sigmoid(theta) <= high
        raw.append(found.rate)
    assert covered >= 93
    assert abs(np.mean(raw) - sigmoid(theta)) > 0.1


def test_the_fit_is_that_of_maximum_likelihood() -> None:
    """Witness: a grid over the penalised log-likelihood, in plain Python."""
    draw = np.random.default_rng(2)
    longer, preferred = draw.uniform(-1, 1, 40), draw.choice([0, 0.5, 1, 0.8], 40)

    def loss(theta: float, phi: float) -> float:
        total = 0.005 * (theta**2 + phi**2)
        for x, y in zip(longer.tolist(), preferred.tolist(), strict=True):
            p = 1 / (1 + math.exp(-theta - phi * x))
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
        return total

    theta, phi = fit_length(preferred, longer)
    best = loss(theta, phi)
    assert all(loss(theta + a, phi + b) > best for a in (-1e-3, 0, 1e-3) for b in (-1e-3, 0, 1e-3) if a or b)


def test_a_side_that_always_wins_has_a_rate_near_one() -> None:
    """Finds a fit that never ends, or overflows."""
    found = win_rate(comparisons_of([1] * 50, [(10 + i % 21, 20) for i in range(50)]))
    assert found.rate == 1 and 0.9 < found.equal_lengths <= 1
    assert found.interval == (pytest.approx(0.929, abs=1e-3), 1)
    assert found.equal_lengths_interval == pytest.approx((0.929 * found.equal_lengths, found.equal_lengths), abs=1e-3)
    lost = win_rate(comparisons_of([0] * 50))
    sure = win_rate(comparisons_of([1 - 1e-9, 1 - 2e-9, 1 - 1e-9]))
    assert sure.interval is not None and sure.interval[0] < 0.5  # three prompts say little, however sure a judge is
    nine = win_rate(comparisons_of([1] * 9 + [0]))
    assert (nine.wins, nine.ties, nine.losses) == (0.9, 0, 0.1)
    assert lost.interval == (0, pytest.approx(0.071, abs=1e-3))


@pytest.mark.parametrize("lengths", [(200, 1200), (200, 100)], ids=["shorter", "longer"])
def test_what_cannot_be_told_from_length_is_not_invented(lengths: tuple[int, int]) -> None:
    """Finds a coefficient shared out between quality and length by nothing but the ridge."""
    draw = np.random.default_rng(5)
    spread = (draw.normal(size=(100, 2)) * 10 + lengths).round()
    found = win_rate(comparisons_of(draw.random(100) < 0.8, spread))
    assert found.equal_lengths is None and found.equal_lengths_interval is None and found.length_effect is None
    constant = win_rate(comparisons_of([1, 0, 1, 1] * 20, [lengths] * 80))
    assert constant.equal_lengths is None and constant.interval is not None


def test_intervals_of_few_prompts_are_wide_enough_and_no_wider() -> None:
    """Finds a plain percentile interval (it covers 0.90 here) and one that says nothing."""
    draw, covered, widths = np.random.default_rng(6), 0, []
    for seed in range(400):
        found = win_rate(comparisons_of(draw.beta(2, 2, 8)), seed=seed, resamples=300)
        assert found.interval is not None
        covered += found.interval[0] <= 0.5 <= found.interval[1]
        widths.append(found.interval[1] - found.interval[0])
    assert covered / 400 >= 0.92 and np.mean(widths) < 0.4


def test_equal_lengths_change_nothing() -> None:
    found = win_rate(comparisons_of([1, 0, 1, 1] * 20))
    assert found.equal_lengths == pytest.approx(found.rate, abs=1e-3) and found.length_effect == 0


# --- judges ---

PROMPTS = [(Message("user", f"question {i}"),) for i in range(200)]


def liking(place: float, quality: float) -> Any:
    """A judge by the number a response begins with, with a liking for the first place."""

    def judge(prompts: Any, ones: Any, others: Any) -> list[float]:
        gaps = [float(a.split()[0]) - float(b.split()[0]) for a, b in zip(ones, others, strict=True)]
        return [float(sigmoid(quality * gap + place)) for gap in gaps]

    return judge


@pytest.mark.parametrize("place", [-3.0, 0.0, 3.0])
def test_both_orders_cancel_a_liking_for_places(place: float) -> None:
    """Equal sides come out equal, and the liking is reported."""
    draw = np.random.default_rng(3)
    ones, others = ([f"{x:.3f} words" for x in draw.normal(size=200)] for _ in range(2))
    verdicts = both_orders(liking(place, 1.0), PROMPTS, ones, others)
    found = win_rate([Comparison(i, one, (5, 5)) for i, one in enumerate(verdicts)])
    assert found.interval is not None and found.places is not None
    assert found.interval[0] <= 0.5 <= found.interval[1]
    assert np.sign(round(found.places.first - 0.5, 9)) == np.sign(place)
    assert (found.places.agreement == 1) == (place == 0)
    turned = both_orders(liking(place, 1.0), PROMPTS, others, ones)
    assert [one.preference for one in turned] == pytest.approx([1 - one.preference for one in verdicts])


def test_a_better_side_wins_whatever_place_is_liked() -> None:
    ones, others = ["1.0 good"] * 200, ["0.0 less so"] * 200
    for place in (-1.0, 1.0):
        assert all(one.preference > 0.5 for one in both_orders(liking(place, 2.0), PROMPTS, ones, others))


@pytest.mark.parametrize("returned", [[0.5], [0.5, 1.2], [0.5, math.nan], [0.5, "yes"], None])
def test_a_judge_that_returns_no_probabilities_is_refused(returned: Any) -> None:
    with pytest.raises(ScoreError):
        both_orders(lambda *shown: returned, PROMPTS[:2], ["a", "b"], ["c", "d"])


def test_a_scorer_prefers_the_higher_score() -> None:
    def length(prompts: Any, texts: Sequence[str]) -> list[int]:
        return [len(one) for one in texts]

    verdicts = by_score(length, PROMPTS[:3], ["aaa", "b", "cc"], ["b", "b", "ccccc"])
    assert [one.preference for one in verdicts] == [1, 0.5, 0]
    near = by_score(length, PROMPTS[:1], ["aaa"], ["b"], tie=2)
    assert near[0].preference == 0.5
    with pytest.raises(UsageError, match="distance"):
        by_score(len, [], [], [], tie=-1)  # type: ignore[arg-type]  # never called
