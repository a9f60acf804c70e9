"""Losses without a reference: B1 to B7."""

from __future__ import annotations

import math

from oracle_words import Example, Golden, log_sigma, mean, row, smoothed


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
    {"label_smoothing": 0.3},
    {"loss_type": "hinge"},
    {"loss_type": "hinge", "beta": 0.7, "gamma": 0.1},
    golden=[Golden({"beta": 2.0, "gamma": 1.0}, (1.217570, -0.058671, 0.046937), (1.728748, -0.068541, 0.054833))],
)
def simpo(
    x: Example, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0, loss_type: str = "sigmoid"
) -> float:
    z = beta * (mean(x.policy[0]) - mean(x.policy[1])) - gamma
    if loss_type == "hinge":
        return 1 - z if z < 1 else 0.0
    return smoothed(z, label_smoothing)


@row(
    {"beta": 10.0, "gamma": 3.0},
    {"gamma": 1.0},
    {"alpha": 0.0},
    {"alpha": 1.0, "beta": 0.5},
    {"alpha": -1.0, "gamma": 0.0},
    golden=[
        Golden(
            {"alpha": 0.25, "beta": 2.5, "gamma": 0.25},
            (0.679694, -0.084708, 0.068905),
            (1.587305, -0.142438, 0.106601),
        )
    ],
)
def alphapo(x: Example, *, beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25) -> float:
    def r(k: int) -> float:
        m = mean(x.policy[k])
        return beta * m if alpha == 0 else beta * (1 - math.exp(-alpha * m)) / alpha

    return -log_sigma(r(0) - r(1) - gamma)


@row(
    {"beta": 0.5},
    {"alpha": 0.2},
    {"beta": 0.02, "alpha": 0.0},
    golden=[Golden({"beta": 0.1, "alpha": 1.0}, (2.220417, -0.061448, 0.019782), (2.640744, -0.079421, 0.037754))],
)
def cpo(x: Example, *, beta: float = 0.1, alpha: float = 1.0) -> float:
    return -log_sigma(beta * (math.fsum(x.policy[0]) - math.fsum(x.policy[1]))) - alpha * mean(x.policy[0])


def log_odds(m: float) -> float:
    """Of a mean log-prob, which is first brought to −1e-6 or below."""
    m = min(m, -1e-6)
    return m - math.log(-math.expm1(m))


@row(
    {"beta": 1.0},
    {"beta": 0.5},
    {"beta": 0.02},
    golden=[Golden({"beta": 0.1}, (2.065553, -0.043984, 0.001835), (2.252505, -0.044378, 0.002258))],
)
def orpo(x: Example, *, beta: float = 0.1) -> float:
    m_w, m_l = mean(x.policy[0]), mean(x.policy[1])
    return -m_w - beta * log_sigma(log_odds(m_w) - log_odds(m_l))


# The golden row is the contrastive part alone, on βℓ.
@row(
    {"beta": 0.1},
    {"delta": 3.0},
    {"sft_weight": 0.1},
    {"beta": 0.3, "delta": 2.0, "sft_weight": 0.0},
    golden=[Golden({"beta": 0.1, "delta": 1.0, "sft_weight": 0.0}, (0.0, 0.0, 0.0), (0.5, -0.1, 0.1))],
)
def slic(x: Example, *, beta: float = 1.0, delta: float = 1.0, sft_weight: float = 1.0) -> float:
    l_w, l_l = math.fsum(x.policy[0]), math.fsum(x.policy[1])
    short = delta - beta * (l_w - l_l)
    return (short if short > 0 else 0.0) - sft_weight * l_w


# The golden rows are SimPO's with γ = 1, and the same with a gold answer of −2 nats a token that adds α·2.
@row(
    {"beta": 0.2},
    {"alpha": 0.3},
    {"gamma": 0.5},
    {"length_normalized": True},
    {"beta": 2.0, "alpha": 0.1, "gamma": 0.4, "length_normalized": True},
    golden=[
        Golden(
            {"beta": 2.0, "alpha": 0.0, "gamma": 1.0, "length_normalized": True},
            (1.217570, -0.058671, 0.046937),
            (1.728748, -0.068541, 0.054833),
            texts={"gold": [[-2.0] * 3]},
        ),
        Golden(
            {"beta": 2.0, "alpha": 0.5, "gamma": 1.0, "length_normalized": True},
            (2.217570, -0.058671, 0.046937),
            (2.728748, -0.068541, 0.054833),
            texts={"gold": [[-1.0, -2.5, -2.5]]},
        ),
    ],
)
def triple_po(
    x: Example, *, beta: float = 0.01, alpha: float = 1.0, gamma: float = 0.0, length_normalized: bool = False
) -> float:
    of = mean if length_normalized else math.fsum
    return -log_sigma(beta * (of(x.policy[0]) - of(x.policy[1])) - gamma) - alpha * mean(x.texts["gold"][0])


@row({"beta": 0.3}, {"gamma": 0.7}, {"beta": 3.0, "gamma": 1.5})
def poft(x: Example, *, beta: float = 1.0, gamma: float = 0.0) -> float:
    return -log_sigma(beta * mean(x.policy[0]) - beta * x.extras["aligned_logps"][0] + gamma)
