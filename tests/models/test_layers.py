import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models.layers import (
    GlobalResponseNorm,
    LayerNorm,
    StochasticDepth,
    stochastic_depth_rates,
)


def _normal(seed, shape, **kwargs):
    return jax.random.normal(jax.random.key(seed), shape, **kwargs)


def test_layer_norm_equals_its_definition():
    x = np.asarray(_normal(0, (2, 3, 4, 8))) * 1e-3  # small enough for epsilon to count
    scale, bias = np.linspace(-1, 2, 8), np.linspace(3, 1, 8)
    variables = {"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}
    x64 = x.astype(np.float64)
    centred = x64 - x64.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
    chex.assert_trees_all_close(LayerNorm().apply(variables, x), np.float32(expected), atol=2e-6)


def test_layer_norm_survives_a_large_mean():
    # E[x²] − E[x]² in float32 would return noise here: 10⁸ has a spacing of 8.
    x = _normal(0, (4, 64)) + 1e4
    y, _ = LayerNorm().init_with_output(jax.random.key(0), x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    chex.assert_trees_all_close(y, np.float32(exact), atol=1e-2)


def test_layer_norm_of_bfloat16_has_float32_statistics():
    x = (_normal(0, (5, 512)) + 20).astype(jnp.bfloat16)
    y, _ = LayerNorm(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    exact, _ = LayerNorm().init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert exact.dtype == jnp.float32
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))


def test_grn_starts_as_the_identity():
    x = _normal(0, (2, 3, 4, 8))
    y, _ = GlobalResponseNorm().init_with_output(jax.random.key(0), x)
    chex.assert_trees_all_equal(y, x)


def test_grn_equals_its_definition_with_epsilon_outside_the_root():
    x = np.asarray(_normal(0, (2, 3, 4, 8))) * 1e-6
    gamma, beta = np.linspace(-1, 2, 8), np.linspace(1, 3, 8) * 1e-6
    variables = {"params": {"gamma": jnp.float32(gamma), "beta": jnp.float32(beta)}}
    x64 = x.astype(np.float64)
    norm = np.sqrt((x64**2).sum((1, 2), keepdims=True))
    response = norm / (norm.mean(-1, keepdims=True) + 1e-6)
    expected = gamma * (x64 * response) + beta + x64
    y = GlobalResponseNorm().apply(variables, x)
    chex.assert_trees_all_close(y * 1e6, np.float32(expected * 1e6), atol=2e-6)


def test_grn_of_bfloat16_has_float32_statistics():
    # 64 × 64 squares summed in bfloat16 would stop growing at 256.
    x = jnp.ones((1, 64, 64, 2), jnp.bfloat16) * jnp.array([1, 3], jnp.bfloat16).reshape(1, 1, 1, 2)
    variables = {"params": {"gamma": jnp.ones(2), "beta": jnp.zeros(2)}}
    y = GlobalResponseNorm(dtype=jnp.bfloat16).apply(variables, x)
    assert y.dtype == jnp.bfloat16
    # Norms 64 and 192, mean 128: x·N + x = 1.5 and 3 · 2.5.
    chex.assert_trees_all_equal(y[0, 0, 0], jnp.array([1.5, 7.5], jnp.bfloat16))


def test_grn_gradient_of_dead_channels_is_finite():
    x = _normal(0, (2, 3, 4, 8)).at[0, :, :, 3].set(0.0).at[1].set(0.0)
    variables = {"params": {"gamma": jnp.ones(8), "beta": jnp.zeros(8)}}
    gradients = jax.grad(lambda v, x: GlobalResponseNorm().apply(v, x).sum(), argnums=(0, 1))(
        variables, x
    )
    chex.assert_tree_all_finite(gradients)


def test_stochastic_depth_rates_grow_linearly_to_the_rate():
    rates = stochastic_depth_rates(0.4, (1, 3, 1))
    assert [len(stage) for stage in rates] == [1, 3, 1]
    flat = [rate for stage in rates for rate in stage]
    assert flat == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert all(type(rate) is float for rate in flat)
    assert stochastic_depth_rates(0.4, (1,)) == ((0.0,),)


def test_stochastic_depth_drops_whole_samples_at_its_rate_and_keeps_the_mean():
    rate, samples = 0.3, 4000
    key = jax.random.key(0)
    x = _normal(1, (samples, 2, 2, 3))
    y = StochasticDepth(rate).apply({}, x, train=True, rngs={"dropout": key})
    kept = np.asarray(y != 0).all(axis=(1, 2, 3))
    dropped = np.asarray(y == 0).all(axis=(1, 2, 3))
    assert np.all(kept | dropped)
    chex.assert_trees_all_close(y[kept], x[kept] / 0.7, rtol=1e-6)
    # Four standard deviations of the binomial proportion.
    assert abs(dropped.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / samples)
    again = StochasticDepth(rate).apply({}, x, train=True, rngs={"dropout": key})
    chex.assert_trees_all_equal(y, again)
    other = StochasticDepth(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(2)})
    assert np.any(np.asarray(y != other))


def test_stochastic_depth_needs_no_key_at_rate_0_or_when_evaluating():
    x = jnp.ones((2, 1, 1, 3))
    chex.assert_trees_all_equal(StochasticDepth(0.0).apply({}, x, train=True), x)
    chex.assert_trees_all_equal(StochasticDepth(0.9).apply({}, x, train=False), x)
    with pytest.raises(Exception, match="dropout"):
        StochasticDepth(0.9).apply({}, x, train=True)


def test_layer_norm_agrees_with_flax():
    x = _normal(0, (2, 5, 16)) * 3 + 1
    ours, variables = LayerNorm().init_with_output(jax.random.key(0), x)
    theirs = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False).apply(variables, x)
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)
