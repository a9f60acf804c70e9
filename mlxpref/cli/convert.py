"""``mlxpref convert``: an adapter of mlx-lm's as one of PEFT's, or the other way round."""

from __future__ import annotations

from pathlib import Path

import click

from mlxpref.adapters import check_free
from mlxpref.cli import console
from mlxpref.conversion import Converted, convert, write_converted
from mlxpref.conversion.places import places
from mlxpref.data.words import counted

EPILOG = """\b
Example:
  mlxpref convert adapter --out for-peft
  mlxpref convert trl-run/checkpoint-100 --out adapter
  mlxpref convert adapter --model Qwen/Qwen3-0.6B --out for-peft

Which form the folder has, its files show; the other one is written. The result computes the same, and converting it
back gives the first. train, evaluate and generate take a PEFT folder as it is.
"""


@click.command(epilog=EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to write.")
@click.option("--to", type=click.Choice(["peft", "mlx"]), help="Form to write.  [default: the other one]")
@click.option(
    "--model", metavar="FOLDER|ID", help="Base model, where the adapter names none, or one of another place or kind."
)
def command(folder: Path, out: Path, to: str | None, model: str | None) -> None:
    """Carry an adapter over between mlx-lm and PEFT (transformers, TRL): LoRA and DoRA, exactly."""
    check_free(out)
    converted = convert(folder, to=to, model=model)
    write_converted(converted, out)
    mlx, peft = _of_mlx(converted), _of_peft(converted)
    first, second = (mlx, peft) if converted.to == "peft" else (peft, mlx)
    console.say(f"{folder}: {first}")
    for line in converted.said:
        console.say(f"  {line}")
    console.say(f"{out}: {second}, for {converted.base.name}")


def _of_mlx(converted: Converted) -> str:
    adapter = converted.mlx
    where = _where(list(adapter.factors), converted.base.n_layers)
    return f"mlx-lm, {adapter.kind} of rank {adapter.lora.get('rank')}, scale {adapter.lora['scale']:g}, {where}"


def _of_peft(converted: Converted) -> str:
    config = converted.peft.config
    patterns = ", ".join(key for key in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(key))
    kind = "dora" if config.get("use_dora") else "lora"
    said = f"PEFT, {kind} with r {config['r']}, lora_alpha {config['lora_alpha']:g}"
    modules = counted(len(converted.mlx.factors), "module")
    return f"{said}{f' ({patterns})' if patterns else ''}, {modules}"


def _where(modules: list[str], n_layers: int) -> str:
    found = places(modules)
    outside = f" and {', '.join(found.outside)}" if found.outside else ""
    inside = f" in {len(found.layers)} of {counted(n_layers, 'layer')}" if found.layers else ""
    return f"{counted(len(modules), 'module')}{inside}{outside if inside else ''}"
