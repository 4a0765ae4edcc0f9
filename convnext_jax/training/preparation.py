"""From a batch as it is loaded to what the model is trained on, on the accelerators."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from convnext_jax.data.augment import AugmentConfig, augment
from convnext_jax.data.mixing import MixConfig, apply_mixture, draw_mixture, smooth_one_hot
from convnext_jax.training.sharding import batch_sharding, replicated

Batch = dict[str, jax.Array]


def prepare_batch(
    key: jax.Array,
    batch: Batch,
    *,
    num_classes: int,
    augment_config: AugmentConfig,
    mix_config: MixConfig,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What the model is trained on: a global batch augmented, normalised and mixed.

    `augment` goes through the images one by one; over a batch that is cut, that loop must be each
    device's own.

    Args:
      key: random key of the step.
      batch: "image", uint8 (B, H, W, 3), and "label", int32 (B,).
      num_classes: K.
      augment_config: the policy, normalisation and random erasing.
      mix_config: mixup, cutmix and label smoothing.
      mesh: over whose devices the batch is cut; None for one device.

    Returns:
      float32 images (B, H, W, 3), and float32 soft targets (B, K) with rows of sum 1; the same for
      any number of devices.
    """
    key_augment, key_mix = jax.random.split(key)
    images = batch["image"]
    size, height, width, _ = images.shape
    images = on_each_device(
        lambda images, indices: augment(key_augment, images, indices, augment_config), mesh
    )(images, jnp.arange(size))
    targets = smooth_one_hot(batch["label"], num_classes, mix_config.label_smoothing)
    # Every device draws for all. Cut among them, the loop that rejects a draw of Beta's would ask
    # all the others at each turn.
    mixture = on_each_device(
        lambda key: draw_mixture(key, size, height, width, mix_config), mesh, rows=False
    )(key_mix)
    if mixture is None:
        return images, targets
    return apply_mixture(mixture, images, targets)


def on_each_device(
    function: Callable[..., Any], mesh: Mesh | None, *, rows: bool = True
) -> Callable[..., Any]:
    """Lets each device run a function by itself.

    Args:
      function: of arrays.
      mesh: the devices; None for one.
      rows: whether arguments and results are cut along their first axis, as batches are; else they
        are whole on every device.

    Returns:
      A function of the same arguments and results.
    """
    if mesh is None:
        return function
    spec = batch_sharding(mesh).spec if rows else replicated(mesh).spec
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)
