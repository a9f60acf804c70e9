"""The main job on the MLX backend, by its commands: scored pairs in, a standard mlx-lm adapter out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.mlx

WORDS = ("the", "cat", "dog", "park", "story", "little", "girl", "named", "Lily", "loved", "to", "hello", "Paris")
TRAIN = (
    "--batch-size", "4", "--num-layers", "2", "--learning-rate", "2e-3", "--max-length", "256", "--save-every", "6",
    "--set", "training.steps_per_eval=6", "--set", "adapter.lora_parameters.dropout=0.1",
    "--set", "training.best_metric=eval_loss",
)  # fmt: skip


def mlxpref(*arguments: Any) -> str:
    from mlxpref.cli import main

    ran = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.output


def process(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mlxpref", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Forty pairs whose scores lie on 1–10, relabelled for the tiny model."""
    draw = random.Random(3)
    folder = tmp_path_factory.mktemp("data")

    def text(n: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(n))

    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(40):
            scores = sorted(draw.sample(range(1, 11), 2), reverse=True)
            row = {
                "prompt": f"Write {i} {text(draw.randint(2, 12))}", "chosen": text(draw.randint(3, 20)),
                "rejected": text(draw.randint(3, 20)), "score_chosen": scores[0], "score_rejected": scores[1],
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    out = folder / "relabelled"
    mlxpref("relabel", folder / "pairs.jsonl", "--out", out, "--model", tiny_model_dir, "--valid-fraction", 0.2)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, relabelled: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    mlxpref(
        "train", "--model", tiny_model_dir, "--data", relabelled, "--adapter-path", folder, "--iters", 40, *TRAIN
    )
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_first_loss_is_log_two(trained: Path) -> None:
    losses = [row["loss"] for row in metrics(trained) if "loss" in row]
    assert len(losses) == 40
    assert abs(losses[0] - np.log(2)) < 1e-6


def test_what_can_be_learnt_is_learnt(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A wrong sign, mask or order of responses would not end with every unseen pair the right way round."""
    draw = random.Random(5)
    for name, n in (("train", 48), ("valid", 12)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(n):
                prompt = " ".join(draw.choice(WORDS) for _ in range(6))
                chosen, rejected = "hello " * draw.randint(2, 6), "cat " * draw.randint(2, 6)
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
    run = tmp_path / "run"
    mlxpref(
        "train", "--model", tiny_model_dir, "--data", tmp_path, "--valid", tmp_path / "valid.jsonl",
        "--adapter-path", run, "--iters", 36, *TRAIN,
    )  # fmt: skip
    assert metrics(run)[-1]["eval_rewards/accuracies"] == 1.0
    assert metrics(run)[-1]["loss"] < 0.3


def test_no_command_opens_a_socket(
    tmp_path: Path, tiny_model_dir: Path, relabelled: Path, no_sockets: list[str]
) -> None:
    """Private data stay on the machine: training, evaluation and generation ask nobody anything."""
    run = tmp_path / "run"
    mlxpref("train", "--model", tiny_model_dir, "--data", relabelled, "--adapter-path", run, "--iters", 3, *TRAIN)
    mlxpref("evaluate", relabelled, "--adapter-path", run)
    mlxpref("generate", "Say hello.", "--adapter-path", run, "--max-tokens", 4)
    mlxpref("inspect", relabelled, "--model", tiny_model_dir)
    assert not no_sockets


def test_evaluation_sees_what_was_learnt(trained: Path, relabelled: Path, tmp_path: Path) -> None:
    """On its own training rows a run that lowered the loss prefers what it was shown, under both goals."""
    out = tmp_path / "evaluation.json"
    mlxpref("evaluate", relabelled, "--split", "train", "--adapter-path", trained, "--json", out)
    text = out.read_text()
    assert "sensitivity" in text and json.loads(text)


def test_generation_at_several_goals(trained: Path) -> None:
    texts = mlxpref(
        "generate", "Tell me a story.", "--adapter-path", trained,
        "--goal", 2, "--goal", 6, "--goal", 10, "--max-tokens", 12, "--show-prompt",
    )  # fmt: skip
    for goal in (2, 6, 10):
        assert texts.count(f"Overall score: {goal}.") == 1


@pytest.mark.slow
def test_mlx_lm_takes_the_folder_as_it_is(trained: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """`mlx_lm generate` says what ours says; `mlx_lm fuse` makes a model that says it without an adapter."""
    from mlxpref import mlx_backend
    from mlxpref.data.tokenization import load_tokenizer, render_prompt
    from mlxpref.generate import adapter_recipe
    from mlxpref.records import Message

    recipe = adapter_recipe(trained)
    assert recipe is not None
    prompt, _ = recipe.write((Message("user", "Say hello."),), 10.0)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    text = render_prompt(prompt, tokenizer)
    policy = mlx_backend.load_adapter(trained)
    (ours,) = mlx_backend.generate(policy, [tokenizer.encode(text, add_special_tokens=False)], max_tokens=16)
    theirs = _mlx_lm("generate", "--model", tiny_model_dir, "--adapter-path", trained, text=text)
    assert theirs == ours
    _mlx_lm_run("fuse", "--model", tiny_model_dir, "--adapter-path", trained, "--save-path", tmp_path / "fused")
    assert _mlx_lm("generate", "--model", tmp_path / "fused", text=text) == ours


def _mlx_lm_run(*arguments: Any) -> str:
    command = [sys.executable, "-m", "mlx_lm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _mlx_lm(command: str, *arguments: Any, text: str) -> str:
    out = _mlx_lm_run(
        command, *arguments, "--prompt", text, "--ignore-chat-template",
        "--max-tokens", 16, "--temp", 0, "--verbose", False,
    )  # fmt: skip
    return out.rstrip("\n")


KILLS = 5


@pytest.mark.slow
def test_killed_and_resumed_is_byte_for_byte_the_uninterrupted_run(
    tmp_path: Path, tiny_model_dir: Path, relabelled: Path
) -> None:
    """SIGKILL at five random moments, some of them during a save, then Ctrl-C, then to the end."""
    common = ("--model", tiny_model_dir, "--data", relabelled, "--iters", 60, *TRAIN, "--save-every", "2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ran = process("train", *common, "--adapter-path", whole)
    output, _ = ran.communicate(timeout=300)
    assert ran.returncode == 0, output
    draw, kills = random.Random(11), 0
    while kills < KILLS:
        running = _start(common, broken)
        wanted = draw.choice(["save", "step"])
        if not _kill(running, broken, wanted, after=draw.randint(1, 6)):
            break
        kills += 1
    running = _start(common, broken)
    _wait_for_steps(running, broken, 1)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=120)
    if running.returncode != 0:  # it may have reached the end first
        assert running.returncode == 130, output
        assert "--resume" in output
    last = _start(common, broken)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert kills == KILLS, "the run ended before it was killed often enough"
    for name in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert [row.get("loss") for row in metrics(broken)] == [row.get("loss") for row in metrics(whole)]


def _start(common: tuple[Any, ...], folder: Path) -> subprocess.Popen[str]:
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    return process("train", *common, "--adapter-path", folder, *resume)


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _wait_for_steps(running: subprocess.Popen[str], folder: Path, n: int) -> None:
    """Until the process has logged ``n`` steps of its own (a resumed run first cuts the log back)."""
    size = _lines(folder)
    while running.poll() is None:
        size = min(size, now) if (now := _lines(folder)) < size else size
        if now >= size + n:
            return
        time.sleep(0.001)


def _kill(running: subprocess.Popen[str], folder: Path, wanted: str, *, after: int) -> bool:
    """SIGKILL after some steps, or at the first unfinished checkpoint after them; False if it ended first."""
    _wait_for_steps(running, folder, after)
    while wanted == "save" and running.poll() is None and not list(folder.glob("checkpoints/.*.part")):
        time.sleep(0.0002)
    alive = running.poll() is None
    os.kill(running.pid, signal.SIGKILL) if alive else None
    running.communicate()
    return alive
