"""Whether and how the depthwise convolution runs by the Pallas kernels, on any devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax.typing import PrecisionLike
from jax.sharding import PartitionSpec as P

from convnext_jax.models import depthwise_pallas, depthwise_pallas_lowering
from convnext_jax.models.pallas_mesh import MeshOfImages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels(MeshOfImages):
    """The kernels, how they are called, and the devices over which their images are cut.

    Attributes:
      required: see `depthwise_pallas_lowering.filtered`.
      precision: see there.
    """

    required: bool
    precision: PrecisionLike

    def filtered(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Filters x (B, H, W, C) by kernel (k, k, 1, C), into x's shape and type."""

        def on_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return depthwise_pallas_lowering.filtered(
                x, kernel, required=self.required, precision=self.precision
            )

        return self.mapped(on_one, (P(self.axes), P()), P(self.axes))(x, kernel)

    def kernel_gradient(self, x: jax.Array, gradient: jax.Array, kernel_size: int) -> jax.Array:
        """The gradient by the kernel, (k, k, 1, C) float32, summed over the devices."""

        def on_one(x: jax.Array, gradient: jax.Array) -> jax.Array:
            return self.summed(
                depthwise_pallas_lowering.kernel_gradient(
                    x, gradient, kernel_size, required=self.required, precision=self.precision
                )
            )

        return self.mapped(on_one, (P(self.axes), P(self.axes)), P())(x, gradient)


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
    kernels = Kernels.surrounding(required=required, precision=precision)
    if reason := kernels.lacks(shape) or _unsupported(shape, kernel_size, dtype):
        if required:
            raise ValueError(f"implementation='pallas' takes {reason}; use implementation='auto'")
        return None
    if required or depthwise_pallas.pays((shape[0] // kernels.count, *shape[1:]), dtype):
        return kernels
    return None


def _unsupported(shape: tuple[int, ...], kernel_size: int, dtype: Any) -> str | None:
    """What the kernels can't do with such images."""
    if depthwise_pallas.is_supported(shape, kernel_size, dtype):
        return None
    return (
        f"float32 or bfloat16 images whose rows fit VMEM, but they are {shape[2]} pixels wide and "
        f"{jax.numpy.dtype(dtype)}"
    )
