"""``mlxpref report``: a run, or several, as one page to look at."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from mlxpref.cli import console
from mlxpref.diagnosis import CONTROL, EVALUATION, RunRecord, read_record
from mlxpref.errors import UsageError
from mlxpref.evaluate.control import draw_record
from mlxpref.files import write_text
from mlxpref.report import run_charts
from mlxpref.report.charts import Chart, draw
from mlxpref.report.page import names_of, page
from mlxpref.report.serve import LIVE, server
from mlxpref.runs import FACTS, METRICS

EPILOG = """\b
Example:
  mlxpref report adapter
  mlxpref report runs/ra-dpo runs/dpo --out comparison.html --figures figures
  mlxpref report adapter --open
"""

KINDS = (".png", ".svg")


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path),
    help="The page.  [default: report.html in the run folder; of several runs in this one]",
)  # fmt: skip
@click.option(
    "--figures", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for each chart of the page as PNG and SVG.",
)  # fmt: skip
@click.option("--open", "live", is_flag=True, help="Serve the page to this machine's browser, live, until Ctrl-C.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Of --open.  [default: one that is free]")
@click.option("--no-browser", is_flag=True, help="With --open: say the address, and open no browser.")
def command(
    runs: tuple[Path, ...], out: Path | None, figures: Path | None, live: bool, port: int | None, no_browser: bool
) -> None:
    """Write training RUNS as one page that needs nothing else: what is wrong, curves, data, what was measured.

    Where a run folder holds evaluation.json (`mlxpref evaluate … --json RUN/evaluation.json`) and control.json
    (`mlxpref control … --json RUN/control.json`), these are part of it. A run may still be going on.
    """
    if not live and (port is not None or no_browser):
        raise UsageError("--port and --no-browser are for --open")
    if live and out is not None:
        raise UsageError("--open serves the page and writes none; leave --out out")
    runs = tuple({run.resolve(): run for run in runs}.values())
    records = [read_record(run) for run in runs]
    if figures is not None:
        console.note(f"{_draw(records, figures)} files in {figures}")
    if live:
        _serve(runs, port or 0, browser=not no_browser)
        return
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_text(target, page(records, pictures=_pictures(records)))
    console.say(str(target))


def _pictures(records: Sequence[RunRecord]) -> dict[Path, str]:
    """By run folder its control curve, where it has one."""
    found = {}
    with TemporaryDirectory() as aside:
        for run in records:
            if _has_curve(run):
                draw_record(run.control or {}, Path(aside) / "control.svg")
                found[run.folder] = (Path(aside) / "control.svg").read_text(encoding="utf-8")
    return found


def _has_curve(run: RunRecord) -> bool:
    """Whether a goal was asked for, so that there is something to draw."""
    return run.control is not None and any(one["goal"] is not None for one in run.control["per_goal"])


def _draw(records: Sequence[RunRecord], folder: Path) -> int:
    """Write every chart; how many files."""
    folder.mkdir(parents=True, exist_ok=True)
    named = names_of(records)
    n = 0
    for name, chart in _charts(named):
        for kind in KINDS:
            draw(chart, folder / f"{name}{chart.name}{kind}")
            n += 1
    for name, run in named.items():
        if _has_curve(run):
            for kind in KINDS:
                draw_record(run.control or {}, folder / f"{_prefix(name, named)}control{kind}")
                n += 1
    return n


def _charts(named: Mapping[str, RunRecord]) -> list[tuple[str, Chart]]:
    charts = [("", chart) for chart in run_charts.compared(named)] if len(named) > 1 else []
    for name, run in named.items():
        own = [*run_charts.curves(run), *run_charts.data_charts(run), *run_charts.resource_charts(run)]
        own += run_charts.evaluation_charts(run.evaluation) if run.evaluation is not None else []
        own += run_charts.course_chart(run.control) if run.control is not None else []
        charts += [(_prefix(name, named), chart) for chart in own]
    return charts


def _prefix(name: str, named: Mapping[str, Any]) -> str:
    return f"{name.replace('/', '-')}-" if len(named) > 1 else ""


def _serve(runs: Sequence[Path], port: int, *, browser: bool) -> None:
    def make() -> str:
        records = [read_record(run) for run in runs]
        return page(records, pictures=_pictures(records), head=LIVE)

    files = [run / name for run in runs for name in (METRICS, FACTS, EVALUATION, CONTROL)]
    with server(make, files, port=port) as serving:
        address = f"http://{serving.server_address[0]!s}:{serving.server_address[1]}/"
        console.say(f"{address}  (Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            console.note("ended")
