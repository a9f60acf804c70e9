"""Losses that look at single tokens: A8, A9, E3, E4; and WPO's weights, A21."""

from __future__ import annotations

import math

from oracle_words import Example, Golden, Tokens, even, log_sigma, row, sg, smoothed

DPO_A, DPO_B = (0.420055, -0.034299, 0.034299), (0.825939, -0.056218, 0.056218)
CDPO_A, CDPO_B = (0.485055, -0.024299, 0.024299), (0.800939, -0.046218, 0.046218)
OFFSET_A, OFFSET_B = (0.513015, -0.040131, 0.040131), (0.974077, -0.062246, 0.062246)


@row(
    {"beta": 0.5},
    {"alpha": 0.0},
    {"alpha": 0.8, "beta": 0.02},
    {"alpha": 1.0},
    golden=[Golden({"beta": 0.1, "alpha": 1.0}, DPO_A, DPO_B)],
)
def ld_dpo(x: Example, *, beta: float = 0.1, alpha: float = 0.5) -> float:
    n = min(len(x.policy[0]), len(x.policy[1]))

    def of(tokens: Tokens) -> float:
        return math.fsum(tokens[:n]) + alpha * math.fsum(tokens[n:])

    return -log_sigma(beta * (of(x.policy[0]) - of(x.reference[0]) - of(x.policy[1]) + of(x.reference[1])))


@row(
    {"beta": 0.5},
    {"gamma": 0.7},
    {"gamma": 0.9, "beta": 0.02},
    {"gamma": 1.0},
    golden=[Golden({"beta": 0.1, "gamma": 1.0}, DPO_A, DPO_B)],
)
def d2po(x: Example, *, beta: float = 0.1, gamma: float = 0.98) -> float:
    def of(tokens: Tokens) -> float:
        return math.fsum(gamma**t * logp for t, logp in enumerate(tokens, start=1))

    return -log_sigma(beta * (of(x.policy[0]) - of(x.reference[0]) - of(x.policy[1]) + of(x.reference[1])))


# With every token after the divergence: DPO, and cDPO where the confidence is .9. Below a half ε stays a half.
@row(
    {"beta": 0.05},
    {"beta": 0.3},
    {"beta": 1.0},
    golden=[
        Golden({"beta": 0.1}, DPO_A, DPO_B, extras={"divergence": [[1.0] * 24, [1.0] * 30], "confidence": 1.0}),
        Golden({"beta": 0.1}, CDPO_A, CDPO_B, extras={"divergence": [[1.0] * 24, [1.0] * 30], "confidence": 0.9}),
    ],
)
def mcts_dpo(x: Example, *, beta: float = 0.1) -> float:
    def after(k: int) -> float:
        tokens = zip(x.extras["divergence"][k], x.policy[k], x.reference[k], strict=True)
        return math.fsum(p - q for differs, p, q in tokens if differs == 1)

    return smoothed(beta * (after(0) - after(1)), min(1 - x.extras["confidence"], 0.5))


# Without the KL, and with evenly likely tokens, whose mask is 1 whatever it is made of: DPO. A KL of 2.5 nats in the
# rejected response is an offset of .25.
@row(
    {"beta": 0.8},
    {"mask": "ones"},
    {"kl_mask": "ones"},
    {"kl_mask": "none"},
    {"mask": "ones", "kl_mask": "none", "beta": 0.02},
    {"mask": "ones", "kl_mask": "ones", "beta": 0.3},
    golden=[
        Golden(
            {"beta": 0.1, "mask": "ones", "kl_mask": "none"},
            DPO_A,
            DPO_B,
            extras={"token_kl": [even(1, 24), even(2, 30)]},
        ),
        Golden(
            {"beta": 0.1, "mask": "surprisal", "kl_mask": "same"},
            OFFSET_A,
            OFFSET_B,
            extras={"token_kl": [[0.0] * 24, even(2.5, 30)]},
        ),
    ],
)
def experimental_mapo(x: Example, *, beta: float = 0.1, mask: str = "surprisal", kl_mask: str = "same") -> float:
    def parts(k: int) -> tuple[float, float]:
        surprisal = [-q for q in x.reference[k]]
        low, high, ones = min(surprisal), max(surprisal), [1.0] * len(surprisal)
        scaled = [(s - low) / (high - low) for s in surprisal] if high > low else ones
        m_u = scaled if mask == "surprisal" else ones
        m_d = {"same": m_u, "ones": ones, "none": [0.0] * len(ones)}[kl_mask]
        u = math.fsum(m * (p - q) for m, p, q in zip(m_u, x.policy[k], x.reference[k], strict=True))
        d = -math.fsum(m * kl for m, kl in zip(m_d, x.extras["token_kl"][k], strict=True))
        return u, d

    (u_w, d_w), (u_l, d_l) = parts(0), parts(1)
    return -log_sigma(beta * ((u_w - u_l) - (d_w - d_l)))


def wpo_weights(x: Example) -> float:
    """A21: w_w · w_l, constant: what ``weighting: wpo`` multiplies any loss of a pair by."""

    def w(k: int) -> float:
        tokens = zip(x.policy[k], x.extras["overlap"][k], strict=True)
        return math.exp(math.fsum(p - overlap for p, overlap in tokens) / len(x.policy[k]))

    return sg(w(0) * w(1))
