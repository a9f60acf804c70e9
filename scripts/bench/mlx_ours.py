"""mlxpref's step as a run makes it: rows planned, collated and stepped; the reference's log-probs known."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from bench.flops import matmul_rate
from bench.mlx_common import equip, n_bytes
from bench.pairs import load_pairs
from bench.spine import plan_of, policy_of, reference_pass, save_gradients, step_of, tokenized
from bench.worker import Gate, Task
from mlxpref import mlx_backend as machine
from mlxpref.data.batching import collate_step
from mlxpref.data.plan import plan_steps


def ours(task: Task, gate: Gate) -> None:
    with machine.set_memory_policy():  # as a run does
        policy = policy_of(task, machine)
        everything = tokenized(load_pairs(task.pairs))
        rows = everything[: task.batch_size]
        step = step_of(policy, task, machine)
        plan = plan_of(rows, task, policy.share_prompts)
        (parts,) = plan.steps
        known, _ = reference_pass(everything, policy, machine)
        save_gradients(step.gradients(collate_step(rows, parts, known)) if task.gradients else {}, task.gradients)
        positions, scored = (round(n / len(parts)) for n in (plan.slots, sum(part.shape.scored for part in parts)))
        gate.on["reference"] = lambda: reference_pass(everything, policy, machine)[1]
        gate.on["rate"] = lambda: {"rate": matmul_rate(Path(task.model), positions, scored)}
        gate.facts |= {
            "slots": plan.slots, "tokens": plan.tokens, "padding": plan.padding, "micro_batches": len(parts),
            "shapes": [dataclasses.asdict(part.shape) for part in parts], "way": policy.way,
        }  # fmt: skip
        equip(gate, n_bytes(policy.model))
        while True:
            gate()
            step(collate_step(rows, parts, known), task.learning_rate)


def whole_run(task: Task, gate: Gate) -> None:
    """What a training run does with its rows: reference log-probs, the plan, every step, and the adapter saved."""
    with machine.set_memory_policy():
        policy = policy_of(task, machine)
        rows = tokenized(load_pairs(task.pairs))
        equip(gate, n_bytes(policy.model))
        gate()
        known, spent = reference_pass(rows, policy, machine)
        plan = plan_steps(
            rows, batch_size=task.batch_size, epochs=task.epochs, micro_batch_tokens=task.micro_batch_tokens,
            share_prompts=policy.share_prompts, seed=task.seed,
        )  # fmt: skip
        step = step_of(policy, task, machine)
        for parts in plan.steps:
            step(collate_step(rows, parts, known), task.learning_rate)
        place = tempfile.mkdtemp(prefix="bench-", dir=Path(task.pairs).parent)
        machine.save_adapter(policy, Path(place) / "adapter", extra={})
        gate.figures = {
            "padded": 1 / (1 - plan.padding), "computed": plan.slots / plan.tokens,
            "shapes": len(plan.shapes), "steps": len(plan.steps),
            "reference_seconds": spent["wall_per_pair"] * len(rows),
        }  # fmt: skip
        gate()
