"""How fast the device multiplies matrices of a model's shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from mlxpref.folders import DTYPES

Product = tuple[int, int, int, float]
"""Rows, inputs, outputs, and the FLOPs that all products of this kind have in a pass."""


def matmul_rate(products: Sequence[Product], *, dtype: str = "float32", repeats: int = 5) -> float:
    """FLOP/s of a pass's matrix products, forward with a weight stored as (outputs, inputs), backward with the same.

    The median of ``repeats`` of each product after one to warm up; each kind counts by its FLOPs.

    Args:
        products: see :data:`Product`; FLOPs need only be right in proportion.
        dtype: "float32", "float16" or "bfloat16": what the model computes in.
        repeats: measurements of each product, at least 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; one of {', '.join(DTYPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = 0.0
    for rows, inputs, outputs, flops in products:
        shapes = ((outputs, inputs), (rows, inputs), (rows, outputs))
        weight, forth, back = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in shapes)
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.nn.functional.linear(forth, weight)
            (back @ weight)[0, 0].item()  # reading a number waits for the device
            taken.append(time.perf_counter() - start)
        seconds += flops * statistics.median(taken[1:]) / (4.0 * rows * inputs * outputs)
    return sum(product[3] for product in products) / seconds
