"""The depthwise convolution on a TPU, by Pallas kernels that use its matrix units.

XLA's own depthwise convolution keeps the matrix units nearly idle. Here each channel is a product
of a banded matrix with the pixels of 128 images: see `depthwise_pallas_tiles.py`. Input and output
lie as (H · W, C, B) in memory, with the batch in the lanes; whether that costs a transposition is
up to XLA's choice for what comes before and after.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from convnext_jax.models.depthwise_pallas_kernels import filter_call, gradient_call
from convnext_jax.models.depthwise_pallas_tiles import LANES, Tiling, bands, taps, tiling
from convnext_jax.models.depthwise_pallas_words import channels_in_block

_DTYPES = (jnp.float32, jnp.bfloat16)


def is_supported(shape: tuple[int, ...], kernel_size: int, dtype: Any) -> bool:
    """Whether the kernels take such images.

    Args:
      shape: (B, H, W, C) of the images.
      kernel_size: k.
      dtype: of the images.

    Returns:
      False where a row of the image is too wide for 16 MiB of VMEM, or the type is another than
      float32 and bfloat16.
    """
    _, height, width, _ = shape
    return dtype in _DTYPES and tiling(height, width, kernel_size) is not None


@jax.custom_vjp
def depthwise_conv_pallas(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlates each channel of x with its own filter, zero-padded to the same height and width.

    Batches are padded to a multiple of 128 images, and channels to a multiple of 16 (8 in float32).
    There is no forward-mode derivative.

    Args:
      x: (B, H, W, C), float32 or bfloat16.
      kernel: (k, k, 1, C) with odd k, of x's type.

    Returns:
      (B, H, W, C), of x's type, summed in float32.

    Raises:
      ValueError: if the images are not supported, see `is_supported`.
    """
    return forward(x, kernel)


def forward(x: jax.Array, kernel: jax.Array, *, interpret: Any = False) -> jax.Array:
    """`depthwise_conv_pallas` without a derivative.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, 1, C).
      interpret: `pltpu.InterpretParams()` to run on the CPU; see `pl.pallas_call`.

    Returns:
      (B, H, W, C), of x's type.
    """
    cut = _tiling(x, kernel.shape[0])
    channels = -kernel.shape[-1] % channels_in_block(x.dtype)
    padded = jnp.pad(kernel.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, channels)))
    y = filter_call(_to_lanes(x), bands(padded, cut.width), cut, interpret)
    return _from_lanes(y, x.shape)


def input_gradient(g: jax.Array, kernel: jax.Array, *, interpret: Any = False) -> jax.Array:
    """The gradient by x: g filtered by the kernel turned by 180°.

    Args:
      g: (B, H, W, C), the gradient by the result.
      kernel: (k, k, 1, C), of g's type.
      interpret: see `forward`.

    Returns:
      (B, H, W, C), of g's type, summed in float32.
    """
    return forward(g, kernel[::-1, ::-1], interpret=interpret)


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
    cut = _tiling(x, kernel_size)
    sums = gradient_call(_to_lanes(x), _to_lanes(g), cut, interpret)
    return taps(sums, kernel_size)[..., : x.shape[-1]]


def _vjp_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return forward(x, kernel), (x, kernel)


def _vjp_backward(
    residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    by_kernel = kernel_gradient(x, g, kernel.shape[0]).astype(kernel.dtype)
    return input_gradient(g, kernel), by_kernel


depthwise_conv_pallas.defvjp(_vjp_forward, _vjp_backward)


def _tiling(x: jax.Array, kernel_size: int) -> Tiling:
    _, height, width, _ = x.shape
    cut = tiling(height, width, kernel_size)
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
