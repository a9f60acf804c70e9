"""What is known of single formulas: values at the reference, optima, limits that are other formulas, signs of slopes.

On pairs of numbers chosen by hand, and mostly in NumPy, where slopes are central differences. What happens exactly
at a kink is asked of MLX and PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from libraries import DIFFERENTIABLE, FLOAT32, LIBRARIES, NUMPY, Library
from oracle import A, B, Example, even, pair, random_examples, responses
from test_objectives import TOKEN_COLUMNS, columns, gradients, losses, slopes

from mlxpref.errors import ObjectiveError
from mlxpref.objectives import TABLE, resolve_objective

Options = Mapping[str, Any]
Change = Callable[[Example], Example]
LOG_2 = math.log(2)


def softplus(u: float) -> float:
    return max(u, 0) + math.log1p(math.exp(-abs(u)))


def sigma(u: float) -> float:
    return 1 / (1 + math.exp(-u))


def entropy(q: float) -> float:
    return -q * math.log(q) - (1 - q) * math.log(1 - q)


def value(name: str, x: Example, **options: Any) -> float:
    return float(losses(NUMPY, name, options, [x])[0])


def by_difference(name: str, x: Example, **options: Any) -> tuple[float, float]:
    """∂L/∂ℓ_w and ∂L/∂ℓ_l, each through the first token."""

    def moved(k: int, by: float) -> float:
        policy = [list(tokens) for tokens in x.policy]
        policy[k][0] += by
        return value(name, replace(x, policy=policy), **options)

    step = 1e-5
    by_chosen, by_rejected = ((moved(k, step) - moved(k, -step)) / (2 * step) for k in (0, 1))
    return by_chosen, by_rejected


def with_columns(x: Example, **extras: Any) -> Example:
    return replace(x, extras={**x.extras, **extras})


def swapped(x: Example) -> Example:
    """Responses, and the scores with them, exchanged."""
    return replace(x, policy=x.policy[::-1], reference=x.reference[::-1], scores=x.scores[::-1])


def z_of(x: Example, beta: float) -> float:
    ratios = [math.fsum(p) - math.fsum(r) for p, r in zip(x.policy, x.reference, strict=True)]
    return beta * (ratios[0] - ratios[1])


# --- policy = reference ------------------------------------------------------------------------


def at_reference(x: Example) -> Example:
    """The policy of step 0, which the iterate before also was; no token is any distance away."""
    previous = [math.fsum(tokens) for tokens in x.reference]
    still = [[0.0] * len(tokens) for tokens in x.reference]
    x = with_columns(x, previous=previous, token_kl=still)
    return replace(x, policy=x.reference, texts={**x.texts, **x.texts_reference})


def n(x: Example, k: int) -> int:
    return len(x.policy[k])


def mean(tokens: Sequence[float]) -> float:
    return math.fsum(tokens) / len(tokens)


def gap(x: Example) -> float:
    return x.scores[0] - x.scores[1]


def lambda_at_reference(x: Example) -> float:
    """LiPO-λ of equal rewards: ranks go by slot, and each pair has log 2."""
    psi = [(s - x.scores[-1]) / (x.scores[0] - x.scores[-1]) for s in x.scores]
    return LOG_2 * sum(
        (2 ** psi[i] - 2 ** psi[j]) * (1 / math.log(2 + i) - 1 / math.log(2 + j))
        for i in range(len(psi))
        for j in range(i + 1, len(psi))
    )


def ensemble_at_reference(xs: Sequence[Example], tau: float) -> float:
    gaps = [[a - b for a, b in zip(*x.extras["attributes"], strict=True)] for x in xs]
    distances = [mean([g[i] ** 2 for g in gaps]) for i in range(len(gaps[0]))]
    return min(distances) - tau * math.log(mean([math.exp((min(distances) - d) / tau) for d in distances]))


AT_REFERENCE: list[tuple[str, Options, Callable[[Example], float] | float]] = [
    ("dpo", {}, LOG_2),
    ("dpo", {"beta": 0.01, "label_smoothing": 0.3}, LOG_2),
    ("robust", {}, LOG_2),
    ("robust", {"label_smoothing": 0.4}, LOG_2),
    ("ipo", {"beta": 0.1}, 25.0),
    ("ipo", {"beta": 0.5}, 1.0),
    ("ipo_norm", {"beta": 0.1}, 25.0),
    ("hinge", {"beta": 0.3}, 1.0),
    ("ln_dpo", {}, LOG_2),
    ("r_dpo", {"alpha": 0.2}, lambda x: softplus(-0.2 * (n(x, 0) - n(x, 1)))),
    ("exo_pair", {"label_smoothing": 0.01}, -LOG_2 - 0.5 * math.log(0.01 * 0.99)),
    ("discopop", {}, 0.5 * (LOG_2 + 1)),
    ("discopop", {"tau": 0.3}, 0.8465735902799727),
    ("focalpo", {"gamma": 0.5}, math.sqrt(0.5) * LOG_2),
    ("f_dpo", {"divergence": "reverse_kl"}, LOG_2),
    ("f_dpo", {"divergence": "forward_kl"}, LOG_2),
    ("f_dpo", {"divergence": "js"}, LOG_2),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.7}, LOG_2),
    ("dpop", {}, LOG_2),
    ("rpo", {"eta": 0.5}, lambda x: LOG_2 - 0.5 * mean(x.reference[0])),
    ("nca_pair", {}, 2 * LOG_2),
    ("bco_pair", {}, 2 * LOG_2),
    ("bco", {}, 2 * LOG_2),
    ("kto", {}, 1.0),
    ("kto", {"desirable_weight": 1.2, "undesirable_weight": 0.6}, 0.9),
    ("apo_zero", {}, 1.0),
    ("apo_down", {}, 1.0),
    ("sppo", {"beta": 0.2}, lambda x: 12.5 * sum((p - 0.5) ** 2 for p in x.extras["win_rates"])),
    ("sppo_hard", {"beta": 0.2}, 6.25),
    ("aot", {}, LOG_2),
    ("aot_unpaired", {}, LOG_2),
    ("minor_dpo", {}, LOG_2),
    ("flex_dpo", {}, LOG_2),
    ("alpha_dpo", {"gamma": 0.3}, lambda x: softplus(0.3 - 2.5 * (mean(x.reference[0]) - mean(x.reference[1])))),
    ("selfie", {"alpha": 0.3}, LOG_2),
    ("distilled_dpo", {"eta": 0.5}, lambda x: (0.5 * gap(x)) ** 2),
    ("reward_aware", {"divergence": "sq"}, lambda x: gap(x) ** 2),
    ("reward_aware", {"divergence": "bwd_kl"}, lambda x: LOG_2 - entropy(sigma(gap(x)))),
    ("reward_aware", {"divergence": "fwd_kl"}, lambda x: (softplus(gap(x)) + softplus(-gap(x))) / 2 - LOG_2),
    ("reward_aware", {"divergence": "sq", "sft_weight": 0.5}, lambda x: gap(x) ** 2 - 0.5 * mean(x.reference[0])),
    ("soft_label_dpo", {}, LOG_2),
    ("odpo", {"offset": "linear", "alpha": 0.5}, lambda x: softplus(0.5 * gap(x))),
    ("odpo", {"offset": "log"}, lambda x: math.log1p(gap(x))),
    ("mm_dpo", {}, LOG_2),
    ("modpo", {"weights": (0.8, 0.2)}, lambda x: softplus(0.25 * np.subtract(*x.extras["margin_rewards"]))),
    ("cream", {}, LOG_2),
    ("ld_dpo", {}, LOG_2),
    ("d2po", {}, LOG_2),
    ("mcts_dpo", {}, LOG_2),
    ("experimental_mapo", {}, LOG_2),
    ("experimental_mapo", {"mask": "ones", "kl_mask": "ones"}, LOG_2),
    ("lipo", {}, lambda_at_reference),
    ("list_mle", {}, lambda x: math.log(math.factorial(len(x.policy)))),
    ("experimental_info_nca", {}, lambda x: math.log(len(x.policy))),
    ("experimental_nca", {}, 2 * LOG_2),
    ("experimental_tree_tpo", {}, lambda_at_reference),
    (
        "rationale_dpo",
        {"gamma": 0.1},
        lambda x: LOG_2 + softplus(-0.1 * math.fsum(x.texts["rationale"][0])),
    ),
    ("dove", {}, LOG_2),
    ("selm", {"alpha": 5.0}, LOG_2),
    ("xpo", {"alpha": 0.5}, lambda x: LOG_2 + 0.5 * math.fsum(x.texts["third"][0])),
    ("experimental_vpo", {"alpha": 5.0}, LOG_2),
    ("inpo", {"eta": 0.1, "tau": 0.03}, 25.0),
]


@pytest.mark.parametrize("library", [*LIBRARIES, FLOAT32[1]])
@pytest.mark.parametrize("name, options, expected", AT_REFERENCE)
def test_policy_equal_to_reference(library: Library, name: str, options: Options, expected: Any) -> None:
    """Where every LoRA run begins. Finds: a shifted or scaled loss, a reference that does not cancel."""
    xs = [at_reference(x) for x in random_examples(8, k=4 if TABLE[name].lists else 2, seed=6)]
    got = losses(library, name, options, xs)
    known = [expected(x) if callable(expected) else expected for x in xs]
    noise = 0 if library is NUMPY else 1e-6
    np.testing.assert_allclose(got, known, rtol=1e-12 + noise, atol=noise * np.abs(known).max())


def test_group_robust_at_the_reference() -> None:
    """Rows of a small group count more, and their mean is log 2."""
    xs = [with_columns(at_reference(x), groups=g) for x, g in zip(random_examples(4), (0, 0, 0, 1), strict=True)]
    np.testing.assert_allclose(losses(NUMPY, "group_robust", {}, xs), LOG_2 * np.array([2 / 3] * 3 + [2]))


def test_e_dpo_at_the_reference() -> None:
    xs = [at_reference(x) for x in random_examples(4, seed=3)]
    for tau in (0.5, 4.0):
        expected = ensemble_at_reference(xs, tau)
        np.testing.assert_allclose(losses(NUMPY, "experimental_e_dpo", {"tau": tau}, xs), expected)


def test_every_reference_objective_has_a_known_value_at_the_reference() -> None:
    elsewhere = {"group_robust", "experimental_e_dpo"}
    assert {name for name, _, _ in AT_REFERENCE} | elsewhere == {
        n for n, e in TABLE.items() if "reference" in e.columns
    }


STEP_ZERO: list[tuple[str, Options, tuple[float, float]]] = [
    ("dpo", {"beta": 0.1}, (-0.05, 0.05)),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.2}, (-0.03, 0.03)),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, (-0.0625, 0.0625)),
    ("ipo", {"beta": 0.1}, (-10.0, 10.0)),
    ("hinge", {"beta": 0.1}, (-0.1, 0.1)),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 0.2}, (-0.025 * math.log(4), 0.025 * math.log(4))),
    ("discopop", {"beta": 0.1}, (0.1 * ((1 - LOG_2) * 5 - 0.75), -0.1 * ((1 - LOG_2) * 5 - 0.75))),
    (
        "focalpo",
        {"beta": 0.1, "gamma": 1.0},
        (-0.1 * 0.25 * (1 - LOG_2), 0.1 * 0.25 * (1 - LOG_2)),
    ),
    ("f_dpo", {"beta": 0.1, "divergence": "forward_kl"}, (-0.05, 0.05)),
    ("f_dpo", {"beta": 0.1, "divergence": "js"}, (-0.025, 0.025)),
    ("f_dpo", {"beta": 0.1, "divergence": "alpha", "alpha": 0.7}, (-0.05, 0.05)),
    ("dpop", {"beta": 0.1}, (-0.05, 0.05)),
    ("nca_pair", {"beta": 0.1}, (-0.025, 0.025)),
    ("bco_pair", {"beta": 0.1}, (-0.05, 0.05)),
    ("bco", {"beta": 0.1}, (-0.05, 0.05)),
    ("kto", {"beta": 0.1}, (-0.025, 0.025)),
    ("apo_zero", {"beta": 0.1}, (-0.025, 0.025)),
    ("apo_down", {"beta": 0.1}, (0.0, 0.025)),
    ("sppo_hard", {"beta": 0.1}, (-5.0, 5.0)),
    ("minor_dpo", {"beta": 0.1}, (-0.05, 0.0)),
    ("flex_dpo", {"beta_chosen": 0.1, "beta_rejected": 0.04}, (-0.05, 0.02)),
]


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name, options, expected", STEP_ZERO)
def test_the_first_push(library: Library, name: str, options: Options, expected: tuple[float, float]) -> None:
    """Finds: a log-sigmoid whose slope dies at exactly 0, a kink there (dpop, minor_dpo) that sides with a library."""
    xs = [at_reference(x) for x in random_examples(4, seed=7)]
    found, mask = slopes(library, name, options, xs)
    for k in (0, 1):
        np.testing.assert_allclose(found[:, k], expected[k] * mask[:, k], rtol=1e-5, atol=1e-9)


# --- kinks and far out -------------------------------------------------------------------------


KINKS = [
    # log-ratios just at, just below and beyond the kink; slopes by the chosen and by the rejected response
    ("hinge", {"beta": 0.5}, [(2.0, 0.0), (1.9375, 0.0), (3.0, 0.0)], [(0, 0), (-0.5, 0.5), (0, 0)]),
    (
        "slic",
        {"beta": 0.5, "sft_weight": 0.0},
        [(2.0, 0.0), (1.9375, 0.0), (3.0, 0.0)],
        [(0, 0), (-0.5, 0.5), (0, 0)],
    ),
    (
        "simpo",
        {"beta": 0.5, "gamma": 0.0, "loss_type": "hinge"},
        [(2.0, 0.0), (1.9375, 0.0), (3.0, 0.0)],
        [(0, 0), (-0.5, 0.5), (0, 0)],
    ),
    ("dpop", {"beta": 1.0, "penalty": 3.0}, [(0.0, 0.0), (1.0, 1.0)], [(-0.5, 0.5), (-0.5, 0.5)]),
    ("minor_dpo", {"beta": 1.0}, [(0.0, 0.0), (0.0, -1.0), (1.0, 1.0)], [(-0.5, 0), (-0.5, 0), (-0.5, 0.5)]),
]


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name, options, ratios, expected", KINKS)
def test_kinks_have_slope_zero(
    library: Library, name: str, options: Options, ratios: Sequence[Any], expected: Sequence[Any]
) -> None:
    """Finds: a kink that sides with the library: PyTorch's clamp and MLX's maximum(0, x) push there."""
    xs = [Example([[a_w - 8], [a_l - 8]], [[-8.0], [-8.0]]) for a_w, a_l in ratios]
    found, _ = slopes(library, name, options, xs)
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-6)


FAR = [
    Example([[-5000.0], [-1.0]], [[-1.0], [-1.0]], (9, 2)),
    Example([[-1.0], [-5000.0]], [[-1.0], [-1.0]], (9, 2)),
    Example([[-1.0], [-1.0]], [[-5000.0], [-5000.0]], (9, 9)),
]


def far(x: Example) -> Example:
    (full,) = random_examples(1, seed=8)
    ones = {key: [[1.0]] * 2 for key in TOKEN_COLUMNS} | {"overlap": [[-1.0]] * 2, "groups": 0}
    texts = {name: [[-5000.0]] * len(rows) for name, rows in full.texts.items()}
    behind = {name: [[-1.0]] * len(rows) for name, rows in full.texts.items()}
    return replace(x, extras={**full.extras, **ones}, texts=texts, texts_reference=behind)


@pytest.mark.parametrize("library", FLOAT32)
@pytest.mark.parametrize("name", TABLE)
def test_thousands_of_nats_stay_finite(library: Library, name: str) -> None:
    """Finds: e to the power of a sum, log(sigmoid(z)) where sigmoid has become 0, NaN from a branch not taken."""
    xs = [far(x) for x in FAR]
    options_of = {"f_dpo": [{"divergence": d} for d in ("reverse_kl", "forward_kl", "js", "alpha")]}
    for options in options_of.get(name, [{}]):
        assert np.isfinite(losses(library, name, options, xs)).all()
        assert np.isfinite(gradients(library, name, options, xs, ["policy"])[0]).all()


def test_far_out_margins_keep_their_size() -> None:
    far_apart = [pair(-4999.0, 0.0), pair(0.0, -4999.0)]
    np.testing.assert_allclose(losses(NUMPY, "dpo", {"beta": 1.0}, far_apart), [4999.0, 0.0], atol=1e-12)


# --- one formula as the limit of another -------------------------------------------------------


def unchanged(x: Example) -> Example:
    return x


def equal_lengths(x: Example) -> Example:
    def cut(rows: Sequence[Sequence[float]], offset: float) -> list[list[float]]:
        return [[offset * (k + 1), *[-0.5 - 0.1 * k] * 4] for k, _ in enumerate(rows)]

    scale = abs(x.policy[0][0]) + 0.2
    return replace(x, policy=cut(x.policy, -scale), reference=cut(x.reference, -1.7 * scale))


def no_reference(x: Example) -> Example:
    """A reference that finds everything equally likely."""
    return replace(x, reference=[[0.0] * len(tokens) for tokens in x.policy])


def chosen_risen(x: Example) -> Example:
    return replace(x, policy=[[t + 0.3 for t in x.reference[0]], x.policy[1]])


def rejected_risen(x: Example) -> Example:
    return replace(x, policy=[x.policy[0], [t + 0.3 for t in x.reference[1]]])


def one_instruction(x: Example) -> Example:
    def of(texts: Mapping[str, Any]) -> dict[str, Any]:
        return {**texts, "instructions": [texts["instructions"][0]] * 2}

    return replace(x, texts=of(x.texts), texts_reference=of(x.texts_reference))


def shared_beginning(x: Example) -> Example:
    """Both responses begin alike; they part at the third token."""
    own = [[-0.5, -1.5, *tokens] for tokens in x.policy]
    reference = [[-0.7, -1.1, *tokens] for tokens in x.reference]
    divergence = [[0.0, 0.0, *[1.0] * len(tokens)] for tokens in x.policy]
    return replace(x, policy=own, reference=reference, extras={"divergence": divergence, "confidence": 1.0})


def setting(**extras: Any) -> Change:
    return lambda x: with_columns(x, **extras)


def ones(name: str) -> Change:
    return lambda x: with_columns(x, **{name: [[1.0] * len(tokens) for tokens in x.policy]})


def scored(*scores: float) -> Change:
    return lambda x: replace(x, scores=scores)


LIMITS: list[tuple[str, tuple[str, Options], tuple[str, Options], Change, float]] = [
    ("A3 no flips", ("robust", {"label_smoothing": 0.0}), ("dpo", {}), unchanged, 1),
    ("A6 equal lengths", ("ln_dpo", {"beta": 2.0}), ("dpo", {"beta": 0.4}), equal_lengths, 1),
    ("A4 equal lengths", ("ipo_norm", {"beta": 1.0}), ("ipo", {"beta": 0.2}), equal_lengths, 1 / 25),
    ("A7 α = 0", ("r_dpo", {"alpha": 0.0}), ("dpo", {}), unchanged, 1),
    ("A7 equal lengths", ("r_dpo", {"alpha": 3.0}), ("dpo", {}), equal_lengths, 1),
    ("A8 α = 1", ("ld_dpo", {"alpha": 1.0}), ("dpo", {}), unchanged, 1),
    ("A8 equal lengths", ("ld_dpo", {"alpha": 0.2}), ("dpo", {}), equal_lengths, 1),
    ("A9 γ = 1", ("d2po", {"gamma": 1.0}), ("dpo", {}), unchanged, 1),
    ("A10 reverse KL", ("f_dpo", {"divergence": "reverse_kl"}), ("dpo", {}), unchanged, 1),
    ("A10 α = 1", ("f_dpo", {"divergence": "alpha", "alpha": 1.0}), ("dpo", {}), unchanged, 1),
    ("A10 α = 0", ("f_dpo", {"divergence": "alpha", "alpha": 0.0}), ("f_dpo", {}), unchanged, 1),
    ("A11 λ = 0", ("dpop", {"penalty": 0.0}), ("dpo", {}), unchanged, 1),
    ("A11 chosen risen", ("dpop", {}), ("dpo", {}), chosen_risen, 1),
    ("A12 η = 0", ("rpo", {"eta": 0.0}), ("dpo", {"beta": 0.01}), unchanged, 1),
    ("A18 P = 1 and 0", ("sppo", {"beta": 0.1}), ("sppo_hard", {"beta": 0.1}), setting(win_rates=[1.0, 0.0]), 1),
    ("A22 rejected risen", ("minor_dpo", {}), ("dpo", {}), rejected_risen, 1),
    ("A23 γ = 0", ("focalpo", {"gamma": 0.0}), ("dpo", {}), unchanged, 1),
    ("A24 β alike", ("flex_dpo", {"beta_chosen": 0.3, "beta_rejected": 0.3}), ("dpo", {"beta": 0.3}), unchanged, 1),
    ("B1 uniform reference", ("slic", {"beta": 0.2, "sft_weight": 0.0}), ("hinge", {"beta": 0.2}), no_reference, 1),
    ("B3 α = 0", ("alphapo", {"alpha": 0.0, "gamma": 1.0}), ("simpo", {"beta": 2.5, "gamma": 1.0}), unchanged, 1),
    ("B4 α = 0", ("cpo", {"alpha": 0.0}), ("dpo", {}), no_reference, 1),
    ("B4 per token", ("cpo", {"alpha": 0.0}), ("simpo", {"beta": 0.5, "gamma": 0.0}), equal_lengths, 1),
    ("B5 λ = 0", ("orpo", {"beta": 0.0}), ("sft", {}), unchanged, 1),
    ("B6 α = 0", ("triple_po", {"alpha": 0.0, "beta": 0.2}), ("cpo", {"alpha": 0.0, "beta": 0.2}), unchanged, 1),
    (
        "B6 per token",
        ("triple_po", {"alpha": 0.0, "beta": 2.0, "gamma": 0.7, "length_normalized": True}),
        ("simpo", {"gamma": 0.7}),
        unchanged,
        1,
    ),
    ("C2 sq", ("reward_aware", {"divergence": "sq", "beta": 0.1}), ("distilled_dpo", {}), unchanged, 1),
    ("C3 certain", ("soft_label_dpo", {"eta": 1e3}), ("dpo", {}), unchanged, 1),
    ("C3 m = 0", ("odpo", {"alpha": 0.0}), ("dpo", {}), unchanged, 1),
    ("C3 log 1", ("odpo", {"alpha": 2.0}), ("dpo", {}), scored(4.0, 3.0), 1),
    ("C4 w = 0", ("mm_dpo", {"w": 0.0}), ("dpo", {}), unchanged, 1),
    ("C4 δ = 0", ("mm_dpo", {"w": 0.9}), ("dpo", {}), scored(4.0, 4.0), 1),
    ("C4 δ → ∞", ("mm_dpo", {"w": 0.5}), ("dpo", {"beta": 0.15}), scored(400.0, 3.0), 1),
    ("C4 sign of δ", ("mm_dpo", {"w": 0.5}), ("mm_dpo", {"w": 0.5}), lambda x: replace(x, scores=x.scores[::-1]), 1),
    ("C5 pairs only", ("modpo", {"weights": (1.0, 0.0)}), ("dpo", {}), unchanged, 1),
    ("C6 sure", ("cream", {}), ("dpo", {}), setting(confidence=1.0), 1),
    ("C6 cDPO", ("cream", {}), ("dpo", {"label_smoothing": 0.2}), setting(confidence=0.8), 1),
    ("E1 γ = 0", ("rationale_dpo", {"gamma": 0.0}), ("dpo", {}), unchanged, 1),
    ("E1 γ = 0, ORPO", ("rationale_orpo", {"gamma": 0.0}), ("orpo", {}), unchanged, 1),
    ("E2 one instruction", ("dove", {}), ("dpo", {}), one_instruction, 1),
    ("E3 masks 1 and 0", ("experimental_mapo", {"mask": "ones", "kl_mask": "none"}), ("dpo", {}), unchanged, 1),
    ("E4 sure", ("mcts_dpo", {}), ("dpo", {}), shared_beginning, 1),
    (
        "E4 unsure",
        ("mcts_dpo", {}),
        ("dpo", {"label_smoothing": 0.3}),
        lambda x: with_columns(shared_beginning(x), confidence=0.7),
        1,
    ),
    ("F1 SELM, α = 0", ("selm", {"alpha": 0.0}), ("dpo", {"beta": 0.01}), unchanged, 1),
    ("F1 XPO, α = 0", ("xpo", {"alpha": 0.0}), ("dpo", {}), unchanged, 1),
    ("F1 VPO, α = 0", ("experimental_vpo", {"alpha": 0.0}), ("dpo", {}), unchanged, 1),
    (
        "F1 VPO online is SELM",
        ("experimental_vpo", {"alpha": 0.3, "mode": "online"}),
        ("selm", {"beta": 0.1, "alpha": 0.3}),
        unchanged,
        1,
    ),
    ("F2 τ = η", ("inpo", {"eta": 0.3, "tau": 0.3}), ("ipo", {"beta": 0.3}), unchanged, 1),
    ("D2 ListMLE of two", ("list_mle", {}), ("dpo", {}), unchanged, 1),
    ("D2 LiPO of two", ("lipo", {}), ("dpo", {}), unchanged, 1 / LOG_2 - 1 / math.log(3)),
    ("D3 InfoNCA of two", ("experimental_info_nca", {"alpha": 4.0}), ("soft_label_dpo", {"beta": 0.01, "eta": 0.25}),
     unchanged, 1),
    ("D3 NCA of two, α → 0", ("experimental_nca", {"alpha": 1e-3}), ("nca_pair", {}), scored(4.0, 3.0), 1),
    ("D4 weights 1", ("experimental_tree_tpo", {}), ("lipo", {}), ones("token_weights"), 1),
]  # fmt: skip


@pytest.mark.parametrize("one, other, change, factor", [pytest.param(*row, id=said) for said, *row in LIMITS])
def test_limits(one: tuple[str, Options], other: tuple[str, Options], change: Change, factor: float) -> None:
    """An option at its limit, or a special pair, makes one formula another."""
    xs = [change(x) for x in random_examples(12, seed=9)]
    np.testing.assert_allclose(losses(NUMPY, *one, xs), factor * losses(NUMPY, *other, xs), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "one, other",
    [
        (("f_dpo", {"divergence": "alpha", "alpha": 1 + 1e-6}), ("dpo", {})),
        (("alphapo", {"alpha": 1e-7, "gamma": 1.0}), ("simpo", {"beta": 2.5, "gamma": 1.0})),
        (("alphapo", {"alpha": -1e-7, "gamma": 1.0}), ("simpo", {"beta": 2.5, "gamma": 1.0})),
        (("focalpo", {"gamma": 1e-7}), ("dpo", {})),
    ],
)
@pytest.mark.parametrize("library", [*LIBRARIES, FLOAT32[1]])
def test_near_a_limit_no_digits_are_lost(
    library: Library, one: tuple[str, Options], other: tuple[str, Options]
) -> None:
    """Finds: (1 − e^(−αm))/α by a difference: at α = 1e-7 float32 has nothing left of it."""
    xs = random_examples(12, seed=9)
    np.testing.assert_allclose(losses(library, *one, xs), losses(library, *other, xs), rtol=3e-5, atol=1e-6)


LIKELIHOODS = [
    # a formula's own likelihood term is so much of ``sft``
    ("rpo", "eta", {}),
    ("cpo", "alpha", {}),
    ("slic", "sft_weight", {"per": "response"}),
    ("reward_aware", "sft_weight", {}),
]


@pytest.mark.parametrize("name, option, sft", LIKELIHOODS)
def test_likelihood_terms_are_those_of_a_mixture(name: str, option: str, sft: Options) -> None:
    """Finds: a mean for a sum, the rejected response's likelihood."""
    given = columns(NUMPY, random_examples(6, seed=10))
    mixture = resolve_objective([{"name": name, option: 0.0}, {"name": "sft", "weight": 0.3, **sft}])
    np.testing.assert_allclose(resolve_objective({"name": name, option: 0.3})(given), mixture(given), rtol=1e-12)


