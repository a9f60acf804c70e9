"""``mlxpref env``: what a report of a problem, or of a speed, should say about the machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from mlxpref import backends, blas
from mlxpref.cli import console
from mlxpref.doctor import machine
from mlxpref.errors import MlxprefError

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
    if facts["device"].get("kind") == "cpu" and measured is not None and measured < machine.SLOW:
        console.warn(f"matrix products are slow here ({measured:.1f} GFLOP/s): {blas.REMEDY}")


def gather(*, speed: bool = True) -> dict[str, Any]:
    """Facts of this machine, JSON-safe. A backend that cannot be loaded is a fact, not an error."""
    try:
        backend = backends.get("auto")
    except MlxprefError as error:
        return machine.facts() | {"device": {"problem": str(error)}}
    return machine.facts(backend, speed=speed)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    device = {key: value for key, value in facts["device"].items() if key != "blas" and _is_plain(value)}
    lines = [("python", f"{facts['python']} ({sys.executable})"), ("platform", facts["platform"])]
    lines += [(name, version) for name, version in facts["packages"].items()]
    lines += [(f"device {key}", console.cell(value)) for key, value in device.items()]
    lines += [(f"memory {key} (GB)", f"{value:.2f}") for key, value in facts["memory_gb"].items()]
    if "problem" not in device:
        lines.append(("BLAS", facts["blas"]["said"]))
    if facts["blas"]["matmul_gflops"] is not None:
        lines.append(("matmul (GFLOP/s)", f"{facts['blas']['matmul_gflops']:.1f}, float32, 1024 x 1024"))
    return lines


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
