"""``weighting: wpo``: what it multiplies by, and that it is a constant, for every formula of pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from libraries import DIFFERENTIABLE, FLOAT32, LIBRARIES, NUMPY, TORCH, Library, host
from oracle import ORACLE, Example, random_examples, wpo_weights
from test_objectives import apply, columns, gradients, losses, near, resolved

from mlxpref.errors import ObjectiveError
from mlxpref.objectives import TABLE, resolve_objective

WPO = {"weighting": "wpo"}
PAIRS = [name for name, entry in TABLE.items() if not entry.lists and not entry.batch]


def with_overlap(x: Example, overlap: Any) -> Example:
    return replace(x, extras={**x.extras, "overlap": overlap})


XS = [near(x) for x in random_examples(6, seed=51)]
XS[1::2] = [with_overlap(x, [[t - 1.5 for t in row] for row in x.extras["overlap"]]) for x in XS[1::2]]


def test_every_formula_of_single_pairs_can_be_weighted_and_no_other() -> None:
    """Losses of a sorted batch belong to no row, so none of its coupled kind has a weight."""
    assert [name for name, entry in TABLE.items() if "weighting" in entry.schema["properties"]] == PAIRS
    assert "aot" not in PAIRS and "sft" not in PAIRS
    for name in ("aot", "kto", "list_mle"):
        with pytest.raises(ObjectiveError, match="takes no option weighting"):
            resolve_objective({"name": name, **WPO})
    assert resolve_objective({"name": "dpo", **WPO}).needs == {"reference", "overlap"}
    assert "overlap" not in resolve_objective("dpo").needs


@pytest.mark.parametrize("library", [*LIBRARIES, FLOAT32[1]])
@pytest.mark.parametrize("name", PAIRS)
def test_each_loss_is_multiplied_by_the_weights_of_its_pair(library: Library, name: str) -> None:
    """Finds: a sum for a mean over tokens, the weight of one response only, rows or texts mixed up."""
    weights = [wpo_weights(x) for x in XS]
    expected = np.array(weights) * ORACLE[name].run(XS, {})[0]
    single = library not in (NUMPY, TORCH)
    tolerance: dict[str, Any] = (
        {"rtol": 0, "atol": 1e-5 * np.abs(expected).max()} if single else {"rtol": 1e-9, "atol": 1e-12}
    )
    np.testing.assert_allclose(losses(library, name, WPO, XS), expected, **tolerance)
    assert max(weights) > 1.01 and min(weights) < 0.99


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "apo_down", "bco_pair", "selm"])
def test_the_weights_are_constants(library: Library, name: str) -> None:
    """The slope is the weight times the loss's own, and none goes to the overlap."""
    of_policy, of_overlap = gradients(library, name, WPO, XS, ["policy", "overlap"])
    (plain,) = gradients(library, name, {}, XS, ["policy"])
    expected = np.array([wpo_weights(x) for x in XS])[:, None, None] * plain
    np.testing.assert_allclose(of_policy, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(of_overlap, 0)


def log_sum_of_squares(logits: np.ndarray) -> float:
    """log Σ_v π(v)²."""
    p = np.exp(logits - np.logaddexp.reduce(logits))
    return float(np.log((p**2).sum()))


def said_by(logits: np.ndarray, token: int) -> Example:
    """Both responses two tokens long, every token this one of this distribution."""
    own = float(logits[token] - np.logaddexp.reduce(logits))
    (x,) = random_examples(1, seed=52)
    x = replace(x, policy=[[own] * 2] * 2, reference=[[-1.0] * 2] * 2)
    return with_overlap(x, [[log_sum_of_squares(logits)] * 2] * 2)


@pytest.mark.parametrize(
    "logits, token, weight",
    [
        (np.zeros(7), 3, 1.0),  # uniform
        (np.array([0.0, -200.0, -200.0]), 0, 1.0),  # one-hot on the token
        (np.log([0.5, 0.3, 0.2]), 0, (0.5 / 0.38) ** 2),  # likelier than a draw is on average
        (np.log([0.5, 0.3, 0.2]), 2, (0.2 / 0.38) ** 2),
    ],
)
def test_weights_of_known_distributions(logits: np.ndarray, token: int, weight: float) -> None:
    """Finds: Σπ² not taken, or taken of logits."""
    x = said_by(logits, token)
    found = losses(NUMPY, "dpo", WPO, [x])[0] / losses(NUMPY, "dpo", {}, [x])[0]
    assert found == pytest.approx(weight)
    assert wpo_weights(x) == pytest.approx(weight)


def test_both_responses_count_each_by_its_own_mean() -> None:
    (x,) = random_examples(1, seed=53)
    x = replace(x, policy=[[-1.0, -2.0], [-0.5]], reference=[[-1.0, -2.0], [-0.5]])
    x = with_overlap(x, [[-0.8, -1.2], [-0.9]])
    found = losses(NUMPY, "dpo", WPO, [x])[0]
    assert found == pytest.approx(math.log(2) * math.exp((-3.0 + 2.0) / 2) * math.exp(0.4))


def test_pad_columns_do_not_weigh() -> None:
    objective = resolved("dpo", WPO)
    wide = columns(NUMPY, XS, pad=3)
    np.testing.assert_allclose(objective(wide), objective(columns(NUMPY, XS)), rtol=1e-12)
    dirty = {**wide, "overlap": wide["overlap"] - 5.0 * (1 - wide["policy"].mask)}
    np.testing.assert_allclose(objective(dirty), objective(columns(NUMPY, XS)), rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("lift, pairs", [("best_worst", [(0, 2)]), ("best_rest", [(0, 1), (0, 2)])])
def test_lists_are_weighted_pair_by_pair(library: Library, lift: str, pairs: list[tuple[int, int]]) -> None:
    """Finds: the weights of the list's first two for all its pairs, or of the mean of its losses."""
    lists = random_examples(5, k=3, seed=54)

    def weighted(x: Example, i: int, j: int) -> float:
        of = replace(x, policy=[x.policy[i], x.policy[j]], reference=[x.reference[i], x.reference[j]])
        of = with_overlap(of, [x.extras["overlap"][i], x.extras["overlap"][j]])
        return wpo_weights(of) * ORACLE["dpo"].loss(of)

    expected = [sum(weighted(x, i, j) for i, j in pairs) / len(pairs) for x in lists]
    np.testing.assert_allclose(losses(library, "dpo", {**WPO, "lift": lift}, lists), expected, rtol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_in_a_mixture_only_the_formula_that_asks_is_weighted(library: Library) -> None:
    mixture = resolve_objective([{"name": "dpo", **WPO}, {"name": "sft", "weight": 0.5}, {"name": "ipo", "weight": 2}])
    found = host(mixture(columns(library, XS)))
    expected = [
        wpo_weights(x) * ORACLE["dpo"].loss(x) + 0.5 * ORACLE["sft"].loss(x) + 2 * ORACLE["ipo"].loss(x) for x in XS
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert mixture.needs == {"reference", "overlap"}
    assert resolve_objective(mixture.spec).spec == mixture.spec


@pytest.mark.parametrize("library", LIBRARIES)
def test_further_texts_do_not_weigh(library: Library) -> None:
    """A step computes the overlap for the rows of texts, too; the pair's are the first two."""
    objective = resolved("selm", WPO)
    given = columns(library, XS, texts=objective.texts)
    more = np.concatenate([host(given["overlap"]), np.full((len(XS), 1, given["overlap"].shape[2]), -9.0)], 1)
    found = objective({**given, "overlap": library.array(more)})
    np.testing.assert_allclose(host(found), apply(library, "selm", WPO, XS)[0], rtol=1e-6)
