"""Which examples go through the model together, in which shapes: the whole run, before it starts.

A batch (what the optimiser sees) is split into micro-batches, each filled up to a budget of token
positions; their shapes come from a short ladder and are merged until they are few.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlxpref.data.order import epoch_order
from mlxpref.data.parts import PlannedPart, Splitter
from mlxpref.data.shapes import Shape, merge_shapes, sizes_up_to
from mlxpref.data.sizes import sizes_of
from mlxpref.errors import ConfigError, DataError
from mlxpref.records import Tokenized


@dataclass(frozen=True, slots=True)
class Plan:
    """Every micro-batch of a run or of a pass.

    Attributes:
        steps: the parts of each optimiser step; in a pass each step is one part.
        shapes: the different shapes, those that compute most first.
        epochs: how much of the data has been seen after each step, in epochs.
        tokens: of all prompts (once each), responses and further texts, over all steps.
        slots: token positions that will be computed, over all steps.
        padding: share of these that are padding.
    """

    steps: tuple[tuple[PlannedPart, ...], ...]
    shapes: tuple[Shape, ...]
    epochs: tuple[float, ...]
    tokens: int
    slots: int
    padding: float


def plan_steps(
    rows: Sequence[Tokenized],
    *,
    batch_size: int,
    iters: int | None = None,
    epochs: float | None = None,
    micro_batch_tokens: int = 8192,
    share_prompts: bool = True,
    shuffle: bool = True,
    keep_together: bool = True,
    seed: int = 0,
    max_shapes: int = 128,
    n_workers: int = 1,
) -> Plan:
    """Plan a training run; a function of its arguments only.

    Args:
        rows: the tokenized data.
        batch_size: examples of one optimiser step; an epoch's last batch may hold fewer.
        iters: optimiser steps; or
        epochs: times each example is visited, 1 when neither is given; a fraction rounds up to steps.
        micro_batch_tokens: token positions, padding included, one forward pass may compute; a single
            example may exceed it.
        share_prompts: compute each prompt once for all its responses.
        shuffle, keep_together, seed: see ``order.epoch_order``.
        max_shapes: different shapes of micro-batches at most.
        n_workers: workers that share out each batch; which examples a batch holds does not depend on it.

    Raises:
        ConfigError: both ``iters`` and ``epochs``, or a size below 1.
        DataError: no rows, or lists of more different lengths K than ``max_shapes``.
    """
    _check_sizes(
        batch_size=batch_size, micro_batch_tokens=micro_batch_tokens, max_shapes=max_shapes, n_workers=n_workers
    )
    if iters is not None and epochs is not None:
        raise ConfigError(f"iters ({iters}) and epochs ({epochs}) are both given; give one")
    if not rows:
        raise DataError("no example is left to train on; see the counts of dropped rows")
    ids = sizes_of(rows).names

    def one_epoch(epoch: int) -> list[list[int]]:
        return epoch_order(
            ids, batch_size=batch_size, shuffle=shuffle, keep_together=keep_together, seed=seed, epoch=epoch
        )

    batches = _batches(one_epoch, iters, 1.0 if epochs is None else epochs)
    limit = min(batch_size, len(rows))
    return _plan(rows, batches, limit, micro_batch_tokens, share_prompts, max_shapes, n_workers)


def plan_pass(
    rows: Sequence[Tokenized],
    *,
    micro_batch_tokens: int = 8192,
    share_prompts: bool = True,
    max_shapes: int = 128,
) -> Plan:
    """Plan one visit of every example, in order of length, each step one micro-batch.

    Raises:
        ConfigError: a size below 1.
        DataError: lists of more different lengths K than ``max_shapes``.
    """
    _check_sizes(micro_batch_tokens=micro_batch_tokens, max_shapes=max_shapes)
    if not rows:
        return Plan((), (), (), 0, 0, 0.0)
    # No sensible micro-batch holds more examples than the budget holds tokens of the shortest.
    limit = max(1, min(len(rows), micro_batch_tokens // 2))
    plan = _plan(rows, [list(range(len(rows)))], limit, micro_batch_tokens, share_prompts, max_shapes)
    steps = tuple((part,) for part in plan.steps[0])
    seen = 0
    epochs = []
    for (part,) in steps:
        seen += len(part.rows)
        epochs.append(seen / len(rows))
    return Plan(steps, plan.shapes, tuple(epochs), plan.tokens, plan.slots, plan.padding)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def _batches(one_epoch: Callable[[int], list[list[int]]], iters: int | None, epochs: float) -> list[list[int]]:
    """Batches of as many epochs as asked for; whole epochs follow one another, the last may be cut."""
    if iters is not None and iters < 0:
        raise ConfigError(f"iters is {iters}; it must be at least 0")
    if not (math.isfinite(epochs) and epochs >= 0):
        raise ConfigError(f"epochs is {epochs}; it must be a number of at least 0")
    batches: list[list[int]] = []
    epoch = 0
    while (iters is None and epoch < epochs) or (iters is not None and len(batches) < iters):
        fresh = one_epoch(epoch)
        if iters is None:
            fresh = fresh[: math.ceil(len(fresh) * min(1.0, epochs - epoch) - 1e-9)]
        batches += fresh
        epoch += 1
    return batches if iters is None else batches[:iters]


def _plan(
    rows: Sequence[Tokenized],
    batches: list[list[int]],
    limit: int,
    budget: int,
    share_prompts: bool,
    max_shapes: int,
    n_workers: int = 1,
) -> Plan:
    # An eighth of the budget is left to merging, which pads micro-batches further.
    splitter = Splitter(rows, share_prompts=share_prompts, budget=budget * 7 // 8)
    parts = _split_shares(splitter, batches, limit, max_shapes, n_workers) if batches else []
    needs = [part.shape for step in parts for part in step]
    merged = iter(merge_shapes(needs, max_shapes=max_shapes, max_slots=budget))
    steps = tuple(tuple(replace(part, shape=next(merged)) for part in step) for step in parts)
    return _summary(rows, splitter, steps)


def _split_shares(
    splitter: Splitter, batches: list[list[int]], limit: int, max_shapes: int, n_workers: int
) -> list[list[PlannedPart]]:
    """Parts of every batch, each worker's own; of a batch smaller than the group some workers have none."""
    shares = [splitter.share_out(batch, n_workers) for batch in batches]
    split = iter(_split_all(splitter, [share for of_batch in shares for share in of_batch if share], limit, max_shapes))
    return [
        [
            replace(part, worker=worker)
            for worker, share in enumerate(of_batch)
            if share
            for part in next(split)
        ]
        for of_batch in shares
    ]


