"""Formulas that see a whole batch, or carry numbers from batch to batch: laws, states, limits.

Their values and gradients over three batches are compared with the oracle's in ``test_objectives``; that a step
gives them the whole batch is asked of the backends elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from libraries import DIFFERENTIABLE, LIBRARIES, MLX, NUMPY, TORCH, Library, host
from oracle import Example, pair, random_examples
from test_objectives import apply, chain, columns, gradients, losses, near, resolved, slopes, state_of

from mlxpref.objectives import TABLE, resolve_objective
from mlxpref.objectives.batchwise import GroupWeights, MarginWindow, Moments, RunningMean

COUPLED = [name for name, entry in TABLE.items() if entry.batch]
STATEFUL = [name for name, entry in TABLE.items() if entry.start is not None]
SORTED = {"aot", "aot_unpaired"}
"""Their losses stand in order of the batch, not of its rows."""


def grouped(x: Example, group: int) -> Example:
    return replace(x, extras={**x.extras, "groups": group})


def with_mismatched(x: Example, log_ratio: float) -> Example:
    return replace(x, texts={"mismatched": [[log_ratio - 9]]}, texts_reference={"mismatched": [[-9.0]]})


def leaves(state: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.asarray(host(part)) for of in state.values() for part in of]


def test_which_formulas_are_coupled() -> None:
    """Finds: one that a step would feed with pieces of its batch."""
    coupled = {"bco", "kto", "aot", "aot_unpaired", "alpha_dpo", "group_robust", "selfie", "experimental_e_dpo"}
    assert set(COUPLED) == coupled
    assert set(STATEFUL) == {"bco", "alpha_dpo", "group_robust", "selfie"}
    with pytest.raises(TypeError, match="carries a state"):
        resolve_objective("bco")(columns(NUMPY, random_examples(2)))


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COUPLED if name != "selfie"])  # its first batch is DPO
def test_a_batch_is_more_than_its_halves(name: str) -> None:
    """Finds: a formula declared coupled that is not, or a constant taken row by row."""
    xs, options = random_examples(8, seed=61), {"beta": 0.3}
    halves = np.concatenate([losses(NUMPY, name, options, xs[i : i + 4]) for i in (0, 4)])
    assert abs(losses(NUMPY, name, options, xs).mean() - halves.mean()) > 1e-6


@pytest.mark.parametrize("name", COUPLED)
def test_the_order_of_a_batch_does_not_matter(name: str) -> None:
    """Losses go with their rows; where they are sorted, their mean stays. The same for the state, but for the
    window of the last margins."""
    order = [3, 0, 5, 1, 4, 2]
    for xs, _, state in chain(name, {}, NUMPY, n=6, seed=62):
        whole, after = apply(NUMPY, name, {}, xs, state)
        moved, after_moved = apply(NUMPY, name, {}, [xs[i] for i in order], state)
        if name in SORTED:
            np.testing.assert_allclose(moved, whole, rtol=1e-12)
        else:
            np.testing.assert_allclose(moved, whole[order], rtol=1e-10)
        for a, b in zip(leaves(after), leaves(after_moved), strict=True):
            np.testing.assert_allclose(np.sort(a, None), np.sort(b, None), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", COUPLED)
def test_a_batch_that_comes_in_parts_has_the_values_of_the_whole(name: str) -> None:
    """Finds: texts and groups joined wrongly, a state that goes on once a part."""
    xs, objective = random_examples(7, seed=63), resolved(name, {})
    state = state_of(NUMPY, objective)
    whole, after = objective.apply(columns(NUMPY, xs, texts=objective.texts), state)
    for cuts in ((0, 3, 7), (0, 1, 2, 6, 7)):
        parts = [columns(NUMPY, xs[a:b], texts=objective.texts) for a, b in pairwise(cuts)]
        found, after_parts = objective.apply_parts(parts, state)
        assert [len(some) for some in found] == [b - a for a, b in pairwise(cuts)]
        np.testing.assert_allclose(np.concatenate(found), whole, rtol=1e-12)
        for a, b in zip(leaves(after), leaves(after_parts), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_values(library: Library, name: str) -> None:
    """Finds: a state changed in place, one of another shape or kind than it began as, one with a gradient."""
    objective, xs = resolved(name, {}), random_examples(5, seed=64)
    state = state_of(library, objective)
    before = [a.copy() for a in leaves(state)]
    losses_, after = objective.apply(columns(library, xs), state)
    again, _ = objective.apply(columns(library, xs), state)
    np.testing.assert_array_equal(host(losses_), host(again))
    for a, b, c in zip(before, leaves(state), leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == c.shape
    assert type(after[name]) is type(objective.initial_state(n_groups=2)[name])
    if library is TORCH:
        assert not any(part.requires_grad for part in after[name])
    # From step 0 as it is written down, too: Python numbers and NumPy arrays.
    plain, _ = objective.apply(columns(library, xs), objective.initial_state(n_groups=2))
    np.testing.assert_allclose(host(plain), host(losses_), rtol=1e-6)


@pytest.mark.mlx
@pytest.mark.parametrize("name", STATEFUL)
def test_a_compiled_step_carries_the_state(name: str) -> None:
    """Finds: a fill count or a first step that a trace has frozen."""
    import mlx.core as mx

    objective = resolved(name, {})
    step = mx.compile(lambda policy, reference, groups, state: objective.apply(
        {"policy": policy, "reference": reference, "groups": groups}, state))  # fmt: skip
    state = None
    for i, (xs, _, plain) in enumerate(chain(name, {}, MLX, n=6, seed=65)):
        # Batches of one shape, so that the second and third run the trace of the first.
        given = columns(MLX, [*xs], pad=9 - max(len(t) for x in xs for t in x.policy))
        state = plain if state is None else state
        found, state = step(given["policy"], given["reference"], given["groups"], state)
        expected, _ = objective.apply(given, plain)
        np.testing.assert_allclose(host(found), host(expected), rtol=1e-4, err_msg=f"batch {i}")


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("name", STATEFUL)
def test_no_gradient_comes_back_through_a_state(library: Library, name: str) -> None:
    """Two steps in one graph, as nothing stops a program from doing: the first batch is not trained by the second."""
    objective = resolved(name, {})
    first, second = (columns(library, [near(x) for x in random_examples(4, seed=s)]) for s in (66, 67))

    def later(tokens: Any) -> Any:
        policy = type(first["policy"])(tokens, first["policy"].mask)
        _, after = objective.apply({**first, "policy": policy}, state_of(library, objective))
        found, _ = objective.apply(second, after)
        # A term of its own, so that there is something to differentiate where the state is a constant.
        return found.sum() + 0 * tokens.sum()

    (found,) = library.gradients(later, host(first["policy"].tokens), compiled=False)
    np.testing.assert_array_equal(found, 0)


# --- BCO ---------------------------------------------------------------------------------------


def test_bco_takes_the_mean_of_all_rewards_so_far() -> None:
    """Finds: a mean of means, a batch counted after its use, chosen rewards alone."""
    state = {"bco": RunningMean(0.0, 0.0)}
    seen: list[float] = []
    for xs in ([pair(3, -1)], [pair(5, 2), pair(-4, 0)], [pair(1, 1)]):
        seen += [0.1 * (x.policy[k][0] + 100) for x in xs for k in (0, 1)]
        found, state = apply(NUMPY, "bco", {"beta": 0.1}, xs, state)
        delta = sum(seen) / len(seen)
        rewards = [(0.1 * (x.policy[0][0] + 100), 0.1 * (x.policy[1][0] + 100)) for x in xs]
        expected = [math.log1p(math.exp(delta - w)) + math.log1p(math.exp(r - delta)) for w, r in rewards]
        np.testing.assert_allclose(found, expected)
        np.testing.assert_allclose(state["bco"], (delta, len(seen)))


def test_bco_does_not_see_what_all_rewards_share() -> None:
    """A policy that makes every response likelier by the same is no better, nor worse; ``bco_pair`` says otherwise."""
    xs = [pair(3, -1), pair(0, 2)]
    moved = [replace(x, policy=[[t + 7 for t in row] for row in x.policy]) for x in xs]
    for name, same in (("bco", True), ("bco_pair", False)):
        own, other = (losses(NUMPY, name, {"beta": 0.1}, some) for some in (xs, moved))
        assert np.allclose(own, other, rtol=1e-10) is same


def test_bco_around_a_mean_of_zero_is_bco_pair() -> None:
    xs = [pair(3, -3), pair(-1, 1)]
    np.testing.assert_allclose(losses(NUMPY, "bco", {"beta": 0.3}, xs), losses(NUMPY, "bco_pair", {"beta": 0.3}, xs))


# --- KTO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_ratios", [(-3.0, 1.0), (-1.0, -2.0), (0.0, 0.0)])
def test_kto_with_a_mean_at_or_below_zero_is_apo_zero(log_ratios: Sequence[float]) -> None:
    """Finds: a clamp of each text instead of their mean: −3 and 1 average below 0."""
    xs = [with_mismatched(x, a) for x, a in zip((pair(2, -1), pair(0, 3)), log_ratios, strict=True)]
    np.testing.assert_allclose(losses(NUMPY, "kto", {}, xs), losses(NUMPY, "apo_zero", {}, xs), rtol=1e-12)


def test_kto_measures_each_response_against_the_mean() -> None:
    """K = 2 of −1 and 5; a chosen response is judged by a − K, a rejected one by K − a."""
    xs = [with_mismatched(x, a) for x, a in zip((pair(2, -1), pair(0, 3)), (-1.0, 5.0), strict=True)]
    options = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.5}

    def expected(a_w: float, a_l: float) -> float:
        return 1.3 / (1 + math.exp(0.1 * (a_w - 2))) + 0.5 / (1 + math.exp(0.1 * (2 - a_l)))

    np.testing.assert_allclose(losses(NUMPY, "kto", options, xs), [expected(2, -1), expected(0, 3)])


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_kto_does_not_train_the_mismatched_texts(library: Library) -> None:
    xs = [with_mismatched(x, a) for x, a in zip((pair(2, -1), pair(0, 3)), (4.0, 5.0), strict=True)]
    found, _ = slopes(library, "kto", {}, xs)
    assert not found[:, 2].any() and (found[:, :2, 0] != 0).all()


# --- AOT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SORTED))
@pytest.mark.parametrize("options", [{"beta": 0.1}, {"beta": 0.1, "label_smoothing": 0.2}])
def test_aot_of_one_pair_is_dpo(name: str, options: Mapping[str, float]) -> None:
    for x in random_examples(4, seed=68):
        np.testing.assert_allclose(losses(NUMPY, name, options, [x]), losses(NUMPY, "dpo", options, [x]), rtol=1e-12)


def test_aot_does_not_see_which_margin_belongs_to_which() -> None:
    """Paired: references may change places between pairs. Unpaired: rejected responses may, with their references."""
    xs = random_examples(6, seed=69)
    turned = [*xs[1:], xs[0]]
    references = [replace(x, policy=x.policy, reference=y.reference) for x, y in zip(xs, turned, strict=True)]
    lengths = [[len(t) for t in x.policy] for x in xs]
    # Margins only: each reference is as long as the response it stands beside.
    even = [
        replace(x, reference=[[math.fsum(t) / n] * n for t, n in zip(x.reference, ns, strict=True)])
        for x, ns in zip(references, lengths, strict=True)
    ]
    np.testing.assert_allclose(losses(NUMPY, "aot", {}, even), losses(NUMPY, "aot", {}, xs), rtol=1e-12)
    others = [
        replace(x, policy=[x.policy[0], y.policy[1]], reference=[x.reference[0], y.reference[1]])
        for x, y in zip(xs, turned, strict=True)
    ]
    np.testing.assert_allclose(losses(NUMPY, "aot_unpaired", {}, others), losses(NUMPY, "aot_unpaired", {}, xs))
    assert np.abs(losses(NUMPY, "aot", {}, others) - losses(NUMPY, "aot", {}, xs)).max() > 1e-4


def test_aot_compares_sorted_with_sorted() -> None:
    """Margins 4 and −1 of the policy against 0 and 2 of the reference: −1 with 0 and 4 with 2."""
    xs = [
        Example([[-1.0], [-5.0]], [[-3.0], [-3.0]]),
        Example([[-3.0], [-2.0]], [[-2.0], [-4.0]]),
    ]
    expected = [math.log1p(math.exp(-0.1 * z)) for z in (-1 - 0, 4 - 2)]
    np.testing.assert_allclose(losses(NUMPY, "aot", {"beta": 0.1}, xs), expected)


# --- α-DPO -------------------------------------------------------------------------------------


def test_alpha_dpo_without_alpha_is_simpo() -> None:
    xs = random_examples(6, seed=70)
    np.testing.assert_allclose(
        losses(NUMPY, "alpha_dpo", {"alpha": 0.0, "gamma": 0.9}, xs),
        losses(NUMPY, "simpo", {"beta": 2.5, "gamma": 0.9}, xs),
        rtol=1e-12,
    )


def test_alpha_dpo_normalises_over_the_first_batch_and_averages_after() -> None:
    """Finds: averages that begin at 0, a batch counted after its use, a standard deviation of B − 1."""
    options = {"beta": 2.0, "gamma": 0.4, "alpha": 0.5, "decay": 0.75}
    state: dict[str, Any] = {"alpha_dpo": Moments()}
    centre = std = 0.0
    for i, margins in enumerate(((1.0, 3.0), (0.0, 0.0), (5.0, 1.0))):
        xs = [Example([[m - 8], [-8.0]], [[-8.0], [-8.0]]) for m in margins]
        mean, spread = float(np.mean(margins)), float(np.std(margins))
        centre = mean if i == 0 else 0.75 * centre + 0.25 * mean
        std = spread if i == 0 else 0.75 * std + 0.25 * spread
        found, state = apply(NUMPY, "alpha_dpo", options, xs, state)
        stars = (np.array(margins) - centre) / std
        expected = np.logaddexp(0, -(2.0 * (np.array(margins) - 0.5 * stars) - 0.4))
        np.testing.assert_allclose(found, expected)
        np.testing.assert_allclose(state["alpha_dpo"], (centre, std, 1.0))


@pytest.mark.parametrize("library", LIBRARIES)
def test_alpha_dpo_of_equal_margins_stays_finite(library: Library) -> None:
    """Step 0 of LoRA: all margins are 0, and so is their spread."""
    xs = [replace(x, policy=x.reference) for x in random_examples(4, seed=71)]
    np.testing.assert_allclose(
        losses(library, "alpha_dpo", {"gamma": 0.9}, xs),
        losses(library, "simpo", {"beta": 2.5, "gamma": 0.9}, xs),
        rtol=1e-6,
    )
    if library is not NUMPY:
        assert np.isfinite(slopes(library, "alpha_dpo", {}, xs)[0]).all()


# --- group-robust ------------------------------------------------------------------------------


def test_one_group_has_the_loss_of_its_pairs() -> None:
    xs = [grouped(x, 0) for x in random_examples(5, seed=72)]
    objective = resolve_objective("group_robust")
    found, after = objective.apply(columns(NUMPY, xs), objective.initial_state(n_groups=1))
    np.testing.assert_allclose(found, losses(NUMPY, "dpo", {}, xs), rtol=1e-12)
    np.testing.assert_allclose(after["group_robust"].q, [1.0])


def test_groups_with_equal_losses_keep_their_weights() -> None:
    xs = [grouped(pair(2, 0), g) for g in (0, 1, 1)]
    state = {"group_robust": GroupWeights(np.array([0.3, 0.7]))}
    _, after = apply(NUMPY, "group_robust", {"eta": 5.0}, xs, state)
    np.testing.assert_allclose(after["group_robust"].q, [0.3, 0.7])


def test_the_worse_group_gains_weight() -> None:
    """q ∝ q·e^(ηL), used once updated; a group that is absent keeps its weight but for the normalisation."""
    xs = [grouped(pair(20, 0), 0), grouped(pair(-20, 0), 1), grouped(pair(-10, 0), 1)]
    plain = losses(NUMPY, "dpo", {}, xs)
    start = np.array([0.2, 0.3, 0.5])
    grown = start * np.exp(0.7 * np.array([plain[0], plain[1:].mean(), 0.0]))
    q = grown / grown.sum()
    found, after = apply(NUMPY, "group_robust", {"eta": 0.7}, xs, {"group_robust": GroupWeights(start)})
    np.testing.assert_allclose(after["group_robust"].q, q)
    np.testing.assert_allclose(found.mean(), q[0] * plain[0] + q[1] * plain[1:].mean())
    np.testing.assert_allclose(found, plain * np.array([q[0] * 3, q[1] * 1.5, q[1] * 1.5]))


def test_eta_zero_keeps_the_groups_equal_and_ipo_is_inside_as_well() -> None:
    xs = [grouped(x, i % 2) for i, x in enumerate(random_examples(4, seed=73))]
    options = {"eta": 0.0, "loss_type": "ipo", "beta": 0.5}
    np.testing.assert_allclose(
        losses(NUMPY, "group_robust", options, xs), losses(NUMPY, "ipo", {"beta": 0.5}, xs), rtol=1e-12
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_group_all_but_lost_does_not_break_the_others(library: Library) -> None:
    """Finds: log 0, and weights that overflow: IPO's losses are thousands."""
    xs = [grouped(pair(-40, 20), 0), grouped(pair(0, 0), 1)]
    state = {"group_robust": GroupWeights(library.array([1.0, 0.0]))}
    options = {"eta": 1.0, "loss_type": "ipo", "beta": 0.01}
    found, after = apply(library, "group_robust", options, xs, state)
    assert np.isfinite(found).all() and host(after["group_robust"].q).sum() == pytest.approx(1)
    if library is not NUMPY:
        assert np.isfinite(gradients(library, "group_robust", options, xs, ["policy"], state)[0]).all()


