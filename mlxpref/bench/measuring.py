"""One run, several contestants: each warmed up, then all in turn, so that what slows the machine slows all."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from mlxpref import backends
from mlxpref.bench.dims import Dims, read_dims
from mlxpref.bench.flops import lengths_of, minimum_flops, products
from mlxpref.bench.subject import Subject, check_finite, open_subject
from mlxpref.config import Config
from mlxpref.errors import MlxprefError
from mlxpref.facts import commit, versions
from mlxpref.folders import n_trained
from mlxpref.objectives.registry import FROM_MODEL
from mlxpref.steps import HEAD_ROWS, head_rows

WARM_UPS = 1
"""Calls of each contestant before it is measured: it traces, and leaves its buffers to the next."""

STEP, SFT, REFERENCE = "training step", "mlx-lm's SFT step", "reference pass"

Progress = Callable[[str, int, int], None]
"""Called with what is measured, rounds done, rounds to do."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """What one of them took.

    Attributes:
        seconds: of every repeat.
        above: bytes at once beyond the base's weights, at most: what it keeps between calls, and what one call needs.
            None where the backend does not count.
        flops: the least it has to compute; None where that is not said.
        padded: token positions it computes ÷ those that hold a token.
    """

    seconds: tuple[float, ...]
    above: int | None = None
    flops: float | None = None
    padded: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one bench.

    Attributes:
        contestants: by name, the training step first.
        rates: FLOP/s of the model's matrix products, of every repeat.
        weights: bytes of the base.
        agreement: relative difference of the step's gradients and a plain step's; None where it was not taken.
        notes: what was left out, and why.
        facts: of model, rows and machine; JSON-safe.
    """

    contestants: Mapping[str, Contestant]
    rates: tuple[float, ...]
    weights: int
    agreement: float | None
    pairs: int
    tokens: int
    notes: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def share(self, name: str) -> float | None:
        """Of the matmul rate: the least FLOPs ÷ the rate ÷ the time."""
        found = self.contestants[name]
        return None if found.flops is None else found.flops / self.rate / found.median


@dataclass(slots=True)
class _Call:
    """A contestant before it has run."""

    run: Callable[[], None]
    state: int
    flops: float | None = None
    padded: float | None = None
    seconds: list[float] = field(default_factory=list)
    transient: list[int | None] = field(default_factory=list)

    def result(self) -> Contestant:
        counted = [value for value in self.transient if value is not None]
        above = self.state + max(counted) if counted else None
        return Contestant(tuple(self.seconds), above, self.flops, self.padded)


def bench(
    config: Config, *, shape: str | None = None, repeats: int = 5, sft: bool = True, on_progress: Progress | None = None
) -> Measured:
    """Measure a configuration's training step, and what it is to be compared with, on this machine.

    Nothing is written to disk, no adapter and no reference log-probs.

    Args:
        shape: rows of these lengths are made up ("uf" or "hh"); None: the configuration's data, the first of them.
        repeats: measurements of each contestant, at least 1.
        sft: measure mlx-lm's supervised step, too, where the backend is MLX.

    Raises:
        MlxprefError: what a run would say of model, data and settings.
    """
    machine = backends.get(config.model.backend)
    with machine.set_memory_policy():
        subject = open_subject(config, machine, shape)
        notes: list[str] = [*subject.policy.notes]
        if config.batching.micro_batch_tokens == "auto":
            notes.append(f"micro_batch_tokens auto: measured with {config.batching.budget}")
        dims = _dims(subject, notes)
        calls = {STEP: _step(subject, dims)}
        if sft:
            _add(calls, SFT, _supervised, subject, notes)
        _add(calls, REFERENCE, lambda subject: _reference(subject, dims), subject, notes)
        rates = _race(calls, _room(machine, "gauges"), _rate(subject, dims), repeats, notes, on_progress)
        agreement = _agreement(subject, notes)
        return Measured(
            contestants={name: call.result() for name, call in calls.items()},
            rates=tuple(rates),
            weights=_room(machine, "gauges").weight_bytes(subject.policy),
            agreement=agreement,
            pairs=len(subject.rows),
            tokens=subject.n_tokens,
            notes=tuple(notes),
            facts=_facts(subject, dims),
        )