def _split_all(splitter: Splitter, batches: list[list[int]], limit: int, max_shapes: int) -> list[list[PlannedPart]]:
    """Parts of every batch. Only shapes of one (B, S) merge, so these kinds must leave room: where a
    fine choice of B makes too many kinds, a coarser one is taken."""
    for coarse in range(3):
        parts = splitter.split(batches, sizes_up_to(limit, coarse=coarse))
        kinds = len({(part.shape.n, part.shape.responses) for step in parts for part in step})
        if kinds <= max_shapes // 4:
            return parts
    if kinds > max_shapes:
        raise DataError(
            f"the data hold lists of {kinds} different lengths, each of which needs a shape of its own, and"
            f" max_shapes is {max_shapes}; raise max_shapes or make the lists equally long"
        )
    return parts


def _summary(rows: Sequence[Tokenized], splitter: Splitter, steps: tuple[tuple[PlannedPart, ...], ...]) -> Plan:
    used: Counter[Shape] = Counter()
    seen = tokens = filled = 0
    epochs = []
    n_tokens = splitter.tokens.tolist()
    for step in steps:
        for part in step:
            used[part.shape] += 1
            seen += len(part.rows)
            tokens += sum(n_tokens[row] for row in part.rows)
            filled += splitter.filled(part)
        epochs.append(seen / len(rows))
    slots = sum(shape.slots * times for shape, times in used.items())
    shapes = sorted(used, key=lambda s: (-s.slots, s.responses, s.n, s.prompt, s.rows, s.scored))
    return Plan(steps, tuple(shapes), tuple(epochs), tokens, slots, 1 - filled / slots if slots else 0.0)
