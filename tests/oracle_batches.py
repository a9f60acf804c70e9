"""Losses of a whole batch: A15, A16, A19, A25, C7 and Selfie. Their mean is the batch's loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from oracle_words import (
    A,
    B,
    Example,
    Golden,
    State,
    batch_row,
    delta,
    even,
    log_ratio,
    log_sigma,
    mean,
    sg,
    sigma,
    smoothed,
    text_log_ratio,
)

Examples = Sequence[Example]


# State: mean, count. Before A and B it is such that the mean with their own rewards, .3 − .35 and −.1 + .15, is 0.
@batch_row(
    {"beta": 0.1},
    {"beta": 0.3},
    {"beta": 0.05},
    golden=[
        Golden(
            {"beta": 0.1},
            (1.087737, -0.042556, 0.041338),
            (1.515354, -0.052498, 0.053743),
            states=((0.05, 1.0), (-0.025, 2.0)),
        )
    ],
    start=(0.0, 0.0),
)
def bco(xs: Examples, state: State, *, beta: float = 0.01) -> tuple[list[float], State]:
    mean_before, count = state
    rewards = [beta * log_ratio(x, k) for x in xs for k in (0, 1)]
    after = (mean_before * count + math.fsum(rewards)) / (count + len(rewards))
    d = sg(after)
    losses = [-log_sigma(beta * log_ratio(x, 0) - d) - log_sigma(-(beta * log_ratio(x, 1) - d)) for x in xs]
    return losses, (after, count + len(rewards))


# K = .5: a mismatched text half a nat likelier than under the reference.
@batch_row(
    {"beta": 0.3},
    {"desirable_weight": 1.3},
    {"undesirable_weight": 0.5},
    {"beta": 0.02, "desirable_weight": 0.7, "undesirable_weight": 1.2},
    golden=[
        Golden(
            {"beta": 0.1},
            (0.839136, -0.024613, 0.024026),
            (1.062409, -0.024860, 0.024938),
            texts={"mismatched": [even(-6, 4)]},
            texts_reference={"mismatched": [even(-6.5, 4)]},
        ),
        # One less likely counts as K = 0, which is APO-zero.
        Golden(
            {"beta": 0.1},
            (0.838940, -0.024446, 0.024250),
            (1.062409, -0.024938, 0.024860),
            texts={"mismatched": [even(-6.5, 4)]},
            texts_reference={"mismatched": [even(-6, 4)]},
        ),
    ],
)
def kto(
    xs: Examples, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> list[float]:
    k = sg(max(0.0, mean([text_log_ratio(x, "mismatched") for x in xs])))

    def loss(x: Example) -> float:
        desirable = desirable_weight * (1 - sigma(beta * (log_ratio(x, 0) - k)))
        undesirable = undesirable_weight * (1 - sigma(beta * (k - log_ratio(x, 1))))
        return desirable + undesirable

    return [loss(x) for x in xs]


DPO_GOLDEN = Golden({"beta": 0.1}, (0.420055, -0.034299, 0.034299), (0.825939, -0.056218, 0.056218))
CDPO_GOLDEN = Golden(
    {"beta": 0.1, "label_smoothing": 0.1}, (0.485055, -0.024299, 0.024299), (0.800939, -0.046218, 0.046218)
)


# A batch of one is DPO.
@batch_row(
    {"beta": 0.1},
    {"label_smoothing": 0.2},
    {"beta": 0.5, "label_smoothing": 0.1},
    golden=[DPO_GOLDEN, CDPO_GOLDEN],
)
def aot(xs: Examples, *, beta: float = 0.01, label_smoothing: float = 0.0) -> list[float]:
    policy = sorted(math.fsum(x.policy[0]) - math.fsum(x.policy[1]) for x in xs)
    reference = sorted(math.fsum(x.reference[0]) - math.fsum(x.reference[1]) for x in xs)
    return [smoothed(beta * (p - r), label_smoothing) for p, r in zip(policy, reference, strict=True)]


@batch_row(
    {"beta": 0.1},
    {"label_smoothing": 0.2},
    {"beta": 0.5, "label_smoothing": 0.1},
    golden=[DPO_GOLDEN, CDPO_GOLDEN],
)
def aot_unpaired(xs: Examples, *, beta: float = 0.01, label_smoothing: float = 0.0) -> list[float]:
    chosen = sorted(log_ratio(x, 0) for x in xs)
    rejected = sorted(log_ratio(x, 1) for x in xs)
    return [smoothed(beta * (a_w - a_l), label_smoothing) for a_w, a_l in zip(chosen, rejected, strict=True)]


def length_normalized_margin(x: Example) -> float:
    """M of A25."""
    return mean(x.policy[0]) - mean(x.policy[1]) - (mean(x.reference[0]) - mean(x.reference[1]))


def moments_for_one(x: Example) -> State:
    """A state from which a batch of x alone, whose std is 0, comes to std 1 and M* = 1."""
    return (length_normalized_margin(x) - 1 / 0.9, 1 / 0.9, 1.0)


# State: mean, std, started.
@batch_row(
    {"beta": 0.5},
    {"gamma": 0.5},
    {"alpha": 1.0, "decay": 0.75},
    {"beta": 10.0, "gamma": 4.0, "alpha": 0.05, "decay": 0.5},
    golden=[
        Golden(
            {"beta": 2.0, "gamma": 1.0, "alpha": 0.2},
            (1.514908, -0.065014, 0.052011),
            (2.068446, -0.072801, 0.058241),
            states=(moments_for_one(A), moments_for_one(B)),
        )
    ],
    start=(0.0, 1.0, 0.0),
)
def alpha_dpo(
    xs: Examples, state: State, *, beta: float = 2.5, gamma: float = 1.5, alpha: float = 0.2, decay: float = 0.9
) -> tuple[list[float], State]:
    margins = [length_normalized_margin(x) for x in xs]
    of_batch = mean(margins)
    std_of_batch = math.sqrt(mean([(m - of_batch) ** 2 for m in margins]))
    centre, std, started = state
    if started:
        centre = decay * centre + (1 - decay) * of_batch
        std = decay * std + (1 - decay) * std_of_batch
    else:
        centre, std = of_batch, std_of_batch
    stars = sg([(m - centre) / max(std, 1e-6) for m in margins])

    def loss(x: Example, star: float) -> float:
        u = mean(x.policy[0]) - mean(x.policy[1])
        return -log_sigma(beta * (u - (gamma / beta + alpha * star)))

    # At the first step of an adapter every margin is exactly 0: no spread to go on from.
    after = 1.0 if started or std_of_batch > 1e-6 else 0.0
    return [loss(x, star) for x, star in zip(xs, stars, strict=True)], (centre, std, after)


# State: the weights of the groups. A group that is not in the batch keeps its weight up to the normalisation.
# A and B alone, in the one group there is, have their plain loss.
@batch_row(
    {"beta": 0.3},
    {"eta": 1.0},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "beta": 0.5, "eta": 0.02},
    golden=[
        Golden({"beta": 0.1}, DPO_GOLDEN.a, DPO_GOLDEN.b, extras={"groups": 0}, states=(([1.0],), ([1.0],))),
        Golden(
            {"beta": 0.1, "loss_type": "ipo"},
            (2.25, 3.0, -3.0),
            (56.25, -15.0, 15.0),
            extras={"groups": 0},
            states=(([1.0],), ([1.0],)),
        ),
    ],
    start=([0.5, 0.5],),
)
def group_robust(
    xs: Examples, state: State, *, beta: float = 0.1, eta: float = 0.01, loss_type: str = "dpo"
) -> tuple[list[float], State]:
    def plain(x: Example) -> float:
        return -log_sigma(beta * delta(x)) if loss_type == "dpo" else (delta(x) - 1 / (2 * beta)) ** 2

    members: dict[int, list[float]] = {}
    for x in xs:
        members.setdefault(x.extras["groups"], []).append(plain(x))
    q = list(state[0])
    for group, losses in members.items():
        q[group] *= math.exp(eta * mean(losses))
    total = math.fsum(q)
    q = sg([weight / total for weight in q])

    def weighted(x: Example) -> float:
        group = x.extras["groups"]
        return q[group] * plain(x) * len(xs) / len(members[group])

    return [weighted(x) for x in xs], (q,)


WINDOW = 50


def numpy_quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# State: margins, how many of them, the last ones, have been seen, and the step.
# A's margin, 6.5, is above the window's only one and B's, −2.5, below: z = 1 and z = 0, where α = .1 is cDPO's ε.
@batch_row(
    {"beta": 0.3},
    {"alpha": 0.4},
    {"quantile": 0.6},
    {"after": 2, "quantile": 0.5},
    {"beta": 0.02, "alpha": 0.3, "quantile": 0.7, "after": 3},
    golden=[
        Golden(
            {"beta": 0.1, "alpha": 0.1},
            DPO_GOLDEN.a,
            CDPO_GOLDEN.b,
            states=(([0.0] * 49 + [1.0], 1.0, 1.0), ([0.0] * 49 + [1.0], 1.0, 1.0)),
        )
    ],
    start=([0.0] * WINDOW, 0.0, 0.0),
)
def selfie(
    xs: Examples, state: State, *, beta: float = 0.1, alpha: float = 0.1, quantile: float = 0.1, after: int = 0
) -> tuple[list[float], State]:
    margins, seen, step = state
    known = list(margins)[WINDOW - min(int(seen), WINDOW) :]
    trusted = [1.0 if not known or step < after or delta(x) > numpy_quantile(known, quantile) else 0.0 for x in xs]
    trusted = sg(trusted)

    def loss(x: Example, z: float) -> float:
        towards = (1 - alpha + alpha * z) * log_sigma(beta * delta(x))
        return -towards - alpha * (1 - z) * log_sigma(-beta * delta(x))

    losses = [loss(x, z) for x, z in zip(xs, trusted, strict=True)]
    pushed = [*margins, *(delta(x) for x in xs)][-WINDOW:]
    return losses, (pushed, float(min(seen + len(xs), WINDOW)), step + 1)
