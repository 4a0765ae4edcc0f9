"""Swin trains by the same program: its checkpoints go on, and are read like any other's."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_bitwise_equal, checkpoint, column, tiny

from convnext_jax import load_pretrained
from convnext_jax.models.swin import SwinTransformer
from convnext_jax.train import train

SMALL = {
    "depths": (2, 1),
    "num_heads": (1, 2),
    "width": 8,
    "window_size": 2,
    "patch_size": 1,
}


@pytest.mark.slow
def test_trains_goes_on_and_is_loaded(tmp_path):
    config = tiny(
        model__name="swin_tiny",
        model__overrides=SMALL,
        augment__policy="",
        augment__erasing_prob=0.0,
        mesh__fsdp=2,
    )
    workdir = tmp_path / "run"
    train(config, workdir)
    wanted, losses = checkpoint(workdir, 40), column(workdir, "loss")
    held_out = column(workdir, "ema_loss", "eval")
    assert held_out[-1] < held_out[0]
    assert any("relative_position_bias_table" in name for name in wanted)

    for step in (30, 40):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    train(config, workdir)
    assert column(workdir, "loss") == losses
    assert_bitwise_equal(checkpoint(workdir, 40), wanted)

    model, variables = load_pretrained(workdir)
    assert isinstance(model, SwinTransformer)
    assert model.window_size == 2
    logits = jax.jit(model.apply)(variables, jnp.zeros((2, 8, 8, 3)))
    assert logits.shape == (2, 10)
    np.testing.assert_array_equal(
        variables["params"]["head"]["bias"], wanted["ema_params/head/bias"]
    )
