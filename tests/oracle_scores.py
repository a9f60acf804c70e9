"""Losses with scores: C1 to C6."""

from __future__ import annotations

import math
from collections.abc import Sequence

from oracle_words import Example, Golden, batch_row, delta, log_ratio, log_sigma, mean, row, score_gap, sigma

DISTILLED_A = (3.4225, -0.37, 0.37)
DISTILLED_B = (7.5625, -0.55, 0.55)


@row(
    {"beta": 0.5},
    {"eta": 0.3},
    {"beta": 0.02, "eta": 0.1},
    golden=[Golden({"beta": 0.1, "eta": 1.0}, DISTILLED_A, DISTILLED_B)],
)
def distilled_dpo(x: Example, *, beta: float = 0.1, eta: float = 1.0) -> float:
    return (beta * delta(x) - eta * score_gap(x)) ** 2


# One list of scores and γ = 0 is the basic form.
@batch_row(
    {"beta": 0.5},
    {"eta": 0.3},
    {"tau": 20.0},
    {"gamma": 0.5},
    {"beta": 0.3, "eta": 0.2, "tau": 5.0, "gamma": 0.1},
    golden=[
        Golden({"beta": 0.1}, DISTILLED_A, DISTILLED_B, extras={"attributes": [[8.0], [5.5]]}),
        Golden(
            {"beta": 0.1, "tau": 3.0},
            DISTILLED_A,
            DISTILLED_B,
            extras={"attributes": [[8.0, 7.0, 3.5], [5.5, 4.5, 1.0]]},
        ),
    ],
)
def experimental_e_dpo(
    xs: Sequence[Example], *, beta: float = 0.1, eta: float = 1.0, tau: float = 1.0, gamma: float = 0.0
) -> list[float]:
    def distance(i: int) -> float:
        gaps = [x.extras["attributes"][0][i] - x.extras["attributes"][1][i] for x in xs]
        return mean([(beta * delta(x) - eta * gap) ** 2 for x, gap in zip(xs, gaps, strict=True)])

    distances = [distance(i) for i in range(len(xs[0].extras["attributes"][0]))]
    nearest = min(distances)
    soft = nearest - tau * math.log(mean([math.exp(-(d - nearest) / tau) for d in distances]))
    return [soft - gamma * (mean(x.policy[0]) + mean(x.policy[1])) / 2 for x in xs]


@row(
    {"beta": 0.5},
    {"eta": 0.3},
    {"divergence": "sq"},
    {"divergence": "sq", "beta": 0.05, "eta": 0.1, "sft_weight": 0.3},
    {"divergence": "fwd_kl"},
    {"divergence": "fwd_kl", "beta": 0.1, "eta": 0.5},
    {"sft_weight": 0.5},
    golden=[
        Golden({"beta": 0.1, "divergence": "sq"}, DISTILLED_A, DISTILLED_B),
        Golden({"beta": 0.1, "divergence": "bwd_kl"}, (0.200828, -0.026713, 0.026713), (0.538440, -0.048632, 0.048632)),
        Golden({"beta": 0.1, "divergence": "fwd_kl"}, (0.293365, -0.041689, 0.041689), (0.798936, -0.067687, 0.067687)),
    ],
)
def reward_aware(
    x: Example, *, beta: float = 0.2, eta: float = 1.0, divergence: str = "bwd_kl", sft_weight: float = 0.0
) -> float:
    z, goal = beta * delta(x), eta * score_gap(x)

    def kl(u: float, v: float) -> float:
        """KL(σ(u)‖σ(v))."""
        return sigma(u) * (log_sigma(u) - log_sigma(v)) + sigma(-u) * (log_sigma(-u) - log_sigma(-v))

    loss = {"sq": (z - goal) ** 2, "bwd_kl": kl(goal, z), "fwd_kl": kl(z, goal)}[divergence]
    return loss - sft_weight * mean(x.policy[0])