# --- exchanging the responses ------------------------------------------------------------------


SWAPS: list[tuple[str, Options, float | None]] = [
    # L(−z) − L(z) = factor · z
    ("dpo", {"beta": 0.05}, 1.0),
    ("dpo", {"beta": 1.0}, 1.0),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}, 0.6),
    ("robust", {"beta": 0.3, "label_smoothing": 0.1}, 1 / 0.8),
    # Labels are not needed where the scores go along.
    ("distilled_dpo", {"beta": 0.3}, 0.0),
    ("reward_aware", {"beta": 0.3, "divergence": "sq"}, 0.0),
    ("reward_aware", {"beta": 0.3, "divergence": "bwd_kl"}, 0.0),
    ("reward_aware", {"beta": 0.3, "divergence": "fwd_kl"}, 0.0),
    ("soft_label_dpo", {"beta": 0.3}, 0.0),
]


@pytest.mark.parametrize("name, options, factor", SWAPS)
def test_exchanging_the_responses(name: str, options: Options, factor: float) -> None:
    xs = random_examples(8, seed=8)
    own, other = (losses(NUMPY, name, options, some) for some in (xs, [swapped(x) for x in xs]))
    z = np.array([z_of(x, options["beta"]) for x in xs])
    np.testing.assert_allclose(other - own, factor * z, rtol=1e-9, atol=1e-10)


