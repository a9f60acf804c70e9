"""Score functions, against numbers worked out by hand and laws nobody has to compute.

Finds: a misread formula (a variance over the wrong axis, a penalty with the wrong sign, a reference that is
subtracted twice), a draw that is not the one asked for, and a result that depends on the order of the rows.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref import rewards
from mlxpref.data.scale import fit_map
from mlxpref.errors import ScoreError, UsageError


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rng(seed=0):
    return np.random.default_rng(seed)


numbers = st.floats(-20, 20, allow_subnormal=False)
lists_of_scores = st.lists(numbers, min_size=2, max_size=6)


# --- one score ---


def test_log_sigmoid_at_its_middle_and_far_out():
    """Finds the textbook form, which is -inf at -1000."""
    found = rewards.log_sigmoid([0.0, -1000.0, 1000.0, 2.0])
    assert found == pytest.approx([-math.log(2), -1000.0, 0.0, math.log(sigmoid(2))], abs=1e-12)


def test_utility_is_linear_below_the_reference_and_flat_above_it():
    below = rewards.centred_utility([-30.0, -29.0], 7.0)
    above = rewards.centred_utility([40.0, 50.0], 7.0)
    assert below[1] - below[0] == pytest.approx(1.0) and above == pytest.approx([0.0, 0.0], abs=1e-12)
    assert rewards.centred_utility(7.0, 7.0) == pytest.approx(-math.log(2))


def test_the_reference_is_the_score_that_the_share_lies_below():
    assert rewards.reference_score(range(101), 0.85) == 85.0
    assert rewards.reference_score([1.0, 2.0], 0.5) == 1.5
    for wrong in (-0.1, 1.1):
        with pytest.raises(UsageError, match="share"):
            rewards.reference_score([1.0], wrong)
    with pytest.raises(ScoreError):
        rewards.reference_score([])


@given(st.lists(numbers, min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_quantile_is_no_lower_reference(scores, one, other):
    low, high = sorted((one, other))
    assert rewards.reference_score(scores, low) <= rewards.reference_score(scores, high) + 1e-12


@given(st.lists(numbers, min_size=2, max_size=20, unique=True), numbers, numbers)
def test_a_map_by_rank_keeps_the_order(scores, one, other):
    by_rank = fit_map(scores, kind="quantile", score_range=None, goal_range=(1.0, 10.0))
    low, high = sorted((one, other))
    assert by_rank(low) <= by_rank(high)


def test_one_bad_attribute_is_not_made_up_for():
    """log P(all good): a sum of utilities, where a mean of scores would call both the same."""
    found = rewards.joint_utility([[1.0, -2.0], [6.0, 5.0]], [0.0, 5.0])
    expected = [math.log(sigmoid(1)) + math.log(sigmoid(-7)), math.log(sigmoid(6)) + math.log(0.5)]
    assert found == pytest.approx(expected)
    spread, even = rewards.joint_utility([[10.0, -10.0], [0.0, 0.0]], [0.0, 0.0])
    assert spread < even


def test_standardised_scores_have_mean_0_and_deviation_1():
    standard = rewards.fit_standard([[1.0, 3.0], [5.0, 7.0]])
    assert standard == (4.0, math.sqrt(5))
    assert rewards.standardise([4.0, 4 + math.sqrt(5)], standard) == pytest.approx([0, 1])
    for nothing in ([], [2.0, 2.0]):
        with pytest.raises(ScoreError, match="standardised"):
            rewards.fit_standard(nothing)


# --- ensembles ---

THREE = [[2.0, 4.0, 9.0], [1.0, 1.0, 1.0]]


def test_an_ensemble_by_hand():
    assert rewards.mean_score(THREE) == pytest.approx([5, 1])
    assert rewards.worst_case(THREE) == pytest.approx([2, 1])
    assert rewards.uncertainty_weighted(THREE, 0.5) == pytest.approx([5 - 0.5 * 26 / 3, 1])
    with pytest.raises(UsageError):
        rewards.uncertainty_weighted(THREE, -0.1)


@given(st.lists(lists_of_scores.map(lambda v: v[:2]), min_size=1, max_size=4), st.floats(0, 3))
def test_the_worst_is_below_the_mean_and_no_penalty_is_the_mean(scores, penalty):
    assert rewards.uncertainty_weighted(scores, 0.0) == pytest.approx(rewards.mean_score(scores))
    assert (rewards.uncertainty_weighted(scores, penalty) <= rewards.mean_score(scores) + 1e-9).all()
    assert (rewards.worst_case(scores) <= rewards.mean_score(scores) + 1e-9).all()


# --- lengths ---


def test_a_penalty_takes_off_so_much_a_character():
    assert rewards.length_penalised([2.0, 2.0], [100, 0], 0.01) == pytest.approx([1, 2])


def test_dice_balances_lengths_and_stops_where_the_gap_grows():
    """Prompt 1 prefers the longer response until 0.00201, prompt 2 until 0.02: between them lengths are equal."""
    scores, lengths = [[1.0, 0.8995], [0.0, 1.0]], [[100, 50], [50, 100]]
    assert rewards.balanced_alpha(scores, lengths) == pytest.approx(0.003)

    def grid():
        yield from (0.0, 0.003, 0.05)
        pytest.fail("it went on after the gap had grown")

    assert rewards.balanced_alpha(scores, lengths, grid()) == 0.003


def test_dice_takes_lists_of_any_size_and_leaves_balanced_ones_alone():
    scores, lengths = [[1.0, 0.0], [0.0, 1.0, 0.5]], [[50, 100], [50, 100, 7000]]
    assert rewards.balanced_alpha(scores, lengths) == 0.0
    for wrong in (([], []), (scores, lengths[:1]), (scores, [[1, 2], [1, 2]])):
        with pytest.raises(ScoreError, match="belong together"):
            rewards.balanced_alpha(*wrong)


# --- directions ---


def test_dpa_weights_are_its_card_s():
    assert [rewards.second_weight(first) for first in (71, 80, 96, 100, -60)] == [70, 60, 28, 0, 80]
    weights = rewards.dpa_weights()
    assert weights[0] == (71, 70) and weights[-1] == (100, 0) and len(weights) == 30
    for first, second in weights:  # every one is a direction that can be asked for
        assert rewards.parse_direction(f"help*{first} + honest*{second}") == {"help": first, "honest": second}


def test_a_direction_by_hand():
    assert rewards.direction_score([[3.0, 4.0], [0.0, -1.0]], [80, 60]) == pytest.approx([4.8, -0.6])
    one, other = (rewards.direction_score([5.0, 2.0], weights) for weights in ([71, 70], [142, 140]))
    assert one == pytest.approx(other) == pytest.approx((5 * 71 + 2 * 70) / math.hypot(71, 70))
    with pytest.raises(UsageError):
        rewards.direction_score([1.0], [0])


def test_a_direction_s_words_are_read_back():
    assert rewards.parse_direction("helpfulness*97+verbosity*-24") == {"helpfulness": 97, "verbosity": -24}
    words = "helpfulness*80 + verbosity*60"
    assert rewards.direction_words(rewards.parse_direction(words)) == words


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("help*80 + honest*80", r"help\*71 \+ honest\*71"),
        ("help80", "is no NAME"),
        ("help*80 +", "is no NAME"),
        ("help*0.8 + honest*0.6", "is no NAME"),
        ("help*80 + help*60", "once"),
        ("help*0", "add up to 1"),
    ],
)
def test_what_is_no_direction_is_refused(text, why):
    with pytest.raises(UsageError, match=why):
        rewards.parse_direction(text)


# --- selection ---

FOUR = (3.0, 9.0, 6.0, 1.0)


def test_the_modes_that_draw_nothing():
    assert rewards.select_pair(FOUR, "max_min", rng=rng()) == (1, 3, 8.0)
    assert rewards.select_pair(FOUR, "max_max", rng=rng()) == (1, 2, 3.0)
    assert rewards.select_pair((5.0, 1.0, 1.0), "max_min", rng=rng()) == (0, 1, 4.0)  # the first of equals


def test_a_short_answer_can_be_preferred_to_a_better_one():
    """9 - 10, 8 - 1, 2 - 1; the margin stays that of the scores."""
    pair = rewards.select_pair((9.0, 8.0, 2.0), "max_min_p", rng=rng(), lengths=(1000, 100, 100), penalty=0.01)
    assert pair == (1, 0, -1.0)
    same = rewards.select_pair(FOUR, "max_min_p", rng=rng(), lengths=(9, 1, 5, 7), penalty=0.0)
    assert same == rewards.select_pair(FOUR, "max_min", rng=rng())


def test_draws_are_even_and_only_among_those_named():
    """4 standard deviations of 3000 draws."""
    pairs = Counter(rewards.select_pair(FOUR, "random", rng=rng(seed))[:2] for seed in range(3000))
    assert set(pairs) == {(1, 0), (1, 2), (1, 3), (2, 0), (2, 3), (0, 3)}  # the better one chosen
    assert all(abs(n - 500) < 4 * math.sqrt(3000 * 5 / 36) for n in pairs.values())
    others = Counter(rewards.select_pair(FOUR, "max_random", rng=rng(seed))[:2] for seed in range(3000))
    assert set(others) == {(1, 0), (1, 2), (1, 3)}
    assert all(abs(n - 1000) < 4 * math.sqrt(3000 * 2 / 9) for n in others.values())


@given(lists_of_scores, st.sampled_from(["random", "max_random", "max_min", "max_max"]), st.integers(0, 9))
def test_a_selected_pair_is_the_better_one_first_with_its_margin(scores, mode, seed):
    pair = rewards.select_pair(scores, mode, rng=rng(seed))
    assert pair == rewards.select_pair(scores, mode, rng=rng(seed))
    if pair is None:
        assert len(set(scores)) < len(scores)
        return
    assert pair.margin == scores[pair.chosen] - scores[pair.rejected] > 0
    assert mode == "random" or scores[pair.chosen] == max(scores)
    assert mode != "max_min" or scores[pair.rejected] == min(scores)


def test_equal_scores_make_no_pair():
    assert rewards.select_pair((5.0, 5.0, 1.0), "max_max", rng=rng()) is None
    assert rewards.select_pair((5.0, 5.0), "max_min_p", rng=rng(), lengths=(1, 9), penalty=0.1) is None
    assert rewards.select_pair((5.0, 4.0), "max_min_p", rng=rng(), lengths=(10, 0), penalty=0.1) is None


def test_a_selection_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="max_min_p"):
        rewards.select_pair(FOUR, "best", rng=rng())  # type: ignore[arg-type]  # what is refused
    with pytest.raises(UsageError, match="length"):
        rewards.select_pair(FOUR, "max_min_p", rng=rng(), penalty=0.1)
    with pytest.raises(UsageError, match="two"):
        rewards.select_pair((1.0,), "random", rng=rng())


# --- rejection sampling ---


def firsts(beta, n=6000):
    """How often each of three responses is accepted first."""
    found = Counter(rewards.rejection_sample((1.0, 0.5, 0.0), 1, beta=beta, rng=rng(seed))[0] for seed in range(n))
    return [found[place] / n for place in range(3)]


@pytest.mark.parametrize("beta", [0.5, 1.0, math.inf])
def test_the_first_accepted_follows_the_optimal_policy(beta):
    """Candidates are even, so it is softmax(r/β): 4 standard deviations of 6000. Infinity is plain sampling."""
    weights = [math.exp(r / beta) for r in (1.0, 0.5, 0.0)]
    for found, weight in zip(firsts(beta), weights, strict=True):
        share = weight / sum(weights)
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 6000)


def test_without_temperature_the_best_are_taken_in_order():
    for beta in (0.0, 1e-9, 5e-324):
        assert all(rewards.rejection_sample(FOUR, 3, beta=beta, rng=rng(seed)) == (1, 2, 0) for seed in range(20))


@given(lists_of_scores, st.integers(1, 8), st.floats(0.2, 5), st.integers(0, 9))
def test_so_many_are_accepted_once_each(scores, n, beta, seed):
    found = rewards.rejection_sample(scores, n, beta=5 * beta, rng=rng(seed))
    assert found == rewards.rejection_sample(scores, n, beta=5 * beta, rng=rng(seed))
    assert len(found) == len(set(found)) == min(n, len(scores)) and set(found) <= set(range(len(scores)))


def test_sampling_out_of_range_is_refused():
    for options in ({"n": 0}, {"n": 1, "beta": -0.1}, {"n": 1, "beta": math.nan}):
        with pytest.raises(UsageError):
            rewards.rejection_sample(FOUR, options["n"], beta=options.get("beta", 0.5), rng=rng())


def test_first_round_pairs_are_neighbours_the_better_one_chosen():
    pairs = list(rewards.first_round_pairs((0, 1, 2, 3, 4, 5, 6), (1.0, 4.0, 5.0, 5.0, 9.0, 2.0, 7.0)))
    assert pairs == [(1, 0, 3.0), (4, 5, 7.0)]


# --- filters ---


def test_a_bound_lets_the_share_go():
    values = [float(v) for v in range(1, 11)]
    assert rewards.highest_kept(values, 0.2) == 8 and rewards.lowest_kept(values, 0.2) == 3
    assert rewards.highest_kept(values[::-1], 0.2) == 8
    assert rewards.highest_kept([1.0, 9.0, 9.0, 9.0], 0.25) == 9  # equal values stay together
    assert rewards.lowest_kept([5.0], 0.9) == 5
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(UsageError):
            rewards.highest_kept(values, share)
    with pytest.raises(ScoreError):
        rewards.lowest_kept([], 0.5)


@given(st.lists(numbers, min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_no_more_than_the_share_goes_and_mirrored_values_mirror_it(values, share):
    kept = rewards.highest_kept(values, share)
    assert sum(v > kept for v in values) <= round(share * len(values)) and kept in values
    assert rewards.lowest_kept([-v for v in values], share) == -kept


def test_ches_by_hand():
    chosen, rejected = [[1.0, 2.0], [3.0, 0.0]], [[4.0, 1.0], [3.0, 0.0]]
    assert rewards.ches_scores(chosen, rejected) == pytest.approx([6 - 5, 0])
    by_token = rewards.ches_scores(chosen, rejected, [2, 3], [5, 1])
    assert by_token == pytest.approx([6 / 10 - 5 / 4, 9 / 3 - 9 / 9])
    for wrong in ((chosen, rejected[:1]), (chosen, rejected, [2, 3]), (chosen, rejected, [2, 0], [1, 1])):
        with pytest.raises(ScoreError):
            rewards.ches_scores(*wrong)


def test_length_normalised_ches_forgets_how_long_responses_are():
    one = rewards.ches_scores([[1.0, 2.0]], [[4.0, 1.0]], [2], [5])
    assert rewards.ches_scores([[10.0, 20.0]], [[4.0, 1.0]], [20], [5]) == pytest.approx(one)


def test_strength_is_of_each_pair_over_the_models():
    strength = rewards.preference_strength([[1.0, 3.0], [-2.0, -2.0]])
    assert strength.mean == pytest.approx([2, -2]) and strength.std == pytest.approx([1, 0])
    with pytest.raises(ScoreError):
        rewards.preference_strength([1.0, 2.0])


def test_labels_by_strength():
    """Ten pairs: the weakest is turned round, the next two get the ensemble's own probability."""
    means = [5.0, -2.0, 0.3, 4.0, -0.1, 3.0, 2.0, 1.0, 6.0, 7.0]
    labels = rewards.strength_labels(means, flip=0.1, soften=0.2)
    assert labels == pytest.approx([1, 0, sigmoid(0.3), 1, sigmoid(-0.1), 1, 1, 1, 1, 1])
    assert rewards.strength_labels(means, flip=0.0).tolist() == [1.0] * 10
    for wrong in ({"flip": -0.1}, {"flip": 0.6, "soften": 0.5}):
        with pytest.raises(UsageError):
            rewards.strength_labels(means, **wrong)


