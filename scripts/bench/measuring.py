"""Start the contestants, let one step of each through at a time, and take medians."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.worker import Task

REST = 0.3
"""Seconds between two steps: threads of one BLAS spin for 0.2 s after its last product, on the next one's core."""

ALSO = 3
"""Rounds in which further commands are asked: they take longer than steps."""


class Failed(RuntimeError):
    """A contestant ended before it was told to; the message has the end of what it printed."""


class Contender:
    """A contestant's process, at its gate."""

    def __init__(self, task: Task, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = task.contestant
        file, self._log = folder / f"{self.name}.json", folder / f"{self.name}.log"
        file.write_text(json.dumps(asdict(task)))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", str(file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=dict(environment),
            )  # fmt: skip
        self.facts: dict[str, Any] = self._heard()["ready"]

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for the figures."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._heard()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)  # waits, and closes both pipes

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self.close()
        raise Failed(f"{self.name} ended early; the end of what it said:\n{self._log.read_text()[-2000:]}")


@dataclass
class Measured:
    """Figures of one contestant: seconds and bytes, each step's in the order they were made.

    Attributes:
        facts: what it said at the gate.
        agreement: ‖g − plain's g‖ / ‖plain's g‖ over the whole LoRA gradient; None where it gives none.
        other: figures of further commands, one for each round.
    """

    name: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    agreement: float | None = None
    other: dict[str, list[float]] = field(default_factory=dict)

    @property
    def weights(self) -> float:
        return self.facts.get("weights", 0) + self.facts.get("reference", 0)

    @property
    def above(self) -> float:
        """Bytes at most in a step above those of everything that was loaded."""
        return median(self.peak) - self.weights

    def summary(self) -> dict[str, Any]:
        return {
            **asdict(self), "wall_median": median(self.wall), "cpu_median": median(self.cpu),
            "above_weights": self.above, **{f"{name}_median": median(v) for name, v in self.other.items()},
        }  # fmt: skip


def environment(*, blas: str, threads: int) -> dict[str, str]:
    """Of every contestant: this package in reach, so many threads, and MLX's BLAS ("stock" or "preloaded")."""
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([here, str(Path(here).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    found = {**os.environ, "PYTHONPATH": path, **dict.fromkeys(names, str(threads)), "TQDM_DISABLE": "1",
             "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    if blas == "stock":
        found["MLXPREF_BLAS"] = "off"
    elif found.get("MLXPREF_BLAS", "").lower() == "off":
        del found["MLXPREF_BLAS"]
    return found


@contextmanager
def started(
    tasks: Sequence[Task],
    folder: Path,
    env: Mapping[str, str],
    watch: Callable[[str], None],
    optional: Mapping[str, Callable[[str], None]],
) -> Iterator[list[Contender]]:
    """Contestants at their gates, started one after another; all have ended when this does.

    One of the optional ones that does not get there is told of and left out.
    """
    with ExitStack() as stack:
        contenders = []
        for task in tasks:
            began = time.perf_counter()
            try:
                contender = Contender(task, folder, env)
            except Failed as failed:
                if task.contestant not in optional:
                    raise
                optional[task.contestant](str(failed))
                continue
            watch(f"{task.contestant}: at its gate after {time.perf_counter() - began:.1f} s")
            stack.callback(contender.close)
            contenders.append(contender)
        yield contenders


def measure(
    tasks: Sequence[Task],
    folder: Path,
    env: Mapping[str, str],
    *,
    repeats: int,
    warm_up: int = 2,
    rest: float = REST,
    also: Mapping[str, Sequence[str]] | None = None,
    watch: Callable[[str], None] = lambda line: None,
    optional: Mapping[str, Callable[[str], None]] | None = None,
    seconds: float = float("inf"),
) -> dict[str, Measured]:
    """Steps of all contestants, one of each in turn.

    Args:
        repeats: rounds that count.
        warm_up: steps of each before.
        also: commands asked of a contestant besides its step, in the first ``ALSO`` rounds.
        watch: called with a line on each thing done.
        optional: whom to go on without when it does not get to its gate, and who is told the reason.
        seconds: after which no further round begins, if one is done.

    Raises:
        Failed: a contestant's process ended.
    """
    asked, began = also or {}, time.perf_counter()
    with started(tasks, folder, env, watch, optional or {}) as contenders:
        found = {one.name: Measured(one.name, facts=one.facts) for one in contenders}
        for one in contenders:
            for _ in range(warm_up):
                watch(f"{one.name}: warm-up {one.ask('step')['wall']:.2f} s")
        for done in range(repeats):
            if done and time.perf_counter() - began > seconds:
                break
            for one in contenders:
                time.sleep(rest)
                step = one.ask("step")
                measured = found[one.name]
                watch(f"{one.name}: {step['wall']:.3f} s")
                for key, values in (("wall", measured.wall), ("cpu", measured.cpu), ("peak", measured.peak)):
                    values.append(step[key])
                for command in asked.get(one.name, ()) if done < ALSO else ():
                    time.sleep(rest)
                    for key, value in one.ask(command).items():
                        measured.other.setdefault(key, []).append(value)
    return found


def disagreement(gradients: Path, witness: Path) -> float:
    """‖g − w‖ / ‖w‖ over all arrays of both files; infinite when they do not hold the same names and shapes."""
    with np.load(gradients) as g, np.load(witness) as w:
        if {n: g[n].shape for n in g.files} != {n: w[n].shape for n in w.files}:
            return float("inf")
        apart = sum(float(np.square(g[n].astype(np.float64) - w[n]).sum()) for n in w.files)
        whole = sum(float(np.square(w[n].astype(np.float64)).sum()) for n in w.files)
    return (apart / whole) ** 0.5
