"""The training loop, with a NumPy backend: order, resuming, signals, kills, evaluation, stopping."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_backend
import numpy as np
import pytest
from fake_backend import calls

from mlxpref.callbacks import RunStart, TrainCallback
from mlxpref.config import Config
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.errors import AdapterError, ConfigError, DataError, MlxprefError, ObjectiveError, RunError
from mlxpref.loop import MAX_SKIPPED_IN_ROW, TrainResult
from mlxpref.runs import open_run
from mlxpref.train import train

N_STEPS = 12
TIMES = ("tokens_per_second", "step_seconds")


class Listener(TrainCallback):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.start: RunStart | None = None
        self.told: list[tuple[str, Any]] = []
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_start(self, start: RunStart) -> None:
        self.start = start

    def on_step(self, step: int, metrics: Any) -> None:
        self.told.append(("step", step))

    def on_report(self, step: int, metrics: Any) -> None:
        self.told.append(("report", step))

    def on_evaluation(self, step: int, metrics: Any) -> None:
        self.told.append(("evaluation", step))

    def on_save(self, step: int, folder: Path) -> None:
        self.told.append(("save", step))

    def on_end(self, result: TrainResult) -> None:
        self.told.append(("end", result.step))

    def close(self) -> None:
        self.told.append(("close", 0))

    def steps(self, what: str) -> list[int]:
        return [step for name, step in self.told if name == what]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scored pairs, no two alike."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rng = random.Random(0)
    words = ["girl", "park", "play", "story", "cat", "dog", "hello", "capital", "France", "Paris"]
    rows = []
    for i in range(48):
        say = [" ".join(rng.choices(words, k=rng.randint(3, 30))) for _ in range(3)]
        scores = (round(rng.uniform(6, 10), 1), round(rng.uniform(1, 5), 1))
        rows.append({
            "prompt": f"{say[0]} {i}?", "chosen": say[1], "rejected": say[2],
            "score_chosen": scores[0], "score_rejected": scores[1],
        })  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def configure(tmp_path: Path, pairs: Path, tiny_model_dir: Path) -> Callable[..., Config]:
    """The configuration of a short run in ``tmp_path/run``; settings go over it."""
    base = {
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"source": str(pairs), "valid_fraction": 0.25},
        "relabel": {"score_range": [1, 10], "mapping": "identity"},
        "tokenization": {"max_length": 256},
        "batching": {"batch_size": 4},
        "adapter": {"lora_parameters": {"rank": 4, "scale": 1.0}},
        "reference": {"store": str(tmp_path / "store")},
        "optimizer": {"learning_rate": 0.5, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "training": {"iters": N_STEPS, "steps_per_eval": 5, "save_every": 4, "steps_per_report": 3},
        "output": {"adapter_path": str(tmp_path / "run")},
    }

    def make(*settings: str) -> Config:
        return load_config(base=base, overrides=[parse_setting(text) for text in settings])

    return make


def run(config: Config, *, resume: bool = False, listener: TrainCallback | None = None) -> TrainResult:
    return train(config, resume=resume, callbacks=[listener] if listener else [], backend=fake_backend)


def adapter(result: TrainResult | Path) -> bytes:
    folder = result if isinstance(result, Path) else result.folder
    return (folder / "adapters.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


# --- one run -------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_a_run_folder_holds(configure: Any) -> None:
    listener = Listener()
    settings = ["training.best_metric=eval_loss", "relabel.halves=chosen", "optimizer.learning_rate=5"]
    result = run(configure(*settings), listener=listener)
    lines = metrics(result.folder)
    assert [line["step"] for line in lines] == list(range(1, N_STEPS + 1))
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # policy is reference at step 0
    assert min(line["loss"] for line in lines) < 0.6
    evaluated = [line["step"] for line in lines if "eval_loss" in line]
    assert evaluated == listener.steps("evaluation") == [5, 10, 12]
    assert listener.steps("save") == [4, 8, 12]
    assert listener.steps("report") == [3, 6, 9, 12]
    assert listener.told[-2:] == [("end", N_STEPS), ("close", 0)]
    last = result.folder / "checkpoints" / "step-000012"
    assert result.checkpoint == last and adapter(result) == adapter(last)
    assert {child.name for child in result.folder.iterdir()} == {
        "adapters.safetensors", "adapter_config.json", "config.yaml", "run.json",
        "metrics.jsonl", "checkpoints", "best",
    }  # fmt: skip


def test_metrics_have_the_fields_names(configure: Any) -> None:
    line = metrics(run(configure()).folder)[4]
    wanted = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    wanted += ["loss", "logps/chosen", "logps/rejected", "learning_rate", "grad_norm", "epoch"]
    assert set(wanted) | {f"eval_{name}" for name in wanted[:7]} <= set(line)
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])


def test_the_adapter_carries_recipe_objective_and_base(configure: Any, tiny_model_dir: Path) -> None:
    from mlxpref.data.recipe import Recipe

    result = run(configure("objective.beta=0.25"))
    ours = json.loads((result.folder / "adapter_config.json").read_text())["mlxpref"]
    assert Recipe.from_dict(ours["recipe"]).goal_range == (1, 10)
    assert (ours["objective"][0]["name"], ours["objective"][0]["beta"]) == ("dpo", 0.25)
    assert ours["model"]["path"] == str(tiny_model_dir) and len(ours["model"]["fingerprint"]) == 64
    assert ours["step"] == N_STEPS
    facts = json.loads((result.folder / "run.json").read_text())
    assert facts["data"]["train_rows"] == 72 and facts["data"]["valid_rows"] == 24
    assert facts["starts"][0]["versions"]["numpy"]


def test_what_is_said_before_the_first_step(configure: Any) -> None:
    listener = Listener()
    run(configure(), listener=listener)
    assert listener.start is not None
    said = "\n".join((*listener.start.lines, *listener.notes))
    parts = ("format", "36 kept", "trainable", "shared", "rows computed", " shapes,", "padding", "12 steps")
    assert not [part for part in parts if part not in said], said


def test_a_second_run_computes_no_reference(configure: Any, tmp_path: Path) -> None:
    run(configure())
    before = calls["token_logps"]
    listener = Listener()
    run(configure(f"output.adapter_path={tmp_path / 'second'}"), listener=listener)
    assert calls["token_logps"] == before
    # 12 steps of 4 rows and 24 of validation: rows that are never visited need no reference.
    assert any("72 reused" in line for line in listener.notes)


def test_lists_of_different_lengths_in_one_batch(configure: Any, tmp_path: Path) -> None:
    """Reports are filled up to the longest list; what fills them up must reach no metric."""
    file = tmp_path / "lists.jsonl"
    with file.open("w") as out:
        for i in range(24):
            responses = [{"text": f"answer {i} {k}", "score": 1 + 2 * k} for k in range(2 + i % 3)]
            out.write(json.dumps({"prompt": f"question {i}", "responses": responses}) + "\n")
    result = run(configure(f"data.source={file}", "batching.batch_size=12", "batching.shuffle=true"))
    for row in metrics(result.folder):
        assert np.isfinite([row["rewards/margins"], row["logps/rejected"]]).all()


def test_a_run_can_be_resumed_from_another_folder(
    configure: Any, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, read from elsewhere, is no longer there, and its name would go out as a hub id."""
    monkeypatch.chdir(pairs.parent)
    result = run(configure(f"data.source={pairs.name}"))
    monkeypatch.chdir(tmp_path)
    stored = (result.folder / "config.yaml").read_text()
    assert f"source: {pairs}" in stored


