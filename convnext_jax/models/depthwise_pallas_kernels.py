"""The Pallas TPU kernels of the depthwise convolution: the filter, and the gradient by its taps.

Arrays lie as (pixels, channels, images) with the images in the lanes, so that every channel count
fills the registers. A grid step takes a block of rows of 128 images and of one register's channels,
parts it into channels in VMEM, and multiplies each by its matrix (`depthwise_pallas_tiles.py`).

Steps go down an image. What a product needs of the rows above and below its own block is kept in
two buffers in turn, and a step multiplies the block *before* the one that it loads, so every pixel
is read once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.models.depthwise_pallas_tiles import LANES, SUBLANES, VMEM_BYTES, Tiling
from convnext_jax.models.depthwise_pallas_words import (
    channels_in_block,
    join,
    load_words,
    one_sublane,
    split,
    word_type,
)


def filter_call(x: jax.Array, bands: jax.Array, tiling: Tiling, interpret: Any) -> jax.Array:
    """Filters images.

    Args:
      x: (H · W, C, B), float32 or bfloat16, C a multiple of `channels_in_block`, B of 128.
      bands: (C, W, k · W) float32, from `bands`.
      tiling: of the image.
      interpret: see `pl.pallas_call`.

    Returns:
      (H · W, C, B), of x's type, summed in float32.
    """
    grid, steps = _grid(x, tiling)
    block = channels_in_block(x.dtype)
    words = pltpu.VMEM((tiling.pixels * SUBLANES, LANES), word_type(x.dtype))
    return pl.pallas_call(
        functools.partial(_filter, tiling=tiling, steps=steps, exact=bool(interpret)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((block, *bands.shape[1:]), lambda c, b, s: (c, 0, 0)),
            _loaded(x, tiling),
        ],
        out_specs=_multiplied(x, tiling, steps),
        scratch_shapes=[
            pltpu.VMEM((block, tiling.outputs, tiling.inputs), x.dtype),
            _planes(x, tiling),
            words,
        ],
        compiler_params=_PARAMS,
        interpret=interpret,
        name="depthwise_filter",
    )(bands, x)


def gradient_call(x: jax.Array, gradient: jax.Array, tiling: Tiling, interpret: Any) -> jax.Array:
    """Sums, over images and output rows, what the kernel's gradient is made of.

    Args:
      x: (H · W, C, B), as for `filter_call`.
      gradient: of the filtered x; like it.
      tiling: of the image.
      interpret: see `pl.pallas_call`.

    Returns:
      (C, k, k · W) float32: the bands' gradient, summed over output columns by tap of a row.
    """
    grid, steps = _grid(x, tiling)
    block = channels_in_block(x.dtype)
    sums = (tiling.taps, tiling.band)
    return pl.pallas_call(
        functools.partial(_gradient, tiling=tiling, steps=steps, exact=bool(interpret)),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], *sums), jnp.float32),
        grid=grid,
        in_specs=[_loaded(x, tiling), _multiplied(x, tiling, steps)],
        out_specs=pl.BlockSpec((block, *sums), lambda c, b, s: (c, 0, 0)),
        scratch_shapes=[
            pltpu.VMEM((block, tiling.outputs, tiling.inputs), jnp.float32),
            _planes(x, tiling),
            pltpu.VMEM((tiling.pixels * SUBLANES, LANES), word_type(x.dtype)),
        ],
        compiler_params=_PARAMS,
        interpret=interpret,
        name="depthwise_gradient",
    )(x, gradient)


# The matrices are made, and the gradient is summed, once a block of channels: only these may be
# shared out over a chip's cores.
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)


def _grid(x: jax.Array, tiling: Tiling) -> tuple[tuple[int, int, int], int]:
    """Channels, images and steps; where there are several blocks, one step more than these."""
    _, channels, images = x.shape
    steps = 1 if tiling.blocks == 1 else tiling.blocks + 1
    return (channels // channels_in_block(x.dtype), images // LANES, steps), steps


def _loaded(x: jax.Array, tiling: Tiling) -> pl.BlockSpec:
    """The block of rows that a step loads."""
    last = tiling.blocks - 1
    shape = (tiling.pixels, channels_in_block(x.dtype), LANES)
    return pl.BlockSpec(shape, lambda c, b, s: (jnp.minimum(s, last), c, b))


def _multiplied(x: jax.Array, tiling: Tiling, steps: int) -> pl.BlockSpec:
    """The block of rows that a step multiplies."""
    shape = (tiling.pixels, channels_in_block(x.dtype), LANES)
    late = 0 if steps == 1 else 1
    return pl.BlockSpec(shape, lambda c, b, s: (jnp.maximum(s - late, 0), c, b))


def _planes(x: jax.Array, tiling: Tiling) -> Any:
    """The blocks of two steps by channel, each with the pixels before and after it."""
    buffers = 1 if tiling.blocks == 1 else 2
    return pltpu.VMEM(
        (buffers, channels_in_block(x.dtype), tiling.pixels + 2 * tiling.lead, LANES), x.dtype
    )


def _filter(
    bands_ref: Any,
    x_ref: Any,
    y_ref: Any,
    matrix_ref: Any,
    planes_ref: Any,
    words_ref: Any,
    *,
    tiling: Tiling,
    steps: int,
    exact: bool,
) -> None:
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        for channel in range(matrix_ref.shape[0]):
            matrix_ref[channel] = _matrix(bands_ref[channel], tiling).astype(matrix_ref.dtype)

    def multiply(buffer: Any) -> None:
        group = matrix_ref.shape[0] // SUBLANES
        for sublane in range(SUBLANES):
            for start in range(0, tiling.pixels, tiling.outputs):
                sums = [
                    _dot(
                        matrix_ref[channel],
                        planes_ref[buffer, channel, pl.ds(start, tiling.inputs), :],
                        (((1,), (0,)), ((), ())),
                        exact,
                    )
                    for channel in range(sublane * group, (sublane + 1) * group)
                ]
                words_ref[one_sublane(sublane, start, tiling.outputs), :] = join(sums)
        words = words_ref[...].reshape(tiling.pixels, SUBLANES, LANES)
        y_ref[...] = words if group == 1 else pltpu.bitcast(words, y_ref.dtype)

    _step(x_ref, planes_ref, words_ref, tiling, steps, multiply)


def _gradient(
    x_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
    matrix_ref: Any,
    planes_ref: Any,
    words_ref: Any,
    *,
    tiling: Tiling,
    steps: int,
    exact: bool,
) -> None:
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        matrix_ref[...] = jnp.zeros_like(matrix_ref)

    def multiply(buffer: Any) -> None:
        group = matrix_ref.shape[0] // SUBLANES
        inside = None
        if tiling.height % tiling.step_rows:
            # The last block's rows below the image are anything.
            first = (pl.program_id(2) - int(steps > 1)) * tiling.pixels
            pixel = jax.lax.broadcasted_iota(jnp.int32, (tiling.pixels, LANES), 0) + first
            inside = pixel < tiling.height * tiling.width
        load_words(gradient_ref, words_ref)
        for sublane in range(SUBLANES):
            parts = split(words_ref[one_sublane(sublane, 0, tiling.pixels), :], gradient_ref.dtype)
            for i, part in enumerate(parts):
                channel = sublane * group + i
                if inside is not None:
                    part = jnp.where(inside, part, jnp.zeros_like(part))
                matrix_ref[channel] += sum(
                    _dot(
                        part[start : start + tiling.outputs].astype(gradient_ref.dtype),
                        planes_ref[buffer, channel, pl.ds(start, tiling.inputs), :],
                        (((1,), (1,)), ((), ())),
                        exact,
                    )
                    for start in range(0, tiling.pixels, tiling.outputs)
                )

    _step(x_ref, planes_ref, words_ref, tiling, steps, multiply)

    @pl.when((pl.program_id(1) == pl.num_programs(1) - 1) & (pl.program_id(2) == steps - 1))
    def _() -> None:
        for channel in range(matrix_ref.shape[0]):
            band = _band(matrix_ref[channel], tiling)
            for tap in range(tiling.taps):
                sums_ref[channel, tap] = _along_diagonal(band, tap - tiling.margin, tiling.width)


def _step(
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


def _matrix(band: jax.Array, tiling: Tiling) -> jax.Array:
    """(W, k · W), shifted for each output row: (outputs, inputs)."""
    rows = []
    for start, stop, column in tiling.spans:
        right = tiling.inputs - column - (stop - start)
        rows.append(jnp.pad(band[:, start:stop], ((0, 0), (column, right))))
    return jnp.concatenate(rows)


def _band(matrix: jax.Array, tiling: Tiling) -> jax.Array:
    """The transpose of `_matrix`: (outputs, inputs) added up to (W, k · W)."""
    total = jnp.zeros((tiling.width, tiling.band), matrix.dtype)
    for row, (start, stop, column) in enumerate(tiling.spans):
        part = matrix[row * tiling.width : (row + 1) * tiling.width, column : column + stop - start]
        total += jnp.pad(part, ((0, 0), (start, tiling.band - stop)))
    return total


def _along_diagonal(band: jax.Array, diagonal: int, width: int) -> jax.Array:
    """Sums (W, k · W) over rows j, of each of the k parts column j + diagonal alone: (k · W,)."""
    row = jax.lax.broadcasted_iota(jnp.int32, band.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, band.shape, 1) % width
    return jnp.where(column - row == diagonal, band, 0).sum(axis=0)


def _dot(a: jax.Array, b: jax.Array, contracting: Any, exact: bool) -> jax.Array:
    """The product in float32; `exact` where the CPU has none of bfloat16 with such sums."""
    if exact:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, contracting, precision=precision, preferred_element_type=jnp.float32
    )
