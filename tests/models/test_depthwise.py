import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models.depthwise import IMPLEMENTATIONS, DepthwiseConv, depthwise_conv


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("shape", [(2, 9, 5, 6), (1, 1, 1, 4)])
def test_takes_the_parameters_of_nn_conv_and_agrees_with_it(kernel_size, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    reference = nn.Conv(
        shape[-1],
        (kernel_size, kernel_size),
        feature_group_count=shape[-1],
        bias_init=nn.initializers.normal(),
    )
    expected, variables = reference.init_with_output(jax.random.key(1), x)
    module = DepthwiseConv(kernel_size)
    chex.assert_trees_all_equal_shapes(module.init(jax.random.key(2), x), variables)
    chex.assert_trees_all_close(module.apply(variables, x), expected, atol=1e-6)


def test_correlates_each_channel_by_itself_with_zero_padding():
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 6, 5, 2)))
    kernel = np.asarray(jax.random.normal(jax.random.key(1), (7, 7, 1, 2)))
    bias = np.array([0.5, -2.0], np.float32)
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    expected = np.empty_like(x)
    for row, column, channel in np.ndindex(x.shape[1:]):
        window = padded[0, row : row + 7, column : column + 7, channel]
        expected[0, row, column, channel] = (window * kernel[:, :, 0, channel]).sum()
    y = DepthwiseConv().apply({"params": {"kernel": kernel, "bias": bias}}, x)
    chex.assert_trees_all_close(y, expected + bias.reshape(1, 1, 1, 2), atol=1e-5)


def test_computes_in_its_dtype_on_float32_parameters():
    x = jnp.ones((1, 4, 4, 2))
    y, variables = DepthwiseConv(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)


def value_and_gradients(implementation, x, kernel, cotangent):
    y, vjp = jax.vjp(
        lambda x, kernel: depthwise_conv(x, kernel, implementation=implementation), x, kernel
    )
    return y, *vjp(cotangent)


# Odd sizes, sizes below the kernel, a single pixel, and one that is too large for pixel pairs.
@pytest.mark.parametrize("shape", [(3, 9, 7, 6), (2, 3, 2, 4), (2, 1, 1, 3), (1, 23, 19, 3)])
@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("implementation", ["auto", "shifts"])
def test_every_path_has_the_value_and_gradients_of_xlas(implementation, kernel_size, shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (kernel_size, kernel_size, 1, shape[-1]))
    cotangent = jax.random.normal(keys[2], shape)
    expected = value_and_gradients("xla", x, kernel, cotangent)
    got = value_and_gradients(implementation, x, kernel, cotangent)
    for a, b in zip(got, expected, strict=True):
        chex.assert_trees_all_close(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_sums_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x, cotangent = (jax.random.normal(key, (2, 6, 6, 4)).astype(jnp.bfloat16) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (7, 7, 1, 4)).astype(jnp.bfloat16)
    exact = value_and_gradients("xla", *(a.astype(jnp.float32) for a in (x, kernel, cotangent)))
    for a, b in zip(value_and_gradients("shifts", x, kernel, cotangent), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # One rounding of the result, 2⁻⁹ relative, is all that sums in float32 leave.
        error = jnp.abs(a.astype(jnp.float32) - b) / jnp.maximum(jnp.abs(b), 1e-2)
        assert float(error.max()) < 2**-8


def test_auto_takes_the_path_of_the_backend_that_it_is_compiled_for():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((7, 7, 1, 4))
    exported = jax.export.export(jax.jit(depthwise_conv), platforms=["tpu"])(x, kernel)
    assert "stablehlo.convolution" in exported.mlir_module()
    exported = jax.export.export(jax.jit(depthwise_conv), platforms=["cpu"])(x, kernel)
    assert "stablehlo.convolution" not in exported.mlir_module()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_works_under_vmap_and_remat(implementation):
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 5, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 4))

    @jax.checkpoint
    def loss(x, kernel):
        return (depthwise_conv(x, kernel, implementation=implementation) ** 2).sum()

    got = jax.vmap(jax.grad(loss), in_axes=(0, None))(x, kernel)
    expected = jnp.stack([jax.grad(loss)(one, kernel) for one in x])
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_implementation_names_the_known_ones():
    with pytest.raises(ValueError, match="auto, xla, shifts"):
        depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), implementation="cudnn")
