"""GELU, x · Φ(x) with the normal distribution's Φ (arXiv 1606.08415), in a form per compute type.

In float32 it is x / 2 · (1 + erf(x / √2)), as PyTorch has it. (`nn.gelu` goes by `erfc`, takes
twice the time on a CPU, and differs where GELU is all but 0.) Even so it takes tens of operations a
number, of which bfloat16 keeps eight bits: on a TPU, whose vector units have no bfloat16 before
v6e, exact GELU took a sixth of a ConvNeXt's training step. In bfloat16 Φ is therefore taken as
(1 + tanh(x · p(x²))) / 2, where the cubic polynomial p makes the result as good as the rounding of
the exact one.

`nn.gelu(approximate=True)` has a linear p and is another function: it is off by up to 2⁻¹¹, far
above bfloat16's rounding where the result is small.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Minimax: of the value's and the derivative's errors over bfloat16 numbers from -4 on, in units in
# the last place, the largest is as small as it can be (0.25). With one coefficient less it would be
# as large as the rounding.
_ODD_POWERS = (0.7970651071237479, 0.0374843073217454, -4.325176391926969e-4, 2.1167097228555735e-6)


def gelu(x: jax.Array) -> jax.Array:
    """Applies GELU to each number.

    In bfloat16 the result is within 0.75 units in the last place of the exact one from x = -4 on (a
    correctly rounded one is within 0.5), and within 10⁻⁶ below, where GELU lies between
    -1.3 · 10⁻⁴ and 0. The derivative is within 0.65 units, or 2⁻¹² where it is smaller than 2⁻⁴.
    There is no forward-mode derivative.

    Args:
      x: any shape; any float type.

    Returns:
      Of x's shape and type.
    """
    return _gelu_bfloat16(x) if x.dtype == jnp.bfloat16 else _gelu_exact(x)


def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU and its derivative Φ(x) + x · φ(x), good to bfloat16's rounding.

    Args:
      x: float32, any shape.

    Returns:
      Both, float32, of x's shape.
    """
    square = x * x
    normal = _normal(x, square)
    return x * normal, normal + x * _density(square)


def _density(square: jax.Array) -> jax.Array:
    """φ(x), by x²."""
    return jnp.exp(-0.5 * square) * (1 / math.sqrt(2 * math.pi))


def _normal(x: jax.Array, square: jax.Array) -> jax.Array:
    """Φ(x), good to bfloat16's rounding."""
    a, b, c, d = _ODD_POWERS
    return 0.5 * jnp.tanh(x * (a + square * (b + square * (c + square * d)))) + 0.5


# With derivatives of their own, the backward passes need x alone.
@jax.custom_vjp
def _gelu_exact(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _exact_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gelu_exact(x), x


def _exact_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # erf is odd. Were it asked for the same number as in the forward pass, XLA would compute it
    # once and write it down for both, which takes longer.
    normal = 0.5 - 0.5 * jax.lax.erf(x * -math.sqrt(0.5))
    return (gradient * (normal + x * _density(x * x)),)


_gelu_exact.defvjp(_exact_forward, _exact_backward)


# Here, too, φ is exact, unlike the derivative of the tanh.
@jax.custom_vjp
def _gelu_bfloat16(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide, wide * wide)).astype(x.dtype)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gelu_bfloat16(x), x


def _backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    _, slope = gelu_and_slope(x.astype(jnp.float32))
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu_bfloat16.defvjp(_forward, _backward)
