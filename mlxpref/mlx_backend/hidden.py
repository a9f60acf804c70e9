"""Hidden states, summed over responses: what a representation of a whole response is made of."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxpref.errors import ModelError
from mlxpref.mlx_backend.arrays import to_mlx
from mlxpref.mlx_backend.policy import Policy
from mlxpref.mlx_backend.step import reference_hidden
from mlxpref.records import MicroBatch


def hidden_sums(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> np.ndarray:
    """Sum over each slot's scored tokens of the hidden states that predict them, dropout off.

    Those are the last layer's outputs as the head reads them, at the token before each scored one.

    Args:
        micro_batch: NumPy arrays.
        reference: take the adapter out (or put back the one the policy started from).

    Returns:
        (B, S, D) float32; S slots: the K responses, then the further texts.

    Raises:
        ModelError: an architecture whose head cannot be told from its body.
    """
    if not policy.network.split_head:
        raise ModelError(f"{policy.path}: the hidden states of this architecture cannot be told from its logits")
    hidden = reference_hidden(policy, micro_batch) if reference else _policy_hidden(policy, micro_batch)
    rows = np.array(hidden.astype(mx.float32))
    slots, length = micro_batch.place.shape[0] * micro_batch.place.shape[1], micro_batch.place.shape[2]
    place = np.asarray(micro_batch.place).reshape(slots, length)
    slot, token = np.nonzero(place < len(rows))
    owner = np.zeros((slots, len(rows)), np.float32)
    owner[slot, place[slot, token]] = 1.0
    return (owner @ rows).reshape(*micro_batch.place.shape[:2], -1)


def _policy_hidden(policy: Policy, micro_batch: MicroBatch) -> mx.array:
    """(N, D) hidden rows of the policy that predict the scored tokens."""
    if "policy_hidden" not in policy.compiled:
        # Weights are arguments: a captured array would be a constant of the graph.
        def forward(parameters: dict[str, mx.array], batch: MicroBatch) -> mx.array:
            held = policy.trainable()
            policy.n_traced += 1
            policy.update(parameters)
            try:
                return policy.network.hidden_rows(batch)
            finally:
                policy.update(held)

        policy.compiled["policy_hidden"] = mx.compile(forward)
    was_training = policy.model.training
    policy.model.eval()
    try:
        result = policy.compiled["policy_hidden"](policy.trainable(), to_mlx(micro_batch))
        mx.eval(result)
    finally:
        policy.model.train(was_training)
    return result
