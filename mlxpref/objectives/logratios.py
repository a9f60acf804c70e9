"""Quantities that formulas are made of, from the log-probs of pairs. All in nats, all (B,)."""

from __future__ import annotations

from mlxpref.ops import Array
from mlxpref.records import Logps

Pair = tuple[Array, Array]
"""Of the chosen and of the rejected response."""


def log_ratios(policy: Logps, reference: Logps) -> Pair:
    """a = log π(y|x) − log π_ref(y|x), summed over the tokens of each response."""
    sums = _ratio_sums(policy, reference)
    return sums[:, 0], sums[:, 1]


def mean_log_ratios(policy: Logps, reference: Logps) -> Pair:
    """a / n: the log-ratio averaged over the tokens of each response."""
    means = _ratio_sums(policy, reference) / policy.lengths
    return means[:, 0], means[:, 1]


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


def _ratio_sums(policy: Logps, reference: Logps) -> Array:
    # Token by token before the sum: two sums of hundreds of nats would leave float32 noise in between.
    return ((policy.tokens - reference.tokens) * policy.mask).sum(-1)
