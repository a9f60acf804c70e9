"""From PEFT to mlx-lm: the same function of the same modules.

mlx-lm has one rank and one scale for all modules. Smaller ranks are filled up with zeros, which add nothing and stay
zero in training; a scale of its own goes into a module's ``lora_b``. What was done is kept in the config, to be undone
on the way back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxpref.adapters import Adapter
from mlxpref.conversion.bases import Base
from mlxpref.conversion.changes import padded, scaled, transposed
from mlxpref.conversion.copies import altered
from mlxpref.conversion.folders import CONFIG, WEIGHTS, PeftAdapter
from mlxpref.conversion.places import for_mlx, layer_of, layout
from mlxpref.conversion.settings import past_the_layer, problems, rank_and_scale
from mlxpref.data.words import counted
from mlxpref.errors import AdapterError, raise_all
from mlxpref.names import is_token_table, to_mlx
from mlxpref.tensors import Tensor

_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:"
    r"(?P<pair>lora_(?:embedding_)?[AB])(?:(?<!embedding_[AB])\.weight)?|(?P<m>lora_magnitude_vector)(?:\.weight)?)"
)
_COPY = re.compile(r"base_model\.model\.((?:(?!lora_).)+?)(?:\.base_layer)?\.weight")


@dataclass(frozen=True, slots=True)
class _Module:
    """A module's tensors as PEFT has them, and what the settings say of it.

    Attributes:
        a, b: (r, inputs) and (outputs, r); of an embedding (r, tokens) and (width, r).
        m: DoRA's magnitudes, (outputs,).
        embedding: a table, not a matrix.
        scale: what the product is multiplied with.
    """

    name: str
    a: Tensor
    b: Tensor
    m: Tensor | None
    embedding: bool
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def from_peft(peft: PeftAdapter, base: Base) -> tuple[Adapter, list[str]]:
    """An adapter of mlx-lm's that computes what a PEFT adapter does, and what to say about it.

    Raises:
        AdapterError: listing everything that no adapter of mlx-lm can follow, and everything that is damaged.
    """
    raise_all(list(problems(peft.config)), AdapterError, f"{peft.folder / CONFIG}: not for mlx-lm:")
    found, faults = _sorted_tensors(peft)
    modules = [] if faults else list(_modules(found, peft.config, base, faults))
    if not (modules or faults):
        faults.append("there are none")
    faults += altered(peft, base, _COPY) if not faults else []
    raise_all(faults, AdapterError, f"{peft.folder / WEIGHTS}: not LoRA factors that mlx-lm can have:")
    return _assembled(peft, base, modules)


def _sorted_tensors(peft: PeftAdapter) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module → part → tensor, and the names of tensors that are unknown."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in peft.tensors.items():
        match = _NAME.fullmatch(name)
        if match is not None:
            found.setdefault(match["module"], {})[match["pair"] or "m"] = tensor
        elif not _COPY.fullmatch(name):
            unknown.append(f"{name}: unknown")
    return found, unknown


def _modules(
    found: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], base: Base, faults: list[str]
) -> Iterator[_Module]:
    """The modules that are whole; of the others ``faults`` gets a line each."""
    for name, parts in found.items():
        embedding = any("embedding" in part for part in parts)
        a, b = (parts.get(f"lora_{'embedding_' if embedding else ''}{which}") for which in "AB")
        if base.tied and config.get("ensure_weight_tying") and _is_mirror(name, parts, found, config):
            continue
        faults_here = list(_faults(name, a, b, parts.get("m"), embedding, config, base))
        faults += faults_here
        if not faults_here and a is not None and b is not None:
            scale = rank_and_scale(name, config)[1]
            yield _Module(to_mlx(name, base.model_type), a, b, parts.get("m"), embedding, scale)


def _is_mirror(
    name: str, parts: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> bool:
    """Whether a head's factors are those of the embedding it is tied to, as PEFT saves them a second time."""
    table, of = next(((key, one) for key, one in found.items() if is_token_table(key)), ("", {}))
    pairs = (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A"))
    if not name.endswith("lm_head") or not all(mine in parts and its in of for mine, its in pairs):
        return False
    same = all(np.array_equal(parts[mine].read(), of[its].read().T) for mine, its in pairs)
    return same and rank_and_scale(name, config) == rank_and_scale(table, config)


def _faults(
    name: str, a: Tensor | None, b: Tensor | None, m: Tensor | None, embedding: bool, config: Mapping[str, Any],
    base: Base,
) -> Iterator[str]:  # fmt: skip
    """What is wrong with a module."""
    if a is None or b is None:
        yield f"{name}: half a pair of factors"
        return
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        yield f"{name}: factors {a.shape} and {b.shape}; those of a linear layer are (r, inputs) and (outputs, r)"
        return
    rank = rank_and_scale(name, config)[0]
    if a.shape[0] != rank:
        yield f"{name}: of rank {a.shape[0]}, where {CONFIG} says {rank}"
    yield from _faults_of_place(name, embedding, config, base)
    if bool(config.get("use_dora")) != (m is not None):
        yield f"{name}: {'no' if m is None else 'a'} lora_magnitude_vector, where use_dora is {config.get('use_dora')}"
    elif m is not None and embedding:
        yield f"{name}: DoRA of an embedding; PEFT sets the length of its columns, mlx-lm of its rows"
    elif m is not None and m.shape != b.shape[:1]:
        yield f"{name}: magnitudes {m.shape} for {b.shape[0]} outputs"


def _faults_of_place(name: str, embedding: bool, config: Mapping[str, Any], base: Base) -> Iterator[str]:
    """A module that mlx-lm's model does not have, or has with another function."""
    try:
        to_mlx(name, base.model_type)
    except AdapterError as error:
        yield str(error)
    if past_the_layer(name, base.model_type):
        yield f"{name}: transformers never calls this layer, and the factors did nothing there; in mlx-lm they would"
    layer = layer_of(name)
    if layer is not None and layer >= base.n_layers:
        yield f"{name}: {base.name} has {counted(base.n_layers, 'layer')}"
    if base.tied and name.endswith("lm_head"):
        yield f"{name}: the head of {base.name} is its embedding, which mlx-lm adapts at both ends or not at all"
    if base.tied and is_token_table(name) and not config.get("ensure_weight_tying"):
        yield (
            f"{name}: the embedding of {base.name} is its head, too, and mlx-lm adapts both; train with PEFT's "
            "ensure_weight_tying for that"
        )


# --- one rank, one scale ---


def _assembled(peft: PeftAdapter, base: Base, modules: list[_Module]) -> tuple[Adapter, list[str]]:
    scale, rank = _shared_scale(modules), max(module.rank for module in modules)
    undo: dict[str, Any] = {"config": dict(peft.config), "base": base.name, "scale": scale, "rank": rank}
    factors, weights, lost = {}, {}, []
    for one in modules:
        b, exact = scaled(transposed(one.b), one.scale / scale if scale else 1.0)
        factors[one.name] = padded(transposed(one.a), 1, rank), padded(b, 0, rank)
        if one.m is not None:
            weights[f"{one.name}.m"] = one.m
        if one.rank != rank:
            undo.setdefault("ranks", {})[one.name] = one.rank
        if one.scale != scale:
            undo.setdefault("scales", {})[one.name] = one.scale
        if b.dtype != one.b.dtype:
            undo.setdefault("dtypes", {})[one.name] = one.b.dtype
        if not exact:
            lost.append(one.name)
    num_layers, keys = for_mlx(factors, base.n_layers)
    dropout = float(peft.config.get("lora_dropout") or 0.0)
    config = {
        "fine_tune_type": "dora" if peft.config.get("use_dora") else "lora",
        "model": base.name,
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
    }
    adapter = Adapter(peft.folder, config, factors, weights)
    whole, restored = _with_facts(adapter, peft, base, undo)
    return whole, _said(undo, rank, scale, lost, restored)


def _shared_scale(modules: list[_Module]) -> float:
    """The scale of most modules, the largest of those that are as frequent; 0 only if all are."""
    counts = Counter(module.scale for module in modules if module.scale)
    return max(counts, key=lambda scale: (counts[scale], abs(scale)), default=0.0)


def _with_facts(adapter: Adapter, peft: PeftAdapter, base: Base, undo: Mapping[str, Any]) -> tuple[Adapter, bool]:
    """The adapter with what mlxpref knows of it; with its former config where it is what it was, and then True."""
    former = peft.facts.get("config")
    former = dict(former) if isinstance(former, Mapping) else {}
    ours = dict(former.get("mlxpref") or {})
    there = {"path": base.name, "revision": base.revision}
    moved = base.name != peft.facts.get("base")
    if former and layout(adapter.tensors) == peft.facts.get("layout") and _same_lora(former, adapter):
        changes: dict[str, Any] = {"model": base.name} if moved else {}
        if moved and ours:
            changes["mlxpref"] = _elsewhere(ours, there)
        return Adapter(adapter.folder, {**former, **changes}, adapter.factors, adapter.weights), True
    kept = _elsewhere(ours, there) if moved else {"model": there, **ours}
    facts = {**kept, "peft": dict(undo)}
    return Adapter(adapter.folder, {**adapter.config, "mlxpref": facts}, adapter.factors, adapter.weights), False


def _elsewhere(ours: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of an adapter on a base that the user named: what was known of the weights of another is not its."""
    return {**ours, "model": dict(there), "base_fingerprint": None}


def _same_lora(former: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether a config says of type, rank, scale and dropout what the tensors and PEFT's settings do."""
    lora = former.get("lora_parameters") or {}
    scale, now = lora.get("scale"), adapter.lora["scale"]
    return (
        former.get("fine_tune_type") == adapter.kind
        and lora.get("rank") == adapter.lora["rank"]
        and lora.get("dropout", 0.0) == adapter.lora["dropout"]
        and isinstance(scale, int | float)
        and abs(scale - now) <= 1e-12 * abs(now)  # rank · scale, divided by rank
    )


def _said(undo: Mapping[str, Any], rank: int, scale: float, lost: list[str], restored: bool) -> list[str]:
    said = []
    if "ranks" in undo:
        smaller = sorted(set(undo["ranks"].values()))
        said.append(
            f"{counted(len(undo['ranks']), 'module')} of rank {', '.join(map(str, smaller))} filled up with zeros to "
            f"{rank}, the one rank that mlx-lm has"
        )
    if "scales" in undo:
        others = ", ".join(f"{one:g}" for one in sorted(set(undo["scales"].values())))
        rounded = f"; rounded to float32 in {counted(len(lost), 'module')}" if lost else "; no bit lost"
        said.append(
            f"{counted(len(undo['scales']), 'module')} of scale {others}: the ratio to {scale:g}, the one scale that "
            f"mlx-lm has, is now in lora_b{rounded}"
        )
    if restored:
        said.append("the adapter that was once converted: its own settings and facts are back")
    return said
