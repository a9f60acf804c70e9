"""A run put together: policy, plan, reference, step, and what the loop calls of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlxpref.callbacks import RunStart, TrainCallback
from mlxpref.config import Config
from mlxpref.config_layers import dump_config
from mlxpref.data.batching import collate_step
from mlxpref.data.columns import available_columns, widths_of
from mlxpref.data.overview import overview
from mlxpref.data.plan import Plan
from mlxpref.data.sizes import sizes_of
from mlxpref.data.stored import Joined
from mlxpref.data.words import counted
from mlxpref.errors import ConfigError, raise_all
from mlxpref.facts import adapter_facts, check_same, check_start, describe, run_facts
from mlxpref.loop import Loop, LoopSettings, Progress, Work
from mlxpref.metrics import step_metrics
from mlxpref.momentum import momentum_logps
from mlxpref.objectives import Objective, check_widths
from mlxpref.planning.budget import choose_tokens
from mlxpref.planning.forecast import make_job
from mlxpref.planning.machine import memory_of
from mlxpref.planning.plans import STEPS_PER_EVAL as STEPS_PER_EVAL
from mlxpref.planning.plans import max_shapes, plan_evaluation, plan_training, visited
from mlxpref.prepare import Prepared, prepare
from mlxpref.records import Batch, StepReport, Tokenized
from mlxpref.reference import ReferenceStore, default_store_folder, reference_logps
from mlxpref.runs import RunFolder
from mlxpref.schedules import make_schedule, n_warmup
from mlxpref.together import agreed, check_alike, shared_checkpoint
from mlxpref.workers import Workers

Seen = Sequence[tuple[Batch, StepReport]]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of one split with their plan and reference log-probs (None where none are needed)."""

    rows: Sequence[Tokenized]
    plan: Plan
    reference: list[list[np.ndarray]] | None

    def batch(self, index: int, columns: frozenset[str]) -> Batch:
        return collate_step(self.rows, self.plan.steps[index], self.reference, columns)

    @property
    def visited(self) -> int:
        """Rows the plan visits."""
        return len(visited(self.plan))


