"""Options that XLA compiles a forward pass with on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

# jaxlib gives products to a library that takes in what lies around them, and then spreads biases
# over whole arrays beforehand: a ConvNeXt-T takes a third longer and five times the memory. This
# leaves that library convolutions alone, each by itself. And vectors as wide as the CPU has them.
_OF_CPUS = (
    ("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"),
    ("xla_cpu_prefer_vector_width", "512"),
)


def for_inference(mesh: Mesh | None = None) -> dict[str, str]:
    """For `jax.jit(…, compiler_options=…)` of a network's forward pass.

    Args:
      mesh: the devices that it is compiled for; None for the default backend's.

    Returns:
      On CPUs those of the options that this jaxlib knows; on other backends none.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return dict(_known()) if platform == "cpu" else {}


@functools.cache
def _known() -> Mapping[str, str]:
    return {name: value for name, value in _OF_CPUS if _is_known(name, value)}


def _is_known(name: str, value: str) -> bool:
    lowered = jax.jit(lambda: 0).lower()
    try:
        lowered.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
