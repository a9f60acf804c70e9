"""Objectives that treat the two responses apart: what each has gained counts, not only their difference.

a is the log-ratio of a response, a_w of the chosen and a_l of the rejected one, Δ = a_w − a_l. The push on
one response is not the opposite of that on the other, so these can hold the chosen response up, or leave the
rejected one alone.
"""

from __future__ import annotations

from typing import Literal

from mlxpref.objectives.logratios import LARGEST_EXPONENT, log_ratios, margin, means
from mlxpref.objectives.registry import NonNegative, PerResponse, Positive, objective
from mlxpref.ops import Array, clip, expm1, log_sigmoid, relu, sigmoid
from mlxpref.records import Logps


@objective
def f_dpo(
    policy: Logps,
    reference: Logps,
    *,
    beta: Positive = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "forward_kl",
    alpha: NonNegative = 0.5,
) -> Array:
    r"""f-DPO: DPO that is held to the reference by another divergence than the reverse KL.

    .. math:: -\log\sigma\Bigl(\beta \bigl(h(a_w) - h(a_l)\bigr)\Bigr)

    h(a) is a for the reverse KL (DPO), −e^(−a) for the forward KL, log σ(a) for Jensen–Shannon, and
    e^((α−1)a)/(α − 1) for the α-divergence, each up to a constant.

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        divergence: which one. The forward KL pulls hard on a response whose probability has fallen and
            hardly on one that has risen.
        alpha: of the α-divergence, and only of it: 0 is the forward KL, 1 the reverse.

    Returns:
        (B,) losses; log 2 where policy = reference. Exponents are cut at 80, beyond which the gradient is 0.

    Raises:
        ValueError: an ``alpha`` given to another divergence than alpha.

    Convention: log-ratios are summed over tokens. α is that of TRL 1.x; older TRL has (1 − e^(−αa))/α,
    where 1 − α stands for this α.
    Source: Wang et al. 2023, arXiv:2309.16240.
    Also known as: f_divergence_type (TRL, an option there).
    """
    if divergence != "alpha" and alpha != 0.5:
        raise ValueError(f"alpha = {alpha:g} acts only with divergence alpha, which is {divergence}")
    chosen, rejected = (_reshaped(a, divergence, alpha) for a in log_ratios(policy, reference))
    return -log_sigmoid(beta * (chosen - rejected))


def _reshaped(a: Array, divergence: str, alpha: float) -> Array:
    """h(a), less its value at 0 where that keeps float32 exact for small a; the constant cancels."""
    if divergence == "js":
        return log_sigmoid(a)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": alpha - 1}[divergence]
    return a if power == 0 else expm1(clip(power * a, high=LARGEST_EXPONENT)) / power


