"""What the other tests of objectives let through when single faults were put into the formulas (docs/mutation.md)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from libraries import NUMPY, TORCH32
from oracle import ORACLE, Example, pair, random_examples, responses
from pydantic import ValidationError
from test_objectives import apply, columns, gradients, losses

from mlxpref.errors import ObjectiveError
from mlxpref.objectives import TABLE, Objective, check_widths, resolve_objective
from mlxpref.objectives.batchwise import GroupWeights
from mlxpref.objectives.mixture import Term
from mlxpref.objectives.registry import Positive, TextLogps, read_declaration
from mlxpref.objectives.scored import modpo
from mlxpref.records import Logps

# --- ranges of options -------------------------------------------------------------------------

RANGES = {
    "above 0": ((1e-9, 1e6), (0.0, -1e-9)),
    "from 0": ((0.0, 1e6), (-1e-9,)),
    "from 0 to 1": ((0.0, 1.0), (-1e-9, 1 + 1e-9)),
    "from 0, below 1": ((0.0, 1 - 1e-9), (-1e-9, 1.0)),
    "above 0, to 1": ((1e-9, 1.0), (0.0, 1 + 1e-9)),
    "from 0, below a half": ((0.0, 0.5 - 1e-9), (-1e-9, 0.5)),
    "above 0, below a half": ((1e-9, 0.5 - 1e-9), (0.0, 0.5)),
    "from 0, below 1 / log 2": ((0.0, 1.4426), (-1e-9, 1 / math.log(2))),
    "whole, from 0": ((0, 7), (-1, 0.5)),
    "from 0.001": ((1e-3, 1e6), (1e-3 - 1e-9, 0.0)),
    "any": ((-1e6, 1e6), (math.inf, -math.inf)),
}
"""Range → what it takes and what it refuses, as near to its ends as can be."""

OPTIONS = {
    "above 0": """
        dpo.beta robust.beta ipo.beta ipo_norm.beta hinge.beta ln_dpo.beta r_dpo.beta exo_pair.beta discopop.beta
        discopop.tau focalpo.beta bco.beta kto.beta aot.beta aot_unpaired.beta alpha_dpo.beta group_robust.beta
        selfie.beta simpo.beta alphapo.beta cpo.beta slic.beta slic.delta triple_po.beta poft.beta lipo.beta
        list_mle.beta experimental_info_nca.beta experimental_info_nca.alpha experimental_nca.beta
        experimental_nca.alpha experimental_tree_tpo.beta f_dpo.beta dpop.beta rpo.beta nca_pair.beta bco_pair.beta
        apo_zero.beta apo_down.beta sppo.beta sppo_hard.beta minor_dpo.beta flex_dpo.beta_chosen
        flex_dpo.beta_rejected distilled_dpo.beta distilled_dpo.eta reward_aware.beta reward_aware.eta
        soft_label_dpo.beta soft_label_dpo.eta odpo.beta mm_dpo.k modpo.beta cream.beta
        experimental_e_dpo.beta experimental_e_dpo.eta experimental_e_dpo.tau rationale_dpo.beta dove.beta selm.beta
        xpo.beta experimental_vpo.beta inpo.eta ld_dpo.beta d2po.beta mcts_dpo.beta experimental_mapo.beta
    """,
    "from 0": """
        r_dpo.alpha kto.desirable_weight kto.undesirable_weight alpha_dpo.gamma alpha_dpo.alpha group_robust.eta
        simpo.gamma alphapo.gamma cpo.alpha orpo.beta slic.sft_weight triple_po.alpha triple_po.gamma pro.sft
        f_dpo.alpha dpop.penalty rpo.eta reward_aware.sft_weight odpo.alpha mm_dpo.w experimental_e_dpo.gamma
        rationale_dpo.gamma rationale_orpo.beta rationale_orpo.gamma selm.alpha xpo.alpha experimental_vpo.alpha
        inpo.tau
    """,
    "from 0 to 1": "selfie.quantile ld_dpo.alpha",
    "from 0, below 1": "alpha_dpo.decay",
    "above 0, to 1": "d2po.gamma",
    "from 0, below a half": """
        dpo.label_smoothing robust.label_smoothing aot.label_smoothing aot_unpaired.label_smoothing
        simpo.label_smoothing selfie.alpha
    """,
    "above 0, below a half": "exo_pair.label_smoothing",
    "from 0, below 1 / log 2": "focalpo.gamma",
    "whole, from 0": "selfie.after",
    "from 0.001": "mm_dpo.beta",
    "any": "alphapo.alpha poft.gamma",
}


def test_every_number_has_a_range_here() -> None:
    numbers = {
        f"{entry.name}.{option.name}"
        for entry in TABLE.values()
        for option in entry.options.values()
        if type(option.default) in (int, float)
    }
    listed = [option for options in OPTIONS.values() for option in options.split()]
    assert numbers == set(listed) and len(listed) == len(numbers)


@pytest.mark.parametrize("ends, option", [(ends, o) for ends, options in OPTIONS.items() for o in options.split()])
def test_options_take_their_range_and_no_more(ends: str, option: str) -> None:
    """Finds: a limit that is left out, or that is in where it should be out; β = 0 divides by 0, or trains nothing."""
    name, _, key = option.partition(".")
    taken, refused = RANGES[ends]
    for number in taken:
        assert getattr(TABLE[name].model(**{key: number}), key) == number
    for number in refused:
        with pytest.raises(ValidationError):
            TABLE[name].model(**{key: number})


# --- bounds within formulas --------------------------------------------------------------------

CUT = math.exp(80)
"""Where exponents are cut: beyond it float32 overflows."""


@pytest.mark.parametrize(
    "name, options, x, expected",
    [
        # m e^-z = exp(log σ(z/τ) − z) = e^(−30 + 300) before the cut.
        ("discopop", {"beta": 1.0, "tau": 10.0}, pair(-300, 0), CUT),
        ("f_dpo", {"beta": 0.5, "divergence": "forward_kl"}, pair(-200, 0), 0.5 * CUT),
        ("f_dpo", {"beta": 0.5, "divergence": "alpha", "alpha": 3.0}, pair(0, 200), 0.5 * CUT / 2),
        ("alphapo", {"beta": 0.5, "gamma": 0.0, "alpha": 1.0}, Example([[-200.0], [0.0]], [[0.0]] * 2), 0.5 * CUT),
    ],
)
def test_exponents_are_cut_at_eighty(name: str, options: dict[str, float], x: Example, expected: float) -> None:
    """Finds: a cut left out, which float32 notices only for options that no other test takes, or another cut."""
    assert losses(NUMPY, name, options, [x])[0] == pytest.approx(expected, rel=1e-9)
    assert np.isfinite(losses(TORCH32, name, options, [x])).all()
    assert np.isfinite(gradients(TORCH32, name, options, [x], ["policy"])[0]).all()


def test_odds_of_a_certain_response_are_those_of_a_millionth_less() -> None:
    """ORPO at m = 0 for one response only. Finds: another clamp, which two certain responses hide."""
    x = Example([[0.0], [-1.0]], [[0.0], [0.0]])
    certain, other = 13.8155105, -math.log(math.e - 1)
    expected = math.log1p(math.exp(other - certain))
    assert losses(NUMPY, "orpo", {"beta": 1.0}, [x])[0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js"])
def test_f_dpo_refuses_an_alpha_that_would_do_nothing(divergence: str) -> None:
    with pytest.raises(ObjectiveError, match=r"alpha = 0\.3 acts only with divergence alpha"):
        resolve_objective({"name": "f_dpo", "divergence": divergence, "alpha": 0.3})
    assert resolve_objective({"name": "f_dpo", "divergence": "alpha", "alpha": 0.3}).options["alpha"] == 0.3


@pytest.mark.parametrize("weights", [(1.5, -0.5), (0.5, 0.5 + 1.5e-6), (0.5, 0.5 - 1.5e-6)])
def test_modpo_itself_refuses_weights_that_are_no_shares(weights: tuple[float, ...]) -> None:
    """For callers that pass by the options' own ranges."""
    given = columns(NUMPY, random_examples(2))
    with pytest.raises(ValueError, match=r"shares, ≥ 0, that sum to 1"):
        modpo(given["policy"], given["reference"], given["margin_rewards"], weights=weights)


