"""Objectives without a reference: they look at the policy's own log-probs.

``DRDO`` (arXiv:2410.08458), a student without a reference, is not among them: its exact loss is not published
in a form we could check.
"""

from __future__ import annotations

from typing import Literal

from mlxpref.objectives.logratios import Pair, means, smoothed, sums
from mlxpref.objectives.registry import (
    FlipRate,
    ListLogps,
    NonNegative,
    PerResponse,
    Positive,
    TextLogps,
    objective,
)
from mlxpref.ops import Array, clip, expm1, log1mexp, log_sigmoid, relu
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
    policy: Logps,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 0.5,
    label_smoothing: FlipRate = 0.0,
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid",
) -> Array:
    r"""SimPO: the mean log-prob per token is the reward, and the chosen must win by a margin.

    .. math::
        z = \beta (m_w - m_l) - \gamma, \qquad
        -(1-\varepsilon) \log\sigma(z) - \varepsilon \log\sigma(-z) \quad\text{or}\quad \max(0, 1 - z)

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: scale of the reward, tokens/nat; 2 to 10.
        gamma: the margin asked for, absolute (TRL's ``simpo_gamma``). The official code and its published
            settings give the ratio γ/β (``gamma_beta_ratio``): multiply that by β.
        label_smoothing: ε, the share of labels taken to be wrong; 0 with the hinge.
        loss_type: "sigmoid" as in the paper, or "hinge", no push once z has reached 1.

    Returns:
        (B,) losses. The gradient of the hinge is 0 at its kink.

    Raises:
        ValueError: label_smoothing with the hinge.

    Convention: log-probs are averaged per response token; γ is absolute, not a ratio to β.
    Source: Meng, Xia, Chen 2024, arXiv:2405.14734, Eq. 6; label smoothing and hinge: its official code.
    """
    chosen, rejected = means(policy)
    z = beta * (chosen - rejected) - gamma
    if loss_type == "sigmoid":
        return smoothed(z, label_smoothing)
    if label_smoothing:
        raise ValueError("label_smoothing acts on loss_type sigmoid only; with hinge it is 0")
    return relu(1 - z)


@objective
def alphapo(policy: Logps, *, beta: Positive = 2.5, gamma: NonNegative = 0.25, alpha: float = 0.25) -> Array:
    r"""AlphaPO: SimPO with a reward that bends: steep for improbable responses where α > 0.

    .. math::
        -\log\sigma(r_w - r_l - \gamma), \qquad r = \beta\, \frac{1 - e^{-\alpha m}}{\alpha}

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: scale of the reward, tokens/nat; 2.5 to 10.
        gamma: the margin asked for, absolute; published settings give γ/β: multiply that by β.
        alpha: how the reward bends, tokens/nat; any real number. 0 is SimPO; at 1 the reward is
            β(1 − 1/p), at −1 β(p − 1), with p the geometric mean of the tokens' probabilities.

    Returns:
        (B,) losses.

    Convention: log-probs are averaged per response token; γ is absolute. −αm is held at 80, where
    float32 ends. TRL's CPO trainer (``alphapo``) takes the power of a probability, which overflows sooner.
    Source: Gupta et al. 2025, arXiv:2501.03884.
    """
    chosen, rejected = (_bent(m, alpha) for m in means(policy))
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


