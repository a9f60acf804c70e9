"""The oracle alone: published numbers, and laws its formulas obey. Nothing of the package is here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from oracle import (
    ORACLE,
    VALUES,
    A,
    B,
    Example,
    Golden,
    Value,
    frozen,
    kl_slopes,
    log_sigma,
    pair,
    random_examples,
    responses,
    sg,
    text_slopes,
    token_slopes,
    wpo_weights,
)

ROWS = list(ORACLE)
POINTS = [
    pytest.param(name, options, id=f"{name}-{options}") for name, row in ORACLE.items() for options in ({}, *row.points)
]
GOLDEN = [
    pytest.param(name, golden, id=f"{name}-{i}") for name, row in ORACLE.items() for i, golden in enumerate(row.golden)
]


def loss(name: str, x: Example, **options: Any) -> float:
    return ORACLE[name].run([x], options)[0][0]


def total_slopes(name: str, x: Example, **options: Any) -> list[float]:
    """∂/∂ℓ of each response, as its first token's."""
    return [s[0] for s in token_slopes(lambda y: loss(name, y, **options), x)]


def near(got: float, expected: float, places: float = 6e-7) -> None:
    assert got == pytest.approx(expected, abs=places, rel=1e-6)


@pytest.mark.parametrize("name, golden", GOLDEN)
def test_golden_values_and_slopes(name: str, golden: Golden) -> None:
    """Finds: a misread formula, option or column."""
    for x, state, (value, by_chosen, by_rejected) in golden.cases():
        run = ORACLE[name].run
        near(run([x], golden.options, state)[0][0], value)
        slopes = token_slopes(lambda xs: run(xs, golden.options, state)[0], [x])[0]  # noqa: B023 - called before the loop goes on
        for got, expected in ((slopes[0], by_chosen), (slopes[1], by_rejected)):
            for slope in got:
                near(slope, expected)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.name}-{v.said}-{v.options}")
def test_single_values(value: Value) -> None:
    losses, _ = ORACLE[value.name].run(value.examples, value.options, value.state)
    near(math.fsum(losses), value.total, value.within)


@pytest.mark.parametrize("name, options", POINTS)
def test_every_point_gives_finite_losses_that_move(name: str, options: Mapping[str, Any]) -> None:
    """Finds: a point at which a formula overflows, or is so saturated that a wrong one would agree."""
    listwise = ORACLE[name].loss.__module__ == "oracle_lists"
    xs = random_examples(12, 3 if listwise else 2, seed=5)
    losses, _ = ORACLE[name].run(xs, options)
    assert len(losses) == len(xs) and all(math.isfinite(v) for v in losses)
    slopes = token_slopes(lambda ys: ORACLE[name].run(ys, options)[0], xs)
    moving = [any(abs(s) > 1e-7 for tokens in of_one for s in tokens) for of_one in slopes]
    assert sum(moving) >= 4
    assert all(math.isfinite(s) for of_one in slopes for tokens in of_one for s in tokens)


@pytest.mark.parametrize("name", ROWS)
def test_every_point_is_another_loss(name: str) -> None:
    """Finds: an option that the row accepts and does not use."""
    xs, row = random_examples(12, seed=6), ORACLE[name]
    state = row.run(random_examples(12, seed=7), {})[1]  # some options act from the second batch on
    plain = row.run(xs, {}, state)[0]
    for options in row.points:
        moved = row.run(xs, options, state)[0]
        assert max(abs(a - b) for a, b in zip(plain, moved, strict=True)) > 1e-4, options


def test_random_examples_are_full_and_of_the_promised_ranges() -> None:
    def within(values: Sequence[Any], low: float, high: float) -> bool:
        return all(within(v, low, high) if isinstance(v, list) else low <= v <= high for v in values)

    for k in (2, 4):
        for x in random_examples(40, k, seed=3):
            lengths = [len(tokens) for tokens in x.policy]
            for name in ("token_weights", "divergence", "overlap", "token_kl"):
                assert [len(tokens) for tokens in x.extras[name]] == lengths
            for name in ("win_rates", "previous", "aligned_logps", "margin_rewards", "attributes"):
                assert len(x.extras[name]) == k
            assert all(len(scores) == 3 for scores in x.extras["attributes"])
            for tokens in x.extras["divergence"]:
                assert tokens == sorted(tokens) and set(tokens) <= {0.0, 1.0} and tokens[-1] == 1
            assert len({tokens.count(0.0) for tokens in x.extras["divergence"]}) == 1
            assert within(x.extras["token_kl"], 0, 1) and within(x.extras["overlap"], -3, -0.01)
            assert within([x.extras["confidence"]], 0.2, 1) and x.extras["groups"] in (0, 1)
            for name, texts in x.texts.items():
                assert len(texts) == (k if name == "instructions" else 1)
                assert [len(t) for t in texts] == [len(t) for t in x.texts_reference[name]]
                assert within(texts, -4, -0.01) and within(x.texts_reference[name], -4, -0.01)


