"""A model with stored weights in it: from files of others, from conversions, from training."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import convnext_jax
from convnext_jax.convert.pretrained import adapt_channels, load_pretrained, open_pretrained
from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.training.init_from import start_from
from convnext_jax.training.sharding import create_mesh, state_sharding
from convnext_jax.training.state import TrainState

pytest_plugins = ["run_fixtures"]
GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "models.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def weights_of(golden, label):
    prefix = f"{label}/weights/"
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """A file like the authors', of the small model whose outputs are recorded."""
    path = tmp_path_factory.mktemp("official") / "v1.safetensors"
    save_file(weights_of(golden, "v1"), path)
    return path


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level("INFO", logger="convnext_jax")


def test_gives_the_recorded_logits(official, golden):
    model, variables = convnext_jax.load_pretrained(official)
    images = golden["images"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    expected = golden["v1/outputs/logits"]
    logits = jax.jit(model.apply)(variables, images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_says_what_it_found(official):
    found = open_pretrained(official)
    assert (found.model.depths, found.model.dims) == ((1, 1, 2, 1), (6, 8, 10, 12))
    assert found.model.num_classes == 5
    assert found.model_name is None
    assert found.source == str(official)
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert len(found.sha256) == 64


def test_another_number_of_classes_remakes_the_head(official, caplog):
    stored = open_pretrained(official).variables["params"]
    found = open_pretrained(official, num_classes=300)
    params = dict(found.variables["params"])
    head = params.pop("head")
    chex.assert_trees_all_equal(params, {k: v for k, v in stored.items() if k != "head"})
    assert head["kernel"].shape == (12, 300)
    # head_init_scale of the fine-tuning recipes, .001, on a standard deviation of .02.
    assert np.std(head["kernel"]) == pytest.approx(2e-5, rel=0.05)
    assert not head["bias"].any()
    said = "the head is new, for 300 classes instead of 5"
    assert said in caplog.text
    assert said in found.notes
    assert found.class_names is None


def test_a_fresh_head_follows_its_scale_and_seed(official):
    def head(**arguments):
        return load_pretrained(official, num_classes=300, **arguments)[1]["params"]["head"]

    assert np.std(head(head_init_scale=1.0)["kernel"]) == pytest.approx(0.02, rel=0.05)
    chex.assert_trees_all_equal(head(seed=3), head(seed=3))
    assert (head(seed=3)["kernel"] != head(seed=4)["kernel"]).any()


def test_no_head_and_norms_for_a_backbone(official, caplog):
    model, variables = load_pretrained(official, num_classes=0, feature_norms=True)
    assert "head" not in variables["params"]
    assert "feature_norm_3 is new" in caplog.text
    images = jnp.ones((1, 32, 32, 3))
    chex.assert_trees_all_equal_shapes(
        variables, jax.eval_shape(model.init, jax.random.key(0), images)
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_input_channels(official, channels):
    rgb = load_pretrained(official)[1]["params"]["stem"]["conv"]["kernel"]
    found = open_pretrained(official, in_channels=channels)
    kernel = found.variables["params"]["stem"]["conv"]["kernel"]
    assert kernel.shape == (4, 4, channels, 6)
    if channels == 1:
        # A grey image gives what it gave as three equal channels.
        np.testing.assert_allclose(kernel[:, :, 0], rgb.sum(axis=2), rtol=1e-6)
    else:
        for c in range(channels):
            np.testing.assert_allclose(kernel[:, :, c], rgb[:, :, c % 3] * 3 / channels, rtol=1e-6)
    assert f"the stem takes {channels} channels instead of 3" in found.notes


def test_channels_keep_the_dtype():
    assert adapt_channels(jnp.ones((2, 2, 3, 4), jnp.bfloat16), 5).dtype == jnp.bfloat16


def test_an_encoder_gets_a_fresh_norm_and_head(golden, tmp_path):
    weights = weights_of(golden, "v2")
    encoder = {k: v for k, v in weights.items() if not k.startswith(("head.", "norm."))}
    save_file(encoder, tmp_path / "fcmae.safetensors")
    found = open_pretrained(tmp_path / "fcmae.safetensors", num_classes=4)
    assert found.variables["params"]["head"]["kernel"].shape == (12, 4)
    np.testing.assert_array_equal(found.variables["params"]["norm"]["scale"], np.ones(12))
    notes = " ".join(found.notes)
    assert "the norm is new, which the source does not have" in notes
    assert "the head is new, which the source does not have" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_sise": 5}, "kernel_sise"),
        ({"depths": (1, 1, 3, 1)}, "stages_2/blocks_2/dwconv/kernel: absent in the source"),
        ({"use_grn": True}, "stages_0/blocks_0/grn/gamma: absent in the source"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_contradicting_arguments(official, arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        load_pretrained(official, **arguments)
    assert str(official) in str(refused.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")


def test_the_workdir_of_a_run(finished, quick):
    found = open_pretrained(finished.workdir)
    averaged = found.variables["params"]
    assert found.model_name is None  # the registry's atto, but for its overrides
    assert found.model.dims == (8, 16)
    assert found.class_names == tuple("0123456789")
    assert found.preprocessing.image_size == 8
    assert found.preprocessing.resize_size is None
    raw = load_pretrained(finished.workdir, averaged=False)[1]["params"]
    assert (averaged["head"]["kernel"] != raw["head"]["kernel"]).any()
    with pytest.raises(UserError, match="leave it out"):
        load_pretrained(finished.workdir, sha256="0" * 64)


def test_a_workdir_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_pretrained(tmp_path)


def test_training_starts_from_a_foreign_file_under_its_sharding(official):
    mesh = create_mesh(data=2, fsdp=4)
    model, variables = load_pretrained(official)

    def fresh():
        params = model.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))["params"]
        step = jnp.zeros((), jnp.int32)
        return TrainState(
            step=step,
            params=params,
            batch_stats=None,
            opt_state=(),
            ema_params=None,
            ema_batch_stats=None,
            skipped=step,
        )

    shardings = state_sharding(jax.eval_shape(fresh), mesh)
    state = jax.jit(fresh, out_shardings=shardings)()
    started = start_from(state, find_weights(official))
    chex.assert_trees_all_equal(started.params, variables["params"])
    assert jax.tree.map(lambda x: x.sharding, started) == shardings
