"""wandb and swanlab: reports go there when a run asks for them by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from mlxpref.callbacks import RunStart, TrainCallback
from mlxpref.errors import UsageError

SERVICES = {"wandb": "dir", "swanlab": "logdir"}
"""What is known, and what each calls the folder it writes to."""


class Reporter(TrainCallback):
    """Hands reports to the services, all metrics under their own names."""

    def __init__(self, names: Sequence[str], project: str | None, config: Mapping[str, Any]) -> None:
        """Nothing is opened or sent before the run starts.

        Raises:
            UsageError: a service that is not known, or whose package is not installed.
        """
        for name in names:
            if name not in SERVICES:
                raise UsageError(f"report_to {name}: what is known are {', '.join(SERVICES)}")
            if importlib.util.find_spec(name) is None:
                raise UsageError(f"report_to {name}: it is not installed; pip install {name}")
        self._names, self._project, self._config = tuple(names), project, dict(config)
        self._runs: list[Any] = []

    def on_start(self, start: RunStart) -> None:
        project = self._project or start.folder.resolve().name
        for name in self._names:
            where = {SERVICES[name]: str(start.folder)}
            self._runs.append(importlib.import_module(name).init(project=project, config=self._config, **where))

    def on_report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, metrics)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        for run in self._runs:
            run.log(dict(metrics), step=step)
