"""mlxpref's step on PyTorch, through the backend's public face; the reference's log-probs known."""

from __future__ import annotations

from bench.pairs import load_pairs
from bench.spine import plan_of, policy_of, reference_pass, save_gradients, step_of, tokenized
from bench.torch_common import equip, prepare, resident
from bench.worker import Gate, Task
from mlxpref import torch_backend as machine
from mlxpref.data.batching import collate_step


def ours(task: Task, gate: Gate) -> None:
    prepare(task)
    policy = policy_of(task, machine)
    loaded = resident()
    everything = tokenized(load_pairs(task.pairs))
    rows = everything[: task.batch_size]
    step = step_of(policy, task, machine)
    plan = plan_of(rows, task, policy.share_prompts)
    (parts,) = plan.steps
    known, _ = reference_pass(everything, policy, machine)
    if task.gradients:
        save_gradients(step.gradients(collate_step(rows, parts, known)), task.gradients)
    gate.on["reference"] = lambda: reference_pass(everything, policy, machine)[1]
    gate.facts |= {"slots": plan.slots, "tokens": plan.tokens, "padding": plan.padding, "micro_batches": len(parts)}
    with machine.set_memory_policy():
        equip(gate, loaded)
        while True:
            gate()
            step(collate_step(rows, parts, known), task.learning_rate)
