"""Every formula against the scalar oracle and published numbers, in every array library.

What each formula is known to satisfy beside that stands in ``test_identities``; what holds of batches and states in
``test_coupled``.
"""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from libraries import FLOAT32, LIBRARIES, MLX, NUMPY, TORCH, TORCH32, Library, host, logps, padded
from oracle import ORACLE, VALUES, Example, Golden, kl_slopes, random_examples, text_slopes, token_slopes

from mlxpref.errors import ObjectiveError
from mlxpref.objectives import TABLE, Objective, resolve_objective
from mlxpref.objectives.registry import Column, Scope
from mlxpref.records import Logps

Options = Mapping[str, Any]

TOKEN_COLUMNS = ("token_weights", "divergence", "overlap", "token_kl")


def _said(name: str, options: Options) -> str:
    return f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'defaults'}"


POINTS = [
    pytest.param(name, options, id=_said(name, options))
    for name, row in ORACLE.items()
    for options in ({}, *row.points)
]
GOLDEN = [
    pytest.param(name, golden, id=f"{_said(name, golden.options)}-{i}")
    for name, row in ORACLE.items()
    for i, golden in enumerate(row.golden)
]
EVERY_LIBRARY = [pytest.param(NUMPY, id="numpy"), *FLOAT32]


@cache
def _resolved(name: str, options: str) -> Objective:
    return resolve_objective({"name": name, **literal_eval(options)})


def resolved(name: str, options: Options) -> Objective:
    """The objective; made once, for resolving tries every formula out."""
    return _resolved(name, repr(dict(options)))


# --- how objectives are asked ------------------------------------------------------------------


def columns(library: Library, examples: Sequence[Example], pad: int = 0, texts: Collection[str] = ()) -> dict[str, Any]:
    """Everything a step may hand over; the log-probs of ``texts`` stand behind those of the responses."""
    policy = [_with_texts(x.policy, x.texts, texts) for x in examples]
    given = {"policy": logps(library, policy, pad)}
    width = given["policy"].tokens.shape[-1]
    reference = [_with_texts(x.reference, {**x.texts, **x.texts_reference}, texts) for x in examples]
    given["reference"] = Logps(*map(library.array, padded(reference, width=width)))
    given["scores"] = library.array([list(x.scores) for x in examples])
    distances = [[(s - x.scores[0]) ** 2 for s in x.scores] for x in examples]
    given["goal_distances"] = library.array(distances)
    for name in examples[0].extras:
        values = [x.extras[name] for x in examples]
        given[name] = library.array(padded(values, width=width)[0] if name in TOKEN_COLUMNS else values)
    return given


def _with_texts(
    rows: Sequence[Sequence[float]], texts: Mapping[str, Sequence[Sequence[float]]], names: Collection[str]
) -> list[Sequence[float]]:
    return [*rows, *(text for name in sorted(names) for text in texts[name])]


def state_of(library: Library, objective: Objective, values: Sequence[Any] | None = None) -> dict[str, Any]:
    """A state of the objective's own kind, of a library's arrays: that of step 0, or with these values."""

    def of(start: Any) -> Any:
        return type(start)(*map(library.array, start if values is None else values))

    return {name: of(start) for name, start in objective.initial_state(n_groups=2).items()}


