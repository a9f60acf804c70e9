"""LoRA and DoRA on the modules that mlx-lm would adapt, with its first weights.

What is a linear module in mlx-lm and a bare parameter in transformers (routers, stacks of experts) gets its
low-rank term through PyTorch's parametrisations; the rest through peft.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from mlxpref import names
from mlxpref.errors import AdapterError, ConfigError
from mlxpref.torch_backend.layers import Adapted, LowRank, slots_of, wrapped
from mlxpref.torch_backend.slots import PIECES, Slot, expert_name, expert_pieces


def layer_prefix(model: nn.Module, n_layers: int) -> str:
    """Dotted name of the decoder layers here, for example ``model.layers.``.

    Raises:
        ConfigError: no list of so many modules.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return f"{name}."
    raise ConfigError(f"cannot find the {n_layers} layers of {type(model).__name__}")


def adapt(
    model: nn.Module,
    model_type: str,
    prefix: str,
    layers: Sequence[int],
    lora: Mapping[str, Any],
    *,
    dora: bool,
    seed: int,
) -> tuple[list[Slot], list[Adapted]]:
    """Add an adapter to the given layers.

    Args:
        lora: mlx-lm's ``lora_parameters``, resolved; ``keys`` are paths within a layer of mlx-lm's model, or
            whole paths, for what is outside the layers (``lm_head``).

    Raises:
        ConfigError: keys that match nothing, or what cannot be adapted here as mlx-lm adapts it.
    """
    known = dict(_candidates(model, model_type))
    chosen = _chosen(known, lora.get("keys"), names.to_mlx(prefix, model_type), layers)
    modules = {name: at for name, at in chosen.items() if isinstance(at, str)}
    stacks = {name: at for name, at in chosen.items() if not isinstance(at, str)}
    _check_possible(model, modules, stacks, lora, dora)
    slots, adapted = _with_peft(model, modules, lora, dora)
    for name in list(stacks):
        if name not in stacks:
            continue
        more, one = _with_parametrisation(model, stacks, stacks[name], lora)
        slots, adapted = [*slots, *more], [*adapted, one]
    _first_weights(slots, seed)
    order = {name: index for index, name in enumerate(chosen)}
    slots.sort(key=lambda slot: (order[slot.name.rpartition(".")[0]], slot.name))
    return slots, adapted


