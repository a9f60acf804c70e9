"""``batching.micro_batch_tokens: auto``: the largest micro-batches whose predicted peak fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from mlxpref.errors import ConfigError
from mlxpref.planning.forecast import Forecast, Job, forecast
from mlxpref.planning.machine import Memory

SIZES = tuple(64 * round(16 * 2 ** (step / 4) / 2) for step in range(29))
"""Budgets there are to choose from: 512 to 65,536 tokens, four to each doubling."""


def largest_that_fits(job: Job, memory: Memory, sizes: Sequence[int] = SIZES) -> Forecast | None:
    """Of the largest budget, of ascending ``sizes``, with which the run fits; None if it fits with none."""

    @cache
    def predicted(size: int) -> Forecast:
        return forecast(job, tokens=size)

    at = bisected(lambda size: predicted(size).without_graphs <= memory.usable, sizes)
    fitting = (found for size in reversed(sizes[:at]) if (found := predicted(size)).total <= memory.usable)
    return next(fitting, None)


def bisected(holds: Callable[[int], bool], sizes: Sequence[int]) -> int:
    """How many of ascending ``sizes`` this holds for, which are the first ones."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(sizes[middle]) else (low, middle)
    return low


def choose_tokens(job: Job, memory: Memory) -> int:
    """``micro_batch_tokens`` for this memory: a function of configuration, data, model and memory size.

    Raises:
        ConfigError: not even the smallest fits.
    """
    found = largest_that_fits(job, memory)
    if found is None:
        need = forecast(job, tokens=SIZES[0]).total
        raise ConfigError(
            f"batching.micro_batch_tokens auto: {SIZES[0]} tokens would take {need / 1e9:.1f} GB, and "
            f"{memory.usable / 1e9:.1f} of {memory.size / 1e9:.1f} GB may be used; mlxpref plan says what to change"
        )
    return found.tokens
