"""What a signature declares, how a configuration becomes an objective, and how lists become pairs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import test_objectives
from click.testing import CliRunner
from libraries import DIFFERENTIABLE, LIBRARIES, MLX, NUMPY, TORCH, Library, host, logps
from oracle import ORACLE, Example, random_examples

from mlxpref import cli, ops
from mlxpref.errors import ObjectiveError
from mlxpref.objectives import (
    TABLE,
    BatchLogps,
    ListLogps,
    PerExample,
    PerExampleIndex,
    PerResponse,
    Positive,
    Share,
    objective,
    resolve_objective,
)
from mlxpref.objectives.lift import pairs_of
from mlxpref.objectives.logratios import margin, means
from mlxpref.records import Logps

columns = test_objectives.columns
PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-an-objective.md"


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Objectives and oracle rows made in a test are gone after it."""
    before, rows = dict(TABLE), dict(ORACLE)
    yield
    for table, kept in ((TABLE, before), (ORACLE, rows)):
        table.clear()
        table.update(kept)


# --- names, options, weights -------------------------------------------------------------------


def test_a_name_alone_takes_the_defaults() -> None:
    dpo = resolve_objective("dpo")
    assert dpo.options == {"beta": 0.1, "label_smoothing": 0.0, "lift": "first_two"}
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
        ("sigmoid", r"did you mean dpo\?"),
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


def test_missing_columns_are_told_before_a_model_loads() -> None:
    mixture = resolve_objective(["dpo", {"name": "sft", "weight": 0.1}])
    mixture.check_columns({"reference"})
    with pytest.raises(ObjectiveError, match=r"dpo needs reference; there is: scores"):
        mixture.check_columns({"scores"})
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


# --- lists -------------------------------------------------------------------------------------


def test_which_pairs_a_list_gives() -> None:
    assert pairs_of(4, "first_two") == ((0, 1),)
    assert pairs_of(4, "best_worst") == ((0, 3),)
    assert pairs_of(4, "best_rest") == ((0, 1), (0, 2), (0, 3))
    assert pairs_of(4, "all_pairs") == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


