"""What a training step does to its state once loss and gradient are there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from convnext_jax.training.optim import update_ema
from convnext_jax.training.state import TrainState

PyTree = Any


class Updated(NamedTuple):
    """The outcome of an update.

    Attributes:
      state: the next one.
      grad_norm: the gradient's global norm, before any clipping; float32 scalar.
      finite: whether loss and gradient were, so that the step counts; bool scalar.
    """

    state: TrainState
    grad_norm: jax.Array
    finite: jax.Array


def make_update(
    optimizer: optax.GradientTransformation, ema_decay: float | None = None
) -> Callable[[TrainState, jax.Array, PyTree, PyTree], Updated]:
    """Makes the update: optimizer, average, and the guard against what is not finite.

    All of it is elementwise but for the gradient's norm, which must be known before anything may
    be written. So the least that it moves is the gradient twice, everything else once each way;
    `benchmarks/tpu_update.py` holds the TPU compiler to it.

    Args:
      optimizer: the optax transformation.
      ema_decay: of the variables' average; None for none.

    Returns:
      A function (state, loss, gradient, new batch statistics) → `Updated`. Where loss or gradient
      is not finite the variables, the optimizer and the averages stay as they were, and the step is
      counted in `skipped`.
    """

    def update(state: TrainState, loss: jax.Array, grads: PyTree, batch_stats: PyTree) -> Updated:
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def guarded(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # The average takes the parameters as they are kept. Taken of the new ones, these would be a
        # result of their own, which XLA:TPU writes, and reads again to keep or drop it.
        params = guarded(optax.apply_updates(state.params, updates), state.params)
        batch_stats = guarded(batch_stats, state.batch_stats)
        ema_params, ema_batch_stats = state.ema_params, state.ema_batch_stats
        if ema_decay is not None:
            ema_params = guarded(update_ema(ema_params, params, ema_decay), ema_params)
            ema_batch_stats = guarded(
                update_ema(ema_batch_stats, batch_stats, ema_decay), ema_batch_stats
            )
        new = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=guarded(opt_state, state.opt_state),
            ema_params=ema_params,
            ema_batch_stats=ema_batch_stats,
            skipped=jnp.where(finite, state.skipped, state.skipped + 1),
        )
        return Updated(new, grad_norm, finite)

    return update
