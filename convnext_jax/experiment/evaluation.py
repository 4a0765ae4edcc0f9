"""The evaluation that a config describes, as a training run makes it now and then."""

import contextlib
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from convnext_jax.data.sources import Source
from convnext_jax.experiment.images import eval_batches
from convnext_jax.models.registry import Network
from convnext_jax.training import sharding
from convnext_jax.training.evaluation import evaluate
from convnext_jax.training.state import TrainState
from convnext_jax.training.step import jit_eval_step, make_eval_step


def build_evaluation(
    config: ConfigDict,
    model: Network,
    state: TrainState,
    mesh: Mesh,
    source: Source | None,
    interrupted: Callable[[], bool],
) -> Callable[[TrainState], dict[str, float] | None]:
    """The evaluation of a state on the evaluation split, its average beside it.

    Args:
      config: the run.
      model: its model.
      state: a state, or an abstract one, whose leaves carry their shardings.
      mesh: the devices.
      source: the evaluation split; with None what is returned must not be called.
      interrupted: see `training.evaluation.evaluate`.

    Returns:
      From a state to the metrics of `training.evaluation.evaluate`, or None if it was interrupted.
    """
    eval_step = jit_eval_step(
        make_eval_step(
            model, mean=tuple(config.augment.mean), std=tuple(config.augment.std), mesh=mesh
        ),
        state,
        mesh,
    )

    def evaluate_state(state: TrainState) -> dict[str, float] | None:
        assert source is not None
        host_batches = eval_batches(config, source)
        with contextlib.closing(host_batches):
            batches = sharding.prefetch_to_device(
                host_batches, sharding.batch_sharding(mesh), ("image", "label", "mask")
            )
            return evaluate(
                eval_step,
                state.variables,
                batches,
                state.ema_variables,
                interrupted=interrupted,
            )

    return evaluate_state
