import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_models import jit

from convnext_jax.models.batch_norm import BatchNorm

EPSILON = 1e-5


def inputs(batch=16, mean=3.0):
    return np.random.default_rng(0).normal(mean, 2.0, (batch, 5, 3, 4)).astype(np.float32)


def variables(mean=0.5):
    rng = np.random.default_rng(1)
    return {
        "params": {
            "scale": jnp.asarray(rng.normal(1, 0.3, 4), jnp.float32),
            "bias": jnp.asarray(rng.normal(0, 0.3, 4), jnp.float32),
        },
        "batch_stats": {
            "mean": jnp.asarray(rng.normal(mean, 0.3, 4), jnp.float32),
            "var": jnp.asarray(rng.uniform(0.5, 2, 4), jnp.float32),
        },
    }


def by_definition(given, x, mean, var):
    params = {k: np.asarray(v, np.float64) for k, v in given["params"].items()}
    return (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]


def train(module, given, x):
    y, updated = module.apply(given, x, train=True, mutable=["batch_stats"])
    return y, updated["batch_stats"]


@pytest.mark.parametrize("mean", [0.0, 3.0, 3000.0])
def test_training(mean):
    """The last case has 1500 σ: there E[x²] − E[x]² about 0 would have but two digits."""
    x, given = inputs(mean=mean), variables(mean)
    y, averages = jit(lambda given, x: train(BatchNorm(), given, x))(given, x)
    exact = x.astype(np.float64).reshape(-1, 4)
    expected = by_definition(given, x, exact.mean(axis=0), exact.var(axis=0))
    np.testing.assert_allclose(y, expected, atol=1e-6 * max(mean, 3))
    # PyTorch's rule: momentum 0.1 for the new, and the variance unbiased.
    for name, new in (("mean", exact.mean(axis=0)), ("var", exact.var(axis=0, ddof=1))):
        running = 0.9 * np.asarray(given["batch_stats"][name]) + 0.1 * new
        np.testing.assert_allclose(averages[name], running, rtol=1e-5)


def test_evaluation():
    x, given = inputs(), variables()
    running = {k: np.asarray(v, np.float64) for k, v in given["batch_stats"].items()}
    y = jit(lambda given, x: BatchNorm(groups=5).apply(given, x, train=False))(given, x)
    np.testing.assert_allclose(y, by_definition(given, x, **running), rtol=1e-5, atol=1e-5)


def test_gradient():
    x, given = inputs(), variables()
    weight = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def ours(params, x):
        return (train(BatchNorm(), {**given, "params": params}, x)[0] * weight).sum()

    def plain(params, x):
        axes = (0, 1, 2)
        mean = x.mean(axis=axes, keepdims=True)
        var = jnp.square(x - mean).mean(axis=axes, keepdims=True)
        scale, bias = (params[k].reshape(1, 1, 1, 4) for k in ("scale", "bias"))
        return (((x - mean) / jnp.sqrt(var + EPSILON) * scale + bias) * weight).sum()

    gradients, expected = jit(
        lambda params, x: (jax.grad(ours, (0, 1))(params, x), jax.grad(plain, (0, 1))(params, x))
    )(given["params"], x)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_groups_are_neighbouring_rows_with_statistics_of_their_own():
    x, given = inputs(), variables()
    y, averages = jit(lambda given, x: train(BatchNorm(groups=4), given, x))(given, x)
    alone = jit(lambda given, x: train(BatchNorm(), given, x))
    parts = [alone(given, part) for part in np.split(x, 4)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), atol=1e-5)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *[part for _, part in parts])
    chex.assert_trees_all_close(averages, mean, rtol=1e-5)


@pytest.mark.parametrize(("groups", "crosses"), [(1, True), (8, False)])
def test_on_a_mesh(groups, crosses):
    """By default statistics are the global batch's; with a group a device nothing crosses."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, given = inputs(), variables()
    module = BatchNorm(groups=groups)
    expected = jit(lambda given, x: train(module, given, x))(given, x)

    given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    x = jax.device_put(x, rows)
    step = jax.jit(lambda given, x: train(module, given, x)).lower(given, x).compile()
    y, averages = step(given, x)
    assert y.sharding.is_equivalent_to(rows, y.ndim)
    chex.assert_trees_all_close((y, averages), expected, rtol=1e-5, atol=1e-5)

    normalise = jax.jit(lambda given, x: train(module, given, x)[0]).lower(given, x).compile()
    text = normalise.as_text()
    assert ("all-reduce" in text) == crosses
    assert "all-gather" not in text
    assert "collective-permute" not in text


def test_types():
    x = jnp.asarray(inputs(mean=100.0), jnp.bfloat16)
    module = BatchNorm(dtype=jnp.bfloat16)
    given = jit(lambda x: module.init(jax.random.key(0), x, train=True))(x)
    assert {leaf.dtype for leaf in jax.tree.leaves(given)} == {jnp.dtype(jnp.float32)}
    y, averages = jit(lambda given, x: train(module, given, x))(given, x)
    assert y.dtype == jnp.bfloat16
    # Sums in bfloat16 would be off by several percent.
    exact = np.asarray(x, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(averages["mean"], 0.1 * exact.mean(axis=0), rtol=1e-5)


def test_initialising_leaves_the_averages_at_their_start():
    module = BatchNorm(scale_init=jax.nn.initializers.zeros)
    given = jit(lambda x: module.init(jax.random.key(0), x, train=True))(inputs())
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    chex.assert_trees_all_equal(
        given,
        {"params": {"scale": zeros, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}},
    )


def test_what_has_no_variance_is_told():
    given = variables()
    with pytest.raises(ValueError, match="groups = 3 does not divide the batch of 16"):
        train(BatchNorm(groups=3), given, inputs())
    with pytest.raises(ValueError, match=r"groups of 1 the input \(2, 1, 1, 4\) has one value"):
        train(BatchNorm(groups=2), given, inputs()[:2, :1, :1])
