"""Token log-probs of a micro-batch: prompts once, response positions only, no vocabulary axis out.

The way of one micro-batch:

1. The body of the model (all but its head) reads the shared prompt parts; only keys and values (or
   recurrent states) are kept, so the last layer's output is never computed.
2. It reads each shelf of response rows behind the prompt each row continues.
3. The hidden rows that predict a response token go through the model's own head in chunks. A row's
   log-prob depends on its own hidden row only, so one ``vjp`` of the chunk with unit cotangents gives
   log-probs and their hidden gradients in the forward pass; the backward pass is one multiplication.
   No (tokens x vocabulary) array outlives its chunk.

Where an objective asks for more than log-probs, the same chunks give it: ``overlap``, log Σ_v π(v)² (a constant),
and ``token_kl``, KL(reference ‖ policy) over the vocabulary, for which the reference's hidden rows come along.

The head is the model's own ``__call__`` with its body replaced by a stub that returns the hidden
chunk, so soft-caps, scales, tied and quantised heads need no case of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxpref.mlx_backend import kernels, prefix
from mlxpref.mlx_backend.checkpointing import checkpointed_layers
from mlxpref.mlx_backend.elementwise import on_cpu, picked_logps
from mlxpref.mlx_backend.layers import started_from
from mlxpref.records import Logps, MicroBatch
from mlxpref.steps import head_rows

_BODY_NAMES = ("model", "transformer", "backbone")


class _Body:
    """Stands in for a model's body while its head is called: returns a given hidden chunk."""

    def __init__(self, body: Any, hidden: mx.array):
        self._body = body
        self._hidden = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def find_body(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns head and body, and the body's name in it.

    Vision-language wrappers keep both in ``language_model``.

    Returns:
        (owner, name); name is "" when no body is known, and the whole model must be called.
    """
    while "language_model" in model and isinstance(model["language_model"], nn.Module):
        model = model["language_model"]
    for name in _BODY_NAMES:
        if name in model and isinstance(model[name], nn.Module):
            return model, name
    return model, ""


class Network:
    """A model split into body and head, ready to give token log-probs.

    Attributes:
        model: the mlx-lm model, untouched.
        vocabulary: V, which decides how many rows meet the head at once.
        split_head: whether body and head could be told apart; otherwise whole rows of logits are made.
        outer: names of trainable parameters outside the layers, which the head may use.
        grad_checkpoint: recompute layers in the backward pass.
        first_adapted: index of the lowest layer that trains; nothing below is differentiated.
        own_kernels: whether functions of ours take the place of some of MLX's while a pass is traced.
        sites: where the model uses these.
    """

    def __init__(self, model: nn.Module, *, vocabulary: int, split_head: bool = True):
        self.model = model
        self.vocabulary = vocabulary
        self.owner, self.body_name = find_body(model)
        self.split_head = split_head and bool(self.body_name)
        self.grad_checkpoint = False
        self.first_adapted = 0
        self.outer: tuple[str, ...] = ()
        self.own_kernels = True
        self.sites = kernels.Sites({}, ())

    def hidden(self, inputs: mx.array, cache: list[Any] | None) -> mx.array:
        """(R, T) ids → (R, T, D) hidden states, or (R, T, V) logits when the head is not split."""
        if not self.split_head:
            return self.model(inputs, cache=cache) if cache is not None else self.model(inputs)
        body = self.owner[self.body_name]
        return body(inputs, cache=cache) if cache is not None else body(inputs)

    def head(self, hidden: mx.array) -> mx.array:
        """(N, D) → (N, V) logits by the model's own head."""
        if not self.split_head:
            return hidden
        body = self.owner[self.body_name]
        self.owner[self.body_name] = _Body(body, hidden[None])
        try:
            return self.owner(mx.zeros((1, hidden.shape[0]), mx.int32))[0]
        finally:
            self.owner[self.body_name] = body

    def token_values(
        self, micro_batch: MicroBatch, *, differentiate: bool, statistics: Collection[str] = ()
    ) -> tuple[Logps, dict[str, mx.array]]:
        """Log-probs of every scored token, float32 nats, and what else is asked for, each (B, S, L).

        Args:
            statistics: of "overlap" and "token_kl"; the latter needs the extra ``reference_hidden``, as
                ``hidden_rows`` of the reference gives it.
        """
        picked = self.hidden_rows(micro_batch, differentiate=differentiate)
        other = micro_batch.extras.get("reference_hidden") if "token_kl" in statistics else None
        flat = _chunked(self, picked, micro_batch.targets, differentiate, sorted(statistics), other)
        laid = [self._lay(values, micro_batch) for values in flat]
        return Logps(laid[0], micro_batch.mask), dict(zip(sorted(statistics), laid[1:], strict=True))

    def token_logps(self, micro_batch: MicroBatch, *, differentiate: bool) -> Logps:
        """Log-probs of every scored token, float32 nats, (B, S, L)."""
        return self.token_values(micro_batch, differentiate=differentiate)[0]

    def hidden_rows(self, micro_batch: MicroBatch, *, differentiate: bool = False) -> mx.array:
        """(N, D) hidden states that predict a scored token."""
        with self._layers(differentiate), self.kernels(differentiate):
            rows = self._response_rows(micro_batch)
        return mx.take(rows, micro_batch.scored, axis=0)

    @staticmethod
    def _lay(flat: mx.array, micro_batch: MicroBatch) -> mx.array:
        """(N,) → (B, S, L), 0 off the responses."""
        padded = mx.concatenate([flat, mx.zeros((1,), mx.float32)])
        return mx.take(padded, micro_batch.place, axis=0)

    def _response_rows(self, micro_batch: MicroBatch) -> mx.array:
        """Hidden states of all shelves laid end to end, (ΣR·T, D)."""
        offset, known = micro_batch.prompts.shape[1], micro_batch.hidden
        left_out = 0 if known is None else self.first_adapted
        recorded = None
        if offset:
            recorded = prefix.recording(self.model)
            with self._started_from(None if known is None else known.prompts):
                self.hidden(micro_batch.prompts, recorded)
        rows = []
        for index, shelf in enumerate(micro_batch.shelves):
            cache = None
            if recorded is not None:
                cache = prefix.serving(recorded, shelf.prompt, offset, left_out=left_out)
            with self._started_from(None if known is None else known.rows[index]):
                hidden = self.hidden(shelf.inputs, cache)
            rows.append(hidden.reshape(-1, hidden.shape[-1]))
        return mx.concatenate(rows) if len(rows) > 1 else rows[0]

    def _started_from(self, hidden: mx.array | None) -> AbstractContextManager[None]:
        """Within this context the frozen layers' work is known; None: it is not."""
        return nullcontext() if hidden is None else started_from(self.body, self.first_adapted, hidden)

    @property
    def body(self) -> Any:
        """The module that holds the layers."""
        return self.owner[self.body_name] if self.body_name else self.owner

    def kernels(self, differentiate: bool) -> AbstractContextManager[None]:
        """Within this context our own functions stand in the place of MLX's, where they do."""
        return kernels.in_place(self.sites, differentiate=differentiate) if self.own_kernels else nullcontext()

    @contextmanager
    def _layers(self, differentiate: bool) -> Iterator[None]:
        if not self.grad_checkpoint:
            yield
            return
        with checkpointed_layers(self.body, self.first_adapted, partial(self.kernels, differentiate)):
            yield


def _row_logps(network: Network, hidden: mx.array, targets: mx.array) -> mx.array:
    """(N, D), (N,) → (N,) float32 log-probs of the targets."""
    logits = network.head(hidden)
    if not on_cpu() and hasattr(mx.fast, "cross_entropy"):
        return -mx.fast.cross_entropy(logits, targets)  # fused, accumulates in float32
    logits = logits.astype(mx.float32)
    if network.own_kernels:
        return picked_logps(logits, targets)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(logits, axis=-1)


def _chunked(
    network: Network,
    hidden: mx.array,
    targets: mx.array,
    differentiate: bool,
    statistics: Sequence[str],
    other: mx.array | None,
) -> list[mx.array]:
    """(N,) log-probs of all rows, then each statistic, chunk after chunk."""
    bounds = _bounds(hidden.shape[0], head_rows(network.vocabulary, on_cpu=on_cpu()))
    given = (hidden, targets) if other is None else (hidden, targets, other)
    score = partial(_row_values, network, statistics)
    if not differentiate:
        return _one_after_another(bounds, given, score)
    if network.outer or "token_kl" in statistics:
        return _recomputed(network, score, bounds, given)
    return _with_slopes(score, len(statistics), bounds, given)


def _bounds(n: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _one_after_another(
    bounds: Sequence[tuple[int, int]], given: Sequence[mx.array], score: Callable[..., list[mx.array]]
) -> list[mx.array]:
    """What ``score`` makes of each chunk of the given rows, put together."""
    results: list[list[mx.array]] = []
    for start, end in bounds:
        chunk = [value[start:end] for value in given]
        results.append(score(*_after(chunk, results[-1] if results else [])))
    return [mx.concatenate(list(parts)) for parts in zip(*results, strict=True)]


def _after(chunk: Sequence[mx.array], before: Sequence[mx.array]) -> Sequence[mx.array]:
    """The chunk, to be computed once ``before`` is: else the scheduler runs all chunks side by side."""
    return mx.depends(list(chunk), list(before)) if before else chunk


def _row_values(
    network: Network,
    statistics: Sequence[str],
    hidden: mx.array,
    targets: mx.array,
    other: mx.array | None = None,
) -> list[mx.array]:
    """(N,) float32 log-probs of a chunk's targets, then each statistic; of these only "token_kl" has a gradient."""
    if not statistics:
        return [_row_logps(network, hidden, targets)]
    logits = network.head(hidden).astype(mx.float32)
    normaliser = mx.logsumexp(logits, axis=-1)
    found = [mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - normaliser]
    for name in statistics:
        if name == "overlap":
            found.append(mx.stop_gradient(mx.logsumexp(2 * logits, axis=-1) - 2 * normaliser))
        else:
            assert other is not None
            reference = mx.stop_gradient(network.head(other)).astype(mx.float32)
            reference = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
            gap = reference - (logits - normaliser[:, None])
            found.append((mx.exp(reference) * gap).sum(-1))
    return found


def _with_slopes(
    score: Callable[..., list[mx.array]],
    n_statistics: int,
    bounds: Sequence[tuple[int, int]],
    given: Sequence[mx.array],
) -> list[mx.array]:
    """What ``score`` makes of all rows, the gradient of the log-probs towards the hidden rows computed along with them.

    For heads without trainable parameters, and statistics that are constants: nothing else receives a gradient.
    """

    def of_chunk(hidden: mx.array, *others: mx.array) -> list[mx.array]:
        ones = mx.ones(hidden.shape[:1], mx.float32)
        asked = [ones, *[mx.zeros_like(ones)] * n_statistics]
        values, slopes = mx.vjp(lambda hidden: score(hidden, *others), [hidden], asked)
        return [*values, *slopes]

    @mx.custom_function
    def whole(*given: mx.array) -> tuple[mx.array, ...]:
        return tuple(_one_after_another(bounds, given, of_chunk))

    @whole.vjp
    def whole_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        slope = cotangents[0][:, None] * outputs[-1].astype(mx.float32)
        return slope.astype(primals[0].dtype), *(mx.zeros_like(value) for value in primals[1:])

    return list(whole(*given)[:-1])


def _recomputed(
    network: Network,
    score: Callable[..., list[mx.array]],
    bounds: Sequence[tuple[int, int]],
    given: Sequence[mx.array],
) -> list[mx.array]:
    """What ``score`` makes of all rows: each chunk's logits are made again in the backward pass, one chunk after
    another there too, with the head's weights where it trains and the dropout they were made with.

    Args:
        given: hidden rows, which receive a gradient, and what else is cut as they are.
    """
    outer = _select(network.model.trainable_parameters(), network.outer) if network.outer else {}
    names, n = list(outer), len(given)
    keys = mx.random.split(mx.random.state[0], len(bounds) + 1) if names else [None] * len(bounds)

    def of_chunk(key: mx.array | None, chunk: Sequence[mx.array], weights: Sequence[mx.array]) -> list[mx.array]:
        if key is not None:
            mx.random.state[0][:] = key
            network.model.load_weights(list(zip(names, weights, strict=True)), strict=False)
        return score(*chunk)

    @mx.custom_function
    def whole(*arrays: mx.array) -> tuple[mx.array, ...]:
        rows, weights, own = arrays[:n], arrays[n:], iter(keys)
        return tuple(_one_after_another(bounds, rows, lambda *chunk: of_chunk(next(own), chunk, weights)))

    @whole.vjp
    def whole_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        rows, weights = primals[:n], primals[n:]
        slopes: list[mx.array] = []
        sums: list[mx.array] = []
        for key, (start, end) in zip(keys, bounds, strict=False):
            # The first chunk waits, too: mx.compile would merge it with the forward pass's, and keep that.
            before = [*sums, *slopes[-1:]] or [cotangents[0]]
            hidden, *others = _after([value[start:end] for value in rows], before)

            def again(hidden: mx.array, *weights: mx.array, key: Any = key, others: Any = others) -> list[mx.array]:
                return of_chunk(key, [hidden, *others], weights)

            _, found = mx.vjp(again, [hidden, *weights], [cotangent[start:end] for cotangent in cotangents])
            slopes.append(found[0])
            sums = list(found[1:]) if not sums else [x + y for x, y in zip(sums, found[1:], strict=True)]
        return mx.concatenate(slopes), *(mx.zeros_like(value) for value in rows[1:]), *sums

    results = list(whole(*given, *outer.values()))
    if names:
        mx.random.state[0][:] = keys[-1]
        network.model.load_weights(list(outer.items()), strict=False)
    return results


def _select(parameters: dict[str, Any], names: tuple[str, ...]) -> dict[str, mx.array]:
    flat = dict(tree_flatten(parameters))
    return {name: flat[name] for name in names}
