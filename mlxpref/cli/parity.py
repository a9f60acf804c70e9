"""``mlxpref parity``: do two backends compute the same, here or on two machines?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np

from mlxpref import backends
from mlxpref.adapters import check_free
from mlxpref.cli import console
from mlxpref.cli.sources import Reading, source_options
from mlxpref.config import OPTIMIZER_OPTIONS
from mlxpref.data.relabelled import is_relabelled
from mlxpref.data.words import counted
from mlxpref.errors import UsageError
from mlxpref.files import write_text
from mlxpref.parity import Row, Settings, Tolerances, compare_traces
from mlxpref.parity.cases import (
    MAX_LENGTH,
    OBJECTIVES,
    Case,
    Model,
    built_in_models,
    prepare_case,
    run_cases,
    with_fitting_scale,
)
from mlxpref.parity.files import machine_facts, placed, read_export, write_export
from mlxpref.parity.models import BUILT_IN

EPILOG = f"""\b
Example:
  mlxpref parity
  mlxpref parity ./my-model --data pairs.jsonl --limit 8 --objective dpo --objective kto --steps 20
  mlxpref parity --backends mlx --export from-the-mac
  mlxpref parity --backends torch --against from-the-mac --json figures.json

\b
Without MODEL: tiny random models ({", ".join(BUILT_IN)})
and the sandbox's own. Without --data: the sandbox's held-out pairs, or its lists for objectives that read
lists. With --against, models, rows and settings are the export's; MODEL says where a model is on this machine.
"""

Pair = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


@click.command(epilog=EPILOG)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--data", metavar="PATH", help="Preference data: a file, folder, hub id, or relabelled data.")
@source_options(split="train")
@click.option("--relabel/--no-relabel", default=True, show_default=True, help="Write scores into prompts as goals.")
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="NAME",
    help="Objective with its default options; may be given several times.  [default: one of each kind]",
)
@click.option("--backends", "names", metavar="ONE,OTHER", help="Who computes.  [default: mlx,torch; one alone: auto]")
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Updates of the trajectory.  [default: 50]")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Rows of an update.  [default: 4]")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Of the first update.  [default: 1e-4]",
)
@click.option(
    "--schedule", type=click.Choice(["constant", "linear", "cosine"]), help="How the rate falls.  [default: cosine]"
)
@click.option(
    "--optimizer", type=click.Choice(list(OPTIMIZER_OPTIONS)), help="With its default options.  [default: adamw]"
)
@click.option("--fine-tune-type", type=click.Choice(["lora", "dora"]), help="Of the adapter.  [default: lora]")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Of adapter and order.  [default: 0]")
@click.option("--max-length", type=click.IntRange(8), metavar="N", help=f"Tokens of a row.  [default: {MAX_LENGTH}]")
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="NAME=X",
    help=f"Instead of the default, of: {', '.join(one.name for one in fields(Tolerances))}.",
)
@click.option("--export", type=click.Path(path_type=Path), metavar="FOLDER", help="Write one backend's results here.")
@click.option("--against", type=click.Path(path_type=Path), metavar="FOLDER", help="Compare with an export.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def command(
    models: tuple[str, ...], data: str | None, reading: Reading, relabel: bool, names: str | None,
    export: Path | None, against: Path | None, json_file: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Compare two backends: the same weights, rows and order, in float32.

    Log-probs of every token, losses, gradients of every adapter tensor, one update, and a trajectory of training,
    each with its largest and mean difference. The exit code is 1 if any is beyond its tolerance.
    """
    tolerances = _tolerances(options.pop("tolerances"))
    if export is not None and (json_file is not None or tolerances != Tolerances()):
        raise UsageError("--json and --tolerance are for a comparison; --export writes figures of its own")
    _check_use(data, reading, relabel, export, against, options)
    chosen = _backends(names, alone=export is not None or against is not None)
    with tempfile.TemporaryDirectory(prefix="mlxpref-parity-") as folder:
        if against is not None:
            found = _against(chosen[0], against, [_model(path) for path in models], Path(folder))
        else:
            cases = _cases(models, data, reading, relabel, options, Path(folder))
            if export is not None:
                return _export(chosen[0], cases, export)
            found = _between(chosen, cases)
        _judge(found, tolerances, json_file)


# --- what was asked for ---


def _tolerances(given: Sequence[str]) -> Tolerances:
    known = {one.name for one in fields(Tolerances)}
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = -1.0
        if name not in known or not 0 < values[name] < float("inf"):
            raise UsageError(f"--tolerance {text}: write NAME=X, X above 0, NAME one of {', '.join(sorted(known))}")
    return Tolerances(**values)


def _check_use(
    data: str | None, reading: Reading, relabel: bool, export: Path | None, against: Path | None,
    options: Mapping[str, Any],
) -> None:  # fmt: skip
    """UsageError for options that would do nothing."""
    if export is not None and against is not None:
        raise UsageError("--export writes what --against reads: give one of them")
    if export is not None:
        check_free(export)
    if against is not None:
        said = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, ())]
        said += ["--data"] * (data is not None) + ["--no-relabel"] * (not relabel)
        if said or reading != Reading():
            idle = ", ".join(said) or "what says how data are read"
            raise UsageError(f"--against takes rows and settings from the export: leave out {idle}")
    if data is None and reading != Reading():
        raise UsageError("options that say how data are read need --data")


def _backends(names: str | None, *, alone: bool) -> list[ModuleType]:
    given = (names or ("auto" if alone else "mlx,torch")).split(",")
    wanted = 1 if alone else 2
    if len(given) != wanted:
        raise UsageError(f"--backends {names}: {'one' if alone else 'two, with a comma between them,'} needed here")
    return [backends.get(name.strip()) for name in given]