# --- within a list, and between two models ---


def test_win_rates_by_hand():
    found = rewards.win_rates([2.0, 0.0, -1.0])
    expected = [
        (0.5 + sigmoid(2) + sigmoid(3)) / 3,
        (sigmoid(-2) + 0.5 + sigmoid(1)) / 3,
        (sigmoid(-3) + sigmoid(-1) + 0.5) / 3,
    ]
    assert found == pytest.approx(expected)
    assert rewards.win_rates([[1e4, -1e4]]) == pytest.approx(np.array([[0.75, 0.25]]))


@given(lists_of_scores, numbers)
def test_win_rates_average_a_half_and_know_no_zero(scores, shift):
    found = rewards.win_rates(scores)
    assert found.mean() == pytest.approx(0.5)
    assert rewards.win_rates([s + shift for s in scores]) == pytest.approx(found)


def test_consistency_of_two_rankings():
    assert rewards.ranking_consistency([3.0, 2.0, 1.0], [30.0, 20.0, 10.0]) == 1.0
    assert rewards.ranking_consistency([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == 0.0
    assert rewards.ranking_consistency([3.0, 2.0, 1.0], [2.0, 3.0, 1.0]) == pytest.approx(2 / 3)  # τ = 1/3
    assert rewards.ranking_consistency([[1.0, 1.0]], [[1.0, 2.0]]) == pytest.approx([0.5])
    for wrong in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ScoreError):
            rewards.ranking_consistency(*wrong)


def test_scores_from_log_probs_by_hand():
    assert rewards.log_ratio_scores([-10.0, -8.0], [-12.0, -7.0], 0.5) == pytest.approx([1, -0.5])
    assert rewards.contrastive_scores([-10.0, -8.0], [-12.0, -7.0], [4, 2]) == pytest.approx([0.5, -0.5])
    for wrong in (([-1.0], [-1.0, -2.0], [1]), ([-1.0], [-1.0], [0])):
        with pytest.raises(ScoreError):
            rewards.contrastive_scores(*wrong)


def test_steerlm_weights_by_hand():
    found = rewards.steerlm_weights([-1.0, -2.0], [-5.0, -5.0], [-4.0, -6.0], [-4.0, -7.0])
    logits = (-1 - 5 + 4, -2 - 5 + 6)  # the likelier of the two was drawn too often
    assert found.target == pytest.approx([sigmoid(logits[0] - logits[1]), sigmoid(logits[1] - logits[0])])
    assert found.baseline == pytest.approx([sigmoid(1), sigmoid(-1)])
    at_rest = rewards.steerlm_weights([-1.0, -2.0], [-5.0, -5.0], [-4.0, -6.0], [-16.0, -17.0])
    assert at_rest.target == pytest.approx(at_rest.baseline)  # Q is P(a|x,y)·P(y|x) but for a constant
