"""What a signature declares, and how a configuration becomes an objective."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import test_objectives
from libraries import LIBRARIES, MLX, NUMPY, TORCH, Library, host, logps
from oracle import random_examples
from test_lists import LISTS

from mlxpref import ops
from mlxpref.errors import ObjectiveError
from mlxpref.objectives import (
    TABLE,
    BatchLogps,
    ListLogps,
    PerExample,
    PerExampleIndex,
    PerResponse,
    PerResponseLogps,
    PerToken,
    Positive,
    Share,
    TextLogps,
    objective,
    resolve_objective,
)
from mlxpref.objectives.logratios import margin, means
from mlxpref.records import Logps

columns = test_objectives.columns


@pytest.fixture
def scratch() -> Iterator[None]:
    """Objectives made in a test are gone after it."""
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


# --- names, options, weights -------------------------------------------------------------------


def test_a_name_alone_takes_the_defaults() -> None:
    dpo = resolve_objective("dpo")
    assert dpo.options == {"beta": 0.1, "label_smoothing": 0.0, "lift": "first_two", "weighting": "none"}
    assert (dpo.name, dpo.needs, dpo.beta, dpo.per_token) == ("dpo", {"reference"}, 0.1, False)
    simpo = resolve_objective({"name": "simpo", "beta": 10})
    assert (simpo.needs, simpo.beta, simpo.per_token) == (frozenset(), 10.0, True)


@pytest.mark.parametrize("text", ["1e-2", "0.01", 0.01])
def test_a_number_is_a_number_whatever_yaml_thinks(text: Any) -> None:
    assert resolve_objective({"name": "dpo", "beta": text}).options["beta"] == 0.01


@pytest.mark.parametrize(
    "spec, said",
    [
        ("dpoo", r"dpoo: no such objective; did you mean dpo"),
        ("sigmoid", r"did you mean dpo\?$"),
        ("DPO", r"did you mean dpo\?$"),
        ("nothing_like_it", r"no such objective. There are: dpo, "),
        ([{"name": "dpo", "weight": 0}], r"every weight is 0"),
        ({"name": "inpo", "tau": 0.1}, r"inpo: tau 0\.1 is above eta 0\.0075"),
        ({"name": "mm_dpo", "beta": 1e-4}, r"beta: 0\.0001 should be greater than or equal to 0\.001"),
        ("sigmoid_norm", r"did you mean ln_dpo\?"),
        ({"name": "dpo", "bet": 0.1}, r"dpo takes no option bet; did you mean beta\?"),
        ({"name": "hinge", "label_smoothing": 0.1}, r"hinge takes no option label_smoothing"),
        ({"name": "simpo", "gamma_beta_ratio": 0.5}, r"did you mean gamma\? .*absolute.*multiply that by β"),
        ({"name": "dpo", "beta": 0}, r"beta: 0 should be greater than 0"),
        ({"name": "dpo", "beta": -0.1}, r"beta: -0\.1 should be greater than 0"),
        ({"name": "dpo", "beta": math.nan}, r"beta: nan should be a finite number"),
        ({"name": "dpo", "beta": "big"}, r"beta: 'big' should be a valid number"),
        ({"name": "dpo", "beta": None}, r"beta: None should be a valid number"),
        ({"name": "dpo", "beta": True}, r"beta: True is not a number"),
        ({"name": "dpo", "label_smoothing": 0.5}, r"label_smoothing: 0\.5 should be less than 0\.5"),
        ({"name": "robust", "label_smoothing": 0.5}, r"label_smoothing: 0\.5 should be less than 0\.5"),
        ({"name": "sft", "per": "word"}, r"per: 'word' should be 'token' or 'response'"),
        ({"name": "dpo", "lift": "pairs"}, r"lift: 'pairs' should be 'first_two'"),
        ({"name": "sft", "lift": "all_pairs"}, r"sft takes no option lift"),
        ({"beta": 0.1}, r"expected the name of an objective"),
        ([], r"no objective is named"),
        ([3], r"3: expected the name"),
        (["dpo", {"name": "dpo", "beta": 1}], r"dpo is listed twice"),
        ([{"name": "dpo", "weight": "half"}], r"weight: 'half' is not a finite number"),
        ([{"name": "dpo", "weight": math.inf}], r"weight: inf is not"),
        ([{"name": "dpo", "weight": True}], r"weight: True is not"),
    ],
)
def test_what_is_refused_and_how(spec: Any, said: str) -> None:
    """Finds: a typo that trains something else, and a message that does not say what would be right."""
    with pytest.raises(ObjectiveError, match=said):
        resolve_objective(spec)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ObjectiveError) as caught:
        resolve_objective(
            [{"name": "dpo", "beta": -1, "gama": 2}, {"name": "sfft"}, {"name": "ipo", "beta": 0}]
        )
    for part in ("dpo: beta: -1", "dpo takes no option gama", "sfft: no such", "ipo: beta: 0"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("scratch")
def test_missing_columns_are_told_before_a_model_loads() -> None:
    resolve_objective({"name": "dpo", "weighting": "wpo"}).check_columns(())  # of the model, not of the data
    define_all()
    scored = resolve_objective(["dpo", "toy_scored"])
    scored.check_columns({"scores"})
    with pytest.raises(ObjectiveError, match=r"toy_scored needs scores; there is: confidence"):
        scored.check_columns({"confidence"})
    mixture = resolve_objective(["dpo", {"name": "sft", "weight": 0.1}])
    with pytest.raises(ObjectiveError, match="dpo needs reference"):
        mixture({"policy": logps(NUMPY, [[[-1.0], [-2.0]]]), "reference": None})


# --- mixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mixture_is_the_weighted_sum(library: Library) -> None:
    """SFT-regularised DPO at A and B, to the published values. η = 0.005, NLL per token."""
    spec = [{"name": "dpo", "beta": 0.1}, {"name": "sft", "weight": 0.005}]
    rpo = resolve_objective(spec)
    got = host(rpo(columns(library, [oracle.A, oracle.B])))
    np.testing.assert_allclose(got, [0.430055, 0.836773], atol=2e-6)
    assert rpo.name == "dpo + 0.005 sft"
    assert (rpo.beta, rpo.needs) == (0.1, {"reference"})
    assert rpo.options["dpo.beta"] == 0.1 and rpo.options["sft.per"] == "token"


def test_weights_scale_also_a_single_objective_and_the_spec_comes_back() -> None:
    examples = random_examples(4)
    plain = resolve_objective("ipo")(columns(NUMPY, examples))
    double = resolve_objective({"name": "ipo", "weight": 2})
    np.testing.assert_array_equal(double(columns(NUMPY, examples)), 2 * plain)
    mixture = resolve_objective(
        [{"name": "simpo", "gamma": 1, "lift": "all_pairs"}, {"name": "sft", "weight": 0.1}]
    )
    again = resolve_objective(json.loads(json.dumps(mixture.spec)))
    assert again.spec == mixture.spec and again.options == mixture.options
    np.testing.assert_array_equal(again(columns(NUMPY, examples)), mixture(columns(NUMPY, examples)))


# --- what else a signature may declare ---------------------------------------------------------


class Moments(NamedTuple):
    mean: Any
    steps: Any


def uniform(*, n_groups: int, **_: Any) -> tuple[Any, ...]:
    return (np.full(n_groups, 1 / n_groups),)


def define_all() -> None:
    """One toy of each kind: scored, listwise, coupled, with a state, with columns of every shape."""

    @objective
    def toy_scored(policy: Logps, scores: PerResponse, lengths: PerResponse, *, eta: Positive = 1.0) -> Any:
        """Scores.

        Args:
            eta: scale.

        Source: none.
        """
        return eta * (scores[:, 0] - scores[:, 1]) + lengths[:, 0] + 0 * policy.sums[:, 0]

    @objective
    def toy_list(policy: ListLogps, *, weights: tuple[float, ...] = (1.0,)) -> Any:
        """Lists.

        Args:
            weights: one a slot; those left out are 0.

        Source: none.
        """
        return sum(w * policy.sums[:, k] for k, w in enumerate(weights))

    @objective
    def toy_sorted(policy: BatchLogps, reference: Logps) -> Any:
        """Sorted.

        Source: none.
        """
        return ops.sort(margin(policy, reference), 0)

    @objective
    def toy_running(policy: Logps, state: Moments = Moments(0.0, 0), *, rate: Share = 0.5) -> Any:  # noqa: B008 - never mutated
        """Running mean.

        Args:
            rate: of the mean.

        Source: none.
        """
        chosen, rejected = means(policy)
        gap = chosen - rejected
        moved = state.mean + rate * (ops.stop_gradient(gap).mean(0) - state.mean)
        return gap - moved, Moments(moved, state.steps + 1)

    @objective
    def toy_kinds(
        policy: Logps,
        reference: Logps,
        third: TextLogps,
        third_reference: TextLogps,
        notes: PerResponseLogps,
        confidence: PerExample,
        token_weights: PerToken,
        attributes: PerResponse,
    ) -> Any:
        """One of each.

        Source: none.
        """
        gap, weights = policy.sums[:, 1] - policy.sums[:, 0], token_weights[:, 1] - token_weights[:, 0]
        note = notes.sums[:, 1] - notes.sums[:, 0]
        further = third.sums[:, 0] + third_reference.sums[:, 0] + 2 * note - (5 - 3)
        return gap + further + confidence + weights[:, 0] + (attributes[:, 1] - attributes[:, 0])[:, 0]

    @objective
    def toy_groups(
        policy: Logps,
        margins: PerExample,
        groups: PerExampleIndex,
        state: Any = uniform,
        *,
        n_groups: int = 3,
    ) -> Any:
        """Groups.

        Args:
            n_groups: how many.

        Source: none.
        """
        if n_groups < 2:
            raise ValueError("n_groups: one group is none; take at least 2")
        return margins * state[0][groups] + 0 * policy.sums[:, 0], state


@pytest.mark.usefixtures("scratch")
def test_columns_and_kinds_are_read_from_the_signature() -> None:
    define_all()
    scored, running = resolve_objective("toy_scored"), resolve_objective("toy_running")
    assert scored.needs == {"scores"}, "lengths come from the policy's own mask"
    assert resolve_objective("toy_groups").needs == {"margins", "groups"}
    assert not scored.coupled and not scored.stateful
    assert resolve_objective("toy_sorted").coupled and not resolve_objective("toy_sorted").stateful
    assert running.coupled and running.stateful
    assert TABLE["toy_list"].lists and "lift" not in TABLE["toy_list"].schema["properties"]
    assert TABLE["toy_scored"].family == "test_registry"

    examples = random_examples(3)
    got = scored(columns(NUMPY, examples))
    np.testing.assert_allclose(got, [x.scores[0] - x.scores[1] + len(x.policy[0]) for x in examples])
    listed = resolve_objective({"name": "toy_list", "weights": [1, 0, -1]})
    np.testing.assert_allclose(listed(columns(NUMPY, LISTS)), [-3 + 1, -1 + 4])
    assert resolve_objective(listed.spec).options == {"weights": [1.0, 0.0, -1.0]}


@pytest.mark.usefixtures("scratch")
def test_lifting_takes_every_kind_of_column_along() -> None:
    define_all()
    given = columns(NUMPY, LISTS)
    scored = resolve_objective({"name": "toy_scored", "lift": "best_rest"})
    np.testing.assert_allclose(scored(given), [(3 + 6) / 2 + 2, (3 + 7) / 2 + 1])
    kinds = resolve_objective({"name": "toy_kinds", "lift": "best_worst"})
    assert kinds.needs == {"reference", "third", "notes", "confidence", "token_weights", "attributes"}
    assert kinds.texts == {"notes": "response", "third": "example"}
    slots = [[[float(k)] for k in range(7)] for _ in range(2)]  # 3 responses, a note to each, one text more
    many = {
        "policy": logps(NUMPY, slots),
        "reference": logps(NUMPY, [[[10.0 * t[0]] for t in row] for row in slots]),
        "confidence": np.array([1.0, 2.0]),
        "token_weights": np.arange(6.0).reshape(2, 3, 1),
        "attributes": np.arange(12.0).reshape(2, 3, 2),
    }
    found = kinds(many)
    # rejected 2 − chosen 0, notes 5 and 3, third 6 and its reference 60; columns of the first and last response.
    np.testing.assert_allclose(found, [2 + 5 - 3 + 6 + 60 + c + w + a for c, w, a in ((1, 2, 4), (2, 2, 4))])


@pytest.mark.usefixtures("scratch")
def test_a_batch_in_parts_has_the_values_of_the_whole() -> None:
    """Finds a coupled formula that sees one part at a time, parts padded wrongly, a state taken twice."""
    define_all()
    examples = random_examples(7, seed=3)
    mixture = resolve_objective(["toy_sorted", "toy_running", {"name": "sft", "weight": 0.5}])
    whole, state = mixture.apply(columns(NUMPY, examples), mixture.initial_state())
    for cuts in ((0, 3, 7), (0, 1, 2, 6, 7)):
        parts = [columns(NUMPY, examples[a:b]) for a, b in pairwise(cuts)]
        losses, after = mixture.apply_parts(parts, mixture.initial_state())
        assert [len(some) for some in losses] == [b - a for a, b in pairwise(cuts)]
        np.testing.assert_allclose(np.concatenate(losses), whole, rtol=1e-12)
        np.testing.assert_allclose(after["toy_running"], state["toy_running"], rtol=1e-12)
    with pytest.raises(ObjectiveError, match="best_worst"):
        resolve_objective({"name": "toy_sorted", "lift": "all_pairs"})
    assert resolve_objective("toy_sorted").options["lift"] == "best_worst"
    mixed = [columns(NUMPY, examples[:2]), columns(NUMPY, random_examples(2, k=3))]
    assert [len(some) for some in resolve_objective("toy_sorted").apply_parts(mixed, {})[0]] == [2, 2]


@pytest.mark.mlx
@pytest.mark.usefixtures("scratch")
def test_a_state_goes_from_step_to_step_through_a_compiled_graph() -> None:
    import mlx.core as mx

    define_all()
    running = resolve_objective([{"name": "toy_running", "rate": 0.25}, {"name": "sft", "weight": 0.0}])
    given = columns(MLX, random_examples(6))
    gap = host(given["policy"].means[:, 0] - given["policy"].means[:, 1]).mean()
    step = mx.compile(lambda policy, state: running.apply({"policy": policy}, state))
    state = {k: Moments(*map(mx.array, v)) for k, v in running.initial_state().items()}
    for i in (1, 2, 3):
        losses, state = step(given["policy"], state)
        expected = gap * (1 - 0.75**i)
        assert isinstance(state["toy_running"], Moments)
        assert state["toy_running"].mean.item() == pytest.approx(expected, rel=1e-5)
        assert host(losses).mean() == pytest.approx(gap - expected, rel=1e-4)
    assert state["toy_running"].steps.item() == 3
    with pytest.raises(TypeError, match="carries a state"):
        running(given)


@pytest.mark.usefixtures("scratch")
def test_options_that_contradict_each_other_are_refused_before_a_model_loads() -> None:
    define_all()
    assert resolve_objective({"name": "toy_groups", "n_groups": 5}).initial_state()["toy_groups"][
        0
    ].shape == (5,)
    with pytest.raises(ObjectiveError, match=r"toy_groups: n_groups: one group is none"):
        resolve_objective({"name": "toy_groups", "n_groups": 1})


def no_source(policy: Logps) -> Any:
    """No source."""


def no_policy(reference: Logps) -> Any:
    """Source: none."""


def bare_column(policy: Logps, scores: Any) -> Any:
    """Source: none."""


def undocumented(policy: Logps, *, beta: float = 1.0) -> Any:
    """Source: none."""


def no_default(policy: Logps, *, beta: float) -> Any:
    """Source: none."""


def reserved(policy: Logps, *, weight: float = 1.0) -> Any:
    """Source: none."""


def dpo(policy: Logps) -> Any:
    """Twice.

    Source: none.
    """


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    "function, said",
    [
        (no_source, "no line `Source"),
        (no_policy, "needs a parameter `policy"),
        (bare_column, "parameter scores: annotate"),
        (undocumented, "parameter beta: not described"),
        (no_default, "parameter beta: an option has"),
        (reserved, "parameter weight: an option has"),
        (dpo, "defined twice"),
    ],
)
def test_a_declaration_that_says_too_little_is_refused(function: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        objective(function)


@pytest.mark.usefixtures("scratch")
def test_a_formula_that_reduces_its_losses_is_refused() -> None:
    @objective
    def toy_reduced(policy: Logps) -> Any:
        """Mean.

        Source: none.
        """
        return policy.sums.mean()

    with pytest.raises(TypeError, match=r"expected \(B,\)"):
        resolve_objective("toy_reduced")


def test_per_token_objectives_are_told_from_those_that_sum() -> None:
    """Finds: a flat loss (all 0, or saturated) taken for one that does not depend on length."""
    told = {name for name in TABLE if resolve_objective(name).per_token}
    assert told >= {"ipo_norm", "ln_dpo", "simpo", "sft"} and not told & {"dpo", "robust", "ipo", "hinge"}
    assert not resolve_objective({"name": "sft", "per": "response"}).per_token
    assert not resolve_objective({"name": "hinge", "beta": 1e4}).per_token
    assert resolve_objective({"name": "simpo", "beta": 1e4}).per_token


@pytest.mark.torch
def test_metrics_of_a_mixture_follow_one_formula() -> None:
    """Finds β of one formula times log-ratios averaged as another does."""
    for spec, beta, per_token in [
        (["sft", "dpo"], 0.1, False),
        (["sft", {"name": "simpo", "beta": 2.5}], 2.5, True),
        (["dpo", "sft"], 0.1, False),
        (["ln_dpo", "dpo"], 5.0, True),
        (["sft"], 1.0, True),
    ]:
        found = resolve_objective(spec)
        assert (found.beta, found.per_token) == (beta, per_token), spec


def test_torch_columns_need_no_numpy_detour() -> None:
    """Finds: an op that falls back to NumPy for a torch tensor, cutting the graph."""
    given = columns(TORCH, random_examples(3, k=4))
    for name in TABLE:
        got = resolve_objective(name).apply(given, resolve_objective(name).initial_state())[0]
        assert type(got).__module__ == "torch", name
