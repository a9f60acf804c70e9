"""Momentum between rounds of preference training: a reference that has gone on in the last round's direction.

A further round of training takes the adapter it starts from as its reference. Accelerated preference optimisation
takes that adapter, carried on by a share ``α`` of the step that led to it from the round before, in log space.
No model of these log-probs exists, and none is needed: losses read the reference's log-probs only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def momentum_logps(
    current: Sequence[Sequence[np.ndarray]], previous: Sequence[Sequence[np.ndarray]], alpha: float
) -> list[list[np.ndarray]]:
    r"""Reference log-probs for the next round, token by token.

    .. math:: \ell = (1 + \alpha) \, \ell_t - \alpha \, \ell_{t-1}

    What is missing is a normaliser that depends on the prompt alone: ``(1+α)·ℓ_t − α·ℓ_{t−1}`` sums to another number
    than 1 over all responses. It cancels wherever only differences between responses to one prompt count (margins, as
    in dpo and ipo); it does not where a response stands alone (kto, bco, nca).

    Args:
        current: for each row an array (n_s,) of each response (and further text), nats: log-probs under the adapter
            that this round starts from.
        previous: the same under the adapter that the round before started from.
        alpha: momentum, ≥ 0; 0 gives ``current``. About 0.3 in use (unverified).

    Returns:
        for each row arrays (n_s,) float32, nats. They may be above 0, being no log-probs of a distribution.

    Raises:
        ValueError: rows, responses or tokens do not match.

    Source: He et al. 2024, arXiv:2410.06293.
    """
    combined = []
    for row, (now, before) in enumerate(zip(current, previous, strict=True)):
        lengths = [len(values) for values in now], [len(values) for values in before]
        if lengths[0] != lengths[1]:
            raise ValueError(f"row {row}: responses of {lengths[0]} tokens now and of {lengths[1]} in the round before")
        combined.append([_carried_on(new, old, alpha) for new, old in zip(now, before, strict=True)])
    return combined


def _carried_on(now: np.ndarray, before: np.ndarray, alpha: float) -> np.ndarray:
    """In float64: the difference of two near log-probs is small beside them."""
    new, old = np.asarray(now, np.float64), np.asarray(before, np.float64)
    return ((1 + alpha) * new - alpha * old).astype(np.float32)