@row(
    {"beta": 0.5},
    {"eta": 0.2},
    {"beta": 0.02, "eta": 0.05},
    golden=[Golden({"beta": 0.1, "eta": 1.0}, (0.469363, -0.026713, 0.026713), (0.806975, -0.048632, 0.048632))],
)
def soft_label_dpo(x: Example, *, beta: float = 0.1, eta: float = 1.0) -> float:
    z, q = beta * delta(x), sigma(eta * score_gap(x))
    return -q * log_sigma(z) - (1 - q) * log_sigma(-z)


# The offset of the golden rows is .25: of δ = 2.5 it is a tenth, and so many times its logarithm.
@row(
    {"beta": 0.3},
    {"alpha": 0.3},
    {"offset": "linear"},
    {"offset": "linear", "beta": 0.02, "alpha": 0.5},
    golden=[
        Golden(
            {"beta": 0.1, "alpha": 0.1, "offset": "linear"},
            (0.513015, -0.040131, 0.040131),
            (0.974077, -0.062246, 0.062246),
        ),
        Golden(
            {"beta": 0.1, "alpha": 0.25 / math.log(2.5), "offset": "log"},
            (0.513015, -0.040131, 0.040131),
            (0.974077, -0.062246, 0.062246),
        ),
    ],
)
def odpo(x: Example, *, beta: float = 0.1, alpha: float = 1.0, offset: str = "log") -> float:
    gap = score_gap(x)
    m = alpha * (math.log(max(gap, 1e-3)) if offset == "log" else gap)
    return -log_sigma(beta * delta(x) - m)


@row(
    {"beta": 0.02},
    {"w": 1.0},
    {"k": 0.05},
    {"beta": 0.3, "w": 0.6, "k": 1.5},
    golden=[
        Golden({"beta": 0.1, "w": 0.1, "k": 0.5}, (0.404390, -0.035635, 0.035635), (0.836006, -0.060699, 0.060699))
    ],
)
def mm_dpo(x: Example, *, beta: float = 0.1, w: float = 0.1, k: float = 0.5) -> float:
    scaled = max(beta * (1 + w * (1 - math.exp(-k * abs(score_gap(x))))), 1e-3)
    return -log_sigma(scaled * delta(x))


@row(
    {"beta": 0.3},
    {"weights": (0.9, 0.1)},
    {"beta": 0.02, "weights": (0.3, 0.7)},
    {"weights": (1.0, 0.0)},
    golden=[
        Golden(
            {"beta": 0.1, "weights": (0.7, 0.3)},
            (0.474077, -0.053934, 0.053934),
            (1.161266, -0.098130, 0.098130),
            extras={"margin_rewards": [1.0, 0.0]},
        ),
        # Two rewards, of gaps 2 and −1: .2 · 2 − .1 · 1 = .3 · 1.
        Golden(
            {"beta": 0.1, "weights": (0.7, 0.2, 0.1)},
            (0.474077, -0.053934, 0.053934),
            (1.161266, -0.098130, 0.098130),
            extras={"margin_rewards": [[2.0, 0.5], [0.0, 1.5]]},
        ),
    ],
)
def modpo(x: Example, *, beta: float = 0.1, weights: Sequence[float] = (0.5, 0.5)) -> float:
    def others(k: int) -> Sequence[float]:
        rewards = x.extras["margin_rewards"][k]
        return rewards if isinstance(rewards, Sequence) else [rewards]

    gaps = [chosen - rejected for chosen, rejected in zip(others(0), others(1), strict=True)]
    margin = math.fsum(weight * gap for weight, gap in zip(weights[1:], gaps, strict=True))
    return -log_sigma((beta * delta(x) - margin) / weights[0])


# Confidence .9 is cDPO with ε = .1.
@row(
    {"beta": 0.01},
    {"beta": 0.3},
    {"beta": 1.0},
    golden=[
        Golden(
            {"beta": 0.1},
            (0.485055, -0.024299, 0.024299),
            (0.800939, -0.046218, 0.046218),
            extras={"confidence": 0.9},
        )
    ],
)
def cream(x: Example, *, beta: float = 0.1) -> float:
    c = x.extras["confidence"]
    z = beta * (log_ratio(x, 0) - log_ratio(x, 1))
    swapped = beta * (log_ratio(x, 1) - log_ratio(x, 0))
    return -c * log_sigma(z) - (1 - c) * log_sigma(swapped)
