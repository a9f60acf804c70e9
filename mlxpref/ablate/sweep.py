"""A sweep: its runs one after another in one folder, where a killed one goes on as if nothing had been.

Whatever is finished there is kept; what was changed or damaged since is noticed (:mod:`mlxpref.ablate.folder`).
"""

from __future__ import annotations

import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxpref import backends
from mlxpref.ablate.folder import Looked, State, check_record, look, not_finite, record, trained
from mlxpref.ablate.grid import Combination, Grid, Point
from mlxpref.ablate.measure import Asking, answer, goals_for, measure, rows_to_measure
from mlxpref.ablate.results import Result, keep
from mlxpref.ablate.table import Table, table_of, write_table
from mlxpref.assembly import Assembly
from mlxpref.callbacks import Callbacks, TrainCallback
from mlxpref.config import Config
from mlxpref.errors import ConfigError, DataError, MlxprefError, RunError, raise_all
from mlxpref.files import write_text
from mlxpref.locks import locked
from mlxpref.objectives import Objective, resolve_objective
from mlxpref.prepare import Prepared, prepare
from mlxpref.runs import CONFIG, RunFolder
from mlxpref.train import train


class Watch(TrainCallback):
    """Listens to a sweep; every method does nothing, override what is needed."""

    def on_data(self, data: Prepared, points: Sequence[Point]) -> None:
        """Rows were read and tokenized, for these points."""

    def on_point(self, point: Point, place: int, total: int, state: State) -> None:
        """A run begins or goes on; ``place`` counts from 1."""

    def on_result(self, point: Point, result: Result) -> None:
        """A run is measured, or failed."""


@dataclass(frozen=True, slots=True)
class Choices:
    """How a sweep goes.

    Attributes:
        most_rows: validation rows to measure on; None: all.
        asking: prompts to answer; None: none.
        fail_fast: stop at the first run that fails.
        retry_failed: try again what failed before.
    """

    most_rows: int | None = None
    asking: Asking | None = None
    fail_fast: bool = False
    retry_failed: bool = False


