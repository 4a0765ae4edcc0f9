"""Starting from another run's weights: what is taken over, and what is not."""

import shutil

import jax
import numpy as np
import pytest
from runs import checkpoint, tiny

from convnext_jax import experiment
from convnext_jax.convert.stored import find_weights
from convnext_jax.errors import UserError
from convnext_jax.training.init_from import start_from
from convnext_jax.training.reporting import read_metrics
from convnext_jax.training.sharding import create_mesh
from convnext_jax.training.state import create_state

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quick")
EXAMPLES = 1438


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level("INFO", logger="convnext_jax")


def fresh(num_classes=10, *, ema=True, size=8, **fields):
    config = tiny(**fields, seed=7)
    model = experiment.build_model(config, num_classes, 8)
    optimizer, _ = experiment.build_optimizer(config, model, experiment.durations(config, EXAMPLES))
    return create_state(model, optimizer, (size, size, 3), create_mesh(), seed=7, ema=ema)


def leaves(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in flat
    }


def saved(workdir, step, group):
    arrays = checkpoint(workdir, step)
    return {k.removeprefix(f"{group}/"): v for k, v in arrays.items() if k.startswith(f"{group}/")}


def best_step(workdir):
    evaluations = [r for r in read_metrics(workdir / "metrics.jsonl") if r["kind"] == "eval"]
    return max((r["ema_accuracy"], r["step"]) for r in evaluations)[1]


def test_the_same_classes_take_every_weight(finished, caplog):
    state = fresh()
    before = leaves(state)
    started = start_from(state, find_weights(finished.workdir))
    step = best_step(finished.workdir)
    source = saved(finished.workdir, step, "ema_params")
    params = leaves(started.params)
    assert params.keys() == source.keys()
    for name, array in source.items():
        assert params[name].tobytes() == array.tobytes(), name
        assert leaves(started.ema_params)[name].tobytes() == array.tobytes(), name
    raw = saved(finished.workdir, step, "params")
    assert any(params[name].tobytes() != array.tobytes() for name, array in raw.items())
    assert f"averaged weights of step {step} in {finished.workdir / 'checkpoints'}" in caplog.text
    assert "is new" not in caplog.text
    # All else begins anew.
    for name in before:
        if not name.startswith(("params/", "ema_params/")):
            assert leaves(started)[name].tobytes() == before[name].tobytes(), name
    # A donated buffer must not stand in two places.
    pointers = [x.addressable_data(0).unsafe_buffer_pointer() for x in jax.tree.leaves(started)]
    assert len(set(pointers)) == len(pointers)
    assert jax.tree.map(lambda x: x.sharding, started) == jax.tree.map(lambda x: x.sharding, state)


def test_other_classes_get_a_new_head(finished, caplog):
    state = fresh(3, ema=False)
    before = leaves(state.params)
    # The directory of checkpoints itself may be given as well.
    started = start_from(state, find_weights(finished.workdir / "checkpoints"))
    params = leaves(started.params)
    source = saved(finished.workdir, best_step(finished.workdir), "ema_params")
    assert params["head/kernel"].shape == (16, 3)
    for name in params:
        wanted = before if name.startswith("head/") else source
        assert params[name].tobytes() == wanted[name].tobytes(), name
    assert started.ema_params is None
    assert "the head is new, for 3 classes instead of 10" in caplog.text


def test_another_resolution_is_no_obstacle(finished):
    started = start_from(fresh(size=12), find_weights(finished.workdir))
    source = saved(finished.workdir, best_step(finished.workdir), "ema_params")
    assert leaves(started.params)["stem/conv/kernel"].tobytes() == (
        source["stem/conv/kernel"].tobytes()
    )


def test_another_model_is_refused(finished):
    deeper = {"depths": (1, 2), "dims": (8, 16), "patch_size": 1}
    wider = {"depths": (1, 1), "dims": (8, 24), "patch_size": 1}
    for overrides, leaf in ((deeper, "stages_1/blocks_1"), (wider, "stages_1/blocks_0")):
        with pytest.raises(UserError) as refused:
            start_from(fresh(model__overrides=overrides), find_weights(finished.workdir))
        message = str(refused.value)
        assert str(finished.workdir) in message
        assert leaf in message
        assert "do not fit the model that is wanted" in message
        assert "config.init_from" in message


def test_a_damaged_source_is_named(copy_of_finished):
    shutil.rmtree(copy_of_finished / "checkpoints" / str(best_step(copy_of_finished)) / "state")
    with pytest.raises(UserError, match=str(copy_of_finished)):
        start_from(fresh(), find_weights(copy_of_finished))
