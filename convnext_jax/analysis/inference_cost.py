"""What a TPU chip would take for inference, by its compiler's estimate; no TPU is needed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convnext_jax.analysis.estimate_cache import EstimateCache, InferenceEstimate
from convnext_jax.analysis.hlo import operations
from convnext_jax.analysis.tpu import TpuTopology, compile_for_tpu
from convnext_jax.analysis.without_kernels import without_kernels


def estimate_inference(
    model: nn.Module,
    topology: TpuTopology,
    *,
    image_size: int,
    batch_size: int,
    cache: EstimateCache | None = None,
    label: str = "",
) -> InferenceEstimate:
    """Compiles a forward pass from images to logits for one chip, and adds up its estimates.

    Parameters are float32, as they lie in a checkpoint; the images have the model's `dtype`. Pallas
    kernels are left out, see `without_kernels`.

    Args:
      model: a module called as `model.apply(variables, images, train=False)`, unbound.
      topology: of whose chips the first is taken.
      image_size: side in pixels.
      batch_size: images of the pass.
      cache: asked first, and given what it lacks.
      label: what the model is, for a person who reads the cache.

    Returns:
      The estimate. A compilation takes some ten seconds to some minutes.

    Raises:
      OutOfHbmError: if the batch does not fit the chip's memory.
    """
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    dtype = getattr(model, "dtype", jnp.float32)
    model = without_kernels(model)
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), dtype, sharding=sharding)
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )

    @jax.jit
    def inference(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    digest = _digest(inference.trace(variables, images).lower().as_text(), topology)
    cache = EstimateCache() if cache is None else cache
    if (kept := cache.get(digest)) is not None:
        return kept
    compiled = compile_for_tpu(inference, variables, images)
    program = operations(compiled.as_text() or "")
    cycles = sum(one.total_cycles for one in program)
    estimate = InferenceEstimate(
        images_per_second=batch_size * topology.chip.clock / cycles,
        batch_size=batch_size,
        cycles=cycles,
        without_estimate=sum(one.runs for one in program if not one.known),
    )
    cache.put(digest, f"{label}, {batch_size} images of {image_size} on {topology.name}", estimate)
    return estimate


def compiler_versions() -> dict[str, str]:
    """Versions of what compiles for TPUs, by package."""
    versions = {"jax": jax.__version__}
    # A libtpu named by TPU_LIBRARY_PATH need not be installed as a package.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["libtpu"] = importlib.metadata.version("libtpu")
    return versions


def _digest(program: str, topology: TpuTopology) -> str:
    # The program's text holds shapes, types and all that it does; it names no file and no line.
    stamp = json.dumps([topology.name, topology.chip.clock, compiler_versions()])
    return hashlib.sha256((stamp + program).encode()).hexdigest()
