"""``mlxpref train``: a configuration, and what the command line says over it."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from mlxpref.assembly import STEPS_PER_EVAL
from mlxpref.cli import INTERRUPTED, console
from mlxpref.cli.sources import SPLIT_HELP, source_option
from mlxpref.config import Config
from mlxpref.config_layers import dump_config, load_config, parse_setting, read_yaml
from mlxpref.errors import MlxprefError, UsageError
from mlxpref.workers import launched_rank

F = TypeVar("F", bound=Callable[..., Any])

FLAGS: Mapping[str, str] = {
    "model": "model.path",
    "backend": "model.backend",
    "data": "data.source",
    "format": "data.format",
    "columns": "data.columns",
    "score": "data.score",
    "split": "data.split",
    "valid": "data.valid",
    "valid_split": "data.valid_split",
    "valid_fraction": "data.valid_fraction",
    "strict": "data.strict",
    "adapter_path": "output.adapter_path",
    "objective": "objective",
    "beta": "objective.beta",
    "fine_tune_type": "adapter.fine_tune_type",
    "num_layers": "adapter.num_layers",
    "init_from": "adapter.init_from",
    "iters": "training.iters",
    "epochs": "training.epochs",
    "batch_size": "batching.batch_size",
    "grad_accumulation_steps": "batching.gradient_accumulation_steps",
    "optimizer": "optimizer.name",
    "learning_rate": "optimizer.learning_rate",
    "max_length": "tokenization.max_length",
    "grad_checkpoint": "training.grad_checkpoint",
    "steps_per_report": "training.steps_per_report",
    "steps_per_eval": "training.steps_per_eval",
    "val_batches": "training.val_batches",
    "save_every": "training.save_every",
    "seed": "training.seed",
    "report_to": "output.report_to",
    "project_name": "output.project",
}
"""Flag → configuration key. Values are checked where the key's are, in the configuration."""

EPILOG = """\b
Example:
  mlxpref train --model mlx-community/Qwen3-0.6B-4bit --data pairs.jsonl --relabel --adapter-path run
  mlxpref train -c configs/qwen3-0.6b-ultrafeedback.yaml --set optimizer.learning_rate=1e-5
  mlxpref train --adapter-path run --resume
"""


DEFAULTS = Config.model_validate({"model": {"path": ""}, "data": {"source": ""}})
"""A configuration that says nothing but what it must."""


def _flag(name: str, *others: str, help: str, **more: Any) -> Callable[[F], F]:
    """A flag of :data:`FLAGS`, its help ending with the default that the configuration has."""
    on, _, off = name.partition("/")
    value: Any = DEFAULTS
    for part in FLAGS[on.removeprefix("--").replace("-", "_")].split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    shown = (on if value else off).removeprefix("--") if off else _shown(value)
    return click.option(name, *others, help=f"{help}  [default: {shown}]" if shown else help, **more)


def _shown(default: Any) -> str:
    """A default as one would type it; nothing for None."""
    if isinstance(default, Mapping):
        return str(default["name"])
    if isinstance(default, float):
        return f"{default:g}"
    return "none" if default == () else "" if default is None else str(default)


