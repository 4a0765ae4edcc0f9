import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jaxprs import CHECKPOINTS, equations
from small_models import abstract_variables, jit, photos, random_variables

from convnext_jax.analysis.traced_counts import traced_counts
from convnext_jax.models import SwinTransformer, create_model, list_models
from convnext_jax.models.swin_attention import WindowAttention

# Parameters and GFLOPs of arXiv 2103.14030, table 1, and of the authors' model zoo for S and T.
PUBLISHED = {
    "swin_tiny": (28_288_354, 224, "4.5"),
    "swin_small": (49_606_258, 224, "8.7"),
    "swin_base": (87_768_224, 224, "15.4"),
    "swin_large": (196_532_476, 224, "34.5"),
    "swin_base_window12": (87_903_584, 384, "47.1"),
    "swin_large_window12": (196_735_516, 384, "103.9"),
}


def case(name):
    return pytest.param(name, marks=pytest.mark.slow if "window12" in name else ())


@pytest.mark.parametrize("name", [case(name) for name in PUBLISHED])
def test_counts_are_the_papers(name):
    parameters, size, gflops = PUBLISHED[name]
    counts = traced_counts(create_model(name), size)
    assert counts.parameters == parameters
    assert f"{counts.macs / 1e9:.1f}" == gflops


def test_names():
    assert list_models("swin*") == [
        f"swin_{size}{window}"
        for window in ("", "_window12")
        for size in ("tiny", "small", "base", "large")
    ]
    assert create_model("swin_small_window12") == create_model("swin_small", window_size=12)


def attention_by_definition(params, x, heads, size, shift, table_window):
    """Token by token: who is in whose window, without rolling or cutting the map."""
    batch, height, width, channels = x.shape
    padded = np.zeros((batch, -(-height // size) * size, -(-width // size) * size, channels))
    padded[:, :height, :width] = x
    row, column = (grid.ravel() for grid in np.indices(padded.shape[1:3]))
    tokens = padded.reshape(batch, -1, channels)
    qkv = tokens @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    query, key, value = np.split(qkv, 3, axis=-1)
    # Windows start half a window before the map, so its first rows share a narrower one.
    window = np.stack([(row - shift) // size, (column - shift) // size], axis=1)
    together = (window[:, None] == window[None]).all(axis=-1)
    distance = [axis[:, None] - axis[None] for axis in (row, column)]
    # Outside a window the distances may have no entry; they are masked there.
    near = [np.where(together, d, 0) + table_window - 1 for d in distance]
    bias = np.asarray(params["relative_position_bias_table"])[
        near[0] * (2 * table_window - 1) + near[1]
    ]
    mixed = np.zeros_like(tokens)
    for head in range(heads):
        part = slice(head * channels // heads, (head + 1) * channels // heads)
        scores = query[..., part] @ key[..., part].swapaxes(1, 2) / np.sqrt(channels // heads)
        scores = np.where(together, scores + bias[..., head], -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed[..., part] = weights @ value[..., part]
    mixed = mixed @ params["proj"]["kernel"] + params["proj"]["bias"]
    return mixed.reshape(padded.shape)[:, :height, :width]


@pytest.mark.parametrize(
    ("height", "width", "window", "shifted", "size", "shift"),
    [
        (8, 12, 4, False, 4, 0),
        (8, 12, 4, True, 4, 2),
        (9, 7, 5, True, 5, 2),  # an odd window, and a map that is padded
        (4, 8, 4, True, 4, 0),  # as high as the window: not shifted
        (3, 8, 5, True, 3, 0),  # lower than the window, which becomes smaller
    ],
)
def test_window_attention(height, width, window, shifted, size, shift):
    module = WindowAttention(num_heads=2, window_size=window, shifted=shifted)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 6)), jnp.float32)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype),
        jax.eval_shape(module.init, jax.random.key(0), x)["params"],
    )
    ours = jit(module.apply)({"params": params}, x)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = attention_by_definition(exact, np.asarray(x), 2, size, shift, window)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def small(**overrides):
    return SwinTransformer(
        **{
            "num_classes": 5,
            "depths": (2, 1),
            "width": 8,
            "num_heads": (2, 4),
            "window_size": 3,
            **overrides,
        }
    )


def test_every_parameter_counts():
    model, images = small(), photos(30, 21)
    variables = abstract_variables(model, images)
    program = jax.make_jaxpr(model.apply)(variables, images)
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True])
    assert all(used)
    assert len(used) == len(jax.tree.leaves(variables)) + 1


def test_stochastic_depth_and_remat():
    images = photos(30, 21)

    def primitives(**overrides):
        model = small(**overrides)
        program = jax.make_jaxpr(
            lambda v, x: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)})
        )(abstract_variables(model, images), images)
        return [eqn.primitive.name for eqn in equations(program)]

    # Two branches in each block; the first block's rate is 0.
    assert primitives(drop_path_rate=0.5).count("random_bits") == 4
    assert primitives().count("random_bits") == 0
    assert sum(name in CHECKPOINTS for name in primitives(remat=True)) == 3


