"""Several processes of the PyTorch room, over gloo on this machine: whole weights on each, and slices (FSDP)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_torch_workers import FSDP, FULL

from mlxpref.config_layers import load_config, parse_setting
from mlxpref.errors import ConfigError
from tests.test_workers import RUN, SUMMED, lines, written_rows

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SCRIPT = str(Path(__file__).parent / "run_torch_workers.py")


def group(*command: str) -> list[subprocess.Popen[str]]:
    """Two processes with the environment that torchrun gives."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, *command],
            env=os.environ | SUMMED | given | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A configuration with its data: rows of very different lengths in batches of 5, the ninth of 2."""
    made = tmp_path_factory.mktemp("torch-workers")
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written_rows()))
    shutil.copytree(tiny_model_dir, made / "model")
    text = RUN.format(folder=made).replace("/model}", "/model, backend: torch}")
    assert "backend: torch" in text
    (made / "run.yaml").write_text(text)
    return made


def alone(folder: Path, name: str, *changes: str, resume: bool = False, stop_at: int | None = None) -> Path:
    """The run in this process, one worker, whole weights."""
    from mlxpref.callbacks import TrainCallback
    from mlxpref.train import train

    class Stop(TrainCallback):
        def on_step(self, step: int, metrics: Any) -> None:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    changed = [f"output.adapter_path={folder / name}", f"reference.store={folder / 'alone'}", *changes]
    config = load_config(folder / "run.yaml", [parse_setting(text) for text in changed])
    return train(config, resume=resume, callbacks=[Stop()]).folder


@pytest.fixture(scope="module")
def several(folder: Path) -> list[dict[str, Any]]:
    """What both workers say of the runs of ``run_torch_workers.several``."""
    alone(folder, "begun", *FULL, stop_at=4)
    processes = group("several", str(folder))
    out = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(out)
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


def compare(one: Path, other: Path, largest: float = 1e-5) -> None:
    """Weights equal but for rounding, which has no side."""
    from safetensors.numpy import load_file

    a, b = (load_file(at / "adapters.safetensors") for at in (one, other))
    assert a.keys() == b.keys()
    whole = np.concatenate([np.ravel(a[name]) for name in sorted(a)])
    off = np.concatenate([np.ravel(a[name] - b[name]) for name in sorted(a)])
    assert np.linalg.norm(off) <= largest * np.linalg.norm(whole)
    assert abs(off.mean()) <= 1e-2 * largest * np.abs(whole).mean()


@pytest.mark.parametrize("name", ["dpo", "kto", "fsdp", "fsdp-kto"])
def test_they_end_with_one_process_s_weights(folder: Path, several: list[dict[str, Any]], name: str) -> None:
    """Finds gradients of one share, averaged instead of added up, or of a slice in another's place."""
    settings = {"dpo": [], "kto": ["objective=kto"], "fsdp": [*FULL],
                "fsdp-kto": [*FULL, "objective=kto", "training.iters=3"]}[name]  # fmt: skip
    one = alone(folder, f"{name}-alone", *settings)
    compare(folder / name, one)
    for ours, theirs in zip(lines(folder / name), lines(one), strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "eval_loss", "logps/chosen"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (key, ours["step"])


def test_one_sum_a_step(several: list[dict[str, Any]]) -> None:
    """A coupled objective makes one more, of the log-probs. (Of FSDP: beside those that its layers make.)"""
    for said in several:
        for name, n_sums in (("dpo", 1), ("kto", 2), ("fsdp", 1), ("fsdp-kto", 2)):
            assert set(said[name]["updates"]) == {n_sums}, name
            assert set(said[name]["evaluations"]) <= {1}, name


def test_slices_take_up_a_whole_run_and_one_process_takes_up_theirs(
    folder: Path, several: list[dict[str, Any]]
) -> None:
    """Finds moments or weights that go to the wrong slice, and a checkpoint that holds one worker's only."""
    assert [said["begun"]["step"] for said in several] == [10, 10]
    whole = alone(folder, "never-sliced", *FULL)
    starts = json.loads((folder / "begun" / "run.json").read_text())["starts"]
    assert [(start["step"], start["workers"]) for start in starts] == [(0, 1), (4, 2)]
    compare(folder / "begun", whole)


@pytest.mark.parametrize("hold", [lambda tensor: tensor, lambda tensor: tensor.view(-1)], ids=["python", "torch"])
def test_a_sum_is_over_when_the_library_has_let_go_of_it(
    hold: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of gloo's that lets go of a tensor while Python ends aborts the process, now and then."""
    import torch

    from mlxpref.torch_backend.workers import TorchWorkers

    held, timers = [], []

    def all_reduce(total: Any) -> None:
        held.append(hold(total))
        timers.append(threading.Timer(0.2, held.clear))
        timers[0].start()

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    workers = TorchWorkers.__new__(TorchWorkers)
    assert workers._all_sum(torch.ones(3)).tolist() == [1, 1, 1]
    assert not held


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_killed_worker_ends_the_run_with_a_message_and_a_whole_checkpoint(folder: Path, fsdp: bool) -> None:
    """kill -9 at update 6 of 10, saves every 4; one process finishes the run."""
    settings = FSDP if fsdp else ()
    run = folder / f"killed-{fsdp}"
    more = [word for text in (*settings, "training.save_every=4") for word in ("--set", text)]
    arguments = ["train", "-c", str(folder / "run.yaml"), "--adapter-path", str(run), *more]
    processes = group("command", str(folder), *arguments)
    said, other = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [1, -9], said + other
    (message,) = re.findall(r"error: .*", said)
    assert message.startswith("error: worker 1 (of 0 to 1) was lost: its process ended."), message
    assert f"--adapter-path {run} --resume" in message and "Traceback" not in said
    step = 4 if fsdp else 5
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == f"step-{step:06d}"
    if not fsdp:
        resumed = alone(folder, run.name, "training.save_every=4", f"reference.store={folder / 'store'}", resume=True)
        compare(resumed, alone(folder, "never-killed", "training.save_every=4"))


def test_one_process_cannot_slice(folder: Path) -> None:
    with pytest.raises(ConfigError, match="start them with torchrun"):
        alone(folder, "one-slice", *FSDP)