def test_the_columns_move_no_token() -> None:
    """Finds: a new column drawn from the generator of the tokens."""
    xs = random_examples(2, seed=0)
    assert [len(tokens) for x in xs for tokens in x.policy] == [7, 7, 1, 9]
    assert xs[0].policy[0][0] == pytest.approx(-0.17153266894130242, abs=1e-12)
    assert xs[1].scores[0] == pytest.approx(9.981744679775122, abs=1e-12)


# --- constants and slopes -----------------------------------------------------------------------


def test_sg_holds_its_value_under_differences_only() -> None:
    def squared(x: Example) -> float:
        a = x.policy[0][0]
        return a * sg(a)

    x = pair(-1, -2)
    assert squared(x) == x.policy[0][0] ** 2
    assert token_slopes(squared, x)[0][0] == pytest.approx(x.policy[0][0])
    held = frozen(squared, x)
    assert held(pair(1, -2)) == pytest.approx(pair(1, -2).policy[0][0] * x.policy[0][0])


def test_slopes_of_a_batch_are_those_of_its_examples() -> None:
    xs = random_examples(3, seed=8)
    together = token_slopes(lambda ys: ORACLE["dpo"].run(ys, {})[0], xs)
    for got, x in zip(together, xs, strict=True):
        for a, b in zip(got, token_slopes(ORACLE["dpo"].loss, x), strict=True):
            assert a == pytest.approx(b, abs=1e-8)


def test_slopes_of_texts_and_of_the_kl() -> None:
    x = random_examples(1, seed=9)[0]
    for slope in text_slopes(lambda y: ORACLE["xpo"].loss(y, alpha=0.25), x, "third")[0]:
        near(slope, 0.25)
    for slope in text_slopes(lambda y: ORACLE["selm"].loss(y, beta=0.5, alpha=0.5), x, "third")[0]:
        near(slope, 0.25)
    n = len(x.texts["gold"][0])
    for slope in text_slopes(ORACLE["triple_po"].loss, x, "gold")[0]:
        near(slope, -1 / n)
    by_chosen, by_rejected = text_slopes(ORACLE["dove"].loss, x, "instructions")
    near(by_chosen[0], -by_rejected[0])
    near(by_chosen[0], token_slopes(ORACLE["dove"].loss, x)[0][0])
    options = {"mask": "ones", "kl_mask": "ones"}
    plain = token_slopes(lambda y: ORACLE["experimental_mapo"].loss(y, **options), x)
    kl = kl_slopes(lambda y: ORACLE["experimental_mapo"].loss(y, **options), x)
    for by_token, by_kl in zip(plain, kl, strict=True):
        assert by_kl == pytest.approx(by_token, abs=1e-8)


def test_what_is_constant_has_no_slope() -> None:
    """Finds: an ``sg`` forgotten, by the slopes that the formulas have with a constant in its place."""
    xs = random_examples(4, seed=10)
    for of_one in text_slopes(lambda ys: ORACLE["kto"].run(ys, {})[0], xs, "mismatched"):
        assert of_one == [[0.0] * len(of_one[0])]
    d = ORACLE["bco"].run(xs, {"beta": 0.1})[1][0]
    slopes = token_slopes(lambda ys: ORACLE["bco"].run(ys, {"beta": 0.1})[0], xs)
    for x, of_one in zip(xs, slopes, strict=True):
        r = 0.1 * (math.fsum(x.policy[0]) - math.fsum(x.reference[0]))
        near(of_one[0][0], -0.1 / (1 + math.exp(r - d)))
    q = ORACLE["group_robust"].run(xs, {"eta": 1.0})[1][0]
    slopes = token_slopes(lambda ys: ORACLE["group_robust"].run(ys, {"eta": 1.0})[0], xs)
    for x, of_one in zip(xs, slopes, strict=True):
        share = q[x.extras["groups"]] * 4 / sum(y.extras["groups"] == x.extras["groups"] for y in xs)
        near(of_one[0][0], share * token_slopes(ORACLE["dpo"].loss, x)[0][0])


