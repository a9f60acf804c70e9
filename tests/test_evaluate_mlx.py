"""Evaluation and generation by the MLX room, against mlx-lm's own loading, forward pass and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.data.recipe import Recipe

pytestmark = pytest.mark.mlx

PAIRS = [
    ("What is the capital of France?", "Paris.", "I do not know that, and I never did.", 9, 4),
    ("Tell me a story.", "Once upon a time there was a cat.", "No.", 8, 7.5),
    ("Say hello.", "Hello!", "The dog said hello to the cat in the park.", 10, 9),
    ("Is it so?", "I think it is not, but who am I to say?", "It is.", 6, 3),
]


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that does something: its lora_b are random, and large enough to change greedy texts."""
    from safetensors.numpy import load_file, save_file

    from mlxpref import mlx_backend

    policy = mlx_backend.load_policy(str(tiny_model_dir), num_layers=2, lora_parameters={"rank": 4, "scale": 4.0})
    folder = tmp_path_factory.mktemp("adapter")
    mlx_backend.save_adapter(policy, folder, extra={"recipe": Recipe().as_dict()})
    weights = load_file(folder / "adapters.safetensors")
    draw = np.random.default_rng(5)
    for name, value in weights.items():
        if name.endswith("lora_b"):
            weights[name] = (draw.standard_normal(value.shape) * 0.3).astype(np.float32)
    save_file(weights, folder / "adapters.safetensors", metadata={"format": "mlx"})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    columns = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in PAIRS))
    return file


def run(*arguments: Any) -> Any:
    from mlxpref.cli import main

    ran = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran


def plain_logps(model: Any, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """One unpadded row through mlx-lm's model; log-softmax in float64 NumPy."""
    import mlx.core as mx

    logits = np.array(model(mx.array([prompt_ids + response_ids]))[0].astype(mx.float32), np.float64)
    logits = logits[len(prompt_ids) - 1 : -1]
    top = logits.max(-1, keepdims=True)
    logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logps[np.arange(len(response_ids)), response_ids]


def test_log_probs_are_those_of_mlx_lm(
    adapter: Path, tiny_model_dir: Path, data: Path, tmp_path: Path, no_sockets: Any
) -> None:
    """Policy: mlx-lm's model with the adapter; reference: without. No socket is opened on the way."""
    from mlx_lm import load

    rows = tmp_path / "rows.jsonl"
    run("evaluate", data, "--adapter-path", adapter, "--no-store", "--per-row", rows)
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(records) == 4 * len(PAIRS)
    for key, options in (("policy_logps", {"adapter_path": str(adapter)}), ("reference_logps", {})):
        model = load(str(tiny_model_dir), **options)[0]
        for record in records:
            for ids, found in zip(record["response_ids"], record[key], strict=True):
                np.testing.assert_allclose(found, plain_logps(model, record["prompt_ids"], ids), atol=1e-4)


def test_figures_of_a_working_adapter(adapter: Path, data: Path, tmp_path: Path) -> None:
    """Random weights read their goal, and change every log-prob: nothing is 0 but by definition."""
    file = tmp_path / "figures.json"
    run("evaluate", data, "--adapter-path", adapter, "--no-store", "--json", file)
    found = json.loads(file.read_text())
    assert abs(found["goal_sensitivity"]["mean"]) > 1e-3
    assert all(abs(view["change"]["chosen"]["sum"]) > 1e-2 for view in found["views"].values())


def test_the_store_serves_another_adapter_of_the_same_model(
    adapter: Path, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """The reference is the base: the bare model and an adapter on it ask for the same log-probs."""
    store = ("--store", tmp_path / "store")
    first = run("evaluate", data, "--model", tiny_model_dir, "--recipe", adapter, *store)
    assert "0 reused" in first.output and "0 by definition" in first.output
    assert " 0 rows computed" in run("evaluate", data, "--adapter-path", adapter, *store).output


@pytest.mark.parametrize("with_adapter", [True, False])
def test_greedy_text_is_that_of_mlx_lm(
    adapter: Path, tiny_model_dir: Path, with_adapter: bool, no_sockets: Any
) -> None:
    from mlx_lm import generate, load

    options = [] if with_adapter else ["--no-adapter"]
    ours = run("generate", "Tell me a story.", "--adapter-path", adapter, "--goal", 6, "--max-tokens", 24, *options)
    model, tokenizer = load(str(tiny_model_dir), adapter_path=str(adapter) if with_adapter else None)
    turns = [
        {"role": "system", "content": Recipe().goal_text(6)},
        {"role": "user", "content": "Tell me a story."},
    ]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert ours.stdout == generate(model, tokenizer, prompt, max_tokens=24) + "\n"


def test_a_batch_answers_as_one_by_one(adapter: Path, tmp_path: Path) -> None:
    file, found = tmp_path / "prompts.txt", []
    file.write_text("".join(f"{prompt}\n" for prompt, *_ in PAIRS))
    for size in (1, 3):
        run(
            "generate", "--file", file, "--adapter-path", adapter, "--max-tokens", 12,
            "--batch-size", size, "--json", tmp_path / "answers.json",
        )  # fmt: skip
        found.append([one["text"] for one in json.loads((tmp_path / "answers.json").read_text())])
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_a_seed_repeats_its_samples(adapter: Path) -> None:
    texts = [
        run(
            "generate", "Tell me a story.", "--adapter-path", adapter, "--max-tokens", 16,
            "--temperature", 1, "--seed", seed,
        ).stdout
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]
