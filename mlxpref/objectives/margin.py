"""Objectives of the margin alone: how much more the policy has come to prefer the chosen response.

Δ is the log-ratio of the chosen response less that of the rejected one, z = βΔ, p = σ(z). Each
formula pushes the two with equal and opposite strength, but for those that average per token.
"""

from __future__ import annotations

from mlxpref.objectives.logratios import margin, mean_margin
from mlxpref.objectives.registry import FlipRate, Positive, objective
from mlxpref.ops import Array, log_sigmoid, relu
from mlxpref.records import Logps


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
    z = beta * margin(policy, reference)
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


@objective
def robust(
    policy: Logps, reference: Logps, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.1
) -> Array:
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
