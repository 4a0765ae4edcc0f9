"""The Pallas TPU kernel of the depthwise convolution's gradient by its taps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.models.depthwise_pallas_steps import (
    PARAMS,
    cost,
    grid,
    loaded_block,
    multiplied_block,
    plane_scratch,
    run_step,
    word_scratch,
)
from convnext_jax.models.depthwise_pallas_tiles import LANES, SUBLANES, Tiling
from convnext_jax.models.depthwise_pallas_words import (
    channels_in_block,
    load_words,
    one_sublane,
    split,
)
from convnext_jax.models.precision import dot_in_float32


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
    whole, steps = grid(x, tiling)
    block = channels_in_block(x.dtype)
    sums = (tiling.taps, tiling.band)
    return pl.pallas_call(
        functools.partial(_gradient, tiling=tiling, steps=steps, exact=bool(interpret)),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], *sums), jnp.float32),
        grid=whole,
        in_specs=[loaded_block(x, tiling), multiplied_block(x, tiling, steps)],
        out_specs=pl.BlockSpec((block, *sums), lambda c, b, s: (c, 0, 0)),
        scratch_shapes=[
            pltpu.VMEM((block, tiling.outputs, tiling.inputs), jnp.float32),
            plane_scratch(x, tiling),
            word_scratch(x, tiling),
        ],
        compiler_params=PARAMS,
        cost_estimate=cost(x, tiling),
        interpret=interpret,
        name="depthwise_gradient",
    )(x, gradient)


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
                    dot_in_float32(
                        part[start : start + tiling.outputs].astype(gradient_ref.dtype),
                        planes_ref[buffer, channel, pl.ds(start, tiling.inputs), :],
                        (((1,), (1,)), ((), ())),
                        exact=exact,
                    )
                    for start in range(0, tiling.pixels, tiling.outputs)
                )

    run_step(x_ref, planes_ref, words_ref, tiling, steps, multiply)

    @pl.when((pl.program_id(1) == pl.num_programs(1) - 1) & (pl.program_id(2) == steps - 1))
    def _() -> None:
        for channel in range(matrix_ref.shape[0]):
            band = _band(matrix_ref[channel], tiling)
            for tap in range(tiling.taps):
                sums_ref[channel, tap] = _along_diagonal(band, tap - tiling.margin, tiling.width)


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
