"""The step as one would write it down: whole rows, whole logits, one forward pass for each response of the policy
and of its reference. A witness of the real one, for a few short rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mlxpref.objectives import Objective
from mlxpref.records import Batch, Tokenized
from mlxpref.steps import columns
from mlxpref.torch_backend.arrays import to_numpy, to_torch
from mlxpref.torch_backend.policy import Policy


def plain_gradients(
    policy: Policy, objective: Objective, rows: Sequence[Tokenized], batch: Batch
) -> dict[str, np.ndarray]:
    """Gradients of a batch's mean loss by parameter, float32, as ``Step.gradients`` gives them; without dropout.

    Args:
        objective: one that takes each example for itself.
        rows: the data that ``batch`` holds examples of.
        batch: for its weights, masks and further columns; its reference log-probs are made anew.
    """
    total = float(sum(part.weights.sum() for part in batch.parts))
    policy.model.eval()
    policy.model.zero_grad(set_to_none=True)
    for part, indices in zip(batch.parts, batch.rows, strict=True):
        some, shape = [rows[index] for index in indices], part.mask.shape
        tensors = to_torch(part, policy.device)
        if "reference" in objective.needs:
            with torch.no_grad(), policy.as_reference():
                tensors = tensors._replace(reference=_tokens(policy, some, shape))
        losses = objective(columns({"tokens": _tokens(policy, some, shape)}, tensors))
        ((losses * tensors.weights).sum() / total).backward()
    gradients = {name: to_numpy(slot.gathered(slot.gradient)) for name, slot in policy.slots.items()}
    policy.model.zero_grad(set_to_none=True)
    return gradients


def _tokens(policy: Policy, rows: Sequence[Tokenized], shape: tuple[int, ...]) -> Tensor:
    """(B, S, L) log-probs of every scored token, float32, 0 where there is none."""
    return torch.stack([torch.stack([_of_slot(policy, row, slot, shape[2]) for slot in row.slots]) for row in rows])


def _of_slot(policy: Policy, row: Tokenized, slot: tuple[np.ndarray, np.ndarray], width: int) -> Tensor:
    lead, ids = slot
    whole = torch.from_numpy(np.concatenate([row.prompt_ids, lead, ids]).astype(np.int64)).to(policy.device)
    logits = policy.model(input_ids=whole[None, :-1], use_cache=False).logits[0].float()
    picked = logits.log_softmax(-1).gather(1, whole[1:, None])[-len(ids) :, 0]
    return pad(picked, (0, width - len(ids)))
