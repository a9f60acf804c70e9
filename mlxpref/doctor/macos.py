"""What only a Mac can have: Rosetta, the limit of wired memory, a display that wants the GPU too.

The checks are functions of given facts; :func:`look` gathers those of this machine.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxpref.doctor.check import Check

OLDEST = (14, 0)
"""macOS that MLX's wheels are made for, by its installation page."""

WIRES = (15, 0)
"""macOS from which MLX can keep memory wired, by its documentation."""

SYSTEM_SHARE = 0.1
"""Of memory: what should be left to the system when everything else is wired."""

NATIVE = "install a Python for arm64 (python.org, Homebrew in /opt/homebrew, or conda for osx-arm64)"


@dataclass(frozen=True, slots=True)
class Mac:
    """Facts of a Mac.

    Attributes:
        version: of macOS, such as "15.3.1".
        machine: what Python was built for: "arm64" or "x86_64".
        translated: the process runs under Rosetta; None where the system does not say.
        wired_limit_mb: ``iogpu.wired_limit_mb``, MiB; 0 is the system's default; None where not known.
        recommended: bytes of the GPU's recommended working set, by MLX; None without it.
        memory: bytes in all, by MLX; None without it.
    """

    version: str
    machine: str
    translated: bool | None = None
    wired_limit_mb: int | None = None
    recommended: int | None = None
    memory: int | None = None


def look(device: Mapping[str, Any]) -> Mac:
    """The facts of this machine; ``device`` is the backend's ``device_info()`` or empty."""
    translated, limit = _sysctl("sysctl.proc_translated"), _sysctl("iogpu.wired_limit_mb")
    return Mac(
        version=platform.mac_ver()[0],
        machine=platform.machine(),
        translated=None if translated is None else translated == 1,
        wired_limit_mb=limit,
        recommended=device.get("max_recommended_working_set_size"),
        memory=device.get("memory_size"),
    )


def _sysctl(name: str) -> int | None:
    try:
        ran = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
        return int(ran.stdout)
    except (OSError, ValueError):
        return None


def checks(mac: Mac) -> Iterator[Check]:
    """All of them."""
    yield check_processor(mac)
    yield check_version(mac)
    yield from check_wired(mac)
    yield LONG_RUNS


def check_processor(mac: Mac) -> Check:
    """MLX is for Apple silicon, and for a Python that was built for it."""
    if mac.machine == "arm64":
        return Check("processor", "ok", "Apple silicon, Python built for it")
    if mac.translated:
        return Check("processor", "fail", f"Python is built for {mac.machine} and runs under Rosetta", NATIVE)
    remedy = f"on an Apple silicon Mac, {NATIVE}; an Intel Mac cannot run MLX"
    return Check("processor", "fail", f"Python is built for {mac.machine}; MLX needs arm64", remedy)


def check_version(mac: Mac) -> Check:
    """Which macOS."""
    number = tuple(int(part) for part in mac.version.split(".")[:2] if part.isdigit())
    if not number:
        return Check("macOS", "warn", f"unknown version {mac.version!r}", "MLX needs macOS 14 or newer")
    if number < OLDEST:
        return Check("macOS", "fail", f"{mac.version}; MLX needs 14.0 or newer", "update macOS")
    if number < WIRES:
        said = f"{mac.version}: MLX cannot keep memory wired before 15.0, so large models may be slow"
        return Check("macOS", "warn", said, "update macOS to 15 or newer for models that fill the memory")
    return Check("macOS", "ok", mac.version)


def check_wired(mac: Mac) -> Iterator[Check]:
    """How much memory the GPU may keep, and what that leaves to the system."""
    if mac.recommended is None:
        return
    limit, memory = mac.wired_limit_mb, mac.memory
    how = "not known" if limit is None else "the system's default" if limit == 0 else f"{limit} MB"
    of = f" of {memory / 1e9:.1f}" if memory else ""
    said = f"MLX may wire {mac.recommended / 1e9:.1f} GB{of} (iogpu.wired_limit_mb: {how})"
    if memory and limit and limit * 2**20 > (1 - SYSTEM_SHARE) * memory:
        remedy = "lower it (sudo sysctl iogpu.wired_limit_mb=0 is the default): a Mac without free memory may crash"
        yield Check("wired limit", "warn", f"{said} leaves the system little", remedy)
    else:
        yield Check(
            "wired limit", "ok", said,
            "for a larger model: sudo sysctl iogpu.wired_limit_mb=MEGABYTES, well below the memory; it lasts until "
            "the next start",
        )  # fmt: skip


LONG_RUNS = Check(
    "long runs",
    "ok",
    "a Mac that falls asleep stops a run. Users of MLX have also reported that macOS ended GPU work while the display "
    'was on ("Impacting Interactivity" in the message), and that it went through with the display asleep',
    "caffeinate -i mlxpref train …, and let the display sleep (pmset displaysleepnow; not caffeinate -d, which "
    "keeps it on). A run that was ended goes on from its last checkpoint with --resume",
)
"""Advice, not a measurement."""