def test_accumulated_batches_are_one_batch(configure: Any, tmp_path: Path) -> None:
    """Accumulation that averages averages, or counts an update for each batch."""
    whole = run(configure("batching.batch_size=8"))
    two = ("batching.batch_size=4", "batching.gradient_accumulation_steps=2", f"output.adapter_path={tmp_path / 'two'}")
    assert adapter(run(configure(*two))) == adapter(whole)


def test_an_objective_without_reference_computes_none(configure: Any) -> None:
    before = calls["token_logps"]
    run(configure("objective=simpo"))
    assert calls["token_logps"] == before


def test_plain_training_writes_no_goal(configure: Any) -> None:
    result = run(configure("relabel=null"))
    assert json.loads((result.folder / "adapter_config.json").read_text())["mlxpref"]["recipe"] is None
    assert json.loads((result.folder / "run.json").read_text())["data"]["train_rows"] == 36


def test_the_seed_decides_the_run_and_reports_do_not(configure: Any, tmp_path: Path) -> None:
    first = adapter(run(configure(f"output.adapter_path={tmp_path / 'a'}")))
    reports = ["training.steps_per_report=1", "training.save_every=5"]
    again = adapter(run(configure(f"output.adapter_path={tmp_path / 'b'}", *reports)))
    other = adapter(run(configure(f"output.adapter_path={tmp_path / 'c'}", "training.seed=1")))
    assert first == again
    assert first != other