def test_a_model_blind_to_the_goal_pays_for_both_halves() -> None:
    """Finds: halves of a scored pair that do not pull it back: at least 2 log 2, slope tanh(z/2)."""
    for z, total in ((0.0, 1.386294), (0.5, 1.448154), (-0.5, 1.448154)):
        x = pair(z / 0.1, 0.0)
        assert value("dpo", x) + value("dpo", swapped(x)) == pytest.approx(total, abs=1e-6)
        pulled = by_difference("dpo", x)[0] + by_difference("dpo", swapped(x))[1]
        assert pulled == pytest.approx(0.1 * math.tanh(z / 2), abs=1e-9)


def test_label_smoothing_is_the_mean_over_flips_and_robust_undoes_it() -> None:
    """E over flips of robust = clean dpo; of dpo = smoothed dpo."""
    xs, e = random_examples(8, seed=9), 0.2
    flipped_xs = [swapped(x) for x in xs]
    clean, smooth = losses(NUMPY, "dpo", {}, xs), losses(NUMPY, "dpo", {"label_smoothing": e}, xs)
    np.testing.assert_allclose((1 - e) * clean + e * losses(NUMPY, "dpo", {}, flipped_xs), smooth, rtol=1e-12)
    own, other = (losses(NUMPY, "robust", {"label_smoothing": e}, some) for some in (xs, flipped_xs))
    np.testing.assert_allclose((1 - e) * own + e * other, clean, rtol=1e-12)


