"""A forecast as a person, or a program, reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from mlxpref.config import Config
from mlxpref.data.shapes import Shape
from mlxpref.data.words import counted
from mlxpref.objectives import Objective
from mlxpref.planning.budget import SIZES, largest_that_fits
from mlxpref.planning.forecast import Forecast, Job, forecast, make_job
from mlxpref.planning.machine import Memory, this_machine
from mlxpref.planning.remedies import Remedy, remedies
from mlxpref.planning.timing import Measured, expected, expected_at, measure
from mlxpref.prepare import Prepared

Load = Callable[[Prepared], tuple[Any, Any]]
"""Gives the policy and its step."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a run before it starts.

    Attributes:
        job, found, memory: what, what it takes, what there is.
        chosen: the budget was "auto", and this run's is ``found.tokens``.
        remedies: of a run that does not fit.
        seconds: by stage; None where nothing says how fast the device is.
        measured: what was timed; None where nothing was.
        notes: what a reader should know.
    """

    job: Job
    found: Forecast
    memory: Memory
    chosen: bool
    remedies: tuple[Remedy, ...]
    seconds: dict[str, float] | None
    measured: Measured | None
    tokens_per_second: float | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.found.total <= self.memory.usable

    def lines(self) -> Iterator[str]:
        """The run in words: rows, steps, shapes, model."""
        found, job = self.found, self.job
        plan = found.train
        yield (
            f"training: {counted(len(job.data.train), 'row')}, {counted(len(plan.steps), 'step')} "
            f"({plan.epochs[-1]:.2f} epochs), {plan.tokens:,} tokens, {plan.padding:.1%} padding"
        )
        parts = sum(len(step) for step in plan.steps)
        budget = f"{found.tokens} tokens" + (" (auto)" if self.chosen else "")
        yield (
            f"micro-batches: {parts} of at most {budget} in {counted(len(plan.shapes), 'shape')}; "
            f"the largest: {_said_shape(plan.shapes[0])}"
        )
        if found.reference is not None:
            rows = sum(len(part.rows) for step in found.reference.steps for part in step)
            tokens = f"{found.reference.tokens:,} tokens"
            yield f"reference pass: {counted(rows, 'row')}, {tokens}, less what the store has"
        if found.valid is not None:
            rows = sum(len(part.rows) for step in found.valid.steps for part in step)
            yield f"evaluations: {found.n_evaluations} of {counted(rows, 'row')}, {found.valid.tokens:,} tokens each"
        dims, trained = job.dims, job.trained
        bits = ", 4 bits" if dims.quantised else ""
        yield (
            f"model: {dims.kind}, {dims.n_parameters:,} parameters, {dims.dtype}{bits}; {trained.fine_tune_type} of "
            f"{counted(trained.layers, 'layer')} of {dims.layers}: {trained.parameters(dims):,} numbers train"
        )
        yield from (f"note: {note}" for note in self.notes)

    def verdict(self) -> Iterator[str]:
        """Whether it fits; if not, what to change."""
        total, usable = self.found.total / 1e9, self.memory.usable / 1e9
        where = f"{usable:.1f} GB of {self.memory.size / 1e9:.1f} may be used"
        if self.fits:
            yield f"fits: {total:.2f} GB, and {where}"
            return
        yield f"does not fit: {total:.2f} GB, and {where}"
        if not self.remedies:
            yield "nothing in the configuration makes it fit: take a smaller model"
            return
        yield "what to change, cheapest first:" if len(self.remedies) > 1 else "what to change:"
        for remedy in self.remedies:
            settings = " ".join(f"--set {key}={value}" for key, value in remedy.settings)
            yield f"  {settings}: {remedy.total / 1e9:.2f} GB ({'; '.join(remedy.costs)})"

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe; sizes in bytes, times in seconds."""
        found, plan = self.found, self.found.train
        reference, valid = found.reference, found.valid
        return {
            "rows": {"train": len(self.job.data.train), "valid": len(self.job.data.valid)},
            "steps": len(plan.steps),
            "epochs": plan.epochs[-1],
            "tokens": plan.tokens,
            "padding": plan.padding,
            "micro_batch_tokens": found.tokens,
            "micro_batches": sum(len(step) for step in plan.steps),
            "shapes": len(plan.shapes),
            "largest_shape": _shape_dict(plan.shapes[0]),
            "reference_pass": None if reference is None else {
                "rows": sum(len(part.rows) for step in reference.steps for part in step), "tokens": reference.tokens,
            },
            "evaluations": None if valid is None else {"count": found.n_evaluations, "tokens": valid.tokens},
            "memory": {
                "phase": found.peak.phase,
                "device": dict(found.peak.parts),
                "device_total": found.peak.total,
                "training_total": found.training.total,
                "host": dict(found.host),
                "total": found.total,
                "size": self.memory.size,
                "usable": self.memory.usable,
            },
            "fits": self.fits,
            "remedies": [
                {"settings": dict(one.settings), "total": one.total, "costs": list(one.costs)} for one in self.remedies
            ],
            "time": None if self.seconds is None else {"seconds": self.seconds, "how": self._how()},
            "notes": list(self.notes),
        }  # fmt: skip

    def _how(self) -> str:
        if self.measured is None:
            return f"at {self.tokens_per_second:g} tokens a second, without tracing"
        return f"from {counted(self.measured.n_shapes, 'shape')} timed in {self.measured.seconds:.0f} s on this machine"


