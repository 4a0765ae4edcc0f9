"""GELU in bfloat16, against float64 at every bfloat16 number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from convnext_jax.models.gelu import gelu, gelu_and_slope

NUMBERS = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
NUMBERS = NUMBERS[np.isfinite(NUMBERS.astype(np.float32))]
# Numbers whose half is subnormal are flushed to zero by some backends.
NUMBERS = NUMBERS[np.abs(NUMBERS.astype(np.float64)) > 2.0**-120]
X = NUMBERS.astype(np.float64)
VALUE = X * ndtr(X)
SLOPE = ndtr(X) + X * np.exp(-0.5 * np.minimum(X * X, 1e3)) / np.sqrt(2 * np.pi)


def last_place(exact):
    """A unit in the last of bfloat16's eight binary places."""
    return 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)


def derivative(x):
    return jax.vjp(gelu, x)[1](jnp.ones_like(x))[0]


def test_values_are_good_to_the_rounding():
    got = np.asarray(jax.jit(gelu)(NUMBERS))
    assert got.dtype == jnp.bfloat16
    error = np.abs(got.astype(np.float64) - VALUE)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = (error / last_place(VALUE))[X >= -4]
    assert places.max() < 0.75
    assert error[X < -4].max() < 1e-6
    assert VALUE[X < -4].min() > -1.3e-4
    rounded = VALUE.astype(jnp.bfloat16)
    assert (got == rounded)[np.abs(X) < 4].mean() > 0.97


def test_derivatives_are_good_to_the_rounding():
    got = np.asarray(jax.jit(derivative)(NUMBERS))
    assert got.dtype == jnp.bfloat16
    error = np.abs(got.astype(np.float64) - SLOPE)
    large = np.abs(SLOPE) > 2.0**-4
    assert (error / last_place(SLOPE))[large].max() < 0.65
    assert error[~large].max() < 2**-12


def test_the_kernels_form_is_the_same():
    value, slope = jax.jit(gelu_and_slope)(NUMBERS.astype(np.float32))
    assert value.dtype == slope.dtype == jnp.float32
    for wide, got in ((value, gelu), (slope, derivative)):
        rounded, got = (np.asarray(a, np.float32) for a in (wide, jax.jit(got)(NUMBERS)))
        np.testing.assert_allclose(got, rounded, rtol=2**-8, atol=1e-6)


def test_infinities():
    x = jnp.asarray([jnp.inf, 3e38, -3e38], jnp.bfloat16)
    np.testing.assert_array_equal(gelu(x).astype(jnp.float32), [jnp.inf, x[1], 0])
    np.testing.assert_array_equal(derivative(x[1:]).astype(jnp.float32), [1, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_types_are_exact_to_their_rounding(dtype):
    x = jnp.linspace(-6, 6, 101).astype(dtype)
    exact = np.asarray(x, np.float64)
    exact *= ndtr(exact)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gelu(x), exact, rtol=0, atol=tolerance)
    wide = np.asarray(x, np.float64)
    exact = ndtr(wide) + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(derivative(x), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_the_input_is_kept_for_the_backward_pass(dtype):
    _, vjp = jax.vjp(gelu, jnp.ones((4, 8), dtype))
    assert [a.shape for a in jax.tree.leaves(vjp)] == [(4, 8)]


def test_no_pass_waits_for_the_others_erf():
    # XLA would compute the two at once if both asked for the same number.
    program = jax.jit(lambda x, g: jax.vjp(gelu, x)[1](g)[0] + gelu(x))
    shape = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    compiled = program.lower(shape, shape).compile().as_text()
    assert len(re.findall(r" erf\(", compiled)) == 2
