"""The pipeline: its order, and that it is a function of key, image and place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from convnext_jax.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    augment,
    normalize,
)
from convnext_jax.data.erasing import ErasingConfig
from convnext_jax.data.pillow_ops import pillow
from convnext_jax.data.policies import ColorJitter, parse_policy

BATCH, HEIGHT, WIDTH = 16, 24, 32
FULL = AugmentConfig(policy=parse_policy("rand-m9-mstd0.5-inc1"), erasing=ErasingConfig(prob=0.5))


@pytest.fixture(scope="module")
def images():
    small = [
        np.asarray(Image.fromarray(photo).resize((WIDTH, HEIGHT)))
        for photo in load_sample_images().images
    ]
    return np.stack(small * (BATCH // 2))


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda key, images, indices: augment(key, images, indices, FULL))


def test_normalize_is_the_formula(images):
    wanted = (images / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    found = normalize(jnp.asarray(images))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert normalize(jnp.asarray(images), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_without_policy_and_erasing_images_are_normalised(images):
    found = augment(jax.random.key(0), jnp.asarray(images), jnp.arange(BATCH), AugmentConfig())
    np.testing.assert_array_equal(found, normalize(jnp.asarray(images)))


def test_an_image_depends_on_its_own_place_alone(run, images):
    key = jax.random.key(3)
    indices = np.arange(BATCH)
    whole = np.asarray(run(key, images, indices))
    assert whole.shape == images.shape
    order = np.random.default_rng(0).permutation(BATCH)
    np.testing.assert_array_equal(run(key, images[order], indices[order]), whole[order])
    elsewhere = np.asarray(run(key, images, indices + BATCH))
    assert (elsewhere != whole).any((1, 2, 3)).mean() > 0.5
    another = np.asarray(run(jax.random.key(4), images, indices))
    assert (another != whole).any((1, 2, 3)).mean() > 0.5


def test_it_is_pillows_operations_then_normalisation(images):
    """What was drawn, done by Pillow."""
    policy = ColorJitter(0.4)
    config = AugmentConfig(policy=policy)
    key, indices = jax.random.key(5), jnp.arange(BATCH)
    found = jax.jit(lambda images: augment(key, images, indices, config))(images)
    for index, image in enumerate(images):
        own = jax.random.split(jax.random.fold_in(key, index), 3)[0]
        operations, arguments = policy.draw(own, HEIGHT, WIDTH)
        for operation, argument in zip(operations, arguments, strict=True):
            image = pillow(policy.names[operation], image, float(argument), (0, 0, 0), "bicubic")
        np.testing.assert_allclose(found[index], normalize(jnp.asarray(image)), atol=1e-6)


def test_erasing_comes_after_normalisation(images):
    """A box of zeros is the mean colour, and the rest is as without it."""
    config = AugmentConfig(erasing=ErasingConfig(prob=1.0, mode="const"))
    key, indices = jax.random.key(6), jnp.arange(BATCH)
    found = np.asarray(jax.jit(lambda images: augment(key, images, indices, config))(images))
    plain = np.asarray(normalize(jnp.asarray(images)))
    erased = (found == 0).all(-1)
    np.testing.assert_allclose(found[~erased], plain[~erased], atol=1e-6)
    share = erased.mean((1, 2))
    assert share.min() > 0.01
    assert share.max() < 0.4


def test_wrong_shapes_and_types_are_refused(images):
    key = jax.random.key(0)
    with pytest.raises(AssertionError):
        augment(key, jnp.asarray(images, jnp.float32), jnp.arange(BATCH), FULL)
    with pytest.raises(AssertionError):
        augment(key, jnp.asarray(images), jnp.arange(BATCH - 1), FULL)
