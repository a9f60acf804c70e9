"""Every formula against the scalar oracle, published numbers and laws, in every array library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from libraries import DIFFERENTIABLE, LIBRARIES, MLX, NUMPY, TORCH, Library, host, logps, padded
from oracle import ORACLE, A, B, Example, random_examples, token_slopes

from mlxpref.objectives import TABLE, resolve_objective
from mlxpref.objectives.registry import Scope
from mlxpref.records import Logps

POINTS = [
    pytest.param(name, options, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}")
    for name, row in ORACLE.items()
    for options in ({}, *row.points)
]
GOLDEN = [
    pytest.param(name, golden, id=f"{name}-{i}")
    for name, row in ORACLE.items()
    for i, golden in enumerate(row.golden)
]
PAIRS = [name for name, entry in TABLE.items() if "reference" in entry.columns and not entry.lists]


def columns(library: Library, examples: Sequence[Example], pad: int = 0) -> dict[str, Any]:
    """Everything an objective may ask for, as a step would hand it over."""
    given = {
        "policy": logps(library, [x.policy for x in examples], pad),
        "reference": logps(library, [x.reference for x in examples], pad),
        "scores": library.array([list(x.scores) for x in examples]),
        "goal_distances": library.array([[(s - x.scores[0]) ** 2 for s in x.scores] for x in examples]),
    }
    return given | {name: library.array([x.extras[name] for x in examples]) for name in examples[0].extras}


def losses(
    library: Library, name: str, options: Mapping[str, Any], examples: Sequence[Example]
) -> np.ndarray:
    return host(resolve_objective({"name": name, **options})(columns(library, examples)))


def slopes(
    library: Library, name: str, options: Mapping[str, Any], examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """∂ Σ loss / ∂ policy token log-probs, (B, K, L), and the mask."""
    objective = resolve_objective({"name": name, **options})
    tokens, mask = padded([x.policy for x in examples])
    given = columns(library, examples)

    def total(tokens: Any) -> Any:
        return objective({**given, "policy": Logps(tokens, library.array(mask))}).sum()

    return library.gradients(total, tokens)[0], mask


def test_every_objective_has_a_row_in_the_oracle() -> None:
    assert set(TABLE) == set(ORACLE)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name, options", POINTS)
def test_values_are_those_of_the_oracle(library: Library, name: str, options: Mapping[str, Any]) -> None:
    """Finds: a misread formula, at defaults and at every option the oracle tries."""
    examples = random_examples(24, seed=1)
    expected = [ORACLE[name].loss(x, **options) for x in examples]
    # float32 log-ratios of ±20 nats carry 2e-6 of noise, which β up to 10 multiplies.
    noise = 0 if library is not MLX else 1e-4
    np.testing.assert_allclose(
        losses(library, name, options, examples), expected, rtol=1e-9 + noise, atol=noise
    )


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name, options", POINTS)
def test_gradients_are_those_of_the_oracle(library: Library, name: str, options: Mapping[str, Any]) -> None:
    """Finds: a detached term, a wrong slope of an ``ops`` function, a gradient on a pad column."""
    examples = random_examples(6, seed=2)
    got, mask = slopes(library, name, options, examples)
    expected, _ = padded([token_slopes(lambda x: ORACLE[name].loss(x, **options), x) for x in examples])
    scale = np.abs(expected).max()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6 * scale} if library is TORCH else {"rtol": 1e-4, "atol": 1e-5 * scale}
    )
    np.testing.assert_allclose(got, expected, **tolerance)
    assert not got[mask == 0].any()


@pytest.mark.parametrize("name, golden", GOLDEN)
def test_the_oracle_gives_the_published_values(name: str, golden: Any) -> None:
    """Finds: an oracle that shares the implementation's misreading."""
    for example, (value, by_chosen, by_rejected) in ((A, golden.a), (B, golden.b)):
        assert ORACLE[name].loss(example, **golden.options) == pytest.approx(value, abs=6e-7)
        got = token_slopes(lambda x: ORACLE[name].loss(x, **golden.options), example)
        np.testing.assert_allclose(got[0], by_chosen, atol=6e-7)
        np.testing.assert_allclose(got[1], by_rejected, atol=6e-7)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name, golden", GOLDEN)
def test_golden_values_and_gradients(library: Library, name: str, golden: Any) -> None:
    expected = np.array([golden.a, golden.b])
    atol = 6e-7 if library is not MLX else 6e-6
    got = losses(library, name, golden.options, [A, B])
    np.testing.assert_allclose(got, expected[:, 0], atol=atol, rtol=1e-6 if library is not MLX else 1e-5)
    if library is not NUMPY:
        tokens, _ = slopes(library, name, golden.options, [A, B])
        for k, n in ((0, 24), (1, 30)):  # every token of a response has the slope of its sum
            np.testing.assert_allclose(
                tokens[:, k, :n], np.tile(expected[:, [k + 1]], n), atol=atol, rtol=1e-5
            )


