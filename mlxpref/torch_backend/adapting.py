"""LoRA and DoRA by peft, on the modules that mlx-lm would adapt, with its first weights.

What is a linear module in mlx-lm and a bare parameter in transformers (routers, stacks of experts) gets its
low-rank term through PyTorch's parametrisations instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from mlxpref import names
from mlxpref.errors import AdapterError, ConfigError
from mlxpref.torch_backend.slots import PIECES, Slot, expert_name, expert_pieces, transposed


@dataclass(frozen=True, slots=True)
class Adapted:
    """A module, or a bare parameter, with a low-rank term that can be taken out.

    Attributes:
        name: of the module in mlx-lm's model (of the first piece, for a stack of experts).
        module: peft's layer, or the parametrisation of a bare parameter.
    """

    name: str
    module: Any

    def switch(self, on: bool) -> None:
        """Put the term in or take it out."""
        if isinstance(self.module, LowRank):
            self.module.enabled = on
        else:
            self.module.enable_adapters(on)

    def delta(self) -> Tensor:
        """What the adapter adds to the weights, float32, in their shape: (outputs, inputs), embeddings (n, d)."""
        layer = self.module
        if isinstance(layer, LowRank):
            return layer.delta().detach()
        embeds = _embeds(layer)
        a, b = (one.detach() for one in _factors(layer))
        product = layer.scaling["default"] * (b @ a)
        delta = product.T if embeds else product
        if "default" not in layer.lora_magnitude_vector:
            return delta
        weight = _base_weight(layer)
        whole = weight + delta
        return (layer.lora_magnitude_vector["default"].weight.detach() / whole.norm(dim=1))[:, None] * whole - weight

    @contextmanager
    def shifted(self, shift: Tensor) -> Iterator[None]:
        """Within this context the base's weights, the term out, are other by ``shift``."""
        if isinstance(self.module, LowRank):
            self.module.shift = shift
            try:
                yield
            finally:
                self.module.shift = None
            return
        embeds, scale = _embeds(self.module), getattr(self.module.get_base_layer(), "embed_scale", 1.0)

        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            more = shift[given[0]] * scale if embeds else given[0].float() @ shift.T
            return out + more.to(out.dtype)

        hook = self.module.register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


class LowRank(nn.Module):
    """Adds ``scale · (a b)ᵀ`` to a weight (outputs, inputs), or to pieces of a stack (experts, outputs, inputs).

    Attributes:
        pieces: (name, first output, end) of each term.
        shift: in place of the terms, what a moving reference's weights differ by; None without one.
    """

    def __init__(self, weight: Tensor, pieces: Sequence[tuple[str, int, int]], rank: int, scale: float):
        super().__init__()
        self.pieces, self.scale, self.enabled = list(pieces), scale, True
        self.shift: Tensor | None = None
        inputs, device = weight.shape[-1], weight.device
        experts = weight.shape[:-2]
        a_shape, b_shape = ((rank, inputs), (rank,)) if experts else ((inputs, rank), (rank,))
        self.lora_a, self.lora_b = nn.ParameterList(), nn.ParameterList()
        for _, start, stop in pieces:
            size = stop - start
            b = (*experts, size, *b_shape) if experts else (*b_shape, size)
            self.lora_a.append(torch.zeros(*experts, *a_shape, device=device))
            self.lora_b.append(torch.zeros(*b, device=device))

    def delta(self) -> Tensor:
        """What the terms add, in the weight's shape, float32."""
        found = []
        for a, b in zip(self.lora_a, self.lora_b, strict=True):
            found.append(self.scale * (b @ a if a.ndim == 3 else (a @ b).T))
        return torch.cat(found, -2)

    def forward(self, weight: Tensor) -> Tensor:
        if self.shift is not None:
            return weight + self.shift.to(weight.dtype)
        return weight + self.delta().to(weight.dtype) if self.enabled else weight


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
    wrapped = dict(zip(modules, _wrapped(model, list(modules.values()), lora, dora), strict=True))
    for name, layer in wrapped.items():
        layer.scaling["default"] = lora["scale"]  # not alpha / rank, which may round
        if dora:
            layer.lora_variant["default"] = _Dora
        slots += _slots_of(name, layer)
        adapted.append(Adapted(name, layer))
    return slots, adapted


