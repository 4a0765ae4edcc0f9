"""What a ConvNeXt is made of: stem, residual block, downsampling, stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike
from jax.ad_checkpoint import checkpoint_name

from convnext_jax.models.channelwise import Dense, scale_channels
from convnext_jax.models.depthwise import DepthwiseConv, Implementation, depthwise_conv
from convnext_jax.models.gelu import gelu
from convnext_jax.models.layers import (
    GlobalResponseNorm,
    LayerNorm,
    StochasticDepth,
    reference_kernel_init,
)
from convnext_jax.models.mlp_branch import add_branch
from convnext_jax.models.mlp_pallas import fold
from convnext_jax.models.mlp_pallas_devices import Devices, MlpImplementation, devices_for
from convnext_jax.models.patch_conv import PatchConv
from convnext_jax.models.remat import checkpoint_policy, named_outputs
from convnext_jax.models.scanned_blocks import scan_over_blocks


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
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        products = dict(types, precision=self.precision, kernel_init=reference_kernel_init)
        if overlap == 0:
            x = PatchConv(self.features, self.patch_size, **products, name="conv")(images)
        else:
            x = nn.Conv(
                self.features,
                kernel_size=(self.patch_size, self.patch_size),
                strides=(self.stride, self.stride),
                padding=(padding, padding),
                **products,
                name="conv",
            )(images)
        if self.use_norm:
            x = LayerNorm(self.norm_eps, **types, name="norm")(x)
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
      mlp: implementation of all that follows it, see `devices_for`; without GRN alone.
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
    mlp: MlpImplementation = "auto"
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, H, W, C) of type `dtype` to the same shape and type."""
        if (devices := self._devices_of_kernels(x)) is not None:
            return self._by_kernels(x, train, devices)
        channels = x.shape[-1]
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        products = dict(types, precision=self.precision, kernel_init=reference_kernel_init)

        y = DepthwiseConv(self.kernel_size, self.depthwise, **products, name="dwconv")(x)
        y = LayerNorm(self.norm_eps, **types, name="norm")(y)
        y = Dense(4 * channels, **products, name="pwconv1")(y)
        y = gelu(y)
        if self.use_grn:
            y = GlobalResponseNorm(**types, name="grn")(y)
        y = Dense(channels, **products, name="pwconv2")(y)
        if self.layer_scale_init:
            init = nn.initializers.constant(self.layer_scale_init)
            gamma = self.param("gamma", init, (channels,), self.param_dtype)
            # Cast before the product: a float32 gamma would turn the residual stream to float32.
            y = scale_channels(y, gamma.astype(self.dtype))
        return x + StochasticDepth(self.drop_rate, name="stochastic_depth")(y, train)

    def _devices_of_kernels(self, x: jax.Array) -> Devices | None:
        # The kernels make no parameters, and have no intermediates to show.
        whole = self.is_initializing() or self.is_mutable_collection("intermediates")
        if whole or (self.use_grn and self.mlp == "auto"):
            return None
        if self.use_grn and self.mlp == "pallas":
            raise ValueError("mlp='pallas' has no global response normalisation; use mlp='auto'")
        return devices_for(x.shape, x.dtype, self.mlp)

    def _by_kernels(self, x: jax.Array, train: bool, devices: Devices) -> jax.Array:
        params = self.variables["params"]
        kernel = params["dwconv"]["kernel"].astype(self.dtype)
        conv = depthwise_conv(x, kernel, implementation=self.depthwise, precision=self.precision)
        weights = fold(
            params["dwconv"]["bias"],
            (params["norm"]["scale"], params["norm"]["bias"]),
            (params["pwconv1"]["kernel"], params["pwconv1"]["bias"]),
            (params["pwconv2"]["kernel"], params["pwconv2"]["bias"]),
            params.get("gamma"),
        )
        ones = jnp.ones((x.shape[0], 1, 1, 1), self.dtype)
        keep = StochasticDepth(self.drop_rate, name="stochastic_depth")(ones, train)
        keep = keep.astype(jnp.float32).reshape(-1)
        conv = checkpoint_name(conv, "dwconv")
        return add_branch(x, conv, keep, weights, self.norm_eps, devices)


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
        return PatchConv(
            self.features,
            patch_size=2,
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
      remat: see `ConvNeXt`.
      scan_blocks: see `ConvNeXt`.
      layer_scale_init: see `Block`.
      use_grn: see `Block`.
      kernel_size: see `Block`.
      depthwise: see `Block`.
      mlp: see `Block`.
      norm_eps: epsilon of the layer norms.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products.
    """

    features: int
    drop_rates: Sequence[float]
    downsample: bool
    remat: bool | str = False
    scan_blocks: bool = False
    layer_scale_init: float | None = 1e-6
    use_grn: bool = False
    kernel_size: int = 7
    depthwise: Implementation = "auto"
    mlp: MlpImplementation = "auto"
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
        options: dict[str, Any] = {
            "layer_scale_init": self.layer_scale_init,
            "use_grn": self.use_grn,
            "kernel_size": self.kernel_size,
            "depthwise": self.depthwise,
            "mlp": self.mlp,
            **common,
        }
        if self._is_scanned():
            # The rate is no block's own; what would draw by it, and not as the loop says, has no
            # key.
            return scan_over_blocks(
                Block(max(self.drop_rates), **options, name="blocks", parent=None),
                self.variables["params"],
                self.drop_rates,
                x,
                train=train,
                remat=self.remat,
                dtype=self.dtype,
            )
        block: Any = Block
        if self.remat:
            # Argument 2 of Block.__call__ (0 is self) is `train`: Python branches on it.
            policy = checkpoint_policy(self.remat)
            block = nn.remat(Block, static_argnums=(2,), policy=policy)
        with named_outputs(self.remat):
            for i, rate in enumerate(self.drop_rates):
                x = block(rate, **options, name=f"blocks_{i}")(x, train)
        return x

    def _is_scanned(self) -> bool:
        """Blocks that make or miss parameters, or tell intermediates, do so one by one."""
        depth = len(self.drop_rates)
        return (
            self.scan_blocks
            and depth > 1
            and not self.is_mutable_collection("intermediates")
            and all(self.has_variable("params", f"blocks_{i}") for i in range(depth))
        )