def make_report(
    config: Config,
    objective: Objective,
    data: Prepared,
    machine: ModuleType,
    *,
    memory: Memory | None,
    load: Load | None,
    tokens_per_second: float | None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Forecast a run.

    Args:
        memory: to plan for; None: this machine's.
        load: loads the model, to measure; None: nothing is loaded.
        tokens_per_second: training speed to reckon with instead.
    """
    device = machine.device_info()
    target = device if memory is None else {"kind": "metal"}
    memory = this_machine(machine) if memory is None else memory
    job = make_job(config, objective, data, device=target)
    notes = list(_notes(job, device))
    found, chosen = _forecast(job, memory, notes)
    timed = None
    if load is None:
        notes.append("that prompts can be shared is taken for granted: a probe says so when the model loads")
    elif found.total <= memory.usable:
        policy, step = load(data)
        if not policy.share_prompts:
            job = replace(job, share_prompts=False)
            found, chosen = _forecast(job, memory, notes)
        if found.total <= memory.usable:
            with machine.set_memory_policy():
                timed = measure(job, found, machine, policy, step, on_progress=on_progress)
    if load is not None and timed is None:
        notes.append("nothing was measured: the run does not fit here")
    seconds = expected(found, timed) if timed is not None else None
    if tokens_per_second is not None:
        seconds = expected_at(found, tokens_per_second)
    fits = found.total <= memory.usable
    return Report(
        job, found, memory, chosen, () if fits else tuple(remedies(job, found, memory)), seconds, timed,
        tokens_per_second, tuple(notes),
    )  # fmt: skip


def _forecast(job: Job, memory: Memory, notes: list[str]) -> tuple[Forecast, bool]:
    if job.config.batching.micro_batch_tokens != "auto":
        return forecast(job), False
    found = largest_that_fits(job, memory)
    if found is None:
        notes.append(f"micro_batch_tokens auto: not even {SIZES[0]} fit")
        found = forecast(job, tokens=SIZES[0])
    return found, True


def _notes(job: Job, device: dict[str, Any]) -> Iterator[str]:
    if device.get("backend") != "mlx":
        yield "memory is rough: its parts were measured on MLX, and PyTorch keeps other arrays"
    if job.dims.rough:
        yield f"memory is rough: {job.dims.rough}"
    if not job.dims.from_header:
        yield "no weights on this disk: sizes are those that config.json describes"
    if job.config.training.fsdp:
        yield "training.fsdp: weights, masters, moments and gradients are counted whole, not a worker's slice of them"
    if job.config.reference.momentum is not None:
        yield "reference.momentum holds a second model during the reference pass, which is not counted"
    if job.config.reference.update is not None:
        yield "a reference that follows the policy holds a dense matrix a module, which is not counted"


def _said_shape(shape: Shape) -> str:
    lengths = " + ".join(map(str, shape.rows))
    return f"{shape.n} x ({shape.prompt} shared + {lengths}) = {shape.slots} positions, {shape.scored} scored"


def _shape_dict(shape: Shape) -> dict[str, Any]:
    return {
        "examples": shape.n, "prompt": shape.prompt, "rows": list(shape.rows), "scored": shape.scored,
        "positions": shape.slots,
    }  # fmt: skip
