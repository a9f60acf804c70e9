"""Tiny random models that transformers writes and both libraries load, and witnesses of what is read from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref import names
from mlxpref.data.batching import collate
from mlxpref.data.plan import plan_pass
from mlxpref.records import Batch, Tokenized
from tests.architectures import config_of
from tests.test_mlx_step import Plain

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 1024, "tie_word_embeddings": True},
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        # mlx-lm rounds the scale of embeddings, √hidden_size, to bfloat16 in every dtype: here it is exact
        "hidden_size": 64, "head_dim": 16,
    },
    "phi3": {"pad_token_id": 0, "sliding_window": None},
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.3},
    "olmo2": {},
    "granite": {},
    "cohere2": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    # mlx-lm has the approximate GELU whatever config.json says
    "gpt_neox": {"intermediate_size": 128, "hidden_dropout": 0.1, "hidden_act": "gelu_fast"},
    "mamba": {"tie_word_embeddings": True},
}  # fmt: skip
"""By ``model_type``, what transformers reads otherwise than mlx-lm does; and noise of training, which must be off."""


def write_model(folder: Path, name: str, tokenizer_from: Path, *, seed: int = 0, **more: Any) -> Path:
    """Config, random float32 weights under the names of the hub, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = json.loads((tokenizer_from / "config.json").read_text())
    base = {"vocab_size": own["vocab_size"], "eos_token_id": own["eos_token_id"], "bos_token_id": None}
    config = {**base, **config_of(name), **CHANGES[name], **more}
    kind = config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Fresh weights are too small for attention and gates to matter: a wrong mask would hide.
            drawn = torch.randn(value.shape, generator=draw)
            matrix = value.ndim > 1 and "conv1d" not in key and "A_log" not in key
            value.copy_(1.3 * drawn / value.shape[-1] ** 0.5 if matrix else value + 0.05 * drawn)
    model.save_pretrained(folder)
    if kind == "gpt2":  # the hub's checkpoint is the body alone
        _renamed(folder / "model.safetensors", "transformer.", "")
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, **config, "model_type": kind}))
    for file in (*tokenizer_from.glob("*token*"), *tokenizer_from.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder


def _renamed(file: Path, old: str, new: str) -> None:
    from safetensors.numpy import load_file, save_file

    weights = {name.replace(old, new, 1): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def load_both(path: Path | str, **options: Any) -> tuple[Any, Any]:
    """The same policy in both rooms, off the point where an adapter is zero; (mlx's, torch's)."""
    from mlxpref import mlx_backend, torch_backend

    options = {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}, **options}
    policies = mlx_backend.load_policy(str(path), **options), torch_backend.load_policy(str(path), **options)
    values = jittered(policies[0].values(), 0.0 if options.get("fine_tune_type") == "full" else 0.05)
    for policy in policies:
        policy.set_values(values)
    return policies


def jittered(values: dict[str, np.ndarray], size: float = 0.05, *, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        name: value + size * draw.standard_normal(value.shape).astype(np.float32)
        for name, value in sorted(values.items())
    }


def with_longer_prompts(rows: list[Tokenized]) -> list[Tokenized]:
    """Long enough for a part that is shared."""
    before = np.arange(3, 23, dtype=np.int32)
    return [replace(row, prompt_ids=np.concatenate([before + i, row.prompt_ids])) for i, row in enumerate(rows)]


# --- what is read ------------------------------------------------------------------------------


weighted = Plain(lambda columns: (columns["policy"].tokens * columns["own"]).sum(-1).sum(-1), needs=frozenset())
"""Each token's log-prob times a weight of its own: one in the wrong place shows in the gradients."""


def weighted_batch(rows: list[Tokenized], *, share: bool, budget: int = 400) -> Batch:
    steps = plan_pass(rows, micro_batch_tokens=budget, share_prompts=share).steps
    parts = [collate(rows, part) for (part,) in steps]

    def with_weights(part: Any, planned: Any) -> Any:
        own = np.sin(1.0 + np.arange(part.mask.shape[2]) + 3.0 * np.arange(2)[:, None])
        own = own[None] + np.cos(np.array(planned.rows, np.float64))[:, None, None]
        return part._replace(extras={"own": (own * part.mask).astype(np.float32)})

    given = [with_weights(part, planned) for part, (planned,) in zip(parts, steps, strict=True)]
    return Batch(tuple(given), tuple(tuple(planned.rows) for (planned,) in steps))


def read(backend: Any, policy: Any, rows: list[Tokenized], *, share: bool, **options: Any) -> list[list[np.ndarray]]:
    """Token log-probs of every response, through plan and collation."""
    found: list[list[np.ndarray]] = [[] for _ in rows]
    for (part,) in plan_pass(rows, micro_batch_tokens=400, share_prompts=share).steps:
        tokens = backend.token_logps(policy, collate(rows, part), **options).tokens
        for b, i in enumerate(part.rows):
            found[i] = [tokens[b, k, : len(ids)] for k, ids in enumerate(rows[i].response_ids)]
    return found


def plain_logps(model: Any, rows: list[Tokenized]) -> list[list[np.ndarray]]:
    """The same by a model of transformers itself: one whole row at a time, no padding, float64 log-softmax."""
    import torch

    def one(prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        ids = np.concatenate([prompt, response])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, :-1].astype(np.int64))).logits[0].double().numpy()
        logps = logits - np.logaddexp.reduce(logits, -1)[:, None]
        return logps[np.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]

    return [[one(row.prompt_ids, ids) for ids in row.response_ids] for row in rows]


