"""What ``evaluate`` and ``generate`` share: which policy is meant, and the recipe that goes with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click

from mlxpref import backends
from mlxpref.cli import console
from mlxpref.conversion import as_mlx_folder
from mlxpref.data.recipe import Recipe
from mlxpref.data.relabelled import is_relabelled, read_relabelled
from mlxpref.data.tokenization import load_tokenizer
from mlxpref.errors import DataError, UsageError
from mlxpref.facts import said_device
from mlxpref.generate import adapter_facts, adapter_recipe

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded policy.

    Attributes:
        facts: what mlxpref wrote into the adapter's config; empty without an adapter.
        recipe: the adapter's, or the one that was given instead; None without goals.
    """

    backend: ModuleType
    policy: Any
    tokenizer: Any
    has_adapter: bool
    facts: dict[str, Any]
    recipe: Recipe | None


def policy_options(command: F) -> F:
    """The options that say which policy, and what computes it."""
    command = machine_options(command)
    for option in reversed(
        (
            click.option("--adapter-path", metavar="FOLDER", help="Adapter or run folder."),
            click.option(
                "--model",
                metavar="FOLDER|ID",
                help="Model folder or hub id. With an adapter: its base, where that has moved.",
            ),
            click.option(
                "--model-revision",
                "revision",
                metavar="REV",
                help="Branch, tag or commit of a --model on the hub; an adapter names its own.",
            ),
            click.option(
                "--recipe",
                "recipe_path",
                metavar="PATH",
                help="Where the words for goals are: adapter, relabelled folder, recipe.json.  [default: the adapter]",
            ),
        )
    ):
        command = option(command)
    return command


def machine_options(command: F) -> F:
    """The options that say what computes, and how exactly."""
    for option in reversed(
        (
            click.option(
                "--dtype",
                type=click.Choice(["float32", "float16", "bfloat16"]),
                help="Of unquantised weights.  [default: the checkpoint's, on a CPU float32]",
            ),
            click.option(
                "--backend",
                default="auto",
                show_default=True,
                metavar="NAME",
                help=f"What computes: {', '.join(('auto', *backends.NAMES))}.",
            ),
        )
    ):
        command = option(command)
    return command


def open_policy(
    *,
    adapter_path: str | None,
    model: str | None,
    revision: str | None,
    dtype: str | None,
    recipe_path: str | None,
    backend: str,
) -> Opened:
    """Load what the options name. Adapter config and recipe are read before any model is.

    Raises:
        UsageError: neither an adapter nor a model; or an option that has nothing to act on.
        AdapterError, ModelError: the folder cannot be used.
    """
    if adapter_path is None and model is None:
        raise UsageError("which policy? Give --adapter-path FOLDER, or --model for a model without an adapter")
    if revision is not None and (adapter_path is not None or model is None):
        raise UsageError("--model-revision is for a --model on the hub without an adapter, which names its own")
    if adapter_path is not None:
        adapter_path = str(as_mlx_folder(adapter_path, model=model))
    facts = {} if adapter_path is None else adapter_facts(adapter_path)
    recipe = named_recipe(adapter_path, recipe_path)
    room = backends.get(backend)
    if adapter_path is not None:
        policy = room.load_adapter(adapter_path, model_path=model, dtype=dtype)
        for text in policy.notes:
            console.warn(text)
    else:
        policy = room.load_policy(model, revision=revision, dtype=dtype, trainable=False)
    device = room.device_info()
    console.note(f"backend: {said_device(device)}")
    for text in device.get("remarks", ()):
        console.warn(text)
    tokenizer = load_tokenizer(str(policy.path))
    return Opened(room, policy, tokenizer, adapter_path is not None, facts, recipe)


def named_recipe(adapter_path: str | None, recipe_path: str | None, *, model: str | None = None) -> Recipe | None:
    """The recipe that goes with these options, before anything is loaded; None without goals."""
    if recipe_path is not None:
        return recipe_of(Path(recipe_path))
    return None if adapter_path is None else adapter_recipe(as_mlx_folder(adapter_path, model=model))


def recipe_of(path: Path) -> Recipe:
    """The recipe of an adapter folder, a relabelled folder, or a JSON file that holds one.

    Raises:
        UsageError: there is none. DataError, AdapterError: it is damaged.
    """
    recipe: Recipe | None
    if is_relabelled(path):
        recipe = read_relabelled(path).recipe
    elif path.is_dir():
        recipe = adapter_recipe(as_mlx_folder(path))
    else:
        recipe = _read_recipe(path)
    if recipe is None:
        raise UsageError(f"--recipe {path}: it holds no recipe, its rows or its training had no goals")
    return recipe


def _read_recipe(file: Path) -> Recipe | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--recipe {file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"--recipe {file}: not JSON ({error})") from error
    if isinstance(stored, dict) and "recipe" in stored:
        stored = stored["recipe"]
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise DataError(f"--recipe {file}: not a recipe")
    return Recipe.from_dict(stored)
