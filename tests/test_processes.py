"""Work shared out to fresh processes: results in order, errors as they are, nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxpref.data import processes
from mlxpref.data.processes import shared_out
from mlxpref.errors import DataError, RunError


def squared(n: int) -> int:
    return n * n


def refused(n: int) -> int:
    if n == 7:
        raise DataError("seven")
    return n


def ended(n: int) -> int:
    os._exit(3)


def slow(n: int) -> int:
    time.sleep(0.01 * (n % 3))
    return os.getpid()


def test_results_come_in_order_from_several_processes() -> None:
    """Finds results in the order they were done, or made by one process."""
    assert list(shared_out(squared, range(50), 3)) == [n * n for n in range(50)]
    found = list(shared_out(slow, range(30), 2))
    assert len(set(found)) == 2 and os.getpid() not in found
    assert list(shared_out(squared, [], 2)) == []


def test_what_a_process_raises_is_raised_here() -> None:
    """Finds an error lost, or told as another one."""
    with pytest.raises(DataError, match="seven"):
        list(shared_out(refused, range(20), 2))
    with pytest.raises(RunError, match=r"ended by itself \(exit code"):
        list(shared_out(ended, range(20), 2))


def test_work_that_cannot_be_sent_is_done_here() -> None:
    """Finds a tokenizer of the user's own script that stops a run."""
    assert list(shared_out(lambda n: n + 1, range(5), 2)) == [1, 2, 3, 4, 5]


def test_no_process_outlives_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds processes left behind when the results are not wanted any more, and tasks taken long before their time."""
    taken, made = [], []
    begin = processes._Process.__init__

    def noted(self: Any) -> None:
        begin(self)
        made.append(self._process)

    monkeypatch.setattr(processes._Process, "__init__", noted)

    def tasks() -> Iterator[int]:
        for n in range(1000):
            taken.append(n)
            yield n

    results = shared_out(squared, tasks(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(made) == 2 and all(process.poll() is not None for process in made)
    assert len(taken) < 12


def test_a_process_that_cannot_be_started_is_said_and_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a full temporary folder blamed for it, or the first processes left waiting."""
    started: list[Any] = []
    popen = subprocess.Popen

    def third_fails(*args: Any, **more: Any) -> Any:
        if len(started) == 2:
            raise OSError(12, "Cannot allocate memory")
        started.append(popen(*args, **more))
        return started[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", third_fails)
    with pytest.raises(RunError, match="Cannot allocate memory; ask for fewer processes"):
        list(shared_out(squared, range(9), 4))
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_script_is_not_run_again_by_its_processes(tmp_path: Path) -> None:
    """Finds a way of starting processes for which every user's script needs a guard around its main part."""
    script = tmp_path / "script.py"
    script.write_text(
        "from mlxpref.data.processes import shared_out\n"
        "print('once')\n"
        "import operator\n"
        "print(list(shared_out(operator.neg, [1, 2, 3], 2)))\n"
    )
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=place)
    assert (done.stdout, done.stderr) == ("once\n[-1, -2, -3]\n", "")