@objective
def cpo(policy: Logps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Array:
    r"""Contrastive preference optimisation: DPO as if the reference were uniform, and a likelihood term.

    .. math:: -\log\sigma\bigl(\beta(\ell_w - \ell_l)\bigr) - \alpha\, \ell_w / n_w

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: scale of the margin, 1/nats.
        alpha: weight of the chosen response's negative log-likelihood per token, tokens/nat.

    Returns:
        (B,) losses.

    Convention: the margin is of sums, the likelihood per token of each response. TRL's CPO trainer
    (``sigmoid``, ``cpo_alpha``) averages the likelihood over all chosen tokens of a batch.
    Source: Xu et al. 2024, arXiv:2401.08417.
    """
    chosen, rejected = sums(policy)
    return -log_sigmoid(beta * (chosen - rejected)) + alpha * sft(policy)


@objective
def orpo(policy: Logps, *, beta: NonNegative = 0.1) -> Array:
    r"""ORPO: fine-tuning on the chosen response, and the odds ratio of the two beside it.

    .. math::
        -m_w - \beta \log\sigma\bigl(\operatorname{lo}(m_w) - \operatorname{lo}(m_l)\bigr), \qquad
        \operatorname{lo}(m) = m - \log(1 - e^m)

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: weight of the odds-ratio term, a number: the paper's λ, TRL's ``beta``. 0 leaves ``sft``.

    Returns:
        (B,) losses.

    Convention: log-probs are averaged per response token; in the odds m is held at −1e-6 or below, since
    they are infinite at 0. TRL's ORPO trainer averages −m_w over all chosen tokens of a batch.
    Source: Hong, Lee, Thorne 2024, arXiv:2403.07691.
    """
    chosen, rejected = _log_odds(policy)
    return sft(policy) - beta * log_sigmoid(chosen - rejected)


@objective
def slic(policy: Logps, *, beta: Positive = 1.0, delta: Positive = 1.0, sft_weight: NonNegative = 1.0) -> Array:
    r"""SLiC: a hinge on the log-probs of the two responses, held in place by a likelihood term.

    .. math:: \max\bigl(0, \delta - \beta(\ell_w - \ell_l)\bigr) - \lambda\, \ell_w

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        beta: scale of the margin, 1/nats; 1 in the paper.
        delta: the margin asked for, in units of β·nats.
        sft_weight: λ, weight of the negative log-likelihood of the chosen response, nats of the whole
            response: tens to hundreds, so λ is small where the hinge shall count.

    Returns:
        (B,) losses. The gradient of the hinge is 0 at its kink.

    Convention: log-probs are summed over tokens; the chosen response is the target of the likelihood
    term (the paper may take another). With sft_weight 0 and delta 1 it is ``hinge`` of TRL's CPO trainer.
    Source: Zhao et al. 2023, arXiv:2305.10425.
    """
    chosen, rejected = sums(policy)
    return relu(delta - beta * (chosen - rejected)) + sft_weight * sft(policy, per="response")


@objective
def triple_po(
    policy: Logps,
    gold: TextLogps,
    *,
    beta: Positive = 0.01,
    alpha: NonNegative = 1.0,
    gamma: NonNegative = 0.0,
    length_normalized: bool = False,
) -> Array:
    r"""Triple preference optimisation: a contrast of two responses, and fine-tuning on a third, the best.

    .. math:: -\log\sigma\bigl(\beta(x_w - x_l) - \gamma\bigr) - \alpha\, \ell_g / n_g

    Args:
        policy: log-probs of one batch of pairs, (B, 2, L), nats.
        gold: log-probs of the gold response to the same prompt, (B, 1, L), nats.
        beta: scale of the margin, 1/nats (tokens/nat when length_normalized).
        alpha: weight of the gold response's negative log-likelihood per token, tokens/nat.
        gamma: the margin asked for, absolute.
        length_normalized: false: x is the sum of a response's log-probs; true: their mean.

    Returns:
        (B,) losses.

    Convention: this is TRL's experimental TPO; tree preference optimisation, also TPO, is
    ``experimental_tree_tpo``. TRL averages the likelihood over all gold tokens of a batch.
    Source: Saeidi et al. 2024, arXiv:2405.16681.
    Also known as: tpo (TRL).
    """
    chosen, rejected = means(policy) if length_normalized else sums(policy)
    return -log_sigmoid(beta * (chosen - rejected) - gamma) + alpha * sft(gold)


@objective
def poft(policy: ListLogps, aligned_logps: PerResponse, *, beta: Positive = 1.0, gamma: float = 0.0) -> Array:
    r"""Preference-oriented fine-tuning: the policy shall find the response likelier than aligned models do.

    .. math:: -\log\sigma(\beta m_1 - \beta \bar m_1 + \gamma)

    Its gradient fades once the policy does, so responses that aligned models find strange count less.

    Args:
        policy: log-probs of one batch, (B, K, L), nats; the preferred response alone counts.
        aligned_logps: (B, K), m̄: log-prob under aligned models, nats per token of each model's own
            tokeniser, averaged over the models.
        beta: scale, tokens/nat.
        gamma: added to the margin, a number: above 0 less, below 0 more is asked of the policy.

    Returns:
        (B,) losses; log 2 with γ = 0 where the policy scores as the aligned models do.

    Convention: log-probs are averaged per response token.
    Source: Fan et al. 2024, arXiv:2412.12865.
    """
    return -log_sigmoid(beta * (policy.means[:, 0] - aligned_logps[:, 0]) + gamma)


def _bent(m: Array, alpha: float) -> Array:
    """(1 − e^(−αm)) / α, and its limit m at α = 0 (or so near it that float32 cannot hold it)."""
    return m if abs(alpha) < 1e-30 else -expm1(clip(-alpha * m, high=80.0)) / alpha


def _log_odds(policy: Logps) -> Pair:
    """log(p / (1 − p)) of each response, p being the geometric mean of its tokens' probabilities."""
    chosen, rejected = (clip(m, high=-1e-6) for m in means(policy))
    return chosen - log1mexp(chosen), rejected - log1mexp(rejected)
