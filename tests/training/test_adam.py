"""Adam against itself in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax.training.adam import scale_by_adam


def largest_error(transformation, steps=300, b1=0.9, b2=0.999, eps=1e-8):
    """Against float64, relative, over steps of seeded gradients."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(steps, 64)).astype(np.float32) * np.float32(1e-2)
    state = transformation.init(jnp.zeros(64))
    mu, nu, worst = np.zeros(64), np.zeros(64), 0.0
    for t, gradient in enumerate(gradients, start=1):
        update, state = transformation.update(jnp.asarray(gradient), state)
        wide = gradient.astype(np.float64)
        mu, nu = b1 * mu + (1 - b1) * wide, b2 * nu + (1 - b2) * wide**2
        wanted = (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)
        worst = max(worst, np.linalg.norm(update - wanted) / np.linalg.norm(wanted))
    assert int(state.count) == steps
    return worst


def test_every_step_is_exact_to_rounding():
    assert largest_error(scale_by_adam(0.9, 0.999, 1e-8)) < 2e-6


def test_that_would_be_seen():
    """What this replaces is further off than the bound; where it no longer is, take it again."""
    with jax.numpy_dtype_promotion("standard"):
        assert largest_error(optax.scale_by_adam(0.9, 0.999, 1e-8)) > 5e-6


@pytest.mark.parametrize("b1", [0.0, 0.5])
def test_without_memory_of_gradients(b1):
    assert largest_error(scale_by_adam(b1, 0.999, 1e-8), steps=20, b1=b1) < 1e-6
