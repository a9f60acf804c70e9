"""Prompts once: the rows of a micro-batch as one stream of tokens, and an attention that knows which of them it reads.

A model of transformers looks its attention up by name. Under the name given here it finds one that takes the stream
apart: each prompt reads itself, each row its prompt and itself. All else of a layer acts on tokens one by one, so the
model's classes stay untouched, no token is read twice, and no cache is needed: what layers recompute in the backward
pass they compute from their inputs, as ever.

What a token may read is the model's own rule (causal, within a window, within a chunk): transformers hands it over
where it would have a mask made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils import parametrize
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mlxpref.errors import ModelError
from mlxpref.records import MicroBatch

NAME = "mlxpref_shared"
"""Of this attention, among those of transformers."""

_WITHOUT_EFFECT = {"sliding_window", "position_ids", "cache_position", "use_cache", "is_causal"}
"""Arguments of transformers' attention that scaled_dot_product_attention has no use for: the rule says it."""


class Piece(NamedTuple):
    """Rows of one length that follow one another in a stream.

    Attributes:
        prompts: (R,) which prompts they continue.
        length: T.
        prompt: the same of a single row, where it is known without asking the device; else None.
    """

    prompts: Tensor
    length: int
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A micro-batch's tokens, each once.

    Attributes:
        ids, positions: (1, N) int64: the B prompts of P tokens, then the rows.
        n, prompt: B and P.
        pieces: the rows in order.
        where: (ΣR·T,) the place in the stream of each position of the shelves laid end to end; 0 where it has none.
    """

    ids: Tensor
    positions: Tensor
    n: int
    prompt: int
    pieces: tuple[Piece, ...]
    where: Tensor

    @property
    def sizes(self) -> list[int]:
        """Tokens of all prompts, then of each piece."""
        return [self.n * self.prompt, *(len(piece.prompts) * piece.length for piece in self.pieces)]


def stream_of(batch: MicroBatch, *, padded: bool) -> Stream:
    """The stream of a micro-batch whose prompts are shared.

    Args:
        padded: a shelf is a piece, and keeps its padding. Else rows end with the last token that a scored one is read
            from, and are pieces of their own: that takes many calls, which cost less than padding on a CPU, and has
            the numbers looked at, which other devices would have to be waited for.
    """
    n, prompt = batch.prompts.shape
    device = batch.prompts.device
    ids, pieces = [batch.prompts.reshape(-1)], []
    positions, where = [torch.arange(prompt, device=device).repeat(n)], []
    at = n * prompt
    for piece, tokens, width in _whole(batch) if padded else _cut(batch):
        rows, length = tokens.shape
        pieces.append(piece)
        ids.append(tokens.reshape(-1))
        positions.append(torch.arange(prompt, prompt + length, device=device).repeat(rows))
        where.append(pad(torch.arange(at, at + rows * length, device=device), (0, rows * (width - length))))
        at += rows * length
    return Stream(torch.cat(ids)[None], torch.cat(positions)[None], n, prompt, tuple(pieces), torch.cat(where))


def _whole(batch: MicroBatch) -> Iterator[tuple[Piece, Tensor, int]]:
    """Every shelf as a piece, its tokens (R, T), and T."""
    for shelf in batch.shelves:
        width = shelf.inputs.shape[1]
        yield Piece(shelf.prompt, width), shelf.inputs, width


def _cut(batch: MicroBatch) -> Iterator[tuple[Piece, Tensor, int]]:
    """Every row as a piece, its tokens (1, T) up to its last scored position, and the width of its shelf."""
    lengths = iter(_lengths(batch))
    for shelf in batch.shelves:
        for row, prompt in zip(shelf.inputs, shelf.prompt, strict=True):
            length = next(lengths)
            yield Piece(prompt[None], length, int(prompt)), row[None, :length], len(row)


def _lengths(batch: MicroBatch) -> list[int]:
    """Of every row, up to its last scored position; 1 of a row without any."""
    widths = torch.tensor([shelf.inputs.shape[1] for shelf in batch.shelves for _ in shelf.inputs])
    ends = widths.cumsum(0)
    scored = batch.scored[: int(batch.mask.sum())]
    row = torch.searchsorted(ends, scored, right=True)
    length = torch.zeros_like(widths).scatter_reduce(0, row, scored - (ends - widths)[row], "amax")
    return (length + 1).tolist()


# --- what a token may read ---------------------------------------------------------------------


@dataclass(slots=True)
class _Rule:
    """A model's rule, for tokens of one text by their positions, and the masks made by it so far."""

    function: Callable[..., Tensor]
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether a token reads all before it."""
        return self.function is causal_mask_function

    def mask(self, start: int, length: int, like: Tensor) -> Tensor:
        """(1, 1, T, start + T) what is added to the scores of tokens from ``start`` on: 0, or the lowest number."""
        key = start, length, like.dtype
        if key not in self.masks:
            index = torch.arange(start + length, device=like.device)
            none = index.new_zeros((1, 1, 1, 1))
            allowed = self.function(none, none, index[start:].view(1, 1, -1, 1), index.view(1, 1, 1, -1))
            lowest = torch.finfo(like.dtype).min
            blank = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
            self.masks[key] = blank.masked_fill_(~allowed, lowest)
        return self.masks[key]


def _rule(*_: Any, mask_function: Callable[..., Tensor], use_vmap: bool = False, **__: Any) -> _Rule:
    """In place of a mask."""
    if use_vmap:
        raise ModelError("what a token may read depends on more than positions")
    return _Rule(mask_function)


# --- attention ---------------------------------------------------------------------------------


class Sharing:
    """Shared prompts of one model.

    Args:
        model: of transformers, with its attention looked up by name.

    Raises:
        ModelError: its attention is neither "sdpa" nor "eager".
    """

    def __init__(self, model: Any):
        found = {id(one): one for one in (getattr(module, "config", None) for module in model.modules())}
        self._configs = [one for one in found.values() if getattr(one, "_attn_implementation", None) is not None]
        kinds = {one._attn_implementation for one in self._configs}
        if len(kinds) != 1 or not kinds <= {"sdpa", "eager"}:
            raise ModelError(f"attention is {', '.join(sorted(kinds)) or 'of no kind'}, and not sdpa or eager")
        (self.kind,) = kinds

    @contextmanager
    def reading(self, stream: Stream) -> Iterator[None]:
        """Within this context the model reads this stream."""
        before = _now.sharing, _now.stream
        _now.sharing, _now.stream = self, stream
        for config in self._configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            _now.sharing, _now.stream = before
            for config in self._configs:
                config._attn_implementation = NAME if before[0] is self else self.kind


class _Now:
    """The stream that is read at this moment, and by what."""

    sharing: Sharing | None = None
    stream: Stream | None = None


_now = _Now()


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``torch.utils.checkpoint``: layers that are computed again read what they read now, and make weights that are
    computed once a pass once."""
    return nullcontext(), _again(_now.sharing, _now.stream)


