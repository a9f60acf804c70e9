"""Our formulas beside TRL's own loss code, on the same log-probs: where they agree, and how they differ.

Values and gradients are those of the trainers' loss functions, see ``trl_losses``. Differences are tests, too: each
says what a recipe written for one means for the other, and fails when a TRL yet to come has changed it. Seen with TRL
1.16, whose ``bco_pair`` is what there is of BCO (its trainer is gone), and whose ``ipo`` and ``sigmoid_norm`` average.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("torch", reason="torch is not installed")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import trl_losses
from libraries import NUMPY, TORCH, TORCH32, host, logps
from oracle import Example, pair, random_examples
from test_objectives import columns, gradients, near, resolved, state_of
from trl_losses import dpo_trainer, kto_trainer, pairs_trainer, tpo_trainer

from mlxpref.metrics import step_metrics

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

Options = Mapping[str, Any]

XS = random_examples(5, seed=41)
ONE = XS[:1]
"""Alone, a mean over tokens is the same over a batch and over a response."""


def ours(name: str, options: Options, xs: Sequence[Example] = XS, weighting: str = "none") -> tuple[float, np.ndarray]:
    """The batch's loss and its gradient, (2B, L): all chosen responses, then all rejected ones."""
    options = {**options, **({} if weighting == "none" else {"weighting": weighting})}
    objective = resolved(name, options)
    found, _ = objective.apply(columns(NUMPY, xs, texts=objective.texts), state_of(NUMPY, objective))
    (by_token,) = gradients(TORCH, name, options, xs, ["policy"])
    rows = by_token.transpose(1, 0, 2)[:2] / len(xs)
    return float(found.mean()), rows.reshape(2 * len(xs), -1)


def agree(mine: tuple[float, np.ndarray], theirs: tuple[Any, ...], factor: float = 1.0, rtol: float = 1e-6) -> None:
    """Loss and gradient; TRL's are ``factor`` times ours."""
    assert theirs[0] == pytest.approx(factor * mine[0], rel=rtol)
    width = min(mine[1].shape[1], theirs[1].shape[1])
    assert not mine[1][:, width:].any() and not theirs[1][:, width:].any()
    scale = np.abs(mine[1]).max()
    found, expected = theirs[1][: len(mine[1]), :width], factor * mine[1][:, :width]
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * factor * scale)


# --- DPOTrainer --------------------------------------------------------------------------------


SAME: list[tuple[str, Options, str, Options]] = [
    # TRL's loss_type and options, our name and options
    ("sigmoid", {}, "dpo", {}),
    ("sigmoid", {"beta": 0.5}, "dpo", {"beta": 0.5}),
    ("hinge", {"beta": 0.3}, "hinge", {"beta": 0.3}),
    ("ipo", {"beta": 0.4}, "ipo_norm", {"beta": 0.4}),
    ("sigmoid_norm", {"beta": 5.0}, "ln_dpo", {}),
    ("robust", {"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}),
    ("exo_pair", {"label_smoothing": 1e-3}, "exo_pair", {}),
    ("exo_pair", {"label_smoothing": 0.2, "beta": 0.4}, "exo_pair", {"label_smoothing": 0.2, "beta": 0.4}),
    ("nca_pair", {"beta": 0.3}, "nca_pair", {"beta": 0.3}),
    ("bco_pair", {"beta": 0.3}, "bco_pair", {"beta": 0.3}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {"beta": 0.05}, "discopop", {}),
    ("discopop", {"discopop_tau": 0.5}, "discopop", {"beta": 0.1, "tau": 0.5}),
    ("aot", {}, "aot", {"beta": 0.1}),
    ("aot", {"label_smoothing": 0.2}, "aot", {"beta": 0.1, "label_smoothing": 0.2}),
    ("aot_unpaired", {}, "aot_unpaired", {"beta": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.2}, "aot_unpaired", {"beta": 0.1, "label_smoothing": 0.2}),
    ("sigmoid", {"ld_alpha": 0.3}, "ld_dpo", {"alpha": 0.3}),
    ("sigmoid", {"ld_alpha": 0.0}, "ld_dpo", {"alpha": 0.0}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, "f_dpo", {}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, "f_dpo", {"divergence": "js"}),
]


@pytest.mark.parametrize("loss_type, told, name, options", SAME)
def test_the_same_loss_and_gradient(loss_type: str, told: Options, name: str, options: Options) -> None:
    """Finds: a convention that differs, a mask or a reference used otherwise."""
    agree(ours(name, options), dpo_trainer(XS, loss_type, **told))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0, 1.5])
