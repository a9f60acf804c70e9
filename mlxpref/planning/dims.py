"""What a model is made of, read from its config.json and the headers of its weights: nothing is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpref.errors import ModelError
from mlxpref.files import safetensors_header
from mlxpref.folders import model_config, vocabulary_size

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number."""

_HEADER_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LAYER = re.compile(r"(.*?\.)(\d+)\.(.*)")
_EXPERT = re.compile(r"experts\.\d+\.")
_RECURRENT = re.compile(r"mamba|conv1d|A_log|linear_attn|time_mix")

GROUP = 64
"""Weights that share a scale where a model is quantised while loading."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that multiplies activations.

    Attributes:
        name: within its layer, experts as one; the whole name outside the layers.
        layer: index of its layer, or None.
        inputs, outputs: of one copy.
        copies: experts that have one each, or 1.
        bits: that each number takes in memory, scales included.
    """

    name: str
    layer: int | None
    inputs: int
    outputs: int
    copies: int
    bits: float

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.copies


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes that memory and time depend on.

    Attributes:
        kind: the architecture's ``model_type``.
        hidden, layers, heads, kv_heads, head_dim, inner, vocabulary: as config.json has them; ``inner`` of one expert.
        experts: that compute each token; 1 where there are none.
        norms: norms of the hidden width in a layer, of which two every model has.
        head_norms: queries and keys are normed, too.
        swiglu: the MLP's gate goes through SiLU.
        capped: scores are capped by tanh, which no fused attention does.
        dtype: of activations.
        matrices: every weight of two dimensions.
        vectors: bytes of all other weights.
        tied: the head is the embedding.
        from_header: sizes are those of the weights on this disk; otherwise of what config.json describes.
        rough: why figures of this architecture may be far off, or "".
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    experts: int
    norms: int
    head_norms: bool
    swiglu: bool
    capped: bool
    dtype: str
    matrices: tuple[Matrix, ...]
    vectors: int
    tied: bool
    from_header: bool
    rough: str = ""

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return WIDTHS[self.dtype]

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def n_parameters(self) -> int:
        return sum(matrix.size for matrix in self.matrices)

    @property
    def weights(self) -> int:
        """Bytes of all weights as they lie in memory."""
        return int(sum(matrix.size * matrix.bits / 8 for matrix in self.matrices)) + self.vectors

    @property
    def quantised(self) -> bool:
        return any(matrix.bits < 8 * self.width for matrix in self.matrices)


def read_dims(folder: Path, *, dtype: str | None, load_in_4bit: bool = False) -> Dims:
    """The sizes of the model in a folder.

    Args:
        dtype: of the weights that are not quantised, once loaded; None: the checkpoint's.
        load_in_4bit: quantised while loading.

    Raises:
        ModelError: config.json lacks what a transformer has.
    """
    config = model_config(folder)
    own = dict(config.get("text_config") or config)
    tensors = _tensors(folder)
    stored = _stored_dtype(tensors, own)
    dtype = dtype or stored
    packed = config.get("quantization") or config.get("quantization_config") or {}
    try:
        sizes = _sizes(own)
        shapes = _matrix_shapes(tensors, packed) if tensors else _described(own, sizes)
    except KeyError as error:
        raise ModelError(f"{folder}: config.json has no {error.args[0]}: no sizes to plan with") from error
    tied = bool(own.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    copies_of: Counter[tuple[int | None, str, int, int, float]] = Counter()
    for layer, name, inputs, outputs, copies, bits in shapes:
        if not (tied and layer is None and name.endswith("lm_head.weight")):
            size = _bits(inputs, bits, WIDTHS[dtype], load_in_4bit)
            copies_of[layer, _EXPERT.sub("experts.", name), inputs, outputs, size] += copies
    matrices = tuple(
        Matrix(name.removesuffix(".weight"), layer, inputs, outputs, copies, bits)
        for (layer, name, inputs, outputs, bits), copies in copies_of.items()
    )
    norms = _norms(tensors)
    return Dims(
        kind=str(own.get("model_type", "unknown")),
        **sizes,
        vocabulary=vocabulary_size(config),
        experts=int(own.get("num_experts_per_tok") or 1),
        norms=norms,
        head_norms=any("q_norm" in name for name in tensors) or own.get("model_type") in ("qwen3", "qwen3_moe"),
        swiglu=own.get("hidden_act", "silu") in ("silu", "swish"),
        capped=bool(own.get("attn_logit_softcapping")),
        dtype=dtype,
        matrices=matrices,
        vectors=sum(math.prod(t["shape"]) * WIDTHS[dtype] for t in tensors.values() if len(t["shape"]) == 1),
        tied=tied,
        from_header=bool(tensors),
        rough=_roughness(own, tensors),
    )


def _tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → header entry of every tensor on this disk; ModelError for a file that is damaged."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            found |= safetensors_header(file)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: the file is damaged or cut off ({error}); fetch it again") from error
    return found


