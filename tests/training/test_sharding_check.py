"""Whether an unusual share of the state lies whole on every device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convnext_jax.models.registry import create_model
from convnext_jax.training.sharding import state_sharding
from convnext_jax.training.sharding_check import (
    TOLERATED_SHARE,
    replicated_share,
    replication_warning,
)
from convnext_jax.training.state import TrainState


@functools.cache
def parameter_shapes(name):
    model = create_model(name)
    # A block stands for all of a stage but the third, of which the models have up to 36.
    depths = (6,) if len(model.depths) == 1 else (2, 2, 6, 2)
    images = jnp.zeros((1, 32, 32, 3))
    model = model.clone(depths=depths)
    return jax.eval_shape(lambda key: model.init(key, images)["params"], jax.random.key(0))


def state_of(params, devices, fsdp):
    """A state whose moments are left out: they are laid out as the parameters are."""
    mesh = AbstractMesh((devices // fsdp, fsdp), ("data", "fsdp"))
    laid_out = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        params,
        state_sharding(params, mesh),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    state = TrainState(
        step=count,
        params=laid_out,
        batch_stats=None,
        opt_state=None,
        ema_params=laid_out,
        ema_batch_stats=None,
        skipped=count,
    )
    return state, mesh


def test_the_share_is_that_of_the_bytes():
    params = {"pwconv1": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}}
    params["block/norm"] = {"bias": jax.ShapeDtypeStruct((4096,), jnp.float32)}
    state, _ = state_of(params, 8, 4)
    # Two trees of a cut kernel and a whole vector, a quarter of its size, and two counts.
    assert replicated_share(state) == (2 * 4096 * 4 + 8) / (2 * (16384 + 4096) * 4 + 8)
    assert replicated_share(state_of(params, 8, 1)[0]) == 1.0


# The share falls with the width: the narrowest of each kind, and the first common size.
@pytest.mark.parametrize(
    "name",
    ["convnext_atto", "convnext_femto", "convnextv2_atto", "convnext_iso_small", "convnext_tiny"],
)
def test_published_sizes_are_within_the_tolerance(name):
    for fsdp in (1, 2, 4, 8, 16, 32, 64):
        state, mesh = state_of(parameter_shapes(name), 256, fsdp)
        assert fsdp == 1 or replicated_share(state) < 0.6 * TOLERATED_SHARE
        assert replication_warning(state, mesh) is None


def test_an_axis_that_divides_no_channels_is_warned_of():
    state, mesh = state_of(parameter_shapes("convnext_tiny"), 28, 7)
    assert replicated_share(state) == 1.0
    megabytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(state)) / 1e6
    assert replication_warning(state, mesh) == (
        "config.mesh.fsdp = 7 leaves 100% of the training state "
        f"({megabytes:,.0f} MB) whole on every device, the largest parameters being "
        "stages_3/blocks_0/pwconv1/kernel 768×3072, stages_3/blocks_0/pwconv2/kernel 3072×768, "
        "stages_3/blocks_1/pwconv1/kernel 768×3072, since 7 does not divide their channels; "
        "give config.mesh.fsdp = 4"
    )


def test_where_no_other_axis_helps_none_is_the_remedy():
    state, mesh = state_of(parameter_shapes("convnext_base"), 7, 7)
    warning = replication_warning(state, mesh)
    assert warning.endswith(
        "on 7 devices no other does better, so give config.mesh.fsdp = 1, which exchanges less"
    )


def test_an_axis_that_divides_only_the_last_stages():
    state, mesh = state_of(parameter_shapes("convnext_femto"), 256, 256)
    assert TOLERATED_SHARE < replicated_share(state) < 0.5
    warning = replication_warning(state, mesh)
    assert "stages_3/downsample/conv/kernel 2×2×192×384" in warning
    assert warning.endswith("give config.mesh.fsdp = 128")


def test_a_model_of_small_arrays_is_told_why():
    model = create_model("convnext_atto", dims=(8, 16, 32, 48), num_classes=10)
    params = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)))["params"], jax.random.key(0)
    )
    warning = replication_warning(*state_of(params, 8, 8))
    assert "since arrays of fewer than 16,384 elements are not cut" in warning
    assert warning.endswith("give config.mesh.fsdp = 1, which exchanges less")
