"""Every file in configs/: it loads, says what each key does, and reaches a first batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlxpref.config import Config
from mlxpref.config_layers import dump_config, load_config
from mlxpref.data.batching import collate_step
from mlxpref.data.plan import plan_steps
from mlxpref.objectives import resolve_objective
from mlxpref.prepare import prepare
from mlxpref.schedules import n_warmup

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))

EXPECTED = {
    "cpu-small", "dpo-baseline", "qlora-8b-64gb", "qwen3-0.6b-ultrafeedback", "sandbox", "seed-qwen2-7b",
    "simpo-baseline",
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"Tell me story number {i}, please.",
            "chosen": f"Once upon a time there were {i} cats.",
            "rejected": f"No, not {i}.",
            "score_chosen": 7 + i % 4,
            "score_rejected": 1 + i % 5,
        }
        for i in range(200)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def raw_ultrafeedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UltraFeedback as published: four responses a prompt, of which a rating N/A leaves three, or two."""
    file = tmp_path_factory.mktemp("raw") / "train.jsonl"
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    rows = []
    for i in range(120):
        refused = range(i % 3)
        completions = [
            {
                "response": f"Answer {k} to {i}.",
                "overall_score": 1.0 + (3 * k + i) % 10,
                "annotations": {name: {"Rating": "N/A" if k in refused else "4"} for name in names},
            }
            for k in range(4)
        ]
        rows.append({"source": "evol_instruct", "instruction": f"Question {i}?", "completions": completions})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data_of(pairs: Path, raw_ultrafeedback: Path) -> Any:
    """Data on this machine of the kind that a configuration names."""
    return lambda file: raw_ultrafeedback if "openbmb/UltraFeedback" in file.read_text() else pairs


def here(file: Path, model: Path, pairs: Path) -> Config:
    """The configuration with a model and data that are on this machine."""
    places = [("model.path", str(model)), ("data.source", str(pairs))]
    return load_config(file, [*places, *((f"data.{key}", None) for key in ("split", "revision"))])


def test_the_configs_there_should_be() -> None:
    assert {file.stem for file in FILES} == EXPECTED


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_reaches_a_first_batch(file: Path, tiny_model_dir: Path, data_of: Any) -> None:
    """A key that no stage takes, or a value one refuses, would only show after the download."""
    config = here(file, tiny_model_dir, data_of(file))
    spec = config.objective if isinstance(config.objective, dict) else list(config.objective)
    objective = resolve_objective(spec)
    data = prepare(config)
    batching = config.batching
    plan = plan_steps(
        data.train,
        batch_size=batching.batch_size,
        iters=config.training.iters,
        epochs=config.training.epochs,
        micro_batch_tokens=batching.micro_batch_tokens,
        shuffle=batching.shuffle,
        keep_together=batching.keep_together,
        seed=config.training.seed,
        max_shapes=batching.max_shapes,
    )
    first = collate_step(data.train, plan.steps[0], None, objective.needs - {"reference"})
    assert 0 < first.n_examples <= batching.batch_size
    assert len(plan.shapes) <= batching.max_shapes
    assert data.valid, "best_metric and steps_per_eval need validation rows"
    schedule = config.optimizer.schedule
    n_warmup(len(plan.steps), warmup_steps=schedule.warmup_steps, warmup_ratio=schedule.warmup_ratio)
    assert (data.recipe is None) == ("baseline" in file.stem)


def test_seed_reads_lists_of_every_length(tiny_model_dir: Path, raw_ultrafeedback: Path) -> None:
    """Against its neighbour alone, as a bare pair formula reads a list, is not the seed's best against any."""
    config = here(FOLDER / "seed-qwen2-7b.yaml", tiny_model_dir, raw_ultrafeedback)
    rows = prepare(config).train
    assert {len(row.response_ids) for row in rows} == {2, 3, 4}
    assert isinstance(config.objective, dict) and config.objective["lift"] == "best_rest"


@pytest.mark.parametrize("name", ["dpo-baseline", "simpo-baseline"])
def test_baselines_train_on_the_pairs_of_the_run_they_are_compared_with(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    scores = [(8, 8), (7, 6.8), (9, 2), (6, 5), (12, 3)]
    rows = [
        {"prompt": f"Q {i}", "chosen": "Yes.", "rejected": "No.", "score_chosen": a, "score_rejected": b}
        for i, (a, b) in enumerate(scores * 60)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        prepare(here(FOLDER / f"{stem}.yaml", tiny_model_dir, file)) for stem in (name, "qwen3-0.6b-ultrafeedback")
    ]
    plain, goals = ({row.example_id for row in data.train} for data in found)
    assert plain == goals and 0 < len(plain) < 150
    assert {row.goal for row in found[0].train} == {None}
    for key in ("model", "data", "tokenization", "batching", "adapter"):
        baseline, run = (
            getattr(load_config(FOLDER / f"{stem}.yaml"), key) for stem in (name, "qwen3-0.6b-ultrafeedback")
        )
        assert baseline == run, key


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_carries_a_comment(file: Path) -> None:
    """Each key says its effect beside it; a section's keys say theirs."""
    bare = [
        line
        for line in file.read_text().splitlines()
        if re.match(r"\s*[\w.]+: *[^\s#]", line) and not re.search(r"\s# \S", line)
    ]
    assert not bare, bare


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_resolved_configuration_is_the_same_run(file: Path) -> None:
    import yaml

    config = load_config(file)
    assert load_config(base=yaml.safe_load(dump_config(config))) == config
    assert config.output.report_to == ()  # nothing is sent unless asked
