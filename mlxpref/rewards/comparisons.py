"""Scores of a list of responses, compared with each other and with an earlier round's."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import ScoreError


def win_rates(scores: ArrayLike) -> np.ndarray:
    """(…, K) scores → (…, K) in (0, 1): P_i = mean_j σ(s_i − s_j), how often a response beats its list.

    j runs over all K, itself included, which counts ½; so the mean of P over a list is ½. Scores are
    log-odds, as a Bradley–Terry reward model gives them; scale others first.

    Source: Wu et al. 2024 (SPPO), arXiv:2405.00675.
    """
    values = np.asarray(scores, np.float64)
    gaps = values[..., :, None] - values[..., None, :]
    return (0.5 * (1 + np.tanh(0.5 * gaps))).mean(-1)  # σ, without overflow


def ranking_consistency(current: ArrayLike, previous: ArrayLike) -> np.ndarray:
    """(…, K) scores of the same responses under two models → (…) in [0, 1]: (τ + 1)/2.

    Kendall's τ is the share of pairs of responses both order alike, less the share ordered contrariwise; a pair
    that is tied under either counts for neither (τ-a). 1: the same order; 0: the reverse; ½: no relation.

    Raises:
        ScoreError: shapes that differ, or fewer than two responses.

    Source: Wang et al. 2024 (CREAM), arXiv:2410.12735.
    """
    now, then = np.asarray(current, np.float64), np.asarray(previous, np.float64)
    if now.shape != then.shape or not now.ndim or now.shape[-1] < 2:
        raise ScoreError(f"two models' scores of the same responses, two or more: not {now.shape} and {then.shape}")
    one, other = np.triu_indices(now.shape[-1], 1)
    agree = np.sign(now[..., one] - now[..., other]) * np.sign(then[..., one] - then[..., other])
    return (agree.mean(-1) + 1) / 2
