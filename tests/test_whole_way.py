"""The main job on the MLX backend, by its commands: scored pairs in, a standard mlx-lm adapter out."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
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


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The run folder, beside its data, of plain pairs in which one word is always preferred to another."""
    draw = random.Random(5)
    folder = tmp_path_factory.mktemp("learnt")
    for name, n in (("train", 48), ("valid", 12)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(n):
                prompt = " ".join(draw.choice(WORDS) for _ in range(6))
                chosen, rejected = "hello " * draw.randint(2, 6), "cat " * draw.randint(2, 6)
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
    mlxpref(
        "train", "--model", tiny_model_dir, "--data", folder / "train.jsonl", "--valid", folder / "valid.jsonl",
        "--adapter-path", folder / "run", "--iters", 36, *TRAIN,
    )  # fmt: skip
    return folder / "run"


def test_what_can_be_learnt_is_learnt(learnt: Path) -> None:
    """A wrong sign, mask or order of responses would not end with every unseen pair the right way round."""
    assert metrics(learnt)[-1]["eval_rewards/accuracies"] == 1.0
    assert metrics(learnt)[-1]["loss"] < 0.3


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


def evaluated(data: Path, run: Path, out: Path, *more: Any) -> dict[str, Any]:
    mlxpref("evaluate", data, "--adapter-path", run, "--json", out, *more)
    return json.loads(out.read_text())


def test_evaluation_sees_what_was_learnt(learnt: Path, tmp_path: Path) -> None:
    """Pairs that training never saw, read from the adapter on disk; turned round, they are all wrong."""
    valid = learnt.parent / "valid.jsonl"
    found = evaluated(valid, learnt, tmp_path / "found.json")["views"]["unconditioned"]
    assert found["accuracy"] > 0.9 and found["margin"] > 0
    rows = [json.loads(line) for line in valid.read_text().splitlines()]
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(
        json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in rows
    ))  # fmt: skip
    against = evaluated(turned, learnt, tmp_path / "against.json")["views"]["unconditioned"]
    assert against["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert against["margin"] == pytest.approx(-found["margin"], rel=1e-5)


def test_evaluation_measures_how_far_the_goal_is_read(trained: Path, relabelled: Path, tmp_path: Path) -> None:
    found = evaluated(relabelled, trained, tmp_path / "found.json")
    sensitivity = found["goal_sensitivity"]
    assert sensitivity["examples"] == found["examples"] == 8
    assert all(math.isfinite(sensitivity[key]) for key in ("mean", "error"))
    assert sensitivity["mean"] != 0, "both goals of an example give one log-prob: the goal is not in the prompt"
    assert {"chosen", "rejected", "top"} <= found["views"].keys()


def test_generation_at_several_goals(trained: Path) -> None:
    texts = mlxpref(
        "generate", "Tell me a story.", "--adapter-path", trained,
        "--goal", 2, "--goal", 6, "--goal", 10, "--max-tokens", 12, "--show-prompt",
    )  # fmt: skip
    for goal in (2, 6, 10):
        assert texts.count(f"Overall score: {goal}.") == 1


# --- mlx-lm's own tools ------------------------------------------------------------------------

QUESTION = "Say hello."


@dataclass(frozen=True)
class Asked:
    """A run, its base model, the prompt at the top goal in both forms, and what our command answers."""

    model: Path
    run: Path
    goal_text: str
    text: str
    answer: str


def asked(model: Path, run: Path, folder: Path) -> Asked:
    from mlxpref.data.tokenization import load_tokenizer, render_prompt
    from mlxpref.generate import adapter_recipe
    from mlxpref.records import Message

    out = folder / "ours.json"
    mlxpref("generate", QUESTION, "--adapter-path", run, "--goal", 10, "--max-tokens", 16, "--json", out)
    recipe = adapter_recipe(run)
    assert recipe is not None
    prompt, goal_text = recipe.write((Message("user", QUESTION),), 10.0)
    text = render_prompt(prompt, load_tokenizer(str(model)))
    (answer,) = json.loads(out.read_text())
    assert answer["text"].strip()
    return Asked(model, run, goal_text, text, answer["text"])


@pytest.fixture
def tiny(trained: Path, tiny_model_dir: Path, tmp_path: Path) -> Asked:
    return asked(tiny_model_dir, trained, tmp_path)


@pytest.fixture
def real(assets: Path, tmp_path: Path) -> Asked:
    """Five steps on a model that was really trained, with real pairs; it has no chat template."""
    model, run = assets / "models" / "tinystories-656k", tmp_path / "run"
    mlxpref(
        "train", "--model", model, "--data", assets / "data" / "ultrafeedback" / "eval.jsonl", "--relabel",
        "--valid-fraction", 0.2, "--adapter-path", run, "--iters", 5, "--set", "data.limit=40", *TRAIN,
    )  # fmt: skip
    return asked(model, run, tmp_path)


def _mlx_lm(*arguments: Any) -> str:
    command = [sys.executable, "-m", "mlx_lm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _mlx_lm_generate(model: Path, *arguments: Any) -> str:
    out = _mlx_lm("generate", "--model", model, *arguments, "--max-tokens", 16, "--temp", 0, "--verbose", False)
    return out.removesuffix("\n")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tiny", "real"])
def test_mlx_lm_generates_and_fuses_as_we_do(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`mlx_lm generate` says what ours says; `mlx_lm fuse` makes a model that says it without an adapter."""
    it = request.getfixturevalue(which)
    rendered = ("--prompt", it.text, "--ignore-chat-template")
    assert _mlx_lm_generate(it.model, "--adapter-path", it.run, *rendered) == it.answer
    _mlx_lm("fuse", "--model", it.model, "--adapter-path", it.run, "--save-path", tmp_path / "fused")
    assert _mlx_lm_generate(tmp_path / "fused", *rendered) == it.answer


@pytest.mark.slow
def test_mlx_lm_with_the_goal_as_system_prompt_says_what_we_say(tiny: Asked) -> None:
    """The folder as it is, through mlx-lm's own chat template: only the goal sentence is put in by hand."""
    by_hand = ("--system-prompt", tiny.goal_text, "--prompt", QUESTION)
    assert _mlx_lm_generate(tiny.model, "--adapter-path", tiny.run, *by_hand) == tiny.answer


@pytest.mark.slow
def test_mlx_lm_server_says_what_we_say(tiny: Asked) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlx_lm", "server", "--model", tiny.model, "--adapter-path", tiny.run,
        "--host", "127.0.0.1", "--port", port,
    ]  # fmt: skip
    served = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_healthy(served, port)
        asking = {"max_tokens": 16, "temperature": 0}
        text = _post(port, "completions", asking | {"prompt": tiny.text})["choices"][0]["text"]
        assert text == tiny.answer
        turns = [{"role": "system", "content": tiny.goal_text}, {"role": "user", "content": QUESTION}]
        chat = _post(port, "chat/completions", asking | {"messages": turns})["choices"][0]["message"]["content"]
        assert chat == tiny.answer
    finally:
        served.kill()
        served.wait()


def _wait_until_healthy(served: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        assert served.poll() is None, f"the server ended with {served.returncode}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def _post(port: int, what: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{port}/v1/{what}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as reply:
        return json.load(reply)


# --- killed and resumed ------------------------------------------------------------------------

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
