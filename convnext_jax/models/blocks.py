"""What a ConvNeXt is made of: stem, residual block, downsampling, stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from convnext_jax.models.depthwise import DepthwiseConv, Implementation
from convnext_jax.models.layers import (
    GlobalResponseNorm,
    LayerNorm,
    StochasticDepth,
    reference_kernel_init,
)


class Stem(nn.Module):
    """A convolution over patches, then LN (none in the isotropic model).

    Attributes:
      features: output channels.
      patch_size: kernel size k.
      stride: s ≤ k. Overlapping patches are padded by k − s zeros, the smaller half on the top and
        left, so that the output always has ⌊H/s⌋ × ⌊W/s⌋ positions; s = k means no padding.
      use_norm: whether LN follows.
      norm_eps: epsilon of the layer norm.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    patch_size: int
    stride: int
    use_norm: bool = True
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (B, H, W, C_in) to (B, ⌊H/s⌋, ⌊W/s⌋, features) of type `dtype`."""
        overlap = self.patch_size - self.stride
        padding = (overlap // 2, overlap - overlap // 2)
        x = nn.Conv(
            self.features,
            kernel_size=(self.patch_size, self.patch_size),
            strides=(self.stride, self.stride),
            padding=(padding, padding),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=reference_kernel_init,
            name="conv",
        )(images)
        if self.use_norm:
            x = LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        return x


class Block(nn.Module):
    """The residual block: depthwise conv, LN, and an inverted bottleneck of two 1×1 products.

    V1 (arXiv 2201.03545, figure 4) ends its branch with the layer scale `gamma`; V2 has global
    response normalisation behind the GELU instead.

    Attributes:
      drop_rate: this block's stochastic depth rate.
      layer_scale_init: initial `gamma`; None or 0 for no such parameter.
      use_grn: whether the hidden layer is response-normalised.
      kernel_size: of the depthwise convolution.
      depthwise: its implementation, see `depthwise_conv`.
      norm_eps: epsilon of the layer norm.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    drop_rate: float = 0.0
    layer_scale_init: float | None = 1e-6
    use_grn: bool = False
    kernel_size: int = 7
    depthwise: Implementation = "auto"
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) of type `dtype` to the same shape and type."""
        channels = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        products = dict(types, precision=self.precision, kernel_init=reference_kernel_init)

        y = DepthwiseConv(self.kernel_size, self.depthwise, **products, name="dwconv")(x)
        y = LayerNorm(self.norm_eps, **types, name="norm")(y)
        y = nn.Dense(4 * channels, **products, name="pwconv1")(y)
        y = nn.gelu(y, approximate=False)
        if self.use_grn:
            y = GlobalResponseNorm(**types, name="grn")(y)
        y = nn.Dense(channels, **products, name="pwconv2")(y)
        if self.layer_scale_init:
            init = nn.initializers.constant(self.layer_scale_init)
            gamma = self.param("gamma", init, (channels,), self.param_dtype)
            # Cast before the product: a float32 gamma would turn the residual stream to float32.
            y = y * gamma.astype(self.dtype).reshape(1, 1, 1, channels)
        return x + StochasticDepth(self.drop_rate, name="stochastic_depth")(y, train)


class Downsample(nn.Module):
    """LN, then a 2×2 convolution of stride 2; an odd last row or column is dropped.

    Attributes:
      features: output channels.
      norm_eps: epsilon of the layer norm.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C) to (B, ⌊H/2⌋, ⌊W/2⌋, features) of type `dtype`."""
        x = LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        return nn.Conv(
            self.features,
            kernel_size=(2, 2),
            strides=(2, 2),
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=reference_kernel_init,
            name="conv",
        )(x)


class Stage(nn.Module):
    """Blocks of one width and resolution, behind a downsampling in all stages but the first.

    Attributes:
      features: channels of the stage.
      drop_rates: the stochastic depth rate of each block; its length is the depth.
      downsample: whether the stage opens with a `Downsample`.
      remat: whether each block recomputes its activations in the backward pass.
      layer_scale_init: see `Block`.
      use_grn: see `Block`.
      kernel_size: see `Block`.
      depthwise: see `Block`.
      norm_eps: epsilon of the layer norms.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    drop_rates: Sequence[float]
    downsample: bool
    remat: bool = False
    layer_scale_init: float | None = 1e-6
    use_grn: bool = False
    kernel_size: int = 7
    depthwise: Implementation = "auto"
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) to (B, H', W', features), H' = ⌊H/2⌋ behind a downsampling."""
        common: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        if self.downsample:
            x = Downsample(self.features, **common, name="downsample")(x)
        # Argument 2 of Block.__call__ (0 is self) is `train`: Python branches on it.
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for i, rate in enumerate(self.drop_rates):
            x = block(
                drop_rate=rate,
                layer_scale_init=self.layer_scale_init,
                use_grn=self.use_grn,
                kernel_size=self.kernel_size,
                depthwise=self.depthwise,
                **common,
                name=f"blocks_{i}",
            )(x, train)
        return x
