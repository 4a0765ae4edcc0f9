"""A chip's memory, by what fills it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from convnext_jax.training.state import TrainState

# Batches that lie on the devices beside the one that a step works on: two that are copied ahead,
# and that of the second step in flight.
_BATCHES_WAITING = 3


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip.

    Attributes:
      parameters: float32.
      optimizer: its moments.
      average: the parameters' moving average.
      batch: images and labels of one step.
      waiting: further batches that the training loop keeps on the devices.
      padding: by which parameters to batch are rounded up to the memory's tiles.
      temporaries: activations, gradients and all else that lives within a step.
      program: its code, and results that take no argument's place.
    """

    parameters: int
    optimizer: int
    average: int
    batch: int
    waiting: int
    padding: int = 0
    temporaries: int = 0
    program: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @property
    def fixed(self) -> int:
        """What does not depend on the number of images."""
        return self.parameters + self.optimizer + self.average + self.program

    def with_program(self, compiled: jax.stages.Compiled) -> Memory:
        """Adds what the compiler says of the step that works on it."""
        stats: Any = compiled.memory_analysis()
        arguments = self.parameters + self.optimizer + self.average + self.batch
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return dataclasses.replace(
            self,
            padding=int(stats.argument_size_in_bytes) - arguments,
            temporaries=int(stats.temp_size_in_bytes),
            program=int(results + stats.generated_code_size_in_bytes),
        )

    def with_total(self, total: int) -> Memory:
        """Takes what is left of a total for temporaries: all that is known of a refused step."""
        left = total - dataclasses.replace(self, temporaries=0).total
        return dataclasses.replace(self, temporaries=max(left, 0))


def state_and_batch(state: TrainState, batch: Any) -> Memory:
    """What lies in memory between steps.

    Args:
      state: arrays or ShapeDtypeStructs with their shardings.
      batch: the same.

    Returns:
      The bytes, those of a step not among them.
    """
    one = bytes_on_each(batch)
    return Memory(
        parameters=bytes_on_each(state.variables),
        optimizer=bytes_on_each(state.opt_state),
        average=bytes_on_each(state.ema_variables),
        batch=one,
        waiting=_BATCHES_WAITING * one,
    )


def bytes_on_each(tree: Any) -> int:
    """Bytes that each device holds of a tree of arrays, or of ShapeDtypeStructs, with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