# --- optima ------------------------------------------------------------------------------------


OPTIMA: list[tuple[str, Options, Example, float]] = [
    # an example at the optimum, and the loss there
    ("dpo", {"beta": 0.01, "label_smoothing": 0.3}, pair(50, 50 - 84.7297860), 0.610864),
    ("ipo", {"beta": 0.1}, pair(3, -2), 0.0),
    ("ipo_norm", {"beta": 2.0}, Example([[-1.0, -1.0], [-3.0]], [[-1.25, -1.25], [-3.0]]), 0.0),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, pair(69.0675478, 0), 0.0),
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.2}, pair(0, -2 * math.log(4)), 0.0),
    ("sppo_hard", {"beta": 0.1}, pair(5, -5), 0.0),
    ("sppo", {"beta": 0.1}, with_columns(pair(3, -1), win_rates=[0.8, 0.4]), 0.0),
    ("distilled_dpo", {"beta": 0.1}, pair(20, -5), 0.0),
    ("distilled_dpo", {"beta": 0.1, "eta": 0.2}, pair(2, -3), 0.0),
    ("reward_aware", {"beta": 0.1, "divergence": "sq"}, pair(20, -5), 0.0),
    ("reward_aware", {"beta": 0.1, "divergence": "bwd_kl", "eta": 0.2}, pair(2, -3), 0.0),
    ("reward_aware", {"beta": 0.1, "divergence": "fwd_kl", "eta": 0.2}, pair(2, -3), 0.0),
    ("soft_label_dpo", {"beta": 0.1, "eta": 0.2}, pair(2, -3), entropy(sigma(0.5))),
    ("soft_label_dpo", {"beta": 0.1}, pair(3, 3, (5, 5)), LOG_2),
    ("mcts_dpo", {}, with_columns(pair(4, 4), divergence=[[1.0]] * 2, confidence=0.1), LOG_2),
    ("inpo", {"eta": 0.1, "tau": 0.05}, with_columns(pair(2, -1), previous=[-104.0, -100.0]), 0.0),
]


