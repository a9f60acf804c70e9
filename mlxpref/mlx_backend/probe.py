"""Which way a model's forward pass takes, found out by running it.

On a handful of random tokens, log-probs and gradients of the plain forward (whole rows, no cache) are
compared with those of the shared forward (prompt once). Sharing is chosen only when it is exact. The rows
are a dozen tokens long: a sliding window wider than that is not exercised here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxpref.errors import ModelError
from mlxpref.folders import vocabulary_size
from mlxpref.mlx_backend.logps import Network
from mlxpref.mlx_backend.policy import Policy, dtype_name
from mlxpref.records import MicroBatch, Shelf

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference in nats, and relative gradient error, that rounding alone may explain, besides twice the
noise between two paddings of the plain forward."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One comparison: largest log-prob difference (nats) and relative gradient difference."""

    logps: float
    gradients: float
    reason: str = ""

    def exact(self, tolerance: float) -> bool:
        return not self.reason and self.logps <= tolerance and self.gradients <= tolerance


@dataclass(frozen=True, slots=True)
class Ways:
    """What a model allows, each compared with the plain whole forward.

    Attributes:
        chosen: "shared" or "plain".
        own_kernels: functions of ours in the place of some of MLX's.
        split_head: logits of response positions alone, in chunks.
        shared, checkpointed: the comparisons behind it; the latter along the chosen way.
        tolerance: what rounding alone may explain in this dtype.
    """

    chosen: str
    own_kernels: bool
    split_head: bool
    shared: Probe
    checkpointed: Probe | None
    tolerance: float


def choose_way(policy: Policy) -> Ways:
    """Set ``policy.way`` (and whether its head is split) by what agrees with the plain whole forward.

    Raises:
        ModelError: gradient checkpointing was asked for and is not exact on this architecture.
    """
    wanted = policy.network.grad_checkpoint
    ways = examine(policy, checkpointing=wanted)
    policy.way, policy.network.split_head, policy.network.grad_checkpoint = ways.chosen, ways.split_head, wanted
    policy.network.own_kernels = ways.own_kernels
    if ways.checkpointed is not None and not ways.checkpointed.exact(ways.tolerance):
        found = ways.checkpointed
        raise ModelError(
            f"gradient checkpointing is not exact on {policy.config.get('model_type')} "
            f"({found.reason or f'gradients differ by {found.gradients:.1e}'}); train without grad_checkpoint"
        )
    return ways


def examine(policy: Policy, *, checkpointing: bool = True) -> Ways:
    """Run every way on a handful of random tokens; the policy is left as it was."""
    network, training = policy.network, policy.model.training
    rows = _random_rows(vocabulary_size(policy.config))
    plain, shared = micro_batch(rows, shared=0), micro_batch(rows, shared=5)
    held = network.split_head, network.grad_checkpoint, network.own_kernels
    network.grad_checkpoint = False
    _training_without_dropout(policy.model)
    try:
        reference = Network(policy.model, vocabulary=network.vocabulary, split_head=False)
        reference.own_kernels = False
        whole = _outcome(policy, plain, reference)
        noise = _compare(policy, micro_batch(rows, shared=0, padding=8), reference, whole)
        tolerance = TOLERANCE[dtype_name(policy.model)] + 2 * max(noise.logps, noise.gradients)
        for own, split in _choices(network):
            network.own_kernels, network.split_head = own, split
            if _compare(policy, plain, network, whole).exact(tolerance):
                break
        sharing = _compare(policy, shared, network, whole)
        exact = sharing.exact(tolerance)
        network.grad_checkpoint = checkpointing
        again = _compare(policy, shared if exact else plain, network, whole) if checkpointing else None
        chosen = "shared" if exact else "plain"
        return Ways(chosen, network.own_kernels, network.split_head, sharing, again, tolerance)
    finally:
        network.split_head, network.grad_checkpoint, network.own_kernels = held
        policy.model.train(training)


def examine_filled(
    policy: Policy, filled: Callable[[MicroBatch, MicroBatch], MicroBatch]
) -> tuple[Probe, float]:
    """A micro-batch as ``filled`` makes it of one layout of some rows and of another, against the latter as it is; and
    what rounding alone may explain."""
    training, rows = policy.model.training, _random_rows(vocabulary_size(policy.config))
    first, second = (3, 5) if policy.share_prompts else (0, 0)
    _training_without_dropout(policy.model)
    try:
        read = micro_batch(rows, shared=second, padding=8)
        truth = _outcome(policy, read, policy.network)
        found = _compare(policy, lambda: filled(micro_batch(rows, shared=first), read), policy.network, truth)
        return found, TOLERANCE[dtype_name(policy.model)]
    finally:
        policy.model.train(training)


