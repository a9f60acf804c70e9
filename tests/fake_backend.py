"""A backend in NumPy, small enough to be killed a hundred times: a bigram table with a low-rank adapter.

It has what a real one has (weights, optimiser moments, random state that every update uses, files
written in pieces), so that whatever the training loop forgets to keep changes the result. Environment
variables make it misbehave: ``FAKE_NAN_STEPS`` lists updates that are not finite, ``FAKE_SAVE_SECONDS``
spreads every file over that time, ``FAKE_STEP_SECONDS`` slows an update down.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from mlxpref.records import Batch, Logps, MicroBatch, StepReport, stack_lists
from mlxpref.workers import Workers

VOCABULARY = 512
calls = {"token_logps": 0, "evaluate": 0, "update": 0, "load_policy": 0}


class Policy:
    way, fine_tune_type, share_prompts, sharded = "shared", "lora", True, False
    n_parameters = VOCABULARY**2
    notes: tuple[str, ...] = ()

    def __init__(self, path: str, seed: int, rank: int, init: Mapping[str, np.ndarray] | None = None) -> None:
        digest = hashlib.sha256((Path(path) / "model.safetensors").read_bytes())
        base = np.random.default_rng(int.from_bytes(digest.digest()[:4]))
        self.base = base.standard_normal((VOCABULARY, VOCABULARY))
        self.path, self.fingerprint = path, digest.hexdigest()
        rng = np.random.default_rng(seed)
        self.weights = {
            "lora_a": rng.standard_normal((VOCABULARY, rank)),
            "lora_b": np.zeros((rank, VOCABULARY)),
        }
        if init is not None:
            self.weights = {name: value.astype(np.float64) for name, value in init.items()}
        self.n_trainable = sum(value.size for value in self.weights.values())

    def logits(self, ids: np.ndarray, reference: bool = False) -> np.ndarray:
        """(N,) → (N, V)"""
        rows = self.base[ids]
        return rows if reference else rows + self.weights["lora_a"][ids] @ self.weights["lora_b"]


def load_policy(path: str, *, seed: int = 0, lora_parameters: Any = None, **_: Any) -> Policy:
    calls["load_policy"] += 1
    return Policy(path, seed, lora_parameters["rank"])


def _forward(
    policy: Policy, batch: MicroBatch, reference: bool = False
) -> tuple[Logps, np.ndarray, np.ndarray]:
    """Token log-probs, and per scored position its token before and its softmax."""
    before = np.concatenate([shelf.inputs.ravel() for shelf in batch.shelves])[batch.scored]
    logits = policy.logits(before, reference)
    logits = logits - logits.max(-1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(-1, keepdims=True)
    chosen = np.log(probabilities[np.arange(len(before)), batch.targets])
    tokens = np.append(chosen, 0.0)[batch.place] * batch.mask
    return Logps(tokens, np.asarray(batch.mask, np.float64)), before, probabilities


def token_logps(policy: Policy, micro_batch: MicroBatch, *, reference: bool = False) -> Logps:
    calls["token_logps"] += 1
    found = _forward(policy, micro_batch, reference)[0]
    return Logps(found.tokens.astype(np.float32), np.asarray(micro_batch.mask))


class Step:
    n_compiled = 0

    def __init__(self, policy: Policy, objective: Any, n_groups: int = 1) -> None:
        self.policy, self.objective = policy, objective
        self.moments = {name: np.zeros_like(value) for name, value in policy.weights.items()}
        self.rng = np.random.default_rng(0)
        self.count = 0
        self.state = objective.initial_state(n_groups)

    def _columns(self, batch: MicroBatch, logps: Logps) -> dict[str, Any]:
        columns: dict[str, Any] = {**batch.extras, "policy": logps}
        # Not what a model would say, but something that moves with its weights.
        columns["overlap"], columns["token_kl"] = 2 * logps.tokens, 0.1 * logps.tokens**2
        if batch.reference is not None:
            columns["reference"] = Logps(batch.reference, batch.mask)
        if batch.scores is not None:
            columns["scores"] = batch.scores
        return columns

    def _losses(self, batch: Batch, logps: Sequence[Logps]) -> tuple[list[np.ndarray], Any]:
        given = [self._columns(part, found) for part, found in zip(batch.parts, logps, strict=True)]
        losses, state = self.objective.apply_parts(given, self.state)
        return [np.asarray(some, np.float64) for some in losses], state

    def _slopes(self, batch: Batch, logps: Sequence[Logps]) -> list[np.ndarray]:
        """For each part (b, S): d of the weighted sum of losses / d log-prob of each slot, by central differences."""
        found = []
        for at, part in enumerate(batch.parts):
            slopes = np.zeros(part.mask.shape[:2])
            for b, s in np.ndindex(*slopes.shape):
                ends = []
                for h in (1e-5, -1e-5):
                    tokens = logps[at].tokens.copy()
                    tokens[b, s, 0] += h
                    moved = [*logps[:at], Logps(tokens, logps[at].mask), *logps[at + 1 :]]
                    losses, _ = self._losses(batch, moved)
                    ends.append(sum(float((x * p.weights).sum()) for x, p in zip(losses, batch.parts, strict=True)))
                slopes[b, s] = (ends[0] - ends[1]) / 2e-5
            found.append(slopes)
        return found

    def _gradient(self, batch: MicroBatch, forward: tuple[Any, ...], by_slot: np.ndarray) -> np.ndarray:
        """(V, V) gradient of the summed loss with respect to the logits' table."""
        _, before, probabilities = forward
        slopes = np.zeros(len(before) + 1)
        np.add.at(slopes, batch.place.ravel(), (by_slot[:, :, None] * batch.mask).ravel())
        table = np.zeros((VOCABULARY, VOCABULARY))
        rows = -slopes[:-1, None] * probabilities
        rows[np.arange(len(before)), batch.targets] += slopes[:-1]
        np.add.at(table, before, rows)
        return table

    def __call__(self, batch: Batch, learning_rate: float) -> StepReport:
        calls["update"] += 1
        self.count += 1
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", 0)))
        weights, forwards = self.policy.weights, [_forward(self.policy, part) for part in batch.parts]
        logps = [found for found, _, _ in forwards]
        losses, state = self._losses(batch, logps)
        total = sum(float(part.weights.sum()) for part in batch.parts)
        parts = zip(batch.parts, forwards, self._slopes(batch, logps), strict=True)
        table = sum(self._gradient(*part) for part in parts) / total
        gradients = {
            "lora_a": table @ weights["lora_b"].T,
            "lora_b": weights["lora_a"].T @ table,
        }
        noise = {name: 1e-4 * self.rng.standard_normal(value.shape) for name, value in weights.items()}
        skipped = str(self.count) in os.environ.get("FAKE_NAN_STEPS", "").split(",")
        for name in () if skipped else weights:
            self.moments[name] = 0.9 * self.moments[name] + gradients[name] + noise[name]
            weights[name] = weights[name] - learning_rate * self.moments[name]
        self.state = self.state if skipped else state
        norm = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
        return _report(batch, logps, losses, norm, skipped)

    def evaluate(self, batch: Batch) -> StepReport:
        calls["evaluate"] += 1
        time.sleep(float(os.environ.get("FAKE_EVAL_SECONDS", 0)))
        logps = [_forward(self.policy, part)[0] for part in batch.parts]
        return _report(batch, logps, self._losses(batch, logps)[0], 0.0, False)

    def save_state(self, folder: Path) -> None:
        # safetensors writes the memory as it lies: transposed arrays must be laid out first
        state = {f"w.{name}": np.ascontiguousarray(value) for name, value in self.policy.weights.items()}
        state |= {f"m.{name}": np.ascontiguousarray(value) for name, value in self.moments.items()}
        state["rng"] = np.frombuffer(json.dumps(self.rng.bit_generator.state).encode(), np.uint8)
        state["count"] = np.array([self.count])
        state |= {f"o.{name}.{i}": np.atleast_1d(np.asarray(v, np.float64)) for name, i, v in self._carried()}
        _write(folder / "step_state.safetensors", save(state))

    def load_state(self, folder: Path) -> None:
        state = load((folder / "step_state.safetensors").read_bytes())
        # a safetensors file comes back in any order, and random numbers are drawn in this one
        self.policy.weights = {name: state[f"w.{name}"] for name in self.policy.weights}
        self.moments = {name: state[f"m.{name}"] for name in self.moments}
        self.rng.bit_generator.state = json.loads(bytes(state["rng"]))
        self.count = int(state["count"][0])
        for name, own in self.state.items():
            values = [state[f"o.{name}.{i}"].reshape(np.shape(value)) for i, value in enumerate(own)]
            self.state[name] = type(own)(*values)

    def _carried(self) -> Iterator[tuple[str, int, Any]]:
        return ((name, i, value) for name, own in self.state.items() for i, value in enumerate(own))


