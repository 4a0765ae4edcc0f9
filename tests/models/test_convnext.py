import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations
from small_models import (
    DEPTHS,
    DIMS,
    abstract_variables,
    initialised,
    jit,
    photos,
    random_variables,
    run,
    small,
)

from convnext_jax.models import ConvNeXt, create_model
from convnext_jax.models.blocks import Stem
from convnext_jax.models.layers import LayerNorm


def shapes(tree):
    return {
        "/".join(k.key for k in path[1:]): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def block_shapes(prefix, dim, scale=(), grn=False):
    leaves = {
        "dwconv/kernel": (7, 7, 1, dim),
        "dwconv/bias": (dim,),
        "norm/scale": (dim,),
        "norm/bias": (dim,),
        "pwconv1/kernel": (dim, 4 * dim),
        "pwconv1/bias": (4 * dim,),
        "pwconv2/kernel": (4 * dim, dim),
        "pwconv2/bias": (dim,),
    }
    if scale:
        leaves["gamma"] = (dim,)
    if grn:
        leaves |= {"grn/gamma": (4 * dim,), "grn/beta": (4 * dim,)}
    return {f"{prefix}/{name}": shape for name, shape in leaves.items()}


def test_parameter_tree_of_v1():
    expected = {
        "stem/conv/kernel": (4, 4, 3, 8),
        "stem/conv/bias": (8,),
        "stem/norm/scale": (8,),
        "stem/norm/bias": (8,),
        "norm/scale": (10,),
        "norm/bias": (10,),
        "head/kernel": (10, 5),
        "head/bias": (5,),
        "stages_1/downsample/norm/scale": (8,),
        "stages_1/downsample/norm/bias": (8,),
        "stages_1/downsample/conv/kernel": (2, 2, 8, 10),
        "stages_1/downsample/conv/bias": (10,),
        **block_shapes("stages_0/blocks_0", 8, scale=True),
        **block_shapes("stages_1/blocks_0", 10, scale=True),
        **block_shapes("stages_1/blocks_1", 10, scale=True),
    }
    model = small(depths=(1, 2), dims=(8, 10))
    assert shapes(abstract_variables(model, photos())) == expected
    assert shapes(abstract_variables(model.clone(remat=True), photos())) == expected


def test_parameter_tree_of_v2_and_isotropic():
    model = small(depths=(1,), dims=(8,), use_grn=True, layer_scale_init=None, num_classes=0)
    assert shapes(abstract_variables(model, photos())) == {
        "stem/conv/kernel": (4, 4, 3, 8),
        "stem/conv/bias": (8,),
        "stem/norm/scale": (8,),
        "stem/norm/bias": (8,),
        "norm/scale": (8,),
        "norm/bias": (8,),
        **block_shapes("stages_0/blocks_0", 8, grn=True),
    }
    iso = small(depths=(2,), dims=(8,), isotropic=True, layer_scale_init=0)
    assert iso.strides == (16,)
    assert shapes(abstract_variables(iso, photos())) == {
        "stem/conv/kernel": (16, 16, 3, 8),
        "stem/conv/bias": (8,),
        "norm/scale": (8,),
        "norm/bias": (8,),
        "head/kernel": (8, 5),
        "head/bias": (5,),
        **block_shapes("stages_0/blocks_0", 8),
        **block_shapes("stages_0/blocks_1", 8),
    }


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 33), (50, 50), (70, 45)])
def test_any_size_and_channel_count(height, width):
    model = small()
    images = photos(height, width, channels=2)
    variables = random_variables(model, images)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (4, 4, 2, 8)
    logits = run(model, variables, images)
    chex.assert_shape(logits, (2, 5))
    maps = run(model, variables, images, method="feature_maps")
    for stride, dim, features in zip((4, 8, 16, 32), DIMS, maps, strict=True):
        chex.assert_shape(features, (2, height // stride, width // stride, dim))


def test_a_remainder_at_the_border_is_dropped():
    model = small()
    images = photos(35)
    variables = random_variables(model, images)
    chex.assert_trees_all_equal(
        run(model, variables, images), run(model, variables, images[:, :32, :32])
    )


def test_logits_pooled_features_and_maps_fit_together():
    model = small()
    images = photos(64)
    variables = random_variables(model, images)
    params = variables["params"]
    logits = run(model, variables, images)
    pooled = run(model, variables, images, method="pooled_features")
    (last,) = run(model, variables, images, method="feature_maps", indices=(3,))
    chex.assert_shape(pooled, (2, DIMS[-1]))
    normed = LayerNorm().apply({"params": params["norm"]}, last.mean((1, 2)))
    chex.assert_trees_all_close(pooled, normed, atol=1e-5)
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)
    chex.assert_trees_all_close(logits, expected, atol=1e-5)

    headless = model.clone(num_classes=0)
    without_head = {name: value for name, value in params.items() if name != "head"}
    assert shapes(abstract_variables(headless, images)) == shapes({"params": without_head})
    chex.assert_trees_all_equal(run(headless, {"params": without_head}, images), pooled)


def test_head_norm_first_normalises_before_pooling():
    model = small(head_norm_first=True)
    images = photos(64)
    variables = random_variables(model, images)
    (last,) = run(model, variables, images, method="feature_maps", indices=(3,))
    expected = LayerNorm().apply({"params": variables["params"]["norm"]}, last).mean((1, 2))
    pooled = run(model, variables, images, method="pooled_features")
    chex.assert_trees_all_close(pooled, expected, atol=1e-5)
    after = run(small(), variables, images, method="pooled_features")
    assert np.abs(np.asarray(after - pooled)).max() > 1e-2


def test_hidden_head():
    model = small(head_hidden=6)
    images = photos()
    variables = random_variables(model, images)
    params = variables["params"]
    assert params["pre_logits"]["kernel"].shape == (14, 6)
    assert params["head"]["kernel"].shape == (6, 5)
    pooled = run(model, variables, images, method="pooled_features")
    hidden = pooled @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"].reshape(1, -1)
    hidden = jax.nn.gelu(hidden, approximate=False)
    expected = hidden @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)
    chex.assert_trees_all_close(run(model, variables, images), expected, atol=1e-5)


