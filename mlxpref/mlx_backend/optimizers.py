"""MLX's optimisers under the names of the configuration, with bias correction said explicitly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxpref.optimizer_options import resolve_optimizer


class _Adam(optim.Adam):
    """MLX's, its bias corrections exact: 1 − 0.999ᵗ in float32 makes all early updates short by some 6e-6 of them."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        if not self.bias_correction:
            return super().apply_single(gradient, parameter, state)
        (fast, slow), step = self.betas, self.step.astype(mx.float32)
        m = state["m"] = fast * state["m"] + (1 - fast) * gradient
        v = state["v"] = slow * state["v"] + (1 - slow) * mx.square(gradient)
        rate = self.learning_rate / _missing(fast, step)
        return parameter - rate * m / (mx.sqrt(v / _missing(slow, step)) + self.eps)


class _AdamW(optim.AdamW, _Adam):
    """Decays in AdamW, and moves in the Adam above."""


def _missing(beta: float, step: mx.array) -> mx.array | float:
    """1 − βᵗ: how much of a mean over all steps the first t make up."""
    return -mx.expm1(step * math.log(beta)) if beta else 1.0


_KINDS: dict[str, Any] = {
    "adam": _Adam,
    "adamw": _AdamW,
    "sgd": optim.SGD,
    "muon": optim.Muon,
    "adafactor": optim.Adafactor,
    "lion": optim.Lion,
}


def make_optimizer(name: str, weight_decay: float, options: Mapping[str, Any] | None) -> optim.Optimizer:
    """An optimiser whose learning rate is set from outside at every step.

    Adam and AdamW correct their bias, as the paper and PyTorch do (MLX's own default does not). Adafactor's
    learning rate is the schedule's alone, not also its own relative step.

    Raises:
        ConfigError: see ``resolve_optimizer``.
    """
    arguments = resolve_optimizer(name, weight_decay, options)
    return _KINDS[name](learning_rate=mx.array(0.0), **arguments)
