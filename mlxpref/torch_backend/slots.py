"""What trains, under mlx-lm's names and in mlx-lm's layouts, whatever the layers here make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlxpref import names
from mlxpref.torch_backend.sharding import local, sliced, whole


def _same(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """The last two axes exchanged; shares memory."""
    return tensor.transpose(-2, -1)


@dataclass(frozen=True, slots=True)
class Slot:
    """One trainable tensor.

    Attributes:
        name: mlx-lm's, for example ``model.layers.3.self_attn.q_proj.lora_a``.
        parameter: which holds it.
        view: from the parameter's shape to mlx-lm's; shares memory, so that writing to it writes the parameter.
    """

    name: str
    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor] = _same

    @property
    def shape(self) -> tuple[int, ...]:
        """In mlx-lm's layout; the whole tensor's."""
        return tuple(self.view(torch.empty(self.parameter.shape, device="meta")).shape)

    @property
    def value(self) -> Tensor:
        """In mlx-lm's layout; shares memory with the parameter. Of a sharded one this worker's slice."""
        return self.view(local(self.parameter.detach()))

    @property
    def gradient(self) -> Tensor:
        """float32, in mlx-lm's layout; zeros where nothing reached it. Of a sharded one this worker's slice."""
        found = self.parameter.grad
        return self.view(local(torch.zeros_like(self.parameter) if found is None else found)).float()

    def gathered(self, value: Tensor) -> Tensor:
        """The whole of a slice that looks like ``value``; of a parameter that is not sharded, ``value`` itself."""
        return whole(value, self.parameter, self.view)

    def sliced(self, value: Tensor) -> Tensor:
        """This worker's slice of a whole tensor in mlx-lm's layout."""
        return sliced(value, self.parameter, self.view)


def weight_slots(model: nn.Module, chosen: Callable[[str], bool], model_type: str) -> list[Slot]:
    """Slots of whole weights, for those parameters whose name here is chosen.

    A parameter that fuses two matrices of a layer of experts becomes two slots.
    """
    modules = dict(model.named_modules())
    found = []
    for name, parameter in model.named_parameters():
        if not chosen(name):
            continue
        owner, _, last = name.rpartition(".")
        if last in PIECES and parameter.ndim == 3:
            for piece, start, stop in expert_pieces(parameter, last):
                found.append(Slot(f"{expert_name(owner, model_type)}.{piece}.weight", parameter, _rows(start, stop)))
        else:
            view = transposed if isinstance(modules[owner], Conv1D | nn.Conv1d) and parameter.ndim > 1 else _same
            found.append(Slot(names.to_mlx(name, model_type), parameter, view))
    return found


PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters (experts, outputs, inputs) of a layer of experts, and the matrices of mlx-lm that they hold."""


def expert_pieces(parameter: Tensor, name: str) -> list[tuple[str, int, int]]:
    """(mlx-lm's matrix, first output, end) of a parameter of experts."""
    size = parameter.shape[1] // len(PIECES[name])
    return [(piece, index * size, (index + 1) * size) for index, piece in enumerate(PIECES[name])]


def expert_name(module: str, model_type: str) -> str:
    """mlx-lm's path of the layer of experts that is ``module`` here."""
    return names.to_mlx(f"{module.removesuffix('.experts')}.switch_mlp", model_type)


def _rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[:, start:stop]


def is_quantised(module: Any) -> bool:
    """Whether a linear module holds packed weights (bitsandbytes)."""
    return hasattr(module.weight, "quant_state")
