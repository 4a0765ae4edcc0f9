"""How the Pallas kernels of the depthwise convolution go through images: the grid and its steps.

Arrays lie as (pixels, channels, images) with the images in the lanes, so that every channel count
fills the registers. A grid step takes a block of rows of 128 images and of one register's channels,
parts it into channels in VMEM, and multiplies each by its matrix (`depthwise_pallas_tiles.py`).

Steps go down an image. What a product needs of the rows above and below its own block is kept in
two buffers in turn, and a step multiplies the block *before* the one that it loads, so every pixel
is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.models.depthwise_pallas_tiles import LANES, SUBLANES, VMEM_BYTES, Tiling
from convnext_jax.models.depthwise_pallas_words import (
    channels_in_block,
    load_words,
    one_sublane,
    split,
    word_type,
)

# The matrices are made, and the gradient is summed, once a block of channels: only these may be
# shared out over a chip's cores.
PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)


def grid(x: jax.Array, tiling: Tiling) -> tuple[tuple[int, int, int], int]:
    """Channels, images and steps; where there are several blocks, one step more than these."""
    _, channels, images = x.shape
    steps = 1 if tiling.blocks == 1 else tiling.blocks + 1
    return (channels // channels_in_block(x.dtype), images // LANES, steps), steps


def loaded_block(x: jax.Array, tiling: Tiling) -> pl.BlockSpec:
    """The block of rows that a step loads."""
    last = tiling.blocks - 1
    shape = (tiling.pixels, channels_in_block(x.dtype), LANES)
    return pl.BlockSpec(shape, lambda c, b, s: (jnp.minimum(s, last), c, b))


def multiplied_block(x: jax.Array, tiling: Tiling, steps: int) -> pl.BlockSpec:
    """The block of rows that a step multiplies."""
    shape = (tiling.pixels, channels_in_block(x.dtype), LANES)
    late = 0 if steps == 1 else 1
    return pl.BlockSpec(shape, lambda c, b, s: (jnp.maximum(s - late, 0), c, b))


def plane_scratch(x: jax.Array, tiling: Tiling) -> Any:
    """The blocks of two steps by channel, each with the pixels before and after it."""
    buffers = 1 if tiling.blocks == 1 else 2
    return pltpu.VMEM(
        (buffers, channels_in_block(x.dtype), tiling.pixels + 2 * tiling.lead, LANES), x.dtype
    )


def word_scratch(x: jax.Array, tiling: Tiling) -> Any:
    """A block as words, between VMEM's blocks and the channels' planes."""
    return pltpu.VMEM((tiling.pixels * SUBLANES, LANES), word_type(x.dtype))


def cost(x: jax.Array, tiling: Tiling) -> pl.CostEstimate:
    """What the compiler plans with: the matrix units' work, and two images in and out of memory."""
    _, channels, images = x.shape
    products = channels * images * tiling.blocks * tiling.pixels
    return pl.CostEstimate(
        flops=2 * products * tiling.inputs,
        bytes_accessed=2 * x.size * x.dtype.itemsize,
        transcendentals=0,
    )


def run_step(
    x_ref: Any,
    planes_ref: Any,
    words_ref: Any,
    tiling: Tiling,
    steps: int,
    multiply: Callable[[Any], None],
) -> None:
    """Loads a block into one buffer, and multiplies that of the step before in the other."""
    step, lead, pixels = pl.program_id(2), tiling.lead, tiling.pixels
    block = slice(lead, lead + pixels)
    before, after = slice(0, lead), slice(lead + pixels, pixels + 2 * lead)
    # In the last block, what lies below the image.
    rest = tiling.height % tiling.step_rows
    below = slice(lead + rest * tiling.width, lead + pixels)

    def load(buffer: Any) -> None:
        load_words(x_ref, words_ref)
        group = planes_ref.shape[1] // SUBLANES
        for sublane in range(SUBLANES):
            parts = split(words_ref[one_sublane(sublane, 0, pixels), :], x_ref.dtype)
            for i, part in enumerate(parts):
                planes_ref[buffer, sublane * group + i, block, :] = part.astype(x_ref.dtype)

    def clear(buffer: Any, rows: slice) -> None:
        shape = (planes_ref.shape[1], rows.stop - rows.start, LANES)
        planes_ref[buffer, :, rows, :] = jnp.zeros(shape, planes_ref.dtype)

    if steps == 1:
        if lead:
            clear(0, before)
            clear(0, after)
        load(0)
        if rest:
            clear(0, below)
        multiply(0)
        return

    new = step % 2
    old = 1 - new

    @pl.when(step == 0)
    def _above_the_image() -> None:
        clear(0, before)

    @pl.when(step < steps - 1)
    def _load_next() -> None:
        load(new)

    if rest:

        @pl.when(step == steps - 2)
        def _rest_below_the_image() -> None:
            clear(new, below)

    @pl.when(step == steps - 1)
    def _below_the_image() -> None:
        clear(old, after)

    @pl.when((step > 0) & (step < steps - 1))
    def _pass_on_halos() -> None:
        planes_ref[new, :, before, :] = planes_ref[old, :, slice(pixels, lead + pixels), :]
        planes_ref[old, :, after, :] = planes_ref[new, :, slice(lead, 2 * lead), :]

    @pl.when(step > 0)
    def _multiply_previous() -> None:
        multiply(old)