@pytest.mark.parametrize("name", TABLE)
def test_every_option_moves_the_loss(name: str) -> None:
    """Finds: a knob that is accepted and does nothing, and an oracle that never turns it."""
    examples = random_examples(8, seed=3)
    for option in TABLE[name].options.values():
        tried = [
            p[option.name]
            for p in ORACLE[name].points
            if p.get(option.name, option.default) != option.default
        ]
        assert tried, f"the oracle never tries {name} with another {option.name}"
        moved = losses(NUMPY, name, {option.name: tried[0]}, examples) - losses(NUMPY, name, {}, examples)
        assert np.abs(moved).max() > 1e-4, option.name


@pytest.mark.parametrize("name", TABLE)
def test_pad_columns_and_what_stands_in_them_change_nothing(name: str) -> None:
    """Finds: a mask forgotten, a mean over the padded length."""
    examples = random_examples(5, seed=4)
    plain, wide = columns(NUMPY, examples), columns(NUMPY, examples, pad=3)
    dirty = {
        key: Logps(value.tokens - 7.0 * (1 - value.mask), value.mask) if isinstance(value, Logps) else value
        for key, value in wide.items()
    }
    objective = resolve_objective(name)
    np.testing.assert_allclose(objective(dirty), objective(plain), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if not entry.batch])
def test_splitting_or_permuting_a_batch_changes_no_loss(name: str) -> None:
    examples = random_examples(6, seed=5)
    whole = losses(NUMPY, name, {}, examples)
    np.testing.assert_array_equal(losses(NUMPY, name, {}, examples[::-1]), whole[::-1])
    parts = [losses(NUMPY, name, {}, [x]) for x in examples]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-14)


# --- known values where policy = reference -----------------------------------------------------

AT_REFERENCE = [
    ("dpo", {}, math.log(2)),
    ("dpo", {"beta": 0.01, "label_smoothing": 0.3}, math.log(2)),
    ("robust", {}, math.log(2)),
    ("ipo", {"beta": 0.1}, 25.0),
    ("ipo", {"beta": 0.5}, 1.0),
    ("ipo_norm", {"beta": 0.1}, 25.0),
    ("hinge", {"beta": 0.3}, 1.0),
    ("ln_dpo", {}, math.log(2)),
]


def same(examples: Sequence[Example]) -> list[Example]:
    return [replace(x, policy=x.reference) for x in examples]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name, options, value", AT_REFERENCE)
def test_policy_equal_to_reference(library: Library, name: str, options: Any, value: float) -> None:
    got = losses(library, name, options, same(random_examples(8, seed=6)))
    np.testing.assert_allclose(got, value, rtol=1e-6 if library is MLX else 1e-15)


def test_every_reference_objective_has_a_known_value_at_the_reference() -> None:
    assert {name for name, _, _ in AT_REFERENCE} == {n for n, e in TABLE.items() if "reference" in e.columns}


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_step_zero_pushes_by_half_of_beta(library: Library) -> None:
    """Finds: a log-sigmoid whose gradient dies at exactly 0, where every LoRA run begins."""
    examples = same(random_examples(4, seed=7))
    got, mask = slopes(library, "dpo", {"beta": 0.1}, examples)
    np.testing.assert_allclose(got[:, 0], -0.05 * mask[:, 0], rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], 0.05 * mask[:, 1], rtol=1e-6)


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_the_hinge_does_not_push_at_its_kink(library: Library) -> None:
    """βΔ = 1 exactly, just below, and beyond. Finds: a kink that sides with the library."""
    flat = [[0.0], [0.0]]
    examples = [Example([[-1.0], [d - 1.0]], flat) for d in (-2.0, -1.9375, -3.0)]
    np.testing.assert_array_equal(losses(library, "hinge", {"beta": 0.5}, examples), [0.0, 0.03125, 0.0])
    got, _ = slopes(library, "hinge", {"beta": 0.5}, examples)
    np.testing.assert_array_equal(got[..., 0], [[0, 0], [-0.5, 0.5], [0, 0]])


# --- laws of single formulas -------------------------------------------------------------------


