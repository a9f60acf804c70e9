"""Quantities that formulas are made of, from the log-probs of pairs. In nats, (B,) unless they say otherwise."""

from __future__ import annotations

from typing import Any

from mlxpref.ops import Array, log_sigmoid
from mlxpref.records import Logps

LARGEST_EXPONENT = 80.0
"""e^80 = 5.5e34 leaves room below the largest float32, 3.4e38."""

Pair = tuple[Array, Array]
"""Of the chosen and of the rejected response."""


def log_ratios(policy: Logps, reference: Logps) -> Pair:
    """a = log π(y|x) − log π_ref(y|x), summed over the tokens of each response."""
    sums = list_log_ratios(policy, reference)
    return sums[:, 0], sums[:, 1]


def mean_log_ratios(policy: Logps, reference: Logps) -> Pair:
    """a / n: the log-ratio averaged over the tokens of each response."""
    means = list_log_ratios(policy, reference) / policy.lengths
    return means[:, 0], means[:, 1]


def list_log_ratios(policy: Logps, reference: Logps) -> Array:
    """(B, K): a of every response of a list."""
    # Token by token before the sum: two sums of hundreds of nats would leave float32 noise in between.
    return token_log_ratios(policy, reference).sum(-1)


def token_log_ratios(policy: Logps, reference: Logps) -> Array:
    """(B, K, L): log π − log π_ref of each token, 0 off the mask."""
    return (policy.tokens - reference.tokens) * policy.mask


def sums(policy: Logps) -> Pair:
    """ℓ: the log-prob of each whole response."""
    return policy.sums[:, 0], policy.sums[:, 1]


def means(policy: Logps) -> Pair:
    """m = ℓ / n: the log-prob averaged over the tokens of each response."""
    return policy.means[:, 0], policy.means[:, 1]


def margin(policy: Logps, reference: Logps) -> Array:
    """Δ: the log-ratio of the chosen less that of the rejected."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen - rejected


def mean_margin(policy: Logps, reference: Logps) -> Array:
    """Δ with each log-ratio averaged over its response's tokens."""
    chosen, rejected = mean_log_ratios(policy, reference)
    return chosen - rejected


def smoothed(z: Array, epsilon: Any) -> Array:
    """−(1−ε) log σ(z) − ε log σ(−z): the loss of a margin z whose label is wrong with probability ε.

    ε is a number or (B,), a constant; 1 − ε is the label where that is soft.
    """
    return -(1 - epsilon) * log_sigmoid(z) - epsilon * log_sigmoid(-z)
