"""Losses of βΔ alone: A1 to A7, A13, A20, A23."""

from __future__ import annotations

import math

from oracle_words import Example, Golden, delta, log_ratio, log_sigma, row, sigma


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
    {"beta": 0.3},
    {"beta": 1.5},
    golden=[Golden({"beta": 0.1}, (2.25, 3.0, -3.0), (56.25, -15.0, 15.0))],
)
def ipo(x: Example, *, beta: float = 0.1) -> float:
    return (delta(x) - 1 / (2 * beta)) ** 2


@row(
    {"beta": 0.01},
    {"beta": 0.3},
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
    {"beta": 2.5},
    golden=[Golden({"beta": 5.0}, (0.261360, -0.047916, 0.038333), (0.948346, -0.127629, 0.102103))],
)
def ln_dpo(x: Example, *, beta: float = 5.0) -> float:
    a_w, a_l = log_ratio(x, 0) / len(x.policy[0]), log_ratio(x, 1) / len(x.policy[1])
    return -log_sigma(beta * (a_w - a_l))


@row(
    {"beta": 0.3},
    {"alpha": 0.1},
    {"beta": 0.02, "alpha": 0.5},
    {"alpha": 0.0},
    golden=[Golden({"alpha": 0.01}, (0.441043, -0.035663, 0.035663), (0.860112, -0.057689, 0.057689))],
)
def r_dpo(x: Example, *, beta: float = 0.1, alpha: float = 0.01) -> float:
    return -log_sigma(beta * delta(x) + alpha * (len(x.policy[0]) - len(x.policy[1])))


@row(
    {"beta": 0.02},
    {"label_smoothing": 0.2},
    {"beta": 0.4, "label_smoothing": 0.05},
    golden=[
        Golden({"beta": 0.1, "label_smoothing": 1e-3}, (1.726947, -0.140995, 0.140995), (3.198420, -0.176152, 0.176152))
    ],
)
def exo_pair(x: Example, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> float:
    z, e = beta * delta(x), label_smoothing
    towards = sigma(z) * (log_sigma(z) - math.log(1 - e))
    away = sigma(-z) * (log_sigma(-z) - math.log(e))
    return towards + away


@row(
    {"beta": 0.01},
    {"tau": 0.5},
    {"beta": 0.2, "tau": 1.0},
    golden=[Golden({"beta": 0.1, "tau": 0.05}, (0.522046, -0.052204, 0.052204), (0.829005, -0.050610, 0.050610))],
)
def discopop(x: Example, *, beta: float = 0.05, tau: float = 0.05) -> float:
    z = beta * delta(x)
    m = sigma(z / tau)
    return -(1 - m) * log_sigma(z) + m * math.exp(-z)


# The gradient goes through p^γ.
@row(
    {"beta": 0.02},
    {"gamma": 0.8},
    {"beta": 0.3, "gamma": 0.3},
    {"gamma": 0.0},
    golden=[Golden({"beta": 0.1, "gamma": 0.05}, (0.411325, -0.032881, 0.032881), (0.792525, -0.051716, 0.051716))],
)
def focalpo(x: Example, *, beta: float = 0.1, gamma: float = 0.05) -> float:
    z = beta * delta(x)
    return -(sigma(z) ** gamma) * log_sigma(z)