def _choices(network: Network) -> list[tuple[bool, bool]]:
    """(own kernels, split head), best first; the last is MLX's own way with whole rows of logits."""
    wanted = [(own, split) for own in (True, False) for split in (True, False)]
    return [(own, split) for own, split in wanted if own <= network.own_kernels and split <= network.split_head]


def _training_without_dropout(model: nn.Module) -> None:
    """Training mode, in which some models take differentiable operations instead of fused kernels."""
    model.train()
    for _, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def _random_rows(vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Three prompts of 6 to 9 tokens, two responses each of 3 to 6."""
    draw = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(token) for token in draw.integers(0, vocabulary, n)]

    return [(ids(n), [ids(n - 3), ids(n - 4)]) for n in (7, 8, 9)]


def micro_batch(rows: list[tuple[list[int], list[list[int]]]], *, shared: int, padding: int = 0) -> MicroBatch:
    """Rows of (prompt, responses) laid out by hand, one shelf a slot, ``shared`` prompt tokens in common."""
    n_slots = len(rows[0][1])
    width = max(len(p) - shared + len(r) - 1 for p, responses in rows for r in responses) + padding
    length = max(len(r) for _, responses in rows for r in responses)
    place = np.full((len(rows), n_slots, length), -1, np.int32)
    shelves, scored, targets = [], [], []
    for slot in range(n_slots):
        inputs = np.zeros((len(rows), width), np.int32)
        for row, (prompt, responses) in enumerate(rows):
            tokens = prompt[shared:] + responses[slot]
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            start = (slot * len(rows) + row) * width + len(prompt) - shared - 1
            for t, token in enumerate(responses[slot]):
                place[row, slot, t] = len(scored)
                scored.append(start + t)
                targets.append(token)
        shelves.append(Shelf(inputs, np.arange(len(rows), dtype=np.int32)))
    place[place < 0] = len(scored)
    return MicroBatch(
        prompts=np.array([prompt[:shared] for prompt, _ in rows], np.int32).reshape(len(rows), shared),
        shelves=tuple(shelves),
        scored=np.array(scored, np.int32),
        targets=np.array(targets, np.int32),
        place=place,
        mask=(place < len(scored)).astype(np.float32),
        weights=np.ones(len(rows), np.float32),
    )


def _outcome(policy: Policy, batch: MicroBatch, network: Network) -> tuple[mx.array, dict[str, mx.array]]:
    """Log-probs, and gradients of a fixed random mixture of them towards every trainable parameter.

    A fresh adapter's second factor is zero and hides the first, so both are jittered for the probe.
    """
    from mlxpref.mlx_backend.arrays import to_mlx

    start = policy.trainable()
    key = mx.random.key(1)
    jittered = {
        name: value + 0.02 * mx.random.normal(value.shape, key=key).astype(value.dtype)
        for name, value in start.items()
    }
    arrays = to_mlx(batch)
    mixture = mx.random.normal(arrays.mask.shape, key=mx.random.key(2)) * arrays.mask

    def total(parameters: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        policy.model.update(tree_unflatten(list(parameters.items())))
        logps = network.token_logps(arrays, differentiate=bool(start)).tokens
        return (logps * mixture).sum(), logps

    try:
        if not start:
            return total({})[1], {}
        (_, logps), gradients = mx.value_and_grad(total)(jittered)
        mx.eval(logps, gradients)
        return logps, dict(tree_flatten(gradients))
    finally:
        policy.update(start)


def _compare(
    policy: Policy,
    batch: MicroBatch | Callable[[], MicroBatch],
    network: Network,
    truth: tuple[mx.array, dict[str, mx.array]],
) -> Probe:
    try:
        batch = batch if isinstance(batch, MicroBatch) else batch()
        logps, gradients = _outcome(policy, batch, network)
    except (ModelError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        # Any of these is a model class that does not fit the layout; the plain way needs nothing of it.
        return Probe(np.inf, np.inf, reason=f"{type(error).__name__}: {error}")
    gap = mx.abs(logps - truth[0]).max().item()
    norm = sum((mx.square(g.astype(mx.float32)).sum() for g in truth[1].values()), mx.array(0.0))
    apart = sum(
        (mx.square((g - gradients[name]).astype(mx.float32)).sum() for name, g in truth[1].items()),
        mx.array(0.0),
    )
    relative = (mx.sqrt(apart) / mx.maximum(mx.sqrt(norm), 1e-12)).item()
    return Probe(float(gap), float(relative))
