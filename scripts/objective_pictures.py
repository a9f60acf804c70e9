"""What the pictures of docs/objectives.md show: which objectives, with which options, of which pair; and its numbers.

``build_objectives.py`` draws them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from mlxpref import ops
from mlxpref.objectives import TABLE
from mlxpref.objectives.lift import lift_columns, pairs_of
from mlxpref.records import Logps
from mlxpref.report.objectives import Bend, Row, draw_objectives

LENGTHS = (24, 30)
REFERENCE = (-51.0, -58.5)
"""Log-probs of the chosen and the rejected response under the reference, nats."""
FAR, N_POINTS, STEP = 20.0, 240, 1e-4
"""The x axis from -FAR to FAR nats, without 0, where kinks are; the step of differences, nats."""


class Line(NamedTuple):
    """An objective in a picture: its name there, its options, and by what loss and slopes are multiplied."""

    name: str
    label: str
    options: Mapping[str, Any] = MappingProxyType({})
    scale: float = 1.0
    faint: bool = False


class Rows(NamedTuple):
    lines: tuple[Line, ...]
    losses: tuple[float, float]
    slopes: tuple[float, float]


class Picture(NamedTuple):
    """What is drawn of a family; ``columns`` makes what its formulas read from how far each text has moved."""

    title: str
    caption: str
    rows: tuple[Rows, ...]
    columns: Callable[[np.ndarray], dict[str, Any]]
    x_label: str = "margin Δ, nats"
    start: float = 0.0
    """x where policy = reference."""


def spread(totals: Sequence[float], lengths: Sequence[int], shape: Sequence[float] = (1.0,)) -> Logps:
    """(1, K, L) log-probs of responses, shared out over their tokens in proportion to ``shape``, repeated."""
    tokens = np.zeros((1, len(lengths), max(lengths)))
    mask = np.zeros_like(tokens)
    for k, (total, n) in enumerate(zip(totals, lengths, strict=True)):
        parts = np.resize(shape, n)
        tokens[0, k, :n], mask[0, k, :n] = total * parts / parts.sum(), 1
    return Logps(tokens, mask)


def moved(reference: Logps, by: Any) -> Logps:
    """Each response's log-prob higher by so many nats, evenly over its tokens."""
    share = np.array(by) / reference.lengths[0]
    return Logps(reference.tokens + reference.mask * share[None, :, None], reference.mask)


def pair(by: np.ndarray, shape: Sequence[float] = (1.0,)) -> dict[str, Any]:
    """The pair of the pictures, and a further text, after moves of chosen, rejected and text."""
    reference = spread(REFERENCE, LENGTHS, shape)
    policy = moved(reference, by[:2])
    text = spread((-20.0,), (10,))
    columns: dict[str, Any] = {"policy": policy, "reference": reference, "lengths": policy.lengths}
    for name in ("third", "rationale", "gold"):
        columns |= {name: moved(text, by[2:]), f"{name}_reference": text}
    columns["instructions_reference"] = spread((-30.0, -30.0), (15, 15))
    columns["instructions"] = moved(columns["instructions_reference"], (2.0, -2.0))
    inside = np.cumsum(policy.mask, -1) * policy.mask
    return columns | {
        "scores": np.array([[8.0, 5.5]]),
        "attributes": np.array([[[8.0, 7.0], [5.5, 6.0]]]),
        "win_rates": np.array([[0.8, 0.4]]),
        "margin_rewards": np.array([[1.0, 0.0]]),
        "confidence": np.array([0.8]),
        "previous": np.array([[REFERENCE[0] + 2, REFERENCE[1] - 0.5]]),
        "aligned_logps": np.full((1, 2), -2.2),
        "divergence": policy.mask * (inside > 10),
        "token_kl": 0.05 * policy.mask,
    }


def uneven(by: np.ndarray) -> dict[str, Any]:
    """The pair with tokens of three degrees of surprise."""
    return pair(by, shape=(0.5, 1.0, 1.5))


def batch(by: np.ndarray) -> dict[str, Any]:
    """The pair among three that stay."""
    reference = np.array([REFERENCE, (-51.0, -53.5), (-51.0, -63.5), (-51.0, -58.5)])
    moves = np.array([(by[0], by[1]), (-5.0, 5.0), (0.0, 0.0), (5.0, -5.0)])
    parts = [spread(own, LENGTHS) for own in reference]
    mismatched = spread((-40.0,), (20,))
    return {
        "policy": rows_of([moved(part, move) for part, move in zip(parts, moves, strict=True)]),
        "reference": rows_of(parts),
        "mismatched": rows_of([moved(mismatched, (5.0,))] * 4),
        "mismatched_reference": rows_of([mismatched] * 4),
        "groups": np.array([0, 0, 1, 1]),
    }


