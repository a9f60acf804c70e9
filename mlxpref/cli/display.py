"""How a run looks while it goes: a live line of figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpref.callbacks import RunStart, TrainCallback
from mlxpref.cli import console
from mlxpref.data.words import counted

if TYPE_CHECKING:
    from rich.progress import Progress

    from mlxpref.loop import TrainResult

FIGURES = (
    ("loss", "loss", ".4f"),
    ("acc", "rewards/accuracies", ".2f"),
    ("margin", "rewards/margins", ".4f"),
    ("lr", "learning_rate", ".2e"),
    ("tok/s", "tokens_per_second", ".0f"),
    ("GB", "peak_memory_gb", ".2f"),
)
"""(label, metric, format) of what a report line shows."""

EVAL_FIGURES = (
    ("loss", "eval_loss", ".4f"),
    ("acc", "eval_rewards/accuracies", ".2f"),
    ("margin", "eval_rewards/margins", ".4f"),
    ("chosen half acc", "eval_chosen_half/rewards/accuracies", ".2f"),
    ("rejected half acc", "eval_rejected_half/rewards/accuracies", ".2f"),
)

LIVE_FIGURES = tuple(figure for figure in FIGURES if figure[0] != "lr")
"""What fits beside a bar in 80 columns."""


def figures(metrics: Mapping[str, Any], shown: tuple[tuple[str, str, str], ...] = FIGURES) -> str:
    """``loss 0.6931  acc 0.50  …``, of those that are there."""
    return "  ".join(f"{label} {metrics[key]:{form}}" for label, key, form in shown if key in metrics)


def duration(seconds: float) -> str:
    """``2:05:09``, ``5:09``: hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainDisplay(TrainCallback):
    """Prints a run's beginning, reports, evaluations, checkpoints and end.

    Args:
        live: draw a moving line; by default when standard output is a terminal.
        clock: seconds, for the time left.
    """

    def __init__(self, *, live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._live = console.is_terminal() if live is None else live
        self._clock = clock
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage: tuple[str, int] | None = None
        self._n_steps = 0
        self._first: tuple[int, float] | None = None

    # --- before the steps ---

    def on_note(self, text: str) -> None:
        if text.startswith("warning: "):
            console.warn(text.removeprefix("warning: "))
        else:
            console.note(text)

    def on_progress(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{what} {done}/{total}")
        elif what == "reference":
            self._plain_progress(what, done, total)

    def _plain_progress(self, what: str, done: int, total: int) -> None:
        """A line for each tenth, so that a log stays short."""
        tenth = 10 * done // max(1, total)
        if (what, tenth) != self._stage:
            self._stage = (what, tenth)
            console.note(f"{what}: {done}/{total}")

    def on_start(self, start: RunStart) -> None:
        self._say_device(start.facts)
        for line in start.lines:
            if line.startswith("warning: "):
                console.warn(line.removeprefix("warning: "))
            else:
                console.say(line)
        console.say(f"run folder: {start.folder}")
        self._n_steps = start.n_steps
        if self._live:
            self._open_bar(start)

    @staticmethod
    def _say_device(facts: Mapping[str, Any]) -> None:
        """Where it runs, and what makes it slower than it need be."""
        device = (facts.get("starts") or [{}])[-1].get("device", {})
        if device:
            named = f" ({device['device_name']})" if "device_name" in device else ""
            fast = f", BLAS {device['blas']}" if "blas" in device else ""
            console.say(f"device: {device.get('kind')}{named}{fast}")
        for remark in device.get("remarks", ()):
            console.warn(remark)

    def _open_bar(self, start: RunStart) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console.console(),
            transient=True,
        )
        self._task = self._bar.add_task("train", total=start.n_steps, completed=start.done, figures="")
        self._bar.start()

    # --- as it goes ---

    def _left(self, step: int) -> str:
        """Time left at the pace since this start's first step was done; unknown before its second."""
        if self._first is None or step == self._first[0]:
            return "?"
        first, began = self._first
        return duration((self._clock() - began) / (step - first) * (self._n_steps - step))

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._first is None:  # what came before, the reference pass and the first compilation, does not recur
            self._first = step, self._clock()
        if self._bar is not None:
            shown = f"left {self._left(step)}  {figures(metrics, LIVE_FIGURES)}"
            self._bar.update(self._task, description="train", completed=step, figures=shown)

    def on_report(self, step: int, metrics: Mapping[str, float]) -> None:
        skipped = metrics.get("skipped_steps", 0)
        tail = f"  skipped {skipped:.0f}" if skipped else ""
        self._line(f"step {step}/{self._n_steps}  {figures(metrics)}  left {self._left(step)}{tail}")

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._line(f"step {step}/{self._n_steps}  evaluation: {figures(metrics, EVAL_FIGURES)}")

    def on_save(self, step: int, folder: Path) -> None:
        self._line(f"step {step}/{self._n_steps}  saved {folder}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, soft_wrap=True)
        else:
            console.say(text)
            sys.stdout.flush()

    def on_interrupt(self, signal_number: int) -> None:
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        text = f"\n{name}: finishing this step, then saving (Ctrl-C again stops at once and saves nothing)\n"
        os.write(2, text.encode())  # a handler may run inside another write: no buffers here

    # --- the end ---

    def on_end(self, result: TrainResult) -> None:
        self.close()
        if result.stopped:
            console.say(f"stopped early at step {result.step}: {result.stopped}")
        if result.skipped:
            what = "step was" if result.skipped == 1 else "steps were"
            console.warn(f"{result.skipped} {what} not finite and changed nothing")
        if result.best_step is not None:
            console.say(
                f"best {result.metric} {result.best_value:.4g} at step {result.best_step}: "
                f"{result.folder / 'best'}"
            )
        if result.interrupted is None:
            console.say(f"done: {counted(result.step, 'step')}; adapter in {result.folder}")
        else:
            console.say(f"stopped after step {result.step} of {result.n_steps}, all saved; go on with")
            console.say(f"  mlxpref train --adapter-path {shlex.quote(str(result.folder))} --resume")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
