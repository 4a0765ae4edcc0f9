"""The kernels of a block's second half, in TPU interpret mode, and the blocks that use them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.models import blocks, mlp_pallas, mlp_pallas_devices
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.mlp_branch import add_branch
from convnext_jax.models.mlp_pallas_devices import Devices, devices_for
from convnext_jax.models.mlp_pallas_tiles import LANES, mlp_tiling
from convnext_jax.training.sharding import batch_sharding, create_mesh, replicated

INTERPRET = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
# JAX tells by a private name alone whether it has seen a race.
interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
EPSILON = 1e-6
slow = pytest.mark.slow


def operands(shape, dtype):
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    channels = shape[-1]
    x, conv, gradient = (normal(*shape).astype(dtype) for _ in range(3))
    keep = 1.25 * (normal(shape[0]) > -1).astype(jnp.float32)
    weights = mlp_pallas.fold(
        normal(channels),
        (normal(channels), normal(channels)),
        (0.1 * normal(channels, 4 * channels), normal(4 * channels)),
        (0.1 * normal(4 * channels, channels), normal(channels)),
        normal(channels),
    )
    return x, conv, gradient, keep, weights


def branch(x, conv, keep, weights, epsilon):
    """By XLA, in float32, layer norm without scale and bias."""

    def row(bias):
        return bias.reshape(1, 1, 1, -1)

    x, conv = (a.astype(jnp.float32) for a in (x, conv))
    y = conv + row(weights.bias)
    centred = y - y.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    with jax.default_matmul_precision("highest"):
        y = nn.gelu(y @ weights.expand + row(weights.expand_bias), approximate=False)
        y = y @ weights.project + row(weights.project_bias)
    return x + keep.reshape(-1, 1, 1, 1) * y


def branch_gradients(conv, gradient, keep, weights, epsilon):
    """Of the above, by conv and the weights."""
    _, vjp = jax.vjp(lambda c, w: branch(gradient, c, keep, w, epsilon), conv, weights)
    return vjp(gradient.astype(jnp.float32))


def without_races(function, *arguments):
    """Runs a kernel in TPU interpret mode, which raises on reads out of bounds and sees races."""
    result = jax.block_until_ready(function(*arguments, EPSILON, interpret=INTERPRET))
    assert not interpreter.races.races_found
    return result


def as_on_any_backend(function, *arguments):
    """Runs a kernel as Pallas's quicker interpreter does, which knows no TPU."""
    return function(*arguments, EPSILON, interpret=True)


def relative_error(got, expected):
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# One group of pixels and several, one block of images and two, one chunk of the hidden layer, some
# that are written out, and a loop of them.
@pytest.mark.parametrize(
    ("shape", "dtype", "run"),
    [
        ((130, 2, 3, 64), jnp.bfloat16, as_on_any_backend),
        ((2, 1, 2, 32), jnp.float32, as_on_any_backend),
        pytest.param((2, 1, 2, 32), jnp.bfloat16, without_races, marks=slow),
        pytest.param((2, 1, 2, 32), jnp.float32, without_races, marks=slow),
        pytest.param((130, 2, 3, 64), jnp.bfloat16, without_races, marks=slow),
        pytest.param((130, 2, 3, 64), jnp.float32, without_races, marks=slow),
        pytest.param((1, 1, 2, 640), jnp.bfloat16, without_races, marks=slow),
        pytest.param((1, 1, 2, 640), jnp.float32, without_races, marks=slow),
    ],
)
def test_value_and_gradients_are_xlas(shape, dtype, run):
    x, conv, gradient, keep, weights = operands(shape, dtype)
    expected = branch(x, conv, keep, weights, EPSILON)
    got = run(mlp_pallas.forward, x, conv, keep, weights)
    assert got.dtype == dtype
    # Of bfloat16: the operands of two products in a row, and the result.
    assert relative_error(got, expected) < (2**-8 if dtype == jnp.bfloat16 else 1e-6)

    expected = branch_gradients(conv, gradient, keep, weights, EPSILON)
    got = run(mlp_pallas.backward, conv, gradient, keep, weights)
    assert [a.dtype for a in jax.tree.leaves(got)] == [dtype] + 5 * [jnp.float32]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < (2**-7 if dtype == jnp.bfloat16 else 1e-6)


@pytest.fixture
def on_xla(monkeypatch):
    """Lets XLA compute what the kernels do, wherever a model would use them."""
    monkeypatch.setattr(mlp_pallas_devices, "_forward", branch)
    monkeypatch.setattr(mlp_pallas_devices, "_backward", branch_gradients)


@pytest.mark.parametrize("layer_scale_init", [0.5, None])
def test_a_block_by_kernels_is_the_block(on_xla, monkeypatch, layer_scale_init):
    x, gradient = jax.random.normal(jax.random.key(0), (2, 6, 3, 3, 4))
    block = blocks.Block(0.5, layer_scale_init, kernel_size=3, depthwise="xla")
    params = block.init(jax.random.key(1), x, False)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)

    def value_and_gradients():
        rngs = {"dropout": jax.random.key(3)}
        apply = functools.partial(block.apply, train=True, rngs=rngs)
        y, vjp = jax.vjp(lambda params, x: apply({"params": params}, x), params, x)
        return y, vjp(gradient)

    expected = value_and_gradients()
    monkeypatch.setattr(blocks, "devices_for", lambda *_: Devices())
    text = str(jax.make_jaxpr(value_and_gradients)())
    assert "name=add_branch" in text
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
        value_and_gradients(),
        expected,
    )