# --- Selfie ------------------------------------------------------------------------------------


def window(values: Sequence[float]) -> MarginWindow:
    """A state that has seen these margins, the last 50 of them."""
    kept = list(values)[-50:]
    return MarginWindow(np.array([0.0] * (50 - len(kept)) + kept), float(len(kept)), 1.0)


@pytest.mark.parametrize("n_seen", [1, 2, 7, 49, 50, 120])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("library", LIBRARIES)
def test_selfie_doubts_margins_up_to_the_quantile_of_the_last_fifty(
    library: Library, n_seen: int, share: float
) -> None:
    """NumPy's own quantile is the witness. Finds: zeros of an unfilled window counted, a quantile of a neighbour."""
    rng = np.random.default_rng(n_seen)
    seen = rng.normal(0, 5, n_seen)
    at = float(np.quantile(seen[-50:], share))
    xs = [pair(at + 1e-3, 0), pair(at - 1e-3, 0), pair(at + 9, 0), pair(at - 9, 0)]
    state = {"selfie": MarginWindow(*map(library.array, window(seen.tolist())))}
    found, _ = apply(library, "selfie", {"alpha": 0.3, "quantile": share}, xs, state)
    sure, doubted = (losses(library, "dpo", {"label_smoothing": e}, xs) for e in (0.0, 0.3))
    np.testing.assert_allclose(found, [sure[0], doubted[1], sure[2], doubted[3]], rtol=1e-6)


