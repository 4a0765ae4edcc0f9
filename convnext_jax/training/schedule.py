"""Learning-rate schedules, per optimizer step: the paper's, and that of the original ResNets."""

import jax.numpy as jnp
import optax


def warmup_cosine(
    peak: float, minimum: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine to `minimum`.

    The value of step i is the i-th of `concat(linspace(0, peak, W), minimum + (peak - minimum) / 2
    * (1 + cos(pi j / (N - W))))`, j = 0 … N-W-1, as in the authors' training code. So both the last
    warm-up step and the first cosine step stand at the peak, and `minimum` is approached, not
    reached.

    Args:
      peak: the highest learning rate.
      minimum: the rate that the cosine falls towards.
      warmup_steps: W; 0 for none.
      total_steps: N, more than W.

    Returns:
      A function from the step, an int32 scalar array or an int, to the rate, a float32 scalar.

    Raises:
      ValueError: if N is not more than W, or W is negative.
    """
    _check_warmup(warmup_steps, total_steps)

    def schedule(step: optax.ScalarOrSchedule) -> jnp.ndarray:
        step = jnp.asarray(step, jnp.int32)
        # The phases are integer ratios below 2**24, so float32 holds each to one rounding.
        fall = jnp.clip(step - warmup_steps, 0).astype(jnp.float32) / (total_steps - warmup_steps)
        cosine = minimum + 0.5 * (peak - minimum) * (1.0 + jnp.cos(jnp.pi * jnp.minimum(fall, 1.0)))
        return jnp.where(step < warmup_steps, _rise(step, peak, warmup_steps), cosine)

    return schedule


def warmup_steps_down(
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    *,
    decay_rate: float,
    decay_every: int,
) -> optax.Schedule:
    """Linear warm-up from 0, then a constant rate that falls by a factor at regular intervals.

    Args:
      peak: the highest learning rate.
      minimum: the rate below which it does not fall.
      warmup_steps: W; 0 for none.
      total_steps: N, more than W.
      decay_rate: the factor.
      decay_every: steps between two falls; the first is this many after the warm-up's end.

    Returns:
      A function from the step, an int32 scalar array or an int, to the rate, a float32 scalar.

    Raises:
      ValueError: if N is not more than W, W is negative, or `decay_every` is not positive.
    """
    _check_warmup(warmup_steps, total_steps)
    if decay_every < 1:
        raise ValueError(f"the rate falls every {decay_every} steps; it must be 1 or more")
    # A table of all rates: a power in float32 would be off by a rounding or two.
    falls = (total_steps - 1 - warmup_steps) // decay_every
    rates = [max(peak * decay_rate**i, min(minimum, peak)) for i in range(falls + 1)]

    def schedule(step: optax.ScalarOrSchedule) -> jnp.ndarray:
        step = jnp.asarray(step, jnp.int32)
        fallen = jnp.clip(step - warmup_steps, 0) // decay_every
        rate = jnp.asarray(rates, jnp.float32)[jnp.minimum(fallen, falls)]
        return jnp.where(step < warmup_steps, _rise(step, peak, warmup_steps), rate)

    return schedule


def _check_warmup(warmup_steps: int, total_steps: int) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"the warm-up takes {warmup_steps} of {total_steps} steps in all; it must leave some"
        )


def _rise(step: jnp.ndarray, peak: float, warmup_steps: int) -> jnp.ndarray:
    return peak * (step.astype(jnp.float32) / max(warmup_steps - 1, 1))