def test_over_several_devices_the_weights_gradients_are_summed(on_xla):
    x, conv, gradient, keep, weights = operands((8, 2, 2, 4), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    images = NamedSharding(mesh, P(("data", "fsdp")))
    cut = [jax.device_put(a, images) for a in (x, conv, keep)]

    def value_and_gradients(x, conv, keep, devices):
        y, vjp = jax.vjp(
            lambda x, c, w: add_branch(x, c, keep, w, EPSILON, devices), x, conv, weights
        )
        return y, *vjp(gradient)

    expected = jax.jit(value_and_gradients, static_argnums=3)(x, conv, keep, Devices())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        devices = Devices(mesh.abstract_mesh, mesh.axis_names)
        got = jax.jit(value_and_gradients, static_argnums=3)(*cut, devices)
    assert got[0].sharding.is_equivalent_to(images, 4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


STAGE = (64, 56, 56, 96)


@pytest.fixture
def v5e():
    """Traced as for one chip that need not be there."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def test_auto_is_for_tpus_and_bfloat16_and_images_enough(v5e):
    assert devices_for(STAGE, jnp.bfloat16, "auto") == Devices(v5e, ("data",))
    assert devices_for(STAGE, jnp.float32, "auto") is None
    assert devices_for((63, *STAGE[1:]), jnp.bfloat16, "auto") is None
    assert devices_for(STAGE, jnp.bfloat16, "xla") is None
    assert devices_for((2, *STAGE[1:]), jnp.float32, "pallas") == Devices(v5e, ("data",))


def test_what_can_not_be_had(v5e):
    with pytest.raises(ValueError, match="a multiple of 32 channels, but they are bfloat16 and 40"):
        devices_for((64, 56, 56, 40), jnp.bfloat16, "pallas")
    with pytest.raises(ValueError, match="weights that fit VMEM, but those of 2048 channels need"):
        devices_for((64, 7, 7, 2048), jnp.bfloat16, "pallas")


def test_elsewhere_auto_is_xla():
    assert devices_for(STAGE, jnp.bfloat16, "auto") is None
    with pytest.raises(ValueError, match="mlp='pallas' takes a TPU, but the program is traced for"):
        devices_for(STAGE, jnp.bfloat16, "pallas")
    with pytest.raises(ValueError, match="mlp must be one of auto, xla, pallas, but is 'fast'"):
        ConvNeXt(mlp="fast")


@pytest.mark.parametrize("side", [7, 12, 14, 24, 28, 48, 56, 96])
@pytest.mark.parametrize("channels", [96, 128, 768, 1024])
def test_tilings_divide_what_they_cut(side, channels):
    cut = mlp_tiling(side**2, channels, 256, 2, EPSILON)
    assert side**2 % cut.step_pixels == cut.step_pixels % cut.group == 0
    assert 4 * channels % cut.chunk == 0
    assert cut.grid == (2, side**2 // cut.step_pixels)


@pytest.fixture
def compiler():
    pytest.importorskip("libtpu")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# The widest stage whose weights fit VMEM, whatever the model.
WIDEST = {"v4:2x2x1": 192, "v5e:2x2": 1024, "v5p:2x2x1": 768, "v6e:2x2": 1024}


# T and S, B, L and XL at 224 pixels. 384 pixels change the number of grid steps alone.
@pytest.mark.nightly
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", WIDEST)
@pytest.mark.parametrize("channels", [96, 128, 192, 256])
def test_compiles(channels, topology, compiler):
    device = tpu_topology(topology).devices[0]
    mesh = jax.sharding.Mesh(np.asarray([device]), ("data",))
    sharding = SingleDeviceSharding(device)

    def both(x, conv, gradient, keep, weights):
        return (
            mlp_pallas.forward(x, conv, keep, weights, EPSILON),
            mlp_pallas.backward(conv, gradient, keep, weights, EPSILON),
        )

    for stage in range(4):
        shape = (LANES, 56 // 2**stage, 56 // 2**stage, channels * 2**stage)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            supported = devices_for(shape, jnp.bfloat16, "auto") is not None
        assert supported == (shape[-1] <= WIDEST[topology])
        if not supported:
            continue
        shapes = jax.eval_shape(functools.partial(operands, shape, jnp.bfloat16))
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
        )
        text = compile_for_tpu(jax.jit(both), *shapes).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.tpu_compiler
def test_a_slice_of_chips_moves_no_images(compiler):
    mesh = create_mesh(2, 2, tpu_topology("v5e:2x2").devices)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    stage = blocks.Stage(32, (0.0, 0.5), downsample=False, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((512, 7, 7, 32), jnp.bfloat16, sharding=rows)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
    params = jax.eval_shape(
        lambda: stage.init(jax.random.key(0), jnp.ones((1, 7, 7, 32), jnp.bfloat16), False)
    )
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), params)

    def gradient(params, x, g, key):
        rngs = {"dropout": jax.random.wrap_key_data(key)}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            _, vjp = jax.vjp(lambda p, x: stage.apply(p, x, True, rngs=rngs), params, x)
        return vjp(g)

    text = compile_for_tpu(jax.jit(gradient), params, x, x, key).as_text()
    for kernel in ("mlp_forward", "mlp_backward"):
        assert len(re.findall(rf"%{kernel}[.\d]* = ", text)) >= 1
    # The weights' gradients are summed over the chips; images have (pixels, channels, images).
    assert re.search(r" all-reduce(-start)?\(", text)
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert not re.search(rf" {name}(-start)?\(", text)
