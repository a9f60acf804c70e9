"""What must be known of the base model to carry an adapter over: its type, its layers, its head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.errors import AdapterError, ModelError
from mlxpref.files import safetensors_header
from mlxpref.hub import model_folder

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class Base:
    """A base model by its ``config.json``.

    Attributes:
        name: hub id, or a folder's absolute path.
        revision: of the hub id.
        folder: where it lies.
        model_type: names the architecture.
        n_layers: how many there are.
        tied: the head is the table of embeddings.
        text_only: there are no layers besides those of the language model.
        quantised: by mlx-lm; transformers cannot load it.
    """

    name: str
    revision: str | None
    folder: Path
    model_type: str
    n_layers: int
    tied: bool
    text_only: bool
    quantised: bool


def base_of(adapter: Path, named: Any, revision: str | None, chosen: str | None) -> Base:
    """The base model of an adapter.

    Args:
        adapter: the adapter's folder, for messages.
        named: hub id or folder that the adapter itself names.
        revision: of that hub id.
        chosen: what the user named in its place.

    Raises:
        AdapterError: none is named, or it cannot be had.
    """
    name = chosen or named
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{adapter}: names no base model; give its folder or hub id with --model")
    local = Path(name).expanduser()
    revision = None if chosen or local.is_dir() else revision
    try:
        folder = model_folder(name, revision=revision, weights=False)
    except ModelError as error:
        raise AdapterError(
            f"{adapter}: its base model is needed, and cannot be had; name a copy of it with --model:\n  {error}"
        ) from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    of_text: Mapping[str, Any] = config.get("text_config") or config
    n_layers = next((of_text[key] for key in _LAYERS if isinstance(of_text.get(key), int)), None)
    if n_layers is None or not isinstance(config.get("model_type"), str):
        raise AdapterError(f"{folder / 'config.json'}: says no model_type, or not how many layers there are")
    return Base(
        name=str(local.resolve()) if local.is_dir() else name,
        revision=revision,
        folder=folder,
        model_type=config["model_type"],
        n_layers=n_layers,
        tied=_tied(of_text.get("tie_word_embeddings", config.get("tie_word_embeddings")), folder),
        text_only="text_config" not in config,
        quantised="quantization" in config,
    )


def _tied(said: Any, folder: Path) -> bool:
    """By the config; where that is silent, by whether the weights hold a head; else as transformers has it."""
    if isinstance(said, bool):
        return said
    return not any(name.endswith(_HEADS) for name in base_shapes(folder))


def base_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors in a model's files; none of those that are damaged or not there."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with suppress(OSError, ValueError):
            found |= {name: tuple(entry["shape"]) for name, entry in safetensors_header(file).items()}
    return found
