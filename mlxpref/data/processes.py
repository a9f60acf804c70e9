"""Work shared out to fresh processes, its results in order.

They are started as new programs, neither forked (a fork inherits the locks of libraries' threads, and MLX and PyTorch
do not outlive one) nor spawned by ``multiprocessing`` (which runs the user's script again in each). A process ends with
its input, so none outlives the one that started it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from mlxpref.data.stored import dumps
from mlxpref.errors import RunError

A = TypeVar("A")
B = TypeVar("B")

_START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path!r}; "
    "from mlxpref.data.processes import serve; serve()"
)
"""The one that started it decides what an interrupt means, from its first moment on."""

_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""What a process that is one of many is told: the others use the other cores."""


MOST = 8
"""Processes at most unless more are asked for: each holds some 330 MB of libraries."""


def cores() -> int:
    """Cores this process may use, its share of them where a launcher has started several here; at most ``MOST``."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(MOST, found // max(1, int(beside) if beside.isdigit() else 1)))


def shared_out(work: Callable[[A], B], tasks: Iterable[A], n: int) -> Generator[B, None, None]:
    """``work`` of each task, in their order, by ``n`` processes; here, where that is one.

    ``work`` is sent once to each process, and keeps there what it remembers; it is called here after all if it cannot
    be sent (a tokenizer of a class that only the user's script knows).

    Close it where its reader may stop before the end: the processes are ended then.

    Raises:
        RunError: a process ended by itself, or cannot be started.
    """
    sent = _pickled(work) if n > 1 else None
    if sent is None:
        yield from map(work, tasks)
        return
    started: list[_Process] = []
    try:
        for _ in range(n):
            started.append(_Process())
            started[-1].send(sent)
        if not all(process.answer()[0] for process in started):
            started = _ended(started)
            yield from map(work, tasks)
            return
        yield from _in_order(started, tasks)
    finally:
        _ended(started)


def _pickled(work: Any) -> bytes | None:
    try:
        return dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


def _in_order(started: list[_Process], tasks: Iterable[Any]) -> Iterator[Any]:
    """Two tasks wait for each process, no more: what is not read yet need not be in memory."""
    free: SimpleQueue[_Process] = SimpleQueue()
    for process in started:
        free.put(process)

    def ask(task: bytes) -> Any:
        process = free.get()
        try:
            process.send(task)
            fine, result = process.answer()
        finally:
            free.put(process)
        if not fine:
            raise result
        return result

    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(len(started)) as threads:
        try:
            for task in tasks:
                waiting.append(threads.submit(ask, dumps(task)))
                while len(waiting) > 2 * len(started):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            if waiting:
                _ended(started)


def _ended(started: list[_Process]) -> list[_Process]:
    for process in started:
        process.end()
    return []


class _Process:
    """One fresh process; what goes in and out are pickles."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **_ONE_THREAD}
            )
        except OSError as error:
            raise RunError(f"no process can be started to share the work: {error}; ask for fewer processes") from error

    def send(self, pickled: bytes) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):  # said when the answer is asked for
                self._process.stdin.write(pickled)
                self._process.stdin.flush()

    def answer(self) -> tuple[bool, Any]:
        """Whether it went well, and the result or what was raised."""
        try:
            if self._process.stdout is None:
                raise EOFError
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError) as error:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            raise RunError(
                f"a process that shared the work ended by itself (exit code {self._process.poll()}); if memory ran "
                "out, close other programs, or ask for fewer processes"
            ) from error

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def serve() -> None:
    """What a started process does: take the work, then a task at a time, until there is no more input."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints elsewhere
    tasks = sys.stdin.buffer
    work: Any = None

    def reply(call: Callable[[], Any]) -> None:
        try:
            answer = (True, call())
        except Exception as error:  # of any kind: it is raised again by the one that asked
            answer = (False, error)
        try:
            pickled = dumps(answer)
        except (pickle.PicklingError, TypeError, AttributeError):
            pickled = dumps((False, RunError(f"{type(answer[1]).__name__}: {answer[1]}")))
        answers.write(pickled)
        answers.flush()

    def take() -> None:
        nonlocal work
        work = pickle.load(tasks)

    reply(take)
    while work is not None:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        reply(partial(work, task))
