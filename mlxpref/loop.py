"""The steps of a run, one after another.

The plan says which rows every step takes, so the position in the data is the number of steps done;
together with the step's own state (weights, optimiser, random state) and the few numbers of
:class:`Progress`, that is all a resumed run needs to go on as if it had never stopped.
"""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

from mlxpref.callbacks import Means, TrainCallback
from mlxpref.config import BEST_METRICS
from mlxpref.data.words import counted
from mlxpref.errors import RunError
from mlxpref.records import Batch, StepReport
from mlxpref.runs import RunFolder
from mlxpref.schedules import Schedule
from mlxpref.workers import WorkerLost, Workers

MAX_SKIPPED_IN_ROW = 3
"""So many steps in a row without a finite gradient, and a run stops."""


@dataclass(slots=True)
class Progress:
    """What the loop remembers from step to step; a checkpoint keeps all of it.

    Attributes:
        step: steps done.
        skipped, skipped_in_row: steps that were not finite and changed nothing, ever and lately.
        best_step, best_value: of the best evaluation so far, by the chosen metric.
        stale: evaluations since then.
        trained_tokens: so far.
        stopped: why the run ended before its last step, if it did.
        pending: metrics of the last step when its evaluation was interrupted and is still to be made.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    trained_tokens: int = 0
    stopped: str | None = None
    pending: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Progress:
        return cls(**{f.name: state[f.name] for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step, n_steps: steps done, of so many.
        interrupted: the signal that stopped it, or None.
        stopped: why it ended early by itself (early stopping), or None.
        skipped: steps that were not finite.
        best_step, best_value: of the best evaluation by ``metric``; None without one.
        metrics: of the last step.
        checkpoint: the last one.
    """

    folder: Path
    step: int
    n_steps: int
    interrupted: int | None = None
    stopped: str | None = None
    skipped: int = 0
    metric: str | None = None
    best_step: int | None = None
    best_value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None


