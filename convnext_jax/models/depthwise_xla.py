"""XLA's own depthwise convolution, and its gradient by the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike


def convolution(x: jax.Array, kernel: jax.Array, precision: PrecisionLike) -> jax.Array:
    """Filters x (B, H, W, C) by kernel (k, k, 1, C), into x's shape and type."""
    margin = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((margin, margin), (margin, margin)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


def kernel_gradient(
    x: jax.Array, gradient: jax.Array, kernel_size: int, precision: PrecisionLike
) -> jax.Array:
    """Sums x[b, i + u - m, j + v - m, c] · gradient[b, i, j, c] over b, i and j, by u, v and c.

    Args:
      x: (B, H, W, C), what was filtered.
      gradient: (B, H, W, C), by the result, of x's type.
      kernel_size: k; m is k // 2.
      precision: see `jax.lax.Precision`.

    Returns:
      (k, k, 1, C), of x's type.
    """
    kernel = jax.ShapeDtypeStruct((kernel_size, kernel_size, 1, x.shape[-1]), x.dtype)
    transpose = jax.linear_transpose(lambda kernel: convolution(x, kernel, precision), kernel)
    (by_kernel,) = transpose(gradient)
    return jnp.asarray(by_kernel)