def test_epochs_visit_every_row(configure: Any) -> None:
    listener = Listener()
    result = run(configure("training.epochs=1", "batching.batch_size=8"), listener=listener)
    assert result.n_steps == 9
    assert metrics(result.folder)[-1]["epoch"] == 1.0


# --- wrong from the start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "word"),
    [
        (["objective=dop"], ObjectiveError, "dpo"),
        (["objective.gamma=1"], ObjectiveError, "gamma"),
        (["data.source=nowhere.jsonl"], MlxprefError, "nowhere.jsonl"),
        (["data.valid_fraction=null", "training.best_metric=eval_loss"], ConfigError, "valid_fraction"),
        (["data.valid_fraction=null", "training.steps_per_eval=3"], ConfigError, "validation rows"),
        (["model.path=./nowhere"], MlxprefError, "nowhere"),
        (["relabel.min_gap=100"], DataError, "min_gap"),
    ],
)
def test_what_is_wrong_stops_the_run_before_a_model_loads_and_leaves_nothing(
    configure: Any, tmp_path: Path, settings: list[str], kind: type[Exception], word: str
) -> None:
    before = calls["load_policy"]
    with pytest.raises(kind, match=word):
        run(configure(*settings))
    assert calls["load_policy"] == before
    assert not (tmp_path / "run").exists()


WIDTHS = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16), "mlp.down_proj": (64, 32)}
"""Inputs and outputs of the tiny model's matrices."""


