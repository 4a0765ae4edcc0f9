"""What bfloat16 does to training: the losses of the digits' recipe, beside those of float32."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets

from convnext_jax import config_files, experiment
from convnext_jax.training import sharding
from convnext_jax.training.state import create_state
from convnext_jax.training.step import jit_train_step

CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"
STEPS, SMOOTHED_OVER = 120, 25
BAND = 0.005


@functools.cache
def losses(dtype, learning_rate=4e-3):
    """Of every step, all else being equal: weights, batches, mixing and stochastic depth."""
    overrides = {
        "total": f"{STEPS} steps",
        "optim.warmup": "20 steps",
        "optim.learning_rate": learning_rate,
        "model.dtype": dtype,
        "batch_size": 64,
    }
    config = config_files.load_config(
        str(CONFIG), [f"--config.{k}={v}" for k, v in overrides.items()]
    )
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    model = experiment.build_model(config, 10, 1)
    steps = experiment.durations(config, 1437)
    optimizer, schedule = experiment.build_optimizer(config, model, steps)
    state = create_state(model, optimizer, (8, 8, 3), mesh, seed=0, ema=True)
    step = jit_train_step(
        experiment.build_train_step(config, model, optimizer, schedule, mesh), state, mesh
    )
    digits = sklearn.datasets.load_digits()
    images = np.repeat(np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, -1)
    labels = digits.target.astype(np.int32)
    rng, found = np.random.default_rng(0), []
    for _ in range(STEPS):
        rows = rng.choice(len(images), config.batch_size, replace=False)
        batch = {"image": images[rows], "label": labels[rows]}
        state, metrics = step(state, sharding.to_global(batch, sharding.batch_sharding(mesh)))
        found.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    return np.array(found)


def smoothed(values):
    return np.convolve(values, np.full(SMOOTHED_OVER, 1 / SMOOTHED_OVER), mode="valid")


def distance(values):
    """The farthest that a curve, smoothed, lies from float32's, relative to it."""
    return np.abs(smoothed(values) / smoothed(losses("float32")) - 1).max()


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does():
    exact, rough = losses("float32"), losses("bfloat16")
    print(f"farthest apart {distance(rough):.2%}, last {exact[-25:].mean():.3f}")
    assert exact[-25:].mean() < 0.6 * exact[0]
    assert 0 < distance(rough) < BAND


@pytest.mark.slow
def test_nine_tenths_of_the_learning_rate_would_leave_the_band():
    assert distance(losses("float32", learning_rate=3.6e-3)) > BAND
