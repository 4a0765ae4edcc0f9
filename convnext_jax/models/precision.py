"""The precision of products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike


def precision_for(dtype: Dtype, given: PrecisionLike) -> PrecisionLike:
    """The precision of products whose operands are of a type.

    Args:
      dtype: the operands' type.
      given: what the user asks for, or None.

    Returns:
      `given`; where it is None the highest for float32, whose operands XLA's default on a TPU would
      round to bfloat16, and XLA's default for other types.
    """
    if given is None and jnp.dtype(dtype) == jnp.float32:
        return jax.lax.Precision.HIGHEST
    return given