@dataclass(frozen=True, slots=True)
class Sweep:
    """The runs of a grid in a folder.

    ``backend``: the machine room; by default each run's ``model.backend`` by name. ``clock``, ``now``: as in ``train``.
    """

    grid: Grid
    out: Path
    choices: Choices = Choices()
    watch: Watch = field(default_factory=Watch)
    backend: ModuleType | None = None
    clock: Callable[[], float] = time.perf_counter
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def check(self) -> list[Looked]:
        """Everything that can be known before a run: what is there already, and whether every run can begin.

        Raises:
            MlxprefError: configuration, data or folder cannot be used; nothing was changed.
        """
        looked = self._look()
        self._data(looked)
        return looked

    def go(self) -> Table:
        """Make every run that is not finished, and put all of them into one table.

        Returns:
            the table, written to ``table.md``, ``table.csv``, ``table.json`` and ``picture.png``.

        Raises:
            KeyboardInterrupt: stopped, all saved; its argument is the signal's number where there was one.
            MlxprefError: something is wrong with all of the sweep.
        """
        what = f"{self.out}: another sweep is at work here; wait for it or choose another --out"
        with locked(self.out, what=what):
            looked = self._look()
            for text in (text for one in looked for text in one.said):
                self.watch.on_note(f"warning: {text}")
            data = self._data(looked)
            record(self.grid, self.out)
            results = self._go(looked, data)
            table = table_of(self.grid, results, self.choices.asking)
            write_table(table, self.out)
            return table

    def _go(self, looked: Sequence[Looked], data: Mapping[str, Prepared]) -> list[Result | None]:
        results: list[Result | None] = [one.result if one.state in ("done", "failed") else None for one in looked]
        for place, one in enumerate(looked):
            if results[place] is not None:
                continue
            self.watch.on_point(one.point, place + 1, len(looked), one.state)
            found = results[place] = self._run(one, data[self._data_key(one.point.combination)])
            self.watch.on_result(one.point, found)
            gc.collect()  # a run's closures hold its model in cycles
            if found.status == "failed" and self.choices.fail_fast:
                break
        return results

    def _look(self) -> list[Looked]:
        check_record(self.grid, self.out)
        choices = self.choices
        asked = None if choices.asking is None else self._asked(choices.asking)
        more: Any = {"most_rows": choices.most_rows, "asked": asked, "retry_failed": choices.retry_failed}
        return [look(point, self.out, **more) for point in self.grid.points]

    # --- data ---

    def _data_key(self, one: Combination) -> str:
        """The same for combinations that train on the same rows."""
        found = one.config.as_dict()
        parts = [found[name] for name in ("data", "relabel", "tokenization")]
        columns = sorted(_objective(one.config).from_data - {"scores"})  # these are in the rows anyway
        return json.dumps([parts, found["model"]["path"], found["model"]["revision"], columns], sort_keys=True)

    def _data(self, looked: Sequence[Looked]) -> dict[str, Prepared]:
        """Rows by key, of all runs that are still to be made; each is read once, whatever the seed.

        Raises:
            MlxprefError: rows cannot be read, do not fit what is asked, or are not those of finished runs.
        """
        found: dict[str, Prepared] = {}
        problems: list[str] = []
        unread: list[tuple[str, DataError]] = []
        points = {self._data_key(one.point.combination): one.point for one in looked if one.state not in _OVER}
        for key in dict.fromkeys(points):
            members = [one for one in looked if self._data_key(one.point.combination) == key]
            config = members[0].point.combination.config
            try:
                found[key] = data = prepare(config, needs=_objective(config).needs)
            except DataError as error:
                unread += [(one.point.combination.label, error) for one in members]
                continue
            self.watch.on_data(data, [one.point for one in members])
            problems += self._data_problems(data, members)
        _refuse_unread(unread, some=bool(found))
        raise_all(list(dict.fromkeys(problems)), ConfigError, "before the first run:")
        return found

    def _data_problems(self, data: Prepared, members: Sequence[Looked]) -> Iterator[str]:
        asked = self.choices.asking
        if not data.valid and asked is None:
            yield (
                "there are no validation rows to measure on: give data.valid or data.valid_fraction, or prompts to "
                "answer (--scorer, --prompts)"
            )
        for one in members:
            before = one.result.data.get("fingerprint") if one.result is not None else None
            if before is not None and before != data.fingerprint:
                yield f"{one.point.name}: the data have changed since this run; choose another --out"
        for point in {one.point.combination.label: one.point for one in members}.values():
            try:
                self._assembly(point.config(self.out), data).check()
                if asked is not None:
                    goals_for(asked, data.recipe)
            except MlxprefError as error:
                yield f"{point.combination.label}: {error}"

    def _assembly(self, config: Config, data: Prepared) -> Assembly:
        run = RunFolder(Path(config.output.adapter_path))
        return Assembly(config, _objective(config), self._machine(config), run, Callbacks(()), self.now, data)

    def _machine(self, config: Config) -> ModuleType:
        return self.backend if self.backend is not None else backends.get(config.model.backend)

    # --- one run ---

    def _run(self, looked: Looked, data: Prepared) -> Result:
        """Train what is left of a run and measure it; what goes wrong is its result."""
        point = looked.point
        begun = Result(point.name, point.combination.settings, point.seed, "failed")
        config = point.config(self.out)
        folder = Path(config.output.adapter_path)
        if looked.state == "unfinished" and self.choices.retry_failed and not_finite(folder) is not None:
            shutil.rmtree(folder)  # going on after steps that were not finite would be another run
        trace = self.out / "results" / f"{point.name}.traceback.txt"
        trace.unlink(missing_ok=True)
        try:
            if looked.state == "unmeasured" and looked.result is not None:
                begun = looked.result
            else:
                self._train(config, data)
            result, samples = self._measured(begun, config, data)
        except KeyboardInterrupt:
            raise
        except Exception as error:  # of any kind: out of memory, a scorer that is somebody else's code
            result, samples = replace(begun, status="failed", reason=self._why(error, folder)), None
            if not isinstance(error, MlxprefError):
                write_text(trace, traceback.format_exc())
        keep(result, self.out / "results", samples)
        return result

    def _train(self, config: Config, data: Prepared) -> None:
        folder = Path(config.output.adapter_path)
        resume = (folder / CONFIG).is_file()
        reason = not_finite(folder) if resume else None
        if reason is not None:
            raise RunError(reason)
        result = train(
            config, resume=resume, callbacks=[self.watch], backend=self.backend, prepared=data,
            clock=self.clock, now=self.now,
        )  # fmt: skip
        if result.interrupted is not None:
            raise KeyboardInterrupt(result.interrupted)

    def _measured(self, begun: Result, config: Config, data: Prepared) -> tuple[Result, Any]:
        """The result, and the answers if there are new ones."""
        folder, machine, asked = Path(config.output.adapter_path), self._machine(config), self.choices.asking
        found_there = trained(folder)
        same = begun.adapter == found_there["adapter"] and begun.status == "done"
        rows = rows_to_measure(data.valid, self.choices.most_rows, seed=self.grid.data_seed)
        samples = None
        with machine.set_memory_policy():
            more = {} if config.model.dtype is None else {"dtype": config.model.dtype}
            policy = machine.load_adapter(str(folder), **more)
            if not (same and begun.most_rows == self.choices.most_rows):
                found = measure(rows, machine, policy, config, on_progress=self.watch.on_progress) if rows else {}
                begun = replace(begun, most_rows=self.choices.most_rows, figures=found)
            if asked is not None and not (same and begun.asked == self._asked(asked)):
                answers, samples = answer(
                    asked, data.recipe, machine, policy,
                    seed=self.grid.data_seed, on_progress=self.watch.on_progress,
                )  # fmt: skip
                begun = replace(begun, asked=self._asked(asked), answers=answers)
        return replace(begun, status="done", reason=None, **found_there), samples

    def _asked(self, asked: Asking) -> str:
        return f"{asked.key} seed {self.grid.data_seed}"

    def _why(self, error: Exception, folder: Path) -> str:
        """In one line, without the name of the sweep's folder."""
        reason = not_finite(folder)
        if reason is not None:
            return reason
        text = str(error) if isinstance(error, MlxprefError) else f"{type(error).__name__}: {error}"
        return " ".join(text.replace(f"{self.out}/", "").split())


_OVER = ("done", "failed")


def _refuse_unread(unread: Sequence[tuple[str, DataError]], *, some: bool) -> None:
    """DataError where combinations have no data: which, and why. ``some``: others have."""
    texts = list(dict.fromkeys(str(error) for _, error in unread))
    if len(texts) == 1 and not some:
        raise unread[0][1]
    labels = {text: list(dict.fromkeys(label for label, error in unread if str(error) == text)) for text in texts}
    raise_all(
        [f"{'; '.join(labels[text])}: {text}".replace("\n", "\n  ") for text in texts],
        DataError,
        "these runs cannot have their data; leave their values out, or mend the data:",
    )


def _objective(config: Config) -> Objective:
    return resolve_objective(config.as_dict()["objective"])