# --- laws --------------------------------------------------------------------------------------


def test_goal_rewards_of_a_pair() -> None:
    """1.8.5 and 1.8.6: −(goal − score)², whose gaps turn with the goal."""
    gaps = [-((g - 8) ** 2) + (g - 5.5) ** 2 for g in (5.5, 6.75, 8, 10)]
    assert gaps == [-6.25, 0, 6.25, 16.25]


def test_reward_augmentation_pulls_a_goal_blind_model_back() -> None:
    """1.8.2: d/dz of both halves is tanh(z/2)."""
    halves = [pair(3.5, -3.5), pair(-3.5, 3.5)]
    slopes = token_slopes(lambda xs: ORACLE["dpo"].run(xs, {"beta": 0.1})[0], halves)
    near(slopes[0][0][0] - slopes[1][0][0], 0.1 * math.tanh(0.35))


@pytest.mark.parametrize("name", ["dpo", "f_dpo", "flex_dpo"])
def test_at_the_reference_the_slopes_are_half_beta(name: str) -> None:
    options = {"beta_chosen": 0.3, "beta_rejected": 0.3} if name == "flex_dpo" else {"beta": 0.3}
    by_chosen, by_rejected = total_slopes(name, pair(0, 0), **options)
    near(by_chosen, -0.15)
    near(by_rejected, 0.15)


def test_jensen_shannon_pushes_half_as_hard_at_the_reference() -> None:
    near(total_slopes("f_dpo", pair(0, 0), beta=0.3, divergence="js")[0], -0.075)


def test_alpha_divergence_at_one_is_its_limit() -> None:
    x = pair(1.5, -0.5)
    near(
        loss("f_dpo", x, divergence="alpha", alpha=1.0),
        loss("f_dpo", x, divergence="alpha", alpha=1 + 1e-6),
        1e-6,
    )


@pytest.mark.parametrize(
    "name, options, at",
    [
        ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, pair(69.06755, 0)),
        ("dpo", {"beta": 0.1, "label_smoothing": 0.3}, pair(8.47298, 0)),
        ("distilled_dpo", {"beta": 0.1}, pair(25, 0)),
        ("soft_label_dpo", {"beta": 0.1}, pair(25, 0)),
        ("reward_aware", {"beta": 0.1}, pair(25, 0)),
        ("reward_aware", {"beta": 0.1, "divergence": "fwd_kl"}, pair(25, 0)),
        ("ipo", {"beta": 0.1}, pair(5, 0)),
    ],
)
def test_slopes_vanish_at_the_optimum(name: str, options: Mapping[str, Any], at: Example) -> None:
    for slope in total_slopes(name, at, **options):
        near(slope, 0)


def test_nca_has_an_optimum_for_the_chosen_response() -> None:
    near(total_slopes("nca_pair", pair(10 * math.log(2), -1), beta=0.1)[0], 0)


def test_exo_has_the_slope_derived_for_it() -> None:
    """dL/dz = p(1−p)(z−z*)."""
    z, goal = -0.4, math.log(0.8 / 0.2)
    p = 1 / (1 + math.exp(-z))
    near(total_slopes("exo_pair", pair(-4, 0), beta=0.1, label_smoothing=0.2)[0], 0.1 * p * (1 - p) * (z - goal))


def test_robust_dpo_is_unbiased_under_flips() -> None:
    options = {"beta": 0.3, "label_smoothing": 0.2}
    right, wrong = loss("robust", pair(2, -1), **options), loss("robust", pair(-1, 2), **options)
    near(0.8 * right + 0.2 * wrong, loss("dpo", pair(2, -1), beta=0.3))


def test_r_dpo_pushes_a_longer_chosen_response_up_less() -> None:
    longer = Example([[-1.0] * 6, [-2.0] * 2], [[-1.0] * 6, [-2.0] * 2])
    assert abs(total_slopes("r_dpo", longer, alpha=0.5)[0]) < 0.05
    near(loss("r_dpo", longer, alpha=0.5), -log_sigma(2.0))
    near(loss("r_dpo", pair(2, 1), alpha=0.5), loss("dpo", pair(2, 1)))


