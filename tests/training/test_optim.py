import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convnext_jax.errors import UserError
from convnext_jax.models.registry import create_model
from convnext_jax.training import optim
from convnext_jax.training.sharding import create_mesh


def abstract_params(name, **overrides):
    model = create_model(name, num_classes=10, **overrides)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def by_name(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {optim.path_name(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto", "convnext_iso_large"])
def test_only_kernels_decay(name):
    _, params = abstract_params(name)
    mask = by_name(optim.decay_mask(params))
    assert mask["head/kernel"]
    assert all(decays == name.endswith("/kernel") for name, decays in mask.items())
    assert {n.rsplit("/")[-1] for n, d in mask.items() if not d} >= {"bias", "scale"}


def test_of_swin_only_kernels_decay():
    _, params = abstract_params("swin_tiny", depths=(1, 1), num_heads=(3, 6))
    mask = by_name(optim.decay_mask(params))
    tables = [name for name in mask if name.endswith("relative_position_bias_table")]
    assert tables
    assert all(by_name(params)[name].ndim == 2 for name in tables)
    assert all(decays == name.endswith("/kernel") for name, decays in mask.items())


def test_of_a_resnet_batch_norms_do_not_decay_unless_all_do():
    _, params = abstract_params("resnet50", depths=(1, 1))
    mask = by_name(optim.decay_mask(params))
    assert all(decays == name.endswith("/kernel") for name, decays in mask.items())
    assert {name.rsplit("/")[-1] for name, decays in mask.items() if not decays} == {
        "scale",
        "bias",
    }
    assert all(by_name(optim.all_mask(params)).values())


# Section C of the recipe: the thirteen groups, by the parameter's own name.
GROUPS = {
    "stem/conv/kernel": 0,
    "stem/norm/scale": 0,
    "stages_0/blocks_2/dwconv/kernel": 1,
    "stages_1/downsample/conv/kernel": 2,
    "stages_1/blocks_0/gamma": 2,
    "stages_2/downsample/norm/bias": 3,
    "stages_2/blocks_0/pwconv1/kernel": 3,
    "stages_2/blocks_2/pwconv1/kernel": 3,
    "stages_2/blocks_3/pwconv1/kernel": 4,
    "stages_2/blocks_26/pwconv2/kernel": 11,
    "stages_3/downsample/conv/kernel": 12,
    "stages_3/blocks_1/norm/scale": 12,
    "norm/scale": 13,
    "head/kernel": 13,
    "head/bias": 13,
}


def test_layer_groups_are_the_reference():
    model, params = abstract_params("convnext_base")
    scales = by_name(optim.layer_scales(params, model.depths, 0.8))
    assert set(GROUPS) <= set(scales)
    for name, group in GROUPS.items():
        assert scales[name] == pytest.approx(0.8 ** (13 - group)), name


def test_single_layers_are_those_of_v2():
    model, params = abstract_params("convnextv2_atto")  # depths 2, 2, 6, 2
    scales = by_name(optim.layer_scales(params, model.depths, 0.9, "single"))
    expected = {
        "stem/conv/kernel": 1,
        "stages_0/blocks_0/norm/scale": 1,
        "stages_0/blocks_1/norm/scale": 2,
        "stages_1/downsample/conv/kernel": 3,
        "stages_2/blocks_5/grn/gamma": 10,
        "stages_3/downsample/norm/scale": 11,
        "stages_3/blocks_1/pwconv2/kernel": 12,
        "head/kernel": 13,
    }
    for name, layer in expected.items():
        assert scales[name] == pytest.approx(0.9 ** (13 - layer)), name


def constant(rate):
    return lambda step: jnp.full((), rate, jnp.float32)


def test_one_step_of_adamw_by_hand():
    params = {
        "stem": {"conv": {"kernel": jnp.full((2, 2), 2.0)}, "norm": {"bias": jnp.full((2,), 2.0)}},
        "head": {"kernel": jnp.full((2, 2), 3.0)},
    }
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.5), params)
    tx = optim.adamw(
        constant(0.1), depths=(3, 3, 9, 3), weight_decay=0.05, layer_decay=0.5, eps=1e-8
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    # At the first step the bias-corrected moments are g and g², so the adaptive part is sign(g).
    rate = 0.1 * 0.5**13
    np.testing.assert_allclose(new["stem"]["conv"]["kernel"], 2 - rate * (1 + 0.05 * 2), rtol=1e-6)
    np.testing.assert_allclose(new["stem"]["norm"]["bias"], 2 - rate, rtol=1e-6)
    np.testing.assert_allclose(new["head"]["kernel"], 3 - 0.1 * (1 + 0.05 * 3), rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    params = {"head": {"kernel": jnp.ones((2, 2))}}
    kinds = {"depths": (1,), "weight_decay": 0.0, "eps": 1.0}
    grads = {"head": {"kernel": jnp.full((2, 2), 50.0)}}
    free, _ = (tx := optim.adamw(constant(1.0), **kinds)).update(grads, tx.init(params), params)
    clipped, _ = (tx := optim.adamw(constant(1.0), clip_norm=1.0, **kinds)).update(
        grads, tx.init(params), params
    )
    # With eps = 1 the step is g / (|g| + 1): 50/51 free, and .5/1.5 once the norm is 1.
    np.testing.assert_allclose(free["head"]["kernel"], -50 / 51, rtol=1e-5)
    np.testing.assert_allclose(clipped["head"]["kernel"], -0.5 / 1.5, rtol=1e-5)


SMALL = {"conv": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([2.0, 0.0])}}
GRADIENTS = {"conv": {"kernel": jnp.array([[0.5, -0.25]]), "bias": jnp.array([0.5, 0.5])}}


def step(tx, params=SMALL, gradients=GRADIENTS):
    return tx.update(gradients, tx.init(params), params)[0]["conv"]


def test_one_step_of_lamb_by_hand():
    update = step(optim.lamb(constant(0.1), weight_decay=0.5, clip_norm=None, eps=1e-8))
    # Adam's first step is the sign; with the decay it is (2.5, 1). The kernel's norm is 5.
    ratio = 5 / np.sqrt(7.25)
    np.testing.assert_allclose(update["kernel"], [[-0.1 * ratio * 2.5, -0.1 * ratio]], rtol=1e-5)
    # The bias does not decay, so its step is Adam's own.
    np.testing.assert_allclose(update["bias"], [-0.1, -0.1], rtol=1e-5)
    always = step(optim.lamb(constant(0.1), weight_decay=0.5, eps=1e-8, always_adapt=True))
    np.testing.assert_allclose(always["bias"], np.full(2, -0.1 * 2 / np.sqrt(2)), rtol=1e-5)


def test_lamb_adapts_nothing_where_nothing_decays():
    lamb = step(optim.lamb(constant(0.1), weight_decay=0.0, eps=1e-8))
    adam = step(optim.adamw(constant(0.1), depths=(1,), weight_decay=0.0, clip_norm=1.0))
    jax.tree.map(np.testing.assert_array_equal, lamb, adam)


def test_a_tensor_of_zeros_takes_lambs_step_unscaled():
    params = {"conv": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}}
    update = step(optim.lamb(constant(0.1), weight_decay=0.5, eps=1e-8), params)
    np.testing.assert_allclose(update["kernel"], [[-0.1, 0.1]], rtol=1e-5)


def test_lamb_on_a_mesh_takes_the_norms_of_whole_tensors():
    mesh = create_mesh(data=2, fsdp=4)
    key = jax.random.key(0)
    params = {"head": {"kernel": jax.random.normal(key, (64, 16)), "bias": jnp.ones(16)}}
    gradients = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    tx = optim.lamb(constant(0.1), weight_decay=0.5)
    state = tx.init(params)
    expected = tx.update(gradients, state, params)[0]
    cut = {"head": {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()}}
    cut = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cut)
    found = jax.jit(tx.update)(jax.device_put(gradients, cut), state, jax.device_put(params, cut))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found[0], expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_of_sgd_by_hand(nesterov):
    tx = optim.sgd(constant(0.1), weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    state, params, trace = tx.init(SMALL), SMALL, 0.0
    for _ in range(2):
        update, state = tx.update(GRADIENTS, state, params)
        # The decay is part of the gradient, that of biases too.
        gradient = np.array([0.5, 0.5]) + 0.1 * np.array(params["conv"]["bias"])
        trace = 0.9 * trace + gradient
        moved = gradient + 0.9 * trace if nesterov else trace
        np.testing.assert_allclose(update["conv"]["bias"], -0.1 * moved, rtol=1e-6)
        params = optax.apply_updates(params, update)
    kernels_alone = optim.sgd(constant(0.1), weight_decay=0.1, decayed=optim.decay_mask)
    np.testing.assert_allclose(step(kernels_alone)["bias"], [-0.05, -0.05], rtol=1e-6)


def test_adamw_keeps_the_state_that_checkpoints_hold():
    # Names of what lies in checkpoints that were written before there were other optimizers.
    state = optim.adamw(constant(0.1), depths=(1,), weight_decay=0.05).init({"kernel": jnp.ones(2)})
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert paths == ["[0].count", "[0].mu['kernel']", "[0].nu['kernel']", "[2].count"]


@pytest.mark.parametrize("make", [optim.lamb, optim.sgd])
def test_all_optimizers_clip(make):
    large = jax.tree.map(lambda g: 1e3 * g, GRADIENTS)
    clipped = step(make(constant(0.1), weight_decay=0.0, clip_norm=1.0), gradients=large)
    norm = float(optax.tree.norm(GRADIENTS))
    unit = jax.tree.map(lambda g: g / norm, GRADIENTS)
    alike = step(make(constant(0.1), weight_decay=0.0, clip_norm=None), gradients=unit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, alike)
    with pytest.raises(UserError, match=r"config\.optim\.clip_norm is -1"):
        make(constant(0.1), weight_decay=0.0, clip_norm=-1.0)


@pytest.mark.parametrize("field", ["layer_decay", "clip_norm"])
def test_a_value_out_of_range_names_the_field(field):
    with pytest.raises(UserError, match=rf"config\.optim\.{field} is 0"):
        optim.adamw(constant(1.0), depths=(1,), weight_decay=0.0, **{field: 0.0})


def test_the_grouping_must_be_known():
    with pytest.raises(UserError, match='"group" or "single"'):
        optim.layer_id("head/kernel", (3, 3, 9, 3), "triple")


def test_ema_is_the_plain_recursion():
    ema, params = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
    for _ in range(3):
        ema = optim.update_ema(ema, params, 0.9)
    np.testing.assert_allclose(ema["w"], [0.9**3, 1 - 0.9**3], rtol=1e-6)
