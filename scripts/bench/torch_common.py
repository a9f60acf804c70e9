"""What contestants on PyTorch share: the gauge of memory, by the process's resident set."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from bench.worker import Gate, Task


def prepare(task: Task) -> None:
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)


def resident(which: str = "VmRSS") -> float:
    """Bytes of the process in memory now, or with "VmHWM" at most since ``reset_resident``; 0 where /proc is not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(which + ":")), 0.0)


def reset_resident() -> None:
    with suppress(OSError):  # no such thing here, or not allowed: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def equip(gate: Gate, loaded: float) -> None:
    """Tell the gate how memory is counted: ``loaded`` bytes were resident when the model had been loaded.

    PyTorch's allocator on a CPU counts nothing, so what is counted is the growth of the resident set.
    """
    gate.facts |= {"weights": loaded, "reference": 0, "memory": "resident set"}
    gate.reset_peak, gate.peak = reset_resident, lambda: resident("VmHWM")