def test_focal_sign_turns_where_it_was_derived() -> None:
    """γ = 2 trains backwards at p = ½ and not above e^{−1/2} = .6065; γ = .05 does nowhere near."""
    assert total_slopes("focalpo", pair(0, 0), gamma=2.0)[0] > 0
    assert total_slopes("focalpo", pair(4.2, 0), gamma=2.0)[0] > 0 > total_slopes("focalpo", pair(4.5, 0), gamma=2.0)[0]
    assert total_slopes("focalpo", pair(0, 0), gamma=0.05)[0] < 0
    p = 1 / (1 + math.exp(-0.3))
    near(
        total_slopes("focalpo", pair(3, 0), gamma=0.5)[0],
        -0.1 * math.sqrt(p) * (1 - p) * (1 + 0.5 * math.log(p)),
    )


def test_discopop_is_not_monotone() -> None:
    assert loss("discopop", pair(-1, 1)) < loss("discopop", pair(0, 0)) < loss("discopop", pair(1, -1))


def test_temporal_decay_sums() -> None:
    """A9: Σ γ^t of 24 and of 30 tokens: the log-ratios −1 and 0 a token leave only one sum."""
    for n, expected in ((24, 18.826764), (30, 22.271268)):
        x = Example([[-1.0] * n, [-1.0]], [[0.0] * n, [-1.0]])
        near(loss("d2po", x, beta=0.1, gamma=0.98), -log_sigma(-0.1 * expected))


def test_ld_dpo_at_zero_looks_at_the_shorter_length_only() -> None:
    x = Example([[-1.0, -2.0, -9.0], [-3.0, -1.0]], [[-2.0, -2.0, -1.0], [-1.0, -1.0]])
    near(loss("ld_dpo", x, alpha=0.0), -log_sigma(0.1 * (1 + 2)))
    near(loss("ld_dpo", x, alpha=0.5), -log_sigma(0.1 * (1 - 4 + 2)))


def test_dpop_and_minor_dpo_are_dpo_on_their_good_side() -> None:
    for name in ("dpop", "minor_dpo"):
        near(loss(name, pair(1, 0.5)), loss("dpo", pair(1, 0.5)))
    assert total_slopes("minor_dpo", pair(1, -0.5))[1] == 0


def test_apo_down_leaves_the_chosen_response_alone_at_the_reference() -> None:
    by_chosen, by_rejected = total_slopes("apo_down", pair(0, 0), beta=0.2)
    near(by_chosen, 0)
    near(by_rejected, 0.05)


def test_sppo_with_certain_wins_is_the_hard_one() -> None:
    x = replace(pair(1, -2), extras={"win_rates": [1.0, 0.0]})
    near(loss("sppo", x, beta=0.1), loss("sppo_hard", x, beta=0.1))
    near(loss("sppo_hard", x, beta=0.1), ((1 - 5) ** 2 + (-2 + 5) ** 2) / 2)


def test_alphapo_special_cases() -> None:
    x = Example([[-0.5, -1.0], [-2.0]], [[0.0, 0.0], [0.0]])
    near(loss("alphapo", x, alpha=0.0), loss("simpo", x, beta=2.5, gamma=0.25))
    near(loss("alphapo", x, alpha=1e-7), loss("alphapo", x, alpha=0.0))
    near(loss("alphapo", x, alpha=1.0, gamma=0.0), -log_sigma(2.5 * (math.exp(2) - math.exp(0.75))))
    near(loss("alphapo", x, alpha=-1.0, gamma=0.0), -log_sigma(2.5 * (math.exp(-0.75) - math.exp(-2))))


def test_alpha_dpo_without_its_margin_is_simpo() -> None:
    x = random_examples(1, seed=11)[0]
    near(loss("alpha_dpo", x, alpha=0.0), loss("simpo", x, beta=2.5, gamma=1.5))


