"""The least a DPO step computes, and the rate this machine multiplies matrices at in its shapes.

``minimum_flops`` counts, for each pair, the prompt's tokens once and the responses' through all layers, the head on
response tokens only, the same again backward to activations, LoRA's own products, and of attention its causal half;
the formula stands in ``mlxpref.bench.flops``. The matmul share of a step is (minimum ÷ rate) ÷ its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from bench.model import RANK
from bench.pairs import Lengths, Pair
from mlxpref.bench import flops as counted
from mlxpref.steps import head_rows


def minimum_flops(model: Path, pairs: Sequence[Pair | Lengths], rank: int = RANK) -> float:
    """Operations of one step over these pairs whose reference is known, LoRA on every linear module of every layer."""
    rows = [_lengths(pair) for pair in pairs]
    return counted.minimum_flops(counted.read_dims(model), rows, adapted_from=0, rank=rank).total


def _lengths(pair: Pair | Lengths) -> tuple[int, tuple[int, int]]:
    prompt, chosen, rejected = pair if isinstance(pair, Lengths) else Lengths(*map(len, pair))
    return prompt, (chosen, rejected)


def matmul_rate(model: Path, tokens: int, scored: int, *, seconds: float = 0.05) -> float:
    """Operations per second of the layers' and the head's products by MLX, forward and to activations backward.

    Args:
        model: folder.
        tokens: positions of a micro-batch.
        scored: rows that the head reads.
        seconds: for which each product is repeated at least; its median time counts.
    """
    import mlx.core as mx

    dims = counted.read_dims(model)
    chunk = head_rows(dims.vocabulary, on_cpu=mx.default_device() == mx.Device(mx.cpu))
    flops = spent = 0.0
    for m, n, out, whole in counted.products(dims, tokens, scored, head_rows=chunk):
        x, y, w = (mx.random.normal(shape) for shape in ((m, n), (m, out), (out, n)))
        mx.eval(x, y, w)
        for product in (lambda x=x, w=w: x @ w.T, lambda y=y, w=w: y @ w):
            spent += whole / (2.0 * m * n * out) * _middle(lambda product=product: mx.eval(product()), seconds)
            flops += whole
    return flops / spent


def _middle(run: Callable[[], None], seconds: float) -> float:
    """Median time of a run."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
