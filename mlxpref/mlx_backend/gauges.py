"""Time and memory of one call, and what stays in memory between calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxpref.mlx_backend.policy import Policy, dtype_name


def measured(call: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds a call takes, its results included, and bytes it needed at once beyond those held before it.

    The call has to evaluate what it computes. None for the bytes where they are not counted: never here.
    """
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    call()
    mx.synchronize()
    return time.perf_counter() - start, mx.get_peak_memory() - before


def weight_bytes(policy: Policy) -> int:
    """Of the base model: all that is loaded but the adapter's own parameters."""
    trained = set(policy.trainable()) if policy.fine_tune_type != "full" else set()
    return sum(value.nbytes for name, value in tree_flatten(policy.model.parameters()) if name not in trained)


def state_bytes(policy: Policy, step: Any) -> int:
    """Of what training keeps beside the base: the trained parameters in both precisions, the optimiser's moments."""
    held = {id(value): value.nbytes for value in (*policy.masters.values(), *policy.trainable().values())}
    if policy.fine_tune_type == "full":
        held = {id(value): value.nbytes for value in policy.masters.values()}
    moments = (value for _, value in tree_flatten(step.optimizer.state) if isinstance(value, mx.array))
    return sum(held.values()) + sum(value.nbytes for value in moments)


def dtype_of(policy: Policy) -> str:
    """Name of what the model computes in."""
    return dtype_name(policy.model)
