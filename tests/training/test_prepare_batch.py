"""What the model is trained on is a function of key and batch, not of the devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax.data.augment import AugmentConfig, normalize
from convnext_jax.data.erasing import ErasingConfig
from convnext_jax.data.mixing import MixConfig, smooth_one_hot
from convnext_jax.data.policies import RandAugment, parse_policy
from convnext_jax.training import sharding
from convnext_jax.training.preparation import prepare_batch

BATCH, SIZE, CLASSES = 16, 16, 10
ERASING = ErasingConfig(prob=0.5, mode="rand")


class FewOperations(RandAugment):
    """RandAugment's law over operations of each kind that compile fast."""

    names = ("Identity", "Color", "TranslateX")


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, BATCH, dtype=np.int32),
    }


def prepared(devices, policy, mix_config):
    """Images and targets, and the compiled program's text."""
    mesh = sharding.create_mesh(devices, 1, jax.devices()[:devices])

    def prepare(key, batch):
        return prepare_batch(
            key,
            batch,
            num_classes=CLASSES,
            augment_config=AugmentConfig(policy=policy, erasing=ERASING),
            mix_config=mix_config,
            mesh=mesh,
        )

    rows = sharding.batch_sharding(mesh)
    program = jax.jit(prepare, in_shardings=(sharding.replicated(mesh), rows), out_shardings=rows)
    arguments = (
        jax.device_put(jax.random.key(7), sharding.replicated(mesh)),
        sharding.to_global(batch(), rows),
    )
    compiled = program.lower(*arguments).compile()
    return *jax.device_get(compiled(*arguments)), compiled.as_text()


def assert_same_on_all(policy, mix_config, devices):
    one, *others = (prepared(count, policy, mix_config) for count in devices)
    plain = normalize(jnp.asarray(batch()["image"]))
    assert np.abs(one[0] - plain).max() > 0.5, "something was done"
    for images, targets, text in others:
        # Programs for other device counts fuse otherwise, which may cost the last bit.
        np.testing.assert_allclose(images, one[0], atol=1e-6)
        np.testing.assert_allclose(targets, one[1], atol=1e-6)
        crossing = re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text)
        assert not crossing, "devices wait for each other"


def test_any_number_of_devices_gives_the_same_pixels():
    unmixed = MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0)
    assert_same_on_all(FewOperations(9.0, 0.5, 2, 0.5, True), unmixed, (1, 2, 4, 8))


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_pixels_with_the_papers_recipe():
    assert_same_on_all(parse_policy("rand-m9-mstd0.5-inc1"), MixConfig(group_size=2), (1, 8))


def test_with_nothing_on_it_normalises_and_smooths():
    images, targets = prepare_batch(
        jax.random.key(0),
        jax.tree.map(jnp.asarray, batch()),
        num_classes=CLASSES,
        augment_config=AugmentConfig(),
        mix_config=MixConfig(mixup_alpha=0.0, cutmix_alpha=0.0),
    )
    np.testing.assert_array_equal(images, normalize(jnp.asarray(batch()["image"])))
    labels = jnp.asarray(batch()["label"])
    np.testing.assert_array_equal(targets, smooth_one_hot(labels, CLASSES, 0.1))
