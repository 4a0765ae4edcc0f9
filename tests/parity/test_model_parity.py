"""The Flax model against PyTorch's: recorded outputs always, live ones under `-m parity`."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.models import ConvNeXt

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models.npz"
TOLERANCE = 1e-5
FOUR_STAGES = {"depths": (1, 1, 2, 1), "dims": (6, 8, 10, 12), "num_classes": 5}
V2 = {"use_grn": True, "layer_scale_init": None}
GOLDEN_MODELS = {
    "v1": ConvNeXt(**FOUR_STAGES),
    "v2": ConvNeXt(**FOUR_STAGES, **V2),
    "iso": ConvNeXt(isotropic=True, depths=(2,), dims=(8,), num_classes=5, layer_scale_init=None),
}


def flax_params(official):
    """Nests weights that bear official names, in Flax's layout."""
    params = {}
    for name, value in official.items():
        *path, leaf = name.split(".")
        if path[0] == "downsample_layers":
            stage, position = path[1:]
            owner = ["stem"] if stage == "0" else [f"stages_{stage}", "downsample"]
            # The stem is conv then norm, a downsampling is norm then conv.
            is_conv = (position == "0") == (stage == "0")
            path = [*owner, "conv" if is_conv else "norm"]
        elif path[0] == "stages":
            path = [f"stages_{path[1]}", f"blocks_{path[2]}", *path[3:]]
        elif path[0] == "blocks":
            path = ["stages_0", f"blocks_{path[1]}", *path[2:]]
        elif path[0] == "stem":
            path = ["stem", "conv"]
        if path[-1] == "grn":
            value = value.reshape(-1)
        elif leaf == "weight" and value.ndim == 4:
            leaf, value = "kernel", value.transpose(2, 3, 1, 0)
        elif leaf == "weight" and value.ndim == 2:
            leaf, value = "kernel", value.T
        elif leaf == "weight":
            leaf = "scale"
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(value)
    return params


def flax_outputs(model, official, images):
    variables = {"params": flax_params(official)}
    chex.assert_trees_all_equal_shapes_and_dtypes(
        variables, jax.eval_shape(model.init, jax.random.key(0), images)
    )

    @jax.jit
    def outputs(variables, images):
        maps = model.apply(variables, images, method="feature_maps")
        return model.apply(variables, images), maps

    logits, maps = outputs(variables, images)
    return {"logits": logits, **{f"stage_{i}": features for i, features in enumerate(maps)}}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(np.abs(value).max())
        difference = float(np.abs(np.asarray(actual[name]) - value).max())
        assert difference <= TOLERANCE * scale, (
            f"{name} differs by {difference:.2e} of at most {scale:.2g}"
        )


@pytest.mark.parametrize("label", GOLDEN_MODELS)
def test_recorded_outputs(label):
    with np.load(GOLDEN, allow_pickle=False) as file:
        arrays = dict(file)

    def under(kind):
        prefix = f"{label}/{kind}/"
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    images = arrays["images"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert_close(flax_outputs(GOLDEN_MODELS[label], under("weights"), images), under("outputs"))


@pytest.mark.parity
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (70, 45), (96, 128)])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("version", [1, 2, "iso"])
def test_live_outputs(version, layer_scale, height, width):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden_models import build, evaluate, official_weights

    if version == 2 and layer_scale:
        pytest.skip("V2 has no layer scale")
    depths, dims = ([3], [16]) if version == "iso" else ([2, 1, 3, 1], [16, 24, 32, 48])
    reference = build(version, depths, dims, seed=height, layer_scale=layer_scale)
    images = np.random.default_rng(width).normal(size=(2, height, width, 3)).astype(np.float32)
    model = ConvNeXt(
        depths=depths,
        dims=dims,
        num_classes=5,
        isotropic=version == "iso",
        use_grn=version == 2,
        layer_scale_init=1.0 if layer_scale else None,
    )
    expected = evaluate(reference, images)
    assert_close(flax_outputs(model, official_weights(reference.state_dict()), images), expected)
