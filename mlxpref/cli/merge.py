"""``mlxpref merge``: several adapters in, one out."""

from __future__ import annotations

import math
from pathlib import Path

import click

from mlxpref.adapters import Adapter, check_free, write_adapter
from mlxpref.cli import console
from mlxpref.data.words import counted
from mlxpref.errors import UsageError
from mlxpref.merging import extrapolate, interpolate

EPILOG = """\b
Example:
  mlxpref merge helpful=0.7 concise=0.3 --out both
  mlxpref merge adapter --extrapolate 0.5 --out further
  mlxpref merge second --extrapolate 0.3 --start first --out third

The result is exact in the weights of the merged model, and an adapter like any other: mlxpref and mlx-lm
load it. Interpolated LoRA adapters add up their ranks; --extrapolate from the base keeps the rank.
"""


@click.command(epilog=EPILOG)
@click.argument("adapters", nargs=-1, required=True, metavar="FOLDER[=WEIGHT]…")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to write.")
@click.option(
    "--extrapolate",
    "alpha",
    type=float,
    metavar="A",
    help="Go on by this share of what training changed: 0 is the adapter, -1 its start; 0.3 and 0.5 are usual (ExPO).",
)
@click.option(
    "--start", metavar="FOLDER", help="What --extrapolate goes on from: an adapter.  [default: the base model]"
)
@click.option(
    "--recipe", "recipe_from", metavar="FOLDER", help="Whose words for goals to keep, where the adapters' differ."
)
def command(
    adapters: tuple[str, ...], out: Path, alpha: float | None, start: str | None, recipe_from: str | None
) -> None:
    """Combine adapters of one base model: as much of each as its WEIGHT says, or one of them carried further.

    Weights above 0 that sum to 1 give a model between the adapters; what is missing to 1 is the base model.
    """
    check_free(out)
    if alpha is None:
        if start is not None:
            raise UsageError("--start is for --extrapolate; to mix adapters, give each its weight: FOLDER=0.5")
        folders, weights = zip(*map(_weighted, adapters), strict=True)
        merged = interpolate(folders, weights, recipe_from=recipe_from)
        total = math.fsum(weights)
        if not math.isclose(total, 1, abs_tol=1e-9):
            console.note(f"the weights sum to {total:g}: the base model has a weight of {1 - total:g}")
    else:
        if len(adapters) > 1 or recipe_from is not None:
            raise UsageError("--extrapolate takes one adapter, without a weight, and keeps its words for goals")
        merged = extrapolate(adapters[0], alpha, start)
    write_adapter(merged, out)
    console.say(_described(merged, out))


def _weighted(text: str) -> tuple[str, float]:
    folder, sign, weight = text.rpartition("=")
    try:
        if sign and folder:
            return folder, float(weight)
    except ValueError:
        pass
    raise UsageError(f"{text}: write FOLDER=WEIGHT, such as adapter=0.5, or one FOLDER and --extrapolate")


def _described(merged: Adapter, out: Path) -> str:
    if merged.kind == "full":
        return f"{out}: {counted(len(merged.weights), 'tensor')} of a full fine-tune"
    rank, scale, modules = merged.lora.get("rank"), merged.lora["scale"], counted(len(merged.factors), "module")
    return f"{out}: {merged.kind} of rank {rank}, scale {scale:g}, {modules}"