def whole_logits(policy: Any, row: Tokenized, slot: int) -> np.ndarray:
    """(n, V) float64 logits that predict one slot's tokens, by a plain forward of one unpadded row."""
    import torch

    lead, ids = row.slots[slot]
    tokens = np.concatenate([row.prompt_ids, lead, ids]).astype(np.int64)
    with torch.no_grad():
        return policy.model(torch.from_numpy(tokens[None, :-1])).logits[0].double().numpy()[-len(ids) :]


def merged_model(path: Path | str, policy: Any) -> Any:
    """The base as transformers loads it, an adapter's values merged into its weights by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    values, scale = policy.values(), policy.lora_parameters["scale"]
    kind = policy.config["model_type"]
    with torch.no_grad():
        for name in sorted({key.rpartition(".")[0] for key in values}):
            a, b = (torch.from_numpy(values[f"{name}.lora_{x}"]) for x in "ab")
            weight, outputs_first = _weight(model, name, kind)
            if a.ndim == 3:
                weight += scale * torch.einsum("eor,eri->eoi", b, a)
                continue
            embeds = "embed" in name.rpartition(".")[2]
            delta = scale * (a @ b) if embeds else scale * (a @ b).T
            whole = (weight if outputs_first else weight.T) + delta
            if f"{name}.m" in values:
                whole = torch.from_numpy(values[f"{name}.m"])[:, None] * whole / whole.norm(dim=1, keepdim=True)
            weight.copy_(whole if outputs_first else whole.T)
    return model


def _weight(model: Any, name: str, kind: str) -> tuple[Any, bool]:
    """The matrix of transformers' model that is mlx-lm's module, and whether its outputs come first."""
    from transformers.pytorch_utils import Conv1D

    if ".switch_mlp." in name:
        block, _, piece = name.partition(".switch_mlp.")
        experts = model.get_submodule(block.replace("block_sparse_moe", "mlp")).experts
        if piece == "down_proj":
            return experts.down_proj, True
        half = experts.gate_up_proj.shape[1] // 2
        return experts.gate_up_proj[:, :half] if piece == "gate_proj" else experts.gate_up_proj[:, half:], True
    if name.endswith((".block_sparse_moe.gate", ".mlp.gate")):
        return model.get_submodule(name.replace("block_sparse_moe", "mlp")).weight, True
    module = model.get_submodule(names.to_torch(name, kind))
    return module.weight, not isinstance(module, Conv1D)


# --- comparing ---------------------------------------------------------------------------------


def assert_logps(found: Any, expected: Any, bound: float = 1e-4) -> None:
    gaps = [a - b for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True)]
    assert max(np.abs(gap).max() for gap in gaps) <= bound
    assert abs(np.concatenate(gaps).mean()) <= bound / 10


def assert_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in expected.values()))
    assert norm > 1e-2, "nothing to compare with"
    for name, value in expected.items():
        scale = max(np.abs(value).max(), 1e-3 * norm)
        gap = np.abs(found[name] - value).max() / scale
        assert gap <= bound, f"gradient of {name} differs by {gap:.2e} of its largest entry"
