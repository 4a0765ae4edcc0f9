"""Multiply-accumulate and parameter counts of networks, without running them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from convnext_jax.analysis.traced_counts import traced_counts
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.registry import Network


def count_macs(model: Network, image_size: int | tuple[int, int], in_channels: int = 3) -> int:
    """Counts the multiply-accumulates of one image's forward pass.

    As the paper's FLOPs columns do, it counts convolutions and linear layers (one product and its
    addition are one), padding included, and leaves out norms, activations and additions. Of a
    ConvNeXt it computes from the module's arguments and traces nothing; see `traced_counts` for the
    others.

    Args:
      model: any network of the registry, unbound.
      image_size: side of a square image, or (height, width), in pixels.
      in_channels: channels of the image.

    Returns:
      The count for a batch of one.

    Raises:
      ValueError: if the image is smaller than the model's last stride.
    """
    height, width = _height_width(image_size)
    if min(height, width) < model.strides[-1]:
        raise ValueError(
            f"an image of {height}×{width} pixels is smaller than the model's stride of "
            f"{model.strides[-1]}"
        )
    if not isinstance(model, ConvNeXt):
        return traced_counts(model, (height, width), in_channels).macs
    total = 0
    previous = in_channels
    for i, (depth, dim, stride) in enumerate(
        zip(model.depths, model.dims, model.strides, strict=True)
    ):
        positions = (height // stride) * (width // stride)
        entry_kernel = model.stem_kernel_size if i == 0 else 2
        entry = entry_kernel**2 * previous * dim
        block = model.kernel_size**2 * dim + 2 * dim * (4 * dim)
        total += positions * (entry + depth * block)
        previous = dim
    if model.num_classes:
        if model.head_hidden:
            total += previous * model.head_hidden
            previous = model.head_hidden
        total += previous * model.num_classes
    return total


def count_parameters(
    model: Network, image_size: int | tuple[int, int] | None = None, in_channels: int = 3
) -> int:
    """Counts the parameters that `model.init` would create, allocating none of them.

    Args:
      model: any network of the registry, unbound.
      image_size: side or (height, width) of the image that is traced, in pixels; the count does not
        depend on it. None for the smallest that the model takes.
      in_channels: channels of the image.

    Returns:
      The number of trainable scalars.
    """
    height, width = _height_width(model.strides[-1] if image_size is None else image_size)
    images = jax.ShapeDtypeStruct((1, height, width, in_channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def _height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size
