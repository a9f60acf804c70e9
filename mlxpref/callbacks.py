"""What a run tells its listeners, and the listener that writes TensorBoard files.

Listeners see numbers and words, never weights or data, and nothing here leaves the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpref.errors import UsageError

if TYPE_CHECKING:
    from mlxpref.loop import TrainResult

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunStart:
    """What is known before the first step.

    Attributes:
        folder: the run folder.
        n_steps: of the whole run; ``done`` of them lie behind a resumed one.
        facts: what ``run.json`` holds.
        lines: the same in words, for people.
    """

    folder: Path
    n_steps: int
    done: int
    facts: Mapping[str, Any]
    lines: tuple[str, ...]


class TrainCallback:
    """Base of a listener; every method does nothing, override what is needed.

    An exception raised here ends the run as any other does.
    """

    def on_note(self, text: str) -> None:
        """Something a person may want to read, as it happens."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """How far a long stage outside the steps is: ``reference``, ``evaluation``."""

    def on_start(self, start: RunStart) -> None:
        """Everything is loaded; the first step comes next."""

    def on_step(self, step: int, metrics: Metrics) -> None:
        """A step (counted from 1) is done; evaluations have their ``eval_`` keys in it."""

    def on_report(self, step: int, metrics: Metrics) -> None:
        """Every ``steps_per_report`` steps: means over the steps since the last report."""

    def on_evaluation(self, step: int, metrics: Metrics) -> None:
        """An evaluation is done; keys begin with ``eval_``."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint lies whole in ``folder``."""

    def on_interrupt(self, signal: int) -> None:
        """A signal came; the step is finished first. Called from the signal handler: be brief."""

    def on_end(self, result: TrainResult) -> None:
        """The last step is done, or the run was asked to stop."""

    def close(self) -> None:
        """Called once, however the run ended."""


class Callbacks(TrainCallback):
    """Several listeners as one, called in order."""

    def __init__(self, listeners: Iterable[TrainCallback]) -> None:
        self.listeners = tuple(listeners)

    def _each(self, name: str, *args: Any) -> None:
        for listener in self.listeners:
            getattr(listener, name)(*args)

    def on_note(self, text: str) -> None:
        self._each("on_note", text)

    def on_progress(self, what: str, done: int, total: int) -> None:
        self._each("on_progress", what, done, total)

    def on_start(self, start: RunStart) -> None:
        self._each("on_start", start)

    def on_step(self, step: int, metrics: Metrics) -> None:
        self._each("on_step", step, metrics)

    def on_report(self, step: int, metrics: Metrics) -> None:
        self._each("on_report", step, metrics)

    def on_evaluation(self, step: int, metrics: Metrics) -> None:
        self._each("on_evaluation", step, metrics)

    def on_save(self, step: int, folder: Path) -> None:
        self._each("on_save", step, folder)

    def on_interrupt(self, signal: int) -> None:
        self._each("on_interrupt", signal)

    def on_end(self, result: TrainResult) -> None:
        self._each("on_end", result)

    def close(self) -> None:
        self._each("close")


class Means:
    """Means of metrics over the steps since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        for key, value in metrics.items():
            if value == value:  # a skipped step has no loss; it does not spoil the mean
                self._sums[key] = self._sums.get(key, 0.0) + value
                self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> dict[str, float]:
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


class TensorBoard(TrainCallback):
    """Writes TensorBoard event files into ``tensorboard/`` of the run folder, without TensorFlow."""

    def __init__(self) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UsageError(
                "report_to tensorboard: it is not installed; pip install 'mlxpref[tensorboard]'"
            ) from error
        self._event, self._summary, self._writer_kind = event_pb2.Event, summary_pb2.Summary, EventFileWriter
        self._writer: Any = None

    def on_start(self, start: RunStart) -> None:
        self._writer = self._writer_kind(str(start.folder / "tensorboard"))

    def on_report(self, step: int, metrics: Metrics) -> None:
        self._write(step, "train", metrics)

    def on_evaluation(self, step: int, metrics: Metrics) -> None:
        self._write(step, "eval", {key.removeprefix("eval_"): value for key, value in metrics.items()})

    def _write(self, step: int, prefix: str, metrics: Metrics) -> None:
        values = [
            self._summary.Value(tag=f"{prefix}/{key}", simple_value=value) for key, value in metrics.items()
        ]
        self._writer.add_event(self._event(step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
