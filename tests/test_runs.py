"""Run folders: whole or not there, at every moment, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxpref.errors import RunError
from mlxpref.runs import Checkpoint, RunFolder, open_run


def write(value: int) -> Any:
    """A backend's part of a checkpoint: an adapter whose content is ``value``."""

    def into(folder: Path) -> None:
        save_file({"lora_a": np.full(4, value, np.float32)}, folder / "adapters.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"value": value}))
        save_file({"m": np.full(4, -value, np.float32)}, folder / "step_state.safetensors")

    return into


def begin(run: RunFolder) -> None:
    run.begin("model: {path: m}\n", {"fact": 1})


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def last(run: RunFolder) -> Checkpoint:
    found = run.last_checkpoint()
    assert found is not None
    return found


# --- occupied, resumed, locked -------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_with_both_remedies(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=False) as run:
        begin(run)
        run.save(1, write(1), {}, keep_last=None)
    refused = pytest.raises(RunError, match=r"already holds a run.*--resume.*--adapter-path")
    with refused, open_run(run.path, resume=False):
        pass
    assert float(load_file(run.path / "adapters.safetensors")["lora_a"][0]) == 1


def test_a_foreign_adapter_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"precious")
    with pytest.raises(RunError, match="not a run's"), open_run(tmp_path, resume=False):
        pass
    assert (tmp_path / "adapters.safetensors").read_bytes() == b"precious"


def test_a_run_that_never_saved_nor_stepped_may_be_started_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=False) as run:
        begin(run)
    with open_run(tmp_path / "run", resume=False) as run:
        begin(run)


def test_nothing_to_resume_is_an_error_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"), open_run(tmp_path / "run", resume=True):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_it_begins_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run", resume=False):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_two_processes_cannot_hold_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    held = (
        "import sys, pathlib; from mlxpref.runs import open_run\n"
        "with open_run(pathlib.Path(sys.argv[1]), resume=False) as run:\n"
        "    run.begin('a: 1', {}); print('held', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="another process"), open_run(tmp_path / "run", resume=False):
        pass
    other.kill()
    other.communicate()
    with open_run(tmp_path / "run", resume=True):
        pass
    assert ".lock" not in names(tmp_path / "run")


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_with_its_state_and_is_the_runs_adapter(tmp_path: Path) -> None:
    state = {"best_value": 0.1 + 0.2, "pending": None}
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        run.save(3, write(3), state, keep_last=None)
        found = last(run)
    assert (found.step, {key: found.state[key] for key in state}) == (3, state)
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (found.folder / name).read_bytes()


def test_keep_last_keeps_the_latest(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        for step in (5, 10):
            run.save(step, write(step), {}, keep_last=3)
        assert names(run.checkpoints) == ["step-000005", "step-000010"]
        for step in (100000, 1000000):
            run.save(step, write(step), {}, keep_last=2)
    assert names(tmp_path / "checkpoints") == ["step-100000", "step-1000000"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state"])
def test_a_damaged_checkpoint_is_said_and_passed_over(tmp_path: Path, damage: str) -> None:
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        run.save(1, write(1), {}, keep_last=None)
        file = run.save(2, write(2), {}, keep_last=None) / "step_state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-3])
    elif damage == "flipped":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    else:
        (file.parent / "state.json").unlink()
    with open_run(tmp_path, resume=True) as run:
        found = last(run)
        assert found.step == 1
        assert "step-000002" in run.said[0]
        run.rewind(found)
    assert float(load_file(tmp_path / "adapters.safetensors")["lora_a"][0]) == 1
    assert names(tmp_path / "checkpoints") == ["step-000001"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[save] write failed")]
)
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path: Path, error: Exception) -> None:
    def fails(folder: Path) -> None:
        write(2)(folder)
        raise error

    with open_run(tmp_path, resume=False) as run:
        begin(run)
        run.save(1, write(1), {}, keep_last=1)
        with pytest.raises(RunError, match=r"GB free there.*--resume"):
            run.save(2, fails, {}, keep_last=1)
        assert names(run.checkpoints) == ["step-000001"]
        assert last(run).step == 1
    assert float(load_file(tmp_path / "adapters.safetensors")["lora_a"][0]) == 1


def test_a_write_that_a_library_did_not_notice_failing_is_noticed(tmp_path: Path) -> None:
    def short(folder: Path) -> None:
        write(2)(folder)
        os.truncate(folder / "adapters.safetensors", 70)

    with open_run(tmp_path, resume=False) as run:
        begin(run)
        with pytest.raises(RunError, match="not written whole"):
            run.save(2, short, {}, keep_last=None)
        assert names(run.checkpoints) == []


def test_what_a_killed_process_was_making_is_cleared_and_best_is_put_back(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        run.save(1, write(1), {}, keep_last=None)
        run.save_best(write(1), {"step": 1})
    (tmp_path / "best").rename(tmp_path / ".best.0123abcd.old")  # between the two renames of a replacement
    (tmp_path / "checkpoints" / ".step-000002.part").mkdir()
    (tmp_path / ".adapters.safetensors.ab12.part").write_bytes(b"half")
    with open_run(tmp_path, resume=True):
        pass
    assert json.loads((tmp_path / "best" / "state.json").read_text())["step"] == 1
    assert not [name for name in (*names(tmp_path), *names(tmp_path / "checkpoints")) if name.startswith(".")]


def test_best_is_replaced_whole(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        for step in (1, 2):
            run.save_best(write(step), {"step": step, "metric": "eval_loss", "value": 0.5})
    assert json.loads((tmp_path / "best" / "adapter_config.json").read_text()) == {"value": 2}
    assert json.loads((tmp_path / "best" / "state.json").read_text())["step"] == 2
    assert not [name for name in names(tmp_path) if name.startswith(".best")]


# --- metrics -------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_beyond_the_checkpoint_and_half_lines_go_on_resume(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        for step in range(1, 6):
            run.log({"step": step, "loss": 1 / step, "note": "a\u2028b"})
            if step == 3:
                run.save(3, write(3), {"pending": None}, keep_last=None)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    with open_run(tmp_path, resume=True) as run:
        run.rewind(last(run))
        run.log({"step": 4, "loss": 9.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines(tmp_path)] == [1, 1 / 2, 1 / 3, 9]


def test_resuming_without_a_checkpoint_starts_the_metrics_over(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        begin(run)
        run.log({"step": 1})
    with open_run(tmp_path, resume=True) as run:
        run.rewind(run.last_checkpoint())
    assert lines(tmp_path) == []


def test_metrics_are_json_even_when_not_finite(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False) as run:
        run.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_no_half_line_is_left_when_the_disk_fills(tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the kernel writes part of the line, then refuses."""
    code = (
        "import sys, signal, resource, pathlib\n"
        "from mlxpref.runs import open_run\n"
        "from mlxpref.errors import RunError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "with open_run(pathlib.Path(sys.argv[1]), resume=False) as run:\n"
        "    try:\n"
        "        for step in range(1, 100):\n"
        "            run.log({'step': step, 'text': 'x' * 37})\n"
        "    except RunError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    found = lines(tmp_path)  # every line parses
    assert [line["step"] for line in found] == list(range(1, len(found) + 1)) and len(found) > 5


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    """A run inside a model or data folder mixes its files with theirs."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"is not empty \(model\.safetensors\)"), open_run(tmp_path, resume=False):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]
