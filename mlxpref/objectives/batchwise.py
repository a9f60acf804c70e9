"""Objectives that see a whole batch at once: splitting it changes them.

Some compare examples with each other (``kto``, ``aot``), others carry numbers from step to step, as a ``state``:
a NamedTuple of numbers or arrays that goes in and comes out. At step 0 its parts are Python floats and NumPy
arrays; what comes out are arrays of the library at work, and nothing in them has a gradient. Each call is one
step, and updates the state once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mlxpref import ops
from mlxpref.objectives.logratios import list_log_ratios, log_ratios, margin, mean_margin, means, smoothed, sums
from mlxpref.objectives.margin import dpo, ipo
from mlxpref.objectives.registry import (
    BatchLogps,
    FlipRate,
    NonNegative,
    PerExampleIndex,
    Positive,
    Share,
    TextLogps,
    objective,
)
from mlxpref.ops import Array, log_sigmoid, relu, sigmoid, stop_gradient
from mlxpref.records import Logps

Steps = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
SMALLEST_STD = 1e-6
SMALLEST_WEIGHT = 1e-30
WINDOW = 50


class RunningMean(NamedTuple):
    """Mean of every reward seen so far.

    Attributes:
        mean: of the rewards βa of chosen and rejected responses; 0 while none was seen.
        count: how many they are, two a pair. In float32 it is exact up to 16 million.
    """

    mean: Any = 0.0
    count: Any = 0.0


class Moments(NamedTuple):
    """Mean and spread of the margins of recent batches, each an exponential moving average.

    Attributes:
        mean, std: of the margins per token, nats; std with 1/B under the root.
        started: 0 before the first batch with a spread, whose moments are taken as they are; 1 after.
    """

    mean: Any = 0.0
    std: Any = 0.0
    started: Any = 0.0


class GroupWeights(NamedTuple):
    """How much each group counts.

    Attributes:
        q: (G,) ≥ 0, sum 1.
    """

    q: Any


class MarginWindow(NamedTuple):
    """The margins of the last 50 pairs.

    Attributes:
        margins: (50,) nats, the newest last; the first of them mean nothing until 50 were seen.
        seen: how many of them do, 0 to 50.
        step: how many batches there have been.
    """

    margins: Any
    seen: Any = 0.0
    step: Any = 0.0


def uniform_weights(n_groups: int, **options: Any) -> GroupWeights:
    """Every group alike: the state of ``group_robust`` at step 0."""
    return GroupWeights(np.full(n_groups, 1 / n_groups))


NO_REWARDS = RunningMean()
NO_MOMENTS = Moments()
NO_MARGINS = MarginWindow(np.zeros(WINDOW))


@objective
def bco(
    policy: BatchLogps, reference: Logps, state: RunningMean = NO_REWARDS, *, beta: Positive = 0.01
) -> tuple[Array, RunningMean]:
    r"""Binary classifier optimisation: chosen rewards above, rejected below the mean of all rewards so far.

    .. math:: -\log\sigma(\beta a_w - \delta) - \log\sigma(\delta - \beta a_l)

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats.
        state: δ, the mean of all rewards seen, and their number; this batch is counted before it is used.
        beta: strength of the pull towards the reference, 1/nats.

    Returns:
        (B,) losses, 2 log 2 where policy = reference from the start; and the state. δ has no gradient.

    Convention: log-ratios are summed over tokens; every reward counts once. Older TRL averages the means of the
    batches, the same for batches of one size. The paper's weights for prompts of unlike distribution are not
    part of this; δ = 0 is ``bco_pair``.
    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    chosen, rejected = log_ratios(policy, reference)
    rewards = stop_gradient(beta * ops.concatenate([chosen, rejected], 0))
    count = state.count + rewards.shape[0]
    delta = state.mean + (rewards.mean(0) - state.mean) * (rewards.shape[0] / count)
    losses = -log_sigmoid(beta * chosen - delta) - log_sigmoid(delta - beta * rejected)
    return losses, RunningMean(delta, _as_array(count, delta))


