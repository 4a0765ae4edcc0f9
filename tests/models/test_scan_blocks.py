"""The loop over blocks: the same network as without it, in everything but the program."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import errors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations
from small_models import abstract_variables, jit, photos, random_variables, run, small

from convnext_jax import experiment, recipes
from convnext_jax.errors import UserError
from convnext_jax.models import ConvNeXt
from convnext_jax.models.remat import POLICIES
from convnext_jax.training import sharding
from convnext_jax.training.gathering import gathered

# A small kernel, since the time of these tests is that of compiling its taps.
V1 = {"depths": (1, 3), "dims": (8, 12), "kernel_size": 3}
V1 |= {"drop_path_rate": 0.5, "layer_scale_init": 1.0}
V2 = V1 | {"use_grn": True, "layer_scale_init": None}


def loss(model, variables, images, key=3):
    """Mean square of the logits in training."""
    rngs = {"dropout": jax.random.key(key)}
    return jnp.square(model.apply(variables, images, train=True, rngs=rngs)).mean()


@functools.cache
def one_by_one(version, dtype):
    """A model, its variables, its loss and gradients."""
    model = small(**(V2 if version == "V2" else V1), dtype=dtype)
    variables = random_variables(model, photos(batch=8))
    return model, variables, gradients(model)(variables, photos(batch=8))


def gradients(model):
    return jit(jax.value_and_grad(lambda *arguments: loss(model, *arguments)))


def scans(program):
    return [e for e in equations(program) if e.primitive.name == "scan"]


@pytest.mark.parametrize(
    ("version", "remat"), [("V2", False), *(("V1", remat) for remat in (False, True, *POLICIES))]
)
def test_loss_and_gradients_are_those_of_blocks_one_by_one(version, remat):
    # A sample dropped or kept otherwise, in any block, would show.
    model, variables, expected = one_by_one(version, jnp.float32)
    scanned = model.clone(scan_blocks=True, remat=remat)
    found = gradients(scanned)(variables, photos(batch=8))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_draws_depend_on_the_key():
    model, variables, (expected, _) = one_by_one("V1", jnp.float32)
    scanned = jit(functools.partial(loss, model.clone(scan_blocks=True)))
    same, other = (float(scanned(variables, photos(batch=8), key)) for key in (3, 4))
    assert same == pytest.approx(float(expected), rel=1e-4)
    assert abs(other - same) > 1e-3 * same


def test_bfloat16():
    model, variables, expected = one_by_one("V1", jnp.bfloat16)
    images = photos(batch=8)
    scanned = model.clone(scan_blocks=True)
    found = gradients(scanned)(variables, images)
    # bfloat16 has 8 bits, and its roundings fall differently.
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype == jnp.float32
        assert jnp.linalg.norm(one - other) <= 0.05 * jnp.linalg.norm(other) + 1e-4


@pytest.mark.parametrize(
    "arguments",
    [V1, V2, V1 | {"depths": (3,), "dims": (8,), "isotropic": True, "patch_size": 8}],
    ids=["V1", "V2", "isotropic"],
)
def test_feature_maps_in_inference(arguments):
    model, images = small(**arguments), photos(height=17, width=24)
    variables = random_variables(model, images)
    plain, scanned = (
        run(m, variables, images, method="feature_maps")
        for m in (model, model.clone(scan_blocks=True))
    )
    chex.assert_trees_all_close(scanned, plain, rtol=1e-5, atol=1e-5)


def test_stored_parameters_know_nothing_of_the_loop():
    model, images = small(**V1), photos()
    plain, scanned = (
        jax.make_jaxpr(m.init)(jax.random.key(0), images)
        for m in (model, model.clone(scan_blocks=True))
    )
    assert str(plain) == str(scanned)  # so values are the same, too
    chex.assert_trees_all_equal_shapes_and_dtypes(
        *(abstract_variables(m, images) for m in (model, model.clone(scan_blocks=True)))
    )


def test_one_body_for_each_stage_of_several_blocks():
    model = small(depths=(1, 2, 3), dims=(8, 10, 12), depthwise="xla", scan_blocks=True)
    variables = abstract_variables(model, photos())
    program = jax.make_jaxpr(model.apply)(variables, photos())
    assert [e.params["length"] for e in scans(program)] == [2, 3]
    convolutions = [e for e in equations(program) if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 3 + 3  # stem and downsampling; a depthwise one a stage


def test_each_loop_draws_by_one_generator():
    model = small(**V1, scan_blocks=True)
    variables = random_variables(model, photos())
    program = jax.make_jaxpr(lambda v: loss(model, v, photos(batch=4)))(variables)
    (body,) = (e.params["jaxpr"] for e in scans(program))
    draws = [e for e in equations(body) if e.primitive.name == "random_bits"]
    assert [e.outvars[0].aval.shape for e in draws] == [(4, 1, 1, 1)]
    # Without drop path, or in evaluation, there is none, and no key is asked for.
    program = jax.make_jaxpr(lambda v: model.apply(v, photos()))(variables)
    assert not any("random" in e.primitive.name for e in equations(program))
    still = model.clone(drop_path_rate=0.0)
    program = jax.make_jaxpr(lambda v: still.apply(v, photos(), train=True))(variables)
    assert not any("random" in e.primitive.name for e in equations(program))


def test_errors_are_those_of_blocks_one_by_one():
    model = small(**V1, scan_blocks=True)
    variables = random_variables(model, photos())
    with pytest.raises(errors.InvalidRngError, match='needs PRNG for "dropout"'):
        model.apply(variables, photos(), train=True)
    del variables["params"]["stages_1"]["blocks_2"]
    with pytest.raises(errors.ScopeParamNotFoundError, match="/stages_1/blocks_2/dwconv"):
        model.apply(variables, photos())


def test_intermediates_are_those_of_blocks_one_by_one():
    model = small(**V1)
    variables = random_variables(model, photos())
    plain, scanned = (
        jax.eval_shape(
            lambda v, m=m: m.apply(v, photos(), capture_intermediates=True)[1], variables
        )
        for m in (model, model.clone(scan_blocks=True))
    )
    assert "blocks_2" in plain["intermediates"]["stages_1"]
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, scanned)


def test_cut_parameters_and_a_cut_batch():
    mesh = sharding.create_mesh(2, 4)
    # Wide enough that kernels of the scanned blocks are cut.
    model = small(**V1 | {"depths": (1, 2), "dims": (8, 64)})
    images = photos(batch=8)
    variables = random_variables(model, images)
    layout = sharding.state_sharding(variables["params"], mesh)
    blocks = layout["stages_1"]["blocks_1"]
    assert blocks["pwconv1"]["kernel"].spec == P(None, "fsdp")

    def of_cut(params, images):
        whole = {"params": gathered(params, mesh, jnp.float32)}
        return loss(model.clone(scan_blocks=True), whole, images)

    found = jax.jit(
        jax.value_and_grad(of_cut),
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(NamedSharding(mesh, P()), layout),
    )(variables["params"], images)
    expected = gradients(model)(variables, images)
    chex.assert_trees_all_close(
        jax.device_get(found), (expected[0], expected[1]["params"]), rtol=1e-4, atol=1e-5
    )


def test_export():
    model, variables, _ = one_by_one("V1", jnp.float32)
    images = photos(batch=8)

    def inference(images):
        return model.clone(scan_blocks=True).apply(variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    exported = jax.export.export(jit(inference), platforms=("cpu", "tpu"))(shape)
    again = jax.export.deserialize(exported.serialize())
    chex.assert_trees_all_close(
        again.call(images), run(model, variables, images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scan", [False, True])
def test_what_each_policy_computes_again(scan):
    model = ConvNeXt(
        num_classes=5, depths=(2,), dims=(8,), depthwise="xla", head_hidden=None, scan_blocks=scan
    )
    variables = random_variables(model, photos())

    def products(remat):
        program = jax.make_jaxpr(jax.grad(lambda v: loss(model.clone(remat=remat), v, photos())))
        names = [e.primitive.name for e in equations(program(variables))]
        # Each block's; those of stem (whose backward pass traces its forward pass again) and head
        # are the same for all.
        blocks = 1 if scan else 2
        counts = (names.count("conv_general_dilated") - 4, names.count("dot_general") - 3)
        return tuple(count / blocks for count in counts)

    # Forward 1 + 2, backward twice that.
    assert products("products") == (3, 6)
    assert products("depthwise") == (3, 8)
    assert products(True) == (4, 8)
    assert products(False) == (3, 6)


def test_mistaken_policies_are_told():
    with pytest.raises(ValueError, match="one of depthwise, products, but is 'dots'"):
        small(remat="dots")
    config = recipes.base()
    config.model.remat = "depthwise"
    config.model.scan_blocks = True
    model = experiment.build_model(config, 1000, 1)
    assert (model.remat, model.scan_blocks) == ("depthwise", True)
    config.model.name = "swin_tiny"
    with pytest.raises(UserError, match="no argument scan_blocks"):
        experiment.build_model(config, 1000, 1)
    config.model.scan_blocks = False
    with pytest.raises(UserError, match="only a ConvNeXt has policies"):
        experiment.build_model(config, 1000, 1)
