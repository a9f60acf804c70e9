"""mlxpref's side of a step that both of its backends share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bench.model import ALPHA, MODULES, RANK
from bench.pairs import Pair
from bench.worker import Task
from mlxpref.data.plan import Plan, plan_steps
from mlxpref.objectives import resolve_objective
from mlxpref.records import Tokenized
from mlxpref.reference import reference_logps

STEPS = 100
"""Of the run that a measured step is one of."""

LORA = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": list(MODULES)}


def tokenized(pairs: list[Pair]) -> list[Tokenized]:
    return [Tokenized(one.prompt, (one.chosen, one.rejected), f"pair-{i}") for i, one in enumerate(pairs)]


def plan_of(rows: list[Tokenized], task: Task, share_prompts: bool) -> Plan:
    """One step over these rows, as a run of ``STEPS`` such steps has it: tracing a shape is spread over all of them."""
    plan = plan_steps(
        rows, batch_size=task.batch_size, iters=STEPS, micro_batch_tokens=task.micro_batch_tokens,
        share_prompts=share_prompts, shuffle=False,
    )  # fmt: skip
    return replace(
        plan, steps=plan.steps[:1], epochs=plan.epochs[:1], tokens=plan.tokens // STEPS, slots=plan.slots // STEPS
    )


def policy_of(task: Task, backend: Any) -> Any:
    """A policy at the common LoRA start."""
    policy = backend.load_policy(
        task.model, dtype="float32", num_layers=-1, lora_parameters=LORA, grad_checkpoint=task.grad_checkpoint
    )
    policy.set_values(start(task))
    return policy


def step_of(policy: Any, task: Task, backend: Any) -> Any:
    return backend.make_step(
        policy, resolve_objective({"name": "dpo", "beta": task.beta}),
        optimizer="adamw", weight_decay=task.weight_decay, max_grad_norm=None,
    )  # fmt: skip


def reference_pass(rows: list[Tokenized], policy: Any, backend: Any) -> tuple[list, dict[str, float]]:
    """Reference log-probs in the batches that a run computes them in, and what that took, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    known, _ = reference_logps(rows, backend, policy, None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return known, {"wall_per_pair": wall / len(rows), "cpu_per_pair": cpu / len(rows)}


def start(task: Task) -> dict[str, np.ndarray]:
    with np.load(task.lora) as arrays:
        return {name: arrays[name] for name in arrays.files}


def save_gradients(gradients: Mapping[str, Any], file: str | None) -> None:
    """Write gradients by parameter where the task wants them, if it does."""
    if file:
        np.savez(file, **{name: np.array(value) for name, value in gradients.items()})
