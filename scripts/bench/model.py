"""A small model folder of random weights, a tokenizer of numbered words, and where every contestant's LoRA starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.pairs import END, FIRST

MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Linear modules of a layer, all of which are adapted."""

RANK, ALPHA = 8, 16.0

END_TEXT = "<end>"


@dataclass(frozen=True)
class Dims:
    """Sizes of a Qwen2 or Llama model; the defaults have the head's share of a 0.5B model with 150 k words."""

    kind: str = "qwen2"
    hidden: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head: int = 64
    intermediate: int = 1152
    vocabulary: int = 16384

    def linear(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear module of a layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        h, i = self.hidden, self.intermediate
        return dict(zip(MODULES, ((h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)), strict=True))


TINY = Dims(hidden=32, layers=2, heads=4, kv_heads=2, head=8, intermediate=48, vocabulary=128)
"""For a smoke test."""


def write_model(dims: Dims, folder: Path, seed: int = 0) -> None:
    """config.json, model.safetensors in float32 and a tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(dims), indent=1))
    save_file(_weights(dims, np.random.default_rng(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(dims.vocabulary, folder)


def _config(dims: Dims) -> dict[str, Any]:
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[dims.kind]
    return {
        "model_type": dims.kind, "architectures": [architecture], "hidden_size": dims.hidden,
        "num_hidden_layers": dims.layers, "num_attention_heads": dims.heads, "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head, "intermediate_size": dims.intermediate, "vocab_size": dims.vocabulary,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 8192,
        "hidden_act": "silu", "eos_token_id": END, "bos_token_id": None, "pad_token_id": 0, "torch_dtype": "float32",
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


def _weights(dims: Dims, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of a scale that keeps the size of what goes through; logits spread by about 1."""

    def normal(out: int, n: int) -> np.ndarray:
        return (rng.standard_normal((out, n), dtype=np.float32) / np.sqrt(n)).astype(np.float32)

    ones = np.ones(dims.hidden, np.float32)
    found = {
        "model.embed_tokens.weight": normal(dims.vocabulary, dims.hidden),
        "lm_head.weight": normal(dims.vocabulary, dims.hidden),
        "model.norm.weight": ones,
    }
    for layer in range(dims.layers):
        at = f"model.layers.{layer}"
        for name, (n, out) in dims.linear().items():
            found[f"{at}.{name}.weight"] = normal(out, n)
            if dims.kind == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                found[f"{at}.{name}.bias"] = normal(out, 400)[:, 0].copy()
        found[f"{at}.input_layernorm.weight"] = found[f"{at}.post_attention_layernorm.weight"] = ones
    return {name: value.copy() for name, value in found.items()}


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Word ``t17`` is token 17; words stand apart by spaces."""
    words = {"<pad>": 0, "<unk>": 1, END_TEXT: END, **{f"t{i}": i for i in range(FIRST, vocabulary)}}
    special = [
        {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for word, i in words.items() if i < FIRST
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>",
        "eos_token": END_TEXT, "model_max_length": 8192,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def read_tokenizer(folder: str) -> Any:
    """The folder's tokenizer as it is; by the folder's name alone transformers makes a Qwen2 model's read bytes."""
    from transformers import PreTrainedTokenizerFast

    file = str(Path(folder) / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", unk_token="<unk>", eos_token=END_TEXT)


def text_of(ids: np.ndarray) -> str:
    """The words that the tokenizer reads as these ids, an end token at the end left out."""
    return "".join(f"t{i} " for i in ids.tolist() if i >= FIRST)


def lora_start(dims: Dims, seed: int = 1) -> dict[str, np.ndarray]:
    """Both factors of every adapted module, neither zero: ``….lora_a`` (in, r), ``….lora_b`` (r, out), float32."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(dims.layers):
        for name, (n, out) in dims.linear().items():
            at = f"model.layers.{layer}.{name}"
            found[f"{at}.lora_a"] = rng.standard_normal((n, RANK), dtype=np.float32) / np.float32(np.sqrt(n))
            found[f"{at}.lora_b"] = rng.standard_normal((RANK, out), dtype=np.float32) * np.float32(0.01)
    return found
