"""Device facts and the memory policy of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxpref import blas
from mlxpref.mlx_backend import compiler

GB = 1e9


def device_info() -> dict[str, Any]:
    """What MLX says of its default device: name, kind ("metal", "cuda", "cpu"), memory in bytes.

    Of a CPU also the "blas" and the "kernels" it runs on, and as "remarks" what makes it slower than it need
    be, each with the remedy.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    kind = "cpu" if on_cpu else "metal" if mx.metal.is_available() else "cuda"
    return {"backend": "mlx", "kind": kind, **mx.device_info(), **(_on_cpu() if on_cpu else {})}


def _on_cpu() -> dict[str, Any]:
    found = {"blas": blas.preload(), "kernels": compiler.prepare()}
    remarks = [f"{what}: {it.said}; {it.remedy}" for what, it in found.items() if it is not None and it.remedy]
    return {what: it.said for what, it in found.items() if it is not None} | {"remarks": remarks}


def memory() -> dict[str, float]:
    """GB held now (active), at most since the last reset (peak), and kept for reuse (cache)."""
    return {
        "peak": mx.get_peak_memory() / GB,
        "active": mx.get_active_memory() / GB,
        "cache": mx.get_cache_memory() / GB,
    }


@contextmanager
def set_memory_policy() -> Iterator[None]:
    """Wire the recommended working set on Metal, give the buffer cache room, restore both at the end.

    The CPU build keeps only 32 MB of freed buffers by default and asks the system for the rest of every
    step again.
    """
    info = device_info()
    recommended = info.get("max_recommended_working_set_size")
    wired = mx.set_wired_limit(int(recommended)) if info["kind"] == "metal" and recommended else None
    total = int(info.get("memory_size", recommended or 8 * GB))
    cache = mx.set_cache_limit(total // 4)
    mx.reset_peak_memory()
    try:
        yield
    finally:
        mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)


def trim_cache(step_peak: float) -> None:
    """Free the buffer cache when it has grown past twice the peak of a step (GB)."""
    if mx.get_cache_memory() / GB > 2 * max(step_peak, 0.25):
        mx.clear_cache()
