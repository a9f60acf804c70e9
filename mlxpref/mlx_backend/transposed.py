"""Linear layers on the reference BLAS of MLX's Linux build, which is no equal of itself in both directions.

``x W^T`` with the weights as they lie goes along the rows of both factors, a sum at a time, at 4 GFLOP/s on a core
whose ``x V`` reaches 7. So the weights are laid out the other way round first, for one product at a time; the
gradient's own product has them the right way round as they are. A fast BLAS does not care.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

FEW_ROWS = 15
"""Rows up to which laying out the weights costs more than it gains."""


def linear(module: nn.Linear, x: mx.array) -> mx.array:
    """(…, D) → (…, O): what the module's own call gives."""
    if x.dtype != mx.float32 or x.size // x.shape[-1] <= FEW_ROWS:  # only float32 goes to BLAS
        return _stock(module, x)
    y = _product(x, module.weight)
    return y + module.bias if "bias" in module else y


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    # Each call waits for its own x: equal copies of the weights mx.compile would merge, and keep.
    (weight,) = mx.depends([weight], [x])
    return x @ mx.contiguous(weight.T)


@_product.vjp
def _product_vjp(primals: Any, cotangent: Any, output: Any) -> tuple[mx.array, mx.array]:
    x, weight = primals
    rows = x.reshape(-1, x.shape[-1])
    return cotangent @ weight, cotangent.reshape(-1, weight.shape[0]).T @ rows


_stock = nn.Linear.__call__
