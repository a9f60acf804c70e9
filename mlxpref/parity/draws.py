"""Random numbers that are the same bits on every machine: weights and adapters that both sides must share.

NumPy's normal distribution calls the platform's logarithm and may change between its releases. Here whole
numbers of 24 bits come from PCG64, whose stream is fixed, and only exact operations follow.
"""

from __future__ import annotations

import math
import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...], *, deviation: float, seed: int) -> np.ndarray:
    """Float32 values of mean 0 and this standard deviation, each as likely as another within ±√3 of it.

    Args:
        name: what is drawn; each name has a stream of its own, so that the order of drawing does not matter.
        seed: of all streams.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    whole = stream.random_raw(math.prod(shape)) >> np.uint64(40)
    centred = (whole.astype(np.float64) - 2**23 + 0.5) / 2**23
    return (centred * (deviation * math.sqrt(3.0))).astype(np.float32).reshape(shape)
