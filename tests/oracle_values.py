"""Single values the papers' formulas come to, with the columns they need: of one pair, of two, of a list."""

from __future__ import annotations

import math
from dataclasses import replace

from oracle_words import A, Example, Value, even, pair, responses

AT_REFERENCE = replace(
    A,
    policy=A.reference,
    texts={"mismatched": [even(-6, 4)]},
    texts_reference={"mismatched": [even(-6, 4)]},
)
LIST = responses((0.3, 0.1, -0.2), (9, 6, 3))
LOG_2 = math.log(2)

_AT_REFERENCE: list[tuple[str, dict[str, object], float]] = [
    ("dpo", {}, LOG_2),
    ("dpo", {"label_smoothing": 0.3}, LOG_2),
    ("robust", {"label_smoothing": 0.3}, LOG_2),
    ("ipo", {"beta": 0.1}, 25.0),
    ("ipo_norm", {"beta": 0.1}, 25.0),
    ("hinge", {}, 1.0),
    ("ln_dpo", {}, LOG_2),
    ("discopop", {}, 0.846574),
    ("dpop", {}, LOG_2),
    ("minor_dpo", {}, LOG_2),
    ("flex_dpo", {}, LOG_2),
    ("f_dpo", {"divergence": "forward_kl"}, LOG_2),
    ("f_dpo", {"divergence": "js"}, LOG_2),
    ("f_dpo", {"divergence": "alpha"}, LOG_2),
    ("nca_pair", {}, 2 * LOG_2),
    ("bco_pair", {}, 2 * LOG_2),
    ("bco", {}, 2 * LOG_2),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("kto", {}, 1.0),
    ("aot", {}, LOG_2),
    ("aot_unpaired", {}, LOG_2),
    ("selfie", {}, LOG_2),
    ("list_mle", {}, LOG_2),
    ("sppo_hard", {"beta": 0.1}, 25.0),
    ("distilled_dpo", {}, 6.25),
]

VALUES: list[Value] = [
    *(Value(name, options, [AT_REFERENCE], total, said="policy = reference") for name, options, total in _AT_REFERENCE),
    # Both halves of a reward-augmented pair, the second with its roles swapped: z = (.5, −.5), (.5, .5), (0, 0).
    Value("dpo", {"beta": 0.1}, [pair(2, -3), pair(3, -2)], 0.948154, said="halves that heed the goal"),
    Value("dpo", {"beta": 0.1}, [pair(2, -3), pair(-3, 2)], 1.448154, said="halves that do not"),
    Value("dpo", {"beta": 0.1}, [pair(0, 0), pair(0, 0)], 1.386294, said="halves at the reference"),
    Value(
        "dpo",
        {"beta": 0.01, "label_smoothing": 0.3},
        [pair(50, 50 - 84.7298)],
        0.610864,
        said="the optimum with label noise is its entropy",
    ),
    Value("ipo", {"beta": 0.1}, [pair(4, -1)], 0.0, said="Δ = 1/(2β)"),
    Value("hinge", {"beta": 0.1}, [pair(8, -3)], 0.0, said="Δ ≥ 1/β"),
    Value("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, [pair(30, 30 - 69.06755)], 0.0, said="z*"),
    Value("discopop", {"beta": 0.05, "tau": 0.05}, [pair(-1, 1)], 0.7874, 5e-5, said="L(−.1)"),
    # m = σ(2) = .880797: (1 − m) · .644397 + m · .904837.
    Value("discopop", {"beta": 0.05, "tau": 0.05}, [pair(1, -1)], 0.873792, 1e-6, said="L(.1)"),
    Value("sppo_hard", {"beta": 0.1}, [pair(5, -5)], 0.0, said="a = (P − ½)/β"),
    Value("distilled_dpo", {"beta": 0.1}, [pair(20, -5)], 0.0, said="βΔ = δ"),
    Value("reward_aware", {"beta": 0.1}, [pair(20, -5)], 0.0, said="βΔ = δ"),
    Value("reward_aware", {"beta": 0.1, "divergence": "fwd_kl"}, [pair(20, -5)], 0.0, said="βΔ = δ"),
    Value(
        "poft",
        {},
        [Example([[-1.0, -2.0], [-3.0]], [[-1.0, -1.0], [-1.0]], extras={"aligned_logps": [-1.5, -2.5]})],
        LOG_2,
        said="as likely as under the aligned models",
    ),
    Value(
        "pro",
        {"sft": 0.0},
        [Example([[-1.0], [-1.2], [-1.5]], [[-1.0]] * 3, (9, 6, 3))],
        2.832122,
        said="D1",
    ),
    # (K − 1)² · .05 · 1 more.
    Value(
        "pro",
        {"sft": 0.05},
        [Example([[-0.5, -1.5], [-1.2], [-1.5]], [[-1.0]] * 3, (9, 6, 3))],
        3.032122,
        said="D1 with its SFT term",
    ),
    Value("lipo", {"beta": 1.0}, [LIST], 0.571911, said="D2: scores 9, 6, 3 are ψ = 1, .5, 0"),
    Value("lipo", {"beta": 0.1}, [replace(LIST, scores=(5, 5, 5))], 0.0, said="D2: nothing to tell apart"),
    Value("list_mle", {"beta": 1.0}, [LIST], 1.440295, said="D2"),
    Value("experimental_info_nca", {"beta": 1.0, "alpha": 3.0}, [LIST], 0.979900, said="D3"),
    Value("experimental_nca", {"beta": 1.0, "alpha": 3.0}, [LIST], 1.330636, said="D3"),
    Value(
        "experimental_tree_tpo",
        {"beta": 0.5},
        [replace(LIST, extras={"token_weights": [[2.0]] * 3})],
        0.571911,
        said="D4: twice the log-ratio, half the β",
    ),
]