def write_lora(folder: Path, widths: dict[str, tuple[int, int]] = WIDTHS, layers: tuple[int, ...] = (1, 2)) -> Path:
    """An adapter folder as mlx-lm writes it."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    arrays = {}
    for layer in layers:
        for name, (inputs, outputs) in widths.items():
            at = f"model.layers.{layer}.{name}"
            arrays[f"{at}.lora_a"] = np.zeros((inputs, 4), np.float32)
            arrays[f"{at}.lora_b"] = np.zeros((4, outputs), np.float32)
    save_file(arrays, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    return folder


def starting_from(folder: Path, configure: Any, **model: Any) -> Config:
    return configure(f"adapter.init_from={folder}", *(f"model.{key}={value}" for key, value in model.items()))


def broken(what: str, folder: Path) -> Path:
    if what == "missing":
        return folder / "nowhere"
    write_lora(folder)
    config, weights = folder / "adapter_config.json", folder / "adapters.safetensors"
    if what == "no config":
        config.unlink()
    elif what == "not JSON":
        config.write_text("{")
    elif what == "a list":
        config.write_text("[]")
    elif what == "no weights":
        weights.unlink()
    elif what == "empty weights":
        weights.write_bytes(b"")
    elif what == "cut header":
        weights.write_bytes(weights.read_bytes()[:20])
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "no such folder"),
        ("no config", "no adapter_config.json; is this"),
        ("no weights", "no adapters.safetensors; is this"),
        ("not JSON", "adapter_config.json: not the JSON of an adapter"),
        ("a list", "adapter_config.json: not the JSON of an adapter"),
        ("empty weights", "adapters.safetensors: the file is damaged or cut off"),
        ("cut header", "adapters.safetensors: the file is damaged or cut off"),
        ("cut weights", "adapters.safetensors: the file is damaged or cut off"),
    ],
)
def test_a_broken_adapter_to_start_from_is_found_before_data_are_read(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    monkeypatch.setattr("mlxpref.assembly.prepare", lambda *_: pytest.fail("data were read"))
    with pytest.raises(AdapterError, match=words):
        run(starting_from(broken(what, tmp_path / "start"), configure))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": WIDTHS | {"self_attn.q_proj": (64, 32)}}, r"1\.self_attn\.q_proj\.lora_a: 64 wide.*\(32, 32\)"),
        ({"widths": WIDTHS | {"mlp.down_proj": (64, 48)}}, r"1\.mlp\.down_proj\.lora_b: 48 wide.*\(32, 64\)"),
        ({"layers": (2, 3)}, r"model\.layers\.3: the model has no such layer$"),
    ],
    ids=["inputs", "outputs", "layers"],
)
def test_an_adapter_of_another_model_is_found_before_data_are_read(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("mlxpref.assembly.prepare", lambda *_: pytest.fail("data were read"))
    with pytest.raises(AdapterError, match=rf"made for another model(?s:.*){words}"):
        run(starting_from(write_lora(tmp_path / "start", **changes), configure))


def quantised(model: Path, folder: Path) -> Path:
    """The model's weights as 4-bit files have them: inputs packed by eight, and a scale for each 32 of them."""
    from safetensors.numpy import load_file, save_file

    arrays: dict[str, np.ndarray] = {}
    for name, value in load_file(model / "model.safetensors").items():
        rows, columns = (*value.shape, 0)[:2]
        if "_proj" in name:
            arrays[name] = np.zeros((rows, columns // 8), np.uint32)
            arrays[name.replace("weight", "scales")] = np.zeros((rows, columns // 32), np.float16)
        else:
            arrays[name] = value
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def other_names(model: Path, folder: Path) -> Path:
    """Weights under names that a backend changes as it loads them."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    arrays = {f"language_{name}": value for name, value in load_file(model / "model.safetensors").items()}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def without_weights(_: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"damaged")
    return folder


@pytest.mark.parametrize("make", [lambda model, _: model, quantised, other_names, without_weights])
def test_an_adapter_that_may_fit_is_left_to_the_backend(
    configure: Any, tmp_path: Path, tiny_model_dir: Path, make: Callable[[Path, Path], Path]
) -> None:
    """Finds a false alarm: packed inputs, renamed tensors and unreadable weights prove nothing."""
    from mlxpref.facts import check_start

    model = make(tiny_model_dir, tmp_path / "model")
    check_start(starting_from(write_lora(tmp_path / "start"), configure, path=model))


def test_an_adapter_of_another_model_is_found_beside_quantised_weights(
    configure: Any, tmp_path: Path, tiny_model_dir: Path
) -> None:
    from mlxpref.facts import check_start

    model = quantised(tiny_model_dir, tmp_path / "model")
    wide = write_lora(tmp_path / "start", WIDTHS | {"self_attn.v_proj": (32, 32)})
    with pytest.raises(AdapterError, match=r"v_proj\.lora_b: 32 wide"):
        check_start(starting_from(wide, configure, path=model))


def test_a_warmup_longer_than_the_run_is_refused(configure: Any) -> None:
    with pytest.raises(ConfigError, match="warm-up"):
        run(configure("optimizer.schedule.warmup_steps=12"))


# --- evaluation, best, stopping ------------------------------------------------------------------


def test_best_holds_the_adapter_of_the_best_evaluation(configure: Any) -> None:
    settings = ["training.best_metric=eval_loss", "training.steps_per_eval=2", "optimizer.learning_rate=30"]
    result = run(configure(*settings, "training.save_every=2", "training.keep_last=null"))
    values = {line["step"]: line["eval_loss"] for line in metrics(result.folder) if "eval_loss" in line}
    best = min(values, key=lambda step: values[step])
    assert (result.best_step, result.best_value) == (best, values[best])
    assert len(set(values.values())) == 6 and best != N_STEPS
    assert adapter(result.folder / "best") == adapter(result.folder / "checkpoints" / f"step-{best:06d}")


def test_more_is_better_where_it_is(configure: Any) -> None:
    settings = ["training.best_metric=eval_rewards/margins", "training.steps_per_eval=2", "relabel=null"]
    result = run(configure(*settings))
    values = [line["eval_rewards/margins"] for line in metrics(result.folder) if "eval_loss" in line]
    assert result.best_value == max(values) > min(values)


def test_early_stopping_stops_after_so_many_evaluations_without_a_better_one(configure: Any) -> None:
    settings = ["training.best_metric=eval_loss", "training.early_stopping=2", "training.steps_per_eval=1",
                "optimizer.learning_rate=200", "training.iters=60"]  # fmt: skip
    result = run(configure(*settings))
    assert result.stopped is not None and "eval_loss has not improved in 2" in result.stopped
    assert result.best_step is not None and result.step == result.best_step + 2 < 60
    assert adapter(result) == adapter(result.folder / "checkpoints" / f"step-{result.step:06d}")
    again = run(configure(*settings), resume=True)
    assert (again.step, again.stopped) == (result.step, result.stopped)


def test_evaluation_changes_nothing(configure: Any, tmp_path: Path) -> None:
    often = run(configure(f"output.adapter_path={tmp_path / 'a'}", "training.steps_per_eval=1"))
    never = run(configure(f"output.adapter_path={tmp_path / 'b'}", "training.steps_per_eval=0"))
    assert adapter(often) == adapter(never)


# --- steps that are not finite -------------------------------------------------------------------


def test_a_skipped_step_is_counted_and_the_run_goes_on(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NAN_STEPS", "3,4,7")
    result = run(configure())
    lines = metrics(result.folder)
    assert result.skipped == 3 and result.step == N_STEPS
    assert [line["skipped_steps"] for line in lines[:8]] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert lines[2]["loss"] is None and lines[4]["loss"] > 0


def test_three_in_a_row_stop_the_run_with_the_remedy_and_the_adapter_before_them(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NAN_STEPS", "6,7,8,9")
    config = configure()
    with pytest.raises(RunError, match=rf"{MAX_SKIPPED_IN_ROW} steps in a row \(6 to 8\).*learning_rate"):
        run(config)
    folder = Path(config.output.adapter_path)
    assert adapter(folder) == adapter(folder / "checkpoints" / "step-000008")
    with pytest.raises(RunError, match=r"4 steps in a row \(6 to 9\)"):
        run(config, resume=True)


# --- resuming ------------------------------------------------------------------------------------


class StopAt(TrainCallback):
    """Sends this process a signal while a step or an evaluation is going on."""

    def __init__(self, number: int, *, step: int = 0, evaluation: int = 0) -> None:
        self.number, self.step, self.evaluation = number, step, evaluation
        self.evaluations = 0

    def on_step(self, step: int, metrics: Any) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)

    def on_progress(self, what: str, done: int, total: int) -> None:
        if what == "evaluation" and done == 1:
            self.evaluations += 1
            if self.evaluations == self.evaluation:
                os.kill(os.getpid(), self.number)


OFTEN = ["training.save_every=2", "training.keep_last=2"]
FULL = ["training.best_metric=eval_loss", "training.steps_per_eval=2", "training.early_stopping=6"]


@pytest.fixture
def whole(configure: Any, tmp_path: Path) -> TrainResult:
    """The run that never stopped, with everything on."""
    return run(configure(*FULL, f"output.adapter_path={tmp_path / 'whole'}"))


def same(result: TrainResult, whole: TrainResult) -> None:
    assert adapter(result) == adapter(whole)
    assert metrics(result.folder) == metrics(whole.folder)
    assert adapter(result.folder / "best") == adapter(whole.folder / "best")
    assert (result.best_step, result.best_value) == (whole.best_step, whole.best_value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3, 6, 11])
def test_a_signal_finishes_the_step_saves_and_resumed_equals_uninterrupted(
    configure: Any, whole: TrainResult, number: int, step: int
) -> None:
    config = configure(*FULL)
    held = signal.getsignal(number)
    stopped = run(config, listener=StopAt(number, step=step))
    assert signal.getsignal(number) is held
    assert stopped.interrupted == number
    assert step <= stopped.step <= step + 1 and stopped.checkpoint is not None
    assert json.loads((stopped.checkpoint / "state.json").read_text())["step"] == stopped.step
    same(run(config, resume=True), whole)


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(
    configure: Any, whole: TrainResult
) -> None:
    config = configure(*FULL)
    stopped = run(config, listener=StopAt(signal.SIGINT, evaluation=2))
    assert stopped.step == 4 and stopped.interrupted == signal.SIGINT
    assert [line["step"] for line in metrics(stopped.folder)] == [1, 2, 3]
    same(run(config, resume=True), whole)


def test_a_second_ctrl_c_stops_at_once(configure: Any) -> None:
    class Impatient(TrainCallback):
        def on_step(self, step: int, metrics: Any) -> None:
            if step == 6:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    config = configure()
    with pytest.raises(KeyboardInterrupt):
        run(config, listener=Impatient())
    assert run(config, resume=True).step == N_STEPS


def test_a_finished_run_resumed_does_nothing(configure: Any) -> None:
    config = configure()
    first, before = run(config), calls["update"]
    again = run(config, resume=True)
    assert calls["update"] == before and again.step == N_STEPS and again.interrupted is None
    assert adapter(first) == adapter(again)


def test_training_works_outside_the_main_thread(configure: Any) -> None:
    """Signals cannot be taken over there; a notebook or a server must still be able to train."""
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(run(configure())))
    thread.start()
    thread.join()
    assert results[0].step == N_STEPS


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("optimizer.learning_rate=0.4", "optimizer.learning_rate: the run has 0.5, now 0.4"),
        ("training.iters=24", "training.iters"),
        ("relabel=null", "relabel"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(configure: Any, setting: str, word: str) -> None:
    run(configure(), listener=StopAt(signal.SIGINT, step=3))
    with pytest.raises(RunError, match=word):
        run(configure(setting), resume=True)


def test_what_changes_no_weight_may_change_on_resume(configure: Any, tmp_path: Path) -> None:
    whole = run(configure(f"output.adapter_path={tmp_path / 'whole'}"))
    run(configure(), listener=StopAt(signal.SIGINT, step=3))
    settings = ["training.save_every=1", "training.keep_last=1", f"reference.store={tmp_path / 'other'}"]
    assert adapter(run(configure(*settings), resume=True)) == adapter(whole)


def test_changed_data_are_noticed_on_resume(configure: Any, pairs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(pairs.read_bytes())
    config = configure(f"data.source={mine}")
    run(config, listener=StopAt(signal.SIGINT, step=3))
    mine.write_text(pairs.read_text().replace("Paris", "London", 1))
    with pytest.raises(RunError, match=r"data fingerprint[\s\S]*|not the data"):
        run(config, resume=True)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    configure: Any, tmp_path: Path
) -> None:
    whole = run(configure(f"output.adapter_path={tmp_path / 'whole'}"))
    config = configure()
    stopped = run(config, listener=StopAt(signal.SIGINT, step=9))
    assert stopped.checkpoint is not None
    (stopped.checkpoint / "step_state.safetensors").write_bytes(b"")
    listener = Listener()
    assert adapter(run(config, resume=True, listener=listener)) == adapter(whole)
    assert any("damaged" in note for note in listener.notes)
    assert listener.steps("step")[0] == 9, listener.notes


def test_two_trainings_cannot_share_a_folder(configure: Any, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=False), pytest.raises(RunError, match="another process"):
        run(configure())


# --- killed --------------------------------------------------------------------------------------


@pytest.fixture
def command(configure: Any, tmp_path: Path) -> list[str]:
    """The command line of a run as its own process."""
    from mlxpref.config_layers import dump_config

    file = tmp_path / "run.yaml"
    file.write_text(dump_config(configure(*FULL, *OFTEN)))
    return [sys.executable, str(Path(__file__).parent / "run_fake.py"), "train", "-c", str(file)]


SLOW = {"FAKE_STEP_SECONDS": "0.03", "FAKE_SAVE_SECONDS": "0.1", "FAKE_EVAL_SECONDS": "0.01"}


def unfinished(folder: Path) -> list[Path]:
    """What is being written now, or was when a process was killed."""
    return [*folder.glob("checkpoints/.*.part/*"), *folder.glob(".best.part/*")]


def kill_at(process: subprocess.Popen[bytes], folder: Path, began: int, *, saving: bool, after: float) -> bool:
    """SIGKILL during the next save, or so many seconds after the run began; True if a save was cut short."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        # A resumed run clears what the last one left, then writes run.json anew.
        running = (folder / "run.json").exists() and (folder / "run.json").stat().st_mtime_ns != began
        if running and not saving:
            time.sleep(after)
        if running and (unfinished(folder) or not saving):
            process.kill()
            process.wait()
            return bool(unfinished(folder))
        time.sleep(0.002)
    raise AssertionError("ended before it was killed")


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_never_killed(
    command: list[str], configure: Any, tmp_path: Path
) -> None:
    """SIGKILL five times, twice surely while a checkpoint is being written, then once to the end."""
    whole = run(configure(*FULL, *OFTEN, f"output.adapter_path={tmp_path / 'whole'}"))
    folder, log, rng, cut_short = tmp_path / "run", tmp_path / "log", random.Random(), 0
    for attempt in range(6):
        resume = ["--resume"] if (folder / "config.yaml").exists() else []
        began = (folder / "run.json").stat().st_mtime_ns if (folder / "run.json").exists() else 0
        with log.open("wb") as out:
            process = subprocess.Popen([*command, *resume], env={**os.environ, **SLOW}, stdout=out, stderr=out)
        if attempt < 5:
            cut_short += kill_at(process, folder, began, saving=attempt % 2 == 1, after=rng.uniform(0, 0.5))
        for found in folder.glob("checkpoints/step-*"):
            assert (found / "state.json").exists()
    assert process.wait(60) == 0, log.read_text()
    assert cut_short >= 2
    assert adapter(folder) == adapter(whole)
    assert metrics(folder) == metrics(whole.folder)
    assert adapter(folder / "best") == adapter(whole.folder / "best")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on_and_exits_with_the_signals_code(
    command: list[str], tmp_path: Path, number: int, code: int
) -> None:
    slow = {**os.environ, "FAKE_STEP_SECONDS": "0.2"}
    process = subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"mlxpref train --adapter-path {tmp_path / 'run'} --resume" in out
    assert "finishing this step" in err
    resume = [*command[:3], "--adapter-path", str(tmp_path / "run"), "--resume"]
    done = subprocess.run(resume, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: 12 steps" in done.stdout


def test_errors_of_the_command_are_one_message_and_an_exit_code(command: list[str], tmp_path: Path) -> None:
    for extra, code, word in (
        (["--set", "training.iter=3"], 2, "did you mean training.iters?"),
        (["--objective", "dop"], 2, "dpo"),
        (["--data", str(tmp_path / "missing.jsonl")], 1, "missing.jsonl"),
        (["--resume"], 1, "no run to resume"),
    ):
        done = subprocess.run([*command, *extra], capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        assert done.stderr.startswith("error: ") and word in done.stderr
        assert not (tmp_path / "run").exists()


def test_plain_lines_when_there_is_no_terminal(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    report = next(line for line in done.stdout.splitlines() if line.startswith("step 3/12"))
    for label in ("loss ", "acc ", "margin ", "tok/s ", "GB ", "left "):
        assert label in report


def test_print_config_prints_what_would_run_and_runs_nothing(command: list[str], tmp_path: Path) -> None:
    printing = [*command, "--iters", "7", "--print-config"]
    done = subprocess.run(printing, capture_output=True, text=True, check=True)
    file = tmp_path / "printed.yaml"
    file.write_text(done.stdout)
    assert load_config(file).training.iters == 7
    assert not (tmp_path / "run").exists()
