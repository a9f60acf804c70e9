"""The array functions that formulas may use, for NumPy, MLX and PyTorch alike.

Each looks at the type of its arguments and calls that library, which the caller must have imported
to own such an array: nothing here imports MLX or PyTorch. Python numbers count as NumPy's and take
the dtype of the array they meet. Beside these a formula may use arithmetic, comparisons, slices and
the methods the three share: ``.sum(axis)``, ``.mean(axis)``, ``.cumsum(axis)``, ``.reshape(shape)``.

Every function is elementwise and shape-preserving unless it says otherwise, differentiable in MLX
and PyTorch, and safe inside ``mx.compile``. Two choices are made here for all three libraries:

- ``softplus``, ``sigmoid`` and ``log_sigmoid`` neither overflow nor lose their tail, and their
  slope at 0 is ½. (``maximum(u, 0) + log1p(exp(-|u|))`` has slope 0 there in MLX, and step 0 of a
  LoRA run is exactly there.)
- a kink has gradient 0: ``relu`` at 0, ``absolute`` at 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
"""An array of NumPy, MLX or PyTorch."""

_MODULES = {"mlx": "mlx.core", "torch": "torch"}


def library(*values: Any) -> Any:
    """The module that owns the first foreign array among ``values``; NumPy if there is none."""
    for value in values:
        owner = type(value).__module__.partition(".")[0]
        if owner in _MODULES:
            return sys.modules[_MODULES[owner]]
    return np


def exp(x: Array) -> Array:
    """e^x. Never of a sum of log-probs: that underflows."""
    return library(x).exp(x)


def log(x: Array) -> Array:
    """Natural logarithm."""
    return library(x).log(x)


def log1p(x: Array) -> Array:
    """log(1 + x), exact for small x."""
    return library(x).log1p(x)


def expm1(x: Array) -> Array:
    """e^x - 1, exact for small x."""
    return library(x).expm1(x)


def log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x < 0, exact near 0 and far out; its slope is ``-1 / expm1(-x)``."""
    far = log1p(-exp(clip(x, high=-0.5)))  # clipped, since near 0, where it is not taken, its slope is infinite
    return where(x > -math.log(2), log(-expm1(x)), far)


def absolute(x: Array) -> Array:
    """|x|, with gradient 0 at 0."""
    return library(x).abs(x)


def softplus(x: Array) -> Array:
    """log(1 + e^x), ≥ 0; its slope is ``sigmoid(x)``."""
    return -log_sigmoid(-x)


def log_sigmoid(x: Array) -> Array:
    """log(1 / (1 + e^-x)), ≤ 0; its slope is ``sigmoid(-x)``, ½ at 0."""
    xp = library(x)
    if xp.__name__ == "torch":  # its own, because the slope of its logaddexp is NaN at infinity
        return xp.nn.functional.logsigmoid(x)
    return -xp.logaddexp(-x, 0.0)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    xp = library(x)
    return np.exp(log_sigmoid(x)) if xp is np else xp.sigmoid(x)


def relu(x: Array) -> Array:
    """max(x, 0), with gradient 0 at the kink."""
    return library(x).where(x > 0, x, 0.0)


def where(condition: Array, yes: Array, no: Array) -> Array:
    """``yes`` where the condition holds, else ``no``. Gradients reach both branches' inputs: a branch
    not taken must still be finite, with finite slope."""
    return library(condition, yes, no).where(condition, yes, no)


def indicator(condition: Array, like: Array) -> Array:
    """1 where the condition holds, else 0, constant, in the dtype of the array ``like``. (From two Python
    numbers PyTorch's ``where`` makes float32, and what it meets in double precision is rounded.)"""
    if library(condition).__name__ == "torch":
        return condition.to(like.dtype)
    return condition.astype(like.dtype)


def clip(x: Array, low: float | None = None, high: float | None = None) -> Array:
    """x kept within [low, high]; gradient 1 inside, 0 outside and at the bounds."""
    if low is not None:
        x = where(x > low, x, low)
    if high is not None:
        x = where(x < high, x, high)
    return x


def stop_gradient(x: Array) -> Array:
    """The same values as a constant: sg[·] of the formulas."""
    xp = library(x)
    if xp is np:
        return x
    return xp.stop_gradient(x) if hasattr(xp, "stop_gradient") else x.detach()


def logsumexp(x: Array, axis: int) -> Array:
    """log Σ e^x over one axis, which disappears."""
    xp = library(x)
    return np.logaddexp.reduce(x, axis) if xp is np else xp.logsumexp(x, axis)


def amax(x: Array, axis: int) -> Array:
    """The largest value along one axis, which disappears; several that are largest share the gradient."""
    xp = library(x)
    return xp.amax(x, axis) if hasattr(xp, "amax") else xp.max(x, axis)


def amin(x: Array, axis: int) -> Array:
    """The smallest value along one axis, as ``amax``."""
    return -amax(-x, axis)


def sort(x: Array, axis: int) -> Array:
    """x in ascending order along one axis; gradients follow the values."""
    xp = library(x)
    return xp.sort(x, axis).values if xp.__name__ == "torch" else xp.sort(x, axis)


def stack(arrays: Sequence[Array], axis: int) -> Array:
    """Arrays of one shape side by side along a new axis."""
    return library(*arrays).stack(list(arrays), axis)


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """Arrays end to end along an axis they have."""
    return library(*arrays).concatenate(list(arrays), axis)
