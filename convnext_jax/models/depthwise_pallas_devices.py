"""The Pallas kernels over several devices: each filters its own images.

A compiler that shares out a program among devices can't cut a Pallas call in parts. So the kernels
are called within `jax.shard_map`, which needs to know the mesh: it is the one that is traced under,
see `jax.sharding.use_abstract_mesh`. The batch is taken to be cut along all of its axes, as
`training/sharding.py` cuts it; one that is cut otherwise would be moved.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax.typing import PrecisionLike
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from convnext_jax.models import depthwise_pallas, depthwise_pallas_lowering


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How the kernels are called.

    Attributes:
      required: see `depthwise_pallas_lowering.filtered`.
      precision: see there.
      mesh: the devices; None for a single one, or where each has its own images already.
      axes: of the mesh, those along which the batch is to be cut.
    """

    required: bool
    precision: PrecisionLike
    mesh: AbstractMesh | None = None
    axes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """Parts that the batch is cut into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in self.axes)

    def filtered(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Filters x (B, H, W, C) by kernel (k, k, 1, C), into x's shape and type."""

        def on_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return depthwise_pallas_lowering.filtered(
                x, kernel, required=self.required, precision=self.precision
            )

        if self.mesh is None:
            return on_one(x, kernel)
        return self._mapped(on_one, (P(self.axes), P()), P(self.axes))(x, kernel)

    def kernel_gradient(self, x: jax.Array, gradient: jax.Array, kernel_size: int) -> jax.Array:
        """The gradient by the kernel, (k, k, 1, C) float32, summed over the devices."""

        def on_one(x: jax.Array, gradient: jax.Array) -> jax.Array:
            return depthwise_pallas_lowering.kernel_gradient(
                x, gradient, kernel_size, required=self.required, precision=self.precision
            )

        if self.mesh is None:
            return on_one(x, gradient)

        def summed(x: jax.Array, gradient: jax.Array) -> jax.Array:
            return jax.lax.psum(on_one(x, gradient), self.axes)

        return self._mapped(summed, (P(self.axes), P(self.axes)), P())(x, gradient)

    def _mapped(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        # The derivatives are written out, so what `check_vma` is for isn't needed.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=False,
        )


def kernels_for(
    shape: tuple[int, ...],
    kernel_size: int,
    dtype: Any,
    *,
    required: bool,
    precision: PrecisionLike,
) -> Kernels | None:
    """Chooses whether and how images are filtered by the kernels on a TPU.

    Args:
      shape: (B, H, W, C) of the images of all devices.
      kernel_size: k.
      dtype: of the images.
      required: whether to use the kernels wherever they can be.
      precision: see `depthwise_pallas_lowering.filtered`.

    Returns:
      How; None for XLA's convolution.

    Raises:
      ValueError: if they are required and can't be used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    )
    kernels = Kernels(required, precision, mesh if axes else None, axes)
    if reason := _unsuitable(shape, kernel_size, dtype, mesh, kernels.devices):
        if required:
            raise ValueError(f"implementation='pallas' takes {reason}; use implementation='auto'")
        return None
    if required or depthwise_pallas.pays((shape[0] // kernels.devices, *shape[1:]), dtype):
        return kernels
    return None


def _unsuitable(
    shape: tuple[int, ...], kernel_size: int, dtype: Any, mesh: AbstractMesh, devices: int
) -> str | None:
    """What the kernels can't do with such images on such devices."""
    if not all(isinstance(n, int) for n in shape):
        return f"images of a known shape, but theirs is {shape}"
    if AxisType.Explicit in mesh.axis_types:
        return f"a mesh without axes of type Explicit, but it is {mesh}"
    if shape[0] % devices:
        return f"a batch that {devices} devices divide, but it has {shape[0]} images"
    if not depthwise_pallas.is_supported(shape, kernel_size, dtype):
        return (
            f"float32 or bfloat16 images whose rows fit VMEM, but they are {shape[2]} pixels wide "
            f"and {jax.numpy.dtype(dtype)}"
        )
    return None
