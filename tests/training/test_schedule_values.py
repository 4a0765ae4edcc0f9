"""The rate of every step of the paper's runs, and the average that follows the weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax import experiment, recipes
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.training import sharding
from convnext_jax.training.evaluation import evaluate
from convnext_jax.training.state import create_state
from convnext_jax.training.step import jit_eval_step, jit_train_step, make_eval_step

IMAGENET_1K, IMAGENET_22K = 1_281_167, 14_197_122


def closed_form(peak, low, warmup, total):
    """Section D of the recipe, in double precision."""
    phase = np.arange(total - warmup) / (total - warmup)
    cosine = low + 0.5 * (peak - low) * (1 + np.cos(np.pi * phase))
    return np.concatenate([np.linspace(0, peak, warmup), cosine])


@pytest.mark.parametrize(
    ("config", "examples", "warmup", "total"),
    [
        (
            recipes.imagenet_1k("convnext_tiny", drop_path_rate=0.1),
            IMAGENET_1K,
            20 * 312,
            300 * 312,
        ),
        (
            recipes.imagenet_22k("convnext_tiny", drop_path_rate=0.0),
            IMAGENET_22K,
            5 * 3466,
            90 * 3466,
        ),
        (
            recipes.finetune("convnext_base", image_size=224, drop_path_rate=0.2, layer_decay=0.8),
            IMAGENET_1K,
            0,
            30 * 2502,
        ),
    ],
    ids=["1K: 300 epochs × 312 steps", "22K: 90 × 3,466", "fine-tuning: 30 × 2,502"],
)
def test_every_rate_of_a_run_is_the_closed_form(config, examples, warmup, total):
    steps = experiment.durations(config, examples)
    assert (steps.warmup, steps.total) == (warmup, total)
    _, schedule = experiment.build_optimizer(config, ConvNeXt(), steps)
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(total, dtype=jnp.int32))
    optim = config.optim
    expected = closed_form(optim.learning_rate, optim.min_learning_rate, warmup, total)
    off = np.abs(np.asarray(rates, np.float64) - expected)
    print(f"at most {off.max():.1e} off, at step {off.argmax()}")
    assert off.max() <= 1e-9


CLASSES, SIZE, DECAY = 3, 8, 0.75


@pytest.fixture(scope="module")
def averaged():
    """A run whose average has a short memory, and the weights before and after each step."""
    config = recipes.base()
    config.update({"batch_size": 8, "eval_batch_size": 8, "total": "20 steps"})
    config.ema_decay = DECAY
    config.model.dtype = "float32"
    config.model.overrides = {"depths": (1,), "dims": (4,), "patch_size": 4}
    config.data.image_size = SIZE
    config.augment.policy, config.augment.erasing_prob = "", 0.0
    config.optim.warmup, config.mix.group_size = "0 steps", 8
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    model = experiment.build_model(config, CLASSES, 1)
    optimizer, schedule = experiment.build_optimizer(
        config, model, experiment.durations(config, 160)
    )
    state = create_state(model, optimizer, (SIZE, SIZE, 3), mesh, seed=0, ema=True)
    step = jit_train_step(
        experiment.build_train_step(config, model, optimizer, schedule, mesh), state, mesh
    )
    rng = np.random.default_rng(0)
    states = [jax.device_get(state)]
    for _ in range(4):
        batch = {
            "image": rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8),
            "label": rng.integers(0, CLASSES, 8, dtype=np.int32),
        }
        state, _ = step(state, sharding.to_global(batch, sharding.batch_sharding(mesh)))
        states.append(jax.device_get(state))
    return model, mesh, state, states


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(np.subtract, a, b)))


def test_the_average_starts_from_the_initial_weights(averaged):
    first = averaged[-1][0]
    assert distance(first.ema_params, first.params) == 0


def test_the_average_takes_in_each_step_right_behind_it(averaged):
    for before, behind in itertools.pairwise(averaged[-1]):

        def average(params, before=before):
            return jax.tree.map(
                lambda e, p: DECAY * e.astype(np.float64) + (1 - DECAY) * p.astype(np.float64),
                before.ema_params,
                params,
            )

        moved = distance(behind.ema_params, before.ema_params)
        # The constant decay from the first step on, no warm-up and no bias correction; and of the
        # weights behind the step, not of those before it.
        assert distance(behind.ema_params, average(behind.params)) < 1e-4 * moved
        assert distance(behind.ema_params, average(before.params)) > 1e-2 * moved


def test_raw_and_averaged_weights_are_both_evaluated(averaged):
    model, mesh, state, states = averaged
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, 8, dtype=np.int32),
        "mask": np.ones(8, np.float32),
    }
    placed = sharding.to_global(batch, sharding.batch_sharding(mesh))
    eval_step = jit_eval_step(make_eval_step(model, mesh=mesh), state, mesh)
    metrics = evaluate(eval_step, state.variables, [placed], state.ema_variables)
    one_by_one = [
        float(eval_step({"params": params}, placed)["loss"]) / 8
        for params in (states[-1].params, states[-1].ema_params)
    ]
    assert metrics["loss"] == pytest.approx(one_by_one[0], rel=1e-5)
    assert metrics["ema_loss"] == pytest.approx(one_by_one[1], rel=1e-5)
    assert abs(metrics["loss"] - metrics["ema_loss"]) > 1e-4
