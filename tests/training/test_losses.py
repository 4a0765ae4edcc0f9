import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.training.losses import binary_cross_entropy, soft_target_cross_entropy

LOGITS = jnp.array([[1.5, -2.0, 0.0], [30.0, -30.0, 0.5]])
TARGETS = jnp.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])


def test_cross_entropy_is_the_definition():
    logits, targets = np.float64(LOGITS), np.float64(TARGETS)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(targets * log_p).sum(-1).mean()
    np.testing.assert_allclose(soft_target_cross_entropy(LOGITS, TARGETS), expected, rtol=1e-6)


def by_hand(targets):
    """Each binary cross entropy, in double precision."""
    logits, targets = np.float64(LOGITS), np.float64(targets)
    return targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)


def test_binary_cross_entropy_is_the_mean_over_batch_and_classes():
    found = binary_cross_entropy(LOGITS, TARGETS)
    np.testing.assert_allclose(found, by_hand(TARGETS).mean(), rtol=1e-6)
    summed = binary_cross_entropy(LOGITS, TARGETS, sum_classes=True)
    np.testing.assert_allclose(summed, by_hand(TARGETS).sum(-1).mean(), rtol=1e-6)


def test_an_indifferent_network_loses_log_2():
    zeros = jnp.zeros((4, 1000))
    np.testing.assert_allclose(binary_cross_entropy(zeros, zeros), math.log(2), rtol=1e-5)


def test_the_threshold_makes_both_classes_of_a_mixed_image_wholly_present():
    # .2 itself is not above it.
    found = binary_cross_entropy(LOGITS, TARGETS, target_threshold=0.2)
    expected = by_hand([[1, 0, 0], [0, 1, 0]]).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = binary_cross_entropy(LOGITS, TARGETS, target_threshold=0.15)
    expected = by_hand([[1, 1, 0], [0, 1, 0]]).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_smoothing_comes_behind_the_threshold():
    found = binary_cross_entropy(LOGITS, TARGETS, target_threshold=0.15, smoothing=0.3)
    expected = by_hand([[0.8, 0.8, 0.1], [0.1, 0.8, 0.1]]).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Targets that are taken as they are have it inside them already.
    alone = binary_cross_entropy(LOGITS, TARGETS, smoothing=0.3)
    np.testing.assert_array_equal(alone, binary_cross_entropy(LOGITS, TARGETS))


@pytest.mark.parametrize("loss", [soft_target_cross_entropy, binary_cross_entropy])
def test_it_is_float32_and_finite_for_large_bfloat16_logits(loss):
    logits = jnp.array([[2e4, -2e4, 0.0]], jnp.bfloat16)
    targets = jnp.array([[0.0, 1.0, 0.0]])
    value, gradient = jax.value_and_grad(loss)(logits, targets)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(np.float32(gradient)).all()


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        binary_cross_entropy(LOGITS, TARGETS[:, :2])
