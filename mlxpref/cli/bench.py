"""``mlxpref bench``: what a training step takes on this machine, as one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.config import Config
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.errors import UsageError
from mlxpref.files import write_text

SHAPES = ("uf", "hh")
MADE_UP = "made up"
"""Stands for the data where rows are made up; nothing reads it."""

EPILOG = """\b
Example:
  mlxpref bench --model mlx-community/Qwen3-0.6B-4bit
  mlxpref bench -c configs/qwen3-0.6b-ultrafeedback.yaml --markdown
  mlxpref bench --model ./model --data pairs.jsonl --set batching.batch_size=8 --json bench.json

\b
Without a configuration or --data, rows are made up: --shape uf has prompts of 120-180 tokens and responses of
180-420, hh prompts of 96-160 and responses of 30-90.
"""


@click.command(epilog=EPILOG)
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="YAML file, as `train` reads it.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Set any key of it.")
@click.option("--model", metavar="FOLDER|ID", help="Model folder or hub id.")
@click.option("--data", metavar="PATH|ID", help="Preferences whose first rows are taken: a file, folder or hub id.")
@click.option("--shape", type=click.Choice(SHAPES), help="Make rows up, like UltraFeedback's or HH's.")
@click.option("--backend", metavar="NAME", help="What computes: auto, mlx or torch.  [default: auto]")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Measurements of each."
)
@click.option("--sft/--no-sft", default=True, show_default=True, help="Measure mlx-lm's supervised step, too.")
@click.option("--markdown", is_flag=True, help="Print tables as Markdown.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def command(
    file: Path | None, settings: tuple[str, ...], model: str | None, data: str | None, shape: str | None,
    backend: str | None, repeats: int, sft: bool, markdown: bool, json_file: Path | None,
) -> None:  # fmt: skip
    """Measure a training step on this machine.

    The step of a configuration, mlx-lm's own supervised step on the same rows, the pass that makes the reference's
    log-probs, and the rate of matrix products of the model's shapes: warmed up, then each in turn. Nothing is left
    on the disk.
    """
    if data is not None and shape is not None:
        raise UsageError("--data and --shape both say which rows: give one of them")
    given = {"model.path": model, "data.source": data, "model.backend": backend}
    overrides = [(key, value) for key, value in given.items() if value is not None]
    made_up = shape or (SHAPES[0] if file is None and data is None else None)
    config = _config(file, [*overrides, *map(parse_setting, settings)], made_up)
    from mlxpref.bench.lines import as_dict, lines, table
    from mlxpref.bench.measuring import bench

    with closing(console.Stages()) as report:
        found = bench(config, shape=made_up, repeats=repeats, sft=sft, on_progress=report)
    if json_file is not None:
        write_text(json_file, json.dumps(as_dict(found), indent=1, ensure_ascii=False, default=str) + "\n")
    show = _markdown if markdown else console.table
    show(*table(found))
    console.say()
    show(("what", "value"), [list(line) for line in lines(found)])


def _config(file: Path | None, overrides: list[tuple[str, Any]], made_up: str | None) -> Config:
    if file is None and "model.path" not in dict(overrides):
        raise UsageError("which model? --model FOLDER|ID, or a configuration with -c")
    if made_up is not None:
        overrides = [("data", {"source": MADE_UP}), *overrides]
    return load_config(file, overrides)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for line in (head, ["---"] + ["---:"] * (len(head) - 1) if len(head) > 2 else ["---"] * len(head), *rows):
        console.say("| " + " | ".join(console.cell(value).replace("|", "\\|") for value in line) + " |")
