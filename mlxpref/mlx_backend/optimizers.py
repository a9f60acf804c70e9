"""MLX's optimisers under the names of the configuration, with bias correction said explicitly."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxpref.errors import ConfigError

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

    Raises:
        ConfigError: an unknown optimiser, an option it does not take, or a weight decay it would ignore.
    """
    if name not in _KINDS:
        raise ConfigError(f"unknown optimizer {name!r}; one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    takes = set(inspect.signature(kind.__init__).parameters) - {"self", "learning_rate"}
    arguments = dict(options or {})
    unknown = sorted(set(arguments) - takes)
    if unknown:
        raise ConfigError(f"optimizer {name} takes no {', '.join(unknown)}; it takes {', '.join(sorted(takes))}")
    if weight_decay and "weight_decay" not in takes:
        raise ConfigError(f"optimizer {name} has no weight decay; set weight_decay: 0 or use adamw")
    if "weight_decay" in takes:
        arguments["weight_decay"] = weight_decay
    if "bias_correction" in takes:
        arguments.setdefault("bias_correction", True)
    if name == "adafactor":
        # The learning rate is the schedule's alone, not also the optimiser's own relative step.
        arguments.setdefault("relative_step", False)
        arguments.setdefault("scale_parameter", False)
    return kind(learning_rate=mx.array(0.0), **arguments)
