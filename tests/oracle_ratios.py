"""Losses of a_w and a_l apart: A10 to A12, A14, A15 at δ = 0, A17, A18, A22, A24."""

from __future__ import annotations

import math

from oracle_words import Example, Golden, delta, log_ratio, log_sigma, mean, row, sigma


@row(
    {"divergence": "reverse_kl", "beta": 0.3},
    {"divergence": "js"},
    {"divergence": "js", "beta": 1.0},
    {"divergence": "alpha"},
    {"divergence": "alpha", "alpha": 0.8, "beta": 0.05},
    {"divergence": "alpha", "alpha": 1.0},
    {"beta": 0.01},
    golden=[
        Golden({"divergence": "forward_kl"}, (0.035986, -0.000176, 0.117052), (0.825667, -0.152783, 0.012541)),
        Golden({"divergence": "js"}, (0.534161, -0.001963, 0.040171), (0.750284, -0.038583, 0.009628)),
        Golden({"divergence": "alpha", "alpha": 0.5}, (0.285767, -0.005546, 0.143038), (0.817686, -0.092089, 0.026384)),
        Golden({"divergence": "reverse_kl"}, (0.420055, -0.034299, 0.034299), (0.825939, -0.056218, 0.056218)),
    ],
)
def f_dpo(x: Example, *, beta: float = 0.1, divergence: str = "forward_kl", alpha: float = 0.5) -> float:
    def h(a: float) -> float:
        if divergence == "forward_kl":
            return -math.exp(min(-a, 80))
        if divergence == "js":
            return log_sigma(a)
        if divergence == "alpha" and alpha != 1:
            return math.exp(min((alpha - 1) * a, 80)) / (alpha - 1)
        return a

    return -log_sigma(beta * (h(log_ratio(x, 0)) - h(log_ratio(x, 1))))


@row(
    {"beta": 0.01},
    {"penalty": 0.5},
    {"beta": 0.3, "penalty": 2.0},
    golden=[Golden({"beta": 0.1, "penalty": 50.0}, (0.420055, -0.034299, 0.034299), (5.255234, -5.073377, 0.099478))],
)
def dpop(x: Example, *, beta: float = 0.1, penalty: float = 50.0) -> float:
    below = -log_ratio(x, 0)
    return -log_sigma(beta * (delta(x) - penalty * (below if below > 0 else 0)))


@row(
    {"beta": 0.1},
    {"eta": 1.0},
    {"beta": 0.3, "eta": 0.2},
    golden=[Golden({"beta": 0.1, "eta": 0.005}, (0.430055, -0.034507, 0.034299), (0.836773, -0.056426, 0.056218))],
)
def rpo(x: Example, *, beta: float = 0.01, eta: float = 0.005) -> float:
    return -log_sigma(beta * delta(x)) - eta * mean(x.policy[0])


@row(
    {"beta": 0.1},
    {"beta": 0.4},
    {"beta": 1.0},
    golden=[Golden({"beta": 0.1}, (1.248224, -0.013834, 0.020669), (1.452074, -0.028747, 0.026871))],
)
def nca_pair(x: Example, *, beta: float = 0.01) -> float:
    r_w, r_l = beta * log_ratio(x, 0), beta * log_ratio(x, 1)
    return -log_sigma(r_w) - log_sigma(-r_w) / 2 - log_sigma(-r_l) / 2


@row(
    {"beta": 0.01},
    {"beta": 0.3},
    {"beta": 1.0},
    golden=[Golden({"beta": 0.1}, (1.087737, -0.042556, 0.041338), (1.515354, -0.052498, 0.053743))],
)
def bco_pair(x: Example, *, beta: float = 0.1) -> float:
    return -log_sigma(beta * log_ratio(x, 0)) - log_sigma(-beta * log_ratio(x, 1))


@row(
    {"beta": 0.01},
    {"beta": 0.3},
    {"beta": 0.6},
    golden=[Golden({"beta": 0.1}, (0.838940, -0.024446, 0.024250), (1.062409, -0.024938, 0.024860))],
)
def apo_zero(x: Example, *, beta: float = 0.1) -> float:
    return 1 - sigma(beta * log_ratio(x, 0)) + sigma(beta * log_ratio(x, 1))


@row(
    {"beta": 0.01},
    {"beta": 0.3},
    {"beta": 0.6},
    golden=[Golden({"beta": 0.1}, (0.917432, 0.001911, 0.022535), (1.037197, 0.000324, 0.024613))],
)
def apo_down(x: Example, *, beta: float = 0.1) -> float:
    return sigma(beta * log_ratio(x, 0)) + 1 - sigma(beta * delta(x))


@row(
    {"beta": 0.1},
    {"beta": 0.02},
    {"beta": 1.0},
    golden=[
        Golden({"beta": 0.1}, (3.125, -2.0, 1.5), (39.125, -6.0, 6.5), extras={"win_rates": [1.0, 0.0]}),
        Golden({"beta": 0.1}, (3.125, 0.0, -2.5), (11.125, -4.0, 2.5), extras={"win_rates": [0.8, 0.4]}),
    ],
)
def sppo(x: Example, *, beta: float = 1e-3) -> float:
    p_w, p_l = x.extras["win_rates"]
    return ((log_ratio(x, 0) - (p_w - 0.5) / beta) ** 2 + (log_ratio(x, 1) - (p_l - 0.5) / beta) ** 2) / 2


@row(
    {"beta": 0.1},
    {"beta": 0.02},
    {"beta": 1.0},
    golden=[Golden({"beta": 0.1}, (3.125, -2.0, 1.5), (39.125, -6.0, 6.5))],
)
def sppo_hard(x: Example, *, beta: float = 1e-3) -> float:
    return ((log_ratio(x, 0) - 0.5 / beta) ** 2 + (log_ratio(x, 1) + 0.5 / beta) ** 2) / 2


@row(
    {"beta": 0.01},
    {"beta": 0.3},
    {"beta": 1.0},
    golden=[Golden({"beta": 0.1}, (0.554355, -0.042556, 0.0), (0.825939, -0.056218, 0.056218))],
)
def minor_dpo(x: Example, *, beta: float = 0.1) -> float:
    a_l = log_ratio(x, 1)
    return -log_sigma(beta * (log_ratio(x, 0) - (a_l if a_l > 0 else 0)))


@row(
    {"beta_chosen": 0.3},
    {"beta_rejected": 0.2},
    {"beta_chosen": 0.02, "beta_rejected": 0.4},
    golden=[
        Golden(
            {"beta_chosen": 0.1, "beta_rejected": 0.2},
            (0.313262, -0.026894, 0.053788),
            (0.913015, -0.059869, 0.119738),
        )
    ],
)
def flex_dpo(x: Example, *, beta_chosen: float = 0.1, beta_rejected: float = 0.05) -> float:
    return -log_sigma(beta_chosen * log_ratio(x, 0) - beta_rejected * log_ratio(x, 1))