def test_selfie_is_sure_of_a_margin_above_and_not_of_one_at_the_quantile() -> None:
    """z = 1 iff Δ > Q."""
    state = {"selfie": window([2.0])}
    found, _ = apply(NUMPY, "selfie", {"alpha": 0.3}, [pair(2.0, 0.0)], state)
    np.testing.assert_allclose(found, losses(NUMPY, "dpo", {"label_smoothing": 0.3}, [pair(2.0, 0.0)]))


def test_selfie_waits_and_remembers() -> None:
    """Nothing seen, or too early: DPO. Margins come in after the losses, in the order of the rows, the last 50."""
    objective = resolve_objective({"name": "selfie", "alpha": 0.3, "quantile": 1.0, "after": 2})
    state, margins = objective.initial_state(), list[float]()
    for i, n in enumerate((4, 3, 5, 60, 2)):
        xs = [pair(float((7 * i + j) % 11), 0.0) for j in range(n)]
        found, state = objective.apply(columns(NUMPY, xs), state)
        largest = max(margins[-50:], default=-math.inf) if i >= 2 else -math.inf
        margins += [(7 * i + j) % 11 for j in range(n)]
        expected = [losses(NUMPY, "dpo", {"label_smoothing": 0.3 * (x.policy[0][0] + 100 <= largest)}, [x]) for x in xs]
        np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-9)
        kept = margins[-50:]
        np.testing.assert_allclose(state["selfie"].margins[50 - len(kept) :], kept)
        assert (state["selfie"].seen, state["selfie"].step) == (len(kept), i + 1)


