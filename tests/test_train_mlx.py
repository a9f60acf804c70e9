"""Training on MLX: what a run leaves is mlx-lm's, and stopping it changes no bit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxpref.callbacks import TrainCallback
from mlxpref.config import Config
from mlxpref.config_layers import load_config, parse_setting
from mlxpref.errors import ConfigError
from mlxpref.loop import TrainResult
from mlxpref.train import train

pytestmark = pytest.mark.mlx

STORIES = [f"Once upon a time there was a {a} {b}." for a in ("little", "big") for b in ("girl", "cat", "dog")]


STATES = [
    "objective=[{name: bco}, {name: alpha_dpo}, {name: group_robust}, {name: selfie}]",
    "reference.update=soft",
    "reference.sync_steps=2",
    "batching.micro_batch_tokens=600",
]
"""Everything a run carries from step to step beside weights and optimiser, through several micro-batches."""


@pytest.fixture
def configure(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Config]:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Write story {i}.",
            "chosen": STORIES[i % 6] + " The cat said hello." * (i % 3 + 1),
            "rejected": STORIES[(i + 1) % 6],
            "score_chosen": 9, "score_rejected": 2 + i % 5, "group": "abc"[i % 3],
        }
        for i in range(24)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "model": {"path": str(tiny_model_dir)},
        "data": {"source": str(file), "valid_fraction": 0.2},
        "relabel": {},
        "tokenization": {"max_length": 512, "max_prompt_length": 400},
        "batching": {"batch_size": 4, "max_shapes": 8},
        "adapter": {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.1}},
        "reference": {"store": str(tmp_path / "store")},
        "optimizer": {"learning_rate": 1e-3, "schedule": {"name": "cosine", "warmup_steps": 1}},
        "training": {"iters": 6, "steps_per_eval": 3, "save_every": 2, "best_metric": "eval_loss"},
        "output": {"adapter_path": str(tmp_path / "run")},
    }

    def make(*settings: str) -> Config:
        return load_config(base=base, overrides=[parse_setting(text) for text in settings])

    return make


class StopAt(TrainCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, metrics: Any) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def run(config: Config, *, resume: bool = False, stop: int | None = None) -> TrainResult:
    return train(config, resume=resume, callbacks=[StopAt(stop)] if stop else [])


def adapter(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [[], ["optimizer.name=muon"], ["adapter.fine_tune_type=dora", "training.grad_checkpoint=true"], STATES],
    ids=["adamw", "muon", "dora", "states"],
)
def test_resumed_equals_uninterrupted_byte_for_byte(
    configure: Any, tmp_path: Path, settings: list[str]
) -> None:
    """Dropout is on: forgotten random state, moments or float32 masters would show."""
    whole = run(configure(*settings, f"output.adapter_path={tmp_path / 'whole'}"))
    stopped = run(configure(*settings), stop=3)
    assert stopped.interrupted == signal.SIGINT and stopped.step == 3
    resumed = run(configure(*settings), resume=True)
    assert adapter(resumed.folder) == adapter(whole.folder)
    assert adapter(resumed.folder / "best") == adapter(whole.folder / "best")
    assert resumed.best_value == whole.best_value


def test_rows_of_frozen_layers_are_kept_and_a_resumed_run_makes_them_again(configure: Any, tmp_path: Path) -> None:
    """The same adapter with and without, to rounding, and after a stop."""
    settings = ["training.iters=12", "adapter.lora_parameters.dropout=0"]
    plain = run(configure(*settings, f"output.adapter_path={tmp_path / 'plain'}"))
    settings.append("training.cache_frozen=true")
    whole = run(configure(*settings, f"output.adapter_path={tmp_path / 'whole'}"))
    run(configure(*settings), stop=7)
    resumed = run(configure(*settings), resume=True)
    values = [load_file(result.folder / "adapters.safetensors") for result in (plain, whole, resumed)]
    for other in values[1:]:
        for name, value in values[0].items():
            np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_a_run_that_meets_no_row_twice_keeps_none(configure: Any) -> None:
    with pytest.raises(ConfigError, match="meets no example twice"):
        run(configure("training.cache_frozen=true", "training.iters=2"))


def test_full_fine_tuning_resumes_too(configure: Any, tmp_path: Path) -> None:
    settings = ["adapter={fine_tune_type: full, num_layers: 1}", "optimizer.learning_rate=1e-4"]
    whole = run(configure(*settings, f"output.adapter_path={tmp_path / 'whole'}"))
    run(configure(*settings), stop=4)
    assert adapter(run(configure(*settings), resume=True).folder) == adapter(whole.folder)


def test_the_first_loss_of_dpo_is_log_2_and_the_adapter_loads_in_mlx_lm(configure: Any) -> None:
    from mlx_lm import generate, load

    result = run(configure())
    first = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.69314718, abs=1e-6)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    model, tokenizer = load(config["model"], adapter_path=str(result.folder))
    assert isinstance(generate(model, tokenizer, prompt="Write", max_tokens=3), str)


def test_starting_from_an_adapter_takes_it_as_reference(configure: Any, tmp_path: Path) -> None:
    first = run(configure("adapter.lora_parameters.dropout=0"))
    second = run(
        configure(f"adapter.init_from={first.folder}", f"output.adapter_path={tmp_path / 'second'}")
    )
    losses = [json.loads(line)["loss"] for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.69314718, abs=2e-6)


def test_reports_reach_mlx_lms_callbacks(
    configure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlx_lm.tuner import callbacks as of_mlx_lm

    sent: list[tuple[str, dict[str, Any]]] = []

    class Service:
        def __init__(self, project_name: str, log_dir: str, config: Any, wrapped_callback: Any) -> None:
            sent.append(("opened", {"project": project_name, "log_dir": log_dir}))

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            sent.append(("train", info))

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            sent.append(("valid", info))

    monkeypatch.setitem(of_mlx_lm.SUPPORT_CALLBACK, "wandb", Service)
    monkeypatch.setattr(of_mlx_lm, "wandb", object())
    run(configure("output={report_to: wandb, project: stories}", f"output.adapter_path={tmp_path / 'run'}",
                  "training.steps_per_report=2"))  # fmt: skip
    assert sent[0] == ("opened", {"project": "stories", "log_dir": str(tmp_path / "run")})
    trained = [info for name, info in sent if name == "train"]
    assert [info["iteration"] for info in trained] == [2, 4, 6]
    assert trained[0]["train_loss"] > 0 and "rewards/margins" in trained[0]
    assert [info["val_loss"] > 0 for name, info in sent if name == "valid"] == [True, True]


def test_a_service_that_is_not_installed_is_said_before_anything_loads(configure: Any, tmp_path: Path) -> None:
    from mlxpref.errors import UsageError

    if importlib.util.find_spec("swanlab") is not None:
        pytest.skip("swanlab is installed")
    with pytest.raises(UsageError, match="pip install swanlab"):
        run(configure("output.report_to=swanlab"))
    assert not (tmp_path / "run").exists()


def test_no_socket_is_opened(configure: Any, no_sockets: list[str]) -> None:
    run(configure())


def test_momentum_carries_the_reference_on(configure: Any, tmp_path: Path) -> None:
    """Finds: a setting nobody reads, a base that is the adapter, a previous round exchanged with this one."""
    first = run(configure("objective.beta=1.0"))
    round_two = ["objective.beta=1.0", "adapter=null", f"adapter={{init_from: {first.folder}}}"]

    def loss(name: str, *settings: str) -> float:
        result = run(configure(*round_two, *settings, f"output.adapter_path={tmp_path / name}"))
        return float(json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    plain = loss("plain")
    assert loss("zero", "reference.momentum=0") == plain
    # The first round raised its margins: a reference carried on lies beyond the policy, so losses are higher.
    assert loss("base", "reference.momentum=2.0") > plain + 0.001
    # The same adapter as both rounds: no step between them, nothing to carry on.
    same = loss("same", "reference.momentum=2.0", f"reference.previous={first.folder}")
    assert same == pytest.approx(plain, abs=1e-5)