@pytest.mark.parametrize("name, options, x, least", OPTIMA)
def test_optima(name: str, options: Options, x: Example, least: float) -> None:
    """No slope there, the value that is known, and more on either side."""
    assert value(name, x, **options) == pytest.approx(least, abs=6e-7)
    np.testing.assert_allclose(by_difference(name, x, **options), 0, atol=1e-6)
    for by in (0.5, -0.5):
        aside = replace(x, policy=[[x.policy[0][0] + by, *x.policy[0][1:]], x.policy[1]])
        assert value(name, aside, **options) > least + 1e-6


def test_nca_holds_the_chosen_reward_at_log_two() -> None:
    """The rejected one falls without end."""
    x = pair(LOG_2 / 0.1, -3)
    by_chosen, by_rejected = by_difference("nca_pair", x, beta=0.1)
    assert abs(by_chosen) < 1e-9 and by_rejected > 0
    assert by_difference("nca_pair", pair(LOG_2 / 0.1 + 1, -3), beta=0.1)[0] > 1e-3
    assert by_difference("nca_pair", pair(LOG_2 / 0.1 - 1, -3), beta=0.1)[0] < -1e-3


# --- slopes as derived -------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-3.0, -0.4, 0.0, 0.7, 5.0])
def test_slopes_in_z(z: float) -> None:
    """dL/dz of formulas of the margin alone; equal and opposite on the two responses."""
    beta, p = 0.1, sigma(z)
    q, e, gamma = sigma(0.5 * 2.5), 0.2, 0.5
    expected: list[tuple[str, Options, float]] = [
        ("dpo", {}, -(1 - p)),
        ("dpo", {"label_smoothing": e}, -(1 - p) + e),
        ("robust", {"label_smoothing": e}, -((1 - e) * (1 - p) + e * p) / (1 - 2 * e)),
        ("exo_pair", {"label_smoothing": e}, p * (1 - p) * (z - math.log((1 - e) / e))),
        ("focalpo", {"gamma": gamma}, -(p**gamma) * (1 - p) * (1 + gamma * math.log(p))),
        ("reward_aware", {"divergence": "bwd_kl", "eta": 0.5}, p - q),
        ("soft_label_dpo", {"eta": 0.5}, p - q),
        ("reward_aware", {"divergence": "fwd_kl", "eta": 0.5}, p * (1 - p) * (z - 1.25)),
        ("distilled_dpo", {"eta": 0.5}, 2 * (z - 1.25)),
        ("odpo", {"offset": "linear", "alpha": 0.5}, -sigma(1.25 - z)),
        ("odpo", {"alpha": 0.5}, -sigma(0.5 * math.log(2.5) - z)),
        ("cream", {}, -0.7 * (1 - p) + 0.3 * p),
        ("modpo", {"weights": (0.5, 0.5)}, -2 * sigma(2 - 2 * z)),
    ]
    x = with_columns(pair(z / beta, 0.0), confidence=0.7, margin_rewards=[3.0, 1.0])
    for name, options, slope in expected:
        found = by_difference(name, x, beta=beta, **options)
        np.testing.assert_allclose(found, (beta * slope, -beta * slope), rtol=1e-6, atol=1e-10, err_msg=name)


def test_robust_never_stops_pushing_and_is_unbounded_below() -> None:
    x = pair(400, 0)
    assert by_difference("robust", x, label_smoothing=0.2)[0] / 0.1 == pytest.approx(-0.2 / 0.6, rel=1e-6)
    assert value("robust", x) < -4


def test_exo_gives_up_hopeless_pairs() -> None:
    """Unlike DPO, whose push is largest there."""
    hopeless = pair(-400, 0)
    assert abs(by_difference("exo_pair", hopeless)[0]) < 1e-9
    assert by_difference("dpo", hopeless)[0] == pytest.approx(-0.1, rel=1e-6)


