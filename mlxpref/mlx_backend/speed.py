"""How fast a matrix product is here: the number that says whether the right BLAS is in place."""

from __future__ import annotations

import time

import mlx.core as mx


def matmul_gflops(size: int = 1024, *, repeats: int = 5) -> float:
    """GFLOP/s of one float32 product of two (size, size) matrices on the default device, the best of
    ``repeats`` after one to warm up."""
    a, b = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(a @ b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
