"""Tensors turned, filled up and multiplied."""

from __future__ import annotations

import numpy as np

from mlxpref.tensors import Tensor


def transposed(tensor: Tensor) -> Tensor:
    """(rows, columns) → (columns, rows)."""
    return Tensor(tensor.dtype, tensor.shape[::-1], lambda: tensor.read().T)


def padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind the last along an axis, up to ``size``."""
    if tensor.shape[axis] == size:
        return tensor
    fill = [(0, size - n if at == axis else 0) for at, n in enumerate(tensor.shape)]
    shape = tuple(size if at == axis else n for at, n in enumerate(tensor.shape))
    return Tensor(tensor.dtype, shape, lambda: np.pad(tensor.read(), fill))


def cut(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The first ``size`` along an axis."""
    shape = tuple(size if at == axis else n for at, n in enumerate(tensor.shape))
    return Tensor(tensor.dtype, shape, lambda: tensor.read().take(range(size), axis))


def zero_behind(tensor: Tensor, axis: int, size: int) -> bool:
    """Whether everything from ``size`` on along an axis is zero."""
    return not tensor.read().take(range(size, tensor.shape[axis]), axis).any()


def scaled(tensor: Tensor, by: float) -> tuple[Tensor, bool]:
    """The tensor times a number, and whether no bit was lost.

    It keeps its type where that holds the products; where 16 bits do not, they become F32.
    """
    if by == 1:
        return tensor, True
    values = tensor.read() * by
    exact = _holds(tensor.dtype, values)
    dtype = "F32" if tensor.dtype in ("F16", "BF16") and not exact else tensor.dtype
    return Tensor(dtype, tensor.shape, lambda: values), exact or _holds(dtype, values)


def _holds(dtype: str, values: np.ndarray) -> bool:
    """Whether a type has all of these float64 numbers."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype({"F64": np.float64, "F16": np.float16}.get(dtype, np.float32))
    if dtype == "BF16" and (narrow.view(np.uint32) & 0xFFFF).any():
        return False
    return bool(np.array_equal(narrow.astype(np.float64), values))
