"""Adam's step with exact bias corrections."""

import math

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's step (arXiv 1412.6980), before learning rate and sign.

    `optax.scale_by_adam` computes 1 - β₂ᵗ in float32, where .999 is itself rounded: that is 1.3e-5
    off at the first step and stays so for hundreds, and with it every step is 6e-6 too small. Here
    the correction is exact to float32's rounding. The state is optax's.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Returns:
      The optax transformation.
    """

    def correction(decay: float, count: jax.Array) -> jax.Array:
        return -jnp.expm1(count.astype(jnp.float32) * (math.log(decay) if decay else -math.inf))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, optax.ScaleByAdamState)
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        first, second = correction(b1, count), correction(b2, count)
        updates = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init, update)
