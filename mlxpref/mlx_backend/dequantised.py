"""Products with quantised weights on the CPU: dequantise, then multiply.

MLX's quantised product reads a weight anew for every row; that is right for the one row of generation and wrong
for the hundreds of a training step. The dequantised matrix lives for one product and is made again for the
backward pass.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

FEW_ROWS = 16
"""Rows up to which MLX's own product is the faster one."""


def linear(module: nn.QuantizedLinear, x: mx.array) -> mx.array:
    """(…, D) → (…, O): what the module's own call gives, its weights frozen."""
    if x.size // x.shape[-1] <= FEW_ROWS:
        return _stock(module, x)
    optional = [module[name] for name in ("biases",) if module.get(name) is not None]

    def dequantised(parts: list[mx.array], after: mx.array) -> mx.array:
        # Each call and pass waits for an array of its own: equal ones mx.compile merges, and keeps what they make.
        weight, scales, *biases = mx.depends([module.weight, *parts], [after])
        return mx.dequantize(
            weight, scales, *biases, group_size=module.group_size, bits=module.bits, mode=module.mode
        ).astype(x.dtype)

    @mx.custom_function
    def product(x: mx.array, *parts: mx.array) -> mx.array:
        return x @ dequantised(list(parts), x).T

    @product.vjp
    def product_vjp(primals: Any, cotangent: Any, output: Any) -> tuple[mx.array, ...]:
        _, *parts = primals
        return cotangent @ dequantised(parts, cotangent), *(mx.zeros_like(part) for part in parts)

    y = product(x, module.scales, *optional)
    return y + module.bias if "bias" in module else y


_stock = nn.QuantizedLinear.__call__
