"""What contestants on MLX share: a model with the LoRA start, an optimiser, the memory gauge."""

from __future__ import annotations

from mlxpref import blas

RECORD = blas.preload()  # before mlx.core; the same library for all

from typing import Any  # noqa: E402 - after the BLAS

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402 - after the BLAS
import mlx.optimizers as optim  # noqa: E402 - after the BLAS
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402 - after the BLAS

from bench.spine import LORA, start  # noqa: E402 - after the BLAS
from bench.worker import Gate, Task  # noqa: E402 - after the BLAS
from mlxpref.mlx_backend import compiler  # noqa: E402 - after the BLAS

compiler.prepare()


def base_model(task: Task) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, as mlx-lm loads them."""
    from mlx_lm.utils import load

    return load(task.model)


def with_lora(model: nn.Module, task: Task) -> nn.Module:
    """The same model, frozen but for LoRA on every linear module, at the common start."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in start(task).items()]))
    model.train()
    mx.eval(model.parameters())
    return model


def adamw(task: Task) -> optim.Optimizer:
    return optim.AdamW(learning_rate=task.learning_rate, weight_decay=task.weight_decay, bias_correction=True)


class Keep(optim.Optimizer):
    """Moves nothing and keeps the last gradient as its state, so that a whole step gives its gradient away."""

    def __init__(self) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", 0.0)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        state["kept"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        state["kept"] = gradient
        return parameter

    def gradients(self) -> dict[str, mx.array]:
        leaves = tree_flatten(self.state)
        return {name.removesuffix(".kept"): value for name, value in leaves if name.endswith(".kept")}


def n_bytes(model: nn.Module | None) -> int:
    return 0 if model is None else sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def equip(gate: Gate, weights: int, reference: int = 0) -> None:
    """Tell the gate how MLX counts memory, and what is loaded.

    Args:
        weights: bytes of the model with its adapter.
        reference: bytes of a second model.
    """
    gate.facts |= {"weights": weights, "reference": reference, "blas": RECORD.said}
    gate.reset_peak, gate.peak = mx.reset_peak_memory, mx.get_peak_memory
    mx.clear_cache()
