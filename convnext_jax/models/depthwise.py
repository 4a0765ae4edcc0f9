"""The depthwise convolution of the blocks, and its path per backend.

On the CPU, XLA's depthwise convolution is so slow that it took three quarters of a small model's
training step, and more. There each of the three products is written out instead, see
`depthwise_shifts.py`. Other backends keep XLA's.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models.depthwise_shifts import kernel_gradient, shifts

Implementation = Literal["auto", "xla", "shifts"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


class DepthwiseConv(nn.Module):
    """Stride-1 depthwise convolution that keeps height and width: each channel has its own filter.

    Its parameters are those of `nn.Conv(C, (k, k), feature_group_count=C)`: `kernel` (k, k, 1, C)
    and `bias` (C,).

    Attributes:
      kernel_size: k, odd; the input is padded with k // 2 zeros on every side.
      implementation: see `depthwise_conv`.
      dtype: compute type, also of the output.
      param_dtype: type of the parameters.
      precision: of the products, see `jax.lax.Precision`.
      kernel_init: initialiser of the kernel; the bias starts at 0.
    """

    kernel_size: int = 7
    implementation: Implementation = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Filters x (B, H, W, C), of any float type, into an array of its shape in `dtype`."""
        k, channels = self.kernel_size, x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (k, k, 1, channels), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), self.param_dtype)
        y = depthwise_conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            implementation=self.implementation,
            precision=self.precision,
        )
        return y + bias.astype(self.dtype).reshape(1, 1, 1, channels)


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    implementation: Implementation = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Correlates each channel of x with its own filter, zero-padded to the same height and width.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, 1, C) with odd k, of x's type.
      implementation: "xla" is XLA's convolution; "shifts" the shifted multiply-adds, which sum in
        float32 and have no forward-mode derivative; "auto" the latter on the CPU, the former
        elsewhere, decided when the program is compiled for a backend.
      precision: of XLA's convolution, see `jax.lax.Precision`.

    Returns:
      (B, H, W, C), of x's type.

    Raises:
      ValueError: if the implementation has another name.
    """
    if implementation == "xla":
        return _xla(x, kernel, precision)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but is {implementation!r}"
        )
    return _by_backend(x, kernel, implementation, precision)


def _xla(x: jax.Array, kernel: jax.Array, precision: PrecisionLike) -> jax.Array:
    margin = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((margin, margin), (margin, margin)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_backend(
    x: jax.Array, kernel: jax.Array, implementation: Implementation, precision: PrecisionLike
) -> jax.Array:
    if implementation == "shifts":
        return shifts(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=shifts, default=lambda x, kernel: _xla(x, kernel, precision)
    )


def _forward(
    x: jax.Array, kernel: jax.Array, implementation: Implementation, precision: PrecisionLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _by_backend(x, kernel, implementation, precision), (x, kernel)


def _backward(
    implementation: Implementation,
    precision: PrecisionLike,
    residuals: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def by_shifts(
        x: jax.Array, kernel: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return shifts(gradient, kernel[::-1, ::-1]), kernel_gradient(x, gradient, kernel)

    def by_xla(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, vjp = jax.vjp(lambda x, kernel: _xla(x, kernel, precision), x, kernel)
        return vjp(gradient)

    if implementation == "shifts":
        return by_shifts(*residuals, gradient)
    return jax.lax.platform_dependent(*residuals, gradient, cpu=by_shifts, default=by_xla)


_by_backend.defvjp(_forward, _backward)
