import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.mixing import MixConfig, cutmix_box, mix, smooth_one_hot
from convnext_jax.errors import UserError

CLASSES = 10
jitted_mix = jax.jit(mix, static_argnums=(3, 4))


def constant_images(batch, size=32):
    """Image i is i everywhere, so that a pixel tells what was mixed into it."""
    return jnp.broadcast_to(
        jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, size, size, 3)
    )


def one_group(seed, batch=8, **kwargs):
    labels = jnp.arange(batch, dtype=jnp.int32)
    config = MixConfig(**{"group_size": 0, "label_smoothing": 0.0, **kwargs})
    images, targets = jitted_mix(
        jax.random.key(seed), constant_images(batch), labels, CLASSES, config
    )
    return np.asarray(images), np.asarray(targets)


def test_smoothing_is_the_closed_form():
    targets = smooth_one_hot(jnp.array([3], jnp.int32), CLASSES, 0.1)
    np.testing.assert_allclose(targets[0, 3], 1 - 0.1 + 0.01, rtol=1e-6)
    np.testing.assert_allclose(targets[0, 0], 0.01, rtol=1e-6)


def test_nothing_to_mix_leaves_the_images():
    images, targets = one_group(0, mixup_alpha=0.0, cutmix_alpha=0.0)
    np.testing.assert_array_equal(images, constant_images(8))
    np.testing.assert_array_equal(targets, np.eye(CLASSES)[:8])
    images, _ = one_group(0, prob=0.0)
    np.testing.assert_array_equal(images, constant_images(8))


def test_mixup_mixes_images_and_targets_by_one_weight():
    images, targets = one_group(1, cutmix_alpha=0.0)
    lam = targets[0, 0]
    assert 0 < lam < 1
    for i in range(8):
        np.testing.assert_allclose(images[i], lam * i + (1 - lam) * (7 - i), rtol=1e-5)
        np.testing.assert_allclose(targets[i, i], lam, rtol=1e-6)
        np.testing.assert_allclose(targets[i, 7 - i], 1 - lam, rtol=1e-6)


def test_cutmix_pastes_a_box_and_weighs_by_its_area():
    for seed in range(20):
        images, targets = one_group(seed, mixup_alpha=0.0)
        pasted = images[0, :, :, 0] == 7
        assert set(np.unique(images[0])) <= {0.0, 7.0}
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns), "what is pasted is a box"
        np.testing.assert_allclose(targets[0, 0], 1 - pasted.mean(), atol=1e-6)
        np.testing.assert_allclose(targets[0, 7], pasted.mean(), atol=1e-6)


def test_targets_always_sum_to_one():
    for seed in range(4):
        _, targets = one_group(seed, label_smoothing=0.1, prob=0.5)
        np.testing.assert_allclose(targets.sum(-1), 1.0, rtol=1e-6)


def test_the_laws_of_lambda_and_of_the_switch():
    draws = 2000
    config = MixConfig(group_size=2, label_smoothing=0.0)
    labels = jnp.tile(jnp.array([0, 1], jnp.int32), draws)
    images = jnp.tile(constant_images(2, 16), (draws, 1, 1, 1))
    images, targets = jax.jit(lambda k: mix(k, images, labels, CLASSES, config))(jax.random.key(5))
    # A mixed pixel lies strictly between its two sources only under mixup.
    inner = np.asarray(images)[::2].mean((1, 2, 3))
    first = np.asarray(images)[::2, 0, 0, 0]
    is_mixup = (first > 0) & (first < 1) & np.isclose(inner, first, atol=1e-5)
    share = is_mixup.mean()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / draws)
    lam = np.asarray(targets)[::2, 0][is_mixup]
    # Beta(.8, .8): mean 1/2, variance 1 / (4 (2 · .8 + 1)).
    variance = 1 / (4 * 2.6)
    assert abs(lam.mean() - 0.5) < 4 * np.sqrt(variance / len(lam))
    assert abs(lam.var() - variance) < 0.1 * variance


