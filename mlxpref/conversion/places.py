"""Which modules of a model are adapted, as mlx-lm's ``keys`` and ``num_layers`` say it and as PEFT's settings do."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxpref.tensors import Tensor

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Places:
    """Modules sorted by layer.

    Attributes:
        stack: path of the layers, such as ``model.layers``; empty if no module is in one.
        layers: number of each layer with a module, in order.
        keys: paths within a layer of all that are in one.
        outside: full paths of the others.
        uniform: every layer of these has every one of these keys.
    """

    stack: str
    layers: tuple[int, ...]
    keys: tuple[str, ...]
    outside: tuple[str, ...]
    uniform: bool


def layer_of(module: str) -> int | None:
    """Number of the layer a module is in, None if it is in none."""
    found = _LAYER.fullmatch(module)
    return None if found is None else int(found[2])


def places(modules: Iterable[str]) -> Places:
    """Modules (paths of one library) sorted by layer."""
    names = sorted(modules)
    found = [match for name in names if (match := _LAYER.fullmatch(name))]
    inside = {(match[1], int(match[2]), match[3]) for match in found}
    stacks, layers, keys = {one for one, _, _ in inside}, {one for _, one, _ in inside}, {one for _, _, one in inside}
    return Places(
        stack=min(stacks, default=""),
        layers=tuple(sorted(layers)),
        keys=tuple(sorted(keys)),
        outside=tuple(name for name in names if not _LAYER.fullmatch(name)),
        uniform=len(stacks) <= 1 and len(inside) == len(layers) * len(keys),
    )


def for_mlx(modules: Iterable[str], n_layers: int) -> tuple[int, list[str]]:
    """``num_layers`` and ``keys`` that stand for exactly these modules: paths within a layer where the last layers
    all have them, else full paths, which mlx-lm takes as keys, too."""
    names = sorted(modules)
    found = places(names)
    if not found.layers:
        return 1, names
    last = found.layers == tuple(range(found.layers[0], n_layers))
    keys = [*found.keys, *found.outside] if found.uniform and last else names
    return n_layers - found.layers[0], keys


def for_peft(modules: Iterable[str], n_layers: int, *, text_only: bool) -> dict[str, Any]:
    """PEFT's settings that stand for exactly these modules: paths within a layer where that is unequivocal, else
    full paths."""
    names = sorted(modules)
    found = places(names)
    every = found.layers == tuple(range(n_layers))
    if not (found.uniform and text_only and found.layers):
        return {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
    return {
        "target_modules": [*found.keys, *found.outside],
        "layers_to_transform": None if every else list(found.layers),
        "layers_pattern": None if every else found.stack.rpartition(".")[2],
    }


def layout(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names and shapes of tensors."""
    listed = sorted((name, list(tensor.shape)) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