def test_focalpo_trains_backwards_below_its_threshold() -> None:
    """p < e^(−1/γ); γ from 1/log 2 on, where that holds at the start, is refused."""
    for gamma in (0.5, 1.0, 1.4):
        threshold = 10 * math.log(math.exp(-1 / gamma) / (1 - math.exp(-1 / gamma)))
        assert by_difference("focalpo", pair(threshold + 0.5, 0), gamma=gamma)[0] < 0
        assert by_difference("focalpo", pair(threshold - 0.5, 0), gamma=gamma)[0] > 0
        assert by_difference("focalpo", pair(0, 0), gamma=gamma)[0] < 0
    with pytest.raises(ObjectiveError, match="gamma"):
        resolve_objective({"name": "focalpo", "gamma": 1.4427})


def test_dpo_pushes_a_rejected_response_harder_once_it_is_the_rarer_one() -> None:
    """|∂L/∂π_l| / |∂L/∂π_w| = π_w/π_l, in probabilities."""
    for x in (A, B):
        by_chosen, by_rejected = by_difference("dpo", x)
        l_w, l_l = (math.fsum(tokens) for tokens in x.policy)
        ratio = abs(by_rejected * math.exp(-l_l)) / abs(by_chosen * math.exp(-l_w))
        assert ratio == pytest.approx(math.exp(l_w - l_l), rel=1e-6)


SHAPES = {
    "reverse_kl": lambda a, _: 1.0,
    "forward_kl": lambda a, _: math.exp(-a),
    "js": lambda a, _: sigma(-a),
    "alpha": lambda a, alpha: math.exp((alpha - 1) * a),
}


@pytest.mark.parametrize("divergence", SHAPES)
def test_f_dpo_pushes_each_response_by_its_own_slope(divergence: str) -> None:
    """−β(1−p)·h′(a_w) and +β(1−p)·h′(a_l): no longer opposite."""
    options = {"divergence": divergence} | ({"alpha": 0.3} if divergence == "alpha" else {})
    for a_w, a_l in ((1.5, -0.5), (-0.8, 0.4), (2.0, 2.0)):
        p = math.exp(-value("f_dpo", pair(a_w, a_l), **options))
        expected = [s * 0.1 * (1 - p) * SHAPES[divergence](a, 0.3) for s, a in ((-1, a_w), (1, a_l))]
        np.testing.assert_allclose(by_difference("f_dpo", pair(a_w, a_l), **options), expected, rtol=1e-6)


def test_flex_dpo_has_a_strength_for_each_response() -> None:
    x = pair(1.0, 3.0)
    p = sigma(0.1 * 1 - 0.2 * 3)
    expected = (-0.1 * (1 - p), 0.2 * (1 - p))
    np.testing.assert_allclose(by_difference("flex_dpo", x, beta_chosen=0.1, beta_rejected=0.2), expected, rtol=1e-6)


def test_dpop_charges_a_fallen_chosen_response_inside_the_sigmoid() -> None:
    """One nat lost costs 5 units at β = 0.1 and λ = 50."""
    assert value("dpop", pair(-1, -1)) == pytest.approx(softplus(5.0))
    assert by_difference("dpop", pair(-1, -1))[0] == pytest.approx(-0.1 * 51 * sigma(5.0), rel=1e-6)


def test_minor_dpo_leaves_a_fallen_rejected_response_alone() -> None:
    by_chosen, by_rejected = by_difference("minor_dpo", pair(1, -2))
    assert by_rejected == 0 and by_chosen == pytest.approx(-0.1 * (1 - sigma(0.1)), rel=1e-6)


def test_apo_is_bounded_and_saturates() -> None:
    for name, worst in (("apo_zero", pair(-9e3, 9e3)), ("apo_down", pair(0, 9e3))):
        for x in random_examples(12, seed=12):
            assert 0 < value(name, x, beta=2.0) < 2
        assert value(name, worst) <= 2
        np.testing.assert_allclose(by_difference(name, pair(-9e3, 9e3)), 0, atol=1e-12)


def test_apo_down_lowers_both_and_apo_zero_raises_the_chosen() -> None:
    """Well above the reference and apart."""
    x = pair(5.0, -20.0)
    by_chosen, by_rejected = by_difference("apo_down", x)
    assert by_chosen > 0 and by_rejected > 0
    by_chosen, by_rejected = by_difference("apo_zero", x)
    assert by_chosen < 0 < by_rejected


def test_discopop_is_not_monotone_near_zero() -> None:
    assert value("discopop", pair(-2, 0)) == pytest.approx(0.7874, abs=5e-5)
    assert value("discopop", pair(0, 0)) == pytest.approx(0.846574, abs=5e-7)
    assert value("discopop", pair(2, 0)) == pytest.approx(0.8738, abs=5e-5)


# --- length ------------------------------------------------------------------------------------


def test_r_dpo_pushes_a_longer_chosen_response_less() -> None:
    long, short = (Example([even(-4, n), even(-4, 3)], [even(-4, n), even(-4, 3)]) for n in (9, 1))
    assert value("r_dpo", long, alpha=0.1) < value("dpo", long) < value("r_dpo", short, alpha=0.1)
    assert abs(by_difference("r_dpo", long, alpha=0.1)[0]) < 0.05 < abs(by_difference("r_dpo", short, alpha=0.1)[0])


def test_r_dpo_is_modpo_with_length_as_a_cost() -> None:
    xs = [with_columns(x, margin_rewards=[-float(n(x, 0)), -float(n(x, 1))]) for x in random_examples(6, seed=13)]
    np.testing.assert_allclose(
        losses(NUMPY, "modpo", {"beta": 0.1, "weights": (0.8, 0.2)}, xs),
        losses(NUMPY, "r_dpo", {"beta": 0.125, "alpha": 0.25}, xs),
        rtol=1e-12,
    )


def test_ld_dpo_without_the_tail_sees_the_common_length_only() -> None:
    xs = [replace(x, policy=[[*x.policy[0], -1.0, -3.0], x.policy[1]], reference=[[*x.reference[0], -2.0, -1.0],
          x.reference[1]]) for x in random_examples(6, seed=14)]  # fmt: skip
    shared = [min(n(x, 0), n(x, 1)) for x in xs]
    cut = [
        replace(x, policy=[t[:m] for t in x.policy], reference=[t[:m] for t in x.reference])
        for x, m in zip(xs, shared, strict=True)
    ]
    np.testing.assert_allclose(losses(NUMPY, "ld_dpo", {"alpha": 0.0}, xs), losses(NUMPY, "dpo", {}, cut), rtol=1e-12)


def test_d2po_weighs_the_first_token_by_gamma() -> None:
    """Σ γ^t of 24 and 30 tokens: 18.826764 and 22.271268 at γ = 0.98."""
    x = Example([[-1.0] * 24, [-1.0] * 30], [[-2.0] * 24, [-1.5] * 30])
    assert value("d2po", x) == pytest.approx(softplus(-0.1 * (18.826764 - 0.5 * 22.271268)), abs=1e-7)


def test_simpo_sees_means_only_and_gamma_is_absolute() -> None:
    xs = random_examples(5, seed=11)
    doubled = [replace(x, policy=[[*t, *t] for t in x.policy]) for x in xs]
    for name in ("simpo", "alphapo", "orpo"):
        np.testing.assert_allclose(losses(NUMPY, name, {}, doubled), losses(NUMPY, name, {}, xs), rtol=1e-12)
    tie = Example([[-1.0], [-1.0, -1.0]], [[0.0], [0.0, 0.0]])
    for name in ("simpo", "alphapo"):
        for beta in (2.0, 10.0):  # at equal means γ alone is left, whatever β
            assert value(name, tie, beta=beta, gamma=1.0) == pytest.approx(math.log1p(math.e))


