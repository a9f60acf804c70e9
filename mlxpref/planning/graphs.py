"""Host memory that compiled graphs hold: on a CPU one node for each operation of each shape, from its first call on.

Found by the growth of the process from shape to shape, with 4, 8 and 16 layers, 4 and all of 16 differentiated, rows of
200 to 1,727 tokens, pairs and lists of four. On a GPU fused operations are one node each; those are not counted.
"""

from __future__ import annotations

from mlxpref.data.shapes import Shape
from mlxpref.planning.attention import BLOCK
from mlxpref.planning.dims import Dims
from mlxpref.planning.memory import Trained

CALL, CALL_BLOCK = 80_000, 90_000
"""Bytes of a layer's forward pass: for each call of it (prompts, then each response), and for each block of queries."""

BACK, BACK_CALL, BACK_BLOCK = 130_000, 120_000, 40_000
"""Bytes more of a layer that is differentiated: once, for each call, and for each block."""


def graph_bytes(dims: Dims, trained: Trained, shape: Shape, *, differentiate: bool) -> int:
    """Of one shape's compiled graph, on a CPU."""
    lengths = [length for length in (shape.prompt, *shape.rows) if length]
    blocks = sum(-(-length // BLOCK) for length in lengths) if trained.blocks else 0
    forward = dims.layers * (CALL * len(lengths) + CALL_BLOCK * blocks)
    if not differentiate:
        return forward
    layers = dims.layers - trained.first(dims)
    return forward + layers * (BACK + BACK_CALL * len(lengths) + BACK_BLOCK * blocks)
