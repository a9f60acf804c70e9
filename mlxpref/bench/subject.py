"""What is measured: a policy with its step, on the one batch that stands for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlxpref.assembly import Assembly
from mlxpref.bench.rows import SHAPES, made_rows
from mlxpref.callbacks import TrainCallback
from mlxpref.config import Config
from mlxpref.data.batching import collate_step
from mlxpref.data.columns import available_columns
from mlxpref.data.plan import Plan, plan_pass
from mlxpref.errors import RunError
from mlxpref.folders import model_config, vocabulary_size
from mlxpref.hub import model_folder
from mlxpref.objectives import Objective, resolve_objective
from mlxpref.planning.plans import plan_training
from mlxpref.prepare import Prepared, prepare
from mlxpref.records import Batch, Tokenized
from mlxpref.reference import logps_pass
from mlxpref.runs import RunFolder

LIMIT = 256
"""Examples that are read of data at most: enough for their lengths."""

BATCHES = 16
"""Batches of rows that are made up."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A step and the batch it is measured on.

    Attributes:
        config, objective, machine: what was asked for; the machine room.
        policy, step: of it.
        said: where the rows come from.
        plan: one epoch over all rows.
        rows: those of the batch, in the order of its parts.
        batch: the one of the plan with the median number of tokens.
    """

    config: Config
    objective: Objective
    machine: ModuleType
    policy: Any
    step: Any
    said: str
    plan: Plan
    rows: tuple[Tokenized, ...]
    batch: Batch

    @property
    def n_tokens(self) -> int:
        """Of the batch's prompts, once each, and responses."""
        return sum(row.n_tokens for row in self.rows)

    def reference_pass(self) -> None:
        """The reference's log-probs of the batch's rows, as a run makes them once for each row."""
        for _ in _reference(self.rows, self.machine, self.policy, self.config):
            pass

    def smallest(self) -> tuple[Tokenized, Batch]:
        """The row with the fewest tokens, as a batch of its own."""
        row = min(self.rows, key=lambda row: row.n_tokens)
        return row, _batch([row], plan_pass([row], share_prompts=self.policy.share_prompts), 0, self)


def data_rows(config: Config, objective: Objective) -> Prepared:
    """The rows a run would train on, of the first ``LIMIT`` examples.

    Raises:
        MlxprefError: what a run would say of these data.
    """
    data = config.data
    if isinstance(data.source, str):
        data = data.model_copy(update={"limit": data.limit or LIMIT})
    else:
        few = tuple(one.model_copy(update={"limit": one.limit or LIMIT}) for one in data.source)
        data = data.model_copy(update={"source": few})
    return prepare(config.model_copy(update={"data": data}), needs=objective.needs)


def made_up(config: Config, shape: str) -> Prepared:
    """Rows of a kind for the model of a configuration, which is looked at, not loaded. ModelError: no such model."""
    model = model_config(model_folder(config.model.path, revision=config.model.revision, weights=False))
    most = int((model.get("text_config") or model).get("max_position_embeddings") or config.tokenization.max_length)
    rows = made_rows(
        shape,
        BATCHES * config.batching.examples_per_step,
        vocabulary=vocabulary_size(model),
        longest=min(most, config.tokenization.max_length),
        seed=config.training.seed,
    )
    return Prepared(tuple(rows), (), None, {}, (), "")


def for_steps_alone(config: Config) -> Config:
    """One epoch, and nothing that looks at validation rows."""
    data = config.data.model_copy(update={"valid": None, "valid_split": None, "valid_fraction": None})
    off = {"steps_per_eval": None, "best_metric": None, "early_stopping": None, "iters": None, "epochs": 1.0,
           "cache_frozen": False}
    training = config.training.model_copy(update=off)
    return config.model_copy(update={"data": data, "training": training})


def open_subject(config: Config, machine: ModuleType, shape: str | None) -> Subject:
    """Read the rows, load the policy, plan an epoch, make the reference, and choose the batch.

    Args:
        shape: of rows that are made up; None: the configuration's data.

    Raises:
        MlxprefError: no such model or data, settings that contradict them, columns that the rows lack.
    """
    objective, config = resolve_objective(config.objective), for_steps_alone(config)
    prepared = data_rows(config, objective) if shape is None else made_up(config, shape)
    listeners = TrainCallback()
    assembly = Assembly(config, objective, machine, RunFolder(Path()), listeners, lambda: datetime.now(UTC), prepared)
    rows = assembly.rows().train
    policy, step = assembly.policy_and_step(prepared)
    said = f"the first {len(rows)} rows of {_named(config)}" if shape is None else SHAPES[shape].said
    plan = plan_training(config, rows, share_prompts=policy.share_prompts)
    found = Subject(config, objective, machine, policy, step, said, plan, (), Batch((), ()))
    index = _median(rows, plan)
    chosen = tuple(rows[row] for part in plan.steps[index] for row in part.rows)
    return replace(found, rows=chosen, batch=_batch(rows, plan, index, found))


def _named(config: Config) -> str:
    source = config.data.source
    return source if isinstance(source, str) else ", ".join(one.path for one in source)


def _median(rows: Sequence[Tokenized], plan: Plan) -> int:
    """The step with the median number of tokens, of those that hold the most rows."""
    n_rows = [sum(len(part.rows) for part in step) for step in plan.steps]
    whole = [index for index, n in enumerate(n_rows) if n == max(n_rows)]
    tokens = {i: sum(rows[row].n_tokens for part in plan.steps[i] for row in part.rows) for i in whole}
    return sorted(whole, key=lambda index: tokens[index])[len(whole) // 2]


def _reference(
    rows: Sequence[Tokenized], machine: ModuleType, policy: Any, config: Config
) -> list[tuple[int, list[np.ndarray]]]:
    computing = logps_pass(rows, machine, policy, reference=True, micro_batch_tokens=config.batching.budget)
    return list(computing)


def _batch(rows: Sequence[Tokenized], plan: Plan, index: int, subject: Subject) -> Batch:
    """A step of a plan with its columns, and its reference where that is data."""
    objective, config = subject.objective, subject.config
    reference: list[list[np.ndarray]] | None = None
    if "reference" in objective.needs and config.reference.update is None:
        visited = sorted({row for part in plan.steps[index] for row in part.rows})
        reference = [[] for _ in rows]
        for at, logps in _reference([rows[row] for row in visited], subject.machine, subject.policy, config):
            reference[visited[at]] = logps
    columns = objective.reads & (objective.from_data | available_columns(rows))
    return collate_step(rows, plan.steps[index], reference, columns)


def check_finite(loss: float) -> None:
    """RunError if a step's loss is no number: its time would mean nothing."""
    if not np.isfinite(loss):
        raise RunError(
            f"the step's loss is {loss}: the weights may be damaged, or overflow in float16; set model.dtype to "
            "float32 or bfloat16"
        )
