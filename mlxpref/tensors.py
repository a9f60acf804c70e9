"""Arrays in safetensors files, one at a time, in float64 and without an array framework.

NumPy has no bfloat16: such values are read and written as the upper halves of float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlxpref.errors import AdapterError
from mlxpref.files import written_aside

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Floating-point types of a safetensors file, and as what NumPy reads their bytes."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array that is read, or computed, when it is asked for: a full fine-tune is as large as its model.

    Attributes:
        dtype: safetensors' name of its type, "F32" for example.
        read: gives the values, float64; KeyError if the type is none of ``FLOATS``.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def tensors_of(file: Path, header: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a whole safetensors file by name, in order of name.

    Args:
        header: what :func:`mlxpref.files.safetensors_header` gives of this file.
    """
    start = file.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
    found = {}
    for name, entry in sorted(header.items()):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        found[name] = Tensor(dtype, shape, partial(_read, file, dtype, shape, start + entry["data_offsets"][0]))
    return found


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears under its name whole; each tensor is computed as its turn comes.

    Raises:
        AdapterError: a number is not finite, or not in its type.
        RunError: the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + math.prod(tensor.shape) * np.dtype(FLOATS[tensor.dtype]).itemsize
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    with written_aside(file) as aside, aside.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in sorted(tensors.items()):
            stream.write(_encoded(name, tensor).tobytes())


def _read(file: Path, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    stored = np.fromfile(file, FLOATS[dtype], math.prod(shape), offset=offset)
    return _decoded(stored, dtype).reshape(shape)


def _decoded(stored: np.ndarray, dtype: str) -> np.ndarray:
    values = (stored.astype("<u4") << 16).view("<f4") if dtype == "BF16" else stored
    return values.astype(np.float64)


def _encoded(name: str, tensor: Tensor) -> np.ndarray:
    """The values as their type stores them, rounded to the nearest, ties to even."""
    values = tensor.read()
    if values.shape != tensor.shape:
        raise ValueError(f"{name}: computed {values.shape}, announced {tensor.shape}")
    with np.errstate(over="ignore"):
        if tensor.dtype == "BF16":
            bits = values.astype("<f4").view("<u4").astype(np.uint64)
            stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
        else:
            stored = values.astype(FLOATS[tensor.dtype])
    if not np.isfinite(_decoded(stored, tensor.dtype)).all():
        raise AdapterError(f"{name}: not finite, or too large for {tensor.dtype}; take smaller weights, or whole files")
    return stored