# Log-ratios 2, -1, 0.5 and, in the second list, 0, 1, -3. IPO at β = 0.5 is (Δ − 1)².
LISTS = [
    Example([[-1.0, -2.0], [-3.0], [-1.0]], [[-2.0, -3.0], [-2.0], [-1.5]], (9, 6, 3)),
    Example([[-1.0], [-2.0], [-4.0]], [[-1.0], [-3.0], [-1.0]], (8, 5, 1)),
]
LIFTED = [
    ("first_two", [(3 - 1) ** 2, (-1 - 1) ** 2]),
    ("best_worst", [(1.5 - 1) ** 2, (3 - 1) ** 2]),
    ("best_rest", [(4 + 0.25) / 2, (4 + 4) / 2]),
    ("all_pairs", [(4 + 0.25 + (-1.5 - 1) ** 2) / 3, (4 + 4 + (4 - 1) ** 2) / 3]),
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("lift, expected", LIFTED)
@pytest.mark.parametrize("scored", [True, False])
def test_lists_are_lifted_to_pairs(library: Library, lift: str, expected: list[float], scored: bool) -> None:
    """Finds: pairs of the wrong rows, a sum for a mean, rows of a batch mixed up in the reshaping."""
    given = columns(library, LISTS)
    if not scored:
        del given["scores"]
    got = resolve_objective({"name": "ipo", "beta": 0.5, "lift": lift})(given)
    np.testing.assert_allclose(host(got), expected, rtol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_pairs_that_the_goal_does_not_tell_apart_are_left_out(library: Library) -> None:
    """Goal 6: 3 and 9 are equally far. All alike: nothing to learn, loss and gradient 0, not NaN."""
    tied = [
        Example(LISTS[0].policy, LISTS[0].reference, (6, 9, 3)),
        Example(LISTS[1].policy, LISTS[1].reference, (5, 5, 5)),
    ]
    all_pairs = resolve_objective({"name": "ipo", "beta": 0.5, "lift": "all_pairs"})
    np.testing.assert_allclose(host(all_pairs(columns(library, tied))), [(4 + 0.25) / 2, 0.0], rtol=1e-6)
    if library is not NUMPY:
        slopes, _ = test_objectives.slopes(library, "ipo", {"beta": 0.5, "lift": "all_pairs"}, tied)
        assert np.isfinite(slopes).all() and not slopes[1].any() and slopes[0].any()


def test_two_responses_are_the_same_under_every_lift() -> None:
    """A tie that was asked to be kept counts in a pair."""
    pairs = [Example(x.policy, x.reference, (5, 5)) for x in random_examples(4)]
    own = resolve_objective("dpo")(columns(NUMPY, pairs))
    for lift in ("best_worst", "best_rest", "all_pairs"):
        np.testing.assert_array_equal(
            resolve_objective({"name": "dpo", "lift": lift})(columns(NUMPY, pairs)), own
        )


def test_sft_in_a_mixture_keeps_to_the_best_of_a_list() -> None:
    got = resolve_objective({"name": "sft"})(columns(NUMPY, LISTS))
    np.testing.assert_allclose(got, [1.5, 1.0])


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_gradients_reach_every_response_of_a_list(library: Library) -> None:
    slopes, mask = test_objectives.slopes(library, "dpo", {"lift": "all_pairs"}, LISTS)
    assert (slopes[mask == 1] != 0).all() and not slopes[mask == 0].any()


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
    def toy_running(policy: Logps, state: Moments = Moments(0.0, 0), *, rate: Share = 0.5) -> Any:  # noqa: B008
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
    grouped = resolve_objective({"name": "toy_groups", "lift": "all_pairs"})
    extras = {"margins": np.array([1.0, 5.0]), "groups": np.array([0, 2])}
    losses, _ = grouped.apply(given | extras, {"toy_groups": (np.array([0.5, 0.25, 2.0]),)})
    np.testing.assert_allclose(losses, [0.5, 10.0])


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


# --- the page in docs, the command -------------------------------------------------------------


@pytest.mark.usefixtures("scratch")
def test_the_example_in_docs_runs_and_passes_the_tests_it_promises() -> None:
    formula, oracle_row = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(formula, "formula", "exec"), {"__name__": "mlxpref.objectives.margin"})
    exec(compile(oracle_row, "oracle_row", "exec"), {"__name__": "oracle"})
    row = ORACLE["squared_hinge"]
    assert TABLE["squared_hinge"].family == "margin"
    for options in ({}, *row.points):
        test_objectives.test_values_are_those_of_the_oracle(NUMPY, "squared_hinge", options)
    test_objectives.test_the_oracle_gives_the_published_values("squared_hinge", row.golden[0])
    test_objectives.test_golden_values_and_gradients(NUMPY, "squared_hinge", row.golden[0])
    test_objectives.test_every_option_moves_the_loss("squared_hinge")
    assert "squared_hinge" in CliRunner().invoke(cli.main, ["objectives"]).output


def test_the_command_lists_every_objective_with_needs_options_and_source() -> None:
    ran = CliRunner().invoke(cli.main, ["objectives"])
    assert ran.exit_code == 0
    lines = {line.split()[0]: line for line in ran.output.splitlines() if line.strip()}
    for name, entry in TABLE.items():
        assert entry.source in lines[name]
        assert all(f"{option.name}={option.default}" in lines[name] for option in entry.options.values())
    assert "reference" in lines["dpo"] and "reference" not in lines["simpo"]


def test_the_command_explains_one_and_refuses_what_is_not_there() -> None:
    told = CliRunner().invoke(cli.main, ["objectives", "robust"])
    assert told.exit_code == 0 and TABLE["robust"].doc in told.output
    assert "float ≥ 0 and < 0.5, default 0.1" in told.output
    missing = CliRunner().invoke(cli.main, ["objectives", "robst"])
    assert missing.exit_code == 2 and "did you mean robust?" in missing.output
    facts = json.loads(CliRunner().invoke(cli.main, ["objectives", "dpo", "--json"]).output)
    assert facts["needs"] == ["reference"]
    assert facts["options"]["properties"]["beta"]["exclusiveMinimum"] == 0


def test_every_option_is_described_where_it_is_listed() -> None:
    """Finds: a docstring whose Args section the table cannot read."""
    for entry in TABLE.values():
        for option in entry.options.values():
            assert len(option.help) > 10, f"{entry.name}: {option.name}"
            assert "\n" not in option.help and not option.help.startswith("policy")


@pytest.mark.torch
def test_torch_columns_need_no_numpy_detour() -> None:
    """Finds: an op that falls back to NumPy for a torch tensor, cutting the graph."""
    given = columns(TORCH, random_examples(3, k=4))
    for name in TABLE:
        got = resolve_objective(name).apply(given, resolve_objective(name).initial_state())[0]
        assert type(got).__module__ == "torch", name
