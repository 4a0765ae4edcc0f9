import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convnext_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from convnext_jax.data.mixing import MixConfig, smooth_one_hot
from convnext_jax.errors import UserError
from convnext_jax.models.convnext import ConvNeXt
from convnext_jax.training import optim, sharding, step
from convnext_jax.training.schedule import warmup_cosine
from convnext_jax.training.state import abstract_state, create_state

CLASSES, SIZE, BATCH = 4, 16, 16
NO_MIX = MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0)


def small_model(**kwargs):
    return ConvNeXt(
        num_classes=CLASSES,
        depths=(1, 1),
        dims=(8, 16),
        patch_size=2,
        layer_scale_init=1.0,
        **kwargs,
    )


def batch(seed=0, size=BATCH):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, size, dtype=np.int32),
    }


class Run:
    """A small run on the first `data × fsdp` devices."""

    def __init__(self, data=1, fsdp=1, model=None, mix_config=NO_MIX, **kwargs):
        self.model = model or small_model()
        self.mesh = sharding.create_mesh(data, fsdp, jax.devices()[: data * fsdp])
        self.schedule = warmup_cosine(1e-2, 1e-4, 2, 100)
        self.optimizer = optim.adamw(self.schedule, depths=self.model.depths, weight_decay=0.05)
        arguments = (self.model, self.optimizer, (SIZE, SIZE, 3), self.mesh)
        ema = kwargs.get("ema_decay") is not None
        self.abstract = abstract_state(*arguments, ema=ema)
        self.state = create_state(*arguments, seed=0, ema=ema)
        self.train_step = step.make_train_step(
            self.model,
            self.optimizer,
            self.schedule,
            num_classes=CLASSES,
            mix_config=mix_config,
            seed=0,
            mesh=self.mesh,
            **kwargs,
        )
        self.step = step.jit_train_step(self.train_step, self.abstract, self.mesh)
        self.sharding = sharding.batch_sharding(self.mesh)

    def __call__(self, batch):
        self.state, metrics = self.step(self.state, sharding.to_global(batch, self.sharding))
        return jax.device_get(metrics)


def assert_trees_close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def test_learns_and_counts():
    run = Run()
    fixed = batch()
    losses = [run(fixed)["loss"] for _ in range(30)]
    # The floor is the entropy of the smoothed targets, 0.35.
    assert losses[0] > 1.3
    assert losses[-1] < 0.45
    assert int(run.state.step) == 30
    assert int(run.state.skipped) == 0


def test_is_the_formula_written_out():
    """One step against gradient, optimizer and average spelled out by hand."""
    run = Run(ema_decay=0.9)
    params, opt_state = jax.tree.map(jnp.copy, (run.state.params, run.state.opt_state))
    data = batch()

    def loss_fn(params):
        images = (data["image"] / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        logits = run.model.apply({"params": params}, jnp.asarray(images, jnp.float32))
        targets = smooth_one_hot(jnp.asarray(data["label"]), CLASSES, 0.1)
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    @jax.jit
    def by_hand(params, opt_state, ema):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = run.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, params)
        return (params, opt_state, ema), loss, grads

    # Two steps, since the first one's learning rate is 0.
    ema = params
    for _ in range(2):
        (params, opt_state, ema), loss, grads = by_hand(params, opt_state, ema)
        metrics = run(data)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert_trees_close(run.state.params, params, rtol=1e-3, atol=1e-4)
    assert_trees_close(run.state.ema_params, ema, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_accumulation_gives_the_step_of_the_whole_batch(accumulation_steps):
    mixing = MixConfig(group_size=4)
    whole = Run(mix_config=mixing)
    parts = Run(mix_config=mixing, accumulation_steps=accumulation_steps)
    for i in range(3):
        np.testing.assert_allclose(parts(batch(i))["loss"], whole(batch(i))["loss"], rtol=1e-5)
    assert_trees_close(parts.state.params, whole.state.params, rtol=1e-3, atol=1e-4)


def test_micro_batches_deal_out_every_row_once():
    rows = jnp.arange(12)
    parts = step.micro_batches(rows, 3)
    np.testing.assert_array_equal(parts, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])


