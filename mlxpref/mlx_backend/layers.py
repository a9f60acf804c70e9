"""A model's layers, some of them left out of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def layers_of(body: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name and the list of a body's layers. ValueError if it has none."""
    for name in ("layers", "h", "blocks"):
        if name in body and isinstance(body[name], list):
            return name, body[name]
    raise ValueError("no list of layers in the model")


class _Stub:
    """Stands in a layer's place; whatever else is asked of it, the layer answers."""

    def __init__(self, layer: nn.Module):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Alone(_Stub):
    """The layer, provided that it hands on hidden rows and nothing beside them."""

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        output = self._layer(hidden, *args, **kwargs)
        if not isinstance(output, mx.array):
            raise TypeError(f"its layers hand on a {type(output).__name__}, not hidden rows alone")
        return output


class _Pass(_Stub):
    """Gives its input on, or ``instead``."""

    def __init__(self, layer: nn.Module, instead: mx.array | None = None):
        super().__init__(layer)
        self._instead = instead

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return hidden if self._instead is None else self._instead


class _Catch(_Stub):
    """Keeps what it is given, and gives it on."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.caught: mx.array | None = None

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.caught = hidden
        return hidden


@contextmanager
def started_from(body: nn.Module, first: int, hidden: mx.array | None) -> Iterator[None]:
    """Within this context the body's layers below ``first`` are left out: layer ``first`` gets ``hidden``.

    Args:
        hidden: (R, T, D), what those layers make of the tokens; None changes nothing.
    """
    if hidden is None:
        yield
        return
    name, layers = layers_of(body)
    body[name] = [_Pass(layers[0], hidden), *map(_Pass, layers[1:first]), *layers[first:]]
    try:
        yield
    finally:
        body[name] = layers


@contextmanager
def caught(body: nn.Module, first: int) -> Iterator[_Catch]:
    """Within this context no layer from ``first`` on is computed; what it would get is caught."""
    name, layers = layers_of(body)
    catch = _Catch(layers[first])
    body[name] = [*map(_Alone, layers[:first]), catch, *map(_Pass, layers[first + 1 :])]
    try:
        yield catch
    finally:
        body[name] = layers
