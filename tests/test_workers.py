"""Several workers and one process: the same run, and an end that is understood."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpref import workers as module
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.data.batching import collate_step
from mlxpref.data.parts import Splitter
from mlxpref.data.plan import Plan, plan_steps
from mlxpref.errors import RunError
from mlxpref.records import Tokenized
from mlxpref.workers import Group, WorkerLost, Workers

# --- the plan ------------------------------------------------------------------------------------


@st.composite
def data(draw: st.DrawFn) -> list[Tokenized]:
    """Rows of very different lengths and of two or three responses."""
    lengths = st.integers(1, 120)
    return [
        Tokenized(
            np.ones(draw(lengths), np.int32),
            tuple(np.ones(draw(lengths), np.int32) for _ in range(draw(st.integers(2, 3)))),
            example_id=str(i),
        )
        for i in range(draw(st.integers(1, 24)))
    ]


def planned(rows: list[Tokenized], **more: Any) -> Plan:
    return plan_steps(rows, **{"batch_size": 6, "epochs": 2, "micro_batch_tokens": 800, **more})


def members(plan: Plan) -> list[list[int]]:
    return [sorted(row for part in step for row in part.rows) for step in plan.steps]


@settings(max_examples=40, deadline=None)
@given(data(), st.integers(2, 7), st.booleans())
def test_the_same_batches_for_any_number_of_workers(rows: list[Tokenized], n: int, share_prompts: bool) -> None:
    """Finds an example lost or visited twice, and a batch that depends on who computes it."""
    shared, alone = (planned(rows, n_workers=k, share_prompts=share_prompts) for k in (n, 1))
    assert members(shared) == members(alone)
    assert shared.epochs == alone.epochs and shared.tokens == alone.tokens
    assert {part.worker for step in shared.steps for part in step} <= set(range(n))
    assert {part.worker for step in alone.steps for part in step} == {0}


@settings(max_examples=40, deadline=None)
@given(data(), st.integers(2, 7))
def test_workers_finish_together(rows: list[Tokenized], n: int) -> None:
    """Finds shares by number instead of by length: nobody has more than one longest example beyond another."""
    for step in planned(rows, n_workers=n).steps:
        costs = [0] * n
        largest = 0
        for part in step:
            for index in part.rows:
                cost = len(rows[index].prompt_ids) + sum(map(len, rows[index].response_ids))
                costs[part.worker] += cost
                largest = max(largest, cost)
        assert max(costs) - min(costs) <= largest
        assert sum(cost > 0 for cost in costs) == min(n, sum(len(part.rows) for part in step))


@settings(max_examples=25, deadline=None)
@given(data())
def test_one_worker_has_the_plan_of_before(rows: list[Tokenized]) -> None:
    """Finds examples that are reordered on the way through the shares of a single worker."""
    batches = [list(range(len(rows)))[::-1]]
    splitter = Splitter(rows, share_prompts=True, budget=800)
    assert splitter.share_out(batches[0], 1) == batches
    assert planned(rows) == planned(rows, n_workers=1)


def test_a_batch_says_whose_its_parts_are() -> None:
    rows = [Tokenized(np.ones(9, np.int32), (np.ones(5, np.int32),) * 2, example_id=str(i)) for i in range(6)]
    (step,) = planned(rows, n_workers=3, epochs=1).steps
    assert set(collate_step(rows, step).workers) == {0, 1, 2}
    (step,) = planned(rows, epochs=1).steps
    assert collate_step(rows, step).workers == ()


# --- a group of threads --------------------------------------------------------------------------


class Threads(Group):
    """A worker whose sums are made in memory; ``silent`` ones never give their part."""

    def __init__(self, rank: int, table: dict[int, np.ndarray], barrier: threading.Barrier) -> None:
        self.table, self.barrier, self.silent = table, barrier, threading.Event()
        super().__init__(rank, barrier.parties, "127.0.0.1")
        atexit.unregister(self._leave)

    def _all_sum(self, values: np.ndarray) -> np.ndarray:
        if self.silent.is_set():
            time.sleep(60)
        self.table[self.rank] = values
        self.barrier.wait(60)
        total = np.sum([self.table[rank] for rank in range(self.size)], axis=0)
        self.barrier.wait(60)
        return total

    def _given(self, values: np.ndarray) -> np.ndarray:
        return values

    def _numpy(self, values: np.ndarray) -> np.ndarray:
        return values


def everywhere(group: list[Threads], call: Callable[[Threads], Any]) -> list[Any]:
    """A call on every worker at once; what each returned or raised."""
    found: list[Any] = [None] * len(group)

    def one(at: int) -> None:
        try:
            found[at] = call(group[at])
        except Exception as error:  # what it raised is what is looked at
            found[at] = error

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(group))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Threads]]:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)
    table: dict[int, np.ndarray] = {}
    barrier = threading.Barrier(3)
    made: dict[int, Threads] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: made.update({rank: Threads(rank, table, barrier)}))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    yield [made[rank] for rank in range(3)]
    for one in made.values():
        if one._watch is not None:
            one._watch.close()


def test_a_lone_worker_changes_nothing() -> None:
    lone, values = Workers(), np.arange(3, dtype=np.float32)
    assert lone.sum(values) is values and lone.sum_numpy(values) is values and lone.share(b"x") == b"x"
    assert not lone.stopping and lone.n_sums == 0
    lone.wants_stop = True
    assert lone.stopping


@pytest.mark.parametrize("n_bytes", [0, 1, 300, module._PIECE + 7])
def test_bytes_reach_every_worker(group: list[Threads], n_bytes: int) -> None:
    """Finds a length that a float32 does not hold, and pieces out of order."""
    content = np.random.default_rng(0).bytes(n_bytes)
    assert everywhere(group, lambda one: one.share(content if one.rank == 0 else b"other")) == [content] * 3


def test_what_differs_is_named_on_every_worker(group: list[Threads]) -> None:
    facts = {"plan": "a", "data fingerprint": "b"}
    assert everywhere(group, lambda one: one.check_alike(facts, "the same:")) == [None] * 3
    for error in everywhere(
        group, lambda one: one.check_alike(facts | ({"data fingerprint": "c"} if one.rank == 2 else {}), "the same:")
    ):
        assert isinstance(error, RunError)
        assert str(error) == "the same:\n  worker 2: another data fingerprint than worker 0"


def test_a_setting_that_only_another_worker_has_is_named(group: list[Threads]) -> None:
    """Finds a comparison along worker 0's settings alone: an option given on one machine would train another loss."""
    facts = {"setting objective": "dpo"}
    more = {"setting objective.label_smoothing": "0.3"}
    for error in everywhere(group, lambda one: one.check_alike(facts | (more if one.rank == 1 else {}), "the same:")):
        assert isinstance(error, RunError)
        assert str(error) == "the same:\n  worker 1: another set of settings than worker 0"


