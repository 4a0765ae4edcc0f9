"""The convolution over patches that do not overlap, of stem and downsampling.

It is one product of patches and kernel. As such, and not as the convolutions that differentiation
makes of it, XLA:CPU computes the kernels' gradients of ConvNeXt-T's stem and downsamplings in 36 ms
instead of 105 for 8 images, and the inputs' in half the time; the forward pass takes as long. Other
backends keep XLA's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models.channelwise import multiply_channels, shift_channels

_Way = Callable[[jax.Array, jax.Array], jax.Array]


class PatchConv(nn.Module):
    """`nn.Conv(features, (k, k), strides=(k, k), padding="VALID")`, with its parameters.

    These are `kernel` (k, k, C, features) and `bias` (features,).

    Attributes:
      features: output channels.
      patch_size: k.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products, see `jax.lax.Precision`.
      kernel_init: initialiser of the kernel; the bias starts at 0.
    """

    features: int
    patch_size: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C), of any float type, to (B, ⌊H/k⌋, ⌊W/k⌋, features) of `dtype`."""
        k = self.patch_size
        shape = (k, k, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:], self.param_dtype)
        y = patch_conv(x.astype(self.dtype), kernel.astype(self.dtype), self.precision)
        return shift_channels(y, bias.astype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def patch_conv(x: jax.Array, kernel: jax.Array, precision: PrecisionLike = None) -> jax.Array:
    """Convolves patches that lie side by side; rows and columns beyond the last whole one drop out.

    It has derivatives of any order, but no forward-mode ones.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C, F), of x's type.
      precision: of the products, see `jax.lax.Precision`.

    Returns:
      (B, ⌊H/k⌋, ⌊W/k⌋, F), of x's type.
    """
    cpu, default = _ways(x, precision)
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _backward(
    precision: PrecisionLike, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    cpu, default = (
        lambda x, kernel, gradient, way=way: jax.vjp(way, x, kernel)[1](gradient)
        for way in _ways(saved[0], precision)
    )
    by_x, by_kernel = jax.lax.platform_dependent(*saved, gradient, cpu=cpu, default=default)
    return by_x, by_kernel


patch_conv.defvjp(
    lambda x, kernel, precision: (patch_conv(x, kernel, precision), (x, kernel)), _backward
)


def _ways(x: jax.Array, precision: PrecisionLike) -> tuple[_Way, _Way]:
    """On CPUs, and elsewhere."""
    convolution = functools.partial(_convolution, precision=precision)
    # Of an exported program height and width may be symbols, which don't divide into patches.
    if all(isinstance(size, int) for size in x.shape[1:3]):
        return functools.partial(_product, precision=precision), convolution
    return convolution, convolution


def _product(x: jax.Array, kernel: jax.Array, precision: PrecisionLike) -> jax.Array:
    k, _, channels, features = kernel.shape
    batch, height, width, _ = x.shape
    rows, columns = height // k, width // k
    patches = x[:, : rows * k, : columns * k].reshape(batch, rows, k, columns, k * channels)
    patches = patches.swapaxes(2, 3).reshape(batch, rows, columns, k * k * channels)
    return multiply_channels(patches, kernel.reshape(-1, features), precision)


def _convolution(x: jax.Array, kernel: jax.Array, precision: PrecisionLike) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=kernel.shape[:2],
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