@dataclass(frozen=True, slots=True)
class Assembly:
    """Puts a run together, room by room, and tells the listeners what it finds.

    Of several workers each does so; the run folder and the listeners of all but worker 0 are stand-ins.
    """

    config: Config
    objective: Objective
    machine: ModuleType
    run: RunFolder
    listeners: TrainCallback
    now: Callable[[], datetime]
    prepared: Prepared | None = None
    workers: Workers = field(default_factory=Workers)

    def check(self) -> None:
        """Raise what is wrong with configuration and data, as far as it shows before a model loads."""
        self.rows()

    def rows(self) -> Prepared:
        """Tokenized rows, checked against configuration and objective; errors as ``check``."""
        data = self._data()
        self._eval_every(data)
        return data

    def policy_and_step(self, data: Prepared) -> tuple[Any, Any]:
        """What a run would compute with, outside of one: to measure it."""
        policy = self._policy()
        return policy, self._step(policy, data, cache_frozen=False)

    def loop(self, resume: bool, clock: Callable[[], float]) -> Loop:
        run, data = self.run, self._data()
        eval_every = self._eval_every(data)
        checkpoint = run.last_checkpoint() if resume else None
        for text in (*(f"warning: {text}" for text in run.said), *self.workers.said):
            self.listeners.on_note(text)
        policy = self._policy()
        for text in policy.notes:
            self.listeners.on_note(f"warning: {text}")
        known = run.facts() if resume else {}
        settled = self._settled(data, policy)
        config = settled.config
        # What a step refuses is refused before the run begins.
        step = self._step(policy, data, cache_frozen=config.training.cache_frozen)
        plan = settled._plan(data.train, policy)
        if config.training.cache_frozen and plan.epochs[-1] <= 1:
            raise ConfigError("training.cache_frozen: this run meets no example twice; leave it out")
        check_alike(self.workers, config, data.fingerprint, policy, plan)
        schedule = self._schedule(len(plan.steps))
        facts = run_facts(
            config, self.objective, self.machine, data, policy, plan,
            starts=known.get("starts", ()),
            step=checkpoint.step if checkpoint is not None else 0,
            time=self.now(),
        )  # fmt: skip
        facts["starts"][-1]["workers"] = self.workers.size
        facts["data"]["train"] = self._overview(known, data)
        for text in check_same(known, facts, run.path):
            self.listeners.on_note(f"warning: {text}")
        run.begin(dump_config(config), facts)
        run.rewind(checkpoint)
        done = checkpoint.step if checkpoint is not None else 0
        device = facts["starts"][-1]["device"]
        lines = (*describe(config, self.objective, data, policy, plan, device=device, done=done), *self._workers_line())
        self.listeners.on_start(RunStart(run.path, len(plan.steps), done, facts, lines))
        splits = settled._references(data, policy, plan, eval_every)
        if "valid" in splits:
            valid = splits["valid"]
            often = "every step" if eval_every == 1 else f"every {eval_every} steps"
            self.listeners.on_note(f"evaluation: {valid.visited} of {counted(len(valid.rows), 'row')} {often}")
        progress = Progress()
        with shared_checkpoint(checkpoint, self.workers) as found:
            if found is not None:
                step.load_state(found.folder)
                progress = Progress.from_dict(found.state)
        training = config.training
        return Loop(
            work=self._work(policy, step, splits, facts),
            run=run,
            schedule=schedule,
            epochs=plan.epochs,
            settings=LoopSettings(
                save_every=training.save_every,
                steps_per_report=training.steps_per_report,
                steps_per_eval=eval_every,
                keep_last=training.keep_last,
                best_metric=training.best_metric,
                early_stopping=training.early_stopping,
                sharded=training.fsdp,
            ),
            callbacks=self.listeners,
            progress=progress,
            clock=clock,
            checkpoint=checkpoint.folder if checkpoint is not None else None,
        )

    def _overview(self, known: Mapping[str, Any], data: Prepared) -> Mapping[str, Any] | None:
        """Figures of the training rows: a resumed run has them, and only worker 0 writes them down."""
        before = known.get("data", {})
        if before.get("fingerprint") == data.fingerprint and before.get("train") is not None:
            return dict(before["train"])
        return overview(data.train) if self.workers.rank == 0 else None

    # --- what a run is made of ---

    def _data(self) -> Prepared:
        check_start(self.config)
        self._check_reference()
        data = prepare(self.config, needs=self.objective.needs) if self.prepared is None else self.prepared
        rows = Joined(data.train, data.valid)
        self.objective.check_columns(available_columns(rows))
        check_widths(self.objective, widths_of(rows[0]))
        self._check_batches(rows)
        return data

    def _check_reference(self) -> None:
        """ConfigError for settings of a reference that the objective does not look at."""
        given = self.config.reference
        unused = [f"reference.{key}" for key in ("update", "momentum") if getattr(given, key) is not None]
        if unused and "reference" not in self.objective.needs:
            raise ConfigError(f"{' and '.join(unused)}: {self.objective.name} has no reference; leave it out")

    def _check_batches(self, rows: Sequence[Tokenized]) -> None:
        """Say when a coupled objective has nothing to couple. ConfigError: rows that weigh differently, in one."""
        if not self.objective.coupled:
            return
        if len({row.weight for row in rows}) > 1:
            raise ConfigError(f"{self.objective.name} sees a batch as a whole: its rows have to weigh alike")
        if self.config.batching.examples_per_step == 1:
            self.listeners.on_note(f"warning: {self.objective.name} compares examples, and a batch holds one")

    def _eval_every(self, data: Prepared) -> int:
        """Steps between evaluations; 0 for none. ConfigError if some are asked for and cannot be made."""
        training = self.config.training
        if data.valid:
            return STEPS_PER_EVAL if training.steps_per_eval is None else training.steps_per_eval
        asked = [f"training.{key}" for key in ("steps_per_eval", "best_metric") if getattr(training, key)]
        raise_all(
            [f"{key} needs validation rows: give data.valid or data.valid_fraction" for key in asked],
            ConfigError,
            "there are no validation rows:",
        )
        return 0

    def _policy(self) -> Any:
        model, adapter, training = self.config.model, self.config.adapter, self.config.training
        lora = adapter.lora_parameters
        new = {} if adapter.init_from is not None else {
            "fine_tune_type": adapter.fine_tune_type,
            "num_layers": adapter.num_layers,
            "lora_parameters": None if lora is None else lora.arguments(),
        }  # fmt: skip
        return self.machine.load_policy(
            model.path,
            revision=model.revision,
            dtype=model.dtype,
            load_in_4bit=model.load_in_4bit,
            init_from=adapter.init_from,
            grad_checkpoint=training.grad_checkpoint,
            fsdp=training.fsdp,
            seed=self.config.training.seed,
            **new,
        )

    def _plan(self, rows: Sequence[Tokenized], policy: Any) -> Plan:
        return plan_training(self.config, rows, **self._layout(policy))

    def _plan_evaluation(self, rows: Sequence[Tokenized], policy: Any) -> Plan:
        return plan_evaluation(self.config, rows, **self._layout(policy))

    def _layout(self, policy: Any) -> dict[str, Any]:
        return {"share_prompts": policy.share_prompts, "n_workers": self.workers.size}

    def _settled(self, data: Prepared, policy: Any) -> Assembly:
        """With ``micro_batch_tokens`` as a number, worker 0's."""
        if self.config.batching.micro_batch_tokens != "auto":
            return self
        device = self.machine.device_info()
        job = make_job(self.config, self.objective, data, device=device, share_prompts=policy.share_prompts)
        own = choose_tokens(job, memory_of(device)) if self.workers.rank == 0 else 0
        tokens = int(self.workers.share(str(own).encode()))
        self.listeners.on_note(f"batching.micro_batch_tokens: {tokens}, the most whose predicted peak fits")
        batching = self.config.batching.model_copy(update={"micro_batch_tokens": tokens})
        return replace(self, config=self.config.model_copy(update={"batching": batching}))

    def _schedule(self, n_steps: int) -> Callable[[int], float]:
        optimizer = self.config.optimizer
        given = optimizer.schedule
        warmup = n_warmup(n_steps, warmup_steps=given.warmup_steps, warmup_ratio=given.warmup_ratio)
        return make_schedule(
            given.name,
            learning_rate=optimizer.learning_rate,
            n_steps=n_steps,
            warmup=warmup,
            end=given.end,
        )

    def _step(self, policy: Any, data: Prepared, *, cache_frozen: bool) -> Any:
        optimizer = self.config.optimizer
        return self.machine.make_step(
            policy,
            self.objective,
            optimizer=optimizer.name,
            optimizer_options=dict(optimizer.options),
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            seed=self.config.training.seed,
            n_groups=max(1, len(data.groups)),
            reference_update=self.config.reference.update_arguments(),
            frozen_tokens=_most_positions(data.train) if cache_frozen else None,
            workers=self.workers,
        )

    def _workers_line(self) -> Iterator[str]:
        if self.workers.size > 1:
            yield f"workers: {self.workers.size}, which share out each batch by length; this is worker 0"

    def _references(
        self, data: Prepared, policy: Any, plan: Plan, eval_every: int
    ) -> dict[str, Split]:
        """Both splits with the reference log-probs of the rows they visit, from one store."""
        plans = {"train": plan}
        if eval_every:
            plans["valid"] = self._plan_evaluation(data.valid, policy)
        rows = {"train": data.train, "valid": data.valid}
        moving = self.config.reference.update is not None
        if moving or "reference" not in self.objective.needs:
            self.listeners.on_note("reference log-probs: " + ("computed in every step" if moving else "not needed"))
            return {name: Split(rows[name], plans[name], None) for name in plans}
        wanted = [(name, index) for name, plan in plans.items() for index in visited(plan)]
        some = [rows[name][index] for name, index in wanted]
        logps = self._reference_logps(some, policy)
        given = self.config.reference
        if given.momentum is not None:
            logps = momentum_logps(logps, self._previous_logps(some, given.previous), given.momentum)
        found: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in rows[name]] for name in plans}
        for (name, index), row in zip(wanted, logps, strict=True):
            found[name][index] = row
        return {name: Split(rows[name], plans[name], found[name]) for name in plans}

    def _previous_logps(self, rows: Sequence[Tokenized], folder: str | None) -> list[list[np.ndarray]]:
        """Of the adapter the round before started from, or of the base; its model leaves memory again."""
        model = self.config.model
        started: dict[str, Any] = {"trainable": False} if folder is None else {"init_from": folder}
        self.listeners.on_note(f"the round before started from {folder or 'the base'}")
        previous = self.machine.load_policy(
            model.path, revision=model.revision, dtype=model.dtype, load_in_4bit=model.load_in_4bit, **started
        )
        return self._reference_logps(rows, previous)

    def _reference_logps(self, rows: Sequence[Tokenized], policy: Any) -> list[list[np.ndarray]]:
        folder, store = self.config.reference.store, None
        if self.workers.rank == 0:
            store = ReferenceStore(Path(folder) if folder else default_store_folder(), policy.fingerprint)
        for text in () if store is None else store.said:
            self.listeners.on_note(f"warning: {text}")
        logps, counts = reference_logps(
            rows,
            self.machine,
            policy,
            store,
            micro_batch_tokens=self.config.batching.budget,
            max_shapes=max_shapes(self.config, 4, rows),
            on_progress=lambda done, total: self.listeners.on_progress("reference", done, total),
            workers=self.workers,
        )
        self.listeners.on_note(str(counts))
        return logps

    # --- what the loop calls ---

    def _work(self, policy: Any, step: Any, splits: Mapping[str, Split], facts: Mapping[str, Any]) -> Work:
        objective, machine = self.objective, self.machine
        train_split = splits["train"]
        rows = Joined(*(split.rows for split in splits.values()))
        columns = objective.reads & (objective.from_data | available_columns(rows))

        def save_adapter(folder: Path, done: int) -> None:
            machine.save_adapter(policy, folder, extra=adapter_facts(facts, done))

        def save(folder: Path, done: int) -> None:
            save_adapter(folder, done)
            step.save_state(folder)

        def evaluate() -> Iterator[Mapping[str, float] | None]:
            split = splits["valid"]
            seen = []
            for index in range(len(split.plan.steps)):
                batch = split.batch(index, columns)
                seen.append((batch, step.evaluate(batch)))
                self.listeners.on_progress("evaluation", index + 1, len(split.plan.steps))
                yield None
            yield agreed(self.workers, lambda: _metrics(split.rows, seen, objective))

        return Work(
            batch=lambda index: train_split.batch(index, columns),
            update=step,
            evaluate=evaluate,
            save=save,
            save_adapter=save_adapter,
            metrics=lambda batch, report: _metrics(train_split.rows, [(batch, report)], objective),
            tokens=lambda batch: sum(train_split.rows[i].n_tokens for part in batch.rows for i in part),
            memory=machine.memory,
        )


