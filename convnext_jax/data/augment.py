"""What happens to a batch of uint8 images on the accelerator, before mixing.

In the reference's order: the policy's operations, normalisation, erasing. All of it is a function
of the step's key and of each image's place in the global batch, so it does not depend on the number
of devices or hosts.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from convnext_jax.data.erasing import ErasingConfig, erase, erasing_box
from convnext_jax.data.operations import apply_operations
from convnext_jax.data.policies import Policy

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


class AugmentConfig(NamedTuple):
    """What `augment` does.

    Attributes:
      policy: the law of operations; None for none.
      fill: three levels for what geometric operations bring in.
      interpolation: of geometric operations, "bilinear" or "bicubic".
      mean: of the images, in units of [0, 1].
      std: of the images, in units of [0, 1].
      erasing: after normalisation; None for none.
    """

    policy: Policy | None = None
    fill: tuple[int, int, int] = (124, 116, 104)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    erasing: ErasingConfig | None = None


def augment(
    key: jax.Array, images: jax.Array, indices: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Applies the policy, normalises and erases.

    Image by image, in a loop: each has operations of its own, and pays for no others. Where neither
    policy nor erasing is configured there is no loop.

    Args:
      key: random key of the step; the image of index i draws from `fold_in(key, i)`.
      images: uint8 (B, H, W, 3).
      indices: int32 (B,), the images' rows in the global batch.
      config: what to do.

    Returns:
      float32 (B, H, W, 3), normalised.

    Raises:
      AssertionError: if images and indices have not these shapes and types.
    """
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_shape(indices, (images.shape[0],))
    chex.assert_type(images, jnp.uint8)
    policy, erasing = config.policy, config.erasing
    if policy is None and erasing is None:
        return normalize(images, config.mean, config.std)
    _, height, width, _ = images.shape

    # Everything is drawn for the whole batch at once; the loop holds only what touches pixels.
    rows = jnp.arange(images.shape[0])
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index), 3))(indices)
    if policy is not None:
        draws = jax.vmap(lambda key: policy.draw(key, height, width))(keys[:, 0])
    if erasing is not None:
        boxes = jax.vmap(lambda key: erasing_box(key, height, width, erasing.prob))(keys[:, 1])

    def one(row: jax.Array, image: jax.Array) -> jax.Array:
        image = image.astype(jnp.uint8)
        if policy is not None:
            image = apply_operations(
                image,
                *draws,
                row,
                names=policy.names,
                fill=config.fill,
                interpolation=config.interpolation,
            )
        normal = normalize(image.transpose(1, 2, 0), config.mean, config.std).transpose(2, 0, 1)
        if erasing is not None:
            box = jax.tree.map(lambda leaf: leaf[row], boxes)
            normal = erase(keys[row, 2], normal, box, erasing.mode)
        return normal

    # The loop takes one image after another, so let each one's pixels lie together. (A TPU would
    # rather hold the batch in its lanes, and pick one image's pixels out of everyone's. In
    # bfloat16, where levels are exact, it turns the array around faster.)
    planes = by_planes(images.astype(jnp.bfloat16)).transpose(0, 3, 1, 2)
    augmented = jax.lax.map(lambda pair: one(*pair), (rows, planes))
    return augmented.transpose(0, 2, 3, 1)


def by_planes(images: jax.Array) -> jax.Array:
    """Has each channel of each image lie together in memory, on the device that holds it.

    For values inside of a jitted function: as its result, the order would surprise whoever uses it
    next. The compiler's partitioner would gather the batch for this, so over several devices it
    must be called under `shard_map`.

    Args:
      images: any (B, H, W, C).

    Returns:
      The same.
    """
    return with_layout_constraint(images, Layout(major_to_minor=(0, 3, 1, 2)))
