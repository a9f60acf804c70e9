"""Weights that any loss of pairs can be multiplied by."""

from __future__ import annotations

from mlxpref.ops import Array, exp, stop_gradient
from mlxpref.records import Logps


def wpo_weights(policy: Logps, overlap: Array) -> Array:
    r"""How likely the policy itself would have written both responses of a pair.

    .. math:: w_w w_l, \qquad w = \exp \frac1n \sum_t \Bigl( \log\pi_t - \log \sum_v \pi_t(v)^2 \Bigr)

    1 where every token has the probability that a token drawn from the policy has on average; may exceed 1.

    Args:
        policy: log-probs of pairs, (B, 2, L), nats.
        overlap: (B, 2, L), log Σ_v π_t(v)² at each response token, ≤ 0.

    Returns:
        (B,) weights > 0, constants: no gradient flows through them.

    Source: Zhou et al. 2024, arXiv:2406.11827.
    """
    means = ((policy.tokens - overlap) * policy.mask).sum(-1) / policy.lengths
    return stop_gradient(exp(means.sum(-1)))
