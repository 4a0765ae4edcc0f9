"""Random erasing (arXiv 1708.04896), with the law of timm's implementation."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

MODES = ("pixel", "rand", "const")

_AREA = (0.02, 1 / 3)
_ASPECT = (0.3, 1 / 0.3)
_TRIES = 10


class ErasingConfig(NamedTuple):
    """When and how a box is erased; the defaults are the paper's (ConvNeXt, table 5).

    Attributes:
      prob: probability that an image loses a box.
      mode: what fills the box: "pixel", a standard normal number for each pixel and channel;
        "rand", one for each channel; "const", zero, which is the mean of the images.
    """

    prob: float = 0.25
    mode: str = "pixel"


class Box(NamedTuple):
    """A box of an image, as the mask of its rows and that of its columns.

    Attributes:
      rows: bool (H,).
      columns: bool (W,).
      exists: bool scalar; where False, the masks are empty.
    """

    rows: jax.Array
    columns: jax.Array
    exists: jax.Array


def erasing_box(key: jax.Array, height: int, width: int, prob: float) -> Box:
    """Draws, with a probability, a box that is smaller than the image.

    Its share of the image is uniform in [.02, 1/3], its height over its width log-uniform in
    [.3, 1/.3], its sides rounded; a box that does not fit is drawn again, up to ten times in all.
    Then its place is uniform among all.

    Args:
      key: random key.
      height: of the image, in pixels.
      width: of the image, in pixels.
      prob: that there is a box.

    Returns:
      The box.
    """
    keys = jax.random.split(key, 5)
    area = jax.random.uniform(keys[0], (_TRIES,), minval=_AREA[0], maxval=_AREA[1])
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], (_TRIES,), minval=low, maxval=high))
    tall = jnp.round(jnp.sqrt(area * (height * width) * aspect)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(area * (height * width) / aspect)).astype(jnp.int32)
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits)
    exists = fits[first] & jax.random.bernoulli(keys[4], prob)

    def span(key: jax.Array, length: jax.Array, size: int) -> jax.Array:
        # Where no box fitted the bound is kept positive; what is drawn then counts for nothing.
        start = jax.random.randint(key, (), 0, jnp.maximum(size - length + 1, 1))
        place = jnp.arange(size)
        return (place >= start) & (place < start + length) & exists

    return Box(span(keys[2], tall[first], height), span(keys[3], wide[first], width), exists)


def erase(key: jax.Array, image: jax.Array, box: Box, mode: str) -> jax.Array:
    """Erases a box of one image.

    Noise is drawn in a branch, so where this runs image by image only those that lose a box pay.

    Args:
      key: the image's own random key.
      image: floats (C, H, W), normalised.
      box: from `erasing_box`.
      mode: what fills the box, one of `MODES`.

    Returns:
      Floats of the same shape and dtype.
    """
    channels, height, width = image.shape

    def erased(image: jax.Array) -> jax.Array:
        if mode == "pixel":
            noise = jax.random.normal(key, (channels * height, width)).reshape(image.shape)
        elif mode == "rand":
            noise = jax.random.normal(key, (channels, 1, 1))
        else:
            noise = jnp.zeros((1, 1, 1))
        inside = box.rows[:, None] & box.columns[None, :]
        return jnp.where(inside[None], noise.astype(image.dtype), image)

    return jax.lax.cond(box.exists, erased, lambda image: image, image)
