"""What one backend computes of a model and some rows, step by step, as arrays that another's can be held against.

Both sides start from the same adapter, neither zero nor their own: where ``lora_b`` is zero, policy and reference
are equal, half of the gradients vanish, and most faults cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from mlxpref.data.batching import collate, collate_step
from mlxpref.data.columns import available_columns, widths_of
from mlxpref.data.parts import PlannedPart
from mlxpref.data.plan import Plan, plan_pass, plan_steps
from mlxpref.errors import UsageError
from mlxpref.objectives import Objective, check_widths, resolve_objective
from mlxpref.parity.draws import uniform
from mlxpref.records import Batch, StepReport, Tokenized
from mlxpref.reference import kinds_of
from mlxpref.schedules import make_schedule

Arrays = dict[str, np.ndarray]
Steps = tuple[tuple[PlannedPart, ...], ...]

MAX_SHAPES = 12
"""Shapes of micro-batches; each is compiled once."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a trace depends on besides model and rows.

    Attributes:
        objective: as a configuration has it, or resolved (``Objective.spec``).
        steps: updates of the trajectory.
        batch_size: examples of an update.
        seed: of the adapter's values and of the order of the rows.
        learning_rate, schedule: of the trajectory; the first update is at the full rate.
        optimizer, optimizer_options, weight_decay, max_grad_norm: as a configuration has them.
        fine_tune_type, num_layers, lora_parameters: of the adapter.
        micro_batch_tokens: padded tokens of a forward pass.
        lora_b: standard deviation of its values; how much they do is for the adapter's ``scale`` to say.
    """

    objective: Any = "dpo"
    steps: int = 50
    batch_size: int = 4
    seed: int = 0
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.1
    max_grad_norm: float | None = 0.1
    fine_tune_type: str = "lora"
    num_layers: int = -1
    lora_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rank": 4, "scale": 1.0})
    micro_batch_tokens: int = 512
    lora_b: float = 0.1

    def resolved(self) -> Settings:
        """With every option of the objective filled in, so that other versions' defaults do not matter."""
        return replace(self, objective=resolve_objective(self.objective).spec)

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """What ``as_dict`` gave. ValueError for other keys."""
        names = {one.name for one in fields(cls)}
        if set(values) != names:
            raise ValueError(f"settings {', '.join(sorted(set(values) ^ names))}")
        return cls(**values)


def without_experts(config: Mapping[str, Any], settings: Settings) -> Settings:
    """Of a mixture of experts, unless modules were named, the attention's linear layers only: fused experts are
    single arrays in one library and many modules in another."""
    given = settings.lora_parameters
    if given.get("keys") is not None or not any("experts" in key and config[key] for key in config):
        return settings
    keys = [f"self_attn.{name}_proj" for name in "qkvo"]
    return replace(settings, lora_parameters={**given, "keys": keys})


def open_policy(backend: Any, path: str, settings: Settings) -> Any:
    """The policy in float32 with an adapter whose values every backend draws alike.

    Args:
        backend: module with the backend's functions.
        path: model folder, or hub id.

    Raises:
        ModelError, ConfigError: as ``load_policy``.
    """
    if settings.fine_tune_type not in ("lora", "dora"):
        raise UsageError(f"parity compares adapters, lora or dora, not fine_tune_type {settings.fine_tune_type!r}")
    policy = backend.load_policy(
        path,
        dtype="float32",
        fine_tune_type=settings.fine_tune_type,
        num_layers=settings.num_layers,
        lora_parameters=dict(settings.lora_parameters),
        seed=settings.seed,
    )
    policy.set_values(_start(policy.values(), settings))
    return policy


def _start(values: Mapping[str, np.ndarray], settings: Settings) -> Arrays:
    """Values by name and shape alone; DoRA's magnitudes, which belong to the weights, are scaled a little."""
    found = {}
    for name, value in sorted(values.items()):
        factor = name.rpartition(".")[-1]
        deviation = settings.lora_b if factor != "lora_a" else 1 / math.sqrt(value.shape[-2])
        drawn = uniform(name, value.shape, deviation=deviation, seed=settings.seed)
        found[name] = value * (1 + drawn) if factor == "m" else drawn
    return found


