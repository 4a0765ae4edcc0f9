"""What changes the levels of one image's pixels in place, with Pillow's own results, to the bit.

Images are uint8 (3, H, W): channels first, so that a TPU's lanes hold neighbours of a row. Pillow
blends an image with a degenerate one in float32 and cuts off to a whole level; there the last bit
of a product decides. A factor that is a multiple of 2⁻¹³ makes every product and sum exact, in
whatever order the compiler puts them and whether or not it fuses multiplication with addition. So
`round_factor` is applied to every factor that is drawn; it changes none by more than 2⁻¹⁴.
"""

import jax
import jax.numpy as jnp

_FACTOR_STEPS = 2.0**13


def round_factor(factor: jax.Array) -> jax.Array:
    """The nearest multiple of 2⁻¹³, float32; exact for what `blend` does with factors in [0, 4)."""
    return jnp.round(factor * _FACTOR_STEPS) / _FACTOR_STEPS


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Goes from a degenerate image by `factor` of the way to the image, and perhaps beyond.

    The result is clipped to [0, 255] and cut off to whole levels.

    Args:
      degenerate: levels that broadcast with the image, of any number type.
      image: uint8 (3, H, W).
      factor: float32 scalar, 0 for the degenerate image, 1 for the image.

    Returns:
      uint8 (3, H, W).
    """
    start, end = degenerate.astype(jnp.float32), image.astype(jnp.float32)
    values = start + factor * (end - start)
    return jnp.clip(values, 0.0, 255.0).astype(jnp.uint8)


def luma(image: jax.Array) -> jax.Array:
    """Pillow's conversion to grey (ITU-R 601 in 16-bit fixed point).

    Args:
      image: uint8 (3, H, W).

    Returns:
      int32 (1, H, W), levels in [0, 255].
    """
    red, green, blue = image.astype(jnp.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[None]


def invert(image: jax.Array) -> jax.Array:
    """The negative of an image, uint8 (3, H, W)."""
    return 255 - image


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts the levels from a threshold on.

    Args:
      image: uint8 (3, H, W).
      threshold: float32 scalar; 256 changes nothing.

    Returns:
      uint8 (3, H, W).
    """
    return jnp.where(image.astype(jnp.float32) < threshold, image, 255 - image)


def solarize_add(image: jax.Array, addend: jax.Array) -> jax.Array:
    """Adds to the levels below 128.

    Args:
      image: uint8 (3, H, W).
      addend: float32 scalar, a whole number.

    Returns:
      uint8 (3, H, W).
    """
    levels = image.astype(jnp.int32)
    added = jnp.minimum(levels + addend.astype(jnp.int32), 255)
    return jnp.where(levels < 128, added, levels).astype(jnp.uint8)


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest bits of each level; 0 bits give black.

    Args:
      image: uint8 (3, H, W).
      bits: float32 scalar, a whole number in [0, 8].

    Returns:
      uint8 (3, H, W).
    """
    dropped = 8 - bits.astype(jnp.int32)
    return ((image.astype(jnp.int32) >> dropped) << dropped).astype(jnp.uint8)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with black; see `blend`."""
    return blend(jnp.zeros((), jnp.uint8), image, factor)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean of the image's luma, rounded; see `blend`."""
    grey = luma(image)
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    return blend(mean, image, factor)


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grey image; see `blend`."""
    return blend(luma(image), image, factor)


def grayscale(image: jax.Array) -> jax.Array:
    """The grey image, in three channels."""
    return jnp.broadcast_to(luma(image), image.shape).astype(jnp.uint8)