def test_mm_dpo_takes_the_size_of_the_gap() -> None:
    """A gap below 0, as between attributes that contradict the order, weighs as much as one above."""
    one, other = (losses(NUMPY, "mm_dpo", {}, [pair(3, -1, scores)]) for scores in ((8, 5.5), (5.5, 8)))
    np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("name", ["experimental_info_nca", "experimental_nca"])
def test_shares_of_large_scores_keep_their_digits(name: str) -> None:
    """Finds: scores of thousands divided by α before their largest is taken off, which float32 rounds."""
    scores = (10000.25, 10000.0, 9999.5)
    xs = [responses((2.0, -1.0, 0.5), tuple(s - by for s in scores)) for by in (0.0, 9999.0)]
    for x in xs:
        (got,) = losses(TORCH32, name, {"beta": 1.0, "alpha": 0.3}, [x])
        assert got == pytest.approx(ORACLE[name].loss(xs[1], beta=1.0, alpha=0.3), rel=1e-5)


def test_alpha_dpo_divides_by_a_spread_of_a_millionth_and_more() -> None:
    """Finds: another least spread. Margins of ±1.5e-6 are one standard deviation from their mean, ±0.5e-6 half."""
    for size, deviations in ((1.5e-6, 1.0), (0.5e-6, 0.5)):
        xs = [Example([[by - 2.0], [-2.0]], [[-2.0], [-2.0]]) for by in (size, -size)]
        found = losses(NUMPY, "alpha_dpo", {"beta": 2.5, "gamma": 0.0, "alpha": 0.2}, xs)
        expected = [math.log1p(math.exp(2.5 * by)) for by in (0.2 * deviations, -0.2 * deviations)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_group_robust_reads_a_lost_weight_as_the_least() -> None:
    xs = [replace(x, extras={**x.extras, "groups": i % 2}) for i, x in enumerate(random_examples(4))]
    state = {"group_robust": GroupWeights(np.array([1.0, 0.0]))}
    _, after = apply(NUMPY, "group_robust", {"eta": 0.0}, xs, state)
    np.testing.assert_allclose(after["group_robust"].q, [1.0, 1e-30], rtol=1e-9)


# --- lists, and how a configuration is refused -------------------------------------------------


def test_first_two_takes_one_pair_of_a_long_list() -> None:
    """Finds: every response told apart counted, and not the first alone; lists of three cannot tell."""
    xs = [Example([[-1.0], [-2.0], [-4.0], [-8.0]], [[0.0]] * 4)] * 4
    given = columns(NUMPY, [replace(x, scores=(0, 0, 0, 0)) for x in xs])
    given["goal_distances"] = np.array([[0, 0, 1, 4], [0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 0, 4]], float)
    found = resolve_objective({"name": "dpo", "beta": 1.0})(given)
    np.testing.assert_allclose(found, [math.log1p(math.exp(-gap)) for gap in (3, 7, 1, 1)], rtol=1e-12)


@pytest.mark.parametrize(
    "spec, said",
    [
        ({"name": "dpo", "bata": 0.2}, r"did you mean beta\?"),  # near, and no beginning of it
        ({"name": "dpo", "Label-Smoothing": 0.2}, r"did you mean label_smoothing\?"),
        ({"name": "dpo", "label_smoothing_rate": 0.2}, r"did you mean label_smoothing\?"),
        ({"name": "dpo", "label": 0.2}, r"did you mean label_smoothing\?"),  # no nearer than its beginning
        ({"name": "reward_aware", "sft-weight-of-the-chosen-response": 1}, r"did you mean sft_weight\?"),
        ({"name": "flex_dpo", "beta": 1}, r"did you mean beta_chosen\? \(beta_chosen: .*chosen"),
        ({"name": "dpo", "xyzzy": 1}, r"dpo takes no option xyzzy\n"),
        ({"name": "inpo", "eta": 1e-3, "tau": 2e-3}, r"inpo: tau 0\.002 is above eta 0\.001"),
        ("DPO", r"did you mean dpo\?$"),
        ("ln-dpo", r"did you mean ln_dpo\?$"),
        ("Sigmoid Norm", r"did you mean ln_dpo\?"),
        ("wxyz", r"wxyz: no such objective. There are: dpo, robust"),
        ({"name": "modpo", "weights": (1.5, -0.5)}, r"weights: \(1\.5, -0\.5\) should be"),
        ({"name": "selfie", "after": True}, r"after: True is not a number \(int ≥ 0, default 0\)"),
    ],
)
def test_what_is_refused_names_what_would_be_right(spec: Any, said: str) -> None:
    with pytest.raises(ObjectiveError, match=said):
        resolve_objective(spec)


def test_a_refusal_is_told_once() -> None:
    """Finds: a truth value for a number told again as out of range; more or fewer names than three."""
    with pytest.raises(ObjectiveError) as caught:
        resolve_objective({"name": "dpo", "label_smoothing": True})
    assert str(caught.value).count("label_smoothing:") == 1
    with pytest.raises(ObjectiveError) as caught:
        resolve_objective([{"name": "dpo", "weight": 0}, "dpoo"])
    assert "weight" not in str(caught.value)
    with pytest.raises(ObjectiveError, match=r"did you mean \w+ or \w+ or \w+\?"):
        resolve_objective("dpoo")


def test_a_truth_value_is_taken_where_one_is_asked_for() -> None:
    assert resolve_objective({"name": "triple_po", "length_normalized": True}).options["length_normalized"] is True


# --- columns and states ------------------------------------------------------------------------


def test_widths_of_the_data_are_tried_with_the_options() -> None:
    modpo_of_one = resolve_objective(["sft", {"name": "modpo", "weights": (0.5, 0.5)}])
    for fits in ({}, {"margin_rewards": 0}, {"margin_rewards": 1}, {"attributes": 3}):
        check_widths(modpo_of_one, fits)
    with pytest.raises(ObjectiveError, match=r"fit the objective sft \+ modpo:\s.*modpo: .*2 margin rewards need 3"):
        check_widths(modpo_of_one, {"margin_rewards": 2})


def test_what_an_objective_reads() -> None:
    """Finds: ties that lists leave out, or a reference, that a step is not asked to hand over."""
    assert resolve_objective("dpo").reads == {"reference", "goal_distances"}
    assert resolve_objective("sft").reads == frozenset()
    assert resolve_objective(["sft", "simpo"]).reads == {"goal_distances"}
    assert resolve_objective("lipo").reads == {"reference", "scores"}


def test_what_of_it_the_data_must_hold() -> None:
    """Finds: a column asked of the data that the model or the reference pass supplies, or one not asked for."""
    held = {
        "dpo": set(), "sft": set(), "odpo": {"scores"}, "experimental_mapo": set(), "kto": {"mismatched"},
        "mcts_dpo": {"divergence", "confidence"}, "group_robust": {"groups"}, "dove": {"instructions"},
    }  # fmt: skip
    for name, columns_ in held.items():
        assert resolve_objective(name).from_data == columns_, name
    assert resolve_objective({"name": "odpo", "weighting": "wpo"}).from_data == {"scores"}


def test_the_name_says_what_is_weighted_how() -> None:
    mixture = resolve_objective([{"name": "dpo", "weighting": "wpo"}, {"name": "sft", "weight": 0.5}, "simpo"])
    assert mixture.name == "dpo (wpo) + 0.5 sft + simpo"


def test_one_coupled_formula_couples_a_mixture() -> None:
    mixture = resolve_objective(["sft", "aot", "bco"])
    assert mixture.coupled and mixture.stateful
    assert not resolve_objective(["sft", "dpo"]).coupled and not resolve_objective(["sft", "aot"]).stateful


@pytest.mark.parametrize("name", TABLE)
def test_what_is_written_down_is_read_again(name: str) -> None:
    """Finds: an option in ``spec``, as a run keeps it, that the formula does not take."""
    objective = resolve_objective(name)
    assert resolve_objective(objective.spec) == objective


def test_parts_of_lists_of_different_lengths() -> None:
    """Finds: losses of examples computed as those of a whole batch, whose lists are then read as pairs."""
    mixture = resolve_objective([{"name": "dpo", "lift": "all_pairs"}, "aot"])
    parts = [columns(NUMPY, random_examples(3, k=k, seed=93)) for k in (3, 4)]
    found = mixture.apply_parts(parts, {})[0]
    coupled = resolve_objective("aot").apply_parts(parts, {})[0]
    alone = [resolve_objective({"name": "dpo", "lift": "all_pairs"})(part) for part in parts]
    for all_, one, other in zip(found, alone, coupled, strict=True):
        np.testing.assert_allclose(all_, one + other, rtol=1e-12)


def test_without_a_beta_the_first_formula_leads() -> None:
    mixture = resolve_objective(["sft", "inpo"])
    assert (mixture.lead.entry.name, mixture.beta, mixture.per_token) == ("sft", 1.0, True)


def test_the_texts_of_a_mixture_stand_in_their_order() -> None:
    """Finds: rows of one text taken for those of the next."""
    xs = random_examples(4, seed=91)
    names = ["selm", "rationale_dpo", "dove"]
    mixture = resolve_objective([{"name": name, "beta": 0.1} for name in names])
    assert list(mixture.texts) == ["instructions", "rationale", "third"]
    apart = [losses(NUMPY, name, {"beta": 0.1}, xs) for name in names]
    np.testing.assert_allclose(mixture(columns(NUMPY, xs, texts=mixture.texts)), sum(apart), rtol=1e-12)


def test_a_text_without_a_reference() -> None:
    xs, objective = random_examples(3, seed=92), resolve_objective("rationale_orpo")
    given = columns(NUMPY, xs, texts=objective.texts)
    np.testing.assert_array_equal(objective({**given, "reference": None}), objective(given))


def test_lengths_that_are_given_count() -> None:
    given = columns(NUMPY, [pair(0, 0)])
    found = resolve_objective({"name": "r_dpo", "alpha": 0.5})({**given, "lengths": np.array([[5.0, 2.0]])})
    np.testing.assert_allclose(found, [math.log1p(math.exp(-0.5 * 3))])


def test_a_start_is_told_the_groups_it_asks_for() -> None:
    """Finds: a number of groups handed to a state that has none, or another number."""
    grouped = resolve_objective("group_robust")
    assert grouped.initial_state(3)["group_robust"].q.tolist() == [1 / 3] * 3
    assert grouped.initial_state()["group_robust"].q.tolist() == grouped.terms[0].start().q.tolist() == [1.0]

    def start(beta: float) -> tuple[float]:
        return (beta,)

    entry = replace(TABLE["bco"], start=start)
    assert replace(resolve_objective("bco").terms[0], entry=entry).start(3) == (0.01,)


def test_the_reference_of_a_text_is_a_reference() -> None:
    """Finds: a formula without a reference of the responses that is handed none for its text either."""

    def toy(policy: Logps, third: TextLogps, third_reference: TextLogps, *, beta: Positive = 0.1) -> None:
        """Toy.

        Args:
            beta: strength.

        Source: none.
        """

    entry = read_declaration(toy)
    assert entry.needs == {"reference", "third"} and entry.texts == {"third": "example"}
    assert entry.schema["properties"]["beta"]["description"] == "strength."
    assert (entry.summary, entry.source) == ("Toy", "none")


def without_start(policy: Logps, state: Any) -> None:
    """Source: none."""


def from_none(policy: Logps, state: Any = None) -> None:
    """Source: none."""


def experimental_toy(policy: Logps) -> None:
    """Source: none."""


def toy_unverified(policy: Logps) -> None:
    """Toy.

    Unverified: all of it.
    Source: none.
    """


def untyped(policy: Logps, *, beta=1.0) -> None:  # type: ignore[no-untyped-def]  # the fault it shows
    """Toy.

    Args:
        beta: strength.

    Source: none.
    """


def undescribed(policy: Logps) -> None:
    pass


@pytest.mark.parametrize(
    "function, said",
    [
        (undescribed, "no line `Source"),
        (without_start, "parameter state: its default"),
        (from_none, "parameter state: its default"),
        (experimental_toy, "go together"),
        (toy_unverified, "go together"),
        (untyped, "parameter beta: an option has a type, .* a name other than lift, name, weight, weighting"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(function: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        read_declaration(function)


@pytest.mark.parametrize(
    "name, option, said",
    [
        ("dpo", "label_smoothing", "float ≥ 0 and < 0.5, default 0.0"),
        ("selfie", "after", "int ≥ 0, default 0"),
        ("odpo", "offset", "log or linear, default log"),
        ("aot", "lift", "best_worst, default best_worst"),
        ("triple_po", "length_normalized", "true or false, default False"),
        ("modpo", "weights", "list, default [0.5, 0.5]"),
    ],
)
def test_an_option_in_words(name: str, option: str, said: str) -> None:
    assert TABLE[name].describe(option) == said


def test_options_of_other_types_in_words() -> None:
    def toy(policy: Logps, *, beta: float | Literal["auto"] = "auto", said: str = "so", any_: Any = 1) -> None:
        """Toy.

        Args:
            beta: strength.
            said: a word.
            any_: anything.

        Source: none.
        """

    entry = read_declaration(toy)
    told = [entry.describe(option) for option in ("beta", "said", "any_")]
    assert told == ["float or auto, default auto", "string, default so", "any, default 1"]


def test_messages_name_columns_in_order() -> None:
    needy = resolve_objective("mcts_dpo")
    with pytest.raises(ObjectiveError, match=r"mcts_dpo needs confidence, divergence; there is: none"):
        needy.check_columns(())
    with pytest.raises(ObjectiveError, match=r"needs divergence; there is: confidence, groups, scores, win_rates$"):
        needy.check_columns({"win_rates", "scores", "policy", "groups", "confidence", "lengths"})


def test_what_is_left_out_when_made_by_hand() -> None:
    simpo = resolve_objective("simpo")
    by_hand = Objective(simpo.terms)
    assert (by_hand == simpo, by_hand.per_token, simpo.per_token) == (True, False, True)
    term = Term(TABLE["sft"], {"per": "token"})
    assert (term.weight, term.lift, term.weighting) == (1.0, "first_two", "none")
    assert resolve_objective("bco").initial_state()["bco"] == (0.0, 0.0)
    assert resolve_objective("alpha_dpo").initial_state()["alpha_dpo"] == (0.0, 0.0, 0.0)
