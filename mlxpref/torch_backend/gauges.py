"""Time and memory of one call, and what stays in memory between calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mlxpref.torch_backend.policy import Policy


def measured(call: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds a call takes, and bytes it needed at once beyond those held before it; None on a CPU, where PyTorch
    does not count."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def weight_bytes(policy: Policy) -> int:
    """Of the base model: all that is loaded but the adapter's own parameters."""
    own = {id(slot.parameter) for slot in policy.slots.values()} if policy.fine_tune_type != "full" else set()
    return sum(one.nbytes for one in policy.model.parameters() if id(one) not in own)


def state_bytes(policy: Policy, step: Any) -> int:
    """Of what training keeps beside the base: the trained parameters in both precisions, the optimiser's moments."""
    held = [*policy.masters.values()]
    if policy.fine_tune_type != "full":
        held += [slot.parameter for slot in policy.slots.values()]
    of = {one.data_ptr(): one.nbytes for one in held}  # float32 masters are the parameters themselves
    return sum(of.values()) + sum(one.nbytes for one in step.optimizer.state().values())


def dtype_of(policy: Policy) -> str:
    """Name of what the model computes in."""
    return str(policy.model.dtype).removeprefix("torch.")
