"""What a policy or its reference says of a micro-batch, without gradients and with dropout off."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from mlxpref.errors import ModelError
from mlxpref.records import Logps, MicroBatch
from mlxpref.torch_backend.arrays import to_numpy, to_torch
from mlxpref.torch_backend.policy import Policy


@torch.no_grad()
def token_logps(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> Logps:
    """Log-probs of every scored token under the policy or its reference, dropout off.

    Args:
        micro_batch: NumPy arrays.
        reference: switch the adapter off (or put back the one the policy started from).

    Returns:
        NumPy float32, (B, S, L), nats.
    """
    with _quiet(policy, reference):
        found, _ = policy.network.token_values(to_torch(micro_batch, policy.device))
    return Logps(to_numpy(found.tokens), to_numpy(found.mask))


@torch.no_grad()
def hidden_rows(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> Tensor:
    """(N, D) hidden rows, in the model's dtype, that predict the scored tokens; arguments as ``token_logps``."""
    with _quiet(policy, reference):
        return policy.network.rows(to_torch(micro_batch, policy.device))


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
    rows = hidden_rows(policy, micro_batch, reference=reference).float()
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    place = torch.from_numpy(np.asarray(micro_batch.place, np.int64)).to(rows.device)
    sums = [padded[place[:, slot]].sum(1) for slot in range(place.shape[1])]  # a slot at a time: (B, L, D) is large
    return to_numpy(torch.stack(sums, 1))


def _quiet(policy: Policy, reference: bool) -> ExitStack:
    """A context without dropout, in which the model is the reference if asked for."""
    stack = ExitStack()
    if policy.model.training:
        policy.model.eval()
        stack.callback(policy.model.train)
    if reference:
        stack.enter_context(policy.as_reference())
    return stack
