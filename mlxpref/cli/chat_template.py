"""``mlxpref chat-template``: a fused model that asks itself for a goal, whoever asks it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlxpref.cli import console
from mlxpref.cli.policies import recipe_of
from mlxpref.data.goal_template import BEFORE, goal_template
from mlxpref.data.recipe import goal_words
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import DataError, UsageError
from mlxpref.files import write_text
from mlxpref.generate import parse_goal

EPILOG = """\b
Example:
  mlx_lm.fuse --model base-model --adapter-path adapter --save-path fused
  mlxpref chat-template fused --recipe adapter --goal 10
  mlx_lm.evaluate --model fused --tasks ifeval --apply-chat-template
"""


@click.command("chat-template", epilog=EPILOG)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--recipe", "recipe_path", required=True, metavar="PATH",
    help="Where the words for goals are: adapter, relabelled folder, or recipe.json.",
)  # fmt: skip
@click.option("--goal", default="top", show_default=True, metavar="GOAL", help="What every conversation asks for.")
@click.option("--show", is_flag=True, help="Print the template; leave the folder as it is.")
def command(folder: Path, recipe_path: str, goal: str, show: bool) -> None:
    """Have a model FOLDER's chat template state a goal, for programs that know nothing of goals.

    mlx_lm.evaluate, mlx_lm.server and others read the template from the folder: with this they ask for the goal in the
    words of training. Meant for a copy of the model, such as mlx_lm.fuse writes; its own template is kept beside the
    new one.
    """
    recipe = recipe_of(Path(recipe_path))
    wanted = parse_goal(goal, recipe)
    if wanted is None:
        raise UsageError("--goal none: a template without a goal is the model's own; leave it as it is")
    template = load_tokenizer(str(folder)).chat_template
    if not isinstance(template, str):
        raise DataError(f"{folder}: the model has no chat template, so there is nothing that could state a goal")
    written = goal_template(template, recipe, wanted)
    if show:
        console.say(written)
        return
    _write(folder, written, own=template)
    console.say(f"{folder}: every conversation asks for {goal_words(wanted)} now")


def _write(folder: Path, template: str, *, own: str) -> None:
    """Where libraries look for it: a file of its own goes before what the tokenizer's configuration holds."""
    write_text(folder / BEFORE, own)
    write_text(folder / "chat_template.jinja", template)
    settings = folder / "tokenizer_config.json"
    stored = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if "chat_template" in stored:
        write_text(settings, json.dumps({**stored, "chat_template": template}, indent=2, ensure_ascii=False) + "\n")
