"""The running averages of batch norms: in the step, on a mesh, in the average and in a run."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_bitwise_equal, checkpoint, column, tiny
from test_step import CLASSES, Run, assert_trees_close, batch

from convnext_jax import experiment
from convnext_jax.data.augment import normalize
from convnext_jax.errors import UserError
from convnext_jax.models.roadmap import ModernizedResNet
from convnext_jax.train import train
from convnext_jax.training import sharding
from convnext_jax.training.step import micro_batches

SMALL = {
    "model__name": "roadmap_t/07_dw_first",
    "model__overrides": {"depths": (1, 1), "width": 8},
    "augment__policy": "",
    "augment__erasing_prob": 0.0,
}


def network(**kwargs):
    return ModernizedResNet(
        num_classes=CLASSES, depths=(1, 1), width=4, spatial_conv="depthwise", **kwargs
    )


def statistics(model, state, data):
    """What a training call makes of the running averages."""
    images = normalize(jnp.asarray(data["image"]))
    _, updated = model.apply(state.variables, images, train=True, mutable=["batch_stats"])
    return updated["batch_stats"]


def test_the_step_updates_and_averages_them():
    run = Run(model=network(), ema_decay=0.9)
    before = jax.device_get(run.state)
    wanted = statistics(run.model, before, batch())
    run(batch())
    assert_trees_close(run.state.batch_stats, wanted, rtol=1e-4, atol=1e-5)
    average = jax.tree.map(lambda e, s: 0.9 * e + 0.1 * s, before.ema_batch_stats, wanted)
    assert_trees_close(run.state.ema_batch_stats, average, rtol=1e-4, atol=1e-5)
    assert run.state.ema_variables["batch_stats"] is run.state.ema_batch_stats


def test_each_micro_batch_counts():
    run = Run(model=network(), accumulation_steps=2)
    state = jax.device_get(run.state)
    for i in range(2):
        part = {name: micro_batches(rows, 2)[i] for name, rows in batch().items()}
        state = dataclasses.replace(state, batch_stats=statistics(run.model, state, part))
    run(batch())
    assert_trees_close(run.state.batch_stats, state.batch_stats, rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_leaves_them():
    run = Run(model=network(), ema_decay=0.9)
    head = run.state.params["head"]
    poisoned = head | {"bias": jnp.full(CLASSES, jnp.inf)}
    state = run.state.replace(params=run.state.params | {"head": poisoned})
    before = jax.device_get(state)
    state, _ = run.step(state, sharding.to_global(batch(), run.sharding))
    assert int(state.skipped) == 1
    for part in ("batch_stats", "ema_batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_the_mesh_changes_neither_kind(data, fsdp, groups, monkeypatch):
    """Statistics of the whole batch, and of eight parts, are alike on one device and on eight."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    one, many = (
        Run(model=network(bn_groups=groups)),
        Run(data, fsdp, model=network(bn_groups=groups)),
    )
    for i in range(3):
        np.testing.assert_allclose(many(batch(i))["loss"], one(batch(i))["loss"], rtol=1e-4)
    assert_trees_close(many.state.batch_stats, one.state.batch_stats, rtol=1e-3, atol=1e-4)
    assert all(
        leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(many.state.batch_stats)
    )


def test_per_device_is_the_number_of_devices():
    model = experiment.build_model(tiny(**SMALL, model__batch_norm="per_device"), 10, 8)
    assert model.bn_groups == 8
    assert experiment.build_model(tiny(**SMALL), 10, 8).bn_groups == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model__batch_norm": "synced"}, r'config\.model\.batch_norm .*"global" or "per_device"'),
        ({"batch_size": 8, "model__batch_norm": "per_device"}, "one value per channel"),
        (
            {"model__overrides": SMALL["model__overrides"] | {"bn_groups": 3}},
            "bn_groups = 3 does not divide the 32 images",
        ),
        (
            {
                "model__batch_norm": "per_device",
                "model__name": "convnext_atto",
                "model__overrides": {"patch_size": 1},
            },
            "has no batch norm",
        ),
    ],
)
def test_what_makes_no_sense_is_told(fields, said):
    with pytest.raises(UserError, match=said):
        experiment.build_model(tiny(**(SMALL | fields)), 10, 8)


@pytest.mark.slow
def test_a_run_keeps_them_and_goes_on_with_them(tmp_path):
    config, workdir = tiny(**SMALL), tmp_path / "run"
    train(config, workdir)
    wanted, losses = checkpoint(workdir, 40), column(workdir, "loss")
    groups = {name.split("/")[0] for name in wanted}
    assert groups >= {"params", "batch_stats", "ema_params", "ema_batch_stats"}
    assert column(workdir, "ema_loss", "eval")[-1] < column(workdir, "ema_loss", "eval")[0]
    for step in (30, 40):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    train(config, workdir)
    assert column(workdir, "loss") == losses
    assert_bitwise_equal(checkpoint(workdir, 40), wanted)
