"""The field's metrics, from the log-probs of responses. NumPy; nats; nothing here has a gradient.

Responses stand best first. With K > 2 the best is compared with each of the rest: "rejected" is the
mean over the rest, and an accuracy counts pairs (best, other), not examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxpref.records import Half


def implicit_rewards(
    policy_sums: np.ndarray,
    reference_sums: np.ndarray | None,
    lengths: np.ndarray,
    beta: float,
    *,
    per_token: bool = False,
) -> np.ndarray:
    """β · log-ratio of each response, or β · log-prob where there is no reference. (B, K).

    Args:
        policy_sums, reference_sums: (B, K) log-probs of whole responses.
        lengths: (B, K) response tokens; divides where ``per_token``, as the length-normalised
            objectives do (``Objective.per_token``). TRL does so for SimPO, but not for its ``ipo``
            and ``sigmoid_norm``, whose rewards it takes from sums.
    """
    rewards = np.asarray(policy_sums, np.float64)
    if reference_sums is not None:
        rewards = rewards - np.asarray(reference_sums, np.float64)
    return beta * (rewards / np.asarray(lengths) if per_token else rewards)


def wins(values: np.ndarray) -> np.ndarray:
    """(B, K) → (B,): the share of the rest that the best is strictly above. A tie is not a win."""
    values = np.asarray(values)
    return (values[:, :1] > values[:, 1:]).mean(1)


def ranking_accuracy(policy_sums: np.ndarray) -> float:
    """Share of pairs whose preferred response is the likelier one: 1[ℓ_w > ℓ_l], reference or not.

    The margin can be positive without it: a pair that the reference ranks wrong by r nats needs Δ > r.
    Source: Chen et al. 2024, arXiv:2405.19534.
    """
    return float(wins(policy_sums).mean())


def step_metrics(
    policy_sums: np.ndarray,
    reference_sums: np.ndarray | None,
    lengths: np.ndarray,
    losses: np.ndarray,
    beta: float,
    halves: Sequence[Half | None] | None = None,
    *,
    weights: np.ndarray | None = None,
    per_token: bool = False,
) -> dict[str, float]:
    """Metrics of one batch, or of a whole pass, under TRL's keys.

    Args:
        policy_sums, reference_sums: (B, K) log-probs of whole responses, nats; reference or None.
        lengths: (B, K) response tokens.
        losses: (B,).
        beta: scale of the rewards, ``Objective.beta``.
        halves: for each example whose score was the goal; None for unconditioned ones.
        weights: (B,) of the examples in the loss; all others count each example once.
        per_token: see ``implicit_rewards``; ``Objective.per_token``.

    Returns:
        ``loss``; ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` and
        ``rewards/accuracies`` (a tie counts as wrong); ``logps/chosen``, ``logps/rejected`` (sums);
        ``lengths/chosen``, ``lengths/rejected``; ``ranking_accuracy``. Where a half occurs, its
        ``chosen_half/rewards/accuracies`` and ``…/margins``, ``rejected_half/…`` alike: a model
        that does not read the goal does well on one and as badly on the other.
    """
    policy_sums = np.asarray(policy_sums, np.float64)
    rewards = implicit_rewards(policy_sums, reference_sums, lengths, beta, per_token=per_token)
    accuracies, margins = wins(rewards), rewards[:, 0] - rewards[:, 1:].mean(1)
    metrics: dict[str, float] = {"loss": np.average(np.asarray(losses, np.float64), weights=weights)}
    metrics |= _best_and_rest("rewards", rewards)
    metrics |= {"rewards/margins": margins.mean(), "rewards/accuracies": accuracies.mean()}
    metrics |= _best_and_rest("logps", policy_sums)
    metrics |= _best_and_rest("lengths", np.asarray(lengths, np.float64))
    metrics["ranking_accuracy"] = wins(policy_sums).mean()
    for half in ("chosen", "rejected"):
        rows = [i for i, which in enumerate(halves or ()) if which == half]
        if rows:
            metrics[f"{half}_half/rewards/accuracies"] = accuracies[rows].mean()
            metrics[f"{half}_half/rewards/margins"] = margins[rows].mean()
    return {name: float(value) for name, value in metrics.items()}


def _best_and_rest(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}/chosen": values[:, 0].mean(), f"{name}/rejected": values[:, 1:].mean()}
