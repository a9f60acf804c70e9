"""Several reward models' scores of a response as one number.

The models' scores must be comparable: standardise each first (:mod:`mlxpref.rewards.transforms`; ours).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import UsageError


def mean_score(scores: ArrayLike) -> np.ndarray:
    """(…, M) → (…): the mean over models."""
    return np.asarray(scores, np.float64).mean(-1)


def worst_case(scores: ArrayLike) -> np.ndarray:
    """(…, M) → (…): the lowest over models (WCO): a response is as good as its sternest judge says.

    Source: Coste et al. 2023, arXiv:2310.02743.
    """
    return np.asarray(scores, np.float64).min(-1)


def uncertainty_weighted(scores: ArrayLike, penalty: float = 0.5) -> np.ndarray:
    """(…, M) → (…): mean − λ · variance over models (UWO): where they disagree, less is believed.

    Args:
        scores: comparable scores; the variance is theirs squared, over the M models (population).
        penalty: λ ≥ 0; 0 is the mean. The paper has 0.5 for choosing the best of n, 0.1 for PPO.

    Raises:
        UsageError: a penalty below 0.

    Source: Coste et al. 2023, arXiv:2310.02743.
    """
    if not penalty >= 0:
        raise UsageError(f"the penalty of disagreement is 0 or more, not {penalty:g}")
    values = np.asarray(scores, np.float64)
    return values.mean(-1) - penalty * values.var(-1)
