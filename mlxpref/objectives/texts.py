"""Objectives that look at a further text beside the two responses, or at an earlier policy.

``rationale`` says why the chosen response is better; ``instructions`` are one a response; ``third`` is a response
from elsewhere: decoded by the reference, or sampled for calibration.

HyPO (arXiv:2406.01462) is not here: no checked formula, and it samples from the policy as it trains.
"""

from __future__ import annotations

from typing import Literal

from mlxpref.objectives.logratios import list_log_ratios, margin
from mlxpref.objectives.margin import dpo
from mlxpref.objectives.policy_only import orpo, sft
from mlxpref.objectives.registry import (
    NonNegative,
    PerResponse,
    PerResponseLogps,
    Positive,
    TextLogps,
    objective,
)
from mlxpref.ops import Array, log_sigmoid
from mlxpref.records import Logps


@objective
def rationale_dpo(
    policy: Logps, reference: Logps, rationale: TextLogps, *, beta: Positive = 0.1, gamma: NonNegative = 0.01
) -> Array:
    r"""DPO that also learns to say why: the rationale of the preference shall become likely.

    .. math:: -\log\sigma(\beta\Delta) - \log\sigma(\gamma\, \ell_{\mathrm{rat}})

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        rationale: log-probs of the rationale, given the prompt, both responses and the question why the
            chosen one is better, (B, 1, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        gamma: γ, scale of the rationale's log-prob, 1/nats; 0.001 to 0.1. At 0 the second term is dropped.

    Returns:
        (B,) losses; log 2 and the rationale's term where policy = reference.

    Convention: all log-probs are summed over tokens. The official code keeps the constant log 2 at γ = 0.
    The paper calls it RDPO; ``r_dpo`` is the length-regularised one.
    Source: Just et al. 2024, arXiv:2407.14477.
    """
    losses = dpo(policy, reference, beta=beta)
    return losses - log_sigmoid(gamma * rationale.sums[:, 0]) if gamma else losses


@objective
def rationale_orpo(policy: Logps, rationale: TextLogps, *, beta: NonNegative = 0.1, gamma: NonNegative = 0.01) -> Array:
    r"""ORPO that also learns to say why.

    .. math:: \text{orpo} - \gamma\, \ell_{\mathrm{rat}} / n_{\mathrm{rat}}

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        rationale: log-probs of the rationale, as ``rationale_dpo``'s, (B, 1, L), nats.
        beta: weight of the odds-ratio term, as ``orpo``'s.
        gamma: γ, weight of the rationale's negative log-likelihood per token, tokens/nat.

    Returns:
        (B,) losses.

    Convention: all log-probs are averaged per token of their text.
    Source: Just et al. 2024, arXiv:2407.14477.
    """
    return orpo(policy, beta=beta) + gamma * sft(rationale)


@objective
def dove(
    policy: Logps,
    reference: Logps,
    instructions: PerResponseLogps,
    instructions_reference: PerResponseLogps,
    *,
    beta: Positive = 0.1,
) -> Array:
    r"""DOVE: DPO on instruction and response jointly; the two responses may answer different instructions.

    .. math:: -\log\sigma(\beta\Delta), \qquad a = a_{\text{response}} + a_{\text{instruction}}

    Args:
        policy, reference: log-probs of the responses, each given its own instruction, (B, 2, L), nats.
        instructions, instructions_reference: log-probs of the two instructions, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.

    Returns:
        (B,) losses; log 2 where policy = reference. The same instruction on both sides: DPO.

    Convention: log-ratios are summed over the tokens of instruction and response.
    Source: Bansal et al. 2024, arXiv:2404.00530.
    """
    delta = margin(policy, reference) + margin(instructions, instructions_reference)
    return -log_sigmoid(beta * delta)