@objective
def dpop(policy: Logps, reference: Logps, *, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> Array:
    r"""DPO-Positive: DPO with a penalty once the chosen response is less likely than under the reference.

    .. math:: -\log\sigma\bigl(\beta(\Delta - \lambda \max(0, -a_w))\bigr)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        penalty: λ, nats of margin lost for each nat the chosen response has lost. The paper's grid, said
            to be 5 to 500 and with a β of 0.3, could not be confirmed.

    Returns:
        (B,) losses; log 2 where policy = reference, where the penalty has slope 0.

    Convention: log-ratios are summed over tokens; the penalty is inside the sigmoid, and its kink at a_w = 0,
    where training starts, has slope 0. DPO wherever a_w ≥ 0.
    Source: Pal et al. 2024, arXiv:2402.13228 (Smaug).
    Also known as: dpo_positive (the paper).
    """
    chosen, rejected = log_ratios(policy, reference)
    return -log_sigmoid(beta * (chosen - rejected - penalty * relu(-chosen)))


@objective
def rpo(policy: Logps, reference: Logps, *, beta: Positive = 0.01, eta: NonNegative = 0.005) -> Array:
    r"""SFT-regularised DPO: DPO plus a little likelihood of the chosen response, against over-optimisation.

    .. math:: -\log\sigma(\beta\Delta) - \eta\, \ell_w / n_w

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.
        eta: weight of the likelihood, tokens/nat; 0 is DPO. Iterative RPO (arXiv:2404.19733) has 1.

    Returns:
        (B,) losses; log 2 + η · (nats per token of the chosen response) where policy = reference.

    Convention: log-ratios are summed, the likelihood is averaged over each chosen response's tokens. TRL's
    pair of losses ["sigmoid", "sft"] averages it over all chosen tokens of a batch.
    Source: Liu et al. 2024, arXiv:2405.16436.
    Also known as: rpo_alpha (older TRL, an option there).
    """
    return -log_sigmoid(beta * margin(policy, reference)) - eta * means(policy)[0]


@objective
def nca_pair(policy: Logps, reference: Logps, *, beta: Positive = 0.01) -> Array:
    r"""Noise-contrastive alignment on pairs: the chosen response's reward has an optimum instead of growing.

    .. math:: -\log\sigma(r_w) - \tfrac12 \log\sigma(-r_w) - \tfrac12 \log\sigma(-r_l), \qquad r = \beta a

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats. The optimum is r_w = log 2.

    Returns:
        (B,) losses; 2 log 2 where policy = reference.

    Convention: log-ratios are summed over tokens.
    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    chosen, rejected = _rewards(policy, reference, beta)
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


@objective
def bco_pair(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""Binary classification of the two responses as good and bad, without BCO's running mean.

    .. math:: -\log\sigma(\beta a_w) - \log\sigma(-\beta a_l)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.

    Returns:
        (B,) losses; 2 log 2 where policy = reference.

    Convention: log-ratios are summed over tokens; the shift δ is 0, as in TRL 1.x under this name. The paper's
    own objective, with δ the mean of all rewards so far, is ``bco``.
    Source: Jung et al. 2024, arXiv:2404.04656, with δ = 0.
    """
    chosen, rejected = _rewards(policy, reference, beta)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@objective
def apo_zero(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""Anchored preference optimisation, chosen up and rejected down: for data better than the model.

    .. math:: 1 - \sigma(\beta a_w) + \sigma(\beta a_l)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats; the loss is bounded, so a response far on
            either side is no longer pushed.

    Returns:
        (B,) losses in (0, 2); 1 where policy = reference.

    Convention: log-ratios are summed over tokens.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    chosen, rejected = _rewards(policy, reference, beta)
    return sigmoid(-chosen) + sigmoid(rejected)


@objective
def apo_down(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""Anchored preference optimisation, both down and the rejected more: for a model better than the data.

    .. math:: \sigma(\beta a_w) + 1 - \sigma(\beta\Delta)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats; the loss is bounded, so a response far on
            either side is no longer pushed.

    Returns:
        (B,) losses in (0, 2); 1 where policy = reference, where the chosen response gets no push at all and
        the rejected one β/4.

    Convention: log-ratios are summed over tokens.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    chosen, rejected = _rewards(policy, reference, beta)
    return sigmoid(chosen) + sigmoid(rejected - chosen)


@objective
def sppo(policy: Logps, reference: Logps, win_rates: PerResponse, *, beta: Positive = 1e-3) -> Array:
    r"""Self-play preference optimisation: each response's log-ratio is fitted to how often it wins.

    .. math::
        \tfrac12 \Bigl[ \bigl(a_w - (P_w - \tfrac12)/\beta\bigr)^2 + \bigl(a_l - (P_l - \tfrac12)/\beta\bigr)^2 \Bigr]

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats. The reference is the policy of
            the round before.
        win_rates: P, (B, 2) in [0, 1]: how often a response beats the reference's, with itself counting ½;
            of K samples with scores s, mean_j σ(s_i − s_j). With a general preference model's estimates in
            their place this is GPO (arXiv:2410.02197).
        beta: 1/η, 1/nats; the targets are (P − ½)/β: ±500 nats at the most for the default.

    Returns:
        (B,) losses, nats²; ((P_w − ½)² + (P_l − ½)²) / (2β²) where policy = reference.

    Convention: log-ratios are summed over tokens; with the ½ of the official code.
    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7; code uclaml/SPPO, ``sppo``.
    Also known as: gpo (general preference optimisation, with another source of P).
    """
    return _towards(policy, reference, (win_rates[:, 0] - 0.5) / beta, (win_rates[:, 1] - 0.5) / beta)


@objective
def sppo_hard(policy: Logps, reference: Logps, *, beta: Positive = 1e-3) -> Array:
    r"""SPPO where the chosen response always wins: P is 1 and 0.

    .. math:: \tfrac12 \Bigl[ \bigl(a_w - 1/(2\beta)\bigr)^2 + \bigl(a_l + 1/(2\beta)\bigr)^2 \Bigr]

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: 1/nats; the targets are ±1/(2β).

    Returns:
        (B,) losses, nats²; 1/(4β²) where policy = reference.

    Convention: log-ratios are summed over tokens; with the ½ of the official code. TRL's loss of this name
    lacks it and is twice as large.
    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 and 0.
    """
    return _towards(policy, reference, 0.5 / beta, -0.5 / beta)


@objective
def minor_dpo(policy: Logps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""MinorDPO: the rejected response is pushed down only while likelier than under the reference.

    .. math:: -\log\sigma\bigl(\beta(a_w - \max(0, a_l))\bigr)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: strength of the pull towards the reference, 1/nats.

    Returns:
        (B,) losses; log 2 where policy = reference, where the rejected response gets no push.

    Convention: log-ratios are summed over tokens; the kink at a_l = 0, where training starts, has slope 0.
    Source: Xie et al. 2024, arXiv:2408.09834.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -log_sigmoid(beta * (chosen - relu(rejected)))


@objective
def flex_dpo(policy: Logps, reference: Logps, *, beta_chosen: Positive = 0.1, beta_rejected: Positive = 0.05) -> Array:
    r"""Flex-DPO: DPO with a strength for each response, to spare the rejected one.

    .. math:: -\log\sigma(\beta_w a_w - \beta_l a_l)

    Args:
        policy, reference: log-probs of one batch of pairs, (B, 2, L), nats.
        beta_chosen: strength of the chosen response's push, 1/nats.
        beta_rejected: strength of the rejected response's push, 1/nats; equal to the other it is DPO. The
            default, half of it, is ours.

    Returns:
        (B,) losses; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens. The paper also adds a likelihood term: a mixture with ``sft``.
    Source: Yan et al. 2024, arXiv:2406.07327.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -log_sigmoid(beta_chosen * chosen - beta_rejected * rejected)


def _rewards(policy: Logps, reference: Logps, beta: float) -> tuple[Array, Array]:
    chosen, rejected = log_ratios(policy, reference)
    return beta * chosen, beta * rejected


def _towards(policy: Logps, reference: Logps, chosen_goal: Array, rejected_goal: Array) -> Array:
    """½ the squared distances of the log-ratios from what they should be."""
    chosen, rejected = log_ratios(policy, reference)
    return 0.5 * ((chosen - chosen_goal) ** 2 + (rejected - rejected_goal) ** 2)
