"""The blocks from ResNet to ConvNeXt, whose every design choice is an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models.activations import ACTIVATIONS
from convnext_jax.models.channelwise import Dense, scale_channels
from convnext_jax.models.depthwise import Implementation
from convnext_jax.models.layers import StochasticDepth
from convnext_jax.models.normalisation import Normalisation
from convnext_jax.models.resnet_resolution import Downsample, Shortcut
from convnext_jax.models.spatial_conv import SpatialConv


class Block(nn.Module):
    """The residual block: two 1×1 convolutions and a spatial one, between or before them.

    With the defaults it is ResNet-50's bottleneck (arXiv 1512.03385, figure 5) with the stride in
    the 3×3 convolution, as in torchvision. The convolutions are `pwconv1`, `pwconv2` and `conv`, or
    `dwconv` where it is depthwise; the norms are `norm1` to `norm3` in their order, or a single
    `norm`. Where the branch changes the shape, `shortcut/{conv,norm}` brings the input to it.

    Attributes:
      features: output channels.
      normalise: the norm.
      kernel_init: initialiser of the kernels.
      stride: of the spatial convolution.
      spatial_conv: "dense" or "depthwise".
      inverted_bottleneck: whether the hidden width is 4 × `features`, rather than a quarter.
      spatial_first: whether the spatial convolution comes first, on the input's channels.
      kernel_size: of the spatial convolution.
      activation: "relu" or "gelu".
      num_activations: 3 for one after each convolution, the last of them behind the addition; 1
        for one before the last 1×1 convolution.
      num_norms: 3 for one after each convolution; 1 for one after the spatial convolution.
      conv_bias: whether the convolutions of the branch have biases.
      layer_scale_init: initial layer scale `gamma`; None or 0 for no such parameter.
      zero_init_residual: whether `scale` of a third batch norm starts at 0, so that the block
        starts as the identity (arXiv 1706.02677, section 5.1).
      drop_rate: stochastic depth rate.
      depthwise: implementation of depthwise convolutions, see `SpatialConv`.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    normalise: Normalisation
    kernel_init: Initializer
    stride: int = 1
    spatial_conv: Literal["dense", "depthwise"] = "dense"
    inverted_bottleneck: bool = False
    spatial_first: bool = False
    kernel_size: int = 3
    activation: str = "relu"
    num_activations: int = 3
    num_norms: int = 3
    conv_bias: bool = False
    layer_scale_init: float | None = None
    zero_init_residual: bool = False
    drop_rate: float = 0.0
    depthwise: Implementation = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) of type `dtype` to (B, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
        types: dict[str, Any] = {
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        activate = ACTIVATIONS[self.activation]
        hidden = 4 * self.features if self.inverted_bottleneck else self.features // 4

        def spatial(y: jax.Array) -> jax.Array:
            is_depthwise = self.spatial_conv == "depthwise"
            return SpatialConv(
                x.shape[-1] if self.spatial_first else hidden,
                self.kernel_size,
                self.stride,
                self.depthwise if is_depthwise else None,
                use_bias=self.conv_bias,
                **types,
                name="dwconv" if is_depthwise else "conv",
            )(y)

        first = Dense(hidden, use_bias=self.conv_bias, **types, name="pwconv1")
        last = Dense(self.features, use_bias=self.conv_bias, **types, name="pwconv2")
        convs: tuple[Callable[[jax.Array], jax.Array], ...] = (first, spatial, last)
        if self.spatial_first:
            convs = (spatial, first, last)

        y = x
        for i, conv in enumerate(convs):
            y = conv(y)
            if self.num_norms == 3:
                starts_at_0 = i == 2 and self.zero_init_residual
                init = nn.initializers.constant(0.0 if starts_at_0 else 1.0)
                y = self.normalise(y, train, f"norm{i + 1}", init)
            elif conv is spatial:
                y = self.normalise(y, train, "norm")
            if i == 1 or (i == 0 and self.num_activations == 3):
                y = activate(y)
        if self.layer_scale_init:
            init = nn.initializers.constant(self.layer_scale_init)
            gamma = self.param("gamma", init, (self.features,), self.param_dtype)
            y = scale_channels(y, gamma.astype(self.dtype))
        y = StochasticDepth(self.drop_rate, name="stochastic_depth")(y, train)

        if self.stride != 1 or x.shape[-1] != self.features:
            x = Shortcut(self.features, self.stride, self.normalise, **types, name="shortcut")(
                x, train
            )
        return activate(x + y) if self.num_activations == 3 else x + y


class Stage(nn.Module):
    """Blocks of one width and resolution.

    Attributes:
      block: makes a block from its `stride`, `drop_rate` and `name`.
      drop_rates: the stochastic depth rate of each block; its length is the depth.
      stride: of the first block.
      downsample: makes what lies before the first block, from a `name`; None for nothing.
    """

    block: Callable[..., Block]
    drop_rates: Sequence[float]
    stride: int
    downsample: Callable[..., Downsample] | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) to (B, H', W', features), H' = H or half of it."""
        if self.downsample is not None:
            x = self.downsample(name="downsample")(x, train)
        for i, rate in enumerate(self.drop_rates):
            stride = self.stride if i == 0 else 1
            x = self.block(stride=stride, drop_rate=rate, name=f"blocks_{i}")(x, train)
        return x
