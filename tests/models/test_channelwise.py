import re

import chex
import jax
import jax.numpy as jnp
import pytest

from convnext_jax.models.channelwise import (
    mean_of_channels,
    multiply_channels,
    normalise_channels,
)


def arrays(pixels, channels, features):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, pixels, channels), (channels, features), (2, pixels, features))
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def multiply(x, kernel):
    return multiply_channels(x, kernel, jax.lax.Precision.HIGHEST)


def matmul(x, kernel):
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


# With fewer pixels than the kernel's shorter side, none at all, and as many and more.
SIZES = [(3, 8, 32), (0, 8, 32), (3, 32, 8), (1, 4, 2), (4, 8, 32), (40, 8, 32), (40, 32, 8)]


@pytest.mark.parametrize("sizes", SIZES)
def test_value_and_gradients_are_those_of_a_product(sizes):
    x, kernel, g = arrays(*sizes)
    found, expected = (
        jax.jit(lambda x, kernel, f=f: (f(x, kernel), jax.vjp(f, x, kernel)[1](g)))(x, kernel)
        for f in (multiply, matmul)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES[:1] + SIZES[-1:])
def test_second_derivatives_and_vmap(sizes):
    x, kernel, _ = arrays(*sizes)

    def twice(f):
        def slope(x, kernel):
            return jax.grad(lambda x: jnp.sum(f(x, kernel) ** 3))(x)

        one = jax.grad(lambda kernel: jnp.sum(slope(x, kernel) ** 2))(kernel)
        each = jax.vmap(slope, (0, None))(x, kernel)
        return one / jnp.abs(one).max(), each / jnp.abs(each).max()

    chex.assert_trees_all_close(twice(multiply), twice(matmul), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sizes", "left"), [((3, 8, 32), "kernel"), ((4, 8, 32), "g")])
def test_with_few_pixels_the_kernel_is_the_left_operand(sizes, left):
    x, kernel, g = arrays(*sizes)
    backward = jax.jit(lambda x, kernel, g: jax.vjp(multiply, x, kernel)[1](g)[0])
    text = backward.lower(x, kernel, g).compile().as_text()
    pixels, channels = g.shape[0] * g.shape[1], kernel.shape[0]
    shape = {"kernel": (channels, pixels), "g": (pixels, channels)}[left]
    (found,) = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert tuple(map(int, found.split(","))) == shape


def plainly_normalised(x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (5, 1), (3, 33), (0, 2, 8)])
def test_a_mean_and_its_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape) + 3
    g = jax.random.normal(jax.random.key(1), (*shape[:-1], 1))
    found, vjp = jax.vjp(mean_of_channels, x)
    expected, expected_vjp = jax.vjp(lambda x: x.mean(-1, keepdims=True), x)
    chex.assert_trees_all_close((found, vjp(g)), (expected, expected_vjp(g)), rtol=1e-6)


# The smallest variances are below epsilon.
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (5, 1), (3, 33)])
def test_normalised_channels_and_their_gradients(shape, scale):
    x = scale * (jax.random.normal(jax.random.key(0), shape) + 1)
    g = jax.random.normal(jax.random.key(1), shape)
    with jax.enable_x64(True):
        exact = x.astype(jnp.float64)
        expected, vjp = jax.vjp(lambda x: plainly_normalised(x, 1e-6), exact)
        (by_x,) = vjp(g.astype(jnp.float64))
    found, vjp = jax.vjp(lambda x: normalise_channels(x, 1e-6), x)
    chex.assert_trees_all_close(found, expected.astype(jnp.float32), rtol=1e-4, atol=1e-5)
    by_x = by_x.astype(jnp.float32)
    size = float(jnp.abs(by_x).max())
    chex.assert_trees_all_close(vjp(g)[0], by_x, rtol=0, atol=1e-5 * size + 1e-5 / scale)


def test_second_derivatives_of_normalised_channels():
    x = jax.random.normal(jax.random.key(0), (3, 8))

    def twice(f):
        def slope(x):
            return jax.grad(lambda x: jnp.sum(f(x, 1e-6) ** 3))(x)

        return jax.grad(lambda x: jnp.sum(slope(x) ** 2))(x), jax.vmap(slope)(x[:, None])

    chex.assert_trees_all_close(
        twice(normalise_channels), twice(plainly_normalised), rtol=1e-4, atol=1e-3
    )