def test_parts():
    """Logits are the head's product with the pooled features, those the mean of the last map."""
    model, images = small(norm_eps=1e-2, depths=(1, 1)), photos(30, 21)
    variables = random_variables(model, images)

    def outputs(variables, images):
        maps = model.apply(variables, images, method="feature_maps")
        pooled = model.apply(variables, images, method="pooled_features")
        return maps, pooled, model.apply(variables, images)

    maps, pooled, logits = jax.tree.map(np.asarray, jit(outputs)(variables, images))
    assert [leaf.shape for leaf in maps] == [(2, 8, 6, 8), (2, 4, 3, 16)]
    norm, head = (jax.tree.map(np.asarray, variables["params"][k]) for k in ("norm", "head"))
    last = maps[-1]
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-2)
    by_hand = (normed * norm["scale"] + norm["bias"]).mean(axis=(1, 2))
    np.testing.assert_allclose(pooled, by_hand, atol=1e-5)
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"], atol=1e-5)
    with pytest.raises(ValueError, match=r"indices must be one or more of 0\.\.1"):
        model.apply(variables, images, method="feature_maps", indices=())


def test_bfloat16():
    """Scores, softmax, final norm, pooling and head are float32; all else is bfloat16."""
    model, images = small(dtype=jnp.bfloat16), photos(30, 21)
    variables = abstract_variables(model, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    program = jax.make_jaxpr(model.apply)(variables, images)
    found = equations(program)
    products = [
        eqn for eqn in found if eqn.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    (head,) = (eqn for eqn in products if eqn.outvars[0].aval.shape == (2, model.num_classes))
    assert {var.aval.dtype for var in head.invars} == {jnp.dtype(jnp.float32)}
    products.remove(head)
    for eqn in products:
        assert {var.aval.dtype for var in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
        assert eqn.params["precision"] is None
    exponentials = [eqn for eqn in found if eqn.primitive.name == "exp"]
    assert len(exponentials) == sum(model.depths)
    assert {eqn.outvars[0].aval.dtype for eqn in exponentials} == {jnp.dtype(jnp.float32)}
    assert head.params["precision"][0] == jax.lax.Precision.HIGHEST
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method="feature_maps"), variables, images)
    assert {leaf.dtype for leaf in maps} == {jnp.dtype(jnp.bfloat16)}


def test_products_are_exact_in_float32():
    model, images = small(), photos(30, 21)
    program = jax.make_jaxpr(model.apply)(abstract_variables(model, images), images)
    products = [
        eqn
        for eqn in equations(program)
        if eqn.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    # Stem and head, one merging, and in each block four linear maps and two products of attention.
    assert len(products) == 2 + 1 + 6 * sum(model.depths)
    assert {eqn.params["precision"][0] for eqn in products} == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (3,)}, r"one entry per stage, but are \(2, 2, 6, 2\) and \(3,\)"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads must divide the channels of each stage"),
        ({"depths": (2, 0, 6, 2)}, "depths and width must be positive"),
        ({"window_size": 0}, "window_size must be 1 or more, but is 0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be in \[0, 1\), but is -0.1"),
        ({"num_classes": -1}, "num_classes must be 0 or more"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformer(**arguments)


def test_images_that_it_cannot_take():
    for images, message in (
        (jnp.zeros((32, 32, 3)), "SwinTransformer takes images"),
        (jnp.zeros((1, 3, 32, 3)), "stride of 4 needs at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(small().init, jax.random.key(0), images)