class StopSignal:
    """Remembers the first Ctrl-C or SIGTERM; a second Ctrl-C raises KeyboardInterrupt at once.

    It is true once it holds: of several workers, when all have agreed to stop after the same step.

    Attributes:
        received: the last signal that came to this process.
        workers: who have to agree.
    """

    def __init__(self, on_signal: Callable[[int], None] | None = None, workers: Workers | None = None) -> None:
        self.received: int | None = None
        self._on_signal = on_signal
        self.workers = Workers() if workers is None else workers

    def __bool__(self) -> bool:
        return self.workers.stopping

    @property
    def reason(self) -> int | None:
        """The signal that stopped the run; SIGINT where it came to another worker."""
        return self.received or (signal.SIGINT if self else None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        self.workers.wants_stop = True
        if self._on_signal is not None:
            self._on_signal(number)

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Take over both signals until the end of the block (only the main thread can).

        Of several workers also SIGHUP, which a remote one gets when the launcher's connection ends.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if self.workers.size > 1 else [])]
        held = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in held.items():
                signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """When to do what, in steps; 0 is never for ``steps_per_eval``.

    ``sharded``: every worker holds a slice of the weights, so that without one of them there are no weights to save.
    """

    save_every: int
    steps_per_report: int
    steps_per_eval: int
    keep_last: int | None
    best_metric: str | None
    early_stopping: int | None
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What the loop calls, so that it knows neither models nor data.

    Attributes:
        update: (step index, learning rate) → report of one update.
        evaluate: yields the metrics of one evaluation at its end, None before, so that it can be left.
        save: writes adapter and step state into a folder.
        save_adapter: writes the adapter alone.
        metrics: report → metrics by name.
        tokens: of a batch: its prompts once and its responses, without padding.
        memory: GB by name.
    """

    batch: Callable[[int], Batch]
    update: Callable[[Batch, float], StepReport]
    evaluate: Callable[[], Iterator[Mapping[str, float] | None]]
    save: Callable[[Path, int], None]
    save_adapter: Callable[[Path, int], None]
    metrics: Callable[[Batch, StepReport], Mapping[str, float]]
    tokens: Callable[[Batch], int]
    memory: Callable[[], Mapping[str, float]]


@dataclass(slots=True)
class Loop:
    """The steps from ``progress.step`` to the end of the plan."""

    work: Work
    run: RunFolder
    schedule: Schedule
    epochs: Sequence[float]
    settings: LoopSettings
    callbacks: TrainCallback
    progress: Progress
    clock: Callable[[], float] = time.perf_counter
    means: Means = field(default_factory=Means)
    metrics: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None

    @property
    def n_steps(self) -> int:
        return len(self.epochs)

    def go(self, stop: StopSignal) -> TrainResult:
        """Make every step left, or those until a signal.

        Raises:
            RunError: the disk refuses, or steps are not finite ``MAX_SKIPPED_IN_ROW`` times in a row.
            WorkerLost: another worker has gone; what all had done together is saved.
        """
        try:
            with stop.workers.watching():
                return self._go(stop)
        except WorkerLost as lost:
            first = stop.workers.rank == 0
            said = self._rescued() if first else "Go on from worker 0's last checkpoint with --resume"
            raise WorkerLost(f"{lost}. {said}") from lost

    def _go(self, stop: StopSignal) -> TrainResult:
        progress = self.progress
        if progress.pending is not None:
            self.metrics, progress.pending = dict(progress.pending), None
            self._after_update(stop)
        while progress.step < self.n_steps and progress.stopped is None and not stop:
            self._update()
            self._after_update(stop)
        finished = progress.step == self.n_steps and progress.pending is None
        return self._result(None if finished or progress.stopped else stop.reason)

    def _update(self) -> None:
        progress, started = self.progress, self.clock()
        rate = self.schedule(progress.step)
        batch = self.work.batch(progress.step)
        report = self.work.update(batch, rate)
        seconds, n_tokens = self.clock() - started, self.work.tokens(batch)
        progress.step += 1
        progress.skipped += report.skipped
        progress.skipped_in_row = progress.skipped_in_row + 1 if report.skipped else 0
        progress.trained_tokens += n_tokens
        self.metrics = {
            "step": progress.step,
            "epoch": round(self.epochs[progress.step - 1], 6),
            **self.work.metrics(batch, report),
            "learning_rate": rate,
            "grad_norm": report.grad_norm,
            "skipped_steps": progress.skipped,
            "trained_tokens": progress.trained_tokens,
            "tokens_per_second": n_tokens / max(seconds, 1e-9),
            "step_seconds": seconds,
            **{f"{name}_memory_gb": value for name, value in self.work.memory().items()},
        }

    def _after_update(self, stop: StopSignal) -> None:
        """Evaluate if it is time, write the step down, save if it is time."""
        if self._evaluation_due() and not self._evaluated(stop):
            self._save()
            return
        step, failed = self.progress.step, self.progress.skipped_in_row >= MAX_SKIPPED_IN_ROW
        self.run.log(self.metrics)
        self.callbacks.on_step(step, self.metrics)
        self.means.add({key: value for key, value in self.metrics.items() if not key.startswith("eval_")})
        last = step == self.n_steps or self.progress.stopped is not None
        if step % self.settings.steps_per_report == 0 or last or failed:
            self.callbacks.on_report(step, self.means.take())
        if step % self.settings.save_every == 0 or last or stop or failed:
            self._save()
        if failed:
            raise RunError(self._not_finite())

    def _evaluation_due(self) -> bool:
        every, step = self.settings.steps_per_eval, self.progress.step
        return every > 0 and (step % every == 0 or step == self.n_steps)

    def _evaluated(self, stop: StopSignal) -> bool:
        """False if the evaluation is left to the resumed run: a signal came, or (raised) a worker has gone."""
        self.progress.pending = self.metrics
        if not self._evaluate(stop):
            return False
        self.progress.pending = None
        return True

    def _evaluate(self, stop: StopSignal) -> bool:
        """Add an evaluation to the step's metrics; False if a signal came before its end."""
        found: Mapping[str, float] | None = None
        for found in self.work.evaluate():
            if stop and found is None:
                return False
        assert found is not None
        self.metrics.update({f"eval_{key}": value for key, value in found.items()})
        self.callbacks.on_evaluation(self.progress.step, {f"eval_{k}": v for k, v in found.items()})
        self._compare()
        return True

    def _compare(self) -> None:
        """Keep the best evaluation's adapter; stop when too many since were no better."""
        name, progress = self.settings.best_metric, self.progress
        if name is None:
            return
        if name not in self.metrics:
            known = ", ".join(key for key in self.metrics if key in BEST_METRICS)
            raise RunError(f"training.best_metric {name}: this objective and data give {known}")
        value = float(self.metrics[name])
        sign = BEST_METRICS[name]
        if value == value and (progress.best_value is None or sign * value > sign * progress.best_value):
            progress.best_step, progress.best_value, progress.stale = progress.step, value, 0
            step = progress.step
            facts = {"step": step, "metric": name, "value": value}
            self.run.save_best(lambda folder: self.work.save_adapter(folder, step), facts)
            return
        progress.stale += 1
        limit = self.settings.early_stopping
        if limit is not None and progress.stale >= limit and progress.step < self.n_steps:
            progress.stopped = (
                f"{name} has not improved in {counted(progress.stale, 'evaluation')} since step {progress.best_step}"
            )

    def _save(self) -> None:
        step = self.progress.step
        self.checkpoint = self.run.save(
            step,
            lambda folder: self.work.save(folder, step),
            asdict(self.progress),
            keep_last=self.settings.keep_last,
        )
        self.callbacks.on_save(step, self.checkpoint)

    def _rescued(self) -> str:
        """Save the last whole step, and say how to go on."""
        step = self.progress.step
        if not step or (self.settings.sharded and self.checkpoint is None):
            folder = shlex.quote(str(self.run.path))
            return f"Nothing was saved yet:  mlxpref train --adapter-path {folder} --resume  begins anew"
        if self.settings.sharded:
            return (
                f"Its slice of the weights is gone with it: go on from {self.checkpoint} with  mlxpref train "
                f"--adapter-path {shlex.quote(str(self.run.path))} --resume"
            )
        self._save()
        return (
            f"Step {step} of {self.n_steps} was the last that all did, and it is saved: go on with  mlxpref train "
            f"--adapter-path {shlex.quote(str(self.run.path))} --resume  with any number of workers, one included"
        )

    def _not_finite(self) -> str:
        last, n = self.progress.step, self.progress.skipped_in_row
        return (
            f"{self.run.path}: the gradients of {n} steps in a row ({last - n + 1} to {last}) were not "
            "finite. Nothing was changed by them, and the adapter before them is saved. Start a new run with "
            f"a lower optimizer.learning_rate (it was {self.schedule(last - 1):g}), a warm-up, or "
            "model.dtype: float32; mlxpref inspect shows whether a row of the data is odd"
        )

    def _result(self, interrupted: int | None) -> TrainResult:
        progress = self.progress
        return TrainResult(
            folder=self.run.path,
            step=progress.step,
            n_steps=self.n_steps,
            interrupted=interrupted,
            stopped=progress.stopped,
            skipped=progress.skipped,
            metric=self.settings.best_metric,
            best_step=progress.best_step,
            best_value=progress.best_value,
            metrics=self.metrics,
            checkpoint=self.checkpoint,
        )
