"""A backend small enough to compute by hand: a token's log-prob depends on the sum of all ids before it.

``token_logps`` reads the arrays of a micro-batch as a real backend does (shared prompts, shelves,
scored positions, places); ``by_hand`` computes the same numbers from the token ids alone, in plain
Python. Every token of the prompt counts, so a prompt that is not the right one shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlxpref.records import Logps, MicroBatch, Tokenized

SIZE = 512
"""States, and tokens of the vocabulary."""


def table(seed: int) -> np.ndarray:
    """(SIZE, SIZE) float64: log-prob of each next token in each state, nats."""
    logits = np.random.default_rng(seed).normal(size=(SIZE, SIZE)) * 2
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@dataclass
class FakePolicy:
    """A policy and its reference as two tables."""

    policy: np.ndarray
    reference: np.ndarray
    fingerprint: str = "0123456789abcdef"
    share_prompts: bool = True
    sharded: bool = False
    way: str = "shared"
    path: str = "fake"
    notes: tuple[str, ...] = ()
    asked: list[tuple[bool, int]] = field(default_factory=list)
    """(reference?, examples) of every micro-batch that was computed."""


def token_logps(policy: FakePolicy, batch: MicroBatch, *, reference: bool = False) -> Logps:
    policy.asked.append((reference, len(batch.weights)))
    of = policy.reference if reference else policy.policy
    shared = batch.prompts.sum(-1)
    states = [shared[shelf.prompt][:, None] + shelf.inputs.cumsum(-1) for shelf in batch.shelves]
    before = np.concatenate([state.ravel() for state in states])[batch.scored] % SIZE
    scored = np.append(of[before, batch.targets], 0.0).astype(np.float32)
    return Logps(scored[batch.place], batch.mask)


def backend(**more: Any) -> Any:
    return SimpleNamespace(token_logps=token_logps, **{"device_info": dict, **more})


def by_hand(of: np.ndarray, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
    """Log-prob of each response token, from the definition."""
    row = [*prompt_ids, *response_ids]
    return [float(of[sum(row[:t]) % SIZE, row[t]]) for t in range(len(prompt_ids), len(row))]


def random_rows(n: int, *, responses: int = 2, seed: int = 0, longest: int = 40) -> list[Tokenized]:
    """Rows of random ids and lengths."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(0, SIZE, rng.integers(1, longest)).astype(np.int32)

    return [Tokenized(ids(), tuple(ids() for _ in range(responses)), f"row-{i}") for i in range(n)]


class Room:
    """A machine room that answers with what it was asked, and remembers how."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[dict[str, Any]] = []

    def device_info(self) -> dict[str, Any]:
        return {}

    def generate(self, policy: Any, prompts: list[list[int]], *, adapter: bool, **options: Any) -> list[str]:
        self.calls.append({"n": len(prompts), "adapter": adapter, **options})
        who = "adapter" if adapter else "base"
        return [f"{who} read: {self.tokenizer.decode(ids)}" for ids in prompts]
