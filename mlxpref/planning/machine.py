"""How much memory there is to plan for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxpref.errors import UsageError

SAFE_SHARE = 0.7
"""Of a memory that the system and other programs use as well, how much a run may plan for. Of Apple's unified memory
a GPU may hold two thirds to three quarters."""

SAFE_SHARE_OF_GPU = 0.9
"""The same of a GPU's own memory."""

_UNITS = {"": 1e9, "m": 1e6, "mb": 1e6, "mib": 2**20, "g": 1e9, "gb": 1e9, "gib": 2**30, "t": 1e12, "tb": 1e12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory to fit into.

    Attributes:
        size: all of it, bytes.
        kind: of the device: "metal", "cuda", "cpu", or "given" for a size that was named.
    """

    size: int
    kind: str

    @property
    def usable(self) -> int:
        """Bytes that a run's peak may take."""
        return int(self.size * (SAFE_SHARE_OF_GPU if self.kind == "cuda" else SAFE_SHARE))


def parse_size(text: str) -> Memory:
    """``16GB``, ``16``, ``1.5 GiB`` or ``800MB``. UsageError for anything else."""
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise UsageError(f"--memory {text}: write a size such as 16GB")
    return Memory(int(float(found[1]) * _UNITS[found[2]]), "given")


def memory_of(device: Mapping[str, Any]) -> Memory:
    """The memory of a device, from a backend's ``device_info()``: a GPU's own, else the system's."""
    kind = str(device.get("kind", "cpu"))
    own = device.get("memory_size") or device.get("total_memory")
    if kind in ("cuda", "metal") and own:
        return Memory(int(own), kind)
    return Memory(system_memory(), kind)


def this_machine(machine: ModuleType | None) -> Memory:
    """Of the device a backend computes on; without a backend: of the system."""
    if machine is not None:
        return memory_of(machine.device_info())
    return Memory(system_memory(), "metal" if sys.platform == "darwin" else "cpu")


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may take, in the two versions of control groups; a word where it is all."""


def system_memory() -> int:
    """Bytes of physical memory, or of what a container may take of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in map(Path, _LIMITS):
        said = file.read_text().strip() if file.exists() else ""
        found = min(found, int(said)) if said.isdigit() else found
    return found
