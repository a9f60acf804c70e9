"""How long a run takes: a few of its own micro-batches are timed, and the rest follows from their sizes.

Seconds of a micro-batch are a + b·positions + c·scored positions + d·pairs of query and key, none of them negative;
an update of the weights, and tracing each shape once, are counted apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from mlxpref.data.batching import collate
from mlxpref.data.columns import available_columns
from mlxpref.data.parts import PlannedPart
from mlxpref.data.plan import Plan
from mlxpref.data.shapes import Shape
from mlxpref.planning.forecast import Forecast, Job
from mlxpref.records import Batch, MicroBatch, Tokenized

N_SHAPES = 5
"""Shapes that are timed with gradients; of those without, fewer."""

PATIENCE = 120.0
"""Seconds after which no further shape is begun, once two are known."""

REPEATS = 2
"""Timed calls of each shape after the one that traces it; the quicker counts."""

PASS_SHARE = 0.4
"""Of a training step's time a token, what a pass without gradients takes, where only one speed is known."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds by what is computed.

    Attributes:
        each: of a micro-batch.
        position, scored, pair: of one more of them.
        update: of the weights, once a step.
        tracing: of a shape's first call, beyond what later ones take.
    """

    each: float
    position: float
    scored: float
    pair: float
    update: float = 0.0
    tracing: float = 0.0

    def seconds(self, plan: Plan) -> float:
        """Of all micro-batches of a plan, without tracing."""
        own = np.array([self.each, self.position, self.scored, self.pair])
        found = sum(float(own @ _sizes(part.shape)) for step in plan.steps for part in step)
        return found + self.update * len(plan.steps)


def pairs(shape: Shape) -> int:
    """Pairs of query and key that causal attention looks at."""
    prompts = shape.n * shape.prompt * (shape.prompt + 1) // 2
    rows = sum(length * shape.prompt + length * (length + 1) // 2 for length in shape.rows)
    return prompts + shape.n * rows


def _sizes(shape: Shape) -> np.ndarray:
    return np.array([1.0, shape.slots, shape.scored, pairs(shape)])


def fit(shapes: Sequence[Shape], seconds: Sequence[float]) -> Rates:
    """The rates that explain these seconds best, by relative error, with none below zero.

    With fewer shapes than rates some rates are zero.
    """
    sizes = np.array([_sizes(shape) for shape in shapes]) / np.asarray(seconds)[:, None]
    best: tuple[float, np.ndarray] | None = None
    for count in range(1, min(len(shapes), 4) + 1):
        for chosen in combinations(range(4), count):
            found, *_ = np.linalg.lstsq(sizes[:, chosen], np.ones(len(shapes)), rcond=None)
            if (found < 0).any():
                continue
            error = float(np.square(sizes[:, chosen] @ found - 1).sum()) + 1e-4 * count
            if best is None or error < best[0]:
                rates = np.zeros(4)
                rates[list(chosen)] = found
                best = error, rates
    assert best is not None  # a single rate is never negative
    return Rates(*best[1].tolist())


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found on this device.

    Attributes:
        train, passes: rates with and without gradients.
        n_shapes: timed with gradients.
        seconds: that the measurement took, loading the model aside.
        peak: GB that the backend counted meanwhile.
        share_prompts: as the policy found out.
    """

    train: Rates
    passes: Rates
    n_shapes: int
    seconds: float
    peak: float
    share_prompts: bool


Progress = Callable[[str, int, int], None]


