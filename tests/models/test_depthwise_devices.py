"""The Pallas kernels over several devices."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from convnext_jax.analysis.tpu import compile_for_tpu, tpu_topology
from convnext_jax.data.mixing import MixConfig
from convnext_jax.models import depthwise_pallas, depthwise_pallas_lowering
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.models.depthwise import depthwise_conv
from convnext_jax.models.depthwise_pallas_devices import kernels_for
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.sharding import batch_sharding, create_mesh, replicated
from convnext_jax.training.state import abstract_state
from convnext_jax.training.step import (
    jit_eval_step,
    jit_train_step,
    make_eval_step,
    make_train_step,
)

# Images for which the kernels pay: three quarters of a register's lanes.
ENOUGH = 96
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


@pytest.fixture(scope="module")
def mesh():
    return create_mesh(4, 2)


def value_and_gradients(x, kernel, g, *, implementation="auto", mesh=None):
    def filtered(x, kernel):
        if mesh is None:
            return depthwise_conv(x, kernel, implementation=implementation)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return depthwise_conv(x, kernel, implementation=implementation)

    y, vjp = jax.vjp(filtered, x, kernel)
    return y, *vjp(g)


def arrays(images):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (images, 3, 4, 5), (3, 3, 1, 5), (images, 3, 4, 5)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def cut(mesh, x, kernel, g):
    rows = batch_sharding(mesh)
    return jax.device_put((x, kernel, g), (rows, replicated(mesh), rows))


def collectives(text):
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


@pytest.fixture
def on_every_backend(monkeypatch):
    """Takes what a TPU would run for any number of images; off it, XLA stands for the kernels."""
    monkeypatch.setattr(depthwise_pallas, "pays", lambda *_: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default, tpu: tpu(*x))


def test_each_device_filters_its_own_images(mesh, on_every_backend):
    operands = arrays(8)
    expected = value_and_gradients(*operands, implementation="xla")
    function = jax.jit(functools.partial(value_and_gradients, mesh=mesh))
    operands = cut(mesh, *operands)
    got = function(*operands)
    chex.assert_trees_all_close(got, expected, atol=2e-5)
    assert got[0].sharding.spec == got[1].sharding.spec == P(("data", "fsdp"))
    # The kernel's gradient is summed, and nothing else crosses the network.
    counts = collectives(function.lower(*operands).compile().as_text())
    assert counts == dict.fromkeys(COLLECTIVES, 0) | {"all-reduce": 1}


def test_the_sum_over_devices_is_under_vmap_too(mesh, on_every_backend):
    x, kernel, g = arrays(8)
    operands = x, jnp.stack([kernel, 2 * kernel]), g

    def function(**options):
        return jax.vmap(functools.partial(value_and_gradients, **options), (None, 0, None))

    got = jax.jit(function(mesh=mesh))(*cut(mesh, *operands))
    chex.assert_trees_all_close(got, function(implementation="xla")(*operands), atol=4e-5)


def test_the_kernels_on_each_device_make_up_the_whole(mesh, monkeypatch):
    for name, function, static in (
        ("_kernel_filter", depthwise_pallas.forward, ()),
        ("_kernel_gradient", depthwise_pallas.kernel_gradient, (2,)),
    ):
        interpreted = functools.partial(function, interpret=True)
        jitted = jax.jit(interpreted, static_argnums=static)
        monkeypatch.setattr(depthwise_pallas_lowering, name, jitted)
    operands = arrays(8)
    expected = value_and_gradients(*operands, implementation="xla")
    function = functools.partial(value_and_gradients, mesh=mesh, implementation="pallas")
    chex.assert_trees_all_close(jax.jit(function)(*cut(mesh, *operands)), expected, atol=2e-5)


def test_without_a_mesh_pallas_says_what_it_needs_and_auto_does_without(mesh):
    images = 8 * ENOUGH
    rows, whole = batch_sharding(mesh), replicated(mesh)
    x = jax.ShapeDtypeStruct((images, 3, 4, 5), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((3, 3, 1, 5), jnp.bfloat16, sharding=whole)

    def program(**options):
        function = jax.jit(functools.partial(value_and_gradients, **options))
        return jax.export.export(function, platforms=["tpu"])(x, kernel, x).mlir_module()

    assert "tpu_custom_call" not in program()
    assert program(mesh=mesh).count("@tpu_custom_call") == 2
    with pytest.raises(ValueError, match="can't tell how the images are cut"):
        program(implementation="pallas")


def test_which_images_each_device_has(mesh):
    choose = functools.partial(kernels_for, kernel_size=7, dtype=jnp.bfloat16, precision=None)
    least = ENOUGH
    whole, part = (8 * least, 7, 7, 96), (8 * least - 8, 7, 7, 96)
    assert choose(whole, required=False).mesh is None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert choose(whole, required=False).axes == ("data", "fsdp")
        assert choose(part, required=False) is None
        assert choose(part, required=True).count == 8
        assert choose((8 * least + 1, 7, 7, 96), required=False) is None
        with pytest.raises(ValueError, match="8 devices divide, but it has 9 images"):
            choose((9, 7, 7, 96), required=True)
    explicit = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(explicit):
        assert choose(whole, required=False) is None
        with pytest.raises(ValueError, match="without axes of type Explicit"):
            choose(whole, required=True)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P())
    def own(x):
        assert choose(x.shape, required=False).mesh is None
        return jnp.zeros(())

    jax.eval_shape(own, jax.ShapeDtypeStruct(whole, jnp.bfloat16))


def steps(mesh, scale):
    """The two steps of a small model, lowered for a TPU."""
    model = ConvNeXt(num_classes=4, depths=(1, 1), dims=(8, 16), dtype=jnp.bfloat16)
    state = abstract_state(model, optax.sgd(0.1), (32, 32, 3), mesh, ema=False)
    train = make_train_step(
        model,
        optax.sgd(0.1),
        warmup_cosine(0.1, 0.0, 1, 10),
        num_classes=4,
        mix_config=MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
        seed=0,
        mesh=mesh,
    )
    rows = batch_sharding(mesh)
    images = mesh.size * ENOUGH // scale
    batch = {
        "image": jax.ShapeDtypeStruct((images, 32, 32, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows),
    }
    evaluation = jit_eval_step(make_eval_step(model, mesh=mesh), state, mesh)
    masked = batch | {"mask": jax.ShapeDtypeStruct((images,), jnp.float32, sharding=rows)}
    return (
        (jit_train_step(train, state, mesh), (state, batch)),
        (evaluation, (state.variables, masked)),
    )


@pytest.mark.parametrize(("scale", "train", "evaluation"), [(1, 4, 2), (2, 0, 0)])
def test_the_steps_call_the_kernels(mesh, scale, train, evaluation):
    counts = []
    for step, operands in steps(mesh, scale):
        program = step.trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
        counts.append(program.count("@tpu_custom_call"))
    # Of each block the filter, once for both directions, and the kernel's gradient.
    assert counts == [train, evaluation]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_slice_of_chips_moves_no_images(blocks):
    pytest.importorskip("libtpu")
    mesh = create_mesh(2, 2, tpu_topology("v5e:2x2").devices)
    rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((512, 7, 7, 16), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((blocks, 7, 7, 1, 16), jnp.bfloat16, sharding=whole)

    @jax.checkpoint
    def block(x, kernel):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return depthwise_conv(x, kernel), None

    def gradient(x, kernel, g):
        y, vjp = jax.vjp(lambda x, kernel: jax.lax.scan(block, x, kernel)[0], x, kernel)
        return y, *vjp(g)

    text = compile_for_tpu(jax.jit(gradient), x, kernel, x).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3
    assert "feature_group_count" not in text
    counts = collectives(text)
    assert counts.pop("all-reduce") >= 1
    assert not any(counts.values())
