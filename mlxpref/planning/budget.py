"""``batching.micro_batch_tokens: auto``: the largest micro-batches whose predicted peak fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxpref.errors import ConfigError
from mlxpref.planning.forecast import Job, forecast
from mlxpref.planning.machine import Memory

SIZES = tuple(64 * round(16 * 2 ** (step / 4) / 2) for step in range(29))
"""Budgets there are to choose from: 512 to 65,536 tokens, four to each doubling."""


def largest_that_fits(fits: Callable[[int], bool], sizes: Sequence[int] = SIZES) -> int | None:
    """The largest of ascending ``sizes`` for which this holds; None if it holds for none. A larger budget is taken to
    need at least as much."""
    low, high = -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def choose_tokens(job: Job, memory: Memory) -> int:
    """``micro_batch_tokens`` for this memory: a function of configuration, data, model and memory size.

    Raises:
        ConfigError: not even the smallest fits.
    """
    found = largest_that_fits(lambda tokens: forecast(job, tokens=tokens).total <= memory.usable)
    if found is None:
        need = forecast(job, tokens=SIZES[0]).total
        raise ConfigError(
            f"batching.micro_batch_tokens auto: {SIZES[0]} tokens would take {need / 1e9:.1f} GB, and "
            f"{memory.usable / 1e9:.1f} of {memory.size / 1e9:.1f} GB may be used; mlxpref plan says what to change"
        )
    return found