@click.command(epilog=EPILOG)
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="YAML file; see configs/.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Set any key of it.")
@_flag("--model", metavar="FOLDER|ID", help="Model folder or hub id.")
@_flag("--backend", metavar="NAME", help="What computes: auto, mlx or torch.")
@_flag("--data", metavar="PATH|ID", help="File, folder or hub id of preferences, or what `mlxpref relabel` wrote.")
@source_option("format")
@source_option("columns")
@source_option("score")
@source_option("split", help=f"{SPLIT_HELP}  [default: train]")
@_flag("--valid", metavar="PATH|ID", help="Validation rows: other data, or another split of the same.")
@_flag("--valid-split", metavar="NAME", help="Split of --valid to read.  [default: valid, else test, else train]")
@_flag("--valid-fraction", metavar="X", help="Share of the training prompts to hold out instead of --valid.")
@source_option("strict", default=None)
@click.option(
    "--relabel/--no-relabel",
    default=None,
    help="Write goals into the prompts, or train plainly.  [default: no-relabel]",
)
@_flag("--adapter-path", metavar="FOLDER", help="Run folder: the adapter, checkpoints, metrics.")
@click.option("--resume", is_flag=True, help="Go on from the run folder's last checkpoint.")
@_flag("--objective", metavar="NAME", help="What to minimise; `mlxpref objectives` lists them.")
@_flag("--beta", metavar="X", help="The objective's beta.  [default: the objective's own]")
@_flag("--fine-tune-type", type=click.Choice(["lora", "dora", "full"]), help="What trains.")
@_flag("--num-layers", metavar="N", help="Layers that train, counted from the last; -1 for all.")
@_flag(
    "--init-from",
    "--resume-adapter-file",
    metavar="FOLDER",
    help="Adapter folder to start from, or the adapters.safetensors in it.",
)
@_flag("--iters", metavar="N", help="Updates of the weights (mlx-lm's are batches, accumulated or not).")
@_flag("--epochs", metavar="X", help="How often each example is visited, where --iters does not say.")
@_flag("--batch-size", metavar="N", help="Examples of one optimiser step, before accumulation.")
@_flag("--grad-accumulation-steps", metavar="N", help="Batches added up before each update.")
@_flag("--optimizer", metavar="NAME", help="adam, adamw, sgd, muon, adafactor or lion.")
@_flag("--learning-rate", metavar="X", help="Highest learning rate.")
@_flag("--max-length", "--max-seq-length", metavar="N", help="Tokens of prompt and response at most.")
@_flag("--grad-checkpoint/--no-grad-checkpoint", default=None, help="Less memory, more time.")
@_flag("--steps-per-report", metavar="N", help="Steps between report lines.")
@_flag(
    "--steps-per-eval",
    metavar="N",
    help=f"Steps between evaluations; 0 for none.  [default: {STEPS_PER_EVAL} where there are validation rows]",
)
@_flag("--val-batches", metavar="N", help="Batches of one evaluation; -1 for all.")
@_flag("--save-every", metavar="N", help="Steps between checkpoints.")
@_flag("--seed", metavar="N", help="Decides order, splits and first weights.")
@_flag("--report-to", metavar="NAME,…", help="Where figures go, besides the run folder: wandb, swanlab, tensorboard.")
@_flag("--project-name", metavar="NAME", help="Project name there.  [default: the run folder's]")
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
def command(
    file: Path | None,
    settings: tuple[str, ...],
    relabel: bool | None,
    resume: bool,
    print_config: bool,
    **flags: Any,
) -> None:
    """Train an adapter on preferences.

    Every flag sets a key of the configuration; the command line goes over the file, and the file over
    the defaults. The run folder holds a standard mlx-lm adapter and all it takes to go on.
    """
    config = configure(file, [*_from_flags(flags, relabel), *map(parse_setting, settings)], resume=resume)
    if print_config:
        console.say(dump_config(config).rstrip())
        return
    from mlxpref.cli.display import TrainDisplay
    from mlxpref.train import train
    from mlxpref.workers import WorkerEnded

    try:
        result = train(config, resume=resume, callbacks=[TrainDisplay()])
    except WorkerEnded as ended:  # worker 0 says it for all
        raise SystemExit(ended.exit_code) from None
    except KeyboardInterrupt:
        if launched_rank() > 0:
            raise SystemExit(INTERRUPTED) from None
        console.note(_after_a_stop(Path(config.output.adapter_path)))
        raise
    if result.interrupted is None and launched_rank() == 0:
        _diagnose(result.folder)
    if result.interrupted is not None:
        raise SystemExit(128 + result.interrupted if result.interrupted == signal.SIGTERM else 130)


def _diagnose(folder: Path) -> None:
    """Say what is wrong with a finished run, and where to read more."""
    from mlxpref.diagnosis import diagnose, read_record

    try:
        alarms = [one for one in diagnose(read_record(folder)) if one.severity == "alarm"]
    except MlxprefError as error:  # the run is whole all the same
        console.note(f"not diagnosed: {error}")
        return
    for one in alarms:
        console.warn(f"{one.what} {one.change} ({one.evidence})")
    console.note(f"to look at it:  mlxpref report {shlex.quote(str(folder))}")


def _after_a_stop(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "stopped before anything was written; start again"
    return f"stopped at once; go on with  mlxpref train --adapter-path {shlex.quote(str(folder))} --resume"


def configure(file: Path | None, overrides: list[tuple[str, Any]], *, resume: bool = False) -> Config:
    """The resolved configuration; of a resumed run without a file, the run's own below the overrides."""
    if file is not None or not resume:
        return load_config(file, overrides)
    folder = dict(overrides).get("output.adapter_path", "adapters")
    own = Path(folder) / "config.yaml"
    if not own.is_file():
        raise UsageError(
            f"{folder}: no run to resume here (no config.yaml); name its folder with --adapter-path, or "
            "start without --resume"
        )
    return load_config(base=read_yaml(own), overrides=[("output.adapter_path", folder), *overrides])


def _from_flags(flags: Mapping[str, Any], relabel: bool | None) -> Iterator[tuple[str, Any]]:
    if relabel is not None:
        yield "relabel", ({} if relabel else None)
    for flag, key in FLAGS.items():
        value = flags[flag]
        if value is not None:
            yield key, READ[flag](value) if flag in READ else value


def _columns(text: str) -> dict[str, str]:
    from mlxpref.data.sources import parse_columns

    return parse_columns(text)


def _adapter_folder(path: str) -> str:
    """The folder of mlx-lm's or PEFT's weights; UsageError for another file of weights."""
    if Path(path).name in ("adapters.safetensors", "adapter_model.safetensors"):
        return str(Path(path).parent)
    if path.endswith(".safetensors"):
        raise UsageError(
            f"{path}: an adapter is read as a folder of adapters.safetensors and adapter_config.json; copy the "
            "two there under these names and name the folder"
        )
    return path


READ: Mapping[str, Callable[[str], Any]] = {"columns": _columns, "init_from": _adapter_folder}
"""Flags whose text is more than a value of their key."""
