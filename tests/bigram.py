"""A backend small enough to compute by hand: each token's log-prob depends on the token before it only.

``token_logps`` reads the arrays of a micro-batch as a real backend does (shelves, scored positions,
places); ``by_hand`` computes the same numbers from the token ids alone, in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlxpref.records import Logps, MicroBatch, Tokenized


def table(seed: int, size: int = 512) -> np.ndarray:
    """(size, size) float64: log-prob of each next token behind each token, nats."""
    logits = np.random.default_rng(seed).normal(size=(size, size)) * 2
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@dataclass
class BigramPolicy:
    """A policy and its reference as two tables."""

    policy: np.ndarray
    reference: np.ndarray
    fingerprint: str = "0123456789abcdef"
    share_prompts: bool = True
    way: str = "shared"
    path: str = "bigram"
    asked: list[tuple[bool, int]] = field(default_factory=list)
    """(reference?, examples) of every micro-batch that was computed."""


def token_logps(policy: BigramPolicy, batch: MicroBatch, *, reference: bool = False) -> Logps:
    policy.asked.append((reference, len(batch.weights)))
    of = policy.reference if reference else policy.policy
    before = np.concatenate([shelf.inputs.ravel() for shelf in batch.shelves])[batch.scored]
    scored = np.append(of[before, batch.targets], 0.0).astype(np.float32)
    return Logps(scored[batch.place], batch.mask)


def backend(**more: Any) -> Any:
    return SimpleNamespace(token_logps=token_logps, **more)


def by_hand(of: np.ndarray, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
    """Log-prob of each response token, from the definition."""
    row = [*prompt_ids, *response_ids]
    return [float(of[row[t - 1], row[t]]) for t in range(len(prompt_ids), len(row))]


def random_rows(n: int, *, responses: int = 2, seed: int = 0, longest: int = 40) -> list[Tokenized]:
    """Rows of random ids and lengths; a row's responses share no ids with another's prompt by chance."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(0, 512, rng.integers(1, longest)).astype(np.int32)

    return [Tokenized(ids(), tuple(ids() for _ in range(responses)), f"row-{i}") for i in range(n)]
