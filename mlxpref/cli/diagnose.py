"""``mlxpref diagnose``: what is wrong with a run, why, and which option to change."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlxpref.cli import console
from mlxpref.diagnosis import Finding, diagnose, read_record
from mlxpref.files import write_text

EPILOG = """\b
Example:
  mlxpref diagnose adapter
  mlxpref diagnose runs/one runs/two --json findings.json
"""

SAID = {"alarm": "wrong", "warning": "look at this", "note": "good to know"}


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write what was found here, too."
)
def command(runs: tuple[Path, ...], json_file: Path | None) -> None:
    """Say what is wrong with training RUNS, by their metrics and their data, the worst first.

    Where a run folder holds evaluation.json (`mlxpref evaluate … --json RUN/evaluation.json`) and control.json
    (`mlxpref control … --json RUN/control.json`), these are read, too. A run may still be going on.
    """
    found = {run: diagnose(read_record(run)) for run in runs}
    for run, findings in found.items():
        _show(run, findings, named=len(runs) > 1)
    if json_file is not None:
        records = [{"run": str(run), "findings": [one.as_record() for one in of]} for run, of in found.items()]
        write_text(json_file, json.dumps(records, indent=2, ensure_ascii=False) + "\n")


def _show(run: Path, findings: list[Finding], *, named: bool) -> None:
    if named:
        console.say(f"{run}")
    if all(one.severity == "note" for one in findings):
        console.say("Nothing looks wrong.")
    for one in findings:
        console.say(f"{SAID[one.severity]}: {one.what}")
        for text in (one.evidence, one.cause, one.change):
            if text:
                console.say(f"    {text}")
    if named:
        console.say()
