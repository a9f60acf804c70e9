"""The process of one contestant: ``python -m bench.worker TASK.json``, commands on stdin, replies on stdout.

A contestant is a function ``(task, gate)`` that sets up, and then calls ``gate()`` whenever it is about to begin a
step; the call returns when the step may begin, and the time until the next call is the step's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

WITNESS_FILE = "witness.npz"
"""Beside the contestants' gradients: those that all are compared with."""


@dataclass(frozen=True)
class Task:
    """What every contestant is told.

    Attributes:
        contestant: a key of ``contestants.TABLE``.
        model: folder.
        lora: file of the LoRA start, see ``model.lora_start``.
        pairs: file of the pairs.
        gradients: file to write the LoRA gradient of the first batch to, at the start; or None.
        batch_size: pairs of a step; the step always takes the first so many.
        micro_batch_tokens: token positions that ours computes at once.
        threads: of the BLAS and of PyTorch.
        epochs: of a whole run over all pairs, which is then what the gate lets through; None: single steps.
        seed: of the run's order.
    """

    contestant: str
    model: str
    lora: str
    pairs: str
    gradients: str | None = None
    batch_size: int = 4
    beta: float = 0.1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    micro_batch_tokens: int = 8192
    grad_checkpoint: bool = False
    threads: int = 2
    epochs: int | None = None
    seed: int = 0


class Finished(BaseException):
    """Thrown through the contestant, whose own loops may be endless and catch every ``Exception``."""


class Gate:
    """Where a contestant waits before each step, and says how the last one went.

    Attributes:
        facts: what it says of itself when it gets here first: ``weights`` and ``reference`` in bytes, …
        reset_peak, peak: of the memory in bytes, of whichever library.
        on: further commands by name, each of which returns figures.
        figures: of the step, besides its times.
    """

    def __init__(self, commands: TextIO, replies: TextIO) -> None:
        self._commands, self._replies = commands, replies
        self._began: tuple[float, float] | None = None
        self._ready = False
        self.facts: dict[str, Any] = {}
        self.reset_peak: Callable[[], None] = lambda: None
        self.peak: Callable[[], float] = lambda: 0.0
        self.on: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self.figures: dict[str, Any] = {}

    def __call__(self) -> None:
        if self._began is not None:
            wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
            self._say({"wall": wall, "cpu": cpu, "peak": self.peak(), **self.figures})
        elif not self._ready:
            self._ready = True
            self._say({"ready": self.facts})
        self._began = None
        while (command := json.loads(self._commands.readline() or '"end"')) != "step":
            if command == "end":
                raise Finished
            self._say(dict(self.on[command]()) if command in self.on else {})
        self.reset_peak()
        self._began = time.perf_counter(), time.process_time()

    def _say(self, what: Mapping[str, Any]) -> None:
        self._replies.write(json.dumps(what) + "\n")
        self._replies.flush()


def main(file: str) -> None:
    task = Task(**json.loads(Path(file).read_text()))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for who measures
    from bench.contestants import TABLE

    contestant = TABLE[task.contestant]
    module, _, name = (contestant.runs if task.epochs is None else str(contestant.whole)).partition(":")
    try:
        getattr(importlib.import_module(f"bench.{module}"), name)(task, Gate(sys.stdin, replies))
    except Finished:
        os._exit(0)  # threads of BLAS libraries may wait for one another at exit


if __name__ == "__main__":
    main(sys.argv[1])