def test_feature_maps_by_index():
    model = small()
    images = photos(64)
    variables = random_variables(model, images)
    every = run(model, variables, images, method="feature_maps")
    assert len(every) == 4
    third, first = run(model, variables, images, method="feature_maps", indices=(2, 0))
    chex.assert_trees_all_equal(third, every[2])
    chex.assert_trees_all_equal(first, every[0])
    # Stages behind the last index are not in the program.
    program = jax.make_jaxpr(lambda v, x: model.apply(v, x, method="feature_maps", indices=(0,)))(
        variables, images
    )
    assert sum(e.primitive.name == "conv_general_dilated" for e in equations(program)) == 2
    for wrong in ((4,), (-1,), ()):
        with pytest.raises(ValueError, match=r"indices must be one or more of 0\.\.3"):
            run(model, variables, images, method="feature_maps", indices=wrong)


def test_feature_norms_come_with_a_plain_init_and_leave_the_logits_alone():
    model, plain = small(feature_norms=True), small()
    images = photos(64)
    variables = random_variables(model, images)
    params = variables["params"]
    assert [params[f"feature_norm_{i}"]["scale"].shape for i in range(4)] == [(d,) for d in DIMS]
    raw = run(plain, variables, images, method="feature_maps")
    normed = run(model, variables, images, method="feature_maps")
    for i in range(4):
        expected = LayerNorm().apply({"params": params[f"feature_norm_{i}"]}, raw[i])
        chex.assert_trees_all_close(normed[i], expected, atol=1e-5)
    chex.assert_trees_all_equal(run(model, variables, images), run(plain, variables, images))