def _most_positions(rows: Sequence[Tokenized]) -> int:
    """Token positions of these rows at most: each prompt once for every response."""
    sizes = sizes_of(rows)
    return int((sizes.prompts * sizes.responses + sizes.lengths.sum(1)).sum())


def _metrics(rows: Sequence[Tokenized], seen: Seen, objective: Objective) -> dict[str, float]:
    """Metrics over all examples of some reports; lists of different K are measured apart and averaged."""
    members = [[rows[index] for part in batch.rows for index in part] for batch, _ in seen]
    sizes = [np.array([len(row.response_ids) for row in some]) for some in members]
    found = []
    for k in np.unique(np.concatenate(sizes)):
        here = [size == k for size in sizes]
        chosen = [row for some, mask in zip(members, here, strict=True) for row in np.array(some, object)[mask]]
        reports = [(report, mask) for (_, report), mask in zip(seen, here, strict=True)]
        found.append((_group_metrics(chosen, reports, int(k), objective), len(chosen)))
    if len(found) == 1:
        return found[0][0]
    averaged = {}
    for key in dict.fromkeys(key for metrics, _ in found for key in metrics):
        having = [(metrics[key], n) for metrics, n in found if key in metrics]
        averaged[key] = sum(value * n for value, n in having) / sum(n for _, n in having)
    return averaged


def _group_metrics(
    members: Sequence[Tokenized], reports: Sequence[tuple[StepReport, np.ndarray]], k: int, objective: Objective
) -> dict[str, float]:
    """Metrics of those examples of some reports that have K = ``k`` responses."""

    def joined(name: str) -> np.ndarray:
        found = [np.asarray(getattr(report, name))[mask] for report, mask in reports]
        return np.concatenate([array if array.ndim == 1 else array[:, :k] for array in found if len(array)])

    return step_metrics(
        joined("policy_sums"),
        None if reports[0][0].reference_sums is None else joined("reference_sums"),
        joined("lengths"),
        joined("losses"),
        objective.beta,
        [row.half for row in members],
        weights=np.array([row.weight for row in members]),
        per_token=objective.per_token,
    )
