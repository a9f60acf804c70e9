"""What a machine is made of: device, memory, BLAS, compiler, versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mlxpref import blas
from mlxpref.doctor.check import Check
from mlxpref.facts import packages

SLOW = 20.0
"""GFLOP/s under which a CPU is most likely on the reference BLAS."""

LITTLE_MEMORY = 4.0
"""GB; a 0.6B model in float32 takes 2.4 before anything is computed."""

REPAIR = "pip install --upgrade 'mlxpref[cpu]' on Linux, 'mlxpref[cuda]' with an NVIDIA GPU, mlxpref on a Mac"


def facts(backend: ModuleType | None = None, *, speed: bool = True) -> dict[str, Any]:
    """Facts of this machine, JSON-safe.

    Args:
        backend: the machine room; None leaves out what only it knows.
        speed: measure a matrix product (a second).
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "memory_gb": {"system": system_memory()},
        "device": {},
        "blas": {"library": None, "path": None, "said": "", "matmul_gflops": None},
    }
    if backend is None:
        return found
    found["device"] = backend.device_info()
    found["memory_gb"] |= backend.memory()
    record = blas.preload()
    found["blas"] |= {"library": record.library, "path": record.path, "said": record.said}
    if speed:
        measure = importlib.import_module(f"{backend.__name__}.speed").matmul_gflops
        found["blas"]["matmul_gflops"] = round(measure(), 1)
    return found


def system_memory() -> float:
    """Physical memory, GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """GB that could be had without swapping, where the system says so (Linux); else None."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable:")), None)


# --- checks: facts in, lines out ---


def check_device(device: Mapping[str, Any], *, on_mac: bool) -> Check:
    """Which device computes."""
    name = device.get("device_name", device.get("architecture", "unnamed"))
    said = f"{device.get('kind')} ({name})"
    if on_mac and device.get("kind") == "cpu":
        return Check("device", "warn", f"{said}: the GPU is not used", "leave MLX's default device as it is")
    if device.get("kind") == "cpu":
        return Check("device", "ok", f"{said}: fit for small models; a GPU is many times faster")
    return Check("device", "ok", said)


def check_memory(memory: Mapping[str, float], free: float | None) -> Check:
    """GB of the system, free of them, and held by the backend."""
    said = f"{memory['system']:.1f} GB" + (f", {free:.1f} free" if free is not None else "")
    if "active" in memory:
        said += f"; MLX holds {memory['active']:.2f}, cache {memory['cache']:.2f}"
    if (memory["system"] if free is None else free) < LITTLE_MEMORY:
        remedy = "close other programs, or take a small or a 4-bit model and a low batching.micro_batch_tokens"
        return Check("memory", "warn", said, remedy)
    return Check("memory", "ok", said)


def check_blas(kind: str, found: Mapping[str, Any], remedy: str | None) -> Check | None:
    """What matrix products on a CPU run on; None of a GPU.

    Args:
        found: ``said``, and ``matmul_gflops`` measured or None.
        remedy: of the BLAS' own record.
    """
    if kind != "cpu":
        return None
    speed = found["matmul_gflops"]
    said = found["said"] + (f", {speed:.1f} GFLOP/s" if speed is not None else "")
    slow = speed is not None and speed < SLOW
    return Check("BLAS", "warn" if slow or remedy else "ok", said, remedy or (blas.REMEDY if slow else None))


def check_kernels(device: Mapping[str, Any]) -> Check | None:
    """Whether compiled functions run as fused kernels; None where no C++ compiler is needed."""
    if "kernels" not in device:
        return None
    opening = f"kernels: {device['kernels']}; "
    remedy = next((text[len(opening) :] for text in device.get("remarks", ()) if text.startswith(opening)), None)
    return Check("C++ compiler", "ok" if remedy is None else "warn", f"kernels are {device['kernels']}", remedy)


def check_versions(
    requires: list[str] | None,
    requires_python: str | None,
    version: Callable[[str], str] = importlib.metadata.version,
) -> Iterator[Check]:
    """Python and every package against what this release declares.

    Args:
        requires: lines of Requires-Dist. None: not installed as a package.
        requires_python: of its metadata, such as ">=3.11".
        version: installed version by name; PackageNotFoundError when it is not installed.
    """
    python = platform.python_version()
    if requires is None:
        yield Check("versions", "warn", "mlxpref is not installed as a package: not checked", "pip install -e .")
        return
    if requires_python and not SpecifierSet(requires_python).contains(python, prereleases=True):
        yield Check("versions", "fail", f"python {python}, needed {requires_python}", "install a newer Python")
    met = [f"python {python}"]
    for line in requires:
        problem = _unmet(Requirement(line), version)
        if isinstance(problem, Check):
            yield problem
        elif problem:
            met.append(problem)
    yield Check("versions", "ok", ", ".join(dict.fromkeys(met)))


def _unmet(needed: Requirement, version: Callable[[str], str]) -> Check | str | None:
    """What is wrong with one requirement, "name version" when it is met, None when it is not asked for."""
    if "extra" in str(needed.marker or ""):
        return _unmet_extra(needed, version)
    if needed.marker is not None and not needed.marker.evaluate():
        return None
    try:
        found = version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return Check("versions", "fail", f"{needed.name} is not installed, needed {needed.specifier}", REPAIR)
    if needed.specifier.contains(found, prereleases=True):
        return f"{needed.name} {found}"
    return Check("versions", "fail", f"{needed.name} {found}, needed {needed.specifier}", REPAIR)


def _unmet_extra(needed: Requirement, version: Callable[[str], str]) -> Check | None:
    """Of an optional package: only one that is there and does not fit is worth a word."""
    try:
        found = version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if not needed.specifier or needed.specifier.contains(found, prereleases=True):
        return None
    said = f"{needed.name} {found}, and mlxpref's optional parts need {needed.specifier}"
    return Check("versions", "warn", said, f"pip install '{needed.name}{needed.specifier}', if you use it")


def look_at_versions() -> Iterator[Check]:
    """:func:`check_versions` of this installation."""
    try:
        here = importlib.metadata.distribution("mlxpref")
    except importlib.metadata.PackageNotFoundError:
        yield from check_versions(None, None)
        return
    python = here.metadata.json.get("requires_python")
    yield from check_versions(here.requires or [], str(python) if python else None)


def on_mac() -> bool:
    """Does Python run on macOS? True under Rosetta, too."""
    return sys.platform == "darwin"
