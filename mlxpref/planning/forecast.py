"""What a run will be: rows, steps, shapes, memory by part. No model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxpref.config import Config
from mlxpref.data.plan import Plan
from mlxpref.data.shapes import Shape
from mlxpref.folders import n_trained, read_settings, resolve_lora
from mlxpref.hub import model_folder
from mlxpref.objectives import Objective
from mlxpref.planning import plans
from mlxpref.planning.dims import Dims, read_dims
from mlxpref.planning.graphs import graph_bytes
from mlxpref.planning.memory import Peak, Trained, pass_peak, training_peak
from mlxpref.planning.rows import Rows, Sized
from mlxpref.prepare import Prepared

PROGRAM_BYTES = 600_000_000
"""Python with its libraries and tokenizer."""

GRAPHS = "compiled graphs"

ROW_BYTES = 2_000
"""Of a row's objects, besides its tokens."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is fixed before a plan is made.

    Attributes:
        config, objective, data: of the run.
        dims: of its model.
        trained: what trains.
        rows: of the data.
        holds_graphs: whether compiled graphs take memory of the process: MLX's do on a CPU.
        share_prompts: whether each prompt goes through the model once for all its responses.
    """

    config: Config
    objective: Objective
    data: Prepared
    dims: Dims
    trained: Trained
    rows: Rows
    holds_graphs: bool
    share_prompts: bool = True

    @property
    def has_reference_pass(self) -> bool:
        return "reference" in self.objective.needs and self.config.reference.update is None


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run's plans and its peak.

    Attributes:
        tokens: padded tokens of a micro-batch at most.
        train, reference: plans; ``valid`` of one evaluation. None where there is none.
        asked: rows of the reference pass, each once.
        n_evaluations: in the run.
        training, passes: peaks of the updates, and of what runs without gradients; device memory.
        host: bytes in the process beside them: name → bytes.
    """

    tokens: int
    train: Plan
    valid: Plan | None
    reference: Plan | None
    asked: Sized
    n_evaluations: int
    training: Peak
    passes: Peak
    host: Mapping[str, int]

    @property
    def peak(self) -> Peak:
        return max(self.training, self.passes, key=lambda peak: peak.total)

    @property
    def total(self) -> int:
        """Bytes of the device's peak and of the process beside it."""
        return self.peak.total + sum(self.host.values())

    @property
    def without_graphs(self) -> int:
        """The total but for compiled graphs: it grows with the budget, while a smaller budget may have more graphs."""
        return self.total - self.host.get(GRAPHS, 0)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.train.shapes


def make_job(
    config: Config, objective: Objective, data: Prepared, *, device: Mapping[str, Any], share_prompts: bool = True
) -> Job:
    """Read what a forecast is made of: config.json, headers of weights and adapters.

    Args:
        device: its "kind", "metal", "cuda" or "cpu"; on a CPU weights are float32 unless the configuration says
            otherwise, elsewhere as the checkpoint has them. Its "backend", MLX unless it says.
    """
    model, kind = config.model, str(device["kind"])
    folder = model_folder(model.path, revision=model.revision, weights=False)
    dtype = model.dtype or ("float32" if kind == "cpu" else None)
    dims = read_dims(folder, dtype=dtype, load_in_4bit=model.load_in_4bit)
    trained = trained_of(config, dims, on_cpu=kind == "cpu")
    holds_graphs = kind == "cpu" and device.get("backend", "mlx") == "mlx"
    return Job(config, objective, data, dims, trained, Rows.of(data), holds_graphs, share_prompts)


def trained_of(config: Config, dims: Dims, *, on_cpu: bool) -> Trained:
    """What a configuration trains of a model."""
    adapter = config.adapter
    if adapter.init_from is not None:
        kind, layers, lora = read_settings(Path(adapter.init_from))
        lora = resolve_lora(lora)
    else:
        given = adapter.lora_parameters
        kind, layers = adapter.fine_tune_type or "lora", adapter.num_layers or -1
        lora = resolve_lora(None if given is None else given.arguments())
    keys: Any = lora.get("keys")
    return Trained(
        fine_tune_type=kind,
        layers=n_trained(kind, layers, dims.layers),
        rank=0 if kind == "full" else lora["rank"],
        keys=None if keys is None else tuple(keys),
        dropout=kind != "full" and lora["dropout"] > 0,
        grad_checkpoint=config.training.grad_checkpoint,
        optimizer=config.optimizer.name,
        from_adapter=adapter.init_from is not None,
        blocks=on_cpu and dims.dtype == "float32",
        on_cpu=on_cpu,
    )


def forecast(job: Job, *, tokens: int | None = None) -> Forecast:
    """Plan the run and add up its memory.

    Args:
        tokens: padded tokens of a micro-batch; None: the configuration's.
    """
    config, rows = job.config, job.rows
    tokens = config.batching.budget if tokens is None else tokens
    shared: dict[str, Any] = {"share_prompts": job.share_prompts, "tokens": tokens}
    train = plans.plan_training(config, rows.train, **shared)
    every = plans.eval_every(config, has_valid=bool(rows.valid))
    valid = plans.plan_evaluation(config, rows.valid, **shared) if every else None
    reference, asked = None, rows.at([])
    if job.has_reference_pass:
        evaluated = [] if valid is None else [rows.n_train + place for place in plans.visited(valid)]
        asked = rows.distinct([*plans.visited(train), *evaluated])
        reference = plans.plan_reference(config, asked, **shared)
    most = max((len(step) for step in train.steps), default=1)
    passes = [shape for plan in (valid, reference) if plan is not None for shape in plan.shapes]
    return Forecast(
        tokens=tokens,
        train=train,
        valid=valid,
        reference=reference,
        asked=asked,
        n_evaluations=plans.n_evaluations(every, len(train.steps)),
        training=training_peak(job.dims, job.trained, train.shapes, accumulated=most > 1),
        passes=pass_peak(job.dims, job.trained, passes, "evaluation" if reference is None else "reference pass"),
        host={
            "data": ROW_BYTES * len(rows.all) + 4 * int(rows.sizes.tokens.sum()),
            "reference log-probs": 4 * int(asked.sizes.scored.sum()),
            "program": PROGRAM_BYTES,
            **_graphs(job, train.shapes, passes),
        },
    )


def _graphs(job: Job, train: Sequence[Shape], passes: Sequence[Shape]) -> dict[str, int]:
    if not job.holds_graphs:
        return {}
    size = partial(graph_bytes, job.dims, job.trained)
    trained = sum(size(shape, differentiate=True) for shape in train)
    return {GRAPHS: trained + sum(size(shape, differentiate=False) for shape in passes)}
