"""Causal attention for training, block after block: what lies above the diagonal is never computed.

``mx.fast.scaled_dot_product_attention`` has no fused gradient on the CPU and on Metal: it makes, and keeps for the
backward pass, an array of heads x queries x keys, half of which the causal mask throws away. Here a block of
queries meets only the keys it may see. Short rows keep their exponentials for the backward pass; long ones make
them again from the row's normaliser, so that memory grows with length and not with its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlxpref.mlx_backend.elementwise import exp_nonpositive, row_sums

BLOCK = 128
"""Queries of one block."""

KEPT_BYTES = 64_000_000
"""Exponentials of one call that are kept for its backward pass; more are made again."""

_UNSEEN = -1e30  # a score that does not count


class _Tile(NamedTuple):
    """Keys [start, stop) that a block of queries meets; ``diagonal``: each query one fewer than the next."""

    start: int
    stop: int
    diagonal: bool


class _Block(NamedTuple):
    """Queries [start, stop) and the tiles of keys they meet."""

    start: int
    stop: int
    tiles: tuple[_Tile, ...]


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | None = None
) -> mx.array:
    """Softmax attention, differentiable once; sums in float32 whatever the dtype.

    Args:
        queries: (R, H, T, D).
        keys: (R, G, P + T, D), G dividing H.
        values: (R, G, P + T, E).
        scale: of the scores.
        mask: None: the last query sees all keys, each before it one fewer. Or (…, T, P + T) boolean, True where a
            query sees a key; broadcast over rows and heads.

    Returns:
        (R, H, T, E).
    """
    groups, masks = keys.shape[1], () if mask is None else (mask,)
    blocks = _blocks(queries.shape[2], keys.shape[2], mask is not None)
    kept = queries.itemsize * n_scores(queries, keys, mask) <= KEPT_BYTES

    @mx.custom_function
    def run(queries: mx.array, keys: mx.array, values: mx.array, *mask: mx.array) -> list[mx.array]:
        found: list[mx.array] = []
        held: list[mx.array] = []
        for block in blocks:
            q = _after(_grouped(queries, block, groups) * scale, found[-1:])
            scores = [_scores(q, keys, block, tile, *mask) for tile in block.tiles]
            shift = _largest(scores)
            parts = [exp_nonpositive(one - shift) for one in scores]
            total = sum(row_sums(part) for part in parts)
            parts = [part.astype(values.dtype) for part in parts]
            seen = [values[:, :, tile.start : tile.stop] for tile in block.tiles]
            out = sum(part @ value for part, value in zip(parts, seen, strict=True))
            found.append(_by_head((out / total).astype(queries.dtype), queries.shape[1]))
            held += [total, *parts] if kept else [shift + mx.log(total)]
        return [mx.concatenate(found, axis=2), *held]

    @run.vjp
    def run_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        queries, keys, values, *mask = primals
        held, sums = list(outputs[1:]), _Sums()
        query_slopes: list[mx.array] = []
        for block in blocks:
            # The first block waits, too: mx.compile would merge its scores with the forward pass's, and keep those.
            before = [*query_slopes[-1:], *sums.found] or [cotangents[0]]
            q = _after(_grouped(queries, block, groups) * scale, before)
            slope = _grouped(cotangents[0], block, groups)
            inner = _dots(slope, _grouped(outputs[0], block, groups))
            if kept:
                total, *parts = (held.pop(0) for _ in range(1 + len(block.tiles)))
                slope, inner = (slope / total).astype(slope.dtype), inner / total
            else:
                normaliser = held.pop(0)
                parts = [exp_nonpositive(_scores(q, keys, block, tile, *mask) - normaliser) for tile in block.tiles]
                parts = [part.astype(values.dtype) for part in parts]
            of_query = []
            for part, tile in zip(parts, block.tiles, strict=True):
                seen = slice(tile.start, tile.stop)
                of_scores = (part * (slope @ values[:, :, seen].swapaxes(-1, -2) - inner)).astype(keys.dtype)
                of_query.append(of_scores @ keys[:, :, seen])
                sums.add(tile, of_scores.swapaxes(-1, -2) @ q, part.swapaxes(-1, -2) @ slope)
            query_slopes.append(_by_head(sum(of_query) * scale, queries.shape[1]))
        of_keys, of_values = (one.astype(keys.dtype) for one in sums.found)
        return mx.concatenate(query_slopes, axis=2), of_keys, of_values, *(mx.zeros_like(one) for one in mask)

    return run(queries, keys, values, *masks)[0]


def n_scores(queries: mx.array, keys: mx.array, mask: mx.array | None) -> int:
    """Scores that attention of these shapes computes."""
    rows, heads, length, _ = queries.shape
    blocks = _blocks(length, keys.shape[2], mask is not None)
    return rows * heads * sum((block.stop - block.start) * block.tiles[-1].stop for block in blocks)


def _blocks(length: int, n_keys: int, masked: bool) -> list[_Block]:
    past, found = n_keys - length, []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        before = past + start
        tiles = [_Tile(0, before, False)] if before else []
        tiles.append(_Tile(before, past + stop, True))
        found.append(_Block(start, stop, (_Tile(0, n_keys, False),) if masked else tuple(tiles)))
    return found


def _grouped(x: mx.array, block: _Block, groups: int) -> mx.array:
    """(R, H, T, D) → (R, G, H/G·b, D): queries of a block, heads that share keys side by side."""
    rows, heads, _, width = x.shape
    return x[:, :, block.start : block.stop].reshape(rows, groups, heads // groups * (block.stop - block.start), width)


def _by_head(x: mx.array, heads: int) -> mx.array:
    """(R, G, H/G·b, D) → (R, H, b, D)."""
    rows, groups, length, width = x.shape
    return x.reshape(rows, heads, length * groups // heads, width)


def _scores(q: mx.array, keys: mx.array, block: _Block, tile: _Tile, mask: mx.array | None = None) -> mx.array:
    """(R, G, H/G·b, keys of the tile) float32; what is not seen is far below every score."""
    scores = (q @ keys[:, :, tile.start : tile.stop].swapaxes(-1, -2)).astype(mx.float32)
    if mask is None and not tile.diagonal:
        return scores
    size = block.stop - block.start
    rows, groups, many, n_keys = scores.shape
    seen = mx.tri(size, dtype=mx.bool_) if mask is None else _by_group(mask[..., block.start : block.stop, :], groups)
    by_head = scores.reshape(rows, groups, many // size, size, n_keys)
    return mx.where(seen, by_head, _UNSEEN).reshape(scores.shape)


def _by_group(mask: mx.array, groups: int) -> mx.array:
    """(…, R or 1, H or 1, b, keys) → (…, G or 1, H/G or 1, b, keys)."""
    if mask.ndim < 3:
        return mask
    if mask.shape[-3] == 1:
        return mx.expand_dims(mask, -3)
    return mask.reshape(*mask.shape[:-3], groups, mask.shape[-3] // groups, *mask.shape[-2:])


def _largest(scores: Sequence[mx.array]) -> mx.array:
    found = scores[0].max(-1, keepdims=True)
    for one in scores[1:]:
        found = mx.maximum(found, one.max(-1, keepdims=True))
    return found


def _dots(one: mx.array, other: mx.array) -> mx.array:
    """(…, D), (…, D) → (…, 1) float32."""
    return (one.astype(mx.float32) * other).sum(-1, keepdims=True)


def _after(x: mx.array, before: list[mx.array]) -> mx.array:
    """The array, to be computed once ``before`` are: one block at a time is in memory."""
    return mx.depends([x], before)[0] if before else x


class _Sums:
    """Slopes of keys and of values, added up from block to block: those of all keys up to the block's last.

    A sum over all blocks at the end would hold an array as long as the row for each of them.
    """

    def __init__(self) -> None:
        self.found: list[mx.array] = []

    def add(self, tile: _Tile, *slopes: mx.array) -> None:
        """Of the tile's keys, whose tiles come in order."""
        slopes = tuple(one.astype(mx.float32) for one in slopes)
        if not self.found:
            self.found = list(slopes)
        elif tile.start == self.found[0].shape[2]:
            self.found = [mx.concatenate([sum_, one], axis=2) for sum_, one in zip(self.found, slopes, strict=True)]
        else:
            self.found = [sum_ + one for sum_, one in zip(self.found, slopes, strict=True)]