def test_simpo_pushes_each_token_by_one_over_the_length() -> None:
    x = Example([[-1.0, -2.0], [-1.5, -0.5, -0.7, -0.2]], [[0.0] * 2, [0.0] * 4])
    p = sigma(2 * (-1.5 + 0.725) - 0.5)
    np.testing.assert_allclose(by_difference("simpo", x), (-2 * (1 - p) / 2, 2 * (1 - p) / 4), rtol=1e-6)


# --- without a reference -----------------------------------------------------------------------


def test_alphapo_at_one_and_minus_one() -> None:
    """β(1 − 1/p̄) and β(p̄ − 1), p̄ = e^m; dr/dm = β e^(−αm)."""
    x = Example([[-0.5, -1.5], [-2.0]], [[0.0] * 2, [0.0]])
    p_w, p_l = math.exp(-1), math.exp(-2)
    assert value("alphapo", x, alpha=1.0, beta=0.5) == pytest.approx(softplus(0.5 * (1 / p_w - 1 / p_l) + 0.25))
    assert value("alphapo", x, alpha=-1.0, beta=0.5) == pytest.approx(softplus(-0.5 * (p_w - p_l) + 0.25))
    short = 1 - math.exp(-value("alphapo", x, alpha=0.7, beta=0.5))
    expected = (-0.5 * math.exp(0.7 * 1) * short / 2, 0.5 * math.exp(0.7 * 2) * short)
    np.testing.assert_allclose(by_difference("alphapo", x, alpha=0.7, beta=0.5), expected, rtol=1e-6)


@pytest.mark.parametrize("library", [*LIBRARIES, FLOAT32[1]])
def test_orpo_odds_near_certainty_and_far_from_it(library: Library) -> None:
    """Finds: log(1 − e^m) by a difference, which loses all digits near m = 0, and infinity at 0 itself."""
    for m_w, m_l in ((-1e-4, -2e-4), (-0.7, -0.68), (-30.0, -40.0), (-400.0, -1.0)):
        odds = [m - math.log(-math.expm1(m)) for m in (m_w, m_l)]
        expected = -m_w + 0.1 * softplus(odds[1] - odds[0])
        (got,) = losses(library, "orpo", {}, [Example([[m_w], [m_l]], [[0.0], [0.0]])])
        assert got == pytest.approx(expected, rel=2e-6)
    certain = Example([[0.0], [0.0]], [[0.0], [0.0]])
    assert losses(library, "orpo", {}, [certain])[0] == pytest.approx(0.1 * LOG_2, rel=1e-6)
    if library is not NUMPY:  # the clamp has slope 0: what is left is the likelihood
        np.testing.assert_allclose(slopes(library, "orpo", {}, [certain])[0][..., 0], [[-1, 0]], atol=1e-6)


def test_triple_po_adds_the_gold_response_per_token() -> None:
    x = replace(pair(1, -1), texts={"gold": [[-1.0, -3.0]]})
    doubled = replace(x, texts={"gold": [[-1.0, -3.0, -1.0, -3.0]]})
    assert value("triple_po", x, alpha=0.7) - value("triple_po", x, alpha=0.0) == pytest.approx(1.4)
    assert value("triple_po", doubled) == pytest.approx(value("triple_po", x))


def test_poft_trusts_responses_that_aligned_models_find_likelier() -> None:
    """−β(1−p)/n on each token; log 2 where policy and aligned models agree; nothing on the other responses."""
    agree = with_columns(Example([[-1.0, -2.0], [-3.0]], [[0.0] * 2, [0.0]]), aligned_logps=[-1.5, -9.0])
    assert value("poft", agree) == pytest.approx(LOG_2)
    for aligned in (-1.0, -1.5, -2.5):
        x = with_columns(agree, aligned_logps=[aligned, -9.0])
        p = sigma(2.0 * (-1.5 - aligned) + 0.4)
        expected = (-2.0 * (1 - p) / 2, 0.0)
        np.testing.assert_allclose(by_difference("poft", x, beta=2.0, gamma=0.4), expected, rtol=1e-6, atol=1e-12)


# --- with scores -------------------------------------------------------------------------------


def test_reward_aware_bwd_kl_is_soft_labels_less_their_entropy() -> None:
    xs = random_examples(6, seed=15)
    less = [entropy(sigma(0.3 * gap(x))) for x in xs]
    options = {"beta": 0.2, "eta": 0.3}
    np.testing.assert_allclose(
        losses(NUMPY, "reward_aware", options, xs), losses(NUMPY, "soft_label_dpo", options, xs) - less, atol=1e-12
    )


def test_scores_count_by_their_differences() -> None:
    """Finds: a score taken for a gap. Moving both by a constant changes nothing."""
    for name in ("distilled_dpo", "reward_aware", "soft_label_dpo", "odpo", "mm_dpo", "lipo", "pro"):
        xs = random_examples(6, k=4 if TABLE[name].lists else 2, seed=16)
        moved = [replace(x, scores=[s + 3 for s in x.scores]) for x in xs]
        np.testing.assert_allclose(losses(NUMPY, name, {}, moved), losses(NUMPY, name, {}, xs), rtol=1e-9)


def test_odpo_asks_for_more_the_better_the_response() -> None:
    gaps = (0.0, 0.5, 1.0, 4.0)
    for offset in ("log", "linear"):
        found = [value("odpo", pair(1, -1, (2 + g, 2)), offset=offset) for g in gaps]
        assert found == sorted(found)
    floor = value("odpo", pair(1, -1, (2, 2)))
    assert floor == pytest.approx(softplus(-0.2 + math.log(1e-3)))


def test_modpo_refuses_weights_that_are_no_shares() -> None:
    for weights in ((0.0, 1.0), (0.5, 0.6), (1.5, -0.5)):
        with pytest.raises(ObjectiveError, match="weights"):
            resolve_objective({"name": "modpo", "weights": weights})
    given = columns(NUMPY, random_examples(2))
    with pytest.raises(ValueError, match="weights"):
        resolve_objective({"name": "modpo", "weights": (0.5, 0.3, 0.2)})(given)


def test_modpo_weighs_several_rewards_in_their_order() -> None:
    x = with_columns(pair(2, -1), margin_rewards=[[3.0, 1.0], [1.0, 5.0]])
    expected = softplus(-(0.3 - 0.3 * 2 + 0.2 * 4) / 0.5)
    assert value("modpo", x, weights=(0.5, 0.3, 0.2)) == pytest.approx(expected)


def test_cream_without_confidence_believes_the_contrary() -> None:
    x = with_columns(pair(2, -1), confidence=0.0)
    assert value("cream", x) == pytest.approx(value("dpo", swapped(x)))


# --- lists -------------------------------------------------------------------------------------


def test_pro_of_equal_scores_is_a_constant() -> None:
    """log(K − k + 1) in each term, without gradient."""
    x = Example([[-1.0], [-1.2], [-1.5]], [[0.0]] * 3, (4, 4, 4))
    assert value("pro", x, sft=0.0) == pytest.approx(math.log(3) + math.log(2))
    np.testing.assert_allclose(by_difference("pro", x, sft=0.0), 0, atol=1e-10)


def test_pro_likelihood_counts_as_often_as_there_are_pairs_of_slots() -> None:
    for k in (2, 3, 5):
        (x,) = random_examples(1, k=k, seed=17)
        more = value("pro", x, sft=0.3) - value("pro", x, sft=0.0)
        assert more == pytest.approx(-0.3 * (k - 1) ** 2 * mean(x.policy[0]))


