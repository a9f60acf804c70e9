"""Losses with a further text: E1, E2, F1, F2."""

from __future__ import annotations

import math

from oracle_policy_only import log_odds
from oracle_words import Example, Golden, delta, even, log_ratio, log_sigma, mean, row, text_log_ratio

DPO_A, DPO_B = (0.420055, -0.034299, 0.034299), (0.825939, -0.056218, 0.056218)


def raised(values: tuple[float, float, float], by: float) -> tuple[float, float, float]:
    """The same slopes at a loss greater by a constant."""
    return values[0] + by, values[1], values[2]


# The second term is log 2 for a rationale that is certain.
@row(
    {"beta": 0.5},
    {"gamma": 0.1},
    {"gamma": 0.0},
    {"beta": 0.02, "gamma": 0.5},
    golden=[
        Golden({"beta": 0.1, "gamma": 0.0}, DPO_A, DPO_B, texts={"rationale": [even(-20, 5)]}),
        Golden(
            {"beta": 0.1, "gamma": 0.1},
            raised(DPO_A, math.log(2)),
            raised(DPO_B, math.log(2)),
            texts={"rationale": [[0.0, 0.0]]},
        ),
    ],
)
def rationale_dpo(x: Example, *, beta: float = 0.1, gamma: float = 0.01) -> float:
    loss = -log_sigma(beta * delta(x))
    return loss if gamma == 0 else loss - log_sigma(gamma * math.fsum(x.texts["rationale"][0]))


# A rationale of −4 nats a token at γ = .25 adds 1.
@row(
    {"beta": 0.5},
    {"gamma": 0.1},
    {"beta": 1.0, "gamma": 0.5},
    golden=[
        Golden(
            {"beta": 0.1, "gamma": 0.0},
            (2.065553, -0.043984, 0.001835),
            (2.252505, -0.044378, 0.002258),
            texts={"rationale": [even(-20, 5)]},
        ),
        Golden(
            {"beta": 0.1, "gamma": 0.25},
            (3.065553, -0.043984, 0.001835),
            (3.252505, -0.044378, 0.002258),
            texts={"rationale": [even(-20, 5)]},
        ),
    ],
)
def rationale_orpo(x: Example, *, beta: float = 0.1, gamma: float = 0.01) -> float:
    m_w, m_l = mean(x.policy[0]), mean(x.policy[1])
    return -m_w - (beta * log_sigma(log_odds(m_w) - log_odds(m_l)) + gamma * mean(x.texts["rationale"][0]))


# The same instruction twice is DPO; one 2.5 nats likelier on the rejected side is an offset of .25.
@row(
    {"beta": 0.01},
    {"beta": 0.3},
    {"beta": 1.0},
    golden=[
        Golden(
            {"beta": 0.1},
            DPO_A,
            DPO_B,
            texts={"instructions": [even(-9, 6), even(-9, 6)]},
            texts_reference={"instructions": [even(-12, 6), even(-12, 6)]},
        ),
        Golden(
            {"beta": 0.1},
            (0.513015, -0.040131, 0.040131),
            (0.974077, -0.062246, 0.062246),
            texts={"instructions": [even(-9, 6), even(-5, 4)]},
            texts_reference={"instructions": [even(-10, 6), even(-8.5, 4)]},
        ),
    ],
)
def dove(x: Example, *, beta: float = 0.1) -> float:
    joint = [log_ratio(x, k) + text_log_ratio(x, "instructions", k) for k in (0, 1)]
    return -log_sigma(beta * (joint[0] - joint[1]))


# αβ · 2 nats, for α = .5 and β = .1, is .1.
THIRD = {"texts": {"third": [even(-8, 5)]}, "texts_reference": {"third": [even(-10, 5)]}}


@row(
    {"beta": 0.1},
    {"alpha": 2.0},
    {"beta": 0.3, "alpha": 0.5},
    golden=[
        Golden({"beta": 0.1, "alpha": 0.5}, raised(DPO_A, 0.1), raised(DPO_B, 0.1), **THIRD),
        Golden({"beta": 0.1, "alpha": 0.0}, DPO_A, DPO_B, **THIRD),
    ],
)
def selm(x: Example, *, beta: float = 0.01, alpha: float = 1e-3) -> float:
    return -log_sigma(beta * delta(x)) + alpha * beta * text_log_ratio(x, "third")


@row(
    {"beta": 0.5},
    {"alpha": 0.1},
    {"beta": 0.02, "alpha": 0.01},
    golden=[
        Golden({"beta": 0.1, "alpha": 0.1}, raised(DPO_A, -0.8), raised(DPO_B, -0.8), texts=THIRD["texts"]),
        Golden({"beta": 0.1, "alpha": 0.0}, DPO_A, DPO_B, texts=THIRD["texts"]),
    ],
)
def xpo(x: Example, *, beta: float = 0.1, alpha: float = 1e-5) -> float:
    return -log_sigma(beta * delta(x)) + alpha * math.fsum(x.texts["third"][0])


@row(
    {"beta": 0.5},
    {"alpha": 1.0},
    {"mode": "online"},
    {"mode": "online", "beta": 0.3, "alpha": 0.5},
    golden=[
        Golden({"beta": 0.1, "alpha": 0.5, "mode": "offline"}, raised(DPO_A, -0.1), raised(DPO_B, -0.1), **THIRD),
        Golden({"beta": 0.1, "alpha": 0.5, "mode": "online"}, raised(DPO_A, 0.1), raised(DPO_B, 0.1), **THIRD),
    ],
)
def experimental_vpo(x: Example, *, beta: float = 0.1, alpha: float = 1e-3, mode: str = "offline") -> float:
    sign = {"offline": -1, "online": 1}[mode]
    return -log_sigma(beta * delta(x)) + sign * alpha * beta * text_log_ratio(x, "third")


# τ = η is IPO with β = η, whatever the previous policy.
@row(
    {"eta": 0.1},
    {"tau": 5e-3},
    {"eta": 0.5, "tau": 0.1},
    golden=[
        Golden(
            {"eta": 0.0075, "tau": 0.0025},
            (3823.361111, -123.666667, 123.666667),
            (5017.361111, -141.666667, 141.666667),
            extras={"previous": [-49.0, -59.0]},
        ),
        Golden({"eta": 0.1, "tau": 0.1}, (2.25, 3.0, -3.0), (56.25, -15.0, 15.0), extras={"previous": [-49.0, -59.0]}),
    ],
)
def inpo(x: Example, *, eta: float = 7.5e-3, tau: float = 2.5e-3) -> float:
    policy = math.fsum(x.policy[0]) - math.fsum(x.policy[1])
    reference = math.fsum(x.reference[0]) - math.fsum(x.reference[1])
    previous = x.extras["previous"][0] - x.extras["previous"][1]
    h = policy - tau / eta * reference - (eta - tau) / eta * previous
    return (h - 1 / (2 * eta)) ** 2
