r"""The least that a training step has to compute: what a time is measured against.

Matrix products only, 2 FLOPs for a multiplication and an addition. For a row with a prompt of :math:`p` tokens and
responses of :math:`n_1 \dots n_K` tokens, a pass reads

.. math:: t = p + \sum_k (n_k - 1)

tokens: the prompt once, and of each response all but its last token, which predicts nothing. It scores
:math:`s = \sum_k n_k` tokens, and of the last layer it wants no more than :math:`u = 1 + \sum_k (n_k - 1)` outputs:
of the prompt's other tokens only keys and values are read there. Then

=============  =======================================================================================
forward        :math:`2\,a\,b` for each matrix :math:`a \times b` and token; of experts only those a token meets;
               :math:`t` tokens, in the last layer :math:`u`, but :math:`t` for keys and values
attention      :math:`4\,H d` for each query and key it may see (scores, and their mixture of values): a
               prompt has :math:`p(p+1)/2` such pairs, a response :math:`(n-1)p + (n-1)n/2`
head           :math:`2\,D V` for each scored token
backward       towards activations, from the lowest adapted layer up: the same again for matrices and head,
               twice for attention (both its factors move). Nothing below is differentiated, so that layer's own
               queries, keys and values need no gradient of their input
LoRA           :math:`2\,r\,(a + b)` for each adapted matrix and token forward, twice that backward
all weights    full fine-tuning instead of LoRA: :math:`2\,a\,b` more for each matrix and token
=============  =======================================================================================

The reference's log-probs are data; :func:`minimum_flops` without ``adapted_from`` says what making them takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from mlxpref.bench.dims import Dims, Matrix, read_dims
from mlxpref.records import Tokenized
from mlxpref.steps import HEAD_ROWS

__all__ = ["Dims", "Flops", "Lengths", "lengths_of", "minimum_flops", "products", "read_dims"]

Lengths = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of each of its responses."""


class Flops(NamedTuple):
    """FLOPs by where they are spent.

    Attributes:
        layers: products of tokens with the layers' matrices, forward and backward.
        attention: scores and mixtures.
        head: products with the vocabulary.
        adapter: LoRA's own products; of full fine-tuning those of the weights' gradients.
    """

    layers: float
    attention: float
    head: float
    adapter: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head + self.adapter


def lengths_of(rows: Iterable[Tokenized]) -> list[Lengths]:
    """The lengths of tokenized rows; further texts stand beside the responses, a lead belongs to its text."""
    return [(len(row.prompt_ids), tuple(len(lead) + len(ids) for lead, ids in row.slots)) for row in rows]


def minimum_flops(
    dims: Dims,
    rows: Iterable[Lengths],
    *,
    adapted_from: int | None,
    rank: int | None = 8,
    keys: Collection[str] | None = None,
) -> Flops:
    """FLOPs that one update on these rows needs at least; the formula stands at the top of this module.

    Args:
        dims: of the model.
        rows: of the batch: prompt tokens, and each response's.
        adapted_from: index of the lowest layer that trains, 0 for all; None: a forward pass without gradients.
        rank: of LoRA; None: the weights of these layers train themselves (with ``adapted_from`` 0 the head's, too).
        keys: names of the adapted matrices within a layer; None: all.
    """
    total = Flops(0.0, 0.0, 0.0, 0.0)
    for prompt, responses in rows:
        of_row = _of_row(dims, prompt, responses, adapted_from, rank, keys)
        total = Flops(*(one + other for one, other in zip(total, of_row, strict=True)))
    return total


def _of_row(
    dims: Dims,
    prompt: int,
    responses: Sequence[int],
    adapted_from: int | None,
    rank: int | None,
    keys: Collection[str] | None,
) -> Flops:
    read = prompt + sum(n - 1 for n in responses)
    wanted, scored = 1 + read - prompt, sum(responses)
    layers = attention = adapter = 0.0
    for index, layer in enumerate(dims.layers):
        last = index == len(dims.layers) - 1
        trains = adapted_from is not None and index >= adapted_from
        pairs = _seen(0 if not last else prompt - 1, prompt, layer.window)
        pairs += sum(_seen(prompt, prompt + n - 1, layer.window) for n in responses)
        attention += 4 * layer.heads * layer.head_dim * pairs * (3 if trains else 1)
        for matrix in layer.matrices:
            tokens = matrix.active * (wanted if last and not matrix.feeds_later_tokens else read)
            lowest = index == adapted_from and matrix.reads_layer_input
            once = 2.0 * matrix.inputs * matrix.outputs * tokens
            layers += once * (2 if trains and not lowest else 1)
            if trains and (keys is None or matrix.name in keys):
                adapter += once if rank is None else _lora(matrix, rank, tokens, lowest)
    head = 2.0 * dims.hidden * dims.vocabulary * scored
    if rank is None and adapted_from == 0:
        adapter += head
    return Flops(layers, attention, head * (1 if adapted_from is None else 2), adapter)


def _seen(start: int, end: int, window: int | None) -> float:
    """Keys that the tokens at places ``start`` … ``end - 1`` may see, themselves included."""
    whole = end if window is None else min(end, max(start, window))
    within = (whole * (whole + 1) - start * (start + 1)) / 2
    return within + (end - whole) * (window or 0)


def _lora(matrix: Matrix, rank: int, tokens: float, lowest: bool) -> float:
    forward = 2.0 * rank * (matrix.inputs + matrix.outputs) * tokens
    return 3 * forward - (2.0 * rank * matrix.inputs * tokens if lowest else 0.0)


def products(
    dims: Dims, tokens: int, scored: int, *, head_rows: int = HEAD_ROWS
) -> list[tuple[int, int, int, float]]:
    """The matrix products of a micro-batch, for a measurement of how fast the device makes them.

    Args:
        tokens: positions that one pass reads. scored: of these the head reads.
        head_rows: of which it reads so many at once, as logits are made in chunks.

    Returns:
        ``(rows, inputs, outputs, FLOPs)``, each different product of (rows, inputs) with (inputs, outputs) once,
        with the FLOPs that all of its kind take in one forward pass.
    """
    found: dict[tuple[int, int, int], float] = {}
    for layer in dims.layers:
        for matrix in layer.matrices:
            rows = max(1, round(tokens * matrix.active / matrix.experts))
            shape = (rows, matrix.inputs, matrix.outputs)
            found[shape] = found.get(shape, 0.0) + 2.0 * matrix.inputs * matrix.outputs * matrix.active * tokens
    head = (max(1, min(scored, head_rows)), dims.hidden, dims.vocabulary)
    found[head] = found.get(head, 0.0) + 2.0 * dims.hidden * dims.vocabulary * scored
    return [(*shape, flops) for shape, flops in found.items()]