@pytest.mark.parametrize(("patch_size", "stride", "side"), [(2, 1, 16), (2, 2, 17), (4, 2, 19)])
def test_stem_stride(patch_size, stride, side):
    model = small(patch_size=patch_size, stem_stride=stride)
    images = photos(side)
    maps = run(model, random_variables(model, images), images, method="feature_maps")
    for i, features in enumerate(maps):
        assert model.strides[i] == stride * 2**i
        assert features.shape[1:3] == (side // model.strides[i],) * 2


@pytest.mark.parametrize(
    ("patch_size", "stride", "before", "behind"), [(4, 4, 0, 0), (2, 1, 0, 1), (7, 4, 1, 2)]
)
def test_overlapping_patches_are_padded_by_what_they_overlap(patch_size, stride, before, behind):
    stem = Stem(8, patch_size, stride, use_norm=False)
    images = photos(18)
    variables = random_variables(stem, images)
    padded = np.pad(images, ((0, 0), (before, behind), (before, behind), (0, 0)))
    conv = jax.tree.map(np.asarray, variables["params"]["conv"])
    features = stem.apply(variables, images)
    chex.assert_shape(features, (2, 18 // stride, 18 // stride, 8))
    for row, column in np.ndindex(features.shape[1:3]):
        top, left = row * stride, column * stride
        patch = padded[:, top : top + patch_size, left : left + patch_size]
        expected = np.tensordot(patch, conv["kernel"], axes=3) + conv["bias"]
        chex.assert_trees_all_close(features[:, row, column], expected, atol=1e-4)


def test_layer_scale():
    model = small(layer_scale_init=0.25, drop_path_rate=0.0)
    images = photos()
    variables = initialised(model, images)
    gamma = variables["params"]["stages_2"]["blocks_1"]["gamma"]
    chex.assert_trees_all_equal(gamma, jnp.full((12,), 0.25))
    default = initialised(small(depths=(1,), dims=(8,)), images)["params"]["stages_0"]["blocks_0"][
        "gamma"
    ]
    chex.assert_trees_all_equal(default, jnp.full((8,), 1e-6))

    # γ = 0 silences every branch: the maps are those of stem and downsampling alone.
    def with_gamma(value):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.full_like(leaf, value) if path[-1].key == "gamma" else leaf,
            variables,
        )

    silent, halved, full = (
        run(model, with_gamma(value), images, method="feature_maps", indices=(0,))[0]
        for value in (0.0, 0.5, 1.0)
    )
    chex.assert_trees_all_close(halved - silent, 0.5 * (full - silent), atol=1e-6)
    assert np.abs(np.asarray(full - silent)).max() > 1e-4


def test_initial_values_follow_the_reference():
    # Wide enough for statistics, shallow enough for a test.
    model = ConvNeXt(num_classes=200, depths=(1,), dims=(256,), head_init_scale=0.1)
    params = initialised(model, jnp.ones((1, 32, 32, 3)))["params"]
    block = params["stages_0"]["blocks_0"]
    for kernel, std in (
        (params["stem"]["conv"]["kernel"], 0.02),
        (block["dwconv"]["kernel"], 0.02),
        (block["pwconv1"]["kernel"], 0.02),
        (block["pwconv2"]["kernel"], 0.02),
        (params["head"]["kernel"], 0.002),
    ):
        values = np.asarray(kernel, np.float64).ravel()
        assert values.std() == pytest.approx(std, rel=5 / np.sqrt(2 * values.size))
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
        # Not cut at 2 σ: 4.6 % of a normal lie beyond.
        assert np.mean(np.abs(values) > 2 * std) == pytest.approx(0.0455, abs=0.01)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not np.any(np.asarray(leaf))
        if path[-1].key == "scale":
            assert np.all(np.asarray(leaf) == 1)


def test_stochastic_depth_in_the_model():
    images = photos(batch=4)
    model = small(drop_path_rate=0.6, layer_scale_init=1.0)
    variables = random_variables(model, images)
    evaluated = run(model, variables, images)
    chex.assert_trees_all_equal(evaluated, run(small(), variables, images))
    first, again, other = (
        run(model, variables, images, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    assert np.any(np.asarray(first != other))
    # No rate, no key needed, and no random number in the program.
    program = jax.make_jaxpr(lambda v, x: small().apply(v, x, train=True))(variables, images)
    assert not any("random" in e.primitive.name for e in equations(program))
    # The first block's rate is 0; each of the other four draws one number per sample.
    program = jax.make_jaxpr(lambda v, x, k: model.apply(v, x, train=True, rngs={"dropout": k}))(
        variables, images, jax.random.key(0)
    )
    draws = [e for e in equations(program) if e.primitive.name == "random_bits"]
    assert [e.outvars[0].aval.shape for e in draws] == [(4, 1, 1, 1)] * 4


def test_remat_gives_the_same_loss_and_gradients():
    images = photos()
    plain = small(drop_path_rate=0.5, layer_scale_init=1.0, use_grn=True)
    variables = random_variables(plain, images)

    def loss_of(model):
        def loss(variables):
            rngs = {"dropout": jax.random.key(3)}
            return jnp.square(model.apply(variables, images, train=True, rngs=rngs)).mean()

        return loss

    remat = plain.clone(remat=True)
    expected = jit(jax.value_and_grad(loss_of(plain)))(variables)
    chex.assert_trees_all_close(
        jit(jax.value_and_grad(loss_of(remat)))(variables), expected, rtol=1e-4, atol=1e-5
    )

    def checkpoints(model):
        program = jax.make_jaxpr(loss_of(model))(variables)
        return sum(
            "remat" in e.primitive.name or e.primitive.name == "checkpoint"
            for e in equations(program)
        )

    assert checkpoints(plain) == 0
    assert checkpoints(remat) == sum(DEPTHS)


def test_mistaken_images_are_told():
    model = small()
    variables = random_variables(model, photos())
    for images, message in (
        (jnp.ones((32, 32, 3)), "add a batch axis"),
        (jnp.ones((1, 32, 32, 3), jnp.uint8), "normalised floating-point images, but got uint8"),
        (jnp.ones((1, 32, 31, 3)), "32×31 pixels are too small .* at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, variables, images)
    # A backbone cut at its second stage takes what that stage can.
    (features,) = model.apply(
        variables, jnp.ones((1, 9, 8, 3)), method="feature_maps", indices=(1,)
    )
    assert features.shape == (1, 1, 1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 2)}, "one entry per stage"),
        ({"depths": (1, 0, 1, 1)}, "must be positive"),
        ({"isotropic": True}, "isotropic=True takes a single depth"),
        ({"stem_stride": 5}, "stem_stride must be between 1 and patch_size=4, but is 5"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\)"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
    ],
)
def test_contradictory_arguments_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_lists_are_as_good_as_tuples():
    model = small(depths=list(DEPTHS), dims=list(DIMS))
    assert hash(model) == hash(small())


def test_a_published_variant_runs():
    model = create_model("convnextv2_atto", num_classes=3)
    images = photos(40, 33, batch=1)
    logits = run(model, random_variables(model, images), images)
    chex.assert_shape(logits, (1, 3))
    chex.assert_tree_all_finite(logits)
