"""Objectives of K responses at once, best first.

a is the log-ratio of a response, r = βa its implicit reward, m its log-prob per token, s its score; slots are
numbered from 1. Every response counts, so ``lift`` does not apply.
"""

from __future__ import annotations

import math

from mlxpref.objectives.logratios import list_log_ratios, token_log_ratios
from mlxpref.objectives.policy_only import sft as nll
from mlxpref.objectives.registry import ListLogps, NonNegative, PerResponse, PerToken, Positive, objective
from mlxpref.ops import (
    Array,
    absolute,
    amax,
    amin,
    exp,
    indicator,
    log,
    log_sigmoid,
    logsumexp,
    relu,
    softplus,
    stack,
    where,
)
from mlxpref.records import Logps


@objective
def pro(policy: ListLogps, scores: PerResponse, *, sft: NonNegative = 0.05) -> Array:
    r"""Preference ranking optimisation: each response against all worse ones, as sharply as scores differ.

    .. math::
        -\sum_{k<K} \log \frac{e^{m_k T_k}}{e^{m_k T_k} + \sum_{i>k} e^{m_i (s_k - s_i)}}
        - \lambda (K-1)^2 m_1, \qquad T_k = \max_{i>k} (s_k - s_i)

    Args:
        policy: log-probs of one batch of lists, (B, K, L), nats.
        scores: (B, K), best first.
        sft: λ, weight of the best response's negative log-likelihood per token, tokens/nat, for each of
            (K − 1)².

    Returns:
        (B,) losses. Where all later responses have the score of the k-th, its term is a constant without
        gradient, the logarithm of their number and it.

    Convention: log-probs are averaged per response token; scores are taken as they are, so their scale
    matters.
    Source: Song et al. 2023, arXiv:2306.17492; (K − 1)²: its official code.
    """
    m, n = policy.means, policy.tokens.shape[1]
    losses = sft * (n - 1) ** 2 * nll(policy)
    for k in range(n - 1):
        gaps = scores[:, k : k + 1] - scores[:, k + 1 :]
        own = m[:, k] * amax(gaps, 1)
        others = [m[:, k + 1 + i] * gaps[:, i] for i in range(n - 1 - k)]
        losses = losses + logsumexp(stack([own, *others], 1), 1) - own
    return losses


@objective
def lipo(policy: ListLogps, reference: Logps, scores: PerResponse, *, beta: Positive = 0.1) -> Array:
    r"""LiPO-λ: pairs of a list, weighted by what swapping the two would cost the ranking (LambdaRank).

    .. math::
        \sum_{\psi_i > \psi_j} \bigl|2^{\psi_i} - 2^{\psi_j}\bigr|
        \Bigl|\tfrac{1}{\log(1+\tau_i)} - \tfrac{1}{\log(1+\tau_j)}\Bigr| \log\bigl(1 + e^{r_j - r_i}\bigr)

    Args:
        policy, reference: log-probs of one batch of lists, (B, K, L), nats.
        scores: (B, K); their labels ψ are the scores of a list stretched over [0, 1].
        beta: scale of the implicit rewards, 1/nats.

    Returns:
        (B,) losses; with K = 2, 0.532456 times DPO's. 0 where all scores are equal.

    Convention: log-ratios are summed over tokens; natural logarithm; τ is the rank by r now, from 1, a
    tie by slot, without gradient. Scores as they come (2^10) would drown small gains, so ψ is in [0, 1].
    Source: Liu et al. 2024, arXiv:2402.01878.
    Also known as: lipo_lambda.
    """
    return _lambda_loss(beta * list_log_ratios(policy, reference), scores)


@objective
def list_mle(policy: ListLogps, reference: Logps, *, beta: Positive = 0.1) -> Array:
    r"""ListMLE: the likelihood of the whole order, the best picked first, then the best of the rest.

    .. math:: -\sum_{i<K} \Bigl[ r_i - \log \sum_{j \ge i} e^{r_j} \Bigr]

    Args:
        policy, reference: log-probs of one batch of lists, (B, K, L), nats.
        beta: scale of the implicit rewards, 1/nats.

    Returns:
        (B,) losses; log K! where policy = reference. With K = 2 it is DPO.

    Convention: log-ratios are summed over tokens; the order of the list counts, equal scores or not.
    Source: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; as a baseline of LiPO: arXiv:2402.01878.
    Also known as: plackett_luce (DPO's paper).
    """
    r = beta * list_log_ratios(policy, reference)
    return sum(logsumexp(r[:, i:], 1) - r[:, i] for i in range(r.shape[1] - 1))


