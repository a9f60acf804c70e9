"""``ops`` on three libraries: values against ``math``, slopes against written-down numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from decimal import Context, Decimal
from typing import Any

import numpy as np
import pytest
from libraries import DIFFERENTIABLE, LIBRARIES, MLX, NUMPY, Library, host

from mlxpref import ops

POINTS = [-300.0, -30.0, -1.5, -1e-4, 0.0, 1e-4, 0.7, 2.0, 30.0, 300.0]


def slope(library: Library, function: Any, values: Any) -> np.ndarray:
    """Slopes of an elementwise function."""
    return library.gradients(lambda x: function(x).sum(), values)[0]


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


VALUES = [
    (ops.softplus, softplus),
    (ops.log_sigmoid, lambda x: -softplus(-x)),
    (ops.sigmoid, logistic),
    (ops.relu, lambda x: max(x, 0.0)),
    (ops.absolute, abs),
    (lambda x: ops.clip(x, -1.0, 2.5), lambda x: min(max(x, -1.0), 2.5)),
    (lambda x: ops.exp(ops.clip(x, high=50.0)), lambda x: math.exp(min(x, 50.0))),
    (lambda x: ops.expm1(ops.clip(x, high=50.0)), lambda x: math.expm1(min(x, 50.0))),
    (lambda x: ops.log(ops.absolute(x) + 3), lambda x: math.log(abs(x) + 3)),
    (lambda x: ops.log1p(ops.absolute(x)), lambda x: math.log1p(abs(x))),
    (lambda x: ops.where(x > 0.5, x, -2 * x), lambda x: x if x > 0.5 else -2 * x),
    (ops.stop_gradient, lambda x: x),
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("function, expected", VALUES)
def test_values_are_those_of_math_far_out_too(library: Library, function: Any, expected: Any) -> None:
    """Finds: overflow, a lost tail, a wrong branch, a call that one library names otherwise."""
    got = host(function(library.array(POINTS)))
    tolerance = 1e-12 if library is not MLX else 2e-6
    np.testing.assert_allclose(got, [expected(x) for x in POINTS], rtol=tolerance, atol=1e-44)


SLOPES = [
    (ops.softplus, logistic),
    (ops.log_sigmoid, lambda x: logistic(-x)),
    (ops.sigmoid, lambda x: logistic(x) * logistic(-x)),
    (ops.relu, lambda x: 1.0 if x > 0 else 0.0),
    (ops.absolute, lambda x: math.copysign(1.0, x) if x else 0.0),
    (lambda x: ops.clip(x, -1.5, 2.0), lambda x: 1.0 if -1.5 < x < 2.0 else 0.0),
    (lambda x: ops.stop_gradient(x) * x, lambda x: x),
    (lambda x: ops.where(x > 0.5, x, -2 * x), lambda x: 1.0 if x > 0.5 else -2.0),
]


@pytest.mark.parametrize("library", DIFFERENTIABLE)
@pytest.mark.parametrize("function, expected", SLOPES)
def test_slopes_agree_at_kinks_and_at_zero(library: Library, function: Any, expected: Any) -> None:
    """Finds: a softplus that does not learn at step 0, a kink whose side depends on the library,
    a slope that is NaN far out."""
    got = slope(library, function, POINTS)
    # The slope of MLX's sigmoid is s(1 - s), which float32 rounds to 0 a little before the tail ends.
    np.testing.assert_allclose(got, [expected(x) for x in POINTS], rtol=3e-6, atol=1e-7)


BELOW_ZERO = [-300.0, -30.0, -2.0, -0.7, -0.693, -0.5, -1e-3, -1e-6, -1e-9]


@pytest.mark.parametrize("library", LIBRARIES)
def test_log1mexp_keeps_its_digits_near_zero_and_far_out(library: Library) -> None:
    """Finds: 1 - e^x rounded to 0 near 0, where log-odds then are infinite, or to 1 far out."""
    got = host(ops.log1mexp(library.array(BELOW_ZERO)))
    exact = Context(prec=200)
    expected = [float(exact.ln(1 - exact.exp(Decimal(x)))) for x in BELOW_ZERO]
    tolerance = 1e-12 if library is not MLX else 2e-6
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-44)


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_the_slope_of_log1mexp_is_finite_on_both_branches(library: Library) -> None:
    """Finds: the slope of the branch not taken, infinite or NaN, leaking into the sum."""
    got = slope(library, ops.log1mexp, BELOW_ZERO)
    np.testing.assert_allclose(got, [-1 / math.expm1(-x) for x in BELOW_ZERO], rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_largest_and_smallest_along_an_axis(library: Library) -> None:
    x = library.array([[[3.0, 1.0], [2.0, 5.0]], [[0.0, -5.0], [-9.0, 900.0]]])
    np.testing.assert_array_equal(host(ops.amax(x, 1)), [[3, 5], [0, 900]])
    np.testing.assert_array_equal(host(ops.amin(x, 1)), [[2, 1], [-9, -5]])
    np.testing.assert_array_equal(host(ops.amin(x, -1)), [[1, 2], [-5, -9]])


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_equal_extremes_share_the_gradient(library: Library) -> None:
    """Finds: a library that sends the gradient to one of the tied values, or the whole to each."""
    values = [[3.0, 1.0, 3.0], [0.0, -5.0, -5.0]]
    np.testing.assert_array_equal(slope(library, lambda x: ops.amax(x, 1), values), [[0.5, 0, 0.5], [1, 0, 0]])
    np.testing.assert_array_equal(slope(library, lambda x: ops.amin(x, 1), values), [[0, 1, 0], [0, 0.5, 0.5]])


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_indicator_has_the_dtype_of_its_model(library: Library) -> None:
    """Finds: ones in float32 that round what they are multiplied by, where the rest is float64."""
    x = library.array([0.5, -0.5, 0.0])
    got = ops.indicator(x >= 0, x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(host(got), [1, 0, 1])


@pytest.mark.parametrize("library", DIFFERENTIABLE)
def test_an_indicator_is_a_constant(library: Library) -> None:
    """Finds: a condition through which a gradient flows, or which stops ``mx.compile``."""
    np.testing.assert_array_equal(
        slope(library, lambda x: ops.indicator(x > 0, x) * x, POINTS), np.heaviside(POINTS, 0)
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_functions_along_an_axis(library: Library) -> None:
    x = library.array([[3.0, 1.0, 2.0], [0.0, -5.0, 900.0]])
    np.testing.assert_array_equal(host(ops.sort(x, 1)), [[1, 2, 3], [-5, 0, 900]])
    np.testing.assert_array_equal(host(ops.stack([x, -x], 1))[1], [[0, -5, 900], [0, 5, -900]])
    np.testing.assert_array_equal(host(ops.concatenate([x, -x], 0))[3], [0, 5, -900])
    expected = [math.log(math.e**3 + math.e + math.e**2), 900.0]
    np.testing.assert_allclose(host(ops.logsumexp(x, 1)), expected, rtol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "function", [ops.relu, ops.sigmoid, ops.log_sigmoid, lambda x: ops.clip(x, 0, 1), lambda x: ops.log1mexp(x - 1)]
)
def test_a_python_number_does_not_change_the_dtype(library: Library, function: Any) -> None:
    """Finds: a formula that is silently float64 on one side of a comparison."""
    x = library.array([0.5, -0.5])
    assert function(x).dtype == x.dtype
    if library is NUMPY:
        assert function(x.astype(np.float32)).dtype == np.float32


def test_importing_the_formulas_imports_no_array_framework() -> None:
    code = (
        "import sys, mlxpref.ops, mlxpref.objectives, mlxpref.metrics; "
        "sys.exit(bool({'mlx', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
