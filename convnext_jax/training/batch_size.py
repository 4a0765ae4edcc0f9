"""A batch size for evaluation that fits the devices, found without running out of memory.

Larger batches give the same metrics, only sooner, until the device is busy; ConvNeXt at 224 pixels
is past that point at 256 images a device. So the step is compiled for 256, and the compiler is
asked what it will take; while that does not fit, half of it is tried. Nothing runs meanwhile, and
what was compiled last is what runs in the end, so that on most devices the search costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

LARGEST_PER_DEVICE = 256

# On the CPU a batch is as fast as its images one by one, and memory is everyone's.
_CPU_BATCH = 32

# Left to fragmentation, and to the batches that wait on the device.
_USABLE = 0.8


class FittingBatch(NamedTuple):
    """A batch size and the program for it.

    Attributes:
      size: the global batch.
      compiled: the step, compiled for it.
      bytes_needed: on each device, by the compiler; None where it does not say.
      bytes_available: on each device; None where that is not known, as on the CPU.
    """

    size: int
    compiled: Any
    bytes_needed: int | None
    bytes_available: int | None


def fitting_batch(
    compile_for: Callable[[int], Any],
    num_examples: int,
    devices: int,
    *,
    bytes_available: int | None,
) -> FittingBatch:
    """Finds the largest power of two a device, up to 256, that fits its memory.

    Args:
      compile_for: compiles the step for a global batch size, `jax.stages.Compiled`.
      num_examples: of the data set; the batch is not much larger.
      devices: number of devices.
      bytes_available: on each device, from `device_memory`; None for a batch of 32 in all.

    Returns:
      The batch size, a multiple of `devices`, and what was compiled. One image a device is given
      back even where it does not seem to fit.
    """
    largest = LARGEST_PER_DEVICE if bytes_available is not None else max(_CPU_BATCH // devices, 1)
    each = min(largest, 2 ** math.ceil(math.log2(max(num_examples / devices, 1))))
    while True:
        compiled = compile_for(each * devices)
        needed = program_bytes(compiled)
        fits = bytes_available is None or needed is None or needed <= _USABLE * bytes_available
        if fits or each == 1:
            return FittingBatch(each * devices, compiled, needed, bytes_available)
        each //= 2


def program_bytes(compiled: Any) -> int | None:
    """What a compiled program takes on each device: arguments, results and what lies between."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def device_memory(device: jax.Device) -> int | None:
    """The bytes that JAX may use on a device; None where it does not know, as on the CPU."""
    stats = device.memory_stats()
    return None if not stats else stats.get("bytes_limit")