def _stored_dtype(tensors: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """The type that most numbers of the checkpoint have."""
    kinds: Counter[str] = Counter()
    for entry in tensors.values():
        if entry["dtype"] in _DTYPES:
            kinds[_DTYPES[entry["dtype"]]] += math.prod(entry["shape"])
    if kinds:
        return kinds.most_common(1)[0][0]
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return named if named in WIDTHS else "bfloat16"


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """KeyError names what is missing."""

    def first(*names: str) -> int:
        for name in names:
            if config.get(name) is not None:
                return int(config[name])
        raise KeyError(names[0])

    hidden, heads = first("hidden_size", "n_embd", "dim"), first("num_attention_heads", "n_head", "n_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size") or config.get("n_inner")
    return {
        "hidden": hidden,
        "layers": first("num_hidden_layers", "n_layer", "n_layers"),
        "heads": heads,
        "kv_heads": int(kv_heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "inner": int(inner or 4 * hidden),
    }


Found = tuple[int | None, str, int, int, int, float | None]
"""Layer, name, inputs, outputs, copies, bits where the checkpoint packs them."""


def _matrix_shapes(tensors: Mapping[str, Mapping[str, Any]], packed: Mapping[str, Any]) -> Iterator[Found]:
    """Weights of two dimensions (of three: a stack of experts)."""
    bits, group = int(packed.get("bits", 4)), int(packed.get("group_size", GROUP))
    stacks = Counter(found[1] for name in tensors if (found := _LAYER.match(name)))
    stack = max(stacks, key=lambda name: stacks[name], default=None)
    for name, entry in tensors.items():
        shape = entry["shape"]
        if not name.endswith(".weight") or len(shape) not in (2, 3) or 1 in shape[-2:]:
            continue
        found = _LAYER.match(name)
        inside = found is not None and found[1] == stack
        layer, short = (int(found[2]), found[3]) if found is not None and inside else (None, name)
        outputs, inputs, copies = shape[-2], shape[-1], math.prod(shape[:-2])
        scales = tensors.get(name.removesuffix("weight") + "scales")
        if scales is None:
            yield layer, short, inputs, outputs, copies, None
        else:
            whole = scales["shape"][-1] * group
            width = _HEADER_TYPES.get(scales["dtype"], 2)
            yield layer, short, whole, outputs, copies, bits + 16 * width / group


def _described(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[Found]:
    """The matrices of a transformer with these sizes, where there are no files to read them from."""
    hidden, inner, vocabulary = sizes["hidden"], sizes["inner"], int(config["vocab_size"])
    queries, keys = sizes["heads"] * sizes["head_dim"], sizes["kv_heads"] * sizes["head_dim"]
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    of_layer = [
        ("self_attn.q_proj.weight", hidden, queries, 1), ("self_attn.k_proj.weight", hidden, keys, 1),
        ("self_attn.v_proj.weight", hidden, keys, 1), ("self_attn.o_proj.weight", queries, hidden, 1),
        ("mlp.gate_proj.weight", hidden, inner, experts), ("mlp.up_proj.weight", hidden, inner, experts),
        ("mlp.down_proj.weight", inner, hidden, experts),
    ]  # fmt: skip
    if experts > 1:
        of_layer.append(("mlp.gate.weight", hidden, experts, 1))
    for layer in range(sizes["layers"]):
        yield from ((layer, name, inputs, outputs, copies, None) for name, inputs, outputs, copies in of_layer)
    yield None, "model.embed_tokens.weight", hidden, vocabulary, 1, None
    yield None, "lm_head.weight", hidden, vocabulary, 1, None


def _bits(inputs: int, packed: float | None, width: int, load_in_4bit: bool) -> float:
    if packed is not None:
        return packed
    return 4 + 16 * width / GROUP if load_in_4bit and inputs % GROUP == 0 else 8 * width


def _norms(tensors: Mapping[str, Mapping[str, Any]]) -> int:
    """Norms of the hidden width in a layer."""
    of_first = (_LAYER.match(name) for name in tensors)
    names = {found[3] for found in of_first if found and found[2] == "0"}
    return max(2, sum("norm" in name and name.endswith("weight") and "_norm." not in name for name in names))


def _roughness(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    if any(_RECURRENT.search(name) for name in tensors):
        return "layers with a recurrent state are counted as if they were attention"
    if (config.get("num_local_experts") or config.get("num_experts") or 1) > 1:
        return "what layers of experts keep is not measured as closely as the rest"
    return ""
