"""wandb and swanlab, through mlx-lm's own callbacks: what users of mlx-lm see there, they see here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tuner import callbacks as of_mlx_lm

from mlxpref.callbacks import RunStart, TrainCallback
from mlxpref.errors import UsageError


class Reporter(TrainCallback):
    """Hands reports to mlx-lm's callbacks, under its keys where it has one and ours besides."""

    def __init__(self, names: Sequence[str], project: str | None, config: Mapping[str, Any]) -> None:
        """Nothing is opened or sent before the run starts.

        Raises:
            UsageError: a service mlx-lm does not have, or whose package is not installed.
        """
        for name in names:
            if name not in of_mlx_lm.SUPPORT_CALLBACK:
                known = ", ".join(of_mlx_lm.SUPPORT_CALLBACK)
                raise UsageError(f"report_to {name}: mlx-lm reports to {known}")
            if getattr(of_mlx_lm, name) is None:
                raise UsageError(f"report_to {name}: it is not installed; pip install {name}")
        self._names, self._project, self._config = tuple(names), project, dict(config)
        self._target: Any = None

    def on_start(self, start: RunStart) -> None:
        self._target = of_mlx_lm.get_reporting_callbacks(
            ",".join(self._names),
            project_name=self._project or start.folder.resolve().name,
            log_dir=str(start.folder),
            config=self._config,
        )

    def on_report(self, step: int, metrics: Mapping[str, float]) -> None:
        known = {
            "train_loss": metrics.get("loss"),
            "peak_memory": metrics.get("peak_memory_gb"),
            "trained_tokens": metrics.get("trained_tokens"),
        }
        found = {key: value for key, value in known.items() if value is not None}
        self._target.on_train_loss_report({"iteration": step, **metrics, **found})

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._target.on_val_loss_report({"iteration": step, "val_loss": metrics.get("eval_loss"), **metrics})
