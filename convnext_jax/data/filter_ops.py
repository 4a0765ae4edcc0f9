"""Sharpness and Gaussian blur of one image: what looks at neighbours, as Pillow does it."""

import jax
import jax.numpy as jnp

from convnext_jax.data.color_ops import blend

# Pillow blurs by repeated box filters, this many along each axis.
_PASSES = 3
# From here on a box would reach beyond two neighbours.
MAX_BLUR_SIGMA = 2.4


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the smoothed image; see `color_ops.blend`.

    The smoothed image is, inside, the mean of 3 × 3 pixels with weight 5 on the middle one,
    rounded; at the border it is the image. The result is Pillow's, to the bit.

    Args:
      image: uint8 (3, H, W).
      factor: float32 scalar, 0 for the smoothed image, 1 for the image.

    Returns:
      uint8 (3, H, W).
    """
    _, height, width = image.shape
    levels = image.astype(jnp.float32)
    padded = jnp.pad(levels, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    weighted = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4.0 * levels
    # Twice the sum plus 13 is odd, so no quotient lies nearer to a whole number than 1/26.
    smooth = jnp.floor((weighted + 6.5) * (1.0 / 13.0))
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return blend(jnp.where(inside[None], smooth, levels), image, factor)


def gaussian_blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blurs by box filters, three along the rows, then three along the columns.

    A box's width is fractional: its outermost pixels count in part. Each filter's result is rounded
    to whole levels, and a neighbour outside of the image is the pixel at the edge. Pillow computes
    the widths in another order of float32 operations, which moves few pixels by one level.

    Args:
      image: uint8 (3, H, W).
      sigma: float32 scalar in (0, `MAX_BLUR_SIGMA`], in pixels; what Pillow calls the radius.

    Returns:
      uint8 (3, H, W).
    """
    variance = sigma * sigma / _PASSES
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    part = part / (6.0 * (variance - (whole + 1.0) ** 2))
    full = (2.0**24 / (2.0 * (whole + part) + 1.0)).astype(jnp.uint32)
    count = 2 * whole.astype(jnp.uint32) + 1
    edge = (jnp.uint32(2**24) - count * full) // 2
    near = jnp.where(whole > 0, full, edge)
    far = jnp.where(whole > 0, edge, jnp.uint32(0))

    def box(levels: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0), (0, 0), (0, 0)]
        pads[axis] = (2, 2)
        padded = jnp.pad(levels, pads, mode="edge")

        def tap(offset: int) -> jax.Array:
            return jax.lax.slice_in_dim(
                padded, 2 + offset, 2 + offset + levels.shape[axis], axis=axis
            )

        total = full * levels + near * (tap(-1) + tap(1)) + far * (tap(-2) + tap(2))
        return (total + 2**23) >> 24

    levels = image.astype(jnp.uint32)
    for axis in (2, 1):
        for _ in range(_PASSES):
            levels = box(levels, axis)
    return levels.astype(jnp.uint8)
