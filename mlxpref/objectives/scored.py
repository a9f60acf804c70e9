"""Objectives of log-ratios and scores: how much better a response is, not only that it is.

δ is the score of the chosen response less that of the rejected one, z = βΔ. Where rows have goals, scores are
rewards under the row's goal, so δ ≥ 0. Raw gaps of several points ask for a large Δ (β = 0.1 and δ = 2.5: 25
nats): scale them with η so that ηδ is around 1.

Not here, since no checked formula exists: DRDO (arXiv:2410.08458), the auxiliary loss of SPO
(arXiv:2409.17791).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlxpref import ops
from mlxpref.objectives.logratios import margin, smoothed
from mlxpref.objectives.policy_only import sft
from mlxpref.objectives.registry import (
    BatchLogps,
    NonNegative,
    PerExample,
    PerResponse,
    Positive,
    Share,
    objective,
)
from mlxpref.ops import Array, log_sigmoid, sigmoid
from mlxpref.records import Logps

LEAST = 1e-3
"""Below which a gap of scores is not taken the logarithm of."""


@objective
def distilled_dpo(
    policy: Logps, reference: Logps, scores: PerResponse, *, beta: Positive = 0.1, eta: Positive = 1.0
) -> Array:
    r"""Reward distillation: the implicit reward margin shall equal the gap of the scores.

    .. math:: (\beta\Delta - \eta\delta)^2

    Labels are not needed: a pair in either order has the same loss.

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        scores: (B, 2), of the chosen and the rejected response.
        beta: strength of the pull towards the reference, 1/nats.
        eta: η, scale of the scores, 1/points; 1 in the paper, whose scores are a reward model's log-odds.

    Returns:
        (B,) losses; (ηδ)² where policy = reference.

    Convention: log-ratios are summed over tokens; no ½.
    Source: Fisch et al. 2024, arXiv:2405.19316.
    """
    return (beta * margin(policy, reference) - eta * _gap(scores)) ** 2


@objective
def reward_aware(
    policy: Logps,
    reference: Logps,
    scores: PerResponse,
    *,
    beta: Positive = 0.2,
    eta: Positive = 1.0,
    divergence: Literal["sq", "bwd_kl", "fwd_kl"] = "bwd_kl",
    sft_weight: NonNegative = 0.0,
) -> Array:
    r"""Reward-aware preference optimisation: a distance between implicit and given preference.

    .. math::
        (\beta\Delta - \eta\delta)^2, \quad \mathrm{KL}(q \,\|\, p) \quad\text{or}\quad
        \mathrm{KL}(p \,\|\, q), \qquad q = \sigma(\eta\delta),\; p = \sigma(\beta\Delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        scores: (B, 2), of the chosen and the rejected response.
        beta: strength of the pull towards the reference, 1/nats; their ``ref_policy_kl_penalty``.
        eta: η, scale of the scores, 1/points; their ``gt_reward_scale``.
        divergence: "sq", the square; "bwd_kl", KL(q‖p), with the gradient of soft labels; "fwd_kl",
            KL(p‖q), which hardly pushes hopeless pairs. Their names.
        sft_weight: weight of the chosen response's negative log-likelihood per token, tokens/nat.

    Returns:
        (B,) losses; 0 iff βΔ = ηδ (without sft_weight). Where policy = reference: (ηδ)², KL(q‖½), KL(½‖q).

    Convention: log-ratios are summed over tokens.
    Source: Nvidia 2024, arXiv:2406.11704 (Nemotron-4 340B); forms and names as in NeMo-Aligner.
    Also known as: rpo_sq (NeMo-Aligner); rpo_bwd_kl (NeMo-Aligner); rpo_fwd_kl (NeMo-Aligner).
    """
    asked, z = eta * _gap(scores), beta * margin(policy, reference)
    if divergence == "sq":
        losses = (z - asked) ** 2
    else:
        losses = _divergence(asked, z) if divergence == "bwd_kl" else _divergence(z, asked)
    return losses + sft_weight * sft(policy)


@objective
def soft_label_dpo(
    policy: Logps, reference: Logps, scores: PerResponse, *, beta: Positive = 0.1, eta: Positive = 1.0
) -> Array:
    r"""DPO with soft labels: the scores say how sure the label is.

    .. math:: -q \log\sigma(\beta\Delta) - (1-q) \log\sigma(-\beta\Delta), \qquad q = \sigma(\eta\delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        scores: (B, 2), of the chosen and the rejected response.
        beta: strength of the pull towards the reference, 1/nats.
        eta: η, scale of the scores, 1/points: ηδ are the log-odds that the label is right. Large: DPO.

    Returns:
        (B,) losses; log 2 where policy = reference. The optimum is βΔ = ηδ, where the entropy of q remains.

    Convention: log-ratios are summed over tokens. ``reward_aware`` with bwd_kl is this less that entropy.
    Source: Mitchell 2023, note on cDPO, with its label from the scores' Bradley–Terry model; the strength
    of a preference as label: Wang et al. 2024, arXiv:2401.06080.
    """
    return smoothed(beta * margin(policy, reference), sigmoid(-eta * _gap(scores)))


@objective
def odpo(
    policy: Logps,
    reference: Logps,
    scores: PerResponse,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    offset: Literal["log", "linear"] = "log",
) -> Array:
    r"""DPO with an offset: the better the chosen response, the larger the margin asked for.

    .. math::
        -\log\sigma\bigl(\beta\Delta - m(\delta)\bigr), \qquad m = \alpha\log\delta
        \quad\text{or}\quad m = \alpha\delta

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        scores: (B, 2), of the chosen and the rejected response.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: α, scale of the offset, a number (1/points when linear). 0 is DPO.
        offset: "log", α log δ (below 0 where δ < 1); "linear", αδ.

    Returns:
        (B,) losses; log(1 + e^m) where policy = reference.

    Convention: log-ratios are summed over tokens; the logarithm is that of max(δ, 1e-3).
    Source: Amini, Vieira, Cotterell 2024, arXiv:2402.10571.
    """
    gap = _gap(scores)
    asked = ops.log(ops.clip(gap, low=LEAST)) if offset == "log" else gap
    return -log_sigmoid(beta * margin(policy, reference) - alpha * asked)


@objective
def mm_dpo(
    policy: Logps,
    reference: Logps,
    scores: PerResponse,
    *,
    beta: Annotated[float, Field(ge=1e-3)] = 0.1,
    w: NonNegative = 0.1,
    k: Positive = 0.5,
) -> Array:
    r"""DPO whose β grows with the gap of the scores: clear pairs teach more.

    .. math::
        -\log\sigma\bigl(\beta(\delta)\Delta\bigr), \qquad
        \beta(\delta) = \beta \bigl(1 + w\,(1 - e^{-k|\delta|})\bigr)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        scores: (B, 2), of the chosen and the rejected response.
        beta: β where the scores are equal, 1/nats; the official code lifts smaller ones to 0.001.
        w: by which share β may grow; 0 is DPO. 0.1 in the official script.
        k: how soon it does, 1/points. The default is ours; the paper's value is unverified.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens. The label_smoothing of the
    official trainer runs backwards (1 means none); here there is none.
    Source: Zhang et al. 2025, arXiv:2502.10391 (MM-RLHF).
    """
    scaled = beta * (1 - w * ops.expm1(-k * ops.absolute(_gap(scores))))
    return -log_sigmoid(scaled * margin(policy, reference))


@objective
def modpo(
    policy: Logps,
    reference: Logps,
    margin_rewards: PerResponse,
    *,
    beta: Positive = 0.1,
    weights: tuple[Share, ...] = (0.5, 0.5),
) -> Array:
    r"""Multi-objective DPO: the pairs speak for one objective, rewards for the others, weighted.

    .. math::
        -\log\sigma\Bigl(\tfrac{1}{w_0} \bigl[\beta\Delta -
        \textstyle\sum_{k \ge 1} w_k (m_{k,w} - m_{k,l})\bigr]\Bigr)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        margin_rewards: (B, 2, M), or (B, 2) for M = 1: m_k, rewards of the other objectives.
        beta: strength of the pull towards the reference, 1/nats.
        weights: w, M + 1 shares that sum to 1; the first, > 0, is that of the pairs' own objective. (1, 0)
            is DPO; one run per choice traces the trade-off.

    Returns:
        (B,) losses; log 2 where policy = reference and no other reward differs.

    Raises:
        ValueError: the weights are no such shares, or not one more than the rewards.

    Convention: log-ratios are summed over tokens.
    Source: Zhou et al. 2023, arXiv:2310.03708.
    """
    rewards = margin_rewards.reshape(*margin_rewards.shape[:2], -1)
    _check_weights(weights, rewards.shape[2])
    others = sum(weight * _gap(rewards[:, :, i]) for i, weight in enumerate(weights[1:]))
    return -log_sigmoid((beta * margin(policy, reference) - others) / weights[0])


@objective
def cream(policy: Logps, reference: Logps, confidence: PerExample, *, beta: Positive = 0.1) -> Array:
    r"""CREAM: labels count as far as two iterations of the policy agree on the ranking.

    .. math:: -C \log\sigma(\beta\Delta) - (1-C) \log\sigma(-\beta\Delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        confidence: (B,), C in [0, 1]: (τ + 1)/2, with Kendall's τ between the ranks that this iterate and
            the one before give to several responses.
        beta: strength of the pull towards the reference, 1/nats.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens; it is DPO with label_smoothing 1 − C, pair by pair.
    Source: Wang et al. 2024, arXiv:2410.12735.
    """
    return smoothed(beta * margin(policy, reference), 1 - confidence)


@objective
def experimental_e_dpo(
    policy: BatchLogps,
    reference: Logps,
    attributes: PerResponse,
    *,
    beta: Positive = 0.1,
    eta: Positive = 1.0,
    tau: Positive = 1.0,
    gamma: NonNegative = 0.0,
) -> Array:
    r"""Distillation of an ensemble: near at least one of several reward models, over the whole batch.

    .. math::
        -\tau \log \tfrac{1}{M} \sum_i e^{-D_i/\tau} - \tfrac{\gamma}{2} (m_w + m_l), \qquad
        D_i = \operatorname*{mean}_{\text{batch}} (\beta\Delta - \eta\delta_i)^2

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats.
        attributes: (B, 2, M), scores of the two responses by each of M reward models.
        beta: strength of the pull towards the reference, 1/nats.
        eta: η, scale of the scores, 1/points.
        tau: τ, softness of the minimum over models, in the unit of the loss: towards 0 their minimum, large their mean.
        gamma: γ, weight of the pessimism, tokens/nat: of the negative log-likelihood per token of both responses.

    Returns:
        (B,) losses: the first term is the same in all rows, the second each row's own. One model and
        γ = 0: the batch's mean of ``distilled_dpo``.

    Convention: log-ratios are summed over tokens, the likelihood is per token.
    Unverified: where the paper takes the minimum, and how it weighs the likelihood; this estimator is ours.
    Source: after Fisch et al. 2024, arXiv:2405.19316 (e-DPO, p-DPO).
    """
    z = beta * margin(policy, reference)
    distances = ((z[:, None] - eta * _gap(attributes)) ** 2).mean(0)
    return _soft_minimum(distances, tau) - gamma * policy.means.mean(-1)


def _gap(scores: Array) -> Array:
    """δ: (B, 2, …) → (B, …)."""
    return scores[:, 0] - scores[:, 1]


def _divergence(u: Array, v: Array) -> Array:
    """KL between coins that fall heads with probabilities σ(u) and σ(v), ≥ 0."""
    heads, tails = log_sigmoid(u) - log_sigmoid(v), log_sigmoid(-u) - log_sigmoid(-v)
    return sigmoid(u) * heads + sigmoid(-u) * tails


def _soft_minimum(x: Array, tau: float) -> Array:
    """−τ log mean e^(−x/τ). From the minimum on, so that neither a small nor a large τ loses digits."""
    least = ops.stop_gradient(ops.amin(x, 0))
    return least - tau * ops.log1p(ops.expm1((least - x) / tau).mean(0))


def _check_weights(weights: tuple[float, ...], n_rewards: int) -> None:
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != n_rewards + 1:
        raise ValueError(
            f"weights ({shown}) are {len(weights)}; {n_rewards} margin rewards need {n_rewards + 1}: "
            "the first is that of the pairs themselves"
        )
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights ({shown}) sum to {sum(weights):g}; they are shares, ≥ 0, that sum to 1")
    if weights[0] == 0:
        raise ValueError(f"weights ({shown}): the first, that of the pairs themselves, is above 0")
