"""The step as one would write it down: whole rows, whole logits, one forward pass for each response of the policy
and of its reference. A witness of the real one, for a few short rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.mlx_backend.arrays import to_mlx
from mlxpref.mlx_backend.policy import Policy
from mlxpref.objectives import Objective
from mlxpref.records import Batch, Tokenized
from mlxpref.steps import columns


def plain_gradients(
    policy: Policy, objective: Objective, rows: Sequence[Tokenized], batch: Batch
) -> dict[str, np.ndarray]:
    """Gradients of a batch's mean loss by parameter, float32, as ``Step.gradients`` gives them; without dropout.

    Args:
        objective: one that takes each example for itself.
        rows: the data that ``batch`` holds examples of.
        batch: for its weights, masks and further columns; its reference log-probs are made anew.
    """
    total, gradients = float(sum(part.weights.sum() for part in batch.parts)), None
    policy.model.eval()
    try:
        for part, indices in zip(batch.parts, batch.rows, strict=True):
            some = [rows[index] for index in indices]
            arrays = to_mlx(part)
            if "reference" in objective.needs:
                with policy.as_reference():
                    arrays = arrays._replace(reference=_tokens(policy, some, part.mask.shape))
                    mx.eval(arrays.reference)

            def loss(masters: dict[str, mx.array], arrays: Any = arrays, some: Any = some) -> mx.array:
                policy.update({name: value.astype(policy.dtypes[name]) for name, value in masters.items()})
                found = columns({"tokens": _tokens(policy, some, arrays.mask.shape)}, arrays)
                return (objective(found) * arrays.weights).sum() / total

            found = mx.grad(loss)(policy.masters)
            mx.eval(found)
            gradients = found if gradients is None else {name: gradients[name] + found[name] for name in found}
    finally:
        policy.set_masters(policy.masters)
    return {name: np.array(value) for name, value in (gradients or {}).items()}


def _tokens(policy: Policy, rows: Sequence[Tokenized], shape: tuple[int, ...]) -> mx.array:
    """(B, S, L) log-probs of every scored token, float32, 0 where there is none."""
    return mx.stack([mx.stack([_of_slot(policy, row, slot, shape[2]) for slot in row.slots]) for row in rows])


def _of_slot(policy: Policy, row: Tokenized, slot: tuple[np.ndarray, np.ndarray], width: int) -> mx.array:
    lead, ids = slot
    whole = mx.array(np.concatenate([row.prompt_ids, lead, ids]))
    logits = policy.model(whole[None, :-1])[0].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    picked = mx.take_along_axis(logps, whole[1:, None], axis=-1)[-len(ids) :, 0]
    return mx.pad(picked, (0, width - len(ids)))
