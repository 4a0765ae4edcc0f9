"""A block from its depthwise convolution to its end as one operation, with its own derivative."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from convnext_jax.models.mlp_pallas import Weights
from convnext_jax.models.mlp_pallas_devices import Devices

Residuals = tuple[jax.Array, jax.Array, Weights]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def add_branch(
    x: jax.Array,
    conv: jax.Array,
    keep: jax.Array,
    weights: Weights,
    epsilon: float,
    devices: Devices,
) -> jax.Array:
    """Gives x + keep · project(gelu(expand(normalise(conv + bias)))), by Pallas kernels on TPUs.

    The backward pass keeps conv alone and computes the rest anew. There is no forward-mode
    derivative.

    Args:
      x: (B, H, W, C), float32 or bfloat16.
      conv: of x's shape and type: the depthwise convolution without its bias.
      keep: (B,) float32, the factor of each image's branch; it gets no gradient.
      weights: of the branch.
      epsilon: of the layer norm.
      devices: over which the batch is cut, from `devices_for`.

    Returns:
      Of x's shape and type.
    """
    return devices.forward(x, conv, keep, weights, epsilon)


def _forward(
    x: jax.Array, conv: jax.Array, keep: jax.Array, weights: Weights, *static: Any
) -> tuple[jax.Array, Residuals]:
    return add_branch(x, conv, keep, weights, *static), (conv, keep, weights)


def _backward(
    epsilon: float, devices: Devices, residuals: Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Weights]:
    conv, keep, weights = residuals
    by_conv, by_weights = devices.backward(conv, gradient, keep, weights, epsilon)
    return gradient, by_conv, jnp.zeros_like(keep), by_weights


add_branch.defvjp(_forward, _backward)
