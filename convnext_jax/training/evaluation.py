"""Exact evaluation: every example once, whatever the batch size and the number of processes."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from convnext_jax.errors import UserError

PyTree = Any

# Batches given to the devices ahead of the one whose result is awaited.
_STEPS_IN_FLIGHT = 2


def evaluate(
    eval_step: Callable[[PyTree, dict[str, jax.Array]], dict[str, jax.Array]],
    variables: PyTree,
    batches: Iterable[dict[str, jax.Array]],
    ema_variables: PyTree = None,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluates variables, and their average beside them, in one pass over a whole split.

    Args:
      eval_step: from `make_eval_step`, jitted; it returns sums.
      variables: the model's, {"params": …} and whatever else it has.
      batches: global batches with a mask; the same number on every process.
      ema_variables: the average, or None.
      interrupted: asked after each batch, on every process alike; True ends the evaluation.

    Returns:
      None if it was interrupted, else
      "accuracy" (top-1) and "top5" as fractions, "loss", the mean cross entropy, and "examples"; of
      the average "ema_accuracy", "ema_top5" and "ema_loss".

    Raises:
      UserError: if not one example counted.
    """
    weights = {"": variables} | ({} if ema_variables is None else {"ema_": ema_variables})
    total = None
    in_flight: collections.deque[Any] = collections.deque()
    for batch in batches:
        sums = {prefix: eval_step(tree, batch) for prefix, tree in weights.items()}
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        # A fast host would fill the devices' memory with batches that wait.
        in_flight.append(total)
        if len(in_flight) > _STEPS_IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
        if interrupted():
            return None
    host: dict[str, Any] = jax.device_get(total) if total is not None else {"": {"count": 0.0}}
    count = float(host[""]["count"])
    if not count:
        raise UserError("the evaluation split holds no image that can be read; look at its files")
    metrics: dict[str, float] = {}
    for prefix, averages in host.items():
        metrics |= {
            f"{prefix}accuracy": float(averages["top1"]) / count,
            f"{prefix}top5": float(averages["top5"]) / count,
            f"{prefix}loss": float(averages["loss"]) / count,
        }
    return {**metrics, "examples": int(count)}
