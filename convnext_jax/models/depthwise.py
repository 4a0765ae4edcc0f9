"""The depthwise convolution of the blocks, and its path per backend.

On the CPU, XLA's depthwise convolution is so slow that it took three quarters of a small model's
training step, and more. There each of the three products is written out instead, see
`depthwise_shifts.py`. On a TPU, XLA's leaves the matrix units idle; the Pallas kernels in
`depthwise_pallas.py` use them. Other backends keep XLA's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from convnext_jax.models import depthwise_shifts, depthwise_xla
from convnext_jax.models.channelwise import shift_channels, sum_over_pixels
from convnext_jax.models.depthwise_pallas_devices import Kernels, kernels_for

Implementation = Literal["auto", "xla", "shifts", "pallas"]
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
        return depthwise_conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            bias.astype(self.dtype),
            implementation=self.implementation,
            precision=self.precision,
        )


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: Implementation = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Correlates each channel of x with its own filter, zero-padded to the same height and width.

    "xla" is XLA's convolution. "shifts" are shifted multiply-adds, made for CPUs. "pallas" are
    kernels for TPUs, and an error on other backends. "auto" is "shifts" on the CPU; on a TPU
    "pallas" where that pays (`depthwise_pallas.pays`) and the images are supported
    (`depthwise_pallas.is_supported`), "xla" otherwise; and "xla" elsewhere. It is decided when the
    program is compiled for a backend.

    "shifts" and "pallas" sum in float32 and multiply float32 exactly. They, and "auto", have
    derivatives of any order, but no forward-mode ones; within `jax.shard_map` these take
    `check_vma=False`.

    Over several devices, "pallas" must know the mesh along all of whose axes the batch is cut:
    trace under `jax.sharding.use_abstract_mesh`, with axes of type Auto, or within `jax.shard_map`.
    Where it can't know, "auto" is "xla".

    Args:
      x: (B, H, W, C).
      kernel: (k, k, 1, C) with odd k, of x's type.
      bias: (C,), of x's type, added to the result.
      implementation: "auto", "xla", "shifts" or "pallas".
      precision: of XLA's convolution, see `jax.lax.Precision`.

    Returns:
      (B, H, W, C), of x's type.

    Raises:
      ValueError: if the implementation has another name; of "pallas", if it doesn't support the
        images, and, when the program is lowered, for another backend than a TPU or for several
        devices without their mesh.
    """
    if implementation == "xla":
        return _shift(depthwise_xla.convolution(x, kernel, precision), bias)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but is {implementation!r}"
        )
    kernels = None
    if implementation != "shifts":
        required = implementation == "pallas"
        kernels = kernels_for(
            x.shape, kernel.shape[0], x.dtype, required=required, precision=precision
        )
    return _filter(x, kernel, bias, _Path(implementation, precision, kernels))


@dataclasses.dataclass(frozen=True)
class _Path:
    """How both products are computed.

    Attributes:
      implementation: "auto", "shifts" or "pallas".
      precision: see `depthwise_conv`.
      kernels: what a TPU uses; None for XLA's convolution.
    """

    implementation: Implementation
    precision: PrecisionLike
    kernels: Kernels | None

    def choose(
        self,
        shifts: Callable[..., jax.Array],
        xla: Callable[..., jax.Array],
        pallas: Callable[[Kernels], Callable[..., jax.Array]],
        *operands: jax.Array | None,
    ) -> jax.Array:
        if self.implementation == "shifts":
            return shifts(*operands)
        kernels = {} if self.kernels is None else {"tpu": pallas(self.kernels)}
        if self.implementation == "pallas":
            return kernels["tpu"](*operands)
        return jax.lax.platform_dependent(*operands, cpu=shifts, default=xla, **kernels)


# The filter is linear in images and kernel, and its gradients are products of the same two kinds:
# so are theirs.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _filter(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, path: _Path) -> jax.Array:
    def then_shift(filtered: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, kernel, bias: _shift(filtered(x, kernel), bias)

    return path.choose(
        depthwise_shifts.shifts,
        then_shift(lambda x, kernel: depthwise_xla.convolution(x, kernel, path.precision)),
        lambda kernels: then_shift(kernels.filtered),
        x,
        kernel,
        bias,
    )


_Filtered = tuple[jax.Array, jax.Array, jax.Array | None]


def _filter_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, path: _Path
) -> tuple[jax.Array, _Filtered]:
    return _filter(x, kernel, bias, path), (x, kernel, bias)


def _filter_backward(path: _Path, residuals: _Filtered, gradient: jax.Array) -> _Filtered:
    x, kernel, bias = residuals
    by_x = _filter(gradient, kernel[::-1, ::-1], None, path)
    by_kernel = _kernel_gradient(x, gradient, kernel.shape[0], path)
    return by_x, by_kernel, None if bias is None else sum_over_pixels(gradient)


def _shift(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else shift_channels(x, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kernel_gradient(x: jax.Array, gradient: jax.Array, k: int, path: _Path) -> jax.Array:
    def by_shifts(x: jax.Array, gradient: jax.Array) -> jax.Array:
        kernel = jnp.zeros((k, k, 1, x.shape[-1]), x.dtype)  # for its shape and type alone
        return depthwise_shifts.kernel_gradient(x, gradient, kernel)

    def by_pallas(kernels: Kernels) -> Callable[..., jax.Array]:
        return lambda x, g: kernels.kernel_gradient(x, g, k).astype(x.dtype)

    return path.choose(
        by_shifts,
        lambda x, gradient: depthwise_xla.kernel_gradient(x, gradient, k, path.precision),
        by_pallas,
        x,
        gradient,
    )


def _kernel_gradient_forward(
    x: jax.Array, gradient: jax.Array, k: int, path: _Path
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _kernel_gradient(x, gradient, k, path), (x, gradient)


def _kernel_gradient_backward(
    k: int, path: _Path, residuals: tuple[jax.Array, jax.Array], taps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, gradient = residuals
    return _filter(gradient, taps[::-1, ::-1], None, path), _filter(x, taps, None, path)


_filter.defvjp(_filter_forward, _filter_backward)
_kernel_gradient.defvjp(_kernel_gradient_forward, _kernel_gradient_backward)
