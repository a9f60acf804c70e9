"""A module's path in mlx-lm's models and in those of transformers 5: the same for most, prefixes for the rest.

Both load the same checkpoints, but neither keeps all the names that stand in them. Layers of experts have no
counterpart: mlx-lm stacks each matrix of theirs, transformers fuses two of them into a parameter without a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxpref.errors import AdapterError

_Pairs = Sequence[tuple[str, str]]

_VISION = (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"))

_PREFIXES: Mapping[str, _Pairs] = {
    "gpt2": (("model.", "transformer."),),
    "gptj": (("model.", "transformer."),),
    "gpt_neox": (("model.h.", "gpt_neox.layers."), ("model.embed_out", "lm_head"), ("model.", "gpt_neox.")),
    "gemma3": _VISION,
    "gemma4": _VISION,
    "nemotron_h": (("backbone.", "model."),),
    "qwen3_5": (("language_model.model.", "model."), ("language_model.lm_head", "lm_head")),
    "qwen3_5_moe": (("language_model.model.", "model."), ("language_model.lm_head", "lm_head")),
}
"""Model type → (mlx-lm's, transformers') beginnings of paths; the first that fits counts."""

_PARTS: Mapping[str, _Pairs] = {
    "mixtral": ((".block_sparse_moe", ".mlp"),),
    "phimoe": ((".block_sparse_moe.gate", ".mlp.router"), (".block_sparse_moe", ".mlp")),
    "granitemoe": ((".block_sparse_moe.router.layer", ".block_sparse_moe.router"),),
}
"""Model type → (mlx-lm's, transformers') parts inside paths; the first that is there counts."""

_ROUTERS: Mapping[str, str] = {
    "mixtral": ".block_sparse_moe.gate",
    "phimoe": ".block_sparse_moe.gate",
    "granitemoe": ".block_sparse_moe.router.layer",
    "gpt_oss": ".mlp.router",
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe"), ".mlp.gate"),
}
"""Model type → how mlx-lm's paths of routers end; transformers has no linear layer there."""

_TABLES = frozenset(("embed_tokens", "embed_in", "embeddings", "wte"))
_OTHER_TABLES = frozenset(("embed_tokens_per_layer", "wpe"))


def to_torch(module: str, model_type: str) -> str:
    """The path in transformers' model of a module of mlx-lm's.

    Args:
        module: such as ``model.layers.3.self_attn.q_proj``; a tensor's name behind it is kept.
        model_type: the key of the model's ``config.json``.

    Raises:
        AdapterError: a stack of experts, or the router before it, for which transformers has no linear layer.
    """
    router = _ROUTERS.get(model_type)
    if ".switch_" in module or (router is not None and f"{module}.".find(f"{router}.") >= 0):
        what = "stack of experts" if ".switch_" in module else "router"
        raise AdapterError(
            f"{module}: transformers keeps a {what} as parameters, not as a linear layer; adapt other modules "
            "(lora_parameters.keys names them)"
        )
    return _renamed(module, model_type, 0, 1)


def to_mlx(module: str, model_type: str) -> str:
    """The path in mlx-lm's model of a module of transformers': the inverse of :func:`to_torch`.

    Raises:
        AdapterError: a module of experts, which mlx-lm has as a stack.
    """
    if ".experts." in f"{module}.":
        raise AdapterError(f"{module}: mlx-lm stacks its experts, and has no such module; adapt other modules")
    return _renamed(module, model_type, 1, 0)


def is_embedding(module: str) -> bool:
    """Whether a path of either library ends in the name of a table of embeddings."""
    return module.rpartition(".")[2] in _TABLES | _OTHER_TABLES


def is_token_table(module: str) -> bool:
    """Whether it is the embedding of the tokens, which may be the head, too."""
    return module.rpartition(".")[2] in _TABLES


def _renamed(module: str, model_type: str, old: int, new: int) -> str:
    for pair in _PREFIXES.get(model_type, ()):
        if module.startswith(pair[old]):
            return pair[new] + module[len(pair[old]) :]
    for pair in _PARTS.get(model_type, ()):
        if f"{pair[old]}." in f"{module}.":
            return f"{module}.".replace(f"{pair[old]}.", f"{pair[new]}.", 1)[:-1]
    return module
