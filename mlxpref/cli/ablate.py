"""``mlxpref ablate``: runs with some keys varied, one after another, and one table of all."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from mlxpref.ablate import Asking, Choices, Grid, Looked, Point, Result, Sweep, Table, Watch, make_grid, parse_vary
from mlxpref.ablate import asking as read_asking
from mlxpref.ablate.table import LEGEND, TITLES
from mlxpref.callbacks import RunStart
from mlxpref.cli import console
from mlxpref.config_layers import parse_setting, read_yaml
from mlxpref.data.words import counted
from mlxpref.errors import UsageError
from mlxpref.prepare import Prepared

EPILOG = """\b
Example:
  mlxpref ablate -c configs/sandbox.yaml --vary objective=dpo,simpo,ipo --seeds 3 --out sweep
  mlxpref ablate -c configs/sandbox.yaml --vary objective.0.beta=0.05,0.1 --vary 'relabel=null,{}' --dry-run
  mlxpref ablate -c configs/sandbox.yaml --vary training.iters=50,150 --seeds 1,5,7 \\
    --scorer mlxpref.sandbox.gold:score --prompts prompts.jsonl --goals 2,6
"""

STATES: Mapping[str, str] = {
    "new": "to do",
    "unfinished": "begun",
    "unmeasured": "trained, to be measured",
    "done": "finished",
    "failed": "failed",
}


@click.command(epilog=EPILOG)
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="YAML file of the base; see configs/.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Set any key of the base.")
@click.option(
    "--vary",
    "vary",
    multiple=True,
    metavar="SECTION.KEY=VALUE,…",
    help="Values a key takes, as YAML; commas inside [], {} and quotes belong to a value. Several --vary: "
    "every combination.",
)
@click.option(
    "--seeds",
    default="1",
    show_default=True,
    metavar="N|S,S,…",
    help="Runs of each combination: how many seeds from the base's on, or which. They decide order, first weights "
    "and dropout; data are split by the base's.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("sweep"),
    show_default=True,
    help="Folder of the sweep: its runs, results, table and picture.",
)
@click.option(
    "--skip-impossible",
    is_flag=True,
    help="Leave out combinations that cannot be, and options where an objective does not take them. What the data "
    "lack is an error all the same.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    metavar="N",
    show_default="all",
    help="Validation rows every adapter is measured on at its end.",
)
@click.option("--scorer", metavar="MODULE:FUNCTION", help="What scores answers to --prompts; higher is better.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts to answer, as for generate --file.")
@click.option("--goals", metavar="GOAL,…", help="Scores to ask for besides the top one, of adapters that know goals.")
@click.option("--samples", type=int, metavar="N", show_default="1", help="Answers to each prompt at each goal.")
@click.option("--max-tokens", type=int, metavar="N", show_default="256", help="Tokens of an answer at most.")
@click.option(
    "--temperature", "--temp", type=float, metavar="X", show_default="0",
    help="Of the sampling; 0 takes the likeliest token every time.",
)  # fmt: skip
@click.option("--fail-fast", is_flag=True, help="Stop at the first run that fails.")
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@click.option("--dry-run", is_flag=True, help="Check everything, list the runs, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    file: Path | None, settings: tuple[str, ...], vary: tuple[str, ...], seeds: str, out: Path, as_json: bool,
    dry_run: bool, **options: Any,
) -> None:  # fmt: skip
    """Train every combination of the varied keys, with several seeds, and compare them in one table.

    The same command goes on where it was stopped: what is finished is kept. All runs are measured alike, on
    the validation rows against the model without an adapter, whatever they minimise. Results: table.md,
    table.csv, table.json and picture.png in the folder.
    """
    if out == Path():
        raise UsageError("--out names no folder")
    grid = make_grid(
        {} if file is None else read_yaml(file), [parse_setting(text) for text in settings], parse_vary(vary), seeds,
        skip_impossible=options["skip_impossible"],
    )  # fmt: skip
    if len(grid.points) < 2:
        raise UsageError("nothing to compare: give --vary two different values, or several --seeds")
    choices = Choices(options["rows"], _asking(options), options["fail_fast"], options["retry_failed"])
    watch = Display(quiet=as_json)
    sweep = Sweep(grid, out.resolve(), choices, watch)
    watch.say(_size(grid))
    with _stoppable(watch, dry_run):
        if dry_run:
            show_plan(grid, sweep.check(), as_json)
            return
        table = sweep.go()
    if as_json:
        console.say(json.dumps(table.as_record(), indent=2, ensure_ascii=False))
    else:
        show(table, out)
    if table.failures:
        raise SystemExit(1)


def _asking(options: Mapping[str, Any]) -> Asking | None:
    """What to ask, or None; UsageError for a part of it without the rest."""
    given = {name: options[name] for name in ("goals", "samples", "max_tokens", "temperature")}
    given = {name: value for name, value in given.items() if value is not None}
    if options["scorer"] is None or options["prompts"] is None:
        alone = [name for name in ("scorer", "prompts") if options[name] is not None] + list(given)
        if alone:
            flag = alone[0].replace("_", "-")
            raise UsageError(f"--{flag}: answers need --scorer and --prompts, both")
        return None
    goals = tuple(word.strip() for word in given.pop("goals", "").split(",") if word.strip())
    return read_asking(options["scorer"], options["prompts"], goals=goals, **given)


def _size(grid: Grid) -> str:
    combinations, seeds = counted(len(grid.combinations), "combination"), counted(len(grid.seeds), "seed")
    return f"{counted(len(grid.points), 'run')}: {combinations}, {seeds}"


@contextmanager
def _stoppable(watch: Display, dry_run: bool) -> Iterator[None]:
    """Let SIGTERM stop a sweep as Ctrl-C does, and say how to go on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        watch.stop()
        if not dry_run:
            console.note("stopped; what is finished is kept. Go on with the same command:")
            console.note(f"  {shlex.join(['mlxpref', *sys.argv[1:]])}")
        if error.args == (signal.SIGTERM,):
            raise SystemExit(128 + signal.SIGTERM) from error
        raise
    finally:
        watch.stop()
        signal.signal(signal.SIGTERM, before)