def run_trace(
    backend: Any,
    policy: Any,
    rows: Sequence[Tokenized],
    settings: Settings,
    *,
    n_groups: int = 1,
    on_step: Callable[[int, int], None] | None = None,
) -> Arrays:
    """Run a backend over the rows; the policy is left with the adapter it came with.

    Args:
        policy: of :func:`open_policy`.
        rows: the data, with the columns the objective asks for.
        n_groups: different values of the column ``groups``.
        on_step: called with (updates done, updates to do).

    Returns:
        float32 arrays by name: ``logps.policy``, ``logps.reference`` and, of a policy that shares prompts,
        ``logps.policy.shared`` (nats, all rows laid end to end); ``losses`` (B,) of the first batch;
        ``start.*``, ``gradients.*`` (and ``gradients.shared.*``) of the first batch, ``update.*`` after it and
        ``end.*`` after the last, by parameter; ``curve.loss`` and ``curve.grad_norm`` (steps,).

    Raises:
        ObjectiveError: the rows lack what the objective needs.
    """
    objective = resolve_objective(settings.objective)
    objective.check_columns(available_columns(rows))
    check_widths(objective, widths_of(rows[0]))
    start = _values(policy)
    reference = token_logps(backend, policy, rows, reference=True)
    found = {f"start.{name}": value for name, value in start.items()}
    found["logps.policy"] = _joined(token_logps(backend, policy, rows))
    found["logps.reference"] = _joined(reference)
    if policy.share_prompts:
        found["logps.policy.shared"] = _joined(token_logps(backend, policy, rows, share=True))
    try:
        found |= _trajectory(backend, policy, objective, _Batches(rows, objective, settings, reference),
                             settings, n_groups, on_step)  # fmt: skip
    finally:
        policy.set_values(start)
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class _Batches:
    """The batches of a trajectory: the same rows in the same order whether or not prompts are shared."""

    rows: Sequence[Tokenized]
    objective: Objective
    settings: Settings
    reference: list[list[np.ndarray]]

    def plan(self) -> Steps:
        """The trajectory: :meth:`first`, then as in training, both halves of a pair in one batch; whole rows."""
        return (self.first(share=False), *self._plan(self.rows, share=False, steps=self.settings.steps).steps[1:])

    def first(self, *, share: bool) -> tuple[PlannedPart, ...]:
        """A batch where no two halves of a pair meet. Near the reference their slopes are opposite: what is left of
        their sum is small, and as large as the rounding of what it is left of."""
        places = [place for place, row in enumerate(self.rows) if row.half != "rejected"] or range(len(self.rows))
        plan = self._plan([self.rows[place] for place in places], share=share, steps=1)
        return tuple(replace(part, rows=tuple(places[row] for row in part.rows)) for part in plan.steps[0])

    def _plan(self, rows: Sequence[Tokenized], *, share: bool, steps: int) -> Plan:
        settings = self.settings
        return plan_steps(
            rows,
            batch_size=settings.batch_size,
            iters=steps,
            micro_batch_tokens=settings.micro_batch_tokens,
            share_prompts=share,
            seed=settings.seed,
            max_shapes=max(MAX_SHAPES, kinds_of(rows)),
        )

    def of(self, parts: Sequence[PlannedPart]) -> Batch:
        needs = self.objective
        columns = needs.reads & (needs.from_data | available_columns(self.rows))
        known = self.reference if "reference" in needs.needs else None
        return collate_step(self.rows, parts, known, columns)


def _trajectory(
    backend: Any,
    policy: Any,
    objective: Objective,
    batches: _Batches,
    settings: Settings,
    n_groups: int,
    on_step: Callable[[int, int], None] | None,
) -> Arrays:
    step = backend.make_step(
        policy,
        objective,
        optimizer=settings.optimizer,
        optimizer_options=dict(settings.optimizer_options),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        n_groups=n_groups,
    )
    plan = batches.plan()
    first = batches.of(plan[0])
    found = {"losses": _in_order(first, step.evaluate(first))}
    found |= {f"gradients.{name}": value for name, value in step.gradients(first).items()}
    if policy.share_prompts:
        shared = batches.of(batches.first(share=True))
        found |= {f"gradients.shared.{name}": value for name, value in step.gradients(shared).items()}
    rate = make_schedule(settings.schedule, learning_rate=settings.learning_rate, n_steps=settings.steps)
    losses, norms = [], []
    for index, parts in enumerate(plan):
        report = step(batches.of(parts), rate(index))
        losses.append(math.nan if report.skipped else report.loss)
        norms.append(report.grad_norm)
        if index == 0:
            found |= {f"update.{name}": value for name, value in _values(policy).items()}
        if on_step is not None:
            on_step(index + 1, settings.steps)
    found |= {f"end.{name}": value for name, value in _values(policy).items()}
    return {**found, "curve.loss": np.array(losses), "curve.grad_norm": np.array(norms)}


def _values(policy: Any) -> Arrays:
    """Copies: a policy may move its own in place."""
    return {name: np.array(value) for name, value in policy.values().items()}


def token_logps(
    backend: Any, policy: Any, rows: Sequence[Tokenized], *, reference: bool = False, share: bool = False
) -> list[list[np.ndarray]]:
    """For each row S arrays (n_s,) float32, nats, of the policy or its reference; prompts computed once for all
    responses if ``share``, else every row whole."""
    plan = plan_pass(rows, micro_batch_tokens=4096, share_prompts=share, max_shapes=max(6, kinds_of(rows)))
    found: list[list[np.ndarray]] = [[] for _ in rows]
    for (part,) in plan.steps:
        tokens = np.asarray(backend.token_logps(policy, collate(rows, part), reference=reference).tokens)
        for index, of_row in zip(part.rows, tokens, strict=True):
            slots = rows[index].slots
            found[index] = [np.array(of_row[s, : len(ids)], np.float32) for s, (_, ids) in enumerate(slots)]
    return found


def _joined(logps: Collection[Sequence[np.ndarray]]) -> np.ndarray:
    return np.concatenate([values for row in logps for values in row])


def _in_order(batch: Batch, report: StepReport) -> np.ndarray:
    """Losses (B,) in the order of the data's rows, which the split into micro-batches does not change."""
    rows = np.array([index for part in batch.rows for index in part])
    return np.asarray(report.losses)[np.argsort(rows, kind="stable")]
