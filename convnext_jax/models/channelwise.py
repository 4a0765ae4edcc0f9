"""1×1 products, scales, shifts and normalisation of channels, such as CPUs compute well.

A parameter's gradient is a sum over pixels. XLA:CPU works such a sum into whatever made the pixels
and computes that anew for every column, one number at a time; of the two operands of a weight's
gradient it transposes the left one, however large; and with few pixels a product with a transposed
weight takes up to four times as long as one in which the weight stands on the left. A pixel's mean
it takes in two steps, of which neither is joined with what lies around it. There, sums are products
with a row of ones, and operands stand where they cost the least: ConvNeXt-T's training step takes
a third less time. Elsewhere sums are sums, and the gradients those that differentiation gives, but
for the normalisation's, which is written out.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike


class Dense(nn.Module):
    """`nn.Dense`, with its parameters: `kernel` (C, features) and `bias` (features,).

    Attributes:
      features: columns of the kernel.
      use_bias: whether a bias is added.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products, see `jax.lax.Precision`.
      kernel_init: initialiser of the kernel; the bias starts at 0.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., C), of any float type, to (..., features) of type `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        y = multiply_channels(x.astype(self.dtype), kernel.astype(self.dtype), self.precision)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), shape[1:], self.param_dtype)
        return shift_channels(y, bias.astype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_channels(x: jax.Array, kernel: jax.Array, precision: PrecisionLike) -> jax.Array:
    """Multiplies x (..., C) by kernel (C, D), of x's type, to (..., D)."""
    return jnp.matmul(x, kernel, precision=precision)


@jax.custom_vjp
def scale_channels(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies x (..., C) by scale (C,), of x's type."""
    return x * _row(scale, x)


@jax.custom_vjp
def shift_channels(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds bias (C,), of x's type, to x (..., C)."""
    return x + _row(bias, x)


@jax.custom_vjp
def mean_of_channels(x: jax.Array) -> jax.Array:
    """The mean over the channels of x (..., C), of shape (..., 1)."""

    def by_product(x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        ones = jnp.ones((1, channels), x.dtype)
        pixels = x.reshape(-1, channels)
        # With the ones on the left it takes less time.
        total = jnp.matmul(ones, pixels.T, precision=jax.lax.Precision.HIGHEST)
        return total.reshape(*x.shape[:-1], 1) / channels

    return jax.lax.platform_dependent(
        x, cpu=by_product, default=lambda x: x.mean(axis=-1, keepdims=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalise_channels(x: jax.Array, epsilon: float) -> jax.Array:
    """Each pixel's channels of x (..., C) less their mean, over √(variance + epsilon)."""
    return _normalise_forward(x, epsilon)[0]


def _normalise_forward(
    x: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    mean = mean_of_channels(x)
    centred = x - mean
    inverse = jax.lax.rsqrt(mean_of_channels(jnp.square(centred)) + epsilon)
    return centred * inverse, (x, mean, inverse)


def _normalise_backward(
    epsilon: float, saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array]:
    x, mean, inverse = saved
    normalised = (x - mean) * inverse
    along = normalised * mean_of_channels(g * normalised)
    return (inverse * (g - mean_of_channels(g) - along),)


def _multiply_forward(
    x: jax.Array, kernel: jax.Array, precision: PrecisionLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return multiply_channels(x, kernel, precision), (x, kernel)


def _multiply_backward(
    precision: PrecisionLike, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    columns, rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), precision=precision)

    def smaller_first(columns: jax.Array, rows: jax.Array) -> jax.Array:
        if columns.shape[1] <= rows.shape[1]:
            return product(columns, rows)
        return product(rows, columns).T

    def by_transposed(g: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(g, kernel.T, precision=precision)

    def kernel_first(g: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = g.reshape(-1, g.shape[-1])
        pixels = rows.shape[0]
        # Of an exported program the number may be a symbol.
        if not isinstance(pixels, int) or pixels >= min(kernel.shape):
            return by_transposed(g, kernel)
        turned = jax.lax.dot_general(kernel, rows, (((1,), (1,)), ((), ())), precision=precision)
        # Or XLA would exchange the operands again.
        return jax.lax.optimization_barrier(turned).T.reshape(x.shape)

    by_kernel = jax.lax.platform_dependent(columns, rows, cpu=smaller_first, default=product)
    by_x = jax.lax.platform_dependent(g, kernel, cpu=kernel_first, default=by_transposed)
    return by_x, by_kernel


normalise_channels.defvjp(_normalise_forward, _normalise_backward)
multiply_channels.defvjp(_multiply_forward, _multiply_backward)
scale_channels.defvjp(
    lambda x, scale: (scale_channels(x, scale), (x, scale)),
    lambda saved, g: (g * _row(saved[1], g), sum_over_pixels(g * saved[0])),
)
shift_channels.defvjp(
    lambda x, bias: (shift_channels(x, bias), None),
    lambda _, g: (g, sum_over_pixels(g)),
)


mean_of_channels.defvjp(
    lambda x: (mean_of_channels(x), x),
    lambda x, g: (jnp.broadcast_to(g / x.shape[-1], x.shape),),
)


def sum_over_pixels(x: jax.Array) -> jax.Array:
    """Sums x (..., C) over all its axes but the last, into (C,)."""

    def sum_as_product(x: jax.Array) -> jax.Array:
        rows = math.prod(x.shape[:-1])
        ones = jnp.ones(rows, x.dtype)
        return jnp.matmul(ones, x.reshape(rows, -1), precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(
        x, cpu=sum_as_product, default=lambda x: x.sum(axis=tuple(range(x.ndim - 1)))
    )


def _row(parameter: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(parameter, tuple(range(x.ndim - 1)))
