"""What attention keeps for the backward pass, and what it needs while it works.

One rule, stated once: on a CPU, and on a GPU where the scores of a call are many, attention goes over the keys block
of queries by block, and what lies above the diagonal is never computed. The exponentials of a call are kept for its
backward pass if they are at most ``KEPT_BYTES``; of longer rows only the normalisers are, one number a head and query.
Elsewhere the library's own attention keeps one array of heads x queries x keys.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 128
"""Queries of one block."""

KEPT_BYTES = 64_000_000
"""Exponentials of one call that are kept for its backward pass."""

WORKING_ARRAYS, WORKING_REMADE = 3, 12
"""Arrays of a block's scores (of all scores, where there are no blocks) that are alive at once in a backward pass;
and where exponentials are made again, since buffers are given out some tasks ahead of the computation."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Bytes of one call: kept for the backward pass, and alive while it runs."""

    kept: int
    working: int


def scores(*, rows: int, heads: int, queries: int, keys: int, width: int, blocks: bool) -> Scores:
    """Memory of the scores of one call of attention.

    Args:
        rows: sequences in the call.
        queries, keys: positions of each; the queries are the last of the keys.
        width: bytes of a number.
        blocks: whether it goes block by block wherever it can (a CPU), or only where scores are many.
    """
    whole = rows * heads * queries * keys * width
    past = keys - queries
    starts = range(0, queries, BLOCK)
    seen = sum((min(start + BLOCK, queries) - start) * (past + min(start + BLOCK, queries)) for start in starts)
    causal = rows * heads * seen * width
    if not blocks and causal <= KEPT_BYTES:
        return Scores(kept=whole, working=WORKING_ARRAYS * whole)
    block = rows * heads * min(BLOCK, queries) * keys * 4
    if causal <= KEPT_BYTES:
        return Scores(kept=causal, working=WORKING_ARRAYS * block)
    return Scores(kept=rows * heads * queries * 4, working=WORKING_REMADE * block)
