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
from mlxpref.mlx_backend.elementwise import on_cpu

MOST = 8
"""Lanes at most: each holds the activations of a micro-batch."""


class Job(NamedTuple):
    """Something to compute in a lane: ``make`` is called there, and returns a tree of lazy arrays."""

    lane: int
    make: Callable[[], Any]


def count() -> int:
    """How many lanes this machine has: cores this process may use, at most ``OMP_NUM_THREADS`` where that is set;
    1 on a GPU. ``MLXPREF_LANES`` overrules it."""
    given = os.environ.get("MLXPREF_LANES", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    if not on_cpu():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, MOST, int(threads) if threads.isdigit() and int(threads) else cores))


class Lanes:
    """The streams of one owner.

    Attributes:
        n: how many.
    """

    def __init__(self, n: int | None = None):
        self.n = count() if n is None else n
        self._streams = [mx.new_stream(mx.cpu) for _ in range(self.n)] if self.n > 1 else []

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """The results in the order of the jobs, all computed; each lane has one job at a time, in their order."""
        if len({job.lane for job in jobs}) < 2 or not self._streams:
            return [self._waited(job.make()) for job in jobs]
        results: dict[int, Any] = {}
        with blas.threads(1):
            for at in _in_turn(jobs):
                lane, make = jobs[at]
                before = [results[i] for i in results if jobs[i].lane == lane]
                mx.eval(before[-1:])  # one micro-batch's activations at a time
                with mx.stream(self._streams[lane]):
                    results[at] = make()
                mx.async_eval(results[at])
            mx.eval(list(results.values()))
        return [results[at] for at in range(len(jobs))]

    @staticmethod
    def _waited(result: Any) -> Any:
        mx.eval(result)
        return result


def _in_turn(jobs: Sequence[Job]) -> list[int]:
    """Indices of jobs, first the first of every lane, then the second …"""
    seen: dict[int, int] = defaultdict(int)
    turns = []
    for at, job in enumerate(jobs):
        turns.append((seen[job.lane], at))
        seen[job.lane] += 1
    return [at for _, at in sorted(turns)]


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
