"""What speaks against training on a pair: likelihood displacement, and a preference that is weak or wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import ScoreError, UsageError

# --- the highest and the lowest of a column ---


def highest_kept(values: ArrayLike, share: float) -> float:
    """The highest value that stays when the top share is dropped: all above it go.

    Values equal to it stay, so ties let fewer go; which rows go never depends on their order.

    Args:
        values: (N,) numbers, any unit.
        share: round(share · N) of them are to go, 0 < share < 1.

    Raises:
        ScoreError: no values. UsageError: a share that is none.
    """
    return -lowest_kept(-np.asarray(values, np.float64), share)


def lowest_kept(values: ArrayLike, share: float) -> float:
    """The lowest value that stays when the bottom share is dropped; otherwise as :func:`highest_kept`."""
    if not 0 < share < 1:
        raise UsageError(f"a share to drop lies between 0 and 1, not {share:g}")
    rising = np.sort(np.asarray(values, np.float64).ravel())
    if not len(rising):
        raise ScoreError("no values to drop a share of")
    return float(rising[min(round(share * len(rising)), len(rising) - 1)])


# --- likelihood displacement ---


def ches_scores(
    chosen: ArrayLike,
    rejected: ArrayLike,
    chosen_tokens: ArrayLike | None = None,
    rejected_tokens: ArrayLike | None = None,
) -> np.ndarray:
    """CHES of each pair: ⟨Σh_w, Σh_l⟩ − ‖Σh_w‖². High: training on it lowers the probability of both responses.

    Args:
        chosen, rejected: (N, D) last hidden states of the reference, summed over the response's tokens.
        chosen_tokens, rejected_tokens: (N,) how many were summed; given, both, the score is length-normalised:
            ⟨Σh_w, Σh_l⟩/(n_w·n_l) − ‖Σh_w‖²/n_w². Otherwise it grows with the responses.

    Returns:
        (N,), in squared units of the hidden states.

    Raises:
        ScoreError: shapes that differ, or token counts on one side alone or below 1.

    Source: Razin et al. 2024, arXiv:2410.08847.
    """
    h_w, h_l = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if h_w.shape != h_l.shape or h_w.ndim != 2:
        raise ScoreError(f"hidden states of pairs are (N, D) twice, not {h_w.shape} and {h_l.shape}")
    if (chosen_tokens is None) != (rejected_tokens is None):
        raise ScoreError("token counts are needed of both responses, or of neither")
    if chosen_tokens is not None and rejected_tokens is not None:
        n_w, n_l = np.asarray(chosen_tokens, np.float64), np.asarray(rejected_tokens, np.float64)
        if n_w.shape != h_w.shape[:1] or n_l.shape != h_w.shape[:1] or min(n_w.min(), n_l.min()) < 1:
            raise ScoreError("token counts are (N,), at least 1 each")
        h_w, h_l = h_w / n_w[:, None], h_l / n_l[:, None]
    return np.einsum("nd,nd->n", h_w, h_l - h_w)


# --- preference strength ---


class Strength(NamedTuple):
    """(N,) mean and population standard deviation over an ensemble of each pair's gap, score units."""

    mean: np.ndarray
    std: np.ndarray


def preference_strength(gaps: ArrayLike) -> Strength:
    """How sure an ensemble is of each pair: (N, M) gaps r(chosen) − r(rejected) of M models.

    A negative mean says that the label is likely wrong; a mean near 0, that the pair says little.

    Raises:
        ScoreError: gaps that are not (N, M).

    Source: Wang et al. 2024 (Secrets of RLHF II), arXiv:2401.06080.
    """
    values = np.asarray(gaps, np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise ScoreError(f"gaps are (pairs, models), not {values.shape}")
    return Strength(values.mean(1), values.std(1))


def strength_labels(means: ArrayLike, *, flip: float = 0.1, soften: float = 0.0) -> np.ndarray:
    """Probability that each pair's label is right, by the quantile of its strength.

    Args:
        means: (N,) mean gaps of an ensemble, comparable units.
        flip: the lowest share, whose label is turned round (0).
        soften: the share above it, which gets the soft label σ(mean).

    Returns:
        (N,) labels q: 0 of what is flipped, σ(mean) of what is softened, 1 of the rest. In an objective
        with label smoothing ε = 1 − q.

    Raises:
        UsageError: shares below 0, or together more than 1.

    Source: Wang et al. 2024 (Secrets of RLHF II), arXiv:2401.06080. Unverified: its thresholds, and where
    it softens; the lowest tenth or so is flipped there.
    """
    if flip < 0 or soften < 0 or flip + soften > 1:
        raise UsageError(f"shares to flip and to soften are 0 or more, together 1 at most: {flip:g}, {soften:g}")
    values = np.asarray(means, np.float64)
    rising = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    n_flip, n_soft = round(flip * len(values)), round((flip + soften) * len(values))
    soft = 1 / (1 + np.exp(-values))
    return np.where(rising < n_flip, 0.0, np.where(rising < n_soft, soft, 1.0))
