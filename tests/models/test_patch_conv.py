import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from convnext_jax.models.patch_conv import PatchConv, patch_conv

# Whole patches; rows and columns left over; a single patch; no images.
SHAPES = [(2, 8, 12, 3), (2, 9, 7, 3), (1, 4, 5, 2), (0, 8, 8, 3)]


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        kernel.shape[:2],
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


exact_patch_conv = functools.partial(patch_conv, precision=jax.lax.Precision.HIGHEST)


def arrays(shape, size, features=5):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (size, size, shape[-1], features))
    g = jax.random.normal(keys[2], jax.eval_shape(convolve, x, kernel).shape)
    return x, kernel, g


@pytest.mark.parametrize("shape", SHAPES)
def test_takes_the_parameters_of_nn_conv_and_agrees_with_it(shape):
    x, _, _ = arrays(shape, 2)
    reference = nn.Conv(5, (2, 2), strides=(2, 2), padding="VALID")
    module = PatchConv(5, 2)
    variables = reference.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(module.init(jax.random.key(1), x), variables)
    variables["params"]["bias"] = jnp.arange(5.0)
    chex.assert_trees_all_close(
        module.apply(variables, x), reference.apply(variables, x), atol=1e-5
    )


def test_computes_in_its_dtype_on_float32_parameters():
    x = jnp.ones((1, 4, 4, 2))
    y, variables = PatchConv(3, 2, jnp.bfloat16).init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_convolution(shape, size):
    x, kernel, g = arrays(shape, size)
    found, expected = (
        jax.jit(lambda x, kernel, f=f: (f(x, kernel), jax.vjp(f, x, kernel)[1](g)))(x, kernel)
        for f in (exact_patch_conv, convolve)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives_and_vmap():
    x, kernel, _ = arrays((2, 5, 4, 3), 2)

    def twice(f):
        def slope(x, kernel):
            return jax.grad(lambda x: jnp.sum(f(x, kernel) ** 3))(x)

        one = jax.grad(lambda kernel: jnp.sum(slope(x, kernel) ** 2))(kernel)
        each = jax.vmap(slope, (0, None))(x[:, None], kernel)
        return one / jnp.abs(one).max(), each / jnp.abs(each).max()

    chex.assert_trees_all_close(twice(exact_patch_conv), twice(convolve), rtol=0, atol=1e-6)


def test_it_is_a_product_on_cpus_and_a_convolution_elsewhere():
    x, kernel, g = arrays((2, 8, 8, 3), 2)

    def backward(x, kernel, g):
        return jax.vjp(patch_conv, x, kernel)[1](g)

    for platform, convolutions, products in (("cpu", 0, 2), ("tpu", 2, 0), ("cuda", 2, 0)):
        exported = jax.export.export(jax.jit(backward), platforms=[platform])(x, kernel, g)
        text = exported.mlir_module()
        assert text.count("stablehlo.convolution") == convolutions
        assert text.count("stablehlo.dot_general") == products


def test_exports_for_any_batch_and_size():
    x, kernel, _ = arrays((3, 9, 6, 3), 2)
    batch, height, width = jax.export.symbolic_shape("b, 2*h + 1, 2*w")
    for shape in ((batch, 9, 6, 3), (batch, height, width, 3)):
        argument = jax.ShapeDtypeStruct(shape, x.dtype)
        exported = jax.export.export(jax.jit(lambda x: exact_patch_conv(x, kernel)))(argument)
        chex.assert_trees_all_close(exported.call(x), convolve(x, kernel), rtol=1e-5, atol=1e-5)
