"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlxpref.metrics import implicit_rewards, ranking_accuracy, step_metrics, wins

# Three pairs. Log-ratios: (3, -3.5), (-1, 1.5), (2, 2).
POLICY = np.array([[-48.0, -62.0], [-52.0, -57.0], [-10.0, -9.0]])
REFERENCE = np.array([[-51.0, -58.5], [-51.0, -58.5], [-12.0, -11.0]])
LENGTHS = np.array([[24, 30], [24, 30], [4, 2]])
LOSSES = np.array([0.4, 0.8, 0.6])


def test_a_batch_worked_out_by_hand() -> None:
    """Finds: an accuracy of the mean margin, a tie counted as right, chosen and rejected exchanged,
    the ranking accuracy read off the margin."""
    got = step_metrics(POLICY, REFERENCE, LENGTHS, LOSSES, 0.1)
    assert got == pytest.approx(
        {
            "loss": 0.6,
            "rewards/chosen": 0.1 * (3 - 1 + 2) / 3,
            "rewards/rejected": 0.1 * (-3.5 + 1.5 + 2) / 3,
            "rewards/margins": 0.1 * (6.5 - 2.5 + 0) / 3,
            "rewards/accuracies": 1 / 3,
            "logps/chosen": -110 / 3,
            "logps/rejected": -128 / 3,
            "lengths/chosen": 52 / 3,
            "lengths/rejected": 62 / 3,
            "ranking_accuracy": 2 / 3,
        }
    )
    assert all(type(value) is float for value in got.values())


def test_without_a_reference_rewards_are_logps() -> None:
    sums = step_metrics(POLICY, None, LENGTHS, LOSSES, 2.0)
    assert sums["rewards/chosen"] == pytest.approx(2 * -110 / 3)
    assert sums["rewards/accuracies"] == pytest.approx(2 / 3)
    means = step_metrics(POLICY, None, LENGTHS, LOSSES, 2.0, per_token=True)
    assert means["rewards/chosen"] == pytest.approx(2 * (-48 / 24 - 52 / 24 - 10 / 4) / 3)
    # Per token: -2 > -2.07, -2.17 < -1.9, -2.5 > -4.5.
    assert means["rewards/accuracies"] == pytest.approx(2 / 3)
    assert means["logps/chosen"] == sums["logps/chosen"], "logps stay sums"


def test_halves_are_told_apart_and_absent_ones_are_not_named() -> None:
    got = step_metrics(POLICY, REFERENCE, LENGTHS, LOSSES, 0.1, ["chosen", "rejected", None])
    assert got["chosen_half/rewards/accuracies"] == 1.0
    assert got["rejected_half/rewards/accuracies"] == 0.0
    assert got["chosen_half/rewards/margins"] == pytest.approx(0.65)
    assert got["rejected_half/rewards/margins"] == pytest.approx(-0.25)
    one_sided = step_metrics(POLICY, REFERENCE, LENGTHS, LOSSES, 0.1, ["chosen", "chosen", "chosen"])
    assert not any(name.startswith("rejected_half") for name in one_sided)
    assert one_sided["chosen_half/rewards/accuracies"] == pytest.approx(1 / 3)


def test_weights_move_the_loss_only() -> None:
    plain = step_metrics(POLICY, REFERENCE, LENGTHS, LOSSES, 0.1)
    weighted = step_metrics(POLICY, REFERENCE, LENGTHS, LOSSES, 0.1, weights=np.array([1.0, 0.0, 3.0]))
    assert weighted.pop("loss") == pytest.approx((0.4 + 3 * 0.6) / 4)
    plain.pop("loss")
    assert weighted == plain


def test_lists_compare_the_best_with_each_of_the_rest() -> None:
    policy = np.array([[-5.0, -7.0, -4.0, -6.0], [-3.0, -3.0, -9.0, -8.0]])
    np.testing.assert_allclose(wins(policy), [2 / 3, 2 / 3])
    got = step_metrics(policy, np.zeros_like(policy), np.ones_like(policy), np.zeros(2), 1.0)
    assert got["rewards/rejected"] == pytest.approx(-37 / 6)
    assert got["rewards/margins"] == pytest.approx(((-5 + 17 / 3) + (-3 + 20 / 3)) / 2)
    assert got["rewards/accuracies"] == got["ranking_accuracy"] == pytest.approx(2 / 3)


def test_margins_of_float32_sums_do_not_lose_digits() -> None:
    """Finds: differences of large sums taken, or averaged, in float32."""
    policy = np.full((20000, 2), -4096.125, np.float32)
    policy[:, 1] -= 0.0625
    got = step_metrics(policy, np.full_like(policy, -4096.0), np.ones_like(policy), np.zeros(20000), 1.0)
    assert got["rewards/margins"] == pytest.approx(0.0625, rel=1e-9)
    assert got["logps/chosen"] == -4096.125


def test_ranking_accuracy_looks_at_the_policy_alone() -> None:
    assert ranking_accuracy(POLICY) == pytest.approx(2 / 3)
    assert implicit_rewards(POLICY, POLICY, LENGTHS, 0.1).max() == 0.0
