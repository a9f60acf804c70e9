"""What optimisers take, and what of it makes sense: the same for every backend and for the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlxpref.errors import ConfigError, raise_all

_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "bias_correction": True}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adam": _ADAM,
    "adamw": {**_ADAM, "weight_decay": 0.0},
    "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "muon": {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "weight_decay": 0.0},
    "adafactor": {
        "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta_1": None, "scale_parameter": False,
        "relative_step": False, "warmup_init": False, "weight_decay": 0.0,
    },
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.0},
}  # fmt: skip
"""Optimiser → its options, by the names that MLX gives them, and what they are where nobody says."""


def resolve_optimizer(name: str, weight_decay: float, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every option in force, ``weight_decay`` among them where the optimiser has one.

    Raises:
        ConfigError: an unknown optimiser, an option it does not take, a value out of range or without effect, or a
            weight decay it would ignore.
    """
    if name not in DEFAULTS:
        raise ConfigError(f"unknown optimizer {name!r}; one of {', '.join(DEFAULTS)}")
    defaults, given = DEFAULTS[name], dict(options or {})
    takes = sorted(defaults.keys() - {"weight_decay"})
    if unknown := sorted(given.keys() - set(takes)):
        raise ConfigError(f"optimizer {name} takes no {', '.join(unknown)}; it takes {', '.join(takes)}")
    if weight_decay and "weight_decay" not in defaults:
        raise ConfigError(f"optimizer {name} has no weight decay; set weight_decay: 0 or use adamw")
    raise_all(list(option_problems(name, {**given, "weight_decay": weight_decay})), ConfigError, f"optimizer {name}:")
    return {**defaults, **given, **({"weight_decay": weight_decay} if "weight_decay" in defaults else {})}


def option_problems(name: str, given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values of an optimiser's options, and which of them would do nothing."""
    options = {**DEFAULTS[name], **given}
    for option, value in given.items():
        needed, good = _VALUES.get((name, option)) or _VALUES.get(option, _FLAG)
        if not good(value):
            yield f"{option} is {value!r}: {needed} needed"
    if options.get("dampening") and not options["momentum"]:
        yield "dampening damps a momentum, which is 0: set momentum, or leave dampening out"
    if name == "sgd" and options["nesterov"] and (options["dampening"] or not options["momentum"]):
        yield "nesterov needs a momentum above 0 and no dampening"
    if options.get("warmup_init") and not options["relative_step"]:
        yield "warmup_init is a part of relative_step: use the schedule's warmup_steps"


def _within(low: float, below: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value < below


def _two(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(good, value))


_FLAG = ("true or false is", lambda value: isinstance(value, bool))
_FROM_ZERO = ("a number from 0 is", _within(0, math.inf))
_VALUES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    "betas": ("two numbers from 0 to below 1 are", _two(_within(0, 1))),
    "beta_1": ("a number from 0 to below 1, or none, is", lambda value: value is None or _within(0, 1)(value)),
    "eps": _FROM_ZERO,
    ("adafactor", "eps"): ("two numbers from 0 are", _two(_within(0, math.inf))),
    "momentum": _FROM_ZERO,
    "dampening": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "ns_steps": ("a whole number from 1 is", lambda value: type(value) is int and value >= 1),
    "clip_threshold": ("a number above 0 is", lambda value: _within(0, math.inf)(value) and value > 0),
    "decay_rate": ("a number up to 0 is", lambda value: _within(-math.inf, math.inf)(value) and value <= 0),
}
"""What an option's value must be, in words and as a test; any other option is a flag."""