@objective
def selm(
    policy: Logps,
    reference: Logps,
    third: TextLogps,
    third_reference: TextLogps,
    *,
    beta: Positive = 0.01,
    alpha: NonNegative = 1e-3,
) -> Array:
    r"""SELM: DPO that leaves what the old policy would say anyway, and so explores.

    .. math:: -\log\sigma(\beta\Delta) + \alpha\beta\, a_3

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        third, third_reference: log-probs of a response decoded greedily from the reference, (B, 1, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: weight of the optimism, a number; 1e-3 for small models, 1e-4 for Llama-3-8B. 0 is DPO.

    Returns:
        (B,) losses, unbounded below; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens; the reference is the iterate before.
    Source: Zhang et al. 2024, arXiv:2405.19332.
    """
    return dpo(policy, reference, beta=beta) + alpha * beta * _only(third, third_reference)


@objective
def xpo(policy: Logps, reference: Logps, third: TextLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1e-5) -> Array:
    r"""XPO: DPO with an exploration bonus for making responses of the reference unlikely.

    .. math:: -\log\sigma(\beta\Delta) + \alpha\, \ell_3

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        third: log-probs under the policy of a response sampled from the reference, (B, 1, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: weight of the bonus, 1/nats. 0 is DPO.

    Returns:
        (B,) losses, unbounded below; log 2 + α ℓ₃ where policy = reference.

    Convention: all log-probs are summed over tokens. TRL's XPO trainer samples as it trains; here the
    third response is in the data (a greedy one, where ``mlxpref columns`` made it).
    Source: Xie et al. 2024, arXiv:2405.21046.
    """
    return dpo(policy, reference, beta=beta) - alpha * sft(third, per="response")


@objective
def experimental_vpo(
    policy: Logps,
    reference: Logps,
    third: TextLogps,
    third_reference: TextLogps,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1e-3,
    mode: Literal["offline", "online"] = "offline",
) -> Array:
    r"""VPO: DPO with a regulariser on calibration responses, pessimistic offline, optimistic online.

    .. math:: -\log\sigma(\beta\Delta) \mp \alpha\beta\, a_3

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        third, third_reference: log-probs of a response of the calibration policy, (B, 1, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: weight of the regulariser, a number; 0 is DPO.
        mode: "offline", −: calibration responses are pulled up; "online", +: they are pushed down, and the
            policy explores.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens. Online it is the formula of ``selm``, with another third
    response.
    Unverified: the exact regulariser.
    Source: after Cen et al. 2024, arXiv:2405.19320.
    """
    sign = -1 if mode == "offline" else 1
    return dpo(policy, reference, beta=beta) + sign * alpha * beta * _only(third, third_reference)


@objective
def inpo(
    policy: Logps,
    reference: Logps,
    previous: PerResponse,
    *,
    eta: Positive = 7.5e-3,
    tau: NonNegative = 2.5e-3,
) -> Array:
    r"""INPO: one step of self-play towards a Nash policy, as a regression like IPO's.

    .. math::
        \Bigl(h - \tfrac{1}{2\eta}\Bigr)^2, \qquad
        h = \tfrac{\tau}{\eta} \Delta + \tfrac{\eta-\tau}{\eta} \Delta^{t}

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        previous: (B, 2), log-probs of the whole responses under the iterate before, nats; Δᵗ is the margin
            against it.
        eta: η, 1/nats; h is pulled to 1/(2η).
        tau: τ, 1/nats, strength of the pull towards the reference; ≤ η, a third of it in the paper. At τ = η
            it is IPO with β = η.

    Returns:
        (B,) losses, nats²; 1/(4η²) where policy = reference = the iterate before.

    Raises:
        ValueError: τ is above η.

    Convention: log-probs are summed over tokens.
    Source: Zhang et al. 2024, arXiv:2407.00617.
    """
    if tau > eta:
        raise ValueError(f"tau {tau:g} is above eta {eta:g}: the iterate before would be moved away from")
    share, moved = tau / eta, policy.sums - previous
    h = share * margin(policy, reference) + (1 - share) * (moved[:, 0] - moved[:, 1])
    return (h - 1 / (2 * eta)) ** 2


def _only(text: Logps, reference: Logps) -> Array:
    """(B,): a of the one further text of each example."""
    return list_log_ratios(text, reference)[:, 0]
