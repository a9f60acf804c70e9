"""Gradient checkpointing that stays right with a shared prompt.

``mx.checkpoint`` gives gradients to the arguments of the function it wraps and none to what that
function captures. A layer reads its trainable parameters and the served prompt from the outside, so
all of them are made explicit arguments here, and what the layer records is made an explicit result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpref.mlx_backend.layers import layers_of


class _Layer:
    """A layer that keeps its inputs and computes its insides again in the backward pass."""

    def __init__(self, layer: nn.Module, kernels: Callable[[], AbstractContextManager[None]]):
        self._layer = layer
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> Any:
        position, cache = _find_cache(args, kwargs)
        layer = self._layer

        drawn, after = mx.random.split(mx.random.state[0])

        def run(parameters: dict[str, Any], hidden: mx.array, given: list[mx.array]) -> Any:
            # Again in the backward pass: the same dropout has to be drawn there.
            mx.random.state[0][:] = drawn
            layer.update(parameters)
            inner = None if cache is None else cache.with_given(given)
            replaced = (inner if i == position else value for i, value in enumerate(args))
            named = {name: inner if name == position else value for name, value in kwargs.items()}
            with self._kernels():  # the backward pass traces this anew, when those around the whole pass have gone
                output = layer(hidden, *replaced, **named)
            return output, [] if inner is None else inner.arrays()

        parameters = layer.trainable_parameters()
        output, written = mx.checkpoint(run)(parameters, hidden, [] if cache is None else cache.given())
        mx.random.state[0][:] = after
        layer.update(parameters)
        if cache is not None:
            cache.keep(written)
        return output


def _find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str | None, Any]:
    """Where among the arguments a prefix cache of ours stands, and the cache."""
    for position, value in [*enumerate(args), *kwargs.items()]:
        if hasattr(value, "serving"):
            return position, value
    return None, None


@contextmanager
def checkpointed_layers(
    body: nn.Module, first: int, kernels: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Within this context, layers from index ``first`` on are checkpointed.

    Layers below train nothing and receive no gradient: they have nothing to recompute.

    Args:
        kernels: a fresh context in which a layer is traced.
    """
    name, layers = layers_of(body)
    body[name] = [_Layer(layer, kernels) if i >= first else layer for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        body[name] = layers
