"""Objectives without a reference: they look at the policy's own log-probs."""

from __future__ import annotations

from typing import Literal

from mlxpref.objectives.logratios import means
from mlxpref.objectives.registry import FlipRate, ListLogps, NonNegative, Positive, objective
from mlxpref.ops import Array, log_sigmoid
from mlxpref.records import Logps


@objective
def sft(policy: ListLogps, *, per: Literal["token", "response"] = "token") -> Array:
    r"""Negative log-likelihood of the preferred response; mostly a term of a mixture.

    .. math:: -\ell_w / n_w \quad\text{or}\quad -\ell_w

    Args:
        policy: log-probs of one batch, (B, K, L), nats; the preferred response alone counts.
        per: "token", nats per token of the response; "response", nats of the whole response.

    Returns:
        (B,) losses, > 0.

    Convention: per token, the mean is over each response, then over the batch: every example counts the
    same. TRL's ``sft`` is the mean over all chosen tokens of a batch, where long responses count more.
    Source: the maximum-likelihood term of Liu et al. 2024, arXiv:2405.16436 (RPO), and of CPO.
    Also known as: nll.
    """
    return -(policy.means if per == "token" else policy.sums)[:, 0]


@objective
def simpo(
    policy: Logps, *, beta: Positive = 2.0, gamma: NonNegative = 0.5, label_smoothing: FlipRate = 0.0
) -> Array:
    r"""SimPO: the mean log-prob per token is the reward, and the chosen must win by a margin.

    .. math::
        z = \beta (m_w - m_l) - \gamma, \qquad
        -(1-\varepsilon) \log\sigma(z) - \varepsilon \log\sigma(-z)

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: scale of the reward, tokens/nat; 2 to 10.
        gamma: the margin asked for, absolute (TRL's ``simpo_gamma``). The official code and its published
            settings give the ratio γ/β (``gamma_beta_ratio``): multiply that by β.
        label_smoothing: ε, the share of labels taken to be wrong.

    Returns:
        (B,) losses.

    Convention: log-probs are averaged per response token; γ is absolute, not a ratio to β.
    Source: Meng, Xia, Chen 2024, arXiv:2405.14734, Eq. 6.
    """
    chosen, rejected = means(policy)
    z = beta * (chosen - rejected) - gamma
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)