def _candidates(model: nn.Module, model_type: str) -> Iterator[tuple[str, str | tuple[str, str, int]]]:
    """mlx-lm's module → module here; or (module, parameter, piece) where only a parameter is here."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if module is head and tied:
            continue  # mlx-lm has no such module then
        router = "Router" in type(module).__name__  # some are linear modules that give more than their output
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and not router:
            yield names.to_mlx(name, model_type), name
            continue
        router = router and _is_linear_in_mlx(names.to_mlx(name, model_type), model_type)
        for key, parameter in module.named_parameters(recurse=False):
            if key in PIECES and parameter.ndim == 3:
                for index, (piece, _, _) in enumerate(expert_pieces(parameter, key)):
                    yield f"{expert_name(name, model_type)}.{piece}", (name, key, index)
            elif key == "weight" and parameter.ndim == 2 and router:
                yield names.to_mlx(name, model_type), (name, key, 0)


def _is_linear_in_mlx(router: str, model_type: str) -> bool:
    """Whether mlx-lm has a linear module there: it has one where no path leads back to transformers."""
    try:
        names.to_torch(router, model_type)
    except AdapterError:
        return True
    return False


def _chosen(
    known: Mapping[str, Any], keys: Sequence[str] | None, prefix: str, layers: Sequence[int]
) -> dict[str, Any]:
    """What of the known modules is to be adapted: by their paths within these layers, or by their whole paths."""
    places = {name: _place(name, prefix) for name in known}
    everywhere = {place[1] for place in places.values() if place is not None}
    wanted = everywhere if keys is None else set(keys)
    if nothing := sorted(wanted - everywhere - set(known)):
        outside = [name for name, place in places.items() if place is None]
        there = ", ".join([*sorted(everywhere), *outside])
        raise ConfigError(f"lora keys {', '.join(nothing)} match no module of a layer; known: {there}")
    chosen = {
        name: one
        for name, one in known.items()
        if name in wanted or ((place := places[name]) is not None and place[0] in layers and place[1] in wanted)
    }
    if not chosen:
        raise ConfigError(f"lora keys {keys} match no module of the last {len(layers)} layers")
    return chosen


def _place(name: str, prefix: str) -> tuple[int, str] | None:
    """Number of the layer a module is in, and its path there; None outside the layers."""
    number, _, within = name.removeprefix(prefix).partition(".")
    return (int(number), within) if name.startswith(prefix) and number.isdigit() and within else None


def _check_possible(
    model: nn.Module, modules: Mapping[str, str], stacks: Mapping[str, Any], lora: Mapping[str, Any], dora: bool
) -> None:
    """ConfigError for what mlx-lm does and peft would do otherwise, or not at all."""
    if stacks and (dora or lora["dropout"]):
        raise ConfigError(
            f"{'DoRA' if dora else 'lora_parameters.dropout'} does not reach {next(iter(stacks))}, which is a bare "
            "parameter in transformers; leave it out of lora_parameters.keys, or take plain LoRA without dropout"
        )
    head = model.get_output_embeddings()
    for name, at in modules.items():
        module = model.get_submodule(at)
        if not isinstance(module, nn.Embedding):
            continue
        if head is not None and head.weight is module.weight:
            raise ConfigError(
                f"{name} is the head too, which peft's adapter of it would not reach; leave it out of "
                "lora_parameters.keys, or train on MLX"
            )
        if dora or lora["dropout"]:
            raise ConfigError(
                f"{'DoRA' if dora else 'lora_parameters.dropout'} is another thing for embeddings in peft than in "
                f"mlx-lm; leave {name} out of lora_parameters.keys, or train on MLX"
            )


# --- peft's layers ---


def _with_peft(
    model: nn.Module, modules: Mapping[str, str], lora: Mapping[str, Any], dora: bool
) -> tuple[list[Slot], list[Adapted]]:
    slots, adapted = [], []
    found = dict(zip(modules, wrapped(model, list(modules.values()), lora, dora), strict=True))
    for name, layer in found.items():
        slots += slots_of(name, layer)
        adapted.append(Adapted(name, layer))
    return slots, adapted


# --- bare parameters ---


def _with_parametrisation(
    model: nn.Module, stacks: dict[str, Any], at: tuple[str, str, int], lora: Mapping[str, Any]
) -> tuple[list[Slot], Adapted]:
    """Adapt one parameter; those of its pieces that were asked for are taken out of ``stacks``."""
    path, key, _ = at
    module = model.get_submodule(path)
    weight = getattr(module, key)
    every = expert_pieces(weight, key) if key in PIECES else [("", 0, weight.shape[0])]
    names_of = {index: name for name, one in stacks.items() if (one[0], one[1]) == (path, key) for index in [one[2]]}
    for name in names_of.values():
        del stacks[name]
    if len(names_of) < len(every):
        pieces = ", ".join(piece for piece, _, _ in every)
        raise ConfigError(f"{path}.{key} is one parameter in transformers: adapt all of {pieces}")
    low_rank = LowRank(weight, every, lora["rank"], lora["scale"])
    parametrize.register_parametrization(module, key, low_rank, unsafe=True)
    slots = []
    for index, name in names_of.items():
        slots.append(Slot(f"{name}.lora_a", low_rank.lora_a[index]))
        slots.append(Slot(f"{name}.lora_b", low_rank.lora_b[index]))
    return slots, Adapted(names_of[0], low_rank)


# --- first weights ---


def _first_weights(slots: Sequence[Slot], seed: int) -> None:
    """As mlx-lm draws them: ``lora_a`` uniform within ±1/√inputs, ``lora_b`` zero."""
    draw = torch.Generator().manual_seed(seed)
    for slot in slots:
        kind = slot.name.rpartition(".")[2]
        if kind == "lora_b":
            slot.value.zero_()
        elif kind == "lora_a":
            shape = slot.value.shape
            bound = 1 / math.sqrt(shape[-1] if len(shape) == 3 else shape[0])
            drawn = (2 * torch.rand(shape, generator=draw) - 1) * bound
            slot.value.copy_(drawn)
