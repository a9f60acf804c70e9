"""Tiny random models of many mlx-lm architectures, written as ordinary model folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import TINY_LLAMA

_BASE: dict[str, Any] = {**TINY_LLAMA, "layer_norm_eps": 1e-5}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {**_MOE, "mlp_only_layers": [], "norm_topk_prob": True},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 12, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {"original_max_position_embeddings": 1024},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "granite": {
        "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    },
    "cohere2": {"logit_scale": 0.5, "sliding_window": 12, "sliding_window_pattern": 2, "layer_norm_bias": False,
                "attention_bias": False},
    "gpt2": {"n_ctx": 1024, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 1024,
             "layer_norm_epsilon": 1e-5, "num_key_value_heads": 4},
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25,
                 "use_parallel_residual": True, "attention_bias": True},
    "qwen3_next": {
        **_MOE, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32, "mlp_only_layers": [], "partial_rotary_factor": 0.5,
        "full_attention_interval": 2, "norm_topk_prob": True,
    },
    "mamba": {
        "state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2,
        "intermediate_size": 64, "layer_norm_epsilon": 1e-5,
    },
    "rwkv7": {
        "head_dim": 8, "norm_eps": 1e-5, "a_low_rank_dim": 4, "v_low_rank_dim": 4, "gate_low_rank_dim": 4,
        "decay_low_rank_dim": 4,
    },
}  # fmt: skip

WAYS = {name: "shared" for name in ARCHITECTURES}
"""The way each one takes; the probe must find exactly this."""

QUANTISABLE = {**_BASE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "model_type": "llama"}


def write_model(
    folder: Path, config: dict[str, Any], tokenizer_from: Path, *, seed: int = 0, gain: float = 2.5
) -> Path:
    """A folder with config, random float32 weights and a tokenizer; weights are made non-trivial."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    vocabulary = json.loads((tokenizer_from / "config.json").read_text())["vocab_size"]
    config = {"vocab_size": vocabulary, **config}
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_from.glob("*token*"):
        shutil.copy(file, folder)
    for extra in ("chat_template.jinja", "special_tokens_map.json"):
        if (tokenizer_from / extra).exists():
            shutil.copy(tokenizer_from / extra, folder)
    model_class, args_class = _get_classes(config=config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    # Fresh weights are too small for attention and gates to matter: a wrong mask would hide.
    model.update(tree_map(lambda w: w * gain + 0.02 * mx.random.normal(w.shape), model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(name: str) -> dict[str, Any]:
    return {**_BASE, **ARCHITECTURES[name], "model_type": name}
