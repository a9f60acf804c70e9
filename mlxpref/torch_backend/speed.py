"""How fast a matrix product is here."""

from __future__ import annotations

import time

import torch


def matmul_gflops(size: int = 1024, *, repeats: int = 5) -> float:
    """GFLOP/s of one float32 product of two (size, size) matrices on the device, the best of ``repeats`` after one to
    warm up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
