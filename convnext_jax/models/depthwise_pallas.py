"""The depthwise convolution on a TPU, by Pallas kernels that use its matrix units.

XLA's own depthwise convolution keeps the matrix units nearly idle. Here each channel is a product
of a banded matrix with the pixels of 128 images: see `depthwise_pallas_tiles.py`. Input and output
lie as (H · W, C, B) in memory, with the batch in the lanes; whether that costs a transposition is
up to XLA's choice for what comes before and after: with 384 channels and more it has them in the
lanes there, and turns them round.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from convnext_jax.models.depthwise_pallas_columns import Columns, columns
from convnext_jax.models.depthwise_pallas_filter import filter_call
from convnext_jax.models.depthwise_pallas_gradient import gradient_call
from convnext_jax.models.depthwise_pallas_tiles import LANES, bands, taps
from convnext_jax.models.depthwise_pallas_words import channels_in_block

_DTYPES = (jnp.float32, jnp.bfloat16)
# Of the images that are filtered, the least share that must be more than padding. By the compiler's
# estimates for two blocks of 384 channels on v5e, the kernels' bundles included, 256 images take
# 0.81 of XLA's cycles, and 64 that are padded to 128 take 1.03.
LEAST_SHARE = 0.75


def is_supported(shape: tuple[int, ...], kernel_size: int, dtype: Any) -> bool:
    """Whether the kernels take such images.

    Args:
      shape: (B, H, W, C) of the images.
      kernel_size: k.
      dtype: of the images.

    Returns:
      False where even a quarter of the image's columns is too wide for 16 MiB of VMEM, or the type
      is another than float32 and bfloat16.
    """
    _, height, width, _ = shape
    return dtype in _DTYPES and columns(height, width, kernel_size) is not None


def pays(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether the kernels are faster than XLA's convolution, padding and layouts included.

    Args:
      shape: (B, H, W, C) of the images that one device has.
      dtype: of the images.
    """
    # In float32 each product takes six passes, and what that comes to has not been counted.
    return dtype == jnp.bfloat16 and shape[0] >= LEAST_SHARE * (shape[0] + -shape[0] % LANES)


def forward(x: jax.Array, kernel: jax.Array, *, interpret: Any = False) -> jax.Array:
    """Correlates each channel of x with its own filter, zero-padded to the same height and width.

    Batches are padded to a multiple of 128 images, and channels to a multiple of 16 (8 in float32).
    With the kernel turned by 180° this is also the gradient by x.

    Args:
      x: (B, H, W, C), float32 or bfloat16.
      kernel: (k, k, 1, C) with odd k, of x's type.
      interpret: `pltpu.InterpretParams()` to run on the CPU; see `pl.pallas_call`.

    Returns:
      (B, H, W, C), of x's type, summed in float32.

    Raises:
      ValueError: if the images are not supported, see `is_supported`.
    """
    cut = _cut(x, kernel.shape[0])
    channels = -kernel.shape[-1] % channels_in_block(x.dtype)
    padded = jnp.pad(kernel.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, channels)))
    band = bands(padded, cut.tiling.width)
    results = []
    for piece in cut.with_neighbours(x):
        y = filter_call(_to_lanes(piece), band, cut.tiling, interpret)
        results.append(_from_lanes(y, piece.shape))
    return cut.joined(results, x.shape[2])


def kernel_gradient(
    x: jax.Array, g: jax.Array, kernel_size: int, *, interpret: Any = False
) -> jax.Array:
    """The gradient by the kernel: the sum of x[b, i + u - m, j + v - m, c] · g[b, i, j, c].

    Args:
      x: (B, H, W, C), what was filtered.
      g: (B, H, W, C), the gradient by the result, of x's type.
      kernel_size: k; m is k // 2.
      interpret: see `forward`.

    Returns:
      (k, k, 1, C) float32.
    """
    cut = _cut(x, kernel_size)
    sums = [
        gradient_call(_to_lanes(x), _to_lanes(g), cut.tiling, interpret)
        for x, g in zip(cut.with_neighbours(x), cut.alone(g), strict=True)
    ]
    return taps(functools.reduce(jnp.add, sums), kernel_size)[..., : x.shape[-1]]


def _cut(x: jax.Array, kernel_size: int) -> Columns:
    _, height, width, _ = x.shape
    cut = columns(height, width, kernel_size)
    if cut is None or x.dtype not in _DTYPES:
        raise ValueError(
            f"the Pallas kernels take float32 and bfloat16 images whose rows fit VMEM, but these "
            f"are {width} pixels wide and {x.dtype}; use implementation='xla'"
        )
    return cut


def _to_lanes(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (H · W, C, B), padded with zeros to whole blocks."""
    batch, height, width, channels = x.shape
    x = x.transpose(1, 2, 3, 0).reshape(height * width, channels, batch)
    return jnp.pad(x, ((0, 0), (0, -channels % channels_in_block(x.dtype)), (0, -batch % LANES)))


def _from_lanes(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, height, width, channels = shape
    y = y[:, :channels, :batch].reshape(height, width, channels, batch)
    return y.transpose(3, 0, 1, 2)
