"""The keys of PEFT's ``adapter_config.json``: which an adapter of mlx-lm can follow, and what they say of a module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

HARMLESS = frozenset(
    {
        # what it is, and of what
        "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode",
        # read: rank, scale, type, dropout, tying
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout",
        "ensure_weight_tying",
        # which modules: the tensors say it
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        # how the base stores its weights; the factors are the same
        "fan_in_fan_out",
        # how training began, and options of settings that are refused or off
        "init_lora_weights", "loftq_config", "eva_config", "lora_ga_config", "corda_config", "qalora_group_size",
        "megatron_config", "megatron_core", "runtime_config",
    }
)  # fmt: skip
"""Keys that are read, or that change nothing about a finished adapter."""

REFUSED: Mapping[str, str] = {
    "modules_to_save": "whole modules trained beside the factors; mlx-lm's adapters hold factors alone",
    "bias": "trained biases; mlx-lm's adapters have none",
    "lora_bias": "a bias in lora_B; mlx-lm's adapters have none",
    "target_parameters": "factors of bare parameters (experts); mlx-lm stacks experts otherwise",
    "trainable_token_indices": "single rows of the embeddings trained as they are",
    "layer_replication": "layers used more than once; mlx-lm's model has each one once",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "block-diagonal factors",
    "alora_invocation_tokens": "factors that are off before certain tokens (aLoRA)",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA changes the base model's weights",
    "velora_config": "VeLoRA is computed otherwise",
    "monteclora_config": "MonteCLoRA is computed otherwise",
}
"""Keys that must be off, and what they are."""

ON_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations (``init_lora_weights``) that also change the base model's weights."""

_PAST_THE_LAYER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("out_proj", "dt_proj")),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h"), ("out_proj",)),
}
"""Model type → layers whose weights transformers hands to a kernel: PEFT refuses them, or they have no effect."""

TAKEN_FOR_EXPERTS = frozenset(
    {
        "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe",
        "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "solar_open",
    }
)  # fmt: skip
"""Model types where PEFT takes every ``gate_proj``, ``up_proj`` and ``down_proj`` for one of the experts', as older
releases of transformers had them, and drops the factors of any other layer of that name (PEFT 0.21)."""

_OFF: tuple[Any, ...] = (None, False, "none", [], {})


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Every setting that no adapter of mlx-lm can follow, each in a line."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type {kind!r}: what can be converted is LORA (with use_dora: DoRA)"
        return
    for key, value in config.items():
        if key in HARMLESS or any(value is off or value == off for off in _OFF):
            continue
        yield f"{key} {value!r}: {REFUSED.get(key, 'a setting unknown here; of a newer PEFT?')}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(ON_THE_BASE):
        yield (
            f"init_lora_weights {start!r}: it changed the base model's weights, too. Save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it one of the unchanged base"
        )
    yield from _odd_numbers(config)


def _odd_numbers(config: Mapping[str, Any]) -> Iterator[str]:
    for key, wanted in (("r", int), ("lora_alpha", int | float)):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
            yield f"{key} {value!r}: not a number"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, Mapping):
            yield f"{key} {config[key]!r}: not a mapping of names to numbers"


def past_the_layer(module: str, model_type: str) -> bool:
    """Whether transformers reads a layer's weight and never calls the layer, so that factors there do nothing."""
    return module.rpartition(".")[2] in _PAST_THE_LAYER.get(model_type, ())


def taken_for_experts(module: str, model_type: str) -> bool:
    """Whether PEFT would look for a linear layer among the experts."""
    leaf = module.rpartition(".")[2]
    return model_type in TAKEN_FOR_EXPERTS and leaf in ("gate_proj", "up_proj", "down_proj")


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank of a module of transformers' and what its product is multiplied with, as PEFT has them."""
    rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that the end of a path matches; a pattern is a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
