"""The one table a sweep ends in: mean and standard deviation over the seeds of each combination, and every run."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxpref.ablate.asked import value_text
from mlxpref.ablate.grid import Combination, Grid, deciding, shared_settings
from mlxpref.ablate.measure import Asking
from mlxpref.ablate.results import Result
from mlxpref.data.words import counted
from mlxpref.files import write_text
from mlxpref.report.dots import Row, draw_dots

VERSION = 1

TITLES: Mapping[str, tuple[str, int]] = {
    "score": ("score", 2),
    "range": ("range", 2),
    "spearman": ("Spearman", 2),
    "accuracy": ("accuracy", 3),
    "margin": ("margin", 2),
    "chosen": ("chosen", 2),
    "sensitivity": ("sensitivity", 2),
    "rejected": ("rejected", 2),
    "ranking_accuracy": ("ranking accuracy", 3),
}
"""Figure → its heading and decimals."""

SHOWN = ("score", "range", "spearman", "accuracy", "margin", "chosen", "sensitivity")
"""What the table has of them; the files have all. "rejected" is chosen − margin."""

LEGEND: Mapping[str, str] = {
    "score": "mean score of the answers, asked for the top goal where the adapter knows goals",
    "range": "mean score at the highest goal asked for less that at the lowest",
    "spearman": "rank correlation of goal and score over single answers",
    "accuracy": "share of validation pairs whose better response gained more log-prob than the other",
    "margin": "by how much, nats",
    "chosen": "change of log-prob of the better response, nats; that of the other is chosen - margin",
    "sensitivity": "how far the goal turns the margin round, nats; 0 does not hear it",
}

AXES: Mapping[str, str] = {
    "score": "score of the answers",
    "accuracy": "accuracy",
    "sensitivity": "goal sensitivity, nats",
    "chosen": "change of log-prob of the better response, nats",
}
"""What the picture can show of them."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Over seeds: mean, standard deviation (n − 1 in the denominator; None for one run) and number of runs."""

    mean: float
    sd: float | None
    n: int

    def text(self, decimals: int) -> str:
        spread = "" if self.sd is None else f" ± {self.sd:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}".replace("-" + f"{0:.{decimals}f}", f"{0:.{decimals}f}")


@dataclass(frozen=True, slots=True)
class Line:
    """A combination with its runs, in the order of seeds; None for one that was not made."""

    combination: Combination
    results: tuple[Result | None, ...]

    @property
    def done(self) -> tuple[Result, ...]:
        return tuple(one for one in self.results if one is not None and one.status == "done")

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(one for one in self.results if one is not None and one.status == "failed")

    def values(self, name: str) -> list[float]:
        found = (one.measured.get(name) for one in self.done)
        return [value for value in found if value is not None]

    def figure(self, name: str) -> Figure | None:
        values = self.values(name)
        if not values:
            return None
        return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, slots=True)
class Table:
    """Every combination of a sweep.

    Attributes:
        keys: short names of what was varied.
        about: settings alike in all runs, seeds, what was measured; JSON-safe.
        notes: what a reader should know, a sentence each.
    """

    keys: tuple[str, ...]
    lines: tuple[Line, ...]
    seeds: tuple[int, ...]
    about: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def shown(self) -> tuple[str, ...]:
        """Figures that some run has."""
        return tuple(name for name in SHOWN if any(line.values(name) for line in self.lines))

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(one for line in self.lines for one in line.failed)

    @property
    def missing(self) -> int:
        """Runs that were not made."""
        return sum(one is None for line in self.lines for one in line.results)

    @property
    def headings(self) -> tuple[str, ...]:
        failed = ("failed",) if self.failures else ()
        return (*(self.keys or ("run",)), "runs", *failed, *(TITLES[name][0] for name in self.shown))

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of each combination; a dash where there is nothing."""
        for line in self.lines:
            settings = line.combination.settings
            chosen = [value_text(settings[key]) if key in settings else "–" for key in self.keys] or ["base"]
            failed = [str(len(line.failed))] if self.failures else []
            found = [(line.figure(name), TITLES[name][1]) for name in self.shown]
            cells = ["–" if figure is None else figure.text(decimals) for figure, decimals in found]
            yield (*chosen, str(len(line.done)), *failed, *cells)

    def as_record(self) -> dict[str, Any]:
        """JSON-safe: the same whatever happened on the way."""
        return {
            "version": VERSION,
            **self.about,
            "combinations": [
                {
                    "label": line.combination.label,
                    "settings": dict(line.combination.settings),
                    "runs": len(line.done),
                    "failed": len(line.failed),
                    "figures": {
                        name: {"mean": one.mean, "sd": one.sd, "n": one.n}
                        for name in TITLES
                        if (one := line.figure(name)) is not None
                    },
                }
                for line in self.lines
            ],
            "runs": [_run_record(line, seed, one) for line in self.lines for seed, one in self._seeded(line)],
            "notes": list(self.notes),
        }

    def _seeded(self, line: Line) -> Iterator[tuple[int, Result | None]]:
        yield from zip(self.seeds, line.results, strict=True)

    def markdown(self) -> str:
        """The table, what its columns are, and the notes."""

        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"

        left = len(self.keys) or 1
        rule = line(["---"] * left + ["---:"] * (len(self.headings) - left))
        body = "".join(map(line, self.rows()))
        legend = "".join(f"- {TITLES[name][0]}: {LEGEND[name]}\n" for name in self.shown)
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"{line(self.headings)}{rule}{body}\nMean ± standard deviation over seeds.\n\n{legend}{notes}"

    def csv(self) -> str:
        """Every run, a line each."""
        runs = self.as_record()["runs"]
        evaluated = dict.fromkeys(key for run in runs for key in run["evaluation"] if key != "step")
        file = io.StringIO()
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["run", *self.keys, "seed", "status", "reason", "step", *TITLES, *evaluated])
        for run in runs:
            settings = [value_text(run["settings"][key]) if key in run["settings"] else "" for key in self.keys]
            given = [run["figures"].get(name) for name in TITLES] + [run["evaluation"].get(key) for key in evaluated]
            out.writerow([run["name"], *settings, run["seed"], run["status"], run["reason"], run["step"], *given])
        return file.getvalue()


def _run_record(line: Line, seed: int, one: Result | None) -> dict[str, Any]:
    settings = dict(line.combination.settings)
    if one is None:
        return {
            "name": None, "settings": settings, "seed": seed, "status": "not made", "reason": None, "step": None,
            "figures": {}, "evaluation": {},
        }  # fmt: skip
    return {
        "name": one.name,
        "settings": settings,
        "seed": seed,
        "status": one.status,
        "reason": one.reason,
        "step": one.step,
        "n_steps": one.n_steps,
        "skipped_steps": one.skipped,
        "stopped": one.stopped,
        "data": dict(one.data),
        "figures": one.measured if one.status == "done" else {},
        "rows": one.figures.get("rows"),
        "per_goal": one.answers.get("per_goal"),
        "evaluation": dict(one.evaluation),
    }


# --- made and written ---


def table_of(grid: Grid, results: Sequence[Result | None], asked: Asking | None) -> Table:
    """The table of a grid's results, which stand in the order of its points."""
    n = len(grid.combinations)
    found = list(results) if asked is not None else [_unasked(one) for one in results]
    lines = tuple(Line(one, tuple(found[i::n])) for i, one in enumerate(grid.combinations))
    about = {
        "varied": list(grid.keys),
        "seeds": list(grid.seeds),
        "data_seed": grid.data_seed,
        "settings": shared_settings(grid),
        "asked": None if asked is None else asked.about,
    }
    table = Table(tuple(grid.keys.values()), lines, grid.seeds, about, ())
    return Table(table.keys, lines, grid.seeds, about, (*grid.notes, *_notes(table, grid)))


