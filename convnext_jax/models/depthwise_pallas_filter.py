"""The Pallas TPU kernel that filters: the depthwise convolution, and its gradient by the input."""

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
from convnext_jax.models.depthwise_pallas_words import channels_in_block, join, one_sublane
from convnext_jax.models.precision import dot_in_float32


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
    whole, steps = grid(x, tiling)
    block = channels_in_block(x.dtype)
    return pl.pallas_call(
        functools.partial(_filter, tiling=tiling, steps=steps, exact=bool(interpret)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=whole,
        in_specs=[
            pl.BlockSpec((block, *bands.shape[1:]), lambda c, b, s: (c, 0, 0)),
            loaded_block(x, tiling),
        ],
        out_specs=multiplied_block(x, tiling, steps),
        scratch_shapes=[
            pltpu.VMEM((block, tiling.outputs, tiling.inputs), x.dtype),
            plane_scratch(x, tiling),
            word_scratch(x, tiling),
        ],
        compiler_params=PARAMS,
        cost_estimate=cost(x, tiling),
        interpret=interpret,
        name="depthwise_filter",
    )(bands, x)


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
                    dot_in_float32(
                        matrix_ref[channel],
                        planes_ref[buffer, channel, pl.ds(start, tiling.inputs), :],
                        (((1,), (0,)), ((), ())),
                        exact=exact,
                    )
                    for channel in range(sublane * group, (sublane + 1) * group)
                ]
                words_ref[one_sublane(sublane, start, tiling.outputs), :] = join(sums)
        words = words_ref[...].reshape(tiling.pixels, SUBLANES, LANES)
        y_ref[...] = words if group == 1 else pltpu.bitcast(words, y_ref.dtype)

    run_step(x_ref, planes_ref, words_ref, tiling, steps, multiply)


def _matrix(band: jax.Array, tiling: Tiling) -> jax.Array:
    """(W, k · W), shifted for each output row: (outputs, inputs)."""
    rows = []
    for start, stop, column in tiling.spans:
        right = tiling.inputs - column - (stop - start)
        rows.append(jnp.pad(band[:, start:stop], ((0, 0), (column, right))))
    return jnp.concatenate(rows)
