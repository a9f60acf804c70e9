"""How often one side's responses are preferred to another's: with ties, intervals, and without what length adds.

Prompts are the unit of chance: comparisons of one prompt are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from mlxpref.errors import DataError, UsageError
from mlxpref.evaluate.statistics import Interval, expanded_interval, resampled
from mlxpref.rewards.judges import Verdict

VERSION = 1
"""Of the JSON that a win rate becomes."""

RIDGE = 0.01
"""Weight of both coefficients' squares beside the sum of log-losses, so that a fit ends where one side wins all."""

OVERLAP = 0.05
"""Share of comparisons in which either side's response is the longer one, or as long, from which on length can be told
from quality."""

TIE = 1e-9
"""How near to ½ a verdict is a tie."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, and which is the better.

    Attributes:
        prompt: which of the prompts.
        verdict: that the first side's is.
        lengths: of the two responses, characters.
    """

    prompt: int
    verdict: Verdict
    lengths: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Places:
    """What the order of showing does to a judge.

    Attributes:
        first: share of preference for what is shown first, over both orders; ½ of a judge that likes no place.
        interval: 95 %; None for one prompt.
        agreement: share of comparisons in which both orders prefer the same response, or both neither.
    """

    first: float
    interval: Interval | None
    agreement: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """Of the first side against the second; rates and shares from 0 to 1, intervals of 95 %.

    Attributes:
        n: comparisons.
        prompts: different prompts among them.
        rate: mean preference; a tie counts ½.
        interval: None for one prompt, as is the other.
        wins, ties, losses: shares of the comparisons; where the two orders of a judge disagree, it is a tie.
        equal_lengths: the rate that a logistic regression expects of responses of equal length; None where one side's
            are (nearly) always the longer ones, so that length and quality cannot be told apart.
        equal_lengths_interval: of that.
        length_effect: φ of the regression: log-odds of a response longer by far; None likewise.
        lengths: mean characters of both sides' responses.
        places: None where no judge saw two responses at once.
    """

    n: int
    prompts: int
    rate: float
    interval: Interval | None
    wins: float
    ties: float
    losses: float
    equal_lengths: float | None
    equal_lengths_interval: Interval | None
    length_effect: float | None
    lengths: tuple[float, float]
    places: Places | None

    def as_record(self) -> dict[str, Any]:
        """JSON-safe."""
        return {"version": VERSION, **asdict(self)}


def win_rate(
    comparisons: Sequence[Comparison], *, places: bool = True, seed: int = 0, resamples: int = 1000
) -> WinRate:
    """The figures of these comparisons.

    Args:
        places: whether a judge saw both responses at once, so that their order may have mattered.
        seed, resamples: of the bootstrap.

    Raises:
        DataError: no comparison. UsageError: ``resamples`` below 1.

    Source: length control as of Dubois et al. 2024 (AlpacaEval 2), arXiv:2404.04475, Eq. 3, without its term for the
        difficulty of an instruction, which takes many models' results on the same ones.
    """
    if not comparisons:
        raise DataError("a win rate needs comparisons; there are none")
    if resamples < 1:
        raise UsageError(f"resamples is at least 1, not {resamples}")
    preferred = np.array([one.verdict.preference for one in comparisons])
    prompts = [one.prompt for one in comparisons]
    lengths = np.array([one.lengths for one in comparisons], np.float64)
    gaps = lengths[:, 0] - lengths[:, 1]
    overlap = min((gaps >= 0).mean(), (gaps <= 0).mean()) >= OVERLAP
    longer = standardised(gaps)
    theta, phi = fit_length(preferred, longer)

    def figures(rows: np.ndarray) -> list[float]:
        return [preferred[rows].mean(), _sigmoid(fit_length(preferred[rows], longer[rows])[0])]

    signs = np.array([(one.verdict.ahead, one.verdict.behind) for one in comparisons]) - 0.5
    won, lost = ((sign * signs > TIE).all(1) for sign in (1, -1))
    rate_interval, equal_interval = _intervals(figures, prompts, seed, resamples)
    if won.all() or lost.all():
        rate_interval, equal_interval = (
            _of_all_alike(float(value), between, len(set(prompts)))
            for value, between in ((preferred.mean(), rate_interval), (_sigmoid(theta), equal_interval))
        )
    return WinRate(
        n=len(comparisons),
        prompts=len(set(prompts)),
        rate=float(preferred.mean()),
        interval=rate_interval,
        wins=float(won.mean()),
        ties=float((~won & ~lost).mean()),
        losses=float(lost.mean()),
        equal_lengths=_sigmoid(theta) if overlap else None,
        equal_lengths_interval=equal_interval if overlap else None,
        length_effect=phi if overlap else None,
        lengths=(float(lengths[:, 0].mean()), float(lengths[:, 1].mean())),
        places=_places([one.verdict for one in comparisons], prompts, seed, resamples) if places else None,
    )


def _places(verdicts: Sequence[Verdict], prompts: Sequence[int], seed: int, resamples: int) -> Places:
    ahead, behind = np.array([(one.ahead, one.behind) for one in verdicts]).T
    first = (ahead + 1 - behind) / 2
    (interval,) = _intervals(lambda rows: [first[rows].mean()], prompts, seed, resamples)
    sides = [np.where(abs(values - 0.5) <= TIE, 0, np.sign(values - 0.5)) for values in (ahead, behind)]
    return Places(float(first.mean()), interval, float((sides[0] == sides[1]).mean()))


def _of_all_alike(rate: float, between: Interval | None, n: int) -> Interval | None:
    """Where one side wins all n prompts a bootstrap knows nothing of others. Wilson's interval of 95 % says how many
    of those may go to the other side, and with nothing for this one the interval reaches as far."""
    if between is None:
        return None
    alike = n / (n + NormalDist().inv_cdf(0.975) ** 2)
    low, high = between
    reach = alike * rate if rate > 0.5 else 1 - alike * (1 - rate)
    return min(low, rate, reach), max(high, rate, reach)


def _intervals(
    figures: Callable[[np.ndarray], list[float]], prompts: Sequence[int], seed: int, resamples: int
) -> list[Interval | None]:
    n = len(set(prompts))
    drawn = np.array([figures(rows) for rows in resampled(prompts, seed=seed, resamples=resamples)])
    return [expanded_interval(values, n) for values in drawn.T]


def standardised(differences: np.ndarray) -> np.ndarray:
    """(N,) tanh of the differences by their standard deviation; 0 where they do not vary."""
    deviation = differences.std()
    return np.tanh(differences / deviation) if deviation > 0 else np.zeros_like(differences)


def fit_length(preferred: np.ndarray, longer: np.ndarray) -> tuple[float, float]:
    """(θ, φ) of P(first side preferred) = σ(θ + φ · longer), by maximum likelihood with a slight ridge.

    Args:
        preferred: (N,) 0 to 1; a probability counts as that share of each outcome.
        longer: (N,) of ``standardised``.
    """
    design = np.stack([np.ones_like(longer), longer], 1)
    found = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ found))
        slope = design.T @ (preferred - p) - RIDGE * found
        curvature = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        found = found + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(found[0]), float(found[1])


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
