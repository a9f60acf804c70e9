"""What every backend's step does alike, with arrays of any library: columns in, figures out, parts shared out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxpref.records import Batch, Logps, MicroBatch, StepReport, stack_lists
from mlxpref.workers import Workers

HEAD_ROWS = 512
"""Most rows of hidden states that meet the vocabulary at once on MLX."""


def head_rows(vocabulary: int, *, on_cpu: bool) -> int:
    """Rows of one chunk of the head on MLX: at most ``HEAD_ROWS``, fewer where they would make logits of over 25 MB;
    on a CPU of over 4 MB, which its caches hold.

    About two dozen arrays of a chunk's size are alive at once: MLX allocates some tasks ahead.
    """
    least, most = (11, 4e6) if on_cpu else (64, 25e6)
    return max(least, min(HEAD_ROWS, int(most / (4 * vocabulary))))


class Figures(NamedTuple):
    """What a step reports of one micro-batch: losses (B,), log-probs of policy and reference (B, S), or None."""

    losses: Any
    policy: Any
    reference: Any


def columns(values: Mapping[str, Any], batch: MicroBatch) -> dict[str, Any]:
    """What an objective may ask for, by name.

    Args:
        values: ``tokens`` (B, S, L), and by name what else a model says of each token.
    """
    found: dict[str, Any] = {**batch.extras, **values, "policy": Logps(values["tokens"], batch.mask)}
    if batch.reference is not None:
        found["reference"] = Logps(batch.reference, batch.mask)
    if batch.scores is not None:
        found["scores"] = batch.scores
    return found


def parts_of(workers: Workers, batch: Batch) -> list[int]:
    """The parts of a batch that this worker computes."""
    owners = batch.workers or [0] * len(batch.parts)
    return [index for index, owner in enumerate(owners) if workers.size == 1 or owner == workers.rank]


def report(
    batch: Batch, figures: Sequence[Figures], host: Callable[[Any], np.ndarray], *, norm: float, skipped: bool
) -> StepReport:
    """The figures of all micro-batches as one report.

    Args:
        host: makes a NumPy array of the backend's.
        norm: of the gradient, before clipping.
        skipped: the step changed nothing.
    """
    losses = np.concatenate([host(one.losses) for one in figures])
    weights = np.concatenate([np.asarray(part.weights) for part in batch.parts])
    references = [host(one.reference) for one in figures if one.reference is not None]
    return StepReport(
        loss=float((losses * weights).sum() / max(weights.sum(), 1e-12)),
        losses=losses,
        policy_sums=stack_lists([host(one.policy) for one in figures], np.nan),
        reference_sums=stack_lists(references, np.nan) if references else None,
        lengths=stack_lists([np.asarray(part.mask).sum(-1) for part in batch.parts], 0.0),
        grad_norm=norm,
        skipped=skipped,
    )