def _report(
    batch: Batch, found: Sequence[Logps], of_parts: Sequence[np.ndarray], norm: float, skipped: bool
) -> StepReport:
    losses = np.concatenate(list(of_parts))
    first = batch.parts[0].reference is not None
    references = [(part.reference * part.mask).sum(-1) for part in batch.parts] if first else None
    return StepReport(
        loss=float("nan") if skipped else float(losses.mean()),
        losses=np.full_like(losses, np.nan) if skipped else losses,
        policy_sums=stack_lists([logps.sums for logps in found], np.nan),
        reference_sums=None if references is None else stack_lists(references, np.nan),
        lengths=stack_lists([logps.lengths for logps in found], 0.0),
        grad_norm=float("nan") if skipped else norm,
        skipped=skipped,
    )


def make_step(policy: Policy, objective: Any, *, n_groups: int = 1, **_: Any) -> Step:
    return Step(policy, objective, n_groups)


def save_adapter(policy: Policy, folder: Path, *, extra: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: np.ascontiguousarray(value, np.float32) for n, value in policy.weights.items()}
    _write(folder / "adapters.safetensors", save(weights))
    config = {"fine_tune_type": "lora", "num_layers": 1, "model": policy.path, "mlxpref": dict(extra)}
    _write(folder / "adapter_config.json", json.dumps(config).encode())


def _write(file: Path, data: bytes) -> None:
    """In ten pieces over ``FAKE_SAVE_SECONDS``, so that a kill finds half a file."""
    pause = float(os.environ.get("FAKE_SAVE_SECONDS", 0)) / 10
    size = len(data) // 10 + 1
    with file.open("wb") as stream:
        for start in range(0, len(data), size):
            stream.write(data[start : start + size])
            stream.flush()
            time.sleep(pause)


def load_adapter(path: str | Path, *, model_path: str | None = None) -> Policy:
    folder = Path(path)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load((folder / "adapters.safetensors").read_bytes())
    return Policy(model_path or config["model"], 0, 1, weights)


def workers() -> Workers:
    """Always a run of one process."""
    return Workers()


def memory() -> dict[str, float]:
    return {"peak": 0.5, "active": 0.25, "cache": 0.0}


def device_info() -> dict[str, Any]:
    return {"backend": "fake", "kind": "cpu"}


@contextmanager
def set_memory_policy() -> Iterator[None]:
    yield
