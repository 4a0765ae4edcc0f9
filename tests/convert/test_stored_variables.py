"""Variables that lie somewhere: conversions of ResNet and Swin, and runs with batch statistics."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from foreign_files import CASES, CASES_RESNET, foreign_file, written
from safetensors.numpy import load_file, save_file

from convnext_jax import cli
from convnext_jax.convert.__main__ import main
from convnext_jax.convert.pretrained import open_pretrained
from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.models import ModernizedResNet, create_model
from convnext_jax.training.checkpoints import Checkpointer
from convnext_jax.training.init_from import start_from
from convnext_jax.training.state import initial_state
from convnext_jax.training.weight_checkpoints import save_weights


def run(*arguments):
    return cli.run(main, [str(a) for a in arguments])


@pytest.mark.parametrize("layout", [CASES_RESNET, "transformers Swin"])
def test_the_program_there_and_back(layout, tmp_path, capsys):
    path = written(tmp_path, layout)
    assert run(path, "--dry-run") == 0
    assert run(path, tmp_path / "here") == 0
    printed = capsys.readouterr().out
    assert layout in printed
    averages = "running averages of batch norms" in printed
    assert averages == (layout == CASES_RESNET)
    back = tmp_path / "back.safetensors"
    assert run(tmp_path / "here", back, "--to", "safetensors") == 0
    there, again = load_file(path), load_file(back)
    assert there.keys() == again.keys()
    assert all(there[name].tobytes() == again[name].tobytes() for name in there)
    assert find_weights(tmp_path / "here").provenance == find_weights(path).provenance
    converted = open_pretrained(tmp_path / "here")
    assert converted.model == CASES[layout][0]
    chex.assert_trees_all_equal(converted.variables, find_weights(path).arrays())


def test_another_head_and_other_channels(tmp_path):
    path = written(tmp_path, CASES_RESNET)
    found, stored = open_pretrained(path, num_classes=3, in_channels=1), find_weights(path)
    chex.assert_trees_all_equal(found.variables["batch_stats"], stored.arrays()["batch_stats"])
    images = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    assert jax.eval_shape(found.model.apply, found.variables, images).shape == (1, 3)
    assert "the head is new, for 3 classes instead of 5" in " ".join(found.notes)


def test_conversions_of_earlier_versions_are_of_convnext(tmp_path):
    model = create_model("convnext_atto", depths=(1, 1), dims=(4, 6), num_classes=3)
    tensors = foreign_file(model, "transformers")
    save_file(tensors, tmp_path / "file.safetensors")
    weights = find_weights(tmp_path / "file.safetensors")
    metadata = json.loads(json.dumps(weights.provenance.to_dict()))
    del metadata["model"]["family"]
    save_weights(tmp_path / "old", {"params": weights.arrays()["params"]}, metadata)
    old = open_pretrained(tmp_path / "old")
    assert old.model == open_pretrained(tmp_path / "file.safetensors").model
    assert old.variables.keys() == {"params"}


MODEL = ModernizedResNet(num_classes=5, depths=(1, 1), width=4)


@pytest.fixture(scope="module")
def state():
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    state = jax.jit(lambda key: initial_state(MODEL, optax.sgd(0.1), images, key, ema=True))(
        jax.random.key(0)
    )

    def shifted(tree, by):
        return jax.tree.map(lambda x: x + by, tree)

    return dataclasses.replace(
        state,
        batch_stats=shifted(state.batch_stats, 1.0),
        ema_params=shifted(state.ema_params, 2.0),
        ema_batch_stats=shifted(state.ema_batch_stats, 3.0),
    )


@pytest.fixture(scope="module")
def workdir(state, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    config = {
        "model": {"name": "resnet50", "overrides": {"depths": [1, 1], "width": 4}},
        "data": {"image_size": 16, "eval_image_size": 20},
        "augment": {
            "crop": "random",
            "eval_crop_ratio": 0.875,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
        },
    }
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(4, state, metadata={"config": config, "num_classes": 5})
        checkpointer.wait()
    return directory.parent


def test_averaged_parameters_go_with_averaged_statistics(state, workdir):
    averaged = open_pretrained(workdir)
    assert averaged.model == MODEL
    assert averaged.preprocessing.image_size == 20
    assert averaged.preprocessing.resize_size == 22
    chex.assert_trees_all_equal(averaged.variables, state.ema_variables)
    raw = open_pretrained(workdir, averaged=False).variables
    chex.assert_trees_all_equal(raw, state.variables)


def test_another_run_starts_from_both(state, workdir):
    fresh = jax.tree.map(jnp.zeros_like, state)
    started = start_from(fresh, find_weights(workdir))
    chex.assert_trees_all_equal(started.variables, state.ema_variables)
    chex.assert_trees_all_equal(started.ema_variables, state.ema_variables)
    assert started.step == 0


def test_statistics_that_are_not_there_are_named(state, workdir, tmp_path):
    weights = find_weights(workdir)
    save_weights(
        tmp_path / "half",
        {"params": weights.arrays()["params"]},
        weights.provenance.to_dict(),
    )
    with pytest.raises(UserError, match="stem/norm/mean: absent in the source"):
        start_from(state, find_weights(tmp_path / "half"))
