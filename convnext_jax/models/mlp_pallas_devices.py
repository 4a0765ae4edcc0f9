"""Whether a block's second half runs by the Pallas kernels, and on which devices.

Unlike the depthwise convolution's kernels, these keep other things for the backward pass than XLA's
operations would, so a program for several backends can't have both: the choice is made when a block
is traced, by the devices of the mesh that it is traced under (`jax.sharding.use_abstract_mesh`), or
without one by the process's default device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from convnext_jax.models import mlp_pallas
from convnext_jax.models.mlp_pallas import Weights

MlpImplementation = Literal["auto", "xla", "pallas"]
MLP_IMPLEMENTATIONS: tuple[MlpImplementation, ...] = get_args(MlpImplementation)

# The kernels take 128 images at a time, and fewer take as long.
LEAST_IMAGES = 64


# As functions of their own under `jit`, equal calls are traced and lowered once.
_forward: Any = jax.jit(mlp_pallas.forward, static_argnames="epsilon")
_backward: Any = jax.jit(mlp_pallas.backward, static_argnames="epsilon")


@dataclasses.dataclass(frozen=True)
class Devices:
    """Over which the images are cut.

    Attributes:
      mesh: None for a single device, or where each has its own images already.
      axes: of the mesh, those along which the batch is cut.
    """

    mesh: AbstractMesh | None = None
    axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Parts that the batch is cut into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.axes)

    def forward(
        self, x: jax.Array, conv: jax.Array, keep: jax.Array, weights: Weights, epsilon: float
    ) -> jax.Array:
        """`mlp_pallas.forward` on each device's images."""
        images = P(self.axes)
        on_one = functools.partial(_forward, epsilon=epsilon)
        return self._mapped(on_one, (images, images, images, P()), images)(x, conv, keep, weights)

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
            return by_conv, by_weights if self.mesh is None else jax.lax.psum(by_weights, self.axes)

        images = P(self.axes)
        mapped = self._mapped(on_one, (images, images, images, P()), (images, P()))
        return mapped(conv, gradient, keep, weights)

    def _mapped(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        if self.mesh is None:
            return function
        # The derivatives are written out, so what `check_vma` is for isn't needed.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=False,
        )


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
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    )
    devices = Devices(mesh if axes else None, axes)
    reason = _why_not(shape, dtype, devices, mesh)
    if implementation == "pallas":
        if reason:
            raise ValueError(f"mlp='pallas' takes {reason}; use mlp='auto'")
        return devices
    if reason or dtype != jnp.bfloat16 or shape[0] // devices.count < LEAST_IMAGES:
        return None
    return devices


def _why_not(
    shape: tuple[int, ...], dtype: Any, devices: Devices, mesh: AbstractMesh
) -> str | None:
    """What the kernels would need, or None where they can be used."""
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
    if AxisType.Explicit in mesh.axis_types:
        return f"a mesh without axes of type Explicit, but it is {mesh}"
    if not all(isinstance(n, int) for n in shape):
        return f"images of a known shape, but theirs is {shape}"
    if shape[0] % devices.count:
        return f"a batch that {devices.count} devices divide, but it has {shape[0]} images"
    return mlp_pallas.why_not(shape, dtype)
