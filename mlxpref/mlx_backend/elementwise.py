"""Exponentials on the CPU, where MLX's own are what a step waits for.

MLX 0.32 computes exp there one number at a time, 60 to 80 million a second, whatever else is vectorised. Written
out as a polynomial and a shift of bits it is a loop of plain arithmetic, which the C++ compiler vectorises:
200 to 450 million a second, and exact to one unit in the last place (MLX's own: to fifteen). On a GPU these are
MLX's own functions.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is log 2; the first has few bits, so n·high is exact
ROUND = 12582912.0  # 1.5·2²³: adding it leaves a float no bits below 1
LOWEST = -88.0  # here the bits of 2^n are all 0; further down the polynomial would overflow
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of (e^r − 1 − r) / r² on |r| ≤ ½ log 2, highest power first (Cephes, ``expf``)."""


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def exp_nonpositive(x: mx.array) -> mx.array:
    """e^x of float32 x ≤ 0 (up to 88 does as well); 0 below the smallest normal number, NaN of NaN.

    Without a gradient of its own: only for use inside functions that have one.
    """
    if not on_cpu() or x.dtype != mx.float32:
        return mx.exp(x)
    x = mx.where(x < LOWEST, LOWEST, x)
    n = (x * LOG2_E + ROUND) - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = POLYNOMIAL[0]
    for coefficient in POLYNOMIAL[1:]:
        p = p * r + coefficient
    bits = ((n + 127.0) * 8388608.0).astype(mx.int32)  # of 2^n: the exponent stands 23 bits up
    return (p * (r * r) + r + 1.0) * mx.view(bits, mx.float32)


def row_sums(x: mx.array) -> mx.array:
    """(…, N) → (…, 1), by a matrix product: BLAS adds faster than MLX's sum does on the CPU."""
    return x @ mx.ones((x.shape[-1], 1), x.dtype) if on_cpu() else x.sum(-1, keepdims=True)


@mx.custom_function
def _picked(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    largest = logits.max(-1, keepdims=True)
    exponentials = exp_nonpositive(logits - largest)
    total = row_sums(exponentials)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return (picked - largest - mx.log(total))[:, 0], exponentials, total


@_picked.vjp
def _picked_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    slope = cotangents[0][:, None]
    _, exponentials, total = outputs
    whole = exponentials * (-slope / total)
    return whole.at[mx.arange(len(slope)), primals[1]].add(slope[:, 0]), mx.zeros_like(primals[1])


def picked_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """(N, V) float32, (N,) → (N,): the log-softmax of each row at its target, differentiable once."""
    return _picked(logits, targets)[0]


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) · x; kept for the backward pass are the two and, on the CPU, the sigmoid."""
    return gate * _sigmoid(gate) * x


@swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: Any, output: Any) -> tuple[mx.array, mx.array]:
    gate, x = primals
    # What both passes write alike mx.compile makes once and keeps: on a CPU the sigmoid, on purpose. The product with
    # the gate would be kept, too, were it written gate * s as above.
    s = _sigmoid(gate if on_cpu() else mx.depends([gate], [cotangent])[0])
    return cotangent * x * (s * (1 + gate * (1 - s))), cotangent * (s * gate)


def _sigmoid(x: mx.array) -> mx.array:
    if not on_cpu() or x.dtype != mx.float32:
        return mx.sigmoid(x)
    e = exp_nonpositive(-mx.abs(x))
    return mx.where(x < 0, e, 1.0) / (1.0 + e)