def test_accumulation_must_divide_the_batch():
    with pytest.raises(UserError, match="accumulation_steps = 3 does not divide the batch of 16"):
        Run(accumulation_steps=3)(batch())


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (1, 8)])
def test_the_mesh_does_not_change_the_trajectory(data, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    mixing = MixConfig(group_size=2)
    kinds = {"mix_config": mixing, "ema_decay": 0.9, "model": small_model(drop_path_rate=0.3)}
    one, many = Run(**kinds), Run(data, fsdp, **kinds)
    for i in range(4):
        np.testing.assert_allclose(many(batch(i))["loss"], one(batch(i))["loss"], rtol=2e-5)
    assert_trees_close(many.state.ema_params, one.state.ema_params, rtol=1e-3, atol=2e-4)
    if fsdp > 1:
        kernel = many.state.params["stages_1"]["blocks_0"]["pwconv1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // fsdp


def test_same_seed_and_step_give_the_same_bits():
    kinds = {"mix_config": MixConfig(group_size=2), "model": small_model(drop_path_rate=0.5)}
    a, b = Run(8, **kinds), Run(8, **kinds)
    for i in range(3):
        assert a(batch(i))["loss"] == b(batch(i))["loss"]
    jax.tree.map(np.testing.assert_array_equal, a.state.params, b.state.params)


def test_randomness_moves_with_the_step():
    """The same batch at another step is mixed and dropped otherwise."""
    kinds = {"mix_config": MixConfig(group_size=2), "model": small_model(drop_path_rate=0.5)}
    run = Run(**kinds)
    # The learning rate of step 0 is 0, so that only the randomness changes.
    first = run(batch())["loss"]
    second = run(batch())["loss"]
    assert first != second


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    run = Run(ema_decay=0.9)
    run(batch())
    poisoned = jax.tree.map(jnp.copy, run.state)
    poisoned = poisoned.replace(
        params=poisoned.params | {"norm": poisoned.params["norm"] | {"bias": jnp.full(16, jnp.inf)}}
    )
    before = jax.device_get(poisoned)
    state, metrics = run.step(poisoned, sharding.to_global(batch(), run.sharding))
    assert not metrics["finite"]
    assert int(state.skipped) == 1
    assert int(state.step) == int(before.step) + 1
    for part in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))


def test_the_state_is_donated():
    run = Run()
    old = run.state
    run(batch())
    assert old.params["head"]["kernel"].is_deleted()


def test_bfloat16_keeps_float32_state_and_loss():
    run = Run(model=small_model(dtype=jnp.bfloat16), ema_decay=0.9)
    metrics = run(batch())
    assert metrics["loss"].dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(run.state.params)} == {jnp.dtype("float32")}
    losses = [run(batch())["loss"] for _ in range(30)]
    # The floor is the entropy of the smoothed targets, 0.35.
    assert losses[0] > 1.3
    assert losses[-1] < 0.45


def test_normalisation_is_that_of_the_reference():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    expected = (image / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(normalize(jnp.asarray(image)), expected, atol=2e-6)
    assert normalize(jnp.asarray(image), dtype=jnp.bfloat16).dtype == jnp.bfloat16


class Constant:
    """Gives fixed logits, one row a label, so that ranks are known."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits, jnp.float32)

    def apply(self, variables, images, train):
        del variables, train
        return self.logits[: images.shape[0]]


def test_evaluation_counts_ranks_masks_and_ties():
    logits = [
        [9, 1, 2, 3, 4, 5, 6],  # label 0: first
        [6, 5, 4, 3, 2, 1, 0],  # label 4: fifth
        [6, 5, 4, 3, 2, 1, 0],  # label 5: sixth
        [0, 0, 0, 0, 0, 0, 0],  # a tie is no hit, not even among five
        [np.nan] * 7,
        [9, 1, 2, 3, 4, 5, 6],  # padding
    ]
    data = {
        "image": jnp.zeros((6, 2, 2, 3), jnp.uint8),
        "label": jnp.array([0, 4, 5, 0, 0, 0], jnp.int32),
        "mask": jnp.array([1, 1, 1, 1, 1, 0], jnp.float32),
    }
    sums = step.make_eval_step(Constant(logits))({"params": {}}, data)
    assert (float(sums["top1"]), float(sums["top5"]), float(sums["count"])) == (1, 2, 5)


def test_padding_does_not_touch_the_loss():
    logits = np.random.default_rng(0).normal(size=(4, 7))
    data = {
        "image": jnp.zeros((4, 2, 2, 3), jnp.uint8),
        "label": jnp.arange(4, dtype=jnp.int32),
        "mask": jnp.array([1, 1, 0, 0], jnp.float32),
    }
    sums = step.make_eval_step(Constant(logits))({"params": {}}, data)
    expected = -jax.nn.log_softmax(logits)[np.arange(2), np.arange(2)].sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
