"""How many images a second networks take on this machine, measured in turns."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# A turn is no shorter than this, or the clock's and the scheduler's grain would be measured.
_TURN_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Spread:
    """A figure that was measured several times.

    Attributes:
      median: of the values.
      low: the lowest.
      high: the highest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one or more values."""
        return cls(statistics.median(values), min(values), max(values))


def seconds_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    turn_seconds: float = _TURN_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times calls against each other: in each round each has its turn.

    What else the machine does, and how warm it is, changes in seconds; so calls that are compared
    alternate, and each round begins with another one. Before the first round each runs twice, once
    to warm up and once to see how often it must run to fill a turn.

    Args:
      calls: by name; what they return is waited for, so JAX's arrays may come as promises.
      rounds: turns of each.
      turn_seconds: that a turn takes at least, about.
      clock: seconds from anywhere.

    Returns:
      Of each call the seconds that one run took, by round.
    """

    def turn(name: str, runs: int) -> float:
        begun = clock()
        for _ in range(runs):
            result = calls[name]()
        jax.block_until_ready(result)
        return (clock() - begun) / runs

    runs = {}
    for name in calls:
        turn(name, 1)
        runs[name] = max(1, math.ceil(turn_seconds / max(turn(name, 1), 1e-9)))
    order = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        first = i % len(order)
        for name in order[first:] + order[:first]:
            seconds[name].append(turn(name, runs[name]))
    return seconds


def inference_call(model: nn.Module, image_size: int, batch_size: int) -> Callable[[], jax.Array]:
    """A compiled forward pass on JAX's default device, with weights and images lying ready there.

    The weights are freshly initialised: what they are makes no difference to the time.

    Args:
      model: a module called as `model.apply(variables, images, train=False)`, unbound.
      image_size: side in pixels.
      batch_size: images of the pass.

    Returns:
      A function without arguments that gives the logits.
    """
    shape = (batch_size, image_size, image_size, 3)
    images = jax.random.normal(jax.random.key(1), shape, jnp.float32)
    images = images.astype(getattr(model, "dtype", jnp.float32))
    # On the CPU, XLA would optimise this program, which runs once, for longer than all the rest.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    init = jax.jit(lambda key: model.init(key, images[:1]), compiler_options=quick)
    variables = init(jax.random.key(0))
    forward = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    compiled = forward.lower(variables, images).compile()
    return lambda: compiled(variables, images)
