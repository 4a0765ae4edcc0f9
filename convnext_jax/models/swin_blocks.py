"""What a Swin Transformer is made of: patch embedding, block, patch merging, stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from convnext_jax.models.gelu import gelu
from convnext_jax.models.layers import LayerNorm, StochasticDepth, reference_kernel_init
from convnext_jax.models.patch_conv import PatchConv
from convnext_jax.models.swin_attention import WindowAttention, pad_to_multiples


class PatchEmbedding(nn.Module):
    """A linear map of each patch, then LN.

    The kernel starts as U(−1/√I, 1/√I), I being a patch's values: the authors leave it at PyTorch's
    default. The bias starts at 0.

    Attributes:
      features: output channels.
      patch_size: p, side of a patch in pixels.
      norm_eps: epsilon of the layer norm.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    patch_size: int
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (B, H, W, C_in) to (B, ⌈H/p⌉, ⌈W/p⌉, features) of type `dtype`."""
        p = self.patch_size
        x = pad_to_multiples(images, p)
        x = PatchConv(
            self.features,
            p,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            name="conv",
        )(x)
        return LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="norm")(x)


class PatchMerging(nn.Module):
    """The four tokens of each 2×2 square joined along the channels, LN, and a linear map.

    Attributes:
      features: output channels.
      norm_eps: epsilon of the layer norm.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, features) of type `dtype`."""
        x = pad_to_multiples(x, 2)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # The authors' order: upper left, lower left, upper right, lower right.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        x = LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        return nn.Dense(
            self.features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=reference_kernel_init,
            name="reduction",
        )(x)


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between, four times as wide inside.

    Attributes:
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., C) to the same shape."""
        products: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "kernel_init": reference_kernel_init,
        }
        y = nn.Dense(4 * x.shape[-1], **products, name="fc1")(x)
        return nn.Dense(x.shape[-1], **products, name="fc2")(gelu(y))


class Block(nn.Module):
    """LN and window attention, LN and MLP, each added to what it read.

    Attributes:
      num_heads: see `WindowAttention`.
      window_size: see `WindowAttention`.
      shifted: see `WindowAttention`.
      drop_rate: stochastic depth rate of either branch.
      norm_eps: epsilon of the layer norms.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    num_heads: int
    window_size: int
    shifted: bool
    drop_rate: float = 0.0
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) of type `dtype` to the same shape and type."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        products = dict(types, precision=self.precision)
        y = LayerNorm(self.norm_eps, **types, name="norm1")(x)
        y = WindowAttention(
            self.num_heads, self.window_size, self.shifted, **products, name="attn"
        )(y)
        x = x + StochasticDepth(self.drop_rate, name="stochastic_depth1")(y, train)
        y = LayerNorm(self.norm_eps, **types, name="norm2")(x)
        y = Mlp(**products, name="mlp")(y)
        return x + StochasticDepth(self.drop_rate, name="stochastic_depth2")(y, train)


class Stage(nn.Module):
    """Blocks of one width and resolution, every other one shifted.

    Attributes:
      features: channels of the stage.
      num_heads: see `WindowAttention`.
      window_size: see `WindowAttention`.
      drop_rates: the stochastic depth rate of each block; its length is the depth.
      downsample: whether the stage opens with a `PatchMerging`.
      remat: whether each block recomputes its activations in the backward pass.
      norm_eps: epsilon of the layer norms.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    num_heads: int
    window_size: int
    drop_rates: Sequence[float]
    downsample: bool
    remat: bool = False
    norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) to (B, H', W', features), H' = ⌈H/2⌉ behind a downsampling."""
        common: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        if self.downsample:
            x = PatchMerging(self.features, **common, name="downsample")(x)
        # Argument 2 of Block.__call__ (0 is self) is `train`: Python branches on it.
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for i, rate in enumerate(self.drop_rates):
            x = block(
                self.num_heads,
                self.window_size,
                shifted=i % 2 == 1,
                drop_rate=rate,
                **common,
                name=f"blocks_{i}",
            )(x, train)
        return x
