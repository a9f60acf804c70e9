"""What to change so that a run fits, in the order that costs its user least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from mlxpref.planning.budget import SIZES, largest_that_fits
from mlxpref.planning.dims import GROUP, WIDTHS, Dims
from mlxpref.planning.forecast import Forecast, Job, forecast
from mlxpref.planning.machine import Memory
from mlxpref.reference import kinds_of

SHAPES = (64, 32, 16, 8)
LAYERS = (16, 8, 4, 2)
LENGTHS = (2048, 1536, 1024, 768, 512, 384, 256)


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings with which the run would fit.

    Attributes:
        settings: key → value, of the configuration.
        total: bytes predicted with them.
        costs: what they cost, in words.
    """

    settings: tuple[tuple[str, str], ...]
    total: int
    costs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Change:
    """A job after one more change, and what was changed."""

    job: Job
    tokens: int
    settings: tuple[tuple[str, str], ...] = ()
    costs: tuple[str, ...] = ()

    def predicted(self) -> Forecast:
        return forecast(self.job, tokens=self.tokens)

    def then(self, key: str, value: str, cost: str, **more: object) -> _Change:
        settings = (*((k, v) for k, v in self.settings if k != key), (key, value))
        costs = tuple(dict.fromkeys((*self.costs, cost)))
        return replace(self, settings=settings, costs=costs, **more)  # type: ignore[arg-type]  # more: fields of this class


def remedies(job: Job, found: Forecast, memory: Memory) -> list[Remedy]:
    """Each single change that is enough, cheapest first; where none is, the cheapest combination; [] if nothing is.

    Args:
        found: what does not fit.
    """
    start = _Change(job, found.tokens)
    kinds = (_smaller_budget, _fewer_shapes, _checkpointing, _four_bits, _fewer_layers, _shorter)
    single = [remedy for kind in kinds if (remedy := _first_that_fits(kind(start, memory), memory)) is not None]
    if single:
        return single
    return _together(start, memory)


def _together(start: _Change, memory: Memory) -> list[Remedy]:
    """One change on top of another, the mildest first, until it fits."""
    reached = start
    for kind in (_checkpointing, _four_bits, _fewer_layers, _shorter, _fewer_shapes):
        for further in list(kind(reached, memory)):
            reached = further
            found = _first_that_fits(chain([reached], _smaller_budget(reached, memory)), memory)
            if found is not None:
                return [found]
    return []


def _first_that_fits(changes: Iterator[_Change], memory: Memory) -> Remedy | None:
    return next((_remedy(change) for change in changes if change.predicted().total <= memory.usable), None)


def _remedy(change: _Change) -> Remedy:
    return Remedy(change.settings, change.predicted().total, change.costs)


# --- the changes there are, each from the mildest on ---


def _smaller_budget(change: _Change, memory: Memory) -> Iterator[_Change]:
    found = largest_that_fits(change.job, memory, [size for size in SIZES if size < change.tokens])
    if found is not None:
        cost = "a little time; the same result"
        yield change.then("batching.micro_batch_tokens", str(found.tokens), cost, tokens=found.tokens)


def _fewer_shapes(change: _Change, memory: Memory) -> Iterator[_Change]:
    config = change.job.config
    if not change.job.holds_graphs:
        return
    for shapes in SHAPES:
        if shapes < config.batching.max_shapes and shapes // 4 >= kinds_of(change.job.rows.train):
            batching = config.batching.model_copy(update={"max_shapes": shapes})
            job = replace(change.job, config=config.model_copy(update={"batching": batching}))
            yield change.then("batching.max_shapes", str(shapes), "more padding; the same result", job=job)


def _checkpointing(change: _Change, memory: Memory) -> Iterator[_Change]:
    trained = change.job.trained
    if not trained.grad_checkpoint:
        job = replace(change.job, trained=replace(trained, grad_checkpoint=True))
        yield change.then("training.grad_checkpoint", "true", "a third more time; the same result", job=job)


def _four_bits(change: _Change, memory: Memory) -> Iterator[_Change]:
    job = change.job
    if job.dims.quantised or job.trained.fine_tune_type == "full" or job.trained.from_adapter:
        return
    dims = quantised(job.dims)
    if dims.weights < job.dims.weights:
        cost = "the base a little coarser, and slower on a CPU"
        yield change.then("model.load_in_4bit", "true", cost, job=replace(job, dims=dims))


def quantised(dims: Dims) -> Dims:
    """The same model with 4 bits a weight, where the width allows it."""
    bits = 4 + 16 * WIDTHS[dims.dtype] / GROUP
    matrices = tuple(replace(m, bits=bits) if m.inputs % GROUP == 0 else m for m in dims.matrices)
    return replace(dims, matrices=matrices)


def _fewer_layers(change: _Change, memory: Memory) -> Iterator[_Change]:
    trained = change.job.trained
    if trained.from_adapter:
        return
    for layers in LAYERS:
        if layers < trained.layers:
            job = replace(change.job, trained=replace(trained, layers=layers))
            yield change.then("adapter.num_layers", str(layers), "fewer layers learn", job=job)


def _shorter(change: _Change, memory: Memory) -> Iterator[_Change]:
    job, prompt = change.job, change.job.config.tokenization.max_prompt_length
    for length in LENGTHS:
        if length < job.rows.longest and (prompt is None or prompt < length):
            cut = replace(job, rows=job.rows.cut(length, prompt))
            yield change.then("tokenization.max_length", str(length), "long texts are cut", job=cut)
