"""Objectives that weigh the tokens of a response: Δ of weighted log-ratios.

SparsePO's learned masks (arXiv:2410.05102) are not built; ``experimental_mapo`` has its formula with masks
that are not learned.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from mlxpref.objectives.logratios import smoothed, token_log_ratios
from mlxpref.objectives.registry import PerExample, PerToken, Positive, Share, objective
from mlxpref.ops import Array, amax, amin, clip, exp, indicator, log_sigmoid, where
from mlxpref.records import Logps

Decay = Annotated[float, Field(gt=0, le=1)]


@objective
def ld_dpo(policy: Logps, reference: Logps, *, beta: Positive = 0.1, alpha: Share = 0.5) -> Array:
    r"""LD-DPO: tokens beyond the length that both responses have count less, so that length does.

    .. math::
        -\log\sigma(\beta\Delta'), \qquad
        a' = \sum_{t \le n} a_t + \alpha \sum_{t > n} a_t, \quad n = \min(n_w, n_l)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: weight of the tokens beyond the common length. 1 is DPO; at 0 they do not count.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens; policy and reference are weighted alike.
    Source: Liu et al. 2024, arXiv:2409.06411.
    Also known as: ld_alpha (an option of TRL's DPO).
    """
    common = amin(policy.lengths, 1)[:, None, None]
    within = indicator(_positions(policy) <= common, policy.tokens)
    return -log_sigmoid(beta * _weighted_margin(policy, reference, alpha + (1 - alpha) * within))


@objective
def d2po(policy: Logps, reference: Logps, *, beta: Positive = 0.1, gamma: Decay = 0.98) -> Array:
    r"""D²PO: DPO whose tokens count less the later they stand.

    .. math:: -\log\sigma(\beta\Delta'), \qquad a' = \sum_{t \ge 1} \gamma^t a_t

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        gamma: γ, by which each token counts less than the one before it; 1 is DPO.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: the first token of a response has t = 1, so it weighs γ; policy and reference are weighted
    alike.
    Source: Shao et al. 2025, arXiv:2502.14340.
    """
    weights = exp(math.log(gamma) * _positions(policy))
    return -log_sigmoid(beta * _weighted_margin(policy, reference, weights))


@objective
def mcts_dpo(
    policy: Logps,
    reference: Logps,
    divergence: PerToken,
    confidence: PerExample,
    *,
    beta: Positive = 0.1,
) -> Array:
    r"""Step-level DPO on pairs of a tree search: tokens from where the responses part, labels as sure as it was.

    .. math::
        -(1-\varepsilon) \log\sigma(\beta\Delta') - \varepsilon \log\sigma(-\beta\Delta'), \qquad
        \varepsilon = \min(1 - c, \tfrac12)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        divergence: (B, 2, L), 1 from the first token at which the two responses differ, else 0; Δ′ is of
            those tokens.
        confidence: (B,), c in [0, 1]: how sure the values of the search are of the label.
        beta: strength of the pull towards the reference, 1/nats.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens. Those of a shared beginning are equal and cancel here,
    unless dropout makes them differ. The tree search itself is not part of this: it makes the data.
    Source: Xie et al. 2024, arXiv:2405.00451.
    """
    z = beta * _weighted_margin(policy, reference, divergence)
    return smoothed(z, clip(1 - confidence, high=0.5))


@objective
def experimental_mapo(
    policy: Logps,
    reference: Logps,
    token_kl: PerToken,
    *,
    beta: Positive = 0.1,
    mask: Literal["surprisal", "ones"] = "surprisal",
    kl_mask: Literal["same", "ones", "none"] = "same",
) -> Array:
    r"""MaPO: the tokens that the reference finds surprising count, in reward and in divergence.

    .. math::
        -\log\sigma\bigl(\beta [(u_w - u_l) - (d_w - d_l)]\bigr), \qquad
        u = \sum_t \mu_t a_t, \quad d = -\sum_t \nu_t\, \mathrm{KL}_t(\pi_{\mathrm{ref}} \,\|\, \pi)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        token_kl: (B, 2, L), KL(π_ref‖π) of the next-token distributions at each token, nats, with gradient.
        beta: strength of the pull towards the reference, 1/nats; 0.8 for short texts in the paper.
        mask: μ, "surprisal": −log π_ref of each token, stretched over [0, 1] in each response (all 1 where
            it is constant); "ones": 1.
        kl_mask: ν, "same" as μ; "ones"; or "none", no divergence. With mask ones and this none it is DPO,
            with both ones token-level KL as in TDPO.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: sums over tokens; masks have no gradient, and no L1 penalty.
    Unverified: the mask. The paper takes it from the reference's activations; the surprisal is ours.
    Source: after Christopoulou et al. 2024, arXiv:2410.05102.
    """
    ones = policy.mask
    reward_mask = _surprisal_mask(reference) if mask == "surprisal" else ones
    margin = _weighted_margin(policy, reference, reward_mask)
    if kl_mask != "none":
        divergences = -(token_kl * (reward_mask if kl_mask == "same" else ones) * ones).sum(-1)
        margin = margin - (divergences[:, 0] - divergences[:, 1])
    return -log_sigmoid(beta * margin)


def _weighted_margin(policy: Logps, reference: Logps, weights: Array) -> Array:
    """Σ w a_t of the chosen less that of the rejected: (B,), weights (B, 2, L)."""
    totals = (token_log_ratios(policy, reference) * weights).sum(-1)
    return totals[:, 0] - totals[:, 1]


def _positions(policy: Logps) -> Array:
    """(B, 2, L): the number of each token in its response, from 1."""
    return policy.mask.cumsum(-1)


def _surprisal_mask(reference: Logps) -> Array:
    """(B, 2, L) in [0, 1]: least to most surprising token of each response; 1 where all are equal."""
    surprisal, inside = -reference.tokens, reference.mask > 0
    low = amin(where(inside, surprisal, math.inf), -1)[:, :, None]
    high = amax(where(inside, surprisal, -math.inf), -1)[:, :, None]
    stretched = (surprisal - low) / where(high > low, high - low, 1.0)
    return where(inside, where(high > low, stretched, 1.0), 0.0)
