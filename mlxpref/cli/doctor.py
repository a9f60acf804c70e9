"""``mlxpref doctor``: will a run go here, and what to do where it will not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import click

from mlxpref.cli import console
from mlxpref.doctor import Check, examine

EPILOG = """\b
Example:
  mlxpref doctor
  mlxpref doctor -c configs/qwen3-0.6b-ultrafeedback.yaml
  mlxpref doctor --no-network --json > doctor.json
"""


@click.command(epilog=EPILOG)
@click.option(
    "-c", "--config", type=click.Path(path_type=Path), help="YAML file of a run: look at its model, data and output."
)
@click.option(
    "--network/--no-network",
    default=True,
    show_default=True,
    help="Ask the hub whether it answers: one HEAD request, no data. Not with HF_HUB_OFFLINE.",
)
@click.option(
    "--speed/--no-speed", default=True, show_default=True, help="Measure a matrix product (a second)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def command(config: Path | None, network: bool, speed: bool, as_json: bool) -> None:
    """Check this machine, and with -c a run's configuration, before anything long is begun.

    Every line is ok, warn or fail, with what to do about it below. The exit code is 1 if any line fails.
    """
    found = []
    for check in examine(config, network=network, speed=speed):
        found.append(check)
        if not as_json:
            _say(check)
    if as_json:
        checks = [dataclasses.asdict(check) for check in found]
        console.say(json.dumps({"ok": not _count(found, "fail"), "checks": checks}, indent=2))
    else:
        console.say(f"{len(found)} checks: {_count(found, 'warn')} to look at, {_count(found, 'fail')} failed")
    if _count(found, "fail"):
        raise SystemExit(1)


def _say(check: Check) -> None:
    console.say(f"{check.status:<5} {check.name}: {check.said}")
    if check.remedy is not None:
        console.say(f"      → {check.remedy}")


def _count(checks: Sequence[Check], status: str) -> int:
    return sum(check.status == status for check in checks)
