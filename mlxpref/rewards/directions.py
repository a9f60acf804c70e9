"""Directions in the space of attributes: how much of each is wanted, as a vector and in the words of a prompt.

In directional preference alignment a prompt names integer weights, ``helpfulness*80 + verbosity*60``, whose
hundredths are a unit vector v; the score of a response is v·r. Its published model has helpfulness and
verbosity, and asks for helpfulness of 71 to 100 (source: Wang et al. 2024, arXiv:2402.18571, and the model
card of DPA-v1-Mistral-7B, whose examples have negative verbosity, too).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from mlxpref.errors import UsageError

FIRST_WEIGHTS = range(71, 101)
"""The first of DPA's two weights: the direction lies nearer to its attribute than to the other's."""

NORM_TOLERANCE = 0.01
"""Integer weights meet the unit circle only nearly: 71 and 70 are 0.997 long."""

_TERM = re.compile(r"\s*(?P<name>[^*+]*[^*+\s])\s*\*\s*(?P<weight>-?\d+)\s*")


def second_weight(first: int) -> int:
    """The integer w2 ≥ 0 with (w1/100)² + (w2/100)² nearest to 1. UsageError if w1 is beyond 100."""
    if not -100 <= first <= 100:
        raise UsageError(f"a weight of a direction is -100 to 100, not {first}")
    return round(math.sqrt(100**2 - first**2))


def dpa_weights() -> tuple[tuple[int, int], ...]:
    """Every pair of weights of DPA: (71, 70), (72, 69), …, (100, 0)."""
    return tuple((first, second_weight(first)) for first in FIRST_WEIGHTS)


def parse_direction(text: str) -> dict[str, int]:
    """``"helpfulness*80 + verbosity*60"`` as attribute → weight.

    Raises:
        UsageError: another form, an attribute named twice, or weights whose hundredths are no unit vector.
    """
    terms = [(part, _TERM.fullmatch(part)) for part in text.split("+")]
    wrong = [part.strip() for part, found in terms if found is None]
    if wrong:
        raise UsageError(
            f"a direction is NAME*WEIGHT + NAME*WEIGHT with integer weights, as helpfulness*80 + verbosity*60; "
            f"{wrong[0]!r} is no NAME*WEIGHT"
        )
    found = [(match["name"], int(match["weight"])) for _, match in terms if match is not None]
    weights = dict(found)
    if len(weights) < len(found):
        raise UsageError(f"a direction names each attribute once: {text}")
    norm = math.hypot(*weights.values()) / 100
    if abs(norm - 1) > NORM_TOLERANCE:
        raise UsageError(
            f"the squares of a direction's weights, in hundredths, add up to 1; those of {text} to {norm**2:.3g}"
            f"{_nearest(weights, norm)}"
        )
    return weights


def _nearest(weights: Mapping[str, int], norm: float) -> str:
    if norm == 0:
        return ""
    scaled = {name: round(weight / norm) for name, weight in weights.items()}
    return f". As long as it should be: {direction_words(scaled)}"


def direction_words(weights: Mapping[str, int]) -> str:
    """The direction as the prompt says it: ``helpfulness*80 + verbosity*60``."""
    return " + ".join(f"{name}*{weight}" for name, weight in weights.items())


def direction_score(attributes: ArrayLike, weights: ArrayLike) -> np.ndarray:
    """(…, M) attributes, (M,) weights → (…): v·r, v the weights brought to length 1; attribute units.

    UsageError if all weights are 0.
    """
    vector = np.asarray(weights, np.float64)
    norm = np.linalg.norm(vector)
    if not norm:
        raise UsageError("weights that are all 0 are no direction")
    return np.asarray(attributes, np.float64) @ (vector / norm)