def test_the_same_alpha_divergence(alpha: float) -> None:
    """(e^((α−1)a) − 1)/(α − 1), of which the 1 cancels. TRL's code for it knows no float64."""
    import torch

    xs = [near(x) for x in XS]
    told = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha, "dtype": torch.float32}
    agree(ours("f_dpo", {"divergence": "alpha", "alpha": alpha}, xs), dpo_trainer(xs, "sigmoid", **told), rtol=1e-5)


def test_not_the_alpha_divergence_of_older_releases() -> None:
    """(1 − e^(−αa))/α has α where this has 1 − α."""
    a_w, a_l = 1.5, -0.5
    older = [(1 - math.exp(-0.3 * a)) / 0.3 for a in (a_w, a_l)]
    found = ours("f_dpo", {"divergence": "alpha", "alpha": 0.7}, [pair(a_w, a_l)])[0]
    assert found == pytest.approx(math.log1p(math.exp(-0.1 * (older[0] - older[1]))))
    assert found != pytest.approx(ours("f_dpo", {"divergence": "alpha", "alpha": 0.3}, [pair(a_w, a_l)])[0], rel=1e-2)


@pytest.mark.parametrize("loss_type, name, options", [
    ("sigmoid", "dpo", {}), ("ipo", "ipo_norm", {"beta": 0.1}), ("apo_zero", "apo_zero", {}),
])  # fmt: skip
def test_the_same_weights_of_wpo(loss_type: str, name: str, options: Options) -> None:
    """Constants on both sides: gradients agree, too."""
    agree(ours(name, options, weighting="wpo"), dpo_trainer(XS, loss_type, use_weighting=True))


def test_sigmoid_ignores_label_smoothing() -> None:
    """Our ``dpo`` heeds it, as TRL 0.8 did, with which the reward-augmentation recipes (0.3) were run."""
    plain, told = dpo_trainer(XS, "sigmoid"), dpo_trainer(XS, "sigmoid", label_smoothing=0.3)
    assert plain[0] == told[0]
    assert ours("dpo", {"label_smoothing": 0.3})[0] != pytest.approx(told[0], rel=1e-3)


def test_ipo_averages_over_tokens() -> None:
    """``ipo``, with the paper's sums, is another loss but for responses of one token."""
    theirs = dpo_trainer(XS, "ipo", beta=1.0)
    assert ours("ipo", {"beta": 1.0})[0] > 1.5 * theirs[0]
    short = [pair(1.5, -0.5), pair(-2, 3)]
    agree(ours("ipo", {}, short), dpo_trainer(short, "ipo"))


def test_bco_pair_has_no_running_mean() -> None:
    assert ours("bco", {"beta": 0.3})[0] != pytest.approx(dpo_trainer(XS, "bco_pair", beta=0.3)[0], rel=1e-4)


def test_sppo_hard_is_twice_the_official_loss() -> None:
    for beta in (1e-3, 0.2):
        agree(ours("sppo_hard", {"beta": beta}), dpo_trainer(XS, "sppo_hard", beta=beta), factor=2)


def test_aot_is_the_paired_form() -> None:
    """Older releases call that ``aot_pair``, and the unpaired one ``aot``."""
    paired, unpaired = dpo_trainer(XS, "aot")[0], dpo_trainer(XS, "aot_unpaired")[0]
    assert paired != pytest.approx(unpaired, rel=1e-4)
    assert paired == pytest.approx(ours("aot", {"beta": 0.1})[0])


def test_sft_counts_every_token_of_a_batch_alike() -> None:
    """Ours counts every example alike; alone it is the same."""
    agree(ours("sft", {}, ONE), dpo_trainer(ONE, "sft"))
    theirs = dpo_trainer(XS, "sft")[0]
    tokens = [t for x in XS for t in x.policy[0]]
    assert theirs == pytest.approx(-math.fsum(tokens) / len(tokens))
    assert ours("sft", {})[0] != pytest.approx(theirs, rel=1e-2)


