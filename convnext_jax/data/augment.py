"""What happens to a batch of uint8 images on the accelerator, before mixing."""

import jax
import jax.numpy as jnp

# Of ImageNet's training images, in units of [0, 1]; every published ConvNeXt checkpoint uses them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: jax.Array,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Maps grey levels to normalised floats, (x / 255 - mean) / std.

    Args:
      images: uint8 (..., H, W, C).
      mean: C values in units of [0, 1].
      std: C values in units of [0, 1].
      dtype: of the result; the arithmetic is float32.

    Returns:
      Floats of the same shape.
    """
    scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
    offset = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    shape = (1,) * (images.ndim - 1) + (-1,)
    x = images.astype(jnp.float32) * scale.reshape(shape) - offset.reshape(shape)
    return x.astype(dtype)
