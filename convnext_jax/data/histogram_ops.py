"""AutoContrast and Equalize of one image, with Pillow's own results, to the bit.

Equalize maps the levels of each channel by a table made from the channel's histogram. A TPU is slow
at reading tables by index, and at adding to them; it multiplies matrices fast. A level is 16 h + l,
and a pixel's two one-hot vectors of 16, for h and for l, make both a product: summed over the
pixels, their outer product is the histogram; between them, the table as a 16 × 16 matrix is the
pixel's entry. All numbers are whole and small enough to be exact in the types used. AutoContrast
needs no table, only a channel's lowest and highest level.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _one_hots(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One-hot vectors of each level's upper and lower four bits, bfloat16 (3, 16, N) each."""
    levels = image.astype(jnp.int32).reshape(3, 1, -1)
    digits = jnp.arange(16)[None, :, None]
    high = (levels >> 4 == digits).astype(jnp.bfloat16)
    low = (levels & 15 == digits).astype(jnp.bfloat16)
    return high, low


def histogram(image: jax.Array) -> jax.Array:
    """How many pixels of each channel have each level.

    Args:
      image: uint8 (3, H, W), of less than 2²⁴ pixels.

    Returns:
      int32 (3, 256).
    """
    high, low = _one_hots(image)
    counts = jnp.einsum("chn,cln->chl", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(3, 256).astype(jnp.int32)


def apply_tables(image: jax.Array, tables: jax.Array) -> jax.Array:
    """Replaces each level by its channel's entry.

    Args:
      image: uint8 (3, H, W).
      tables: int32 (3, 256), entries in [0, 255].

    Returns:
      uint8 (3, H, W).
    """
    high, low = _one_hots(image)
    entries = tables.astype(jnp.bfloat16).reshape(3, 16, 16)
    rows = jnp.einsum("chl,cln->chn", entries, low, preferred_element_type=jnp.float32)
    levels = jnp.where(high > 0, rows, 0.0).sum(axis=1)
    return levels.reshape(image.shape).astype(jnp.uint8)


@functools.cache
def _autocontrast_deviations() -> tuple[np.ndarray, np.ndarray]:
    """Where Pillow's table lies one below ⌊255 (v - lo) / (hi - lo)⌋.

    Pillow computes v * scale + offset in float64 and cuts off, so that where the quotient is whole
    a rounding error may cost a level. That happens for a fifth of all pairs (lo, hi), and a TPU,
    which has no float64, can only be told.

    Returns:
      int16 (65536,), the row for 256 lo + hi, and int32 (rows, 8): level v is bit v % 32 of word
      v // 32.
    """
    low, high = np.arange(256)[:, None], np.arange(256)[None, :]
    width = np.maximum(high - low, 1)
    scale = 255.0 / width
    offset = -low * scale
    bits = np.zeros((256, 256, 8), np.uint32)
    for level in range(256):
        pillow = (level * scale + offset).astype(np.int64)
        exact = 255 * (level - low) // width
        deviates = (pillow < exact) & (low <= level) & (level <= high)
        bits[..., level // 32] |= deviates.astype(np.uint32) << np.uint32(level % 32)
    rows, index = np.unique(bits.reshape(-1, 8), axis=0, return_inverse=True)
    return index.reshape(-1).astype(np.int16), rows.view(np.int32)


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel's levels to [0, 255].

    Args:
      image: uint8 (3, H, W).

    Returns:
      uint8 (3, H, W).
    """
    index, rows = _autocontrast_deviations()
    levels = image.astype(jnp.int32)
    low = levels.min(axis=(1, 2))
    high = levels.max(axis=(1, 2))
    words = jnp.asarray(rows)[jnp.asarray(index)[256 * low + high].astype(jnp.int32)]
    place = jnp.arange(8)[None, :, None, None]
    word = jnp.where(levels[:, None] >> 5 == place, words[:, :, None, None], 0).sum(axis=1)
    one_less = (word >> (levels & 31)) & 1
    # The quotient lies 1 / 510 from any whole number at least, far more than float32's error.
    width = jnp.maximum(high - low, 1).astype(jnp.float32)[:, None, None]
    from_low = (levels - low[:, None, None]).astype(jnp.float32)
    stretched = jnp.floor((255.0 * from_low + 0.5) / width).astype(jnp.int32) - one_less
    return jnp.where((high > low)[:, None, None], stretched, levels).astype(jnp.uint8)


def equalize(image: jax.Array) -> jax.Array:
    """Makes each channel's histogram as even as can be.

    Args:
      image: uint8 (3, H, W).

    Returns:
      uint8 (3, H, W).
    """
    counts = histogram(image)
    levels = jnp.arange(256)[None, :]
    brightest = image.max(axis=(1, 2)).astype(jnp.int32)[:, None]
    last = jnp.where(levels == brightest, counts, 0).sum(axis=1, keepdims=True)
    step = (image[0].size - last) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    tables = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return apply_tables(image, jnp.where(step > 0, tables, levels))