# --- while it goes ---


class Display(Watch):
    """Says each run as it begins, how far it is, and what came of it; to standard error where the answer is JSON."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.say = console.note if quiet else console.say
        self._progress = console.Stages()
        self._said: set[str] = set()
        self._n_steps = 0

    def on_data(self, data: Prepared, points: Sequence[Point]) -> None:
        self._progress.close()
        for text in data.said:
            self.on_note(text)
        rows = f"{counted(len(data.train), 'training row')}, {counted(len(data.valid), 'validation row')}"
        self.say(f"data: {rows}, for {counted(len(points), 'run')}")

    def on_point(self, point: Point, place: int, total: int, state: str) -> None:
        more = {"unfinished": " (goes on)", "unmeasured": " (measured only)"}.get(state, "")
        self.say(f"[{place}/{total}] {label(point)}{more}")
        sys.stdout.flush()

    def on_note(self, text: str) -> None:
        if text.startswith("warning: "):
            self._warn(text.removeprefix("warning: "))
        elif text.startswith("reference log-probs"):
            console.note(f"   {text}")

    def on_start(self, start: RunStart) -> None:
        device = (start.facts.get("starts") or [{}])[-1].get("device", {})
        said = [line.removeprefix("warning: ") for line in start.lines if line.startswith("warning: ")]
        for text in (*device.get("remarks", ()), *said):
            self._warn(text)
        self._n_steps = start.n_steps

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            console.warn(text)

    def on_progress(self, what: str, done: int, total: int) -> None:
        if what != "evaluation" and console.is_terminal(stderr=True):  # short: no lines in a log for it
            self._progress(what, done, total)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress("steps", step, self._n_steps)

    def on_interrupt(self, signal_number: int) -> None:
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        os.write(2, f"\n{name}: finishing this step, then saving (Ctrl-C again stops at once)\n".encode())

    def on_result(self, point: Point, result: Result) -> None:
        self._progress.close()
        if result.status == "failed":
            console.fail(f"{label(point)}: {result.reason}")
            return
        found = {name: value for name, value in result.measured.items() if name in LEGEND and value is not None}
        self.say("   " + ", ".join(f"{TITLES[name][0]} {value:.{TITLES[name][1]}f}" for name, value in found.items()))
        sys.stdout.flush()

    def stop(self) -> None:
        self._progress.close()


def label(point: Point) -> str:
    return f"{point.combination.label}, seed={point.seed}"


# --- what is shown ---


def show_plan(grid: Grid, looked: Sequence[Looked], as_json: bool) -> None:
    """Every run, and what is there of it."""
    if as_json:
        runs = [
            {
                "name": one.point.name,
                "settings": dict(one.point.combination.settings),
                "seed": one.point.seed,
                "state": one.state,
            }
            for one in looked
        ]
        console.say(json.dumps({"runs": runs, "notes": list(grid.notes)}, indent=2, ensure_ascii=False))
        return
    rows = [(one.point.name, STATES[one.state]) for one in looked]
    console.table(("run", "state"), rows)
    for text in (*(text for one in looked for text in one.said), *grid.notes):
        console.say(f"note: {text}")


def show(table: Table, out: Path) -> None:
    """The table, what failed, the notes, and where everything is."""
    console.say()
    console.table(table.headings, list(table.rows()), title="mean ± standard deviation over seeds")
    console.say()
    for name in table.shown:
        console.say(f"{TITLES[name][0]}: {LEGEND[name]}")
    for one in table.failures:
        console.say(f"failed: {one.name}: {one.reason}")
    for text in table.notes:
        console.say(f"note: {text}")
    if table.failures:
        console.say("note: --retry-failed tries again what failed")
    for file in ("table.md", "table.csv", "table.json", "picture.png"):
        if (out / file).exists():
            console.say(f"{out / file}")
