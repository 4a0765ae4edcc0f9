"""Whether a block's second half runs by the Pallas kernels, and on which devices.

Unlike the depthwise convolution's kernels, these keep other things for the backward pass than XLA's
operations would, so a program for several backends can't have both: the choice is made when a block
is traced, by the devices of the mesh that it is traced under (`jax.sharding.use_abstract_mesh`), or
without one by the process's default device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from convnext_jax.models import mlp_pallas
from convnext_jax.models.mlp_pallas import Weights
from convnext_jax.models.pallas_mesh import MeshOfImages

MlpImplementation = Literal["auto", "xla", "pallas"]
MLP_IMPLEMENTATIONS: tuple[MlpImplementation, ...] = get_args(MlpImplementation)

# The kernels take 128 images at a time, and fewer take as long.
LEAST_IMAGES = 64


# As functions of their own under `jit`, equal calls are traced and lowered once.
_forward: Any = jax.jit(mlp_pallas.forward, static_argnames="epsilon")
_backward: Any = jax.jit(mlp_pallas.backward, static_argnames="epsilon")


@dataclasses.dataclass(frozen=True)
class Devices(MeshOfImages):
    """The kernels, and the devices over which their images are cut."""

    def forward(
        self, x: jax.Array, conv: jax.Array, keep: jax.Array, weights: Weights, epsilon: float
    ) -> jax.Array:
        """`mlp_pallas.forward` on each device's images."""
        images = P(self.axes)
        on_one = functools.partial(_forward, epsilon=epsilon)
        return self.mapped(on_one, (images, images, images, P()), images)(x, conv, keep, weights)

    def backward(
        self,
        conv: jax.Array,
        gradient: jax.Array,
        keep: jax.Array,
        weights: Weights,
        epsilon: float,
    ) -> tuple[jax.Array, Weights]:
        """`mlp_pallas.backward` on each device's images; the weights' gradients are summed."""

        def on_one(*operands: jax.Array) -> tuple[jax.Array, Weights]:
            by_conv, by_weights = _backward(*operands, epsilon=epsilon)
            return by_conv, self.summed(by_weights)

        images = P(self.axes)
        mapped = self.mapped(on_one, (images, images, images, P()), (images, P()))
        return mapped(conv, gradient, keep, weights)


def devices_for(
    shape: tuple[int, ...], dtype: Any, implementation: MlpImplementation
) -> Devices | None:
    """Chooses whether a block's second half runs by the kernels, and on which devices.

    Args:
      shape: (B, H, W, C) of the residual stream on all devices.
      dtype: of it.
      implementation: "xla" for XLA's operations; "pallas" for the kernels; "auto" for the kernels
        on a TPU in bfloat16 where they are supported and each device has at least `LEAST_IMAGES`
        images, and XLA's operations otherwise.

    Returns:
      The devices, or None for XLA's operations.

    Raises:
      ValueError: if the kernels are required and can't be used.
    """
    if implementation == "xla":
        return None
    devices = Devices.surrounding()
    reason = _why_not(shape, dtype, devices)
    if implementation == "pallas":
        if reason:
            raise ValueError(f"mlp='pallas' takes {reason}; use mlp='auto'")
        return devices
    if reason or dtype != jnp.bfloat16 or shape[0] // devices.count < LEAST_IMAGES:
        return None
    return devices


def _why_not(shape: tuple[int, ...], dtype: Any, devices: Devices) -> str | None:
    """What the kernels would need, or None where they can be used."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = (
        jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform
    )
    if platform != "tpu":
        return f"a TPU, but the program is traced for the platform {platform!r}"
    if mesh.empty and jax.device_count() > 1:
        return (
            f"the mesh of this process's {jax.device_count()} devices, but it is traced under none "
            f"(jax.sharding.use_abstract_mesh)"
        )
    return devices.lacks(shape) or mlp_pallas.why_not(shape, dtype)
