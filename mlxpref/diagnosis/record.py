"""What a run left behind: its configuration, its facts, its metrics, and what was measured of it afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxpref.config import Config
from mlxpref.config_layers import check_config, read_yaml
from mlxpref.errors import DataError, RunError
from mlxpref.objectives import Objective, resolve_objective
from mlxpref.runs import CONFIG, FACTS, METRICS

EVALUATION, CONTROL = "evaluation.json", "control.json"
"""Names under which a run folder may hold what ``evaluate --json`` and ``control --json`` write."""

SETTLED = 0.25
"""Share of the steps, the last ones, whose mean stands for the end of a run."""


class Series(NamedTuple):
    """One figure over the steps that have it: (N,) steps, counted from 1, and (N,) finite values; N ≥ 1."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def end(self) -> float:
        """Mean over the last quarter of the values."""
        return float(self.values[-max(1, round(SETTLED * len(self.values))) :].mean())


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it lies on disk, finished or not.

    Attributes:
        folder: the run folder.
        config: as it was resolved; ``objective`` of it.
        facts: what ``run.json`` holds.
        series: by the metric's name.
        evaluation, control: JSON of ``mlxpref evaluate`` and ``mlxpref control``; None where nobody asked for it.
    """

    folder: Path
    config: Config
    objective: Objective
    facts: Mapping[str, Any]
    series: Mapping[str, Series]
    evaluation: Mapping[str, Any] | None = None
    control: Mapping[str, Any] | None = None

    @property
    def n_steps(self) -> int:
        """Of the whole run."""
        return int(self.facts["plan"]["steps"])

    @property
    def step(self) -> int:
        """Steps done."""
        loss = self.series.get("step")
        return 0 if loss is None else int(loss.values[-1])

    def end(self, name: str) -> float | None:
        """A metric at the end: of the last evaluation where there was one, else the last steps' mean."""
        evaluated = self.series.get(f"eval_{name}")
        return float(evaluated.values[-1]) if evaluated is not None else self.trained(name)

    def trained(self, name: str) -> float | None:
        """A metric of the training batches, the mean over the last steps."""
        found = self.series.get(name)
        return None if found is None else found.end

    def first(self, name: str) -> float | None:
        """A metric of the first step's batch, which is taken before the first update."""
        found = self.series.get(name)
        return float(found.values[0]) if found is not None and found.steps[0] == 1 else None


def read_record(folder: Path) -> RunRecord:
    """What lies in a run folder, evaluation and control curve among it.

    Raises:
        RunError: no run is there, or nothing was trained in it yet.
        DataError: a file is not what it should be.
    """
    lacking = [name for name in (CONFIG, FACTS) if not (folder / name).is_file()]
    if lacking:
        raise RunError(f"{folder}: no {' and no '.join(lacking)}; is this the folder of a run?")
    config = check_config(read_yaml(folder / CONFIG), where=str(folder / CONFIG))
    series = read_series(folder / METRICS)
    if not series:
        raise RunError(f"{folder}: no step was made here yet ({METRICS} is empty)")
    return RunRecord(
        folder,
        config,
        resolve_objective(config.objective),
        _facts(folder / FACTS),
        series,
        _found(folder / EVALUATION, ("views",), "evaluate"),
        _found(folder / CONTROL, ("per_goal", "recipe", "spearman", "samples"), "control"),
    )


def _facts(file: Path) -> dict[str, Any]:
    found = read_object(file)
    lacking = [key for key in ("starts", "data", "model", "plan") if not found.get(key)]
    if lacking:
        raise RunError(f"{file}: no {', '.join(lacking)}; this is not what a run of mlxpref writes")
    return found


def read_series(file: Path) -> dict[str, Series]:
    """Every metric of a run's steps. A last line that is not whole is the step being written."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    for place, line in enumerate(lines):
        if not line:
            continue
        try:
            metrics = json.loads(line)
            step = int(metrics["step"])
        except (ValueError, KeyError, TypeError) as error:
            if place == len(lines) - 1:
                break
            raise DataError(f"{file}, line {place + 1}: no step's metrics ({error})") from error
        for name, value in metrics.items():
            if isinstance(value, int | float):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def _found(file: Path, keys: Sequence[str], command: str) -> Mapping[str, Any] | None:
    if not file.is_file():
        return None
    found = read_object(file)
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise DataError(f"{file}: this is not what mlxpref {command} --json writes now (no {', '.join(lacking)})")
    return found


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file with one object. DataError if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected an object, not {type(found).__name__}")
    return found
