"""From mlx-lm to PEFT: the same factors, turned, under transformers' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxpref.adapters import Adapter
from mlxpref.conversion.bases import Base
from mlxpref.conversion.changes import cut, transposed, zero_behind
from mlxpref.conversion.folders import PeftAdapter
from mlxpref.conversion.places import for_peft, layout
from mlxpref.conversion.settings import past_the_layer, taken_for_experts
from mlxpref.errors import AdapterError, raise_all
from mlxpref.names import is_embedding, is_token_table, to_torch
from mlxpref.tensors import Tensor

FORMAT = 1
"""Of ``mlxpref.json``."""

_CONV1D = frozenset(("gpt2",))
"""Model types whose matrices transformers stores (inputs, outputs)."""

Factors = Mapping[str, tuple[Tensor, Tensor]]


def to_peft(adapter: Adapter, base: Base) -> tuple[PeftAdapter, list[str]]:
    """A PEFT adapter that computes what an adapter of mlx-lm's does, and what to say about it.

    Raises:
        AdapterError: a full fine-tune, or listing every module that transformers or PEFT has no counterpart of.
    """
    if adapter.kind == "full":
        raise AdapterError(
            f"{adapter.folder}: a full fine-tune, whole weights and no factors; PEFT has nothing for it. Put the "
            "weights into the model (mlx_lm.fuse), which transformers then loads"
        )
    raise_all(list(_problems(adapter, base)), AdapterError, f"{adapter.folder}: not for PEFT:")
    undone = _undone(adapter)
    factors, settings = undone or (adapter.factors, _settings(adapter, base))
    if undone is None or adapter.facts["peft"].get("base") != base.name:
        settings |= {"base_model_name_or_path": base.name, "revision": base.revision}
    facts = {
        "format": FORMAT,
        "base": base.name,
        "layout": layout(adapter.tensors),
        "config": dict(adapter.config),
    }
    said = ["ranks, scales and settings that it had in PEFT before are back"] if undone else []
    if base.quantised:
        said.append(
            f"{base.name} is quantised by mlx-lm, which transformers cannot load: for use there, name the model that "
            "it was made from with --model"
        )
    tensors = dict(_tensors(factors, adapter.weights, base))
    return PeftAdapter(adapter.folder, settings, tensors, facts), said


def _problems(adapter: Adapter, base: Base) -> Iterator[str]:
    for module in adapter.factors:
        try:
            to_torch(module, base.model_type)
        except AdapterError as error:
            yield str(error)
        if past_the_layer(module, base.model_type):
            yield f"{module}: transformers never calls this layer, and factors would do nothing there"
        elif taken_for_experts(module, base.model_type) and ".switch_" not in module:
            yield f"{module}: PEFT takes it for one of the experts and drops its factors; adapt other modules"
        if is_embedding(module) and adapter.kind == "dora":
            yield f"{module}: DoRA of an embedding; mlx-lm sets the length of its rows, PEFT of its columns"
    ranks = {pair[0].shape[-1] for pair in adapter.factors.values() if len(pair[0].shape) == 2}
    if len(ranks) > 1:
        yield f"modules of rank {', '.join(map(str, sorted(ranks)))}, where mlx-lm has one"
    magnitudes = {f"{module}.m" for module in adapter.factors} if adapter.kind == "dora" else set()
    yield from (f"{name}: unknown" for name in adapter.weights if name not in magnitudes)
    yield from (f"{name}: missing" for name in sorted(magnitudes - adapter.weights.keys()))


def _settings(adapter: Adapter, base: Base) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter that never was PEFT's."""
    rank = next(iter(adapter.factors.values()))[0].shape[1]
    alpha = rank * float(adapter.lora["scale"])
    names = [to_torch(module, base.model_type) for module in adapter.factors]
    conv1d = base.model_type in _CONV1D and not all(map(is_embedding, names))
    tied = {"ensure_weight_tying": True} if base.tied and any(map(is_token_table, names)) else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": adapter.kind == "dora",
        "lora_dropout": float(adapter.lora.get("dropout", 0.0)),
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "modules_to_save": None,
        **for_peft(names, base.n_layers, text_only=base.text_only),
        **tied,
    }


def _tensors(factors: Factors, weights: Mapping[str, Tensor], base: Base) -> Iterator[tuple[str, Tensor]]:
    for module, (a, b) in factors.items():
        at = f"base_model.model.{to_torch(module, base.model_type)}"
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding(module) else ("lora_A.weight", "lora_B.weight")
        for name, tensor in zip(names, (a, b), strict=True):
            yield f"{at}.{name}", transposed(tensor)
        if base.tied and is_token_table(module):  # PEFT has the same factors a second time, for the head
            yield "base_model.model.lm_head.lora_A.weight", b
            yield "base_model.model.lm_head.lora_B.weight", a
        if f"{module}.m" in weights:
            yield f"{at}.lora_magnitude_vector", weights[f"{module}.m"]


# --- what was done to make it mlx-lm's ---


def _undone(adapter: Adapter) -> tuple[Factors, dict[str, Any]] | None:
    """The factors and settings of an adapter that came from PEFT; None if it did not, or was changed since."""
    kept = adapter.facts.get("peft")
    if not isinstance(kept, Mapping) or not isinstance(kept.get("config"), Mapping):
        return None
    if kept.get("scale") != adapter.lora["scale"] or kept.get("rank") != adapter.lora.get("rank"):
        return None
    ranks: Mapping[str, int] = kept.get("ranks") or {}
    scales: Mapping[str, float] = kept.get("scales") or {}
    dtypes: Mapping[str, str] = kept.get("dtypes") or {}
    found = {}
    for module, (a, b) in adapter.factors.items():
        rank = ranks.get(module, int(kept["rank"]))
        if not (zero_behind(a, 1, rank) and zero_behind(b, 0, rank)):
            return None
        ratio = scales.get(module, kept["scale"]) / kept["scale"] if kept["scale"] else 1.0
        found[module] = cut(a, 1, rank), _unscaled(cut(b, 0, rank), ratio, dtypes.get(module, b.dtype))
    return found, dict(kept["config"])


def _unscaled(b: Tensor, ratio: float, dtype: str) -> Tensor:
    """``lora_b`` without the ratio of scales, in the type it had. What a ratio of 0 has wiped out stays 0."""
    return b if ratio in (0, 1) else Tensor(dtype, b.shape, lambda: b.read() / ratio)
