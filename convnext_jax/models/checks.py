"""Checks of what the networks are asked, so that a mistake is told in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def check_images(images: jax.Array, smallest: int, network: str) -> None:
    """Checks rank, type and size of images before a network fails on them in its own words.

    Args:
      images: what the network was called with.
      smallest: the least height and width, the stride of the last stage computed.
      network: its name, for the message.

    Raises:
      ValueError: if they are not (B, H, W, C), not floats, or too small.
    """
    if images.ndim != 4:
        raise ValueError(
            f"{network} takes images (batch, height, width, channels), but got shape "
            f"{images.shape}; add a batch axis to a single image"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{network} takes normalised floating-point images, but got {images.dtype}; convert "
            f"and normalise them first"
        )
    if any(side < smallest for side in images.shape[1:3]):
        height, width = images.shape[1:3]
        raise ValueError(
            f"images of {height}×{width} pixels are too small for this {network}, whose stride of "
            f"{smallest} needs at least {smallest} in height and width; enlarge the images"
        )


def stage_indices(indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The stages whose feature maps are asked for.

    Args:
      indices: numbers of stages, or None for all of them.
      count: how many there are.

    Returns:
      The numbers, in the order given.

    Raises:
      ValueError: if a number names no stage, or there are none.
    """
    wanted = tuple(range(count) if indices is None else indices)
    if not wanted or not all(0 <= i < count for i in wanted):
        raise ValueError(
            f"feature_maps: indices must be one or more of 0..{count - 1}, the stages of this "
            f"model, but are {wanted}"
        )
    return wanted
