"""The Pallas TPU kernels of a block's second half: layer norm, product, GELU, product, addition.

Arrays lie as (pixels, channels, images) with the images in the lanes, as in
`depthwise_pallas_steps.py`: the layer norm is then a sum over sublanes, and every channel count
fills the registers. A grid step takes some pixels of 128 images, and goes through the hidden layer
of each group of these in chunks, so that it never leaves VMEM; the backward pass makes it anew.

The layer norm has no scale and bias of its own here, nor the second product a layer scale: what
multiplies channels is part of the weights (`mlp_pallas.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.models.gelu import gelu_and_slope
from convnext_jax.models.mlp_pallas_tiles import LANES, MlpTiling
from convnext_jax.models.precision import dot_in_float32

_ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


def forward_call(
    x: jax.Array,
    conv: jax.Array,
    keep: jax.Array,
    weights: tuple[jax.Array, ...],
    tiling: MlpTiling,
    interpret: Any,
) -> jax.Array:
    """Adds the branch to the residual stream.

    Args:
      x: (P, C, B), the residual stream: float32 or bfloat16, B a multiple of 128.
      conv: of x's shape and type: the depthwise convolution without its bias.
      keep: (1, B) float32, the factor of each image's branch.
      weights: with hidden chunks of h: the convolution's bias (C, 128), `expand` (4C/h, h, C) of
        x's type, its bias (4C/h, h, 128), `project` (4C/h, C, h) of x's type and its bias (C, 128).
        The biases are float32, each repeated for the 128 lanes.
      tiling: of the arrays.
      interpret: see `pl.pallas_call`.

    Returns:
      Of x's shape and type.
    """
    bias, expand, expand_bias, project, project_bias = weights
    return pl.pallas_call(
        functools.partial(_forward, tiling=tiling, exact=bool(interpret)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=tiling.grid,
        in_specs=[
            tiling.pixel_block,
            tiling.pixel_block,
            tiling.image_block,
            *(_resident(w) for w in weights),
        ],
        out_specs=tiling.pixel_block,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tiling.vmem
        ),
        cost_estimate=tiling.cost(products=2, arrays=3),
        interpret=interpret,
        name="mlp_forward",
    )(x, conv, keep, bias, expand, expand_bias, project, project_bias)


def backward_call(
    conv: jax.Array,
    gradient: jax.Array,
    keep: jax.Array,
    weights: tuple[jax.Array, ...],
    tiling: MlpTiling,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """The branch's gradients.

    Args:
      conv: (P, C, B), as for `forward_call`.
      gradient: of the result; of conv's shape and type.
      keep: as for `forward_call`.
      weights: the convolution's bias (C, 128), `expand` (4C/h, h, C), its bias (4C/h, h, 128), its
        transpose (4C/h, C, h), and the transpose of `project` (4C/h, h, C).
      tiling: of the arrays.
      interpret: see `pl.pallas_call`.

    Returns:
      Gradients by conv, of its type, and in float32 by the convolution's bias, by `expand`, its
      bias, `project` transposed and its bias, each of the shape given above: those by biases are
      sums by lane.
    """
    bias, expand, expand_bias, _, project = weights
    sums = [
        jax.ShapeDtypeStruct(w.shape, jnp.float32)
        for w in (bias, expand, expand_bias, project, bias)
    ]
    return pl.pallas_call(
        functools.partial(_backward, tiling=tiling, exact=bool(interpret)),
        out_shape=[jax.ShapeDtypeStruct(conv.shape, conv.dtype), *sums],
        grid=tiling.grid,
        in_specs=[
            tiling.pixel_block,
            tiling.pixel_block,
            tiling.image_block,
            *(_resident(w) for w in weights),
        ],
        out_specs=[tiling.pixel_block, *(_resident(s) for s in sums)],
        # The sums are added to by every step.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=tiling.vmem
        ),
        cost_estimate=tiling.cost(products=5, arrays=3),
        interpret=interpret,
        name="mlp_backward",
    )(conv, gradient, keep, *weights)


def _resident(array: Any) -> pl.BlockSpec:
    """All of an array, at every step."""
    origin = (0,) * len(array.shape)
    return pl.BlockSpec(array.shape, lambda b, p: origin, pipeline_mode=pl.Buffered(1))


def _forward(
    x_ref: Any,
    conv_ref: Any,
    keep_ref: Any,
    bias_ref: Any,
    expand_ref: Any,
    expand_bias_ref: Any,
    project_ref: Any,
    project_bias_ref: Any,
    y_ref: Any,
    *,
    tiling: MlpTiling,
    exact: bool,
) -> None:
    def group(first: Any) -> None:
        pixels = [first + i for i in range(tiling.group)]
        normalised = [_normalise(conv_ref, bias_ref, pixel, tiling)[0] for pixel in pixels]
        columns = _side_by_side(normalised, x_ref.dtype)

        def chunk(i: Any, branch: jax.Array) -> jax.Array:
            hidden = dot_in_float32(expand_ref[i], columns, _ROWS_BY_COLUMNS, exact=exact)
            hidden += _repeat(expand_bias_ref[i], tiling)
            active = _gelu(hidden, x_ref.dtype)[0].astype(x_ref.dtype)
            return branch + dot_in_float32(project_ref[i], active, _ROWS_BY_COLUMNS, exact=exact)

        branch = tiling.over_chunks(chunk, _repeat(project_bias_ref[...], tiling))
        for i, pixel in enumerate(pixels):
            kept = branch[:, i * LANES : (i + 1) * LANES] * keep_ref[...]
            y_ref[pixel] = (x_ref[pixel].astype(jnp.float32) + kept).astype(y_ref.dtype)

    tiling.over_groups(group)


def _backward(
    conv_ref: Any,
    gradient_ref: Any,
    keep_ref: Any,
    bias_ref: Any,
    expand_ref: Any,
    expand_bias_ref: Any,
    expand_transposed_ref: Any,
    project_ref: Any,
    by_conv_ref: Any,
    by_bias_ref: Any,
    by_expand_ref: Any,
    by_expand_bias_ref: Any,
    by_project_ref: Any,
    by_project_bias_ref: Any,
    *,
    tiling: MlpTiling,
    exact: bool,
) -> None:
    dtype = conv_ref.dtype
    sums = (
        by_bias_ref,
        by_expand_ref,
        by_expand_bias_ref,
        by_project_ref,
        by_project_bias_ref,
    )

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _() -> None:
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def group(first: Any) -> None:
        pixels = [first + i for i in range(tiling.group)]
        columns = _side_by_side(
            [_normalise(conv_ref, bias_ref, pixel, tiling)[0] for pixel in pixels], dtype
        )
        kept = [gradient_ref[pixel].astype(jnp.float32) * keep_ref[...] for pixel in pixels]
        by_project_bias_ref[...] += sum(kept)
        by_branch = _side_by_side(kept, dtype)

        def chunk(i: Any, by_columns: jax.Array) -> jax.Array:
            hidden = dot_in_float32(expand_ref[i], columns, _ROWS_BY_COLUMNS, exact=exact)
            active, slope = _gelu(hidden + _repeat(expand_bias_ref[i], tiling), dtype)
            by_active = dot_in_float32(project_ref[i], by_branch, _ROWS_BY_COLUMNS, exact=exact)
            by_hidden = by_active * slope
            by_expand_bias_ref[i] += sum(_apart(by_hidden, tiling))
            by_hidden = by_hidden.astype(dtype)
            by_project_ref[i] += dot_in_float32(
                active.astype(dtype), by_branch, _ROWS_BY_ROWS, exact=exact
            )
            by_expand_ref[i] += dot_in_float32(by_hidden, columns, _ROWS_BY_ROWS, exact=exact)
            return by_columns + dot_in_float32(
                expand_transposed_ref[i], by_hidden, _ROWS_BY_COLUMNS, exact=exact
            )

        zeros = jnp.zeros((columns.shape[0], tiling.group * LANES), jnp.float32)
        by_columns = _apart(tiling.over_chunks(chunk, zeros), tiling)
        for pixel, by_normalised in zip(pixels, by_columns, strict=True):
            normalised, scale = _normalise(conv_ref, bias_ref, pixel, tiling)
            along = (by_normalised * normalised).mean(axis=0, keepdims=True)
            centred = by_normalised - by_normalised.mean(axis=0, keepdims=True)
            by_conv = scale * (centred - normalised * along)
            by_bias_ref[...] += by_conv
            by_conv_ref[pixel] = by_conv.astype(dtype)

    tiling.over_groups(group)


def _normalise(
    conv_ref: Any, bias_ref: Any, pixel: Any, tiling: MlpTiling
) -> tuple[jax.Array, jax.Array]:
    """A pixel's layer norm without scale and bias (C, 128), and the factor that it was made by."""
    values = conv_ref[pixel].astype(jnp.float32) + bias_ref[...]
    centred = values - values.mean(axis=0, keepdims=True)
    variance = jnp.square(centred).mean(axis=0, keepdims=True)
    scale = jax.lax.rsqrt(variance + tiling.epsilon)
    return centred * scale, scale


def _gelu(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """GELU and its derivative in float32, exact where the arrays are float32."""
    if dtype == jnp.bfloat16:
        return gelu_and_slope(x)
    normal = 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))
    return x * normal, normal + x * jnp.exp(-0.5 * x * x) * 0.3989422804014327


def _side_by_side(pixels: list[jax.Array], dtype: Any) -> jax.Array:
    """Pixels (C, 128) as (C, 128 · their number)."""
    return jnp.concatenate([pixel.astype(dtype) for pixel in pixels], axis=1)


def _apart(columns: jax.Array, tiling: MlpTiling) -> list[jax.Array]:
    """The inverse of `_side_by_side`."""
    return [columns[:, i * LANES : (i + 1) * LANES] for i in range(tiling.group)]


def _repeat(bias: jax.Array, tiling: MlpTiling) -> jax.Array:
    """(R, 128) for every pixel of a group."""
    return jnp.concatenate([bias] * tiling.group, axis=1)
