"""The plain DPO step: four forwards over whole padded rows, whole logits; in float64 the witness of every gradient."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from bench.mlx_common import adamw, base_model, equip, mx, n_bytes, nn, tree_flatten, with_lora
from bench.pairs import Pair, load_pairs
from bench.spine import save_gradients
from bench.worker import WITNESS_FILE, Gate, Task


def rows_of(pairs: list[Pair]) -> tuple[mx.array, mx.array]:
    """ids and mask (2B, T), the chosen rows first; right-padded with 0, the mask 1 on response tokens."""
    whole = [(pair.prompt, response) for side in (1, 2) for pair in pairs for response in (pair[side],)]
    longest = max(len(prompt) + len(response) for prompt, response in whole)
    ids, mask = np.zeros((len(whole), longest), np.int32), np.zeros((len(whole), longest), np.float32)
    for row, (prompt, response) in enumerate(whole):
        end = len(prompt) + len(response)
        ids[row, :end] = np.concatenate([prompt, response])
        mask[row, len(prompt) : end] = 1
    return mx.array(ids), mx.array(mask)


def sums(model: nn.Module, ids: mx.array, mask: mx.array) -> mx.array:
    """(n,) log-probs of the responses, nats, in float32 or in a float64 model's own."""
    logits = model(ids[:, :-1])
    logits = logits if logits.dtype == mx.float64 else logits.astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    taken = mx.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
    return (taken * mask[:, 1:]).sum(-1)


def dpo(model: nn.Module, reference: nn.Module, ids: mx.array, mask: mx.array, beta: float) -> mx.array:
    """Mean of −log σ(β · margin), each of the four sums by a forward of its own."""
    b = len(ids) // 2
    chosen, rejected = (sums(model, ids[half], mask[half]) for half in (slice(0, b), slice(b, None)))
    known = [mx.stop_gradient(sums(reference, ids[half], mask[half])) for half in (slice(0, b), slice(b, None))]
    margin = (chosen - known[0]) - (rejected - known[1])
    return mx.logaddexp(mx.zeros_like(margin), -beta * margin).mean()


def gradients_of(task: Task, pairs: list[Pair], kind: mx.Dtype | None = None) -> dict[str, mx.array]:
    """Gradients of the pairs' loss, all computed in this dtype; None: the models'."""
    model, reference = with_lora(base_model(task)[0], task), base_model(task)[0]
    for one in (model, reference) if kind is not None else ():
        one.set_dtype(kind)
    _, found = nn.value_and_grad(model, lambda *batch: dpo(model, reference, *batch, task.beta))(*rows_of(pairs))
    return dict(tree_flatten(found))


def save_witness(task: Task, pairs: list[Pair], file: Path) -> None:
    """The same gradients in float64, which MLX has on the CPU alone."""
    with mx.stream(mx.cpu):
        found = gradients_of(task, pairs, mx.float64)
        if {value.dtype for value in found.values()} != {mx.float64}:
            raise TypeError("the witness was not computed in float64")
        save_gradients(found, str(file))


def plain(task: Task, gate: Gate) -> None:
    pairs = load_pairs(task.pairs)[: task.batch_size]
    if task.gradients:
        save_gradients(gradients_of(task, pairs), task.gradients)
        save_witness(task, pairs, Path(task.gradients).with_name(WITNESS_FILE))
    model, reference = with_lora(base_model(task)[0], task), base_model(task)[0]
    loss_and_gradients = nn.value_and_grad(model, lambda ids, mask: dpo(model, reference, ids, mask, task.beta))
    optimizer = adamw(task)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array, mask: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(ids, mask)
        optimizer.update(model, gradients)
        return loss

    equip(gate, n_bytes(model), n_bytes(reference))
    while True:
        gate()
        mx.eval(step(*rows_of(pairs)), state)
