"""Whether a model's prompts can be shared, found out by running it.

On a handful of random tokens, log-probs and gradients of whole rows are compared with those of the same rows behind
shared prompts. Sharing is chosen only where it is exact. A sliding window wider than those rows is not exercised here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mlxpref.data.batching import collate
from mlxpref.data.parts import PlannedPart, Splitter
from mlxpref.errors import ModelError
from mlxpref.folders import vocabulary_size
from mlxpref.records import MicroBatch, Tokenized
from mlxpref.torch_backend.arrays import to_torch
from mlxpref.torch_backend.policy import Policy
from mlxpref.torch_backend.prefix import Sharing

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference in nats, and relative gradient error, that rounding alone may explain, besides twice the noise
between two paddings of whole rows."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One comparison: largest log-prob difference (nats) and relative gradient difference."""

    logps: float
    gradients: float
    reason: str = ""

    def exact(self, tolerance: float) -> bool:
        return not self.reason and self.logps <= tolerance and self.gradients <= tolerance


Outcome = tuple[Tensor, list[Tensor]]
"""Log-probs (B, S, L) and gradients."""


def choose_way(policy: Policy) -> Probe:
    """Set ``policy.way`` by what agrees with whole rows; a note says why prompts are not shared."""
    network, training = policy.network, policy.model.training
    policy.way, network.sharing = "plain", None
    rows = _random_rows(vocabulary_size(policy.config))
    watched = _watched(policy)
    _training_without_dropout(policy.model)
    try:
        whole = _outcome(policy, _laid_out(rows, share=False), watched)
        noise = _compared(whole, _outcome(policy, _laid_out(rows, share=False, padding=8), watched))
        tolerance = TOLERANCE.get(policy.model.dtype, 1e-4) + 2 * max(noise.logps, noise.gradients)
        try:
            network.sharing = Sharing(policy.model)
            found = _compared(whole, _outcome(policy, _laid_out(rows, share=True), watched))
        except (ModelError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            # Any of these is a model class that does not fit the layout; whole rows need nothing of it.
            found = Probe(np.inf, np.inf, reason=f"{type(error).__name__}: {error}")
    finally:
        policy.model.train(training)
    if found.exact(tolerance):
        policy.way = "shared"
        return found
    network.sharing = None
    gap = f"log-probs differ by {found.logps:.1e} nats, gradients by {found.gradients:.1e}"
    reason = " ".join((found.reason or gap).split())[:200]
    policy.notes.append(f"prompts are computed once for each response: sharing them is not exact here ({reason})")
    return found


def _training_without_dropout(model: nn.Module) -> None:
    """Training mode, in which layers are checkpointed, and some models take other operations."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def _random_rows(vocabulary: int) -> list[Tokenized]:
    """Three prompts of 10 to 12 tokens, two responses each of 3 to 6."""
    draw = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return draw.integers(0, vocabulary, n).astype(np.int32)

    return [Tokenized(ids(n), (ids(n - 6), ids(n - 7)), example_id=str(n)) for n in (10, 11, 12)]


def _laid_out(rows: Sequence[Tokenized], *, share: bool, padding: int = 0) -> MicroBatch:
    """All rows as one micro-batch; a shared one has 8 prompt tokens in common."""
    every = tuple(range(len(rows)))
    shape = Splitter(rows, share_prompts=share, budget=1024).shape(every)
    wider = replace(shape, rows=tuple(width + padding for width in shape.rows))
    return collate(rows, PlannedPart(every, wider))


def _watched(policy: Policy) -> list[nn.Parameter]:
    """Parameters whose gradients are compared: all factors of an adapter; of whole weights those of the first and the
    last slots, since gradients of all take as much memory as the model."""
    slots = list(policy.slots.values()) if policy.masters else []
    if policy.fine_tune_type == "full":
        slots = [*slots[:4], *slots[-4:]]
    return list({id(slot.parameter): slot.parameter for slot in slots}.values())


def _outcome(policy: Policy, batch: MicroBatch, watched: Sequence[nn.Parameter]) -> Outcome:
    """Log-probs, and gradients of a fixed random mixture of them.

    A fresh adapter's second factor is zero and hides the first, so both are jittered meanwhile.
    """
    given = to_torch(batch, policy.device)
    held = [one.detach().clone() for one in watched] if policy.fine_tune_type != "full" else []
    draw = torch.Generator().manual_seed(1)
    try:
        for one in watched[: len(held)]:
            one.data += 0.02 * torch.randn(one.shape, generator=draw).to(one)
        with torch.set_grad_enabled(bool(watched)):
            logps = policy.network.token_values(given)[0].tokens
        if not watched:
            return logps, []
        rows = np.arange(given.mask.shape[0])[:, None, None]
        places = np.arange(given.mask.shape[2])[None, None] + 7.0 * np.arange(given.mask.shape[1])[None, :, None]
        mixture = torch.from_numpy(np.sin(1.0 + places + 3.0 * rows)).to(logps) * given.mask
        found = torch.autograd.grad((logps * mixture).sum(), list(watched), allow_unused=True)
        return logps.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(watched, found, strict=True)]
    finally:
        for one, value in zip(watched, held, strict=False):
            one.data.copy_(value)


def _compared(one: Outcome, other: Outcome) -> Probe:
    length = min(one[0].shape[-1], other[0].shape[-1])
    gap = (one[0][..., :length] - other[0][..., :length]).abs().max()
    norm = sum(float(g.double().square().sum()) for g in one[1]) ** 0.5
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one[1], other[1], strict=True)) ** 0.5
    return Probe(float(gap), apart / max(norm, 1e-12))
