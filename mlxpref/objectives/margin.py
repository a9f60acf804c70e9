"""Objectives of the margin alone: how much more the policy has come to prefer the chosen response.

Δ is the log-ratio of the chosen response less that of the rejected one, z = βΔ, p = σ(z). Each
formula pushes the two with equal and opposite strength, but for those that average per token.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from mlxpref.objectives.logratios import LARGEST_EXPONENT, margin, mean_margin, smoothed
from mlxpref.objectives.registry import FlipRate, NonNegative, PerResponse, Positive, objective
from mlxpref.ops import Array, clip, exp, log_sigmoid, relu, sigmoid
from mlxpref.records import Logps

Smoothing = Annotated[float, Field(gt=0, lt=0.5)]
FocalPower = Annotated[float, Field(ge=0, lt=1 / math.log(2))]


@objective
def dpo(policy: Logps, reference: Logps, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.0) -> Array:
    r"""Direct preference optimisation: logistic regression on the implicit reward margin.

    .. math:: -(1-\varepsilon) \log\sigma(\beta\Delta) - \varepsilon \log\sigma(-\beta\Delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats. Smaller lets the policy move further;
            0.01 is usual for chat data of the UltraFeedback kind.
        label_smoothing: ε, the share of labels taken to be wrong (conservative DPO). The margin then
            has a finite optimum, βΔ = log((1 − ε)/ε); the reward-augmentation recipes use 0.3.

    Returns:
        (B,) losses; log 2 where policy = reference, whatever β and ε.

    Convention: log-ratios are summed over tokens. TRL 0.8 has label_smoothing too; TRL 1.x ignores it here.
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; label smoothing: Mitchell 2023, note on cDPO.
    Also known as: sigmoid (TRL); cdpo (with label_smoothing).
    """
    return smoothed(beta * margin(policy, reference), label_smoothing)


@objective
def robust(policy: Logps, reference: Logps, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.1) -> Array:
    r"""Robust DPO: an unbiased estimate of the clean DPO loss when labels flip at a known rate.

    .. math::
        \frac{-(1-\varepsilon)\log\sigma(\beta\Delta) + \varepsilon\log\sigma(-\beta\Delta)}
             {1-2\varepsilon}

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        label_smoothing: ε, the rate at which labels are flipped. The gradient never vanishes and the loss is
            unbounded below.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens.
    Source: Chowdhury, Kini, Natarajan 2024, arXiv:2403.00409.
    """
    z = beta * margin(policy, reference)
    kept, flipped = -log_sigmoid(z), -log_sigmoid(-z)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@objective
def ipo(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""Identity preference optimisation: pull the margin to a fixed target.

    .. math:: \bigl(\Delta - 1/(2\beta)\bigr)^2

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: the paper's τ, 1/nats; the margin is pulled to 1/(2β). Larger keeps closer to the reference.

    Returns:
        (B,) losses, nats²; 1/(4β²) where policy = reference.

    Convention: log-ratios are summed over tokens, as in the paper. TRL's ``ipo`` averages: ``ipo_norm``.
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    return (margin(policy, reference) - 1 / (2 * beta)) ** 2


@objective
def ipo_norm(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""IPO on log-ratios averaged per token: the target does not depend on length.

    .. math:: \bigl(a_w/n_w - a_l/n_l - 1/(2\beta)\bigr)^2

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: the paper's τ, tokens/nat; the margin per token is pulled to 1/(2β).

    Returns:
        (B,) losses, (nats per token)²; 1/(4β²) where policy = reference.

    Convention: log-ratios are averaged per response token.
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17, averaged as in TRL's ``ipo``.
    """
    return (mean_margin(policy, reference) - 1 / (2 * beta)) ** 2


@objective
def hinge(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""Hinge on the margin: no loss and no push once the margin has reached 1/β.

    .. math:: \max(0, 1 - \beta\Delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: 1 / the margin asked for, 1/nats.

    Returns:
        (B,) losses; 1 where policy = reference. The gradient is 0 at the kink βΔ = 1.

    Convention: log-ratios are summed over tokens.
    Source: Zhao et al. 2023, arXiv:2305.10425 (SLiC); as here: Liu et al. 2023, arXiv:2309.06657 (RSO).
    """
    return relu(1 - beta * margin(policy, reference))


@objective
def ln_dpo(policy: Logps, reference: Logps, *, beta: Positive = 5.0) -> Array:
    r"""Length-normalised DPO: DPO on log-ratios averaged per token.

    .. math:: -\log\sigma\bigl(\beta (a_w/n_w - a_l/n_l)\bigr)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, tokens/nat: about DPO's β times the
            length of a response.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are averaged per response token.
    Source: Ahrabian et al. 2024, arXiv:2407.15229; β = 5: Lambert et al. 2024 (Tülu 3).
    Also known as: sigmoid_norm (TRL); dpo_norm (open-instruct).
    """
    return -log_sigmoid(beta * mean_margin(policy, reference))


@objective
def r_dpo(
    policy: Logps,
    reference: Logps,
    lengths: PerResponse,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.01,
) -> Array:
    r"""Length-regularised DPO: a longer chosen response has part of its margin already and is pushed up less.

    .. math:: -\log\sigma\bigl(\beta\Delta + \alpha (n_w - n_l)\bigr)

    It is DPO on the reward r − αn: the policy that is best for it has βΔ = (r_w − r_l) − α(n_w − n_l), so the
    margin in r that labels speak of is βΔ + α(n_w − n_l).

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        lengths: (B, 2), scored tokens of each response.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: what one token costs, 1/tokens. It multiplies a difference of token counts: compare α·100 with
            βΔ before use. The values tried by others, 0.05 to 1, could not be confirmed.

    Returns:
        (B,) losses; −log σ(α(n_w − n_l)) where policy = reference, log 2 for equal lengths.

    Convention: log-ratios are summed over tokens. The sign is that of the paper; the rDPO of the α-DPO
    authors' code subtracts the difference of lengths instead.
    Source: Park et al. 2024, arXiv:2403.19159; iterated: Liu et al. 2024, arXiv:2406.11817 (iLR-DPO).
    """
    return -log_sigmoid(beta * margin(policy, reference) + alpha * (lengths[:, 0] - lengths[:, 1]))


@objective
def exo_pair(policy: Logps, reference: Logps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 1e-3) -> Array:
    r"""EXO on pairs: the reverse KL divergence from the model's preference to the smoothed label.

    .. math::
        \sigma(z) \log\frac{\sigma(z)}{1-\varepsilon} + \sigma(-z) \log\frac{\sigma(-z)}{\varepsilon},
        \qquad z = \beta\Delta

    The slope in z is p(1 − p)(z − z*) with z* = log((1 − ε)/ε), where loss and slope are 0. Unlike DPO's it
    fades as z → −∞: pairs far on the wrong side get almost no push.

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        label_smoothing: ε, the probability the label leaves to the rejected response; above 0, since at 0
            the divergence is infinite.

    Returns:
        (B,) losses ≥ 0; −log 2 − ½ log(ε(1 − ε)) where policy = reference, 2.7612 at the default.

    Convention: log-ratios are summed over tokens.
    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    Also known as: exo; exo_pref (the paper's variant for preference pairs).
    """
    z = beta * margin(policy, reference)
    chosen = sigmoid(z) * (log_sigmoid(z) - math.log(1 - label_smoothing))
    return chosen + sigmoid(-z) * (log_sigmoid(-z) - math.log(label_smoothing))


@objective
def discopop(policy: Logps, reference: Logps, *, beta: Positive = 0.05, tau: Positive = 0.05) -> Array:
    r"""DiscoPOP: logistic where the margin is negative, exponential where it is positive.

    .. math:: -(1-m) \log\sigma(z) + m e^{-z}, \qquad m = \sigma(z/\tau), \quad z = \beta\Delta

    A loss found by a language model's search. It is not convex, nor monotone near 0: for τ = 0.05 it is
    0.7874 at z = −0.1 and 0.8738 at z = 0.1. Its slope at 0, where training starts, is (1 − log 2)/(4τ) − ¾:
    for τ below 0.102, so at the default, the first steps lower the margin.

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        tau: width in z of the change from one form to the other. Above 1 the loss of a bad pair grows
            exponentially; its exponent is then cut at 80, beyond which that part has no gradient.

    Returns:
        (B,) losses; (log 2 + 1)/2 = 0.8466 where policy = reference.

    Convention: log-ratios are summed over tokens.
    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    Also known as: lrml (the paper's log-ratio modulated loss).
    """
    z = beta * margin(policy, reference)
    # m e^-z as one exponential: e^-z alone overflows where m is nearly 0.
    exponential = exp(clip(log_sigmoid(z / tau) - z, high=LARGEST_EXPONENT))
    return -sigmoid(-z / tau) * log_sigmoid(z) + exponential


@objective
def focalpo(policy: Logps, reference: Logps, *, beta: Positive = 0.1, gamma: FocalPower = 0.05) -> Array:
    r"""FocalPO: DPO that cares more for pairs already ranked right, the opposite of the focal loss.

    .. math:: -p^\gamma \log p, \qquad p = \sigma(\beta\Delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        gamma: how much more; 0 is DPO. The slope in z is −p^γ(1 − p)(1 + γ log p): pairs with p < e^(−1/γ)
            are trained backwards, and from γ = 1/log 2 on all of them at the start, so γ stays below. The
            default could not be confirmed from the authors' code.

    Returns:
        (B,) losses; 2^(−γ) log 2 where policy = reference, 0.6695 at the default.

    Convention: log-ratios are summed over tokens; the gradient goes through p^γ too.
    Source: Liu et al. 2025, arXiv:2501.06645.
    """
    log_p = log_sigmoid(beta * margin(policy, reference))
    return -exp(gamma * log_p) * log_p
