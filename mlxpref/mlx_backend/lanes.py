"""Several micro-batches at a time on the CPU, one on each core.

MLX computes an operation on one core unless it is a matrix product. A *lane* is a stream of its own, with a thread of
its own; while several are busy, BLAS takes one core for each product. On a GPU there is one lane, which is the device.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlxpref import blas
from mlxpref.errors import ConfigError
from mlxpref.mlx_backend.elementwise import on_cpu

MOST = 8
"""Lanes at most: each holds the activations of a micro-batch."""


class Job(NamedTuple):
    """Something to compute in a lane: ``make`` is called there, and returns a tree of lazy arrays to compute."""

    lane: int
    make: Callable[[], Any]


def count() -> int:
    """How many lanes this machine has: cores this process may use, at most ``OMP_NUM_THREADS`` where that is set;
    1 on a GPU. On a CPU ``MLXPREF_LANES`` overrules it.

    Raises:
        ConfigError: ``MLXPREF_LANES`` is no number of lanes.
    """
    if not on_cpu():
        return 1
    given = os.environ.get("MLXPREF_LANES", "").strip()
    if given:
        if not given.isdigit() or int(given) < 1:
            raise ConfigError(f"MLXPREF_LANES is {given!r}; it is a number of at least 1")
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, MOST, int(threads) if threads.isdigit() and int(threads) else cores))


_streams: list[mx.Stream] = []
"""Of this process: a stream is never given back."""


class Lanes:
    """Some of the lanes of this process.

    Attributes:
        n: how many. On a GPU, which may go on with a run that began on a CPU, they follow one another.
    """

    def __init__(self, n: int | None = None):
        self.n = count() if n is None else n
        while on_cpu() and len(_streams) < self.n > 1:
            _streams.append(mx.new_stream(mx.cpu))

    def run(self, jobs: Sequence[Job]) -> None:
        """Compute all jobs, one at a time in each lane and there in their order. Nothing of them is held here."""
        if len({job.lane for job in jobs}) < 2 or not on_cpu():
            for job in jobs:
                mx.eval(job.make())
            return
        begun: dict[int, Any] = {}
        with blas.threads(1):
            for lane, make in _in_turn(jobs):
                mx.eval(begun.pop(lane, []))  # one micro-batch's activations at a time
                with mx.stream(_streams[lane]):
                    begun[lane] = make()
                mx.async_eval(begun[lane])
            mx.eval(list(begun.values()))


def _in_turn(jobs: Sequence[Job]) -> list[Job]:
    """First the first of every lane, then the second …"""
    seen: dict[int, int] = defaultdict(int)
    turns = []
    for at, job in enumerate(jobs):
        turns.append((seen[job.lane], at))
        seen[job.lane] += 1
    return [jobs[at] for _, at in sorted(turns)]


class PerLane:
    """A function compiled once for each lane: a compiled graph stays on the stream it was traced on."""

    def __init__(self, function: Callable[..., Any], **compiled: Any):
        self._function = function
        self._options = compiled
        self._made: dict[int, Callable[..., Any]] = {}

    def __getitem__(self, lane: int) -> Callable[..., Any]:
        if lane not in self._made:
            self._made[lane] = mx.compile(partial(self._function), **self._options)
        return self._made[lane]
