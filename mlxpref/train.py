"""Training: every room in its order, from a configuration to a run folder.

Whatever can be wrong is found as early as it can be: names and options before data are read, data
before a model is loaded, the run folder before anything is computed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from mlxpref import backends
from mlxpref.assembly import Assembly
from mlxpref.callbacks import Callbacks, TensorBoard, TrainCallback
from mlxpref.config import Config
from mlxpref.config_layers import check_config, flat, read_yaml
from mlxpref.conversion import as_mlx_folder
from mlxpref.errors import ConfigError, MlxprefError, RunError, raise_all
from mlxpref.loop import StopSignal, TrainResult
from mlxpref.objectives import resolve_objective
from mlxpref.prepare import Prepared
from mlxpref.runs import CONFIG
from mlxpref.together import run_folder
from mlxpref.workers import WorkerEnded, Workers

FREE_ON_RESUME = frozenset(
    {
        "output.adapter_path",
        "output.report_to",
        "output.project",
        "training.steps_per_report",
        "training.save_every",
        "training.cache_frozen",
        "training.fsdp",
        "training.keep_last",
        "reference.store",
    }
)
"""Keys that may differ when a run is resumed: none of them changes a weight."""


def train(
    config: Config,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainCallback] = (),
    backend: ModuleType | None = None,
    prepared: Prepared | None = None,
    clock: Callable[[], float] = time.perf_counter,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> TrainResult:
    """Train an adapter, or go on with one.

    Of several workers that a launcher started, each calls this with the same configuration: they share out every
    batch, worker 0 writes the run folder and tells the listeners, and the others return the same result.

    Args:
        config: the resolved configuration; ``output.adapter_path`` is the run folder.
        resume: go on from the run folder's last whole checkpoint (from the start if there is none yet).
        callbacks: listeners besides those of ``output.report_to``.
        backend: the machine room; by default ``model.backend`` by name.
        prepared: the rows to train on, in place of those that ``prepare`` makes of the configuration. A run that
            is resumed must be given the same ones.
        clock: seconds, for speeds. now: for the run's facts.

    Raises:
        MlxprefError: its children say what is wrong with configuration, data, model or run folder.
        WorkerEnded: the same on another worker than 0, which says it.
    """
    config = absolute_paths(config)
    objective = resolve_objective(config.objective)
    machine = backend if backend is not None else backends.get(config.model.backend)
    workers: Workers = machine.workers()
    listeners = Callbacks([])
    try:
        if workers.rank == 0:
            listeners = Callbacks([*callbacks, *_reporters(config, machine)])
        folder, sharded = Path(config.output.adapter_path), config.training.fsdp
        with run_folder(folder, resume=resume, workers=workers, sharded=sharded) as run:
            if resume:
                config = settled_before(config, run.path, workers)
            if resume and workers.rank == 0:
                check_unchanged(config, run.path)
            with workers.unless_stuck(machine.set_memory_policy()):
                assembly = Assembly(config, objective, machine, run, listeners, now, prepared, workers)
                loop = assembly.loop(resume, clock)
                with StopSignal(listeners.on_interrupt, workers).listening() as stop:
                    result = loop.go(stop)
            listeners.on_end(result)
            workers.finish()
            return result
    except MlxprefError as error:
        if workers.tell(str(error)):
            raise WorkerEnded(str(error)) from error
        if workers.rank > 0:
            raise type(error)(f"worker {workers.rank}: {error}") from error
        raise
    finally:
        listeners.close()


def absolute_paths(config: Config) -> Config:
    """The same configuration with every local path made absolute, so that a run can be resumed from any folder
    and no local name is ever taken for a hub id; a PEFT adapter is replaced by what it converts to."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path

    def adapter(path: str | None) -> str | None:
        return path and str(as_mlx_folder(absolute(path) or path, model=absolute(config.model.path)))

    data, source = config.data, config.data.source
    if isinstance(source, str):
        source = absolute(source) or source
    else:
        source = tuple(one.model_copy(update={"path": absolute(one.path)}) for one in source)
    changes = {
        "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
        "data": data.model_copy(update={"source": source, "valid": absolute(data.valid)}),
        "adapter": config.adapter.model_copy(update={"init_from": adapter(config.adapter.init_from)}),
        "reference": config.reference.model_copy(update={"previous": adapter(config.reference.previous)}),
    }
    return config.model_copy(update=changes)


def _reporters(config: Config, machine: ModuleType) -> list[TrainCallback]:
    """Listeners that were asked for by name; nothing is sent anywhere unless one is."""
    names = config.output.report_to
    found: list[TrainCallback] = [TensorBoard()] if "tensorboard" in names else []
    services = [name for name in names if name != "tensorboard"]
    if services:
        try:
            module = importlib.import_module(f"{machine.__name__}.callbacks")
        except ModuleNotFoundError as error:
            raise ConfigError(f"output.report_to {services[0]}: this backend has no such reports") from error
        found.append(module.Reporter(services, config.output.project, config.as_dict()))
    return found


def settled_before(config: Config, folder: Path, workers: Workers) -> Config:
    """With the number that the run began with in place of ``micro_batch_tokens: auto``; worker 0 has read it."""
    if config.batching.micro_batch_tokens != "auto":
        return config
    own = check_config(read_yaml(folder / CONFIG)).batching.budget if workers.rank == 0 else 0
    tokens = int(workers.share(str(own).encode()))
    return config.model_copy(update={"batching": config.batching.model_copy(update={"micro_batch_tokens": tokens})})


def check_unchanged(config: Config, folder: Path) -> None:
    """RunError listing every key that differs from the run's and would change its weights."""
    before, after = (flat(c.as_dict()) for c in (check_config(read_yaml(folder / CONFIG)), config))
    raise_all(
        [
            f"{key}: the run has {before.get(key)!r}, now {after.get(key)!r}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and key not in FREE_ON_RESUME
        ],
        RunError,
        f"{folder}: a resumed run goes on with its own configuration. Leave these as they were, or start "
        "a new run (adapter.init_from takes this one's adapter):",
    )
