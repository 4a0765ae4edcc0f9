"""The depthwise convolution on the CPU, written out.

Forward and input gradient are k² shifted multiply-adds, which XLA fuses into one pass; on small
maps one matrix product per channel, which compiles in half the time and runs as fast. The kernel
gradient is such a product as well where the batch is large for the map, and otherwise a sum over
the columns, which XLA fuses for all taps of a row, and then over the rows.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Up to these sizes of the map, and of all channels' matrices, filtering is a matrix product.
_MAX_PIXELS_OF_BANDS = 64
_MAX_NUMBERS_OF_BANDS = 2**18

# Rows of an image whose sums over columns are computed together. What they read, for all taps of a
# row, is to stay in a core's cache.
_MAX_ROWS = 8

_EXACT = jax.lax.Precision.HIGHEST


def shifts(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Filters x (B, H, W, C) by kernel (k, k, 1, C), summed in float32, into x's shape and type.

    Added behind, a bias (C,) would be worked into each of the layer norm's passes, and the whole
    sum with it: XLA:CPU computes again what only such an operation parts from its readers. As the
    first term it keeps the sum one that is written down once.
    """
    _, height, width, channels = x.shape
    pixels = height * width
    # Of an exported program the sizes may be symbols.
    by_bands = (
        isinstance(pixels, int)
        and pixels <= _MAX_PIXELS_OF_BANDS
        and channels * pixels**2 <= _MAX_NUMBERS_OF_BANDS
    )
    first = jnp.zeros(x.shape[-1]) if bias is None else bias
    filtered = _bands if by_bands else _shifts
    operands = (a.astype(jnp.float32) for a in (x, kernel, first))
    return filtered(*operands).astype(x.dtype)


def kernel_gradient(x: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sums x[b, i + u - m, j + v - m, c] · gradient[b, i, j, c] over b, i and j, by u, v and c.

    Args:
      x: (B, H, W, C), what was filtered.
      gradient: (B, H, W, C), by the result.
      kernel: (k, k, 1, C), for its shape and type; m is k // 2.

    Returns:
      Of the kernel's shape and type, summed in float32.
    """
    k, (batch, height, width, _) = kernel.shape[0], x.shape
    # All pairs of pixels are many numbers, which a small batch does not pay for. (Exported programs
    # have batches of any size.)
    by_pairs = isinstance(batch, int) and batch >= height * width
    taps = (_pixel_pairs if by_pairs else _columns)(
        x.astype(jnp.float32), gradient.astype(jnp.float32), k
    )
    return taps.reshape(kernel.shape).astype(kernel.dtype)


def _shifts(x: jax.Array, kernel: jax.Array, first: jax.Array) -> jax.Array:
    k, (_, height, width, _) = kernel.shape[0], x.shape
    padded = _pad(x, k // 2)
    taps = kernel.reshape(k, k, 1, 1, 1, -1)
    total = jnp.broadcast_to(first, x.shape)
    for u in range(k):
        for v in range(k):
            total += padded[:, u : u + height, v : v + width] * taps[u, v]
    return total


def _bands(x: jax.Array, kernel: jax.Array, first: jax.Array) -> jax.Array:
    """One product per channel with the matrix of all pairs of pixels, zero where no tap joins."""
    k, (batch, height, width, channels) = kernel.shape[0], x.shape
    rows, columns = _offsets(height, k), _offsets(width, k)
    by_row = jnp.einsum("uvc,vbj->ucbj", kernel[:, :, 0], columns, precision=_EXACT)
    matrix = jnp.einsum("ucbj,uai->cabij", by_row, rows, precision=_EXACT)
    y = jnp.einsum(
        "npc,cpq->cnq",
        x.reshape(batch, height * width, channels),
        matrix.reshape(channels, height * width, height * width),
        precision=_EXACT,
    )
    return y.transpose(1, 2, 0).reshape(x.shape) + first.reshape(1, 1, 1, -1)


def _pixel_pairs(x: jax.Array, gradient: jax.Array, k: int) -> jax.Array:
    """All pairs of pixels in one product over the batch, then the sums along the pairs' offsets."""
    _, height, width, channels = x.shape
    pairs = jnp.matmul(
        x.transpose(3, 1, 2, 0).reshape(channels, height * width, -1),
        gradient.transpose(3, 0, 1, 2).reshape(channels, -1, height * width),
        precision=_EXACT,
    ).reshape(channels, height, width, height, width)
    by_row = jnp.einsum("capiq,uai->cupq", pairs, _offsets(height, k))
    return jnp.einsum("cupq,vpq->uvc", by_row, _offsets(width, k))


def _columns(x: jax.Array, gradient: jax.Array, k: int) -> jax.Array:
    """For each row of taps, all of its taps in one sum over the columns; then over rows, images."""
    batch, height, width, channels = x.shape
    groups = math.ceil(height / _MAX_ROWS)
    rows = math.ceil(height / groups)
    below = groups * rows - height  # rows of zeros
    margin = k // 2
    padded = jnp.pad(x, ((0, 0), (margin, margin + below), (margin, margin), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (0, below), (0, 0), (0, 0)))
    count = batch * groups
    # Sums over rows are products, or XLA would work them into the terms and vectorise neither.
    over_rows = jnp.ones((count * k, 1, rows), jnp.float32)
    over_groups = jnp.ones((1, count), jnp.float32)

    def row_of_taps(u: jax.Array) -> jax.Array:
        def term(j: int) -> jax.Array:
            window = (batch, height + below, k, channels)
            return jax.lax.dynamic_slice(padded, (0, u, j, 0), window) * gradient[:, :, j : j + 1]

        total = functools.reduce(jnp.add, map(term, range(width)))
        # The product's dimensions are taps, rows and channels. Were taps and channels one, XLA
        # would compute each number's channel by a division and read the numbers one by one.
        by_tap = total.reshape(count, rows, k, channels).swapaxes(1, 2)
        of_groups = jnp.matmul(
            over_rows, by_tap.reshape(count * k, rows, channels), precision=_EXACT
        )
        total = jnp.matmul(over_groups, of_groups.reshape(count, k * channels), precision=_EXACT)
        return total.reshape(k, channels)

    return jax.lax.map(row_of_taps, jnp.arange(k))


def _offsets(size: int, k: int) -> np.ndarray:
    """(k, size, size): 1 at [u, a, i] where pixel a meets pixel i of the result under tap u."""
    return np.stack([np.eye(size, k=k // 2 - u, dtype=np.float32) for u in range(k)])


def _pad(x: jax.Array, margin: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