@contextmanager
def _again(sharing: Sharing | None, stream: Stream | None) -> Iterator[None]:
    with parametrize.cached(), nullcontext() if sharing is None or stream is None else sharing.reading(stream):
        yield


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention of a stream: (1, H, N, D) each, keys and values with their own H → (1, N, H, D)."""
    stream = _now.stream
    if _now.sharing is None or stream is None or not isinstance(attention_mask, _Rule):
        raise ModelError(f"{type(module).__name__} has a mask of its own")
    one = _Call(module, attention_mask, _now.sharing.kind, more)
    queries, keys, values = (given.split(stream.sizes, 2) for given in (query, key, value))
    shape = stream.n, stream.prompt
    shared_keys, shared_values = _rows(keys[0], *shape), _rows(values[0], *shape)
    found = [one(_rows(queries[0], *shape), shared_keys, shared_values)]
    each = [tuple(given.split(1)) for given in (shared_keys, shared_values)]
    for piece, q, k, v in zip(stream.pieces, queries[1:], keys[1:], values[1:], strict=True):
        shape = len(piece.prompts), piece.length
        if piece.prompt is not None:  # a view of it, and no copy
            before = [given[piece.prompt] for given in each]
        else:
            before = [given.index_select(0, piece.prompts) for given in (shared_keys, shared_values)]
        own = _rows(k, *shape), _rows(v, *shape)
        found.append(
            one(_rows(q, *shape), *(torch.cat([ahead, rest], 2) for ahead, rest in zip(before, own, strict=True)))
        )
    return torch.cat([rows.flatten(0, 1) for rows in found])[None], None


def _rows(given: Tensor, n: int, length: int) -> Tensor:
    """(1, H, n·T, D) → (n, H, T, D), of the same memory."""
    return given[0].unflatten(1, (n, length)).transpose(0, 1)


_TENSORS = {"s_aux"}
"""Tensors beside queries, keys and values that belong to heads and not to positions."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The model's own attention of rows that lie side by side: (R, H, T, D), (R, H', P + T, D) twice → (R, T, H, D)."""

    module: Any
    rule: _Rule
    kind: str
    more: dict[str, Any]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, whole = query.shape[2], key.shape[2]
        if self.kind == "eager" or self._asks_more():
            mask = self.rule.mask(whole - length, length, query)
            return self._theirs()(self.module, query, key, value, mask, **self.more)[0]
        options: dict[str, Any] = {"scale": self.more.get("scaling"), "enable_gqa": query.shape[1] != key.shape[1]}
        if self.rule.causal and length == whole:
            options["is_causal"] = True
        elif self.rule.causal and query.is_cuda:
            options["attn_mask"] = causal_lower_right(length, whole)
        else:
            options["attn_mask"] = self.rule.mask(whole - length, length, query)
        if query.is_cuda and options.pop("enable_gqa"):  # kernels with a mask want as many heads everywhere
            times = query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(times, 1) for one in (key, value))
        return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    def _asks_more(self) -> bool:
        """Whether the model hands over what scaled_dot_product_attention does not know.

        Raises:
            ModelError: a further tensor, such as which blocks to attend to: nobody here knows what it does to a row.
        """
        known = {*_WITHOUT_EFFECT, "scaling"}
        further = {name for name, given in self.more.items() if isinstance(given, Tensor)}
        odd = sorted(further - known - _TENSORS)
        if odd:
            raise ModelError(f"{type(self.module).__name__} hands its attention {', '.join(odd)}")
        return any(isinstance(v, Tensor) or bool(v) for k, v in self.more.items() if k not in known)

    def _theirs(self) -> Callable[..., tuple[Tensor, Any]]:
        if self.kind == "sdpa":
            return ALL_ATTENTION_FUNCTIONS["sdpa"]
        for kind in type(self.module).__mro__:
            if found := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None):
                return found
        raise ModelError(f"{type(self.module).__name__} has an attention of its own")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _rule)
