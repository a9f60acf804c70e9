"""What an adapter folder holds, read and written without loading a model: settings, LoRA factors, weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxpref.errors import AdapterError, RunError, raise_all
from mlxpref.facts import read_adapter_folder
from mlxpref.files import folder_aside, write_text
from mlxpref.folders import CONFIG, WEIGHTS
from mlxpref.tensors import FLOATS, Tensor, tensors_of, write_tensors

_AB = ("lora_a", "lora_b")
_FACTOR = re.compile(r"(.+)\.(lora_[ab])")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter folder holds, or will.

    Attributes:
        folder: where it was read; of a merged one, the first of its parts.
        config: ``adapter_config.json``.
        factors: module → (``lora_a``, ``lora_b``); empty for a full fine-tune.
        weights: every other tensor by name: those of a full fine-tune, DoRA's magnitudes.
    """

    folder: Path
    config: Mapping[str, Any]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    weights: Mapping[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by the names that they have in the file."""
        pairs = {f"{at}.{name}": one for at, pair in self.factors.items() for name, one in zip(_AB, pair, strict=True)}
        return {**self.weights, **pairs}

    @property
    def kind(self) -> str:
        """``fine_tune_type``: lora, dora or full."""
        return str(self.config.get("fine_tune_type", "lora"))

    @property
    def lora(self) -> Mapping[str, Any]:
        """mlx-lm's ``lora_parameters``; empty for a full fine-tune."""
        return _mapping(self.config.get("lora_parameters"))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What mlxpref wrote into the config; empty for another program's adapter."""
        return _mapping(self.config.get("mlxpref"))

    @property
    def model(self) -> str:
        """The base: a hub id, or a folder's absolute path."""
        named = str(self.config["model"])
        return str(Path(named).resolve()) if Path(named).is_dir() else named


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def read_adapter(folder: Path) -> Adapter:
    """An adapter folder; its tensors are read when they are asked for.

    Raises:
        AdapterError: it is none, is damaged, or holds tensors of an unknown kind.
    """
    config, header = read_adapter_folder(folder, str(folder))
    adapter = Adapter(folder, config, {}, tensors_of(folder / WEIGHTS, header))
    raise_all(list(_unusable(adapter)), AdapterError, f"{folder}:")
    return adapter if adapter.kind == "full" else _factored(adapter)


def _unusable(adapter: Adapter) -> Iterator[str]:
    """What is wrong with the settings of an adapter or the types of its tensors."""
    if not isinstance(adapter.config.get("model"), str):
        yield f"{CONFIG} names no base model; write its folder or hub id there, under the key model"
    if not isinstance(adapter.config.get("num_layers"), int):
        yield f"{CONFIG} has no key num_layers; not an adapter made for mlx-lm"
    if adapter.kind not in ("lora", "dora", "full"):
        yield f"{CONFIG}: fine_tune_type {adapter.kind!r}; what is known are lora, dora and full"
    scale = adapter.lora.get("scale")
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if adapter.kind != "full" and not number:
        yield f"{CONFIG}: lora_parameters.scale is {scale!r}, not a finite number; not an adapter made for mlx-lm"
    for name, tensor in adapter.weights.items():
        if tensor.dtype not in FLOATS:
            yield f"{name}: of type {tensor.dtype}; what can be merged is {', '.join(FLOATS)}"


def _factored(adapter: Adapter) -> Adapter:
    """The same adapter with its LoRA factors in pairs. AdapterError listing those that make none."""
    found = {name: match for name in adapter.weights if (match := _FACTOR.fullmatch(name))}
    others = {name: tensor for name, tensor in adapter.weights.items() if name not in found}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, match in found.items():
        pairs.setdefault(match[1], {})[match[2]] = adapter.weights[name]
    problems = [f"{name}: unknown" for name in others if "lora_" in name]
    problems += _misfits(pairs) if pairs else ["there are none"]
    raise_all(problems, AdapterError, f"{adapter.folder / WEIGHTS}: not the LoRA factors that mlx-lm writes:")
    factors = {module: (pair["lora_a"], pair["lora_b"]) for module, pair in pairs.items()}
    return replace(adapter, factors=factors, weights=others)


def _misfits(pairs: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """Modules with one factor, or with two that cannot be multiplied."""
    for module, pair in pairs.items():
        if len(pair) == 1:
            yield f"{module}: {next(iter(pair))} alone"
            continue
        a, b = pair["lora_a"].shape, pair["lora_b"].shape
        at_a, at_b = rank_axes(a)
        if len(a) != len(b) or len(a) not in (2, 3) or a[at_a] != b[at_b] or a[:-2] != b[:-2]:
            yield f"{module}: lora_a {a} and lora_b {b}"


def rank_axes(shape: Sequence[int]) -> tuple[int, int]:
    """Where the rank stands in ``lora_a`` and ``lora_b``: (inputs, r) and (r, outputs); in a layer of experts
    (experts, r, inputs) and (experts, outputs, r)."""
    return (1, 2) if len(shape) == 3 else (1, 0)


def base_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Name → shape of what a tensor or a pair of factors is added to: no ranks."""
    found = {name: tensor.shape for name, tensor in adapter.weights.items()}
    for module, pair in adapter.factors.items():
        axes = rank_axes(pair[0].shape)
        found[module] = tuple(n for one, axis in zip(pair, axes, strict=True) for n in _without(one.shape, axis))
    return found


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """A folder that mlx-lm and mlxpref load as they load any adapter; it appears whole or not at all.

    Raises:
        RunError: something is there already, or the disk refuses.
        AdapterError: a number is not finite, or too large for its type.
    """
    check_free(folder)
    with folder_aside(folder) as aside:
        write_tensors(aside / WEIGHTS, adapter.tensors)
        write_text(aside / CONFIG, json.dumps(adapter.config, indent=2, ensure_ascii=False) + "\n")


def check_free(folder: Path) -> None:
    """RunError if a file, or a folder that holds something, is there."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RunError(f"{folder}: is there already, and nothing is overwritten; choose another folder")
