"""The three array libraries as test parameters, and one way to ask each for values and gradients.

NumPy and PyTorch compute in float64, MLX in float32; ``FLOAT32`` has PyTorch so, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlxpref.records import Logps


@dataclass(frozen=True)
class Library:
    """How to make an array, and the gradient of a scalar function of several of them."""

    name: str
    array: Callable[[Any], Any]

    def gradients(self, function: Callable[..., Any], *values: Any, compiled: bool = True) -> list[np.ndarray]:
        """∂function/∂each value, as NumPy; MLX's through ``mx.compile``, as a training step has it.

        Without a GPU each new graph of MLX's runs a C++ compiler for about a second: ``compiled=False`` for many.
        """
        arrays = [self.array(value) for value in values]
        if self.name == "mlx":
            import mlx.core as mx

            differentiated = mx.grad(function, argnums=tuple(range(len(arrays))))
            slopes = (mx.compile(differentiated) if compiled else differentiated)(*arrays)
            return [host(slope) for slope in (slopes if len(arrays) > 1 else [slopes])]
        for array in arrays:
            array.requires_grad_(True)
        function(*arrays).backward()
        # A formula that ignores an input, or clips it, leaves no gradient at all in PyTorch.
        return [host(a.grad) if a.grad is not None else np.zeros(a.shape) for a in arrays]


def numpy_array(values: Any) -> Any:
    values = np.asarray(values)
    return values if values.dtype.kind in "iu" else values.astype(np.float64)


def mlx_array(values: Any) -> Any:
    import mlx.core as mx

    values = np.asarray(values)
    return mx.array(values.astype(np.int32 if values.dtype.kind in "iu" else np.float32))


def torch_array(values: Any) -> Any:
    import torch

    return torch.tensor(numpy_array(values))


def torch32_array(values: Any) -> Any:
    import torch

    values = np.asarray(values)
    return torch.tensor(values if values.dtype.kind in "iu" else values.astype(np.float32))


NUMPY = Library("numpy", numpy_array)
MLX = Library("mlx", mlx_array)
TORCH = Library("torch", torch_array)
TORCH32 = Library("torch32", torch32_array)

DIFFERENTIABLE = [
    pytest.param(MLX, id="mlx", marks=pytest.mark.mlx),
    pytest.param(TORCH, id="torch", marks=pytest.mark.torch),
]
LIBRARIES = [pytest.param(NUMPY, id="numpy"), *DIFFERENTIABLE]
FLOAT32 = [
    pytest.param(MLX, id="mlx", marks=pytest.mark.mlx),
    pytest.param(TORCH32, id="torch32", marks=pytest.mark.torch),
]
"""As training computes."""


def host(array: Any) -> np.ndarray:
    """The values of any library's array, as NumPy's."""
    return array.detach().numpy() if hasattr(array, "detach") else np.array(array)


def padded(
    responses: Sequence[Sequence[Sequence[float]]], pad: int = 0, width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Token values [row][response][token] as (B, K, L) and the mask; ``pad`` columns more than needed.

    ``width``: at least so many columns.
    """
    longest = max(width, max(len(tokens) for row in responses for tokens in row) + pad)
    shape = (len(responses), len(responses[0]), longest)
    values, mask = np.zeros(shape), np.zeros(shape)
    for i, row in enumerate(responses):
        for k, tokens in enumerate(row):
            values[i, k, : len(tokens)] = tokens
            mask[i, k, : len(tokens)] = 1
    return values, mask


def logps(library: Library, responses: Sequence[Sequence[Sequence[float]]], pad: int = 0) -> Logps:
    """``Logps`` of a library's arrays."""
    return Logps(*map(library.array, padded(responses, pad)))
