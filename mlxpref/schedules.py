"""The learning rate as a function of the step: nothing remembered, so nothing to resume.

Conventions are those of transformers' schedulers, which TRL uses: steps count from 0, the warm-up
is linear from 0, so the first update of a run with warm-up has rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mlxpref.errors import ConfigError

Schedule = Callable[[int], float]


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


DECAYS: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
"""Share of the way from ``end`` up to the full rate, by progress after the warm-up (0 to 1)."""


def n_warmup(n_steps: int, *, warmup_steps: int | None = None, warmup_ratio: float | None = None) -> int:
    """Warm-up steps of a run: as given, or a share of its steps, rounded up.

    Raises:
        ConfigError: the warm-up is not shorter than the run, which would never reach its rate.
    """
    n = warmup_steps if warmup_steps is not None else math.ceil(n_steps * (warmup_ratio or 0.0))
    if n and n >= n_steps:
        raise ConfigError(
            f"optimizer.schedule: a warm-up of {n} steps in a run of {n_steps} never reaches the learning "
            "rate: lower warmup_steps or warmup_ratio, or train longer"
        )
    return n


def make_schedule(
    name: str, *, learning_rate: float, n_steps: int, warmup: int = 0, end: float | None = None
) -> Schedule:
    """step (from 0) → learning rate.

    Args:
        name: constant, linear or cosine: the way down after the warm-up.
        learning_rate: the highest rate.
        n_steps: optimiser steps of the whole run.
        warmup: steps of linear rise from 0.
        end: the rate that step ``n_steps`` would have; None is 0.

    Raises:
        ConfigError: unknown name.
    """
    if name not in DECAYS:
        raise ConfigError(f"optimizer.schedule.name {name!r}: one of {', '.join(DECAYS)}")
    decay, low = DECAYS[name], end or 0.0

    def rate(step: int) -> float:
        if step < warmup:
            return learning_rate * step / warmup
        progress = (step - warmup) / max(1, n_steps - warmup)
        return low + (learning_rate - low) * decay(min(1.0, progress))

    return rate
