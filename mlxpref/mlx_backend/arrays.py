"""NumPy records to MLX ones and back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxpref.records import Logps, MicroBatch, Shelf


def to_mlx(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch with MLX arrays; ``hidden`` has them."""
    fields = {name: _array(value) for name, value in batch._asdict().items() if name not in ("shelves", "hidden")}
    shelves = tuple(Shelf(_array(shelf.inputs), _array(shelf.prompt)) for shelf in batch.shelves)
    return MicroBatch(shelves=shelves, hidden=batch.hidden, **fields)


def _array(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _array(item) for name, item in value.items()}
    return None if value is None else mx.array(value)


def to_numpy(logps: Logps) -> Logps:
    """The same log-probs with NumPy arrays."""
    return Logps(np.array(logps.tokens), np.array(logps.mask))