def measure(
    job: Job,
    found: Forecast,
    machine: Any,
    policy: Any,
    step: Any,
    *,
    on_progress: Progress = lambda what, done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time micro-batches of a plan, with gradients and without. The policy's weights are moved by nothing.

    Args:
        machine: the backend that policy and step are of.
    """
    began = clock()
    chosen = _spread([part for step in found.train.steps for part in step], N_SHAPES)
    passes = [part for plan in (found.reference,) if plan is not None for step in plan.steps for part in step]
    forward = _spread(passes, 3) or chosen[:3]
    asked = found.asked if passes else job.data.train
    total = len(chosen) + len(forward)
    trained: list[tuple[Shape, float, float]] = []
    update = 0.0
    for part in chosen:
        if len(trained) >= 2 and clock() - began > PATIENCE:
            break
        own = _micro_batch(job, machine, policy, part)
        trained.append((part.shape, *_timed(partial(_update, step, (own,), part), clock)))
        on_progress("timing", len(trained), total)
    if len(trained) == len(chosen) and any(len(parts) > 1 for parts in found.train.steps):
        # An update alone: what two micro-batches in one step take less than two steps.
        smallest, twice = chosen[-1], (own, own)
        both, _ = _timed(partial(_update, step, twice, smallest), clock)
        update = max(0.0, 2 * trained[-1][1] - both)
    read: list[tuple[Shape, float, float]] = []
    for part in forward:
        if len(read) >= 1 and clock() - began > 1.5 * PATIENCE:
            break
        read.append((part.shape, *_timed(partial(_passed, asked, machine, policy, part), clock)))
        on_progress("timing", len(chosen) + len(read), total)
    on_progress("timing", total, total)
    return Measured(
        train=_rates(trained, update),
        passes=_rates(read, 0.0),
        n_shapes=len(trained),
        seconds=clock() - began,
        peak=float(machine.memory()["peak"]),
        share_prompts=bool(policy.share_prompts),
    )


def _spread(parts: Sequence[PlannedPart], n: int) -> list[PlannedPart]:
    """Parts of n different shapes, from the largest to the smallest: the largest tells most, and comes first."""
    by_shape = {part.shape: part for part in parts}
    ordered = sorted(by_shape.values(), key=lambda part: -part.shape.slots)
    if len(ordered) <= n:
        return ordered
    at = np.linspace(0, len(ordered) - 1, n).round().astype(int)
    return [ordered[index] for index in at]


def _timed(call: Callable[[], None], clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a call once it is traced, and what the first took more."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = clock()
        call()
        seconds.append(clock() - began)
    best = min(seconds[1:])
    return best, max(0.0, seconds[0] - best)


def _micro_batch(job: Job, machine: Any, policy: Any, part: PlannedPart) -> MicroBatch:
    """A part as the run's first update has it: the policy is still its own reference.

    With other log-probs margins may be so wide that the slopes are too small for normal numbers, which are many times
    slower on a CPU.
    """
    rows, objective = job.data.train, job.objective
    columns = objective.reads & (objective.from_data | available_columns(rows))
    own = [rows[index] for index in part.rows]
    one = collate(own, PlannedPart(tuple(range(len(own))), part.shape), None, columns)
    if not job.has_reference_pass:
        return one
    return one._replace(reference=_token_logps(machine, policy, one))


def _update(step: Any, micro_batches: tuple[MicroBatch, ...], part: PlannedPart) -> None:
    """One update with a learning rate of 0."""
    step(Batch(micro_batches, (part.rows,) * len(micro_batches)), 0.0)


def _passed(rows: Sequence[Tokenized], machine: Any, policy: Any, part: PlannedPart) -> None:
    _token_logps(machine, policy, collate(rows, part))


def _token_logps(machine: Any, policy: Any, micro_batch: MicroBatch) -> np.ndarray:
    """Of the reference, which of a full fine-tune is the policy before its first update."""
    return np.asarray(machine.token_logps(policy, micro_batch, reference=policy.fine_tune_type != "full").tokens)


def _rates(timed: Sequence[tuple[Shape, float, float]], update: float) -> Rates:
    seconds = [max(seconds - update, 0.1 * seconds) for _, seconds, _ in timed]
    found = fit([shape for shape, _, _ in timed], seconds)
    # The first shape also compiles kernels that all others use; a run begun afterwards finds them.
    tracing = float(np.median([first for _, _, first in (timed[1:] or timed)]))
    return Rates(found.each, found.position, found.scored, found.pair, update, tracing)


def expected(found: Forecast, rates: Measured) -> dict[str, float]:
    """Seconds by stage of the whole run."""
    stages = {"training": rates.train.seconds(found.train)}
    n_traced = rates.train.tracing * len(found.train.shapes)
    if found.valid is not None:
        stages["evaluations"] = found.n_evaluations * rates.passes.seconds(found.valid)
        n_traced += rates.passes.tracing * len(found.valid.shapes)
    if found.reference is not None:
        stages["reference pass"] = rates.passes.seconds(found.reference)
        n_traced += rates.passes.tracing * len(found.reference.shapes)
    return {**stages, "tracing": n_traced, "all": sum(stages.values()) + n_traced}


def expected_at(found: Forecast, tokens_per_second: float) -> dict[str, float]:
    """Seconds by stage at a training speed, in tokens without padding as a run reports it; tracing is not in it."""
    stages = {"training": found.train.tokens / tokens_per_second}
    if found.valid is not None:
        stages["evaluations"] = PASS_SHARE * found.n_evaluations * found.valid.tokens / tokens_per_second
    if found.reference is not None:
        stages["reference pass"] = PASS_SHARE * found.reference.tokens / tokens_per_second
    return {**stages, "all": sum(stages.values())}
