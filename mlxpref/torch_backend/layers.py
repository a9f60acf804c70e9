"""Layers with a low-rank term: peft's around modules, and a parametrisation of bare parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlxpref.errors import ConfigError
from mlxpref.torch_backend.slots import Slot, transposed


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
        turned = embeds(layer)
        a, b = (one.detach() for one in factors(layer))
        product = layer.scaling["default"] * (b @ a)
        delta = product.T if turned else product
        if "default" not in layer.lora_magnitude_vector:
            return delta
        weight = base_weight(layer)
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
        looked_up, scale = embeds(self.module), getattr(self.module.get_base_layer(), "embed_scale", 1.0)

        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            more = shift[given[0]] * scale if looked_up else given[0].float() @ shift.T
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


# --- peft's layers ---


def wrapped(model: nn.Module, places: Sequence[str], lora: Mapping[str, Any], dora: bool) -> list[BaseTunerLayer]:
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
            layer.scaling["default"] = lora["scale"]  # not alpha / rank, which may round
            if dora:
                layer.lora_variant["default"] = _Dora
            elif type(layer) is Linear and type(layer.get_base_layer()) is nn.Linear:
                layer.__class__ = _Linear
            model.set_submodule(at, layer)
            found[at] = layer
    return [found[at] for at in places]


def slots_of(name: str, layer: Any) -> Iterator[Slot]:
    """The factors of one of peft's layers, in float32 whatever the model's dtype."""
    a, b = factors(layer)
    a.data, b.data = a.data.float(), b.data.float()
    yield Slot(f"{name}.lora_a", a, transposed)
    yield Slot(f"{name}.lora_b", b, transposed)
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight
        # Rounded to the model's dtype, as peft makes them, the policy would not start as its reference.
        magnitude.data = base_weight(layer).norm(dim=1)
        yield Slot(f"{name}.m", magnitude)


def base_weight(layer: Any) -> Tensor:
    """(outputs, inputs) float32 of what peft's layer wraps."""
    base = layer.get_base_layer()
    held = dequantize_module_weight(base).detach().float()
    return held.T if isinstance(base, Conv1D) else held


class _Linear(Linear):
    """peft's layer around a linear module that stays as it is, in one operation and in the module's dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, dropout = self.base_layer, self.lora_dropout["default"]
        if self.disable_adapters or base.weight.requires_grad or args or kwargs:
            return super().forward(x, *args, **kwargs)
        a, b = factors(self)
        dropped = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
        return _WithTerm.apply(x, dropped, base.weight, base.bias, a, b, self.scaling["default"])


class _WithTerm(torch.autograd.Function):
    """x Wᵀ + bias + scale · z Aᵀ Bᵀ, where z is x, or x with some entries dropped.

    Written out because autograd would keep and add up an array of the outputs' or inputs' size for each term.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """x (…, inputs), weight (outputs, inputs), A (r, inputs), B (outputs, r) → (…, outputs)."""
        read = (x if dropped is None else dropped).flatten(0, -2)
        low = read @ a.to(x.dtype).T
        found = nn.functional.linear(x.flatten(0, -2), weight, bias)
        found.addmm_(low, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(read, low, weight, a, b)
        ctx.scale, ctx.apart, ctx.shape = scale, dropped is not None, x.shape
        return found.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        read, low, weight, a, b = ctx.saved_tensors
        slope = cotangents[0].flatten(0, -2)
        lower = slope @ b.to(slope.dtype) * ctx.scale
        of_a = (lower.T @ read).to(a.dtype)
        of_b = (low.T @ slope).T.mul(ctx.scale).to(b.dtype)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = slope @ weight
            if not ctx.apart:
                of_x.addmm_(lower, a.to(slope.dtype))
            of_x = of_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            of_dropped = (lower @ a.to(slope.dtype)).view(ctx.shape)
        return of_x, of_dropped, None, None, of_a, of_b, None


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


def embeds(layer: Any) -> bool:
    return "default" in layer.lora_embedding_A


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, inputs) and B (outputs, r)."""
    if embeds(layer):
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
