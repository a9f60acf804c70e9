"""Cache objects that compute a prompt once and serve it to every response.

mlx-lm's models read and write keys and values (or recurrent state) through the ``cache`` they are
handed. The objects here record what the pass over the prompts writes, and in the pass over the
responses serve it again, gathered by prompt. Both are plain array operations: differentiable, exact,
and traced once by ``mx.compile``. Model classes stay untouched.

All prompts of a micro-batch have the same length and no padding, so the offset is one Python
integer, masks are the models' own causal ones, and recurrent states are those after the last token.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.cache import create_attention_mask, create_causal_mask

from mlxpref.errors import ModelError


class PrefixKV:
    """Keys and values of one attention layer, optionally within a sliding window.

    Args:
        window: width of the layer's sliding window in tokens, or None.
        served: ``(keys, values)``, each (R, heads, P, dim), that come before what is written.
        offset: P, the number of served positions.
    """

    def __init__(self, window: int | None = None, served: list[mx.array] | None = None, offset: int = 0):
        self.window = window
        self.offset = offset
        self.served = served
        self.written: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.served is None:
            self.written = [keys, values]
            return keys, values
        before_keys, before_values = self.served
        self.written = [
            mx.concatenate([before_keys, keys], axis=2),
            mx.concatenate([before_values, values], axis=2),
        ]
        return self.written[0], self.written[1]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What was last fetched, for layers that share another layer's keys and values."""
        return self.written[0], self.written[1]

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        return self.keys_and_values()

    def empty(self) -> bool:
        return self.served is None and not self.written

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if self.window is None:
            return create_attention_mask(N, self.offset, return_array, window_size)
        window = window_size or self.window
        if self.offset + N > window or return_array:
            return create_causal_mask(N, self.offset, window_size=window)
        return create_attention_mask(N, self.offset, return_array, None)

    size = 2

    def arrays(self) -> list[mx.array]:
        """What the pass over the prompts left here."""
        return self.written

    def serving(self, arrays: list[mx.array], offset: int) -> PrefixKV:
        """A new cache that serves ``arrays`` as its first ``offset`` positions."""
        return PrefixKV(self.window, arrays or None, offset if arrays else 0)

    def left_out(self, offset: int) -> PrefixKV:
        """Of a layer that is not computed: nothing to serve, yet masks that are made of it are those of all layers."""
        return PrefixKV(self.window, None, offset)

    # A checkpointed layer takes the served arrays as explicit arguments and returns what it wrote.

    def given(self) -> list[mx.array]:
        return list(self.served or ())

    def with_given(self, arrays: list[mx.array]) -> PrefixKV:
        return PrefixKV(self.window, arrays or None, self.offset)

    def keep(self, arrays: list[mx.array]) -> None:
        self.written = list(arrays)


class PrefixState(mlx_cache.ArraysCache):
    """Recurrent state (convolution windows, state-space or delta-rule memory) of one layer."""

    def __init__(self, size: int, served: list[mx.array] | None = None):
        super().__init__(size)
        self.size = size
        if served:
            self.cache = list(served)

    def arrays(self) -> list[mx.array]:
        return [array for array in self.cache if array is not None]

    def serving(self, arrays: list[mx.array], offset: int) -> PrefixState:
        return PrefixState(self.size, arrays)

    def left_out(self, offset: int) -> PrefixState:
        return PrefixState(self.size)

    given = arrays

    def with_given(self, arrays: list[mx.array]) -> PrefixState:
        return PrefixState(self.size, arrays)

    def keep(self, arrays: list[mx.array]) -> None:
        self.cache = list(arrays)


class PrefixList(mlx_cache.CacheList):
    """Several of the above in one layer (hybrids that attend and recur side by side)."""

    @property
    def size(self) -> int:
        return sum(cache.size for cache in self.caches)

    def _shared_out(self, arrays: list[mx.array]) -> list[tuple[Any, list[mx.array]]]:
        """Each inner cache with its own arrays."""
        shares, start = [], 0
        for cache in self.caches:
            count = cache.size if arrays else 0
            shares.append((cache, arrays[start : start + count]))
            start += count
        return shares

    def arrays(self) -> list[mx.array]:
        return [array for cache in self.caches for array in cache.arrays()]

    def serving(self, arrays: list[mx.array], offset: int) -> PrefixList:
        return PrefixList(*(cache.serving(share, offset) for cache, share in self._shared_out(arrays)))

    def left_out(self, offset: int) -> PrefixList:
        return PrefixList(*(cache.left_out(offset) for cache in self.caches))

    def given(self) -> list[mx.array]:
        return [array for cache in self.caches for array in cache.given()]

    def with_given(self, arrays: list[mx.array]) -> PrefixList:
        return PrefixList(*(cache.with_given(share) for cache, share in self._shared_out(arrays)))

    def keep(self, arrays: list[mx.array]) -> None:
        for cache, share in self._shared_out(arrays):
            cache.keep(share)


def recording(model: Any) -> list[Any]:
    """Fresh caches that record a pass over the prompts, one per entry of the model's own cache.

    Raises:
        ModelError: the model uses a kind of cache that cannot be shared exactly.
    """
    return [_record(cache) for cache in mlx_cache.make_prompt_cache(model)]


def _record(cache: Any) -> Any:
    kind = type(cache)
    if cache is None:
        return None
    if kind in (mlx_cache.KVCache, mlx_cache.ConcatenateKVCache):
        return PrefixKV()
    if kind is mlx_cache.RotatingKVCache and cache.keep == 0:
        return PrefixKV(window=cache.max_size)
    if kind is mlx_cache.ArraysCache:
        return PrefixState(len(cache.cache))
    if kind is mlx_cache.CacheList:
        return PrefixList(*(_record(inner) for inner in cache.caches))
    raise ModelError(f"prompts cannot be shared through a {kind.__name__}")


def serving(recorded: list[Any], prompt: mx.array, offset: int, *, left_out: int = 0) -> list[Any]:
    """Caches that serve what was recorded to response rows.

    Args:
        recorded: caches after the pass over prompts (B, P).
        prompt: (R,) int32, the prompt each response row continues.
        offset: P.
        left_out: of so many layers, the first, nothing was recorded.
    """
    passed = [None if cache is None else cache.left_out(offset) for cache in recorded[:left_out]]
    return passed + [_serve(cache, prompt, offset) for cache in recorded[left_out:]]


def _serve(cache: Any, prompt: mx.array, offset: int) -> Any:
    if cache is None:
        return None
    return cache.serving([mx.take(array, prompt, axis=0) for array in cache.arrays()], offset)
