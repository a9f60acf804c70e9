"""A model's matrices by its files alone: how many, how wide, and how many a token meets.

Of the architectures in :data:`KNOWN` the ``config.json`` says it; of any other the shapes in the headers of its
safetensors files do. No weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.errors import ModelError
from mlxpref.files import safetensors_header


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear module of a layer, or all experts of one kind.

    Attributes:
        name: within the layer, as mlx-lm has it: ``self_attn.q_proj``.
        inputs, outputs: its widths.
        experts: how many there are of it.
        active: how many of these a token meets.
    """

    name: str
    inputs: int
    outputs: int
    experts: int = 1
    active: float = 1.0

    @property
    def reads_layer_input(self) -> bool:
        """Whether nothing of its layer comes before it: queries, keys and values."""
        return bool(_FIRST.search(self.name))

    @property
    def feeds_later_tokens(self) -> bool:
        """Whether later tokens of the same layer read what it makes: keys and values, and what is neither one of
        queries, of their output, nor of a feed-forward part."""
        return not _OWN_TOKEN.search(self.name)


_FIRST = re.compile(r"(?:^|[._])(?:q|k|v|qkv)_proj$|query_key_value$|c_attn$|Wqkv$|(?:^|\.)in_proj\w*$")
_OWN_TOKEN = re.compile(
    r"(?:^|[._])(?:q|o|out|dense|c)_proj$|attention\.dense$|mlp|ffn|feed_forward|moe|expert|gate_proj|up_proj|down_proj"
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Attributes:
        matrices: its linear modules.
        heads: of queries; 0 where the layer does not attend.
        head_dim: width of a head.
        window: tokens that a token attends to at most; None for all before it.
    """

    matrices: tuple[Matrix, ...]
    heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Dims:
    """What a forward pass multiplies.

    Attributes:
        layers: from the first.
        hidden: D, width of what the head reads.
        vocabulary: V.
        source: "config" or "weights": which of the files said it.
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    source: str = "config"


def read_dims(folder: Path) -> Dims:
    """The dimensions of the model in a folder.

    Raises:
        ModelError: no config.json, or an architecture that neither it nor the weights' names explain.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no config.json that can be read ({error}); name a model folder") from error
    inner = config.get("text_config") or config
    kind = str(inner.get("model_type", config.get("model_type")))
    if kind in KNOWN:
        try:
            return from_config(inner, kind)
        except KeyError as error:
            raise ModelError(f"{folder / 'config.json'}: no key {error} in it, as {kind} needs") from error
    return _from_weights(folder, config, inner)


# --- from config.json ---

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe")
"""Values of ``model_type`` whose layers the config describes whole."""


def from_config(config: Mapping[str, Any], kind: str) -> Dims:
    """The dimensions of one of :data:`KNOWN`. KeyError for a config that lacks one."""
    layers = tuple(
        Layer(
            (*_attention(config, kind), *_feed_forward(config, kind, index)),
            config["num_attention_heads"], _head_dim(config), _window(config, index),
        )
        for index in range(config["num_hidden_layers"])
    )  # fmt: skip
    return Dims(layers, config["hidden_size"], config["vocab_size"])


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _window(config: Mapping[str, Any], index: int) -> int | None:
    """Of a model whose layers take turns; a window over all layers alike is longer than any row, as a rule."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    pattern = config.get("sliding_window_pattern")
    if not window or not (kinds or pattern):
        return None
    sliding = kinds[index] == "sliding_attention" if kinds else (index + 1) % int(pattern or 1) != 0
    return int(window) if sliding else None


def _attention(config: Mapping[str, Any], kind: str) -> Iterator[Matrix]:
    hidden, width = config["hidden_size"], _head_dim(config)
    queries = config["num_attention_heads"] * width
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * width
    if kind == "phi3":
        yield Matrix("self_attn.qkv_proj", hidden, queries + 2 * keys)
    else:
        yield Matrix("self_attn.q_proj", hidden, queries)
        yield Matrix("self_attn.k_proj", hidden, keys)
        yield Matrix("self_attn.v_proj", hidden, keys)
    yield Matrix("self_attn.o_proj", queries, hidden)


def _feed_forward(config: Mapping[str, Any], kind: str, index: int) -> Iterator[Matrix]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if kind == "phi3":
        yield Matrix("mlp.gate_up_proj", hidden, 2 * inner)
        yield Matrix("mlp.down_proj", inner, hidden)
        return
    at, experts, active = "mlp.", 1, 1
    if kind == "mixtral":
        at, experts, active = "block_sparse_moe.", config["num_local_experts"], config["num_experts_per_tok"]
    elif kind == "qwen3_moe" and _is_sparse(config, index):
        inner, experts, active = config["moe_intermediate_size"], config["num_experts"], config["num_experts_per_tok"]
    if experts > 1:
        yield Matrix(at + "gate", hidden, experts)
        at += "switch_mlp."
    yield Matrix(at + "gate_proj", hidden, inner, experts, active)
    yield Matrix(at + "up_proj", hidden, inner, experts, active)
    yield Matrix(at + "down_proj", inner, hidden, experts, active)


def _is_sparse(config: Mapping[str, Any], index: int) -> bool:
    often = config.get("decoder_sparse_step", 1)
    return index not in config.get("mlp_only_layers", ()) and config["num_experts"] > 0 and (index + 1) % often == 0


# --- from the shapes of the weights ---

_IN_LAYER = re.compile(r"^(?P<stack>.*?(?:layers|h|blocks))\.(?P<index>\d+)\.(?P<module>.+)\.weight$")
_EXPERT = re.compile(r"experts\.\d+\.")
_ATTENTION = re.compile(r"(?<!linear_)attn|attention")


def _from_weights(folder: Path, config: Mapping[str, Any], inner: Mapping[str, Any]) -> Dims:
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            shapes |= {name: list(entry["shape"]) for name, entry in safetensors_header(file).items()}
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); fetch it again") from error
    found: dict[int, dict[str, Matrix]] = {}
    for name, matrix in _matrices(shapes, config, inner):
        place = _IN_LAYER.match(name)
        assert place is not None
        of_layer = found.setdefault(int(place["index"]), {})
        known = of_layer.get(matrix.name)
        n_experts = matrix.experts + (known.experts if known and _EXPERT.search(name) else 0)
        of_layer[matrix.name] = Matrix(matrix.name, matrix.inputs, matrix.outputs, n_experts)
    hidden, vocabulary = (inner.get(key) for key in ("hidden_size", "vocab_size"))
    if not found or not hidden or not vocabulary:
        raise ModelError(
            f"{folder}: neither config.json ({config.get('model_type')}) nor the names of its weights say how wide its "
            "layers are"
        )
    heads = int(inner.get("num_attention_heads") or 0)
    head_dim = int(inner.get("head_dim") or (hidden // heads if heads else 0))
    active = float(inner.get("num_experts_per_tok") or 1)
    layers = []
    for index in sorted(found):
        matrices = tuple(_met(matrix, active) for matrix in found[index].values())
        attends = any(_ATTENTION.search(matrix.name) for matrix in matrices)
        layers.append(Layer(matrices, heads if attends else 0, head_dim, _window(inner, index)))
    return Dims(tuple(layers), int(hidden), int(vocabulary), source="weights")


def _met(matrix: Matrix, active: float) -> Matrix:
    """The experts that a token meets of it."""
    n = min(active, matrix.experts) if matrix.experts > 1 else 1.0
    return Matrix(matrix.name, matrix.inputs, matrix.outputs, matrix.experts, n)


def _matrices(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], inner: Mapping[str, Any]
) -> Iterator[tuple[str, Matrix]]:
    """Every matrix in a layer of the language model, by its weight's name; experts one by one, or stacked."""
    for name, shape in shapes.items():
        place = _IN_LAYER.match(name)
        if place is None or "vision" in name or len(shape) not in (2, 3):
            continue
        stacked = len(shape) == 3
        if stacked and not re.search(r"expert|switch", name):
            continue  # a short convolution: no matrix
        module = _EXPERT.sub("experts.", place["module"])
        outputs, inputs = shape[-2], shape[-1]
        scales = shapes.get(name.removesuffix("weight") + "scales")
        if scales is not None:
            bits = config.get("quantization", {}).get("bits", 4)
            inputs = inputs * 32 // int(bits)
        yield name, Matrix(module, inputs, outputs, shape[0] if stacked else 1)