@objective
def experimental_info_nca(
    policy: ListLogps, reference: Logps, scores: PerResponse, *, beta: Positive = 0.01, alpha: Positive = 1.0
) -> Array:
    r"""InfoNCA: the policy's preference among the responses shall be that of the scores.

    .. math:: -\sum_i \operatorname{softmax}(s/\alpha)_i \log \operatorname{softmax}(r)_i

    Args:
        policy, reference: log-probs of one batch of lists, (B, K, L), nats.
        scores: (B, K).
        beta: scale of the implicit rewards, 1/nats.
        alpha: α, temperature of the scores, points: towards 0 the best response takes all.

    Returns:
        (B,) losses; log K where policy = reference. With K = 2 it is ``soft_label_dpo`` with η = 1/α.

    Convention: log-ratios are summed over tokens.
    Unverified: the form for lists; that for pairs without scores is DPO.
    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    r = beta * list_log_ratios(policy, reference)
    return -(_shares(scores, alpha) * _log_softmax(r)).sum(-1)


@objective
def experimental_nca(
    policy: ListLogps, reference: Logps, scores: PerResponse, *, beta: Positive = 0.01, alpha: Positive = 1.0
) -> Array:
    r"""NCA: each response against the reference; good ones shall become likelier, not only relatively so.

    .. math::
        -\sum_i \Bigl[ \operatorname{softmax}(s/\alpha)_i \log\sigma(r_i)
        + \tfrac{1}{K} \log\sigma(-r_i) \Bigr]

    Args:
        policy, reference: log-probs of one batch of lists, (B, K, L), nats.
        scores: (B, K).
        beta: scale of the implicit rewards, 1/nats.
        alpha: α, temperature of the scores, points: towards 0 the best response takes all.

    Returns:
        (B,) losses; 2 log 2 where policy = reference. With K = 2, as α goes to 0, it is ``nca_pair``.

    Convention: log-ratios are summed over tokens.
    Unverified: the form for lists; that for pairs is ``nca_pair``.
    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    r = beta * list_log_ratios(policy, reference)
    return -(_shares(scores, alpha) * log_sigmoid(r)).sum(-1) - log_sigmoid(-r).mean(-1)


@objective
def experimental_tree_tpo(
    policy: ListLogps, reference: Logps, scores: PerResponse, token_weights: PerToken, *, beta: Positive = 0.1
) -> Array:
    r"""Tree preference optimisation: LiPO-λ on log-ratios whose tokens are weighted by their step.

    .. math::
        \text{lipo of } r = \beta \sum_t w_t \bigl(\log\pi_t - \log\pi^{\mathrm{ref}}_t\bigr)

    Args:
        policy, reference: log-probs of one batch of lists, (B, K, L), nats.
        scores: (B, K), as ``lipo``'s.
        token_weights: (B, K, L), w of each token: that of its step, in the paper 1 + the cosine between the
            step and that of the best response. All 1: ``lipo``.
        beta: scale of the implicit rewards, 1/nats.

    Returns:
        (B,) losses; as ``lipo``'s where policy = reference.

    Convention: the released loss rewards a larger rank loss and leaves the swaps unweighted; this does
    neither.
    Unverified: the paper's own loss; its released code contradicts it.
    Source: after Liao et al. 2024, arXiv:2410.12854.
    """
    r = beta * (token_log_ratios(policy, reference) * token_weights).sum(-1)
    return _lambda_loss(r, scores)


def _lambda_loss(r: Array, scores: Array) -> Array:
    """LiPO-λ of rewards and scores (B, K) → (B,). Axis 1 is i, the better; axis 2 is j."""
    gain = exp(math.log(2) * _stretched(scores))
    discount = 1 / log(1 + _ranks(r))
    gains = relu(gain[:, :, None] - gain[:, None, :])  # 0 where i is not the better
    discounts = absolute(discount[:, :, None] - discount[:, None, :])
    return (gains * discounts * softplus(r[:, None, :] - r[:, :, None])).sum(-1).sum(-1)


def _stretched(scores: Array) -> Array:
    """The scores of each list over [0, 1]; all 0 where they are equal."""
    low, high = amin(scores, 1)[:, None], amax(scores, 1)[:, None]
    return (scores - low) / where(high > low, high - low, 1.0)


def _ranks(r: Array) -> Array:
    """1 + how many are larger, or equal in an earlier slot; constant, in r's dtype."""
    columns = [r[:, i] for i in range(r.shape[1])]
    ranks = []
    for i, own in enumerate(columns):
        before = [indicator(other >= own, r) for other in columns[:i]]
        after = [indicator(other > own, r) for other in columns[i + 1 :]]
        ranks.append(1 + sum(before + after))
    return stack(ranks, 1)


def _shares(scores: Array, alpha: float) -> Array:
    """softmax(s/α) over a list; from its largest score on, since s/α may be large and float32 coarse there."""
    return exp(_log_softmax((scores - amax(scores, 1)[:, None]) / alpha))


def _log_softmax(x: Array) -> Array:
    return x - logsumexp(x, 1)[:, None]
