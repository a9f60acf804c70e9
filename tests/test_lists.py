"""How formulas for pairs read lists of more than two responses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fake_backend
import numpy as np
import pytest
import test_objectives
from libraries import DIFFERENTIABLE, LIBRARIES, NUMPY, Library, host
from oracle import Example, random_examples

from mlxpref.config_layers import load_config
from mlxpref.objectives import resolve_objective
from mlxpref.objectives.lift import pairs_of
from mlxpref.records import Logps
from mlxpref.train import train

columns = test_objectives.columns


def test_which_pairs_a_list_gives() -> None:
    assert pairs_of(4, "first_two") == ((0, 1), (0, 2), (0, 3))  # of which the first told apart counts
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
        del given["goal_distances"]
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


@pytest.mark.parametrize("library", LIBRARIES)
def test_pairs_are_told_apart_by_the_goal_s_distances_not_by_overall_scores(library: Library) -> None:
    """Finds a list lost without a word: all overall scores tie, the attributes of the goal do not."""
    given = columns(library, [Example(LISTS[0].policy, LISTS[0].reference, (5, 5, 5))])
    given["goal_distances"] = library.array([[0.0, 4.0, 4.0]])
    all_pairs = resolve_objective({"name": "ipo", "beta": 0.5, "lift": "all_pairs"})
    np.testing.assert_allclose(host(all_pairs(given)), [(4 + 0.25) / 2], rtol=1e-6)


def test_a_run_learns_from_lists_that_only_their_attributes_tell_apart(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Finds distances lost on the way from the data to the step: the loss is then 0, without a word."""
    attributes = [{"help": 9, "truth": 3}, {"help": 8, "truth": 4}, {"help": 2, "truth": 8}]
    answers = [{"text": f"No {n}.", "score": 5, "attributes": a} for n, a in enumerate(attributes)]
    rows = [json.dumps({"prompt": f"Why {n}?", "responses": answers}) for n in range(4)]
    (tmp_path / "lists.jsonl").write_text("\n".join(rows))
    config = load_config(base={
        "model": {"path": str(tiny_model_dir)},
        "data": {"source": str(tmp_path / "lists.jsonl")},
        "relabel": {"attributes": ["help", "truth"], "score_range": [1, 10], "mapping": "identity"},
        "objective": {"name": "dpo", "lift": "all_pairs"},
        "adapter": {"lora_parameters": {"rank": 2}},
        "reference": {"store": str(tmp_path / "store")},
        "training": {"iters": 1},
        "output": {"adapter_path": str(tmp_path / "run")},
    })  # fmt: skip
    train(config, backend=fake_backend)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)


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


def test_first_two_takes_the_first_response_the_goal_tells_apart() -> None:
    """A list whose two best are equally far from the goal would train nothing."""
    policy = np.array([[-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0]])
    mask = np.ones((3, 3, 1))
    columns = {
        "policy": Logps(policy[..., None], mask),
        "reference": Logps(np.zeros((3, 3, 1)), mask),
        "goal_distances": np.array([[0.0, 1.0, 4.0], [0.0, 0.0, 4.0], [0.0, 0.0, 0.0]]),
    }
    found = resolve_objective({"name": "dpo", "beta": 1.0})(columns)
    expected = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(-3.0)), 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
