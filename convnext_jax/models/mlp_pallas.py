"""The second half of a block on a TPU, by Pallas kernels that keep the hidden layer in VMEM.

XLA writes the hidden layer, four times as wide as the residual stream, to the chip's memory and
reads it again several times: that takes longer than the products. Here one kernel does all from the
depthwise convolution's bias to the residual addition, and another all of its backward pass, which
makes the hidden layer anew; nothing but the depthwise convolution's result is kept for it.

The arrays lie as (H · W, C, B) in memory, with the batch in the lanes, as in `depthwise_pallas.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.models.mlp_pallas_kernels import backward_call, forward_call
from convnext_jax.models.mlp_pallas_tiles import LANES, MlpTiling, mlp_tiling

_DTYPES = (jnp.float32, jnp.bfloat16)


class Weights(NamedTuple):
    """Of a branch: y = project(gelu(expand(normalise(conv + bias)))), all float32.

    Attributes:
      bias: (C,), of the depthwise convolution.
      expand: (C, 4C).
      expand_bias: (4C,).
      project: (4C, C).
      project_bias: (C,).
    """

    bias: jax.Array
    expand: jax.Array
    expand_bias: jax.Array
    project: jax.Array
    project_bias: jax.Array


def fold(
    bias: jax.Array,
    norm: tuple[jax.Array, jax.Array],
    expand: tuple[jax.Array, jax.Array],
    project: tuple[jax.Array, jax.Array],
    layer_scale: jax.Array | None,
) -> Weights:
    """Multiplies the layer norm's scale, its bias, and the layer scale into the products' weights.

    Autodiff through this gives all their gradients, so that the kernels need not know of them.

    Args:
      bias: of the depthwise convolution, (C,).
      norm: scale and bias, (C,) each.
      expand: kernel (C, 4C) and bias (4C,).
      project: kernel (4C, C) and bias (C,).
      layer_scale: (C,), or None.

    Returns:
      The weights of a branch whose layer norm has no scale and bias.
    """
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    scale, shift = (wide(a) for a in norm)
    first, first_bias = (wide(a) for a in expand)
    last, last_bias = (wide(a) for a in project)
    gamma = jnp.ones_like(last_bias) if layer_scale is None else wide(layer_scale)
    shifted = jnp.matmul(shift, first, precision=jax.lax.Precision.HIGHEST)
    return Weights(
        wide(bias),
        scale[:, None] * first,
        first_bias + shifted,
        last * gamma[None],
        last_bias * gamma,
    )


def why_not(shape: tuple[int, ...], dtype: Any) -> str | None:
    """Tells whether the kernels take such images, on the TPU that is traced for.

    Args:
      shape: (B, H, W, C) of the residual stream.
      dtype: of it.

    Returns:
      What they take instead; None if they take these.
    """
    _, height, width, channels = shape
    if dtype not in _DTYPES or channels % 32:
        return (
            f"float32 or bfloat16 and a multiple of 32 channels, but they are {jnp.dtype(dtype)} "
            f"and {channels}"
        )
    cut = mlp_tiling(height * width, channels, LANES, jnp.dtype(dtype).itemsize, 0.0)
    # XLA keeps some of it for itself.
    most = pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8
    if cut.vmem > most:
        return (
            f"weights that fit VMEM, but those of {channels} channels need "
            f"{cut.vmem // 2**20} MiB and there are {most // 2**20}"
        )
    return None


def forward(
    x: jax.Array,
    conv: jax.Array,
    keep: jax.Array,
    weights: Weights,
    epsilon: float,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Gives x + keep · branch(conv).

    Batches are padded to a multiple of 128 images.

    Args:
      x: (B, H, W, C), float32 or bfloat16.
      conv: of x's shape and type: the depthwise convolution without its bias.
      keep: (B,) float32, the factor of each image's branch.
      weights: of the branch.
      epsilon: of the layer norm.
      interpret: `pltpu.InterpretParams()` to run on the CPU; see `pl.pallas_call`.

    Returns:
      Of x's shape and type.
    """
    lanes, cut = _to_lanes(x), _tiling(x, epsilon)
    w = weights
    tiles = (
        _repeated(w.bias),
        _chunks(w.expand, cut).astype(x.dtype),
        _chunks(_repeated(w.expand_bias).T, cut),
        _chunks(w.project.T, cut).swapaxes(1, 2).astype(x.dtype),
        _repeated(w.project_bias),
    )
    y = forward_call(lanes, _to_lanes(conv), _keep(keep), tiles, cut, interpret)
    return _from_lanes(y, x.shape)


def backward(
    conv: jax.Array,
    gradient: jax.Array,
    keep: jax.Array,
    weights: Weights,
    epsilon: float,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, Weights]:
    """The gradients of `forward`; that by x is the gradient given.

    Args:
      conv: see `forward`.
      gradient: by the result, of its shape and type.
      keep: see `forward`.
      weights: see `forward`.
      epsilon: see `forward`.
      interpret: see `forward`.

    Returns:
      The gradient by conv, of its shape and type, and by the weights, float32.
    """
    cut, w = _tiling(conv, epsilon), weights
    expand = _chunks(w.expand, cut).astype(conv.dtype)
    tiles = (
        _repeated(w.bias),
        expand,
        _chunks(_repeated(w.expand_bias).T, cut),
        expand.swapaxes(1, 2),
        _chunks(w.project.T, cut).astype(conv.dtype),
    )
    by_conv, *sums = backward_call(
        _to_lanes(conv), _to_lanes(gradient), _keep(keep), tiles, cut, interpret
    )
    by_bias, by_expand, by_expand_bias, by_project, by_project_bias = sums
    hidden = w.expand_bias.size
    by_weights = Weights(
        by_bias.sum(-1),
        by_expand.reshape(hidden, -1).T,
        by_expand_bias.sum(-1).reshape(hidden),
        by_project.reshape(hidden, -1),
        by_project_bias.sum(-1),
    )
    return _from_lanes(by_conv, conv.shape), by_weights


def _tiling(x: jax.Array, epsilon: float) -> MlpTiling:
    batch, height, width, channels = x.shape
    images = batch + -batch % LANES
    return mlp_tiling(height * width, channels, images, x.dtype.itemsize, epsilon)


def _to_lanes(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (H · W, C, B), padded with zeros to a multiple of 128 images."""
    batch, height, width, channels = x.shape
    x = x.transpose(1, 2, 3, 0).reshape(height * width, channels, batch)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -batch % LANES)))


def _from_lanes(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, height, width, channels = shape
    return y[..., :batch].reshape(height, width, channels, batch).transpose(3, 0, 1, 2)


def _keep(keep: jax.Array) -> jax.Array:
    """(B,) to (1, B), padded with zeros, which keep padding out of the gradients."""
    return jnp.pad(keep, (0, -keep.size % LANES))[None]


def _repeated(bias: jax.Array) -> jax.Array:
    """(R,) for every lane: (R, 128)."""
    return jnp.broadcast_to(bias[:, None], (bias.size, LANES))


def _chunks(weights: jax.Array, cut: MlpTiling) -> jax.Array:
    """(C, 4C) to (chunks, hidden channels of one, C)."""
    return weights.T.reshape(cut.chunks, cut.chunk, -1)
