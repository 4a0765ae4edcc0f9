"""Where the networks from ResNet to ConvNeXt change resolution: stem, shortcut, downsampling."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models.activations import ACTIVATIONS
from convnext_jax.models.normalisation import Normalisation
from convnext_jax.models.patch_conv import PatchConv
from convnext_jax.models.spatial_conv import SpatialConv


class Stem(nn.Module):
    """From the image to a quarter of its resolution.

    Attributes:
      features: output channels.
      patchify: a 4×4 convolution of stride 4, with bias. Otherwise the stem is ResNet's: a 7×7
        convolution of stride 2, norm, activation and a 3×3 maximum of stride 2.
      use_norm: whether a norm follows the patches.
      normalise: the norm.
      activation: of ResNet's stem.
      kernel_init: initialiser of the kernel.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    patchify: bool
    use_norm: bool
    normalise: Normalisation
    activation: str
    kernel_init: Initializer
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images (B, H, W, C_in) to (B, H', W', features) of type `dtype`.

        H' is ⌊H/4⌋ with `patchify` and ⌈H/4⌉ without, and W' likewise.
        """
        types: dict[str, Any] = {
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        if self.patchify:
            x = PatchConv(self.features, 4, **types, name="conv")(images)
            return self.normalise(x, train, "norm") if self.use_norm else x
        x = SpatialConv(self.features, kernel_size=7, stride=2, **types, name="conv")(images)
        x = ACTIVATIONS[self.activation](self.normalise(x, train, "norm"))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Shortcut(nn.Module):
    """A 1×1 convolution and a norm that bring a block's input to the shape of its output.

    Attributes:
      features: output channels.
      stride: in height and width.
      normalise: the norm.
      kernel_init: initialiser of the kernel.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    stride: int
    normalise: Normalisation
    kernel_init: Initializer
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, features) of type `dtype`."""
        x = SpatialConv(
            self.features,
            kernel_size=1,
            stride=self.stride,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="conv",
        )(x)
        return self.normalise(x, train, "norm")


class Downsample(nn.Module):
    """A norm, then a 2×2 convolution of stride 2; an odd last row or column is dropped.

    Attributes:
      features: output channels.
      normalise: the norm.
      kernel_init: initialiser of the kernel.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    normalise: Normalisation
    kernel_init: Initializer
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) to (B, ⌊H/2⌋, ⌊W/2⌋, features) of type `dtype`."""
        return PatchConv(
            self.features,
            patch_size=2,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="conv",
        )(self.normalise(x, train, "norm"))
