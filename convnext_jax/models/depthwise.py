"""The depthwise convolution of the blocks, and its path per backend.

On the CPU, XLA's depthwise convolution is so slow that it took three quarters of a small model's
training step, and more. There each of the three products is written out instead: forward and input
gradient as k² shifted multiply-adds, which XLA fuses into one pass, and the kernel gradient as one
matrix product per channel. Other backends keep XLA's.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer, PrecisionLike

Implementation = Literal["auto", "xla", "shifts"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

# Up to this many pixels the kernel gradient multiplies all pairs of pixels; beyond, row by row.
_MAX_PIXELS_IN_PAIRS = 400


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
        return _shifts(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=_shifts, default=lambda x, kernel: _xla(x, kernel, precision)
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
        return _shifts(gradient, kernel[::-1, ::-1]), _kernel_gradient(x, gradient, kernel)

    def by_xla(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, vjp = jax.vjp(lambda x, kernel: _xla(x, kernel, precision), x, kernel)
        return vjp(gradient)

    if implementation == "shifts":
        return by_shifts(*residuals, gradient)
    return jax.lax.platform_dependent(*residuals, gradient, cpu=by_shifts, default=by_xla)


_by_backend.defvjp(_forward, _backward)


def _shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    k, (_, height, width, _) = kernel.shape[0], x.shape
    padded = _pad(x.astype(jnp.float32), k // 2)
    taps = kernel.astype(jnp.float32).reshape(k, k, 1, 1, 1, -1)
    total = jnp.zeros(x.shape, jnp.float32)
    for u in range(k):
        for v in range(k):
            total += padded[:, u : u + height, v : v + width] * taps[u, v]
    return total.astype(x.dtype)


def _kernel_gradient(x: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sums x[b, i + u - m, j + v - m, c] · gradient[b, i, j, c] over b, i and j, by u, v and c."""
    k, (_, height, width, _) = kernel.shape[0], x.shape
    by_pairs = height * width <= _MAX_PIXELS_IN_PAIRS
    taps = (_pixel_pairs if by_pairs else _row_pairs)(
        x.astype(jnp.float32), gradient.astype(jnp.float32), k
    )
    return taps.reshape(kernel.shape).astype(kernel.dtype)


def _pixel_pairs(x: jax.Array, gradient: jax.Array, k: int) -> jax.Array:
    """All pairs of pixels in one product over the batch, then the sums along the pairs' offsets."""
    _, height, width, channels = x.shape
    pairs = jnp.matmul(
        x.transpose(3, 1, 2, 0).reshape(channels, height * width, -1),
        gradient.transpose(3, 0, 1, 2).reshape(channels, -1, height * width),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(channels, height, width, height, width)
    # offsets[u, a, i] is 1 where row a of x meets row i of the gradient under tap u.
    rows, columns = (
        np.stack([np.eye(size, k=k // 2 - u, dtype=np.float32) for u in range(k)])
        for size in (height, width)
    )
    by_row = jnp.einsum("capiq,uai->cupq", pairs, rows)
    return jnp.einsum("cupq,vpq->uvc", by_row, columns)


def _row_pairs(x: jax.Array, gradient: jax.Array, k: int) -> jax.Array:
    """For each row offset, all pairs of columns in one product over the batch and the rows."""
    batch, height, width, channels = x.shape
    padded = _pad(x, k // 2).transpose(3, 0, 1, 2)
    rows = gradient.transpose(3, 0, 1, 2).reshape(channels, batch * height, width)
    columns = np.stack([np.eye(width, width + k - 1, k=v, dtype=np.float32) for v in range(k)])
    taps = []
    for u in range(k):
        shifted = padded[:, :, u : u + height].reshape(channels, batch * height, -1)
        pairs = jnp.einsum("crj,crp->cjp", rows, shifted, precision=jax.lax.Precision.HIGHEST)
        taps.append(jnp.einsum("cjp,vjp->vc", pairs, columns))
    return jnp.stack(taps)


def _pad(x: jax.Array, margin: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
