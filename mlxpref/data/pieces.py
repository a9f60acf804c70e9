"""Weights of pieces of a response become weights of its tokens, whatever the tokenizer.

A token has the weight of the piece in which it begins; what the template writes before the response that of the
first piece, the end token that of the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mlxpref.data.boundary import Boundary, Texts, n_common
from mlxpref.data.render import _ANCHORS
from mlxpref.errors import DataError

NO_PLACE = "token_weights have no place in the response as the chat template writes it"
LOSES = "the tokenizer loses characters of the response, so token_weights have no place in it"


def token_weights(
    pieces: Sequence[Mapping[str, Any]], texts: Texts, k: int, ids: Sequence[int], boundary: Boundary
) -> np.ndarray:
    """(n,) float32, a weight for each token of a response.

    Args:
        pieces: {"text", "weight"} that make up response ``k``.
        ids: (n,) of the response, uncut, its end token last.

    Raises:
        DataError: the template or the tokenizer changed the response beyond recognition.
    """
    text, finished = "".join(piece["text"] for piece in pieces), texts.finished[k]
    after = len(texts.prompt) if texts.has_prefix else n_common(texts.prompt, finished)
    begins = finished.find(text, after)
    if begins < 0:  # templates may take the space around a response off
        stripped = finished.find(text.strip(), after)
        begins = stripped - (len(text) - len(text.lstrip()))
        if stripped < 0:
            raise DataError(NO_PLACE)
    starts = np.array(_starts(texts, finished, list(ids), boundary)) - begins
    ends = list(accumulate(len(piece["text"]) for piece in pieces))
    piece_of = np.minimum(np.searchsorted(ends, starts, side="right"), len(pieces) - 1)
    weights = np.array([piece["weight"] for piece in pieces], np.float32)
    return np.append(weights[piece_of.astype(int)], weights[-1])


def _starts(texts: Texts, finished: str, ids: list[int], boundary: Boundary) -> list[int]:
    """Where in the finished text each token but the last, the end token, begins.

    The text is encoded again, after what it was encoded behind, until its tokens are these.
    """
    rest = finished[len(texts.prompt) :] if texts.has_prefix else finished
    tail = boundary.encoder.tail(texts.prompt) if texts.has_prefix else ""
    heads = [(tail, boundary.encoder.add_special_tokens), *((anchor, False) for anchor in (*_ANCHORS, ""))]
    for head, special in heads:
        found, spans = _encoded(head + rest, special, boundary.tokenizer)
        for last in (len(ids), len(ids) - 1):  # with the end token, where the template writes it
            if found[len(found) - last :] == ids[:last]:
                shift, first = len(finished) - len(rest) - len(head), len(found) - last
                edges = [(0, 0), *spans, (len(head + rest),) * 2]
                before, own, after = edges[first], edges[first + 1 : first + len(ids)], edges[first + len(ids)]
                if (head + rest)[own[-1][1] : after[0]].strip():
                    raise DataError(LOSES)  # spans lag behind by what was lost
                return [start + shift for start in _tiled(own, before[1], head + rest)]
    raise DataError(NO_PLACE)


def _encoded(text: str, special: bool, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise DataError("token_weights need a tokenizer that says which characters its tokens stand for (a fast one)")
    found = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]


def _tiled(spans: Sequence[tuple[int, int]], end: int, text: str) -> list[int]:
    """Where tokens begin, the first after ``end``: space that a tokenizer does not count belongs to the token after
    it. Other characters it leaves out, since it does not know them, belong to none."""
    starts = []
    for start, stop in spans:
        starts.append(end + len(text[end:start].rstrip()) if start > end else start)
        end = max(end, stop)
    return starts
