"""Exact evaluation: every example once, whatever the batch size and the number of processes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from convnext_jax.errors import UserError

PyTree = Any


def evaluate(
    eval_step: Callable[[PyTree, dict[str, jax.Array]], dict[str, jax.Array]],
    params: PyTree,
    batches: Iterable[dict[str, jax.Array]],
) -> dict[str, float]:
    """Evaluates parameters over a whole split.

    Args:
      eval_step: from `make_eval_step`, jitted; it returns sums.
      params: parameter tree.
      batches: global batches with a mask; the same number on every process.

    Returns:
      "accuracy" (top-1) and "top5" as fractions, "loss", the mean cross entropy, and "examples".

    Raises:
      UserError: if not one example counted.
    """
    total = None
    for batch in batches:
        sums = eval_step(params, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    host = jax.device_get(total) if total is not None else {"count": 0.0}
    count = float(host["count"])
    if not count:
        raise UserError("the evaluation split holds no image that can be read; look at its files")
    return {
        "accuracy": float(host["top1"]) / count,
        "top5": float(host["top5"]) / count,
        "loss": float(host["loss"]) / count,
        "examples": int(count),
    }
