"""``mlxpref probe``: which way a model's forward pass takes, and how exact it is."""

from __future__ import annotations

from typing import Any

import click

from mlxpref import backends
from mlxpref.cli import console

EPILOG = """\b
Example:
  mlxpref probe mlx-community/Qwen3-0.6B-4bit
  mlxpref probe ./my-model ./another --num-layers 4
"""


@click.command(epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--num-layers", default=16, show_default=True, help="Adapted layers, counted from the last.")
@click.option(
    "--fine-tune-type",
    default="lora",
    show_default=True,
    type=click.Choice(["lora", "dora", "full"]),
    help="What trains: its gradients are compared.",
)
def command(models: tuple[str, ...], num_layers: int, fine_tune_type: str) -> None:
    """Say which way a model's forward pass takes.

    "shared" computes a prompt once for all its responses; "plain" computes every row whole. Log-probs
    and gradients of each way are compared with the model's own forward on random tokens: the columns
    show the largest difference in nats and the relative difference of the gradients.
    """
    backend = backends.get("mlx")
    rows = []
    for model in models:
        policy = backend.load_policy(model, num_layers=num_layers, fine_tune_type=fine_tune_type)
        rows.append(_row(model, policy, backend.examine(policy)))
    head = ("model", "architecture", "way", "logps", "gradients", "head", "checkpointing")
    console.table(head, rows)


def _row(model: str, policy: Any, ways: Any) -> list[Any]:
    again = ways.checkpointed
    return [
        model,
        policy.config.get("model_type"),
        ways.chosen,
        ways.shared.reason or f"{ways.shared.logps:.1e}",
        f"{ways.shared.gradients:.1e}",
        "response positions" if ways.split_head else "whole rows",
        f"exact ({again.gradients:.1e})" if again.exact(ways.tolerance) else f"no ({again.gradients:.1e})",
    ]
