import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import compiler_options
from convnext_jax.models import depthwise_pallas, depthwise_pallas_lowering
from convnext_jax.models.depthwise import DepthwiseConv, depthwise_conv
from convnext_jax.models.layers import LayerNorm


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


@pytest.mark.parametrize("shape", [(2, 9, 10, 6), (2, 3, 2, 4)])
@pytest.mark.parametrize("implementation", ["auto", "xla", "shifts"])
def test_a_bias_is_added(implementation, shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x, cotangent = (jax.random.normal(key, shape) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (7, 7, 1, shape[-1]))
    bias = 10 * jax.random.normal(keys[3], shape[-1:])

    def with_bias(x, kernel, bias):
        return depthwise_conv(x, kernel, bias, implementation=implementation)

    def by_hand(x, kernel, bias):
        return depthwise_conv(x, kernel, implementation="xla") + jnp.expand_dims(bias, (0, 1, 2))

    (y, vjp), (expected, expected_vjp) = (jax.vjp(f, x, kernel, bias) for f in (with_bias, by_hand))
    chex.assert_trees_all_close(y, expected, atol=1e-4)
    for a, b in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
        chex.assert_trees_all_close(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_what_a_layer_norm_reads_is_summed_once_on_cpus():
    """XLA may compute the windows' sum again in each pass over the result, at three times the cost.

    It did as long as the bias was added behind the sum.
    """

    def block(params, x):
        y = DepthwiseConv(5).apply({"params": params["conv"]}, x)
        y = LayerNorm().apply({"params": params["norm"]}, y)
        return ((y @ params["kernel"]) ** 2).sum()

    x = jnp.ones((2, 12, 12, 16))
    params = {
        "conv": {"kernel": jnp.ones((5, 5, 1, 16)), "bias": jnp.ones(16)},
        "norm": {"scale": jnp.ones(16), "bias": jnp.ones(16)},
        "kernel": jnp.ones((16, 64)),
    }
    for function, sums in ((block, 1), (jax.grad(block), 1), (jax.grad(block, (0, 1)), 2)):
        program = jax.jit(function).lower(params, x)
        text = program.compile(compiler_options=compiler_options.for_network()).as_text()
        computations = re.split(r"\n}\n", text)
        # Of 25 taps; the kernel's gradient has twelve products, one for each column.
        assert sum(one.count(" multiply(") >= 25 for one in computations) == sums


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


# Images for which the kernels pay: three quarters of a register's lanes.
ENOUGH = 96


def gradients(x, kernel, **options):
    def loss(x, kernel):
        return (depthwise_conv(x, kernel, **options) ** 2).sum()

    return jax.grad(loss, (0, 1))(x, kernel)


def exported(platforms, images, dtype=jnp.bfloat16):
    # Under a new name, or `jit` would remember.
    function = jax.jit(lambda x, kernel: gradients(x, kernel))
    x = jax.ShapeDtypeStruct((images, 5, 5, 8), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 1, 8), dtype)
    text = jax.export.export(function, platforms=platforms)(x, kernel).mlir_module()
    return text.count("tpu_custom_call"), text.count("stablehlo.convolution")


def test_auto_takes_the_path_of_the_backend_that_it_is_compiled_for():
    few, many = ENOUGH - 1, ENOUGH
    # Forward and by the input it is one kernel, called twice.
    assert exported(["tpu"], many) == (2, 0)
    assert exported(["tpu"], few) == exported(["tpu"], many, jnp.float32) == (0, 3)
    assert exported(["cpu"], many) == (0, 0)
    assert exported(["cuda"], many) == (0, 3)
    kernels, convolutions = exported(["cpu", "tpu", "cuda"], many)
    assert kernels == 2
    assert convolutions >= 3
    (symbolic,) = jax.export.symbolic_shape("batch")
    assert exported(["tpu"], symbolic) == (0, 3)


def test_the_kernels_are_traced_for_a_tpu_alone(monkeypatch):
    traced = []
    for name in ("_kernel_filter", "_kernel_gradient"):
        monkeypatch.setattr(depthwise_pallas_lowering, name, lambda x, *_: traced.append(1) or x)
    x = jnp.ones((ENOUGH, 3, 3, 1), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16)
    jax.jit(lambda x, kernel: depthwise_conv(x, kernel))(x, kernel)
    assert not traced
    jax.export.export(jax.jit(lambda x: depthwise_conv(x, kernel)), platforms=["tpu"])(x)
    assert traced


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the CPU run the kernels."""
    forward = jax.jit(functools.partial(depthwise_pallas.forward, interpret=True))
    gradient = jax.jit(
        functools.partial(depthwise_pallas.kernel_gradient, interpret=True), static_argnums=2
    )
    monkeypatch.setattr(depthwise_pallas_lowering, "_kernel_filter", forward)
    monkeypatch.setattr(depthwise_pallas_lowering, "_kernel_gradient", gradient)


def test_pallas_has_the_value_and_gradients_of_xlas(interpreted):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 5))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    expected = value_and_gradients("xla", x, kernel, cotangent)
    for a, b in zip(value_and_gradients("pallas", x, kernel, cotangent), expected, strict=True):
        chex.assert_trees_all_close(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_pallas_refuses_other_backends():
    x, kernel = jnp.ones((2, 3, 4, 5)), jnp.ones((3, 3, 1, 5))
    with pytest.raises(ValueError, match="for TPUs alone; use implementation='auto'"):
        depthwise_conv(x, kernel, implementation="pallas")
    function = jax.jit(lambda x: depthwise_conv(x, kernel, implementation="pallas"))
    with pytest.raises(ValueError, match="for TPUs alone"):
        jax.export.export(function, platforms=["cuda"])(x)
    with pytest.raises(ValueError, match=r"5000 pixels wide and float32; use .*'auto'"):
        depthwise_conv(jnp.ones((2, 1, 5000, 1)), kernel[..., :1], implementation="pallas")


# How vmap and checkpointing treat the kernels does not depend on what they become in the end: their
# primitives become XLA's convolution where they are not required.
@pytest.fixture
def standing_in(monkeypatch):
    monkeypatch.setattr(depthwise_pallas, "pays", lambda *_: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default, tpu: tpu(*x))


@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 2)])
@pytest.mark.parametrize("implementation", ["auto", "xla", "shifts", "pallas"])
def test_works_under_vmap_and_remat(implementation, axes, request):
    if implementation == "pallas":
        request.getfixturevalue("standing_in")
        implementation = "auto"
    x = jax.random.normal(jax.random.key(0), (2, 2, 5, 5, 4)[axes[0] is None :])
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 1, 4) if axes[1] else (3, 3, 1, 4))
    if axes[1] == 1:
        kernel = kernel.swapaxes(1, 2)

    @jax.checkpoint
    def loss(x, kernel):
        return (depthwise_conv(x, kernel, implementation=implementation) ** 2).sum()

    def loss_of_xla(x, kernel):
        return (depthwise_conv(x, kernel, implementation="xla") ** 2).sum()

    got = jax.vmap(jax.grad(loss, (0, 1)), in_axes=axes)(x, kernel)
    expected = jax.vmap(jax.grad(loss_of_xla, (0, 1)), in_axes=axes)(x, kernel)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["shifts", "pallas"])
def test_has_second_derivatives(implementation, request):
    if implementation == "pallas":
        request.getfixturevalue("standing_in")
        implementation = "auto"
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 2))

    def norm_of_gradients(x, kernel, implementation):
        by_x, by_kernel = gradients(x, kernel, implementation=implementation)
        return (by_x**2).sum() + (by_kernel**3).sum()

    got = jax.grad(norm_of_gradients, (0, 1))(x, kernel, implementation)
    expected = jax.grad(norm_of_gradients, (0, 1))(x, kernel, "xla")
    chex.assert_trees_all_close(got, expected, rtol=1e-4)


def test_an_unknown_implementation_names_the_known_ones():
    with pytest.raises(ValueError, match="auto, xla, shifts, pallas"):
        depthwise_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), implementation="cudnn")