# --- ensembles ---------------------------------------------------------------------------------


def ensemble(a: float, *gaps: float) -> Example:
    return replace(pair(a, 0), extras={"attributes": [list(gaps), [0.0] * len(gaps)]})


@pytest.mark.parametrize("library", LIBRARIES)
def test_e_dpo_lies_between_the_nearest_model_and_the_mean_of_all(library: Library) -> None:
    """τ → 0 and τ → ∞; the minimum is over the whole batch. Finds: a soft minimum that loses digits at either end."""
    xs = [ensemble(10, 2, 1), ensemble(20, 2, 4)]  # D = ½ and 2
    for tau, expected in ((1e-4, 0.5), (1e5, 1.25), (1.0, -math.log((math.exp(-0.5) + math.exp(-2)) / 2))):
        found = losses(library, "experimental_e_dpo", {"tau": tau}, xs)
        np.testing.assert_allclose(found, [expected] * 2, rtol=3e-4)


def test_e_dpo_of_one_model_is_the_mean_of_the_distilled_losses() -> None:
    xs = [replace(x, extras={"attributes": [[s] for s in x.scores]}) for x in random_examples(5, seed=74)]
    for tau in (0.1, 3.0):
        found = losses(NUMPY, "experimental_e_dpo", {"tau": tau, "eta": 0.3}, xs)
        np.testing.assert_allclose(found, losses(NUMPY, "distilled_dpo", {"eta": 0.3}, xs).mean(), rtol=1e-12)


def test_e_dpo_pessimism_is_the_likelihood_of_both_responses() -> None:
    xs = [ensemble(10, 2, 1), ensemble(20, 2, 4)]
    more = losses(NUMPY, "experimental_e_dpo", {"gamma": 0.2}, xs) - losses(NUMPY, "experimental_e_dpo", {}, xs)
    np.testing.assert_allclose(more, [0.1 * (90 + 100), 0.1 * (80 + 100)])