def test_sigmoid_and_sft_are_rpo_of_one_example() -> None:
    told = {"loss_weights": [1.0, 0.005], "beta": 0.01}
    agree(ours("rpo", {}, ONE), dpo_trainer(ONE, ["sigmoid", "sft"], **told))
    assert ours("rpo", {"eta": 1.0})[0] != pytest.approx(
        dpo_trainer(XS, ["sigmoid", "sft"], **{**told, "loss_weights": [1.0, 1.0]})[0], rel=1e-3
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
def test_the_same_metrics_of_rewards(loss_type: str) -> None:
    """β·a and accuracies per pair, a tie being wrong; of sums even where the loss averages, unlike ours there."""
    xs = [*XS, replace(XS[0], policy=XS[0].reference)]
    *_, theirs = dpo_trainer(xs, loss_type, beta=0.3)
    policy, reference = (logps(NUMPY, [getattr(x, side) for x in xs]) for side in ("policy", "reference"))
    mine = step_metrics(policy.sums, reference.sums, policy.lengths, np.zeros(len(xs)), 0.3)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-6), key
    assert resolved("ipo_norm", {}).per_token and resolved("ln_dpo", {}).per_token


def test_its_defaults() -> None:
    """Those that a recipe leaves unsaid. Its truncation keeps the start, and with it the goal of a prompt."""
    from trl import DPOConfig

    of = {name: field.default for name, field in DPOConfig.__dataclass_fields__.items()}
    assert (of["learning_rate"], of["beta"], of["max_length"], of["truncation_mode"]) == (1e-6, 0.1, 1024, "keep_start")
    assert (of["label_smoothing"], of["discopop_tau"], of["f_alpha_divergence_coef"]) == (0.0, 0.05, 0.5)
    # One β for every loss: ours are those of each paper.
    assert resolved("dpo", {}).beta == of["beta"]
    assert [resolved(name, {}).beta for name in ("ln_dpo", "discopop", "sppo_hard", "aot")] == [5.0, 0.05, 1e-3, 0.01]


# --- CPOTrainer, ORPOTrainer, TPOTrainer -------------------------------------------------------


def cpo_trainer(xs: Sequence[Example], **options: Any) -> tuple[float, Any]:
    from trl.experimental.cpo import CPOTrainer

    told = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0, "alpha": 0.0, "label_smoothing": 0.0}
    return pairs_trainer(CPOTrainer, xs, **{**told, "simpo_gamma": 0.5, **options})


