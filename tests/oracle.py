"""Every objective once more, one example at a time: Python floats and ``math``, written from the papers.

It shares nothing with the package, and is slow and naive on purpose. A new objective adds one row: a
function of an example, the option values to try, and, where somebody has published or computed them
independently, golden values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Tokens = Sequence[float]
"""Log-probs of the tokens of one response, nats."""


@dataclass(frozen=True)
class Example:
    """Responses best first; a column an objective does not use may be absent."""

    policy: Sequence[Tokens]
    reference: Sequence[Tokens]
    scores: Sequence[float] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Golden:
    """Loss, ∂/∂ℓ_w and ∂/∂ℓ_l on the examples A and B, to six places."""

    options: Mapping[str, Any]
    a: tuple[float, float, float]
    b: tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One objective: its loss on an example, option values beside the defaults, golden values."""

    loss: Callable[..., float]
    points: Sequence[Mapping[str, Any]]
    golden: Sequence[Golden]


ORACLE: dict[str, Row] = {}


def row(*points: Mapping[str, Any], golden: Sequence[Golden] = ()) -> Callable[[Any], Any]:
    """Enter a function under its name. Every option needs a point at which it is not the default."""

    def enter(loss: Callable[..., float]) -> Callable[..., float]:
        ORACLE[loss.__name__] = Row(loss, points, golden)
        return loss

    return enter


# --- examples ----------------------------------------------------------------------------------


def even(total: float, n: int) -> list[float]:
    """n tokens that share a log-prob evenly."""
    return [total / n] * n


A = Example([even(-48, 24), even(-62, 30)], [even(-51, 24), even(-58.5, 30)], (8, 5.5))
B = replace(A, policy=[even(-52, 24), even(-57, 30)])


def random_examples(n: int, k: int = 2, seed: int = 0) -> list[Example]:
    """Responses of 1 to 9 tokens, log-probs in (-4, -0.01), distinct scores falling with the slot."""
    rng = random.Random(seed)

    def example() -> Example:
        lengths = [rng.randint(1, 9) for _ in range(k)]
        policy = [[-rng.uniform(0.01, 4) for _ in range(length)] for length in lengths]
        reference = [[-rng.uniform(0.01, 4) for _ in range(length)] for length in lengths]
        return Example(policy, reference, sorted((rng.uniform(1, 10) for _ in range(k)), reverse=True))

    return [example() for _ in range(n)]


def token_slopes(loss: Callable[[Example], float], at: Example, step: float = 1e-5) -> list[list[float]]:
    """∂loss/∂ each policy token log-prob, by central differences."""

    def moved(k: int, t: int, by: float) -> float:
        policy = [list(tokens) for tokens in at.policy]
        policy[k][t] += by
        return loss(replace(at, policy=policy))

    return [
        [(moved(k, t, step) - moved(k, t, -step)) / (2 * step) for t in range(len(tokens))]
        for k, tokens in enumerate(at.policy)
    ]


# --- words of the formulas ---------------------------------------------------------------------


def log_sigma(z: float) -> float:
    """log of the logistic function."""
    return -math.log1p(math.exp(-z))


def log_ratio(x: Example, k: int) -> float:
    """a of response k: 0 the chosen, 1 the rejected."""
    return math.fsum(x.policy[k]) - math.fsum(x.reference[k])


def delta(x: Example) -> float:
    return log_ratio(x, 0) - log_ratio(x, 1)


def mean(tokens: Tokens) -> float:
    return math.fsum(tokens) / len(tokens)


# --- margin ------------------------------------------------------------------------------------


@row(
    {"beta": 0.01, "label_smoothing": 0.3},
    {"beta": 0.5},
    {"beta": 2.0, "label_smoothing": 0.1},
    golden=[
        Golden({"beta": 0.1}, (0.420055, -0.034299, 0.034299), (0.825939, -0.056218, 0.056218)),
        Golden(
            {"beta": 0.1, "label_smoothing": 0.1},
            (0.485055, -0.024299, 0.024299),
            (0.800939, -0.046218, 0.046218),
        ),
    ],
)
def dpo(x: Example, *, beta: float = 0.1, label_smoothing: float = 0.0) -> float:
    z = beta * delta(x)
    return -(1 - label_smoothing) * log_sigma(z) - label_smoothing * log_sigma(-z)


