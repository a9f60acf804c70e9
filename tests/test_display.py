"""What a run looks like: every figure asked for, on a terminal and without one."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
from rich.console import Console

from mlxpref.callbacks import RunStart
from mlxpref.cli import console
from mlxpref.cli.display import TrainDisplay, duration, figures
from mlxpref.loop import TrainResult

METRICS = {
    "loss": 0.69314,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.0125,
    "learning_rate": 1e-5,
    "tokens_per_second": 1234.5,
    "peak_memory_gb": 2.5,
}
START = RunStart(Path("run"), 10, 2, {}, ("warning: look here", "plan: 10 steps"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_figures_and_durations() -> None:
    shown = "loss 0.6931  acc 0.50  margin 0.0125  lr 1.00e-05  tok/s 1234  GB 2.50"
    assert figures(METRICS) == shown
    assert figures({"loss": 1.0}) == "loss 1.0000"
    assert (duration(9), duration(309.4), duration(7509)) == ("0:09", "5:09", "2:05:09")


def test_time_left_is_at_the_pace_of_this_starts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Divided by all steps a resumed run would promise too early an end, and with the reference pass too late a one."""
    clock = Clock()
    display = TrainDisplay(live=False, clock=clock)
    display.on_start(START)
    clock.now = 500.0  # the reference pass
    display.on_step(3, METRICS)
    display.on_report(3, METRICS)
    clock.now = 520.0
    display.on_step(5, METRICS)
    display.on_report(5, METRICS)
    out, err = capsys.readouterr()
    assert "step 3/10" in out and "left ?" in out
    assert "step 5/10" in out and "left 0:50" in out
    assert "warning: look here" in err and "plan: 10 steps" in out


def test_a_terminal_gets_a_moving_line_and_keeps_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=160, markup=False, highlight=False)
    monkeypatch.setattr(console, "console", lambda **_: terminal)
    display = TrainDisplay(live=True)
    display.on_start(START)
    display.on_progress("evaluation", 1, 2)
    display.on_step(3, METRICS)
    display.on_report(3, METRICS)
    display.close()
    assert "loss 0.6931" in stream.getvalue() and "step 3/10" in stream.getvalue()


def test_the_end_says_how_to_go_on_or_where_the_adapter_is(capsys: pytest.CaptureFixture[str]) -> None:
    display = TrainDisplay(live=False)
    display.on_end(TrainResult(Path("my run"), 4, 10, interrupted=signal.SIGINT))
    assert "mlxpref train --adapter-path 'my run' --resume" in capsys.readouterr().out
    best = TrainResult(Path("run"), 10, 10, metric="eval_loss", best_step=5, best_value=0.25, skipped=1)
    display.on_end(best)
    out, err = capsys.readouterr()
    assert "best eval_loss 0.25 at step 5: run/best" in out and "adapter in run" in out
    assert "1 step was not finite" in err
