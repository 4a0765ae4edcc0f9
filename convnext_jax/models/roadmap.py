"""The road from ResNet to ConvNeXt (arXiv 2201.03545, section 2) as one network.

Each of the paper's design choices is an argument of `ModernizedResNet`; `roadmap_steps.py` sets
them one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models.activations import ACTIVATIONS
from convnext_jax.models.checks import check_images, stage_indices
from convnext_jax.models.depthwise import IMPLEMENTATIONS, Implementation
from convnext_jax.models.layers import reference_kernel_init, stochastic_depth_rates
from convnext_jax.models.normalisation import Normalisation
from convnext_jax.models.precision import precision_for
from convnext_jax.models.resnet_blocks import Block, Stage
from convnext_jax.models.resnet_resolution import Downsample, Stem

# As torchvision's ResNet: He's normal initialisation by the fan-out (arXiv 1502.01852), PyTorch's
# default U(−1/√I, 1/√I) for the head. Biases start at 0.
_KERNEL_INITS: dict[str, Initializer] = {
    "he": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "normal": reference_kernel_init,
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "spatial_conv": ("dense", "depthwise"),
    "activation": tuple(ACTIVATIONS),
    "num_activations": (3, 1),
    "norm_type": ("batch", "layer"),
    "num_norms": (3, 1),
    "kernel_init": tuple(_KERNEL_INITS),
    "depthwise": IMPLEMENTATIONS,
}


class ModernizedResNet(nn.Module):
    """A ResNet with the paper's design choices, each of which is ResNet's own by default.

    The defaults are ResNet-50 as torchvision has it (arXiv 1512.03385, with the stride in the 3×3
    convolution). With all choices made as on the road's last step, tree and values are those of
    `ConvNeXt`, which `create_model` builds there.

    It is called as `ConvNeXt` is: `model.apply(variables, images, train=False)` gives logits,
    `method="pooled_features"` and `method="feature_maps"` what lies before the head, for images
    (B, H, W, C_in) of any size from `strides[-1]`. Under batch norm the variables have a collection
    "batch_stats", and a training call is
    `model.apply(variables, images, train=True, mutable=["batch_stats"])`, which returns logits and
    the collection updated. Training with `drop_path_rate` > 0 needs `rngs={"dropout": key}`.

    Parameters lie at `stem/{conv,norm}`, `stages_i/blocks_j/{pwconv1,conv or dwconv,pwconv2}`,
    `stages_i/blocks_j/{norm1,norm2,norm3 or norm}`, `stages_i/blocks_j/shortcut/{conv,norm}` or
    `stages_i/downsample/{norm,conv}`, `norm` (with `separate_downsampling`) and `head`.

    Attributes:
      num_classes: width of the head; 0 for no head, then the model returns the pooled features.
      depths: blocks per stage.
      width: channels of the stem. Stage i has width · 2^i in its inner convolutions and four times
        as much at its output, or width · 2^i at its output with an inverted bottleneck.
      patchify_stem: a 4×4 convolution of stride 4 as the stem, see `Stem`.
      spatial_conv: "dense" or "depthwise".
      inverted_bottleneck: whether blocks are wide inside and narrow at their ends.
      spatial_first: whether the spatial convolution comes before both 1×1 convolutions.
      kernel_size: of the spatial convolution, odd.
      activation: "relu" or "gelu", exact.
      num_activations: per block, 3 or 1, see `Block`.
      norm_type: "batch" (epsilon 1e-5) or "layer" (epsilon 1e-6).
      num_norms: per block, 3 or 1, see `Block`.
      conv_bias: whether the convolutions of the blocks' branches have biases.
      separate_downsampling: resolution is halved between the stages, by a norm and a 2×2
        convolution of stride 2, and a norm follows the stem and the pooling. Otherwise the first
        block of each stage but the first does it, with a shortcut of its own.
      layer_scale_init: initial layer scale; None or 0 for no such parameter.
      kernel_init: "he", as in torchvision's ResNet, or "normal", as in ConvNeXt. The paper does not
        say where on the road it changes; the table changes it at the last step.
      zero_init_residual: whether the last batch norm of each block starts with `scale` 0.
      bn_groups: parts of the batch with batch statistics of their own: 1 for those of the global
        batch, the number of devices for per-device ones; see `BatchNorm`.
      depthwise: implementation of the depthwise convolutions, "auto", "xla", "shifts" or "pallas";
        see `depthwise_conv`. Those of stride 2 are XLA's in any case.
      drop_path_rate: stochastic depth rate of the last block, in [0, 1).
      head_init_scale: factor on the head's initial weights.
      remat: gradient checkpointing: each block recomputes its activations in the backward pass.
      dtype: compute type and that of the residual stream; statistics, pooling, the head and the
        logits are float32 whatever it is.
      param_dtype: type of the parameters.
      precision: of all products; None for the highest where they are float32.

    Raises:
      ValueError: on construction, if an argument is out of range or they contradict each other; on
        a call, if the images have the wrong rank or type or are too small.
    """

    num_classes: int = 1000
    depths: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    patchify_stem: bool = False
    spatial_conv: Literal["dense", "depthwise"] = "dense"
    inverted_bottleneck: bool = False
    spatial_first: bool = False
    kernel_size: int = 3
    activation: Literal["relu", "gelu"] = "relu"
    num_activations: Literal[3, 1] = 3
    norm_type: Literal["batch", "layer"] = "batch"
    num_norms: Literal[3, 1] = 3
    conv_bias: bool = False
    separate_downsampling: bool = False
    layer_scale_init: float | None = None
    kernel_init: Literal["he", "normal"] = "he"
    zero_init_residual: bool = False
    bn_groups: int = 1
    depthwise: Implementation = "auto"
    drop_path_rate: float = 0.0
    head_init_scale: float = 1.0
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    def __post_init__(self) -> None:
        # A list, as configs give it, would make the module unhashable.
        self.depths = tuple(self.depths)
        self._check_arguments()
        super().__post_init__()

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        expansion = 1 if self.inverted_bottleneck else 4
        return tuple(expansion * self.width * 2**i for i in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's output relative to the image, (4, 8, 16, 32) with four stages."""
        return tuple(4 * 2**i for i in range(len(self.depths)))

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: (B, H, W, C_in), normalised floats.
          train: whether batch norms use and record the batch's statistics, and stochastic depth is
            active.

        Returns:
          float32 logits (B, num_classes), or with `num_classes=0` the pooled features.
        """
        return self._run(images, train)

    def pooled_features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Gives what the head reads: the last stage's output, averaged.

        Args:
          images: (B, H, W, C_in), normalised floats.
          train: see `__call__`.

        Returns:
          float32 (B, dims[-1]), normalised if `separate_downsampling`.
        """
        return self._run(images, train, with_head=False)

    def feature_maps(
        self, images: jax.Array, indices: Sequence[int] | None = None, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """Gives the outputs of stages; those behind the last index asked for are not computed.

        Args:
          images: (B, H, W, C_in), normalised floats.
          indices: which stages, in the order wanted; None for all of them.
          train: see `__call__`.

        Returns:
          For each index i an array (B, H', W', dims[i]) of type `dtype`, with H' some
          H / strides[i].

        Raises:
          ValueError: if an index names no stage, or there are none.
        """
        wanted = stage_indices(indices, len(self.depths))
        maps = self._run(images, train, last=max(wanted))
        return tuple(maps[i] for i in wanted)

    @nn.compact  # Flax allows one such method, so the three above share it.
    def _run(
        self, images: jax.Array, train: bool, last: int | None = None, with_head: bool = True
    ) -> Any:
        """The network up to the head; or the maps of the stages up to the one numbered `last`."""
        check_images(images, self.strides[-1 if last is None else last], "ModernizedResNet")
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common: dict[str, Any] = {
            "normalise": Normalisation(self.norm_type, self.bn_groups, **types),
            "kernel_init": _KERNEL_INITS[self.kernel_init],
            "precision": precision_for(self.dtype, self.precision),
            **types,
        }
        x = Stem(
            self.width,
            patchify=self.patchify_stem,
            use_norm=self.separate_downsampling or not self.patchify_stem,
            activation=self.activation,
            **common,
            name="stem",
        )(images, train)

        maps = []
        rates = stochastic_depth_rates(self.drop_path_rate, self.depths)
        for i, features in enumerate(self.dims[: None if last is None else last + 1]):
            halve = i > 0
            x = Stage(
                block=functools.partial(self._block(), features, **common),
                drop_rates=rates[i],
                stride=2 if halve and not self.separate_downsampling else 1,
                downsample=functools.partial(Downsample, features, **common)
                if halve and self.separate_downsampling
                else None,
                name=f"stages_{i}",
            )(x, train)
            maps.append(x)
        if last is not None:
            return maps

        x = x.astype(jnp.float32).mean(axis=(1, 2))
        if self.separate_downsampling:
            in_float32 = dataclasses.replace(common["normalise"], dtype=jnp.float32)
            x = in_float32(x, train, "norm")
        if not with_head or not self.num_classes:
            return x
        return nn.Dense(
            self.num_classes,
            kernel_init=self._head_init(),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            precision=precision_for(jnp.float32, self.precision),
            name="head",
        )(x)

    def _block(self) -> Callable[..., Block]:
        """`Block` with the choices that concern it."""
        # Argument 2 of Block.__call__ (0 is self) is `train`: Python branches on it.
        return functools.partial(
            nn.remat(Block, static_argnums=(2,)) if self.remat else Block,
            spatial_conv=self.spatial_conv,
            inverted_bottleneck=self.inverted_bottleneck,
            spatial_first=self.spatial_first,
            kernel_size=self.kernel_size,
            activation=self.activation,
            num_activations=self.num_activations,
            num_norms=self.num_norms,
            conv_bias=self.conv_bias,
            layer_scale_init=self.layer_scale_init,
            zero_init_residual=self.zero_init_residual,
            depthwise=self.depthwise,
        )

    def _head_init(self) -> Initializer:
        if self.kernel_init == "normal":
            return nn.initializers.normal(0.02 * self.head_init_scale)
        return nn.initializers.variance_scaling(self.head_init_scale**2 / 3, "fan_in", "uniform")

    def _check_arguments(self) -> None:
        def check(holds: bool, requirement: str) -> None:
            if not holds:
                raise ValueError(f"ModernizedResNet: {requirement}")

        check(
            len(self.depths) > 0 and min(self.depths) > 0 and self.width > 0,
            f"depths and width must be positive, but are {self.depths} and {self.width}",
        )
        for argument, allowed in _ALLOWED.items():
            value = getattr(self, argument)
            check(value in allowed, f"{argument} must be one of {allowed}, but is {value!r}")
        check(
            self.kernel_size > 0 and self.kernel_size % 2 == 1,
            f"kernel_size must be odd, but is {self.kernel_size}",
        )
        check(
            not self.zero_init_residual or (self.norm_type, self.num_norms) == ("batch", 3),
            "zero_init_residual=True is the scale of a third batch norm, which takes "
            'norm_type="batch" and num_norms=3',
        )
        check(self.bn_groups > 0, f"bn_groups must be 1 or more, but is {self.bn_groups}")
        check(
            0.0 <= self.drop_path_rate < 1.0,
            f"drop_path_rate must be in [0, 1), but is {self.drop_path_rate}",
        )
        check(self.num_classes >= 0, f"num_classes must be 0 or more, but is {self.num_classes}")
