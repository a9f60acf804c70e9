"""``mlxpref plan``: what a run will take, before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from mlxpref import backends
from mlxpref.assembly import Assembly
from mlxpref.callbacks import TrainCallback
from mlxpref.cli import console
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.errors import UsageError
from mlxpref.objectives import resolve_objective
from mlxpref.planning.machine import parse_size
from mlxpref.planning.report import Report, make_report
from mlxpref.runs import RunFolder
from mlxpref.train import absolute_paths

EPILOG = """\b
Example:
  mlxpref plan -c configs/qwen3-0.6b-ultrafeedback.yaml
  mlxpref plan -c config.yaml --memory 16GB --no-measure
  mlxpref plan -c config.yaml --set batching.micro_batch_tokens=auto --tokens-per-second 1500 --json
"""


@click.command(epilog=EPILOG)
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), required=True, help="YAML file of the run.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Set any key of it.")
@click.option("--model", metavar="FOLDER|ID", help="Model folder or hub id.")
@click.option("--data", metavar="PATH|ID", help="File, folder or hub id of preferences.")
@click.option("--backend", metavar="NAME", help="What will compute: auto, mlx or torch.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Plan for a machine with so much, such as 16GB, with a GPU that shares it.  [default: this machine]",
)
@click.option(
    "--measure/--no-measure",
    default=None,
    help="Load the model and time a few micro-batches.  [default: measure, unless --memory or "
    "--tokens-per-second says that the run will be elsewhere]",
)
@click.option(
    "--tokens-per-second", type=click.FloatRange(min=0, min_open=True), metavar="X",
    help="Training speed to reckon with, as a run's reports give it.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    file: Path,
    settings: tuple[str, ...],
    model: str | None,
    data: str | None,
    backend: str | None,
    memory: str | None,
    measure: bool | None,
    tokens_per_second: float | None,
    as_json: bool,
) -> None:
    """Say what a run will take before anything runs: steps, shapes, memory by part, whether it fits, time.

    Where it does not fit, what to change so that it does comes with the peak predicted then. The exit code is 1 if
    the run does not fit.
    """
    if measure and tokens_per_second is not None:
        raise UsageError("--measure and --tokens-per-second both say how fast it is: keep one")
    if measure and memory is not None:
        raise UsageError("--measure times this machine, and --memory is of another: keep one")
    given = {"model.path": model, "data.source": data, "model.backend": backend}
    overrides = [(key, value) for key, value in given.items() if value is not None]
    config = load_config(file, [*overrides, *map(parse_setting, settings)])
    elsewhere = memory is not None or tokens_per_second is not None
    measured = not elsewhere if measure is None else measure
    machine, objective = backends.get(config.model.backend), resolve_objective(config.objective)
    config = absolute_paths(config)
    assembly = Assembly(config, objective, machine, RunFolder(Path()), TrainCallback(), lambda: datetime.now(UTC))
    rows = assembly.rows()
    progress = console.Stages()
    try:
        report = make_report(
            config,
            objective,
            rows,
            machine,
            memory=None if memory is None else parse_size(memory),
            load=assembly.policy_and_step if measured else None,
            tokens_per_second=tokens_per_second,
            on_progress=progress,
        )
    finally:
        progress.close()
    if as_json:
        console.say(json.dumps(report.as_dict(), indent=2))
    else:
        _show(report)
    if not report.fits:
        raise SystemExit(1)


def _show(report: Report) -> None:
    for line in report.lines():
        console.say(line)
    console.say()
    facts = report.as_dict()
    rows = [(name, gigabytes(size), _share(size, facts["memory"]["total"])) for name, size in _parts(facts)]
    console.table(("memory", "GB", "share"), rows, title=f"peak, in the {facts['memory']['phase']}")
    console.say()
    for line in report.verdict():
        console.say(line)
    if facts["time"] is not None:
        console.say()
        console.table(
            ("time", "expected"),
            [(name.replace("_", " "), duration(value)) for name, value in facts["time"]["seconds"].items()],
            title=facts["time"]["how"],
        )


def _parts(facts: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    yield from facts["memory"]["device"].items()
    yield from ((f"{name} (outside the device's count)", size) for name, size in facts["memory"]["host"].items())
    yield "sum", facts["memory"]["total"]


def gigabytes(size: int) -> str:
    """Bytes as GB, three digits that count."""
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.3f}"


def _share(size: int, total: int) -> str:
    return f"{size / total:.0%}"


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``12 min 30 s``, ``8.4 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