def test_alpha_dpo_normalises_over_the_first_batch_and_then_decays() -> None:
    def of(margin: float) -> Example:
        return Example([[margin - 5], [-5.0]], [[-5.0], [-5.0]])

    losses, state = ORACLE["alpha_dpo"].run([of(1.0), of(3.0)], {})
    assert state == (2.0, 1.0, 1.0)
    near(losses[0], -log_sigma(2.5 * (1 - (0.6 - 0.2))))
    near(losses[1], -log_sigma(2.5 * (3 - (0.6 + 0.2))))
    losses, state = ORACLE["alpha_dpo"].run([of(0.0), of(8.0)], {}, state)
    assert state == pytest.approx((0.9 * 2 + 0.4, 0.9 + 0.4, 1.0))
    near(losses[0], -log_sigma(2.5 * (0 - (0.6 + 0.2 * (0 - 2.2) / 1.3))))


def test_bco_averages_all_rewards_seen() -> None:
    first, state = ORACLE["bco"].run([pair(3, 1)], {"beta": 0.1})
    assert state == pytest.approx((0.2, 2))
    near(first[0], -log_sigma(0.1) - log_sigma(0.1))
    second, state = ORACLE["bco"].run([pair(0, 0), pair(2, -4)], {"beta": 0.1}, state)
    assert state == pytest.approx((0.2 / 6, 6))
    near(second[0], -log_sigma(-0.2 / 6) - log_sigma(0.2 / 6))