def _wrapped(model: nn.Module, places: Sequence[str], lora: Mapping[str, Any], dora: bool) -> list[BaseTunerLayer]:
    """peft's layers around the modules at these places, put where those were.

    peft sees the modules alone, under names of no meaning: in a model that it knows it would take the names of some
    (a shared expert's ``gate_proj``) for those of others, and adapt these.
    """
    found: dict[str, BaseTunerLayer] = {}
    for transposed_weights in (False, True):
        here = [at for at in places if isinstance(model.get_submodule(at), Conv1D) == transposed_weights]
        if not here:
            continue
        apart = nn.ModuleDict({f"module_{index}": model.get_submodule(at) for index, at in enumerate(here)})
        apart.is_loaded_in_4bit = getattr(model, "is_loaded_in_4bit", False)
        config = LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["scale"] * lora["rank"],
            lora_dropout=lora["dropout"],
            target_modules=list(apart),
            use_dora=dora,
            fan_in_fan_out=transposed_weights,
        )
        inject_adapter_in_model(config, apart)
        for at, layer in zip(here, apart.values(), strict=True):
            model.set_submodule(at, layer)
            found[at] = layer
    return [found[at] for at in places]


def _slots_of(name: str, layer: Any) -> Iterator[Slot]:
    """The factors of one of peft's layers, in float32 whatever the model's dtype."""
    a, b = _factors(layer)
    a.data, b.data = a.data.float(), b.data.float()
    yield Slot(f"{name}.lora_a", a, transposed)
    yield Slot(f"{name}.lora_b", b, transposed)
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight
        # Rounded to the model's dtype, as peft makes them, the policy would not start as its reference.
        magnitude.data = _base_weight(layer).norm(dim=1)
        yield Slot(f"{name}.m", magnitude)


def _base_weight(layer: Any) -> Tensor:
    """(outputs, inputs) float32 of what peft's layer wraps."""
    base = layer.get_base_layer()
    held = dequantize_module_weight(base).detach().float()
    return held.T if isinstance(base, Conv1D) else held


class _Dora(DoraLinearVariant):
    """DoRA whose dropout is in the low-rank term alone, as mlx-lm has it; peft drops the base's inputs as well."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        more = module.lora_magnitude_vector[active_adapter](
            module.lora_dropout[active_adapter](x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result,
            adapter_name=active_adapter,
        )
        return result + more


def _embeds(layer: Any) -> bool:
    return "default" in layer.lora_embedding_A


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, inputs) and B (outputs, r)."""
    if _embeds(layer):
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@torch.no_grad()
def check_reached(model: nn.Module, adapted: Sequence[Adapted]) -> None:
    """ConfigError for modules that a forward pass of training goes past: a kernel took their weights, so that an
    adapter there would do nothing."""
    missed = {one.name for one in adapted if not isinstance(one.module, LowRank)}
    hooks = [
        one.module.register_forward_hook(lambda *_, name=one.name: missed.discard(name))
        for one in adapted
        if one.name in missed
    ]
    try:
        model.train()
        model(input_ids=torch.arange(1, 9, device=model.get_input_embeddings().weight.device)[None], use_cache=False)
    finally:
        model.eval()
        for hook in hooks:
            hook.remove()
    if missed:
        raise ConfigError(
            f"{type(model).__name__} reads the weights of {', '.join(sorted(missed)[:5])} without calling the module: "
            "an adapter there would do nothing; leave it out of lora_parameters.keys"
        )


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
