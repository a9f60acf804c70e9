"""Losses of lists, best first: D1 to D4."""

from __future__ import annotations

import math
from collections.abc import Sequence

from oracle_words import Example, Golden, log_ratio, log_sigma, log_sum_exp, mean, row, sg


@row(
    {"sft": 0.5},
    {"sft": 0.0},
    {"sft": 1.0},
)
def pro(x: Example, *, sft: float = 0.05) -> float:
    m, s, n = [mean(tokens) for tokens in x.policy], x.scores, len(x.policy)

    def term(k: int) -> float:
        largest = max(s[k] - s[i] for i in range(k + 1, n))
        worse = [m[i] * (s[k] - s[i]) for i in range(k + 1, n)]
        return log_sum_exp([m[k] * largest, *worse]) - m[k] * largest

    return math.fsum(term(k) for k in range(n - 1)) + sft * (n - 1) ** 2 * -m[0]


def lambda_loss(r: Sequence[float], scores: Sequence[float]) -> float:
    """D2 on rewards r."""
    low, high, slots = min(scores), max(scores), range(len(r))
    psi = [(s - low) / (high - low) if high > low else 0.0 for s in scores]
    rank = sg([1 + sum(r[j] > r[i] or (r[j] == r[i] and j < i) for j in slots) for i in slots])

    def term(i: int, j: int) -> float:
        gain = abs(2 ** psi[i] - 2 ** psi[j])
        discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
        return gain * discount * -log_sigma(r[i] - r[j])

    return math.fsum(term(i, j) for i in slots for j in slots if psi[i] > psi[j])


@row(
    {"beta": 0.01},
    {"beta": 0.5},
    {"beta": 1.5},
)
def lipo(x: Example, *, beta: float = 0.1) -> float:
    return lambda_loss([beta * log_ratio(x, k) for k in range(len(x.policy))], x.scores)


# Two responses are DPO.
@row(
    {"beta": 0.01},
    {"beta": 0.5},
    {"beta": 1.5},
    golden=[Golden({"beta": 0.1}, (0.420055, -0.034299, 0.034299), (0.825939, -0.056218, 0.056218))],
)
def list_mle(x: Example, *, beta: float = 0.1) -> float:
    r = [beta * log_ratio(x, k) for k in range(len(x.policy))]
    return math.fsum(log_sum_exp(r[i:]) - r[i] for i in range(len(r)))


def softmax(values: Sequence[float]) -> list[float]:
    whole = log_sum_exp(values)
    return [math.exp(v - whole) for v in values]


# Two responses are soft-label DPO with q = σ((s_1 − s_2)/α).
@row(
    {"beta": 0.2},
    {"alpha": 3.0},
    {"beta": 0.5, "alpha": 8.0},
    golden=[Golden({"beta": 0.1, "alpha": 1.0}, (0.469363, -0.026713, 0.026713), (0.806975, -0.048632, 0.048632))],
)
def experimental_info_nca(x: Example, *, beta: float = 0.01, alpha: float = 1.0) -> float:
    r = [beta * log_ratio(x, k) for k in range(len(x.policy))]
    goal = softmax([s / alpha for s in x.scores])
    return math.fsum(q * (log_sum_exp(r) - v) for q, v in zip(goal, r, strict=True))


# Two responses and α near 0 are NCA-pair: here the other's share is e⁻⁵⁰.
@row(
    {"beta": 0.2},
    {"alpha": 3.0},
    {"beta": 0.5, "alpha": 8.0},
    golden=[Golden({"beta": 0.1, "alpha": 0.05}, (1.248224, -0.013834, 0.020669), (1.452074, -0.028747, 0.026871))],
)
def experimental_nca(x: Example, *, beta: float = 0.01, alpha: float = 1.0) -> float:
    r = [beta * log_ratio(x, k) for k in range(len(x.policy))]
    goal = softmax([s / alpha for s in x.scores])
    return -math.fsum(q * log_sigma(v) + log_sigma(-v) / len(r) for q, v in zip(goal, r, strict=True))


@row(
    {"beta": 0.01},
    {"beta": 0.5},
    {"beta": 1.5},
)
def experimental_tree_tpo(x: Example, *, beta: float = 0.1) -> float:
    def weighted(k: int) -> float:
        steps = zip(x.extras["token_weights"][k], x.policy[k], x.reference[k], strict=True)
        return math.fsum(w * (p - q) for w, p, q in steps)

    return lambda_loss([beta * weighted(k) for k in range(len(x.policy))], x.scores)
