import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax.errors import UserError
from convnext_jax.models.registry import create_model
from convnext_jax.training import optim


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
