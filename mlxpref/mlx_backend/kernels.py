"""Which of MLX's functions a forward pass uses, and which of ours in their place.

Model classes stay untouched: they call ``mx.fast.scaled_dot_product_attention``, mlx-lm's ``swiglu`` and linear layers,
and while a pass is traced these names mean functions of the same value that keep less for the gradient and cost less.
Afterwards they are what they were.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.tuner.lora import LoRALinear

from mlxpref import blas
from mlxpref.mlx_backend import attention, dequantised, elementwise, lowrank, transposed
from mlxpref.mlx_backend.elementwise import on_cpu

LARGE_SCORES = 64_000_000
"""Bytes of scores above which attention goes block by block on a GPU, too."""

_attention = mx.fast.scaled_dot_product_attention


class Sites(NamedTuple):
    """Where a model uses what can be replaced.

    Attributes:
        groups: LoRA layers that share an input.
        gated: Python modules that define parts of the model and call mlx-lm's ``swiglu``.
    """

    groups: lowrank.Groups
    gated: tuple[ModuleType, ...]


def sites_of(model: nn.Module) -> Sites:
    defining = {type(module).__module__ for module in model.modules()}
    found = (sys.modules[name] for name in sorted(defining))
    gated = tuple(module for module in found if getattr(module, "swiglu", None) is activations.swiglu)
    return Sites(lowrank.groups_of(model), gated)


@contextmanager
def in_place(sites: Sites, *, differentiate: bool) -> Iterator[None]:
    """Within this context what is traced uses the functions below; it may stand inside itself.

    Args:
        differentiate: whether a gradient is taken; without one a GPU's fused attention is the best there is.
    """
    low_rank = lowrank.LowRank(sites.groups)
    with ExitStack() as stack:

        def put(owner: Any, name: str, function: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, function)

        put(LoRALinear, "__call__", lambda module, x: low_rank(module, x))
        for module in sites.gated:
            put(module, "swiglu", elementwise.swiglu)
        if differentiate or on_cpu():
            put(mx.fast, "scaled_dot_product_attention", _attend)
        if on_cpu():
            put(nn.QuantizedLinear, "__call__", dequantised.linear)
            if blas.preload().reference:
                put(nn.Linear, "__call__", transposed.linear)
        yield


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
) -> mx.array:
    array = mask if isinstance(mask, mx.array) else None
    known = sinks is None and _known(mask, queries)
    faster = queries.dtype == mx.float32 if on_cpu() else _unfused(queries, array) and _large(queries, keys, array)
    if not (known and faster):
        return _attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return attention.causal_attention(queries, keys, values, scale=scale, mask=array)


def _known(mask: Any, queries: mx.array) -> bool:
    """Whether ``causal_attention`` knows this mask; one that is added to the scores may have a gradient."""
    if mask is None:
        return queries.shape[2] == 1
    return mask == "causal" if isinstance(mask, str) else mask.dtype == mx.bool_


def _unfused(queries: mx.array, mask: mx.array | None) -> bool:
    """Whether a GPU has no fused gradient for this: CUDA has one in half width with a causal mask."""
    return mx.metal.is_available() or queries.dtype == mx.float32 or mask is not None


def _large(queries: mx.array, keys: mx.array, mask: mx.array | None) -> bool:
    return queries.itemsize * attention.n_scores(queries, keys, mask) > LARGE_SCORES
