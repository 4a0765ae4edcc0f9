"""ConvNeXt (arXiv 2201.03545), ConvNeXt V2 (arXiv 2301.00808) and isotropic ConvNeXt.

One module: what tells the variants apart are its arguments; `registry.py` names the published sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from convnext_jax.models.blocks import Stage, Stem
from convnext_jax.models.depthwise import IMPLEMENTATIONS, Implementation
from convnext_jax.models.layers import LayerNorm, reference_kernel_init, stochastic_depth_rates
from convnext_jax.models.mlp_pallas_devices import MLP_IMPLEMENTATIONS, MlpImplementation
from convnext_jax.models.remat import check_policy


class ConvNeXt(nn.Module):
    """ConvNeXt V1, V2 and isotropic, as a classifier or a backbone.

    `model.apply(variables, images, train=False)` gives logits; `method="pooled_features"` and
    `method="feature_maps"` give what lies before the head. All take images (B, H, W, C_in) of any
    float type; C_in is taken from the first call, and H and W are free at every call as long as
    they are at least `strides[-1]` (32 in the published models). Training with
    `drop_path_rate` > 0 needs `rngs={"dropout": key}`.

    Parameters lie at `stem/{conv,norm}`,
    `stages_i/blocks_j/{dwconv,norm,pwconv1,grn,pwconv2,gamma}`, `stages_i/downsample/{norm,conv}`
    (i ≥ 1), `norm`, `pre_logits` (with `head_hidden`), `head` and `feature_norm_i` (with
    `feature_norms`).

    Attributes:
      num_classes: width of the head; 0 for no head, then the model returns the pooled features.
      depths: blocks per stage.
      dims: channels per stage.
      isotropic: one stage at the stem's resolution, whose stem has no norm (section 3.3).
      patch_size: kernel size of the stem; None for 4, and for 16 in the isotropic model.
      stem_stride: stride of the stem, at most `patch_size` (None for just that). Smaller ones suit
        small images; see `Stem` for their padding.
      kernel_size: of the depthwise convolutions, odd.
      depthwise: their implementation, "auto", "xla", "shifts" or "pallas"; see `depthwise_conv`.
      mlp: implementation of what follows these in a block, "auto", "xla" or "pallas"; see
        `devices_for`.
      drop_path_rate: stochastic depth rate of the last block, in [0, 1); see
        `stochastic_depth_rates`.
      layer_scale_init: initial layer scale; None or 0 for no such parameter.
      use_grn: global response normalisation in every block (V2).
      head_norm_first: normalise before pooling rather than after.
      head_hidden: width of a hidden layer with GELU before the head; None for none.
      feature_norms: a LayerNorm on each output of `feature_maps`, as detection backbones have.
      norm_eps: epsilon of all layer norms.
      head_init_scale: factor on the head's initial weights (its bias starts at 0 in any case).
      remat: gradient checkpointing: each block computes its activations again in the backward pass.
        True keeps the block's input alone; "depthwise" keeps the depthwise convolution's output
        too, and "products" the outputs of all three products, so that only norms, GELU and the like
        are computed twice. See `POLICIES` in `remat.py`.
      scan_blocks: run the blocks of each stage of two and more as one loop (`jax.lax.scan`), which
        compiles one block instead of all. Parameters, random draws and results are the same but for
        rounding. `remat=False` means "products" in the loop, and the kernels of a stage lie stacked
        in memory, in the compute type. Where intermediates are asked for (`sow`,
        `capture_intermediates`) there is no loop.
      dtype: compute type and that of the residual stream; pooling, the final norm, the head and
        the logits are float32 whatever it is.
      param_dtype: type of the parameters.
      precision: of all products; None for the highest where they are float32 (XLA's default on a
        TPU would round their operands to bfloat16), and XLA's default otherwise.

    Raises:
      ValueError: on construction, if arguments contradict each other; on a call, if the images have
        the wrong rank or type or are too small.
    """

    num_classes: int = 1000
    depths: Sequence[int] = (3, 3, 9, 3)
    dims: Sequence[int] = (96, 192, 384, 768)
    isotropic: bool = False
    patch_size: int | None = None
    stem_stride: int | None = None
    kernel_size: int = 7
    depthwise: Implementation = "auto"
    mlp: MlpImplementation = "auto"
    drop_path_rate: float = 0.0
    layer_scale_init: float | None = 1e-6
    use_grn: bool = False
    head_norm_first: bool = False
    head_hidden: int | None = None
    feature_norms: bool = False
    norm_eps: float = 1e-6
    head_init_scale: float = 1.0
    remat: bool | str = False
    scan_blocks: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    def __post_init__(self) -> None:
        # Lists, as configs give them, would make the module unhashable and so no static argument.
        self.depths, self.dims = tuple(self.depths), tuple(self.dims)
        self._check_arguments()
        super().__post_init__()

    @property
    def stem_kernel_size(self) -> int:
        """Kernel size of the stem, `patch_size` with its default filled in."""
        if self.patch_size is not None:
            return self.patch_size
        return 16 if self.isotropic else 4

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's output relative to the image, (4, 8, 16, 32) for most models."""
        stem = self.stem_kernel_size if self.stem_stride is None else self.stem_stride
        return tuple(stem * 2**i for i in range(len(self.depths)))

    def setup(self) -> None:
        """Declares the submodules, shared by the three methods that take images."""

        def precision_for(dtype: Dtype) -> PrecisionLike:
            if self.precision is None and jnp.dtype(dtype) == jnp.float32:
                return jax.lax.Precision.HIGHEST
            return self.precision

        trunk: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": precision_for(self.dtype),
        }
        self.stem = Stem(
            self.dims[0],
            patch_size=self.stem_kernel_size,
            stride=self.strides[0],
            use_norm=not self.isotropic,
            **trunk,
        )
        self.stages = [
            Stage(
                features,
                drop_rates=rates,
                downsample=i > 0,
                remat=self.remat,
                scan_blocks=self.scan_blocks,
                layer_scale_init=self.layer_scale_init,
                use_grn=self.use_grn,
                kernel_size=self.kernel_size,
                depthwise=self.depthwise,
                mlp=self.mlp,
                **trunk,
            )
            for i, (features, rates) in enumerate(
                zip(
                    self.dims,
                    stochastic_depth_rates(self.drop_path_rate, self.depths),
                    strict=True,
                )
            )
        ]
        if self.feature_norms:
            self.feature_norm = [
                LayerNorm(self.norm_eps, self.dtype, self.param_dtype) for _ in self.dims
            ]

        self.norm = LayerNorm(self.norm_eps, jnp.float32, self.param_dtype)
        head: dict[str, Any] = {
            "dtype": jnp.float32,
            "param_dtype": self.param_dtype,
            "precision": precision_for(jnp.float32),
        }
        if self.num_classes and self.head_hidden:
            self.pre_logits = nn.Dense(self.head_hidden, kernel_init=reference_kernel_init, **head)
        if self.num_classes:
            init = nn.initializers.normal(stddev=0.02 * self.head_init_scale)
            self.head = nn.Dense(self.num_classes, kernel_init=init, **head)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: (B, H, W, C_in), normalised floats.
          train: whether stochastic depth is active.

        Returns:
          float32 logits (B, num_classes), or with `num_classes=0` the pooled features.
        """
        maps = self._stage_outputs(images, range(len(self.depths)), train)
        if self.is_initializing() and self.feature_norms:
            # The head doesn't read these norms, but a plain `init` must create their parameters.
            self._normalise_maps(maps)
        x = self._pool(maps[len(self.depths) - 1])
        if not self.num_classes:
            return x
        if self.head_hidden:
            x = nn.gelu(self.pre_logits(x), approximate=False)
        return self.head(x)

    def pooled_features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Gives what the head reads: the last stage's output, averaged and normalised.

        Args:
          images: (B, H, W, C_in), normalised floats.
          train: whether stochastic depth is active.

        Returns:
          float32 (B, dims[-1]).
        """
        last = len(self.depths) - 1
        return self._pool(self._stage_outputs(images, (last,), train)[last])

    def feature_maps(
        self, images: jax.Array, indices: Sequence[int] | None = None, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """Gives the outputs of stages, for detection and segmentation.

        Stages behind the last index asked for are not computed.

        Args:
          images: (B, H, W, C_in), normalised floats.
          indices: which stages, in the order wanted; None for all of them.
          train: whether stochastic depth is active.

        Returns:
          For each index i an array (B, ⌊H/strides[i]⌋, ⌊W/strides[i]⌋, dims[i]) of type `dtype`,
          layer-normalised if `feature_norms`.

        Raises:
          ValueError: if an index names no stage, or there are none.
        """
        count = len(self.depths)
        wanted = tuple(range(count) if indices is None else indices)
        if not wanted or not all(0 <= i < count for i in wanted):
            raise ValueError(
                f"feature_maps: indices must be one or more of 0..{count - 1}, the stages of this "
                f"model, but are {wanted}"
            )
        maps = self._stage_outputs(images, wanted, train)
        if self.feature_norms:
            maps = self._normalise_maps(maps)
        return tuple(maps[i] for i in wanted)

    def _stage_outputs(
        self, images: jax.Array, wanted: Sequence[int], train: bool
    ) -> dict[int, jax.Array]:
        self._check_images(images, self.strides[max(wanted)])
        x = self.stem(images)
        outputs = {}
        for i in range(max(wanted) + 1):
            x = self.stages[i](x, train)
            if i in wanted:
                outputs[i] = x
        return outputs

    def _normalise_maps(self, maps: dict[int, jax.Array]) -> dict[int, jax.Array]:
        return {i: self.feature_norm[i](x) for i, x in maps.items()}

    def _pool(self, x: jax.Array) -> jax.Array:
        if self.head_norm_first:
            return self.norm(x).mean(axis=(1, 2))
        return self.norm(x.astype(jnp.float32).mean(axis=(1, 2)))

    def _check_images(self, images: jax.Array, smallest: int) -> None:
        if images.ndim != 4:
            raise ValueError(
                f"ConvNeXt takes images (batch, height, width, channels), but got shape "
                f"{images.shape}; add a batch axis to a single image"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"ConvNeXt takes normalised floating-point images, but got {images.dtype}; convert "
                f"and normalise them first"
            )
        if any(side < smallest for side in images.shape[1:3]):
            height, width = images.shape[1:3]
            raise ValueError(
                f"images of {height}×{width} pixels are too small for this ConvNeXt, whose stride "
                f"of {smallest} needs at least {smallest} in height and width; enlarge the images "
                f"or lower stem_stride"
            )

    def _check_arguments(self) -> None:
        def check(holds: bool, requirement: str) -> None:
            if not holds:
                raise ValueError(f"ConvNeXt: {requirement}")

        check(
            0 < len(self.depths) == len(self.dims),
            f"depths and dims must have one entry per stage, but are {self.depths} and {self.dims}",
        )
        check(
            min(self.depths) > 0 and min(self.dims) > 0,
            f"depths and dims must be positive, but are {self.depths} and {self.dims}",
        )
        check(
            not self.isotropic or len(self.depths) == 1,
            f"isotropic=True takes a single depth and dim, such as depths=(18,) and dims=(384,), "
            f"but depths is {self.depths}",
        )
        check(
            1 <= self.strides[0] <= self.stem_kernel_size,
            f"stem_stride must be between 1 and patch_size={self.stem_kernel_size}, but is "
            f"{self.strides[0]}",
        )
        check(
            self.kernel_size > 0 and self.kernel_size % 2 == 1,
            f"kernel_size must be odd, but is {self.kernel_size}",
        )
        check(
            self.depthwise in IMPLEMENTATIONS,
            f"depthwise must be one of {', '.join(IMPLEMENTATIONS)}, but is {self.depthwise!r}",
        )
        check(
            self.mlp in MLP_IMPLEMENTATIONS,
            f"mlp must be one of {', '.join(MLP_IMPLEMENTATIONS)}, but is {self.mlp!r}",
        )
        check(
            0.0 <= self.drop_path_rate < 1.0,
            f"drop_path_rate must be in [0, 1), but is {self.drop_path_rate}",
        )
        check_policy(self.remat)
        check(self.num_classes >= 0, f"num_classes must be 0 or more, but is {self.num_classes}")
