"""Batch and layer normalisation behind one interface."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from convnext_jax.models.batch_norm import BatchNorm
from convnext_jax.models.layers import LayerNorm


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Batch or layer normalisation, called alike: within a module's `__call__`, under a name.

    Attributes:
      kind: "batch", with epsilon 1e-5 as in ResNet, or "layer", with 1e-6 as in ConvNeXt.
      groups: of the batch norm.
      dtype: type of the output.
      param_dtype: type of the parameters.
    """

    kind: Literal["batch", "layer"]
    groups: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __call__(
        self,
        x: jax.Array,
        train: bool,
        name: str,
        batch_scale_init: Initializer = nn.initializers.ones_init(),  # noqa: B008 (a constant)
    ) -> jax.Array:
        """Normalises x (B, ..., C); a batch norm's `scale` starts by `batch_scale_init`."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.kind == "layer":
            return LayerNorm(**types, name=name)(x)
        return BatchNorm(groups=self.groups, scale_init=batch_scale_init, **types, name=name)(
            x, train
        )
