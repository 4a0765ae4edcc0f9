"""Options that XLA compiles a network with on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

Option = tuple[str, str]

# As wide as the CPU has them; XLA's default is half of that.
_WIDE_VECTORS: Option = ("xla_cpu_prefer_vector_width", "512")
# jaxlib gives products and sums to a library that takes in what lies around them. It spreads biases
# over whole arrays beforehand, and writes down the windows of a depthwise convolution one by one: a
# ConvNeXt-T takes a third longer and five times the memory. This leaves that library convolutions
# alone, each by itself.
_PRODUCTS_APART: Option = (
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
)


def for_network(mesh: Mesh | None = None) -> dict[str, str]:
    """For `jax.jit(…, compiler_options=…)` of a network's forward pass or a training step.

    Args:
      mesh: the devices that it is compiled for; None for the default backend's.

    Returns:
      On CPUs those of the options that this jaxlib knows; on other backends none.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return _known((_PRODUCTS_APART, _WIDE_VECTORS)) if platform == "cpu" else {}


def _known(options: Iterable[Option]) -> dict[str, str]:
    return {name: value for name, value in options if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: str) -> bool:
    lowered = jax.jit(lambda: 0).lower()
    try:
        lowered.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