def _room(machine: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{machine.__name__}.{name}")


def _has(machine: ModuleType, name: str) -> bool:
    return importlib.util.find_spec(f"{machine.__name__}.{name}") is not None


def _dims(subject: Subject, notes: list[str]) -> Dims | None:
    try:
        return read_dims(subject.policy.path)
    except MlxprefError as error:
        notes.append(f"no share of the matmul rate: {error}")
        return None


# --- the contestants ---


def _add(
    calls: dict[str, _Call], name: str, make: Callable[[Subject], _Call | None], subject: Subject, notes: list[str]
) -> None:
    try:
        call = make(subject)
        if call is not None:
            calls[name] = call
    except MlxprefError as error:
        notes.append(f"{name}: left out: {error}")


def _step(subject: Subject, dims: Dims | None) -> _Call:
    rate = subject.config.optimizer.learning_rate

    def run() -> None:
        check_finite(subject.step(subject.batch, rate).loss)

    state = _room(subject.machine, "gauges").state_bytes(subject.policy, subject.step)
    return _Call(run, state, _least(subject, dims, trains=True), _padded(subject))


def _supervised(subject: Subject) -> _Call | None:
    if not _has(subject.machine, "sft"):
        return None
    module, optimizer = _room(subject.machine, "sft"), subject.config.optimizer
    supervised = module.SupervisedStep(
        subject.policy,
        optimizer=optimizer.name,
        optimizer_options=dict(optimizer.options),
        weight_decay=optimizer.weight_decay,
        learning_rate=optimizer.learning_rate,
    )
    batch, lengths = module.padded(subject.rows)
    real = int((lengths[:, 1] - 1).sum())
    padded = (batch.size - len(batch)) / real  # a row's last token is read by nobody
    return _Call(lambda: check_finite(supervised(subject.rows)), supervised.state_bytes, None, padded)


def _reference(subject: Subject, dims: Dims | None) -> _Call | None:
    if "reference" not in subject.objective.needs:
        return None
    return _Call(subject.reference_pass, 0, _least(subject, dims, trains=False))


def _least(subject: Subject, dims: Dims | None, *, trains: bool) -> float | None:
    if dims is None:
        return None
    policy, n_layers = subject.policy, len(dims.layers)
    lowest = n_layers - n_trained(policy.fine_tune_type, policy.num_layers, n_layers)
    lora = policy.lora_parameters if policy.fine_tune_type != "full" else {}
    found = minimum_flops(
        dims,
        lengths_of(subject.rows),
        adapted_from=lowest if trains else None,
        rank=lora.get("rank"),
        keys=lora.get("keys"),
    )
    return found.total


def _padded(subject: Subject) -> float:
    """Of the batch as it is planned."""
    computed = real = 0
    for part in subject.batch.parts:
        computed += part.prompts.size + sum(shelf.inputs.size for shelf in part.shelves)
        unshared = part.prompts.shape[1]
        real += part.prompts.size - len(part.prompts) * part.place.shape[1] * unshared
    for row in subject.rows:
        real += sum(len(row.prompt_ids) + len(lead) + len(ids) - 1 for lead, ids in row.slots)
    return computed / real


def _rate(subject: Subject, dims: Dims | None) -> Callable[[], float] | None:
    if dims is None:
        return None
    largest = max(subject.batch.parts, key=lambda part: sum(shelf.inputs.size for shelf in part.shelves))
    tokens = largest.prompts.size + sum(shelf.inputs.size for shelf in largest.shelves)
    device = subject.machine.device_info()
    on_mlx = device["backend"] == "mlx"
    chunk = head_rows(dims.vocabulary, on_cpu=device["kind"] == "cpu") if on_mlx else HEAD_ROWS
    shapes = products(dims, tokens, largest.scored.size, head_rows=chunk)
    dtype = _room(subject.machine, "gauges").dtype_of(subject.policy)
    return lambda: float(_room(subject.machine, "rates").matmul_rate(shapes, dtype=dtype, repeats=1))


def _race(
    calls: dict[str, _Call],
    gauges: Any,
    rate: Callable[[], float] | None,
    repeats: int,
    notes: list[str],
    on_progress: Progress | None,
) -> list[float]:
    """Every contestant's times and memory, in turn; the matmul rates."""
    rates: list[float] = []
    total = WARM_UPS + repeats
    for turn in range(total):
        if rate is not None:
            rates.append(rate())
        for name, call in list(calls.items()):
            try:
                seconds, transient = gauges.measured(call.run)
            except RuntimeError as error:  # a device that runs out of memory says so in this way
                if name != SFT:
                    raise
                del calls[name]
                notes.append(f"{name}: left out: {str(error).splitlines()[0]}")
                continue
            if turn >= WARM_UPS:
                call.seconds.append(seconds)
                call.transient.append(transient)
        if on_progress is not None:
            on_progress("measuring", turn + 1, total)
    return rates[WARM_UPS:]


# --- agreement ---


def _agreement(subject: Subject, notes: list[str]) -> float | None:
    """Relative difference of the gradients on the smallest row, with an adapter that is not at its start."""
    objective, policy = subject.objective, subject.policy
    reason = None
    if not _has(subject.machine, "plain"):
        reason = "this backend has no plain step"
    elif objective.coupled or objective.needs & FROM_MODEL:
        reason = f"{objective.name} looks at more than the log-probs of one example"
    elif policy.lora_parameters.get("dropout"):
        reason = "dropout draws otherwise in every pass"
    if reason is not None:
        notes.append(f"gradient agreement: not taken: {reason}")
        return None
    row, batch = subject.smallest()
    held = policy.values()
    policy.set_values(_moved(held, policy.lora_parameters))
    try:
        ours = subject.step.gradients(batch)
        plain = _room(subject.machine, "plain").plain_gradients(policy, objective, [row], batch)
    finally:
        policy.set_values(held)
    return _apart(ours, plain)


def _moved(values: Mapping[str, np.ndarray], lora: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An adapter's second factors, zero at the start, moved by so much that they matter and no more: at zero half of
    the gradients are zero, too."""
    deviation = 0.1 / (float(lora.get("scale", 1.0)) * math.sqrt(lora.get("rank", 1)))
    draw = np.random.default_rng(0)
    return {
        name: value + draw.normal(0.0, deviation, value.shape).astype(np.float32) if name.endswith("lora_b") else value
        for name, value in values.items()
    }


def _apart(ours: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray]) -> float:
    """Norm of the difference ÷ norm."""
    if ours.keys() != plain.keys():
        raise ValueError(f"gradients of other parameters: {sorted(ours.keys() ^ plain.keys())[:3]}")
    square = sum(float(np.square(plain[name], dtype=np.float64).sum()) for name in plain)
    apart = sum(float(np.square(ours[name].astype(np.float64) - plain[name]).sum()) for name in plain)
    return math.sqrt(apart / square) if square else 0.0 if not apart else math.inf


# --- facts ---


def _facts(subject: Subject, dims: Dims | None) -> dict[str, Any]:
    policy, config, plan = subject.policy, subject.config, subject.plan
    lengths, n_layers = lengths_of(subject.rows), _n_layers(subject, dims)
    return {
        "model": {
            "path": config.model.path,
            "architecture": policy.config.get("model_type"),
            "parameters": policy.n_parameters,
            "trainable": policy.n_trainable,
            "fine_tune_type": policy.fine_tune_type,
            "layers": n_layers,
            "trained_layers": n_trained(policy.fine_tune_type, policy.num_layers, n_layers),
            "lora_parameters": dict(policy.lora_parameters),
            "dtype": _room(subject.machine, "gauges").dtype_of(policy),
            "load_in_4bit": config.model.load_in_4bit,
            "grad_checkpoint": config.training.grad_checkpoint,
            "way": policy.way,
            "dimensions": None if dims is None else dims.source,
        },
        "objective": subject.objective.spec,
        "optimizer": config.optimizer.name,
        "rows": {
            "said": subject.said,
            "prompts": [prompt for prompt, _ in lengths],
            "responses": [list(responses) for _, responses in lengths],
        },
        "plan": {
            "micro_batches": len(subject.batch.parts),
            "micro_batch_tokens": config.batching.budget,
            "steps": len(plan.steps),
            "shapes": len(plan.shapes),
            "padded": 1 / (1 - plan.padding),
        },
        "device": subject.machine.device_info(),
        "versions": versions(),
        "commit": commit(),
    }


def _n_layers(subject: Subject, dims: Dims | None) -> int:
    if dims is not None:
        return len(dims.layers)
    config = subject.policy.config
    return int((config.get("text_config") or config).get("num_hidden_layers", abs(subject.policy.num_layers)))
