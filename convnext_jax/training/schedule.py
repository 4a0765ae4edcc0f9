"""The learning-rate schedule of the paper, per optimizer step."""

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
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"the warm-up takes {warmup_steps} of {total_steps} steps in all; it must leave some"
        )

    def schedule(step: optax.ScalarOrSchedule) -> jnp.ndarray:
        step = jnp.asarray(step, jnp.int32)
        # The phases are integer ratios below 2**24, so float32 holds each to one rounding.
        rise = step.astype(jnp.float32) / max(warmup_steps - 1, 1)
        fall = jnp.clip(step - warmup_steps, 0).astype(jnp.float32) / (total_steps - warmup_steps)
        cosine = minimum + 0.5 * (peak - minimum) * (1.0 + jnp.cos(jnp.pi * jnp.minimum(fall, 1.0)))
        return jnp.where(step < warmup_steps, peak * rise, cosine)

    return schedule