def apply(
    library: Library,
    name: str,
    options: Options,
    examples: Sequence[Example],
    state: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """(B,) losses and the state after; without one, from step 0."""
    objective = resolved(name, options)
    state = state_of(library, objective) if state is None else state
    losses, after = objective.apply(columns(library, examples, texts=objective.texts), state)
    return host(losses), after


def losses(library: Library, name: str, options: Options, examples: Sequence[Example]) -> np.ndarray:
    """(B,), from the state of step 0 if there is one."""
    return apply(library, name, options, examples)[0]


def gradients(
    library: Library,
    name: str,
    options: Options,
    examples: Sequence[Example],
    of: Sequence[str],
    state: Mapping[str, Any] | None = None,
) -> list[np.ndarray]:
    """∂ Σ loss / ∂ columns by name, of ``Logps`` the tokens."""
    objective = resolved(name, options)
    given = columns(library, examples, texts=objective.texts)
    state = state_of(library, objective) if state is None else state

    def total(*moved: Any) -> Any:
        changed = {
            key: Logps(value, given[key].mask) if isinstance(given[key], Logps) else value
            for key, value in zip(of, moved, strict=True)
        }
        return objective.apply({**given, **changed}, state)[0].sum()

    values = [given[key].tokens if isinstance(given[key], Logps) else given[key] for key in of]
    return library.gradients(total, *map(host, values), compiled=False)


def slopes(library: Library, name: str, options: Options, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """∂ Σ loss / ∂ token log-probs of the policy, (B, S, L), and the mask; texts behind the responses."""
    (found,) = gradients(library, name, options, examples, ["policy"])
    texts = resolved(name, options).texts
    return found, padded([_with_texts(x.policy, x.texts, texts) for x in examples])[1]


# --- what they are asked about -----------------------------------------------------------------


def near(x: Example, share: float = 0.25) -> Example:
    """A policy, texts included, that has gone only this share of its way from the reference.

    Log-ratios are then a few nats, as in training. Float32 keeps a difference of 20 nats to 2e-6 only, and
    where a formula has e^a, or slopes of a steep sigmoid, that alone would use up what is tolerated.
    """

    def drawn(own: Sequence[Sequence[float]], to: Sequence[Sequence[float]]) -> list[list[float]]:
        return [[r + share * (p - r) for p, r in zip(ps, rs, strict=True)] for ps, rs in zip(own, to, strict=True)]

    policy = drawn(x.policy, x.reference)
    texts = {name: drawn(rows, x.texts_reference[name]) for name, rows in x.texts.items()}
    kept = [p - math.fsum(own) for p, own in zip(x.extras["previous"], x.policy, strict=True)]
    previous = [math.fsum(own) + k for own, k in zip(policy, kept, strict=True)]
    return replace(x, policy=policy, texts=texts, extras={**x.extras, "previous": previous})


@cache
def batches(k: int, nearer: bool, n: int, seed: int) -> list[list[Example]]:
    """Three batches of lists of k."""
    drawn = [random_examples(n, k=k, seed=seed + i) for i in range(3)]
    return [[near(x) for x in batch] for batch in drawn] if nearer else drawn


def chain(
    name: str, options: Options, library: Library, n: int = 8, seed: int = 1
) -> Iterator[tuple[list[Example], Any, Any]]:
    """(batch, the oracle's state before it, the library's state before it), batch after batch.

    Lists of 4 for what reads lists; float32 gets batches nearer to the reference.
    """
    objective, known = resolved(name, options), None
    state = state_of(library, objective)
    for batch in batches(4 if TABLE[name].lists else 2, library not in (NUMPY, TORCH), n, seed):
        yield batch, known, state
        if objective.stateful:
            known = ORACLE[name].run(batch, options, known)[1]
            state = apply(library, name, options, batch, state)[1]


def test_every_objective_has_a_row_in_the_oracle() -> None:
    assert set(TABLE) == set(ORACLE)


# --- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("library", EVERY_LIBRARY)
@pytest.mark.parametrize("name, options", POINTS)
def test_values_are_those_of_the_oracle(library: Library, name: str, options: Options) -> None:
    """Finds: a misread formula, at defaults and at every option the oracle tries; a state carried on wrongly."""
    for batch, known, state in chain(name, options, library):
        expected = np.array(ORACLE[name].run(batch, options, known)[0])
        got = apply(library, name, options, batch, state)[0]
        assert got.shape == expected.shape
        if TABLE[name].batch:  # sorted batches have no losses of their rows
            got, expected = np.sort(got), np.sort(expected)
        tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
        if library is not NUMPY:
            assert got.dtype == np.float32
            tolerance = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()}
        np.testing.assert_allclose(got, expected, **tolerance)


def oracle_slopes(name: str, options: Options, batch: list[Example], known: Any) -> np.ndarray:
    """∂ Σ loss / ∂ policy tokens of responses and texts, by central differences in float64."""

    def loss(xs: list[Example]) -> list[float]:
        return ORACLE[name].run(xs, options, known)[0]

    def of(differences: Callable[..., Any], *which: str) -> list[Any]:
        if ORACLE[name].batch:
            return differences(loss, batch, *which)
        return [differences(lambda x: ORACLE[name].loss(x, **options), x, *which) for x in batch]

    of_texts = [of(text_slopes, text) for text in sorted(resolved(name, options).texts)]
    rows = of(token_slopes)
    return padded([[*own, *(t for text in of_texts for t in text[i])] for i, own in enumerate(rows)])[0]


_KNOWN_SLOPES: dict[Any, np.ndarray] = {}


@pytest.mark.parametrize("library", [*FLOAT32, pytest.param(TORCH, id="torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("name, options", POINTS)
def test_gradients_are_those_of_the_oracle(library: Library, name: str, options: Options) -> None:
    """Finds: a constant that is differentiated, a term that is not, a wrong slope of an ``ops`` function, a
    gradient on a pad column, a further text that is not trained."""
    for index, (batch, known, state) in enumerate(chain(name, options, library, n=4, seed=21)):
        (got,) = gradients(library, name, options, batch, ["policy"], state)
        key = (name, repr(options), library is TORCH, index)  # MLX and PyTorch see the same batches
        if key not in _KNOWN_SLOPES:
            _KNOWN_SLOPES[key] = oracle_slopes(name, options, batch, known)
        expected = _KNOWN_SLOPES[key]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        texts = resolved(name, {}).texts
        mask = padded([_with_texts(x.policy, x.texts, texts) for x in batch])[1]
        assert not got[mask == 0].any()


@pytest.mark.mlx
@pytest.mark.parametrize("name", TABLE)
def test_every_formula_can_be_traced(name: str) -> None:
    """Finds: a Python ``if`` on an array, an array made outside the library. Nothing is evaluated."""
    import mlx.core as mx

    examples, objective = random_examples(3, k=4 if TABLE[name].lists else 2, seed=7), resolved(name, {})
    given, traced = columns(MLX, examples, texts=objective.texts), []

    def total(tokens: Any, state: Any) -> Any:
        found, after = objective.apply({**given, "policy": Logps(tokens, given["policy"].mask)}, state)
        traced.append(name)
        return found.sum(), after

    losses, after = mx.compile(total)(given["policy"].tokens, state_of(MLX, objective))
    assert traced and losses.shape == ()
    assert {key: type(value) for key, value in after.items()} == {
        key: type(value) for key, value in objective.initial_state().items()
    }


@pytest.mark.parametrize("library", FLOAT32)
@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if "token_kl" in entry.columns])
def test_the_distance_of_each_token_is_trained(library: Library, name: str) -> None:
    """Finds: KL(ref‖π) taken for a constant, as the log-probs of the reference are."""
    for options in ({}, *ORACLE[name].points):
        batch = [near(x) for x in random_examples(4, seed=31)]
        _, got = gradients(library, name, options, batch, ["policy", "token_kl"])
        loss = lambda xs, options=options: ORACLE[name].run(xs, options)[0]  # noqa: E731 - one line, used once
        expected = padded(kl_slopes(loss, batch))[0]
        width = got.shape[-1]
        expected = np.pad(expected, [(0, 0), (0, 0), (0, width - expected.shape[-1])])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-12)


# --- published numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("library", [*LIBRARIES, *FLOAT32[1:]])
@pytest.mark.parametrize("name, golden", GOLDEN)
def test_golden_values_and_gradients(library: Library, name: str, golden: Golden) -> None:
    """Finds: a misreading that oracle and formula share."""
    single = library in (MLX, TORCH32)
    tolerance: dict[str, Any] = {"atol": 6e-6 if single else 6e-7, "rtol": 1e-5 if single else 1e-6}
    for x, known, (value, *by_response) in golden.cases():
        objective = resolve_objective({"name": name, **golden.options})
        state = state_of(library, objective, known)
        got = apply(library, name, golden.options, [x], state)[0]
        np.testing.assert_allclose(got, [value], **tolerance)
        if library is NUMPY:
            continue
        (tokens,) = gradients(library, name, golden.options, [x], ["policy"], state)
        for k, expected in enumerate(by_response):  # every token of a response has the slope of its sum
            np.testing.assert_allclose(tokens[0, k, : len(x.policy[k])], expected, **tolerance)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("value", [pytest.param(v, id=f"{v.name}-{i}") for i, v in enumerate(VALUES)])
def test_single_published_values(library: Library, value: Any) -> None:
    """The fixtures of lists, and values where only one number is known."""
    state = state_of(library, resolved(value.name, value.options), value.state)
    got = apply(library, value.name, value.options, value.examples, state)[0].astype(float).sum()
    noise = 1e-5 * abs(value.total) if library is MLX else 0.0
    assert got == pytest.approx(value.total, abs=value.within + noise), value.said


# --- laws of all formulas ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_every_option_moves_the_loss(name: str) -> None:
    """Finds: a knob that is accepted and does nothing, and an oracle that never turns it."""

    def of(options: Options) -> np.ndarray:
        steps = chain(name, options, NUMPY, n=16)
        return np.concatenate([apply(NUMPY, name, options, batch, state)[0] for batch, _, state in steps])

    for option in TABLE[name].options.values():
        tried = [p for p in ORACLE[name].points if p.get(option.name, option.default) != option.default]
        assert tried, f"the oracle never tries {name} with another {option.name}"
        moved = []
        for point in tried:
            with suppress(ObjectiveError):  # a point that is allowed with this option only
                moved.append(np.abs(of(point) - of({k: v for k, v in point.items() if k != option.name})).max())
        assert max(moved) > 1e-4, option.name


def dirtied(given: Mapping[str, Any]) -> dict[str, Any]:
    """Log-probs with numbers off the mask."""
    return {
        key: Logps(value.tokens - 7.0 * (1 - value.mask), value.mask) if isinstance(value, Logps) else value
        for key, value in given.items()
    }


@pytest.mark.parametrize("name", TABLE)
def test_pad_columns_and_what_stands_in_them_change_nothing(name: str) -> None:
    """Finds: a mask forgotten, a mean over the padded length, a position counted from the wrong end."""
    examples, objective = random_examples(5, seed=4), resolved(name, {})
    state = state_of(NUMPY, objective)
    plain = columns(NUMPY, examples, texts=objective.texts)
    wide = dirtied(columns(NUMPY, examples, pad=3, texts=objective.texts))
    np.testing.assert_allclose(
        objective.apply(wide, state)[0], objective.apply(plain, state)[0], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if not entry.batch])