@objective
def kto(
    policy: BatchLogps,
    reference: Logps,
    mismatched: TextLogps,
    mismatched_reference: TextLogps,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Array:
    r"""Kahneman–Tversky optimisation: gains and losses against what the policy has gained on other texts.

    .. math::
        \lambda_D\, \sigma\bigl(\beta(K - a_w)\bigr) + \lambda_U\, \sigma\bigl(\beta(a_l - K)\bigr),
        \qquad K = \max\bigl(0, \overline{a'}\bigr)

    a' is the log-ratio of a response that belongs to another prompt; its mean over the batch estimates the KL
    divergence from the reference. K has no gradient.

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats.
        mismatched, mismatched_reference: log-probs, after the example's prompt, of another's response, (B, 1, L).
        beta: strength of the pull towards the reference, 1/nats.
        desirable_weight: λ_D, of the chosen responses; λ_D : λ_U between 1 and 4/3 is advised for pairs.
        undesirable_weight: λ_U, of the rejected responses.

    Returns:
        (B,) losses; (λ_D + λ_U)/2 where policy = reference.

    Convention: log-ratios are summed over tokens. The loss of a pair is the sum of its two responses', where TRL's
    KTO trainer averages over responses: half as much. TRL's former ``kto_pair`` took K from the responses themselves.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    chosen, rejected = log_ratios(policy, reference)
    kl = stop_gradient(relu(list_log_ratios(mismatched, mismatched_reference).mean()))
    desirable, undesirable = sigmoid(beta * (kl - chosen)), sigmoid(beta * (rejected - kl))
    return desirable_weight * desirable + undesirable_weight * undesirable


@objective
def aot(policy: BatchLogps, reference: Logps, *, beta: Positive = 0.01, label_smoothing: FlipRate = 0.0) -> Array:
    r"""Alignment by optimal transport, paired: the policy's margins, sorted, against the reference's, sorted.

    .. math::
        z_i = \beta \bigl( (\ell_w - \ell_l)_{(i)} - (\ell^r_w - \ell^r_l)_{(i)} \bigr), \qquad
        -(1-\varepsilon) \log\sigma(z_i) - \varepsilon \log\sigma(-z_i)

    (i) is the i-th smallest of the batch: the distribution of margins is asked to rise, not each margin.

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats. Large batches; one of 1 is DPO.
        beta: strength of the pull towards the reference, 1/nats.
        label_smoothing: ε, the share of labels taken to be wrong.

    Returns:
        (B,) losses in order of the margins, not of the rows; log 2 where policy = reference.

    Convention: log-probs are summed over tokens. Named as in TRL 1.x; in older TRL ``aot`` is the unpaired form.
    Source: Melnyk et al. 2024, arXiv:2406.05882.
    Also known as: aot_pair (older TRL).
    """
    ours, theirs = (chosen - rejected for chosen, rejected in (sums(policy), sums(reference)))
    return smoothed(beta * (ops.sort(ours, 0) - ops.sort(theirs, 0)), label_smoothing)


@objective
def aot_unpaired(
    policy: BatchLogps, reference: Logps, *, beta: Positive = 0.01, label_smoothing: FlipRate = 0.0
) -> Array:
    r"""Alignment by optimal transport, unpaired: chosen log-ratios, sorted, against rejected ones, sorted.

    .. math::
        z_i = \beta \bigl( a_{w,(i)} - a_{l,(i)} \bigr), \qquad
        -(1-\varepsilon) \log\sigma(z_i) - \varepsilon \log\sigma(-z_i)

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats. Which rejected response belongs to
            which chosen one plays no part. A batch of 1 is DPO.
        beta: strength of the pull towards the reference, 1/nats.
        label_smoothing: ε, the share of labels taken to be wrong.

    Returns:
        (B,) losses in order of the log-ratios, not of the rows; log 2 where policy = reference.

    Convention: log-ratios are summed over tokens. Older TRL calls this ``aot``.
    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    chosen, rejected = log_ratios(policy, reference)
    return smoothed(beta * (ops.sort(chosen, 0) - ops.sort(rejected, 0)), label_smoothing)


@objective
def alpha_dpo(
    policy: BatchLogps,
    reference: Logps,
    state: Moments = NO_MOMENTS,
    *,
    beta: Positive = 2.5,
    gamma: NonNegative = 1.5,
    alpha: NonNegative = 0.2,
    decay: Decay = 0.9,
) -> tuple[Array, Moments]:
    r"""α-DPO: SimPO that asks more of the pairs on which the policy is already far from the reference.

    .. math::
        -\log\sigma\bigl(\beta (m_w - m_l) - \gamma - \beta\alpha M^*\bigr), \qquad
        M^* = (M - \mu)/s, \quad M = (m_w - m_l) - (m^r_w - m^r_l)

    μ and s are moving averages of the batches' mean and standard deviation of M. M* is a constant.

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats. Of at least 2: one pair has no spread.
        state: μ and s; this batch counts before they are used, and the first that has a spread sets them.
        beta: scale of the reward, tokens/nat; 2.5 to 10.
        gamma: the margin asked for, absolute. The official settings give the ratio γ/β (0.15 to 0.6): multiply by β.
        alpha: how much more for one standard deviation, nats per token; 0 is SimPO. 0.05 to 0.2.
        decay: of the moving averages at each step.

    Returns:
        (B,) losses, SimPO's where policy = reference from the start; and the state.

    Convention: log-probs are averaged per response token; γ is absolute; s has 1/B under the root and is at least
    1e-6. The official code starts the averages at 0, so that its first M* are several times too large, and divides
    by B − 1.
    Source: Wu et al. 2024, arXiv:2410.10148; code junkangwu/alpha-DPO.
    """
    chosen, rejected = means(policy)
    margins = stop_gradient(mean_margin(policy, reference))
    now = _moments(margins)
    kept = decay * state.started
    mean, std = (kept * old + (1 - kept) * new for old, new in zip((state.mean, state.std), now, strict=True))
    more = (margins - mean) / ops.clip(std, low=SMALLEST_STD)
    losses = -log_sigmoid(beta * (chosen - rejected - alpha * more) - gamma)
    # Where policy = reference, as in the first step of an adapter, there is no spread to start from.
    spread = ops.indicator(now[1] > SMALLEST_STD, now[1])
    return losses, Moments(mean, std, ops.where(spread > 0, spread, _as_array(state.started, spread)))


@objective
def group_robust(
    policy: BatchLogps,
    reference: Logps,
    groups: PerExampleIndex,
    state: GroupWeights = uniform_weights,  # type: ignore[assignment]  # a function of the number of groups
    *,
    beta: Positive = 0.1,
    eta: NonNegative = 0.01,
    loss_type: Literal["dpo", "ipo"] = "dpo",
) -> tuple[Array, GroupWeights]:
    r"""Group-robust DPO or IPO: groups of examples with a high loss count ever more.

    .. math:: \sum_g q_g L_g, \qquad q_g \leftarrow q_g e^{\eta L_g} \big/ \textstyle\sum_h q_h e^{\eta L_h}

    L_g is the mean loss of the batch's examples of group g; it is 0 in the exponent for a group of which there
    are none. q is updated before it is used and has no gradient.

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats.
        groups: (B,) integers from 0 to G − 1.
        state: q, (G,), 1/G each at the start.
        beta: strength of the pull towards the reference, 1/nats; for IPO the margin is pulled to 1/(2β).
        eta: step of the weights, 1/(unit of the loss); 0 keeps them equal.
        loss_type: of each pair, "dpo" or "ipo".

    Returns:
        (B,) losses q_g·B/N_g times each pair's, whose mean is Σ q_g L_g; log 2, or 1/(4β²) for IPO, where policy =
        reference and every group is in the batch. And the state.

    Convention: log-ratios are summed over tokens. A batch without some group weighs less in all, as in the official
    code, whose adjustment C/√N_g of small groups is left out. A weight below 1e-30 is read as that at the next step,
    so that no group is lost for good.
    Source: Ramesh et al. 2024, arXiv:2405.20304; code rsshyam/Group-robust-preference-optimization, ``rdpo``, ``ripo``.
    Also known as: gr_dpo; gr_ipo; ripo.
    """
    losses = (dpo if loss_type == "dpo" else ipo)(policy, reference, beta=beta)
    index = _as_array(np.arange(state.q.shape[0]), groups)
    member = ops.indicator(groups[:, None] == index, losses)
    counts = ops.clip(member.sum(0), low=1.0)
    group_losses = (member * stop_gradient(losses)[:, None]).sum(0) / counts
    logits = ops.log(ops.clip(_as_array(state.q, losses), low=SMALLEST_WEIGHT)) + eta * group_losses
    q = ops.exp(logits - ops.logsumexp(logits, 0))
    return losses * (member * (q / counts)).sum(1) * member.shape[0], GroupWeights(q)


@objective
def selfie(
    policy: BatchLogps,
    reference: Logps,
    state: MarginWindow = NO_MARGINS,
    *,
    beta: Positive = 0.1,
    alpha: FlipRate = 0.1,
    quantile: Share = 0.1,
    after: Steps = 0,
) -> tuple[Array, MarginWindow]:
    r"""Self-refinement: DPO that smooths the labels of pairs whose margin is among the smallest of late.

    .. math::
        -(1 - \varepsilon) \log\sigma(\beta\Delta) - \varepsilon \log\sigma(-\beta\Delta), \qquad
        \varepsilon = \alpha \, [\Delta \le Q]

    Q is a quantile of the margins of the last 50 pairs before this batch. For labels made by the policy itself.

    Args:
        policy, reference: log-probs of a whole batch of pairs, (B, 2, L), nats.
        state: the last margins; this batch's come in after its losses, in the order of its rows.
        beta: strength of the pull towards the reference, 1/nats.
        alpha: ε of the pairs in doubt.
        quantile: share of the last margins that lies below Q, interpolated linearly.
        after: steps of plain DPO before the first smoothing; the paper waits for 20 % of a run.

    Returns:
        (B,) losses, log 2 where policy = reference; and the state. The choice of pairs has no gradient.

    Convention: log-ratios are summed over tokens. In the first batch no pair is in doubt, nor until ``after``. The
    margin is the policy's own, where the paper may extrapolate from the reference beyond it.
    Source: Kim et al. 2024, arXiv:2406.04412.
    Also known as: spa (the paper's later name).
    """
    margins = margin(policy, reference)
    new = stop_gradient(margins)
    window, seen, step = (_as_array(part, new) for part in state)
    doubtful = (new <= _quantile(window, seen, quantile)) & (seen > 0) & (step >= after)
    losses = smoothed(beta * margins, alpha * ops.indicator(doubtful, new))
    window = ops.concatenate([window, new], 0)[-WINDOW:]
    return losses, MarginWindow(window, ops.clip(seen + new.shape[0], high=float(WINDOW)), step + 1)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of (B,) constants."""
    mean = x.mean(0)
    return mean, ((x - mean) ** 2).mean(0) ** 0.5


def _quantile(window: Array, seen: Array, share: float) -> Array:
    """Of the last ``seen`` numbers of a window, interpolated linearly; of none, 0."""
    place = _as_array(np.arange(WINDOW, dtype=np.float64), window)
    ordered = ops.sort(ops.where(place >= WINDOW - seen, window, float("inf")), 0)
    at = share * (seen - 1)
    below, above = (place <= at) & (at < place + 1), (at <= place) & (place < at + 1)
    low, high = (ops.where(here, ordered, 0.0).sum(0) for here in (below, above))
    return low + (at - ops.where(below, place, 0.0).sum(0)) * (high - low)


def _as_array(value: Any, like: Array) -> Array:
    """A number or NumPy array as an array of the library, dtype and device of ``like``; others as they are."""
    xp = ops.library(like)
    if ops.library(value) is not np:
        return value
    if xp.__name__ == "torch":
        return xp.as_tensor(value, dtype=like.dtype, device=like.device)
    return xp.asarray(value, dtype=like.dtype) if xp is np else xp.array(value, dtype=like.dtype)
