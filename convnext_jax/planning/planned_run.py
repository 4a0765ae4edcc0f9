"""A config laid out on a topology: the very training step of `train.py`, compiled for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from convnext_jax import experiment
from convnext_jax.analysis.tpu import OutOfHbmError, TpuTopology, compile_for_tpu
from convnext_jax.analysis.without_kernels import without_kernels
from convnext_jax.models.registry import Network
from convnext_jax.planning.memory import Memory, state_and_batch
from convnext_jax.planning.training_sets import TrainingSet
from convnext_jax.training import sharding
from convnext_jax.training.state import TrainState, abstract_state
from convnext_jax.training.step import Batch, Metrics, jit_train_step

_log = logging.getLogger(__name__)


class PlannedRun:
    """What `train.py` would build, of shapes instead of arrays.

    Args:
      config: the run.
      topology: of which the mesh is made.
      data: size of the training set.

    Attributes:
      config: as given.
      topology: as given.
      examples: images of the training set.
      mesh: over its devices.
      durations: in steps.
      model: the network, without Pallas kernels.

    Raises:
      UserError: for a mistake in the config, such as a batch that the chips don't divide.
    """

    def __init__(self, config: ConfigDict, topology: TpuTopology, data: TrainingSet):
        self.config = config
        self.topology = topology
        self.examples = data.examples
        self.mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, topology.devices)
        experiment.check_batch_sizes(config, self.mesh.size)
        self.durations = experiment.durations(config, data.examples)
        self.model = without_kernels(experiment.build_model(config, data.classes, self.mesh.size))
        self._optimizer, self._schedule = experiment.build_optimizer(
            config, self.model, self.durations
        )
        self._train_step(self.images_on_each, self.model)  # for the mistakes that it finds

    @property
    def chips(self) -> int:
        """Chips, and devices of the mesh."""
        return self.mesh.size

    @property
    def images_on_each(self) -> int:
        """Images of the config's batch on each chip."""
        return int(self.config.batch_size) // self.chips

    def state(self, mesh: jax.sharding.Mesh | None = None) -> TrainState:
        """Shapes and shardings of the state, on another mesh if one is given."""
        size = self.config.data.image_size
        return abstract_state(
            self.model,
            self._optimizer,
            (size, size, 3),
            self.mesh if mesh is None else mesh,
            ema=self.config.ema_decay is not None,
        )

    def memory(self, images_on_each: int) -> Memory:
        """What lies in memory between steps."""
        return state_and_batch(self.state(), self._batch(images_on_each))

    def compile(self, images_on_each: int, *, remat: bool = False) -> jax.stages.Compiled:
        """Compiles the training step. It takes minutes, which is said to the log.

        Args:
          images_on_each: chip. For other numbers than the config's, mixing goes by groups of
            another size where its own doesn't divide the batch: memory and time stay the same.
          remat: compute activations again in the backward pass, whatever the config says.

        Raises:
          OutOfHbmError: if it does not fit.
        """
        _log.info(
            f"compiling {self.config.model.name} for {self.topology.name}, {self.chips} chips with "
            f"{images_on_each} images each{', rematerialised' if remat else ''}; this takes some "
            "minutes"
        )
        model = self.model.clone(remat=True) if remat else self.model
        state = self.state()
        step = jit_train_step(self._train_step(images_on_each, model), state, self.mesh)
        return compile_for_tpu(step, state, self._batch(images_on_each))

    def needed(self, images_on_each: int, *, remat: bool = False) -> int | None:
        """Bytes on each chip; None where the compiler refuses and gives no figure."""
        memory = self.memory(images_on_each)
        try:
            return memory.with_program(self.compile(images_on_each, remat=remat)).total
        except OutOfHbmError as error:
            return None if error.needed is None else error.needed + memory.waiting

    def _train_step(
        self, images_on_each: int, model: Network
    ) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        config = self.config.copy_and_resolve_references()
        config.batch_size = images_on_each * self.chips
        if config.batch_size != self.config.batch_size and config.mix.group_size:
            config.mix.group_size = math.gcd(config.mix.group_size, config.batch_size)
        return experiment.build_train_step(
            config, model, self._optimizer, self._schedule, self.mesh
        )

    def _batch(self, images_on_each: int) -> dict[str, jax.ShapeDtypeStruct]:
        rows, size = sharding.batch_sharding(self.mesh), self.config.data.image_size
        count = images_on_each * self.chips
        return {
            "image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8, sharding=rows),
            "label": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows),
        }