def _cases(
    models: Sequence[str], data: str | None, reading: Reading, relabel: bool, options: dict[str, Any], folder: Path
) -> list[Case]:
    names, max_length = options.pop("objectives"), options.pop("max_length")
    given = {name: value for name, value in options.items() if value is not None}
    more: dict[str, Any] = {"weight_decay": 0.0} if given.get("optimizer") == "adam" else {}  # it has none
    settings = Settings(**given, **more)
    section = _section(data, reading, max_length or MAX_LENGTH)
    relabelled = relabel and not (data is not None and is_relabelled(data))
    wanted = [_model(path) for path in models] or built_in_models(folder)
    return [
        prepare_case(model, replace(settings, objective=objective), section, relabelled=relabelled)
        for model in wanted
        for objective in names or OBJECTIVES
    ]


def _model(path: str) -> Model:
    """A folder by its absolute path, so that an export names it for any working directory; or a hub id."""
    folder = Path(path).expanduser()
    return Model(path, str(folder.resolve()) if folder.exists() else path)


def _section(data: str | None, reading: Reading, max_length: int) -> dict[str, Any]:
    """The section ``data`` of a configuration, as the options say it."""
    found: dict[str, Any] = {"tokenization": {"max_length": max_length}}
    if data is None:
        return found
    if is_relabelled(data):
        reading.check_relabelled(data)
    spec = asdict(reading.spec(data))
    spec.pop("weight")
    given = {name: value for name, value in spec.items() if value not in (None, False)}
    return {**found, "source": given.pop("path"), **given, "strict": reading.strict}


# --- what is computed ---


def _between(chosen: Sequence[ModuleType], cases: Sequence[Case]) -> Iterator[tuple[Case, Pair, list[Any]]]:
    """Each case of both backends; of a model with all its objectives, one after the other."""
    about = [machine_facts(backend) for backend in chosen]
    with closing(console.Stages()) as report:
        for some in _by_model(cases):
            of_model = with_fitting_scale(chosen[0], some)
            sides = [list(run_cases(backend, of_model, _named(report, backend))) for backend in chosen]
            for (case, one), (_, other) in zip(*sides, strict=True):
                yield case, (one, other), about


def _by_model(cases: Iterable[Case]) -> Iterator[list[Case]]:
    for _, some in groupby(cases, key=lambda case: case.model.path):
        yield list(some)


def _against(
    backend: ModuleType, folder: Path, models: Sequence[Model], scratch: Path
) -> Iterator[tuple[Case, Pair, list[Any]]]:
    export = read_export(folder)
    cases = list(placed(export, models, lambda name: built_in_models(scratch, [name])[0]))
    about = [export.facts, machine_facts(backend)]
    with closing(console.Stages()) as report:
        for index, (case, arrays) in enumerate(run_cases(backend, cases, _named(report, backend))):
            yield case, (export.arrays(index), arrays), about


def _export(backend: ModuleType, cases: Sequence[Case], folder: Path) -> None:
    with closing(console.Stages()) as report:
        fitted = chain.from_iterable(with_fitting_scale(backend, some) for some in _by_model(cases))
        write_export(folder, run_cases(backend, list(fitted), _named(report, backend)), machine_facts(backend))
    n_cases = counted(len(cases), "case")
    console.say(f"{folder}: {n_cases}; on the other machine: mlxpref parity --against {folder.name}")


def _named(report: console.Stages, backend: ModuleType) -> Any:
    name = _name(backend)
    return lambda what, done, total: report(f"{name}: {what}", done, total)


def _name(backend: ModuleType) -> str:
    return backend.__name__.rsplit(".", 1)[-1].removesuffix("_backend")


# --- what is said ---


def _judge(found: Iterable[tuple[Case, Pair, list[Any]]], tolerances: Tolerances, json_file: Path | None) -> None:
    """Tables as they come; SystemExit(1) if a tolerance is exceeded."""
    records: list[dict[str, Any]] = []
    about: list[Any] = []
    beyond = 0
    for case, (one, other), about in found:
        rows = compare_traces(one, other, tolerances)
        _show(case, rows, about)
        beyond += sum(not row.ok for row in rows)
        records.append(_record(case, rows))
    if json_file is not None:
        content = {"ok": not beyond, "sides": about, "tolerances": asdict(tolerances), "cases": records}
        write_text(json_file, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    if beyond:
        console.say(f"{beyond} quantities are beyond their tolerance")
        raise SystemExit(1)
    console.say(f"{counted(len(records), 'case')}: the two agree")


def _show(case: Case, rows: Sequence[Row], about: Sequence[Mapping[str, Any]]) -> None:
    sides = " against ".join(str(side["backend"]).removesuffix("_backend") for side in about)
    title = f"{case.model.name}, {case.objective}, {len(case.rows)} rows, {case.settings.steps} steps: {sides}"
    head = ("quantity", "largest", "tolerance", "mean", "tolerance of mean", "verdict", "largest at")
    console.table(
        head,
        [
            (row.quantity, _short(row.largest), _short(row.tolerance), _short(row.mean), _short(row.mean_tolerance),
             "ok" if row.ok else "BEYOND", row.where)
            for row in rows
        ],
        title=title,
    )  # fmt: skip
    console.say()


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _record(case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "model": {**asdict(case.model), "fingerprint": case.fingerprint},
        "told": dict(case.told or {}),
        "settings": case.settings.as_dict(),
        "rows": len(case.rows),
        "quantities": [{**asdict(row), "ok": row.ok} for row in rows],
    }
