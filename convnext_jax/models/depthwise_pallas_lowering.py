"""What stands in a traced program for the Pallas kernels, until the program is compiled.

Tracing the kernels takes longer than tracing a small model, and a program may be compiled for other
backends than a TPU. So two primitives stand for them: the filter, and the gradient by the kernel.
Lowered for a TPU they become the kernels. Lowered for several devices among which the compiler is
to share out the work they become XLA's convolution, since it can't cut a kernel's work in parts;
within `jax.shard_map` each device has its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from convnext_jax.models import depthwise_pallas, depthwise_xla


def filtered(
    x: jax.Array, kernel: jax.Array, *, required: bool, precision: PrecisionLike
) -> jax.Array:
    """Filters images.

    Args:
      x: (B, H, W, C), such as `depthwise_pallas.is_supported`.
      kernel: (k, k, 1, C), of x's type.
      required: whether to refuse other backends, and several devices, rather than use XLA's.
      precision: of XLA's, see `jax.lax.Precision`.

    Returns:
      (B, H, W, C), of x's type.

    Raises:
      ValueError: when lowered, if `required` can't be met.
    """
    return _filter.bind(x, kernel, required=required, precision=precision)


def kernel_gradient(
    x: jax.Array,
    gradient: jax.Array,
    kernel_size: int,
    *,
    required: bool,
    precision: PrecisionLike,
) -> jax.Array:
    """The gradient by the kernel, see `depthwise_pallas.kernel_gradient`; other arguments as above.

    Returns:
      (k, k, 1, C) float32.
    """
    return _gradient.bind(
        x, gradient, kernel_size=kernel_size, required=required, precision=precision
    )


# As functions of their own under `jit`, equal calls are traced and lowered once.
_kernel_filter = jax.jit(depthwise_pallas.forward)
_kernel_gradient = jax.jit(depthwise_pallas.kernel_gradient, static_argnums=2)


def _filter_by_kernels(x: jax.Array, kernel: jax.Array, **_: Any) -> jax.Array:
    return _kernel_filter(x, kernel)


def _filter_by_xla(
    x: jax.Array, kernel: jax.Array, *, precision: PrecisionLike, **_: Any
) -> jax.Array:
    return depthwise_xla.convolution(x, kernel, precision)


def _gradient_by_kernels(
    x: jax.Array, gradient: jax.Array, *, kernel_size: int, **_: Any
) -> jax.Array:
    return _kernel_gradient(x, gradient, kernel_size)


def _gradient_by_xla(
    x: jax.Array, gradient: jax.Array, *, kernel_size: int, precision: PrecisionLike, **_: Any
) -> jax.Array:
    by_kernel = depthwise_xla.kernel_gradient(x, gradient, kernel_size, precision)
    return by_kernel.astype(jnp.float32)


def _primitive(
    name: str,
    result: Callable[..., Any],
    by_kernels: Callable[..., jax.Array],
    by_xla: Callable[..., jax.Array],
) -> Primitive:
    """Makes a primitive.

    Args:
      name: of it.
      result: the abstract result, from the abstract operands and the parameters.
      by_kernels: what it stands for on a TPU.
      by_xla: what it stands for elsewhere, unless the kernels are required.
    """
    primitive = Primitive(name)
    primitive.def_abstract_eval(result)

    def evaluate(*operands: Any, **parameters: Any) -> Any:
        # `disable_jit` would lead back here.
        with jax.disable_jit(False):
            return jax.jit(functools.partial(primitive.bind, **parameters))(*operands)

    primitive.def_impl(evaluate)

    def lower(
        platform: str, context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any
    ) -> Any:
        alone = _has_its_own_images(context.module_context.axis_context)
        required = parameters["required"]
        if required and platform not in ("tpu", "cpu"):
            raise ValueError(_NO_TPU)
        if required and not alone:
            raise ValueError(
                "implementation='pallas' can't tell how the images are cut over this program's "
                "devices; call it within jax.sharding.use_abstract_mesh(mesh.abstract_mesh), with "
                "axes of type Auto over all of which the batch is cut, or use "
                "implementation='auto'"
            )
        function = by_kernels if required or (alone and platform == "tpu") else by_xla
        lowering = mlir.lower_fun(functools.partial(function, **parameters), multiple_results=False)
        try:
            return lowering(context, *operands)
        except ValueError as error:
            # Pallas's own refusal; tests have it interpret the kernels on the CPU.
            if platform == "cpu" and "interpret mode" in str(error):
                raise ValueError(_NO_TPU) from error
            raise

    mlir.register_lowering(primitive, functools.partial(lower, "other"))
    for platform in ("cpu", "tpu"):
        mlir.register_lowering(primitive, functools.partial(lower, platform), platform=platform)
    return primitive


_NO_TPU = "implementation='pallas' is for TPUs alone; use implementation='auto' on other backends"


def _has_its_own_images(axes: Any) -> bool:
    """Whether each device runs what is being lowered by itself, be it the only one."""
    manual = getattr(axes, "manual_axes", None)
    if manual is None:
        return getattr(axes, "num_devices", 1) == 1
    return set(manual) | set(axes.mesh.manual_axes) == set(axes.mesh.axis_names)


def _gradient_result(x: Any, gradient: Any, *, kernel_size: int, **_: Any) -> Any:
    return x.update(shape=(kernel_size, kernel_size, 1, x.shape[-1]), dtype=jnp.dtype(jnp.float32))


_filter = _primitive(
    "depthwise_filter", lambda x, kernel, **_: x, _filter_by_kernels, _filter_by_xla
)
_gradient = _primitive(
    "depthwise_kernel_gradient", _gradient_result, _gradient_by_kernels, _gradient_by_xla
)


def _batched_filter(
    operands: Sequence[jax.Array], axes: Sequence[int | None], **parameters: Any
) -> tuple[jax.Array, int]:
    x, kernel = operands
    if axes[1] is None:
        assert axes[0] is not None
        x = jnp.moveaxis(x, axes[0], 0)
        flat = _filter.bind(x.reshape(-1, *x.shape[2:]), kernel, **parameters)
        return flat.reshape(x.shape), 0
    size = kernel.shape[axes[1]]
    x, kernel = (_into_channels(a, axis, size) for a, axis in zip(operands, axes, strict=True))
    return _from_channels(_filter.bind(x, kernel, **parameters), size)


def _batched_gradient(
    operands: Sequence[jax.Array], axes: Sequence[int | None], **parameters: Any
) -> tuple[jax.Array, int]:
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
    x, gradient = (_into_channels(a, axis, size) for a, axis in zip(operands, axes, strict=True))
    return _from_channels(_gradient.bind(x, gradient, **parameters), size)


def _into_channels(array: jax.Array, axis: int | None, size: int) -> jax.Array:
    """An array for each of `size` calls, or one for all, as further channels of one array."""
    if axis is None:
        return jnp.tile(array, size)
    array = jnp.moveaxis(array, axis, -2)
    return array.reshape(*array.shape[:-2], -1)


def _from_channels(array: jax.Array, size: int) -> tuple[jax.Array, int]:
    return array.reshape(*array.shape[:-1], size, -1), array.ndim - 1


batching.primitive_batchers[_filter] = _batched_filter
batching.primitive_batchers[_gradient] = _batched_gradient