CPO_SAME: list[tuple[Options, str, Options]] = [
    ({}, "cpo", {"alpha": 0.0}),
    ({"loss_type": "simpo", "beta": 2.0}, "simpo", {}),
    ({"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4}, "simpo", {"beta": 2.5, "gamma": 1.4}),
    ({"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0.1}, "simpo", {"label_smoothing": 0.1}),
    ({"loss_type": "simpo", "beta": 2.5, "alpha": 0.25, "simpo_gamma": 0.25}, "alphapo", {}),
    ({"loss_type": "simpo", "beta": 0.7, "alpha": -0.5}, "alphapo", {"beta": 0.7, "gamma": 0.5, "alpha": -0.5}),
    ({"loss_type": "hinge", "beta": 0.2}, "slic", {"beta": 0.2, "sft_weight": 0.0}),
]


@pytest.mark.parametrize("told, name, options", CPO_SAME)
def test_the_same_loss_as_the_cpo_trainer(told: Options, name: str, options: Options) -> None:
    """``simpo_gamma`` is absolute, as ours; SimPO's own code has the ratio γ/β."""
    agree(ours(name, options), cpo_trainer(XS, **told))


def test_cpo_likelihood_counts_every_token_of_a_batch_alike() -> None:
    agree(ours("cpo", {"alpha": 0.7}, ONE), cpo_trainer(ONE, cpo_alpha=0.7))
    agree(ours("cpo", {"alpha": 0.7}, ONE), pairs_trainer_with_prompt("cpo", ONE, cpo_alpha=0.7))
    assert ours("cpo", {})[0] != pytest.approx(cpo_trainer(XS, cpo_alpha=1.0)[0], rel=1e-3)


def pairs_trainer_with_prompt(which: str, xs: Sequence[Example], **options: Any) -> tuple[float, Any]:
    """The same behind a prompt of three tokens."""
    if which == "cpo":
        return cpo_trainer(xs, prompt=3, **options)
    from trl.experimental.orpo import ORPOTrainer

    return pairs_trainer(ORPOTrainer, xs, prompt=3, **options)


def test_a_ratio_of_gamma_to_beta_is_another_loss() -> None:
    """γ/β = 0.5 at β = 2 is γ = 1."""
    told = {"loss_type": "simpo", "beta": 2.0}
    assert cpo_trainer(XS, **told, simpo_gamma=0.5)[0] != pytest.approx(ours("simpo", {"gamma": 1.0})[0], rel=1e-2)
    agree(ours("simpo", {"gamma": 1.0}), cpo_trainer(XS, **told, simpo_gamma=1.0))


def test_alphapo_overflows_where_ours_does_not() -> None:
    """A probability raised to a power, in float32: 0 to the power −α from −104 nats a token on; −αm stays small."""
    import torch
    from trl.experimental.cpo import CPOTrainer

    trainer = trl_losses.made(
        CPOTrainer, trl_losses.Sayings([[-1.0]]), loss_type="simpo", beta=2.5, alpha=0.25, simpo_gamma=0.25,
        label_smoothing=0.0,
    )  # fmt: skip
    both = torch.tensor([-110.0])
    assert math.isnan(trainer.cpo_loss(both, both)[0].item())
    x = Example([[-110.0], [-110.0]], [[0.0], [0.0]])
    found = resolved("alphapo", {})(columns(TORCH32, [x]))
    assert host(found)[0] == pytest.approx(math.log1p(math.exp(0.25)))


def test_orpo_trains_on_the_prompt_too() -> None:
    """Its likelihood is of prompt and response; ours is of the response, the same behind a prompt of one token."""
    from trl.experimental.orpo import ORPOTrainer

    agree(ours("orpo", {}, ONE), pairs_trainer(ORPOTrainer, ONE, beta=0.1), rtol=1e-5)
    n, said = len(ONE[0].policy[0]), -math.fsum(ONE[0].policy[0])
    with_prompt = pairs_trainer_with_prompt("orpo", ONE, beta=0.1)[0]
    expected = ours("orpo", {}, ONE)[0] - said / n + (said + 2 * math.log(2)) / (n + 2)
    assert with_prompt == pytest.approx(expected, rel=1e-5)
    assert ours("orpo", {})[0] != pytest.approx(pairs_trainer(ORPOTrainer, XS, beta=0.1)[0], rel=1e-3)


def test_its_tpo_is_triple_preference_optimisation() -> None:
    """Not tree preference optimisation. γ is absolute; its gold answers count by tokens of the batch."""
    told = {"beta": 0.2, "tpo_l_gamma": 0.7}
    sums = {"beta": 0.2, "alpha": 0.3}
    means = {"beta": 0.2, "gamma": 0.7, "length_normalized": True}
    agree(ours("triple_po", sums, ONE), tpo_trainer(ONE, loss_type="sigmoid", tpo_alpha=0.3, **told))
    agree(ours("triple_po", {**means, "alpha": 0.3}, ONE), tpo_trainer(ONE, loss_type="tpo-l", tpo_alpha=0.3, **told))
    agree(ours("triple_po", {**means, "alpha": 0.0}), tpo_trainer(XS, loss_type="tpo-l", tpo_alpha=0.0, **told))
    theirs = tpo_trainer(XS, loss_type="sigmoid", tpo_alpha=0.3, **told)[0]
    assert ours("triple_po", sums)[0] != pytest.approx(theirs, rel=1e-3)


# --- KTOTrainer --------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [{}, {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}])
def test_kto_averages_over_responses(told: Options) -> None:
    """Ours is the sum of a pair's two: twice theirs. The same K, and no gradient through it."""
    agree(ours("kto", told), kto_trainer(XS, **told), factor=0.5)
    assert (
        np.mean([math.fsum(x.texts["mismatched"][0]) - math.fsum(x.texts_reference["mismatched"][0]) for x in XS]) > 0
    )


def test_kto_without_a_kl_is_apo_zero() -> None:
    agree(ours("apo_zero", {}), kto_trainer(XS, loss_type="apo_zero_unpaired"), factor=0.5)
    fallen = [replace(x, texts=x.texts_reference, texts_reference=x.texts) for x in XS]
    agree(ours("kto", {}, fallen), kto_trainer(fallen), factor=0.5)
    assert ours("kto", {}, fallen)[0] == pytest.approx(ours("apo_zero", {})[0])
