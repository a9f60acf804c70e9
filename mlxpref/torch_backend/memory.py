"""Device facts, and memory as a run reports it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

GB = 1e9


def device_info() -> dict[str, Any]:
    """What PyTorch says of its device: name, kind ("cuda", "cpu"), memory in bytes where it is the device's own."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return {"backend": "torch", "kind": "cuda", "device_name": found.name, "memory_size": found.total_memory}
    return {"backend": "torch", "kind": "cpu", "device_name": f"{torch.get_num_threads()} threads"}


def memory() -> dict[str, float]:
    """GB held now (active), at most since the run began (peak), and kept for reuse (cache).

    On a CPU PyTorch does not count: there it is the process's memory, and the most it ever had.
    """
    if torch.cuda.is_available():
        held, kept = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return {"peak": torch.cuda.max_memory_allocated() / GB, "active": held / GB, "cache": (kept - held) / GB}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak": most / GB, "active": _resident(most) / GB, "cache": 0.0}


def _resident(otherwise: int) -> int:
    """Bytes of the process in memory now, where the system says so."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return otherwise


@contextmanager
def set_memory_policy() -> Iterator[None]:
    """Count the peak from here on. PyTorch's allocator needs no limits."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
