"""The depthwise convolution on the CPU, written out.

Forward and input gradient are k² shifted multiply-adds, which XLA fuses into one pass; the kernel
gradient is one matrix product per channel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Up to this many pixels the kernel gradient multiplies all pairs of pixels; beyond, row by row.
_MAX_PIXELS_IN_PAIRS = 400


def shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Filters x (B, H, W, C) by kernel (k, k, 1, C), summed in float32, into x's shape and type."""
    k, (_, height, width, _) = kernel.shape[0], x.shape
    padded = _pad(x.astype(jnp.float32), k // 2)
    taps = kernel.astype(jnp.float32).reshape(k, k, 1, 1, 1, -1)
    total = jnp.zeros(x.shape, jnp.float32)
    for u in range(k):
        for v in range(k):
            total += padded[:, u : u + height, v : v + width] * taps[u, v]
    return total.astype(x.dtype)


def kernel_gradient(x: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sums x[b, i + u - m, j + v - m, c] · gradient[b, i, j, c] over b, i and j, by u, v and c."""
    k, (_, height, width, _) = kernel.shape[0], x.shape
    by_pairs = height * width <= _MAX_PIXELS_IN_PAIRS
    taps = (_pixel_pairs if by_pairs else _row_pairs)(
        x.astype(jnp.float32), gradient.astype(jnp.float32), k
    )
    return taps.reshape(kernel.shape).astype(kernel.dtype)


def _pixel_pairs(x: jax.Array, gradient: jax.Array, k: int) -> jax.Array:
    """All pairs of pixels in one product over the batch, then the sums along the pairs' offsets."""
    _, height, width, channels = x.shape
    pairs = jnp.matmul(
        x.transpose(3, 1, 2, 0).reshape(channels, height * width, -1),
        gradient.transpose(3, 0, 1, 2).reshape(channels, -1, height * width),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(channels, height, width, height, width)
    # offsets[u, a, i] is 1 where row a of x meets row i of the gradient under tap u.
    rows, columns = (
        np.stack([np.eye(size, k=k // 2 - u, dtype=np.float32) for u in range(k)])
        for size in (height, width)
    )
    by_row = jnp.einsum("capiq,uai->cupq", pairs, rows)
    return jnp.einsum("cupq,vpq->uvc", by_row, columns)


def _row_pairs(x: jax.Array, gradient: jax.Array, k: int) -> jax.Array:
    """For each row offset, all pairs of columns in one product over the batch and the rows."""
    batch, height, width, channels = x.shape
    padded = _pad(x, k // 2).transpose(3, 0, 1, 2)
    rows = gradient.transpose(3, 0, 1, 2).reshape(channels, batch * height, width)
    columns = np.stack([np.eye(width, width + k - 1, k=v, dtype=np.float32) for v in range(k)])
    taps = []
    for u in range(k):
        shifted = padded[:, :, u : u + height].reshape(channels, batch * height, -1)
        pairs = jnp.einsum("crj,crp->cjp", rows, shifted, precision=jax.lax.Precision.HIGHEST)
        taps.append(jnp.einsum("cjp,vjp->vc", pairs, columns))
    return jnp.stack(taps)


def _pad(x: jax.Array, margin: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
