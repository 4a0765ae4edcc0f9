"""Swin Transformer (arXiv 2103.14030), which the paper measures ConvNeXt against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from convnext_jax.models.checks import check_images, stage_indices
from convnext_jax.models.layers import LayerNorm, stochastic_depth_rates
from convnext_jax.models.precision import precision_for
from convnext_jax.models.swin_blocks import PatchEmbedding, Stage


class SwinTransformer(nn.Module):
    """Swin Transformer as a classifier or a backbone.

    It is called as `ConvNeXt` is: `model.apply(variables, images, train=False)` gives logits,
    `method="pooled_features"` and `method="feature_maps"` what lies before the head, for images
    (B, H, W, C_in) of any size. Sides that the patches or the windows don't divide are padded with
    zeros on the right and at the bottom, see `WindowAttention`. Training with `drop_path_rate` > 0
    needs `rngs={"dropout": key}`.

    Parameters lie at `stem/{conv,norm}`, `stages_i/blocks_j/{norm1,norm2}`,
    `stages_i/blocks_j/attn/{qkv,proj,relative_position_bias_table}`,
    `stages_i/blocks_j/mlp/{fc1,fc2}`, `stages_i/downsample/{norm,reduction}` (i ≥ 1; the authors
    have it at the end of stage i − 1), `norm` and `head`.

    Attributes:
      num_classes: width of the head; 0 for no head, then the model returns the pooled features.
      depths: blocks per stage.
      width: channels of the first stage, doubled by each following one.
      num_heads: attention heads per stage.
      window_size: side of the attention windows in tokens; odd blocks shift them by half of it.
      patch_size: side of the stem's patches in pixels.
      drop_path_rate: stochastic depth rate of the last block's two branches, in [0, 1); see
        `stochastic_depth_rates`.
      norm_eps: epsilon of all layer norms.
      head_init_scale: factor on the head's initial weights.
      remat: gradient checkpointing: each block recomputes its activations in the backward pass.
      dtype: compute type and that of the residual stream; scores, softmax, the final norm, pooling,
        the head and the logits are float32 whatever it is.
      param_dtype: type of the parameters.
      precision: of all products; None for the highest where they are float32.

    Raises:
      ValueError: on construction, if arguments contradict each other; on a call, if the images have
        the wrong rank or type or are smaller than a patch.
    """

    num_classes: int = 1000
    depths: Sequence[int] = (2, 2, 6, 2)
    width: int = 96
    num_heads: Sequence[int] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 4
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-5
    head_init_scale: float = 1.0
    remat: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    def __post_init__(self) -> None:
        # Lists, as configs give them, would make the module unhashable.
        self.depths, self.num_heads = tuple(self.depths), tuple(self.num_heads)
        self._check_arguments()
        super().__post_init__()

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width * 2**i for i in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's output relative to the image, (4, 8, 16, 32) in the published."""
        return tuple(self.patch_size * 2**i for i in range(len(self.depths)))

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: (B, H, W, C_in), normalised floats.
          train: whether stochastic depth is active.

        Returns:
          float32 logits (B, num_classes), or with `num_classes=0` the pooled features.
        """
        return self._run(images, train)

    def pooled_features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Gives what the head reads: the last stage's output, normalised and averaged.

        Args:
          images: (B, H, W, C_in), normalised floats.
          train: whether stochastic depth is active.

        Returns:
          float32 (B, dims[-1]).
        """
        return self._run(images, train, with_head=False)

    def feature_maps(
        self, images: jax.Array, indices: Sequence[int] | None = None, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """Gives the outputs of stages; those behind the last index asked for are not computed.

        Args:
          images: (B, H, W, C_in), normalised floats.
          indices: which stages, in the order wanted; None for all of them.
          train: whether stochastic depth is active.

        Returns:
          For each index i an array (B, ⌈H/strides[i]⌉, ⌈W/strides[i]⌉, dims[i]) of type `dtype`.

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
        check_images(images, self.patch_size, "SwinTransformer")
        common: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": precision_for(self.dtype, self.precision),
        }
        x = PatchEmbedding(self.width, self.patch_size, **common, name="stem")(images)
        maps = []
        rates = stochastic_depth_rates(self.drop_path_rate, self.depths)
        for i, features in enumerate(self.dims[: None if last is None else last + 1]):
            x = Stage(
                features,
                self.num_heads[i],
                self.window_size,
                drop_rates=rates[i],
                downsample=i > 0,
                remat=self.remat,
                **common,
                name=f"stages_{i}",
            )(x, train)
            maps.append(x)
        if last is not None:
            return maps

        x = LayerNorm(self.norm_eps, jnp.float32, self.param_dtype, name="norm")(x)
        x = x.mean(axis=(1, 2))
        if not with_head or not self.num_classes:
            return x
        return nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.normal(0.02 * self.head_init_scale),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            precision=precision_for(jnp.float32, self.precision),
            name="head",
        )(x)

    def _check_arguments(self) -> None:
        def check(holds: bool, requirement: str) -> None:
            if not holds:
                raise ValueError(f"SwinTransformer: {requirement}")

        check(
            0 < len(self.depths) == len(self.num_heads),
            f"depths and num_heads must have one entry per stage, but are {self.depths} and "
            f"{self.num_heads}",
        )
        check(
            min(self.depths) > 0 and self.width > 0,
            f"depths and width must be positive, but are {self.depths} and {self.width}",
        )
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            check(
                heads > 0 and dim % heads == 0,
                f"num_heads must divide the channels of each stage, but are {self.num_heads} for "
                f"{self.dims}",
            )
        for argument in ("window_size", "patch_size"):
            value = getattr(self, argument)
            check(value > 0, f"{argument} must be 1 or more, but is {value}")
        check(
            0.0 <= self.drop_path_rate < 1.0,
            f"drop_path_rate must be in [0, 1), but is {self.drop_path_rate}",
        )
        check(self.num_classes >= 0, f"num_classes must be 0 or more, but is {self.num_classes}")
