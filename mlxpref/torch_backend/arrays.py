"""NumPy records to tensors on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mlxpref.records import MicroBatch, Shelf


def to_torch(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with tensors; whole numbers become int64, which PyTorch indexes with."""
    fields = {name: _tensor(value, device) for name, value in batch._asdict().items() if name != "shelves"}
    shelves = tuple(Shelf(_tensor(shelf.inputs, device), _tensor(shelf.prompt, device)) for shelf in batch.shelves)
    return MicroBatch(shelves=shelves, **fields)


def _tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _tensor(item, device) for name, item in value.items()}
    if value is None or isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iub" else array).to(device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """float32, on the host, its own memory."""
    return tensor.detach().float().cpu().numpy().copy()