def test_lipo_maps_scores_to_the_unit_interval() -> None:
    """Finds: 2 to the power of a raw score. Stretching all scores changes nothing, equal scores teach nothing."""
    xs = random_examples(6, k=4, seed=18)
    stretched = [replace(x, scores=[10 * s + 7 for s in x.scores]) for x in xs]
    np.testing.assert_allclose(losses(NUMPY, "lipo", {}, stretched), losses(NUMPY, "lipo", {}, xs), rtol=1e-9)
    tied = responses((1, 0.5, 0), (4, 4, 4))
    assert value("lipo", tied) == 0 and by_difference("lipo", tied) == (0, 0)


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_lipo_of_equal_scores_and_rewards_has_no_slope(library: Library) -> None:
    """Finds: NaN from 0/0 in the stretching of scores."""
    found, _ = slopes(library, "lipo", {}, [responses((0, 0, 0), (4, 4, 4))])
    np.testing.assert_array_equal(found, 0)


def test_list_losses_follow_the_responses_wherever_they_stand() -> None:
    """Slots beyond the first carry no meaning of their own but where scores tie."""
    xs = random_examples(6, k=4, seed=19)
    order = [2, 0, 3, 1]

    def ordered(rows: Sequence[Any]) -> list[Any]:
        return [rows[i] for i in order]

    moved = [replace(x, policy=ordered(x.policy), reference=ordered(x.reference), scores=ordered(x.scores)) for x in xs]
    for name in ("lipo", "experimental_info_nca", "experimental_nca"):
        np.testing.assert_allclose(losses(NUMPY, name, {}, moved), losses(NUMPY, name, {}, xs), rtol=1e-9)
    assert np.abs(losses(NUMPY, "list_mle", {}, moved) - losses(NUMPY, "list_mle", {}, xs)).min() > 1e-3


def test_tree_tpo_weighs_the_tokens_of_the_log_ratio() -> None:
    xs = [with_columns(x, token_weights=[[2.0] * len(t) for t in x.policy]) for x in random_examples(4, k=3, seed=20)]
    np.testing.assert_allclose(
        losses(NUMPY, "experimental_tree_tpo", {"beta": 0.1}, xs), losses(NUMPY, "lipo", {"beta": 0.2}, xs), rtol=1e-12
    )


# --- further texts -----------------------------------------------------------------------------


TEXT_SIGNS = [
    # ∂L/∂ each token of the text
    ("rationale_dpo", {"gamma": 0.1}, "rationale", -0.1 * sigma(0.4)),
    ("rationale_orpo", {"gamma": 0.1}, "rationale", -0.05),
    ("triple_po", {"alpha": 0.1}, "gold", -0.05),
    ("selm", {"alpha": 0.1, "beta": 0.3}, "third", 0.03),
    ("xpo", {"alpha": 0.1, "beta": 0.3}, "third", 0.1),
    ("experimental_vpo", {"alpha": 0.1, "beta": 0.3}, "third", -0.03),
    ("experimental_vpo", {"alpha": 0.1, "beta": 0.3, "mode": "online"}, "third", 0.03),
    ("kto", {}, "mismatched", 0.0),
]


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name, options, text, expected", TEXT_SIGNS)
def test_which_way_a_further_text_is_pushed(
    library: Library, name: str, options: Options, text: str, expected: float
) -> None:
    """Finds: optimism taken for pessimism, a mean for a sum, KTO's constant that is differentiated."""
    x = replace(pair(1, -1), texts={text: [[-1.0, -3.0]]}, texts_reference={text: [[-2.0, -4.0]]})
    x = with_columns(x, confidence=1.0)
    found, _ = slopes(library, name, options, [x])
    np.testing.assert_allclose(found[0, 2], expected, rtol=1e-5, atol=1e-9)


def test_dove_takes_instruction_and_response_as_one_text() -> None:
    """Two instructions in front of their responses: DPO on the whole."""
    xs = random_examples(5, seed=21)
    joined = [
        replace(
            x,
            policy=[[*i, *r] for i, r in zip(x.texts["instructions"], x.policy, strict=True)],
            reference=[[*i, *r] for i, r in zip(x.texts_reference["instructions"], x.reference, strict=True)],
        )
        for x in xs
    ]
    np.testing.assert_allclose(losses(NUMPY, "dove", {}, xs), losses(NUMPY, "dpo", {}, joined), rtol=1e-12)


def test_mapo_with_masks_of_ones_takes_the_token_kl_off_the_margin() -> None:
    """TDPO's family: KL(ref‖π) of the rejected response asks for more, that of the chosen for less."""
    x = with_columns(pair(2, -1), token_kl=[[0.5], [2.0]])
    assert value("experimental_mapo", x, mask="ones", kl_mask="ones") == pytest.approx(softplus(-0.1 * (3 + 0.5 - 2)))


def test_mapo_leaves_out_what_the_reference_expects() -> None:
    """The token that the reference finds likeliest has mask 0; constant surprisal masks nothing."""
    x = with_columns(Example([[-1.0, -2.0], [-3.0]], [[-0.1, -4.0], [-2.0]]), token_kl=[[9.0, 0.0], [0.0]])
    assert value("experimental_mapo", x) == pytest.approx(softplus(-0.1 * (2 - -1)))


def test_mcts_dpo_does_not_count_what_comes_before_the_divergence() -> None:
    """Finds: a mask of all tokens. A shared beginning cancels unless policies differ on it, as dropout makes them."""
    x = shared_beginning(random_examples(1, seed=22)[0])
    noisy = replace(x, policy=[[-9.0, -9.0, *x.policy[0][2:]], x.policy[1]])
    assert value("mcts_dpo", noisy) == pytest.approx(value("mcts_dpo", x))
    assert value("dpo", noisy) != pytest.approx(value("dpo", x))


def test_mcts_dpo_never_believes_the_contrary() -> None:
    """ε = min(1 − confidence, ½)."""
    x = shared_beginning(random_examples(1, seed=22)[0])
    even_odds = [value("mcts_dpo", with_columns(x, confidence=c)) for c in (0.5, 0.3, 0.0)]
    assert even_odds == pytest.approx([even_odds[0]] * 3)
    assert even_odds[0] == pytest.approx((value("dpo", x) + value("dpo", swapped(x))) / 2)


def test_inpo_mixes_reference_and_previous_iterate() -> None:
    """τ/η of one and 1 − τ/η of the other; without a reference at τ = 0."""
    x = with_columns(pair(3, -2), previous=[-101.0, -103.0])
    # Δ = 5 against the reference, 4 − 1 = 3 against the iterate before.
    for tau in (0.0, 0.1, 0.25):
        h = tau / 0.25 * 5 + (1 - tau / 0.25) * 3
        assert value("inpo", x, eta=0.25, tau=tau) == pytest.approx((h - 2) ** 2)


# --- options refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "exo_pair", "label_smoothing": 0.0},
        {"name": "exo_pair", "label_smoothing": 0.5},
        {"name": "simpo", "loss_type": "hinge", "label_smoothing": 0.1},
        {"name": "ld_dpo", "alpha": 1.1},
        {"name": "f_dpo", "divergence": "kl"},
        {"name": "odpo", "offset": "exp"},
        {"name": "selfie", "quantile": 1.5},
        {"name": "alpha_dpo", "decay": 1.5},
    ],
)
def test_options_without_meaning_are_refused(spec: Options) -> None:
    with pytest.raises(ObjectiveError):
        resolve_objective(dict(spec))