def test_splitting_or_permuting_a_batch_changes_no_loss(name: str) -> None:
    """Finds: examples that look at each other in a formula that does not say so."""
    examples = random_examples(6, k=4 if TABLE[name].lists else 2, seed=5)
    whole = losses(NUMPY, name, {}, examples)
    np.testing.assert_array_equal(losses(NUMPY, name, {}, examples[::-1]), whole[::-1])
    parts = [losses(NUMPY, name, {}, [x]) for x in examples]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "name", [n for n, e in TABLE.items() if "reference" in e.columns and not e.lists and not e.batch]
)
def test_reference_only_enters_as_a_difference_token_by_token(name: str) -> None:
    """Finds: precision lost by subtracting two long sums in float32."""
    n = 2000
    (x,) = random_examples(1, seed=6)
    ones = {key: [[1.0] * n] * 2 for key in TOKEN_COLUMNS}
    policy, reference = [[-2.5 - 1 / 1024] * n, [-2.5] * n], [[-2.5] * n] * 2
    examples = [replace(x, policy=policy, reference=reference, extras={**x.extras, **ones})]
    objective = resolved(name, {})

    def single(value: Any) -> Any:
        if isinstance(value, Logps):
            return Logps(*map(single, value))
        return value.astype(np.float32) if value.dtype.kind == "f" else value

    got = objective({k: single(v) for k, v in columns(NUMPY, examples, texts=objective.texts).items()})
    assert got.dtype == np.float32
    assert got[0] == pytest.approx(ORACLE[name].loss(examples[0]), rel=1e-5)


def test_columns_of_log_probs_are_declared_as_such() -> None:
    for entry in TABLE.values():
        assert isinstance(entry.columns["policy"], Scope)
        per = {"overlap": "token", "token_kl": "token", "confidence": "example", "scores": "response"}
        for name, kind in entry.columns.items():
            if isinstance(kind, Column) and name in per:
                assert kind.per == per[name], f"{entry.name}: {name}"
