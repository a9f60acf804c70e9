"""The configuration: types, unknown keys, contradictions, layers, and defaults in one place."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxpref.config import OPTIMIZER_OPTIONS, Config, SourceSection
from mlxpref.config_layers import dump_config, load_config, parse_setting, set_key
from mlxpref.errors import ConfigError

LEAST: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d"}}


def load(*settings: str, **sections: Any) -> Config:
    return load_config(base={**LEAST, **sections}, overrides=[parse_setting(text) for text in settings])


def refused(*settings: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*settings, **sections)
    return str(caught.value)


# --- what a value is -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_a_number_is_a_number_whatever_yaml_thinks(text: str) -> None:
    """YAML 1.1 reads 1e-5 as text: a rate that stays text, or is refused, is the fault."""
    assert load(f"optimizer.learning_rate={text}").optimizer.learning_rate == 1e-5
    assert load(f"objective.beta={text}").objective["beta"] == 1e-5  # type: ignore[index, call-overload]  # one or a list


def test_whole_numbers_take_1e3_and_refuse_a_half() -> None:
    assert load("training.iters=1e3").training.iters == 1000
    assert "training.iters" in refused("training.iters=10.5")


@pytest.mark.parametrize("value", ["true", "many", ".nan", ".inf", "-1", "0"])
def test_a_rate_is_a_finite_positive_number(value: str) -> None:
    assert "optimizer.learning_rate" in refused(f"optimizer.learning_rate={value}")


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    """PyYAML keeps the last silently."""
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: a}\ndata: {source: b}\ntraining:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"'seed' is given twice[\s\S]*line 5"):
        load_config(file)


# --- unknown keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("training.iter", "training.iters"),
        ("optimizer.learningrate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("training.num_layers", "adapter.num_layers"),
        ("tokenization.max_seq_length", "tokenization.max_length"),
        ("adapter.lora_parameters.rnk", "adapter.lora_parameters.rank"),
        ("optimizer.schedule.warmup", "optimizer.schedule.warmup_"),
        ("training.lr", "optimizer.learning_rate"),
        ("traning.iters", "training"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(key: str, right: str) -> None:
    said = refused(f"{key}=1")
    assert f"unknown key {key.split('.')[0] if key.startswith('traning') else key}" in said
    assert right in said


def test_every_problem_is_told_at_once() -> None:
    said = refused("training.iter=3", "optimizer.name=adma", "data.colums=1", "tokenization.max_length=two")
    for part in ("training.iter:", "optimizer.name", "data.colums", "tokenization.max_length"):
        assert part in said


def test_missing_sections_name_the_flag() -> None:
    with pytest.raises(ConfigError, match="--data") as caught:
        load_config()
    assert "--model" in str(caught.value)


def test_a_wrong_source_in_a_list_is_named_by_its_place() -> None:
    said = refused(data={"source": [{"path": "a"}, {"path": "b", "wieght": 2}]})
    assert "unknown key data.source.1.wieght: did you mean data.source.weight?" in said
    assert said.count("\n") == 1


# --- contradictions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["data.valid=v", "data={source: d, valid: v, valid_fraction: 0.1}"], "valid_fraction"),
        (["training={iters: 3, epochs: 1}"], "training.epochs"),
        (["training.early_stopping=3"], "best_metric"),
        (["training={best_metric: eval_loss, steps_per_eval: 0}"], "steps_per_eval"),
        (["training.best_metric=loss"], "eval_loss"),
        (["optimizer={name: adam, weight_decay: 0.1}"], "adamw"),
        (["optimizer.options={momentum: 0.9}"], "adamw takes"),
        (["optimizer.options={betas: [0.9]}"], "optimizer.options: betas is [0.9]: two numbers"),
        (["optimizer={name: sgd, options: {dampening: 0.5}}"], "dampening damps a momentum, which is 0"),
        (["optimizer.schedule={warmup_steps: 3, warmup_ratio: 0.1}"], "warmup_ratio"),
        (["optimizer.schedule.end=1e-6"], "constant"),
        (["optimizer.schedule={name: cosine, end: 1}"], "above learning_rate"),
        (["adapter={fine_tune_type: full, lora_parameters: {rank: 4}}"], "full fine-tuning"),
        (["adapter.lora_parameters={scale: 1, alpha: 1}"], "keep one"),
        (["adapter.num_layers=0"], "-1 for all"),
        (["adapter={init_from: a, num_layers: 4}"], "adapter.num_layers with init_from"),
        (["tokenization={max_length: 64, max_prompt_length: 64}"], "no room"),
        (["data={source: [a, b], format: trl}"], "data.format"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(settings: list[str], word: str) -> None:
    assert word in refused(*settings)


def test_several_contradictions_are_gathered() -> None:
    said = refused("training={iters: 3, epochs: 1}", "adapter.num_layers=0")
    assert "training.epochs" in said and "num_layers" in said


# --- layers --------------------------------------------------------------------------------------


def test_the_order_is_default_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: a}\ndata: {source: b}\ntraining: {seed: 1, save_every: 7}\n")
    config = load_config(file, [("training.seed", 2)])
    assert (config.training.seed, config.training.save_every, config.training.steps_per_report) == (2, 7, 10)


def test_a_later_layer_replaces_the_alternative_of_an_earlier_one() -> None:
    """--iters over a file's epochs must not become a contradiction the user did not write."""
    config = load("training.iters=5", training={"epochs": 2})
    assert (config.training.iters, config.training.epochs) == (5, None)
    adapter = load("adapter.init_from=run", adapter={"num_layers": 4, "lora_parameters": {"rank": 4}}).adapter
    assert (adapter.num_layers, adapter.lora_parameters) == (None, None)
    config = load("data.valid_fraction=0.1", data={"source": "d", "valid": "v"})
    assert (config.data.valid, config.data.valid_fraction) == (None, 0.1)


