"""Options that XLA compiles a network with on a CPU."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

Option = tuple[str, str]

# As wide as the CPU has them; XLA's default is half of that.
_WIDE_VECTORS: Option = ("xla_cpu_prefer_vector_width", "512")
# jaxlib gives products to a library that takes in what lies around them, and then spreads biases
# over whole arrays beforehand: a ConvNeXt-T takes a third longer and five times the memory. This
# leaves that library convolutions alone, each by itself. A training step is the slower for it.
_PRODUCTS_APART: Option = (
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
)


def for_inference(mesh: Mesh | None = None) -> dict[str, str]:
    """For `jax.jit(…, compiler_options=…)` of a network's forward pass.

    Args:
      mesh: the devices that it is compiled for; None for the default backend's.

    Returns:
      On CPUs those of the options that this jaxlib knows; on other backends none.
    """
    return _on_cpus((_PRODUCTS_APART, _WIDE_VECTORS), mesh)


def for_training(mesh: Mesh | None = None) -> dict[str, str]:
    """For `jax.jit(…, compiler_options=…)` of a training step; see `for_inference`."""
    return _on_cpus((_WIDE_VECTORS,), mesh)


def _on_cpus(options: tuple[Option, ...], mesh: Mesh | None) -> dict[str, str]:
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {k: v for k, v in options if _is_known(k, v)} if platform == "cpu" else {}


@functools.cache
def _is_known(name: str, value: str) -> bool:
    lowered = jax.jit(lambda: 0).lower()
    try:
        lowered.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
