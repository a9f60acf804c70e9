"""Scores that two models' log-probs of a response amount to. Nats; response tokens alone.

A model's log-probs come from its machine room; here they are only put together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import ScoreError


def log_ratio_scores(policy: ArrayLike, reference: ArrayLike, beta: float = 0.1) -> np.ndarray:
    """s = β(ℓ − ℓ_ref): the reward that a directly aligned policy has learnt. The shape stays; nats · β.

    Args:
        policy, reference: log-probs of whole responses under the aligned model and the one it began as.
        beta: of its training; it only scales the scores.

    Raises:
        ScoreError: shapes that differ.

    Source: Rafailov et al. 2023 (DPO), arXiv:2305.18290; as scores in DICE, arXiv:2406.09760.
    """
    return beta * _difference(policy, reference)


def contrastive_scores(strong: ArrayLike, weak: ArrayLike, lengths: ArrayLike) -> np.ndarray:
    """Mean over response tokens of log π_strong − log π_weak, nats a token; the shape stays.

    Args:
        strong, weak: log-probs of whole responses under the better aligned sibling and the less aligned one,
            which share a tokenizer. Special tokens (the end of the turn) are left out of the sums.
        lengths: tokens that were summed, ≥ 1.

    Raises:
        ScoreError: shapes that differ, or a length below 1.

    Source: Xu et al. 2024 (Dr. SoW), arXiv:2411.02481.
    """
    tokens = np.asarray(lengths, np.float64)
    if tokens.size and tokens.min() < 1:
        raise ScoreError("a response has at least one token")
    return _difference(strong, weak) / tokens


class SteerlmWeights(NamedTuple):
    """(…, K) each, a distribution over the K responses: the gradient is −Σ (target − baseline) ∇ log Q_θ."""

    target: np.ndarray
    baseline: np.ndarray


def steerlm_weights(
    attributes: ArrayLike, language: ArrayLike, proposal: ArrayLike, policy: ArrayLike
) -> SteerlmWeights:
    """SteerLM 2.0: how far each of K responses, drawn from Q′(y|a,x), is to become likelier.

    target = softmax_i[log P(a|x,y) + log P(y|x) − log Q′(y|a,x)], baseline = softmax_i[log Q_θ − log Q′].

    Args:
        attributes: (…, K) log P(a|x,y): of the wanted values under the attribute model.
        language: (…, K) log P(y|x): of the response under the model without attributes.
        proposal: (…, K) log Q′(y|a,x): under the model they were drawn from.
        policy: (…, K) log Q_θ(y|a,x): under the model in training.

    Source: Wang et al. 2024 (HelpSteer2), arXiv:2406.08673.
    """
    wanted = np.asarray(attributes, np.float64) + np.asarray(language, np.float64)
    return SteerlmWeights(_softmax(_difference(wanted, proposal)), _softmax(_difference(policy, proposal)))


def _difference(one: ArrayLike, other: ArrayLike) -> np.ndarray:
    left, right = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if left.shape != right.shape:
        raise ScoreError(f"two models' log-probs of the same responses: not {left.shape} and {right.shape}")
    return left - right


def _softmax(values: np.ndarray) -> np.ndarray:
    shares = np.exp(values - values.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)
