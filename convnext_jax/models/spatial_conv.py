"""A spatial convolution of any stride, dense or depthwise."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models.channelwise import shift_channels
from convnext_jax.models.depthwise import Implementation, depthwise_conv


class SpatialConv(nn.Module):
    """A k×k convolution with (k − 1) / 2 zeros on every side, dense or depthwise.

    Its parameters are those of `nn.Conv`: `kernel` (k, k, I, features), I = 1 where it is
    depthwise, and `bias` (features,).

    Attributes:
      features: output channels; a depthwise convolution has as many as its input.
      kernel_size: k, odd.
      stride: in height and width.
      depthwise: the implementation of a depthwise convolution of stride 1, see `depthwise_conv`;
        one of a larger stride is always XLA's. None for a dense convolution.
      use_bias: whether there is a bias.
      kernel_init: initialiser of the kernel; the bias starts at 0.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: Implementation | None = None
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, features) of type `dtype`."""
        k, channels = self.kernel_size, x.shape[-1]
        fan_in = channels if self.depthwise is None else 1
        shape = (k, k, fan_in, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        bias = None if bias is None else bias.astype(self.dtype)
        if self.depthwise is not None and self.stride == 1:
            return depthwise_conv(
                x, kernel, bias, implementation=self.depthwise, precision=self.precision
            )
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=((k // 2, k // 2), (k // 2, k // 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels // fan_in,
            precision=self.precision,
        )
        return y if bias is None else shift_channels(y, bias)
