"""The precision of products."""

from __future__ import annotations

from typing import Any

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


def dot_in_float32(a: jax.Array, b: jax.Array, contracting: Any, *, exact: bool) -> jax.Array:
    """A kernel's product, summed in float32.

    Args:
      a: float32 or bfloat16.
      b: of a's type.
      contracting: see `jax.lax.dot_general`.
      exact: multiply in float32 in any case: the CPU, where kernels are interpreted, has no product
        of bfloat16 with such sums.

    Returns:
      Float32.
    """
    if exact:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = precision_for(a.dtype, None)
    return jax.lax.dot_general(
        a, b, contracting, precision=precision, preferred_element_type=jnp.float32
    )