def test_kto_weights_and_its_batch_constant() -> None:
    def with_text(x: Example, by: float) -> Example:
        return replace(x, texts={"mismatched": [[by - 9]]}, texts_reference={"mismatched": [[-9.0]]})

    def sigma(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    xs = [with_text(pair(2, 1), 3.0), with_text(pair(0, -1), -1.0)]  # K = 1
    got = ORACLE["kto"].run(xs, {"desirable_weight": 2.0, "undesirable_weight": 3.0})[0]
    near(got[0], 2 * (1 - sigma(0.1)) + 3 * (1 - sigma(0.0)))
    near(got[1], 2 * (1 - sigma(-0.1)) + 3 * (1 - sigma(0.2)))


def test_aot_pairs_by_rank() -> None:
    """Paired sorts the margins of the policy and of the reference, unpaired a_w and a_l."""

    def of(policy: Sequence[float], reference: Sequence[float]) -> Example:
        return Example([[v] for v in policy], [[v] for v in reference])

    xs = [of((-1, -3), (-2, -7)), of((-4, -1), (-5, -5))]  # margins 2, −3 and 5, 0; a_w 1, 1; a_l 4, 4
    near(math.fsum(ORACLE["aot"].run(xs, {"beta": 0.1})[0]), -log_sigma(-0.3) - log_sigma(-0.3))
    assert ORACLE["aot"].run(xs[::-1], {})[0] == ORACLE["aot"].run(xs, {})[0]
    xs = [pair(1, 5), pair(4, 2)]
    near(math.fsum(ORACLE["aot_unpaired"].run(xs, {"beta": 0.1})[0]), -log_sigma(-0.1) - log_sigma(-0.1))
    xs = [of((-1, -3), (-2, -2)), of((-4, -1), (-5, -1))]  # margins 2, −3 and 0, −4
    near(math.fsum(ORACLE["aot"].run(xs, {"beta": 0.1})[0]), -log_sigma(0.1) - log_sigma(0.2))


def test_group_weights_follow_the_worse_group() -> None:
    xs = [replace(pair(a, 0), extras={"groups": g}) for a, g in ((5, 0), (-5, 1), (-5, 1))]
    low, high = (-log_sigma(z) for z in (0.5, -0.5))
    losses, (q,) = ORACLE["group_robust"].run(xs, {"eta": 1.0})
    share = math.exp(low) / (math.exp(low) + math.exp(high))
    assert q == pytest.approx([share, 1 - share])
    near(math.fsum(losses) / 3, share * low + (1 - share) * high)
    losses, (after,) = ORACLE["group_robust"].run(xs[:1], {"eta": 1.0}, (q,))
    up = share * math.exp(low)
    assert after == pytest.approx([up / (up + 1 - share), (1 - share) / (up + 1 - share)])
    near(losses[0], after[0] * low)


def test_equal_groups_keep_their_weights() -> None:
    xs = [replace(pair(2, 0), extras={"groups": g}) for g in (0, 1)]
    losses, (q,) = ORACLE["group_robust"].run(xs, {"eta": 1.0})
    assert q == pytest.approx([0.5, 0.5])
    near(losses[0], loss("dpo", xs[0]))


def test_selfie_doubts_the_lowest_margins_of_its_window() -> None:
    run = ORACLE["selfie"].run
    first = [pair(float(v), 0) for v in range(11)]  # the 10th percentile of 0…10 is 1
    losses, state = run(first, {})
    near(losses[0], math.log(2))
    assert state[0][-11:] == [float(v) for v in range(11)] and state[1:] == (11, 1)
    options: dict[str, Any] = {"alpha": 0.4}
    losses, _ = run([pair(1.5, 0), pair(1, 0), pair(0.5, 0)], options, state)
    near(losses[0], loss("dpo", pair(1.5, 0)))
    near(losses[1], loss("dpo", pair(1, 0), label_smoothing=0.4))
    near(losses[2], loss("dpo", pair(0.5, 0), label_smoothing=0.4))
    losses, _ = run([pair(0.5, 0)], {**options, "after": 2}, state)
    near(losses[0], loss("dpo", pair(0.5, 0)))
    losses, _ = run([pair(0.5, 0)], {**options, "after": 1}, state)
    near(losses[0], loss("dpo", pair(0.5, 0), label_smoothing=0.4))
    # At the threshold itself the doubt is constant: a difference that let it turn would be of the order 1e3.
    slopes = token_slopes(lambda xs: run(xs, options, state)[0], [pair(1, 0)])[0]
    near(slopes[0][0], total_slopes("dpo", pair(1, 0), label_smoothing=0.4)[0])
    losses, _ = run([pair(1.5, 0), pair(1.7, 0)], {**options, "quantile": 0.16}, state)  # at 1.6
    near(losses[0], loss("dpo", pair(1.5, 0), label_smoothing=0.4))
    near(losses[1], loss("dpo", pair(1.7, 0)))


def test_selfie_remembers_fifty_margins() -> None:
    state = ORACLE["selfie"].run([pair(float(v), 0) for v in range(60)], {})[1]
    assert state == ([float(v) for v in range(10, 60)], 50, 1)
    state = ORACLE["selfie"].run([pair(-1, 0)], {}, state)[1]
    assert state == ([float(v) for v in range(11, 60)] + [-1.0], 50, 2)


def test_slic_and_simpo_hinges() -> None:
    x = Example([[-1.0, -2.0], [-3.5]], [[0.0, 0.0], [0.0]])
    near(loss("slic", x, delta=2.0, sft_weight=0.5), 2 - 0.5 + 1.5)
    near(loss("slic", x, delta=0.2, sft_weight=0.0), 0)
    near(loss("simpo", x, loss_type="hinge", beta=0.4, gamma=0.3), 1 - (0.4 * 2 - 0.3))
    near(loss("simpo", x, loss_type="hinge", beta=2.0, gamma=0.3), 0)


def odds_slope(m: float, rejected: float) -> float:
    """d/dm log σ(log-odds(m) − log-odds of the rejected): (1 − σ)/(1 − p)."""
    odds = math.exp(m) / (1 - math.exp(m))
    return rejected / (odds + rejected) / (1 - math.exp(m))


def test_orpo_by_its_odds() -> None:
    x = Example([[-0.2, -0.6], [-1.5]], [[0.0, 0.0], [0.0]])
    odds = [p / (1 - p) for p in (math.exp(-0.4), math.exp(-1.5))]
    near(loss("orpo", x, beta=0.7), 0.4 + 0.7 * math.log(1 + odds[1] / odds[0]))
    certain = replace(x, policy=[[-1e-9], [-1.5]])
    odds[0] = math.exp(-1e-6) / (1 - math.exp(-1e-6))
    near(loss("orpo", certain, beta=1e6), 1e6 * math.log1p(odds[1] / odds[0]))
    near(loss("orpo", replace(x, policy=[[-0.02], [-1.5]]), beta=0.0), 0.02)
    near(total_slopes("orpo", replace(x, policy=[[-0.02], [-1.5]]), beta=1e3)[0], -1 - 1e3 * odds_slope(-0.02, odds[1]))


def test_cpo_is_dpo_with_a_uniform_reference_and_nll() -> None:
    x = Example([[-0.2, -0.6], [-1.5]], [[0.0, 0.0], [0.0]])
    near(loss("cpo", x, beta=0.7, alpha=0.5), loss("dpo", x, beta=0.7) + 0.5 * 0.4)


def test_poft_trusts_the_aligned_models_by_its_gap_to_them() -> None:
    """−β(1−p)/n for each token."""
    x = replace(A, extras={"aligned_logps": [-2.65, -1.0]})
    near(loss("poft", x, beta=1.0), loss("dpo", A, beta=0.1))
    near(loss("poft", x, beta=2.0, gamma=-0.65), loss("dpo", A, beta=0.1))
    by_chosen, by_rejected = total_slopes("poft", x)
    near(by_chosen, 10 * total_slopes("dpo", A)[0] / 24)
    assert by_rejected == 0


def test_reward_aware_slopes_as_derived() -> None:
    """d fwd/dz = p(1−p)(z−ηδ); d bwd/dz = p−q."""
    p, q = (1 / (1 + math.exp(-v)) for v in (0.3, 0.5 * 2.5))
    options = {"beta": 0.1, "eta": 0.5}
    near(total_slopes("reward_aware", pair(3, 0), **options)[0], 0.1 * (p - q))
    near(
        total_slopes("reward_aware", pair(3, 0), divergence="fwd_kl", **options)[0],
        0.1 * p * (1 - p) * (0.3 - 1.25),
    )
    x = Example([[-1.0, -2.0], [-3.0]], [[-1.0, -1.0], [-1.0]], (2, 1))
    near(loss("reward_aware", x, sft_weight=0.4) - loss("reward_aware", x), 0.6)


def test_scores_without_a_gap() -> None:
    tied = pair(3, -1, (5, 5))
    near(loss("soft_label_dpo", tied), loss("dpo", tied, label_smoothing=0.5))
    near(loss("mm_dpo", tied, w=2.0), loss("dpo", tied))
    near(loss("odpo", tied, offset="linear"), loss("dpo", tied))
    near(loss("odpo", tied, alpha=0.1), -log_sigma(0.4 - 0.1 * math.log(1e-3)))


def test_mm_dpo_takes_the_size_of_the_gap_and_has_a_floor() -> None:
    near(loss("mm_dpo", pair(3, -1, (2, 5))), loss("mm_dpo", pair(3, -1, (5, 2))))
    near(loss("mm_dpo", pair(300, -100), beta=1e-5), -log_sigma(0.4))


def test_e_dpo_between_the_nearest_model_and_the_mean() -> None:
    def of(a: float, gaps: Sequence[float]) -> Example:
        return replace(pair(a, 0), extras={"attributes": [list(gaps), [0.0] * len(gaps)]})

    xs = [of(10, (2, 1)), of(20, (2, 4))]  # D = (½, 2)
    run = ORACLE["experimental_e_dpo"].run
    for tau, expected in ((1e-3, 0.5 + 1e-3 * math.log(2)), (1e6, 1.25)):
        for got in run(xs, {"tau": tau})[0]:
            near(got, expected, 1e-5)
    soft = -math.log((math.exp(-0.5) + math.exp(-2)) / 2)
    got = run(xs, {"gamma": 0.1})[0]
    near(got[0], soft + 0.1 * (90 + 100) / 2)
    near(got[1], soft + 0.1 * (80 + 100) / 2)


def test_modpo_with_all_weight_on_the_preferences_is_dpo() -> None:
    x = replace(pair(2, -1), extras={"margin_rewards": [3.0, 1.0]})
    near(loss("modpo", x, weights=(1.0, 0.0)), loss("dpo", x))
    near(loss("modpo", x, weights=(0.5, 0.5)), -log_sigma(2 * (0.3 - 1)))


def test_cream_mixes_both_labels() -> None:
    x = replace(pair(2, -1), extras={"confidence": 0.7})
    near(loss("cream", x), 0.7 * loss("dpo", pair(2, -1)) + 0.3 * loss("dpo", pair(-1, 2)))


def test_two_responses_in_a_list() -> None:
    """LiPO is DPO times 1/log 2 − 1/log 3; PRO compares δm; NCA its pair."""
    factor = 1 / math.log(2) - 1 / math.log(3)
    for x in (A, B):
        near(loss("lipo", x), factor * loss("dpo", x))
        m_w, m_l = (math.fsum(tokens) / len(tokens) for tokens in x.policy)
        near(loss("pro", x, sft=0.5), -log_sigma(2.5 * (m_w - m_l)) - 0.5 * m_w)


def test_lipo_ranks_have_no_slope_and_ties_go_by_slot() -> None:
    tied = responses((1, 1, 0), (9, 6, 3))
    discount = [1 / math.log(1 + rank) for rank in (1, 2, 3)]
    gains = (2.0, math.sqrt(2), 1.0)
    expected = (
        (gains[0] - gains[1]) * (discount[0] - discount[1]) * math.log(2)
        + (gains[0] - gains[2]) * (discount[0] - discount[2]) * math.log(1 + math.exp(-1))
        + (gains[1] - gains[2]) * (discount[1] - discount[2]) * math.log(1 + math.exp(-1))
    )
    near(loss("lipo", tied, beta=1.0), expected)
    slopes = total_slopes("lipo", tied, beta=1.0)  # a difference over a jump of ranks would be of the order 1e4
    assert max(map(abs, slopes)) < 1


def test_tree_tpo_weighs_tokens() -> None:
    x = random_examples(1, 3, seed=12)[0]
    ones = replace(x, extras={"token_weights": [[1.0] * len(tokens) for tokens in x.policy]})
    near(loss("experimental_tree_tpo", ones), loss("lipo", x))
    x = Example([[-1.0, -2.0], [-3.0]], [[-2.0, -5.0], [-1.0]], (2, 1), {"token_weights": [[0.5, 2.0], [1.5]]})
    factor = 1 / math.log(2) - 1 / math.log(3)
    near(loss("experimental_tree_tpo", x), factor * -log_sigma(0.1 * (0.5 + 6 + 3)))


def test_mcts_dpo_counts_from_the_divergence_and_doubts_by_confidence() -> None:
    x = Example(
        [[-1.0, -2.0], [-1.0, -4.0]],
        [[-3.0, -2.5], [-3.5, -3.0]],
        extras={"divergence": [[0.0, 1.0], [0.0, 1.0]], "confidence": 0.3},
    )
    near(loss("mcts_dpo", x), (-log_sigma(0.15) - log_sigma(-0.15)) / 2)
    x = replace(x, extras={**x.extras, "confidence": 0.8})
    near(loss("mcts_dpo", x), -0.8 * log_sigma(0.15) - 0.2 * log_sigma(-0.15))


def test_mapo_masks_by_the_surprisal_of_the_reference() -> None:
    x = Example(
        [[-1.0, -2.0, -3.0], [-1.0]],
        [[-2.0, -4.0, -3.0], [-3.0]],
        extras={"token_kl": [[0.5, 0.25, 1.0], [0.75]]},
    )  # masks 0, 1, ½ and 1: u = 2 and 2; KL .75 and .75, unmasked 1.75 and .75
    near(loss("experimental_mapo", x), math.log(2))
    near(loss("experimental_mapo", x, kl_mask="ones"), -log_sigma(0.1))
    near(loss("experimental_mapo", x, kl_mask="none"), math.log(2))
    near(loss("experimental_mapo", x, mask="ones"), -log_sigma(0.1 * (3 - 2 + 1)))


def test_rationales_by_hand() -> None:
    x = replace(pair(2, -1), texts={"rationale": [[-1.0, -3.0]]})
    near(loss("rationale_dpo", x, gamma=0.5), loss("dpo", x) + math.log(1 + math.exp(2)))
    x = replace(x, policy=[[-1.0], [-2.0]])
    near(loss("rationale_orpo", x, gamma=0.5), loss("orpo", x) + 1)


def test_inpo_between_reference_and_previous_policy() -> None:
    x = Example([[-2.0], [-5.0]], [[-3.0], [-4.0]], extras={"previous": [-2.0, -4.0]})
    near(loss("inpo", x, eta=0.25, tau=0.1), (3 - 0.4 * 1 - 0.6 * 2 - 2) ** 2)


def test_wpo_weights() -> None:
    """One-hot and uniform distributions weigh 1: their log Σ p² is the token's own log-prob."""
    own = [list(tokens) for tokens in A.policy]
    near(wpo_weights(replace(A, extras={"overlap": own})), 1)
    x = Example([[-1.0, -2.0], [-3.0]], [[0.0, 0.0], [0.0]], extras={"overlap": [[-1.0, -1.5], [-2.0]]})
    near(wpo_weights(x), math.exp(-0.25) * math.exp(-1))
    assert token_slopes(wpo_weights, x) == [[0.0, 0.0], [0.0]]