def test_box_sides_and_corrected_weight():
    height, width = 20, 30
    sizes = set()
    for seed in range(30):
        rows, columns, lam = cutmix_box(jax.random.key(seed), jnp.float32(0.75), height, width)
        tall, wide = int(rows.sum()), int(columns.sum())
        # int(20 · .5) = 10 and int(30 · .5) = 15, which loses a pixel to halving; less at a border.
        assert tall <= 10
        assert wide <= 14
        np.testing.assert_allclose(lam, 1 - tall * wide / (height * width), rtol=1e-6)
        sizes.add((tall, wide))
    assert (10, 14) in sizes


def test_groups_draw_apart_and_stay_apart():
    labels = jnp.arange(8, dtype=jnp.int32)
    config = MixConfig(cutmix_alpha=0.0, label_smoothing=0.0, group_size=2)
    _, targets = jitted_mix(jax.random.key(3), constant_images(8), labels, CLASSES, config)
    targets = np.asarray(targets)
    weights = targets[np.arange(0, 8, 2), np.arange(0, 8, 2)]
    assert len(np.unique(weights)) == 4
    for group in range(4):
        outside = np.delete(targets[2 * group], [2 * group, 2 * group + 1])
        assert not outside.any()


def test_does_not_depend_on_the_number_of_devices():
    labels = jnp.arange(16, dtype=jnp.int32) % CLASSES
    images = constant_images(16, 8)
    config = MixConfig(group_size=2)
    results = []
    for count in (1, 8):
        mesh = jax.make_mesh(
            (count,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
        )
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        mixed = jax.jit(lambda x, y: mix(jax.random.key(0), x, y, CLASSES, config))(
            jax.device_put(images, sharding), jax.device_put(labels, sharding)
        )
        results.append(jax.device_get(mixed))
    for images_, targets in results[1:]:
        # Programs for other device counts fuse otherwise, which may cost the last bit.
        np.testing.assert_allclose(images_, results[0][0], rtol=1e-6)
        np.testing.assert_allclose(targets, results[0][1], rtol=1e-6)


def test_a_group_larger_than_the_batch_is_the_batch():
    for a, b in zip(one_group(0, group_size=128), one_group(0, group_size=0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_group_must_divide_the_batch():
    with pytest.raises(UserError, match=r"group_size = 3 does not divide the batch of 8"):
        one_group(0, group_size=3)


def test_per_element_each_image_has_its_own_weight_and_its_groups_mirror():
    labels = jnp.arange(8, dtype=jnp.int32)
    config = MixConfig(label_smoothing=0.0, group_size=4, per_element=True)
    images, targets = jitted_mix(jax.random.key(2), constant_images(8), labels, CLASSES, config)
    images, targets = np.asarray(images), np.asarray(targets)
    np.testing.assert_allclose(targets.sum(-1), 1.0, rtol=1e-6)
    for i in range(8):
        partner = i // 4 * 4 + 3 - i % 4
        lam = targets[i, i]
        np.testing.assert_allclose(targets[i, partner], 1 - lam, atol=1e-6)
        # Under mixup and cutmix alike, the mean pixel is mixed by λ.
        np.testing.assert_allclose(images[i].mean(), lam * i + (1 - lam) * partner, atol=1e-4)
    assert len(np.unique(targets[np.arange(8), np.arange(8)])) == 8


def test_per_element_some_images_are_left_whole():
    labels = jnp.zeros(400, jnp.int32).at[::2].set(1)
    config = MixConfig(label_smoothing=0.0, group_size=2, prob=0.3, per_element=True)
    _, targets = jitted_mix(jax.random.key(4), constant_images(400, 8), labels, CLASSES, config)
    whole = (np.asarray(targets).max(-1) == 1).mean()
    assert abs(whole - 0.7) < 0.12
