"""``mlxpref env``: what a report of a problem, or of a speed, should say about the machine."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from typing import Any

import click

from mlxpref import backends, blas
from mlxpref.cli import console
from mlxpref.errors import MlxprefError
from mlxpref.facts import packages

SLOW = 20.0
"""GFLOP/s under which a CPU is most likely on the reference BLAS."""

EPILOG = """\b
Example:
  mlxpref env
  mlxpref env --json > env.json
"""


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--speed/--no-speed", default=True, show_default=True, help="Measure a matrix product (a second)."
)
def command(as_json: bool, speed: bool) -> None:
    """Report device, versions, memory, and the BLAS in use with its measured speed."""
    facts = gather(speed=speed)
    if as_json:
        console.say(json.dumps(facts, indent=2))
        return
    console.table(("what", "value"), list(_lines(facts)))
    measured = facts["blas"]["matmul_gflops"]
    if facts["device"].get("kind") == "cpu" and measured is not None and measured < SLOW:
        console.warn(f"matrix products are slow here ({measured:.1f} GFLOP/s): pip install mkl, or OpenBLAS")


def gather(*, speed: bool = True) -> dict[str, Any]:
    """Facts of this machine, JSON-safe. A backend that cannot be loaded is a fact, not an error."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "memory_gb": {"system": _system_memory()},
        "device": {},
        "blas": {"library": None, "path": None, "said": "", "matmul_gflops": None},
    }
    try:
        backend = backends.get("auto")
    except MlxprefError as error:
        facts["device"] = {"problem": str(error)}
        return facts
    facts["device"] = {key: value for key, value in backend.device_info().items() if _is_plain(value)}
    facts["memory_gb"] |= backend.memory()
    record = blas.preload()
    facts["blas"] |= {"library": record.library, "path": record.path, "said": record.said}
    if speed:
        measure = importlib.import_module(f"{backend.__name__}.speed").matmul_gflops
        facts["blas"]["matmul_gflops"] = round(measure(), 1)
    return facts


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    device = dict(facts["device"])
    lines = [("python", f"{facts['python']} ({sys.executable})"), ("platform", facts["platform"])]
    lines += [(name, version) for name, version in facts["packages"].items()]
    lines += [(f"device {key}", console.cell(value)) for key, value in device.items()]
    lines += [(f"memory {key} (GB)", f"{value:.2f}") for key, value in facts["memory_gb"].items()]
    if "problem" not in device:
        lines.append(("BLAS", facts["blas"]["said"]))
    if facts["blas"]["matmul_gflops"] is not None:
        lines.append(("matmul (GFLOP/s)", f"{facts['blas']['matmul_gflops']:.1f}, float32, 1024 x 1024"))
    return lines


def _system_memory() -> float:
    """Physical memory, GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