def _unasked(one: Result | None) -> Result | None:
    """Without the answers of an earlier call: not every run has them."""
    return None if one is None else replace(one, answers={}, asked=None)


def _notes(table: Table, grid: Grid) -> Iterator[str]:
    objectives = {json.dumps(one.config.as_dict()["objective"], sort_keys=True) for one in grid.combinations}
    if len(objectives) > 1:
        yield (
            "eval_loss is another quantity for every objective and every beta, and so are eval_rewards: they are in "
            "table.csv, to compare seeds of one combination. The figures above are alike for all"
        )
    measured = {json.dumps(_measured_on(one.config), sort_keys=True) for one in grid.combinations}
    if len(measured) > 1 and {"accuracy", "margin"} & set(table.shown):
        yield "combinations differ in their data, so their validation rows are not the same: compare them with care"
    if len(grid.seeds) == 1:
        yield "one seed does not show what is chance: --seeds 3 repeats every combination with others"
    if table.failures:
        what = counted(len(table.failures), "run")
        yield f"{what} failed and {'is' if len(table.failures) == 1 else 'are'} in no mean"
    if table.missing:
        yield f"{counted(table.missing, 'run')} not made: the first failure ended the sweep"


def _measured_on(config: Any) -> dict[str, Any]:
    rows = ("data.", "relabel", "tokenization.", "model.path")
    return {key: value for key, value in deciding(config).items() if key.startswith(rows)}


def write_table(table: Table, out: Path) -> None:
    """``table.json``, ``table.csv``, ``table.md`` and ``picture.png``. RunError if the disk refuses."""
    text = json.dumps(table.as_record(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(out / "table.json", text + "\n")
    write_text(out / "table.csv", table.csv())
    write_text(out / "table.md", table.markdown())
    panels = panels_of(table)
    if panels:
        draw_dots(
            [_row(line, panels) for line in table.lines], [AXES[name] for name in panels], out / "picture.png",
            title=_headline(table),
        )  # fmt: skip
    else:
        (out / "picture.png").unlink(missing_ok=True)


def panels_of(table: Table) -> list[str]:
    """At most two figures to draw: what answers score and what is preferred; else whether goals are heard, or
    whether good responses are unlearnt."""
    every = [name for name in AXES if any(line.values(name) for line in table.lines)]
    if "sensitivity" in every and all(line.values("sensitivity") for line in table.lines if line.done):
        every = [name for name in every if name != "chosen"]
    else:
        every = [name for name in every if name != "sensitivity"]
    return every[:2]


def _row(line: Line, panels: Sequence[str]) -> Row:
    failed = f" ({len(line.failed)} failed)" if line.failed else ""
    return Row(f"{line.combination.label}{failed}", tuple(tuple(line.values(name)) for name in panels))


def _headline(table: Table) -> str:
    n = len(table.lines)
    each = f", {counted(len(table.seeds), 'seed')} each" if n > 1 else f", {counted(len(table.seeds), 'seed')}"
    return f"{counted(n, 'combination')}{each}"
