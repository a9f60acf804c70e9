"""Tiny random models of several architectures, written once, for every library to load.

Ordinary Hugging Face folders: config.json, model.safetensors with the names the hub has, and the tokenizer of the
sandbox's model. The weights are large enough that attention, gates, experts and soft caps matter: at the usual
deviation of 0.02 a wrong mask or rotary base would change log-probs by less than rounding does.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref import sandbox
from mlxpref.files import folder_aside
from mlxpref.parity.draws import uniform
from mlxpref.tensors import Tensor, write_tensors

SEED = 0

_SHARED: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 2000.0,
    "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "dtype": "float32",
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
"""The rotary base is no library's default: one that does not read it is found."""

_OWN: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "head_dim": 16, "attention_bias": False, "mlp_bias": False},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "tie_word_embeddings": True, "attention_bias": False,
        "use_sliding_window": False,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "head_dim": 16, "tie_word_embeddings": True, "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0, "sliding_window": 1024,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 1024, "rope_scaling": None,
        "sliding_window": None, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "partial_rotary_factor": 1.0,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": None, "output_router_logits": False, "router_jitter_noise": 0.0,
    },
}  # fmt: skip

BUILT_IN = tuple(_OWN)
"""Architectures there is a tiny model of, by their ``model_type``."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a built-in model."""
    vocabulary = json.loads((sandbox.MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return {**_SHARED, **_OWN[name], "model_type": name, "vocab_size": vocabulary}


def weights_of(name: str, *, seed: int = SEED) -> dict[str, np.ndarray]:
    """Float32 weights of a built-in model under Hugging Face's names; the same bits everywhere."""
    config = config_of(name)
    return {tensor: _drawn(tensor, shape, config, seed) for tensor, shape in _shapes(config)}


def write_model(name: str, folder: Path, *, seed: int = SEED) -> Path:
    """Write a built-in model as a folder that transformers and mlx-lm load.

    Raises:
        RunError: the folder is occupied, or the disk refuses.
    """
    with folder_aside(folder) as aside:
        (aside / "config.json").write_text(json.dumps(config_of(name), indent=1), encoding="utf-8")
        weights = weights_of(name, seed=seed)
        tensors = {tensor: Tensor("F32", value.shape, _reader(value)) for tensor, value in weights.items()}
        write_tensors(aside / "model.safetensors", tensors)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(sandbox.MODEL / file, aside / file)
    return folder


def _reader(value: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: value.astype(np.float64)


def _drawn(name: str, shape: tuple[int, ...], config: Mapping[str, Any], seed: int) -> np.ndarray:
    """Activations keep about their size from layer to layer, logits of attention and of the head have a deviation of
    two or three; norms are not all ones, nor biases zero."""
    if len(shape) == 1:
        centre = 0.0 if name.endswith(".bias") or config["model_type"] == "gemma2" else 1.0
        drawn = centre + uniform(name, shape, deviation=0.2, seed=seed)
        return drawn.astype(np.float32)
    narrow = math.sqrt(config["hidden_size"])
    if "embed_tokens" in name or "lm_head" in name:
        return uniform(name, shape, deviation=2.5 / narrow, seed=seed)
    gain = 1.3 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "gate")) else 0.8
    return uniform(name, shape, deviation=gain / math.sqrt(shape[1]), seed=seed)


# --- names and shapes, by architecture ---


def _shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for part in (_attention, _feed_forward, _norms):
            for name, shape in part(config):
                yield at + name, shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def _attention(config: Mapping[str, Any]) -> Shapes:
    hidden, kind = config["hidden_size"], config["model_type"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    if kind == "phi3":
        yield "self_attn.qkv_proj.weight", (queries + 2 * keys, hidden)
    else:
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"self_attn.{name}.weight", (rows, hidden)
            if kind == "qwen2":
                yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if kind == "qwen3":
        yield "self_attn.q_norm.weight", (width,)
        yield "self_attn.k_norm.weight", (width,)


def _feed_forward(config: Mapping[str, Any]) -> Shapes:
    hidden, inner, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    if kind == "mixtral":
        yield "block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            at = f"block_sparse_moe.experts.{expert}."
            yield at + "w1.weight", (inner, hidden)
            yield at + "w2.weight", (hidden, inner)
            yield at + "w3.weight", (inner, hidden)
        return
    if kind == "phi3":
        yield "mlp.gate_up_proj.weight", (2 * inner, hidden)
    else:
        yield "mlp.gate_proj.weight", (inner, hidden)
        yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _norms(config: Mapping[str, Any]) -> Shapes:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] == "gemma2":
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        yield f"{name}.weight", (config["hidden_size"],)