def test_a_sum_is_left_when_a_worker_goes_and_the_library_does_not_notice(group: list[Threads]) -> None:
    """Finds a run that waits for ever: the sums of 0 and 1 never come back, and the watch alone knows."""
    group[2].silent.set()
    assert group[2]._watch is not None

    def leave_or_sum(one: Threads) -> Any:
        if one.rank == 2:
            assert one.tell("the disk is full")
            return None
        return one.sum_numpy(np.ones(2, np.float32))

    threading.Timer(1.0, lambda: group[0].tell("all is over")).start()  # what worker 0 does with its error
    first, second, _ = everywhere(group, leave_or_sum)
    assert isinstance(first, WorkerLost) and str(first) == "worker 2 (of 0 to 2) was lost: the disk is full"
    assert isinstance(second, WorkerLost) and str(second) == "worker 0 (of 0 to 2) was lost: all is over"
    assert group[1].tell("not said twice")
    group[0].barrier.abort()


# --- two processes -------------------------------------------------------------------------------

SUMMED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Two processes on two cores: threads of theirs would only be in each other's way."""


def ports() -> int:
    """The first of two neighbouring ports that are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = int(one.getsockname()[1])
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


def launched(*command: str) -> subprocess.Popen[str]:
    """``mlx.launch -n 2 --backend ring -- python command``."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    assert launcher.exists(), "mlx.launch is not installed beside this Python"
    return subprocess.Popen(
        [str(launcher), "-n", "2", "--backend", "ring", "-p", str(ports()), "--", sys.executable, *command],
        env=os.environ | SUMMED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_hand(folder: Path, *command: str) -> list[subprocess.Popen[str]]:
    """The same two processes without the launcher, which keeps a core busy while it waits."""
    port, hosts = ports(), folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | SUMMED | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


RUN_WORKERS = str(Path(__file__).parent / "run_workers.py")

RUN = """
model: {{path: {folder}/model}}
data: {{source: {folder}/pairs.jsonl, valid_fraction: 0.2}}
relabel: {{}}
tokenization: {{max_length: 512, max_prompt_length: 400}}
batching: {{batch_size: 5, max_shapes: 8, micro_batch_tokens: 600}}
adapter: {{num_layers: 2, lora_parameters: {{rank: 4, scale: 4.0}}}}
reference: {{store: {folder}/store}}
optimizer: {{learning_rate: 1.0e-3, max_grad_norm: 0.05, schedule: {{name: cosine, warmup_steps: 1}}}}
training: {{iters: 10, steps_per_eval: 5, save_every: 100}}
"""


def written_rows() -> list[dict[str, Any]]:
    """Pairs of very different lengths."""
    stories = [f"Once upon a time there was a {a} {b}." for a in ("little", "big") for b in ("girl", "cat", "dog")]
    return [
        {
            "prompt": f"Write story {i}.",
            "chosen": stories[i % 6] + " The cat said hello." * (i * i % 11 + 1),
            "rejected": stories[(i + 1) % 6],
            "score_chosen": 9, "score_rejected": 2 + i % 5,
        }
        for i in range(26)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A configuration with its data: 42 rows of very different lengths in batches of 5, the ninth of 2."""
    made = tmp_path_factory.mktemp("workers")
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written_rows()))
    shutil.copytree(tiny_model_dir, made / "model")
    (made / "run.yaml").write_text(RUN.format(folder=made))
    return made


def alone(folder: Path, name: str, *changes: str, resume: bool = False, stop_at: int | None = None) -> Path:
    """The run in this process, one worker."""
    from mlxpref.callbacks import TrainCallback
    from mlxpref.train import train

    class Stop(TrainCallback):
        def on_step(self, step: int, metrics: Any) -> None:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    changed = [f"output.adapter_path={folder / name}", f"reference.store={folder / 'alone'}", *changes]
    config = load_config(folder / "run.yaml", [parse_setting(text) for text in changed])
    return train(config, resume=resume, callbacks=[Stop()]).folder


def compare(one: Path, other: Path, *, largest: float = 1e-5) -> None:
    """Adapters equal but for rounding, which has no side: of all values together, and of each tensor."""
    from safetensors.numpy import load_file

    a, b = (load_file(folder / "adapters.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and len(a) == 28
    _compare(a, b, largest)


def _compare(a: Any, b: Any, largest: float = 1e-5) -> None:
    whole = np.concatenate([np.ravel(a[name]) for name in sorted(a)])
    off = np.concatenate([np.ravel(a[name] - b[name]) for name in sorted(a)])
    assert np.linalg.norm(whole) > 1 and np.linalg.norm(off) <= largest * np.linalg.norm(whole)
    # Adam divides by a gradient's own size: where that is nearly 0 rounding weighs more, and processors differ.
    assert np.abs(off).max() <= 5 * largest * np.abs(whole).max()
    assert abs(off.mean()) <= 1e-2 * largest * np.abs(whole).mean()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def several(folder: Path) -> list[dict[str, Any]]:
    """What both workers say of the runs of ``run_workers.several_runs``."""
    alone(folder, "begun", stop_at=3)
    processes = by_hand(folder, RUN_WORKERS, "several", str(folder))
    out = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(out)
    files = [folder / f"said-{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.mlx
@pytest.mark.slow
class TestTwoWorkers:
    @pytest.mark.parametrize("name", ["dpo", "kto"])
    def test_they_end_with_one_process_s_adapter(self, folder: Path, several: list[dict[str, Any]], name: str) -> None:
        """Finds gradients divided by one worker's share, added twice or not at all; a mean of means; clipping or a
        coupled objective on a part of the batch."""
        assert [said[name]["step"] for said in several] == [10, 10]
        one = alone(folder, f"{name}-alone", f"objective={name}")
        compare(folder / name, one)
        for ours, theirs in zip(lines(folder / name), lines(one), strict=True):
            for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "eval_loss",
                        "eval_rewards/margins", "eval_rewards/accuracies", "logps/chosen"):  # fmt: skip
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (key, ours["step"])
        assert "eval_loss" in lines(one)[4]

    def test_one_sum_a_step(self, several: list[dict[str, Any]]) -> None:
        """Finds a sum for each tensor or micro-batch. A coupled objective makes one more, of the log-probs."""
        for said in several:
            for name, n_sums in (("dpo", 1), ("kto", 2)):
                made = [n for what, n in said[name]["counts"] if what == "update"]
                assert made == [n_sums] * 10
                evaluated = [n for what, n in said[name]["counts"] if what == "evaluation"]
                assert evaluated and set(evaluated) == {1}

    def test_a_batch_smaller_than_the_group(self, folder: Path, several: list[dict[str, Any]]) -> None:
        """Finds a worker without a part that waits, or whose gradients are not zero."""
        assert [said["single"]["step"] for said in several] == [3, 3]
        settings = ["batching.batch_size=1", "training.iters=3", "training.steps_per_eval=0"]
        compare(folder / "single", alone(folder, "single-alone", *settings))

    def test_they_go_on_with_one_process_s_run(self, folder: Path, several: list[dict[str, Any]]) -> None:
        """Finds moments or a position that only worker 0 took up."""
        assert [said["onward"]["step"] for said in several] == [10, 10]
        compare(folder / "begun", alone(folder, "onward-alone"))
        starts = json.loads((folder / "begun" / "run.json").read_text())["starts"]
        assert [(start["step"], start["workers"]) for start in starts] == [(0, 1), (3, 2)]

    def test_workers_that_differ_are_named_before_anything_is_written(
        self, folder: Path, several: list[dict[str, Any]]
    ) -> None:
        first, second = (said["other"] for said in several)
        assert first["type"] == "RunError" and "worker 1: another setting training.seed" in first["error"]
        assert second["type"] == "WorkerEnded"
        assert not (folder / "other" / "config.yaml").exists()

    @pytest.mark.parametrize("objective", ["dpo", "kto"])
    def test_dropout_and_a_moving_reference_follow_the_part(
        self, folder: Path, several: list[dict[str, Any]], objective: str
    ) -> None:
        """Finds keys counted by worker, and reference log-probs that only their worker knows."""
        from run_workers import moving_steps

        first, second = (dict(np.load(folder / f"moving-{objective}-{rank}.npz")) for rank in range(2))
        assert all(np.array_equal(first[name], second[name]) for name in first)
        _compare(moving_steps(str(folder / "model"), objective, Workers(), n_workers=2), first)

    def test_a_signal_to_one_stops_all_after_the_same_step(self, folder: Path, several: list[dict[str, Any]]) -> None:
        """Finds a worker that stops by itself while the others wait for it. It came in the middle of step 3."""
        assert [said["stopped"]["step"] for said in several] == [3, 3]
        assert {said["stopped"]["interrupted"] for said in several} == {int(signal.SIGINT)}
        compare(alone(folder, "stopped", f"reference.store={folder / 'store'}", resume=True),
                folder / "dpo")  # fmt: skip

    def test_a_killed_worker_ends_the_run_with_a_message_and_a_whole_checkpoint(self, folder: Path) -> None:
        """kill -9 in the middle of update 6 of 10; one process finishes the run."""
        run = folder / "killed"
        arguments = ["train", "-c", str(folder / "run.yaml"), "--adapter-path", str(run)]
        process = launched(RUN_WORKERS, "command", str(folder), *arguments)
        out, err = process.communicate(timeout=120)
        assert "rank 1 exited with code -9" in err and "rank 0 exited with code 1" in err, out + err
        (message,) = re.findall(r"error: .*", err)
        assert message.startswith("error: worker 1 (of 0 to 1) was lost: its process ended. Step 5 of 10 ")
        assert f"mlxpref train --adapter-path {run} --resume" in message and "Traceback" not in err
        assert json.loads((run / "checkpoints" / "step-000005" / "state.json").read_text())["step"] == 5
        assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5]
        resumed = alone(folder, "killed", f"reference.store={folder / 'store'}", resume=True)
        compare(resumed, alone(folder, "never-killed"))

    def test_ctrl_c_reaches_both_and_worker_0_saves(self, folder: Path) -> None:
        """The documented command line; a terminal sends the signal to every process."""
        run = folder / "interrupted"
        more = ["--iters", "2000", "--set", "training.steps_per_eval=0"]
        process = launched("-m", "mlxpref", "train", "-c", str(folder / "run.yaml"), "--adapter-path", str(run), *more)
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        own = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        for pid in own.stdout.split():
            os.kill(int(pid), signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert "rank 0 exited with code 130" in err and "rank 1 exited with code 130" in err, out + err
        step = len(lines(run))
        assert f"stopped after step {step} of 2000, all saved" in out and out.count("all saved") == 1
        assert (run / "checkpoints" / f"step-{step:06d}" / "state.json").exists()
        assert f"mlxpref train --adapter-path {run} --resume" in out
        assert "error" not in err and "workers: 2" in out and out.count("run folder:") == 1