def swapped(examples: Sequence[Example]) -> list[Example]:
    return [replace(x, policy=x.policy[::-1], reference=x.reference[::-1]) for x in examples]


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_exchanging_the_responses_changes_dpo_by_z(beta: float) -> None:
    examples = random_examples(8, seed=8)
    own, other = (losses(NUMPY, "dpo", {"beta": beta}, x) for x in (examples, swapped(examples)))
    z = [
        beta * (sum(x.policy[0]) - sum(x.reference[0]) - sum(x.policy[1]) + sum(x.reference[1]))
        for x in examples
    ]
    np.testing.assert_allclose(other - own, z, rtol=1e-9)
    # A model that ignores the goal pays for both halves of a scored pair: at least 2 log 2.
    assert (own + other >= 2 * math.log(2) - 1e-12).all()


def test_label_smoothing_is_the_mean_over_flips_and_robust_undoes_it() -> None:
    """E over flips of robust = clean dpo; of dpo = smoothed dpo."""
    examples, e = random_examples(8, seed=9), 0.2
    clean, smooth = losses(NUMPY, "dpo", {}, examples), losses(NUMPY, "dpo", {"label_smoothing": e}, examples)
    flipped = losses(NUMPY, "dpo", {}, swapped(examples))
    np.testing.assert_allclose((1 - e) * clean + e * flipped, smooth, rtol=1e-12)
    own, other = (losses(NUMPY, "robust", {"label_smoothing": e}, x) for x in (examples, swapped(examples)))
    np.testing.assert_allclose((1 - e) * own + e * other, clean, rtol=1e-12)


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_the_smoothed_optimum_is_where_it_should_be(library: Library) -> None:
    """ε = 0.3, β = 0.01: Δ* = 84.73 nats, loss H(ε) = 0.610864."""
    best = Example([[-1.0], [-1.0 - 84.7298]], [[-1.0], [-1.0]])
    options = {"beta": 0.01, "label_smoothing": 0.3}
    assert losses(library, "dpo", options, [best])[0] == pytest.approx(0.610864, abs=1e-6)
    got, _ = slopes(library, "dpo", options, [best])
    assert np.abs(got).max() < 1e-8


def test_per_token_forms_with_equal_lengths_are_the_sums_with_beta_over_n() -> None:
    n = 5
    examples = [
        replace(
            x, policy=[[-1.3 * i, *[-0.5] * (n - 1)] for i in (1, 2)], reference=[[-0.7] * n, [-0.4 * i] * n]
        )
        for i, x in enumerate(random_examples(4, seed=10), 1)
    ]
    np.testing.assert_allclose(
        losses(NUMPY, "ln_dpo", {"beta": 2.0}, examples), losses(NUMPY, "dpo", {"beta": 2.0 / n}, examples)
    )
    # (Δ/n − 1/2β)² = (Δ − n/2β)² / n²
    np.testing.assert_allclose(
        losses(NUMPY, "ipo_norm", {"beta": 1.0}, examples),
        losses(NUMPY, "ipo", {"beta": 1.0 / n}, examples) / n**2,
    )


def test_simpo_sees_means_only_and_gamma_is_absolute() -> None:
    examples = random_examples(5, seed=11)
    doubled = [replace(x, policy=[[*t, *t] for t in x.policy]) for x in examples]
    np.testing.assert_allclose(
        losses(NUMPY, "simpo", {}, doubled), losses(NUMPY, "simpo", {}, examples), rtol=1e-12
    )
    tie = Example([[-1.0], [-1.0, -1.0]], [[0.0], [0.0, 0.0]])
    for beta in (2.0, 10.0):  # at equal means γ alone is left, whatever β
        assert losses(NUMPY, "simpo", {"beta": beta, "gamma": 1.0}, [tie])[0] == pytest.approx(
            math.log1p(math.e)
        )


def test_far_out_margins_stay_finite() -> None:
    """Finds: log(sigmoid(z)) where sigmoid has become 0."""
    far = [Example([[-5000.0], [-1.0]], [[-1.0], [-1.0]]), Example([[-1.0], [-5000.0]], [[-1.0], [-1.0]])]
    np.testing.assert_allclose(losses(NUMPY, "dpo", {"beta": 1.0}, far), [4999.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_reference_only_enters_as_a_difference_token_by_token(name: str) -> None:
    """Finds: precision lost by subtracting two long sums in float32."""
    n = 2000
    policy, reference = [-2.5 - 1 / 1024] * n, [-2.5] * n
    examples = [Example([policy, reference], [reference, reference])]
    got = resolve_objective(name)(
        {
            key: Logps(*(part.astype(np.float32) for part in value))
            for key, value in columns(NUMPY, examples).items()
            if isinstance(value, Logps)
        }
    )
    assert got.dtype == np.float32
    assert got[0] == pytest.approx(ORACLE[name].loss(examples[0]), rel=1e-5)


def test_columns_of_log_probs_are_declared_as_such() -> None:
    for entry in TABLE.values():
        assert isinstance(entry.columns["policy"], Scope)
