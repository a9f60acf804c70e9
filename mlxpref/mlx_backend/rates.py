"""How fast the device multiplies matrices of a model's shapes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import mlx.core as mx

from mlxpref.folders import DTYPES

Product = tuple[int, int, int, float]
"""Rows, inputs, outputs, and the FLOPs that all products of this kind have in a pass."""


def matmul_rate(products: Sequence[Product], *, dtype: str = "float32", repeats: int = 5) -> float:
    """FLOP/s of a pass's matrix products on the default device, as a layer makes them: (rows, inputs) with a weight
    stored as (outputs, inputs) forward, (rows, outputs) with the same weight backward.

    The median of ``repeats`` of each product after one to warm up, in turn; the rate is that of all products
    together, so that each kind counts by its FLOPs. Quantised weights are measured as what they stand for: a plain
    product in ``dtype``.

    Args:
        products: see :data:`Product`; FLOPs need only be right in proportion.
        dtype: "float32", "float16" or "bfloat16": what the model computes in.
        repeats: measurements of each product, at least 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; one of {', '.join(DTYPES)}")
    kind = getattr(mx, dtype)
    noise = mx.random.normal((1 << 16,)).astype(kind)

    def filled(*shape: int) -> mx.array:
        return mx.tile(noise, math.prod(shape) // noise.size + 1)[: math.prod(shape)].reshape(shape)

    taken: list[list[float]] = [[] for _ in products]
    for turn in range(repeats + 1):
        for of_product, (rows, inputs, outputs, _) in zip(taken, products, strict=True):
            weight, forth, back = filled(outputs, inputs), filled(rows, inputs), filled(rows, outputs)
            mx.eval(weight, forth, back)
            start = time.perf_counter()
            mx.eval(forth @ weight.T)
            mx.eval(back @ weight)
            end = time.perf_counter()
            if turn > 0:
                of_product.append(end - start)
    seconds = 0.0
    for of_product, (rows, inputs, outputs, flops) in zip(taken, products, strict=True):
        seconds += flops * statistics.median(of_product) / (4.0 * rows * inputs * outputs)
    return sum(product[3] for product in products) / seconds
