"""MLX's optimisers under the names of the configuration, with bias correction said explicitly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxpref.optimizer_options import resolve_optimizer

_KINDS: dict[str, Any] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "sgd": optim.SGD,
    "muon": optim.Muon,
    "adafactor": optim.Adafactor,
    "lion": optim.Lion,
}


def make_optimizer(name: str, weight_decay: float, options: Mapping[str, Any] | None) -> optim.Optimizer:
    """An optimiser whose learning rate is set from outside at every step.

    Adam and AdamW correct their bias, as the paper and PyTorch do (MLX's own default does not).

    Adafactor's learning rate is the schedule's alone, not also its own relative step.

    Raises:
        ConfigError: see ``resolve_optimizer``.
    """
    arguments = resolve_optimizer(name, weight_decay, options)
    return _KINDS[name](learning_rate=mx.array(0.0), **arguments)
