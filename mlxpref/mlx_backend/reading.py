"""What a policy or its reference says of a micro-batch, without gradients and with dropout off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.errors import ModelError
from mlxpref.mlx_backend.arrays import to_mlx, to_numpy
from mlxpref.mlx_backend.policy import Policy
from mlxpref.records import Logps, MicroBatch


def token_logps(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> Logps:
    """Log-probs of every scored token under the policy or its reference, dropout off.

    Args:
        micro_batch: NumPy arrays.
        reference: take the adapter out (or put back the one the policy started from).

    Returns:
        NumPy float32, (B, S, L), nats.
    """
    return to_numpy(_read(policy, micro_batch, "logps", _logps, reference))


def hidden_rows(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> mx.array:
    """(N, D) hidden rows, in the model's dtype, that predict the scored tokens; arguments as ``token_logps``."""
    return _read(policy, micro_batch, "hidden", _hidden, reference)


def hidden_sums(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> np.ndarray:
    """Sum over each slot's scored tokens of the hidden states that predict them, dropout off.

    Those are the last layer's outputs as the head reads them, at the token before each scored one.

    Args:
        micro_batch, reference: as ``token_logps``.

    Returns:
        (B, S, D) float32; S slots: the K responses, then the further texts.

    Raises:
        ModelError: an architecture whose head cannot be told from its body.
    """
    if not policy.network.split_head:
        raise ModelError(f"{policy.path}: the hidden states of this architecture cannot be told from its logits")
    rows = np.array(hidden_rows(policy, micro_batch, reference=reference).astype(mx.float32))
    slots, length = micro_batch.place.shape[0] * micro_batch.place.shape[1], micro_batch.place.shape[2]
    place = np.asarray(micro_batch.place).reshape(slots, length)
    slot, token = np.nonzero(place < len(rows))
    owner = np.zeros((slots, len(rows)), np.float32)
    owner[slot, place[slot, token]] = 1.0
    return (owner @ rows).reshape(*micro_batch.place.shape[:2], -1)


def _logps(policy: Policy, batch: MicroBatch) -> Logps:
    return policy.network.token_logps(batch, differentiate=False)


def _hidden(policy: Policy, batch: MicroBatch) -> mx.array:
    return policy.network.hidden_rows(batch)


def _read(
    policy: Policy,
    micro_batch: MicroBatch,
    what: str,
    function: Callable[[Policy, MicroBatch], Any],
    reference: bool,
) -> Any:
    """A compiled forward pass of the policy or its reference, evaluated."""
    if (what, reference) not in policy.compiled:
        # Weights that move are arguments; a captured array would be a constant of the graph.
        def forward(parameters: dict[str, mx.array], batch: MicroBatch) -> Any:
            held = policy.trainable()
            policy.n_traced += 1
            policy.update(parameters)
            try:
                return function(policy, batch)
            finally:
                policy.update(held)

        policy.compiled[what, reference] = mx.compile(forward)
    was_training = policy.model.training
    if was_training:
        policy.model.eval()
    try:
        with policy.as_reference() if reference else nullcontext():
            result = policy.compiled[what, reference](policy.trainable(), to_mlx(micro_batch))
            mx.eval(result)
            return result
    finally:
        if was_training:
            policy.model.train()
