"""One score at a time: standardised, or bounded above by how good it already is.

Scores on another scale are mapped to goals, by a straight line or by rank, in
:func:`mlxpref.data.scale.fit_map`; here is what stands before that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import ScoreError, UsageError


class Standard(NamedTuple):
    """What one model's scores are like over a data set: their mean and standard deviation, in its units."""

    mean: float
    std: float


def fit_standard(scores: ArrayLike) -> Standard:
    """Mean and population standard deviation of one model's scores, any shape.

    Raises:
        ScoreError: no scores, or all of them equal: they say nothing, and have no scale to divide by.
    """
    values = np.asarray(scores, np.float64)
    if not values.size or values.min() == values.max():
        what = "there is none" if not values.size else f"every one is {values.flat[0]:g}"
        raise ScoreError(f"scores cannot be standardised: {what}")
    return Standard(float(values.mean()), float(values.std()))


def standardise(scores: ArrayLike, standard: Standard) -> np.ndarray:
    """(s − mean) / std, in standard deviations; the shape stays. Scores of several models become comparable."""
    return (np.asarray(scores, np.float64) - standard.mean) / standard.std


def log_sigmoid(values: ArrayLike) -> np.ndarray:
    """log σ(x) ≤ 0, exact for large |x| too; the shape stays."""
    return -np.logaddexp(0.0, -np.asarray(values, np.float64))


def reference_score(scores: ArrayLike, quantile: float = 0.85) -> float:
    """s_ref: the score that this share of the given scores lies below (linear between two of them).

    Args:
        scores: of one model, any shape; the paper takes a base model's responses.
        quantile: share in [0, 1]. The paper's is the 85th percentile.

    Raises:
        ScoreError: no scores. UsageError: a quantile that is no share.

    Source: Wang et al. 2024, arXiv:2402.00742.
    """
    values = np.asarray(scores, np.float64)
    if not 0 <= quantile <= 1:
        raise UsageError(f"a quantile is a share, 0 to 1, not {quantile:g}")
    if not values.size:
        raise ScoreError("no scores to take a reference from")
    return float(np.quantile(values, quantile))


def centred_utility(scores: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """u = log σ(s − s_ref): far below the reference it grows as the score does, far above it is 0.

    So more of what is good already counts little, and a bad response is as bad as before.

    Args:
        scores: any shape, in the units of the reward model (log-odds where it is Bradley–Terry).
        reference: s_ref, one for all or one for each score.

    Returns:
        Utilities ≤ 0, shaped as the two broadcast.

    Source: Wang et al. 2024, arXiv:2402.00742.
    """
    return log_sigmoid(np.asarray(scores, np.float64) - np.asarray(reference, np.float64))


def joint_utility(scores: ArrayLike, references: ArrayLike) -> np.ndarray:
    """(…, M) scores under M attributes, (M,) references → (…): Σ_k log σ(s_k − s_ref,k).

    About the log-probability that the response is good in every attribute at once: one that is bad is not
    made up for by the others. Source: Wang et al. 2024, arXiv:2402.00742.
    """
    return centred_utility(scores, references).sum(-1)