@pytest.mark.parametrize(
    "settings",
    [("training.iters=3", "training.epochs=1"), ("adapter.init_from=run", "adapter.fine_tune_type=dora")],
)
def test_alternatives_of_one_layer_contradict_each_other(settings: tuple[str, ...]) -> None:
    """The one that came later on the command line took the other away without a word."""
    for order in (settings, settings[::-1]):
        assert settings[0].partition("=")[0].rpartition(".")[2] in refused(*order)


@pytest.mark.parametrize(
    ("key", "right", "absurd"),
    [("lora", "adapter.lora_parameters", "format"), ("data.pth", "path", "data.split")],
)
def test_no_absurd_key_is_suggested(key: str, right: str, absurd: str) -> None:
    said = refused(f"{key}=1")
    assert right in said and absurd not in said


def test_naming_another_objective_drops_the_options_of_the_first() -> None:
    start = {"name": "dpo", "beta": 0.01, "label_smoothing": 0.3}
    assert load("objective=simpo", objective=start).objective == {"name": "simpo"}
    assert load("objective=dpo", objective=start).objective == start
    assert load("objective.beta=0.2", objective="ipo").objective == {"name": "ipo", "beta": 0.2}


def test_set_reaches_into_lists_and_says_where_it_cannot() -> None:
    mixture = [{"name": "dpo"}, {"name": "sft", "weight": 0.1}]
    config = load("objective.1.weight=0.5", objective=mixture)
    assert config.objective[1]["weight"] == 0.5  # type: ignore[index, call-overload]  # one or a list
    for key, word in (("objective.2.weight", "0 to 1"), ("model.path.x", "not a section")):
        with pytest.raises(ConfigError, match=word):
            set_key({**LEAST, "model": {"path": "m"}, "objective": mixture}, key, 1)
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_setting("training.seed")


def test_overrides_do_not_write_into_the_given_base() -> None:
    base = {"model": {"path": "m"}, "data": {"source": "d"}, "training": {"seed": 1}}
    load_config(base=base, overrides=[("training.seed", 2)])
    assert base["training"] == {"seed": 1}


# --- resolved ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"adapter": {"fine_tune_type": "full"}},
        {"adapter": {"lora_parameters": {"alpha": 16}}},
        {"adapter": {"init_from": "run"}},
        {"data": {"source": ["a", {"path": "b", "weight": 0.5}]}},
        {"objective": [{"name": "dpo", "beta": "1e-2"}, {"name": "sft", "weight": 0.1}], "relabel": {}},
        {"training": {"iters": 3}, "optimizer": {"schedule": {"name": "cosine", "warmup_ratio": 0.1}}},
        {"relabel": {"top_goal": {"helpfulness": 4}, "attributes": ["helpfulness"]}},
    ],
)
def test_the_resolved_configuration_reads_back_equal(sections: dict[str, Any]) -> None:
    config = load(**sections)
    assert load_config(base=yaml.safe_load(dump_config(config))) == config


def test_alpha_over_rank_is_the_scale() -> None:
    lora = load("adapter.lora_parameters={rank: 16, alpha: 32}").adapter.lora_parameters
    assert lora is not None and lora.arguments() == {"rank": 16, "scale": 2.0, "dropout": 0.0}


def test_source_keys_are_those_of_a_source() -> None:
    from mlxpref.data.sources import SourceSpec

    assert set(SourceSection.model_fields) == {field.name for field in fields(SourceSpec)}


def test_a_default_lives_in_one_place() -> None:
    """A schema default that differs from the stage's own would make library and command disagree."""
    from mlxpref.config import BatchingSection, RelabelSection, TokenizationSection
    from mlxpref.data.plan import plan_steps
    from mlxpref.data.relabel import fit_recipe, relabel_all
    from mlxpref.data.tokenization import tokenize_all

    stages = [
        (BatchingSection(), plan_steps),
        (TokenizationSection(), tokenize_all),
        (RelabelSection(), relabel_all),
        (RelabelSection(), fit_recipe),
    ]
    for section, function in stages:
        taken = inspect.signature(function).parameters
        shared = {name for name in type(section).model_fields if name in taken} - {"carrier"}
        assert shared
        for name in shared:
            default = taken[name].default
            if default is not inspect.Parameter.empty:
                assert getattr(section, name) == default, f"{function.__name__}: {name}"


@pytest.mark.mlx
def test_optimizer_options_are_those_mlx_takes() -> None:
    """An option the schema lets through and the optimiser refuses would stop a run after loading."""
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    from mlxpref.mlx_backend.optimizers import make_optimizer

    values = {"betas": [0.9, 0.99], "eps": 1e-8, "ns_steps": 5, "bias_correction": True, "decay_rate": -0.5}
    beside = {"dampening": {"momentum": 0.9}, "nesterov": {"momentum": 0.9}}
    for name, options in OPTIMIZER_OPTIONS.items():
        for option in options:
            value = [1e-30, 1e-3] if (name, option) == ("adafactor", "eps") else values.get(option, 0.5)
            make_optimizer(name, 0.0, {option: option == "nesterov" or value, **beside.get(option, {})})


@pytest.mark.parametrize("half", ["chosen", "rejected"])
@pytest.mark.parametrize("metric", ["accuracies", "margins"])
def test_a_run_may_be_chosen_by_one_half(half: str, metric: str) -> None:
    """An evaluation measures both of each half."""
    name = f"eval_{half}_half/rewards/{metric}"
    assert load(f"training.best_metric={name}").training.best_metric == name