@row(
    {"beta": 0.01, "label_smoothing": 0.3},
    {"beta": 0.5, "label_smoothing": 0.0},
    {"beta": 1.0, "label_smoothing": 0.45},
    golden=[
        Golden(
            {"beta": 0.1, "label_smoothing": 0.1},
            (0.338805, -0.046799, 0.046799),
            (0.857189, -0.068718, 0.068718),
        )
    ],
)
def robust(x: Example, *, beta: float = 0.1, label_smoothing: float = 0.1) -> float:
    z, e = beta * delta(x), label_smoothing
    return (-(1 - e) * log_sigma(z) + e * log_sigma(-z)) / (1 - 2 * e)


@row(
    {"beta": 0.01},
    {"beta": 1.5},
    golden=[Golden({"beta": 0.1}, (2.25, 3.0, -3.0), (56.25, -15.0, 15.0))],
)
def ipo(x: Example, *, beta: float = 0.1) -> float:
    return (delta(x) - 1 / (2 * beta)) ** 2


@row(
    {"beta": 0.01},
    {"beta": 1.5},
    golden=[Golden({"beta": 0.1}, (22.641736, -0.396528, 0.317222), (25.925069, -0.424306, 0.339444))],
)
def ipo_norm(x: Example, *, beta: float = 0.1) -> float:
    a_w, a_l = log_ratio(x, 0) / len(x.policy[0]), log_ratio(x, 1) / len(x.policy[1])
    return (a_w - a_l - 1 / (2 * beta)) ** 2


@row(
    {"beta": 0.01},
    {"beta": 0.5},
    {"beta": 3.0},
    golden=[Golden({"beta": 0.1}, (0.35, -0.1, 0.1), (1.25, -0.1, 0.1))],
)
def hinge(x: Example, *, beta: float = 0.1) -> float:
    z = beta * delta(x)
    return 1 - z if z < 1 else 0.0


@row(
    {"beta": 0.1},
    {"beta": 1.0},
    golden=[Golden({"beta": 5.0}, (0.261360, -0.047916, 0.038333), (0.948346, -0.127629, 0.102103))],
)
def ln_dpo(x: Example, *, beta: float = 5.0) -> float:
    a_w, a_l = log_ratio(x, 0) / len(x.policy[0]), log_ratio(x, 1) / len(x.policy[1])
    return -log_sigma(beta * (a_w - a_l))


# --- policy_only -------------------------------------------------------------------------------


# −48 nats in 24 tokens, −52 in 24.
@row(
    {"per": "response"},
    golden=[
        Golden({"per": "token"}, (2.0, -1 / 24, 0.0), (52 / 24, -1 / 24, 0.0)),
        Golden({"per": "response"}, (48.0, -1.0, 0.0), (52.0, -1.0, 0.0)),
    ],
)
def sft(x: Example, *, per: str = "token") -> float:
    return -mean(x.policy[0]) if per == "token" else -math.fsum(x.policy[0])


# The golden row is for γ/β = 0.5 at β = 2: γ = 1.
@row(
    {"beta": 2.5, "gamma": 1.4},
    {"beta": 10.0, "gamma": 0.0},
    {"gamma": 1.6, "label_smoothing": 0.1},
    golden=[
        Golden({"beta": 2.0, "gamma": 1.0}, (1.217570, -0.058671, 0.046937), (1.728748, -0.068541, 0.054833))
    ],
)
def simpo(x: Example, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> float:
    z = beta * (mean(x.policy[0]) - mean(x.policy[1])) - gamma
    return -(1 - label_smoothing) * log_sigma(z) - label_smoothing * log_sigma(-z)