def triple(by: np.ndarray) -> dict[str, Any]:
    """A list of three: the pair, and between them a response that stays."""
    reference = spread((REFERENCE[0], -55.0, REFERENCE[1]), (LENGTHS[0], 27, LENGTHS[1]))
    policy = moved(reference, (by[0], 0.0, by[1]))
    return {
        "policy": policy,
        "reference": reference,
        "scores": np.array([[8.0, 7.0, 5.5]]),
        "token_weights": 1.5 * policy.mask,
    }


def rows_of(parts: Sequence[Logps]) -> Logps:
    return Logps(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


STATES = {
    "bco": lambda start: start._replace(mean=0.5, count=1e9),
    "alpha_dpo": lambda start: start._replace(mean=0.1, std=0.3, started=1.0),
    "group_robust": lambda start: start._replace(q=np.array([0.3, 0.7])),
    "selfie": lambda start: start._replace(margins=np.linspace(-12.0, 12.0, 50), seen=50.0),
}
"""Where a run may be: the states that the pictures start from."""

DPO = Line("dpo", "dpo", faint=True)

FIXED = "Options are the defaults unless a name says otherwise. Losses are less their value at {at}."
DIVIDED = "÷ 100: loss and slopes are divided by that."

SHOWN = {
    "margin": Picture(
        "Objectives of the margin",
        f"{FIXED.format(at='policy = reference')} {DIVIDED} The responses have 24 and 30 "
        "tokens, which is why the slopes of ln_dpo and ipo_norm are not opposite.",
        (
            Rows(
                (
                    Line("dpo", "dpo"),
                    Line("dpo", "dpo, ε 0.3", {"label_smoothing": 0.3}),
                    Line("robust", "robust, ε 0.3", {"label_smoothing": 0.3}),
                    Line("ipo", "ipo, β 0.05, ÷ 100", {"beta": 0.05}, 0.01),
                    Line("hinge", "hinge"),
                    Line("focalpo", "focalpo, γ 0.5", {"gamma": 0.5}),
                ),
                (-2.1, 2.6), (-0.22, 0.22),
            ),
            Rows(
                (
                    DPO,
                    Line("exo_pair", "exo_pair, ε 0.1", {"label_smoothing": 0.1}),
                    Line("discopop", "discopop, β 0.1", {"beta": 0.1}),
                    Line("r_dpo", "r_dpo, α 0.1", {"alpha": 0.1}),
                    Line("ln_dpo", "ln_dpo, β 3", {"beta": 3.0}),
                    Line("ipo_norm", "ipo_norm, β 1", {"beta": 1.0}),
                ),
                (-1.1, 2.0), (-0.16, 0.16),
            ),
        ),
        pair,
    ),
    "ratios": Picture(
        "Objectives of the two log-ratios",
        f"{FIXED.format(at='policy = reference')} {DIVIDED} sppo: win rates 0.8 and 0.4.",
        (
            Rows(
                (
                    DPO,
                    Line("f_dpo", "f_dpo, forward_kl"),
                    Line("f_dpo", "f_dpo, js, β 0.5", {"divergence": "js", "beta": 0.5}),
                    Line("dpop", "dpop, λ 2", {"penalty": 2.0}),
                    Line("rpo", "rpo, β 0.1, η 0.5", {"beta": 0.1, "eta": 0.5}),
                    Line("minor_dpo", "minor_dpo"),
                    Line("flex_dpo", "flex_dpo"),
                ),
                (-1.2, 2.6), (-0.25, 0.25),
            ),
            Rows(
                (
                    DPO,
                    Line("nca_pair", "nca_pair, β 0.1", {"beta": 0.1}),
                    Line("bco_pair", "bco_pair"),
                    Line("apo_zero", "apo_zero"),
                    Line("apo_down", "apo_down"),
                    Line("sppo", "sppo, β 0.05, ÷ 100", {"beta": 0.05}, 0.01),
                    Line("sppo_hard", "sppo_hard, β 0.05, ÷ 100", {"beta": 0.05}, 0.01),
                ),
                (-1.1, 1.7), (-0.16, 0.16),
            ),
        ),
        pair,
    ),
    "batchwise": Picture(
        "Objectives of a batch",
        f"{FIXED.format(at='policy = reference')} The sum over a batch of four, three of which stay "
        "(Δ = −10, 0 and 10). bco: mean reward 0.5; kto: K = 5 nats; alpha_dpo: μ 0.1, s 0.3 nats a token; "
        "group_robust: the pair's group weighs 0.3; selfie: quantile 0.3, −4.8. What a formula holds "
        "constant is held in the slopes, too.",
        (
            Rows(
                (
                    DPO,
                    Line("bco", "bco, β 0.1", {"beta": 0.1}),
                    Line("kto", "kto"),
                    Line("aot", "aot, β 0.1", {"beta": 0.1}),
                    Line("aot_unpaired", "aot_unpaired, β 0.1", {"beta": 0.1}),
                    Line("alpha_dpo", "alpha_dpo, β 2", {"beta": 2.0}),
                    Line("group_robust", "group_robust, η 0.5", {"eta": 0.5}),
                    Line("selfie", "selfie, α 0.4", {"alpha": 0.4, "quantile": 0.3}),
                ),
                (-1.2, 1.9), (-0.12, 0.12),
            ),
        ),
        batch,
    ),
    "scored": Picture(
        "Objectives of log-ratios and scores",
        f"{FIXED.format(at='policy = reference')} β is 0.1; scores 8 and 5.5, η 0.4, so that ηδ = 1; "
        "e_dpo (experimental_e_dpo): a second model says 7 and 6; modpo: shares 0.7 and 0.3, the other reward is 1 "
        "higher; cream: C = 0.8. reward_aware with bwd_kl has the slopes of soft_label_dpo; with sq "
        "it is distilled_dpo.",
        (
            Rows(
                (
                    DPO,
                    Line("distilled_dpo", "distilled_dpo", {"eta": 0.4}),
                    Line("reward_aware", "reward_aware, fwd_kl", {"beta": 0.1, "eta": 0.4, "divergence": "fwd_kl"}),
                    Line("soft_label_dpo", "soft_label_dpo", {"eta": 0.4}),
                    Line("odpo", "odpo"),
                    Line("mm_dpo", "mm_dpo, w 0.5", {"w": 0.5}),
                    Line("modpo", "modpo", {"weights": (0.7, 0.3)}),
                    Line("cream", "cream"),
                    Line("experimental_e_dpo", "e_dpo", {"eta": 0.4}),
                ),
                (-1.3, 2.2), (-0.24, 0.24),
            ),
        ),
        pair,
    ),
    "listwise": Picture(
        "Objectives of a list of three",
        f"{FIXED.format(at='policy = reference')} Scores 8, 7 and 5.5; the best "
        "response moves up, the worst down, the one between them stays. tree_tpo: every token weighs "
        "1.5. dpo compares the best with the worst. Names are without experimental_.",
        (
            Rows(
                (
                    DPO,
                    Line("pro", "pro"),
                    Line("lipo", "lipo"),
                    Line("list_mle", "list_mle"),
                    Line("experimental_info_nca", "info_nca, β 0.1", {"beta": 0.1}),
                    Line("experimental_nca", "nca, β 0.1", {"beta": 0.1}),
                    Line("experimental_tree_tpo", "tree_tpo"),
                ),
                (-1.5, 2.2), (-0.12, 0.12),
            ),
        ),
        triple,
    ),
    "tokenwise": Picture(
        "Objectives of weighted tokens",
        f"{FIXED.format(at='policy = reference')} Every token of a response moves alike. mcts_dpo: the responses "
        "part after the tenth token, confidence 0.8; mapo (experimental_mapo): a divergence of 0.05 nats at each "
        "token, tokens of three degrees of surprise.",
        (
            Rows(
                (
                    DPO,
                    Line("ld_dpo", "ld_dpo, α 0", {"alpha": 0.0}),
                    Line("d2po", "d2po, γ 0.95", {"gamma": 0.95}),
                    Line("mcts_dpo", "mcts_dpo"),
                    Line("experimental_mapo", "mapo"),
                ),
                (-0.75, 1.5), (-0.1, 0.1),
            ),
        ),
        uneven,
    ),
    "texts": Picture(
        "Objectives of a further text",
        f"{FIXED.format(at='policy = reference')} {DIVIDED} The further text, 10 tokens, −20 nats "
        "under the reference, moves up by Δ/2 with the chosen response. dove: the instructions have a margin of "
        "4 nats. inpo: τ 0.02, Δᵗ is 2.5 nats less. vpo is experimental_vpo.",
        (
            Rows(
                (
                    DPO,
                    Line("rationale_dpo", "rationale_dpo, γ 0.05", {"gamma": 0.05}),
                    Line("rationale_orpo", "rationale_orpo, γ 0.2", {"gamma": 0.2}),
                    Line("dove", "dove"),
                    Line("selm", "selm, β 0.1, α 0.2", {"beta": 0.1, "alpha": 0.2}),
                    Line("xpo", "xpo, α 0.03", {"alpha": 0.03}),
                    Line("experimental_vpo", "vpo, α 0.2", {"alpha": 0.2}),
                    Line("inpo", "inpo, η 0.05, ÷ 100", {"eta": 0.05, "tau": 0.02}, 0.01),
                ),
                (-1.6, 2.2), (-0.18, 0.18),
            ),
        ),
        pair,
    ),
    "policy_only": Picture(
        "Objectives of the policy alone",
        f"{FIXED.format(at='ℓ_w = ℓ_l')} The sum of both log-probs stays at −109.5 nats; "
        "the responses have 24 and 30 tokens. triple_po: the gold text stays. poft: aligned models find the response "
        "at "
        "−2.2 nats a token. ℓ is the log-prob of a whole response.",
        (
            Rows(
                (
                    Line("sft", "sft"),
                    Line("simpo", "simpo"),
                    Line("alphapo", "alphapo, β 1", {"beta": 1.0}),
                    Line("cpo", "cpo"),
                    Line("orpo", "orpo, β 0.5", {"beta": 0.5}),
                    Line("slic", "slic, β 0.1, λ 0.02", {"beta": 0.1, "sft_weight": 0.02}),
                    Line("triple_po", "triple_po, β 0.1", {"beta": 0.1}),
                    Line("poft", "poft, β 2", {"beta": 2.0}),
                ),
                (-1.3, 2.2), (-0.15, 0.15),
            ),
        ),
        lambda by: pair(np.array([by[0], by[1], 0.0])),
        "ℓ_w − ℓ_l, nats",
        REFERENCE[0] - REFERENCE[1],
    ),
}  # fmt: skip


def draw(family: str, file: Path) -> None:
    """Write the picture of a family."""
    picture = SHOWN[family]
    xs = axis()
    draw_objectives(
        numbers(family, xs), xs.tolist(), file, title=picture.title, caption=picture.caption, x_label=picture.x_label
    )


def axis() -> np.ndarray:
    return np.linspace(-FAR, FAR, N_POINTS)


def numbers(family: str, xs: np.ndarray) -> list[Row]:
    """Losses and slopes of a family's picture along the x axis."""
    picture = SHOWN[family]
    return [Row(tuple(bend(line, picture, xs) for line in row.lines), row.losses, row.slopes) for row in picture.rows]


def bend(line: Line, picture: Picture, xs: np.ndarray) -> Bend:
    """One objective along the x axis, less its loss at 0."""

    def total(by: np.ndarray) -> float:
        return line.scale * total_loss(line, picture.columns(by))

    def place(x: float) -> np.ndarray:
        return (x - picture.start) / 2 * np.array([1.0, -1.0, 1.0])

    zero = total(place(0.0))
    slopes = np.array([gradient(total, place(x)) for x in xs])
    text = slopes[:, 2] if slopes[:, 2].any() else np.zeros(0)
    losses = [total(place(x)) - zero for x in xs]
    return Bend(line.label, losses, slopes[:, 0].tolist(), slopes[:, 1].tolist(), text.tolist(), line.faint)


def total_loss(line: Line, columns: Mapping[str, Any]) -> float:
    """Σ of a batch's losses."""
    entry = TABLE[line.name]
    k = columns["policy"].tokens.shape[1]
    if not entry.lists and k > 2:
        used = {name: columns[name] for name in entry.columns}
        columns = lift_columns(used, entry.columns, pairs_of(k, "best_worst"))
    arguments = {**{name: columns[name] for name in entry.columns}, **line.options}
    if entry.start is None:
        return float(entry.function(**arguments).sum())
    start = entry.start(n_groups=2) if callable(entry.start) else entry.start
    return float(entry.function(**arguments, state=STATES[line.name](start))[0].sum())


def gradient(total: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """∂total/∂each move, by central differences; what a formula holds constant stays at its value here."""
    kept: list[Any] = []

    def keep(value: Any) -> Any:
        kept.append(value)
        return value

    with constants(keep):
        total(at)
    found = []
    for step in STEP * np.eye(len(at)):
        ends = []
        for move in (step, -step):
            with constants(partial(next_of, iter(kept))):
                ends.append(total(at + move))
        found.append((ends[0] - ends[1]) / (2 * STEP))
    return np.array(found)


def next_of(values: Iterator[Any], _: Any) -> Any:
    return next(values)


@contextmanager
def constants(hold: Callable[[Any], Any]) -> Iterator[None]:
    """``ops.stop_gradient`` is ``hold`` in every formula: NumPy has no gradients to stop."""
    families = {sys.modules[entry.function.__module__] for entry in TABLE.values()}
    with ExitStack() as stack:
        for module in (ops, *families):
            if hasattr(module, "stop_gradient"):
                stack.enter_context(mock.patch.object(module, "stop_gradient", hold))
        yield
